"""Where gpu_check runs: a GPU, with everything compiled for it, or the CPU emulator of tests/custom_ops/cuda.

Tensors are torch's on both, so the emulator runs what a GPU runs; only the libraries differ.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.suites import op_cuda
from benchmarks.suites.cuda_static import ToolMissingError, nvcc
from tests.support import cuda_emulator, trt_plugin

ROOT = Path(__file__).resolve().parents[2]

__all__ = ["Machine", "ToolMissingError", "emulator", "gpu", "link_harness", "link_plugin", "nvcc"]

Array = NDArray[Any]
NO_HEADERS = "TensorRT's headers are missing: run `python scripts/fetch_headers.py`, or set TENSORRT_INCLUDE_DIR"


@dataclass(frozen=True, slots=True)
class Machine:
    """A device of torch, and the libraries for it.

    Args:
        device: "cuda", or "cpu" if the kernels are emulated.
        kernels: what `op_cuda.open_kernels` returned.
        plugin, harness: the plugin library and the mock of TensorRT; None if `missing` gives a reason.
        missing: why there is no plugin library.
    """

    device: str
    kernels: Any
    plugin: Path | None
    harness: Path | None
    missing: str = ""

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def name(self) -> str:
        return str(torch.cuda.get_device_name()) if self.is_gpu else "CPU emulator, no GPU"

    @property
    def stream(self) -> int | None:
        """The current stream of torch, on which kernels are enqueued."""
        return torch.cuda.current_stream().cuda_stream if self.is_gpu else None

    def place(self, array: Array) -> torch.Tensor:
        """Copy `array` to the device; bfloat16 is that of ml_dtypes."""
        dense = np.ascontiguousarray(array)
        if dense.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(dense.view(np.int16)).to(self.device).view(torch.bfloat16)
        return torch.from_numpy(dense).to(self.device)

    def fetch(self, tensor: torch.Tensor) -> Array:
        """Copy a tensor back to the host; waits for the device."""
        if tensor.dtype == torch.bfloat16:
            return np.asarray(tensor.view(torch.int16).cpu().numpy().view(ml_dtypes.bfloat16))
        return np.asarray(tensor.cpu().numpy())


def link_harness(folder: Path, headers: Path) -> Path:
    """The mock of TensorRT, compiled by nvcc against TensorRT's headers."""
    library = folder / "libharness.so"
    source = ROOT / "tests" / "custom_ops" / "tensorrt" / "harness.cc"
    nvcc(["-shared", "-Xcompiler", "-fPIC", "-isystem", str(headers), str(source), "-ldl", "-o", str(library)])
    return library


def link_plugin(folder: Path, headers: Path, objects: list[Path]) -> Path:
    """The plugin library of these kernels, which exports only its entry points."""
    library = folder / "libibnorm_trt.so"
    tensorrt = ROOT / "custom_ops" / "tensorrt"
    sources = [str(tensorrt / name) for name in ("library.cc", "plugin.cc", "fields.cc")]
    flags = ["-shared", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-isystem", str(headers)]
    flags += ["-Xlinker", f"--version-script={tensorrt / 'exports.map'}"]
    nvcc([*flags, *sources, *map(str, objects), "-o", str(library)])
    return library


def gpu(folder: Path, plugin: Path | None = None) -> Machine:
    """The first GPU, with the kernels compiled for it into `folder`.

    Args:
        plugin: the library to check; None compiles one from the same kernels.

    Raises:
        ToolMissingError: nvcc is not installed.
    """
    kernels = op_cuda.load_kernels("sm_{}{}".format(*torch.cuda.get_device_capability()), folder)
    headers = trt_plugin.headers()
    if headers is None:
        return Machine("cuda", kernels, None, None, NO_HEADERS)
    if plugin is None:
        objects = [folder / f"{name}.o" for name in ("float32", "float16", "bfloat16", "run")]
        plugin = link_plugin(folder, headers, objects)
    return Machine("cuda", kernels, plugin, link_harness(folder, headers))


def emulator(folder: Path, plugin: Path | None = None) -> Machine:
    """The kernels' own source, compiled by g++ and run on the CPU.

    This shows that the check works, and measures nothing.

    Args:
        plugin: the library to check; None builds one on the emulated kernels.
    """
    kernels = cuda_emulator.build(ROOT / ".cache" / "cuda-emulator")
    shim, library = folder / "shim.cc", folder / "libkernels.so"
    shim.write_text(op_cuda.SHIM)
    command = [str(cuda_emulator.compiler()), "-std=c++17", "-shared", "-fPIC", f"-I{ROOT / 'custom_ops' / 'include'}"]
    command += [str(shim), str(kernels), f"-Wl,-rpath,{kernels.parent}", "-o", str(library)]
    subprocess.run(command, check=True)
    headers = trt_plugin.headers()
    if headers is None:
        return Machine("cpu", op_cuda.open_kernels(library), None, None, NO_HEADERS)
    plugin = trt_plugin.build_plugin(headers) if plugin is None else plugin
    return Machine("cpu", op_cuda.open_kernels(library), plugin, trt_plugin.build_harness(headers))
