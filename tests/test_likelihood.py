"""study/likelihood.py: orders by enumeration, matches by search, and studies of trained runs."""
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line, here, randomize

import data
import sample
import train_ar
from log import load_model
from model import Config, Transformer
from study import likelihood, segmentation


@pytest.fixture
def mdm():
    return randomize(Transformer(Config(3, 4, 32, causal=False)), std=0.1)


ORDERS = list(map(torch.tensor, itertools.permutations(range(4))))
TEXTS = torch.tensor(list(itertools.product(range(3), repeat=4)))


@torch.no_grad()
def test_likelihoods_in_an_order_and_of_a_mixture_sum_to_one(mdm):
    bits = np.array([[likelihood.bits_in_order(mdm, text, order) for order in ORDERS[::5]]
                     for text in TEXTS])                                                # (N, M)
    assert (2.0 ** -bits).sum(axis=0) == pytest.approx(1, abs=1e-5)
    mixture = likelihood.mixture_bits(bits)
    assert (2.0 ** -mixture).sum() == pytest.approx(1, abs=1e-5)
    # -log p is convex, and the orders differ.
    assert (mixture < bits.mean(axis=1)).all() and bits.std(axis=1).max() > 0.1
    assert mixture == pytest.approx(-np.log2((2.0 ** -bits).mean(axis=1)))
    # The first order is from left to right.
    left = segmentation.read_left(mdm, TEXTS, torch.arange(4).expand(TEXTS.shape))[1].sum(dim=1)
    assert left.numpy() == pytest.approx(bits[:, 0], abs=1e-4)


@torch.no_grad()
def test_the_bound_is_the_mean_over_all_orders(mdm):
    for text in TEXTS[[5, 40]]:
        orders = [likelihood.bits_in_order(mdm, text, order) for order in ORDERS]
        bound = sample.token_bits(mdm, text, 4000).sum().item()
        assert bound == pytest.approx(np.mean(orders), abs=0.05)


def test_two_readings_are_compared_in_bits_per_byte():
    nbytes = np.array([10, 20, 30])
    assert likelihood.compare(2 * nbytes, 4 * nbytes, nbytes) == pytest.approx((2, 4, 2, 0))
    by_hand = pytest.approx((0, 0.1, 0.1, 0.1 / 3**0.5))
    assert likelihood.compare(np.zeros(3), np.array([1, 0, 2]), np.full(3, 10)) == by_hand


@pytest.mark.parametrize("length", [2, 8, 32])
def test_repeated_strings_are_those_that_a_search_finds(source_text, monkeypatch, length):
    # Blocks smaller than the text, so that strings lie across their edges.
    monkeypatch.setattr(likelihood, "BLOCK", 1000)
    train, val = source_text[:20_000], source_text[20_000:24_000] + source_text[995:1040]
    matches = likelihood.repeated(*(np.frombuffer(text, np.uint8) for text in (val, train)), length)
    assert matches.tolist() == [val[k:k + length] in train for k in range(len(val) - length + 1)]
    assert 0 < matches.sum() < len(matches)


def test_the_gap_without_matches_by_hand():
    # A string of 4 bytes at 3 matches: bytes 3 to 6.
    matches = np.arange(17) == 3
    begin, end = np.array([0, 0, 3, 4, 0, 3]), np.array([6, 7, 7, 20, 3, 5])
    free = likelihood.without_match(begin, end, matches, 4)
    assert free.tolist() == [True, False, False, True, True, True]
    # Sequences 0 and 3 of bytes have no match, nor have 0, 2 and 3 of BPE.
    byte = np.array([30.0, 99.0, 99.0, 60.0]), begin[:4], end[:4]
    bpe = np.array([6.0, 40.0, 12.0, 24.0]), begin[[0, 1, 4, 3]], end[[0, 1, 4, 3]]
    everything, without = likelihood.measure((byte, bpe), {4: matches})
    assert without[:3] == (4, [2, 3], 6 + 3 + 16)
    first = [values[0] for values in without[3]]
    gap, gap_of_all = 90 / 22 - 42 / 25, 288 / 33 - 82 / 32
    assert first == pytest.approx([90 / 22, 42 / 25, gap, gap - gap_of_all])
    assert everything[3][2][0] == pytest.approx(gap_of_all) and (everything[3][3] == 0).all()


