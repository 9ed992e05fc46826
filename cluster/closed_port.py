"""Keeps Serve's replicas from opening a gRPC port. Every Ray worker of our clusters imports this module at its start.

Ray 2.60 has each replica listen on every interface for calls that other deployments may make by gRPC, and unpickles
what arrives. Calls go by Ray's actors unless RAY_SERVE_USE_GRPC_BY_DEFAULT=1, so nobody needs the port, and no option
closes it. Nothing else in a worker opens a port by this function: Ray's client server and the dashboard's agent do, but
they do not import this module. tests/on_cluster/test_verbs.py holds that no replica listens.
"""

from app.ray_internals.core import close_replica_port

close_replica_port()
