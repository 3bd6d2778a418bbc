"""scaling.py: published tables, planted laws, broken and stopped sweeps."""
import argparse
import re
import shlex
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, assert_one_line, command, here
from matplotlib.figure import Figure

import data
import log
import scaling
from data import InputError

PUBLISHED = ROOT / "results" / "runs.csv"
TINY = ("--data", "text.txt", "--vocab", 300, "--context", 64, "--widths", 16, "--jobs", 2)
# The lowest losses, the IsoFLOP minima and the gap, as commit d87cd5a prints them but for the
# intervals: its samples drew all residuals from one pool (tests/test_report.py).
TABLES = """
AR, BPE|2.020 (32)|1.839 (48)|1.656 (64)|1.496 (96)|1.311 (128)|
AR, bytes|2.693 (32)|2.330 (48)|2.093 (48)|1.898 (96)|1.742 (128)|1.497 (192)
MDM, BPE|2.702 (16)|2.531 (32)|2.321 (48)|2.157 (48)|1.974 (128)|
MDM, bytes|3.709 (48)|3.376 (64)|3.055 (64)|2.849 (96)|2.614 (96)|2.424 (192)
AR, BPE|2.025 (3.8e4)|1.840 (7.5e4)|1.654 (1.6e5)|1.497 (3.2e5)|1.313 (6.9e5)|
AR, bytes|2.720 (2.4e4)|2.351 (5.3e4)|2.093 (1.3e5)|1.902 (2.9e5)|1.711 (7e5)|1.494 (1.6e6)
MDM, BPE|2.709 (1.2e4)|2.572 (2.4e4)|2.339 (5.2e4)|2.166 (1e5)|1.948 (2.3e5)|
MDM, bytes|3.718 (2.5e4)|3.400 (5.6e4)|3.107 (1.4e5)|2.841 (3e5)|2.610 (7.3e5)|2.423 (1.6e6)
AR|1e12|0.695 [0.661, 0.726]|14.6 [13.1, 15.9]
AR|3e12|0.510 [0.487, 0.533]|14.6 [13.1, 16.1]
AR|1e13|0.439 [0.418, 0.457]|13.2 [11.8, 14.7]
AR|3e13|0.405 [0.383, 0.422]|9.87 [8.27, above 10]
AR|1e14|0.398 [0.375, 0.428]|above 3
MDM|1e12|1.01 [0.950, 1.07]|58.9 [48.7, 73.1]
MDM|3e12|0.828 [0.784, 0.873]|41.4 [31.9, 54.6]
MDM|1e13|0.768 [0.732, 0.808]|above 30
MDM|3e13|0.675 [0.642, 0.706]|above 10
MDM|1e14|0.662 [0.605, 0.715]|above 3
"""


def rows_of(text):
    """Return the rows of Markdown tables without their frames; 1e+12 is 1e12."""
    text = re.sub(r"e\+0?(\d)", r"e\1", text)
    return [line[2:-2] for line in text.splitlines() if re.match(r"\| (AR|MDM)", line)]


@pytest.fixture
def table(tmp_path):
    """A copy of the published table."""
    shutil.copy(PUBLISHED, tmp_path)
    return tmp_path / "runs.csv"


def plot_only(folder):
    return here(folder, "scaling.py", "--plot-only", "--out", ".")


# ---- Tables and figures.

def test_the_published_runs_have_their_published_tables(table):
    """Digit for digit; "above N" where bytes do not reach BPE; only runs by the rules."""
    done = plot_only(table.parent)
    assert done.returncode == 0, done.stderr
    assert rows_of(done.stdout) == [line.replace("|", " | ") for line in TABLES.split("\n")[1:-1]]
    assert table.read_bytes() == PUBLISHED.read_bytes()
    for name in ("isoflops.png", "gap.png"):
        assert (table.parent / name).read_bytes().startswith(b"\x89PNG")


