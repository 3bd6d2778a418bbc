"""The study: train the four cells over widths and budgets, fit their laws, and say what bytes cost, and how sure that is.

    python scaling.py                                       # small budgets, from nothing to figures
    python scaling.py --budgets 1e13 3e13 --seeds 0 1       # more; what is finished is not trained again
    python scaling.py --budgets 1e20 --dry-run | parallel -j 8      # or a SLURM array, or xargs
    python scaling.py --plot-only                           # figures and tables from results/runs.csv alone

Each run is one command of train_ar.py or train_mdm.py. Finished runs are rows of results/runs.csv, and all that follows is
computed from those rows (the fits are in fits.py).
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

import numpy as np
import torch
from tqdm import tqdm

import data
import fits
import run
from fits import fit_law                                      # part of this file's interface
from model import Config, flops_per_token

HERE = Path(__file__).resolve().parent
BUDGETS = {"cpu": (2e11, 5e11, 1.5e12), "mps": (1e13, 3e13, 1e14), "cuda": (1e16, 3e16, 1e17, 3e17, 1e18)}
LADDER = (16, 32, 48, 64, 96, 128, 192, 256, 384, 576, 768, 1024, 1408, 2048)          # widths, N doubled or a bit more at each step
CELLS = {("ar", "bpe"): "AR, BPE", ("ar", "byte"): "AR, bytes", ("mdm", "bpe"): "MDM, BPE", ("mdm", "byte"): "MDM, bytes"}
COLOR = dict(zip(CELLS, (run.COLORS[5], run.COLORS[0], run.COLORS[4], run.COLORS[1])))
# Learning rate and batch (tokens, at 1e12 FLOPs), the best of `--study tune` (the table in the README); batches grow as C^0.3.
TUNED = {("ar", "bpe"): (0.012, 2048), ("ar", "byte"): (0.003, 512), ("mdm", "bpe"): (0.0015, 320), ("mdm", "byte"): (0.0015, 512)}
TUNE_GRID = {("ar", "bpe"): ((0.006, 0.012, 0.024), (1024, 2048, 4096)), ("ar", "byte"): ((0.003, 0.006, 0.012), (512, 1024, 2048)),
             ("mdm", "bpe"): ((0.00075, 0.0015, 0.003), (160, 320, 512, 1024)), ("mdm", "byte"): ((0.00075, 0.0015, 0.003), (512, 1024, 2048))}
RESAMPLES = 1000

# What runs.csv holds of a result.json: what sets the run apart, then what came of it.
SETTINGS = {"objective": str, "tokenizer": str, "vocab_size": int, "flops_budget": float, "width": int, "seed": int, "lr": float,
            "batch_tokens": int, "context_bytes": int, "context_tokens": int, "shuffle": int, "span": int, "schedule": str, "corpus": str,
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
            "seed": seed, "lr": lr, "batch_tokens": tokens * max(1, round(batch / tokens)), "context_bytes": context,
            "context_tokens": tokens, "shuffle": 1, "span": 1, "schedule": "" if cell[0] == "ar" else "linear", "corpus": corpus.name,
            "sha256": corpus.meta["sha256"]}


def bracket(cell, flops):
    """Four widths of the ladder about the best one for the budget, as far as the published study tells."""
    best = 576 * (flops / 1e18) ** (1 / 6)
    return sorted(sorted(LADDER, key=lambda width: abs(math.log(width / best)))[:4])


def plan_gap(args, corpora):
    return [settings(cell, flops, width, seed, TUNED[cell][0], TUNED[cell][1] * (flops / 1e12) ** 0.3, args.context, corpora)
            for flops in args.budgets for cell in CELLS for width in args.widths or bracket(cell, flops) for seed in args.seeds]


def plan_tune(args, corpora):
    return [settings(cell, 1e12, 32, seed, lr, batch, args.context, corpora)
            for cell, (rates, batches) in TUNE_GRID.items() for lr in rates for batch in batches for seed in args.seeds]


def label(spec):
    return (f"{spec['objective']}-{spec['tokenizer']}-w{spec['width']}-c{spec['flops_budget']:g}-b{spec['batch_tokens']}-lr{spec['lr']:g}"
            f"-s{spec['seed']}").replace("e+", "e")


def folder(spec, study):
    return Path("runs") / study / (label(spec) + ("" if spec["corpus"] == "pysrc" else f"-{spec['corpus']}"))


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


def sweep(plan, rows, path, args):
    """Train what is missing of the plan, args.jobs runs at a time; a finished run becomes a row of path at once. -> failures"""
    waiting = sorted((spec for spec in plan if not find(spec, rows)), key=lambda spec: spec["flops_budget"])
    total, active, failures, done, stop = sum(spec["flops_budget"] for spec in waiting), {}, [], 0.0, []
    gpus = torch.cuda.device_count()
    previous = {number: signal.signal(number, lambda number, frame: stop.append(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(desc=f"{len(waiting)} runs", total=total, unit=" FLOPs", mininterval=1 if sys.stderr.isatty() else 60,
               bar_format="{l_bar}{bar}| {n:.2e} of {total:.2e} FLOPs, {elapsed} gone, {remaining} left")
    with bar:
        while active or waiting and not stop:
            while waiting and not stop and len(active) < args.jobs:
                spec, slot = waiting.pop(0), min(set(range(args.jobs)) - {slot for _, slot, _ in active.values()})
                out = folder(spec, args.study)
                out.mkdir(parents=True, exist_ok=True)
                threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))} if not gpus else \
                    {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")[slot % gpus]}
                with open(out / "output.txt", "a") as output:
                    active[subprocess.Popen([sys.executable, *command(spec, args)], env=os.environ | threads, stdout=output, stderr=output,
                                            start_new_session=True)] = out, slot, spec
            time.sleep(0.2)
            for process in [process for process in active if process.poll() is not None]:
                out, slot, spec = active.pop(process)
                done += spec["flops_budget"]
                try:
                    rows.append(row_of(run.read_result(out, {}) or {}))
                    write_rows(path, rows)
                except (KeyError, run.InputError):
                    if not stop:
                        failures.append(f"{label(spec)}: {((out / 'output.txt').read_text().splitlines() or ['no word'])[-1]}")
            for process in active if stop else ():
                process.terminate()                           # it ends its step, saves and stops
                process.wait()
            bar.n = min(total, done + sum(spent(out) for out, _, _ in active.values()))
            bar.refresh() if sys.stderr.isatty() else bar.update(0)
    for number, handler in previous.items():
        signal.signal(number, handler)
    if stop:
        print(f"stopped and saved, {len(waiting) + len(active)} runs to go; the same command goes on from there", file=sys.stderr)
        sys.exit(128 + stop[0])
    return failures


# ---------------------------------------------------------------------------------------------------------------------
# What came out.

def check_alike(rows, source):
    """Raises InputError unless the runs differ only in cell, budget, width and seed (and in learning rate and batch between cells
    and budgets)."""
    for keys in (("sha256",), ("context_bytes",), ("shuffle",), ("span",), ("objective", "schedule"), ("tokenizer", "vocab_size"),
                 ("objective", "tokenizer", "flops_budget", "lr"), ("objective", "tokenizer", "flops_budget", "batch_tokens")):
        kinds = Counter(tuple(row[key] for key in keys) for row in rows)
        groups = Counter(kind[:-1] for kind in kinds)
        if mixed := [kind for kind in kinds if groups[kind[:-1]] > 1]:
            found = ", ".join(f"{' '.join(map(str, kind))[:40]} ({kinds[kind]} runs)" for kind in sorted(mixed)[:4])
            raise run.InputError(f"{source} mixes runs of different {keys[-1]}: {found}; take them apart, or another --out")


def interval(values, digits=3):
    """The first of bootstrap values, and the 90% interval of the others: "2.51 [2.40, 2.63]"; inf is "never"."""
    low, high = np.quantile(values[1:], (0.05, 0.95), method="nearest")
    number = [f"{x:#.{digits}g}".rstrip(".") if x < 1e4 else f"{x:.0e}".replace("e+", "e") if x < np.inf else "never" for x in (values[0], low, high)]
    return f"{number[0]} [{number[1]}, {number[2]}]"


def analyse(rows):
    """Fits of all that the runs tell: -> a dict with, for each cell, its arrays N, D, L, its bootstrap laws (1 + S, 5) and its frontier
    on the budgets "C"; and for each objective "gap", "parity" and "capacity". The first of each bootstrap is the fit itself."""
    budgets = np.array(sorted({row["flops_budget"] for row in rows}))
    C = np.unique(np.concatenate([np.geomspace(budgets[0] / 3, fits.FAR, 200), budgets]))
    found = {"budgets": budgets, "C": C}
    if len(budgets) < 2:
        raise run.InputError(f"a law needs two budgets or more, not {len(budgets)}: {budgets[0]:g} FLOPs alone")
    for i, cell in enumerate(CELLS):
        own = sorted((row for row in rows if (row["objective"], row["tokenizer"]) == cell), key=order)
        if not own:
            continue
        N, D, L = (np.array([row[key] for row in own], dtype=float) for key in ("params_non_embedding", "tokens", "val_bpb"))
        try:
            fit_law(N, D, L)
        except run.InputError as error:
            raise run.InputError(f"{CELLS[cell]}: {error}") from None
        laws = fits.fit_laws(N, D, L, fits.resample(N, D, RESAMPLES, seed=i))
        shape = own[0]["vocab_size"], own[0]["context_tokens"]
        found[cell] = {"rows": own, "N": N, "D": D, "L": L, "laws": laws, "shape": shape, "frontier": fits.frontier(laws, C, *shape)[0]}
    for objective in ("ar", "mdm"):
        byte, bpe = found.get((objective, "byte")), found.get((objective, "bpe"))
        if byte and bpe:
            found[objective] = {"gap": fits.gap(byte["frontier"], bpe["frontier"], C),
                                "parity": fits.parity(byte["frontier"][:, C >= budgets[0]], bpe["frontier"][:, C >= budgets[0]], C[C >= budgets[0]]),
                                "capacity": fits.capacity_gap(byte["laws"], bpe["laws"], budgets, byte["shape"], bpe["shape"])}
    return found


def curves(cell):
    """The IsoFLOP curves of a cell of analyse(): budget -> (N, L, parabola or None), N and L (runs,)."""
    at = np.array([row["flops_budget"] for row in cell["rows"]])
    return {C: (cell["N"][at == C], cell["L"][at == C], fits.parabola(cell["N"][at == C], cell["L"][at == C])) for C in sorted(set(at))}


def report(found):
    """Print the tables: laws, minima, gaps, parity."""
    budgets, C = found["budgets"], found["C"]
    print(f"\nLaws of bits per byte, E + A / N^alpha + B / D^beta, N without embeddings, D in tokens; [90% of {RESAMPLES} bootstrap samples of the runs]\n"
          "\n| cell | runs | E | A | B | alpha | beta | rms of residuals |\n|---|---|---|---|---|---|---|---|")
    for cell in filter(found.get, CELLS):
        one = found[cell]
        E, A, B, alpha, beta = one["laws"][0]
        rms = np.sqrt(np.mean((one["L"] - E - A * one["N"] ** -alpha - B * one["D"] ** -beta) ** 2))
        print(f"| {CELLS[cell]} | {len(one['L'])} | {' | '.join(map(interval, one['laws'].T))} | {rms:.3f} |")
    print("\nThe best of each budget, by a parabola in log N: bits per byte (parameters without embeddings)\n"
          f"\n| cell | {' | '.join(f'{C:g}' for C in budgets)} |\n|---|{'---|' * len(budgets)}")
    for cell in filter(found.get, CELLS):
        row = []
        for budget in budgets:
            N, L, fit = curves(found[cell]).get(budget, ((), (), None))
            row.append(f"{fit[1]:.3f} ({fit[0]:.2g})".replace("e+0", "e") if fit else f"{min(L):.3f}, at the edge" if len(set(N)) > 2 else
                       f"{min(L):.3f}, {len(set(N))} width{'s'[:len(set(N)) > 1]}" if len(N) else "")
        print(f"| {CELLS[cell]} | {' | '.join(row)} |")
    for objective in filter(found.get, ("ar", "mdm")):
        one, name = found[objective], objective.upper()
        top = max(row["flops_budget"] for row in found[objective, "byte"]["rows"])
        at = np.searchsorted(C, budgets)
        print(f"\n{name}: the compute that bytes need, over that of BPE\n\n| FLOPs of BPE | gap G | at equal parameters |\n|---|---|---|")
        for k, budget in enumerate(budgets):
            far = " (extrapolated)" if one["gap"][0, at[k]] * budget > top else ""
            print(f"| {budget:g} | {interval(one['gap'][:, at[k]])}{far} | {interval(one['capacity'][:, k])} |")
        with np.errstate(invalid="ignore"):
            trend = (one["gap"][:, at[-1]] / one["gap"][:, at[0]]) ** (1 / np.log10(budgets[-1] / budgets[0]))
        trend = np.nan_to_num(trend, nan=np.inf)
        print(f"\n{name}: from {budgets[0]:g} to {budgets[-1]:g} FLOPs G is multiplied by {interval(trend)} with every decade.")
        never = np.mean(np.isinf(one["parity"][1:]))
        print(f"{name}: the fitted frontiers " + (f"do not meet below {fits.FAR:g} FLOPs" if np.isinf(one["parity"][0]) else
              f"meet at {interval(one['parity'], 2)} FLOPs" + (" (extrapolated)" if one["parity"][0] > budgets[-1] else ""))
              + f"; in {never:.0%} of the samples they never do.")


# ---------------------------------------------------------------------------------------------------------------------
# The figures.

def draw(path, shape, size, paint):
    """paint(axes) on a figure of shape (rows, columns) of panels, with shared axes -> path."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(*shape, sharex=True, sharey=True, squeeze=False)
    paint(axes)
    for ax in axes.flat:
        ax.set_xscale("log")
        ax.grid(alpha=0.3)
    run.write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=120))


