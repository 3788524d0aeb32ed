"""What this machine says of itself: a measurement is worth little without it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dvexport.profile.result import DeviceInfo
from dvexport.targets.catalogue import load, names, runs_here

__all__ = ["device_info", "processor"]

_CPU_KEYS = ("model name", "Model", "Hardware", "cpu model")
"""Keys of /proc/cpuinfo that name the processor, by architecture, the best first."""


def processor(root: Path = Path("/")) -> str:
    """Return the processor's name; `root` is where `/proc` is."""
    return _cpu_name(_lines(root / "proc/cpuinfo"))


def device_info(threads: int, runtime: tuple[str, str], target: str, root: Path = Path("/")) -> DeviceInfo:
    """Return the processor, its clock settings and temperature; None for what the system does not tell.

    Args:
        threads: that the runtime was given.
        runtime: its name and version.
        target: what the artifact was made for, by its name in the catalogue.
        root: where `/proc` and `/sys` are.
    """
    cpuinfo = _lines(root / "proc/cpuinfo")
    return DeviceInfo(
        cpu=_cpu_name(cpuinfo),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=threads,
        runtime=runtime[0],
        runtime_version=runtime[1],
        os=f"{platform.system()} {platform.release()}",
        governor=_governor(root),
        frequencies_mhz=_frequencies(root, cpuinfo),
        temperature_c=_temperature(root),
        is_target=runs_here(load(target).cpu) if target in names() else None,
    )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _fields(cpuinfo: list[str]) -> Iterator[tuple[str, str]]:
    for line in cpuinfo:
        key, _, value = line.partition(":")
        yield key.strip(), value.strip()


def _cpu_name(cpuinfo: list[str]) -> str:
    known = dict(_fields(cpuinfo))
    found = (known[key] for key in _CPU_KEYS if known.get(key))
    return next(found, platform.processor() or platform.machine())


def _cpus(root: Path) -> list[Path]:
    folders = (root / "sys/devices/system/cpu").glob("cpu[0-9]*")
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("cpu")))


def _governor(root: Path) -> str | None:
    """Return the frequency governor, all of them where cores differ."""
    found = dict.fromkeys(line for cpu in _cpus(root) for line in _lines(cpu / "cpufreq/scaling_governor")[:1])
    return ", ".join(found) or None


def _frequencies(root: Path, cpuinfo: list[str]) -> list[float] | None:
    kilohertz = [line for cpu in _cpus(root) for line in _lines(cpu / "cpufreq/scaling_cur_freq")[:1]]
    with suppress(ValueError):
        if kilohertz:
            return [int(text) / 1e3 for text in kilohertz]
        return [float(value) for key, value in _fields(cpuinfo) if key == "cpu MHz"] or None
    return None


def _temperature(root: Path) -> float | None:
    """Return the hottest sensor, which is what throttles."""
    values = []
    for zone in (root / "sys/class/thermal").glob("thermal_zone*"):
        with suppress(ValueError, OSError):
            values.append(int((zone / "temp").read_text()) / 1e3)
    return max(values, default=None)
