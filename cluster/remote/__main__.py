"""`python -m cluster.remote VERB`, which is what make runs."""

from cluster.remote.verbs import main
from cluster.terminal import run

run(main)
