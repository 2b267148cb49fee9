"""Every family and preset of the paper, exported and verified with random weights: one row each.

A full run takes hours on two cores, 17 GB of disk and 12 GB of memory. Rows that the record already holds are kept, so
an interrupted run continues where it stopped. "fused only" is a file that is within its tolerance with fused kernels
but not with functions. timm's models are left out, by name, if timm is not installed.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target
from ibnorm_export import NormConfig, models, replace_norms
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.errors import IBNormError
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.models.registry import FAMILIES
from ibnorm_export.op.spec import Compression
from ibnorm_export.verifier.verify import VerifyOptions, verify

#: Classifiers of timm, saved as its own folders.
TIMM = ("vit_small_patch16_224", "vit_base_patch16_224", "resnet18", "resnet50")

#: Over which values a convolutional network takes its statistics; a transformer takes them over the last axis.
GROUPINGS: dict[str, dict[str, Any]] = {
    "channels": {},
    "(C, H, W)": {"grouping": "axes", "axis": 1},
    "batch": {"grouping": "batch"},
}

BASELINES = {"llama": "rmsnorm", "gpt2": "layernorm", "vit": "layernorm", "resnet": "batchnorm"}


def names() -> list[str]:
    """Presets, and timm's models by "timm/ARCHITECTURE"."""
    presets = [f"{family.name}-{size}" for family in FAMILIES.values() for size in family.presets]
    return [*presets, *(f"timm/{name}" for name in TIMM)]


def variants(name: str, kinds: list[str]) -> list[tuple[str, str, NormConfig]]:
    """Norm, grouping and config of every row of a model: S, L and T in each grouping, and the stock norm."""
    convolutional = "resnet" in name
    base = {"lambda": 4.0, "epsilon": 1e-5, "convention": "divide", "bias": not name.startswith("llama")}
    found = []
    for grouping, more in GROUPINGS.items() if convolutional else (("last", {}),):
        found += [
            (f"IBNorm-{kind}", grouping, NormConfig.from_config({**base, "compression": kind, **more}))
            for kind in kinds
        ]
    stock = next(norm for family, norm in BASELINES.items() if family in name)
    rule = [{"match": "*", "norm": stock}]
    return [*found, (stock, "stock", NormConfig.from_config({**base, "compression": "S", "layers": rule}))]


def random_model(name: str, norms: NormConfig, folder: Path) -> LoadedModel:
    """A model with random weights, written and read back."""
    if name.startswith("timm/"):
        import timm
        import torch

        torch.manual_seed(0)
        model = timm.create_model(name.removeprefix("timm/"))
        replace_norms(model, norms)
        models.measure_statistics(model, lambda: model(torch.randn(2, 3, 224, 224)))
        timm.models.save_for_hf(model, folder, model_config={"ibnorm": norms.to_config()}, safe_serialization=True)
    else:
        models.save(models.new_model(name, norms), folder)
    return models.load(folder)


def export_and_verify(name: str, norms: NormConfig, *, dtype: DType, samples: int) -> dict[str, Any]:
    """Export and verify one model, and return the details for the table."""
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(name, norms, Path(folder) / "checkpoint")
        start = time.perf_counter()
        exported = export(model, Path(folder) / "model.onnx", options=ExportOptions(dtype=dtype))
        middle = time.perf_counter()
        report = verify(exported, model, options=VerifyOptions(samples=samples, layers=True))
        done = time.perf_counter()
        assert report.numeric is not None
        outputs, layers = report.numeric.outputs, report.numeric.layers
        errors = {o.norms: o.error for o in outputs}
        fused = {o.norms: o.passed for o in outputs}.get("fused", False) and bool(report.static)
        return {
            "model": name,
            "dtype": dtype.value,
            "parameters": sum(p.numel() for p in model.module.parameters()),
            "verdict": "pass" if report else "fused only" if fused else "fail",
            "findings": [str(f) for f in report.findings],
            "nodes": len(exported.norms),
            "fused": sum(n.implementation == "fused" for n in report.numeric.norms),
            "layers": 0 if layers is None else len(layers.layers),
            "samples": samples,
            "errors": errors,
            "baseline_error": outputs[0].baseline_error,
            "tolerance": outputs[0].tolerance,
            "size_mb": exported.size_bytes / 1e6,
            "export_s": middle - start,
            "verify_s": done - middle,
        }


