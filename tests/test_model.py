"""model.py: what may see what, FLOPs as the profiler counts them, sizes, checkpoints."""
import pickle

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import model
from run import InputError


def lively(config, seed=0):
    """A Transformer whose output head is not zero, as it is at the start."""
    torch.manual_seed(seed)
    net = model.Transformer(config)
    torch.nn.init.normal_(net.head.weight)
    return net


def influence(net, config):
    """(T, T) matrix: does changing the token at column j change the logits at row i?"""
    ids = torch.randint(config.vocab_size, (1, config.context))
    before = net(ids)[0]
    changed = torch.zeros(config.context, config.context, dtype=torch.bool)
    for j in range(config.context):
        other = ids.clone()
        other[0, j] = (ids[0, j] + 1) % (config.vocab_size + 1)
        changed[:, j] = (net(other)[0] != before).any(dim=1)
    return changed


@torch.no_grad()
def test_no_future_token_changes_an_ar_logit_and_every_past_one_does():
    config = model.Config(context=24, width=64, causal=True)
    assert (influence(lively(config), config) == torch.ones(24, 24).tril().bool()).all()


@torch.no_grad()
def test_every_token_changes_every_mdm_logit():
    config = model.Config(context=24, width=64, causal=False)
    assert influence(lively(config), config).all()


@torch.no_grad()
def test_positions_matter_only_relative_to_each_other():
    """RoPE: with one token all over, a shift changes nothing, so every position sees the same; with two tokens, distance counts."""
    config = model.Config(context=16, width=64, causal=False)
    net, ids = lively(config), torch.zeros(1, 16, dtype=torch.long)
    torch.testing.assert_close(net(ids)[0], net(ids)[0, :1].expand(16, -1), rtol=1e-4, atol=1e-4)
    near, far = ids.clone(), ids.clone()
    near[0, 1] = far[0, 9] = 1
    assert (net(near)[0, 0] - net(far)[0, 0]).abs().max() > 1e-4


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width, vocab_size, context", [(32, 256, 512), (64, 256, 512), (96, 4096, 144), (128, 256, 512),
                                                        (224, 300, 96), (256, 256, 512), (320, 32000, 176), (576, 256, 2048)])
