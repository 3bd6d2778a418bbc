"""Why bytes cost, and what helps: shuffled order, span masking, segmentation, remedies, checks.

    python fragility.py shuffle                 # the order of tokens permuted within blocks
    python fragility.py span                    # MDM on bytes: runs of bytes masked together
    python fragility.py segmentation            # entropy of byte models where BPE tokens start
    python fragility.py remedies                # convolutions, patches, and a bell of mask rates
    python fragility.py order                   # MDM on bytes read from left to right
    python fragility.py repetition              # text that is not like the training text
    python fragility.py steps --runs RUNS       # text that MDM writes in few steps
    python fragility.py shuffle --plot-only     # from results/shuffle.csv alone
    python fragility.py span --controls 2 4     # only half spans, and what they are compared with

shuffle: one fixed permutation, the same in every aligned block, keeps the information of a text and
takes away contiguity. It also takes away translation invariance: where the neighbour of a byte went
depends on the byte's position in its block, its phase, which relative positions do not tell. So the
controls are told the phase, in shuffled and in plain order alike.

span: the bound of a span S predicts the S bytes of a run independently of each other. The bound of
single bytes is shown beside it. The controls have spans in half of the training sequences only.

remedies.py holds what gives contiguity back, segmentation.py how unsure a byte model is where a
token starts, and likelihood.py what the order of reading and repeated text do to the bits per byte.
"""
import math
import sys
from pathlib import Path

import numpy as np

import data
import likelihood
import remedies
import run
import scaling
import segmentation
import sweep
from run import InputError
from scaling import COLORS
from sweep import CONFIGURATIONS, exact

BLOCKS = (1, 2, 4, 8, 16, 32, 64)     # bytes that are permuted; the whole sequence is added
SPANS = (1, 2, 4, 8, 16)              # bytes that are masked together
# Bytes in a block whose phase is given; bytes that are masked together in half of the sequences.
CONTROLS = {"shuffle": (2, 4, 8, 32), "span": (2, 4, 8)}
# Permutation 1 leaves 5 of 7 neighbours together in blocks of 8, and 0 leaves 2 of 7.
PERMUTATIONS = (0, 2)
# Studies that read finished runs.
READ = {"segmentation": segmentation.study, "order": likelihood.study_order,
        "repetition": likelihood.study_repetition, "steps": likelihood.study_steps}
BUDGET = {"cpu": 1e12, "mps": 3e13, "cuda": 1e17}
SAMPLES = 10_000                      # of the errors


# -----------------------------------------------------------------------------------------------
# Shuffled order and span masking: runs with a flag.

def levels(study, configuration, corpus, context):
    """Return the values of --shuffle or --span that a configuration is trained with."""
    if study == "span":
        return {("mdm", "byte"): SPANS, ("mdm", "bpe"): (1,)}.get(configuration, ())
    # BPE permutes whole tokens: blocks that come to the same number of tokens are one run.
    blocks = {}
    for block in (*(block for block in BLOCKS if block < context), context):
        blocks.setdefault(corpus.shuffle_tokens(block, corpus.tokens(context)), block)
    return list(blocks.values())


def controls(study, configuration, lengths):
    """Return the flags of the control runs of a configuration: a list of dicts."""
    if configuration == ("mdm", "byte") and study == "span":
        return [{}, *({"span": length, "span_share": 0.5} for length in lengths)]
    if configuration[1] == "bpe" or study == "span":
        return []
    found = []
    for length in lengths:
        found.append({"phase": length})
        # Two bytes can only change places.
        for index in PERMUTATIONS if length > 2 else (0,):
            found.append({"phase": length, "shuffle": length, "permutation": index})
    return found


def plan(args, corpora):
    """Return the settings of the runs of shuffle or span. With --controls, of the controls only."""
    lengths = args.controls or [n for n in CONTROLS[args.study] if n < args.context]
    specs = []
    for flops in args.budgets:
        for configuration in CONFIGURATIONS:
            corpus = corpora[configuration[1]]
            widths = args.widths or sweep.bracket(configuration[0], flops, 1)
            flags = controls(args.study, configuration, lengths)
            if not args.controls:
                flags += [{args.study: level}
                          for level in levels(args.study, configuration, corpus, args.context)]
            specs += [sweep.settings(configuration, flops, width, seed, args, corpora, **own)
                      for own in flags for width in widths for seed in args.seeds]
    return specs


def summary(rows, flag):
    """Return {configuration: {level of flag: (bits per byte, half of its 90% interval)}}.

    The mean over seeds, of the best width. The interval is the error of the validation text, which
    all seeds share, and not that of the seeds.
    """
    groups = {}
    for row in rows:
        key = tuple(row[name] for name in sweep.SETTINGS if name != "seed")
        groups.setdefault(key, []).append(row)
    found = {configuration: {} for configuration in CONFIGURATIONS}
    for group in groups.values():
        bpb = np.mean([row["val_bpb"] for row in group])
        errors = np.array([row["val_bpb_stderr"] for row in group], dtype=float)
        half = scaling.INTERVAL * np.sqrt((errors**2).mean())
        own, level = found[group[0]["objective"], group[0]["tokenizer"]], group[0][flag]
        own[level] = min(own.get(level, (math.inf, 0)), (bpb, half))
    return found


