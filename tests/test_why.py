"""Context fragility: readings by brute force, and each study end to end on real text."""
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import fragility
import model
import scaling
import segmentation
from bpe import Tokenizer, train_bpe
from conftest import assert_one_line, execute, here
from test_model import lively


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auroc_is_the_share_of_pairs_in_order(levels):
    rng = np.random.default_rng(levels)
    scores, positive = rng.integers(levels, size=200) / 7, rng.random(200) < 0.3
    pairs = [(a > b) + (a == b) / 2 for a, b in itertools.product(scores[positive], scores[~positive])]
    assert segmentation.auroc(scores, positive) == pytest.approx(np.mean(pairs))
    assert segmentation.auroc(scores, scores > scores.min()) == 1 and math.isnan(segmentation.auroc(scores, scores > 9999))


def test_token_starts_spell_the_tokens(source_text):
    class Corpus:
        tokenizer = Tokenizer(train_bpe(source_text, 400))
        val = tokenizer.encode(source_text[:5000])
    starts = segmentation.token_starts(Corpus)
    places = np.flatnonzero(starts).tolist() + [5000]
    assert len(starts) == 5000
    assert [source_text[a:b] for a, b in itertools.pairwise(places)] == [Corpus.tokenizer.decode([i]) for i in Corpus.val]


def entropy(logits):
    p = logits.double().softmax(dim=-1).numpy()
    return -(p * np.log2(p)).sum()


@torch.no_grad()
def test_readings_are_what_each_prediction_says():
    """One place at a time, with exactly what that reading may see."""
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(20, size=(3, 24)))
    places = torch.from_numpy(np.stack([rng.permutation(24)[:20] for _ in range(3)]))
    ar, mdm = (lively(model.Config(20, 24, width=32, causal=causal)) for causal in (True, False))
    left, half = segmentation.read_left(mdm, ids, places), segmentation.read_half(mdm, ids, places)
    for n, p in itertools.product(range(3), range(20)):
        at = places[n, p]
        before = torch.cat([torch.tensor([20]), ids[n, :at]])
        assert segmentation.read_ar(ar, ids, places)[n, p].item() == pytest.approx(entropy(ar(before[None])[0, -1]), abs=1e-4)
        seen = torch.where(torch.arange(24) < at, ids[n], 20)
        assert left[n, p].item() == pytest.approx(entropy(mdm(seen[None])[0, at]), abs=1e-4)
    assert 0 < half.isnan().sum() < 60 and (half[~half.isnan()] <= math.log2(20) + 1e-5).all()
    changed = ids.clone()
    changed[0, places[0, half[0].isnan()]] = 19               # bytes in sight matter
    assert not torch.equal(segmentation.read_half(mdm, changed, places)[0].nan_to_num(), half[0].nan_to_num())
    hidden = ids.clone()
    hidden[0, places[0, ~half[0].isnan()]] = 19               # masked ones do not
    assert torch.equal(segmentation.read_half(mdm, hidden, places)[0].nan_to_num(), half[0].nan_to_num())


def test_the_baselines():
    text = np.frombuffer(b"ab ab  ac ab", dtype=np.uint8)
    windows, places = text[None].astype(np.int64), np.arange(1, 12)[None]
    blank = segmentation.space(windows, places)[0]
    assert np.flatnonzero(blank).tolist() == [1, 4, 8]        # places 2, 5 and 9; the second of two blanks is no start
    surprise = segmentation.bigram(text, windows, places)[0]
    assert surprise[0] == pytest.approx(-0.75 * math.log2(0.75) - 0.25 * math.log2(0.25))       # after a: b three times, c once
    assert surprise[1] == 0 and surprise[7] == surprise[0]    # after b: only a blank


def test_seeds_and_validation_text_both_count():
    """The error of a mean over seeds: the text's, which all share, and the pooled variance of the seeds over their number."""
    rng = np.random.default_rng(1)
    rows = [{"objective": "ar", "tokenizer": "byte", "shuffle": block, "val_bpb": block + 0.1 * rng.standard_normal(), "val_bpb_stderr": 0.02}
            for block in range(1, 41) for _ in range(4)]
    found = fragility.summary(rows, "shuffle")
    errors = [values[1:].std() for values in found.values()]
    assert np.mean(errors) == pytest.approx(math.sqrt(0.02**2 + 0.1**2 / 4), rel=0.15)
    assert [round(values[0]) for values in found.values()] == list(range(1, 41))
    alone = fragility.summary(rows[::4], "shuffle")
    assert np.mean([values[1:].std() for values in alone.values()]) == pytest.approx(0.02, rel=0.1)


# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("study, levels", [("shuffle", (1, 8, 64)), ("span", (1, 4))])
def test_an_intervention_end_to_end(workplace, monkeypatch, study, levels):
    monkeypatch.setattr(fragility, "BLOCKS", levels[:2])      # fewer than those of the study, to be quick
    monkeypatch.setattr(fragility, "SPANS", levels)

    def scale(*arguments):
        done = here(workplace, "scaling.py", "--study", study, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout
    tiny = ("--data", "text.txt", "--vocab", 300, "--context", 64, "--widths", 16, "--budgets", "3e8")
    lines = scale(*tiny, "--dry-run").splitlines()
    shown = scale(*tiny)
    rows = scaling.read_rows(Path(workplace, "results", f"{study}.csv"))
    assert len(rows) == len(lines) == len(set(lines)) == len({row["val_bpb"] for row in rows}) == (12 if study == "shuffle" else 3)
    assert {row[study] for row in rows if row["tokenizer"] == "byte"} == set(levels)
    cells = {(row["objective"], row["tokenizer"]) for row in rows}                                  # an intervention leaves the bytes and their number
    assert len({(row["objective"], row["tokenizer"], row["val_bytes"]) for row in rows}) == len(cells) == (4 if study == "shuffle" else 2)
    assert all((row["val_bpb_span1"] is None) == (row["span"] == 1) for row in rows)
    assert Path(workplace, "results", f"{study}.png").read_bytes().startswith(b"\x89PNG")
    assert scale("--plot-only").strip() in shown


def test_segmentation_end_to_end(workplace):
    for objective in ("ar", "mdm"):
        done = here(workplace, f"train_{objective}.py", "--data", "text.txt", "--context", 64, "--width", 16, "--flops", "1e9",
                       "--out", f"runs/gap/{objective}")
        assert done.returncode == 0, done.stderr
    done = execute(workplace, "scaling.py", "--study", "segmentation", "--data", "text.txt")
    assert done.returncode == 0, done.stderr
    assert "left out: text is too small for a vocabulary of 32768" in done.stdout
    assert all(f"| {title} |" in done.stdout for title in segmentation.READINGS.values())
    for name in ("segmentation.png", "entropy.png"):
        assert (workplace / "results" / name).read_bytes().startswith(b"\x89PNG")
    again = here(workplace, "scaling.py", "--study", "segmentation", "--plot-only")
    assert again.returncode == 0 and again.stdout.strip() in done.stdout


@pytest.mark.parametrize("arguments, word", [
    (("--study", "span", "--context", 72, "--data", "text.txt"), "do not divide"), (("--study", "shuffle", "--context", 72, "--data", "text.txt"), "do not divide"),
    (("--study", "segmentation", "--runs", "nowhere", "--data", "text.txt"), "no finished byte run"),
    (("--study", "segmentation", "--plot-only", "--out", "nowhere"), "segmentation.csv")])
def test_bad_input_is_one_line(workplace, arguments, word):
    assert_one_line(here(workplace, "scaling.py", *arguments), word)