def test_flops_are_what_the_profiler_counts(width, vocab_size, context, causal):
    config = model.Config(vocab_size, context, width, causal)
    with torch.device("meta"):
        net, ids = model.Transformer(config), torch.zeros(3, context, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with counter:
        model.nats(net, ids, ids).mean().backward()
    flops = model.flops_per_token(config)
    assert isinstance(flops, int) and counter.get_total_flops() == flops * 3 * context


@pytest.mark.parametrize("width, depth, heads", [(16, 2, 1), (32, 2, 2), (96, 2, 6), (128, 2, 4), (224, 3, 7), (256, 4, 4), (576, 9, 9), (1664, 26, 26)])
def test_shape_follows_from_width(width, depth, heads):
    config = model.Config(width=width)
    assert (config.depth, config.heads, config.head_dim) == (depth, heads, width // heads)
    with torch.device("meta"):
        net = model.Transformer(config)
    assert net.params(embedding=False) == 16 * width**2 * depth + (2 * depth + 1) * width
    assert net.params() - net.params(embedding=False) == 257 * width + 256 * width


def test_the_papers_smallest_model():
    with torch.device("meta"):
        assert round(model.Transformer(model.Config(width=576)).params(embedding=False), -6) == 48_000_000


@pytest.mark.parametrize("shape", [dict(width=100), dict(width=288), dict(width=0), dict(width=-64), dict(vocab_size=0), dict(context=0)])
def test_shapes_that_cannot_be(shape):
    with pytest.raises(InputError):
        model.Config(**shape)


def test_a_new_model_predicts_nothing():
    """8 bits a byte, at every width."""
    for width in (32, 256):
        config = model.Config(width=width, context=16)
        ids = torch.randint(257, (2, 16))
        assert (model.Transformer(config)(ids) == 0).all()


def test_updates_keep_their_size_across_widths():
    """muP: after a few steps at one learning rate, the activations of a wide model have moved about as far as a narrow one's."""
    moved = []
    for width in (64, 256):
        torch.manual_seed(0)
        net = model.Transformer(model.Config(width=width, context=32))
        optimizer = model.make_optimizer(net)
        ids = torch.randint(256, (8, 32))
        hidden = []
        net.norm.register_forward_hook(lambda module, inputs, output: hidden.append(output.detach()))
        for step in range(4):
            for group in optimizer.param_groups:
                group["lr"] = 0.003 * group["scale"]
            model.nats(net, ids, ids).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        moved.append((hidden[-1] - hidden[0]).pow(2).mean().sqrt())
    assert 0.6 < moved[1] / moved[0] < 1.7, moved


def test_one_graph_without_breaks():
    for causal in (True, False):
        config = model.Config(width=64, context=32, causal=causal)
        net, ids = lively(config), torch.randint(256, (2, 32))
        whole = torch.compile(model.nats, backend="eager", fullgraph=True)
        torch.testing.assert_close(whole(net, ids, ids), model.nats(net, ids, ids))


def test_outputs_are_padded_and_never_seen():
    """A vocabulary of 300 takes 320 columns, of which 300 are logits; those beyond get no gradient. 256 and 4,096 are what they were."""
    assert [model.Config(vocab_size=size).outputs for size in (1, 256, 257, 300, 4096, 32000)] == [64, 256, 320, 320, 4096, 32000]
    net = lively(model.Config(300, 16, 32))
    ids = torch.randint(300, (2, 16))
    assert net(ids).shape == (2, 16, 300) and net.head.weight.shape == (320, 32)
    model.nats(net, ids, ids).mean().backward()
    assert (net.head.weight.grad[300:] == 0).all() and (net.head.weight.grad[:300] != 0).any(dim=1).all()


@pytest.mark.parametrize("shape", [dict(width=64), dict(width=128, vocab_size=300, causal=False)])
def test_memory_is_what_real_tensors_take(shape):
    """The fake tensors' count, against tensors of a real forward pass in bf16: all that the graph holds, the weights aside."""
    config = model.Config(context=96, **shape)
    net, ids = model.Transformer(config), torch.zeros(3, 96, dtype=torch.long)
    kept = {p.untyped_storage().data_ptr(): 0 for p in net.parameters()}

    def keep(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        graph = model.nats(net, ids, ids)
    always, window = model.memory(config)
    matrices = sum(p.numel() for p in net.parameters() if p.dim() == 2) - net.embedding.weight.numel()
    assert graph.requires_grad and always + 3 * window == 16 * net.params() + sum(kept.values()) + 3 * 96 * 6 * config.outputs
    assert always == pytest.approx(16 * net.params() + 2 * matrices, rel=0.05)


def test_checkpoints_come_back_to_the_bit(tmp_path):
    net = lively(model.Config(width=64, context=16))
    model.save_checkpoint(tmp_path / "c.pt", model=net.state_dict(), settings={"lr": 0.1, "rows": [[1, None]]})
    back = model.load_checkpoint(tmp_path / "c.pt")
    assert back["settings"] == {"lr": 0.1, "rows": [[1, None]]}
    assert all(torch.equal(back["model"][name], tensor) for name, tensor in net.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


class Bomb:
    def __reduce__(self):
        return print, ("code in a checkpoint was run",)


def test_no_code_in_a_checkpoint_is_run(tmp_path, capsys):
    torch.save({"model": Bomb()}, tmp_path / "bomb.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    (tmp_path / "noise.pt").write_bytes(b"noise")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("bomb.pt", "pickle.pt", "noise.pt", "empty.pt"):
        with pytest.raises(InputError, match=name):
            model.load_checkpoint(tmp_path / name)
    assert "was run" not in capsys.readouterr().out
