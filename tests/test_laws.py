"""laws.py: planted laws are recovered, gaps and parities equal their closed forms."""
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

@pytest.mark.parametrize("kind", ["squares", "huber"])
@pytest.mark.parametrize("law", LAWS)
def test_a_planted_law_is_recovered_from_losses_without_noise(law, kind):
    N, D = design()
    found = laws.fit_law(N, D, loss(law, N, D), kind)
    assert found.keys() == law.keys()
    assert found == pytest.approx(law, rel=2e-3, abs=1e-3)
    assert loss(found, N, D) == pytest.approx(loss(law, N, D), rel=1e-5)


def test_huber_is_not_moved_by_outliers_that_move_squares():
    law, (N, D) = LAWS[0], design()
    L = loss(law, N, D) * (1 + 1e-4 * np.random.default_rng(0).standard_normal(len(N)))
    L[[6, 9]] *= 1.3
    truth = loss(law, N, D)
    errors = {kind: np.abs(loss(laws.fit_law(N, D, L, kind), N, D) / truth - 1).max()
              for kind in ("squares", "huber")}
    assert errors["huber"] < 0.005 < 0.05 < errors["squares"]


def test_huber_ends_at_the_minimum_of_its_function():
    rng, (N, D) = np.random.default_rng(3), design()
    L = loss(LAWS[1], N, D) * np.exp(0.01 * rng.standard_t(2, len(N)))

    def total(law):
        r = np.abs(np.log(L / loss(law, N, D)))
        return np.where(r < 0.01, r**2 / 2, 0.01 * (r - 0.005)).sum()

    found = laws.fit_law(N, D, L, "huber", delta=0.01)
    for _ in range(300):
        other = {key: value * np.exp(0.003 * rng.standard_normal()) for key, value in found.items()}
        assert total(other) > total(found) * (1 - 1e-3)


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
# One E for several configurations.

def test_a_profile_is_the_best_of_all_sets_of_terms_at_each_E():
    """Against plain least squares, set by set."""
    rng = np.random.default_rng(1)
    X, Y, grid = rng.random((20, 9, 2)), 2 + rng.random((3, 9)), np.array([0, 0.5, 1.9])
    sse, best, coefficients = laws.best_terms(X, Y, grid)
    for k, E in enumerate(grid):
        for s, y in enumerate(Y - E):
            found = []
            for terms in X:
                part, *_ = np.linalg.lstsq(terms, y, rcond=None)
                found.append(((y - terms @ part) ** 2).sum() if (part >= 0).all() else np.inf)
            assert sse[k, s] == pytest.approx(min(found)) and best[k, s] == np.argmin(found)
            left = y - X[best[k, s]] @ coefficients[k, s]
            assert (left**2).sum() == pytest.approx(sse[k, s])


@pytest.mark.parametrize("entropies, one_is_better", [((0.7, 0.7), True), ((0.3, 1.2), False)])
def test_E_and_whether_it_is_shared_are_recovered(entropies, one_is_better):
    rng, (N, D), grid = np.random.default_rng(0), design(), np.linspace(0, 1.5, 31)
    parts = {}
    for name, E, law in zip("ab", entropies, LAWS, strict=False):
        L = loss(law | {"E": E}, N, D) + 0.01 * rng.standard_normal((20, len(N)))
        sse, found = laws.profile_surfaces(N, D, L, grid)
        parts[name] = len(N), sse
        # The law at the true E is the planted one, but for noise.
        fitted = found[np.abs(grid - E).argmin(), 0]
        assert fitted == pytest.approx([E, *list(law.values())[1:]], rel=0.5)
        assert laws.surface_loss(fitted, N, D) == pytest.approx(L[0], abs=0.04)
    shared, separate, rises, aicc_one, aicc_separate = laws.joint_fit(parts, 4)
    assert (aicc_one < aicc_separate) == one_is_better
    for name, E in zip("ab", entropies, strict=True):
        assert abs(grid[separate[name]] - E).mean() < 0.15
        assert rises[name].min() == 0
    if one_is_better:
        assert abs(grid[shared] - 0.7).mean() < 0.1
        # A shared E costs no more than a numbers' worth of likelihood.
        assert rises["one E"][shared[0]] == 0


def test_frontier_laws_are_recovered():
    C = np.repeat(np.geomspace(1e12, 1e14, 5), 3)
    sse, found = laws.profile_frontiers(C, (0.4 + 30 * C**-0.12)[None], np.linspace(0, 1, 21))
    assert found[sse[:, 0].argmin(), 0] == pytest.approx([0.4, 30, 0.12], rel=0.1)


def test_AICc_by_hand():
    parts = {"a": (10, np.array([[2.0], [1.0]])), "b": (12, np.array([[3.0], [6.0]]))}
    shared, _, _, one, separate = laws.joint_fit(parts, 4)
    a, b = 10 * np.log([0.2, 0.1]), 12 * np.log([0.25, 0.5])
    # Two variances, two laws of four numbers, and one or two E; 22 runs.
    assert shared[0] == (a + b).argmin()
    assert one == pytest.approx((a + b).min() + 2 * 11 + 2 * 11 * 12 / 10)
    assert separate == pytest.approx(a.min() + b.min() + 2 * 12 + 2 * 12 * 13 / 9)


