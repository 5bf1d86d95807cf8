"""How both sides run p2pd, hivemind's libp2p process: it dies with us, in a folder of its own. Imports no hivemind."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from protocol.errors import Code, Refused

# Sits between us and p2pd only until the exec: the kernel keeps the wish to die with its parent across it, and the limits.
_TIE: Final = """
import ctypes, os, resource, sys
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
for limit, most in (resource.RLIMIT_DATA, int(sys.argv[2])), (resource.RLIMIT_NOFILE, int(sys.argv[3])):
    hard = resource.getrlimit(limit)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(limit, (most, most))
os.execv(sys.argv[4], sys.argv[4:])
"""

# Of p2pd, by the kernel (Linux). At rest and in a round it has 52 MiB of data; a stranger's stream takes 4 kB of it for a
# minute, a connection 50 kB. What goes past the limit of memory ends p2pd, and another is started; past that of open files
# it only accepts nobody until some have gone: as many connections as there may be files fit into its memory.
DATA_BYTES_MAX: Final = 512 << 20
FILES_MAX: Final = 4096  # one for each connection, one for each stream between it and us

SOCKET_PATH_BYTES_MAX: Final = 104  # sun_path on macOS; Linux has 108
_SOCKET_NAME_BYTES: Final = len("/p2pclient-") + 11 + len(".sock")
_CONFIG: Final = Path(__file__).with_name("p2pd.json")  # its flags can only switch on: with -relay=0 it is a relay
_FOLDER: Final = "barnraise-"
_LINK: Final = "sockets"  # in the runtime folder: where the sockets are when its own path is too long for them

ENVIRONMENT: Final = {
    "GOMEMLIMIT": "128MiB",  # soft: Go collects harder above it; p2pd idles at 50 MiB
    # Dialling from the port that one listens at, two peers that call each other at once meet in one TCP connection in which
    # nobody is the server: both fail, and do not try again for seconds.
    "LIBP2P_TCP_REUSEPORT": "false",
    "GOTRACEBACK": "none",  # out of memory it would tell what each of 10^5 goroutines does
    "GOLOG_LOG_LEVEL": "error",  # unreachable peers are everyday life, and are reported by us
}

OPTIONS: Final = {
    # Nobody's relay, no UPnP, no probes for strangers, no other directory than the roster and our own DHT.
    "auto_nat": False,
    "nat_port_map": False,
    "use_relay": False,
    "use_ipfs": False,
    "check_if_identity_free": False,  # would start a second p2pd at every start; the roster names one peer per node
}


def write_identity(path: Path, private_key: bytes) -> None:
    """The file that p2pd reads its key from; it belongs into a runtime folder, which is swept."""
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_bytes(private_key)


def tied(arguments: Sequence[str]) -> list[str]:
    """The same command, as nobody's relay, within the limits above, killed by the kernel when the process that starts it
    ends, however it ends (Linux)."""
    alone = [*arguments, f"-f={_CONFIG}"]
    if sys.platform != "linux":
        return alone
    return [sys.executable, "-I", "-S", "-c", _TIE, *map(str, (os.getpid(), DATA_BYTES_MAX, FILES_MAX)), *alone]


def check_free(listen: Sequence[str]) -> None:
    """Refuse a TCP port that is taken."""
    for address in listen:
        match address.split("/"):
            case ["", "ip4" | "ip6" as family, host, "tcp", port] if port != "0":
                if host == "::" and not socket.has_dualstack_ipv6():
                    continue  # a machine without IPv6: p2pd listens where it can
                with socket.socket(socket.AF_INET if family == "ip4" else socket.AF_INET6) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    try:
                        probe.bind((host, int(port)))
                    except OSError as error:
                        raise Refused(Code.PORT_IN_USE, f"{address}: {error.strerror}") from error


def socket_folder(runtime_dir: Path) -> Path:
    """A private folder for p2pd's sockets, swept of what a killed process left there."""
    runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    runtime_dir.chmod(0o700)
    sweep(runtime_dir)
    if len(os.fsencode(runtime_dir.resolve())) + _SOCKET_NAME_BYTES < SOCKET_PATH_BYTES_MAX:
        return runtime_dir.resolve()
    try:
        short = Path(tempfile.mkdtemp(prefix=_FOLDER))  # 0700
    except OSError as error:
        fix = "Make room there, set TMPDIR to another folder, or use a --home with a shorter path."
        raise Refused(Code.HOME_FOREIGN, f"no folder for sockets can be made: {error}", fix=fix) from None
    (runtime_dir / _LINK).symlink_to(short)
    return short


def sweep(runtime_dir: Path) -> None:
    """Remove the sockets of a p2pd that has ended, however it ended, and the folder that a link names for them."""
    link = runtime_dir / _LINK
    if link.is_symlink():
        left = link.readlink()
        if left.name.startswith(_FOLDER) and left.parent == Path(tempfile.gettempdir()):
            shutil.rmtree(left, ignore_errors=True)
        link.unlink()
    for socket_left in runtime_dir.glob("p2p*.sock"):
        socket_left.unlink(missing_ok=True)
