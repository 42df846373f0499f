"""``--precision auto``: what does not fit into float16, from the values that PyTorch computes in float32.

Every operation of the network is watched while it samples, not only the outputs of its modules: a square inside a norm
overflows long before the norm's output does. A module becomes a float32 island that computes, reads or stores what
float16 cannot hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dexport.errors import InputError
from dexport.exporter.pytorch.module_path import inside
from dexport.exporter.pytorch.state import fresh_torch
from dexport.exporter.quantize.calibrate import FEWEST_IMAGES, Calibration, sample_batches
from dexport.exporter.recipes.recipe import Islands
from dexport.exporter.trajectory import TorchNetwork
from dexport.exporter.variant import Variant
from dexport.exporter.weights.loading import load_into
from dexport.exporter.weights.source import WeightSource

FLOAT16 = torch.finfo(torch.float16)
SMALLEST = FLOAT16.smallest_normal * FLOAT16.eps
HEADROOM = 8.0
"""A few sampled images do not show the largest value there is: other noise, classes and guidance scales reach further.
Three of float16's forty binary orders of magnitude are a cheap margin."""
LARGEST = FLOAT16.max / HEADROOM
ROUNDING = 2 * FLOAT16.eps
"""Relative L2 error of a tensor in float16. Rounding to 11 bits costs at most eps / 2, whatever the values are; more
comes of values below the normal range, which keep fewer bits, or none."""
SETTINGS = Calibration(images=FEWEST_IMAGES)
ROWS = 2
"""Example rows of a network that is no denoiser."""

OnProgress = Callable[[int, int, str], None]


@dataclass
class Range:
    """What a module's own operations computed, and its own weights are.

    Attributes:
        largest: largest magnitude, and ``operation`` where it was.
        subnormal: largest share of one tensor's values below float16's normal range, zeros apart.
        rounding: largest relative L2 error of one tensor in float16, where it may be more than that of normal values.
        reasons: why it has to stay in float32, each with its largest figure; empty where float16 will do.
    """

    largest: float = 0.0
    operation: str = ""
    subnormal: float = 0.0
    rounding: float = 0.0
    reasons: dict[str, float] = field(default_factory=dict)

    def observe(self, tensor: Tensor, operation: str, largest_allowed: float, *, small: bool) -> bool:
        """Add a float32 tensor; returns whether it is too large for float16.

        Args:
            small: whether it matters if all of it is below the normal range.
        """
        magnitude = tensor.abs()
        largest = float(magnitude.max())
        if math.isnan(largest):
            raise InputError(f"{operation} is NaN in float32", hint="check the checkpoint")
        if math.isinf(largest):  # a mask; float16 has infinity too
            magnitude, tensor = (values.where(tensor.isfinite(), 0) for values in (magnitude, tensor))
            largest = float(magnitude.max())
        if largest > self.largest:
            self.largest, self.operation = largest, operation
        self.subnormal = max(
            self.subnormal, float(((magnitude < FLOAT16.smallest_normal) & (magnitude > 0)).float().mean())
        )
        too_large = largest > largest_allowed
        if too_large:
            self.because(f"{operation} reaches", largest)
        elif small and 0 < largest < math.sqrt(tensor.numel()) * SMALLEST / ROUNDING:
            # Only with such a largest value can those below the normal range decide the error of the whole.
            error = float((tensor.half().float() - tensor).norm() / tensor.norm())
            self.rounding = max(self.rounding, error)
            if error > ROUNDING:
                self.because(f"{operation} in float16 is off by", error)
        return too_large

    def because(self, reason: str, figure: float) -> None:
        """Note why float16 will not do."""
        self.reasons[reason] = max(figure, self.reasons.get(reason, 0.0))


@dataclass(frozen=True)
class Ranges:
    """The ranges of every module that computes something, by path; the root module's is empty."""

    inputs: str
    modules: Mapping[str, Range]

    def islands(self, islands: Islands) -> tuple[str, ...]:
        """Modules to keep in float32 besides those that are islands already."""
        wanted = [path for path, seen in self.modules.items() if seen.reasons and not _covered(path, islands.modules)]
        return tuple(path for path in wanted if not _covered(path, [other for other in wanted if other != path]))

    def summary(self, kept: Iterable[str]) -> dict[str, Any]:
        """What the manifest says: the modules that stay in float32 because of their ranges, and why."""
        return {
            "inputs": self.inputs,
            "kept": {
                path: asdict(seen) for path, seen in self.modules.items() if seen.reasons and _covered(path, list(kept))
            },
        }

    def to_json(self) -> dict[str, Any]:
        """Everything, and the limits."""
        return {
            "inputs": self.inputs,
            "largest_allowed": LARGEST,
            "rounding_allowed": ROUNDING,
            "modules": {path: asdict(seen) for path, seen in self.modules.items()},
        }


