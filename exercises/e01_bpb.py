"""E1: bits per byte. What does a model cost that has learned nothing?

    python -m pytest exercises -k e01              # level A, 30 minutes

The loss of a model is in nats per token. A nat is 1 / ln 2 bits, and a token spells one byte or
many. So losses of two tokenizers cannot be compared. Bits per byte (BPB) can: the bits that the
model needs for a text, divided by the bytes of this text.

A new model of this repository predicts all tokens with equal probability. On bytes it needs
log2(256) = 8 bits per byte. Let it read exercises/speeches.txt as tokens of a BPE, which has 1,024
tokens and was learned from the same text. Predict the three numbers below, then write the two
functions.

Read first: `evaluate` in train_ar.py, which shows how `bpb` is done. Then the docstring of
`Tokenizer` in bpe.py, and the lines on initialization in `Transformer.__init__` in model.py.

To think about: the model on BPE has learned nothing. Who has?
"""
PREDICT = {
    "untrained model on BPE of 1,024 tokens, bits per byte": None,
    "best model that knows only how often each byte occurs, bits per byte": None,
    "best model that knows only how often each token of this BPE occurs, bits per byte": None,
}
# Afterwards: one sentence for each, why it is so.
EXPLAIN = ["", "", ""]


def bpb(nats, ids, bytes_per_id):
    """Return the bits per byte of a text, a float.

    nats: (N, T), a float64 array: the loss of each token. ids: (N, T), an integer array: the
    tokens. bytes_per_id: (V,), an integer array: how many bytes each id of the vocabulary spells.
    """
    raise NotImplementedError


def piece_bytes(pieces):
    """Return how many bytes of text each token of a vocabulary spells: a list of ints.

    SentencePiece, of Llama 2, lists its tokens as str. Text is in UTF-8, and four rules hold:

    - U+2581 ("\u2581") stands for a space, anywhere in a token.
    - "<0x00>" to "<0xFF>", two hexadecimal digits in capitals, stands for that byte.
    - "<s>" and "</s>" mark the start and the end. They spell nothing.
    - Any other token spells its characters.
    """
    raise NotImplementedError
