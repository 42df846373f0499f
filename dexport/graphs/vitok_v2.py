"""ViTok v2: a vision transformer as autoencoder for images of any shape (NaFlex).

Source: Na-VAE/vitok-release ``vitok/models/ae.py`` at a90f23b. Parameter names and constructor arguments are theirs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dexport.graphs.rotary import rotary_frequencies, rotate

NORM_EPS = 1e-6
BACKENDS = ("flash", "sdpa")
HIDDEN_MULTIPLE = 16


class RMSNorm(nn.RMSNorm):
    """Over the last dimension, with a weight."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=NORM_EPS)


class Attention(nn.Module):
    """Softmax attention with normalised, rotated queries and keys: (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_q = RMSNorm(dim // num_heads)
        self.norm_k = RMSNorm(dim // num_heads)
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv_proj(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rotate(self.norm_q(q), cos, sin), rotate(self.norm_k(k), cos, sin)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """fc2(silu(g) * v), where fc1 gives [v, g]; the hidden width is rounded to a multiple of 16."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        hidden_dim = (hidden_dim + HIDDEN_MULTIPLE // 2) // HIDDEN_MULTIPLE * HIDDEN_MULTIPLE
        self.fc1 = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        v, g = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(g) * v)


class LayerScale(nn.Module):
    """A factor per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Attention and MLP side by side on the same normalised tokens: (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, num_heads: int, mlp_factor: float, use_layer_scale: bool) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.ffn = SwiGLU(dim, int(dim * mlp_factor))
        self.layer_scale = LayerScale(dim) if use_layer_scale else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        h = self.norm1(x)
        return x + self.layer_scale(self.attn(h, cos, sin, mask) + self.ffn(h))


class GridAngles(nn.Module):
    """Cosines and sines of tokens at (row, column): two (B, T) -> two (B, 1, T, head_dim / 2), the row's half first."""

    frequencies: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", rotary_frequencies(head_dim // 2), persistent=False)

    def forward(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        per_axis = [position.float().unsqueeze(-1) * self.frequencies for position in (rows, columns)]
        angles = torch.cat(per_axis, dim=-1).unsqueeze(1)
        return angles.cos(), angles.sin()


class ViTokV2(nn.Module):
    """The official ``AE``, or one half of it. The code is a layer norm of the encoder's output: no distribution.

    As images: image (B, 3, H, W) in [-1, 1] -> z (B, channels_per_token, h, w) -> image, tokens in raster order.
    As tokens (``naflex``): patches (B, T, pixels_per_token), each (channel, row, column); row_idx, col_idx (B, T)
    int64; patch_mask (B, T), not 0 for what is no padding -> z (B, T, channels_per_token) -> patches. With the decoder
    alone, z takes the place of image or patches. Values at padded places are meaningless.

    Args:
        sw: tokens further apart than this in the sequence do not see each other; ``flash`` only.
        attn_backend: ``sdpa`` heeds patch_mask, ``flash`` does not; its bfloat16 is not reproduced.
        checkpoint, layer_scale_init, drop_path_rate: training only.
        temporal_stride: images have one frame.
        naflex: tokens instead of images. Not an argument of the official class, which takes tokens only.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(
        self,
        pixels_per_token: int = 768,
        channels_per_token: int = 32,
        encoder_width: int = 1024,
        decoder_width: int = 1024,
        encoder_depth: int = 4,
        decoder_depth: int = 24,
        encoder_heads: int = 12,
        decoder_heads: int = 12,
        mlp_factor: float = 2.67,
        checkpoint: int = 0,  # noqa: ARG002 - official argument
        spatial_stride: int = 16,
        temporal_stride: int = 1,
        use_layer_scale: bool = True,
        layer_scale_init: float = 1e-4,  # noqa: ARG002 - official argument
        drop_path_rate: float = 0.0,  # noqa: ARG002 - official argument
        encoder: bool = True,
        decoder: bool = True,
        sw: int | None = None,
        attn_backend: str = "flash",
        naflex: bool = False,
    ) -> None:
        super().__init__()
        if not (encoder or decoder):
            raise ValueError("encoder and decoder are both off")
        if attn_backend not in BACKENDS:
            raise ValueError(f"attn_backend {attn_backend!r} is none of {', '.join(BACKENDS)}")
        cell = spatial_stride * spatial_stride * temporal_stride
        if not naflex and (temporal_stride != 1 or pixels_per_token % cell):
            raise ValueError(
                f"pixels_per_token {pixels_per_token} are no images of spatial_stride {spatial_stride} and one frame"
            )
        self.spatial_stride = spatial_stride
        self.window = sw if attn_backend == "flash" and sw is not None and sw > 0 else None
        self.masks_padding = attn_backend == "sdpa"
        self.has_encoder, self.has_decoder = encoder, decoder
        if encoder:
            _check_heads("encoder", encoder_width, encoder_heads)
            self.patch_embed = nn.Linear(pixels_per_token, encoder_width)
            self.to_code = nn.Linear(encoder_width, channels_per_token)
            self.output_fn = nn.LayerNorm(channels_per_token, eps=NORM_EPS, elementwise_affine=False)
            self.encoder_blocks = nn.ModuleList(
                Block(encoder_width, encoder_heads, mlp_factor, use_layer_scale) for _ in range(encoder_depth)
            )
            self.encoder_rope = GridAngles(encoder_width // encoder_heads)
        if decoder:
            _check_heads("decoder", decoder_width, decoder_heads)
            self.decoder_embed = nn.Linear(channels_per_token, decoder_width)
            self.to_pixels = nn.Linear(decoder_width, pixels_per_token)
            self.decoder_blocks = nn.ModuleList(
                Block(decoder_width, decoder_heads, mlp_factor, use_layer_scale) for _ in range(decoder_depth)
            )
            self.decoder_rope = GridAngles(decoder_width // decoder_heads)

    def encode(self, patches: Tensor, rows: Tensor, columns: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """(B, T, pixels_per_token) -> (B, T, channels_per_token)."""
        x = self.patch_embed(patches)
        cos, sin = self.encoder_rope(rows, columns)
        mask = self.attention_mask(patches.shape[1], patch_mask)
        for block in self.encoder_blocks:
            x = block(x, cos, sin, mask)
        return self.output_fn(self.to_code(x))

    def decode(self, z: Tensor, rows: Tensor, columns: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """(B, T, channels_per_token) -> (B, T, pixels_per_token)."""
        x = self.decoder_embed(z)
        cos, sin = self.decoder_rope(rows, columns)
        mask = self.attention_mask(z.shape[1], patch_mask)
        for block in self.decoder_blocks:
            x = block(x, cos, sin, mask)
        return self.to_pixels(x)

    def forward(
        self, x: Tensor, row_idx: Tensor | None = None, col_idx: Tensor | None = None, patch_mask: Tensor | None = None
    ) -> Tensor:
        """Tokens come with their places, images without."""
        if row_idx is not None and col_idx is not None:
            return self._through(x, row_idx, col_idx, patch_mask)
        if self.has_encoder:
            x = F.pixel_unshuffle(x, self.spatial_stride)
        height, width = x.shape[2:]
        rows, columns = raster(height, width)
        x = self._through(x.flatten(2).transpose(1, 2), rows, columns)
        x = x.transpose(1, 2).unflatten(2, (height, width))
        return F.pixel_shuffle(x, self.spatial_stride) if self.has_decoder else x

    def _through(self, x: Tensor, rows: Tensor, columns: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        if self.has_encoder:
            x = self.encode(x, rows, columns, patch_mask)
        return self.decode(x, rows, columns, patch_mask) if self.has_decoder else x

    def attention_mask(self, tokens: int, patch_mask: Tensor | None) -> Tensor | None:
        """Which keys a query sees, (B, 1, T, T) or (T, T) bool; None for all.

        The official mask also keeps padded queries from seeing anything: their values are meaningless either way, and
        a softmax over nothing is not a number in some runtimes.
        """
        if self.masks_padding and patch_mask is not None:
            # ONNX Runtime's Attention does not broadcast a mask over the queries.
            return (patch_mask != 0).unsqueeze(1).unsqueeze(1).expand(-1, -1, tokens, -1)
        if self.window is not None:
            places = torch.arange(tokens)
            return (places.unsqueeze(0) - places.unsqueeze(1)).abs() <= self.window
        return None


def raster(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Row and column (1, height * width) of the tokens of a whole grid."""
    places = torch.arange(height * width).unsqueeze(0)
    return places // width, places % width


def _check_heads(half: str, width: int, heads: int) -> None:
    if heads < 1 or width % heads or width // heads % 4:
        raise ValueError(f"{half}_width {width} needs {half}_heads of a width in multiples of 4, not {heads} heads")
