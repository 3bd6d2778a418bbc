"""First contact with a GPU: is training right on it, and how fast? Not collected by pytest.

    python3 tests/gpu.py truth       # as on the CPU, compiled as eager; no step waits for the GPU
    python3 tests/gpu.py ddp         # NCCL, and the gradients under DDP
    python3 tests/gpu.py speed       # sizes of models, FLOP/s, share of what the device can do
    python3 tests/gpu.py variants    # what ideas that are not in model.py would win
    python3 tests/gpu.py profile     # where the time of a step goes
    python3 tests/gpu.py speed --dry # tiny, on a CPU, not compiled: does this file work?
"""
import argparse
import contextlib
import math
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.profiler import profile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import log  # noqa: E402
import run  # noqa: E402
import train_ar  # noqa: E402
import train_mdm  # noqa: E402
from model import Config, Transformer, make_optimizer  # noqa: E402

TRAIN = {"ar": train_ar, "mdm": train_mdm}
DRY = "--dry" in sys.argv
DEVICE = run.pick_device("cpu" if DRY else None)
CUDA = DEVICE.type == "cuda"
CARD = torch.cuda.get_device_name() if CUDA else DEVICE.type
# FLOP/s of bfloat16 matrix products by the data sheets, without sparsity; of a T4 in float32.
DATA_SHEET = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12,
              "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "T4": 8.1e12}
# Vocabulary, and tokens in a sequence.
SHAPES = {"byte": (64, 32), "bpe": (96, 16)} if DRY else {"byte": (256, 512), "bpe": (4096, 160)}
failed = []


def check(step, expected, result, ok):
    """Print a row of the table that tests/accept.sh makes."""
    print(f"| {step} | {expected} | {result} | {'yes' if ok else 'NO'} |", flush=True)
    if not ok:
        failed.append(step)


def config_of(objective, tokenizer, width):
    vocab_size, context = SHAPES[tokenizer]
    return Config(vocab_size, context, 16 if DRY else width, objective == "ar")


def by_the_rules(objective, tokenizer, flops):
    """Return the Config of the default run of a budget, and the sequences in its batch."""
    rules = TRAIN[objective]
    config = config_of(objective, tokenizer, run.default_width(flops, rules.WIDTH))
    batch, _ = run.count_steps(flops, rules.batch_tokens(flops, tokenizer), config)
    return config, 4 if DRY else batch


def new_model(config, device=DEVICE):
    """Return a model whose head is not zero, so that gradients reach all of it."""
    torch.manual_seed(0)
    model = Transformer(config)
    nn.init.normal_(model.head.weight, std=0.05)
    return model.to(device)


def compiled(model, **options):
    """Return the model compiled as run.wrap does it. A dry run compiles nothing."""
    if DRY:
        return model
    # Graphs of earlier models would count towards the limit of recompilations.
    torch.compiler.reset()
    return torch.compile(model, dynamic=False, **options)


def some_batch(objective, config):
    """Return what the model reads, what it predicts, and the weights: (4, T) each."""
    ids = torch.randint(config.vocab_size, (4, config.context))
    inputs, weights = TRAIN[objective].corrupt(ids, config.vocab_size, run.generator(0, 0))
    return inputs, ids, weights


def gradients(net, batch):
    """Return the loss of a batch, and the gradients of all parameters, on the CPU."""
    net.zero_grad()
    inputs, ids, weights = (tensor.to(next(net.parameters()).device) for tensor in batch)
    loss = (weights * net(inputs, ids)).mean()
    loss.backward()
    return loss.item(), [p.grad.flatten().cpu() for p in net.parameters()]


def compare(step, first, second):
    """Check that two results of gradients() are about the same: bfloat16 has 8 bits."""
    cosine = min(F.cosine_similarity(a, b, dim=0).item()
                 for a, b in zip(first[1], second[1], strict=True))
    error = abs(second[0] / first[0] - 1)
    check(step, "loss within 3e-3, cosine of gradients above 0.98",
          f"loss within {error:.1e}, least cosine {cosine:.4f}", error < 3e-3 and cosine > 0.98)


