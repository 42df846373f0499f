"""DiMR-XL/2R and DiMR-G/2R at 256 px.

XL/3R (512 px) has neither configuration nor weights in the official repository: three branches are described with
``--set stage_configs=[...]``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from dexport.contract import GuidanceRule, from_json
from dexport.errors import UsageError
from dexport.exporter.recipes.recipe import (
    BATCH,
    GraphRecipe,
    Guidance,
    Islands,
    Recipe,
    Sampling,
    Signature,
    TensorSpec,
)
from dexport.graphs.dimr import AllBranches, DiMR, stage_configs_of

LOG_SNR = (-4.0, 4.0)
"""The time input at the clean and at the noisy end."""
NUM_CLASSES = 1001
"""The null label included, which is the last."""
SIDE = 32
CONSTANT = -1
"""``cfg_scale_pow`` of a guidance that does not change over time."""

SIZES: Mapping[str, Mapping[str, Any]] = {
    "xl": {"dim": 960, "num_blocks": (39, 20)},
    "g": {"dim": 1152, "num_blocks": (57, 29)},
}

SQRT_LINEAR_DPM = Sampling(
    schedule="sqrt-linear betas 0.00085..0.012, 1000 steps",
    prediction="epsilon",
    sampler="dpm-solver",
    steps=250,
    latent_scale=0.18215,
    decoder="sd-vae-decoder",
)


def signature(config: Mapping[str, Any], latent: tuple[int, int]) -> Signature:
    """The graph ``model``: x, log_snr, y -> out; see :func:`all_branches`."""
    plain = all_branches(config, latent)
    return Signature(plain.inputs, plain.outputs[-1:])


def all_branches(config: Mapping[str, Any], latent: tuple[int, int]) -> Signature:
    """The graph ``all``: x, log_snr, y -> stage0, stage1, ..., out. A model without class tokens takes no y.

    Raises:
        UsageError: a latent that is larger than a branch's positions, or branches that do not fit each other.
    """
    stages = stage_configs_of(config)
    grids = [tuple(side // stage.pixels_per_token for side in latent) for stage in stages]
    for number, (stage, grid) in enumerate(zip(stages, grids, strict=True)):
        if not stage.has_axial_rope and (grid[0] > stage.max_height or grid[1] > stage.max_width):
            raise UsageError(
                f"a latent of {latent[0]}x{latent[1]} makes {grid[0]}x{grid[1]} tokens in branch {number}, "
                f"which has positions for {stage.max_height}x{stage.max_width}",
                hint="give a smaller --latent, or other weights with --set stage_configs=[...]",
            )
        if number:
            ratio = stage.max_height // stages[number - 1].max_height
            if grid != tuple(side * ratio for side in grids[number - 1]):
                raise UsageError(
                    f"branch {number} has {grid[0]}x{grid[1]} tokens, not {ratio} times those of the branch before it",
                    hint="max_height, image_input_ratio and input_feature_ratio of --set stage_configs must agree",
                )
    channels = config["channels"]
    inputs = [
        TensorSpec("x", "float32", (BATCH, channels, *latent)),
        TensorSpec("log_snr", "float32", (BATCH,), "stratified", *LOG_SNR, clock=LOG_SNR),
    ]
    if any(stage.has_class_token for stage in stages):
        inputs.append(TensorSpec("y", "int64", (BATCH,), "integers", 0, config["num_classes"] - 2))
    outputs = []
    for number, (stage, grid) in enumerate(zip(stages, grids, strict=True)):
        name = "out" if number == len(stages) - 1 else f"stage{number}"
        # A convolution with an even kernel, padded by half of it, adds a row and a column.
        size = (side + 1 - stage.final_kernel_size % 2 for side in grid)
        outputs.append(TensorSpec(name, "float32", (BATCH, channels, *size)))
    return Signature(tuple(inputs), tuple(outputs))


def _wrap_all(network: nn.Module, _config: Mapping[str, Any]) -> nn.Module:
    assert isinstance(network, DiMR)
    return AllBranches(network).eval()


def latent_multiple(config: Mapping[str, Any]) -> int:
    """Every branch takes whole patches; what is no list of branches the constructor refuses."""
    try:
        return math.lcm(*(stage.pixels_per_token for stage in stage_configs_of(config)))
    except (TypeError, ValueError):
        return 1


def guidance_rule(config: Mapping[str, Any]) -> GuidanceRule:
    """All channels; with ``cfg_scale_pow`` by a strength that grows over time. Source: ``eval.py`` of the
    repository, whose scale 0.4 on top of the conditional prediction is 1.4 here."""
    power = config.get("cfg_scale_pow", CONSTANT)
    return from_json(GuidanceRule, {} if power == CONSTANT else {"power": power}, "cfg_scale_pow")


def null_label(config: Mapping[str, Any]) -> int:
    """The last class; a ValueError for an unconditional model."""
    if (config.get("num_classes") or 0) < 2 or not any(stage.has_class_token for stage in stage_configs_of(config)):
        raise ValueError("the model has no classes to guide towards")
    return config["num_classes"] - 1


def two_branches(size: str) -> Recipe:
    width = SIZES[size]
    branch = {"image_input_ratio": 1, "final_kernel_size": 3, "dropout_prob": 0}
    transformer = {
        "block_type": "TransformerBlock",
        "dim": width["dim"],
        "hidden_dim": 2 * width["dim"],
        "num_attention_heads": 16,
        "num_blocks": width["num_blocks"][0],
        "max_height": SIDE // 2,
        "max_width": SIDE // 2,
        "input_feature_ratio": 2,
        **branch,
    }
    convnext = {
        "block_type": "ConvNeXtBlock",
        "dim": width["dim"] // 2,
        "hidden_dim": width["dim"],
        "kernel_size": 7,
        "num_blocks": width["num_blocks"][1],
        "max_height": SIDE,
        "max_width": SIDE,
        "input_feature_ratio": 1,
        **branch,
    }
    file = f"DiMR-{size.upper()}_2R_800epochs.pth"
    return Recipe(
        name=f"dimr-{size}-2r",
        family="DiMR",
        summary=f"DiMR-{size.upper()}/2R, 256 px: a transformer at 16x16, then a ConvNeXt at 32x32",
        source="qihao067/DiMR@fa141ae",
        constructor=DiMR,
        config={
            "channels": 4,
            "num_classes": NUM_CLASSES,
            "norm_type": "TDRMSN",
            "stage_configs": [transformer, convnext],
        },
        signature=signature,
        graphs={"all": GraphRecipe(all_branches, _wrap_all)},
        latent=(SIDE, SIDE),
        latent_multiple=latent_multiple,
        sampling=SQRT_LINEAR_DPM,
        guidance=Guidance(guidance_rule, 1.4, null_label, clock=LOG_SNR),
        checkpoints=(file,),
        hub=f"hf://QHL067/DiMR/{file}",
        # Squares summed over up to 38,400 channels overflow float16, and its epsilon of 1e-8 is 0 there.
        islands=Islands(
            modules=("*.norm", "*.input_layer", "*.output_layer"),
            optional=("*.upsample.0", "*.upsample.2", "*.qk_norm", "*.pos_emb"),
        ),
        quantize_exclude=("*.input_layer", "*.output_layer"),
    )


RECIPES = tuple(two_branches(size) for size in SIZES)
