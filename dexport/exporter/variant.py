"""A recipe resolved with the user's settings: configuration, spatial size, module, signature."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from dexport import limits
from dexport.collector import collector_paused
from dexport.errors import DexportError, InputError, UsageError
from dexport.exporter.ports import check_names
from dexport.exporter.pytorch.declared import return_declared
from dexport.exporter.pytorch.state import fresh_torch
from dexport.exporter.recipes.check import check_recipe, check_signature
from dexport.exporter.recipes.recipe import BATCH, Recipe, Signature, TensorSpec, value_of
from dexport.graphs.guidance import Guided
from dexport.runtime.guidance import feed_of, find_rule
from dexport.runtime.samplers import make_sampler
from dexport.runtime.time_table import TimeTable, evaluated_times

CFG_SCALE = "cfg_scale"
LABELS = "y"


@dataclass(frozen=True)
class Variant:
    """What will be built: a recipe with every setting decided.

    ``fused`` says that the graph applies the system's guidance itself. With a ``table`` it takes its times only.
    """

    recipe: Recipe
    config: Mapping[str, Any]
    latent: tuple[int, int]
    fused: bool = False
    table: TimeTable | None = None

    def module(self) -> nn.Module:
        """The bare network in eval mode, on the current default device; it returns what its signature declares."""
        try:
            for value in self.config.values():
                limits.check_setting(value)
            with _counting_modules():
                network = self.recipe.constructor(**self.config)
        except DexportError:
            raise
        except Exception as error:  # a constructor of the user's may raise anything
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UsageError(
                f"{self.recipe.name}: the constructor refuses this configuration: {reason}",
                hint=f"`dexport info {self.recipe.name}` shows the settings that it has",
            ) from error
        if not isinstance(network, nn.Module):
            raise InputError(
                f"{self.recipe.name}: the constructor makes a {type(network).__name__}, not a torch.nn.Module",
                hint="let the recipe's constructor return the network",
            )
        return return_declared(network.eval(), self.recipe.name, lambda: [spec.name for spec in self.plain.outputs])

    def wrap(self, module: nn.Module) -> nn.Module:
        """The graph to export: the network itself, or the network inside its guidance."""
        if not self.fused:
            return module
        guidance = self.recipe.guidance
        if guidance is None:
            raise UsageError(f"{self.recipe.name} has no guidance rule to fuse", hint="leave out --guidance fused")
        try:
            null_label = guidance.null_label(self.config)
        except ValueError as error:
            raise UsageError(
                f"{self.recipe.name}: guidance cannot be fused: {error}", hint="leave out --guidance fused"
            ) from error
        if len(self.plain.outputs) > 1:
            raise UsageError(
                f"{self.recipe.name}: guidance cannot be fused around several outputs",
                hint="leave out --guidance fused, or ask for one output",
            )
        rule = find_rule(guidance.rule_for(self.config))
        return Guided(module, null_label, rule.channels, rule.power, guidance.clock).eval()

    def meta_module(self) -> nn.Module:
        """The network without memory for its weights; only tables made by its constructor have values."""
        with torch.device("meta"):
            return self.module()

    @functools.cached_property
    def outline(self) -> nn.Module:
        """One :meth:`meta_module` for all who only look at its modules, names, shapes and types."""
        return self.meta_module()

    @functools.cached_property
    def plain(self) -> Signature:
        """The signature of the network itself.

        Raises:
            UsageError: it fails for this configuration.
            InputError: it is none.
        """
        try:
            signature = self.recipe.signature(self.config, self.latent)
        except DexportError:
            raise
        except Exception as error:  # a signature is a function of the user's
            raise UsageError(
                f"{self.recipe.name}: the signature fails for this configuration: {type(error).__name__}: {error}",
                hint=f"`dexport info {self.recipe.name}` shows the settings that it has",
            ) from error
        return check_signature(self.recipe.name, signature)

    @property
    def signature(self) -> Signature:
        """The signature of the graph to export."""
        plain = self.plain
        null_label = self.null_label
        if null_label is not None:
            labels = (replace(spec, largest=null_label) if spec.name == LABELS else spec for spec in plain.inputs)
            plain = replace(plain, inputs=tuple(labels))
        if self.table is not None:
            name, times = self.time_input(plain, self.table)
            chosen = tuple(map(float, times))
            inputs = (replace(spec, choices=chosen) if spec.name == name else spec for spec in plain.inputs)
            plain = replace(plain, inputs=tuple(inputs))
        if not self.fused:
            return plain
        assert self.recipe.guidance is not None
        scale = TensorSpec(CFG_SCALE, "float32", (), "constant", high=self.recipe.guidance.default_scale)
        return Signature((*plain.inputs, scale), plain.outputs)

    @property
    def null_label(self) -> int | None:
        """The label of the unconditional prediction; None where the configuration has none.

        Raises:
            InputError: the recipe's function for it fails, or gives something else.
        """
        guidance, name = self.recipe.guidance, self.recipe.name
        if guidance is None:
            return None
        try:
            label = guidance.null_label(self.config)
        except ValueError:  # how a recipe says that there is none
            return None
        except Exception as error:  # a function of the user's
            raise InputError(
                f"{name}: guidance: the null label fails: {type(error).__name__}: {error}",
                hint="raise ValueError where the network has none",
            ) from error
        if not isinstance(label, (int, np.integer)) or isinstance(label, bool):
            raise InputError(
                f"{name}: guidance: the null label is {label!r}; expected an integer",
                hint="it is the row of the label table that was trained by dropping labels",
            )
        return int(label)

    def time_input(self, signature: Signature, table: TimeTable) -> tuple[str, np.ndarray]:
        """The name of the graph's time input, and the times of a table (S,) float32 as it takes them.

        Raises:
            UsageError: there is no such input, or samplers do not know it.
        """
        names = [spec.name for spec in signature.inputs]
        times = [spec.name for spec in signature.inputs if spec.values == "stratified" and spec.shape == (BATCH,)]
        t = np.array(table.times, dtype=np.float32)
        feed = feed_of(names)(np.zeros((len(t), 1, 1, 1), np.float32), t, np.zeros(len(t), np.int64))
        if len(times) != 1 or times[0] not in feed:
            raise UsageError(
                f"{self.recipe.name} has no time input that samplers feed: its inputs are {', '.join(names)}",
                hint="leave out --fold-steps",
            )
        return times[0], feed[times[0]]

    @property
    def guidance_rule(self) -> str:
        """``none``, or the rule that the graph applies."""
        return self.recipe.guidance.rule_for(self.config) if self.fused and self.recipe.guidance else "none"

    def config_json(self) -> str:
        return json.dumps(dict(self.config), sort_keys=True)


@collector_paused()  # the first network that is made imports much of torch
@fresh_torch()
def resolve(
    recipe: Recipe,
    settings: Mapping[str, Any] | None = None,
    latent: tuple[int, int] | None = None,
    fused: bool = False,
    fold_steps: int | None = None,
) -> Variant:
    """Apply ``--set`` values and the spatial size to a recipe.

    Args:
        settings: constructor arguments that override the recipe's.
        latent: (height, width) of the spatial input, or None for the recipe's (or the size argument's).
        fold_steps: of the recipe's sampler, whose times will be all that the graph takes.

    Raises:
        UsageError: unknown argument, a size that the network cannot take, or steps that its sampler cannot.
    """
    check_recipe(recipe)
    settings = dict(settings or {})
    _check_arguments(recipe, settings)
    config = {**recipe.config, **settings}
    size = recipe.size_argument
    if size is None:
        latent = latent or recipe.latent
    elif latent is None:
        latent = (config[size], config[size])
    else:
        if latent[0] != latent[1]:
            raise UsageError(
                f"{recipe.name} takes square inputs only, not {latent[0]}x{latent[1]}",
                hint=f"for example --latent {latent[0]}x{latent[0]}",
            )
        if size in settings and settings[size] != latent[0]:
            raise UsageError(
                f"--set {size}={settings[size]} contradicts the spatial size {latent[0]}x{latent[1]}",
                hint="give one of the two",
            )
        config[size] = latent[0]
    multiple = value_of(recipe.latent_multiple, config)
    if any(not isinstance(n, int) or n < 1 or (multiple > 0 and n % multiple) for n in latent):
        raise UsageError(
            f"{recipe.name}: spatial input {'x'.join(map(limits.shown, latent))} "
            f"must be positive multiples of {limits.shown(multiple)}",
            hint=f"for example --latent {recipe.latent[0]}x{recipe.latent[1]}",
        )
    if latent[0] * latent[1] > limits.LARGEST_GRID or max(latent) > limits.LARGEST_SIDE:
        raise UsageError(
            f"{recipe.name}: spatial input {'x'.join(map(limits.shown, latent))} is too large: "
            f"{limits.LARGEST_GRID:,} cells and a side of {limits.LARGEST_SIDE:,} are the most",
            hint=f"for example --latent {recipe.latent[0]}x{recipe.latent[1]}",
        )
    variant = Variant(recipe, config, latent, fused, _table(recipe, fold_steps))
    # Refuse a bad configuration here, before any work starts.
    module = variant.outline
    empty = [name for name, tensor in module.state_dict().items() if not tensor.numel()]
    if empty:
        raise UsageError(
            f"{recipe.name}: this configuration leaves {empty[0]} empty", hint="give sizes above 0 with --set"
        )
    check_names(recipe, config)
    variant.wrap(module)
    for spec in variant.signature.inputs:
        if spec.values == "integers" and spec.low > spec.high:
            raise UsageError(
                f"{recipe.name}: this configuration leaves no value for the input {spec.name}: "
                f"from {spec.low:g} to {spec.high:g}",
                hint="a network with labels needs one class or more, such as --set num_classes=10",
            )
    return variant


def _table(recipe: Recipe, steps: int | None) -> TimeTable | None:
    if steps is None:
        return None
    if recipe.sampling is None:
        raise UsageError(f"{recipe.name} is no denoiser: it has no steps to fold", hint="leave out --fold-steps")
    return TimeTable(steps, evaluated_times(make_sampler(recipe.sampling.sampler, steps)))


def parse_settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    """``("hidden_size=20", "depth=[1,2]")`` -> values; JSON where it parses, else the plain string."""
    settings = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {limits.shown(pair)} is not NAME=VALUE", hint="for example --set hidden_size=384")
        try:
            settings[key] = _parse_value(text)
        except RecursionError as error:
            hint = f"{limits.DEEPEST_SETTING} deep is the most"
            raise UsageError(f"--set {limits.shown(pair)}: its value is nested too deep", hint) from error
    return settings


def _parse_value(text: str) -> Any:
    words = {"True": True, "False": False, "None": None}
    if text in words:
        return words[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


@contextlib.contextmanager
def _counting_modules() -> Iterator[None]:
    """Stop a constructor that makes more modules than any network has: a depth of a billion would take hours."""
    made = 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        if made > limits.MOST_MODULES:
            raise ValueError(f"it makes more than {limits.MOST_MODULES:,} modules")

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _check_arguments(recipe: Recipe, settings: Mapping[str, Any]) -> None:
    known = inspect.signature(recipe.constructor).parameters
    for name, value in settings.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2)
            raise UsageError(
                f"{recipe.name} has no setting {name!r}",
                hint=f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(known)}",
            )
        default = known[name].default
        if isinstance(default, (int, float)) and (
            not isinstance(value, (int, float)) or isinstance(value, bool) != isinstance(default, bool)
        ):
            raise UsageError(
                f"--set {name}={limits.shown(value)}: expected {type(default).__name__}, as in {name}={default}",
                hint=f"`dexport info {recipe.name}` shows the settings that it has",
            )
