"""study/train.py: without interventions the plain runs, and what each intervention changes."""
import json

import numpy as np
import pytest
import torch
from conftest import assert_one_line, here

import data
from study.train import PLAIN, Sequences, permutation, tokens_in_block

TINY = ("--data", "text.txt", "--vocab", 300, "--context", 64, "--width", 16, "--flops", 1e9)


def train(folder, objective, out, *arguments, script="study.train"):
    """Train a tiny run. Return its result and its weights."""
    first = [objective] if script == "study.train" else []
    done = here(folder, script, *first, *TINY, "--out", out, *arguments)
    assert done.returncode == 0, done.stderr
    checkpoint = torch.load(folder / out / "checkpoint.pt", weights_only=True)
    return json.loads((folder / out / "result.json").read_text()), checkpoint["model"]


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_without_interventions_it_trains_what_the_script_trains_to_the_last_bit(
        workplace, objective, tokenizer):
    given, name = ("--tokenizer", tokenizer), f"{objective}-{tokenizer}"
    plain, weights = train(workplace, objective, f"script-{name}", *given,
                           script=f"train_{objective}.py")
    study, same = train(workplace, objective, f"study-{name}", *given)
    for key in plain.keys() - {"seconds", "flops_per_second"}:
        assert study[key] == plain[key], key
    assert study.keys() == plain.keys() and weights.keys() == same.keys()
    assert all(torch.equal(weights[key], same[key]) for key in weights)


INTERVENTIONS = [
    ("ar", "--conv 3"), ("mdm", "--conv 3 --patch 4"), ("ar", "--phase 4"), ("mdm", "--depth 3"),
    ("ar", "--ngram 3 --buckets 500 --ngram-stride 2"), ("mdm", "--shuffle 8 --permutation 2"),
    ("mdm", "--span 4 --span-share 0.5"), ("mdm", "--schedule bell")]


@pytest.mark.parametrize("objective, flags", INTERVENTIONS)
def test_an_intervention_is_trained_and_not_read_as_a_plain_run(workplace, objective, flags):
    out = f"variant-{objective}{flags.replace(' ', '')}"
    result, _ = train(workplace, objective, out, *flags.split())
    values = dict(zip(*[iter(flags.replace("--depth", "--layers").split())] * 2, strict=True))
    named = {flag[2:].replace("-", "_"): value for flag, value in values.items()}
    assert {key: str(result[key]) for key in PLAIN if key in result} == named
    plain, _ = train(workplace, objective, f"plain-{objective}")
    assert result["val_bpb"] != plain["val_bpb"]
    assert ("val_bpb_span1" in result) == ("--span" in flags)
    # Neither sample.py nor the plain script takes it for a run of its own, nor the other way round.
    assert_one_line(here(workplace, "sample.py", out), "variant", f"python -m study.sample {out}")
    plain_here = here(workplace, f"train_{objective}.py", *TINY, "--out", out)
    assert_one_line(plain_here, "another run")
    variant_there = here(workplace, "study.train", objective, *TINY, *flags.split(), "--out",
                         f"plain-{objective}")
    assert_one_line(variant_there, "another run")


@pytest.mark.parametrize("arguments, word", [
    ("ar --schedule cosine", "for MDM"), ("ar --span 2", "for MDM"), ("mdm --span 5", "--span"),
    ("mdm --patch 5", "divide"), ("mdm --conv 4", "odd"), ("ar --shuffle 5", "--shuffle"),
    ("ar --phase 2 --patch 2", "--phase"),
    ("ar --conv x", "--conv"), ("ar --permutation -1", "--permutation"), ("", "objective"),
    ("mdm --span-share 0", "--span-share")])
def test_bad_input_is_one_line_and_leaves_nothing(workplace, arguments, word):
    assert_one_line(here(workplace, "study.train", *arguments.split(), *TINY, "--out", "bad"), word)
    assert not (workplace / "bad").exists()


# ---- Shuffled order.

@pytest.mark.parametrize("block", [3, 4, 8, 16, 32, 64, 512])
def test_permutations_are_permutations_and_differ_by_their_index(block):
    orders = {tuple(permutation(block, index).tolist()) for index in range(3)}
    assert len(orders) == 3 and tuple(range(block)) not in orders
    assert all(sorted(order) == list(range(block)) for order in orders)
    # Permutation 0 is the one of the published rows.
    assert (permutation(block) == np.random.default_rng(block).permutation(block)).all()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_every_block_is_shuffled_by_the_same_permutation_and_nothing_is_lost(index):
    stream, order = np.arange(6400, dtype=np.uint16), permutation(8, index)
    plain, shuffled = data.Sequences(stream, 32), Sequences(stream, 32, 8, index)
    for before, after in ((plain.batch(0, 3, 5), shuffled.batch(0, 3, 5)),
                          (plain.spaced(7), shuffled.spaced(7))):
        assert (after.reshape(-1, 8) == before.reshape(-1, 8)[:, order]).all()
    assert (Sequences(stream, 32).batch(0, 3, 5) == plain.batch(0, 3, 5)).all()


def test_a_block_of_bpe_tokens_is_about_as_many_bytes(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    raw, bpe = data.load("text.txt"), data.load("text.txt", "bpe", 300)
    assert tokens_in_block(raw, 16, 512) == 16
    for nbytes in (1, 8, 16, 64):
        block = tokens_in_block(bpe, nbytes, 160)
        assert 160 % block == 0
        assert block == min((1, 2, 4, 5, 8, 10, 16, 20, 32, 40, 80, 160),
                            key=lambda n: abs(n * bpe.meta["bytes_per_token"] - nbytes))
