"""The training scripts, run as a user runs them, on real text: budgets, run folders, interruptions, bad input."""
import csv
import difflib
import json
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from conftest import ROOT, assert_one_line, command, environment, execute, here

import data
import model
import train_ar
import train_mdm

SMALL = ("--data", "text.txt", "--width", 32, "--context", 64, "--batch", 256, "--vocab", 300)
OBJECTIVES = ["ar", "mdm"]
SCRIPT = {"ar": train_ar, "mdm": train_mdm}
RESULT_KEYS = {"objective", "tokenizer", "vocab_size", "flops_budget", "flops_spent", "width", "depth", "context_bytes", "context_tokens",
               "params", "params_non_embedding", "tokens", "bytes", "steps", "batch_tokens", "lr", "seed", "shuffle", "span", "schedule",
               "val_bpb", "val_bpb_stderr", "val_bytes", "corpus", "seconds", "flops_per_second", "device", "torch"}


def train(workplace, objective, out, *arguments, how=here, **extra):
    return how(workplace, f"train_{objective}.py", *SMALL, "--out", out, *arguments, **extra)


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def weights_of(folder):
    return model.load_checkpoint(folder / "checkpoint.pt")["model"]


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("objective, tokenizer", [("ar", "byte"), ("ar", "bpe"), ("mdm", "byte"), ("mdm", "bpe")])
def test_a_cell_trains_to_its_budget(workplace, objective, tokenizer):
    done = train(workplace, objective, f"cell-{objective}-{tokenizer}", "--tokenizer", tokenizer, "--flops", 2e10, how=execute)
    assert done.returncode == 0, done.stderr
    folder = workplace / f"cell-{objective}-{tokenizer}"
    result = result_of(folder)
    assert RESULT_KEYS <= result.keys()
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pt", "log.csv", "loss.png", "result.json"]

    config = model.Config(result["vocab_size"], result["context_tokens"], 32)
    step_flops = model.flops_per_token(config) * result["batch_tokens"]
    assert result["flops_spent"] == result["steps"] * step_flops and 0 <= 2e10 - result["flops_spent"] < step_flops
    assert result["tokens"] == result["steps"] * result["batch_tokens"]
    assert result["bytes"] == result["tokens"] if tokenizer == "byte" else result["bytes"] > 1.5 * result["tokens"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")

    rows = list(csv.DictReader(open(folder / "log.csv")))
    assert list(rows[0]) == ["step", "flops", "bytes", "train_bpb", "val_bpb", "lr", "grad_norm", "seconds"]
    assert int(rows[-1]["step"]) == result["steps"] and int(rows[-1]["flops"]) == result["flops_spent"] and int(rows[-1]["bytes"]) == result["bytes"]
    assert float(rows[-1]["val_bpb"]) == result["val_bpb"]
    validated = [int(row["step"]) / result["steps"] for row in rows if row["val_bpb"]]
    assert validated == pytest.approx([i / 8 for i in range(1, 9)], abs=1 / 200 + 1 / result["steps"])

    # It has learned more than how often each byte occurs, but has not seen the validation text. (MDM takes longer to.)
    text = np.fromfile(workplace / "data/text-byte/val.bin", dtype=np.uint8)
    share = np.bincount(text, minlength=256) / len(text)
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
    assert 1.5 < result["val_bpb"] < entropy + (0 if objective == "ar" else 0.2)
    assert 0 < result["val_bpb_stderr"] < 0.2
    assert f"{result['val_bpb']:.4f}" in done.stdout and "next, " in done.stdout and "epochs" in done.stdout

    if tokenizer == "bpe":                                    # the same command again
        again = train(workplace, objective, f"cell-{objective}-{tokenizer}", "--tokenizer", tokenizer, "--flops", 2e10)
        assert again.returncode == 0 and again.stderr == "" and f"{result['val_bpb']:.4f}" in again.stdout and "steps" not in again.stdout


def test_the_last_validation_is_what_evaluate_says_of_the_checkpoint(workplace):
    train(workplace, "ar", "evaluated", "--flops", 2e9)
    saved, result = model.load_checkpoint(workplace / "evaluated/checkpoint.pt"), result_of(workplace / "evaluated")
    net = model.Transformer(model.Config(256, 64, 32))
    net.load_state_dict(saved["model"])
    stream = np.memmap(workplace / "data/text-byte/val.bin", dtype=np.uint8, mode="r")
    windows = data.Windows(stream, 64).spaced(2 * result["tokens"] // 64)
    bpb, stderr = train_ar.evaluate(net, windows, np.ones(256, dtype=int))
    assert bpb == pytest.approx(result["val_bpb"], rel=1e-5) and stderr == pytest.approx(result["val_bpb_stderr"], rel=1e-5)
    assert result["val_bytes"] == windows.size


def test_default_folder_and_rules(workplace):
    done = here(workplace, "train_ar.py", "--data", "text.txt", "--flops", 2e10, "--seed", 3)
    assert done.returncode == 0, done.stderr
    (folder,) = (workplace / "runs").glob("ar-byte-w*-c2e10-s3-text")
    result = result_of(folder)
    assert result["width"] == 8 and result["batch_tokens"] == 512          # one window: the rule's batch is smaller
    assert result["lr"] == train_ar.LEARNING_RATE["byte"]
    for script, widths in ((train_ar, [8, 48, 576]), (train_mdm, [8, 32, 576])):
        assert [model.nearest_width(script.width_rule(flops)) for flops in (1e9, 3e12, 1e18)] == widths
        assert script.batch_rule(1e13, "bpe") == pytest.approx(script.BATCH["bpe"] * 10**0.3)


def test_shuffle_and_span(workplace):
    plain = train(workplace, "mdm", "plain", "--flops", 2e9)
    one = train(workplace, "mdm", "one", "--flops", 2e9, "--shuffle", 1, "--span", 1)
    assert plain.returncode == one.returncode == 0 and same_bits(weights_of(workplace / "plain"), weights_of(workplace / "one"))
    mixed = train(workplace, "mdm", "mixed", "--flops", 2e9, "--shuffle", 8, "--span", 4, "--schedule", "cosine")
    assert mixed.returncode == 0, mixed.stderr
    result = result_of(workplace / "mixed")
    assert (result["shuffle"], result["span"], result["schedule"]) == (8, 4, "cosine")
    assert result["val_bytes"] == result_of(workplace / "plain")["val_bytes"]
    assert 1.5 < result["val_bpb_span1"] < 9 and result["val_bpb_span1"] != result["val_bpb"]
    bpe = train(workplace, "ar", "bpe-mixed", "--flops", 2e9, "--tokenizer", "bpe", "--shuffle", 7)
    assert bpe.returncode == 0, bpe.stderr


def test_a_large_batch_is_the_sum_of_its_parts(workplace):
    """The same training with a batch read at once and in micro-batches of one window."""
    for name, tokens in (("whole", 8192), ("parts", 64)):
        code = f"import parallel, train_mdm; parallel.MICRO_TOKENS['cpu'] = {tokens}; train_mdm.main()"
        done = subprocess.run([sys.executable, "-c", code, *map(str, SMALL), "--flops", "2e9", "--out", name], cwd=workplace,
                              env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    whole, parts = weights_of(workplace / "whole"), weights_of(workplace / "parts")
    assert result_of(workplace / "whole")["val_bpb"] == pytest.approx(result_of(workplace / "parts")["val_bpb"], rel=1e-3)
    assert all(torch.allclose(whole[name], parts[name], atol=2e-2) for name in whole)


# ---------------------------------------------------------------------------------------------------------------------

LONG = ("--flops", 1e10)


@pytest.fixture(scope="module", params=OBJECTIVES)
def uninterrupted(request, workplace):
    done = train(workplace, request.param, f"whole-{request.param}", *LONG)
    assert done.returncode == 0, done.stderr
    return request.param, weights_of(workplace / f"whole-{request.param}"), result_of(workplace / f"whole-{request.param}")


def start(workplace, objective, out, until):
    """Start a run and wait until it has a checkpoint (until="checkpoint.pt") or a log."""
    running = subprocess.Popen(command(f"train_{objective}.py", *SMALL, "--out", out, *LONG), cwd=workplace, env=environment(),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (workplace / out / until).exists() and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.01)
    assert running.poll() is None
    return running


def assert_finishes_the_same(workplace, out, uninterrupted, word):
    objective, weights, result = uninterrupted
    done = train(workplace, objective, out, *LONG)
    assert done.returncode == 0, done.stderr
    assert word in done.stdout
    assert same_bits(weights_of(workplace / out), weights)
    again = result_of(workplace / out)
    for key in ("val_bpb", "val_bpb_stderr", "bytes", "steps", "flops_spent"):
        assert again[key] == result[key]
    logs = [[{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(open(workplace / name / "log.csv"))]
            for name in (out, f"whole-{objective}")]
    assert logs[0] == logs[1]
    assert sorted(path.name for path in (workplace / out).iterdir() if not path.name.startswith(".")) == \
        ["checkpoint.pt", "log.csv", "loss.png", "result.json"]


def test_kill_9_loses_nothing(workplace, uninterrupted):
    out = f"killed-{uninterrupted[0]}"
    for wait in (0, 0.3):                                     # twice, the second time on the way from the first checkpoint
        running = start(workplace, uninterrupted[0], out, "checkpoint.pt")
        time.sleep(wait)
        running.kill()
        running.communicate()
    assert not (workplace / out / "result.json").exists()
    assert_finishes_the_same(workplace, out, uninterrupted, "steps are done")


def test_ctrl_c_and_sigterm_save_and_stop(workplace, uninterrupted):
    number = signal.SIGINT if uninterrupted[0] == "ar" else signal.SIGTERM
    out = f"stopped-{uninterrupted[0]}-{int(number)}"
    running = start(workplace, uninterrupted[0], out, "log.csv")
    running.send_signal(number)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 128 + number and "Traceback" not in stderr and "stopped and saved at step" in stderr
    saved = model.load_checkpoint(workplace / out / "checkpoint.pt")["state"]["step"]
    assert int(re.search(r"saved at step ([\d,]+)", stderr)[1].replace(",", "")) == saved
    assert_finishes_the_same(workplace, out, uninterrupted, "steps are done")


def test_a_full_disk_keeps_the_last_good_checkpoint(workplace, uninterrupted):
    objective, out = uninterrupted[0], f"full-{uninterrupted[0]}"
    running = start(workplace, objective, out, "checkpoint.pt")
    running.send_signal(signal.SIGTERM)
    running.communicate()
    good = (workplace / out / "checkpoint.pt").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, len(good) // 2))     # no file may grow beyond this
    done = subprocess.run(command(f"train_{objective}.py", *SMALL, "--out", out, *LONG), cwd=workplace, env=environment(),
                          preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "checkpoint.pt" in done.stderr.splitlines()[-1] and "error: " in done.stderr.splitlines()[-1]
    assert (workplace / out / "checkpoint.pt").read_bytes() == good
    assert_finishes_the_same(workplace, out, uninterrupted, "steps are done")


def refused(workplace, objective, arguments, *words):
    assert_one_line(train(workplace, objective, "refused", *arguments), *words)


@pytest.mark.parametrize("damage", [lambda good: good[:len(good) // 2], lambda good: b"", lambda good: b"something else"])
def test_a_torn_checkpoint_is_named_and_kept(workplace, uninterrupted, damage):
    objective = uninterrupted[0]
    out = workplace / f"torn-{objective}"
    out.mkdir(exist_ok=True)
    torn = damage((workplace / f"whole-{objective}/checkpoint.pt").read_bytes())
    (out / "checkpoint.pt").write_bytes(torn)
    refused(workplace, objective, ("--out", out, *LONG), "checkpoint.pt", "torn")
    assert (out / "checkpoint.pt").read_bytes() == torn


def test_a_foreign_checkpoint_or_result_is_named_and_kept(workplace, uninterrupted):
    objective, weights, result = uninterrupted
    out = workplace / f"whole-{objective}"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    refused(workplace, objective, ("--out", out, *LONG, "--lr", 0.5), "result.json", "lr")
    refused(workplace, "mdm" if objective == "ar" else "ar", ("--out", out, *LONG), "result.json", "objective")
    aside = workplace / f"aside-{objective}"
    aside.mkdir()
    for found in ({"settings": {"lr": 1}}, {"weights": torch.zeros(3)}, [1, 2], torch.zeros(3)):
        torch.save(found, aside / "checkpoint.pt")
        content = (aside / "checkpoint.pt").read_bytes()
        refused(workplace, objective, ("--out", aside, *LONG), "checkpoint.pt")
        assert (aside / "checkpoint.pt").read_bytes() == content
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_loss_that_is_not_finite_stops_the_run(workplace, objective):
    done = train(workplace, objective, f"nan-{objective}", "--flops", 2e9, "--lr", 1e30, how=execute)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"error: at step \d+ the loss is \S+ and the gradient norm \S+, at learning rate 1e\+30|error: at step \d+ .* learning rate", done.stderr)
    assert not (workplace / f"nan-{objective}/result.json").exists()
    if (workplace / f"nan-{objective}/checkpoint.pt").exists():
        assert all(tensor.isfinite().all() for tensor in weights_of(workplace / f"nan-{objective}").values())


def test_without_a_compiler_training_goes_on(workplace, tmp_path):
    code = "import train_ar; train_ar.COMPILE_FROM['cpu'] = 0; train_ar.main()"
    done = subprocess.run([sys.executable, "-c", code, *map(str, SMALL), "--flops", "2e9", "--out", "without"], cwd=workplace,
                          env=environment(PYTHONPATH=str(ROOT), CXX="/nonexistent/c++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path)),
                          capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert sum("compiler" in line for line in done.stderr.splitlines()) == 1
    eager = train(workplace, "ar", "eager", "--flops", 2e9, "--compile", "off")
    assert eager.returncode == 0 and same_bits(weights_of(workplace / "without"), weights_of(workplace / "eager"))


def test_compiled_training_is_the_same_training(workplace):
    """To rounding against eager, and to the bit against itself, on two threads; in one graph, compiled once."""
    for out, mode in (("compiled", "on"), ("compiled-again", "on"), ("not-compiled", "off")):
        done = train(workplace, "ar", out, "--flops", 2e9, "--compile", mode, how=execute, OMP_NUM_THREADS="2", TORCH_LOGS="graph_breaks,recompiles")
        assert done.returncode == 0, done.stderr
        assert not re.search("graph break|recompil", done.stderr, re.IGNORECASE), done.stderr
    assert same_bits(weights_of(workplace / "compiled"), weights_of(workplace / "compiled-again"))
    assert result_of(workplace / "compiled")["val_bpb"] == pytest.approx(result_of(workplace / "not-compiled")["val_bpb"], rel=1e-3)


class Reads(TorchDispatchMode):
    """Counts the places where a number leaves a tensor, for which an accelerator would be waited for."""
    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **options or {})


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nothing_is_read_between_steps(workplace, monkeypatch, objective):
    """With two rows in the log a run of 40 steps reads no more numbers than one of 20."""
    monkeypatch.setattr(SCRIPT[objective], "LOG_TIMES", 2)
    step, counts = model.flops_per_token(model.Config(context=64, width=32)) * 256, []
    for steps in (20, 40):
        with Reads() as reads:
            done = train(workplace, objective, f"reads-{objective}-{steps}", "--flops", steps * step)
        assert done.returncode == 0 and result_of(workplace / f"reads-{objective}-{steps}")["steps"] == steps
        counts.append(reads.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bf16_trains_as_float32(workplace, monkeypatch, objective):
    """Autocast as on CUDA: within 1% in bits per byte, all along the run."""
    def autocast(net, inputs, targets):
        with torch.autocast("cpu", torch.bfloat16):
            return model.nats(net, inputs, targets)
    exact = train(workplace, objective, f"float32-{objective}", "--flops", 1e10)
    monkeypatch.setattr(SCRIPT[objective], "nats", autocast)
    rough = train(workplace, objective, f"bf16-{objective}", "--flops", 1e10)
    assert exact.returncode == rough.returncode == 0, rough.stderr
    found = [[(float(row["train_bpb"]), float(row["val_bpb"] or 1)) for row in csv.DictReader(open(workplace / f"{name}-{objective}/log.csv"))]
             for name in ("float32", "bf16")]
    assert found[0] != found[1]
    np.testing.assert_allclose(found[1], found[0], rtol=0.01)


def test_a_budget_for_another_machine_is_called_so(workplace):
    """--flops 1e18 on a CPU: the plan says how long it takes and what to do instead, and training starts all the same."""
    running = subprocess.Popen(command("train_ar.py", "--data", "text.txt", "--flops", "1e18", "--width", 64, "--context", 64, "--device", "cpu",
                                       "--compile", "off", "--out", "months"), cwd=workplace, env=environment(),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (workplace / "months").exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    running.send_signal(signal.SIGTERM)
    stdout, stderr = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM and "Traceback" not in stderr
    assert re.search(r"time   about [\d.,]+ (months|years)", stdout) and "GPU" in stdout and re.search(r"hour is --flops \de\+1\d", stdout)


# ---------------------------------------------------------------------------------------------------------------------

BAD = [
    (["--data", "nowhere"], "nowhere"),
    (["--data", "empty.txt"], "empty"),
    (["--data", "small.txt"], "small"),
    (["--data", "damaged.gz"], "damaged.gz"),
    (["--data", "empty"], "empty"),
    (["--width", "100"], "100"),
    (["--width", "288"], "288"),
    (["--width", "-64"], "width"),
    (["--width", "many"], "width"),
    (["--flops", "1000"], "1000"),
    (["--flops", "-1"], "flops"),
    (["--flops", "nan"], "flops"),
    (["--flops", "inf"], "flops"),
    (["--lr", "0"], "lr"),
    (["--context", "0"], "context"),
    (["--context", "1000000"], "context"),
    (["--batch", "0"], "batch"),
    (["--seed", "-1"], "seed"),
    (["--shuffle", "5"], "5"),
    (["--tokenizer", "bpe", "--vocab", "256"], "256"),
    (["--tokenizer", "bpe", "--vocab", "70000"], "70000"),
    (["--tokenizer", "bpe", "--vocab", "60000"], "60000"),
    (["--tokenizer", "words"], "words"),
    (["--device", "abacus"], "abacus"),
    (["--device", "cuda:77"], "cuda:77"),
    (["--device", "meta"], "meta"),
    (["--out", "/proc/nowhere/run"], "/proc/nowhere"),
    (["--out", "text.txt"], "text.txt"),
    (["--nonsense"], "nonsense"),
]


@pytest.mark.parametrize("arguments, word", BAD + [(["--span", "5"], "5"), (["--span", "0"], "span"), (["--schedule", "none"], "none")])
def test_bad_input_is_one_line_and_leaves_nothing(workplace, monkeypatch, arguments, word):
    """In this process, to be quick; test_bad_input_as_a_command runs some as commands."""
    (workplace / "empty").mkdir(exist_ok=True)
    (workplace / "empty.txt").write_bytes(b"")
    (workplace / "small.txt").write_bytes(b"too small")
    (workplace / "damaged.gz").write_bytes(b"\x1f\x8b\x08\x00damaged")
    monkeypatch.chdir(workplace)
    data.load("text.txt")
    before = set(workplace.rglob("*"))
    objective = "mdm" if arguments[0] in ("--span", "--schedule") else OBJECTIVES[len(word) % 2]
    refused(workplace, objective, ("--flops", 2e9, *arguments), word)
    made = {path for path in set(workplace.rglob("*")) - before if "bpe" not in path.relative_to(workplace).parts[-1]}
    assert not made and not list((workplace / "data").glob(".*"))


@pytest.mark.parametrize("arguments, word", [(["--width", "100"], "100"), (["--data", "nowhere"], "nowhere"), (["--flops", "1000"], "1000")])
def test_bad_input_as_a_command(workplace, arguments, word):
    assert_one_line(execute(workplace, "train_ar.py", *SMALL, "--flops", 2e9, *arguments), word)


# ---------------------------------------------------------------------------------------------------------------------

def test_the_twins_differ_in_the_objective_alone():
    """Outside the functions of the objective, what differs is its name, its flags, and the arguments that they feed."""
    sources = []
    for objective in OBJECTIVES:
        text = (ROOT / f"train_{objective}.py").read_text()
        head, rest = text.split("# The objective.\n")
        functions, settings = rest.split("# Settings.\n")
        assert head.count("\n") < 40 and {"def corrupt(", "def loss(", "def evaluate("} <= set(re.findall(r"def \w+\(", functions))
        sources.append([line.strip() for line in settings.splitlines()])
    lines = [line for line in difflib.unified_diff(*sources, n=0, lineterm="") if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert 0 < len(lines) < 50
    belongs = re.compile(r"for name in|span|schedule|LEARNING_RATE = |BATCH = |width = |return min\(|noise\(|evaluate\(|corrupt\(|causal=")
    assert all(belongs.search(line) for line in lines), [line for line in lines if not belongs.search(line)]
