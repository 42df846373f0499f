"""MAR-B, MAR-L and MAR-H at 256 px, with the light pass of ReCAP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from dexport import contract
from dexport.contract import Condition, Decoding
from dexport.exporter.recipes.recipe import BATCH, GraphRecipe, Islands, Recipe, Signature, TensorSpec
from dexport.graphs.mar import MAR, WEIGHTS_PER_STEP, Full, InnerSteps, Light, group_of, tokens_of
from dexport.runtime.programs.masked_diffusion import DIFFLOSS, FULL, LIGHT, MaskedDiffusion

LATENT_SCALE = 0.2325
"""Tokens are latents of the VAE times this."""
DECODER = "mar-vae-decoder"
DECODED = (16, 16)
"""Channels of the latents that it takes, and pixels of a cell: other latents have no decoder of dexport's."""
STEPS = 256
COEFFICIENT = 0.5
"""In examples: with coefficients of this size an inner diffusion neither grows nor vanishes."""
CLOCK = (0.0, 1000.0)
SHARED: Mapping[str, Any] = {
    "img_size": 256,
    "vae_stride": 16,
    "patch_size": 1,
    "mlp_ratio": 4.0,
    "vae_embed_dim": 16,
    "class_num": 1000,
    "buffer_size": 64,
    "num_sampling_steps": "100",
    "light_tokens": 0,
    "inner_steps": 10,
}
ENDS = ("time_embed", "input_proj", "final_layer")
SIZES: Mapping[str, tuple[int, int, int, int, int, float]] = {
    "b": (768, 12, 12, 6, 1024, 2.9),
    "l": (1024, 16, 16, 8, 1280, 3.0),
    "h": (1280, 20, 16, 12, 1536, 3.2),
}
"""Width, depth and heads of the encoder and of the decoder; depth and width of the inner diffusion; the guidance."""


def latent_shape(config: Mapping[str, Any]) -> tuple[int, int]:
    """Channels of a latent, and how many tokens an image has."""
    return config["vae_embed_dim"], tokens_of(config["img_size"], config["vae_stride"], config["patch_size"])


