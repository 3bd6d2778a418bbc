"""scaling.py and sweep.py: published tables, planted gaps, broken and killed sweeps."""
import argparse
import csv
import re
import runpy
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
import sweep
import train_ar
from model import Config, flops_per_token

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
    """The finished command that shows the published tables: its stdout, and the figures' folder."""
    folder = tmp_path_factory.mktemp("published")
    shutil.copy(PUBLISHED, folder)
    shutil.copy(PUBLISHED.with_name("baselines.csv"), folder)
    return here(folder, "scaling.py", "--plot-only", "--out", "."), folder


@pytest.fixture(scope="module")
def lowest_budget(tmp_path_factory):
    """The finished command that shows the rows of 1e12 alone, which is faster."""
    folder = tmp_path_factory.mktemp("lowest")
    shutil.copy(PUBLISHED, folder)
    return here(folder, "scaling.py", "--plot-only", "--out", ".", "--budgets", "1e12")


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

def test_the_report_holds_every_table_of_the_published_runs(published):
    done, folder = published
    assert done.returncode == 0, done.stderr
    tables = [line for line in done.stdout.splitlines() if line.startswith("|")]
    report = (ROOT / "results" / "README.md").read_text().splitlines()
    assert len(tables) > 40 and [line for line in tables if line not in report] == []
    assert (folder / "runs.csv").read_bytes() == PUBLISHED.read_bytes()
    for name in ("isoflops", "frontier", "gap", "profile", "predicted", "residuals"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (ROOT / "results" / f"{name}.png").exists()


def test_the_report_holds_the_tables_of_english(capsys):
    """The lowest losses, their minima, and the gap; the sha256 is that of the text's own script."""
    folder = ROOT / "results" / "english"
    used = [row for row in sweep.read_rows(folder / "runs.csv") if scaling.by_the_rules(row)]
    bpe = next(row for row in used if row["tokenizer"] == "bpe")
    found = scaling.analyse(used, scaling.read_baselines(folder / "baselines.csv", bpe))
    scaling.report_lowest(used)
    scaling.report_minima(found)
    scaling.report_gaps(found, scaling.gaps_without_law(found))
    tables = capsys.readouterr().out
    rows = [line for line in tables.splitlines() if line.startswith("|")]
    report = (ROOT / "results" / "README.md").read_text()
    assert len(rows) > 14 and [row for row in rows if row not in report.splitlines()] == []
    assert runpy.run_path(str(ROOT / "results/english.py"))["PUBLISHED"] in report
    first = (ROOT / "README.md").read_text()
    for objective in ("AR", "MDM"):
        row = re.search(rf"[|] {objective} [|] 1e13 [|] ([\d.]+) \[([\d.]+), ([\d.]+)\]", tables)
        words = "{:.2f} [{:.2f}, {:.2f}]".format(*map(float, row.groups()))
        assert f"{words} ({objective})" in first


def test_the_sensitivity_in_the_report_is_that_of_its_table():
    report = (ROOT / "results" / "README.md").read_text()
    chapter = report[report.index("### 3.14"):report.index("### 3.15")]
    rows = sweep.read_rows(PUBLISHED.with_name("sensitivity.csv"))
    assert len(rows) >= 4 and all(f"| {row['val_bpb']:.3f} |" in chapter for row in rows)


def test_the_result_in_the_first_document_is_that_of_the_tables(published):
    """Bits lost at 1e13, G at 3e12, and the trend without 1e12, with their intervals."""
    text = " ".join((ROOT / "README.md").read_text().split())
    number = r"([-+]?[\d.]+) \[([-+]?[\d.]+), ([-+]?[\d.]+)\]"

    def found(row, digits, sign=""):
        values = map(float, re.search(row + number, published[0].stdout).groups())
        return "{} [{}, {}]".format(*(f"{value:{sign}.{digits}f}" for value in values))

    assert f"cost AR {found(r'[|] AR [|] 1e13 [|] ', 2)} bits per byte" in text
    assert f"cost MDM {found(r'[|] MDM [|] 1e13 [|] ', 2)}" in text
    assert f"needs {found(r'[|] AR [|] 3e12 [|] 0[^|]+[|] ', 0)} times the compute" in text
    assert f"or {found(r'[|] MDM [|] 3e12 [|] 0[^|]+[|] ', 0)} times (MDM)" in text
    assert f"is {found(r'[|] AR [|] 3e12 [|] (?=[-+])', 2, '+')}." in text


def test_every_published_run_has_its_log_or_is_older():
    logs = {path.stem for path in (PUBLISHED.parent / "logs").iterdir()}
    labels = [sweep.label(row) for name in ("runs.csv", "remedies.csv", "shuffle.csv", "span.csv",
                                       "sensitivity.csv")
              for row in sweep.read_rows(PUBLISHED.with_name(name))]
    assert logs <= set(labels) and len(logs) >= 15


def test_intervals_in_words():
    assert scaling.interval(np.array([2.514, *np.linspace(2, 3, 101)])) == "2.51 [2.05, 2.95]"
    assert scaling.interval(np.array([12345.0, 1.0, np.inf])) == "1e4 [1.00, never]"
    assert scaling.interval(np.array([1234.0, 999.6, 9999.0])) == "1.23e3 [1.00e3, 1.00e4]"


def test_lines_that_are_no_result_are_named_and_left_out(lowest_budget, table):
    header, first, *others = table.read_text().splitlines()
    count = 2 + len(others)
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
    done = here(table.parent, "scaling.py", "--plot-only", "--out", ".", "--budgets", "1e12")
    assert done.returncode == 0 and done.stdout == lowest_budget.stdout
    complaints = [line for line in done.stderr.splitlines() if ", line " in line]
    named = [int(re.search(r"line (\d+)", text)[1]) for text in complaints]
    assert named == list(range(count + 1, count + 12))
    for (column, value), text in zip(broken, complaints, strict=False):
        assert column in text and value in text or value == "rnn"
    assert "line 2 is the same run" in complaints[-2]


def test_a_table_keeps_its_unknown_columns_and_broken_lines_when_a_row_is_added(table):
    lines = table.read_text().splitlines()
    lines = [lines[0] + ",note", *(line + ",mine" for line in lines[1:]), "ar,bpe,broken"]
    table.write_text("\n".join(lines) + "\n")
    row = sweep.read_rows(PUBLISHED)[0]
    sweep.add_row(table, row)
    sweep.add_row(table, row | {"seed": 7})
    # Columns that the table lacked are new and empty.
    before, after = ([{key: cell for key, cell in line.items() if cell}
                      for line in csv.DictReader(text)]
                     for text in (lines, table.read_text().splitlines()))
    assert after[:-1] == before and before[-1]["vocab_size"] == "broken"
    assert sweep.find(row | {"seed": 7}, sweep.read_rows(table))


def test_sweeps_at_once_lose_no_row_of_each_other(tmp_path):
    rows = [sweep.read_rows(PUBLISHED)[0] | {"seed": seed} for seed in range(24)]
    path = tmp_path / "runs.csv"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda row: sweep.add_row(path, row), rows))
    assert all(sweep.find(row, sweep.read_rows(path)) for row in rows)
    assert len(sweep.read_rows(path)) == 24


