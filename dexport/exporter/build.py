"""The vertical path: checkpoints -> ONNX -> engines -> verdicts -> bundle."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dexport.bundle import Bundle, Draft, Network, network_folder
from dexport.drafts import output_folder
from dexport.errors import GateError
from dexport.exporter.manifest import Verdict, bundle_manifest
from dexport.exporter.network_build import NetworkFolder, Settled, Verifier, build_network, open_source, settle
from dexport.exporter.options import BuildOptions
from dexport.exporter.pytorch.state import fresh_torch
from dexport.exporter.quantize.request import Workplace
from dexport.exporter.recipes.recipe import Recipe
from dexport.exporter.recipes.system import System
from dexport.exporter.steps import Listener, Silent, StepLog
from dexport.exporter.system import Part, output_name, plan_system
from dexport.files import open_regular, writing_to
from dexport.verdict import Loss

CHUNK = 1 << 20
"""Bytes that are copied at once."""


@dataclass(frozen=True)
class BuildResult:
    """The bundle, and the verdicts on its networks' graphs; empty of a network that was not verified."""

    bundle: Bundle
    verdicts: Mapping[str, Mapping[str, Verdict]]

    @property
    def verdict(self) -> Verdict | None:
        """That on the main graph of the main network; None where it was not verified."""
        network = self.bundle.network
        return self.verdicts.get(network.name, {}).get(network.main_graph)

    @property
    def status(self) -> str:
        """Of the whole: ``passed``, ``lossy``, ``failed`` or ``not verified``; see :mod:`dexport.verdict`."""
        return self.bundle.status

    @property
    def loss(self) -> Loss:
        """What was lost against PyTorch, the worst of all networks."""
        return self.bundle.loss

    @property
    def caveats(self) -> tuple[str, ...]:
        """What who runs the bundle has to know; empty of one that passed with trained weights."""
        return self.bundle.caveats


@fresh_torch()
def build(
    recipe: str | Recipe | System | None,
    options: BuildOptions,
    verify: Verifier,
    listener: Listener | None = None,
) -> BuildResult:
    """Build a bundle.

    Everything that can be refused is refused before work starts; whatever goes wrong later leaves no bundle behind.
    A failed gate does leave one, marked failed.

    Args:
        recipe: of a network or a system; None where ``options.players`` take the place of the main one.

    Raises:
        DexportError: see its subclasses; the command line exits with their codes.
    """
    log = StepLog(listener or Silent())
    options = replace(options, output=output_folder(options.output))
    plan = plan_system(recipe, options)
    count = len(plan.parts)
    settled = {part.name: _settle(part, options, count) for part in plan.parts if part.variant is not None}
    needed = sum(each.bytes_needed for each in settled.values())
    with Draft(options.output, force=options.force, bytes_needed=needed) as draft:
        with log.step("open weights"):  # of all, so that bad ones are found before anything is built
            sources = {name: open_source(each.variant, each.options) for name, each in settled.items()}
        for each in settled.values():
            if each.variant.within is not None:
                each.variant.within.sources = dict(sources)
        entries, verdicts = {}, {}
        for part in plan.parts:
            folder = NetworkFolder(draft, network_folder(part.name, count))
            if part.network is not None:
                entries[part.name] = _copy(part.network, folder)
                continue
            weights = sources.pop(part.name)
            entries[part.name], verdicts[part.name] = build_network(settled[part.name], weights, folder, verify, log)
        with log.step("hash"):
            bundle = draft.commit(bundle_manifest(plan.name, plan.program, entries, options.accept_loss))
    for each in settled.values():
        if each.request is not None:
            each.place.remove()
    return BuildResult(bundle, verdicts)


def _settle(part: Part, options: BuildOptions, count: int) -> Settled:
    assert part.variant is not None
    return settle(part.variant, part.options, Workplace(output_name(options.output, part.name, count)))


def _copy(network: Network, folder: NetworkFolder) -> Mapping[str, object]:
    """Copy the files of another bundle's network, those that its manifest lists; returns its entry."""
    prefix = f"{network.folder}/" if network.folder else ""
    with writing_to(folder.path):
        for name in network.bundle.manifest["files"]:
            if not name.startswith(prefix):
                continue
            target = folder.path / name.removeprefix(prefix)
            target.parent.mkdir(parents=True, exist_ok=True)
            with open_regular(network.bundle.path / name, follow=False) as source, target.open("xb") as copy:
                shutil.copyfileobj(source, copy, CHUNK)
    return network.manifest


def exit_code(result: BuildResult) -> int:
    """0, or that of a gate: one failed, or more was lost than is fit to ship and accepted."""
    return 0 if result.bundle.acceptable else GateError.exit_code
