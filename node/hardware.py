"""What this machine offers: threads, memory, disk and accelerators. Imports torch only in a child of its own."""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from node.core.schedule import Conditions
from protocol.errors import Code, Refused
from protocol.limits import DISK_FREE_BYTES_MIN

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_UNLIMITED_BYTES = 1 << 60  # cgroup v1 writes about 2^63 for "no limit"
_MANAGER = "org.freedesktop.NetworkManager"
_METERED = ("busctl", "get-property", _MANAGER, "/org/freedesktop/NetworkManager", _MANAGER, "Metered")
_METERED_SECONDS = 2.0
_NVIDIA = ("nvidia-smi", "--query-gpu=temperature.gpu", "--format=csv,noheader,nounits")
_NVIDIA_SECONDS = 4.0  # it loads the driver where nothing else has
# As the kernel names their sensors.
_PROCESSORS = frozenset({"coretemp", "k10temp", "zenpower", "cpu_thermal", "amdgpu"})


@dataclass(frozen=True)
class Device:
    """One accelerator, by the name that torch gives it."""

    name: str  # cuda:0, mps
    title: str
    memory_bytes: int
    bf16: bool


@dataclass(frozen=True)
class Machine:
    """What may be used here, with the limits of affinity and cgroups taken off."""

    threads: int
    memory_bytes: int
    memory_available_bytes: int
    disk_free_bytes: int
    processor: str
    system: str


def measure(folder: Path, *, cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> Machine:
    """`folder` is where this program would write; its disk is the one that counts."""
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    for limit, used in _memory_limits(cgroups, own):
        total, available = min(total, limit), min(available, max(0, limit - used))
    return Machine(
        threads=usable_threads(cgroups=cgroups, own=own),
        memory_bytes=total,
        memory_available_bytes=available,
        disk_free_bytes=shutil.disk_usage(_existing(folder)).free,
        processor=platform.processor() or platform.machine(),
        system=f"{platform.system()} {platform.release()}",
    )


def bytes_of(folder: Path, *, but: Path) -> int:
    """What the files below a folder take, without those below `but`."""
    total = 0
    for at, folders, names in os.walk(folder):
        folders[:] = [each for each in folders if Path(at, each) != but]
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(at, name).lstat().st_size
    return total


def has_room(folder: Path) -> bool:
    """Whether its disk has more left than we leave to other programs."""
    return shutil.disk_usage(_existing(folder)).free >= DISK_FREE_BYTES_MIN


def conditions(folder: Path, *, heat: bool = True, programs: Collection[str] = ()) -> Conditions:
    """How things are now; a machine without a battery, or whose system does not tell, is not on it; the same of its line.

    Without `heat` nobody is asked how hot it is. `programs` are looked for, in small letters and without ".exe"."""
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    clock = time.localtime()
    return Conditions(
        minute=clock.tm_hour * 60 + clock.tm_min,
        on_battery=battery is not None and battery.power_plugged is False,
        on_metered=_is_metered(),
        celsius=_celsius() if heat else None,
        disk_free_bytes=shutil.disk_usage(_existing(folder)).free,
        programs=frozenset(programs) & _running() if programs else frozenset(),
    )


def _running() -> set[str]:
    """Names of all processes that this user may see."""
    names = (each.info["name"] or "" for each in psutil.process_iter(["name"]))
    return {name.lower().removesuffix(".exe") for name in names}


def _is_metered() -> bool:
    """Whether NetworkManager knows, or guesses, that the line costs what goes over it."""
    return _told(*_METERED, seconds=_METERED_SECONDS).strip() in ("u 1", "u 3")


def _celsius() -> float | None:
    """Of the hottest processor or GPU."""
    sensors = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    found = [each.current for name in _PROCESSORS & set(sensors) for each in sensors[name]]
    told = _told(*_NVIDIA, seconds=_NVIDIA_SECONDS).split()
    return max([*found, *(float(each) for each in told if each.isdecimal())], default=None)  # some GPUs say [N/A]


def _told(*command: str, seconds: float) -> str:
    """What a program of this machine prints; nothing where there is none, where it fails or takes too long."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout if ended.returncode == 0 else ""


def usable_threads(*, cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> int:
    """Processors that this process may run on, and no more than its cgroups grant time for."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, min([count, *(math.ceil(quota) for quota in _quotas(cgroups, own))]))


def torch_devices() -> tuple[Device, ...]:
    """What torch can use; only for a process that may open accelerators."""
    import torch

    found = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append(
                Device(f"cuda:{index}", properties.name, properties.total_memory, bf16=properties.major >= 8)
            )  # before Ampere bf16 is emulated, and slower than fp32
    if torch.backends.mps.is_available():
        found.append(Device("mps", platform.processor() or "Apple GPU", psutil.virtual_memory().total, bf16=False))
    return tuple(found)


def choose_device(wanted: str, devices: Sequence[Device]) -> str:
    """The torch name of what the volunteer asked for; never something else in its place."""
    kind, _, number = wanted.partition(":")
    same_kind = [device.name for device in devices if device.name.partition(":")[0] == kind]
    match kind, number:
        case "auto", "":
            return devices[0].name if devices else "cpu"
        case "cpu", "":
            return "cpu"
        case "cuda" | "mps", "" if same_kind:
            return same_kind[0]
        case "cuda", _ if wanted in same_kind:
            return wanted
    present = ", ".join(["cpu", *(device.name for device in devices)])
    raise Refused(
        Code.DEVICE_MISSING, f"device {wanted!r} not found ({len(same_kind)} {kind} present); here: {present}"
    )


def check_device(needed: int, name: str, devices: Sequence[Device], *, cap: int | None) -> None:
    """Refuse what an accelerator of this name cannot hold, or may not."""
    for device in devices:
        whole = device.memory_bytes if cap is None else min(cap, device.memory_bytes)
        if device.name == name and needed > whole:
            of = "it has" if whole == device.memory_bytes else "max_vram leaves"
            what = f"training needs {needed:,} bytes of {name}, {device.title}, {of} {whole:,}"
            raise Refused(Code.MODEL_TOO_LARGE, what)


def _quotas(cgroups: Path, own: Path) -> Iterator[float]:
    """Processors' worth of time, from every cgroup above this process."""
    for folder in _own_folders(cgroups, own):
        quota, period = [*_words(folder / "cpu.max"), "", ""][:2]  # version 2: "150000 100000" or "max 100000"
        if not quota:
            quota = "".join(_words(folder / "cpu.cfs_quota_us"))  # version 1: -1 is no quota
            period = "".join(_words(folder / "cpu.cfs_period_us"))
        if quota.isdigit() and period.isdigit() and int(quota) and int(period):
            yield int(quota) / int(period)


def _memory_limits(cgroups: Path, own: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) bytes of every cgroup above this process that has a limit."""
    names = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    for folder in _own_folders(cgroups, own):
        for limit_name, used_name in names:
            limit, used = ("".join(_words(folder / name)) for name in (limit_name, used_name))
            if limit.isdigit() and used.isdigit() and int(limit) < _UNLIMITED_BYTES:
                yield int(limit), int(used)


def _own_folders(cgroups: Path, own: Path) -> Iterator[Path]:
    """The folders of this process's cgroups and of all above them, each once."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    seen = set()
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        top = cgroups / controllers if controllers else cgroups
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            folder = top.joinpath(*parts[:depth])
            if folder not in seen:
                seen.add(folder)
                yield folder


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder
