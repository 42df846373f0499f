"""A bundle as a generator of images: labels in, pictures out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dexport.bundle import DECODER, Bundle, load_bundle, pixel_shuffle, reading_manifest
from dexport.errors import GateError, InputError, UsageError
from dexport.printable import printable
from dexport.runtime.batches import InBatches
from dexport.runtime.decode import Decoder, DecoderSession, PixelShuffle, VaeDecoder, clipped, to_uint8
from dexport.runtime.guidance import (
    UNGUIDED,
    Session,
    check_labels,
    feed_of,
    find_rule,
    fused,
    guided,
)
from dexport.runtime.manifest_checks import check_denoiser, check_sampling, check_stitched
from dexport.runtime.noise import Noise
from dexport.runtime.samplers import Denoiser, Sampler, Step, last, make_sampler
from dexport.runtime.session import open_session
from dexport.runtime.stitch import Stitch
from dexport.runtime.time_table import TimeTable

SAME_SCHEDULE = ({"ddpm", "ddim"},)
"""Samplers that may stand in for each other."""


class NamedSession(Protocol):
    """A session that says what runs."""

    runner: str

    def __call__(self, **inputs: np.ndarray) -> Mapping[str, np.ndarray]: ...


class _Unopened:
    """In place of a session, where nothing is evaluated."""

    runner = ""

    def __call__(self, **_inputs: np.ndarray) -> Mapping[str, np.ndarray]:
        raise RuntimeError("this pipeline was made to check a request")


class Pipeline:
    """A denoiser's bundle, or a stitched one, with its sampler, guidance and decoder.

    Args:
        bundle: a bundle whose hashes have been checked.
        provider: ``cpu``, ``cuda`` or ``tensorrt``.
        decoder: a decoder's bundle, where the bundle brings none.
        sessions: what runs in place of the bundle's own models: the denoisers in their order.
        decoder_session: what runs in place of the decoder's model.
        pictures: whether latents will be decoded; without, a decoder is not needed.

    Attributes:
        facts: the manifest's ``sampling`` section.
        shape: (C, H, W) of one latent.

    Raises:
        InputError: not a denoiser's bundle.
    """

    def __init__(
        self,
        bundle: Bundle,
        provider: str = "cpu",
        decoder: Bundle | None = None,
        *,
        sessions: Sequence[NamedSession] = (),
        decoder_session: DecoderSession | None = None,
        pictures: bool = True,
    ) -> None:
        self.bundle = bundle
        self.facts: Mapping[str, Any] = bundle.manifest.get("sampling") or {}
        if not self.facts:
            raise InputError(
                f"{bundle.path} cannot be sampled: it holds no denoiser", hint="build one, such as dit-xl-2"
            )
        self._provider = provider
        with reading_manifest(bundle):
            self._parts = [part for part, _ in bundle.stitch] or [bundle]
        if bundle.stitch:
            check_stitched(bundle)
        else:
            check_denoiser(bundle)
        self.fractions = tuple(fraction for _, fraction in bundle.stitch)
        opened = list(sessions) or [open_session(part, provider) for part in self._parts]
        self._sessions = [InBatches(session) for session in opened]
        self.runner = self._sessions[0].runner
        self.shape = tuple(self._parts[0].manifest["io"]["inputs"][0]["shape"][1:])
        self.pictures = pictures
        self.decode = self._decoder(provider, decoder, decoder_session) if pictures else _undecoded

    @classmethod
    def open(
        cls,
        path: str | Path,
        provider: str = "cpu",
        decoder: str | Path | None = None,
        require_signature: str | Path | None = None,
        *,
        check: Callable[[Bundle], None] = lambda _bundle: None,
    ) -> Pipeline:
        """Check the hashes of a bundle and of a decoder's, and their signatures where one is required; open them.

        Args:
            check: refuses what is asked of the bundle, before its networks are loaded.
        """
        bundle = load_bundle(path, require_signature)
        check(bundle)
        given = load_bundle(decoder, require_signature) if decoder is not None else None
        check_decoder(bundle, given)
        return cls(bundle, provider, given)

    @classmethod
    def unopened(cls, bundle: Bundle) -> Pipeline:
        """One that loads no network and evaluates none, to check requests with."""
        with reading_manifest(bundle):
            count = max(1, len(bundle.stitch))
        return cls(bundle, sessions=[_Unopened()] * count, pictures=False)

    @property
    def classes(self) -> int | None:
        """How many classes there are; None for an unconditional network."""
        return self.facts["classes"]

    @property
    def default_scale(self) -> float:
        """The system's own guidance scale; 1 where it has none."""
        return self.facts["guidance"]["default_scale"] if self.facts["null_label"] is not None else UNGUIDED

    def largest_batch(self, cfg_scale: float | None = None) -> int | None:
        """How many images are best made together; None where nothing limits it.

        An engine has a range of batches, and guidance on the host doubles the batch. Other numbers work as well: they
        are split or filled up (:class:`~dexport.runtime.batches.InBatches`).
        """
        if self._provider != "tensorrt":
            return None
        scale = self.default_scale if cfg_scale is None else cfg_scale
        limits = []
        for part in self._parts:
            doubled = scale != UNGUIDED and part.manifest["guidance"] == "none"
            limits.append(part.manifest["batch"]["max"] // (2 if doubled else 1))
        return max(1, min(limits))

    def sampler(self, name: str | None = None, steps: int | None = None) -> Sampler:
        """The system's own sampler, or one that fits its schedule; see :func:`sampler_of`."""
        return sampler_of(self.bundle, name, steps)

    def denoiser(
        self,
        labels: Sequence[int],
        cfg_scale: float | None = None,
        fractions: Sequence[float] | None = None,
        sampler: Sampler | None = None,
    ) -> Denoiser:
        """The guided, stitched denoiser of one batch.

        Args:
            labels: one class per image; empty for an unconditional network.
            fractions: shares of the trajectory, instead of the bundle's own.
            sampler: what will run it: the shares are of its trajectory. None for the system's own.

        Raises:
            UsageError: labels that the model does not have, guidance without a null class, fractions for one denoiser.
        """
        denoisers = self.denoisers(labels, cfg_scale)
        shares = fractions or self.fractions
        return Stitch(denoisers, shares, (sampler or self.sampler()).remaining) if shares else denoisers[0]

    def denoisers(self, labels: Sequence[int], cfg_scale: float | None = None) -> list[Denoiser]:
        """Every guided denoiser of one batch, in the order in which they are stitched."""
        if self.classes is not None:
            check_labels(labels, self.classes)
        elif len(labels):
            raise UsageError(
                f"{self.bundle.manifest['name']} is unconditional and has no classes", hint="give no labels"
            )
        scale = self.default_scale if cfg_scale is None else cfg_scale
        return [self._guided(*pair, labels, scale) for pair in zip(self._parts, self._sessions, strict=True)]

    def sample(
        self,
        labels: Sequence[int],
        noise: Noise,
        *,
        sampler: Sampler | None = None,
        cfg_scale: float | None = None,
        fractions: Sequence[float] | None = None,
    ) -> np.ndarray:
        """Latents (B, C, H, W) float32 of one batch, in the denoiser's scale; one image per stream of ``noise``.

        Raises:
            GateError: values that are not finite, which would be shown as black pictures.
        """
        steps = self.steps(labels, noise, sampler=sampler, cfg_scale=cfg_scale, fractions=fractions)
        latents = last(steps)
        self._check_finite(latents)
        return latents.astype(np.float32)

    def steps(
        self,
        labels: Sequence[int],
        noise: Noise,
        *,
        sampler: Sampler | None = None,
        cfg_scale: float | None = None,
        fractions: Sequence[float] | None = None,
    ) -> Iterator[Step]:
        """What :meth:`sample` does, a step at a time; nothing is checked to be finite."""
        sampler = sampler or self.sampler()
        denoiser = self.denoiser(labels, cfg_scale, fractions, sampler)
        return sampler.run(denoiser, sampler.start(noise, (len(noise.images), *self.shape)), noise)

    def images(self, latents: np.ndarray) -> np.ndarray:
        """Pictures (B, H, W, C) uint8 of latents: all pictures that anything makes come from here.

        Raises:
            GateError: latents, or values of the decoder, that are not finite.
            InputError: the decoder makes something else than pictures, or another number of them.
        """
        self._check_finite(latents)
        images = to_uint8(self.decode(latents))
        if len(images) != len(latents):
            raise InputError(
                f"the decoder made {len(images)} pictures of {len(latents)} latents", hint="build the decoder again"
            )
        return images

    def _check_finite(self, latents: np.ndarray) -> None:
        # In float32, as the decoder takes them: float64 holds what is infinite there.
        if not np.isfinite(latents.astype(np.float32)).all():
            raise GateError(
                f"{self.bundle.manifest['name']} made values that are not finite",
                hint="if its precision overflows, build it with --bf16, --fp32, or more --island",
            )

    def _guided(self, part: Bundle, session: Session, labels: Sequence[int], scale: float) -> Denoiser:
        feed = feed_of([spec["name"] for spec in part.manifest["io"]["inputs"]])
        if part.manifest["guidance"] != "none":
            return fused(session, labels, scale, feed)
        facts = part.manifest["sampling"]
        if facts["guidance"] is None:
            return guided(session, labels, scale, None, feed=feed)
        return guided(session, labels, scale, facts["null_label"], find_rule(facts["guidance"]["rule"]), feed)

    def _decoder(self, provider: str, given: Bundle | None, session: DecoderSession | None) -> Decoder:
        kind = self.facts["decoder"]
        if kind == "none":
            return clipped
        with reading_manifest(self.bundle):
            shuffle = pixel_shuffle(kind)
        if shuffle is not None:
            return PixelShuffle(*shuffle)
        inside = decoders_in(self.bundle)
        if session is None and given is None and lacks_decoder(self.bundle):
            raise UsageError(
                f"{self.bundle.path} makes latents and has no decoder",
                hint=f"build it with --with-decoder, or build {kind} and give that bundle with --decoder",
            )
        return VaeDecoder(session or open_session(given or inside[0], provider), self.facts["latent_scale"])


def sampler_of(bundle: Bundle, name: str | None = None, steps: int | None = None) -> Sampler:
    """The sampler that a denoiser's or stitched bundle is sampled with.

    Args:
        name: of one that fits its schedule, None for the system's own.
        steps: None for the system's own.

    Raises:
        UsageError: a sampler of another schedule, steps that it cannot take, or times that the bundle does not take.
        InputError: an incomplete manifest.
    """
    check_sampling(bundle)
    with reading_manifest(bundle):
        facts = bundle.manifest["sampling"]
        own, usual = facts["sampler"], facts["steps"]
        manifests = [part.manifest for part, _ in bundle.stitch] or [bundle.manifest]
        tables = {m["name"]: table for m in manifests if (table := TimeTable.of(m["sampling"])) is not None}
    name = name or own
    if name != own and not any({name, own} <= group for group in SAME_SCHEDULE):
        raise UsageError(
            f"{bundle.manifest['name']} was trained for {own!r}, whose schedule {name!r} does not share",
            hint="leave out --sampler",
        )
    steps = usual if steps is None else steps
    sampler = make_sampler(name, steps)
    for part, table in tables.items():
        table.check(sampler, steps, part)
    return sampler


def decoders_in(bundle: Bundle) -> list[Bundle]:
    """The decoders that a bundle, or the denoisers stitched in it, bring."""
    return [one.parts[DECODER] for one in (bundle, *(part for part, _ in bundle.stitch)) if DECODER in one.parts]


def lacks_decoder(bundle: Bundle) -> bool:
    """Whether a denoiser's bundle makes latents that nothing in it can decode."""
    kind = bundle.manifest["sampling"]["decoder"]
    return kind != "none" and pixel_shuffle(kind) is None and not decoders_in(bundle)


def check_decoder(bundle: Bundle, given: Bundle | None) -> None:
    """Refuse a denoiser without a decoder, and a bundle that is given as one and is none, before networks are loaded.

    Raises:
        UsageError: so it is.
        InputError: not a denoiser's bundle, or an incomplete manifest.
    """
    if not bundle.manifest.get("sampling"):
        return  # refused when it is opened
    with reading_manifest(bundle):
        kind, is_lacking = bundle.manifest["sampling"]["decoder"], lacks_decoder(bundle)
    if is_lacking and given is None:
        raise UsageError(
            f"{bundle.path} makes latents and has no decoder",
            hint=f"build it with --with-decoder, or build {printable(kind)} and give that bundle with --decoder",
        )
    if given is None:
        return
    with reading_manifest(given):
        names = [str(spec["name"]) for spec in given.manifest["io"]["inputs"]]
        outputs = [str(spec["name"]) for spec in given.manifest["io"]["outputs"]]
    if names != ["z"] or "image" not in outputs:
        raise UsageError(
            f"{given.path} takes {printable(', '.join(names))}, but a decoder takes z and gives image",
            hint="build sd-vae-decoder and give that bundle with --decoder",
        )


def _undecoded(latents: np.ndarray) -> np.ndarray:
    raise RuntimeError(f"latents {latents.shape}: this pipeline was made without a decoder")
