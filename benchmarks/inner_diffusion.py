"""MAR's inner diffusion, folded or not: ``python3 -m benchmarks.inner_diffusion``.

The graph ``diffloss`` takes ``inner_steps`` steps of the inner diffusion in one evaluation, with coefficients that the
program computed before: 1 is one evaluation of the MLP, 100 the whole loop of a token. Each is built from the same
random weights and runs the same loop over the same noise, in turns and with ONNX Runtime on the CPU. Printed are the
milliseconds of a whole loop, the ratio to one step per evaluation, the seconds to open a session, and the size of the
graph without its weights.

On 2 busy cores, MAR-B, 100 steps: 10 per evaluation are 1.04 (8 tokens) to 1.60 times (1 token) as fast as one; all 100
are 0.92 to 1.45 times as fast, and take 51 s to open instead of 3 s. So 10 are the recipes' choice, and the number of
steps stays a setting of the program.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from dexport.runtime.calls import SessionNetwork
from dexport.runtime.programs.masked_diffusion import DIFFLOSS, Inner, denoised

SIZES = (1, 10, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="mar-b")
    parser.add_argument("--inner-steps", type=int, nargs="+", default=SIZES)
    parser.add_argument("--respacing", default="100")
    parser.add_argument("--tokens", type=int, nargs="+", default=(1, 8, 64), help="decoded together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        networks = {}
        for size in arguments.inner_steps:
            networks[size], opened, nbytes = build(arguments.recipe, arguments.set, size, Path(folder) / str(size))
            print(f"{size:4} per evaluation: opened in {opened:.1f} s, graph of {nbytes / 1e6:.2f} MB", flush=True)
        for tokens in arguments.tokens:
            report(networks, Inner.of(arguments.respacing, 1.0), tokens, arguments.rounds)


def build(recipe: str, pairs: list[str], size: int, path: Path) -> tuple[SessionNetwork, float, int]:
    """The graph with so many steps, the seconds to open it, and the bytes of its file."""
    import dexport
    from dexport.bundle import graph_file, load_bundle
    from dexport.exporter.variant import parse_settings
    from dexport.runtime.session import open_session

    settings = {**parse_settings(tuple(pairs)), "inner_steps": size}
    dexport.build(recipe, path, settings=settings, graphs=("model", DIFFLOSS), parity=False, cache=False)
    held = load_bundle(path).network
    network = SessionNetwork(held.graphs, lambda graph: open_session(held, graph=graph))
    started = time.perf_counter()
    network.open(DIFFLOSS)
    return network, time.perf_counter() - started, (path / graph_file(DIFFLOSS)).stat().st_size


def report(networks: dict[int, SessionNetwork], inner: Inner, tokens: int, rounds: int) -> None:
    """Run every network in turns, and print what each took."""
    rng = np.random.default_rng(0)
    ports = {port.name: port for port in next(iter(networks.values())).graphs[DIFFLOSS].inputs}
    noise = rng.standard_normal((tokens, inner.steps, int(ports["x"].shape[1])), dtype=np.float32)
    condition = rng.standard_normal((tokens, 2, int(ports["c"].shape[2])), dtype=np.float32)
    seconds: dict[int, list[float]] = {size: [] for size in networks}
    for turn in range(rounds + 1):
        for size, network in networks.items():
            started = time.perf_counter()
            denoised(network, inner, noise, condition, 3.0)
            if turn:  # the first is to warm up
                seconds[size].append(time.perf_counter() - started)
    found = {size: statistics.median(times) for size, times in seconds.items()}
    first = next(iter(found.values()))
    print(f"{tokens} tokens, {inner.steps} steps:")
    for size, value in found.items():
        print(f"  {size:4} per evaluation: {value * 1e3:9.1f} ms, {first / value:.2f} times as fast", flush=True)


if __name__ == "__main__":
    main()
