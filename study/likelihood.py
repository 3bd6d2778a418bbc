"""Is it the order of reading, the bound, or repeated text? Three checks with trained models.

    python -m study.likelihood order                   # reads the best MDM on bytes in runs/gap
    python -m study.likelihood looseness RUN [RUN ...]
    python -m study.likelihood repetition              # reads the best of all four configurations
    python -m study.likelihood repetition --plot-only  # from results/repetition.csv

order: an MDM gives a sequence an exact likelihood in each order of reading: a sum over T reads, in
each of which a token and all that come after it are masked. Its bound is the mean over all orders.
Were left to right much better, the order of reading would explain why AR is ahead.

looseness: a mixture of orders is a model, too, and never has more bits than their mean. The mean
less the mixture of some orders says how many of MDM's bits are the bound's, at least.

repetition: bits per byte of validation sequences without a long match in the training text. BPE
reads more text than bytes at equal FLOPs, so it may profit more from repetition.
"""
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import log
import run
import sample
from data import InputError
from scaling import print_table
from study.segmentation import arguments, best_runs, read_table, spread, with_interval
from study.sweep import short

ORDER_MASKS = 128                     # for the bound of a sequence that is read from left to right
LENGTHS = (32, 64, 128)               # bytes of a match, powers of two
MASKS = 2                             # for the bound of each sequence, to judge repetition
BLOCK = 2**24                         # bytes of training text whose hashes are in memory
RESAMPLES = 1000                      # of the bootstrap over sequences
ORDER_COLUMNS = {"flops_budget": float, "width": int, "sequences": int, "left": float,
                 "bound": float, "bound_less_left": float, "stderr": float}
LOOSENESS_COLUMNS = {"run": str, "sequences": int, "orders": int, "mixture": float,
                     "bound": float, "bound_less_mixture": float, "stderr": float}
# length: of the match that the sequences do not have, 0 for all of them. bytes_per_token: of BPE.
# gap: of bytes less BPE. change: of the gap, from all sequences to these.
REPETITION_COLUMNS = {
    "objective": str, "flops_budget": float, "byte_width": int, "bpe_width": int, "length": int,
    "byte_sequences": int, "bpe_sequences": int, "bytes_per_token": float} | {
    name + end: float for name in ("byte", "bpe", "gap", "change") for end in ("", "_low", "_high")}


# ---- The order of reading, and the looseness of the bound.

def bits_in_order(model, sequence, order):
    """Return the bits of a sequence (T,) that an MDM reads in an order (T,): exact."""
    T = len(sequence)
    # At step t all but the first t tokens of the order are masked.
    masked = order.argsort() >= torch.arange(T)[:, None]                                # (T, T)
    inputs = torch.where(masked, model.config.vocab_size, sequence)
    nll = run.token_nll(model, inputs, sequence.expand(T, -1))                          # (T, T)
    return nll.gather(1, order[:, None]).double().sum().item() / math.log(2)


def mixture_bits(bits):
    """Return the bits of the mixture of M orders, given those of each (N, M): (N,)."""
    return math.log2(bits.shape[1]) - np.logaddexp2.reduce(-bits, axis=1)


def compare(bits, bound, nbytes):
    """Return the bits per byte of both (N,), their difference, and its standard error."""
    difference = (bound - bits).sum() / nbytes.sum()
    # The error of a ratio, since sequences differ in bytes.
    residuals = bound - bits - difference * nbytes
    stderr = residuals.std(ddof=1) * len(nbytes) ** 0.5 / nbytes.sum()
    return bits.sum() / nbytes.sum(), bound.sum() / nbytes.sum(), difference, stderr


def order_rows(args):
    """Yield the rows of order.csv: of the best MDM on bytes of each budget."""
    corpus, device = data.load(args.data), run.pick_device()
    for result, folder in best_runs(args.runs, corpus, objectives=("mdm",)).values():
        model, _, _ = log.load_model(folder, device)
        T = model.config.context
        ids = torch.from_numpy(data.Sequences(corpus.val, T).spaced(args.sequences))    # (N, T)
        left = np.array([bits_in_order(model, sequence, torch.arange(T)) for sequence in ids])
        bits = sample.token_bits(model, ids.flatten().to(device), ORDER_MASKS).view(ids.shape)
        bound = bits.sum(dim=1).cpu().double().numpy()
        yield [result["flops_budget"], result["width"], len(ids),
               *compare(left, bound, np.full(len(ids), T))]


