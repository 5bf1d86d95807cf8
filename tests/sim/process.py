"""Something that runs, until it is killed or stands still: what was meant for a former life never arrives."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.sim.world import World


class Process:
    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.alive = False
        self.frozen = False
        self.life = 0
        self.clock_offset = 0.0  # its clock is this much ahead of the world's
        self._stands_since: float | None = None
        self._held: list[tuple[int | None, Callable[[], None]]] = []

    @property
    def awake(self) -> bool:
        return self.alive and not self.frozen

    @property
    def clock(self) -> float:
        return self.world.now + self.clock_offset

    def begin(self) -> None:
        self.alive = True
        self.life += 1

    def kill(self) -> None:
        self.alive = self.frozen = False
        self.life += 1
        self._stands_since = None
        self._held.clear()

    def freeze(self, *, clock_stands: bool) -> None:
        if self.awake:
            self.frozen = True
            self._stands_since = self.world.now if clock_stands else None

    def thaw(self) -> None:
        """Everything that has come meanwhile arrives at once."""
        if not self.frozen:
            return
        self.frozen = False
        if self._stands_since is not None:
            self.clock_offset -= self.world.now - self._stands_since
        held, self._held = self._held, []
        for life, action in held:
            self.take(action, life)

    def take(self, action: Callable[[], None], life: int | None = None) -> None:
        if not self.alive or (life is not None and life != self.life):
            return
        if self.frozen:
            self._held.append((life, action))
        else:
            action()

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        life = self.life
        self.world.at(seconds, lambda: self.take(action, life))
