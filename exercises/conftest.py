"""What the exercises share: loading an answer, short messages, predictions beside truths.

    python -m pytest exercises -k e04 [--answers FOLDER]
"""
import importlib.util
import numbers
import os
import sys
import traceback
from pathlib import Path

import pytest

# Small matrices are fastest on one core, and sums are always made in the same order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

# Only test_*.py is collected: a mistake in one exercise must not stop the test of another.
collect_ignore = ["solutions", "grade.py"]
collect_ignore_glob = ["e[0-9]*.py", "solutions/e[0-9]*.py", "solutions/wrong.py"]
REVEALED = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--answers", type=Path, default=HERE, metavar="FOLDER",
                     help="the folder with the student's eNN_*.py (default: exercises)")


def pytest_configure(config):
    config.stash[REVEALED] = []


# -----------------------------------------------------------------------------------------------
# The student's answer.

def load_answer(folder, exercise):
    """Return the module FOLDER/eNN_*.py. Fail if it is not there, or predicts nothing yet."""
    files = sorted(Path(folder).glob(f"{exercise}_*.py"))
    if len(files) != 1:
        pytest.fail(f"{exercise}: {len(files)} files {exercise}_*.py in {folder}, and not one",
                    pytrace=False)
    spec = importlib.util.spec_from_file_location(f"answer_{exercise}", files[0])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    for question, number in module.PREDICT.items():
        if isinstance(number, bool) or not isinstance(number, numbers.Real):
            pytest.fail(f'predict first: give a number to "{question}" in PREDICT of '
                        f"{files[0].name}. It is not graded", pytrace=False)
    return module


def explain(error, exercise):
    """Return what to tell the student of an exception which is not a failed check: a str."""
    if isinstance(error, SyntaxError):
        return "".join(traceback.format_exception_only(error))
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).name.startswith(f"{exercise}_")]
    kind = f"{type(error).__name__}: {error}"
    # torch has a NotImplementedError too, which says more.
    if own and isinstance(error, NotImplementedError) and not str(error):
        return f"{exercise}: {own[-1].name} is not written yet"
    if own:
        return "".join(traceback.format_list(own)) + kind
    return (f"{exercise}: the test cannot use what your function returned: compare it with the "
            f"docstring ({kind})")


@pytest.fixture
def answer(request):
    """The student's module. It is loaded when the test begins (see pytest_pyfunc_call)."""


@pytest.fixture
def reveal(request):
    """A function that takes the truths, {question: number}, and keeps them for the summary."""
    def keep(truths):
        predictions = request.node.funcargs["answer"].PREDICT
        request.config.stash[REVEALED] += [
            (request.node.name[5:8], question, predictions.get(question, "?"), truth)
            for question, truth in truths.items()]
    return keep


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    # In a fixture, a failure would be reported as an error of the test.
    if "answer" in pyfuncitem.funcargs:
        folder = pyfuncitem.config.getoption("--answers")
        pyfuncitem.funcargs["answer"] = load_answer(folder, pyfuncitem.name[5:8])


# -----------------------------------------------------------------------------------------------
# What the student sees.

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.excinfo and "answer" in item.fixturenames:
        error = call.excinfo.value
        if not isinstance(error, pytest.fail.Exception):
            report.longrepr = explain(error, item.name[5:8])
    return report


def show(number):
    """Return a number with four digits, anything else as it is: a str."""
    return f"{number:,.4g}" if isinstance(number, numbers.Real) else str(number)


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[REVEALED]
    if not rows:
        return
    terminalreporter.section("predictions")
    terminalreporter.write_line(f"{'':3}{'yours':>11}{'truth':>11}")
    for exercise, question, prediction, truth in rows:
        numbers_shown = f"{show(prediction):>11}{show(truth):>11}"
        terminalreporter.write_line(f"{exercise}{numbers_shown}  {question}")
