"""sample.py: samplers against exact distributions, scores against likelihoods, and the command."""
import argparse
import contextlib
import itertools
import json
import math
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_one_line, command, execute, here

import sample
import train_ar
from model import Config, Transformer

MASK = "\u2591"


def random_model(causal, vocab_size=11, context=12, **remedies):
    """Return a small model whose predictions are not uniform."""
    torch.manual_seed(0)
    model = Transformer(Config(vocab_size, context, 32, causal, **remedies)).eval()
    torch.nn.init.normal_(model.head.weight, std=0.2)
    for name, parameter in model.named_parameters():
        if "conv" in name:
            # Zero at the start.
            torch.nn.init.normal_(parameter)
    return model


def chi_squared(ids, probabilities):
    """Return the statistic of samples ids (n, positions) against a joint (V, V, ...)."""
    cells = np.ravel_multi_index(ids.numpy().T, probabilities.shape)
    expected = len(ids) * probabilities.ravel()
    counts = np.bincount(cells, minlength=len(expected))
    return ((counts - expected) ** 2 / expected).sum()


# -----------------------------------------------------------------------------------------------
# AR.

@torch.no_grad()
@pytest.mark.parametrize("prompt, phase", [
    (0, 0), (1, 0), (5, 0), (11, 0), (12, 0), (30, 0), (0, 4), (5, 4), (30, 4)])
def test_generation_with_the_cache_sees_the_logits_of_the_whole_text(monkeypatch, prompt, phase):
    """Also when the context is full and its second half is read again."""
    model, text = random_model(causal=True, phase=phase), torch.randint(11, (3, prompt))
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
    generator = torch.Generator().manual_seed(0)
    ids, = sample.generate(model, prompt.expand(20_000, -1), 1, generator=generator)
    # 10 degrees of freedom: above 29.6 once in 1,000 times.
    assert chi_squared(ids[:, None], exact) < 29.6
    assert chi_squared(ids[:, None], np.roll(exact, 1)) > 100


def test_temperature_and_top_k_reshape_the_distribution():
    assert sample.temperature("0.00") == 0
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])
    for options, exact in [({"temperature": 2.0}, (logits / 2).softmax(dim=0)),
                           ({"temperature": 0.5}, (logits / 0.5).softmax(dim=0)),
                           ({"top_k": 2}, torch.tensor([1, math.exp(-1), 0, 0, 0]) / 1.36788),
                           ({"temperature": 0}, torch.tensor([1.0, 0, 0, 0, 0]))]:
        generator = torch.Generator().manual_seed(0)
        ids = sample.pick(logits.expand(40_000, -1), generator=generator, **options)
        assert (torch.bincount(ids, minlength=5) / 40_000 - exact).abs().max() < 0.012


# -----------------------------------------------------------------------------------------------
# MDM.

