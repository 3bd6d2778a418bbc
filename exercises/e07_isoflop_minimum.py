"""E7: the IsoFLOP minimum. Which model size is best for a budget?

    python -m pytest exercises -k e07              # level A, 30 minutes

One budget of FLOPs can train a small model on much text, or a large one on little text. A parabola
through the losses of several sizes finds the best size: the IsoFLOP minimum. Every scaling law of
this repository rests on such minima. So two questions matter. How flat is the minimum? And when do
the runs not show it at all?

Read first: scaling.analyse and laws.pooled_minima; the figure results/isoflops.png.
The figure shows the best sizes, so fill in PREDICT before you look at it.

Afterwards: laws.pooled_minima fits all budgets of a configuration at once. Where does it put this
minimum, and which of the two numbers would you trust?

    python scaling.py --plot-only
"""

PREDICT = {
    "MDM, bytes, 1e13 FLOPs: best size, in parameters without embeddings": None,
    "bits per byte lost there by a model of half the best size": None,
}


def parabola(N, L):
    """Return (N*, L*), the minimum of the parabola through the losses of one budget, or None.

    N: parameters of the runs (n,); L: their losses (n,), in bits per byte. Several runs may have
    the same size. The parabola is one of L against ln N, by least squares. Return None if the runs
    do not show a minimum: fewer than three different sizes, a parabola without a minimum, or a
    minimum that is not between the smallest and the largest size.
    """
    raise NotImplementedError
