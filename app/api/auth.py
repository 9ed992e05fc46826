"""Who may come in: programs and own pages of this machine, or where keys are declared, whoever has one.

Stands before the routes, so of a request that is refused nothing but its head is read. Knows HTTP as bare ASGI, and
nothing of Ray or of what the routes do.
"""

import ipaddress
import re
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.api_keys import Holder, Keys, LimitReached
from app.api.errors import ApiError

AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{1,5})?")
FORWARDING = (b"x-forwarded-for", b"x-real-ip", b"forwarded")
OPEN = ("/", "/healthz")  # to all, where there are keys: load balancers ask them, and they draw nothing


class Door:
    """Counts a request against its key until the answer has ended, however it ends, a stream's too."""

    def __init__(self, app: ASGIApp, keys: Keys | None, refused: Callable[[ApiError], ASGIApp]) -> None:
        self.app = app
        self.keys = keys
        self.refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the application's start and end; no route takes a websocket
            await self.app(scope, receive, send)
            return
        try:
            holder = self.admit(scope)
        except ApiError as error:
            await self.refused(error)(scope, receive, send)
            return
        scope.setdefault("state", {})["holder"] = holder
        try:
            await self.app(scope, receive, send)
        finally:
            if holder:
                holder.end()

    def admit(self, scope: Scope) -> Holder | None:
        """Whoever is to be counted, if anyone is."""
        if self.keys is None:
            check_local(scope)
            return None
        if scope["path"].removeprefix(scope.get("root_path", "")) in OPEN:
            return None
        key = key_of(scope)
        if key is None:
            message = "This needs an API key, in a header `Authorization: Bearer KEY`."
            raise ApiError(401, message, None, "invalid_api_key")
        holder = self.keys.holder(key)
        if holder is None:
            raise ApiError(401, "This API key is not one of ours.", None, "invalid_api_key")
        try:
            holder.begin()
        except LimitReached as limit:
            raise ApiError(429, str(limit), None, "rate_limit_exceeded", limit.retry_after_s) from None
        return holder


def count_images(scope: Scope, images: int) -> None:
    """For a request of several, of which the door counted one."""
    holder: Holder | None = scope["state"]["holder"]
    if holder:
        holder.spend(images - 1)


def key_of(scope: Scope) -> bytes | None:
    """From the header alone: what stands in a URL ends up in logs and histories."""
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(given) != 1:
        return None
    scheme, _, key = given[0].strip().partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else None


def check_local(scope: Scope) -> None:
    """Without keys: this machine alone, and in its browsers no page of anybody else's.

    A page that has its own name resolve to 127.0.0.1 (DNS rebinding) sends that name as Host. A page that embeds or
    fetches something from here sends Origin or Sec-Fetch-Site, old browsers neither. Programs send none of them.
    """
    opens = "set args.api_keys_file to open it"
    if not over_loopback(scope) or not all(map(forwards_loopback, values(scope, *FORWARDING))):
        message = f"This API has no keys, so it answers its own machine only: {opens}."
        raise ApiError(403, message, None, "loopback_only")
    for host in values(scope, b"host"):
        if not is_loopback_name(host):
            message = (
                "This API has no keys, so it answers as 127.0.0.1, [::1], localhost or a name that ends in .localhost "
                f"only, and this request is for {host[:100]!r}: {opens}."
            )
            raise ApiError(403, message, None, "loopback_only")
    for origin in values(scope, b"origin"):
        if not is_loopback_name(re.sub("^https?://", "", origin)):
            message = f"This API has no keys, so it answers pages of its own machine only, not of {origin[:100]!r}."
            raise ApiError(403, message, None, "cross_site")
    for site in values(scope, b"sec-fetch-site"):
        if site not in ("same-origin", "none"):
            message = f"This API has no keys, so it answers no other page's requests (Sec-Fetch-Site: {site[:20]!r})."
            raise ApiError(403, message, None, "cross_site")


def values(scope: Scope, *wanted: bytes) -> list[str]:
    return [value.decode("latin-1").strip().lower() for name, value in scope["headers"] if name in wanted]


def is_loopback_name(authority: str) -> bool:
    """Of `localhost` and names below it browsers ask no name server, and none has them (RFC 6761, 6.3)."""
    parts = AUTHORITY.fullmatch(authority)
    if parts is None:
        return False
    address, name = parts[1], (parts[2] or "").removesuffix(".")
    return name == "localhost" or name.endswith(".localhost") or is_loopback((address or name, None))


def forwards_loopback(value: str) -> bool:
    """Whether the client of a proxy on this machine is on it, too. What `Forwarded` says is not read, so never."""
    return all(is_loopback((address.strip(), None)) for address in value.split(","))


def over_loopback(scope: Scope) -> bool:
    """Whether both ends of the connection are on this machine, as both ends of an SSH tunnel's last part are.

    The near end is the socket's own (uvicorn's getsockname), which nothing that a client sends can change. The far end
    may be what X-Forwarded-For says, but only if the connection comes from this machine: so whoever comes by way of a
    proxy that runs here does not pass for the proxy.
    """
    return is_loopback(scope.get("server")) and is_loopback(scope.get("client"))


def is_loopback(end: Any) -> bool:
    try:
        address = ipaddress.ip_address(end[0])
    except (TypeError, ValueError):  # no end is known, or it is a Unix socket
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
