"""Emergent segmentation: is a byte model unsure where BPE starts a token?

    python -m study.segmentation                # reads the best byte models in runs/gap
    python -m study.segmentation --plot-only    # from results/segmentation.csv

AUROC of the entropy of a model's next-byte prediction, as a detector of BPE token starts: 0.5 is
chance. A better predictor tends to have a higher one. So AR, MDM and models that only count are
read from left to right at the same positions, and compared at equal bits per byte (BPB) there.
Within identifiers neither spaces nor punctuation give a token start away.
"""
import argparse
import csv
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import data
import log
import run
import train_ar
from data import InputError
from scaling import COLORS, print_table
from study import counting
from study.sweep import flags_of, row_of, short

SEQUENCES = 64                        # of validation text that are read
POSITIONS = 64                        # in each
RESAMPLES = 1000                      # of the bootstrap over sequences
ORDERS = 6                            # of the n-gram models, from 1 on
COUNTED = 2**25                       # bytes of training text that they count
IDENTIFIER = np.array([bytes([b]).isalnum() or b == ord("_") for b in range(256)])
READINGS = {"ar": "AR", "left": "MDM, from left to right", "ngram": "n-gram counts",
            "behind": "the byte before is a space", "space": "the byte is a space"}
# Of each reading, each with the ends of its 90% interval. ahead: AR less it, at equal BPB.
MEASURES = ("bpb", "auroc", "inside", "ahead", "ahead_inside")
# level: the FLOPs of a run, the order of an n-gram model.
AREA_COLUMNS = {"reading": str, "level": float, "width": int, "seed": int, "vocab_size": int} | {
    name + end: float for name in MEASURES for end in ("", "_low", "_high")}


# ---- What a model says of a byte, given the bytes before it.

def measure(logits, targets):
    """Return the entropy of predictions (..., V) and the surprisal of targets (...) in bits."""
    log_p = logits.float().log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    surprisal = -log_p.gather(-1, targets[..., None])[..., 0]
    return torch.stack([entropy, surprisal]) / math.log(2)                              # (2, ...)


@torch.no_grad()
def read_ar(model, ids, positions):
    """Return what measure says of AR's predictions of ids (N, T) at positions (N, P): (2, N, P)."""
    inputs, _ = train_ar.corrupt(ids, model.config.vocab_size)
    parts = zip(inputs.split(16), ids.split(16), strict=True)
    measured = torch.cat([measure(model(x), targets) for x, targets in parts], dim=1)   # (2, N, T)
    return measured.gather(2, positions.expand(2, -1, -1))


@torch.no_grad()
def read_left(model, ids, positions):
    """Return the same of MDM. Each position and all behind it are masked: it sees what AR sees."""
    measured, T = [], torch.arange(ids.size(1), device=ids.device)
    for sequence, chosen in zip(ids, positions, strict=True):
        for part in chosen.split(16):
            inputs = torch.where(T >= part[:, None], model.config.vocab_size, sequence)  # (16, T)
            logits = model(inputs)[torch.arange(len(part)), part]                       # (16, V)
            measured.append(measure(logits, sequence[part]))
    return torch.cat(measured, dim=1).view(2, *positions.shape)


# objective -> (name of the reading, function)
READ = {"ar": ("ar", read_ar), "mdm": ("left", read_left)}


# ---- How well it detects.

def auroc(scores, positive):
    """Return P(the score of a positive is above that of a negative), ties counted as half.

    scores, positive (bool): (n,). nan if all are of one kind. By ranks (Mann and Whitney, 1947).
    """
    _, index, counts = np.unique(scores, return_inverse=True, return_counts=True)
    # Ranks from 1; equal scores share the mean of theirs.
    ranks = (counts.cumsum() - (counts - 1) / 2)[index]
    n, m = positive.sum(), (~positive).sum()
    if n == 0 or m == 0:
        return math.nan
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def token_starts(tokenizer, ids):
    """Return which of the bytes that ids (N,) spell are the first of a token: (bytes,) bool."""
    lengths = tokenizer.bytes_per_id[ids]
    starts = np.zeros(lengths.sum(), dtype=bool)
    starts[lengths.cumsum() - lengths] = True
    return starts


def within_identifiers(sequences, positions):
    """Return where a byte and the one before it are letters, digits or "_": (N, P) bool."""
    now = IDENTIFIER[np.take_along_axis(sequences, positions, 1)]
    before = IDENTIFIER[np.take_along_axis(sequences, positions - 1, 1)]
    return now & before


