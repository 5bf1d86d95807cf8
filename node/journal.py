"""What a node must not forget: its promises, the log it has folded, the rosters and rollbacks it goes by. Atomic files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from node.core.rounds import ROSTERS_KEPT
from protocol import canonical
from protocol.blobs import atomic_write, full_disk_refused
from protocol.messages import Accepted
from protocol.types import (
    Ballot,
    BaseCheckpoint,
    Digest,
    Epoch,
    Head,
    LogEntry,
    RoundNumber,
    SignedRollback,
    SignedRoster,
)

_FORGOTTEN: Final = "rosters.txt"  # of rosters that are not kept: a line each with epoch and digest


@dataclass(frozen=True)
class Promise:
    """The highest ballot that this node has promised in a round, and the record it voted for there."""

    round: RoundNumber
    ballot: Ballot
    accepted: Accepted | None
    previous: Digest  # the head that the round follows


@dataclass(frozen=True)
class _UpTo:
    epoch: Epoch


class Journal:
    """A folder of small files. Every write is durable when the call returns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("log", "rosters", "rollbacks"):
            (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._forgotten = self._read_forgotten()

    def promise(self, head: Head) -> Promise | None:
        """What was promised in the round that follows this head; what was promised in another no longer binds."""
        promise = self._promise()
        binds = promise is not None and (promise.round, promise.previous) == (head.round, head.hash)
        return promise if binds else None

    def save_promise(self, promise: Promise) -> None:
        atomic_write(self.folder / "promise.json", canonical.to_bytes(promise))

    def _promise(self) -> Promise | None:
        path = self.folder / "promise.json"
        return canonical.from_bytes(Promise, path.read_bytes()) if path.exists() else None

    def silence(self) -> Epoch:
        """The newest roster under which this node signs nothing, because it forgot what it had signed; -1 for none."""
        return self._up_to("silence.json")

    def save_silence(self, epoch: Epoch) -> None:
        atomic_write(self.folder / "silence.json", canonical.to_bytes(_UpTo(epoch)))

    def sealed(self) -> Epoch:
        """The newest roster under which this node signs nothing, because it has left; -1 for none."""
        return self._up_to("seal.json")

    def save_seal(self, epoch: Epoch) -> None:
        atomic_write(self.folder / "seal.json", canonical.to_bytes(_UpTo(epoch)))

    def lift_seal(self) -> None:
        """A crash may bring it back; the next session lifts it again."""
        (self.folder / "seal.json").unlink(missing_ok=True)

    def _up_to(self, name: str) -> Epoch:
        path = self.folder / name
        return canonical.from_bytes(_UpTo, path.read_bytes()).epoch if path.exists() else Epoch(-1)

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
        atomic_write(self._roster(signed.roster.epoch), canonical.to_bytes(signed))
        self._forget_rosters()

    def roster_digest(self, epoch: Epoch) -> Digest | None:
        """Of the roster that was ever saved under this number, kept or not; none if none was."""
        path = self._roster(epoch)
        if not path.exists():
            return self._forgotten.get(epoch)
        return canonical.digest(canonical.from_bytes(SignedRoster, path.read_bytes()).roster)

    def rosters(self) -> dict[Epoch, SignedRoster]:
        signed = (
            canonical.from_bytes(SignedRoster, path.read_bytes())
            for path in sorted((self.folder / "rosters").glob("*.json"))
        )
        return {each.roster.epoch: each for each in signed}

    def save_rollback(self, signed: SignedRollback) -> None:
        atomic_write(self.folder / "rollbacks" / f"{signed.rollback.number:04d}.json", canonical.to_bytes(signed))

    def rollbacks(self) -> tuple[SignedRollback, ...]:
        """All that are known, the first one first."""
        paths = sorted((self.folder / "rollbacks").glob("*.json"))
        return tuple(canonical.from_bytes(SignedRollback, path.read_bytes()) for path in paths)

    def undo(self, signed: SignedRollback) -> None:
        """Put the entries aside that this rollback has undone: they are no part of the log any more, but can be seen."""
        aside = self.folder / "undone" / f"{signed.rollback.number:04d}"
        with full_disk_refused(self.folder):
            aside.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in sorted((self.folder / "log").glob("*.json"), reverse=True):  # so that what is left has no gap
                if int(path.stem) >= signed.rollback.to.round:
                    path.replace(aside / path.name)

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

    def _forget_rosters(self) -> None:
        """Nobody goes by more than the newest and those that our promise names, here neither; of the others it stays known
        what they said."""
        paths = sorted((self.folder / "rosters").glob("*.json"))
        if len(paths) < 2 * ROSTERS_KEPT:
            return
        named = set(map(self._roster, self._promised()))
        old = [path for path in paths[:-ROSTERS_KEPT] if path not in named]
        for path in old:
            roster = canonical.from_bytes(SignedRoster, path.read_bytes()).roster
            self._forgotten[roster.epoch] = canonical.digest(roster)
        lines = "".join(f"{epoch} {digest}\n" for epoch, digest in sorted(self._forgotten.items()))
        atomic_write(self.folder / _FORGOTTEN, lines.encode())
        for path in old:
            path.unlink()

    def _promised(self) -> set[Epoch]:
        """The rosters that the saved promise names: without them the record that it voted for cannot be proposed again."""
        promise = self._promise()
        if promise is None:
            return set()
        accepted = promise.accepted
        voted = {accepted.ballot.epoch, accepted.record.epoch} if accepted is not None else set()
        return {promise.ballot.epoch, *voted}

    def _read_forgotten(self) -> dict[Epoch, Digest]:
        path = self.folder / _FORGOTTEN
        text = path.read_text("ascii", "replace") if path.exists() else ""
        found = re.findall(r"^([0-9]{1,19}) ([0-9a-f]{64})$", text, re.MULTILINE)
        return {Epoch(int(epoch)): Digest(digest) for epoch, digest in found}

    def _roster(self, epoch: Epoch) -> Path:
        return self.folder / "rosters" / f"{epoch:016d}.json"

    def _log(self, round_number: RoundNumber) -> Path:
        return self.folder / "log" / f"{round_number:08d}.json"
