"""What the documents say: quotations, flags, names and files exist, and numbers are printed."""
import ast
import functools
import importlib
import inspect
import re
import shutil
from pathlib import Path

import pytest
from conftest import execute, here

import train_ar
import train_mdm

ROOT = Path(__file__).parent.parent
TEXTS = {name: (ROOT / name).read_text()
         for name in ("README.md", "results/README.md", "exercises/README.md")}
README, REPORT = TEXTS["README.md"], TEXTS["results/README.md"]
EXERCISES = {path.name: ast.get_docstring(ast.parse(path.read_text()))
             for path in sorted((ROOT / "exercises").glob("e[0-9]*.py"))}
STUDY = [f"study.{path.stem}" for path in sorted((ROOT / "study").glob("*.py"))]
MODULES = "|".join([*STUDY, *(path.stem for path in ROOT.glob("*.py"))]).replace(".", r"\.")
COMMAND = r"(?:python\S*|torchrun \S+) (?:-m )?(study\.\w+|[\w/]+\.py)\b([^`|;&#\n]*)"
# Files that the repository does not hold.
MADE_BY_A_RUN = {"log.csv", "loss.png", "grades.csv", "messages.csv", "predictions.csv"}
# The commands whose numbers the report quotes.
PRINTED = [("scaling.py", "--plot-only"), ("scaling.py", "--plot-only", "--out", "results/english"),
           ("study.report",), ("study.report", "context"), ("study.remedies", "--plot-only"),
           ("study.fragility", "shuffle", "--plot-only"),
           ("study.fragility", "span", "--plot-only"), ("study.segmentation", "--plot-only"),
           ("study.likelihood", "repetition", "--plot-only")]
NUMBER = r"((?:above )?[-+]?\d[\d.]*(?:e[-+]?\d+)?|never)"


def code_lines(source):
    """Return the lines of a function without its docstring, with single spaces, none empty."""
    source = re.sub(r'""".*?"""', "", source, count=1, flags=re.S)
    return [" ".join(line.split()) for line in source.splitlines() if line.strip()]


def flags_by_script():
    """Return {script: the flags that the documents' commands give to it}."""
    flags = {}
    for text in [*TEXTS.values(), *EXERCISES.values()]:
        for script, rest in re.findall(COMMAND, text.replace("\\\n", " ")):
            flags.setdefault(script, set()).update(re.findall(r"(?<!\S)--[a-z][\w-]*", rest))
    return {script: named for script, named in sorted(flags.items()) if named}


@functools.cache
def known_flags(script):
    """Return the flags that the help of a script or module lists."""
    call = execute if "/" in script else here
    done = call(ROOT, script, "--help")
    assert done.returncode in (None, 0), done.stderr
    return set(re.findall(r"--[a-z][\w-]*", done.stdout))


@pytest.mark.parametrize("script, position", [(train_ar, 0), (train_mdm, 1)])
def test_the_quoted_corrupt_is_the_one_in_the_code(script, position):
    quotations = re.findall(r"```python\n(def corrupt.*?)```", README, re.S)
    assert len(quotations) == 2
    assert code_lines(quotations[position]) == code_lines(inspect.getsource(script.corrupt))


@pytest.mark.parametrize("script", flags_by_script())
def test_every_flag_in_a_command_is_known_to_its_script(script):
    unknown = flags_by_script()[script] - known_flags(script)
    assert not unknown, f"{script} has no {sorted(unknown)}"


def test_every_flag_in_the_prose_is_known_to_a_script():
    named = {flag for text in TEXTS.values() for flag in re.findall(r"`(--[a-z][\w-]*)", text)}
    scripts = ("study.train", "scaling.py", "sample.py", "exercises/grade.py")
    known = set().union(*map(known_flags, scripts))
    assert named <= known, f"no script has {sorted(named - known)}"


@pytest.mark.parametrize("name", [*TEXTS, *EXERCISES])
def test_every_name_and_file_that_is_mentioned_exists(name):
    text = (TEXTS | EXERCISES)[name]
    named = re.findall(rf"(?<![\w./])({MODULES})\.(?!py\b)([a-zA-Z_]\w*)", text)
    missing = [f"{module}.{attribute}" for module, attribute in named
               if not hasattr(importlib.import_module(module), attribute)]
    assert not missing, f"{name} names what does not exist: {missing}"
    files = set(re.findall(r"(?<![\w/.])[\w/.]+\.(?:py|csv|png|md|sh|txt|cff)\b", text))
    home = ROOT / "exercises" if name in EXERCISES else (ROOT / name).parent
    missing = [file for file in sorted(files - MADE_BY_A_RUN)
               if not any((folder / file).exists() for folder in (ROOT, home, ROOT / "study"))]
    assert not missing, f"{name} names files that do not exist: {missing}"


def intervals(text):
    """Return all numbers with an interval, "x [a, b]" or "x [a, b] %", as triples of text."""
    return re.findall(rf"{NUMBER} \[{NUMBER}, {NUMBER}\]", " ".join(text.split()))


def same(quoted, printed):
    """Return whether a quoted number is a printed one, rounded or not."""
    *bound, number = quoted.split(" ")
    *printed_bound, exact = printed.split(" ")
    if bound != printed_bound or "never" in (number, exact):
        return quoted == printed
    digits = 0 if "e" in number else len(number.partition(".")[2])
    return abs(float(number) - float(exact)) <= 0.501 * 10.0**-digits


def test_every_number_with_an_interval_is_printed_by_a_command(tmp_path):
    """In the report, and in two sections of the README. The commands read the tables only."""
    shutil.copytree(ROOT / "results", tmp_path / "results",
                    ignore=shutil.ignore_patterns("logs", "queue", "*.png"))
    done = [here(tmp_path, *command) for command in PRINTED]
    assert [run.stderr for run in done if run.returncode] == []
    printed = [triple for run in done for triple in intervals(run.stdout)]
    result = re.search("\n## The result.*?\n## ", README, re.S)[0]
    why = re.search("\n### Why bytes cost.*?\n## ", README, re.S)[0]
    for text in (REPORT, result, why):
        missing = [triple for triple in intervals(text)
                   if not any(all(map(same, triple, other)) for other in printed)]
        assert missing == [], "no command prints these"


def test_no_line_of_the_readme_is_over_120_columns():
    assert [line for line in README.splitlines() if len(line) > 120] == []
