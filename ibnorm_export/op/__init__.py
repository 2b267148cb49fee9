"""The IBNorm operator: its parameters, float64 reference, torch operators, ONNX functions and native libraries."""
