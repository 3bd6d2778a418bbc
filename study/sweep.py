"""Runs of variants: their settings, folders and tables, for the studies that train some.

A run is a dict of SETTINGS, a command of study.train, and a row of a table. A table that is older
than a flag has no column for it: its runs are plain there.
"""
import shlex
import sys
from pathlib import Path

import data
import log
import run
import scaling
from data import InputError
from model import Config
from scaling import CONFIGURATIONS

# What plain runs have.
NEUTRAL = {"shuffle": 1, "span": 1, "schedule": "linear", "conv": 0, "patch": 1, "permutation": 0,
           "phase": 0, "span_share": 1.0, "ngram": 1, "buckets": 16384, "ngram_stride": 1}
SETTINGS = scaling.SETTINGS | {key: type(value) for key, value in NEUTRAL.items()} | {"depth": int}
RESULTS = scaling.RESULTS | {"val_bpb_span1": float, "val_bpb_span1_stderr": float}
# Those of scaling.py, and a light one of each for BPE.
COLORS = dict(zip(CONFIGURATIONS, ("#56B4E9", "#0072B2", "#E69F00", "#D55E00"), strict=True))


def short(flops):
    """Return a number as "1e12"."""
    return f"{flops:g}".replace("e+", "e")


# ---- What is to be trained.

def neutral(line):
    """Return what a plain run has in place of the flags of a run."""
    # An MDM masks a patch whole.
    span = int(line.get("patch") or 1) if line["objective"] == "mdm" else 1
    return NEUTRAL | {"span": span, "depth": Config(width=int(line["width"])).depth}


def settings(configuration, flops, width, seed, args, corpora, flags):
    """Return the settings of a run with these flags of study.train; "lr" may be one of them."""
    corpus = corpora[configuration[1]]
    spec = scaling.settings(*configuration, flops, width, seed, args.context, corpus) | flags
    return neutral(spec) | spec


def settings_of(row):
    return tuple(row[key] for key in SETTINGS)


def flags_of(row):
    """Return the flags of study.train by which a run differs from a plain one."""
    return {key: row[key] for key, value in neutral(row).items() if row[key] != value}


def folder_of(spec):
    """Return the folder of a run. That of a plain run is the one that scaling.py gives it."""
    plain = scaling.folder_of({key: spec[key] for key in scaling.SETTINGS})
    words = [f"{key}{value}" for key, value in flags_of(spec).items()]
    return Path("-".join([str(plain), *words]))


def command(spec, args, out):
    """Return the run as arguments of Python."""
    words = scaling.command(spec, args, out)
    script = words.index("--tokenizer") - 1
    words[script:script + 1] = ["-m", "study.train", spec["objective"]]
    for key, value in flags_of(spec).items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    return words


# ---- The tables of finished runs.

def row_of(line):
    """Return a line of a table, or a result, with its numbers. Flags that it lacks are neutral."""
    known = neutral(line) | {key: value for key, value in line.items() if value not in (None, "")}
    return known | {key: kind(known.get(key, "nan")) for key, kind in (SETTINGS | RESULTS).items()}


def read_rows(path):
    """Return the rows of a table, [] if there is none."""
    return scaling.read_rows(path, row_of)


def add_row(path, result):
    """Add a finished run to what a table holds now. Its other lines stay as they are."""
    added = neutral(result) | result | {"corpus": result["corpus"]["name"]}
    with data.acquire(f"{path}.lock", "waiting for another sweep, which writes its row"):
        lines = scaling.read_rows(path, dict)
        if settings_of(row_of(added)) not in [settings_of(row_of(line)) for line in lines]:
            columns = dict.fromkeys([*(lines[0] if lines else ()), *SETTINGS, *RESULTS])
            log.write_csv(path, columns, [[line.get(key) for key in columns]
                                          for line in [*lines, added]])


def sweep(args, path, budgets, plan):
    """Train the runs of plan(args, corpora) that a table lacks. Return its rows.

    budgets: {kind of device: FLOPs}, if args has none. A dry run prints the commands and ends.
    """
    if not args.plot_only:
        args.out.mkdir(parents=True, exist_ok=True)
        args.budgets = args.budgets or budgets[run.pick_device().type]
        args.data = run.choose_data(args.data, max(args.budgets))
        corpora = {name: data.load(args.data, name, args.vocab) for name in ("byte", "bpe")}
        rows = read_rows(path)
        trained = set(map(settings_of, rows))
        missing = [spec for spec in plan(args, corpora) if settings_of(spec) not in trained]
        if args.dry_run:
            for spec in missing:
                print("python " + shlex.join(command(spec, args, str(folder_of(spec)))))
            sys.exit()
        # Before hours of training, not after them.
        scaling.check_alike([*missing, *rows], path)
        if failed := scaling.train(missing, path, args, command, folder_of, add_row):
            raise InputError(f"{failed} runs failed: the same command tries them again")
    rows = [row for row in read_rows(path)
            if not args.budgets or row["flops_budget"] in args.budgets]
    if not rows:
        raise InputError(f"{path} has no finished run to show")
    scaling.check_alike(rows, path)
    return rows
