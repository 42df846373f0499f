"""The networks of the goldens with the official weights, and what they give for the official inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dexport.exporter.recipes import find_recipe, mage
from dexport.exporter.variant import resolve
from dexport.graphs.dico import DiCo
from dexport.graphs.diffit import DiffiT
from dexport.graphs.dimr import DiMR
from dexport.graphs.dit import DiT
from dexport.graphs.guidance import Guided
from dexport.graphs.halton_maskgit import HaltonMaskGIT
from dexport.graphs.halton_text import HaltonTextMaskGIT
from dexport.graphs.layers import TimestepEmbedder
from dexport.graphs.llamagen_vq import VqDecoder, VqEncoder
from dexport.graphs.mage import Mage
from dexport.graphs.mage_vqgan import VqganDecoder, VqganEncoder
from dexport.graphs.mar_vae import KlDecoder, KlEncoder
from dexport.graphs.maskgit_r import Full, Light, UViT
from dexport.graphs.sd_vae import VaeDecoder, VaeEncoder
from dexport.graphs.terdit import TerDiT, TernaryLinear, ternarise
from dexport.graphs.vitok_v1 import ViTokV1
from dexport.graphs.vitok_v2 import ViTokV2
from dexport.plugins.ternary_matmul.packing import unpack
from tests.golden import load_golden


class Vqgan(nn.Module):
    """Both halves of MAGE's tokenizer, as its golden has them."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        height, width = GRID
        self.halves = (VqganEncoder(**config), VqganDecoder(**config, grid=[height, width]))
        self.encoder, self.quantize, self.decoder = (
            self.halves[0].encoder,
            self.halves[0].quantize,
            self.halves[1].decoder,
        )
        self.halves[1].quantize.embedding = self.quantize.embedding


GRID = (6, 8)
"""Of the ids in the golden of MAGE's tokenizer."""
TRAINING = ("quantize.codebook_used",)
"""What goldens have and networks leave out."""
NETWORKS: dict[str, type[nn.Module]] = {
    "dit-s": DiT,
    "dico-s": DiCo,
    "diffit-latent": DiffiT,
    "dimr-2r": DiMR,
    "terdit-packed": TerDiT,
    "terdit-master": TerDiT,
    "sdvae-decoder": VaeDecoder,
    "sdvae-encoder": VaeEncoder,
    "halton-transformer": HaltonMaskGIT,
    "halton-transformer-s": HaltonMaskGIT,
    "halton-text": HaltonTextMaskGIT,
    "mage-transformer": Mage,
    "recap-maskgit-step": UViT,
    "vitok-v1-image": ViTokV1,
    "vitok-v1-video": ViTokV1,
    "vitok-v2-image": ViTokV2,
    "vitok-v2-naflex": ViTokV2,
    "halton-vq-decoder": VqDecoder,
    "halton-vq-encoder": VqEncoder,
    "mage-vqgan": Vqgan,
    "mar-vae-decoder": KlDecoder,
    "mar-vae-encoder": KlEncoder,
}
RECIPES = {"dit-s": "dit-s-2", "dico-s": "dico-s", "diffit-latent": "diffit-256"}
"""Denoisers whose recipe says how they are guided."""
UNUSED = {"mage-transformer": mage.UNUSED}
"""First parts of the names of weights that a network leaves out, as nothing that it computes reads them."""

Tensors = Mapping[str, Tensor]


def official_network(name: str) -> nn.Module:
    """The network of a golden, in float32."""
    golden = load_golden(name)
    module = NETWORKS[name](**golden.config).eval()
    to_ternary = unpack if name == "terdit-packed" else ternarise
    ternary = {f"{path}.weight" for path, layer in module.named_modules() if isinstance(layer, TernaryLinear)}
    unused = UNUSED.get(name, ())
    weights = {
        key: to_ternary(value) if key in ternary else value
        for key, value in golden.weights.items()
        if key not in TRAINING and key.partition(".")[0] not in unused
    }
    module.load_state_dict(weights)
    return module


def in_float64(module: nn.Module) -> nn.Module:
    """The network in float64, but for the features of time, which are the official ones to the last bit.

    They are sines of t times a frequency that float32's exp gave. Processors differ in its last bit, which is 6e-5
    radians at t = 999, more than all other rounding. So nothing here depends on the processor any more.
    """
    module.double()
    for part in module.modules():
        if isinstance(part, TimestepEmbedder):
            part.freqs = load_golden("timestep-frequencies").outputs["freqs"]
            part.mlp.register_forward_pre_hook(lambda _, features: features[0].double())
    return module


@torch.no_grad()
def official_pairs(name: str, module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """What the module gives, and what the official code gave for the same inputs."""
    golden = load_golden(name)
    dtype = next(module.parameters()).dtype
    given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in golden.inputs.items()}
    return RUNS[name if name in RUNS else name.partition("-")[0]](name, module, given, golden.outputs)


