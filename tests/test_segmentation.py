"""study/segmentation.py: measures against brute force, planted curves, and the published table."""
import itertools
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, here, randomize

from bpe import Tokenizer, train_bpe
from model import Config, Transformer
from study import segmentation


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auroc_is_the_share_of_pairs_in_order(levels):
    rng = np.random.default_rng(levels)
    scores, positive = rng.integers(levels, size=200) / 7, rng.random(200) < 0.3
    a, b = scores[positive][:, None], scores[~positive]
    share = ((a > b) + (a == b) / 2).mean()
    assert segmentation.auroc(scores, positive) == pytest.approx(share)
    assert segmentation.auroc(scores, scores > scores.min()) == 1
    assert math.isnan(segmentation.auroc(scores, scores > 9999))


def test_a_reading_is_judged_over_sequences_and_within_identifiers():
    rng = np.random.default_rng(0)
    starts, inside = rng.random((64, 50)) < 0.3, rng.random((64, 50)) < 0.5
    # Within identifiers the scores are better: one standard deviation apart, outside none.
    scores = rng.standard_normal((64, 50)) + starts * inside
    reading = np.stack([scores, scores**2])
    resamples = rng.integers(64, size=(200, 64))
    bpb, area, within = segmentation.judge(reading, starts, inside, resamples)
    assert bpb[0] == pytest.approx((scores**2).mean())
    assert bpb[3] == pytest.approx((scores[resamples[2]] ** 2).mean())
    assert area[0] == segmentation.auroc(scores.ravel(), starts.ravel())
    value, low, high = segmentation.with_interval(within)
    assert low < 0.5 * (1 + math.erf(0.5)) < high and low < value < high < low + 0.15
    assert segmentation.with_interval(area)[2] < low


def test_the_mask_of_identifiers_by_hand():
    text = b"x_1 = f9(Zed)\xe9_"
    sequences = np.frombuffer(text, dtype=np.uint8)[None].astype(int)
    positions = np.arange(1, len(text))[None]
    inside = segmentation.within_identifiers(sequences, positions)[0]
    assert [text[at:at + 1] for at in 1 + np.flatnonzero(inside)] == [b"_", b"1", b"9", b"e", b"d"]


def test_planted_curves_are_compared_at_equal_bits_per_byte():
    # Three models, the best last, in two samples: AUROC = 1 - BPB / 10, and 0.05 more.
    bpb = np.array([[3.0, 3.5], [2.0, 2.5], [2.4, 2.9]])
    curve = np.stack([bpb, 1 - bpb / 10 + [0, 0.05]], axis=1)                     # (3, 2, 2)
    assert segmentation.at_equal_bpb(curve, [2.2, 3.1]) == pytest.approx([0.78, 0.74])
    assert np.isnan(segmentation.at_equal_bpb(curve, [1.9, 3.6])).all()
    # MDM detects less than AR at 2 bits per byte; no AR run is as bad as the n-gram model.
    rng = np.random.default_rng(0)
    starts = rng.random((8, 40)) < 0.3
    noise = rng.standard_normal((8, 40))
    planted = [("ar", 1e12, 8, 0, 3.0, 1), ("ar", 1e13, 8, 0, 2.0, 3), ("left", 1e13, 8, 0, 2.0, 1),
               ("ngram", 1, 0, 0, 3.5, 2)]
    readings = [(*about, np.stack([noise + gain * starts, np.full(noise.shape, float(bits))]))
                for *about, bits, gain in planted]
    rows = segmentation.compare(readings, starts, np.ones(starts.shape, dtype=bool), 300)
    rows = [dict(zip(segmentation.AREA_COLUMNS, row, strict=True)) for row in rows]
    assert rows[2]["ahead"] == pytest.approx(rows[1]["auroc"] - rows[0]["auroc"])
    assert 0 < rows[2]["ahead_low"] < rows[2]["ahead"] < rows[2]["ahead_high"]
    assert math.isnan(rows[3]["ahead"]) and math.isnan(rows[0]["ahead"])
    assert segmentation.ahead(rows[3], "ahead", 3.0) == "no AR run that bad"


def test_token_starts_cut_the_text_into_its_tokens(source_text):
    tokenizer = Tokenizer(train_bpe(source_text[:50_000], 400))
    ids = tokenizer.encode(source_text[:5000])
    starts = segmentation.token_starts(tokenizer, ids)
    pieces = [source_text[a:b] for a, b in itertools.pairwise([*np.flatnonzero(starts), 5000])]
    assert len(starts) == 5000 and pieces == [tokenizer.decode([i]) for i in ids]


@torch.no_grad()
def test_both_readings_see_what_is_before_a_position_and_nothing_else():
    ids = torch.randint(20, (2, 24))
    positions = torch.stack([torch.randperm(24)[:20] for _ in range(2)])
    ar, mdm = (randomize(Transformer(Config(20, 24, 32, causal)), 0.3) for causal in (True, False))
    by_ar = segmentation.read_ar(ar, ids, positions)
    by_mdm = segmentation.read_left(mdm, ids, positions)

    def bits(logits, target):
        p = logits.double().softmax(dim=-1).numpy()
        return pytest.approx([-(p * np.log2(p)).sum(), -np.log2(p[target])], abs=1e-4)
    for n, p in itertools.product(range(2), range(20)):
        at = positions[n, p]
        before = torch.cat([torch.tensor([20]), ids[n, :at]])
        assert by_ar[:, n, p].tolist() == bits(ar(before[None])[0, -1], ids[n, at])
        masked = torch.cat([ids[n, :at], torch.full((24 - at,), 20)])
        assert by_mdm[:, n, p].tolist() == bits(mdm(masked[None])[0, at], ids[n, at])


def test_the_published_table_is_shown_and_drawn(tmp_path):
    shutil.copy(ROOT / "results/segmentation.csv", tmp_path)
    shown = here(tmp_path, "study.segmentation", "--plot-only", "--out", tmp_path)
    assert "| AR | 1e13 | 2.034 [1.944, 2.126] | 0.678 [0.658, 0.695] |" in shown.stdout
    assert (tmp_path / "segmentation.png").read_bytes().startswith(b"\x89PNG")
