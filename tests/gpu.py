"""First contact with a GPU: is training right on it, and how fast? Not collected by pytest.

    python tests/gpu.py                     # all of the below; tests/accept.sh does more
    python tests/gpu.py truth               # as on the CPU, compiled as eager, no waiting, memory
    python tests/gpu.py ddp                 # NCCL, DDP's gradients and what it costs
    python tests/gpu.py speed               # the share of the peak at the default batches
    python tests/gpu.py profile variants    # where the time goes; what other compilation gains
    python tests/gpu.py --device cpu        # tiny: does this script itself work?
"""
import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import model  # noqa: E402
import run  # noqa: E402
import train_ar  # noqa: E402
import train_mdm  # noqa: E402

TRAIN = {"ar": train_ar, "mdm": train_mdm}
SHAPES = {"byte": (256, 512), "bpe": (4096, 160)}         # vocabulary, tokens in a sequence
failed = []


def check(name, ok, detail):
    print("ok    " if ok else "FAILED", f"{name}: {detail}", flush=True)
    if not ok:
        failed.append(name)


def shape(device, objective, tokenizer, width):
    """Return the Config of a configuration, a tiny one on a CPU."""
    vocab_size, context = SHAPES[tokenizer]
    if device.type == "cpu":
        vocab_size, context, width = 64, 32, 16
    return model.Config(vocab_size, context, width, objective == "ar")


def by_the_rules(device, objective, tokenizer, flops):
    """Return the Config and the tokens in a batch of the default run of a budget."""
    train = TRAIN[objective]
    config = shape(device, objective, tokenizer, run.default_width(flops, train.WIDTH))
    tokens = train.batch_tokens(flops, tokenizer) if device.type == "cuda" else 64
    return config, config.context * run.whole_sequences(tokens, config.context)


def lively(config):
    """Return a new model whose head is not zero, so that gradients reach all of it."""
    torch.manual_seed(0)
    net = model.Transformer(config)
    torch.nn.init.normal_(net.head.weight, std=0.05)
    return net


def gradients(net, device, inputs, ids, weights):
    """Return the loss, and the gradients of all parameters, on the CPU."""
    net.zero_grad()
    inputs, ids, weights = run.to_device(device, inputs, ids, weights)
    loss = (weights * net(inputs, ids)).mean()
    loss.backward()
    return loss.item(), [p.grad.flatten().cpu() for p in net.parameters()]


def compare(name, one, other, loss_error, least_cosine):
    """Check that two results of gradients() are about the same."""
    cosine = min(F.cosine_similarity(a, b, dim=0).item()
                 for a, b in zip(one[1], other[1], strict=True))
    error = abs(other[0] / one[0] - 1)
    check(name, error < loss_error and cosine > least_cosine,
          f"loss {one[0]:.4f} and {other[0]:.4f}, least cosine of gradients {cosine:.4f}")


