"""make schema: schemathesis asks the page whatever its OpenAPI description allows, and all that it does not."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from coordinator import web
from tests.edges.test_web import FakeSource, a_row

SECONDS_MAX = 60


async def main() -> int:
    page = await web.serve(FakeSource(rows=[a_row(number) for number in range(1, 40)]), host="127.0.0.1", port=0)
    try:
        description = f"http://127.0.0.1:{page.port}/api/v1/openapi.json"
        words = ("run", description, "--checks", "all", "--max-time", str(SECONDS_MAX), "--seed", "7", *sys.argv[1:])
        program = Path(sys.executable).with_name("schemathesis")
        return (await asyncio.to_thread(subprocess.run, [program, *words], check=False)).returncode
    finally:
        await page.stop()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
