"""What gives bytes their contiguity back: a convolution, a bell of mask rates, patches.

    python fragility.py remedies --budgets 3e12 1e13
    python fragility.py remedies --plot-only        # from results/remedies.csv and results/runs.csv

Patches are for bytes. The other remedies are trained on BPE, too: what they win for both is not
about bytes. Plain runs are those of the study. At each budget the minima of IsoFLOP parabolas are
compared. All parabolas of a configuration share their curvature. Intervals are 90%, over samples of
the residuals.
"""
import sys
from pathlib import Path

import numpy as np

import laws
import run
import scaling
import sweep
from run import InputError
from scaling import COLORS, error_bars, interval, signed, with_ends
from sweep import CONFIGURATIONS, exact

BUDGETS = {"cpu": (3e12, 1e13), "mps": (1e14,), "cuda": (1e17,)}
# The best rate of MDM with a convolution, or with a bell on BPE: twice that of plain.
TWICE = {"lr": 0.003}
# A convolution reads as far back in AR as in MDM.
AR_CONV, MDM_CONV = {"conv": 4}, {"conv": 7} | TWICE
BELL = {"schedule": "bell"}
PATCHES = {f"patch {size}": {"patch": size} for size in (2, 4, 8)}
# configuration -> remedy -> flags.
REMEDIES = {
    ("ar", "bpe"): {"convolution": AR_CONV},
    ("ar", "byte"): {"convolution": AR_CONV, **PATCHES,
                     "patch 4, convolution": AR_CONV | {"patch": 4}},
    ("mdm", "bpe"): {"convolution": MDM_CONV, "bell": BELL | TWICE,
                     "convolution, bell": MDM_CONV | BELL},
    ("mdm", "byte"): {"convolution": MDM_CONV, "bell": BELL, **PATCHES,
                      "patch 8, convolution, bell": MDM_CONV | BELL | {"patch": 8}},
}
PLAIN = "plain"
# objective -> what (bytes, BPE) have in three comparisons: plain, a convolution, all remedies.
PAIRS = {"ar": ((PLAIN, PLAIN), ("convolution",) * 2, ("patch 4, convolution", "convolution")),
         "mdm": ((PLAIN, PLAIN), ("convolution",) * 2,
                 ("patch 8, convolution, bell", "convolution, bell"))}


def plan(args, corpora):
    """Return the settings of the runs."""
    specs = []
    for flops in args.budgets:
        for configuration, remedies in REMEDIES.items():
            for flags in remedies.values():
                # A trunk that reads P tokens as one can be wider for the same budget.
                own = sweep.bracket(configuration[0], flops * flags.get("patch", 1) ** 0.5, 3)
                specs += [sweep.settings(configuration, flops, width, seed, args, corpora, **flags)
                          for width in args.widths or own for seed in args.seeds]
    return specs


def remedy_of(row):
    """Return the name of what a run was trained with: a remedy, plain, or None if neither."""
    remedies = {PLAIN: {}} | REMEDIES[row["objective"], row["tokenizer"]]
    return next((name for name, flags in remedies.items() if scaling.by_the_rules(row, flags)),
                None)


