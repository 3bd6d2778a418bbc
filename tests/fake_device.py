"""Train a step, write and score on a device that is not the CPU, on a machine that has none.

PyTorch makes tensors there with a shape, a type and a device, and no data. What would mix two
devices on a GPU fails here, too.
"""
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad_norm_
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model as plain  # noqa: E402
import run  # noqa: E402
import sample  # noqa: E402
import train_ar  # noqa: E402
import train_mdm  # noqa: E402
from study import train as study  # noqa: E402
from study import variants  # noqa: E402


def try_out(net, corrupt, device):
    config, optimizer = net.config, plain.make_optimizer(net)
    ids = torch.zeros(4, config.context, dtype=torch.long)
    inputs, weights = corrupt(ids, config.vocab_size, None)
    for _ in range(2):
        x, y, w = run.to_device(device, inputs, ids, weights)
        loss = (w * net(x, y)).sum() / ids.numel()
        loss.backward()
        norm = clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert loss.device.type == norm.device.type == device.type
    # The same on a GPU, where the ids already are.
    assert corrupt(y, config.vocab_size, None)[1].device.type == device.type
    try:
        net(inputs, y)
    except RuntimeError as error:
        assert "two devices" in str(error)
    else:
        raise AssertionError("a mix of devices is not seen")


_setup_privateuseone_for_python_backend("pretended")
device = torch.device("pretended:0")
with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
    causal, masked = (plain.Transformer(plain.Config(300, 16, 64, causal))
                      for causal in (True, False))
    convolved = variants.Transformer(variants.Config(300, 16, 64, False, conv=3, patch=4))
with FakeTensorMode(allow_non_fake_inputs=True):
    try_out(causal, train_ar.corrupt, device)
    try_out(masked, train_mdm.corrupt, device)
    try_out(convolved, study.corrupt_spans, device)
    text = torch.zeros(2, 4, dtype=torch.long, device=device)
    list(sample.generate(causal, text, 14, top_k=5))
    for net in (causal, masked):
        assert sample.token_bits(net, text[0]).device.type == device.type
print("no two devices are mixed")