def judge(reading, starts, inside, resamples):
    """Return the BPB of a reading, its AUROC for starts, and that of the positions inside.

    reading (2, N, P): scores and surprisals. starts, inside: (N, P) bool. resamples (R, N): samples
    of the sequences. -> (3, 1 + R): of all sequences, then of each sample.
    """
    judged = []
    for rows in (np.arange(len(starts)), *resamples):
        (scores, surprisal), truth, chosen = reading[:, rows], starts[rows], inside[rows]
        judged.append((surprisal.mean(), auroc(scores.ravel(), truth.ravel()),
                       auroc(scores[chosen], truth[chosen])))
    return np.array(judged).T


def at_equal_bpb(curve, bpb):
    """Return the AUROC of a curve of models at these BPB, linear between two models.

    curve (K, 2, S): the BPB and AUROC of K models in S samples. bpb (S,) -> (S,), nan beyond them.
    """
    by_bpb = np.take_along_axis(curve, curve[:, :1].argsort(axis=0), 0)                 # (K, 2, S)
    return np.array([np.interp(wanted, *by_bpb[:, :, s].T, left=math.nan, right=math.nan)
                     for s, wanted in enumerate(bpb)])


def with_interval(values):
    """Return values[0], and the 90% interval of those of the others that are not nan: a list."""
    if np.isnan(values[0]):
        return 3 * [math.nan]
    return [values[0], *np.nanquantile(values[1:], (0.05, 0.95))]


def compare(readings, starts, inside, vocab_size):
    """Return the rows of segmentation.csv. readings: of read_all. starts, inside: (N, P) bool."""
    # The same samples for all, so that differences are paired.
    resamples = np.random.default_rng(1).integers(len(starts), size=(RESAMPLES, len(starts)))
    judged = [(about, judge(values, starts, inside, resamples)) for *about, values in readings]
    ar = np.stack([values for about, values in judged if about[0] == "ar"])         # (K, 3, 1 + R)
    rows = []
    for about, (bpb, *areas) in judged:
        ahead = [np.full(bpb.shape, math.nan)] * 2
        if about[0] != "ar":
            ahead = [at_equal_bpb(ar[:, [0, k + 1]], bpb) - areas[k] for k in range(2)]
        measured = [value for values in (bpb, *areas, *ahead) for value in with_interval(values)]
        rows.append([*about, vocab_size, *measured])
    return rows


# ---- Runs and tables, of this study and of study.likelihood.

def arguments(doc):
    """Return the parser of a study that reads finished runs."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0], usage=argparse.SUPPRESS)
    parser.add_argument("--data", default="pysrc", help="the text of the runs: a name or a path")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the tables")
    parser.add_argument("--plot-only", action="store_true", help="read the table, not the runs")
    return parser


def best_runs(folders, corpus, tokenizer="byte", objectives=tuple(READ)):
    """Return the best plain runs, {(objective, FLOPs): (result, folder)}, in this order.

    folders: [] for all in runs/gap. Left out are runs of another text than the corpus.
    """
    folders = folders or Path("runs/gap").glob("*")
    runs = [(result, folder) for folder in folders if (result := log.read_result(folder))
            and result["corpus"]["sha256"] == corpus.meta["sha256"]
            and result["tokenizer"] == tokenizer and result["objective"] in objectives
            and not flags_of(row_of(result))]
    # The lowest loss comes last, and stays.
    best = {(result["objective"], result["flops_budget"]): (result, folder)
            for result, folder in sorted(runs, key=lambda pair: -pair[0]["val_bpb"])}
    contexts = {result["context_bytes"] for result, _ in best.values()}
    if {objective for objective, _ in best} < set(objectives) or len(contexts) > 1:
        raise InputError(f"name the folders of finished runs on this text, plain, {tokenizer}, of "
                         f"one context, and of each of: {', '.join(objectives)}")
    return dict(sorted(best.items()))


def read_table(path, columns):
    """Return the rows of a table of a study, as dicts."""
    with open(path, newline="") as file:
        return [{key: kind(line[key]) for key, kind in columns.items()}
                for line in csv.DictReader(file)]


def spread(row, name, sign=""):
    """Return a number of a row with its 90% interval: "0.66 [0.64, 0.69]"; "" for nan."""
    value, low, high = (f"{row[name + end]:{sign}.3f}" for end in ("", "_low", "_high"))
    return "" if math.isnan(row[name]) else f"{value} [{low}, {high}]"


# ---- The study.

def read_all(runs, text, sequences, positions):
    """Yield (reading, level, width, seed, scores and surprisals (2, N, P)) of all readings.

    text: what the n-gram models count. A detector that predicts nothing has surprisals of nan.
    """
    targets = np.take_along_axis(sequences, positions, 1)
    before = np.take_along_axis(sequences, positions - 1, 1)
    for name, byte in (("behind", before), ("space", targets)):
        yield name, 0, 0, 0, np.stack([byte == ord(" "), np.full(byte.shape, math.nan)])
    for order, p in enumerate(counting.ngrams(text, sequences, positions, ORDERS), 1):
        values = measure(torch.from_numpy(p).log(), torch.from_numpy(targets))
        yield "ngram", order, 0, 0, values.numpy()
    device = run.pick_device()
    ids, at = torch.from_numpy(sequences).to(device), torch.from_numpy(positions).to(device)
    for result, folder in runs:
        model, _, _ = log.load_model(folder, device)
        reading, read = READ[result["objective"]]
        about = [result[key] for key in ("flops_budget", "width", "seed")]
        yield reading, *about, read(model, ids, at).cpu().numpy()


def ahead(row, name, worst):
    """Return how far AR is ahead of a row at equal BPB, as text. worst: AR's highest BPB."""
    if row["reading"] == "ar" or math.isnan(row["bpb"]):
        return ""
    if math.isnan(row[name]):
        return f"no AR run that {'bad' if row['bpb'] > worst else 'good'}"
    return spread(row, name, "+")


