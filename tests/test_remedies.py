"""study/remedies.py: planted remedies, their shares with both sides, free positions, the figure."""
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, here
from matplotlib.figure import Figure

from study import remedies, sweep

CONV = (("conv", 7),)
# (tokenizer, remedy): (lowest loss, best parameters)
PLANTED = {("byte", ()): (3.4, 1e5), ("bpe", ()): (2.6, 5e4),
           ("byte", CONV): (3.1, 1e5), ("bpe", CONV): (2.5, 5e4),
           ("byte", (("patch", 4),)): (3.0, 3e5), ("byte", (("patch", 8),)): (2.9, 3e5),
           ("bpe", (("patch", 2),)): (2.5, 3e5), ("bpe", (("patch", 4),)): (2.3, 3e5),
           ("byte", (("ngram", 4),)): (2.9, 1e5), ("byte", (("ngram", 6),)): (2.8, 1e5),
           ("bpe", (("ngram", 2), ("buckets", 65536))): (2.4, 5e4)}
ARGS = SimpleNamespace(budgets=[3e12], widths=None, seeds=[0], context=512)
CORPORA = {name: SimpleNamespace(meta={"sha256": "one text"}, tokens=lambda _, n=tokens: n,
                                 tokenizer=SimpleNamespace(vocab_size=vocab_size))
           for name, tokens, vocab_size in (("byte", 512, 256), ("bpe", 160, 4096))}


def planted_row(tokenizer, remedy, width, bpb, N):
    row = sweep.settings(("mdm", tokenizer), 3e12, width, 0, ARGS, CORPORA, dict(remedy))
    return row | {"lr": row["lr"] * remedies.best_rate(row), "val_bpb": bpb,
                  "params_non_embedding": N}


def planted_rows(seed=None):
    """Return four widths of each. With a seed they are noisy."""
    rng, rows = np.random.default_rng(seed), []
    for (tokenizer, remedy), (lowest, best) in PLANTED.items():
        for width, N in zip((32, 48, 64, 96), best * np.array([0.3, 0.6, 1.5, 2.5]), strict=True):
            noise = 0 if seed is None else 0.02 * rng.standard_normal()
            bpb = lowest + 0.05 * np.log(N / best) ** 2 + noise
            rows.append(planted_row(tokenizer, remedy, width, bpb, N))
    return rows


def cells(text):
    """Return the lines of tables as lists of texts."""
    return [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]


def test_planted_remedies_are_recovered():
    minima = remedies.analyse(planted_rows())
    assert {(key[0][1], key[1]): minimum.losses[0] for key, minimum in minima.items()} \
        == pytest.approx({key: lowest for key, (lowest, _) in PLANTED.items()})
    assert not any(minimum.outside for minimum in minima.values())


def test_intervals_cover_what_was_planted():
    inside = []
    for seed in range(20):
        for (configuration, remedy, _), minimum in remedies.analyse(planted_rows(seed)).items():
            low, high = np.quantile(minimum.losses[1:], (0.05, 0.95))
            inside.append(low < PLANTED[configuration[1], remedy][0] < high)
    assert 0.82 < np.mean(inside) < 0.96


def test_a_minimum_outside_of_the_widths_is_marked():
    rows = planted_rows()
    for row in rows:
        if (row["tokenizer"], row["patch"]) == ("byte", 4):
            row["val_bpb"] = 3.0 + 0.05 * np.log(row["params_non_embedding"] / 3e6) ** 2
    outside = [key for key, minimum in remedies.analyse(rows).items() if minimum.outside]
    assert outside == [(("mdm", "byte"), (("patch", 4),), 3e12)]


def test_runs_of_other_studies_are_left_out():
    row = planted_row("byte", CONV, 64, 3.0, 1e5)
    assert remedies.remedy_of(row) == CONV and row["lr"] == 0.003
    for change in ({"lr": 0.0015}, {"batch_tokens": 1024}, {"depth": 4}, {"shuffle": 4},
                   {"span": 4}, {"phase": 4}):
        assert remedies.remedy_of(row | change) is None
    # Two widths have no minimum.
    rows = [row for row in planted_rows() if row["width"] > 48 or row["ngram"] != 6]
    assert len(remedies.analyse(rows)) == len(PLANTED) - 1


