"""The owner's socket: what it answers, to whom, and how much it takes."""

import asyncio
import json
import os
import socket
import stat
from pathlib import Path

import pytest

from node import control
from node.config import Home, Stopper
from node.control import Control, ask
from protocol.errors import Code, Refused


@pytest.fixture
async def node(tmp_path):
    async def handler(verb, arguments):
        if verb == "finish":
            raise Refused(Code.LEASE, "no lease", fix="wait")
        if verb == "leave":
            raise RuntimeError("a fault of ours")
        return {"verb": verb, "arguments": arguments}

    server = Control(Home(tmp_path).control, handler)
    await server.start()
    yield tmp_path
    await server.close()


async def asked(home, verb, **arguments):
    return await asyncio.to_thread(ask, home, verb, **arguments)


async def sent(home, data):
    reader, writer = await asyncio.open_unix_connection(str(Home(home).control), limit=1 << 21)
    writer.write(data)
    if not data.endswith(b"\n"):
        writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    return json.loads(answer) if answer else None


async def test_a_verb_and_its_arguments_reach_the_node(node):
    assert await asked(node, "status") == {"verb": "status", "arguments": {}}
    assert (await asked(node, "pause", seconds=7200.0))["arguments"] == {"seconds": 7200.0}
    assert (await asked(node, "pause", seconds=None))["arguments"] == {"seconds": None}


async def test_a_refusal_keeps_its_name_its_sentence_and_its_fix(node):
    with pytest.raises(Refused) as refused:
        await asked(node, "finish")
    assert (refused.value.reason, refused.value.what, refused.value.fix) == (Code.LEASE, "no lease", "wait")


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"hello\n",
        b"[]\n",
        b"1\n",
        b'{"verb":"exec"}\n',
        b'{"verb":["status"]}\n',
        b'{"verb":"status","arguments":[]}\n',
        b'{"verb":"status","arguments":{"path":"/"}}\n',
        b'{"verb":"pause","arguments":{"seconds":-1}}\n',
        b'{"verb":"pause","arguments":{"seconds":NaN}}\n',
        b'{"verb":"pause","arguments":{"seconds":1e999}}\n',
        b'{"verb":"pause","arguments":{"seconds":true}}\n',
        b'{"verb":"pause","arguments":{"seconds":"2h"}}\n',
        b'{"verb":"leave","arguments":{"purge":1}}\n',
        b"\xff\xfe\n",
        b"[" * 10000 + b"\n",
    ],
)
async def test_what_is_not_a_request_never_reaches_the_node(node, line):
    assert (await sent(node, line))["error"] == Code.FIELD.code


async def test_a_request_that_is_too_long_is_refused(node):
    assert (await sent(node, b"x" * (control.REQUEST_BYTES_MAX + 10) + b"\n"))["error"] == Code.LIMIT.code


async def test_a_silent_connection_is_closed_and_others_are_served_meanwhile(node, monkeypatch):
    monkeypatch.setattr(control, "REQUEST_SECONDS_MAX", 0.2)
    reader, writer = await asyncio.open_unix_connection(str(Home(node).control))
    assert (await asked(node, "status"))["verb"] == "status"
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await asyncio.wait_for(reader.readexactly(1), 5)
    writer.close()


async def test_no_more_than_so_many_connections_are_served_at_once(node):
    held = [await asyncio.open_unix_connection(str(Home(node).control)) for _ in range(control.CONNECTIONS_MAX)]
    await asyncio.sleep(0.1)
    with pytest.raises(Refused):
        await asked(node, "status")
    for _, writer in held:
        writer.close()
    await asyncio.sleep(0.1)
    assert (await asked(node, "status"))["verb"] == "status"


async def test_a_fault_of_ours_answers_nobody_and_the_server_goes_on(node, caplog):
    with pytest.raises(Refused) as refused:
        await asked(node, "leave", purge=True)
    assert refused.value.reason is Code.NO_DAEMON and "without an answer" in refused.value.what
    assert (await asked(node, "status"))["verb"] == "status"


async def test_only_the_owner_is_answered(node, monkeypatch):
    monkeypatch.setattr(control, "_is_owner", lambda end: False)
    with pytest.raises(Refused) as refused:
        await asked(node, "status")
    assert "without an answer" in refused.value.what


@pytest.mark.parametrize(("user", "answered"), [(12345, True), (0, True), (54321, False)])
def test_the_kernel_names_the_asker(monkeypatch, user, answered):
    class End:
        def getsockopt(self, level, option, size):
            return control._UCRED.pack(1, user, 1)

    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert control._is_owner(End()) is answered


async def test_the_socket_and_its_folder_are_closed_to_others(node):
    path = Home(node).control
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


async def test_a_socket_that_a_killed_node_left_is_taken_over_and_removed_at_the_end(tmp_path):
    path = Home(tmp_path).control
    path.parent.mkdir()
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    with pytest.raises(Refused) as refused:
        await asked(tmp_path, "status")
    assert refused.value.reason is Code.NO_DAEMON

    async def handler(verb, arguments):
        return {}

    server = Control(path, handler)
    await server.start()
    assert await asked(tmp_path, "status") == {}
    await server.close()
    assert not path.exists()


@pytest.mark.parametrize("proc", [True, False])
async def test_a_home_may_lie_deeper_than_a_socket_address_is_long(tmp_path, monkeypatch, proc):
    deep = tmp_path / ("d" * 120) / ("é" * 60)
    deep.mkdir(parents=True)
    if not proc:
        monkeypatch.setattr(control, "_DESCRIPTORS", tmp_path / "absent")

    async def handler(verb, arguments):
        return {"deep": True}

    here = os.getcwd()
    server = Control(Home(deep).control, handler)
    await server.start()
    if proc:
        assert await asked(deep, "status") == {"deep": True}
    assert Home(deep).control.is_socket() and os.getcwd() == here
    await server.close()


@pytest.mark.parametrize("home", ["/nonexistent", "/dev/null", "/" + "x" * 5000])
def test_where_no_node_runs_there_is_a_refusal(home, tmp_path):
    with pytest.raises(Refused) as refused:
        ask(Path(home), "status")
    assert refused.value.reason is Code.NO_DAEMON


async def test_a_stopper_counts_to_two():
    stopper = Stopper()
    assert (stopper.asked, stopper.polite.is_set(), stopper.now.is_set()) == (0, False, False)
    stopper.ask()
    assert (stopper.asked, stopper.polite.is_set(), stopper.now.is_set()) == (1, True, False)
    stopper.ask()
    stopper.ask()
    assert (stopper.asked, stopper.now.is_set()) == (2, True)
