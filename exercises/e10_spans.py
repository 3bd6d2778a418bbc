"""E10: spans and patches. What does a perfect model pay for masking neighbours together?

    python -m pytest exercises -k e10              # level B, 60 minutes

`--span s` of study/train.py masks s neighbours together. It should help: a word is harder to guess
than a letter, so a model could learn more from it. In the results of the repository it does not
help. Is it the model, or is it the loss?

A perfect model decides this, since it has nothing to learn. The text is T = 6 bits: the first is
fair, and each next one differs from the one before with probability 0.1. All 64 sequences can be
listed, so every conditional probability is known. Whatever the loss is above the entropy, 3.345
bits, is what the objective itself costs.

The bound with spans: k of the R = T / s spans are masked, k is uniform over 1 .. R, and all sets of
k spans are equally likely. The loss of the masked tokens is weighed by R / k. A masked token can be
predicted in two ways:

    --span     each masked token by itself, given the visible tokens
    --patch    in each masked span from left to right: also given the tokens before it in its span

Do E4 first. Read corrupt_spans in study/train.py.

A hint: the mean of -log2 p(x_i | x_A) over the sequences, weighted by p, is a difference of two
entropies.

Afterwards: what do single masked tokens cost above the entropy, and why? (Reveal the tokens one at
a time, in random order.) The loss of one span of two exceeds its entropy by a quantity with a name.
Which? What would it be on real text for spans of 2 and 16 bytes?
"""
PREDICT = {
    "spans of 2, each token by itself: bits above the entropy": None,
    "spans of 3, each token by itself: bits above the entropy": None,
    "spans of 2, from left to right inside: bits above the entropy": None,
}
# Afterwards: one sentence for each, why it is so.
EXPLAIN = ["", "", ""]


def entropy(p, positions):
    """Return the entropy in bits, a float, of the tokens at these positions: 0 for no position.

    p: the probabilities of all sequences, a numpy array with T axes of V entries each.
    positions: a set of numbers in 0 .. T - 1.
    """
    raise NotImplementedError


def expected_bound(p, span, left_to_right):
    """Return the bound of a perfect model in bits per sequence, a float: the mean, weighted by p.

    p: as above. span: tokens in a span; it divides T, and spans start at 0, span, 2 span ..
    left_to_right: whether a masked token is predicted given those before it in its own span, too.
    """
    raise NotImplementedError
