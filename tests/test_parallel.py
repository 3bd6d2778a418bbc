"""One run on many processes: the same curve as on one, whoever stops it and whoever goes on; and a batch that does not fit into memory."""
import csv
import json
import signal
import subprocess
import sys
import time

import pytest
import torch

import model
import train_ar
import train_mdm
from conftest import ROOT, environment, here
from parallel import Team
from run import InputError

SMALL = ("--data", "text.txt", "--width", 16, "--context", 64, "--batch", 512, "--flops", 3e9)


def torchrun(processes, script, *arguments):
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0", "--standalone", str(ROOT / script), *map(str, arguments)]


def curve(folder):
    return [[float(row[key]) for key in ("step", "flops", "bytes", "train_bpb", "lr", "grad_norm")] for row in csv.DictReader(open(folder / "log.csv"))]


def assert_same_run(a, b):
    """To float tolerance."""
    torch.testing.assert_close(torch.tensor(curve(a)), torch.tensor(curve(b)), rtol=1e-3, atol=1e-4)
    one, two = (json.loads((folder / "result.json").read_text()) for folder in (a, b))
    assert two["val_bpb"] == pytest.approx(one["val_bpb"], rel=1e-4) and two["bytes"] == one["bytes"] and two["batch_tokens"] == one["batch_tokens"]


@pytest.mark.parametrize("objective, processes, tokenizer", [("ar", 2, "bpe"), ("mdm", 3, "byte")])
def test_many_processes_train_as_one(workplace, objective, processes, tokenizer):
    """Three share eight windows as 2, 3 and 3."""
    cell = (*SMALL, "--tokenizer", tokenizer, "--vocab", 300)
    alone, name = f"one-{objective}-{tokenizer}", f"{processes}-{objective}-{tokenizer}"
    assert here(workplace, f"train_{objective}.py", *cell, "--out", alone).returncode == 0
    done = subprocess.run(torchrun(processes, f"train_{objective}.py", *cell, "--out", name), cwd=workplace, env=environment(), capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bits per byte on") == 1         # one process speaks
    assert_same_run(workplace / alone, workplace / name)


def test_a_run_goes_on_with_another_number_of_processes(workplace):
    """Stopped on two, finished by one, as if one had done all."""
    long = (*SMALL[:-1], 1e10)
    running = subprocess.Popen(torchrun(2, "train_ar.py", *long, "--out", "moved"), cwd=workplace, env=environment(), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not (workplace / "moved/checkpoint.pt").exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode != 0 and stderr.count("stopped and saved at step") == 1, stderr
    assert not (workplace / "moved/result.json").exists()
    finished, whole = (here(workplace, "train_ar.py", *long, "--out", out) for out in ("moved", "unmoved"))
    assert finished.returncode == whole.returncode == 0 and "steps are done" in finished.stdout
    assert_same_run(workplace / "unmoved", workplace / "moved")


def test_too_few_windows_for_the_processes(workplace):
    done = subprocess.run(torchrun(3, "train_ar.py", *SMALL, "--batch", 128, "--out", "few"), cwd=workplace, env=environment(), capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.count("error: a batch of 2 windows is too small for 3 processes") == 1
    assert not (workplace / "few").exists()


# ---------------------------------------------------------------------------------------------------------------------

def memory_for(windows, score=model.nats):
    """A score that runs out of memory on more windows at once."""
    def limited(net, inputs, targets):
        if len(inputs) > windows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(net, inputs, targets)
    return limited


@pytest.mark.parametrize("fits, pieces", [(8, 8), (4, 4), (3, 2), (1, 1)])
def test_what_does_not_fit_is_summed_over_smaller_pieces(fits, pieces):
    net, ids = model.Transformer(model.Config(context=32, width=32, causal=False)), torch.randint(256, (8, 32))
    torch.nn.init.normal_(net.head.weight)
    inputs, weights = train_mdm.corrupt(ids, 256, train_mdm.noise(0, 0))
    found = {}
    for windows in (8, fits):
        team = Team(torch.device("cpu"))
        team.wrap(net)
        team.share(8, net.config)
        loss = team.backward(memory_for(windows), inputs, weights, ids)
        found[windows] = [loss, *(p.grad.clone() for p in net.parameters())]
        net.zero_grad()
    assert team.micro == pieces
    torch.testing.assert_close(found[8], found[fits], rtol=1e-4, atol=1e-6)


def test_the_pieces_are_chosen_to_fit_a_gpu(monkeypatch):
    """80 GB: the small model reads all that MICRO_TOKENS allows; the one of 1.2B parameters reads fewer, and a batch in equal pieces."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80e9, 80e9))
    for width, pieces in ((576, 32), (1664, 4)):
        team, config = Team(torch.device("cuda")), model.Config(32768, 2048, width)
        team.share(128, config)
        always, window = model.memory(config)
        assert team.micro == pieces and always + pieces * window < 80e9


def test_one_window_that_does_not_fit():
    team, net, ids = Team(torch.device("cpu")), model.Transformer(model.Config(context=32, width=32)), torch.randint(256, (4, 32))
    team.wrap(net)
    team.share(4, net.config)
    with pytest.raises(InputError, match="do not fit"):
        team.backward(memory_for(0), *train_ar.corrupt(ids, 256), ids)


def test_memory_runs_out_in_a_real_run(workplace, monkeypatch):
    """In the middle of training, too: the same result in smaller pieces."""
    whole = here(workplace, "train_ar.py", *SMALL, "--out", "roomy")
    calls = []

    def score(net, inputs, targets):
        calls.append(len(inputs))
        return memory_for(8 if len(calls) < 20 else 2)(net, inputs, targets)
    monkeypatch.setattr(train_ar, "nats", lambda net, inputs, targets: score(net, inputs, targets) if torch.is_grad_enabled() else model.nats(net, inputs, targets))
    tight = here(workplace, "train_ar.py", *SMALL, "--out", "tight")
    assert whole.returncode == tight.returncode == 0, tight.stderr
    assert 8 in calls and calls[-1] == 2
    assert_same_run(workplace / "roomy", workplace / "tight")
