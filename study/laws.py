"""Scaling laws: of model size and text, and of the best loss at a budget.

    L(N, D) = E + A / N^alpha + B / D^beta   N parameters after D tokens (arXiv 2203.15556): fit_law
    L*(C)   = E + K / C^gamma                the best size at C FLOPs: fit_frontiers

An ideal model reaches the same bits per byte of a text, whatever its tokenizer, so the frontiers
share E. Two frontiers with one E meet at most once.
"""
import numpy as np
from matplotlib.figure import Figure

from scaling import CONFIGURATIONS, resample, runs_of
from study.sweep import COLORS

# The exponents that are tried, of a law of size and text and of a frontier.
EXPONENTS = np.geomspace(0.03, 1.5, 15)
GAMMAS = np.geomspace(0.003, 2, 1000)


# ---- A law of size and text.

def grid_of(values):
    """Return all pairs of values: (len(values)^2, 2)."""
    return np.stack(np.meshgrid(values, values), axis=-1).reshape(-1, 2)


def weighted_law(N, D, L, weights):
    """Return the law (5,) of runs N, D, L (n,) with the least weighted sum of squared errors.

    Variable projection: given the exponents, E, A and B are linear least squares. The exponents are
    searched on a grid (G, 2) that zooms in on its best point. E, A and B are not negative.
    """
    root = np.sqrt(weights / weights.mean())
    N0, D0 = np.exp(np.log(N).mean()), np.exp(np.log(D).mean())
    exponents, step = grid_of(EXPONENTS), np.log(EXPONENTS[1] / EXPONENTS[0])
    least, law = np.inf, None
    for _ in range(14):
        powers = np.stack([(N / N0) ** -exponents[:, :1], (D / D0) ** -exponents[:, 1:]], axis=-1)
        ones = np.ones((*powers.shape[:2], 1))
        # E is free, or zero.
        for X, zeros in ((np.concatenate([ones, powers], axis=-1), 0), (powers, 1)):
            coefficients = np.linalg.pinv(root[:, None] * X) @ (root * L)               # (G, 2..3)
            errors = (root * (L - (X @ coefficients[..., None])[..., 0])) ** 2          # (G, n)
            sse = np.where((coefficients >= 0).all(axis=1), errors.sum(axis=1), np.inf)
            g = sse.argmin()
            if sse[g] < least:
                least, law = sse[g], (*np.zeros(zeros), *coefficients[g], *exponents[g])
        if law is None:
            raise ValueError("no law of this form decreases with N and with D as these runs do")
        E, A, B, alpha, beta = law
        step /= 2
        exponents = (alpha, beta) * np.exp(step * grid_of(np.arange(-2, 3)))
    return np.array([E, A * N0**alpha, B * D0**beta, alpha, beta])


def fit_law(N, D, L, loss="squares", delta=1e-3):
    """Return dict(E=, A=, B=, alpha=, beta=): the law of runs N, D, L (n,).

    N: parameters without embeddings, D: tokens, L: loss. loss: "squares" of L, or "huber", which is
    Huber's function of log L with the threshold delta (arXiv 2203.15556), for runs with outliers.
    """
    N, D, L = (np.asarray(values, dtype=float) for values in (N, D, L))
    law = weighted_law(N, D, L, np.ones(len(N)))
    for _ in range(60 if loss == "huber" else 0):
        # Weights that make the gradient of the squares that of Huber's function.
        E, A, B, alpha, beta = law
        fitted = E + A * N**-alpha + B * D**-beta
        r = np.log(L / fitted)
        r = np.where(np.abs(r) < 1e-9, 1e-9, r)
        previous, weights = law, np.clip(r, -delta, delta) / (fitted**2 * np.expm1(r))
        law = weighted_law(N, D, L, weights)
        if np.allclose(law, previous, rtol=1e-6):
            break
    return dict(zip(("E", "A", "B", "alpha", "beta"), map(float, law), strict=True))


# ---- Frontiers that share E. S: samples of the losses; the first are what was measured.

