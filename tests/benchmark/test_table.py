"""The text and tables of a benchmark: three digits, times faster, passes, and warnings about the machine."""

from __future__ import annotations

import csv
import io

from ibnorm_export.benchmark.measure import _busy_warning, _reliability
from ibnorm_export.benchmark.options import TableFormat
from ibnorm_export.benchmark.report import BenchReport, Latency, Ratio, speed_up
from ibnorm_export.benchmark.table import bench_table


def latency(name: str, ms: float, *, passes: int = 102, variation: float = 0.01) -> Latency:
    times = {"p50_ms": ms, "p90_ms": ms, "p99_ms": ms, "throughput_per_s": 1e3 / ms}
    return Latency(name, passes, **times, variation=variation)


REPORT = BenchReport(
    {"x": (1, 8)},
    1,
    threads=2,
    rounds=34,
    latencies=(latency("ort_cpu", 1.2345), latency("torch", 5.1849)),
    ratios=(Ratio("ort_cpu", "torch", median=1 / 4.2, p25=1 / 4.4, p75=1 / 3.9),),
    environment={},
)


def test_a_ratio_is_times_faster_or_slower() -> None:
    assert speed_up(REPORT.ratios[0]) == "4.20 times faster (3.90 to 4.40)"
    assert speed_up(Ratio("a", "b", median=2.0, p25=1.5, p75=3.0)) == "2.00 times slower (1.50 to 3.00)"
    text = str(REPORT)
    assert "ort_cpu is 4.20 times faster (3.90 to 4.40) than torch; the range is the middle half of 34 rounds" in text


def test_a_busy_machine_is_a_warning() -> None:
    assert _busy_warning(0.4, 2) == ""
    assert "load 3.21 on 2 cores" in _busy_warning(3.214, 2)


def test_percentiles_and_jitter_are_warnings() -> None:
    assert list(_reliability([latency("a", 1.0)], float("inf"))) == []
    found = list(_reliability([latency("a", 1.0, passes=9), latency("b", 1.0, variation=0.8)], float("inf")))
    jitter, few = found
    assert few == "p99 of 9 passes is about the slowest of them; with 100 passes it is a percentile"
    assert jitter.startswith("b: single passes vary by 80% of their mean")
    assert "lock the GPU's clocks" in next(_reliability([latency("a", 1.0, variation=0.02)], 0.01))


def test_markdown() -> None:
    assert bench_table(REPORT, TableFormat.MD).splitlines() == [
        "| candidate | p50 ms | p90 ms | p99 ms | samples/s | passes | ort_cpu against it |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| ort_cpu | 1.23 | 1.23 | 1.23 | 810 | 102 |  |",
        "| torch | 5.18 | 5.18 | 5.18 | 193 | 102 | 4.20 times faster (3.90 to 4.40) |",
    ]


def test_latex_escapes_names() -> None:
    lines = bench_table(REPORT, TableFormat.LATEX).splitlines()
    assert lines[0] == "\\begin{tabular}{lrrrrrr}"
    assert lines[4].startswith("ort\\_cpu & 1.23 & ")
    assert lines[-1] == "\\end{tabular}"
    assert all(line.count("&") == 6 for line in (lines[2], *lines[4:6]))


def test_csv_keeps_every_digit() -> None:
    rows = list(csv.DictReader(io.StringIO(bench_table(REPORT, TableFormat.CSV))))
    assert [float(row["p50 ms"]) for row in rows] == [1.2345, 5.1849]
    assert rows[0]["passes"] == "102"
