"""The number of cores that a process may use: its affinity, cores and not threads, and quotas of both versions."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from ibnorm_export.benchmark.options import BenchOptions
from ibnorm_export.runtimes.ort import session_options
from ibnorm_export.usable_cores import default_threads, usable_cores

affinity = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinity")


def machine(root: Path, siblings: list[str], files: dict[str, str]) -> Path:
    """A folder with /proc and /sys of a machine whose logical processors share cores as `siblings` says."""
    for number, shared in enumerate(siblings):
        files[f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list"] = f"{shared}\n"
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)


@affinity
def test_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.sched_getaffinity(0)
    assert 1 <= usable_cores() <= len(allowed)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert usable_cores() == 1
        assert BenchOptions().thread_count == 1
        assert BenchOptions(threads=3).thread_count == 3
        machine_has = psutil.cpu_count(logical=False) or 1
        assert default_threads() == (1 if machine_has > 1 else None)
        assert session_options(None, None).intra_op_num_threads == (1 if machine_has > 1 else 0)
        assert session_options(3, None).intra_op_num_threads == 3
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "350000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "9900000 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "100000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/hidden\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, 4),
        (
            {
                "proc/self/cgroup": "3:cpuset:/\n2:cpu,cpuacct:/d\n",
                "sys/fs/cgroup/cpu,cpuacct/d/cpu.cfs_quota_us": "150000\n",
                "sys/fs/cgroup/cpu,cpuacct/d/cpu.cfs_period_us": "50000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "2:cpu,cpuacct:/d\n",
                "sys/fs/cgroup/cpu,cpuacct/d/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/d/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
    ],
)
def test_quotas(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    """Eight logical processors on four cores, in a container."""
    assert usable_cores(machine(tmp_path, ["0,4", "1,5", "2,6", "3,7"] * 2, dict(files))) == cores


@pytest.mark.usefixtures("eight")
def test_without_the_topology_each_processor_is_a_core(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == 8
