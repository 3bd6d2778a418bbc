"""scaling.py and fits.py: planted laws are recovered, with honest intervals; a real sweep is killed, finished, and never done twice."""
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

import figures
import fits
import scaling
from conftest import ROOT, assert_one_line, command, environment, execute, here
from model import Config, flops_per_token
from run import InputError

LAWS = [dict(E=1.1, A=80, B=600, alpha=0.35, beta=0.42), dict(E=0.6, A=12, B=60, alpha=0.2, beta=0.25), dict(E=0, A=400, B=410, alpha=0.34, beta=0.28)]


def value(law, N, D):
    return law["E"] + law["A"] / N ** law["alpha"] + law["B"] / D ** law["beta"]


def design():
    """The N and D of a sweep: 5 budgets, four widths each and two of the last."""
    runs = [(C, width) for C, widths in ((1e12, (16, 32, 48, 64)), (3e12, (32, 48, 64, 96)), (1e13, (48, 64, 96, 128)), (3e13, (64, 96, 128, 192)),
                                         (1e14, (128, 192))) for width in widths]
    shapes = [Config(width=width) for _, width in runs]
    return (np.array([16.0 * shape.width**2 * shape.depth for shape in shapes]),
            np.array([C / flops_per_token(shape) for (C, _), shape in zip(runs, shapes)]))


# ---------------------------------------------------------------------------------------------------------------------
# The fits.

@pytest.mark.parametrize("law", LAWS)
def test_a_planted_law_is_recovered(law):
    N, D = design()
    found = scaling.fit_law(N, D, value(law, N, D))
    assert found["alpha"] == pytest.approx(law["alpha"], rel=0.01) and found["beta"] == pytest.approx(law["beta"], rel=0.01)
    assert value(found, N, D) == pytest.approx(value(law, N, D), rel=1e-4)
    assert all(isinstance(number, float) for number in found.values()) and found.keys() == law.keys()


def test_the_intervals_hold_the_truth_as_often_as_they_say():
    law, rng, (N, D) = LAWS[0], np.random.default_rng(0), design()
    clean, truth, hits = value(law, N, D), np.array(list(law.values())), np.zeros(5)
    for trial in range(200):
        laws = fits.fit_laws(N, D, clean * (1 + 0.01 * rng.standard_normal(len(N))), fits.resample(N, D, 60, trial))
        low, high = np.quantile(laws[1:], (0.05, 0.95), axis=0)
        hits += (low <= truth) & (truth <= high)
    share = dict(zip(fits.NAMES, hits / 200))
    assert all(0.80 <= share[name] <= 0.98 for name in fits.NAMES), share


def test_non_negative_least_squares_meets_its_optimality_conditions():
    """At the optimum the gradient is zero where a coefficient is positive, and not negative where it is zero (Karush, Kuhn, Tucker)."""
    rng = np.random.default_rng(1)
    X, y = rng.standard_normal((300, 8, 3)), rng.standard_normal((300, 8, 1))
    gram, moment = X.transpose(0, 2, 1) @ X, (X.transpose(0, 2, 1) @ y)[..., 0]
    best, explained = fits.nonnegative(gram, moment)
    slope = (gram @ best[..., None])[..., 0] - moment
    assert (best >= 0).all() and (slope > -1e-9).all() and np.abs(slope[best > 0]).max() < 1e-9
    assert (y[..., 0]**2).sum(axis=1) - explained == pytest.approx(((y - X @ best[..., None])**2).sum(axis=(1, 2)))
    assert (best == 0).any() and (best > 0).all(axis=1).any()


def test_weights_are_repetitions():
    N, D = design()
    L = value(LAWS[1], N, D) * (1 + 0.01 * np.random.default_rng(2).standard_normal(len(N)))
    weights = fits.resample(N, D, 3, seed=0)
    for row in weights:
        repeated = np.repeat(np.arange(len(N)), row.astype(int))
        # The zoom starts from the mean size of its points, so that the two searches end near each other and not at the same digit.
        assert value(dict(zip(fits.NAMES, fits.fit_laws(N, D, L, row[None])[0])), N, D) == pytest.approx(
            value(scaling.fit_law(N[repeated], D[repeated], L[repeated]), N, D), rel=2e-3)
    assert (weights[0] == 1).all() and (weights.sum(axis=1) == len(N)).all()


