"""The distribution: its names are ours alone, and what it needs is what it says."""

import ast
import gc
import importlib
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("node", "coordinator", "protocol")
DISTRIBUTION_OF = {
    "google": "protobuf",
    "grpc": "grpcio",
    "grpc_tools": "grpcio-tools",
    "annotated_types": "pydantic",
    "pydantic_core": "pydantic",
}


def plain(requirement):
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")


def tree(path):
    """Parsed while nothing is collected: a finalizer of another test's that fails has its traceback formatted, which parses
    as well, and Python 3.11.2 takes the one for the other (SystemError)."""
    gc.disable()
    try:
        return ast.parse(path.read_text())
    finally:
        gc.enable()


def imported(package):
    """Names at the root of every import in a package, wherever in a file it stands."""
    for path in (ROOT / package).rglob("*.py"):
        for statement in ast.walk(tree(path)):
            if isinstance(statement, ast.Import):
                yield from (alias.name.split(".")[0] for alias in statement.names)
            elif isinstance(statement, ast.ImportFrom) and statement.level == 0:
                yield statement.module.split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_other_installed_distribution_owns_our_package_names(package):
    owners = set(importlib.metadata.packages_distributions().get(package, [])) - {"barnraise"}
    assert not owners
    assert Path(importlib.import_module(package).__file__).is_relative_to(ROOT)


def test_every_import_is_a_declared_dependency_and_every_dependency_is_imported():
    outside = {name for package in PACKAGES for name in imported(package)} - set(PACKAGES) - sys.stdlib_module_names
    used = {DISTRIBUTION_OF.get(name, name).lower().replace("_", "-") for name in outside}
    declared = {plain(line) for line in PROJECT["dependencies"]}
    development = {plain(line) for line in PROJECT["optional-dependencies"]["dev"]}
    assert used - declared - development == set()
    assert declared - used == set()


def test_every_dependency_has_an_exact_version_among_the_constraints():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {plain(line) for line in lines}
    for wanted in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        assert {plain(line) for line in wanted} <= pinned
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines)


def locked(name):
    """The packages of a lock file: name, version, hashes."""
    blocks = re.split(r"\n(?=[a-z])", (ROOT / "deploy" / name).read_text().split("\n", 1)[1].strip())
    entry = re.compile(r"([a-z0-9-]+)==([0-9][0-9a-z.]*)[^\\\n]*((?: \\\n    --hash=sha256:[0-9a-f]{64})+)")
    return [entry.fullmatch(block).groups() for block in blocks]


def test_the_images_take_every_package_by_hash_in_the_version_that_was_tested():
    packages, of_torch = locked("requirements.lock"), locked("torch.lock")
    names = [name for name, _, _ in packages + of_torch]
    assert len(set(names)) == len(names)
    assert {plain(line) for line in PROJECT["dependencies"]} | {"hatchling"} <= set(names)
    assert all(re.match(r"torch$|triton$|nvidia-|cuda-", name) for name, _, _ in of_torch)
    constraints = dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert {name: constraints.get(name, version) for name, version, _ in packages + of_torch} == {
        name: version for name, version, _ in packages + of_torch
    }


@pytest.mark.parametrize(("script", "target"), PROJECT["scripts"].items())
def test_every_command_leads_to_a_function(script, target):
    module, function = target.split(":")
    found = tree(ROOT / (module.replace(".", "/") + ".py"))
    assert function in {statement.name for statement in found.body if isinstance(statement, ast.FunctionDef)}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_that_it_is_typed(package):
    assert (ROOT / package / "py.typed").is_file()


def test_the_vendored_chart_keeps_its_licence():
    assert "Leon Sorokin" in (ROOT / "coordinator/web/uPlot.LICENSE").read_text()


UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "np.load", "numpy.load"}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_code_of_ours_can_run_what_it_reads(package):
    """BAD_INPUTS D19 and S5: nothing is unpickled, evaluated or handed to a shell."""
    assert not UNSAFE_MODULES & set(imported(package))
    for path in (ROOT / package).rglob("*.py"):
        for call in (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)):
            assert ast.unparse(call.func) not in UNSAFE_CALLS, f"{path}:{call.lineno}"
            assert not any(each.arg == "shell" for each in call.keywords), f"{path}:{call.lineno}"
