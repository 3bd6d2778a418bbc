"""What a trained model is surprised by: the bits of each byte of any text.

    python sample.py RUN_DIR --inspect FILE                 # the text, shaded by them, and its bits per byte
    python sample.py RUN_DIR --inspect FILE --plot out.png
"""
import math
import sys
from pathlib import Path

import numpy as np
import torch

import run
import train_ar
import train_mdm
from model import nats

READS = 32                                   # random masks of each window, for the surprise of an MDM


@torch.no_grad()
def token_bits(model, objective, ids, reads=READS):
    """The bits of each token of a text ids (n,), read in windows: -> (n,). AR: exact. MDM: its part of the bound, by the mean of
    reads random masks of each window, with the number of masked tokens stratified."""
    T, parts = model.config.context, []
    for i, window in enumerate(ids.split(T)):
        if objective == "ar":
            inputs, weights = train_ar.corrupt(window[None], model.config.vocab_size)
        else:
            inputs, weights = train_mdm.corrupt(window.expand(reads, -1), model.config.vocab_size, train_mdm.noise(0, i))
        found = torch.cat([nats(model, part, window.expand(len(part), -1)) for part in inputs.split(16)])
        parts.append((weights * found).mean(dim=0) / math.log(2))
    return torch.cat(parts)


def spread(tokenizer, ids, bits):
    """Bits of tokens (n,) as bits of their bytes, in equal parts: -> (bytes,)"""
    lengths = tokenizer.bytes_per_id[ids]
    return np.repeat(bits / lengths, lengths)


def printable(text):
    """Control characters as their pictures, so that no text commands the terminal. (Line ends and tabs stay.)"""
    return "".join(chr(0x2400 + ord(c)) if c < " " and c not in "\n\t" else "\u2421" if "\x7f" <= c < "\xa0" else c for c in text)


def characters(raw):
    """The characters that bytes spell and where they are: yields (character, slice). What is no UTF-8 is one "\ufffd" a byte."""
    at = 0
    while at < len(raw):
        size = 1 if raw[at] < 0xc0 else 2 if raw[at] < 0xe0 else 3 if raw[at] < 0xf0 else 4
        try:
            character = raw[at:at + size].decode()
        except UnicodeDecodeError:
            character, size = "\ufffd", 1
        yield character, slice(at, at + size)
        at += size


def shade(raw, bits, cuts, color):
    """The text with each character on a background by the bits of its bytes (white 0 to red 8) and a bar before each BPE token."""
    out = []
    for character, at in characters(raw):
        bar = "|" if cuts[at.start] and at.start else ""
        if color and character != "\n":
            pale = round(255 * (1 - min(bits[at].mean(), 8) / 8))
            out.append(f"\x1b[90m{bar}\x1b[30;48;2;255;{pale};{pale}m{printable(character)}\x1b[0m")
        else:
            out.append(bar + printable(character))
    return "".join(out)


def plot_surprise(path, raw, bits, cuts, title, columns=100, lines=40):
    """The first lines of the text as a picture, shaded likewise."""
    from matplotlib.figure import Figure
    cells, x, y = [], 0, 0
    for character, at in characters(raw):
        if character == "\n" or x >= columns:
            x, y = 0, y + 1
        if y >= lines:
            break
        if character != "\n":
            cells.append((x, y, character, at))
            x += 1
    height = cells[-1][1] + 1 if cells else 1
    grid = np.full((height, columns), np.nan)
    figure = Figure(figsize=(11, 1.1 + 0.2 * height), layout="constrained")
    ax = figure.add_subplot(xlim=(0, columns), ylim=(height, 0), xticks=[], yticks=[], title=title)
    for x, y, character, at in cells:
        grid[y, x] = bits[at].mean()
        ax.text(x + 0.5, y + 0.55, printable(character), ha="center", va="center", family="monospace", fontsize=7)
        if cuts[at.start]:
            ax.plot([x, x], [y, y + 1], color="black", linewidth=0.6)
    image = ax.imshow(grid, extent=(0, columns, height, 0), aspect="auto", cmap="Reds", vmin=0, vmax=12)
    figure.colorbar(image, ax=ax, label="bits of a byte", shrink=min(1, 8 / height))
    run.write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=120))


def inspect(model, args):
    """Bits per byte of a text, and the text shaded by the bits of each byte."""
    raw = sys.stdin.buffer.read() if args.inspect == "-" else Path(args.inspect).read_bytes()
    if not raw:
        raise run.InputError(f"{args.inspect} is empty")
    ids = model.encode(raw)
    bits = spread(model.tokenizer, ids.cpu().numpy(), token_bits(model.net, model.objective, ids).cpu().numpy())
    cuts = model.cuts(raw)
    print(shade(raw, bits, cuts, args.color == "on" or args.color == "auto" and sys.stdout.isatty()).rstrip("\n"))
    bound = "" if model.objective == "ar" else f" (a bound, by {READS} masks of each window)"
    print(f"\n{bits.sum() / len(raw):.4f} bits per byte{bound} on {len(raw):,} bytes, by {model.title} ({model.folder})")
    if not cuts.any():
        print("no BPE of its training text is at hand: cuts are not marked (python data.py makes one)")
    if args.plot:
        plot_surprise(args.plot, raw, bits, cuts, f"{model.title}: {bits.sum() / len(raw):.3f} bits per byte; bars: BPE cuts")
