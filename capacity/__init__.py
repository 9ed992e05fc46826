"""Checks and plans a deployment without a TPU: libtpu compiles the programs, and models their cost."""

import cluster as cluster  # which forgets what PYTHONPATH names beside our code
