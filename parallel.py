"""One run on one process or many: who takes which part of a batch, in how many pieces.

    torchrun --nproc_per_node=8 train_ar.py --flops 1e20        # the same windows, masks and result as one process

Every process draws the whole batch, which costs next to nothing, and takes its rows of it. DDP adds up the gradients. No step
waits for a GPU: it is handed its batches from pinned memory, and its losses are read once every some steps.
"""
import contextlib
import gc
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from model import memory, windows_that_fit
from run import InputError

MICRO_TOKENS = {"cpu": 8192, "mps": 16384, "cuda": 65536}    # tokens in memory at once; a larger batch is summed over several


class Team:
    """The processes of a run: this one alone, or those that torchrun started. device: as --device has it; theirs is in .device."""

    def __init__(self, device):
        self.rank, self.size, self.device = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), device
        if self.size > 1:
            if device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            # Gradients go by nccl; what the processes have to agree about goes by gloo, which waits for no GPU.
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
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

    def share(self, batch, config):
        """Each process takes its rows of batches of so many windows, micro of them at a time. Raises InputError if they are too few."""
        if batch < self.size:
            raise InputError(f"a batch of {batch} windows is too small for {self.size} processes: take a larger --batch")
        self.count = len(self.rows(batch))
        most = MICRO_TOKENS[self.device.type] // config.context
        if self.device.type == "cuda":
            most = min(most, windows_that_fit(torch.cuda.mem_get_info(self.device)[0], *memory(config)))
        self.limit_micro(max(1, most))

    def rows(self, batch):
        """Ours of the rows of a batch."""
        return range(self.rank * batch // self.size, (self.rank + 1) * batch // self.size)

    def limit_micro(self, most):
        """Read at most so many windows at once, and all pieces of the same shape."""
        self.micro = max(n for n in range(1, self.count + 1) if self.count % n == 0 and n <= most)

    def wrap(self, model):
        """Take the model to train. Its gradients, after backward, are those of all processes."""
        self.net = DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None) if self.size > 1 else model

    def to_device(self, rows):
        """Rows of a batch on our device, without waiting for it."""
        return rows.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else rows.to(self.device)

    def backward(self, score, inputs, weights, ids):
        """Gradients of the weighted mean of nats over a batch (B, T) on the CPU. -> our share of that mean, a tensor. What does not
        fit into memory is tried again in smaller pieces. Raises InputError if one window does not fit."""
        rows = self.rows(len(ids))
        while True:
            try:
                total = 0.0
                for i in range(rows.start, rows.stop, self.micro):
                    part = slice(i, i + self.micro)
                    read, weigh, predict = (self.to_device(whole[part]) for whole in (inputs, weights, ids))
                    with contextlib.nullcontext() if self.size == 1 or part.stop == rows.stop else self.net.no_sync():
                        share = (weigh * score(self.net, read, predict)).sum() / ids.numel()
                        (share * self.size).backward()        # DDP takes the mean over processes, and we want the sum
                    total += share.detach()
                return total
            except torch.OutOfMemoryError:
                if self.micro == 1 or self.size > 1:          # with others waiting for our gradients there is no second try
                    raise InputError(f"{self.micro} windows do not fit into the memory of {self.device}: take a smaller --width, --context "
                                     "or --batch, or fewer processes a machine") from None
                self.limit_micro(self.micro // 2)
                self.net.zero_grad()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()

    def agree(self, *flags):
        """Of each flag: does any process raise it?"""
        if self.size == 1:
            return flags
        raised = torch.tensor(flags, dtype=torch.float32)
        dist.all_reduce(raised)
        return tuple(bool(count) for count in raised)

    def read(self, shares, norms):
        """Our shares of the losses of some steps, and their gradient norms: tensors -> lists of floats, the losses those of all processes.
        Here, and nowhere else in the loop, an accelerator is waited for."""
        losses = torch.stack(shares)
        if self.size > 1:
            dist.all_reduce(losses)
        return losses.tolist(), torch.stack(norms).tolist()

    def leave(self):
        """The last that is done together. DDP goes first: were it the last to hold the processes' group, it would wait for gloo's
        threads, and they for it (for Python's lock)."""
        if self.size > 1:
            self.net = None
            gc.collect()
            dist.destroy_process_group()
