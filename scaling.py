"""The study: train the four cells over widths and budgets, fit their laws, and say what bytes cost, and how sure that is.

    python scaling.py                                       # small budgets, from nothing to figures
    python scaling.py --budgets 1e13 3e13 --seeds 0 1       # more; what is finished is not trained again
    python scaling.py --budgets 1e20 --dry-run | parallel -j 8      # or a SLURM array, or xargs
    python scaling.py --plot-only                           # figures and tables from results/runs.csv alone
    python scaling.py --study shuffle                       # why: fragility.py and segmentation.py say what these do

Each run is one command of train_ar.py or train_mdm.py. Finished runs are rows of results/runs.csv, and all that follows is
computed from those rows (in fits.py; tables and figures are in figures.py).
"""
import argparse
import csv
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

import data
import figures
import fragility
import run
import segmentation
import train_ar
import train_mdm
from fits import CELLS, analyse, fit_law                      # fit_law: others import it from here
from download import with_shards
from model import Config, flops_per_byte, h100_hours

HERE = Path(__file__).resolve().parent
BUDGETS = {"cpu": (2e10, 6e10, 2e11), "mps": (1e13, 3e13, 1e14), "cuda": (1e16, 3e16, 1e17, 3e17, 1e18)}
WHY_BUDGET = {"cpu": 1e12, "mps": 3e13, "cuda": 1e17}         # of the studies shuffle and span
LADDER = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 576, 768, 1024, 1344, 1664, 2176)          # widths, N doubled or a bit more at each step
TRAIN = {"ar": train_ar, "mdm": train_mdm}                    # their rules are ours: widths, and the tuned learning rates and batches
TUNE_GRID = {("ar", "bpe"): ((0.006, 0.012, 0.024), (1024, 2048, 4096)), ("ar", "byte"): ((0.003, 0.006, 0.012), (512, 1024, 2048)),
             ("mdm", "bpe"): ((0.00075, 0.0015, 0.003), (160, 320, 512, 1024)), ("mdm", "byte"): ((0.00075, 0.0015, 0.003), (512, 1024, 2048))}

# What runs.csv holds of a result.json: what sets the run apart, then what came of it.
SETTINGS = {"objective": str, "tokenizer": str, "vocab_size": int, "flops_budget": float, "width": int, "heads": int, "seed": int,
            "lr": float, "batch_tokens": int, "context_bytes": int, "context_tokens": int, "shuffle": int, "span": int, "schedule": str, "corpus": str,
            "sha256": str}
OUTCOME = {"steps": int, "tokens": int, "bytes": int, "params": int, "params_non_embedding": int, "flops_spent": float, "val_bpb": float,
           "val_bpb_stderr": float, "val_bpb_span1": lambda text: float(text) if text else None,
           "val_bpb_span1_stderr": lambda text: float(text) if text else None, "val_bytes": int, "seconds": float, "device": str, "torch": str}


# ---------------------------------------------------------------------------------------------------------------------
# What is to be trained. A run is a dict of its SETTINGS.

def settings(cell, flops, width, seed, args, corpora, lr=None, batch=None, shuffle=1, span=1):
    """The settings of a run of a cell, as its result will have them. batch: tokens; lr and batch: the tuned ones, unless given."""
    corpus, train = corpora[cell[1]], TRAIN[cell[0]]
    tokens = corpus.tokens(args.context)
    batch = batch or train.batch_rule(flops, cell[1])
    return {"objective": cell[0], "tokenizer": cell[1], "vocab_size": corpus.tokenizer.vocab_size, "flops_budget": flops, "width": width,
            "heads": Config(width=width).heads, "seed": seed, "lr": lr or train.LEARNING_RATE[cell[1]],
            "batch_tokens": tokens * max(1, round(batch / tokens)), "context_bytes": args.context, "context_tokens": tokens,
            "shuffle": shuffle, "span": span, "schedule": "" if cell[0] == "ar" else "linear", "corpus": corpus.name,
            "sha256": corpus.meta["sha256"]}


def bracket(cell, flops, count=4):
    """The widths of the ladder about the best one for the budget."""
    best = TRAIN[cell[0]].width_rule(flops)
    return sorted(sorted(LADDER, key=lambda width: abs(math.log(width / best)))[:count])


def plan_gap(args, corpora):
    return [settings(cell, flops, width, seed, args, corpora)
            for flops in args.budgets for cell in CELLS for width in args.widths or bracket(cell, flops) for seed in args.seeds]


def plan_tune(args, corpora):
    return [settings(cell, 1e12, 32, seed, args, corpora, lr=lr, batch=batch)
            for cell, (rates, batches) in TUNE_GRID.items() for lr in rates for batch in batches for seed in args.seeds]


