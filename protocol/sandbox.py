"""The sandbox: what a process that handles a stranger's numbers may still do. Knows nothing of what it computes.

`python -m protocol.sandbox MODULE` shuts itself in, for good, before it imports anything of weight, and then is MODULE:

* Landlock (Linux 5.13): files are readable below a few folders and writable below fewer; from 6.7 on no TCP, from 6.12
  on no signals and no abstract sockets to the outside.
* seccomp: no sockets but pairs, no other programs, no looking into other processes, no mounts, no namespaces, no keys.
* limits: no core file, which would hold everything; no file larger than a shard or a cache can be; a lower priority;
  memory of its own, if the owner caps it.

docs/THREATS.md says what that leaves. https://docs.kernel.org/userspace-api/landlock.html,
https://docs.kernel.org/userspace-api/seccomp_filter.html
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import runpy
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

from protocol.errors import Code, Refused

VARIABLE: Final = "BARNRAISE_INSIDE"
FILE_BYTES_MAX: Final = 1 << 30  # what one file may grow to: CUDA's cache of kernels is 1 GiB at most; logs stay below

_LIBC: Final = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_PR_SET_SECCOMP, _PR_GET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 21, 38
_SECCOMP_MODE_FILTER: Final = 2
_CAPABILITY_VERSION: Final = 0x20080522  # the third, since Linux 2.6.26
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same number on every machine
_LANDLOCK_VERSION: Final = 1
_LANDLOCK_PATH: Final = 1


class Mode(Enum):
    """What the owner wants of it."""

    AUTO = "auto"  # as much as the kernel has
    REQUIRED = "required"  # all of it, or do not train
    OFF = "off"


@dataclass(frozen=True)
class Kernel:
    """What this kernel has for us."""

    landlock: int = 0  # version of its interface; 0 is none
    seccomp: bool = False
    name: str = ""

    @property
    def whole(self) -> bool:
        return self.landlock > 0 and self.seccomp


@dataclass(frozen=True)
class Sandbox:
    """A sandbox for one process: what it may read and write beside its libraries, and what there is to hold it."""

    kernel: Kernel
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    nice: int = 0  # added to the priority number: higher is humbler
    memory_bytes: int | None = None  # what it may allocate for itself

    @property
    def text(self) -> str:
        """For people: what is shut, and what is not, and why."""
        kernel = self.kernel
        if kernel.whole:
            return "sandboxed: no network, no other programs, no files but its data and libraries"
        if kernel.seccomp:
            return f"half sandboxed: no network, no other programs; files are open, {kernel.name} has no Landlock"
        if kernel.landlock:
            tcp = "no TCP" if kernel.landlock >= 4 else "the network is open"
            return f"half sandboxed: no files but its data and libraries; {tcp}, {kernel.name} has no seccomp filters"
        return f"not sandboxed: {kernel.name} has neither Landlock nor seccomp filters"


NONE_TEXT: Final = "not sandboxed: switched off"


def kernel() -> Kernel:
    """Ask this kernel; nothing is changed by it."""
    name = f"{platform.system()} {platform.release()}"
    if _LIBC is None:
        return Kernel(name=name)
    version = _LIBC.syscall(
        ctypes.c_long(_LANDLOCK_CREATE), None, ctypes.c_size_t(0), ctypes.c_uint32(_LANDLOCK_VERSION)
    )
    filters = platform.machine() in _MACHINES and _LIBC.prctl(_PR_GET_SECCOMP, 0, 0, 0, 0) >= 0
    return Kernel(max(0, version), filters, name)


def plan(
    mode: Mode,
    kernel: Kernel,
    *,
    read: Iterable[Path] = (),
    write: Iterable[Path] = (),
    nice: int = 0,
    memory_bytes: int | None = None,
) -> Sandbox | None:
    """The sandbox that the owner wants, as far as this kernel goes; none when it is switched off."""
    if mode is Mode.OFF:
        return None
    made = Sandbox(kernel, tuple(map(str, read)), tuple(map(str, write)), nice, memory_bytes)
    if mode is Mode.REQUIRED and not kernel.whole:
        raise Refused(Code.SANDBOX, made.text)
    return made


# what is shut: files

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_CHANGES: Final = sum(1 << bit for bit in range(4, 13))  # remove and make files, folders, links, sockets, devices
_REFER, _TRUNCATE, _IOCTL_DEVICE = 1 << 13, 1 << 14, 1 << 15
_OF_VERSION: Final = ((1, 0x1FFF), (2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEVICE))
_OF_FILES: Final = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEVICE  # a rule on a file may say no more

_READ: Final = _READ_FILE | _READ_DIR
_USE: Final = _READ | _WRITE_FILE | _TRUNCATE | _IOCTL_DEVICE
_OWN: Final = _READ | _WRITE_FILE | _CHANGES | _REFER | _TRUNCATE

# Libraries, and what the C library and CUDA's driver read of the machine. Nothing below is anybody's own.
# /proc: the kernel guards what is in other processes from a sandboxed one; their command lines it shows to everybody.
_MACHINE_READ: Final = (
    *("/usr", "/lib", "/lib32", "/lib64", "/nix/store", "/gnu/store", "/run/opengl-driver"),
    *("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime", "/etc/nsswitch.conf"),
    *("/proc", "/sys"),
)
_DEVICES: Final = ("null", "zero", "full", "random", "urandom", "nvidia*", "kfd", "dri", "dxg")  # NVIDIA, AMD, WSL
_THREADS: Final = "/proc/self/task"  # CUDA writes the names of its threads there, and does not start if it cannot


def _shut_files(sandbox: Sandbox) -> None:
    version = sandbox.kernel.landlock
    handled = sum(rights for since, rights in _OF_VERSION if version >= since)
    tcp = 0b11 if version >= 4 else 0  # bind and connect
    outside = 0b11 if version >= 6 else 0  # abstract sockets and signals
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    attributes = struct.pack("<QQQ", handled, tcp, outside)[:size]
    rules = _call(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0))
    devices = (str(each) for name in _DEVICES for each in Path("/dev").glob(name))
    for rights, paths in (
        (_READ, (*_MACHINE_READ, *_libraries(), *sandbox.read)),
        (_USE, (*devices, _THREADS)),
        (_OWN, sandbox.write),
    ):
        for path in paths:
            _allow(rules, path, rights & handled)
    _call(_LANDLOCK_RESTRICT, ctypes.c_int(rules), ctypes.c_uint32(0))
    os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    try:
        # Never closed: a file of /proc that nobody holds open may come back as another, which no rule names.
        at = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # not on this machine
    if not stat.S_ISDIR(os.fstat(at).st_mode):
        rights &= _OF_FILES
    rule = ctypes.create_string_buffer(struct.pack("<Qi", rights, at), 12)
    _call(_LANDLOCK_ADD, ctypes.c_int(rules), ctypes.c_int(_LANDLOCK_PATH), rule, ctypes.c_uint32(0))


def _libraries() -> tuple[str, ...]:
    """Where Python imports from, but not the folder that the owner happens to be in."""
    here = Path().resolve()
    paths = [Path(each) for each in sys.path if each and Path(each).resolve() != here]
    ours = [Path(__file__).parents[1] / package for package in ("node", "coordinator", "protocol")]
    return tuple(str(each) for each in (Path(sys.prefix), Path(sys.base_prefix), *paths, *ours))


# what is shut: calls


@dataclass(frozen=True)
class _Machine:
    """How one kind of processor numbers the calls that are refused."""

    audit: int  # the kernel's name of it
    numbers: tuple[int, ...]  # refused whatever they say
    socket: int
    connect: int
    clone: int
    tgkill: int


# Where both machines have a call, in the same order: bind, listen, accept, accept4 / execve, execveat / ptrace,
# process_vm_readv, process_vm_writev, kcmp / kill, tkill, rt_sigqueueinfo, rt_tgsigqueueinfo / mount, umount2,
# pivot_root, chroot, unshare, setns, open_by_handle_at / bpf, perf_event_open, userfaultfd / add_key, request_key,
# keyctl / init_module, finit_module, delete_module, kexec_load, kexec_file_load, reboot, swapon, swapoff, acct,
# quotactl, syslog, settimeofday, clock_settime, adjtimex, clock_adjtime, personality. The last lines matter to root only.
_X86_64: Final = (
    *(49, 50, 43, 288, 59, 322, 101, 310, 311, 312, 62, 200, 129, 297, 165, 166, 155, 161, 272, 308, 304),
    *(321, 298, 323, 248, 249, 250, 175, 313, 176, 246, 320, 169, 167, 168, 163, 179, 103, 164, 227, 159, 305, 135),
    *(57, 58, 154, 172, 173),  # fork, vfork, modify_ldt, iopl, ioperm: this machine's own
)
_AARCH64: Final = (
    *(200, 201, 202, 242, 221, 281, 117, 270, 271, 272, 129, 130, 138, 240, 40, 39, 41, 51, 97, 268, 265),
    *(280, 241, 282, 217, 218, 219, 105, 273, 106, 104, 294, 142, 224, 225, 89, 60, 116, 170, 112, 171, 266, 92),
)
# pidfd_send_signal, io_uring (it opens sockets behind a filter's back), open_tree to fspick, pidfd_open, pidfd_getfd,
# process_madvise, mount_setattr, quotactl_fd, process_mrelease: the same numbers everywhere.
_EVERYWHERE: Final = (*range(424, 434), 434, 438, 440, 442, 443, 448)
_CLONE3: Final = 435  # says in memory what it wants, where a filter cannot look; without it libraries use clone
_NEWEST: Final = 462  # mseal, Linux 6.10: nobody has looked at what came later, and every program can do without

_MACHINES: Final = {
    "x86_64": _Machine(0xC000003E, _X86_64, socket=41, connect=42, clone=56, tgkill=234),
    "aarch64": _Machine(0xC00000B7, _AARCH64, socket=198, connect=203, clone=220, tgkill=131),
}
_NEW_NAMESPACES: Final = 0x7E020000  # of clone's flags: CLONE_NEW* but NEWTIME, which only clone3 takes
_THREAD: Final = 0x10000  # CLONE_THREAD: what is no thread is a process
_X32: Final = 0x40000000  # a second set of numbers on x86_64
_UNIX, _STREAM, _SEQUENCED = 1, 1, 5
_TYPE_OF_SOCKET: Final = 0xF  # the rest are flags

_LOAD, _EQUAL, _ABOVE, _ANY_OF, _AND, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x54, 0x06
_NUMBER, _AUDIT, _FIRST, _SECOND = 0, 4, 16, 24  # offsets in struct seccomp_data, of the low halves
_ALLOW: Final = 0x7FFF0000
_ERROR: Final = 0x00050000
_KILL: Final = 0x80000000


def _shut_calls() -> None:
    machine = _MACHINES[platform.machine()]
    program = b"".join(struct.pack("<HBBI", *each) for each in _filter(machine, own=os.getpid()))
    instructions = ctypes.create_string_buffer(program, len(program))
    described = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(instructions))
    _check(_prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, described), "seccomp")


def _filter(machine: _Machine, *, own: int) -> list[tuple[int, int, int, int]]:
    """Instructions (code, jump if true, jump if false, value) of the kernel's packet filter.

    Refused is what it names; everything else goes through, for what torch and its drivers call changes with each version.
    """
    refused, unknown, nobody = (_ERROR | each for each in (errno.EACCES, errno.ENOSYS, errno.ENOENT))
    program = [
        *((_LOAD, 0, 0, _AUDIT), (_EQUAL, 1, 0, machine.audit), (_RETURN, 0, 0, _KILL)),
        (_LOAD, 0, 0, _NUMBER),
        *((_ABOVE, 0, 1, _NEWEST), (_RETURN, 0, 0, unknown)),  # x32's numbers too
        *((_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, unknown)),
        # CUDA looks for a server of its own at a path, and takes only this error for an everyday answer.
        *((_EQUAL, 0, 1, machine.connect), (_RETURN, 0, 0, nobody)),
    ]
    for number in (*machine.numbers, *_EVERYWHERE):
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, refused)]
    # A local socket of these two kinds that cannot connect reaches nobody; CUDA's driver ends if it cannot make one.
    return [
        *program,
        *((_EQUAL, 0, 9, machine.socket), (_LOAD, 0, 0, _FIRST), (_EQUAL, 1, 0, _UNIX), (_RETURN, 0, 0, refused)),
        *((_LOAD, 0, 0, _SECOND), (_AND, 0, 0, _TYPE_OF_SOCKET)),
        *((_EQUAL, 2, 0, _STREAM), (_EQUAL, 1, 0, _SEQUENCED), (_RETURN, 0, 0, refused), (_RETURN, 0, 0, _ALLOW)),
        *((_EQUAL, 0, 5, machine.clone), (_LOAD, 0, 0, _FIRST), (_ANY_OF, 1, 0, _NEW_NAMESPACES)),
        *((_ANY_OF, 1, 0, _THREAD), (_RETURN, 0, 0, refused), (_RETURN, 0, 0, _ALLOW)),
        *((_EQUAL, 0, 3, machine.tgkill), (_LOAD, 0, 0, _FIRST), (_EQUAL, 1, 0, own), (_RETURN, 0, 0, refused)),
        (_RETURN, 0, 0, _ALLOW),
    ]


# shutting


def enter(sandbox: Sandbox) -> None:
    """Shut this process in, for good. Only for a process that has one thread yet."""
    import resource

    _wake_nvidia()
    os.nice(sandbox.nice)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = FILE_BYTES_MAX if most == resource.RLIM_INFINITY else min(most, FILE_BYTES_MAX)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if sandbox.memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (sandbox.memory_bytes, sandbox.memory_bytes))
    if not (sandbox.kernel.landlock or sandbox.kernel.seccomp):
        return
    _check(_prctl(_PR_SET_NO_NEW_PRIVS, 1), "no_new_privs")
    _drop_rights()
    if sandbox.kernel.landlock:
        _shut_files(sandbox)
    if sandbox.kernel.seccomp:
        _shut_calls()


def _drop_rights() -> None:
    """Root is then an owner of files like any other: else it may look into processes that Landlock guards."""
    assert _LIBC is not None
    _check(_LIBC.capset(struct.pack("<Ii", _CAPABILITY_VERSION, 0), bytes(24)), "capset")


def _wake_nvidia() -> None:
    """CUDA's driver starts a program of its own where its device is not there yet; in here it could not."""
    asleep = Path("/proc/driver/nvidia").exists() and not Path("/dev/nvidia-uvm").exists()
    if asleep and (helper := shutil.which("nvidia-modprobe")) is not None:
        subprocess.run([helper, "-u", "-c", "0"], check=False, timeout=30)


def _prctl(option: int, value: int, pointer: bytes | None = None) -> int:
    assert _LIBC is not None
    last = [ctypes.c_ulong(0)] * 2 if pointer is None else []
    return int(_LIBC.prctl(option, ctypes.c_ulong(value), pointer if pointer is not None else ctypes.c_ulong(0), *last))


def _call(number: int, *arguments: Any) -> int:
    assert _LIBC is not None
    return _check(int(_LIBC.syscall(ctypes.c_long(number), *arguments)), "Landlock")


def _check(result: int, what: str) -> int:
    """The kernel said that it has this, so a failure is one of ours: the process must not go on without."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def described(sandbox: Sandbox) -> dict[str, str]:
    """The environment that tells a child which sandbox is its own."""
    return {VARIABLE: json.dumps(asdict(sandbox))}


def _told() -> Sandbox:
    fields = json.loads(os.environ.pop(VARIABLE))
    return Sandbox(**fields | {"kernel": Kernel(**fields["kernel"])})


def main(arguments: Sequence[str]) -> None:
    enter(_told())
    sys.argv = list(arguments)
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
