"""The page against a real HTTP server on loopback, with a source that sends the worst it can."""

import asyncio
import contextlib
import gzip
import json
import re
import socket
from html.parser import HTMLParser

import aiohttp
import pytest

from coordinator import view as views
from coordinator import web
from protocol.errors import Code, Refused
from protocol.types import Head, Rollback

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
SHOWN = HOSTILE[:40]
NAN, INFINITY = float("nan"), float("inf")


def a_node(**changes):
    node = {
        "name": "brave-otter",
        "node": "7f3a9c21",
        "activity": "training",
        "round": 3,
        "tokens_per_second": 1910.0,
        "credit_tokens": 4096,
        "busy_share": 0.9,
        "last_seen_s": 1,
        "rostered": True,
        "held": "1 strike; left out until round 22",
    }
    return node | changes


def a_view(**changes):
    view = {
        "run": {"name": "demo", "title": "A demo", "round": 3, "rounds_goal": 9, "tokens": 1_234_567}
        | {"state": "Three nodes train.", "started_ms": 1.7e12, "parameters": 1_000_000, "codec": "int4"},
        "loss": {"heldout": 2.5, "heldout_first": 5.5, "train": 2.4},
        "nodes": [a_node()],
        "bytes": {"per_round": 1_400_000, "total": 4_200_000, "per_parameter_per_round": 1.4},
        "events": [{"ms": 1.7e12, "text": "Round 3 agreed."}],
        "rollbacks": [{"number": 1, "from": 9, "to": 2, "reason": "Loss jumped.", "ms": 1.7e12}],
        "sample": "ROMEO: What say",
        "head": "ab" * 32,
    }
    return view | changes


def a_row(number, **changes):
    row = {
        "round": number,
        "tokens": 1000 * number,
        "heldout": 5 - number * 1e-5,
        "train": 4.0,
        "ms": 1.7e12 + 1000 * number,
    }
    return row | {"nodes": 3, "bytes": 10} | changes


class FakeSource:
    def __init__(self, view=None, rows=()):
        self.now = view or a_view()
        self.rows = rows
        self.change = asyncio.Event()

    def view(self):
        return self.now

    async def changed(self):
        await self.change.wait()
        self.change.clear()

    def history(self, limit):
        return self.rows


@contextlib.asynccontextmanager
async def served(source, **options):
    server = await web.serve(source, host="127.0.0.1", port=0, **options)
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}", auto_decompress=True) as client:
            client.port = server.port
            yield client
    finally:
        await server.stop()


