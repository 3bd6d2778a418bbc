"""What the exercises share: loading an answer, short messages, predictions beside truths.

    python -m pytest exercises -k e04 [--answers FOLDER]

With --grade, which grade.py gives, a line on standard input says where to write a report.
"""
import importlib.util
import json
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


def pytest_addoption(parser):
    parser.addoption("--answers", type=Path, default=HERE, metavar="FOLDER",
                     help="the folder with the student's eNN_*.py (default: exercises)")
    parser.addoption("--grade", action="store_true", help="for grade.py")


# -----------------------------------------------------------------------------------------------
# The student's answer.

def load_answer(folder, exercise):
    """Return the module FOLDER/eNN_*.py. Fail if it is not there, or holds no predictions."""
    files = sorted(Path(folder).glob(f"{exercise}_*.py"))
    if len(files) != 1:
        pytest.fail(f"{exercise}: {len(files)} files {exercise}_*.py in {folder}, and not one",
                    pytrace=False)
    spec = importlib.util.spec_from_file_location(f"answer_{exercise}", files[0])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if not isinstance(getattr(module, "PREDICT", None), dict):
        pytest.fail(f"{exercise}: there is no PREDICT in {files[0].name}", pytrace=False)
    return module


def guesses_of(module):
    """Return {question: the prediction as a float, or None where it is no number}."""
    return {question: None if isinstance(guess, bool) or not isinstance(guess, numbers.Real)
            else float(guess) for question, guess in module.PREDICT.items()}


def check_predictions(guesses, exercise):
    """Fail unless all predictions are made."""
    for question, guess in guesses.items():
        if guess is None:
            pytest.fail(f'predict first: give a number to "{question}" in PREDICT of '
                        f"{exercise}_*.py. It is not graded", pytrace=False)


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
    """A function that takes the truths, in the order of PREDICT, and lines to show below them."""
    def keep(*truths, lines=()):
        questions = request.node.funcargs["answer"].PREDICT
        if len(questions) != len(truths):
            pytest.fail("PREDICT has other questions than the exercise", pytrace=False)
        truths = dict(zip(questions, map(float, truths), strict=True))
        request.node.user_properties += [("truths", truths), ("lines", list(lines))]
    return keep


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    # In a fixture, a failure would be reported as an error of the test.
    if "answer" in pyfuncitem.funcargs:
        config, exercise = pyfuncitem.config, pyfuncitem.name[5:8]
        module = load_answer(config.getoption("--answers"), exercise)
        pyfuncitem.funcargs["answer"] = module
        guesses = guesses_of(module)
        sentences = [str(sentence) for sentence in getattr(module, "EXPLAIN", [])]
        # Of a test these reach the report, also from the processes of pytest -n 2.
        pyfuncitem.user_properties += [("guesses", guesses), ("sentences", sentences)]
        # The grader wants to know whether the functions are right all the same.
        if not config.getoption("--grade"):
            check_predictions(guesses, exercise)


# -----------------------------------------------------------------------------------------------
# What the student sees.

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and "answer" in item.fixturenames:
        error = call.excinfo.value
        if not isinstance(error, pytest.fail.Exception):
            report.longrepr = explain(error, item.name[5:8])
    return report


def show(number):
    """Return a number with four digits."""
    return "?" if number is None else f"{number:,.4g}"


def pytest_terminal_summary(terminalreporter):
    rows = []
    for report in terminalreporter.getreports("passed"):
        properties = dict(report.user_properties)
        exercise = report.nodeid.split("test_")[-1]
        rows += [f"{exercise}{show(properties['guesses'].get(question)):>11}{show(truth):>11}  "
                 f"{question}" for question, truth in properties.get("truths", {}).items()]
        rows += properties.get("lines", [])
    if rows:
        terminalreporter.section("predictions")
        for row in [f"{'':3}{'yours':>11}{'truth':>11}", *rows]:
            terminalreporter.write_line(row)


# -----------------------------------------------------------------------------------------------
# What the grader sees.

class Report:
    """Write what became of each test, and a nonce that only grade.py and we know."""

    def __init__(self, path, nonce):
        self.path, self.nonce, self.tests = path, nonce, []

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            self.tests.append({"outcome": report.outcome, "message": str(report.longrepr or ""),
                               **dict(report.user_properties)})

    def pytest_sessionfinish(self):
        self.path.write_text(json.dumps({"nonce": self.nonce, "tests": self.tests}))


def pytest_configure(config):
    if config.getoption("--grade"):
        # Read before any answer is imported, so that none finds it there.
        order = json.loads(sys.stdin.readline())
        limit_memory(order["memory"])
        config.pluginmanager.register(Report(Path(order["report"]), order["nonce"]))


def limit_memory(nbytes):
    """Let this process and its children have so much memory each, where the system can."""
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_DATA, (nbytes, nbytes))
    except (ImportError, OSError, ValueError):
        pass
