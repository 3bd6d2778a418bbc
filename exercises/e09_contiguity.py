"""E9: contiguity. What does a text lose when its bytes are shuffled within blocks?

    python -m pytest exercises -k e09              # level B, 45 minutes

`--shuffle W` of study/train.py puts the bytes of every block of W into another order, the same in
every block. Nothing is lost: the order can be undone. So the entropy of the text is what it was.
But a model that looks at what is near may pay. Here the models are the two smallest: counts of
bytes, and of pairs of neighbours. Both are counted on the text that they encode,
exercises/speeches.txt.

Read first: Sequences in data.py, then Sequences and permutation in study/train.py.

Afterwards: how much do the unigram bits grow, and why? Why does the last number not reach zero?
Nothing is left to know in a block of 512. Then train two models on shuffled text, and the same two
without `--shuffle`. Which loses more?

    python -m study.train ar --flops 2e11 --width 16 --shuffle 4
    python -m study.train mdm --flops 2e11 --width 16 --shuffle 4
"""
PREDICT = {
    # unigram_bits - bigram_bits is what the byte before tells. Of the text as it is, this is 100%.
    "what the byte before still tells in blocks of 2, in percent": None,
    "what the byte before still tells in blocks of 512, in percent": None,
}
# Afterwards: one sentence for each, why it is so.
EXPLAIN = ["", ""]


def unshuffle(shuffled, block):
    """Return the text as it was before it was shuffled in blocks: an array (N,).

    shuffled: an array of ids (N,), where block divides N. study.train.permutation(block), (block,),
    is the order: position j of a shuffled block holds what was at position permutation[j].
    """
    raise NotImplementedError


def unigram_bits(ids):
    """Return the entropy of a token in bits, a float, by the counts of the ids (N,) themselves."""
    raise NotImplementedError


def bigram_bits(ids):
    """Return the entropy in bits, a float, of a token given the one before it.

    By the counts of all N - 1 pairs of neighbours in ids (N,): the mean of -log2 of (how often the
    pair occurs / how often its first token is the first of a pair).
    """
    raise NotImplementedError
