"""study/variants.py, and what study/train.py masks: likelihoods and bounds by enumeration."""
import itertools
import math
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomize
from test_objectives import all_sequences, assert_mean, bound_by_count, bound_by_definition
from torch.utils.flop_counter import FlopCounterMode

import model
import run
import train_mdm
from study.train import corrupt_ar, corrupt_by, corrupt_spans
from study.variants import Config, Convolution, KVCache, NgramTables, Transformer

VARIANTS = [{"conv": 3}, {"patch": 2}, {"patch": 2, "conv": 3}, {"phase": 3}, {"layers": 3},
            {"ngram": 3}, {"ngram": 3, "ngram_stride": 2, "buckets": 100, "conv": 3},
            {"ngram": 3, "patch": 2}]


def random_model(*args, **options):
    return randomize(Transformer(Config(*args, **options)))


def nats(net, ids, inputs, weights):
    """Return the mean over sequences ids (B, T) of their weighted losses."""
    return (weights * net(inputs, ids)).sum(dim=1).mean().item()


# ---- The models.

@pytest.mark.parametrize("causal", [True, False])
def test_the_plain_variant_is_the_plain_model_to_the_last_bit(causal):
    nets = []
    for module in (model.Transformer, Transformer):
        torch.manual_seed(0)
        nets.append(module(Config(300, 16, 64, causal)))
    plain, variant = (dict(net.named_parameters()) for net in nets)
    assert all(torch.equal(plain[name], p) for name, p in variant.items())
    assert list(plain) == list(variant)
    ids = torch.randint(301, (2, 16))
    for net in nets:
        torch.nn.init.ones_(net.head.weight[0])
        net(ids, ids % 300).mean().backward()
    assert all(torch.equal(plain[name].grad, p.grad) for name, p in variant.items())
    sizes = [Config(300, 16, 64, causal), model.Config(300, 16, 64, causal)]
    assert len({config.flops_per_token() for config in sizes}) == 1


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", [{"conv": 5}, {"ngram": 4}, {"phase": 4}])
def test_what_is_added_adds_nothing_where_it_is_zero(options, causal):
    plain, net = random_model(causal=causal), random_model(causal=causal, **options)
    ids, before = torch.randint(257, (2, 16)), dict(plain.named_parameters())
    net.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.equal(net(ids), plain(ids))
    for name, parameter in net.named_parameters():
        if name not in before:
            torch.nn.init.zeros_(parameter)
    assert torch.equal(net(ids), plain(ids))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", [
    {}, {"conv": 3}, {"conv": 7, "patch": 4}, {"patch": 2}, {"patch": 8}, {"ngram": 4},
    {"layers": 5}, {"phase": 8}, {"layers": 1, "conv": 5, "ngram": 2},
    {"patch": 4, "ngram": 3}])
def test_flops_are_what_the_profiler_counts(options, causal):
    config = Config(300, 64, 64, causal, **options)
    with torch.device("meta"):
        net = Transformer(config)
        ids = torch.zeros(3, 64, dtype=torch.long)
    # Forward times three: the profiler overcounts the backward pass of a grouped convolution.
    with FlopCounterMode(display=False) as counter:
        net(ids, ids)
    assert 3 * counter.get_total_flops() == config.flops_per_token() * 3 * 64
    assert len(net.blocks) == options.get("layers", 2)


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", VARIANTS)
def test_variants_see_what_they_may_and_no_more(options, causal):
    T, net = 8, random_model(7, 8, 32, causal, **options)
    ids, targets = torch.randint(7, (2, 1, T))
    position, patch = torch.arange(T), torch.arange(T) // net.config.patch
    may_read = (patch[None] <= patch[:, None]) if causal else torch.ones(T, T, dtype=torch.bool)
    may_spell = (patch[None] == patch[:, None]) & (position[None] < position[:, None])
    logits = net.spell(net.read(ids), targets)[0]
    for j in range(T):
        other, spelled = ids.clone(), targets.clone()
        other[0, j] = (ids[0, j] + 1) % 8
        spelled[0, j] = (targets[0, j] + 1) % 7
        changed = (net.spell(net.read(other), targets)[0] != logits).any(dim=1)
        assert (changed == may_read[:, j]).all()
        changed = (net.spell(net.read(ids), spelled)[0] != logits).any(dim=1)
        assert (changed == may_spell[:, j]).all()


