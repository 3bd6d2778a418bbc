"""laws.py: planted laws are recovered, gaps and parities equal their closed forms."""
import itertools

import numpy as np
import pytest

import laws
from model import Config, flops_per_token

LAWS = [dict(E=1.1, A=80, B=600, alpha=0.35, beta=0.42),
        dict(E=0.6, A=12, B=60, alpha=0.2, beta=0.25),
        dict(E=0, A=400, B=410, alpha=0.34, beta=0.28)]
C = np.geomspace(1e10, 1e30, 801)


def loss(law, N, D):
    return law["E"] + law["A"] / N ** law["alpha"] + law["B"] / D ** law["beta"]


def design():
    """Return N and D of a sweep: four widths at each of four budgets, two at a fifth."""
    budgets = {1e12: (16, 32, 48, 64), 3e12: (32, 48, 64, 96), 1e13: (48, 64, 96, 128),
               3e13: (64, 96, 128, 192), 1e14: (128, 192)}
    runs = [(C, Config(width=width)) for C, widths in budgets.items() for width in widths]
    N = np.array([16.0 * config.width**2 * config.depth for _, config in runs])
    return N, np.array([C / flops_per_token(config) for C, config in runs])


# -----------------------------------------------------------------------------------------------
# The fit.

@pytest.mark.parametrize("law", LAWS)
def test_a_planted_law_is_recovered_from_losses_without_noise(law):
    N, D = design()
    found = laws.fit_law(N, D, loss(law, N, D))
    assert found.keys() == law.keys()
    assert [found["alpha"], found["beta"]] == pytest.approx([law["alpha"], law["beta"]], rel=0.01)
    assert loss(found, N, D) == pytest.approx(loss(law, N, D), rel=1e-4)


def test_intervals_hold_the_truth_as_often_as_they_say():
    law, rng, (N, D) = LAWS[0], np.random.default_rng(0), design()
    truth, hits = np.array(list(law.values())), np.zeros(5)
    for trial in range(100):
        noisy = loss(law, N, D) * (1 + 0.01 * rng.standard_normal(len(N)))
        found = laws.fit_laws(N, D, noisy, laws.bootstrap_weights(N, D, trial, count=60))
        low, high = np.quantile(found[1:], (0.05, 0.95), axis=0)
        hits += (low <= truth) & (truth <= high)
    assert (hits >= 78).all() and (hits <= 98).all()


def test_nonnegative_least_squares_agrees_with_brute_force():
    """Against plain least squares with every set of columns."""
    rng = np.random.default_rng(1)
    X, y = rng.standard_normal((100, 8, 3)), rng.standard_normal((100, 8))
    moment = (X.transpose(0, 2, 1) @ y[..., None])[..., 0]
    found, explained = laws.nonnegative_least_squares(X.transpose(0, 2, 1) @ X, moment)
    for i in range(100):
        best = (y[i] ** 2).sum()
        for chosen in itertools.chain.from_iterable(
                itertools.combinations(range(3), size) for size in (1, 2, 3)):
            part, *_ = np.linalg.lstsq(X[i][:, chosen], y[i], rcond=None)
            if (part >= 0).all():
                best = min(best, ((y[i] - X[i][:, chosen] @ part) ** 2).sum())
        assert ((y[i] - X[i] @ found[i]) ** 2).sum() == pytest.approx(best)
        assert (y[i] ** 2).sum() - explained[i] == pytest.approx(best)
    assert (found >= 0).all() and (found == 0).any() and (found > 0).all(axis=1).any()


def test_a_weight_of_two_is_a_run_given_twice():
    N, D = design()
    L = loss(LAWS[1], N, D) * (1 + 0.01 * np.random.default_rng(2).standard_normal(len(N)))
    weights = laws.bootstrap_weights(N, D, seed=0, count=3)
    assert (weights[0] == 1).all() and (weights.sum(axis=1) == len(N)).all()
    for row, law in zip(weights, laws.fit_laws(N, D, L, weights), strict=True):
        repeated = np.repeat(np.arange(len(N)), row.astype(int))
        other = laws.fit_law(N[repeated], D[repeated], L[repeated])
        # Two searches from other means end near each other, not at the same digit.
        same = loss(dict(zip(laws.NAMES, law, strict=True)), N, D)
        assert same == pytest.approx(loss(other, N, D), rel=2e-3)


@pytest.mark.parametrize("N, D, L, message", [
    ([1, 2, 3, 4], [1, 2, 3, 4], [4, 3, 2, 1], "five different runs"),
    ([1, 1, 1, 2, 2, 2], [1, 2, 3, 1, 2, 3], [6, 5, 4, 3, 2, 1], "three different N"),
    ([1, 2, 3, 1, 2, 3], [1, 1, 1, 2, 2, 2], [6, 5, 4, 3, 2, 1], "three D"),
    ([1, 2, 3], [1, 2], [1], "length"),
    ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 4, float("nan")], "positive and finite"),
    ([0, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5], "positive and finite")])
def test_too_few_runs_for_a_law_are_refused(N, D, L, message):
    with pytest.raises(ValueError, match=message):
        laws.fit_law(N, D, L)


