"""study.report, study.laws, study.coverage: planted laws and gaps, and the published tables."""
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT, assert_one_line, here

import log
import scaling
from model import Config
from study import coverage, laws, report

RESULTS = ROOT / "results"
LAWS = [dict(E=1.1, A=80, B=600, alpha=0.35, beta=0.42),
        dict(E=0.6, A=12, B=60, alpha=0.2, beta=0.25),
        dict(E=0, A=400, B=410, alpha=0.34, beta=0.28)]
# How rows begin that study.report prints, in this order; the last four are of English.
PRINTED = (
    "AR, BPE | 2.025 (3.8e4) * | 1.840 (7.5e4) | 1.654 (1.6e5) | 1.497 (3.2e5) | 1.313 (6.9e5) (",
    "AR | 1e13 | 0.439 [", "AR | 3e13 | 0.405 [", "MDM | 1e13 | 0.768 [", "AR | 3e12 | 0.442 [",
    "MDM | 3e12 | 0.909 [", "1e13 | +0.33 [", "3e12 | 1e14 | -0.11 [", "AR | 1e12 | -0.11 [",
    "AR | 3e12 | -0.17 [", "AR | all | 0.00 [", "MDM | past counting | 0.00 [",
    "MDM, bytes | 3.633 (7.1e4) | 3.297", "AR | 3e12 | 0.488 [", "3e12 | 3e13 | -0.13 [",
    "AR | -0.02 [")
BUDGETS = (1e12, 3e12, 1e13, 3e13, 1e14, 3e14)


def loss(law, N, D):
    return law["E"] + law["A"] / N ** law["alpha"] + law["B"] / D ** law["beta"]


def design():
    """Return N and D of a sweep: four widths at each of five budgets."""
    runs = [(C, Config(width=width)) for C in BUDGETS[:5] for width in scaling.bracket("ar", C)]
    N = np.array([16.0 * config.width**2 * config.depth for _, config in runs])
    return N, np.array([C / config.flops_per_token() for C, config in runs])


def planted(frontiers, noise=lambda C: 1e-6):
    """Return rows of a study; frontiers: {configuration: L*(C)}; noise(C): the sd of the losses."""
    rng, rows = np.random.default_rng(0), []
    for (objective, tokenizer), frontier in frontiers.items():
        vocab_size, context = (256, 512) if tokenizer == "byte" else (4096, 160)
        for budget in BUDGETS:
            for width in scaling.bracket(objective, budget) * 2:
                N = 16 * width**2 * Config(width=width).depth
                offset = np.log(N / 1e5 / (budget / 1e13) ** 0.6)
                bpb = frontier(budget) + 0.05 * offset**2 + noise(budget) * rng.standard_normal()
                rows.append(dict.fromkeys(scaling.SETTINGS, 0) | {
                    "objective": objective, "tokenizer": tokenizer, "vocab_size": vocab_size,
                    "context_tokens": context, "flops_budget": budget, "width": width,
                    "params_non_embedding": N, "val_bpb": bpb})
    return sorted(rows, key=scaling.settings_of)


def falling(factor, power=0):
    """Return frontiers in which bytes need factor (C / 1e13)^power times the C of BPE."""
    def bpe(C):
        return 40 * C**-0.1

    def byte(C):
        # C = factor (c / 1e13)^power c, where c is what BPE needs.
        return bpe((C / factor * 1e13**power) ** (1 / (1 + power)))

    return {key: byte if key[1] == "byte" else bpe for key in scaling.CONFIGURATIONS}


# ---- Laws.

@pytest.mark.parametrize("kind", ["squares", "huber"])
@pytest.mark.parametrize("law", LAWS)
def test_a_planted_law_is_recovered_from_losses_without_noise(law, kind):
    N, D = design()
    fitted = laws.fit_law(N, D, loss(law, N, D), kind)
    assert fitted.keys() == law.keys()
    assert fitted == pytest.approx(law, rel=2e-3, abs=1e-3)
    assert loss(fitted, N, D) == pytest.approx(loss(law, N, D), rel=1e-5)


def test_huber_recovers_a_law_as_epochs_from_240_points_with_outliers():
    law = dict(E=1.817, A=482, B=2085, alpha=0.348, beta=0.366)
    rng = np.random.default_rng(0)
    N, C = np.exp(rng.uniform(np.log(5e7), np.log(1.6e10), 240)), 10 ** rng.uniform(18, 22, 240)
    D = C / 6 / N
    L = loss(law, N, D) * np.exp(2e-3 * rng.standard_normal(240))
    L[rng.choice(240, 8, replace=False)] *= 1.3
    huber, squares = (laws.fit_law(N, D, L, kind) for kind in ("huber", "squares"))
    for key, error in (("E", 0.02), ("alpha", 0.015), ("beta", 0.015)):
        assert huber[key] == pytest.approx(law[key], abs=error)
    moved = loss(squares, N, D) / loss(law, N, D) - 1
    assert np.abs(moved).mean() > 0.006


