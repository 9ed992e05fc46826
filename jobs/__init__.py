"""What `make job` runs on a cluster."""

import ops as ops  # which forgets what PYTHONPATH names beside our code
