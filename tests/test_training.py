"""The training scripts, run as a user runs them, on real text. Promises are those of DESIGN.md."""
import argparse
import csv
import difflib
import functools
import gc
import json
import math
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line, execute, here

import data
import log
import run
import train_ar
import train_mdm
from model import Config, Transformer

# What the imports made need not be looked at again whenever memory is collected.
gc.freeze()
SMALL = ("--data", "text.txt", "--width", 32, "--context", 64, "--batch", 256, "--vocab", 300)
FILES = ["checkpoint.pt", "log.csv", "loss.png", "result.json"]
# What commit d87cd5a wrote among the settings of a plain run.
OLD = {"shuffle": 1, "permutation": 0, "phase": 0, "span": 1, "span_share": 1, "conv": 0,
       "patch": 1}


def train(workplace, objective, out, *arguments):
    done = here(workplace, f"train_{objective}.py", *SMALL, "--out", out, *arguments)
    # A process gives its lock back when it ends; here, errors may still hold on to it.
    gc.collect()
    return done


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def weights_of(folder):
    return log.read_checkpoint(folder / "checkpoint.pt")["model"]


def log_of(folder):
    with open(folder / "log.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"}
                for row in csv.DictReader(file)]


def files_of(folder):
    return sorted(path.name for path in folder.glob("[!.]*"))


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train_half(workplace, objective, out, *arguments):
    """Train half of a run. Then somebody types Ctrl-C."""
    write = log.Log.write

    def write_half(self, step, *rest):
        if step > self.settings["steps"] / 2:
            raise KeyboardInterrupt
        return write(self, step, *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log.Log, "write", write_half)
        patch.setattr(log, "SAVE_SECONDS", 0)
        done = train(workplace, objective, out, *arguments)
    assert done.returncode == 130 and not (workplace / out / "result.json").exists()


# ---- A run, from the command to its folder.

@pytest.mark.parametrize("objective, tokenizer", [
    ("ar", "byte"), ("ar", "bpe"), ("mdm", "byte"), ("mdm", "bpe")])
def test_a_configuration_trains_to_its_budget(workplace, monkeypatch, objective, tokenizer):
    out = f"run-{objective}-{tokenizer}"
    arguments = (objective, out, "--tokenizer", tokenizer, "--flops", 1e10)
    done = train(workplace, *arguments)
    assert done.returncode == 0, done.stderr
    assert files_of(workplace / out) == FILES
    result, rows = result_of(workplace / out), log_of(workplace / out)

    # Met to within one step, never exceeded.
    step_flops = (Config(result["vocab_size"], result["context_tokens"], 32).flops_per_token()
                  * result["batch_tokens"])
    assert result["flops_spent"] == result["steps"] * step_flops
    assert 0 <= 1e10 - result["flops_spent"] < step_flops
    assert result["tokens"] == result["steps"] * result["batch_tokens"]
    bytes_per_token = result["bytes"] / result["tokens"]
    assert bytes_per_token == 1 if tokenizer == "byte" else bytes_per_token > 1.5

    assert [int(rows[-1][key]) for key in ("step", "flops", "bytes")] == [
        result[key] for key in ("steps", "flops_spent", "bytes")]
    assert float(rows[-1]["val_bpb"]) == result["val_bpb"]
    validated = [int(row["step"]) / result["steps"] for row in rows if row["val_bpb"]]
    assert validated == pytest.approx([i / 8 for i in range(1, 9)], abs=1 / 100)

    # It has learned more than how often each byte occurs, but not seen the text. MDM is slower.
    share = np.bincount(np.fromfile(workplace / "text.txt", np.uint8)).clip(1) / 300_000
    slack = 0 if objective == "ar" else 0.3
    assert 1.5 < result["val_bpb"] < -(share * np.log2(share)).sum() + slack
    assert 0 < result["val_bpb_stderr"] < 0.2

    # Promises: a finished run prints its result; every result says on which text.
    printed = f"{result['val_bpb']:.4f}"
    assert printed in done.stdout and "(not the published text)" in done.stdout
    assert f"model  {objective}, width 32" in done.stdout and "note" not in done.stdout
    monkeypatch.setattr(log, "PUBLISHED_SHA256", result["corpus"]["sha256"])
    again = train(workplace, *arguments)
    assert again.returncode == 0 and again.stderr == "" and again.stdout.count("\n") == 1
    assert printed in again.stdout and "(the published text)" in again.stdout