def analyse(rows):
    """Return {(configuration, remedy, budget): the lowest loss, first as measured, then samples}.

    A remedy counts at budgets at which it has three widths or more, and plain runs at those of the
    remedies of their objective. Also return the set of those whose minimum is not within their
    widths.
    """
    groups = {}
    for row in sorted(rows, key=sweep.settings_of):
        if name := remedy_of(row):
            key = (row["objective"], row["tokenizer"]), name, row["flops_budget"]
            groups.setdefault(key, []).append(row)
    groups = {key: group for key, group in groups.items()
              if len({row["width"] for row in group}) >= 3}
    budgets = {(owner[0], budget) for owner, name, budget in groups if name != PLAIN}
    found, outside = {}, set()
    for seed, configuration in enumerate(CONFIGURATIONS):
        own = [(row, name) for (owner, name, budget), group in groups.items()
               if owner == configuration and (owner[0], budget) in budgets for row in group]
        if not own:
            continue
        names = list(dict.fromkeys(name for _, name in own))
        kinds = np.array([names.index(name) for _, name in own])
        C, N, L = (np.array([row[key] for row, _ in own], dtype=float)
                   for key in ("flops_budget", "params_non_embedding", "val_bpb"))
        samples = laws.resample(C, N, L, seed, kinds)
        if samples is None:
            continue
        minima, best, _, _ = laws.pooled_minima(C, N, samples, kinds)
        for k, (kind, budget) in enumerate(laws.cells(C, kinds)[0].T):
            key = configuration, names[int(kind)], budget
            found[key] = minima[:, k]
            if laws.is_outside(best[0, k], N[(kinds == kind) & (C == budget)]):
                outside.add(key)
    return found, outside


def lost(found, objective, names, budget):
    """Return the bits that bytes lose, with these remedies for (bytes, BPE): (S,), or None."""
    byte = found.get(((objective, "byte"), names[0], budget))
    bpe = found.get(((objective, "bpe"), names[1], budget))
    return None if byte is None or bpe is None else byte - bpe


def report(found, outside):
    """Print what each remedy wins, and what bytes lose with and without remedies."""
    lines = []
    for (configuration, name, budget), losses in found.items():
        won = share = ""
        plain = found.get((configuration, PLAIN, budget))
        if name != PLAIN and plain is not None:
            won = signed(plain - losses)
            gap = lost(found, configuration[0], (PLAIN, PLAIN), budget)
            if configuration[1] == "byte" and gap is not None:
                share = "{:.0f} [{:.0f}, {:.0f}] %".format(*with_ends(100 * (plain - losses) / gap))
        mark = " (outside)" if (configuration, name, budget) in outside else ""
        lines.append([CONFIGURATIONS[configuration], name, exact(budget), f"{losses[0]:.3f}{mark}",
                      won, share])
    scaling.print_table("What each remedy wins [90%]; outside: of the widths that were trained", [
        "configuration", "remedy", "FLOPs", "bits per byte", "bits won",
        "share of what plain bytes lose"], lines)

    lines = []
    for objective, pairs in PAIRS.items():
        for budget in sorted({key[2] for key in found}):
            gaps = [lost(found, objective, names, budget) for names in pairs]
            if any(gap is not None for gap in gaps):
                lines.append([objective.upper(), exact(budget),
                              *("" if gap is None else interval(gap) for gap in gaps)])
    scaling.print_table("Bits that bytes lose to BPE [90%]", [
        "objective", "FLOPs", "plain", "both with a convolution", "both with all"], lines)


def paint_patches(ax, found, budget, context):
    """Draw bits per byte against the size of the patch, with BPE as level lines.

    Below each size: how many patches a sequence of context bytes has, in any order for MDM.
    """
    for objective in ("ar", "mdm"):
        curve = {size: found.get(((objective, "byte"), name, budget))
                 for size, name in ((1, PLAIN), (2, "patch 2"), (4, "patch 4"), (8, "patch 8"))}
        curve = {size: losses for size, losses in curve.items() if losses is not None}
        if curve:
            losses = np.stack(list(curve.values()), axis=1)                             # (S, K)
            ax.errorbar(list(curve), losses[0], error_bars(losses), fmt="o-", capsize=3,
                        color=COLORS[objective, "byte"], label=f"{objective.upper()}, bytes")
        bpe = found.get(((objective, "bpe"), PLAIN, budget))
        if bpe is not None:
            ax.axhline(bpe[0], color=COLORS[objective, "bpe"], linestyle="--",
                       label=f"{objective.upper()}, BPE")
    sizes = (1, 2, 4, 8)
    ax.set(xlabel=f"bytes in a patch (patches in {context} bytes)", ylabel="bits per byte")
    ax.set_xticks(sizes, [f"{size}\n({context // size})" for size in sizes])