def test_frontiers_with_one_E_recover_it_and_their_parity():
    """E, K and gamma are planted; the frontiers of AR meet at 1e20, those of MDM never."""
    E, C = 0.7, np.repeat(BUDGETS, 4)
    planted_laws = {("ar", "bpe"): (30, 0.12), ("ar", "byte"): (30 * 1e20**0.02, 0.14),
                    ("mdm", "bpe"): (40, 0.12), ("mdm", "byte"): (50, 0.11)}
    rng = np.random.default_rng(0)
    runs = {key: (C, E + K * C**-gamma + 1e-3 * rng.standard_normal((21, len(C))))
            for key, (K, gamma) in planted_laws.items()}
    entropy, fitted = laws.fit_frontiers(runs, highest=1.2)
    assert entropy.mean() == pytest.approx(E, abs=0.03) and entropy.shape == (21,)
    for key, (K, gamma) in planted_laws.items():
        assert fitted[key][1].mean() == pytest.approx(gamma, abs=0.005)
        np.testing.assert_allclose(laws.frontier(entropy, fitted[key], C).mean(axis=0),
                                   E + K * C**-gamma, atol=1e-3)
    met = laws.parity(fitted["ar", "byte"], fitted["ar", "bpe"])
    assert np.median(np.log10(met)) == pytest.approx(20, abs=0.5)
    assert np.isinf(laws.parity(fitted["mdm", "byte"], fitted["mdm", "bpe"])).all()


# ---- G, its trend, other ways to count FLOPs; context; coverage.

def test_G_is_read_at_most_half_a_decade_beyond_the_last_budget():
    """Bytes need 20 times the compute: 2e14, 6e14 and 2e15 for the last three budgets of BPE."""
    rows = planted(falling(20))
    fits = scaling.fit_minima(rows)
    gap = report.gaps_of(fits)["ar"]
    np.testing.assert_allclose(gap.limits * gap.budgets, 3e14 * 10**0.5)
    assert gap.G[0, :4] == pytest.approx(np.full(4, 20), rel=1e-3)
    assert np.isinf(gap.G[:, 4:]).all()
    assert np.isinf(scaling.gaps_between(fits)["ar"].G[:, 3]).all()
    # Without what its size costs it, a run has the loss of the frontier.
    for (C, losses), frontier in zip(laws.losses_at_best_size(rows, fits).values(),
                                     falling(20).values(), strict=True):
        np.testing.assert_allclose(losses[0], frontier(C), rtol=1e-4)


@pytest.mark.parametrize("power", [-0.2, 0, 0.1])
def test_a_planted_trend_of_G_is_recovered(power):
    gap = report.gaps_of(scaling.fit_minima(planted(falling(10, power))))["mdm"]
    for lowest in (1e12, 3e12):
        assert report.trend(gap, lowest)[0] == pytest.approx(power, abs=0.01)
    assert report.trend(gap, 1e14) is None


def test_a_budget_counts_in_the_trend_if_95_percent_of_the_samples_have_a_G():
    G = np.full((401, 3), 10.0)
    G[1:11, 1], G[1:31, 2] = np.inf, np.inf
    slopes = report.trend(scaling.Gap(10.0 ** np.arange(12, 15), G, G, np.array([300, 30, 3])), 0)
    assert (slopes[11:] == 0).all() and slopes[1:11] == pytest.approx(np.log10(3))


def test_the_FLOPs_that_need_not_be_counted_are_half_of_attention_and_of_the_head():
    for width in (32, 128, 576):
        full, flops = Config(4096, 160, width), Config(4096, 160, width).flops_per_token()
        assert flops - report.UNCHARGED["ar"](full) == Config(4096, 80, width).flops_per_token()
        assert flops - report.UNCHARGED["mdm"](full) == Config(2048, 160, width).flops_per_token()


def test_bytes_that_are_charged_for_half_of_their_FLOPs_need_half_as_many():
    rows = planted(falling(16))
    fits = scaling.fit_minima(rows)

    def half_of_bytes(config):
        return config.flops_per_token() / 2 if config.vocab_size == 256 else 0

    counted = report.counted_by(half_of_bytes, rows, fits)
    gap = report.gaps_of(scaling.fit_minima(counted))["ar"]
    assert gap.G[0, :4] == pytest.approx(np.full(4, 8), rel=0.02)


