"""Fetches images from URLs, of hosts that the config allows alone.

No more than the allowed bytes are kept, no redirect leaves the allowed hosts, and no private address is connected to.
"""

import asyncio
import re
from collections.abc import Sequence
from urllib.parse import urljoin

import aiohttp

from app.api.fields import shown
from app.api.public_addresses import PublicAddresses
from app.types import InvalidField

FETCH_S = 15.0  # for an image with its redirects
REDIRECTS = 3
LONGEST_URL = 2048
PIECE_BYTES = 1 << 16


async def fetch_image(field: str, url: str, hosts: Sequence[str], limit: int) -> bytes:
    """At most `limit` bytes. Raises InvalidField with the field that names the URL."""
    connector = aiohttp.TCPConnector(resolver=PublicAddresses(), use_dns_cache=False, force_close=True)
    try:
        async with asyncio.timeout(FETCH_S), aiohttp.ClientSession(connector=connector, trust_env=False) as session:
            for _ in range(REDIRECTS + 1):
                check_url(field, url, hosts)
                # Encoded, a few bytes could become any number.
                headers = {"Accept": "image/png, image/jpeg, image/webp", "Accept-Encoding": "identity"}
                async with session.get(url, headers=headers, allow_redirects=False) as answer:
                    if location := answer.headers.get("Location") if answer.status // 100 == 3 else None:
                        url = urljoin(url, location)
                        continue
                    if answer.status != 200 or answer.headers.get("Content-Encoding", "identity") != "identity":
                        raise failed(field, url, f"it answered {answer.status}")
                    return await read(field, answer, limit)
            raise failed(field, url, f"it redirects over {REDIRECTS} times")
    except TimeoutError:
        raise failed(field, url, f"it took over {FETCH_S:g} s") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        if isinstance(error, InvalidField):
            raise
        raise failed(field, url, "its host does not answer, or not over a public address") from None


async def read(field: str, answer: aiohttp.ClientResponse, limit: int) -> bytes:
    content = bytearray()
    async for piece in answer.content.iter_chunked(PIECE_BYTES):
        content += piece
        if len(content) > limit:
            raise failed(field, str(answer.url), f"it has over {limit} bytes")
    return bytes(content)


def check_url(field: str, url: str, hosts: Sequence[str]) -> None:
    """The authority is compared as it is written, so none has a user's name or a backslash in it."""
    allowed = "|".join(map(re.escape, hosts))
    if not hosts:
        message = f"{field} must be a data: URL: this server fetches no image, got {shown(url)}."
        raise InvalidField(field, message, "unsupported_value")
    if len(url) > LONGEST_URL or not re.fullmatch(rf"https?://({allowed})([/?#][!-~]*)?", url):
        raise InvalidField(field, f"{field} must be a data: URL or a URL at {' or '.join(hosts)}, got {shown(url)}.")


def failed(field: str, url: str, reason: str) -> InvalidField:
    return InvalidField(field, f"{field} could not be fetched from {shown(url)}: {reason}.", "invalid_image")
