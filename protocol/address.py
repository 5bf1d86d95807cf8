"""host:port, as people type it and as invites carry it. Looks nothing up."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_NAME = re.compile(rf"(?:{_LABEL}\.)*{_LABEL}")
_NUMBER_AT_END = re.compile(r"(?:.*\.)?(?:[0-9]+|0[xX][0-9a-fA-F]*)")  # resolvers read such names as IPv4 addresses
_PORT = re.compile(r"0|[1-9][0-9]{0,4}")
_NAME_CHARACTERS_MAX = 253  # RFC 1035


@dataclass(frozen=True)
class Address:
    """A machine's name or IP, and a TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def unspecified(self) -> bool:
        """It names no machine that anybody could connect to: 0.0.0.0, a multicast group, port 0."""
        address = self._ip()
        return self.port == 0 or (address is not None and (address.is_unspecified or address.is_multicast))

    @property
    def link_local(self) -> bool:
        """It leads to the connecting machine's own link, where clouds keep their metadata service."""
        address = self._ip()
        return address is not None and (address.is_link_local or address in _METADATA)

    def _ip(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
        address = _ip(self.host)
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return mapped or address


_METADATA = frozenset({ipaddress.ip_address("fd00:ec2::254")})  # AWS; the other clouds use link-local addresses


def parse(text: str) -> Address | None:
    """The address in host:port or [IPv6]:port; none when it is anything else, such as a URL or a socket's path."""
    host, colon, port = text.rpartition(":")
    if not colon or not _PORT.fullmatch(port) or int(port) > 65535:
        return None
    if host.startswith("[") and host.endswith("]"):
        inner = _ip(host[1:-1])
        return Address(str(inner), int(port)) if isinstance(inner, ipaddress.IPv6Address) else None
    if isinstance(_ip(host), ipaddress.IPv4Address):
        return Address(host, int(port))
    if len(host) > _NAME_CHARACTERS_MAX or not _NAME.fullmatch(host) or _NUMBER_AT_END.fullmatch(host):
        return None
    return Address(host, int(port))


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    if "%" in host:  # a zone: it means something on one machine only
        return None
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
