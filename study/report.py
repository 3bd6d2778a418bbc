"""Print what the report says beyond scaling.py, from the tables of results/; draw frontier.png.

    python -m study.report              # minima beside counting, costs, trends, a law, English
    python -m study.report context      # what bytes cost with the best context of each side
    python -m study.report depth        # what they cost with four layers in place of two
    python -m study.report coverage     # how often the intervals hold the truth, by simulation

Counting is read from baselines.csv (python -m study.counting). Intervals are 90%. G is also read a
little beyond the last budget of bytes: the last segment of their frontier, log loss against log C,
is carried on by half a decade.
"""
import argparse
import csv
import math
from collections import defaultdict
from pathlib import Path

import numpy as np

import run
import scaling
from data import InputError
from model import Config
from scaling import CONFIGURATIONS, Fit, interval, print_table, runs_of
from study import laws, sweep

# What an objective must be better than, to have learned more than counting gives.
BASELINE = {"ar": "bigram", "mdm": "bag"}
BEYOND = 10**0.5                       # how far a frontier is carried on
# What need not be counted: half of causal attention, and the head at visible positions (half).
UNCHARGED = {"ar": lambda config: 6 * config.depth * config.width * config.context,
             "mdm": lambda config: 3 * config.width * config.padded_vocab}
# Bits per byte: one model on the validation text of bytes and on that of BPE (results/LOG.md).
TEXT_SD = 0.013


def rows_of(path):
    return [row for row in scaling.read_rows(path) if scaling.by_the_rules(row)]


def with_ends(values, form="{:+.2f}".format):
    """Return the first of the values, and the 90% interval of the others, as text."""
    ends = np.quantile(values[1:], (0.05, 0.95), method="nearest")
    return "{} [{}, {}]".format(*map(form, (values[0], *ends)))


# ---- What bytes cost: G beyond the last budget, its trend, and other ways to count FLOPs.

def slopes(fit):
    """Return the slopes of log loss in log C between the budgets: (S, K - 1)."""
    return np.diff(np.log(fit.minima.clip(1e-9))) / np.diff(np.log(fit.budgets))


def gaps_of(fits):
    """Return {objective: Gap}, with the frontiers of bytes carried on."""
    longer = dict(fits)
    for key, fit in fits.items():
        if key[1] == "byte":
            further = fit.minima[:, -1] * BEYOND ** slopes(fit)[:, -1]                   # (S,)
            longer[key] = fit._replace(budgets=np.append(fit.budgets, fit.budgets[-1] * BEYOND),
                                       minima=np.column_stack([fit.minima, further]))
    return scaling.gaps_between(longer)


def trend(gap, lowest):
    """Return the slope of log10 G in log10 C from a budget on: (S,). None for a single budget.

    A budget counts if 95% of the samples have a G there. The other samples take the bound.
    """
    counted = (np.isfinite(gap.G).mean(axis=0) > 0.95) & (gap.budgets >= lowest)
    if counted.sum() < 2:
        return None
    t = np.log10(gap.budgets[counted]) - np.log10(gap.budgets[counted]).mean()
    return np.log10(np.minimum(gap.G, gap.limits)[:, counted]) @ t / (t**2).sum()


def counted_by(uncharged, rows, fits):
    """Return the rows as they would be if these FLOPs per token were not counted.

    A run could then have had more of the others. Its loss falls by what they bring on the frontier
    above its budget.
    """
    counted = []
    for row in rows:
        config = Config(row["vocab_size"], row["context_tokens"], row["width"])
        more = config.flops_per_token() / (config.flops_per_token() - uncharged(config))
        fit = fits[row["objective"], row["tokenizer"]]
        k = min(np.searchsorted(fit.budgets, row["flops_budget"]), len(fit.budgets) - 2)
        counted.append(row | {"val_bpb": row["val_bpb"] * more ** slopes(fit)[0, k]})
    return counted


# ---- The tables.

def past_counting(folder, fits):
    """Return {configuration: which of its minima are below what counting gives (K,)}."""
    with open(folder / "baselines.csv", newline="") as file:
        counted = {(row["tokenizer"], row["baseline"]): float(row["val_bpb"])
                   for row in csv.DictReader(file)}
    return {(objective, tokenizer): fit.minima[0] < counted[tokenizer, BASELINE[objective]]
            for (objective, tokenizer), fit in fits.items()}


