"""What measured figures come from."""

import ops as ops  # which forgets what PYTHONPATH names beside our code
