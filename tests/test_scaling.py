"""scaling.py: the published tables, and sweeps that are broken, killed, repeated and finished."""
import argparse
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, assert_one_line, command, here

import scaling
import train_ar

PUBLISHED = ROOT / "results" / "runs.csv"
TINY = ("--data", "text.txt", "--vocab", 300, "--context", 64, "--widths", 16, "--jobs", 2)


@pytest.fixture
def table(tmp_path):
    """A copy of the published table."""
    path = tmp_path / "results" / "runs.csv"
    path.parent.mkdir()
    shutil.copy(PUBLISHED, path)
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The finished command that shows the published table: its stdout, and the figures' folder."""
    folder = tmp_path_factory.mktemp("published")
    shutil.copy(PUBLISHED, folder)
    return here(folder, "scaling.py", "--plot-only", "--out", "."), folder


def fake_corpora(rows):
    """Return what load_corpora returns, as far as settings() needs it, for the text of the rows."""
    corpora = {}
    for row in rows:
        corpora[row["tokenizer"]] = SimpleNamespace(
            name=row["corpus"], meta={"sha256": row["sha256"]}, tokens=lambda nbytes, row=row:
            row["context_tokens"], tokenizer=SimpleNamespace(vocab_size=row["vocab_size"]))
    return corpora


# -----------------------------------------------------------------------------------------------
# Tables and figures.

def test_the_published_tables_come_out_of_the_published_runs(published):
    done, folder = published
    assert done.returncode == 0 and done.stderr == ""
    for line in ("| AR, BPE | 22 | 0.112 [0.00, 0.948] | 7.12 [3.71, 20.7] | 8.77 [7.66, 43.0] | "
                 "0.256 [0.144, 0.375] | 0.132 [0.115, 0.303] | 0.021 |",
                 "| AR, bytes | 2.692 (2.5e4) | 2.360 (5.5e4) | 2.086 (1.1e5) | 1.905 (2.8e5) | "
                 "1.742 (not bracketed) |",
                 "| AR | 1e13 | 0.436 [0.419, 0.459] | 39.4 [21.7, 77.1] (extrapolated) |",
                 "| MDM | 1e12 | 0.940 [0.893, 1.01] | 64.2 [46.5, 114] |",
                 "| AR | never [never, never] | 99% |"):
        assert line in done.stdout
    assert (folder / "runs.csv").read_bytes() == PUBLISHED.read_bytes()
    for name in ("isoflops.png", "frontier.png", "gap.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_intervals_in_words():
    assert scaling.interval(np.array([2.514, *np.linspace(2, 3, 101)])) == "2.51 [2.05, 2.95]"
    assert scaling.interval(np.array([12345.0, 1.0, np.inf])) == "1e4 [1.00, never]"


def test_lines_that_are_no_result_are_named_and_left_out(published, table):
    header, first, *_ = table.read_text().splitlines()
    columns, fields = header.split(","), first.split(",")
    broken = [("val_bpb", "nan"), ("val_bpb", "inf"), ("val_bpb", "-1"), ("flops_budget", "0"),
              ("flops_budget", "nan"), ("tokens", "many"), ("tokens", "9" * 99), ("width", ""),
              ("objective", "rnn")]
    lines = [",".join(value if name == column else field
                      for name, field in zip(columns, fields, strict=True))
             for column, value in broken]
    with open(table, "a") as file:
        # The last two: a run given twice, and a line that was cut.
        file.write("\n".join([*lines, first, first[:40]]) + "\n")
    done = here(table.parent, "scaling.py", "--plot-only", "--out", ".")
    assert done.returncode == 0 and done.stdout == published[0].stdout
    complaints = done.stderr.splitlines()
    assert [int(re.search(r"line (\d+)", text)[1]) for text in complaints] == list(range(89, 100))
    for (column, value), text in zip(broken, complaints, strict=False):
        assert column in text and value in text or value == "rnn"
    assert "line 2 is the same run" in complaints[-2]


def test_a_table_keeps_its_unknown_columns_and_broken_lines_when_a_row_is_added(table):
    lines = table.read_text().splitlines()
    lines = [lines[0] + ",note", *(line + ",mine" for line in lines[1:]), "ar,bpe,broken"]
    table.write_text("\n".join(lines) + "\n")
    row = scaling.read_rows(PUBLISHED)[0]
    scaling.add_row(table, row)
    scaling.add_row(table, row | {"seed": 7})
    after = table.read_text().splitlines()
    assert after[:88] == lines[:88] and after[88].startswith("ar,bpe,broken,,")
    assert len(after) == 90 and scaling.find(row | {"seed": 7}, scaling.read_rows(table))


def test_sweeps_at_once_lose_no_row_of_each_other(tmp_path):
    rows = [scaling.read_rows(PUBLISHED)[0] | {"seed": seed} for seed in range(24)]
    path = tmp_path / "runs.csv"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda row: scaling.add_row(path, row), rows))
    assert all(scaling.find(row, scaling.read_rows(path)) for row in rows)
    assert len(scaling.read_rows(path)) == 24


