"""The sandbox on this kernel: what a process inside of it can still do. A kernel with less is one that we ask for less."""

import asyncio
import errno
import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from node import training
from node.training import OutOfData, Trainer, Vectors
from protocol import model, sandbox
from protocol.errors import Code, Refused
from protocol.process import Child
from protocol.sandbox import Kernel, Mode, Sandbox
from tests.edges.test_trainer import CONFIG, SIZE, SPEC, piece, shard

KERNEL = sandbox.kernel()
linux = pytest.mark.skipif(not KERNEL.whole, reason="this kernel has no Landlock, or no seccomp filters")

# What somebody would try whose bytes had found a hole in what reads them. The names that it got are its report.
EVIL = """
import ctypes, json, os, socket, subprocess, threading
from pathlib import Path

def report(secret, data, scratch):
    libc, names = ctypes.CDLL(None, use_errno=True), Path(f"/proc/self/task/{threading.get_native_id()}/comm")
    parent = os.getppid()
    def free_fall():
        if os.fork() == 0:
            os._exit(0)
    def unshared():
        if libc.unshare(0x10000000):
            raise OSError(ctypes.get_errno(), "unshare")
    def ring():
        if libc.syscall(425, 8, bytes(120)) < 0:
            raise OSError(ctypes.get_errno(), "io_uring_setup")
    def traced():
        if libc.ptrace(16, parent, 0, 0):
            raise OSError(ctypes.get_errno(), "ptrace")
    def hog():
        try:
            bytearray(2 << 30)
        except MemoryError:
            raise OSError(12, "memory")
    tries = {
        "memory": hog,
        "inet": lambda: socket.socket(),
        "inet6": lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM),
        "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
        "unix datagram": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
        "unix connect": lambda: socket.socket(socket.AF_UNIX).connect(str(Path(secret).with_name("s.sock"))),
        "pair": lambda: socket.socketpair(),
        "read a secret": lambda: Path(secret).read_text(),
        "list its folder": lambda: os.listdir(Path(secret).parent),
        "write beside it": lambda: Path(secret).with_name("new").write_text("x"),
        "remove it": lambda: os.unlink(secret),
        "read data": lambda: os.listdir(data),
        "write data": lambda: Path(data, "new").write_text("x"),
        "write a library": lambda: Path(json.__file__).with_name("new.py").write_text("x"),
        "write scratch": lambda: Path(scratch, "new").write_text("x"),
        "read passwd": lambda: Path("/etc/passwd").read_text(),
        "parent's environment": lambda: Path(f"/proc/{parent}/environ").read_bytes(),
        "parent's files": lambda: os.open(f"/proc/{parent}/cwd", os.O_RDONLY),
        "signal": lambda: os.kill(parent, 0),
        "program": lambda: subprocess.run(["true"]),
        "fork": free_fall, "namespace": unshared, "io_uring": ring, "ptrace": traced,
        "thread": lambda: threading.Thread(target=lambda: None).start(),
        "name a thread": lambda: names.write_text("evil"),
    }
    outcome = {}
    for name, attempt in tries.items():
        try:
            attempt()
            outcome[name] = "done"
        except OSError as error:
            outcome[name] = error.errno
    return outcome
"""
REPORTER = """
import json, os
from evil import report
print(json.dumps(report(*json.loads(os.environ["TARGETS"]))), flush=True)
"""
WORKLOAD = """
import json, os
from evil import report
from node.workloads import causal_lm
from node.workloads.causal_lm import *

def build(config):
    print(json.dumps(report(*json.loads(os.environ["TARGETS"]))), flush=True)
    return causal_lm.build(config)
"""
TRAINER = """
import asyncio
from node import trainer, workloads
workloads._MODULES["causal_lm"] = "evil_workload"
asyncio.run(trainer._main())
"""
REACHES_OUT = ("inet", "inet6", "netlink", "unix datagram", "unix connect")
LOOKS_AROUND = ("read a secret", "list its folder", "read passwd", "parent's environment", "parent's files")
CHANGES = ("write beside it", "write data", "write a library", "remove it")
LEAVES = ("signal", "program", "fork", "namespace", "io_uring", "ptrace")
NEEDED = ("pair", "read data", "write scratch", "thread", "name a thread")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A home with a secret in it, and the folders that a sandbox may be given."""
    for name in ("home", "data", "scratch", "modules"):
        (tmp_path / name).mkdir()
    (tmp_path / "home" / "id_ed25519").write_text("secret")
    for name, text in (("evil", EVIL), ("reporter", REPORTER), ("evil_workload", WORKLOAD), ("evil_trainer", TRAINER)):
        (tmp_path / "modules" / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'modules'}{os.pathsep}{Path(__file__).parents[2]}")
    targets = [str(tmp_path / "home" / "id_ed25519"), str(tmp_path / "data"), str(tmp_path / "scratch")]
    monkeypatch.setenv("TARGETS", json.dumps(targets))
    return tmp_path


def made(place, kernel=KERNEL, mode=Mode.AUTO):
    return sandbox.plan(mode, kernel, read=[place / "data"], write=[place / "scratch"])


async def reported(place, kernel):
    with (place / "log").open("wb") as log:
        child = await Child.start("reporter", log=log, sandbox=made(place, kernel))
        assert await child.wait() == 0, (place / "log").read_text()
        await child.stop(grace_seconds=1)
    return json.loads((place / "log").read_text())


def refused(outcome, names):
    """Those that did not succeed."""
    return {name for name in names if outcome[name] in (errno.EACCES, errno.EPERM, errno.ENOENT)}


@linux
async def test_a_payload_inside_the_trainer_reaches_nothing_and_training_goes_on(place, monkeypatch):
    monkeypatch.setattr(training, "MODULE", "evil_trainer")
    vectors = Vectors.create(SIZE.parameters, runtime_dir=place)
    vectors.shared[:] = model.initial_vector(CONFIG, 1)
    done = asyncio.Event()
    data = shard(place / "data", sequences=32)
    with (place / "log").open("wb") as log:
        trainer = await Trainer.start(
            SPEC,
            vectors=vectors,
            log=log,
            on_event=lambda event: done.set() if isinstance(event, OutOfData) else None,
            scratch=place / "scratch",
            sandbox=replace(made(place, mode=Mode.REQUIRED), memory_bytes=1 << 30),
        )
    await trainer.add_data([(piece(0, 32), data)])
    await trainer.run()
    await asyncio.wait_for(done.wait(), 60)
    assert (await trainer.snapshot()).steps == 4
    await trainer.stop()
    vectors.close()

    outcome = json.loads((place / "log").read_text().splitlines()[0])
    tried = (*REACHES_OUT, *LOOKS_AROUND, *CHANGES, *LEAVES)
    assert refused(outcome, tried) == set(tried), outcome
    assert {outcome[name] for name in NEEDED} == {"done"}, outcome
    assert outcome["read a secret"] == outcome["inet"] == errno.EACCES
    assert outcome["memory"] == errno.ENOMEM, "its owner gave it one GiB"
    assert (place / "home" / "id_ed25519").read_text() == "secret"
    assert {each.name for each in (place / "data").iterdir()} == {data.name}


@linux
async def test_without_landlock_there_is_still_no_network_and_no_other_program(place):
    outcome = await reported(place, replace(KERNEL, landlock=0))
    shut = (*REACHES_OUT, *LEAVES)
    assert refused(outcome, shut) == set(shut), outcome
    assert outcome["read a secret"] == "done", "files are open, as the text says"


@linux
@pytest.mark.parametrize("version", [1, 3, 4, 5, 6])
async def test_each_older_landlock_still_shuts_the_files(place, version):
    if version > KERNEL.landlock:
        pytest.skip("this kernel's Landlock is older")
    outcome = await reported(place, replace(KERNEL, landlock=version, seccomp=False))
    shut = (*LOOKS_AROUND, *CHANGES)
    assert refused(outcome, shut) == set(shut), outcome
    assert {outcome[name] for name in NEEDED} == {"done"}, outcome
    assert outcome["inet"] == "done", "a socket can be made; what it may do is the text's business"
    assert (outcome["signal"] == errno.EPERM) == (version >= 6)


async def test_where_the_kernel_has_nothing_the_process_runs_all_the_same(place):
    outcome = await reported(place, Kernel(name="Linux 4.4"))
    assert outcome["read data"] == outcome["inet"] == "done"


@linux
async def test_no_core_is_written_and_no_file_grows_without_end(place, monkeypatch):
    (place / "modules" / "limits.py").write_text(
        "import os, resource\n"
        "print([resource.getrlimit(each)[1] for each in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE)], os.nice(0))"
    )
    with (place / "log").open("wb") as log:
        child = await Child.start("limits", log=log, sandbox=replace(made(place), nice=5))
        assert await child.wait() == 0
        await child.stop(grace_seconds=1)
    assert (place / "log").read_text().strip() == f"[0, {sandbox.FILE_BYTES_MAX}] {os.nice(0) + 5}"


def test_the_owner_decides_how_much_of_it_there_must_be():
    whole, half, none = Kernel(7, True, "Linux 6.18"), Kernel(0, True, "Linux 4.4"), Kernel(0, False, "Darwin 24")
    assert sandbox.plan(Mode.OFF, whole) is None
    assert sandbox.plan(Mode.REQUIRED, whole).text.startswith("sandboxed: no network")
    for kernel, words in ((half, ("half", "files are open, Linux 4.4 has no Landlock")), (none, ("not", "Darwin 24"))):
        text = sandbox.plan(Mode.AUTO, kernel).text
        assert text.startswith(words[0]) and words[1] in text
        with pytest.raises(Refused) as caught:
            sandbox.plan(Mode.REQUIRED, kernel)
        assert caught.value.reason is Code.SANDBOX and caught.value.what == text
    assert "no TCP" in Sandbox(Kernel(4, False)).text and "network is open" in Sandbox(Kernel(3, False)).text


# The filter's program, read by a machine of a few lines: so that of the other processors is seen to work too.

ALLOWED, REFUSED, KILLED = "allowed", errno.EACCES, "killed"


def answer(machine, number, *arguments, audit=None):
    """What the kernel would do with this call."""
    data = struct.pack("<IIQ6Q", number, audit or machine.audit, 0, *(*arguments, *[0] * (6 - len(arguments))))
    program, at, held = sandbox._filter(machine, own=77), 0, 0
    while True:
        code, yes, no, value = program[at]
        at += 1
        match code:
            case sandbox._LOAD:
                held = int.from_bytes(data[value : value + 4], "little")
            case sandbox._AND:
                held &= value
            case sandbox._EQUAL:
                at += yes if held == value else no
            case sandbox._ABOVE:
                at += yes if held > value else no
            case sandbox._ANY_OF:
                at += yes if held & value else no
            case sandbox._RETURN:
                if value == sandbox._KILL:
                    return KILLED
                return ALLOWED if value == sandbox._ALLOW else value & 0xFFFF


@pytest.mark.parametrize("machine", sandbox._MACHINES.values(), ids=sandbox._MACHINES)
def test_the_filter_does_the_same_on_every_machine(machine):
    assert answer(machine, 0, audit=1) == KILLED, "a call by another machine's numbers"
    assert {answer(machine, number) for number in machine.numbers} == {REFUSED}
    assert {answer(machine, number) for number in range(425, 428)} == {REFUSED}, "io_uring"
    assert answer(machine, machine.connect) == errno.ENOENT
    assert answer(machine, 435) == answer(machine, 500) == answer(machine, 0x40000029) == errno.ENOSYS
    for family, kind, expected in (
        *((1, 1, ALLOWED), (1, 1 | 0x80000, ALLOWED), (1, 5, ALLOWED), (1, 2, REFUSED)),
        *((2, 1, REFUSED), (10, 1, REFUSED), (16, 3, REFUSED)),
    ):
        assert answer(machine, machine.socket, family, kind) == expected
    threads = 0x3D0F00  # what the C library asks for a thread
    assert answer(machine, machine.clone, threads) == ALLOWED
    assert answer(machine, machine.clone, 17) == REFUSED, "a process"
    assert answer(machine, machine.clone, threads | 0x10000000) == REFUSED, "a namespace"
    assert answer(machine, machine.tgkill, 77, 78, 6) == ALLOWED and answer(machine, machine.tgkill, 1, 1, 9) == REFUSED
    futex = {"x86_64": 202, "aarch64": 98}
    assert answer(machine, futex[next(key for key, each in sandbox._MACHINES.items() if each is machine)]) == ALLOWED
