"""What is flooded: the real door behind its gate, with the real machine, store and blobs, and the real page; no model.

The gate takes 127.x.y.z for the public address 11.x.y.z, so that loopback has many networks; if its callers are scattered, each
connection for one of a network of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

from coordinator import gate, web
from tests.edges.test_service import a_world
from tests.edges.test_web import FakeSource


async def main(invites: int, *, scattered: bool) -> None:
    admit, numbers = gate.Gate.admit, itertools.count()

    def come(self, host, outer):
        number = next(numbers)
        return admit(self, f"11.{number >> 8}.{number & 255}.1" if scattered else host.replace("127.", "11.", 1), outer)

    gate.Gate.admit = come
    with tempfile.TemporaryDirectory() as folder:
        async with a_world(Path(folder)) as world:
            page = await web.serve(FakeSource(), host="127.0.0.1", port=0)
            told = {
                "pid": os.getpid(),
                "door": world.server.port,
                "page": page.port,
                "certificate": str(world.desk.folder / "tls.pem"),
                "fingerprint": world.fingerprint,
                "run": world.desk.run,
                "blob": world.desk.checkpoint.blob.digest,
                "invites": [world.invite() for _ in range(invites)],
            }
            print(json.dumps(told), flush=True)
            await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
            refused = {"gate": world.server.gate.refused, "calls": world.service.refusals}
            print(json.dumps(refused), file=sys.stderr, flush=True)
            await page.stop()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), scattered="--scattered" in sys.argv))
