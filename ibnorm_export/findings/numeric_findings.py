"""What running a file can show: title, meaning, importance, remedy and example by code."""

from __future__ import annotations

from typing import Final

from ibnorm_export.findings.code import FindingCode as Code

__all__ = ["TEXTS"]

_ATTRIBUTION: Final = "Read the line `error attribution`, and run verify with --layers to see where the error begins."

TEXTS: Final[dict[Code, tuple[str, str, str, str, str]]] = {
    Code.OUTPUT_ERROR: (
        "An output exceeds its tolerance",
        "The output differs from PyTorch in float64 by more than the tolerance, which follows from PyTorch's error "
        "in the same dtype.",
        "The file does not compute what the checkpoint computes.",
        _ATTRIBUTION,
        "relative error 0.012, tolerance 3.1e-06",
    ),
    Code.DTYPE_UNFIT: (
        "The model does not fit this dtype",
        "PyTorch itself, in this dtype, is far from float64, so that nothing can be compared.",
        "The model gives poor results in this dtype in every runtime.",
        "Export in another dtype: bf16 has the range of fp32, and fp16 has more digits than bf16.",
        "Activations above 65504 overflow in fp16.",
    ),
    Code.NOT_FINITE: (
        "The output has NaN or infinity",
        "The file overflows, divides by zero, or masks a whole row where PyTorch has numbers; or, if the message says "
        "so, PyTorch overflows in this dtype too, and the model does not fit it.",
        "One NaN spoils everything that is computed from it.",
        "Run verify with --layers to see the first layer. For fp16 try bf16 or fp32.",
        "logits: 12 values are NaN in random sample 3.",
    ),
    Code.OUTPUT_SHAPE: (
        "An output is missing or has another shape",
        "The file does not return what the checkpoint returns.",
        "Nothing can be compared, and programs that use the file fail.",
        "Export again; with --model, check that the factory's module returns the same outputs.",
        "logits has shape (2, 1, 256); its shape must be (2, 7, 256).",
    ),
    Code.SAMPLE_REFUSED: (
        "The runtime refuses an input that PyTorch takes",
        "Running the file on this sample ends in an error.",
        "Users may give such inputs: other sizes, the longest sequence, a large batch.",
        "Read the runtime's message. A size that is fixed in the file needs an export without --shape.",
        "A file that was traced with a batch of 1 refuses a batch of 9.",
    ),
    Code.MASKED_ROWS: (
        "Only rows that are masked throughout differ",
        "The difference is in rows whose attention_mask is 0 everywhere.",
        "Values of such rows have no meaning, and runtimes fill them differently.",
        "Give inputs with at least one token in each row.",
        "A batch is filled up with empty rows.",
    ),
    Code.FILE_REFUSED: (
        "The runtime does not load the file",
        "The runtime that was chosen cannot read this file.",
        "The file cannot be used there.",
        "Install a newer runtime, or export for this one: ibnorm-export export --for RUNTIME.",
        "opset 25 is under development, ONNX Runtime 1.22 supports 23",
    ),
    Code.RUNTIME_FAULT: (
        "A known fault of this version of the runtime",
        "The file is right, and this version of ONNX Runtime computes an operator wrongly.",
        "The results are wrong wherever this version runs.",
        "Install the version that the message names, or export with the opset that it names.",
        "ONNX Runtime 1.23 gives NaN for texts that are padded on the left.",
    ),
    Code.ERROR_SOURCE: (
        "Where the error comes from",
        "The step from the checkpoint to the running file that adds the error: mapping, dtype, exporter, optimiser or "
        "kernel.",
        "It shows where the problem is and what to change.",
        "For the optimiser, use a newer runtime; for the kernel, use --kernels function and report it; for the "
        "exporter, export again: if the new file is right, something changed this one, else report it with the "
        "checkpoint's config.",
        "error source optimiser",
    ),
    Code.FIRST_LAYER: (
        "The first norm or block that is wrong",
        "Up to this layer the file agrees with PyTorch; its output exceeds its tolerance.",
        "The fault is in this layer or in what feeds it.",
        "Look at this layer in the file, for example with Netron, and run verify with --layers.",
        "model.layers.3.mlp is the first layer that exceeds its tolerance.",
    ),
    Code.DECODING_ERROR: (
        "Text generation with a cache exceeds its tolerance",
        "Steps that reuse the cache differ from PyTorch by more than the tolerance.",
        "The first token is right and the text drifts.",
        _ATTRIBUTION,
        "decoding (24 calls): relative error 0.3",
    ),
    Code.DECODING_REFUSED: (
        "Text generation with a cache fails",
        "Feeding tokens one by one ends in an error of the runtime.",
        "The model cannot generate text.",
        "Read the runtime's message, and export again with --task text-generation.",
        "The cache has no slot left for the last token.",
    ),
    Code.RESUME_DIFFERS: (
        "A saved cache gives other results",
        "Decoding goes on from a cache that was saved and loaded, and gives other bits than without a break.",
        "Servers save and share caches.",
        "Report it with the model and the versions that `ibnorm-export doctor` prints.",
        "call 13 differs from decoding without a break",
    ),
    Code.PREDICTIONS_DIFFER: (
        "Predictions on a text are worse than PyTorch's",
        "The likeliest tokens, the distribution or the perplexity differ by more than the limit of this type.",
        "Quantised models lose quality before any output looks wrong.",
        "Use a smaller --block-size, --head-dtype int8, or int8 instead of int4; measure with `evaluate`.",
        "agreement 91% (at least 95%)",
    ),
    Code.UNROUNDED_REFUSED: (
        "The copy without rounding cannot be run",
        "A half-precision file is also compared without rounding, and the runtime refuses that copy.",
        "Small faults hide behind the rounding of half precision.",
        "Read the runtime's message; use a newer ONNX Runtime.",
        "The runtime has no kernel for an operator in float32.",
    ),
    Code.MAPPING_NORM: (
        "A norm of your code is exported as another norm",
        "Your class, run in float64, differs from the IBNorm that stands for it in the file.",
        "The file is a right export of the wrong norm.",
        "Correct lambda, epsilon or convention in your adapter or config; `ibnorm-export identify` measures them.",
        "relative error 0.17 against your class model:IBNorm",
    ),
    Code.MAPPING_OUTPUTS: (
        "Your module and the exported one differ, though every norm agrees",
        "Replacing your norms changes the outputs of the model.",
        "The model uses its norms in another way than calling them.",
        "Check whether your code reads the norms' weights, or calls something else than their forward.",
        "The model multiplies its input by norm.weight itself.",
    ),
    Code.EXPECTED_UNFIT: (
        "The expected values are too rough for a comparison",
        "On these inputs, the dtype of the training code differs from float64 too much.",
        "A right file could not be told from a wrong one.",
        "Save values that were computed in fp32, or other inputs.",
        "Values of a run under autocast in bf16.",
    ),
    Code.EXPECTED_FILE: (
        "The file does not give the values of the training code",
        "On the inputs that the training code saved, the file differs by more than the tolerance.",
        "The file does not compute what was trained.",
        "If the checkpoint agrees, see the other findings. If it does not, correct the config.",
        "ibnorm-export verify model.onnx checkpoint --expected values.npz",
    ),
    Code.EXPECTED_CHECKPOINT: (
        "The checkpoint does not give the values of the training code",
        "PyTorch, with this checkpoint and config, differs from what the training code computed.",
        "The config describes another model than the one that was trained, so every export of it is wrong.",
        "Use the reading that the message names, compare the weights, and check that the model was in evaluation mode.",
        "This reading fits: lambda 8 instead of 4.",
    ),
    Code.EXPECTED_REFUSED: (
        "The file cannot be run on the expected inputs",
        "The runtime refuses the inputs that the training code saved.",
        "Nothing is compared with the training code.",
        "Save inputs of the sizes that the file takes, or export without --shape.",
        "The saved batch has 16 rows, and the file has a fixed batch of 1.",
    ),
    Code.NOT_FUSED: (
        "A norm does not run as a fused kernel",
        "--require-fused is set, and this norm runs as its definition, or on another device, or after a copy.",
        "The results are right, and slower than they can be.",
        "`ibnorm-export doctor` shows whether the library of kernels is there; the message names the reason.",
        "ibnorm-export verify model.onnx checkpoint --require-fused",
    ),
}
