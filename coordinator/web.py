"""The coordinator's page: a live view of the run over HTTP, for people (HTML) and programs (JSON, Prometheus).

Read-only: nothing here changes the run. It takes no body, sets no cookie, serves files from a table in
memory, and bounds connections, subscribers and the time that a request may take to arrive.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import ipaddress
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from socket import SO_SNDBUF, SOL_SOCKET
from typing import Any, Final, Protocol

from aiohttp import hdrs, web
from aiohttp.http_parser import HttpRequestParser, HttpRequestParserPy
from jinja2 import DictLoader, Environment, StrictUndefined
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from coordinator import view as views
from protocol.errors import Code, Refused

CONNECTIONS_MAX = 512  # a few file descriptors of the process stay free for nodes
SUBSCRIBERS_MAX = 200  # each holds at most one frame and SEND_BUFFER_BYTES
REQUEST_SECONDS_MAX = 10.0  # of silence, or of a request that does not become whole
WRITE_SECONDS_MAX = 10.0  # a reader that takes nothing for so long is dropped
CHANGE_SECONDS_MIN = 0.5  # between two frames: people read no faster
REFRESH_SECONDS = 5.0  # "last seen" moves without any change
SEND_BUFFER_BYTES = 256 << 10  # of the kernel's memory for one slow reader
LINE_BYTES_MAX = 4096  # our longest URL has under 100
HEADERS_MAX = 64
BODY_BYTES_MAX = 1 << 20
ROWS_DEFAULT = 600  # more than the pixels of the chart at 320 px, fewer than at 4k; nobody sees a difference
ROWS_MAX = 5000

_SECURITY: Final = {
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Server": "barnraise",
}
_FOLDER: Final = Path(__file__).with_name("web")
_FILES: Final = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "uPlot.css": "text/css",
    "uPlot.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Source(Protocol):
    """Where the page gets the run from: the coordinator's engine, or a fake in a test."""

    def view(self) -> Mapping[str, Any]:
        """The run now. The page shows only the fields that coordinator/view.py names."""

    async def changed(self) -> None:
        """Return when the view has changed since this was called."""

    def history(self, limit: int) -> Sequence[Mapping[str, Any]]:
        """Rows of committed rounds, oldest first, over the whole run; about `limit`, more does no harm."""


class Server:
    """The page on a socket. Whoever starts it must `stop` it."""

    def __init__(self, runner: web.AppRunner, server: asyncio.Server, sweep: asyncio.Task[None]) -> None:
        self._runner = runner
        self._server = server
        self._sweep = sweep

    @property
    def port(self) -> int:
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        self._server.close()
        await _cancel(self._sweep)
        await self._runner.cleanup()


async def serve(source: Source, *, host: str, port: int, hosts: Collection[str] = ()) -> Server:
    """Serve the page. `hosts` are the names, besides localhost and plain addresses, that it answers to."""
    assert HttpRequestParser is not HttpRequestParserPy, "llhttp reads requests; aiohttp's own parser is more lenient"
    app = create_app(source, hosts=hosts)
    runner = web.AppRunner(
        app,
        access_log=None,
        handle_signals=False,
        handler_cancellation=True,
        lingering_time=1.0,
        max_line_size=LINE_BYTES_MAX,
        max_field_size=LINE_BYTES_MAX,
        max_headers=HEADERS_MAX,
        shutdown_timeout=2.0,
    )
    await runner.setup()
    handlers = runner.server
    assert handlers is not None

    def accept() -> asyncio.BaseProtocol:
        return handlers() if len(handlers.connections) < CONNECTIONS_MAX else _Full()

    try:
        server = await asyncio.get_running_loop().create_server(accept, host, port)
    except OSError as error:
        await runner.cleanup()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise Refused(Code.PORT_IN_USE, f"the page cannot listen on {host}:{port}") from error
        raise
    return Server(runner, server, asyncio.create_task(_close_the_silent(handlers, app[_PAGE])))