def transformer_inputs(config: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    channels, length = latent_shape(config)
    channels, classes = channels * config["patch_size"] ** 2, config["class_num"]
    return (
        TensorSpec("tokens", "float32", (BATCH, length, channels), role=contract.STATE),
        TensorSpec("mask", "float32", (BATCH, length), "integers", 0, 1, role=contract.MASK),
        TensorSpec("labels", "int64", (BATCH,), "integers", 0, classes - 1, largest=classes, role=contract.LABEL),
    )


def condition(config: Mapping[str, Any], tokens: int) -> TensorSpec:
    return TensorSpec("z", "float32", (BATCH, tokens, config["decoder_embed_dim"]), role=contract.CONDITION)


def memories(config: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    """Keys and values of every layer: (B, depth, 2, heads, L, d)."""
    found = []
    for part in ("encoder", "decoder"):
        heads = config[f"{part}_num_heads"]
        sizes = (config[f"{part}_depth"], 2, heads, latent_shape(config)[1], config[f"{part}_embed_dim"] // heads)
        found.append(TensorSpec(f"{part}_kv", "float32", (BATCH, *sizes), role=contract.MEMORY))
    return tuple(found)


def model(config: Mapping[str, Any], _latent: tuple[int, int]) -> Signature:
    """tokens, mask, labels -> z."""
    return Signature(transformer_inputs(config), (condition(config, latent_shape(config)[1]),))


def full(config: Mapping[str, Any], _latent: tuple[int, int]) -> Signature:
    """tokens, mask, labels -> z, encoder_kv, decoder_kv."""
    return Signature(transformer_inputs(config), (condition(config, latent_shape(config)[1]), *memories(config)))


def light(config: Mapping[str, Any], _latent: tuple[int, int]) -> Signature:
    """tokens, mask, labels, positions, encoder_kv, decoder_kv -> z of the tokens at ``positions``."""
    length = latent_shape(config)[1]
    group = group_of(length, config["light_tokens"])
    positions = TensorSpec("positions", "int64", (BATCH, group), "integers", 0, length, role=contract.POSITIONS)
    inputs = (*transformer_inputs(config), positions, *memories(config))
    return Signature(inputs, (condition(config, group),))


def diffloss(cfg: float) -> Callable[[Mapping[str, Any], tuple[int, int]], Signature]:
    """x, t, c, cfg_scale, noise, weights -> sample: ``inner_steps`` guided steps of the inner diffusion."""

    def signature(config: Mapping[str, Any], _latent: tuple[int, int]) -> Signature:
        channels, steps = latent_shape(config)[0] * config["patch_size"] ** 2, config["inner_steps"]
        weights = (BATCH, steps, WEIGHTS_PER_STEP)
        return Signature(
            (
                TensorSpec("x", "float32", (BATCH, channels), role=contract.STATE),
                TensorSpec("t", "float32", (BATCH, steps), "integers", *CLOCK, role=contract.TIME, clock=CLOCK),
                TensorSpec("c", "float32", (BATCH, 2, config["decoder_embed_dim"]), role=contract.CONDITION),
                TensorSpec("cfg_scale", "float32", (BATCH,), "constant", high=cfg, role=contract.SCALE),
                TensorSpec("noise", "float32", (BATCH, steps, channels), role=contract.NOISE),
                TensorSpec("weights", "float32", weights, "constant", high=COEFFICIENT, role=contract.WEIGHTS),
            ),
            (TensorSpec("sample", "float32", (BATCH, channels), role=contract.PREDICTION),),
        )

    return signature


def _around(wrapper: Callable[[MAR], nn.Module]) -> Callable[[nn.Module, Mapping[str, Any]], nn.Module]:
    def wrap(network: nn.Module, _config: Mapping[str, Any]) -> nn.Module:
        assert isinstance(network, MAR)
        return wrapper(network).eval()

    return wrap


def program(cfg: float) -> Callable[[Mapping[str, Any], Mapping[str, Signature]], MaskedDiffusion]:
    def of(config: Mapping[str, Any], _signatures: Mapping[str, Signature]) -> MaskedDiffusion:
        classes = config["class_num"]
        has_decoder = (config["vae_embed_dim"], config["vae_stride"]) == DECODED
        return MaskedDiffusion(
            condition=Condition("class", classes, (), classes),
            steps=min(STEPS, latent_shape(config)[1]),
            cfg_scale=cfg,
            respacing=str(config["num_sampling_steps"]),
            patch=config["patch_size"],
            decoding=Decoding("network", recipe=DECODER if has_decoder else "", scale=LATENT_SCALE),
        )

    return of


def mar(size: str) -> Recipe:
    width, depth, heads, inner_depth, inner_width, cfg = SIZES[size]
    parts = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in (("embed_dim", width), ("depth", depth), ("num_heads", heads))
    }
    return Recipe(
        name=f"mar-{size}",
        family="MAR",
        summary=f"MAR-{size.upper()}, 256 px: continuous tokens in random order, each by a small diffusion",
        source="LTH14/mar@fe470ac, liebenxj/ReCAP@4d1da38",
        constructor=MAR,
        config={**SHARED, **parts, "diffloss_d": inner_depth, "diffloss_w": inner_width},
        signature=model,
        graphs={
            FULL: GraphRecipe(full, _around(Full)),
            LIGHT: GraphRecipe(light, _around(Light)),
            DIFFLOSS: GraphRecipe(diffloss(cfg), _around(InnerSteps)),
        },
        exported=("model", FULL, LIGHT, DIFFLOSS),
        program=program(cfg),
        latent=(16, 16),
        latent_multiple="patch_size",
        size_argument="img_size",
        size_unit="vae_stride",
        pixels_per_latent="vae_stride",
        checkpoints=("checkpoint-last.pth",),
        hub="links in the README of github.com/LTH14/mar",
        # The first inner step multiplies the difference between x and the predicted noise by 316, and guidance that
        # between two predictions by three: both ends of the MLP are small.
        islands=Islands(optional=("diffloss.sampler", *(f"diffloss.net.{part}" for part in ENDS))),
        quantize_exclude=("diffloss.net.input_proj", "diffloss.net.final_layer"),
    )


RECIPES = tuple(map(mar, SIZES))
