"""dexport: diffusion backbones from PyTorch to ONNX and TensorRT, with proof that they still compute the same.

The public functions import their machinery on first use, so that ``import dexport`` is cheap and loading a bundle works
without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dexport.collector import collector_paused
from dexport.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from dexport.bundle import Bundle
    from dexport.exporter.build import BuildResult
    from dexport.exporter.recipes.recipe import Recipe
    from dexport.exporter.recipes.system import System
    from dexport.exporter.steps import Listener
    from dexport.runtime.opened import OpenProgram
    from dexport.runtime.session import OnnxSession
    from dexport.runtime.tensorrt_session import TensorRtSession

__all__ = ["__version__", "build", "load", "open_program", "recipes"]


def recipes() -> dict[str, Recipe]:
    """All recipes by name, built in and installed."""
    from dexport.exporter.recipes import all_recipes

    return all_recipes()


def build(
    recipe: str | Recipe | System | None, output: str | Path, *, listener: Listener | None = None, **options: Any
) -> BuildResult:
    """Build a bundle.

    Args:
        recipe: a name, a path to a recipe file, or a Recipe or System; None with
            ``stitch="NAME:SHARE,NAME:SHARE"``.
        output: folder of the bundle.
        listener: told about progress.
        options: fields of :class:`dexport.exporter.options.BuildOptions`.

    Raises:
        DexportError: see :mod:`dexport.errors`. A failed gate does not raise: look at ``result.status``.

    Warns:
        BundleWarning: random weights, a failed gate, more lost than is fit to ship, or nothing compared;
            ``result.caveats`` has the same.
    """
    from dexport.hashing import hash_ahead

    hash_ahead(options.get("checkpoint"))
    with collector_paused():
        from dexport.validate.build import build_and_validate

    result = build_and_validate(recipe, output, listener=listener, **options)
    _warn(result.bundle)
    return result


def load(
    path: str | Path,
    provider: str = "cpu",
    *,
    network: str | None = None,
    graph: str = "",
    require_signature: str | Path | None = None,
) -> OnnxSession | TensorRtSession:
    """Check a bundle's hashes and open a graph: ``load("out")(x=..., t=..., y=...) -> {"out": array}``.

    Args:
        network, graph: by name; by default the main ones.
        provider: ``cpu``, ``cuda`` or ``tensorrt``.
        require_signature: PEM file of the ed25519 public key that must have signed it (`dexport pack --sign`).

    Warns:
        BundleWarning: as :func:`build`.
    """
    from dexport.bundle import load_bundle, network_of
    from dexport.runtime.session import open_session

    bundle = load_bundle(path, require_signature)
    session = open_session(network_of(bundle, network, graph), provider, graph)
    _warn(bundle)
    return session


def open_program(
    path: str | Path,
    provider: str = "cpu",
    *,
    players: Mapping[str, str | Path] | None = None,
    require_signature: str | Path | None = None,
) -> OpenProgram:
    """Check a bundle's hashes and open its program: what runs its networks to give pictures, labels, or other results.

        program = dexport.open_program("out").with_settings(steps=20)
        results = program.results(Request(2, labels=(3, 8)), Draws(seed=0, images=[0, 1]))

    Args:
        players: folders of bundles that play roles which the bundle leaves open, such as ``decoder``.
        provider: ``cpu``, ``cuda`` or ``tensorrt``.
        require_signature: PEM file of the ed25519 public key that must have signed them.

    Warns:
        BundleWarning: as :func:`build`.
    """
    from dexport.runtime.opened import OpenProgram

    program = OpenProgram.open(path, provider, players, require_signature)
    _warn(program.bundle)
    return program


def _warn(bundle: Bundle) -> None:
    """Tell who called the public function what the bundle is not."""
    import warnings

    from dexport.errors import BundleWarning

    for caveat in bundle.caveats:
        warnings.warn(f"{bundle.path}: {caveat}", BundleWarning, stacklevel=3)
