"""The key-value store of Ray's head: what the controller's autoscaling policy leaves for the ingress."""

from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_initialized, _internal_kv_put

__all__ = ["AUTOSCALING", "read", "write"]

AUTOSCALING = "imagine:autoscaling"  # the latest decision, as a sentence


def write(key: str, text: str) -> None:
    """Does nothing outside a cluster."""
    if _internal_kv_initialized():  # type: ignore[no-untyped-call]
        _internal_kv_put(key.encode(), text.encode(), overwrite=True)


def read(key: str) -> str | None:
    """Blocks until the head has answered."""
    value = _internal_kv_get(key.encode()) if _internal_kv_initialized() else None  # type: ignore[no-untyped-call]
    return None if value is None else value.decode()
