"""The rules of the architecture that a test can hold: which part may import which, and what no module does."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ibnorm_export"

#: Every part of the package, lowest first. A part imports only parts of the rows before its own. A part is a package or
#: a module at the root.
ORDER = (
    ("errors", "usable_cores"),
    (
        "files",
        "json_text",
        "parsing",
        "progress",
        "environment",
        "optional_packages",
        "choices",
        "text_report",
        "findings",
    ),
    ("html_page", "op", "json_document"),
    ("artifacts",),
    ("graph",),
    ("runtimes",),
    ("exporter", "generation"),
    ("analysis", "verifier", "benchmark", "serving"),
    ("models",),
    ("evaluation",),
    ("gate", "inspection", "doctor", "text_models", "api"),
    ("cli",),
    ("__main__",),
)
RANK = {part: rank for rank, row in enumerate(ORDER) for part in row}

#: An optional package, and the modules that may import it at their top.
OPTIONAL = {
    "onnxruntime": ("runtimes.ort", "runtimes.ort_cuda", "generation.ort_session"),
    "onnxruntime_genai": ("generation.genai_session",),
    "openvino": ("runtimes.openvino",),
    "tensorrt": ("runtimes.tensorrt.runner",),
    "tritonclient": ("runtimes.triton",),
    "fastapi": ("serving.text.app", "serving.text.responses"),
    "uvicorn": ("serving.text.server", "serving.text.httptools_protocol"),
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


@functools.cache
def parsed(file: Path) -> ast.Module:
    """The syntax tree of a file; several tests walk over all of them."""
    return ast.parse(file.read_text(encoding="utf-8"))


def _nodes(tree: ast.Module) -> Iterator[ast.AST]:
    """Every statement, wherever it is nested. Expressions, which are most of a tree, import nothing."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            below = getattr(node, name, ())
            waiting += below if isinstance(below, list) else ()


def imports(file: Path, *, top_only: bool = False) -> Iterator[str]:
    """Every module that a file imports, by its full name."""
    tree = parsed(file)
    for node in tree.body if top_only else _nodes(tree):
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
            assert RANK[part(name)] < RANK[part(module)], f"{module} imports {name}, which is in the same row or above"


def test_no_circle() -> None:
    """The `__init__` of a package re-exports its modules, so none of them imports it."""
    graphlib.TopologicalSorter(GRAPH).prepare()


def folder_graph(package: str) -> dict[str, set[str]]:
    """The imports between the folders of a package; a module that lies beside them counts as a folder."""

    def place(module: str) -> str:
        return ".".join(module.split(".")[: package.count(".") + 2])

    inside = {module: names for module, names in GRAPH.items() if module.startswith(f"{package}.")}
    graph: dict[str, set[str]] = {place(module): set() for module in inside}
    for module, names in inside.items():
        graph[place(module)] |= {place(name) for name in names & inside.keys()} - {place(module)}
    return graph


@pytest.mark.parametrize("package", sorted({name.rpartition(".")[0] for name in MODULES} - {""}))
def test_no_circle_between_the_folders_of_a_package(package: str) -> None:
    graphlib.TopologicalSorter(folder_graph(package)).prepare()


def test_the_package_graph_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """`pytest -s -k package_graph` prints each part with the parts that it imports."""
    parts = {p: {part(n) for m, names in GRAPH.items() if part(m) == p for n in names} - {p} for p in RANK}
    with capsys.disabled():
        for name, below in parts.items():
            print(f"\n{name:12} -> {', '.join(sorted(below, key=RANK.__getitem__)) or '-'}", end="")
        print()
    assert not parts["errors"]
    assert parts["cli"] >= {"models", "verifier"}


def test_the_definition_imports_only_the_standard_library() -> None:
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


#: Slow packages that the import of these modules may load.
LIGHT = {
    "cli.main": set(),
    "benchmark.baseline": {"onnx"},
    "serving.text.worker": {"onnx"},
    "serving.text.server": {"fastapi", "onnx"},
    "generation.genai_session": {"onnx"},
    "generation.ort_session": {"onnx", "onnxruntime"},
    "text_models": {"onnx"},
    "verifier.verify": {"onnx", "torch"},
    "benchmark.bench": {"onnx", "torch"},
}


@pytest.mark.parametrize("module", LIGHT)
def test_nothing_slow_is_imported_before_it_is_needed(module: str) -> None:
    """torch takes seconds to import. So do SciPy's statistics and SymPy, which onnx_ir imports."""
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
    missing = re.search(r"No module named '(\w+)", done.stderr)
    if missing and missing[1] in OPTIONAL:
        pytest.skip(f"{missing[1]} is not installed")
    assert set(done.stderr.split()) <= LIGHT[module], done.stderr


