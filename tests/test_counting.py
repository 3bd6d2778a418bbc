"""counting.py: probabilities that sum to one, counts made by hand, and the command."""
import csv

import numpy as np
import pytest
import torch
from conftest import here

import counting

TEXT = np.array([0, 1, 0, 1, 2, 0, 1, 1, 0, 1])
P = np.array([0.4, 0.5, 0.1])


def probabilities(net, inputs):
    """Return what a model gives to each of the tokens at each position of inputs (T,): (T, V)."""
    targets = torch.arange(3)[:, None].expand(3, len(inputs))
    nll = net(torch.tensor(inputs).expand(3, -1), targets)
    return (-nll).exp().T.numpy()


def test_the_unigram_is_the_same_everywhere():
    assert probabilities(counting.Unigram(P), [3, 0, 2]) == pytest.approx(np.tile(P, (3, 1)))


def test_the_bigram_is_the_pairs_of_the_text_backed_off_to_the_unigram():
    found = probabilities(counting.Bigram(P, TEXT), [3, 0, 1, 2])
    # After BOS the unigram. 0 is followed by 1 four times; 1 by 0 twice, by 1 and by 2; 2 by 0.
    expected = [P, ([0, 4, 0] + 1 * P) / (4 + 1), ([2, 1, 1] + 3 * P) / (4 + 3),
                ([1, 0, 0] + 1 * P) / (1 + 1)]
    assert found == pytest.approx(np.array(expected))
    assert found.sum(axis=1) == pytest.approx(1)


def test_the_bag_counts_what_is_visible_in_any_order():
    net = counting.Bag(P, strength=2)
    found = probabilities(net, [0, 3, 1, 0, 3])
    assert found == pytest.approx(np.tile(([2, 1, 0] + 2 * P) / (3 + 2), (5, 1)))
    assert probabilities(net, [3, 3]) == pytest.approx(np.tile(P, (2, 1)))


def test_the_command_writes_a_line_for_each_baseline(workplace):
    done = here(workplace, "counting.py", "--data", "text.txt", "--vocab", 300, "--context", 64,
                "--out", "counted")
    assert done.returncode == 0, done.stderr
    with open(workplace / "counted" / "baselines.csv") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == counting.COLUMNS and len(rows) == len(done.stdout.splitlines()) == 8
    found = {(row["tokenizer"], row["baseline"]): float(row["val_bpb"]) for row in rows}
    assert found["byte", "uniform"] == pytest.approx(8)
    for tokenizer in ("byte", "bpe"):
        losses = [found[tokenizer, name] for name in ("bigram", "unigram", "uniform")]
        assert losses == sorted(losses)
