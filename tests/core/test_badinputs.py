"""The table of bad inputs names tests that are there, and says what it does not show."""

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
    assert bool(row.tests) == (row.shown in ("all", "some"))
    assert bool(row.lacking) == (row.shown != "all")
    for test in row.tests:
        path, _, function = test.partition("::")
        assert function in functions_of(path), test


def test_a_row_passes_only_if_all_its_tests_did():
    row = badinputs.Row("", "", "", "all", ("a.py::one", "a.py::two"))
    assert badinputs.verdict(row, badinputs.Outcomes(passed={"a.py::one", "a.py::two"})) == "pass"
    assert badinputs.verdict(row, badinputs.Outcomes(passed={"a.py::one"})) == "skipped"
    assert badinputs.verdict(row, badinputs.Outcomes({"a.py::two"}, {"a.py::one", "a.py::two"})) == "FAIL"
