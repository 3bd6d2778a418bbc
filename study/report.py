"""The study: the efficiency gap of bytes, first without a law, then with laws that share one E.

    python scaling.py --out results/mine                        # small budgets, tables and figures
    python scaling.py --budgets 1e13 3e13 --seeds 0 1           # finished runs are not repeated
    python scaling.py --budgets 1e20 --dry-run > commands.txt   # for another scheduler
    python scaling.py --plot-only                               # from results/*.csv alone

A finished run is a row of results/runs.csv, and everything below is computed from those rows and
from results/baselines.csv (counting.py). Intervals are 90%, over samples of the losses.
"""
import csv
import itertools
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import laws
import run
import sweep
from model import Config, flops_per_token
from run import InputError, short
from sweep import CONFIGURATIONS, TRAIN, exact

fit_law = laws.fit_law
# Okabe and Ito's colours, which all eyes can tell apart.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
COLORS = dict(zip(CONFIGURATIONS, ("#56B4E9", "#0072B2", "#E69F00", "#D55E00"), strict=True))
BUDGETS = {"cpu": (2e10, 6e10, 2e11), "mps": (1e13, 3e13, 1e14),
           "cuda": (1e16, 3e16, 1e17, 3e17, 1e18)}
# What an objective must be better than, or its budget stays out of the fits.
BASELINE = {"ar": "bigram", "mdm": "bag"}
# The numbers of a configuration's law besides E: A, B, alpha, beta; K, gamma, and the parabola's.
FORMS = {"surface": 4, "frontier law": 5}
CUTS = ("all budgets", "past counting", "past counting, without the lowest")
ENTROPIES = 61                         # values of E that are tried
INTERVAL = 1.645                       # half of a 90% interval, in standard errors
# No frontier is followed beyond these FLOPs.
FAR = 1e30


# -----------------------------------------------------------------------------------------------
# The rows.

def plan(args, corpora):
    """Return the runs of the study."""
    return [sweep.settings(configuration, flops, width, seed, args, corpora)
            for flops in args.budgets for configuration in CONFIGURATIONS
            for width in args.widths or sweep.bracket(configuration[0], flops)
            for seed in args.seeds]


def by_the_rules(row, flags=None):
    """Return whether a run has these flags and no others, and the batch and rate of our rules.

    A "lr" among the flags takes the place of the rate of our rules.
    """
    objective, tokenizer = row["objective"], row["tokenizer"]
    flags = {"lr": TRAIN[objective].LEARNING_RATE[tokenizer]} | (flags or {})
    batch = sweep.batch_by_the_rule(objective, tokenizer, row["flops_budget"],
                                    row["context_tokens"])
    found = {"lr": row["lr"]} | sweep.unusual(row)
    return row["batch_tokens"] == batch and found == flags


def read_baselines(path, row):
    """Return {(tokenizer, baseline): bits per byte} for the text of a row; {} without."""
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        return {(line["tokenizer"], line["baseline"]): float(line["val_bpb"])
                for line in csv.DictReader(file) if line["sha256"] == row["sha256"]
                and line["context_bytes"] == str(row["context_bytes"])
                and line["vocab_size"] in ("256", str(row["vocab_size"]))}


