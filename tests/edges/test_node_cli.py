"""`barnraise` as a volunteer meets it: real processes for words and signals, a ten-line daemon behind `join`."""

import asyncio
import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from node import cli, screen
from node.config import MARKER, Home, home_of, settings
from node.control import Control
from node.core.rounds import Rounds
from node.core.session import Session
from node.status import Tally, _reach, view
from protocol import console, identity, invite, sandbox
from protocol.errors import Code, Refused
from protocol.state import Consumed
from protocol.types import Digest, Head, Member, Role, Roster, RoundNumber, SignedRoster
from tests.core.test_rounds import rules

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "hivemind", "grpc", "transformers", "numpy", "sqlalchemy", "aiohttp", "cryptography")
STATUS = {
    "version": 1,
    "run": "tidewater",
    "activity": "training",
    "reason": "2 of 25 steps",
    "round": 1851,
    "loss": float("nan"),
    "tokens_per_second": 4080,
    "peers": 1,
    "linked": True,
    "round_steps": 2,
    "round_steps_goal": 25,
    "recent": [{"round": 1850, "outcome": "accepted", "tokens": 512000}],
    "trouble": None,
}
DAEMON = """
import asyncio, sys, types
async def run(settings, invite, *, on_status, stopper):
    on_status({"version": 1, "activity": "training", "run": "tidewater"})
    BODY
    return 0
daemon = types.ModuleType("node.daemon"); daemon.run = run; sys.modules["node.daemon"] = daemon
from node import cli
cli.POLITE_SECONDS, cli.ABRUPT_SECONDS = 0.5, 0.3
cli.main()
"""


@pytest.fixture
def text():
    return an_invite("tidewater")


def an_invite(name, expires_ms=None):
    return invite.encode(
        invite.issue(
            identity.Key.generate(),
            addresses=("192.0.2.1:49300",),
            fingerprint="ab" * 32,
            name=name,
            token=b"0" * 16,
            uses=1,
            expires_ms=expires_ms or (int(time.time()) + 3600) * 1000,
        )
    )


def command(*words, code=None, env=None, **options):
    start = ["-c", code] if code else ["-m", "node.cli"]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **(env or {})}
    return subprocess.run(
        [sys.executable, *start, *words],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        **options,
    )


def joining(body, *words):
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "BARNRAISE_ALLOW_ROOT": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", DAEMON.replace("BODY", body), "join", *words],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(stream, words):
    seen = ""
    while words not in seen:
        line = stream.readline()
        assert line, seen
        seen += line
    return seen


def run(capsys, *words):
    code = console.main(cli.app, program="barnraise", short_help=cli._SHORT_HELP, arguments=words)
    return code, *capsys.readouterr()


@pytest.fixture
def running(tmp_path):
    """A home whose control socket answers from another thread."""
    import threading

    home, asked, loop = Home(tmp_path / "home"), [], asyncio.new_event_loop()
    home.prepare()

    async def handler(verb, arguments):
        asked.append((verb, arguments))
        return STATUS if verb == "status" else {}

    server = Control(home.control, handler)
    loop.run_until_complete(server.start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield home, asked
    asyncio.run_coroutine_threadsafe(server.close(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


# words


def test_no_arguments_shows_how_to_join_and_is_a_usage_error(capsys):
    code, out, err = run(capsys)
    assert (code, out) == (2, "") and "barnraise join INVITE" in err and len(err.splitlines()) < 8


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["jion"], "did you mean join?"),
        (["status", "--jsn"], "did you mean --json?"),
        (["join", "--max-dsk", "5GB"], "did you mean --max-disk?"),
    ],
)
def test_a_misspelt_word_gets_the_nearest_one(capsys, words, meant):
    code, _, err = run(capsys, *words)
    assert code == 2 and meant in err and "Fix: See: barnraise" in err and len(err.splitlines()) == 2


@pytest.mark.parametrize("word", ["../../bin/sh", "x;y", "\x1b[31m", "no-such-thing"])
def test_an_unknown_word_runs_nothing(capsys, word):
    code, _, err = run(capsys, word)
    assert code == 2 and "\x1b" not in err


