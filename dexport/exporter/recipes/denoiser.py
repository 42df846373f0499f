"""What class-conditional latent denoisers of the DiT lineage share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dexport.contract import GuidanceRule
from dexport.exporter.recipes.recipe import BATCH, Guidance, Sampling, Signature, TensorSpec

LAST_TIMESTEP = 999.0

ENDS_AND_MODULATION = ("x_embedder", "t_embedder*", "*.adaLN_modulation", "final_layer")
"""What INT8 leaves alone: a few percent of the arithmetic, and every token depends on each of its outputs."""

LINEAR_DDPM = Sampling(
    schedule="linear betas 1e-4..2e-2, 1000 steps",
    prediction="epsilon, learned variance",
    sampler="ddpm",
    steps=250,
    latent_scale=0.18215,
    decoder="sd-vae-decoder",
)


def class_conditional(config: Mapping[str, Any], latent: tuple[int, int]) -> Signature:
    """x, t, y -> out, as DESIGN section 4 fixes it. Labels include the null label where there is one."""
    channels = config.get("in_channels", 4)
    out_channels = channels * 2 if config.get("learn_sigma", True) else channels
    return Signature(
        inputs=(
            TensorSpec("x", "float32", (BATCH, channels, *latent)),
            TensorSpec("t", "float32", (BATCH,), "stratified", 0.0, LAST_TIMESTEP),
            TensorSpec("y", "int64", (BATCH,), "integers", 0, config.get("num_classes", 1000) - 1),
        ),
        outputs=(TensorSpec("out", "float32", (BATCH, out_channels, *latent)),),
    )


def require_null_label(config: Mapping[str, Any]) -> int:
    """The null label, ``num_classes``; a ValueError when label dropout was off and the table has no row for it."""
    if config.get("class_dropout_prob", 0.1) <= 0:
        raise ValueError("class_dropout_prob is 0, so the label table has no null row to guide against")
    return config.get("num_classes", 1000)


def first_channels(default_scale: float) -> Guidance:
    """Guidance on the first three channels of the prediction."""
    return Guidance(GuidanceRule(channels=3), default_scale, require_null_label)
