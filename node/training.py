"""The daemon's handle on its trainer: orders go in, events come out. Imports no torch; nothing here waits for it."""

from __future__ import annotations

import asyncio
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from protocol.errors import Code, Refused
from protocol.process import MALFORMED, ChannelClosed, Child, value_of
from protocol.sandbox import Sandbox
from protocol.types import DataRange, Digest

T = TypeVar("T")
MODULE = "node.trainer"
STATE_BYTES = 16  # for each parameter: weight, gradient, two moments
START_SECONDS_MAX = 900  # a first import of torch from a slow disk, and a large model to build and probe
STOP_SECONDS = 10.0  # volunteers get their machine back within this
ANSWER_SECONDS = 300.0  # for the longest inner step there is; a trainer that answers later than that hangs
GRACE_SECONDS = 60.0  # beyond two steps of its own: other programs want the machine, or memory is swapped
_FOLDERS = {"TMPDIR": "", "TORCHINDUCTOR_CACHE_DIR": "inductor", "CUDA_CACHE_PATH": "cuda", "HF_HOME": "huggingface"}


@dataclass(frozen=True)
class TrainerSpec:
    """Everything that a trainer must know. `train` is the run file's section of that name."""

    model_config: str
    parameters: int
    layout: Digest
    vocabulary: int
    context: int
    token_bytes: int
    train: Mapping[str, Any]
    seed: int = 0
    workload: str = "causal_lm"
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    threads: int = 1
    batch_cap: int | None = None  # most sequences at once; more are accumulated
    memory_cap: int | None = None  # bytes, beside the vectors that it shares
    vram_cap: int | None = None  # bytes of a CUDA device


@dataclass(frozen=True)
class Started:
    device: str
    precision: str
    micro_batch: int  # sequences at once
    accumulate: int  # micro-batches of one inner step
    seconds: float  # from the order to the first possible step


@dataclass(frozen=True)
class Snapshot:
    """What was done since the snapshot before it. The parameters themselves lie in `vectors.snapshot`."""

    steps: int
    tokens: int
    ranges: tuple[DataRange, ...]  # exactly the data consumed
    loss: float | None  # mean over the tokens; none without a step


@dataclass(frozen=True)
class Stepped:
    """Progress; about once a second, and at once when the goal is reached."""

    steps: int  # since the last snapshot
    tokens: int  # since the last snapshot
    loss: float | None  # mean since the event before; none without a step
    tokens_per_second: float  # while stepping, since the event before
    queued_sequences: int


@dataclass(frozen=True)
class OutOfData:
    """The queue is empty. Training goes on by itself when data is added."""


@dataclass(frozen=True)
class Skipped:
    """A step was rejected and its data left out: these ranges are not consumed."""

    ranges: tuple[DataRange, ...]
    what: str


@dataclass(frozen=True)
class Failed:
    """The trainer has paused itself. If a shard is at fault, its ranges are out of the queue."""

    reason: Code
    what: str
    shard: Digest | None
    ranges: tuple[DataRange, ...] = ()  # what was queued of it


@dataclass(frozen=True)
class Exited:
    """The trainer's process has ended without our asking."""

    returncode: int


Event = Stepped | OutOfData | Skipped | Failed | Exited


class Vectors:
    """Two float32 vectors shared with the trainer. No name leads to them, so nothing is left after kill -9.

    `shared` is the committed state: only the daemon writes it. `snapshot` is the trainer's at its last snapshot.
    They outlive a trainer, so a new one starts where the shared state is.
    """

    def __init__(self, parameters: int, shared: int, snapshot: int) -> None:
        self.parameters = parameters
        self.files: tuple[int, ...] = (shared, snapshot)
        self.shared = _mapped(shared, parameters)
        self.snapshot = _mapped(snapshot, parameters)

    @classmethod
    def create(cls, parameters: int, *, runtime_dir: Path) -> Vectors:
        return cls(parameters, *(_unnamed(parameters * 4, runtime_dir) for _ in range(2)))

    def close(self) -> None:
        """Close the descriptors; the memory goes with the last array that looks at it."""
        for file in self.files:
            os.close(file)
        self.files = ()


@dataclass
class _Busy:
    """How much of the time since the first step was spent in steps, by the trainer's own count."""

    since: float | None = None
    until: float = 0.0
    seconds: float = 0.0
    step_seconds: float | None = None  # what one took since the event before


