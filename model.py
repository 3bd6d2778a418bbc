"""The one Transformer (for AR or MDM, BPE or bytes), its FLOPs, its optimizer and its KV cache.

    python model.py [--vocab 256] [--context 512] [--widths 64 128]     # sizes and training speed

A standard pre-norm Transformer: RMSNorm, rotary positions, SwiGLU, no biases. It is causal for AR
and bidirectional for MDM; nothing else differs. Depth follows from the width as in SMDM (arXiv
2410.18514): width 576 has 9 layers and 48M parameters without embeddings. So do heads from width
256 on; narrower models have smaller ones (head_dim).

One learning rate serves all widths (muP, arXiv 2203.03466, and CompleteP, arXiv 2505.01618). Three
places see to it: Block (residual branches), Transformer (initialization), make_optimizer (rates).

Two remedies for bytes are off by default. With conv = K each position also sees a weighted sum of K
neighbours (Canon layers, arXiv 2512.17351). With patch = P the Transformer reads P tokens as one,
and a Speller writes the tokens of each patch from left to right (MegaByte, arXiv 2305.07185).

A control for shuffled order is off, too. With phase = W the model is told t mod W at position t.
"""
import argparse
import math
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class Config:
    """The shape of a model. Raises ValueError for a shape that cannot be."""
    vocab_size: int = 256
    context: int = 512                # tokens
    width: int = 128
    causal: bool = True               # True for AR, False for MDM
    conv: int = 0                     # taps of the convolutions; 0: none
    patch: int = 1                    # tokens that are read as one
    phase: int = 0                    # W, if an embedding of t mod W is added to position t

    def __post_init__(self):
        if min(self.vocab_size, self.context, self.width, self.patch) < 1 or self.conv < 0:
            raise ValueError("vocabulary, context, width and patch are at least 1, and conv is "
                             "not negative")
        if not 0 <= self.phase <= self.context:
            raise ValueError(f"--phase {self.phase} is not from 0 to the context, "
                             f"{self.context} tokens")
        if self.phase > 0 and self.patch > 1:
            raise ValueError("--phase and --patch do not go together")
        if self.width % self.head_dim:
            raise ValueError(f"width {self.width} is not a multiple of {self.head_dim}")
        if self.conv > 0 and self.conv % 2 == 0 and not self.causal:
            raise ValueError(f"a convolution of {self.conv} taps has no middle: take an odd number")
        if self.context % self.patch or self.width % self.patch:
            raise ValueError(f"patches of {self.patch} do not divide a context of {self.context} "
                             f"tokens and width {self.width}")

    @property
    def depth(self):
        return max(2, self.width // 64)

    @property
    def head_dim(self):
        return head_dim(self.width)

    @property
    def heads(self):
        return self.width // self.head_dim

    @property
    def padded_vocab(self):
        # Tensor cores want multiples of 64.
        return (self.vocab_size + 63) // 64 * 64


def head_dim(width):
    """Return the dimension of a head: 64, but so that widths from 64 up have four heads or more.

    Byte models with one or two heads lose up to 0.1 bits per byte.
    """
    if width >= 256:
        return 64
    if width >= 128:
        return 32
    return 16 if width >= 16 else 8


def flops_per_token(config):
    """Return the training FLOPs per token, an int: 3 x forward, as PyTorch's profiler counts them.

    forward = 2 x (weights in matrix products) + 4 x depth x width x context (attention, in full),
    and 2 x taps x width for each convolution. The trunk works once for a patch, the speller once
    for each token.
    """
    width, patch = config.width, config.patch
    layer = 2 * 16 * width**2 + 4 * width * (config.context // patch) + 4 * config.conv * width
    forward = config.depth * layer // patch + 2 * config.padded_vocab * width
    if patch > 1:
        forward += 2 * 4 * width**2
    return 3 * forward


# -----------------------------------------------------------------------------------------------
# The model.

def has_bf16():
    """Return whether there is a CUDA device that computes in bfloat16, not one that emulates it."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def rotate(x, cos, sin):
    """Return x with each pair (x_i, x_{i + d/2}) turned by the angle of its position.

    x: (B, T, ..., H, d); cos and sin: (T, 1, 1, d / 2). Rotary positions, arXiv 2104.09864.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class Attention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.causal = config.causal
        self.qkv_proj = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x, cos, sin, cache=None):
        B, T, D = x.shape
        qkv = self.qkv_proj(x).view(B, T, 3, self.heads, -1)              # (B, T, 3, H, d)
        q, k = rotate(qkv[:, :, :2], cos, sin).unbind(dim=2)
        v = qkv[:, :, 2]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))                  # (B, H, T, d)
        if cache is not None:
            k, v = cache.append(self, k, v)                               # (B, H, past + T, d)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and T > 1)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):

    def __init__(self, width, hidden):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)                       # (B, T, hidden)
        return self.down(F.silu(gate) * up)


