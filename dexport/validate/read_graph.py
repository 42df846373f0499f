"""ONNX files that others may have made, as graphs to look at."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from dexport.errors import InputError
from dexport.onnx_reader import OnnxFile


def read_graph(path: Path) -> ir.Model:
    """Check that a file is valid ONNX of a measure, and read it; its weights stay on the disk.

    Raises:
        InputError: it is not.
    """
    try:
        OnnxFile(path.read_bytes()).check_expansion()
        onnx.checker.check_model(str(path))
        return ir.load(path)
    except Exception as error:  # a damaged file makes the parsers raise anything at all
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"{path} cannot be read: {reason}", hint="build or export it again") from error
