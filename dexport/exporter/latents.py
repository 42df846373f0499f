"""What a denoiser makes against what its recipe says becomes of it: a configuration must not make that wrong."""

from __future__ import annotations

from dexport.bundle import pixel_shuffle
from dexport.errors import UsageError
from dexport.exporter.recipes import all_recipes
from dexport.exporter.variant import Variant
from dexport.runtime.decode import PICTURE_CHANNELS
from dexport.runtime.guidance import RULES
from dexport.runtime.samplers import WITH_VARIANCE

GRID = 4
"""Dimensions of latents that are a grid of cells."""


def check_latents(variant: Variant) -> None:
    """Refuse a denoiser whose decoder, sampler or guidance would not take what it makes.

    Raises:
        UsageError: channels that are no picture or no latent of the decoder, sizes that its tiles do not divide, a
            prediction that the sampler does not take, or guidance of a part of the channels of a picture.
    """
    facts = variant.recipe.sampling
    if facts is None:
        return
    name = variant.recipe.name
    state, out = variant.signature.inputs[0].shape, variant.signature.outputs[0].shape
    if len(state) != GRID or len(out) != GRID:
        return
    _, channels, height, width = (int(size) if isinstance(size, int) else 0 for size in state)
    predicted = (channels, 2 * channels) if facts.sampler in WITH_VARIANCE else (channels,)
    if out[1] not in predicted:
        raise UsageError(
            f"{name}: the sampler {facts.sampler!r} takes predictions of {' or '.join(map(str, predicted))} channels "
            f"for a state of {channels}, and this configuration makes {out[1]}",
            hint="change learn_sigma or the channels with --set",
        )
    _check_decoder(variant, facts.decoder, channels, height, width)


def _check_decoder(variant: Variant, decoder: str, channels: int, height: int, width: int) -> None:
    name = variant.recipe.name
    own = "or describe the network in a recipe file, with a Sampling of its own"
    if decoder in all_recipes():
        recipe = all_recipes()[decoder]
        wanted = recipe.signature(recipe.config, recipe.latent).inputs[0].shape
        if len(wanted) == GRID and wanted[1] != channels:
            raise UsageError(
                f"{decoder} takes latents of {wanted[1]} channels, and this configuration of {name} makes {channels}",
                hint=f"--set the channels to {wanted[1]}, {own}",
            )
        return
    factor, tiles = pixel_shuffle(decoder) or (1, 1)
    if decoder != "none" and pixel_shuffle(decoder) is None:
        return  # one that is not installed here
    pixels, rest = divmod(channels, factor**2)
    if rest or pixels not in PICTURE_CHANNELS:
        raise UsageError(
            f"{name}: {channels} channels become no grey or RGB picture by {decoder!r}",
            hint=f"--set the channels to {' or '.join(str(n * factor**2) for n in PICTURE_CHANNELS)}, {own}",
        )
    if height * factor % tiles or width * factor % tiles:
        raise UsageError(
            f"{name}: a picture of {height * factor}x{width * factor} is no sheet of {tiles}x{tiles} equal tiles",
            hint=f"give a --latent of which {factor} times a side is a multiple of {tiles}",
        )
    guidance = variant.recipe.guidance
    rule = None if guidance is None else RULES.get(guidance.rule_for(variant.config))
    if factor > 1 and rule is not None and rule.channels is not None and rule.channels < channels:
        raise UsageError(
            f"{name}: its guidance is of {rule.channels} of {channels} channels, each a part of the picture",
            hint=f"--set the channels to {rule.channels}, {own}",
        )