def test_an_unknown_word_runs_the_program_of_that_name(tmp_path):
    program = tmp_path / "barnraise-greet"
    program.write_text('#!/bin/sh\necho "hello $*"; exit 9\n')
    program.chmod(0o755)
    done = command("greet", "a b", "--debug", env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert (done.returncode, done.stdout) == (9, b"hello a b --debug\n")


@pytest.mark.parametrize("words", [["--help"], ["join", "--help"], ["status", "--home", "/nonexistent"], ["stauts"]])
def test_help_and_status_import_nothing_heavy(words):
    loaded = f"""
import sys
from node import cli
try: cli.main()
except SystemExit: pass
print("heavy:", *(name for name in {HEAVY!r} if name in sys.modules))
"""
    assert command(*words, code=loaded).stdout.splitlines()[-1] == b"heavy:"


@pytest.mark.parametrize("words", [["--help"], ["status"]])
def test_help_and_status_take_little_of_the_processor(running, words):
    def cpu_seconds(*given, code=None):
        before = os.times()
        assert command(*given, code=code, env={"BARNRAISE_HOME": str(home.path)}).returncode == 0
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    home, _ = running
    libraries = cpu_seconds(code="import asyncio, pydantic, typer")  # what they cannot do without
    assert cpu_seconds(*words) < 4 * libraries  # torch alone would be ten times as much


@pytest.mark.parametrize(
    "env",
    [
        {"LC_ALL": "C"},
        {"PYTHONIOENCODING": "ascii"},
        {"COLUMNS": "20"},
        {"COLUMNS": "1", "TERM": "dumb"},
        {"TZ": "Nonsense/Where"},
    ],
)
def test_any_terminal_will_do(running, env):
    home, _ = running
    for words in (["--help"], ["join", "--help"], ["status"], ["join", "barnraise:x"]):
        done = command(*words, env={"BARNRAISE_HOME": str(home.path), **env})
        assert done.returncode in (0, 3) and b"Traceback" not in done.stderr and b"E-BUG" not in done.stderr


def test_a_surprise_is_one_sentence_and_its_traceback_is_in_the_log(tmp_path, text):
    child = joining("raise KeyError('odd\\x1b')", text, "--home", str(tmp_path / "home"))
    _, err = child.communicate(timeout=60)
    assert child.returncode == 70
    assert "E-BUG-001" in err and "Traceback" not in err and "\x1b" not in err and "crash.log" in err
    assert "KeyError" in (tmp_path / "home/logs/crash.log").read_text()
    child = joining("raise KeyError('odd')", text, "--home", str(tmp_path / "home"), "--debug")
    assert "Traceback" in child.communicate(timeout=60)[1]


# verbs


def test_status_says_what_the_node_does_and_why(running, capsys):
    home, _ = running
    code, out, _ = run(capsys, "status", "--home", str(home.path))
    assert code == 0 and "training · tidewater · round 1,851 · 4,080 tokens/s · 1 peer" in out and "nan" not in out
    code, out, _ = run(capsys, "status", "--home", str(home.path), "--json")
    import json

    assert json.loads(out, parse_constant=pytest.fail) == {**STATUS, "loss": None}


def test_the_verbs_reach_the_node(running, capsys):
    home, asked = running
    at = ("--home", str(home.path))
    assert "until" in run(capsys, "pause", "--for", "1h30m", *at)[1]
    assert [run(capsys, verb, *at)[0] for verb in ("pause", "resume", "finish")] == [0, 0, 0]
    assert asked == [("pause", {"seconds": 5400.0}), ("pause", {"seconds": None}), ("resume", {}), ("finish", {})]


def test_without_a_node_the_next_command_is_named(tmp_path, capsys):
    code, _, err = run(capsys, "status", "--home", str(tmp_path))
    assert code == 2 and "E-HOME-003" in err and "barnraise join INVITE" in err
    Home(tmp_path).membership.write_text("{}")
    assert "barnraise start" in run(capsys, "status", "--home", str(tmp_path))[2]


@pytest.mark.parametrize("span", ["-2h", "0s", "nan", "2", "1e9h", "9999999d", ""])
def test_a_pause_has_a_sensible_length(span, capsys):
    assert run(capsys, "pause", "--for", span)[0] == 2


# leaving


def test_purge_removes_what_a_node_made_and_nothing_else(tmp_path, capsys):
    home, outside = Home(tmp_path / "home"), tmp_path / "outside"
    home.prepare()
    outside.mkdir()
    (outside / "precious").write_text("x")
    (home.blobs / "blob").write_bytes(b"x" * 5000)
    (home.blobs / "link").symlink_to(outside)
    home.key.write_text("key")
    (home.path / "notes.txt").write_text("mine")
    code, out, _ = run(capsys, "leave", "--purge", "--home", str(home.path))
    assert code == 0 and "kB freed" in out
    assert sorted(entry.name for entry in home.path.iterdir()) == [MARKER, "node.key", "notes.txt"]
    assert (outside / "precious").exists()
    home.prepare()  # with its key it is still a node's folder
    (home.path / "notes.txt").unlink()
    assert run(capsys, "leave", "--purge", "--forget-me", "--home", str(home.path))[0] == 0
    assert not home.path.exists()


def test_leave_deletes_nothing_in_a_folder_that_is_not_ours(tmp_path, capsys):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "node.key").write_text("somebody's")
    code, _, err = run(capsys, "leave", "--purge", "--forget-me", "--home", str(tmp_path))
    assert code == 3 and "E-HOME-002" in err
    assert (tmp_path / "blobs").exists() and (tmp_path / "node.key").exists()


