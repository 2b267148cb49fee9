"""One line for each export on each backend: how exact, how large and how fast it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any

from ibnorm_export.gate.case import Case
from ibnorm_export.text_report import three_digits
from ibnorm_export.verifier.report import ParityReport

__all__ = ["SummaryRow", "parity_key", "summary_rows", "summary_table"]


@dataclass(frozen=True, slots=True)
class SummaryRow:
    """One export on one backend; None is what the check did not measure.

    Args:
        export: name of the export.
        backend: what ran it.
        dtype: type of the file.
        verdict: fail if the comparison, a limit, a budget or an evaluation failed.
        excess: the largest error of an output, as a share of its tolerance.
        output: that output.
        size_bytes: size of the file with its weights.
        ms: median time of a pass.
        tokens_per_s: tokens per second of a language model.
        samples_per_s: samples per second of another model.
        ratio: time over that of `against`.
        against: what a budget compares the time with.
    """

    export: str
    backend: str
    _: KW_ONLY
    dtype: str
    verdict: str
    excess: float | None = None
    output: str = ""
    size_bytes: int | None = None
    ms: float | None = None
    tokens_per_s: float | None = None
    samples_per_s: float | None = None
    ratio: float | None = None
    against: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def parity_key(export: str, backend: str) -> str:
    """The key of a comparison in `CheckReport.parity`."""
    return f"{export}, {backend}"


def summary_rows(cases: Sequence[Case], parity: Mapping[str, ParityReport]) -> tuple[SummaryRow, ...]:
    """One row for each comparison, with the first time that was measured of the same file on the same backend."""
    sizes = {case.suite: case.figures["size_bytes"] for case in cases if "size_bytes" in case.figures}
    times: dict[str, Mapping[str, Any]] = {}
    red = {case.suite for case in cases if case.red}
    for case in cases:
        if "ms" in case.figures:
            times.setdefault(case.suite, case.figures)
    rows = []
    for key, report in parity.items():
        numeric = report.numeric
        if numeric is None:
            continue
        backend = numeric.backend
        export = key.removesuffix(parity_key("", backend))
        suite = f"{export}.{backend}"
        suites = {f"{export}.static", suite, f"{suite}.layers", f"{suite}.latency", f"{suite}.evaluate"}
        worst = max(numeric.outputs, key=lambda output: output.excess, default=None)
        found = times.get(f"{suite}.latency", {})
        speed = {name: found.get(name) for name in ("ms", "tokens_per_s", "samples_per_s", "against")}
        rows.append(
            SummaryRow(
                export,
                backend,
                dtype=numeric.dtype,
                verdict="pass" if report and not suites & red else "fail",
                excess=None if worst is None else worst.excess,
                output="" if worst is None else worst.name,
                size_bytes=sizes.get(export),
                ratio=found.get("ratio") if found.get("against") else None,
                **speed,
            )
        )
    return tuple(rows)


def summary_table(rows: Sequence[SummaryRow]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The heads and the cells of the rows; what no row has is left out."""
    heads = ("export", "backend", "type", "verdict", "error of tolerance", "MB", "ms", "per second", "speed")
    cells = [
        (
            row.export,
            row.backend,
            row.dtype,
            row.verdict,
            "" if row.excess is None else f"{three_digits(100.0 * row.excess)}%",
            "" if row.size_bytes is None else three_digits(row.size_bytes / 1e6),
            "" if row.ms is None else three_digits(row.ms),
            _rate(row),
            _speed(row),
        )
        for row in rows
    ]
    kept = [index for index in range(len(heads)) if any(row[index] for row in cells)]
    return tuple(heads[index] for index in kept), [tuple(row[index] for index in kept) for row in cells]


def _rate(row: SummaryRow) -> str:
    for value, unit in ((row.tokens_per_s, "tokens"), (row.samples_per_s, "samples")):
        if value is not None:
            return f"{three_digits(value)} {unit}"
    return ""


def _speed(row: SummaryRow) -> str:
    """The ratio in words, e.g. "4.20 times faster than torch"."""
    if not row.ratio:
        return ""
    faster = row.ratio <= 1.0
    times = three_digits(1.0 / row.ratio if faster else row.ratio)
    return f"{times} times {'faster' if faster else 'slower'} than {row.against}"
