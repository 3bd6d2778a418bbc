"""What gives bytes their contiguity back: convolutions, a bell of mask rates, patches, n-grams.

    python -m study.remedies --budgets 3e12 1e13
    python -m study.remedies --plot-only            # from results/remedies.csv and results/runs.csv

What a remedy wins for BPE, too, is not about bytes: so bytes are compared with BPE that has the
same remedies. Compared are the minima of IsoFLOP parabolas. All parabolas of a configuration share
their curvature. Intervals are 90%, over samples of the residuals.

A remedy is a tuple of flags of study.train and their values: those that a plain run does not have.
"""
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

import run
import scaling
from scaling import CONFIGURATIONS, interval
from study import sweep

BUDGETS = {"cpu": (3e12, 1e13), "mps": (1e14,), "cuda": (1e17,)}
# The flags of remedies, and what they are called.
NAMES = {"patch": "patch {}", "conv": "convolution", "schedule": "bell", "ngram": "n-gram {}",
         "buckets": "{} buckets", "ngram_stride": "stride {}"}
# What is trained. A convolution reads as far back in AR as in MDM.
CONV, BOTH = {"ar": {"conv": 4}, "mdm": {"conv": 7}}, {"conv": 7, "schedule": "bell"}
PATCHES, NGRAMS = [{"patch": size} for size in (2, 4, 8)], [{"ngram": 2}, {"ngram": 4}]
REMEDIES = {"ar": [CONV["ar"], *PATCHES, CONV["ar"] | {"patch": 4}, *NGRAMS],
            "mdm": [CONV["mdm"], {"schedule": "bell"}, BOTH, *PATCHES,
                    *(BOTH | patch for patch in PATCHES), *NGRAMS]}


class Minimum(NamedTuple):
    """The lowest loss with a remedy at a budget."""
    losses: np.ndarray         # (S,) bits per byte, first as measured, then samples
    outside: bool              # not between the widths that were trained
    positions: int             # free positions in a sequence: its tokens or patches


def name_of(remedy):
    return ", ".join(NAMES[flag].format(value).strip() for flag, value in remedy) or "plain"


def kind_of(remedy):
    """Return a remedy without its sizes."""
    return tuple((flag, "") for flag, _ in remedy if flag != "buckets")


def without_patches(remedy):
    return tuple((flag, value) for flag, value in remedy if flag != "patch")


def best_rate(row):
    """Return the best learning rate with a run's remedies, in rates of a plain run."""
    bell_on_bpe = row["schedule"] == "bell" and row["tokenizer"] == "bpe"
    return 2 if row["objective"] == "mdm" and (row["conv"] or bell_on_bpe) else 1


def at_any_rate(row):
    """Return the remedy of a run, () for a plain one, or None for a run of another study."""
    flags = sweep.flags_of(row)
    if set(flags) <= set(NAMES):
        return tuple((flag, flags[flag]) for flag in NAMES if flag in flags)


def remedy_of(row):
    """Return the same, and None for a run that has not the best rate or the batch of our rules."""
    if scaling.by_the_rules(row | {"lr": row["lr"] / best_rate(row)}):
        return at_any_rate(row)


def plan(args, corpora):
    # A trunk that reads P tokens as one can be wider for the same budget.
    specs = [sweep.settings(configuration, flops, width, seed, args, corpora, flags)
             for flops in args.budgets for configuration in CONFIGURATIONS
             for flags in REMEDIES[configuration[0]] for width in args.widths or scaling.bracket(
                 configuration[0], flops * flags.get("patch", 1) ** 0.5, 3)
             for seed in args.seeds]
    return [spec | {"lr": spec["lr"] * best_rate(spec)} for spec in specs]


# ---- What the runs say.

