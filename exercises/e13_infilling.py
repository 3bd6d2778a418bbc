"""E13: infilling. AR reads from left to right. Can it fill in a gap all the same?

    python -m pytest exercises -k e13              # level B, 45 minutes

An MDM reads both sides of a gap. An AR model predicts a token from its left side only. But it gives
a probability to every whole sequence, and Bayes does the rest:

    p(x | left, right) = p(left, x, right) / sum over x' of p(left, x', right)

So AR has the answer, at a price. The test counts what the right side is worth with a bigram model
of exercises/speeches.txt: the bits of a byte given the one before it, and given both neighbours.

Read first: train_ar.corrupt and train_ar.loss; Bigram in study/counting.py.

Afterwards: for a gap of one byte AR reads 256 sequences. How many for a gap of two bytes? An MDM
fills it in two steps. Does it have p(x | left, right) exactly?
"""
PREDICT = {
    "bits of a byte, given the byte before it": None,
    "bits of a byte, given both neighbours, by the same bigram model": None,
}
# Afterwards: one sentence for each, why it is so.
EXPLAIN = ["", ""]


def fill_one(model, left, right):
    """Return the probability of each token in a gap of one token, given both sides: (V,).

    left: ids before the gap (n,); right: ids behind it (m,); int64. One of them may be empty, and
    both may be long. model(inputs, targets), both (B, T), returns -log p of each target in nats
    (B, T); it reads what train_ar.corrupt makes of the targets. V = model.config.vocab_size, and V
    is also the id of BOS. Read all V candidates as one batch.
    """
    raise NotImplementedError
