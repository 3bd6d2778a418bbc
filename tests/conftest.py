"""What the tests share: the project on the path, real text of a size that a test can train on, and commands run as a user runs them."""
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def source_text():
    """300 kB of the interpreter's own library."""
    library = Path(sysconfig.get_path("stdlib"))
    return b"".join((library / name).read_bytes() for name in ("argparse.py", "tarfile.py", "pydoc.py", "doctest.py"))[:300_000]


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
