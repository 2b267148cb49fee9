"""The public API: what `ibnorm_export` exports, what it imports, its types, and how its functions are called."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import shutil
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import ibnorm_export
from ibnorm_export.errors import BackendUnavailable
from tests.test_architecture import MODULES

ROOT = Path(__file__).resolve().parent.parent

FUNCTIONS = {
    "analyze",
    "bench",
    "build_engine",
    "check",
    "evaluate",
    "explain",
    "export",
    "from_module",
    "ibnorm",
    "identify",
    "identify_checkpoint",
    "identify_norms",
    "import_checkpoint",
    "json_schema",
    "load",
    "package",
    "replace_norms",
    "serve",
    "skip_ibnorm",
    "sweep",
    "verify",
}
TYPES = {
    "AnalysisOptions",
    "AnalysisReport",
    "Backend",
    "BenchOptions",
    "BenchReport",
    "CacheKind",
    "CheckReport",
    "Compression",
    "Convention",
    "CustomModel",
    "DType",
    "Endpoint",
    "Engine",
    "EngineOptions",
    "EvaluationOptions",
    "EvaluationReport",
    "Explanation",
    "ExportOptions",
    "ExportedModel",
    "RepositoryFormat",
    "FindingCode",
    "GenerationOptions",
    "GenerationReport",
    "Grouping",
    "IBNorm",
    "IBNormSpec",
    "InputCoverage",
    "IdentityReport",
    "ImportKind",
    "ImportReport",
    "InputSpec",
    "Kernels",
    "LayerRule",
    "TritonLimits",
    "LoadedModel",
    "NormConfig",
    "NormIdentity",
    "NormKind",
    "NormRoute",
    "Package",
    "PackageOptions",
    "ParityReport",
    "Preference",
    "Quantization",
    "ReadyServer",
    "Runtime",
    "ServeOptions",
    "SkipIBNorm",
    "Target",
    "Task",
    "SweepOptions",
    "SweepReport",
    "TaskName",
    "TextLimits",
    "Timing",
    "TritonBackend",
    "PackagedNorms",
    "VerifyOptions",
}
ERRORS = {
    "BackendUnavailable",
    "CheckpointError",
    "ConfigError",
    "EngineError",
    "ExportError",
    "IBNormError",
    "ModelFileError",
    "ParityError",
    "PromptError",
    "SpecError",
}

#: What a user of every public function writes; mypy reads it as a user's own script.
SCRIPT = """\
from pathlib import Path

from ibnorm_export import (
    AnalysisOptions,
    AnalysisReport,
    Backend,
    BenchOptions,
    BenchReport,
    CheckReport,
    Compression,
    DType,
    Engine,
    EngineOptions,
    EvaluationOptions,
    EvaluationReport,
    ExportOptions,
    ExportedModel,
    RepositoryFormat,
    GenerationReport,
    IBNorm,
    IBNormError,
    IBNormSpec,
    InputCoverage,
    TritonLimits,
    LoadedModel,
    NormConfig,
    NormRoute,
    Package,
    PackageOptions,
    ParityReport,
    Runtime,
    ServeOptions,
    SkipIBNorm,
    TextLimits,
    PackagedNorms,
    VerifyOptions,
    analyze,
    bench,
    build_engine,
    check,
    evaluate,
    export,
    ibnorm,
    load,
    package,
    replace_norms,
    serve,
    skip_ibnorm,
    verify,
)
import torch
from torch import Tensor, nn


def show(what: str, done: int, total: int) -> None:
    print(what, done, total)


spec: IBNormSpec = IBNormSpec(Compression.LOGARITHMIC, 4.0, epsilon=1e-5)
assert spec == IBNormSpec("L", 4.0, epsilon=1e-5)
norm: IBNorm = IBNorm(64, spec)
skip: SkipIBNorm = SkipIBNorm(64, spec)
network: nn.Module = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
replaced = replace_norms(network, NormConfig(spec))


