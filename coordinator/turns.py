"""Turns: whose call is served next, where more come than are to be served in a second. Knows no call."""

from __future__ import annotations

import asyncio
import heapq
import itertools


class Turns:
    """One after the other: of those who wait the one with the lowest number, then who came first.

    Who waits costs nothing. So calls are taken in faster than they are served, and stand here, where they can be overtaken."""

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._waiting: list[tuple[float, int, float, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()
        self._taken = False

    async def wait(self, number: float, *, cost: float = 1.0) -> None:
        """Returns when it is its turn: at once where nobody's is. The next one's comes when so many could have been served."""
        if not self._taken:
            self._take(cost)
            return
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (number, next(self._arrivals), cost, turn))
        await turn

    def _take(self, cost: float) -> None:
        self._taken = True
        asyncio.get_running_loop().call_later(cost / self._per_second, self._go_on)

    def _go_on(self) -> None:
        self._taken = False
        while self._waiting and not self._taken:
            _, _, cost, turn = heapq.heappop(self._waiting)
            if not turn.done():  # else its call has ended meanwhile
                turn.set_result(None)
                self._take(cost)
