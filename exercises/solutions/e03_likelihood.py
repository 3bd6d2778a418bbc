"""A solution of E3."""
import torch

PREDICT = {
    "no causal mask, trained: sum of the probabilities of all 243 sequences": 243,
    "targets not shifted, trained: the same sum": 243,
}
# Afterwards: one sentence for each, why it is so.
EXPLAIN = ["", ""]


def total_probability(losses, V, T):
    ids = torch.cartesian_prod(*[torch.arange(V)] * T)                    # (V^T, T)
    nats = losses(ids).sum(dim=1)                                         # (V^T,)
    return torch.exp(-nats).sum().item()


def is_likelihood(losses, V, T):
    return abs(total_probability(losses, V, T) - 1) < 1e-4
