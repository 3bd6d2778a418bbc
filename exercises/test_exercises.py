"""The tests of the exercises, one for each: python -m pytest exercises -k e04

A test computes the truth by itself, from the repository or by enumeration. It begins with the
smallest case, and names the typical mistake that a wrong answer shows.
"""
import contextlib
import csv
import functools
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bpe
import data
import log
import model
import scaling
import study.counting
import study.segmentation
import study.train
import study.variants
import train_ar

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NATS = "this is in nats. Bits need the logarithm to the base 2"


def check(condition, message):
    """Fail with one message, and no traceback."""
    if not condition:
        pytest.fail(message, pytrace=False)


def near(value, truth, relative=1e-5):
    """Return whether two numbers or arrays are of one shape and equal but for rounding."""
    value, truth = np.asarray(value, dtype=float), np.asarray(truth, dtype=float)
    return value.shape == truth.shape and np.allclose(value, truth, rtol=relative, atol=1e-9)


def compare(where, value, truth, mistakes=(), relative=1e-5):
    """Fail if value is not the truth, a number or an array. where: the function and the case.

    mistakes: (what a mistake would give, what to say of it). The first that fits is named.
    """
    check(value is not None, f"{where}: your function returned None. Is a `return` missing?")
    if near(value, truth, relative):
        return
    for wrong, message in mistakes:
        check(not near(value, wrong, relative), f"{where}: {message}")
    value, truth = np.asarray(value, dtype=float), np.asarray(truth, dtype=float)
    check(value.shape == truth.shape,
          f"{where}: what you return has the shape {value.shape}, and not {truth.shape}")
    first = tuple(np.argwhere(~np.isclose(value, truth, rtol=relative, atol=1e-9))[0].tolist())
    at = f" at {list(first)}" if first else ""
    check(False, f"{where}: your value{at} is {value[first]:,.6g} and not {truth[first]:,.6g}")


@contextlib.contextmanager
def without(*functions):
    """Turn off functions of the repository which are the answer, however they were imported."""
    def refuse(*_, **__):
        import pytest
        pytest.fail("you call the answer in the repository, or the profiler: write your own",
                    pytrace=False)
    codes = [function.__code__ for function in functions]
    try:
        for function in functions:
            function.__code__ = refuse.__code__
        yield
    finally:
        for function, code in zip(functions, codes, strict=True):
            function.__code__ = code


def speeches():
    """Return exercises/speeches.txt as bytes (n,)."""
    return np.frombuffer((HERE / "speeches.txt").read_bytes(), dtype=np.uint8)


@functools.cache
def speeches_bpe(vocab_size):
    """Return a Tokenizer that was learned from the speeches, and their ids."""
    tokenizer = bpe.Tokenizer(bpe.train_bpe(speeches().tobytes(), vocab_size))
    return tokenizer, tokenizer.encode(speeches().tobytes())


def tiny_model(vocab_size, context, causal):
    """Return a Transformer in float64 with random weights, also those of its head."""
    torch.manual_seed(0)
    net = model.Transformer(model.Config(vocab_size, context, 32, causal))
    torch.nn.init.normal_(net.head.weight)
    return net.double()


def entropy_of(ids):
    """Return the entropy of ids in bits, by their own counts."""
    count = np.unique(ids, return_counts=True)[1]
    return math.log2(len(ids)) - (count * np.log2(count)).sum() / len(ids)


def subsets(T):
    """Return all sets of positions but the empty one, as tuples in rising order."""
    return [S for k in range(1, T + 1) for S in itertools.combinations(range(T), k)]


# ---- E1: bits per byte.

def check_bpb(answer):
    # Two sequences of two tokens: 12 bits, 9 bytes.
    bits = np.array([[1.0, 2.0], [3.0, 6.0]])
    ids = np.array([[0, 1], [2, 2]])
    bytes_per_id = np.array([1, 4, 2, 10])
    nbytes = bytes_per_id[ids]
    value = answer.bpb(bits * math.log(2), ids, bytes_per_id)
    compare("bpb of 2 x 2 tokens", value, 12 / 9, [
        (math.log(2) * 12 / 9, "you divided nats by bytes: a nat is 1 / ln 2 bits"),
        (math.log(2)**2 * 12 / 9, "you multiplied by ln 2: a nat is more than a bit, not less"),
        (12 / 4, "this is bits per token: divide by the bytes, not by the number of tokens"),
        (12 / 4 / bytes_per_id.mean(), "this is the mean length in the vocabulary, not the text"),
        ((bits / nbytes).mean(), "you averaged the ratios of tokens: divide sums of all tokens"),
        ((bits.sum(axis=1) / nbytes.sum(axis=1)).mean(),
         "you averaged the ratios of sequences: sequences differ in bytes")])


def check_piece_bytes(answer):
    # (the token, its bytes, [what a mistake gives, its message])
    for piece, truth, *mistakes in [
            ("the", 3),
            ("\u00e9", 2, (1, "you counted characters: in UTF-8 many have several bytes")),
            ("\u2581the", 4, (6, "you counted the three bytes of U+2581: it stands for a space"),
             (3, "you left out the space that U+2581 stands for")),
            ("a\u2581b", 3, (5, "U+2581 stands for a space anywhere in a token, not only first"),
             (2, "you left out the space in the middle")),
            ("<0xE2>", 1, (6, "you counted the characters of a name: it stands for one byte"),
             (3, "you decoded a single byte, which becomes U+FFFD, and this has three bytes")),
            ("<s>", 0, (3, "you counted the characters of <s>: a mark spells no text")),
            ("</s>", 0),
            ("<0>", 3),
            ("<0x", 3, (1, "you looked at the beginning only: <0x is three characters of text")),
            ("<0xZZ>", 6, (1, "this is a text of six characters: ZZ are no digits")),
            ("<0xe2>", 6, (1, "this is a text of six characters: these are small letters")),
            ("<0x0A0>", 7, (1, "a byte has two digits, and these are three"))]:
        value = list(answer.piece_bytes([piece]))
        where = f"piece_bytes({[piece]!a})"
        check(len(value) == 1, f"{where}: one token was given, and {len(value)} numbers came back")
        compare(where, value[0], truth, mistakes)


def test_e01(answer, reveal):
    check_bpb(answer)
    check_piece_bytes(answer)

    # A whole vocabulary, written as other programs write it.
    tokenizer, ids = speeches_bpe(1024)
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += [token.decode().replace(" ", "\u2581") for token in tokenizer.tokens[256:]]
    check(np.array_equal(answer.piece_bytes(pieces), tokenizer.bytes_per_id),
          "piece_bytes is wrong for some token of the BPE of 1,024 tokens")

    # A model with random predictions, measured by the repository.
    sequences = data.Sequences(ids, 64).spaced(16)                        # (N, T)
    net = tiny_model(1024, 64, causal=True)
    truth, _ = train_ar.evaluate(net, sequences, tokenizer.bytes_per_id)
    x = torch.from_numpy(sequences)
    with torch.no_grad():
        nats = net(train_ar.corrupt(x, 1024)[0], x).numpy()
    compare("bpb of speeches.txt by a random model",
            answer.bpb(nats, sequences, tokenizer.bytes_per_id), truth)

    tokens_per_byte = len(ids) / len(speeches())
    reveal(10 * tokens_per_byte, entropy_of(speeches()), entropy_of(ids) * tokens_per_byte)


# ---- E2: FLOPs.