def looseness_rows(args):
    """Yield the rows of looseness.csv: of each MDM in args.runs, on bytes or BPE."""
    if not args.runs:
        raise InputError("looseness: name the folders of finished MDM runs")
    for folder in args.runs:
        model, settings, tokenizer = log.load_model(folder, run.pick_device())
        corpus = data.load(args.data, settings["tokenizer"], settings["vocab_size"])
        if model.config.causal or corpus.meta["sha256"] != settings["corpus"]["sha256"]:
            raise InputError(f"{folder} is no MDM, or its text is not that of --data {args.data}")
        T = model.config.context
        sequences = data.Sequences(corpus.val, T).spaced(args.sequences)                # (N, T)
        bits = np.empty((len(sequences), args.orders))
        for n, sequence in enumerate(tqdm(torch.from_numpy(sequences), folder.name)):
            generator = run.generator(0, n)
            bits[n] = [bits_in_order(model, sequence, torch.randperm(T, generator=generator))
                       for _ in range(args.orders)]
        nbytes = tokenizer.bytes_per_id[sequences].sum(axis=1)                          # (N,)
        yield [folder.name, *bits.shape, *compare(mixture_bits(bits), bits.mean(axis=1), nbytes)]


def show_order(rows):
    lines = [[short(row["flops_budget"]), f"{row['left']:.3f}", f"{row['bound']:.3f}",
              f"{row['bound_less_left']:+.3f} +- {row['stderr']:.3f}"] for row in rows]
    print_table(f"MDM on {rows[0]['sequences']} sequences: bits per byte read from left to right, "
                "and by the bound of all orders (+-: standard error)",
                ["FLOPs", "from left to right", "bound", "bound less left"], lines)


def show_looseness(rows):
    lines = [[row["run"], f"{row['mixture']:.4f}", f"{row['bound']:.4f}",
              f"{row['bound_less_mixture']:.4f} +- {row['stderr']:.4f}"] for row in rows]
    print_table(f"MDM on {rows[0]['sequences']} sequences in {rows[0]['orders']} orders: bits per "
                "byte by the mixture of orders, and by their mean (+-: standard error)",
                ["run", "mixture", "mean", "mean less mixture"], lines)


# ---- Repetition.

def hashes(text, length):
    """Return a 64-bit hash of each string of length (a power of two) bytes in text (n,).

    Bytes become random numbers; the hash of a string is that of its first half times a random odd
    number, plus that of its second half (modulo 2^64).
    """
    rng, half = np.random.default_rng(0), 1
    values = rng.integers(2**64, size=256, dtype=np.uint64)[text]
    while half < length:
        factor = rng.integers(2**64, dtype=np.uint64) | np.uint64(1)
        values = values[:-half] * factor + values[half:]
        half *= 2
    return values


def repeated(val, train, length):
    """Return where strings of length bytes begin in val (n,) that train has, too: bool.

    A false match has a chance of about 2^-38.
    """
    # Sorted, which makes the search many times faster.
    wanted, index = np.unique(hashes(val, length), return_inverse=True)
    matches = np.zeros(len(wanted), dtype=bool)
    for start in range(0, len(train) - length + 1, BLOCK):
        block = np.sort(hashes(train[start:start + BLOCK + length - 1], length))
        at = np.searchsorted(block, wanted).clip(max=len(block) - 1)
        matches |= block[at] == wanted
    return matches[index]


def without_match(begin, end, matches, length):
    """Return which sequences, bytes begin to end (N,) of a text, hold none of the matches."""
    before = np.concatenate([[0], matches.cumsum()])
    # Too near the end of the text for a string of this length.
    begin = begin.clip(max=len(matches))
    last = np.maximum(begin, end - length + 1)
    return before[last] == before[begin]


def read_bits(corpus, result, folder):
    """Return a run's bits for validation sequences, and where these begin and end: three (N,)."""
    device = run.pick_device()
    model, _, _ = log.load_model(folder, device)
    T, count = result["context_tokens"], run.VAL_BYTES // result["context_bytes"]
    # Where in the stream of tokens the sequences lie.
    at = data.Sequences(np.arange(len(corpus.val)), T).spaced(count)                    # (N, T)
    ids = torch.from_numpy(corpus.val[at].astype(np.int64)).to(device)
    bits = sample.token_bits(model, ids.flatten(), MASKS).view(ids.shape).sum(dim=1)    # (N,)
    edges = np.append(0, corpus.tokenizer.bytes_per_id[corpus.val].cumsum())
    return bits.cpu().double().numpy(), edges[at[:, 0]], edges[at[:, -1] + 1]


