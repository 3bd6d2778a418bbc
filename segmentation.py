"""Emergent segmentation: is a byte model unsure where BPE starts a token?

    python fragility.py segmentation            # reads the byte models in runs/gap

AUROC of the entropy of a model's next-byte prediction, as a detector of BPE token starts. A better
predictor tends to have a higher one, so compare at equal bits per byte.
"""
import csv
import math
import re
from pathlib import Path

import numpy as np
import torch

import data
import run
import scaling
import train_ar
from run import InputError
from scaling import COLORS
from sweep import exact

SEQUENCES = 64                        # of validation text that are read
POSITIONS = 64                        # in each
RESAMPLES = 400                       # of the bootstrap over sequences
BIGRAM_BYTES = 2**25                  # of training text that the bigram model counts
READINGS = {"ar": "AR", "left": "MDM, from left to right", "bigram": "bigram counts"}
# The columns of segmentation.csv and entropy.csv. bigram has no budget, width, seed and BPB: 0.
AREA_COLUMNS = {"reading": str, "vocab_size": int, "auroc": float, "low": float, "high": float,
                "flops_budget": float, "width": int, "seed": int, "val_bpb": float}
ENTROPY_COLUMNS = {"byte": int, "start": int, "vocab_size": int, "ar": float, "mdm": float}


# -----------------------------------------------------------------------------------------------
# The readings.

def auroc(scores, positive):
    """Return P(the score of a positive is above that of a negative), ties counted as half.

    scores, positive: (n,), positive of bool. nan if all are of one kind. By the sum of ranks (Mann
    and Whitney 1947).
    """
    _, index, counts = np.unique(scores, return_inverse=True, return_counts=True)
    # Ranks from 1; equal scores share the mean of theirs.
    ranks = (counts.cumsum() - (counts - 1) / 2)[index]
    n, m = positive.sum(), (~positive).sum()
    if n == 0 or m == 0:
        return math.nan
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def auroc_with_interval(scores, starts, resamples):
    """Return the AUROC of scores (N, P) for starts (N, P), and its 90% interval: (3,).

    resamples: (R, N), the indices of the sequences in each sample of the bootstrap.
    """
    values = [auroc(scores[rows].ravel(), starts[rows].ravel()) for rows in resamples]
    low, high = np.nanquantile(values, (0.05, 0.95))
    return auroc(scores.ravel(), starts.ravel()), low, high


def token_starts(tokenizer, ids):
    """Return which of the bytes that ids (N,) spell are the first of a token: (bytes,) bool."""
    lengths = tokenizer.bytes_per_id[ids]
    starts = np.zeros(lengths.sum(), dtype=bool)
    starts[lengths.cumsum() - lengths] = True
    return starts


def entropy(probabilities):
    """Return the entropy of distributions (..., V), in bits: (...)."""
    return torch.special.entr(probabilities).sum(dim=-1) / math.log(2)


@torch.no_grad()
def read_ar(model, ids, positions):
    """Return the entropy of AR's predictions of ids (N, T) at positions (N, P): (N, P), in bits."""
    inputs, _ = train_ar.corrupt(ids, model.config.vocab_size)
    found = [entropy(model(part).float().softmax(dim=-1)) for part in inputs.split(16)]
    return torch.cat(found).gather(1, positions)


@torch.no_grad()
def read_left(model, ids, positions):
    """Return the same of MDM. Each position and all behind it are masked: it sees what AR sees.

    ids (N, T), positions (N, P) -> (N, P), in bits.
    """
    found, T = [], torch.arange(ids.size(1), device=ids.device)
    for sequence, chosen in zip(ids, positions, strict=True):
        for part in chosen.split(16):
            hidden = T >= part[:, None]                                             # (16, T)
            logits = model(torch.where(hidden, model.config.vocab_size, sequence))  # (16, T, V)
            logits = logits[torch.arange(len(part)), part]                          # (16, V)
            found.append(entropy(logits.float().softmax(dim=-1)))
    return torch.cat(found).view(positions.shape)


# objective -> (name of the reading, function)
READ = {"ar": ("ar", read_ar), "mdm": ("left", read_left)}