def shade(budgets):
    """A colour for each budget, dark to light, for all eyes."""
    from matplotlib import colormaps
    return dict(zip(budgets, colormaps["viridis"](np.linspace(0, 0.85, len(budgets)))))


def plot_isoflops(path, found):
    colors = shade(found["budgets"])

    def paint(axes):
        for (cell, title), ax in zip(CELLS.items(), axes.flat):
            ax.set(title=title)
            for budget, (N, L, fit) in curves(found[cell]).items() if cell in found else ():
                ax.plot(N, L, "o", color=colors[budget], markersize=4, label=f"{budget:g}")
                if fit:
                    x = np.geomspace(min(N), max(N))
                    ax.plot(x, fit[2](np.log(x)), color=colors[budget], linewidth=1)
                    ax.plot(fit[0], fit[1], "*", color=colors[budget], markersize=12, markeredgecolor="black")
        for ax in axes[-1]:
            ax.set(xlabel="parameters without embeddings")
        for ax in axes[:, 0]:
            ax.set(ylabel="bits per byte")
        axes[0, 1].legend(title="FLOPs (star: minimum)", fontsize=8)
    draw(path, (2, 2), (8.5, 7), paint)


def plot_frontier(path, found):
    def paint(axes):
        ax, C, (low, high) = axes[0, 0], found["C"], found["budgets"][[0, -1]]
        for cell in filter(found.get, CELLS):
            lines, color = found[cell]["frontier"], COLOR[cell]
            for part, style in ((C <= high, "-"), ((C >= high) & (C <= 100 * high), "--")):
                ax.plot(C[part], lines[0, part], style, color=color, label=CELLS[cell] if style == "-" else None)
                ax.fill_between(C[part], *np.quantile(lines[1:, part], (0.05, 0.95), axis=0), color=color, alpha=0.2, linewidth=0)
            for budget, (N, L, fit) in curves(found[cell]).items():
                ax.plot(budget, fit[1] if fit else min(L), "o" if fit else "v", color=color, markersize=5)
        ax.set(xlabel="training FLOPs", ylabel="bits per byte, best width", title="lines: laws, dashed: extrapolated; dots: IsoFLOP minima", )
        ax.legend()
    draw(path, (1, 1), (7.5, 5), paint)


