"""What `make job` runs on a cluster."""

import cluster as cluster  # which forgets what PYTHONPATH names beside our code