def analyse(rows, baselines):
    """Return {configuration: its runs and their minima}, without what has no IsoFLOP minima.

    C, N, D, L (n,) are the runs. samples (S, n): their losses, first as measured. budgets (K,).
    minima, best (S, K): the lowest loss, and ln N* where it is. curvature (S,). leveled (S, n): the
    losses less what a run's N costs it. passed (K,): whether the minimum is below the baseline.
    """
    found = {}
    for seed, configuration in enumerate(CONFIGURATIONS):
        own = [row for row in sorted(rows, key=sweep.settings_of)
               if (row["objective"], row["tokenizer"]) == configuration]
        if not own:
            continue
        C, N, D, L, nbytes = (np.array([row[key] for row in own], dtype=float) for key in (
            "flops_budget", "params_non_embedding", "tokens", "val_bpb", "bytes"))
        samples = laws.resample(C, N, L, seed)
        if samples is None:
            continue
        minima, best, curvature, _ = laws.pooled_minima(C, N, samples)
        budgets, index = np.unique(C, return_inverse=True)
        leveled = samples - curvature[:, None] * (np.log(N) - best[:, index]) ** 2
        baseline = baselines.get((configuration[1], BASELINE[configuration[0]]), math.inf)
        found[configuration] = SimpleNamespace(
            C=C, N=N, D=D, L=L, samples=samples, budgets=budgets, minima=minima, best=best,
            curvature=curvature, leveled=leveled, passed=minima[0] < baseline,
            groups=np.stack([C, N], axis=1), bytes_per_token=nbytes.sum() / D.sum(),
            vocab_size=own[0]["vocab_size"], context=own[0]["context_tokens"])
    return found


# -----------------------------------------------------------------------------------------------
# The gap without a law.

def gaps_without_law(found):
    """Return {objective: its gap} where both of its configurations have minima.

    budgets (K,): those of both. bits (S, K): bits per byte lost. G (S, K): inf where bytes do not
    reach BPE within the largest budget, top.
    """
    gaps = {}
    for objective in TRAIN:
        byte, bpe = (found.get((objective, tokenizer)) for tokenizer in ("byte", "bpe"))
        if byte is None or bpe is None:
            continue
        both = np.intersect1d(byte.budgets, bpe.budgets)
        chosen = np.isin(bpe.budgets, both)
        bits = byte.minima[:, np.isin(byte.budgets, both)] - bpe.minima[:, chosen]
        G = laws.interpolated_gap(byte.budgets, byte.minima, bpe.budgets, bpe.minima)[:, chosen]
        gaps[objective] = SimpleNamespace(budgets=both, bits=bits, G=G, top=byte.budgets[-1])
    return gaps


def reached(gap):
    """Return at which budgets 95% of the samples have a G: (K,). Elsewhere it is only bounded."""
    return np.isfinite(gap.G).mean(axis=0) > 0.95


def trend_of(gap, lowest, counted):
    """Return the trend of log10 G a decade from a budget on (S,), or None below two budgets.

    counted (K,): the budgets that count. Samples with an infinite G take the bound, top / C, which
    cuts off one side of the noise.
    """
    counted = counted & (gap.budgets >= lowest)
    if counted.sum() < 2:
        return None
    C = gap.budgets[counted]
    return laws.trend(C, np.minimum(gap.G[:, counted], gap.top / C))


def flops_per_byte(one, log_n):
    """Return training FLOPs per byte of text at ln N, between the widths that there are."""
    shapes = [Config(one.vocab_size, one.context, width) for width in sweep.WIDTHS]
    N = [16 * shape.width**2 * shape.depth for shape in shapes]
    cost = [flops_per_token(shape) / one.bytes_per_token for shape in shapes]
    return math.exp(np.interp(log_n, np.log(N), np.log(cost)))


def take_apart(found, objective, C, G):
    """Return the three factors of G: FLOPs per byte of text at equal size, model size, and text."""
    byte, bpe = found[objective, "byte"], found[objective, "bpe"]
    own = bpe.best[0, np.searchsorted(bpe.budgets, C)]
    slope, start = np.polyfit(np.log(byte.budgets), byte.best[0], 1)
    other = start + slope * math.log(C * G)
    at_equal_size = flops_per_byte(byte, own) / flops_per_byte(bpe, own)
    by_size = flops_per_byte(byte, other) / flops_per_byte(byte, own)
    return at_equal_size, by_size, G / at_equal_size / by_size


# -----------------------------------------------------------------------------------------------
# Laws.

