"""E7: the IsoFLOP minimum, and extrapolation. Does a law know what was not trained?

    python -m pytest exercises -k e07              # level C: 60 minutes, and an open end

One budget of FLOPs can train a small model on much text, or a large one on little. A parabola
through the losses of several sizes finds the best size: the IsoFLOP minimum. Laws are fitted to
such minima, and read at budgets that nobody has trained.

(a) Write `parabola`. How flat is the minimum, and when do the runs not show it at all?
(b) A law says how sure it is: its 90% interval holds 90% of its samples. Write `held`. The test
    holds out the budgets above 1e13 FLOPs. It draws a straight line through the minima of each
    configuration up to 1e13, log loss against log FLOPs, and does so for 400 samples of the losses.
    If the intervals are honest, nine of ten held-out minima lie in them.
(c) Write `predict`, a law that is closer to the held-out minima than this line is.

Read first: scaling.resample, scaling.pooled_minima and scaling.runs_of; the figure
results/isoflops.png. It shows the best sizes, so fill in PREDICT before you look at it.

Afterwards: the samples are made of residuals, which hold the noise of the runs. What do they not
hold? And what does an error of one sign do to the gap of bytes, if it is extrapolated (E8)?
"""
PREDICT = {
    "MDM, bytes, 1e13 FLOPs: best size, in parameters without embeddings": None,
    "bits per byte lost there by a model of half the best size": None,
    "held-out minima in the 90% intervals, in percent": None,
}
# Afterwards: one sentence for each, why it is so.
EXPLAIN = ["", "", ""]


def parabola(N, L):
    """Return (N*, L*), the minimum of the parabola through the losses of one budget, or None.

    N: parameters of the runs (n,), in any order; L: their losses (n,), in bits per byte. Several
    runs may have the same size. The parabola is one of L against ln N, by least squares. Return
    None if the runs do not show a minimum: fewer than three different sizes, a parabola without a
    minimum, or a minimum that is not between the smallest and the largest size.
    """
    raise NotImplementedError


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
