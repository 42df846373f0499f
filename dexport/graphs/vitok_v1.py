"""ViTok v1: a vision transformer as variational autoencoder for images and videos (arXiv 2501.09755).

Source: philippe-eecs/vitok ``pytorch_vitok_old/models/ae.py`` at 7ff73e6. Parameter names and constructor arguments are
theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dexport.graphs.layers import MAX_PERIOD
from dexport.graphs.rotary import rotary_frequencies, rotary_tables, rotate

IMAGE_DIMS = 4
MLP_RATIO = 2.67
LOGVAR_RANGE = (-30.0, 20.0)
ROPE_STYLES = ("1d_axial", "2d_axial", "1d_mixed", "2d_mixed")
POSEMBS = ("nope", "sincos1d", "sincos2d", "sincos3d", "learned", "dec")

Tables = tuple[Tensor, Tensor]
"""Cosines and sines of the rotation, broadcastable to (B, N, T, head_dim / 2)."""


class Attention(nn.Module):
    """Softmax attention with optional rotation: (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, tables: Tables | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if tables is not None:
            q, k = rotate(q, *tables), rotate(k, *tables)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GatedMlp(nn.Module):
    """fc3(GELU(fc1 x) * fc2 x), exact GELU."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(dim, hidden_dim)
        self.fc3 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.fc1(x)) * self.fc2(x))


class Block(nn.Module):
    """Pre-norm transformer block: (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = GatedMlp(dim, int(dim * MLP_RATIO))

    def forward(self, x: Tensor, tables: Tables | None) -> Tensor:
        x = x + self.attn(self.norm1(x), tables)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Blocks and a last norm; ``rotations`` is one pair of tables per block, or none."""

    def __init__(self, dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, rotations: Sequence[Tables | None]) -> Tensor:
        for block, tables in zip(self.blocks, rotations, strict=True):
            x = block(x, tables)
        return self.norm(x)


class Tubelets(nn.Module):
    """Holds the convolution, whose stride is its kernel, under its official name ``proj``."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Rotation(nn.Module):
    """Tables of a sequence, by the official ``rope_style``. ``grid`` is (height, width) of the tokens."""

    def __init__(self, head_dim: int, theta: float, style: str) -> None:
        super().__init__()
        self.head_dim, self.theta, self.style = head_dim, theta, style

    def forward(self, tokens: int, grid: tuple[int, int], freqs: Tensor | None, depth: int) -> list[Tables]:
        """Pairs (tokens, head_dim / 2), or (N, tokens, head_dim / 2) for learned frequencies (2, depth, ...)."""
        if self.style == "1d_axial":
            return [rotary_tables(self.head_dim, tokens, self.theta)] * depth
        places = torch.arange(grid[0] * grid[1], dtype=torch.float32)
        columns, rows = places % grid[1], places // grid[1]
        if freqs is None:
            steps = rotary_frequencies(self.head_dim // 2, self.theta)
            angles = torch.cat([torch.outer(columns, steps), torch.outer(rows, steps)], dim=1)
            return [(angles.cos(), angles.sin())] * depth
        heads = freqs.unflatten(2, (-1, 1, self.head_dim // 2))
        learned = (heads[0] * columns.unsqueeze(1) + heads[1] * rows.unsqueeze(1)).unbind(0)
        return [(angles.cos(), angles.sin()) for angles in learned]


class ViTokV1(nn.Module):
    """The official ``AE``, or one half of it.

    Video (B, channels, T, H, W) in [-1, 1] <-> codes (B, L, code_width), with L the tubelets of the grid (``simple``)
    or ``code_length`` tokens of their own. Images are videos of one frame: as a graph they are (B, channels, H, W), and
    their codes, where ``simple``, (B, code_width, h, w).

    The encoder gives mean and log variance (mean only where not ``variational``), the decoder takes a code, both
    together reconstruct from the mean.

    Args:
        lengths: code lengths of the training, for a model whose codes can be cut: the decoder then has one more input,
            token_count (B,) int64, from which on codes are replaced by the learned ``mask_token``.
        simple: one code per tubelet, instead of learned queries before the tokens.
        rope_theta: base of the rotary frequencies; 0 or None for none.
        rope_style: ``1d_axial`` over the sequence, ``2d_axial``, or learned ``2d_mixed`` over one frame's grid.
        posemb: positions that are added: ``nope``, ``sincos1d`` to ``sincos3d`` and ``learned`` (both halves), ``dec``.
        checkpoint: training only.
        block_casual, norm_layer: without effect in the official code, too.
        encoder, decoder: which halves. Not arguments of the official class, which is both.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(
        self,
        channels: int = 3,
        img_size: int = 256,
        num_frames: int = 1,
        patch_size: int = 16,
        tubelet_size: int = 1,
        width: int = 768,
        encoder_depth: int = 6,
        num_heads: int = 12,
        decoder_depth: int = 12,
        code_length: int = 256,
        code_width: int = 16,
        checkpoint: bool = False,  # noqa: ARG002 - official argument
        variational: bool = True,
        block_casual: bool = False,  # noqa: ARG002 - official argument
        lengths: Sequence[int] | None = None,
        rope_theta: float | None = MAX_PERIOD,
        rope_style: str = "1d_axial",
        simple: bool = False,
        posemb: str = "nope",
        norm_layer: str = "layer",  # noqa: ARG002 - official argument
        encoder: bool = True,
        decoder: bool = True,
    ) -> None:
        super().__init__()
        if not (encoder or decoder):
            raise ValueError("encoder and decoder are both off")
        if posemb not in POSEMBS:
            raise ValueError(f"posemb {posemb!r} is none of {', '.join(POSEMBS)}")
        if rope_style not in ROPE_STYLES:
            raise ValueError(f"rope_style {rope_style!r} is none of {', '.join(ROPE_STYLES)}")
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"width {width} must be a multiple of num_heads {num_heads}")
        if img_size < patch_size or num_frames < tubelet_size:
            raise ValueError(f"img_size {img_size} and num_frames {num_frames} hold no whole tubelet")
        side = img_size // patch_size
        self.grid_size = (num_frames // tubelet_size, side, side)
        tokens = self.grid_size[0] * side * side
        one_dimension = not rope_theta or rope_style == "1d_axial"
        if not one_dimension and (not simple or self.grid_size[0] > 1):
            raise ValueError(f"rope_style {rope_style} is for simple codes of one frame: use 1d_axial")
        if width // num_heads % (2 if one_dimension else 4):
            raise ValueError(f"rotary positions turn pairs: width {width} of {num_heads} heads has none per axis")
        if decoder and not simple and posemb == "nope":
            raise ValueError("codes that are not simple need posemb: the decoder has no other tokens to fill")
        self.is_image = num_frames == 1
        self.simple, self.variational, self.code_length = simple, variational, code_length
        self.has_encoder, self.has_decoder = encoder, decoder
        self.rope = Rotation(width // num_heads, rope_theta, rope_style) if rope_theta else None
        self.tubelet = kernel = (tubelet_size, patch_size, patch_size)
        learned = "mixed" in rope_style and bool(rope_theta)
        if encoder:
            self.tubelet_embed = Tubelets(nn.Conv3d(channels, width, kernel, stride=kernel))
            self.encoder = Transformer(width, encoder_depth, num_heads)
            self.encoder_to_code = nn.Linear(width, code_width * (2 if variational else 1))
            self.posemb = _table(1, tokens, width) if posemb not in ("nope", "dec") else None
            self.code = None if simple else _table(1, code_length, width)
            self.enc_freqs = _table(2, encoder_depth, width // 2) if learned else None
        if decoder:
            self.code_to_decoder = nn.Linear(code_width, width)
            self.decoder = Transformer(width, decoder_depth, num_heads)
            self.tubelet_decode = Tubelets(nn.ConvTranspose3d(width, channels, kernel, stride=kernel))
            self.dec_posemb = _table(1, tokens, width) if posemb != "nope" else None
            self.dec_freqs = _table(2, decoder_depth, width // 2) if learned else None
            self.mask_token = _table(1, 1, code_width) if lengths is not None else None

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """(B, channels, T, H, W) -> mean and log variance, each (B, L, code_width)."""
        x = self.tubelet_embed(video)
        grid = (x.shape[3], x.shape[4])
        x = x.flatten(2).transpose(1, 2)
        if self.posemb is not None:
            x = x + self.posemb[:, : x.shape[1]]
        if self.code is not None:
            x = torch.cat([self.code.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.encoder(x, self._rotations(x.shape[1], grid, self.enc_freqs, len(self.encoder.blocks)))
        if not self.simple:
            x = x[:, : self.code_length]
        moments = self.encoder_to_code(x)
        if not self.variational:
            return moments, torch.zeros_like(moments)
        mean, logvar = moments.chunk(2, dim=2)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(
        self, code: Tensor, grid_size: tuple[int, int, int] | None = None, token_count: Tensor | None = None
    ) -> Tensor:
        """(B, L, code_width) -> (B, channels, T, H, W); ``grid_size`` of the tubelets, where not the constructor's."""
        frames, height, width = grid_size or self.grid_size
        if self.mask_token is not None and token_count is not None:
            kept = torch.arange(code.shape[1]).reshape(1, -1, 1) < token_count.reshape(-1, 1, 1)
            code = torch.where(kept, code, self.mask_token)
        x = self.code_to_decoder(code)
        tokens = frames * height * width
        if self.dec_posemb is not None:
            positions = self.dec_posemb[:, :tokens]
            x = x + positions if self.simple else torch.cat([x, positions.expand(x.shape[0], -1, -1)], dim=1)
        x = self.decoder(x, self._rotations(x.shape[1], (height, width), self.dec_freqs, len(self.decoder.blocks)))
        x = x[:, x.shape[1] - tokens :]
        return self.tubelet_decode(x.transpose(1, 2).unflatten(2, (frames, height, width)))

    def forward(self, x: Tensor, token_count: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        if not self.has_encoder:
            grid = (1, *x.shape[2:]) if x.ndim == IMAGE_DIMS else self.grid_size
            code = x.flatten(2).transpose(1, 2) if x.ndim == IMAGE_DIMS else x
            return self._as_image(self.decode(code, grid, token_count))
        video = x.unsqueeze(2) if self.is_image else x
        frames, height, width = (size // step for size, step in zip(video.shape[2:], self.tubelet, strict=True))
        moments = self.encode(video)
        if self.has_decoder:
            return self._as_image(self.decode(moments[0], (frames, height, width), token_count))
        if self.is_image and self.simple:
            moments = tuple(moment.transpose(1, 2).unflatten(2, (height, width)) for moment in moments)
        return moments if self.variational else moments[0]

    def _as_image(self, video: Tensor) -> Tensor:
        return video.squeeze(2) if self.is_image else video

    def _rotations(
        self, tokens: int, grid: tuple[int, int], freqs: Tensor | None, depth: int
    ) -> Sequence[Tables | None]:
        return [None] * depth if self.rope is None else self.rope(tokens, grid, freqs, depth)


def _table(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))