def choose(found, cut):
    """Return {configuration: which of its runs a cut keeps (n,)}, of those that determine a law."""
    lowest = min((one.budgets[0] for one in found.values()), default=0)
    chosen = {}
    for key, one in found.items():
        kept = one.budgets if cut == CUTS[0] else one.budgets[one.passed]
        mask = np.isin(one.C, kept[kept > lowest] if cut == CUTS[2] else kept)
        C, N, D = one.C[mask], one.N[mask], one.D[mask]
        # A law of one configuration has three constants for its budgets.
        if mask.sum() > 5 and len(set(C)) > 2 and laws.determined(N, D):
            chosen[key] = mask
    return chosen


def fit(form, found, chosen, count=None):
    """Fit a law of a form to the chosen runs of each configuration, with one E and with separate E.

    count: of the samples; None: all. Return its grid of E, which E is best (shared (S,), separate
    {configuration: (S,)}), the rises of -2 log likelihood, both AICc, and two functions of a
    configuration and which E: curve, the frontier at C (S, len(C)), and residuals. None if no law
    fits.
    """
    grid = np.linspace(0, min((one.L.min() for one in found.values()), default=0), ENTROPIES)
    parts, profiles = {}, {}
    for key, mask in chosen.items():
        one = found[key]
        if form == "surface":
            sse, profiles[key] = laws.profile_surfaces(one.N[mask], one.D[mask],
                                                       one.samples[:count, mask], grid)
        else:
            sse, profiles[key] = laws.profile_frontiers(one.C[mask], one.leveled[:count, mask],
                                                        grid)
        if np.isfinite(sse).any(axis=0).all():
            parts[key] = mask.sum(), sse
    if not parts or not np.isfinite(sum(sse for _, sse in parts.values())).any(axis=0).all():
        return None

    def constants(key, which):
        return profiles[key][which, np.arange(len(which))]

    def curve(key, which, C):
        fitted, one = constants(key, which), found[key]
        if form == "surface":
            return laws.surface_frontier(fitted, C, one.vocab_size, one.context)
        E, K, gamma = fitted.T[..., None]
        return E + K * C**-gamma

    def residuals(key, which):
        first, one, mask = constants(key, which)[0], found[key], chosen[key]
        if form == "surface":
            return one.L[mask] - laws.surface_loss(first, one.N[mask], one.D[mask])
        return one.leveled[0, mask] - first[0] - first[1] * one.C[mask] ** -first[2]

    shared, separate, rises, aicc_one, aicc_separate = laws.joint_fit(parts, FORMS[form])
    return SimpleNamespace(grid=grid, shared=shared, separate=separate, rises=rises,
                           aicc_one=aicc_one, aicc_separate=aicc_separate, curve=curve,
                           residuals=residuals, keys=list(parts),
                           runs=sum(n for n, _ in parts.values()))


def extrapolate(law, objective, C):
    """Return G (S, len(C)) and parity (S,) of an objective, by a law with one E; None without."""
    keys = (objective, "byte"), (objective, "bpe")
    if not set(keys) <= set(law.keys):
        return None
    byte, bpe = (law.curve(key, law.shared, C) for key in keys)
    return laws.gap(byte, bpe, C), laws.parity(byte, bpe, C)


def predictions(rows, found):
    """Fit up to each budget, from the third on, and predict the minima of the next one.

    Return a list of (form, "one E" or "separate E", last budget, next budget, {configuration:
    (predicted, measured)}).
    """
    made = []
    for last, following in itertools.pairwise(sorted({row["flops_budget"] for row in rows})[2:]):
        known = analyse([row for row in rows if row["flops_budget"] <= last], {})
        for form in FORMS:
            law = fit(form, known, choose(known, CUTS[0]), count=1)
            for name in ("one E", "separate E") if law else ():
                pairs = {}
                for key in (key for key in law.keys if key in found):
                    measured = found[key].minima[0, found[key].budgets == following]
                    if len(measured):
                        which = law.shared if name == "one E" else law.separate[key]
                        predicted = law.curve(key, which, np.array([following]))
                        pairs[key] = predicted[0, 0], measured[0]
                if pairs:
                    made.append((form, name, last, following, pairs))
    return made


# -----------------------------------------------------------------------------------------------
# The tables, in Markdown.

