"""Generate text: one loop for PyTorch, ONNX Runtime and onnxruntime-genai."""