@torch.no_grad()
@pytest.mark.parametrize("causal, taps", [(True, 3), (True, 4), (False, 5)])
def test_a_convolution_is_the_sum_over_its_neighbours(causal, taps):
    layer, x = Convolution(Config(width=8, causal=causal, conv=taps)), torch.randn(1, 9, 8)
    assert torch.equal(layer(x), x)
    torch.nn.init.normal_(layer.weight)
    first = -(taps - 1) if causal else -(taps // 2)
    expected = x.clone()
    for t, k in itertools.product(range(9), range(taps)):
        if 0 <= t + first + k < 9:
            expected[0, t] += layer.weight[:, 0, k] * x[0, t + first + k]
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("buckets", [1000, 16384])
def test_an_ngram_has_one_row_wherever_it_stands_and_mask_beyond_the_ends(
        direction, stride, buckets):
    """Pairs have a row each where the table is large enough."""
    config = Config(40, 500, 16, False, ngram=3, ngram_stride=stride, buckets=buckets)
    tables, ids = NgramTables(config), torch.randint(41, (4, 500))
    padded = F.pad(ids, (2 * stride, 2 * stride), value=40)
    for n, rows in enumerate(tables.rows(ids, direction), 2):
        shifts = [2 * stride - direction * stride * i for i in range(n)]
        grams = torch.stack([padded[:, shift:shift + 500] for shift in shifts], dim=-1)
        row_of = dict(zip(map(tuple, grams.view(-1, n).tolist()), rows.ravel().tolist(),
                          strict=True))
        assert [row_of[tuple(gram)] for gram in grams.view(-1, n).tolist()] == rows.ravel().tolist()
        assert 0 <= rows.min() and rows.max() < buckets
        used, count = len(set(row_of.values())), len(row_of)
        if 41**n < buckets:
            assert used == count
        else:
            # Nearly as many as random rows would be.
            assert used > 0.88 * buckets * (1 - math.exp(-count / buckets))


@torch.no_grad()
def test_a_phase_is_told_by_position_and_by_nothing_else():
    """Without it, a shift of all positions changes nothing; with it, one by whole phases."""
    for phase, shift in itertools.product((0, 4), (1, 4, 6, 8)):
        torch.manual_seed(0)
        net = random_model(context=32, width=64, phase=phase)
        ids = torch.randint(256, (1, 16))
        before = net(ids)
        for name, buffer in net.named_buffers():
            setattr(net, name, buffer.roll(-shift, dims=0))
        moved = (net(ids) - before).abs().amax(dim=-1)
        assert moved.min() > 1e-2 if phase and shift % phase else moved.max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, *VARIANTS])
def test_the_cache_gives_what_the_whole_sequence_gives(options):
    net, ids = random_model(context=24, width=64, **options), torch.randint(257, (3, 24))
    cache, step = KVCache(net, 3), net.config.patch
    parts = [net.read(ids[:, :6], cache)]
    parts += [net.read(ids[:, t:t + step], cache) for t in range(6, 24, step)]
    torch.testing.assert_close(torch.cat(parts, dim=1), net.read(ids), rtol=1e-4, atol=1e-4)
    assert cache.length == 24 // step


@pytest.mark.parametrize("options", VARIANTS)
def test_every_parameter_has_one_learning_rate(options):
    net = random_model(context=24, width=128, **options)
    groups = model.make_optimizer(net).param_groups
    scale = {id(p): group["scale"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    for module in net.modules():
        if isinstance(module, torch.nn.Embedding):
            assert scale[id(module.weight)] == 10
        if isinstance(module, Convolution):
            assert scale[id(module.weight)] == 1


@pytest.mark.parametrize("options", VARIANTS)
def test_a_variant_compiles_to_one_graph(options):
    net, ids = random_model(context=24, width=32, **options), torch.randint(256, (2, 24))
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, ids), net(ids, ids))


@pytest.mark.parametrize("options", [
    {"patch": 3}, {"width": 36, "patch": 8}, {"phase": 2, "patch": 2},
    {"conv": 4, "causal": False}])
def test_impossible_shapes_are_refused(options):
    with pytest.raises(ValueError):
        Config(**options)


# ---- Likelihoods and bounds.

