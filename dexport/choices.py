"""Names that an option can have and that the code knows, apart from it: the command line lists them without torch."""

from __future__ import annotations

AUTO = "auto"

PRECISIONS = ("fp32", "fp16", "bf16")
"""Of a build; ``auto`` is one more."""
GUIDANCE = ("none", "fused")
CARRIERS = ("packed", "int4", "int8", "nbits2", "nbits4")
"""How ternary weights are stored; ``auto`` is one more."""
FLAVOURS = ("tensorrt", "tensorrt-rtx")
"""Of engines; ``auto`` is one more."""
PLUGINS = (AUTO, "on", "off")
PROVIDERS = ("cpu", "cuda")
"""What runs ONNX files."""
LEVELS = ("op", "forward", "trajectory", "distribution")
"""Of ``dexport validate``."""
DEFAULT_LEVELS = ("op", "forward", "trajectory")
EVALUATORS = ("inception", "efficientnet-lite0", "pixels")
DTYPES = ("float16", "bfloat16", "float32")
"""That kernels are compiled for."""
STATES = ("example", "trajectory")
"""Inputs of ``dexport diff``."""
