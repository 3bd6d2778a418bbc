"""E15, at the small budget: patches of 16. It trains both runs when it is imported, in seconds."""
import subprocess
import sys
import tempfile
from pathlib import Path

import model
import train_mdm

PREDICT = {
    "bits per byte that your best run gains over plain MDM": 0.9,
}

ROOT = Path(model.__file__).parent
RUNS = tempfile.TemporaryDirectory()


def train(name, *flags):
    """Train a run at 2e10 FLOPs. Return its folder."""
    out = Path(RUNS.name) / name
    command = [ROOT / "train_mdm.py", "--data", DATA, "--out", out, "--device", "cpu", *flags]
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
    return out


DATA = str(ROOT / "exercises/speeches.txt")
BASELINE = train("baseline", "--flops", "2e10", "--width", 32)
BEST = train("best", "--flops", "2e10", "--width", 32, "--patch", 16)
MODEL = model.Transformer
LOSS = train_mdm.loss
EVALUATE = train_mdm.evaluate
