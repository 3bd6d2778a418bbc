"""What every run needs besides its objective: flags, processes, the plan, the log, resuming.

A run lives in a folder: checkpoint.pt and log.csv as it goes, and at its end result.json and
loss.png.
"""
import argparse
import contextlib
import csv
import gc
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bpe import Tokenizer
from data import InputError, fcntl, with_shards
from model import Config, Transformer, flops_per_token, has_bf16, head_dim, seconds_per_call

# A minute or two. A GPU without bfloat16 of its own (T4) is several times slower.
DEFAULT_FLOPS = {"cpu": 3e12, "mps": 1e14, "cuda": 1e15, "cuda without bf16": 1e14}
TUNED_UP_TO = 3e14                                                # FLOPs of the study's runs
PYSRC_UP_TO = 1.5e15                                              # FLOPs that read it few times
COMPILE_FROM = {"cpu": 1e13, "mps": math.inf, "cuda": 1e15}       # FLOPs that pay for compiling
MICRO_TOKENS = {"cpu": 8192, "mps": 16384, "cuda": 65536}         # tokens in memory at once
# The flags of an ordinary run; remedies and experiments differ.
PLAIN = {"shuffle": 1, "permutation": 0, "phase": 0, "span": 1, "span_share": 1,
         "schedule": "linear", "conv": 0, "patch": 1}
LOG_ROWS = 200                                                    # in a run, or one a minute
VALIDATIONS = 8                                                   # in a run
SAVE_SECONDS = 60                                                 # between two checkpoints
BAR_SECONDS = 0.5 if sys.stderr and sys.stderr.isatty() else 30   # between two updates of the bar
LOG_COLUMNS = ("step", "flops", "bytes", "train_bpb", "val_bpb", "lr", "grad_norm", "seconds")


# -----------------------------------------------------------------------------------------------
# From the command line to a process, and back.

def run_script(main):
    """Call main(). Bad input ends in one line on stderr and status 2, not in a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except BrokenPipeError:
        # Whoever read our output has gone, as `| head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        stop("interrupted (the same command resumes a run)", 130)
    except (InputError, OSError) as error:
        stop(f"error: {error}", 2)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        stop("error: out of memory: in training, lower --micro (tokens in memory at once) or "
             "--width", 2)
    if dist.is_initialized():
        # DDP must be gone before its process group, or it could wait for the group's threads.
        gc.collect()
        dist.destroy_process_group()


def stop(message, status):
    """End the process with a line on stderr; what all ranks meet is printed by one."""
    if os.environ.get("RANK", "0") == "0" or "memory" in message:
        print(message, file=sys.stderr, flush=True)
    if dist.is_initialized():
        # The other ranks may never answer again: don't wait for them.
        os._exit(status)
    sys.exit(status)


def out_of_memory(error):
    """Return whether an error says that memory ran out, on whatever device."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "allocate memory" in str(error) or "out of memory" in str(error)


def number(kind, least, most):
    """Return a type for argparse: numbers of this kind (int or float) from least to most."""
    def parse(text):
        value = kind(text) if len(text) < 30 else math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text[:30]} is not from {least:g} to {most:g}")
        return value
    parse.__name__ = kind.__name__
    return parse


def path(text):
    """Return a path, for argparse; an empty one would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def make_parser(doc):
    """Return a parser that is described by a script's docstring and raises InputError."""
    def fail(message):
        raise InputError(message)
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.error = fail
    return parser


COUNT = number(int, 1, 2**31)


