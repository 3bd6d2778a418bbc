"""Train a masked diffusion model (MDM) to a FLOP budget: predict masked tokens from visible ones.

    python train_mdm.py                                  # bytes of pysrc, a minute or two on a CPU
    python train_mdm.py --tokenizer bpe --flops 1e13
    torchrun --nproc_per_node=8 train_mdm.py --flops 1e20

-log p(x) <= E_k E_S [T/k sum_{i in S} -log p(x_i | x without S)], k ~ U{1..T}, |S| = k (MDLM,
arXiv 2406.07524). S are the masked positions.

The same command again resumes an interrupted run, and prints the result of a finished one.
`diff train_ar.py train_mdm.py` shows the objective and nothing else.
"""
import math

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import data
import run
from model import Transformer, flops_per_token, make_optimizer

OBJECTIVE = "mdm"
# About the best width at 1e12 FLOPs. run.default_width starts from it.
WIDTH = 22
# Tuned at 1e12 FLOPs and width 32 (results/README.md). One learning rate serves all widths.
BATCH = {"byte": 512, "bpe": 320}                         # tokens
LEARNING_RATE = {"byte": 0.0015, "bpe": 0.0015}
VAL_BYTES = 2**20                                         # of validation text, for the final BPB


def batch_tokens(flops, tokenizer):
    """Return the tokens in a batch: for bytes it grows only beyond the budgets of the study."""
    growth = max(1, flops / run.TUNED_UP_TO) if tokenizer == "byte" else flops / 1e12
    return BATCH[tokenizer] * growth**0.3


# -----------------------------------------------------------------------------------------------
# The objective.

# bell: a normal distribution of mask rates, cut off at 0 and 1 (arXiv 2605.13026).
MEAN, SD = 0.5, 0.2
TAIL = torch.special.ndtr(torch.tensor(-MEAN / SD, dtype=torch.float64))
# name -> (mask rate m(u) at time u, its inverse)
SCHEDULES = {
    "linear": (lambda u: u, lambda m: m),
    "cosine": (lambda u: torch.cos(math.pi / 2 * (1 - u)),
               lambda m: 1 - 2 / math.pi * torch.acos(m)),
    "bell": (lambda u: MEAN + SD * torch.special.ndtri(TAIL + u * (1 - 2 * TAIL)),
             lambda m: (torch.special.ndtr((m - MEAN) / SD) - TAIL) / (1 - 2 * TAIL)),
}


def corrupt(ids, special_id, generator, schedule="linear", span=1):
    """Return what the model reads of sequences ids (B, T), and the weight of each token's loss.

    The bound: mask each token with probability m(u), u ~ U(0, 1), and weigh the loss of the masked
    tokens by m'(u) / m(u). Averaged over u, the masks of k tokens have weight 1 / k in all, for
    every schedule and every k. So k may be drawn with any P(k), if the weight is 1 / (k P(k)). We
    draw k = ceil(T m(u)), near what the schedule masks: the same expectation, a smaller variance.
    With --span, spans of tokens take the place of tokens.
    """
    B, T = ids.shape
    spans = T // span
    rate, inverse = SCHEDULES[schedule]
    # Times are spread evenly over the batch, and each is uniform by itself.
    u = torch.arange(B, dtype=torch.float64) / B
    u = (u + torch.rand(1, generator=generator, dtype=torch.float64)) % 1               # (B,)
    k = (spans * rate(u)).ceil().clamp(1, spans)                                        # (B,)
    probability = inverse(k / spans) - inverse((k - 1) / spans)
    weight = 1 / (k * probability)

    # Mask k random spans.
    order = torch.rand(B, spans, generator=generator).argsort(dim=1)
    masked = (order < k[:, None]).repeat_interleave(span, dim=1)                        # (B, T)
    inputs = torch.where(masked.to(ids.device), special_id, ids)                        # (B, T)
    weights = torch.where(masked, weight[:, None], 0.0).float().to(ids.device)          # (B, T)
    return inputs, weights