def losses_at_best_size(rows, fits):
    """Return {configuration: (C (n,), losses (S, n))}, less what a run's size costs it."""
    runs = {}
    for seed, (key, fit) in enumerate(fits.items()):
        C, N, L = runs_of(rows, key)
        best = fit.best[:, np.searchsorted(fit.budgets, C)]                             # (S, n)
        losses = resample(C, N, L, seed)
        runs[key] = C, losses - fit.curvature[:, None] * (np.log(N) - best) ** 2
    return runs


def fit_frontiers(runs, highest):
    """Return E (S,) and {configuration: (K (S,), gamma (S,))}, the most likely.

    runs: {configuration: (C (n,), losses (S, n))}, each with errors of a variance of its own. E is
    at most highest, the lowest loss that was seen.
    """
    grid = np.linspace(0, highest, 61)
    misfit, laws = 0, {}
    for key, (C, L) in runs.items():
        C0 = np.exp(np.log(C).mean())
        X = (C / C0) ** -GAMMAS[:, None]                                                # (G, n)
        length = np.sqrt((X**2).sum(axis=1))                                            # (G,)
        XL, X1 = L @ X.T / length, X.sum(axis=1) / length                       # (S, G), (G,)
        samples, by_entropy = np.arange(len(L)), []
        for E in grid:
            projection = XL - E * X1                  # (S, G): the longer, the better the gamma
            g = projection.argmax(axis=1)
            along = projection[samples, g]
            sse = ((L - E) ** 2).sum(axis=1) - along**2                                 # (S,)
            by_entropy.append((sse, along / length[g] * C0 ** GAMMAS[g], GAMMAS[g]))
        sse, *laws[key] = np.moveaxis(by_entropy, 1, 0)                           # (61, S) each
        misfit = misfit + len(C) * np.log(sse.clip(1e-12))                              # (61, S)
    best = misfit.argmin(axis=0)                                                        # (S,)
    return grid[best], {key: tuple(values[best, samples] for values in law)
                        for key, law in laws.items()}


def frontier(E, law, C):
    """Return the best loss at budgets C (n,): (S, n)."""
    K, gamma = (values[:, None] for values in law)
    return E[:, None] + K * C**-gamma


def parity(byte, bpe, far=1e30):
    """Return the FLOPs at which the frontier of bytes meets that of BPE: (S,), inf beyond far."""
    (K, gamma), (K_bpe, gamma_bpe) = byte, bpe
    with np.errstate(divide="ignore"):
        log_c = np.log(K / K_bpe) / (gamma - gamma_bpe)
    # Bytes that fall no faster never meet BPE.
    return np.exp(np.where((gamma > gamma_bpe) & (log_c < np.log(far)), log_c, np.inf))


def plot_frontiers(path, fits, fitted, E, laws):
    """Draw the laws with their 90% bands, and the minima, hollow where they are not fitted."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    ax = figure.subplots()
    top = max(fit.budgets[-1] for fit in fits.values())
    for key, fit in fits.items():
        color, inside = COLORS[key], fitted[key]
        C = np.geomspace(fit.budgets[0], 100 * top, 300)
        losses, trained = frontier(E, laws[key], C), C <= fit.budgets[-1]               # (S, 300)
        low, high = np.quantile(losses[1:], (0.05, 0.95), axis=0)
        ax.fill_between(C, low, high, color=color, alpha=0.15, linewidth=0)
        ax.plot(C, losses[0], ":", color=color)
        ax.plot(C[trained], losses[0, trained], color=color, lw=2, label=CONFIGURATIONS[key])
        ax.plot(fit.budgets[inside], fit.minima[0, inside], "o", color=color)
        ax.plot(fit.budgets[~inside], fit.minima[0, ~inside], "o", color=color, fillstyle="none")
    ax.set(xscale="log", xlabel="training FLOPs", ylabel="bits per byte, best width",
           title="Frontier laws with one E; dotted: extrapolated; hollow: not fitted")
    ax.legend()
    figure.savefig(path, dpi=120)
