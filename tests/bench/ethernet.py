"""A small Ethernet inside this machine: network namespaces on one bridge, frames of 1500 bytes. Needs root and `ip`.

Segmentation is left to the sender's kernel, as if the card could not do it, so that the counters see the frames and
the headers that a wire would carry; loopback passes 64 kB in one piece and hides nearly all of them.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import socket
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
SIOCETHTOOL = 0x8946
TCP_SEGMENTATION, SEGMENTATION, RECEIVE_MERGING = 0x1F, 0x24, 0x2C  # ETHTOOL_STSO, _SGSO, _SGRO
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Counted:
    """What an interface has carried."""

    sent: int
    received: int
    packets_sent: int
    packets_received: int


class Network:
    """The namespaces; they and their interfaces end with this process and its children."""

    def __init__(self, nodes: int) -> None:
        enter_own_network()
        self._hub = _here()
        self._spaces = []
        _ip("link", "add", "hub", "type", "bridge")
        _ip("addr", "add", "10.77.0.1/24", "dev", "hub")
        _ip("link", "set", "hub", "up")
        for index in range(nodes):
            enter_own_network()
            space = _here()
            self._spaces.append(space)
            self.enter(None)
            _ip("link", "add", f"port{index}", "type", "veth", "peer", "name", f"node{index}")
            _ip("link", "set", f"node{index}", "netns", f"/proc/{os.getpid()}/fd/{space}")
            _ip("link", "set", f"port{index}", "master", "hub", "up")
            _frames_only(f"port{index}")
            self.enter(index)
            _ip("addr", "add", f"{self.address(index)}/24", "dev", f"node{index}")
            _ip("link", "set", f"node{index}", "up")
            _frames_only(f"node{index}")
        self.enter(None)

    @staticmethod
    def address(index: int | None) -> str:
        return "10.77.0.1" if index is None else f"10.77.0.{index + 10}"

    def enter(self, index: int | None) -> None:
        """Let this thread, and what it starts, be in a node's namespace; None is the hub's."""
        enter(self._hub if index is None else self._spaces[index])

    def counted(self, index: int) -> Counted:
        """Seen from the node, which is the other end of the hub's port. Asked for in the hub."""
        port = interface(f"port{index}")
        return Counted(port.received, port.sent, port.packets_received, port.packets_sent)


def enter(space: int) -> None:
    """Let this thread be in the namespace that this file stands for."""
    if _libc.setns(space, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def possible() -> bool:
    return os.geteuid() == 0 and shutil.which("ip") is not None and hasattr(_libc, "setns")


def enter_own_network() -> bool:
    """Leave for an empty network namespace and bring its loopback up; False where that is not allowed."""
    if not hasattr(_libc, "unshare") or _libc.unshare(CLONE_NEWNET):
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
    return True


def interface(name: str) -> Counted:
    """What an interface of this thread's namespace has carried since it came up, headers included."""
    lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
    fields = next(line for line in lines if line.strip().startswith(f"{name}:")).split(":")[1].split()
    return Counted(int(fields[8]), int(fields[0]), int(fields[9]), int(fields[1]))


def _here() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _frames_only(name: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for feature in (TCP_SEGMENTATION, SEGMENTATION, RECEIVE_MERGING):
            order = ctypes.create_string_buffer(struct.pack("II", feature, 0))
            fcntl.ioctl(control, SIOCETHTOOL, struct.pack("16sP16x", name.encode(), ctypes.addressof(order)))