def test_the_best_context_is_that_of_the_lowest_mean_over_seeds():
    """Bytes: 128 has the lower mean, 512 the lowest run. G: bytes at 1e14 have what BPE has."""
    losses = {("byte", 1e13, 512): (2.00, 2.40), ("byte", 1e13, 128): (2.05, 2.07),
              ("byte", 1e14, 128): (1.80, 1.82), ("byte", 1e14, 512): (1.95, 1.97),
              ("bpe", 1e13, 512): (1.90, 1.92), ("bpe", 1e13, 256): (1.80, 1.82)}
    samples = report.mean_losses(
        {"objective": objective, "tokenizer": tokenizer, "flops_budget": budget, "width": 64,
         "context_bytes": context, "val_bpb": bpb} for objective in scaling.TRAIN
        for (tokenizer, budget, context), values in losses.items() for bpb in values)
    best = report.lowest(samples, {128, 256, 512})
    assert best["ar", "byte"].best == [(128, 64), (128, 64)]
    gap = scaling.gaps_between(best)["ar"]
    assert (gap.bits[0, 0], gap.G[0, 0]) == pytest.approx((0.25, 10))
    plain = scaling.gaps_between(report.lowest(samples, {512}))["ar"]
    assert plain.bits[0, 0] == pytest.approx(0.29)
    # Two pairs of seeds, with an sd of 0.0141 by two degrees of freedom, and means of two.
    noise = samples[("mdm", "bpe"), 1e13, 256, 64][1:] - 1.81
    assert np.quantile(noise, 0.95) == pytest.approx(2.92 * 0.0141 / 2**0.5, rel=0.2)


def test_intervals_hold_the_truth_where_noise_falls_with_compute_and_those_of_one_pool_do_not():
    rows = planted(falling(8))
    truth, budgets = (np.array([row[key] for row in rows]) for key in ("val_bpb", "flops_budget"))
    noise = 0.06 * (budgets / 1e12) ** -0.5
    old, new = (coverage.coverage(rows, truth, noise, resample, 60)
                for resample in (coverage.from_one_pool, scaling.resample))
    assert old["ar", "bits"][0] < 0.75 and old["ar", "bits"][5] == 1
    for (_, name), shares in new.items():
        held = shares[np.isfinite(shares)]
        assert len(held) == (6 if name == "bits" else 5)
        assert held.min() > 0.77 and 0.85 < held.mean() < 0.98


# ---- The published tables.

@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder of the tables, and what the report prints of it; 1e+12 is 1e12."""
    folder = tmp_path_factory.mktemp("published") / "results"
    shutil.copytree(RESULTS, folder, ignore=shutil.ignore_patterns("*.png", "logs", "queue"))
    done = here(folder, "study.report", "--out", ".")
    assert done.returncode == 0, done.stderr
    return folder, re.sub(r"e\+0?(\d)", r"e\1", done.stdout)


def test_the_report_prints_its_tables(published):
    folder, text = published
    rows = iter(text.splitlines())
    for start in PRINTED:
        assert any(row.startswith(f"| {start}") for row in rows), f"not in this order: {start}"
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_the_contexts_of_the_published_runs(published):
    text = here(published[0], "study.report", "context", "--out", ".").stdout
    assert "1.996 (128, 64)" in text and "2.311 (256, 48)" in text
    assert re.search(r"AR [|] 3e.12 [|] 0.504 .* [|] 0.374 .* [|] -0.13 .* [|] 11.8", text)
    assert re.search(r"AR [|] 3e.13 [|] 0.410 .* [|] 0.335 .* [|] -0.04", text)


def test_depth_is_compared_at_the_same_width(tmp_path):
    """Planted: with four layers bytes are 0.2 better, and BPE as good as with two."""
    shutil.copy(RESULTS / "runs.csv", tmp_path)
    lines = [line | {"depth": "4"} for line in scaling.read_rows(RESULTS / "runs.csv", dict)
             if (line["flops_budget"], line["width"]) == ("10000000000000.0", "64")]
    for line in lines:
        line["val_bpb"] = str(float(line["val_bpb"]) - 0.2 * (line["tokenizer"] == "byte"))
    log.write_csv(tmp_path / "depth.csv", lines[0], [line.values() for line in lines])
    shown = here(tmp_path, "study.report", "depth", "--out", ".").stdout
    assert re.findall(r"(AR|MDM) . 1e.13 . 64 . 4 .*(-0.20) \[", shown) == [
        ("AR", "-0.20"), ("MDM", "-0.20")]


def test_a_table_without_minima_is_one_line(tmp_path):
    rows = (RESULTS / "runs.csv").read_text().splitlines()[:9]
    (tmp_path / "runs.csv").write_text("\n".join(rows) + "\n")
    assert_one_line(here(tmp_path, "study.report", "--out", "."), "runs.csv", "minima")