def create_app(source: Source, *, hosts: Collection[str] = ()) -> web.Application:
    app = web.Application(middlewares=[_guard], client_max_size=BODY_BYTES_MAX)
    page = _Page(source, frozenset(host.lower() for host in hosts))
    app[_PAGE] = page
    app.router.add_get("/", _index)
    app.router.add_get("/static/{name}", _static)
    app.router.add_get("/api/v1/status", _status)
    app.router.add_get("/api/v1/history", _history)
    app.router.add_get("/api/v1/events", _events, allow_head=False)
    app.router.add_get("/api/v1/openapi.json", _openapi)
    app.router.add_get("/metrics", _metrics)
    app.router.add_get("/healthz", _healthz)
    app.on_response_prepare.append(_secure)
    app.cleanup_ctx.append(_publishing)
    app.on_shutdown.append(_hang_up)
    return app


class _Page:
    """What the handlers share: the source, the newest frame, and who listens to it."""

    def __init__(self, source: Source, hosts: frozenset[str]) -> None:
        self.source = source
        self.hosts = hosts
        self.files = {name: (_FOLDER / name).read_bytes() for name in _FILES}
        self.openapi = (_FOLDER / "openapi.json").read_bytes()
        self.template = _environment((_FOLDER / "index.html").read_text("utf-8")).get_template("index.html")
        self.subscribers = 0
        self.busy: set[object] = set()  # connections in the middle of a request
        self.quiet_since: dict[object, float] = {}  # the others, and since when
        self.registry = CollectorRegistry()
        self.registry.register(_RunMetrics(self))
        self.refused = Counter("barnraise_page_refused", "Requests refused.", ["reason"], registry=self.registry)
        self._history: tuple[int, int, bytes] | None = None  # version, limit, JSON
        self._version = 0
        self._frame = b""
        self._closing = False
        self._news = asyncio.Condition()

    def current(self) -> dict[str, Any]:
        return views.public(self.source.view())

    def rows(self, limit: int) -> list[dict[str, Any]]:
        return views.thinned(self.source.history(limit), limit=limit)

    def history(self, limit: int) -> bytes:
        """The same bytes for every viewer until the run changes."""
        if self._history is None or self._history[:2] != (self._version, limit):
            rows = self.rows(limit)
            body = _json({"rows": rows, "rounds_per_hour": views.rounds_per_hour(rows)})
            self._history = (self._version, limit, body)
        return self._history[2]

    async def publish(self) -> None:
        """Follow the source, and make one frame for all subscribers of whatever is newest."""
        change = asyncio.ensure_future(self.source.changed())
        try:
            while True:
                await asyncio.wait({change}, timeout=REFRESH_SECONDS)
                if change.done():
                    change.result()
                    change = asyncio.ensure_future(self.source.changed())
                async with self._news:
                    self._version += 1
                    self._frame = b"event: view\ndata: " + _json(self.current()) + b"\n\n" if self.subscribers else b""
                    self._news.notify_all()
                await asyncio.sleep(CHANGE_SECONDS_MIN)
        finally:
            await _cancel(change)

    async def frames(self) -> AsyncIterator[bytes]:
        """The view now, then the newest one at each change; a slow reader skips, it never queues."""
        yield b"retry: 3000\nevent: view\ndata: " + _json(self.current()) + b"\n\n"
        seen = self._version
        while True:
            async with self._news:
                await self._news.wait_for(lambda: self._closing or (self._version != seen and self._frame != b""))  # noqa: B023
                if self._closing:
                    return
                seen, frame = self._version, self._frame
            yield frame

    async def close(self) -> None:
        async with self._news:
            self._closing = True
            self._news.notify_all()


_PAGE: Final = web.AppKey("page", _Page)