@pytest.mark.parametrize("column, value", [("sha256", "0" * 64), ("context_bytes", 128)])
def test_runs_of_different_texts_or_contexts_are_not_mixed(table, column, value):
    rows = scaling.read_rows(table)
    scaling.write_rows(table, [rows[0] | {column: value}, *rows[1:]])
    done = here(table.parents[1], "scaling.py", "--plot-only")
    assert_one_line(done, f"mix runs of different {column}", "--out")


def test_runs_with_another_learning_rate_or_batch_stay_out_of_the_fits(published, table):
    row = scaling.read_rows(table)[0]
    for change in ({"lr": 0.5}, {"batch_tokens": 160}):
        scaling.add_row(table, row | change | {"val_bpb": 9.0})
    done = here(table.parent, "scaling.py", "--plot-only", "--out", ".")
    assert done.stdout == published[0].stdout and "2 runs" in done.stderr


# -----------------------------------------------------------------------------------------------
# What is to be trained.

def test_every_published_run_counts_as_done_and_no_other_setting_does():
    rows = scaling.read_rows(PUBLISHED)
    corpora, args = fake_corpora(rows), argparse.Namespace(context=512)
    for row in rows:
        configuration = row["objective"], row["tokenizer"]
        spec = scaling.settings(configuration, row["flops_budget"], row["width"], row["seed"], args,
                                corpora)
        assert scaling.find(spec, rows) is row
        for key in ("batch_tokens", "lr", "vocab_size", "context_bytes", "heads", "sha256", "seed"):
            assert scaling.find(spec | {key: "another"}, rows) is None
    args.budgets, args.widths, args.seeds = [1e12, 3e12], None, [0]
    assert all(scaling.find(spec, rows) for spec in scaling.plan(args, corpora))


@pytest.mark.parametrize("flags, words", [
    (("--seeds", -1), "--seeds"), (("--seeds", 2**64), "--seeds"), (("--widths", 20), "width 20"),
    (("--widths", "9" * 400), "--widths"), (("--budgets", "nan"), "--budgets"),
    (("--budgets", "0"), "--budgets"), (("--budgets", "1e308"), "--budgets"),
    (("--budgets", "1e6"), "do not pay for one step"), (("--jobs", 0), "--jobs")])
def test_a_dry_run_refuses_what_must_fail_later(workplace, flags, words):
    assert_one_line(here(workplace, "scaling.py", *TINY, "--dry-run", *flags), words)


