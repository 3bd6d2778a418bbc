"""What the study shows: its tables, printed, and its figures, each drawn from what fits.analyse() found. Used by scaling.py."""
import numpy as np

import fits
import run
from fits import CELLS

COLOR = dict(zip(CELLS, (run.COLORS[5], run.COLORS[0], run.COLORS[4], run.COLORS[1])))


# ---------------------------------------------------------------------------------------------------------------------
# Tables, in Markdown.

def interval(values, digits=3):
    """The first of bootstrap values, and the 90% interval of the others: "2.51 [2.40, 2.63]"; inf is "never"."""
    low, high = np.quantile(values[1:], (0.05, 0.95), method="nearest")
    first, low, high = ("never" if np.isinf(x) else power(f"{x:.0e}") if x >= 1e4 else f"{x:#.{digits}g}".rstrip(".")
                        for x in (values[0], low, high))
    return f"{first} [{low}, {high}]"


def power(text):
    """
    >>> power("1e+04"), power("3e+12")
    ('1e4', '3e12')
    """
    return text.replace("e+0", "e").replace("e+", "e")


def report(found):
    """Print the tables: laws, minima, gaps, parity."""
    budgets, C = found["budgets"], found["C"]
    print("\nLaws of bits per byte, E + A / N^alpha + B / D^beta, N without embeddings, D in tokens; "
          f"[90% of {fits.RESAMPLES} bootstrap samples of the runs]\n\n| cell | runs | E | A | B | alpha | beta | rms of residuals |\n|---|---|---|---|---|---|---|---|")
    for cell in filter(found.get, CELLS):
        one = found[cell]
        E, A, B, alpha, beta = one["laws"][0]
        rms = np.sqrt(np.mean((one["L"] - E - A * one["N"] ** -alpha - B * one["D"] ** -beta) ** 2))
        print(f"| {CELLS[cell]} | {len(one['L'])} | {' | '.join(map(interval, one['laws'].T))} | {rms:.3f} |")
    print("\nThe best of each budget, by a parabola in log N: bits per byte (parameters without embeddings)\n"
          f"\n| cell | {' | '.join(power(f'{C:g}') for C in budgets)} |\n|---|{'---|' * len(budgets)}")
    for cell in filter(found.get, CELLS):
        row = []
        for budget in budgets:
            N, L, fit = fits.curves(found[cell]).get(budget, ((), (), None))
            row.append(power(f"{fit[1]:.3f} ({fit[0]:.2g})") if fit else f"{min(L):.3f}, at the edge" if len(set(N)) > 2 else
                       f"{min(L):.3f}, {len(set(N))} width{'s'[:len(set(N)) > 1]}" if len(N) else "")
        print(f"| {CELLS[cell]} | {' | '.join(row)} |")
    for objective in filter(found.get, ("ar", "mdm")):
        one, name = found[objective], objective.upper()
        top = max(row["flops_budget"] for row in found[objective, "byte"]["rows"])
        at = np.searchsorted(C, budgets)
        lost = found[objective, "byte"]["frontier"] - found[objective, "bpe"]["frontier"]
        print(f"\n{name}: what bytes cost\n\n| FLOPs of BPE | bits per byte lost at equal compute | gap G: compute for equal bits per byte | "
              "G at equal parameters |\n|---|---|---|---|")
        for k, budget in enumerate(budgets):
            far = " (extrapolated)" if one["gap"][0, at[k]] * budget > top else ""
            print(f"| {power(f'{budget:g}')} | {interval(lost[:, at[k]])} | {interval(one['gap'][:, at[k]])}{far} | {interval(one['capacity'][:, k])} |")
        met = [k for k in range(len(budgets)) if np.isfinite(one["gap"][0, at[k]])]                 # where there is a G
        print()
        if len(met) > 1:
            first, last, decades = one["gap"][:, at[met[0]]], one["gap"][:, at[met[-1]]], np.log10(budgets[met[-1]] / budgets[met[0]])
            trend = np.divide(last, first, out=np.full(len(last), np.inf), where=np.isfinite(last)) ** (1 / decades)
            print(f"{name}: from {power(f'{budgets[met[0]]:g}')} to {power(f'{budgets[met[-1]]:g}')} FLOPs G is multiplied by {interval(trend)} "
                  "with every decade.")
        never = np.mean(np.isinf(one["parity"][1:]))
        print(f"{name}: the fitted frontiers " + (f"do not meet below {power(f'{fits.FAR:g}')} FLOPs" if np.isinf(one["parity"][0]) else
              f"meet at {interval(one['parity'], 2)} FLOPs" + (" (extrapolated)" if one["parity"][0] > budgets[-1] else ""))
              + f"; in {never:.0%} of the samples they never do.")


