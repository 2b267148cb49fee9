"""What may be missing on a machine or assumed of a checkpoint: title, meaning, importance, remedy and example."""

from __future__ import annotations

from typing import Final

from ibnorm_export.findings.code import FindingCode as Code

__all__ = ["TEXTS"]

TEXTS: Final[dict[Code, tuple[str, str, str, str, str]]] = {
    Code.NO_PYTORCH: (
        "PyTorch does not work",
        "torch is not installed, or its libraries do not load.",
        "Nothing can be exported or verified.",
        "Install torch from the index for your CPU or CUDA version.",
        "pip install torch",
    ),
    Code.NO_ONNXRUNTIME: (
        "ONNX Runtime does not work",
        "onnxruntime is not installed, or does not load.",
        "Nothing can be verified or measured.",
        "Install one of the two packages: for the CPU, or for an NVIDIA GPU.",
        "pip install 'ibnorm-export[cpu]'",
    ),
    Code.TWO_ONNXRUNTIMES: (
        "Two packages of ONNX Runtime overwrite each other",
        "onnxruntime and onnxruntime-gpu are both installed, and they are the same module.",
        "Which of the two runs is chance, and the GPU may be silently unused.",
        "Uninstall both, then install one.",
        "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'ibnorm-export[gpu]'",
    ),
    Code.OLD_ONNXRUNTIME: (
        "ONNX Runtime is too old for some files",
        "The installed version does not run the newest opset that files are exported with.",
        "Such files do not load.",
        "Install a newer version, or export for this one.",
        "ibnorm-export export checkpoint -o model.onnx --for 'ort>=1.18'",
    ),
    Code.NO_FUSED_KERNELS: (
        "The library of fused kernels is not there",
        "The package has no library for this machine, or it does not load.",
        "Files run, and their norms are slower.",
        "Install the wheel for your platform, or build the library: make native.",
        "ibnorm-export doctor",
    ),
    Code.NO_OPTIONAL_PACKAGE: (
        "An optional package is not installed",
        "A command or backend needs a package that is not installed.",
        "Only that command or backend is missing.",
        "Install the extra that the message names.",
        "pip install 'ibnorm-export[plots]'",
    ),
    Code.NO_NODE_PACKAGE: (
        "Node or a package of it is not there",
        "The backends ort-web and ort-node run files in Node.",
        "Files cannot be verified for a browser.",
        "Install Node 18 or later and the package, and give its folder with --npm.",
        "npm install --ignore-scripts --prefix DIR onnxruntime-web",
    ),
    Code.NO_TRITON: (
        "Triton is not there",
        "No Triton server was found on this machine.",
        "`serve` cannot start a model repository; `package` can write one.",
        "Install Triton's package, or run its container.",
        "pip install --no-deps nvidia-pytriton",
    ),
    Code.NO_COMPILER: (
        "A compiler or build tool is not there",
        "torch.compile needs a C++ compiler; building the kernels needs CMake, and nvcc for GPUs.",
        "Only these are missing: comparisons with torch.compile, and builds of the libraries.",
        "Install the tool that the message names.",
        "apt-get install g++",
    ),
    Code.NO_GPU: (
        "There is no GPU that torch can use",
        "torch is a CPU build, or finds no GPU.",
        "GPU backends cannot be verified or measured here.",
        "Install torch with CUDA, and check the driver with nvidia-smi.",
        "nvidia-smi",
    ),
    Code.NO_TENSORRT: (
        "TensorRT is not installed",
        "The package of TensorRT or TensorRT-RTX is not installed, or does not load.",
        "Engines cannot be built or run here.",
        "Install the extra; TensorRT-RTX builds engines without a GPU.",
        "pip install 'ibnorm-export[tensorrt-rtx]'",
    ),
    Code.NO_TENSORRT_PLUGIN: (
        "The TensorRT plugin is not there",
        "The library with the plugin was not built, or not for this version of TensorRT.",
        "Engines use the function of the norm instead of the plugin.",
        "Build it with make native-cuda, where nvcc is installed.",
        "ibnorm-export build-engine model.onnx -o model.plan --norm plugin",
    ),
    Code.CHECKPOINT_NOTE: (
        "How the checkpoint was read",
        "The checkpoint leaves something open or is written in a form that had to be translated.",
        "If the reading is wrong, every export of it is.",
        "Check the note. `verify --expected` compares with values that your training code saved.",
        "The names of the weights had the prefix module., which was removed.",
    ),
    Code.CHECKPOINT_WARNING: (
        "The checkpoint may not be what you want to export",
        "Something in it is unusual, such as weights that are not used.",
        "The export is right for this checkpoint, but the checkpoint may be wrong.",
        "Read the sentence, and compare the checkpoint with your training code.",
        "ibnorm-export inspect checkpoint",
    ),
}
