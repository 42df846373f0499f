"""MAGE: masked generative encoder (arXiv 2211.09117), as it generates: nothing is dropped before the encoder.

Source: LTH14/mage ``models_mage.py`` and ``gen_img_uncond.py`` at 1becb14. Parameter names and constructor arguments
are theirs. The two halves of ReCAP (:class:`Full`, :class:`Light`) are an own reading of arXiv 2505.19089, which has
figures for MAGE but no code: its recipe for MaskGIT is applied to the encoder and to the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dexport.graphs.masked_vit import BertEmbeddings, Block, Group, KeyValue, MlmLayer, check_heads, flat

CLASSES = 1000
"""Words between the codes and the mask; class labels of ImageNet."""
FAKE_CLASS = 76
"""How far behind the codes the word of unconditional generation is: 1100 of 1024."""
POSITIONS = 257
"""Rows of the position table, whatever ``img_size`` is."""


class Mage(nn.Module):
    """Logits of every word at every place.

    Input: token_ids (B, 1 + N) int64 of N = (img_size / patch_size)**2 places: codes, or ``mask_id`` where they are
    not known; the first is the word of a class, :attr:`fake_class` for unconditional generation. Output: logits
    (B, 1 + N, n_embed + 1001); a place's code is one of the first ``n_embed`` words.

    Args:
        in_chans, mask_ratio_*, norm_pix_loss, vqgan_ckpt_path: training, or the tokenizer; nothing here depends on
            them.
        n_embed: codes of the tokenizer. In the official code it and ``norm_eps`` come from elsewhere.
        group_size: tokens that a light pass takes at most, enough for all schedules of the official scripts; not an
            argument of the official class.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(
        self,
        img_size: int = 256,
        patch_size: int = 16,
        in_chans: int = 3,  # noqa: ARG002 - official argument
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = False,  # noqa: ARG002 - official argument
        mask_ratio_min: float = 0.5,  # noqa: ARG002 - official argument
        mask_ratio_max: float = 1.0,  # noqa: ARG002 - official argument
        mask_ratio_mu: float = 0.55,  # noqa: ARG002 - official argument
        mask_ratio_std: float = 0.25,  # noqa: ARG002 - official argument
        vqgan_ckpt_path: str = "",  # noqa: ARG002 - official argument
        n_embed: int = 1024,
        norm_eps: float = 1e-6,
        group_size: int = 72,
    ) -> None:
        super().__init__()
        check_heads("embed_dim", embed_dim, num_heads)
        check_heads("decoder_embed_dim", decoder_embed_dim, decoder_num_heads)
        if patch_size < 1 or img_size % patch_size:
            raise ValueError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
        self.tokens = (img_size // patch_size) ** 2
        if not 1 <= self.tokens < POSITIONS:
            raise ValueError(
                f"img_size {img_size} makes {self.tokens} tokens of patch_size {patch_size}, and there are positions "
                f"for {POSITIONS - 1}"
            )
        for name, value in {"depth": depth, "decoder_depth": decoder_depth, "group_size": group_size}.items():
            if value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        words = n_embed + CLASSES + 1
        self.mask_id, self.fake_class = words - 1, n_embed + FAKE_CLASS
        self.token_emb = BertEmbeddings(words, embed_dim, POSITIONS, keeps_positions=True)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, norm_eps=norm_eps) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, self.tokens + 1, decoder_embed_dim))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, mlp_ratio, qkv_bias=True, norm_eps=norm_eps)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=norm_eps)
        self.mlm_layer = MlmLayer(decoder_embed_dim, embed_dim, words)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.full(token_ids)[0]

    def encode(self, token_ids: Tensor) -> Tensor:
        """What the encoder makes of all tokens: (B, 1 + N) -> (B, 1 + N, embed_dim)."""
        return self.norm(_through(self.blocks, self.token_emb(token_ids))[0])

    def full(self, token_ids: Tensor) -> tuple[Tensor, list[KeyValue]]:
        """The logits, and what the blocks of the encoder and then of the decoder attended to."""
        x, kept = _through(self.blocks, self.token_emb(token_ids))
        x = self._at_masks(self.decoder_embed(self.norm(x)), token_ids) + self.decoder_pos_embed_learned
        x, more = _through(self.decoder_blocks, x)
        return self._logits(x), [*kept, *more]

    def light(self, local_ids: Tensor, positions: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """The logits of some tokens, beside what a full pass kept of the others.

        Args:
            local_ids: (B, 1 + G), the class first.
            positions: (B, G) in [0, N), or -1.
            kept: keys and values of :meth:`full` in turns.
        """
        group, pairs = Group(positions, self.tokens), Group.kept(kept)
        places = F.pad(group.positions + 1, (1, 0))
        x, _ = _through(self.blocks, self.token_emb(local_ids, places), pairs[: len(self.blocks)], group.mask)
        x = self._at_masks(self.decoder_embed(self.norm(x)), local_ids)
        x = x + F.embedding(places, self.decoder_pos_embed_learned[0])
        x, _ = _through(self.decoder_blocks, x, pairs[len(self.blocks) :], group.mask)
        return self._logits(x)

    def _at_masks(self, x: Tensor, ids: Tensor) -> Tensor:
        """The decoder sees the first token's features wherever a code is not known."""
        return torch.where((ids == self.mask_id).unsqueeze(-1), x[:, :1], x)

    def _logits(self, x: Tensor) -> Tensor:
        return self.mlm_layer(self.decoder_norm(x), self.token_emb.word_embeddings)


def _through(
    blocks: nn.ModuleList, x: Tensor, known: Sequence[KeyValue] | None = None, mask: Tensor | None = None
) -> tuple[Tensor, list[KeyValue]]:
    kept = []
    for index, block in enumerate(blocks):
        x, own = block(x, None, None if known is None else known[index], mask)
        kept.append(own)
    return x, kept


class Full(nn.Module):
    """A pass over all tokens: token_ids -> logits, then keys and values (B, 1 + N, heads, head size) of every block.

    Own reading of the paper, see the module.
    """

    def __init__(self, network: Mage) -> None:
        super().__init__()
        self.network = network

    def forward(self, token_ids: Tensor) -> tuple[Tensor, ...]:
        logits, kept = self.network.full(token_ids)
        return (logits, *flat(kept))


class Light(nn.Module):
    """A pass over the class and a group: local_ids (B, 1 + G), group_positions (B, G), keys and values -> logits.

    Own reading of the paper, see the module.
    """

    def __init__(self, network: Mage) -> None:
        super().__init__()
        self.network = network

    def forward(self, local_ids: Tensor, group_positions: Tensor, *kept: Tensor) -> Tensor:
        return self.network.light(local_ids, group_positions, kept)
