"""Scaling laws and what follows from them: fits, compute-optimal frontiers, gap and parity, and how sure they are. numpy alone.

    fit_law(N, D, L)        # one law
    analyse(rows)           # all that the rows of runs.csv tell

Loss after training N parameters on D tokens (Hoffmann et al., arXiv 2203.15556): L(N, D) = E + A / N^alpha + B / D^beta.
Laws are arrays of five numbers (E, A, B, alpha, beta); functions take any number of laws at once, since a bootstrap has many.
"""
import itertools
from types import SimpleNamespace

import numpy as np

from model import Config, flops_per_token
from run import InputError

NAMES = ("E", "A", "B", "alpha", "beta")
EXPONENTS = np.geomspace(0.05, 2.5, 14)     # the first grid, for both; the zoom goes on from its best point
WIDTHS = np.geomspace(4, 65536, 150)        # what a frontier chooses from
CELLS = {("ar", "bpe"): "AR, BPE", ("ar", "byte"): "AR, bytes", ("mdm", "bpe"): "MDM, BPE", ("mdm", "byte"): "MDM, bytes"}
RESAMPLES = 500                             # of the bootstrap
FAR = 1e30                                  # FLOPs: no frontier is followed further


# ---------------------------------------------------------------------------------------------------------------------
# The law.

def nonnegative(gram, moment):
    """Least squares with coefficients >= 0, many problems at once: gram X'X (..., 3, 3) and moment X'y (..., 3) ->
    the coefficients (..., 3), and how much of y'y they explain (...). Exact: every set of positive ones is tried."""
    best, explained = np.zeros(moment.shape), np.zeros(moment.shape[:-1])
    for size in (1, 2, 3):
        for chosen in map(list, itertools.combinations(range(3), size)):
            try:
                part = np.linalg.solve(gram[..., chosen, :][..., chosen], moment[..., chosen, None])[..., 0]
            except np.linalg.LinAlgError:                     # two equal columns somewhere: no set of this kind is needed
                continue
            share = (part * moment[..., chosen]).sum(axis=-1)
            better = (part >= 0).all(axis=-1) & (share > explained)
            explained = np.where(better, share, explained)
            full = np.zeros(moment.shape)
            full[..., chosen] = part
            best = np.where(better[..., None], full, best)
    return best, explained


def project(N, D, L, weights, alpha, beta):
    """The best E, A, B for given exponents: N, D, L (n,), weights (S, n), alpha and beta (S, G) -> (S, G, 3), explained (S, G)."""
    X = np.stack([np.ones((*alpha.shape, len(N))), N ** -alpha[..., None], D ** -beta[..., None]], axis=-1)       # (S, G, n, 3)
    WX = weights[:, None, :, None] * X
    return nonnegative(np.swapaxes(WX, -1, -2) @ X, np.swapaxes(WX, -1, -2) @ L)


def fit_laws(N, D, L, weights):
    """fit_law for many weightings of the same runs: N, D, L (n,), weights (S, n) -> laws (S, 5)."""
    N0, D0, S = np.exp(np.log(N).mean()), np.exp(np.log(D).mean()), len(weights)
    n, d = N / N0, D / D0                                     # columns of order 1
    alpha, beta = (np.tile(grid.ravel(), (S, 1)) for grid in np.meshgrid(EXPONENTS, EXPONENTS))                    # (S, G)
    step, rows = np.log(EXPONENTS[1] / EXPONENTS[0]), np.arange(S)
    for _ in range(9):
        coefficients, explained = project(n, d, L, weights, alpha, beta)
        at = explained.argmax(axis=1)
        best = coefficients[rows, at], alpha[rows, at], beta[rows, at]
        step /= 2
        near = np.exp(step * np.mgrid[-2:3, -2:3].reshape(2, -1))                                                   # (2, 25)
        alpha, beta = best[1][:, None] * near[0], best[2][:, None] * near[1]
    (E, A, B), alpha, beta = best[0].T, best[1], best[2]
    return np.stack([E, A * N0**alpha, B * D0**beta, alpha, beta], axis=1)


