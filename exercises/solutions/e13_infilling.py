"""E13, solved by Bayes."""
import torch

import train_ar

PREDICT = {
    "bits of a byte, given the byte before it": 3.5,
    "bits of a byte, given both neighbours, by the same bigram model": 3.0,
}
# Afterwards: one sentence for each, why it is so.
EXPLAIN = ["", ""]


def fill_one(model, left, right):
    """Return the probability of each token in a gap of one token, given both sides: (V,)."""
    V = model.config.vocab_size
    candidates = torch.arange(V)[:, None]
    ids = torch.cat([left.expand(V, -1), candidates, right.expand(V, -1)], dim=1)   # (V, T)
    inputs, _ = train_ar.corrupt(ids, V)
    nll = model(inputs, ids).sum(dim=1)                                             # (V,)
    return (-nll).softmax(dim=0)
