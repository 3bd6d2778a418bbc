"""The lecture, cell by cell without Jupyter; the platforms, with their folders rebuilt.

    python -m pytest exercises/solutions -n 2
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import grade
import pytest

pytestmark = pytest.mark.exercises
SOLUTIONS = Path(__file__).resolve().parent
EXERCISES = SOLUTIONS.parent
ROOT = EXERCISES.parent


@pytest.fixture
def copy(tmp_path):
    """A copy of the repository, as students have it."""
    grade.copy_repository(tmp_path / "source", EXERCISES / "e01_bpb.py", "e01")
    return tmp_path / "source"


def execute(command, folder, **environment):
    return subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True,
                          timeout=300, env=os.environ | environment)


def test_the_cells_of_the_lecture_run_in_order(copy):
    text = (EXERCISES / "lecture.ipynb").read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 8 and all(cell["outputs"] == [] for cell in cells)
    sources = ["".join(cell["source"]) for cell in cells]
    assert not any(line.startswith(("!", "%")) for text in sources for line in text.split("\n"))
    assert sources[0].count('"1e11"') == 1
    script = "\n\n\n".join(sources).replace('"1e11"', '"3e9"')
    (copy / "exercises" / "lecture.py").write_text(script)
    # Opened in exercises/, with figures that nobody sees.
    done = execute([sys.executable, "lecture.py"], copy / "exercises", MPLBACKEND="agg",
                   PYTHONUTF8="1")
    assert done.returncode == 0, done.stderr
    for line in ["ready in", "8.00 bits per byte if", "no mask: ", "jointly: the loss is 0.5 bits",
                 "T / k: deviation 0.0%", "most confident first  ???", "random order          ???",
                 "mdm on bpe: ", "ar: at 3e+12 FLOPs", "with E = 0.3"]:
        assert line in done.stdout, (line, done.stdout)
    assert "causal mask: the loss is 1.10 nats per token, the sum of all probabilities is 1.00" \
        in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="Gradescope is Linux")
def test_gradescope_gets_its_results(tmp_path):
    # /autograder: source, which the zip holds; submission; results; and what setup.sh installs.
    platform = EXERCISES / "platforms/gradescope"
    grade.copy_repository(tmp_path / "source", EXERCISES / "e02_flops.py", "e02")
    for name in ("submission", "results", "venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    python = tmp_path / "venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    shutil.copy(platform / "run_autograder", tmp_path)
    for name in ("e01_bpb.py", "e02_flops.py"):
        shutil.copy(SOLUTIONS / name, tmp_path / "submission")
    path = tmp_path / "submission/e02_flops.py"
    path.write_text(path.read_text().replace("return 3 *", "return 2 *"))
    done = execute([tmp_path / "run_autograder"], tmp_path, AUTOGRADER=str(tmp_path))
    assert done.returncode == 0, done.stderr
    tests = json.loads((tmp_path / "results/results.json").read_text())["tests"]
    assert [(test["name"], test["score"], test["max_score"]) for test in tests] == [
        ("e01", 1, 1), ("e02", 0, 1), ("e03", 0, 1)]
    assert "predicted 3.333, truth 3.104" in tests[0]["output"]
    assert "the backward pass is counted once" in tests[1]["output"]
    assert tests[2]["output"] == "blank"


def test_any_ci_reads_the_status(tmp_path):
    shutil.copy(SOLUTIONS / "e01_bpb.py", tmp_path)
    for exercise, status in (("e01", 0), ("e02", 1)):
        done = execute([sys.executable, EXERCISES / "grade.py", tmp_path, "--json",
                        tmp_path / "result.json", "--exercises", exercise], tmp_path)
        assert done.returncode == status, done.stderr


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs git")
def test_the_zip_for_gradescope_holds_what_it_needs_and_no_solutions(tmp_path):
    text = (EXERCISES / "platforms/README.md").read_text()
    command = text.split("```\n")[1].replace("\\\n", "").replace("gradescope.zip",
                                                                 f"{tmp_path}/gradescope.zip")
    assert command.startswith("git archive")
    done = execute(command.split(), ROOT)
    assert done.returncode == 0, done.stderr
    shutil.unpack_archive(tmp_path / "gradescope.zip", tmp_path)
    assert (tmp_path / "setup.sh").exists() and (tmp_path / "run_autograder").exists()
    assert (tmp_path / "exercises/grade.py").exists() and (tmp_path / "requirements.txt").exists()
    assert not (tmp_path / "exercises/solutions").exists()
