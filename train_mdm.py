"""Train a masked diffusion Transformer to a FLOP budget: masked tokens are predicted from those left in sight.

    python train_mdm.py                                     # bytes of pysrc; a minute or two on a CPU
    python train_mdm.py --tokenizer bpe --flops 1e13
    python train_mdm.py --schedule cosine --span 4 --out runs/spans

The same command again continues an interrupted run, to the bit on a CPU, and prints the result of a finished one.
Its twin is train_ar.py: `diff train_ar.py train_mdm.py` shows the objective and nothing else.
"""
import argparse
import math
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import data
import run
from download import with_shards
from model import (Config, Transformer, flops_per_byte, flops_per_token, load_checkpoint, make_optimizer, nats, nearest_width, pick_device,
                   save_checkpoint, seconds_per_call)
from parallel import Team

OBJECTIVE = "mdm"


# ---------------------------------------------------------------------------------------------------------------------
# The objective.

def corrupt(ids, spare, generator, schedule="linear", span=1):
    """Mask windows (B, T): -> the ids with MASK in places (B, T), and the weight of each token's nats (B, T), 0 where it is seen.

    The bound on -log p (MDLM, arXiv 2406.07524; SMDM): mask every token with probability m(u), u ~ U(0, 1), and weigh the
    nats of the masked ones by m'(u) / m(u). Only how many are masked matters for the weight, so we draw that number k and
    take the mean of the weight given k: less variance, the same expectation. With R tokens (or runs of span tokens),
    k = ceil(R m(u)) has P(k) = m^-1(k / R) - m^-1((k-1) / R), and the weight is 1 / (k P(k)): for every schedule the sum
    over k is that of E_{k ~ U{1..R}} [R / k * nats]. The times u are spread evenly over the windows, each uniform by itself.
    Raises InputError if span does not divide T.
    """
    B, T = ids.shape
    if span < 1 or T % span:
        raise run.InputError(f"spans of {span} tokens do not divide a window of {T}")
    R = T // span
    times = (torch.arange(B, dtype=torch.float64) / B + torch.rand(1, generator=generator, dtype=torch.float64)) % 1     # (B,)
    if schedule == "linear":
        rate, inverse = times, lambda m: m
    else:
        rate, inverse = torch.cos(math.pi / 2 * (1 - times)), lambda m: 1 - 2 / math.pi * torch.arccos(m)
    k = (R * rate).ceil().clamp(1, R)
    weight = 1 / (k * (inverse(k / R) - inverse((k - 1) / R)))
    # A random order of the runs: those with a rank below k are masked, a uniform choice of k.
    masked = (torch.rand(B, R, generator=generator).argsort(dim=1) < k[:, None]).repeat_interleave(span, dim=1)
    weights = torch.where(masked, weight[:, None], 0.0).float()
    return torch.where(masked.to(ids.device), spare, ids), weights.to(ids.device)


