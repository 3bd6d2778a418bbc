"""E2: FLOPs. What does one token cost to train, and how much of it is attention?

    python -m pytest exercises -k e02              # level A, 30 minutes

A budget in this repository is a number of floating-point operations (FLOPs). Two models are
compared at the same budget, so the count must be right. Most papers use 6 N per token, where N is
the number of parameters. At our sizes this is far off.

Predict the three numbers below, for training on bytes (vocabulary 256) with a context of 512
tokens. N leaves out the embeddings and the head, as in most papers: `count_params(embedding=False)`
in model.py. Then write the count from the shapes alone.

Read first: the forward passes of `Attention`, `MLP`, `Block` and `Transformer` in model.py. Do not
read `Config.flops_per_token`: it is the answer, and the test turns it off. What counts:

- Only matrix products count. Norms, activations, softmax and table look-ups count nothing.
- A product of shapes (a, b) and (b, c) has a * b * c multiplications and as many additions.
- The backward pass computes two products for each product of the forward pass.
- PyTorch's profiler is right: it counts what is in fact computed.

To think about: at one budget counted by 6 N, which widths would be trained for too long?
"""
PREDICT = {
    "share of attention's scores and sums in all FLOPs, width 32, percent": None,
    "share of attention's scores and sums in all FLOPs, width 576, percent": None,
    "true FLOPs divided by 6 N, width 32": None,
}
# Afterwards: one sentence for each, why it is so.
EXPLAIN = ["", "", ""]


def flops_per_token(config):
    """Return the FLOPs to train on one token, an int: forward and backward pass.

    config has the attributes vocab_size, padded_vocab, context (tokens), width and depth, and no
    others.
    """
    raise NotImplementedError
