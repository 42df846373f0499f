"""The role ``decoder`` as :mod:`dexport.runtime.decode` calls it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dexport.contract import LATENT, PICTURE
from dexport.errors import UsageError
from dexport.runtime.programs.program import Network

MODEL = "model"


class DecoderNetwork:
    """A network that takes a latent, or codes, and gives a picture, by the names ``z`` and ``image``.

    Raises:
        UsageError: it takes or gives something else.
    """

    def __init__(self, network: Network) -> None:
        graph = network.graphs[MODEL]
        latent, picture = graph.input(LATENT), graph.output(PICTURE)
        if latent is None or picture is None:
            names = ", ".join(port.name for port in graph.inputs)
            raise UsageError(f"it takes {names}, but a decoder takes a latent and gives a picture")
        self._network, self._latent, self._picture = network, latent.name, picture.name
        self.inputs = {"z": latent}

    def __call__(self, **inputs: np.ndarray) -> Mapping[str, np.ndarray]:
        return {"image": self._network(MODEL, **{self._latent: inputs["z"]})[self._picture]}
