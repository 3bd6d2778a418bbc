"""The efficiency gap without a law; scaling laws that share one entropy; frontiers and parity.

    L(N, D) = E + A / N^alpha + B / D^beta      the surface: the loss of N parameters after D tokens
                                                (Hoffmann et al., arXiv 2203.15556)
    L*(C)   = E + K / C^gamma                   the frontier law: the loss of the best N at C FLOPs
    G(C)    = C_byte / C                        the gap, where L*_byte(C_byte) = L*_bpe(C)

The gap is first read without a law, from the IsoFLOP minima of the budgets that were trained. Laws
come after it. All configurations of a corpus share E: an ideal model of bytes or of BPE reaches the
same bits per byte. Functions take S samples of the losses at once; the first is what was measured.
"""
from types import SimpleNamespace

import numpy as np

from model import Config, flops_per_token

NAMES = ("E", "A", "B", "alpha", "beta")
# The exponents that are tried: of a surface, and of a frontier law.
EXPONENTS = np.geomspace(0.03, 1.5, 30)
GAMMAS = np.geomspace(0.003, 2, 1000)
# The widths that a frontier chooses from.
WIDTHS = np.geomspace(4, 2**34, 260)
SAMPLES = 400


# -----------------------------------------------------------------------------------------------
# Without a law: IsoFLOP minima, and what lies between them.

def cells(C, kinds):
    """Return the pairs of kind and budget that runs have (2, K), and which each run has (n,)."""
    kinds = np.zeros(len(C)) if kinds is None else kinds
    return np.unique(np.stack([kinds, C]), axis=1, return_inverse=True)


def pooled_minima(C, N, Y, kinds=None):
    """Fit the losses Y (S, n) of runs of a configuration, of sizes N (n,) at budgets C (n,).

    L = L*(C) + c (ln N - n0 - a ln C)^2: one curvature c, one N* = exp(n0) C^a, and a minimum L* of
    its own for each budget. Written as L = level(C) + c x^2 + (b + d t) x, with x = ln N and
    t = ln C, it is linear: ln N* is -(b + d t) / 2c. Return the minima (S, K) of the K budgets,
    ln N* at each (S, K), the curvature (S,) and the fitted losses (S, n). Without a minimum, the
    curvature is not positive. With kinds of runs (n,), 0 to k - 1, each kind has an n0 and minima
    of its own, in the order of cells.
    """
    (kind, budgets), index = cells(C, kinds)                                            # (K,), (n,)
    kind = kind.astype(int)
    x, t = np.log(N), np.log(C)
    x0, t0 = x.mean(), t.mean()
    levels = np.eye(len(budgets))[index]                                                # (n, K)
    slopes = np.eye(kind.max() + 1)[kind[index]] * (x - x0)[:, None]                    # (n, k)
    X = np.column_stack([levels, slopes, (x - x0) ** 2, (x - x0) * (t - t0)])
    coefficients = np.linalg.lstsq(X, Y.T, rcond=None)[0].T                             # (S, K+k+2)
    c, d = coefficients[:, -2:].T[..., None]                                            # (S, 1)
    b = coefficients[:, len(budgets):-2][:, kind]                                       # (S, K)
    with np.errstate(divide="ignore", invalid="ignore"):
        best = -(b + d * (np.log(budgets) - t0)) / (2 * c)                              # (S, K)
    minima = coefficients[:, :len(budgets)] - c * best**2                               # (S, K)
    return minima, x0 + best, c[:, 0], coefficients @ X.T


def is_outside(log_n, N):
    """Return whether ln N* is not between the smallest and the largest of the sizes N (n,)."""
    return not np.log(N.min()) < log_n < np.log(N.max())


def resample(C, N, L, seed, kinds=None, count=SAMPLES):
    """Return losses (1 + count, n): L (n,) as measured, then samples of it.

    A sample adds to the fitted losses residuals drawn at random, so the design stays as it is. They
    are scaled up for the numbers that were fitted. Samples of curvature <= 0 are drawn again. None
    if L itself has such a curvature, or for too few runs or widths.
    """
    rng = np.random.default_rng(seed)
    kind, _ = cells(C, kinds)[0]
    free = len(L) - len(kind) - len(set(kind)) - 2
    if free < 1 or len(set(N)) < 3:
        return None
    _, _, curvature, fitted = pooled_minima(C, N, L[None], kinds)
    if not curvature[0] > 0:
        return None
    residuals = (L - fitted[0]) * np.sqrt(len(L) / free)
    samples = L[None]
    while len(samples) <= count:
        drawn = fitted + rng.choice(residuals, (count, len(L)))
        samples = np.concatenate([samples, drawn[pooled_minima(C, N, drawn, kinds)[2] > 0]])
    return samples[:count + 1]


