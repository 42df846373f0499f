"""The Inception Score."""

from __future__ import annotations

import numpy as np


def inception_score(logits: np.ndarray, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation over ``splits`` of exp(E KL(p(y|x) | p(y))) (Salimans et al., arXiv 1606.03498).

    Args:
        logits: (N, K), without the classifier's bias as the score's authors take them.
        seed: of the order in which images are split; images often come sorted by class.
    """
    logits = logits.astype(np.float64)[np.random.default_rng(seed).permutation(len(logits))]
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    scores = []
    for part in np.array_split(log_p, min(splits, len(log_p))):
        p = np.exp(part)
        scores.append(np.exp((p * (part - np.log(p.mean(axis=0)))).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))
