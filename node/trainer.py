"""The trainer: inner steps in a process of its own. It knows nothing of rounds, peers or the network.

The main thread reads orders; one other thread owns torch and looks at the orders between two steps.
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from node import hardware, workloads
from node.muon import Float32Muon
from node.training import STATE_BYTES, TrainerSpec, Vectors
from protocol import canonical, model
from protocol.errors import Code, Refused
from protocol.order import sequence_at
from protocol.process import Channel, ChannelClosed, parent_channel
from protocol.types import DataRange

REPORT_SECONDS = 1.0  # what a person watching can follow
REJECTED_MAX = 3  # one bad batch happens to everyone; three in a row do not
MEMORY_SHARE = 0.5  # of the free memory for activations on the CPU; the rest of the machine needs some too

Order = Mapping[str, Any]
Tell = Callable[[Order], None]
Piece = tuple[DataRange, Path]
Tokens = NDArray[np.int64]


class ShardError(Exception):
    """A shard that cannot be trained on."""

    def __init__(self, reason: Code, what: str, shard: str) -> None:
        super().__init__(what)
        self.reason, self.what, self.shard = reason, what, shard


@dataclass(frozen=True)
class Rules:
    """The parts of the run file's train section that the inner loop follows."""

    optimizer: str = "muon"
    learning_rate: float = 3e-3
    muon_learning_rate: float = 0.02
    muon_momentum: float = 0.95
    betas: Sequence[float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup_steps: int = 10
    clip: float = 1.0
    batch_sequences: int = 16
    precision: str = "auto"

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> Rules:
        known = cls.__dataclass_fields__
        return cls(**{key: value for key, value in section.items() if key in known})


class Feed:
    """The queue of leased ranges. It is consumed in order, so what was consumed is always a few ranges."""

    def __init__(self, spec: TrainerSpec) -> None:
        self._context = spec.context
        self._vocabulary = spec.vocabulary
        self._type = np.dtype({2: "<u2", 4: "<u4"}[spec.token_bytes])
        self._queue: deque[Piece] = deque()

    @property
    def sequences(self) -> int:
        return sum(each.stop - each.start for each, _ in self._queue)

    def add(self, pieces: Iterable[Piece]) -> None:
        self._queue.extend(pieces)

    def take(self, sequences: int) -> list[Piece]:
        """The next so many sequences, or what there is."""
        taken: list[Piece] = []
        while sequences and self._queue:
            each, path = self._queue.popleft()
            cut = min(each.stop, each.start + sequences)
            if cut < each.stop:
                self._queue.appendleft((replace(each, start=cut), path))
            taken.append((replace(each, stop=cut), path))
            sequences -= cut - each.start
        return taken

    def put_back(self, pieces: Sequence[Piece]) -> None:
        self._queue.extendleft(reversed(pieces))

    def drop(self, gone: DataRange) -> list[DataRange]:
        """Forget what is queued of it; what that was."""
        dropped = [common for each, _ in self._queue if (common := each.common(gone)) is not None]
        self._queue = deque(rest for piece in self._queue for rest in _without(piece, gone))
        return dropped

    def drop_shard(self, shard: str) -> list[DataRange]:
        """Forget what is queued of it; what that was."""
        dropped = [each for each, _ in self._queue if each.shard == shard]
        self._queue = deque(piece for piece in self._queue if piece[0].shard != shard)
        return dropped

    def read(self, pieces: Sequence[Piece]) -> tuple[Tokens, Tokens]:
        """Inputs and targets, each (sequences, context). Read and not mapped: a file cut short must not kill us."""
        runs = np.concatenate([self._read_one(each, path) for each, path in pieces])
        return np.ascontiguousarray(runs[:, :-1]), np.ascontiguousarray(runs[:, 1:])

    def _read_one(self, each: DataRange, path: Path) -> Tokens:
        """The runs of `context` + 1 tokens at the range's positions, one after the other."""
        size = self._type.itemsize
        run_bytes = (self._context + 1) * size
        try:
            with path.open("rb", buffering=0) as file:
                sequences = (os.fstat(file.fileno()).st_size // size - 1) // self._context
                if each.stop > sequences:
                    what = f"shard {each.shard} ends before sequence {each.stop}"
                    raise ShardError(Code.BLOB_CORRUPT, what, each.shard)
                data = bytearray()
                for position in range(each.start, each.stop):
                    at = sequence_at(position, sequences=sequences, pass_number=each.pass_number)
                    data += os.pread(file.fileno(), run_bytes, at * self._context * size)
        except OSError as error:
            raise ShardError(
                Code.BLOB_CORRUPT, f"shard {each.shard} cannot be read: {error.strerror}", each.shard
            ) from error
        if len(data) < (each.stop - each.start) * run_bytes:
            raise ShardError(Code.BLOB_CORRUPT, f"shard {each.shard} ends before sequence {each.stop}", each.shard)
        tokens = np.frombuffer(data, self._type).astype(np.int64)
        if (largest := int(tokens.max())) >= self._vocabulary:
            what = f"shard {each.shard} holds token {largest}, the vocabulary ends at {self._vocabulary - 1}"
            raise ShardError(Code.TOKEN_RANGE, what, each.shard)
        return tokens.reshape(-1, self._context + 1)


class Learner:
    """The model and its optimizers: one inner step at a time."""

    def __init__(self, spec: TrainerSpec, vectors: Vectors) -> None:
        torch.set_num_threads(spec.threads)
        torch.set_float32_matmul_precision("high")  # TF32 where there is no bf16
        torch.manual_seed(spec.seed)
        self.rules = Rules.of(spec.train)
        devices = hardware.torch_devices()
        self.device = hardware.choose_device(spec.device, devices)
        self._spec = spec
        self._vectors = vectors
        self._workload = workloads.load(spec.workload)
        self._check_size()
        self._cap_device()
        self._module = self._workload.build(spec.model_config).to(self.device).train()
        self._parameters = [each for each in self._module.parameters() if each.requires_grad]
        self._bf16 = any(each.name == self.device and each.bf16 for each in devices)
        self.precision = "bf16" if self._bf16 and self.rules.precision != "fp32" else "fp32"
        self.rate_share = 1.0  # of the learning rates: a run's plan, round by round
        self._step = 0
        self.micro_batch = 1
        self.load()
        try:
            self.micro_batch = self._probe()
        except torch.OutOfMemoryError as error:
            what = f"{self.device} has too little memory for the model and one sequence"
            raise Refused(Code.MEMORY, what, fix="Choose a larger device, or --device cpu.") from error
        self.load()
        self._optimizers = self._make_optimizers()

    def load(self) -> None:
        """Start from the committed state."""
        model.load(self._module, self._vectors.shared)

    def save(self) -> None:
        model.flatten(self._module, self._vectors.snapshot)

    @torch.no_grad()
    def merge(self) -> None:
        """parameters += shared - snapshot, in the order that is exact when no step was made since the snapshot."""
        at = 0
        for parameter in self._module.parameters():
            end = at + parameter.numel()
            shared, snapshot = (
                torch.from_numpy(vector[at:end]).to(self.device).view(parameter.shape)
                for vector in (self._vectors.shared, self._vectors.snapshot)
            )
            parameter.sub_(snapshot).add_(shared)
            at = end

    def step(self, inputs: Tokens, targets: Tokens, abandoned: Callable[[], bool]) -> float | None:
        """One inner step; its mean loss. None if it was abandoned. Not finite: rejected, nothing has changed."""
        while True:
            try:
                return self._attempt(inputs, targets, abandoned)
            except torch.OutOfMemoryError:  # another program took memory since the probe
                self._zero_gradients()
                _free(self.device)
                if self.micro_batch == 1:
                    raise
                self.micro_batch //= 2

    def _attempt(self, inputs: Tokens, targets: Tokens, abandoned: Callable[[], bool]) -> float | None:
        loss = self._gradients(inputs, targets, abandoned)
        if loss is None:
            self._zero_gradients()
            return None
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.rules.clip)
        loss_value, norm_value = torch.stack([loss, norm.to(loss.dtype)]).tolist()  # the one wait for the device
        if not math.isfinite(loss_value + norm_value):
            self._zero_gradients()
            return math.nan
        self._step += 1
        share = self.rate_share * min(1.0, self._step / max(1, self.rules.warmup_steps))
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * share
            optimizer.step()
        self._zero_gradients()
        return float(loss_value)

    def _gradients(self, inputs: Tokens, targets: Tokens, abandoned: Callable[[], bool]) -> torch.Tensor | None:
        mean = torch.zeros((), device=self.device)
        for at in range(0, len(inputs), self.micro_batch):
            if abandoned():
                return None
            here, there = (self._on_device(each[at : at + self.micro_batch]) for each in (inputs, targets))
            with self._autocast():
                loss = self._workload.loss(self._module, here, there) / inputs.size
            loss.backward()  # type: ignore[no-untyped-call]
            mean += loss.detach()
        return mean

    def _on_device(self, tokens: Tokens) -> torch.Tensor:
        tensor = torch.from_numpy(tokens)
        if self.device.startswith("cuda"):
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.partition(":")[0], torch.bfloat16)

    def _zero_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _check_size(self) -> None:
        """Before anything is allocated."""
        spec = self._spec
        size = self._workload.measure(spec.model_config)
        if (size.parameters, size.digest) != (spec.parameters, spec.layout):
            what = f"the config makes {size.parameters:,} parameters, the manifest says {spec.parameters:,}"
            if size.parameters == spec.parameters:
                what = "the config makes other parameters than the manifest says"
            raise Refused(Code.MODEL_BAD, what)
        needed = size.parameters * STATE_BYTES
        available = self._memory_available()
        hardware.check_device(needed, self.device, hardware.torch_devices(), cap=spec.vram_cap)
        if self.device == "cpu" and needed > available:
            raise Refused(Code.MODEL_TOO_LARGE, f"training needs {needed:,} bytes of memory, {available:,} are free")

    def _memory_available(self) -> int:
        """What is free, and what its owner gives of it."""
        free = hardware.measure(Path.cwd()).memory_available_bytes
        cap, used = self._spec.memory_cap, psutil.Process().memory_info()
        return free if cap is None else min(free, max(0, cap - getattr(used, "data", used.rss)))  # macOS has only rss

    def _cap_device(self) -> None:
        if self._spec.vram_cap is not None and self.device.startswith("cuda"):
            whole = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self._spec.vram_cap / whole), self.device)

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        rules = self.rules
        chosen = self._workload.hidden_matrices(self._module) if rules.optimizer == "muon" else []
        matrices = {id(each) for each in chosen}
        rest = [each for each in self._parameters if id(each) not in matrices]
        decayed = [each for each in rest if each.ndim >= 2]
        plain = [each for each in rest if each.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": rules.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        betas = (rules.betas[0], rules.betas[1])
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=rules.learning_rate, betas=betas, fused=True)
        ]
        if chosen:
            muon = torch.optim.Muon if self._bf16 else Float32Muon
            optimizers.append(
                muon(
                    chosen,
                    lr=rules.muon_learning_rate,
                    momentum=rules.muon_momentum,
                    weight_decay=rules.weight_decay,
                )
            )
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["full_lr"] = group["lr"]
        return optimizers

    def _probe(self) -> int:
        """The largest power of two of sequences that fits at once, up to the batch and the volunteer's cap."""
        bound = min(self.rules.batch_sequences, self._spec.batch_cap or self.rules.batch_sequences)
        largest = 1 << (max(1, bound).bit_length() - 1)
        try:
            sequence_bytes = self._try(1)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # model code raises whatever it meets
            what = f"the model cannot make a step: {type(error).__name__}: {error}"
            raise Refused(Code.MODEL_BAD, canonical.shown(what)) from error
        if not self.device.startswith("cuda"):
            room = self._memory_available() * MEMORY_SHARE
            while largest > 1 and largest * sequence_bytes > room:
                largest //= 2
            return largest
        while largest > 1:
            try:
                self._try(largest)
                break
            except torch.OutOfMemoryError:
                largest //= 2
            _free(self.device)
        _free(self.device)
        return largest

    def _try(self, sequences: int) -> int:
        """A whole step on made-up data, whose outcome is thrown away; the bytes kept for going backward."""
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        tokens = np.random.default_rng(0).integers(self._spec.vocabulary, size=(sequences, self._spec.context))
        self.micro_batch = sequences
        self._optimizers = self._make_optimizers()
        try:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                self._attempt(tokens, tokens, lambda: False)
        finally:
            self._step = 0
            self._optimizers = []
            self._zero_gradients()
        logits = sequences * self._spec.context * self._spec.vocabulary * 4
        return sum(kept.values()) + 2 * logits  # going backward needs the logits' gradient, and a copy


