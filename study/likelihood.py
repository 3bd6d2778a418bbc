"""Three checks with trained models: the order in which MDM reads, repeated text, and few steps.

    python fragility.py order                   # reads the runs in runs/gap
    python fragility.py repetition
    python fragility.py steps --runs JUDGE MDM...

order: the likelihood that MDM gives to a sequence from left to right is exact: a sum over T reads,
in each of which a byte and all behind it are masked. Its bound is the mean over all orders. If left
to right were much better, the order of reading would explain why AR has fewer bits per byte.

repetition: the bits per byte of validation sequences without a long match in the training text,
beside all. BPE reads more text than bytes at equal FLOPs, so it may profit more from repetition.

steps: MDM writes sequences in fewer steps than there are tokens. What is written in one step is
drawn independently, but for the bytes of a patch. The best AR run judges the text by its bits per
byte. It also writes itself. Bits far below those of real text mean repetition: so does low entropy.
"""
import math
import time

import numpy as np
import torch

import data
import run
import sample
import scaling
import segmentation
import sweep
from run import InputError
from sweep import exact
from train_ar import VAL_BYTES

ORDER_SEQUENCES = 16                  # that MDM reads at all positions
ORDER_MASKS = 128                     # for the bound of each of these
LENGTHS = (32, 64)                    # bytes of a match, powers of two
MASKS = 2                             # for the bound of each sequence, to judge repetition
BLOCK = 2**24                         # bytes of training text whose hashes are in memory
RESAMPLES = 1000                      # of the bootstrap over sequences
WRITTEN = 8                           # sequences that are written at once
ROUNDS = 8                            # of writing, each by all models in all numbers of steps
ORDER_COLUMNS = {"flops_budget": float, "width": int, "sequences": int, "left": float,
                 "bound": float, "bound_less_left": float, "stderr": float}
# length: of the match that the sequences do not have, 0 for all of them. bytes_per_token: of BPE.
# gap: of bytes less BPE. change: of the gap, from all sequences to these.
MEASURES = ("byte", "bpe", "gap", "change")
REPETITION_COLUMNS = {
    "objective": str, "flops_budget": float, "byte_width": int, "bpe_width": int, "length": int,
    "byte_sequences": int, "bpe_sequences": int, "bytes_per_token": float} | {
    name + end: float for name in MEASURES for end in ("", "_low", "_high")}
# entropy: of the single bytes that were written. judge: the bits per byte of validation text.
STEPS_COLUMNS = {"objective": str, "flops_budget": float, "width": int, "flags": str, "steps": int,
                 "sequences": int, "bpb": float, "stderr": float, "entropy": float,
                 "bytes_per_second": float, "judge_flops": float, "judge": float}


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
    if not args.plot_only:
        runs = segmentation.find_runs(args, objectives=("mdm",))
        byte, T = segmentation.load_corpus(args, runs), runs[0][0]["context_tokens"]
        sequences = data.Sequences(byte.val, T).spaced(ORDER_SEQUENCES)                 # (N, T)
        rows = []
        for result, folder in runs:
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

    val, train: (n,) of uint8 -> (n - length + 1,) bool. A false match has a chance of about 2^-38.
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
    # Too near the end of the text for a string of this length.
    begin = begin.clip(max=len(matches))
    last = np.maximum(begin, end - length + 1)
    return before[last] == before[begin]


def read_bits(corpus, result, folder, device):
    """Return a run's bits for validation sequences, and where these begin and end: three (N,)."""
    model, _, _ = run.load_model(folder, device)
    T, count = result["context_tokens"], VAL_BYTES // result["context_bytes"]
    # Where in the stream of tokens the sequences lie.
    at = data.Sequences(np.arange(len(corpus.val)), T).spaced(count)                    # (N, T)
    ids = torch.from_numpy(corpus.val[at].astype(np.int64)).to(device)
    bits = sample.token_bits(model, ids.flatten(), MASKS).view(ids.shape).sum(dim=1)    # (N,)
    edges = np.append(0, corpus.tokenizer.bytes_per_id[corpus.val].cumsum())
    return bits.cpu().double().numpy(), edges[at[:, 0]], edges[at[:, -1] + 1]


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
        values, counts, spelled = [], [], []
        for bits, begin, end in read:
            chosen = np.ones(len(bits), dtype=bool)
            if length > 0:
                chosen = without_match(begin, end, matches[length], length)
            values.append(bits_per_byte(bits, end - begin, chosen, resamples))
            counts.append(int(chosen.sum()))
            spelled.append((end - begin)[chosen].sum())
        bytes_per_token = spelled[1] / max(1, counts[1] * pair[1][0]["context_tokens"])
        gap = values[0] - values[1]
        if length == 0:
            gap_of_all = gap
        measured = []
        for value in (*values, gap, gap - gap_of_all):
            measured += segmentation.with_interval(value)
        rows.append([*about, length, *counts, bytes_per_token, *measured])
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
    if not args.plot_only:
        byte_runs = segmentation.find_runs(args)
        bpe_runs = segmentation.find_runs(args, "bpe")
        byte = segmentation.load_corpus(args, byte_runs + bpe_runs)
        matches = {length: repeated(byte.val, byte.train, length) for length in LENGTHS}
        rows = []
        for objective, pair in largest_pairs(byte_runs, bpe_runs).items():
            bpe = data.load(args.data, "bpe", pair[1][0]["vocab_size"])
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


# -----------------------------------------------------------------------------------------------
# Few steps.

