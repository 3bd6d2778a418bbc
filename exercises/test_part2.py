"""The tests of E4, E5, E6, E9 and E10."""
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import model
import train_ar
import train_mdm

SPEECHES = Path(__file__).with_name("speeches.txt")


def check(condition, message):
    """Fail with one message, and no traceback."""
    if not condition:
        pytest.fail(message, pytrace=False)


def near(value, truth, relative=1e-6):
    """Return whether two numbers or arrays are of one shape and equal but for rounding."""
    value, truth = np.asarray(value, dtype=float), np.asarray(truth, dtype=float)
    return value.shape == truth.shape and np.allclose(value, truth, rtol=relative, atol=1e-9)


def compare(where, found, truth, mistakes=(), relative=1e-6):
    """Fail if found is not the truth, a number or an array. where: the function and the case.

    mistakes: (what a mistake would give, what to say of it). The first that found equals is named.
    """
    if near(found, truth, relative):
        return
    for wrong, message in mistakes:
        check(not near(found, wrong, relative), f"{where}: {message}")
    numbers = (np.array2string(np.asarray(x, dtype=float), precision=5) for x in (found, truth))
    check(False, "{}: your value is {} and not {}".format(where, *numbers))


def subsets(T):
    """Return all sets of positions but the empty one, as tuples in rising order."""
    return [S for k in range(1, T + 1) for S in itertools.combinations(range(T), k)]


def marginal(p, x, positions):
    """Return the probability of the tokens of x at these positions."""
    others = tuple(i for i in range(p.ndim) if i not in positions)
    return p.sum(axis=others)[tuple(x[i] for i in sorted(positions))]


def cost(p, x, group, known):
    """Return -log2 p(x at group | x at known)."""
    return -math.log2(marginal(p, x, {*group, *known}) / marginal(p, x, set(known)))


# -----------------------------------------------------------------------------------------------
# E4: the bound, a loss that is no bound, and noise.

def test_e04(answer, reveal):
    rng = np.random.default_rng(4)
    points, du = np.polynomial.legendre.leggauss(16)
    t, dt = (points + 1) / 2, du / 2
    for T in (1, 2, 3, 5):
        nll = {S: rng.uniform(1, 9) for S in subsets(T)}
        # By the definition: the integral over t.
        truth = sum((dt / t * t**len(S) * (1 - t)**(T - len(S))).sum() * nll[S] for S in nll)
        alike = sum(T / len(S) * nll[S] for S in nll)
        unweighted = [np.mean([nll[S] for S in nll if len(S) == k]) for k in range(1, T + 1)]
        all_alike = ("all sets S count alike. But k is even over 1 .. T, so all the sets of k "
                     "positions share a chance of 1 / T")
        compare(f"bound, with random costs nll of {T} tokens", answer.bound(nll.__getitem__, T),
                truth, [
            (alike / len(nll), all_alike),
            (alike / 2**T, all_alike),
            (truth / T, "this is the bound per token. That of the sequence is T times as much"),
            (np.mean(unweighted), "the masks are not weighed. The k masked tokens must stand for "
                                  "all T of them")])

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
                (jointly, "the masked tokens are predicted jointly")])
            compare(f"{where}, jointly", answer.masked_nll(p, x, S, True), jointly, [
                (cost(p, x, S, ()), "the joint prediction does not read the visible tokens"),
                (alone, "each masked token is predicted by itself")])

    n = 50_000
    for T, smallest in ((4, 0.1), (512, 0.001)):
        found = answer.estimates(T, n, smallest, torch.Generator().manual_seed(4)).double()
        check(found.shape == (n,), f"estimates: the shape is {tuple(found.shape)} and not (n,)")
        where = f"estimates, T = {T}, t from {smallest}"
        # Given t the variance is (1 - t) / (t T).
        spread = math.sqrt((-math.log(smallest) / (1 - smallest) - 1) / T)
        mean, std = found.mean().item(), found.std().item()
        check(std > 1e-6, f"{where}: there is no noise at all. So is the weight by count, T / k. "
              "Here it is 1/t")
        check(abs(mean - 1) < 0.05, f"{where}: the mean is {mean:.3f} and not 1")
        check(std > 0.7 * spread,
              f"{where}: the spread is {std:.4f} and not {spread:.4f}. Is the masked share just t? "
              "Each token is masked by itself, so their number is random")
        check(found.max() < 1.001 / smallest,
              f"{where}: one is {found.max():.1f}, above 1 / {smallest}. So t gets too small")
        check(std < 1.15 * spread, f"{where}: the spread is {std:.4f} and not {spread:.4f}")
        check(abs(mean - 1) < 5 * spread / math.sqrt(n), f"{where}: the mean is {mean:.4f}, which "
              "is too far from 1 to be chance")

    # Two fair bits that are always equal.
    p = np.diag([0.5, 0.5])
    joint = answer.bound(lambda S: answer.masked_nll(p, (0, 0), S, True), 2)
    ids = torch.zeros(2000, 512, dtype=torch.long)
    by_count = train_mdm.corrupt(ids, 256, torch.Generator().manual_seed(4))[1].sum(dim=1) / 512
    reveal({"(b) two equal fair bits, predicted jointly: the loss in bits": float(joint),
            "(c) T = 512, weight 1/t: standard deviation, in percent": 100 * spread,
            "(c) T = 512, weights of corrupt: standard deviation, in percent":
                round(100 * by_count.double().std().item(), 4)})


