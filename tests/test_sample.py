"""sample.py: samplers against exact distributions, scores against likelihoods, and the command."""
import itertools
import math
import os
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_one_line, here, randomize

import sample
import train_ar
from log import load_model
from model import Config, Transformer

MASK = "\u2591"


def random_model(causal, vocab_size=11, context=12):
    """Return a small model whose predictions are not uniform."""
    return randomize(Transformer(Config(vocab_size, context, 32, causal)), std=0.2)


def chi_squared(ids, probabilities):
    """Return the statistic of samples ids (n, positions) against a joint (V, V, ...)."""
    outcomes = np.ravel_multi_index(ids.numpy().T, probabilities.shape)
    expected = len(ids) * probabilities.ravel()
    counts = np.bincount(outcomes, minlength=len(expected))
    return ((counts - expected) ** 2 / expected).sum()


# ---- AR.

@torch.no_grad()
@pytest.mark.parametrize("prompt", [0, 1, 5, 11, 12, 30])
def test_generation_with_the_cache_sees_the_logits_of_the_whole_text(monkeypatch, prompt):
    """Also when the context is full and its second half is read again."""
    model, text = random_model(causal=True), torch.randint(11, (3, prompt))
    seen, queue = [], iter(torch.randint(11, (40, 3)))
    monkeypatch.setattr(sample, "pick", lambda logits: (seen.append(logits), next(queue))[1])
    bos = torch.full((3, 1), 11)
    for step, ids in enumerate(sample.generate(model, text.clone(), 40)):
        text = text if text.size(1) < 12 else text[:, -6:]
        uncached = model(torch.cat([bos, text], dim=1))[:, -1]
        torch.testing.assert_close(seen[step], uncached, atol=1e-4, rtol=0)
        text = torch.cat([text, ids[:, None]], dim=1)


@torch.no_grad()
def test_the_first_token_has_the_probabilities_of_the_model():
    model, prompt = random_model(causal=True), torch.tensor([[3, 1, 4]])
    exact = model(torch.tensor([[11, 3, 1, 4]]))[0, -1].softmax(dim=-1).numpy()
    ids, = sample.generate(model, prompt.expand(20_000, -1), 1)
    # 10 degrees of freedom: above 29.6 once in 1,000 times.
    assert chi_squared(ids[:, None], exact) < 29.6
    assert chi_squared(ids[:, None], np.roll(exact, 1)) > 100


def test_temperature_and_top_k_reshape_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])
    for options, exact in [({"temperature": 2.0}, (logits / 2).softmax(dim=0)),
                           ({"temperature": 0.5}, (logits / 0.5).softmax(dim=0)),
                           ({"top_k": 2}, torch.tensor([1, math.exp(-1), 0, 0, 0]) / 1.36788),
                           ({"temperature": 0}, torch.tensor([1.0, 0, 0, 0, 0]))]:
        ids = sample.pick(logits.expand(40_000, -1), **options)
        assert (torch.bincount(ids, minlength=5) / 40_000 - exact).abs().max() < 0.012


# ---- MDM.

def probabilities_of_filling(model, ids, masked):
    """Return the joint (V, V, ...) of the masked tokens of ids (1, T), filled one by one.

    It is the mean, over all orders, of the product of the model's conditionals.
    """
    V, positions = model.config.vocab_size, masked.nonzero()[:, 0].tolist()
    joint, orders = np.zeros([V] * len(positions)), list(itertools.permutations(positions))
    for x in itertools.product(range(V), repeat=len(positions)):
        for order in orders:
            text, p = ids.clone(), 1.0
            for i in order:
                token = x[positions.index(i)]
                p *= model(text)[0, i].softmax(dim=-1)[token].item()
                text[0, i] = token
            joint[x] += p / len(orders)
    return joint


@torch.no_grad()
@pytest.mark.parametrize("given, limit", [([3, 3, 3], 54), ([3, 1, 3], 26.1)])
def test_filling_one_token_a_step_is_exact(given, limit):
    """Limits: with 26 and 8 degrees of freedom, chi squared is above once in 1,000 times."""
    model, ids = random_model(causal=False, vocab_size=3, context=3), torch.tensor([given])
    masked = ids[0] == 3
    exact = probabilities_of_filling(model, ids, masked)
    *_, texts = sample.fill(model, ids.expand(20_000, -1), masked, 3)
    assert exact.sum() == pytest.approx(1) and chi_squared(texts[:, masked], exact) < limit
    assert (texts[:, ~masked] == ids[:, ~masked]).all()
    # All at once is another distribution.
    *_, texts = sample.fill(model, ids.expand(20_000, -1), masked, 1)
    assert chi_squared(texts[:, masked], exact) > 2 * limit


