"""The benchmarks that all measured figures come from."""

import cluster as cluster  # removes from sys.path what PYTHONPATH adds to our code
