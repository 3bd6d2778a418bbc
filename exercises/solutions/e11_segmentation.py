"""E11, solved: by the sum of the ranks of the positives."""
import numpy as np

PREDICT = {
    "AUROC of the bigram model's entropy": 0.6,
    "AUROC of the detector which says that a space starts a token": 0.6,
    "AUROC of the bigram, if the space belonged to the word before it": 0.6,
}
# Afterwards: one sentence for each, why it is so.
EXPLAIN = ["", "", ""]


def auroc(scores, positive):
    """Return P(a positive has a higher score than a negative), a tie counted as half."""
    ordered = np.sort(scores)
    below = np.searchsorted(ordered, scores, side="left")
    upto = np.searchsorted(ordered, scores, side="right")
    ranks = (below + upto + 1) / 2
    n, m = positive.sum(), (~positive).sum()
    return (ranks[positive].sum() - n * (n + 1) / 2) / (n * m)
