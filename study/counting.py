"""What counting alone gives, in bits per byte: a model below these lines has learned something.

    python -m study.counting                  # writes results/baselines.csv

uniform  all tokens are equally likely
unigram  a token is as likely as it is in the training text
bigram   for AR: the pairs of the training text (Witten and Bell, 1991)
bag      for MDM: the tokens that are visible in the sequence, in any order, and the unigram
"""
import argparse
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import data
import log
import run
import train_ar
import train_mdm

COUNTED = 2**27                                   # tokens of training text
CONTEXT = 512                                     # bytes in a sequence
STRENGTHS = (3, 10, 30, 100, 300, 1000, 3000)     # of the unigram in a bag, in tokens
COLUMNS = ("tokenizer", "vocab_size", "context_bytes", "sha256", "baseline", "val_bpb")


class Unigram(torch.nn.Module):
    """The same probabilities (V,) at every position, with the interface of the Transformer."""

    def __init__(self, probabilities):
        super().__init__()
        # A parameter, since evaluate asks for the device of one.
        self.p = torch.nn.Parameter(torch.as_tensor(probabilities), requires_grad=False)
        self.config = SimpleNamespace(vocab_size=len(probabilities))

    def forward(self, inputs, targets):
        return -self.p[targets].log()                                                   # (B, T)


class Bigram(Unigram):
    """p(b | a) = (count of ab + u p(b)) / (count of a + u), u: kinds of tokens that follow a."""

    def __init__(self, probabilities, text):
        super().__init__(probabilities)
        V = len(probabilities)
        pairs = np.bincount(text[:-1].astype(np.int64) * V + text[1:], minlength=(V + 1) * V)
        # The last row is the special id's: nothing was seen behind it, so the unigram stands.
        self.pairs = torch.from_numpy(pairs).view(V + 1, V)
        self.kinds = (self.pairs > 0).sum(dim=1).clamp(min=1)                           # (V + 1,)
        self.total = self.pairs.sum(dim=1)                                              # (V + 1,)

    def forward(self, inputs, targets):
        seen, kinds = self.pairs[inputs, targets], self.kinds[inputs]                   # (B, T)
        return -((seen + kinds * self.p[targets]) / (self.total[inputs] + kinds)).log()


class Bag(Unigram):
    """(count among the visible tokens + strength p) / (visible tokens + strength)."""

    def __init__(self, probabilities, strength):
        super().__init__(probabilities)
        self.strength = strength

    def forward(self, inputs, targets):
        visible = inputs != len(self.p)
        counts = torch.zeros(len(inputs), len(self.p) + 1, dtype=torch.float64)
        counts.scatter_add_(1, inputs, visible.double())
        seen, total = counts.gather(1, targets), visible.sum(dim=1, keepdim=True)
        return -((seen + self.strength * self.p[targets]) / (total + self.strength)).log()


def baselines(corpus):
    """Return {name: bits per byte} of a corpus, on the sequences that judge all but tiny runs."""
    V, context = corpus.tokenizer.vocab_size, corpus.tokens(CONTEXT)
    bytes_per_id = corpus.tokenizer.bytes_per_id
    val = data.Sequences(corpus.val, context).spaced(run.VAL_BYTES // CONTEXT)
    text = np.asarray(corpus.train[:COUNTED])
    # As if each token had been seen once more.
    p = (np.bincount(text, minlength=V) + 1) / (len(text) + V)
    # The strength is chosen on training text.
    train = data.Sequences(corpus.train, context).spaced(256)
    strength = min(STRENGTHS, key=lambda s: train_mdm.evaluate(Bag(p, s), train, bytes_per_id)[0])
    models = {"uniform": Unigram(np.full(V, 1 / V)), "unigram": Unigram(p),
              "bigram": Bigram(p, text), "bag": Bag(p, strength)}
    return {name: (train_mdm if name == "bag" else train_ar).evaluate(model, val, bytes_per_id)[0]
            for name, model in models.items()}


def ngrams(text, sequences, positions, orders):
    """Yield what n-gram models of bytes predict, of orders 1 to orders (at most 7): (N, P, 256).

    p(b | c) = (count of cb + u p(b | c without its first byte)) / (count of c + u), c: the bytes
    before, as many as the order says; u: the kinds of bytes that follow c in text (uint8). Order 0
    mixes the unigram so with equal chances for all bytes (Witten and Bell, 1991).
    sequences (N, T), positions (N, P), none of them below orders.
    """
    # Strings as numbers: those in text, and c with each byte that may follow it.
    strings, wanted = np.zeros(len(text) + 1, dtype=np.uint64), np.arange(256, dtype=np.uint64)
    p = 1 / 256
    for order in range(orders + 1):
        # One byte more in front.
        shift = np.uint64(8 * order)
        strings = strings[1:] | text[:len(text) - order].astype(np.uint64) << shift
        if order > 0:
            before = np.take_along_axis(sequences, positions - order, 1).astype(np.uint64)
            wanted = wanted | (before << shift)[..., None]                          # (N, P, 256)
        counted, counts = np.unique(strings, return_counts=True)
        at = np.searchsorted(counted, wanted).clip(max=len(counted) - 1)
        seen = np.where(counted[at] == wanted, counts[at], 0)
        # Where c was never seen, the lower order stands.
        kinds = (seen > 0).sum(axis=-1, keepdims=True).clip(1)                      # (N, P, 1)
        p = (seen + kinds * p) / (seen.sum(axis=-1, keepdims=True) + kinds)
        if order > 0:
            yield p


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    parser.add_argument("--data", default="pysrc", help="a corpus by name, or a file or folder")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the table")
    args, rows = parser.parse_args(), []
    for tokenizer in ("byte", "bpe"):
        corpus = data.load(args.data, tokenizer)
        about = [tokenizer, corpus.tokenizer.vocab_size, CONTEXT, corpus.meta["sha256"]]
        for name, bpb in baselines(corpus).items():
            rows.append([*about, name, bpb])
            print(f"{tokenizer:4}  {name:7}  {bpb:.3f} bits per byte", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    log.write_csv(args.out / "baselines.csv", COLUMNS, rows)


if __name__ == "__main__":
    run.run_script(main)