def normalise(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    y: Tensor = ibnorm(x, None, bias=None, spec=spec)
    return skip_ibnorm(y, residual, weight=None, bias=None, spec=spec)


model: LoadedModel = load("checkpoints/llama")
half: ExportedModel = export(model, "llama.fp16.onnx", options=ExportOptions(DType.FP16), progress=show)
same: ExportedModel = export(model, "same.onnx", options=ExportOptions("fp16"))
static: ExportOptions = ExportOptions(torch.float16, cache="static")
full: ExportedModel = export(model, Path("llama.onnx"))
reports: list[ParityReport] = [
    verify(full, model),
    verify("llama.onnx", "checkpoints/llama", options=VerifyOptions(Backend.REFERENCE, 2), progress=show),
]
passed: bool = all(reports)
times: BenchReport | GenerationReport = bench(
    "llama.onnx", "checkpoints/llama", against=["torch"], options=BenchOptions(rounds=5)
)
figures: AnalysisReport = analyze(model, options=AnalysisOptions((0.5, 8.0)))
evaluated: EvaluationReport = evaluate(
    [full, "llama.fp16.onnx"], task="perplexity", data="text.txt", against=model, options=EvaluationOptions(limit=9)
)
checked: CheckReport = check("check.toml", progress=show)
engine: Engine = build_engine(full, "llama.plan", options=EngineOptions(Runtime.TENSORRT_RTX, NormRoute.FUNCTION))
quick: VerifyOptions = VerifyOptions(coverage=InputCoverage.FAST)
packing: PackageOptions = PackageOptions(RepositoryFormat.KSERVE, variant=PackagedNorms.BOTH, limits=TritonLimits(4))
packaged: Package = package(full, "repository", options=packing)
serve(packaged.path, options=ServeOptions(http_port=0, text=TextLimits(4)), ready=lambda server: print(server.http))
try:
    load("nowhere")
except IBNormError as error:
    code: int = error.exit_code
"""


def test_the_public_names() -> None:
    assert set(ibnorm_export.__all__) == FUNCTIONS | TYPES | ERRORS
    assert list(ibnorm_export.__all__) == sorted(ibnorm_export.__all__)


def test_dir_lists_the_public_names_only() -> None:
    assert {name for name in dir(ibnorm_export) if not name.startswith("__")} == set(ibnorm_export.__all__)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_public_function_is_a_function(name: str) -> None:
    found = getattr(ibnorm_export, name)
    assert inspect.isroutine(found) or callable(found)
    assert not isinstance(found, types.ModuleType)
    assert inspect.getdoc(found), f"{name} has no docstring"


@pytest.mark.parametrize("name", sorted(TYPES | ERRORS))
def test_a_public_type_is_a_class(name: str) -> None:
    found = getattr(ibnorm_export, name)
    assert isinstance(found, type)
    assert found.__doc__, f"{name} has no docstring"
    assert (name in ERRORS) is issubclass(found, ibnorm_export.IBNormError)


def test_a_function_stays_a_function_after_its_module_is_imported() -> None:
    code = (
        "import ibnorm_export.exporter.export, ibnorm_export.verifier.verify, ibnorm_export.benchmark.bench\n"
        "from ibnorm_export import bench, export, verify\n"
        "assert callable(export) and callable(verify) and callable(bench)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'frobnicate'"):
        ibnorm_export.frobnicate  # noqa: B018 - the access is the test


def test_type_checkers_and_python_find_names_in_the_same_modules() -> None:
    """The imports that a type checker reads and the table that Python uses are the same."""
    tree = ast.parse(Path(ibnorm_export.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == ibnorm_export._HOME


def test_importing_imports_neither_torch_nor_a_runtime() -> None:
    code = (
        "import sys, ibnorm_export; dir(ibnorm_export); from ibnorm_export import IBNormError, IBNormSpec\n"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'transformers', 'tensorrt'} & set(sys.modules)\n"
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_version_is_stated_once() -> None:
    assert importlib.metadata.version("ibnorm-export") == ibnorm_export.__version__
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    assert "version" not in project
    assert project["dynamic"] == ["version"]


def test_py_typed_is_packaged() -> None:
    assert (Path(ibnorm_export.__file__).parent / "py.typed").is_file()


def test_a_users_scripts_pass_mypy_strict(tmp_path: Path) -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    site = tmp_path / "site"  # as installed: `cli` and `models` inside the package
    shutil.copytree(ROOT / "ibnorm_export", site / "ibnorm_export", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    for folder in ("cli", "models"):
        shutil.copytree(ROOT / folder, site / "ibnorm_export" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    shutil.copy(ROOT / "examples" / "first_steps.py", tmp_path)
    configuration = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    # Errors of an installed package are not a user's: mypy does not report them for one in site-packages.
    configuration += '\n[[tool.mypy.overrides]]\nmodule = "ibnorm_export.*"\nignore_errors = true\n'
    (tmp_path / "pyproject.toml").write_text(configuration, encoding="utf-8")
    cache = ROOT / "build" / "mypy-user-script"
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(cache), "script.py", "first_steps.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"MYPYPATH": str(site), "PATH": ""}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_formatter_is_never_switched_off() -> None:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    words = ("fmt: " + "skip", "fmt: " + "off")
    found = [
        name
        for name in listed.stdout.split()
        if (ROOT / name).is_file() and any(word in (ROOT / name).read_text(encoding="utf-8") for word in words)
    ]
    assert found == []


def _modules() -> Iterator[types.ModuleType]:
    """Every module of the package whose dependencies are installed."""
    for name in MODULES:
        try:
            yield importlib.import_module(f"ibnorm_export.{name}")
        except (ModuleNotFoundError, BackendUnavailable) as error:
            missing = error.__cause__ if isinstance(error, BackendUnavailable) else error
            assert isinstance(missing, ModuleNotFoundError), name
            assert missing.name is not None and not missing.name.startswith("ibnorm_export"), name


def _callables(module: types.ModuleType) -> Iterator[tuple[str, object]]:
    """Public functions, constructors and methods that `module` defines, by their qualified names."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", "") != module.__name__:
            continue
        if inspect.isfunction(value):
            yield f"{module.__name__}.{name}", value
        elif inspect.isclass(value) and not issubclass(value, (BaseException, types.GenericAlias)):
            yield f"{module.__name__}.{name}", value
            for method, function in vars(value).items():
                if not method.startswith("_") and inspect.isfunction(function):
                    yield f"{module.__name__}.{name}.{method}", function