def training_step(config, batch, bf16_residual=False, **compiler):
    """Return a function that makes a training step on so many sequences."""
    model = new_model(config)
    if bf16_residual and not DRY:
        # Under autocast blocks add to a stream of the type that it starts with.
        model.embedding.register_forward_hook(lambda module, inputs, output: output.bfloat16())
    optimizer = make_optimizer(model)
    net = compiled(model, **compiler)
    ids = torch.randint(config.vocab_size, (batch, config.context)).to(DEVICE)          # (B, T)
    pieces = run.split_batch(argparse.Namespace(micro=None), batch, config, DEVICE, 0, 1)

    def step():
        for rows in pieces:
            net(ids[rows], ids[rows]).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def seconds_per_call(call):
    """Return the median time of a call. Calls on a GPU are made ten at a time, without waiting."""
    calls, rounds = (1, 1) if DEVICE.type == "cpu" else (10, 5)
    seconds = []
    # The first round compiles, and is not counted.
    for _ in range(1 + rounds):
        began = time.perf_counter()
        for _ in range(calls):
            call()
        if DEVICE.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append((time.perf_counter() - began) / calls)
    return statistics.median(seconds[1:])


def kernels_of(call):
    """Return what the GPU does for a call, and for how long."""
    with profile() as profiler:
        call()
    events = profiler.key_averages()
    print(events.table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=70))
    # What launched a kernel, and spans of steps, have its time once more.
    return [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA
            and not event.is_user_annotation]


# ---- The parts.

def truth():
    check("versions", "a GPU, torch 2.10 or newer", f"{CARD}, torch {torch.__version__}, Python "
          f"{sys.version.split()[0]}, cuDNN {torch.backends.cudnn.version()}", CUDA or DRY)
    for objective, tokenizer in ("ar", "byte"), ("ar", "bpe"), ("mdm", "byte"), ("mdm", "bpe"):
        config = config_of(objective, tokenizer, 256)
        batch = some_batch(objective, config)
        eager = gradients(new_model(config), batch)
        compare(f"{objective} {tokenizer}: {DEVICE.type} is the CPU in float32",
                gradients(new_model(config, "cpu"), batch), eager)
        # Compiling takes long. These two have all that differs.
        if (objective, tokenizer) in (("ar", "byte"), ("mdm", "bpe")):
            compare(f"{objective} {tokenizer}: compiled is eager", eager,
                    gradients(compiled(new_model(config)), batch))
    step = training_step(config, 4)
    step()
    attention = {kernel.key[:50] for kernel in kernels_of(step)
                 if any(word in kernel.key for word in ("sdpa", "flash", "fmha"))}
    check("attention is one kernel", "a name with sdpa, flash or fmha",
          ", ".join(sorted(attention)), attention or not CUDA)
    waits("ar", "off" if DRY else "on")
    waits("mdm", "off")


def waits(objective, compile):
    """Train as a user does, in pieces. Rows of the log wait for the GPU; steps must not."""
    steps = 20 if DRY else 400
    flops = (steps + 0.5) * 1024 * Config(context=64, width=16).flops_per_token()
    arguments = (f"--device {DEVICE.type} --context 64 --width 16 --flops {flops} --batch 1024 "
                 f"--micro 640 --compile {compile} --out run").split()
    with (tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder),
          mock.patch.object(log, "LOG_ROWS", 1),
          mock.patch.object(sys, "argv", ["", "--data", str(ROOT / "README.md"), *arguments]),
          warnings.catch_warnings(record=True) as warned):
        warnings.simplefilter("always")
        if CUDA:
            torch.cuda.set_sync_debug_mode("warn")
        TRAIN[objective].main()
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")
    count = sum("synchronizing" in str(warning.message) for warning in warned)
    check(f"{objective}: waits for the GPU", f"fewer than the {steps} steps", count, count < steps)


def ddp():
    """Compare the gradients in one process with the DDP that many have."""
    backend = "cpu:gloo,cuda:nccl" if CUDA else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # So large that its gradients come in several buckets, at which DDP cuts the compiled graph.
    config, _ = by_the_rules("ar", "byte", 1e18)
    batch = some_batch("ar", config)
    plain = gradients(new_model(config), batch)
    args = argparse.Namespace(compile="off" if DRY else "on", flops=1e18)
    # wrap() takes DDP from two processes on, whatever the process group.
    net = run.wrap(new_model(config), args, 2)
    compare("DDP, compiled, has the plain gradients", plain, gradients(net, batch))
    # DDP must be gone before its process group.
    del net
    dist.destroy_process_group()


