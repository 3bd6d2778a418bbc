"""E14: the KV cache. What does it save, and why has MDM none?

    python -m pytest exercises -k e14              # level B, 60 minutes

AR writes one token at a time. Without a cache it reads the whole text again for every token. But no
token sees a later one. So the keys and values of the text stay as they were, and a cache can keep
them. An MDM may not do that: when one MASK is filled, what changes?

Two procedures write n tokens, one sequence at a time:

    without: for t in 1..n: model(ids[:, :t])
    with:    for t in 1..n: model(ids[:, t - 1:t], cache=cache)

Read first: model.KVCache, model.Attention.forward and model.flops_per_token. Do not read
KVCache.append, which is what you write.

Afterwards: sample.py --order blocks writes an MDM's text in blocks. What could be cached there, if
no block saw those behind it?
"""

PREDICT = {
    "FLOPs without the cache / FLOPs with it (width 64, 512 tokens)": None,
    "MDM: positions of 512 whose keys in layer 2 change when one MASK is filled": None,
    "AR: positions whose keys in layer 2 change when token 512 is appended to 511": None,
}


def append(cache, attention, k, v):
    """Store k and v (B, H, T, d) of T new tokens. Return the keys and the values of all tokens.

    Both are (B, H, cache.length + T, d). cache.length tokens were read before. cache.kv[attention]
    is (2, B, H, context, d), keys and values: room for those of this layer. Every layer calls this
    once for the same tokens. The model itself moves cache.length forward, after its last layer.
    """
    raise NotImplementedError


def flops_without(config, n):
    """Return the FLOPs of the matrix products of n tokens without a cache: an int.

    Forward passes only; all logits of each pass count. config has width D, depth and padded_vocab.
    A layer has 16 D^2 weights. Attention of q queries to k keys takes 4 D q k FLOPs: here in full,
    as if there were no causal mask. conv is 0 and patch is 1.
    """
    raise NotImplementedError


def flops_with(config, n):
    """Return the same with a cache: the query of token t meets the keys of tokens 1..t."""
    raise NotImplementedError