def arguments(doc):
    """Return the parser of a training script."""
    parser = make_parser(doc)
    flag = parser.add_argument
    flag("--flops", type=number(float, 1, 1e30), help="training budget (default: by device)")
    flag("--tokenizer", choices=("byte", "bpe"), default="byte")
    flag("--vocab", type=number(int, 257, 65536), default=4096, help="tokens in the BPE vocabulary")
    flag("--width", type=number(int, 1, 65536), help="model width (default: by the budget)")
    flag("--context", type=number(int, 1, 2**20), default=512, help="bytes of text in a sequence")
    flag("--data", help="a corpus by name, or a file or folder (default: by the budget)")
    flag("--batch", type=COUNT, help="tokens in a batch (default: by the budget)")
    flag("--micro", type=COUNT, help="tokens in memory at once (default: by device)")
    flag("--lr", type=number(float, 1e-9, 1e3), help="peak learning rate (default: the tuned one)")
    flag("--seed", type=number(int, 0, 2**63 - 1), default=0)
    flag("--conv", type=number(int, 0, 64), default=0, help="taps of a convolution (0: none)")
    flag("--patch", type=COUNT, default=1, help="tokens that are read as one (1: no patches)")
    flag("--shuffle", type=COUNT, default=1, help="permute blocks of this many bytes (1: no)")
    flag("--permutation", type=number(int, 0, 2**31), default=0,
         help="which of the fixed permutations --shuffle takes")
    flag("--phase", type=number(int, 0, 2**20), default=0,
         help="tell the model t mod this many tokens at each position t (0: no)")
    flag("--out", type=path, help="run folder (default: named by the settings)")
    flag("--device", help="cpu, cuda or mps (default: the best there is)")
    flag("--compile", choices=("auto", "on", "off"), default="auto")
    return parser


def hides_gpus():
    """Return whether an empty CUDA_VISIBLE_DEVICES hides all GPUs, that of a Mac included."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") == ""


def best_device():
    """Return the name of the best device here: cuda, mps or cpu. It is not opened."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available() and not hides_gpus()
    return "cuda" if cuda else "mps" if mps else "cpu"


def pick_device(name=None):
    """Return the torch.device of this name, or the best there is. Raise InputError if none is."""
    if name is None:
        name = best_device()
        first = os.environ.get("RANK", "0") == "0"
        if name == "cpu" and first and not hides_gpus() and shutil.which("nvidia-smi"):
            build = "is built without CUDA"
            if torch.version.cuda:
                build = f"(for CUDA {torch.version.cuda}) finds no GPU: is its driver too old?"
            print(f"note   nvidia-smi is here, but torch {build}. The CPU is used",
                  file=sys.stderr)
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        # All processes compare, since only the first one prints what is wrong.
        wanted, found = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if 0 < found < wanted:
            raise InputError(f"--nproc_per_node={wanted}: this machine has {found} GPUs")
        # Before any tensor is made, or all ranks would open the first GPU.
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.set_device(device.index or 0)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"--device {name} cannot be used here: {reason}") from None
    if device.type not in MICRO_TOKENS:
        raise InputError(f"--device {name}: take cpu, cuda or mps")
    return device


