"""E12, solved by enumeration."""
import itertools

import numpy as np

MASK = 2

PREDICT = {
    "total variation from the model: all three bits in one step": 0.5,
    "total variation: three steps, the most confident first": 0,
    "total variation: the same at temperature 0, always the most likely bit": 0.5,
}
# Afterwards: one sentence for each, why it is so.
EXPLAIN = ["", "", ""]


def one_step(predict):
    """Return how likely each sequence is if all three bits are filled in one step: (2, 2, 2)."""
    first, second, third = predict((MASK, MASK, MASK))
    return np.einsum("i,j,k->ijk", first, second, third)


def random_order(predict):
    """Return the same for three steps, one position a step, in random order."""
    p = np.zeros((2, 2, 2))
    orders = list(itertools.permutations(range(3)))
    for order, bits in itertools.product(orders, itertools.product((0, 1), repeat=3)):
        seen, probability = [MASK] * 3, 1.0
        for i in order:
            probability *= predict(seen)[i][bits[i]]
            seen[i] = bits[i]
        p[bits] += probability / len(orders)
    return p


def confident(predict):
    """Return the same for three steps, the most confident first."""
    p = np.zeros((2, 2, 2))

    def extend(seen, probability):
        masked = [i for i in range(3) if seen[i] == MASK]
        if not masked:
            p[tuple(seen)] += probability
            return
        now = predict(seen)
        for drawn in itertools.product((0, 1), repeat=len(masked)):
            chances = [now[i][bit] for i, bit in zip(masked, drawn, strict=True)]
            kept = np.argmax(chances)
            after = list(seen)
            after[masked[kept]] = drawn[kept]
            extend(after, probability * np.prod(chances))

    extend([MASK] * 3, 1.0)
    return p
