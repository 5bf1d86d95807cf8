"""Side by side with what people would use instead: one model, text and number of tokens, one system at a time.

Every worker has one thread, and a network namespace whose interface counts what it sends. The others' programs are in
tests/bench/others; what they need from PyPI is installed into environments of their own, outside of this repository.
OpenDiLoCo is not on PyPI: it is measured where --opendiloco names a folder that holds the package `open_diloco`.
Barnraise trains with its own daemons and coordinator, and deals the same text in an order of its own. Its clock
runs from the moment when its first node trains; the others may still be starting. Every record is folded again afterwards,
for the loss after each: what stands beside another system's loss is when ours was as low.

    make bench PART=alternatives ARGS="--steps 300 --only ddp barnraise"
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import venv
from collections.abc import Iterator, Sequence
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from coordinator.archive import rebuild
from coordinator.folder import RunFolder
from protocol import model
from protocol.runspec import RoundsSection
from tests.bench import ethernet, llama
from tests.bench.table import Row, show
from tests.chaos import audit, network
from tests.chaos.swarm import SETTINGS, Certified, Swarm, ends_when_told, until

PROGRAMS = Path(__file__).with_name("others")
MARK = "bench: "  # begins every line that others/task.py means for us
VOCABULARY = 257  # bytes, and the end of a document
HELDOUT_SEQUENCES = 256
READY_SECONDS, DONE_SECONDS, STRAGGLER_SECONDS = 120.0, 1200.0, 90.0
WEIGHT_DECAY, WARMUP_STEPS = 0.01, 20  # as in others/task.py


class Failed(Exception):
    """A system that could not be had, or did not do the task; what it said was shown."""


@dataclass(frozen=True)
class Other:
    """A system that is not ours: its program, and what it needs from PyPI."""

    name: str
    program: str
    packages: tuple[str, ...] = ()
    meets: bool = True  # at a process of its own in the hub
    keeps: bool = True  # every worker ends with the model; else whoever they meet at does


OTHERS = (
    Other("data-parallel (torch DDP, gloo)", "ddp", meets=False),
    Other("hivemind.Optimizer 1.1.12, local updates, fp16", "hivemind_optimizer"),
    Other("OpenDiLoCo on hivemind, fp16", "opendiloco", ("wandb==0.31.0", "numpy==2.2.6")),
    Other("torchft DiLoCo, fp32", "torchft_diloco", ("torchft-nightly==2026.10.26",)),
    Other("Flower FedAvg, fp32", "flower_fedavg", ("flwr==1.38.0",), keeps=False),
)
ADAMW: dict[str, Any] = {"optimizer": "adamw"}
MUON: dict[str, Any] = {"optimizer": "muon", "muon_learning_rate": 0.02}
GROWING = RoundsSection().inner_steps


@dataclass(frozen=True)
class Ours:
    """A run file's settings. Without inner steps of its own it exchanges as often as the others."""

    name: str
    train: dict[str, Any]
    update: dict[str, Any]
    inner_steps: tuple[tuple[int, int], ...] = ()


SPARSE2 = {"codec": "sparse2", "residual_decay": 0.95}
OURS = (
    Ours("Barnraise int4, AdamW", ADAMW, {"codec": "int4"}),
    Ours("Barnraise int4, Muon, growing rounds: the defaults", MUON, {"codec": "int4"}, GROWING),
    Ours("Barnraise sparse2, AdamW", ADAMW, SPARSE2),
    Ours("Barnraise sparse2, Muon, growing rounds", MUON, SPARSE2, GROWING),
)


@dataclass(frozen=True)
class Outcome:
    loss: float
    seconds: float
    tokens: int
    sent: float  # bytes of one worker, as its interface counts them
    same: bool | None  # whether every worker ended with the same bits; none: there is one model, where they meet
    curve: tuple[tuple[float, float], ...] = ()  # seconds and loss after each round, where that is known
    hung: int = 0  # workers that never ended

    def reached(self, loss: float) -> float | None:
        """Seconds until it was as good as this for the first time."""
        return next((seconds for seconds, each in self.curve if each <= loss), None)


