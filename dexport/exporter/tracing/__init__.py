"""From a PyTorch module to ONNX: what a network does is traced, a repeated block once."""