def plan_why(args, corpora):
    return [settings(cell, flops, width, seed, args, corpora, **flags)
            for flops in args.budgets for cell, flags in fragility.interventions(args.study, corpora, args.context)
            for width in args.widths or bracket(cell, flops, 1) for seed in args.seeds]


def label(spec):
    text = f"-{spec['corpus']}" if spec["corpus"] != "pysrc" else ""
    flags = "".join(f"-{key}{spec[key]}" for key in ("shuffle", "span") if spec[key] > 1)
    return (f"{spec['objective']}-{spec['tokenizer']}-w{spec['width']}-c{spec['flops_budget']:g}-t{spec['context_tokens']}-b{spec['batch_tokens']}"
            f"-lr{spec['lr']:g}-s{spec['seed']}{flags}{text}").replace("e+", "e")


def folder(spec, study):
    return Path("runs") / study / label(spec)


def command(spec, args):
    """The run as arguments of Python."""
    script = os.path.relpath(HERE / f"train_{spec['objective']}.py")
    vocab = ["--vocab", spec["vocab_size"]] if spec["tokenizer"] == "bpe" else []
    flags = [word for key in ("shuffle", "span") if spec[key] > 1 for word in (f"--{key}", spec[key])]
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.nproc}"] if args.nproc > 1 else []
    return list(map(str, [*many, script, "--tokenizer", spec["tokenizer"], *vocab, "--flops", f"{spec['flops_budget']:g}", "--width", spec["width"],
                          "--batch", spec["batch_tokens"], "--lr", f"{spec['lr']:g}", "--seed", spec["seed"], "--context",
                          spec["context_bytes"], *flags, "--data", args.data, "--out", folder(spec, args.study)]))


# ---------------------------------------------------------------------------------------------------------------------
# runs.csv, and the runs that are not in it yet.

def row_of(result):
    """A result.json as a row of runs.csv."""
    flat = dict.fromkeys(OUTCOME) | result | {"corpus": result["corpus"]["name"], "sha256": result["corpus"]["sha256"], "schedule": result["schedule"] or ""}
    return {key: flat[key] for key in (*SETTINGS, *OUTCOME)}


def order(row):
    return [row[key] for key in SETTINGS]


def read_rows(path):
    """The rows of a runs.csv, [] if there is none. Raises InputError if it is not one."""
    if not path.exists():
        return []
    try:
        with open(path, newline="") as file:
            return [{key: kind(row[key]) for key, kind in (SETTINGS | OUTCOME).items()} for row in csv.DictReader(file)]
    except (KeyError, ValueError, TypeError) as error:
        raise run.InputError(f"{path} is not a table of runs ({type(error).__name__}: {error})") from None


def write_rows(path, rows):
    run.write_table(path, sorted(rows, key=order), [*SETTINGS, *OUTCOME])


def find(spec, rows):
    return next((row for row in rows if all(row[key] == value for key, value in spec.items())), None)


def spent(out):
    """FLOPs that an unfinished run has behind it, by its log."""
    try:
        return float((out / "log.csv").read_text().splitlines()[-1].split(",")[1])
    except (OSError, ValueError, IndexError):
        return 0.0


def launch(spec, slot, args):
    """Start a run on its share of the machine: args.nproc GPUs, or as many threads as each of args.jobs may have. -> Popen"""
    out, gpus = folder(spec, args.study), torch.cuda.device_count()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        share = {"CUDA_VISIBLE_DEVICES": ",".join(visible.split(",")[slot * args.nproc % gpus:][:args.nproc])}
    else:
        share = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // (args.jobs * args.nproc)))}
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "output.txt", "a") as output:             # in a session of its own, so that a Ctrl-C comes to us alone
        return subprocess.Popen([sys.executable, *command(spec, args)], env=os.environ | share, stdout=output, stderr=output,
                                start_new_session=True)


