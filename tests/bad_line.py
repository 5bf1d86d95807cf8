"""A line that is slow, late and lossy, in user space, where TCP has seen to it that nothing is missing: a lost packet is a
pause, and whatever comes behind it waits. `make chaos PART=lines` has lines that really lose packets."""

import asyncio
import socket
from random import Random

SEGMENT_BYTES = 1400
RETRANSMIT_SECONDS = 0.2  # what Linux waits at least before it sends a segment again
QUEUE_BYTES = 8192  # of a line that is full: what is more waits with whoever sends it


class Line:
    """A line to a port of this machine: every segment takes its time, and none overtakes another."""

    def __init__(self, *, round_trip, jitter, loss, bytes_per_second, seed=7):
        self._one_way = round_trip / 2
        self._jitter = jitter
        self._loss = loss
        self._bytes_per_second = bytes_per_second
        self._luck = Random(seed)
        self.lost = 0

    async def lead(self, host, port):
        """To there; tells its own port."""
        self._there = (host, port)
        self._server = await asyncio.start_server(self._meet, host, 0)
        return self._server.sockets[0].getsockname()[1]

    def close(self):
        self._server.close()

    async def _meet(self, reader, writer):
        there = socket.socket()
        there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, QUEUE_BYTES)
        there.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_BYTES)
        there.setblocking(False)
        await asyncio.get_running_loop().sock_connect(there, self._there)
        inner_reader, inner_writer = await asyncio.open_connection(sock=there, limit=SEGMENT_BYTES)
        await asyncio.gather(self._pass(reader, inner_writer), self._pass(inner_reader, writer))

    async def _pass(self, reader, writer):
        clock, under_way, sent_at, due = asyncio.get_running_loop().time, asyncio.Queue(), 0.0, 0.0
        arriving = asyncio.create_task(self._arrive(under_way, writer))
        try:
            while data := await reader.read(SEGMENT_BYTES):
                sent_at = max(sent_at, clock()) + len(data) / self._bytes_per_second
                late = self._one_way * (1 + self._jitter * self._luck.random())
                if self._luck.random() < self._loss:
                    self.lost += 1
                    late += 2 * self._one_way + RETRANSMIT_SECONDS
                due = max(due, sent_at + late)
                under_way.put_nowait((due, data))
                await asyncio.sleep(sent_at - clock())
        except ConnectionError:
            pass
        under_way.put_nowait((due, b""))
        await arriving

    async def _arrive(self, under_way, writer):
        try:
            while True:
                due, data = await under_way.get()
                await asyncio.sleep(due - asyncio.get_running_loop().time())
                if not data:
                    break
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        writer.close()
