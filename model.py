"""The one Transformer, its FLOPs, its optimizer, its checkpoints.

    python model.py             # sizes, FLOPs per token, memory, and training speed beside this machine's matmul peak
    python model.py --vocab 32768 --context 2048 --widths 576 768 1024 1344 1664 --timed 0      # the paper's range, on paper

A standard decoder block (RMSNorm, RoPE, SwiGLU, no biases), causal or not; depth and heads follow from the width, as in
SMDM (arXiv 2410.18514): width 576 has 9 layers and 48M non-embedding parameters. It is scaled so that the best learning
rate does not move with the width: see Transformer (initialization, residual branches) and make_optimizer.
"""
import argparse
import errno
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from bpe import Tokenizer
from run import InputError, run_script, usage_error, write_atomic


@dataclass(frozen=True)
class Config:
    """The shape of a model. context is in tokens. Raises InputError for a width that the heads do not divide."""
    vocab_size: int = 256
    context: int = 512
    width: int = 128
    causal: bool = True

    def __post_init__(self):
        if min(self.vocab_size, self.context, self.width) < 1:
            raise InputError(f"vocabulary, context and width are at least 1, not {self.vocab_size}, {self.context} and {self.width}")
        if self.width % self.head_dim:
            raise InputError(f"width {self.width} is not a multiple of the head dimension {self.head_dim}")

    @property
    def head_dim(self):
        return head_dim(self.width)

    @property
    def heads(self):
        return self.width // self.head_dim

    @property
    def depth(self):
        return max(2, self.width // 64)

    @property
    def outputs(self):
        """Columns of the output layer: the vocabulary, up to a multiple of 64, which is what tensor cores take."""
        return 64 * -(-self.vocab_size // 64)


def head_dim(width):
    """The dimension of a head. Four heads or more from width 64 up: with one or two, byte models lose 0.02 (AR) to 0.1 bits per byte (MDM)."""
    return next(dim for dim, least in ((64, 256), (32, 128), (16, 16), (8, 0)) if width >= least)


def nearest_width(width):
    """The nearest width to any positive number that is of whole heads."""
    return head_dim(width) * max(1, round(width / head_dim(width)))


def flops_per_token(config):
    """Training FLOPs per token, forward and backward: 3 x (2 x weights in matrix products + 4 x depth x width x context)."""
    weights = 16 * config.width**2 * config.depth + config.outputs * config.width
    return 3 * (2 * weights + 4 * config.depth * config.width * config.context)


def memory(config):
    """Bytes that training takes in bf16 autocast: -> (at any batch, more for each window in memory at once).

    At any batch: weights, gradients and AdamW's two moments in float32. For each window: what the forward pass keeps for the
    backward, counted on fake tensors that take no memory, and the gradient of the logits. Compiled code keeps less.
    """
    one, two = kept_for_backward(config, 1), kept_for_backward(config, 2)
    with torch.device("meta"):
        params = Transformer(config).params()
    return 16 * params + one - (two - one), two - one + 6 * config.outputs * config.context


def kept_for_backward(config, windows):
    """Bytes that the forward pass of so many windows keeps for the backward, the weights themselves aside."""
    with FakeTensorMode():
        model, ids = Transformer(config), torch.zeros(windows, config.context, dtype=torch.long)
        storages = {p.untyped_storage()._cdata: 0 for p in model.parameters()}

        def keep(tensor):
            storages.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes())
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
            graph = nats(model, ids, ids)                     # it holds all that is kept, so that no two have the same address
        assert graph.requires_grad
        return sum(storages.values())


def windows_that_fit(free, always, window):
    """How many windows go into 90% of so many bytes of a GPU's memory, by what memory() says of the model."""
    return max(0, int((0.9 * free - always) / window))


def h100_hours(flops):
    """Hours of one H100 at 40% of the 989 TFLOP/s of its data sheet (bf16, dense)."""
    return flops / (0.4 * 989e12 * 3600)


def flops_per_byte(width, tokenizer, vocab_size, context_bytes):
    """About the training FLOPs per byte of text, before the text is at hand: at four bytes a BPE token."""
    each = 4 if tokenizer == "bpe" else 1
    return flops_per_token(Config(vocab_size if tokenizer == "bpe" else 256, max(1, context_bytes // each), width)) / each


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), each branch scaled by 2 / depth."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.causal = config.heads, config.causal
        # With branches of order 1 / depth the sum of all the layers' updates keeps its size as depth grows with width
        # (CompleteP, arXiv 2505.01618). The factor is 1 at depth 2, the smallest.
        self.scale = 2 / config.depth
        self.norm_attention, self.norm_mlp = nn.RMSNorm(config.width), nn.RMSNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.mix = nn.Linear(config.width, config.width, bias=False)
        self.gate_up = nn.Linear(config.width, 8 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x, cos, sin, past=None):                            # (B, T, D), (T, 1, 1, d / 2) twice
        B, T, D = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(B, T, 3, self.heads, -1)                        # (B, T, 3, H, d)
        (q, k), v = rotate(qkv[:, :, :2], cos, sin).unbind(2), qkv[:, :, 2]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)                           # (B, H, T, d)
        if past is not None:
            k, v = past.extend(self, k, v)                                                          # (B, H, past + T, d)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and T > 1)
        x = x + self.scale * self.mix(y.transpose(1, 2).reshape(B, T, D))
        gate, up = self.gate_up(self.norm_mlp(x)).chunk(2, dim=-1)        # (B, T, 4 D)
        return x + self.scale * self.down(F.silu(gate) * up)


def rotate(x, cos, sin):
    """Rotary position embedding (arXiv 2104.09864): turn each pair (x_i, x_{i + d/2}) by its position's angle. (B, T, 2, H, d)"""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class Transformer(nn.Module):
    """(B, T) ids in [0, vocab_size] -> (B, T, vocab_size) logits, T <= context. Id vocab_size, the spare row, is START or MASK."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size + 1, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.outputs, bias=False)
        angles = torch.arange(config.context)[:, None] * 10000 ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
        self.register_buffer("cos", angles.cos()[:, None, None], persistent=False)                  # (T, 1, 1, d / 2)
        self.register_buffer("sin", angles.sin()[:, None, None], persistent=False)
        # Activations of order 1 at every width: matrices of variance 1 / fan-in. The output starts at zero: the first
        # predictions are uniform, 8 bits per byte.
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=1 if name == "embedding.weight" else weight.size(1) ** -0.5)
        nn.init.zeros_(self.head.weight)

    def forward(self, ids, past=None):
        start = past.length if past is not None else 0
        place = slice(start, start + ids.size(1))
        x = self.embedding(ids)                                           # (B, T, D)
        for block in self.blocks:
            x = block(x, self.cos[place], self.sin[place], past)
        if past is not None:
            past.length = place.stop
        return self.head(self.norm(x))[..., :self.config.vocab_size]

    def params(self, embedding=True):
        """The number of parameters, with or without the embedding and the output head."""
        outer = self.embedding.weight.numel() + self.head.weight.numel()
        return sum(p.numel() for p in self.parameters()) - (0 if embedding else outer)


class Cache:
    """Keys and values of what a causal model has read, for forward's past: first any number of tokens, then one at a time."""

    def __init__(self, model, batch):
        config, like = model.config, model.head.weight
        shape = (2, batch, config.heads, config.context, config.head_dim)
        self.kept, self.length = {block: torch.empty(shape, device=like.device, dtype=like.dtype) for block in model.blocks}, 0

    def extend(self, block, k, v):
        """Keep k and v (B, H, T, d) behind those of the tokens before: -> all of them, (B, H, length + T, d) twice."""
        stop = self.length + k.size(2)
        self.kept[block][0, :, :, self.length:stop], self.kept[block][1, :, :, self.length:stop] = k, v
        return self.kept[block][:, :, :, :stop]


def nats(model, inputs, targets):
    """-log p of each target: (B, T) ids, (B, T) ids -> (B, T) float32, in nats."""
    with torch.autocast("cuda", torch.bfloat16, enabled=inputs.is_cuda):
        logits = model(inputs)                                            # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)


def make_optimizer(model, weight_decay=0.1):
    """AdamW as in SMDM, its learning rates scaled as in muP (arXiv 2203.03466), so that one rate serves all widths.

    Adam moves every weight equally far, so a matrix of fan-in D moves its output D times as far: its rate falls as
    1 / width. Embeddings and gains act on one number each, and keep theirs. The factors of 10 at both ends were found by
    trial, at width 64 and 1e12 FLOPs. Each group holds its factor as "scale"; the training loop sets
    lr = rate(step) * scale.
    """
    width = model.config.width
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    gains = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "scale": 64 / width, "weight_decay": weight_decay},
              {"params": [model.head.weight], "scale": 10 * 64 / width, "weight_decay": weight_decay},
              {"params": [model.embedding.weight], "scale": 10},
              {"params": gains, "scale": 1}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=matrices[0].device.type in ("cpu", "cuda"))


