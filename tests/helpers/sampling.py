"""The sampling oracle: the documented order of options in numpy, f64, and a chi-square test of what an engine drew against it.

Order: logit bias, forbidden tokens, penalties, then (temperature > 0) temperature, min-p, top-k, top-p, each on what the one
before it left. Read next: test_sampling.py.
"""

from __future__ import annotations

import math

import numpy as np


def adjusted(logits, options: dict, prompt=(), output=(), forbidden=()) -> np.ndarray:
    """Logits [V] after bias, forbidden tokens and penalties: what greedy takes the argmax of."""
    z = np.asarray(logits, np.float64).copy()
    for token, bias in options.get("logit_bias", {}).items():
        z[token] += bias
    z[list(forbidden)] = -np.inf
    seen = sorted(set(prompt) | set(output))
    r = options.get("repetition_penalty", 1.0)
    z[seen] = np.where(z[seen] > 0, z[seen] / r, z[seen] * r)
    counts = np.bincount(np.asarray(output, np.int64), minlength=z.size)
    z -= options.get("frequency_penalty", 0.0) * counts
    z -= options.get("presence_penalty", 0.0) * (counts > 0)
    return z


def distribution(logits, options: dict, prompt=(), output=(), forbidden=()) -> np.ndarray:
    """Probabilities [V] that a token is drawn with; temperature > 0."""
    z = adjusted(logits, options, prompt, output, forbidden) / options.get("temperature", 1.0)
    p = _softmax(z)
    p[p < options.get("min_p", 0.0) * p.max()] = 0
    order = np.argsort(-p, kind="stable")  # ties: the lower id first
    k = options.get("top_k", 0)
    if k > 0:
        p[order[k:]] = 0
    p /= p.sum()
    top_p = options.get("top_p", 1.0)
    if top_p < 1:
        mass_before = np.cumsum(p[order]) - p[order]
        p[order[mass_before >= top_p]] = 0
    return p / p.sum()


def _softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def assert_drawn_from(tokens, p: np.ndarray, what: str) -> None:
    """Chi-square test at the level of one in a million (the seeds are fixed: a pass stays a pass), tokens of probability 0 never
    drawn."""
    n = len(tokens)
    counts = np.bincount(np.asarray(tokens), minlength=p.size)
    impossible = np.flatnonzero((p == 0) & (counts > 0))
    assert not impossible.size, f"{what}: drew {impossible.tolist()}, which the options exclude"
    large = p * n >= 8  # rarer tokens are one bin together
    observed, expected = counts[large].astype(float), p[large] * n
    rest = p[~large].sum() * n
    if rest > 0:
        observed, expected = np.append(observed, counts[~large].sum()), np.append(expected, rest)
    keep = expected >= 3
    observed, expected = observed[keep], expected[keep]
    assert len(expected) >= 2, f"{what}: the test needs at least two outcomes"
    statistic, freedom = ((observed - expected) ** 2 / expected).sum(), len(expected) - 1
    # Upper quantile by Wilson and Hilferty (1931); 4.7534 is the normal quantile at 1 - 1e-6.
    limit = freedom * (1 - 2 / (9 * freedom) + 4.7534 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit, f"{what}: chi-square {statistic:.1f} with {freedom} degrees of freedom, limit {limit:.1f}, {n} draws"