@dataclass
class Tally:
    """What some steps amount to."""

    steps: int = 0
    tokens: int = 0
    losses: float = 0.0  # summed over tokens
    seconds: float = 0.0

    def add(self, *, tokens: int, loss: float, seconds: float) -> None:
        self.steps += 1
        self.tokens += tokens
        self.losses += loss * tokens
        self.seconds += seconds

    @property
    def loss(self) -> float | None:
        return self.losses / self.tokens if self.tokens else None


class Loop:
    """Steps while it may, and answers orders between two steps."""

    def __init__(
        self, learner: Learner, feed: Feed, *, inbox: SimpleQueue[Order], pausing: threading.Event, tell: Tell
    ) -> None:
        self._learner = learner
        self._feed = feed
        self._inbox = inbox
        self._pausing = pausing
        self._tell = tell
        self._running = False
        self._told_empty = False
        self._goal: int | None = None
        self._rejected = 0  # in a row
        self._since: float | None = None  # the first step
        self._busy_seconds = 0.0
        self._reported = 0.0
        self._consumed: list[DataRange] = []  # since the last snapshot, as is the next line
        self._done = Tally()
        self._shown = Tally()  # since the last report

    def run(self) -> None:
        while True:
            while not self._inbox.empty():
                self._answer(self._inbox.get())
            if self._running and self._feed.sequences:
                self._advance()
                continue
            if self._running and not self._told_empty:
                self._report()
                self._tell({"event": "out_of_data"})
                self._told_empty = True
            self._answer(self._inbox.get())

    def _answer(self, order: Order) -> None:
        reply: dict[str, Any] = {"reply": order["number"]}
        match order["do"]:
            case "run":
                self._running = True
                self._told_empty = False
                self._rejected = 0
            case "pause":
                self._running = False
                self._pausing.clear()
                self._report()
            case "add_data":
                self._feed.add((DataRange(**fields), Path(path)) for fields, path in order["data"])
                self._told_empty = False
            case "drop":
                dropped = [gone for each in order["ranges"] for gone in self._feed.drop(DataRange(**each))]
                reply["dropped"] = [asdict(each) for each in dropped]
            case "goal":
                self._goal = order["steps"]
                self._learner.rate_share = order["rate_share"]
                self._report_goal()
            case "snapshot":
                reply |= self._snapshot()
            case "peek":
                reply |= self._peek()
            case "merge":
                self._learner.merge()
            case unknown:
                raise AssertionError(f"no order is called {unknown}")
        self._tell(reply)

    def _advance(self) -> None:
        pieces = self._feed.take(self._learner.rules.batch_sequences)
        try:
            inputs, targets = self._feed.read(pieces)
        except ShardError as error:
            self._feed.put_back(pieces)
            dropped = self._feed.drop_shard(error.shard)
            self._fail(error.reason, error.what, shard=error.shard, ranges=dropped)
            return
        began = time.monotonic()
        loss = self._learner.step(inputs, targets, self._pausing.is_set)
        seconds = time.monotonic() - began
        self._since = self._since or began
        if loss is None:
            self._feed.put_back(pieces)
        elif math.isfinite(loss):
            self._rejected = 0
            self._busy_seconds += seconds
            self._consumed = _joined([*self._consumed, *(each for each, _ in pieces)])
            for tally in (self._done, self._shown):
                tally.add(tokens=inputs.size, loss=loss, seconds=seconds)
            self._report_goal()
            if time.monotonic() - self._reported >= REPORT_SECONDS:
                self._report()
        else:
            self._reject(pieces)

    def _snapshot(self) -> Order:
        answer = self._peek()
        self._done, self._consumed, self._goal = Tally(), [], None
        return answer

    def _peek(self) -> Order:
        self._learner.save()
        ranges = [asdict(each) for each in self._consumed]
        return {"steps": self._done.steps, "tokens": self._done.tokens, "loss": self._done.loss, "ranges": ranges}

    def _reject(self, pieces: Sequence[Piece]) -> None:
        self._rejected += 1
        ranges = [asdict(each) for each in _joined(each for each, _ in pieces)]
        self._tell({"event": "skipped", "ranges": ranges, "what": "loss or gradient is not finite"})
        if self._rejected >= REJECTED_MAX:
            self._fail(Code.DIVERGED, f"{REJECTED_MAX} inner steps in a row had a loss or gradient that is not finite")

    def _fail(self, reason: Code, what: str, *, shard: str | None = None, ranges: Iterable[DataRange] = ()) -> None:
        self._running = False
        self._report()
        lost = [asdict(each) for each in ranges]
        self._tell({"event": "failed", "code": reason.code, "what": what, "shard": shard, "ranges": lost})

    def _report_goal(self) -> None:
        if self._goal is not None and self._done.steps >= self._goal:
            self._goal = None
            self._report(even_if_empty=True)

    def _report(self, *, even_if_empty: bool = False) -> None:
        if not self._shown.steps and not even_if_empty:
            return
        self._reported = time.monotonic()
        shown, self._shown = self._shown, Tally()
        self._tell(
            {
                "event": "stepped",
                "steps": self._done.steps,
                "tokens": self._done.tokens,
                "loss": shown.loss,
                "tokens_per_second": shown.tokens / shown.seconds if shown.steps else 0.0,
                "queued_sequences": self._feed.sequences,
                "busy": {
                    "since": self._since,
                    "until": self._reported,
                    "seconds": self._busy_seconds,
                    "step_seconds": shown.seconds / shown.steps if shown.steps else None,
                },
            }
        )