def with_ends(values):
    """Return the first of the values, and the ends of the 90% interval of the others."""
    return values[0], *np.quantile(values[1:], (0.05, 0.95), method="nearest")


def interval(values, digits=3, far="never"):
    """Return the first of the values, and the 90% interval of the others: "2.51 [2.40, 2.63]".

    far: what stands for infinity.
    """
    def text(value):
        if np.isinf(value):
            return far
        return short(f"{value:.0e}" if value >= 1e4 else f"{value:#.{digits}g}".rstrip("."))
    return "{} [{}, {}]".format(*map(text, with_ends(values)))


def signed(values):
    """Return a number that may be negative, with its 90% interval and standard deviation."""
    return "{:+.2f} [{:+.2f}, {:+.2f}], sd {:.2f}".format(*with_ends(values), values[1:].std())


def print_table(title, columns, rows):
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def report_gaps(found, gaps):
    """Print the gap without a law, its trend, and what G is made of."""
    if not gaps:
        return
    rows, trends, factors = [], [], []
    for objective, gap in gaps.items():
        for k, budget in enumerate(gap.budgets):
            bound = f"above {int(gap.top / budget)}" if gap.top > budget else ""
            beyond = np.isinf(with_ends(gap.G[:, k])).all()
            G = bound if beyond else interval(gap.G[:, k], far=bound)
            rows.append([objective.upper(), exact(budget), interval(gap.bits[:, k]), G])
            if np.isfinite(gap.G[0, k]):
                parts = take_apart(found, objective, budget, gap.G[0, k])
                factors.append([objective.upper(), exact(budget),
                                *(f"{part:.3g}" for part in (gap.G[0, k], *parts))])
        for lowest in gap.budgets[:2]:
            both = [trend_of(gap, lowest, counted)
                    for counted in (reached(gap), np.isfinite(gap.G[0]))]
            if both[1] is not None:
                trends.append([objective.upper(), exact(lowest),
                               *("" if one is None else signed(one) for one in both)])
    print_table("The gap of bytes without a law, from IsoFLOP minima with one curvature a "
                f"configuration; [90% of {laws.SAMPLES} samples of residuals]",
                ["objective", "FLOPs of BPE", "bits per byte lost", "G"], rows)
    if trends:
        print_table("Trend of log10 G a decade", [
            "objective", "from", "budgets where 95% of the samples have a G [90%]",
            "budgets with a G [90%]"], trends)
    if factors:
        print_table("G taken apart: G = FLOPs per byte at equal size x larger model x more text",
                    ["objective", "FLOPs of BPE", "G", "FLOPs per byte", "larger model",
                     "more text"], factors)


def report_lowest(rows):
    """Print the lowest loss that was seen at each budget, and its width."""
    budgets = sorted({row["flops_budget"] for row in rows})
    best = {}
    for row in sorted(rows, key=lambda row: -row["val_bpb"]):
        best[row["objective"], row["tokenizer"], row["flops_budget"]] = row
    cells = {key: [best.get((*key, budget)) for budget in budgets] for key in CONFIGURATIONS}
    print_table("Lowest bits per byte of a run (width)", ["run", *map(exact, budgets)],
                [[CONFIGURATIONS[key], *(f"{row['val_bpb']:.3f} ({row['width']})" if row else ""
                                         for row in own)] for key, own in cells.items()])


def report_minima(found):
    budgets = sorted(set().union(*(one.budgets for one in found.values())))
    rows = []
    for key, one in found.items():
        cells = dict.fromkeys(budgets, "")
        for k, budget in enumerate(one.budgets):
            outside = laws.is_outside(one.best[0, k], one.N[one.C == budget])
            mark = ("" if one.passed[k] else " *") + (" (outside)" if outside else "")
            cells[budget] = short(f"{one.minima[0, k]:.3f} ({math.exp(one.best[0, k]):.2g})") + mark
        rows.append([CONFIGURATIONS[key], *cells.values()])
    print_table("IsoFLOP minima: bits per byte (parameters without embeddings); * counting does as "
                "well; outside: of the widths that were trained",
                ["minimum", *map(exact, budgets)], rows)


