"""How the bundled model is trained: a module for each stage, the loop that they share, and what is written."""
