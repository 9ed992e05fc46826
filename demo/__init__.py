"""How the bundled model is made: its scenes, its training, its quality. Jobs run from here as from jobs/."""

import cluster as cluster  # which forgets what PYTHONPATH names beside our code
