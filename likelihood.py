"""Two checks of the likelihoods: the order in which MDM reads, and repeated text.

    python fragility.py order                   # reads the runs in runs/gap
    python fragility.py repetition

order: the likelihood that MDM gives to a sequence from left to right is exact: a sum over T reads,
in each of which a byte and all behind it are masked. Its bound is the mean over all orders. If left
to right were much better, the order of reading would explain why AR has fewer bits per byte.

repetition: the bits per byte of validation sequences without a long match in the training text,
beside all. BPE reads more text than bytes at equal FLOPs, so it may profit more from repetition.
"""
import math

import numpy as np
import torch

import data
import run
import sample
import scaling
import segmentation
from run import InputError
from sweep import exact
from train_ar import VAL_BYTES

ORDER_SEQUENCES = 16                  # that MDM reads at all positions
ORDER_MASKS = 128                     # for the bound of each of these
LENGTHS = (32, 64)                    # bytes of a match, powers of two
MASKS = 2                             # for the bound of each sequence, to judge repetition
BLOCK = 2**24                         # bytes of training text whose hashes are in memory
RESAMPLES = 1000                      # of the bootstrap over sequences
ORDER_COLUMNS = {"flops_budget": float, "width": int, "sequences": int, "left": float,
                 "bound": float, "bound_less_left": float, "stderr": float}
# length: of the match that the sequences do not have, 0 for all of them. bytes_per_token: of BPE.
# gap: of bytes less BPE. change: of the gap, from all sequences to these.
MEASURES = ("byte", "bpe", "gap", "change")
REPETITION_COLUMNS = {
    "objective": str, "flops_budget": float, "byte_width": int, "bpe_width": int, "length": int,
    "byte_sequences": int, "bpe_sequences": int, "bytes_per_token": float} | {
    name + end: float for name in MEASURES for end in ("", "_low", "_high")}


# -----------------------------------------------------------------------------------------------
# The order of reading.

def read_order(model, ids):
    """Return the bits of sequences ids (N, T) by MDM from left to right, and by its bound: (2, N).

    The first is exact, the second a mean over masks.
    """
    everywhere = torch.arange(ids.size(1), device=ids.device).expand(ids.shape)
    left = segmentation.read_left(model, ids, everywhere)[1].sum(dim=1)
    bound = sample.token_bits(model, ids.flatten(), ORDER_MASKS).view(ids.shape).sum(dim=1)
    return torch.stack([left, bound])


def order_row(result, folder, sequences, device):
    """Return the row of order.csv of an MDM that reads sequences (N, T)."""
    model, _, _ = run.load_model(folder, device)
    N, T = sequences.shape
    bits = read_order(model, torch.from_numpy(sequences).to(device)).cpu().numpy() / T  # (2, N)
    left, bound = bits.mean(axis=1)
    stderr = (bits[1] - bits[0]).std(ddof=1) / N**0.5
    return [result["flops_budget"], result["width"], N, left, bound, bound - left, stderr]


