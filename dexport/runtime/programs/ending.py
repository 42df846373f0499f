"""How the last states of a program become its results: latents, and pictures where they can be decoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from dexport.contract import LATENT, PICTURE, Decoding, Graph
from dexport.errors import GateError, InputError, UsageError
from dexport.runtime.decode import PICTURE_CHANNELS, Decoder, PixelShuffle, VaeDecoder, clipped, to_uint8
from dexport.runtime.programs.ports import input_of, output_of
from dexport.runtime.programs.program import LATENTS, PICTURES, Calls, Graphs, Network, Step

MODEL = "model"
GRID = 4
"""Dimensions of a latent: (B, C, H, W)."""


class DecoderSession:
    """A network of the role ``decoder`` as decoders call it."""

    def __init__(self, network: Network) -> None:
        self._network, graph = network, network.graphs[MODEL]
        self._latent, self._picture = input_of(graph, LATENT), output_of(graph, PICTURE)
        self.inputs = {"z": self._latent}

    def __call__(self, **inputs: np.ndarray) -> Mapping[str, np.ndarray]:
        return {"image": self._network(MODEL, **{self._latent.name: inputs["z"]})[self._picture.name]}


def decoder_of(calls: Calls, decoding: Decoding) -> Decoder | None:
    """What decodes states; None where that is a network, and nothing plays the role ``decoder``."""
    match decoding.kind:
        case "none":
            return clipped
        case "pixel-shuffle":
            return PixelShuffle(decoding.factor, decoding.tiles)
    networks = calls.get("decoder")
    return VaeDecoder(DecoderSession(networks[0]), decoding.scale, black=decoding.black) if networks else None


def player_of(decoding: Decoding) -> dict[str, str]:
    """The recipe of the network that usually plays the role ``decoder``, if one does."""
    return {"decoder": decoding.recipe} if decoding.kind == "network" and decoding.recipe else {}


def results_of(decoding: Decoding, networks: Graphs, state: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """The shapes of the results for one image, from its state (C, H, W)."""
    channels, height, width = state
    made: dict[str, tuple[int, ...]] = {LATENTS: state}
    factor = decoding.factor if decoding.kind == "pixel-shuffle" else 1
    if decoding.kind != "network":
        made[PICTURES] = (height * factor, width * factor, channels // factor**2)
    elif networks.get("decoder"):
        graph = networks["decoder"][0][MODEL]
        latent, picture = input_of(graph, LATENT), output_of(graph, PICTURE)
        factor = int(picture.shape[2]) // int(latent.shape[2])
        made[PICTURES] = (height * factor, width * factor, int(picture.shape[1]))
    return made


def check_decoding(decoding: Decoding, networks: Graphs, state: tuple[int, int, int]) -> None:
    """Refuse states (C, H, W) that become no pictures.

    Raises:
        UsageError: so they are.
    """
    if decoding.kind != "network":
        _check_pictures(decoding, *state)
    for graphs in networks.get("decoder", ()):
        _check_decoder(graphs[MODEL], state[0])


def _check_pictures(decoding: Decoding, channels: int, height: int, width: int) -> None:
    factor, tiles = decoding.factor, decoding.tiles
    pixels, rest = divmod(channels, factor**2)
    if rest or pixels not in PICTURE_CHANNELS:
        possible = " or ".join(str(n * factor**2) for n in PICTURE_CHANNELS)
        raise UsageError(
            f"{channels} channels become no grey or RGB picture by a pixel shuffle of {factor}",
            hint=f"--set the channels to {possible}, or describe another decoder in a recipe file",
        )
    if height * factor % tiles or width * factor % tiles:
        raise UsageError(
            f"a picture of {height * factor}x{width * factor} is no sheet of {tiles}x{tiles} equal tiles",
            hint=f"give a --latent of which {factor} times a side is a multiple of {tiles}",
        )


def _check_decoder(graph: Graph, channels: int) -> None:
    if graph.input(LATENT) is None or graph.output(PICTURE) is None:
        names = ", ".join(port.name for port in graph.inputs)
        raise UsageError(
            f"it takes {names}, but a decoder takes a latent and gives a picture",
            hint="build sd-vae-decoder and give that bundle with --decoder",
        )
    latent, picture = input_of(graph, LATENT), output_of(graph, PICTURE)
    if len(latent.shape) != GRID or len(picture.shape) != GRID or latent.shape[1] != channels:
        raise UsageError(
            f"the decoder takes latents {list(latent.shape)} and gives {list(picture.shape)}, and states have "
            f"{channels} channels",
            hint=f"take a decoder for latents of {channels} channels",
        )


def ending(last: Step, decode: Decoder | None) -> Iterator[Step]:
    """The last step with its results; values that are not finite would be shown as black pictures."""
    latents = last.state.astype(np.float32)  # as decoders take them: float64 holds what is infinite there
    if not np.isfinite(latents).all():
        yield last
        raise GateError(
            "it made values that are not finite",
            hint="if its precision overflows, build it with --bf16, --fp32, or more --island",
        )
    if decode is None:
        yield Step(last.index, last.time, last.state, {LATENTS: latents})
        return
    try:
        pictures = to_uint8(decode(latents))
    except GateError:
        yield Step(last.index, last.time, last.state, {LATENTS: latents})
        raise
    if len(pictures) != len(latents):
        raise InputError(
            f"the decoder made {len(pictures)} pictures of {len(latents)} latents", hint="build the decoder again"
        )
    yield Step(last.index, last.time, last.state, {LATENTS: latents, PICTURES: pictures})