def sweep(missing, rows, path, args):
    """Train the missing runs, args.jobs at a time, the cheap ones first; each becomes a row of path as it ends. -> what failed"""
    waiting = sorted(missing, key=lambda spec: spec["flops_budget"])
    active, failures, done, stop = {}, [], 0.0, []
    previous = {number: signal.signal(number, lambda number, frame: stop.append(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(desc=f"{len(waiting)} runs", total=sum(spec["flops_budget"] for spec in waiting), disable=not waiting,
               mininterval=1 if sys.stderr.isatty() else 60,
               bar_format="{l_bar}{bar}| {n:.2e} of {total:.2e} FLOPs, {elapsed} gone, {remaining} left")
    with bar:
        while active or waiting and not stop:
            while waiting and not stop and len(active) < args.jobs:
                spec, slot = waiting.pop(0), min(set(range(args.jobs)) - {slot for _, slot in active.values()})
                active[launch(spec, slot, args)] = spec, slot
            time.sleep(0.2)
            for process in [process for process in active if process.poll() is not None]:
                spec, _ = active.pop(process)
                done += spec["flops_budget"]
                if process.returncode == 0:
                    rows.append(row_of(run.read_result(folder(spec, args.study), {})))
                    write_rows(path, rows)
                elif not stop:
                    words = (folder(spec, args.study) / "output.txt").read_text().splitlines()
                    words = [word for word in words if word.startswith("error: ")] or words or [f"ended with status {process.returncode}"]
                    failures.append(f"{label(spec)}: {words[-1]}")
            for process in active if stop else ():
                process.terminate()                           # it ends its step, saves and stops
                process.wait()
            bar.update(done + sum(spent(folder(spec, args.study)) for spec, _ in active.values()) - bar.n)
    for number, handler in previous.items():
        signal.signal(number, handler)
    if stop:
        print("stopped and saved; the same command goes on from there", file=sys.stderr)
        sys.exit(128 + stop[0])
    return failures


# ---------------------------------------------------------------------------------------------------------------------
# What came out.

def check_alike(rows, source, study):
    """Raises InputError unless the runs differ only in what the study varies: in cell, budget, width and seed (and in learning rate and
    batch between cells and budgets); --study shuffle and span in that; --study tune in learning rate and batch."""
    varied = {"gap": (), "tune": ("lr", "batch_tokens")}.get(study, (study,))
    for keys in (("sha256",), ("context_bytes",), ("shuffle",), ("span",), ("objective", "schedule"), ("tokenizer", "vocab_size"), ("width", "heads"),
                 ("objective", "tokenizer", "flops_budget", "lr"), ("objective", "tokenizer", "flops_budget", "batch_tokens")):
        kinds = Counter(tuple(row[key] for key in keys) for row in rows)
        groups = Counter(kind[:-1] for kind in kinds)
        if mixed := [kind for kind in kinds if groups[kind[:-1]] > 1 and keys[-1] not in varied]:
            found = ", ".join(f"{' '.join(map(str, kind))[:40]} ({kinds[kind]} runs)" for kind in sorted(mixed)[:4])
            raise run.InputError(f"{source} mixes runs of different {keys[-1]}: {found}; take them apart, or another --out")


# ---------------------------------------------------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = run.usage_error
    parser.add_argument("--study", choices=("gap", "tune", "shuffle", "span", "segmentation"), default="gap",
                        help="gap (default); tune: learning rate by batch at 1e12 FLOPs; shuffle, span, segmentation: why")
    parser.add_argument("--budgets", type=float, nargs="+", help="FLOPs (default: by device)")
    parser.add_argument("--widths", type=int, nargs="+", help="of every cell (default: four about the best of each cell and budget)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, help="runs side by side (default: one a core, or all GPUs)")
    parser.add_argument("--nproc", type=int, default=1, help="processes of each run, by torchrun: one a GPU (1)")
    parser.add_argument("--data", default="pysrc", help="pysrc (default), enwik8, enwik9, c4, slimpajama, or a file or folder")
    parser.add_argument("--vocab", type=int, default=4096, help="tokens in the BPE vocabulary (4096)")
    parser.add_argument("--context", type=int, default=512, help="bytes of text in a window (512)")
    parser.add_argument("--out", type=Path, help="folder of runs.csv and the figures (default: results)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands of the runs that are missing, and stop")
    parser.add_argument("--plot-only", action="store_true", help="train nothing: tables and figures of the runs that there are")
    parser.add_argument("--runs", type=Path, nargs="+", help="of these run folders instead of runs.csv (with --plot-only), or runs/gap (--study segmentation)")
    args = parser.parse_args()
    if args.jobs is None:
        args.jobs = max(1, (torch.cuda.device_count() or os.cpu_count() or 1) // max(1, args.nproc))
    if min(args.jobs, args.nproc) < 1:
        raise run.InputError(f"--jobs and --nproc are at least 1, not {args.jobs} and {args.nproc}")
    if args.runs and not args.plot_only and args.study != "segmentation":
        raise run.InputError("--runs goes with --plot-only")
    if args.study == "span" and args.context % max(fragility.SPANS):
        raise run.InputError(f"--study span masks up to {max(fragility.SPANS)} bytes together, which do not divide a window of {args.context}")
    if args.study == "shuffle" and (odd := [block for block in fragility.BLOCKS if block < args.context and args.context % block]):
        raise run.InputError(f"--study shuffle permutes blocks of {odd[0]} bytes, which do not divide a window of {args.context}")
    for name in ("budgets", "widths", "context"):
        values = [args.context] if name == "context" else getattr(args, name) or ()
        if any(not 0 < value < math.inf for value in values):
            raise run.InputError(f"--{name} takes positive numbers, not {' '.join(map(str, values))}")
    data.check_vocab(args.vocab)
    return args


def home(args, corpora):
    """Where runs.csv and the figures go: --out; or results, unless that holds runs on other text, which are not mixed with ours."""
    if args.out or corpora is None:
        return args.out or Path("results")
    meta, ours = corpora["byte"].meta, Path("results") / TABLE["gap" if args.study == "segmentation" else args.study]
    if any(row["sha256"] != meta["sha256"] for row in read_rows(ours)):
        aside = Path("results") / f"{meta['name']}-{meta['sha256'][:8]}"
        print(f"{ours} holds runs on other text than this {meta['name']}: ours go to {aside}", file=sys.stderr)
        return aside
    return Path("results")


TABLE = {"gap": "runs.csv", "tune": "tune.csv", "shuffle": "shuffle.csv", "span": "span.csv", "segmentation": "segmentation.csv"}
PLAN = {"gap": plan_gap, "tune": plan_tune, "shuffle": plan_why, "span": plan_why}


def show_gap(rows, out):
    found = analyse(sorted(rows, key=order))
    figures.report(found)
    figures.plot(out, found)


SHOW = {"gap": show_gap, "tune": figures.report_tune, "shuffle": fragility.show_shuffle, "span": fragility.show_span}


def segment(args):
    """--study segmentation: nothing is trained, finished runs are read."""
    out = home(args, None if args.plot_only else {"byte": data.load(args.data)})
    if not args.plot_only:
        readings, line = segmentation.study(args.runs or sorted(Path("runs/gap").glob("*")), args.data)
        run.write_table(out / "segmentation.csv", readings, list(segmentation.COLUMNS))
        run.write_table(out / "entropy.csv", line, list(line[0]) if line else ["byte"])
    segmentation.show(out)


def main():
    args = parse_args()
    if args.study == "segmentation":
        return segment(args)
    failures, plan = [], []
    if args.plot_only:
        out = home(args, None)
        path = out / TABLE[args.study]
        rows = read_rows(path)
        if args.runs:
            results = [run.read_result(folder, {}) or {} for folder in args.runs]
            if {} in results:
                raise run.InputError(f"{args.runs[results.index({})]} holds no finished run")
            rows = list(map(row_of, results))
        if args.budgets:
            rows = [row for row in rows if row["flops_budget"] in args.budgets]
    else:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        args.budgets = {"tune": [1e12]}.get(args.study) or args.budgets or (BUDGETS[device] if args.study == "gap" else [WHY_BUDGET[device]])
        need = max(flops / flops_per_byte(min(args.widths or bracket(cell, flops)), cell[1], args.vocab, args.context)
                   for flops in args.budgets for cell in CELLS)
        # The same shards for all runs. A dry run reads one, to know how many tokens a window has.
        sample, args.data = with_shards(args.data, 1), with_shards(args.data, need)
        corpora = {tokenizer: data.load(sample if args.dry_run else args.data, tokenizer, args.vocab) for tokenizer in ("byte", "bpe")}
        if args.dry_run and sample != args.data:
            for corpus in corpora.values():
                corpus.name = args.data.replace(":", "-")
        out = home(args, corpora)
        path = out / TABLE[args.study]
        plan, rows = PLAN[args.study](args, corpora), read_rows(path)
        for spec in plan:                                     # runs that ended in their folder, but never came to the table
            result = run.read_result(folder(spec, args.study), {})
            if result and not find(spec, rows) and find(spec, [row_of(result)]):
                rows.append(row_of(result))
        missing = [spec for spec in plan if not find(spec, rows)]
        if args.dry_run:
            for spec in missing:
                print("python " + shlex.join(command(spec, args)))
            flops = sum(spec["flops_budget"] for spec in missing)
            print(f"{len(missing)} runs, {flops:.3g} FLOPs: {h100_hours(flops):,.{0 if flops > 1e19 else 3}f} H100-hours at 40% utilisation", file=sys.stderr)
            return
        check_alike(rows + plan, path, args.study)
        print(f"{len(plan)} runs, {len(plan) - len(missing)} of them finished; {sum(spec['flops_budget'] for spec in missing):.2g} FLOPs to go, "
              f"{args.jobs} runs at a time", flush=True)
        failures = sweep(missing, rows, path, args)
        write_rows(path, rows)
        kept = [row for row in rows if row["flops_budget"] in args.budgets]
        if len(kept) < len(rows):
            print(f"{len(rows) - len(kept)} rows of {path} have other budgets: left out (--plot-only takes all)")
        rows = kept
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    if not rows:
        raise run.InputError(f"no finished runs in {path}")
    check_alike(rows, path, args.study)
    SHOW[args.study](rows, out)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    run.run_script(main)