def save_checkpoint(path, **state):
    """Write the tensors and plain values in state to path, atomically. Raises OSError if it can't be written whole."""
    def write(file):
        try:
            torch.save(state, file)
        except RuntimeError as error:                                     # torch's word for a full disk
            raise OSError(errno.EIO, str(error).splitlines()[0]) from None
    write_atomic(path, write)


def load_checkpoint(path):
    """What save_checkpoint wrote, on the CPU; no code in the file is run. Raises InputError if it is not whole."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:                                            # torch has no class of its own for a torn or foreign file
        raise InputError(f"{path} is torn or not a checkpoint ({type(error).__name__}): delete it, or take another --out") from None
    if not isinstance(state, dict) or "settings" not in state:
        raise InputError(f"{path} is not a checkpoint of ours: delete it, or take another --out")
    return state


def load_model(folder, device="cpu"):
    """The model of a run folder, the settings of the run, and its tokenizer. Raises InputError."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        raise InputError(f"there is no {path}")
    state = load_checkpoint(path)
    settings = state["settings"]
    model = Transformer(Config(settings["vocab_size"], settings["context_tokens"], settings["width"], causal=settings["objective"] == "ar"))
    model.load_state_dict(state["model"])
    return model.to(device).eval(), settings, Tokenizer.from_hex(state["merges"])


