"""Honest nodes beside a flood: each says a heartbeat four times a second; every answer's time is a line."""

from __future__ import annotations

import asyncio
import json
import sys
import time

from node.link import Beat, Door, Link
from protocol.errors import Refused
from protocol.identity import Key

EVERY_SECONDS = 0.25


async def node(door: Door, invite: str) -> None:
    link = Link(door, key=Key.generate(), transport_key=Key.generate())
    await link.open(life=1, invite=invite)
    print("in", flush=True)
    while True:
        began, good = time.time(), 1
        try:
            await link.heartbeat(Beat("waiting"))
        except Refused:
            good = 0
        ended = time.time()
        print(began, ended - began, good, flush=True)
        await asyncio.sleep(max(0.0, EVERY_SECONDS - (ended - began)))


async def main() -> None:
    told = json.loads(sys.argv[1])
    door = Door((f"127.0.0.1:{told['door']}",), told["fingerprint"], told["run"])
    async with asyncio.TaskGroup() as nodes:
        for invite in told["invites"]:
            nodes.create_task(node(door, invite))


if __name__ == "__main__":
    asyncio.run(main())