def speed():
    # The share of the data sheet that one H100 should reach: estimates, made without a GPU.
    cases = [(*by_the_rules("ar", "byte", 1e18), 0.36), (*by_the_rules("ar", "bpe", 1e18), 0.36),
             (*by_the_rules("mdm", "byte", 1e17), 0.10), (*by_the_rules("ar", "byte", 1e16), 0.13),
             (config_of("ar", "byte", 1024), 4 if DRY else 64, 0.45)]
    if not CUDA and not DRY:
        cases = [(config_of("ar", "byte", width), 8, math.nan)
                 for width in (32, 64, 128, 192, 256, 384)]
    # Large square matrix products, of the type that training has there.
    dtype = torch.bfloat16 if CUDA and torch.cuda.is_bf16_supported(False) else torch.float32
    size = 64 if DRY else 8192 if CUDA else 2048
    a = torch.randn(size, size, device=DEVICE, dtype=dtype)
    matmul = 2 * size**3 / seconds_per_call(lambda: a @ a)
    peak = next((flops for name, flops in DATA_SHEET.items() if name in CARD), math.nan)
    print(f"matrix products: {matmul / 1e12:.3g} TFLOP/s, by the data sheet {peak / 1e12:.3g}")
    for config, batch, expected in cases:
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_per_call(training_step(config, batch))
        tokens = batch * config.context
        flops = config.flops_per_token() * tokens / seconds
        memory = torch.cuda.max_memory_allocated() / 2**30
        with torch.device("meta"):
            model = Transformer(config)
        name = f"{'AR' if config.causal else 'MDM'}, {config.vocab_size} ids, width {config.width}"
        print(f"{name}: depth {config.depth}, {config.heads} heads, {model.count_params():,} "
              f"parameters ({model.count_params(embedding=False):,} without embeddings), "
              f"{config.flops_per_token():,} FLOPs a token")
        # nan, of an unknown card or a CPU, is not less.
        check(name, f"{expected:.0%} of the data sheet, at least 4/5 of that",
              f"{flops / peak:.1%}; {flops / matmul:.0%} of matrix products; {flops / 1e12:.3g} "
              f"TFLOP/s, {1e3 * seconds:.2f} ms for {tokens:,} tokens, {memory:.1f} GiB",
              not flops / peak < 0.8 * expected)


def variants():
    """Print what two ideas would win. One that wins 3% at 1e17 and above is worth its lines."""
    ideas = {"bf16 residual": {"bf16_residual": True}, "CUDA graphs": {"mode": "reduce-overhead"}}
    for flops in 1e17, 1e18:
        shape = by_the_rules("ar", "byte", flops)
        plain = seconds_per_call(training_step(*shape))
        for name, options in ideas.items():
            seconds = seconds_per_call(training_step(*shape, **options))
            print(f"| {name} at {flops:g} | 1.03 times as fast, to be kept | "
                  f"{plain / seconds:.3f}: {1e3 * plain:.2f} and {1e3 * seconds:.2f} ms | "
                  f"{'keep' if plain / seconds >= 1.03 else 'drop'} |", flush=True)


def profile_step():
    step = training_step(*by_the_rules("ar", "byte", 1e18))
    seconds = seconds_per_call(step)
    busy = sum(kernel.self_device_time_total for kernel in kernels_of(step)) / 1e6
    check("AR at 1e18: the GPU is busy", "9/10 of the time",
          f"{1e3 * busy:.2f} of {1e3 * seconds:.2f} ms", busy > 0.9 * seconds or not CUDA)


PARTS = {"truth": truth, "ddp": ddp, "speed": speed, "variants": variants, "profile": profile_step}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--dry", action="store_true", help="tiny, on a CPU, not compiled")
    for part in parser.parse_args().parts:
        print(f"== {part}", flush=True)
        PARTS[part]()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    run.run_script(main)