def show_areas(rows):
    """Print the table of AUROC."""
    lines, worst = [], max(row["bpb"] for row in rows if row["reading"] == "ar")
    for row in sorted(rows, key=lambda row: (list(READINGS).index(row["reading"]), row["level"])):
        lines.append([READINGS[row["reading"]], short(row["level"]) if row["level"] else "",
                      *(spread(row, name) for name in ("bpb", "auroc", "inside")),
                      *(ahead(row, name, worst) for name in ("ahead", "ahead_inside"))])
    print_table("AUROC of the entropy of the next byte, for token starts of a BPE of "
                f"{rows[0]['vocab_size']:,} [90% of bootstrap samples of the sequences]",
                ["reading", "FLOPs, or order", "bits per byte", "AUROC", "within identifiers",
                 "AR less it at equal bits per byte", "the same within identifiers"], lines)


def draw_areas(path, rows):
    """Draw AUROC against BPB: all positions, and those within identifiers."""
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    styles = {"ar": ("o-", COLORS["ar"]), "left": ("s-", COLORS["mdm"]), "ngram": ("^--", "0.4")}
    rows = sorted(rows, key=lambda row: row["level"])
    for name, ax in zip(("auroc", "inside"), figure.subplots(1, 2), strict=True):
        for reading, (style, color) in styles.items():
            bpb, area, low, high = np.array([
                [row[key] for key in ("bpb", name, f"{name}_low", f"{name}_high")]
                for row in rows if row["reading"] == reading]).T
            ax.errorbar(bpb, area, (area - low, high - area), fmt=style, color=color, capsize=3,
                        label=READINGS[reading])
        ax.set(xlabel="bits per byte, from left to right", ylabel="AUROC; bars: 90%")
    figure.axes[0].set(title="all positions")
    figure.axes[1].set(title="within identifiers")
    figure.axes[1].legend()
    figure.savefig(path, dpi=120)


def main():
    parser = arguments(__doc__)
    parser.add_argument("runs", type=Path, nargs="*", help="run folders (default: in runs/gap)")
    parser.add_argument("--vocab", type=run.count, default=4096, help="tokens of the BPE")
    args = parser.parse_intermixed_args()
    path = args.out / "segmentation.csv"
    if not args.plot_only:
        byte, bpe = data.load(args.data), data.load(args.data, "bpe", args.vocab)
        runs = list(best_runs(args.runs, byte).values())
        T = runs[0][0]["context_tokens"]
        sequences = data.Sequences(byte.val, T).spaced(SEQUENCES)                       # (N, T)
        starts = token_starts(bpe.tokenizer, bpe.val)
        starts = data.Sequences(starts, T).spaced(SEQUENCES) == 1                       # (N, T)
        # The same positions for all. Not the first, which lack the context of the n-gram models.
        free = np.random.default_rng(0).random((len(sequences), T - ORDERS)).argsort(axis=1)
        positions = ORDERS + free[:, :POSITIONS]                                        # (N, P)
        readings = read_all(runs, byte.train[:COUNTED], sequences, positions)
        rows = compare(readings, np.take_along_axis(starts, positions, 1),
                       within_identifiers(sequences, positions), args.vocab)
        args.out.mkdir(parents=True, exist_ok=True)
        log.write_csv(path, AREA_COLUMNS, rows)
    rows = read_table(path, AREA_COLUMNS)
    show_areas(rows)
    draw_areas(path.with_suffix(".png"), rows)


if __name__ == "__main__":
    run.run_script(main)
