"""Proofs from PTX that the CUDA kernels have no data race, for the sizes given here.

Needs nvcc and `sentryward` (PyPI) on PATH. A proof holds for the stated sizes and every schedule of warps and blocks,
under the tool's default assumptions: arrays do not overlap, and its model of the hardware.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target
from benchmarks.suites.cuda_static import TYPES, ToolMissingError, compile_ptx

__all__ = ["CASES", "Case", "Proof", "entries", "prove", "without_barriers"]

ARCHITECTURE = "sm_100"
_POINTERS = ("x", "skip", "scale", "bias", "y", "sum")
#: Offsets in `Arguments` of row_kernels.cuh.
_ROWS, _COLS, _WARP_VECTORS = 48, 56, 64


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel and launch.

    Args:
        pattern: matches the kernel's mangled name, after the data type.
    """

    name: str
    method: str
    pattern: str
    skip: bool
    rows: int
    cols: int
    threads: int
    blocks: int
    warp_vectors: int = 0


def _cases() -> tuple[Case, ...]:
    found = []
    for skip in (False, True):
        form = "skip" if skip else "plain"
        flag = f"CompressionE1ELb{int(skip)}E"
        found += [
            # 5 rows in 2 blocks of 4: some warps have no row; the last vectors are partly filled.
            Case(f"warp, 1 vector, {form}", "warp", f"row_kernel.*{flag}Li1ELi1ELb0E", skip, 5, 40, 128, 2),
            Case(f"warp, 4 vectors, {form}", "warp", f"row_kernel.*{flag}Li4ELi[12]ELb0E", skip, 5, 1000, 128, 2),
            # Two warps of 129 and 128 vectors, or of 256 each.
            Case(f"block, ragged, {form}", "block", f"row_kernel.*{flag}Li8ELi4ELb1E", skip, 2, 2056, 64, 2, 129),
            Case(f"stream, odd, {form}", "stream", f"stream_kernel.*{flag}", skip, 2, 175, 64, 2),
        ]
    return tuple(found)


CASES = _cases()


@dataclass(frozen=True, slots=True)
class Proof:
    """The verifier's report; `result` is "race_free" for a proof."""

    case: str
    dtype: str
    result: str
    synchronization: str
    memory: str
    seconds: float
    message: str


def entries(ptx: Path) -> list[str]:
    """Names of the kernels of a PTX file."""
    return re.findall(r"\.entry (\w+)\(", ptx.read_text())


def without_barriers(ptx: Path, to: Path) -> None:
    """Write a copy without block barriers, which a proof must reject."""
    text, removed = re.subn(r"^\s*(bar\.sync|barrier\.sync)\s[^;]*;", "", ptx.read_text(), flags=re.MULTILINE)
    if removed == 0:
        raise RuntimeError(f"{ptx} has no barrier")
    to.write_text(text)


def _columns(case: Case, dtype: str) -> int:
    # The same vectors in every type: float32 has half as many elements in one.
    return case.cols // 2 if dtype == "float32" and case.method != "stream" else case.cols


def prove(ptx: Path, case: Case, dtype: str, *, folder: Path, timeout_s: int = 120) -> Proof:
    """Prove one case.

    Raises:
        ToolMissingError: sentryward is not on PATH.
    """
    program = shutil.which("sentryward")
    if program is None:
        raise ToolMissingError("sentryward is not on PATH: pip install sentryward")
    entry = next(e for e in entries(ptx) if re.search(case.pattern, e))
    parameter = f"{entry}_param_0"
    values = [
        (_ROWS, "s64", case.rows),
        (_COLS, "s64", _columns(case, dtype)),
        (_WARP_VECTORS, "s32", case.warp_vectors),
    ]
    arguments: list[dict[str, Any]] = [
        {"parameter": parameter, "offset": o, "type": t, "value": v} for o, t, v in values
    ]
    if case.skip and case.method == "stream":
        # The kernel branches on this pointer, and the tool takes no other value for one.
        arguments.append({"parameter": parameter, "offset": 40, "type": "pointer", "value": None})
    pointers = [n for n in _POINTERS if not (n == "sum" and len(arguments) > 3)]
    config = {
        "schema": "spverify.kernel-input/v1",
        "entry": entry,
        "launch": {"grid_dim": [case.blocks, 1, 1], "block_dim": [case.threads, 1, 1]},
        "declarations": [
            {"name": n, "parameter": parameter, "offset": 8 * _POINTERS.index(n), "type": "pointer"} for n in pointers
        ],
        "arguments": arguments,
    }
    path = folder / "input.json"
    path.write_text(json.dumps(config))
    started = time.monotonic()
    done = subprocess.run(
        [program, str(ptx), "--input", str(path), "--timeout", str(timeout_s)],
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - started
    report = json.loads(done.stdout)
    messages = [str(d.get("message")) for d in report.get("diagnostics", [])]
    return Proof(
        case.name,
        dtype,
        report["result"],
        report["checks"]["synchronization"],
        report["checks"]["memory"],
        round(seconds, 1),
        messages[0] if messages else "",
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add nothing: this suite has no options."""


def measure(options: argparse.Namespace, report: Report) -> None:
    """Prove every case in every type; a control without barriers must fail."""
    report.facts |= {"architecture": ARCHITECTURE}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for dtype in TYPES:
            ptx = folder / f"{dtype}.ptx"
            compile_ptx(dtype, ARCHITECTURE, ptx)
            for case in CASES:
                proof = prove(ptx, case, dtype, folder=folder)
                report.add(_row(f"{case.name}, {dtype}", proof, failed=proof.result != "race_free", case=case))
        broken = folder / "broken.ptx"
        without_barriers(folder / "bfloat16.ptx", broken)
        case = next(c for c in CASES if c.method == "block")
        control = prove(broken, case, "bfloat16", folder=folder)
    report.add(_row("control without barriers", control, failed=control.result == "race_free", case=case))


def _row(name: str, proof: Proof, *, failed: bool, case: Case) -> Row:
    figures = {"failures": Figure(int(failed)), "time": Figure(proof.seconds, "s")}
    details = {"case": asdict(case), "proof": asdict(proof)}
    return Row(name, figures, targets=(Target("failures", 0),), details=details, note=proof.result)