@torch.no_grad()
@pytest.mark.parametrize("options", [*VARIANTS, {"patch": 4, "conv": 2}])
def test_ar_likelihoods_of_all_sequences_sum_to_one(options):
    ids = all_sequences(3, 4)
    net = random_model(3, 4, 32, True, **options).double()
    inputs, weights = corrupt_ar(ids, 3, None, net.config.patch)
    assert (-(weights * net(inputs, ids)).sum(dim=1)).exp().sum().item() == pytest.approx(1, 1e-5)


NORMAL = statistics.NormalDist(0.5, 0.2)
TAIL = NORMAL.cdf(0)


def bell(u):
    return np.array([NORMAL.inv_cdf(TAIL + x * (1 - 2 * TAIL)) for x in u])


# m(u) and m'(u).
RATES = {"linear": (lambda u: u, np.ones_like),
         "cosine": (lambda u: np.cos(np.pi / 2 * (1 - u)),
                    lambda u: np.pi / 2 * np.sin(np.pi / 2 * (1 - u))),
         "bell": (bell, lambda u: (1 - 2 * TAIL) / np.array([NORMAL.pdf(m) for m in bell(u)]))}


@torch.no_grad()
@pytest.mark.parametrize("schedule, span, options", [
    ("linear", 2, {}), ("linear", 6, {}), ("cosine", 1, {}), ("cosine", 2, {}), ("bell", 1, {}),
    ("bell", 2, {"patch": 2}), ("bell", 6, {"conv": 3}),
    *[("linear", options.get("patch", 1), options) for options in VARIANTS]])
def test_the_mdm_loss_is_the_bound(schedule, span, options):
    net, ids = random_model(3, 6, 32, False, **options).double(), torch.tensor([0, 2, 1, 1, 0, 2])
    exact = bound_by_definition(net, ids, *RATES[schedule], span)
    assert bound_by_count(net, ids, span) == pytest.approx(exact, rel=1e-5)
    batch, generator = ids.expand(500, -1), torch.Generator().manual_seed(0)
    # Close enough to tell a wrong weight.
    assert_mean([nats(net, batch, *corrupt_spans(batch, 3, generator, schedule, span))
                 for _ in range(20)], exact, 0.02)


@torch.no_grad()
@pytest.mark.parametrize("schedule, size, count, share", [
    ("linear", 1, 800, 0.5), ("cosine", 50, 60, 0.8), ("linear", 50, 60, 0.1)])
def test_a_span_share_trains_on_the_mixture_of_two_bounds(schedule, size, count, share):
    net, ids = random_model(3, 4, 32, False).double(), torch.tensor([2, 1, 2, 1])
    spans, singles = bound_by_count(net, ids, 4), bound_by_count(net, ids, 1)
    # Far apart, so that a wrong share shows.
    assert abs(spans - singles) > 0.3 * max(spans, singles)
    batch, generator = ids.expand(size, -1), torch.Generator().manual_seed(0)
    assert_mean([nats(net, batch, *corrupt_spans(batch, 3, generator, schedule, 4, share))
                 for _ in range(count)], share * spans + (1 - share) * singles, 0.06)


@pytest.mark.parametrize("schedule", RATES)
@pytest.mark.parametrize("span", [1, 4])
def test_masks_are_whole_spans_weighed_by_their_number(schedule, span):
    ids = torch.arange(256).repeat(400, 1) % 7
    inputs, weights = corrupt_spans(ids, 7, torch.Generator().manual_seed(0), schedule, span)
    masked = inputs == 7
    assert (inputs[~masked] == ids[~masked]).all() and ((weights > 0) == masked).all()
    spans = masked.view(400, -1, span)
    assert (spans.all(dim=2) == spans.any(dim=2)).all()
    # All positions alike, each token once in expectation.
    assert (masked.double().mean(dim=0) - masked.double().mean()).abs().mean() < 0.05
    assert (weights.mean() - 1).abs() < 0.02


@pytest.mark.parametrize("size, context", [(1, 16), (4, 160), (7, 176), (64, 512), (5, 2048)])
def test_the_linear_schedule_masks_as_train_mdm_does_to_the_last_bit(size, context):
    ids = torch.randint(256, (size, context))
    for corrupt in (corrupt_spans, lambda *args: corrupt_by("linear", *args)):
        for step in range(20):
            ours = corrupt(ids, 256, run.generator(0, step))
            theirs = train_mdm.corrupt(ids, 256, run.generator(0, step))
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