@pytest.mark.parametrize("column, value", [("sha256", "0" * 64), ("context_bytes", 128)])
def test_runs_of_different_texts_or_contexts_are_not_mixed(table, column, value):
    rows = sweep.read_rows(table)
    sweep.write_rows(table, [rows[0] | {column: value}, *rows[1:]])
    done = here(table.parents[1], "scaling.py", "--plot-only")
    assert_one_line(done, f"mix runs of different {column}", "--out")


def test_runs_with_another_learning_rate_or_batch_stay_out_of_the_fits(lowest_budget, table):
    row = sweep.read_rows(table)[0]
    assert row["flops_budget"] == 1e12
    for change in ({"lr": 0.5}, {"batch_tokens": 160}):
        sweep.add_row(table, row | change | {"val_bpb": 1.0})
    done = here(table.parent, "scaling.py", "--plot-only", "--out", ".", "--budgets", "1e12")
    assert done.stdout == lowest_budget.stdout and "2 runs" in done.stderr


# -----------------------------------------------------------------------------------------------
# What is to be trained.

def test_every_published_run_by_the_rules_counts_as_done_and_no_other_setting_does():
    rows = sweep.read_rows(PUBLISHED)
    corpora, args = fake_corpora(rows), argparse.Namespace(context=512)
    used = [row for row in rows if scaling.by_the_rules(row)]
    assert len(used) > 70
    for row in used:
        configuration = row["objective"], row["tokenizer"]
        spec = sweep.settings(configuration, row["flops_budget"], row["width"], row["seed"], args,
                              corpora)
        assert sweep.find(spec, rows) is row
        for key in ("lr", "vocab_size", "context_bytes", "heads", "sha256", "seed"):
            assert sweep.find(spec | {key: "another"}, rows) is None