def drawn(gaps, monkeypatch):
    """Yield what plot_gap draws, for each axes: (points, triangles, bars), each (x, y)."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    scaling.plot_gap("gap.png", gaps)
    for axes in figures[0].axes:
        points, triangles = ({(x, y) for line in axes.lines if line.get_marker() == marker
                              for x, y in line.get_xydata() if np.isfinite(y)}
                             for marker in "o^")
        bars = [tuple(end) for collection in axes.collections
                for segment in collection.get_segments() for end in segment]
        yield points, triangles, bars


def test_the_figure_has_no_point_where_G_was_not_measured(monkeypatch):
    """THE figure of the README: a limit is a hollow triangle, and nothing joins it to a point."""
    gaps = scaling.gaps_between(scaling.fit_minima(
        [row for row in scaling.read_rows(PUBLISHED) if scaling.by_the_rules(row)]))
    (bits, none, _), (points, triangles, bars) = drawn(gaps, monkeypatch)
    measured = [line.split("|") for line in TABLES.splitlines() if line.count("|") == 3]
    assert sorted(x for x, _ in bits) == sorted(float(words[1]) for words in measured)
    assert not none
    known = [(float(words[1]), words[3].split()[0]) for words in measured
             if not words[3].startswith("above")]
    assert sorted((x, f"{y:#.3g}") for x, y in points) == sorted(known) and len(known) == 6
    # A sample of AR at 3e13 has no G, either; the limit is the largest budget of bytes.
    assert triangles == {(x, 3e14 / x) for x in (1e13, 3e13, 1e14)}
    assert all(y <= 3e14 / x * (1 + 1e-9) for x, y in bars)


def test_a_G_below_what_bytes_were_trained_with_is_no_point(monkeypatch):
    G = np.array([[np.inf, 5.0, 0.0]] * 3)
    gap = scaling.Gap(np.array([1e12, 1e13, 1e14]), np.ones_like(G), G, np.array([100, 10, 1]))
    _, (points, triangles, _) = drawn({"ar": gap}, monkeypatch)
    assert points == {(1e13, 5.0)} and triangles == {(1e12, 100.0)}


@pytest.mark.parametrize("broken", ["ar,bpe,many", "nonsense"])
def test_a_row_that_cannot_be_read_is_named_in_one_line(table, broken):
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines[:5], broken, *lines[6:]]))
    assert_one_line(plot_only(table.parent), "runs.csv", "row 5")


@pytest.mark.parametrize("count", [0, 1])
def test_a_table_without_rows_is_one_line(table, count):
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:count]))
    assert_one_line(plot_only(table.parent), "runs.csv", "no finished run")


@pytest.mark.parametrize("column, value", [("sha256", "0" * 64), ("context_bytes", 128)])
def test_runs_of_different_texts_or_contexts_are_not_mixed(table, column, value):
    row = scaling.read_rows(table)[0]
    scaling.add_row(table, row | {column: value})
    assert_one_line(plot_only(table.parent), "different texts or contexts", "--out")


def test_a_table_of_another_text_is_refused_before_anything_is_trained(table, workplace):
    before = table.read_text()
    done = here(workplace, "scaling.py", "--data", "text.txt", "--vocab", 300, "--budgets", 1e9,
                "--widths", 8, "--out", table.parent)
    assert_one_line(done, "different texts or contexts", "--out")
    assert table.read_text() == before


def test_sweeps_at_once_lose_no_row_and_no_column(table):
    rows = [scaling.read_rows(table)[0] | {"seed": seed} for seed in range(100, 116)]
    before = scaling.read_rows(table)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda row: scaling.add_row(table, row), rows + rows[:4]))
    after = scaling.read_rows(table)
    assert after[:len(before)] == before and len(after) == len(before) + 16
    assert sorted(row["seed"] for row in after[len(before):]) == list(range(100, 116))


# ---- The analysis, on planted losses.

BUDGETS = np.array([1e12, 3e12, 1e13, 3e13, 1e14])
C, N = (grid.ravel() for grid in np.meshgrid(BUDGETS, np.geomspace(1e4, 1e6, 6)))


def parabolas(used=C):
    """Return losses whose minima are 40 x used^-0.1, at N* = C^0.5 / 100."""
    return 40 * used**-0.1 + 0.05 * np.log(N / (C**0.5 / 100)) ** 2


def test_planted_minima_are_found_exactly():
    minima, best, curvature, fitted = scaling.pooled_minima(C, N, parabolas()[None])
    np.testing.assert_allclose(minima[0], 40 * BUDGETS**-0.1)
    np.testing.assert_allclose(best[0], np.log(BUDGETS**0.5 / 100))
    np.testing.assert_allclose(curvature, 0.05)
    np.testing.assert_allclose(fitted[0], parabolas())


def test_samples_keep_the_design_and_the_size_of_the_noise():
    sd = 0.01
    L = parabolas() + sd * np.random.default_rng(0).standard_normal(len(C))
    samples = scaling.resample(C, N, L, seed=0)
    assert samples.shape == (401, len(L)) and (samples[0] == L).all()
    minima, _, curvature, fitted = scaling.pooled_minima(C, N, samples)
    assert (curvature > 0).all()
    # Around the fit at each run of the design, with the noise of the losses.
    residuals = samples[1:] - fitted[0]
    assert abs(residuals.mean(axis=0)).max() < 4 * sd / 400**0.5
    assert residuals.std() == pytest.approx(sd, rel=0.3)
    low, high = np.quantile(minima[1:], (0.01, 0.99), axis=0)
    assert (low < minima[0]).all() and (minima[0] < high).all()
    # Too few runs, no minimum between the widths, one width.
    assert scaling.resample(C[:4], N[:4], L[:4], 0) is None
    assert scaling.resample(C, N, -L, 0) is None
    assert scaling.resample(C, np.full_like(N, 1e5), L, 0) is None


def test_planted_compute_to_reach_is_found_exactly():
    losses = 40 * np.array([2e11, 1e12, 2e12, 5e13, 1.001e14]) ** -0.1
    needed = scaling.compute_to_reach(losses, BUDGETS, 40 * BUDGETS**-0.1)
    np.testing.assert_allclose(needed[1:4], [1e12, 2e12, 5e13])
    # Lower at the smallest budget already; never so low.
    assert needed[0] == 0 and needed[4] == np.inf
    # A minimum above that of less compute changes nothing.
    worse, level = (scaling.compute_to_reach([4], BUDGETS[:3], [5, loss, 3]) for loss in (6, 5))
    assert worse == level


def test_a_planted_gap_is_found():
    """Bytes need 8 times the compute of BPE. The losses have a little noise."""
    rng, rows = np.random.default_rng(0), []
    for objective, tokenizer in scaling.CONFIGURATIONS:
        losses = parabolas(C / 8 if tokenizer == "byte" else C)
        for budget, size, loss in zip(C, N, losses, strict=True):
            rows.append(dict.fromkeys(scaling.SETTINGS, 0) | {
                "objective": objective, "tokenizer": tokenizer, "flops_budget": budget,
                "params_non_embedding": size, "val_bpb": loss + 0.003 * rng.standard_normal()})
    gaps = scaling.gaps_between(scaling.fit_minima(rows))
    assert set(gaps) == {"ar", "mdm"}
    for gap in gaps.values():
        known = np.isfinite(gap.G[0])
        # Bytes reach BPE up to an eighth of the largest budget.
        assert (gap.budgets[known] == [1e12, 3e12, 1e13]).all()
        assert gap.G[0, known] == pytest.approx(8, rel=0.08)
        np.testing.assert_allclose(gap.limits, 1e14 / BUDGETS)
        bits = 40 * ((BUDGETS / 8) ** -0.1 - BUDGETS**-0.1)
        np.testing.assert_allclose(gap.bits[0], bits, atol=0.01)


# ---- What is to be trained.

def test_every_published_run_by_the_rules_is_in_the_plan():
    rows = [row for row in scaling.read_rows(PUBLISHED) if scaling.by_the_rules(row)]
    assert len(rows) > 70
    corpora = {row["tokenizer"]: SimpleNamespace(
        meta={"sha256": row["sha256"]}, tokens=lambda nbytes, row=row: row["context_tokens"],
        tokenizer=SimpleNamespace(vocab_size=row["vocab_size"])) for row in rows}
    args = argparse.Namespace(
        context=512, **{name: sorted({row[key] for row in rows}) for name, key in (
            ("budgets", "flops_budget"), ("widths", "width"), ("seeds", "seed"))})
    planned = set(map(scaling.settings_of, scaling.plan(args, corpora)))
    assert planned >= set(map(scaling.settings_of, rows))
    assert scaling.bracket("ar", 1e12) == [16, 32, 48, 64]


def test_each_job_gets_gpus_of_its_own(tmp_path, monkeypatch):
    environments = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,6,7")
    monkeypatch.setattr(scaling.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(scaling.subprocess, "Popen",
                        lambda *_, env, **__: environments.append(env))
    for slot in range(3):
        scaling.launch([], tmp_path, argparse.Namespace(nproc=2), slot, jobs=3)
    assert [env["CUDA_VISIBLE_DEVICES"] for env in environments] == ["2,3", "6,7", "2,3"]


@pytest.mark.parametrize("flags, words", [
    (("--budgets", "nan"), "--budgets"), (("--budgets", "0"), "--budgets"),
    (("--budgets", "1e6"), "does not pay for one step"), (("--jobs", 0), "--jobs"),
    (("--widths", "many"), "--widths"), (("--data", "nowhere"), "nowhere")])
def test_bad_input_is_one_line(workplace, flags, words):
    assert_one_line(here(workplace, "scaling.py", *TINY, "--dry-run", *flags), words)


# ---- A sweep for real.

@pytest.fixture(scope="module")
def swept(workplace):
    """Sweep twice: two runs have rows, one is finished, one is broken. Return what is shown."""
    flags = ("scaling.py", *TINY, "--budgets", "4e8")
    path = workplace / "results/runs.csv"
    lines = here(workplace, *flags, "--dry-run").stdout.splitlines()
    folders = [workplace / re.search(r"--out (\S+)", line)[1] for line in lines]
    for line, folder in zip(lines[:3], folders, strict=False):
        _, script, *words = shlex.split(line)
        assert here(workplace, Path(script).name, *words).returncode == 0
        if folder != folders[2]:
            result = log.read_result(folder)
            scaling.add_row(path, result | {"sha256": result["corpus"]["sha256"]})
    # Copies of logs are never fatal.
    (folders[2] / "log.csv").unlink()
    folders[3].mkdir(parents=True)
    (folders[3] / "checkpoint.pt").write_text("nonsense")
    first, rows = here(workplace, *flags), scaling.read_rows(path)
    (folders[3] / "checkpoint.pt").unlink()
    return workplace, folders[3].name, first, rows, here(workplace, *flags)


def test_a_failed_run_is_one_line_and_the_others_finish(swept):
    _, name, first, rows, _ = swept
    assert_one_line(first, "1 runs failed: the same command tries them again")
    assert first.stdout.count("bits per byte\n") == 1 and len(rows) == 3
    (failure,) = [line for line in first.stdout.splitlines() if "failed" in line]
    assert name in failure and "checkpoint.pt is damaged" in failure


def test_the_same_command_trains_only_what_is_missing(swept):
    workplace, name, _, rows, second = swept
    after = scaling.read_rows(workplace / "results/runs.csv")
    assert second.returncode == 0 and second.stdout.count("bits per byte\n") == 1
    # The same seconds: not trained again.
    assert len(after) == 4 and after[:3] == rows
    for row in after:
        assert 3e8 < row["flops_spent"] <= 4e8 and 1 < row["val_bpb"] < 8
        assert row["lr"] == scaling.TRAIN[row["objective"]].LEARNING_RATE[row["tokenizer"]]
    again = here(workplace, "scaling.py", *TINY, "--budgets", "4e8", "--dry-run")
    assert again.stdout == "" and again.returncode == 0
    assert [path.stem for path in (workplace / "results/logs").iterdir()] == [name]


def test_a_sweep_too_small_for_minima_shows_what_there_is(swept):
    workplace, _, _, _, second = swept
    assert second.stdout.count(" (16) |") == 4
    assert "Too few runs for a minimum" in second.stdout and "What bytes cost" not in second.stdout
    assert (workplace / "results/isoflops.png").read_bytes().startswith(b"\x89PNG")
    assert not (workplace / "results/gap.png").exists()


def test_a_sweep_notices_that_its_text_has_changed(swept, monkeypatch):
    monkeypatch.chdir(swept[0])
    spec = scaling.read_rows(Path("results/runs.csv"))[0] | {"sha256": "0" * 64}
    args = argparse.Namespace(jobs=1, nproc=1, data="text.txt", vocab=300)
    with pytest.raises(InputError, match="text.txt is not the text that this sweep began on"):
        scaling.train([spec], Path("results/runs.csv"), args)
    assert not scaling.folder_of(spec).exists()


def test_a_stopped_sweep_stops_its_runs(swept):
    """Promise: Ctrl-C and SIGTERM end a sweep at once, its children with it."""
    workplace = swept[0]
    flags = command("scaling.py", *TINY, "--budgets", "9e12", "--jobs", 1, "--out", "stopped")
    sweep = subprocess.Popen(flags, cwd=workplace, stdout=subprocess.PIPE, text=True,
                             stderr=subprocess.PIPE)
    outputs = []
    while not outputs:
        assert sweep.poll() is None, sweep.communicate()
        time.sleep(0.1)
        outputs = [path for path in workplace.glob("runs/gap/*c9e*12-*/output.txt")
                   if "it/s" in path.read_text()]
    sweep.terminate()
    _, stderr = sweep.communicate(timeout=30)
    assert sweep.returncode == 130
    assert stderr == "interrupted: the same command resumes, or begins again\n"
    # The run has ended, too, and in one line: its folder is free.
    assert outputs[0].read_text().endswith("the same command resumes, or begins again\n")
    with data.acquire(outputs[0].parent / ".lock"):
        pass