async def _index(request: web.Request) -> web.StreamResponse:
    page = request.app[_PAGE]
    rows, current = page.rows(ROWS_DEFAULT), page.current()
    html = page.template.render(
        current,
        rounds_per_hour=views.rounds_per_hour(rows),
        heldout_points=views.polyline(rows, "heldout", width=640, height=200),
        train_points=views.polyline(rows, "train", width=640, height=200),
        turns=views.turns(rows, current["rollbacks"], width=640),
    )
    return _compressed(web.Response(text=html, content_type="text/html"))


async def _static(request: web.Request) -> web.StreamResponse:
    name = request.match_info["name"]
    body = request.app[_PAGE].files.get(name)
    if body is None:
        raise web.HTTPNotFound
    tag = hashlib.sha256(body).hexdigest()[:16]
    if any(known.value == tag for known in request.if_none_match or ()):
        return web.Response(status=304, headers={hdrs.ETAG: f'"{tag}"'})
    headers = {hdrs.ETAG: f'"{tag}"', hdrs.CACHE_CONTROL: "no-cache"}
    response = web.Response(body=body, content_type=_FILES[name], charset="utf-8", headers=headers)
    return _compressed(response)


async def _status(request: web.Request) -> web.StreamResponse:
    return _compressed(_json_response(_json(request.app[_PAGE].current())))


async def _history(request: web.Request) -> web.StreamResponse:
    asked = request.query.get("limit", str(ROWS_DEFAULT))
    if not (asked.isascii() and asked.isdecimal() and len(asked) <= 4 and 1 <= int(asked) <= ROWS_MAX):
        raise web.HTTPBadRequest(text=f"limit: a whole number from 1 to {ROWS_MAX} is wanted\n")
    return _compressed(_json_response(request.app[_PAGE].history(int(asked))))


async def _events(request: web.Request) -> web.StreamResponse:
    page = request.app[_PAGE]
    if page.subscribers >= SUBSCRIBERS_MAX:
        page.refused.labels("subscribers").inc()
        raise web.HTTPServiceUnavailable(text="too many viewers; try again soon\n", headers={hdrs.RETRY_AFTER: "30"})
    page.subscribers += 1
    try:
        response = web.StreamResponse(headers={hdrs.CACHE_CONTROL: "no-store", "X-Accel-Buffering": "no"})
        response.content_type = "text/event-stream"
        transport = request.transport
        if transport is not None:
            transport.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_SNDBUF, SEND_BUFFER_BYTES)
        await response.prepare(request)
        async for frame in page.frames():
            try:
                async with asyncio.timeout(WRITE_SECONDS_MAX):
                    await response.write(frame)
            except TimeoutError:
                page.refused.labels("slow").inc()
                if transport is not None:
                    transport.abort()
                break
            except ConnectionError:
                break  # the reader has gone
        return response
    finally:
        page.subscribers -= 1


async def _openapi(request: web.Request) -> web.StreamResponse:
    return _compressed(_json_response(request.app[_PAGE].openapi))


async def _metrics(request: web.Request) -> web.StreamResponse:
    body = generate_latest(request.app[_PAGE].registry)
    return web.Response(body=body, headers={hdrs.CONTENT_TYPE: CONTENT_TYPE_LATEST, hdrs.CACHE_CONTROL: "no-store"})


async def _healthz(request: web.Request) -> web.StreamResponse:
    return web.Response(text="ok\n", headers={hdrs.CACHE_CONTROL: "no-store"})


