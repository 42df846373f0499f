"""What to build: options in groups, each of which says what it decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dexport.exporter.quantize.calibrate import DEFAULT_IMAGES
from dexport.exporter.quantize.ternary import AUTO
from dexport.exporter.tracing.trace import DEFAULT_OPSET

AUTO_PRECISION = "auto"
BYTES_PER_WEIGHT = {"fp32": 4, "fp16": 2, "bf16": 2, AUTO_PRECISION: 4}
"""By precision."""


@dataclass(frozen=True)
class Player:
    """A network for a role.

    Attributes:
        source: a recipe, or the folder of a bundle; empty for the recipe that usually plays the role.
        checkpoint: its weights; random ones without.
        share: of the trajectory, where several play the role.
    """

    source: str = ""
    checkpoint: str | None = None
    share: float | None = None

    @property
    def is_bundle(self) -> bool:
        return bool(self.source) and Path(self.source).is_dir()


def _option(default: Any, *, file: bool = True, shared: bool = False) -> Any:
    """A field.

    Args:
        file: it decides what the ONNX files are.
        shared: it holds for every network of a system; others are for the main role only.
    """
    facts = {"file": file, "shared": shared}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=facts)
    return field(default=default, metadata=facts)


@dataclass(frozen=True)
class BuildOptions:
    """What to build. Field names follow the command line; see ``dexport build --help``.

    Attributes:
        graphs: of the network, by name; by default those of the recipe.
        latent: (height, width) of the spatial input, None for the recipe's.
        image_size: the same in image pixels, for square inputs.
        islands: module patterns kept in float32 on top of the recipe's; INT8 leaves them alone too.
        precision: ``fp32``, ``fp16``, ``bf16``, or ``auto``: float16 but for what it cannot hold.
        int8: ``weight`` or ``w8a8``; what it leaves alone computes in ``precision``.
        precision_map: a file, or glob patterns of layers -> scheme; see :mod:`dexport.exporter.quantize.schemes`.
        budget: ``snr>=DB``, ``size<=SHARE`` or ``size<=NMB``, or both: schemes are chosen layer by layer to meet it.
        calibration_images, calibration_seed: trajectories that quantisation is calibrated on.
        fold_steps: of the program; what depends on time alone becomes tables of their times.
        no_passes: names of graph passes to leave out; see :data:`dexport.exporter.passes.SWITCHABLE`.
        engine: ``auto``, ``tensorrt`` or ``tensorrt-rtx``; used when ``trt`` is set.
        init_from: checkpoint of another model to inherit from, as far as the recipe allows.
        plugins: ``auto``, ``on`` or ``off``; only TensorRT engines can have plugins.
        ternary: store ternary layers packed, and round those of any other recipe to ternary; None for the former only,
            because that loses nothing.
        ternary_carrier: ``auto`` or a name of :data:`dexport.exporter.quantize.carriers.CARRIERS`.
        targets: compute capabilities; empty for the GPU here, or the profile's.
        profile: name or path.
        parity: whether to compare with PyTorch; without, the bundle says that it was not verified.
        cache: take unchanged steps from earlier builds, and keep this one's for later ones.
        players: networks for roles that the recipe leaves open, or in place of a recipe for the main one.
        checkpoints: of the networks of a system, by name.
        accept_loss: more may be lost than is fit to ship (:mod:`dexport.verdict`); the manifest keeps that it was said.
    """

    output: Path = field(metadata={"file": False, "shared": True})
    # Source
    checkpoint: str | None = _option(None, file=False)  # counts by its content
    checkpoints: Mapping[str, str] = _option({}, file=False)
    init_from: str | None = _option(None, file=False)
    seed: int = _option(0, shared=True)
    players: Mapping[str, tuple[Player, ...]] = _option({}, file=False)
    # Network
    settings: Mapping[str, Any] = _option({})
    latent: tuple[int, int] | None = _option(None)
    image_size: int | None = _option(None)
    graphs: tuple[str, ...] = _option(())
    fold_steps: int | None = _option(None)
    # Precision
    precision: str = _option("fp32", shared=True)
    islands: tuple[str, ...] = _option(())
    opset: int = _option(DEFAULT_OPSET, shared=True)
    no_passes: tuple[str, ...] = _option((), shared=True)
    # Quantisation: after a calibration nothing is reused
    int8: str | None = _option(None)
    precision_map: str | Path | Mapping[str, str] | None = _option(None, file=False)  # noqa: RUF009 - a field
    budget: str | None = _option(None, file=False)
    ternary: bool | None = _option(None)
    ternary_carrier: str = _option(AUTO)
    calibration_images: int = _option(DEFAULT_IMAGES, file=False)
    calibration_seed: int = _option(0, file=False)
    # Engine
    trt: bool = _option(False, file=False, shared=True)
    engine: str = _option("auto", file=False, shared=True)
    targets: tuple[str, ...] = _option((), file=False, shared=True)
    plugins: str = _option("auto", shared=True)
    profile: str = _option("latency", file=False, shared=True)
    # Output
    parity: bool = _option(True, file=False, shared=True)
    force: bool = _option(False, file=False, shared=True)
    cache: bool = _option(True, file=False, shared=True)
    accept_loss: bool = _option(False, file=False, shared=True)

    @property
    def decisive(self) -> dict[str, Any]:
        """What decides the ONNX files, as JSON values: a part of the key of the build cache."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.metadata["file"]}

    @property
    def shared(self) -> BuildOptions:
        """What holds for a network that does not play the main role: nothing about that one's layers or sizes."""
        return BuildOptions(**{each.name: getattr(self, each.name) for each in fields(self) if each.metadata["shared"]})
