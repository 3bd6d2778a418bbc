"""The objectives, by exact enumeration: AR's likelihood and MDM's bound, to the last digit."""
import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from test_model import random_model

import model
import run
import train_ar
import train_mdm


def tiny(vocab_size, context, causal, **remedies):
    return random_model(model.Config(vocab_size, context, 32, causal, **remedies)).double()


def all_sequences(vocab_size, context):
    return torch.tensor(list(itertools.product(range(vocab_size), repeat=context)))


@torch.no_grad()
@pytest.mark.parametrize("context, remedies", [
    (5, {}), (5, {"conv": 3}), (4, {"patch": 2}), (4, {"patch": 4, "conv": 2})])
def test_ar_likelihoods_of_all_sequences_sum_to_one(context, remedies):
    net = tiny(3, context, causal=True, **remedies)
    nats = [context * train_ar.loss(net, ids[None]).item() for ids in all_sequences(3, context)]
    assert sum(math.exp(-n) for n in nats) == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_ar_evaluation_is_the_loss_in_bits_per_byte():
    net = tiny(4, 6, causal=True)
    sequences = torch.randint(4, (40, 6)).numpy()
    lengths = np.array([1, 2, 3, 10])
    bpb, stderr = train_ar.evaluate(net, sequences, lengths)
    nats = [6 * train_ar.loss(net, torch.from_numpy(ids[None])).item() for ids in sequences]
    bits = np.array(nats) / math.log(2)
    nbytes = lengths[sequences].sum(axis=1)
    assert bpb == pytest.approx(bits.sum() / nbytes.sum(), rel=1e-5)
    # The standard error of a ratio, by the jackknife.
    left_out = (bits.sum() - bits) / (nbytes.sum() - nbytes)
    jackknife = math.sqrt((len(bits) - 1) ** 2 / len(bits) * left_out.var(ddof=1))
    assert stderr == pytest.approx(jackknife, rel=0.05)


class Elsewhere:
    """A model on some accelerator, of which we note how many sequences it reads at once."""
    config = model.Config(context=512)

    def __init__(self, device):
        self.device, self.sizes = device, []

    def parameters(self):
        return iter([torch.empty(1, device=self.device)])

    def __call__(self, inputs, ids):
        self.sizes.append(len(ids))
        return torch.zeros(ids.shape)


@pytest.mark.parametrize("train", [train_ar, train_mdm])
def test_an_accelerator_evaluates_more_sequences_at_once(train):
    for device, sizes in (("cpu", [4] * 10), ("meta", [32, 8])):
        net = Elsewhere(device)
        train.evaluate(net, np.zeros((40, 512), dtype=int), np.ones(256))
        assert net.sizes == sizes


@pytest.mark.parametrize("train", [train_ar, train_mdm])
def test_the_error_of_one_sequence_is_not_known(train, recwarn):
    net = tiny(4, 6, causal=train is train_ar)
    bpb, stderr = train.evaluate(net, np.zeros((1, 6), dtype=int), np.ones(4))
    assert math.isfinite(bpb) and math.isnan(stderr) and not recwarn.list


def masked_nll(net, ids, masked):
    """Return the sum over the masked positions of -log p(x_i | the visible tokens)."""
    inputs = torch.where(masked, net.config.vocab_size, ids)
    return (net(inputs[None], ids[None])[0] * masked).sum().item()


def bound_by_definition(net, ids, schedule, span=1):
    """Return E_u [m'(u) / m(u) sum over masked i of -log p(x_i | visible)], over all masks."""
    runs = len(ids) // span
    points, weights = np.polynomial.legendre.leggauss(200)
    u, du = (points + 1) / 2, weights / 2
    rate, slope = u, np.ones_like(u)
    if schedule == "cosine":
        rate = np.cos(np.pi / 2 * (1 - u))
        slope = np.pi / 2 * np.sin(np.pi / 2 * (1 - u))
    if schedule == "bell":
        normal = statistics.NormalDist(0.5, 0.2)
        tail = normal.cdf(0)
        rate = np.array([normal.inv_cdf(tail + x * (1 - 2 * tail)) for x in u])
        slope = (1 - 2 * tail) / np.array([normal.pdf(m) for m in rate])
    total = 0.0
    for mask in itertools.product((False, True), repeat=runs):
        k = sum(mask)
        if k:
            probability = rate**k * (1 - rate) ** (runs - k)
            masked = torch.tensor(mask).repeat_interleave(span)
            total += (du * slope / rate * probability).sum() * masked_nll(net, ids, masked)
    return total