def test_lack_of_fit_is_seen_beside_replicates_and_not_without():
    rng, groups = np.random.default_rng(0), np.repeat(np.arange(16).reshape(8, 2), 3, axis=0)
    noise = rng.standard_normal((200, 24))
    chances = [laws.lack_of_fit(row, groups, numbers=0)[3] for row in noise]
    assert np.mean(chances) == pytest.approx(0.5, abs=0.08)
    sd, df, _, p = laws.lack_of_fit(0.1 * noise[0] + np.repeat(np.arange(8), 3), groups, 0)
    assert p < 1e-4 and df == 16 and sd == pytest.approx(0.1, rel=0.4)
    assert np.isnan(laws.lack_of_fit(noise[0, :3], groups[::8][:3], 1)[3])


# -----------------------------------------------------------------------------------------------
# Frontier, gap, parity, IsoFLOP minimum.

def test_the_frontier_is_the_lowest_loss_over_real_widths():
    budgets = np.array([1e14, 1e16, 1e18])
    law = np.array([list(LAWS[0].values())])
    lowest = laws.surface_frontier(law, budgets, vocab_size=256, context=512)[0]
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


def planted_runs(rng, noise, widths=4):
    """Return C, N, L of runs about planted minima 3 C^-0.05, with N* = 1e-4 C^0.6."""
    C = np.repeat(np.geomspace(1e12, 1e14, 5), widths)
    N = 1e-4 * C**0.6 * np.tile(np.geomspace(0.4, 2.5, widths), 5)
    L = 10 * C**-0.05 + 0.08 * np.log(N / (1e-4 * C**0.6)) ** 2
    return C, N, L + noise * rng.standard_normal(len(L))


def test_pooled_minima_recover_planted_ones_also_from_one_width():
    C, N, L = planted_runs(np.random.default_rng(0), noise=0)
    # At the last budget one width is left, far from the minimum.
    minima, best, curvature, fitted = laws.pooled_minima(C[:-3], N[:-3], L[None, :-3])
    budgets = np.unique(C)
    np.testing.assert_allclose(minima[0], 10 * budgets**-0.05, rtol=1e-6)
    np.testing.assert_allclose(np.exp(best[0]), 1e-4 * budgets**0.6, rtol=1e-5)
    np.testing.assert_allclose(curvature, 0.08, rtol=1e-6)
    np.testing.assert_allclose(fitted[0], L[:-3], rtol=1e-6)


def test_kinds_of_runs_share_the_curvature_and_have_minima_of_their_own():
    C, N, L = planted_runs(np.random.default_rng(0), noise=0)
    # Runs of the second kind are best at twice the size, and lose 0.3 less.
    C, N, L = np.tile(C, 2), np.concatenate([N, 2 * N]), np.concatenate([L, L - 0.3])
    kinds = np.repeat([0, 1], 20)
    minima, best, curvature, _ = laws.pooled_minima(C, N, L[None], kinds)
    budgets = np.unique(C)
    lowest = 10 * budgets**-0.05
    np.testing.assert_allclose(minima[0], np.concatenate([lowest, lowest - 0.3]), rtol=1e-6)
    np.testing.assert_allclose(np.exp(best[0, 5:] - best[0, :5]), 2, rtol=1e-6)
    np.testing.assert_allclose(curvature, 0.08, rtol=1e-6)
    assert laws.cells(C, kinds)[0].shape == (2, 10)


def test_without_a_minimum_or_with_too_few_runs_there_are_no_samples():
    C, N, L = planted_runs(np.random.default_rng(0), noise=0)
    assert laws.resample(C, N, 20 - L, seed=0) is None
    assert laws.resample(C[:4], N[:4], L[:4], seed=0) is None


def test_a_trend_is_in_decades_a_decade():
    C = np.array([1e12, 1e13, 1e15])
    assert laws.trend(C, np.array([[10, 20, 80], [30, 30, 30]])) == pytest.approx(
        [np.log10(2), 0], abs=1e-9)


def test_a_wild_sample_below_zero_has_a_gap():
    byte, bpe = np.array([[-4.0, 1.3]]), np.array([[2.9, -2.6]])
    G = laws.interpolated_gap(np.array([3e12, 1e13]), byte, np.array([3e12, 1e13]), bpe)
    assert not np.isnan(G).any() and G[0, 0] == pytest.approx(1)


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
        samples = laws.resample(C, N, L, seed, count=100)
        assert (samples[0] == L).all() and samples.shape == (101, 20)
        minima = laws.pooled_minima(C, N, samples)[0]
        low, high = np.quantile(minima[1:], (0.05, 0.95), axis=0)
        truth = 10 * np.unique(C) ** -0.05
        held.append((low < truth) & (truth < high))
    assert 0.80 < np.mean(held) < 0.97