def profile(config):
    """Return the FLOPs of a training step by PyTorch's profiler, per token."""
    with torch.device("meta"):
        net = model.Transformer(config)
        ids = torch.zeros(2, config.context, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        net(ids, ids).mean().backward()
    return counter.get_total_flops() / ids.numel()


def test_e02(answer, reveal):
    def of_student(config):
        shape = {name: getattr(config, name)
                 for name in ("vocab_size", "padded_vocab", "context", "width", "depth")}
        with without(model.Config.flops_per_token, FlopCounterMode.get_total_flops,
                     FlopCounterMode.get_flop_counts):
            return answer.flops_per_token(SimpleNamespace(**shape))

    # Small enough to count by hand, with three layers, so that two mistakes never look alike.
    config = model.Config(vocab_size=70, context=40, width=192)
    D, T, depth = config.width, config.context, config.depth
    truth = profile(config)
    weights, head = 6 * depth * 16 * D**2, 6 * D * config.padded_vocab
    compare(f"{config}", of_student(config), truth, [
        (truth / 2, "each multiplication comes with an addition: two FLOPs, not one"),
        (truth / 3, "this is the forward pass alone: the backward pass costs twice as much"),
        (truth * 2 / 3, "the backward pass is counted once: it has two products for each of the "
                        "forward pass, one for the inputs and one for the weights"),
        (weights, "this is 6 N: the head and attention's scores and sums are missing"),
        (weights + head, "attention's scores and sums are missing: products without weights"),
        (truth - 6 * depth * D * T,
         "half of attention is missing: scores and sums, and the causal half is not saved"),
        (truth - 12 * (depth - 1) * D * T, "attention's scores and sums are counted in one block"),
        (truth - head, "the head is missing: it is a product with the whole vocabulary"),
        (truth - head + 6 * D * 70, "the head has padded_vocab columns, not vocab_size"),
        (truth + head, "the embedding is a table look-up: it has no product"),
        (truth - 6 * depth * 4 * D**2, "the MLP has three matrices: gate, up and down"),
        (truth - 6 * depth * D**2, "attention has four matrices: query, key, value and output"),
        (head + (truth - head) / depth, "this is one block: there are config.depth of them")])

    for shape in [(70, 40, 16, False), (256, 512, 32, True), (256, 512, 32, False),
                  (4096, 160, 64, True), (257, 96, 256, False), (256, 512, 576, True)]:
        config = model.Config(*shape)
        compare(f"{config}", of_student(config), profile(config))

    small, large = model.Config(width=32), model.Config(width=576)
    N = model.Transformer(small).count_params(embedding=False)
    shares = [1200 * config.depth * config.width * config.context / profile(config)
              for config in (small, large)]
    reveal(*shares, profile(small) / (6 * N))


# ---- E3: the causal mask and the likelihood.

V, T = 3, 5


def all_sequences(V, T):
    return torch.cartesian_prod(*[torch.arange(V)] * T)                   # (V^T, T)


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

    optimizer = model.make_optimizer(net)
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group["scale"]
    for _ in range(steps):
        losses(all_sequences(V, T)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@torch.no_grad()
def true_total(losses):
    return torch.exp(-losses(all_sequences(V, T)).sum(dim=1)).sum().item()


@torch.no_grad()
def check_total(answer, losses, V, T, truth, mistakes=()):
    """Check total_probability, and before this the sequences that it asks for."""
    where = f"total_probability with V = {V}, T = {T}"
    asked = set()

    def recorded(ids):
        check(torch.is_tensor(ids) and ids.dim() == 2 and ids.size(1) == T,
              f"{where}: losses takes a tensor (N, T) of sequences of T = {T} tokens")
        check(ids.min() >= 0 and ids.max() < V, f"{where}: ids are 0 .. V - 1 = {V - 1}")
        asked.update(map(tuple, ids.tolist()))
        return losses(ids)

    value = answer.total_probability(recorded, V, T)
    missing = V**T - len(asked)
    check(not missing, f"{where}: {missing} of the {V**T} sequences are left out. A token may "
                       "occur again, and the order counts")
    compare(where, value, truth, mistakes)


def check_small_total(answer):
    # Probabilities of the first token, and of the second, given the first. They do not add up to 1.
    p1 = torch.tensor([0.5, 0.7], dtype=torch.float64)
    p2 = torch.tensor([[0.9, 0.4], [0.3, 0.8]], dtype=torch.float64)

    def losses(ids):
        return -torch.stack([p1[ids[:, 0]], p2[ids[:, 0], ids[:, 1]]], dim=1).log()

    nats = losses(all_sequences(2, 2))
    truth = (p1[:, None] * p2).sum().item()
    check_total(answer, losses, 2, 2, truth, [
        (torch.exp(-nats.mean(dim=1)).sum(),
         "you took the mean loss of a sequence: probabilities multiply, so losses add"),
        (torch.exp(-nats).sum(),
         "you added the probabilities of tokens: those of one sequence multiply"),
        (torch.exp2(-nats.sum(dim=1)).sum(),
         "you took powers of 2: the losses are in nats, so the base is e"),
        (truth / 4, "this is the mean probability of a sequence, not the sum"),
        (nats.exp().prod(dim=1).sum(), "the sign is wrong: a probability is exp(-loss)")])


@torch.no_grad()
def check_verdicts(answer, right, no_mask, not_shifted):
    def accepts(losses):
        return bool(answer.is_likelihood(losses, V, T))

    # All probability on the sequence 0 0 0 0 0, so nothing is rounded.
    check(accepts(lambda ids: torch.where(ids == 0, 0.0, math.inf).double()),
          "is_likelihood rejects a model whose probabilities add up to 1 exactly")
    check(accepts(lambda ids: right(ids) + 1e-6),
          "is_likelihood rejects a right model whose sum is 0.999995: a sum of rounded numbers is "
          "not exactly 1, so leave a tolerance of 1e-4")
    for losses, reason in ((no_mask, "without a causal mask"),
                           (not_shifted, "whose targets are not shifted: position t reads x_t")):
        check(not accepts(losses),
              f"is_likelihood accepts a model {reason}. Its sum is {true_total(losses):.4g}")
    lossy = make(vocab_size=V + 1, std=1.0)
    check(not accepts(lossy),
          f"is_likelihood accepts a sum of {true_total(lossy):.2f}: this model gives "
          "probability to a fourth token, which never occurs. Below 1 is a mistake as well")
    check(not accepts(lambda ids: right(ids) - 2e-4),
          "is_likelihood accepts a sum of 1.001, a small leak: the tolerance is too wide")


def test_e03(answer, reveal):
    check_small_total(answer)
    right = make(std=1.0)
    no_mask, not_shifted = make(causal=False, steps=60), make(shifted=False, steps=60)
    for losses in (right, no_mask):
        check_total(answer, losses, V, T, true_total(losses))
    check_verdicts(answer, right, no_mask, not_shifted)
    reveal(true_total(no_mask), true_total(not_shifted))


# ---- E4: the bound, a loss that is no bound, and noise.

def cost(p, x, group, known):
    """Return -log2 p(x at group | x at known)."""
    def probability(positions):
        others = tuple(i for i in range(p.ndim) if i not in positions)
        return p.sum(axis=others)[tuple(x[i] for i in sorted(positions))]
    return -math.log2(probability({*group, *known}) / probability(set(known)))


def check_bound(answer, rng):
    points, du = np.polynomial.legendre.leggauss(16)
    t, dt = (points + 1) / 2, du / 2
    all_alike = "all sets S count alike. But all the sets of k share a chance of 1 / T"
    # T = 1 is last: there many mistakes are alike.
    for T in (2, 3, 5, 1):
        nll = {S: rng.uniform(1, 9) for S in subsets(T)}
        # By the definition: the integral over t.
        truth = sum((dt / t * t**len(S) * (1 - t)**(T - len(S))).sum() * nll[S] for S in nll)
        alike = sum(T / len(S) * nll[S] for S in nll)
        unweighted = [np.mean([nll[S] for S in nll if len(S) == k]) for k in range(1, T + 1)]
        compare(f"bound, with random costs nll of {T} tokens", answer.bound(nll.__getitem__, T),
                truth, [
            (alike / len(nll), all_alike),
            (alike / 2**T, all_alike),
            (truth / T, "this is the bound per token. That of the sequence is T times as much"),
            (truth * T / (T + 1), "k has T values, 1 .. T: 0 masked tokens are never drawn"),
            (np.mean(unweighted), "no weights: the k masked tokens must stand for all T")])


def check_masked_nll(answer, rng):
    for T, V in ((2, 2), (3, 2), (4, 3)):
        p = rng.dirichlet(np.ones(V**T)).reshape((V,) * T)
        x = tuple(rng.integers(V, size=T).tolist())
        for S in subsets(T):
            visible = set(range(T)).difference(S)
            alone = sum(cost(p, x, {i}, visible) for i in S)
            jointly = cost(p, x, S, visible)
            where = f"masked_nll, x = {x}, S = {S}"
            compare(f"{where}, each by itself", answer.masked_nll(p, x, S, False), alone, [
                (sum(cost(p, x, {i}, set(range(T)) - {i}) for i in S),
                 "a masked token reads the other masked tokens. Only the visible ones are given"),
                (sum(cost(p, x, {i}, ()) for i in S), "the visible tokens are not read"),
                (jointly, "the masked tokens are predicted jointly"),
                (alone * math.log(2), NATS)])
            compare(f"{where}, jointly", answer.masked_nll(p, x, S, True), jointly, [
                (cost(p, x, S, ()), "the joint prediction does not read the visible tokens"),
                (alone, "each masked token is predicted by itself"),
                (jointly * math.log(2), NATS)])


def check_estimates(estimates, T, smallest, n=50_000):
    """Check a student's estimates. Return the standard deviation that they should have."""
    def drawn(seed):
        return estimates(T, n, smallest, torch.Generator().manual_seed(seed)).double()

    value, where = drawn(4), f"estimates, T = {T}, t from {smallest}"
    check(value.shape == (n,), f"estimates: the shape is {tuple(value.shape)} and not (n,)")
    check(torch.equal(value, drawn(4)), "estimates: the same generator twice, and other numbers. "
          "Give generator=generator to all that is random")
    # Given t the variance is (1 - t) / (t T).
    spread = math.sqrt((-math.log(smallest) / (1 - smallest) - 1) / T)
    mean, std = value.mean().item(), value.std().item()
    check(std > 1e-6, f"{where}: no noise at all. So is a weight of T / k. Here it is 1/t")
    check(abs(mean - 1) < 0.05, f"{where}: the mean is {mean:.3f} and not 1")
    check(abs(drawn(5).std() / std - 1) < 0.05, f"{where}: the spread changes with the seed. You "
          "drew one t for all n estimates: draw one for each")
    check(std > 0.7 * spread,
          f"{where}: the spread is {std:.4f} and not {spread:.4f}. Is the masked share just t? "
          "Each token is masked by itself, so their number is random")
    check(value.min() >= 0, f"{where}: an estimate is negative. The number of masked tokens is "
          "binomial, and only roughly normal: mask each token")
    check(value.max() < 1.001 / smallest,
          f"{where}: one is {value.max():.1f}, above 1 / {smallest}. So t gets too small")
    # The chance that no token is masked is the mean of (1 - t)^T, or less with a t for each token.
    zero, alone = (1 - smallest) ** T / (T + 1), ((1 - smallest) / 2) ** T
    share = (value == 0).double().mean().item()
    check(abs(share - alone) > 5 * math.sqrt(alone / n) + 1e-4, f"{where}: too few of the "
          "estimates are 0. You drew a t for each token: draw one for each sequence")
    check(abs(share - zero) < 5 * math.sqrt(zero / n), f"{where}: of the estimates {share:.1%} are "
          f"0, and not {zero:.1%}. Is each token masked by itself, with probability t?")
    check(std < 1.15 * spread, f"{where}: the spread is {std:.4f} and not {spread:.4f}")
    check(abs(mean - 1) < 5 * spread / math.sqrt(n), f"{where}: the mean is {mean:.4f}, which "
          "is too far from 1 to be chance. Check how t is drawn, and that the weight is 1/t")
    return spread


def test_e04(answer, reveal):
    rng = np.random.default_rng(4)
    check_bound(answer, rng)
    check_masked_nll(answer, rng)
    check_estimates(answer.estimates, 4, 0.1)
    spread = check_estimates(answer.estimates, 512, 0.001)
    # Two fair bits that are always equal.
    p = np.diag([0.5, 0.5])
    reveal(answer.bound(lambda S: answer.masked_nll(p, (0, 0), S, True), 2), 100 * spread)


# ---- E5: schedules.

def of_all_masks(T):
    """Return the costs {S: (1,)} in nats of one sequence, and their gradients {S: (n,)}."""
    torch.manual_seed(5)
    net = model.Transformer(model.Config(3, T, 16, causal=False))
    torch.nn.init.normal_(net.head.weight, std=0.25)
    net = net.double()
    ids = torch.randint(3, (T,))
    costs, gradients = {}, {}
    for S in subsets(T):
        inputs = ids.clone()
        inputs[list(S)] = 3
        nll = net(inputs[None], ids[None])[0, list(S)].sum()
        gradient = torch.autograd.grad(nll, list(net.parameters()))
        costs[S] = np.array([nll.item()])
        gradients[S] = torch.cat([part.flatten() for part in gradient]).double().numpy()
    return costs, gradients


def estimate(values, P, weight=None, shared=True):
    """Return the mean (n,) and the mean square, summed, of what a schedule estimates.

    Mistakes: another weight(k); a probability of P(k) for each of the masks of k tokens.
    """
    mean, square = 0.0, 0.0
    for S, value in values.items():
        k = len(S)
        w = 1 / (k * P[k - 1]) if weight is None else weight(k)
        probability = P[k - 1] / math.comb(len(P), k) if shared else P[k - 1]
        mean = mean + probability * w * value
        square += probability * w**2 * (value**2).sum()
    return mean, square


def test_e05(answer, reveal):
    for T, p in ((2, 1), (2, 2), (6, 0.5), (6, 3)):
        edges = np.arange(T + 1) / T
        compare(f"probabilities, T = {T}, p = {p}", answer.probabilities(T, p),
                np.diff(edges ** (1 / p)), [
            (np.diff(edges), "all k are alike. So they are for p = 1 only"),
            (np.diff(edges**p), "the rate u^p takes the place of its inverse, a time")])

    rng = np.random.default_rng(5)
    for T, p in ((2, 1), (2, 2), (3, 0.5)):
        P = np.diff((np.arange(T + 1) / T) ** (1 / p))
        values = {S: rng.uniform(1, 3, size=2) for S in subsets(T)}
        mean, noise = answer.mean_and_noise(values, P)
        truth, square = estimate(values, P)
        where = f"mean_and_noise, T = {T}, p = {p}"
        compare(f"{where}, the mean", mean, truth, [
            (estimate(values, P, weight=lambda k, T=T: T / k)[0],
             "every k is weighed by T / k: right for p = 1 only. Weigh less what is drawn more"),
            (estimate(values, P, shared=False)[0],
             "every mask has the probability P(k). But all the masks of k tokens share it")])
        compare(f"{where}, the noise", noise, square - (truth**2).sum(), [
            (square, "this is the mean square. The variance is less")])

    T = 6
    costs, gradients = of_all_masks(T)
    P_of = {p: answer.probabilities(T, p) for p in (0.5, 1, 2)}
    inverse = study.train.SCHEDULES["bell"][1]
    P_of["bell"] = np.diff(inverse(torch.arange(T + 1, dtype=torch.float64) / T).numpy())
    bounds = {p: answer.mean_and_noise(costs, P)[0][0] for p, P in P_of.items()}
    noise = {p: answer.mean_and_noise(gradients, P)[1] for p, P in P_of.items()}
    reveal(bounds[2] / bounds[1], noise[0.5] / noise[1], noise["bell"] / noise[1])


# ---- E6: compute-optimal tokenization.

SIZES = (512, 768, 1024, 1536, 2048, 3072, 4096)


def check_flops_per_byte(answer):
    for width, V, length, context in ((32, 256, 1.0, 100), (32, 1024, 3.2, 512), (32, 512, 2.5, 16),
                                      (192, 4096, 3.3, 100)):
        tokenizer = SimpleNamespace(merges=V > 256)
        T = data.Corpus({"bytes_per_token": length}, tokenizer, None, None).tokens(context)

        def price(T, V=V, width=width):
            return model.Config(V, T, width).flops_per_token()
        compare(f"flops_per_byte, width {width}, vocabulary {V}, {length} bytes per token, context "
                f"of {context} bytes", answer.flops_per_byte(width, V, length, context),
                price(T) / length, [
            (price(T), "this is the price of a token"),
            (price(T) * length, "a token spells several bytes, so a byte costs less than a token"),
            (price(context) / length, "the context is given in bytes: in tokens it is shorter"),
            (price(round(context / length)) / length, "a multiple of 16 tokens is read"),
            (price(16 * round(context / 16)) / length, "without a BPE nothing is rounded"),
            (price(16 * int(context / length / 16)) / length,
             "round to the nearest multiple of 16, not down; at least 16"),
            (price(T, V=256) / length, "your head has 256 rows: it grows with the vocabulary")])


def test_e06(answer, reveal):
    # The tokens are abc, abc, a and z.
    tokenizer = bpe.Tokenizer([(b"a", b"b"), (b"ab", b"c"), (b"x", b"y")])
    compare("bytes_per_token of 'abcabcaz' with the tokens ab, abc and xy",
            answer.bytes_per_token(b"abcabcaz", tokenizer), 2, [
        (0.5, "these are tokens per byte"),
        (tokenizer.bytes_per_id.mean(),
         "you took the mean over the vocabulary, and not over the text"),
        (5 / 3, "you counted each kind of token once")])
    check_flops_per_byte(answer)

    merges = speeches_bpe(4096)[0].merges
    lengths = {V: answer.bytes_per_token(speeches().tobytes(), bpe.Tokenizer(merges[:V - 256]))
               for V in SIZES}

    def price(width, V):
        return answer.flops_per_byte(width, V, lengths.get(V, 1.0), 512)

    best = {width: min(SIZES, key=functools.partial(price, width)) for width in (32, 576)}
    for width, truth in best.items():
        compare(f"cheapest, width {width}", answer.cheapest(width, lengths, 512), truth, [
            (price(width, truth), "this is its price. Return the vocabulary size"),
            (4096, "this has the longest tokens. But its head is the largest, too")])
    reveal(price(32, 256) / price(32, 4096), price(576, 256) / price(576, 4096), best[32])


# ---- E7: the IsoFLOP minimum, and extrapolation.

CUT = 1e13                            # FLOPs; larger budgets are held out


def published_rows():
    """Return the runs of the published study that its minima are fitted to."""
    rows = scaling.read_rows(ROOT / "results/runs.csv")
    return [row for row in rows if scaling.by_the_rules(row)]


def check_minimum(minimum, N, L, where):
    """Compare what parabola returned for sizes N and losses L. Return the truth, and the curvature.
    """
    c, b, a = np.polyfit(np.log(N), L, 2)
    log_size = -b / (2 * c)
    straight = np.polyfit(N, L, 2)
    check(minimum is not None,
          f"{where}: yours is None, but a minimum is inside. (Sizes may come in any order)")
    compare(f"{where}, N*", minimum[0], math.exp(log_size), [
        (log_size, "you returned ln N*, and not N*"),
        (10**log_size, "you fitted in ln N and took a power of 10: the base of both is e"),
        (math.exp(log_size / math.log(10)), "you fitted in log10 N and took exp: take 10 to it"),
        (N[np.argmin(L)], "you returned the lowest run, and not the parabola's minimum"),
        (-straight[1] / (2 * straight[0]),
         "your parabola is one of L against N. Sizes differ by factors: take ln N")], 1e-4)
    compare(f"{where}, L*", minimum[1], a - b**2 / (4 * c), relative=1e-4)
    return math.exp(log_size), c


def check_parabola(parabola):
    # A planted parabola, its best size between two that were trained.
    N = np.array([16000.0, 50000, 4000, 120000, 8000])
    L = 2.5 + 0.05 * np.log(N / 22000) ** 2
    check_minimum(parabola(N, L), N, L, "a planted parabola")
    for size in (400000, 1000):
        check(parabola(N, 2.5 + 0.05 * np.log(N / size) ** 2) is None,
              "parabola: the best size is outside of all that were trained: return None")
    check(parabola(N, 5 - L) is None,
          "parabola: this one is open below: what you found is its maximum. Return None")
    check(parabola(N[[2, 2, 2, 3, 3]], np.array([2.6, 2.5, 2.6, 2.5, 2.6])) is None,
          "parabola: two sizes, both trained several times, do not determine one: return None")


def check_held(held):
    # Samples of 0 to 100, and their third powers, which are skewed.
    for name, power in (("", 1), (" to the third power", 3)):
        samples = np.tile(np.linspace(0, 100, 1001)[:, None] ** power, (1, 6))
        inside = np.asarray(held(samples, np.array([50, 60, 5.5, 94.5, 4.5, 95.5]) ** power))
        where = f"held, of the samples 0 to 100{name}"
        check(inside.shape == (6,), f"held: what you return has the shape {inside.shape}, not (K,)")
        check(inside[1], f"{where}: 60 is outside. That is an interval for the mean of samples")
        check(inside[2] and inside[3], f"{where}: 5.5 or 94.5 is outside, so more than 5% are")
        check(not inside[4] and not inside[5], f"{where}: 4.5 or 95.5 is inside, so less than 5% "
              "are outside. Mean and deviation do not tell: count samples")


def check_law(predict):
    """Check that a student's predict is a law at all, on planted runs."""
    later = np.array([3e13, 1e14, 1e30])
    C = np.array([1e12, 3e12, 1e13]).repeat(3)
    from_best = np.tile([0.4, 0.9, 2.2], 3)
    N = 1e5 * (C / 1e13) ** 0.6 * from_best
    for gamma in (0.05, 0.15):
        L = 3 * (C / 1e13) ** -gamma + 0.05 * np.log(from_best) ** 2
        value = np.asarray(predict(C, N, C / (6 * N), L, later), dtype=float)
        check(value.shape == (3,), f"predict: what you return has the shape {value.shape}")
        check(value[0] > value[1], "predict: more compute does not lower your predicted loss")
        check(value[2] > 0, "predict: your law falls below zero at 1e30 FLOPs. No loss does")
        truth = 3 * 3**-gamma
        check(abs(value[0] - truth) < 0.08, f"predict: for planted losses of 3 (C / 1e13)^-{gamma} "
              f"you predict {value[0]:.3f} at 3e13, and {truth:.3f} is right. Use the losses that "
              "are given: no exponent and no table of your own")


def test_e07(answer, reveal):
    check_parabola(answer.parabola)
    check_held(answer.held)
    check_law(answer.predict)

    # The published runs may grow, so truths are computed from them.
    rows = published_rows()
    known_rows = [row for row in rows if row["flops_budget"] <= CUT]
    fits, known = scaling.fit_minima(rows), scaling.fit_minima(known_rows)
    inside, of_line, of_student = [], [], []
    for key, fit in fits.items():
        is_later = fit.budgets > CUT
        later, measured = fit.budgets[is_later], fit.minima[0, is_later]
        # A straight line in logs through the known minima, and through each sample of them.
        slope, start = np.polyfit(np.log(known[key].budgets), np.log(known[key].minima).T, 1)
        line = np.exp(start[:, None] + slope[:, None] * np.log(later))                  # (S, J)
        inside += list(answer.held(line[1:], measured))
        of_line += list(line[0] - measured)
        runs = [[row[name] for row in known_rows if (row["objective"], row["tokenizer"]) == key]
                for name in ("flops_budget", "params_non_embedding", "tokens", "val_bpb")]
        predicted = answer.predict(*np.array(runs, dtype=float), later)
        of_student += list(np.asarray(predicted, dtype=float) - measured)
    floor, error = np.abs(of_line).mean(), np.abs(of_student).mean()
    check(error < 0.99 * floor, f"predict: your mean absolute error over held-out minima is "
          f"{error:.4f} bits per byte, and that of a straight line is {floor:.4f}")

    C, N, L = scaling.runs_of(rows, ("mdm", "byte"))
    N, L = N[C == CUT], L[C == CUT]
    best, curvature = check_minimum(answer.parabola(N, L), N, L, "MDM, bytes, 1e13")
    reveal(best, curvature * math.log(2) ** 2, 100 * np.mean(inside))


# ---- E8: parity.

GRID = np.linspace(0, 1, 101)         # bits per byte


def law_of(C, L, E):
    slope, start = np.polyfit(np.log(C), np.log(L - E), 1)
    return math.exp(start), -slope


def best_entropy(curves, error=lambda fitted, L, E: ((fitted - L) ** 2).sum()):
    """Return the E of the grid with which the laws of the curves fit best."""
    def total(E):
        laws = [(C, L, *law_of(C, L, E)) for C, L in curves]
        return sum(error(E + K * C**-gamma, L, E) for C, L, K, gamma in laws)
    return min(GRID, key=total)


def check_gap(answer):
    # Laws without E: bytes need 7 times the compute at 1e12, and 7 * 3^0.5 at 3e12.
    C = np.array([1e12, 3e12, 1e13, 3e13])
    C_byte = np.append(C, 1e14)
    L_bpe, L_byte = 2 * (C / 1e12) ** -0.15, 2 * (C_byte / 7e12) ** -0.1
    truth = np.array([7.0, 7 * 3**0.5, math.inf, math.inf])
    with without(scaling.compute_to_reach):
        value = np.asarray(answer.gap(C_byte, L_byte, C, L_bpe), dtype=float)
    check(not near(value, 1 / truth), "gap: this is C_bpe / C_byte")
    check(value.shape != (4,) or not near(value[2], C_byte[0] / C[2]),
          "gap: np.interp wants rising numbers, and L falls: give it -log L")
    check(value.shape != (4,) or np.isinf(value[2:]).all(),
          "gap: at 1e13 FLOPs bytes do not reach BPE. Yours is extrapolated, or their last budget")
    in_log_C = np.exp(np.interp(-L_bpe, -L_byte, np.log(C_byte)))
    in_C = np.interp(-np.log(L_bpe), -np.log(L_byte), C_byte)
    compare("gap", value, truth, [(np.where(np.isfinite(truth), wrong, math.inf), message)
                                  for wrong, message in (
        (L_byte[:4] / L_bpe, "this is the ratio of losses"),
        (truth * C, "this is the compute of bytes: divide by BPE's"),
        (in_log_C / C, "you interpolate L: log L is the straight line in log C"),
        (in_C / C, "you interpolate C: log L is a straight line in log C"))])


def check_frontier(answer):
    C = np.array([1e12, 3e12, 1e13, 3e13])
    for E in (0.0, 0.8):
        L = E + 40 * C**-0.12
        ignored = law_of(C, L, 0.0) if E else (0, 0)
        compare(f"frontier of L = {E} + 40 C^-0.12, (K, gamma)", answer.frontier(C, L, E),
                (40, 0.12), [
            ((40, -0.12), "gamma is positive for a loss that falls"),
            ((math.log(40), 0.12), "you returned ln K, and not K"),
            ((-0.12, math.log(40)), "this is what polyfit returns: -gamma and ln K"),
            (ignored, "E plays no part: fit L - E")], 1e-4)


def check_entropy(answer):
    C = np.array([1e12, 3e12, 1e13, 3e13, 1e14])
    curves = [(C, 0.3 + 100 * C**-0.13), (C[:4], 0.9 + 200 * C[:4] ** -0.14)]
    for curve, truth in zip(curves, (0.3, 0.9), strict=True):
        compare(f"entropy of one planted curve of {truth}", answer.entropy([curve], GRID), truth, [
            (round(100 * truth), "you returned the position in the grid")], 1e-3)
    joined = [np.concatenate(parts) for parts in zip(*curves, strict=True)]
    compare("entropy of two planted curves of 0.3 and 0.9", answer.entropy(curves, GRID),
            best_entropy(curves), [
        (0.6, "this is the mean of two separate E. The curves share one: add up their errors"),
        (0.3, "you fit the first curve only"), (0.9, "you fit the last curve only"),
        (best_entropy([joined]), "you fit one law to the points of both curves"),
        (best_entropy(curves, lambda fitted, L, E: ((fitted - L) ** 2).mean()),
         "each curve counts by its mean error: take the sum over all points"),
        (best_entropy(curves, lambda fitted, L, E: (np.log((fitted - E) / (L - E)) ** 2).sum()),
         "you add up errors of the logarithm: the error is that of L")], 1e-3)


def test_e08(answer, reveal):
    check_gap(answer)
    check_frontier(answer)
    check_entropy(answer)

    fits = scaling.fit_minima(published_rows())
    curves = {key: (fit.budgets, fit.minima[0]) for key, fit in fits.items()}
    byte, subword = curves["ar", "byte"], curves["ar", "bpe"]
    compare("gap of AR, published minima", answer.gap(*byte, *subword),
            scaling.gaps_between(fits)["ar"].G[0])

    def parity(E):
        """Return log10 of the FLOPs at which bytes reach BPE."""
        laws = [answer.frontier(*curve, E) for curve in (byte, subword)]
        return math.log10(laws[0][0] / laws[1][0]) / (laws[0][1] - laws[1][1])
    shared = answer.entropy(list(curves.values()), GRID)
    reveal(parity(0), parity(shared) - parity(0),
           answer.entropy([byte], GRID) - answer.entropy([subword], GRID))


# ---- E9: contiguity.

def test_e09(answer, reveal):
    text = speeches()[:len(speeches()) // 512 * 512]

    def shuffled(block):
        # As Sequences does it, and all of the text.
        order = study.train.Sequences(text, 512, block).order
        return text[np.arange(0, len(text), 512)[:, None] + order].ravel()

    for block in (1, 2, 4, 8, 64, 512):
        given = shuffled(block)
        value = np.asarray(answer.unshuffle(given, block))
        again = given.reshape(-1, block)[:, study.train.permutation(block)].ravel()
        check(not np.array_equal(value, again) or np.array_equal(again, text),
              "unshuffle: the same permutation is applied once more. It needs the inverse")
        check(np.array_equal(value, text), f"unshuffle: blocks of {block} are not as they were")

    # Short texts first.
    for ids in (np.array([0, 1, 2, 3]), np.array([0, 1, 0, 1, 0, 2, 0, 1, 1, 0]), text[:5000]):
        truth, pairs = entropy_of(ids), ids[:-1].astype(np.int64) * 256 + ids[1:]
        compare(f"unigram_bits of {len(ids)} tokens", answer.unigram_bits(ids), truth, [
            (truth * math.log(2), NATS)])
        joint = entropy_of(pairs)
        compare(f"bigram_bits of {len(ids)} tokens", answer.bigram_bits(ids),
                joint - entropy_of(ids[:-1]), [
            (joint, "this is the entropy of a pair. Take away what the first token costs"),
            (entropy_of(pairs[::2]) - entropy_of(ids[:-1:2]),
             "every other pair is left out. A token is in two pairs")])

    def told(block):
        given = shuffled(block)
        return answer.unigram_bits(given) - answer.bigram_bits(given)
    reveal(100 * told(2) / told(1), 100 * told(512) / told(1))


# ---- E10: spans and patches.

def markov_chain(T, first=(0.5, 0.5)):
    """Return the probabilities of T bits: each next one differs with probability 0.1."""
    p = np.zeros((2,) * T)
    for x in itertools.product((0, 1), repeat=T):
        p[x] = first[x[0]] * math.prod(0.1 if a != b else 0.9 for a, b in itertools.pairwise(x))
    return p


def entropy_at(p, positions):
    q = p.sum(axis=tuple(i for i in range(p.ndim) if i not in positions))
    q = q[q > 0]
    return float(-(q * np.log2(q)).sum())


def span_bound(p, span, given):
    """Return the bound of a token that reads the positions given(visible, before, inside).

    visible: what is not masked. before: all masked positions to the left. inside: those of the
    token's own span.
    """
    R, total = p.ndim // span, 0.0
    for S in subsets(R):
        masked = [i for i in range(p.ndim) if i // span in S]
        visible = set(range(p.ndim)).difference(masked)
        for i in masked:
            before = {j for j in masked if j < i}
            known = given(visible, before, {j for j in before if j // span == i // span})
            bits = entropy_at(p, {i, *known}) - entropy_at(p, known)
            total += bits / len(S) / math.comb(R, len(S))
    return total


def check_entropy_at(answer):
    rng = np.random.default_rng(10)
    random = [rng.dirichlet(np.ones(V**T)).reshape((V,) * T) for T, V in ((1, 2), (2, 2), (3, 3))]
    # In the last, some sequences never occur.
    for p in (*random, np.diag([0.5, 0.5])):
        for positions in (set(), *map(set, subsets(p.ndim))):
            truth, value = entropy_at(p, positions), answer.entropy(p, positions)
            where = f"entropy, T = {p.ndim}, V = {len(p)}, positions {positions or 'none'}"
            check(np.isfinite(value), f"{where}: {value}. Where p is 0, p log p is 0")
            compare(where, value, truth, [
                (truth * math.log(2), NATS),
                (sum(entropy_at(p, {i}) for i in positions),
                 "the entropies of single tokens are added up. Tokens depend on each other")])


def test_e10(answer, reveal):
    check_entropy_at(answer)
    readings = {
        "visible": lambda visible, before, inside: visible,
        "in its span": lambda visible, before, inside: visible | inside,
        "in all spans": lambda visible, before, inside: visible | before,
        "nothing": lambda visible, before, inside: set(),
        "span only": lambda visible, before, inside: inside}
    for T, span in ((1, 1), (2, 2), (2, 1), (4, 2), (6, 1), (6, 2), (6, 3)):
        bound = {name: span_bound(markov_chain(T), span, given) for name, given in readings.items()}
        for left_to_right in (False, True):
            truth = bound["in its span" if left_to_right else "visible"]
            other = bound["visible" if left_to_right else "in its span"]
            value = answer.expected_bound(markov_chain(T), span, left_to_right)
            compare(f"expected_bound, T = {T}, span = {span}, left_to_right = {left_to_right}",
                    value, truth, [
                (span * truth, "the weight is T / k. But k counts spans, and there are R of them"),
                (truth * span / T, "the weight is 1 / k: the bound of one span, not of a sequence"),
                (truth / T, "this is the bound of one token, not of a sequence"),
                (other, "left_to_right is not used, or taken for its opposite"),
                (bound["in all spans"], "masked spans read each other. This loss is below the "
                 f"entropy of the sequence, {bound['in its span']:.3f} bits: no code can do that"),
                (bound["span only"], "a token reads its span in place of the visible tokens"),
                (bound["nothing"], "the visible tokens are not read")])

    def above(span, left_to_right):
        bits = answer.expected_bound(markov_chain(6), span, left_to_right)
        return bits - entropy_at(markov_chain(6), range(6))

    reveal(above(2, False), above(3, False), round(above(2, True), 9) + 0.0)


# ---- E11: segmentation.

def check_auroc(answer, scores, positive, truth):
    """Check a student's auroc on small cases, then on many scores with ties."""
    first = np.array([True, False, False])
    compare("auroc, a positive with the highest score of three",
            answer.auroc(np.array([3.0, 2.0, 1.0]), first), 1, [
        (0, "you rank from the highest score, or count the negatives: it must be 1"),
        (0.5, "your ranks begin at 0, and the formula wants them from 1")])
    tie = np.array([1.0, 1.0])
    values = [answer.auroc(tie, np.array(order)) for order in ([True, False], [False, True])]
    check(near(*values), "auroc: the order of two equal scores matters. They share a mean rank")
    compare("auroc, two equal scores (a tie counts as half)", values[0], 0.5)
    compare("auroc of 300 scores with ties", answer.auroc(scores, positive), truth)


def bigram_entropies(text):
    """Return how unsure counted pairs are of each byte of text (n,) but the first, in bits."""
    counts = np.zeros((256, 256))
    np.add.at(counts, (text[:-1], text[1:]), 1)
    p = torch.from_numpy(counts / counts.sum(axis=1, keepdims=True).clip(1))
    entropy = torch.special.entr(p).sum(dim=1).numpy() / math.log(2)                        # (256,)
    return entropy[text[:-1]]


def test_e11(answer, reveal):
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(10, size=300).astype(float), rng.random(300) < 0.3
    truth = study.segmentation.auroc(scores, positive)
    with without(study.segmentation.auroc):
        check_auroc(answer, scores, positive, truth)

    tokenizer, ids = speeches_bpe(512)
    lengths = tokenizer.bytes_per_id[ids]
    begins = lengths.cumsum() - lengths
    # A token of a space and more would start one byte later.
    late = np.array([len(token) > 1 and token[:1] == b" " for token in tokenizer.tokens])
    starts, starts_late = np.zeros((2, len(speeches())), dtype=bool)
    starts[begins] = True
    starts_late[begins + late[ids]] = True

    # All bytes but the first, which has none before it.
    entropy = bigram_entropies(speeches())
    space = (speeches()[1:] == ord(" ")).astype(float)
    truths = []
    for scores, positive in ((entropy, starts), (space, starts), (entropy, starts_late)):
        truths.append(study.segmentation.auroc(scores, positive[1:]))
        compare("auroc of 100,000 bytes", answer.auroc(scores, positive[1:]), truths[-1])
    reveal(*truths)


# ---- E12: sampling orders. A model is a function of three bits or MASK: probabilities (3, 2).

MASK = 2


def perfect_model(joint):
    """Return a model that knows the distribution of three bits (2, 2, 2)."""
    def predict(seen):
        fits = [[bit in (value, MASK) for value in (0, 1)] for bit in seen]
        given = joint * np.einsum("i,j,k->ijk", *np.array(fits, dtype=float))
        others = ((1, 2), (0, 2), (0, 1))
        return np.array([given.sum(axis=axes) for axes in others]) / given.sum()
    return predict


def real_model():
    net = tiny_model(MASK, 3, causal=False)

    @torch.no_grad()
    def predict(seen):
        ids = torch.tensor([[int(bit) for bit in seen]])
        return net(ids)[0].softmax(dim=-1).numpy()
    return predict


def most_confident(predict, by_sample=True, greedy=False):
    """Return the distribution of sequences filled by confidence: (2, 2, 2).

    by_sample: the position is chosen by the probability of its drawn bit, or else by that of its
    most likely bit. greedy: the most likely bits take the place of drawn ones.
    """
    p = np.zeros((2, 2, 2))

    def extend(seen, weight):
        masked = [i for i in range(3) if seen[i] == MASK]
        if not masked:
            p[seen] += weight
            return
        now = predict(seen)[masked]
        for drawn in itertools.product((0, 1), repeat=len(masked)):
            chances, highest = now[range(len(masked)), drawn], now.max(axis=1)
            if greedy and (chances < highest).any():
                continue
            kept = (chances if by_sample else highest).argmax()
            after = list(seen)
            after[masked[kept]] = drawn[kept]
            extend(tuple(after), weight * (1 if greedy else chances.prod()))

    extend((MASK,) * 3, 1.0)
    return p


def in_order(predict, order):
    """Return the distribution of sequences that are filled in one order: (2, 2, 2)."""
    p = np.ones((2, 2, 2))
    for bits in itertools.product((0, 1), repeat=3):
        seen = [MASK] * 3
        for i in order:
            p[bits] *= predict(seen)[i][bits[i]]
            seen[i] = bits[i]
    return p


def check_sequences(where, value, truth, mistakes=()):
    """Check a distribution of sequences (2, 2, 2)."""
    value = np.asarray(value, dtype=float)
    check(value.shape != truth.shape or near(value.sum(), 1),
          f"{where}: your probabilities add up to {value.sum():.4f}, not to 1")
    axes = "the axes are in another order: p[a, b, c] is of the bits a, b, c from left to right"
    compare(where, value, truth, [
        *mistakes, *((truth.transpose(order), axes) for order in itertools.permutations(range(3)))])


def test_e12(answer, reveal):
    joint = markov_chain(3, first=(0.4, 0.6))
    know, believe = perfect_model(joint), real_model()
    product = np.einsum("i,j,k->ijk", *know((MASK,) * 3))
    check_sequences("one_step", answer.one_step(know), product, [
        (joint, "this is the model's own distribution. In one step no bit sees another")])

    in_orders = [in_order(believe, order) for order in itertools.permutations(range(3))]
    check_sequences("random_order, perfect model", answer.random_order(know), joint)
    check_sequences("random_order, real model", answer.random_order(believe),
                    np.mean(in_orders, axis=0), [
        (p, "you follow one order, which does for a perfect model: take the mean over all six")
        for p in in_orders])

    truth, greedy = most_confident(know), most_confident(know, greedy=True)
    check_sequences("confident, perfect model", answer.confident(know), truth, [
        (most_confident(know, by_sample=False),
         "you choose the position before a bit is drawn. sample.fill draws first: see rank"),
        (greedy, "you take the most likely bit. That is temperature 0: here bits are drawn")])
    check_sequences("confident, real model", answer.confident(believe), most_confident(believe))

    def variation(p):
        return np.abs(p - joint).sum() / 2
    reveal(variation(product), variation(truth), variation(greedy))


# ---- E13: infilling.

def normalized(p):
    return p / p.sum()


def check_short_gaps(answer):
    """Check a student's fill_one on a model small enough for all its sequences."""
    V, T = 3, 4
    net = tiny_model(V, T, causal=True)
    p = np.zeros((V,) * T)
    for ids in itertools.product(range(V), repeat=T):
        p[ids] = math.exp(-T * train_ar.loss(net, torch.tensor([ids])).item())

    truth, prior = normalized(p[0, :, 1, 0]), normalized(p[0].sum(axis=(1, 2)))
    ids = torch.tensor([[0, x, 1, 0] for x in range(V)])
    unshifted, no_bos = ((-net(inputs, ids).sum(dim=1)).softmax(dim=0) for inputs in (
        ids, torch.cat([0 * ids[:, :1], ids[:, :-1]], dim=1)))
    value = answer.fill_one(net, torch.tensor([0]), torch.tensor([1, 0]))
    compare("fill_one, the gap in 0 _ 1 0", value, truth, [
        (p[0, :, 1, 0], "divide by the sum over candidates: your probabilities do not add up to 1"),
        (prior, "this is p(x | left): the right side plays no part"),
        (normalized(truth / prior), "this is p(right | left, x) alone: p(x | left) is missing"),
        (normalized(p[0, :, 1].sum(axis=1)), "only the first token of the right side counts"),
        (normalized(truth ** (1 / T)),
         "you take the mean of the nats of a sequence. Its probability is exp(-sum)"),
        (normalized(1 / truth), "the sign is wrong: the likeliest token is the last of yours"),
        (unshifted, "the model reads what it predicts. It must read BOS, and all one token late"),
        (no_bos, "the sequences do not begin with BOS, whose id is V")])
    for before, after in (((), (1, 0, 2)), ((2, 2, 1), ())):
        sides = (torch.tensor(side, dtype=torch.long) for side in (before, after))
        compare(f"fill_one, {len(before)} tokens before the gap and {len(after)} behind it",
                answer.fill_one(net, *sides), normalized(p[(*before, slice(None), *after)]))


def check_long_text(answer):
    """Check fill_one with 400 tokens before the gap, and how many sequences it reads at once."""
    V, calls = 3, []
    net = tiny_model(V, 402, causal=True)

    def counted(inputs, targets):
        calls.append(len(targets))
        return net(inputs, targets)

    counted.config = net.config
    left = torch.randint(V, (400,), generator=torch.Generator().manual_seed(0))
    value = np.asarray(answer.fill_one(counted, left, torch.tensor([1])), dtype=float)
    check(np.isfinite(value).all(), "fill_one: with 400 tokens before the gap your probabilities "
          f"are {value}: exp(-nats) of a long sequence is 0. Take the softmax of -nats")
    check(calls == [V], f"fill_one: your model is called {len(calls)} times, with "
          f"{sum(calls)} sequences in all. Read the V = {V} candidates as one batch")


@torch.no_grad()
def test_e13(answer, reveal):
    check_short_gaps(answer)
    check_long_text(answer)
    text = speeches().astype(np.int64)
    net = study.counting.Bigram(normalized(np.bincount(text, minlength=256) + 1.0), text)
    ids = torch.from_numpy(text)
    bits_left, bits_both = [], []
    for i in np.linspace(1, len(text) - 2, 1000, dtype=int):
        before, gap, after = ids[i - 1:i], ids[i:i + 1], ids[i + 1:i + 2]
        bits_left.append(net(before[None], gap[None]).item() / math.log(2))
        bits_both.append(-math.log2(answer.fill_one(net, before, after)[gap]))
    reveal(np.mean(bits_left), np.mean(bits_both))


# ---- E14: close the gap.

# Budget in FLOPs -> the bits per byte to gain over plain MDM (width 32). --patch 8 alone gains
# 0.841 at 1e12 (pysrc, seed 0), and 0.999 at 2e10 (exercises/speeches.txt, seed 0); --ngram 6
# alone 0.802 and 0.050.
FLOORS = {1e12: 0.85, 2e10: 1.05}
PATCHES = 16                          # in a sequence, at least
PLAIN = {"width": 32, "batch_tokens": 512, "lr": 0.0015}


def read_runs(answer):
    """Return the result.json of BASELINE and BEST, checked to be comparable: two dicts."""
    results = {name: log.read_result(Path(getattr(answer, name))) for name in ("BASELINE", "BEST")}
    for name, result in results.items():
        check(result, f"{name}: no result.json in {getattr(answer, name)}: train both runs first")
        check(result["objective"] == "mdm", f"{name} is not a masked diffusion model")
        check(result["tokenizer"] == "byte",
              f"{name} does not read bytes: BPE is what the gap is measured from")
        check(result["context_bytes"] == 512,
              f"{name} reads another context than 512 bytes: a longer one alone lowers the loss")
        check(result["flops_budget"] in FLOORS,
              f"{name}: no floor is known for a budget of {result['flops_budget']:g} FLOPs")
    baseline, best = results.values()
    for key in ("flops_budget", "seed", "sha256"):
        of_best, of_baseline = ((result | result["corpus"])[key] for result in (best, baseline))
        check(of_best == of_baseline,
              f"BEST and BASELINE differ in {key}, {of_best} and {of_baseline}: train both alike")
    is_plain = not set(study.train.PLAIN) & set(baseline) and PLAIN.items() <= baseline.items()
    check(is_plain, f"BASELINE is not plain: it must have {PLAIN}, and no intervention")
    patch = best.get("patch", 1)
    check(PATCHES * patch <= 512, f"BEST has patches of {patch}. With fewer than {PATCHES} in a "
          "sequence it is nearly an AR model")
    return baseline, best


def shape_of(result, vocab_size, context, width):
    """Return a Config with the interventions of a run."""
    flags = {key: result[key] for key in study.train.PLAIN_MODEL if key in result}
    return study.variants.Config(vocab_size, context, width, causal=False, **flags)


def check_source(answer, best):
    """Check that no source of text costs less than its entropy, with a tiny model like BEST.

    The source: T tokens of two kinds, each repeated. So masked tokens tell of each other, and a
    loss that lets them is below the entropy. It takes training to profit from that.
    """
    T = max(8, 2 * best.get("patch", 1))
    repeats = max(2, T // 8)
    free = T // repeats
    source = torch.tensor(list(itertools.product((0, 1), repeat=free)))
    source = source.repeat_interleave(repeats, dim=1)                               # (2^free, T)
    torch.manual_seed(0)
    net = answer.MODEL(shape_of(best, 2, T, 32))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        batch = source[torch.randint(len(source), (64,), generator=generator)]
        answer.LOSS(net, batch, generator).backward()
        optimizer.step()
        optimizer.zero_grad()
    copies = source.repeat(2048 // len(source), 1).numpy()
    bits, error = answer.EVALUATE(net, copies, np.ones(2, dtype=int))
    cost = f"{T} tokens that hold {free} bits cost {T * bits:.2f} by your EVALUATE"
    check(T * bits > free - 4 * T * error - 0.01,
          f"this is no bound: {cost}. A prediction sees a masked token, its own or another")
    check(bits < 0.95, f"{cost}: nothing is learned. Does LOSS train for the same bound?")


@torch.no_grad()
def check_checkpoint(answer, best):
    """Check that the model of BEST has the loss and the FLOPs that its result tells."""
    saved = log.read_checkpoint(Path(answer.BEST) / "checkpoint.pt")
    net = answer.MODEL(shape_of(best, best["vocab_size"], 512, best["width"])).eval()
    net.load_state_dict(saved["model"])
    ids = torch.zeros(1, 512, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        net(ids, ids)
    spent = saved["log"]["step"] * best["batch_tokens"] * 3 * counter.get_total_flops() / 512
    check(spent <= 1.001 * best["flops_budget"],
          f"BEST has spent {spent:.4g} FLOPs: steps x tokens x what PyTorch's profiler counts")
    corpus = data.load(answer.DATA)
    check(corpus.meta["sha256"] == best["corpus"]["sha256"],
          f"BEST was trained on another text than DATA, {answer.DATA}: give what --data was")
    sequences = data.Sequences(corpus.val, 512).spaced(best["val_bytes"] // 512)
    bpb, _ = answer.EVALUATE(net, sequences, corpus.tokenizer.bytes_per_id)
    check(near(bpb, best["val_bpb"], 3e-3), f"the checkpoint of BEST has {bpb:.4f} bits per byte, "
          f"and its result says {best['val_bpb']:.4f}: has the code changed since?")


def marks():
    """Return what published runs of MDM on bytes gain at 1e12 FLOPs, as lines."""
    gains = []
    for row in csv.DictReader(open(ROOT / "results/remedies.csv")):
        key = row["objective"], row["tokenizer"], row["flops_budget"], row["context_bytes"]
        if key == ("mdm", "byte", "1000000000000.0", "512"):
            words = [f"{flag} {row[flag]}" for flag in ("width", *study.train.PLAIN, "lr")
                     if row.get(flag) not in (None, "", str(study.train.PLAIN.get(flag)))
                     and "span" not in flag]
            gains.append(f"{3.788 - float(row['val_bpb']):8.3f}  {', '.join(words)}")
    return ["marks to beat: gains of published runs at 1e12 FLOPs of pysrc", *sorted(gains)]


def test_e14(answer, reveal):
    baseline, best = read_runs(answer)
    check_source(answer, best)
    gain, floor = baseline["val_bpb"] - best["val_bpb"], FLOORS[best["flops_budget"]]
    check(gain > floor, f"BEST gains {gain:.3f} bits per byte, and the floor is {floor}, which "
          "neither patches of 8 nor tables of n-grams reach alone")
    check_checkpoint(answer, best)
    reveal(gain, lines=marks())