class Bench:
    """What all systems share."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given, self.folder = given, folder
        self.config = llama.config(given.hidden, vocabulary=VOCABULARY, context=given.context)
        self.parameters = model.measure(self.config).parameters
        files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
        text = np.frombuffer(b"\n".join(path.read_bytes() for path in files), np.uint8)
        wanted = given.steps * given.workers * given.batch * given.context
        rests = HELDOUT_SEQUENCES * given.context + 1
        if len(text) < 2 * wanted + rests:
            raise SystemExit(f"the text has {len(text):,} bytes; {2 * wanted + rests:,} are wanted for so many steps")
        self.heldout, self.text = text[-rests:], text[: 2 * wanted]
        np.save(folder / "tokens.npy", self.text)
        (folder / "text.txt").write_bytes(self.text.tobytes())
        torch.save(self._built(given.seed).state_dict(), folder / "initial.pt")

    def loss(self, state: dict[str, torch.Tensor]) -> float:
        """In nats for each byte of text that nobody trained on."""
        module = self._built(0)
        module.load_state_dict(state)
        return self._loss(module)

    @torch.inference_mode()
    def _loss(self, module: torch.nn.Module) -> float:
        rows = np.lib.stride_tricks.sliding_window_view(self.heldout, self.given.context + 1)[:: self.given.context]
        total = 0.0
        for each in np.array_split(rows, 16):
            tokens = torch.from_numpy(each.astype(np.int64))
            logits = module(input_ids=tokens[:, :-1], use_cache=False).logits
            total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())) * len(each)
        return total / len(rows)

    def _built(self, seed: int) -> torch.nn.Module:
        module = model.build(self.config)
        model.load(module, model.initial_vector(self.config, seed))
        return module.eval()

    def _slow_down(self, lan: Any) -> None:
        for index in range(self.given.workers if self.given.rate else 0):
            lan.slow(index, self.given.rate)

    # others

    def measure(self, other: Other, python: Path) -> Outcome:
        given, lan = self.given, network.Lan(self.given.workers)
        folder = self.folder / other.program
        folder.mkdir()
        with ExitStack() as owned:
            meeting, hub = "", None
            if other.meets:
                hub = owned.enter_context(self._started(other, python, folder, lan, None, ""))
                meeting = _said(hub, READY_SECONDS)
            workers = [
                owned.enter_context(self._started(other, python, folder, lan, index, meeting))
                for index in range(given.workers)
            ]
            for each in workers:
                _said(each, READY_SECONDS)
            self._slow_down(lan)
            before, began = _sent(lan, given.workers), time.monotonic()
            for each in workers:
                _go_on(each)
            ended = _ended(workers)
            if hub is not None and not other.keeps:
                _said(hub, DONE_SECONDS)
                ended.append((0, time.monotonic()))
            seconds, sent = max(at for _, at in ended) - began, _sent(lan, given.workers) - before
        finals = [torch.load(path) for path in sorted(folder.glob("*.pt"))]
        losses = [self.loss(final) for final in finals]
        hashes = {_hash(final) for final in finals}
        tokens = sum(steps for steps, _ in ended) * given.batch * given.context
        same = len(hashes) == 1 and len(finals) == given.workers if other.keeps else None
        hung = given.workers - len(finals) if other.keeps else 0
        return Outcome(fmean(losses), seconds, tokens, sent / given.workers, same, hung=hung)

    @contextmanager
    def _started(
        self, other: Other, python: Path, folder: Path, lan: network.Lan, index: int | None, meeting: str
    ) -> Iterator[subprocess.Popen[str]]:
        given, name = self.given, "hub" if index is None else f"worker{index}"
        task = {
            "index": index,
            "workers": given.workers,
            "steps": given.steps,
            "inner_steps": given.inner_steps,
            "batch": given.batch,
            "context": given.context,
            "seed": given.seed,
            "learning_rate": given.learning_rate,
            "config": {key: value for key, value in json.loads(self.config).items() if key != "architectures"},
            "tokens": str(self.folder / "tokens.npy"),
            "initial": str(self.folder / "initial.pt"),
            "final": str(folder / f"{name}.pt"),
            "addresses": [lan.address(each) for each in range(given.workers)],
            "hub": lan.address(None),
            "meeting": meeting,
        }
        path = folder / f"{name}.json"
        path.write_text(json.dumps(task))
        device = "hub" if index is None else f"node{index}"
        paths = [str(given.opendiloco)] if given.opendiloco else []
        log = folder / f"{name}.log"
        lan.enter(index)
        try:
            with log.open("wb") as errors:
                process = subprocess.Popen(
                    [python, PROGRAMS / f"{other.program}.py", path],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env={
                        **os.environ,
                        "OMP_NUM_THREADS": "1",
                        "GLOO_SOCKET_IFNAME": device,
                        "PYTHONPATH": os.pathsep.join(paths),
                        "TMPDIR": str(self.folder),
                    },
                    start_new_session=True,
                )
        finally:
            lan.enter(None)
        with process:  # at its end, its pipes are closed
            try:
                yield process
            except BaseException:
                print(log.read_text(errors="replace")[-1500:], file=sys.stderr)
                raise
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    # ours

    def measure_ours(self, ours: Ours) -> Outcome:
        given = self.given
        section = RoundsSection(inner_steps=ours.inner_steps or ((1, given.inner_steps),))
        rounds = next(number for number in range(1, 10_000) if section.steps_before(number) >= given.steps)
        folder = self.folder / f"ours{len(list(self.folder.glob('ours*')))}"
        swarm = Swarm(folder / "w", nodes=given.workers, settings=self._settings(ours, section, rounds))
        try:
            swarm.open((self.folder / "text.txt",))
            for member in swarm.members:
                member.join(swarm.invite)
            began = until(lambda: _anybody_trains(swarm) and time.time(), "a node trains", seconds=READY_SECONDS)
            self._slow_down(swarm.lan)
            before = _sent(swarm.lan, given.workers)
            last = swarm.certified_after(0.0, rounds, seconds=DONE_SECONDS)
            until(lambda: swarm.coordinator.round() >= rounds, "the coordinator has every round", seconds=DONE_SECONDS)
            sent = _sent(swarm.lan, given.workers) - before
            strange, compared = audit.strange_folds(swarm.coordinator, swarm.members)
            same = not strange and compared >= rounds
            certified = swarm.watch.in_order()
            curve = tuple(self._curve(swarm.coordinator.folder, certified, began))
            tokens = sum(sum(each.tokens.values()) for each in certified)
            return Outcome(curve[-1][1], last.at - began, tokens, sent / given.workers, same, curve)
        finally:
            swarm.close()

    def _curve(self, folder: Path, certified: Sequence[Certified], began: float) -> Iterator[tuple[float, float]]:
        run, module = RunFolder.find(folder), self._built(0)
        with closing(run.open_store()) as store:
            manifest = run.manifest(store).manifest
            for each in certified:
                model.load(module, rebuild(store, run.open_blobs(), manifest, each.round + 1).params)
                yield each.at - began, self._loss(module)

    def _settings(self, ours: Ours, section: RoundsSection, rounds: int) -> dict[str, Any]:
        given = self.given
        return {
            **SETTINGS,
            "run": {"rounds": rounds, "min_nodes": given.workers, "seed": given.seed},
            "model": {"config": llama.sizes(given.hidden)},
            "data": {"context": given.context, "heldout": 0.01},
            "train": {
                **ours.train,
                "batch_sequences": given.batch,
                "learning_rate": given.learning_rate,
                "warmup_steps": WARMUP_STEPS,
                "weight_decay": WEIGHT_DECAY,
            },
            "rounds": {"inner_steps": section.inner_steps, "gather_seconds": 5.0, "deadline_seconds": 60.0},
            "update": ours.update,
            "leases": {"sequences": 2048, "seconds": 120.0},
            "evaluate": {"sequences": 32, "every_rounds": 1000, "base_every_rounds": 1000},
        }


def environment(other: Other, folder: Path) -> Path:
    """A Python that has what the system needs, and sees what is installed here behind it."""
    if not other.packages:
        return Path(sys.executable)
    home = folder / hashlib.sha256(" ".join((sys.executable, *other.packages)).encode()).hexdigest()[:12]
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        print(f"  installing {', '.join(other.packages)} into {home}", flush=True)
        venv.create(home, with_pip=True, clear=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        (home / "lib" / version / "site-packages" / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
        if subprocess.run([python, "-m", "pip", "install", "-qq", *other.packages], check=False).returncode:
            raise Failed(f"pip could not install {' '.join(other.packages)}; remove it with --only, or try again")
        (home / "complete").touch()
    return python


def _said(process: subprocess.Popen[str], seconds: float) -> str:
    """The next line of its output that is meant for us; libraries print as well."""
    assert process.stdout is not None
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        for line in process.stdout:
            if line.startswith(MARK):
                return line.removeprefix(MARK).strip()
    finally:
        timer.cancel()
    raise Failed("a process of it ended, or said nothing in time")


def _ended(workers: Sequence[subprocess.Popen[str]]) -> list[tuple[int, float]]:
    """The steps of each worker that ends, and when. One that hangs long after the first has ended is killed."""

    def ended(process: subprocess.Popen[str]) -> tuple[int, float] | None:
        with suppress(Failed):
            return int(_said(process, DONE_SECONDS).partition(" ")[2]), time.monotonic()
        return None

    with ThreadPoolExecutor(len(workers)) as pool:
        waiting = {pool.submit(ended, each): each for each in workers}
        futures.wait(waiting, return_when=futures.FIRST_COMPLETED)
        for late in futures.wait(waiting, timeout=STRAGGLER_SECONDS).not_done:
            os.killpg(waiting[late].pid, signal.SIGKILL)
        found = [future.result() for future in waiting]
    if not any(found):
        raise Failed("no worker of it came to its end")
    return [each for each in found if each is not None]


def _go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def _anybody_trains(swarm: Any) -> bool:
    return any(member.status()["activity"] == "training" for member in swarm.members)


def _sent(lan: Any, workers: int) -> int:
    return sum(lan.counted(index).sent for index in range(workers))


def _hash(state: dict[str, torch.Tensor]) -> str:
    hashed = hashlib.sha256()
    for name in sorted(state):
        hashed.update(state[name].contiguous().numpy().tobytes())
    return hashed.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300, help="of each worker")
    parser.add_argument("--inner-steps", type=int, default=25, help="between two exchanges")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8, help="sequences of each worker's step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", help="of every worker's line, both ways, such as 20mbit")
    parser.add_argument("--only", nargs="*", default=[""], help="words of the systems to measure")
    parser.add_argument("--opendiloco", type=Path, help="a folder that holds the package open_diloco")
    parser.add_argument("--environments", type=Path, default=Path.home() / ".cache" / "barnraise-bench")
    given = parser.parse_args()
    if not ethernet.possible():
        print("alternatives: not measured; interfaces of their own need root and iproute2.")
        return
    ends_when_told()

    def chosen(name: str) -> bool:
        return any(word.lower() in name.lower() for word in given.only)

    others = [other for other in OTHERS if chosen(other.name)]
    if given.opendiloco is None and any(other.program == "opendiloco" for other in others):
        print("  OpenDiLoCo: skipped, no --opendiloco FOLDER")
        others = [other for other in others if other.program != "opendiloco"]
    pythons = []
    for other in others:  # while there is a network
        try:
            pythons.append((other, environment(other, given.environments)))
        except Failed as failed:
            print(f"  {other.name}: not measured, {failed}", flush=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="barnraise-bench-") as folder:
        bench = Bench(given, Path(folder))
        goal = given.steps * given.workers * given.batch * given.context

        ended: list[tuple[str, Outcome]] = []
        curves: dict[str, tuple[tuple[float, float], ...]] = {}

        def note(name: str, outcome: Outcome) -> None:
            sent = outcome.sent / bench.parameters * goal / outcome.tokens
            what = f"{outcome.tokens / outcome.seconds:,.0f} tokens/s; a worker sent {sent:.2f} bytes per parameter"
            replicas = {None: "one model", True: "replicas the same", False: "replicas DIFFER"}[outcome.same]
            hung = f"; {outcome.hung} of {given.workers} workers HUNG" if outcome.hung else ""
            words = f"{outcome.seconds:.0f} s, {what}; {outcome.tokens:,} tokens; {replicas}{hung}"
            rows.append(Row(name, outcome.loss, digits=4, note=words))
            curves[name] = outcome.curve or ((outcome.seconds, outcome.loss),)
            print(f"  {name}: loss {outcome.loss:.4f}, {words}", flush=True)
            for other, theirs in ended if outcome.curve else ():
                seconds = outcome.reached(theirs.loss)
                times = "never" if seconds is None else f"{seconds:.0f} s, {theirs.seconds / seconds:.1f} times sooner"
                rows.append(Row(f"  was as good as {other}", theirs.loss, digits=4, note=times))
                print(f"    as good as {other} after {times}", flush=True)
            if not outcome.curve:
                ended.append((name, outcome))

        for other, python in pythons:
            try:
                note(other.name, bench.measure(other, python))
            except Failed as failed:
                print(f"  {other.name}: not measured, {failed}", flush=True)
        for ours in OURS:
            if chosen(ours.name):
                note(ours.name, bench.measure_ours(ours))
    show(
        "alternatives",
        rows,
        f"{given.workers} workers with one thread each on {os.cpu_count()} cores, {bench.parameters:,} parameters,"
        f" {given.steps} steps of {given.batch * given.context:,} tokens for each, {given.inner_steps} between exchanges,"
        f" lines of {given.rate or 'the speed of this machine'};",
        "held-out loss in nats for each byte. Bytes are for so many tokens; a swarm of ours trains on while it exchanges.",
        curves=curves,
        axes=("seconds", "held-out loss, nats for each byte"),
    )


if __name__ == "__main__":
    main()
