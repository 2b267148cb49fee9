"""Does the exported model still do its task? python evaluate_exports.py CHECKPOINT DATA.npz (images and labels)"""

import sys
from pathlib import Path

from ibnorm_export import EvaluationOptions, ExportOptions, evaluate, export, load

checkpoint, data = sys.argv[1:]
model = load(checkpoint)
files = [export(model, f"{dtype}.onnx", options=ExportOptions(dtype)) for dtype in ("fp32", "fp16")]
options = EvaluationOptions(max_drop=0.005, results=Path("evaluation-results"))
report = evaluate(files, task="classification", data=data, against=model, options=options)
print(report)
for change in report.candidates[-1].changed_answers:
    print(f"{change.sample}: {change.reference} became {change.candidate}, and {change.truth} is right")
sys.exit(0 if report else 1)