@dataclass
class Trainer:
    """A running trainer. Orders take effect between two inner steps, in the order they are given."""

    started: Started
    _child: Child
    _on_event: Callable[[Event], None]
    _waiting: dict[int, asyncio.Future[Mapping[str, Any]]] = field(default_factory=dict)
    _asked: int = 0
    _busy: _Busy = field(default_factory=_Busy)
    _stopping: bool = False
    _step_seconds: float | None = None  # what one took when we last heard of one
    steps: int = 0  # since the last snapshot, as far as has been heard
    _snapshot_pending: bool = False
    _snapshot_asked: int = 0  # the number of that order
    _reading: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        spec: TrainerSpec,
        *,
        vectors: Vectors,
        log: Any,
        on_event: Callable[[Event], None],
        scratch: Path | None = None,
        sandbox: Sandbox | None = None,
    ) -> Trainer:
        """Start a trainer on `vectors.shared`. Refused by name if it cannot train this model on this machine.

        `scratch` takes what its libraries would leave in the owner's folders.
        """
        began = time.monotonic()
        env = {"OMP_NUM_THREADS": str(spec.threads), "TOKENIZERS_PARALLELISM": "false"}
        if scratch is not None:
            env |= {name: str(scratch / folder) for name, folder in _FOLDERS.items()}
        child = await Child.start(MODULE, env=env, log=log, pass_fds=vectors.files, sandbox=sandbox)
        try:
            started = await _first_answer(child, spec, vectors, began)
        except BaseException:
            await child.stop(grace_seconds=0)
            raise
        trainer = cls(started, child, on_event)
        trainer._reading = asyncio.create_task(trainer._read())
        return trainer

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def busy_share(self) -> float:
        """Share of the wall time spent in inner steps, from the first step to the last event."""
        if self._busy.since is None:
            return 0.0
        return self._busy.seconds / max(self._busy.until - self._busy.since, 1e-9)

    async def add_data(self, ranges: Sequence[tuple[DataRange, Path]]) -> None:
        """Queue leased ranges, each with the file of its shard."""
        await self._ask("add_data", data=[[asdict(each), str(path)] for each, path in ranges])

    async def run(self) -> None:
        await self._ask("run")

    async def pause(self) -> None:
        """Returns when no step is under way; one that was under way is undone and its data kept."""
        await self._ask("pause")

    async def goal(self, steps: int, *, rate_share: float = 1.0) -> None:
        """Have a Stepped sent at once when so many steps have been made since the last snapshot.

        `rate_share`: from here on the learning rates are so much of what the run file says."""
        await self._ask("goal", steps=steps, rate_share=rate_share)

    async def snapshot(self) -> Snapshot:
        """Copy the local parameters into `vectors.snapshot`; training goes on right after."""
        self._snapshot_asked = self._asked + 1
        snapshot = await self._told("snapshot", await self._ask("snapshot"), _snapshot)
        self._snapshot_pending = True
        return snapshot

    async def peek(self) -> Snapshot:
        """The same, but nothing is handed over: the next snapshot tells of these steps again, as if nobody had looked.

        While a snapshot waits for its merge, `vectors.snapshot` is not free.
        """
        assert not self._snapshot_pending, "a merge still needs the snapshot"
        return await self._told("peek", await self._ask("peek"), _snapshot)

    async def merge(self, *, from_snapshot: bool) -> None:
        """Move the local parameters by `shared - snapshot`, so that they keep the steps made since the snapshot.

        Without a snapshot pending the caller has put the old shared values into `vectors.snapshot`.
        """
        assert from_snapshot <= self._snapshot_pending, "no snapshot since the last merge"
        await self._ask("merge")
        self._snapshot_pending = False

    async def drop(self, ranges: Sequence[DataRange]) -> tuple[DataRange, ...]:
        """Forget what is queued of these ranges; what that was. What has been trained on stays trained."""
        answer = await self._ask("drop", ranges=[asdict(each) for each in ranges])
        return await self._told("drop", answer, lambda body: _ranges(body["dropped"]))

    async def stop(self) -> None:
        self._stopping = True
        await self._child.stop(grace_seconds=STOP_SECONDS)
        if self._reading is not None:
            await self._reading

    @property
    def _patience_seconds(self) -> float:
        """How long an order may take: it waits for the step under way."""
        if self._step_seconds is None:
            return ANSWER_SECONDS
        return min(ANSWER_SECONDS, GRACE_SECONDS + 2 * self._step_seconds)

    async def _ask(self, order: str, **fields: Any) -> Mapping[str, Any]:
        self._asked += 1
        number = self._asked
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            if self._reading is None or self._reading.done():
                raise ChannelClosed("the trainer has ended")
            await self._child.channel.send({"do": order, "number": number, **fields})
            async with asyncio.timeout(patience := self._patience_seconds):
                body: Mapping[str, Any] = await answer
        except TimeoutError:
            await self._child.stop(grace_seconds=0)  # the reader hears of it, and says so
            raise Refused(Code.CHILD_DIED, f"the trainer was ended: it did not {order} in {patience:.0f} s") from None
        except ChannelClosed as error:
            raise Refused(Code.CHILD_DIED, f"the trainer has ended before it could {order}") from error
        finally:
            del self._waiting[number]
        return body

    async def _told(self, order: str, answer: Mapping[str, Any], read: Callable[[Mapping[str, Any]], T]) -> T:
        """What the answer says. A trainer whose answer lacks it is ended, and the daemon starts another."""
        try:
            return read(answer)
        except MALFORMED as error:
            await self._child.stop(grace_seconds=0)
            raise Refused(Code.CHILD_DIED, f"the trainer's answer to {order} cannot be read: {error!r}") from error

    async def _read(self) -> None:
        with suppress(ChannelClosed):
            while True:
                self._take((await self._child.channel.receive()).body)
        if not self._stopping:
            await self._child.stop(grace_seconds=STOP_SECONDS)
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(ChannelClosed("the trainer has ended"))
        if not self._stopping:
            self._on_event(Exited(self._child.returncode or 0))

    def _take(self, body: Mapping[str, Any]) -> None:
        match body:
            case {"reply": int(number)}:
                if number == self._snapshot_asked:
                    self.steps = 0  # here, for what is heard next is of steps since
                if (answer := self._waiting.get(number)) is not None and not answer.done():
                    answer.set_result(body)
            case _:
                try:
                    event = self._event(body)
                except MALFORMED as error:
                    raise ChannelClosed("the trainer said what is neither an event nor an answer") from error
                self._on_event(event)

    def _event(self, body: Mapping[str, Any]) -> Event:
        match body:
            case {"event": "stepped", "busy": busy, **fields}:
                stepped, self._busy = value_of(Stepped, fields), value_of(_Busy, busy)
                self._step_seconds = self._busy.step_seconds or self._step_seconds
                self.steps = stepped.steps
                return stepped
            case {"event": "out_of_data"}:
                return OutOfData()
            case {"event": "skipped", "ranges": ranges, "what": what}:
                return Skipped(_ranges(ranges), value_of(str, what))
            case {"event": "failed", "code": code, "what": what, "shard": shard, "ranges": ranges}:
                shard = None if shard is None else Digest(value_of(str, shard))
                return Failed(Refused.from_wire(code, what).reason, value_of(str, what), shard, _ranges(ranges))
            case _:
                raise ValueError("no event")


