"""MAR: an autoregressive generator of continuous tokens, each drawn by a small diffusion (arXiv 2406.11838).

Source: LTH14/mar ``models/mar.py`` and ``models/diffloss.py`` at fe470ac; the light pass: liebenxj/ReCAP (arXiv
2505.19089) ``examples/MAR+ReCAP/models/mar.py`` at 4d1da38. Parameter names and constructor arguments are theirs.

Officially, tokens with a mask are taken out of the encoder's sequence and put back for the decoder, which gives shapes
that depend on values. Here the sequence keeps its length, and nothing attends to a token that is not known: the values
of the others are the same.

Letters of shapes: B rows, L tokens, C channels of a token, D width, G tokens of a group, S steps of the inner
diffusion.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dexport.graphs.layers import TimestepEmbedder, modulate

NORM_EPS = 1e-6
WEIGHTS_PER_STEP = 5
"""Of a step of the inner diffusion; see :class:`AncestralStep`."""
FEW_TOKENS = 64
"""Up to so many, the graph ``light`` takes all tokens as one group."""
LEAST_GROUP = 32
GROUP_SHARE = 8
"""Of more tokens it takes one in so many, and no fewer than ``LEAST_GROUP``."""

KeysValues = tuple[Tensor, Tensor]
"""Of one layer, each (B, heads, N, D / heads)."""


class Attention(nn.Module):
    """Softmax attention to those keys that ``seen`` names: x (B, N, D), seen (B, 1, N, M + N) bool -> (B, N, D).

    ``past`` are keys and values of M more tokens, which come first. The second result has those of x alone.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, seen: Tensor | None, past: KeysValues | None = None) -> tuple[Tensor, KeysValues]:
        packed = self.qkv(x).unflatten(2, (3 * self.num_heads, -1)).transpose(1, 2)
        q, k, v = packed.chunk(3, dim=1)
        keys, values = (k, v) if past is None else (torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2))
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
        # No views, or equal blocks could not be traced once for all.
        return self.proj(out.transpose(1, 2).flatten(2)), (k.contiguous(), v.contiguous())


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; arguments and results of :class:`Attention`."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, seen: Tensor | None, past: KeysValues | None = None) -> tuple[Tensor, KeysValues]:
        attended, fresh = self.attn(self.norm1(x), seen, past)
        x = x + attended
        return x + self.mlp(self.norm2(x)), fresh


class ResBlock(nn.Module):
    """x (B, W), y (B, W) -> (B, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(channels, eps=NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, channels))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 3 * channels))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=1)
        return x + gate * self.mlp(modulate(self.in_ln(x), shift, scale))


class FinalLayer(nn.Module):
    """Modulated norm and projection: x (B, W), y (B, W) -> (B, out_channels)."""

    def __init__(self, model_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(model_channels, elementwise_affine=False, eps=NORM_EPS)
        self.linear = nn.Linear(model_channels, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(model_channels, 2 * model_channels))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SimpleMLPAdaLN(nn.Module):
    """The denoiser of one token: x (B, C), t (B,) in original steps, c (B, D) -> (B, 2C), noise and variance."""

    def __init__(
        self, in_channels: int, model_channels: int, out_channels: int, z_channels: int, num_res_blocks: int
    ) -> None:
        super().__init__()
        self.time_embed = TimestepEmbedder(model_channels)
        self.cond_embed = nn.Linear(z_channels, model_channels)
        self.input_proj = nn.Linear(in_channels, model_channels)
        self.res_blocks = nn.ModuleList(ResBlock(model_channels) for _ in range(num_res_blocks))
        self.final_layer = FinalLayer(model_channels, out_channels)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return self.denoise(x, self.time_embed(t) + self.cond_embed(c))

    def denoise(self, x: Tensor, y: Tensor) -> Tensor:
        """The rest, from the condition y (B, W)."""
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)


class AncestralStep(nn.Module):
    """One step of ancestral sampling with a learned variance, from coefficients that were computed before.

    Inputs: x, eps, variance, noise (B, C); weights (B, 5): of x and of eps in the mean; the logarithm of the standard
    deviation is the third plus the fourth times the variance; the fifth is of the noise. Output: the next x (B, C).
    """

    def forward(self, x: Tensor, eps: Tensor, variance: Tensor, noise: Tensor, weights: Tensor) -> Tensor:
        of_x, of_eps, log_std, of_variance, of_noise = weights.split(1, dim=1)
        deviation = torch.exp(log_std + of_variance * variance)
        return of_x * x + of_eps * eps + of_noise * deviation * noise


class DiffLoss(nn.Module):
    """The inner diffusion: ``net`` denoises, and a forward takes several guided steps.

    Inputs: x (B, C); t (B, S) in original steps; c (B, 2, D), conditional and unconditional; cfg_scale (B,);
    noise (B, S, C); weights (B, S, 5) of :class:`AncestralStep`. Output: x (B, C) after S steps. Guidance is of the
    noise alone, the variance stays conditional.

    Args:
        num_sampling_steps: respacing, for the program.
        grad_checkpointing: of training only.
    """

    def __init__(
        self,
        target_channels: int,
        z_channels: int,
        depth: int,
        width: int,
        num_sampling_steps: str | int = "100",  # noqa: ARG002
        grad_checkpointing: bool = False,  # noqa: ARG002
    ) -> None:
        super().__init__()
        self.in_channels = target_channels
        self.net = SimpleMLPAdaLN(target_channels, width, 2 * target_channels, z_channels, depth)
        self.sampler = AncestralStep()

    def guided(self, x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The noise and the variance (B, C) of x (B, C), from embedded times and conditions y (2B, W); scale (B, 1)."""
        both = self.net.denoise(torch.cat([x, x]), y)
        rows = x.shape[0]
        conditional, null = both[:rows], both[rows:, : self.in_channels]
        eps, variance = conditional[:, : self.in_channels], conditional[:, self.in_channels :]
        return null + scale * (eps - null), variance

    def forward(self, x: Tensor, t: Tensor, c: Tensor, cfg_scale: Tensor, noise: Tensor, weights: Tensor) -> Tensor:
        condition, scale = self.net.cond_embed(torch.cat([c[:, 0], c[:, 1]])), cfg_scale.unsqueeze(1)
        for step in range(t.shape[1]):
            time = self.net.time_embed(t[:, step])
            eps, variance = self.guided(x, torch.cat([time, time]) + condition, scale)
            x = self.sampler(x, eps, variance, noise[:, step], weights[:, step])
        return x


