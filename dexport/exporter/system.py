"""What is built: a program and the networks that play its roles, all settled before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import msgspec

from dexport.bundle import Bundle, Network, load_bundle
from dexport.contract import Graph, Route
from dexport.errors import InputError, UsageError
from dexport.exporter.options import BuildOptions, Player
from dexport.exporter.recipes import find_buildable, find_recipe, registered_recipe
from dexport.exporter.recipes.recipe import Recipe
from dexport.exporter.recipes.system import System
from dexport.exporter.resolve import resolve_network
from dexport.exporter.trajectory import Within, check_program, program_of, role_of
from dexport.exporter.variant import Variant, resolve
from dexport.runtime import opened
from dexport.runtime.calls import rehearse
from dexport.runtime.programs.program import Program

ALONE = "network"
"""The name of a network that no program runs."""


@dataclass(frozen=True)
class Part:
    """A network of a system: what is built, or what is copied from a bundle.

    Attributes:
        name: its role, with a number where several play it.
        share: of the trajectory, where several play the role.
    """

    name: str
    variant: Variant | None
    options: BuildOptions
    network: Network | None = None
    share: float | None = None

    @property
    def graphs(self) -> Mapping[str, Graph]:
        """Its graphs by name."""
        if self.network is not None:
            return self.network.graphs
        assert self.variant is not None
        return {name: signature.graph for name, signature in self.variant.signatures.items()}

    @property
    def title(self) -> str:
        """What it is called in messages."""
        if self.network is not None:
            return str(self.network.manifest["name"])
        assert self.variant is not None
        return self.variant.recipe.name


@dataclass(frozen=True)
class Plan:
    """A system with every setting decided; ``held`` keeps the bundles open whose networks are copied."""

    name: str
    program: Program | None
    parts: tuple[Part, ...]
    held: tuple[Bundle, ...] = ()


def plan_system(recipe: str | Recipe | System | None, options: BuildOptions) -> Plan:
    """Settle what is built.

    Args:
        recipe: None where players of the main role take its place.

    Raises:
        UsageError: options that contradict each other or the system.
        InputError: ports that no program feeds or reads.
    """
    found = find_buildable(recipe) if isinstance(recipe, str) else recipe
    if isinstance(found, System):
        return _of_system(found, options)
    if found is None:
        return _of_players(options)
    variant = resolve_network(found, options)
    check_program(variant)
    program = program_of(variant)
    options = _main_checkpoint(options, ALONE if program is None else role_of(program))
    if program is None:
        if options.players:
            role = next(iter(options.players))
            raise UsageError(
                f"{found.name} has no program, and so no role {role}", hint=f"leave out what is for the {role}"
            )
        return Plan(found.name, None, (Part(ALONE, variant, options),))
    main = Part(role_of(program), variant, options)
    return _with_players(found.name, program, [main], options)


def _main_checkpoint(options: BuildOptions, role: str) -> BuildOptions:
    """Options whose ``checkpoint`` is that of the main role, by whichever name it was given.

    Raises:
        UsageError: checkpoints of networks that are not built.
    """
    files = dict(options.checkpoints)
    own = files.pop(role, None)
    if files:
        name = next(iter(files))
        raise UsageError(
            f"--checkpoint {name}=FILE: nothing plays the role {name}",
            hint=f"add --with-{name}, or name a file that has = in its name as ./{name}=...",
        )
    if own is not None and options.checkpoint is not None:
        raise UsageError(f"{options.checkpoint} and {own} are both for the {role}", hint="give one of them")
    return replace(options, checkpoint=own or options.checkpoint, checkpoints={})


def _of_system(system: System, options: BuildOptions) -> Plan:
    """A system with a name: every role is played by the recipes that it names."""
    parts: list[Part] = []
    variants: dict[str, list[Variant]] = {}
    main = next(iter(system.roles))
    for role, recipes in system.roles.items():
        for index, recipe in enumerate(recipes):
            own = options if role == main else options.shared
            part = name_of(role, index, len(recipes))
            own = replace(own, checkpoint=options.checkpoints.get(part), checkpoints={}, players={})
            own = replace(own, seed=options.seed + len(parts))  # random weights differ
            variant = resolve_network(
                recipe if isinstance(recipe, Recipe) else registered_recipe(recipe), own, part=True
            )
            variants.setdefault(role, []).append(variant)
            parts.append(Part(part, variant, own))
    unknown = [name for name in options.checkpoints if name not in {part.name for part in parts}]
    if unknown or options.checkpoint is not None:
        raise UsageError(
            f"{system.name} has no network {', '.join(unknown) or 'without a name'} that a checkpoint could be for",
            hint=f"give --checkpoint ROLE=FILE with a role of {', '.join(part.name for part in parts)}",
        )
    program, networks = system.program(variants), {part.name: part.variant for part in parts if part.variant}
    parts = [replace(part, variant=_within(part, program, networks)) for part in parts]
    return _with_players(system.name, program, parts, options)


def _within(part: Part, program: Program, networks: Mapping[str, Variant]) -> Variant:
    assert part.variant is not None
    return replace(part.variant, within=Within(program, part.name, networks))


def _of_players(options: BuildOptions) -> Plan:
    """Several networks that share the main role, noisiest first."""
    role, players = next(iter(options.players.items()))
    if options.checkpoint is not None or options.init_from is not None:
        raise UsageError(
            "--checkpoint and --init-from do not say which denoiser they are for",
            hint="give NAME[=CHECKPOINT]:FRACTION,..., noisiest first",
        )
    held, parts, programs = [], [], {}
    for index, player in enumerate(players):
        name = name_of(role, index, len(players))
        if player.is_bundle:
            bundle = load_bundle(player.source)
            held.append(bundle)
            programs[str(player.source)] = _program_for(bundle, role, player)
            parts.append(Part(name, None, options, bundle.roles[role][0], player.share))
            continue
        own = replace(options, checkpoint=player.checkpoint, players={}, checkpoints={})
        variant = resolve_network(find_recipe(player.source), own)
        program = program_of(variant)
        if program is None or role not in program.roles:
            raise UsageError(f"{variant.recipe.name} plays no role {role}", hint="name recipes of denoisers")
        check_program(variant)
        programs[player.source] = program
        parts.append(Part(name, variant, own, None, player.share))
    _check_agreement(programs)
    last = list(programs.values())[-1]
    program = last.with_settings(route=tuple(Route(player.share) for player in players))
    plan = _with_players("+".join(part.title for part in parts), program, parts, options, role)
    return replace(plan, held=(*plan.held, *held))


def _program_for(bundle: Bundle, role: str, player: Player) -> Program:
    try:
        program = opened.program_of(bundle)
    except InputError as error:
        raise UsageError(f"{player.source} is not a single {role} and cannot share one: {error}") from error
    if len(bundle.roles.get(role, ())) != 1:
        raise UsageError(f"{player.source} is not a single {role} and cannot share one", hint="give its networks alone")
    return program


def _with_players(name: str, program: Program, parts: Sequence[Part], options: BuildOptions, taken: str = "") -> Plan:
    """Add who plays the optional roles, and check the whole."""
    parts, held = list(parts), []
    main = parts[0]
    for role, players in options.players.items():
        if role == taken:
            continue
        if role not in program.roles or any(part.name.partition(".")[0] == role for part in parts):
            raise UsageError(f"{name}: the role {role} is not open", hint=f"leave out what is for the {role}")
        for index, player in enumerate(players):
            part_name = name_of(role, index, len(players))
            if player.is_bundle:
                bundle = load_bundle(player.source)
                held.append(bundle)
                network = bundle.roles[role][0] if role in bundle.roles else bundle.network
                parts.append(Part(part_name, None, options, network))
                continue
            source = player.source or program.players().get(role)
            if source is None:
                if player.checkpoint is not None:
                    raise UsageError(f"{name} needs no {role}, which has no weights", hint=f"leave out the {role}'s")
                continue
            own = replace(options.shared, checkpoint=player.checkpoint)
            variant = resolve(find_recipe(source), latent=main.variant.latent if main.variant else None)
            parts.append(Part(part_name, variant, replace(own, latent=variant.latent)))
    _check_fit(name, program, parts)
    return Plan(name, program, tuple(parts), tuple(held))


def _check_fit(name: str, program: Program, parts: Sequence[Part]) -> None:
    """Refuse networks that the program cannot run, those that usually play its open roles included."""
    graphs: dict[str, list[Mapping[str, Graph]]] = {}
    for part in parts:
        graphs.setdefault(part.name.partition(".")[0], []).append(part.graphs)
    usual = {}
    for role, source in program.players().items():
        if role not in graphs:
            try:
                recipe = registered_recipe(source)
            except UsageError as error:
                raise InputError(f"{name}: there is no {role} {source!r}", hint=error.hint) from error
            variant = parts[0].variant
            usual[role] = [
                {"model": recipe.signature(recipe.config, variant.latent if variant else recipe.latent).graph}
            ]
    try:
        program.check({**graphs, **usual})
        rehearse(program, graphs)
    except UsageError as error:
        raise UsageError(f"{name}: {error}", hint=error.hint) from error


def _check_agreement(programs: Mapping[str, Program]) -> None:
    """Refuse networks of one role whose programs differ in more than their settings."""
    facts = {name: facts_of(program) for name, program in programs.items()}
    first, *others = facts
    problems = [
        f"{fact}: {value} in {first}, {facts[other].get(fact)} in {other}"
        for other in others
        for fact, value in facts[first].items()
        if facts[other].get(fact) != value
    ]
    if problems:
        raise UsageError(
            "these networks cannot share a trajectory:\n    " + "\n    ".join(problems),
            hint="take models that were trained with one latent space, schedule and prediction type",
        )


def facts_of(program: Program) -> dict[str, Any]:
    """The facts of a program, but for its settings and the names of its classes."""
    facts = {field.name: getattr(program, field.name) for field in fields(program)}
    plain = msgspec.structs.replace(program.condition, names=())
    held = {name: value for name, value in facts.items() if name not in program.settings}
    return {"kind": program.kind, **held, "condition": plain}


def name_of(role: str, index: int, count: int) -> str:
    """The name of a network: its role, with a number where several play it."""
    return role if count == 1 else f"{role}.{index}"


def output_name(output: Path, part: str, count: int) -> Path:
    """What lies beside a bundle for one of its networks."""
    return output if count == 1 else output.with_name(f"{output.name}.{part}")