@pytest.mark.parametrize("order", ["random", "confident"])
@pytest.mark.parametrize("given, steps", [(0, 1), (5, 3), (5, 100), (11, 12)])
def test_each_step_fills_an_equal_share_and_keeps_the_rest(order, given, steps):
    model, ids = random_model(causal=False), torch.randint(11, (2, 12))
    masked = torch.arange(12) >= given
    texts = list(sample.fill(model, ids, masked, steps, order))
    left = [12 - given, *((text == 11).sum().item() / 2 for text in texts)]
    shares = -np.diff(left)
    assert len(texts) == min(steps, 12 - given) and left[-1] == 0
    assert shares.max() - shares.min() <= 1
    assert all(torch.equal(text[:, :given], ids[:, :given]) for text in texts)


@torch.no_grad()
def test_order_confident_fills_the_most_likely_token_first():
    model = random_model(causal=False)
    before, masked = torch.full((1, 12), 11), torch.ones(12, dtype=torch.bool)
    for after in sample.fill(model, before, masked, 12, "confident", temperature=0):
        best = model(before).softmax(dim=-1).amax(dim=-1).masked_fill(before != 11, 0)
        (_, position), = (after != before).nonzero().tolist()
        assert best[0, position] > best.max() - 1e-5
        before = after


# ---- Scores.

def test_scores_of_ar_add_up_to_the_bits_of_the_evaluation():
    model, ids = random_model(causal=True), torch.randint(11, (36,))
    bpb, _ = train_ar.evaluate(model, ids.view(3, 12).numpy(), np.ones(11, dtype=int))
    bits = sample.token_bits(model, ids)
    assert bits.mean().item() == pytest.approx(bpb, rel=1e-5)
    # The last sequence may be short.
    torch.testing.assert_close(sample.token_bits(model, ids[:29]), bits[:29])


@torch.no_grad()
def test_scores_of_mdm_are_the_parts_of_the_bound():
    """E over k, E over sets of k masked positions, of T / k times the nats of each masked one."""
    model, ids = random_model(causal=False, context=4), torch.randint(11, (4,))
    exact = torch.zeros(4)
    for k in range(1, 5):
        for masked in map(list, itertools.combinations(range(4), k)):
            inputs = ids.clone()
            inputs[masked] = 11
            nll = model(inputs[None], ids[None])[0, masked]
            exact[masked] += nll / math.log(2) / k / math.comb(4, k)
    bits = sample.token_bits(model, ids, masks=4000)
    assert (bits / exact - 1).abs().max() < 0.1
    assert bits.sum().item() == pytest.approx(exact.sum().item(), rel=0.02)


def test_what_is_shown_cannot_command_the_terminal():
    shown = sample.printable("a\x1b[2J\x00\n\t\x9b\x7f\r\u2028")
    assert shown == "a\ufffd[2J\ufffd\n\t\ufffd\ufffd\ufffd\ufffd"


def test_a_character_has_the_mean_surprisal_of_its_bytes():
    raw = "aé\x1b\n".encode() + b"\xff\xe2\x82b"
    shaded = sample.shade([bytes([byte]) for byte in raw], np.arange(float(len(raw))))
    parts = re.findall(r"\x1b\[30;48;2;255;(\d+);\1m([^\x1b]*)", shaded)
    assert parts == [("255", "a"), ("207", "é"), ("159", "\ufffd"), ("128", ""), ("96", "\ufffd"),
                     ("32", "\ufffdb")]
    assert shaded.count("\n") == 1 and shaded.endswith("\x1b[0m")


# ---- The command.

@pytest.fixture(scope="module")
def folder(tmp_path_factory, source_text):
    """Return a folder with four tiny trained runs, MDM on bytes the newest."""
    folder = tmp_path_factory.mktemp("sample")
    (folder / "text.txt").write_bytes(source_text[:100_000])
    for tokenizer, objective in itertools.product(("bpe", "byte"), ("ar", "mdm")):
        done = here(folder, f"train_{objective}.py", "--data", "text.txt", "--vocab", 300,
                    "--flops", 1e9, "--width", 16, "--context", 64, "--tokenizer", tokenizer,
                    "--out", f"runs/{objective}-{tokenizer}")
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def call(folder):
    """Return a function that runs sample.py and returns its stdout, or its one line of error."""
    def call(*arguments):
        done = here(folder, "sample.py", *arguments)
        if done.returncode:
            assert_one_line(done)
        return done.stdout or done.stderr
    return call


def test_the_newest_finished_run_writes(folder, call):
    (folder / "runs/unfinished").mkdir()
    text = call("--prompt", "import ")
    assert text.startswith("import ") and len(text) > 20
    assert text == call("runs/mdm-byte", "--prompt", "import ")
    assert text != call("runs/mdm-byte", "--prompt", "import ", "--seed", 1)


