"""`python -m cluster.local VERB`, which is what make runs."""

from cluster.local.verbs import main
from cluster.terminal import run

run(main)
