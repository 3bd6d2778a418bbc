"""model.py: what may depend on what, FLOPs as the profiler counts them, sizes, the KV cache."""
import pytest
import torch
from conftest import randomize
from torch.utils.flop_counter import FlopCounterMode

from model import Config, KVCache, Transformer, make_optimizer


def random_model(*args, **options):
    return randomize(Transformer(Config(*args, **options)))


def influence(net):
    """Return (T, T) bool: does changing the token at column j change the logits at row i?"""
    V, T = net.config.vocab_size, net.config.context
    ids = torch.randint(V, (1, T))
    before = net(ids)[0]
    changed = torch.zeros(T, T, dtype=torch.bool)
    for j in range(T):
        other = ids.clone()
        other[0, j] = (ids[0, j] + 1) % (V + 1)
        changed[:, j] = (net(other)[0] != before).any(dim=1)
    return changed


@torch.no_grad()
def test_ar_logits_depend_on_every_past_token_and_on_no_future_one():
    lower_triangle = torch.ones(24, 24).tril().bool()
    assert (influence(random_model(context=24, width=64, causal=True)) == lower_triangle).all()


@torch.no_grad()
def test_mdm_logits_depend_on_every_token():
    assert influence(random_model(context=24, width=64, causal=False)).all()


@torch.no_grad()
def test_only_the_distance_between_positions_matters():
    net = random_model(context=16, width=64, causal=False)
    ids = torch.zeros(1, 16, dtype=torch.long)
    first = net(ids)[0, :1].expand(16, -1)
    torch.testing.assert_close(net(ids)[0], first, rtol=1e-4, atol=1e-4)
    near, far = ids.clone(), ids.clone()
    near[0, 1] = far[0, 9] = 1
    assert (net(near)[0, 0] - net(far)[0, 0]).abs().max() > 1e-4


@torch.no_grad()
def test_attention_is_its_formula():
    """Softmax of q k / sqrt(d), each pair of a head turned by its position's angle."""
    net = random_model(context=5, width=32)
    attention, x = net.blocks[0].attention, torch.randn(1, 5, 32)
    q, k, v = attention.qkv_proj(x)[0].view(5, 3, 2, 16).unbind(1)               # (T, H, d)
    angles = torch.arange(5)[:, None] * 10000 ** (-torch.arange(0, 16, 2) / 16)  # (T, d / 2)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    q, k = (torch.complex(t[..., :8], t[..., 8:]) * turn for t in (q, k))
    scores = torch.einsum("ihd,jhd->hij", q, k.conj()).real / 16 ** 0.5
    hidden = torch.ones(5, 5).triu(1).bool()
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    y = attention.out_proj(torch.einsum("hij,jhd->ihd", weights, v).reshape(5, 32))
    torch.testing.assert_close(attention(x, net.cos, net.sin)[0], y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width, vocab_size, context", [
    (32, 256, 512), (64, 256, 512), (96, 4096, 144), (128, 256, 512), (224, 300, 96),
    (256, 256, 512), (320, 32000, 176), (576, 256, 2048)])
def test_flops_are_what_the_profiler_counts(width, vocab_size, context, causal):
    config = Config(vocab_size, context, width, causal)
    with torch.device("meta"):
        net = Transformer(config)
        ids = torch.zeros(3, context, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        net(ids, ids).mean().backward()
    assert counter.get_total_flops() == config.flops_per_token() * 3 * context


@pytest.mark.parametrize("width, depth, heads", [
    (8, 2, 1), (16, 2, 1), (32, 2, 2), (96, 2, 6), (224, 3, 7), (256, 4, 4), (1664, 26, 26)])
def test_the_shape_follows_from_the_width(width, depth, heads):
    config = Config(width=width)
    assert (config.depth, config.heads, config.head_dim) == (depth, heads, width // heads)
    with torch.device("meta"):
        net = Transformer(config)
    inner = net.count_params(embedding=False)
    assert inner == 16 * width**2 * depth + (2 * depth + 1) * width
    assert net.count_params() == inner + 257 * width + 256 * width


def test_width_576_is_the_papers_smallest_model():
    with torch.device("meta"):
        net = Transformer(Config(width=576))
    assert round(net.count_params(embedding=False), -6) == 48_000_000


@pytest.mark.parametrize("width", [32, 256])
def test_a_new_model_predicts_all_bytes_alike(width):
    assert (Transformer(Config(context=16, width=width))(torch.randint(257, (2, 16))) == 0).all()


def test_updates_keep_their_size_across_widths():
    """muP: at one learning rate a wide model's activations move about as far as a narrow one's."""
    moved = []
    for width in (64, 256):
        torch.manual_seed(0)
        net = Transformer(Config(context=32, width=width))
        optimizer = make_optimizer(net)
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


def test_every_parameter_has_one_learning_rate():
    net = Transformer(Config(context=16, width=128))
    groups = make_optimizer(net).param_groups
    scale = {id(p): group["scale"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    # Matrices as 1 / width; tables and norms alike at all widths.
    assert {scale[id(block.mlp.down.weight)] for block in net.blocks} == {1 / 2}
    assert scale[id(net.head.weight)] == 5 and scale[id(net.embedding.weight)] == 10
    assert scale[id(net.norm.weight)] == 1


@pytest.mark.parametrize("causal", [True, False])
def test_the_model_compiles_to_one_graph(causal):
    net, ids = random_model(context=32, width=64, causal=causal), torch.randint(256, (2, 32))
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, ids), net(ids, ids))


def test_the_padding_of_the_vocabulary_is_never_seen():
    padded = [Config(size).padded_vocab for size in (1, 256, 257, 300, 4096, 32000)]
    assert padded == [64, 256, 320, 320, 4096, 32000]
    net, ids = random_model(300, 16, 32), torch.randint(300, (2, 16))
    assert net(ids).shape == (2, 16, 300)
    assert net.head.weight.shape == (320, 32)
    net(ids, ids).mean().backward()
    assert (net.head.weight.grad[300:] == 0).all()
    assert (net.head.weight.grad[:300] != 0).any(dim=1).all()


def test_the_loss_is_the_cross_entropy_of_the_logits():
    net, ids = random_model(300, 16, 32), torch.randint(300, (2, 16))
    nll = -net(ids).log_softmax(dim=-1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(net(ids, ids), nll)


@torch.no_grad()
def test_the_cache_gives_the_logits_of_the_whole_sequence():
    net, ids = random_model(context=20, width=64), torch.randint(256, (3, 20))
    cache = KVCache(net, 3)
    parts = [net(ids[:, :7], cache=cache)]
    parts += [net(ids[:, t:t + 1], cache=cache) for t in range(7, 20)]
    torch.testing.assert_close(torch.cat(parts, dim=1), net(ids), rtol=1e-4, atol=1e-4)
    assert cache.length == 20
