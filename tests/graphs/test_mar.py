"""MAR and its inner diffusion against the official code, and the light pass against a full one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from dexport.errors import UsageError
from dexport.graphs.mar import MAR, DiffLoss, Full, group_of
from dexport.runtime.programs.masked_diffusion import Inner, plain_plan, recap_plan
from dexport.runtime.schedule import timesteps_of
from tests.golden import assert_golden, load_golden, load_keys

EAGER = 2e-5
SMALL: dict[str, Any] = {
    "img_size": 24,
    "vae_stride": 4,
    "vae_embed_dim": 3,
    "encoder_embed_dim": 8,
    "encoder_depth": 2,
    "encoder_num_heads": 2,
    "decoder_embed_dim": 12,
    "decoder_depth": 1,
    "decoder_num_heads": 3,
    "class_num": 4,
    "buffer_size": 3,
    "diffloss_d": 1,
    "diffloss_w": 8,
}
"""36 tokens; the encoder and the decoder differ in everything."""


def small(**changes: Any) -> MAR:
    torch.manual_seed(0)
    model = MAR(**{**SMALL, **changes}).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model


@pytest.mark.golden
def test_the_transformer_is_the_official_one() -> None:
    golden = load_golden("mar-transformer")
    model = MAR(**golden.config).eval()
    missing, unexpected = model.load_state_dict(golden.weights, strict=False)
    assert not unexpected and all(name.startswith("diffloss.") for name in missing)
    labels = golden.inputs["labels"].clone()
    labels[-1] = golden.config["class_num"]  # officially the fake latent
    mask = golden.inputs["mask"]
    with torch.no_grad():
        assert_golden(model(golden.inputs["tokens"], mask, labels), golden.outputs["z"], EAGER)
        hidden = model.with_buffer(mask > 0.5)
        encoded, _ = model.encode(golden.inputs["tokens"], labels, model.encoder_pos_embed_learned, ~hidden)
    known = encoded[~hidden].reshape(len(mask), -1, encoded.shape[2])
    assert_golden(known, golden.outputs["encoder_out"], EAGER)


@pytest.mark.golden
def test_the_inner_diffusion_is_the_official_one() -> None:
    golden = load_golden("mar-diffloss")
    config, inputs = golden.config, golden.inputs
    model = DiffLoss(**config).eval()
    model.load_state_dict(golden.weights)
    inner = Inner.of(config["num_sampling_steps"], float(golden.metadata["temperature"]))
    assert inner.times[::-1].tolist() == inputs["timestep_map"].tolist()
    scale, rows = torch.tensor(float(golden.metadata["cfg_scale"])), len(inputs["x"])
    half = rows // 2

    def step(index: int, x: torch.Tensor, c: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The step whose index counts from the clean end."""
        place = inner.steps - 1 - index
        t = torch.full((len(x), 1), float(inner.times[place]))
        weights = torch.from_numpy(inner.weights[None, place : place + 1]).expand(len(x), -1, -1)
        return model(x, t, c, scale.expand(len(x)), inputs["noise"][: len(x), None], weights)

    with torch.no_grad():
        t, c = inputs["t"].float(), inputs["c"]
        assert_golden(model.net(inputs["x"], t, c), golden.outputs["net_out"], EAGER)
        guided = model.guided(inputs["x"][:half], model.net.time_embed(t) + model.net.cond_embed(c), scale)
        assert_golden(torch.cat(guided, dim=1), golden.outputs["net_out_cfg"][:half], EAGER)
        index = int(inputs["step_index"])
        alone = step(index, inputs["x"], torch.stack([c, c], dim=1), torch.tensor(1.0))
        assert_golden(alone, golden.outputs["p_sample"], EAGER)
        last = step(0, inputs["x"][:half], torch.stack([c[:half], c[half:]], dim=1), scale)
        assert_golden(last, golden.outputs["p_sample_step0_cfg"][:half], EAGER)


def test_state_dict_has_exactly_the_official_keys_and_shapes() -> None:
    parts = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in BASE.items()}
    with torch.device("meta"):
        state = MAR(**parts, diffloss_d=6, diffloss_w=1024).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == load_keys("MAR-B")


BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}


def test_several_steps_are_one_after_the_other() -> None:
    model = small().diffloss
    rng = np.random.default_rng(0)
    inner = Inner.of("7", 1.0)
    x, c, noise = (
        torch.from_numpy(rng.standard_normal(shape, np.float32)) for shape in ((2, 3), (2, 2, 12), (2, 8, 3))
    )
    scale = torch.full((2,), 2.0)

    def run(size: int) -> torch.Tensor:
        state = x
        for part, times, weights in inner.in_parts(size):
            t, w = (torch.from_numpy(array)[None].expand(2, *array.shape) for array in (times, weights))
            state = model(state, t, c, scale, noise[:, part], w)
        return state

    with torch.no_grad():
        one = run(1)
        assert_golden(run(4), one, 1e-6)  # what fills up the last part changes nothing


