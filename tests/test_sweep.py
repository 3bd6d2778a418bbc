"""study/sweep.py and study/fragility.py: runs and their rows, what a shuffle loses, spans."""
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, assert_one_line, here

import scaling
from study import fragility, sweep
from study.train import PLAIN, arguments

TABLES = ("remedies.csv", "shuffle.csv", "span.csv", "sensitivity.csv", "context.csv", "tune.csv",
          "batch.csv", "english/runs.csv")
TINY = ("--data", "text.txt", "--vocab", 300, "--context", 64, "--budgets", "5e8", "--widths", 16,
        "--out", "why")
LAUNCH = SimpleNamespace(nproc=1, data="pysrc", vocab=4096)


@pytest.mark.parametrize("table", TABLES)
def test_a_command_trains_the_row_that_it_is_made_from(table):
    rows = sweep.read_rows(ROOT / "results" / table)
    assert len({sweep.folder_of(row) for row in rows}) == len(rows) > 9
    for row in rows:
        module, *flags = sweep.command(row, LAUNCH, "out")[1:]
        args = arguments("doc").parse_args(flags)
        # study.train writes what is not plain.
        result = {key: value for key, value in vars(args).items() if PLAIN.get(key) != value}
        result |= {"flops_budget": args.flops, "batch_tokens": args.batch}
        assert sweep.settings_of(sweep.row_of(row | dict.fromkeys(sweep.NEUTRAL) | result)) \
            == sweep.settings_of(row)


def test_flags_are_what_a_plain_run_does_not_have():
    plain = sweep.read_rows(ROOT / "results/runs.csv")[-1]
    assert sweep.flags_of(plain) == {}
    assert sweep.flags_of(plain | {"depth": 4, "ngram": 3}) == {"depth": 4, "ngram": 3}
    assert sweep.command(plain | {"depth": 4}, LAUNCH, "out")[-2:] == ["--depth", "4"]
    # An MDM masks its patches whole.
    assert sweep.flags_of(plain | {"objective": "mdm", "patch": 4, "span": 4}) == {"patch": 4}
    assert sweep.folder_of(plain) == scaling.folder_of(plain)


def test_a_row_is_added_once_and_other_lines_stay_as_they_are(tmp_path):
    path = tmp_path / "runs.csv"
    shutil.copy(ROOT / "results/tune.csv", path)
    before = path.read_text().splitlines()
    row = sweep.read_rows(path)[0]
    result = {key: row[key] for key in (*scaling.SETTINGS, *scaling.RESULTS)} | {
        "corpus": {"name": "pysrc"}, "depth": 3, "patch": 2}
    for _ in range(2):
        sweep.add_row(path, result)
    lines = path.read_text().splitlines()
    assert len(lines) == len(before) + 1
    assert all(line.startswith(old + ",") for old, line in zip(before, lines, strict=False))
    assert sweep.flags_of(sweep.read_rows(path)[-1]) == {"depth": 3, "patch": 2}
    path.with_name("span.csv").write_text("\n".join([*lines, "ar,byte,nothing"]))
    for study, words in (("span", f"row {len(lines)} cannot be read"), ("shuffle", "no finished")):
        done = here(tmp_path, "study.fragility", study, "--plot-only", "--out", ".")
        assert_one_line(done, f"{study}.csv", words)


def test_a_study_trains_what_its_table_lacks(workplace, monkeypatch):
    """One run that succeeds, and one that fails."""
    monkeypatch.setattr(fragility, "runs_of", lambda args, configuration, corpus: [
        {"span": 4}, {"span": 3}] if configuration == ("mdm", "byte") else [])
    command = ("study.fragility", "span", *TINY)
    missing = here(workplace, *command, "--dry-run").stdout.splitlines()
    assert len(missing) == 2 and "python -m study.train mdm" in missing[0]
    done = here(workplace, *command)
    assert_one_line(done, "1 runs failed")
    assert "failed: error: --span: 3 does not divide 64 tokens" in done.stdout
    row, = sweep.read_rows(workplace / "why/span.csv")
    assert sweep.flags_of(row) == {"span": 4}
    assert here(workplace, *command, "--dry-run").stdout.splitlines() == missing[1:]
    shown = here(workplace, "study.fragility", "span", "--plot-only", "--out", "why").stdout
    assert f"| 4 | {row['val_bpb']:.2f} [" in shown and f"| {row['val_bpb_span1']:.2f} [" in shown