# home


def test_a_folder_with_other_files_is_refused_and_left_as_it_was(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    link = tmp_path.parent / f"{tmp_path.name}-link"
    link.symlink_to(tmp_path)
    for path in (str(tmp_path), str(link), "/"):
        with pytest.raises(Refused) as refused:
            home_of(path).prepare()
        assert refused.value.reason is Code.HOME_FOREIGN
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["a b", "new\nline", "🦦", "\u202ertl", "x.", "ü" * 100])
def test_a_home_may_have_any_name(tmp_path, name):
    home = home_of(str(tmp_path / name))
    home.prepare()
    home.prepare()
    assert home.path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 2100])
def test_a_home_that_cannot_be_made_is_refused(tmp_path, name):
    with pytest.raises(Refused) as refused:
        home_of(str(tmp_path / name)).prepare()
    assert refused.value.reason is Code.HOME_FOREIGN


def test_a_second_node_in_one_home_is_refused_and_a_killed_one_frees_it(tmp_path, text):
    home = str(tmp_path / "home")
    first = joining("await asyncio.sleep(60)", text, "--home", home)
    until(first.stderr, "Z training")
    second = joining("pass", text, "--home", home)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 3 and "E-HOME-001" in err and str(first.pid) in err
    first.kill()
    first.communicate()
    third = joining("pass", text, "--home", home)
    third.communicate(timeout=60)
    assert third.returncode == 0


# settings


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(tmp_path):
    home = Home(tmp_path)
    home.config.write_text('name = "file"\nthreads = 1\nbatch = 2\nmax_disk = "5 GiB"\n')
    found = settings(home, {"name": "flag", "threads": None}, {"BARNRAISE_NAME": "env", "BARNRAISE_THREADS": "3"})
    assert (found.name, found.threads, found.batch, found.max_disk_bytes) == ("flag", 3, 2, 5 << 30)
    assert (found.device, found.listen_multiaddrs) == ("auto", ("/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0"))
    assert settings(home, {"listen": "0.0.0.0:49400"}, {}).listen_multiaddrs == ("/ip4/0.0.0.0/tcp/49400",)


