"""MaskGIT-r: the U-ViT that ReCAP accelerates (arXiv 2505.19089), with a full and a light pass.

Source: liebenxj/ReCAP ``examples/MaskGIT+ReCAP/models/uvit.py`` at 4d1da38. Parameter names and constructor arguments
are theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dexport.graphs.masked_vit import BertEmbeddings, Block, Group, KeyValue, MlmLayer, check_heads, flat


class UViT(nn.Module):
    """Logits of the codes.

    Inputs: ids (B, N) int64 of N = img_size**2 places, ``codebook_size`` where a code is not known; labels (B, 1)
    int64, the last of ``num_classes`` being the null label. Output: logits (B, N, codebook_size).

    Args:
        in_chans, use_checkpoint, pretrained_path: nothing here depends on them.
        group_size: tokens that a light pass takes at most, enough for all schedules of the official scripts; not an
            argument of the official class.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(
        self,
        img_size: int = 16,
        in_chans: int = 8,  # noqa: ARG002 - official argument
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        use_checkpoint: bool = False,  # noqa: ARG002 - official argument
        pretrained_path: str | None = None,  # noqa: ARG002 - official argument
        skip: bool = True,
        codebook_size: int = 1024,
        num_classes: int = 1001,
        group_size: int = 72,
    ) -> None:
        super().__init__()
        check_heads("embed_dim", embed_dim, num_heads)
        sizes = {"img_size": img_size, "codebook_size": codebook_size, "group_size": group_size}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        if depth < 0:
            raise ValueError(f"depth {depth} must be at least 0")
        self.tokens, self.codebook_size = img_size**2, codebook_size
        self.token_emb = BertEmbeddings(codebook_size + 1, embed_dim, self.tokens)
        self.context_embed = BertEmbeddings(num_classes, embed_dim, 1)

        def block(skip: bool = False) -> Block:
            return Block(embed_dim, num_heads, mlp_ratio, qkv_bias, qk_scale, skip=skip)

        self.in_blocks = nn.ModuleList(block() for _ in range(depth // 2))
        self.mid_block = block()
        self.out_blocks = nn.ModuleList(block(skip) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(embed_dim)
        self.mlm_layer = MlmLayer(embed_dim, embed_dim, codebook_size + 1)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return self.full(ids, labels)[0]

    def full(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, list[KeyValue]]:
        """The logits, and what the blocks attended to."""
        return self._through(self.token_emb(ids), labels)

    def light(self, local_ids: Tensor, positions: Tensor, labels: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """The logits of some tokens, beside what a full pass kept of the others.

        Args:
            local_ids: (B, G).
            positions: (B, G) in [0, N), or -1.
            kept: keys and values of :meth:`full` in turns.
        """
        group = Group(positions, self.tokens)
        x = self.token_emb(local_ids, group.positions)
        return self._through(x, labels, Group.kept(kept), group.mask)[0]

    def _through(
        self, x: Tensor, labels: Tensor, known: Sequence[KeyValue] | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, list[KeyValue]]:
        x = torch.cat([self.context_embed(labels), x], dim=1)
        skips: list[Tensor] = []
        kept: list[KeyValue] = []
        blocks = (*self.in_blocks, self.mid_block, *self.out_blocks)
        for index, block in enumerate(blocks):
            earlier = skips.pop() if index > len(self.in_blocks) else None
            x, own = block(x, earlier, None if known is None else known[index], mask)
            if index < len(self.in_blocks):
                skips.append(x)
            kept.append(own)
        logits = self.mlm_layer(self.norm(x), self.token_emb.word_embeddings)
        return logits[:, 1:, : self.codebook_size], kept


class Full(nn.Module):
    """A pass over all tokens: ids, labels -> logits, then keys and values (B, 1 + N, heads, head size) of every block,
    the class first."""

    def __init__(self, network: UViT) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        logits, kept = self.network.full(ids, labels)
        return (logits, *flat(kept))


class Light(nn.Module):
    """A pass over the class and a group: local_ids (B, G), group_positions (B, G), labels (B, 1), keys and values ->
    logits (B, G, codebook_size)."""

    def __init__(self, network: UViT) -> None:
        super().__init__()
        self.network = network

    def forward(self, local_ids: Tensor, group_positions: Tensor, labels: Tensor, *kept: Tensor) -> Tensor:
        return self.network.light(local_ids, group_positions, labels, kept)
