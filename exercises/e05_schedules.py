"""E5: schedules. What changes when the mask rate follows the time in another way?

    python -m pytest exercises -k e05              # level B, 60 minutes

A schedule m says which share of the tokens is masked at time u: each with probability m(u). The
time u is uniform in (0, 1). Here m(u) = u^p. The weight of a masked token is m'(u) / m(u).

study.train.corrupt_by draws the number of masked tokens as k = ceil(T m(u)), and then k of the T
positions, all sets of k alike. It weighs a masked token by 1 / (k P(k)).

Papers report gains from their schedules. Is it a better objective, or less noise, or neither? Here
all masks of one sequence are counted, so the answer is exact. The model is a small Transformer with
random weights, and T = 6.

Read first: train_mdm.corrupt, then SCHEDULES and corrupt_by in study/train.py.

Gradient noise is the variance of the gradient that one random mask gives, summed over parameters:
E |g|^2 - |E g|^2. Averaging n masks divides it by n, so twice the noise needs twice the batch.

Afterwards: the schedule with the least noise is known. P(k) is proportional to the root of the
mean of |gradient of nll(S)|^2 over sets S of k, divided by k. Why? Train two runs, with
`python -m study.train mdm --schedule linear` and `bell`: training draws other masks, but the BPB at
the end is the same bound. Is the order of the two what your numbers say?
"""
PREDICT = {
    "bound, p = 2 / p = 1": None,
    "gradient noise, p = 0.5 / p = 1": None,
    "gradient noise, bell / p = 1": None,
}
# Afterwards: one sentence for each, why it is so.
EXPLAIN = ["", "", ""]


def probabilities(T, p):
    """Return P(k) for k = 1 .. T, where k = ceil(T u^p) and u ~ U(0, 1): a numpy array (T,)."""
    raise NotImplementedError


def mean_and_noise(values, P):
    """Return the mean over masks of what a schedule estimates, (n,), and its noise, a float.

    values: {S: numpy array (n,)} for all sets S of masked positions, tuples, but the empty one: the
    cost nll(S), then n is 1; or its gradient with respect to n parameters. It is not weighted yet.
    P: the probabilities of k = 1 .. T masked tokens, (T,). A mask S gives the estimate
    weight(k) x values[S]. The noise is its variance over masks, summed over the n entries.
    """
    raise NotImplementedError