@pytest.mark.parametrize(
    ("file", "code", "words"),
    [
        ('max_dsk = "5GB"', Code.SPEC_UNKNOWN_KEY, "did you mean max_disk?"),
        ('threads = "ten"', Code.SPEC_VALUE, "threads"),
        ("threads = true", Code.SPEC_VALUE, "threads"),
        ("threads = 0", Code.SPEC_VALUE, "threads"),
        ("name = 5", Code.SPEC_VALUE, "name"),
        ("max_disk = nan", Code.SPEC_VALUE, "max_disk"),
        ("name = \n", Code.SPEC_SYNTAX, "line 1, column 8"),
        ('name = "a"\nname = "b"\nbatch = 1', Code.SPEC_SYNTAX, "line 2"),
    ],
)
def test_a_bad_config_file_is_refused_by_name(tmp_path, file, code, words):
    Home(tmp_path).config.write_text(file)
    with pytest.raises(Refused) as refused:
        settings(Home(tmp_path), {}, {})
    assert refused.value.reason is code and words in refused.value.what and "config.toml" in refused.value.what


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("listen", "0.0.0.0:70000"),
        ("listen", "abc"),
        ("listen", "example.org:5000"),
        ("announce", "0.0.0.0:5000"),
        ("announce", "1.2.3.4:0"),
        ("announce", "example.org:5000"),
        ("device", "gpu"),
        ("device", "cuda:-1"),
        ("batch", "-1"),
        ("name", ""),
        ("name", "x" * 41),
        ("name", "a\x1b[2J"),
        ("name", "a\u202eb"),
    ],
)
def test_a_flag_out_of_range_is_a_usage_error(tmp_path, key, value):
    with pytest.raises(Refused) as refused:
        settings(Home(tmp_path), {key: value}, {})
    assert refused.value.reason is Code.USAGE and refused.value.what.startswith(f"--{key}: ")


@pytest.mark.parametrize(
    ("text", "size"),
    [("10 GB", 10**10), ("10GiB ", 10 << 30), ("5G", 5 * 10**9), ("1.5 mb", 1_500_000), ("7", 7), ("0.5KiB", 512)],
)
def test_a_size_is_read_as_people_write_it(text, size):
    assert console.parse_size(text) == size


@pytest.mark.parametrize("text", ["-5G", "0", "1e400", "NaN", "inf", "", "5 X", "5iB", "1,000", "9" * 400, "99999999P"])
def test_a_size_that_is_none_is_refused_with_the_forms_that_are(text):
    with pytest.raises(Refused) as caught:
        console.parse_size(text)
    assert "5GB" in caught.value.what or "between 1 byte and" in caught.value.what


def test_a_cap_that_is_no_size_ends_a_join_before_anything_is_made(tmp_path, text, capsys):
    for wrong in ("-5G", "0", "1e400", "NaN"):
        code, _, err = run(capsys, "join", text, f"--max-disk={wrong}", "--home", str(tmp_path / "home"))
        assert code == 2 and "--max-disk" in err and ("5GB" in err or "between 1 byte" in err)
    assert not (tmp_path / "home").exists()


def test_a_port_that_needs_rights_is_refused_with_the_first_that_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr("node.config._lowest_port", lambda: 1024)
    with pytest.raises(Refused, match="port 22 needs rights") as caught:
        settings(Home(tmp_path), {"listen": "0.0.0.0:22"}, {})
    assert caught.value.reason.exit.value == 2 and "1024" in caught.value.fix
    assert settings(Home(tmp_path), {"listen": "0.0.0.0:0"}, {}).listen == "0.0.0.0:0"


def test_what_is_announced_may_be_a_port_below_1024_as_a_router_forwards_it(tmp_path):
    assert settings(Home(tmp_path), {"announce": "[2a00:1450::5]:443"}, {}).announce_multiaddrs == (
        "/ip6/2a00:1450::5/tcp/443",
    )
    assert settings(Home(tmp_path), {}, {}).announce_multiaddrs == ()


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        ([Role.PEER, Role.CLIENT], "direct: the other nodes can call this one"),
        ([Role.CLIENT, Role.PEER], "outbound-only: this node calls the others, and that is enough"),
        ([Role.CLIENT, Role.CLIENT], "E-NET-003 · outbound-only, like every node of this run: no round can end"),
    ],
)
def test_status_says_how_the_node_and_the_others_come_together(roles, said):
    members = [Member(f"node {index}", f"peer {index}", (), 1, role) for index, role in enumerate(roles)]
    reach = _reach(Roster("run", 0, tuple(members), 0), "node 0")
    assert said in "\n".join(screen.status_lines({**STATUS, "reach": reach}))
    assert _reach(Roster("run", 0, tuple(members), 0), "another") is None


