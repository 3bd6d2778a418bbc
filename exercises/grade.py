"""Grade submissions into tables: who passed what, why not, and what was predicted.

    python exercises/grade.py SUBMISSIONS [--out FOLDER] [--exercises e01 e02]
    python exercises/grade.py SUBMISSION --json results.json        # one student, for a platform

SUBMISSIONS holds a folder for each student, or the files that Canvas and Moodle export:
eNN_ anywhere in a name says which exercise it is, and the rest says whose.

Each test runs by itself: in a copy of this repository without solutions, with limits of time and
memory. A pass takes exit status 0, one test that passed, and a nonce that the test reads before it
imports the student's file. This is a hurdle and not a wall: the code runs with your rights, in one
process with the test. Use a container or an account that holds nothing else, and look at what is
flagged.

    pass      the test passed
    predict   the test passed, but a prediction is missing
    look      it did not fail, but a person should look: a skip, a forged report, a flagged word
    wrong     the test failed
    blank     no file, or nothing written but predictions
    slow      it did not end in time
    crashed   the process ended without a result, or ran out of memory

--out gets grades.csv (a row as soon as a student is graded; late: by Canvas; look: flagged words),
messages.csv (of all that is not a pass) and predictions.csv.
"""
import argparse
import ast
import contextlib
import csv
import itertools
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BLANKS = {path.name[:3]: path for path in sorted(HERE.glob("e[0-9][0-9]_*.py"))}
# What a test needs: no solutions, no data, no other submissions.
COPIED = ("*.py", "pyproject.toml", "study/*.py", "results/*.csv", "exercises/*.*")
NAME = re.compile(r"(?P<student>.*?)_?(?<![A-Za-z0-9])(?P<exercise>e\d\d)_.*\.py")
# An answer has no business with these.
SUSPICIOUS = re.compile(r"_exit|inspect|sys\.modules|test_exercises|conftest|solutions|junit"
                        r"|pytest|stdin|__code__|\bgc\b|ctypes")
RUNNING = set()


class Grade(NamedTuple):
    status: str
    message: str = ""
    words: tuple = ()
    # {"guesses": .., "truths": .., "sentences": ..}, as far as the test came.
    report: dict = {}


# -----------------------------------------------------------------------------------------------
# Whose file is it?

def student_of(name):
    """Return the student in the name of an export, and whether Canvas says that it is late."""
    # Moodle: "Ann Lee_123_assignsubmission_file_".
    name = re.sub(r"_assignsubmission_file_?$", "", name)
    # Canvas: "leeann_LATE_123_456", where 123 is the student, and 456 the file.
    canvas = re.fullmatch(r"(.+?)(_LATE)?_(\d+)_\d+", name)
    return (f"{canvas[1]}_{canvas[3]}", bool(canvas[2])) if canvas else (name, False)


def upload(path):
    """Return a key that is larger for later uploads: "e01_bpb-1.py" came after "e01_bpb.py"."""
    again = re.search(r"[-(](\d+)\)?\.py$", path.name)
    return int(again[1]) if again else 0, -len(path.parts), path.name


def files_in(folder):
    """Return {exercise: file} of one student's folder. The last of several uploads counts."""
    files = {}
    for path in sorted(folder.rglob("*.py"), key=upload):
        match = NAME.fullmatch(path.name)
        if match and match["exercise"] in BLANKS and path.is_file():
            files[match["exercise"]] = path
    return files


def find_submissions(folder):
    """Return {student: (their files, exercises that are late)}, and what is nobody's file."""
    students, strangers = {}, []
    for path in sorted(folder.iterdir(), key=upload):
        if path.name.startswith((".", "__MACOSX")):
            continue
        if path.is_dir():
            students[student_of(path.name)[0]] = files_in(path), set()
            continue
        match = NAME.fullmatch(path.name)
        if not match or not match["student"] or match["exercise"] not in BLANKS:
            strangers.append(path)
            continue
        exercise, (student, is_late) = match["exercise"], student_of(match["student"])
        files, late = students.setdefault(student, ({}, set()))
        files[exercise] = path
        if is_late:
            late.add(exercise)
    return dict(sorted(students.items())), strangers


# -----------------------------------------------------------------------------------------------
# One test.

