"""A load test for servers that draw pictures, and for the cluster under them. It imports neither JAX nor the engine."""

import cluster as cluster  # which forgets what PYTHONPATH names beside our code


class Mistake(Exception):
    """The user's: the command ends with this sentence and exit status 2."""