@pytest.mark.parametrize(
    ("download", "said"),
    [
        (
            {"what": "the model", "done": 2_100_000, "size": 4_300_000, "bytes_per_second": 8000.0},
            "  getting the model: 2.1 MB of 4.3 MB at 8 kB/s",
        ),
        ({"what": "data", "done": 32_768, "size": 1e9, "bytes_per_second": 0.0}, "  getting data: 32.8 kB of 1 GB"),
        ({"what": "rounds", "done": 9, "size": 144}, "  getting rounds: 9 of 144"),
    ],
)
def test_status_says_how_far_a_download_is_and_how_fast_the_line(download, said):
    assert said in screen.status_lines({**STATUS, "download": download})
    assert not any("getting" in line for line in screen.status_lines({**STATUS, "download": None}))


@pytest.mark.parametrize(("failed", "said"), [(0, ""), (1, "1 attempt at a round failed, the last one because why")])
def test_status_counts_attempts_that_failed(failed, said):
    state = Rounds(Head(3, "0" * 64), "1" * 64, Consumed(), attempts_failed=failed, last_failure="why" * failed)
    shown = {"run": "r", "name": "n", "trainer": None, "confinement": "", "tally": Tally()}
    status = view(Session(), state, rules(), **shown)
    assert status["attempts_failed"] == failed
    told = "\n".join(screen.status_lines(status))
    assert said in told and ("failed" in told) is bool(failed)


def test_a_node_that_trains_nothing_says_so_and_what_keeps_it_from_helping(tmp_path):
    (tmp_path / "config.toml").write_text("training = false")
    assert not settings(Home(tmp_path), {}, {}).training and settings(Home(tmp_path / "x"), {}, {}).training
    assert not settings(Home(tmp_path / "x"), {}, {"BARNRAISE_TRAINING": "no"}).training
    state, tally = Session(helper=True, linked=True, synced=True, engine_ready=True), Tally()
    tally.settled(3, tokens=0, accepted=False, reduced=True)
    members = tuple(Member(f"node {index}", "p", (), 1, role) for index, role in enumerate([Role.HELPER, Role.CLIENT]))
    head = {"head": Head(RoundNumber(4), Digest("")), "digest": Digest(""), "consumed": Consumed()}

    def said(*members):
        rosters = {0: SignedRoster(Roster("run", 0, members, 0), "s")}
        rules = SimpleNamespace(me="node 0", inner_steps=lambda number: 9)
        shown = {"run": "r", "name": "server", "trainer": None, "confinement": "", "tally": tally}
        return screen.status_lines(view(state, Rounds(**head, rosters=rosters), rules, **shown))

    lines = said(*members)
    assert lines[0].startswith("● averaging for others · server") and not any("steps" in line for line in lines)
    assert "  averages for others, and trains nothing" in lines
    assert "  direct: the other nodes can call this one" in lines
    closed = "\n".join(said(*(replace(member, role=Role.CLIENT) for member in members)))
    assert "none of them can call it" in closed and "open the port that --listen names" in closed
    assert screen.changes({}, {"recent": list(tally.recent)}) == ["round 3: averaged for others"]


@pytest.mark.parametrize("trains", [True, False])
def test_a_node_is_told_of_what_it_can_do_and_does(trains):
    from rich.console import Console

    file = io.StringIO()
    live = screen.LiveScreen(Console(file=file, force_terminal=True, width=160, height=5, markup=False))
    live.update({**STATUS, "trains": trains, "linked": False})
    live.close()
    assert ("barnraise pause" in file.getvalue()) is trains and "finish" in file.getvalue()
    assert "training goes on" not in file.getvalue() and "rounds go on" in file.getvalue()