class Convolution(nn.Module):
    """Add to each position a weighted sum of K neighbours, channel by channel; at first nothing.

    Causal: of itself and the K - 1 before it. Else of itself and (K - 1) / 2 on both sides.
    """

    def __init__(self, config):
        super().__init__()
        K = config.conv
        self.padding = (K - 1, 0) if config.causal else (K // 2, K // 2)
        self.weight = nn.Parameter(torch.zeros(config.width, 1, K))

    def forward(self, x, cache=None):
        y = x.transpose(1, 2)                                             # (B, D, T)
        y = F.pad(y, self.padding) if cache is None else cache.extend(self, y)
        return x + F.conv1d(y, self.weight, groups=x.size(2)).transpose(1, 2)


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width)
        self.mlp_norm = nn.RMSNorm(config.width)
        self.attention = Attention(config)
        self.mlp = MLP(config.width, 4 * config.width)
        if config.conv:
            self.attention_conv = Convolution(config)
            self.mlp_conv = Convolution(config)
        self.conv = config.conv > 0
        # Branches of order 1 / depth: the sum over layers keeps its size as depth grows with width.
        self.scale = 2 / config.depth

    def forward(self, x, cos, sin, cache=None):
        h = self.attention_norm(x)
        if self.conv:
            h = self.attention_conv(h, cache)
        x = x + self.scale * self.attention(h, cos, sin, cache)
        h = self.mlp_norm(x)
        if self.conv:
            h = self.mlp_conv(h, cache)
        return x + self.scale * self.mlp(h)


class Speller(nn.Module):
    """Write each token of a patch from what the trunk says of its place, and the tokens before it.

    A token that is `lag` places back in the same patch adds a vector of its own: (token, lag).
    """

    def __init__(self, config):
        super().__init__()
        self.patch = config.patch
        self.vocab_size = config.vocab_size
        self.spread = nn.Linear(config.width, config.patch * config.width, bias=False)
        self.lag_embedding = nn.Embedding((config.patch - 1) * config.vocab_size, config.width)
        self.norm = nn.RMSNorm(config.width)
        self.mlp = MLP(config.width, config.width)

    def forward(self, x, targets):
        """Turn patches x (B, R, D) into their tokens (B, R P, D), given the targets (B, R P)."""
        x = self.spread(x).view(-1, self.patch, x.size(2))                # (B R, P, D)
        tokens = targets.reshape(-1, self.patch)                          # (B R, P)
        for lag in range(1, self.patch):
            rows = (lag - 1) * self.vocab_size + tokens[:, :-lag]
            # Nothing comes from another patch.
            x = x + F.pad(self.lag_embedding(rows), (0, 0, lag, 0))
        return (x + self.mlp(self.norm(x))).view(*targets.shape, -1)


