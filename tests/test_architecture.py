"""Who may know whom: the direction of knowledge is a test, not a habit."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("",)
LIBRARY = [file for folder in FOLDERS for file in sorted((ROOT / "ibnorm_export" / folder).glob("*.py"))]
MODELS = sorted((ROOT / "models").glob("*.py"))
CLI = sorted((ROOT / "cli").glob("*.py"))

#: An optional package, and the modules that may import it at their top.
OPTIONAL = {
    "onnxruntime": ("ort_runner.py", "ort_cuda_runner.py", "ort_text.py"),
    "onnxruntime_genai": ("genai_runner.py",),
    "tensorrt": ("trt_runner.py",),
    "tritonclient": ("triton_runner.py",),
    "fastapi": ("openai_server.py",),
    "uvicorn": ("openai_server.py",),
    "timm": ("timm_model.py",),
}


def imports(file: Path, top_only: bool = False) -> Iterator[str]:
    """Every module that a file imports, by its full name."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_there_is_something_to_check() -> None:
    assert len(LIBRARY) > 10
    assert len(MODELS) > 3
    assert len(CLI) > 5


@pytest.mark.parametrize("file", LIBRARY, ids=lambda f: f.name)
def test_library_knows_neither_models_nor_cli(file: Path) -> None:
    inspection_of_checkpoints = file.name == "inspection.py"  # loads one on demand, inside a function
    for name in imports(file, top_only=inspection_of_checkpoints):
        assert not name.startswith(("ibnorm_export.models", "ibnorm_export.cli")), f"{file.name} imports {name}"


@pytest.mark.parametrize("file", LIBRARY, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_nothing_but_serving_and_doctor_knows_serving(file: Path) -> None:
    if file.parent.name != "serving" and file.name != "doctor.py":
        assert not [name for name in imports(file) if name.startswith("ibnorm_export.serving")]


@pytest.mark.parametrize("file", MODELS, ids=lambda f: f.name)
def test_models_know_no_cli(file: Path) -> None:
    for name in imports(file):
        assert not name.startswith("ibnorm_export.cli"), f"{file.name} imports {name}"


@pytest.mark.parametrize("file", LIBRARY, ids=lambda f: f.name)
def test_the_definition_knows_only_the_standard_library(file: Path) -> None:
    if file.name not in ("spec.py", "errors.py"):
        return
    for name in imports(file):
        top = name.split(".")[0]
        assert top in sys.stdlib_module_names or name.startswith("ibnorm_export.errors"), f"{file.name} imports {name}"


@pytest.mark.parametrize("file", [*LIBRARY, *MODELS, *CLI], ids=lambda f: f"{f.parent.name}/{f.name}")
def test_optional_packages_are_imported_where_they_are_wrapped(file: Path) -> None:
    for name in imports(file, top_only=True):
        owners = OPTIONAL.get(name.split(".")[0], (file.name,))
        assert file.name in owners, f"{file.name} imports {name}; only {owners} may"


def test_importing_the_package_imports_no_framework() -> None:
    code = (
        "import sys, ibnorm_export; from ibnorm_export import IBNormSpec; IBNormSpec('L');"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'transformers', 'tensorrt', 'fastapi'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


#: What may be imported before it is known what is asked for: by the command line, and to serve texts.
LIGHT = {
    "cli.main": {"onnx"},
    "baseline": {"onnx"},
    "serving.text_worker": {"onnx"},
    "serving.openai_server": {"fastapi", "onnx"},
    "runners.genai_runner": {"onnx"},
    "runners.ort_text": {"onnx", "onnxruntime"},
}


@pytest.mark.parametrize("module", LIGHT)
def test_nothing_slow_is_imported_before_it_is_needed(module: str) -> None:
    """torch takes seconds; so do SciPy's statistics, and SymPy, which onnx_ir imports."""
    slow = {
        "torch",
        "onnx",
        "onnxruntime",
        "transformers",
        "timm",
        "scipy",
        "sympy",
        "onnx_ir",
        "matplotlib",
        "fastapi",
    }
    code = f"import sys, ibnorm_export.{module}; sys.exit(' '.join(sorted({slow} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert set(done.stderr.split()) <= LIGHT[module], done.stderr


def test_no_module_is_called_utils() -> None:
    names = [f.stem for f in (*LIBRARY, *MODELS, *CLI)]
    assert not {"utils", "helpers", "common", "misc", "manager"} & set(names)