def test_the_result_is_what_evaluate_says_of_the_checkpoint(workplace, monkeypatch):
    train(workplace, "ar", "evaluated", "--flops", 2e9)
    monkeypatch.chdir(workplace)
    net, _, tokenizer = log.load_model(workplace / "evaluated")
    result = result_of(workplace / "evaluated")
    val = data.Sequences(data.load("text.txt").val, 64).spaced(2 * result["tokens"] // 64)
    judged = train_ar.evaluate(net, val, tokenizer.bytes_per_id)
    expected = result["val_bpb"], result["val_bpb_stderr"]
    assert judged == pytest.approx(expected, rel=1e-5) and result["val_bytes"] == val.size


def test_a_text_that_is_read_many_times_is_noted(workplace):
    (workplace / "short.txt").write_bytes((workplace / "text.txt").read_bytes()[:8000])
    done = train(workplace, "ar", "many", "--flops", 1e10, "--data", "short.txt")
    assert re.search(r"data .* read [\d.]+ times: more than 4 times teach little", done.stdout)


# ---- Rates, batches, widths and texts follow from the budget.

def test_the_rules_of_width_and_batch():
    for script, widths in ((train_ar, [8, 48, 576]), (train_mdm, [8, 32, 576])):
        assert [run.default_width(flops, script.WIDTH) for flops in (1e9, 3e12, 1e18)] == widths
        assert script.batch_tokens(1e12, "bpe") == script.BATCH["bpe"]
    # Batches grow as C^0.3; that of MDM on bytes only from 3e14 on.
    assert train_ar.batch_tokens(1e14, "byte") == pytest.approx(512 * 100**0.3)
    assert train_mdm.batch_tokens(1e14, "bpe") == pytest.approx(320 * 100**0.3)
    assert train_mdm.batch_tokens(3e14, "byte") == 512
    assert train_mdm.batch_tokens(3e17, "byte") == pytest.approx(512 * 1000**0.3)
    # A large batch is a multiple of eight sequences.
    sequences = {1: 1, 7: 7, 63: 63, 64: 64, 67: 64, 251: 248, 563: 560}
    assert {count: run.count_steps(1e18, count * 160, Config(context=160))[0]
            for count in sequences} == sequences


@pytest.mark.parametrize("objective, lr", [("ar", 0.003), ("mdm", 0.0015)])
def test_a_run_without_settings_follows_the_rules(workplace, objective, lr):
    done = here(workplace, f"train_{objective}.py", "--data", "text.txt", "--flops", 5e9)
    assert done.returncode == 0, done.stderr
    (folder,) = (workplace / "runs").glob(f"{objective}-byte-w8-c5e*9-s0-*")
    result = result_of(folder)
    # One sequence: the rule's batch is smaller.
    assert (result["lr"], result["context_tokens"], result["batch_tokens"]) == (lr, 512, 512)


def test_the_run_folder_is_named_by_the_settings(workplace):
    args = run.arguments("doc").parse_args(["--data", "pysrc", "--flops", "3e12"])
    settings = vars(args) | {"objective": "ar", "flops_budget": 3e12, "width": 48}
    assert str(log.default_out(args, settings, {})) == "runs/ar-byte-w48-c3e12-s0"
    unusual = {str(log.default_out(args, settings | {"lr": lr}, {"conv": conv}))
               for lr in (0.1, 0.2) for conv in (3, 4)}
    assert all(name.startswith("runs/ar-byte-w48-c3e12-s0-") for name in unusual)


def test_the_text_follows_from_the_budget_alone():
    assert [run.choose_data(None, flops) for flops in (1e12, 1.5e15)] == ["pysrc", "pysrc"]
    assert [run.choose_data(None, flops) for flops in (1.6e15, 1e16)] == ["c4:1", "c4:2"]
    for flops in (1e16, 1e18, 1e20):
        shards = int(run.choose_data(None, flops).removeprefix("c4:"))
        assert run.choose_data("c4", flops) == f"c4:{shards}"
        # AR on BPE reads the most: 4 bytes a token, and 5% are for validation.
        tokens = flops / Config(4096, 128, run.default_width(flops)).flops_per_token()
        size = data.SHARDS["c4"][1]
        assert (shards - 1) * size < 1.1 * 4 * tokens <= shards * size
    assert run.choose_data("c4:7", 1e20) == "c4:7" and run.choose_data("enwik8", 1e20) == "enwik8"


# ---- Batches in pieces.

@pytest.mark.parametrize("sequences", [2, 7, 31, 251, 1123])
@pytest.mark.parametrize("micro", [8192, 65536])
def test_a_batch_is_read_in_nearly_equal_pieces_as_few_as_fit(sequences, micro):
    args, config, read = argparse.Namespace(micro=micro), Config(context=160), []
    for rank in (0, 1):
        pieces = run.split_batch(args, sequences, config, torch.device("cpu"), rank, 2)
        sizes = [rows.stop - rows.start for rows in pieces]
        assert max(sizes) - min(sizes) <= 1 and max(sizes) <= micro // 160
        assert len(pieces) == math.ceil(sum(sizes) / (micro // 160))
        read += [i for rows in pieces for i in range(rows.start, rows.stop)]
    assert read == list(range(sequences))


def test_a_batch_in_pieces_trains_as_one(workplace):
    """13 sequences one by one, and as 6 and 7."""
    folders = []
    for micro in (832, 640, 64):
        folders.append(workplace / f"micro-{micro}")
        done = train(workplace, "mdm", folders[-1], "--flops", 2e9, "--batch", 832, "--micro",
                     micro)
        assert done.returncode == 0, done.stderr
    for folder in folders[1:]:
        bpb = result_of(folders[0])["val_bpb"]
        assert result_of(folder)["val_bpb"] == pytest.approx(bpb, rel=1e-3)
        for name, weight in weights_of(folders[0]).items():
            assert torch.allclose(weight, weights_of(folder)[name], atol=2e-2)


# ---- Promise: the same command resumes, to the bit on a CPU.

@pytest.fixture(scope="module", params=[("ar", "byte"), ("mdm", "bpe")], ids="-".join)
def uninterrupted(request, workplace):
    """Return the objective, the flags and the folder of a run that nothing happened to."""
    objective, tokenizer = request.param
    flags = ("--tokenizer", tokenizer, "--flops", 6e9)
    done = train(workplace, objective, f"whole-{objective}", *flags)
    assert done.returncode == 0, done.stderr
    return objective, flags, workplace / f"whole-{objective}"


def start(workplace, objective, out, *flags):
    """Start a run that saves at every row of its log, and wait for its first checkpoint."""
    code = (f"import log, run, train_{objective}; log.SAVE_SECONDS = 0; "
            f"run.run_script(train_{objective}.main)")
    running = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, SMALL), "--out", out, *map(str, flags)],
        cwd=workplace, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (workplace / out / "checkpoint.pt").exists():
        assert running.poll() is None, running.communicate()
        time.sleep(0.01)
    return running


def assert_resumes_to_the_same(workplace, out, uninterrupted):
    objective, flags, whole = uninterrupted
    done = train(workplace, objective, out, *flags)
    assert done.returncode == 0, done.stderr
    assert re.search(r", [1-9]\d* of them done", done.stdout)
    assert same_bits(weights_of(workplace / out), weights_of(whole))
    result, expected = result_of(workplace / out), result_of(whole)
    for key in ("val_bpb", "val_bpb_stderr", "bytes", "steps", "flops_spent"):
        assert result[key] == expected[key]
    assert log_of(workplace / out) == log_of(whole)
    assert files_of(workplace / out) == FILES


def test_a_killed_or_stopped_run_resumes_to_the_bit(workplace, uninterrupted):
    """And, while it is frozen, a second process is kept out of its folder."""
    objective, flags, _ = uninterrupted
    out = f"killed-{objective}"
    running = start(workplace, objective, out, *flags)
    if objective == "ar":
        running.send_signal(signal.SIGSTOP)
        before = (workplace / out / "checkpoint.pt").read_bytes()
        assert_one_line(train(workplace, objective, out, *flags), "another process works in", out)
        assert (workplace / out / "checkpoint.pt").read_bytes() == before
        running.kill()
        running.communicate()
    else:
        running.terminate()
        _, stderr = running.communicate(timeout=60)
        assert running.returncode == 130 and "Traceback" not in stderr
        assert stderr.splitlines()[-1] == "interrupted: the same command resumes, or begins again"
    assert not (workplace / out / "result.json").exists()
    assert_resumes_to_the_same(workplace, out, uninterrupted)


def test_a_full_disk_keeps_the_last_checkpoint(workplace, uninterrupted):
    """Promise: a file is whole or not there."""
    objective, flags, _ = uninterrupted
    out = f"full-{objective}"
    train_half(workplace, objective, out, *flags)
    good = (workplace / out / "checkpoint.pt").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, limit[1]))
    try:
        done = train(workplace, objective, out, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert_one_line(done, "is the disk full?")
    assert (workplace / out / "checkpoint.pt").read_bytes() == good
    assert_resumes_to_the_same(workplace, out, uninterrupted)


# ---- Promise: a damaged or foreign checkpoint or result is refused in one line.

def flip(good):
    """Return a checkpoint with a few flipped bytes in the middle of its weights."""
    middle = len(good) // 2
    return good[:middle] + bytes(255 - b for b in good[middle:middle + 400]) + good[middle + 400:]


@pytest.mark.parametrize("damage", [
    flip, lambda good: good[:len(good) // 2], lambda good: good[:-1], lambda good: b"",
    lambda good: b"something else"])
def test_a_damaged_checkpoint_is_named_and_kept(workplace, uninterrupted, damage):
    objective, flags, whole = uninterrupted
    out = workplace / f"damaged-{objective}"
    out.mkdir(exist_ok=True)
    bad = damage((whole / "checkpoint.pt").read_bytes())
    (out / "checkpoint.pt").write_bytes(bad)
    done = train(workplace, objective, out, *flags)
    assert_one_line(done, "checkpoint.pt is damaged", "delete it")
    assert (out / "checkpoint.pt").read_bytes() == bad


def test_a_foreign_checkpoint_or_result_is_named_and_kept(workplace, uninterrupted):
    objective, flags, whole = uninterrupted
    other = "mdm" if objective == "ar" else "ar"
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert_one_line(train(workplace, objective, whole, *flags, "--lr", 0.5), "result.json", "lr")
    assert_one_line(train(workplace, other, whole, *flags), "result.json", "objective")
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before

    aside = workplace / f"aside-{objective}"
    aside.mkdir()
    shutil.copy(whole / "checkpoint.pt", aside)
    assert_one_line(train(workplace, objective, aside, *flags, "--seed", 1), "checkpoint.pt",
                    "seed")
    good = log.read_checkpoint(whole / "checkpoint.pt")
    without = {key: value for key, value in good.items() if key != "optimizer"}
    for checkpoint in (without, {"weights": torch.zeros(3)}, [1, 2]):
        torch.save(checkpoint, aside / "checkpoint.pt")
        assert_one_line(train(workplace, objective, aside, *flags), "checkpoint.pt")
    (aside / "checkpoint.pt").unlink()
    for text in ("[]", "{}", '{"val_bpb": "low"}', "{"):
        (aside / "result.json").write_text(text)
        assert_one_line(train(workplace, objective, aside, *flags), "result.json")


@pytest.mark.parametrize("weight, words", [
    (torch.ones(33), "checkpoint.pt"), (torch.full((32,), torch.nan), "not finite")])
def test_a_model_of_other_shapes_or_without_numbers_is_one_line(workplace, weight, words):
    """A student has edited model.py; a loss was not finite at the last step."""
    out = f"edited-{len(weight)}"
    train(workplace, "ar", out, "--flops", 2e9)
    saved = log.read_checkpoint(workplace / out / "checkpoint.pt")
    saved["model"]["norm.weight"] = weight
    torch.save(saved, workplace / out / "checkpoint.pt")
    if len(weight) == 33:
        assert_one_line(here(workplace, "sample.py", out), words)
    (workplace / out / "result.json").unlink()
    assert_one_line(train(workplace, "ar", out, "--flops", 2e9), words)


# ---- Runs of older code, and of variants.

def rewrite(folder, settings):
    """Add settings to the files of a run, and spell its merges as d87cd5a did."""
    saved = log.read_checkpoint(folder / "checkpoint.pt")
    saved["settings"] |= settings
    saved["merges"] = [[bytes(token).hex() for token in pair] for pair in saved["merges"]]
    torch.save(saved, folder / "checkpoint.pt")
    if (folder / "result.json").exists():
        (folder / "result.json").write_text(json.dumps(result_of(folder) | settings))


def test_plain_runs_of_older_code_resume_and_are_loaded(workplace, uninterrupted):
    objective, flags, whole = uninterrupted
    old = OLD | {"schedule": "linear" if objective == "mdm" else None,
                 "corpus": result_of(whole)["corpus"] | {"name": "text"}}
    train_half(workplace, objective, f"old-{objective}", *flags)
    rewrite(workplace / f"old-{objective}", old)
    assert_resumes_to_the_same(workplace, f"old-{objective}", uninterrupted)

    finished = workplace / f"finished-{objective}"
    shutil.copytree(whole, finished)
    rewrite(finished, old)
    done = train(workplace, objective, finished, *flags)
    assert done.returncode == 0 and f"{result_of(whole)['val_bpb']:.4f}" in done.stdout
    assert same_bits(*(log.load_model(folder)[0].state_dict() for folder in (whole, finished)))
    written = [here(workplace, "sample.py", folder, "--length", 8).stdout
               for folder in (whole, finished)]
    assert written[0] == written[1]


@pytest.mark.parametrize("settings", [OLD | {"conv": 4}, {"conv": 4}, {"lookahead": 2}])
def test_a_variant_says_in_one_line_where_it_can_be_read(workplace, uninterrupted, settings):
    """Promise: a run of a variant is not read as a plain one."""
    objective, _, whole = uninterrupted
    folder = workplace / f"variant-{objective}-{len(settings)}-{min(settings)}"
    shutil.copytree(whole, folder)
    rewrite(folder, settings)
    assert_one_line(here(workplace, "sample.py", folder), f"python -m study.sample {folder}")


# ---- What goes wrong in a run.

@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_a_loss_that_is_not_finite_ends_in_one_line(workplace, objective):
    done = train(workplace, objective, f"nan-{objective}", "--flops", 2e9, "--lr", 1000)
    assert_one_line(done, "the loss is not finite at step", "lower --lr")
    assert not (workplace / f"nan-{objective}/result.json").exists()


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()])
def test_memory_that_runs_out_is_one_line(workplace, monkeypatch, error):
    def forward(*arguments, **options):
        raise error
    monkeypatch.setattr(Transformer, "forward", forward)
    done = train(workplace, "ar", type(error).__name__, "--flops", 2e9)
    assert_one_line(done, "out of memory: lower --micro")


