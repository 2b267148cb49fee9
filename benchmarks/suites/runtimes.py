"""Files of four tiny models in every form, run in every runtime that is there, against PyTorch in float64.

Runtimes are the package's own backends (--npm for Node), WebGPU in Chromium, and environments: folders of
--environments with bin/python, whose name is a runtime of runtimes_worker.py and a version, such as
onnxruntime-1.18.1. `make runtimes` installs some of ONNX Runtime. Rows of runtimes that do not run now stay as they
were recorded. `runtimes_page` writes the table.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target
from benchmarks.suites.runtimes_cases import FORMS, MODELS, Case, limit_of, make_cases
from benchmarks.suites.runtimes_webgpu import RUNTIME as WEBGPU
from benchmarks.suites.runtimes_webgpu import package_version, run_webgpu
from benchmarks.suites.runtimes_worker import largest_error
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.environment import version_of
from ibnorm_export.errors import BackendUnavailable, ModelFileError
from ibnorm_export.runtimes.node.packages import PACKAGES, find_node, find_package
from ibnorm_export.runtimes.registry import BACKENDS, open_runner
from ibnorm_export.runtimes.runner import Backend, Kernels

__all__ = ["add_options", "environments", "measure", "run_backend", "run_environment"]

WORKER = Path(__file__).with_name("runtimes_worker.py")
ENVIRONMENTS = Path(__file__).resolve().parents[2] / "build" / "runtimes"

#: Backends of the package that need no GPU and no server, in the order of the table.
OWN = (Backend.ORT_CPU, Backend.REFERENCE, Backend.ORT_NODE, Backend.ORT_WEB, Backend.OPENVINO)

#: Runtimes that are recorded as they are, wrong numbers included.
_MAY_BE_WRONG = ("openvino-default", "iree", "litert", "mnn", "tract", "tvm")

#: Runtimes of environments that take only files with the norms expanded.
_READ_NO_FUNCTIONS = ("openvino", "openvino-default", "iree", "litert", "mnn", "tract", "tvm")

#: Versions of ONNX Runtime whose Attention of opset 23 gives NaN in rows that are padded on the left.
_NAN_VERSIONS = "1.23."

_PACKAGES = {Backend.ORT_CPU: "onnxruntime", Backend.REFERENCE: "onnx", Backend.OPENVINO: "openvino"}

Outcome = dict[str, Any]


def run_backend(backend: Backend, cases: Sequence[Case], *, npm: Path | None) -> Iterator[tuple[Case, Outcome]]:
    """Run files in a backend of this package, in this process."""
    options = {"npm": npm} if BACKENDS[backend].takes_npm else {}
    for case in cases:
        inputs, expected, valid = (
            dict(np.load(case.folder / f"{name}.npz").items()) for name in ("inputs", "expected", "valid")
        )
        model = ExportedModel(case.folder / "model.onnx")
        try:
            runner = open_runner(backend, model, threads=1, kernels=Kernels.FUNCTION, **options)
            yield case, {"error": largest_error(runner.run(inputs), expected, valid)}
        except ModelFileError as error:
            yield case, {"refuses": _own_reason(error, case)}
        except (NotImplementedError, RuntimeError, TypeError) as error:  # onnx.reference lacks MatMulNBits
            yield case, {"refuses": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}


def _own_reason(error: ModelFileError, case: Case) -> str:
    """What this package says of a file, without its path and without what to type."""
    text = str(error).replace(str(case.folder / "model.onnx"), "").removeprefix(": ")
    text = text.partition(": ")[2] or text  # "RUNTIME VERSION cannot load it: ..."
    return re.split(r"; export it again|, known functions", text)[0][:200]


def run_environment(python: Path, runtime: str, cases: Sequence[Case]) -> Iterator[tuple[Case, Outcome]]:
    """Run files in the runtime of an environment. A file that ends its process is recorded as such."""
    waiting = {str(case.folder): case for case in cases}
    while waiting:
        command = [python, WORKER, runtime, *waiting]
        with tempfile.TemporaryFile() as log:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, check=False)
        begun = ""
        for line in done.stdout.decode().splitlines():
            if not line.startswith("{"):
                continue  # the runtime printed something
            found = json.loads(line)
            if "begins" in found:
                begun = found["begins"]
                continue
            yield waiting.pop(found.pop("folder")), found
        if done.returncode == 0:
            return
        if begun not in waiting:
            raise RuntimeError(f"{python} {WORKER} ended with code {done.returncode} before it ran a file")
        yield waiting.pop(begun), {"refuses": f"its process ends with code {done.returncode}"}


def environments(folder: Path) -> dict[str, tuple[str, str, Path]]:
    """Runtime, version and interpreter of every environment in a folder, by its name."""
    found = {}
    for python in sorted(folder.glob("*/bin/python")):
        name = python.parent.parent.name
        runtime, _, version = name.rpartition("-")
        found[name] = (runtime, version, python)
    return found


def row_of(case: Case, outcome: Outcome, *, runtime: str, version: str) -> Row:
    """A row of the record. Wrong numbers miss the target, but for runtimes that are known to give some."""
    limit = limit_of(case.limit, case.form, runtime=runtime)
    details = {"runtime": runtime, "version": version, "form": case.form, "model": case.model, "limit": limit}
    name = f"{runtime} {version}, {case.form}, {case.model}"
    if "refuses" in outcome:
        return Row(name, {}, details={**details, "refuses": outcome["refuses"]}, note=f"refuses: {outcome['refuses']}")
    error = outcome["error"]
    wrong = Figure(float(not error <= limit))
    targets = () if runtime in _MAY_BE_WRONG or version.startswith(_NAN_VERSIONS) else (Target("wrong", 0.0),)
    if not np.isfinite(error):
        details["error"] = "NaN or infinite"
        return Row(name, {"wrong": wrong}, targets=targets, details=details, note="NaN or infinite")
    figures = {"error": Figure(error), "wrong": wrong}
    return Row(name, figures, targets=targets, details={**details, "error": error})


def _own_version(backend: Backend, npm: Path | None) -> str:
    """The version of a backend's package.

    Raises:
        BackendUnavailable: it is not installed.
    """
    if backend in PACKAGES:
        find_node(backend)
        return find_package(backend, npm).version
    version = version_of(_PACKAGES[backend])
    if version is None:
        raise BackendUnavailable(f"{backend}: pip install 'ibnorm-export[{BACKENDS[backend].extra}]'")
    return version


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--forms", nargs="+", default=tuple(FORMS), choices=tuple(FORMS))
    parser.add_argument("--runtimes", nargs="+", help="Backends and environments (all).")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, help="Folder of environments.")
    parser.add_argument("--npm", type=Path, help="Folder of `npm install --prefix`.")
    parser.add_argument("--cases", type=Path, help="Folder that keeps the exported files (a temporary one).")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Export the files, and run them in every runtime."""
    recorded = {row["name"]: row for row in report.recorded_rows()}
    others = environments(options.environments)
    known = [*OWN, WEBGPU, *others]
    chosen = options.runtimes if options.runtimes is not None else known
    if unknown := set(chosen) - set(known):
        raise SystemExit(f"runtimes: there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.cases or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        cases = list(make_cases(folder, names=tuple(options.models), forms=tuple(options.forms)))
        for name in chosen:
            _measure_one(name, cases, others=others, npm=options.npm, report=report)
            now = {row.name for row in report.rows}
            report.recorded = [row for name, row in recorded.items() if name not in now]
            report.save()


def _measure_one(
    name: str, cases: Sequence[Case], *, others: dict[str, tuple[str, str, Path]], npm: Path | None, report: Report
) -> None:
    run: Callable[[list[Case]], Iterator[tuple[Case, Outcome]]]
    try:
        runtime, version, run = _chosen(name, others=others, npm=npm)
    except BackendUnavailable as error:
        print(f"{name}: not run: {error}", file=sys.stderr)
        return
    if name in others and runtime in _READ_NO_FUNCTIONS:
        cases = [case for case in cases if FORMS[case.form].expanded]
    cases = [case for case in cases if FORMS[case.form].runs_on(runtime, version)]
    refused = ((case, {"refuses": case.refusal}) for case in cases if case.refusal)
    for case, outcome in itertools.chain(refused, run([case for case in cases if not case.refusal])):
        report.add(row_of(case, outcome, runtime=runtime, version=version))


def _chosen(
    name: str, *, others: dict[str, tuple[str, str, Path]], npm: Path | None
) -> tuple[str, str, Callable[[list[Case]], Iterator[tuple[Case, Outcome]]]]:
    """The runtime's name in the table, its version, and what runs files in it.

    Raises:
        BackendUnavailable: a package that it needs is not installed.
    """
    if name in others:
        runtime, version, python = others[name]
        return runtime, version, functools.partial(run_environment, python, runtime)
    if name == WEBGPU:
        version = package_version(npm)
        return WEBGPU, version, functools.partial(run_webgpu, npm=npm or Path())
    backend = Backend(name)
    return backend.value, _own_version(backend, npm), functools.partial(run_backend, backend, npm=npm)
