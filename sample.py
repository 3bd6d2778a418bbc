"""What a trained model writes, fills in, and is surprised by.

    python sample.py                                        # the newest finished run under runs/ writes
    python sample.py RUN_DIR --prompt "def add(a, b):" --samples 3 --temperature 0.8 --top-p 0.95
    python sample.py RUN_DIR --steps 64 --watch             # MDM: 64 steps from all MASK to text, in place
    python sample.py RUN_DIR --infill "def add(a, b):\\n    return ________"      # what AR cannot do
    python sample.py RUN_DIR --inspect FILE                 # bits per byte of any text, and where they are
    python sample.py --bench                                # speed, and quality against the number of steps

In --prompt and --infill, \\n is a line end and \\t a tab.
"""
import argparse
import codecs
import itertools
import json
import math
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import run
from bpe import Tokenizer
from model import Cache, Config, Transformer, load_model, pick_device
from surprise import inspect, printable, token_bits

GAP = re.compile(r"_{3,}")                   # in --infill: a gap of as many tokens
WATCH_SECONDS = 5                            # that --watch takes at least


# ---------------------------------------------------------------------------------------------------------------------
# Samplers. Logits and ids are on the model's device, as is the generator.

def pick(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Sample ids from logits (..., V): the most likely at temperature 0; of the top_k most likely (0: all); of the fewest that
    have the probability top_p. -> (...)"""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
    if top_p < 1:
        sorted_logits, order = logits.sort(dim=-1, descending=True)
        probs = sorted_logits.softmax(dim=-1)
        out = (probs.cumsum(dim=-1) - probs >= top_p).gather(-1, order.argsort(dim=-1))             # the most likely one always stays
        logits = logits.masked_fill(out, -math.inf)
    return torch.multinomial(logits.softmax(dim=-1).flatten(0, -2), 1, generator=generator).view(logits.shape[:-1])


@torch.inference_mode()
def generate(model, ids, length, cached=True, **how):
    """AR: yields the next id of each row of ids (B, n), n >= 0, length times: (B,). The model reads START and the text from its
    window's start; when the window is full, its second half is read again and becomes the first. cached: keep keys and values."""
    T, start = model.config.context, ids.new_full((len(ids), 1), model.config.vocab_size)
    text, past = ids, None
    for _ in range(length):
        if text.size(1) >= T:
            text, past = text[:, text.size(1) - T // 2:], None
        if past is None or not cached:
            past = Cache(model, len(ids)) if cached else None
            logits = model(torch.cat([start, text], dim=1), past)[:, -1]
        else:
            logits = model(text[:, -1:], past)[:, -1]
        text = torch.cat([text, pick(logits, **how)[:, None]], dim=1)
        yield text[:, -1]


@torch.no_grad()
def fill(model, ids, masked, steps, order="random", order_temperature=0.0, generator=None, **how):
    """MDM: fill the places masked (T,) of windows ids (B, T) in steps, the others held fixed: yields ids after every step.

    Each step fills its share of what is left, all at once and independently of each other: with as many steps as places the
    sample is exact for the order. order "random": ancestral sampling, places in uniform random order. "confident": first
    those whose sampled token is most likely, in nats, plus Gumbel noise times order_temperature.
    """
    spare = model.config.vocab_size
    ids = torch.where(masked, spare, ids)
    rank = torch.rand(ids.shape, generator=generator, device=ids.device)                            # the greatest are next
    total = int(masked.sum())
    steps = max(1, min(steps, total))
    for step in range(steps if total else 0):
        count = total * (step + 1) // steps - total * step // steps
        logits = model(ids)                                               # (B, T, V)
        places = (masked & (ids == spare)).nonzero()[:, 1].view(len(ids), -1)                       # (B, M): as many in every row
        if order == "confident":
            logits = logits.gather(1, places[..., None].expand(-1, -1, logits.size(-1)))            # (B, M, V)
            chosen = pick(logits, generator=generator, **how)
            sure = logits.gather(-1, chosen[..., None])[..., 0] - logits.logsumexp(dim=-1)
            noise = -torch.empty_like(sure).exponential_(generator=generator).log()                 # Gumbel
            next_ones = (sure + order_temperature * noise).topk(count, dim=1).indices               # (B, count)
            places, chosen = places.gather(1, next_ones), chosen.gather(1, next_ones)
        else:
            places = places.gather(1, rank.gather(1, places).topk(count, dim=1).indices)            # (B, count)
            chosen = pick(logits.gather(1, places[..., None].expand(-1, -1, logits.size(-1))), generator=generator, **how)
        ids = ids.scatter(1, places, chosen)
        yield ids


def diffuse(model, ids, length, steps, order="random", block=32, **how):
    """MDM: write length tokens behind each row of ids (B, n): yields the whole text so far, with MASK where it is not yet
    written, (B, n + length). What fits into one window is filled as a whole in steps; order "blocks", and any longer text, is
    written block by block from left to right, each with its share of the steps of a window, behind at least half a window."""
    T, n = model.config.context, ids.size(1)
    text = torch.cat([ids, ids.new_full((len(ids), length), model.config.vocab_size)], dim=1)
    whole = order != "blocks" and n + length <= T
    order, at = "random" if order == "blocks" else order, n
    while at < n + length:
        stop = n + length if whole else min(at + max(1, min(block, T // 2)), n + length)
        begin = max(0, min(at - T // 2, n + length - T))
        window = text[:, begin:begin + T]                     # what lies behind the block is seen as MASK
        window = F.pad(window, (0, T - window.size(1)), value=model.config.vocab_size)
        masked = torch.zeros(T, dtype=torch.bool, device=ids.device)
        masked[at - begin:stop - begin] = True
        for window in fill(model, window, masked, steps if whole else max(1, steps * (stop - at) // T), order, **how):
            text = torch.cat([text[:, :at], window[:, at - begin:stop - begin], text[:, stop:]], dim=1)
            yield text
        at = stop


# ---------------------------------------------------------------------------------------------------------------------
# Runs.

def finished(root):
    """The finished runs under root that can write, the newest first: [(result, folder)]"""
    paths = sorted(root.rglob("result.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    found = [(run.read_result(path.parent, {}), path.parent) for path in paths if path.with_name("checkpoint.pt").exists()]
    found = [(result, folder) for result, folder in found if result["shuffle"] == 1]
    if not found:
        raise run.InputError(f"there is no finished run under {root}: train one first, say python train_ar.py")
    return found


class Model:
    """A finished run, ready to write: its network, its tokenizer, its settings. Raises InputError if it is not finished."""

    def __init__(self, folder, device):
        if not folder.is_dir():
            raise run.InputError(f"there is no run folder {folder}")
        if run.read_result(folder, {}) is None:
            raise run.InputError(f"{folder} holds no finished run: its training command, given again, goes on with it")
        self.net, self.settings, self.tokenizer = load_model(folder, device)
        self.folder, self.objective, self.device = folder, self.settings["objective"], device
        if self.settings["shuffle"] > 1:
            raise run.InputError(f"{folder} was trained on shuffled text (--shuffle {self.settings['shuffle']}) and can write nothing else")
        self.title = f"{self.objective.upper()} on {self.settings['tokenizer']}"

    def encode(self, text):
        return torch.from_numpy(self.tokenizer.encode(text).astype(np.int64)).to(self.device)

    def decode(self, ids, mask="\u2591"):
        """Ids to text, MASK to a shaded box."""
        spare = self.net.config.vocab_size
        return "".join(mask * len(part) if hidden else self.tokenizer.decode(part).decode("utf-8", "replace")
                       for hidden, group in itertools.groupby(ids.tolist(), key=lambda i: i == spare) for part in [list(group)])

    def cuts(self, raw):
        """Where BPE tokens start in bytes: by this model's own BPE, or by one in the data folder that was made from the same text."""
        tokenizer = self.tokenizer
        if self.settings["tokenizer"] == "byte":
            for path in sorted(Path("data").glob("*-bpe*/meta.json"), key=lambda path: not path.parent.name.endswith("bpe4096")):
                meta = json.loads(path.read_text())
                if meta["sha256"] == self.settings["corpus"]["sha256"]:
                    tokenizer = Tokenizer.from_hex(meta["merges"])
                    break
            else:
                return np.zeros(len(raw), dtype=bool)
        return tokenizer.starts(tokenizer.encode(raw))


# ---------------------------------------------------------------------------------------------------------------------

def raw_text(text):
    """--prompt or --infill as bytes; what the shell passed that is no UTF-8 comes back as it was."""
    return text.replace("\\n", "\n").replace("\\t", "\t").encode("utf-8", "surrogateescape")


def write(model, args, how):
    """Write from a prompt, as it comes (one sample of AR), step by step (--watch), or all at the end."""
    prompt = model.encode(raw_text(args.prompt)).expand(args.samples, -1)
    T, n = model.net.config.context, prompt.size(1)
    length = args.length or (T - n if n < T else T // 2)
    if model.objective == "ar":
        decoder, rows = codecs.getincrementaldecoder("utf-8")("replace"), [prompt]
        stream = args.samples == 1
        if stream:
            print(printable(decoder.decode(model.tokenizer.decode(prompt[0].cpu().numpy()))), end="", flush=True)
        for ids in generate(model.net, prompt, length, **how):
            rows.append(ids[:, None])
            if stream:                                        # bytes that are no whole character yet wait in the decoder
                print(printable(decoder.decode(model.tokenizer.decode(ids.cpu().numpy()))), end="", flush=True)
        if stream:
            print(printable(decoder.decode(b"", final=True)))
            return
        texts = torch.cat(rows, dim=1)
    else:
        steps, texts = args.steps or T, prompt
        for texts in diffuse(model.net, prompt, length, steps, args.order, order_temperature=args.order_temperature, **how):
            watch(model, texts, args, steps)
    show(model, texts)


def show(model, texts):
    for i, text in enumerate(texts):
        if len(texts) > 1:
            print(f"--- sample {i + 1} of {len(texts)}")
        print(printable(model.decode(text)))


def watch(model, texts, args, steps):
    """Redraw the first sample in place."""
    if args.watch and sys.stdout.isatty():
        print(f"\x1b[H\x1b[2J{printable(model.decode(texts[0]))}", flush=True)
        time.sleep(WATCH_SECONDS / steps)


def infill(model, args, how):
    """Fill the gaps of a text; what is given stays."""
    if model.objective == "ar":
        raise run.InputError(f"{model.folder} is an AR model, which writes from left to right alone: --infill needs an MDM run")
    text = args.infill
    gaps = [(m.start(), m.end()) for m in GAP.finditer(text)]
    if not gaps:
        raise run.InputError("--infill has no gap: three underscores or more are one, of as many tokens (or of --gap tokens)")
    spare, parts, at = model.net.config.vocab_size, [], 0
    for start, stop in (*gaps, (len(text), len(text))):
        parts += [model.encode(raw_text(text[at:start])), torch.full(((args.gap or stop - start) if stop > start else 0,), spare, device=model.device)]
        at = stop
    ids, T = torch.cat(parts), model.net.config.context
    if len(ids) > T:
        raise run.InputError(f"--infill is {len(ids)} tokens long with its gaps, and a window holds {T}")
    masked = F.pad(ids == spare, (0, T - len(ids)))           # what lies beyond the text is masked in the window, and stays so
    window = F.pad(ids, (0, T - len(ids)), value=spare).expand(args.samples, -1)
    steps = args.steps or int(masked.sum())
    order = "random" if args.order == "blocks" else args.order
    for filled in fill(model.net, window, masked, steps, order, args.order_temperature, **how):
        watch(model, filled[:, :len(ids)], args, steps)
    show(model, filled[:, :len(ids)])


# ---------------------------------------------------------------------------------------------------------------------
# What it costs.

def timed(call):
    """-> what call returned, seconds"""
    began = time.perf_counter()
    value = call()
    return value, time.perf_counter() - began


def repeats(raw, n=12):
    """The share of strings of n bytes that occurred before in the same text."""
    seen = [raw[i:i + n] for i in range(len(raw) - n + 1)]
    return 1 - len(set(seen)) / max(1, len(seen))


def bench(root, device, samples=16, length=1024):
    """Speed of AR with and without its cache; then, of the best run of each cell, bytes a second, and bits per byte that the best AR
    byte model gives to its samples."""
    best = {}
    for result, folder in finished(root):
        cell = result["objective"], result["tokenizer"]
        if result["span"] == 1:
            best[cell] = min(best.get(cell, (result, folder)), (result, folder), key=lambda pair: pair[0]["val_bpb"])
    models = {cell: Model(folder, device) for cell, (_, folder) in sorted(best.items())}
    print(f"{device}, {torch.get_num_threads()} threads\n\n| AR sampling of {length:,} tokens | width | with the cache, tokens/s | without | ratio | "
          f"{samples} at once, tokens/s | ratio |\n|---|---|---|---|---|---|---|")
    shapes = [(model.title, model.net.config) for (objective, _), model in models.items() if objective == "ar"]
    for title, config in [*shapes, ("bytes, a larger shape", Config(width=256))]:
        net = Transformer(replace(config, context=length)).to(device)     # not trained: only its speed is asked for
        empty = torch.zeros((samples, 0), dtype=torch.long, device=device)
        list(generate(net, empty, 8))
        speeds = [rows * length / timed(lambda: sum(ids.sum().item() for ids in generate(net, empty[:rows], length, cached)))[1]
                  for rows, cached in ((1, True), (1, False), (samples, True))]
        print(f"| {title} | {net.config.width} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | {speeds[0] / speeds[1]:.1f} | {speeds[2]:,.0f} | "
              f"{speeds[2] / speeds[0]:.1f} |", flush=True)
    judge = models.get(("ar", "byte"))
    if judge is None:
        return
    print(f"\n{samples} samples of a window each, at temperature 1 but where greedy; BPB by {judge.folder}, which gives validation text "
          f"{best['ar', 'byte'][0]['val_bpb']:.3f}\n\n| model | order | steps | bytes/s | BPB by the AR model | strings of 12 bytes that repeat |\n"
          "|---|---|---|---|---|---|")
    for (objective, _), model in models.items():
        T, empty = model.net.config.context, torch.zeros((samples, 0), dtype=torch.long, device=device)
        steps = sorted({K for K in (1, 4, 16, 64, 256, T) if K <= T})
        plans = [("left to right", T, {})] if objective == "ar" else [
            *(("random", K, {}) for K in steps), *(("confident", K, {"order": "confident"}) for K in (16, T)),
            ("confident, noise 1", T, {"order": "confident", "order_temperature": 1.0}),
            ("confident, greedy", T, {"order": "confident", "temperature": 0}), ("blocks", T, {"order": "blocks"})]
        for title, K, how in plans:
            generator = torch.Generator(device).manual_seed(0)
            if objective == "ar":
                ids, seconds = timed(lambda: torch.stack(list(generate(model.net, empty, T, generator=generator)), dim=1))
            else:
                (*_, ids), seconds = timed(lambda: list(diffuse(model.net, empty, T, K, generator=generator, **how)))
            texts = [model.tokenizer.decode(row.cpu().numpy()) for row in ids]
            bits = sum(token_bits(judge.net, "ar", judge.encode(text)).sum().item() for text in texts)
            count = sum(map(len, texts))
            print(f"| {model.title} | {title} | {K} | {count / seconds:,.0f} | {bits / count:.3f} | {np.mean(list(map(repeats, texts))):.1%} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = run.usage_error
    parser.add_argument("run", type=Path, nargs="?", help="run folder (default: the newest finished one under runs/)")
    parser.add_argument("--prompt", default="", help="text to go on from")
    parser.add_argument("--length", type=int, help="tokens to write (default: to the end of a window)")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the most likely, always")
    parser.add_argument("--top-k", type=int, default=0, help="of the k most likely tokens (0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="of the fewest tokens with this probability (1: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="MDM: from all MASK to a window of text (default: one a token)")
    parser.add_argument("--order", choices=("random", "confident", "blocks"), default="random",
                        help="MDM: places in random order (exact), the most confident first, or blocks from left to right")
    parser.add_argument("--order-temperature", type=float, default=0.0, help="MDM, --order confident: noise on the order (0: none)")
    parser.add_argument("--infill", metavar="TEXT", help="MDM: fill the gaps of this text, each three underscores or more, one token an underscore")
    parser.add_argument("--gap", type=int, help="tokens in each gap, however many underscores")
    parser.add_argument("--watch", action="store_true", help="MDM: show the text as it resolves, in place")
    parser.add_argument("--inspect", metavar="FILE", help="bits per byte of a file (-: standard input), and where they are")
    parser.add_argument("--plot", type=Path, help="with --inspect: draw it (.png)")
    parser.add_argument("--color", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--bench", action="store_true", help="speed, and quality against steps, of the best run of each cell")
    parser.add_argument("--device", default="auto", help="cpu, cuda or mps (default: the best there is)")
    args = parser.parse_args()
    for name, least in (("length", 1), ("samples", 1), ("temperature", 0), ("top_k", 0), ("top_p", 1e-9), ("seed", 0), ("steps", 1),
                        ("order_temperature", 0), ("gap", 1)):
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf or name == "top_p" and value > 1:
            raise run.InputError(f"--{name.replace('_', '-')} is out of range: {value}")
    if args.plot and not args.inspect:
        raise run.InputError("--plot goes with --inspect")
    device = pick_device(args.device)
    if args.bench:
        return bench(args.run or Path("runs"), device)
    model = Model(args.run or finished(Path("runs"))[0][1], device)
    how = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "generator": torch.Generator(device).manual_seed(args.seed)}
    if args.inspect:
        inspect(model, args)
    elif args.infill is not None:
        infill(model, args, how)
    else:
        write(model, args, how)


if __name__ == "__main__":
    run.run_script(main)