class MAR(nn.Module):
    """Masked autoencoder over the latents of a VAE, and the inner diffusion.

    Inputs: tokens (B, L, C) float32, of which those with a mask are not read; mask (B, L) float32, 1 where a token is
    not known; labels (B,) int64, ``class_num`` being the null label. Output: z (B, L, D), the condition of the inner
    diffusion for every token.

    Args:
        num_sampling_steps: respacing of the inner diffusion, for the program.
        mask_ratio_min, label_drop_prob, attn_dropout, proj_dropout, diffusion_batch_mul, grad_checkpointing: of
            training only.
        light_tokens: tokens that the graph ``light`` takes at most; 0 for a number that suits most schedules. Not an
            official argument.
        inner_steps: steps that one evaluation of the graph ``diffloss`` takes. Not an official argument.
    """

    in_sight: Tensor

    def __init__(
        self,
        img_size: int = 256,
        vae_stride: int = 16,
        patch_size: int = 1,
        encoder_embed_dim: int = 1024,
        encoder_depth: int = 16,
        encoder_num_heads: int = 16,
        decoder_embed_dim: int = 1024,
        decoder_depth: int = 16,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        vae_embed_dim: int = 16,
        mask_ratio_min: float = 0.7,  # noqa: ARG002
        label_drop_prob: float = 0.1,  # noqa: ARG002
        class_num: int = 1000,
        attn_dropout: float = 0.1,  # noqa: ARG002
        proj_dropout: float = 0.1,  # noqa: ARG002
        buffer_size: int = 64,
        diffloss_d: int = 3,
        diffloss_w: int = 1024,
        num_sampling_steps: str | int = "100",  # noqa: ARG002
        diffusion_batch_mul: int = 4,  # noqa: ARG002
        grad_checkpointing: bool = False,  # noqa: ARG002
        light_tokens: int = 0,
        inner_steps: int = 10,
    ) -> None:
        super().__init__()
        if min(img_size, vae_stride, patch_size) < 1 or img_size % (vae_stride * patch_size):
            raise ValueError(
                f"img_size {img_size} is not a multiple of vae_stride {vae_stride} times patch_size {patch_size}"
            )
        for name, dim, heads in (
            ("encoder", encoder_embed_dim, encoder_num_heads),
            ("decoder", decoder_embed_dim, decoder_num_heads),
        ):
            if heads < 1 or dim < 1 or dim % heads:
                raise ValueError(f"{name}_embed_dim {dim} must be a multiple of {name}_num_heads {heads}")
        for name, size in (
            ("encoder_depth", encoder_depth),
            ("decoder_depth", decoder_depth),
            ("class_num", class_num),
            ("buffer_size", buffer_size),
            ("vae_embed_dim", vae_embed_dim),
            ("diffloss_d", diffloss_d),
            ("diffloss_w", diffloss_w),
            ("inner_steps", inner_steps),
        ):
            if size < 1:
                raise ValueError(f"{name} {size} must be at least 1")
        self.seq_len = tokens_of(img_size, vae_stride, patch_size)
        self.buffer_size = buffer_size
        self.num_classes = class_num
        self.light_tokens = group_of(self.seq_len, light_tokens)
        channels = vae_embed_dim * patch_size**2
        length = self.seq_len + buffer_size

        self.class_emb = nn.Embedding(class_num, encoder_embed_dim)
        self.fake_latent = nn.Parameter(torch.zeros(1, encoder_embed_dim))
        self.z_proj = nn.Linear(channels, encoder_embed_dim)
        self.z_proj_ln = nn.LayerNorm(encoder_embed_dim, eps=NORM_EPS)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, encoder_embed_dim))
        self.encoder_blocks = nn.ModuleList(
            Block(encoder_embed_dim, encoder_num_heads, mlp_ratio) for _ in range(encoder_depth)
        )
        self.encoder_norm = nn.LayerNorm(encoder_embed_dim, eps=NORM_EPS)

        self.decoder_embed = nn.Linear(encoder_embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, decoder_embed_dim))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, mlp_ratio) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=NORM_EPS)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, self.seq_len, decoder_embed_dim))
        self.register_buffer("in_sight", torch.zeros(1, buffer_size, dtype=torch.bool, device="cpu"), persistent=False)
        self.diffloss = DiffLoss(channels, decoder_embed_dim, diffloss_d, diffloss_w)

    def forward(self, tokens: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        return self.full(tokens, mask, labels)[0]

    def full(self, tokens: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, list[KeysValues], list[KeysValues]]:
        """z (B, L, D), and the keys and values of every layer of the encoder and the decoder, buffer included."""
        hidden = self.with_buffer(mask > 0.5)
        x, encoder = self.encode(tokens, labels, self.encoder_pos_embed_learned, ~hidden)
        x, decoder = self.decode(x, hidden, self.decoder_pos_embed_learned, None)
        return x + self.diffusion_pos_embed_learned, encoder, decoder

    def light(
        self, tokens: Tensor, mask: Tensor, labels: Tensor, positions: Tensor, encoder_kv: Tensor, decoder_kv: Tensor
    ) -> Tensor:
        """z (B, G, D) of the tokens at ``positions``, with what the last full pass left of all others.

        Args:
            tokens, mask, labels: of the whole sequence as it is now; what is outside the group has not changed since.
            positions: (B, G) int64; ``seq_len`` fills up a group that is smaller.
            encoder_kv, decoder_kv: (B, depth, 2, heads, L, d), of :class:`Full`.
        """
        index = positions.clamp(max=self.seq_len - 1)
        used = positions < self.seq_len
        hidden = mask.gather(1, index) > 0.5
        # Zeros of the batch's size without a constant: one column more, where what fills up a group goes.
        nowhere = torch.cat([mask, mask[:, :1]], dim=1) * 0
        inside = nowhere.scatter(1, positions, used.to(mask.dtype))[:, : self.seq_len] > 0.5
        known = (mask <= 0.5) & ~inside
        own = tokens.gather(1, index.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
        seen = torch.cat([known, ~self.with_buffer(hidden | ~used)], dim=1)
        x, _ = self.encode(own, labels, self._places(self.encoder_pos_embed_learned, index), seen, encoder_kv)
        seen = torch.cat([~inside, ~self.with_buffer(~used)], dim=1)
        place = self._places(self.decoder_pos_embed_learned, index)
        x, _ = self.decode(x, self.with_buffer(hidden), place, seen, decoder_kv)
        return x + F.embedding(index, self.diffusion_pos_embed_learned[0])

    def encode(
        self, tokens: Tensor, labels: Tensor, places: Tensor, seen: Tensor, past: Tensor | None = None
    ) -> tuple[Tensor, list[KeysValues]]:
        """tokens (B, N, C), places (1 or B, buffer + N, D), seen (B, M + buffer + N) bool -> (B, buffer + N, D)."""
        classes = self.class_emb(labels.clamp(max=self.num_classes - 1))
        classes = torch.where((labels == self.num_classes).unsqueeze(1), self.fake_latent, classes)
        buffer = classes.unsqueeze(1) + places[:, : self.buffer_size]
        x = self.z_proj_ln(torch.cat([buffer, self.z_proj(tokens) + places[:, self.buffer_size :]], dim=1))
        x, kept = _through(self.encoder_blocks, x, seen, past)
        return self.encoder_norm(x), kept

    def decode(
        self, x: Tensor, hidden: Tensor, places: Tensor, seen: Tensor | None, past: Tensor | None = None
    ) -> tuple[Tensor, list[KeysValues]]:
        """x (B, buffer + N, D) of the encoder, hidden (B, buffer + N) bool -> (B, N, D)."""
        x = torch.where(hidden.unsqueeze(2), self.mask_token, self.decoder_embed(x)) + places
        x, kept = _through(self.decoder_blocks, x, seen, past)
        return self.decoder_norm(x)[:, self.buffer_size :], kept

    def with_buffer(self, hidden: Tensor) -> Tensor:
        """(B, N) bool -> (B, buffer + N): the buffer is never hidden."""
        return torch.cat([self.in_sight.expand(hidden.shape[0], -1), hidden], dim=1)

    def _places(self, table: Tensor, index: Tensor) -> Tensor:
        """Rows of a table (1, buffer + L, D) for the buffer and the tokens at ``index`` (B, G)."""
        own = F.embedding(index + self.buffer_size, table[0])
        return torch.cat([table[:, : self.buffer_size].expand(index.shape[0], -1, -1), own], dim=1)


class Full(nn.Module):
    """The graph ``full``: the outputs of :class:`MAR`, and what :meth:`MAR.light` needs of it.

    Outputs: z (B, L, D); encoder_kv, decoder_kv (B, depth, 2, heads, L, d): the keys, then the values of every layer,
    without those of the buffer.
    """

    def __init__(self, network: MAR) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, encoder, decoder = self.network.full(tokens, mask, labels)
        return z, self._stacked(encoder), self._stacked(decoder)

    def _stacked(self, layers: list[KeysValues]) -> Tensor:
        buffer = self.network.buffer_size
        return torch.stack([torch.stack([part[:, :, buffer:] for part in layer], dim=1) for layer in layers], dim=1)


class Light(nn.Module):
    """The graph ``light``; see :meth:`MAR.light`."""

    def __init__(self, network: MAR) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, tokens: Tensor, mask: Tensor, labels: Tensor, positions: Tensor, encoder_kv: Tensor, decoder_kv: Tensor
    ) -> Tensor:
        return self.network.light(tokens, mask, labels, positions, encoder_kv, decoder_kv)


class InnerSteps(nn.Module):
    """The graph ``diffloss``; see :class:`DiffLoss`."""

    def __init__(self, network: MAR) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, c: Tensor, cfg_scale: Tensor, noise: Tensor, weights: Tensor) -> Tensor:
        return self.network.diffloss(x, t, c, cfg_scale, noise, weights)


