"""One peer of a run with stock hivemind.Optimizer, which can do one fault to the others; knows nothing about Barnraise.

The fault is done in this process and its children only: what is patched here is what the bad peer sends, or the moment
at which it dies. The other peers run hivemind as it was installed.
"""

import ctypes
import logging
import os
import re
import signal
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing import RawValue
from multiprocessing.connection import Connection
from pathlib import Path

import hivemind
import numpy as np
import torch
from hivemind.averaging.allreduce import AllReduceRunner
from hivemind.compression import (
    Float16Compression,
    Uniform8BitQuantization,
    deserialize_torch_tensor,
    serialize_torch_tensor,
)
from hivemind.p2p import P2P

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
CODECS = {"fp16": Float16Compression, "8-bit": Uniform8BitQuantization}
PEERS = 4
CONTEXT_BYTES = 16
BATCH = 16
STEP_SECONDS = 0.25
STEPS_PER_ROUND = 16  # a round of four seconds, so that matchmaking is done while the peers train
MATCHMAKING_SECONDS = 5.0  # documented: "3-5s for small local runs"
AVERAGING_SECONDS = 15.0  # documented: about twice what an all-reduce takes; here it takes one or two seconds
PART_BYTES = 2**15  # several parts for each peer, as a large model would have them


class Fault(StrEnum):
    NONE = "none"
    SHAPE = "one part of wrong shape"
    STALL = "SIGSTOP in mid-round"
    KILL = "kill -9 in mid-round"
    LATE = "late start"
    NAN = "parameters become NaN"


class Controls:
    """What the driver and the peer with the faults share: what to do, after which share of the parts, and when it did."""

    def __init__(self) -> None:
        self._armed = RawValue("b", -1)
        self._share = RawValue("d", 0.0)
        self._struck_seconds = RawValue("d", 0.0)

    def arm(self, fault: Fault, *, after_share: float) -> None:
        self._struck_seconds.value = 0.0
        self._share.value = after_share
        self._armed.value = list(Fault).index(fault)

    @property
    def due(self) -> Fault | None:
        return list(Fault)[self._armed.value] if self._armed.value >= 0 else None

    @property
    def after_share(self) -> float:
        return float(self._share.value)

    @property
    def struck_seconds(self) -> float:
        return float(self._struck_seconds.value)

    def strike(self) -> None:
        self._armed.value = -1
        self._struck_seconds.value = time.monotonic()


@dataclass(frozen=True)
class Round:
    """What one peer held when hivemind had gone over to the next epoch, and what hivemind said of the averaging."""

    peer: int
    epoch: int
    at_seconds: float
    averaged_with: int  # by hivemind's own words; 0: it failed, or there was none
    said: str
    values: np.ndarray


def die_with_parent(by: signal.Signals) -> None:
    ctypes.CDLL(None).prctl(1, by)  # PR_SET_PDEATHSIG


def become_group(log: Path) -> None:
    """A process group of its own, so that a signal reaches the averager, the DHT and p2pd with it."""
    os.setpgrp()
    die_with_parent(signal.SIGKILL)
    os.register_at_fork(after_in_child=lambda: die_with_parent(signal.SIGKILL))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    P2P._UNIX_SOCKET_PREFIX = f"/unix{log.parent}/"


def bootstrap(log: Path, link: Connection) -> None:
    """A DHT node that does not train, so that no peer's death takes the meeting point with it."""
    become_group(log)
    dht = hivemind.DHT(host_maddrs=["/ip4/127.0.0.1/tcp/0"], nat_port_map=False, start=True)
    link.send([str(address) for address in dht.get_visible_maddrs()])
    while True:
        time.sleep(60)


