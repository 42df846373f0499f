"""Whether ONNX Runtime multiplies int8 exactly on this CPU, and how it is made to.

It stores activations as u8. x86 without VNNI adds pairs of products u8 x s8 in 16 bits, which saturate:
255 x 127 + 255 x 127 becomes 32767. Two options of a session avoid that. Both would cost time with VNNI too, where
nothing saturates, so they are set only where a product shows the need.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort

from dexport.onnx_reader import NotOnnxError, OnnxFile

UNSIGNED = "session.x64quantprecision"
"""Weights become u8. ONNX Runtime 1.31 then breaks a DequantizeLinear that has no zero point and ends in no product."""
SIGNED = "session.qdqisint8allowed"
"""Activations stay s8: right for every file, and more than four times slower than that."""
SIZE = 4
LARGEST = 127
EXACT = LARGEST * LARGEST * SIZE
PRODUCT = (
    b"\x08\x08"  # ModelProto.ir_version
    b":\xcf\x01"  # ModelProto.graph
    b"\n\x1c\n\x01a\n\x01s\n\x01z\x12\x01q\x22\x0eQuantizeLinear"
    b"\n\x1e\n\x01q\n\x01s\n\x01z\x12\x01x\x22\x10DequantizeLinear"
    b"\n\x1b\n\x01b\n\x01s\x12\x01w\x22\x10DequantizeLinear"
    b"\n\x11\n\x01x\n\x01w\x12\x01y\x22\x06MatMul"
    b"\x12\x01g"  # name
    b"*\x1b\x08\x04\x08\x04\x10\x03B\x01bJ\x10\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x7f"  # int8
    b"*\x0b\x10\x01B\x01sJ\x04\x00\x00\x80?"  # 1.0
    b"*\x08\x10\x03B\x01zJ\x01\x00"  # int8 0
    b"Z\x13\n\x01a\x12\x0e\n\x0c\x08\x01\x12\x08\n\x02\x08\x04\n\x02\x08\x04"  # float32 (4, 4)
    b"b\x13\n\x01y\x12\x0e\n\x0c\x08\x01\x12\x08\n\x02\x08\x04\n\x02\x08\x04"  # float32 (4, 4)
    b"B\x04\n\x00\x10\r"  # opset 13
)
"""A product as W8A8 stores it, serialised; the runtime has no onnx to make it with."""
SATURATES = "ONNX Runtime's int8 products saturate on this CPU by default (x86 without VNNI)"
SET_ELSEWHERE = f"whatever else runs W8A8 in ONNX Runtime here must set {UNSIGNED} to 1"


@cache
def is_exact(option: str | None = None) -> bool:
    """Whether a product of the largest codes is exact in ONNX Runtime on this CPU, maybe with an ``option`` set."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if option is not None:
        options.add_session_config_entry(option, "1")
    session = ort.InferenceSession(PRODUCT, options, providers=["CPUExecutionProvider"])
    product = session.run(None, {"a": np.full((SIZE, SIZE), LARGEST, np.float32)})[0]
    return bool((product == EXACT).all())


def multiply_exactly(options: ort.SessionOptions, model: str | Path | bytes) -> None:
    """Let a session multiply int8 without saturation, at the price of time where the CPU needs that.

    Args:
        options: of the session.
        model: the ONNX file that it will run, or its bytes.
    """
    if not is_exact():
        content = model if isinstance(model, bytes) else Path(model).read_bytes()
        options.add_session_config_entry(option_for(content), "1")


def option_for(model: bytes) -> str:
    """The faster option that runs this file right."""
    try:
        return UNSIGNED if OnnxFile(model).int8_can_be_unsigned() else SIGNED
    except NotOnnxError:
        return UNSIGNED  # ONNX Runtime says what is wrong with it


def caveat() -> str | None:
    """What has to be known of W8A8 figures that were measured on this CPU; None where products are exact by default."""
    if is_exact():
        return None
    if is_exact(UNSIGNED):
        return f"{SATURATES}; dexport avoids that, so its figures are exact; {SET_ELSEWHERE}"
    return f"{SATURATES}, and this version cannot avoid it: figures of W8A8 are worse than the file"
