"""DiMR: a cascade of branches, each at its own resolution (NeurIPS 2024).

Source: qihao067/DiMR ``libs/core/blocks.py`` at fa141ae. Parameter names and configuration fields are theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dexport.graphs.axial_rope import AxialRoPE, QKNorm
from dexport.graphs.time_dependent import TimeDependentLayerNorm, make_norm

TRANSFORMER = "TransformerBlock"
CONVNEXT = "ConvNeXtBlock"
AXIAL_ROPE = "Axial_RoPE"
POSITIONS = ("APE", AXIAL_ROPE)


@dataclass(frozen=True)
class StageConfig:
    """One branch, in the fields of the official ``stage_configs``.

    Attributes:
        block_type: ``TransformerBlock`` (needs ``num_attention_heads``) or ``ConvNeXtBlock`` (needs ``kernel_size``).
        num_blocks: an even number builds one more.
        max_height, max_width: grid of the position table.
        image_input_ratio: how much the image is averaged down first.
        input_feature_ratio: patch size.
        dropout_prob: training only.
        num_classes, condition_dim, norm_type, pe_type: as of the whole model, which overrides them.
    """

    block_type: str
    dim: int
    hidden_dim: int
    num_blocks: int
    max_height: int
    max_width: int
    image_input_ratio: int
    input_feature_ratio: int
    final_kernel_size: int
    num_attention_heads: int = 0
    kernel_size: int = 0
    dropout_prob: float = 0.0
    num_classes: int | None = None
    condition_dim: int | None = None
    norm_type: str = "LN"
    pe_type: str = "APE"

    def __post_init__(self) -> None:
        if self.block_type not in (TRANSFORMER, CONVNEXT):
            raise ValueError(f"block_type {self.block_type!r} is none of {TRANSFORMER}, {CONVNEXT}")
        if self.block_type == CONVNEXT and (self.kernel_size < 1 or self.kernel_size % 2 == 0):
            raise ValueError(f"a {CONVNEXT} stage needs an odd kernel_size, not {self.kernel_size}")
        if self.is_transformer and (self.num_attention_heads < 1 or self.dim % self.num_attention_heads):
            raise ValueError(f"dim {self.dim} must be a multiple of num_attention_heads {self.num_attention_heads}")
        if self.pe_type not in POSITIONS:
            raise ValueError(f"pe_type {self.pe_type!r} is none of {', '.join(POSITIONS)}")
        if self.has_axial_rope and self.num_classes is not None:
            raise ValueError(f"pe_type {AXIAL_ROPE} has no place for the class token: leave out num_classes")

    @property
    def is_transformer(self) -> bool:
        return self.block_type == TRANSFORMER

    @property
    def has_axial_rope(self) -> bool:
        return self.is_transformer and self.pe_type == AXIAL_ROPE

    @property
    def has_class_token(self) -> bool:
        return self.is_transformer and self.num_classes is not None

    @property
    def blocks_built(self) -> int:
        return self.num_blocks // 2 * 2 + 1

    @property
    def skip_dim(self) -> int:
        """Channels that the next branch receives: the stage's input and the output of every block."""
        return self.dim * (self.blocks_built + 1)

    @property
    def pixels_per_token(self) -> int:
        return self.image_input_ratio * self.input_feature_ratio


def stage_configs_of(config: Mapping[str, Any]) -> list[StageConfig]:
    """The branches of a model's configuration, with what the model sets for all of them."""
    shared = {"norm_type": config.get("norm_type", "LN"), "pe_type": config.get("pe_type", "APE")}
    shared |= {name: config[name] for name in ("num_classes", "condition_dim") if config.get(name) is not None}
    return [StageConfig(**{**stage, **shared}) for stage in config["stage_configs"]]


class MLPBlock(nn.Module):
    """Norm and gated MLP: w2(GELU(w0 x) * w1 x), exact GELU. x (B, ..., D), log_snr (B,) -> (B, ..., D)."""

    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        self.norm = make_norm(config.norm_type, config.dim)
        self.w0 = nn.Linear(config.dim, config.hidden_dim)
        self.w1 = nn.Linear(config.dim, config.hidden_dim)
        self.w2 = nn.Linear(config.hidden_dim, config.dim)

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        x = self.norm(x, log_snr)
        return self.w2(F.gelu(self.w0(x)) * self.w1(x))


