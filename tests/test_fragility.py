"""fragility.py, segmentation.py, remedies.py: measures against brute force, studies end to end."""
import itertools
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line, here

import data
import fragility
import remedies
import run
import segmentation
import sweep
import train_ar
from bpe import Tokenizer, train_bpe
from model import Config, Transformer
from run import InputError

TINY = ("--data", "text.txt", "--vocab", 300, "--context", 64)


def trained_looking(causal, vocab_size=20, context=24):
    """Return a model whose predictions are not uniform, as those of a new model are."""
    torch.manual_seed(0)
    model = Transformer(Config(vocab_size, context, 32, causal)).eval()
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model


def entropy_of(logits):
    p = logits.detach().double().softmax(dim=-1).numpy()
    return pytest.approx(-(p * np.log2(p)).sum(), abs=1e-4)


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auroc_is_the_share_of_pairs_in_order(levels):
    rng = np.random.default_rng(levels)
    scores, positive = rng.integers(levels, size=200) / 7, rng.random(200) < 0.3
    pairs = itertools.product(scores[positive], scores[~positive])
    share = np.mean([(a > b) + (a == b) / 2 for a, b in pairs])
    assert segmentation.auroc(scores, positive) == pytest.approx(share)
    assert segmentation.auroc(scores, scores > scores.min()) == 1
    assert math.isnan(segmentation.auroc(scores, scores > 9999))


def test_the_interval_of_auroc_is_over_sequences():
    """Sequences that are all alike have no spread; the truth is inside the interval of others."""
    rng = np.random.default_rng(0)
    starts = rng.random((64, 50)) < 0.3
    scores = rng.standard_normal((64, 50)) + starts
    resamples = rng.integers(64, size=(200, 64))
    area, low, high = segmentation.auroc_with_interval(scores, starts, resamples)
    expected = 0.5 * (1 + math.erf(0.5))
    assert low < area < high and low < expected < high and high - low < 0.1
    same = segmentation.auroc_with_interval(scores[[0] * 64], starts[[0] * 64], resamples)
    assert same == pytest.approx([segmentation.auroc(scores[0], starts[0])] * 3)


def test_token_starts_cut_the_text_into_its_tokens(source_text):
    tokenizer = Tokenizer(train_bpe(source_text[:50_000], 400))
    ids = tokenizer.encode(source_text[:5000])
    starts = segmentation.token_starts(tokenizer, ids)
    assert len(starts) == 5000
    ends = [*np.flatnonzero(starts), 5000]
    pieces = [source_text[a:b] for a, b in itertools.pairwise(ends)]
    assert pieces == [tokenizer.decode([i]) for i in ids]


@torch.no_grad()
def test_both_readings_see_what_is_before_a_position_and_nothing_else():
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(20, size=(2, 24)))
    positions = torch.from_numpy(np.stack([rng.permutation(24)[:20] for _ in range(2)]))
    ar, mdm = trained_looking(True), trained_looking(False)
    by_ar = segmentation.read_ar(ar, ids, positions)
    by_mdm = segmentation.read_left(mdm, ids, positions)
    for n, p in itertools.product(range(2), range(20)):
        at = positions[n, p]
        before = torch.cat([torch.tensor([20]), ids[n, :at]])
        assert by_ar[n, p].item() == entropy_of(ar(before[None])[0, -1])
        masked = torch.cat([ids[n, :at], torch.full((24 - at,), 20)])
        assert by_mdm[n, p].item() == entropy_of(mdm(masked[None])[0, at])
    other = torch.from_numpy(rng.integers(20, size=(2, 24)))
    other[:, :10] = ids[:, :10]
    ten = torch.full((2, 1), 10)
    for read, model in ((segmentation.read_ar, ar), (segmentation.read_left, mdm)):
        assert torch.equal(read(model, ids, ten), read(model, other, ten))
        assert not torch.equal(read(model, ids, ten + 1), read(model, other, ten + 1))


def test_bigram_entropy_by_hand():
    text = np.frombuffer(b"ab ab  ac ab", dtype=np.uint8)
    found = segmentation.read_bigram(text, text[None].astype(int), np.arange(1, 5)[None])[0]
    # After a: b three times, c once. After b: only a blank. After a blank: a three times, a blank.
    unsure = -0.75 * math.log2(0.75) - 0.25 * math.log2(0.25)
    assert found == pytest.approx([unsure, 0, unsure, unsure])


