"""Error-compensated rounding of a weight to few bits (GPTQ, arXiv 2210.17323).

What counts is the output of the layer, so an error E of the weight costs ``tr(E H E^T)`` with the Hessian H = X^T X of
the layer's inputs. Columns are rounded one after the other, and what rounding did to one is made good for by the
columns that follow. Columns of large inputs come first, as long as many others are left to correct them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dexport.exporter.quantize.weights import SMALLEST_SCALE

INT4_LEVELS = 7
"""Largest code; -8 is not used, because codes are symmetric."""
BLOCKS = (128, 64, 32, 16)
"""Values that share a scale in INT4: the largest that divides the row. TensorRT wants 128 or 64."""
RAGGED_BLOCK = 32
"""For rows that none of them divides; the last block is shorter."""
DAMPING = 0.01
"""Share of the mean diagonal that is added to the Hessian, whose rank may be lower than its size."""
COLUMNS_AT_ONCE = 128
REFITS = 3
SHRINKS = torch.linspace(1.0, 0.55, 10)
"""INT4 scales that are tried, relative to the one that clips nothing."""
TERNARY_SCALES = torch.linspace(0.5, 2.5, 21)
"""Ternary scales that are tried, in units of the mean magnitude of a channel."""


@dataclass(frozen=True)
class Rounded:
    """A weight of few bits: ``weight[n, k]`` is about ``codes[n, k] * scales[n, k // block]``.

    Attributes:
        codes: (out, in) int8: -7..7 or -1..1.
        scales: (out, blocks) float32; one block for a ternary weight.
    """

    codes: Tensor
    scales: Tensor
    block: int

    def weight(self) -> Tensor:
        """(out, in) float32."""
        return self.codes * spread(self.scales, self.block, self.codes.shape[1])


def int4_block(columns: int) -> int:
    """Values per scale for rows of this length."""
    return next((size for size in BLOCKS if columns % size == 0), RAGGED_BLOCK)


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """(out,) float64: the squared error of every output channel, summed over the inputs that H is of."""
    error = weight.double() - rounded.double()
    return ((error @ hessian.double()) * error).sum(1)


def round_int4(weight: Tensor, hessian: Tensor) -> Rounded:
    """The weight (out, in) in INT4, with the Hessian (in, in) of its inputs."""
    block = int4_block(weight.shape[1])
    importance = hessian.diagonal()
    scales = _int4_scales(weight, importance, block)
    codes = _compensated(weight, hessian, spread(scales, block, weight.shape[1]), INT4_LEVELS)
    nearest = nearest_int4(weight, importance)
    return _better(weight, hessian, [nearest, Rounded(codes, scales, block)])


def round_ternary(weight: Tensor, hessian: Tensor) -> Rounded:
    """The weight (out, in) in ternary, with the Hessian (in, in) of its inputs: one scale per output channel.

    A weight that is ternary already comes back as it is.
    """
    best = nearest_ternary(weight, hessian.diagonal())
    scales = best.scales
    for _ in range(REFITS):
        codes = _compensated(weight, hessian, scales.expand_as(weight), 1)
        scales = _refitted(weight, hessian, codes, scales)
        best = _better(weight, hessian, [best, Rounded(codes, scales, weight.shape[1])])
    return best


def nearest_int4(weight: Tensor, importance: Tensor) -> Rounded:
    """Every value to its nearest code; scales lose least where the columns count by ``importance`` (in,)."""
    block = int4_block(weight.shape[1])
    scales = _int4_scales(weight, importance, block)
    return Rounded(_codes(weight, spread(scales, block, weight.shape[1]), INT4_LEVELS), scales, block)


def nearest_ternary(weight: Tensor, importance: Tensor) -> Rounded:
    """Every value to its nearest of -s, 0, s; scales as in :func:`nearest_int4`."""
    mean = weight.double().abs().mean(1, keepdim=True).float().clamp_min(SMALLEST_SCALE)
    diagonal = _counting(importance).double()
    best_codes, best_scale = torch.zeros_like(weight, dtype=torch.int8), mean
    best_error = torch.full((len(weight), 1), torch.inf, dtype=torch.float64)
    for factor in TERNARY_SCALES:
        codes = _codes(weight, mean * factor, 1)
        weighted = codes.double() * diagonal
        scale = ((weighted * weight).sum(1, keepdim=True) / (weighted * codes).sum(1, keepdim=True)).nan_to_num(0.0)
        error = (diagonal * (weight.double() - scale * codes) ** 2).sum(1, keepdim=True)
        better = error < best_error
        best_codes = torch.where(better, codes, best_codes)
        best_scale = torch.where(better, scale.float(), best_scale)
        best_error = torch.where(better, error, best_error)
    return Rounded(best_codes, best_scale.clamp_min(SMALLEST_SCALE), weight.shape[1])


def _int4_scales(weight: Tensor, importance: Tensor, block: int) -> Tensor:
    columns = weight.shape[1]
    whole = -(-columns // block) * block
    # In float64: the squares of small weights are zero in float32, and then no scale is better than another.
    padded = torch.nn.functional.pad(weight.double(), (0, whole - columns)).unflatten(1, (-1, block))
    diagonal = torch.nn.functional.pad(_counting(importance).double(), (0, whole - columns)).unflatten(0, (-1, block))
    widest = (padded.abs().amax(2, keepdim=True) / INT4_LEVELS).clamp_min(SMALLEST_SCALE)
    errors = torch.stack(
        [
            (diagonal * (padded - _codes(padded, widest * shrink, INT4_LEVELS) * widest * shrink) ** 2).sum(2)
            for shrink in SHRINKS
        ]
    )
    return (widest[..., 0] * SHRINKS[errors.argmin(0)]).float().clamp_min(SMALLEST_SCALE)


def _counting(importance: Tensor) -> Tensor:
    """Columns whose input is always zero count a little: their codes decide nothing, but shall not be arbitrary."""
    return importance.clamp_min(1e-6 * float(importance.mean())) if importance.any() else torch.ones_like(importance)


def _codes(weight: Tensor, scales: Tensor, levels: int) -> Tensor:
    return (weight / scales).round().clamp(-levels, levels).to(torch.int8)


def spread(scales: Tensor, block: int, columns: int) -> Tensor:
    """(out, blocks) -> (out, in)."""
    return scales.repeat_interleave(block, dim=1)[:, :columns]


def _compensated(weight: Tensor, hessian: Tensor, scales: Tensor, levels: int) -> Tensor:
    """Codes (out, in) int8 for given scales (out, in)."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    upper = _inverse_factor(hessian[order][:, order]).to(weight.dtype)
    left, scales = weight[:, order].clone(), scales[:, order]
    codes = torch.empty_like(left, dtype=torch.int8)
    columns = weight.shape[1]
    for start in range(0, columns, COLUMNS_AT_ONCE):
        stop = min(start + COLUMNS_AT_ONCE, columns)
        errors = torch.empty_like(left[:, start:stop])
        for column in range(start, stop):
            codes[:, column] = _codes(left[:, column], scales[:, column], levels)
            error = (left[:, column] - codes[:, column] * scales[:, column]) / upper[column, column]
            left[:, column:stop] -= error[:, None] * upper[column, column:stop]
            errors[:, column - start] = error
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes[:, order.argsort()]


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of H^-1 float64, H being damped."""
    damped = hessian.double()
    mean = float(damped.diagonal().mean()) or 1.0
    damped = damped + DAMPING * mean * torch.eye(len(damped), dtype=torch.float64)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def _refitted(weight: Tensor, hessian: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """The scale (out, 1) of every channel that loses least with these codes: least squares under the Hessian."""
    seen = codes.double() @ hessian.double()
    fitted = (seen * weight).sum(1, keepdim=True) / (seen * codes).sum(1, keepdim=True)
    usable = torch.isfinite(fitted) & (fitted > SMALLEST_SCALE)
    return torch.where(usable, fitted.float(), scales)


def _better(weight: Tensor, hessian: Tensor, candidates: list[Rounded]) -> Rounded:
    """The best of each channel."""
    errors = torch.stack([output_error(weight, candidate.weight(), hessian) for candidate in candidates])
    best = errors.argmin(0)
    rows = torch.arange(len(weight))
    return Rounded(
        torch.stack([candidate.codes for candidate in candidates])[best, rows],
        torch.stack([candidate.scales for candidate in candidates])[best, rows],
        candidates[0].block,
    )