def interpolated_gap(byte_budgets, byte, bpe_budgets, bpe):
    """Return G at each budget of BPE from minima byte (S, J) and bpe (S, K): (S, K).

    Between two budgets log loss is a straight line in log C. inf where bytes do not reach the loss
    of BPE within their budgets. Where they had it before their first, G is at most what is given.
    """
    # More compute never makes the best loss worse. Wild samples of few runs can be below 0.
    byte = np.minimum.accumulate(byte, axis=1).clip(1e-9)
    bpe = bpe.clip(1e-9)
    return np.exp(log_compute(np.log(bpe), np.log(byte), byte_budgets) - np.log(bpe_budgets))


def log_compute(wanted, losses, C):
    """Return ln of the compute at which losses (S, J), falling in C (J,), reach wanted (S, K).

    (S, K), inf if beyond C[-1], and at least ln C[0].
    """
    # np.interp wants increasing numbers.
    return np.array([np.interp(-low, -high, np.log(C), right=np.inf)
                     for low, high in zip(wanted, losses, strict=True)])


def trend(C, G):
    """Return the slope of log10 G (S, K) in log10 C (K,), by least squares: decades a decade."""
    t = np.log10(C) - np.log10(C).mean()
    return np.log10(G) @ t / (t**2).sum()


# -----------------------------------------------------------------------------------------------
# One law for one configuration.

def grid_of(values):
    """Return all pairs of values: (len(values)^2, 2)."""
    return np.stack(np.meshgrid(values, values), axis=-1).reshape(-1, 2)


def power_terms(N, D, exponents):
    """Return N^-alpha and D^-beta of runs N, D (n,) for exponents (G, 2): (G, n, 2), of order 1.

    And the units of N and D, by which they are divided.
    """
    N0, D0 = np.exp(np.log(N).mean()), np.exp(np.log(D).mean())
    X = np.stack([(N / N0) ** -exponents[:, :1], (D / D0) ** -exponents[:, 1:]], axis=-1)
    return X, (N0, D0)


def weighted_law(N, D, L, weights):
    """Return the law (5,) of runs N, D, L (n,) with the least weighted sum of squared errors.

    Variable projection: given the exponents, E, A and B are linear least squares. The exponents are
    searched on a grid that zooms in on its best point. E, A and B are not negative.
    """
    root = np.sqrt(weights / weights.mean())
    exponents = grid_of(EXPONENTS[::2])                                                 # (G, 2)
    step = np.log(EXPONENTS[2] / EXPONENTS[0])
    best = np.inf, None
    for _ in range(14):
        powers, (N0, D0) = power_terms(N, D, exponents)
        ones = np.ones((*powers.shape[:2], 1))
        # E is free, or zero.
        for X, zeros in ((np.concatenate([ones, powers], axis=-1), 0), (powers, 1)):
            coefficients = np.linalg.pinv(root[:, None] * X) @ (root * L)               # (G, 2..3)
            errors = (root * (L - (X @ coefficients[..., None])[..., 0])) ** 2          # (G, n)
            sse = np.where((coefficients >= 0).all(axis=1), errors.sum(axis=1), np.inf)
            g = sse.argmin()
            if sse[g] < best[0]:
                best = sse[g], (*np.zeros(zeros), *coefficients[g], *exponents[g])
        if best[1] is None:
            raise ValueError("no law of this form decreases with N and with D as these runs do")
        E, A, B, alpha, beta = best[1]
        step /= 2
        exponents = (alpha, beta) * np.exp(step * grid_of(np.arange(-2, 3)))
    return np.array([E, A * N0**alpha, B * D0**beta, alpha, beta])


def surface_loss(law, N, D):
    """Return the loss of N parameters after D tokens by a law (5,)."""
    E, A, B, alpha, beta = law
    return E + A * N**-alpha + B * D**-beta


def determined(N, D):
    """Return whether runs of N parameters on D tokens can determine the five numbers of a law."""
    return len(set(zip(N, D, strict=True))) >= 5 and len(set(N)) >= 3 and len(set(D)) >= 3