def measure(readings, matches):
    """Yield (length, sequences without a match, the bytes of BPE's, what is measured of them).

    readings: of read_bits, bytes and BPE. matches: {length: of repeated}. Length 0: all sequences.
    """
    # The sequences of both are spaced alike over the text: number i of both is about one place.
    N = min(len(bits) for bits, _, _ in readings)
    samples = np.random.default_rng(0).integers(N, size=(RESAMPLES, N))
    for length in (0, *matches):
        values, counts = [], []
        for bits, begin, end in readings:
            free = without_match(begin, end, matches[length], length) if length else begin >= 0
            bits, nbytes = bits * free, (end - begin) * free
            sampled = bits[samples].sum(axis=1) / nbytes[samples].sum(axis=1)
            values.append(np.append(bits.sum() / nbytes.sum(), sampled))                # (1 + S,)
            counts.append(int(free.sum()))
        gap = values[0] - values[1]
        if length == 0:
            gap_of_all = gap
        yield length, counts, nbytes.sum(), (*values, gap, gap - gap_of_all)


def repetition_rows(args):
    """Yield the rows of repetition.csv: of the largest budget of each objective."""
    byte = data.load(args.data)
    runs, bpe_runs = (best_runs(args.runs, byte, tokenizer) for tokenizer in ("byte", "bpe"))
    matches = {length: repeated(byte.val, byte.train, length) for length in LENGTHS}
    # In order of budget: the last one of an objective stays.
    for key in {key[0]: key for key in sorted(runs.keys() & bpe_runs.keys())}.values():
        widths = [result["width"] for result, _ in (runs[key], bpe_runs[key])]
        bpe = data.load(args.data, "bpe", bpe_runs[key][0]["vocab_size"])
        readings = read_bits(byte, *runs[key]), read_bits(bpe, *bpe_runs[key])
        for length, counts, nbytes, values in measure(readings, matches):
            tokens = counts[1] * bpe_runs[key][0]["context_tokens"]
            yield [*key, *widths, length, *counts, nbytes / max(1, tokens),
                   *(number for value in values for number in with_interval(value))]


def show_repetition(rows):
    lines = []
    for row in rows:
        # Of the gap on all sequences.
        share = row["change"] / (row["gap"] - row["change"])
        change = [spread(row, "change", "+"), f"{share:+.0%}"] if row["length"] else ["", ""]
        lines.append([f"{row['objective'].upper()}, {short(row['flops_budget'])}",
                      f"no match of {row['length']}" if row["length"] else "all",
                      f"{row['byte_sequences']:,}, {row['bpe_sequences']:,}",
                      f"{row['bytes_per_token']:.2f}",
                      *(spread(row, name) for name in ("byte", "bpe", "gap")), *change])
    print_table("Bits per byte of validation sequences without a match of so many bytes in the "
                "training text [90% of bootstrap samples of the sequences]",
                ["FLOPs", "sequences", "their number: bytes, BPE", "bytes a token", "bytes", "BPE",
                 "bytes less BPE", "its change from all", "in percent"], lines)


STUDIES = {"order": (order_rows, ORDER_COLUMNS, show_order),
           "looseness": (looseness_rows, LOOSENESS_COLUMNS, show_looseness),
           "repetition": (repetition_rows, REPETITION_COLUMNS, show_repetition)}


def main():
    parser = arguments(__doc__)
    flag = parser.add_argument
    flag("study", choices=STUDIES)
    flag("runs", type=Path, nargs="*", help="run folders (default: the best in runs/gap)")
    flag("--sequences", type=run.count, default=16, help="of validation text, in all their orders")
    flag("--orders", type=run.count, default=16, help="of reading, in a mixture")
    args = parser.parse_intermixed_args()
    rows, columns, show = STUDIES[args.study]
    path = args.out / f"{args.study}.csv"
    if not args.plot_only:
        args.out.mkdir(parents=True, exist_ok=True)
        log.write_csv(path, columns, rows(args))
    show(read_table(path, columns))


if __name__ == "__main__":
    run.run_script(main)