class Transformer(nn.Module):
    """ids (B, T) in [0, vocab_size] -> logits (B, T, vocab_size). Id vocab_size is BOS or MASK.

    With patches the logits also depend on the targets before them in their own patch.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        # Older cards (T4) emulate bfloat16, and that is slower than float32.
        self.bf16 = has_bf16()
        self.embedding = nn.Embedding(config.vocab_size + 1, config.width // config.patch)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.padded_vocab, bias=False)
        self.speller = Speller(config) if config.patch > 1 else None
        self.phase_embedding = None
        if config.phase > 0:
            self.phase_embedding = nn.Embedding(config.phase, config.width)
            phases = torch.arange(config.context) % config.phase          # (T,)
            self.register_buffer("phases", phases, persistent=False)

        frequencies = 10000 ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
        angles = torch.arange(config.context)[:, None] * frequencies      # (T, d / 2)
        self.register_buffer("cos", angles.cos()[:, None, None], persistent=False)
        self.register_buffer("sin", angles.sin()[:, None, None], persistent=False)

        # Activations of order 1 at every width. The head starts at zero: uniform predictions.
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                std = 1.0 if "embedding" in name else weight.size(1) ** -0.5
                nn.init.normal_(weight, std=std)
        nn.init.zeros_(self.head.weight)
        if self.speller is not None:
            # Up to P - 1 of them are added to what the trunk says.
            nn.init.normal_(self.speller.lag_embedding.weight, std=0.3)

    def forward(self, ids, targets=None, cache=None):
        """Return the logits or, given targets (B, T), the loss of each token in nats: (B, T)."""
        logits = self.spell(self.read(ids, cache), targets)
        if targets is None:
            return logits
        nll = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return nll.view_as(targets)

    def read(self, ids, cache=None):
        """Return what the trunk knows of ids (B, T) at each patch: (B, T / P, D)."""
        start = 0 if cache is None else cache.length
        end = start + ids.size(1) // self.config.patch
        cos, sin = self.cos[start:end], self.sin[start:end]
        # Not with a cache: cuDNN would plan its attention anew for each length.
        bf16 = ids.is_cuda and self.bf16 and cache is None
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            # The embeddings of a patch stand side by side.
            x = self.embedding(ids).view(len(ids), end - start, self.config.width)
            if self.phase_embedding is not None:
                x = x + self.phase_embedding(self.phases[start:end])      # (B, T, D)
            for block in self.blocks:
                x = block(x, cos, sin, cache)
        if cache is not None:
            cache.length = end
        return x

    def spell(self, x, targets=None):
        """Return the logits (B, T, V) of what read returned; patches need the targets (B, T)."""
        with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda and self.bf16):
            if self.speller is not None:
                x = self.speller(x, targets)                              # (B, T, D)
            return self.head(self.norm(x))[..., :self.config.vocab_size]

    def count_params(self, embedding=True):
        """Return the number of parameters, with or without embeddings and the output head."""
        return sum(p.numel() for name, p in self.named_parameters()
                   if embedding or not ("embedding" in name or name == "head.weight"))


class KVCache:
    """The keys and values of all tokens that a causal model has read, for Transformer.forward.

    It takes any number of tokens (with patches, of patches) while it is empty, then one at a time.
    Of a convolution it keeps the last inputs.
    """

    def __init__(self, model, batch):
        config = model.config
        shape = (2, batch, config.heads, config.context, config.head_dim)
        self.length = 0
        self.kv = {block.attention: model.head.weight.new_empty(shape) for block in model.blocks}
        self.inputs = {}

    def append(self, attention, k, v):
        """Store k and v (B, H, T, d). Return those of all tokens so far, (B, H, length + T, d)."""
        end = self.length + k.size(2)
        keys, values = self.kv[attention]
        keys[:, :, self.length:end] = k
        values[:, :, self.length:end] = v
        return keys[:, :, :end], values[:, :, :end]

    def extend(self, convolution, y):
        """Return inputs y (B, D, T) behind the K - 1 before them, which are zero at the start."""
        before = convolution.padding[0]
        past = self.inputs.get(convolution, y.new_zeros(*y.shape[:2], before))
        y = torch.cat([past, y], dim=2)
        self.inputs[convolution] = y[:, :, y.size(2) - before:]
        return y


# -----------------------------------------------------------------------------------------------
# The optimizer.

def make_optimizer(model):
    """Return AdamW whose groups have learning rates lr x group["scale"]: one lr for all widths.

    Adam moves every weight equally far, so a matrix with fan-in D moves its output D times as far:
    its rate falls as 1 / width. Embeddings, norms and convolutions act on few numbers each and keep
    theirs. The factors of 10 were found by trial at width 64 and 1e12 FLOPs.
    """
    scale = 64 / model.config.width
    named = dict(model.named_parameters())
    embeddings = [p for name, p in named.items() if "embedding" in name]
    matrices = [p for name, p in named.items()
                if p.dim() == 2 and "embedding" not in name and name != "head.weight"]
    others = [p for p in named.values() if p.dim() != 2]
    groups = [
        {"params": matrices, "scale": scale, "weight_decay": 0.1},
        {"params": [model.head.weight], "scale": 10 * scale, "weight_decay": 0.1},
        {"params": embeddings, "scale": 10, "weight_decay": 0.0},
        {"params": others, "scale": 1, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


# -----------------------------------------------------------------------------------------------
# Sizes and speeds.

def seconds_per_call(call, device):
    """Return the seconds that a call takes, after one to warm up (and to compile)."""
    for _ in range(2):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
    return time.perf_counter() - start


def matmul_flops(device):
    """Return the FLOP/s of large square matrix products: in bfloat16 if it has it, or float32."""
    size = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if device.type == "cuda" and has_bf16() else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / seconds_per_call(lambda: a @ a, device)


# The FLOP/s of matrix products by the data sheets, without sparsity: bfloat16, on a T4 float32.
DATA_SHEET = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12,
              "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "T4": 8.1e12}


def peak_flops(device):
    """Return the FLOP/s that the data sheet of a GPU promises, nan if we do not know it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for card, peak in DATA_SHEET.items() if card in name), math.nan)


