"""Context fragility, put to the test: what becomes of the four cells when local contiguity is taken away, or given back.

    python scaling.py --study shuffle       # the order of the tokens permuted within blocks of 1 to all bytes of a window
    python scaling.py --study span          # MDM on bytes, with aligned runs of bytes masked instead of single ones

Shuffling by one fixed permutation is a bijection: the text keeps its information and its bytes, and loses its contiguity.
"""
import numpy as np

import run
from data import nearest_divisor
from fits import CELLS
from figures import COLOR, draw, interval, power

BLOCKS = (1, 2, 4, 8, 16, 32, 64)            # bytes that are permuted among themselves; and the whole window
SPANS = (1, 2, 4, 8, 16)                     # bytes that are masked together
DRAWS = 2000                                 # of the errors, for intervals of what is computed from several runs


def interventions(study, corpora, context):
    """What is to be trained: yields (cell, flags). BPE blocks that come to the same number of tokens are one run."""
    if study == "span":
        yield ("mdm", "bpe"), {}
        yield from ((("mdm", "byte"), {"span": span}) for span in SPANS)
        return
    for cell in CELLS:
        corpus, seen = corpora[cell[1]], set()
        for block in sorted({*(block for block in BLOCKS if block < context), context}):
            tokens = corpus.shuffle_tokens(block, corpus.tokens(context))
            if tokens not in seen:
                seen.add(tokens)
                yield cell, {"shuffle": block}


def summary(rows, key):
    """Runs that differ in seed alone, as one: -> {(objective, tokenizer, row[key]): (1 + DRAWS,) bits per byte}, the mean first, then
    draws of it with its error: that of the validation text, and that of the seeds (pooled over a cell; unknown from one seed)."""
    groups = {}
    for row in rows:
        groups.setdefault((row["objective"], row["tokenizer"], row[key]), []).append(row)
    spread = {}                                               # variance over seeds, of each cell
    for cell in CELLS:
        own = [np.array([row["val_bpb"] for row in group]) for name, group in groups.items() if name[:2] == cell]
        freedom = sum(len(bpb) - 1 for bpb in own)
        spread[cell] = sum(((bpb - bpb.mean()) ** 2).sum() for bpb in own) / freedom if freedom else 0.0
    rng, found = np.random.default_rng(0), {}
    for name, group in sorted(groups.items()):
        mean = np.mean([row["val_bpb"] for row in group])
        error = np.sqrt(np.mean([row["val_bpb_stderr"] ** 2 for row in group]) + spread[name[:2]] / len(group))
        found[name] = np.concatenate([[mean], mean + error * rng.standard_normal(DRAWS)])
    return found


def bars(draws):
    """Means and half-widths of 90% intervals, for errorbar(): n times (1 + DRAWS,) -> (n,), (n,)"""
    return [values[0] for values in draws], [1.645 * values[1:].std() for values in draws]


def one_budget(rows, study):
    """The rows of the largest budget, and the budget."""
    flops = max(row["flops_budget"] for row in rows)
    seeds = len({row["seed"] for row in rows if row["flops_budget"] == flops})
    print(f"\n--study {study} at {power(f'{flops:g}')} FLOPs; [90% of the error of the validation text{' and of the seeds' if seeds > 1 else ', one seed'}]")
    return [row for row in rows if row["flops_budget"] == flops], flops


# ---------------------------------------------------------------------------------------------------------------------