class SelfAttention(nn.Module):
    """Norm and softmax attention: x (B, T, D), log_snr (B,) -> (B, T, D). The class token comes first in T.

    ``condition_key_value`` is in the state dict of models with a ``condition_dim`` and is never read officially.
    """

    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.norm = make_norm(config.norm_type, config.dim)
        self.query_key_value = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.dense = nn.Linear(config.dim, config.dim)
        if config.condition_dim is not None:
            self.condition_key_value = nn.Linear(config.condition_dim, 2 * config.dim, bias=False)
        self.has_axial_rope = config.has_axial_rope
        if config.has_axial_rope:
            self.pos_emb = AxialRoPE(config.dim // self.num_heads, self.num_heads)
            self.qk_norm = QKNorm(self.num_heads)

    def forward(self, x: Tensor, log_snr: Tensor, grid: tuple[int, int]) -> Tensor:
        packed = self.query_key_value(self.norm(x, log_snr)).unflatten(2, (3, self.num_heads, -1))
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        if self.has_axial_rope:
            q, k = (self.pos_emb(self.qk_norm(heads), *grid) for heads in (q, k))
        return self.dense(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """x (B, T, D), log_snr (B,) -> (B, T, D)."""

    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        self.block1 = SelfAttention(config)
        self.block2 = MLPBlock(config)

    def forward(self, x: Tensor, log_snr: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.block1(x, log_snr, grid)
        return x + self.block2(x, log_snr)


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution without norm, then the MLP: x (B, H, W, D), log_snr (B,) -> (B, H, W, D)."""

    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        size = config.kernel_size
        depthwise = nn.Conv2d(config.dim, config.dim, size, padding=size // 2, groups=config.dim)
        self.block1 = nn.ModuleDict({"1": depthwise})
        self.block2 = MLPBlock(config)

    def forward(self, x: Tensor, log_snr: Tensor, _grid: tuple[int, int]) -> Tensor:
        x = x + channels_last(self.block1["1"](channels_first(x)))
        return x + self.block2(x, log_snr)


class PixelShuffleUpsample(nn.Module):
    """Linear, then channels (row, column, C) become pixels: (B, H, W, in) -> (B, H*r, W*r, out)."""

    def __init__(self, dim_in: int, dim_out: int, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.kernel = nn.Linear(dim_in, dim_out * ratio * ratio)

    def forward(self, x: Tensor) -> Tensor:
        cells = self.kernel(x).unflatten(3, (self.ratio, self.ratio, -1))
        return cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class PositionEmbeddings(nn.Module):
    """Learned positions of a grid up to (max_height, max_width): x (B, H, W, D) -> (B, H, W, D)."""

    def __init__(self, max_height: int, max_width: int, dim: int) -> None:
        super().__init__()
        self.grid = (max_height, max_width)
        self.position_embeddings = nn.Embedding(max_height * max_width, dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        return x + self.position_embeddings.weight.unflatten(0, self.grid)[:height, :width]


class Stage(nn.Module):
    """One branch: x (B, channels, H, W) -> output (B, channels, h, w) and skips (B, h, w, skip_dim).

    Args:
        lower: the branch before, whose skips are scaled up and added to the input; None for the first.
    """

    def __init__(self, channels: int, config: StageConfig, lower: StageConfig | None) -> None:
        super().__init__()
        self.config = config
        dim, patch, final = config.dim, config.input_feature_ratio, config.final_kernel_size
        # In numbered slots, as official state dicts name them; slots without parameters are code in ``forward``.
        self.input_layer = nn.ModuleDict({"1": nn.Conv2d(channels, dim, patch, stride=patch)})
        if config.has_axial_rope:
            # Part of official state dicts, never read: each attention has its own.
            self.pos_emb = AxialRoPE(dim, config.num_attention_heads)
        else:
            self.input_layer["3"] = PositionEmbeddings(config.max_height, config.max_width, dim)
        if config.has_class_token:
            self.class_embeds = nn.Embedding(int(config.num_classes or 0), dim)
        if lower is not None:
            ratio = config.max_height // lower.max_height
            self.upsample = nn.Sequential(
                TimeDependentLayerNorm(lower.skip_dim),
                PixelShuffleUpsample(lower.skip_dim, dim, ratio),
                TimeDependentLayerNorm(dim),
            )
        block = TransformerBlock if config.is_transformer else ConvNeXtBlock
        self.blocks = nn.ModuleList(block(config) for _ in range(config.blocks_built))
        self.skip_denses = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(config.num_blocks // 2))
        convolution = nn.Conv2d(dim, channels, final, padding=final // 2)
        self.output_layer = nn.ModuleDict({"0": TimeDependentLayerNorm(dim), "2": convolution})

    def forward(
        self, images: Tensor, log_snr: Tensor, y: Tensor | None, lower_skips: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        if config.image_input_ratio > 1:
            images = F.avg_pool2d(images, config.image_input_ratio)
        x = channels_last(self.input_layer["1"](images))
        if not config.has_axial_rope:
            x = self.input_layer["3"](x)
        if lower_skips is not None:
            norm_in, expand, norm_out = self.upsample
            x = x + norm_out(expand(norm_in(lower_skips, log_snr)), log_snr)
        height, width = x.shape[1:3]
        if config.is_transformer:
            x = x.flatten(1, 2)
        if config.has_class_token:
            x = torch.cat([self.class_embeds(y).unsqueeze(1), x], dim=1)
        states = self.u_shape(x, log_snr, (height, width))
        if config.has_class_token:
            states = [state[:, 1:] for state in states]
        if config.is_transformer:
            states = [state.unflatten(1, (height, width)) for state in states]
        last = self.output_layer["0"](states[-1], log_snr)
        return self.output_layer["2"](channels_first(last)), torch.cat(states, dim=-1)

    def u_shape(self, x: Tensor, log_snr: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """The input and the output of every block; blocks of the second half see one of the first half beside it."""
        half = len(self.blocks) // 2
        states = [x]
        for block in self.blocks[: half + 1]:
            states.append(block(states[-1], log_snr, grid))
        skips = states[1 : half + 1]
        for dense, block in zip(self.skip_denses, self.blocks[half + 1 :], strict=True):
            x = dense(torch.cat([states[-1], skips.pop()], dim=-1))
            states.append(block(x, log_snr, grid))
        return states


class DiMR(nn.Module):
    """The official ``MRModel``, for class labels or unconditional; it predicts epsilon.

    Input: x (B, channels, H, W); log_snr (B,) float32, t/1000 * 8 - 4 of the timestep t; y (B,) int64 where a branch
    has a class token, the last class being the null label. Output: (B, channels, H, W) of the last branch; the official
    class returns those of all, as :class:`AllBranches`. H and W are those of the position tables, or smaller.

    Args:
        stage_configs: the branches, lowest resolution first; see :class:`StageConfig`.
        num_classes: rows of the class tables, null label included; None for an unconditional model.
        norm_type: ``LN`` (time-dependent), ``RMSN``, ``TDRMSN`` or ``ADARMSN``, of the blocks.
        pe_type: ``APE``, learned positions, or ``Axial_RoPE`` with normalised queries and keys, which excludes classes.
        condition_dim: width of a text condition, whose weights are kept and never read.
        block_grad_to_lowres: training only.
        cfg_scale_pow: no part of the network but of its guidance; the evaluation script's option of this name. Above 0
            the guidance grows with that power of time, -1 for a constant one.

    Raises:
        ValueError: no branch, or a configuration that contradicts itself.
    """

    def __init__(
        self,
        channels: int,
        stage_configs: Sequence[Mapping[str, Any]],
        num_classes: int | None = None,
        block_grad_to_lowres: bool = False,  # noqa: ARG002 - official argument
        norm_type: str = "LN",
        pe_type: str = "APE",
        condition_dim: int | None = None,
        cfg_scale_pow: float = -1.0,
    ) -> None:
        super().__init__()
        if not stage_configs:
            raise ValueError("stage_configs is empty")
        if cfg_scale_pow <= 0 and cfg_scale_pow != -1:
            raise ValueError(f"cfg_scale_pow {cfg_scale_pow} is neither above 0 nor -1")
        config = {
            "num_classes": num_classes,
            "norm_type": norm_type,
            "pe_type": pe_type,
            "condition_dim": condition_dim,
        }
        stages = stage_configs_of({**config, "stage_configs": stage_configs})
        lower = [None, *stages[:-1]]
        self.stages = nn.ModuleList(Stage(channels, *pair) for pair in zip(stages, lower, strict=True))

    def forward(self, x: Tensor, log_snr: Tensor, y: Tensor | None = None) -> Tensor:
        return self.branches(x, log_snr, y)[-1]

    def branches(self, x: Tensor, log_snr: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        """What every branch predicts, lowest resolution first."""
        predictions, skips = [], None
        for stage in self.stages:
            prediction, skips = stage(x, log_snr, y, skips)
            predictions.append(prediction)
        return tuple(predictions)


class AllBranches(nn.Module):
    """What every branch of a DiMR predicts, lowest resolution first: a tuple of (B, channels, h, w)."""

    def __init__(self, network: DiMR) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, log_snr: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        return self.network.branches(x, log_snr, y)


def channels_first(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W)."""
    return x.permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C)."""
    return x.permute(0, 2, 3, 1)
