"""A bundle whose program can be run: what ``dexport.open_program`` opens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from dexport.bundle import MANIFEST, Bundle, Network, load_bundle
from dexport.contract import Batch, Condition, from_json
from dexport.errors import InputError, UsageError
from dexport.runtime import programs
from dexport.runtime.calls import SessionNetwork, last_step, rehearse
from dexport.runtime.draws import Draws
from dexport.runtime.programs.program import PICTURES, Calls, Program, Request, Step
from dexport.runtime.session import TENSORRT, open_session

OpenGraph = Callable[[Network, str], Any]
"""Opens the session of a network's graph."""


class OpenProgram:
    """The program of a bundle, with its networks.

    Sessions are opened when they are called for the first time, or by :meth:`load`.

    Args:
        bundle: a bundle whose hashes have been checked.
        provider: ``cpu``, ``cuda`` or ``tensorrt``.
        players: networks of other bundles that play roles which the bundle leaves open, such as ``decoder``.
        open_graph: what runs in place of the bundle's own graphs.

    Attributes:
        program: its facts, with the settings of :meth:`with_settings`.
        roles: the networks by role.

    Raises:
        InputError: the bundle has no program, or one that its networks do not fit.
        UsageError: a player for a role that there is not or that is taken, or one that cannot play it.
    """

    def __init__(
        self,
        bundle: Bundle,
        provider: str = "cpu",
        players: Mapping[str, Bundle] | None = None,
        *,
        open_graph: OpenGraph | None = None,
    ) -> None:
        self.bundle = bundle
        self.program = program_of(bundle)
        self.roles = with_players(bundle, self.program, players or {})
        self.graphs = {role: [network.graphs for network in networks] for role, networks in self.roles.items()}
        try:
            self.rehearse()
            self._batches = {role: [_batch(network) for network in networks] for role, networks in self.roles.items()}
        except UsageError as error:
            if players:
                raise UsageError(
                    f"{', '.join(str(each.path) for each in players.values())}: {error}", error.hint
                ) from error
            raise InputError(f"{bundle.path / MANIFEST}: {error}", hint="build the bundle again") from error
        self._provider = provider
        opening = open_graph or partial(_open, provider)  # not a method: nothing here refers to itself
        self._networks = {
            role: [SessionNetwork(network.graphs, partial(opening, network)) for network in networks]
            for role, networks in self.roles.items()
        }

    @classmethod
    def open(
        cls,
        path: str | Path,
        provider: str = "cpu",
        players: Mapping[str, str | Path] | None = None,
        require_signature: str | Path | None = None,
    ) -> Self:
        """Check the hashes of a bundle and of other players', and their signatures where one is required."""
        bundle = load_bundle(path, require_signature)
        others = {role: load_bundle(folder, require_signature) for role, folder in (players or {}).items()}
        return cls(bundle, provider, others)

    def load(self) -> Self:
        """Open all sessions that the program calls, which else are opened one by one as it calls them."""
        for call in self.rehearse():
            self._networks[call.role][call.index].open(call.graph)
        return self

    @property
    def calls(self) -> Calls:
        """The networks, as the program calls them."""
        return self._networks

    @property
    def runner(self) -> str:
        """What runs the first network."""
        first = next(iter(self._networks.values()))[0]
        if not first.runner:
            self.load()
        return first.runner

    @property
    def condition(self) -> Condition:
        """What the program is asked by."""
        return self.program.condition

    @property
    def classes(self) -> int | None:
        """How many classes there are; None where the program takes no labels."""
        return self.condition.classes if self.condition.kind == "class" else None

    @property
    def makes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of the results for one image, by name."""
        return self.program.makes(self.graphs)

    @property
    def pictures(self) -> bool:
        """Whether it makes pictures."""
        return PICTURES in self.makes

    def check_pictures(self, why: str = "") -> None:
        """Refuse a bundle that makes no pictures.

        Args:
            why: who needs them, for the message.

        Raises:
            UsageError: so it is; its hint says how to get some.
        """
        if self.pictures:
            return
        lacking = [role for role in self.program.roles if role not in self.roles]
        missing = " and no ".join(lacking) or "pictures"
        raise UsageError(
            f"{self.bundle.path} makes {', '.join(self.makes)} and has no {missing}{why}",
            hint="".join(f"build it with --with-{role}, or give a bundle with --{role}" for role in lacking[:1]),
        )

    def with_settings(self, **settings: Any) -> Self:
        """The same networks with other settings of the program; None leaves one as it is.

        Raises:
            UsageError: no such setting, a value that it cannot have, or times that a network was not built for.
        """
        changed = copy.copy(self)
        changed.program = self.program.with_settings(**settings)
        if changed.program is not self.program:
            changed.rehearse()
        return changed

    def rehearse(self) -> list[Any]:
        """The calls for one image, without loading or computing; see :func:`~dexport.runtime.calls.rehearse`."""
        return rehearse(self.program, self.graphs)

    def largest_batch(self) -> int | None:
        """How many images are best made together; None where nothing limits it.

        An engine has a range of batches, and a program may give it several rows per image. Other numbers work as well:
        they are split or filled up (:class:`~dexport.runtime.batches.InBatches`).
        """
        if self._provider != TENSORRT:
            return None
        most = []
        for call in self.rehearse():
            rows = max((len(array) for array in call.inputs.values() if np.ndim(array)), default=1)
            most.append(self._batches[call.role][call.index].max // rows)
        return max(1, min(most))

    def run(self, request: Request, draws: Draws) -> Iterator[Step]:
        """Run the program, a step at a time."""
        return self.program.run(self._networks, request, draws)

    def results(self, request: Request, draws: Draws) -> Mapping[str, np.ndarray]:
        """Run the program to its end.

        Raises:
            GateError: results that are not finite.
        """
        return last_step(self.run(request, draws)).results


def program_of(bundle: Bundle) -> Program:
    """The program of a bundle.

    Raises:
        InputError: it has none, or one that is not known here.
    """
    if bundle.program is None:
        raise InputError(
            f"{bundle.path} has no program: its network runs by itself only",
            hint=f"run it with dexport.load({str(bundle.path)!r}), or build a system, such as dit-xl-2",
        )
    return programs.program_from_json(bundle.program, str(bundle.path / MANIFEST))


def with_players(bundle: Bundle, program: Program, players: Mapping[str, Bundle]) -> dict[str, Sequence[Network]]:
    """The networks of a bundle by role, and those of others that play the roles which it leaves open.

    Raises:
        UsageError: see :class:`OpenProgram`.
    """
    roles: dict[str, Sequence[Network]] = dict(bundle.roles)
    for role, other in players.items():
        if role not in program.roles:
            raise UsageError(f"{program.kind} has no role {role}", hint=f"it has {', '.join(program.roles)}")
        roles[role] = [other.network]
    return roles


def _open(provider: str, network: Network, graph: str) -> Any:
    return open_session(network, provider, graph)


def _batch(network: Network) -> Batch:
    where = f"{network.bundle.path / MANIFEST}: networks.{network.name}.batch"
    return from_json(Batch, network.manifest.get("batch"), where)
