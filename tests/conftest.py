"""What the tests share: the project on the path, real text of a size that a test can train on, and commands run as a user runs them."""
import contextlib
import importlib
import io
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)                                      # as the commands below, so that both add up in the same order


def library_text():
    """300 kB of the interpreter's own library."""
    library = Path(sysconfig.get_path("stdlib"))
    return b"".join((library / name).read_bytes() for name in ("argparse.py", "tarfile.py", "pydoc.py", "doctest.py"))[:300_000]


@pytest.fixture(scope="session")
def source_text():
    return library_text()


@pytest.fixture(scope="session")
def workplace(tmp_path_factory, source_text):
    """A folder with that text in text.txt: the current folder of the commands of a test module."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "text.txt").write_bytes(source_text)
    return folder


def command(script, *arguments):
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def environment(**extra):
    return os.environ | {"OMP_NUM_THREADS": "1"} | extra


def execute(folder, script, *arguments, **extra):
    """Run a script in folder to its end: -> CompletedProcess with text output."""
    return subprocess.run(command(script, *arguments), cwd=folder, env=environment(**extra), capture_output=True, text=True, timeout=240)


def here(folder, script, *arguments):
    """The same in this process, which spares the two seconds that torch takes to import. (What the process leaves behind, such as
    its threads, is not tested so: some tests of each script use execute.)"""
    before, out, err = (Path.cwd(), sys.argv), io.StringIO(), io.StringIO()
    main, status = importlib.import_module(script.removesuffix(".py")).main, 0
    from run import run_script
    try:
        os.chdir(folder)
        sys.argv = [str(ROOT / script), *map(str, arguments)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_script(main)
    except SystemExit as stop:
        status = stop.code or 0
        if isinstance(status, str):
            err.write(status + "\n")
            status = 1
    finally:
        os.chdir(before[0])
        sys.argv = before[1]
        torch.use_deterministic_algorithms(False)
    return subprocess.CompletedProcess(sys.argv, status, out.getvalue(), err.getvalue())


def assert_one_line(done, *words):
    """It ended with status 2 and one line on stderr, which holds these words."""
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, (done.returncode, done.stderr)
    assert all(word in done.stderr for word in words), done.stderr
