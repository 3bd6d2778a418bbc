"""Emergent segmentation: is a byte model surprised where BPE puts its cuts?

    python scaling.py --study segmentation              # the best finished byte run of every budget under runs/gap
    python scaling.py --study segmentation --runs DIR...

A model that has found words for itself is sure inside them and unsure where the next one starts. We ask how well the entropy
of its prediction of a byte tells whether a BPE token starts with that byte: the area under the ROC curve (AUROC), 0.5 for chance.
AR predicts a byte from all before it. MDM is read twice: from left to right (all from that byte on is masked, so that it sees
what AR sees), and with a random half of the window masked, as it is trained.
"""
import csv
import math

import numpy as np
import torch

import data
import run
from figures import COLOR, draw, power
from model import load_model
from train_ar import corrupt

VOCABS = (512, 4096, 32768)
WINDOWS, PLACES = 64, 64                     # windows of validation text, and places read in each
RESAMPLES = 400                              # of the bootstrap over windows
COLUMNS = {"reading": str, "vocab_size": int, "flops_budget": float, "width": int, "seed": int, "val_bpb": float, "auroc": float,
           "low": float, "high": float}
READINGS = {"ar": "AR", "left": "MDM, from left to right", "half": "MDM, half the window masked", "ar - left": "AR less MDM from left to right",
            "bigram": "entropy of a bigram model", "space": "a run of spaces starts"}