def peer(
    index: int,
    codec: str,
    controls: Controls | None,
    late: bool,
    initial_peers: Sequence[str],
    log: Path,
    link: Connection,
) -> None:
    """Train until killed, and send what became of each epoch. `controls` are for the peer that has the faults."""
    become_group(log)
    if controls:
        _strike_while_sending(controls)
    said: list[str] = []
    _listen(said)
    torch.manual_seed(index if late else PEERS)  # all but a newcomer start from the same parameters
    model = torch.nn.Sequential(
        torch.nn.Embedding(256, 64),
        torch.nn.Flatten(),
        torch.nn.Linear(64 * CONTEXT_BYTES, 512),
        torch.nn.GELU(),
        torch.nn.Linear(512, 256),
    )
    text = np.frombuffer((LIBRARY / "argparse.py").read_bytes(), dtype=np.uint8)
    dice = np.random.default_rng(index)
    dht = hivemind.DHT(
        initial_peers=initial_peers, host_maddrs=["/ip4/127.0.0.1/tcp/0"], nat_port_map=False, start=True
    )
    optimizer = hivemind.Optimizer(
        dht=dht,
        run_id="alternative",
        batch_size_per_step=BATCH,
        target_batch_size=PEERS * BATCH * STEPS_PER_ROUND,
        params=model.parameters(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
        use_local_updates=True,
        delay_state_averaging=False,
        state_averaging_compression=CODECS[codec](),
        load_state_compression=Float16Compression(),
        matchmaking_time=MATCHMAKING_SECONDS,
        averaging_timeout=AVERAGING_SECONDS,
        averager_opts={"part_size_bytes": PART_BYTES, "target_group_size": PEERS, "request_timeout": 2.0},
        verbose=True,
    )
    link.send(None)
    link.recv()  # those who are there from the start begin together
    epoch = optimizer.local_epoch
    while True:
        next_step = time.monotonic() + STEP_SECONDS
        if controls and controls.due is Fault.NAN:
            with torch.no_grad():
                for each in model.parameters():
                    each.fill_(torch.nan)
            controls.strike()
        places = dice.integers(0, len(text) - CONTEXT_BYTES, BATCH)[:, None] + np.arange(CONTEXT_BYTES + 1)
        batch = torch.from_numpy(text[places.clip(max=len(text) - 1)].astype(np.int64))
        loss = torch.nn.functional.cross_entropy(model(batch[:, :-1]), batch[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if optimizer.local_epoch != epoch:
            epoch = optimizer.local_epoch
            words = "; ".join(said)
            said.clear()
            number = re.search(r"Averaged parameters with (\d+) peers", words)
            values = torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
            link.send(Round(index, epoch, time.monotonic(), int(number[1]) if number else 0, words, values))
        time.sleep(max(0.0, next_step - time.monotonic()))


def _listen(said: list[str]) -> None:
    """hivemind tells how an averaging went in its log and nowhere else."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if re.match("Averag(ed|ing failed)|Peer is out of sync", message := record.getMessage()):
                said.append(message)

    for name in ("hivemind.optim.state_averager", "hivemind.optim.optimizer"):
        logging.getLogger(name).addHandler(Listener())


def _strike_while_sending(controls: Controls) -> None:
    """Do the fault in the averager's process once it has sent the stated share of its parts in one round."""
    stock = AllReduceRunner._generate_input_for_peer
    sent = 0

    async def generate(self, peer_index):  # type: ignore[no-untyped-def]
        nonlocal sent
        counts = self.tensor_part_container.num_parts_by_peer
        foreign = sum(counts) - counts[self.ordered_peer_ids.index(self.peer_id)]
        async for message in stock(self, peer_index):
            fault = controls.due
            now = fault and sent >= int(controls.after_share * foreign)
            if now and fault is Fault.SHAPE:
                part = deserialize_torch_tensor(message.tensor_part)
                longer = torch.cat([part, part[-1:]])
                message.tensor_part.CopyFrom(serialize_torch_tensor(longer, message.tensor_part.compression))
                controls.strike()
            yield message
            if now and fault in (Fault.KILL, Fault.STALL):
                controls.strike()
                os.killpg(0, signal.SIGKILL if fault is Fault.KILL else signal.SIGSTOP)
            sent = sent + 1 if controls.due else 0

    AllReduceRunner._generate_input_for_peer = generate
