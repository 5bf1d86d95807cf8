"""The files in deploy/: as far as they can be checked without an engine to run them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from protocol import runspec
from protocol.errors import Exit

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
DOCKERFILES = sorted(path for path in DEPLOY.glob("Dockerfile.*") if path.suffix != ".dockerignore")
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def settings(unit, key):
    return re.findall(rf"^{key}=(.*)$", unit.read_text(), re.MULTILINE)


def instructions(dockerfile):
    lines = dockerfile.read_text().replace("\\\n", " ").splitlines()
    return [line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#")]


def test_each_side_has_its_files():
    assert [unit.name for unit in UNITS] == [
        "barnraise-coordinator.service",
        "barnraise-node.service",
        "barnraise-node.user.service",
    ]
    assert [path.suffix for path in DOCKERFILES] == [".coordinator", ".node"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.suffix)
def test_an_image_installs_nothing_that_was_not_locked_but_torch_from_an_index_that_its_builder_named(dockerfile):
    (steps,) = [step[1] for step in instructions(dockerfile) if "pip install" in step[1]]
    get = re.search(r'get="([^"]+)"', steps).group(1)
    assert get.endswith("--no-deps") and steps.count("pip install") == 1
    assert re.findall(r"\$get ([^;&]*[^;& ])", steps) == [
        '-c constraints.txt --index-url "$TORCH_INDEX" torch',
        "--require-hashes -r torch.lock",
        "--require-hashes -r requirements.lock",
        "--no-build-isolation .",
    ]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_has_nothing_to_say_about_a_unit(unit, tmp_path):
    name = unit.name.replace(".user.service", ".service")
    there = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit.read_text(), flags=re.MULTILINE)
    (tmp_path / name).write_text(there)  # verify wants the program to exist
    found = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / name)], capture_output=True, text=True, timeout=60
    )
    assert (found.returncode, [line for line in found.stderr.splitlines() if name in line]) == (0, [])


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_restarts_only_after_a_crash_a_network_failure_or_a_fault_of_ours(unit):
    assert settings(unit, "Restart") == ["on-abnormal"]
    assert settings(unit, "RestartForceExitStatus") == [f"{Exit.NETWORK.value} {Exit.INTERNAL.value}"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_lets_the_round_end_and_gains_no_rights(unit):
    assert settings(unit, "KillMode") == ["mixed"]
    assert settings(unit, "NoNewPrivileges") == ["yes"]
    assert "root" not in settings(unit, "User")


def test_the_run_file_of_the_compose_file_is_accepted():
    spec = runspec.load(DEPLOY / "run.toml")
    assert spec.coordinator.addresses == ("coordinator:49300",)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_copies_what_exists_and_does_not_run_as_root(dockerfile):
    steps = instructions(dockerfile)
    copies = [step[1] for step in steps if step[0] == "COPY" and not step[1].startswith("--from=")]
    copied = [name for copy in copies for name in copy.split()[:-1]]
    for name in copied:
        assert (ROOT / name).exists(), name
    ignored = (DEPLOY / f"{dockerfile.name}.dockerignore").read_text().splitlines()
    assert ignored[0] == "*" and {f"!{name}" for name in copied} <= set(ignored)
    users = [step[1] for step in steps if step[0] == "USER"]
    assert users and all(re.fullmatch(r"[1-9]\d*:[1-9]\d*", user) for user in users)
    last_stage = max(index for index, step in enumerate(steps) if step[0] == "FROM")
    assert "USER" in {step[0] for step in steps[last_stage:]}


def test_the_compose_file_brings_up_a_coordinator_and_two_nodes_without_rights():
    services = COMPOSE["services"]
    assert services["node"]["deploy"]["replicas"] == 2
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"] and service["read_only"] is True, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file(), name
        assert not {"privileged", "cap_add", "user", "pid", "devices"} & set(service), name
        for needed in service.get("depends_on", {}):
            assert needed in services
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source.startswith("/") or source in COMPOSE["volumes"] or (DEPLOY / source).is_file(), volume


def test_the_page_of_the_compose_file_is_published_on_loopback_only():
    page = [port for port in COMPOSE["services"]["coordinator"]["ports"] if port.endswith(":49301")]
    assert page == ["127.0.0.1:49301:49301"]


def test_the_invite_reaches_the_nodes_by_a_volume_that_they_cannot_write():
    services = COMPOSE["services"]
    assert "invite:/invite" in services["invite"]["volumes"]
    assert "invite:/invite:ro" in services["node"]["volumes"]