def setup(args, learning_rates):
    """Join the process group if torchrun started this process, and fill in default settings.

    Return (rank, world size, device). Raise InputError for a width that no model can have.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.device)
    if world_size > 1 and device.type == "mps":
        raise InputError("several processes train on CUDA or on CPUs: add --device cpu")
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        # Now, not after minutes of preparing the data.
        Config(width=args.width or 64)
    except ValueError as error:
        raise InputError(f"--width: {error}") from None
    if world_size > 1:
        # The others wait while rank 0 prepares the data: on the CPU, where they see it if it stops.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))
    if device.type == "cpu":
        # So that resuming is exact to the bit.
        torch.use_deterministic_algorithms(True)
    else:
        # TF32 for what autocast leaves in float32.
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    slow = device.type == "cuda" and not has_bf16()
    args.flops = args.flops or DEFAULT_FLOPS["cuda without bf16" if slow else device.type]
    args.data = choose_data(args.data, args.flops)
    args.tuned_lr = learning_rates[args.tokenizer]
    args.lr = args.lr or args.tuned_lr
    return rank, world_size, device


@contextlib.contextmanager
def rank_zero_first(rank, world_size):
    """Let rank 0 run the block first (prepare the data), then the others (find it prepared)."""
    if rank > 0:
        try:
            dist.barrier()
        except RuntimeError:
            raise InputError("rank 0 has stopped") from None
    yield
    if world_size > 1 and rank == 0:
        dist.barrier()


# -----------------------------------------------------------------------------------------------
# Before training: the size of the run, its settings, its plan.

def default_width(flops, width_at_1e12=math.inf):
    """Return the default width: near the study's optimum, C^0.35; later C^(1/6), 576 at 1e18.

    From 2e14 FLOPs on it is the same for all objectives: width_at_1e12 plays no part.
    """
    width = min(width_at_1e12 * (flops / 1e12) ** 0.35, 576 * (flops / 1e18) ** (1 / 6))
    return head_dim(width) * max(1, round(width / head_dim(width)))


def bytes_needed(flops, width, tokenizer, vocab_size, context_bytes):
    """Return about how many bytes of text a budget reads, other tokens taken as four bytes."""
    length = 1 if tokenizer == "byte" else 4
    vocab_size = 256 if tokenizer == "byte" else vocab_size
    config = Config(vocab_size, max(1, context_bytes // length), width)
    return flops / flops_per_token(config) * length


def choose_data(data, flops):
    """Return --data with the number of its shards: by default pysrc, or c4 for a large budget.

    The shards hold what AR on BPE reads at the default width, which reads most of large budgets. So
    all configurations of one budget are validated on the same text.
    """
    if data is None:
        data = "pysrc" if flops <= PYSRC_UP_TO else "c4"
    return with_shards(data, bytes_needed(flops, default_width(flops), "bpe", 4096, 512))


def make_config(args, objective, vocab_size, context, width):
    """Return the Config of a run. Raise InputError if the flags make no model."""
    try:
        return Config(vocab_size, context, width, objective == "ar", args.conv, args.patch,
                      args.phase)
    except ValueError as error:
        raise InputError(str(error)) from None


def whole_sequences(tokens, context):
    """Return the number of sequences of a context in a batch of about so many tokens.

    From 64 up it is a multiple of 8, which splits well over GPUs and into pieces.
    """
    count = max(1, round(tokens / context))
    return count if count < 64 else 8 * round(count / 8)


def count_steps(args, default_batch, config):
    """Return the batch in sequences, and how many steps of it the budget pays for."""
    batch = whole_sequences(args.batch or default_batch, config.context)
    steps = int(args.flops // (flops_per_token(config) * batch * config.context))
    if steps < 1:
        raise InputError(f"--flops {args.flops:g} does not pay for one step of {batch} sequences: "
                         "raise it, or lower --width, --batch or --context")
    return batch, steps


def split_batch(args, batch, config, rank, world_size, device):
    """Return this rank's part of a batch as (rows, repeated): slices that fit in memory.

    All have the same size, so that one compilation serves all, and they are as few as can be. So
    the last may begin with sequences that the one before has read: repeated is their number.
    Raise InputError if the batch has fewer sequences than there are ranks.
    """
    if batch < world_size:
        raise InputError(f"a batch of {batch} sequences is too small for {world_size} processes: "
                         f"--batch {world_size * config.context} is the smallest that will do")
    first, last = rank * batch // world_size, (rank + 1) * batch // world_size
    # A kernel counts fewer than 2^31 logits in 32 bits, which is faster.
    micro = args.micro or min(MICRO_TOKENS[device.type], (2**31 - 1) // config.padded_vocab)
    fit = max(1, micro // config.context)
    pieces = math.ceil((last - first) / fit)
    size = math.ceil((last - first) / pieces)
    parts = []
    for start in range(first, last, size):
        stop = min(start + size, last)
        parts.append((slice(stop - size, stop), start + size - stop))
    return parts


def generator(seed, step):
    """Return the random generator of a step's masks: a pure function of (seed, step)."""
    state = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def describe(objective, args, corpus, config, batch, steps, options):
    """Return the settings of a run, as its checkpoint and result.json hold them, and its folder."""
    keys = ("name", "sha256", "train_bytes", "val_bytes", "bytes_per_token")
    settings = {
        "objective": objective, "tokenizer": args.tokenizer, "vocab_size": config.vocab_size,
        "flops_budget": args.flops, "width": config.width, "depth": config.depth,
        "heads": config.heads, "context_bytes": args.context, "context_tokens": config.context,
        "batch_tokens": batch * config.context, "steps": steps, "lr": args.lr, "seed": args.seed,
        "shuffle": args.shuffle, "permutation": args.permutation, "phase": args.phase, "span": 1,
        "span_share": 1, "schedule": None, "conv": args.conv, "patch": args.patch,
        "corpus": {key: corpus.meta[key] for key in keys}} | options
    # The default folder is named by the settings, those aside that are as usual.
    usual = {"vocab": 4096, "context": 512, "batch": None, "lr": args.tuned_lr} | PLAIN
    flops = short(f"{args.flops:g}")
    name = f"{objective}-{args.tokenizer}-w{config.width}-c{flops}-s{args.seed}"
    for key, value in usual.items():
        if getattr(args, key, value) != value:
            name += f"-{key}{getattr(args, key)}"
    name += "" if args.data == "pysrc" else f"-{corpus.name}"
    return settings, args.out or Path("runs") / name


