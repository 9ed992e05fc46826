"""What all tests share."""

import os
import signal

pytest_plugins = ["tests.skips"]

# An accidental broadcast between ranks is an error; JAX reads this when it is imported.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

# A shell that starts the tests in the background has Ctrl-C ignored, which the commands that tests stop would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
