"""How many cores this process may use, which is often fewer than the machine has.

An affinity (taskset, a batch system) leaves some cores to others; a quota of a control group (a container) leaves some
of the time. More threads than that wait for each other.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil

__all__ = ["default_threads", "usable_cores"]

_ROOT: Final = Path("/")


def _physical(processors: set[int], root: Path) -> int:
    """Number of cores that have at least one of these logical processors."""
    cores = set()
    for number in processors:
        file = root / f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list"
        try:
            cores.add(file.read_text(encoding="ascii").strip())
        except (OSError, ValueError):  # not Linux, or hidden: count each processor as a core
            cores.add(str(number))
    return len(cores)


def _quota_files(root: Path) -> Iterator[tuple[Path, Path | None]]:
    """The files that may limit this process: cpu.max of version 2, or a quota and its period of version 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, controllers, place = (*line.split(":", 2), "", "")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controllers if controllers else "")
        # the namespace of a container may hide where its group is: the limit is then at the top
        for parent in (Path(place), *Path(place).parents):
            folder = top / str(parent).lstrip("/")
            if controllers:
                yield folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"
            else:
                yield folder / "cpu.max", None


def _quota(root: Path) -> float:
    """Cores' worth of time that the control groups of this process leave it; infinity without a limit."""
    smallest = math.inf
    for file, period_file in _quota_files(root):
        try:
            words = file.read_text(encoding="ascii").split()
            if period_file is not None:
                words += period_file.read_text(encoding="ascii").split()
            quota, period = float(words[0]), float(words[1])
        except (OSError, ValueError, IndexError):  # no such group, or "max": no limit
            continue
        if quota > 0.0 and period > 0.0:  # version 1 writes -1 for no limit
            smallest = min(smallest, quota / period)
    return smallest


def usable_cores(root: Path = _ROOT) -> int:
    """Return the number of physical cores that this process may use, at least 1.

    Args:
        root: where /proc and /sys are.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst (cpu.cfs_quota_us).
    """
    if hasattr(os, "sched_getaffinity"):
        cores = _physical(os.sched_getaffinity(0), root)
    else:
        cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return max(1, math.floor(min(cores, _quota(root))))


def default_threads() -> int | None:
    """Return how many threads a runtime should have unless the user sets a number; None leaves the choice to it.

    A runtime counts the cores of the machine, so where fewer may be used, its threads would wait for each other.
    """
    cores = usable_cores()
    return cores if cores < (psutil.cpu_count(logical=False) or 1) else None