@pytest.mark.parametrize("name", ["ar-byte", "ar-bpe", "mdm-byte", "mdm-bpe"])
def test_texts_begin_with_any_prompt(call, name):
    invalid = b"\xff\x00\x1b\x80".decode("utf-8", "surrogateescape")
    for prompt in ("", "x", "é" * 10, invalid * 5, r"two\nlines"):
        raw = prompt.replace(r"\n", "\n").encode("utf-8", "surrogateescape")
        shown = sample.printable(raw.decode("utf-8", "replace"))
        text = call(f"runs/{name}", "--prompt", prompt, "--length", 9)
        assert text.startswith(shown[:-1]) and MASK not in text and len(text) > len(shown)
    assert call(f"runs/{name}", "--samples", 3, "--length", 9).count("--- sample") == 3


@pytest.mark.parametrize("order", ["random", "confident"])
@pytest.mark.parametrize("name", ["mdm-byte", "mdm-bpe"])
def test_infilling_keeps_the_given_text(call, name, order):
    text = call(f"runs/{name}", "--infill", r"f(é)\n    x = ____ # ___.", "--order", order)
    assert text.startswith("f(é)\n    x = ") and " # " in text and text.endswith(".\n")
    assert "___" not in text and MASK not in text


def test_the_text_is_shown_as_it_is_filled(call, monkeypatch):
    monkeypatch.setattr(sample.time, "sleep", lambda seconds: None)
    frames = call("runs/mdm-byte", "--watch", "--steps", 4).split("\x1b[H\x1b[2J")[1:]
    assert [frame.count(MASK) for frame in frames] == [48, 32, 16, 0]


def test_any_file_is_scored(folder, call, monkeypatch):
    (folder / "some.txt").write_bytes((folder / "text.txt").read_bytes()[:1000] + b"\xff\x00\n")
    line = call("runs/ar-byte", "--score", "some.txt")
    assert 2 < float(line.split(" bits per byte (exact")[0]) < 8
    assert line.endswith("on 1,003 bytes\n")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=open(folder / "some.txt", "rb")))
    assert call("runs/ar-byte", "--score", "-") == line
    bound = call("runs/mdm-bpe", "--score", "some.txt")
    assert "bound" in bound and 2 < float(bound.split()[0]) < 9


def test_a_terminal_shows_the_text_shaded_by_its_surprisal(folder, monkeypatch, capsys):
    (folder / "some.txt").write_text("naïve = [1, 2]\n")
    model, _, tokenizer = load_model(folder / "runs/ar-bpe")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    args = SimpleNamespace(score=folder / "some.txt", device="cpu", run="runs/ar-bpe")
    sample.score(model, tokenizer, args)
    shaded, _, line = capsys.readouterr().out.rpartition("\n\x1b[0m\n")
    assert re.sub(r"\x1b\[[\d;]*m", "", shaded) == "naïve = [1, 2]" and "exact" in line


@pytest.mark.parametrize("word, arguments", [
    ("nowhere", ["nowhere"]), ("nothing to score", ["--score", "empty.txt"]),
    ("runs", ["--score", "runs"]), ("no.txt", ["--score", "no.txt"]),
    ("temperature", ["--temperature", "-1"]), ("temperature", ["--temperature", "nan"]),
    ("temperature", ["--temperature", "x"]), ("length", ["--length", 0]),
    ("context", ["--length", 65]), ("steps", ["--steps", 0]), ("top-k", ["--top-k", -1]),
    ("order", ["--order", "x"]), ("device", ["--device", "x"]),
    ("AR", ["runs/ar-byte", "--infill", "a___"]), ("gap", ["--infill", "a"]),
    ("--prompt", ["--infill", "a___", "--prompt", "b"]), ("context", ["--infill", "_" * 65])])
def test_bad_input_is_one_line(folder, call, word, arguments):
    (folder / "empty.txt").write_bytes(b"")
    assert word in call(*arguments)


class Code:
    """Something that runs when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def changed(folder, name, change):
    """Return the name of a copy of a run, its checkpoint changed by change(checkpoint)."""
    shutil.copytree(folder / "runs" / name, folder / "changed", dirs_exist_ok=True)
    checkpoint = torch.load(folder / "changed/checkpoint.pt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, folder / "changed/checkpoint.pt")
    return "changed"


def test_a_damaged_or_foreign_checkpoint_is_refused_and_runs_no_code(folder, call):
    for change in (lambda saved: saved.update(settings=Code()),
                   lambda saved: saved.pop("merges"),
                   lambda saved: saved["model"].pop("head.weight")):
        assert "damaged, or of another program" in call(changed(folder, "ar-byte", change))
    assert not (folder / "it-ran").exists()
    path = folder / "changed/checkpoint.pt"
    whole = (folder / "runs/ar-byte/checkpoint.pt").read_bytes()
    middle = len(whole) // 2
    for content in (whole[:middle], whole[:middle] + b"flipped" + whole[middle + 7:], b""):
        path.write_bytes(content)
        assert "damaged, or of another program" in call("changed")
    (folder / "changed/result.json").write_text("[]")
    assert "result.json is damaged" in call("changed")
    (folder / "changed/result.json").unlink()
    assert "no finished run" in call("changed")
