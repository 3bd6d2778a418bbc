"""E6: muP. One learning rate for all widths, and how to check that it is one."""
import torch

PREDICT = {
    "one rate for all: movement of the logits, width 256 / width 32": 8.0,
    "your scales: movement of the logits, width 256 / width 32": 1.0,
}


def scales(width):
    # An entry of a matrix's output sums over the width, one of an embedding over nothing.
    return {"matrices": 64 / width,
            "head": 10 * 64 / width,
            "embeddings": 10,
            "others": 1}


@torch.no_grad()
def places(net, inputs):
    return {"embedding": net.embedding(inputs), "trunk": net.read(inputs), "logits": net(inputs)}


def movement(net, optimizer, inputs, ids, steps):
    before = places(net, inputs)
    for _ in range(steps):
        net(inputs, ids).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = places(net, inputs)
    return {place: (after[place] - before[place]).square().mean().sqrt().item()
            for place in before}