def pick_device(name):
    """"auto", or a device's name -> torch.device. Raises InputError for one that is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"there is no device {name!r} here") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"no training on device {name!r}: take cpu, cuda or mps")
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)                          # compiled code would add up embedding gradients in any order
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")                        # TF32 for what bf16 autocast leaves in float32
    return device


def synchronize(device):
    """Wait until an accelerator has done what it was asked; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_per_call(call, device, calls=3):
    """The least of the times of some calls, after one to warm up."""
    times = []
    for _ in range(calls + 1):
        began = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def matmul_peak(device):
    """FLOP/s of large square matrix products: bf16 on CUDA, else float32."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / seconds_per_call(lambda: a @ a, device)


def training_step(config, batch, device):
    """A compiled training step (forward, backward, clipping, AdamW) on a batch of batch tokens: -> (a function, the tokens in a batch)"""
    model = Transformer(config).to(device)
    optimizer = make_optimizer(model)
    torch.compiler.reset()                                                # or the second shape would be compiled for any shape
    score = torch.compile(nats, dynamic=False)
    ids = torch.randint(config.vocab_size, (max(1, batch // config.context), config.context), device=device)

    def step():
        score(model, ids, ids).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step, ids.numel()


def training_speed(config, batch, device):
    """FLOP/s of training steps."""
    step, tokens = training_step(config, batch, device)
    return flops_per_token(config) * tokens / seconds_per_call(step, device)


def main():
    parser = argparse.ArgumentParser(description="Print sizes, FLOPs per token, memory, and training speed beside the matmul peak.")
    parser.error = usage_error
    parser.add_argument("--vocab", type=int, default=256)
    parser.add_argument("--context", type=int, default=512, help="tokens")
    parser.add_argument("--batch", type=int, default=4096, help="tokens in a step")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 192, 256, 384, 576, 768, 1024, 1664])
    parser.add_argument("--timed", type=int, default=7, help="how many of the widths, from the first, are timed")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    print(f"{device}, {torch.get_num_threads()} threads, context {args.context}, vocabulary {args.vocab}, batches of {args.batch:,} tokens, "
          "compiled; memory in bf16 autocast: at any batch, for each window, and how many fit; speeds in GFLOP/s and as a share of this "
          "machine's matmul peak, measured in turn")
    print("".join(f"{title:>{w}}" for title, w in (("width", 6), ("depth", 6), ("heads", 6), ("parameters", 15), ("non-embedding", 15),
                                                  ("FLOPs/token", 16), ("GiB", 8), ("+ a window", 12), ("in 80 GB", 10),
                                                  ("peak", 8), ("AR", 8), ("", 6), ("MDM", 8))))
    for i, width in enumerate(args.widths):
        config = Config(args.vocab, args.context, width)
        with torch.device("meta"):
            model = Transformer(config)
        always, window = memory(config)
        row = (f"{width:>6}{config.depth:>6}{config.heads:>6}{model.params():>15,}{model.params(embedding=False):>15,}{flops_per_token(config):>16,}"
               f"{always / 2**30:>8.2f}{window / 2**30:>12.3f}{windows_that_fit(80e9, always, window):>10,}")
        if i < args.timed:
            peak = matmul_peak(device)
            ar, mdm = (training_speed(Config(args.vocab, args.context, width, causal), args.batch, device) for causal in (True, False))
            peak = max(peak, matmul_peak(device))             # before and after: others may be using the machine
            row += f"{peak / 1e9:>8,.0f}{ar / 1e9:>8,.0f}{ar / peak:>6.0%}{mdm / 1e9:>8,.0f}{mdm / peak:>6.0%}"
        print(row, flush=True)
    print("H100-hours at 40% of 989 TFLOP/s: " + ", ".join(f"{flops:.0e} FLOPs {h100_hours(flops):,.1f}" for flops in (1e18, 1e19, 1e20, 1e21)))


if __name__ == "__main__":
    run_script(main)
