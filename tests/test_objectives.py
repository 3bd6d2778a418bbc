"""The objectives, by exact enumeration: AR's likelihood and MDM's bound, to the last digit."""
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import randomize

import run
import train_ar
import train_mdm
from model import Config, Transformer


def tiny(vocab_size, context, causal):
    return randomize(Transformer(Config(vocab_size, context, 32, causal))).double()


def all_sequences(vocab_size, context):
    return torch.tensor(list(itertools.product(range(vocab_size), repeat=context)))


# ---- AR.

@torch.no_grad()
def test_ar_likelihoods_of_all_sequences_sum_to_one():
    net = tiny(3, 5, causal=True)
    nats = [5 * train_ar.loss(net, ids[None]).item() for ids in all_sequences(3, 5)]
    assert sum(math.exp(-n) for n in nats) == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_ar_evaluation_is_the_loss_in_bits_per_byte():
    net = tiny(4, 6, causal=True)
    sequences, lengths = torch.randint(4, (40, 6)).numpy(), np.array([1, 2, 3, 10])
    bpb, stderr = train_ar.evaluate(net, sequences, lengths)
    nats = [6 * train_ar.loss(net, torch.from_numpy(ids[None])).item() for ids in sequences]
    bits, nbytes = np.array(nats) / math.log(2), lengths[sequences].sum(axis=1)
    assert bpb == pytest.approx(bits.sum() / nbytes.sum(), rel=1e-5)
    # The standard error of a ratio, by the jackknife.
    left_out = (bits.sum() - bits) / (nbytes.sum() - nbytes)
    jackknife = math.sqrt((len(bits) - 1) ** 2 / len(bits) * left_out.var(ddof=1))
    assert stderr == pytest.approx(jackknife, rel=0.05)


@pytest.mark.parametrize("train", [train_ar, train_mdm])
def test_the_error_of_one_sequence_is_not_known(train, recwarn):
    net = tiny(4, 6, causal=train is train_ar)
    bpb, stderr = train.evaluate(net, np.zeros((1, 6), dtype=int), np.ones(4))
    assert math.isfinite(bpb) and math.isnan(stderr) and not recwarn.list


# ---- MDM. Of each sequence what is masked are spans of tokens, here of one token each.

def masked_nll(net, ids, masked, span):
    """Return the sum over the masked spans (T / span,) of -log p(x_i | the visible tokens)."""
    masked = torch.as_tensor(masked).repeat_interleave(span)
    inputs = torch.where(masked, net.config.vocab_size, ids)
    return (net(inputs[None], ids[None])[0] * masked).sum().item()


def bound_by_definition(net, ids, rate=lambda u: u, slope=np.ones_like, span=1):
    """Return E_u [m'(u) / m(u) sum over masked i of -log p(x_i | visible)], over all masks.

    rate: the mask rate m(u); slope: m'(u).
    """
    points, weights = np.polynomial.legendre.leggauss(200)
    u, du = (points + 1) / 2, weights / 2
    total = 0.0
    for masked in itertools.product((False, True), repeat=len(ids) // span):
        k, m = sum(masked), rate(u)
        if k:
            probability = m**k * (1 - m) ** (len(masked) - k)
            total += (du * slope(u) / m * probability).sum() * masked_nll(net, ids, masked, span)
    return total


def bound_by_count(net, ids, span=1):
    """Return E_{k ~ U{1..R}} E_{|S| = k} [R / k sum over S of -log p(x_i | visible)]."""
    R, total = len(ids) // span, 0.0
    for k in range(1, R + 1):
        for masked in itertools.combinations(range(R), k):
            masked = np.isin(range(R), masked)
            total += masked_nll(net, ids, masked, span) / k / math.comb(R, k)
    return total


def assert_mean(losses, exact, close):
    """Assert that random losses have this mean, and that they are enough to tell it closely."""
    error = np.std(losses, ddof=1) / math.sqrt(len(losses))
    assert error < close * exact
    assert np.mean(losses) == pytest.approx(exact, abs=4 * error + 1e-6 * exact)


@torch.no_grad()
def test_the_mdm_loss_is_the_bound():
    net, ids = tiny(3, 6, causal=False), torch.tensor([0, 2, 1, 1, 0, 2])
    exact = bound_by_definition(net, ids)
    assert bound_by_count(net, ids) == pytest.approx(exact, rel=1e-5)
    generator, batch = torch.Generator().manual_seed(0), ids.expand(500, -1)
    # Close enough to tell a wrong weight.
    assert_mean([6 * train_mdm.loss(net, batch, generator).item() for _ in range(20)], exact, 0.01)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3])
