"""Why bytes cost: the order of tokens shuffled within blocks, and spans of bytes masked together.

    python -m study.fragility shuffle
    python -m study.fragility span --controls 2 4     # only half spans, and what they stand beside
    python -m study.fragility shuffle --plot-only     # from results/shuffle.csv alone

shuffle: one fixed permutation, the same in every aligned block, keeps the information of a text and
takes away contiguity. It also takes away translation invariance: where the neighbour of a byte went
depends on the byte's position in its block, its phase, which relative positions do not tell. So the
controls are told the phase, in shuffled and in plain order alike.

span, for MDM: the bound of a span S predicts the S bytes of a run independently of each other. The
bound of single bytes is shown beside it. The controls have spans in half of the sequences only.
"""
import numpy as np
from matplotlib.figure import Figure

import run
import scaling
from scaling import CONFIGURATIONS
from study import sweep
from study.train import tokens_in_block

BLOCKS = (1, 2, 4, 8, 16, 32, 64)     # bytes that are permuted; the whole sequence is added
SPANS = (1, 2, 4, 8, 16)              # bytes that are masked together
# Bytes in a block whose phase is given; bytes that are masked together in half of the sequences.
CONTROLS = {"shuffle": (2, 4, 8, 32), "span": (2, 4, 8)}
PERMUTATIONS = (0, 2)                 # 1 leaves 5 of 7 neighbours together in blocks of 8
BUDGETS = {"cpu": (1e12,), "mps": (3e13,), "cuda": (1e17,)}
INTERVAL = 1.645                      # half of a 90% interval, in standard errors
SAMPLES = 10_000                      # of the errors


# ---- What is to be trained.

def runs_of(args, configuration, corpus):
    """Return the flags of a configuration's runs. With --controls, of the controls only."""
    lengths = args.controls or [n for n in CONTROLS[args.study] if n < args.context]
    if args.study == "span":
        levels = {("mdm", "byte"): SPANS, ("mdm", "bpe"): (1,)}.get(configuration, ())
        half = [{"span": length, "span_share": 0.5} for length in lengths]
        controls = [{}, *half] if configuration == ("mdm", "byte") else []
    else:
        blocks = [block for block in BLOCKS if block < args.context] + [args.context]
        # BPE permutes whole tokens: blocks that come to the same number of tokens are one run.
        levels = {tokens_in_block(corpus, block, corpus.tokens(args.context)): block
                  for block in reversed(blocks)}.values()
        controls = []
        for length in lengths if configuration[1] == "byte" else ():
            controls.append({"phase": length})
            # Two bytes can only change places.
            for index in PERMUTATIONS if length > 2 else (0,):
                controls.append({"phase": length, "shuffle": length, "permutation": index})
    return controls if args.controls else controls + [{args.study: level} for level in levels]


def plan(args, corpora):
    return [sweep.settings(configuration, flops, width, seed, args, corpora, flags)
            for flops in args.budgets for configuration in CONFIGURATIONS
            for flags in runs_of(args, configuration, corpora[configuration[1]])
            for width in args.widths or scaling.bracket(configuration[0], flops, 1)
            for seed in args.seeds]


# ---- What the runs say.

def summary(rows, flag):
    """Return {configuration: {level of flag: (bits per byte, half of its 90% interval)}}.

    The mean over seeds, of the best width. The interval is that of the text, which seeds share.
    """
    groups, best = {}, {configuration: {} for configuration in CONFIGURATIONS}
    for row in rows:
        key = tuple(row[name] for name in sweep.SETTINGS if name != "seed")
        groups.setdefault(key, []).append(row)
    for group in groups.values():
        levels, level = best[group[0]["objective"], group[0]["tokenizer"]], group[0][flag]
        bpb = np.mean([row["val_bpb"] for row in group])
        error = np.sqrt(np.mean([row["val_bpb_stderr"] ** 2 for row in group]))
        levels[level] = min(levels.get(level, (np.inf, 0)), (bpb, INTERVAL * error))
    return best


