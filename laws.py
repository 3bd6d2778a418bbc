"""The efficiency gap without a law; scaling laws, frontiers and parity; bootstrap intervals.

    L(N, D) = E + A / N^alpha + B / D^beta      the loss of N parameters after D tokens (Hoffmann et
                                                al., arXiv 2203.15556)
    L(C)    = min over N of L(N, D)             the frontier: D is what C FLOPs pay for
    G(C)    = C_byte / C                        the gap, where L_byte(C_byte) = L_bpe(C)

The gap is first read without a law, from the IsoFLOP minima of the budgets that were trained.
A law is an array (E, A, B, alpha, beta). Functions take S laws at once, (S, 5): a bootstrap has
many, and its first is the fit itself.
"""
import itertools
from types import SimpleNamespace

import numpy as np

from model import Config, flops_per_token

NAMES = ("E", "A", "B", "alpha", "beta")
# The first grid of the search, for alpha and for beta.
EXPONENTS = np.geomspace(0.05, 2.5, 14)
# The widths that a frontier chooses from.
WIDTHS = np.geomspace(4, 65536, 150)
RESAMPLES = 500


# -----------------------------------------------------------------------------------------------
# Without a law: IsoFLOP minima, and what lies between them.

def pooled_minima(C, N, L):
    """Fit the losses L (n,) of all runs of a configuration, of sizes N (n,) at budgets C (n,).

    L = L*(C) + c (ln N - n0 - a ln C)^2: one curvature, one N* = exp(n0) C^a, and a minimum L* of
    its own for each budget. Written as L = level(C) + c x^2 + (b + d t) x, with x = ln N and
    t = ln C, it is linear. Return (budgets (K,), minima (K,), fitted losses (n,)); the minima are
    nan if the curvature is not positive.
    """
    budgets, index = np.unique(C, return_inverse=True)
    x, t = np.log(N), np.log(C)
    x0, t0 = x.mean(), t.mean()
    x, t = x - x0, t - t0
    levels = np.eye(len(budgets))[index]                                                # (n, K)
    X = np.column_stack([levels, x**2, x, x * t])
    coefficients = np.linalg.lstsq(X, L, rcond=None)[0]
    c, b, d = coefficients[-3:]
    # The minimum of c x^2 + (b + d t) x.
    lowest = -(b + d * (np.log(budgets) - t0)) ** 2 / (4 * c) if c > 0 else np.nan
    return budgets, coefficients[:-3] + lowest, X @ coefficients


def resampled_minima(C, N, L, seed, count=RESAMPLES):
    """Return the budgets (K,) and their minima (1 + count, K): first as fitted, then resampled.

    A sample adds to the fitted losses residuals drawn at random, so the design stays as it is. They
    are scaled up for the K + 3 numbers that were fitted. nan if the fit has no minima; samples
    without are drawn again.
    """
    rng = np.random.default_rng(seed)
    budgets, minima, fitted = pooled_minima(C, N, L)
    free = len(L) - len(budgets) - 3
    residuals = (L - fitted) * np.sqrt(len(L) / max(1, free))
    samples = [minima]
    while len(samples) <= count:
        drawn = fitted + rng.choice(residuals, len(L))
        resampled = pooled_minima(C, N, drawn)[1]
        if np.isfinite(resampled).all() or np.isnan(minima).any():
            samples.append(resampled)
    return budgets, np.array(samples)


def interpolated_gap(byte_budgets, byte, bpe_budgets, bpe):
    """Return G at each budget of BPE from minima byte (S, J) and bpe (S, K): (S, K).

    Between two budgets log loss is a straight line in log C. inf where bytes do not reach the loss
    of BPE within their budgets, nan where they had it before their first.
    """
    log_c = np.log(byte_budgets)
    # np.interp wants increasing numbers, and more compute never makes the best loss worse.
    byte = np.minimum.accumulate(byte, axis=1)
    log_c_byte = [np.interp(-np.log(low), -np.log(high), log_c, left=np.nan, right=np.inf)
                  for low, high in zip(bpe, byte, strict=True)]
    return np.exp(np.array(log_c_byte) - np.log(bpe_budgets))


# -----------------------------------------------------------------------------------------------
# The fit.

def nonnegative_least_squares(gram, moment):
    """Solve many problems in three coefficients >= 0: X'X (..., 3, 3), X'y (..., 3).

    Return the coefficients (..., 3), and how much of y'y they explain (...). The solution is exact:
    every set of coefficients that may be positive is tried.
    """
    best, explained = np.zeros(moment.shape), np.zeros(moment.shape[:-1])
    for size in (1, 2, 3):
        for chosen in map(list, itertools.combinations(range(3), size)):
            try:
                part = np.linalg.solve(gram[..., chosen, :][..., chosen], moment[..., chosen, None])
            except np.linalg.LinAlgError:
                # Two columns are equal somewhere: a smaller set does as well.
                continue
            full = np.zeros(moment.shape)
            full[..., chosen] = part[..., 0]
            share = (full * moment).sum(axis=-1)
            better = (full >= 0).all(axis=-1) & (share > explained)
            best = np.where(better[..., None], full, best)
            explained = np.where(better, share, explained)
    return best, explained