def fit_law(N, D, L, loss="squares", delta=1e-3):
    """Return dict(E=, A=, B=, alpha=, beta=): the law of runs N, D, L (n,).

    N: parameters without embeddings, D: tokens, L: loss. loss: "squares" of L, or "huber", which is
    Huber's function of log L with the threshold delta (Hoffmann et al., arXiv 2203.15556), for runs
    with outliers. E, A and B are not negative. Raises ValueError for numbers that are not positive
    and finite, for too few runs, and for losses that do not fall with N and D.
    """
    N, D, L = (np.asarray(x, dtype=float).ravel() for x in (N, D, L))
    if loss not in ("squares", "huber"):
        raise ValueError(f"loss is squares or huber, not {loss}")
    if not len(N) == len(D) == len(L):
        raise ValueError(f"N, D and L differ in length: {len(N)}, {len(D)} and {len(L)}")
    if not all(np.isfinite(x).all() and (x > 0).all() for x in (N, D, L)):
        raise ValueError("N, D and L must be positive and finite")
    if not determined(N, D):
        raise ValueError("a law needs five different runs, of three different N and three D: there "
                         f"are {len(set(zip(N, D, strict=True)))}, {len(set(N))} and {len(set(D))}")
    law = weighted_law(N, D, L, np.ones(len(N)))
    for _ in range(60 if loss == "huber" else 0):
        # Weights that make the gradient of the squares that of Huber's function.
        fitted = surface_loss(law, N, D)
        r = np.log(L / fitted)
        r = np.where(np.abs(r) < 1e-9, 1e-9, r)
        weights = np.clip(r, -delta, delta) / (fitted**2 * np.expm1(r))
        previous = law
        law = weighted_law(N, D, L, weights)
        if np.allclose(law, previous, rtol=1e-6):
            break
    return dict(zip(NAMES, map(float, law), strict=True))


# -----------------------------------------------------------------------------------------------
# Laws that may share E. For each E of a grid the rest is fitted; E is chosen last.

def best_terms(X, Y, grid):
    """Fit Y (S, n) - E for each E of a grid (K,) by the best of G sets of terms X (G, n, m).

    Return the sums of squared errors (K, S), which set was best (K, S), and its coefficients
    (K, S, m), none of them negative. The sum is inf where no set has such coefficients.
    """
    inverse, Xt, one = np.linalg.pinv(X), np.swapaxes(X, 1, 2), np.ones((Y.shape[1], 1))
    # By linearity the coefficients of Y - E are those of Y less E times those of 1.
    of_Y, of_one = inverse @ Y.T, inverse @ one                                         # (G, m, S)
    # So the sum of squared errors is a - 2 b E + c E^2.
    a = (Y**2).sum(axis=1) - (of_Y * (Xt @ Y.T)).sum(axis=1)                                # (G, S)
    b = Y.sum(axis=1) - (of_Y * (Xt @ one)).sum(axis=1)                                     # (G, S)
    c = len(one) - (of_one * (Xt @ one)).sum(axis=1)                                        # (G, 1)
    # No coefficient is negative if E is between these.
    with np.errstate(divide="ignore", invalid="ignore"):
        limit = of_Y / of_one
    low = np.where(of_one < 0, limit, -np.inf).max(axis=1)                              # (G, S)
    high = np.where(of_one > 0, limit, np.inf).min(axis=1)
    samples = np.arange(len(Y))
    found = []
    for E in grid:
        sse = np.where((low <= E) & (E <= high), a + E * (E * c - 2 * b), np.inf)       # (G, S)
        best = sse.argmin(axis=0)                                                       # (S,)
        coefficients = of_Y[best, :, samples] - E * of_one[best, :, 0]                  # (S, m)
        found.append((sse[best, samples], best, coefficients))
    return tuple(map(np.array, zip(*found, strict=True)))


