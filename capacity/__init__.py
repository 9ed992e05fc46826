"""What a TPU would say, without one: programs compiled by libtpu for chips that are not there, and priced."""

import cluster as cluster  # which forgets what PYTHONPATH names beside our code
