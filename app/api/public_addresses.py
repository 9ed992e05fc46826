"""Which addresses this server connects to where a request names a URL: public ones.

A connector with this resolver connects to the address that was checked, so a name that changes meanwhile does not help.
aiohttp asks no resolver for a host that is an address: callers take names alone.
"""

import asyncio
import errno
import ipaddress
import socket

from aiohttp.abc import AbstractResolver, ResolveResult

NAT64 = ipaddress.ip_network("64:ff9b::/32")  # RFC 6052 and RFC 8215


class PublicAddresses(AbstractResolver):
    """Resolves names to public addresses alone, so that no client's URL reaches what is inside of this network."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        results = await loop.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
        return [
            ResolveResult(
                hostname=host,
                host=str(checked(address[0])),
                port=port,
                family=family,
                proto=proto,
                flags=socket.AI_NUMERICHOST,
            )
            for family, _, proto, _, address in results
        ]

    async def close(self) -> None:
        pass


def checked(text: object) -> str:
    """Raises OSError for an address that is not public. One among several is enough to refuse a host."""
    address = ipaddress.ip_address(str(text).partition("%")[0])
    for inner in (address, *embedded(address)):
        if not inner.is_global or inner.is_multicast:
            raise OSError(errno.EACCES, f"{address} is not a public address")
    return str(text)


def embedded(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses that gateways may turn an IPv6 address into."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if address in NAT64:
        inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [each for each in inner if each is not None]
