"""What this node brought to the newest records, byte for byte: the coordinator may ask to see it. Knows no network."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

from protocol.blobs import BlobStore
from protocol.errors import Refused
from protocol.types import Digest

KEPT: Final = 3  # of the round that has just ended, and of the two before: so long may the coordinator ask


class Brought:
    """A small store beside the node's others. It begins empty: a start is rare, and who cannot show it once is forgiven."""

    def __init__(self, folder: Path) -> None:
        self._blobs = BlobStore(folder)
        self._kept: list[Digest] = []
        for digest in self._blobs.digests():
            self._blobs.delete(digest)

    def keep(self, data: bytes) -> None:
        """In the place of the oldest. A full disk keeps nothing, and no round waits for it."""
        with suppress(Refused):
            self._kept.append(self._blobs.put_bytes(data).digest)
        while len(self._kept) > KEPT:
            oldest = self._kept.pop(0)
            if oldest not in self._kept:
                self._blobs.delete(oldest)

    def read(self, digest: Digest) -> bytes | None:
        """None if it is not here, or has rotted."""
        with suppress(Refused):
            return self._blobs.read(digest)
        return None
