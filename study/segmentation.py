"""Emergent segmentation: is a byte model unsure where BPE starts a token?

    python fragility.py segmentation            # reads the byte models in runs/gap

AUROC of the entropy of a model's next-byte prediction, as a detector of BPE token starts: 0.5 is
chance. A better predictor tends to have a higher one. So AR, MDM and models that only count are
read from left to right at the same positions, and compared at equal bits per byte (BPB) there.

Within identifiers neither spaces nor punctuation give a token start away.
"""
import csv
import math
import re
from pathlib import Path

import numpy as np
import torch

import counting
import data
import run
import scaling
import train_ar
from run import InputError
from scaling import COLORS
from sweep import exact, unusual

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
ENTROPY_COLUMNS = {"byte": int, "start": int, "vocab_size": int, "ar": float, "mdm": float}


# -----------------------------------------------------------------------------------------------
# The readings.

def measure(logits, targets):
    """Return the entropy of predictions (..., V), and the surprisal of targets (...): (2, ...).

    In bits. The logits may be logarithms of probabilities.
    """
    log_p = logits.float().log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    surprisal = -log_p.gather(-1, targets[..., None])[..., 0]
    return torch.stack([entropy, surprisal]) / math.log(2)


@torch.no_grad()
def read_ar(model, ids, positions):
    """Return what measure says of AR's predictions of ids (N, T) at positions (N, P): (2, N, P)."""
    inputs, _ = train_ar.corrupt(ids, model.config.vocab_size)
    found = [measure(model(part), targets)
             for part, targets in zip(inputs.split(16), ids.split(16), strict=True)]
    return torch.cat(found, dim=1).gather(2, positions.expand(2, -1, -1))


@torch.no_grad()
def read_left(model, ids, positions):
    """Return the same of MDM. Each position and all behind it are masked: it sees what AR sees.

    ids (N, T), positions (N, P) -> (2, N, P).
    """
    found, T = [], torch.arange(ids.size(1), device=ids.device)
    for sequence, chosen in zip(ids, positions, strict=True):
        for part in chosen.split(16):
            hidden = T >= part[:, None]                                             # (16, T)
            logits = model(torch.where(hidden, model.config.vocab_size, sequence))  # (16, T, V)
            logits = logits[torch.arange(len(part)), part]                          # (16, V)
            found.append(measure(logits, sequence[part]))
    return torch.cat(found, dim=1).view(2, *positions.shape)


# objective -> (name of the reading, function)
READ = {"ar": ("ar", read_ar), "mdm": ("left", read_left)}


