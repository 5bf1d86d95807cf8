"""What this node brought to the newest rounds, byte for byte, and what its means were made of: the coordinator may ask
to see it, and nobody else. Knows no network."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

from protocol.blobs import BlobStore
from protocol.errors import Refused
from protocol.types import BlobRef, Digest

KEPT: Final = 3  # of the round that has just ended, and of the two before: so long may the coordinator ask


class Brought:
    """A small store beside the node's others. It begins empty: a start is rare, and who cannot show it once is forgiven."""

    def __init__(self, folder: Path, kept: int = KEPT) -> None:
        self._most = kept
        self._blobs = BlobStore(folder)
        self._kept: list[Digest] = []
        self._blobs.keep_only(set())

    def keep(self, data: bytes) -> None:
        """In the place of the oldest. A full disk keeps nothing, and no round waits for it."""
        with suppress(Refused):
            self._kept.append(self._blobs.put_bytes(data).digest)
        self._drop_oldest()

    def move_in(self, file: Path) -> BlobRef:
        """The same with a file, which is gone then, and with a refusal if there is no room."""
        try:
            found = self._blobs.put_file(file)
        finally:
            file.unlink(missing_ok=True)
        self._kept.append(found.digest)
        self._drop_oldest()
        return found

    def _drop_oldest(self) -> None:
        while len(self._kept) > self._most:
            oldest = self._kept.pop(0)
            if oldest not in self._kept:
                self._blobs.delete(oldest)

    def read(self, digest: Digest) -> bytes | None:
        """None if it is not here, or has rotted."""
        with suppress(Refused):
            return self._blobs.read(digest)
        return None
