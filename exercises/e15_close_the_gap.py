"""E15: close the gap. How good can masked diffusion on bytes become for 1e12 FLOPs?

    python -m pytest exercises -k e15              # level C, as long as you like

At 1e12 FLOPs a plain MDM on bytes needs one bit per byte more than the same on BPE. Part of it can
be won back. Change what you like: the flags, the training script, the model. Train two runs of the
same budget on the same text, and name their folders below:

    python train_mdm.py --flops 1e12 --width 32          # BASELINE, a minute or two
    python train_mdm.py --flops 1e12 ...                 # BEST

The baseline is 3.788 bits per byte. The floor is what --patch 8 alone gains over it: 0.841. Our
best run gains 1.089 (seed 0; results/LOG.md).

The rules for BEST: MDM on bytes, 512 bytes of context, at most 1e12 FLOPs by a flops_per_token that
agrees with PyTorch's profiler, and at least 16 patches in a sequence, since one patch is read from
left to right. The loss must be a bound. So no prediction may see a masked token, neither its own
nor another that is predicted beside it. (Inside one patch, masked as a whole, the tokens before it
may be seen: why?) The test trains a tiny model on text of known entropy, and no bound is below the
entropy.

To try ideas in seconds, use --flops 2e10 and --data exercises/speeches.txt for both runs, and give
that path as DATA. There the floor is 0.999. What helps there need not help at 1e12.

Read first: train_mdm.corrupt, train_mdm.evaluate, and model.Speller. Keep what the test calls:
MODEL(config), LOSS(model, ids, generator), EVALUATE(model, sequences, bytes_per_id),
model.flops_per_token(config) and run.load_model(folder). The test takes up to half a minute.
"""
import model
import train_mdm

PREDICT = {
    "bits per byte that your best run gains over plain MDM": None,
}

# Run folders, for example "runs/mdm-byte-w32-c1e12-s0".
BASELINE = None
BEST = None
# What --data was.
DATA = "pysrc"
# What is checked to be a bound. Name your own here if they are elsewhere.
MODEL = model.Transformer
LOSS = train_mdm.loss
EVALUATE = train_mdm.evaluate