def test_the_table_shows_the_mean_over_seeds_of_the_best_width():
    row = dict.fromkeys(sweep.SETTINGS, 0) | {"objective": "ar", "tokenizer": "byte",
                                              "shuffle": 4, "val_bpb_stderr": 0.1}
    runs = [(32, 0, 2.0), (32, 1, 3.0), (64, 0, 2.25), (64, 1, 2.35)]
    rows = [row | {"width": width, "seed": seed, "val_bpb": bpb} for width, seed, bpb in runs]
    bpb, half = fragility.summary(rows, "shuffle")["ar", "byte"][4]
    assert bpb == pytest.approx(2.3) and half == pytest.approx(0.1645)


def planted_shuffles(lost, spread=0.0, seed=0):
    """Return rows of AR on bytes with phase that lose lost[W], two seeds and two permutations."""
    rng, rows = np.random.default_rng(seed), []

    def add(bpb, phase, shuffle, seed, permutation=0):
        row = dict.fromkeys(sweep.SETTINGS, 0) | sweep.NEUTRAL
        bpb += 0.01 * (spread > 0) * rng.standard_normal()
        rows.append(row | {"objective": "ar", "tokenizer": "byte", "width": 48, "seed": seed,
                           "phase": phase, "shuffle": shuffle, "permutation": permutation,
                           "val_bpb": bpb, "val_bpb_stderr": 0.01 * (spread > 0)})
    for W, bits in lost.items():
        orders = spread * rng.standard_normal(2)
        for i in range(2):
            add(2.7 + spread * rng.standard_normal(), W, 1, i)
            shuffled = 2.7 + bits + spread * rng.standard_normal()
            for index in (0, 1) if W > 2 else (0,):
                add(shuffled + orders[index], W, W, i, index)
    return rows


LOST = {2: 0.1, 4: 0.3, 8: 0.6, 32: 1.0}


def test_planted_losses_with_phase_are_recovered():
    rows = planted_shuffles(LOST)
    lost = fragility.lost_with_phase(rows)["ar", "byte"]
    assert {W: bits for W, (bits, _) in lost.items()} == pytest.approx(LOST)
    assert max(half for _, half in lost.values()) < 1e-9
    # Compared are runs of one seed, the worse width, the other phases and plain BPE play no part.
    noise = [row | {"width": 64, "val_bpb": 9 - row["shuffle"] / 99} for row in rows]
    noise += [row | {"tokenizer": "bpe", "phase": 0, "val_bpb": 1.0} for row in rows]
    lone = [row | {"seed": 7, "val_bpb": 5.0} for row in rows if row["shuffle"] > 1]
    lost = fragility.lost_with_phase(rows + noise + lone)["ar", "byte"]
    assert {W: bits for W, (bits, _) in lost.items()} == pytest.approx(LOST)
    # A seed without one of the permutations is left out.
    table = fragility.bits_lost(rows[:-1], ("ar", "byte"), 32)
    assert table.shape == (2, 1) and table == pytest.approx(1.0)


def test_the_interval_of_what_a_shuffle_loses_covers_the_truth(monkeypatch):
    """A little more often than nine times in ten: what neither explains counts as both."""
    monkeypatch.setattr(fragility, "SAMPLES", 2000)
    inside = []
    for seed in range(200):
        lost = fragility.lost_with_phase(planted_shuffles(LOST, 0.05, seed))["ar", "byte"]
        inside += [abs(bits - LOST[W]) < half for W, (bits, half) in lost.items()]
    assert 0.87 < np.mean(inside) < 0.98


@pytest.mark.parametrize("study, lines", [
    ("shuffle", ["| 2 | 0.27 [0.21, 0.33] | 0.50 [0.48, 0.52] | -0.01 [-0.17, 0.14] |",
                 "| 8 | 0.62 [0.55, 0.70] | 1.25 [1.22, 1.27] | 0.12 [-0.06, 0.30] |",
                 "| 512 | 2.81 [2.79, 2.82] | 4.53 [4.52, 4.55] |"]),
    ("span", ["| 2 | 4.01 [3.99, 4.03] | 3.88 [3.86, 3.90] | 2.81 [2.79, 2.83] |",
              "| 4, in half of the sequences | 3.89 [3.87, 3.91] | 3.22 [3.20, 3.24] |"])])
def test_published_tables_are_shown_without_training(tmp_path, study, lines):
    shutil.copy(ROOT / "results" / f"{study}.csv", tmp_path)
    shown = here(tmp_path, "study.fragility", study, "--plot-only", "--out", ".")
    assert all(line in shown.stdout for line in lines), shown.stdout + shown.stderr
    assert (tmp_path / f"{study}.png").read_bytes().startswith(b"\x89PNG")
