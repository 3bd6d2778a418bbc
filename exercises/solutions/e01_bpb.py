"""A solution of E1."""
import math
import re

PREDICT = {
    "untrained model on BPE of 1,024 tokens, bits per byte": 10 / 3,
    "best model that knows only how often each byte occurs, bits per byte": 4.5,
    "best model that knows only how often each token of this BPE occurs, bits per byte": 3,
}
# Afterwards: one sentence for each, why it is so.
EXPLAIN = ["", "", ""]


def bpb(nats, ids, bytes_per_id):
    bits = nats.sum() / math.log(2)
    nbytes = bytes_per_id[ids].sum()
    return bits / nbytes


def piece_bytes(pieces):
    lengths = []
    for piece in pieces:
        if piece in ("<s>", "</s>"):
            lengths.append(0)
        elif re.fullmatch("<0x[0-9A-F]{2}>", piece):
            lengths.append(1)
        else:
            text = piece.replace("\u2581", " ")
            lengths.append(len(text.encode("utf-8")))
    return lengths
