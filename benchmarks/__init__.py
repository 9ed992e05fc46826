"""The benchmarks that all measured figures come from."""

import cluster as cluster  # which forgets what PYTHONPATH names beside our code
