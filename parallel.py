"""One run on one process or many: who takes which part of a batch, in how many pieces.

    torchrun --nproc_per_node=8 train_ar.py --flops 1e20        # the same windows, masks and result as one process

Every process draws the whole batch, which costs next to nothing, and takes its rows of it. DDP adds up the gradients.
"""
import contextlib
import os
import sys
from collections import deque
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from run import InputError

MICRO_TOKENS = {"cpu": 8192, "mps": 16384, "cuda": 65536}    # tokens in memory at once; a larger batch is summed over several


class Team:
    """The processes of a run: this one alone, or those that torchrun started. device: as --device has it; theirs is in .device."""

    def __init__(self, device):
        self.rank, self.size, self.device = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), device
        self.flags = deque()
        if self.size > 1:
            if device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
        if self.rank:
            sys.stdout = open(os.devnull, "w")                # the first one speaks, and writes, for all

    @contextlib.contextmanager
    def first(self):
        """The first process does what follows alone; then the others, who find it done."""
        if self.rank:
            dist.barrier()
        yield
        if self.size > 1 and not self.rank:
            dist.barrier()

    def share(self, batch, context):
        """Each process takes its rows of batches of so many windows, micro of them at a time. Raises InputError if they are too few."""
        if batch < self.size:
            raise InputError(f"a batch of {batch} windows is too small for {self.size} processes: take a larger --batch")
        self.count = len(self.rows(batch))
        self.limit_micro(max(1, MICRO_TOKENS[self.device.type] // context))

    def rows(self, batch):
        """Ours of the rows of a batch."""
        return range(self.rank * batch // self.size, (self.rank + 1) * batch // self.size)

    def limit_micro(self, most):
        """Read at most so many windows at once, and all pieces of the same shape."""
        self.micro = max(n for n in range(1, self.count + 1) if self.count % n == 0 and n <= most)

    def wrap(self, model):
        """The model to train through. Its gradients, after backward, are those of all processes."""
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None) if self.size > 1 else model

    def backward(self, score, net, inputs, weights, ids):
        """Gradients of the weighted mean of nats over a batch (B, T). -> our share of that mean, a tensor. What does not fit into
        memory is tried again in smaller pieces. Raises InputError if one window does not fit."""
        rows = self.rows(len(ids))
        while True:
            try:
                total = 0.0
                for i in range(rows.start, rows.stop, self.micro):
                    part = slice(i, i + self.micro)
                    with contextlib.nullcontext() if self.size == 1 or part.stop == rows.stop else net.no_sync():
                        share = (weights[part] * score(net, inputs[part], ids[part])).sum() / ids.numel()
                        (share * self.size).backward()        # DDP takes the mean over processes, and we want the sum
                    total += share.detach()
                return total
            except torch.OutOfMemoryError:
                if self.micro == 1 or self.size > 1:          # with others waiting for our gradients there is no second try
                    raise InputError(f"{self.micro} windows do not fit into the memory of {self.device}: take a smaller --width, --context "
                                     "or --batch, or fewer processes a machine") from None
                self.limit_micro(self.micro // 2)
                net.zero_grad()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()

    def agree(self, loss, stopping):
        """Our share of the loss and whether we were told to stop -> the loss of all, and whether any was told, a little later: the
        answer is that of two steps ago, so that no accelerator is waited for."""
        if self.size == 1:
            return loss, stopping
        told = torch.tensor([0.0, stopping], device=self.device)
        told[0] = loss
        dist.all_reduce(told)
        self.flags.append(told[1])
        return told[0], len(self.flags) > 2 and self.flags.popleft().item() > 0

    def leave(self):
        if self.size > 1:
            dist.destroy_process_group()
