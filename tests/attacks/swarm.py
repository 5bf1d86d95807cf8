"""A swarm in one process: the product's inner loop, codecs, robust rules, fold and audits; no network, votes or disk.

Everybody trains a small Llama on the source of Python's standard library, in shards as a run has them. Each round becomes
the record that a real swarm would have certified; audits are those of the coordinator's evaluator and coordinator.core.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.core import audits
from coordinator.core.audits import Ask, Audits, Broken, Measured
from coordinator.evaluate import Evaluation
from node.pseudograd import PseudoGradient
from node.trainer import Feed, Learner
from node.training import TrainerSpec, Vectors
from protocol import model, robust
from protocol.blobs import digest_of
from protocol.codec import Floats, codec
from protocol.contribution import Complaint
from protocol.errors import Refused
from protocol.exchange import Packing
from protocol.fold import Outer, fold
from protocol.order import sequence_at
from protocol.robust import Rule
from protocol.runspec import RoundsSection, cosine_share
from protocol.state import State, initial_state
from protocol.types import (
    Contribution,
    DataRange,
    Digest,
    Epoch,
    Exchange,
    NodeId,
    Part,
    Record,
    Role,
    RoundNumber,
    RunId,
)
from tests.bench import llama

VOCABULARY, TOKEN_BYTES = 256, 2
HELDOUT = 128  # sequences
NOBODY = Digest("1" * 64)
RUN = RunId("run")
SHARD = Digest("0" * 64)
AVERAGE = Outer()


@dataclass(frozen=True)
class Setting:
    """What all rows of a table share."""

    nodes: int = 8
    steps: int = 100  # inner steps of each node
    hidden: int = 64
    layers: int = 1
    context: int = 32
    batch: int = 8
    seed: int = 0
    codec: str = "int4"
    mean: str = "int4"
    residual_decay: float = 1.0
    outer: Outer = AVERAGE
    rule: str = "clip"
    share: float = 0.2  # audited
    puts_out: bool = True  # whoever is accused is gone
    decay_to: float = 1.0
    optimizer: str = "muon"
    inner_steps: tuple[tuple[int, int], ...] = RoundsSection().inner_steps

    @property
    def config(self) -> str:
        return llama.config(self.hidden, self.layers, vocabulary=VOCABULARY, context=self.context)

    @property
    def packing(self) -> Packing:
        return Packing(codec(self.codec), codec(self.mean), Rule(self.rule))

    def rounds(self) -> list[int]:
        """The inner steps of each round; the last one ends where the steps do."""
        section, left, found = RoundsSection(inner_steps=self.inner_steps), self.steps, list[int]()
        while left:
            found.append(min(left, section.steps(len(found))))
            left -= found[-1]
        return found


@dataclass
class Scene:
    """What an attacker sees when its turn comes: it knows everything, and those like it."""

    setting: Setting
    round: int
    luck: np.random.Generator
    own: Floats | None  # its own contribution, decoded, where it trains
    honest: Sequence[Floats]  # what the others bring in this round, decoded
    before: Sequence[bytes]  # what the others brought in the round before
    memory: dict[str, bytes]  # its own, kept between rounds
    attackers: int


@dataclass(frozen=True)
class Attack:
    """How an attacker makes what it brings; none: it brings nothing in this round."""

    name: str
    act: Callable[[Scene], bytes | None]
    trains: bool = False
    spoil: Callable[[np.ndarray], np.ndarray] | None = None  # its targets
    shows: bool = True  # what it brought, to whoever asks


@dataclass(frozen=True)
class Habit:
    """What an honest node does unlike the others."""

    steps_most: int = 1 << 30  # of a round: a slow machine
    first_round: int = 0
    misses: int = 0  # every so many rounds it has no luck, and brings it in the next
    noise: float = 0.0  # share of the tokens that are random in its data: bad text, and honest work all the same


@dataclass
class Outcome:
    loss: float = 0.0
    out: dict[int, tuple[int, audits.Accusation]] = field(default_factory=dict)  # node: (round, why)
    audited: int = 0
    contributed: int = 0
    bad: int = 0  # audits of honest nodes with points
    unclear: int = 0
    measured: list[tuple[int, int, float, Measured]] = field(default_factory=list)  # round, node, its weight


class Text:
    """Files of the standard library, shuffled: one shard, and held-out text from other files."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
        random.Random(setting.seed).shuffle(files)  # only an order
        self._context = setting.context
        self.sequences = setting.nodes * setting.batch * (setting.steps + 8)
        wanted = [HELDOUT * setting.context + 1, self.sequences * setting.context + 1]
        self.heldout, self.shard = folder / "heldout", folder / "shard"
        for path, tokens in zip((self.heldout, self.shard), wanted, strict=True):
            text = bytearray()
            while len(text) < tokens:
                text += files.pop().read_bytes()
            path.write_bytes(np.frombuffer(bytes(text[:tokens]), np.uint8).astype("<u2").tobytes())
        self._next = 0

    def lease(self, sequences: int) -> DataRange:
        start, self._next = self._next, self._next + sequences
        return DataRange(0, SHARD, start, self._next)

    def spoil(self, lease: DataRange, share: float, luck: np.random.Generator) -> None:
        """Random tokens in place of so many of this data's, for whoever reads it."""
        shard = np.memmap(self.shard, "<u2", "r+")
        for position in range(lease.start, lease.stop):
            at = self._context * sequence_at(position, sequences=self.sequences, pass_number=lease.pass_number)
            tokens = shard[at : at + self._context]
            bad = luck.random(tokens.size) < share
            tokens[bad] = luck.integers(VOCABULARY, size=int(bad.sum()))