# -----------------------------------------------------------------------------------------------
# How well they detect.

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

    reading (2, N, P): scores and surprisals. starts, inside: (N, P) bool. resamples (R, N): the
    sequences in each sample of the bootstrap. -> (3, 1 + R): of all sequences, then of the samples.
    """
    scores, surprisal = reading
    found = []
    for rows in (np.arange(len(scores)), *resamples):
        own, truth, chosen = scores[rows], starts[rows], inside[rows]
        found.append((surprisal[rows].mean(), auroc(own.ravel(), truth.ravel()),
                      auroc(own[chosen], truth[chosen])))
    return np.array(found).T


def at_equal_bpb(curve, bpb):
    """Return the AUROC of a curve of models at these BPB, linear between two models.

    curve (K, 2, S): the BPB and AUROC of K models in S samples. bpb (S,) -> (S,), nan where no two
    models have the BPB between them.
    """
    found = []
    for s, wanted in enumerate(bpb):
        x, y = curve[curve[:, 0, s].argsort(), :, s].T
        found.append(np.interp(wanted, x, y, left=math.nan, right=math.nan))
    return np.array(found)


def with_interval(values):
    """Return values[0], and the 90% interval of the others: [value, low, high].

    A sample without a value counts for nothing. nan if values[0] is nan.
    """
    if np.isnan(values[0]):
        return 3 * [math.nan]
    return [values[0], *np.nanquantile(values[1:], (0.05, 0.95))]


# -----------------------------------------------------------------------------------------------
# The study.

def best_runs(folders, budgets, tokenizer="byte", objectives=tuple(READ)):
    """Return (result, folder) of the best finished run of each objective and budget, in order.

    Raise InputError if one of the objectives has none, or if they are of different text or context.
    """
    best = {}
    for folder in folders:
        result = run.read(folder / "result.json")
        if result is None or not (folder / "checkpoint.pt").exists():
            continue
        result = run.PLAIN | result
        kind = result["tokenizer"] == tokenizer and result["objective"] in objectives
        wanted = kind and not unusual(result)
        if wanted and (not budgets or result["flops_budget"] in budgets):
            key = result["objective"], result["flops_budget"]
            if key not in best or result["val_bpb"] < best[key][0]["val_bpb"]:
                best[key] = result, folder
    for objective in objectives:
        if objective not in {key[0] for key in best}:
            raise InputError(f"there is no finished {tokenizer} run of {objective} with a "
                             "checkpoint and plain flags: train some (python scaling.py), or name "
                             "their folders with --runs")
    check_one_text(best.values())
    return [best[key] for key in sorted(best)]


def check_one_text(runs):
    """Raise InputError if runs, pairs (result, _), are of different text or context."""
    if len({(result["corpus"]["sha256"], result["context_bytes"]) for result, _ in runs}) > 1:
        raise InputError("the runs are of different text or context: name those of one with --runs")


def find_runs(args, tokenizer="byte", objectives=tuple(READ)):
    """Return the best runs of the folders in --runs, by default of runs/gap."""
    folders = args.runs or sorted(Path("runs/gap").glob("*"))
    return best_runs(folders, args.budgets, tokenizer, objectives)


def load_corpus(args, runs):
    """Return the byte corpus of runs. Raise InputError if they were trained on another text."""
    args.data = args.data or "pysrc"
    byte = data.load(args.data)
    for result, folder in runs:
        if result["corpus"]["sha256"] != byte.meta["sha256"]:
            raise InputError(f"{folder} was trained on another text ({result['corpus']['name']}) "
                             f"than --data {args.data}")
    return byte


def read_all(runs, text, sequences, positions, device):
    """Yield (reading, level, width, seed, values (2, N, P)) of the runs and of what needs none.

    runs: as best_runs returns them. text: what the n-gram models count. values: the scores and the
    surprisals, nan for a detector that predicts nothing.
    """
    targets = np.take_along_axis(sequences, positions, 1)
    before = np.take_along_axis(sequences, positions - 1, 1)
    for name, byte in (("behind", before), ("space", targets)):
        score = (byte == ord(" ")).astype(float)
        yield name, 0, 0, 0, np.stack([score, np.full(score.shape, math.nan)])
    for order, p in enumerate(counting.ngrams(text, sequences, positions, ORDERS), 1):
        values = measure(torch.from_numpy(p).log(), torch.from_numpy(targets))
        yield "ngram", order, 0, 0, values.numpy()
    ids, at = torch.from_numpy(sequences).to(device), torch.from_numpy(positions).to(device)
    for result, folder in runs:
        model, _, _ = run.load_model(folder, device)
        reading, read = READ[result["objective"]]
        yield (reading, result["flops_budget"], result["width"], result["seed"],
               read(model, ids, at).cpu().numpy())
        print(f"read {folder}", flush=True)


def compare(readings, starts, inside, vocab_size):
    """Return the rows of segmentation.csv.

    readings: as read_all yields them. starts, inside: (N, P) bool.
    """
    # The same samples for all, so that differences are paired.
    resamples = np.random.default_rng(1).integers(len(starts), size=(RESAMPLES, len(starts)))
    judged = [(about, judge(values, starts, inside, resamples)) for *about, values in readings]
    ar = np.stack([found for about, found in judged if about[0] == "ar"])           # (K, 3, 1 + R)
    rows = []
    for about, found in judged:
        bpb, *areas = found
        more = [np.full(bpb.shape, math.nan)] * 2
        if about[0] != "ar":
            more = [at_equal_bpb(ar[:, [0, k]], bpb) - found[k] for k in (1, 2)]
        measured = [value for values in (bpb, *areas, *more) for value in with_interval(values)]
        rows.append([*about, vocab_size, *measured])
    return rows


def read_line(runs, sequences, starts, vocab_size, device):
    """Return the rows of entropy.csv: a line of text read by the runs of the largest budgets.

    sequences, starts (bool): (N, T). [] without a line of 20 to 79 printable bytes.
    """
    texts = [sequence.astype(np.uint8).tobytes() for sequence in sequences]
    # Not early in a sequence, where the models know little of the text.
    pattern, first = re.compile(rb"\n([ -~]{20,79})(?=\n)"), sequences.shape[1] // 4 + 1
    found = [(n, *match.span(1)) for n, text in enumerate(texts)
             if (match := pattern.search(text, first))]
    if not found:
        return []
    n, begin, end = found[0]
    ids = torch.from_numpy(sequences[n:n + 1]).to(device)                           # (1, T)
    positions = torch.arange(begin, end, device=device)[None]                       # (1, P)
    # The runs are in order of budget: the last one of each objective stays.
    folders = {result["objective"]: folder for result, folder in runs}
    curves = []
    for objective, (_, read) in READ.items():
        model, _, _ = run.load_model(folders[objective], device)
        curves.append(read(model, ids, positions)[0, 0].tolist())
    return [[byte, int(start), vocab_size, ar, mdm] for byte, start, ar, mdm in
            zip(sequences[n, begin:end].tolist(), starts[n, begin:end], *curves, strict=True)]


def make_tables(args, areas, line):
    """Read finished runs, and write the two tables."""
    runs = find_runs(args)
    byte, T, device = load_corpus(args, runs), runs[0][0]["context_tokens"], run.pick_device()
    bpe = data.load(args.data, "bpe", args.vocab)
    sequences = data.Sequences(byte.val, T).spaced(SEQUENCES)                       # (N, T)
    starts = token_starts(bpe.tokenizer, bpe.val)
    starts = data.Sequences(starts, T).spaced(SEQUENCES) == 1                       # (N, T)
    # The same positions for all. Not the first ones, which lack the context of the n-gram models.
    free = np.random.default_rng(0).random((len(sequences), T - ORDERS)).argsort(axis=1)
    positions = ORDERS + free[:, :POSITIONS]                                        # (N, P)

    args.out.mkdir(parents=True, exist_ok=True)
    readings = read_all(runs, byte.train[:COUNTED], sequences, positions, device)
    run.write_csv(areas, AREA_COLUMNS,
                  compare(readings, np.take_along_axis(starts, positions, 1),
                          within_identifiers(sequences, positions), args.vocab))
    run.write_csv(line, ENTROPY_COLUMNS,
                  read_line(runs, sequences, starts, args.vocab, device))


def study(args):
    """Run the study: read finished runs, print the table, draw it and a line of text."""
    areas, line = args.out / "segmentation.csv", args.out / "entropy.csv"
    if not args.plot_only:
        make_tables(args, areas, line)
    rows, line = read_table(areas, AREA_COLUMNS), read_table(line, ENTROPY_COLUMNS)
    show_areas(rows)
    scaling.draw(areas.with_suffix(".png"), (1, 2), (9, 4.5),
                 lambda axes: paint_areas(axes[0], rows), share=False, log=False)
    print(f"\nfigure: {areas.with_suffix('.png')}")
    if line:
        draw_line(args.out / "entropy.png", line)
        print(f"figure: {args.out / 'entropy.png'}")
    else:
        print("no line of 20 to 79 printable bytes in the sequences: no entropy.png")


def read_table(path, columns):
    """Return the rows of a table of a study. Raise InputError if it is missing or bad."""
    if not path.exists():
        raise InputError(f"there is no {path}: run the study without --plot-only")
    try:
        with open(path, newline="") as file:
            return [{key: kind(line[key]) for key, kind in columns.items()}
                    for line in csv.DictReader(file)]
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise InputError(f"{path} is corrupt ({type(error).__name__}: {error})") from None


def spread(row, name, sign=""):
    """Return a number of a row with its 90% interval, as text: "0.66 [0.64, 0.69]"."""
    value, low, high = (f"{row[name + end]:{sign}.3f}" for end in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]"


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
    for reading, title in READINGS.items():
        own = [row for row in rows if row["reading"] == reading]
        for row in sorted(own, key=lambda row: row["level"]):
            known = not math.isnan(row["bpb"])
            lines.append([title, exact(row["level"]) if known else "",
                          spread(row, "bpb") if known else "", spread(row, "auroc"),
                          spread(row, "inside"), ahead(row, "ahead", worst),
                          ahead(row, "ahead_inside", worst)])
    sizes = ", ".join(sorted({f"{row['vocab_size']:,}" for row in rows}))
    scaling.print_table("AUROC of the entropy of the next byte, for token starts of a BPE of "
                        f"{sizes} [90% of bootstrap samples of the sequences]",
                        ["reading", "FLOPs, or order", "bits per byte", "AUROC",
                         "within identifiers", "AR less it at equal bits per byte",
                         "the same within identifiers"], lines)


def paint_areas(axes, rows):
    """Draw AUROC against BPB: all positions, and those within identifiers."""
    styles = {"ar": ("o-", COLORS["ar", "byte"]), "left": ("s-", COLORS["mdm", "byte"]),
              "ngram": ("^--", "0.4")}
    for ax, name, title in zip(axes, ("auroc", "inside"), ("all positions", "within identifiers"),
                               strict=True):
        for reading, (style, color) in styles.items():
            own = [row for row in rows if row["reading"] == reading]
            own.sort(key=lambda row: row["level"])
            bpb, area, low, high = np.array([[row["bpb"], row[name], row[f"{name}_low"],
                                              row[f"{name}_high"]] for row in own]).T
            ax.errorbar(bpb, area, (area - low, high - area), fmt=style, color=color, capsize=3,
                        label=READINGS[reading])
        ax.set(title=title, xlabel="bits per byte, from left to right", ylabel="AUROC; bars: 90%")


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
