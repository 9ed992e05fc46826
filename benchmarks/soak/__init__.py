"""A soak test of a local cluster: mixed load, clients that hang up, replicas that are killed, and a verdict."""