def bits_lost(rows, configuration, phase):
    """Return the bits that a shuffle loses when the phase is given: (permutations, seeds).

    Each run is compared with that of its seed in plain order, at the width that is best there. Only
    seeds that have all permutations count.
    """
    rows = [row for row in rows if (row["objective"], row["tokenizer"]) == configuration
            and row["phase"] == phase]
    plain = sorted((row["val_bpb"], row["width"], row["seed"]) for row in rows
                   if row["shuffle"] == 1)
    base = {seed: bpb for bpb, width, seed in plain if width == plain[0][1]}
    lost = {(row["permutation"], row["seed"]): row["val_bpb"] - base[row["seed"]] for row in rows
            if row["seed"] in base and row["width"] == plain[0][1] and row["shuffle"] == phase}
    indices = sorted({index for index, _ in lost})
    seeds = [seed for seed in base if all((index, seed) in lost for index in indices)]
    return np.array([[lost[index, seed] for seed in seeds] for index in indices])


def errors_of_means(tables, axis, rng):
    """Return samples of the error of each table's mean: (tables, S).

    The error is that by which its means over an axis differ (0: seeds do; 1: permutations). They
    are taken to differ alike in all tables, and are few: Student's t. 0 without two in any table.
    """
    means = [table.mean(axis=axis) for table in tables]
    free = sum(len(values) - 1 for values in means)
    variance = sum(((values - values.mean()) ** 2).sum() for values in means) / max(1, free)
    return np.array([np.sqrt(variance / len(values)) * rng.standard_t(max(1, free), SAMPLES)
                     for values in means])


def lost_with_phase(rows):
    """Return {configuration: {block: (bits lost by a shuffle, half of their 90% interval)}}.

    The mean over permutations and seeds. The interval holds how permutations differ, how seeds do
    (with two or more of them), and the error of the text, as if the two runs did not read the same
    one. That error is the mean of all runs.
    """
    lost, rng = {configuration: {} for configuration in CONFIGURATIONS}, np.random.default_rng(0)
    blocks = sorted({row["phase"] for row in rows} - {0})
    variance = 2 * (np.array([row["val_bpb_stderr"] for row in rows])**2).mean()
    for key in lost:
        tables = {block: table for block in blocks
                  if (table := bits_lost(rows, key, block)).size}
        if not tables:
            continue
        of_seeds = errors_of_means(tables.values(), 0, rng)
        of_permutations = errors_of_means(tables.values(), 1, rng)
        # Two bytes have one permutation.
        of_permutations[[block == 2 for block in tables]] = 0
        of_text = np.sqrt(variance) * rng.standard_normal((len(tables), SAMPLES))
        halves = np.quantile(abs(of_seeds + of_permutations + of_text), 0.9, axis=1)
        lost[key] = {block: (table.mean(), half)
                     for (block, table), half in zip(tables.items(), halves, strict=True)}
    return lost


def block_in_tokens(row):
    """Return the number of tokens that came to the bytes of --shuffle in a run."""
    divisors = [n for n in range(1, row["context_tokens"] + 1) if row["context_tokens"] % n == 0]
    return min(divisors, key=lambda n: abs(n - row["shuffle"] * row["tokens"] / row["bytes"]))


# ---- Tables and a figure. A curve is (label, {level: (mean, half)}, style, colour).

def lines_of(columns, ending=""):
    """Return the lines of a table, one for each level, of columns {level: (mean, half)}."""
    def text(mean, half):
        return f"{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]"

    return [[f"{length}{ending}", *(text(*values[length]) if length in values else ""
                                    for values in columns)]
            for length in sorted(set().union(*columns))]


