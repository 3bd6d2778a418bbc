"""E8: extrapolation. Can a law predict what was not yet trained, and know when it cannot?

    python -m pytest exercises -k e08              # level C, an afternoon

A law is fitted to small budgets and read at large ones. Its 90% interval comes from samples of the
residuals (laws.resample). Here the budgets above 1e13 FLOPs are held out. The surface with one E,
with which the study extrapolates, is fitted to the others. Then the held-out IsoFLOP minima are
compared with its predictions. If the intervals are honest, nine of ten minima lie in them.

Then find a law that predicts better. It sees the runs of one configuration up to 1e13 FLOPs, and
no others. The floor is the mean absolute error of the surface with one E, over the same minima.
You may use all of laws.py.

Read first: laws.pooled_minima, laws.surface_frontier and scaling.predictions.

Afterwards: residuals measure the noise of the runs. What do they not measure? And what does an
error of one sign do to the gap of bytes, as scaling.py extrapolates it?

    python scaling.py --plot-only
"""

PREDICT = {
    "held-out minima in the 90% intervals of the surface, in percent": None,
    "AR, BPE at the largest budget: predicted - measured, in bits per byte": None,
}


def held(samples, measured):
    """Return which measured minima lie in the 90% intervals of their predictions: (K,) of bool.

    samples: predictions (S, K) of K minima, one row for each sample of the losses. measured: (K,).
    Five percent of the samples are below the interval, and five percent are above it.
    """
    raise NotImplementedError


def predict(C, N, D, L, later):
    """Return the lowest loss at each of the larger budgets later (K,), in bits per byte: (K,).

    C, N, D, L (n,): the runs of one configuration: FLOPs, parameters without embeddings, tokens,
    bits per byte. There are several sizes N at each budget, so the lowest loss of a budget is the
    minimum over N. A loss stays positive at every budget, and falls as the budget grows.
    """
    raise NotImplementedError
