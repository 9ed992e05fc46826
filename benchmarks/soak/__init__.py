"""A soak test of a local cluster with mixed load, clients that hang up, killed replicas, and a verdict."""