def study_order(args):
    """Run the study of the order: read finished MDM runs on bytes, print the table."""
    path = args.out / "order.csv"
    if args.dry_run:
        raise InputError("--dry-run: order trains nothing")
    if not args.plot_only:
        runs = segmentation.find_runs(args)
        byte, T = segmentation.load_corpus(args, runs), runs[0][0]["context_tokens"]
        sequences = data.Sequences(byte.val, T).spaced(ORDER_SEQUENCES)                 # (N, T)
        rows = []
        for result, folder in runs:
            if result["objective"] == "mdm":
                rows.append(order_row(result, folder, sequences, run.pick_device()))
                print(f"read {folder}", flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
        run.write_csv(path, ORDER_COLUMNS, rows)
    rows = segmentation.read_table(path, ORDER_COLUMNS)
    lines = [[exact(row["flops_budget"]), f"{row['left']:.3f}", f"{row['bound']:.3f}",
              f"{row['bound_less_left']:+.3f} +- {row['stderr']:.3f}"] for row in rows]
    scaling.print_table(f"MDM on {rows[0]['sequences']} sequences: bits per byte read from left to "
                        "right, and by the bound of all orders (+-: standard error)",
                        ["FLOPs", "from left to right", "bound", "bound less left"], lines)


# -----------------------------------------------------------------------------------------------
# Repetition.

def hashes(text, length):
    """Return a 64-bit hash of each string of length bytes in text (n,) of uint8: (n - length + 1,).

    length is a power of two. Bytes become random numbers; the hash of a string is that of its first
    half times a random odd number, plus that of its second half (modulo 2^64).
    """
    rng = np.random.default_rng(0)
    found, half = rng.integers(2**64, size=256, dtype=np.uint64)[text], 1
    while half < length:
        factor = rng.integers(2**64, dtype=np.uint64) | np.uint64(1)
        found = found[:-half] * factor + found[half:]
        half *= 2
    return found


def repeated(val, train, length):
    """Return where the strings of length bytes in val begin that occur in train, too.

    val, train: (n,) of uint8 -> (n - length + 1,) bool. A false match has a chance of about 2^-40.
    """
    wanted, index = np.unique(hashes(val, length), return_inverse=True)
    found = np.zeros(len(wanted), dtype=bool)
    for start in range(0, len(train) - length + 1, BLOCK):
        block = np.sort(hashes(train[start:start + BLOCK + length - 1], length))
        at = np.searchsorted(block, wanted).clip(max=len(block) - 1)
        found |= block[at] == wanted
    return found[index]


def without_match(begin, end, matches, length):
    """Return which sequences, bytes begin to end (N,) of a text, hold no string that matches.

    matches: where strings of this length begin that do, as repeated() returns it.
    """
    before = np.concatenate([[0], matches.cumsum()])
    last = np.maximum(begin, end - length + 1)
    return before[last] == before[begin]


def read_bits(corpus, result, folder, device):
    """Return a run's bits for validation sequences, and where these begin and end: three (N,)."""
    model, _, _ = run.load_model(folder, device)
    T, count = result["context_tokens"], VAL_BYTES // result["context_bytes"]
    sequences = data.Sequences(corpus.val, T).spaced(count)                             # (N, T)
    ids = torch.from_numpy(sequences).to(device)
    bits = sample.token_bits(model, ids.flatten(), MASKS).view(ids.shape).sum(dim=1)    # (N,)
    ends = corpus.tokenizer.bytes_per_id[corpus.val].cumsum()
    # Where in the stream of tokens the sequences lie.
    at = data.Sequences(np.arange(len(corpus.val)), T).spaced(count)                    # (N, T)
    begin = ends[at[:, 0]] - corpus.tokenizer.bytes_per_id[sequences[:, 0]]
    return bits.double().cpu().numpy(), begin, ends[at[:, -1]]


def bits_per_byte(bits, nbytes, chosen, resamples):
    """Return the bits per byte of the chosen sequences, and of those in each resample: (1 + R,).

    bits, nbytes, chosen (bool): (N,). resamples: (R, N) indices. nan where none is chosen.
    """
    bits, nbytes = bits * chosen, nbytes * chosen
    all_bits = np.append(bits.sum(), bits[resamples].sum(axis=1))
    all_bytes = np.append(nbytes.sum(), nbytes[resamples].sum(axis=1))
    return np.where(all_bytes > 0, all_bits / all_bytes.clip(1), math.nan)


def repetition_rows(objective, pair, corpora, matches, device):
    """Return the rows of repetition.csv of one objective.

    pair: (result, folder) of the run on bytes and of that on BPE. corpora: of both. matches:
    {length: as repeated() returns it}.
    """
    read = [read_bits(corpus, *one, device) for corpus, one in zip(corpora, pair, strict=True)]
    # The sequences of both are spaced alike over the text: number i of both is about one place.
    N = min(len(bits) for bits, _, _ in read)
    resamples = np.random.default_rng(0).integers(N, size=(RESAMPLES, N))
    about = [objective, pair[0][0]["flops_budget"], *(result["width"] for result, _ in pair)]
    rows, gap_of_all = [], None
    for length in (0, *LENGTHS):
        values, counts = [], []
        for bits, begin, end in read:
            chosen = np.ones(len(bits), dtype=bool)
            if length > 0:
                chosen = without_match(begin, end, matches[length], length)
            values.append(bits_per_byte(bits, end - begin, chosen, resamples))
            counts.append(int(chosen.sum()))
        # Of the last of both, BPE.
        spelled = (end - begin)[chosen].sum() / max(1, counts[1] * pair[1][0]["context_tokens"])
        gap = values[0] - values[1]
        if length == 0:
            gap_of_all = gap
        measured = []
        for value in (*values, gap, gap - gap_of_all):
            measured += segmentation.with_interval(value)
        rows.append([*about, length, *counts, spelled, *measured])
    return rows


def largest_pairs(byte, bpe):
    """Return {objective: the pair of runs on bytes and BPE of the largest budget of both}."""
    runs = [{(result["objective"], result["flops_budget"]): (result, folder)
             for result, folder in one} for one in (byte, bpe)]
    # In order of budget: the last one of an objective stays.
    pairs = {key[0]: (runs[0][key], runs[1][key]) for key in sorted(set(runs[0]) & set(runs[1]))}
    if not pairs:
        raise InputError("no run on bytes has the objective and budget of a run on BPE")
    return pairs


def study_repetition(args):
    """Run the study of repetition: read finished runs, print the table."""
    path = args.out / "repetition.csv"
    if args.dry_run:
        raise InputError("--dry-run: repetition trains nothing")
    if not args.plot_only:
        byte_runs = segmentation.find_runs(args)
        bpe_runs = segmentation.find_runs(args, "bpe")
        byte = segmentation.load_corpus(args, byte_runs + bpe_runs)
        bpe = data.load(args.data, "bpe", bpe_runs[0][0]["vocab_size"])
        matches = {length: repeated(byte.val, byte.train, length) for length in LENGTHS}
        rows = []
        for objective, pair in largest_pairs(byte_runs, bpe_runs).items():
            rows += repetition_rows(objective, pair, (byte, bpe), matches, run.pick_device())
            print(f"read {pair[0][1]} and {pair[1][1]}", flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
        run.write_csv(path, REPETITION_COLUMNS, rows)
    show_repetition(segmentation.read_table(path, REPETITION_COLUMNS))


def show_repetition(rows):
    """Print the table of repetition."""
    lines = []
    for row in rows:
        chosen = f"no match of {row['length']}" if row["length"] else "all"
        change = segmentation.spread(row, "change", "+") if row["length"] else ""
        lines.append([f"{row['objective'].upper()}, {exact(row['flops_budget'])}", chosen,
                      f"{row['byte_sequences']:,}, {row['bpe_sequences']:,}",
                      f"{row['bytes_per_token']:.2f}",
                      *(segmentation.spread(row, name) for name in ("byte", "bpe", "gap")), change])
    scaling.print_table("Bits per byte of validation sequences without a match of so many bytes in "
                        "the training text [90% of bootstrap samples of the sequences]",
                        ["FLOPs", "sequences", "their number: bytes, BPE", "bytes a token",
                         "bytes", "BPE", "bytes less BPE", "its change from all"], lines)