def row_of(details: dict[str, Any]) -> Row:
    """A row from details that were measured now or recorded earlier."""
    key = ("model", "norm", "grouping", "dtype")
    figures = {
        "failures": Figure(int(details["verdict"] == "fail")),
        **{f"error, norms {norms}": Figure(error) for norms, error in details["errors"].items()},
        "export": Figure(round(details["export_s"], 1), "s"),
        "verify": Figure(round(details["verify_s"], 1), "s"),
    }
    name = ", ".join(details[part] for part in key)
    return Row(name, figures, targets=(Target("failures", 0),), details=details)


def upgrade_details(recorded: dict[str, Any]) -> dict[str, Any]:
    """The details of a row that was recorded before rows had figures; the words of two keys have changed since."""
    words = {"torch_error": "baseline_error", "allowed": "tolerance"}
    return {words.get(key, key): value for key, value in recorded.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, in the order of `names` and `variants`."""
    kinds = [c.value for c in Compression]
    places = [(name, *row[:2]) for name in names() for row in variants(name, kinds)]
    rows = sorted(rows, key=lambda r: places.index((r["model"], r["norm"], r["grouping"])))
    head = "| model | parameters | norm | over | nodes, fused | places | fused | as functions | PyTorch | verdict |"
    lines = [head, "|" + "---|" * 10]
    for r in rows:
        errors = " | ".join(f"{r['errors'][n]:.2e}" if n in r["errors"] else "" for n in ("fused", "as functions"))
        lines.append(
            f"| {r['model']} | {r['parameters'] / 1e6:.0f}M | {r['norm']} | {r['grouping']} | {r['nodes']}, "
            f"{r['fused']} | {r['layers']} | {errors} | {r['baseline_error']:.2e} | {r['verdict']} |"
        )
    return "\n".join(lines)


def replace_table(page: Path, rows: list[dict[str, Any]]) -> None:
    """Replace the table of models in a Markdown file."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = max(i for i, line in enumerate(lines) if line.startswith("| model |"))
    end = next(i for i, line in enumerate([*lines, ""]) if i > start and not line.startswith("|"))
    lines[start:end] = table(rows).splitlines()
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", default=names(), choices=names(), help="Models to measure.")
    parser.add_argument("--kinds", nargs="+", default=[c.value for c in Compression], choices=[*Compression])
    parser.add_argument("--dtype", default="fp32", choices=[d.value for d in DType])
    parser.add_argument("--samples", type=int, default=2, help="Samples to verify each model with (%(default)s).")
    parser.add_argument("--table", type=Path, help="Markdown file whose table of models is replaced.")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Export and verify every model that the record does not hold yet."""
    for recorded in report.recorded_rows():
        report.add(row_of(recorded["details"] if "details" in recorded else upgrade_details(recorded)))
    done = {row.name for row in report.rows}
    for name in options.only:
        for norm, grouping, norms in variants(name, options.kinds):
            if f"{name}, {norm}, {grouping}, {options.dtype}" in done:
                continue
            try:
                details = export_and_verify(name, norms, dtype=DType(options.dtype), samples=options.samples)
            except (IBNormError, ModuleNotFoundError) as error:
                print(f"{name}, {norm}, {grouping}: left out: {error}", file=sys.stderr, flush=True)
                continue
            gc.collect()
            report.add(row_of({"norm": norm, "grouping": grouping, **details}))
            report.save()
    if options.table is not None:
        replace_table(options.table, [dict(row.details) for row in report.rows])