#: Modules and packages that touch the environment of the process, and why.
ENVIRONMENT = {
    "cli": "its __init__ sets a default for OpenMP before torch is loaded",
    "serving.triton": "passes it on to the process of the server",
}

#: Module-level containers that change, and why.
REGISTRIES = {("models.registry", "_ADAPTERS"): "filled while the user's modules are imported"}

MUTATORS = {"add", "append", "clear", "extend", "insert", "pop", "remove", "setdefault", "update"}


def changed_globals(tree: ast.Module) -> Iterator[str]:
    """Names of a module's top level that code of the module changes."""
    targets = [
        target
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    names = {target.id for target in targets if isinstance(target, ast.Name)}
    for node in ast.walk(tree):
        changed: ast.expr | None = None
        if isinstance(node, ast.Global):
            yield from node.names
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            changed = node.func.value
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
            changed = node.value
        if isinstance(changed, ast.Name) and changed.id in names:
            yield changed.id


def test_no_module_level_state_changes() -> None:
    found = {(module, name) for module in MODULES for name in changed_globals(parsed(MODULES[module]))}
    assert found == REGISTRIES.keys()


def test_the_library_reads_no_environment_variable() -> None:
    for module in MODULES:
        for node in ast.walk(parsed(MODULES[module])):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv"):
                assert module in ENVIRONMENT or module.rpartition(".")[0] in ENVIRONMENT.keys() - {"cli"}, module


def test_metadata_of_a_file_is_read_through_its_type() -> None:
    """The format is `ModelMetadata`; no other module looks up keys."""
    for module in MODULES:
        for node in ast.walk(parsed(MODULES[module])):
            looked_up = node.value if isinstance(node, ast.Subscript) else None
            if isinstance(node, ast.Attribute) and node.attr == "get":
                looked_up = node.value
            assert not (isinstance(looked_up, ast.Attribute) and looked_up.attr == "metadata"), module


#: Functions that parse text without limits of depth and size; `parsing` has limits.
UNLIMITED = re.compile(
    r"(json|tomllib|yaml)\.\w*(load|parse|JSONDecoder)\w*|pickle\.\w*(loads?|Unpickler)\w*|ast\.literal_eval"
)

#: Modules that use one of them, and who wrote the text.
TRUSTED = {
    "parsing": "checks sizes and depths",
    "benchmark.fresh_process": "this package, in the process that started it",
    "benchmark.loading": "this package, in the process that started it",
    "graph.cleanup": "torch.onnx, a moment before",
    "models.containers.safe_pickle": "anybody; it interprets a pickle itself, with an allow-list",
    "op.native": "the library whose code is loaded in the same line",
    "runtimes.node.runner": "this package's driver, in the process that it started",
    "runtimes.ort": "ONNX Runtime, a moment before",
    "runtimes.tensorrt.norm_kernels": "TensorRT, a moment before",
    "serving.text.template_process": "this package; the size of a line is limited",
    "serving.text.template_worker": "this package, in the process that started it",
    "serving.text.worker": "this package, in the process that started it",
    "serving.text.worker_process": "this package, in the process that started it",
}


def test_untrusted_text_is_parsed_with_limits() -> None:
    """A thousand brackets end Python's parsers with RecursionError."""
    found = set()
    for module in MODULES:
        for node in ast.walk(parsed(MODULES[module])):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in ("json", "tomllib", "yaml", "pickle"), f"{module}: import it as a module"
            elif isinstance(node, ast.Attribute) and UNLIMITED.fullmatch(ast.unparse(node)):
                found.add(module)
    assert found == TRUSTED.keys()


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_no_import_path_is_changed(folder: str) -> None:
    """Tests and benchmarks import each other as packages of the repository."""
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
                assert ast.unparse(node.func.value) != "sys.path", file


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda file: file.stem)
def test_benchmarks_take_from_tests_only_what_is_shared(file: Path) -> None:
    """`tests.support`; and the tables of faults and right exports, which a benchmark runs in full."""
    for name in imports(file):
        if name.startswith("tests."):
            assert name.startswith(("tests.support", "tests.verifier.faults")), f"{file.name} imports {name}"


#: Lines of the longest body of a function, without its signature and docstring. Tables in the form of a function, and
#: reports of many fields, come near it.
_LONGEST = 50


@pytest.mark.parametrize("module", sorted(MODULES))
def test_functions_are_short(module: str) -> None:
    for node in ast.walk(parsed(MODULES[module])):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node, clean=False) else node.body
            lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert lines <= _LONGEST, f"{node.name} has {lines} lines: split it where that makes reading simpler"


def test_no_module_is_called_utils() -> None:
    names = {name.split(".")[-1] for name in MODULES}
    assert not {"utils", "helpers", "common", "misc", "manager"} & names