def test_the_mdm_loss_is_unbiased_on_few_sequences(size):
    net = tiny(3, 4, causal=False)
    batch = torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1], [1, 0, 0, 0]])[:size]
    exact = np.mean([bound_by_count(net, ids) for ids in batch]) / 4
    generator = torch.Generator().manual_seed(1)
    assert_mean([train_mdm.loss(net, batch, generator).item() for _ in range(1000)], exact, 0.05)


@torch.no_grad()
def test_the_mdm_bound_is_above_the_exact_likelihood():
    """The likelihood is the mean over all orders of unmasking; over all sequences it sums to 1."""
    net, total = tiny(2, 3, causal=False), 0.0
    for ids in all_sequences(2, 3):
        likelihood = 0.0
        for order in itertools.permutations(range(3)):
            inputs, p = torch.full((1, 3), 2), 1.0
            for i in order:
                p *= net(inputs)[0, i].softmax(dim=-1)[ids[i]].item()
                inputs[0, i] = ids[i]
            likelihood += p / 6
        total += likelihood
        assert bound_by_count(net, ids) >= -math.log(likelihood) - 1e-6
    assert total == pytest.approx(1, abs=1e-5)


def test_masks_are_spread_and_weighed_by_their_number():
    ids = torch.arange(256).repeat(400, 1) % 7
    inputs, weights = train_mdm.corrupt(ids, 7, torch.Generator().manual_seed(0))
    masked = inputs == 7
    k = masked.sum(dim=1).double()
    assert (inputs[~masked] == ids[~masked]).all() and ((weights > 0) == masked).all()
    assert torch.allclose(weights.sum(dim=1), torch.full((400,), 256.0))
    assert ((k / 256).sort().values - torch.linspace(0, 1, 400)).abs().max() < 0.02
    # All positions alike.
    assert (masked.double().mean(dim=0) - 0.5).abs().max() < 0.1


def test_masks_are_a_pure_function_of_seed_and_step():
    ids = torch.zeros(3, 8, dtype=torch.long)

    def masks(seed, step):
        return (train_mdm.corrupt(ids, 5, run.generator(seed, step))[0] == 5).int().tolist()
    assert masks(3, 9) == masks(3, 9)
    assert all(masks(3, 9) != masks(*other) for other in ((3, 10), (4, 9), (9, 3)))
    # The masks of the published runs.
    assert masks(0, 0) == [[1] * 8, [0, 1, 0, 0, 0, 0, 1, 0], [1, 0, 1, 1, 1, 0, 0, 1]]


@torch.no_grad()
def test_the_mdm_evaluation_is_the_bound_and_its_error_is_honest():
    net = tiny(3, 6, causal=False)
    lengths, rng = np.array([1, 2, 3]), np.random.default_rng(0)
    population = rng.integers(3, size=(12, 6))
    exact = sum(bound_by_count(net, torch.from_numpy(ids)) for ids in population)
    exact = exact / math.log(2) / lengths[population].sum()
    samples = [population[rng.integers(12, size=100)] for _ in range(60)]
    results = [train_mdm.evaluate(net, ids, lengths, seed=i) for i, ids in enumerate(samples)]
    bpb, errors = zip(*results, strict=True)
    assert np.mean(bpb) == pytest.approx(exact, abs=4 * np.std(bpb) / math.sqrt(60))
    assert 0.85 < np.mean(errors) / np.std(bpb, ddof=1) < 1.15
