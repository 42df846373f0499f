"""A recipe resolved with the user's settings: configuration, spatial size, module, signature."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from dexport import limits
from dexport.collector import collector_paused
from dexport.contract import LABEL, TIME
from dexport.errors import DexportError, InputError, UsageError
from dexport.exporter.pytorch.declared import return_declared
from dexport.exporter.pytorch.state import fresh_torch
from dexport.exporter.recipes.check import check_recipe, check_signature
from dexport.exporter.recipes.diffusion import graphs_of, guidance_rule, null_label
from dexport.exporter.recipes.recipe import MODEL, GraphRecipe, Recipe, Signature, TensorSpec, value_of
from dexport.exporter.weights.source import WeightSource
from dexport.runtime.programs.program import Calls, Network, Program


@dataclass(frozen=True)
class TimeTable:
    """The times of one run: all that a graph takes whose time-dependent values are tables.

    Attributes:
        steps: of the program.
        times: each time at which it evaluates the network, once, in the order of the first evaluations.
    """

    steps: int
    times: tuple[float, ...]


class Surroundings(Protocol):
    """The system that a network is a part of: how it is run, and what is run beside it.

    Attributes:
        sources: the weights of all networks by name, once they are open.
    """

    sources: Mapping[str, WeightSource]

    @property
    def program(self) -> Program: ...

    @property
    def key(self) -> str:
        """What the run depends on besides the network."""
        ...

    def calls(self, network: Network) -> Calls:
        """The networks of the system, with this one in its place."""
        ...


@dataclass(frozen=True)
class Variant:
    """A network with every setting decided, and one of its graphs.

    Attributes:
        graphs: all that are exported.
        graph: the one that is meant where one is.
        table: the times that the graphs take; None for any.
        within: the system that it is a part of; None where it is run by its own program, if any.
    """

    recipe: Recipe
    config: Mapping[str, Any]
    latent: tuple[int, int]
    graphs: tuple[str, ...] = (MODEL,)
    graph: str = MODEL
    table: TimeTable | None = None
    within: Surroundings | None = None

    @property
    def runs(self) -> bool:
        """Whether there is a program that runs it."""
        return self.within is not None or self.recipe.has_program

    @property
    def each(self) -> tuple[Variant, ...]:
        """Every graph that is exported; those of one network share its :attr:`outline`."""
        found = tuple(self if graph == self.graph else replace(self, graph=graph) for graph in self.graphs)
        for variant in found:
            variant.__dict__.setdefault("outline", self.outline)
        return found

    @property
    def signatures(self) -> dict[str, Signature]:
        """Of every graph that is exported, by name."""
        return {variant.graph: variant.signature for variant in self.each}

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
        """The module whose forward is the graph: the network itself, or what the recipe puts around it."""
        return self._graph.wrap(module, self.config)

    @property
    def around(self) -> str:
        """The module path of operations that the graph adds around the network."""
        return self._graph.path

    @property
    def _graph(self) -> GraphRecipe:
        graphs = graphs_of(self.recipe)
        if self.graph not in graphs:
            raise UsageError(
                f"{self.recipe.name} has no graph {limits.shown(self.graph)}", hint=f"it has {', '.join(graphs)}"
            )
        return graphs[self.graph]

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
        return self._signature(self.recipe.signature)

    @functools.cached_property
    def signature(self) -> Signature:
        """The signature of the graph to export.

        Raises:
            UsageError, InputError: as :attr:`plain`.
        """
        signature = self._signature(self._graph.signature)
        null, changed = null_label(self.recipe, self.config), {}
        for spec in signature.inputs:
            if spec.meaning == LABEL and null is not None:
                changed[spec.name] = replace(spec, largest=null)
            if spec.meaning == TIME and self.table is not None:
                changed[spec.name] = replace(spec, choices=self.table.times)
        return replace(signature, inputs=tuple(changed.get(spec.name, spec) for spec in signature.inputs))

    def _signature(self, function: Callable[[Mapping[str, Any], tuple[int, int]], Signature]) -> Signature:
        try:
            signature = function(self.config, self.latent)
        except DexportError:
            raise
        except Exception as error:  # a signature is a function of the user's
            raise UsageError(
                f"{self.recipe.name}: the signature fails for this configuration: {type(error).__name__}: {error}",
                hint=f"`dexport info {self.recipe.name}` shows the settings that it has",
            ) from error
        return check_signature(self.recipe.name, signature)

    @property
    def time_input(self) -> TensorSpec:
        """The input that takes the time.

        Raises:
            UsageError: there is none.
        """
        spec = self.signature.input(TIME)
        if spec is None:
            names = ", ".join(spec.name for spec in self.signature.inputs)
            raise UsageError(
                f"{self.recipe.name} has no time input: its inputs are {names}", hint="leave out --fold-steps"
            )
        return spec

    def config_json(self) -> str:
        return json.dumps(dict(self.config), sort_keys=True)


@collector_paused()  # the first network that is made imports much of torch
@fresh_torch()
def resolve(
    recipe: Recipe,
    settings: Mapping[str, Any] | None = None,
    latent: tuple[int, int] | None = None,
    graphs: Sequence[str] = (),
) -> Variant:
    """Apply ``--set`` values and the spatial size to a recipe.

    Args:
        settings: constructor arguments that override the recipe's.
        latent: (height, width) of the spatial input, or None for the recipe's (or the size argument's).
        graphs: to export, by name; by default those of the recipe.

    Raises:
        UsageError: unknown argument or graph, or a size that the network cannot take.
    """
    check_recipe(recipe)
    settings = dict(settings or {})
    _check_arguments(recipe, settings)
    config = {**recipe.config, **settings}
    size, unit = recipe.size_argument, value_of(recipe.size_unit, config)
    if not isinstance(unit, int) or unit < 1:
        raise UsageError(f"{recipe.name}: cells of {limits.shown(unit)}", hint="give whole numbers above 0 with --set")
    if size is None:
        latent = latent or recipe.latent
    elif isinstance(recipe.config.get(size), list):
        latent = _sides(recipe.name, size, settings, latent or _pair(config[size]))
        config[size] = list(latent)
    elif latent is None:
        side = config[size] // unit if isinstance(config[size], int) else config[size]  # what is no number, see below
        latent = (side, side)
    else:
        if latent[0] != latent[1]:
            raise UsageError(
                f"{recipe.name} takes square inputs only, not {latent[0]}x{latent[1]}",
                hint=f"for example --latent {latent[0]}x{latent[0]}",
            )
        if size in settings and settings[size] != latent[0] * unit:
            raise UsageError(
                f"--set {size}={settings[size]} contradicts the spatial size {latent[0]}x{latent[1]}",
                hint="give one of the two",
            )
        config[size] = latent[0] * unit
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
    names = tuple(dict.fromkeys(graphs)) or recipe.exported
    variant = Variant(recipe, config, latent, names, MODEL if MODEL in names else names[0])
    # Refuse a bad configuration here, before any work starts.
    module = variant.outline
    empty = [name for name, tensor in module.state_dict().items() if not tensor.numel()]
    if empty:
        raise UsageError(
            f"{recipe.name}: this configuration leaves {empty[0]} empty", hint="give sizes above 0 with --set"
        )
    guidance_rule(recipe, config)
    for each in variant.each:
        each.wrap(module)
    for spec in (spec for signature in variant.signatures.values() for spec in signature.inputs):
        if spec.values == "integers" and spec.low > spec.high:
            raise UsageError(
                f"{recipe.name}: this configuration leaves no value for the input {spec.name}: "
                f"from {spec.low:g} to {spec.high:g}",
                hint="a network with labels needs one class or more, such as --set num_classes=10",
            )
    return variant


def _sides(name: str, argument: str, settings: Mapping[str, Any], latent: tuple[int, int] | None) -> tuple[int, int]:
    """The height and width that an argument ``[height, width]`` and the spatial size agree on."""
    given = settings.get(argument)
    if latent is None:
        raise UsageError(
            f"{name}: --set {argument}={limits.shown(given)}: expected [height, width]",
            hint=f"for example --set {argument}=[16,16]",
        )
    if given is not None and _pair(given) != latent:
        raise UsageError(
            f"--set {argument}={limits.shown(given)} contradicts the spatial size {latent[0]}x{latent[1]}",
            hint="give one of the two",
        )
    return latent


def _pair(value: object) -> tuple[int, int] | None:
    """``[height, width]`` as a pair; None for anything else."""
    return (value[0], value[1]) if isinstance(value, (list, tuple)) and len(value) == 2 else None


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