def test_a_node_waits_where_the_coordinator_says_that_nobody_can_be_called():
    state, tally = Session(linked=True), Tally(nobody_callable=True)
    rules = SimpleNamespace(me="node 0", inner_steps=lambda number: 9)
    rounds = Rounds(Head(RoundNumber(0), Digest("")), Digest(""), Consumed())
    shown = view(state, rounds, rules, run="r", name="n", trainer=None, confinement="", tally=tally)
    assert shown["reach"] == "nobody" and "E-NET-003" in "\n".join(screen.status_lines(shown))
    roster = SignedRoster(Roster("run", 0, (Member("node 0", "p", (), 1, Role.PEER),), 0), "s")
    able = replace(rounds, rosters={0: roster})
    shown = view(state, able, rules, run="r", name="n", trainer=None, confinement="", tally=tally)
    assert shown["reach"] == "direct", "this one can be, whatever keeps it from taking part"


def test_without_a_home_folder_one_has_to_be_named(monkeypatch):
    import platformdirs

    monkeypatch.setattr(platformdirs, "user_data_dir", lambda name: "~/x")
    with pytest.raises(Refused, match="no home folder") as caught:
        home_of(None, {})
    assert "--home" in caught.value.fix


def test_numbers_are_short_enough_for_a_status_line():
    assert [console.size_text(size) for size in (0, 999, 1000, 1_234_567, 10**18)] == [
        "0 bytes",
        "999 bytes",
        "1 kB",
        "1.23 MB",
        "1,000 PB",
    ]
    assert [console.number_text(number) for number in (4080, 999_999, 9_200_000)] == ["4,080", "999,999", "9.2 M"]
    assert [console.duration_text(s) for s in (0, 59.4, 3600, 7500, 90000)] == [
        "0 s",
        "59 s",
        "1 h",
        "2 h 5 min",
        "1 d 1 h",
    ]


# joining


def test_an_invite_that_a_mail_program_wrapped_is_joined_again(tmp_path, text):
    child = joining("pass", text[:60], text[60:150], text[150:], "--home", str(tmp_path / "home"), "--max-disk", "5GB")
    _, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert "tidewater, from 192.0.2.1:49300" in err and "never code" in err and "5,000,000,000 bytes" in err


def test_a_bad_invite_leaves_nothing_behind(tmp_path, text, capsys):
    home = tmp_path / "home"
    changed = text[:-1] + ("a" if text[-1] != "a" else "b")
    for bad, expected in (("hello", 3), (changed, 3), (an_invite("old", 1000), 7)):
        assert run(capsys, "join", bad, "--home", str(home))[0] == expected
    assert not home.exists()


def test_root_is_refused_unless_its_owner_insists_and_the_sandbox_stays(tmp_path, text, capsys, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    home = tmp_path / "home"
    code, _, err = run(capsys, "join", text, "--home", str(home))
    assert code == 2 and "as root" in err and "--allow-root" in err and not home.exists()

    made = settings(Home(home), {"allow_root": True})
    cli._check_user(made)
    cli._announce(made, None)
    assert "Warning: this runs as root" in (err := capsys.readouterr().err)
    assert sandbox.plan(sandbox.Mode.AUTO, sandbox.kernel()).text in err
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    cli._check_user(settings(Home(home), {}))


def test_a_cap_on_what_is_sent_is_a_number_of_megabits(tmp_path):
    assert settings(Home(tmp_path), {"max_up": "2.5"}, {}).max_up == 2.5
    (tmp_path / "config.toml").write_text("max_up = 20")
    assert settings(Home(tmp_path), {}, {}).max_up == 20.0
    for wrong in ("0", "0.9", "-1", "nan", "inf", "1e9", "5MB", ""):
        with pytest.raises(Refused, match="Mbit/s from"):
            settings(Home(tmp_path), {"max_up": wrong}, {})


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("22:00-07:00", "22:00-07:00"),
        (" 9:30 - 17:00 , 20:00-24:00", "09:30-17:00, 20:00-00:00"),
        ("00:00-06:00", "00:00-06:00"),
    ],
)
def test_hours_are_read_as_people_write_them(tmp_path, written, meant):
    (tmp_path / "config.toml").write_text(f'hours = "{written}"\non_battery = true')
    found = settings(Home(tmp_path), {}, {})
    assert ", ".join(map(str, found.policy.hours)) == meant and found.policy.on_battery


