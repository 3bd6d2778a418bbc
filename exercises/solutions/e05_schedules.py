"""E5: schedules. What changes when the mask rate follows the time in another way?"""
import math

import numpy as np

PREDICT = {
    "bound, p = 2 / p = 1": 1.0,
    "gradient noise, p = 0.5 / p = 1": 1.5,
    "gradient noise, bell / p = 1": 0.7,
}
# Afterwards: one sentence for each, why it is so.
EXPLAIN = ["", "", ""]


def probabilities(T, p):
    # k tokens are masked between the times where the rate is (k - 1) / T and k / T.
    times = (np.arange(T + 1) / T) ** (1 / p)                                       # (T + 1,)
    return np.diff(times)


def mean_and_noise(values, P):
    mean, square = 0.0, 0.0
    for S, value in values.items():
        k = len(S)
        weight = 1 / (k * P[k - 1])
        probability = P[k - 1] / math.comb(len(P), k)
        mean = mean + probability * weight * value                                  # (n,)
        square += probability * weight**2 * (value**2).sum()
    return mean, square - (mean**2).sum()