def report_entropies(laws_found):
    """Print E and AICc of all laws, with one E and with separate ones."""
    if not laws_found:
        return
    rows = []
    for (form, cut), law in laws_found.items():
        own = [interval(law.grid[law.separate[key]], 2) if key in law.keys else ""
               for key in CONFIGURATIONS]
        rows.append([form, cut, str(law.runs), interval(law.grid[law.shared], 2), *own,
                     f"{law.aicc_one:.1f}", f"{law.aicc_separate:.1f}"])
    print_table("One E, or one for each; the lower AICc is preferred",
                ["law", "budgets", "runs", "one E", *CONFIGURATIONS.values(), "AICc, one E",
                 "AICc, separate"], rows)


def verdict(parities):
    """Return what all laws say of parity, or "undecided". parities: (S,) of each.

    That there is none below FAR if 95% of the samples of each say so. Its interval, if that of all
    samples is less than four decades wide.
    """
    never = [np.isinf(values[1:]).mean() for values in parities]
    if min(never) >= 0.95:
        return f"not below {exact(FAR)}"
    low, high = np.quantile([values[1:] for values in parities], (0.05, 0.95), method="nearest")
    return short(f"{low:.0e} to {high:.0e}") if high < 1e4 * low else "undecided"


def report_extrapolations(laws_found, budgets):
    """Print what the laws with one E say of G, its trend and parity."""
    near, far = budgets[-1] / 10, budgets[-1]
    C = np.unique(np.append(np.geomspace(min(budgets[0], near), FAR, 120), (near, far)))
    rows, parities = [], {}
    for (form, cut), law in laws_found.items():
        for objective in TRAIN:
            if (both := extrapolate(law, objective, C)) is None:
                continue
            G, parity = both
            # The budgets around the last decade that was trained.
            at = np.searchsorted(C, (near, far))
            slope = laws.trend(C[at], np.minimum(G[:, at], FAR))
            rows.append([objective.upper(), form, cut, interval(G[:, at[0]]), signed(slope),
                         interval(parity, 2), f"{np.isinf(parity[1:]).mean():.0%}"])
            parities.setdefault(objective, []).append(parity)
    if rows:
        rows.sort(key=lambda row: row[0])
        print_table(f"Extrapolated by laws with one E, up to {exact(FAR)} FLOPs",
                    ["objective", "law", "budgets", f"G at {exact(near)}",
                     "trend of log10 G from there to " + exact(far), "FLOPs at parity",
                     "samples without"], rows)
        for objective, values in parities.items():
            print(f"\nparity of {objective.upper()}, by all of these laws: {verdict(values)}")


def report_predictions(made):
    rows = []
    for form, name, last, following, pairs in made:
        errors = np.array([predicted - measured for predicted, measured in pairs.values()])
        bits = []
        for objective in TRAIN:
            byte, bpe = (pairs.get((objective, tokenizer)) for tokenizer in ("byte", "bpe"))
            known = byte is not None and bpe is not None
            bits.append(f"{byte[0] - bpe[0]:.3f} ({byte[1] - bpe[1]:.3f})" if known else "")
        rows.append([form, name, exact(last), exact(following),
                     f"{np.sqrt((errors**2).mean()):.3f}", *bits])
    if rows:
        print_table("Left out and predicted: bits per byte",
                    ["law", "E", "fitted up to", "predicted at", "rms error of minima",
                     "AR bits lost (measured)", "MDM bits lost (measured)"], rows)


