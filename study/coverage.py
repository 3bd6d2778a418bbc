"""Simulate studies whose truth is known: how often do the 90% intervals hold it?

    python -m study.report coverage     # minutes; from results/runs.csv

A simulated study has the runs of ours. Its truth is our fit, and its noise that of our budgets.
"""
from collections import defaultdict

import numpy as np
from tqdm import tqdm

import scaling
from scaling import CONFIGURATIONS, pooled_minima, print_table, runs_of
from study.report import gaps_of, rows_of


def from_one_pool(C, N, L, seed, count=400):
    """Return samples as scaling.resample once did: a run may have the residual of any other."""
    rng, free = np.random.default_rng(seed), len(L) - len(set(C)) - 3
    fitted, samples = pooled_minima(C, N, L[None])[3], L[None]
    residuals = (L - fitted[0]) * np.sqrt(len(L) / free)
    while len(samples) <= count:
        drawn = fitted + rng.choice(residuals, (count, len(L)))
        samples = np.concatenate([samples, drawn[pooled_minima(C, N, drawn)[2] > 0]])
    return samples[:count + 1]


def fit_and_noise(C, N, L):
    """Return the fitted losses of runs, and the sd of the noise at their budgets: (n,) each."""
    _, index = np.unique(C, return_inverse=True)
    fitted = pooled_minima(C, N, L[None])[3][0]
    # A residual is smaller than the noise, by the leverage of its run.
    free = np.bincount(index, 1 - np.diagonal(pooled_minima(C, N, np.eye(len(C)))[3]))
    sd = np.sqrt(np.bincount(index, (L - fitted) ** 2) / free.clip(1e-9))
    # Too few runs to tell: as at the budget below.
    for k in np.flatnonzero(free < 0.99):
        sd[k] = sd[k - 1]
    return fitted, sd[index]


def coverage(rows, truth, noise, resample, studies=2000):
    """Return {(objective, "bits" or "G"): in which share of studies an interval holds it (K,)}.

    The losses of the rows are those of truth (n,), with noise of these sd (n,).
    """
    def gaps_from(losses):
        study = [row | {"val_bpb": loss} for row, loss in zip(rows, losses, strict=True)]
        return gaps_of(scaling.fit_minima(study, resample))

    rng, held, true = np.random.default_rng(0), defaultdict(int), gaps_from(truth)
    for _ in tqdm(range(studies), leave=False):
        losses = truth + noise * rng.standard_normal(len(truth))
        for objective, gap in gaps_from(losses).items():
            for name in ("bits", "G"):
                low, high = np.quantile(getattr(gap, name)[1:], (0.05, 0.95), axis=0,
                                        method="nearest")
                value = getattr(true[objective], name)[0]
                # What no study can reach is no test of its interval.
                held[objective, name] += np.where(np.isfinite(value),
                                                  (low <= value) & (value <= high), np.nan)
    return {key: count / studies for key, count in held.items()}


def report(folder):
    rows = sorted(rows_of(folder / "runs.csv"), key=scaling.settings_of)
    fits_and_noise = [fit_and_noise(*runs_of(rows, key)) for key in CONFIGURATIONS]
    truth, noise = np.concatenate(fits_and_noise, axis=1)                               # (n,) each
    scaling.print_by_budget("Noise of a run, sd", {
        (row["objective"], row["tokenizer"], row["flops_budget"]): f"{sd:.3f}"
        for row, sd in zip(rows, noise, strict=True)})
    budgets = [f"{budget:g}" for budget in scaling.fit_minima(rows)["ar", "bpe"].budgets]
    lines = []
    for name, resample in (("one pool", from_one_pool), ("by budget", scaling.resample)):
        for (objective, number), shares in coverage(rows, truth, noise, resample).items():
            marks = np.where((shares < 0.85) | (shares > 0.95), " *", "")
            lines.append([objective.upper(), number, name,
                          *("" if np.isnan(share) else f"{share:.1%}{mark}"
                            for share, mark in zip(shares, marks, strict=True))])
    print_table("How many 90% intervals hold the truth (* not 85 to 95%)",
                ["objective", "number", "residuals", *budgets], sorted(lines))