# -----------------------------------------------------------------------------------------------
# E5: schedules.

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
            (np.diff(edges**p), "the rate u^p takes the place of its inverse. Between which two "
                                "times u are k tokens masked?")])

    rng = np.random.default_rng(5)
    for T, p in ((2, 1), (2, 2), (3, 0.5)):
        P = np.diff((np.arange(T + 1) / T) ** (1 / p))
        values = {S: rng.uniform(1, 3, size=2) for S in subsets(T)}
        mean, noise = answer.mean_and_noise(values, P)
        truth, square = estimate(values, P)
        where = f"mean_and_noise, T = {T}, p = {p}"
        linear = T / np.arange(1, T + 1)
        compare(f"{where}, the mean", mean, truth, [
            (estimate(values, P, weight=lambda k, linear=linear: linear[k - 1])[0],
             "every k is weighed by T / k. That is right for p = 1 only: what another schedule "
             "draws more often, it must weigh less"),
            (estimate(values, P, weight=lambda k: 1)[0], "there is no weight"),
            (estimate(values, P, shared=False)[0],
             "every mask has the probability P(k). But all the masks of k tokens share it")])
        compare(f"{where}, the noise", noise, square - (truth**2).sum(), [
            (square, "this is the mean square. The variance is less")])

    T = 6
    costs, gradients = of_all_masks(T)
    found = {p: answer.probabilities(T, p) for p in (0.5, 1, 2)}
    inverse = train_mdm.SCHEDULES["bell"][1]
    found["bell"] = np.diff(inverse(torch.arange(T + 1, dtype=torch.float64) / T).numpy())
    bounds = {p: answer.mean_and_noise(costs, P)[0][0] for p, P in found.items()}
    noise = {p: answer.mean_and_noise(gradients, P)[1] for p, P in found.items()}
    reveal({"bound, p = 2 / p = 1": bounds[2] / bounds[1],
            "gradient noise, p = 0.5 / p = 1": noise[0.5] / noise[1],
            "gradient noise, bell / p = 1": noise["bell"] / noise[1]})


# -----------------------------------------------------------------------------------------------
# E6: muP.

WIDTHS = (32, 64, 128, 256)
GROUPS = ("matrices", "head", "embeddings", "others")
# Under muP a place moves by the same amount at all widths, but for the chance of initialization.
SPREAD = 1.8


def small_model(width, factors):
    """Return a new model, its optimizer with these factors of a small rate, and a batch."""
    torch.manual_seed(6)
    net = model.Transformer(model.Config(256, 64, width))
    optimizer = model.make_optimizer(net)
    for group, name in zip(optimizer.param_groups, GROUPS, strict=True):
        group["lr"] = 0.0003 * factors[name]
    text = np.frombuffer(SPEECHES.read_bytes(), dtype=np.uint8)
    ids = torch.from_numpy(data.Sequences(text, 64).batch(0, 0, 8))
    inputs, _ = train_ar.corrupt(ids, 256)
    return net, optimizer, inputs, ids