class Worker:
    """A node: it trains as the product does, and brings what the product would bring."""

    def __init__(self, setting: Setting, number: int, state: State, folder: Path, habit: Habit, attack: Attack | None):
        self.node, self.habit, self.attack = NodeId(f"{number:064x}"), habit, attack
        self.memory: dict[str, bytes] = {}
        self.ranges: list[DataRange] = []
        self._setting = setting
        self._luck = np.random.default_rng([setting.seed, number])
        self.trains = attack is None or attack.trains
        if not self.trains:
            return
        size = model.measure(setting.config)
        self.vectors = Vectors.create(size.parameters, runtime_dir=folder)
        self.vectors.shared[:] = state.params
        train = {
            "optimizer": setting.optimizer,
            "learning_rate": 3e-3,
            "muon_learning_rate": 0.02,
            "batch_sequences": setting.batch,
            "warmup_steps": 20,
            "weight_decay": 0.01,
        }
        spec = TrainerSpec(
            setting.config,
            size.parameters,
            size.digest,
            VOCABULARY,
            setting.context,
            TOKEN_BYTES,
            train,
            seed=number,
            device="cpu",
            threads=1,
        )
        self.learner = Learner(spec, self.vectors)
        self.feed = Feed(spec)
        self.gradient = PseudoGradient(
            self.vectors.shared, self.vectors.snapshot, setting.packing.up, residual_decay=setting.residual_decay
        )

    def train(self, text: Text, steps: int, share: float) -> None:
        steps = min(steps, self.habit.steps_most)
        lease = text.lease(steps * self._setting.batch)
        self.ranges.append(lease)
        if self.habit.noise:
            text.spoil(lease, self.habit.noise, self._luck)
        if not self.trains:
            return
        self.learner.rate_share = share
        self.feed.add([(lease, text.shard)])
        for _ in range(steps):
            inputs, targets = self.feed.read(self.feed.take(self._setting.batch))
            if self.attack is not None and self.attack.spoil is not None:
                targets = self.attack.spoil(targets)
            assert self.learner.step(inputs, targets, lambda: False) is not None

    def bring(self) -> bytes:
        self.gradient.expect_snapshot()
        self.learner.save()
        self.gradient.take_snapshot()
        return self.gradient.payload

    def take(self, state: State, parts: Sequence[Part]) -> None:
        if self.trains:
            self.vectors.shared[:] = state.params
            self.gradient.settle(parts)
            self.learner.merge()

    def close(self) -> None:
        if self.trains:
            self.vectors.close()