def report_minima(rows, fits, learned):
    cells = {}
    for key, fit in fits.items():
        C, N, _ = runs_of(rows, key)
        for k, budget in enumerate(fit.budgets):
            size, sizes = math.exp(fit.best[0, k]), N[C == budget]
            mark = "" if learned[key][k] else " *"
            mark += "" if sizes.min() < size < sizes.max() else " (outside)"
            cells[*key, budget] = f"{fit.minima[0, k]:.3f} ({size:.2g}){mark}"
    scaling.print_by_budget(
        "IsoFLOP minima: bits per byte (parameters without embeddings); * counting does as well; "
        "outside: of the widths that were trained", cells)


def report_costs(title, gaps):
    lines = []
    for objective, gap in gaps.items():
        text = np.append(0, np.random.default_rng(0).normal(0, TEXT_SD, len(gap.bits) - 1))
        lines += [[objective.upper(), f"{budget:g}", interval(gap.bits[:, k] + text),
                   interval(gap.G[:, k], gap.limits[k])] for k, budget in enumerate(gap.budgets)]
    print_table(title, ["objective", "FLOPs of BPE", "bits lost, with the text", "G"], lines)


def report_changes(gaps):
    """Print how much more MDM loses than AR, how both change with the budget, and the trends."""
    ar, mdm = gaps["ar"], gaps["mdm"]
    known = np.isfinite(mdm.G).mean(axis=0) > 0.95
    print_table("MDM beside AR", ["FLOPs of BPE", "bits lost, MDM less AR", "G, MDM by AR"], [
        [f"{budget:g}", with_ends((mdm.bits - ar.bits)[:, k]),
         with_ends(mdm.G[:, k] / ar.G[:, k], "{:.1f}".format) if known[k] else ""]
        for k, budget in enumerate(ar.budgets)])
    print_table("Change of the bits lost", ["from", "to", "AR", "MDM"], [
        [f"{ar.budgets[j]:g}", f"{budget:g}",
         *(with_ends(gap.bits[:, k] - gap.bits[:, j]) for gap in (ar, mdm))]
        for k, budget in enumerate(ar.budgets) for j in range(k)])
    trends = [(objective, lowest, trend(gap, lowest))
              for objective, gap in gaps.items() for lowest in gap.budgets[:2]]
    print_table("Trend of log10 G a decade", ["objective", "from", "slope", "samples that rise"], [
        [objective.upper(), f"{lowest:g}", with_ends(slope), f"{(slope > 0).mean():.1%}"]
        for objective, lowest, slope in trends if slope is not None])


def report_frontiers(path, rows, fits, learned):
    """Print parities by laws of all budgets and of those past counting; draw the second."""
    runs, lines = laws.losses_at_best_size(rows, fits), []
    highest = min(row["val_bpb"] for row in rows)
    everything = {key: fit.budgets > 0 for key, fit in fits.items()}
    for name, kept in (("all", everything), ("past counting", learned)):
        inside = {key: np.isin(C, fits[key].budgets[kept[key]]) for key, (C, _) in runs.items()}
        chosen = {key: (C[inside[key]], losses[:, inside[key]])
                  for key, (C, losses) in runs.items()}
        E, fitted = laws.fit_frontiers(chosen, highest)
        for objective in scaling.TRAIN:
            met = laws.parity(fitted[objective, "byte"], fitted[objective, "bpe"])
            lines.append([objective.upper(), name, with_ends(E, "{:.2f}".format),
                          with_ends(met, lambda C: f"{C:.0e}" if C < np.inf else "never")])
    print_table("Parity by frontier laws with one E (never: not below 1e30 FLOPs)",
                ["objective", "budgets", "E", "FLOPs at parity"], lines)
    laws.plot_frontiers(path, fits, learned, E, fitted)


def report_text(folder):
    """Print all tables of a text; return its gaps."""
    rows = rows_of(folder / "runs.csv")
    fits = scaling.fit_minima(rows)
    if len(fits) < len(CONFIGURATIONS):
        raise InputError(f"{folder / 'runs.csv'} has no IsoFLOP minima of all four configurations")
    print(f"\n## {folder}")
    learned, gaps = past_counting(folder, fits), gaps_of(fits)
    report_minima(rows, fits, learned)
    fewer = {objective: gaps_of(scaling.fit_minima(counted_by(uncharged, rows, fits)))[objective]
             for objective, uncharged in UNCHARGED.items()}
    report_costs("What bytes cost; their frontier is carried on by half a decade", gaps)
    report_costs("The same, causal attention counted at half, MDM's head where masked", fewer)
    report_changes(gaps)
    # A law has three numbers.
    if len(gaps["ar"].budgets) > 3:
        report_frontiers(folder / "frontier.png", rows, fits, learned)
    return gaps