# -----------------------------------------------------------------------------------------------
# The analysis, on planted losses.

def planted(loss):
    """Return rows of a study: losses loss(configuration, N, D, C) with a little noise."""
    rng, rows = np.random.default_rng(0), []
    for configuration in sweep.CONFIGURATIONS:
        vocab, context = (4096, 160) if configuration[1] == "bpe" else (256, 512)
        for C in (1e12, 3e12, 1e13, 3e13, 1e14):
            for width in sweep.bracket(configuration[0], C):
                config = Config(vocab, context, width)
                N, D = 16 * width**2 * config.depth, C / flops_per_token(config)
                bpb = loss(configuration, N, D, C) + 0.003 * rng.standard_normal()
                rows.append({"objective": configuration[0], "tokenizer": configuration[1],
                             "vocab_size": vocab, "flops_budget": C, "width": width, "heads": 1,
                             "seed": 0, "lr": 1, "batch_tokens": 1, "context_bytes": 512,
                             "context_tokens": context, "shuffle": 1, "span": 1, "schedule": "",
                             "conv": 0, "patch": 1, "permutation": 0, "phase": 0,
                             "span_share": 1.0,
                             "corpus": "x", "sha256": "y", "tokens": D, "bytes": 3 * D,
                             "params_non_embedding": N, "val_bpb": bpb})
    return rows


def frontier_loss(configuration, N, D, C):
    """Bytes need 8 times the compute of BPE, at every budget. E is 0.8 for all."""
    scale = 2.0 if configuration[0] == "ar" else 3.0
    used = C / (8 if configuration[1] == "byte" else 1)
    offset = np.log(N / (1e5 * (C / 1e13) ** 0.6))
    return 0.8 + scale * (used / 1e12) ** -0.15 + 0.05 * offset**2


def test_planted_gap_entropy_and_parity_are_found():
    rows = planted(frontier_loss)
    found = scaling.analyse(rows, {})
    gaps = scaling.gaps_without_law(found)
    for gap in gaps.values():
        solid = np.isfinite(gap.G[0])
        # Bytes reach BPE up to an eighth of the largest budget.
        assert (gap.budgets[solid] == [1e12, 3e12, 1e13]).all() and gap.top == 1e14
        assert gap.G[0, solid] == pytest.approx(8, rel=0.08)
        assert scaling.trend_of(gap, 0, solid)[0] == pytest.approx(0, abs=0.05)
        assert scaling.trend_of(gap, 1e13, solid) is None
    for cut in scaling.CUTS[:2]:
        law = scaling.fit("frontier law", found, scaling.choose(found, cut))
        assert law.grid[law.shared[0]] == pytest.approx(0.8, abs=0.1)
        assert law.aicc_one < law.aicc_separate
        for objective in ("ar", "mdm"):
            C = np.geomspace(1e12, 1e30, 200)
            G, parity = scaling.extrapolate(law, objective, C)
            assert np.median(G[:, C < 1e20]) == pytest.approx(8, rel=0.3)
            assert np.isinf(parity).mean() > 0.3
    for _, _, _, following, pairs in scaling.predictions(rows, found):
        assert following in (3e13, 1e14) and len(pairs) == 4
        for predicted, measured in pairs.values():
            assert predicted == pytest.approx(measured, abs=0.08)


def test_G_is_the_product_of_its_parts():
    found = scaling.analyse(planted(frontier_loss), {})
    parts = scaling.take_apart(found, "ar", 1e13, 8.0)
    assert np.prod(parts) == pytest.approx(8) and min(parts) > 0.5
    # At equal size a byte costs less than a BPE token, and a token is three bytes here.
    width = Config(256, 512, 64), Config(4096, 160, 64)
    log_n = np.log(16 * 64**2 * 2)
    costs = [scaling.flops_per_byte(found["ar", tokenizer], log_n) for tokenizer in ("byte", "bpe")]
    assert costs == pytest.approx([flops_per_token(config) / 3 for config in width])


def test_a_budget_at_which_counting_does_as_well_stays_out_of_the_fits():
    rows = planted(frontier_loss)
    found = scaling.analyse(rows, {("bpe", "bigram"): 2.7, ("byte", "bag"): 0.1})
    assert found["ar", "bpe"].passed.tolist() == [False, True, True, True, True]
    assert not found["mdm", "byte"].passed.any() and found["ar", "byte"].passed.all()
    chosen = scaling.choose(found, "past counting")
    assert ("mdm", "byte") not in chosen and chosen["ar", "byte"].all()
    assert (found["ar", "bpe"].C[chosen["ar", "bpe"]] > 1e12).all()
    without = scaling.choose(found, scaling.CUTS[2])
    assert (found["ar", "byte"].C[without["ar", "byte"]] > 1e12).all()


