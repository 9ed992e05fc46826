"""Imported by every Ray worker of the local cluster: keeps Serve's replicas off the network.

All that Ray listens on stays on loopback once its node does, but for one: each Serve replica opens a gRPC port for
calls between deployments on every interface, and unpickles what it is sent (ray/serve/_private/replica.py, 2.60.0).
There is no option for that address, so it is replaced here. tests/test_cluster.py holds that nothing listens beyond
loopback, so a Ray that does it in another place is noticed.
"""

from typing import Any

from ray._common import tls_utils

bind: Any = tls_utils.add_port_to_grpc_server


def bind_to_loopback(server: Any, address: str) -> Any:
    return bind(server, address.replace("[::]:", "127.0.0.1:"))


tls_utils.add_port_to_grpc_server = bind_to_loopback
