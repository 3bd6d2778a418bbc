"""What the tests share: a folder with real text, and commands run in it as a user runs them."""
import contextlib
import importlib
import io
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

# No test touches a GPU by accident, and sums are always made in the same order.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
# For this process, and for those that it starts.
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)

import pytest  # noqa: E402
import torch  # noqa: E402

from run import run_script  # noqa: E402


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def source_text():
    """Return 300 kB of the interpreter's own library."""
    library = Path(sysconfig.get_path("stdlib"))
    names = ("argparse.py", "tarfile.py", "pydoc.py", "doctest.py")
    return b"".join((library / name).read_bytes() for name in names)[:300_000]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory, source_text):
    """Return a folder with that text in text.txt."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "text.txt").write_bytes(source_text)
    return folder


def command(script, *arguments):
    """Return the command line of a script, "train_ar.py", or of a module, "study.train"."""
    start = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    return [sys.executable, *start, *map(str, arguments)]


def execute(folder, script, *arguments, **options):
    """Run a script in folder. Return a CompletedProcess with text output."""
    return subprocess.run(command(script, *arguments), cwd=folder, capture_output=True, text=True,
                          timeout=200, **options)


def here(folder, script, *arguments):
    """Do the same in this process, which saves the seconds that torch takes to import."""
    main = importlib.import_module(script.removesuffix(".py")).main
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    argv, sys.argv = sys.argv, [script, *map(str, arguments)]
    try:
        with (contextlib.chdir(folder), contextlib.redirect_stdout(stdout),
              contextlib.redirect_stderr(stderr)):
            run_script(main)
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.argv = argv
        torch.use_deterministic_algorithms(False)
    return subprocess.CompletedProcess(arguments, status, stdout.getvalue(), stderr.getvalue())


def assert_one_line(done, *words):
    """Assert that a command ended with status 2 and one line on stderr that holds these words."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    # Lines with \r are progress bars.
    line, = [line for line in done.stderr.split("\n") if line and "\r" not in line]
    assert "error: " in line and all(word in line for word in words), line


def randomize(net, std=1.0):
    """Return net with random numbers in place of the zeros that it starts from."""
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=std)
    return net.eval()
