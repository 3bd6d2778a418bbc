"""The study: sweep widths under FLOP budgets, fit scaling laws, plot the efficiency gap of bytes.

    python scaling.py --out results/mine                        # small budgets, tables and figures
    python scaling.py --budgets 1e13 3e13 --seeds 0 1           # finished runs are not repeated
    python scaling.py --budgets 1e20 --dry-run > commands.txt   # for another scheduler
    python scaling.py --plot-only                               # from results/runs.csv alone

Each run is one command of train_ar.py or train_mdm.py. A finished run is a row of results/runs.csv,
and everything below is computed from those rows.
"""
import csv
import ctypes
import itertools
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import data
import laws
import run
import train_ar
import train_mdm
from model import Config, flops_per_token
from run import InputError

fit_law = laws.fit_law
TRAIN = {"ar": train_ar, "mdm": train_mdm}
CONFIGURATIONS = {("ar", "bpe"): "AR, BPE", ("ar", "byte"): "AR, bytes",
                  ("mdm", "bpe"): "MDM, BPE", ("mdm", "byte"): "MDM, bytes"}
# Okabe and Ito's colours, which all eyes can tell apart.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
COLORS = dict(zip(CONFIGURATIONS, ("#56B4E9", "#0072B2", "#E69F00", "#D55E00"), strict=True))
BUDGETS = {"cpu": (2e10, 6e10, 2e11), "mps": (1e13, 3e13, 1e14),
           "cuda": (1e16, 3e16, 1e17, 3e17, 1e18)}
WIDTHS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 576, 768, 1024, 1344, 1664, 2176)
# No frontier is followed beyond these FLOPs.
FAR = 1e30
# The columns of runs.csv. SETTINGS tell runs apart: two rows of equal SETTINGS are one run.
SETTINGS = {"objective": str, "tokenizer": str, "vocab_size": int, "flops_budget": float,
            "width": int, "heads": int, "seed": int, "lr": float, "batch_tokens": int,
            "context_bytes": int, "context_tokens": int, "shuffle": int, "span": int,
            "schedule": str, "corpus": str, "sha256": str}
RESULTS = {"steps": int, "tokens": int, "bytes": int, "params": int, "params_non_embedding": int,
           "flops_spent": float, "val_bpb": float, "val_bpb_stderr": float, "val_bpb_span1": float,
           "val_bpb_span1_stderr": float, "val_bytes": int, "seconds": float, "device": str,
           "torch": str}
COLUMNS = SETTINGS | RESULTS
# What a row can do without: not every run has them.
OPTIONAL = {"val_bpb_stderr", "val_bpb_span1", "val_bpb_span1_stderr", "seconds", "device", "torch"}


# -----------------------------------------------------------------------------------------------
# What is to be trained. A run is a dict of its SETTINGS.

def bracket(objective, flops, count=4):
    """Return the widths around the one that is expected to be best, the wider of two as near."""
    best = run.default_width(flops, TRAIN[objective].WIDTH)
    nearest = sorted(WIDTHS, key=lambda width: (abs(math.log(width / best)), -width))
    return sorted(nearest[:count])


def settings(configuration, flops, width, seed, args, corpora, lr=None, batch=None, shuffle=1,
             span=1):
    """Return the settings of a run, a dict with the keys of SETTINGS, as its row will have them.

    lr and batch (tokens): the tuned ones, unless given. corpora: as load_corpora returns them.
    Raises InputError if the budget does not pay for a step.
    """
    objective, tokenizer = configuration
    corpus, train = corpora[tokenizer], TRAIN[objective]
    tokens = corpus.tokens(args.context)
    config = Config(corpus.tokenizer.vocab_size, tokens, width)
    batch = batch or train.batch_tokens(flops, tokenizer)
    batch_tokens = tokens * run.whole_sequences(batch, tokens)
    if flops < flops_per_token(config) * batch_tokens:
        raise InputError(f"{exact(flops)} FLOPs do not pay for one step of "
                         f"{CONFIGURATIONS[configuration]} at width {width}: raise --budgets, or "
                         "lower --widths")
    return {"objective": objective, "tokenizer": tokenizer, "vocab_size": config.vocab_size,
            "flops_budget": float(flops), "width": width, "heads": config.heads, "seed": seed,
            "lr": lr or train.LEARNING_RATE[tokenizer], "batch_tokens": batch_tokens,
            "context_bytes": args.context, "context_tokens": tokens, "shuffle": shuffle,
            "span": span, "schedule": "" if objective == "ar" else "linear",
            "corpus": corpus.name, "sha256": corpus.meta["sha256"]}


def plan(args, corpora):
    """Return the runs of the study."""
    return [settings(configuration, flops, width, seed, args, corpora)
            for flops in args.budgets for configuration in CONFIGURATIONS
            for width in args.widths or bracket(configuration[0], flops) for seed in args.seeds]


def load_corpora(args):
    """Return {"byte": Corpus, "bpe": Corpus} of args.data, which is changed to name its shards.

    All runs read the same shards, as many as the run that reads most. A dry run reads one shard, to
    know how many tokens a sequence has, so its sha256 is not known: None. Raises InputError for a
    width that no model can have.
    """
    try:
        needs = [run.bytes_needed(flops, width, tokenizer, args.vocab, args.context)
                 for flops in args.budgets for objective, tokenizer in CONFIGURATIONS
                 for width in args.widths or bracket(objective, flops)]
    except ValueError as error:
        raise InputError(f"--widths: {error}") from None
    whole = data.with_shards(args.data, max(needs))
    source = data.with_shards(args.data, 1) if args.dry_run else whole
    corpora = {tokenizer: data.load(source, tokenizer, args.vocab) for tokenizer in ("byte", "bpe")}
    if source != whole:
        for corpus in corpora.values():
            corpus.name = whole.replace(":", "-")
            corpus.meta["sha256"] = None
    args.data = whole
    return corpora


def short(text):
    """Return a number without the signs and zeros that Python writes into exponents: "1e4"."""
    return re.sub(r"e\+0*", "e", text)


def exact(number):
    """Return the shortest text that reads back as this number: "1e12"."""
    return short(f"{number:g}" if float(f"{number:g}") == number else repr(number))


def label(spec):
    """Return the name of a run's folder."""
    size = spec["vocab_size"] if spec["tokenizer"] == "bpe" else ""
    name = (f"{spec['objective']}-{spec['tokenizer']}{size}-w{spec['width']}"
            f"-c{exact(spec['flops_budget'])}-t{spec['context_bytes']}-b{spec['batch_tokens']}"
            f"-lr{exact(spec['lr'])}-s{spec['seed']}")
    name += "".join(f"-{key}{spec[key]}" for key in ("shuffle", "span") if spec[key] > 1)
    return name if spec["corpus"] == "pysrc" else f"{name}-{spec['corpus']}"


def command(spec, args, out):
    """Return the run as arguments of Python."""
    script = os.path.relpath(Path(__file__).resolve().with_name(f"train_{spec['objective']}.py"))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.nproc}"]
    flags = {"tokenizer": spec["tokenizer"], "flops": exact(spec["flops_budget"]),
             "width": spec["width"], "batch": spec["batch_tokens"], "lr": exact(spec["lr"]),
             "seed": spec["seed"], "context": spec["context_bytes"], "data": args.data, "out": out}
    if spec["tokenizer"] == "bpe":
        flags["vocab"] = spec["vocab_size"]
    flags |= {key: spec[key] for key in ("shuffle", "span") if spec[key] > 1}
    words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    return [*(launcher if args.nproc > 1 else []), script, *words]


# -----------------------------------------------------------------------------------------------
# The table of finished runs. A row is a dict of SETTINGS, RESULTS, and what else its file has.

def parse(line):
    """Return the row in a line (a dict of texts). Raises ValueError if it is not a result."""
    if None in line or (line["objective"], line["tokenizer"]) not in CONFIGURATIONS:
        raise ValueError("it is not a run of ours")
    row = dict(line)
    for key, kind in COLUMNS.items():
        try:
            row[key] = None if key in OPTIONAL and line[key] == "" else kind(line[key])
        except ValueError:
            raise ValueError(f"{key} is {line[key]!r}") from None
        smallest = 0 if key == "seed" else 1e-12
        if kind is not str and key not in OPTIONAL and not smallest <= row[key] <= 1e40:
            raise ValueError(f"{key} is {line[key]}")
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
    if missing := [key for key in COLUMNS if key not in (table.fieldnames or ())]:
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
    """Return the row of the run with these settings, or None. A setting of None fits all."""
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
    bpe = [row for row in rows if row["tokenizer"] == "bpe"]
    for column, group in (("sha256", rows), ("context_bytes", rows), ("vocab_size", bpe)):
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


def sweep(specs, path, args, folder):
    """Train runs, the cheap ones first, args.jobs at a time. Each becomes a row of path as it ends.

    Return a line for each run that failed. However this ends, no run is left behind.
    """
    jobs = args.jobs or max(1, (torch.cuda.device_count() or os.cpu_count() or 1) // args.nproc)
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
# The analysis.

def by_the_rules(row):
    """Return whether a run has today's batch and learning rate, and nothing that others study."""
    train, tokens = TRAIN[row["objective"]], row["context_tokens"]
    batch = train.batch_tokens(row["flops_budget"], row["tokenizer"])
    return (row["batch_tokens"] == tokens * run.whole_sequences(batch, tokens)
            and row["lr"] == train.LEARNING_RATE[row["tokenizer"]]
            and row["shuffle"] == row["span"] == 1 and row["schedule"] in ("", "linear"))


def analyse(rows):
    """Find minima and laws. Return (budgets, C, found, gaps); a bootstrap begins with the fit.

    C: budgets of the frontiers (K,). found: {configuration: dict of N, D, L (n,), curves {budget:
    (N, L, IsoFLOP minimum)} and, if its runs determine them, minima (budgets (J,), (1 + S, J)),
    laws (1 + S, 5) and frontier (1 + S, K)}. gaps: {objective: dict of bits, compute (1 + S, K) and
    parity (1 + S,)}, from the laws.
    """
    rows = sorted(rows, key=settings_of)
    budgets = np.array(sorted({row["flops_budget"] for row in rows}))
    C = np.unique(np.concatenate([np.geomspace(budgets[0] / 3, FAR, 200), budgets]))
    found, gaps = {}, {}
    for seed, configuration in enumerate(CONFIGURATIONS):
        own = [row for row in rows if (row["objective"], row["tokenizer"]) == configuration]
        if not own:
            continue
        N, D, L, at = (np.array([row[key] for row in own], dtype=float) for key in
                       ("params_non_embedding", "tokens", "val_bpb", "flops_budget"))
        curves = {}
        for budget in sorted(set(at)):
            n, loss = N[at == budget], L[at == budget]
            curves[budget] = n, loss, laws.isoflop_minimum(n, loss)
        one = found[configuration] = {"N": N, "D": D, "L": L, "curves": curves}
        if len(N) > len(curves) + 3 and any(fit for _, _, fit in curves.values()):
            minima = laws.resampled_minima(at, N, L, seed)
            if np.isfinite(minima[1]).all():
                one["minima"] = minima
        if len(N) >= 6 and len(curves) >= 2 and laws.determined(N, D):
            one["laws"] = laws.fit_laws(N, D, L, laws.bootstrap_weights(N, D, seed))
            shape = own[0]["vocab_size"], own[0]["context_tokens"]
            one["frontier"] = laws.frontier(one["laws"], C, *shape)
    fitted = {key: one["frontier"] for key, one in found.items() if "laws" in one}
    for objective in TRAIN:
        if {(objective, "byte"), (objective, "bpe")} <= set(fitted):
            byte, bpe = fitted[objective, "byte"], fitted[objective, "bpe"]
            seen = C >= budgets[0]
            gaps[objective] = {"bits": byte - bpe, "compute": laws.gap(byte, bpe, C),
                               "parity": laws.parity(byte[:, seen], bpe[:, seen], C[seen])}
    return budgets, C, found, gaps


def gaps_without_law(found):
    """Return {objective: (budgets (K,), bits lost (1 + S, K), G (1 + S, K), the largest budget)}.

    Read from the minima of the budgets that both of its configurations were trained at.
    """
    gaps = {}
    for objective in TRAIN:
        pair = [found.get((objective, tokenizer), {}) for tokenizer in ("byte", "bpe")]
        if not all("minima" in one for one in pair):
            continue
        (byte_budgets, byte), (bpe_budgets, bpe) = (one["minima"] for one in pair)
        both = np.intersect1d(byte_budgets, bpe_budgets)
        bits = byte[:, np.isin(byte_budgets, both)] - bpe[:, np.isin(bpe_budgets, both)]
        compute = laws.interpolated_gap(byte_budgets, byte, bpe_budgets, bpe)
        gaps[objective] = both, bits, compute[:, np.isin(bpe_budgets, both)], byte_budgets[-1]
    return gaps


# -----------------------------------------------------------------------------------------------
# The tables, in Markdown.

def interval(values, digits=3, far="never"):
    """Return the first of the values, and the 90% interval of the others: "2.51 [2.40, 2.63]".

    far: what stands for infinity.
    """
    def text(value):
        if np.isinf(value):
            return far
        return short(f"{value:.0e}") if value >= 1e4 else f"{value:#.{digits}g}".rstrip(".")
    low, high = np.quantile(values[1:], (0.05, 0.95), method="nearest")
    return f"{text(values[0])} [{text(low)}, {text(high)}]"


def print_table(title, columns, rows):
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def law_row(configuration, one):
    E, A, B, alpha, beta = one["laws"][0]
    residuals = one["L"] - E - A * one["N"] ** -alpha - B * one["D"] ** -beta
    return [CONFIGURATIONS[configuration], str(len(residuals)), *map(interval, one["laws"].T),
            f"{np.sqrt(np.mean(residuals**2)):.3f}"]


def minimum(curve):
    """Return the minimum of an IsoFLOP curve in words. curve: (N, L, its parabola), or None."""
    if curve is None:
        return ""
    _, L, fit = curve
    if fit is None:
        return f"{min(L):.3f} (not bracketed)"
    return short(f"{fit[1]:.3f} ({fit[0]:.2g})")


def gap_rows(objective, gap, budgets, C, top):
    """Return a row for each budget. top: the largest budget of the byte model."""
    rows = []
    for budget, k in zip(budgets, np.searchsorted(C, budgets), strict=True):
        bits, compute = interval(gap["bits"][:, k]), interval(gap["compute"][:, k])
        extrapolated = " (extrapolated)" if gap["compute"][0, k] * budget > top else ""
        rows.append([objective.upper(), exact(budget), bits, compute + extrapolated])
    return rows


def direct_rows(objective, budgets, bits, compute, top):
    """Return a row for each budget, of what gaps_without_law returns."""
    rows = []
    for k, budget in enumerate(budgets):
        bound = f"above {int(top / budget)}" if top > budget else ""
        G = interval(compute[:, k], far=bound).replace(f"{bound} [{bound}, {bound}]", bound)
        rows.append([objective.upper(), exact(budget), interval(bits[:, k]), G])
    return rows


def report(budgets, C, found, gaps):
    """Print the gap without a law, then the laws, the IsoFLOP minima, their gap and parity."""
    if direct := gaps_without_law(found):
        print_table("The gap of bytes without a law, from IsoFLOP minima with one curvature a "
                    f"configuration; [90% of {laws.RESAMPLES} samples of residuals]",
                    ["objective", "FLOPs of BPE", "bits per byte lost", "G"],
                    [row for item in direct.items() for row in direct_rows(item[0], *item[1])])
    fitted = {key: one for key, one in found.items() if "laws" in one}
    if fitted:
        print_table("Laws of bits per byte, E + A / N^alpha + B / D^beta, N without embeddings, D "
                    f"in tokens; [90% of {laws.RESAMPLES} bootstrap samples]",
                    ["configuration", "runs", *laws.NAMES, "rms of residuals"],
                    [law_row(*item) for item in fitted.items()])
    if lacking := [name for key, name in CONFIGURATIONS.items() if key not in fitted]:
        print(f"\nno law for {'; '.join(lacking)}: that takes six runs, of two budgets, three "
              "widths and three numbers of tokens")
    print_table("IsoFLOP minima: bits per byte (parameters without embeddings)",
                ["configuration", *map(exact, budgets)],
                [[CONFIGURATIONS[key], *(minimum(one["curves"].get(budget)) for budget in budgets)]
                 for key, one in found.items()])
    if gaps:
        top = {objective: max(found[objective, "byte"]["curves"]) for objective in gaps}
        print_table("The gap by the laws, in bits per byte at equal compute, and in compute at "
                    "equal bits per byte", ["objective", "FLOPs of BPE", "gap in bits", "gap G"],
                    [row for objective, gap in gaps.items()
                     for row in gap_rows(objective, gap, budgets, C, top[objective])])
        print_table(f"Parity of the frontiers, extrapolated up to {exact(FAR)} FLOPs",
                    ["objective", "FLOPs at parity", "samples without parity"],
                    [[objective.upper(), interval(gap["parity"], 2),
                      f"{np.isinf(gap['parity'][1:]).mean():.0%}"]
                     for objective, gap in gaps.items()])


# -----------------------------------------------------------------------------------------------
# The figures.

def draw(path, shape, size, paint, legend_columns=4):
    """Call paint(axes) on a figure of shape (rows, columns) of panels, and write it to path.

    size: in inches, 120 pixels each. All labels go into one legend below the panels.
    """
    # Imported here, since it is slow to import.
    from matplotlib.figure import Figure
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(*shape, sharex=True, sharey=True, squeeze=False)
    paint(axes)
    labels = {}
    for ax in axes.flat:
        ax.set_xscale("log")
        ax.grid(alpha=0.3)
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            labels.setdefault(name, handle)
    if labels:
        figure.legend(labels.values(), labels.keys(), loc="outside lower center",
                      ncols=legend_columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    run.write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=120))


def paint_isoflops(axes, found):
    budgets = sorted({budget for one in found.values() for budget in one["curves"]})
    colors = dict(zip(budgets, itertools.cycle(OKABE_ITO), strict=False))
    for (configuration, title), ax in zip(CONFIGURATIONS.items(), axes.flat, strict=True):
        ax.set(title=title)
        curves = found[configuration]["curves"] if configuration in found else {}
        for budget, (N, L, fit) in curves.items():
            ax.plot(N, L, "o", color=colors[budget], markersize=4, label=f"{exact(budget)} FLOPs")
            if fit:
                x = np.geomspace(min(N), max(N))
                ax.plot(x, fit[2](np.log(x)), color=colors[budget], linewidth=1)
                ax.plot(fit[0], fit[1], "*", color=colors[budget], markersize=12,
                        markeredgecolor="black")
    for ax in axes[-1]:
        ax.set(xlabel="parameters without embeddings")
    for ax in axes[:, 0]:
        ax.set(ylabel="bits per byte (star: minimum)")


def band(ax, x, values, trained, color, label):
    """Draw values (1 + S, K) at x (K,): solid where trained, dotted beyond, with a 90% band."""
    low, high = np.quantile(values[1:], (0.05, 0.95), axis=0, method="nearest")
    ax.fill_between(x, low, np.minimum(high, 1e6), color=color, alpha=0.15, linewidth=0)
    ax.plot(x, values[0], ":", color=color, linewidth=1.5)
    ax.plot(x[trained], values[0, trained], color=color, linewidth=2.5, label=label)


def paint_frontiers(axes, budgets, C, found):
    ax = axes[0, 0]
    for configuration, one in found.items():
        color, curves = COLORS[configuration], one["curves"]
        for budget, (_, L, fit) in curves.items():
            ax.plot(budget, fit[1] if fit else min(L), "o" if fit else "v", color=color)
        if "laws" in one:
            near = (C >= min(curves)) & (C <= 100 * budgets[-1])
            band(ax, C[near], one["frontier"][:, near], C[near] <= max(curves), color,
                 CONFIGURATIONS[configuration])
    ax.set(xlabel="training FLOPs (dotted: extrapolated)", ylabel="bits per byte, best width",
           title="dots: IsoFLOP minima (triangles: not bracketed); bands: 90%")


def paint_gap(axes, direct):
    ax = axes[0, 0]
    for objective, (budgets, bits, _, _) in direct.items():
        low, high = np.quantile(bits[1:], (0.05, 0.95), axis=0, method="nearest")
        ax.errorbar(budgets, bits[0], (bits[0] - low, high - bits[0]), fmt="o-", capsize=3,
                    color=COLORS[objective, "byte"], label=f"{objective.upper()}; bars: 90%")
    ax.set(xlabel="training FLOPs", ylabel="bits per byte that bytes lose", ylim=(0, None))


