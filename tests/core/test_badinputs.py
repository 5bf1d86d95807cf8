"""The table of bad inputs, and docs/THREATS.md, name tests that are there, and say what they do not show."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests import badinputs

ROOT = Path(__file__).parents[2]
ROWS = badinputs.rows()


@cache
def functions_of(path):
    tree = ast.parse((ROOT / path).read_text())
    return {each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_says_what_it_shows_and_its_tests_exist(name):
    row = ROWS[name]
    assert re.fullmatch(r"[A-M][0-9]{2}", name) and row.shown in badinputs.SHOWN
    assert bool(row.tests) == (row.shown in ("all", "otherwise", "some"))
    assert bool(row.lacking) == (row.shown != "all")
    for test in row.tests:
        path, _, function = test.partition("::")
        assert function in functions_of(path), test


def test_a_row_passes_only_if_all_its_tests_did():
    row = badinputs.Row("", "", "", "all", ("a.py::one", "a.py::two"))
    assert badinputs.verdict(row, badinputs.Outcomes(passed={"a.py::one", "a.py::two"})) == "pass"
    assert badinputs.verdict(row, badinputs.Outcomes(passed={"a.py::one"})) == "skipped"
    assert badinputs.verdict(row, badinputs.Outcomes({"a.py::two"}, {"a.py::one", "a.py::two"})) == "FAIL"


def test_every_test_that_the_threats_name_is_there():
    path, numbers = "", []
    for word in re.findall(
        r"`([^`]+)`|(?<= )([0-9]+)(?= `)", (ROOT / "docs" / "THREATS.md").read_text().split("## Tests")[1]
    ):
        name, number = word
        if name.endswith("::"):
            path = name.removesuffix("::")
        elif number:
            numbers.append(int(number))
        else:
            assert name in functions_of(path), f"{path}::{name}"
    assert len(set(numbers)) == len(numbers) > 0


def test_what_counts_the_outcomes_can_be_kept_in_a_set_as_pytest_does_where_tests_come_from_several_folders():
    assert len({badinputs.Outcomes(), badinputs.Outcomes()}) == 2