def report_residuals(found, laws_found):
    """Print how the laws of all budgets with one E fit, beside the spread of seeds."""
    rows = []
    for key, one in found.items():
        # Of no law: the spread alone.
        sd, df, _, _ = laws.lack_of_fit(one.L, one.groups, 0)
        cells = [CONFIGURATIONS[key], str(len(one.L)), f"{sd:.3f} ({df})"]
        for form, numbers in FORMS.items():
            law = laws_found.get((form, CUTS[0]))
            if law is None or key not in law.keys:
                cells += ["", "", ""]
                continue
            residuals = law.residuals(key, law.shared)
            _, _, F, p = laws.lack_of_fit(residuals, one.groups, numbers + 1)
            cells += [f"{np.sqrt((residuals**2).mean()):.3f}", f"{F:.1f}", f"{p:.3f}"]
        rows.append(cells)
    print_table("Residuals in bits per byte, all budgets, one E; F against replicates",
                ["configuration", "runs", "sd of seeds (df)", "surface: rms", "F", "p",
                 "frontier law: rms", "F", "p"], rows)


# -----------------------------------------------------------------------------------------------
# The figures.

def draw(path, shape, size, paint, legend_columns=4, share="all", log=True):
    """Call paint(axes) on a figure of shape (rows, columns) of panels, and write it to path.

    size: in inches, 120 pixels each. All labels go into one legend below the panels.
    """
    # Imported here, since it is slow to import.
    from matplotlib.figure import Figure
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(*shape, sharex=share, sharey=share, squeeze=False)
    paint(axes)
    labels = {}
    for ax in axes.flat:
        if log and ax.has_data():
            ax.set_xscale("log")
        ax.grid(alpha=0.3)
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            labels.setdefault(name, handle)
    if labels:
        figure.legend(labels.values(), labels.keys(), loc="outside lower center",
                      ncols=legend_columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    run.write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=120))


def paint_isoflops(axes, rows, found, baselines):
    budgets = sorted({row["flops_budget"] for row in rows})
    colors = dict(zip(budgets, itertools.cycle(OKABE_ITO), strict=False))
    for (key, title), ax in zip(CONFIGURATIONS.items(), axes.flat, strict=True):
        ax.set(title=title)
        one = found.get(key)
        for budget in budgets:
            own = [row for row in rows if (row["objective"], row["tokenizer"],
                                           row["flops_budget"]) == (*key, budget)]
            k = np.flatnonzero(one.budgets == budget)[:1] if one else ()
            # Grey: counting does as well.
            grey = len(k) > 0 and not one.passed[k[0]]
            color = "0.6" if grey else colors[budget]
            ax.plot([row["params_non_embedding"] for row in own], [row["val_bpb"] for row in own],
                    "o", color=color, markersize=4,
                    label=None if grey else f"{exact(budget)} FLOPs")
            if len(k):
                paint_parabola(ax, one, k[0], color)
        for name, style in (("unigram", ":"), (BASELINE[key[0]], "--")):
            if value := baselines.get((key[1], name)):
                ax.axhline(value, color="0.4", linestyle=style, lw=1, label=f"{name}, by counting")
    for ax in axes[-1]:
        ax.set(xlabel="parameters without embeddings")
    for ax in axes[:, 0]:
        ax.set(ylabel="bits per byte")


def paint_parabola(ax, one, k, color):
    N = one.N[one.C == one.budgets[k]]
    x = np.geomspace(N.min(), N.max())
    lowest, best = one.minima[0, k], one.best[0, k]
    ax.plot(x, lowest + one.curvature[0] * (np.log(x) - best) ** 2, color=color, lw=1)
    ax.plot(math.exp(best), lowest, "*", color=color, markersize=12, mec="black")


def error_bars(values):
    """Return how far the 90% interval of values (S, K) is below and above the first: (2, K)."""
    low, high = np.quantile(values[1:], (0.05, 0.95), axis=0)
    return np.stack([values[0] - low, high - values[0]]).clip(0)


