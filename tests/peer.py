"""Training speed beside nanoGPT's own train.py, and where our time goes.

    git clone https://github.com/karpathy/nanoGPT && python tests/peer.py nanoGPT       # a quarter of an hour on two cores

Both train on bytes of pysrc, in float32 on a CPU (bf16 on CUDA), compiled, with the same batch and context and the same number of
parameters: our blocks have 16 width^2 weights and nanoGPT's 12, so it gets 4/3 of our layers. Runs take turns, and what is compared is
the median step. Then a profile of our steps, by kind of operation.
"""
import argparse
import csv
import json
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT

import data
import model

CONTEXT, BATCH = 256, 4096                 # tokens
WIDTHS = {192: 24, 384: 12, 576: 6}        # and how many steps are timed
KINDS = {"matrix products": r"aten::(mm|addmm)$", "attention": "scaled_dot_product", "fused norms, SiLU, rotations, loss": "CompiledFxGraph|triton",
         "AdamW": "adam", "clipping": "norm|aten::(mul_|stack)"}



def nanogpt(folder, width, steps, device):
    """Its parameters (without positions) and median seconds a step, as it prints them."""
    config = model.Config(256, CONTEXT, width)
    layers, rest = divmod(4 * config.depth, 3)
    assert rest == 0, "a width of which 4/3 of the depth is whole"
    settings = dict(dataset="bytes", out_dir="out", device=device.type, dtype="bfloat16" if device.type == "cuda" else "float32", compile=True, n_layer=layers,
                    n_head=config.heads, n_embd=width, block_size=CONTEXT, batch_size=BATCH // CONTEXT, gradient_accumulation_steps=1, max_iters=steps + 4,
                    eval_iters=1, eval_interval=10**6, log_interval=1)
    done = subprocess.run([sys.executable, "train.py", *(f"--{key}={value}" for key, value in settings.items())], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    times = [float(ms) / 1e3 for ms in re.findall(r"iter \d+: .*time ([\d.]+)ms", done.stdout)]
    decayed, other = re.findall(r"with ([\d,]+) parameters", done.stdout)
    return sum(int(number.replace(",", "")) for number in (decayed, other)), np.median(times[4:])


def ours(folder, width, steps, device):
    """Our parameters and median seconds a step, as the log has them."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    flops = (steps + 4.5) * model.flops_per_token(model.Config(256, CONTEXT, width)) * BATCH
    done = subprocess.run([sys.executable, ROOT / "train_ar.py", "--flops", str(flops), "--width", str(width), "--context", str(CONTEXT), "--batch", str(BATCH),
                           "--compile", "on", "--device", device.type, "--out", folder / "run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    times = [float(row["seconds"]) for row in csv.DictReader(open(folder / "run/log.csv"))]
    return json.loads((folder / "run/result.json").read_text())["params"], np.median(np.diff(times)[3:])


def profile(width, device, steps=3):
    """Shares of the time of our compiled steps, by kind of operation, and what they reach of the matmul peak: -> list of numbers"""
    step, tokens = model.training_step(model.Config(256, CONTEXT, width), BATCH, device)
    seconds, peak = model.seconds_per_call(step, device, steps), model.matmul_peak(device)
    with torch.profiler.profile() as profiler:
        for _ in range(steps):
            step()
        model.synchronize(device)
    spent = {event.key: event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total for event in profiler.key_averages()}
    shares, total = [], sum(spent.values())
    for pattern in KINDS.values():
        found = {key for key in spent if re.search(pattern, key, re.IGNORECASE)}
        shares.append(sum(spent.pop(key) for key in found) / total)
    return [*shares, sum(spent.values()) / total, model.flops_per_token(model.Config(256, CONTEXT, width)) * tokens / seconds / peak]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nanogpt", type=Path, help="a clone of nanoGPT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = model.pick_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shutil.copytree(args.nanogpt, folder / "peer", ignore=shutil.ignore_patterns(".git"))
        corpus, home = data.load("pysrc"), folder / "peer/data/bytes"
        home.mkdir()
        for split in ("train", "val"):
            getattr(corpus, split)[:10_000_000].astype(np.uint16).tofile(home / f"{split}.bin")
        (home / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 256}))
        print("| width | parameters, ours | nanoGPT's | step, ours | nanoGPT's | ours is faster by a factor of |\n|---|---|---|---|---|---|")
        for width, steps in WIDTHS.items():
            pairs = [(nanogpt(folder / "peer", width, steps, device), ours(folder, width, steps, device)) for _ in range(args.rounds)]
            ratios = [peer[1] / own[1] for peer, own in pairs]
            (params, _), (own_params, _) = pairs[0]
            print(f"| {width} | {own_params:,} | {params:,} | {np.median([own[1] for _, own in pairs]):.3f} s | {np.median([peer[1] for peer, _ in pairs]):.3f} s | "
                  f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |", flush=True)
    print("\n| width | " + " | ".join(KINDS) + " | other | of the matmul peak |\n" + "|---" * (len(KINDS) + 3) + "|")
    for width in WIDTHS:
        print(f"| {width} | " + " | ".join(f"{share:.1%}" for share in profile(width, device)) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
