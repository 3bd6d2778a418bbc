"""The grader's own test: solutions pass; blank and typical wrong answers fail as they should.

    python -m pytest exercises/solutions -n 2
"""
import ast
import csv
import math
import numbers
import subprocess
import sys
from pathlib import Path

import pytest
import test_exercises
from conftest import explain, load_answer
from wrong import WRONG

pytestmark = pytest.mark.exercises
SOLUTIONS = Path(__file__).resolve().parent
EXERCISES = SOLUTIONS.parent
ROOT = EXERCISES.parent
BLANKS = {path.name[:3]: path for path in sorted(EXERCISES.glob("e[0-9][0-9]_*.py"))}
TESTS = {name[5:]: test for name, test in vars(test_exercises).items() if name.startswith("test_")}
# (exercise, the position of a wrong answer)
MISTAKES = [(exercise, i) for exercise, mistakes in WRONG.items() for i in range(len(mistakes))]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to work in: what a test trains or caches is left there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def functions(path):
    """Return {name: its arguments} of the functions at the top of a file."""
    return {node.name: ast.unparse(node.args) for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef)}


def grade(exercise, folder):
    """Run the test of an exercise. Return its predictions and truths: two dicts."""
    answer, truths = load_answer(folder, exercise), {}
    TESTS[exercise](answer, truths.update)
    return answer.PREDICT, truths


def message_of(exercise, folder):
    """Return the message with which the answer in folder fails a check."""
    with pytest.raises(pytest.fail.Exception) as failure:
        grade(exercise, folder)
    return failure.value.msg


def test_every_exercise_has_a_test_a_solution_and_wrong_answers():
    assert BLANKS
    assert sorted(TESTS) == sorted(WRONG) == list(BLANKS)
    assert [path.name for path in sorted(SOLUTIONS.glob("e*.py"))] \
        == [path.name for path in BLANKS.values()]
    readme = (EXERCISES / "README.md").read_text()
    for exercise, path in BLANKS.items():
        assert len(WRONG[exercise]) >= 2, exercise
        assert f"python -m pytest exercises -k {exercise}" in path.read_text(), exercise
        assert f"| E{int(exercise[1:])} " in readme, exercise


@pytest.mark.parametrize("exercise", BLANKS)
def test_the_solution_passes(exercise):
    path = SOLUTIONS / BLANKS[exercise].name
    assert functions(BLANKS[exercise]).items() <= functions(path).items()
    predictions, truths = grade(exercise, SOLUTIONS)
    blank = ast.parse(BLANKS[exercise].read_text())
    questions = next(ast.literal_eval(node.value) for node in blank.body
                     if isinstance(node, ast.Assign) and node.targets[0].id == "PREDICT")
    assert list(questions) == list(predictions) == list(truths)
    assert 1 <= len(questions) <= 3
    assert all(isinstance(truth, numbers.Real) and math.isfinite(truth)
               for truth in truths.values())


@pytest.mark.parametrize("exercise", BLANKS)
def test_a_blank_exercise_asks_for_predictions_and_then_for_functions(exercise, folder):
    assert message_of(exercise, EXERCISES).startswith("predict first: ")

    text = BLANKS[exercise].read_text()
    (folder / BLANKS[exercise].name).write_text(text.replace('": None', '": 1'))
    if "raise NotImplementedError" in text:
        with pytest.raises(NotImplementedError) as failure:
            grade(exercise, folder)
        assert explain(failure.value, exercise).endswith(" is not written yet")
        assert explain(failure.value, exercise).split()[1] in functions(BLANKS[exercise])
    else:
        assert message_of(exercise, folder)


@pytest.mark.parametrize("exercise, i", MISTAKES)
def test_a_wrong_answer_fails_by_its_own_message(exercise, i, folder):
    name = BLANKS[exercise].name
    _, old, new, part = WRONG[exercise][i]
    text = (SOLUTIONS / name).read_text()
    assert text.count(old) == 1
    assert old.count("\n") < 3 and new.count("\n") < 3
    (folder / name).write_text(text.replace(old, new))
    message = message_of(exercise, folder)
    assert part in message
    # No other wrong answer has this message: it would hold the other's part.
    others = [mistake[3] for j, mistake in enumerate(WRONG[exercise]) if j != i]
    assert not any(other in message for other in others), message


# -----------------------------------------------------------------------------------------------
# The commands.

def execute(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True,
                          text=True, timeout=200)


def student(folder, name, text):
    """Write a student's answer to E1."""
    (folder / name).mkdir(parents=True)
    (folder / name / BLANKS["e01"].name).write_text(text)
    return folder / name


def test_what_a_student_sees_is_short(folder):
    text = (SOLUTIONS / BLANKS["e01"].name).read_text()
    command = "-m", "pytest", "exercises", "-k", "e01", "-p", "no:cacheprovider", "--answers"
    done = execute(*command, SOLUTIONS)
    assert done.returncode == 0 and done.stdout.count("e01 ") == 3, done.stdout

    broken = text.replace("bits = nats", "bits = gnats")
    done = execute(*command, student(folder, "broken", broken))
    assert done.returncode == 1 and "NameError: name 'gnats'" in done.stdout, done.stdout
    assert "test_exercises" not in done.stdout.split("short test summary")[0]
    assert done.stdout.count("\n") < 15

    for name, line, words in [("nothing", "return", "Is a `return` missing?"),
                              ("pair", "return [bits, nbytes]",
                               "cannot use what your function returned")]:
        answer = text.replace("return bits / nbytes", line)
        done = execute(*command, student(folder, name, answer))
        assert words in done.stdout, done.stdout

    done = execute(*command, folder)
    assert "e01: 0 files e01_*.py" in done.stdout, done.stdout


def test_grade_makes_a_table_of_all_students(folder):
    path = BLANKS["e01"]
    text = (SOLUTIONS / path.name).read_text()
    class_folder = folder / "class"
    student(class_folder, "ann/exercises", text)
    student(class_folder, "bob", path.read_text())
    student(class_folder, "cid", path.read_text().replace('": None', '": 1'))
    student(class_folder, "dan", text.replace("bits = nats", "bits = 2 * nats"))
    student(class_folder, "eva", "import os\n" + text + "\nos._exit(0)\n")
    student(class_folder, "fay", text + "\nwhile True:\n    pass\n")
    (class_folder / "gus").mkdir()
    done = execute(EXERCISES / "grade.py", class_folder, "--out", folder, "--seconds", 30)
    assert done.returncode == 0, done.stderr
    with open(folder / "grades.csv", newline="") as file:
        rows = {row["student"]: row for row in csv.DictReader(file)}
    expected = {"ann": "pass", "bob": "predict", "cid": "blank", "dan": "fail", "eva": "fail",
                "fay": "fail", "gus": "blank"}
    assert {name: row["e01"] for name, row in rows.items()} == expected
    assert rows["ann"]["passed"] == "1" and rows["ann"]["e02"] == "blank"
    assert list(rows["ann"]) == ["student", *BLANKS, "passed"]
    assert done.stdout.splitlines()[-1].split()[:2] == ["pass", "14%"]
    messages = {name: (folder / "grades" / f"{name}.txt").read_text() for name in rows}
    assert "bpb of 2 x 2 tokens: your value" in messages["dan"]
    assert "30 seconds" in messages["fay"]
    assert "no result" in messages["eva"]


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_grade_refuses_a_bad_folder(name, folder):
    (folder / "empty").mkdir()
    done = execute(EXERCISES / "grade.py", folder / name)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