def read_bigram(text, sequences, positions):
    """Return the entropy of a byte given the one before, by the pairs counted in text (uint8).

    sequences (N, T), positions (N, P), none of them 0 -> (N, P), in bits.
    """
    pairs = text[:-1].astype(np.int32) * 256 + text[1:]
    counts = torch.from_numpy(np.bincount(pairs, minlength=256 * 256)).view(256, 256)
    table = entropy(counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).numpy()      # (256,)
    return table[np.take_along_axis(sequences, positions - 1, 1)]


# -----------------------------------------------------------------------------------------------
# The study.

def best_runs(folders, budgets):
    """Return (result, folder) of the best finished byte run of each objective and budget, in order.

    Raise InputError if an objective has none, or if they are of different text or context.
    """
    best = {}
    for folder in folders:
        result = run.read(folder / "result.json")
        if result is None or not (folder / "checkpoint.pt").exists():
            continue
        result = run.PLAIN | result
        plain = result["shuffle"] == result["span"] == result["patch"] == 1
        wanted = plain and result["tokenizer"] == "byte"
        if wanted and (not budgets or result["flops_budget"] in budgets):
            key = result["objective"], result["flops_budget"]
            if key not in best or result["val_bpb"] < best[key][0]["val_bpb"]:
                best[key] = result, folder
    for objective in READ:
        if objective not in {key[0] for key in best}:
            raise InputError(f"there is no finished byte run of {objective} with a checkpoint: "
                             "train some (python scaling.py), or name their folders with --runs")
    if len({(result["corpus"]["sha256"], result["context_bytes"])
            for result, _ in best.values()}) > 1:
        raise InputError("the runs are of different text or context: name those of one with --runs")
    return [best[key] for key in sorted(best)]


def read_all(runs, byte, sequences, starts, vocab_size, device):
    """Return the rows of segmentation.csv: the AUROC of the bigram model and of each run.

    runs: as best_runs returns them. byte: a Corpus. sequences, starts (bool): (N, T).
    """
    N, T = sequences.shape
    rng = np.random.default_rng(0)
    # The same positions for all. Not the first, which has no byte before it.
    positions = 1 + rng.random((N, T - 1)).argsort(axis=1)[:, :POSITIONS]               # (N, P)
    resamples = rng.integers(N, size=(RESAMPLES, N))
    truth = np.take_along_axis(starts, positions, 1)                                    # (N, P)

    scores = read_bigram(byte.train[:BIGRAM_BYTES], sequences, positions)
    rows = [["bigram", vocab_size, *auroc_with_interval(scores, truth, resamples), 0, 0, 0, 0]]
    ids, at = torch.from_numpy(sequences).to(device), torch.from_numpy(positions).to(device)
    for result, folder in runs:
        model, _, _ = run.load_model(folder, device)
        reading, read = READ[result["objective"]]
        area = auroc_with_interval(read(model, ids, at).cpu().numpy(), truth, resamples)
        about = [result[key] for key in ("flops_budget", "width", "seed", "val_bpb")]
        rows.append([reading, vocab_size, *area, *about])
        print(f"read {folder}", flush=True)
    return rows


def read_line(runs, sequences, starts, vocab_size, device):
    """Return the rows of entropy.csv: a line of text read by the runs of the largest budgets.

    runs, sequences and starts as in read_all. [] without a line of 20 to 79 printable bytes.
    """
    texts = [sequence.astype(np.uint8).tobytes() for sequence in sequences]
    # Not early in a sequence, where the models know little of the text.
    pattern, first = re.compile(rb"\n([ -~]{20,79})(?=\n)"), sequences.shape[1] // 4 + 1
    found = [(n, *match.span(1)) for n, text in enumerate(texts)
             if (match := pattern.search(text, first))]
    if not found:
        return []
    n, begin, end = found[0]
    ids = torch.from_numpy(sequences[n:n + 1]).to(device)                               # (1, T)
    positions = torch.arange(begin, end, device=device)[None]                           # (1, P)
    # The runs are in order of budget: the last one of each objective stays.
    folders = {result["objective"]: folder for result, folder in runs}
    curves = []
    for objective, (_, read) in READ.items():
        model, _, _ = run.load_model(folders[objective], device)
        curves.append(read(model, ids, positions)[0].tolist())
    return [[byte, int(start), vocab_size, ar, mdm] for byte, start, ar, mdm in
            zip(sequences[n, begin:end].tolist(), starts[n, begin:end], *curves, strict=True)]


