"""ONNX Runtime for JavaScript: onnxruntime-web and onnxruntime-node in a process of Node."""
