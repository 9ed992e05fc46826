"""Connects this process to a Ray cluster, as jobs do.

If the token is wrong, Ray waits 20 s and then names no cause. So this module asks the cluster first, and reports the
cause in one sentence.
"""

import logging
import os

from cluster import auth_token
from cluster.cli import UserError

TIMEOUT_S = 10.0
HOW = 'Run it with `make job JOB=...`, or after: eval "$(make -s address)"'


def connect() -> None:
    """Calls `ray.init()`. Raises UserError if no cluster accepts us."""
    if os.environ.get("RAY_ADDRESS", "").startswith("127."):  # without it Ray replaces 127.0.0.1
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray  # takes a second and more

    if ray.is_initialized():
        return
    check(address())
    ray.init(logging_level=logging.WARNING)


def address() -> str:
    """The address that `ray.init()` would use. Without one, Ray would start a cluster and write into ~/.ray."""
    from app.ray_internals.core import find_bootstrap_address

    named = os.environ.get("RAY_ADDRESS", "")
    gcs_address = find_bootstrap_address(None) if named in ("", "auto") else named
    if not gcs_address:
        raise UserError(f"No Ray cluster is named here. {HOW}")
    if "://" in gcs_address:
        raise UserError(f"RAY_ADDRESS must be the host and port of Ray itself, got {gcs_address}. {HOW}")
    return str(gcs_address)


def check(address: str) -> None:
    """Raises UserError if no cluster answers, or if it refuses our token."""
    import grpc  # type: ignore[import-untyped]

    sent, where = auth_token.of_this_process()
    metadata = [(name.lower(), value) for name, value in auth_token.bearer(sent).items()] if sent else []
    with grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")  # an empty request is no bytes
        try:
            ask(b"", metadata=metadata, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            match error.code():
                case grpc.StatusCode.UNAUTHENTICATED if sent:
                    raise UserError(
                        f"The cluster at {address} has another token than the one in {where}. {HOW}"
                    ) from None
                case grpc.StatusCode.UNAUTHENTICATED:
                    raise UserError(f"The cluster at {address} asks for a token, and {where}. {HOW}") from None
                case code:
                    raise UserError(f"No Ray cluster answers at {address}: {code.name.lower()}. {HOW}") from None
