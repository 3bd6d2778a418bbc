"""model.py: what may depend on what, FLOPs as the profiler counts them, sizes, the KV cache."""
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import model


def random_model(config, seed=0):
    """Return a Transformer whose head and convolutions are not zero, as they are at the start."""
    torch.manual_seed(seed)
    net = model.Transformer(config)
    torch.nn.init.normal_(net.head.weight)
    for name, parameter in net.named_parameters():
        if "conv" in name:
            torch.nn.init.normal_(parameter)
    return net


def influence(net, config):
    """Return (T, T) bool: does changing the token at column j change the logits at row i?"""
    ids = torch.randint(config.vocab_size, (1, config.context))
    before = net(ids)[0]
    changed = torch.zeros(config.context, config.context, dtype=torch.bool)
    for j in range(config.context):
        other = ids.clone()
        other[0, j] = (ids[0, j] + 1) % (config.vocab_size + 1)
        changed[:, j] = (net(other)[0] != before).any(dim=1)
    return changed


@torch.no_grad()
def test_ar_logits_depend_on_every_past_token_and_on_no_future_one():
    config = model.Config(context=24, width=64, causal=True)
    lower_triangle = torch.ones(24, 24).tril().bool()
    assert (influence(random_model(config), config) == lower_triangle).all()


@torch.no_grad()
def test_mdm_logits_depend_on_every_token():
    config = model.Config(context=24, width=64, causal=False)
    assert influence(random_model(config), config).all()


@torch.no_grad()
def test_only_the_distance_between_positions_matters():
    config = model.Config(context=16, width=64, causal=False)
    net, ids = random_model(config), torch.zeros(1, 16, dtype=torch.long)
    first = net(ids)[0, :1].expand(16, -1)
    torch.testing.assert_close(net(ids)[0], first, rtol=1e-4, atol=1e-4)
    near, far = ids.clone(), ids.clone()
    near[0, 1] = far[0, 9] = 1
    assert (net(near)[0, 0] - net(far)[0, 0]).abs().max() > 1e-4


def logits_by_hand(net, ids, phase):
    """Return the logits of ids (B, T), the phases added one position at a time."""
    x = net.embedding(ids)
    for t in range(ids.size(1) if phase else 0):
        x[:, t] += net.phase_embedding.weight[t % phase]
    for block in net.blocks:
        x = block(x, net.cos[:ids.size(1)], net.sin[:ids.size(1)])
    return net.head(net.norm(x))[..., :net.config.vocab_size]


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("phase", [0, 1, 4, 7, 16])
def test_the_phase_is_added_to_the_input_and_without_it_nothing_is(phase, causal):
    net = random_model(model.Config(context=16, width=64, causal=causal, phase=phase))
    plain = random_model(model.Config(context=16, width=64, causal=causal))
    ids = torch.randint(257, (2, 16))
    assert torch.equal(net(ids), logits_by_hand(net, ids, phase))
    new = set(dict(net.named_parameters())) - set(dict(plain.named_parameters()))
    assert new == ({"phase_embedding.weight"} if phase else set())
    if phase:
        assert not torch.equal(net(ids), logits_by_hand(net, ids, 0))
        # With nothing to add it is the plain model, to the bit.
        plain.load_state_dict(net.state_dict(), strict=False)
        torch.nn.init.zeros_(net.phase_embedding.weight)
        assert torch.equal(net(ids), plain(ids))


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("phase", [0, 4])
def test_a_shift_by_whole_phases_changes_nothing_and_by_other_numbers_all(phase, causal):
    net = random_model(model.Config(context=32, width=64, causal=causal, phase=phase))
    ids = torch.randint(257, (1, 16))
    first = net(ids)[0]
    for shift in (1, 2, 4, 8, 13, 16):
        shifted = random_model(net.config)
        for name, buffer in shifted.named_buffers():
            setattr(shifted, name, buffer.roll(-shift, dims=0))
        moved = (shifted(ids)[0] - first).abs().amax(dim=1)
        if phase and shift % phase:
            assert moved.min() > 1e-2
        else:
            assert moved.max() < 1e-4


