"""PyTorch's global state as it is in a fresh process, for as long as dexport works.

A build and its reference are float32 on the CPU, whatever the program that calls dexport has set for its own work: a
default type or device, autocast, inference mode, products in bfloat16, modes that intercept every call. It finds all of
it as it was, the state of its random numbers included.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import _C, overrides
from torch.utils import _device
from torch.utils._python_dispatch import _disable_current_modes

IEEE, DEFAULT, TF32 = "ieee", "none", "tf32"
FLOAT32 = {
    ("generic", "all"): DEFAULT,
    ("mkldnn", "all"): DEFAULT,
    ("mkldnn", "matmul"): IEEE,
    ("mkldnn", "conv"): DEFAULT,
    ("mkldnn", "rnn"): DEFAULT,
    ("cuda", "all"): DEFAULT,
    ("cuda", "matmul"): IEEE,
    ("cuda", "conv"): TF32,
    ("cuda", "rnn"): TF32,
}
"""How float32 is computed, as PyTorch has it by default; what is ``none`` asks the line above that covers it."""
DEVICES = ("cpu", "cuda")


def _settings() -> Iterator[tuple[Callable[[], Any], Callable[[Any], object], Any]]:
    """Getter, setter and the value in a fresh process."""
    yield torch.get_default_dtype, torch.set_default_dtype, torch.float32
    for device in DEVICES:
        yield (
            functools.partial(torch.is_autocast_enabled, device),
            functools.partial(torch.set_autocast_enabled, device),
            False,
        )
    backends = torch.backends
    yield _C._get_mkldnn_enabled, _C._set_mkldnn_enabled, True
    yield _C._get_mkldnn_deterministic, _C._set_mkldnn_deterministic, False
    yield _C._get_nnpack_enabled, _C._set_nnpack_enabled, True
    yield backends.cuda.flash_sdp_enabled, backends.cuda.enable_flash_sdp, True
    yield backends.cuda.mem_efficient_sdp_enabled, backends.cuda.enable_mem_efficient_sdp, True
    yield backends.cuda.math_sdp_enabled, backends.cuda.enable_math_sdp, True
    yield backends.cuda.cudnn_sdp_enabled, backends.cuda.enable_cudnn_sdp, True
    yield (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda state: torch.use_deterministic_algorithms(state[0], warn_only=state[1]),
        (False, False),
    )


@contextlib.contextmanager
def fresh_torch() -> Iterator[None]:
    """Run the block, or the decorated function, as in a process that has set nothing; then restore what was set."""
    with (
        _no_function_modes(),
        _disable_current_modes(),
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        _float32(),
        _kept_random_state(),
        contextlib.ExitStack() as stack,
    ):
        for get, put, fresh in _settings():
            before = get()
            if before != fresh:
                put(fresh)
            # Whatever the block sets is undone too: a recipe's file may set a default for its own network.
            stack.callback(_restore, get, put, before)
        yield


def _restore(get: Callable[[], Any], put: Callable[[Any], object], before: Any) -> None:
    if get() != before:
        put(before)


@contextlib.contextmanager
def _no_function_modes() -> Iterator[None]:
    """Without modes that intercept calls; a default device is one, which PyTorch remembers in two more places."""
    modes = [_C._pop_torch_function_stack() for _ in range(_C._len_torch_function_stack())]
    default, current = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None), _device.CURRENT_DEVICE
    torch._GLOBAL_DEVICE_CONTEXT.device_context, _device.CURRENT_DEVICE = None, None
    try:
        yield
    finally:
        while overrides._len_torch_function_stack():
            overrides._pop_mode()
        torch._GLOBAL_DEVICE_CONTEXT.device_context, _device.CURRENT_DEVICE = default, current
        for mode in reversed(modes):
            _C._push_on_torch_function_stack(mode)


@contextlib.contextmanager
def _float32() -> Iterator[None]:
    """Float32 products in float32. The older setting for the same writes into the newer ones, so it goes first."""
    older = _older_precision()
    before = {}
    for place in FLOAT32:  # what is above goes first: what is below would be read as the value that it takes from there
        before[place] = _C._get_fp32_precision_getter(*place)
        _C._set_fp32_precision_setter(*place, DEFAULT)
    for place, precision in FLOAT32.items():
        _C._set_fp32_precision_setter(*place, precision)
    if older is not None:
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for place, precision in before.items():
            _C._set_fp32_precision_setter(*place, precision)


def _older_precision() -> str | None:
    """None where only the newer settings were used: PyTorch refuses to say what the older one would be."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


@contextlib.contextmanager
def _kept_random_state() -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield
