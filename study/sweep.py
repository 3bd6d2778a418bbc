"""Many runs at once: what is to be trained, the table of finished runs, and the jobs that train.

A study (scaling.py, fragility.py) makes a list of runs, each a dict of its SETTINGS. Each run is
one command of train_ar.py or train_mdm.py in a folder of its own. As it finishes it becomes a row
of the study's table, and the study trains only what the table lacks.
"""
import csv
import ctypes
import itertools
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import data
import run
import train_ar
import train_mdm
from model import flops_per_token
from run import InputError

TRAIN = {"ar": train_ar, "mdm": train_mdm}
CONFIGURATIONS = {("ar", "bpe"): "AR, BPE", ("ar", "byte"): "AR, bytes",
                  ("mdm", "bpe"): "MDM, BPE", ("mdm", "byte"): "MDM, bytes"}
WIDTHS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 576, 768, 1024, 1344, 1664, 2176)
# The columns of runs.csv. SETTINGS tell runs apart: two rows of equal SETTINGS are one run.
SETTINGS = {"objective": str, "tokenizer": str, "vocab_size": int, "flops_budget": float,
            "width": int, "heads": int, "seed": int, "lr": float, "batch_tokens": int,
            "context_bytes": int, "context_tokens": int, "shuffle": int, "span": int,
            "schedule": str, "corpus": str, "sha256": str, "conv": int, "patch": int,
            "permutation": int, "phase": int, "span_share": float}
RESULTS = {"steps": int, "tokens": int, "bytes": int, "params": int, "params_non_embedding": int,
           "flops_spent": float, "val_bpb": float, "val_bpb_stderr": float, "val_bpb_span1": float,
           "val_bpb_span1_stderr": float, "val_bytes": int, "seconds": float, "device": str,
           "torch": str}
COLUMNS = SETTINGS | RESULTS
# What these settings are in tables without their columns.
DEFAULTS = {key: str(run.PLAIN[key])
            for key in ("conv", "patch", "permutation", "phase", "span_share")}
# What a row can do without: not every run has them.
OPTIONAL = {"val_bpb_stderr", "val_bpb_span1", "val_bpb_span1_stderr", "seconds", "device", "torch"}


# -----------------------------------------------------------------------------------------------
# What is to be trained. A run is a dict of its SETTINGS.

def bracket(objective, flops, count=4):
    """Return the widths around the one that is expected to be best (of equally near, the wider)."""
    best = run.default_width(flops, TRAIN[objective].WIDTH)
    nearest = sorted(WIDTHS, key=lambda width: (abs(math.log(width / best)), -width))
    return sorted(nearest[:count])


def batch_by_the_rule(objective, tokenizer, flops, context):
    """Return the tokens in a batch of whole sequences of a context, in tokens."""
    tokens = TRAIN[objective].batch_tokens(flops, tokenizer)
    return context * run.whole_sequences(tokens, context)


def settings(configuration, flops, width, seed, args, corpora, **flags):
    """Return the settings of a run, a dict with the keys of SETTINGS, as its row will have them.

    corpora: as load_corpora returns them. flags: those that differ from run.PLAIN, and the
    rate, "lr", if it is not the rule's. Raises InputError if the budget pays for no step.
    """
    objective, tokenizer = configuration
    corpus = corpora[tokenizer]
    tokens = corpus.tokens(args.context)
    flags = run.PLAIN | flags
    if objective == "ar":
        flags["schedule"] = ""
    elif flags["patch"] > 1:
        # A patch is masked whole.
        flags["span"] = flags["patch"]
    config = run.make_config(SimpleNamespace(**flags), objective, corpus.tokenizer.vocab_size,
                             tokens, width)
    batch_tokens = batch_by_the_rule(objective, tokenizer, flops, tokens)
    if flops < flops_per_token(config) * batch_tokens:
        raise InputError(f"{exact(flops)} FLOPs do not pay for one step of "
                         f"{CONFIGURATIONS[configuration]} at width {width}: raise --budgets, or "
                         "lower --widths")
    return {"objective": objective, "tokenizer": tokenizer, "vocab_size": config.vocab_size,
            "flops_budget": float(flops), "width": width, "heads": config.heads, "seed": seed,
            "lr": TRAIN[objective].LEARNING_RATE[tokenizer], "batch_tokens": batch_tokens,
            "context_bytes": args.context, "context_tokens": tokens, "corpus": corpus.name,
            "sha256": corpus.meta["sha256"]} | flags


def load_corpora(args):
    """Return {"byte": Corpus, "bpe": Corpus}. args.data is set to its name with its shards.

    All runs read one text, that of the largest budget. A dry run reads one shard, to know how many
    tokens a sequence has, so its sha256 is not known: None. Raises InputError for a width that no
    model can have, and for text that is read more than 4 times, unless args.data asks for it.
    """
    try:
        needs = [run.bytes_needed(flops, width, tokenizer, args.vocab, args.context)
                 for flops in args.budgets for objective, tokenizer in CONFIGURATIONS
                 for width in args.widths or bracket(objective, flops)]
    except ValueError as error:
        raise InputError(f"--widths: {error}") from None
    whole = run.choose_data(args.data, max(args.budgets))
    name = args.data or whole.partition(":")[0]
    source = data.with_shards(name, 1) if args.dry_run else whole
    corpora = {tokenizer: data.load(source, tokenizer, args.vocab) for tokenizer in ("byte", "bpe")}
    if source != whole:
        for corpus in corpora.values():
            corpus.name = whole.replace(":", "-")
            corpus.meta["sha256"] = None
    elif (epochs := max(needs) / corpora["byte"].meta["train_bytes"]) > 4:
        if args.data is None:
            raise InputError(f"a run would read {name} {epochs:.0f} times: take --data c4, or "
                             f"--data {name} to repeat it")
        print(f"note   a run reads {name} {epochs:.0f} times, and more than 4 teach little (arXiv "
              "2305.16264)", file=sys.stderr)
    args.data = whole
    return corpora


def exact(number):
    """Return the shortest text that reads back as this number: "1e12"."""
    return run.short(f"{number:g}" if float(f"{number:g}") == number else repr(number))


def unusual(spec):
    """Return the flags of a run that differ from run.PLAIN."""
    flags = {key: spec[key] for key, value in run.PLAIN.items() if spec[key] != value}
    # AR has no schedule, and the spans of a model with patches are its patches.
    if not spec["schedule"]:
        del flags["schedule"]
    if spec["patch"] > 1:
        flags.pop("span", None)
    return flags


def label(spec):
    """Return the name of a run's folder."""
    size = "" if spec["tokenizer"] == "byte" else spec["vocab_size"]
    name = (f"{spec['objective']}-{spec['tokenizer']}{size}-w{spec['width']}"
            f"-c{exact(spec['flops_budget'])}-t{spec['context_bytes']}-b{spec['batch_tokens']}"
            f"-lr{exact(spec['lr'])}-s{spec['seed']}")
    name += "".join(f"-{key}{value}" for key, value in unusual(spec).items())
    return name if spec["corpus"] == "pysrc" else f"{name}-{spec['corpus']}"


def command(spec, args, out):
    """Return the run as arguments of Python."""
    script = os.path.relpath(Path(__file__).resolve().with_name(f"train_{spec['objective']}.py"))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.nproc}"]
    flags = {"tokenizer": spec["tokenizer"], "flops": exact(spec["flops_budget"]),
             "width": spec["width"], "batch": spec["batch_tokens"], "lr": exact(spec["lr"]),
             "seed": spec["seed"], "context": spec["context_bytes"], "data": args.data, "out": out}
    if spec["tokenizer"] != "byte":
        flags["vocab"] = spec["vocab_size"]
    flags |= unusual(spec)
    words = []
    for key, value in flags.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    return [*(launcher if args.nproc > 1 else []), script, *words]


# -----------------------------------------------------------------------------------------------
# The table of finished runs. A row is a dict of SETTINGS, RESULTS, and what else its file has.

def parse(line):
    """Return the row in a line (a dict of texts). Raises ValueError if it is not a result."""
    if None in line or (line["objective"], line["tokenizer"]) not in CONFIGURATIONS:
        raise ValueError("it is not a run of ours")
    row = dict(line)
    for key, kind in COLUMNS.items():
        text = line.get(key) or DEFAULTS.get(key, "")
        try:
            row[key] = None if key in OPTIONAL and text == "" else kind(text)
        except ValueError:
            raise ValueError(f"{key} is {text!r}") from None
        smallest = 0 if key in ("seed", "conv", "permutation", "phase") else 1e-12
        if kind is not str and key not in OPTIONAL and not smallest <= row[key] <= 1e40:
            raise ValueError(f"{key} is {text}")
    return row


def read_table(path):
    """Return (lines, rows, faults) of a runs.csv, all empty if there is none.

    lines: all that it holds, as dicts of texts. rows: the runs, each once. faults: texts about
    lines that are no row. Raises InputError if the file is not such a table.
    """
    lines, rows, faults, seen = [], [], [], {}
    if not path.exists():
        return lines, rows, faults
    try:
        with open(path, newline="") as file:
            table = csv.DictReader(file, restval="")
            numbered = [(table.line_num, line) for line in table]
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a table of runs: {error}") from None
    known = {*DEFAULTS, *(table.fieldnames or ())}
    if missing := [key for key in COLUMNS if key not in known]:
        raise InputError(f"{path} is not a table of runs: it has no column {missing[0]}")
    for number, line in numbered:
        lines.append(line)
        try:
            row = parse(line)
        except ValueError as error:
            faults.append(f"{path}, line {number}, is left out: {error}")
            continue
        first = seen.setdefault(settings_of(row), number)
        if first == number:
            rows.append(row)
        else:
            faults.append(f"{path}, line {number}, is left out: line {first} is the same run")
    return lines, rows, faults


def settings_of(row):
    return tuple(row[key] for key in SETTINGS)


def read_rows(path):
    """Return the rows of a runs.csv, [] if there is none. Name the lines that are no row."""
    _, rows, faults = read_table(path)
    for fault in faults:
        print(fault, file=sys.stderr)
    return rows


def write_rows(path, rows):
    """Write rows as a runs.csv, with all the columns that they have."""
    columns = [key for key in dict.fromkeys(itertools.chain(COLUMNS, *rows)) if key is not None]
    path.parent.mkdir(parents=True, exist_ok=True)
    run.write_csv(path, columns, [[row.get(key) for key in columns] for row in rows])


def add_row(path, row):
    """Add a row to what the table holds now: another sweep may have added its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with data.locked(path.parent):
        lines, rows, _ = read_table(path)
        if find(row, rows) is None:
            write_rows(path, [*lines, row])


def find(spec, rows):
    """Return the row of the run with these settings, or None. A None in spec matches any value."""
    wanted = {key: spec[key] for key in SETTINGS if spec[key] is not None}
    return next((row for row in rows if all(row[key] == wanted[key] for key in wanted)), None)


def finished(spec, out):
    """Return the row of the result in a run folder, or None if it has no result of this run."""
    try:
        result = run.read(out / "result.json")
        if result is None:
            return None
        texts = {key: "" if result.get(key) is None else str(result[key]) for key in COLUMNS}
        texts["corpus"] = result["corpus"]["name"]
        texts["sha256"] = result["corpus"].get("sha256")
        return find(spec, [parse(texts)])
    except ValueError:
        # Corrupt, or not finite.
        return None


def check_alike(rows, path):
    """Raise InputError if the rows of a table are of different texts, contexts or vocabularies."""
    learned = [row for row in rows if row["tokenizer"] != "byte"]
    for column, group in (("sha256", rows), ("context_bytes", rows), ("vocab_size", learned)):
        kinds = {str(row[column])[:12] for row in group if row[column] is not None}
        if len(kinds) > 1:
            raise InputError(f"{path} would mix runs of different {column} "
                             f"({', '.join(sorted(kinds))}): take another --out")


# -----------------------------------------------------------------------------------------------
# The sweep.

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1


def end_with_parent():
    """Ask Linux to send SIGTERM to this process when its parent ends, however it ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def launch(spec, args, out, slot, jobs):
    """Start a run on GPUs of its own, or on its part of the CPU cores.

    Return its process, and the byte of output.txt at which its output begins.
    """
    threads = max(1, (os.cpu_count() or 1) // (jobs * args.nproc))
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    if gpus := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        visible = visible.split(",")[:gpus]
        own = [visible[(slot * args.nproc + i) % gpus] for i in range(args.nproc)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "output.txt", "ab") as output:
        begin = output.tell()
        process = subprocess.Popen([sys.executable, *command(spec, args, out)], env=environment,
                                   stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                   preexec_fn=end_with_parent if LIBC else None)
    return process, begin


def explain(status, output, begin):
    """Return in one line why a run failed that ended with this status."""
    if status < 0:
        return f"killed by signal {-status}" + (" (out of memory?)" if status == -9 else "")
    try:
        text = output.read_bytes()[begin:].decode(errors="replace")
    except OSError:
        text = ""
    # Our own errors, or the last line of a traceback.
    if errors := re.findall(r"error: .+|^[\w.]+Error: .+", text, re.MULTILINE):
        return errors[-1].removeprefix("error: ").strip()
    if status == 0:
        return f"{output.parent} has no result of this run: was it removed?"
    return f"ended with status {status}: see {output}"


def keep_log(out, logs):
    """Copy the log of a finished run to where the study's table is."""
    logs.mkdir(exist_ok=True)
    run.write_atomic(logs / f"{out.name}.csv", lambda path: shutil.copy(out / "log.csv", path))


def sweep(specs, path, args, folder):
    """Train runs, the cheap ones first, args.jobs at a time. Each becomes a row of path as it ends.

    Return a line for each run that failed. However this ends, no run is left behind.
    """
    # A Mac has one GPU.
    gpus = torch.cuda.device_count() or int(run.best_device() == "mps")
    jobs = args.jobs or max(1, (gpus or os.cpu_count() or 1) // args.nproc)
    waiting = sorted(specs, key=lambda spec: spec["flops_budget"])
    free, active, failures, done = list(range(jobs)), {}, [], 0
    try:
        while waiting or active:
            while waiting and free:
                spec, slot = waiting.pop(0), free.pop(0)
                out = folder / label(spec)
                process, begin = launch(spec, args, out, slot, jobs)
                active[process] = spec, out, slot, begin
            time.sleep(0.2)
            for process in [process for process in active if process.poll() is not None]:
                spec, out, slot, begin = active.pop(process)
                free.append(slot)
                row = finished(spec, out) if process.returncode == 0 else None
                if row:
                    add_row(path, row)
                    keep_log(out, path.parent / "logs")
                else:
                    reason = explain(process.returncode, out / "output.txt", begin)
                    failures.append(f"failed: {out.name}: {reason}")
                done += 1
                words = f"{row['val_bpb']:.4f} bits per byte" if row else "failed"
                print(f"{done} of {len(specs)}  {out.name}  {words}", flush=True)
    finally:
        for process in active:
            process.terminate()
        for process in active:
            process.wait()
    return failures


def train_missing(specs, path, args, folder):
    """Train the runs that the table at path lacks, each in a folder of its own inside folder.

    Return the rows of the table then. With --dry-run print the commands instead; with --plot-only
    do nothing. Runs that failed are named on stderr.
    """
    rows = read_rows(path)
    if args.plot_only:
        return rows
    check_alike(rows + specs, path)
    if 0 < torch.cuda.device_count() < args.nproc:
        raise InputError(f"--nproc {args.nproc}: there are {torch.cuda.device_count()} GPUs")
    # Each once, as --seeds 0 0 would have them twice.
    specs = list({settings_of(spec): spec for spec in specs}.values())
    missing = []
    for spec in specs:
        # A run may have finished without this sweep, by a line of --dry-run.
        row = find(spec, rows) or finished(spec, folder / label(spec))
        if row is None:
            missing.append(spec)
        elif row not in rows and not args.dry_run:
            add_row(path, row)
            keep_log(folder / label(spec), path.parent / "logs")
    flops = sum(spec["flops_budget"] for spec in missing)
    note = f"{len(missing)} of {len(specs)} runs to train, {flops:.2g} FLOPs"
    if args.dry_run:
        for spec in missing:
            print("python " + shlex.join(command(spec, args, folder / label(spec))))
        print(note, file=sys.stderr)
        return rows
    print(note, flush=True)
    for failure in sweep(missing, path, args, folder):
        print(failure, file=sys.stderr)
    return read_table(path)[1]


# -----------------------------------------------------------------------------------------------
# The flags of a study.

def study_arguments(doc):
    """Return the parser of scaling.py. fragility.py adds its own flags."""
    parser = run.make_parser(doc)
    flag = parser.add_argument
    flag("--budgets", type=run.number(float, 1, 1e30), nargs="+",
         help="FLOPs (default: by device; with --plot-only: all that there are)")
    flag("--widths", type=run.number(int, 1, 65536), nargs="+", help="(default: around the best)")
    flag("--seeds", type=run.number(int, 0, 2**63 - 1), nargs="+", default=[0])
    flag("--jobs", type=run.COUNT, help="runs at a time (default: one a GPU, or one a core)")
    flag("--nproc", type=run.COUNT, default=1, help="processes of a run, by torchrun")
    flag("--data", help="a corpus by name, or a file or folder (default: by the budgets)")
    flag("--vocab", type=run.number(int, 257, 65536), default=4096)
    flag("--context", type=run.number(int, 1, 2**20), default=512, help="bytes in a sequence")
    flag("--out", type=run.path, default=Path("results"), help="folder of tables and figures")
    flag("--dry-run", action="store_true", help="print the commands of missing runs and stop")
    flag("--plot-only", action="store_true", help="train nothing")
    return parser