@pytest.mark.parametrize(("written", "meant"), [("85", 85.0), ("77.5", 77.5), ('"90"', 90.0)])
def test_what_else_its_owner_allows_is_read(tmp_path, written, meant):
    (tmp_path / "config.toml").write_text(f"max_celsius = {written}\non_metered = true")
    policy = settings(Home(tmp_path), {}, {}).policy
    assert policy.max_celsius == meant and policy.on_metered


def test_programs_to_rest_beside_are_named_without_case_and_suffix_and_never_by_a_path(tmp_path):
    (tmp_path / "config.toml").write_text('rest_beside = "Blender, A Game.exe"')
    assert settings(Home(tmp_path), {}, {}).policy.rest_beside == ("blender", "a game")
    for written in ('"/usr/bin/blender"', '"blender,"', '""', "3", '["blender"]'):
        (tmp_path / "config.toml").write_text(f"rest_beside = {written}")
        with pytest.raises(Refused, match=r"such as blender|text in quotes|neither text"):
            settings(Home(tmp_path), {}, {})


@pytest.mark.parametrize("written", ["20", "350", '"85 C"', "true", "nan"])
def test_degrees_that_no_processor_has_are_refused_with_an_example(tmp_path, written):
    (tmp_path / "config.toml").write_text(f"max_celsius = {written}")
    with pytest.raises(Refused, match="such as 85"):
        settings(Home(tmp_path), {}, {})


@pytest.mark.parametrize(
    "written", ['""', '"night"', '"22-7"', '"22:00"', '"25:00-26:00"', '"08:00-08:00"', "8", '"8:60-9:00"']
)
def test_hours_that_are_none_are_refused_with_an_example(tmp_path, written):
    (tmp_path / "config.toml").write_text(f"hours = {written}")
    with pytest.raises(Refused, match=r"22:00-07:00|text in quotes") as caught:
        settings(Home(tmp_path), {}, {})
    assert caught.value.reason.exit.value == 3


async def test_a_node_waits_for_room_on_a_full_disk_says_so_and_goes_on_by_itself(tmp_path, monkeypatch):
    from node import daemon, hardware
    from node.config import Settings, Stopper

    home, lives, seen, room = Home(tmp_path / "home"), [], [], [False]
    home.prepare()

    class Daemon:
        async def run(self, stopper):
            lives.append(1)
            if len(lives) == 1:
                raise Refused(Code.DISK_CAP, "no room to write to the journal")
            return 0

        @classmethod
        async def open(cls, *_):
            return cls()

    def told(status):
        seen.append(status)

    monkeypatch.setattr(daemon, "Daemon", Daemon)
    monkeypatch.setattr(daemon, "POLICY_SECONDS", 0.05)
    monkeypatch.setattr(hardware, "has_room", lambda folder: room[0])
    running = asyncio.create_task(daemon.run(Settings(home.path), None, stopper=Stopper(), on_status=told))
    while not seen:
        await asyncio.sleep(0.01)
    answer = await asyncio.to_thread(cli.ask, home.path, "status")
    assert answer["activity"] == "paused" and "the disk is full" in answer["reason"]
    assert len(lives) == 1
    room[0] = True
    assert await asyncio.wait_for(running, 10) == 0 and len(lives) == 2
    assert not home.control.exists()

    lives.clear()
    room[0] = False
    stopper = Stopper()
    running = asyncio.create_task(daemon.run(Settings(home.path), None, stopper=stopper))
    await asyncio.sleep(0.1)
    stopper.ask()
    assert await asyncio.wait_for(running, 5) == 130 and len(lives) == 1

    lives.clear()
    room[0] = True
    with pytest.raises(Refused):  # the owner's cap is met: no waiting helps
        await daemon.run(Settings(home.path), None, stopper=Stopper())


