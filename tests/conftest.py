"""What all tests share."""

import os

# An accidental broadcast between ranks is an error; JAX reads this when it is imported.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