def _work(order: Order, *, inbox: SimpleQueue[Order], pausing: threading.Event, tell: Tell) -> None:
    """The thread that owns torch. It ends with the process."""
    spec = TrainerSpec(**order["spec"])
    try:
        learner = Learner(spec, Vectors(spec.parameters, *order["files"]))
    except Refused as refused:
        tell({"event": "failed", "code": refused.reason.code, "what": refused.what})
        return
    accumulate = math.ceil(learner.rules.batch_sequences / learner.micro_batch)
    started = {"device": learner.device, "precision": learner.precision, "micro_batch": learner.micro_batch}
    tell({"event": "started", "started": {**started, "accumulate": accumulate}})
    Loop(learner, Feed(spec), inbox=inbox, pausing=pausing, tell=tell).run()


def _without(piece: Piece, gone: DataRange) -> list[Piece]:
    """What is left of a piece."""
    each, path = piece
    if not each.overlaps(gone):
        return [piece]
    rests = (replace(each, stop=min(each.stop, gone.start)), replace(each, start=max(each.start, gone.stop)))
    return [(rest, path) for rest in rests if rest.start < rest.stop]


def _joined(ranges: Iterable[DataRange]) -> list[DataRange]:
    """The same data in as few ranges as its order allows."""
    joined: list[DataRange] = []
    for each in ranges:
        last = joined[-1] if joined else None
        if (
            last is not None
            and replace(last, stop=each.stop) == replace(each, start=last.start)
            and last.stop == each.start
        ):
            joined[-1] = replace(last, stop=each.stop)
        else:
            joined.append(each)
    return joined


def _free(device: str) -> None:
    """Give memory that torch keeps for later back to the device."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


async def _main() -> None:
    channel = await parent_channel()
    loop = asyncio.get_running_loop()
    inbox: SimpleQueue[Order] = SimpleQueue()
    pausing = threading.Event()

    def tell(body: Order) -> None:
        asyncio.run_coroutine_threadsafe(_send(channel, body), loop)

    def work(order: Order) -> None:
        try:
            _work(order, inbox=inbox, pausing=pausing, tell=tell)
        except BaseException:
            traceback.print_exc()
            os._exit(Code.CHILD_DIED.exit.value)  # the owner sees the end and starts another

    try:
        order = (await channel.receive()).body
        threading.Thread(target=work, args=(order,), daemon=True).start()
        while True:
            order = (await channel.receive()).body
            if order["do"] == "pause":
                pausing.set()
            inbox.put(order)
    except ChannelClosed:
        os._exit(0)  # nothing here is worth saving: the owner has closed the channel, or is dead


async def _send(channel: Channel, body: Order) -> None:
    with suppress(ChannelClosed):
        await channel.send(body)


if __name__ == "__main__":
    asyncio.run(_main())