def bits_lost(rows, configuration, phase):
    """Return the bits that a shuffle loses when the phase is given: (permutations, seeds).

    Each run is compared with that of its seed in plain order, at the width that is best there. Only
    seeds that have all permutations count.
    """
    own = [row for row in rows if (row["objective"], row["tokenizer"]) == configuration
           and row["phase"] == phase]
    plain = sorted((row["val_bpb"], row["width"], row["seed"]) for row in own
                   if row["shuffle"] == 1)
    base = {seed: bpb for bpb, width, seed in plain if width == plain[0][1]}
    lost = {(row["permutation"], row["seed"]): row["val_bpb"] - base[row["seed"]] for row in own
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
    found, rng = {configuration: {} for configuration in CONFIGURATIONS}, np.random.default_rng(0)
    blocks = sorted({row["phase"] for row in rows} - {0})
    variance = 2 * (np.array([row["val_bpb_stderr"] for row in rows], dtype=float)**2).mean()
    for key in found:
        tables = {block: bits_lost(rows, key, block) for block in blocks}
        tables = {block: table for block, table in tables.items() if table.size}
        if not tables:
            continue
        of_seeds, of_permutations = (errors_of_means(tables.values(), axis, rng)
                                     for axis in (0, 1))
        # Two bytes have one permutation.
        of_permutations[[block == 2 for block in tables]] = 0
        errors = of_seeds + of_permutations
        errors += np.sqrt(variance) * rng.standard_normal((len(tables), SAMPLES))
        halves = np.quantile(abs(errors), 0.9, axis=1)
        found[key] = {block: (table.mean(), half)
                      for (block, table), half in zip(tables.items(), halves, strict=True)}
    return found


def lost_without_phase(rows):
    """Return the same of runs without a phase: means of seeds, each block at its best width.

    The interval is that of the text alone.
    """
    found = summary(rows, "shuffle")
    for key, own in found.items():
        plain = own.get(1)
        found[key] = {block: (bpb - plain[0], math.hypot(half, plain[1]))
                      for block, (bpb, half) in own.items() if plain and block > 1}
    return found


def tokens_in_block(row):
    """Return the number of tokens that came to the bytes of --shuffle in a run."""
    if row["tokenizer"] == "byte":
        return row["shuffle"]
    length = row["shuffle"] * row["tokens"] / row["bytes"]
    return data.nearest_divisor(row["context_tokens"], length)


def lines_of(columns, ending=""):
    """Return the lines of a table: one for each level. columns: {level: (mean, half)} of each."""
    def text(mean, half):
        return f"{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]"

    return [[f"{length}{ending}", *(text(*values[length]) if length in values else ""
                                    for values in columns)]
            for length in sorted(set().union(*columns))]


def show_shuffle(rows, at):
    """Print the tables of the shuffle study. Return curves of the bits lost, by tokens in a block.

    Curves: [(label, {level: (bits per byte, half of the 90% interval)}, style, colour)].
    """
    unphased = [row for row in rows if row["phase"] == row["permutation"] == 0]
    if unphased:
        found = summary(unphased, "shuffle")
        lines = lines_of([found[key] for key in CONFIGURATIONS])
        scaling.print_table("Order shuffled within blocks (BPE: of whole tokens; empty: the run "
                            f"above), {at}: bits per byte [90%]",
                            ["bytes in a block", *CONFIGURATIONS.values()], lines)

    given, without = lost_with_phase(rows), lost_without_phase(unphased)
    tokens = {(row["tokenizer"], row["shuffle"]): tokens_in_block(row) for row in unphased}
    curves, of_bytes = [], []
    for key, label in CONFIGURATIONS.items():
        own = {tokens[key[1], block]: lost for block, lost in without[key].items()}
        pair = [(f"{label}, with phase", given[key], "o-", COLORS[key]),
                (f"{label}, without", own, "s--", COLORS[key])]
        curves += pair
        if key[1] == "byte":
            of_bytes += pair
    if any(given.values()):
        scaling.print_table(f"Bits per byte that a shuffle loses, {at} [90%: with phase, of seeds, "
                            "permutations and text; without, of the text alone]",
                            ["bytes in a block", *(label for label, *_ in of_bytes)],
                            lines_of([values for _, values, *_ in of_bytes]))
    return [curve for curve in curves if curve[1]]


def span_curves(rows):
    """Return the two bounds of models that were trained with spans of bytes, as curves."""
    byte = "mdm", "byte"
    own = summary(rows, "span")
    # A model that was trained with single bytes has one bound only.
    rows = [row if row["span"] == 1 else
            row | {"val_bpb": row["val_bpb_span1"], "val_bpb_stderr": row["val_bpb_span1_stderr"]}
            for row in rows if row["span"] == 1 or row["val_bpb_span1"]]
    single = summary(rows, "span")
    return [("MDM, bytes: bound of its spans", own[byte], "o-", COLORS[byte]),
            ("MDM, bytes: bound of single bytes", single[byte], "o:", COLORS[byte])]


def show_span(rows, at):
    """Print the table of the span study. Return its curves. MDM on BPE is a level line."""
    bpe = "mdm", "bpe"
    curves = span_curves([row for row in rows if row["span_share"] == 1])
    level = summary(rows, "span")[bpe].get(1)
    line = dict.fromkeys(curves[0][1], level) if level else {}
    curves.append((CONFIGURATIONS[bpe], line, "s--", COLORS[bpe]))
    half = span_curves([row for row in rows if row["span_share"] == 0.5])
    scaling.print_table(f"Spans of bytes masked together, {at}: bits per byte [90%]",
                        ["bytes masked together", *(label for label, *_ in curves)],
                        lines_of([values for _, values, *_ in curves])
                        + lines_of([*(values for _, values, *_ in half), {}],
                                   ", in half of the sequences"))
    return curves + [(f"{label}, half spans", values, style.replace("o", "^"), "0.4")
                     for label, values, style, _ in half if values]


def draw(path, curves, x, y):
    """Draw curves, as show_shuffle returns them, into path. x, y: the names of the axes."""
    def paint(axes):
        for label, values, style, color in curves:
            lengths = sorted(values)
            mean, half = np.array([values[length] for length in lengths]).reshape(-1, 2).T
            axes[0, 0].errorbar(lengths, mean, half, fmt=style, color=color, label=label, capsize=3)
        axes[0, 0].set(xlabel=x, ylabel=y)
    scaling.draw(path, (1, 1), (7.5, 5), paint, legend_columns=3)
    print(f"\nfigure: {path}")


def intervene(args):
    """Run a study of shuffle or span: train what its table lacks, print tables, draw a figure."""
    path, specs = args.out / f"{args.study}.csv", []
    if not args.plot_only:
        lengths = SPANS if args.study == "span" else [n for n in BLOCKS if n < args.context]
        lengths = args.controls or lengths
        if odd := [length for length in lengths if args.context % length]:
            raise InputError(f"--context {args.context} is not divisible by {odd[0]}, a length "
                             f"that {args.study} needs")
        args.budgets = args.budgets or [BUDGET[run.best_device()]]
        specs = plan(args, sweep.load_corpora(args))
    rows = sweep.train_missing(specs, path, args, Path("runs") / args.study)
    if args.dry_run:
        return
    shown = [row for row in rows if not args.budgets or row["flops_budget"] in args.budgets]
    if not shown:
        raise InputError(f"{path} has no finished run to show")
    sweep.check_alike(shown, path)
    show, x, y = {
        "shuffle": (show_shuffle, "bytes or BPE tokens in a block", "bits per byte lost"),
        "span": (show_span, "bytes masked together", "bits per byte")}[args.study]
    curves, budgets = {}, [row["flops_budget"] for row in shown]
    for flops in sorted(set(budgets)):
        own = [row for row in shown if row["flops_budget"] == flops]
        curves[flops] = show(own, f"at {exact(flops)} FLOPs")
    # The budget with the most runs; of equal ones, the largest.
    most = max(curves, key=lambda flops: (budgets.count(flops), flops))
    draw(path.with_suffix(".png"), curves[most], x, f"{y} at {exact(most)} FLOPs; bars: 90%")
    if any(sweep.find(spec, rows) is None for spec in specs):
        sys.exit(2)


# -----------------------------------------------------------------------------------------------

def main():
    parser = sweep.study_arguments(__doc__)
    parser.add_argument("study", choices=("shuffle", "span", "remedies", *READ))
    parser.add_argument("--controls", type=run.number(int, 2, 2**20), nargs="+",
                        help="of shuffle and span, train the controls only, with these lengths")
    parser.add_argument("--runs", type=run.path, nargs="+",
                        help=f"run folders that {', '.join(READ)} read (default, but for steps: "
                             "all of runs/gap)")
    args = parser.parse_args()
    if args.controls and args.study not in CONTROLS:
        raise InputError("--controls goes with shuffle and span")
    if args.study in READ:
        if args.dry_run:
            raise InputError(f"--dry-run: {args.study} trains nothing")
        READ[args.study](args)
    elif args.runs:
        raise InputError(f"--runs goes with {', '.join(READ)}")
    elif args.study == "remedies":
        remedies.study(args)
    else:
        intervene(args)


if __name__ == "__main__":
    run.run_script(main)