def _may_take_more(name: str, value: object) -> bool:
    """Whether something else prescribes the signature: PyTorch, Typer or the type `Progress`; or it is small data."""
    if isinstance(value, type):
        small = dataclasses.is_dataclass(value) and len(dataclasses.fields(value)) < 5
        inherited = not getattr(value.__init__, "__module__", "").startswith("ibnorm_export")
        return small or inherited
    return name.endswith(("_command", ".forward", ".backward", ".setup_context", "progress.silent"))


def _positional(value: object) -> int:
    try:
        parameters = inspect.signature(value).parameters.values()  # type: ignore[arg-type]  # any callable
    except ValueError:  # a class without a constructor in Python
        return 0
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.name not in ("self", "cls") for p in parameters)


def test_no_public_function_takes_more_than_two_positional_arguments() -> None:
    found = {
        name: _positional(value)
        for module in _modules()
        for name, value in _callables(module)
        if not _may_take_more(name, value) and _positional(value) > 2
    }
    assert not found


def test_every_public_function_of_the_package_has_a_docstring() -> None:
    bare = [
        f"{module.__name__}.{name}"
        for module in _modules()
        for name in getattr(module, "__all__", ())
        if (inspect.isfunction(value := getattr(module, name)) or inspect.isclass(value))
        and value.__module__ == module.__name__
        and not inspect.getdoc(value)
    ]
    assert not bare
