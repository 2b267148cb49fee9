"""What the content of a file or folder can get wrong: title, meaning, importance, remedy and example by code."""

from __future__ import annotations

from typing import Final

from ibnorm_export.findings.code import FindingCode as Code

__all__ = ["TEXTS"]

_EXPORT_AGAIN: Final = (
    "Export the checkpoint again and do not edit the file. If a tool changed it, leave that tool out."
)

TEXTS: Final[dict[Code, tuple[str, str, str, str, str]]] = {
    Code.NORM_COUNT: (
        "A norm is missing, repeated or changed",
        "The file computes this norm less or more often than the checkpoint runs it, or not as the checkpoint defines "
        "it: no output depends on a node of it, or on standard operators that compute it with its weights.",
        "A norm that was dropped or changed gives other numbers, sometimes only on inputs that no sample has.",
        f"{_EXPORT_AGAIN} Check that no simplifier fused or removed the node.",
        "An optimiser takes two norms with equal weights for one and removes the second.",
    ),
    Code.NORM_UNKNOWN: (
        "The file has a norm that the checkpoint lacks",
        "A norm node names a module that is not a norm of this checkpoint.",
        "The file was exported from another model, or a node was added.",
        "Compare the file with the checkpoint that it was exported from.",
        "ibnorm-export verify gpt2.onnx checkpoints/llama",
    ),
    Code.NORM_DIFFERS: (
        "A norm has another type, lambda, epsilon, scale or bias",
        "The node's operator, an attribute, or the weight that is connected to it is not what the checkpoint has.",
        "Lambda 4.1 instead of 4.0 changes every output a little: enough to lose accuracy, too little to be seen.",
        "Correct the ibnorm section of config.json if that is wrong, and export again.",
        "attribute lambd is 4.1; the checkpoint has 4.0",
    ),
    Code.NORM_ORDER: (
        "Norms were exchanged",
        "A norm depends on one that runs after it in the checkpoint.",
        "Two norms with weights of the same size may be exchanged without an error of shapes.",
        _EXPORT_AGAIN,
        "The norms before and after the attention are exchanged.",
    ),
    Code.FUNCTION_MISSING: (
        "The definition of the operator is not in the file",
        "A node calls an IBNorm operator, and the file has no function that defines it.",
        "Only a runtime with the library of fused kernels can run the file; any other one refuses it.",
        _EXPORT_AGAIN,
        "A converter drops the local functions of the file.",
    ),
    Code.FUNCTION_DIFFERS: (
        "The definition of the operator was changed",
        "The body of a function in the file is not the operator's definition.",
        "Runtimes without the fused kernel compute what the body states, which is another norm.",
        _EXPORT_AGAIN,
        "A tool replaces the second mean of IBNormT by a constant.",
    ),
    Code.WEIGHT_DIFFERS: (
        "A weight has other values than the checkpoint",
        "A weight of the file differs from the one of the same name, after the rounding of the file's type.",
        "The file computes with other weights: of another step of the training, or damaged ones.",
        "Compare with the checkpoint that was exported, choose --weights raw or ema, or export again.",
        "ibnorm-export verify model.onnx checkpoints/epoch-9, where the file is of epoch 8.",
    ),
    Code.WEIGHT_MIXED: (
        "Blocks of one weight are used with the scales of another",
        "A quantised matrix is stored in several tensors, and a node mixes those of different weights.",
        "The product has the right shape and wrong numbers.",
        _EXPORT_AGAIN,
        "The values of the key projection meet the scales of the query projection.",
    ),
    Code.WEIGHT_MISSING: (
        "The file does not use a weight that the checkpoint uses",
        "No output of the file depends on this weight, or the weight is not in the file.",
        "A part of the network is left out, such as the bias of a layer.",
        _EXPORT_AGAIN,
        "The bias of the last layer is missing.",
    ),
    Code.CONSTANT_UNKNOWN: (
        "A constant is neither a weight nor computed from weights",
        "An output depends on a constant of the file that does not come from the checkpoint.",
        "It may scale or shift the results, as a factor that a tool left behind.",
        _EXPORT_AGAIN,
        "An added node multiplies the logits by 1.01.",
    ),
    Code.CONSTANT_UNREADABLE: (
        "The value of a constant cannot be computed",
        "A constant is the result of operators that cannot be run here, so it is compared with nothing.",
        "The verdict would not cover this part of the file.",
        _EXPORT_AGAIN,
        "A weight is the output of an operator of another domain.",
    ),
    Code.CONSTANT_TWICE: (
        "Two constants have one name",
        "The file has two tensors of this name.",
        "Runtimes choose differently, so the file means different things in different runtimes.",
        _EXPORT_AGAIN,
        "A script adds an initializer and leaves the old one in the file.",
    ),
    Code.NUMBER_UNKNOWN: (
        "The file computes with a number that PyTorch does not use",
        "An operator has a number, such as a factor or an epsilon, that a run of the checkpoint does not have.",
        "A wrong number may show only on some inputs.",
        _EXPORT_AGAIN,
        "The scale of the attention is 0.2 instead of 0.125.",
    ),
    Code.WINDOW_UNKNOWN: (
        "Attention is limited to a window that PyTorch does not have",
        "An attention node sees only the last tokens of a text, and the checkpoint sees all of them.",
        "Long texts give other results, short ones do not.",
        _EXPORT_AGAIN,
        "local_window_size is 128 in a model without a window.",
    ),
    Code.POSITION_UNKNOWN: (
        "The file uses a position or size that PyTorch does not use",
        "An operator selects, cuts or limits at a position that a run of the checkpoint does not have.",
        "Values are cut off or exchanged, often only in long inputs.",
        _EXPORT_AGAIN,
        "A Slice keeps 64 positions of a model with 128.",
    ),
    Code.BRANCHES: (
        "The file branches or loops",
        "The file has If, Loop or Scan, and PyTorch computes this checkpoint without a branch.",
        "What the file computes then depends on inputs that no sample may have.",
        _EXPORT_AGAIN,
        "An If node returns other logits for one token.",
    ),
    Code.DROPOUT: (
        "The file drops values at random",
        "A Dropout node is in training mode.",
        "Two runs give different results.",
        "Export the model in evaluation mode: model.eval().",
        "A Dropout node whose training_mode is true.",
    ),
    Code.RANDOM_NUMBERS: (
        "The file draws random numbers",
        "An operator draws random numbers, and PyTorch draws none for this checkpoint.",
        "Two runs give different results.",
        "Export the model in evaluation mode: model.eval().",
        "A RandomNormal node adds noise to the embedding.",
    ),
    Code.OUTPUT_FLOAT64: (
        "An output is float64",
        "The file declares an output of double precision, which the checkpoint does not give.",
        "Programs that read the output as float32 read garbage.",
        _EXPORT_AGAIN,
        "A tool changes the type of the logits.",
    ),
    Code.NODE_PRECISION: (
        "A node computes in half precision where PyTorch computes in float32",
        "An attribute makes an operator compute in float16 or bfloat16.",
        "The error grows, though every weight is right.",
        _EXPORT_AGAIN,
        "stash_type of a normalisation is FLOAT16.",
    ),
    Code.TYPES_UNSOUND: (
        "The types of the file do not fit together",
        "The types that operators take are not those that the file gives them.",
        "A runtime refuses to load the file.",
        _EXPORT_AGAIN,
        "A weight is float16 in a node that has a float32 input.",
    ),
    Code.INPUT_USE: (
        "An input is used in another way than in PyTorch",
        "The file clips, remaps, compares or ignores an input, and PyTorch does not.",
        "Only some inputs show it, such as one token id.",
        _EXPORT_AGAIN,
        "Token ids are clipped to 1000 in a vocabulary of 32000.",
    ),
    Code.CONVERSION: (
        "The file converts to a type that PyTorch does not use",
        "A Cast goes to a type that does not occur in a run of the checkpoint.",
        "The conversion loses digits or range.",
        _EXPORT_AGAIN,
        "The mask is converted to int8.",
    ),
    Code.METADATA_CLAIM: (
        "The metadata states what the file is not",
        "The file states that its norms are inlined, or a number of bits or a block size, and its nodes differ.",
        "Tools read the metadata instead of the nodes.",
        _EXPORT_AGAIN,
        "The metadata states int4, and the matrices have 8 bits.",
    ),
    Code.METADATA_TWICE: (
        "A key of the metadata is there twice",
        "The file has two entries with one key.",
        "Readers choose differently.",
        _EXPORT_AGAIN,
        "ibnorm.task is both forward and text-generation.",
    ),
    Code.METADATA_NORM: (
        "The metadata of a norm differs from the checkpoint",
        "The norm that the metadata describes is missing, unknown, or has other parameters.",
        "Other tools, such as the builder of engines, take the norm's parameters from there.",
        _EXPORT_AGAIN,
        "The metadata states lambda 8, and the checkpoint has 4.",
    ),
    Code.METADATA_ENTRY: (
        "An entry of the metadata differs from a new export",
        "Task, positions, config or kind of cache are not what the checkpoint gives.",
        "A program that relies on them feeds the model wrongly.",
        _EXPORT_AGAIN,
        "max_positions is 2048 in a model of 1024 positions.",
    ),
    Code.FILE_EXTRA: (
        "The folder has a file that the checkpoint lacks",
        "A file of the tokenizer or of the generation settings is in the folder, but not in the checkpoint.",
        "Runtimes read it, so that the text is split or sampled in another way.",
        "Remove the file, or add it to the checkpoint and export again.",
        "generation_config.json was copied from another model.",
    ),
    Code.FILE_MISSING: (
        "A file is missing in the folder",
        "The checkpoint or the manifest has this file, and the folder does not.",
        "The folder cannot be used without it.",
        "Copy the whole folder, or export again.",
        "tokenizer.json was not copied to the server.",
    ),
    Code.FILE_DIFFERS: (
        "A setting in the folder differs from the checkpoint",
        "The tokenizer, the generation settings or the settings of GenAI have another value than an export writes.",
        "The model may be right and the text wrong, for example with another end token.",
        "Export again, or put the change into the checkpoint first.",
        "genai_config.json eos_token_id is 2; the checkpoint gives 0.",
    ),
    Code.FILE_UNREADABLE: (
        "A file of the folder cannot be read",
        "It is damaged, not JSON, or not what its name says.",
        "No runtime can use the folder.",
        "Copy the folder again, or export again.",
        "tokenizer.json was cut off when the disk was full.",
    ),
    Code.MANIFEST_WRONG: (
        "The manifest of the folder is wrong",
        "It is damaged, names another target, or lists a file outside the folder.",
        "Nothing shows that the files are those that were exported.",
        _EXPORT_AGAIN,
        "A file is listed as ../model.onnx.",
    ),
    Code.FILE_CHANGED: (
        "A file was changed after the export",
        "Its SHA-256 is not the one in the manifest.",
        "Nobody compared the changed file with the checkpoint.",
        "Export again, or put the change into the checkpoint first.",
        "Somebody edited special_tokens_map.json in the folder.",
    ),
    Code.LIBRARY_UNLISTED: (
        "A native library is not in the manifest",
        "The folder has a .so, .dll or .dylib that the export did not write.",
        "A runtime may load it, and it may do anything.",
        "Remove the library, unless you know where it comes from.",
        "libcustom.so lies next to model.onnx.",
    ),
    Code.LIBRARY_DIFFERENT: (
        "The library in the folder is not that of the fused kernels",
        "Its hash differs from the manifest, or it does not define the operators.",
        "The runtime computes the norms with unknown code, or refuses the model.",
        "Export again with --kernels fused.",
        "The library of an older version was copied over the new one.",
    ),
}
