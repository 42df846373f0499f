"""The one lazy importer for optional packages; its error names the extra to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from dexport.errors import MachineError

EXTRA_OF = {
    "polygraphy": "rtx",
    "tensorrt_rtx": "rtx",
    "tensorrt": "gpu",
    "pycuda": "gpu",
    "cryptography": "sign",
    "cuda": "plugins",
    "matplotlib": "plots",
    "triton": "plugins",
}


def optional_import(module: str, extra: str = "") -> ModuleType:
    """Import ``module`` or raise a :class:`MachineError` that names the extra which brings it.

    Args:
        extra: of several extras that bring it, the one to name.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = extra or EXTRA_OF[module.partition(".")[0]]
        raise MachineError(
            f"{module} is needed for this and cannot be imported: {error}",
            hint=f"pip install 'dexport[{extra}]'",
        ) from error
