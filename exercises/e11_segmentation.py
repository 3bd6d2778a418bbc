"""E11: segmentation. Is a model unsure where BPE starts a token?

    python -m pytest exercises -k e11              # level A, 30 minutes

It has been said that byte models find words by themselves: their entropy is high where a token of
BPE starts. The measure is the AUROC of the entropy as a detector of token starts. 0.5 is chance, 1
is perfect. Before such a claim there should be a baseline. The simplest model is the bigram: the
entropy of a byte given the one before, from counted pairs. The simplest detector is no model: it
says that a space starts a token.

The test learns a BPE of 512 on exercises/speeches.txt. It counts the pairs of the same text. In
this BPE the space between two words belongs to the second word.

Read first: token_starts in study/segmentation.py, Bigram in study/counting.py, and the pattern WORD
in bpe.py. The function above token_starts is the answer to this exercise: cover it. The test turns
it off.

Afterwards: on Python code with a BPE of 4,096 a bigram is above 0.5. What is different there? Which
number would show that a trained model knows more of words than the bigram?

    python -m study.segmentation --plot-only
"""
PREDICT = {
    "AUROC of the bigram model's entropy": None,
    "AUROC of the detector which says that a space starts a token": None,
    "AUROC of the bigram, if the space belonged to the word before it": None,
}
# Afterwards: one sentence for each, why it is so.
EXPLAIN = ["", "", ""]


def auroc(scores, positive):
    """Return P(a positive has a higher score than a negative), a tie counted as half: a float.

    scores: (n,); positive: (n,) of bool; both kinds occur. There may be 100,000 scores: comparing
    all pairs takes too long, so use ranks. Equal scores share the mean of their ranks.
    """
    raise NotImplementedError
