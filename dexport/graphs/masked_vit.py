"""What MAGE and MaskGIT-r are made of: BERT's embedding and head, and transformer blocks whose keys can be kept.

Sources: LTH14/mage ``models_mage.py`` at 1becb14 and liebenxj/ReCAP ``examples/MaskGIT+ReCAP/models/uvit.py`` at
4d1da38, which name these parts alike. Kept keys and values are (B, tokens, heads, head size), as there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBEDDING_EPS = 1e-6
HEAD_EPS = 1e-5

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of one block: two (B, T, N, d)."""
NOWHERE = -1
"""The position of a place of a group that nothing fills: no token attends to it, and its logits mean nothing."""


class BertEmbeddings(nn.Module):
    """Word plus position, normalised: ids (B, T) int64, positions (T,) or (B, T) -> (B, T, D)."""

    position_ids: Tensor

    def __init__(self, vocab_size: int, hidden_size: int, positions: int, *, keeps_positions: bool = False) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, hidden_size)
        self.position_embeddings = nn.Embedding(positions, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=EMBEDDING_EPS)
        if keeps_positions:  # a table that the files of MAGE hold
            self.register_buffer("position_ids", torch.arange(positions, device="cpu").unsqueeze(0))

    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        table = self.position_embeddings
        place = table.weight[: ids.shape[1]] if positions is None else table(positions)
        return self.LayerNorm(self.word_embeddings(ids) + place)


class MlmLayer(nn.Module):
    """Logits through the table of words: (B, T, feat_emb_dim) -> (B, T, words)."""

    def __init__(self, feat_emb_dim: int, word_emb_dim: int, vocab_size: int) -> None:
        super().__init__()
        self.fc = nn.Linear(feat_emb_dim, word_emb_dim)
        self.ln = nn.LayerNorm(word_emb_dim, eps=HEAD_EPS)
        self.bias = nn.Parameter(torch.zeros(1, 1, vocab_size))

    def forward(self, x: Tensor, words: nn.Embedding) -> Tensor:
        return F.linear(self.ln(F.gelu(self.fc(x))), words.weight) + self.bias


class Attention(nn.Module):
    """Softmax attention; ``known`` keys and values come before those of its own tokens.

    x (B, T, D), known keys and values (B, K, N, d), mask (B, 1, T, K + T) of those that count -> (B, T, D), and the
    keys and values of its own tokens (B, T, N, d).
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, qk_scale: float | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x_BTD: Tensor, known: KeyValue | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, KeyValue]:
        packed = self.qkv(x_BTD).unflatten(2, (3 * self.num_heads, -1)).transpose(1, 2)
        q, k, v = packed.chunk(3, dim=1)
        own = (k.transpose(1, 2), v.transpose(1, 2))
        if known is not None:
            k, v = (torch.cat([old.transpose(1, 2), new], dim=2) for old, new in zip(known, (k, v), strict=True))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return self.proj(out.transpose(1, 2).flatten(2)), own


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block, called as :class:`Attention`.

    With ``skip`` it first brings x and an earlier result, side by side, back to one width.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        norm_eps: float = 1e-5,
        skip: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(
        self, x: Tensor, skip: Tensor | None = None, known: KeyValue | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, KeyValue]:
        if self.skip_linear is not None:
            assert skip is not None
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        attended, own = self.attn(self.norm1(x), known, mask)
        x = x + attended
        return x + self.mlp(self.norm2(x)), own


class Group:
    """The tokens of a light pass and what they attend to: one leading token, then those at some positions.

    Args:
        positions: (B, G) int64 in [0, tokens), or :data:`NOWHERE`.
        tokens: how many there are without the leading one.

    Attributes:
        positions: (B, G) int64, 0 in place of :data:`NOWHERE`.
        mask: (B, 1, 1 + G, tokens + 1 + G) bool, the same for each query: kept keys outside of the group, the leading
            token's new key, and the new keys of the group.
    """

    def __init__(self, positions: Tensor, tokens: int) -> None:
        inside = positions >= 0
        # Not by comparison with every position: their list would be a weight that only light graphs have.
        nobody = torch.zeros_like(positions[:, :1]).expand(-1, 1 + tokens)
        outside = nobody.scatter(1, positions + 1, 1)[:, 1:] == 0
        self.positions = positions.clamp(min=0)
        keys = torch.cat([outside, torch.ones_like(inside[:, :1]), inside], dim=1)
        # The operator of ONNX wants a row of the mask for each query.
        self.mask = keys[:, None, None].expand(-1, 1, 1 + inside.shape[1], -1)

    @staticmethod
    def kept(known: Sequence[Tensor]) -> list[KeyValue]:
        """Keys and values by block, of all but the leading token, which a light pass computes anew.

        Args:
            known: keys and values of a full pass in turns, each (B, 1 + tokens, N, d).
        """
        others = [each[:, 1:] for each in known]
        return list(zip(others[::2], others[1::2], strict=True))


def flat(kept: Sequence[KeyValue]) -> tuple[Tensor, ...]:
    """Keys and values in turns."""
    return tuple(each for pair in kept for each in pair)


def check_heads(what: str, width: int, num_heads: int) -> None:
    """Refuse a width that does not split into heads, with the names of the arguments."""
    if num_heads < 1 or width < 1 or width % num_heads:
        raise ValueError(f"{what} {width} must be a multiple of its number of heads, {num_heads}")
