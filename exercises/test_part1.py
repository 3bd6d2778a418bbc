"""The tests of the exercises E1 to E3."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bpe
import data
import model
import train_ar

SPEECHES = Path(__file__).with_name("speeches.txt")


def check(condition, message):
    """Fail with one message, and no traceback."""
    if not condition:
        pytest.fail(message, pytrace=False)


def check_number(found, truth, mistakes, what):
    """Fail unless found is the truth. mistakes: {the value that a mistake gives: its message}."""
    found = float(found)
    if found != pytest.approx(truth, rel=1e-5):
        for value, message in mistakes.items():
            check(found != pytest.approx(value, rel=1e-5), f"{what}: {message}")
        check(False, f"{what}: your value {found:,.6g} is not {truth:,.6g}")


# -----------------------------------------------------------------------------------------------
# E1: bits per byte.

def check_bpb(answer):
    # Two sequences of two tokens: 12 bits, 9 bytes.
    bits = np.array([[1.0, 2.0], [3.0, 6.0]])
    ids = np.array([[0, 1], [2, 2]])
    bytes_per_id = np.array([1, 4, 2, 10])
    nbytes = bytes_per_id[ids]
    mistakes = {
        math.log(2) * 12 / 9: "you divided nats by bytes: a nat is 1 / ln 2 bits",
        math.log(2)**2 * 12 / 9: "you multiplied by ln 2: a nat is more than a bit, not less",
        12 / 4: "this is bits per token: divide by the bytes, not by the number of tokens",
        12 / 4 / bytes_per_id.mean(): "you took the mean length over the vocabulary: the text does "
                                      "not use all tokens equally often",
        (bits / nbytes).mean(): "you averaged the ratios of tokens: divide the sum of all bits by "
                                "the sum of all bytes",
        (bits.sum(axis=1) / nbytes.sum(axis=1)).mean(): "you averaged the ratios of sequences: "
                                                        "sequences differ in bytes",
    }
    found = answer.bpb(bits * math.log(2), ids, bytes_per_id)
    check_number(found, 12 / 9, mistakes, "bpb of 2 x 2 tokens")


def check_piece_bytes(answer):
    # (the token, its bytes, {what a mistake gives: its message})
    cases = [
        ("the", 3, {}),
        ("\u00e9", 2, {1: "you counted characters: in UTF-8 many of them have several bytes"}),
        ("\u2581the", 4, {6: "you counted U+2581 as the three bytes of its own UTF-8: it stands "
                             "for a space",
                          3: "you left out the space that U+2581 stands for"}),
        ("<0xE2>", 1, {6: "you counted the characters of the name <0xE2>: it stands for one byte",
                       3: "you decoded a single byte: it is no text by itself, becomes U+FFFD, and "
                          "this has three bytes"}),
        ("<0x0A>", 1, {}),
        ("<s>", 0, {3: "you counted the characters of <s>: a mark spells no text"}),
        ("</s>", 0, {}),
        ("<0>", 3, {}),
    ]
    for piece, truth, mistakes in cases:
        found = list(answer.piece_bytes([piece]))
        what = f"piece_bytes({[piece]!a})"
        check(len(found) == 1, f"{what}: one token was given, and {len(found)} numbers came back")
        check_number(found[0], truth, mistakes, what)


def test_e01(answer, reveal):
    check_bpb(answer)
    check_piece_bytes(answer)

    # A whole vocabulary, written as other programs write it.
    text = SPEECHES.read_bytes()
    tokenizer = bpe.Tokenizer(bpe.train_bpe(text, 1024))
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += [token.decode().replace(" ", "\u2581") for token in tokenizer.tokens[256:]]
    found = np.array(answer.piece_bytes(pieces))
    check(np.array_equal(found, tokenizer.bytes_per_id),
          "piece_bytes is wrong for some token of the BPE of 1,024 tokens")

    # A model with random predictions, measured by the repository.
    ids = tokenizer.encode(text)
    sequences = data.Sequences(ids, 64).spaced(16)                        # (N, T)
    torch.manual_seed(0)
    net = model.Transformer(model.Config(1024, 64, 16))
    torch.nn.init.normal_(net.head.weight)
    truth, _ = train_ar.evaluate(net, sequences, tokenizer.bytes_per_id)
    x = torch.from_numpy(sequences)
    with torch.no_grad():
        nats = net(train_ar.corrupt(x, 1024)[0], x).double().numpy()
    found = answer.bpb(nats, sequences, tokenizer.bytes_per_id)
    check_number(found, truth, {}, "bpb of speeches.txt by a random model")

    counts = np.bincount(np.frombuffer(text, dtype=np.uint8))
    p = counts[counts > 0] / len(text)
    reveal({
        "untrained model on bytes, bits per byte": math.log2(256),
        "untrained model on BPE of 1,024 tokens, bits per byte":
            math.log2(1024) * len(ids) / len(text),
        "best model that knows only how often each byte occurs, bits per byte":
            -(p * np.log2(p)).sum(),
    })


# -----------------------------------------------------------------------------------------------
# E2: FLOPs.

def profile(config):
    """Return the FLOPs of a training step by PyTorch's profiler, per token."""
    with torch.device("meta"):
        net = model.Transformer(config)
        ids = torch.zeros(2, config.context, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        net(ids, ids).mean().backward()
    return counter.get_total_flops() / ids.numel()


def test_e02(answer, reveal):
    # Small enough to count by hand, and no two mistakes give the same number.
    config = model.Config(vocab_size=70, context=40, width=32)
    D, T, depth = config.width, config.context, config.depth
    truth = profile(config)
    six = 6 * depth * 16 * D**2
    head = 6 * D * config.padded_vocab
    mistakes = {
        truth / 2: "each multiplication comes with an addition: two FLOPs, not one",
        truth / 3: "this is the forward pass alone: the backward pass costs twice as much",
        truth * 2 / 3: "the backward pass is counted once: it has two products for each product of "
                       "the forward pass, one for the inputs and one for the weights",
        six: "this is 6 N: the head and attention's scores and sums are missing",
        six + head: "attention's scores and sums are missing: they have no weights, but they are "
                    "products",
        truth - 6 * depth * D * T: "half of attention is missing: there are two products of D x T "
                                   "for each token, and the causal half is not saved",
        truth - head: "the head is missing: it is a product with the whole vocabulary",
        truth - head + 6 * D * 70: "the head has padded_vocab columns, not vocab_size",
        truth + head: "the embedding is a table look-up: it has no product",
        truth - 6 * depth * 4 * D**2: "the MLP has three matrices: gate, up and down",
        truth - 6 * depth * D**2: "attention has four matrices: query, key, value and output",
        truth - 6 * (depth - 1) * (16 * D**2 + 2 * D * T): "this is one block: there are "
                                                           "config.depth of them",
    }
    found = answer.flops_per_token(config)
    check_number(found, truth, mistakes, f"{config}")

    for shape in [(70, 40, 16, False), (256, 512, 32, True), (256, 512, 32, False),
                  (4096, 160, 64, True), (256, 512, 192, True), (257, 96, 256, False),
                  (256, 512, 576, True)]:
        config = model.Config(*shape)
        check_number(answer.flops_per_token(config), profile(config), {}, f"{config}")

    share, ratio = {}, {}
    for width in (32, 576):
        config = model.Config(width=width)
        with torch.device("meta"):
            N = model.Transformer(config).count_params(embedding=False)
        flops = profile(config)
        share[width] = 100 * 12 * config.depth * width * config.context / flops
        ratio[width] = flops / (6 * N)
    reveal({
        "share of attention's scores and sums in all FLOPs, width 32, percent": share[32],
        "share of attention's scores and sums in all FLOPs, width 576, percent": share[576],
        "true FLOPs divided by 6 N, width 32": ratio[32],
    })


# -----------------------------------------------------------------------------------------------
# E3: the causal mask and the likelihood.

V, T = 3, 5


def make(causal=True, shifted=True, vocab_size=V, steps=0, std=0.0):
    """Return a small model as a function from sequences (N, T) to losses in nats (N, T).

    steps: how long it is trained on all sequences. std: of its head's weights before training.
    """
    torch.manual_seed(0)
    net = model.Transformer(model.Config(vocab_size, T, 16, causal))
    torch.nn.init.normal_(net.head.weight, std=std)

    def losses(ids):
        inputs = train_ar.corrupt(ids, vocab_size)[0] if shifted else ids
        return net(inputs, ids).double()

    ids = torch.cartesian_prod(*[torch.arange(V)] * T)                    # (V^T, T)
    optimizer = model.make_optimizer(net)
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group["scale"]
    for _ in range(steps):
        losses(ids).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def true_total(losses):
    ids = torch.cartesian_prod(*[torch.arange(V)] * T)                    # (V^T, T)
    return torch.exp(-losses(ids).sum(dim=1)).sum().item()


def table(p1, p2):
    """Return the losses of sequences of two tokens with probabilities p1 (V,) and p2 (V, V)."""
    def losses(ids):
        return -torch.stack([p1[ids[:, 0]], p2[ids[:, 0], ids[:, 1]]], dim=1).log()
    return losses


def check_total(answer, losses, V, T, truth, mistakes=()):
    """Check total_probability, and before this the sequences that it asks for."""
    what = f"total_probability with V = {V}, T = {T}"
    asked = set()

    def recorded(ids):
        check(torch.is_tensor(ids) and ids.dim() == 2 and ids.size(1) == T,
              f"{what}: losses takes a tensor (N, T) of sequences of T = {T} tokens")
        check(ids.min() >= 0 and ids.max() < V, f"{what}: ids are 0 .. V - 1 = {V - 1}")
        asked.update(map(tuple, ids.tolist()))
        return losses(ids)

    found = answer.total_probability(recorded, V, T)
    missing = V**T - len(asked)
    check(not missing, f"{what}: {missing} of the {V**T} sequences are left out. A token may occur "
                       "again, and the order counts")
    check_number(found, truth, dict(mistakes), what)


def check_small_total(answer):
    p1 = torch.tensor([0.5, 0.7], dtype=torch.float64)
    p2 = torch.tensor([[0.9, 0.4], [0.3, 0.8]], dtype=torch.float64)
    ids = torch.cartesian_prod(torch.arange(2), torch.arange(2))          # (4, 2)
    nats = table(p1, p2)(ids)
    truth = (p1[:, None] * p2).sum().item()
    mistakes = {
        torch.exp(-nats.mean(dim=1)).sum().item():
            "you took the mean loss of a sequence: probabilities multiply, so losses add",
        torch.exp(-nats).sum().item():
            "you added the probabilities of tokens: those of one sequence multiply",
        torch.exp2(-nats.sum(dim=1)).sum().item():
            "you took powers of 2: the losses are in nats, so the base is e",
        truth / 4: "this is the mean probability of a sequence, not the sum",
        truth * 4: "you multiplied by the number of sequences",
        nats.exp().prod(dim=1).sum().item(): "the sign is wrong: a probability is exp(-loss)",
    }
    check_total(answer, table(p1, p2), 2, 2, truth, mistakes)


@torch.no_grad()
def check_totals(answer, models):
    for name in ("right", "no mask"):
        check_total(answer, models[name], V, T, true_total(models[name]))


@torch.no_grad()
def check_verdicts(answer, models):
    def accepts(losses):
        return bool(answer.is_likelihood(losses, V, T))

    # All probability on the sequence 0 0 0 0 0, so nothing is rounded.
    check(accepts(lambda ids: torch.where(ids == 0, 0.0, math.inf).double()),
          "is_likelihood rejects a model whose probabilities add up to 1 exactly")
    check(accepts(lambda ids: models["right"](ids) + 1e-6),
          "is_likelihood rejects a right model whose sum is 0.999995: a sum of rounded numbers is "
          "not exactly 1, so leave a tolerance of 1e-4")
    for name, reason in (("no mask", "without a causal mask"),
                         ("not shifted", "whose targets are not shifted: position t reads x_t")):
        check(not accepts(models[name]), f"is_likelihood accepts a model {reason}. Its sum is "
                                         f"{true_total(models[name]):.4g}")
    check(not accepts(models["lossy"]),
          f"is_likelihood accepts a sum of {true_total(models['lossy']):.2f}: this model gives "
          "probability to a fourth token, which never occurs. Below 1 is a mistake as well")
    check(not accepts(lambda ids: models["right"](ids) - 2e-4),
          "is_likelihood accepts a sum of 1.001, a small leak: the tolerance is too wide")


def test_e03(answer, reveal):
    check_small_total(answer)
    models = {
        "right": make(std=1.0),
        "no mask": make(causal=False, steps=60),
        "not shifted": make(shifted=False, steps=60),
        "new, no mask": make(causal=False),
        "lossy": make(vocab_size=V + 1, std=1.0),
    }
    check_totals(answer, models)
    check_verdicts(answer, models)
    with torch.no_grad():
        reveal({
            "no causal mask, trained: sum of the probabilities of all 243 sequences":
                true_total(models["no mask"]),
            "targets not shifted, trained: the same sum": true_total(models["not shifted"]),
            "no causal mask, not trained (its head is zero): the same sum":
                true_total(models["new, no mask"]),
        })
