"""Logs: bounded while they are written to, and in UTC."""

import re
import subprocess
import sys

from coordinator import view
from protocol import console


def test_a_log_that_is_written_to_stays_in_its_bounds_and_its_writers_go_on(tmp_path):
    path, other = tmp_path / "node.log", tmp_path / "engine.log"
    with path.open("ab") as log:
        for number in range(100):
            log.write(b"%04d " % number + bytes(1000) + b"\n")
            log.flush()
            console.cap_logs(tmp_path, 10_000)
            assert path.stat().st_size <= 10_000
        log.write(b"the last\n")
    other.write_bytes(b"small")
    console.cap_logs(tmp_path, 10_000)
    assert path.read_bytes().endswith(b"the last\n")
    assert (tmp_path / "node.log.1").stat().st_size <= 12_000
    assert other.read_bytes() == b"small" and not (tmp_path / "engine.log.1").exists()


def test_the_coordinators_log_says_utc_wherever_it_runs():
    script = """
import structlog
from coordinator.serving import configure_log
configure_log(as_json=False)
structlog.get_logger().info("up")
"""
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={"TZ": "Asia/Kathmandu"}
    ).stderr
    now = subprocess.run(["date", "-u", "+%Y-%m-%dT%H:"], capture_output=True, text=True, check=True).stdout.strip()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ up\n", said)
    assert said.startswith(now) or said[14:16] == "59"


def test_reports_say_utc_far_beyond_2038():
    assert view.iso(2**31 * 1000 + 1000) == "2038-01-19T03:14:09+00:00"
    assert view.iso(1_774_746_000_000) == "2026-03-29T01:00:00+00:00"  # when clocks jump in Europe
    assert view.iso(float(1 << 62)) == ""
