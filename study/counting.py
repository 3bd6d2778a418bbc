"""What counting alone gives, in bits per byte: a model below these lines has learned something.

    python counting.py                   # writes results/baselines.csv, which scaling.py draws

uniform  all tokens are equally likely
unigram  a token is as likely as it is in the training text
bigram   for AR: the pairs of the training text (Witten and Bell, 1991)
bag      for MDM: the tokens that are visible in the sequence, in any order, and the unigram

Each is a model with the interface of the Transformer, so that train_ar.evaluate and
train_mdm.evaluate read it as they read a trained one. ngrams() goes on to longer contexts.
"""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

import data
import run
import train_ar
import train_mdm

COUNTED = 2**27                                   # tokens of training text
STRENGTHS = (3, 10, 30, 100, 300, 1000, 3000)     # of the unigram in a bag, in tokens
COLUMNS = ("tokenizer", "vocab_size", "context_bytes", "sha256", "baseline", "val_bpb")


class Unigram(nn.Module):
    """The same probabilities (V,) at every position. The special id has none."""

    def __init__(self, probabilities):
        super().__init__()
        # A parameter, since evaluate asks for the device of one.
        self.p = nn.Parameter(torch.as_tensor(probabilities), requires_grad=False)
        self.config = SimpleNamespace(vocab_size=len(probabilities), patch=1)

    def probability(self, inputs, targets):
        return self.p[targets]

    def forward(self, inputs, targets):
        """Return the loss of each token in nats (B, T)."""
        return -self.probability(inputs, targets).log()


class Bigram(Unigram):
    """p(b | a) = (count of ab + u p(b)) / (count of a + u), u: kinds of tokens that follow a."""

    def __init__(self, probabilities, text):
        super().__init__(probabilities)
        V = len(probabilities)
        pairs, count = np.unique(text[:-1].astype(np.int64) * V + text[1:], return_counts=True)
        self.pairs, self.count = torch.from_numpy(pairs), torch.from_numpy(count)
        # With the special id, which nothing is counted for: after it, the unigram alone.
        self.kinds = torch.from_numpy(np.bincount(pairs // V, minlength=V + 1).clip(1))
        self.total = torch.from_numpy(np.bincount(pairs // V, count, minlength=V + 1))

    def probability(self, inputs, targets):
        pair = inputs * len(self.p) + targets
        at = torch.searchsorted(self.pairs, pair).clamp(max=len(self.pairs) - 1)
        count = torch.where(self.pairs[at] == pair, self.count[at], 0)
        kinds = self.kinds[inputs]
        return (count + kinds * self.p[targets]) / (self.total[inputs] + kinds)


class Bag(Unigram):
    """(count among the visible tokens + strength p) / (visible tokens + strength)."""

    def __init__(self, probabilities, strength):
        super().__init__(probabilities)
        self.strength = strength

    def probability(self, inputs, targets):
        visible = inputs != len(self.p)
        counts = torch.zeros(len(inputs), len(self.p) + 1, dtype=torch.float64)
        counts.scatter_add_(1, inputs, visible.double())
        seen = counts.gather(1, targets)                                                # (B, T)
        total = visible.sum(dim=1, keepdim=True)                                        # (B, 1)
        return (seen + self.strength * self.p[targets]) / (total + self.strength)


def baselines(corpus, context_bytes):
    """Return {name: bits per byte} of a corpus, on the sequences that judge all but tiny runs."""
    V, context = corpus.tokenizer.vocab_size, corpus.tokens(context_bytes)
    bytes_per_id = corpus.tokenizer.bytes_per_id
    val = data.Sequences(corpus.val, context).spaced(max(16, train_ar.VAL_BYTES // context_bytes))
    text = np.asarray(corpus.train[:COUNTED])
    # As if each token had been seen once more.
    counts = np.bincount(text, minlength=V) + 1.0
    p = counts / counts.sum()
    # The strength is chosen on training text.
    some = data.Sequences(corpus.train, context).spaced(256)
    strength = min(STRENGTHS, key=lambda s: train_mdm.evaluate(Bag(p, s), some, bytes_per_id)[0])
    return {"uniform": train_ar.evaluate(Unigram(np.full(V, 1 / V)), val, bytes_per_id)[0],
            "unigram": train_ar.evaluate(Unigram(p), val, bytes_per_id)[0],
            "bigram": train_ar.evaluate(Bigram(p, text), val, bytes_per_id)[0],
            "bag": train_mdm.evaluate(Bag(p, strength), val, bytes_per_id)[0]}


def count(text, length):
    """Return the strings of length bytes in text (uint8) as sorted numbers, and their counts."""
    n = len(text) - length + 1
    strings = np.zeros(n, dtype=np.uint64)
    for k in range(length):
        strings <<= np.uint64(8)
        strings |= text[k:k + n]
    return np.unique(strings, return_counts=True)


def ngrams(text, sequences, positions, orders):
    """Yield what n-gram models of bytes predict, of orders 1 to orders (at most 7): (N, P, 256).

    p(b | c) = (count of cb + u p(b | c without its first byte)) / (count of c + u), c: the bytes
    before, as many as the order says; u: the kinds of bytes that follow c in text (uint8). By
    Witten and Bell (1991). Order 0 mixes the unigram so with equal chances for all bytes.
    sequences (N, T), positions (N, P), none of them below orders.
    """
    p = np.full((*positions.shape, 256), 1 / 256)
    context = np.zeros(positions.shape, dtype=np.uint64)
    for order in range(orders + 1):
        if order > 0:
            further = np.take_along_axis(sequences, positions - order, 1).astype(np.uint64)
            context |= further << np.uint64(8 * (order - 1))
        strings, counts = count(text, order + 1)
        wanted = (context[..., None] << np.uint64(8)) + np.arange(256, dtype=np.uint64)
        at = np.searchsorted(strings, wanted).clip(max=len(strings) - 1)            # (N, P, 256)
        seen = np.where(strings[at] == wanted, counts[at], 0)                       # (N, P, 256)
        # Where c was never seen, the lower order stands.
        kinds = (seen > 0).sum(axis=2, keepdims=True).clip(1)                       # (N, P, 1)
        p = (seen + kinds * p) / (seen.sum(axis=2, keepdims=True) + kinds)
        if order > 0:
            yield p


def main():
    parser = run.make_parser(__doc__)
    flag = parser.add_argument
    flag("--data", default="pysrc", help="a corpus by name, or a file or folder")
    flag("--vocab", type=run.number(int, 257, 65536), default=4096)
    flag("--context", type=run.number(int, 1, 2**20), default=512, help="bytes in a sequence")
    flag("--out", type=run.path, default=Path("results"), help="folder of baselines.csv")
    args = parser.parse_args()
    rows = []
    for tokenizer in ("byte", "bpe"):
        corpus = data.load(args.data, tokenizer, args.vocab)
        for name, bpb in baselines(corpus, args.context).items():
            rows.append([tokenizer, corpus.tokenizer.vocab_size, args.context,
                         corpus.meta["sha256"], name, bpb])
            print(f"{tokenizer:4}  {name:7}  {bpb:.3f} bits per byte", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    run.write_csv(args.out / "baselines.csv", COLUMNS, rows)


if __name__ == "__main__":
    run.run_script(main)
