"""sample.py: the cache against none, samplers against exact distributions, the commands on models trained on real text."""
import contextlib
import itertools
import math
import os
import pty
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import model
import sample
import surprise
import train_ar
from conftest import assert_one_line, command, environment, execute, here
from test_model import lively


def net(causal, vocab_size=11, context=12):
    return lively(model.Config(vocab_size, context, width=32, causal=causal)).eval()


# ---------------------------------------------------------------------------------------------------------------------
# AR.

@torch.no_grad()
@pytest.mark.parametrize("prompt", [0, 1, 5, 11, 12, 30])
def test_cached_logits_are_the_uncached_ones(monkeypatch, prompt):
    """At every length, and after the window has moved on; the next ids are fixed, so that both read the same text."""
    ar, ids, next_ids = net(causal=True), torch.randint(11, (3, prompt)), torch.randint(11, (40, 3))
    seen = {}
    for cached in (True, False):
        seen[cached], queue = [], iter(next_ids)
        monkeypatch.setattr(sample, "pick", lambda logits, **how: (seen[cached].append(logits), next(queue))[1])
        written = torch.stack(list(sample.generate(ar, ids, 40, cached)))
        assert torch.equal(written, next_ids)
    for a, b in zip(seen[True], seen[False], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@torch.no_grad()
def test_temperature_zero_is_argmax_decoding():
    """Also across windows: what is read is START and the text since the window began, whose first half is dropped when it is full."""
    ar, prompt = net(causal=True), torch.randint(11, (2, 5))
    written = torch.stack(list(sample.generate(ar, prompt, 30, temperature=0)), dim=1)
    for row, ids in zip(prompt.tolist(), written.tolist()):
        text = list(row)
        for found in ids:
            if len(text) == 12:
                text = text[6:]
            text.append(ar(torch.tensor([[11, *text]]))[0, -1].argmax().item())
            assert text[-1] == found
    again = torch.stack(list(sample.generate(ar, prompt, 30, temperature=0)), dim=1)
    assert torch.equal(written, again)


def test_sampling_is_of_the_distribution_that_was_asked_for():
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])
    draw = lambda **how: torch.bincount(sample.pick(logits.expand(40_000, -1), generator=torch.Generator().manual_seed(0), **how), minlength=5) / 40_000
    for temperature in (0.5, 1.0, 2.0):
        assert (draw(temperature=temperature) - (logits / temperature).softmax(dim=0)).abs().max() < 0.012
    assert (draw(top_k=2)[2:] == 0).all() and draw(top_k=2)[0].item() == pytest.approx(1 / (1 + math.exp(-1)), abs=0.012)
    p = logits.softmax(dim=0)
    for top_p in (0.01, p[0].item() + 0.01, p[:2].sum().item() + 0.01, 0.999):
        kept = next(n for n in range(1, 6) if p[:n].sum() >= top_p)
        found = draw(top_p=top_p)
        assert (found[:kept] > 0).all() and (found[kept:] == 0).all()
    assert draw(temperature=0)[0] == 1


# ---------------------------------------------------------------------------------------------------------------------
# MDM.

class TwoTokens:
    """Hand-made conditionals of two tokens of three kinds, which no one joint distribution has."""
    config = types.SimpleNamespace(vocab_size=3, context=2)

    def __init__(self):
        rng = np.random.default_rng(0)
        self.alone = rng.dirichlet(np.ones(3), size=2)        # p(x_i), both masked
        self.given = rng.dirichlet(np.ones(3), size=(2, 3))   # p(x_i | the other)

    def __call__(self, ids):
        p = np.stack([[self.alone[i] if row[1 - i] == 3 else self.given[i, row[1 - i]] for i in range(2)] for row in ids.numpy()])
        return torch.from_numpy(np.log(p))


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_ancestral_sampling_has_its_exact_joint(steps):
    """One token a step: half of the time each comes first. One step: both at once, independent of each other. Chi-squared."""
    two, count = TwoTokens(), 9000
    *_, ids = sample.fill(two, torch.full((count, 2), 3), torch.tensor([True, True]), steps, generator=torch.Generator().manual_seed(0))
    found = np.bincount(ids[:, 0] * 3 + ids[:, 1], minlength=9)
    a, b = two.alone
    exact = np.array([[a[x] * b[y] if steps == 1 else (a[x] * two.given[1, x, y] + b[y] * two.given[0, y, x]) / 2 for y in range(3)] for x in range(3)])
    chi_squared = ((found - count * exact.ravel()) ** 2 / (count * exact.ravel())).sum()
    assert exact.sum() == pytest.approx(1) and chi_squared < 27.9                                   # 8 degrees of freedom: 1 in 2,000 by chance
    wrong = np.outer(a, b) if steps > 1 else (a[:, None] * two.given[1] + b * two.given[0].T) / 2
    assert ((found - count * wrong.ravel()) ** 2 / (count * wrong.ravel())).sum() > 100           # and it tells the two apart


