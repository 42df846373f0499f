"""Classifier-free guidance around a session, and the pass-through for a graph that has it fused.

What ``dexport.graphs.guidance`` fuses into a graph is done here on the host, in numpy, for a plain graph: the batch is
doubled to [conditional half, null half] and the two predictions are combined by the system's own rule. Both give a
denoiser ``(x, t) -> out`` that the samplers take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dexport.contract import LABEL, STATE, TIME, Clock, Graph, GuidanceRule
from dexport.errors import UsageError
from dexport.limits import LARGEST_SCALE, shown
from dexport.runtime.samplers.step import Denoiser

Session = Callable[..., Mapping[str, np.ndarray]]
"""``session(x=..., t=..., y=...) -> {"out": array}``."""
Feed = Callable[[np.ndarray, np.ndarray, np.ndarray], dict[str, np.ndarray]]
"""From x (B, C, H, W), t (B,) float32 and y (B,) int64 to the inputs of the graph, by name."""

UNGUIDED = 1.0
SHOWN = 10
"""Wrong labels that a message names."""


@dataclass(frozen=True)
class Rule:
    """How the conditional and the null prediction are combined: null + s(t) * (cond - null).

    Attributes:
        channels: how many output channels are guided, the rest keeps the conditional prediction; None guides all.
        power: p of s(t) = (cfg_scale - 1) * (1 - cos(pi * (1 - t/1000)^p)) / 2 + 1; None for s(t) = cfg_scale.
        steps: length of the schedule that t counts.
    """

    channels: int | None = None
    power: float | None = None
    steps: float = 1000.0

    @classmethod
    def of(cls, guidance: GuidanceRule, clock: Clock | None) -> Rule:
        """The rule of a program's facts, in the unit of its sampler's time."""
        return cls(guidance.channels, guidance.power, 1000.0 if clock is None else clock.noisy)

    def scale(self, t: np.ndarray, cfg_scale: float) -> np.ndarray:
        """Strength (B, 1, 1, 1) float32 for original timesteps t (B,)."""
        if self.power is None:
            strength = np.full_like(t, cfg_scale)
        else:
            progress = (1 - t / self.steps) ** self.power
            strength = (cfg_scale - 1) * (1 - np.cos(np.pi * progress)) / 2 + 1
        return strength.astype(np.float32).reshape(-1, 1, 1, 1)

    def combine(self, cond: np.ndarray, null: np.ndarray, t: np.ndarray, cfg_scale: float) -> np.ndarray:
        """The guided prediction (B, C, H, W) of two predictions of that shape."""
        guided = cond.copy()
        channels = slice(self.channels)
        guided[:, channels] = null[:, channels] + self.scale(t, cfg_scale) * (cond[:, channels] - null[:, channels])
        return guided


FIRST_THREE = Rule(channels=3)
"""DiT, DiCo, LiT, TerDiT, and DiffiT above 256 px. Source: ``forward_with_cfg`` of facebookresearch/DiT at ed81ce2."""
RULES: Mapping[str, GuidanceRule] = {
    "all channels": GuidanceRule(),
    "first three channels": GuidanceRule(channels=3),
    "first four channels": GuidanceRule(channels=4),
}
"""By the names that recipes may use: plain classifier-free guidance, that of DiT's relatives, and that of our small
models on pixel-unshuffled images, where every channel of the prediction is a part of the image."""


def find_rule(rule: str | GuidanceRule) -> GuidanceRule:
    """The rule of a recipe.

    Raises:
        UsageError: a name that is not known.
    """
    if isinstance(rule, GuidanceRule):
        return rule
    if rule not in RULES:
        raise UsageError(f"no guidance rule {shown(rule)}", hint=f"choose from: {'; '.join(RULES)}")
    return RULES[rule]


def describe_rule(rule: GuidanceRule) -> str:
    """The rule in words, for people."""
    which = "all channels" if rule.channels is None else f"the first {rule.channels} channels"
    return which if rule.power is None else f"{which}, power-cosine over time with power {rule.power:g}"


def feed_class_conditional(x: np.ndarray, t: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """x, t, y: the DiT lineage."""
    return {"x": x, "t": t, "y": y}


def feed_of(graph: Graph, clock: Clock | None = None) -> Feed:
    """What a graph is fed, by the roles of its inputs. Labels do not go to one that takes none.

    Args:
        clock: the unit of the sampler's time; a graph with another one gets its own.
    """
    state, time, label = (graph.input(role) for role in (STATE, TIME, LABEL))
    if state is None or time is None:
        raise UsageError(
            f"inputs {', '.join(port.name for port in graph.inputs)}: samplers feed a state and a time",
            hint="declare the role of each input",
        )

    def feed(x: np.ndarray, t: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
        fed = {state.name: x, time.name: in_unit(t, clock, time.clock)}
        return fed if label is None else {**fed, label.name: y}

    return feed


def in_unit(t: np.ndarray, of: Clock | None, to: Clock | None) -> np.ndarray:
    """Times (B,) float32 of one unit in another; both are linear between their ends."""
    if of is None or to is None or of == to:
        return t
    progress = t if of.clean == 0 else t - np.float32(of.clean)
    return progress / np.float32(of.noisy - of.clean) * np.float32(to.noisy - to.clean) + np.float32(to.clean)


def unguided(session: Session, y: Sequence[int] | np.ndarray = (), feed: Feed = feed_class_conditional) -> Denoiser:
    """The plain prediction for labels y (B,); no labels where the network takes none."""
    labels = _labels(y)

    def denoise(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        return session(**feed(x.astype(np.float32, copy=False), t, labels))["out"]

    return denoise


def guided(
    session: Session,
    y: Sequence[int] | np.ndarray,
    cfg_scale: float,
    null_label: int | None,
    rule: Rule = FIRST_THREE,
    feed: Feed = feed_class_conditional,
) -> Denoiser:
    """GuidanceRule on the host around a plain graph; ``cfg_scale`` 1 means none and does not double the batch.

    Args:
        y: labels (B,).
        null_label: the label of the unconditional prediction; None when the model was trained without one.

    Raises:
        UsageError: guidance without a null label, a scale below 1, or labels that the model does not have.
    """
    _check_scale(cfg_scale)
    if null_label is not None:
        check_labels(y, classes=null_label)
    if cfg_scale == UNGUIDED:
        return unguided(session, y, feed)
    if null_label is None:
        raise UsageError(
            f"guidance with scale {cfg_scale:g} needs a null class, and this model has none",
            hint="sample with --cfg 1, or use a model that was trained with label dropout",
        )
    labels = _labels(y)
    both_labels = np.concatenate([labels, np.full_like(labels, null_label)])

    def denoise(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        x = x.astype(np.float32, copy=False)
        out = session(**feed(np.concatenate([x, x]), np.concatenate([t, t]), both_labels))["out"]
        cond, null = out[: len(x)], out[len(x) :]
        return rule.combine(cond, null, t, cfg_scale)

    return denoise


def fused(
    session: Session,
    y: Sequence[int] | np.ndarray,
    cfg_scale: float,
    feed: Feed = feed_class_conditional,
    name: str = "cfg_scale",
) -> Denoiser:
    """A graph with ``--guidance fused``: the rule is inside, the scale is one more input, of this name."""
    _check_scale(cfg_scale)
    labels, scale = _labels(y), np.array(cfg_scale, dtype=np.float32)

    def denoise(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        return session(**feed(x.astype(np.float32, copy=False), t, labels), **{name: scale})["out"]

    return denoise


def check_labels(y: Sequence[int] | np.ndarray, classes: int) -> None:
    """Refuse labels outside 0..classes-1, and such as are no whole numbers."""
    wrong = [label for label in y if not (0 <= label < classes and label == int(label))]
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise UsageError(
            f"no class {', '.join(map(str, wrong[:SHOWN]))}{more}: the model has {classes}",
            hint=f"choose from 0 to {classes - 1}",
        )


def _check_scale(cfg_scale: float) -> None:
    if not UNGUIDED <= cfg_scale <= LARGEST_SCALE:
        raise UsageError(
            f"guidance scale {cfg_scale:g}", hint=f"choose 1 (no guidance) or more, up to {LARGEST_SCALE:g}"
        )


def _labels(y: Sequence[int] | np.ndarray) -> np.ndarray:
    """Labels (B,) int64. A negative one would count from the end of the label table: refused."""
    labels = np.asarray(y, dtype=np.int64).reshape(-1)
    if (labels < 0).any():
        raise UsageError(f"no class {labels.min()}", hint="classes count from 0")
    return labels
