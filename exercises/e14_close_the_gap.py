"""E14: close the gap. How good can masked diffusion on bytes become for 1e12 FLOPs?

    python -m pytest exercises -k e14              # level C, as long as you like

At 1e12 FLOPs a plain MDM on bytes needs one bit per byte more than the same on BPE. Part of it can
be won back. Change what you like: the flags of study/train.py, its loop, the model. Train two runs
with the same budget, seed and text, beside this file:

    python train_mdm.py --flops 1e12 --width 32 --out exercises/baseline       # a minute or two
    python -m study.train mdm --flops 1e12 ... --out exercises/best

The baseline has 3.788 bits per byte (seed 0). The floor is a gain of 0.85 over it: patches of 8
alone, or tables of n-grams alone, gain a little less. When you pass, the test prints what published
runs gain.

The rules for BEST: MDM on bytes, 512 bytes of context, at most 1e12 FLOPs as PyTorch's profiler
counts them, and at least 16 patches in a sequence, since one patch is read from left to right. The
loss must be a bound. So no prediction may see a masked token, neither its own nor another that is
predicted beside it. (Inside one patch, masked as a whole, the tokens before it may be seen: why?)
The test trains a tiny model on text of known entropy, and no bound is below the entropy.

To try ideas in seconds, use --flops 2e10 and --data exercises/speeches.txt for both runs, and name
that text as DATA. There the floor is 1.05. What helps there need not help at 1e12.

Read first: study/train.py and study/variants.py. What is below serves all flags but --span. If you
write a model or a loss of your own, put it into this file, since the grader has its own copy of all
others. Hand in this file and the two folders. The test takes up to half a minute.
"""
import functools
from pathlib import Path

import train_mdm
from study.train import corrupt_spans
from study.variants import Transformer

PREDICT = {
    "bits per byte that your best run gains over plain MDM": None,
}
# Afterwards: one sentence, why it is so.
EXPLAIN = [""]

# The folders of both runs, and what --data was.
BASELINE = Path(__file__).with_name("baseline")
BEST = Path(__file__).with_name("best")
DATA = "pysrc"


def MODEL(config):
    """Return a new model of a study.variants.Config."""
    return Transformer(config)


def LOSS(model, ids, generator):
    """Return the training loss of ids (B, T), in nats per token."""
    inputs, weights = corrupt_spans(ids, model.config.vocab_size, generator,
                                    span=model.config.patch)
    return (weights * model(inputs, ids)).mean()


def EVALUATE(model, sequences, bytes_per_id):
    """Return the bits per byte of sequences (N, T), an array, and their standard error."""
    corrupt = functools.partial(corrupt_spans, span=model.config.patch)
    return train_mdm.evaluate(model, sequences, bytes_per_id, corrupt)
