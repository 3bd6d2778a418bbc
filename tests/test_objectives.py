"""The two objectives, by exact enumeration: what AR's loss and MDM's bound must be, to the last digit or within their noise."""
import itertools
import math

import numpy as np
import pytest
import torch

import model
import train_ar
import train_mdm
from run import InputError
from test_model import lively


def tiny(vocab_size, context, causal):
    return lively(model.Config(vocab_size, context, width=32, causal=causal)).double()


def every_window(vocab_size, context):
    return torch.tensor(list(itertools.product(range(vocab_size), repeat=context)))


@torch.no_grad()
def test_ar_is_a_probability():
    """exp(-nats) of all the windows there are sums to one."""
    net = tiny(3, 5, causal=True)
    windows = every_window(3, 5)
    total = sum(math.exp(-5 * train_ar.loss(net, window[None]).item()) for window in windows)
    assert total == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_ar_evaluation_is_the_loss_in_bits_per_byte():
    net = tiny(4, 6, causal=True)
    windows = torch.randint(4, (40, 6)).numpy()
    lengths = np.array([1, 2, 3, 10])
    bpb, stderr = train_ar.evaluate(net, windows, lengths, size=7)
    nats = np.array([6 * train_ar.loss(net, torch.from_numpy(window[None])).item() for window in windows])
    nbytes = lengths[windows].sum(axis=1)
    assert bpb == pytest.approx(nats.sum() / math.log(2) / nbytes.sum(), rel=1e-5)
    # The error of a ratio, by the jackknife.
    without = (nats.sum() - nats) / math.log(2) / (nbytes.sum() - nbytes)
    jackknife = math.sqrt((len(windows) - 1) ** 2 / len(windows) * without.var(ddof=1))
    assert stderr == pytest.approx(jackknife, rel=0.05)


def masked_nats(net, window, masked):
    """Sum over the masked positions of -log p(x_i | the others)."""
    inputs = torch.where(masked, net.config.vocab_size, window)
    return (model.nats(net, inputs[None], window[None])[0] * masked).sum().item()


def bound_by_definition(net, window, schedule, span=1):
    """E_u [m'(u) / m(u) * sum over masked i of -log p(x_i | unmasked)]: all masks of independent runs, u by quadrature."""
    runs = len(window) // span
    points, weights = np.polynomial.legendre.leggauss(200)
    u, du = (points + 1) / 2, weights / 2
    if schedule == "linear":
        m, slope = u, np.ones_like(u)
    else:
        m, slope = np.cos(np.pi / 2 * (1 - u)), np.pi / 2 * np.sin(np.pi / 2 * (1 - u))
    total = 0.0
    for mask in itertools.product((False, True), repeat=runs):
        k = sum(mask)
        if k:
            chance = (du * slope / m * m**k * (1 - m) ** (runs - k)).sum()
            total += chance * masked_nats(net, window, torch.tensor(mask).repeat_interleave(span))
    return total


def bound_by_order(net, window, span=1):
    """E_{k ~ U{1..R}} E_{|S| = k} [R / k * sum over S]."""
    runs = len(window) // span
    total = 0.0
    for k in range(1, runs + 1):
        choices = list(itertools.combinations(range(runs), k))
        for chosen in choices:
            masked = torch.zeros(runs, dtype=torch.bool)
            masked[list(chosen)] = True
            total += masked_nats(net, window, masked.repeat_interleave(span)) / k / len(choices)
    return total


@torch.no_grad()
@pytest.mark.parametrize("span", [1, 2, 3, 6])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_mdm_loss_is_the_bound(schedule, span):
    net, window = tiny(3, 6, causal=False), torch.tensor([0, 2, 1, 1, 0, 2])
    exact = bound_by_definition(net, window, schedule, span)
    assert bound_by_order(net, window, span) == pytest.approx(exact, rel=1e-5)
    generator = torch.Generator().manual_seed(0)
    losses = [6 * train_mdm.loss(net, window.expand(500, -1), generator, schedule, span).item() for _ in range(20)]
    error = np.std(losses, ddof=1) / math.sqrt(len(losses))
    assert error < 0.01 * exact                               # close enough to tell a wrong weight
    assert np.mean(losses) == pytest.approx(exact, abs=4 * error + 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("size", [1, 3])
def test_mdm_loss_is_unbiased_on_few_windows(schedule, size):
    net, windows = tiny(3, 4, causal=False), torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1], [1, 0, 0, 0]])[:size]
    exact = np.mean([bound_by_order(net, window) for window in windows]) / 4
    generator = torch.Generator().manual_seed(1)
    losses = [train_mdm.loss(net, windows, generator, schedule).item() for _ in range(1500)]
    assert np.mean(losses) == pytest.approx(exact, abs=4 * np.std(losses) / math.sqrt(len(losses)))


