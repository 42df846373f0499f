"""MaskGIT-r, 256 px, with ReCAP's graphs: ``full``, which gives keys and values as well, and ``light``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dexport.contract import LABEL, LOGITS, POSITIONS, STATE, Condition
from dexport.exporter.recipes.mage import PICTURES, memories
from dexport.exporter.recipes.recipe import BATCH, GraphRecipe, Islands, Recipe, Signature, TensorSpec, settings_of
from dexport.graphs.masked_vit import NOWHERE
from dexport.graphs.maskgit_r import Full, Light, UViT
from dexport.runtime.programs.masked import Masked
from dexport.runtime.programs.masked_orders import FULL, LIGHT

STEPS = 32


def signature(config: Mapping[str, Any], latent: tuple[int, int]) -> Signature:
    """ids, labels -> logits."""
    c, tokens = settings_of(UViT, config), latent[0] * latent[1]
    return Signature(
        (TensorSpec("ids", "int64", (BATCH, tokens), "integers", 0, c["codebook_size"], role=STATE), _labels(c)),
        (TensorSpec("logits", "float32", (BATCH, tokens, c["codebook_size"]), role=LOGITS),),
    )


def full_signature(config: Mapping[str, Any], latent: tuple[int, int]) -> Signature:
    """ids, labels -> logits, k_layer0, v_layer0, ... in the order of computation."""
    plain = signature(config, latent)
    return Signature(plain.inputs, (*plain.outputs, *_memories(config, latent)))


def light_signature(config: Mapping[str, Any], latent: tuple[int, int]) -> Signature:
    """local_ids, group_positions, labels, and the keys and values of ``full`` -> logits of the group."""
    c, tokens = settings_of(UViT, config), latent[0] * latent[1]
    places = min(c["group_size"], tokens)
    return Signature(
        (
            TensorSpec("local_ids", "int64", (BATCH, places), "integers", 0, c["codebook_size"], role=STATE),
            TensorSpec("group_positions", "int64", (BATCH, places), "integers", NOWHERE, tokens - 1, role=POSITIONS),
            _labels(c),
            *_memories(config, latent),
        ),
        (TensorSpec("logits", "float32", (BATCH, places, c["codebook_size"]), role=LOGITS),),
    )


def _labels(c: Mapping[str, Any]) -> TensorSpec:
    """Of examples those of classes; the last row of the table is the null label."""
    null = c["num_classes"] - 1
    return TensorSpec("labels", "int64", (BATCH, 1), "integers", 0, max(null - 1, 0), largest=null, role=LABEL)


def _memories(config: Mapping[str, Any], latent: tuple[int, int]) -> tuple[TensorSpec, ...]:
    c = settings_of(UViT, config)
    return memories("", 2 * (c["depth"] // 2) + 1, 1 + latent[0] * latent[1], c["num_heads"], c["embed_dim"])


def program(config: Mapping[str, Any], _signatures: Mapping[str, Signature]) -> Masked:
    """Sampling with the first settings of the official script, but without ReCAP and, as there, without guidance.

    Guidance, where it is asked for, grows linearly from the official w of 0.05.
    """
    c = settings_of(UViT, config)
    codes, null = c["codebook_size"], c["num_classes"] - 1
    return Masked(
        condition=Condition("class", max(null, 1), null=null or None),
        codes=codes,
        mask=codes,
        order="maskgit-r",
        steps=min(STEPS, c["img_size"] ** 2),
        cfg_start=1.05,
        sampling_temperature=0.75,
        choice_temperature=5.5,
        decoding=PICTURES,
    )


RECIPES = (
    Recipe(
        name="maskgit-r-256",
        family="MaskGIT-r",
        summary="MaskGIT-r, a U-ViT of 25 blocks, 256 px, with ReCAP's full and light graphs",
        source="liebenxj/ReCAP@4d1da38",
        constructor=UViT,
        config={
            "img_size": 16,
            "codebook_size": 1024,
            "embed_dim": 768,
            "depth": 24,
            "num_heads": 8,
            "mlp_ratio": 4,
            "qkv_bias": False,
            "num_classes": 1001,
            "use_checkpoint": False,
            "skip": True,
        },
        signature=signature,
        graphs={
            FULL: GraphRecipe(full_signature, lambda network, _: Full(network).eval()),  # type: ignore[arg-type]
            LIGHT: GraphRecipe(light_signature, lambda network, _: Light(network).eval()),  # type: ignore[arg-type]
        },
        exported=(FULL, LIGHT),
        program=program,
        latent=(16, 16),
        size_argument="img_size",
        pixels_per_latent=16,
        checkpoints=("nnet_ema.pth",),
        islands=Islands(),
        quantize_exclude=("token_emb", "context_embed", "mlm_layer.fc"),
    ),
)
