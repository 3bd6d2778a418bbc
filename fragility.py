"""Why bytes cost, and what helps: shuffled order, span masking, segmentation, remedies, checks.

    python fragility.py shuffle                 # the order of tokens permuted within blocks
    python fragility.py span                    # MDM on bytes: runs of bytes masked together
    python fragility.py segmentation            # entropy of byte models where BPE tokens start
    python fragility.py remedies                # convolutions, patches, and a bell of mask rates
    python fragility.py order                   # MDM on bytes read from left to right
    python fragility.py repetition              # text that is not like the training text
    python fragility.py shuffle --plot-only     # from results/shuffle.csv alone

shuffle: one fixed permutation, the same in every aligned block, keeps the information of a text and
takes away contiguity. It also takes away translation invariance: where the neighbour of a byte went
depends on the byte's position in its block, which relative positions do not tell.

span: the bound of a span S predicts the S bytes of a run independently of each other. The bound of
single bytes is shown beside it.

remedies.py holds what gives contiguity back, segmentation.py how unsure a byte model is where a
token starts, and likelihood.py what the order of reading and repeated text do to the bits per byte.
"""
import math
import sys
from pathlib import Path

import numpy as np

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
# Studies that read finished runs.
READ = {"segmentation": segmentation.study, "order": likelihood.study_order,
        "repetition": likelihood.study_repetition}
BUDGET = {"cpu": 1e12, "mps": 3e13, "cuda": 1e17}
INTERVAL = 1.645                      # half of a 90% interval, in standard errors


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


def plan(args, corpora):
    """Return the settings of the runs of shuffle or span."""
    specs = []
    for flops in args.budgets:
        for configuration in CONFIGURATIONS:
            corpus = corpora[configuration[1]]
            widths = args.widths or sweep.bracket(configuration[0], flops, 1)
            for level in levels(args.study, configuration, corpus, args.context):
                specs += [sweep.settings(configuration, flops, width, seed, args, corpora,
                                         **{args.study: level})
                          for width in widths for seed in args.seeds]
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
        half = INTERVAL * np.sqrt((errors**2).mean())
        own, level = found[group[0]["objective"], group[0]["tokenizer"]], group[0][flag]
        own[level] = min(own.get(level, (math.inf, 0)), (bpb, half))
    return found


def shuffle_curves(rows):
    """Return what the shuffle study shows: [(label, {level: (bpb, half)}, style, colour)]."""
    found = summary(rows, "shuffle")
    return [(label, found[key], "s--" if key[1] == "bpe" else "o-", COLORS[key])
            for key, label in CONFIGURATIONS.items()]


def span_curves(rows):
    """Return what the span study shows, as shuffle_curves does. MDM on BPE is a level line."""
    byte, bpe = ("mdm", "byte"), ("mdm", "bpe")
    own = summary(rows, "span")
    # A model that was trained with single bytes has one bound only.
    rows = [row if row["span"] == 1 else
            row | {"val_bpb": row["val_bpb_span1"], "val_bpb_stderr": row["val_bpb_span1_stderr"]}
            for row in rows if row["span"] == 1 or row["val_bpb_span1"]]
    single = summary(rows, "span")
    bpe_line = dict.fromkeys(own[byte], own[bpe][1]) if own[bpe] else {}
    return [("MDM, bytes: bound of its spans", own[byte], "o-", COLORS[byte]),
            ("MDM, bytes: bound of single bytes", single[byte], "o:", COLORS[byte]),
            (CONFIGURATIONS[bpe], bpe_line, "s--", COLORS[bpe])]


def show(title, levels_name, curves, path):
    """Print a table of curves, as shuffle_curves returns them, and draw them into path."""
    def text(value):
        bpb, half = value
        return f"{bpb:.2f} [{bpb - half:.2f}, {bpb + half:.2f}]"

    levels = sorted(set().union(*(values for _, values, _, _ in curves)))
    lines = [[str(level), *(text(values[level]) if level in values else ""
                            for _, values, _, _ in curves)] for level in levels]
    scaling.print_table(title, [levels_name, *(label for label, _, _, _ in curves)], lines)

    def paint(axes):
        for label, values, style, color in curves:
            x = sorted(values)
            mean, half = np.array([values[level] for level in x]).reshape(-1, 2).T
            axes[0, 0].errorbar(x, mean, half, fmt=style, color=color, label=label, capsize=3)
        axes[0, 0].set(xlabel=levels_name, ylabel="bits per byte; bars: 90%")
    scaling.draw(path, (1, 1), (7.5, 5), paint, legend_columns=len(curves))
    print(f"\nfigure: {path}")


def intervene(args):
    """Run a study of shuffle or span: train what its table lacks, print the table, draw it."""
    path, specs = args.out / f"{args.study}.csv", []
    if not args.plot_only:
        lengths = SPANS if args.study == "span" else [n for n in BLOCKS if n < args.context]
        if odd := [length for length in lengths if args.context % length]:
            raise InputError(f"--context {args.context} is not divisible by {odd[0]}, a length "
                             f"that {args.study} needs")
        args.budgets = args.budgets or [BUDGET[run.pick_device().type]]
        specs = plan(args, sweep.load_corpora(args))
    rows = sweep.train_missing(specs, path, args, Path("runs") / args.study)
    if args.dry_run:
        return
    shown = [row for row in rows if not args.budgets or row["flops_budget"] in args.budgets]
    if not shown:
        raise InputError(f"{path} has no finished run to show")
    sweep.check_alike(shown, path)
    largest = max(row["flops_budget"] for row in shown)
    shown = [row for row in shown if row["flops_budget"] == largest]
    budget, path = f"at {exact(largest)} FLOPs: bits per byte [90%]", path.with_suffix(".png")
    if args.study == "shuffle":
        show(f"Order shuffled within blocks (BPE: of whole tokens; empty: the run above), {budget}",
             "bytes in a block", shuffle_curves(shown), path)
    else:
        show(f"Spans of bytes masked together, {budget}", "bytes masked together",
             span_curves(shown), path)
    if any(sweep.find(spec, rows) is None for spec in specs):
        sys.exit(2)


# -----------------------------------------------------------------------------------------------

def main():
    parser = sweep.study_arguments(__doc__)
    parser.add_argument("study", choices=("shuffle", "span", "remedies", *READ))
    parser.add_argument("--runs", type=run.path, nargs="+",
                        help=f"run folders that {', '.join(READ)} read (default: all of runs/gap)")
    args = parser.parse_args()
    if args.study in READ:
        READ[args.study](args)
    elif args.runs:
        raise InputError(f"--runs goes with {', '.join(READ)}")
    elif args.study == "remedies":
        remedies.study(args)
    else:
        intervene(args)


if __name__ == "__main__":
    run.run_script(main)