async def raw(port, request):
    """Bytes in, bytes out, until the server hangs up: no client of ours in between to make the request proper."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


def close(path, host="localhost"):
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()


async def frames(response):
    """The data of each event of a stream."""
    async for line in response.content:
        if line.startswith(b"data: "):
            yield json.loads(line.removeprefix(b"data: "))


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.extend(attrs)

    def handle_data(self, data):
        self.text.append(data)


def parsed(html):
    elements = Elements()
    elements.feed(html)
    return elements


async def test_the_page_shows_the_run_before_any_script_runs():
    async with served(FakeSource(rows=[a_row(number) for number in range(4)])) as client:
        response = await client.get("/")
        page = parsed(await response.text())
    text = "".join(page.text)
    for wanted in (
        "A demo",
        "Three nodes train.",
        "2.500",
        "1.23 M",
        "brave-otter",
        "1,910",
        "Round 3 agreed.",
        "Back from round 9 to 2.",
        "Loss jumped.",
        "ROMEO",
    ):
        assert wanted in text
    assert page.tags.count("polyline") == 2 and page.tags.count("line") == 1


async def test_a_rollback_is_marked_on_the_curve_at_the_last_row_that_it_left():
    rows = [a_row(number) for number in (0, 2, 4, 8)]
    back = [{"number": 2, "from": 8, "to": 8}, {"number": 1, "from": 9, "to": 5}, {"number": 1, "from": 1, "to": None}]
    assert views.turns(rows, back, width=100) == ["100.0", "50.0"]
    assert views.turns([], back, width=100) == views.turns(rows[:1], back, width=100) == []
    assert views.turned(back[0]) == "Round 8: a new roster, nothing undone."
    followed = Rollback("run", 3, Head(4, "a" * 64), Head(9, "b" * 64), "why", 5)
    assert views.rollback(followed) == {"number": 3, "from": 9, "to": 4, "reason": "why", "ms": 5}
    async with served(FakeSource(a_view(rollbacks=[views.rollback(followed)]))) as client:
        status = await (await client.get("/api/v1/status")).json()
    assert status["rollbacks"] == [views.rollback(followed)]


async def test_names_events_and_samples_are_shown_literally_and_never_become_markup():
    view = a_view(
        nodes=[a_node(name=HOSTILE, activity=HOSTILE, node=HOSTILE)],
        events=[{"ms": 1, "text": HOSTILE}],
        rollbacks=[{"number": HOSTILE, "from": HOSTILE, "to": HOSTILE, "reason": HOSTILE, "ms": HOSTILE}],
        sample=HOSTILE,
        head=HOSTILE,
    )
    view["run"] |= {"title": HOSTILE, "name": HOSTILE, "state": HOSTILE, "codec": HOSTILE}
    async with served(FakeSource(view)) as client:
        page = parsed(await (await client.get("/")).text())
        plain = parsed(await served_once(a_view()))
        metrics = await (await client.get("/metrics")).text()
    assert "".join(page.text).count(SHOWN) >= 6
    assert page.tags.count("script") == plain.tags.count("script") == 2
    assert page.tags.count("img") == plain.tags.count("img")
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert HOSTILE not in metrics


async def served_once(view):
    async with served(FakeSource(view)) as client:
        return await (await client.get("/")).text()


async def test_nothing_on_the_page_comes_from_another_machine_and_no_script_or_style_is_inline():
    html = await served_once(a_view())
    page = parsed(html)
    links = [value for name, value in page.attributes if name in ("src", "href")]
    assert links and all(re.fullmatch(r"/[^/].*", link) for link in links)
    assert not [name for name, _ in page.attributes if name == "style"]
    assert "<script>" not in html and "<style" not in html
    for name in ("page.js", "page.css", "index.html"):
        assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|eval\(", (web._FOLDER / name).read_text())


@pytest.mark.parametrize("path", ["/", "/api/v1/status", "/nothing", "/static/nothing", "/api/v1/history?limit=x"])
async def test_every_answer_carries_the_security_headers(path):
    async with served(FakeSource()) as client:
        headers = (await client.get(path)).headers
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Server"] == "barnraise"


async def test_numbers_that_are_not_finite_become_null_and_the_page_stays_whole():
    view = a_view(
        loss={"heldout": NAN, "heldout_first": INFINITY, "train": -INFINITY},
        nodes=[a_node(tokens_per_second=NAN, credit_tokens=10**400, last_seen_s=-5, round=-1)],
        events=[{"ms": NAN, "text": "x"}, {"ms": 1e300, "text": "y"}, {"ms": 1e17, "text": "z"}],
    )
    rows = [a_row(1), a_row(2, heldout=NAN, train=INFINITY, tokens=-INFINITY, ms=NAN), a_row(3, tokens=-7)]
    async with served(FakeSource(view, rows)) as client:
        status = await (await client.get("/api/v1/status")).text()
        history = await (await client.get("/api/v1/history")).text()
        page = await client.get("/")
        stream = await client.get("/api/v1/events")
        first = await anext(frames(stream))
    assert "NaN" not in status + history and "Infinity" not in status + history
    assert json.loads(status)["loss"] == {"heldout": None, "heldout_first": None, "train": None}
    assert first == json.loads(status)
    assert page.status == 200 and "brave-otter" in await page.text()


@pytest.mark.parametrize(
    "view", [{}, {"run": None, "nodes": None}, {"nodes": [{}], "events": [{}], "run": {"name": 3}}]
)
async def test_a_view_with_parts_missing_is_still_a_page(view):
    assert "<h1" in await served_once(view)


async def test_fields_that_the_page_does_not_name_never_leave():
    view = a_view(nodes=[a_node(address="10.1.2.3:4001", peer="12D3KooW")], secret="10.1.2.3")
    view["run"]["path"] = "10.1.2.3"
    async with served(FakeSource(view, [a_row(1, address="10.1.2.3")])) as client:
        answers = [
            await (await client.get(path)).text() for path in ("/", "/api/v1/status", "/api/v1/history", "/metrics")
        ]
    assert not [answer for answer in answers if "10.1.2.3" in answer or "12D3KooW" in answer]


async def test_a_long_history_is_thinned_over_the_whole_run():
    rows = [a_row(number, heldout=3.0 if number % 7 == 3 else None) for number in range(100_000)]
    async with served(FakeSource(rows=rows)) as client:
        response = await client.get("/api/v1/history", params={"limit": "500"})
        answer = await response.json()
        page = await (await client.get("/")).read()
    kept = answer["rows"]
    assert len(kept) == 500
    assert kept[0]["round"] < 200 and kept[-1]["round"] == 99_999
    assert all(row["heldout"] == 3.0 for row in kept)  # measured every seventh round, kept in every stretch
    assert answer["rounds_per_hour"] == pytest.approx(3600)
    assert len(page) < 64 << 10


@pytest.mark.parametrize("limit", ["0", "-1", "5001", "1e3", "", "٣", "9" * 4000])
async def test_a_limit_out_of_range_is_refused(limit):
    async with served(FakeSource(rows=[a_row(1)])) as client:
        assert (await client.get("/api/v1/history", params={"limit": limit})).status == 400


@pytest.mark.parametrize(
    "path",
    [
        "/static/..%2f..%2fetc/passwd",
        "/static/..%2fweb.py",
        "/static/../web.py",
        "/static/....//web.py",
        "/static/%2e%2e%2fweb.py",
        "/static/page.js%00.css",
        "/static//etc/passwd",
        "/static/index.html",
        "/static/",
        "/../coordinator/web.py",
    ],
)
async def test_only_the_files_of_the_table_are_served(path):
    async with served(FakeSource()) as client:
        answer = await raw(client.port, close(path))
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b"root:" not in answer and b"import" not in answer


async def test_a_static_file_is_sent_once_and_then_only_confirmed():
    async with served(FakeSource()) as client:
        first = await client.get("/static/page.js")
        again = await client.get("/static/page.js", headers={"If-None-Match": first.headers["ETag"]})
        assert first.content_type == "text/javascript" and b"EventSource" in await first.read()
        assert again.status == 304 and await again.read() == b""


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:1", 200),
        ("127.0.0.1", 200),
        ("[::1]:49301", 200),
        ("swarm.example:80", 200),
        ("SWARM.example.", 200),
        ("evil.example", 421),
        ("swarm.example.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("", 421),
    ],
)
async def test_the_page_answers_only_to_its_own_names(host, status):
    async with served(FakeSource(), hosts=["swarm.example"]) as client:
        answer = await raw(client.port, close("/api/v1/status", host))
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (close("/" + "a" * 100_000), b"400"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: 1\r\n" * 10_000 + b"\r\n", b"400"),
        (
            b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"400",
        ),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 9999999\r\n\r\n", b"413"),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", b"405"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"400"),
    ],
    ids=["url", "header", "headers", "smuggling", "body", "method", "two hosts", "tls"],
)
async def test_a_request_out_of_bounds_is_refused_and_the_page_goes_on(request_bytes, status):
    async with served(FakeSource()) as client:
        answer = b""
        with contextlib.suppress(ConnectionError):  # it may hang up before it has read everything
            answer = await raw(client.port, request_bytes)
        assert answer[:12] in (b"", b"HTTP/1.1 " + status, b"HTTP/1.0 " + status)
        assert (await client.get("/healthz")).status == 200


@pytest.mark.parametrize(
    "first",
    [
        b"POST /api/v1/status HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n",
        b"GET /api/v1/status HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n",
        b"GET /api/v1/status HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
    ids=["post", "get", "chunked"],
)
async def test_a_body_without_end_is_hung_up_on_and_takes_no_memory(monkeypatch, first):
    monkeypatch.setattr(web, "REQUEST_SECONDS_MAX", 0.5)
    async with served(FakeSource()) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        writer.write(first)
        ended = asyncio.create_task(reader.read())
        sent = 0
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(8):
                while not ended.done():
                    writer.write(b"400\r\n" + b"x" * 1024 + b"\r\n")
                    await writer.drain()
                    sent += 1024
                    await asyncio.sleep(0.005)
        assert ended.done() and sent < 8 << 20
        writer.close()
        assert (await client.get("/healthz")).status == 200


async def test_a_body_that_says_it_is_compressed_is_never_unpacked():
    packed = gzip.compress(bytes(1 << 20))
    async with served(FakeSource()) as client:
        for path in ("/api/v1/status", "/", "/metrics"):
            answer = await client.get(path, data=packed, headers={"Content-Encoding": "gzip"})
            assert answer.status == 200  # a body means nothing here
        huge = await client.get("/", data=gzip.compress(bytes(2 << 30 >> 8)) * 40, headers={"Content-Encoding": "gzip"})
        assert huge.status in (200, 413)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /%0d%0aX-Evil:%201 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"GET /api/v1/history?limit=5%0d%0aX-Evil:%201 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX-A: b\rX-Evil: 1\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.1\nHost: localhost\nX-Evil: 1\n\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX-A : b\r\nConnection: close\r\n\r\n",
    ],
    ids=["path", "query", "bare CR", "bare LF", "space before the colon"],
)
async def test_a_line_break_in_a_request_never_becomes_one_in_an_answer(request_bytes):
    async with served(FakeSource()) as client:
        answer = await raw(client.port, request_bytes)
        head = answer.partition(b"\r\n\r\n")[0].lower()
        assert b"\r\nx-evil" not in head
        assert re.match(rb"http/1.[01] (400|404) ", head)


def test_requests_are_read_by_llhttp():
    assert web.HttpRequestParser is not web.HttpRequestParserPy
    assert web.HttpRequestParser.__module__ == "aiohttp._http_parser"


async def test_a_stream_brings_the_view_at_once_and_at_each_change(monkeypatch):
    monkeypatch.setattr(web, "CHANGE_SECONDS_MIN", 0.01)
    source = FakeSource()
    async with served(source) as client:
        stream = frames(await client.get("/api/v1/events"))
        assert (await anext(stream))["run"]["round"] == 3
        for number in (4, 5):
            source.now = a_view(run=a_view()["run"] | {"round": number})
            source.change.set()
            assert (await asyncio.wait_for(anext(stream), 5))["run"]["round"] == number


async def test_a_view_that_only_ages_is_sent_again(monkeypatch):
    monkeypatch.setattr(web, "REFRESH_SECONDS", 0.05)
    monkeypatch.setattr(web, "CHANGE_SECONDS_MIN", 0.01)
    source = FakeSource()
    async with served(source) as client:
        stream = frames(await client.get("/api/v1/events"))
        assert (await anext(stream))["nodes"][0]["last_seen_s"] == 1
        source.now = a_view(nodes=[a_node(last_seen_s=6)])
        assert [await asyncio.wait_for(anext(stream), 5) for _ in range(2)][-1]["nodes"][0]["last_seen_s"] == 6


async def test_a_frame_stays_under_64_kib_however_many_nodes_there_are():
    long = "é" * 500
    view = a_view(
        nodes=[a_node(name=long, activity=long, node=long, held=long) for _ in range(10_000)],
        events=[{"ms": 1, "text": long} for _ in range(10_000)],
        rollbacks=[{"number": 1, "from": 9, "to": 2, "reason": long, "ms": 1} for _ in range(10_000)],
        sample=long * 100,
    )
    async with served(FakeSource(view)) as client:
        frame = await anext(frames(await client.get("/api/v1/events")))
    assert frame["nodes_total"] == 10_000 and len(frame["nodes"]) == views.NODES_SHOWN
    assert len(json.dumps(frame, ensure_ascii=False).encode()) < 64 << 10


async def test_viewers_beyond_the_cap_are_asked_to_come_again(monkeypatch):
    monkeypatch.setattr(web, "SUBSCRIBERS_MAX", 2)
    async with served(FakeSource()) as client:
        held = [await client.get("/api/v1/events") for _ in range(2)]
        refused = await client.get("/api/v1/events")
        assert refused.status == 503 and refused.headers["Retry-After"] == "30"
        for response in held:
            response.close()
        for _ in range(100):
            response = await client.get("/api/v1/events")
            if response.status == 200:
                break
            await asyncio.sleep(0.05)
        assert response.status == 200


async def test_a_reader_that_takes_nothing_is_dropped_and_the_others_see_on(monkeypatch):
    monkeypatch.setattr(web, "CHANGE_SECONDS_MIN", 0.001)
    monkeypatch.setattr(web, "REFRESH_SECONDS", 0.001)
    monkeypatch.setattr(web, "WRITE_SECONDS_MAX", 0.2)
    monkeypatch.setattr(web, "SEND_BUFFER_BYTES", 16 << 10)
    source = FakeSource(a_view(events=[{"ms": 1, "text": "x" * 240} for _ in range(40)]))
    async with served(source) as client:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", client.port))
        slow.sendall(close("/api/v1/events"))
        reading = frames(await client.get("/api/v1/events"))
        for _ in range(2000):
            await anext(reading)
            metrics = await (await client.get("/metrics")).text()
            if 'barnraise_page_refused_total{reason="slow"} 1.0' in metrics:
                break
        assert "barnraise_page_subscribers 1.0" in metrics
        slow.close()


async def test_a_connection_that_sends_no_whole_request_is_closed_in_time(monkeypatch):
    monkeypatch.setattr(web, "REQUEST_SECONDS_MAX", 0.3)
    async with served(FakeSource()) as client:
        assert await raw(client.port, b"") == b""
        assert await raw(client.port, b"GET / HTTP/1.1\r\nHost: local") == b""
        stream = frames(await client.get("/api/v1/events"))
        await anext(stream)
        await asyncio.sleep(0.6)  # a stream is a request at work, however long it lasts
        next_frame = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.1)
        assert not next_frame.done()
        next_frame.cancel()


async def test_connections_beyond_the_cap_are_hung_up(monkeypatch):
    monkeypatch.setattr(web, "CONNECTIONS_MAX", 3)
    async with served(FakeSource()) as client:
        held = [await asyncio.open_connection("127.0.0.1", client.port) for _ in range(3)]
        with contextlib.suppress(ConnectionError):
            assert await raw(client.port, close("/healthz")) == b""
        held[0][1].close()
        await held[0][1].wait_closed()
        await asyncio.sleep(0.05)
        assert b"ok" in await raw(client.port, close("/healthz"))
        for _, writer in held:
            writer.close()


async def test_metrics_name_the_run_in_the_prometheus_form():
    async with served(FakeSource()) as client:
        response = await client.get("/metrics")
        text = await response.text()
    assert response.headers["Content-Type"].startswith("text/plain")
    for line in ("barnraise_round 3.0", 'barnraise_loss{split="heldout"} 2.5', "barnraise_moved_bytes 4.2e+06"):
        assert line in text.splitlines()


async def test_openapi_describes_every_route_and_every_field():
    source = FakeSource(rows=[a_row(1), a_row(2)])
    async with served(source) as client:
        document = await (await client.get("/api/v1/openapi.json")).json()
        status = await (await client.get("/api/v1/status")).json()
        history = await (await client.get("/api/v1/history")).json()
    routes = {resource.canonical for resource in web.create_app(source).router.resources()}
    assert set(document["paths"]) == routes
    schemas = document["components"]["schemas"]
    served_objects = {"View": status, "History": history, "Run": status["run"], "Loss": status["loss"]}
    served_objects |= {"Node": status["nodes"][0], "Bytes": status["bytes"], "Event": status["events"][0]}
    served_objects |= {"Rollback": status["rollbacks"][0]}
    served_objects |= {"Row": history["rows"][0]}
    assert {name: set(schemas[name]["properties"]) for name in schemas} == {
        name: set(value) for name, value in served_objects.items()
    }


async def test_a_port_in_use_is_refused_by_name():
    async with served(FakeSource()) as client:
        with pytest.raises(Refused) as refusal:
            await web.serve(FakeSource(), host="127.0.0.1", port=client.port)
    assert refusal.value.reason is Code.PORT_IN_USE


async def test_stopping_ends_open_streams_and_frees_the_port():
    source = FakeSource()
    server = await web.serve(source, host="127.0.0.1", port=0)
    async with aiohttp.ClientSession() as client:
        stream = await client.get(f"http://127.0.0.1:{server.port}/api/v1/events")
        port = server.port
        async with asyncio.timeout(5):
            await server.stop()
        rest = await asyncio.wait_for(stream.content.read(), 5)
    assert b"event: view" in rest
    again = await web.serve(source, host="127.0.0.1", port=port)
    await again.stop()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (999, "999"),
        (1_234_567, "1.23 M"),
        (63_480_000, "63.5 M"),
        (0.5, "0.50"),
        (1e18, "1000 P"),
    ],
)
def test_large_numbers_are_shown_with_three_digits(value, text):
    assert views.compact(value) == text


def test_the_page_has_dark_colours_with_contrast_and_nothing_wider_than_320_pixels():
    css = (web._FOLDER / "page.css").read_text()
    light, dark = (
        dict(re.findall(r"--(\w+): #(\w{6})", css.split(start, 1)[1].split("}", 1)[0]))
        for start in ("color-scheme: light dark;", "@media (prefers-color-scheme: dark) {\n  :root {")
    )
    assert light.keys() == dark.keys() and "ink" in dark
    for colours in (light, dark):
        for text in colours.keys() - {"ground", "card", "line"}:
            ratio = 3.0 if text not in ("ink", "soft") else 4.5  # WCAG: for graphics and for text
            assert contrast(colours[text], colours["card"]) >= ratio, text
    fixed = re.findall(r"(?<![-\w])(?:min-)?width: (\d+)px", css) + re.findall(r"minmax\((\d+)px", css)
    assert all(int(pixels) <= 320 for pixels in fixed)
    assert "width=device-width" in (web._FOLDER / "index.html").read_text()


def contrast(one, other):
    """By WCAG 2, of two colours in hex."""
    lights = sorted(
        sum(
            share * ((value / 12.92) if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4)
            for share, value in zip((0.2126, 0.7152, 0.0722), (b / 255 for b in bytes.fromhex(each)), strict=True)
        )
        for each in (one, other)
    )
    return (lights[1] + 0.05) / (lights[0] + 0.05)