@pytest.mark.parametrize("order", ["random", "confident", "blocks"])
@pytest.mark.parametrize("steps", [1, 3, 12, 100])
@pytest.mark.parametrize("prompt, length", [(0, 12), (5, 7), (5, 3), (12, 5), (30, 20), (0, 40)])
def test_every_sampler_ends_without_a_mask_and_keeps_its_prompt(order, steps, prompt, length):
    mdm, ids = net(causal=False), torch.randint(11, (2, prompt))
    texts = list(sample.diffuse(mdm, ids, length, steps, order, block=4, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(text[:, :prompt], ids) and text.shape == (2, prompt + length) for text in texts)
    masks = [(text == 11).sum().item() for text in texts]
    assert masks == sorted(masks, reverse=True) and masks[-1] == 0
    if prompt + length <= 12 and order != "blocks":
        assert len(texts) == min(steps, length)


@pytest.mark.parametrize("order", ["random", "confident"])
def test_filling_changes_what_is_masked_alone(order):
    mdm, ids = net(causal=False), torch.randint(11, (4, 12))
    masked = torch.tensor([0, 1, 1, 0, 0, 0, 1, 0, 1, 1, 1, 0]) > 0
    ids[:, 11] = 11                                           # a MASK that is not to be filled, as behind the end of a text
    for filled in sample.fill(mdm, ids, masked, 4, order, generator=torch.Generator().manual_seed(0)):
        assert torch.equal(filled[:, ~masked], ids[:, ~masked])
    assert (filled[:, masked] < 11).all()
    assert list(sample.fill(mdm, ids, masked & False, 4)) == []


def test_the_confident_come_first():
    """Greedy, in as many steps as places: each time the place whose best token is the most likely of all."""
    mdm = net(causal=False)
    before = torch.full((1, 12), 11)
    with torch.no_grad():
        for after in sample.fill(mdm, before, torch.ones(12, dtype=torch.bool), 12, "confident", temperature=0):
            best = torch.where(before == 11, mdm(before).softmax(dim=-1).max(dim=-1).values, 0)
            (_, place), = (after != before).nonzero().tolist()
            assert best[0, place] >= best.max() - 1e-5        # the first are all alike, but for rounding
            before = after


# ---------------------------------------------------------------------------------------------------------------------
# Surprise.

def test_surprise_of_ar_is_the_likelihood():
    ar, ids = net(causal=True), torch.randint(11, (36,))
    bpb, _ = train_ar.evaluate(ar, ids.view(3, 12).numpy(), np.ones(11, dtype=int))
    assert surprise.token_bits(ar, "ar", ids).mean().item() == pytest.approx(bpb, rel=1e-5)
    short = surprise.token_bits(ar, "ar", ids[:29])               # a last window that is not full
    assert len(short) == 29 and short[:24].sum() == pytest.approx(surprise.token_bits(ar, "ar", ids)[:24].sum())


@torch.no_grad()
def test_surprise_of_mdm_is_its_share_of_the_bound():
    """E over k of E over sets of k masked places of T / k times the nats of one of them, place by place."""
    mdm, ids = net(causal=False, context=5), torch.randint(11, (5,))
    exact = torch.zeros(5)
    for k in range(1, 6):
        sets = list(itertools.combinations(range(5), k))
        for places in map(list, sets):
            inputs = ids.clone()
            inputs[places] = 11
            exact[places] += model.nats(mdm, inputs[None], ids[None])[0, places] / math.log(2) / k / len(sets)
    found = surprise.token_bits(mdm, "mdm", ids, reads=5000)
    assert (found / exact - 1).abs().max() < 0.12 and found.sum().item() == pytest.approx(exact.sum().item(), rel=0.03)


def test_bytes_and_characters():
    raw = "aé€😀".encode() + b"\xff\xe2\x82b"
    found = list(surprise.characters(raw))
    assert "".join(c for c, _ in found) == "aé€😀\ufffd\ufffd\ufffdb" and [at.stop - at.start for _, at in found] == [1, 2, 3, 4, 1, 1, 1, 1]
    assert surprise.printable("a\x1b[2J\x00\n\t\x9b") == "a\u241b[2J\u2400\n\t\u2421"


# ---------------------------------------------------------------------------------------------------------------------
# The commands.

@pytest.fixture(scope="module")
def trained(workplace):
    """Four small runs, MDM on bytes the newest."""
    for objective, tokenizer in itertools.product(("ar", "mdm"), ("bpe", "byte")):
        done = here(workplace, f"train_{objective}.py", "--data", "text.txt", "--vocab", 300, "--context", 64, "--width", 16, "--flops", "2e9",
                       "--tokenizer", tokenizer, "--out", f"runs/{objective}-{tokenizer}")
        assert done.returncode == 0, done.stderr
    return workplace


@pytest.fixture
def call(trained):
    """sample.py: -> its stdout, or the one line on stderr."""
    def run_it(*arguments):
        done = here(trained, "sample.py", *arguments)
        if done.returncode:
            assert_one_line(done)
        return done.stdout or done.stderr
    return run_it


def test_the_newest_run_writes(trained):
    done = execute(trained, "sample.py", "--prompt", "import ")
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("import ") and len(done.stdout.encode()) >= 64
    same = execute(trained, "sample.py", "runs/mdm-byte", "--prompt", "import ")
    assert same.stdout == done.stdout                         # MDM on bytes is the newest; the same seed, the same text


@pytest.mark.parametrize("kind", ["ar-byte", "ar-bpe", "mdm-byte", "mdm-bpe"])
def test_prompts_of_all_kinds(call, kind):
    for prompt in ("", "x", "é" * 100, b"\xff\x00\x1b\x80".decode("utf-8", "surrogateescape") * 5, "long enough to fill two windows and more " * 6):
        text = call(f"runs/{kind}", "--prompt", prompt, "--length", 20, "--steps", 5)
        shown = surprise.printable(sample.raw_text(prompt).decode("utf-8", "replace"))
        assert text.startswith(shown[:-1]) and "\u2591" not in text and len(text) > len(shown)
    texts = call(f"runs/{kind}", "--samples", 3, "--length", 90, "--temperature", 0.7, "--top-k", 20, "--top-p", 0.9)
    assert texts.count("--- sample ") == 3
    assert texts == call(f"runs/{kind}", "--samples", 3, "--length", 90, "--temperature", 0.7, "--top-k", 20, "--top-p", 0.9)
    assert texts != call(f"runs/{kind}", "--samples", 3, "--length", 90, "--temperature", 0.7, "--top-k", 20, "--top-p", 0.9, "--seed", 1)


@pytest.mark.parametrize("order", ["random", "confident", "blocks"])
def test_orders_and_steps(call, order):
    for steps in (1, 7, 64):
        assert "\u2591" not in call("runs/mdm-byte", "--order", order, "--steps", steps, "--order-temperature", 0.5)


def test_characters_are_written_whole(trained, call, monkeypatch):
    """Bytes that are no character yet wait for the others."""
    text, written = "aé€😀b", []
    monkeypatch.setattr(sample, "generate", lambda *_, **__: (torch.tensor([byte]) for byte in text.encode() + b"\xe2\x82"))
    monkeypatch.setattr("builtins.print", lambda *words, **_: written.append(words[0]))
    call("runs/ar-byte")
    assert [word for word in written if word] == [*text, "\ufffd"]


@pytest.mark.parametrize("kind", ["mdm-byte", "mdm-bpe"])
def test_infilling_keeps_every_given_byte(call, kind):
    text = call(f"runs/{kind}", "--infill", r"def add(a, b):\n    return ____ # ___\n", "--samples", 2)
    assert len(re.findall(r"def add\(a, b\):\n    return (.|\n)* # (.|\n)*\n", text)) >= 1 and text.count("def add(a, b):\n    return ") == 2
    assert "___" not in text and "\u2591" not in text
    assert call("runs/mdm-byte", "--infill", "a___b", "--gap", 9).rstrip("\n").startswith("a")
    if kind == "mdm-byte":
        assert len(call("runs/mdm-byte", "--infill", "a___b", "--gap", 9, "--steps", 1).rstrip("\n").encode("utf-8", "replace")) >= 11


def test_watch_redraws_a_terminal(trained):
    """On a terminal the text resolves in place; elsewhere only its end is written."""
    master, slave = pty.openpty()
    running = subprocess.Popen(command("sample.py", "runs/mdm-byte", "--watch", "--steps", 4), cwd=trained, env=environment(), stdout=slave)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):                        # the terminal is gone when the command has ended
        while block := os.read(master, 2**16):
            shown += block
    assert running.wait() == 0
    frames = shown.decode("utf-8", "replace").split("\x1b[H\x1b[2J")[1:]
    masks = [frame.count("\u2591") for frame in frames]
    assert masks == [48, 32, 16, 0]


