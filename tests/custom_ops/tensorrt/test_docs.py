"""The C++ of docs/how-to/tensorrt.md compiles."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.support import trt_plugin


def test_the_snippet_compiles(trt_headers: Path) -> None:
    text = (trt_plugin.ROOT / "docs" / "how-to" / "tensorrt.md").read_text(encoding="utf-8")
    [snippet] = re.findall(r"```cpp\n(.*?)```", text, re.DOTALL)
    cxx = trt_plugin.cuda_emulator.compiler()
    stand_in = Path(__file__).parent / "include"
    command = [str(cxx), "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-isystem", str(trt_headers)]
    command += [f"-I{stand_in}", "-x", "c++", "-"]
    done = subprocess.run(command, input=snippet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
