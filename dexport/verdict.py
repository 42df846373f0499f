"""What is said of a bundle once it was judged, and what it lost.

Four states. ``passed``: within its gates, and what is lost is fit to ship. ``lossy``: within its gates, which a scheme,
a budget or an option chose, but more is lost than that. ``failed``: a gate failed. ``not verified``: nothing was
compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

PASSED, NOT_VERIFIED, LOSSY, FAILED = "passed", "not verified", "lossy", "failed"
STATUSES = (PASSED, NOT_VERIFIED, LOSSY, FAILED)
"""From best to worst: a loss that is known must not hide behind one that is not."""


def relative_l2_of(snr_db: float) -> float:
    """A signal-to-noise ratio in dB as a relative L2 error: 25 -> 5.6e-2."""
    return 10 ** (-snr_db / 20)


SHIPPABLE_SNR_DB = 25.0
"""Signal-to-noise ratio, of a prediction and of final latents, from which on a network is fit to ship.

Everything that was measured above it (half precision, INT8 weights, W8A8: 26.5 dB and more) moves FID by 2.5 at most,
where real images are 74 from each other; everything that was measured below 15 dB moves it by 35 and more. In between,
pictures have not been measured, so nothing is promised. See docs/precision.md.
"""
SHIPPABLE_L2 = relative_l2_of(SHIPPABLE_SNR_DB)
"""The same as a relative L2 error."""
ACCEPT = "--accept-loss"
LARGEST = 1e300
"""Of a figure in a document; a larger integer is none that could be computed with."""


@dataclass(frozen=True)
class Loss:
    """What was lost against PyTorch in float32, as far as it was measured; None is not measured.

    Attributes:
        relative_l2: of one evaluation, the worst; infinite where values are not finite.
        latents_snr_db: of the final latents of a trajectory, in dB.
        psnr_db: of the picture that is least alike, in dB.
    """

    relative_l2: float | None = None
    latents_snr_db: float | None = None
    psnr_db: float | None = None

    @property
    def snr_db(self) -> float | None:
        """``relative_l2`` as a signal-to-noise ratio in dB."""
        if self.relative_l2 is None:
            return None
        return -20 * math.log10(self.relative_l2) if self.relative_l2 else math.inf

    @property
    def fit_to_ship(self) -> bool:
        """Whether nothing that was measured is worse than ``SHIPPABLE_SNR_DB``."""
        evaluation = self.relative_l2 is None or self.relative_l2 <= SHIPPABLE_L2
        return evaluation and (self.latents_snr_db is None or self.latents_snr_db >= SHIPPABLE_SNR_DB)

    def worst(self, others: Iterable[Loss]) -> Loss:
        """The worst of every figure, such as over the parts of a bundle."""
        all_of = (self, *others)
        return Loss(
            max((loss.relative_l2 for loss in all_of if loss.relative_l2 is not None), default=None),
            min((loss.latents_snr_db for loss in all_of if loss.latents_snr_db is not None), default=None),
            min((loss.psnr_db for loss in all_of if loss.psnr_db is not None), default=None),
        )

    def to_json(self) -> dict[str, float | None]:
        """JSON values; a figure that is not finite becomes null."""
        figures = {**asdict(self), "snr_db": self.snr_db}
        return {name: value if value is not None and math.isfinite(value) else None for name, value in figures.items()}

    @classmethod
    def of_json(cls, document: Any) -> Loss:
        """What :meth:`to_json` gave; of anything else nothing is known."""
        found = document if isinstance(document, Mapping) else {}
        loss = cls(**{field.name: _number(found.get(field.name)) for field in fields(cls)})
        return replace(loss, relative_l2=None) if (loss.relative_l2 or 0) < 0 else loss

    def __str__(self) -> str:
        """Half a sentence; empty where nothing was measured."""
        return "; ".join(self._phrases())

    def _phrases(self) -> Iterator[str]:
        if self.relative_l2 is not None:
            if not math.isfinite(self.relative_l2):
                yield "predictions are not finite"
            elif self.relative_l2 == 0:
                yield "predictions are equal"
            else:
                yield (
                    f"predictions move by {100 * self.relative_l2:.2g} % "
                    f"(relative L2 {self.relative_l2:.1e}, SNR {self.snr_db:.1f} dB)"
                )
        if self.latents_snr_db is not None and math.isfinite(self.latents_snr_db):
            yield f"final latents have an SNR of {self.latents_snr_db:.1f} dB"
        if self.psnr_db is not None and math.isfinite(self.psnr_db):
            yield f"pictures have a PSNR of {self.psnr_db:.1f} dB at worst"


def status_of(within_gates: bool, loss: Loss) -> str:
    """The status of what was compared."""
    if not within_gates:
        return FAILED
    return PASSED if loss.fit_to_ship else LOSSY


def worst_status(statuses: Iterable[str]) -> str:
    """The status of a whole: that of its worst part. One that is not known is as bad as a failure."""
    return max(statuses, key=lambda status: STATUSES.index(status) if status in STATUSES else len(STATUSES))


def lossy_text(loss: Loss) -> str:
    """What a lossy bundle lost, and where the line is."""
    return f"{loss}; fit to ship are {SHIPPABLE_SNR_DB:g} dB (relative L2 {SHIPPABLE_L2:.1e})"


def caveats(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What who runs a bundle has to know, a sentence each; nothing of one that passed with trained weights."""
    weights = manifest.get("weights")
    if isinstance(weights, Mapping) and weights.get("random"):
        yield "the weights are RANDOM: this is not a trained model"
    status = manifest.get("status")
    if status == FAILED:
        yield "a gate FAILED when it was built: what it computes is not what PyTorch computes"
    elif status == LOSSY:
        yield f"it is lossy: {lossy_text(Loss.of_json(manifest.get('loss')))}"
    elif status == NOT_VERIFIED:
        yield "it was not verified: nothing was compared with PyTorch (--no-parity)"
    elif status != PASSED:
        yield "its manifest has no status that is known: nothing is known of its quality"
    record = manifest.get("validation")
    verdict = record.get("verdict") if isinstance(record, Mapping) else PASSED
    if verdict == LOSSY and status != LOSSY:
        assert isinstance(record, Mapping)
        yield f"`dexport validate` found it lossy: {lossy_text(Loss.of_json(record.get('loss')))}"
    elif verdict in (FAILED, "inconclusive"):
        yield f"`dexport validate` found it {verdict}"


def _number(value: Any) -> float | None:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and abs(value) < LARGEST else None
