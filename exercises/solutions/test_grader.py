"""The grader's own test: solutions pass; blank and typical wrong answers fail as they should.

    python -m pytest exercises/solutions -n 2
"""
import ast
import contextlib
import csv
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import grade
import pytest
import test_exercises
from conftest import check_predictions, explain, guesses_of, load_answer
from wrong import WRONG

pytestmark = pytest.mark.exercises
SOLUTIONS = Path(__file__).resolve().parent
EXERCISES = SOLUTIONS.parent
ROOT = EXERCISES.parent
BLANKS = grade.BLANKS
TESTS = {name[5:]: test for name, test in vars(test_exercises).items() if name.startswith("test_")}
# (exercise, the position of a wrong answer)
MISTAKES = [(exercise, i) for exercise, mistakes in WRONG.items() for i in range(len(mistakes))]
# Truths that can be guessed without a thought.
EXACT = (0, 0.5, 1, 2, 8, 100)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to work in: what a test trains or caches is left there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def functions(path):
    """Return {name: its arguments} of the functions at the top of a file."""
    return {node.name: ast.unparse(node.args) for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef)}


def run_exercise(exercise, folder):
    """Run the test of an exercise. Return its predictions, a dict, and the truths."""
    answer, truths = load_answer(folder, exercise), []
    check_predictions(guesses_of(answer), exercise)
    TESTS[exercise](answer, lambda *numbers, lines=(): truths.extend(numbers))
    return answer.PREDICT, truths


def message_of(exercise, folder):
    """Return the message with which the answer in folder fails a check."""
    with pytest.raises(pytest.fail.Exception) as failure:
        run_exercise(exercise, folder)
    return failure.value.msg


def test_every_exercise_has_a_test_a_solution_and_wrong_answers():
    assert len(BLANKS) == 14
    assert sorted(TESTS) == sorted(WRONG) == list(BLANKS)
    assert [path.name for path in sorted(SOLUTIONS.glob("e*.py"))] \
        == [path.name for path in BLANKS.values()]
    readme = (EXERCISES / "README.md").read_text()
    for exercise, path in BLANKS.items():
        assert len(WRONG[exercise]) >= 2, exercise
        assert f"python -m pytest exercises -k {exercise}" in path.read_text(), exercise
        assert f"| E{int(exercise[1:])} " in readme, exercise
        assert not grade.suspicious_words(SOLUTIONS / path.name), exercise


@pytest.mark.parametrize("exercise", BLANKS)
def test_the_solution_passes(exercise):
    path = SOLUTIONS / BLANKS[exercise].name
    assert functions(BLANKS[exercise]).items() <= functions(path).items()
    predictions, truths = run_exercise(exercise, SOLUTIONS)
    blank = load_answer(EXERCISES, exercise)
    assert list(blank.PREDICT) == list(predictions) and len(predictions) == len(truths)
    assert 1 <= len(truths) <= 3 and blank.EXPLAIN == [""] * len(truths)
    assert all(map(math.isfinite, truths))
    # A guess is worth something only if few truths are whole numbers.
    guessable = {"e04": 1, "e05": 1, "e10": 1}
    assert sum(any(math.isclose(truth, exact, abs_tol=1e-6) for exact in EXACT)
               for truth in truths) == guessable.get(exercise, 0)


@pytest.mark.parametrize("exercise", BLANKS)
def test_a_blank_exercise_asks_for_predictions_and_then_for_functions(exercise, folder):
    assert message_of(exercise, EXERCISES).startswith("predict first: ")

    text = BLANKS[exercise].read_text()
    (folder / BLANKS[exercise].name).write_text(text.replace('": None', '": 1'))
    assert grade.is_untouched(folder / BLANKS[exercise].name, exercise)
    assert not grade.is_untouched(SOLUTIONS / BLANKS[exercise].name, exercise)
    if "raise NotImplementedError" in text:
        with pytest.raises(NotImplementedError) as failure:
            run_exercise(exercise, folder)
        assert explain(failure.value, exercise).endswith(" is not written yet")
        assert explain(failure.value, exercise).split()[1] in functions(BLANKS[exercise])
    else:
        assert "train both runs" in message_of(exercise, folder)


