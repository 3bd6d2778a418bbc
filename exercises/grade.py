"""Grade a folder of submissions into a table.

    python exercises/grade.py SUBMISSIONS [--out FOLDER]

SUBMISSIONS holds one folder a student, with the student's eNN_*.py in it, or in exercises/ in it.
This runs the students' code with your rights: use a machine, a container or an account for it that
holds nothing else.

Every exercise is run by itself, with a time limit. The table has one column an exercise:

    pass      the test passed
    predict   a prediction is missing
    blank     there is no file, or a function is not written
    fail      the test failed

--out gets grades.csv, the same table, and grades/STUDENT.txt, the messages of what failed.
"""
import argparse
import csv
import os
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
EXERCISES = [path.name[:3] for path in sorted(HERE.glob("e[0-9][0-9]_*.py"))]


def run_test(folder, exercise, report, seconds):
    """Run the test of an exercise. pytest writes the report. Return whether it ended in time."""
    command = [sys.executable, "-m", "pytest", HERE, "-k", f"test_{exercise}", "--answers", folder,
               "-p", "no:cacheprovider", "--junitxml", report]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    # A group of its own, so that what a student's code starts is ended with it.
    process = subprocess.Popen(list(map(str, command)), cwd=HERE.parent, env=environment,
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        return False


def grade(folder, exercise, seconds):
    """Return the grade of one exercise, and the message of its failure ("" if there is none)."""
    if not any(folder.glob(f"{exercise}_*.py")):
        return "blank", ""
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        if not run_test(folder, exercise, report, seconds):
            return "fail", f"{exercise}: not done in {seconds:g} seconds"
        # Code that ends the process leaves no report.
        if not report.exists():
            return "fail", f"{exercise}: no result: does the code end the process?"
        case = ElementTree.parse(report).getroot().find(".//testcase")
    if case is None:
        return "fail", f"{exercise}: no result: pytest found no test"
    failures = [part.text for part in case if part.tag in ("failure", "error")]
    if not failures:
        return "pass", ""
    message = failures[0] or ""
    if message.startswith("predict first"):
        return "predict", message
    return "blank" if message.endswith("is not written yet") else "fail", message


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("submissions", type=Path, help="a folder of students' folders")
    parser.add_argument("--out", type=Path, default=Path("."), help="where the grades are written")
    parser.add_argument("--seconds", type=float, default=180, help="time limit of an exercise")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="tests at a time")
    args = parser.parse_args()
    if not args.submissions.is_dir():
        sys.exit(refuse(f"{args.submissions} is not a folder"))
    students = sorted(path.resolve() for path in args.submissions.iterdir() if path.is_dir())
    if not students:
        sys.exit(refuse(f"{args.submissions} holds no folder of a student"))

    folders = [path / "exercises" if (path / "exercises").is_dir() else path for path in students]
    with ThreadPoolExecutor(args.jobs) as pool:
        tasks = [[pool.submit(grade, folder, exercise, args.seconds) for exercise in EXERCISES]
                 for folder in folders]
        messages = args.out / "grades"
        messages.mkdir(parents=True, exist_ok=True)
        width = max(7, *(len(path.name) for path in students))
        print(f"{'student':{width}}", *(f"{exercise:7}" for exercise in EXERCISES), "passed")
        table = []
        for path, row in zip(students, tasks, strict=True):
            grades, texts = zip(*(task.result() for task in row), strict=True)
            table.append(grades)
            print(f"{path.name:{width}}", *(f"{word:7}" for word in grades),
                  grades.count("pass"), flush=True)
            text = "\n\n".join(filter(None, texts))
            (messages / f"{path.name}.txt").write_text(text + "\n", encoding="utf-8")
    shares = [column.count("pass") / len(column) for column in zip(*table, strict=True)]
    print(f"{'pass':{width}}", *(f"{share:<7.0%}" for share in shares))

    with open(args.out / "grades.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["student", *EXERCISES, "passed"])
        for path, grades in zip(students, table, strict=True):
            writer.writerow([path.name, *grades, grades.count("pass")])


def refuse(reason):
    """Say why nothing is graded, in one line. Return the exit status."""
    print(f"error: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