def corrupt_mixed(ids, special_id, generator, schedule="linear", span=1, span_share=1):
    """Return what corrupt returns, with spans in some sequences and single tokens in the others.

    Each sequence has its spans masked with probability span_share. So the loss estimates a mixture
    of two bounds: that of spans and that of single tokens.
    """
    inputs, weights = corrupt(ids, special_id, generator, schedule, span)
    if span_share < 1:
        single_inputs, single_weights = corrupt(ids, special_id, generator, schedule)
        single = torch.rand(len(ids), 1, generator=generator) >= span_share             # (B, 1)
        single = single.to(ids.device)
        inputs = torch.where(single, single_inputs, inputs)                             # (B, T)
        weights = torch.where(single, single_weights, weights)                          # (B, T)
    return inputs, weights


def loss(model, ids, generator, schedule="linear", span=1, span_share=1):
    """Return the mean loss in nats per token of sequences ids (B, T): unbiased for the bound."""
    span = max(span, model.config.patch)
    inputs, weights = corrupt_mixed(ids, model.config.vocab_size, generator, schedule, span,
                                    span_share)
    return (weights * model(inputs, ids)).mean()


@torch.no_grad()
def evaluate(model, sequences, bytes_per_id, span=1, seed=0):
    """Return the bits per byte of sequences, and their standard error (nan for one sequence).

    sequences: an array of ids (N, T). bytes_per_id: (vocab_size,). The bound is the same for all
    schedules. k is spread evenly over the sequences, in random order. A patch is masked whole or
    not at all: with single tokens of it masked there would be no bound.
    """
    span = max(span, model.config.patch)
    device = next(model.parameters()).device
    # The same masks for all models, so that they can be compared.
    generator = torch.Generator().manual_seed(seed)
    ids = torch.from_numpy(sequences)
    ids = ids[torch.randperm(len(ids), generator=generator)]
    inputs, weights = corrupt(ids, model.config.vocab_size, generator, span=span)
    # Few sequences at once are fastest on a CPU, many on a GPU.
    size = 4 if device.type == "cpu" else max(4, 16384 // ids.size(1))
    nll = [model(inputs[i:i + size].to(device), ids[i:i + size].to(device)).cpu()
           for i in range(0, len(ids), size)]
    bits = (weights * torch.cat(nll)).sum(dim=1).double().numpy() / math.log(2)         # (N,)
    nbytes = bytes_per_id[ids.numpy()].sum(axis=1)                                      # (N,)
    bpb = bits.sum() / nbytes.sum()
    if len(bits) == 1:
        return float(bpb), math.nan
    # Neighbours have nearly the same k: their differences are error, the trend over k is not.
    residuals = np.diff(bits - bpb * nbytes)
    return float(bpb), float((len(bits) * (residuals**2).mean() / 2) ** 0.5 / nbytes.sum())


# -----------------------------------------------------------------------------------------------
# Training.

def lr_schedule(step, steps):
    """Return the fraction of the peak rate: a cosine from 1 to 10%, times a linear warmup (5%)."""
    warmup = max(1, round(0.05 * steps))
    return min(1, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def main():
    # Settings.
    parser = run.arguments(__doc__)
    parser.add_argument("--schedule", choices=SCHEDULES, default="linear",
                        help="how the mask rate follows the time")
    parser.add_argument("--span", type=run.COUNT, default=1, help="mask spans of so many tokens")
    parser.add_argument("--span-share", type=run.number(float, 1e-6, 1), default=1,
                        help="the share of training sequences with spans; else single tokens")
    args = parser.parse_args()
    if args.span > 1 and args.patch > 1:
        raise data.InputError("--span and --patch do not go together: a patch is masked whole")
    if args.span_share < 1 and args.span == 1:
        raise data.InputError("--span-share goes with --span: it is the share of spans in training")
    options = {"schedule": args.schedule, "span": max(args.span, args.patch),
               "span_share": args.span_share}
    rank, world_size, device = run.setup(args, LEARNING_RATE)

    # The data: sequences of the same number of bytes for both tokenizers.
    with run.rank_zero_first(rank, world_size):
        corpus = data.load(args.data, args.tokenizer, args.vocab)
    tokenizer, context = corpus.tokenizer, corpus.tokens(args.context)
    shuffle = corpus.shuffle_tokens(args.shuffle, context)
    train = data.Sequences(corpus.train, context, shuffle, args.permutation)
    if context % args.span:
        raise data.InputError(f"--span {args.span} does not divide a sequence of {context} tokens")

    # The run: budget, width and batch fix the number of steps.
    width = args.width or run.default_width(args.flops, WIDTH)
    config = run.make_config(args, OBJECTIVE, tokenizer.vocab_size, context, width)
    batch, steps = run.count_steps(args, batch_tokens(args.flops, args.tokenizer), config)
    # A small budget gets a small validation; during training, 1/16 of it is read.
    val_count = max(16, min(VAL_BYTES // args.context, 2 * steps * batch))
    val = data.Sequences(corpus.val, context, shuffle, args.permutation).spaced(val_count)
    settings, out = run.describe(OBJECTIVE, args, corpus, config, batch, steps, options)
    if result := run.read(out / "result.json", settings):
        return run.print_result(result, out)
    micro_batches = run.split_batch(args, batch, config, rank, world_size, device)

    # The model and its optimizer, new or as the last checkpoint has them.
    model = Transformer(config).to(device)
    optimizer = make_optimizer(model)
    log = run.Log(out, settings, flops_per_token(config), model, optimizer, corpus, rank)
    net, seconds_per_step = run.wrap(model, args, micro_batches, device, world_size)
    run.print_plan(settings, model, log.step, seconds_per_step, out)
    log.start(seconds_per_step)

    def draw(step):
        # A batch and its corruption are pure functions of (seed, step), the same on all ranks.
        ids = torch.from_numpy(train.batch(args.seed, step, batch))                     # (B, T)
        generator = run.generator(args.seed, step)
        return ids, *corrupt_mixed(ids, config.vocab_size, generator, **options)

    bar = tqdm(run.ahead(draw, range(log.step, steps), device), out.name, steps, initial=log.step,
               disable=rank > 0, mininterval=run.BAR_SECONDS)
    for step, (ids, inputs, weights) in bar:
        lr = args.lr * lr_schedule(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]

        batch_loss = 0.0
        for rows, repeated in micro_batches:
            x, y, w = run.to_device(device, inputs[rows], ids[rows], weights[rows])
            w[:repeated] = 0
            if world_size > 1:
                net.require_backward_grad_sync = rows == micro_batches[-1][0]
            share = (w * net(x, y)).sum() / ids.numel()
            # DDP averages over ranks, and the sum is wanted.
            (share * world_size).backward()
            batch_loss += share.detach()
        norm = clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        log.add(batch_loss, ids)
        if step + 1 in log.row_steps:
            val_bpb = None
            if step + 1 in log.validation_steps and rank == 0:
                val_bpb, _ = evaluate(model, val[::16], tokenizer.bytes_per_id, span=args.span)
            bar.set_postfix_str(log.write(step + 1, lr, norm, val_bpb), refresh=False)

    if rank == 0:
        bpb, stderr = evaluate(model, val, tokenizer.bytes_per_id, span=args.span)
        more = {}
        if args.span > 1:
            # The bound of single tokens, too, which is what other models are compared by.
            single, error = evaluate(model, val, tokenizer.bytes_per_id)
            more = {"val_bpb_span1": single, "val_bpb_span1_stderr": error}
        log.finish(bpb, stderr, tokenizer.bytes_per_id[val].sum(), **more)


if __name__ == "__main__":
    run.run_script(main)
