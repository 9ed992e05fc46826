"""What the Makefile's verbs run: the environment, the cluster, the deployment, the demonstration."""