@pytest.mark.parametrize("N, D, L, word", [
    ([1, 2, 3, 4], [1, 2, 3, 4], [4, 3, 2, 1], "five different points"), ([1, 1, 1, 2, 2, 2], [1, 2, 3, 1, 2, 3], [6, 5, 4, 3, 2, 1], "three different N"),
    ([1, 2, 3, 1, 2, 3], [1, 1, 1, 2, 2, 2], [6, 5, 4, 3, 2, 1], "three different D"), ([], [], [], "five"), ([1, 2, 3], [1, 2], [1], "length"),
    ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 4, float("nan")], "positive, finite"), ([0, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5], "positive")])
def test_too_little_for_a_law(N, D, L, word):
    with pytest.raises(InputError, match=word):
        scaling.fit_law(N, D, L)


# ---------------------------------------------------------------------------------------------------------------------
# Frontier, gap, parity.

def test_the_frontier_is_the_best_of_the_widths():
    """Against the losses of real configurations."""
    law, C = LAWS[0], np.array([1e14, 1e16, 1e18])
    lowest, place = (part[0] for part in fits.frontier(np.array([list(law.values())]), C, 256, 512))
    shapes = [Config(width=width) for width in (16, 32, 48, *range(64, 4096, 32)) if width < 256 or width % 64 == 0]
    N, flops = np.array([16.0 * shape.width**2 * shape.depth for shape in shapes]), np.array([flops_per_token(shape) for shape in shapes])
    for budget, low in zip(C, lowest):
        real = value(law, N, budget / flops).min()
        assert low == pytest.approx(real, rel=0.005)          # real depths are whole
    assert (np.diff(lowest) < 0).all() and (np.diff(place) > 0).all()


C = np.geomspace(1e10, 1e30, 801)


def test_gap_and_parity_of_planted_frontiers():
    """BPE: 3 (C / 1e10)^-0.05. Bytes need 10 times the compute at 1e10 and as much at 1e20: they meet there."""
    bpe = 3 * (C / 1e10) ** -0.05
    slope = 0.05 * 10 / 9                                     # then G = 10^(1 - (log10 C - 10) / 10), and G(1e20) = 1
    byte = 3 * (C / 1e11) ** -slope
    G = fits.gap(byte[None], bpe[None], C)[0]
    assert np.interp([10, 15, 20, 25], np.log10(C), np.log10(G)) == pytest.approx([1, 0.5, 0, -0.5], abs=1e-6)
    assert np.log10(fits.parity(byte[None], bpe[None], C)[0]) == pytest.approx(20, abs=1e-3)
    assert fits.parity(bpe[None], byte[None], C)[0] == pytest.approx(C[0])              # below from the start


def test_frontiers_that_never_meet():
    bpe, parallel, floor = 3 * (C / 1e10) ** -0.05, 3 * (C / 1e11) ** -0.05, 0.5 + 3 * (C / 1e10) ** -0.05
    assert np.isinf(fits.parity(np.stack([parallel, floor]), np.stack([bpe, bpe]), C)).all()
    G = fits.gap(np.stack([parallel, floor]), np.stack([bpe, bpe]), C)
    assert G[0, C < 1e28] == pytest.approx(10) and np.isinf(G[0, -1])         # 1e31 is further than we look
    assert np.isinf(G[1, -1]) and (np.diff(G[1, np.isfinite(G[1])]) > 0).all()


def test_the_gap_at_equal_parameters():
    """Bytes with the same law but for B need (B' / B)^(1 / beta) times the tokens at any size, and each costs what it costs."""
    bpe_law = np.array([[0.5, 80, 600, 0.35, 0.4]])
    byte_law = bpe_law * [1, 1, 2, 1, 1]
    budgets, bpe, byte = np.array([1e13, 1e14]), (4096, 160), (256, 512)
    _, place = fits.frontier(bpe_law, budgets, *bpe)
    ratio = fits.sizes(*byte)[1] / fits.sizes(*bpe)[1]
    assert fits.capacity_gap(byte_law, bpe_law, budgets, byte, bpe) == pytest.approx(2 ** (1 / 0.4) * ratio[place])
    assert np.isinf(fits.capacity_gap(byte_law + [9, 0, 0, 0, 0], bpe_law, budgets, byte, bpe)).all()


