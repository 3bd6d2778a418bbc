"""What the documents say about the code: quotations, flags, names, files."""
import ast
import difflib
import functools
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train_ar
import train_mdm

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TEXTS = {"README.md": README, "results/README.md": (ROOT / "results/README.md").read_text(),
         "exercises/README.md": (ROOT / "exercises/README.md").read_text()}
EXERCISES = {path.name: ast.get_docstring(ast.parse(path.read_text()))
             for path in sorted((ROOT / "exercises").glob("e[0-9]*.py"))}
MODULES = "|".join(path.stem for path in ROOT.glob("*.py"))
FLAG = r"(?<!\S)--[a-z][\w-]*"
# Files that the repository does not hold.
MADE_BY_A_RUN = {"log.csv", "loss.png", "grades.csv", "grades/STUDENT.txt"}


def code_lines(source):
    """Return the lines of a function without its docstring, with single spaces, none empty."""
    docstring = ast.parse(source).body[0].body[0]
    lines = source.splitlines()
    if isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant):
        del lines[docstring.lineno - 1:docstring.end_lineno]
    return [" ".join(line.split()) for line in lines if line.strip()]


def flags_by_script():
    """Return {script: the flags that the documents' commands give to it}."""
    found = {}
    for text in [*TEXTS.values(), *EXERCISES.values()]:
        for script, rest in re.findall(r"\b(\w+\.py)\b([^`|;&#\n]*)", text.replace("\\\n", " ")):
            found.setdefault(script, set()).update(re.findall(FLAG, rest))
    return {script: flags for script, flags in sorted(found.items()) if flags}


@functools.cache
def known_flags(script):
    """Return the flags that `python SCRIPT --help` lists."""
    folders = {"stress.py": "tests", "grade.py": "exercises"}
    command = [sys.executable, Path(folders.get(script, "")) / script, "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return set(re.findall(r"--[a-z][\w-]*", run.stdout))


@pytest.mark.parametrize("script, position", [(train_ar, 0), (train_mdm, 1)])
def test_the_quoted_corrupt_is_the_one_in_the_code(script, position):
    quotations = re.findall(r"```python\n(def corrupt.*?)```", README, re.S)
    assert len(quotations) == 2
    quoted = code_lines(quotations[position])
    real = code_lines(inspect.getsource(script.corrupt))
    diff = difflib.unified_diff(quoted, real, "README.md", script.__file__, lineterm="")
    assert quoted == real, "update the quotation:\n" + "\n".join(diff)


@pytest.mark.parametrize("script", flags_by_script())
def test_every_flag_in_a_command_is_known_to_its_script(script):
    unknown = flags_by_script()[script] - known_flags(script)
    assert not unknown, f"{script} has no {sorted(unknown)}"


def test_every_flag_in_the_prose_is_known_to_a_script():
    named = {flag for text in TEXTS.values() for flag in re.findall(r"`(--[a-z][\w-]*)", text)}
    known = known_flags("train_mdm.py") | known_flags("scaling.py") | known_flags("grade.py")
    assert named <= known, f"no script has {sorted(named - known)}"


@pytest.mark.parametrize("name", EXERCISES)
def test_every_name_that_an_exercise_mentions_exists(name):
    named = re.findall(rf"(?<![\w./])({MODULES})\.(?!py\b)([a-zA-Z_]\w*)", EXERCISES[name])
    missing = [f"{module}.{attribute}" for module, attribute in named
               if not hasattr(importlib.import_module(module), attribute)]
    assert not missing, f"{name} names what does not exist: {missing}"
    files = re.findall(r"(?<![\w/.])[\w/.]+\.(?:py|csv|md|txt)\b", EXERCISES[name])
    assert [file for file in files if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("name", TEXTS)
def test_every_file_that_is_named_exists(name):
    files = set(re.findall(r"(?<![\w/.])[\w/.]+\.(?:py|csv|png|md|txt|cff)\b", TEXTS[name]))
    folders = (ROOT, (ROOT / name).parent)
    missing = [file for file in sorted(files - MADE_BY_A_RUN)
               if not any((folder / file).exists() for folder in folders)]
    assert not missing, f"{name} names files that do not exist: {missing}"


def test_no_line_of_the_readme_is_over_120_columns():
    assert [line for line in README.splitlines() if len(line) > 120] == []