def plot(out, budgets, C, found):
    """Draw isoflops.png and, as far as there are laws and gaps, frontier.png and gap.png."""
    draw(out / "isoflops.png", (2, 2), (7.5, 7), lambda axes: paint_isoflops(axes, found), 5)
    if any("laws" in one for one in found.values()):
        draw(out / "frontier.png", (1, 1), (7.5, 5),
             lambda axes: paint_frontiers(axes, budgets, C, found))
    if direct := gaps_without_law(found):
        draw(out / "gap.png", (1, 1), (7.5, 4.5), lambda axes: paint_gap(axes, direct))
    print(f"\nfigures: {out}")


# -----------------------------------------------------------------------------------------------

def study_arguments(doc):
    """Return the parser of a study: this one's, and those of fragility.py."""
    parser = run.make_parser(doc)
    flag = parser.add_argument
    flag("--budgets", type=run.number(float, 1, 1e30), nargs="+",
         help="FLOPs (default: by device; with --plot-only: all that there are)")
    flag("--widths", type=run.number(int, 1, 65536), nargs="+", help="(default: around the best)")
    flag("--seeds", type=run.number(int, 0, 2**63 - 1), nargs="+", default=[0])
    flag("--jobs", type=run.COUNT, help="runs at a time (default: one a core, or all GPUs)")
    flag("--nproc", type=run.COUNT, default=1, help="processes of a run, by torchrun")
    flag("--data", default="pysrc", help="a corpus by name, or a file or folder")
    flag("--vocab", type=run.number(int, 257, 65536), default=4096)
    flag("--context", type=run.number(int, 1, 2**20), default=512, help="bytes in a sequence")
    flag("--out", type=run.path, default=Path("results"), help="folder of tables and figures")
    flag("--dry-run", action="store_true", help="print the commands of missing runs and stop")
    flag("--plot-only", action="store_true", help="train nothing")
    return parser


def main():
    args = study_arguments(__doc__).parse_args()
    path, specs = args.out / "runs.csv", []
    if not args.plot_only:
        cuda, mps = torch.cuda.device_count() > 0, torch.backends.mps.is_available()
        args.budgets = args.budgets or BUDGETS["cuda" if cuda else "mps" if mps else "cpu"]
        specs = plan(args, load_corpora(args))
    rows = train_missing(specs, path, args, Path("runs/gap"))
    if args.dry_run:
        return
    failed = [spec for spec in specs if find(spec, rows) is None]
    chosen = args.budgets if args.plot_only else None
    kept = [row for row in rows if not chosen or row["flops_budget"] in chosen]
    used = [row for row in kept if by_the_rules(row)]
    if len(used) < len(kept):
        print(f"{path}: {len(kept) - len(used)} runs of other batches, learning rates or flags are "
              "left out of the fits", file=sys.stderr)
    if not used:
        raise InputError(f"{path} has no finished run to show")
    check_alike(used, path)
    found = analyse(used)
    report(*found)
    plot(args.out, *found[:3])
    if failed:
        sys.exit(2)


if __name__ == "__main__":
    run.run_script(main)