def _denoiser(name: str, module: nn.Module, given: Tensors, wanted: Tensors) -> list[tuple[Tensor, Tensor]]:
    golden, half = load_golden(name), len(given["cfg_x"]) // 2
    if name in RECIPES:
        guided = resolve(find_recipe(RECIPES[name]), golden.config, graphs=["guided"]).wrap(module)
    else:
        guided = Guided(module, golden.config["num_classes"])
    x, t, y = (given[f"cfg_{key}"][:half] for key in ("x", "t", "y"))
    return [
        (module(given["x"], given["t"].float(), given["y"]), wanted["forward"]),
        (guided(x, t.float(), y, given["cfg_scale"]), wanted["forward_with_cfg"][:half]),
    ]


def _dimr(_: str, module: Any, given: Tensors, wanted: Tensors) -> list[tuple[Tensor, Tensor]]:
    stages = module.branches(given["x"], given["log_snr"], given["y"])
    equal_times = module(given["x"], given["log_snr_b"], given["y"])
    return [(stages[0], wanted["stage0"]), (stages[1], wanted["stage1"]), (equal_times, wanted["forward_b"])]


def _sd_vae(name: str, module: nn.Module, given: Tensors, wanted: Tensors) -> list[tuple[Tensor, Tensor]]:
    if name == "sdvae-decoder":
        return [(module(given["z"]), wanted["image"])]
    mean, logvar = module(given["image"])
    return [(mean, wanted["mean"]), (logvar, wanted["logvar"])]


def _tokenizer(name: str, module: Any, given: Tensors, wanted: Tensors) -> list[tuple[Tensor, Tensor]]:
    if name == "mar-vae-encoder":
        mean, std = module(given["image"])
        return [(mean, wanted["mean"]), (std, wanted["std"])]
    if name == "mar-vae-decoder":
        return [(module(given["z"]), wanted["image"])]
    if name == "halton-vq-decoder":
        return [(module(given["codes"]), wanted["image"])]
    if name == "halton-vq-encoder":
        return [(module(given["image"]), wanted["codes"]), (module.pre_quant(given["image"]), wanted["pre_quant"])]
    encoder, decoder = module.halves
    return [
        (encoder(given["image"]), wanted["encoded_ids"]),
        (encoder.encoder(given["image"]), wanted["z_pre_quant"]),
        (decoder(given["ids"]), wanted["decoded_image"]),
    ]


def _vitok(name: str, module: Any, given: Tensors, wanted: Tensors) -> list[tuple[Tensor, Tensor]]:
    if name == "vitok-v2-image":
        return [(module(given["image"]), wanted["image"])]
    if name == "vitok-v2-naflex":
        places, valid = [given[key] for key in ("row_idx", "col_idx", "patch_mask")], given["patch_mask"].bool()
        z = module.encode(given["patches"], *places)
        return [(z[valid], wanted["z"][valid]), (module.decode(z, *places)[valid], wanted["patches_out"][valid])]
    mean, logvar = module.encode(given["x"])
    return [
        (mean, wanted["mean"]),
        (torch.exp(0.5 * logvar), wanted["std"]),
        (module.decode(mean), wanted["recon"]),
    ]


def _halton(_: str, module: nn.Module, given: Tensors, wanted: Tensors) -> list[tuple[Tensor, Tensor]]:
    condition = given["text" if "text" in given else "labels"]
    return [(module(given["codes"], condition, given["drop_label"]), wanted["logits"])]


def _mage(_: str, module: Any, given: Tensors, wanted: Tensors) -> list[tuple[Tensor, Tensor]]:
    ids = given["token_ids"]
    return [(module.encode(ids), wanted["encoder_out"]), (module(ids), wanted["logits"])]


def _maskgit_r(_: str, module: Any, given: Tensors, wanted: Tensors) -> list[tuple[Tensor, Tensor]]:
    logits, *kept = Full(module)(given["ids"], given["labels"])
    light = Light(module)(given["local_ids"], given["group_positions"], given["labels"], *kept)
    return [
        (logits, wanted["full_logits"]),
        (kept[0], wanted["k_layer0"]),
        (kept[-1], wanted["v_last"]),
        (light, wanted["light_logits"]),
    ]


RUNS = {
    **dict.fromkeys(("dit", "dico", "diffit", "terdit"), _denoiser),
    "dimr": _dimr,
    "sdvae": _sd_vae,
    "halton": _halton,
    "mage": _mage,
    "recap": _maskgit_r,
    "vitok": _vitok,
    **dict.fromkeys(
        ("halton-vq-decoder", "halton-vq-encoder", "mage-vqgan", "mar-vae-decoder", "mar-vae-encoder"), _tokenizer
    ),
}