def write(model, steps, generator):
    """Return sequences (WRITTEN, T): MDM writes them in so many steps, AR from left to right."""
    T, device = model.config.context, generator.device
    if model.config.causal:
        nothing = torch.zeros(WRITTEN, 0, dtype=torch.long, device=device)
        return torch.stack(list(sample.generate(model, nothing, T, generator=generator)), dim=1)
    masked = torch.ones(T, dtype=torch.bool, device=device)
    ids = torch.zeros(WRITTEN, T, dtype=torch.long, device=device)
    *_, ids = sample.fill(model, ids, masked, steps, generator=generator)
    return ids


def numbers_of_steps(model):
    """Return the numbers of steps in which a model writes: powers of 2, up to one a patch."""
    patches = model.config.context // model.config.patch
    if model.config.causal:
        return [patches]
    return sorted({2**i for i in range(patches.bit_length())} | {patches})


def entropy(ids):
    """Return the entropy in bits of the single bytes of texts ids, of any shape."""
    p = torch.bincount(ids.flatten().cpu()).double() / ids.numel()
    return -(p * p.log2()).nansum().item()


def steps_rows(writers, judge, device):
    """Return the rows of steps.csv, without its columns of the judge.

    writers: (result, model) of each run. judge: the model that gives the bits of what they write.
    """
    tasks = [(result, model, steps) for result, model in writers
             for steps in numbers_of_steps(model)]
    texts, seconds = [[] for _ in tasks], [[] for _ in tasks]
    # All take turns, so that a busy machine slows all alike.
    for i in range(ROUNDS):
        for k, (_, model, steps) in enumerate(tasks):
            generator = torch.Generator(device).manual_seed(i)
            start = time.perf_counter()
            # On the CPU, so that the device has done it when the clock is read.
            texts[k].append(write(model, steps, generator).cpu())
            seconds[k].append(time.perf_counter() - start)
    rows = []
    for (result, _, steps), own, times in zip(tasks, texts, seconds, strict=True):
        ids = torch.cat(own)                                                        # (N, T)
        N, T = ids.shape
        bits = sample.token_bits(judge, ids.flatten().to(device)).view(N, T).mean(dim=1).cpu()
        flags = ", ".join(f"{key} {value}" for key, value in sweep.unusual(result).items())
        rows.append([result["objective"], result["flops_budget"], result["width"], flags, steps, N,
                     bits.mean().item(), bits.std().item() / N**0.5, entropy(ids),
                     WRITTEN * T / np.median(times)])
    return rows


def study_steps(args):
    """Run the study of steps: the runs in --runs write, the best AR run judges; print the table."""
    path = args.out / "steps.csv"
    if not args.plot_only:
        runs = []
        for folder in args.runs or ():
            model, settings, _ = run.load_model(folder, run.pick_device())
            result = run.read(folder / "result.json")
            ordered = settings["shuffle"] == 1 and settings["phase"] == 0
            if not (result and settings["tokenizer"] == "byte" and ordered):
                raise InputError(f"{folder} is not a finished run on bytes in plain order")
            runs.append((settings | result, model))
        judges = [one for one in runs if one[0]["objective"] == "ar"]
        if not judges or len(judges) == len(runs):
            raise InputError("--runs: name finished runs on bytes, an AR run (the judge) and MDM "
                             "runs")
        segmentation.check_one_text(runs)
        result, judge = min(judges, key=lambda one: one[0]["val_bpb"])
        rows = steps_rows(runs, judge, run.pick_device())
        args.out.mkdir(parents=True, exist_ok=True)
        run.write_csv(path, STEPS_COLUMNS, [[*row, result["flops_budget"], result["val_bpb"]]
                                            for row in rows])
    show_steps(segmentation.read_table(path, STEPS_COLUMNS), args.out / "steps.png")


def name_of(row):
    """Return the name of the model in a row of steps.csv."""
    flags = f", {row['flags']}" if row["flags"] else ""
    return f"{row['objective'].upper()}, {exact(row['flops_budget'])}{flags}"


def show_steps(rows, path):
    """Print the table of steps and draw its figure into path."""
    lines = [[name_of(row), str(row["steps"]), f"{row['bpb']:.2f} +- {row['stderr']:.2f}",
              f"{row['entropy']:.2f}", f"{row['bytes_per_second']:,.0f}"] for row in rows]
    judge = rows[0]["judge"]
    scaling.print_table(f"{rows[0]['sequences']} sequences written in so many steps, judged by AR "
                        f"at {exact(rows[0]['judge_flops'])} FLOPs, which gives validation text "
                        f"{judge:.2f} (+-: standard error)",
                        ["model", "steps", "bits per byte", "entropy of single bytes",
                         "bytes per second"], lines)

    def paint(axes):
        for ax, key in zip(axes[0], ("steps", "bytes_per_second"), strict=True):
            for name in dict.fromkeys(map(name_of, rows)):
                x, y, bar = np.array([[row[key], row["bpb"], scaling.INTERVAL * row["stderr"]]
                                      for row in rows if name_of(row) == name]).T
                ax.errorbar(x, y, bar, fmt="o-", capsize=3, label=name)
            ax.axhline(judge, color="0.5", linestyle="--", label="validation text")
            ax.set(xlabel=key.replace("_", " "), ylabel="bits per byte, by the judge")
        axes[0, 1].sharey(axes[0, 0])
    scaling.draw(path, (1, 2), (10, 4.5), paint, share=False, legend_columns=3)
    print(f"\nfigure: {path}")
