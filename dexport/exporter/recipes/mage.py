"""MAGE B and L: unconditional generation of 256 codes, decoded to 256 px.

The graph ``model`` is a pass over all tokens. ``full`` and ``light`` are for ReCAP, of which MAGE's authors and ReCAP's
released no code for MAGE: they are an own reading of the paper (arXiv 2505.19089).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dexport.contract import LOGITS, MEMORY, POSITIONS, STATE, Decoding
from dexport.exporter.recipes.recipe import BATCH, GraphRecipe, Islands, Recipe, Signature, TensorSpec, settings_of
from dexport.exporter.weights.checkpoint_view import without
from dexport.exporter.weights.source import WeightSource
from dexport.graphs.mage import CLASSES, FAKE_CLASS, Full, Light, Mage
from dexport.graphs.masked_vit import NOWHERE
from dexport.runtime.programs.masked import Masked
from dexport.runtime.programs.masked_orders import FULL, LIGHT

SIZES = {
    "b": {"embed_dim": 768, "depth": 12, "num_heads": 12, "decoder_embed_dim": 768},
    "l": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "decoder_embed_dim": 1024},
}
PICTURES = Decoding("network", "mage-vqgan-decoder", black=0.0)
"""The tokenizer's, which MaskGIT-r has as well."""
STEPS = 20
UNUSED = frozenset({"cls_token", "pos_embed", "mask_token", "decoder_pos_embed", "patch_embed", "decoder_pred"})
"""In official files, and read by nothing that generates."""
TOKENIZER = frozenset({"vqgan"})
ENDS = ("token_emb", "decoder_embed", "mlm_layer.fc")


def adapt(source: WeightSource, _module: nn.Module) -> WeightSource:
    """The generator of a file that holds the tokenizer and what only training reads as well."""
    return without(source, UNUSED | TOKENIZER, "MAGE")


def signature(config: Mapping[str, Any], latent: tuple[int, int]) -> Signature:
    """token_ids -> logits; the first place is the class."""
    places, words = 1 + latent[0] * latent[1], _words(config)
    return Signature(
        (TensorSpec("token_ids", "int64", (BATCH, places), "integers", 0, words - 1, role=STATE),),
        (TensorSpec("logits", "float32", (BATCH, places, words), role=LOGITS),),
    )


def full_signature(config: Mapping[str, Any], latent: tuple[int, int]) -> Signature:
    """token_ids -> logits, k_layer0, v_layer0, ... of the encoder, decoder_k_layer0, ... of the decoder."""
    plain = signature(config, latent)
    return Signature(plain.inputs, (*plain.outputs, *_memories(config, latent)))


def light_signature(config: Mapping[str, Any], latent: tuple[int, int]) -> Signature:
    """local_ids, group_positions, and the keys and values of ``full`` -> logits of the class and the group."""
    tokens, words = latent[0] * latent[1], _words(config)
    places = min(settings_of(Mage, config)["group_size"], tokens)
    return Signature(
        (
            TensorSpec("local_ids", "int64", (BATCH, 1 + places), "integers", 0, words - 1, role=STATE),
            TensorSpec("group_positions", "int64", (BATCH, places), "integers", NOWHERE, tokens - 1, role=POSITIONS),
            *_memories(config, latent),
        ),
        (TensorSpec("logits", "float32", (BATCH, 1 + places, words), role=LOGITS),),
    )


def _words(config: Mapping[str, Any]) -> int:
    return settings_of(Mage, config)["n_embed"] + CLASSES + 1


def _memories(config: Mapping[str, Any], latent: tuple[int, int]) -> tuple[TensorSpec, ...]:
    c, places = settings_of(Mage, config), 1 + latent[0] * latent[1]
    return (
        *memories("", c["depth"], places, c["num_heads"], c["embed_dim"]),
        *memories("decoder_", c["decoder_depth"], places, c["decoder_num_heads"], c["decoder_embed_dim"]),
    )


def memories(prefix: str, depth: int, places: int, heads: int, width: int) -> tuple[TensorSpec, ...]:
    """Keys and values (B, places, heads, head size) of every block in turns."""
    return tuple(
        TensorSpec(f"{prefix}{kind}_layer{layer}", "float32", (BATCH, places, heads, width // heads), role=MEMORY)
        for layer in range(depth)
        for kind in ("k", "v")
    )


def program(config: Mapping[str, Any], signatures: Mapping[str, Signature]) -> Masked:
    """Sampling with the settings of the README's figures."""
    codes, places = config["n_embed"], int(next(iter(signatures.values())).inputs[0].shape[1]) - 1
    return Masked(
        codes=codes,
        mask=codes + CLASSES,
        prefix=(codes + FAKE_CLASS,),
        order="mage",
        steps=min(STEPS, places),
        choice_temperature=6.0,
        decoding=PICTURES,
    )


def variant(size: str) -> Recipe:
    return Recipe(
        name=f"mage-{size}",
        family="MAGE",
        summary=f"MAGE ViT-{size.upper()}, 256 px, unconditional; ReCAP's graphs are an OWN READING of the paper",
        source="LTH14/mage@1becb14",
        constructor=Mage,
        config={
            "img_size": 256,
            "patch_size": 16,
            **SIZES[size],
            "decoder_depth": 8,
            "decoder_num_heads": 16,
            "n_embed": 1024,
        },
        signature=signature,
        graphs={
            FULL: GraphRecipe(full_signature, lambda network, _: Full(network).eval()),  # type: ignore[arg-type]
            LIGHT: GraphRecipe(light_signature, lambda network, _: Light(network).eval()),  # type: ignore[arg-type]
        },
        latent=(16, 16),
        size_argument="img_size",
        size_unit="patch_size",
        pixels_per_latent="patch_size",
        program=program,
        adapt=adapt,
        islands=Islands(),
        quantize_exclude=ENDS,
    )


RECIPES = tuple(variant(size) for size in SIZES)
