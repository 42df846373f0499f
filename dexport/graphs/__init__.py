"""The networks in plain PyTorch, with official parameter names and constructor arguments.

Conventions that keep one source fit for eager use, fake-tensor tracing and weight streaming:

- A table that is not in the official state dict is a non-persistent buffer made with ``device="cpu"``,
  so that it has real values even when the module is built on the meta device.
- Shapes in comments: B batch, C channels, H and W spatial, T tokens, D width, N heads.
"""