def statements(path):
    """Return the statements of a file as text, without comments and without its docstring."""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError):
        return [text]
    return [ast.unparse(node) for node in module.body[bool(ast.get_docstring(module)):]]


def is_untouched(path, exercise):
    """Return whether a file differs from ours in its predictions and their explanations only."""
    def rest(path):
        return [text for text in statements(path) if not re.match("(PREDICT|EXPLAIN) = ", text)]
    return rest(path) == rest(BLANKS[exercise])


def suspicious_words(path):
    """Return the flagged words in the code of a file."""
    return tuple(dict.fromkeys(SUSPICIOUS.findall("\n".join(statements(path)))))


def copy_repository(target, path, exercise):
    """Copy what a test needs, with the student's file in its place, and the run folders by it."""
    for pattern in COPIED:
        for file in filter(Path.is_file, ROOT.glob(pattern)):
            copy = target / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    shutil.copyfile(path, target / "exercises" / BLANKS[exercise].name)
    for result in path.parent.glob("*/result.json"):
        shutil.copytree(result.parent, target / "exercises" / result.parent.name)


def end(process):
    """End a test and all that it has started."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()


def run_test(path, exercise, limits):
    """Run the test of a file. Return its report (None without one), and the exit status.

    Raises subprocess.TimeoutExpired.
    """
    command = [sys.executable, "-m", "pytest", "exercises", "-k", f"test_{exercise}", "--grade",
               "-s", "-p", "no:cacheprovider"]
    nonce = secrets.token_hex()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        copy, report = Path(temporary) / "bytegap", Path(temporary) / secrets.token_hex()
        copy_repository(copy, path, exercise)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
                                    "PYTHONPATH": ""}
        # A group of its own, so that what a student's code starts is ended with it.
        process = subprocess.Popen(command, cwd=copy, env=environment, start_new_session=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        RUNNING.add(process)
        order = {"nonce": nonce, "report": str(report), "memory": int(limits.memory * 1e9)}
        try:
            process.communicate(json.dumps(order).encode() + b"\n", limits.seconds)
        finally:
            end(process)
            process.wait()
            RUNNING.discard(process)
        try:
            written = json.loads(report.read_text())
            return written | {"is_ours": written["nonce"] == nonce}, process.returncode
        except (OSError, ValueError, KeyError, TypeError):
            return None, process.returncode


def judge(written, code, words):
    """Return the Grade that a report and an exit status come to."""
    if written is None:
        return Grade("crashed", f"the process ended with status {code} and no report", words)
    if not written["is_ours"]:
        return Grade("look", "a report that our test did not write", words)
    if len(written["tests"]) != 1:
        return Grade("crashed", f"{len(written['tests'])} tests ran, and not one", words)
    report, = written["tests"]
    message = report["message"]
    if report["outcome"] == "failed":
        crashed = re.search("MemoryError|can't allocate memory", message)
        return Grade("crashed" if crashed else "wrong", message, words, report)
    if report["outcome"] != "passed" or code != 0 or words:
        reason = ", ".join(words) or f"{report['outcome']}, exit status {code}"
        return Grade("look", f"look at this file: {reason}", words, report)
    missing = [question for question, guess in report["guesses"].items() if guess is None]
    if missing:
        return Grade("predict", f"right, but without a prediction: {missing}", words, report)
    return Grade("pass", "", words, report)


def grade(path, exercise, limits):
    """Return the Grade of one file, or of none."""
    if path is None:
        return Grade("blank")
    # Whatever a file does to us must not lose the grades of others.
    try:
        graded = judge(*run_test(path, exercise, limits), suspicious_words(path))
        # The two runs of E14 are an answer, too.
        runs = list(path.parent.glob("*/result.json"))
        if graded.status == "wrong" and is_untouched(path, exercise) and not runs:
            return graded._replace(status="blank")
        return graded
    except subprocess.TimeoutExpired:
        return Grade("slow", f"not done in {limits.seconds:g} seconds")
    except Exception as error:
        return Grade("crashed", f"{type(error).__name__}: {error}")


# -----------------------------------------------------------------------------------------------
# The tables.

def predictions(report):
    """Yield question, guess, truth and explanation of each prediction in a report."""
    guesses, truths = report.get("guesses", {}), report.get("truths", {})
    sentences = itertools.chain(report.get("sentences", []), itertools.repeat(""))
    for (question, guess), sentence in zip(guesses.items(), sentences, strict=False):
        yield question, guess, truths.get(question), sentence


def write_tables(students, exercises, args):
    """Grade all students. Write the rows of each as soon as they are known."""
    args.out.mkdir(parents=True, exist_ok=True)
    counts = dict.fromkeys(exercises, 0)
    with contextlib.ExitStack() as stack:
        def table(name, *columns):
            # A name that is not UTF-8 must not end the grading.
            file = stack.enter_context(open(args.out / name, "w", newline="", encoding="utf-8",
                                            errors="backslashreplace"))
            csv.writer(file).writerow(columns)
            return lambda *row: (csv.writer(file).writerow(row), file.flush())

        add_grades = table("grades.csv", "student", *exercises, "passed", "late", "look")
        add_message = table("messages.csv", "student", "exercise", "status", "message")
        add_prediction = table("predictions.csv", "student", "exercise", "question", "guess",
                               "truth", "explanation")
        print(f"{'student':24}", *(f"{exercise:7}" for exercise in exercises), "passed")
        pool = ThreadPoolExecutor(args.jobs)
        # Ctrl-C ends what is running, and starts nothing more.
        stack.callback(lambda: [end(process) for process in list(RUNNING)])
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        stack.callback(setattr, args, "seconds", 0)
        tasks = {student: [pool.submit(grade, files.get(exercise), exercise, args)
                           for exercise in exercises] for student, (files, _) in students.items()}
        for student, row in tasks.items():
            graded = {e: task.result() for e, task in zip(exercises, row, strict=True)}
            passed = [e for e in exercises if graded[e].status == "pass"]
            counts.update((e, counts[e] + 1) for e in passed)
            look = [f"{e}: {' '.join(graded[e].words)}" for e in exercises if graded[e].words]
            statuses = [graded[e].status for e in exercises]
            name = student.encode("utf-8", "backslashreplace").decode()[:24]
            print(f"{name:24}", *(f"{word:7}" for word in statuses), len(passed),
                  flush=True)
            add_grades(student, *statuses, len(passed), " ".join(sorted(students[student][1])),
                       "; ".join(look))
            for e in exercises:
                if graded[e].message:
                    add_message(student, e, graded[e].status, graded[e].message)
                for columns in predictions(graded[e].report):
                    add_prediction(student, e, *columns)
    print(f"{'pass':24}", *(f"{counts[e] / len(students):<7.0%}" for e in exercises))


def write_json(args, exercises):
    """Grade one student's folder into the results.json of Gradescope. Return whether all pass."""
    files, tests = files_in(args.submissions), []
    for exercise in exercises:
        graded = grade(files.get(exercise), exercise, args)
        lines = [graded.message or graded.status]
        for question, guess, truth, _ in predictions(graded.report):
            if graded.status == "pass":
                lines.append(f"predicted {guess:.4g}, truth {truth:.4g}: {question}")
        tests.append({"name": exercise, "score": int(graded.status == "pass"), "max_score": 1,
                      "output": "\n".join(lines)})
    args.json.write_text(json.dumps({"tests": tests}, indent=1))
    return all(test["score"] for test in tests)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("submissions", type=Path, help="a folder of students' folders or files")
    flag("--exercises", nargs="+", choices=BLANKS, default=list(BLANKS), metavar="eNN")
    flag("--out", type=Path, default=Path("."), help="where the tables are written")
    flag("--json", type=Path, help="grade one student's folder into this file")
    flag("--seconds", type=float, default=180, help="time limit of an exercise")
    flag("--memory", type=float, default=4, help="limit of memory in GB, for each process")
    flag("--jobs", type=int, default=2, help="tests at a time")
    args = parser.parse_args()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    if not args.submissions.is_dir():
        parser.exit(2, f"error: {args.submissions} is not a folder\n")
    if args.json:
        parser.exit(0 if write_json(args, args.exercises) else 1)
    students, strangers = find_submissions(args.submissions.resolve())
    for path in strangers:
        print(f"not graded, its name lacks a student or eNN_: {path.name}", file=sys.stderr)
    if not students:
        parser.exit(2, f"error: {args.submissions} holds no submission\n")
    try:
        write_tables(students, args.exercises, args)
    except KeyboardInterrupt:
        parser.exit(130, "interrupted: the rows that are written are whole\n")


if __name__ == "__main__":
    main()