@pytest.mark.parametrize(("written", "meant"), [("auto", "auto"), ("Required", "required"), ("off", "off")])
def test_the_sandbox_is_the_owners_to_choose(tmp_path, written, meant):
    (tmp_path / "config.toml").write_text(f'sandbox = "{written}"')
    assert settings(Home(tmp_path), {}, {}).sandbox.value == meant
    (tmp_path / "config.toml").write_text('sandbox = "loose"')
    with pytest.raises(Refused, match="auto, required or off"):
        settings(Home(tmp_path), {}, {})


def test_a_node_is_a_member_of_one_run(tmp_path, text, capsys):
    home = Home(tmp_path / "home")
    home.prepare()
    home.remember(an_invite("first"))
    code, _, err = run(capsys, "join", text, "--home", str(home.path), "--allow-root")
    assert code == 3 and "a member of the run first" in err


def test_start_needs_a_membership(tmp_path, capsys):
    code, _, err = run(capsys, "start", "--home", str(tmp_path))
    assert code == 7 and "barnraise join INVITE" in err


def test_json_output_is_one_status_a_line(tmp_path, text):
    import json

    child = joining("pass", text, "--home", str(tmp_path / "home"), "--json")
    out, _ = child.communicate(timeout=60)
    assert [json.loads(line)["activity"] for line in out.splitlines()] == ["training"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_signal_asks_for_a_polite_end(tmp_path, text, number):
    child = joining("await stopper.polite.wait(); print('polite', stopper.asked)", text, "--home", str(tmp_path / "h"))
    until(child.stderr, "Z training")
    child.send_signal(number)
    out, _ = child.communicate(timeout=30)
    assert (child.returncode, out) == (130, "polite 1\n")


def test_a_second_signal_ends_a_node_that_ignores_the_first(tmp_path, text):
    child = joining("await asyncio.sleep(600)", text, "--home", str(tmp_path / "home"))
    until(child.stderr, "Z training")
    child.send_signal(signal.SIGINT)
    until(child.stderr, "Ending within")
    child.send_signal(signal.SIGINT)
    start = time.monotonic()
    child.communicate(timeout=30)
    assert child.returncode == 130 and time.monotonic() - start < 5


def test_a_second_signal_ends_a_node_whose_loop_is_stuck(tmp_path, text):
    child = joining("import time; [time.sleep(0.1) for _ in range(600)]", text, "--home", str(tmp_path / "home"))
    until(child.stderr, "Z training")
    child.send_signal(signal.SIGINT)
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=30)
    assert child.returncode == 130


def test_patience_with_a_polite_end_has_a_limit(tmp_path, text):
    child = joining("await asyncio.sleep(600)", text, "--home", str(tmp_path / "home"))
    until(child.stderr, "Z training")
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=30)
    assert child.returncode == 130


# screens


@pytest.mark.parametrize("status", [{}, STATUS, dict.fromkeys(STATUS), dict.fromkeys(STATUS, "\x1b[2J[red]")])
@pytest.mark.parametrize("width", [1, 20, 80])
def test_a_screen_takes_any_status_in_any_width(status, width):
    from rich.console import Console

    file = io.StringIO()
    live = screen.LiveScreen(Console(file=file, force_terminal=True, width=width, height=5, markup=False))
    live.update(status)
    live.update({**status, "download": {"what": "weights", "done": 5, "size": 10}})
    live.notice("Ending.")
    live.close()
    assert "\x1b[2J" not in file.getvalue()
    lines = screen.LogLines(io.StringIO())
    lines.update(status)
    assert screen.status_lines(status)


def test_a_log_has_a_sentence_for_each_change_and_none_without():
    stream = io.StringIO()
    lines = screen.LogLines(stream)
    lines.update(STATUS)
    first = stream.getvalue()
    assert "round 1,850: accepted · 512,000 tokens" in first and "training: 2 of 25 steps" in first
    lines.update({**STATUS, "tokens_per_second": 1, "uptime_seconds": 9})
    assert stream.getvalue() == first
    lines.update({**STATUS, "linked": False})
    assert "not reached" in stream.getvalue()


def test_a_closed_terminal_ends_the_drawing_and_not_the_node():
    class Closed(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    lines = screen.LogLines(Closed())
    lines.update(STATUS)
    assert not lines.open
