"""The study: train the four cells over widths and budgets, fit their laws, and say what bytes cost, and how sure that is.

    python scaling.py                                       # small budgets, from nothing to figures
    python scaling.py --budgets 1e13 3e13 --seeds 0 1       # more; what is finished is not trained again
    python scaling.py --budgets 1e20 --dry-run | parallel -j 8      # or a SLURM array, or xargs
    python scaling.py --plot-only                           # figures and tables from results/runs.csv alone

Each run is one command of train_ar.py or train_mdm.py. Finished runs are rows of results/runs.csv, and all that follows is
computed from those rows (in fits.py; tables and figures are in figures.py).
"""
import argparse
import csv
import io
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
import run
from fits import CELLS, analyse, fit_law                      # fit_law: others import it from here
from model import Config

HERE = Path(__file__).resolve().parent
BUDGETS = {"cpu": (5e10, 2e11, 6e11), "mps": (1e13, 3e13, 1e14), "cuda": (1e16, 3e16, 1e17, 3e17, 1e18)}
LADDER = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 576, 768, 1024, 1408, 2048)          # widths, N doubled or a bit more at each step
# Learning rate and batch (tokens, at 1e12 FLOPs) by `--study tune`: the best of the table in the README, but for MDM on bytes, whose
# best by 0.015 is 0.003, and 0.0015 at larger widths. Batches grow as C^0.3.
TUNED = {("ar", "bpe"): (0.012, 2048), ("ar", "byte"): (0.003, 512), ("mdm", "bpe"): (0.0015, 320), ("mdm", "byte"): (0.0015, 512)}
TUNE_GRID = {("ar", "bpe"): ((0.006, 0.012, 0.024), (1024, 2048, 4096)), ("ar", "byte"): ((0.003, 0.006, 0.012), (512, 1024, 2048)),
             ("mdm", "bpe"): ((0.00075, 0.0015, 0.003), (160, 320, 512, 1024)), ("mdm", "byte"): ((0.00075, 0.0015, 0.003), (512, 1024, 2048))}

# What runs.csv holds of a result.json: what sets the run apart, then what came of it.
SETTINGS = {"objective": str, "tokenizer": str, "vocab_size": int, "flops_budget": float, "width": int, "heads": int, "seed": int,
            "lr": float, "batch_tokens": int, "context_bytes": int, "context_tokens": int, "shuffle": int, "span": int, "schedule": str, "corpus": str,
            "sha256": str}
OUTCOME = {"steps": int, "tokens": int, "bytes": int, "params": int, "params_non_embedding": int, "flops_spent": float, "val_bpb": float,
           "val_bpb_stderr": float, "val_bytes": int, "seconds": float, "device": str, "torch": str}


# ---------------------------------------------------------------------------------------------------------------------
# What is to be trained. A run is a dict of its SETTINGS.

def settings(cell, flops, width, seed, lr, batch, context, corpora):
    """The settings of a run of a cell, as its result will have them. batch: tokens; context: bytes."""
    corpus = corpora[cell[1]]
    tokens = corpus.tokens(context)
    return {"objective": cell[0], "tokenizer": cell[1], "vocab_size": corpus.tokenizer.vocab_size, "flops_budget": flops, "width": width,
            "heads": Config(width=width).heads, "seed": seed, "lr": lr,
            "batch_tokens": tokens * max(1, round(batch / tokens)), "context_bytes": context, "context_tokens": tokens, "shuffle": 1,
            "span": 1, "schedule": "" if cell[0] == "ar" else "linear", "corpus": corpus.name, "sha256": corpus.meta["sha256"]}


def bracket(cell, flops):
    """Four widths of the ladder about the best one for the budget, as the published study has it below 1e14 FLOPs, and SMDM at 1e18."""
    best = min((32 if cell[0] == "ar" else 22) * (flops / 1e12) ** 0.35, 576 * (flops / 1e18) ** (1 / 6))
    return sorted(sorted(LADDER, key=lambda width: abs(math.log(width / best)))[:4])


