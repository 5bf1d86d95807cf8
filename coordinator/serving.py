"""A coordinator in the foreground: its log, what it says when it is up, and how Ctrl-C stops it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.check import memory_row
from coordinator.output import rows_text, to_json
from coordinator.reach import spelled
from protocol import console
from protocol.errors import Exit

if TYPE_CHECKING:
    from coordinator.folder import RunFolder
    from protocol.address import Address
    from protocol.runspec import RunSpec
    from protocol.types import Manifest


class Stopper:
    """Set once when the researcher asks to stop. Asked again, the process ends at once."""

    def __init__(self) -> None:
        self.polite = asyncio.Event()

    def ask(self) -> None:
        if self.polite.is_set():
            os._exit(Exit.INTERRUPTED.value)  # the kernel ends our children with us
        self.polite.set()
        import structlog

        structlog.get_logger().info("Stopping; Ctrl-C again stops now")


async def serve(folder: RunFolder, spec: RunSpec, *, as_json: bool, named: Path | None) -> int:
    stopper = Stopper()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stopper.ask)
    from coordinator.engine import run

    def ready(ports: Mapping[str, int], manifest: Manifest) -> None:
        from coordinator.plan import plan

        planned = vars(plan(spec, parameters=manifest.parameters, vocabulary=manifest.vocabulary, sequences=0))
        rows = [*_ready_rows(spec, ports, named), memory_row(planned)]
        print(to_json({"run": spec.run.name, **ports}) if as_json else rows_text(rows), flush=True)

    return await run(folder, stopper=stopper, on_ready=ready)


def _ready_rows(spec: RunSpec, ports: Mapping[str, int], named: Path | None) -> list[tuple[str, str]]:
    from protocol import address

    def at(text: str, port: int) -> Address:
        found = address.parse(text)
        assert found is not None
        return address.Address(found.host, port)

    page = at(spec.coordinator.http, ports["http"])
    host = page.host if spelled(page.host) not in ("0.0.0.0", "::") else "127.0.0.1"  # noqa: S104
    elsewhere = f" --run {console.printable(str(named))}" if named is not None else ""
    return [
        ("run", f"{spec.run.name} is up; Ctrl-C stops it"),
        ("nodes", f"{at(spec.coordinator.listen, ports['grpc'])} and {at(spec.coordinator.p2p, ports['p2p'])}"),
        ("dashboard", f"http://{address.Address(host, page.port)}"),
        ("invite", f"barnraise-coordinator invite create --uses 50 --expires 7d{elsewhere}"),
    ]


def configure_log(*, as_json: bool) -> None:
    """Sentences on stderr, each with its time; or JSON for a machine."""
    import structlog

    if as_json:
        stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
        form: list[Any] = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        stamp = structlog.processors.TimeStamper(fmt="%Y-%m-%dT%H:%M:%SZ", utc=True)
        form = [structlog.processors.format_exc_info, _sentence]
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, structlog.processors.add_log_level, stamp, *form],
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )


def _sentence(_logger: object, level: str, event: dict[str, Any]) -> str:
    trace = event.pop("exception", None)
    words = [event.pop("timestamp"), "" if level == "info" else f"{level}:", str(event.pop("event"))]
    event.pop("level", None)
    line = console.printable(" ".join(filter(None, [*words, *(f"{key}={value}" for key, value in event.items())])))
    return line if trace is None else f"{line}\n{trace}"
