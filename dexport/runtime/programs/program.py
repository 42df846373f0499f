"""What a program is: how networks are run to give an answer, against roles, calls and draws only."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Protocol, Self, get_args, get_origin, get_type_hints

import msgspec
import numpy as np

from dexport.contract import UNCONDITIONAL, Clock, Condition, Graph
from dexport.errors import UsageError
from dexport.limits import shown
from dexport.runtime.draws import Draws
from dexport.runtime.guidance import check_labels

PICTURES, LATENTS, IDS = "pictures", "latents", "ids"
"""Results by which commands know what a program makes: (B, H, W, C) uint8, (B, C, H, W) float32, (B, N) int64."""


Graphs = Mapping[str, Sequence[Mapping[str, Graph]]]
"""The graphs of networks by role."""


@dataclass(frozen=True)
class Role:
    """The part that networks play in a program.

    Attributes:
        graphs: alternatives: a network has all graphs of one of them.
        least, most: how many networks there are; most is None where nothing limits them.
        agree: roles of ports whose shapes are the same in all of them.
    """

    graphs: tuple[frozenset[str], ...] = (frozenset({"model"}),)
    least: int = 1
    most: int | None = 1
    agree: tuple[str, ...] = ()


class Network(Protocol):
    """A network that a program can call."""

    @property
    def graphs(self) -> Mapping[str, Graph]: ...

    def __call__(self, graph: str, /, **inputs: np.ndarray) -> Mapping[str, np.ndarray]:
        """Evaluate one of its graphs: named arrays in, named arrays out."""
        ...


Calls = Mapping[str, Sequence[Network]]
"""The networks of a bundle by role; a role that nothing plays is absent."""


@dataclass(frozen=True)
class Request:
    """What is asked for, one row per image; its settings are fields of the program.

    Attributes:
        count: rows.
        labels: (count,) classes; empty where the program takes none.
        inputs: arrays (count, ...) that the program takes besides, such as pictures to restore.
    """

    count: int
    labels: tuple[int, ...] = ()
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Step:
    """One executed step.

    Attributes:
        index: how many steps were executed before.
        time: in the program's unit.
        state: (B, ...) after the step.
        results: by name, in the last step; empty before.
        decided: where the state is ids, how many of them the step changed.
    """

    index: int
    time: float
    state: np.ndarray
    results: Mapping[str, np.ndarray] = field(default_factory=dict)
    decided: int | None = None


@dataclass(frozen=True, kw_only=True)
class Program:
    """Facts about how networks are run, as a manifest holds them; every kind is a subclass and a frozen dataclass.

    Attributes:
        kind: its name in manifests.
        roles: what it calls.
        settings: fields that a request may change.
        condition: what it is asked by.
    """

    kind: ClassVar[str]
    roles: ClassVar[Mapping[str, Role]]
    settings: ClassVar[tuple[str, ...]] = ()
    condition: Condition = UNCONDITIONAL
    known: ClassVar[dict[str, type[Program]]] = {}
    """Every kind whose class this process has imported, such as that of a recipe file."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "kind" in vars(cls):
            Program.known.setdefault(cls.kind, cls)

    @property
    def title(self) -> str:
        """The kind and its settings, for people."""
        plain = {name: value for name, value in self.values.items() if isinstance(value, (int, float, str))}
        return ", ".join([self.kind, *(f"{name} {value}" for name, value in plain.items())])

    def run(self, calls: Calls, request: Request, draws: Draws) -> Iterator[Step]:
        """Run the networks; the last step has the results.

        A program whose states are ids is a generator that goes on from the state that it is sent, if any: free runs
        part after the first id that falls otherwise, so its steps are judged at another run's states.

        Raises:
            UsageError: labels or inputs that it does not take.
            GateError: results that are not finite, after the steps that led to them.
        """
        raise NotImplementedError

    def smallest(self, networks: Graphs) -> Graphs:
        """The same graphs at the smallest sizes that the program runs: what it calls when does not depend on sizes."""
        return networks

    def check(self, networks: Graphs) -> None:
        """Refuse networks that it cannot run, from their graphs.

        Raises:
            UsageError: it names the role, and what was expected.
        """
        check_roles(self, networks)

    def players(self) -> Mapping[str, str]:
        """The recipes of networks that usually play its optional roles, by role."""
        return {}

    def makes(self, networks: Graphs) -> Mapping[str, tuple[int, ...]]:
        """The shapes of the results for one image, by name."""
        raise NotImplementedError

    @property
    def clock(self) -> Clock | None:
        """The unit of its steps' time; None where it is not linear."""
        return None

    @property
    def fused(self) -> str | None:
        """The graph with all inside that the program computes of predictions, as guidance; None where there is none."""
        return None

    @property
    def values(self) -> dict[str, Any]:
        """The settings by name, as JSON values."""
        return {name: msgspec.to_builtins(getattr(self, name)) for name in self.settings}

    def with_settings(self, **settings: Any) -> Self:
        """The program with some settings changed; None leaves one as it is.

        Raises:
            UsageError: no such setting, or a value that it cannot have.
        """
        changed = {name: value for name, value in settings.items() if value is not None}
        types = get_type_hints(type(self), include_extras=True)
        for name, value in changed.items():
            if name not in self.settings:
                near = difflib.get_close_matches(name, self.settings, n=2)
                raise UsageError(
                    f"{self.kind} has no setting {shown(name)}",
                    hint=f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(self.settings) or 'none'}",
                )
            try:
                changed[name] = msgspec.convert(value, types[name])
            except msgspec.ValidationError as error:
                names = get_args(types[name]) if get_origin(types[name]) is Literal else ()
                hint = f"choose from {', '.join(filter(None, names))}; " if names else ""
                raise UsageError(
                    f"{name} {shown(value)}: {error}", hint=f"{hint}it is {getattr(self, name)!r} here"
                ) from error
        return replace(self, **changed) if changed else self

    @classmethod
    def numbers(cls) -> dict[str, type]:
        """The settings that are one number: ``int`` or ``float``, by name. Servers take these with every request."""
        types = get_type_hints(cls)
        return {name: types[name] for name in cls.settings if types[name] in (int, float)}

    def to_json(self) -> dict[str, Any]:
        """What a manifest holds."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"kind": self.kind, **msgspec.to_builtins(values)}


def check_roles(program: Program, networks: Graphs) -> None:
    """Refuse roles that nothing or too much plays, graphs that are missing, and ports that do not agree."""
    for name in networks:
        if name not in program.roles:
            raise UsageError(f"{program.kind} has no role {name}", hint=f"it has {', '.join(program.roles)}")
    for name, role in program.roles.items():
        players = networks.get(name, ())
        if not role.least <= len(players) <= (len(players) if role.most is None else role.most):
            most = "or more" if role.most is None else f"to {role.most}"
            raise UsageError(
                f"{program.kind}: the role {name} has {len(players)} networks", hint=f"it takes {role.least} {most}"
            )
        for index, graphs in enumerate(players):
            if not any(wanted <= set(graphs) for wanted in role.graphs):
                wanted = " or ".join(" and ".join(sorted(each)) for each in role.graphs)
                raise UsageError(
                    f"{program.kind}: network {index} of the role {name} has the graphs {', '.join(graphs)}",
                    hint=f"it needs {wanted}",
                )
        for port in role.agree:
            shapes = {tuple(shape) for graphs in players if (shape := shape_of(graphs, port)) is not None}
            if len(shapes) > 1:
                raise UsageError(
                    f"{program.kind}: networks of the role {name} have different {port}s: "
                    f"{' and '.join(str(list(shape)) for shape in sorted(shapes, key=str))}",
                    hint="take networks of one size",
                )


def shape_of(graphs: Mapping[str, Graph], role: str) -> tuple[int | str, ...] | None:
    """The shape of the first input with a role."""
    found = (graph.input(role) for graph in graphs.values())
    return next((port.shape for port in found if port is not None), None)


def check_condition(condition: Condition, request: Request) -> None:
    """Refuse labels that a program does not take, or that are missing.

    Raises:
        UsageError: so they are.
    """
    if condition.kind != "class":
        if request.labels:
            raise UsageError("this model is unconditional and has no classes", hint="leave out --classes")
        return
    assert condition.classes is not None, "a condition by class says how many there are"
    check_labels(request.labels, condition.classes)
    if len(request.labels) != request.count:
        raise UsageError(f"{len(request.labels)} labels for {request.count} images", hint="give one label per image")
