"""Whole parts of `make chaos` that rows of badinputs.toml ask for: `pytest tests/chaos -m long`."""

import subprocess
import sys

import pytest

from tests.chaos import line, nat

LINES = ("300 ms", "20 %", "1 Mbit", "IPv6")


def passes(part, *words):
    subprocess.run([sys.executable, "-m", "tests.chaos", "--part", part, *words], check=True)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not nat.possible(), reason="root, ip and nft are needed")
def test_nodes_behind_routers_that_let_nothing_in_take_part_and_are_told_why_they_wait():
    passes("nat", "--rounds", "3")


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not line.possible(), reason="root, ip and /dev/net/tun are needed")
def test_rounds_go_on_over_lines_that_lose_and_delay_and_over_ipv6_alone():
    passes("lines", "--only", *LINES, "--rounds", "3")