def plot_gap(path, found):
    def paint(axes):
        ax, C, (low, high) = axes[0, 0], found["C"], found["budgets"][[0, -1]]
        for objective, claim in (("ar", 1e22), ("mdm", 4e26)):
            color = COLOR[objective, "byte"]
            ax.plot(claim, 1, "X", color=color, markersize=9, label=f"{objective.upper()}: parity as the paper extrapolates it, {claim:.0e}".replace("e+", "e"))
            if objective not in found:
                continue
            G, top = found[objective]["gap"], max(row["flops_budget"] for row in found[objective, "byte"]["rows"])
            inside = (C >= low) & (C <= high) & (C * G[0] <= top)
            outside = (C >= low) & ~(inside & np.roll(inside, -1)) & (C <= 1e28)
            band = np.quantile(G[1:], (0.05, 0.95), axis=0, method="nearest")
            ax.plot(C[inside], G[0, inside], color=color, linewidth=2, label=f"{objective.upper()}: bytes against BPE")
            ax.plot(C[outside], G[0, outside], "--", color=color, linewidth=1)
            ax.fill_between(C[C >= low], *np.minimum(band[:, C >= low], 1e6), color=color, alpha=0.2, linewidth=0)
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set(xlabel="training FLOPs of the BPE model", ylabel="gap: compute of bytes / compute of BPE", yscale="log", ylim=(0.5, 300),
               xlim=(low, 1e28), title="bands: 90%; dashed: extrapolated; no line: bytes never get there")
        ax.legend(fontsize=8, loc="upper right")
    draw(path, (1, 1), (7.5, 5), paint)


