"""E9: contiguity. What does a text lose when its bytes are shuffled within blocks?"""
import numpy as np

import study.train

PREDICT = {
    "what the byte before still tells in blocks of 2, in percent": 50.0,
    "what the byte before still tells in blocks of 512, in percent": 0.0,
}
# Afterwards: one sentence for each, why it is so.
EXPLAIN = ["", ""]


def unshuffle(shuffled, block):
    back = np.argsort(study.train.permutation(block))
    return shuffled.reshape(-1, block)[:, back].ravel()


def bits(ids):
    """Return the sum of -log2(frequency) over all ids: the text's length in an ideal code."""
    count = np.unique(ids, return_counts=True)[1]
    return -(count * np.log2(count / len(ids))).sum()


def unigram_bits(ids):
    return bits(ids) / len(ids)


def bigram_bits(ids):
    first, second = ids[:-1].astype(np.int64), ids[1:]
    pairs = first * (ids.max() + 1) + second
    # The pair, less what its first token costs.
    return (bits(pairs) - bits(first)) / len(pairs)
