"""ONNX files that something else made: which ports are the network's, and whether they compute what it computes."""
