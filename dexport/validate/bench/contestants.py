"""The models that ``dexport bench`` times: bundles, and ONNX files that something else made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dexport.bundle import Bundle, load_bundle, network_of, reading_manifest
from dexport.errors import InputError, MachineError, UsageError
from dexport.runtime.inputs import NamedPort, port_of
from dexport.runtime.session import OnnxSession
from dexport.runtime.tensorrt_session import TensorRtSession
from dexport.validate.onnx_file.match_ports import Matched, as_taken, match_ports

if TYPE_CHECKING:  # timing a bundle needs no torch
    from dexport.validate.bench.torch_baseline import Eager

ONNX_FILE, ENGINE = "ONNX file", "engine"
CUDA = "cuda"
Run = Callable[[Mapping[str, np.ndarray]], object]


@dataclass(frozen=True)
class Side:
    """One of those that take turns.

    Attributes:
        owner: which model it is of, or ``PyTorch``.
        kind: ``ONNX file`` or ``engine``; of PyTorch its device.
        runner: what really runs, as its session says.
        device: ``cpu`` or ``cuda``; PyTorch is compared with what runs on the same one.
    """

    owner: str
    kind: str
    runner: str
    device: str
    run: Run

    @property
    def name(self) -> str:
        return f"{self.owner}, {self.kind}"


@dataclass(frozen=True)
class Model:
    """A model, opened.

    Attributes:
        inputs, outputs: as the first model calls them.
        usual_batch: what it is timed at where nothing else is said.
        not_run: what of it cannot run here, and why.
        notes: which of its inputs were cast, or matched by their order.
    """

    path: Path
    sides: tuple[Side, ...]
    inputs: tuple[NamedPort, ...]
    outputs: tuple[NamedPort, ...]
    usual_batch: int
    not_run: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Opener:
    """How models are opened: ``provider`` and CPU ``threads`` are those of ONNX files.

    ``ports`` are the network's names of inputs and outputs -> those of the first model, where that is a file.
    """

    provider: str
    threads: int
    ports: Mapping[str, str] = field(default_factory=dict)
    require_signature: str | Path | None = None
    network: str | None = None
    graph: str = ""

    def bundle(self, bundle: Bundle, owner: str) -> Model:
        """A bundle's ONNX file, and its engine where that runs here.

        Raises:
            UsageError: several networks of one role, or no such network or graph.
            InputError: an incomplete manifest.
            MachineError: the provider is missing.
        """
        network = network_of(bundle, self.network, self.graph)
        ports = network.graphs[self.graph or network.main_graph]
        inputs, outputs = tuple(map(port_of, ports.inputs)), tuple(map(port_of, ports.outputs))
        with reading_manifest(bundle):
            usual, has_engine = int(network.manifest["batch"]["opt"]), network.entry(self.graph)["engine"] is not None
        session = self._session(network.model_path(self.graph))
        sides, not_run = [Side(owner, ONNX_FILE, session.runner, self.provider, lambda given: session(**given))], []
        if has_engine:
            try:
                engine = TensorRtSession(network, self.graph)
                sides.append(Side(owner, ENGINE, engine.runner, CUDA, lambda given: engine(**given)))
            except MachineError as error:
                not_run.append(f"{owner}, {ENGINE}: {error}")
        return Model(bundle.path, tuple(sides), inputs, outputs, usual, tuple(not_run))

    def file(self, path: Path, owner: str, recipe: str, checkpoint: str | None) -> tuple[Model, Eager]:
        """An ONNX file that something else made, held to a recipe; and what PyTorch computes in its place.

        Raises:
            UsageError: no such file or recipe.
            InputError: not a model, or one with other inputs and outputs than the recipe has.
        """
        from dexport.exporter.recipes import find_recipe
        from dexport.validate.bench.torch_baseline import Eager
        from dexport.validate.onnx_file.foreign import ports_of, variant_for

        session = self._session(path)
        variant = variant_for(find_recipe(recipe), session)
        inputs, outputs = map(tuple, ports_of(variant))
        matched = match_ports(str(path), session, "the recipe", inputs, outputs, self.ports)
        side = self._file_side(owner, session, matched)
        model = Model(path, (side,), inputs, outputs, matched.batch or 1, notes=matched.notes)
        return model, Eager.of_variant(variant, checkpoint)

    def beside(self, path: Path, owner: str, first: Model) -> Model:
        """A second bundle or ONNX file that takes the inputs of the first model.

        Raises:
            InputError: it takes others.
        """
        if path.suffix == ".onnx":
            session = self._session(path)
            matched = match_ports(str(path), session, str(first.path), first.inputs, first.outputs)
            side = self._file_side(owner, session, matched)
            return Model(path, (side,), first.inputs, first.outputs, first.usual_batch, notes=matched.notes)
        second = self.bundle(load_bundle(path, self.require_signature), owner)
        if second.inputs != first.inputs:
            raise InputError(
                f"{path} takes {_shown(second.inputs)}; {first.path} takes {_shown(first.inputs)}",
                hint="compare models that take the same inputs",
            )
        return second

    def _session(self, path: Path) -> OnnxSession:
        if not path.is_file():
            raise UsageError(f"{path} does not exist", hint="name an ONNX file, or a bundle's folder")
        return OnnxSession(path, self.provider, threads=self.threads)

    def _file_side(self, owner: str, session: OnnxSession, matched: Matched) -> Side:
        def run(given: Mapping[str, np.ndarray]) -> object:
            return session(**as_taken(given, matched.names, session))

        return Side(owner, ONNX_FILE, session.runner, self.provider, run)


def _shown(ports: Sequence[NamedPort]) -> str:
    return ", ".join(f"{port.name} {list(port.shape)}" for port in ports)
