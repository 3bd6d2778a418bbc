"""study/counting.py: counts made by hand, probabilities by their formula, and the command."""
import csv
import itertools

import numpy as np
import pytest
import torch
from conftest import here

from study import counting

TEXT = np.array([0, 1, 0, 1, 2, 0, 1, 1, 0, 1])
P = np.array([0.4, 0.5, 0.1])


def probabilities(net, inputs):
    """Return what a model gives to each of the tokens at each position of inputs (T,): (T, V)."""
    targets = torch.arange(3)[:, None].expand(3, len(inputs))
    nll = net(torch.tensor(inputs).expand(3, -1), targets)
    return (-nll).exp().T.numpy()


def test_the_bigram_is_the_pairs_of_the_text_backed_off_to_the_unigram():
    assert probabilities(counting.Unigram(P), [3, 0, 2]) == pytest.approx(np.tile(P, (3, 1)))
    after = probabilities(counting.Bigram(P, TEXT), [3, 0, 1, 2])
    # After BOS the unigram. 0 is followed by 1 four times; 1 by 0 twice, by 1 and by 2; 2 by 0.
    expected = [P, ([0, 4, 0] + 1 * P) / (4 + 1), ([2, 1, 1] + 3 * P) / (4 + 3),
                ([1, 0, 0] + 1 * P) / (1 + 1)]
    assert after == pytest.approx(np.array(expected))
    assert after.sum(axis=1) == pytest.approx(1)


def test_the_bag_counts_what_is_visible_in_any_order():
    net = counting.Bag(P, strength=2)
    visible = probabilities(net, [0, 3, 1, 0, 3])
    assert visible == pytest.approx(np.tile(([2, 1, 0] + 2 * P) / (3 + 2), (5, 1)))
    assert probabilities(net, [3, 3]) == pytest.approx(np.tile(P, (2, 1)))


def witten_bell(text, context, byte):
    """Return p(byte | context) by the formula, from a count of every place in text."""
    if context is None:
        return 1 / 256
    n = len(context)
    follow = [text[k + n] for k in range(len(text) - n) if text[k:k + n] == context]
    kinds = max(1, len(set(follow)))
    lower = witten_bell(text, context[1:] if n else None, byte)
    return (follow.count(byte) + kinds * lower) / (len(follow) + kinds)


def test_ngram_models_follow_their_formula_and_sum_to_one():
    text, positions = b"ab ab  ac ab abcabc", np.array([[4, 9], [3, 7]])
    sequences = np.frombuffer(b"xxab abcabac abxab c", dtype=np.uint8).reshape(2, 10)
    models = counting.ngrams(np.frombuffer(text, np.uint8), sequences.astype(int), positions, 3)
    for order, p in zip((1, 2, 3), models, strict=True):
        assert p.shape == (2, 2, 256) and p.sum(axis=2) == pytest.approx(np.ones((2, 2)))
        for n, k, byte in itertools.product(range(2), range(2), b"abc x"):
            context = sequences[n, positions[n, k] - order:positions[n, k]].tobytes()
            assert p[n, k, byte] == pytest.approx(witten_bell(text, context, byte))


def test_the_command_writes_a_line_for_each_baseline(workplace):
    done = here(workplace, "study.counting", "--data", "text.txt", "--out", "counted")
    assert done.returncode == 0, done.stderr
    with open(workplace / "counted" / "baselines.csv") as file:
        rows = list(csv.DictReader(file))
    bpb = {(row["tokenizer"], row["baseline"]): float(row["val_bpb"]) for row in rows}
    assert len(bpb) == len(done.stdout.splitlines()) == 8
    assert bpb["byte", "uniform"] == pytest.approx(8)
    assert all(bpb[name, "bigram"] < bpb[name, "unigram"] < bpb[name, "uniform"]
               for name in ("byte", "bpe"))
