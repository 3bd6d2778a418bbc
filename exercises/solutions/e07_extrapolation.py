"""A solution of E7: a law whose E is three tenths of the lowest loss."""
import math

import numpy as np

import scaling

PREDICT = {
    "MDM, bytes, 1e13 FLOPs: best size, in parameters without embeddings": 1e5,
    "bits per byte lost there by a model of half the best size": 0.1,
    "held-out minima in the 90% intervals, in percent": 70,
}
EXPLAIN = ["The larger the model, the less it reads.", "A parabola is flat.", "The line is wrong."]


def parabola(N, L):
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


def held(samples, measured):
    low, high = np.quantile(samples, (0.05, 0.95), axis=0)
    return (low <= measured) & (measured <= high)


def predict(C, N, D, L, later):
    budgets = np.unique(C)
    minima = scaling.pooled_minima(C, N, L[None])[0][0]
    E = 0.3 * minima.min()
    slope, start = np.polyfit(np.log(budgets), np.log(minima - E), 1)
    return E + np.exp(start + slope * np.log(later))