def auroc(scores, positive):
    """P(the score of a positive is above that of a negative), ties counted by half (Mann and Whitney). (n,), (n,) bool -> float;
    nan if all are of one kind."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[place]                   # from 1, the mean of those that are equal
    n, m = positive.sum(), (~positive).sum()
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m)) if n and m else math.nan


def token_starts(corpus):
    """Where in the bytes of the validation text the tokens of a BPE corpus start: (bytes,) bool"""
    return corpus.tokenizer.starts(corpus.val)


def bits(logits):
    """The entropy of each prediction: (..., V) -> (...)"""
    logs = logits.float().log_softmax(dim=-1)
    return -(logs.exp() * logs).sum(dim=-1) / math.log(2)


# ---------------------------------------------------------------------------------------------------------------------
# Readings: model, windows (N, T), places (N, P) -> entropies (N, P), in bits

@torch.no_grad()
def read_ar(model, ids, places):
    """Given all before the place."""
    inputs, _ = corrupt(ids, model.config.vocab_size)
    return torch.cat([bits(model(part)) for part in inputs.split(16)]).gather(1, places)


@torch.no_grad()
def read_left(model, ids, places):
    """Given all before the place, by an MDM: the place and all after it are masked."""
    at = torch.arange(ids.size(1))
    return torch.stack([torch.cat([bits(model(torch.where(at >= place[:, None], model.config.vocab_size, window))[range(len(place)), place])
                                   for place in chosen.split(16)]) for window, chosen in zip(ids, places)])


@torch.no_grad()
def read_half(model, ids, places):
    """Given a random half of the window, by an MDM: half of the places are masked, and half of all else. nan where a place is in sight."""
    generator = torch.Generator().manual_seed(0)
    masked = torch.rand(ids.shape, generator=generator).argsort(dim=1) < ids.size(1) // 2
    inputs = torch.where(masked, model.config.vocab_size, ids)
    entropy = torch.cat([bits(model(part)) for part in inputs.split(16)])
    return torch.where(masked, entropy, math.nan).gather(1, places)


def bigram(train, windows, places):
    """The entropy of the next byte given the one before, as counted in the training text. Baseline. -> (N, P)"""
    train = train[:2**25]
    pairs = np.bincount(train[:-1].astype(np.int32) * 256 + train[1:], minlength=65536).reshape(256, 256)
    share = pairs / np.maximum(pairs.sum(axis=1, keepdims=True), 1)
    entropy = -(share * np.log2(np.where(share > 0, share, 1))).sum(axis=1)
    return np.take_along_axis(entropy[np.roll(windows, 1, axis=1)], places, 1)


def space(windows, places):
    """Whether the byte is a space (blank, tab, line end) and the one before is not. Baseline. -> (N, P)"""
    blank = np.isin(windows, list(b" \t\r\n"))
    return np.take_along_axis((blank & ~np.roll(blank, 1, axis=1)).astype(float), places, 1)


# ---------------------------------------------------------------------------------------------------------------------

def best_runs(folders):
    """The best finished byte run of each objective and budget: -> [(result, folder)]. Raises InputError if there is none."""
    best = {}
    for folder in folders:
        result = run.read_result(folder, {})
        if result and result["tokenizer"] == "byte" and result["span"] == result["shuffle"] == 1 and (folder / "checkpoint.pt").exists():
            key = result["objective"], result["flops_budget"]
            best[key] = min(best.get(key, (result, folder)), (result, folder), key=lambda pair: pair[0]["val_bpb"])
    if not best:
        raise run.InputError("no finished byte run with its checkpoint: train some first (python scaling.py), or name them with --runs")
    if len(kinds := {(result["context_bytes"], result["corpus"]["sha256"]) for result, _ in best.values()}) > 1:
        raise run.InputError(f"the runs are of {len(kinds)} kinds, of different text or context: name those of one kind with --runs")
    return [best[key] for key in sorted(best)]


def study(folders, source):
    """Read the models: -> rows of segmentation.csv, rows of entropy.csv. source: --data."""
    runs = best_runs(folders)
    corpus = data.load(source)
    if runs[0][0]["corpus"]["sha256"] != corpus.meta["sha256"]:
        raise run.InputError(f"{runs[0][1]} was trained on other text than this {corpus.name}")
    labels = {}
    for vocab in VOCABS:
        try:
            labels[vocab] = token_starts(data.load(source, "bpe", vocab))
        except run.InputError as error:                       # a small text has no large vocabulary
            print(f"left out: {error}")
    if not labels:
        raise run.InputError(f"{corpus.name} is too small for a BPE of {VOCABS[0]}")
    T = runs[0][0]["context_tokens"]
    windows = data.Windows(corpus.val, T).spaced(WINDOWS)
    starts = {vocab: data.Windows(label, T).spaced(WINDOWS) for vocab, label in labels.items()}
    rng = np.random.default_rng(0)
    places = 1 + np.argsort(rng.random((len(windows), T - 1)), axis=1)[:, :PLACES]                  # not the first: nothing is before it
    draws = [np.arange(len(windows)), *rng.integers(len(windows), size=(RESAMPLES, len(windows)))]

    def area(scores, vocab):
        """AUROC of scores (N, P), and of bootstrap samples of the windows: -> (1 + RESAMPLES,)"""
        truth, known = np.take_along_axis(starts[vocab], places, 1) > 0, ~np.isnan(scores)
        return np.array([auroc(scores[rows][known[rows]], truth[rows][known[rows]]) for rows in draws])

    def row(reading, vocab, values, result):
        low, high = np.nanquantile(values[1:], (0.05, 0.95))
        return {"reading": reading, "vocab_size": vocab, "auroc": values[0], "low": low, "high": high} | {
            key: result.get(key, 0) for key in ("flops_budget", "width", "seed", "val_bpb")}

    rows, areas, models = [], {}, {}
    scored = [("bigram", bigram(corpus.train, windows, places), {}), ("space", space(windows, places), {})]
    ids, at = torch.from_numpy(windows), torch.from_numpy(places)
    for result, folder in runs:
        model, _, _ = load_model(folder)
        models[result["objective"]] = model                   # the last one stays: that of the largest budget
        for reading, read in ({"ar": read_ar} if result["objective"] == "ar" else {"left": read_left, "half": read_half}).items():
            scored.append((reading, read(model, ids, at).numpy(), result))
        print(f"read {folder}", flush=True)
    for reading, scores, result in scored:
        for vocab in labels:
            areas[reading, vocab, result.get("flops_budget")] = values = area(scores, vocab)
            rows.append(row(reading, vocab, values, result))
            if reading == "left" and ("ar", vocab, result["flops_budget"]) in areas:                # in pairs: on the same windows
                rows.append(row("ar - left", vocab, areas["ar", vocab, result["flops_budget"]] - values, result))
    middle = sorted(labels)[len(labels) // 2]
    return rows, picture(models, ids, starts[middle], middle)


def picture(models, ids, starts, vocab):
    """A line of text of some twenty to eighty bytes, not early in a window, read by the models of the largest budgets: -> rows of entropy.csv,
    [] if there is no such line."""
    for i, window in enumerate(ids):
        ends = np.flatnonzero(window.numpy() == 10)
        for a, b in zip(ends, ends[1:]):
            if a > len(window) / 4 and 20 < b - a < 80 and window[a + 1:b].lt(127).all():
                places = torch.arange(a + 1, b)[None]
                curves = {name: read_ar(model, ids[i:i + 1], places) if name == "ar" else read_left(model, ids[i:i + 1], places)
                          for name, model in models.items()}
                return [{"byte": int(window[place]), "start": int(starts[i, place]), "vocab_size": vocab}
                        | {name: float(curve[0, n]) for name, curve in curves.items()} for n, place in enumerate(range(a + 1, b))]
    return []


def show(out):
    """Tables and figures from segmentation.csv and entropy.csv in the folder out."""
    path = out / "segmentation.csv"
    try:
        with open(path, newline="") as file:
            rows = [{key: kind(row[key]) for key, kind in COLUMNS.items()} for row in csv.DictReader(file)]
    except FileNotFoundError:
        raise run.InputError(f"there is no {path} yet") from None
    except (KeyError, ValueError, TypeError) as error:
        raise run.InputError(f"{path} is not a table of readings ({type(error).__name__}: {error})") from None
    vocabs = sorted({row["vocab_size"] for row in rows})
    print(f"\nAUROC of the entropy before a byte, for whether a BPE token starts there [90% of bootstrap samples of {WINDOWS} windows]\n"
          f"\n| reading | FLOPs | {' | '.join(f'BPE of {vocab:,}' for vocab in vocabs)} |\n|---|---|{'---|' * len(vocabs)}")
    for reading, title in READINGS.items():
        for flops in sorted({row["flops_budget"] for row in rows if row["reading"] == reading}):
            cells = {row["vocab_size"]: f"{row['auroc']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" for row in rows
                     if (row["reading"], row["flops_budget"]) == (reading, flops)}
            print(f"| {title} | {power(f'{flops:g}') if flops else ''} | {' | '.join(cells.get(vocab, '') for vocab in vocabs)} |")

    def paint(axes):
        styles = {"ar": ("o-", COLOR["ar", "byte"]), "left": ("o-", COLOR["mdm", "byte"]), "half": ("o:", COLOR["mdm", "byte"]),
                  "bigram": ("--", "black"), "space": (":", "gray")}
        for vocab, ax in zip(vocabs, axes[0]):
            for reading, (style, color) in styles.items():
                own = sorted((row["flops_budget"], row["auroc"], row["low"], row["high"]) for row in rows
                             if (row["reading"], row["vocab_size"]) == (reading, vocab))
                if own and reading in ("bigram", "space"):
                    ax.axhline(own[0][1], linestyle=style, color=color, linewidth=1, label=READINGS[reading])
                elif own:
                    flops, mean, low, high = map(np.array, zip(*own))
                    ax.errorbar(flops, mean, (np.maximum(mean - low, 0), np.maximum(high - mean, 0)), fmt=style, color=color, markersize=5,
                                capsize=2, label=READINGS[reading])
            ax.axhline(0.5, color="black", linewidth=0.5)
            ax.set(xlabel="training FLOPs", title=f"cuts of a BPE of {vocab:,}")
        axes[0, 0].set(ylabel="AUROC (0.5: chance); bars: 90%")
        axes[0, 0].legend(fontsize=7)
    draw(out / "segmentation.png", (1, len(vocabs)), (2 + 3 * len(vocabs), 4), paint)
    plot_entropy(out)
    print(f"\nfigures: segmentation.png, entropy.png in {out}")


def plot_entropy(out):
    """A line of text, the entropy of each byte as bars above it, and the cuts of the BPE below: AR over MDM."""
    with open(out / "entropy.csv", newline="") as file:
        line = list(csv.DictReader(file))
    names = [name for name in ("ar", "mdm") if line and name in line[0]]
    if not names:
        return
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 1 + 1.9 * len(names)), layout="constrained")
    top = max(float(row[name]) for row in line for name in names)
    cuts = [x - 0.5 for x, row in enumerate(line) if int(row["start"])]
    for name, ax in zip(names, figure.subplots(len(names), 1, sharex=True, squeeze=False).flat):
        ax.bar(range(len(line)), [float(row[name]) for row in line], color=COLOR[name, "byte"], width=0.8)
        ax.vlines(cuts, -0.28 * top, 0, color="black", linewidth=1)
        for x, row in enumerate(line):
            ax.text(x, -0.14 * top, chr(int(row["byte"])), ha="center", va="center", family="monospace", fontsize=9)
        ax.set(ylim=(-0.28 * top, 1.05 * top), xlim=(-0.6, len(line) - 0.4), xticks=[], ylabel="entropy, bits",
               title=f"{READINGS['ar' if name == 'ar' else 'left']}; below: the text and the cuts of a BPE of {int(line[0]['vocab_size']):,}")
        ax.set_yticks([tick for tick in ax.get_yticks() if 0 <= tick <= top])
    run.write_atomic(out / "entropy.png", lambda file: figure.savefig(file, format="png", dpi=120))