def fit_minima(groups, seed, count=400):
    """Return {key: Minimum} of groups {(configuration, remedy, budget): rows} of a configuration.

    The fit and the samples are those of scaling.py, but each remedy has an n0 of its own.
    """
    rows = [row for group in groups.values() for row in group]
    index = np.repeat(np.arange(len(groups)), [len(group) for group in groups.values()])
    remedies = list(dict.fromkeys(remedy for _, remedy, _ in groups))
    kind = np.array([remedies.index(remedy) for _, remedy, _ in groups])                # (K,)
    t = np.log([budget for _, _, budget in groups])                                     # (K,)
    x = np.log([row["params_non_embedding"] for row in rows])                           # (n,)
    L = np.array([row["val_bpb"] for row in rows])                                      # (n,)
    slopes = np.eye(len(remedies))[kind[index]] * x[:, None]                            # (n, k)
    X = np.column_stack([np.eye(len(groups))[index], slopes, x**2, x * t[index]])

    def fit(Y):
        coefficients = np.linalg.lstsq(X, Y.T, rcond=None)[0].T                         # (S, K+k+2)
        # Without a positive curvature there is no minimum.
        return coefficients[coefficients[:, -2] > 0]

    samples, free, rng = fit(L[None]), len(L) - X.shape[1], np.random.default_rng(seed)
    if free < 1 or not len(samples):
        return {}
    fitted = X @ samples[0]
    residuals = (L - fitted) * np.sqrt(len(L) / free)
    while len(samples) <= count:
        drawn = fitted + rng.choice(residuals, (count, len(L)))
        samples = np.concatenate([samples, fit(drawn)])
    c, d = samples[:count + 1, -2:].T[..., None]                                        # (S, 1)
    levels, b = np.split(samples[:count + 1, :-2], [len(groups)], axis=1)
    best = -(b[:, kind] + d * t) / (2 * c)                                              # (S, K)
    minima = levels - c * best**2                                                       # (S, K)
    return {key: Minimum(minima[:, k], not min(x[index == k]) < best[0, k] < max(x[index == k]),
                         group[0]["context_tokens"] // group[0]["patch"])
            for k, (key, group) in enumerate(groups.items())}


def analyse(rows):
    """Return {(configuration, remedy, budget): Minimum}.

    A remedy counts at budgets at which it has three widths or more, and plain runs at those of the
    remedies of their objective.
    """
    groups, minima = {}, {}
    for row in sorted(rows, key=sweep.settings_of):
        key = (row["objective"], row["tokenizer"]), remedy_of(row), row["flops_budget"]
        groups.setdefault(key, []).append(row)
    groups = {key: group for key, group in groups.items()
              if key[1] is not None and len({row["width"] for row in group}) >= 3}
    budgets = {(configuration[0], budget) for configuration, remedy, budget in groups if remedy}
    for seed, configuration in enumerate(CONFIGURATIONS):
        chosen = {key: group for key, group in groups.items()
                  if key[0] == configuration and (configuration[0], key[2]) in budgets}
        minima |= fit_minima(chosen, seed) if chosen else {}
    return minima


def bits_lost(minima):
    """Return {(objective, kind of remedy of bytes, of BPE, budget): bits that bytes lose (S,)}.

    Of each kind the best remedy counts. BPE has the same kind, or all of it but the patches.
    """
    best = {}
    for (configuration, remedy, budget), (losses, _, _) in minima.items():
        key = configuration, kind_of(remedy), budget
        best[key] = min(best.get(key, losses), losses, key=lambda samples: samples[0])
    return {(objective, kind, of_bpe, budget): losses - best[(objective, "bpe"), of_bpe, budget]
            for ((objective, tokenizer), kind, budget), losses in best.items()
            for of_bpe in dict.fromkeys([kind, without_patches(kind) or kind])
            if tokenizer == "byte" and ((objective, "bpe"), of_bpe, budget) in best}


def curves_of(minima):
    """Return {(configuration, remedy but patches, budget): {free positions: losses (S,)}}."""
    curves = {}
    for (configuration, remedy, budget), minimum in sorted(
            minima.items(), key=lambda item: item[1].positions):
        curve = curves.setdefault((configuration, without_patches(remedy), budget), {})
        curve[minimum.positions] = minimum.losses
    return curves


# ---- Tables and the figure.

def report(minima, curves):
    """Print what bytes lose with remedies on both sides, and what each remedy wins."""
    lost, lines = bits_lost(minima), []
    for objective, kind, of_bpe, budget in sorted(lost):
        bits = lost[objective, kind, of_bpe, budget]
        plain = lost.get((objective, (), (), budget), np.nan)
        closed = interval(100 - 100 * bits / plain, form=".0f") if kind else ""
        lines.append([objective.upper(), name_of(kind), name_of(of_bpe), sweep.short(budget),
                      interval(bits), closed])
    scaling.print_table(
        "What bytes lose to BPE with remedies on both sides, the best of each kind [90%]",
        ["objective", "bytes", "BPE", "FLOPs", "bits lost", "share of the gap closed, %"], lines)
    lines = []
    for ((objective, tokenizer), remedy, budget), curve in curves.items():
        bpe = curves.get(((objective, "bpe"), remedy, budget), {np.inf: None})
        for positions, losses in curve.items():
            if tokenizer == "byte" and min(bpe) <= positions <= max(bpe):
                # Between two of BPE: a straight line in the logarithm of the positions.
                of_bpe = [np.interp(np.log(positions), np.log(list(bpe)), sample)
                          for sample in zip(*bpe.values(), strict=True)]
                lines.append([objective.upper(), name_of(remedy), sweep.short(budget),
                              f"{positions}", interval(losses - of_bpe)])
    scaling.print_table(
        "What bytes lose to BPE that has as many free positions [90%]",
        ["objective", "other remedies", "FLOPs", "free positions", "bits lost"], lines)
    lines = []
    for (configuration, remedy, budget), (losses, outside, positions) in minima.items():
        plain = minima.get((configuration, (), budget))
        won = interval(plain.losses - losses, form="+.2f") if remedy and plain else ""
        lines.append([CONFIGURATIONS[configuration], name_of(remedy), sweep.short(budget),
                      f"{positions}", f"{losses[0]:.3f}{' (outside)' if outside else ''}", won])
    scaling.print_table(
        "What each remedy wins [90%]; outside: of the widths that were trained",
        ["configuration", "remedy", "FLOPs", "free positions", "bits per byte", "bits won"], lines)


def report_cells(rows, minima):
    """Print what remedies win at one width, where they have no minimum or another rate."""
    cells, plain = {}, {}
    for row in sorted(rows, key=sweep.settings_of):
        configuration, remedy = (row["objective"], row["tokenizer"]), at_any_rate(row)
        at = configuration, row["flops_budget"], row["width"]
        if remedy_of(row) == ():
            plain.setdefault(at, []).append(row["val_bpb"])
        elif remedy and (configuration, remedy_of(row), row["flops_budget"]) not in minima:
            cells.setdefault((*at, remedy, row["lr"]), []).append(row["val_bpb"])
    lines = []
    for (configuration, budget, width, remedy, lr), losses in cells.items():
        won = np.mean(plain.get((configuration, budget, width), np.nan)) - np.mean(losses)
        lines.append([CONFIGURATIONS[configuration], name_of(remedy), sweep.short(budget),
                      f"{width}", f"{lr:g}", f"{np.mean(losses):.3f} ({len(losses)})",
                      f"{won:+.2f}"])
    scaling.print_table(
        "What remedies win at one width, where they have no minimum",
        ["configuration", "remedy", "FLOPs", "width", "rate", "bits per byte (seeds)",
         "bits won"], lines)


def plot(path, curves):
    """Draw bits per byte against free positions, at the budget with the most remedies."""
    budgets = [budget for _, _, budget in curves]
    most = max(budgets, key=lambda budget: (budgets.count(budget), budget))
    remedies = sorted({remedy for _, remedy, budget in curves if budget == most})
    figure = Figure(figsize=(7.5, 6), layout="constrained")
    axes = dict(zip(scaling.TRAIN, figure.subplots(1, 2, sharex=True, sharey=True), strict=True))
    for configuration, remedy, budget in sorted(curves):
        if budget == most:
            curve = curves[configuration, remedy, budget]
            losses = np.stack(list(curve.values()), axis=1)                             # (S, K)
            ends = np.quantile(losses[1:], (0.05, 0.95), axis=0, method="nearest")
            marker = "os^Dv*P<>X"[remedies.index(remedy) % 10]
            axes[configuration[0]].errorbar(
                list(curve), losses[0], abs(ends - losses[0]), fmt=f"{marker}-", capsize=3,
                color=sweep.COLORS[configuration],
                label=f"{CONFIGURATIONS[configuration]}, {name_of(remedy)}")
    for ax in axes.values():
        ax.set(xlabel=f"free positions, at {sweep.short(most)} FLOPs", xscale="log")
        ax.set_xticks([64, 128, 256, 512], ["64", "128", "256", "512"])
        ax.minorticks_off()
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), fontsize="small")
    axes["ar"].set(ylabel="bits per byte [90%]")
    figure.savefig(path, dpi=120)


def main():
    args = scaling.arguments(__doc__).parse_args()
    rows = sweep.sweep(args, args.out / "remedies.csv", BUDGETS, plan)
    text = {key: rows[0][key] for key in ("sha256", "context_bytes")}
    rows += sweep.read_rows(args.out / "runs.csv")
    rows = {sweep.settings_of(row): row for row in rows if text.items() <= row.items()}
    minima = analyse(rows.values())
    curves = curves_of(minima)
    report_cells(rows.values(), minima)
    if minima:
        report(minima, curves)
        plot(args.out / "remedies.png", curves)


if __name__ == "__main__":
    run.run_script(main)
