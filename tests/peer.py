"""Training speed beside nanoGPT's own train.py, and where our time goes.

    git clone https://github.com/karpathy/nanoGPT && python tests/peer.py nanoGPT       # three quarters of an hour on two cores

Both train on bytes of pysrc, in float32 on the CPU, compiled, with the same batch and context and the same number of
parameters: our blocks have 16 width^2 weights and nanoGPT's 12, so it gets 4/3 of our layers. Both are started, then one is frozen while
the other trains, in turns, so that what else the machine does meets both. Then a profile of our steps, by kind of operation.
"""
import argparse
import csv
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))              # not by way of conftest.py, which leaves us one thread
import data
import model

CONTEXT, BATCH = 256, 2048                 # tokens
WIDTHS = {192: (24, 6), 224: (24, 6), 384: (40, 3), 576: (40, 2)}     # turns of each, and how many steps are timed in a turn
KINDS = {"matrix products": r"aten::(mm|addmm)$", "attention": "scaled_dot_product", "fused norms, SiLU, rotations, loss": "CompiledFxGraph|triton",
         "AdamW": "adam", "clipping": "norm|aten::(mul_|stack)"}


def peer_layers(width):
    """Of nanoGPT, to have the weights of ours."""
    return 4 * model.Config(width=width).depth // 3


def start_nanogpt(folder, width):
    """-> (process, a function that reads the seconds of its steps so far)"""
    config = model.Config(256, CONTEXT, width)
    settings = dict(dataset="bytes", out_dir="out", device="cpu", dtype="float32", compile=True, n_layer=peer_layers(width),
                    n_head=config.heads, n_embd=width, block_size=CONTEXT, batch_size=BATCH // CONTEXT, gradient_accumulation_steps=1, eval_iters=1, eval_interval=10**6, log_interval=1)
    output = folder / f"peer-{width}.txt"
    process = subprocess.Popen([sys.executable, "-u", "train.py", *(f"--{key}={value}" for key, value in settings.items())], cwd=folder / "peer", stdout=open(output, "w"), stderr=subprocess.STDOUT)
    return process, lambda: [float(ms) / 1e3 for ms in re.findall(r"iter \d+: .*time ([\d.]+)ms", output.read_text())]


def start_ours(folder, width):
    """The same of a run of ours. Of 190 steps, each is a row of the log."""
    flops, out = 190.5 * model.flops_per_token(model.Config(256, CONTEXT, width)) * BATCH, folder / f"run-{width}"
    process = subprocess.Popen([sys.executable, ROOT / "train_ar.py", "--flops", str(flops), "--width", str(width), "--context", str(CONTEXT), "--batch", str(BATCH),
                                "--compile", "on", "--device", "cpu", "--out", out], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def seconds():
        rows = list(csv.DictReader(open(out / "log.csv"))) if (out / "log.csv").exists() else []
        return np.diff([0.0, *(float(row["seconds"]) for row in rows)]).tolist()
    return process, seconds


def race(folder, width, rounds, count):
    """The median seconds of count steps of nanoGPT's and of ours, in each of so many turns: -> (rounds, 2)"""
    racers, turns = [], []
    try:
        for start in (start_nanogpt, start_ours):
            racers.append(start(folder, width))
            process, steps = racers[-1]
            while len(steps()) < 3:                           # until it has compiled
                assert process.poll() is None, f"a run of width {width} ended with status {process.returncode}"
                time.sleep(0.5)
            process.send_signal(signal.SIGSTOP)
        for turn in range(2 * rounds):
            process, steps = racers[turn % 2]
            process.send_signal(signal.SIGCONT)
            before = len(steps())
            while len(found := steps()) <= before + count:
                assert process.poll() is None, f"a run of width {width} ended with status {process.returncode}"
                time.sleep(0.1)
            process.send_signal(signal.SIGSTOP)
            turns.append(np.median(found[before + 1:]))       # the first was frozen in the middle
    finally:
        for process, _ in racers:
            process.kill()
            process.wait()
    return np.array(turns).reshape(rounds, 2)


def parameters(width):
    """Ours and nanoGPT's, positions included."""
    config = model.Config(256, CONTEXT, width)
    with torch.device("meta"):
        ours = model.Transformer(config).params()
    layers = peer_layers(width)
    return ours, 12 * width**2 * layers + (256 + CONTEXT) * width + (2 * layers + 1) * width


def profile(width, device, steps=3):
    """Shares of the time of our compiled steps, by kind of operation, and what they reach of the matmul peak: -> list of numbers"""
    step, tokens = model.training_step(model.Config(256, CONTEXT, width), BATCH, device)
    seconds, peak = model.seconds_per_call(step, device, steps), model.matmul_peak(device)
    with torch.profiler.profile() as profiler:
        for _ in range(steps):
            step()
    spent = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    shares, total = [], sum(spent.values())
    for pattern in KINDS.values():
        found = {key for key in spent if re.search(pattern, key, re.IGNORECASE)}
        shares.append(sum(spent.pop(key) for key in found) / total)
    return [*shares, sum(spent.values()) / total, model.flops_per_token(model.Config(256, CONTEXT, width)) * tokens / seconds / peak]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nanogpt", type=Path, help="a clone of nanoGPT")
    args = parser.parse_args()
    device = model.pick_device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shutil.copytree(args.nanogpt, folder / "peer", ignore=shutil.ignore_patterns(".git"))
        corpus, home = data.load("pysrc"), folder / "peer/data/bytes"
        home.mkdir()
        for split in ("train", "val"):
            getattr(corpus, split)[:10_000_000].astype(np.uint16).tofile(home / f"{split}.bin")
        (home / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 256}))
        print("| width | parameters, ours | nanoGPT's | step, ours | nanoGPT's | ours is faster by a factor of |\n|---|---|---|---|---|---|")
        for width, (rounds, count) in WIDTHS.items():
            theirs, own = race(folder, width, rounds, count).T
            ratios, counts = theirs / own, parameters(width)
            assert abs(counts[0] / counts[1] - 1) < 0.02
            samples = np.median(np.random.default_rng(0).choice(ratios, (2000, rounds)), axis=1)
            low, high = np.quantile(samples, [0.05, 0.95])    # 90% of bootstrap samples of the turns
            print(f"| {width} | {counts[0]:,} | {counts[1]:,} | {np.median(own):.3f} s | {np.median(theirs):.3f} s | "
                  f"{np.median(ratios):.3f} [{low:.3f}, {high:.3f}], turns from {ratios.min():.2f} to {ratios.max():.2f} |", flush=True)
    print("\n| width | " + " | ".join(KINDS) + " | other | of the matmul peak |\n" + "|---" * (len(KINDS) + 3) + "|")
    for width in WIDTHS:
        print(f"| {width} | " + " | ".join(f"{share:.1%}" for share in profile(width, device)) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
