"""E3: the causal mask and the likelihood. Which number that falls is still a loss?

    python -m pytest exercises -k e03              # level A, 40 minutes

An AR model claims that exp(-sum of its losses) is the probability of a sequence. This holds only if
each token is predicted from those before it. Two bugs break it: the causal mask is missing, or the
targets are not shifted (position t reads x_t, which it shall predict). Both give a loss that falls,
and falls lower than it should. Nothing crashes.

One property finds both bugs: the probabilities of all V^T sequences must add up to 1. With V = 3
tokens and T = 5 positions there are 243 sequences, so we can simply add.

The predictions are about small models that were trained for 60 steps. The training set holds each
of the 243 sequences equally often, so there is nothing to learn from the past.

Read first: `corrupt` in train_ar.py and `Attention.forward` in model.py. Which positions of the
input does position t see without the mask? Which token does none of them see?

To think about: without its mask a new model, whose head is zero, has a sum of 1. So what must be
done to a model before it is tested?
"""
PREDICT = {
    "no causal mask, trained: sum of the probabilities of all 243 sequences": None,
    "targets not shifted, trained: the same sum": None,
}
# Afterwards: one sentence for each, why it is so.
EXPLAIN = ["", ""]


def total_probability(losses, V, T):
    """Return the sum of the probabilities of all V^T sequences, a float.

    losses: a function. It takes sequences of ids in [0, V), an int64 tensor (N, T), and returns
    the loss of each token in nats, a float64 tensor (N, T).
    """
    raise NotImplementedError


def is_likelihood(losses, V, T):
    """Return whether the probabilities add up to 1, within 1e-4: a bool.

    A sum above 1 is a leak. A sum below 1 is a mistake as well: some of the probability is lost.
    """
    raise NotImplementedError