class _RunMetrics(Collector):
    """The view as Prometheus gauges, read when they are asked for. Nodes are named by their id, not by their wish."""

    def __init__(self, page: _Page) -> None:
        self._page = page

    def collect(self) -> Iterator[Metric]:
        view = self._page.current()
        for name, text, value in (
            ("barnraise_round", "Newest certified round.", view["run"]["round"]),
            ("barnraise_tokens", "Tokens in certified rounds.", view["run"]["tokens"]),
            ("barnraise_parameters", "Parameters of the model.", view["run"]["parameters"]),
            ("barnraise_round_bytes", "Bytes that the last round moved.", view["bytes"]["per_round"]),
            ("barnraise_moved_bytes", "Bytes that all rounds moved.", view["bytes"]["total"]),
            ("barnraise_nodes", "Nodes known to the coordinator.", view["nodes_total"]),
            ("barnraise_nodes_rostered", "Nodes on the roster.", view["nodes_rostered"]),
            ("barnraise_page_subscribers", "Open event streams.", self._page.subscribers),
        ):
            if value is not None:
                yield GaugeMetricFamily(name, text, value)
        loss = GaugeMetricFamily("barnraise_loss", "Newest loss.", labels=["split"])
        for split in ("heldout", "train"):
            if view["loss"][split] is not None:
                loss.add_metric([split], view["loss"][split])
        yield loss
        speed = GaugeMetricFamily("barnraise_node_tokens_per_second", "Training speed of a node.", labels=["node"])
        for node in view["nodes"]:
            if node["tokens_per_second"] is not None:
                speed.add_metric([node["node"]], node["tokens_per_second"])
        yield speed


@web.middleware
async def _guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse other names (DNS rebinding) and bodies; note which connections are at work."""
    page = request.app[_PAGE]
    if not _answers_to(request.headers.get(hdrs.HOST, ""), page.hosts):
        page.refused.labels("host").inc()
        raise web.HTTPMisdirectedRequest(text="this server does not answer to that name\n")
    if (request.content_length or 0) > BODY_BYTES_MAX:
        page.refused.labels("body").inc()
        raise web.HTTPRequestEntityTooLarge(BODY_BYTES_MAX, request.content_length or 0)
    page.busy.add(request.protocol)
    try:
        return await handler(request)
    finally:
        page.busy.discard(request.protocol)
        page.quiet_since.pop(request.protocol, None)


def _answers_to(header: str, hosts: frozenset[str]) -> bool:
    """A page on another site can point its own name at us; it cannot make a browser send ours or a bare address."""
    host = header.lower()
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0].removesuffix(".")
    if name == "localhost" or name in hosts:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _secure(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_SECURITY)


async def _publishing(app: web.Application) -> AsyncIterator[None]:
    task = asyncio.create_task(app[_PAGE].publish())
    yield
    await _cancel(task)


async def _hang_up(app: web.Application) -> None:
    await app[_PAGE].close()


async def _close_the_silent(handlers: web.Server, page: _Page) -> None:
    """Close connections that send no whole request in time; aiohttp's own timeout starts after the first one."""
    clock = asyncio.get_running_loop().time
    while True:
        await asyncio.sleep(REQUEST_SECONDS_MAX / 10)
        now = clock()
        quiet = [handler for handler in handlers.connections if handler not in page.busy]
        page.quiet_since = {handler: page.quiet_since.get(handler, now) for handler in quiet}
        for handler in quiet:
            if now - page.quiet_since[handler] > REQUEST_SECONDS_MAX:
                handler.force_close()


class _Full(asyncio.Protocol):
    """Hangs up at once: the page has as many connections as it takes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.abort()


def _environment(index: str) -> Environment:
    environment = Environment(
        loader=DictLoader({"index.html": index}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for show in (views.compact, views.whole, views.decimal, views.pace, views.percent, views.ago, views.iso):
        environment.filters[show.__name__] = show
    environment.filters["turned"] = views.turned
    return environment


def _json(value: object) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False).encode()


def _json_response(body: bytes) -> web.Response:
    headers = {hdrs.CACHE_CONTROL: "no-store"}
    return web.Response(body=body, content_type="application/json", charset="utf-8", headers=headers)


def _compressed(response: web.Response) -> web.Response:
    response.headers[hdrs.VARY] = hdrs.ACCEPT_ENCODING
    response.enable_compression()
    return response


async def _cancel(task: asyncio.Future[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
