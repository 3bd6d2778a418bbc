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
import run  # noqa: E402
import sample  # noqa: E402
import train_ar  # noqa: E402
import train_mdm  # noqa: E402
from model import Config, Transformer, make_optimizer  # noqa: E402


def try_out(config, device):
    with torch.device(device):
        model = Transformer(config)
    optimizer = make_optimizer(model)
    ids = torch.zeros(4, config.context, dtype=torch.long)
    if config.causal:
        inputs, weights = train_ar.corrupt(ids, config.vocab_size, patch=config.patch)
    else:
        options = {"span": max(2, config.patch), "span_share": 0.5}
        inputs, weights = train_mdm.corrupt_mixed(ids, config.vocab_size, None, **options)
    for _ in range(2):
        x, y, w = run.to_device(device, inputs, ids, weights)
        w[:1] = 0
        loss = (w * model(x, y)).sum() / ids.numel()
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert loss.device.type == norm.device.type == device.type
    text = y[:2, :8]
    if config.causal:
        list(sample.generate(model, text, 2 * config.context, top_k=5))
    else:
        sample.spell_out(model, model.read(x))
    script = train_ar if config.causal else train_mdm
    assert script.loss(model, y, None).device.type == device.type
    assert sample.token_bits(model, y[0]).device.type == device.type
    try:
        model(inputs, y)
    except RuntimeError as error:
        assert "two devices" in str(error)
    else:
        raise AssertionError("a mix of devices is not seen")


_setup_privateuseone_for_python_backend("pretended")
with FakeTensorMode(allow_non_fake_inputs=True):
    for options in ({}, {"conv": 3, "patch": 4}, {"phase": 4}):
        for causal in (True, False):
            try_out(Config(300, 32, 64, causal, **options), torch.device("pretended:0"))
            print("causal" if causal else "masked", options, "no two devices are mixed")
