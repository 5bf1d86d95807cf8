"""What averaging costs on the wire: bytes on the loopback interface against the bytes that the values themselves take.

    python -m tests.bench.wire --nodes 3 --parameters 1000000 --rounds 10

Everything counts: TCP, TLS, libp2p, the rendezvous and its DHT, acknowledgements. As root it runs in a network
namespace of its own, so that nobody else's traffic is counted.
"""

import argparse
import asyncio
import ctypes
import fcntl
import itertools
import os
import socket
import struct
import tempfile
from pathlib import Path

import numpy as np
import psutil

from coordinator.rendezvous import Rendezvous
from node.engine import AveragingJob, Engine
from protocol.codec import NAMES, codec
from protocol.identity import Key, libp2p_private_key_bytes
from protocol.limits import CHUNK_VALUES
from protocol.types import RunId

RUN = RunId("ab" * 32 + ".wire")
LOCAL = "/ip4/127.0.0.1/tcp/0"
CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 1


def enter_own_network() -> bool:
    """Leave for an empty network namespace and bring its loopback up; False where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare") or libc.unshare(CLONE_NEWNET):
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
    return True


def loopback() -> tuple[int, int]:
    """Bytes and packets sent on lo since it came up."""
    line = next(line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    fields = line.split(":")[1].split()
    return int(fields[8]), int(fields[9])


def even_spans(parameters: int, nodes: int) -> tuple[tuple[int, int], ...]:
    chunks = -(-parameters // CHUNK_VALUES)
    cuts = [min(parameters, round(chunks * index / nodes) * CHUNK_VALUES) for index in range(nodes + 1)]
    return tuple(itertools.pairwise(cuts))


def identity(home: Path) -> Path:
    home.mkdir()
    (home / "identity").write_bytes(libp2p_private_key_bytes(Key.generate()))
    return home / "identity"


def resident_megabytes(pid: int) -> float:
    process = psutil.Process(pid)
    return sum(each.memory_info().rss for each in [process, *process.children()]) / 1e6


async def measure(nodes: int, parameters: int, rounds: int, name: str, idle_seconds: float) -> float:
    how, random = codec(name), np.random.default_rng(0)
    ideal = 2 * (nodes - 1) / nodes * how.bits / 8 * parameters
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        key = identity(home / "rendezvous")
        meeting = await Rendezvous.start(runtime_dir=home / "meet", identity_path=key, run=RUN, listen=[LOCAL])
        engines = []
        for index in range(nodes):
            key = identity(home / f"node-{index}")
            engines.append(
                await Engine.start(
                    runtime_dir=key.parent / "run",
                    identity_path=key,
                    run=RUN,
                    listen=[LOCAL],
                    rendezvous=meeting.addresses,
                    codec=name,
                    parameters=parameters,
                    blob_dir=key.parent,
                    on_message=lambda peer, envelope: None,
                )
            )
        await meeting.set_roster([engine.peer for engine in engines])
        roster = {engine.peer: engine.addresses for engine in engines}
        for engine in engines:
            await engine.set_roster(roster)
        payloads = [how.encode(random.standard_normal(parameters, np.float32)) for _ in engines]
        seen, seconds = [loopback()], []
        for _ in range(rounds):
            job = AveragingJob(
                group=os.urandom(32),
                peers=tuple(engine.peer for engine in engines),
                weights=(1,) * nodes,
                spans=even_spans(parameters, nodes),
                deadline_seconds=120,
                sender_seconds=30,
            )
            outcomes = await asyncio.gather(*(e.average(job, data) for e, data in zip(engines, payloads, strict=True)))
            assert all(not outcome.failed and outcome.parts == outcomes[0].parts for outcome in outcomes)
            seconds.append(max(outcome.seconds for outcome in outcomes))
            await asyncio.sleep(0.1)  # the last acknowledgements
            seen.append(loopback())
        memory = max(resident_megabytes(engine.pid) for engine in engines)
        await asyncio.sleep(idle_seconds)
        quiet = loopback()[0] - seen[-1][0]
        usages = [await engine.usage() for engine in engines]
        for engine in engines:
            await engine.stop()
        await meeting.stop()
    total, first = (seen[-1][0] - seen[0][0]) / nodes, (seen[1][0] - seen[0][0]) / nodes
    messages = sum(usage.sent for usage in usages) / nodes / rounds
    packets = (seen[-1][1] - seen[0][1]) / nodes / rounds
    print(f"{nodes} nodes, {parameters:,} parameters, {name}, {rounds} rounds in {sum(seconds):.1f} s")
    print(f"values alone           {ideal:12,.0f} bytes up (and down) for each node and round")
    print(f"messages               {messages:12,.0f}   ratio {messages / ideal:.4f}")
    print(
        f"interface, all rounds  {total / rounds:12,.0f}   ratio {total / rounds / ideal:.4f}   {packets:.0f} packets"
    )
    print(f"interface, first round {first:12,.0f}   ratio {first / ideal:.4f}   with handshakes")
    if idle_seconds:
        print(f"interface, idle        {quiet / nodes / idle_seconds:12,.1f}   bytes a second for each node")
    print(f"round                  {np.median(seconds) * 1000:12,.0f} ms   engine and p2pd {memory:.0f} MB resident")
    return total / rounds / ideal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--codec", choices=NAMES, default="int4")
    parser.add_argument("--idle-seconds", type=float, default=10.0)
    chosen = parser.parse_args()
    if not enter_own_network():
        print("no network namespace (not root): other traffic on lo is counted too")
    asyncio.run(measure(chosen.nodes, chosen.parameters, chosen.rounds, chosen.codec, chosen.idle_seconds))


if __name__ == "__main__":
    main()
