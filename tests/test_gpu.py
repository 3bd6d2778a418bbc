"""tests/accept.sh: what is run on a first GPU, dry. What needs a GPU is in tests/gpu.py."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = ROOT / "tests/accept.sh"


def start(folder, task, path):
    """Start a task of accept.sh on a CPU. Its python3 is looked for in path first."""
    environment = os.environ | {"DRY": "1", "PATH": f"{path}:{os.environ['PATH']}"}
    environment.pop("OUT", None)
    return subprocess.Popen(["bash", SCRIPT, task], cwd=folder, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def table(folder, part):
    """Return the table of a part: {step: (expected, found, ok)}."""
    lines = (folder / f"runs/accept/{part}.md").read_text().splitlines()
    return {step: cells for step, *cells in (line[2:-2].split(" | ") for line in lines[2:])}


def test_dry_run(tmp_path):
    """Both parts run, side by side, and all is as it should be."""
    python = Path(sys.executable).parent
    output = start(tmp_path, "expect", python).communicate(timeout=200)[0]
    assert (tmp_path / "runs/accept/expected.txt").exists(), output
    parts = {part: start(tmp_path, part, python) for part in ("1", "2")}
    for part, process in parts.items():
        output = process.communicate(timeout=200)[0]
        assert process.returncode == 0, output
        assert {cells[-1] for cells in table(tmp_path, part).values()} <= {"yes", "keep", "drop"}
    assert {"truth", "ddp", "speed", "variants", "profile"} <= set(table(tmp_path, "1"))
    found = table(tmp_path, "2")
    # On a CPU a run that was stopped, and one that is repeated, are the same to the last digit.
    for name in ("the stopped run", "mdm-bpe at 1e12"):
        expected, loss, _ = found[f"{name}: bits per byte"]
        assert expected == f"{loss}, within 0.02"


@pytest.mark.parametrize("part, seconds, steps", [
    ("1", 400, ["truth"]), ("2", 300, ["default", "a stopped run", "resume", "sample", "parity"])])
def test_steps_that_fail(tmp_path, part, seconds, steps):
    """Nothing works: part 1 ends after its first step, part 2 goes on. The limits have a sum."""
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    process = start(tmp_path, part, tmp_path)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1, output
    assert [(step, cells[-1]) for step, cells in table(tmp_path, part).items()] == [
        (step, "NO") for step in steps]
    body = re.search(rf"^part{part}\(\) {{(.*?)^}}", SCRIPT.read_text(), re.S | re.M)[1]
    assert sum(map(int, re.findall(r"step \w+ (\d+)", body))) == seconds