@pytest.mark.parametrize("study, words", [
    ("order", "| 1e14 | 2.777 | 2.823 | +0.045 +- 0.021 |"),
    ("repetition", "| 0.299 [0.234, 0.366] | -0.135 [-0.198, -0.075] | -31% |")])
def test_published_tables_are_shown(tmp_path, study, words):
    shutil.copy(ROOT / "results" / f"{study}.csv", tmp_path)
    shown = here(tmp_path, "study.likelihood", study, "--plot-only", "--out", tmp_path)
    assert words in shown.stdout, shown.stderr


@pytest.fixture(scope="module")
def runs(workplace):
    """Train the four configurations, tiny. Return their folders."""
    for objective, tokenizer in itertools.product(("ar", "mdm"), ("byte", "bpe")):
        done = here(workplace, f"train_{objective}.py", "--data", "text.txt", "--vocab", 300,
                    "--tokenizer", tokenizer, "--flops", 2e8, "--width", 16, "--context", 64,
                    "--out", f"likelihood/{objective}-{tokenizer}")
        assert done.returncode == 0, done.stderr
    return [f"likelihood/{name}" for name in ("ar-byte", "ar-bpe", "mdm-byte", "mdm-bpe")]


@pytest.mark.parametrize("study, words", [
    ("segmentation", segmentation.READINGS.values()), ("order", ["2e08"]),
    ("looseness", ["mdm-byte", "mdm-bpe"]), ("repetition", ["AR, 2e08", "MDM, 2e08"])])
def test_studies_of_trained_runs_end_to_end(workplace, runs, monkeypatch, study, words):
    monkeypatch.setattr(segmentation, "RESAMPLES", 50)
    monkeypatch.setattr(segmentation, "SEQUENCES", 8)
    script = ["study.segmentation", "--vocab", 300]
    if study != "segmentation":
        script = ["study.likelihood", study, "--sequences", 4, "--orders", 2]
    flags = "--data", "text.txt", "--out", "measured"
    done = here(workplace, *script, *flags, *(runs[2:] if study == "looseness" else runs))
    assert done.returncode == 0, done.stderr
    assert all(f"| {word} |" in done.stdout for word in words), done.stdout
    shown = here(workplace, *script, *flags, "--plot-only")
    assert shown.stdout and shown.stdout in done.stdout
def test_the_bits_of_repetition_are_those_of_the_evaluation(workplace, runs, monkeypatch):
    monkeypatch.chdir(workplace)
    model, settings, _ = load_model(Path("likelihood/ar-bpe"))
    corpus = data.load("text.txt", "bpe", 300)
    bits, begin, end = likelihood.read_bits(corpus, settings, Path("likelihood/ar-bpe"))
    val = data.Sequences(corpus.val, model.config.context).spaced(2**20 // 64)
    bpb, _ = train_ar.evaluate(model, val, corpus.tokenizer.bytes_per_id)
    assert bits.sum() / (end - begin).sum() == pytest.approx(bpb, rel=1e-5)


def test_runs_that_a_study_cannot_read_are_named_in_one_line(workplace, runs):
    other = here(workplace, "study.likelihood", "looseness", runs[0], "--data", "text.txt")
    assert_one_line(other, "ar-byte is no MDM")
    assert_one_line(here(workplace, "study.likelihood", "looseness"), "name the folders")
    assert_one_line(here(workplace, "study.likelihood", "order", "--plot-only", "--out", "no"),
                    "order.csv")
