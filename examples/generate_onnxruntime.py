"""Generate text from a portable folder with onnxruntime, tokenizers and numpy only, without ibnorm-export.

    ibnorm-export export demo/llama -o llama --task text-generation
    python examples/generate_onnxruntime.py llama "The import statement"

To use the fused kernels, add this line before the session is created:
    options.register_custom_ops_library("libibnorm_ort.so")
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

NEW_TOKENS = 64


def main(folder: Path, prompt: str) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    options = ort.SessionOptions()
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])

    outputs = [o.name for o in session.get_outputs()]
    past = {
        i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), dtype=np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past_key_values.")
    }
    tokens = np.array([tokenizer.encode(prompt).ids], dtype=np.int64)
    text: list[int] = []
    length = 0
    for _ in range(NEW_TOKENS):
        length += tokens.shape[1]
        feeds = {
            "input_ids": tokens,
            "attention_mask": np.ones((1, length), dtype=np.int64),
            "position_ids": np.arange(length - tokens.shape[1], length, dtype=np.int64)[None],
            **past,
        }
        results = dict(zip(outputs, session.run(None, feeds), strict=True))
        past = {name: results[name.replace("past_key_values", "present")] for name in past}
        tokens = results["logits"][:, -1:].argmax(-1).astype(np.int64)
        text.append(int(tokens[0, 0]))
    print(prompt + tokenizer.decode(text))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: generate_onnxruntime.py FOLDER PROMPT")
    main(Path(sys.argv[1]), sys.argv[2])