def report_tune(rows, out):
    """Print a table of bits per byte a cell: learning rate by batch."""
    for cell, title in CELLS.items():
        own = {(row["lr"], row["batch_tokens"]): row for row in rows if (row["objective"], row["tokenizer"]) == cell}
        batches, best = sorted({batch for _, batch in own}), min(own.values(), key=lambda row: row["val_bpb"], default=None)
        print(f"\n| {title}: learning rate, batch in tokens | {' | '.join(map(str, batches))} |\n|---|{'---|' * len(batches)}")
        for lr in sorted({lr for lr, _ in own}):
            cells = [own.get((lr, batch)) for batch in batches]
            marks = ["**" if row is best else "" for row in cells]
            print(f"| {lr:g} | " + " | ".join(f"{mark}{row['val_bpb']:.3f}{mark}" if row else "" for row, mark in zip(cells, marks)) + " |")


# ---------------------------------------------------------------------------------------------------------------------
# The figures.

def draw(path, shape, size, paint, sharex=True):
    """paint(axes) on a figure of shape (rows, columns) of panels -> path."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(*shape, sharex=sharex, sharey=True, squeeze=False)
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
            for budget, (N, L, fit) in fits.curves(found[cell]).items() if cell in found else ():
                ax.plot(N, L, "o", color=colors[budget], markersize=4, label=power(f"{budget:g}"))
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
        ax, C, high = axes[0, 0], found["C"], found["budgets"][-1]
        for cell in filter(found.get, CELLS):
            lines, color = found[cell]["frontier"], COLOR[cell]
            for part, style in ((C <= high, "-"), ((C >= high) & (C <= 100 * high), "--")):
                ax.plot(C[part], lines[0, part], style, color=color, label=CELLS[cell] if style == "-" else None)
                ax.fill_between(C[part], *np.quantile(lines[1:, part], (0.05, 0.95), axis=0), color=color, alpha=0.2, linewidth=0)
            for budget, (N, L, fit) in fits.curves(found[cell]).items():
                ax.plot(budget, fit[1] if fit else min(L), "o" if fit else "v", color=color, markersize=5)
        ax.set(xlabel="training FLOPs", ylabel="bits per byte, best width", title="lines: laws, dashed: extrapolated; dots: IsoFLOP minima")
        ax.legend()
    draw(path, (1, 1), (7.5, 5), paint)


def plot_gap(path, found):
    C, (low, high) = found["C"], found["budgets"][[0, -1]]
    seen = C >= low

    def paint(axes):
        for ax, right, title in zip(axes[0], (30 * high, 1e28), ("near the budgets that were trained", "extrapolated, beside the paper")):
            for objective, claim in (("ar", 1e22), ("mdm", 4e26)):
                color, name = COLOR[objective, "byte"], objective.upper()
                if objective in found:
                    G, top = found[objective]["gap"], max(row["flops_budget"] for row in found[objective, "byte"]["rows"])
                    inside = seen & (C <= high) & (C * G[0] <= top)       # both frontiers were measured here
                    band = np.quantile(G[1:], (0.05, 0.95), axis=0, method="nearest")
                    ax.plot(C[seen], G[0, seen], "--", color=color, linewidth=1, label=f"{name}, extrapolated; band: 90%")
                    ax.plot(C[inside], G[0, inside], color=color, linewidth=2.5, label=f"{name}, measured" if inside.any() else None)
                    ax.fill_between(C[seen], *np.minimum(band[:, seen], 1e6), color=color, alpha=0.15, linewidth=0)
                ax.plot(claim, 1, "X", color=color, markersize=9, clip_on=True, label=f"{name}, the paper's parity: {power(f'{claim:.0e}')}")
            ax.axhline(1, color="black", linewidth=0.8)
            ax.set(xlabel="training FLOPs of the BPE model", xlim=(low, right), yscale="log", ylim=(0.5, 300), title=title)
        axes[0, 0].set(ylabel="gap: FLOPs of bytes / FLOPs of BPE, at equal BPB")
        axes[0, 1].legend(fontsize=8, loc="upper right")
    draw(path, (1, 2), (9.5, 5), paint, sharex=False)


def plot_capacity(path, found):
    colors = shade(found["budgets"])

    def paint(axes):
        for objective, ax in zip(("ar", "mdm"), axes[0]):
            for tokenizer, style in (("byte", "o-"), ("bpe", "s--")):
                for budget, (N, L, _) in fits.curves(found[objective, tokenizer]).items() if (objective, tokenizer) in found else ():
                    x = np.unique(N)
                    ax.plot(x, [L[N == n].mean() for n in x], style, color=colors[budget], markersize=4, linewidth=1,
                            label=f"{power(f'{budget:g}')}, {'bytes' if tokenizer == 'byte' else 'BPE'}")
            ax.set(xlabel="parameters without embeddings", title=objective.upper())
            if ax.lines:
                ax.legend(title="FLOPs", fontsize=7, ncols=2)
        axes[0, 0].set(ylabel="bits per byte")
    draw(path, (1, 2), (9, 5), paint)


def plot(out, found):
    """Draw all figures of the gap study into the folder out."""
    out.mkdir(parents=True, exist_ok=True)
    for name, paint in (("isoflops", plot_isoflops), ("frontier", plot_frontier), ("gap", plot_gap), ("capacity", plot_capacity)):
        paint(out / f"{name}.png", found)
    print(f"\nfigures: isoflops.png, frontier.png, gap.png, capacity.png in {out}")