def plan_gap(args, corpora):
    return [settings(cell, flops, width, seed, TUNED[cell][0], TUNED[cell][1] * (flops / 1e12) ** 0.3, args.context, corpora)
            for flops in args.budgets for cell in CELLS for width in args.widths or bracket(cell, flops) for seed in args.seeds]


def plan_tune(args, corpora):
    return [settings(cell, 1e12, 32, seed, lr, batch, args.context, corpora)
            for cell, (rates, batches) in TUNE_GRID.items() for lr in rates for batch in batches for seed in args.seeds]


def label(spec):
    text = f"-{spec['corpus']}" if spec["corpus"] != "pysrc" else ""
    return (f"{spec['objective']}-{spec['tokenizer']}-w{spec['width']}-c{spec['flops_budget']:g}-t{spec['context_tokens']}-b{spec['batch_tokens']}"
            f"-lr{spec['lr']:g}-s{spec['seed']}{text}").replace("e+", "e")


def folder(spec, study):
    return Path("runs") / study / label(spec)


def command(spec, args):
    """The run as arguments of Python."""
    script = os.path.relpath(HERE / f"train_{spec['objective']}.py")
    vocab = ["--vocab", spec["vocab_size"]] if spec["tokenizer"] == "bpe" else []
    return list(map(str, [script, "--tokenizer", spec["tokenizer"], *vocab, "--flops", f"{spec['flops_budget']:g}", "--width", spec["width"],
                          "--batch", spec["batch_tokens"], "--lr", f"{spec['lr']:g}", "--seed", spec["seed"], "--context",
                          spec["context_bytes"], "--data", args.data, "--out", folder(spec, args.study)]))


# ---------------------------------------------------------------------------------------------------------------------
# runs.csv, and the runs that are not in it yet.

def row_of(result):
    """A result.json as a row of runs.csv."""
    flat = result | {"corpus": result["corpus"]["name"], "sha256": result["corpus"]["sha256"], "schedule": result["schedule"] or ""}
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
    text = io.StringIO()
    table = csv.DictWriter(text, [*SETTINGS, *OUTCOME], lineterminator="\n")
    table.writeheader()
    table.writerows(sorted(rows, key=order))
    path.parent.mkdir(parents=True, exist_ok=True)
    run.write_atomic(path, lambda file: file.write(text.getvalue().encode()))


def find(spec, rows):
    return next((row for row in rows if all(row[key] == value for key, value in spec.items())), None)


def spent(out):
    """FLOPs that an unfinished run has behind it, by its log."""
    try:
        return float((out / "log.csv").read_text().splitlines()[-1].split(",")[1])
    except (OSError, ValueError, IndexError):
        return 0.0


def launch(spec, slot, args):
    """Start a run on its share of the machine: one GPU, or as many threads as each of args.jobs may have. -> Popen"""
    out, gpus = folder(spec, args.study), torch.cuda.device_count()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        share = {"CUDA_VISIBLE_DEVICES": visible.split(",")[slot % gpus]}
    else:
        share = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
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
                    failures.append(f"{label(spec)}: {words[-1] if words else f'ended with status {process.returncode}'}")
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

def check_alike(rows, source):
    """Raises InputError unless the runs differ only in cell, budget, width and seed (and in learning rate and batch between cells
    and budgets)."""
    for keys in (("sha256",), ("context_bytes",), ("shuffle",), ("span",), ("objective", "schedule"), ("tokenizer", "vocab_size"), ("width", "heads"),
                 ("objective", "tokenizer", "flops_budget", "lr"), ("objective", "tokenizer", "flops_budget", "batch_tokens")):
        kinds = Counter(tuple(row[key] for key in keys) for row in rows)
        groups = Counter(kind[:-1] for kind in kinds)
        if mixed := [kind for kind in kinds if groups[kind[:-1]] > 1]:
            found = ", ".join(f"{' '.join(map(str, kind))[:40]} ({kinds[kind]} runs)" for kind in sorted(mixed)[:4])
            raise run.InputError(f"{source} mixes runs of different {keys[-1]}: {found}; take them apart, or another --out")


