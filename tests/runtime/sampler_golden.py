"""The golden of DiT's diffusion code at 20 steps, as numpy arrays, with its network in torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch

from dexport.graphs.dit import DiT
from dexport.runtime.samplers import Denoiser
from dexport.runtime.schedule import Schedule, linear_betas
from tests.golden import load_golden

STEPS = 20


@functools.cache
def sampler_golden() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Inputs and outputs by name."""
    golden = load_golden("sampler-20")
    return tuple({key: value.numpy() for key, value in group.items()} for group in (golden.inputs, golden.outputs))


def schedule() -> Schedule:
    return Schedule.of_betas(linear_betas()).respaced(STEPS)


@functools.cache
def golden_session() -> Callable[..., dict[str, np.ndarray]]:
    """The golden's DiT with the call signature of a session."""
    golden = load_golden("sampler-20")
    model = DiT(**golden.config["dit"]).eval()
    model.load_state_dict(golden.weights)
    return as_session(model)


def as_session(model: torch.nn.Module) -> Callable[..., dict[str, np.ndarray]]:
    def run(**inputs: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            return {"out": model(*(torch.from_numpy(np.asarray(value)) for value in inputs.values())).numpy()}

    return run


def both_halves(y: np.ndarray, cfg_scale: float) -> Denoiser:
    """The official ``forward_with_cfg``: both halves of the batch are states, the null half's input is overwritten."""
    session = golden_session()

    def denoise(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        half = len(x) // 2
        out = session(x=np.concatenate([x[:half], x[:half]]), t=t, y=y)["out"]
        cond, null = out[:half, :3], out[half:, :3]
        out[:, :3] = np.concatenate([null + np.float32(cfg_scale) * (cond - null)] * 2)
        return out

    return denoise


def torch_states(deterministic: bool) -> Iterator[np.ndarray]:
    """The start and the state after every step of the golden's loop, in torch and in the official order of operations.

    Its end is the golden bit for bit on the machine that this was written on, so the states in between are official.
    """
    inputs, _ = sampler_golden()
    tables = schedule()
    denoiser = both_halves(inputs["loop_y"], float(inputs["cfg_scale"]))
    x = torch.from_numpy(inputs["loop_z"])
    yield x.numpy()
    for index, t in enumerate(reversed(range(STEPS))):
        original = np.full(len(x), tables.timestep_map[t], dtype=np.float32)
        eps, values = torch.from_numpy(denoiser(x.numpy(), original)).chunk(2, dim=1)
        scale, scale_m1 = _scalar(1 / tables.alphas_cumprod[t], 0.5), _scalar(1 / tables.alphas_cumprod[t] - 1, 0.5)
        x_start = scale * x - scale_m1 * eps
        if deterministic:
            again = (scale * x - x_start) / scale_m1
            after = _scalar(tables.alphas_cumprod_prev[t])
            x = x_start * torch.sqrt(after) + torch.sqrt(1 - after) * again
        else:
            fraction = (values + 1) / 2
            low, high = _scalar(tables.posterior_log_variance_clipped[t]), _scalar(np.log(tables.betas[t]))
            std = torch.exp(0.5 * (fraction * high + (1 - fraction) * low))
            mean = _scalar(tables.posterior_mean_coef1[t]) * x_start + _scalar(tables.posterior_mean_coef2[t]) * x
            x = mean + (t != 0) * std * torch.from_numpy(inputs["loop_noise"][index])
        yield x.numpy()


def _scalar(value: float, power: float = 1.0) -> torch.Tensor:
    return torch.tensor(np.power(value, power)).float()