async def _first_answer(child: Child, spec: TrainerSpec, vectors: Vectors, began: float) -> Started:
    try:
        await child.channel.send({"do": "start", "spec": asdict(spec), "files": list(vectors.files)})
        answer = (await asyncio.wait_for(child.channel.receive(), START_SECONDS_MAX)).body
    except (ChannelClosed, TimeoutError) as error:
        raise Refused(Code.CHILD_DIED, "the trainer ended, or said nothing, before it was ready") from error
    try:
        if answer["event"] == "failed":
            raise Refused.from_wire(answer["code"], answer["what"])
        return value_of(Started, {**answer["started"], "seconds": time.monotonic() - began})
    except MALFORMED as error:
        raise Refused(Code.CHILD_DIED, f"the trainer's first answer cannot be read: {error!r}") from error


def _snapshot(answer: Mapping[str, Any]) -> Snapshot:
    snapshot = value_of(Snapshot, {key: value for key, value in answer.items() if key != "reply"})
    return replace(snapshot, ranges=_ranges(answer["ranges"]))


def _ranges(said: object) -> tuple[DataRange, ...]:
    ranges = value_of(tuple[DataRange, ...], said)
    if not all(0 <= each.start < each.stop for each in ranges):
        raise ValueError("a range without data")
    return ranges


def _unnamed(size: int, folder: Path) -> int:
    """A descriptor of memory that has no name."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("barnraise")
    else:
        with tempfile.TemporaryFile(dir=folder) as temporary:
            file = os.dup(temporary.fileno())
    os.ftruncate(file, size)
    return file


def _mapped(file: int, values: int) -> NDArray[np.float32]:
    return np.frombuffer(mmap.mmap(file, values * 4), np.float32)
