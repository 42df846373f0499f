"""Fewer bits, and the calibration that they need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dexport.choices import AUTO, CARRIERS
from dexport.cli.headings import expert_option, option
from dexport.cli.option_group import OptionGroup
from dexport.cli.parameters import CALIBRATION_IMAGES, SEED, choice
from dexport.cli.quantize_spec import Scheme, parse_specs


@dataclass(frozen=True)
class Quantization:
    """Fewer bits, and the sampling that they are calibrated on."""

    scheme: Scheme
    ternary_carrier: str
    calibration_images: int
    calibration_seed: int


def _quantization(specs: tuple[str, ...], **values: Any) -> Quantization:
    return Quantization(parse_specs(specs), **values)


QUANTIZATION = OptionGroup(
    "quantization",
    "Quantization",
    _quantization,
    (
        option(
            "--quantize",
            "specs",
            multiple=True,
            metavar="SPEC",
            help="int8: weights only. w8a8: activations too. ternary: rounds the weights, which loses a lot. map=FILE: "
            "a scheme for each layer, from JSON or a bundle's manifest.json. budget=snr>=25,size<=0.3: schemes are "
            "chosen for an SNR (dB, after 20 steps), a share of the float file (or size<=2.5MB), or both. none: layers "
            "that are ternary by construction are stored dense. Repeatable.",
        ),
        expert_option(
            "--calibration-images",
            type=CALIBRATION_IMAGES,
            default=32,
            show_default=True,
            help="Sampled to calibrate on.",
        ),
        expert_option("--calibration-seed", type=SEED, default=0, show_default=True, help="Seed of their noise."),
        expert_option(
            "--ternary-carrier",
            type=choice(AUTO, *CARRIERS),
            default=AUTO,
            show_default=True,
            help="How ternary layers are stored: packed is the smallest, int4 is for TensorRT, nbits for ONNX Runtime "
            "only. auto: int4 for an engine, else the fastest exact one measured in ONNX Runtime, or packed where it "
            "rounds.",
        ),
    ),
)
