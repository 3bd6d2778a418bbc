"""E6: compute-optimal tokenization. What does a byte of text cost, for every vocabulary?

    python -m pytest exercises -k e06              # level A, 40 minutes

A budget of FLOPs buys text. With a larger vocabulary a token spells more bytes, so a text has fewer
tokens. But each token pays for a larger head. Which vocabulary reads the most text for a budget,
and does the answer change with the width of the model? No model is trained here: all is exact.

The text is exercises/speeches.txt, and the BPE is learned from it. A BPE of fewer tokens is the
beginning of the same merges. All models read 512 bytes of context: as many tokens as data.py makes
of them.

Read first: `Corpus.tokens` in data.py, `Config.flops_per_token` in model.py, `Tokenizer` in bpe.py.

Afterwards: the cheapest vocabulary reads the most text. Is its model the best for the budget? What
would you have to train? (Section 7 of results/README.md did, and arXiv 2407.13623.) And of the
15 times more compute that bytes need at 3e12 FLOPs (AR): how much is the price of a byte alone?
(There a token of 4,096 spells 3.28 bytes; take width 48.) Last, learn the BPE from one half of the
speeches and measure it on the other: what changes?
"""
PREDICT = {
    "width 32: FLOPs per byte with bytes / with a BPE of 4,096": None,
    "width 576: the same": None,
    # Of 512, 768, 1,024, 1,536, 2,048, 3,072 and 4,096.
    "width 32: the vocabulary with the fewest FLOPs per byte": None,
}
# Afterwards: one sentence for each, why it is so.
EXPLAIN = ["", "", ""]


def bytes_per_token(text, tokenizer):
    """Return how many bytes a token of this text spells on average: a float.

    text: bytes. tokenizer: a bpe.Tokenizer.
    """
    raise NotImplementedError


def flops_per_byte(width, vocab_size, length, context_bytes):
    """Return the FLOPs to train on one byte of text: a float.

    length: the bytes of a token, on average. context_bytes: the bytes of a sequence. Without a BPE
    (vocab_size is 256) a token is a byte, and nothing is rounded. With one the number of tokens is
    rounded to a multiple of 16, as in `Corpus.tokens`. Use model.Config and what it offers.
    """
    raise NotImplementedError


def cheapest(width, lengths, context_bytes):
    """Return the vocabulary size with the fewest FLOPs per byte, an int.

    lengths: {vocabulary size: bytes of a token, on average}.
    """
    raise NotImplementedError
