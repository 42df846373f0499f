"""Start a model from another model's checkpoint: LiT from DiT, everything except the attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from dexport.errors import InputError, UsageError
from dexport.exporter.pytorch.module_path import inside
from dexport.exporter.weights.address import shorten
from dexport.exporter.weights.choice import MisfitError
from dexport.exporter.weights.loading import fitting_source
from dexport.exporter.weights.source import RandomSource, WeightSource, buffers_of


class InheritingSource(WeightSource):
    """Weights of another checkpoint where names agree, seeded noise in the modules that are not inherited.

    ``origin`` lists what was inherited, what is fresh, and which of the checkpoint's tensors were dropped.

    Raises:
        MisfitError: outside of those modules a name is missing, unexpected or of another shape.
    """

    def __init__(self, base: WeightSource, meta_module: nn.Module, not_inherited: Sequence[str], seed: int) -> None:
        self._base = base
        self._fresh = RandomSource(meta_module, seed)
        self.shapes = self._fresh.shapes

        def excluded(name: str) -> bool:
            return any(inside(name, pattern) for pattern in not_inherited)

        inherited = [name for name in self.shapes if not excluded(name)]
        wrong = [name for name in inherited if base.shapes.get(name) != self.shapes[name]]
        unexpected = [name for name in base.shapes if name not in self.shapes and not excluded(name)]
        if wrong or unexpected:
            listed = "\n    ".join(shorten([*wrong, *unexpected]))
            error = InputError(
                f"{base.origin} cannot be inherited: {len(wrong)} tensors are missing or of another shape, "
                f"{len(unexpected)} are unexpected:\n    {listed}",
                hint="take a checkpoint of the same width, depth, patch and resolution",
            )
            raise MisfitError(len(wrong) + len(unexpected), error)
        self._inherited = frozenset(inherited)
        self.buffers = buffers_of(meta_module)
        self.origin = replace(
            base.origin,
            kind="inherited",
            seed=seed,
            inherited=tuple(inherited),
            fresh=tuple(name for name in self.shapes if excluded(name)),
            dropped=tuple(name for name in base.shapes if excluded(name)),
        )

    def _read(self, name: str) -> Tensor:
        return (self._base if name in self._inherited else self._fresh)._read(name)

    def check_unchanged(self) -> None:
        self._base.check_unchanged()


def inherit_weights(
    checkpoint: str, meta_module: nn.Module, not_inherited: Sequence[str], seed: int, sha256: str = ""
) -> WeightSource:
    """Open ``--init-from``.

    Raises:
        UsageError: the recipe does not say what may be inherited.
    """
    if not not_inherited:
        raise UsageError("this recipe cannot start from another model's checkpoint", hint="use --checkpoint")

    def fit(base: WeightSource) -> WeightSource:
        return InheritingSource(base, meta_module, not_inherited, seed)

    return fitting_source(checkpoint, meta_module, fit, sha256)