def short(text):
    """Return text without the signs and zeros that Python writes into exponents: "1e4"."""
    return re.sub(r"e\+0*", "e", text)


def duration(seconds):
    if seconds < 7200:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:,.1f} hours"


def print_plan(settings, model, done, seconds_per_step, out):
    """Print what is going to be trained, and how long it takes at the speed just measured."""
    s, corpus = settings, settings["corpus"]
    tokens = s["steps"] * s["batch_tokens"]
    epochs = tokens * corpus["bytes_per_token"] / corpus["train_bytes"]
    seconds = (s["steps"] - done) * seconds_per_step
    speed = flops_per_token(model.config) * s["batch_tokens"] / seconds_per_step
    resumed = f", {done:,} of them done" if done else ""
    print(f"model  {s['objective']}, width {s['width']}, depth {s['depth']}: "
          f"{model.count_params(embedding=False):,} parameters without embeddings\n"
          f"data   {tokens:,} {s['tokenizer']} tokens of {corpus['name']}: {epochs:.2f} epochs of "
          f"its {corpus['train_bytes'] / 1e6:,.1f} MB\n"
          f"steps  {s['steps']:,} of {s['batch_tokens']:,} tokens{resumed}\n"
          f"time   about {duration(seconds)} at {speed / 1e9:,.0f} GFLOP/s, into {out}", flush=True)
    if seconds > 3 * 86400:
        hour = short(f"{speed * 3600:.0e}")
        print("note   this budget is for a larger machine: what this one does in an hour is "
              f"--flops {hour}", flush=True)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    for note in notes(s, epochs, model.head.weight.device, model.bf16, world_size):
        print(f"note   {note}", flush=True)


def notes(settings, epochs, device, bf16, world_size):
    """Return what a user should know about a run before it starts, a line each."""
    flops, found = settings["flops_budget"], []
    if epochs > 4:
        enough = with_shards("c4", epochs * settings["corpus"]["train_bytes"])
        found.append("text that is read more than 4 times teaches little (arXiv 2305.16264): "
                     f"--data {enough} holds enough for this run")
    if flops > TUNED_UP_TO:
        tuned = short(f"{TUNED_UP_TO:g}")
        found.append(f"beyond {tuned} FLOPs the rules for width, batch and learning rate are "
                     "extrapolated: they were never tuned there")
    if device.type == "cuda" and not bf16:
        found.append("this card has no bfloat16 of its own: it trains in float32")
    tokens = settings["batch_tokens"] // world_size
    if device.type == "cuda" and world_size > 1 and tokens < 8192:
        found.append(f"each GPU reads only {tokens:,} tokens a step, too few to keep it busy: take "
                     "fewer GPUs for this run, or train several runs side by side")
    return found


def ahead(draw, steps, device):
    """Yield (step, draw(step)) of each step, drawn by a thread while the step before is trained.

    draw(step): tensors, from step alone. A CPU, which is busy with training, draws in between.
    """
    if device.type == "cpu":
        yield from ((step, draw(step)) for step in steps)
        return
    with ThreadPoolExecutor(1) as pool:
        tasks = ((step, pool.submit(draw, step)) for step in steps)
        # pairwise takes, and so starts, the next task before it gives out this one.
        for (step, task), _ in itertools.pairwise(itertools.chain(tasks, [None])):
            yield step, task.result()