@pytest.mark.parametrize("exercise, i", MISTAKES)
def test_a_wrong_answer_fails_by_its_own_message(exercise, i, folder):
    name = BLANKS[exercise].name
    _, old, new, part = WRONG[exercise][i]
    text = (SOLUTIONS / name).read_text()
    assert text.count(old) == 1
    assert old.count("\n") < 4 and new.count("\n") < 4
    (folder / name).write_text(text.replace(old, new))
    message = message_of(exercise, folder)
    assert part in message
    # No message fits two mistakes, but for those that are the same mistake.
    others = {mistake[3] for mistake in WRONG[exercise]} - {part}
    assert not any(other in message for other in others), message


# -----------------------------------------------------------------------------------------------
# The commands.

def execute(*arguments, **options):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True,
                          text=True, timeout=200, **options)


def student(folder, name, text):
    """Write a student's answer to E1."""
    (folder / name).mkdir(parents=True)
    (folder / name / BLANKS["e01"].name).write_text(text)
    return folder / name


def test_what_a_student_sees_is_short(folder):
    text = (SOLUTIONS / BLANKS["e01"].name).read_text()
    command = "-m", "pytest", "exercises", "-k", "e01", "-p", "no:cacheprovider", "--answers"
    # Predictions are shown by several processes, too.
    done = execute(*command, SOLUTIONS, "-n", 2)
    assert done.returncode == 0 and done.stdout.count("e01 ") == 3, done.stdout

    broken = text.replace("bits = nats", "bits = gnats")
    done = execute(*command, student(folder, "broken", broken))
    assert done.returncode == 1 and "NameError: name 'gnats'" in done.stdout, done.stdout
    assert "test_exercises" not in done.stdout.split("short test summary")[0]
    assert done.stdout.count("\n") < 15

    nothing = text.replace("return bits / nbytes", "return")
    done = execute(*command, student(folder, "nothing", nothing))
    assert "Is a `return` missing?" in done.stdout, done.stdout
    done = execute(*command, folder)
    assert "e01: 0 files e01_*.py" in done.stdout, done.stdout


def read_table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Four lines in front of a solution, which find the report and end the process.
FORGED = """import os, tempfile
for folder in __import__("pathlib").Path(tempfile.gettempdir()).glob("tmp*"):
    (folder / "report").write_text('{"nonce": "", "tests": [{"outcome": "passed"}]}')
os._exit(0)
"""


def test_grade_makes_tables_of_all_students(folder):
    blank, text = BLANKS["e01"].read_text(), (SOLUTIONS / BLANKS["e01"].name).read_text()
    predicted = re.sub('": None', '": 1', blank)
    submissions = {
        "ann": text,
        "bob": blank,
        "c" * 240: predicted.replace("raise NotImplementedError", "return 1 / nats.sum()", 1),
        "dan": re.sub("(occurs, .*): .*,", r"\1: None,", text),
        "eva": text + FORGED,
        "gus": text + "\nimport pytest\npytest.skip('not today', allow_module_level=True)\n",
        "hal": text + "\nbytes(10**10)\n",
        "jon": text + "\nimport sys\nsys.modules['test_exercises'].check = print\n",
    }
    everybody = folder / "class"
    for name, answer in submissions.items():
        student(everybody, name, answer)
    (everybody / "bad \udcff name").mkdir()
    (everybody / "notes.txt").write_text("")
    done = execute(EXERCISES / "grade.py", everybody, "--out", folder, "--exercises", "e01")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["not graded, its name lacks a student or eNN_: notes.txt"]
    rows = {row["student"]: row for row in read_table(folder / "grades.csv")}
    assert {name[:3]: row["e01"] for name, row in rows.items()} == {
        "ann": "pass", "bob": "blank", "ccc": "wrong", "dan": "predict", "eva": "crashed",
        "gus": "look", "hal": "crashed", "jon": "look", "bad": "blank"}
    assert list(rows["ann"]) == ["student", "e01", "passed", "late", "look"]
    assert {name for name, row in rows.items() if row["look"]} == {"eva", "gus", "jon"}
    assert rows["jon"]["look"] == "e01: sys.modules test_exercises"
    assert done.stdout.splitlines()[-1].split() == ["pass", "11%"]
    messages = {row["student"]: row["message"] for row in read_table(folder / "messages.csv")}
    assert "not 1.33333" in messages["c" * 240]
    assert "status 0 and no report" in messages["eva"]
    guesses = read_table(folder / "predictions.csv")
    ann = next(row for row in guesses if row["student"] == "ann")
    assert ann["question"].startswith("untrained") and float(ann["truth"]) > 3
    assert sorted({row["student"][:3] for row in guesses}) == [
        "ann", "bob", "ccc", "dan", "jon"]
    explained = text.replace('EXPLAIN = [""', 'EXPLAIN = ["since 10 bits"')
    student(folder / "slow", "ann", explained + "\nwhile True:\n    pass\n")
    execute(EXERCISES / "grade.py", folder / "slow", "--out", folder, "--seconds", 2)
    assert set(read_table(folder / "grades.csv")[0].values()) == {
        "ann", "slow", *["blank"] * 13, "0", ""}


