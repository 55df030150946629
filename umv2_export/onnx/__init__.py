"""Reference model -> ONNX bundle."""
