"""Who may know whom: the direction of knowledge is a test, not a habit."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ibnorm_export"

#: Every part of the package, lowest first. A part imports parts that stand before it, and none of its own row.
#: A root module of one name and a package are both a part.
ORDER = (
    ("errors",),
    ("files", "json_text", "progress", "environment", "optional_packages"),
    ("html_page", "op", "text_report"),
    ("artifacts",),
    ("graph",),
    ("runtimes",),
    ("exporter", "generation"),
    ("analysis", "verifier", "benchmark", "serving"),
    ("models",),
    ("gate", "inspection", "doctor", "text_models", "api"),
    ("cli",),
)
RANK = {part: rank for rank, row in enumerate(ORDER) for part in row}

#: An optional package, and the modules that may import it at their top.
OPTIONAL = {
    "onnxruntime": ("runtimes.ort", "runtimes.ort_cuda", "generation.ort_session"),
    "onnxruntime_genai": ("generation.genai_session",),
    "tensorrt": ("runtimes.tensorrt.runner",),
    "tritonclient": ("runtimes.triton",),
    "fastapi": ("serving.text.app", "serving.text.responses"),
    "uvicorn": ("serving.text.server",),
    "timm": ("models.importers.timm",),
}


def _modules() -> dict[str, Path]:
    """Every module of the installed package by its dotted name below `ibnorm_export`."""
    found = {}
    for top, prefix in ((ROOT / PACKAGE, ()), (ROOT / "models", ("models",)), (ROOT / "cli", ("cli",))):
        for file in sorted(top.rglob("*.py")):
            parts = (*prefix, *file.relative_to(top).with_suffix("").parts)
            name = ".".join(parts).removesuffix("__init__").rstrip(".")
            if name and "onnxruntime_backend" not in parts:  # runs inside Triton, without this package
                found[name] = file
    return found


MODULES = _modules()


def imports(file: Path, *, top_only: bool = False) -> Iterator[str]:
    """Every module that a file imports, by its full name."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def known(file: Path) -> set[str]:
    """The modules of this package that a file imports, wherever in the file."""
    names = {name.removeprefix(f"{PACKAGE}.") for name in imports(file) if name.startswith(f"{PACKAGE}.")}
    return names & MODULES.keys()


GRAPH = {name: known(file) - {name} for name, file in MODULES.items()}


def part(module: str) -> str:
    return module.split(".")[0]


def test_every_part_has_a_place_in_the_order() -> None:
    assert {part(name) for name in MODULES} == RANK.keys()
    assert len(MODULES) > 100


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_downwards(module: str) -> None:
    for name in GRAPH[module]:
        if part(name) != part(module):
            assert RANK[part(name)] < RANK[part(module)], f"{module} imports {name}, which stands above or beside it"


def test_no_circle() -> None:
    """A package's `__init__` re-exports its modules: it follows them, and none of them imports it."""
    graphlib.TopologicalSorter(GRAPH).prepare()


def test_the_package_graph_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """`pytest -s -k package_graph` shows it: each part, and the parts that it imports."""
    parts = {p: {part(n) for m, names in GRAPH.items() if part(m) == p for n in names} - {p} for p in RANK}
    with capsys.disabled():
        for name, below in parts.items():
            print(f"\n{name:12} -> {', '.join(sorted(below, key=RANK.__getitem__)) or '-'}", end="")
        print()
    assert not parts["errors"]
    assert parts["cli"] >= {"models", "verifier"}


def test_the_definition_knows_only_the_standard_library() -> None:
    for module in ("op.spec", "errors"):
        for name in imports(MODULES[module]):
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names or name.startswith("ibnorm_export.errors"), f"{module}: {name}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_optional_packages_are_imported_where_they_are_wrapped(module: str) -> None:
    for name in imports(MODULES[module], top_only=True):
        owners = OPTIONAL.get(name.split(".")[0], (module,))
        assert module in owners, f"{module} imports {name}; only {owners} may"


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
    "cli.main": set(),
    "benchmark.baseline": {"onnx"},
    "serving.text.worker": {"onnx"},
    "serving.text.server": {"fastapi", "onnx"},
    "generation.genai_session": {"onnx"},
    "generation.ort_session": {"onnx", "onnxruntime"},
    "text_models": {"onnx"},
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
    names = {name.split(".")[-1] for name in MODULES}
    assert not {"utils", "helpers", "common", "misc", "manager"} & names
