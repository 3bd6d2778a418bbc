"""study/sample.py: variants sample what they predict, by enumeration, and the command."""
import itertools

import numpy as np
import pytest
import torch
from conftest import assert_one_line, here, randomize

import sample as plain
import train_ar
from study import sample
from study.train import corrupt_ar
from study.variants import Config, Transformer

TEXTS = torch.tensor(list(itertools.product(range(2), repeat=4)))


def random_model(causal, vocab_size=2, context=4, **variant):
    """Return a small model whose predictions are not uniform."""
    return randomize(Transformer(Config(vocab_size, context, 32, causal, **variant)), std=0.3)


def bits_by_enumeration(model, ids):
    """Return the bits of texts (N, 4) in each order in which an MDM may fill patches: (M, N)."""
    P, bits = model.config.patch, []
    for order in itertools.permutations(range(0, 4, P)):
        masked, nats = torch.ones(4, dtype=torch.bool), 0
        for start in order:
            nll = model(torch.where(masked, 2, ids), ids)
            nats += nll[:, start:start + P].sum(dim=1).numpy()
            masked[start:start + P] = False
        bits.append(nats / np.log(2))
    return np.array(bits)


@torch.no_grad()
@pytest.mark.parametrize("variant", [
    {"patch": 2, "conv": 3}, {"ngram": 3}, {"ngram": 3, "patch": 2}, {"phase": 4, "layers": 3}])
@pytest.mark.parametrize("causal", [True, False])
def test_texts_are_written_with_their_exact_probabilities(causal, variant):
    model = random_model(causal, **variant)
    if causal:
        inputs, _ = corrupt_ar(TEXTS, 2, None, model.config.patch)
        exact = (-model(inputs, TEXTS).sum(dim=1)).exp().numpy()
        ids = torch.stack([*sample.generate(model, torch.zeros(4000, 0).long(), 4)], dim=1)
    else:
        exact = (2 ** -bits_by_enumeration(model, TEXTS)).mean(axis=0)
        *_, ids = sample.fill(model, torch.full((4000, 4), 2), torch.ones(4).bool(), 4)
    counts = np.bincount(ids.numpy() @ [8, 4, 2, 1], minlength=16)
    statistic, wrong = (((counts - 4000 * p) ** 2 / (4000 * p)).sum()
                        for p in (exact, np.roll(exact, 1)))
    # 15 degrees of freedom: above 37.7 once in 1,000 times.
    assert exact.sum() == pytest.approx(1, abs=1e-5) and statistic < 37.7 and wrong > 100


@torch.no_grad()
@pytest.mark.parametrize("prompt", [0, 1, 4, 7, 12])
def test_ar_with_patches_continues_prompts_of_any_length(prompt):
    model = random_model(True, 5, 12, patch=4, conv=3)
    text = torch.randint(5, (2, prompt))
    for chosen in sample.generate(model, text.clone(), 9, temperature=0):
        # When the context is full, its second half is read again.
        text = text if text.size(1) < 12 else text[:, -6:]
        ids = torch.nn.functional.pad(text, (0, 12 - text.size(1)))
        logits = model.spell(model.read(corrupt_ar(ids, 5, None, 4)[0]), ids)
        assert (chosen == logits[:, text.size(1)].argmax(dim=-1)).all()
        text = torch.cat([text, chosen[:, None]], dim=1)


@torch.no_grad()
def test_scores_are_the_evaluation_of_ar_and_the_bound_of_mdm():
    ar, mdm = (random_model(causal, patch=2) for causal in (True, False))
    ids = torch.randint(2, (40,))
    bpb, _ = train_ar.evaluate(ar, ids.view(10, 4).numpy(), np.ones(2, dtype=int),
                               lambda *given: corrupt_ar(*given, patch=2))
    bits = sample.token_bits(ar, ids)
    assert bits.mean().item() == pytest.approx(bpb, rel=1e-5)
    # Half a patch is there.
    assert torch.equal(sample.token_bits(ar, ids[:39]), bits[:39])
    bound = bits_by_enumeration(mdm, ids[None, :4]).mean()
    assert sample.token_bits(mdm, ids[:4], 4000).sum().item() == pytest.approx(bound, rel=0.02)


@pytest.fixture(scope="module")
def folder(workplace):
    """Train tiny variants on bytes. Return the folder that holds them."""
    for objective, flag in ("ar", "patch"), ("mdm", "patch"), ("mdm", "ngram"), ("ar", "shuffle"):
        done = here(workplace, "study.train", objective, f"--{flag}", 4, "--data", "text.txt",
                    "--flops", 1e8, "--width", 16, "--context", 64,
                    "--out", f"variants/{objective}-{flag}")
        assert done.returncode == 0, done.stderr
    return workplace / "variants"


def test_the_command_samples_and_scores_every_variant(folder, monkeypatch):
    for name in ("load_model", "generate", "fill", "token_bits"):
        # Put back behind the test.
        monkeypatch.setattr(plain, name, getattr(plain, name))

    def call(*arguments):
        return here(folder, "study.sample", *arguments)

    (folder / "some.txt").write_text("import math\n" * 9)
    for run in ("ar-patch", "mdm-patch", "mdm-ngram"):
        assert call(run, "--prompt", "abcd", "--length", 6).stdout.startswith("abcd")
        assert "bits per byte" in call(run, "--score", "some.txt").stdout
    filled = call("mdm-patch", "--infill", "abcd____efgh", "--order", "confident").stdout
    assert filled.startswith("abcd") and filled.rstrip("\n").endswith("efgh")
    for flag, text in ("--infill", "ab____cdefgh"), ("--infill", "abcd____e"), ("--prompt", "abc"):
        assert_one_line(call("mdm-patch", flag, text), "patches of 4 tokens")
    assert_one_line(call("ar-shuffle"), "shuffled")
    assert_one_line(call("nowhere"), "no finished run")


def test_settings_of_older_runs_hold_what_is_plain_too(folder):
    saved = torch.load(folder / "ar-patch" / "checkpoint.pt", weights_only=True)
    saved["settings"] |= {"schedule": None, "shuffle": 1, "span": 1, "phase": 0}
    torch.save(saved, folder / "ar-patch" / "checkpoint.pt")
    assert sample.load_model(folder / "ar-patch")[0].config.patch == 4