def tokens_of(img_size: int, vae_stride: int, patch_size: int) -> int:
    """How many tokens an image has."""
    return (img_size // vae_stride // patch_size) ** 2


def group_of(seq_len: int, light_tokens: int) -> int:
    """How many tokens the graph ``light`` takes.

    Raises:
        ValueError: more than there are.
    """
    if not 0 <= light_tokens <= seq_len:
        raise ValueError(f"light_tokens {light_tokens} must be 0 to {seq_len}, as there are {seq_len} tokens")
    if light_tokens:
        return light_tokens
    return seq_len if seq_len <= FEW_TOKENS else max(LEAST_GROUP, seq_len // GROUP_SHARE)


def _through(
    blocks: nn.ModuleList, x: Tensor, seen: Tensor | None, past: Tensor | None
) -> tuple[Tensor, list[KeysValues]]:
    """All blocks, with ``past`` (B, depth, 2, heads, M, d); the keys and values of x in each."""
    kept = []
    # One row per query: not every runtime spreads a single one over all.
    mask = None if seen is None else seen[:, None, None].expand(-1, -1, x.shape[1], -1)
    for number, block in enumerate(blocks):
        x, fresh = block(x, mask, None if past is None else (past[:, number, 0], past[:, number, 1]))
        kept.append(fresh)
    return x, kept