def training_step(config, device, tokens, **compiler):
    """Return a function that makes a compiled training step, and the tokens that it reads."""
    model = Transformer(config).to(device)
    optimizer = make_optimizer(model)
    torch.compiler.reset()
    net = torch.compile(model, dynamic=False, **compiler)
    shape = (max(1, tokens // config.context), config.context)
    ids = torch.randint(config.vocab_size, shape, device=device)          # (B, T)

    def step():
        net(ids, ids).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step, ids.numel()


def training_flops(config, device, tokens, **compiler):
    """Return the FLOP/s of training steps on batches of about so many tokens."""
    step, tokens = training_step(config, device, tokens, **compiler)
    # A GPU makes several steps, which it need not wait for.
    steps = 10 if device.type == "cuda" else 1
    seconds = seconds_per_call(lambda: [step() for _ in range(steps)], device) / steps
    return flops_per_token(config) * tokens / seconds


def main():
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    widths = [128, 192, 256, 384, 576, 1024] if cuda else [32, 64, 128, 192, 256, 384]
    parser = argparse.ArgumentParser(description="Print sizes, FLOPs per token and training speed.",
                                     usage=argparse.SUPPRESS)
    parser.add_argument("--vocab", type=int, default=256)
    parser.add_argument("--context", type=int, default=512, help="tokens")
    parser.add_argument("--widths", type=int, nargs="+", default=widths)
    args = parser.parse_args()
    # Batches that each device is made for.
    tokens, peak = 32768 if cuda else 4096, peak_flops(device)
    print("width depth heads   parameters  without embeddings   FLOPs/token   GFLOP/s   of matmul"
          + "   of data sheet" * cuda)
    for width in args.widths:
        try:
            config = Config(args.vocab, args.context, width)
            speed = training_flops(config, device, tokens)
        except ValueError as error:
            parser.error(str(error))
        except torch.OutOfMemoryError:
            parser.error(f"out of memory at width {width}: lower --widths")
        with torch.device("meta"):
            model = Transformer(config)
        print(f"{width:5}{config.depth:6}{config.heads:6}{model.count_params():13,}"
              f"{model.count_params(embedding=False):20,}{flops_per_token(config):14,}"
              f"{speed / 1e9:10,.0f}{speed / matmul_flops(device):12.0%}"
              + f"{speed / peak:16.0%}" * cuda, flush=True)


if __name__ == "__main__":
    main()