def profiled(call, device):
    """Return the kernels that a call runs, with their times."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=kinds) as found:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return found.key_averages()


# -----------------------------------------------------------------------------------------------

def truth(device):
    for objective, train in TRAIN.items():
        for tokenizer in SHAPES:
            config = shape(device, objective, tokenizer, 256)
            ids = torch.randint(config.vocab_size, (4, config.context))
            inputs, weights = train.corrupt(ids, config.vocab_size, run.generator(0, 0))
            batch = inputs, ids, weights
            cpu = gradients(lively(config), torch.device("cpu"), *batch)
            net = lively(config).to(device)
            eager = gradients(net, device, *batch)
            torch.compiler.reset()
            net = torch.compile(net, dynamic=False)
            compiled = gradients(net, device, *batch)
            compare(f"{objective} {tokenizer}: {device} is the CPU in float32", cpu, eager, 3e-3,
                    0.98)
            compare(f"{objective} {tokenizer}: compiled is eager", eager, compiled, 1e-3, 0.99)
    step, _ = model.training_step(shape(device, "ar", "byte", 256), device, 64)
    step()
    if device.type == "cuda":
        names = {event.key for event in profiled(step, device)}
        fused = {name[:70] for name in names
                 if any(word in name.lower() for word in ("sdpa", "flash", "fmha"))}
        check("a fused attention kernel ran", fused, ", ".join(sorted(fused)))
    for objective in TRAIN:
        no_waiting(device, objective)
    memory(device)


def no_waiting(device, objective):
    """Train as a user does, for 40 steps in pieces. It is an error if one waits for the device."""
    def set_mode(mode):
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(mode)

    def start(log, seconds):
        begin(log, seconds)
        set_mode("error")

    def write(*arguments):
        set_mode("default")
        return end(*arguments)

    begin, end = run.Log.start, run.Log.write
    flops = 40.5 * 1024 * model.flops_per_token(model.Config(context=64, width=16))
    arguments = (f"--data text.txt --device {device.type} --context 64 --width 16 --flops {flops} "
                 f"--batch 1024 --micro 640 --compile {'on' if device.type == 'cuda' else 'off'}")
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(stack.enter_context(tempfile.TemporaryDirectory())))
        Path("text.txt").write_bytes(b"".join(path.read_bytes() for path in ROOT.glob("*.py")))
        # One row of the log, after the last step.
        for place, name, value in (
                (run, "LOG_ROWS", 1), (run, "VALIDATIONS", 1), (run.Log, "start", start),
                (run.Log, "write", write), (sys, "argv", ["", *arguments.split()])):
            stack.enter_context(mock.patch.object(place, name, value))
        reason = "40 steps"
        try:
            TRAIN[objective].main()
        except RuntimeError as error:
            reason = str(error)[:200]
        set_mode("default")
    check(f"{objective}: no step waits for the device", reason == "40 steps", reason)


def memory(device):
    """Print the most memory that a step takes at the default --micro."""
    for width in (576, 1024) if device.type == "cuda" else ():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            step, tokens = model.training_step(shape(device, "ar", "byte", width), device,
                                               run.MICRO_TOKENS["cuda"])
            step()
            step()
            most = torch.cuda.max_memory_allocated() / 2**30
            print(f"memory width {width}, {tokens:,} tokens at once: {most:.1f} GiB", flush=True)
        except torch.OutOfMemoryError:
            print(f"memory width {width}: this card needs a lower --micro", flush=True)


def ddp(device):
    """One process, with the process group and DDP that many have."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    began = time.perf_counter()
    dist.barrier()
    print(f"barrier in {1e3 * (time.perf_counter() - began):.1f} ms", flush=True)
    config, tokens = by_the_rules(device, "ar", "byte", 1e18)
    ids = torch.randint(config.vocab_size, (tokens // config.context, config.context))
    inputs, weights = train_ar.corrupt(ids, config.vocab_size)
    args = argparse.Namespace(compile="on" if device.type == "cuda" else "off")
    found, seconds = [], []
    for world_size in (1, 2):
        # Else DDP would run the graph of the plain model, which is not cut into its buckets.
        torch.compiler.reset()
        # wrap() takes DDP from two processes on, whatever the process group.
        net, took = run.wrap(lively(config).to(device), args, [(slice(0, len(ids)), 0)], device,
                             world_size)
        seconds.append(took)
        found.append(gradients(net, device, inputs, ids, weights))
    compare("DDP has the gradients of the plain model", *found, 1e-3, 0.99)
    print(f"a step {1e3 * seconds[0]:.2f} ms, with DDP {1e3 * seconds[1]:.2f} ms", flush=True)
    # DDP must be gone before its process group.
    del net
    dist.destroy_process_group()


def report(name, config, tokens, device, **options):
    """Print the speed of a training step."""
    began = time.perf_counter()
    try:
        flops = model.training_flops(config, device, tokens, **options)
    except torch.OutOfMemoryError:
        return print(f"{name:24} out of memory", flush=True)
    milliseconds = 1e3 * model.flops_per_token(config) * tokens / flops
    print(f"{name:24} width {config.width:5} {tokens:8,} tokens {milliseconds:9.2f} ms "
          f"{flops / 1e12:8.2f} TFLOP/s {flops / model.peak_flops(device):7.1%} of the data sheet, "
          f"measured in {time.perf_counter() - began:.0f} s", flush=True)


def speed(device):
    for objective, tokenizer, flops in (
            ("ar", "byte", 1e15), ("ar", "byte", 1e16), ("ar", "bpe", 1e16), ("mdm", "bpe", 1e16),
            ("ar", "byte", 1e17), ("ar", "byte", 1e18), ("ar", "bpe", 1e18)):
        report(f"{objective} {tokenizer} {flops:.0e}",
               *by_the_rules(device, objective, tokenizer, flops), device)
    for width, tokens in (576, 65536), (1024, 65536), (1664, 16384):
        report("ar byte", shape(device, "ar", "byte", width),
               tokens if device.type == "cuda" else 64, device)


def variants(device):
    for options in {}, {"mode": "reduce-overhead"}, {"mode": "max-autotune-no-cudagraphs"}:
        for flops in 1e16, 1e18:
            report(f"{flops:.0e} {options.get('mode', 'default')[:17]}",
                   *by_the_rules(device, "ar", "byte", flops), device, **options)


# The first that has a word of a kernel's name: kernels of attention may be called cutlass, too.
KINDS = {"attention": ("sdpa", "flash", "fmha", "attention"),
         "matrix products": ("gemm", "nvjet", "cutlass", "aten::mm"), "AdamW": ("adam",),
         "fused by the compiler": ("triton",), "copies": ("memcpy", "memset", "copy")}


def profile_steps(device):
    for flops in 1e16, 1e18:
        config, tokens = by_the_rules(device, "ar", "byte", flops)
        step, _ = model.training_step(config, device, tokens)
        wall = model.seconds_per_call(step, device)
        groups = {}
        for event in profiled(step, device):
            busy = event.self_cpu_time_total
            if device.type == "cuda":
                # Kernels only: what launched them, and spans of steps, have their time once more.
                kernel = event.device_type == torch.autograd.DeviceType.CUDA
                kernel = kernel and not event.is_user_annotation
                busy = event.self_device_time_total if kernel else 0
            kind = next((kind for kind, words in KINDS.items()
                         if any(word in event.key.lower() for word in words)), "other")
            groups[kind] = groups.get(kind, 0) + busy / 1e3
        times = ", ".join(f"{kind} {ms:.2f}" for kind, ms in sorted(groups.items()) if ms)
        print(f"{flops:.0e}: a step takes {1e3 * wall:.2f} ms, the device is busy for "
              f"{sum(groups.values()):.2f} ms: {times}", flush=True)


PARTS = {"truth": truth, "ddp": ddp, "speed": speed, "profile": profile_steps,
         "variants": variants}


def main():
    parser = run.make_parser(__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(unknown)}: take {', '.join(PARTS)}")
    device = run.pick_device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    else:
        print(torch.cuda.get_device_name(), f"torch {torch.__version__}",
              f"cuDNN {torch.backends.cudnn.version()}", flush=True)
    # A dry run compiles nothing.
    with torch._dynamo.config.patch(disable=device.type == "cpu"):
        for part in args.parts or PARTS:
            print(f"== {part}", flush=True)
            PARTS[part](device)
    print(f"{len(failed)} failed: {', '.join(failed)}" if failed else "all as it should be")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run.run_script(main)