def test_inspect(trained, call, monkeypatch):
    (trained / "some.txt").write_bytes((trained / "text.txt").read_bytes()[:1000] + "é€\n".encode() + b"\xff")
    lines = call("runs/ar-byte", "--inspect", "some.txt", "--plot", "some.png", "--color", "off")
    plain = lines.replace("|", "")
    assert "Author: Steven" in plain and "bits per byte on 1,007 bytes" in lines and (trained / "some.png").read_bytes().startswith(b"\x89PNG")
    assert lines.count("|") > 150                             # cuts of the BPE that was learned from the same text
    assert "\x1b[30;48;2;255;" in call("runs/ar-bpe", "--inspect", "some.txt", "--color", "on")
    assert "a bound" in call("runs/mdm-bpe", "--inspect", "some.txt")
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=open(trained / "some.txt", "rb")))
    assert call("runs/ar-byte", "--inspect", "-", "--color", "off") == lines


def test_bench(trained, call, monkeypatch):
    monkeypatch.setattr(sample.bench, "__defaults__", (2, 128))
    text = call("--bench")
    assert all(title in text for title in ("| AR on byte |", "| AR on bpe |", "| MDM on byte | random | 64 |", "| MDM on bpe | confident, greedy |"))


def test_bad_input_is_one_line(trained, call, tmp_path):
    unfinished = trained / "unfinished"
    shutil.copytree(trained / "runs/ar-byte", unfinished, dirs_exist_ok=True)
    (unfinished / "result.json").unlink()
    (trained / "torn").mkdir()
    shutil.copy(trained / "runs/ar-byte/result.json", trained / "torn")
    (trained / "empty.txt").write_bytes(b"")
    for word, *arguments in (("no run folder", "nowhere"), ("no finished run", "unfinished"), ("checkpoint.pt", "torn"), ("AR", "runs/ar-byte", "--infill", "a____"),
                             ("no gap", "runs/mdm-byte", "--infill", "a"), ("window holds", "runs/mdm-byte", "--infill", "____", "--gap", 65),
                             ("empty", "--inspect", "empty.txt"), ("nowhere.txt", "--inspect", "nowhere.txt"), ("temperature", "--temperature", -1),
                             ("top-p", "--top-p", 1.5), ("steps", "--steps", 0), ("length", "--length", 0), ("--plot", "--plot", "a.png"), ("order", "--order", "x")):
        assert word in call(*arguments)
    assert_one_line(execute(tmp_path, "sample.py"), "train one first")