def test_no_report_is_believed_without_the_nonce():
    passed = {"outcome": "passed", "message": "", "guesses": {"q": 1.0}}
    ours = {"nonce": "n", "is_ours": True, "tests": [passed]}
    skipped = passed | {"outcome": "skipped"}
    assert grade.judge(ours, 0, ()).status == "pass"
    for written, code, words, status in [
            (ours | {"is_ours": False}, 0, (), "look"), (None, 0, (), "crashed"),
            (ours, 1, (), "look"), (ours, 0, ("_exit",), "look"),
            (ours | {"tests": [skipped]}, 0, (), "look"), (ours | {"tests": []}, 0, (), "crashed"),
            (ours | {"tests": [passed, passed]}, 0, (), "crashed"),
            (ours | {"tests": [passed | {"guesses": {"q": None}}]}, 0, (), "predict")]:
        assert grade.judge(written, code, words).status == status


def test_names_as_canvas_and_moodle_export_them(folder):
    for name in ["leeann_123_456_e01_bpb.py", "leeann_LATE_123_789_e02_flops-1.py",
                 "leeann_123_99_e02_flops.py",
                 "Bo Doe_77_assignsubmission_file_e01_bpb.py",
                 "Cy Roe_78_assignsubmission_file_/e01_bpb.py", "dee12/bytegap/exercises/e03_x.py",
                 "dee12/e01_bpb (1).py", "dee12/e01_bpb (2).py", "dee12/test_e01_x.py",
                 "e01_bpb.py", "eli_e99_x.py", ".DS_Store", "__MACOSX/x/e01_bpb.py"]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    students, strangers = grade.find_submissions(folder)
    names = {student: ({e: path.name for e, path in files.items()}, late)
             for student, (files, late) in students.items()}
    assert names == {
        "leeann_123": ({"e01": "leeann_123_456_e01_bpb.py",
                        "e02": "leeann_LATE_123_789_e02_flops-1.py"}, {"e02"}),
        "Bo Doe_77": ({"e01": "Bo Doe_77_assignsubmission_file_e01_bpb.py"}, set()),
        "Cy Roe_78": ({"e01": "e01_bpb.py"}, set()),
        "dee12": ({"e01": "e01_bpb (2).py", "e03": "e03_x.py"}, set())}
    assert [path.name for path in strangers] == ["e01_bpb.py", "eli_e99_x.py"]


@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are read from /proc")
def test_a_submission_finds_no_answers_and_its_children_end_with_it(folder):
    text = (SOLUTIONS / BLANKS["e01"].name).read_text()
    looking = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(61.2345)"])
assert not os.path.exists("exercises/" + "solut" + "ions")
"""
    student(folder / "class", "ann", text + looking)
    done = execute(EXERCISES / "grade.py", folder / "class", "--out", folder, "--exercises", "e01")
    assert read_table(folder / "grades.csv")[0]["e01"] == "pass", done.stdout
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            commands.append(path.read_bytes())
    assert commands and not any(b"sleep(61.2345)" in command for command in commands)


def test_ctrl_c_ends_the_grading_at_once(folder):
    text = (SOLUTIONS / BLANKS["e01"].name).read_text()
    for name in ("ann", "bob", "cid"):
        student(folder / "class", name, text + "\nimport time\ntime.sleep(100)\n")
    process = subprocess.Popen([sys.executable, EXERCISES / "grade.py", folder / "class", "--out",
                                folder, "--exercises", "e01"], stderr=subprocess.PIPE, text=True)
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    assert "interrupted" in process.communicate(timeout=30)[1] and process.returncode == 130
    assert (folder / "grades.csv").read_text().startswith("student,e01")


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_grade_refuses_a_bad_folder(name, folder):
    (folder / "empty").mkdir()
    done = execute(EXERCISES / "grade.py", folder / name)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
