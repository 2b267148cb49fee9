"""The table of a benchmark as Markdown, LaTeX or CSV, for papers and issues."""

from __future__ import annotations

import csv
import io
from typing import Final

from ibnorm_export.benchmark.options import TableFormat
from ibnorm_export.benchmark.report import LATENCY_COLUMNS, BenchReport, speed_up
from ibnorm_export.text_report import three_digits

__all__ = ["bench_table"]


_LATEX: Final = {
    "&": r"\&",
    "%": r"\%",
    "_": r"\_",
    "#": r"\#",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
    "\\": r"\textbackslash{}",
}


def bench_table(report: BenchReport, form: TableFormat) -> str:
    """Return the latencies of a benchmark as a table, with the speed of the first candidate against each other one.

    Args:
        report: the result of `bench`.
        form: Markdown, LaTeX or CSV.
    """
    ratios = {ratio.against: ratio for ratio in report.ratios}
    first = report.latencies[0].name if report.latencies else "the first"
    head = [*LATENCY_COLUMNS, f"{first} against it"]
    digits = repr if form is TableFormat.CSV else three_digits
    rows = [
        [
            x.name,
            *map(digits, (x.p50_ms, x.p90_ms, x.p99_ms, x.throughput_per_s)),
            str(x.passes),
            speed_up(ratios[x.name]) if x.name in ratios else "",
        ]
        for x in report.latencies
    ]
    if form is TableFormat.CSV:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([head, *rows])
        return text.getvalue().rstrip("\n")
    if form is TableFormat.MD:
        shown = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
        rule = "|".join(["---", *["---:"] * (len(head) - 1)])
        lines = [f"| {' | '.join(row)} |" for row in shown]
        return "\n".join([lines[0], f"|{rule}|", *lines[1:]])
    cells = [["".join(_LATEX.get(sign, sign) for sign in cell) for cell in row] for row in (head, *rows)]
    body = [f"{' & '.join(row)} \\\\" for row in cells]
    columns = "l" + "r" * (len(head) - 1)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}"])
