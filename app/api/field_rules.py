"""What fields of a request must be together. Each alone is checked in fields.py. Knows no HTTP library."""

from collections.abc import Mapping
from typing import Any

from app.types import InvalidField

LOSSLESS = 100  # the output_compression that a png has anyway


def check_together(resolved: Mapping[str, Any], values: Mapping[str, object]) -> None:
    """The rules about more than one field. `values` are those that the request has."""
    compression = values.get("output_compression", LOSSLESS)
    if compression != LOSSLESS and resolved["output_format"] == "png":
        message = f"output_compression below {LOSSLESS} needs output_format webp or jpeg: png loses nothing."
        raise InvalidField("output_compression", message)
    for name in ("partial_images", "progress"):
        if resolved[name] and not resolved["stream"]:
            raise InvalidField(name, f"{name} needs stream to be true.")
    if resolved["stream"] and resolved["n"] > 1:  # OpenAI's events do not say which of several images they belong to
        raise InvalidField("n", f"n must be 1 where stream is true, got {resolved['n']}.")


def check_job(resolved: Mapping[str, Any]) -> None:
    """The rules about requests that are answered by a job, and about pictures by URL."""
    if resolved["stream"] and resolved["response_format"] == "url":
        raise InvalidField("response_format", "response_format must be b64_json where stream is true.")
    if resolved["webhook_url"] and not resolved["async"]:
        raise InvalidField("webhook_url", "webhook_url needs async to be true.")
    if not resolved["async"]:
        return
    if resolved["stream"]:
        raise InvalidField("stream", "stream must be false where async is true.")
    if resolved["response_format"] == "b64_json":
        raise InvalidField("response_format", "response_format must be url where async is true.")
