"""Where others can reach this machine, as far as it knows by itself."""

from __future__ import annotations

import ipaddress
import json
import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from protocol import console
from protocol.errors import Code, Refused

if TYPE_CHECKING:
    from pathlib import Path

    from coordinator.store import Store
    from protocol.runspec import RunSpec

HELPER_PORT: Final = 49303  # after our own three
_VIRTUAL: Final = ("docker", "br-", "veth", "virbr", "podman", "cni")  # interfaces that lead to this machine only


def listening(spec: RunSpec, store: Store) -> str:
    """Where this machine can be reached, as far as it knows by itself."""
    from protocol import address

    listen = address.parse(spec.coordinator.listen)
    assert listen is not None
    port = listen.port
    if port == 0:
        port = json.loads(store.get("ports") or b"{}").get("grpc", 0)
    if port == 0:
        what = "[coordinator] listen has port 0, so the port is known once the coordinator runs"
        raise Refused(Code.SPEC_VALUE, what, fix="Run barnraise-coordinator start first, or give --address HOST:PORT.")
    host = listen.host
    if spelled(host) in ("0.0.0.0", "::"):  # noqa: S104
        own = _own_address()
        if own is None:
            _warn("This machine has no address but its own loopback: only nodes on it can use this invite.")
        elif not ipaddress.ip_address(own).is_global:
            _warn(f"{own} is an address inside your own network; for others, name a public one with --address.")
        host = own or "127.0.0.1"
    elif spelled(host).startswith("127.") or spelled(host) == "::1":
        _warn("The coordinator listens on loopback: only nodes on this machine can use this invite.")
    return str(address.Address(host, port))


def _warn(text: str) -> None:
    console.complain(f"Warning: {text}")


def _own_address() -> str | None:
    """The address that others most likely reach: public before private, real interfaces before bridges."""
    import socket

    import psutil

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = []
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if name not in up or entry.family not in (socket.AF_INET, socket.AF_INET6) or "%" in entry.address:
                continue
            own = ipaddress.ip_address(entry.address)
            if not (own.is_loopback or own.is_link_local or own.is_multicast or own.is_unspecified):
                found.append((name.startswith(_VIRTUAL), not own.is_global, own.version, name, str(own)))
    return min(found)[-1] if found else None


def helper_command(folder: Path) -> str:
    """What to type on this machine, for a node that all others can call."""
    invite = f"barnraise-coordinator invite create --run {shlex.quote(str(folder))}"
    return f'barnraise join "$({invite})" --no-training --listen 0.0.0.0:{HELPER_PORT}'


def reachable(addresses: Iterable[str]) -> tuple[str, ...]:
    from protocol import address
    from protocol.limits import ADDRESSES_MAX

    checked = []
    for text in addresses:
        found = address.parse(text)
        if found is None or found.unspecified:
            what = f"{console.printable(text[:80])} is not an address that others can connect to"
            raise Refused(Code.USAGE, what, fix="Write host:port, as in --address train.example.org:49300")
        checked.append(str(found))
    if len(checked) > ADDRESSES_MAX:
        raise Refused(Code.USAGE, f"an invite names at most {ADDRESSES_MAX} addresses, not {len(checked)}")
    return tuple(checked)


def spelled(host: str) -> str:
    """The address in one spelling; a name as it is."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host