def fit_laws(N, D, L, weights):
    """Fit a law for each row of weights (S, n) of the same runs N, D, L (n,). Return laws (S, 5).

    Variable projection: given the exponents, E, A and B are linear least squares. The exponents are
    searched on a grid that zooms in on its best point.
    """
    rows = np.arange(len(weights))
    # Columns of order 1.
    N0, D0 = np.exp(np.log(N).mean()), np.exp(np.log(D).mean())
    n, d = N / N0, D / D0
    grids = np.meshgrid(EXPONENTS, EXPONENTS)
    alphas, betas = (np.tile(grid.ravel(), (len(weights), 1)) for grid in grids)        # (S, G)
    step = np.log(EXPONENTS[1] / EXPONENTS[0])
    for _ in range(9):
        ones = np.ones((*alphas.shape, len(n)))
        X = np.stack([ones, n ** -alphas[..., None], d ** -betas[..., None]], axis=-1)  # (S,G,n,3)
        WX = np.swapaxes(weights[:, None, :, None] * X, -1, -2)                         # (S,G,3,n)
        coefficients, explained = nonnegative_least_squares(WX @ X, WX @ L)
        best = explained.argmax(axis=1)
        E, A, B = coefficients[rows, best].T
        alpha, beta = alphas[rows, best], betas[rows, best]
        step /= 2
        nearby = np.exp(step * np.mgrid[-2:3, -2:3].reshape(2, -1))                     # (2, 25)
        alphas, betas = alpha[:, None] * nearby[0], beta[:, None] * nearby[1]
    return np.stack([E, A * N0**alpha, B * D0**beta, alpha, beta], axis=1)


def determined(N, D):
    """Return whether runs of N parameters on D tokens can determine the five numbers of a law."""
    return len(set(zip(N, D, strict=True))) >= 5 and len(set(N)) >= 3 and len(set(D)) >= 3


def fit_law(N, D, L):
    """Return dict(E=, A=, B=, alpha=, beta=): the law of runs N, D, L (n,) by least squares.

    N: parameters without embeddings, D: tokens, L: loss. E, A and B are not negative. Raises
    ValueError for numbers that are not positive and finite, and for too few runs.
    """
    N, D, L = (np.asarray(x, dtype=float).ravel() for x in (N, D, L))
    if not len(N) == len(D) == len(L):
        raise ValueError(f"N, D and L differ in length: {len(N)}, {len(D)} and {len(L)}")
    if not all(np.isfinite(x).all() and (x > 0).all() for x in (N, D, L)):
        raise ValueError("N, D and L must be positive and finite")
    if not determined(N, D):
        raise ValueError("a law needs five different runs, of three different N and three D: there "
                         f"are {len(set(zip(N, D, strict=True)))}, {len(set(N))} and {len(set(D))}")
    law = fit_laws(N, D, L, np.ones((1, len(N))))[0]
    return dict(zip(NAMES, map(float, law), strict=True))


def bootstrap_weights(N, D, seed, count=RESAMPLES):
    """Return how often each run is in each of count samples: (1 + count, n), the first all ones.

    Samples that do not determine a law are drawn again.
    """
    rng, rows = np.random.default_rng(seed), [np.ones(len(N))]
    while len(rows) <= count:
        row = rng.multinomial(len(N), np.full(len(N), 1 / len(N)))
        if determined(N[row > 0], D[row > 0]):
            rows.append(row)
    return np.array(rows, dtype=float)


# -----------------------------------------------------------------------------------------------
# What follows from the laws. C: budgets in FLOPs (K,), increasing.

def frontier(laws, C, vocab_size, context):
    """Return the lowest loss at each budget, over model widths: (S, K). context: in tokens."""
    # A Config without its integers: all widths at once, and the depths between whole ones too.
    shape = SimpleNamespace(width=WIDTHS, depth=np.maximum(2, WIDTHS / 64), context=context,
                            padded_vocab=Config(vocab_size).padded_vocab)
    N = WIDTHS * (16 * WIDTHS * shape.depth + 2 * shape.depth + 1)                      # (W,)
    D = C / flops_per_token(shape)[:, None]                                             # (W, K)
    return np.array([(E + A * N[:, None] ** -alpha + B * D**-beta).min(axis=0)
                     for E, A, B, alpha, beta in laws])


def gap(byte, bpe, C):
    """Return G(C) of frontiers byte and bpe (S, K): (S, K), inf if bytes need more than C[-1]."""
    log_c = np.log(C)
    # np.interp wants increasing losses.
    log_c_byte = [np.interp(-low, -high, log_c, right=np.inf)
                  for low, high in zip(bpe, byte, strict=True)]
    return np.exp(log_c_byte - log_c)


def parity(byte, bpe, C):
    """Return the budget at which the byte frontier meets that of BPE: (S,), inf if beyond C[-1]."""
    rows = np.arange(len(byte))
    distance = byte - bpe                                                               # (S, K)
    after = (distance <= 0).argmax(axis=1)
    before = np.maximum(after - 1, 0)
    high, low = distance[rows, before], distance[rows, after]
    # Between two budgets the distance is a straight line in log C.
    share = np.divide(high, high - low, out=np.ones(len(rows)), where=high > low)
    log_c = np.log(C)
    met = np.exp(log_c[before] + share * (log_c[after] - log_c[before]))
    return np.where((distance <= 0).any(axis=1), met, np.inf)


def isoflop_minimum(N, L):
    """Fit the losses L (n,) of sizes N (n,) at one budget as a parabola in log N.

    Return (N at its minimum, the minimum, the parabola as a function of log N), or None if the
    minimum is not between the smallest and the largest N.
    """
    if len(set(N)) < 3:
        return None
    curve = np.poly1d(np.polyfit(np.log(N), L, 2))
    lowest = -curve[1] / (2 * curve[2])
    if curve[2] <= 0 or not np.log(min(N)) < lowest < np.log(max(N)):
        return None
    return np.exp(lowest), curve(lowest), curve