def profile_surfaces(N, D, Y, grid):
    """Fit surfaces to losses Y (S, n) for each E of a grid (K,): their SSE (K, S), laws (K, S, 5).

    The exponents are those of a grid. It is finer around those that are best for some E and sample.
    """
    coarse = grid_of(EXPONENTS)                                                         # (G, 2)
    X, _ = power_terms(N, D, coarse)
    _, best, _ = best_terms(X, Y, grid)
    nearby = np.exp(np.log(EXPONENTS[1] / EXPONENTS[0]) / 4 * grid_of(np.arange(-2, 3)))
    exponents = (coarse[np.unique(best)][:, None] * nearby).reshape(-1, 2)
    X, units = power_terms(N, D, exponents)
    sse, best, AB = best_terms(X, Y, grid)
    chosen = exponents[best]                                                            # (K, S, 2)
    E = np.broadcast_to(grid[:, None, None], (*sse.shape, 1))
    return sse, np.concatenate([E, AB * units**chosen, chosen], axis=-1)


def profile_frontiers(C, Y, grid):
    """Fit frontier laws to losses Y (S, n) for each E of a grid (K,): (K, S), laws (K, S, 3)."""
    C0 = np.exp(np.log(C).mean())
    X = (C / C0)[:, None] ** -GAMMAS[:, None, None]                                     # (G, n, 1)
    sse, best, K = best_terms(X, Y, grid)
    gamma = GAMMAS[best]                                                                # (K, S)
    E = np.broadcast_to(grid[:, None], sse.shape)
    return sse, np.stack([E, K[..., 0] * C0**gamma, gamma], axis=-1)


def joint_fit(parts, numbers):
    """Choose E for configurations that were profiled: one for all, and one for each.

    parts: {configuration: (n, SSE (K, S))}, n runs. Errors are Gaussian; each configuration has a
    variance of its own. numbers: how many a configuration's law has besides E. Return which E is
    the shared one (S,), which are the separate ones {configuration: (S,)}, how far -2 log
    likelihood rises above its minimum at each E, as measured {configuration or "one E": (K,)}, and
    AICc of one E and of separate ones.
    """
    total = sum(n for n, _ in parts.values())
    deviance = {key: n * np.log(sse / n) for key, (n, sse) in parts.items()}
    shared = sum(deviance.values())
    rises = {key: values[:, 0] - values[:, 0].min() for key, values in
             (deviance | {"one E": shared}).items()}

    def aicc(fitted, entropies):
        # A variance counts, too.
        k = len(parts) * (numbers + 1) + entropies
        return fitted + 2 * k + 2 * k * (k + 1) / (total - k - 1) if total > k + 1 else np.inf

    return (shared.argmin(axis=0), {key: values.argmin(axis=0) for key, values in deviance.items()},
            rises, aicc(shared[:, 0].min(), 1),
            aicc(sum(values[:, 0].min() for values in deviance.values()), len(parts)))


def lack_of_fit(residuals, groups, numbers):
    """Test residuals (n,) of a law of so many numbers against replicates.

    groups: (n, 2), equal for replicates. Return (sd between replicates, their degrees of freedom,
    F, p), nan without replicates. p is how often chance alone has a larger F, by simulation.
    """
    index = np.unique(groups, axis=0, return_inverse=True)[1]
    means = np.bincount(index, residuals) / np.bincount(index)
    pure = ((residuals - means[index]) ** 2).sum()
    df, free = len(residuals) - len(means), len(means) - numbers
    if df < 1 or free < 1:
        return np.nan, df, np.nan, np.nan
    F = ((residuals**2).sum() - pure) / free / (pure / df)
    p = (np.random.default_rng(0).f(free, df, 10**5) > F).mean()
    return np.sqrt(pure / df), df, F, p


# -----------------------------------------------------------------------------------------------
# What follows from the laws. C: budgets in FLOPs (K,), increasing.

def surface_frontier(laws, C, vocab_size, context):
    """Return the lowest loss at each budget, over model widths: (S, K). context: in tokens."""
    # A Config without its integers: all widths at once, and the depths between whole ones too.
    shape = SimpleNamespace(width=WIDTHS, depth=np.maximum(2, WIDTHS / 64), context=context,
                            conv=0, patch=1, padded_vocab=Config(vocab_size).padded_vocab)
    N = WIDTHS * (16 * WIDTHS * shape.depth + 2 * shape.depth + 1)                      # (W,)
    D = C / flops_per_token(shape)[:, None]                                             # (W, K)
    return np.array([(E + A * N[:, None] ** -alpha + B * D**-beta).min(axis=0)
                     for E, A, B, alpha, beta in laws])


def gap(byte, bpe, C):
    """Return G(C) of frontiers byte and bpe (S, K): (S, K), inf if bytes need more than C[-1]."""
    return np.exp(log_compute(bpe, byte, C) - np.log(C))


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