def determines(N, D):
    """Whether runs of N parameters on D tokens can determine a law."""
    return len(set(zip(N, D))) >= 5 and len(set(N)) >= 3 and len(set(D)) >= 3


def fit_law(N, D, L):
    """L(N, D) = E + A / N^alpha + B / D^beta by least squares, E, A, B >= 0, by variable projection: the exponents are
    searched on a grid that zooms in, the rest is linear. N: parameters, D: tokens, L: loss, each (n,), n >= 5.
    -> dict(E=, A=, B=, alpha=, beta=). Raises InputError for fewer points than determine it, or numbers that are not positive."""
    N, D, L = (np.asarray(x, dtype=float).ravel() for x in (N, D, L))
    if not len(N) == len(D) == len(L):
        raise InputError(f"N, D and L differ in length: {len(N)}, {len(D)} and {len(L)}")
    if not all(np.isfinite(x).all() and (x > 0).all() for x in (N, D, L)):
        raise InputError("N, D and L are positive, finite numbers")
    if not determines(N, D):
        raise InputError(f"a law of five numbers needs five different points, with three different N and three different D: "
                         f"there are {len(set(zip(N, D)))}, {len(set(N))} and {len(set(D))}")
    return dict(zip(NAMES, map(float, fit_laws(N, D, L, np.ones((1, len(N))))[0])))


# ---------------------------------------------------------------------------------------------------------------------
# What follows from laws: laws is (S, 5), a cell is its vocabulary and its context in tokens, C are budgets in FLOPs (K,).

def sizes(vocab_size, context):
    """Models of all WIDTHS, between the whole depths too: -> N without embeddings (W,), training FLOPs per token (W,)."""
    shape = SimpleNamespace(width=WIDTHS, depth=np.maximum(2, WIDTHS / 64), outputs=Config(vocab_size).outputs, context=context)
    return 16 * WIDTHS**2 * shape.depth + WIDTHS * (2 * shape.depth + 1), flops_per_token(shape)


def frontier(laws, C, vocab_size, context):
    """The lowest loss at each budget over model widths, and the width's place in WIDTHS: -> (S, K), (S, K)."""
    N, flops = sizes(vocab_size, context)
    log_n, log_d = np.log(N)[:, None], np.log(C / flops[:, None])                                   # (W, 1), (W, K)
    lowest = [(loss.min(axis=0), loss.argmin(axis=0)) for E, A, B, alpha, beta in laws
              for loss in [E + A * np.exp(-alpha * log_n) + B * np.exp(-beta * log_d)]]
    return tuple(np.array(part) for part in zip(*lowest))


def gap(byte, bpe, C):
    """G = C_byte / C where the byte frontier at C_byte has the loss of the BPE frontier at C. Frontiers byte, bpe (S, K)
    at budgets C (K,) -> (S, K), inf where the byte frontier does not get there within C."""
    log_c = np.log(C)
    return np.exp([np.interp(-low, -high, log_c, right=np.inf) - log_c for low, high in zip(bpe, byte)])


def parity(byte, bpe, C):
    """The budget at which the byte frontier meets the BPE frontier: (S, K) twice, (K,) -> (S,), inf if not within C."""
    met = byte <= bpe
    at, rows = met.argmax(axis=1), np.arange(len(met))
    before = np.maximum(at - 1, 0)
    high, low = (byte - bpe)[rows, before], (byte - bpe)[rows, at]
    share = np.divide(high, high - low, out=np.ones(len(met)), where=high > low)
    return np.where(met.any(axis=1), np.exp(np.log(C)[before] + share * np.log(C[at] / C[before])), np.inf)


