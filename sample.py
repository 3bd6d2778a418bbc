"""Write text with a trained model, fill gaps in a text, or score a text.

    python sample.py                                     # the newest finished run in runs/ writes
    python sample.py RUN_DIR --prompt "def add(a, b):" --samples 3 --temperature 0.8 --top-k 40
    python sample.py RUN_DIR --steps 64 --watch          # MDM: from all MASK to text in 64 steps
    python sample.py RUN_DIR --infill "def add(a, b):\\n    return ________"      # MDM only
    python sample.py RUN_DIR --score FILE                # bits per byte of any file

In --prompt and --infill, \\n is a line end and \\t a tab.
"""
import codecs
import math
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import run
import train_ar
import train_mdm
from data import InputError
from model import KVCache

GAP = re.compile("_{3,}")         # in --infill: a gap of as many tokens
MASK_CHARACTER = "\u2591"         # what the terminal shows for MASK
MASKS = 32                        # random masks of each sequence, to score with an MDM
BLOCK = 32                        # tokens in a block of --order blocks
WATCH_SECONDS = 5                 # of pauses in --watch, for a whole context
CLEAR = "\x1b[H\x1b[2J"           # clears the terminal
PICTURES = {i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"}       # of control characters
PICTURES |= dict.fromkeys(range(127, 160), 0x2421)


# -----------------------------------------------------------------------------------------------
# Samplers. Logits and ids are on the model's device, as is the generator.

def pick(logits, temperature=1.0, top_k=0, generator=None):
    """Return ids sampled from logits (B, ..., V): (B, ...), int64.

    Temperature 0 takes the most likely id; top_k keeps only the k most likely ids (0: all).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.size(-1):
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    probabilities = logits.softmax(dim=-1).flatten(0, -2)
    return torch.multinomial(probabilities, 1, generator=generator).view(logits.shape[:-1])


@torch.inference_mode()
def generate(model, ids, length, **options):
    """Yield the next ids of texts ids (B, n), n >= 0, from left to right: (B,), length times.

    For AR. The model reads BOS and the text. When the context is full, it reads the second half
    of it again, as if the text began there. options: those of pick.
    """
    context, P = model.config.context, model.config.patch
    bos = ids.new_full((len(ids), P), model.config.vocab_size)
    text, cache = ids, None
    for _ in range(length):
        # The tokens that its patch has already.
        place = text.size(1) % P
        if text.size(1) >= context:
            # In whole patches, and what there is of the one that is being written.
            kept = context // 2 // P * P + place
            text, cache = text[:, text.size(1) - kept:], None
        whole = text.size(1) - place
        if cache is None:
            cache = KVCache(model, len(ids))
            x = model.read(torch.cat([bos, text[:, :whole]], dim=1), cache)[:, -1:]
        elif place == 0:
            x = model.read(text[:, -P:], cache)                                     # (B, 1, D)
        logits = model.spell(x, F.pad(text[:, whole:], (0, P - place)))             # (B, P, V)
        chosen = pick(logits[:, place], **options)                                  # (B,)
        text = torch.cat([text, chosen[:, None]], dim=1)
        yield chosen


def spell_out(model, x, **options):
    """Return patches that are sampled given what the trunk knows, x (B, R, D), from left to right.

    (B, R, P), and the log-probability of each patch: (B, R). options: those of pick.
    """
    P = model.config.patch
    patches = torch.zeros(*x.shape[:2], P, dtype=torch.long, device=x.device)
    log_p = torch.zeros(x.shape[:2], device=x.device)
    for place in range(P):
        logits = model.spell(x, patches.flatten(1))                                 # (B, R P, V)
        logits = logits.view(*patches.shape, -1)[:, :, place]                       # (B, R, V)
        chosen = pick(logits, **options)                                            # (B, R)
        patches[:, :, place] = chosen
        log_p += logits.float().log_softmax(dim=-1).gather(-1, chosen[..., None])[..., 0]
    return patches, log_p


@torch.inference_mode()
def fill(model, ids, masked, steps, order="random", generator=None, **options):
    """Fill the positions masked (T,) of sequences ids (B, T); yield the ids after each step.

    For MDM. All other positions are held fixed. Each step fills an equal share of the positions,
    all at once and independently of each other. With patches, patches take the place of positions,
    and masked holds whole ones. order "random" is ancestral sampling: with one position a step it
    is exact. order "confident" first fills the positions whose sample is the most likely. options:
    temperature and top_k.
    """
    special_id, P = model.config.vocab_size, model.config.patch
    ids = torch.where(masked, special_id, ids).view(len(ids), -1, P)                # (B, R, P)
    masked = masked.view(-1, P)[:, 0]                                               # (R,)
    rank = torch.rand(ids.shape[:2], generator=generator, device=ids.device)        # (B, R)
    total = int(masked.sum())
    steps = min(steps, total)
    for step in range(steps):
        count = total * (step + 1) // steps - total * step // steps
        x = model.read(ids.flatten(1))                                              # (B, R, D)
        done = ~masked | (ids[:, :, 0] != special_id)
        if order == "random":
            positions = rank.masked_fill(done, -1).topk(count, dim=1).indices       # (B, count)
            x = x.gather(1, positions[..., None].expand(-1, -1, x.size(-1)))
            chosen, _ = spell_out(model, x, generator=generator, **options)
        else:
            chosen, log_p = spell_out(model, x, generator=generator, **options)
            positions = log_p.masked_fill(done, -math.inf).topk(count, dim=1).indices
            chosen = chosen.gather(1, positions[..., None].expand(-1, -1, P))
        ids = ids.scatter(1, positions[..., None].expand(-1, -1, P), chosen)
        yield ids.flatten(1)


def diffuse(model, ids, length, steps, order="random", block=BLOCK, **options):
    """Write length tokens behind each of the texts ids (B, n); yield (B, n + length) each step.

    For MDM. What is not yet written is MASK. A text that fits into the context is filled as a
    whole. A longer text, or any text with order "blocks", is written in blocks from left to
    right, and at least half a context before each is visible (if the text has as much). steps: of
    the text, if it is filled as a whole; else of as many blocks as fill a context.
    """
    context, special_id, P = model.config.context, model.config.vocab_size, model.config.patch
    # Whole patches.
    half = context // 2 // P * P
    block = max(P, min(block // P * P, half))
    start, end = ids.size(1), ids.size(1) + length
    text = F.pad(ids, (0, length), value=special_id)
    whole = order != "blocks" and end <= context
    while start < end:
        stop = end if whole else min(start + block, end)
        share = steps if whole else max(1, steps * (stop - start) // context)
        first = max(0, min(start - half, end - context))
        sequence = text[:, first:first + context]
        sequence = F.pad(sequence, (0, context - sequence.size(1)), value=special_id)
        masked = torch.zeros(context, dtype=torch.bool, device=ids.device)
        masked[start - first:stop - first] = True
        inner = "random" if order == "blocks" else order
        for filled in fill(model, sequence, masked, share, inner, **options):
            text = text.clone()
            text[:, start:stop] = filled[:, start - first:stop - first]
            yield text
        start = stop


# -----------------------------------------------------------------------------------------------
# Text in and out.

def encode(tokenizer, raw, device):
    """Return bytes as token ids: (n,), int64."""
    return torch.from_numpy(tokenizer.encode(raw).astype(np.int64)).to(device)


def to_bytes(text):
    r"""Return a --prompt or --infill as bytes. Bytes that are not UTF-8 come through unchanged."""
    text = text.replace("\\n", "\n").replace("\\t", "\t")
    return text.encode("utf-8", "surrogateescape")


def printable(text):
    """Return text with pictures of control characters, so that it cannot command the terminal."""
    return text.translate(PICTURES)


def to_text(tokenizer, ids):
    """Return token ids (n,) as text for the terminal, with a shaded box for MASK."""
    raw = b""
    for i in ids.tolist():
        raw += MASK_CHARACTER.encode() if i == tokenizer.vocab_size else tokenizer.tokens[i]
    return printable(raw.decode("utf-8", "replace"))


def show(tokenizer, texts):
    """Print texts (B, n) of token ids."""
    for i, text in enumerate(texts):
        if len(texts) > 1:
            print(f"--- sample {i + 1} of {len(texts)}")
        print(to_text(tokenizer, text))


# -----------------------------------------------------------------------------------------------
# Write and fill in.

def stream(tokenizer, prompt, tokens):
    """Print a prompt (n,) and each of the tokens (1,) as soon as it is there."""
    # An incomplete character waits in the decoder for its other bytes.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    print(printable(decoder.decode(tokenizer.decode(prompt.tolist()))), end="", flush=True)
    for ids in tokens:
        print(printable(decoder.decode(tokenizer.decode(ids.tolist()))), end="", flush=True)
    print(decoder.decode(b"", final=True))


def watch(tokenizer, texts_by_step, args, steps):
    """Return the last of texts_by_step, each (B, n). With --watch, show the first text of each."""
    visible = args.watch and sys.stdout.isatty()
    for texts in texts_by_step:
        if visible:
            print(CLEAR + to_text(tokenizer, texts[0]), flush=True)
            time.sleep(WATCH_SECONDS / steps)
    if visible:
        print(CLEAR, end="")
    return texts


def write(model, tokenizer, args, options):
    """Print texts that begin with the prompt."""
    context = model.config.context
    prompt = encode(tokenizer, to_bytes(args.prompt or ""), args.device)
    length = args.length
    if length is None:
        length = context - len(prompt) if len(prompt) < context else max(1, context // 2)
    prompts = prompt.expand(args.samples, -1)                                       # (B, n)
    P = model.config.patch
    if not model.config.causal and (len(prompt) % P or length % P):
        raise InputError(f"this MDM writes patches of {P}: the tokens of --prompt ({len(prompt)}) "
                         f"and --length ({length}) must be multiples of {P}")
    if not model.config.causal:
        steps = args.steps or context
        texts_by_step = diffuse(model, prompts, length, steps, args.order or "random", **options)
        show(tokenizer, watch(tokenizer, texts_by_step, args, steps))
    elif args.samples == 1:
        stream(tokenizer, prompt, generate(model, prompts, length, **options))
    else:
        tokens = torch.stack(list(generate(model, prompts, length, **options)), dim=1)
        show(tokenizer, torch.cat([prompts, tokens], dim=1))


def infill(model, tokenizer, args, options):
    """Print the text of --infill with its gaps filled; the given bytes stay."""
    gaps = GAP.findall(args.infill)
    if not gaps:
        raise InputError("--infill has no gap: three underscores or more are a gap of as many "
                         "tokens")
    special_id, context = model.config.vocab_size, model.config.context
    parts = []
    for given, gap in zip(GAP.split(args.infill), gaps + [""], strict=True):
        parts.append(encode(tokenizer, to_bytes(given), args.device))
        parts.append(torch.full((len(gap),), special_id, device=args.device))
    ids = torch.cat(parts)                                                          # (n,)
    if len(ids) > context:
        raise InputError(f"--infill has {len(ids):,} tokens, and the context is {context:,}")
    # Behind the text the sequence is MASK and stays so.
    rest = context - len(ids)
    masked = F.pad(ids == special_id, (0, rest))
    hidden = F.pad(ids == special_id, (0, rest), value=True).view(-1, model.config.patch)
    if (hidden.any(dim=1) != hidden.all(dim=1)).any():
        raise InputError(f"this MDM fills patches of {model.config.patch} tokens: the gaps and the "
                         "text of --infill must be whole ones, counted from its beginning")
    sequences = F.pad(ids, (0, rest), value=special_id).expand(args.samples, -1)    # (B, T)
    steps = args.steps or int(masked.sum())
    sequences_by_step = fill(model, sequences, masked, steps, args.order or "random", **options)
    texts_by_step = (texts[:, :len(ids)] for texts in sequences_by_step)
    show(tokenizer, watch(tokenizer, texts_by_step, args, steps))


# -----------------------------------------------------------------------------------------------
# Score.

@torch.inference_mode()
def token_bits(model, ids, masks=MASKS):
    """Return the bits of each token of a text ids (n,), read in sequences: (n,).

    AR: exact. MDM: the token's part of the bound, by the mean over random masks of each sequence,
    with the number of masked tokens stratified.
    """
    special_id, P = model.config.vocab_size, model.config.patch
    parts = []
    # The last patch is made whole with zeros. Behind the text, they change nothing for AR.
    padded = F.pad(ids, (0, -len(ids) % P))
    for i, sequence in enumerate(padded.split(model.config.context)):
        if model.config.causal:
            inputs, weights = train_ar.corrupt(sequence[None], special_id, patch=P)
        else:
            copies = sequence.expand(masks, -1)                                     # (masks, T)
            inputs, weights = train_mdm.corrupt(copies, special_id, run.generator(0, i), span=P)
        nll = [model(piece, sequence.expand(len(piece), -1)) for piece in inputs.split(16)]
        nats = (weights * torch.cat(nll)).mean(dim=0)                               # (T,)
        parts.append(nats / math.log(2))
    bits = torch.cat(parts)
    if not model.config.causal:
        # Of MDM the bound is one of the text with its zeros.
        bits[len(ids) - 1] += bits[len(ids):].sum()
    return bits[:len(ids)]


def shade(raw, bits):
    """Return bytes as text for the terminal, each character on white (0 bits) to red (8 bits).

    bits: (len(raw),). A character of several bytes has their mean.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    shaded, start = [], 0
    for stop in range(1, len(raw) + 1):
        text = decoder.decode(raw[stop - 1:stop], final=stop == len(raw))
        if text:
            pale = round(255 * (1 - min(bits[start:stop].mean(), 8) / 8))
            text = printable(text).replace("\n", "\x1b[0m\n")
            shaded.append(f"\x1b[30;48;2;255;{pale};{pale}m{text}\x1b[0m")
            start = stop
    return "".join(shaded)


def score(model, tokenizer, args):
    """Print the bits per byte of a file, in a terminal also its text, shaded by them."""
    if args.score == "-":
        raw = sys.stdin.buffer.read()
    elif Path(args.score).is_file():
        raw = Path(args.score).read_bytes()
    else:
        raise InputError(f"--score {args.score}: there is no such file, or it is not a regular one")
    if not raw:
        raise InputError(f"--score {args.score}: there is nothing to score")
    ids = encode(tokenizer, raw, args.device)
    # A token's bits, in equal parts, are those of its bytes.
    lengths = tokenizer.bytes_per_id[ids.cpu().numpy()]
    bits = token_bits(model, ids).cpu().double().numpy()                            # (n,)
    bits = np.repeat(bits / lengths, lengths)                                       # (bytes,)
    if sys.stdout.isatty():
        print(shade(raw, bits))
    kind = "exact" if model.config.causal else f"a bound, by {MASKS} masks of each sequence"
    print(f"{bits.mean():.4f} bits per byte ({kind}; {args.run}) on {len(raw):,} bytes")


# -----------------------------------------------------------------------------------------------
# The command.

def newest_run(root):
    """Return the newest folder under root with a finished run that can be sampled from."""
    paths = sorted(root.rglob("result.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in paths:
        try:
            result = run.read(path)
        except InputError:
            continue
        if result.get("shuffle") == 1 and path.with_name("checkpoint.pt").exists():
            return path.parent
    raise InputError(f"there is no finished run under {root}: train one first (train_ar.py)")


def temperature(text):
    """Return the number in text, for argparse. Logits divided by a tiny one would be infinite."""
    return 0.0 if float(text) == 0 else run.number(float, 0.001, 1000)(text)


def parse_arguments():
    """Return the arguments. Raise InputError for those that do not go together."""
    parser = run.make_parser(__doc__)
    flag = parser.add_argument
    flag("run", type=Path, nargs="?", help="run folder (default: the newest finished in runs/)")
    flag("--length", type=run.number(int, 1, 100_000), help="tokens (default: fill the context)")
    flag("--samples", type=run.number(int, 1, 256), default=1)
    flag("--temperature", type=temperature, default=1.0, help="0: always the most likely token")
    flag("--top-k", type=run.number(int, 0, 2**31), default=0, help="only the k likeliest (0: all)")
    flag("--seed", type=run.number(int, 0, 2**63 - 1), default=0)
    flag("--steps", type=run.number(int, 1, 100_000),
         help="MDM: steps to fill the text in (default: one a token)")
    flag("--order", choices=("random", "confident", "blocks"),
         help="MDM: random (the default; exact at one token a step), confident first, or blocks "
              "from left to right")
    flag("--watch", action="store_true", help="MDM: show the text as it is filled")
    flag("--device", help="cpu, cuda or mps (default: the best there is)")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    task.add_argument("--infill", metavar="TEXT", help="MDM: fill its gaps, each ___ or longer")
    task.add_argument("--score", metavar="FILE", help="bits per byte of a file (-: stdin)")
    args = parser.parse_args()
    if args.score is not None:
        for name in sorted(vars(args).keys() - {"run", "score", "device"}):
            if getattr(args, name) != parser.get_default(name):
                raise InputError(f"--{name.replace('_', '-')} does not go with --score")
    if args.infill is not None and (args.length or args.order == "blocks"):
        raise InputError("--length and --order blocks do not go with --infill")
    return args


def main():
    args = parse_arguments()
    args.device = run.pick_device(args.device)
    args.run = args.run or newest_run(Path("runs"))
    if run.read(args.run / "result.json") is None:
        raise InputError(f"{args.run} holds no finished run: its training command resumes it")
    model, settings, tokenizer = run.load_model(args.run, args.device)
    if settings["shuffle"] > 1:
        raise InputError(f"{args.run} was trained on shuffled text: it cannot read or write other")
    for name in ("steps", "order", "watch", "infill"):
        if model.config.causal and getattr(args, name):
            raise InputError(f"--{name} is for MDM, and {args.run} is AR: it writes left to right")
    options = {"temperature": args.temperature, "top_k": args.top_k,
               "generator": torch.Generator(args.device).manual_seed(args.seed)}
    if args.score is not None:
        score(model, tokenizer, args)
    elif args.infill is not None:
        infill(model, tokenizer, args, options)
    else:
        write(model, tokenizer, args, options)


if __name__ == "__main__":
    run.run_script(main)