def test_a_verdict_needs_all_laws_to_agree():
    never, one, far = np.full(101, np.inf), np.full(101, 1e20), np.geomspace(1e15, 1e25, 101)
    assert scaling.verdict([never, never]) == "not below 1e30"
    assert scaling.verdict([one, one]) == "1e20 to 1e20"
    assert scaling.verdict([one, far]) == scaling.verdict([one, never]) == "undecided"


@pytest.mark.parametrize("flags, words", [
    (("--seeds", -1), "--seeds"), (("--seeds", 2**64), "--seeds"), (("--widths", 20), "width 20"),
    (("--widths", "9" * 400), "--widths"), (("--budgets", "nan"), "--budgets"),
    (("--budgets", "0"), "--budgets"), (("--budgets", "1e308"), "--budgets"),
    (("--budgets", "1e6"), "do not pay for one step"), (("--jobs", 0), "--jobs")])
def test_a_dry_run_refuses_what_must_fail_later(workplace, flags, words):
    assert_one_line(here(workplace, "scaling.py", *TINY, "--dry-run", *flags), words)


def corpora_of(budgets, monkeypatch, **flags):
    """Return what load_corpora loads for these budgets, and the --data of the commands."""
    loaded = []
    monkeypatch.setattr(sweep.data, "load", lambda source, *_: loaded.append(source) or
                        SimpleNamespace(name=source, meta={
                            "train_bytes": 89e6 if source == "pysrc" else 1e12}))
    args = argparse.Namespace(budgets=budgets, widths=None, vocab=4096, context=512, data=None,
                              dry_run=False)
    vars(args).update(flags)
    sweep.load_corpora(args)
    return loaded, args.data


def test_all_runs_of_a_sweep_read_one_text_that_is_large_enough(monkeypatch, capsys):
    assert corpora_of([1e12, 1e14], monkeypatch) == (["pysrc"] * 2, "pysrc")
    loaded, given = corpora_of([1e12, 1e17], monkeypatch)
    assert loaded == [given] * 2 and re.fullmatch(r"c4:\d+", given)
    assert corpora_of([1e12, 1e17], monkeypatch, dry_run=True) == (["c4:1"] * 2, given)
    # A narrow model reads much text.
    with pytest.raises(sweep.InputError, match="pysrc .* times: take --data c4, or --data pysrc"):
        corpora_of([1e15], monkeypatch, widths=[16])
    assert capsys.readouterr().err == ""
    assert corpora_of([1e15], monkeypatch, widths=[16], data="pysrc")[1] == "pysrc"
    assert "more than 4 teach little" in capsys.readouterr().err


def test_each_job_gets_gpus_of_its_own(tmp_path, monkeypatch):
    rows = sweep.read_rows(PUBLISHED)
    environments = []
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(sweep.subprocess, "Popen",
                        lambda *_, env, **__: environments.append(env))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,6,7")
    args = argparse.Namespace(nproc=2, data="pysrc")
    for slot in range(3):
        sweep.launch(rows[0], args, tmp_path, slot, jobs=3)
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
    monkeypatch.setattr(sweep, "command", lambda *_: ["-c", code])
    spec = sweep.read_rows(PUBLISHED)[0]
    output = Path("runs") / sweep.label(spec) / "output.txt"
    output.parent.mkdir(parents=True)
    output.write_text("error: of an older try\n")
    args = argparse.Namespace(jobs=1, nproc=1)
    failure, = sweep.sweep([spec], Path("results/runs.csv"), args, Path("runs"))
    assert failure.startswith(f"failed: {sweep.label(spec)}: ") and words in failure
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
    rows = sweep.read_rows(workplace / "results" / "runs.csv")
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
    after = sweep.read_rows(workplace / "results" / "runs.csv")
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
    assert "no IsoFLOP minima for AR, BPE; AR, bytes; MDM, BPE; MDM, bytes: that" in second.stdout
    assert second.stdout.count("(16)") == 4
    assert sorted(path.name for path in (workplace / "results").iterdir()) == [
        "isoflops.png", "logs", "runs.csv"]
    assert len(list((workplace / "results" / "logs").iterdir())) == 4


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
        assert process.returncode == 130 and stderr.endswith("resumes a run)\n")
