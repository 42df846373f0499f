"""The Inception of FID: the graph of 2015-12-05 that TensorFlow published, not torchvision's Inception v3.

Architecture: Szegedy et al., arXiv 1512.00567, figures 5 to 7 and 10. What differs from other Inceptions, read in the
published graph: average pools inside blocks leave the padding out of their count, the last block pools by maximum,
and the classifier has 1008 rows. Modules have the names of pytorch-fid and torch-fidelity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

Pool = Callable[[Tensor], Tensor]
Size = int | tuple[int, int]
SIDE = 299
POOL_DIM = 2048
CLASSES = 1008
SPATIAL_CHANNELS = 7
"""Of ``mixed_6/conv``, as sFID takes them: 7 * 17 * 17 = 2023 numbers, about as many as the pool has."""


class InceptionOutput(NamedTuple):
    """All float32.

    Attributes:
        pool: (B, 2048), the global average before the classifier, for FID.
        spatial: (B, 2023), rows, columns and channels of a 17x17x7 map, for sFID.
        logits: (B, 1008) without the classifier's bias, for the Inception Score; None without a classifier.
    """

    pool: Tensor
    spatial: Tensor
    logits: Tensor | None


class FidInception(nn.Module):
    """FID's Inception.

    Args:
        classifier: whether the weights have one.
    """

    def __init__(self, *, classifier: bool) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNormReLU(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNormReLU(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNormReLU(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNormReLU(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNormReLU(80, 192, 3)
        self.Mixed_5b = MixedA(192, pooled=32)
        self.Mixed_5c = MixedA(256, pooled=64)
        self.Mixed_5d = MixedA(288, pooled=64)
        self.Mixed_6a = MixedB(288)
        self.Mixed_6b = MixedC(768, inner=128)
        self.Mixed_6c = MixedC(768, inner=160)
        self.Mixed_6d = MixedC(768, inner=160)
        self.Mixed_6e = MixedC(768, inner=192)
        self.Mixed_7a = MixedD(768)
        self.Mixed_7b = MixedE(1280, pool=average_pool)
        self.Mixed_7c = MixedE(2048, pool=max_pool)
        # The Inception Score is defined without the classifier's bias (its authors' code and ADM's evaluator).
        self.fc = nn.Linear(POOL_DIM, CLASSES, bias=False) if classifier else None

    def forward(self, images: Tensor) -> InceptionOutput:
        """Features of (B, 3, 299, 299) float32 in [-1, 1]."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        pool = x.mean(dim=(2, 3))
        return InceptionOutput(pool, spatial, None if self.fc is None else self.fc(pool))

    def fold(self) -> None:
        """Put every norm into its convolution, in evaluation mode, which is a pass over memory less for each."""
        for module in self.modules():
            if isinstance(module, ConvNormReLU):
                module.conv = fuse_conv_bn_eval(module.conv, module.bn)
                module.bn = nn.Identity()  # type: ignore[assignment]


class ConvNormReLU(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, channels: int, out: int, kernel: Size, *, stride: int = 1, padding: Size = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def average_pool(x: Tensor) -> Tensor:
    """3x3 averages of what lies inside the image."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x: Tensor) -> Tensor:
    """3x3 maxima."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


class MixedA(nn.Module):
    """35x35: 1x1, 5x5, twice 3x3, pool."""

    def __init__(self, channels: int, *, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNormReLU(channels, 64, 1)
        self.branch5x5_1 = ConvNormReLU(channels, 48, 1)
        self.branch5x5_2 = ConvNormReLU(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvNormReLU(channels, 64, 1)
        self.branch3x3dbl_2 = ConvNormReLU(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNormReLU(96, 96, 3, padding=1)
        self.branch_pool = ConvNormReLU(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        branches = (
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(average_pool(x)),
        )
        return torch.cat(branches, dim=1)


class MixedB(nn.Module):
    """35x35 to 17x17."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = ConvNormReLU(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvNormReLU(channels, 64, 1)
        self.branch3x3dbl_2 = ConvNormReLU(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNormReLU(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat((self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)), dim=1)


class MixedC(nn.Module):
    """17x17: 1x1, 7x7 and twice 7x7 in two factors each, pool."""

    def __init__(self, channels: int, *, inner: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNormReLU(channels, 192, 1)
        self.branch7x7_1 = ConvNormReLU(channels, inner, 1)
        self.branch7x7_2 = ConvNormReLU(inner, inner, (1, 7), padding=(0, 3))
        self.branch7x7_3 = ConvNormReLU(inner, 192, (7, 1), padding=(3, 0))
        self.branch7x7dbl_1 = ConvNormReLU(channels, inner, 1)
        self.branch7x7dbl_2 = ConvNormReLU(inner, inner, (7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = ConvNormReLU(inner, inner, (1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = ConvNormReLU(inner, inner, (7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = ConvNormReLU(inner, 192, (1, 7), padding=(0, 3))
        self.branch_pool = ConvNormReLU(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branches = (
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(average_pool(x)),
        )
        return torch.cat(branches, dim=1)


class MixedD(nn.Module):
    """17x17 to 8x8."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = ConvNormReLU(channels, 192, 1)
        self.branch3x3_2 = ConvNormReLU(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvNormReLU(channels, 192, 1)
        self.branch7x7x3_2 = ConvNormReLU(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = ConvNormReLU(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = ConvNormReLU(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        branches = (
            self.branch3x3_2(self.branch3x3_1(x)),
            self.branch7x7x3_4(seven),
            F.max_pool2d(x, 3, stride=2),
        )
        return torch.cat(branches, dim=1)


class MixedE(nn.Module):
    """8x8: 1x1, 3x3 and twice 3x3 whose last factors lie side by side, pool.

    Args:
        pool: :func:`average_pool` or :func:`max_pool`.
    """

    def __init__(self, channels: int, *, pool: Pool) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = ConvNormReLU(channels, 320, 1)
        self.branch3x3_1 = ConvNormReLU(channels, 384, 1)
        self.branch3x3_2a = ConvNormReLU(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = ConvNormReLU(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = ConvNormReLU(channels, 448, 1)
        self.branch3x3dbl_2 = ConvNormReLU(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvNormReLU(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = ConvNormReLU(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = ConvNormReLU(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = (
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x)),
        )
        return torch.cat(branches, dim=1)
