"""What the node believes about its machine: limits win over counts, and no device is ever replaced in silence."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from node import hardware
from node.hardware import Device, choose_device, measure, usable_threads
from protocol.errors import Code, Refused

TWO = (Device("cuda:0", "A", 8 << 30, True), Device("cuda:1", "B", 8 << 30, True))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with eight processors, and a function that writes its cgroup files."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)

    def with_files(own, files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        (tmp_path / "own").write_text(own)
        return {"cgroups": tmp_path, "own": tmp_path / "own"}

    return with_files


def test_threads_follow_affinity(machine, monkeypatch):
    where = machine("", {})
    assert usable_threads(**where) == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5}, raising=False)
    assert usable_threads(**where) == 1


@pytest.mark.parametrize(
    "quota, threads",
    [("50000 100000", 1), ("150000 100000", 2), ("max 100000", 8), ("9900000 100000", 8), ("nonsense", 8), ("", 8)],
)
def test_threads_follow_the_cgroup_quota_rounded_up(machine, quota, threads):
    assert usable_threads(**machine("0::/a/b\n", {"a/b/cpu.max": quota})) == threads


def test_the_tightest_cgroup_above_the_process_decides(machine):
    where = machine("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "400000 100000"})
    assert usable_threads(**where) == 2


def test_a_version_1_cgroup_counts_too(machine):
    files = {"cpu,cpuacct/x/cpu.cfs_quota_us": "300000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"}
    assert usable_threads(**machine("4:cpu,cpuacct:/x\n", files)) == 3


def test_a_cgroup_path_cannot_leave_the_cgroup_folder(machine):
    assert usable_threads(**machine("0::/../../..\n", {"cpu.max": "100000 100000"})) == 1


def test_memory_is_what_the_cgroup_leaves(machine, tmp_path):
    where = machine("0::/a\n", {"a/memory.max": str(64 << 20), "a/memory.current": str(60 << 20)})
    found = measure(tmp_path / "not" / "yet" / "there", **where)
    assert (found.memory_bytes, found.memory_available_bytes) == (64 << 20, 4 << 20)
    assert found.disk_free_bytes > 0


@pytest.mark.parametrize(
    "wanted, devices, chosen",
    [
        ("auto", (), "cpu"),
        ("auto", TWO, "cuda:0"),
        ("cpu", TWO, "cpu"),
        ("cuda", TWO, "cuda:0"),
        ("cuda:1", TWO, "cuda:1"),
    ],
)
def test_a_device_is_found_by_its_name(wanted, devices, chosen):
    assert choose_device(wanted, devices) == chosen


@pytest.mark.parametrize("wanted", ["cuda:7", "cuda:-1", "cuda:all", "mps", "tpu", "", "auto:0", "cpu:1"])
def test_a_missing_device_is_refused_and_never_replaced(wanted):
    with pytest.raises(Refused) as refused:
        choose_device(wanted, TWO)
    assert refused.value.reason is Code.DEVICE_MISSING and "here: cpu, cuda:0, cuda:1" in refused.value.what


def test_a_cuda_device_is_refused_where_there_is_none():
    with pytest.raises(Refused, match="0 cuda present"):
        choose_device("cuda:7", ())


def test_importing_hardware_does_not_import_torch():
    code = "import sys, node.hardware, node.training; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(("battery", "on_it"), [(None, False), (True, False), (False, True)])
def test_a_machine_is_on_its_battery_when_that_says_so(tmp_path, monkeypatch, battery, on_it):
    told = None if battery is None else SimpleNamespace(percent=80, power_plugged=battery)
    monkeypatch.setattr(hardware.psutil, "sensors_battery", lambda: told, raising=False)
    now = hardware.conditions(tmp_path / "not" / "made")
    assert now.on_battery == on_it and 0 <= now.minute < 1440
    assert now.disk_free_bytes > 0
    monkeypatch.delattr(hardware.psutil, "sensors_battery")
    assert not hardware.conditions(tmp_path).on_battery


@pytest.mark.parametrize(("told", "on_it"), [("u 1", True), ("u 3", True), ("u 2", False), ("u 4", False), ("", False)])
def test_a_line_is_metered_when_networkmanager_says_or_guesses_so(tmp_path, monkeypatch, told, on_it):
    """As busctl prints it, seen with NetworkManager 1.42: 1 and 2 for what its owner said, 3 and 4 for guesses, 0 for neither."""
    (tmp_path / "busctl").write_text(f'#!/bin/sh\ntest "$5" = Metered && echo "{told}"\n')
    (tmp_path / "busctl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert hardware.conditions(tmp_path).on_metered == on_it
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert not hardware.conditions(tmp_path).on_metered


def test_programs_are_seen_by_their_names_while_they_run(tmp_path):
    game = tmp_path / "Barn-Dance.exe"
    shutil.copy(shutil.which("sleep"), game)
    running = subprocess.Popen([game, "60"])
    try:
        wanted = ("barn-dance", "a-game-that-nobody-has")
        assert hardware.conditions(tmp_path, programs=wanted).programs == {"barn-dance"}
    finally:
        running.kill()
        running.wait()
    assert hardware.conditions(tmp_path, programs=wanted).programs == frozenset()


def test_a_machine_is_as_hot_as_its_hottest_processor_or_gpu(tmp_path, monkeypatch):
    """nvidia-smi as its manual says it: a line for each GPU, and [N/A] where one does not tell."""
    monkeypatch.setenv("PATH", str(tmp_path))  # and not the one of this machine

    def sensor(*degrees):
        return [SimpleNamespace(current=each, high=None, critical=None) for each in degrees]

    told = {"coretemp": sensor(61.0, 72.5), "amdgpu": sensor(70.0), "nvme": sensor(93.0)}
    monkeypatch.setattr(hardware.psutil, "sensors_temperatures", lambda: told, raising=False)
    assert hardware.conditions(tmp_path).celsius == 72.5
    assert hardware.conditions(tmp_path, heat=False).celsius is None
    (tmp_path / "nvidia-smi").write_text(
        '#!/bin/sh\ntest "$1" = --query-gpu=temperature.gpu && printf "64\\n[N/A]\\n81\\n"\n'
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert hardware.conditions(tmp_path).celsius == 81
    told.clear()
    assert hardware.conditions(tmp_path).celsius == 81
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' 99\nexit 9\n")
    assert hardware.conditions(tmp_path).celsius is None
    (tmp_path / "nvidia-smi").unlink()
    assert hardware.conditions(tmp_path).celsius is None
    monkeypatch.delattr(hardware.psutil, "sensors_temperatures")
    assert hardware.conditions(tmp_path).celsius is None


def test_what_starts_children_has_no_torch_in_it():
    """Nothing is forked after CUDA: each child is an interpreter of its own, and who starts them opens no device."""
    code = "import sys, node.daemon; sys.exit(bool({'torch', 'hivemind', 'multiprocessing.popen_fork'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_process_that_averages_opens_no_device():
    code = "import torch, node.swarm; assert not torch.cuda.is_initialized()"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_what_a_folder_takes_is_counted_without_the_part_that_is_counted_elsewhere(tmp_path):
    for name, size in (("a", 5), ("b/c", 7), ("blobs/x", 1000), ("blobs/y/z", 1000), ("b/blobs", 11)):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "link").symlink_to("/usr")
    assert hardware.bytes_of(tmp_path, but=tmp_path / "blobs") == 23, "no link is followed"
