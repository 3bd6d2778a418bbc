"""What the tests share: a folder with real text, and commands run in it as a user runs them."""
import contextlib
import importlib
import io
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

# No test touches a GPU by accident, and sums are always made in the same order.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def library_text():
    """Return 300 kB of the interpreter's own library."""
    library = Path(sysconfig.get_path("stdlib"))
    names = ("argparse.py", "tarfile.py", "pydoc.py", "doctest.py")
    return b"".join((library / name).read_bytes() for name in names)[:300_000]


@pytest.fixture(scope="session")
def source_text():
    return library_text()


@pytest.fixture(scope="session")
def workplace(tmp_path_factory, source_text):
    """A folder with that text in text.txt."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "text.txt").write_bytes(source_text)
    return folder


def command(script, *arguments):
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def execute(folder, script, *arguments, **options):
    """Run a script in folder. Return a CompletedProcess with text output."""
    return subprocess.run(command(script, *arguments), cwd=folder, capture_output=True, text=True,
                          timeout=200, **options)


def here(folder, script, *arguments):
    """Do the same in this process, which saves the seconds that torch takes to import."""
    import torch

    from run import run_script
    main = importlib.import_module(script.removesuffix(".py")).main
    stdout, stderr = io.StringIO(), io.StringIO()
    before, argv = Path.cwd(), sys.argv
    status = 0
    try:
        os.chdir(folder)
        sys.argv = [script, *map(str, arguments)]
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            run_script(main)
    except SystemExit as stop:
        status = stop.code
    finally:
        os.chdir(before)
        sys.argv = argv
        torch.use_deterministic_algorithms(False)
    return subprocess.CompletedProcess(arguments, status, stdout.getvalue(), stderr.getvalue())


def assert_one_line(done, *words):
    """Assert that a command ended with status 2 and one line on stderr that holds these words."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
