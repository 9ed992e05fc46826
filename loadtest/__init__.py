"""A load test for text-to-image servers and the cluster under them. It imports neither JAX nor the engine."""

import cluster as cluster  # removes from sys.path what PYTHONPATH adds to our code