@torch.no_grad()
def places(net, inputs):
    return {"embedding": net.embedding(inputs), "trunk": net.read(inputs), "logits": net(inputs)}


def move(width, factors, steps=5, cleared=True):
    """Return the places of a small model before and after training."""
    net, optimizer, inputs, ids = small_model(width, factors)
    before = places(net, inputs)
    for _ in range(steps):
        net(inputs, ids).mean().backward()
        optimizer.step()
        if cleared:
            optimizer.zero_grad()
    return before, places(net, inputs)


def rms(x):
    return x.square().mean().sqrt().item()


def moved(before, after):
    return {place: rms(after[place] - before[place]) for place in before}


def test_e06(answer, reveal):
    tuned = {"matrices": 1, "head": 10, "embeddings": 10, "others": 1}
    # The head is zero at first, so that the first step moves little but the logits.
    for steps in (2, 4):
        found = answer.movement(*small_model(32, tuned), steps)
        before, after = move(32, tuned, steps)
        kept = moved(*move(32, tuned, steps, cleared=False))
        for place, truth in moved(before, after).items():
            compare(f"movement, {steps} steps, the {place}", found[place], truth, [
                (rms(after[place]) - rms(before[place]),
                 "this is the change of the root mean square. Numbers can move and keep their "
                 "size: take the root mean square of the change"),
                (kept[place], "the gradients of earlier steps are still there. Each step needs its "
                              "own gradient")], relative=0.01)

    found = {name: float(answer.scales(64)[name]) for name in GROUPS}
    check(found == tuned, f"scales: at width 64 they are {tuned}, and yours are {found}")
    table = {width: moved(*move(width, answer.scales(width))) for width in WIDTHS}
    causes = {
        "embedding": "An embedding is looked up: one row is the whole output, and no sum over the "
                     "width is made",
        "trunk": "The matrices are the cause: each number of their output sums over the width, and "
                 "all the moved weights add up",
        "logits": "The embeddings and the trunk are right, so it is the head: it sums over the "
                  "width, too"}
    for place, cause in causes.items():
        row = [table[width][place] for width in WIDTHS]
        numbers = ", ".join(f"{value:.3f}" for value in row)
        check(max(row) < SPREAD * min(row),
              f"scales: at widths 32, 64, 128, 256 the {place} moved by {numbers}. {cause}")
    one_rate = {width: moved(*move(width, tuned))["logits"] for width in (32, 256)}
    reveal({"one rate for all: movement of the logits, width 256 / width 32":
                one_rate[256] / one_rate[32],
            "your scales: movement of the logits, width 256 / width 32":
                table[256]["logits"] / table[32]["logits"]})


# -----------------------------------------------------------------------------------------------
# E9: contiguity.

def entropy_of(ids):
    count = np.unique(ids, return_counts=True)[1]
    return math.log2(len(ids)) - (count * np.log2(count)).sum() / len(ids)


def pairs_of(ids):
    return ids[:-1].astype(np.int64) * 256 + ids[1:]