def noise(seed, step):
    """The generator of a step's masks, a pure function of its arguments."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0]))


def loss(model, ids, generator, schedule="linear", span=1):
    """Mean nats per token over the windows ids (B, T), integers in [0, vocab_size): an unbiased estimate of the bound on
    the negative log-likelihood. generator: a torch.Generator on the CPU."""
    inputs, weights = corrupt(ids, model.config.vocab_size, generator, schedule, span)
    return (weights * nats(model, inputs, ids)).mean()


@torch.no_grad()
def evaluate(model, windows, bytes_per_id, size=4, span=1, seed=0):
    """Bits per byte of windows (N, T), an array of ids, by the order-agnostic bound, and its standard error: -> (bpb, stderr).

    E_{k ~ U{1..R}} [R / k * nats of k masked runs], with k stratified over the windows, which are put in random order first.
    The error is that of the differences between neighbours in k, since the spread over k is no error. size: windows read at
    once. seed: of the masks, the same for all models, so that they can be compared.
    """
    generator, device = torch.Generator().manual_seed(seed), next(model.parameters()).device
    ids = torch.from_numpy(windows)[torch.randperm(len(windows), generator=generator)]
    inputs, weights = corrupt(ids, model.config.vocab_size, generator, span=span)
    # Few at once: the logits of 16 windows of BPE are more than malloc keeps, and took 2.3 times as long on a CPU.
    scored = torch.cat([nats(model, inputs[i:i + size].to(device), ids[i:i + size].to(device)).cpu()
                        for i in range(0, len(ids), size)])
    bits = (weights * scored).sum(dim=1).double().numpy() / math.log(2)                             # (N,)
    nbytes = bytes_per_id[ids.numpy()].sum(axis=1)
    bpb = bits.sum() / nbytes.sum()
    steps = np.diff(bits - bpb * nbytes)                                                            # (N - 1,)
    return float(bpb), float((len(bits) * (steps**2).mean() / 2) ** 0.5 / nbytes.sum())


# ---------------------------------------------------------------------------------------------------------------------
# Settings.

DEFAULT_FLOPS = {"cpu": 3e12, "mps": 1e14, "cuda": 1e16}     # a minute or two
# Tuned at width 32 and 1e12 FLOPs by `python scaling.py --study tune`; the rate serves all widths, batches grow as C^0.3.
LEARNING_RATE = {"byte": 0.0015, "bpe": 0.0015}
BATCH = {"byte": 512, "bpe": 320}         # tokens at 1e12 FLOPs
COMPILE_FROM = {"cpu": 1e13, "mps": math.inf, "cuda": 1e15}  # FLOPs from which a run is long enough to pay for compilation
VAL_BYTES = 2**20            # of validation text that the final BPB is measured on (at most twice the tokens trained on)
VAL_TIMES = 8                # validations in a run; those before the last read 1/16 of that text
LOG_TIMES = 200              # rows in log.csv
SAVE_SECONDS = 60            # between checkpoints, beside those at every validation


def width_rule(flops):
    """The compute-optimal width, before rounding: that of the study in the README, and no more than takes SMDM's smallest model to 1e18."""
    return min(22 * (flops / 1e12) ** 0.35, 576 * (flops / 1e18) ** (1 / 6))


def batch_rule(flops, tokenizer):
    """Tokens in a batch."""
    return BATCH[tokenizer] * (flops / 1e12) ** 0.3


