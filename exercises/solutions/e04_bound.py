"""E4: the MDM bound, a loss that is no bound, and what the weights have to do with noise."""
import itertools
import math

import torch

PREDICT = {
    "(b) two equal fair bits, predicted jointly: the bound with this nll, in bits": 1.0,
    "(c) T = 512, weight 1/t: standard deviation, in percent": 4.0,
}
# Afterwards: one sentence for each, why it is so.
EXPLAIN = ["", ""]


def bound(nll, T):
    total = 0.0
    for k in range(1, T + 1):
        for S in itertools.combinations(range(T), k):
            # The integral of t^(k - 1) (1 - t)^(T - k) over t.
            total += nll(S) / (k * math.comb(T, k))
    return total


def probability(p, x, positions):
    """Return the probability of the tokens of x at these positions."""
    others = tuple(i for i in range(len(x)) if i not in positions)
    return p.sum(axis=others)[tuple(x[i] for i in sorted(positions))]


def masked_nll(p, x, S, jointly):
    visible = {i for i in range(len(x)) if i not in S}
    total = 0.0
    for group in [S] if jointly else [(i,) for i in S]:
        whole = probability(p, x, visible.union(group))
        total -= math.log2(whole / probability(p, x, visible))
    return total


def estimates(T, n, smallest, generator):
    t = smallest + (1 - smallest) * torch.rand(n, 1, generator=generator)
    k = (torch.rand(n, T, generator=generator) < t).sum(dim=1)
    return k / t[:, 0] / T
