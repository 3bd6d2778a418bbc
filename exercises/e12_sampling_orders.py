"""E12: sampling orders. In which order may an MDM fill in its text?

    python -m pytest exercises -k e12              # level B, 60 minutes

An MDM predicts every masked position, each independently of the others. sample.fill turns that into
a sampler. It fills one position a step or many, in random order or the most confident first. Which
of these samplers draw from the model's own distribution? For three bits one can tell exactly.

The first model of the test is perfect: it knows the exact distribution of three bits. The first is
1 with probability 0.6, and each other one equals its left neighbour with probability 0.9. So what
a sampler gets wrong is the sampler's fault alone. The distance of two distributions p and q is
their total variation, half of sum |p - q|: 0 if they are the same, 1 if they share nothing.

Read first: sample.fill.

Afterwards: how far is random order, three steps, from the model? Would it help to choose the
position before its bit is drawn, by the most likely bit?
"""

MASK = 2

PREDICT = {
    "total variation from the model: all three bits in one step": None,
    "total variation: three steps, the most confident first": None,
    "total variation: the same at temperature 0, always the most likely bit": None,
}
# Afterwards: one sentence for each, why it is so.
EXPLAIN = ["", "", ""]


def one_step(predict):
    """Return how likely each sequence is if all three bits are filled in one step: (2, 2, 2).

    predict: a function of a sequence of three, each 0, 1 or MASK, that returns the probabilities of
    both bits at each position: (3, 2). p[a, b, c] is the probability of the sequence (a, b, c).
    """
    raise NotImplementedError


def random_order(predict):
    """Return the same (2, 2, 2) for three steps, one position a step, in random order.

    All orders are equally likely. Do not assume that predict is perfect: for a real model the order
    changes the probability of a sequence.
    """
    raise NotImplementedError


def confident(predict):
    """Return the same (2, 2, 2) for sample.fill with order="confident" and three steps.

    In each step a bit is drawn for every masked position. The position whose drawn bit was the most
    likely keeps it. The other draws are forgotten. There are no ties.
    """
    raise NotImplementedError