def test_e09(answer, reveal):
    text = np.frombuffer(SPEECHES.read_bytes(), dtype=np.uint8)
    text = text[:len(text) // 512 * 512]

    def shuffled(block):
        # As Sequences does it, and all of the text.
        sequences = data.Sequences(text, 512, block)
        return sequences.stream[np.arange(0, len(text), 512)[:, None] + sequences.order].ravel()

    for block in (1, 2, 4, 8, 64, 512):
        given = shuffled(block)
        found = np.asarray(answer.unshuffle(given, block))
        order = data.permutation(block)
        again = given.reshape(-1, block)[:, order].ravel()
        check(not np.array_equal(found, again) or np.array_equal(again, text),
              f"unshuffle: the same permutation is applied once more (blocks of {block}). This "
              "undoes a swap, and no longer permutation. It needs the inverse")
        check(np.array_equal(found, text), f"unshuffle: blocks of {block} are not as they were")

    # Short texts first.
    for ids in (np.array([0, 1, 2, 3]), np.array([0, 1, 0, 1, 0, 2, 0, 1, 1, 0]), text[:5000]):
        truth = entropy_of(ids)
        compare(f"unigram_bits of {len(ids)} tokens", answer.unigram_bits(ids), truth, [
            (truth * math.log(2), "this is in nats. Bits need the logarithm to the base 2")])
        pairs = pairs_of(ids)
        joint = entropy_of(pairs)
        compare(f"bigram_bits of {len(ids)} tokens", answer.bigram_bits(ids),
                joint - entropy_of(ids[:-1]), [
            (joint, "this is the entropy of a pair. What the first token costs is to be taken "
                    "away"),
            (entropy_of(pairs[::2]) - entropy_of(ids[:-1:2]),
             "every other pair is left out. A token is the second of one pair and the first of "
             "the next")])

    def told(block):
        given = shuffled(block)
        return answer.unigram_bits(given) - answer.bigram_bits(given)
    growth = answer.unigram_bits(shuffled(64)) - answer.unigram_bits(text)
    reveal({"how much the unigram bits grow in blocks of 64, in bits per byte": float(growth),
            "what the byte before still tells in blocks of 2, in percent":
                float(100 * told(2) / told(1)),
            "what the byte before still tells in blocks of 512, in percent":
                float(100 * told(512) / told(1))})


# -----------------------------------------------------------------------------------------------
# E10: spans and patches.

def markov_chain(T, change=0.1):
    """Return the probabilities of T bits: each next one differs with probability change."""
    p = np.full((2,) * T, 0.5)
    for x in itertools.product((0, 1), repeat=T):
        p[x] *= math.prod(change if a != b else 1 - change for a, b in itertools.pairwise(x))
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


def test_e10(answer, reveal):
    rng = np.random.default_rng(10)
    for T, V in ((1, 2), (2, 2), (3, 3)):
        p = rng.dirichlet(np.ones(V**T)).reshape((V,) * T)
        for positions in (set(), *map(set, subsets(T))):
            truth = entropy_at(p, positions)
            compare(f"entropy, T = {T}, V = {V}, positions {positions or '{}'}",
                    answer.entropy(p, positions), truth, [
                (truth * math.log(2), "this is in nats. Bits need the logarithm to the base 2"),
                (sum(entropy_at(p, {i}) for i in positions),
                 "the entropies of single tokens are added up. Tokens depend on each other")])

    readings = {
        "visible": lambda visible, before, inside: visible,
        "in its span": lambda visible, before, inside: visible | inside,
        "in all spans": lambda visible, before, inside: visible | before,
        "nothing": lambda visible, before, inside: set(),
        "span only": lambda visible, before, inside: inside}
    for T, span in ((1, 1), (2, 1), (2, 2), (4, 2), (6, 1), (6, 2), (6, 3)):
        p = markov_chain(T)
        bound = {name: span_bound(p, span, given) for name, given in readings.items()}
        for left_to_right in (False, True):
            truth = bound["in its span" if left_to_right else "visible"]
            other = bound["visible" if left_to_right else "in its span"]
            compare(f"expected_bound, T = {T}, span = {span}, left_to_right = {left_to_right}",
                    answer.expected_bound(p, span, left_to_right), truth, [
                (span * truth, "the weight is T / k. But k counts spans, and there are R of them"),
                (truth * span / T, "the weight is 1 / k. This is the bound of one span, not of a "
                                   "sequence"),
                (other, "left_to_right is not used, or taken for its opposite"),
                (bound["in all spans"], "masked spans read each other. This loss is below the "
                 f"entropy of the sequence, {bound['in its span']:.3f} bits: no code can do that"),
                (bound["span only"], "a masked token reads those before it in its span, in place "
                                     "of the visible ones. Both are given"),
                (bound["nothing"], "the visible tokens are not read")])

    p = markov_chain(6)
    above = {(span, order): round(answer.expected_bound(p, span, order) - entropy_at(p, range(6)),
                                  9) + 0.0 for span, order in ((1, False), (2, False), (2, True))}
    reveal({"single tokens masked: bits above the entropy of 3.345": above[1, False],
            "spans of 2, each token by itself: bits above the entropy": above[2, False],
            "spans of 2, from left to right inside: bits above the entropy": above[2, True]})
