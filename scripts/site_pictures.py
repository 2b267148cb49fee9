"""The pictures of the documentation: python -m scripts.site_pictures writes docs/assets/way*.svg.

Plots are drawn when the site is built: those of the operator from the reference in float64, those of the endpoint from
benchmarks/results.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, Final

import numpy as np

from ibnorm_export.op.reference import ibnorm
from ibnorm_export.op.spec import Compression, IBNormSpec

__all__ = ["DRAWN", "PLOTS", "load_rows", "way"]

ROOT: Final = Path(__file__).resolve().parents[1]
ASSETS: Final = ROOT / "docs" / "assets"

#: Steps of the way from a checkpoint to an endpoint: the name, what it is, and its colour.
_STEPS: Final = (
    ("Your checkpoint", ("nanoGPT, GaLore, timm,", "transformers, your code"), "#5c6bc0"),
    ("One ONNX file", ("every norm is one node,", "with its definition inside"), "#3949ab"),
    ("Verdict", ("held to PyTorch in float64:", "every weight, every output"), "#00796b"),
    ("Endpoint", ("browser, C++, OpenVINO,", "OpenAI API, Triton"), "#ad1457"),
)
_COMMANDS: Final = ("export", "verify", "serve")


def way(*, narrow: bool) -> str:
    """The way from a checkpoint to an endpoint: in a row, or for a phone in a column."""
    width, height, gap = 236, 104, 84
    across = len(_STEPS) * width + (len(_STEPS) - 1) * gap
    down = len(_STEPS) * height + (len(_STEPS) - 1) * 60
    size = (330, down) if narrow else (across, height)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-4 -4 {size[0] + 8} {size[1] + 8}" '
        'font-family="system-ui, sans-serif" text-anchor="middle" role="img">',
        "<title>A checkpoint becomes an ONNX file by export, passes verify, and runs in an endpoint by serve</title>",
    ]
    for index, (name, lines, colour) in enumerate(_STEPS):
        x, y = (0, index * (height + 60)) if narrow else (index * (width + gap), 0)
        box = size[0] if narrow else width
        middle = x + box / 2
        parts.append(f'<rect x="{x}" y="{y}" width="{box}" height="{height}" rx="12" fill="{colour}"/>')
        parts.append(f'<text x="{middle}" y="{y + 36}" fill="#fff" font-size="19" font-weight="600">{name}</text>')
        for row, line in enumerate(lines):
            parts.append(f'<text x="{middle}" y="{y + 62 + 20 * row}" fill="#fff" font-size="14">{line}</text>')
        if index < len(_COMMANDS):
            parts += _arrow(middle, x + box, y, narrow=narrow, gap=gap, height=height, label=_COMMANDS[index])
    return "\n".join([*parts, "</svg>"]) + "\n"


def _arrow(middle: float, right: float, y: float, *, narrow: bool, gap: int, height: int, label: str) -> list[str]:
    """An arrow from one step to the next, in a grey that shows on white and on black."""
    style = 'stroke="#808590" stroke-width="2.5" fill="none"'
    text = 'font-size="15" font-family="ui-monospace, monospace" fill="#808590"'
    if narrow:
        start, end = y + height + 6, y + height + 52
        return [
            f'<path d="M{middle} {start}V{end}m-7 -8l7 8l7 -8" {style}/>',
            f'<text x="{middle + 14}" y="{(start + end) / 2 + 5}" text-anchor="start" {text}>{label}</text>',
        ]
    line = y + height / 2
    return [
        f'<path d="M{right + 8} {line}H{right + gap - 8}m-8 -7l8 7l-8 7" {style}/>',
        f'<text x="{right + gap / 2}" y="{line - 12}" {text}>{label}</text>',
    ]


#: Colours of S, L and T that differ from both backgrounds and from each other in any kind of sight.
_COLOURS: Final = {Compression.LINEAR: "#808590", Compression.LOGARITHMIC: "#e69f00", Compression.TANH: "#56b4e9"}
_NAMES: Final = {Compression.LINEAR: "S", Compression.LOGARITHMIC: "L", Compression.TANH: "T"}


#: Width of a plot in inches: on a phone of 390 px it is not scaled down, so its text stays above 11 px.
WIDTH: Final = 4.9


def _axes(plt: Any, *, dark: bool) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(WIDTH, 3.2), layout="constrained")
    figure.patch.set_alpha(0)
    _style(axes, dark=dark)
    return figure, axes


def _style(axes: Any, *, dark: bool) -> None:
    ink = "#dfe1e8" if dark else "#26282f"
    axes.patch.set_alpha(0)
    axes.tick_params(colors=ink, labelsize=11)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)
    axes.grid(color=ink, alpha=0.15)
    axes.xaxis.label.set(color=ink, size=12)
    axes.yaxis.label.set(color=ink, size=12)


def _finish(plt: Any, figure: Any, axes: Any, **place: Any) -> bytes:
    axes.legend(frameon=False, labelcolor=axes.xaxis.label.get_color(), fontsize=12, handlelength=3, **place)
    out = io.BytesIO()
    with plt.rc_context({"svg.hashsalt": "ibnorm-export"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    return out.getvalue()


def _row(kind: Compression, values: np.ndarray, *, lambd: float) -> np.ndarray:
    return ibnorm(values, None, bias=None, spec=IBNormSpec(kind, lambd, epsilon=0.0))


def compressions(plt: Any, *, dark: bool) -> bytes:
    """Output of each norm over its centred input, for one row of evenly spaced values."""
    values = np.linspace(-6.0, 6.0, 1201)
    figure, axes = _axes(plt, dark=dark)
    for kind, colour in _COLOURS.items():
        axes.plot(values, _row(kind, values, lambd=1.0), color=colour, linewidth=2.5, label=f"IBNorm-{_NAMES[kind]}")
    axes.set(xlabel="centred input, in units of lambda", ylabel="output")
    return _finish(plt, figure, axes)


def outliers(plt: Any, *, dark: bool) -> bytes:
    """Where the other values of a row are, when one value is an outlier."""
    sizes = np.geomspace(1.0, 1000.0, 61)
    rest = np.random.default_rng(0).standard_normal(255)
    figure, axes = _axes(plt, dark=dark)
    for kind, colour in _COLOURS.items():
        spread = [float(_row(kind, np.append(rest, size), lambd=1.0)[:-1].std()) for size in sizes]
        axes.plot(sizes, spread, color=colour, linewidth=2.5, label=f"IBNorm-{_NAMES[kind]}")
    axes.set(xscale="log", xlabel="one outlier, in standard deviations of the others", ylabel="spread of the others")
    return _finish(plt, figure, axes)


def lambdas(plt: Any, *, dark: bool) -> bytes:
    """How lambda changes L: from almost linear to almost a step."""
    values = np.linspace(-4.0, 4.0, 801)
    figure, axes = _axes(plt, dark=dark)
    for lambd, colour in ((0.1, "#d55e00"), (1.0, "#e69f00"), (10.0, "#808590")):
        axes.plot(
            values, _row(Compression.LOGARITHMIC, values, lambd=lambd), color=colour, linewidth=2.5, label=f"{lambd:g}"
        )
    axes.set(xlabel="centred input", ylabel="output of IBNorm-L")
    return _finish(plt, figure, axes)


def load_rows(setting: str) -> list[dict[str, float]]:
    """The recorded figures of the text endpoint under load, by the setting of `--max-waiting`."""
    record = json.loads((ROOT / "benchmarks" / "results" / "serving_load.json").read_text(encoding="utf-8"))
    return [
        {name: figure["value"] for name, figure in row["figures"].items()}
        for row in record["rows"]
        if row["details"]["max_waiting"] == setting
    ]


def load(plt: Any, *, dark: bool) -> bytes:
    """Latency of the text endpoint, and the share of texts that it refuses, over the offered load."""
    figure, (times, refused) = plt.subplots(
        2, 1, figsize=(WIDTH, 5.6), sharex=True, layout="constrained", height_ratios=(5, 2)
    )
    figure.patch.set_alpha(0)
    for axes in (times, refused):
        _style(axes, dark=dark)
    for setting, colour, name in (("no limit", "#56b4e9", ""), ("1", "#e69f00", ", --max-waiting 1")):
        rows = load_rows(setting)
        offered = [row["offered"] for row in rows]
        for title, line in (("whole text", "--"), ("first token", "-")):
            values = [row[f"{title}, p90"] for row in rows]
            times.plot(offered, values, line, color=colour, linewidth=2.5, marker="o", label=f"{title}{name}")
        refused.plot(offered, [row["refused"] for row in rows], color=colour, linewidth=2.5, marker="o")
    times.set(yscale="log", ylabel="ms, nine texts in ten")
    times.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    refused.set(xlabel="offered texts per second", ylabel="refused, %")
    return _finish(plt, figure, times, loc="lower left", bbox_to_anchor=(0.0, 1.0))


PLOTS: Final = {"compressions": compressions, "outliers": outliers, "lambdas": lambdas, "load": load}
DRAWN: Final = {"way.svg": False, "way-narrow.svg": True}


def main() -> None:
    """Write the pictures that the README shows too."""
    for name, narrow in DRAWN.items():
        (ASSETS / name).write_text(way(narrow=narrow), encoding="utf-8")


if __name__ == "__main__":
    main()