def bound_by_count(net, ids, span=1):
    """Return E_{k ~ U{1..R}} E_{|S| = k} [R / k sum over S of -log p(x_i | visible)]."""
    runs = len(ids) // span
    total = 0.0
    for k in range(1, runs + 1):
        choices = list(itertools.combinations(range(runs), k))
        for chosen in choices:
            masked = torch.zeros(runs, dtype=torch.bool)
            masked[list(chosen)] = True
            nll = masked_nll(net, ids, masked.repeat_interleave(span))
            total += nll / k / len(choices)
    return total


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["linear", "cosine", "bell"])
@pytest.mark.parametrize("span, remedies", [
    (1, {}), (2, {}), (6, {}), (1, {"conv": 3}), (2, {"conv": 3}), (6, {"conv": 3}),
    (2, {"patch": 2})])
def test_the_mdm_loss_is_the_bound(schedule, span, remedies):
    net, ids = tiny(3, 6, causal=False, **remedies), torch.tensor([0, 2, 1, 1, 0, 2])
    exact = bound_by_definition(net, ids, schedule, span)
    assert bound_by_count(net, ids, span) == pytest.approx(exact, rel=1e-5)
    generator = torch.Generator().manual_seed(0)
    batch = ids.expand(500, -1)
    # Patches are masked whole without being told.
    given = 1 if "patch" in remedies else span
    losses = [6 * train_mdm.loss(net, batch, generator, schedule, given).item() for _ in range(20)]
    error = np.std(losses, ddof=1) / math.sqrt(len(losses))
    # Close enough to tell a wrong weight.
    assert error < 0.01 * exact
    assert np.mean(losses) == pytest.approx(exact, abs=4 * error + 1e-6 * exact)


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("size", [1, 3])
def test_the_mdm_loss_is_unbiased_on_few_sequences(schedule, size):
    net = tiny(3, 4, causal=False)
    batch = torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1], [1, 0, 0, 0]])[:size]
    exact = np.mean([bound_by_count(net, ids) for ids in batch]) / 4
    generator = torch.Generator().manual_seed(1)
    losses = [train_mdm.loss(net, batch, generator, schedule).item() for _ in range(1500)]
    assert np.mean(losses) == pytest.approx(exact, abs=4 * np.std(losses) / math.sqrt(1500))


@torch.no_grad()
@pytest.mark.parametrize("schedule, size, count, share", [
    ("linear", 1, 800, 0.5), ("cosine", 1, 800, 0.3), ("linear", 50, 60, 0.5),
    ("cosine", 50, 60, 0.8), ("linear", 50, 60, 0.1)])
def test_a_span_share_trains_on_the_mixture_of_two_bounds(schedule, size, count, share):
    net, ids = tiny(3, 4, causal=False), torch.tensor([2, 1, 2, 1])
    spans, singles = bound_by_count(net, ids, 4), bound_by_count(net, ids, 1)
    # Far apart, so that a wrong share shows.
    assert spans < 0.2 * singles
    exact = share * spans + (1 - share) * singles
    generator, batch = torch.Generator().manual_seed(0), ids.expand(size, -1)
    losses = [4 * train_mdm.loss(net, batch, generator, schedule, 4, share).item()
              for _ in range(count)]
    error = np.std(losses, ddof=1) / math.sqrt(count)
    assert np.mean(losses) == pytest.approx(exact, abs=4 * error)
    assert error < 0.07 * (singles - spans)


@pytest.mark.parametrize("size", [1, 4])
def test_a_sequence_has_spans_or_single_tokens_by_its_own_draw(size):
    ids = torch.zeros(size, 64, dtype=torch.long)
    kinds = []
    for step in range(600):
        generators = [run.generator(0, step) for _ in range(2)]
        inputs, weights = train_mdm.corrupt_mixed(ids, 5, generators[0], span=8, span_share=0.3)
        again = train_mdm.corrupt_mixed(ids, 5, generators[1], span=8, span_share=0.3)
        assert torch.equal(inputs, again[0]) and torch.equal(weights, again[1])
        masked = inputs == 5
        assert ((weights > 0) == masked).all()
        runs = masked.view(size, 8, 8)
        # All single tokens masked look like spans: not counted.
        mixed = ~masked.all(dim=1)
        kinds.append((runs.all(dim=2) == runs.any(dim=2)).all(dim=1)[mixed])
    spanned = torch.cat(kinds).double()
    # An eighth of the spans is left out, since all of them are masked, and a 64th of the others.
    expected = 0.3 * 7 / 8 / (0.3 * 7 / 8 + 0.7 * 63 / 64)
    assert spanned.mean().item() == pytest.approx(expected, abs=4 * (0.21 / len(spanned)) ** 0.5)
    if size > 1:
        assert any(0 < kind.double().mean() < 1 for kind in kinds if len(kind))
    whole = train_mdm.corrupt_mixed(ids, 5, run.generator(0, 1), "cosine", 8)
    alone = train_mdm.corrupt(ids, 5, run.generator(0, 1), "cosine", 8)
    assert all(torch.equal(a, b) for a, b in zip(whole, alone, strict=True))


