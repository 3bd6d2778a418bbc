"""E10: spans and patches. What does a perfect model pay for masking neighbours together?"""
import itertools
import math

import numpy as np

PREDICT = {
    "spans of 2, each token by itself: bits above the entropy": 0.2,
    "spans of 3, each token by itself: bits above the entropy": 0.2,
    "spans of 2, from left to right inside: bits above the entropy": 0.2,
}
# Afterwards: one sentence for each, why it is so.
EXPLAIN = ["", "", ""]


def entropy(p, positions):
    others = tuple(i for i in range(p.ndim) if i not in positions)
    q = p.sum(axis=others)
    q = q[q > 0]
    return float(-(q * np.log2(q)).sum())


def expected_bound(p, span, left_to_right):
    spans = [range(i, i + span) for i in range(0, p.ndim, span)]
    R = len(spans)
    total = 0.0
    for k in range(1, R + 1):
        for masked in itertools.combinations(spans, k):
            visible = set(range(p.ndim)).difference(*masked)
            bits = 0.0
            for positions in masked:
                known = visible
                for i in positions:
                    bits += entropy(p, known | {i}) - entropy(p, known)
                    if left_to_right:
                        known = known | {i}
            # k is even over 1 .. R.
            total += R / k * bits / math.comb(R, k) / R
    return total
