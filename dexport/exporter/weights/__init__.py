"""Weights by name, from files that nobody vouches for: safetensors, PyTorch files, Hub addresses, or seeded noise.

They are read one at a time: nothing here holds more than the tensor that was asked for.
"""