def show_shuffle(rows, at):
    """Print the tables of the shuffle study. Return curves of the bits lost."""
    unphased = [row for row in rows if row["phase"] == row["permutation"] == 0]
    bpb, with_phase = summary(unphased, "shuffle"), lost_with_phase(rows)
    if unphased:
        scaling.print_table("Order shuffled within blocks (BPE: of whole tokens; empty: the run "
                            f"above), {at}: bits per byte [90%]",
                            ["bytes in a block", *CONFIGURATIONS.values()], lines_of(bpb.values()))
    tokens = {(row["tokenizer"], row["shuffle"]): block_in_tokens(row) for row in unphased}
    curves = []
    for key, label in CONFIGURATIONS.items():
        plain = bpb[key].pop(1, None)
        without = {tokens[key[1], block]: (mean - plain[0], np.hypot(half, plain[1]))
                   for block, (mean, half) in bpb[key].items() if plain}
        curves += [(f"{label}, with phase", with_phase[key], "o-", sweep.COLORS[key]),
                   (f"{label}, without", without, "s--", sweep.COLORS[key])]
    of_bytes = [curve[:2] for curve in curves if "bytes" in curve[0]]
    ar, mdm = with_phase["ar", "byte"], with_phase["mdm", "byte"]
    of_bytes.append(("AR less MDM, with phase", {
        block: (ar[block][0] - mdm[block][0], np.hypot(ar[block][1], mdm[block][1]))
        for block in ar.keys() & mdm.keys()}))
    scaling.print_table(f"Bits per byte that a shuffle loses, {at} [90%: with phase, of seeds, "
                        "permutations and text; without, of the text alone]",
                        ["bytes in a block", *(label for label, _ in of_bytes)],
                        lines_of([values for _, values in of_bytes]))
    return curves


def show_span(rows, at):
    """Print the table of the span study. Return its curves. MDM on BPE is a level line."""
    byte, bpe = ("mdm", "byte"), ("mdm", "bpe")
    # A model that was trained with single bytes has one bound only.
    single = [row if row["span"] == 1 else
              row | {"val_bpb": row["val_bpb_span1"], "val_bpb_stderr": row["val_bpb_span1_stderr"]}
              for row in rows]
    curves = []
    for share, ending, marker in ((1, "", "o"), (0.5, ", half spans", "^")):
        color = "0.4" if ending else sweep.COLORS[byte]
        for bound, judged, dashes in (("its spans", rows, "-"), ("single bytes", single, ":")):
            values = summary([row for row in judged if row["span_share"] == share], "span")[byte]
            curves.append((f"MDM, bytes: bound of {bound}{ending}", values, marker + dashes, color))
    level = summary(rows, "span")[bpe].get(1)
    line = dict.fromkeys(curves[0][1], level) if level else {}
    curves.insert(2, (CONFIGURATIONS[bpe], line, "s--", sweep.COLORS[bpe]))
    columns = [values for _, values, *_ in curves]
    scaling.print_table(f"Spans of bytes masked together, {at}: bits per byte [90%]",
                        ["bytes masked together", *(label for label, *_ in curves[:3])],
                        lines_of(columns[:3])
                        + lines_of([*columns[3:], {}], ", in half of the sequences"))
    return curves


def plot(path, curves, x, y):
    """Draw curves. x, y: the names of the axes."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    ax = figure.add_subplot(xlabel=x, ylabel=y, xscale="log")
    for label, values, style, color in curves:
        if values:
            lengths = sorted(values)
            mean, half = np.array([values[length] for length in lengths]).T
            ax.errorbar(lengths, mean, half, fmt=style, color=color, label=label, capsize=3)
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def main():
    parser = scaling.arguments(__doc__)
    parser.add_argument("study", choices=CONTROLS)
    parser.add_argument("--controls", type=run.count, nargs="+", help="lengths: train only these")
    args = parser.parse_args()
    rows = sweep.sweep(args, args.out / f"{args.study}.csv", BUDGETS, plan)
    show, x, y = {
        "shuffle": (show_shuffle, "bytes or BPE tokens in a block", "bits per byte lost"),
        "span": (show_span, "bytes masked together", "bits per byte")}[args.study]
    budgets = [row["flops_budget"] for row in rows]
    # Drawn is the budget with the most runs; of equal ones, the largest.
    most = max(budgets, key=lambda flops: (budgets.count(flops), flops))
    for flops in sorted(set(budgets)):
        at = f"at {sweep.short(flops)} FLOPs"
        curves = show([row for row in rows if row["flops_budget"] == flops], at)
        if flops == most:
            plot(args.out / f"{args.study}.png", curves, x, f"{y} {at}; bars: 90%")


if __name__ == "__main__":
    run.run_script(main)