# -----------------------------------------------------------------------------------------------
# Frontier, gap, parity, IsoFLOP minimum.

def test_the_frontier_is_the_lowest_loss_over_real_widths():
    budgets = np.array([1e14, 1e16, 1e18])
    law = np.array([list(LAWS[0].values())])
    lowest = laws.frontier(law, budgets, vocab_size=256, context=512)[0]
    widths = [*range(16, 256, 16), *range(256, 4096, 64)]
    shapes = [Config(width=width) for width in widths if width < 128 or width % 32 == 0]
    N = np.array([16.0 * shape.width**2 * shape.depth for shape in shapes])
    flops = np.array([flops_per_token(shape) for shape in shapes])
    real = [loss(LAWS[0], N, budget / flops).min() for budget in budgets]
    # Real depths are whole numbers.
    assert lowest == pytest.approx(real, rel=0.005)


def test_gap_and_parity_equal_their_closed_forms():
    """BPE: 3 (C / 1e10)^-0.05. Bytes need 10 times as much at 1e10, and meet BPE at 1e20."""
    bpe = 3 * (C / 1e10) ** -0.05
    byte = 3 * (C / 1e11) ** (-0.05 * 10 / 9)
    G = laws.gap(byte[None], bpe[None], C)[0]
    # log10 G = 1 - (log10 C - 10) / 10
    at = np.interp([10, 15, 20, 25], np.log10(C), np.log10(G))
    assert at == pytest.approx([1, 0.5, 0, -0.5], abs=1e-6)
    assert np.log10(laws.parity(byte[None], bpe[None], C)[0]) == pytest.approx(20, abs=1e-3)
    assert laws.parity(bpe[None], byte[None], C)[0] == pytest.approx(C[0])


def test_frontiers_that_never_meet_have_no_parity():
    bpe = 3 * (C / 1e10) ** -0.05
    parallel, floor = 3 * (C / 1e11) ** -0.05, 0.5 + bpe
    bytes_, both = np.stack([parallel, floor]), np.stack([bpe, bpe])
    assert np.isinf(laws.parity(bytes_, both, C)).all()
    G = laws.gap(bytes_, both, C)
    assert G[0, C < 1e28] == pytest.approx(10)
    assert np.isinf(G[:, -1]).all()


def test_an_isoflop_minimum_is_that_of_the_parabola_or_none_at_an_edge():
    N = np.array([1e4, 3e4, 1e5, 3e5])
    lowest, low, _ = laws.isoflop_minimum(N, 2 + 0.1 * np.log(N / 5e4) ** 2)
    assert lowest == pytest.approx(5e4) and low == pytest.approx(2)
    assert laws.isoflop_minimum(N, 2 + 0.1 * np.log(N / 5e5) ** 2) is None
    assert laws.isoflop_minimum(N, 2 - 0.1 * np.log(N / 5e4) ** 2) is None
    assert laws.isoflop_minimum(N[:2], np.array([2.0, 3.0])) is None


def planted_runs(rng, noise, widths=4):
    """Return C, N, L of runs about planted minima 3 C^-0.05, with N* = 1e-4 C^0.6."""
    C = np.repeat(np.geomspace(1e12, 1e14, 5), widths)
    N = 1e-4 * C**0.6 * np.tile(np.geomspace(0.4, 2.5, widths), 5)
    L = 10 * C**-0.05 + 0.08 * np.log(N / (1e-4 * C**0.6)) ** 2
    return C, N, L + noise * rng.standard_normal(len(L))


def test_pooled_minima_recover_planted_ones_also_from_one_width():
    C, N, L = planted_runs(np.random.default_rng(0), noise=0)
    # At the last budget one width is left, far from the minimum.
    budgets, minima, fitted = laws.pooled_minima(C[:-3], N[:-3], L[:-3])
    np.testing.assert_allclose(minima, 10 * budgets**-0.05, rtol=1e-6)
    np.testing.assert_allclose(fitted, L[:-3], rtol=1e-6)


def test_the_interpolated_gap_of_power_laws_is_exact_and_bounded_by_the_budgets():
    C = np.geomspace(1e12, 1e14, 5)
    bpe, byte = 10 * C**-0.05, 10 * (C / 20) ** -0.05
    gap = laws.interpolated_gap(C, np.array([byte]), C, np.array([bpe]))[0]
    np.testing.assert_allclose(gap[C * 20 < 1e14], 20, rtol=1e-6)
    assert np.isinf(gap[C * 20 > 1.01e14]).all()


def test_intervals_of_minima_hold_the_truth_as_often_as_they_say():
    held = []
    for seed in range(60):
        C, N, L = planted_runs(np.random.default_rng(seed), noise=0.02)
        budgets, samples = laws.resampled_minima(C, N, L, seed, count=100)
        low, high = np.quantile(samples[1:], (0.05, 0.95), axis=0)
        held.append((low < 10 * budgets**-0.05) & (10 * budgets**-0.05 < high))
    assert 0.80 < np.mean(held) < 0.97
