"""Whole trajectories through an exported bundle: ONNX Runtime ends where the official PyTorch loop ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

import dexport
from dexport.runtime.draws import Draws, Replay
from dexport.runtime.guidance import fused, guided
from dexport.runtime.samplers import DDIM, DDPM, Sampler, last, make_sampler, sample
from dexport.runtime.stitch import Stitch
from dexport.validate.metrics import compare
from tests.golden import load_golden
from tests.runtime.sampler_golden import golden_session, sampler_golden, schedule

LARGEST_RELATIVE_L2 = 1e-3
CFG = 1.5
NULL = 10


@pytest.fixture(scope="module", params=["none", "fused"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampler")
    golden = load_golden("sampler-20")
    save_file(golden.weights, folder / "dit.safetensors")
    path = folder / request.param
    dexport.build(
        "dit-s-2",
        path,
        settings=golden.config["dit"],
        latent=(8, 8),
        checkpoint=str(folder / "dit.safetensors"),
        guidance=request.param,
    )
    return path


@pytest.mark.golden
@pytest.mark.parametrize(
    ("sampler", "name"), [(DDPM(schedule()), "p_sample_loop"), (DDIM(schedule()), "ddim_sample_loop")]
)
def test_onnx_runtime_ends_where_the_official_loop_ends(bundle: Path, sampler: Sampler, name: str) -> None:
    inputs, outputs = sampler_golden()
    session, y = dexport.load(bundle), inputs["loop_y"][:2]
    denoiser = fused(session, y, CFG) if bundle.name == "fused" else guided(session, y, CFG, NULL)
    x = last(sampler.run(denoiser, inputs["loop_z"][:2], Replay(inputs["loop_noise"][:, :2])))
    assert compare(outputs[name][:2], x).relative_l2 < LARGEST_RELATIVE_L2


def test_a_stitched_trajectory_is_the_one_of_the_part_that_runs(bundle: Path) -> None:
    """Both denoisers are the same network here, in PyTorch and exported: any split gives the official end."""
    inputs, outputs = sampler_golden()
    session, y = dexport.load(bundle), inputs["loop_y"][:2]
    exported = fused(session, y, CFG) if bundle.name == "fused" else guided(session, y, CFG, NULL)
    stitched = Stitch([guided(golden_session(), y, CFG, NULL), exported], [0.4, 0.6])
    x = last(DDIM(schedule()).run(stitched, inputs["loop_z"][:2], Replay([])))
    assert compare(outputs["ddim_sample_loop"][:2], x).relative_l2 < LARGEST_RELATIVE_L2


def test_sampling_runs_where_torch_and_onnx_are_absent(bundle: Path) -> None:
    if bundle.name == "fused":
        pytest.skip("one bundle is enough")
    script = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnx_ir', 'onnxscript'): sys.modules[name] = None\n"
        "from dexport.runtime.guidance import guided\n"
        "from dexport.runtime.draws import Draws\n"
        "from dexport.runtime.samplers import make_sampler, sample\n"
        "from dexport.runtime.session import open_bundle\n"
        "from dexport.runtime.stitch import Stitch\n"
        "denoiser = guided(open_bundle(sys.argv[1]), [1, 2], 1.5, 10)\n"
        "x = sample(make_sampler('ddim', 4), denoiser, Draws(0, images=[0, 1]), (2, 4, 8, 8))\n"
        "sys.stdout.write(str(x.shape))\n"
    )
    result = subprocess.run([sys.executable, "-c", script, bundle], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "(2, 4, 8, 8)"


def test_images_of_a_seed_do_not_depend_on_the_batch_beyond_rounding(bundle: Path) -> None:
    session = dexport.load(bundle)

    def images(numbers: list[int]) -> np.ndarray:
        y = [number % NULL for number in numbers]
        denoiser = fused(session, y, CFG) if bundle.name == "fused" else guided(session, y, CFG, NULL)
        return sample(make_sampler("ddpm", 10), denoiser, Draws(0, images=numbers), (len(numbers), 4, 8, 8))

    together, alone = images([0, 1, 2]), images([2])
    assert compare(together[2:], alone).relative_l2 < 1e-4