def test_samples_of_a_batch_do_not_meet_and_hidden_tokens_are_not_read() -> None:
    model, length = small(), 36
    tokens, mask = torch.randn(2, length, 3), (torch.rand(2, length) < 0.5).float()
    labels = torch.tensor([1, 4])
    with torch.no_grad():
        z = model(tokens, mask, labels)
        assert_golden(model(tokens[1:], mask[1:], labels[1:]), z[1:], 1e-6)
        assert torch.equal(model(torch.where(mask.unsqueeze(2) > 0, 9.0, tokens), mask, labels), z)


def test_a_light_pass_over_fresh_memories_is_the_full_pass() -> None:
    """Also where the group is smaller than what the graph takes, and where some of its tokens are known."""
    model = small(light_tokens=9)
    tokens, labels = torch.randn(2, 36, 3), torch.tensor([1, 4])
    positions = torch.tensor([[2, 3, 11, 12, 30, 36, 36, 36, 36], [0, 5, 6, 7, 35, 36, 36, 36, 36]])
    mask = (torch.rand(2, 36) < 0.6).float()
    mask.scatter_(1, positions[:, :5], torch.tensor([[0.0, 0, 1, 1, 1]]).expand(2, -1))
    with torch.no_grad():
        z, *memories = Full(model)(tokens, mask, labels)
        assert [tuple(memory.shape) for memory in memories] == [(2, 2, 2, 2, 36, 4), (2, 1, 2, 3, 36, 4)]
        light = model.light(tokens, mask, labels, positions, *memories)
    wanted = z.gather(1, positions[:, :5].unsqueeze(2).expand(-1, -1, 12))
    assert light.shape == (2, 9, 12)
    assert_golden(light[:, :5], wanted, 1e-6)


@pytest.mark.golden
def test_both_schedules_are_the_official_ones() -> None:
    golden = load_golden("mar-sample-loop")
    turns = [turn for group in plain_plan(16, int(golden.metadata["num_iter"])) for turn in group]
    assert [turn.masked for turn in turns] == golden.outputs["mask_len_per_step"].tolist()
    assert sum(turn.count for turn in turns) == 16
    golden = load_golden("recap-mar-loop")
    kinds, turns = [], []
    steps, before, light = (golden.metadata[name] for name in ("num_iter", "pre_full_iters", "num_cache_iters"))
    for group in recap_plan(36, int(steps), f"{before}:{light}"):
        turns += group
        kinds += ["full", *["light"] * (len(group) - 1)]
    assert str(kinds).replace("'", '"') == golden.metadata["call_kinds"]
    assert [turn.count for turn in turns] == golden.outputs["tokens_per_call"].tolist()


@pytest.mark.parametrize(("length", "steps"), [(256, 256), (256, 64), (36, 36), (9, 1), (9, 7)])
@pytest.mark.parametrize(("pre_full", "num_cache"), [(0, 0), (0, 1), (3, 2), (300, 1)])
def test_schedules_decode_every_token_once(length: int, steps: int, pre_full: int, num_cache: int) -> None:
    plans = [plain_plan(length, steps), recap_plan(length, steps, f"{pre_full}:{num_cache}")]
    for plan in plans:
        turns = [turn for group in plan for turn in group]
        assert len(turns) == steps
        assert min(turn.count for turn in turns) >= 0
        assert sum(turn.count for turn in turns) == length
    assert max(map(len, plans[1])) == (1 if pre_full >= steps else min(steps, 1 + num_cache))


@pytest.mark.parametrize(
    ("respacing", "steps"),
    [
        ("4", [0, 333, 666, 999]),
        ("ddim4", [0, 250, 500, 750]),
        ("2,1", [0, 499, 500]),
        ("ddim1000", list(range(1000))),
    ],
)
def test_respacings_as_improved_diffusion_writes_them(respacing: str, steps: list[int]) -> None:
    assert timesteps_of(1000, respacing).tolist() == steps


@pytest.mark.parametrize("respacing", ["", "ten", "1", "1001", "ddim999", "ddim1", "ddim0", "0,5", "-5", "501,1", "5,"])
def test_other_respacings_are_refused(respacing: str) -> None:
    with pytest.raises(UsageError, match=r"step|respacing"):
        timesteps_of(1000, respacing)


def test_the_first_step_needs_no_large_numbers() -> None:
    """The predicted start has a factor of 2e4 there, and a small one in the mean: here they are one."""
    assert np.abs(Inner.of("100", 1.0).weights).max() < 320
    assert math.isclose(float(Inner.of("100", 0.5).weights[0, 4]), 0.5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"img_size": 23}, "img_size"),
        ({"patch_size": 4}, "patch_size"),
        ({"encoder_num_heads": 3}, "encoder_num_heads"),
        ({"decoder_num_heads": 5}, "decoder_num_heads"),
        ({"buffer_size": 0}, "buffer_size"),
        ({"decoder_depth": 0}, "decoder_depth"),
        ({"inner_steps": 0}, "inner_steps"),
        ({"light_tokens": 37}, "light_tokens"),
    ],
)
def test_impossible_configurations_name_the_argument(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        MAR(**{**SMALL, **changes})


def test_a_group_has_room_for_the_usual_schedules() -> None:
    assert [group_of(length, 0) for length in (16, 36, 64, 100, 256, 1024)] == [16, 36, 64, 32, 32, 128]
