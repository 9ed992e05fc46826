"""`python -m cluster.local VERB`, which is what make runs."""

from cluster.cli import run_command
from cluster.local.verbs import main

run_command(main)
