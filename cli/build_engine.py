"""`ibnorm-export build-engine`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ibnorm_export.cli import options
from ibnorm_export.cli.console import out, print_json, print_table, table
from ibnorm_export.runtimes.tensorrt.options import EngineOptions, NormRoute, Runtime
from ibnorm_export.runtimes.tensorrt.profiles import parse_ranges

if TYPE_CHECKING:
    from ibnorm_export.runtimes.tensorrt.build import Engine


def build_engine_command(
    model_file: options.ModelFile,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="MODEL.plan", help="The file to write.")],
    runtime: Annotated[Runtime, typer.Option("--runtime", help="What to build for.")] = Runtime.TENSORRT,
    norm: Annotated[
        NormRoute, typer.Option("--norm", help="How the norms run; auto is the function.")
    ] = NormRoute.AUTO,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            "--profile",
            metavar="[PROFILE:]AXIS=MINxOPTxMAX",
            help="Sizes of a dynamic axis; may be repeated. A model with a cache has the profiles prefill and decode.",
        ),
    ] = None,
    workspace: Annotated[int | None, typer.Option("--workspace", metavar="BYTES", help="Most scratch memory.")] = None,
    timing_cache: Annotated[Path | None, typer.Option("--timing-cache", help="Read and write; tensorrt alone.")] = None,
    embed_plugin: Annotated[bool, typer.Option("--embed-plugin", help="Put the plugin into the plan.")] = False,
    compute_capability: Annotated[
        str, typer.Option("--compute-capability", metavar="LIST", help="As sm_89,sm_120; tensorrt-rtx alone.")
    ] = "",
    as_json: options.AsJson = False,
) -> None:
    """Build a TensorRT engine, and say how each norm was realised. TensorRT-RTX needs no GPU to build.

    Example: ibnorm-export build-engine llama.onnx -o llama.plan --runtime tensorrt-rtx
    """
    from ibnorm_export.artifacts.exported_model import ExportedModel
    from ibnorm_export.runtimes.tensorrt.build import build_engine

    targets = tuple(name.strip() for name in compute_capability.split(",") if name.strip())
    wanted = EngineOptions(
        runtime,
        norm,
        ranges=parse_ranges(profile or ()),
        workspace_bytes=workspace,
        timing_cache=timing_cache,
        embed_plugin=embed_plugin,
        compute_capabilities=targets,
    )
    engine = build_engine(ExportedModel(model_file), output, options=wanted)
    if as_json:
        print_json({"path": str(engine.path), **engine.description})
    else:
        _print(engine)


def _print(engine: Engine) -> None:
    about = engine.description
    out.print(
        f"{engine.path}: {about['size_bytes'] / 1e6:.1f} MB, {about['runtime']} {about['runtime_version']}, "
        f"built in {about['build_s']} s, norms as {about['norm']} ({about['why']})",
        markup=False,
    )
    for profile in about["profiles"]:
        sizes = [f"{r['axis']} {r['smallest']} to {r['largest']}, best at {r['optimal']}" for r in profile["ranges"]]
        out.print(f"profile {profile['name']}: {'; '.join(sizes)}", markup=False)
    rows = table("norms", "module", "op", "realised", "kernels")
    for norm in engine.norms:
        rows.add_row(norm.module, norm.op_type, norm.realised, ", ".join(norm.kernels))
    print_table(rows)
