"""The program ``diffusion`` of a recipe that says how it is sampled, and its graph with the guidance inside."""

from __future__ import annotations

import re
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from torch import nn

from dexport import contract
from dexport.contract import Condition, Decoding, GuidanceRule
from dexport.errors import InputError, UsageError
from dexport.exporter.pytorch.module_path import GUIDANCE
from dexport.exporter.recipes.recipe import MODEL, GraphRecipe, Recipe, Signature, TensorSpec
from dexport.graphs.guidance import Guided
from dexport.runtime.guidance import UNGUIDED, find_rule
from dexport.runtime.programs.diffusion import GUIDED, Diffusion

CFG_SCALE = "cfg_scale"
LEARNED_VARIANCE = ", learned variance"
PIXEL_SHUFFLE = re.compile(r"pixel-shuffle-([0-9]{1,4})(?:-tiles-([0-9]{1,4}))?")


def diffusion(recipe: Recipe, config: Mapping[str, Any], signatures: Mapping[str, Signature]) -> Diffusion:
    """The program of a denoiser.

    What the recipe says of its own configuration and another one does not have is left out: names of other classes, and
    a learned variance.

    Raises:
        InputError: facts that no program has; the recipe is named.
    """
    sampling, guidance = recipe.sampling, recipe.guidance
    assert sampling is not None, "a denoiser says how it is sampled"
    signature = next(iter(signatures.values()))
    label = signature.input(contract.LABEL)
    state, out = signature.input(contract.STATE), signature.outputs[0]
    learned = state is not None and len(state.shape) > 1 and out.shape[1] != state.shape[1]
    classes = None if label is None else int(label.high) + 1
    null = null_label(recipe, config)
    names = sampling.class_names if len(sampling.class_names) == (classes or 0) else ()
    try:
        return Diffusion(
            condition=Condition("none" if label is None else "class", classes, names, null),
            schedule=sampling.schedule,
            prediction=sampling.prediction.removesuffix(LEARNED_VARIANCE) + LEARNED_VARIANCE * learned,
            sampler=sampling.sampler,
            steps=sampling.steps,
            cfg_scale=float(guidance.default_scale) if guidance is not None and null is not None else UNGUIDED,
            guidance=guidance_rule(recipe, config),
            decoding=decoding_of(sampling.decoder, sampling.latent_scale),
        )
    except UsageError as error:
        raise InputError(f"{recipe.name}: sampling: {error}", hint=error.hint) from error


def guidance_rule(recipe: Recipe, config: Mapping[str, Any]) -> GuidanceRule | None:
    """The guidance rule for a configuration; None where the system has none.

    Raises:
        InputError: there is no such rule, or the recipe's function for it fails.
    """
    if recipe.guidance is None:
        return None
    rule: object = recipe.guidance.rule
    try:
        rule = rule(config) if callable(rule) else rule
        if not isinstance(rule, (str, GuidanceRule)):
            raise ValueError(f"it is a {type(rule).__name__}")
        return find_rule(rule)
    except Exception as error:  # a rule may be a function of the user's
        reason = "" if isinstance(error, (UsageError, ValueError)) else f" ({type(error).__name__}: {error})"
        raise InputError(
            f"{recipe.name}: there is no guidance rule {rule!r}{reason}",
            hint=getattr(error, "hint", "") or "see dexport.runtime.guidance.RULES",
        ) from error


def null_label(recipe: Recipe, config: Mapping[str, Any]) -> int | None:
    """The label of the unconditional prediction; None where the configuration has none.

    Raises:
        InputError: the recipe's function for it fails, or gives something else.
    """
    if recipe.guidance is None:
        return None
    try:
        label = recipe.guidance.null_label(config)
    except ValueError:  # how a recipe says that there is none
        return None
    except Exception as error:  # a function of the user's
        raise InputError(
            f"{recipe.name}: guidance: the null label fails: {type(error).__name__}: {error}",
            hint="raise ValueError where the network has none",
        ) from error
    if isinstance(label, bool) or not isinstance(label, Integral):
        raise InputError(
            f"{recipe.name}: guidance: the null label is {label!r}; expected an integer",
            hint="it is the row of the label table that was trained by dropping labels",
        )
    return int(label)


def guided_graph(recipe: Recipe) -> GraphRecipe:
    """The graph ``guided``: the batch is doubled inside, and the system's own rule combines both halves."""

    def wrap(network: nn.Module, config: Mapping[str, Any]) -> nn.Module:
        guidance = recipe.guidance
        if guidance is None:
            raise UsageError(f"{recipe.name} has no guidance rule to fuse", hint="leave out --guidance fused")
        try:
            null = guidance.null_label(config)
        except ValueError as error:
            raise UsageError(
                f"{recipe.name}: guidance cannot be fused: {error}", hint="leave out --guidance fused"
            ) from error
        rule = guidance_rule(recipe, config)
        assert rule is not None
        return Guided(network, null, rule.channels, rule.power, guidance.clock).eval()

    def signature(config: Mapping[str, Any], latent: tuple[int, int]) -> Signature:
        plain = recipe.signature(config, latent)
        if recipe.guidance is None:
            raise UsageError(f"{recipe.name} has no guidance rule to fuse", hint="leave out --guidance fused")
        if len(plain.outputs) > 1:
            raise UsageError(
                f"{recipe.name}: guidance cannot be fused around several outputs",
                hint="leave out --guidance fused, or ask for one output",
            )
        scale = TensorSpec(CFG_SCALE, "float32", (), "constant", high=recipe.guidance.default_scale)
        return Signature((*plain.inputs, scale), plain.outputs)

    return GraphRecipe(signature, wrap, GUIDANCE)


def decoding_of(decoder: str | Decoding, scale: float) -> Decoding:
    """How states become pictures, of a recipe's words."""
    if isinstance(decoder, Decoding):
        return decoder
    if decoder == "none":
        return Decoding("none", scale=scale)
    shuffle = PIXEL_SHUFFLE.fullmatch(decoder)
    if shuffle is not None:
        return Decoding("pixel-shuffle", scale=scale, factor=int(shuffle[1]), tiles=int(shuffle[2] or 1))
    return Decoding("network", recipe=decoder, scale=scale)


def graphs_of(recipe: Recipe) -> dict[str, GraphRecipe]:
    """All graphs of a recipe by name."""
    graphs = {MODEL: GraphRecipe(recipe.signature, lambda network, _config: network), **recipe.graphs}
    if recipe.sampling is not None:
        graphs.setdefault(GUIDED, guided_graph(recipe))
    return graphs
