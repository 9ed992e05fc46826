"""Imported by every Ray worker of our clusters, local or not: Serve's replicas open no gRPC port.

Ray 2.60 has each replica listen on every interface for calls that other deployments may make by gRPC, and what arrives
there is unpickled (ray/serve/_private/replica.py). Calls go by Ray's actors unless RAY_SERVE_USE_GRPC_BY_DEFAULT=1, so
nobody calls there, and no option closes it. In a worker nothing else opens a port by this function; Ray's client server
and the dashboard's agent, which do, are no workers and do not import this. tests/on_cluster/test_deployed.py holds
that no replica listens, so a Ray that does it in another way is noticed.
"""

from typing import Any

from ray._common import tls_utils


def open_none(server: Any, address: str) -> int:
    """In place of the function that binds; what it gives is the port, and Serve writes it into the replica's record."""
    return 0


tls_utils.add_port_to_grpc_server = open_none
