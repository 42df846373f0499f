"""PyTorch's side of a benchmark: the network as it is, its arithmetic, and what this CPU could do at most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dexport.bundle import Network, reading_manifest
from dexport.errors import DexportError, MachineError
from dexport.exporter.origin import variant_of, weights_of
from dexport.exporter.pytorch.state import fresh_torch
from dexport.exporter.recipes import find_recipe
from dexport.exporter.torch_session import TorchSession
from dexport.exporter.variant import Variant
from dexport.exporter.weights.loading import load_into, open_weights
from dexport.exporter.weights.source import WeightSource

PRODUCT_SIDE = 2048
PRODUCT_FLOPS = 2 * PRODUCT_SIDE**3


@dataclass(frozen=True)
class Eager:
    """A network and weights to time it with; ``note`` says where these are not the model's."""

    variant: Variant
    weights: WeightSource
    note: str = ""

    @classmethod
    @fresh_torch()
    def of_network(
        cls, network: Network, graph: str = "", recipe: str | None = None, checkpoint: str | None = None
    ) -> Eager:
        """What a bundle was built from, with random weights where its checkpoint is gone."""
        with reading_manifest(network.bundle):
            variant = variant_of(network, find_recipe(recipe) if recipe else None, graph)
            try:
                return cls(variant, weights_of(network.manifest["weights"], variant, checkpoint))
            except DexportError as error:
                if checkpoint is not None:
                    raise
                return cls.of_variant(variant, None, str(error))

    @classmethod
    @fresh_torch()
    def of_variant(cls, variant: Variant, checkpoint: str | None, why: str = "no --checkpoint was given") -> Eager:
        """With the weights of a checkpoint, or random ones where there is none, and why there is none."""
        weights = open_weights(checkpoint, variant.outline, adapt=variant.recipe.adapt)
        return cls(variant, weights, "" if checkpoint else f"PyTorch has random weights: {why}")

    @fresh_torch()
    def session(self, device: str) -> TorchSession:
        """The network in float32 on ``cpu`` or ``cuda``.

        Raises:
            MachineError: this PyTorch has no such device.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise MachineError(
                f"PyTorch {torch.__version__} sees no GPU", hint="install one for the CUDA of this machine's driver"
            )
        network = load_into(self.weights, self.variant.meta_module())
        return TorchSession(self.variant.wrap(network), self.variant.signature, device)

    @fresh_torch()
    def flops(self, batch: int) -> int:
        """Of the matrix products and convolutions, a multiplication and an addition being two; of custom ops none."""
        specs = self.variant.signature.inputs
        products = sdpa_kernel(SDPBackend.MATH)  # attention is counted where it consists of products
        with products, FakeTensorMode(), FlopCounterMode(display=False) as counter, torch.inference_mode():
            inputs = [torch.zeros(spec.dims(batch), dtype=getattr(torch, spec.dtype)) for spec in specs]
            self.variant.wrap(self.variant.module())(*inputs)
        return counter.get_total_flops()


@fresh_torch()
def matrix_product() -> Callable[[], object]:
    """A float32 product of ``PRODUCT_FLOPS`` operations: the fastest of several is the rate that a CPU can reach."""
    a, b = torch.randn(PRODUCT_SIDE, PRODUCT_SIDE), torch.randn(PRODUCT_SIDE, PRODUCT_SIDE)
    return lambda: a @ b
