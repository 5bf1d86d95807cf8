"""Whose call is served next: in whole rounds of the event loop, without a door."""

import asyncio

from coordinator.turns import Turns


class Queue:
    """Turns that come only when the test says so."""

    def __init__(self):
        self.turns, self.served = Turns(1e-6), []

    async def call(self, name, number):
        task = asyncio.create_task(self._call(name, number))
        await asyncio.sleep(0)
        return task

    async def _call(self, name, number):
        await self.turns.wait(number)
        self.served.append(name)

    async def next(self):
        self.turns._go_on()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return self.served[-1]


async def test_who_has_called_least_goes_first_however_many_stand_there():
    queue = Queue()
    waiting = [await queue.call(f"hostile {number}", number) for number in range(256)]
    assert queue.served == ["hostile 0"]  # nobody was there before
    waiting.append(await queue.call("honest", 1))
    assert [await queue.next() for _ in range(3)] == ["hostile 1", "honest", "hostile 2"]
    for task in waiting:
        task.cancel()


async def test_a_call_that_has_ended_takes_no_turn():
    queue = Queue()
    await queue.call("first", 1)
    gone, _ = await queue.call("gone", 1), await queue.call("last", 1)
    gone.cancel()
    await asyncio.sleep(0)
    assert await queue.next() == "last"
    queue.turns._go_on()
    await queue.call("later", 9)
    assert queue.served[-1] == "later"  # at once: nobody waits


async def test_what_costs_more_keeps_the_next_waiting_for_longer():
    turns, loop = Turns(100.0), asyncio.get_running_loop()
    began = loop.time()
    await turns.wait(1, cost=6.0)
    await turns.wait(1)
    assert loop.time() - began >= 0.06