# ---------------------------------------------------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = run.usage_error
    parser.add_argument("--study", choices=("gap", "tune"), default="gap", help="gap (default), or tune: learning rate by batch at 1e12 FLOPs")
    parser.add_argument("--budgets", type=float, nargs="+", help="FLOPs (default: by device)")
    parser.add_argument("--widths", type=int, nargs="+", help="of every cell (default: four about the best of each cell and budget)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, help="runs side by side (default: one a core, or one a GPU)")
    parser.add_argument("--data", default="pysrc", help="pysrc (default), or a file or folder")
    parser.add_argument("--vocab", type=int, default=4096, help="tokens in the BPE vocabulary (4096)")
    parser.add_argument("--context", type=int, default=512, help="bytes of text in a window (512)")
    parser.add_argument("--out", type=Path, help="folder of runs.csv and the figures (default: results)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands of the runs that are missing, and stop")
    parser.add_argument("--plot-only", action="store_true", help="train nothing: tables and figures of the runs that there are")
    parser.add_argument("--runs", type=Path, nargs="+", help="with --plot-only: of these run folders instead of runs.csv")
    args = parser.parse_args()
    if args.jobs is None:
        args.jobs = torch.cuda.device_count() or os.cpu_count() or 1
    if args.jobs < 1:
        raise run.InputError(f"--jobs is at least 1, not {args.jobs}")
    if args.runs and not args.plot_only:
        raise run.InputError("--runs goes with --plot-only")
    if any(not 0 < flops < math.inf for flops in args.budgets or ()):
        raise run.InputError(f"--budgets are positive numbers, not {args.budgets}")
    return args


def home(args, corpora):
    """Where runs.csv and the figures go: --out; or results, unless that holds runs on other text, which are not mixed with ours."""
    if args.out or corpora is None:
        return args.out or Path("results")
    meta = corpora["byte"].meta
    if any(row["sha256"] != meta["sha256"] for row in read_rows(Path("results") / TABLE[args.study])):
        aside = Path("results") / f"{meta['name']}-{meta['sha256'][:8]}"
        print(f"results/{TABLE[args.study]} holds runs on other text than this {meta['name']}: ours go to {aside}")
        return aside
    return Path("results")


TABLE = {"gap": "runs.csv", "tune": "tune.csv"}
PLAN = {"gap": plan_gap, "tune": plan_tune}


def main():
    args = parse_args()
    failures, plan, corpora = [], [], None
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
        args.budgets = args.budgets or BUDGETS[device]
        corpora = {tokenizer: data.load(args.data, tokenizer, args.vocab) for tokenizer in ("byte", "bpe")}
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
            return
        check_alike(rows + plan if args.study == "gap" else [], path)
        print(f"{len(plan)} runs, {len(plan) - len(missing)} of them finished; {sum(spec['flops_budget'] for spec in missing):.2g} FLOPs to go, "
              f"{args.jobs} runs at a time", flush=True)
        failures = sweep(missing, rows, path, args)
        kept = [row for row in rows if row["flops_budget"] in args.budgets or args.study == "tune"]
        if len(kept) < len(rows):
            print(f"{len(rows) - len(kept)} rows of {path} have other budgets: left out (--plot-only takes all)")
        write_rows(path, rows)
        rows = kept
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    if not rows:
        raise run.InputError(f"no finished runs in {path}")
    if args.study == "tune":
        figures.report_tune(rows)
    else:
        check_alike(rows, path)
        found = analyse(sorted(rows, key=order))
        figures.report(found)
        figures.plot(out, found)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    run.run_script(main)