def _covered(path: str, patterns: Iterable[str]) -> bool:
    return any(inside(path, pattern) for pattern in patterns)


@fresh_torch()
def find_ranges(variant: Variant, weights: WeightSource, on_progress: OnProgress) -> Ranges:
    """Watch the float32 network along the recipe's own sampling trajectory, or on example inputs if it has none.

    Raises:
        InputError: values that are not finite in float32.
    """
    network = load_into(weights, variant.meta_module()).eval()
    watch = _Watch()
    _observe_weights(network, watch)
    if not variant.runs:
        example = (torch.from_numpy(array) for array in variant.signature.example(ROWS).values())
        with watch.over(network, {}), torch.inference_mode():
            network(*example)
        return Ranges(f"{ROWS} example rows", watch.ranges)
    for _ in sample_batches(variant, _Watched(variant, network, watch), SETTINGS, 0, on_progress):
        pass
    return Ranges(f"{SETTINGS.images} images in {SETTINGS.steps} steps", watch.ranges)


class _Watched(TorchNetwork):
    """A network whose evaluations are watched."""

    def __init__(self, variant: Variant, module: nn.Module, watch: _Watch) -> None:
        super().__init__(variant, module)
        self._module, self._watch = module, watch

    def __call__(self, graph: str, /, **inputs: np.ndarray) -> Mapping[str, np.ndarray]:
        with self._watch.over(self._module, inputs):
            return super().__call__(graph, **inputs)


def _observe_weights(network: nn.Module, watch: _Watch) -> None:
    for name, parameter in network.named_parameters():
        tensor = parameter.detach()
        path, _, own = name.rpartition(".")
        seen = watch.of(path)
        largest = float(tensor.abs().max()) if tensor.numel() else 0.0
        # Weights do not vary: what fits, fits. A tiny bias is added to something larger.
        if largest > FLOAT16.max or tensor.ndim > 1:
            seen.observe(tensor, own, FLOAT16.max, small=tensor.ndim > 1)


class _Watch(TorchDispatchMode):
    """Observes the results of all operations, under the module that they run in."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges: dict[str, Range] = {}
        self._stack = [""]
        self._leaves: set[str] = set()
        self._loud = False
        self._not_a_number: InputError | None = None

    def of(self, path: str) -> Range:
        return self.ranges.setdefault(path, Range())

    @contextmanager
    def over(self, network: nn.Module, inputs: Mapping[str, np.ndarray]) -> Iterator[None]:
        """Watch one evaluation."""
        self._loud = any(
            array.dtype == np.float32 and np.abs(array).max(initial=0) > LARGEST for array in inputs.values()
        )

        def enter(path: str) -> Callable[..., None]:
            def hook(*_: object) -> None:
                self._stack.append(path)

            return hook

        def leave(*_: object) -> None:
            self._stack.pop()

        def check(_module: nn.Module, _inputs: object, result: Any) -> None:
            outputs = result if isinstance(result, tuple) else (result,)
            if self._not_a_number is not None and any(output.isnan().any() for output in outputs):
                raise self._not_a_number

        self._leaves = {path for path, module in network.named_modules() if not any(module.children())}
        handles = []
        for path, module in network.named_modules():
            handles += [module.register_forward_pre_hook(enter(path)), module.register_forward_hook(leave)]
        handles.append(network.register_forward_hook(check))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._stack, self._not_a_number = [""], None

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Views compute nothing; writing in place does. The second results of norms and attention are for training.
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        aliases = [returned.alias_info for returned in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if is_view or not _is_float(first):
            return result
        seen, name = self.of(self._stack[-1]), func._schema.name.rpartition("::")[2]
        if self._loud:
            # A mask's infinities fit into float16.
            largest = max((float(a.abs().nan_to_num(posinf=0.0).max()) for a in _tensors(args)), default=0.0)
            if largest > LARGEST:
                seen.because(f"{name} reads", largest)
        try:
            # Between its modules a block gates and sums: what is small there is added to something larger.
            self._loud |= seen.observe(first, name, LARGEST, small=self._stack[-1] in self._leaves)
        except InputError as error:
            # Rows that are masked as a whole are NaN until a network replaces them: what comes out decides.
            place = self._stack[-1] or "the network"
            self._not_a_number = self._not_a_number or InputError(f"{place}: {error}", hint=error.hint)
        return result


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32 and value.numel() > 0


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, (list, tuple)):
            yield from _tensors(arg)
        elif _is_float(arg):
            yield arg
