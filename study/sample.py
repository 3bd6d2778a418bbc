"""Write text, fill gaps and score texts with any run of study.train: sample.py for variants.

    python -m study.sample RUN_DIR --prompt "def add(a, b):"             # the flags of sample.py
    python -m study.sample RUN_DIR --score FILE

A model with patches writes each patch from left to right, and an MDM masks and fills whole ones.
"""
import math

import torch
import torch.nn.functional as F

import run
import sample
from data import InputError
from log import read_checkpoint, read_result, reading, tokenizer_of
from sample import generate as generate_with_cache
from study.train import PLAIN, PLAIN_MODEL, corrupt_ar, corrupt_spans
from study.variants import Config, KVCache, Transformer


def load_model(folder, device="cpu"):
    """Return the model of a run folder, the settings of the run, and its tokenizer."""
    if read_result(folder) is None:
        raise InputError(f"{folder} holds no finished run: its training command resumes it")
    with reading(folder / "checkpoint.pt"):
        saved = read_checkpoint(folder / "checkpoint.pt")
        s = PLAIN | saved["settings"]
        if s["shuffle"] > 1:
            raise InputError(f"{folder} knows only text that is shuffled: it has no text to show")
        model = Transformer(Config(s["vocab_size"], s["context_tokens"], s["width"],
                                   s["objective"] == "ar", **{key: s[key] for key in PLAIN_MODEL}))
        model.load_state_dict(saved["model"])
        return model.to(device).eval(), s, tokenizer_of(saved)


@torch.inference_mode()
def generate(model, ids, length, **options):
    """Do what sample.generate does; with patches, read the text from its start for each token."""
    context, P = model.config.context, model.config.patch
    if P == 1:
        yield from generate_with_cache(model, ids, length, KVCache, **options)
        return
    for _ in range(length):
        if ids.size(1) >= context:
            ids = ids[:, -(context // 2):]
        n = ids.size(1)
        # What stands behind the text, up to the end of its patch, changes nothing.
        padded = F.pad(ids, (0, P - n % P))
        inputs, _ = corrupt_ar(padded, model.config.vocab_size, None, P)
        logits = model.spell(model.read(inputs), padded)                                # (B, T, V)
        chosen = sample.pick(logits[:, n], **options)                                   # (B,)
        ids = torch.cat([ids, chosen[:, None]], dim=1)
        yield chosen


def draw(model, ids, **options):
    """Draw all patches of ids (B, T), R of P tokens: (B, R, P), and their log p: (B, R)."""
    P, x, log_p = model.config.patch, model.read(ids), 0
    drawn = torch.zeros_like(ids)
    for place in range(P):
        logits = model.spell(x, drawn)[:, place::P]                                     # (B, R, V)
        chosen = sample.pick(logits, **options)                                         # (B, R)
        drawn[:, place::P] = chosen
        log_p = log_p + logits.float().log_softmax(dim=-1).gather(-1, chosen[..., None])[..., 0]
    return drawn.view(len(ids), -1, P), log_p


@torch.inference_mode()
def fill(model, ids, masked, steps, order="random", **options):
    """Do what sample.fill does, with patches in place of positions."""
    special_id, P = model.config.vocab_size, model.config.patch
    ids = torch.where(masked, special_id, ids).view(len(ids), -1, P)                    # (B, R, P)
    hidden = ids[0] == special_id                                                       # (R, P)
    if (hidden != hidden[:, :1]).any():
        raise InputError(f"this MDM writes patches of {P} tokens: a gap must be of whole ones")
    masked = masked.view(-1, P).any(dim=1)                                              # (R,)
    rank = torch.rand(ids.shape[:2], generator=options.get("generator"), device=ids.device)
    total = int(masked.sum())
    steps = min(steps, total)
    for step in range(steps):
        count = total * (step + 1) // steps - total * step // steps
        drawn, log_p = draw(model, ids.flatten(1), **options)
        rank = log_p if order == "confident" else rank
        done = ~masked | (ids[:, :, 0] != special_id)                                   # (B, R)
        positions = rank.masked_fill(done, -math.inf).topk(count, dim=1).indices
        positions = positions[..., None].expand(-1, -1, P)                              # (B, C, P)
        ids = ids.scatter(1, positions, drawn.gather(1, positions))
        yield ids.flatten(1)


@torch.inference_mode()
def token_bits(model, ids, masks=sample.MASKS):
    """Do what sample.token_bits does, with the masks and the order of patches."""
    special_id, P, parts = model.config.vocab_size, model.config.patch, []
    for i, sequence in enumerate(F.pad(ids, (0, -len(ids) % P)).split(model.config.context)):
        copies = sequence.expand(1 if model.config.causal else masks, -1)
        if model.config.causal:
            inputs, weights = corrupt_ar(copies, special_id, None, P)
        else:
            inputs, weights = corrupt_spans(copies, special_id, run.generator(0, i), span=P)
        nll = [model(piece, sequence.expand(len(piece), -1)) for piece in inputs.split(16)]
        parts.append((weights * torch.cat(nll)).mean(dim=0) / math.log(2))              # (T,)
    bits = torch.cat(parts)
    if not model.config.causal:
        # Its last patch is masked with the zeros that end it.
        bits[len(ids) - 1] += bits[len(ids):].sum()
    return bits[:len(ids)]


def main():
    # The command of sample.py, with what stands above in place of its own.
    vars(sample).update(load_model=load_model, generate=generate, fill=fill, token_bits=token_bits)
    sample.main()


if __name__ == "__main__":
    run.run_script(main)
