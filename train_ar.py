"""Train an autoregressive (AR) Transformer to a FLOP budget: predict each token from those before.

    python train_ar.py                                  # bytes of pysrc, a minute or two on a CPU
    python train_ar.py --tokenizer bpe --flops 1e13
    torchrun --nproc_per_node=8 train_ar.py --flops 1e20

-log p(x) = sum_t -log p(x_t | x_1 .. x_{t-1}), exactly.

The same command again resumes an interrupted run, and prints the result of a finished one.
`diff train_ar.py train_mdm.py` shows the objective and nothing else.
"""
import math

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import data
import run
from model import Transformer, flops_per_token, make_optimizer

OBJECTIVE = "ar"
# About the best width at 1e12 FLOPs. run.default_width starts from it.
WIDTH = 32
# Tuned at 1e12 FLOPs and width 32 (results/README.md). One learning rate serves all widths.
BATCH = {"byte": 512, "bpe": 2048}                        # tokens
LEARNING_RATE = {"byte": 0.003, "bpe": 0.012}
VAL_BYTES = 2**20                                         # of validation text, for the final BPB


def batch_tokens(flops, tokenizer):
    """Return the tokens in a batch of a run of this budget."""
    return BATCH[tokenizer] * (flops / 1e12) ** 0.3


# -----------------------------------------------------------------------------------------------
# The objective.

def corrupt(ids, special_id, generator=None, patch=1):
    """Return what the model reads of sequences ids (B, T), and the weight of each token's loss.

    AR reads [BOS, x_1 .. x_{T-1}] to predict x_1 .. x_T. Every token counts once. With --patch the
    sequence is read one patch late: the model spells each patch from left to right.
    """
    bos = torch.full_like(ids[:, :patch], special_id)
    inputs = torch.cat([bos, ids[:, :-patch]], dim=1)                                   # (B, T)
    weights = torch.ones(ids.shape, device=ids.device)                                  # (B, T)
    return inputs, weights


def loss(model, ids, generator=None):
    """Return the mean loss in nats per token of sequences ids (B, T): the exact likelihood."""
    inputs, weights = corrupt(ids, model.config.vocab_size, generator, model.config.patch)
    return (weights * model(inputs, ids)).mean()


@torch.no_grad()
def evaluate(model, sequences, bytes_per_id):
    """Return the bits per byte of sequences, and their standard error (nan for one sequence).

    sequences: an array of ids (N, T). bytes_per_id: (vocab_size,).
    """
    device = next(model.parameters()).device
    ids = torch.from_numpy(sequences)
    inputs, weights = corrupt(ids, model.config.vocab_size, patch=model.config.patch)
    # Few sequences at once are fastest on a CPU, many on a GPU.
    size = 4 if device.type == "cpu" else max(4, 16384 // ids.size(1))
    nll = [model(inputs[i:i + size].to(device), ids[i:i + size].to(device)).cpu()
           for i in range(0, len(ids), size)]
    bits = (weights * torch.cat(nll)).sum(dim=1).double().numpy() / math.log(2)         # (N,)
    nbytes = bytes_per_id[ids.numpy()].sum(axis=1)                                      # (N,)
    bpb = bits.sum() / nbytes.sum()
    if len(bits) == 1:
        return float(bpb), math.nan
    # The error of a ratio, since sequences differ in bytes.
    residuals = bits - bpb * nbytes
    return float(bpb), float(residuals.std(ddof=1) * len(bits) ** 0.5 / nbytes.sum())


# -----------------------------------------------------------------------------------------------
# Training.

def lr_schedule(step, steps):
    """Return the fraction of the peak rate: a cosine from 1 to 10%, times a linear warmup (5%)."""
    warmup = max(1, round(0.05 * steps))
    return min(1, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def main():
    # Settings.
    parser = run.arguments(__doc__)
    args = parser.parse_args()
    options = {"patch": args.patch}
    rank, world_size, device = run.setup(args, LEARNING_RATE)

    # The data: sequences of the same number of bytes for both tokenizers.
    with run.rank_zero_first(rank, world_size):
        corpus = data.load(args.data, args.tokenizer, args.vocab)
    tokenizer, context = corpus.tokenizer, corpus.tokens(args.context)
    shuffle = corpus.shuffle_tokens(args.shuffle, context)
    train = data.Sequences(corpus.train, context, shuffle, args.permutation)

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
        return ids, *corrupt(ids, config.vocab_size, generator, **options)

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
                val_bpb, _ = evaluate(model, val[::16], tokenizer.bytes_per_id)
            bar.set_postfix_str(log.write(step + 1, lr, norm, val_bpb), refresh=False)

    if rank == 0:
        bpb, stderr = evaluate(model, val, tokenizer.bytes_per_id)
        log.finish(bpb, stderr, tokenizer.bytes_per_id[val].sum())


if __name__ == "__main__":
    run.run_script(main)
