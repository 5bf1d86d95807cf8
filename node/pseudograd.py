"""The pseudo-gradient of this node: what compression leaves out is kept, what a round took is settled.

Error feedback (Seide et al. 2014; Karimireddy et al., arXiv 1901.09847): with u = residual + (start - local) the
node sends D(E(u)); when a round has taken it, u - D(E(u)) stays as the residual. What a round did not take, all
of it or some slices, simply stays in u.

Missed rounds: what was trained from an older model says less about the newer one. After the m-th fold in a row that
took nothing of us, u weighs w(m) of what it was: w(m) = 2^(1 - m) for 1 <= m <= stale_rounds, and 0 beyond. So the first
missed round costs nothing. u is one vector: what joins it between two missed rounds halves with it from then on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from protocol.codec import Codec
from protocol.limits import CHUNK_VALUES
from protocol.types import Part


class PseudoGradient:
    """u, and its encoding. `shared` and `snapshot` are the vectors that the trainer also sees."""

    def __init__(
        self,
        shared: NDArray[np.float32],
        snapshot: NDArray[np.float32],
        codec: Codec,
        *,
        residual_decay: float,
        stale_rounds: int = 8,
    ) -> None:
        self._shared = shared
        self._snapshot = snapshot
        self._codec = codec
        self._decay = np.float32(residual_decay)
        self._stale_rounds = stale_rounds
        self.residual: NDArray[np.float32] = np.zeros(shared.size, np.float32)
        self.payload = b""
        self.pending = False  # a snapshot is inside u, and the trainer has not merged since

    def expect_snapshot(self) -> None:
        """Before the trainer overwrites a snapshot that no round has taken: take it out of u again."""
        if self.pending:
            self._add(-1)
            self.pending = False

    def take_snapshot(self) -> None:
        """After the trainer wrote a snapshot: u += start - local, and encode u."""
        self._add(1)
        self.pending = True
        self.encode()

    def encode(self) -> None:
        """What a round may take now."""
        self.payload = self._codec.encode(self.residual)

    def before_fold(self) -> None:
        """Without a snapshot, the trainer moves by what the fold moves: remember where it started."""
        if not self.pending:
            self._snapshot[:] = self._shared

    def settle(self, parts: Sequence[Part], *, missed: int = 0) -> None:
        """After a fold: take out of u what these parts, those that hold our contribution, have taken of it.

        `missed`: so many folds in a row, with this one, have taken nothing of what we held.
        The trainer now merges from its snapshot, if one is in u: what u weighs no longer concerns it."""
        assert not (parts and missed)
        for part in parts:
            start, stop = self._codec.encoded_bytes(part.start), self._codec.encoded_bytes(part.stop)
            assert part.start % CHUNK_VALUES == 0
            for at, sent in self._codec.decode_chunks(memoryview(self.payload)[start:stop], part.stop - part.start):
                left = self.residual[part.start + at : part.start + at + sent.size]
                left -= sent
                if self._decay != 1:
                    left *= self._decay
        if parts:
            self.payload = b""
        self.pending = False
        if missed > self._stale_rounds:
            self.forget()
        elif missed > 1:
            self.residual *= np.float32(0.5)
            self.payload = b""  # it says twice as much as is left

    def forget(self) -> None:
        """Hold nothing back: u is zero. What a snapshot had brought is gone too."""
        self.residual.fill(0)
        self.payload = b""
        self.pending = False

    def load(self, values: NDArray[np.float32]) -> None:
        """Hold back what an earlier life of this node had saved; no trainer knows of it."""
        self.residual[:] = values
        self.payload = b""
        self.pending = False

    def trainer_restarted(self) -> None:
        """A new trainer starts from the shared state; what the old one had brought stays in u and in its encoding."""
        self.pending = False

    def _add(self, sign: int) -> None:
        """u += sign * (start - local), in pieces: a whole difference would be one more copy of the model."""
        room = np.empty(min(CHUNK_VALUES, self.residual.size), np.float32)
        for start in range(0, self.residual.size, CHUNK_VALUES):
            piece = slice(start, min(start + CHUNK_VALUES, self.residual.size))
            moved = room[: piece.stop - piece.start]
            np.subtract(self._shared[piece], self._snapshot[piece], out=moved)
            if sign > 0:
                self.residual[piece] += moved
            else:
                self.residual[piece] -= moved
