"""E7, solved."""
import math

import numpy as np

PREDICT = {
    "MDM, bytes, 1e13 FLOPs: best size, in parameters without embeddings": 1e5,
    "bits per byte lost there by a model of half the best size": 0.1,
}


def parabola(N, L):
    """Return (N*, L*) of the parabola through L against ln N, None without a minimum inside."""
    if len(set(N)) < 3:
        return None
    x = np.log(N)
    c, b, a = np.polyfit(x, L, 2)
    if c <= 0:
        return None
    best = -b / (2 * c)
    if not x.min() < best < x.max():
        return None
    return math.exp(best), a - b**2 / (4 * c)