class Swarm:
    """All nodes of one run; `attackers` and `habits` by number."""

    def __init__(
        self,
        setting: Setting,
        folder: Path,
        attackers: Mapping[int, Attack],
        habits: Mapping[int, Habit],
    ) -> None:
        self.setting, self.outcome = setting, Outcome()
        folder.mkdir(parents=True)
        self.text = Text(setting, folder)
        self.state = initial_state(
            model.initial_vector(setting.config, setting.seed), momentum=setting.outer.keeps_momentum
        )
        self.workers = [
            Worker(setting, number, self.state, folder, habits.get(number, Habit()), attackers.get(number))
            for number in range(setting.nodes)
        ]
        size = self.state.params.size
        self._shared = np.memmap(folder / "evaluated", np.float32, "w+", shape=(size,))
        order = {
            "threads": 1,
            "model_config": setting.config,
            "context": setting.context,
            "vector": str(folder / "evaluated"),
            "tokenizer": None,
            "heldout": str(self.text.heldout),
            "token_bytes": TOKEN_BYTES,
            "sequences": HELDOUT,
        }
        self._evaluation = Evaluation(order)
        nothing = digest_of(setting.packing.up.encode(np.zeros(size, np.float32)))
        self.rules = audits.Rules(setting.share, nothing, traced=not setting.packing.up.sparse)
        self._audits = Audits()
        self._luck = random.Random(setting.seed)  # must be repeated
        self._folder = folder
        self._before: list[bytes] = []

    def run(self) -> Outcome:
        try:
            done = 0
            for number, steps in enumerate(self.setting.rounds()):
                self._round(number, steps, cosine_share(done / self.setting.steps, self.setting.decay_to))
                done += steps
            self.outcome.loss = self.loss()
            return self.outcome
        finally:
            for worker in self.workers:
                worker.close()

    def loss(self) -> float:
        self._shared[:] = self.state.params
        return self._evaluation.loss() or float("inf")

    def _round(self, number: int, steps: int, share: float) -> None:
        here = [
            worker
            for index, worker in enumerate(self.workers)
            if index not in self.outcome.out and number >= worker.habit.first_round
        ]
        for worker in here:
            worker.train(self.text, steps, share)
        payloads = self._payloads(number, here)
        up, size = self.setting.packing.up, self.state.params.size
        for worker in [each for each in here if each in payloads]:
            try:
                up.check(payloads[worker], size)
            except Refused as refused:
                self._complain(
                    number, worker, payloads.pop(worker), Broken(refused.what), frozenset(each.node for each in here)
                )
        self._expire(number)
        if payloads:
            self._commit(number, payloads, here)

    def _payloads(self, number: int, here: Sequence[Worker]) -> dict[Worker, bytes]:
        """What everybody brings; attackers see the others' first."""
        up, size = self.setting.packing.up, self.state.params.size
        made = {worker: worker.bring() for worker in here if worker.trains}
        honest = [made[worker] for worker in here if worker.attack is None]
        decoded = [up.decode(each, size) for each in honest]
        luck = np.random.default_rng([self.setting.seed, number])  # the same for all attackers: they are one
        attackers = [worker for worker in here if worker.attack is not None]
        for worker in attackers:
            assert worker.attack is not None
            own = up.decode(made[worker], size) if worker in made else None
            scene = Scene(self.setting, number, luck, own, decoded, self._before, worker.memory, len(attackers))
            payload = worker.attack.act(scene)
            if payload is not None:
                made[worker] = payload
            else:
                made.pop(worker, None)
        for worker in here:
            if worker.habit.misses and number % worker.habit.misses == 0:
                made.pop(worker, None)
        self._before = honest
        return made

    def _commit(self, number: int, payloads: Mapping[Worker, bytes], here: Sequence[Worker]) -> None:
        before = self.state.params.copy()
        members = [worker for worker in here if worker in payloads]
        record, parts = self._record(members, payloads)
        fold(self.state, record, parts, self.setting.packing, self.setting.outer)
        for worker in here:
            mine = worker in payloads
            worker.take(self.state, [part for part in record.parts if worker.node in part.included])
            if mine:
                worker.ranges = []
        self.outcome.contributed += len(members)
        self._audit(number, record, before, {digest_of(payload): payload for payload in payloads.values()})

    def _record(self, members: Sequence[Worker], payloads: Mapping[Worker, bytes]) -> tuple[Record, dict[int, bytes]]:
        """The record that a swarm would have certified, and its parts."""
        setting, size = self.setting, self.state.params.size
        brought = [payloads[worker] for worker in members]
        nodes = [worker.node for worker in members]
        used = tuple(
            Contribution(
                worker.node,
                setting.context * sum(span.stop - span.start for span in worker.ranges),
                tuple(worker.ranges),
                update=digest_of(payloads[worker]),
            )
            for worker in members
        )
        how = setting.packing.exchange([Role.PEER] * len(members))
        parts: dict[int, bytes] = {}
        if how is Exchange.ALL_GATHER:
            parts = dict(enumerate(brought))
            listed = tuple(
                Part(i, 0, size, digest_of(parts[i]), len(parts[i]), node, (node,)) for i, node in enumerate(nodes)
            )
        else:
            mean, tokens = np.empty(size, np.float32), [each.tokens for each in used]
            for start, values in robust.means(setting.packing.rule, setting.packing.up, brought, tokens, size):
                mean[start : start + values.size] = values
            parts[0] = setting.packing.down.encode(mean)
            listed = (Part(0, 0, size, digest_of(parts[0]), len(parts[0]), nodes[0], tuple(nodes)),)
        return Record(RUN, self.state.round, NOBODY, Epoch(0), nodes[0], used, listed, NOBODY, how), parts

    # audits

    def _complain(
        self, number: int, worker: Worker, payload: bytes, broken: Broken, members: frozenset[NodeId]
    ) -> None:
        """A member has not been able to read it, and tells the coordinator, which asks for it."""
        brought = Contribution(worker.node, self.setting.context, tuple(worker.ranges), update=digest_of(payload))
        complaint = Complaint(RoundNumber(number), NOBODY, brought)
        self._audits = audits.complained(self._audits, complaint, self.workers[0].node, members)
        assert worker.attack is not None, "what honest members bring is read"
        for ask in [ask for ask in self._audits.open if ask.update == brought.update and worker.attack.shows]:
            self._audits, accusation = audits.read(self._audits, ask, broken)
            if accusation is not None:
                self._put_out(number, accusation)

    def _expire(self, number: int) -> None:
        everybody = [worker.node for worker in self.workers]
        self._audits, accused = audits.expired(self._audits, RoundNumber(number), everybody, ())
        for accusation in accused:
            self._put_out(number, accusation)

    def _audit(self, number: int, record: Record, before: Floats, payloads: Mapping[Digest, bytes]) -> None:
        self._audits, accused = audits.certified(self._audits, record, self.rules)
        for accusation in accused:
            self._put_out(number, accusation)
        for ask in [ask for ask in self._audits.open if ask.accuser is None]:
            result = self._measure(ask, before, payloads[ask.update])
            if result is None:
                self._audits = self._audits.dropped(ask)
                continue
            self.outcome.audited += 1
            self._audits, accusation = audits.measured(self._audits, ask, result, self.rules, self._luck.random())
            history = self._audits.histories[ask.node]
            if isinstance(result, Measured):
                self.outcome.measured.append((number, int(ask.node, 16), ask.weight, result))
            worker = self.workers[int(ask.node, 16)]
            self.outcome.unclear += not history.points
            self.outcome.bad += worker.attack is None and bool(history.points and history.points[-1])
            if accusation is not None:
                self._put_out(number, accusation)

    def _measure(self, ask: Ask, before: Floats, payload: bytes) -> Measured | Broken | None:
        state, following, update = (self._folder / name for name in ("state", "following", "update"))
        before.tofile(state)
        self.state.params.tofile(following)
        update.write_bytes(payload)
        order = {
            "state": str(state),
            "following": str(following),
            "update": str(update),
            "codec": self.setting.codec,
            "token_bytes": TOKEN_BYTES,
            "data": self._data(ask.ranges),
            "elsewhere": self._data(ask.elsewhere),
        }
        try:
            found = self._evaluation.audit(order)
        except Refused as refused:
            return Broken(refused.what)
        return None if found is None else Measured(**found)

    def _data(self, ranges: tuple[DataRange, ...]) -> list[Any]:
        chosen = audits.sample(ranges, self._luck.random())
        return [[str(self.text.shard), self.text.sequences, each.pass_number, where] for each, where in chosen]

    def _put_out(self, number: int, accusation: audits.Accusation) -> None:
        if self.setting.puts_out:
            self.outcome.out.setdefault(int(accusation.node, 16), (number, accusation))