def plot_capacity(path, found):
    colors = shade(found["budgets"])

    def paint(axes):
        for objective, ax in zip(("ar", "mdm"), axes[0]):
            for tokenizer, style in (("byte", "o-"), ("bpe", "s--")):
                for budget, (N, L, _) in curves(found[objective, tokenizer]).items() if (objective, tokenizer) in found else ():
                    x = np.unique(N)
                    ax.plot(x, [L[N == n].mean() for n in x], style, color=colors[budget], markersize=4, linewidth=1,
                            label=f"{budget:g}, {'bytes' if tokenizer == 'byte' else 'BPE'}")
            ax.set(xlabel="parameters without embeddings", title=objective.upper())
        axes[0, 0].set(ylabel="bits per byte")
        axes[0, 1].legend(title="FLOPs", fontsize=7, ncols=2)
    draw(path, (1, 2), (9, 5), paint)


# ---------------------------------------------------------------------------------------------------------------------

def report_tune(rows):
    """Print a table of bits per byte a cell: learning rate by batch."""
    for cell, title in CELLS.items():
        own = {(row["lr"], row["batch_tokens"]): row for row in rows if (row["objective"], row["tokenizer"]) == cell}
        batches, best = sorted({batch for _, batch in own}), min(own.values(), key=lambda row: row["val_bpb"], default=None)
        print(f"\n| {title}: learning rate, batch in tokens | {' | '.join(map(str, batches))} |\n|---|{'---|' * len(batches)}")
        for lr in sorted({lr for lr, _ in own}):
            cells = [own.get((lr, batch)) for batch in batches]
            marks = ["**" if row is best else "" for row in cells]
            print(f"| {lr:g} | " + " | ".join(f"{mark}{row['val_bpb']:.3f}{mark}" if row else "" for row, mark in zip(cells, marks)) + " |")


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
    gpus = torch.cuda.device_count()
    args.jobs = args.jobs or gpus or os.cpu_count() or 1
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
        failures = sweep(plan, rows, path, args)
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
        report_tune(rows)
    else:
        check_alike(rows, path)
        found = analyse(rows)
        report(found)
        for name, plot in (("isoflops", plot_isoflops), ("frontier", plot_frontier), ("gap", plot_gap), ("capacity", plot_capacity)):
            plot(out / f"{name}.png", found)
        print(f"\nfigures: {out}/isoflops.png, frontier.png, gap.png, capacity.png")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    run.run_script(main)
