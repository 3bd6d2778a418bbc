"""The training scripts, run as a user runs them, on real text."""
import argparse
import csv
import difflib
import itertools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line, command, execute, here
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model
import run
import train_ar
import train_mdm

SMALL = ("--data", "text.txt", "--width", 32, "--context", 64, "--batch", 256, "--vocab", 300)
LONG = ("--flops", 6e9)
FILES = ["checkpoint.pt", "log.csv", "loss.png", "result.json"]


def train(workplace, objective, out, *arguments, how=here, **options):
    return how(workplace, f"train_{objective}.py", *SMALL, "--out", out, *arguments, **options)


def train_with(workplace, change, objective, *arguments, **variables):
    """Start a training command in a process of its own in which a constant of run.py is changed."""
    code = f"import run, train_{objective}; {change}; run.run_script(train_{objective}.main)"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=workplace,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"PYTHONPATH": str(ROOT)} | variables)


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def weights_of(folder):
    return run.load_checkpoint(folder / "checkpoint.pt")["model"]


def log_of(folder):
    with open(folder / "log.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"}
                for row in csv.DictReader(file)]


def files_of(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def unigram_entropy(folder):
    counts = np.bincount(np.fromfile(folder / "val.bin", dtype=np.uint8), minlength=256)
    share = counts[counts > 0] / counts.sum()
    return -(share * np.log2(share)).sum()


# -----------------------------------------------------------------------------------------------
# A run, from the command to its folder.

@pytest.mark.parametrize("objective, tokenizer", [
    ("ar", "byte"), ("ar", "bpe"), ("mdm", "byte"), ("mdm", "bpe")])
def test_a_configuration_trains_to_its_budget(workplace, objective, tokenizer):
    out = f"run-{objective}-{tokenizer}"
    arguments = (objective, out, "--tokenizer", tokenizer, "--flops", 1e10)
    done = train(workplace, *arguments, how=execute)
    assert done.returncode == 0, done.stderr
    assert files_of(workplace / out) == FILES
    result, rows = result_of(workplace / out), log_of(workplace / out)
    assert {"params", "params_non_embedding", "schedule", "span", "device"} <= result.keys()

    config = model.Config(result["vocab_size"], result["context_tokens"], 32)
    step_flops = model.flops_per_token(config) * result["batch_tokens"]
    assert result["flops_spent"] == result["steps"] * step_flops
    assert 0 <= 1e10 - result["flops_spent"] < step_flops
    assert result["tokens"] == result["steps"] * result["batch_tokens"]
    bytes_per_token = result["bytes"] / result["tokens"]
    assert bytes_per_token == 1 if tokenizer == "byte" else bytes_per_token > 1.5

    assert [int(rows[-1][key]) for key in ("step", "flops", "bytes")] == [
        result[key] for key in ("steps", "flops_spent", "bytes")]
    assert float(rows[-1]["val_bpb"]) == result["val_bpb"]
    validated = [int(row["step"]) / result["steps"] for row in rows if row["val_bpb"]]
    expected = [i / 8 for i in range(1, 9)]
    assert validated == pytest.approx(expected, abs=1 / 200 + 1 / result["steps"])

    # It has learned more than how often each byte occurs, but not seen the text. MDM is slower.
    (folder,) = (workplace / "data").glob("text-*byte")
    slack = 0 if objective == "ar" else 0.3
    assert 1.5 < result["val_bpb"] < unigram_entropy(folder) + slack
    assert 0 < result["val_bpb_stderr"] < 0.2
    assert f"{result['val_bpb']:.4f}" in done.stdout and "epochs" in done.stdout

    again = train(workplace, *arguments)
    assert again.returncode == 0 and again.stderr == "" and "steps" not in again.stdout
    assert f"{result['val_bpb']:.4f}" in again.stdout


def test_the_result_is_what_evaluate_says_of_the_checkpoint(workplace):
    train(workplace, "ar", "evaluated", "--flops", 2e9)
    net, settings, tokenizer = run.load_model(workplace / "evaluated")
    result = result_of(workplace / "evaluated")
    (folder,) = (workplace / "data").glob("text-*byte")
    stream = np.memmap(folder / "val.bin", dtype=np.uint8, mode="r")
    sequences = data.Sequences(stream, 64).spaced(2 * result["tokens"] // 64)
    bpb, stderr = train_ar.evaluate(net, sequences, tokenizer.bytes_per_id)
    assert bpb == pytest.approx(result["val_bpb"], rel=1e-5)
    assert stderr == pytest.approx(result["val_bpb_stderr"], rel=1e-5)
    assert result["val_bytes"] == sequences.size and settings["seed"] == 0


def test_the_default_folder_and_settings_follow_from_the_budget(workplace):
    done = here(workplace, "train_ar.py", "--data", "text.txt", "--flops", 5e9, "--lr", 0.005)
    assert done.returncode == 0, done.stderr
    result = result_of(workplace / "runs/ar-byte-w8-c5e9-s0-lr0.005-text")
    # One sequence: the rule's batch is smaller.
    assert result["width"] == 8 and result["batch_tokens"] == 512
    for script, widths in ((train_ar, [8, 48, 576]), (train_mdm, [8, 32, 576])):
        found = [run.default_width(flops, script.WIDTH) for flops in (1e9, 3e12, 1e18)]
        assert found == widths
        assert script.batch_tokens(1e12, "bpe") == script.BATCH["bpe"]
    # Batches grow as C^0.3; that of MDM on bytes only from 3e14 on.
    assert train_ar.batch_tokens(1e14, "byte") == pytest.approx(512 * 100**0.3)
    assert train_mdm.batch_tokens(1e14, "bpe") == pytest.approx(320 * 100**0.3)
    assert train_mdm.batch_tokens(3e14, "byte") == 512
    assert train_mdm.batch_tokens(3e17, "byte") == pytest.approx(512 * 1000**0.3)


def test_the_text_follows_from_the_budget_alone():
    assert [run.choose_data(None, flops) for flops in (1e12, 1.5e15)] == ["pysrc", "pysrc"]
    assert [run.choose_data(None, flops) for flops in (1.6e15, 1e16)] == ["c4:1", "c4:2"]
    for flops in (1e16, 1e18, 1e20):
        chosen = run.choose_data(None, flops)
        assert chosen == run.choose_data("c4", flops)
        shards, size = int(chosen.removeprefix("c4:")), data.SHARDS["c4"][1]
        widths = {run.default_width(flops, script.WIDTH) for script in (train_ar, train_mdm)}
        needs = [run.bytes_needed(flops, width, tokenizer, 4096, 512)
                 for width in widths for tokenizer in ("byte", "bpe")]
        assert (shards - 1) * size < 1.1 * max(needs) <= shards * size
    assert run.choose_data("c4:7", 1e20) == "c4:7" and run.choose_data("enwik8", 1e20) == "enwik8"


@pytest.mark.parametrize("objective, tokenizer", [("ar", "byte"), ("mdm", "bpe")])
def test_without_a_network_a_large_budget_says_what_to_do(tmp_path, monkeypatch, objective,
                                                          tokenizer):
    def no_network(*arguments, **options):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", no_network)
    done = here(tmp_path, f"train_{objective}.py", "--flops", 1e18, "--tokenizer", tokenizer)
    assert_one_line(done, "c4-train.00000", "no network", "--data PATH", "--data pysrc")


def test_the_plan_notes_what_a_large_budget_should_know():
    def words(flops, epochs, kind="cpu", bf16=False, ranks=1):
        settings = {"flops_budget": flops, "batch_tokens": 32256, "corpus": {"train_bytes": 1e9}}
        return run.notes(settings, epochs, torch.device(kind), bf16, ranks)
    assert words(1e13, 3.9) == words(1e14, 0.1, "cuda", True, 2) == []
    (repeats,) = words(1e13, 4.1)
    assert "arXiv 2305.16264" in repeats and "--data c4:7 " in repeats
    # The next note would be that it is repeated.
    assert data.SHARDS["c4"][1] * 7 > 4.1e9
    (untuned,) = words(4e14, 1)
    assert "beyond 3e14 FLOPs" in untuned and "extrapolated" in untuned
    (old_card,) = words(1e14, 1, "cuda")
    assert "float32" in old_card
    (idle,) = words(1e14, 1, "cuda", True, 4)
    assert "only 8,064 tokens" in idle


# -----------------------------------------------------------------------------------------------
# CUDA, without a GPU.

@pytest.mark.parametrize("native", [True, False])
def test_a_card_without_bf16_of_its_own_takes_float32_and_a_smaller_budget(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or native)
    monkeypatch.setattr(run, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    args = argparse.Namespace(device=None, width=None, seed=0, flops=None, data=None, lr=None,
                              tokenizer="byte")
    run.setup(args, train_ar.LEARNING_RATE)
    assert args.flops == (1e15 if native else 1e14) and args.data == "pysrc"
    assert model.Transformer(model.Config(width=16)).bf16 == native


@pytest.mark.parametrize("name, index", [(None, 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_is_opened_by_its_number(monkeypatch, name, index):
    opened = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", opened.append, raising=False)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)
    assert run.pick_device(name).type == "cuda" and opened == [index]


def test_processes_on_a_mac_are_refused(monkeypatch):
    monkeypatch.setattr(run, "pick_device", lambda name: torch.device("mps"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(data.InputError, match="add --device cpu"):
        run.setup(argparse.Namespace(device=None), train_ar.LEARNING_RATE)


def test_no_step_and_no_sample_mixes_two_devices(tmp_path):
    done = execute(tmp_path, "tests/fake_device.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no two devices are mixed") == 6


def test_a_driver_that_is_too_old_is_named(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    # Hidden on purpose, as in all tests.
    assert run.pick_device().type == "cpu" and capsys.readouterr().err == ""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for version, reason in ("13.0", "driver too old"), (None, "without CUDA"):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert run.pick_device().type == "cpu"
        assert re.fullmatch(f"note .*{reason}.*CPU is used\n", capsys.readouterr().err)
    monkeypatch.setenv("RANK", "1")
    assert run.pick_device().type == "cpu" and capsys.readouterr().err == ""


def test_more_processes_than_gpus_are_refused_by_all_of_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    # The first has a GPU. It is the one that prints.
    for rank in ("0", "7"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(run.InputError, match="--nproc_per_node=8: this machine has 4 GPUs"):
            run.pick_device()


def test_a_text_that_has_changed_is_named(tmp_path):
    result = {"val_bpb": 2.0, "steps": 9, "corpus": {"name": "pysrc", "sha256": "old"}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    with pytest.raises(run.InputError, match="is of another text: pysrc is not what it was"):
        run.read(tmp_path / "result.json", {"corpus": {"name": "pysrc", "sha256": "new"}})


def test_the_script_for_the_first_gpu_works(workplace):
    done = here(workplace, "gpu.py", "--device", "cpu")
    assert done.returncode == 0 and done.stdout.endswith("all as it should be\n"), done.stdout
    assert done.stdout.count("no step waits for the device") == 2


def test_a_large_batch_is_a_multiple_of_eight_sequences():
    wanted = {1: 1, 7: 7, 63: 63, 64: 64, 67: 64, 251: 248, 563: 560, 1123: 1120}
    assert {count: run.whole_sequences(count * 160, 160) for count in wanted} == wanted


def test_shuffle_span_and_schedule_are_applied(workplace):
    train(workplace, "mdm", "plain", "--flops", 2e9)
    train(workplace, "mdm", "ones", "--flops", 2e9, "--shuffle", 1, "--span", 1,
          "--permutation", 0, "--phase", 0, "--span-share", 1)
    assert same_bits(weights_of(workplace / "plain"), weights_of(workplace / "ones"))
    mixed = train(workplace, "mdm", "mixed", "--flops", 2e9, "--shuffle", 8, "--span", 4,
                  "--schedule", "cosine")
    assert mixed.returncode == 0, mixed.stderr
    result = result_of(workplace / "mixed")
    assert (result["shuffle"], result["span"], result["schedule"]) == (8, 4, "cosine")
    assert result["val_bytes"] == result_of(workplace / "plain")["val_bytes"]
    assert 1.5 < result["val_bpb_span1"] < 9 and result["val_bpb_span1"] != result["val_bpb"]


def test_phase_permutation_and_span_share_are_applied(workplace):
    flags = ("--flops", 2e9, "--shuffle", 8, "--span", 4)
    weights = []
    for i, more in enumerate(((), ("--phase", 8), ("--permutation", 1), ("--span-share", 0.5))):
        done = train(workplace, "mdm", f"control-{i}", *flags, *more)
        assert done.returncode == 0, done.stderr
        weights.append(weights_of(workplace / f"control-{i}"))
        result = result_of(workplace / f"control-{i}")
        assert more == () or result[more[0][2:].replace("-", "_")] == more[1]
        assert 1.5 < result["val_bpb_span1"] < 9
    for a, b in itertools.combinations(weights, 2):
        assert not torch.equal(a["embedding.weight"], b["embedding.weight"])
    net, settings, _ = run.load_model(workplace / "control-1")
    assert settings["phase"] == 8 and net.phase_embedding.weight.shape == (8, 32)
    # Training has moved it, with the rates of an embedding.
    torch.manual_seed(0)
    new = model.Transformer(net.config).phase_embedding.weight
    assert ((net.phase_embedding.weight - new).abs() > 1e-4).float().mean() > 0.9


def test_a_result_from_before_a_flag_counts_as_finished(workplace):
    train(workplace, "ar", "older", "--flops", 2e9)
    result = result_of(workplace / "older")
    for key in ("permutation", "phase", "span_share"):
        del result[key]
    (workplace / "older/result.json").write_text(json.dumps(result))
    done = train(workplace, "ar", "older", "--flops", 2e9)
    assert done.returncode == 0 and f"{result['val_bpb']:.4f}" in done.stdout
    refused = train(workplace, "ar", "older", "--flops", 2e9, "--phase", 8)
    assert_one_line(refused, "its phase is 0, not 8")


@pytest.mark.parametrize("sequences", [2, 7, 31, 251, 563, 1123])
@pytest.mark.parametrize("context", [160, 512])
@pytest.mark.parametrize("micro", [8192, 65536, 262144])
def test_a_batch_is_read_in_equal_pieces_as_few_as_fit(sequences, context, micro):
    args, config = argparse.Namespace(micro=micro), model.Config(context=context)
    read = []
    for rank in (0, 1):
        parts = run.split_batch(args, sequences, config, rank, 2, torch.device("cpu"))
        sizes = {rows.stop - rows.start for rows, _ in parts}
        own, fit = (rank + 1) * sequences // 2 - rank * sequences // 2, micro // context
        assert len(sizes) == 1 and max(sizes) <= fit and len(parts) == -(-own // fit)
        read += [i for rows, repeated in parts for i in range(rows.start + repeated, rows.stop)]
    assert read == list(range(sequences))


def test_a_gpu_reads_fewer_than_2_to_the_31_logits_at_once():
    for vocab_size, tokens in ((256, 65536), (4096, 65536), (65536, 32256)):
        config = model.Config(vocab_size, 512)
        ((rows, _), *_) = run.split_batch(argparse.Namespace(micro=None), 10**6, config, 0, 1,
                                          torch.device("cuda"))
        assert tokens - 512 < (rows.stop - rows.start) * 512 <= tokens
        assert (rows.stop - rows.start) * 512 * vocab_size < 2**31


@pytest.mark.parametrize("micro", [64, 640])
def test_a_batch_in_pieces_trains_as_one(workplace, micro):
    """16 sequences one by one, and as two times 8 where 10 would fit; 5 of 13 twice, in part."""
    for batch in (1024, 832):
        arguments = ("--flops", 2e9, "--batch", batch)
        train(workplace, "mdm", f"whole-{batch}", *arguments)
        done = train(workplace, "mdm", f"{micro}-{batch}", *arguments, "--micro", micro)
        assert done.returncode == 0, done.stderr
        whole, parts = (workplace / f"{name}-{batch}" for name in ("whole", micro))
        assert result_of(whole)["val_bpb"] == pytest.approx(result_of(parts)["val_bpb"], rel=1e-3)
        a, b = weights_of(whole), weights_of(parts)
        assert all(torch.allclose(a[name], b[name], atol=2e-2) for name in a)


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_batches_drawn_ahead_train_to_the_same_bits(workplace, monkeypatch, objective):
    train(workplace, objective, f"between-{objective}", "--flops", 2e9)
    ahead, threads = run.ahead, set()

    def on_a_gpu(draw, steps, device):
        def noted(step):
            threads.add(threading.current_thread().name)
            return draw(step)
        return ahead(noted, steps, torch.device("cuda"))
    monkeypatch.setattr(run, "ahead", on_a_gpu)
    done = train(workplace, objective, f"ahead-{objective}", "--flops", 2e9)
    assert done.returncode == 0 and threads and threading.main_thread().name not in threads
    a, b = (workplace / f"{name}-{objective}" for name in ("between", "ahead"))
    assert same_bits(weights_of(a), weights_of(b)) and log_of(a) == log_of(b)


def test_one_batch_is_drawn_ahead_and_none_beyond_the_end():
    drawn, last_drawn = [], []
    for step, value in run.ahead(lambda step: drawn.append(step) or 10 * step, range(3, 7),
                                 torch.device("cuda")):
        assert value == 10 * step
        time.sleep(0.05)
        last_drawn.append(drawn[-1])
    assert drawn == [3, 4, 5, 6] and last_drawn == [4, 5, 6, 6]
    assert list(run.ahead(drawn.append, range(7, 7), torch.device("cuda"))) == []


# -----------------------------------------------------------------------------------------------
# Interruptions.

@pytest.fixture(scope="module", params=["ar", "mdm"])
def uninterrupted(request, workplace):
    done = train(workplace, request.param, f"whole-{request.param}", *LONG)
    assert done.returncode == 0, done.stderr
    return request.param, workplace / f"whole-{request.param}"


def start(workplace, objective, out):
    """Start a run that saves at every row of its log, and wait for its first checkpoint."""
    running = train_with(workplace, "run.SAVE_SECONDS = 0", objective, *SMALL, "--out", out, *LONG)
    while not (workplace / out / "checkpoint.pt").exists():
        assert running.poll() is None, running.communicate()
        time.sleep(0.01)
    return running


def assert_resumes_to_the_same(workplace, out, uninterrupted):
    objective, whole = uninterrupted
    done = train(workplace, objective, out, *LONG)
    assert done.returncode == 0, done.stderr
    assert "of them done" in done.stdout
    assert same_bits(weights_of(workplace / out), weights_of(whole))
    result, expected = result_of(workplace / out), result_of(whole)
    for key in ("val_bpb", "val_bpb_stderr", "bytes", "steps", "flops_spent"):
        assert result[key] == expected[key]
    assert log_of(workplace / out) == log_of(whole)
    assert files_of(workplace / out) == FILES


def test_a_run_killed_twice_resumes_to_the_bit(workplace, uninterrupted):
    out = f"killed-{uninterrupted[0]}"
    for wait in (0, 0.3):
        running = start(workplace, uninterrupted[0], out)
        time.sleep(wait)
        running.kill()
        running.communicate()
    assert not (workplace / out / "result.json").exists()
    assert_resumes_to_the_same(workplace, out, uninterrupted)


def test_ctrl_c_and_sigterm_end_a_run_with_one_line(workplace, uninterrupted):
    number = {"ar": signal.SIGINT, "mdm": signal.SIGTERM}[uninterrupted[0]]
    out = f"stopped-{uninterrupted[0]}"
    running = start(workplace, uninterrupted[0], out)
    running.send_signal(number)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 130 and "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("interrupted (the same command resumes a run)")
    assert_resumes_to_the_same(workplace, out, uninterrupted)


def test_a_full_disk_keeps_the_last_checkpoint(workplace, uninterrupted):
    objective, out = uninterrupted[0], f"full-{uninterrupted[0]}"
    running = start(workplace, objective, out)
    running.kill()
    running.communicate()
    good = (workplace / out / "checkpoint.pt").read_bytes()

    def no_large_file():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, len(good) // 2))
    done = train(workplace, objective, out, *LONG, how=execute, preexec_fn=no_large_file)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "checkpoint.pt: no space left" in last
    assert (workplace / out / "checkpoint.pt").read_bytes() == good
    assert_resumes_to_the_same(workplace, out, uninterrupted)


def test_a_second_process_is_kept_out_of_a_run_folder(workplace):
    """The first is frozen in the middle of its run, the second must not touch its files."""
    running = start(workplace, "ar", "shared")
    running.send_signal(signal.SIGSTOP)
    try:
        before = (workplace / "shared/checkpoint.pt").read_bytes()
        second = train(workplace, "ar", "shared", *LONG, how=execute)
        assert_one_line(second, "shared is in use by process", str(running.pid))
        assert (workplace / "shared/checkpoint.pt").read_bytes() == before
    finally:
        running.send_signal(signal.SIGCONT)
        running.kill()
        running.communicate()
    # The lock is gone with its process.
    assert train(workplace, "ar", "shared", *LONG).returncode == 0


def test_checkpoints_take_at_most_three_percent_of_the_time(workplace, monkeypatch):
    saves = []

    def slow_save(self):
        saves.append(self.step)
        self.last_save = run.time.monotonic()
        self.save_seconds = 0.5
    monkeypatch.setattr(run, "SAVE_SECONDS", 0)
    monkeypatch.setattr(run.Log, "save", slow_save)
    done = train(workplace, "ar", "slow-disk", "--flops", 1e10)
    assert done.returncode == 0, done.stderr
    # The first, and the last; between them 16 seconds would have to pass.
    assert len(saves) == 2


# -----------------------------------------------------------------------------------------------
# Damaged and foreign files.

def damaged(good):
    """Return a checkpoint with a few flipped bytes in the middle of its weights."""
    middle = len(good) // 2
    return good[:middle] + bytes(255 - b for b in good[middle:middle + 400]) + good[middle + 400:]


@pytest.mark.parametrize("damage", [
    damaged, lambda good: good[:len(good) // 2], lambda good: good[:-1], lambda good: b"",
    lambda good: b"something else"])
def test_a_corrupt_checkpoint_is_named_and_kept(workplace, uninterrupted, damage):
    objective, whole = uninterrupted
    out = workplace / f"corrupt-{objective}"
    out.mkdir(exist_ok=True)
    bad = damage((whole / "checkpoint.pt").read_bytes())
    (out / "checkpoint.pt").write_bytes(bad)
    done = train(workplace, objective, out, *LONG)
    assert_one_line(done, "checkpoint.pt is corrupt", "delete it")
    assert (out / "checkpoint.pt").read_bytes() == bad


def test_a_foreign_checkpoint_or_result_is_named_and_kept(workplace, uninterrupted):
    objective, whole = uninterrupted
    other = "mdm" if objective == "ar" else "ar"
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert_one_line(train(workplace, objective, whole, *LONG, "--lr", 0.5), "result.json", "lr")
    assert_one_line(train(workplace, other, whole, *LONG), "result.json", "objective")
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before

    aside = workplace / f"aside-{objective}"
    aside.mkdir()
    good = run.load_checkpoint(whole / "checkpoint.pt")
    far = good | {"log": good["log"] | {"step": 10**9}}
    without = {key: value for key, value in good.items() if key != "optimizer"}
    for found in (far, without, {"weights": torch.zeros(3)}, [1, 2], torch.zeros(3)):
        torch.save(found, aside / "checkpoint.pt")
        assert_one_line(train(workplace, objective, aside, *LONG), "checkpoint.pt")
    (aside / "checkpoint.pt").unlink()
    for text in ("[]", "{}", '{"val_bpb": "low"}', "{"):
        (aside / "result.json").write_text(text)
        assert_one_line(train(workplace, objective, aside, *LONG), "result.json", "corrupt")


class Bomb:
    def __reduce__(self):
        return print, ("code in a checkpoint was run",)


def test_no_code_in_a_checkpoint_is_run(tmp_path, capsys):
    torch.save({"model": Bomb()}, tmp_path / "torch.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    for name in ("torch.pt", "pickle.pt"):
        with pytest.raises(data.InputError, match=name):
            run.read(tmp_path / name)
    assert "was run" not in capsys.readouterr().out


def test_a_model_that_is_not_the_results_is_not_loaded(workplace):
    train(workplace, "ar", "loaded", "--flops", 2e9)
    path = workplace / "loaded/checkpoint.pt"
    good = run.load_checkpoint(path)
    torch.save(good | {"log": good["log"] | {"step": 3}}, path)
    with pytest.raises(data.InputError, match="of step 3"):
        run.load_model(workplace / "loaded")
    good["model"]["norm.weight"][0] = torch.nan
    torch.save(good, path)
    with pytest.raises(data.InputError, match="not finite"):
        run.load_model(workplace / "loaded")


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_a_loss_that_is_not_finite_stops_the_run(workplace, objective):
    done = train(workplace, objective, f"nan-{objective}", "--flops", 2e9, "--lr", 1000)
    assert done.returncode == 2
    assert re.search(r"the loss is not finite .* step \d+, .*: lower --lr", done.stderr)
    assert not (workplace / f"nan-{objective}/result.json").exists()
    if (workplace / f"nan-{objective}/checkpoint.pt").exists():
        weights = weights_of(workplace / f"nan-{objective}").values()
        assert all(tensor.isfinite().all() for tensor in weights)


@pytest.mark.parametrize("name", ["$\\foo$", b"\xff".decode(errors="surrogateescape")])
def test_the_result_is_written_even_if_its_figure_cannot_be(workplace, monkeypatch, name):
    def no_figure(path, rows):
        raise ValueError("no such font")
    monkeypatch.setattr(run, "plot", no_figure)
    done = train(workplace, "ar", name, "--flops", 1e9)
    assert done.returncode == 0 and "no loss.png: no such font" in done.stderr
    assert result_of(workplace / name)["steps"] > 0


# -----------------------------------------------------------------------------------------------
# Compilation and devices.

def test_without_a_compiler_a_run_is_not_compiled(workplace, tmp_path):
    without = {"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    running = train_with(workplace, "run.COMPILE_FROM['cpu'] = 0", "ar", *SMALL, "--flops", 2e9,
                         "--out", "without", **without)
    stdout, stderr = running.communicate(timeout=100)
    assert running.returncode == 0 and "Traceback" not in stderr, stderr
    assert sum("no compiler works here" in line for line in stderr.splitlines()) == 1
    train(workplace, "ar", "eager", "--flops", 2e9, "--compile", "off")
    assert same_bits(weights_of(workplace / "without"), weights_of(workplace / "eager"))
    forced = train(workplace, "ar", "forced", "--flops", 2e9, "--compile", "on", how=execute,
                   env=os.environ | without)
    assert_one_line(forced, "--compile on: no compiler works here")


def test_memory_that_runs_out_while_compiling_is_not_a_lack_of_a_compiler(workplace, monkeypatch):
    class Full:
        def __call__(self, *arguments):
            reason = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            raise torch._dynamo.exc.BackendCompilerFailed("inductor", reason, None)
    monkeypatch.setattr(torch, "compile", lambda net, dynamic: Full())
    monkeypatch.setitem(run.COMPILE_FROM, "cpu", 0)
    done = train(workplace, "ar", "too-full", "--flops", 2e9)
    assert_one_line(done, "out of memory: in training, lower --micro")


def test_compiled_training_is_one_graph_and_the_same_training(workplace):
    logs = os.environ | {"TORCH_LOGS": "graph_breaks,recompiles", "OMP_NUM_THREADS": "2"}
    flags = ("--flops", 1e9, "--micro", 64)
    train(workplace, "mdm", "not-compiled", *flags, "--compile", "off")
    for out in ("compiled", "compiled-again"):
        done = train(workplace, "mdm", out, *flags, "--compile", "on", how=execute, env=logs)
        assert done.returncode == 0, done.stderr
        assert not re.search("graph break|recompil", done.stderr, re.IGNORECASE), done.stderr
    assert same_bits(weights_of(workplace / "compiled"), weights_of(workplace / "compiled-again"))
    compiled, eager = (result_of(workplace / out)["val_bpb"]
                       for out in ("compiled", "not-compiled"))
    assert compiled == pytest.approx(eager, rel=1e-3)


class Reads(TorchDispatchMode):
    """Count where a number leaves a tensor, which is where an accelerator would be waited for."""
    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **options or {})


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_no_number_is_read_between_rows_of_the_log(workplace, monkeypatch, objective):
    monkeypatch.setattr(run, "LOG_ROWS", 2)
    monkeypatch.setattr(run, "VALIDATIONS", 2)
    step_flops = model.flops_per_token(model.Config(context=64, width=32)) * 256
    counts = []
    for steps in (20, 40):
        out = f"reads-{objective}-{steps}"
        with Reads() as reads:
            done = train(workplace, objective, out, "--flops", steps * step_flops)
        assert done.returncode == 0 and result_of(workplace / out)["steps"] == steps
        counts.append(reads.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_bf16_trains_like_float32(workplace, monkeypatch, objective):
    exact = train(workplace, objective, f"float32-{objective}", "--flops", 1e10)
    forward = model.Transformer.forward

    def autocast(self, *arguments, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return forward(self, *arguments, **options)
    monkeypatch.setattr(model.Transformer, "forward", autocast)
    rough = train(workplace, objective, f"bf16-{objective}", "--flops", 1e10)
    assert exact.returncode == rough.returncode == 0, rough.stderr
    curves = []
    for name in ("float32", "bf16"):
        rows = log_of(workplace / f"{name}-{objective}")
        curves.append([(float(row["train_bpb"]), float(row["val_bpb"] or 1)) for row in rows])
    assert curves[0] != curves[1]
    np.testing.assert_allclose(curves[1], curves[0], rtol=0.01)


def test_a_budget_for_a_larger_machine_is_called_so(workplace):
    """The plan of --flops 1e18 on a CPU is printed before a step is made, and training starts."""
    running = subprocess.Popen(
        command("train_ar.py", "--data", "text.txt", "--flops", "1e18", "--width", 64,
                "--context", 64, "--compile", "off", "--out", "years"),
        cwd=workplace, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = [running.stdout.readline() for _ in range(5)]
    running.send_signal(signal.SIGTERM)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 130 and "Traceback" not in stderr
    assert re.search(r"about [\d,.]+ hours", lines[3])
    assert lines[4].startswith("note") and re.search(r"--flops \de1\d", lines[4])


# -----------------------------------------------------------------------------------------------
# Bad input.

BAD = [
    ("--data nowhere", "nowhere"), ("--data empty.txt", "empty"), ("--data small.txt", "small"),
    ("--data damaged.gz", "damaged.gz"), ("--width 100", "100"), ("--width 288", "288"),
    ("--width -64", "width"), ("--width many", "width"), (f"--width {'9' * 400}", "width"),
    ("--flops 1000", "1000"), ("--flops -1", "flops"), ("--flops nan", "flops"),
    ("--flops inf", "flops"), ("--flops 1e308", "flops"), ("--lr 0", "lr"), ("--lr nan", "lr"),
    ("--context 0", "context"), ("--context 1000000", "1000000"), ("--batch 0", "batch"),
    (f"--batch {'9' * 400}", "batch"), ("--seed -1", "seed"), (f"--seed {2**64}", "seed"),
    ("--shuffle 5", "5"), ("--tokenizer bpe --vocab 256", "256"), ("--device abacus", "abacus"),
    ("--tokenizer bpe --vocab 60000", "60000"), ("--tokenizer words", "words"),
    ("--device cuda:77", "cuda:77"), ("--device meta", "meta"), ("--nonsense", "nonsense"),
    ("--out /proc/nowhere/run", "/proc/nowhere"), ("--out text.txt", "text.txt"),
    ("--flops 1e30 --width 65536", "memory"), ("--span 5", "5"), ("--span 0", "span"),
    ("--schedule none", "none"), ("--phase -1", "phase"), ("--phase 65", "65"),
    ("--phase 4 --patch 4", "--patch"), ("--phase 1.5", "phase"), ("--permutation 1", "--shuffle"),
    ("--permutation -1", "permutation"), ("--permutation 1 --shuffle 2", "blocks of 2"),
    ("--span-share 0.5", "--span"), ("--span-share 0 --span 4", "span-share"),
    ("--span-share 1.5 --span 4", "span-share"), ("--span-share nan --span 4", "span-share")]


@pytest.mark.parametrize("arguments, word", BAD, ids=[case[0][:30] for case in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(workplace, arguments, word):
    (workplace / "empty.txt").write_bytes(b"")
    (workplace / "small.txt").write_bytes(b"too small")
    (workplace / "damaged.gz").write_bytes(b"\x1f\x8b\x08\x00damaged")
    here(workplace, "train_ar.py", *SMALL, "--flops", 1e9, "--out", "whatever")
    before = set(workplace.rglob("*"))
    objective = "mdm" if arguments.startswith(("--span", "--schedule")) else "ar"
    done = here(workplace, f"train_{objective}.py", *SMALL, "--flops", 2e9, "--out", "refused",
                *arguments.split())
    assert_one_line(done, word)
    made = set(workplace.rglob("*")) - before
    assert not [path for path in made if "refused" not in str(path) and "bpe" not in str(path)]


def test_an_empty_out_is_refused(workplace):
    assert_one_line(here(workplace, "train_ar.py", *SMALL, "--out", ""), "--out", "empty")


def test_a_closed_terminal_does_not_stop_a_run(workplace):
    script = " ".join(map(str, command("train_ar.py", *SMALL, "--flops", "1e9", "--out", "mute")))
    done = subprocess.run(f"{script} 2>&- >&-", shell=True, cwd=workplace)
    assert done.returncode == 0 and (workplace / "mute/result.json").exists()


# -----------------------------------------------------------------------------------------------
# Many processes.

PARALLEL = ("--data", "text.txt", "--width", 16, "--context", 64, "--batch", 512, "--vocab", 300)


def torchrun(workplace, processes, script, *arguments, **options):
    """Run a training script on so many processes. Return a CompletedProcess."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                f"--nproc_per_node={processes}", str(ROOT / script), *map(str, arguments)]
    return subprocess.run(launcher, cwd=workplace, capture_output=True, text=True, timeout=150,
                          **options)


def assert_same_run(a, b):
    """Assert that two runs are the same to the tolerance of float32."""
    columns = ("step", "flops", "bytes", "train_bpb", "lr", "grad_norm")
    curves = [[[float(row[key]) for key in columns] for row in log_of(folder)]
              for folder in (a, b)]
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-3, atol=1e-4)
    one, two = result_of(a), result_of(b)
    assert two["val_bpb"] == pytest.approx(one["val_bpb"], rel=1e-4)
    assert (two["bytes"], two["batch_tokens"]) == (one["bytes"], one["batch_tokens"])


def test_three_processes_train_as_one(workplace):
    """They share eight sequences as 2, 3 and 3."""
    arguments = (*PARALLEL, "--flops", 3e9)
    here(workplace, "train_mdm.py", *arguments, "--out", "one")
    done = torchrun(workplace, 3, "train_mdm.py", *arguments, "--out", "three")
    assert done.returncode == 0, done.stderr
    # One process speaks.
    assert done.stdout.count("bits per byte on") == 1
    assert_same_run(workplace / "one", workplace / "three")


def test_two_compiled_processes_train_as_one_without_a_graph_break(workplace):
    """DDP stands outside of what is compiled. Each reads its sequences in several pieces."""
    arguments = (*PARALLEL, "--flops", 3e9, "--tokenizer", "bpe")
    here(workplace, "train_ar.py", *arguments, "--out", "one-bpe")
    # Traced as ever, but no code is generated.
    code = ("import functools, torch, run, train_ar; "
            "torch.compile = functools.partial(torch.compile, backend='aot_eager'); "
            "run.run_script(train_ar.main)")
    (workplace / "traced.py").write_text(code)
    logs = {"PYTHONPATH": str(ROOT), "TORCH_LOGS": "graph_breaks,recompiles,dynamo"}
    done = torchrun(workplace, 2, workplace / "traced.py", *arguments, "--compile", "on",
                    "--micro", 64, "--out", "two-bpe", env=os.environ | logs)
    assert done.returncode == 0 and "torchdynamo" in done.stderr, done.stderr
    assert not re.search("graph break|recompil|Warning", done.stderr, re.IGNORECASE), done.stderr
    assert_same_run(workplace / "one-bpe", workplace / "two-bpe")


def test_a_run_of_two_processes_is_finished_by_one(workplace):
    arguments = (*PARALLEL, "--flops", 3e9)
    here(workplace, "train_ar.py", *arguments, "--out", "unmoved")
    # A run of two that is stopped by an error in the middle, after a checkpoint.
    code = ("import run, train_ar; run.SAVE_SECONDS = 0; run.Log.finish = lambda *a: 1 / 0; "
            "run.run_script(train_ar.main)")
    (workplace / "stops.py").write_text(code)
    stopped = torchrun(workplace, 2, workplace / "stops.py", *arguments, "--out", "moved",
                       env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert stopped.returncode != 0 and not (workplace / "moved/result.json").exists()
    done = here(workplace, "train_ar.py", *arguments, "--out", "moved")
    assert done.returncode == 0 and "of them done" in done.stdout
    assert_same_run(workplace / "unmoved", workplace / "moved")


@pytest.mark.parametrize("width, buckets", [(64, 1), (576, 8), (1216, 8)])
def test_gradients_are_exchanged_in_about_eight_buckets(monkeypatch, width, buckets):
    given = {}
    monkeypatch.setattr(run, "DistributedDataParallel", lambda net, **how: given.update(how) or net)
    with torch.device("meta"):
        net = model.Transformer(model.Config(width=width))
    run.wrap(net, argparse.Namespace(compile="off"), [(slice(0, 1), 0)], torch.device("meta"), 2)
    exact = 4 * net.count_params() / 2**20 / given.pop("bucket_cap_mb")
    assert math.ceil(exact) == buckets
    assert given == {"gradient_as_bucket_view": True, "forward_sync_buffers": False}


def test_processes_that_resume_at_different_steps_are_told_so(tmp_path, monkeypatch):
    """A second machine without the disk of the first begins at step 0."""
    monkeypatch.setattr(run.dist, "is_initialized", lambda: True)
    config = model.Config(width=16)
    net = model.Transformer(config)

    def resume(others):
        def all_reduce(steps, operation):
            steps.copy_(torch.maximum(steps, torch.tensor([others, -others])))
        monkeypatch.setattr(run.dist, "all_reduce", all_reduce)
        return run.Log(tmp_path, {"batch_tokens": 64}, 1, net, model.make_optimizer(net), None, 1)
    assert resume(0).step == 0
    with pytest.raises(data.InputError, match="a disk that all machines share"):
        resume(100)


def test_bad_input_of_many_processes_is_told_by_one(workplace):
    for arguments, words in ((("--batch", 128), "too small for 3 processes: --batch 192"),
                             (("--data", "nowhere"), "nowhere")):
        done = torchrun(workplace, 3, "train_ar.py", *PARALLEL, *arguments, "--out", "few")
        ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode != 0 and len(ours) == 1 and words in ours[0], done.stderr
        # The one traceback is torchrun's own.
        assert done.stderr.count("Traceback") == 1, done.stderr
    assert not (workplace / "few").exists()


# -----------------------------------------------------------------------------------------------

def test_the_twins_differ_in_the_objective_alone():
    """Outside the objective's functions, what differs is its name, its settings and its flags."""
    sources = []
    for name in ("train_ar.py", "train_mdm.py"):
        text = (ROOT / name).read_text()
        head, rest = text.split("# The objective.\n")
        objective, main = rest.split("# Training.\n")
        assert {"corrupt", "loss", "evaluate"} <= set(re.findall(r"def (\w+)\(", objective))
        sources.append(main.splitlines())
    lines = [line for line in difflib.unified_diff(*sources, n=0, lineterm="")
             if re.match(r"[+-](?![+-])", line)]
    belongs = re.compile(r"span|schedule|parser|args = |options|more|time\"\)|evaluate\(|"
                         r"log.finish|bound of")
    assert 0 < len(lines) < 30
    assert all(belongs.search(line) for line in lines), lines
