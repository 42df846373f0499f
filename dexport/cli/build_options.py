"""The one place where option groups become the keyword arguments of a build."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dexport.choices import AUTO
from dexport.cli.groups.engine import Engine
from dexport.cli.groups.graph import Graph
from dexport.cli.groups.network import Network
from dexport.cli.groups.output import Output
from dexport.cli.groups.precision import Precision
from dexport.cli.groups.quantization import Quantization
from dexport.cli.groups.weights import Weights
from dexport.cli.roles import MAIN


def build_arguments(
    weights: Weights,
    network: Network,
    graph: Graph,
    precision: Precision,
    quantization: Quantization,
    engine: Engine,
    output: Output,
) -> dict[str, Any]:
    """Fields of :class:`dexport.validate.build.build_and_validate` but for the recipe and ``output``.

    Raises:
        UsageError: settings that are not ``NAME=VALUE``.
    """
    from dexport.bundle import MAIN_GRAPH
    from dexport.exporter.variant import parse_settings

    return {
        "stitch": network.stitch,
        "checkpoint": weights.main,
        "checkpoints": {role: file for role, file in weights.checkpoints.items() if role != MAIN},
        "init_from": weights.init_from,
        "seed": weights.seed,
        "settings": parse_settings(network.settings),
        "latent": network.latent,
        "image_size": network.image_size,
        "with_decoder": network.with_decoder,
        **asdict(graph),
        "graphs": (MAIN_GRAPH, *graph.graphs) if graph.graphs and graph.guidance == "none" else graph.graphs,
        **asdict(precision),
        **quantization_arguments(quantization),
        **asdict(engine),
        "parity": output.parity,
        "accept_loss": output.accept_loss,
        "force": output.force,
        "cache": output.cache,
    }


def quantization_arguments(quantization: Quantization) -> dict[str, Any]:
    """The fields about quantisation alone."""
    return {
        **asdict(quantization.scheme),
        "ternary_carrier": quantization.ternary_carrier,
        "calibration_images": quantization.calibration_images,
        "calibration_seed": quantization.calibration_seed,
    }


def requantization_arguments(quantization: Quantization) -> dict[str, Any]:
    """The same for a bundle that is built again; the carrier that it has stays unless another one is asked for."""
    arguments = quantization_arguments(quantization)
    if quantization.ternary_carrier == AUTO:
        del arguments["ternary_carrier"]
    return arguments
