"""First steps: export one model in fp16 and fp32, verify both files, and compare the speed with PyTorch.

python examples/first_steps.py demo/llama
"""

import sys

from ibnorm_export import DType, ExportOptions, bench, export, load, verify

model = load(sys.argv[1])
half = export(model, "model.fp16.onnx", options=ExportOptions(DType.FP16))
full = export(model, "model.onnx")
for file in (half, full):
    print(verify(file, model))
print(bench(full, model, against=["torch"]))
