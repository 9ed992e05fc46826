"""`python -m cluster.remote VERB`, which is what make runs."""

from cluster.cli import run_command
from cluster.remote.verbs import main

run_command(main)