def study(args):
    """Run the study: read finished runs, print the table, draw a line of text."""
    areas, line = args.out / "segmentation.csv", args.out / "entropy.csv"
    if args.dry_run:
        raise InputError("--dry-run: segmentation trains nothing")
    if not args.plot_only:
        runs = best_runs(args.runs or sorted(Path("runs/gap").glob("*")), args.budgets)
        result, folder = runs[0]
        args.data = args.data or "pysrc"
        byte, T, device = data.load(args.data), result["context_tokens"], run.pick_device()
        if result["corpus"]["sha256"] != byte.meta["sha256"]:
            raise InputError(f"{folder} was trained on another text ({result['corpus']['name']}) "
                             f"than --data {args.data}")
        bpe = data.load(args.data, "bpe", args.vocab)
        sequences = data.Sequences(byte.val, T).spaced(SEQUENCES)                       # (N, T)
        starts = token_starts(bpe.tokenizer, bpe.val)
        starts = data.Sequences(starts, T).spaced(SEQUENCES) == 1                       # (N, T)
        args.out.mkdir(parents=True, exist_ok=True)
        run.write_csv(areas, AREA_COLUMNS,
                      read_all(runs, byte, sequences, starts, args.vocab, device))
        run.write_csv(line, ENTROPY_COLUMNS,
                      read_line(runs, sequences, starts, args.vocab, device))
    rows, line = read_table(areas, AREA_COLUMNS), read_table(line, ENTROPY_COLUMNS)
    show_areas(rows)
    if line:
        draw_line(args.out / "entropy.png", line)
        print(f"\nfigure: {args.out / 'entropy.png'}")
    else:
        print("\nno line of 20 to 79 printable bytes in the sequences: no entropy.png")


def read_table(path, columns):
    """Return the rows of a table of segmentation. Raise InputError if it is missing or bad."""
    if not path.exists():
        raise InputError(f"there is no {path}: python fragility.py segmentation makes it")
    try:
        with open(path, newline="") as file:
            return [{key: kind(line[key]) for key, kind in columns.items()}
                    for line in csv.DictReader(file)]
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise InputError(f"{path} is corrupt ({type(error).__name__}: {error})") from None


def show_areas(rows):
    """Print the table of AUROC."""
    lines = []
    for reading, title in READINGS.items():
        own = [row for row in rows if row["reading"] == reading]
        for row in sorted(own, key=lambda row: row["flops_budget"]):
            model = [exact(row["flops_budget"]), f"{row['val_bpb']:.3f}"]
            area = f"{row['auroc']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            lines.append([title, *(["", ""] if reading == "bigram" else model), area])
    sizes = ", ".join(sorted({f"{row['vocab_size']:,}" for row in rows}))
    scaling.print_table("AUROC of the entropy of the next byte, for token starts of a BPE of "
                        f"{sizes} [90% of bootstrap samples of the sequences]",
                        ["reading", "FLOPs", "bits per byte", "AUROC"], lines)


def draw_line(path, line):
    """Draw a line of text with the entropy of each byte as bars, AR above it and MDM below it."""
    # Imported here, since it is slow to import.
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    above, text, below = figure.subplots(3, 1, sharex=True, height_ratios=(6, 1, 6))
    starts = np.array([row["start"] for row in line]) == 1
    top = 1.05 * max(max(row["ar"], row["mdm"]) for row in line)
    for objective, ax in (("ar", above), ("mdm", below)):
        values, color = np.array([row[objective] for row in line]), COLORS[objective, "byte"]
        for chosen, alpha in ((starts, 1), (~starts, 0.35)):
            ax.bar(np.flatnonzero(chosen), values[chosen], color=color, alpha=alpha)
        ax.set(ylim=(0, top), ylabel="entropy, bits",
               title=f"{READINGS[READ[objective][0]]}; dark: the first byte of a BPE token")
    # Every other token has a grey background.
    text.bar(np.flatnonzero(starts.cumsum() % 2), 1, width=1, color="0.85")
    text.set(ylim=(0, 1), yticks=[], xticks=[], xlim=(-0.5, len(line) - 0.5))
    for x, row in enumerate(line):
        text.text(x, 0.45, chr(row["byte"]), ha="center", va="center", family="monospace",
                  fontsize=min(14, 750 / len(line)))
    run.write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=120))