def show_shuffle(rows, out):
    """Table, claims and results/shuffle.png."""
    rows, flops = one_budget(rows, "shuffle")
    found = summary(rows, "shuffle")
    lengths = {(row["tokenizer"], row["shuffle"]): block_bytes(row) for row in rows}
    blocks = sorted({name[2] for name in found})
    print(f"\n| bytes in a block | {' | '.join(CELLS.values())} |\n|---|{'---|' * len(CELLS)}")
    for block in blocks:
        print(f"| {block} | " + " | ".join(interval(found[(*cell, block)]) if (*cell, block) in found else "" for cell in CELLS) + " |")
    print("(empty: a block of BPE of as many tokens as the one above, the same run)\n")
    plain = {cell: found.get((*cell, 1)) for cell in CELLS}
    for cell, title in CELLS.items():
        for block in (8, blocks[-1]):
            if plain[cell] is not None and (*cell, block) in found:
                print(f"{title}: shuffled within {block} bytes it loses {interval(found[(*cell, block)] - plain[cell], 2)} bits per byte.")
    if plain["ar", "byte"] is not None and plain["mdm", "byte"] is not None:
        room = plain["mdm", "byte"] - plain["ar", "byte"]
        for block in blocks[1:]:
            if ("ar", "byte", block) in found:
                share = (found["ar", "byte", block] - plain["ar", "byte"]) / room
                print(f"AR on bytes, shuffled within {block} bytes, has gone {interval(share, 2)} of the way to MDM on plain bytes.")

    def paint(axes):
        ax = axes[0, 0]
        for cell, title in CELLS.items():
            own = [name for name in found if name[:2] == cell]
            x = [lengths[name[1:]] for name in own]
            mean, error = bars([found[name] for name in own])
            ax.errorbar(x, mean, error, fmt="s--" if cell[1] == "bpe" else "o-", color=COLOR[cell], markersize=5, capsize=2, label=title)
        ax.set(xlabel="bytes of text in a block whose order is permuted (1: plain)", ylabel="bits per byte",
               title=f"order shuffled within blocks, {power(f'{flops:g}')} FLOPs; bars: 90%")
        ax.legend()
    draw(out / "shuffle.png", (1, 1), (7.5, 5), paint)
    print(f"\nfigure: {out / 'shuffle.png'}")


def block_bytes(row):
    """The bytes of text in a block: for BPE, whole tokens that divide the window, at this corpus's bytes per token."""
    if row["tokenizer"] == "byte" or row["shuffle"] == 1:
        return row["shuffle"]
    length = row["bytes"] / row["tokens"]
    return length * nearest_divisor(row["context_tokens"], row["shuffle"] / length)


def show_span(rows, out):
    """Table, claims and results/span.png."""
    rows, flops = one_budget(rows, "span")
    own = summary(rows, "span")
    single = summary([row if row["val_bpb_span1"] is None else
                      row | {"val_bpb": row["val_bpb_span1"], "val_bpb_stderr": row["val_bpb_span1_stderr"]} for row in rows], "span")
    spans = sorted(name[2] for name in own if name[1] == "byte")
    plain, bpe = own.get(("mdm", "byte", 1)), own.get(("mdm", "bpe", 1))
    if plain is None or bpe is None:
        raise run.InputError("--study span compares with MDM on plain bytes and on BPE, which are not both there")
    print("\n| bytes masked together | bits per byte, by its own bound | share of the gap to BPE that comes back | bits per byte, single bytes masked |"
          "\n|---|---|---|---|")
    for span in spans:
        values = own["mdm", "byte", span]
        back = interval((plain - values) / (plain - bpe), 2) if span > 1 else ""
        print(f"| {span} | {interval(values)} | {back} | {interval(single['mdm', 'byte', span])} |")
    print(f"| BPE | {interval(bpe)} | | |")

    def paint(axes):
        ax = axes[0, 0]
        for draws, style, label in ((own, "o-", "bound of its own spans"), (single, "o:", "bound of single bytes")):
            mean, error = bars([draws["mdm", "byte", span] for span in spans])
            ax.errorbar(spans, mean, error, fmt=style, color=COLOR["mdm", "byte"], markersize=5, capsize=2, label=f"MDM, bytes: {label}")
        ax.axhline(bpe[0], color=COLOR["mdm", "bpe"], linestyle="--", label="MDM, BPE")
        ax.axhspan(*np.quantile(bpe[1:], (0.05, 0.95)), color=COLOR["mdm", "bpe"], alpha=0.2, linewidth=0)
        ax.set(xlabel="bytes masked together, in training", ylabel="bits per byte", title=f"span masking, {power(f'{flops:g}')} FLOPs; bars: 90%")
        ax.legend()
    draw(out / "span.png", (1, 1), (7.5, 5), paint)
    print(f"\nfigure: {out / 'span.png'}")
