"""Train an autoregressive Transformer to a FLOP budget: every token is predicted from those before it.

    python train_ar.py                                      # bytes of pysrc; a minute or two on a CPU
    python train_ar.py --tokenizer bpe --flops 1e13
    python train_ar.py --data notes.txt --width 128 --out runs/notes

The same command again continues an interrupted run, to the bit on a CPU, and prints the result of a finished one.
Its twin is train_mdm.py: `diff train_ar.py train_mdm.py` shows the objective and nothing else.
"""
import argparse
import math
import signal
import sys
import time
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import data
import run
from download import with_shards
from model import (Config, Transformer, flops_per_byte, flops_per_token, load_checkpoint, make_optimizer, nats, nearest_width, pick_device,
                   save_checkpoint, seconds_per_call)
from parallel import Team

OBJECTIVE = "ar"


# ---------------------------------------------------------------------------------------------------------------------
# The objective.

def corrupt(ids, spare):
    """What the model reads of windows (B, T), and the weight of each token's nats: -> (B, T) ids, (B, T) weights.

    AR reads [START, x_1 .. x_{T-1}] to predict x_1 .. x_T. Every token counts once.
    """
    inputs = torch.cat([torch.full_like(ids[:, :1], spare), ids[:, :-1]], dim=1)
    return inputs, torch.ones(ids.shape, device=ids.device)


def loss(model, ids):
    """Mean nats per token over the windows ids (B, T), integers in [0, vocab_size): the exact negative log-likelihood."""
    inputs, weights = corrupt(ids, model.config.vocab_size)
    return (weights * nats(model, inputs, ids)).mean()


@torch.no_grad()
def evaluate(model, windows, bytes_per_id, size=4):
    """Bits per byte of windows (N, T), an array of ids, and its standard error: -> (bpb, stderr).

    (total nats / ln 2) / (total bytes), an error of a ratio: windows differ in bytes. size: windows read at once.
    """
    ids, device = torch.from_numpy(windows), next(model.parameters()).device
    inputs, weights = corrupt(ids, model.config.vocab_size)
    # Few at once: the logits of 16 windows of BPE are more than malloc keeps, and took 2.3 times as long on a CPU.
    scored = torch.cat([nats(model, inputs[i:i + size].to(device), ids[i:i + size].to(device)).cpu()
                        for i in range(0, len(ids), size)])
    bits = (weights * scored).sum(dim=1).double().numpy() / math.log(2)                             # (N,)
    nbytes = bytes_per_id[windows].sum(axis=1)
    bpb = bits.sum() / nbytes.sum()
    return float(bpb), float((bits - bpb * nbytes).std(ddof=1) * len(bits) ** 0.5 / nbytes.sum())


# ---------------------------------------------------------------------------------------------------------------------
# Settings.

DEFAULT_FLOPS = {"cpu": 3e12, "mps": 1e14, "cuda": 1e16}     # a minute or two
# Tuned at width 32 and 1e12 FLOPs by `python scaling.py --study tune`; the rate serves all widths, batches grow as C^0.3.
LEARNING_RATE = {"byte": 0.003, "bpe": 0.012}
BATCH = {"byte": 512, "bpe": 2048}         # tokens at 1e12 FLOPs
COMPILE_FROM = {"cpu": 1e13, "mps": math.inf, "cuda": 1e15}  # FLOPs from which a run is long enough to pay for compilation
VAL_BYTES = 2**20            # of validation text that the final BPB is measured on (at most twice the tokens trained on)
VAL_TIMES = 8                # validations in a run; those before the last read 1/16 of that text
LOG_TIMES = 200              # rows in log.csv
SAVE_SECONDS = 60            # between checkpoints, beside those at every validation


def width_rule(flops):
    """The compute-optimal width, before rounding: that of the study in the README, and no more than takes SMDM's smallest model to 1e18."""
    return min(32 * (flops / 1e12) ** 0.35, 576 * (flops / 1e18) ** (1 / 6))


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
    parser.add_argument("--out", type=Path, help="run folder (default: runs/..., named by the settings)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or mps (default: the best there is)")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    args = parser.parse_args()
    args.device = pick_device(args.device)
    if args.flops is None:
        args.flops = DEFAULT_FLOPS[args.device.type]
    for name in ("flops", "width", "context", "batch", "lr", "shuffle"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise run.InputError(f"--{name} is a positive number, not {value}")
    if args.seed < 0:
        raise run.InputError(f"--seed is not negative: {args.seed}")
    data.check_vocab(args.vocab)
    # The settings that are not the defaults, for the name of the run folder.
    args.extras = "".join(f"-{name}{value}" for name in ("vocab", "context", "batch", "lr", "shuffle")
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
    config = Config(tokenizer.vocab_size, context, width, causal=True)
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
                "span": 1, "schedule": None,
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
    inputs, weights = corrupt(trial, tokenizer.vocab_size)
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
            inputs, weights = corrupt(ids, tokenizer.vocab_size)
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
                val_bpb = evaluate(model, val[::16], tokenizer.bytes_per_id)[0] if done in val_steps and team.rank == 0 else None
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
    bpb, stderr = evaluate(model, val, tokenizer.bytes_per_id)
    state["rows"][-1][4] = bpb
    run.write_log(out, state["rows"])
    run.plot_logs(out / "loss.png", {out.name: state["rows"]})
    result = settings | {
        "flops_spent": steps * step_flops, "params": model.params(), "params_non_embedding": model.params(embedding=False),
        "tokens": steps * batch * context, "bytes": state["bytes"], "val_bpb": bpb, "val_bpb_stderr": stderr,
        "val_bytes": int(tokenizer.bytes_per_id[val].sum()), "seconds": state["seconds"],
        "flops_per_second": steps * step_flops / state["seconds"], "device": str(device), "torch": torch.__version__}
    run.write_result(out, result)
    run.print_result(result, out)


if __name__ == "__main__":
    run.run_script(main)