@pytest.mark.parametrize("block", [1, 2, 16, 64])
def test_a_shuffle_permutes_within_blocks_and_costs_an_untrained_model_nothing(source_text, block):
    stream = np.frombuffer(source_text, dtype=np.uint8)
    plain = data.Sequences(stream, 64).spaced(16)
    shuffled = data.Sequences(stream, 64, block).spaced(16)
    assert (plain == shuffled).all() == (block == 1)
    blocks = (np.sort(ids.reshape(16, -1, block), axis=2) for ids in (plain, shuffled))
    assert np.array_equal(*blocks)
    untrained = Transformer(Config(256, 64, 16))
    for ids in (plain, shuffled):
        assert train_ar.evaluate(untrained, ids, np.ones(256, dtype=int))[0] == pytest.approx(8)


def test_the_table_shows_the_mean_over_seeds_of_the_best_width():
    row = dict.fromkeys(sweep.SETTINGS, 0) | {"objective": "ar", "tokenizer": "byte",
                                                "shuffle": 4, "val_bpb_stderr": 0.1}
    runs = [(32, 0, 2.0), (32, 1, 3.0), (64, 0, 2.25), (64, 1, 2.35)]
    rows = [row | {"width": width, "seed": seed, "val_bpb": bpb} for width, seed, bpb in runs]
    bpb, half = fragility.summary(rows, "shuffle")["ar", "byte"][4]
    assert bpb == pytest.approx(2.3) and half == pytest.approx(0.1645)