def test_without_a_compiler_a_run_is_not_compiled_or_says_what_to_do(workplace, monkeypatch):
    def no_compiler(function, **options):
        raise RuntimeError("no C++ compiler\nmany lines")
    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setitem(run.COMPILE_FROM, "cpu", 0)
    done = train(workplace, "ar", "no-compiler", "--flops", 2e9)
    assert done.returncode == 0 and done.stdout.count("no compiler works here") == 1
    train(workplace, "ar", "eager", "--flops", 2e9, "--compile", "off")
    assert same_bits(weights_of(workplace / "no-compiler"), weights_of(workplace / "eager"))
    forced = train(workplace, "ar", "forced", "--flops", 2e9, "--compile", "on")
    assert_one_line(forced, "no compiler works here", "--compile off")


def test_compiled_training_is_one_graph_and_the_same_training(workplace, monkeypatch):
    """Traced as ever, but no code is generated, which would take a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    for compiled in ("on", "off"):
        train(workplace, "mdm", f"compiled-{compiled}", "--flops", 2e9, "--compile", compiled)
    # One of the model, and one of the function that tries the compiler.
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    bpb = [result_of(workplace / f"compiled-{name}")["val_bpb"] for name in ("on", "off")]
    assert bpb[0] == pytest.approx(bpb[1], rel=1e-3)


def test_a_result_is_not_lost_to_a_figure(workplace, monkeypatch):
    def no_figure(*arguments, **options):
        raise OSError("no space left on device")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", no_figure)
    done = train(workplace, "ar", "no-figure", "--flops", 1e9)
    assert done.returncode == 0 and "note   no figure" in done.stdout
    assert result_of(workplace / "no-figure")["steps"] > 0


# ---- Promise: bad input that a user types ends in one line on stderr and status 2.

BAD = [
    ("--data nowhere", "nowhere"), ("--data empty.txt", "empty"), ("--data small.txt", "small"),
    ("--data damaged.gz", "damaged.gz"), ("--width 100", "100"), ("--width 288", "288"),
    ("--width -64", "width"), ("--width many", "width"), ("--flops 1000", "1000"),
    ("--flops -1", "flops"), ("--flops nan", "flops"), ("--flops inf", "flops"), ("--lr 0", "lr"),
    ("--lr nan", "lr"), ("--context 0", "context"), ("--context 1000000", "1000000"),
    ("--batch 0", "batch"), ("--micro 0", "micro"), ("--seed -1", "seed"),
    ("--tokenizer bpe --vocab 255", "vocab"), ("--tokenizer bpe --vocab 60000", "60000"),
    ("--tokenizer words", "words"), ("--device abacus", "abacus"), ("--device cuda", "cuda"),
    ("--compile perhaps", "perhaps"), ("--nonsense", "nonsense"), ("--shuffle 4", "shuffle"),
    ("--out /proc/nowhere/run", "/proc/nowhere"), ("--out text.txt", "text.txt"),
    (f"--flops 1e30 --width {2**26}", "memory")]


@pytest.mark.parametrize("arguments, word", BAD, ids=[case[0] for case in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(workplace, arguments, word):
    (workplace / "empty.txt").write_bytes(b"")
    (workplace / "small.txt").write_bytes(b"too small")
    (workplace / "damaged.gz").write_bytes(b"\x1f\x8b\x08\x00damaged")
    done = train(workplace, "ar", "refused", "--flops", 2e9, *arguments.split())
    assert_one_line(done, word)
    assert not (workplace / "refused").exists()
    assert not list((workplace / "data").glob(".preparing*"))


# ---- Many processes.

def test_two_processes_train_as_one_and_finish_what_one_began(workplace):
    """Each reads its four sequences in two pieces."""
    flags = ("--batch", 512, "--flops", 4e9)
    train(workplace, "mdm", "of-one", *flags)
    train_half(workplace, "mdm", "of-both", *flags)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc_per_node=2", str(ROOT / "train_mdm.py")]
    arguments = map(str, (*SMALL, *flags, "--micro", 128, "--out", "of-both"))
    done = subprocess.run([*torchrun, *arguments], cwd=workplace, capture_output=True, text=True,
                          timeout=150)
    assert done.returncode == 0 and re.search(r", [1-9]\d* of them done", done.stdout), done.stderr
    # One process speaks.
    assert done.stdout.count("bits per byte on") == 1
    one, two = (workplace / name for name in ("of-one", "of-both"))
    for a, b in zip(log_of(one), log_of(two), strict=True):
        assert float(a["train_bpb"]) == pytest.approx(float(b["train_bpb"]), rel=1e-3)
        assert (a["step"], a["bytes"], a["lr"]) == (b["step"], b["bytes"], b["lr"])
    for name, weight in weights_of(one).items():
        assert torch.allclose(weight, weights_of(two)[name], atol=2e-2)
    assert result_of(two)["val_bpb"] == pytest.approx(result_of(one)["val_bpb"], rel=1e-4)


def test_bad_input_of_many_processes_is_one_line_and_waits_for_nobody(workplace, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(run.dist, "init_process_group", lambda *arguments, **options: None)
    monkeypatch.setattr(run.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(run.os, "_exit", sys.exit)
    assert_one_line(train(workplace, "ar", "refused", "--data", "nowhere"), "nowhere")
    with pytest.raises(data.InputError, match="a batch of 1 sequences is too small"):
        run.split_batch(argparse.Namespace(micro=None), 1, Config(), torch.device("cpu"), 0, 2)


# ---- Devices, and the twins.

def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    opened = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", opened.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert run.pick_device() == torch.device("cuda:3") and opened == ["cuda:3"]
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(data.InputError, match="fewer GPUs than processes"):
        run.pick_device()


def test_no_step_and_no_sample_mixes_two_devices(tmp_path):
    done = execute(tmp_path, "tests/fake_device.py")
    assert done.stdout == "no two devices are mixed\n", done.stderr


def test_the_twins_differ_in_the_objective_alone():
    """Outside the objective's functions, what differs is one word of the model's settings."""
    sources = []
    for name in ("train_ar.py", "train_mdm.py"):
        objective, main = (ROOT / name).read_text().split("# ---- The objective.\n")[1].split(
            "# ---- Training.\n")
        assert re.findall(r"def (\w+)\(", objective) == ["corrupt", "loss", "evaluate"]
        sources.append(main.splitlines())
    lines = [line.strip("+- ") for line in difflib.unified_diff(*sources, n=0, lineterm="")
             if re.match(r"[+-](?![+-])", line)]
    config = "config = Config(tokenizer.vocab_size, context, width, causal={})"
    assert lines == [config.format(True), config.format(False)]