def order_likelihood(net, ids, order, span):
    """Return p(ids) when its runs are predicted one by one in this order."""
    masked = torch.ones(len(order), dtype=torch.bool)
    nll = 0.0
    for i in order:
        now = torch.zeros(len(order), dtype=torch.bool)
        now[i] = True
        inputs = torch.where(masked.repeat_interleave(span), net.config.vocab_size, ids)
        nll += (net(inputs[None], ids[None])[0] * now.repeat_interleave(span)).sum().item()
        masked[i] = False
    return math.exp(-nll)


@torch.no_grad()
@pytest.mark.parametrize("span", [1, 2])
def test_the_mdm_bound_is_above_the_exact_likelihood(span):
    """The likelihood is the mean over all orders of unmasking; over all sequences it sums to 1."""
    net = tiny(2, 3 * span, causal=False)
    total = 0.0
    for ids in all_sequences(2, 3 * span):
        orders = itertools.permutations(range(3))
        likelihood = np.mean([order_likelihood(net, ids, order, span) for order in orders])
        total += likelihood
        assert bound_by_count(net, ids, span) >= -math.log(likelihood) - 1e-6
    assert total == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("span", [1, 4])
def test_masks_are_whole_runs_weighed_by_their_number(schedule, span):
    ids = torch.arange(256).repeat(400, 1) % 7
    generator = torch.Generator().manual_seed(0)
    inputs, weights = train_mdm.corrupt(ids, 7, generator, schedule, span)
    masked = inputs == 7
    assert (inputs[~masked] == ids[~masked]).all()
    assert ((weights > 0) == masked).all()
    runs = masked.reshape(400, -1, span)
    assert (runs.all(dim=2) == runs.any(dim=2)).all()
    k = runs.any(dim=2).sum(dim=1).double()
    assert k.min() >= 1 and len(k.unique()) > 30
    if schedule == "linear":
        assert torch.allclose(weights.sum(dim=1).double(), torch.full((400,), 256.0).double())
        spread = torch.linspace(0, 1, 400)
        assert ((k / (256 / span)).sort().values - spread).abs().max() < 0.02
    # All positions alike, each token once in expectation.
    mean = 0.5 if schedule == "linear" else 2 / math.pi
    assert (masked.double().mean(dim=0) - mean).abs().mean() < 0.05
    assert (weights.mean() - 1).abs() < 0.02


def test_masks_are_a_pure_function_of_seed_and_step():
    ids = torch.zeros(4, 32, dtype=torch.long)

    def masks(seed, step):
        return train_mdm.corrupt(ids, 5, run.generator(seed, step))[0]
    assert torch.equal(masks(3, 9), masks(3, 9))
    for other in ((3, 10), (4, 9), (9, 3)):
        assert not torch.equal(masks(3, 9), masks(*other))


@torch.no_grad()
def test_the_mdm_evaluation_is_the_bound_and_its_error_is_honest():
    net = tiny(3, 6, causal=False)
    lengths, rng = np.array([1, 2, 3]), np.random.default_rng(0)
    population = rng.integers(3, size=(12, 6))
    exact = sum(bound_by_count(net, torch.from_numpy(ids)) for ids in population)
    exact = exact / math.log(2) / lengths[population].sum()
    samples = [population[rng.integers(12, size=200)] for _ in range(60)]
    results = [train_mdm.evaluate(net, ids, lengths, seed=i) for i, ids in enumerate(samples)]
    found, errors = zip(*results, strict=True)
    assert np.mean(found) == pytest.approx(exact, abs=4 * np.std(found) / math.sqrt(60))
    assert 0.75 < np.mean(errors) / np.std(found, ddof=1) < 1.33
