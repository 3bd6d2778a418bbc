"""E6: muP. One learning rate for all widths, and how to check that it is one.

    python -m pytest exercises -k e06              # level B, 60 minutes

A learning rate is tuned on a small model and used on a large one. This works if a step of the
optimizer changes what the model computes by the same amount at every width. The coordinate check
measures this: train for five steps, and see how far the numbers moved.

Adam moves every weight by about the learning rate, whatever the size of its gradient, and the
weights of a matrix move together. So ask of each group of parameters: how many moved weights are
summed in one number of its output? What is the sum if the width doubles? The output should move by
the same amount.

At width 64 the rate of a group is lr times this factor: matrices (in the blocks) 1, head 10,
embeddings 10, others (norms) 1. The initialization of the repository is right for all widths.

Read first: the forward pass and the initialization of model.Transformer. Leave model.make_optimizer
for later: it holds an answer.

Afterwards: why does the trunk's check also need Block.scale? Set it to 1 and widen to 512.
"""

PREDICT = {
    # The factors of width 64 at all widths.
    "one rate for all: movement of the logits, width 256 / width 32": None,
    "your scales: movement of the logits, width 256 / width 32": None,
}


def scales(width):
    """Return the factors of lr at this width: a dict of "matrices", "head", "embeddings", "others".

    At width 64 they are 1, 10, 10 and 1.
    """
    raise NotImplementedError


def movement(net, optimizer, inputs, ids, steps):
    """Train a model for some steps on one batch. Return how far three places of it have moved.

    net: a model.Transformer. optimizer: has its rates. inputs (B, T): what it reads. ids (B, T):
    what it predicts; the loss of a step is the mean of net(inputs, ids).

    Return a dict of floats: "embedding", for net.embedding(inputs); "trunk", for net.read(inputs);
    "logits", for net(inputs). Each is the root mean square, over all entries, of the change from
    before the first step to after the last.
    """
    raise NotImplementedError
