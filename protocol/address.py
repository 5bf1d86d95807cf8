"""host:port, as people type it and as invites carry it. Looks nothing up."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Final

_Ip = ipaddress.IPv4Address | ipaddress.IPv6Address
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
    def multiaddr(self) -> str:
        """As libp2p writes it; the host is an IP."""
        return f"/ip{6 if ':' in self.host else 4}/{self.host}/tcp/{self.port}"

    @property
    def multiaddrs(self) -> tuple[str, ...]:
        """Where to listen: whoever names all of IPv6 means all of IPv4 too."""
        return (Address("0.0.0.0", self.port).multiaddr, self.multiaddr) if self.host == "::" else (self.multiaddr,)  # noqa: S104

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

    def _ip(self) -> _Ip | None:
        address = _ip(self.host)
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return mapped or address


class Span(IntEnum):
    """How far an address is good: the same one is another machine elsewhere, and may be the caller's own."""

    LINK = 1
    MACHINE = 2
    SITE = 3  # private networks, carriers' NAT, networks for documents and tests
    WORLD = 4


@lru_cache(maxsize=1024)  # asked of every member at every event of the coordinator
def span_of(host: str) -> Span | None:
    """Of an IP address; none where nobody is to be called: a name, a group, no machine, a cloud's metadata."""
    found = _ip(host)
    address = _inner(found) if found is not None else None
    if address is None or address.is_multicast or address.is_unspecified or address in _METADATA:
        return None
    if address.is_loopback:
        return Span.MACHINE
    if address.is_link_local:
        return Span.LINK
    if isinstance(address, ipaddress.IPv4Address):
        return None if address in _FUTURE else Span.WORLD if address.is_global else Span.SITE
    return Span.WORLD if address.is_global and address in _WORLD else Span.SITE


def may_dial(multiaddr: str, *, coordinator: str, named: Collection[str] = ()) -> bool:
    """Whether a node may connect to an address of libp2p's that a stranger names.

    Not nearer than its coordinator: a coordinator on the internet cannot have nodes knock at doors of their home
    networks. `coordinator` is its IP as this machine has reached it; "" is somewhere on the internet. Names are looked
    up by whoever dials, with whatever answer their owner likes: only those in `named` may be dialled.
    """
    parts = _DIALLED.fullmatch(multiaddr)
    if parts is None or not 0 < int(parts["port"]) <= 65535:
        return False
    if parts["kind"].startswith("dns"):
        return parts["host"] in named
    span, nearest = span_of(parts["host"]), span_of(coordinator) or Span.WORLD
    return span is not None and span >= nearest


# A machine, perhaps the peer that is there, perhaps that peer as a relay of another.
_PEER: Final = r"/p2p/[A-Za-z0-9]{1,128}"
_DIALLED: Final = re.compile(
    r"/(?P<kind>ip4|ip6|dns|dns4|dns6)/(?P<host>[^/]{1,253})/(?:tcp/(?P<port>[0-9]{1,5}))"
    rf"(?:{_PEER})?(?:/p2p-circuit(?:{_PEER})?)?"
)
_FUTURE: Final = ipaddress.ip_network("240.0.0.0/4")  # nobody's, and the broadcast address
_WORLD: Final = ipaddress.ip_network("2000::/3")  # all that is handed out for the internet
_THROUGH_NAT: Final = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: an IPv4 address in its last four bytes
# Of AWS over IPv6 and, on the link, of most clouds; of Alibaba, among carriers' addresses.
_METADATA = frozenset(map(ipaddress.ip_address, ("fd00:ec2::254", "169.254.169.254", "100.100.100.200")))


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


def _inner(address: _Ip) -> _Ip:
    """The IPv4 address that an IPv6 address leads to, where it leads to one."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _THROUGH_NAT:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo is not None else address)


def _ip(host: str) -> _Ip | None:
    if "%" in host:  # a zone: it means something on one machine only
        return None
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
