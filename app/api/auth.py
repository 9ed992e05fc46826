"""Authentication: requires an API key, or if no keys are configured, a client on this machine.

A middleware in front of the routes: it reads only the head of a request that it refuses. Knows bare ASGI, and nothing
of Ray or of what the routes do.
"""

import ipaddress
import re
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.api_keys import ApiKey, ApiKeys, LimitReached
from app.api.error_responses import error_response
from app.api.errors import ApiError
from app.api.page_files import PREFIX

AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{1,5})?")
FORWARDING = (b"x-forwarded-for", b"x-real-ip", b"forwarded")
OPEN = ("/", "/healthz")  # need no key: load balancers and browsers request them, and they carry no data


class AuthMiddleware:
    """Counts a request against its key until its answer has ended, also that of a stream or of a failure."""

    def __init__(self, app: ASGIApp, keys: ApiKeys | None, cors_origins: Sequence[str] = ()) -> None:
        self.app = app
        self.keys = keys
        self.cors_origins = cors_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the application's start and end; no route takes a WebSocket
            await self.app(scope, receive, send)
            return
        try:
            key = self.admit(scope)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        scope.setdefault("state", {})["api_key"] = key
        try:
            await self.app(scope, receive, send)
        finally:
            if key:
                key.end()

    def admit(self, scope: Scope) -> ApiKey | None:
        """The key that the request counts against, if it needs one."""
        if self.keys is None:
            check_local(scope, self.cors_origins)
            return None
        path = path_of(scope)
        if path in OPEN or path.startswith(PREFIX):
            return None
        secret = bearer_token(scope)
        if secret is None:
            message = "This needs an API key, in a header `Authorization: Bearer KEY`."
            raise ApiError(401, message, None, "invalid_api_key")
        key = self.keys.find(secret)
        if key is None:
            raise ApiError(401, "This API key is not known.", None, "invalid_api_key")
        try:
            key.begin()
        except LimitReached as limit:
            raise ApiError(429, str(limit), None, "rate_limit_exceeded", limit.retry_after_s) from None
        return key


def count_images(scope: Scope, images: int) -> None:
    """Counts a request for n images as n. The middleware has counted one of them."""
    key: ApiKey | None = scope["state"]["api_key"]
    if key:
        key.spend(images - 1)


def owner_of(scope: Scope) -> str:
    """Whose jobs and files a request may see: those of the key's name, which outlives a change of the key itself."""
    key: ApiKey | None = scope["state"]["api_key"]
    return key.entry.name if key else ""


def bearer_token(scope: Scope) -> bytes | None:
    """From the header alone: URLs end up in logs and histories."""
    headers = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(headers) != 1:
        return None
    scheme, _, token = headers[0].strip().partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else None


def check_local(scope: Scope, cors_origins: Sequence[str] = ()) -> None:
    """Without keys, only programs on this machine, pages that it serves itself and those of `cors_origins` may ask.

    A page whose own name resolves to 127.0.0.1 (DNS rebinding) sends that name as Host. For a page of another site that
    embeds or fetches from this API, browsers send Origin or Sec-Fetch-Site; old ones neither. Programs send none.
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
    origins = values(scope, b"origin")
    if len(origins) == 1 and origins[0] in cors_origins:
        return
    for origin in origins:
        if not is_loopback_name(re.sub("^https?://", "", origin)):
            message = f"This API has no keys, so it answers pages of its own machine only, not of {origin[:100]!r}."
            raise ApiError(403, message, None, "cross_site")
    if leads_to_page(scope):
        return
    for site in values(scope, b"sec-fetch-site"):
        if site not in ("same-origin", "none"):
            message = f"This API has no keys, so it answers no other page's requests (Sec-Fetch-Site: {site[:20]!r})."
            raise ApiError(403, message, None, "cross_site")


def path_of(scope: Scope) -> str:
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path


def leads_to_page(scope: Scope) -> bool:
    """A link of any site may lead a browser's tab to the page, which carries no data and is never framed."""
    kind = values(scope, b"sec-fetch-mode", b"sec-fetch-dest")
    return scope["method"] == "GET" and path_of(scope) == "/" and sorted(kind) == ["document", "navigate"]


def values(scope: Scope, *wanted: bytes) -> list[str]:
    return [value.decode("latin-1").strip().lower() for name, value in scope["headers"] if name in wanted]


def is_loopback_name(authority: str) -> bool:
    """Browsers resolve `localhost` and names below it without a name server (RFC 6761, 6.3)."""
    parts = AUTHORITY.fullmatch(authority)
    if parts is None:
        return False
    address, name = parts[1], (parts[2] or "").removesuffix(".")
    return name == "localhost" or name.endswith(".localhost") or is_loopback((address or name, None))


def forwards_loopback(value: str) -> bool:
    """Whether a proxy on this machine forwards for a client on it. `Forwarded` is not parsed, so never by that."""
    return all(is_loopback((address.strip(), None)) for address in value.split(","))


def over_loopback(scope: Scope) -> bool:
    """Whether both ends of the connection are on this machine, as those of an SSH tunnel's last part are.

    The server's end is that of the socket (uvicorn's getsockname), which no client can change. uvicorn takes the
    client's end from X-Forwarded-For if the connection comes from this machine, so a client behind a local proxy
    does not count as local.
    """
    return is_loopback(scope.get("server")) and is_loopback(scope.get("client"))


def is_loopback(end: Any) -> bool:
    try:
        address = ipaddress.ip_address(end[0])
    except (TypeError, ValueError):  # the address is unknown, or a Unix socket
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