def paint_gap(axes, gaps):
    bits, compute = axes[0]
    for shift, (objective, gap) in zip((0.96, 1.04), gaps.items(), strict=False):
        style = dict(color=COLORS[objective, "byte"], capsize=3, label=objective.upper())
        x = gap.budgets * shift
        bits.errorbar(x, gap.bits[0], error_bars(gap.bits), fmt="o-", **style)
        G = np.minimum(gap.G, gap.top / gap.budgets)                                    # (S, K)
        solid = reached(gap)
        if solid.any():
            compute.errorbar(x[solid], G[0, solid], error_bars(G[:, solid]), fmt="o-", **style)
        least = np.quantile(G[1:], 0.05, axis=0)
        hidden = ~solid & (least > 1.5)
        if hidden.any():
            compute.plot(x[hidden], least[hidden], "^", color=style["color"], mfc="none",
                         label=f"{objective.upper()}: at least")
    bits.set(xlabel="training FLOPs", ylabel="bits per byte that bytes lose", ylim=(0, None))
    if compute.has_data():
        compute.set(xlabel="training FLOPs of BPE", yscale="log", ylim=(1, None),
                    ylabel="G: compute that bytes need, times as much")


def paint_frontiers(axes, found, laws_found):
    ax, cut = axes[0, 0], CUTS[1]
    top = max(one.budgets[-1] for one in found.values())
    for key, one in found.items():
        color = COLORS[key]
        ax.plot(one.budgets[one.passed], one.minima[0, one.passed], "o", color=color)
        ax.plot(one.budgets[~one.passed], one.minima[0, ~one.passed], "o", color=color, mfc="none")
        C = np.geomspace(one.budgets[0], 100 * top, 60)
        trained = C <= one.budgets[-1]
        for form, style in zip(FORMS, ("--", "-"), strict=True):
            law = laws_found.get((form, cut))
            if law is None or key not in law.keys:
                continue
            values = law.curve(key, law.shared, C)
            low, high = np.quantile(values[1:], (0.05, 0.95), axis=0)
            ax.fill_between(C, low, high, color=color, alpha=0.12, linewidth=0)
            label = CONFIGURATIONS[key] if form == "frontier law" else None
            ax.plot(C, values[0], ":", color=color, lw=1)
            ax.plot(C[trained], values[0, trained], style, color=color, lw=2, label=label)
    ax.set(xlabel="training FLOPs (dotted: extrapolated)", ylabel="bits per byte, best width",
           title="Lines: laws with one E (full: frontier law, dashed: surface). Hollow: not fitted")


def paint_profiles(axes, laws_found):
    for form, ax in zip(FORMS, axes[0], strict=True):
        law = laws_found[form, CUTS[0]]
        for key, rise in law.rises.items():
            color, name = ("black", key) if key == "one E" else (COLORS[key], CONFIGURATIONS[key])
            ax.plot(law.grid, rise, color=color, lw=3 if key == "one E" else 1.5, label=name)
        ax.axhline(2.7, color="0.4", linestyle=":", label="2.7: 90%, if the law holds")
        ax.set(title=form, xlabel="E, bits per byte", ylim=(0, 30))
    axes[0, 0].set(ylabel="rise of -2 log likelihood")


def paint_predictions(axes, made):
    styles = {("surface", "one E"): "s-", ("surface", "separate E"): "s:",
              ("frontier law", "one E"): "o-", ("frontier law", "separate E"): "o:"}
    budgets = sorted({following for _, _, _, following, _ in made})
    for (key, title), ax in zip(CONFIGURATIONS.items(), axes.flat, strict=True):
        for (form, name), style in styles.items():
            points = [(following, measured - predicted) for f, n, _, following, pairs in made
                      if (f, n) == (form, name) and key in pairs
                      for predicted, measured in [pairs[key]]]
            if points:
                ax.plot(*zip(*points, strict=True), style, color=OKABE_ITO[form == "surface"],
                        mfc="none" if name != "one E" else None, label=f"{form}, {name}")
        ax.axhline(0, color="0.4", lw=1)
        ax.set(title=title, xscale="log")
        ax.set_xticks(budgets, [exact(budget) for budget in budgets])
        ax.minorticks_off()
    for ax in axes[:, 0]:
        ax.set(ylabel="measured - predicted, bits")
    for ax in axes[-1]:
        ax.set(xlabel="FLOPs; fitted to the budgets below")