def report(folder):
    gaps = report_text(folder)
    if not (folder / "english").exists():
        return
    lines = []
    for objective, gap in report_text(folder / "english").items():
        here = np.isin(gaps[objective].budgets, gap.budgets)
        lines.append([objective.upper(),
                      *map(with_ends, (gap.bits - gaps[objective].bits[:, here]).T)])
    print_table("Bits lost on English less those here",
                ["objective", *map("{:g}".format, gap.budgets)], lines)


# ---- Context and depth: means over seeds, without a fit.

def mean_losses(rows, varied="context_bytes"):
    """Return {(configuration, budget, what is varied, width): samples of the mean of seeds (S,)}.

    The noise of a seed is that of all runs of the configuration.
    """
    losses, samples, rng = defaultdict(list), {}, np.random.default_rng(0)
    for row in rows:
        losses[(row["objective"], row["tokenizer"]), row["flops_budget"], row[varied],
               row["width"]].append(row["val_bpb"])
    for configuration in CONFIGURATIONS:
        seeds = {key: values for key, values in losses.items() if key[0] == configuration}
        free = sum(len(values) - 1 for values in seeds.values())
        variance = sum(np.var(values) * len(values) for values in seeds.values()) / free
        for key, values in seeds.items():
            noise = np.append(0, rng.standard_t(free, 400))
            samples[key] = np.mean(values) + np.sqrt(variance / len(values)) * noise
    return samples


def lowest(samples, contexts):
    """Return {configuration: Fit}, of the lowest means, at the budgets with a short context."""
    fits = {}
    for name in CONFIGURATIONS:
        budgets = sorted({key[1] for key in samples if key[0] == name and key[2] < 512})
        best = [min((key for key in samples if key[:2] == (name, budget) and key[2] in contexts),
                    key=lambda key: samples[key][0]) for budget in budgets]
        # best is not a size here, but a context and a width.
        fits[name] = Fit(np.array(budgets), np.column_stack([samples[key] for key in best]),
                         [key[2:] for key in best], None)
    return fits


def report_context(folder):
    samples = mean_losses(
        row for name in ("runs.csv", "sensitivity.csv", "context.csv")
        for row in rows_of(folder / name) if row["vocab_size"] in (256, 4096))
    best = lowest(samples, {64, 128, 256, 512})
    scaling.print_by_budget("Lowest mean loss (bytes of context, width)", {
        (*key, budget): f"{fit.minima[0, k]:.3f} {fit.best[k]}"
        for key, fit in best.items() for k, budget in enumerate(fit.budgets)})
    gaps, at_512 = scaling.gaps_between(best), scaling.gaps_between(lowest(samples, {512}))
    print_table("Bits per byte lost, and G where bytes have larger budgets", [
        "objective", "FLOPs of BPE", "both at 512", "best context of each", "best less 512",
        "since the first budget", "G"], [
        [objective.upper(), f"{budget:g}", interval(at_512[objective].bits[:, k]),
         interval(gap.bits[:, k]), with_ends((gap.bits - at_512[objective].bits)[:, k]),
         with_ends(gap.bits[:, k] - gap.bits[:, 0]) if k else "",
         interval(gap.G[:, k], gap.limits[k]) if gap.limits[k] > 1 else ""]
        for objective, gap in gaps.items() for k, budget in enumerate(gap.budgets)])


def report_depth(folder):
    rows = [row for name in ("runs.csv", "depth.csv") for row in sweep.read_rows(folder / name)
            if scaling.by_the_rules(row) and set(sweep.flags_of(row)) <= {"depth"}]
    samples = mean_losses(rows, "depth")
    # At the same width, which is not the best of both.
    lost = {(objective, *at): losses - samples[(objective, "bpe"), *at]
            for ((objective, tokenizer), *at), losses in samples.items()
            if tokenizer == "byte" and ((objective, "bpe"), *at) in samples}
    lines = []
    for objective, budget, depth, width in sorted(lost):
        bits = lost[objective, budget, depth, width]
        usual = lost.get((objective, budget, Config(width=width).depth, width), bits)
        if usual is not bits:
            lines.append([objective.upper(), f"{budget:g}", f"{width}", f"{depth}",
                          interval(bits), interval(usual), with_ends(bits - usual)])
    print_table("Bits per byte lost at one width", [
        "objective", "FLOPs", "width", "layers", "bits lost", "with the usual layers", "change"],
        lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", nargs="?", choices=("context", "depth", "coverage"))
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the tables")
    args = parser.parse_args()
    if args.table == "context":
        report_context(args.out)
    elif args.table == "depth":
        report_depth(args.out)
    elif args.table == "coverage":
        # It imports this file.
        from study import coverage
        coverage.report(args.out)
    else:
        report(args.out)


if __name__ == "__main__":
    run.run_script(main)