@torch.no_grad()
def test_ancestral_sampling_in_random_order_has_its_exact_joint():
    """The mean, over all orders, of the product of the model's conditionals."""
    model = random_model(causal=False, vocab_size=3, context=3)
    orders = list(itertools.permutations(range(3)))
    exact = np.zeros((3, 3, 3))
    for x in itertools.product(range(3), repeat=3):
        for order in orders:
            p, ids = 1.0, torch.full((1, 3), 3)
            for i in order:
                p *= model(ids)[0, i].softmax(dim=-1)[x[i]].item()
                ids[0, i] = x[i]
            exact[x] += p / len(orders)
    empty = torch.empty((20_000, 0), dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    *_, ids = sample.diffuse(model, empty, 3, 3, generator=generator)
    # 26 degrees of freedom: above 54 once in 1,000 times.
    assert exact.sum() == pytest.approx(1) and chi_squared(ids, exact) < 54
    *_, ids = sample.diffuse(model, empty, 3, 1, generator=generator)
    assert chi_squared(ids, exact) > 100


class Table:
    """An ideal MDM: all conditionals of one known joint distribution of three tokens."""
    config = SimpleNamespace(vocab_size=3, context=3, patch=1)

    def __init__(self):
        self.joint = np.random.default_rng(0).dirichlet(np.ones(27)).reshape(3, 3, 3)

    def spell(self, x, targets):
        return x

    def read(self, ids):
        logits = np.empty((len(ids), 3, 3))
        for row, x in enumerate(ids.tolist()):
            seen = tuple([i] if i < 3 else range(3) for i in x)
            part = self.joint[np.ix_(*seen)]
            for i in range(3):
                others = tuple(j for j in range(3) if j != i)
                logits[row, i] = np.log(part.sum(axis=others) / part.sum())
        return torch.from_numpy(logits)


@torch.no_grad()
def test_ancestral_sampling_of_patches_has_its_exact_joint():
    model = random_model(False, 2, 4, patch=2)
    sequences = torch.tensor(list(itertools.product(range(2), repeat=4)))

    def likelihood(ids, masked, predicted):
        inputs = torch.where(masked, 2, ids)
        return math.exp(-(model(inputs[None], ids[None])[0] * predicted).sum().item())

    both, first = torch.tensor([True] * 4), torch.tensor([True, True, False, False])
    exact = [0.5 * (likelihood(ids, both, first) * likelihood(ids, ~first, ~first)
                    + likelihood(ids, both, ~first) * likelihood(ids, first, first))
             for ids in sequences]
    exact = np.array(exact).reshape(2, 2, 2, 2)
    generator = torch.Generator().manual_seed(0)
    empty = torch.empty(4000, 0, dtype=torch.long)
    *_, ids = sample.diffuse(model, empty, 4, 2, generator=generator)
    # 15 degrees of freedom: above 37.7 once in 1,000 times.
    assert exact.sum() == pytest.approx(1) and chi_squared(ids, exact) < 37.7


@torch.no_grad()
@pytest.mark.parametrize("prompt", [0, 1, 4, 7])
def test_a_model_with_patches_and_convolutions_writes_what_it_predicts(prompt):
    model = random_model(True, 5, 12, patch=2, conv=3)
    text = torch.randint(5, (2, prompt))
    for chosen in sample.generate(model, text, 12 - prompt, temperature=0):
        n = text.size(1)
        ids = torch.nn.functional.pad(text, (0, 12 - n))
        inputs, _ = train_ar.corrupt(ids, 5, patch=2)
        logits = model.spell(model.read(inputs), ids)[:, n]
        assert (chosen == logits.argmax(dim=-1)).all()
        text = torch.cat([text, chosen[:, None]], dim=1)
    # Longer than the context.
    assert len(list(sample.generate(model, text, 9))) == 9


def test_infilling_keeps_what_is_given_and_follows_bayes():
    model = Table()
    ids, masked = torch.tensor([[3, 1, 3]]).expand(5000, -1), torch.tensor([True, False, True])
    generator = torch.Generator().manual_seed(0)
    *_, filled = sample.fill(model, ids, masked, 2, generator=generator)
    assert (filled[:, 1] == 1).all()
    posterior = model.joint[:, 1] / model.joint[:, 1].sum()
    # 8 degrees of freedom: above 26.1 once in 1,000 times.
    assert chi_squared(filled[:, [0, 2]], posterior) < 26.1
    assert chi_squared(filled[:, [0, 2]], model.joint.sum(axis=1)) > 100


@pytest.mark.parametrize("order", ["random", "confident", "blocks"])
@pytest.mark.parametrize("prompt, length, steps", [
    (0, 12, 1), (5, 7, 3), (5, 3, 100), (12, 5, 12), (30, 20, 4), (0, 40, 12)])
def test_every_order_keeps_the_prompt_and_leaves_no_mask(order, prompt, length, steps):
    model, ids = random_model(causal=False), torch.randint(11, (2, prompt))
    generator = torch.Generator().manual_seed(0)
    texts = list(sample.diffuse(model, ids, length, steps, order, block=4, generator=generator))
    masks = [(text == 11).sum().item() for text in texts]
    assert masks == sorted(masks, reverse=True) and masks[-1] == 0
    assert all(torch.equal(text[:, :prompt], ids) for text in texts)
    assert texts[-1].shape == (2, prompt + length)
    if prompt + length <= 12 and order != "blocks":
        assert len(texts) == min(steps, length)


@pytest.mark.parametrize("context, patch", [(8, 8), (1, 1)])
def test_a_context_of_one_patch_is_written_patch_by_patch(context, patch):
    model = random_model(causal=False, vocab_size=5, context=context, patch=patch)
    *_, text = sample.diffuse(model, torch.zeros(1, 0, dtype=torch.long), 16, 4)
    assert text.shape == (1, 16) and (text < 5).all()


@torch.no_grad()
def test_order_confident_fills_the_most_likely_token_first():
    model = random_model(causal=False)
    before, masked = torch.full((1, 12), 11), torch.ones(12, dtype=torch.bool)
    for after in sample.fill(model, before, masked, 12, "confident", temperature=0):
        best = model(before).softmax(dim=-1).amax(dim=-1).masked_fill(before != 11, 0)
        (_, position), = (after != before).nonzero().tolist()
        assert best[0, position] > best.max() - 1e-5
        before = after


# -----------------------------------------------------------------------------------------------
# Scores.

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
        sets = list(itertools.combinations(range(4), k))
        for masked in map(list, sets):
            inputs = ids.clone()
            inputs[masked] = 11
            exact[masked] += model(inputs[None], ids[None])[0, masked] / math.log(2) / k / len(sets)
    bits = sample.token_bits(model, ids, masks=4000)
    assert (bits / exact - 1).abs().max() < 0.1
    assert bits.sum().item() == pytest.approx(exact.sum().item(), rel=0.02)


@pytest.mark.parametrize("causal", [True, False])
def test_an_untrained_model_needs_eight_bits_a_byte(causal):
    model = Transformer(Config(256, 32, width=16, causal=causal)).eval()
    bits = sample.token_bits(model, torch.randint(256, (100,)))
    assert bits.mean().item() == pytest.approx(8, abs=1e-5)


def test_what_is_shown_cannot_command_the_terminal():
    assert sample.printable("a\x1b[2J\x00\n\t\x9b\x7f") == "a\u241b[2J\u2400\n\t\u2421\u2421"
    raw = "aé\x1b\n".encode() + b"\xff\xe2\x82b\xe2"
    shaded = sample.shade(raw, np.arange(float(len(raw))))
    colour = "\x1b[30;48;2;255;{0};{0}m"
    assert shaded.startswith(colour.format(255) + "a\x1b[0m" + colour.format(207) + "é\x1b[0m")
    for text in ("\u241b", "\n", "\ufffd", "\ufffdb"):
        assert f"m{text}\x1b[0m" in shaded or text == "\n" and "\x1b[0m\n" in shaded


# -----------------------------------------------------------------------------------------------
# The command.

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with four tiny trained runs, MDM on bytes the newest."""
    folder = tmp_path_factory.mktemp("sample")
    (folder / "text.txt").write_bytes(Path(argparse.__file__).read_bytes()[:100_000])
    for tokenizer, objective in itertools.product(("bpe", "byte"), ("ar", "mdm")):
        done = here(folder, f"train_{objective}.py", "--data", "text.txt", "--vocab", 300,
                    "--flops", 2e9, "--width", 16, "--context", 64, "--tokenizer", tokenizer,
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


def damaged(folder, change):
    """Make a copy of a run, its checkpoint changed by change(checkpoint). Return its name."""
    shutil.copytree(folder / "runs/ar-byte", folder / "damaged", dirs_exist_ok=True)
    checkpoint = torch.load(folder / "damaged/checkpoint.pt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, folder / "damaged/checkpoint.pt")
    return "damaged"


def test_the_newest_finished_run_writes(folder, call):
    for name, content in [("list", "[]"), ("empty", "{}"), ("half", '{"val_bpb": 1.'),
                          ("string", '{"val_bpb": "low", "steps": 3}')]:
        (folder / "runs" / name).mkdir(exist_ok=True)
        (folder / "runs" / name / "result.json").write_text(content)
        (folder / "runs" / name / "checkpoint.pt").write_bytes(b"")
    text = call("--prompt", "import ")
    assert text.startswith("import ") and len(text) > 20
    alone = execute(folder, "sample.py", "runs/mdm-byte", "--prompt", "import ")
    assert alone.stdout == text and alone.stderr == ""
    assert text != call("runs/mdm-byte", "--prompt", "import ", "--seed", 1)


@pytest.mark.parametrize("name", ["ar-byte", "ar-bpe", "mdm-byte", "mdm-bpe"])
def test_texts_begin_with_any_prompt(call, name):
    invalid = b"\xff\x00\x1b\x80".decode("utf-8", "surrogateescape")
    for prompt in ("", "x", "é" * 100, invalid * 5, "longer than two contexts " * 9):
        shown = sample.printable(sample.to_bytes(prompt).decode("utf-8", "replace"))
        text = call(f"runs/{name}", "--prompt", prompt, "--length", 20)
        assert text.startswith(shown[:-1]) and MASK not in text and len(text) > len(shown)
    assert call(f"runs/{name}", "--samples", 3, "--length", 90).count("--- sample") == 3


@pytest.mark.parametrize("name", ["mdm-byte", "mdm-bpe"])
def test_infilling_keeps_the_given_text(call, name):
    for order in ("random", "confident"):
        text = call(f"runs/{name}", "--infill", r"f(é)\n    x = ____ # ___.", "--order", order)
        assert text.startswith("f(é)\n    x = ") and " # " in text and text.endswith(".\n")
        assert "___" not in text and MASK not in text


def test_a_terminal_shows_the_text_as_it_is_filled(folder):
    master, slave = pty.openpty()
    watch = command("sample.py", "runs/mdm-byte", "--watch", "--steps", 4)
    process = subprocess.Popen(watch, cwd=folder, stdout=slave)
    os.close(slave)
    shown = b""
    # A terminal whose program has ended raises OSError.
    with contextlib.suppress(OSError):
        while block := os.read(master, 2**16):
            shown += block
    assert process.wait() == 0
    frames = shown.decode("utf-8", "replace").split(sample.CLEAR)[1:]
    assert [frame.count(MASK) for frame in frames] == [48, 32, 16, 0, 0]


def test_any_file_is_scored(folder, call, monkeypatch):
    raw = (folder / "text.txt").read_bytes()[:1000] + b"\xff\x00\n"
    (folder / "some.txt").write_bytes(raw)
    for broken in ("{", "[]", '{"sha256": 1}'):
        (folder / "data/other-bpe4096").mkdir(exist_ok=True)
        (folder / "data/other-bpe4096/meta.json").write_text(broken)
        line = call("runs/ar-byte", "--score", "some.txt")
        assert 2 < float(line.split(" bits per byte ")[0]) < 8 and line.endswith("on 1,003 bytes\n")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=open(folder / "some.txt", "rb")))
    assert call("runs/ar-byte", "--score", "-") == line
    bound = call("runs/mdm-bpe", "--score", "some.txt")
    assert "bound" in bound and 2 < float(bound.split()[0]) < 9


@pytest.fixture(scope="module")
def patched(folder):
    """Train tiny models with patches of 4 and convolutions."""
    for objective in ("ar", "mdm"):
        done = here(folder, f"train_{objective}.py", "--data", "text.txt", "--flops", 1e9,
                    "--width", 16, "--context", 64, "--patch", 4, "--conv", 3,
                    "--out", f"patched/{objective}")
        assert done.returncode == 0, done.stderr
        result = json.loads((folder / f"patched/{objective}/result.json").read_text())
        assert (result["patch"], result["conv"]) == (4, 3)


def test_models_with_patches_write_fill_and_score(patched, call):
    for objective in ("ar", "mdm"):
        assert call(f"patched/{objective}", "--prompt", "abcd", "--length", 8).startswith("abcd")
        assert "bits per byte" in call(f"patched/{objective}", "--score", "text.txt")
    assert call("patched/ar", "--prompt", "abc", "--length", 7).startswith("abc")
    filled = call("patched/mdm", "--infill", "abcd____efgh")
    assert filled.startswith("abcd") and filled.rstrip("\n").endswith("efgh")
    assert "multiples of 4" in call("patched/mdm", "--prompt", "abc", "--length", 8)
    assert "whole ones" in call("patched/mdm", "--infill", "ab____cdefgh")


def test_bad_input_is_one_line(folder, call):
    (folder / "empty.txt").write_bytes(b"")
    ar, mdm = "runs/ar-byte", "runs/mdm-byte"
    for word, *arguments in [
            ("nowhere", "nowhere"), ("empty.txt", "--score", "empty.txt"),
            ("no such", "--score", "runs"), ("temperature", "--temperature", "1e-40"),
            ("temperature", "--temperature", "nan"), ("temperature", "--temperature", "x"),
            ("samples", "--samples", "1e8"),
            ("length", "--length", 10**12), ("seed", "--seed", 2**64), ("steps", "--steps", 0),
            ("top-k", "--top-k", -1), ("order", "--order", "x"), ("device", "--device", "x"),
            ("AR", ar, "--infill", "a___"), ("--steps", ar, "--steps", 9),
            ("--order", ar, "--order", "random"), ("gap", mdm, "--infill", "a"),
            ("--prompt", mdm, "--infill", "a___", "--prompt", "b"),
            ("context", mdm, "--infill", "_" * 65), ("--length", "--infill", "___", "--length", 3),
            ("--seed", "--score", "text.txt", "--seed", 3)]:
        assert word in call(*arguments)


def test_a_checkpoint_that_is_not_the_model_of_the_result_is_refused(folder, call):
    for word, change in [
            ("step", lambda saved: saved["log"].update(step=1)),
            ("finite", lambda saved: saved["model"]["head.weight"].fill_(math.nan)),
            ("another", lambda saved: saved["settings"].update(objective="mdm")),
            ("shuffle", lambda saved: saved["settings"].update(shuffle=16))]:
        assert word in call(damaged(folder, change))
    result = json.loads((folder / "damaged/result.json").read_text())
    (folder / "damaged/result.json").write_text(json.dumps(result | {"shuffle": 16}))
    assert "shuffled" in call("damaged")
    (folder / "damaged/result.json").unlink()
    assert "no finished run" in call("damaged")
