"""Running what was built; works in an environment without torch and onnx."""