def test_blocks_of_as_many_bpe_tokens_are_one_run():
    corpus = SimpleNamespace(tokens=lambda context: 160,
                             shuffle_tokens=lambda block, tokens: max(1, block // 4))
    assert fragility.levels("shuffle", ("ar", "bpe"), corpus, 512) == [1, 8, 16, 32, 64, 512]


@pytest.mark.parametrize("study, figure, words", [
    ("shuffle", "shuffle", "| 512 | 2.81 [2.79, 2.82] | 4.53 [4.52, 4.55] |"),
    ("span", "span", "| 2 | 4.01 [3.99, 4.03] | 3.88 [3.86, 3.90] | 2.81 [2.79, 2.83] |"),
    ("segmentation", "entropy", "| AR | 1e13 | 2.096 | 0.664 [0.644, 0.686] |")])
def test_published_tables_are_shown_without_training(tmp_path, study, figure, words):
    for name in {study, figure}:
        shutil.copy(ROOT / "results" / f"{name}.csv", tmp_path)
    shown = here(tmp_path, "fragility.py", study, "--plot-only", "--out", tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert words in shown.stdout
    assert (tmp_path / f"{figure}.png").read_bytes().startswith(b"\x89PNG")


def sweep_here(specs, path, args, folder):
    """Train in this process, which saves the seconds that torch takes to import."""
    for spec in specs:
        out = folder / sweep.label(spec)
        script, *flags = sweep.command(spec, args, out)
        assert here(".", Path(script).name, *flags).returncode == 0
        sweep.add_row(path, sweep.finished(spec, out))
    return []


def test_shuffle_and_segmentation_end_to_end(workplace, monkeypatch):
    """All configurations at two lengths of blocks; segmentation reads the same runs."""
    monkeypatch.setattr(fragility, "BLOCKS", (1,))
    monkeypatch.setattr(sweep, "sweep", sweep_here)
    flags = ("shuffle", *TINY, "--budgets", "5e8", "--widths", 16, "--out", "why")
    planned = here(workplace, "fragility.py", *flags, "--dry-run")
    assert len(set(planned.stdout.splitlines())) == 8, planned.stderr
    done = here(workplace, "fragility.py", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = sweep.read_rows(workplace / "why" / "shuffle.csv")
    assert len({row["val_bpb"] for row in rows}) == 8
    assert {row["shuffle"] for row in rows} == {1, 64}
    assert here(workplace, "fragility.py", *flags, "--dry-run").stdout == ""

    folders = sorted((workplace / "runs" / "shuffle").iterdir())
    flags = ("segmentation", *TINY, "--out", "why")
    done = here(workplace, "fragility.py", *flags, "--runs", *folders)
    assert done.returncode == 0, done.stderr
    assert all(f"| {title} |" in done.stdout for title in segmentation.READINGS.values())
    assert (workplace / "why" / "entropy.png").read_bytes().startswith(b"\x89PNG")
    shown = here(workplace, "fragility.py", *flags, "--plot-only")
    assert shown.stdout and shown.stdout in done.stdout
    flags = ("segmentation", "--data", "text.txt", "--vocab", 60_000, "--runs", *folders)
    assert_one_line(here(workplace, "fragility.py", *flags), "too small", "60000")


def test_remedies_end_to_end(workplace, monkeypatch):
    """A remedy for MDM on bytes and on BPE, and plain runs; then tables from the rows alone."""
    monkeypatch.setattr(sweep, "sweep", sweep_here)
    monkeypatch.setattr(remedies, "REMEDIES", {
        ("mdm", "byte"): {"plain": {}, "patch 2": {"patch": 2}},
        ("mdm", "bpe"): {"plain": {}, "bell": {"schedule": "bell"}}})
    flags = ("remedies", *TINY, "--budgets", "4e8", "--out", "helped", "--widths", 8, 16, 32)
    assert_one_line(here(workplace, "fragility.py", *flags), "remedies.csv has too few runs")
    done = here(workplace, "fragility.py", *flags, 48)
    shown = here(workplace, "fragility.py", "remedies", "--plot-only", "--out", "helped")
    assert done.returncode == shown.returncode == 0, done.stderr + shown.stderr
    assert shown.stdout in done.stdout
    rows = sweep.read_rows(workplace / "helped" / "remedies.csv")
    assert len(rows) == 16 and {row["patch"] for row in rows} == {1, 2}
    assert (workplace / "helped" / "remedies.png").read_bytes().startswith(b"\x89PNG")


def planted_remedies(noise):
    """Return rows of MDM at one budget: plain bytes at 3.4, BPE at 2.6, what helps in between."""
    rng = np.random.default_rng(0)
    lowest = {("byte", "plain"): (3.4, 1e5), ("bpe", "plain"): (2.6, 5e4),
              ("byte", "convolution"): (3.1, 1e5), ("byte", "patch 4"): (3.0, 3e5),
              ("bpe", "convolution"): (2.5, 5e4)}
    rows = []
    for (tokenizer, name), (bpb, best) in lowest.items():
        for N in best * np.array([0.3, 0.6, 1.5, 2.5]):
            loss = bpb + 0.05 * np.log(N / best) ** 2 + noise * rng.standard_normal()
            row = dict.fromkeys(sweep.SETTINGS, 0) | run.PLAIN
            row |= {"objective": "mdm", "tokenizer": tokenizer, "flops_budget": 3e12,
                    "seed": int(N), "val_bpb": loss, "params_non_embedding": N, "lr": 0.0015,
                    "context_tokens": 512, "batch_tokens": 512}
            rows.append(row | remedies.REMEDIES["mdm", tokenizer].get(name, {}))
    return rows


def test_planted_remedies_are_recovered_with_their_share_of_the_gap():
    found = remedies.analyse(planted_remedies(noise=0))
    byte = "mdm", "byte"
    assert found[byte, "patch 4", 3e12][0] == pytest.approx(3.0)
    gap = remedies.lost(found, "mdm", ("plain", "plain"), 3e12)[0]
    assert gap == pytest.approx(0.8)
    assert (found[byte, "plain", 3e12] - found[byte, "patch 4", 3e12])[0] / gap \
        == pytest.approx(0.5)
    assert remedies.lost(found, "mdm", ("convolution", "convolution"), 3e12)[0] \
        == pytest.approx(0.6)
    assert remedies.lost(found, "mdm", ("bell", "bell"), 3e12) is None
    noisy = remedies.analyse(planted_remedies(noise=0.02))
    low, high = np.quantile(noisy[byte, "convolution", 3e12][1:], (0.05, 0.95))
    assert 3.0 < low < 3.1 < high < 3.2


@pytest.mark.parametrize("arguments, words", [
    (("shuffle", *TINY, "--context", 72), "72 is not divisible by 16"),
    (("span", *TINY, "--context", 72), "72 is not divisible by 16"),
    (("span", "--plot-only", "--out", "nowhere"), "no finished run"),
    (("segmentation", *TINY, "--runs", "nowhere"), "no finished byte run"),
    (("segmentation", "--plot-only", "--out", "nowhere"), "segmentation.csv"),
    (("remedies", "--plot-only", "--out", "nowhere"), "too few runs")])
def test_bad_input_is_one_line(workplace, arguments, words):
    assert_one_line(here(workplace, "fragility.py", *arguments), words)


@pytest.mark.parametrize("key, value", [("context_bytes", 128), ("corpus", {"sha256": "other"})])
def test_runs_of_different_text_or_context_are_not_mixed(tmp_path, monkeypatch, key, value):
    plain = {"tokenizer": "byte", "shuffle": 1, "span": 1, "val_bpb": 3.0, "context_bytes": 64,
             "flops_budget": 1e9, "corpus": {"sha256": "one"}}
    results = {"a": plain | {"objective": "ar"}, "b": plain | {"objective": "mdm"},
               "better": plain | {"objective": "mdm", "val_bpb": 2.9}}
    monkeypatch.setattr(run, "read", lambda path: results[path.parent.name])
    folders = [tmp_path / name for name in results]
    for folder in folders:
        folder.mkdir()
        (folder / "checkpoint.pt").touch()
    best = segmentation.best_runs(folders, None)
    assert [folder.name for _, folder in best] == ["a", "better"]
    results["a"][key] = value
    with pytest.raises(InputError, match="different text or context"):
        segmentation.best_runs(folders, None)