def capacity_gap(byte_laws, bpe_laws, C, byte, bpe):
    """The gap between models of equal N: what the byte model of the size that is best for BPE at C needs over C to reach the
    BPE frontier. Laws (S, 5) twice, budgets (K,), cells -> (S, K), inf if a byte model of that size never gets there."""
    N, flops = sizes(*byte)
    loss, place = frontier(bpe_laws, C, *bpe)
    E, A, B, alpha, beta = byte_laws.T[..., None]                                                   # (S, 1) each
    room = loss - E - A * N[place] ** -alpha
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(room > 0, (B / np.maximum(room, 1e-300)) ** (1 / beta), np.inf) * flops[place] / C


def parabola(N, L):
    """An IsoFLOP curve: L as a parabola in log N. -> (N at its minimum, the minimum, the polynomial), or None if it has no
    minimum between the smallest and the largest N: then the widths do not bracket the optimum."""
    if len(set(N)) < 3:
        return None
    curve = np.poly1d(np.polyfit(np.log(N), L, 2))
    lowest = -curve[1] / (2 * curve[2])
    if curve[2] <= 0 or not np.log(min(N)) < lowest < np.log(max(N)):
        return None
    return np.exp(lowest), curve(lowest), curve


def resample(N, D, count, seed):
    """Weights (count, n) of bootstrap samples of n runs, those left out that do not determine a law; the first row is all ones."""
    rng, rows = np.random.default_rng(seed), [np.ones(len(N))]
    while len(rows) <= count:
        row = rng.multinomial(len(N), np.full(len(N), 1 / len(N)))
        if determines(N[row > 0], D[row > 0]):
            rows.append(row)
    return np.array(rows, dtype=float)


# ---------------------------------------------------------------------------------------------------------------------
# All of it, from the rows of runs.csv.

def analyse(rows):
    """Fits of all that the runs tell: -> a dict with, for each cell, its arrays N, D, L, its bootstrap laws (1 + S, 5) and its frontier
    on the budgets "C"; and for each objective "gap", "parity" and "capacity". The first of each bootstrap is the fit itself."""
    budgets = np.array(sorted({row["flops_budget"] for row in rows}))
    C = np.unique(np.concatenate([np.geomspace(budgets[0] / 3, FAR, 200), budgets]))
    found = {"budgets": budgets, "C": C}
    if len(budgets) < 2:
        raise InputError(f"a law needs two budgets or more, not {len(budgets)}: {budgets[0]:g} FLOPs alone")
    for i, cell in enumerate(CELLS):
        own = [row for row in rows if (row["objective"], row["tokenizer"]) == cell]
        if not own:
            continue
        N, D, L = (np.array([row[key] for row in own], dtype=float) for key in ("params_non_embedding", "tokens", "val_bpb"))
        if len(N) < 6 or not determines(N, D):
            raise InputError(f"{CELLS[cell]}: a law with an interval needs six runs, with three different widths and three different numbers of "
                             f"tokens: there are {len(N)}, with {len(set(N))} and {len(set(D))}")
        laws = fit_laws(N, D, L, resample(N, D, RESAMPLES, seed=i))
        shape = own[0]["vocab_size"], own[0]["context_tokens"]
        found[cell] = {"rows": own, "N": N, "D": D, "L": L, "laws": laws, "shape": shape, "frontier": frontier(laws, C, *shape)[0]}
    for objective in ("ar", "mdm"):
        byte, bpe = found.get((objective, "byte")), found.get((objective, "bpe"))
        if byte and bpe:
            found[objective] = {"gap": gap(byte["frontier"], bpe["frontier"], C),
                                "parity": parity(byte["frontier"][:, C >= budgets[0]], bpe["frontier"][:, C >= budgets[0]], C[C >= budgets[0]]),
                                "capacity": capacity_gap(byte["laws"], bpe["laws"], budgets, byte["shape"], bpe["shape"])}
    return found


def curves(cell):
    """The IsoFLOP curves of a cell of analyse(): budget -> (N, L, parabola or None), N and L (runs,)."""
    at = np.array([row["flops_budget"] for row in cell["rows"]])
    return {C: (cell["N"][at == C], cell["L"][at == C], parabola(cell["N"][at == C], cell["L"][at == C])) for C in sorted(set(at))}