def test_a_phase_costs_no_flops_and_is_an_embedding():
    config = model.Config(300, 64, 64, phase=8)
    assert model.flops_per_token(config) == model.flops_per_token(model.Config(300, 64, 64))
    with torch.device("meta"):
        net, plain = model.Transformer(config), model.Transformer(model.Config(300, 64, 64))
        ids = torch.zeros(3, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        net(ids, ids).mean().backward()
    assert counter.get_total_flops() == model.flops_per_token(config) * 3 * 64
    assert net.count_params(embedding=False) == plain.count_params(embedding=False)
    assert net.count_params() == plain.count_params() + 8 * 64
    groups = [group for group in model.make_optimizer(net).param_groups
              if any(p is net.phase_embedding.weight for p in group["params"])]
    assert len(groups) == 1 and any(p is net.embedding.weight for p in groups[0]["params"])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width, vocab_size, context", [
    (32, 256, 512), (64, 256, 512), (96, 4096, 144), (128, 256, 512), (224, 300, 96),
    (256, 256, 512), (320, 32000, 176), (576, 256, 2048)])
def test_flops_are_what_the_profiler_counts(width, vocab_size, context, causal):
    config = model.Config(vocab_size, context, width, causal)
    with torch.device("meta"):
        net = model.Transformer(config)
        ids = torch.zeros(3, context, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        net(ids, ids).mean().backward()
    flops = model.flops_per_token(config)
    assert isinstance(flops, int)
    assert counter.get_total_flops() == flops * 3 * context


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("patch", [1, 2, 4, 8])
@pytest.mark.parametrize("conv", [0, 3, 4, 7])
def test_flops_of_patches_and_convolutions_are_what_the_profiler_counts(patch, conv, causal):
    if conv == 4 and not causal:
        pytest.skip("MDM takes an odd number of taps")
    config = model.Config(300, 64, 64, causal, conv, patch)
    with torch.device("meta"):
        net = model.Transformer(config)
        ids = torch.zeros(3, 64, dtype=torch.long)
    # Forward times three: the profiler overcounts the backward pass of a grouped convolution.
    with FlopCounterMode(display=False) as counter:
        net(ids, ids)
    assert 3 * counter.get_total_flops() == model.flops_per_token(config) * 3 * 64


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("patch", [2, 4])
@pytest.mark.parametrize("conv", [0, 3])
def test_patches_and_convolutions_see_what_they_may_and_no_more(patch, conv, causal):
    T = 8
    config = model.Config(7, T, 32, causal, conv, patch)
    net = random_model(config)
    ids, targets = torch.randint(7, (2, 1, T))
    place, row = torch.arange(T), torch.arange(T) // patch
    may_read = (row[None] <= row[:, None]) if causal else torch.ones(T, T, dtype=torch.bool)
    may_spell = (row[None] == row[:, None]) & (place[None] < place[:, None])
    logits = net.spell(net.read(ids), targets)[0]
    for j in range(T):
        other, spelled = ids.clone(), targets.clone()
        other[0, j] = (ids[0, j] + 1) % 7
        spelled[0, j] = (targets[0, j] + 1) % 7
        changed = (net.spell(net.read(other), targets)[0] != logits).any(dim=1)
        assert (changed == may_read[:, j]).all()
        changed = (net.spell(net.read(ids), spelled)[0] != logits).any(dim=1)
        assert (changed == may_spell[:, j]).all()


@torch.no_grad()
@pytest.mark.parametrize("causal, taps", [(True, 3), (True, 4), (False, 5)])
def test_a_convolution_is_the_sum_over_its_neighbours(causal, taps):
    layer = model.Convolution(model.Config(width=8, causal=causal, conv=taps))
    x = torch.randn(1, 9, 8)
    assert torch.equal(layer(x), x)
    torch.nn.init.normal_(layer.weight)
    first = -(taps - 1) if causal else -(taps // 2)
    expected = x.clone()
    for t in range(9):
        for k in range(taps):
            if 0 <= t + first + k < 9:
                expected[0, t] += layer.weight[:, 0, k] * x[0, t + first + k]
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("width, depth, heads", [
    (8, 2, 1), (16, 2, 1), (32, 2, 2), (96, 2, 6), (224, 3, 7), (256, 4, 4), (1664, 26, 26)])
def test_the_shape_follows_from_the_width(width, depth, heads):
    config = model.Config(width=width)
    assert (config.depth, config.heads, config.head_dim) == (depth, heads, width // heads)
    with torch.device("meta"):
        net = model.Transformer(config)
    inner = net.count_params(embedding=False)
    assert inner == 16 * width**2 * depth + (2 * depth + 1) * width
    assert net.count_params() == inner + 257 * width + 256 * width


def test_width_576_is_the_papers_smallest_model():
    with torch.device("meta"):
        net = model.Transformer(model.Config(width=576))
    assert round(net.count_params(embedding=False), -6) == 48_000_000


@pytest.mark.parametrize("shape", [
    {"width": 100}, {"width": 288}, {"width": 0}, {"width": -64}, {"vocab_size": 0},
    {"context": 0}, {"phase": -1}, {"phase": 513}, {"phase": 2, "patch": 2}])
def test_impossible_shapes_are_refused(shape):
    with pytest.raises(ValueError):
        model.Config(**shape)


@pytest.mark.parametrize("width", [32, 256])
def test_a_new_model_predicts_all_bytes_alike(width):
    config = model.Config(width=width, context=16)
    assert (model.Transformer(config)(torch.randint(257, (2, 16))) == 0).all()


def test_updates_keep_their_size_across_widths():
    """muP: at one learning rate a wide model's activations move about as far as a narrow one's."""
    moved = []
    for width in (64, 256):
        torch.manual_seed(0)
        net = model.Transformer(model.Config(width=width, context=32))
        optimizer = model.make_optimizer(net)
        ids = torch.randint(256, (8, 32))
        hidden = []
        net.norm.register_forward_hook(lambda module, x, y, to=hidden: to.append(y.detach()))
        for _ in range(4):
            for group in optimizer.param_groups:
                group["lr"] = 0.003 * group["scale"]
            net(ids, ids).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        moved.append((hidden[-1] - hidden[0]).pow(2).mean().sqrt())
    assert 0.6 < moved[1] / moved[0] < 1.7, moved


@pytest.mark.parametrize("causal, phase", [(True, 0), (False, 0), (True, 8), (False, 8)])
def test_the_model_compiles_to_one_graph(causal, phase):
    config = model.Config(width=64, context=32, causal=causal, phase=phase)
    net, ids = random_model(config), torch.randint(256, (2, 32))
    whole = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(ids, ids), net(ids, ids))


def test_the_padding_of_the_vocabulary_is_never_seen():
    sizes = (1, 256, 257, 300, 4096, 32000)
    padded = [model.Config(vocab_size=size).padded_vocab for size in sizes]
    assert padded == [64, 256, 320, 320, 4096, 32000]
    net = random_model(model.Config(300, 16, 32))
    ids = torch.randint(300, (2, 16))
    assert net(ids).shape == (2, 16, 300)
    assert net.head.weight.shape == (320, 32)
    net(ids, ids).mean().backward()
    assert (net.head.weight.grad[300:] == 0).all()
    assert (net.head.weight.grad[:300] != 0).any(dim=1).all()


@torch.no_grad()
@pytest.mark.parametrize("phase", [0, 3])
def test_the_cache_gives_the_logits_of_the_whole_sequence(phase):
    config = model.Config(context=20, width=64, phase=phase)
    net, ids = random_model(config), torch.randint(256, (3, 20))
    cache = model.KVCache(net, 3)
    parts = [net(ids[:, :7], cache=cache)]
    parts += [net(ids[:, t:t + 1], cache=cache) for t in range(7, 20)]
    torch.testing.assert_close(torch.cat(parts, dim=1), net(ids), rtol=1e-4, atol=1e-4)
    assert cache.length == 20


@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-40GB", 312),
    ("Tesla T4", 8.1), ("NVIDIA GeForce RTX 4090", 165), ("Some other card", None)])
def test_the_speed_of_a_known_card_is_that_of_its_data_sheet(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = model.peak_flops(torch.device("cuda"))
    assert math.isnan(peak) if tflops is None else peak == tflops * 1e12
    assert math.isnan(model.peak_flops(torch.device("cpu")))


@torch.no_grad()
def test_the_cache_keeps_what_convolutions_and_patches_need():
    config = model.Config(context=24, width=64, conv=4, patch=2)
    net, ids = random_model(config), torch.randint(256, (3, 24))
    cache = model.KVCache(net, 3)
    parts = [net.read(ids[:, :6], cache)]
    parts += [net.read(ids[:, t:t + 2], cache) for t in range(6, 24, 2)]
    torch.testing.assert_close(torch.cat(parts, dim=1), net.read(ids), rtol=1e-4, atol=1e-4)
    assert cache.length == 12
