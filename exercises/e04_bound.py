"""E4: the MDM bound, a loss that is no bound, and what the weights have to do with noise.

    python -m pytest exercises -k e04              # level B, 60 minutes

MDM's loss is an upper bound on the code length -log2 p(x). With a time t ~ U(0, 1) each of the T
tokens is masked with probability t. S is the set of masked positions, and nll(S) is the cost of
the masked tokens in bits:

    bound = E_t E_S [1/t nll(S)],      nll(S) = sum over i in S of -log2 p(x_i | the visible tokens)

Comparisons of models rest on this number. If it is not a bound, a model can look better than any
model can be. If it is noisy, a better model can look worse.

(a) train_mdm.corrupt draws no t. It draws k, the number of masked tokens, uniformly from 1 .. T,
    and then k of the T positions. By what must nll(S) be multiplied, so that the mean over k and
    S is the bound above? Write `bound`. Take the integral over t of (probability of S) / t for a
    set S of k positions.
(b) The nll above predicts each masked token by itself. Would it not be better to predict all of
    them jointly, as -log2 p(x_S | the visible tokens)? Write `masked_nll` for a model that knows
    the distribution p of the text exactly. Then what exceeds the entropy comes from the objective.
(c) An untrained model gives every token the same cost. So its bound is known: T times this cost.
    How well does one sequence estimate it, with a weight of 1/t? Write `estimates`.

Read first: train_mdm.corrupt, and its docstring. Its time u is our t. (The docstring of the file
gives the answer to (a).)

Afterwards: estimate the same bound with the weights of train_mdm.corrupt. Why is there no noise at
all? And a code needs sum over x of 2^(-length of x) <= 1. Put in the joint losses of the two equal
bits; 01 and 10 cost infinitely much, so they add 0.
"""
PREDICT = {
    # Two fair bits that are always equal have an entropy of 1 bit.
    "(b) two equal fair bits, predicted jointly: the bound with this nll, in bits": None,
    # In percent of the bound. t is uniform from 0.001 to 1.
    "(c) T = 512, weight 1/t: standard deviation, in percent": None,
}
# Afterwards: one sentence for each, why it is so.
EXPLAIN = ["", ""]


def bound(nll, T):
    """Return the bound of a sequence of T tokens in bits, a float, exactly: over all masks.

    nll: a function of a tuple S of positions in 0 .. T - 1, in rising order, not empty: the cost of
    the masked tokens in bits. T is at most 8.
    """
    raise NotImplementedError


def masked_nll(p, x, S, jointly):
    """Return the cost in bits, a float, of the masked tokens x_S given the visible tokens of x.

    p: the probabilities of all sequences, a numpy array with T axes of V entries each.
    x: the sequence, a tuple of T ids. S: the masked positions, a tuple.
    jointly: False: each masked token is predicted by itself. True: all of them as a whole.
    """
    raise NotImplementedError


def estimates(T, n, smallest, generator):
    """Return n estimates of the bound of an untrained model, divided by it: a tensor (n,).

    Each is of one sequence of T tokens: draw one t, uniform from smallest to 1; mask each token
    with probability t; weigh each masked token by 1/t. The mean of the estimates is 1.
    generator: a torch.Generator, for all that is random.
    """
    raise NotImplementedError