def to_device(device, *tensors):
    """Return tensors on the device; a GPU's copies are not waited for."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]


def wrap(model, args, micro_batches, device, world_size):
    """Return the model to train, compiled and distributed, and the seconds that a step will take.

    Without a compiler that works, --compile auto does without; --compile on is an InputError.
    """
    rows, _ = micro_batches[0]
    size = rows.stop - rows.start

    def measure(net, count):
        # Two tensors: compiled for one that is given twice, the model would be compiled again.
        ids = torch.zeros(2, count, model.config.context, dtype=torch.long, device=device)
        seconds = seconds_per_call(lambda: net(ids[0], ids[1]).sum().backward(), device)
        model.zero_grad()
        return seconds / count * size * len(micro_batches)

    def distribute(net):
        if world_size == 1:
            return net
        # About eight buckets: one is exchanged while the next is computed. Buffers never change.
        megabytes = max(25, 4 * model.count_params() / 8 / 2**20)
        return DistributedDataParallel(net, bucket_cap_mb=megabytes, gradient_as_bucket_view=True,
                                       forward_sync_buffers=False)

    worth_it = args.compile == "auto" and args.flops >= COMPILE_FROM[device.type]
    if args.compile == "on" or worth_it:
        print("compiling", flush=True)
        try:
            net = distribute(torch.compile(model, dynamic=False))
            return net, measure(net, size)
        except torch._dynamo.exc.TorchDynamoException as error:
            if out_of_memory(error):
                raise torch.OutOfMemoryError from error
            reason = str(error).strip().splitlines()[0]
            if args.compile == "on":
                raise InputError(f"--compile on: no compiler works here: {reason}") from None
            print(f"note   no compiler works here ({reason}): not compiled", file=sys.stderr)
    net = distribute(model)
    # One sequence tells enough about a CPU, where all of a slice may take minutes.
    return net, measure(net, 1 if device.type == "cpu" else size)


# -----------------------------------------------------------------------------------------------
# The run folder.

def write_atomic(path, write):
    """Call write(temporary path), then rename: path is never half-written, even after kill -9."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        # Windows flushes only what is open for writing.
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path, columns, rows):
    """Write a table: rows are sequences of values in the order of columns."""
    def write(temporary):
        with open(temporary, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([columns, *rows])
    write_atomic(path, write)


def load_checkpoint(path):
    """Return the dict in a checkpoint. No code in it is run. Raise what a corrupt one raises."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"{damaged} is damaged")
    found = torch.load(path, map_location="cpu", weights_only=True)
    missing = {"settings", "merges", "model", "optimizer", "log"} - set(found)
    if missing or not 0 < found["log"]["step"] <= found["settings"]["steps"]:
        raise ValueError(f"not a checkpoint of this project {missing or ''}")
    return found


def read(path, settings=None):
    """Return the dict in a checkpoint.pt or a result.json, or None without such a file.

    Raise InputError if it is corrupt, or not of these settings.
    """
    if not path.exists():
        return None
    try:
        if path.suffix == ".json":
            found = had = json.loads(path.read_text())
            # Not a result without these.
            float(found["val_bpb"]), int(found["steps"]), found["corpus"]["name"]
        else:
            found = load_checkpoint(path)
            had = found["settings"]
    except (ValueError, KeyError, TypeError, EOFError, RuntimeError, AttributeError,
            zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[:1]
        raise InputError(f"{path} is corrupt ({type(error).__name__}: {' '.join(reason)[:80]}): "
                         "delete it, or change --out") from None
    for key, value in (settings or {}).items():
        # Older runs lack some flags.
        own = had.get(key, PLAIN.get(key))
        if own != value:
            what = f"belongs to another run: its {key} is {own}, not {value}"
            if key == "corpus":
                what = (f"is of another text: {value['name']} is not what it was, or --data names "
                        "another")
            raise InputError(f"{path} {what}; delete it, or change --out")
    return found


def load_model(folder, device="cpu"):
    """Return the model of a run folder, the settings of the run, and its tokenizer.

    Raise InputError if there is none, or if it is not the model that the folder's result is of.
    """
    saved = read(folder / "checkpoint.pt")
    if saved is None:
        raise InputError(f"there is no {folder / 'checkpoint.pt'}: train a model first")
    s = saved["settings"]
    if read(folder / "result.json", s) and saved["log"]["step"] != s["steps"]:
        raise InputError(f"{folder}: the checkpoint is of step {saved['log']['step']}, the result "
                         f"of step {s['steps']}: delete result.json and run the command again")
    if not all(tensor.isfinite().all() for tensor in saved["model"].values()):
        raise InputError(f"{folder / 'checkpoint.pt'} has weights that are not finite")
    causal = s["objective"] == "ar"
    # Older runs lack some flags.
    s = PLAIN | s
    model = Transformer(Config(s["vocab_size"], s["context_tokens"], s["width"], causal, s["conv"],
                               s["patch"], s["phase"]))
    model.load_state_dict(saved["model"])
    return model.to(device).eval(), s, Tokenizer.from_hex(saved["merges"])


def lock(folder):
    """Keep other processes out of a run folder until this one ends, however it ends."""
    if fcntl is None:
        return None
    file = open(folder / ".lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise InputError(f"{folder} is in use by process {file.read()}: wait for it, or change "
                         "--out") from None
    except OSError:
        # A file system without locks.
        return None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


class Log:
    """All that a run writes, and where an interrupted run resumes. Only rank 0 writes files."""

    def __init__(self, out, settings, flops_per_token, model, optimizer, corpus, rank):
        self.out = out
        self.settings = settings
        self.step_flops = flops_per_token * settings["batch_tokens"]
        self.model = model
        self.optimizer = optimizer
        self.corpus = corpus
        self.rank = rank
        # What a checkpoint holds of the log. row_count is set when the speed is known.
        self.state = {"step": 0, "bytes": 0, "seconds": 0.0, "rows": [], "row_count": 0}
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            # Kept, since the lock ends when its file is closed.
            self.locked = lock(out)
        if saved := read(out / "checkpoint.pt", settings):
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            self.state = saved["log"]
        if dist.is_initialized():
            steps = torch.tensor([self.step, -self.step], device=model.head.weight.device)
            dist.all_reduce(steps, dist.ReduceOp.MAX)
            if steps.sum() > 0:
                raise InputError(f"{out} is not the same folder for all processes: it must be on a "
                                 "disk that all machines share")
        self.losses = []
        self.bytes = self.state["bytes"]
        self.save_seconds = 0.0

    @property
    def step(self):
        return self.state["step"]

    def start(self, seconds_per_step):
        """Choose the steps that are logged: LOG_ROWS, or more so that rows are a minute apart."""
        steps = self.settings["steps"]
        # All ranks choose the same steps, by the speed of rank 0.
        seconds = torch.tensor(steps * seconds_per_step, device=self.model.head.weight.device)
        if dist.is_initialized():
            dist.broadcast(seconds, 0)
        if not self.state["row_count"]:
            rows = max(LOG_ROWS, seconds.item() / 60)
            # A multiple, so that each validation falls on a row.
            self.state["row_count"] = VALIDATIONS * math.ceil(rows / VALIDATIONS)
        self.row_steps = self.spread(self.state["row_count"])
        self.validation_steps = self.spread(VALIDATIONS) - {steps}
        self.last_save = time.monotonic()
        self.started = time.perf_counter()

    def spread(self, count):
        """Return count steps, or all if they are fewer, evenly spread; the last is one of them."""
        steps = self.settings["steps"]
        count = min(count, steps)
        return {math.ceil(steps * i / count) for i in range(1, count + 1)}

    def add(self, loss, ids):
        """Note a step's loss, without waiting for the device, and the bytes that ids spell."""
        self.losses.append(loss)
        self.bytes += int(self.corpus.tokenizer.bytes_per_id[ids].sum())

    def write(self, step, lr, norm, val_bpb):
        """Add a row for the steps since the last one, and save if it is time.

        Return the text for the bar. loss and norm are read here, so an accelerator is waited for
        here and nowhere else. Raise InputError if one is not finite.
        """
        losses = torch.stack(self.losses)                                 # (steps,)
        if dist.is_initialized():
            dist.all_reduce(losses)
        nats = sum(losses.tolist()) * self.settings["batch_tokens"]
        norm = norm.item()
        if not math.isfinite(nats + norm):
            raise InputError(f"the loss is not finite after step {self.step} and up to step "
                             f"{step}, at learning rate {lr:.3g}: lower --lr")
        state = self.state
        train_bpb = nats / math.log(2) / (self.bytes - state["bytes"])
        state["seconds"] += time.perf_counter() - self.started
        state["step"] = step
        state["bytes"] = self.bytes
        flops = step * self.step_flops
        row = [step, flops, self.bytes, train_bpb, val_bpb, lr, norm, state["seconds"]]
        state["rows"].append(row)
        self.losses = []
        if self.rank == 0:
            write_csv(self.out / "log.csv", LOG_COLUMNS, state["rows"])
            # At most 3% of the time goes into checkpoints, however slow the disk.
            pause = max(SAVE_SECONDS, 33 * self.save_seconds)
            if step == self.settings["steps"] or time.monotonic() - self.last_save >= pause:
                self.save()
        self.started = time.perf_counter()
        return f"{train_bpb:.3f} BPB, {flops / state['seconds'] / 1e9:,.0f} GFLOP/s"

    def save(self):
        """Write the checkpoint. Raise OSError if it can't be written whole."""
        began = time.monotonic()
        checkpoint = {"settings": self.settings, "merges": self.corpus.meta["merges"],
                      "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                      "log": self.state}
        try:
            write_atomic(self.out / "checkpoint.pt", lambda path: torch.save(checkpoint, path))
        except RuntimeError as error:
            # This is how torch says that the disk is full.
            reason = str(error).splitlines()[0]
            raise OSError(f"{self.out / 'checkpoint.pt'}: no space left? {reason}") from None
        self.last_save = time.monotonic()
        self.save_seconds = self.last_save - began

    def finish(self, bpb, stderr, val_bytes, **more):
        """Write result.json, then loss.png, and print the result."""
        rows, seconds = self.state["rows"], self.state["seconds"]
        rows[-1][LOG_COLUMNS.index("val_bpb")] = bpb
        write_csv(self.out / "log.csv", LOG_COLUMNS, rows)
        flops = self.step * self.step_flops
        result = self.settings | {
            "flops_spent": flops, "params": self.model.count_params(),
            "params_non_embedding": self.model.count_params(embedding=False),
            "tokens": self.step * self.settings["batch_tokens"], "bytes": self.bytes,
            "val_bpb": bpb, "val_bpb_stderr": stderr, "val_bytes": int(val_bytes),
            "seconds": seconds, "flops_per_second": flops / seconds,
            "device": str(self.model.head.weight.device), "torch": torch.__version__} | more
        text = json.dumps(result, indent=1) + "\n"
        write_atomic(self.out / "result.json", lambda path: path.write_text(text))
        print_result(result, self.out)
        try:
            plot(self.out / "loss.png", rows)
        except Exception as error:
            # Fonts, disks: whatever it is, the result is safe, and a figure is not worth an error.
            print(f"note   no loss.png: {error}", file=sys.stderr)


def print_result(r, out):
    print(f"{r['objective']} on {r['tokenizer']}: {r['val_bpb']:.4f} +- {r['val_bpb_stderr']:.4f} "
          f"bits per byte on {r['val_bytes']:,} bytes of {r['corpus']['name']}, after "
          f"{r['flops_spent']:.3g} FLOPs in {duration(r['seconds'])} ({out})")


def plot(path, rows):
    """Draw bits per byte against FLOPs."""
    # Imported here, since it is slow to import.
    from matplotlib.figure import Figure
    figure = Figure(layout="constrained")
    axes = figure.add_subplot(xlabel="training FLOPs", ylabel="bits per byte", xscale="log")
    axes.plot([row[1] for row in rows], [row[3] for row in rows], linewidth=0.8, label="training")
    validated = [row for row in rows if row[4] is not None]
    axes.plot([row[1] for row in validated], [row[4] for row in validated], "o-",
              label="validation")
    axes.legend()
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