def paint_residuals(axes, found, laws_found):
    for form, ax in zip(FORMS, axes[0], strict=True):
        law = laws_found[form, CUTS[0]]
        for shift, key in zip(np.geomspace(0.85, 1.18, 4), law.keys, strict=False):
            ax.plot(found[key].C * shift, law.residuals(key, law.shared), "o", color=COLORS[key],
                    markersize=4, mfc="none", label=CONFIGURATIONS[key])
        ax.axhline(0, color="0.4", lw=1)
        ax.set(title=f"{form}, one E", xlabel="training FLOPs")
    axes[0, 0].set(ylabel="measured - fitted, bits per byte")


def plot(out, rows, found, gaps, laws_found, made, baselines):
    """Draw the figures that there are data for."""
    draw(out / "isoflops.png", (2, 2), (7.5, 7),
         lambda axes: paint_isoflops(axes, rows, found, baselines))
    if gaps:
        draw(out / "gap.png", (1, 2), (7.5, 4), lambda axes: paint_gap(axes, gaps), share="none")
    if laws_found:
        draw(out / "frontier.png", (1, 1), (7.5, 5),
             lambda axes: paint_frontiers(axes, found, laws_found))
    if {(form, CUTS[0]) for form in FORMS} <= set(laws_found):
        draw(out / "profile.png", (1, 2), (7.5, 4), lambda axes: paint_profiles(axes, laws_found),
             legend_columns=3, log=False)
        draw(out / "residuals.png", (1, 2), (7.5, 4),
             lambda axes: paint_residuals(axes, found, laws_found))
    if made:
        draw(out / "predicted.png", (2, 2), (7.5, 6), lambda axes: paint_predictions(axes, made),
             legend_columns=2, log=False)
    print(f"\nfigures: {out}")


# -----------------------------------------------------------------------------------------------

def main():
    args = sweep.study_arguments(__doc__).parse_args()
    path, specs = args.out / "runs.csv", []
    if not args.plot_only:
        args.budgets = args.budgets or BUDGETS[run.best_device()]
        specs = plan(args, sweep.load_corpora(args))
    rows = sweep.train_missing(specs, path, args, Path("runs/gap"))
    if args.dry_run:
        return
    failed = [spec for spec in specs if sweep.find(spec, rows) is None]
    # After training, all budgets of the table are shown.
    chosen = args.budgets if args.plot_only else None
    kept = [row for row in rows if not chosen or row["flops_budget"] in chosen]
    used = [row for row in kept if by_the_rules(row)]
    if not used:
        raise InputError(f"{path} has no finished run to show")
    sweep.check_alike(used, path)
    if len(used) < len(kept):
        print(f"{path}: {len(kept) - len(used)} runs of other batches, learning rates or flags are "
              "left out of the fits", file=sys.stderr)

    # A row of BPE, if there is one: its vocabulary counts.
    example = max(used, key=lambda row: row["vocab_size"])
    baselines = read_baselines(args.out / "baselines.csv", example)
    if not baselines:
        print(f"\nno budget is left out: there are no baselines of this text in {args.out} "
              "(python counting.py makes them)")
    found = analyse(used, baselines)
    gaps, laws_found, made = gaps_without_law(found), {}, predictions(used, found)
    for form, cut in itertools.product(FORMS, CUTS):
        if law := fit(form, found, choose(found, cut)):
            laws_found[form, cut] = law
    report_lowest(used)
    if lacking := [name for key, name in CONFIGURATIONS.items() if key not in found]:
        print(f"\nno IsoFLOP minima for {'; '.join(lacking)}: that takes three widths around the "
              "best one, and four runs more than budgets")
    if found:
        report_minima(found)
        report_gaps(found, gaps)
        report_entropies(laws_found)
        report_extrapolations(laws_found, sorted({row["flops_budget"] for row in used}))
        report_predictions(made)
    if laws_found:
        report_residuals(found, laws_found)
    plot(args.out, used, found, gaps, laws_found, made, baselines)
    if failed:
        sys.exit(2)


if __name__ == "__main__":
    run.run_script(main)
