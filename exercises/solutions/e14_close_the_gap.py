"""E14, at the small budget: patches of 16. It trains both runs when it is imported, in seconds."""
import contextlib
import functools
import io
import sys
import tempfile
from pathlib import Path

import torch

import model
import study.train
import train_mdm
from study.train import corrupt_spans
from study.variants import Transformer

PREDICT = {
    "bits per byte that your best run gains over plain MDM": 0.9,
}
EXPLAIN = ["A byte is written from those before it in its patch."]

RUNS = tempfile.TemporaryDirectory()
DATA = str(Path(model.__file__).with_name("exercises") / "speeches.txt")


def train(name, *flags):
    """Train a run in this process, which is faster than a new one. Return its folder."""
    out = Path(RUNS.name) / name
    command = ["study.train", "mdm", "--data", DATA, "--out", out, "--device", "cpu", "--width", 32]
    argv, sys.argv = sys.argv, [*map(str, command), *map(str, flags)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        study.train.main()
    sys.argv = argv
    torch.use_deterministic_algorithms(False)
    return out


BASELINE = train("baseline", "--flops", "2e10")
BEST = train("best", "--flops", "2e10", "--patch", 16)


def MODEL(config):
    return Transformer(config)


def LOSS(model, ids, generator):
    inputs, weights = corrupt_spans(ids, model.config.vocab_size, generator,
                                    span=model.config.patch)
    return (weights * model(inputs, ids)).mean()


def EVALUATE(model, sequences, bytes_per_id):
    corrupt = functools.partial(corrupt_spans, span=model.config.patch)
    return train_mdm.evaluate(model, sequences, bytes_per_id, corrupt)