def test_both_sides_and_free_positions(capsys):
    minima = remedies.analyse(planted_rows())
    remedies.report(minima, remedies.curves_of(minima))
    lines = cells(capsys.readouterr().out)
    # The best n-grams of bytes and of BPE: 2.8 and 2.4 in place of 3.4 and 2.6.
    for kind, bits, share in (("plain", "0.800", ""), ("convolution", "0.600", "25"),
                              ("patch", "0.600", "25"), ("n-gram", "0.400", "50")):
        interval = f"{share} [{share}, {share}]" if share else ""
        assert ["MDM", kind, kind, "3e12", f"{bits} [{bits}, {bits}]", interval] in lines
    # What bytes lose at 64 positions to BPE, which has 2.6, 2.5 and 2.3 at 160, 80 and 40.
    bits = f"{2.9 - (2.3 + 0.2 * np.log2(64 / 40)):.3f}"
    assert ["MDM", "plain", "3e12", "64", f"{bits} [{bits}, {bits}]"] in lines
    assert not any(line[:4] == ["MDM", "plain", "3e12", "512"] for line in lines)
    assert ["MDM, bytes", "patch 8", "3e12", "64", "2.900", "+0.50 [+0.50, +0.50]"] in lines


def drawn_and_printed(monkeypatch, folder):
    """Return the points of the figure {(label, x, y)}, as texts, and the lines of the tables."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    shown = here(folder, "study.remedies", "--plot-only", "--out", ".")
    assert shown.returncode == 0, shown.stderr
    points = {(container.get_label(), f"{x:.0f}", f"{y:.3f}")
              for ax in figures[0].axes for container in ax.containers
              for x, y in container.lines[0].get_xydata()}
    return points, cells(shown.stdout)


@pytest.fixture
def published(tmp_path):
    for name in ("remedies.csv", "runs.csv"):
        shutil.copy(ROOT / "results" / name, tmp_path)
    return tmp_path


def test_published_tables_and_the_points_of_the_figure(published, monkeypatch):
    points, lines = drawn_and_printed(monkeypatch, published)
    conv, patches = ("convolution",) * 2, ("patch, convolution, bell",) * 2
    for line in (["AR", *conv, "3e12", "0.352 [0.339, 0.366]", "33 [30, 36]"],
                 ["AR", "n-gram", "n-gram", "3e12", "0.135 [0.120, 0.149]", "74 [71, 77]"],
                 ["MDM", "n-gram", "n-gram", "3e12", "0.424 [0.398, 0.451]", "48 [45, 52]"],
                 ["MDM", *patches, "1e13", "0.319 [0.299, 0.342]", "58 [55, 61]"],
                 ["MDM", "convolution, bell", "1e13", "64", "0.286 [0.268, 0.307]"],
                 ["AR, bytes", "n-gram 4, stride 8", "3e12", "48", "0.003", "2.420 (1)", "-0.07"],
                 ["MDM, bytes", "patch 8", "1e13", "64", "2.552", "+0.55 [+0.52, +0.57]"]):
        assert line in lines
    # A curve is named by what its points have besides patches; 3e12 has the most.
    rows = {(re.sub(r", patch \d$", ", plain", re.sub(r"patch \d, ", "", f"{line[0]}, {line[1]}")),
             line[3], line[4]) for line in lines if len(line) == 6 and line[2] == "3e12"}
    assert points == rows and len(points) == 29
    # At 1e12 no remedy has three widths: single runs are compared.
    few = here(published, "study.remedies", "--plot-only", "--budgets", "1e12", "--out", ".")
    line = ["MDM, bytes", "patch 8", "1e12", "32", "0.0015", "2.947 (1)", "+0.84"]
    assert few.returncode == 0 and line in cells(few.stdout)


def test_what_is_trained_counts_as_what_it_is():
    specs = remedies.plan(ARGS, CORPORA)
    assert len(specs) == len({sweep.folder_of(spec) for spec in specs}) == 3 * 2 * (7 + 11)
    for spec in specs:
        assert dict(remedies.remedy_of(spec)) == sweep.flags_of(spec)
