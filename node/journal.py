"""What a node must not forget: its promises, the log it has folded, the rosters that certify it. Atomic files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from protocol import canonical
from protocol.blobs import atomic_write
from protocol.messages import Accepted
from protocol.types import Ballot, BaseCheckpoint, Epoch, LogEntry, RoundNumber, SignedRoster


@dataclass(frozen=True)
class Promise:
    """The highest ballot that this node has promised in a round, and the record it voted for there."""

    round: RoundNumber
    ballot: Ballot
    accepted: Accepted | None


class Journal:
    """A folder of small files. Every write is durable when the call returns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("log", "rosters"):
            (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)

    def promise(self, round_number: RoundNumber) -> Promise | None:
        """What was promised in this round; what was promised in another no longer binds."""
        path = self.folder / "promise.json"
        if not path.exists():
            return None
        promise = canonical.from_bytes(Promise, path.read_bytes())
        return promise if promise.round == round_number else None

    def save_promise(self, promise: Promise) -> None:
        atomic_write(self.folder / "promise.json", canonical.to_bytes(promise))

    def append(self, entry: LogEntry) -> None:
        atomic_write(self._log(entry.record.round), canonical.to_bytes(entry))

    def entry(self, round_number: int) -> LogEntry | None:
        path = self._log(RoundNumber(round_number))
        return canonical.from_bytes(LogEntry, path.read_bytes()) if path.exists() else None

    def entries(self, start: int, *, most: int) -> tuple[LogEntry, ...]:
        """Consecutive entries from a round on."""
        found: list[LogEntry] = []
        while len(found) < most and (entry := self.entry(start + len(found))) is not None:
            found.append(entry)
        return tuple(found)

    def save_roster(self, signed: SignedRoster) -> None:
        atomic_write(self.folder / "rosters" / f"{signed.roster.epoch:08d}.json", canonical.to_bytes(signed))

    def rosters(self) -> dict[Epoch, SignedRoster]:
        signed = (
            canonical.from_bytes(SignedRoster, path.read_bytes())
            for path in sorted((self.folder / "rosters").glob("*.json"))
        )
        return {each.roster.epoch: each for each in signed}

    def base(self) -> BaseCheckpoint | None:
        """The checkpoint that the log is folded onto at the next start."""
        path = self.folder / "base.json"
        return canonical.from_bytes(BaseCheckpoint, path.read_bytes()) if path.exists() else None

    def save_base(self, base: BaseCheckpoint) -> None:
        atomic_write(self.folder / "base.json", canonical.to_bytes(base))

    def forget_before(self, round_number: int) -> None:
        """Drop entries that no checkpoint of ours needs any more."""
        for path in (self.folder / "log").glob("*.json"):
            if int(path.stem) < round_number:
                path.unlink()

    def _log(self, round_number: RoundNumber) -> Path:
        return self.folder / "log" / f"{round_number:08d}.json"
