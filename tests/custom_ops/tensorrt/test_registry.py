"""The plugin library in TensorRT's own plugin registries: the lean runtime's and TensorRT-RTX's. No GPU needed.

Each check runs in its own process: a registry is global, and refuses a name that it has. No `Runtime` is
created, since that needs a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ibnorm_export.op.spec import OP_TYPES, SKIP_OP_TYPES
from tests.support import trt_plugin

ALL = {*OP_TYPES, *SKIP_OP_TYPES}

_PROLOGUE = """
import ctypes, importlib, json, sys
import numpy as np
trt = importlib.import_module(sys.argv[1])
registry = trt.get_plugin_registry()
"""
_LOAD = "assert registry.load_library(sys.argv[2]) is not None\n"
_LIST = """
print(json.dumps([[c.name, c.plugin_version, c.plugin_namespace] for c in registry.all_creators if "IBNorm" in c.name]))
"""
_CREATE = """
kinds = {"float32": (np.float32, trt.PluginFieldType.FLOAT32), "int32": (np.int32, trt.PluginFieldType.INT32),
         "char": (np.int8, trt.PluginFieldType.CHAR)}
def fields(listed):
    made = []
    for name, (kind, value) in listed.items():
        dtype, code = kinds[kind]
        data = np.frombuffer(value.encode(), np.int8) if kind == "char" else np.array([value], dtype)
        made.append(trt.PluginField(name, data, code))
    return trt.PluginFieldCollection(made)
made = {}
for name in json.loads(sys.argv[3]):
    creator = registry.get_creator(name, "1", "")
    plugin = creator.create_plugin("layer", fields(json.loads(sys.argv[4])), trt.TensorRTPhase.BUILD)
    made[name] = plugin is not None
print(json.dumps(made))
"""


@pytest.fixture(params=["tensorrt_lean_bindings", "tensorrt_rtx_bindings"])
def bindings(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install 'ibnorm-export[tensorrt-test]'")
    return name


def ask(code: str, *arguments: str) -> tuple[Any, str]:
    """Run the script, and return what it prints as JSON and its standard error."""
    command = [sys.executable, "-c", _PROLOGUE + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_lists_six_creators(bindings: str, plugin_library: Path) -> None:
    listed, _ = ask(_LOAD + _LIST, bindings, str(plugin_library))
    assert sorted(listed) == sorted([name, "1", ""] for name in ALL)


GOOD = {"lambd": ("float32", 4.0), "epsilon": ("float32", 1e-5), "axis": ("int32", -1)}


@pytest.mark.parametrize(
    "change",
    [{}, {"axis": None}, {"plugin_namespace": ("char", "\0")}],
    ids=["as the parser passes them", "without axis", "with a NUL"],
)
def test_creates_plugins_from_fields(bindings: str, plugin_library: Path, change: dict[str, Any]) -> None:
    fields = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    made, said = ask(_LOAD + _CREATE, bindings, str(plugin_library), json.dumps(sorted(ALL)), json.dumps(fields))
    assert made == dict.fromkeys(ALL, True), said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lambd": ("float32", -1.0)}, "lambd is -1; it must be finite"),
        ({"lambd": None}, "field 'lambd' is missing"),
        ({"axis": ("int32", 1)}, "axis is 1"),
        ({"epsilon": ("int32", 1)}, "field 'epsilon' has type 5"),
        ({"plugin_namespace": ("char", "other\0")}, "must be the empty string"),
    ],
    ids=str,
)
def test_bad_fields_are_rejected_with_a_message(
    bindings: str, plugin_library: Path, change: dict[str, Any], words: str
) -> None:
    fields = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    made, said = ask(_LOAD + _CREATE, bindings, str(plugin_library), json.dumps(sorted(ALL)), json.dumps(fields))
    assert made == dict.fromkeys(ALL, False)
    assert sum(words in line for line in said.splitlines()) == len(ALL)


# -- the library that registers itself -------------------------------------------------------------


def test_the_library_registers_itself_when_opened(trt_headers: Path, plugin_library: Path) -> None:
    """`trtexec --staticPlugins` and ONNX Runtime's TensorRT provider open a library in this way."""
    name = "tensorrt_lean_bindings"
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install 'ibnorm-export[tensorrt-test]'")
    register = trt_plugin.build_register(trt_headers, plugin_library)
    opened = "assert ctypes.CDLL(sys.argv[2]).ibnorm_registered() == 6\n"
    listed, _ = ask(opened + _LIST, name, str(register))
    assert sorted(listed) == sorted([op_type, "1", ""] for op_type in ALL)


@pytest.mark.parametrize("version", [120000, 8601])
def test_an_unsupported_major_version_is_rejected(
    trt_headers: Path, plugin_library: Path, tmp_path: Path, version: int
) -> None:
    """A replacement for libnvinfer reports its version as libnvinfer does: 10.14.1 is 101401, 8.6.1 was 8601."""
    fake, major = tmp_path / "libnvinfer.so.99", {120000: 12, 8601: 8}[version]
    functions = (
        f'extern "C" {{ int getInferLibVersion() {{ return {version}; }} void* getPluginRegistry() {{ return 0; }} }}'
    )
    command = [str(trt_plugin.cuda_emulator.compiler()), "-shared", "-fPIC", "-x", "c++", "-", "-o", str(fake)]
    subprocess.run(command, input=functions, text=True, check=True)
    register = trt_plugin.build_register(trt_headers, plugin_library)
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1]); print(ctypes.CDLL(sys.argv[2]).ibnorm_registered())"
    done = subprocess.run(
        [sys.executable, "-c", code, str(fake), str(register)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "-1"
    assert done.stderr == f"ibnorm: TensorRT major version {major} is not known; 10 and 11 are\n"


def test_a_missing_runtime_is_reported(trt_headers: Path, plugin_library: Path) -> None:
    register = trt_plugin.build_register(trt_headers, plugin_library)
    code = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).ibnorm_registered())"
    done = subprocess.run([sys.executable, "-c", code, str(register)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "-1"
    assert "no TensorRT library is loaded" in done.stderr