def test_a_parabola_and_its_edges():
    N = np.array([1e4, 3e4, 1e5, 3e5])
    lowest, low, _ = fits.parabola(N, 2 + 0.1 * np.log(N / 5e4) ** 2)
    assert lowest == pytest.approx(5e4) and low == pytest.approx(2)
    assert fits.parabola(N, 2 + 0.1 * np.log(N / 5e5) ** 2) is None           # the best is beyond the grid
    assert fits.parabola(N, 2 - 0.1 * np.log(N / 5e4) ** 2) is None           # a hill
    assert fits.parabola(N[:2], [2, 3]) is None


def test_intervals_in_words():
    assert figures.interval(np.array([2.514, *np.linspace(2, 3, 101)])) == "2.51 [2.05, 2.95]"
    assert figures.interval(np.array([12345.0, 1.0, np.inf])) == "1e4 [1.00, never]"


# ---------------------------------------------------------------------------------------------------------------------
# A real sweep.

TINY = ("--data", "text.txt", "--vocab", 300, "--context", 64, "--budgets", "1e9", "3e9", "--widths", 16, 32, 48)


@pytest.fixture(scope="module")
def swept(workplace):
    """The tiny sweep, one of its runs done by a line of --dry-run, killed in the middle, finished by the same command: -> its folder."""
    lines = here(workplace, "scaling.py", *TINY, "--dry-run").stdout.splitlines()
    assert len(lines) == 24 == len(set(lines)) and not (workplace / "results").exists()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    assert subprocess.run(lines[7], shell=True, cwd=workplace, env=environment(PATH=path), capture_output=True, timeout=60).returncode == 0
    assert sorted(here(workplace, "scaling.py", *TINY, "--dry-run").stdout.splitlines() + lines[7:8]) == sorted(lines)
    process = subprocess.Popen(command("scaling.py", *TINY), cwd=workplace, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    table = workplace / "results" / "runs.csv"
    while process.poll() is None and len(scaling.read_rows(table)) < 5:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143 and "the same command goes on" in stderr and "Traceback" not in stderr
    before = scaling.read_rows(table)
    assert 5 <= len(before) < 24
    done = execute(workplace, "scaling.py", *TINY)
    assert done.returncode == 0, done.stderr
    after = scaling.read_rows(table)
    assert len(after) == 24 and all(row in after for row in before)           # with the same seconds: not trained again
    return workplace, done.stdout


FIGURES = ("isoflops.png", "frontier.png", "gap.png", "capacity.png")


def test_the_sweep_is_whole(swept):
    workplace, stdout = swept
    rows = scaling.read_rows(workplace / "results" / "runs.csv")
    for row in rows:
        assert 0.5 * row["flops_budget"] < row["flops_spent"] <= row["flops_budget"] and 1 < row["val_bpb"] < 8
        assert row["lr"] == scaling.TRAIN[row["objective"]].LEARNING_RATE[row["tokenizer"]]
    assert {(row["objective"], row["tokenizer"], row["width"], row["flops_budget"]) for row in rows} == {
        (*cell, width, C) for cell in scaling.CELLS for width in (16, 32, 48) for C in (1e9, 3e9)}
    assert all((workplace / "results" / name).read_bytes().startswith(b"\x89PNG") for name in FIGURES)
    assert stdout.count("| AR, ") == 4 and "AR: the fitted frontiers" in stdout and "MDM: the fitted frontiers" in stdout


def test_a_finished_sweep_is_not_trained_again_even_without_its_folders(swept, tmp_path):
    workplace, stdout = swept
    for name in ("text.txt", "results"):
        (shutil.copytree if (workplace / name).is_dir() else shutil.copy2)(workplace / name, tmp_path / name)
    again = here(tmp_path, "scaling.py", *TINY)
    assert again.returncode == 0 and "24 runs, 24 of them finished; 0 FLOPs to go" in again.stdout and not (tmp_path / "runs").exists()
    tables = [text[text.index("Laws of bits"):] for text in (stdout, again.stdout)]
    assert tables[0] == tables[1]


def test_figures_from_the_table_alone(swept, tmp_path):
    workplace, stdout = swept
    (tmp_path / "results").mkdir()
    shutil.copy(workplace / "results" / "runs.csv", tmp_path / "results")
    plotted = execute(tmp_path, "scaling.py", "--plot-only")
    assert plotted.returncode == 0 and plotted.stdout.strip() == stdout[stdout.index("Laws of bits"):].strip()
    assert all((tmp_path / "results" / name).stat().st_size > 5000 for name in FIGURES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results"]


def test_tables_from_run_folders(swept):
    workplace, stdout = swept
    runs = sorted((workplace / "runs" / "gap").iterdir())
    plotted = here(workplace, "scaling.py", "--plot-only", "--out", "elsewhere", "--runs", *runs)
    assert plotted.returncode == 0 and stdout[stdout.index("Laws of bits"):stdout.index("figures:")] in plotted.stdout


def refused(folder, word, *arguments):
    assert_one_line(here(folder, "scaling.py", *arguments), word)


def test_bad_input_is_one_line(swept, tmp_path):
    workplace, _ = swept
    refused(tmp_path, "no finished runs", "--plot-only")
    refused(workplace, "two budgets", "--plot-only", "--budgets", "1e9")
    refused(workplace, "no finished run", "--plot-only", "--runs", "runs/nothing")
    (tmp_path / "results").mkdir()
    table = tmp_path / "results" / "runs.csv"
    table.write_text("a,b\n1,2\n")
    refused(tmp_path, "not a table of runs", "--plot-only")
    rows = scaling.read_rows(workplace / "results" / "runs.csv")
    for change in ({"sha256": "0" * 64}, {"context_bytes": 128}, {"lr": 0.5}, {"shuffle": 4}, {"heads": 3}):
        scaling.write_rows(table, [rows[0] | change] + rows[1:])
        refused(tmp_path, f"mixes runs of different {next(iter(change))}", "--plot-only")
    for word, *arguments in (("--jobs", "--jobs", 0), ("--budgets", "--budgets", "-1"), ("--plot-only", "--runs", "a"), ("--study", "--study", "x"),
                             ("multiple of the head dimension", *TINY, "--widths", 20)):
        refused(workplace, word, *arguments)


def test_other_text_goes_elsewhere_and_a_failed_run_does_not_stop_the_others(swept, tmp_path):
    """The budget is too small for width 256: its runs fail, are named, and the rest is trained, beside the published runs and not among them."""
    workplace, _ = swept
    (tmp_path / "results").mkdir()
    shutil.copy(workplace / "results" / "runs.csv", tmp_path / "results")
    (tmp_path / "other.txt").write_bytes((workplace / "text.txt").read_bytes()[:-1])
    done = execute(tmp_path, "scaling.py", "--data", "other.txt", "--vocab", 300, "--context", 64, "--budgets", "1e8", "--widths", 16, 256)
    assert "hold" in done.stderr and done.returncode == 2 and done.stderr.count("failed: ") == 4 and "too small for one step" in done.stderr
    table, = (tmp_path / "results").glob("other-*/runs.csv")
    assert len(scaling.read_rows(table)) == 4 and len(scaling.read_rows(tmp_path / "results" / "runs.csv")) == 24


@pytest.mark.parametrize("study", list(scaling.TABLE))
def test_other_text_goes_aside(tmp_path, monkeypatch, study):
    """The published tables stay what they are when someone studies another text in the same clone."""
    shutil.copytree(ROOT / "results", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    sha = scaling.read_rows(Path("results/runs.csv"))[0]["sha256"]
    for digest, folder in ((sha, "results"), ("ab" * 32, "results/notes-abababab")):
        corpora = {"byte": types.SimpleNamespace(meta={"name": "notes", "sha256": digest})}
        assert scaling.home(types.SimpleNamespace(study=study, out=None), corpora) == Path(folder)