def paint_won(ax, found, budget):
    """Draw the bits that each remedy wins in each configuration."""
    names = list(dict.fromkeys(name for own in REMEDIES.values() for name in own))
    for shift, configuration in zip((-0.24, -0.08, 0.08, 0.24), CONFIGURATIONS, strict=True):
        plain = found.get((configuration, PLAIN, budget))
        own = {y: found[configuration, name, budget] for y, name in enumerate(names)
               if (configuration, name, budget) in found}
        if plain is None or not own:
            continue
        won = plain[:, None] - np.stack(list(own.values()), axis=1)                     # (S, K)
        ax.errorbar(won[0], np.array(list(own)) + shift, xerr=error_bars(won), fmt="o", capsize=2,
                    color=COLORS[configuration], label=CONFIGURATIONS[configuration])
    ax.set(yticks=range(len(names)), xlabel="bits per byte won")
    ax.set_yticklabels(names)
    ax.invert_yaxis()
    ax.axvline(0, color="0.6")


def paint_gaps(ax, found):
    """Draw what bytes lose to BPE against the budget, plain and with remedies on both sides."""
    budgets, labels = sorted({key[2] for key in found}), ("plain", "convolution", "all remedies")
    for objective, pairs in PAIRS.items():
        for style, label, names in zip(("o-", "^:", "s--"), labels, pairs, strict=True):
            gaps = {budget: lost(found, objective, names, budget) for budget in budgets}
            gaps = {budget: bits for budget, bits in gaps.items() if bits is not None}
            if gaps:
                bits = np.stack(list(gaps.values()), axis=1)                            # (S, K)
                ax.errorbar(list(gaps), bits[0], error_bars(bits), fmt=style, capsize=3,
                            color=COLORS[objective, "byte"], label=f"{objective.upper()}, {label}")
    ax.axhline(0, color="0.6")
    ax.set(xscale="log", xlabel="training FLOPs", ylabel="bits per byte that bytes lose")
    ax.set_xticks(budgets, [exact(budget) for budget in budgets])
    ax.minorticks_off()


def draw(path, found, context):
    """Draw patches and the gaps, and what each remedy wins at the two budgets with most of them."""
    budgets = [budget for _, _, budget in found]
    most = sorted(set(budgets), key=lambda budget: (-budgets.count(budget), -budget))[:2]

    def paint(axes):
        paint_patches(axes[0, 0], found, most[0], context)
        paint_gaps(axes[0, 1], found)
        axes[0, 0].set_title(f"at {exact(most[0])} FLOPs")
        for ax, budget in zip(axes[1], sorted(most), strict=False):
            paint_won(ax, found, budget)
            ax.set_title(f"at {exact(budget)} FLOPs")
        axes[1, 1].set_visible(len(most) > 1)
        # The names are those of the panel to the left.
        axes[1, 1].set_yticklabels([])
    scaling.draw(path, (2, 2), (10, 8), paint, share=False, log=False)
    print(f"\nfigure: {path}")


def study(args):
    """Train the runs that remedies.csv lacks, print the tables, draw the figure."""
    path, specs = args.out / "remedies.csv", []
    if not args.plot_only:
        args.budgets = args.budgets or BUDGETS[run.best_device()]
        specs = plan(args, sweep.load_corpora(args))
    rows = sweep.train_missing(specs, path, args, Path("runs/remedies"))
    if args.dry_run:
        return
    rows += sweep.read_rows(args.out / "runs.csv")
    sweep.check_alike(rows, path)
    if args.budgets:
        rows = [row for row in rows if row["flops_budget"] in args.budgets]
    found, outside = analyse(rows)
    if not found:
        raise InputError(f"{path} has too few runs: each remedy needs three widths, and "
                         f"{args.out / 'runs.csv'} the plain ones")
    report(found, outside)
    draw(args.out / "remedies.png", found, rows[0]["context_bytes"])
    if any(sweep.find(spec, rows) is None for spec in specs):
        sys.exit(2)