def lr_schedule(step, steps):
    """The learning rate at a step as a fraction of its peak: a linear warm-up over 5% of the steps, then a cosine to 10%."""
    warmup = max(1, round(0.05 * steps))
    return min(1, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = run.usage_error
    parser.add_argument("--flops", type=float, help="training budget (default: by device, a minute or two)")
    parser.add_argument("--tokenizer", choices=("byte", "bpe"), default="byte")
    parser.add_argument("--vocab", type=int, default=4096, help="tokens in the BPE vocabulary (4096)")
    parser.add_argument("--width", type=int, help="model width (default: near compute-optimal for the budget)")
    parser.add_argument("--context", type=int, default=512, help="bytes of text in a window (512)")
    parser.add_argument("--data", default="pysrc", help="pysrc (default), enwik8, enwik9, c4, slimpajama, or a file or folder")
    parser.add_argument("--batch", type=int, help="tokens in a batch (default: by the budget)")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: the tuned one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shuffle", type=int, default=1, help="permute the order within blocks of this many bytes (1: no)")
    parser.add_argument("--schedule", choices=("linear", "cosine"), default="linear", help="how the mask rate follows the time")
    parser.add_argument("--span", type=int, default=1, help="mask aligned runs of this many tokens (1)")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/..., named by the settings)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or mps (default: the best there is)")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    args = parser.parse_args()
    args.device = pick_device(args.device)
    if args.flops is None:
        args.flops = DEFAULT_FLOPS[args.device.type]
    for name in ("flops", "width", "context", "batch", "lr", "shuffle", "span"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise run.InputError(f"--{name} is a positive number, not {value}")
    if args.seed < 0:
        raise run.InputError(f"--seed is not negative: {args.seed}")
    data.check_vocab(args.vocab)
    # The settings that are not the defaults, for the name of the run folder.
    args.extras = "".join(f"-{name}{value}" for name in ("vocab", "context", "batch", "lr", "shuffle", "schedule", "span")
                          if (value := getattr(args, name)) != parser.get_default(name))
    args.lr = args.lr or LEARNING_RATE[args.tokenizer]
    return args


def main():
    args = parse_args()
    team = Team(args.device)
    device = team.device
    width = args.width or nearest_width(width_rule(args.flops))
    with team.first():
        need = args.flops / flops_per_byte(width, args.tokenizer, args.vocab, args.context)
        corpus = data.load(with_shards(args.data, need), args.tokenizer, args.vocab)
    tokenizer, context = corpus.tokenizer, corpus.tokens(args.context)
    config = Config(tokenizer.vocab_size, context, width, causal=False)
    batch = max(1, round((args.batch or batch_rule(args.flops, args.tokenizer)) / context))                # windows
    step_flops = flops_per_token(config) * batch * context
    steps = int(args.flops // step_flops)
    if steps < 1:
        raise run.InputError(f"a budget of {args.flops:g} FLOPs is too small for one step of {step_flops:.3g}: "
                             "take more, or a smaller --width, --batch or --context")
    team.share(batch, config)
    shuffle = corpus.shuffle_tokens(args.shuffle, context)
    train = data.Windows(corpus.train, context, shuffle)
    val = data.Windows(corpus.val, context, shuffle).spaced(max(16, min(VAL_BYTES // args.context, 2 * steps * batch)))
    settings = {"objective": OBJECTIVE, "tokenizer": args.tokenizer, "vocab_size": tokenizer.vocab_size, "flops_budget": args.flops,
                "width": config.width, "depth": config.depth, "heads": config.heads, "context_bytes": args.context, "context_tokens": context,
                "batch_tokens": batch * context, "steps": steps, "lr": args.lr, "seed": args.seed, "shuffle": args.shuffle,
                "span": args.span, "schedule": args.schedule,
                "corpus": {key: corpus.meta[key] for key in ("name", "sha256", "train_bytes", "val_bytes", "bytes_per_token")}}
    name = f"{OBJECTIVE}-{args.tokenizer}-w{config.width}-c{args.flops:g}-s{args.seed}".replace("e+", "e")
    out = args.out or Path("runs") / (name + args.extras + (f"-{corpus.name}" if args.data != "pysrc" else ""))

    # A finished run has nothing left to do; an interrupted one goes on where it was saved.
    if result := run.read_result(out, settings):
        run.print_result(result, out)
        return
    torch.manual_seed(args.seed)
    model = Transformer(config).to(device)
    optimizer = make_optimizer(model)
    state = {"step": 0, "seconds": 0.0, "bytes": 0, "row_nats": 0.0, "row_bytes": 0, "rows": []}
    if (out / "checkpoint.pt").exists():
        saved = load_checkpoint(out / "checkpoint.pt")
        run.check_same(saved["settings"], settings, out / "checkpoint.pt")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]

    # Compile where it pays, and measure the speed on a micro-batch, which trains nothing.
    team.wrap(model)
    trial = torch.from_numpy(train.batch(args.seed, 0, min(batch, team.size * team.micro)))
    inputs, weights = corrupt(trial, tokenizer.vocab_size, noise(args.seed, 0), args.schedule, args.span)
    score = nats
    if args.compile == "on" or args.compile == "auto" and args.flops >= COMPILE_FROM[device.type]:
        print("compiling, and measuring the speed", flush=True)
        try:
            score = torch.compile(nats, dynamic=False)
            team.backward(score, inputs, weights, trial)
        except run.InputError:
            raise
        except Exception as error:                            # whatever a missing or broken compiler raises
            if args.compile == "on":
                raise run.InputError(f"--compile on: {type(error).__name__}: {str(error).strip().splitlines()[0]}") from None
            print(f"no compiler that works here ({type(error).__name__}): going on without", file=sys.stderr)
            score = nats
    seconds = seconds_per_call(lambda: team.backward(score, inputs, weights, trial), device, calls=2)
    optimizer.zero_grad()
    run.print_plan(settings, model, state["step"], flops_per_token(config) * trial.numel() / seconds, device, out)

    # Train. The first Ctrl-C or SIGTERM lets the step end, saves and stops; a second one ends at once.
    stop = []

    def request_stop(number, frame):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)

    handlers = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    if team.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
    log_steps = {math.ceil(steps * i / LOG_TIMES) for i in range(1, LOG_TIMES + 1)}
    val_steps = {math.ceil(steps * i / VAL_TIMES) for i in range(1, VAL_TIMES)}
    shares, norms, saved_at, mark = [], [], time.monotonic(), time.perf_counter()
    bar = tqdm(desc=out.name, total=steps, initial=state["step"], unit=" steps", mininterval=0.5 if sys.stderr.isatty() else 30,
               disable=team.rank > 0)
    with bar:
        for step in range(state["step"], steps):
            for group in optimizer.param_groups:
                group["lr"] = args.lr * lr_schedule(step, steps) * group["scale"]
            windows = train.batch(args.seed, step, batch)                                      # (B, T)
            ids = torch.from_numpy(windows)
            inputs, weights = corrupt(ids, tokenizer.vocab_size, noise(args.seed, step), args.schedule, args.span)
            shares.append(team.backward(score, inputs, weights, ids))
            norms.append(clip_grad_norm_(model.parameters(), 1.0))
            optimizer.step()
            optimizer.zero_grad()
            state["row_bytes"] += int(tokenizer.bytes_per_id[windows].sum())
            bar.update()
            done = step + 1
            stopping, due = team.agree(len(stop) > 0, time.monotonic() - saved_at > SAVE_SECONDS)      # a signal may come at any line
            save = done == steps or done in val_steps or stopping or due
            if not (save or done in log_steps):
                continue

            # Only now are the losses read, so that an accelerator need not wait for us at every step.
            losses, norms = team.read(shares, norms)
            for at, (loss_at, norm) in enumerate(zip(losses, norms), done - len(losses)):
                if not math.isfinite(loss_at + norm):
                    sys.exit(f"error: at step {at} the loss is {loss_at} and the gradient norm {norm}, at learning rate "
                             f"{args.lr * lr_schedule(at, steps):.3g}: stopped; the last good checkpoint in {out} is kept")
                state["row_nats"] += loss_at * ids.numel()
            state["step"] = done
            state["seconds"] += time.perf_counter() - mark
            shares, norms = [], []
            if done in log_steps:
                val_bpb = evaluate(model, val[::16], tokenizer.bytes_per_id, span=args.span)[0] if done in val_steps and team.rank == 0 else None
                train_bpb = state["row_nats"] / math.log(2) / state["row_bytes"]
                state["bytes"] += state["row_bytes"]
                state["rows"].append([done, done * step_flops, state["bytes"], train_bpb, val_bpb, args.lr * lr_schedule(step, steps),
                                      norm, state["seconds"]])
                state["row_nats"], state["row_bytes"] = 0.0, 0
                if team.rank == 0:
                    run.write_log(out, state["rows"])
                bar.set_postfix_str(f"{train_bpb:.3f} BPB, {done * step_flops / state['seconds'] / 1e9:,.0f} GFLOP/s", refresh=False)
            if save:
                if team.rank == 0:
                    save_checkpoint(out / "checkpoint.pt", settings=settings, merges=corpus.meta["merges"], model=model.state_dict(),
                                    optimizer=optimizer.state_dict(), state=state)
                saved_at = time.monotonic()
            if stopping and done < steps:
                bar.close()
                if team.rank == 0:
                    print(f"stopped and saved at step {done:,} of {steps:,}; the same command goes on from there", file=sys.stderr)
                sys.exit(128 + (stop or [signal.SIGTERM])[0])
            mark = time.perf_counter()
    for number, handler in handlers.items():
        signal.signal(number, handler)

    team.leave()
    if team.rank > 0:
        return
    bpb, stderr = evaluate(model, val, tokenizer.bytes_per_id, span=args.span)
    state["rows"][-1][4] = bpb
    run.write_log(out, state["rows"])
    run.plot_logs(out / "loss.png", {out.name: state["rows"]})
    result = settings | {
        "flops_spent": steps * step_flops, "params": model.params(), "params_non_embedding": model.params(embedding=False),
        "tokens": steps * batch * context, "bytes": state["bytes"], "val_bpb": bpb, "val_bpb_stderr": stderr,
        "val_bytes": int(tokenizer.bytes_per_id[val].sum()), "seconds": state["seconds"],
        "flops_per_second": steps * step_flops / state["seconds"], "device": str(device), "torch": torch.__version__}
    if args.span > 1:                                         # and by the bound that masks single tokens
        result["val_bpb_span1"], result["val_bpb_span1_stderr"] = evaluate(model, val, tokenizer.bytes_per_id)
    run.write_result(out, result)
    run.print_result(result, out)


if __name__ == "__main__":
    run.run_script(main)