@torch.no_grad()
@pytest.mark.parametrize("span", [1, 2])
def test_mdm_bound_is_above_the_exact_likelihood(span):
    """The likelihood is the mean over the orders in which runs are unmasked; it is a probability, and the bound lies above -log of it."""
    net, runs = tiny(2, 3 * span, causal=False), 3
    total = 0.0
    for window in every_window(2, 3 * span):
        likelihood = 0.0
        for order in itertools.permutations(range(runs)):
            masked, nats = torch.ones(runs, dtype=torch.bool), 0.0
            for i in order:
                here = torch.zeros(runs, dtype=torch.bool)
                here[i] = True
                inputs = torch.where(masked.repeat_interleave(span), 2, window)
                nats += (model.nats(net, inputs[None], window[None])[0] * here.repeat_interleave(span)).sum().item()
                masked[i] = False
            likelihood += math.exp(-nats) / math.factorial(runs)
        total += likelihood
        assert bound_by_order(net, window, span) >= -math.log(likelihood) - 1e-6
    assert total == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("span", [1, 4])
def test_masks_are_whole_runs_with_the_weights_of_their_number(schedule, span):
    ids = torch.arange(256).repeat(400, 1) % 7
    inputs, weights = train_mdm.corrupt(ids, 7, torch.Generator().manual_seed(0), schedule, span)
    masked = inputs == 7
    assert (inputs[~masked] == ids[~masked]).all() and ((weights > 0) == masked).all()
    runs = masked.reshape(400, -1, span)
    assert (runs.all(dim=2) == runs.any(dim=2)).all()
    k = runs.any(dim=2).sum(dim=1)
    assert k.min() >= 1 and len(k.unique()) > 30              # stratified: they hardly repeat
    if schedule == "linear":
        expected = (256 / span) / k.double()
        torch.testing.assert_close(weights.sum(dim=1).double(), expected * k * span, rtol=1e-5, atol=0)
        assert (k.double() / (256 / span)).sort().values.sub(torch.linspace(0, 1, 400)).abs().max() < 0.02
    rate = masked.double().mean(dim=0).reshape(-1, span).mean(dim=1)
    mean = 0.5 if schedule == "linear" else 2 / math.pi
    assert (rate - mean).abs().mean() < 0.05                  # all places alike
    assert (weights.mean() - 1).abs() < 0.02                  # each token counts once in expectation


def test_masks_are_a_pure_function_of_seed_and_step():
    ids = torch.zeros(4, 32, dtype=torch.long)
    draw = lambda seed, step: train_mdm.corrupt(ids, 5, train_mdm.noise(seed, step))[0]
    assert torch.equal(draw(3, 9), draw(3, 9))
    assert not torch.equal(draw(3, 9), draw(3, 10)) and not torch.equal(draw(3, 9), draw(4, 9)) and not torch.equal(draw(9, 3), draw(3, 9))


def test_spans_that_do_not_divide_the_window():
    with pytest.raises(InputError):
        train_mdm.corrupt(torch.zeros(2, 32, dtype=torch.long), 5, torch.Generator(), span=5)


@torch.no_grad()
def test_mdm_evaluation_is_the_bound_and_its_error_is_honest():
    net = tiny(3, 6, causal=False)
    lengths, rng = np.array([1, 2, 3]), np.random.default_rng(0)
    population = rng.integers(3, size=(12, 6))
    exact = [bound_by_order(net, torch.from_numpy(window)) for window in population]
    exact = sum(exact) / math.log(2) / lengths[population].sum()
    found, errors = zip(*[train_mdm.evaluate(net, population[rng.integers(12, size=200)], lengths, seed=i) for i in range(60)])
    assert np.mean(found) == pytest.approx(exact, abs=4 * np.std(found) / math.sqrt(60))
    assert 0.75 < np.mean(errors) / np.std(found, ddof=1) < 1.33