def test_each_job_gets_gpus_of_its_own(tmp_path, monkeypatch):
    rows = scaling.read_rows(PUBLISHED)
    environments = []
    monkeypatch.setattr(scaling.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(scaling.subprocess, "Popen",
                        lambda *_, env, **__: environments.append(env))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,6,7")
    args = argparse.Namespace(nproc=2, data="pysrc")
    for slot in range(3):
        scaling.launch(rows[0], args, tmp_path, slot, jobs=3)
    assert [env["CUDA_VISIBLE_DEVICES"] for env in environments] == ["2,3", "6,7", "2,3"]


# -----------------------------------------------------------------------------------------------
# The sweep. First with other programs in place of training, then for real.

@pytest.mark.parametrize("code, words", [
    ("import os; os.kill(os.getpid(), 9)", "killed by signal 9 (out of memory?)"),
    ("print('error: no luck'); raise SystemExit(2)", "no luck"),
    ("1 / 0", "ZeroDivisionError: division by zero"),
    ("raise SystemExit(3)", "ended with status 3"),
    ("import shutil; shutil.rmtree('runs')", "was it removed?")])
def test_a_failed_run_is_explained_by_its_own_end(tmp_path, monkeypatch, code, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scaling, "command", lambda *_: ["-c", code])
    spec = scaling.read_rows(PUBLISHED)[0]
    output = Path("runs") / scaling.label(spec) / "output.txt"
    output.parent.mkdir(parents=True)
    output.write_text("error: of an older try\n")
    args = argparse.Namespace(jobs=1, nproc=1)
    failure, = scaling.sweep([spec], Path("results/runs.csv"), args, Path("runs"))
    assert failure.startswith(f"failed: {scaling.label(spec)}: ") and words in failure
    assert "older try" not in failure


@pytest.fixture(scope="module")
def swept(workplace):
    """Four runs: one done by a line of --dry-run, one broken at first. Return (folder, outputs)."""
    flags = ("scaling.py", *TINY, "--budgets", "1e9", "--seeds", 0, 0)
    lines = here(workplace, *flags, "--dry-run").stdout.splitlines()
    assert len(lines) == 4 and not (workplace / "results").exists()
    _, script, *words = shlex.split(lines[0])
    assert here(workplace, Path(script).name, *words).returncode == 0
    assert here(workplace, *flags, "--dry-run").stdout.splitlines() == lines[1:]
    broken = workplace / re.search(r"--out (\S+)", lines[3])[1]
    broken.mkdir(parents=True)
    (broken / "checkpoint.pt").write_text("nonsense")
    first = here(workplace, *flags)
    (broken / "checkpoint.pt").unlink()
    rows = scaling.read_rows(workplace / "results" / "runs.csv")
    second = here(workplace, *flags)
    return workplace, broken.name, first, rows, second


def test_a_broken_run_is_named_and_the_others_finish(swept):
    _, name, first, rows, _ = swept
    assert first.returncode == 2 and len(rows) == 3
    failure, = first.stderr.splitlines()
    assert failure.startswith(f"failed: {name}: ") and "checkpoint.pt is corrupt" in failure
    assert "| AR, bytes | " in first.stdout


def test_the_same_command_trains_only_what_is_missing(swept):
    workplace, _, _, rows, second = swept
    after = scaling.read_rows(workplace / "results" / "runs.csv")
    assert second.returncode == 0 and "1 of 4 runs to train" in second.stdout
    # The same seconds: not trained again.
    assert len(after) == 4 and after[:3] == rows
    for row in after:
        assert 0.5e9 < row["flops_spent"] <= 1e9 and 1 < row["val_bpb"] < 8
        assert row["objective"] == "mdm" or row["lr"] == train_ar.LEARNING_RATE[row["tokenizer"]]
    again = here(workplace, "scaling.py", *TINY, "--budgets", "1e9", "--dry-run")
    assert again.stdout == "" and again.returncode == 0


def test_too_few_runs_for_a_law_show_what_there_is(swept):
    workplace, _, _, _, second = swept
    assert second.returncode == 0 and second.stderr == ""
    assert "no law for AR, BPE; AR, bytes; MDM, BPE; MDM, bytes: that takes" in second.stdout
    assert second.stdout.count("(not bracketed)") == 4
    assert sorted(path.name for path in (workplace / "results").iterdir()) == [
        "isoflops.png", "runs.csv"]


def children(pid):
    """Return the living processes whose parent is pid (Linux)."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], stdout=subprocess.PIPE)
    return [int(word) for word in listed.stdout.split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such signal")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM])
def test_however_a_sweep_ends_it_leaves_no_run_behind(swept, number):
    workplace = swept[0]
    flags = command("scaling.py", *TINY, "--budgets", "1e14", "--out", f"out{number}")
    process = subprocess.Popen(flags, cwd=workplace, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE)
    deadline = time.time() + 100
    while not (runs := [pid for pid in children(process.pid)]) or len(runs) < 2:
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.1)
    # Long enough for most of them to have begun.
    time.sleep(3)
    assert all(map(alive, runs))
    process.send_signal(number)
    _, stderr = process.communicate(timeout=100)
    deadline = time.time() + 30
    while any(map(alive, runs)) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, runs))
    if number == signal.SIGTERM:
        assert process.returncode == 130 and stderr.count("\n") == 1 and "resumes" in stderr
