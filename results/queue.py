"""Train what the claims of 2026-11-29 (results/LOG.md) need: a queue that resumes.

    git clone . ../queue && git -C ../queue checkout d87cd5a
    python results/queue.py ../queue M S F E B --jobs 2

Runs work in the clone, whose checkpoints are kept. A finished run becomes a row of
results/queue/runs.csv and a log beside it; what the table has is not trained again. So rows of N
stay in it when they are copied to remedies.csv and their logs are moved. Stop it at
any time (Ctrl-C, SIGTERM); the same command resumes. D, N, O, T need study/: their clone is of a
commit that has it, with english.jsonl (results/english.py) in it.
"""
import argparse
import csv
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

QUEUE = Path(__file__).resolve().parent / "queue"


def read_table():
    table = QUEUE / "runs.csv"
    return list(csv.DictReader(open(table, newline=""))) if table.exists() else []


def runs_of_m():
    """Yield the short contexts of MDM at 3e13: bytes at 128, BPE at 256."""
    yield "train_mdm.py --tokenizer bpe --context 256 --flops 3e13 --width 48"
    for width in (48, 64, 96):
        yield f"train_mdm.py --context 128 --flops 3e13 --width {width}"


def runs_of_d():
    """Yield models of four layers where the rule has two."""
    for flops, widths in (("1e13", (48, 64)), ("3e13", (64,))):
        for width in widths:
            for tokenizer in ("byte", "bpe"):
                for objective in ("ar", "mdm"):
                    yield (f"-m study.train {objective} --tokenizer {tokenizer} --flops {flops} "
                           f"--width {width} --depth 4")


def runs_of_n():
    """Yield the tables of n-grams: bytes with N = 4 and 6, BPE with N = 2, and the controls."""
    bpe = {"ar": "--tokenizer bpe --ngram 2 --buckets 131072", "mdm": "--tokenizer bpe --ngram 2"}
    widths = {("ar", "byte"): {"3e12": (32, 48, 64), "1e13": (48, 64, 96), "3e13": (96,)},
              ("ar", "bpe"): {"3e12": (32, 48, 64), "1e13": (48, 64, 96), "3e13": (96,)},
              ("mdm", "byte"): {"3e12": (32, 48, 64), "1e13": (48, 64, 96), "3e13": (96,)},
              ("mdm", "bpe"): {"3e12": (16, 32, 48), "1e13": (32, 48, 64), "3e13": (48,)}}
    # Added when the lowest of three widths was the first.
    for table in "--ngram 6", "--ngram 4":
        yield f"-m study.train mdm {table} --flops 3e12 --width 16"
    for flops in ("3e12", "1e13", "3e13"):
        for (objective, tokenizer), sizes in widths.items():
            tables = [bpe[objective]] if tokenizer == "bpe" else ["--ngram 4", "--ngram 6"]
            for width in sizes[flops]:
                for table in tables[:1] if flops == "3e13" else tables:
                    yield f"-m study.train {objective} {table} --flops {flops} --width {width}"
    for pair in itertools.zip_longest(controls_of_n("ar", bpe["ar"]),
                                      controls_of_n("mdm", bpe["mdm"])):
        yield from filter(None, pair)


def controls_of_n(objective, bpe):
    """Yield the controls of an objective, the most telling first."""
    equal, conv, lr, width, buckets = {
        "ar": (1536, "--conv 4", 0.003, 48, 524288),
        "mdm": (768, "--conv 7 --lr 0.003", 0.0015, 32, 131072)}[objective]
    for table in ("--ngram 4 --ngram-stride 8", f"--ngram 6 --buckets {equal}"):
        yield f"-m study.train {objective} {table} --flops 3e12 --width 48"
    # BPE at the N and the number of buckets that may be better for it, and with a convolution.
    for table in (f"--tokenizer bpe --ngram 2 --buckets {buckets}",
                  "--tokenizer bpe --ngram 3 --buckets 131072", f"{bpe} {conv}"):
        yield f"-m study.train {objective} {table} --flops 3e12 --width {width}"
    for table in (f"--ngram 4 {conv}", "--ngram 4 --buckets 65536", "--ngram 8", "--ngram 2",
                  "--ngram 3", "--ngram 4 --buckets 4096", f"--ngram 4 --lr {lr / 2}",
                  f"--ngram 4 --lr {lr * 2}"):
        yield f"-m study.train {objective} {table} --flops 3e12 --width 48"
    for table in "--ngram 4", bpe:
        width = 48 if table == bpe and objective == "mdm" else 64
        yield (f"-m study.train {objective} {table} --flops 1e13 --width {width} "
               "--data english.jsonl")
    if objective == "mdm":
        yield "-m study.train mdm --ngram 4 --patch 8 --flops 3e12 --width 64"
        yield f"-m study.train mdm {bpe} --patch 2 --flops 3e12 --width 32"
        # Marks of the open exercise.
        for table in "--ngram 4", "--ngram 6", "--ngram 4 --patch 8":
            yield f"-m study.train mdm {table} --flops 1e12 --width 32"


def second_seeds(commands):
    """Yield the lowest of the widths with another seed, where all of them are in.

    These are the rules of the claims. The controls of N, which have one width, get none.
    """
    bpb, groups = {row["command"]: float(row["val_bpb"]) for row in read_table()}, {}
    for command in commands:
        groups.setdefault(re.sub(r"--width \d+", "", command), []).append(command)
    for name, group in groups.items():
        if set(group) <= set(bpb) and (len(group) > 1 or "--ngram" not in name):
            yield min(group, key=bpb.get) + " --seed 1"


RUNS = {
    "B": ["train_ar.py --flops 3e14 --width 192 --seed 1",
          "train_ar.py --flops 3e14 --width 128 --seed 1",
          "train_ar.py --flops 3e14 --width 256",
          "train_ar.py --tokenizer bpe --flops 3e13 --width 96 --seed 1",
          "train_ar.py --tokenizer bpe --flops 3e13 --width 128 --seed 1"],
    "M": list(runs_of_m()),
    "D": list(runs_of_d()),
    # The cheap ones first: what 3e12 shows to be useless may go.
    "N": sorted((command for command in runs_of_n() if "e12" in command),
                key=lambda command: "1e12" not in command),
    "O": [command for command in runs_of_n() if "e13" in command],
    "E": [f"train_{objective}.py --tokenizer bpe --flops 1e14 --width {width}"
          for objective, widths in (("mdm", (64, 96)), ("ar", (96, 192))) for width in widths],
    "S": list(second_seeds(runs_of_m())),
    "T": list(second_seeds([*runs_of_d(), *runs_of_n()])),
    # Models for repetition on English, and for the looseness of the bound.
    "F": [f"{command} {data}" for data in ("", "--data english.jsonl")
          for command in ("train_mdm.py --flops 1e13 --width 64",
                          "train_mdm.py --tokenizer bpe --flops 1e13 --width 48",
                          "train_ar.py --flops 1e13 --width 64",
                          "train_ar.py --tokenizer bpe --flops 1e13 --width 64")],
}


def folder_of(command):
    """Return the name of a run's folder: its command without dashes."""
    return "-".join(command.replace("--", "").replace("-m ", "").replace(".py", "").split())


def collect(folder, command):
    """Add a finished run to the table, and copy its log. Return whether it has a result."""
    path = folder / "result.json"
    if not path.exists():
        return False
    result = json.loads(path.read_text())
    result["sha256"] = result["corpus"]["sha256"]
    result["corpus"] = result["corpus"]["name"]
    row = {"command": command} | {key: value for key, value in result.items()
                                  if not isinstance(value, (dict, list))}
    table, rows = QUEUE / "runs.csv", read_table()
    if command not in {row["command"] for row in rows}:
        shutil.copyfile(folder / "log.csv", QUEUE / f"{folder.name}.csv")
        rows.append(row)
        columns = list(dict.fromkeys(key for row in rows for key in row))
        temporary = table.with_suffix(".new")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, table)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("clone", type=Path)
    parser.add_argument("parts", nargs="+", choices=RUNS)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    QUEUE.mkdir(exist_ok=True)
    waiting = [command.strip() for part in args.parts for command in RUNS[part]]
    waiting = [command for command in waiting
               if not collect(args.clone / "runs" / folder_of(command), command)]
    print(f"{len(waiting)} runs to train", flush=True)
    running = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                command = waiting.pop(0)
                name = folder_of(command)
                out = args.clone / "runs" / name
                out.mkdir(parents=True, exist_ok=True)
                process = subprocess.Popen(
                    [sys.executable, *shlex.split(command), "--out", f"runs/{name}"],
                    cwd=args.clone, env=os.environ | {"OMP_NUM_THREADS": "1"},
                    stdout=open(out / "output.txt", "a"), stderr=subprocess.STDOUT)
                running[command] = process
            time.sleep(2)
            for command, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[command]
                done = collect(args.clone / "runs" / folder_of(command), command)
                print(f"{time.strftime('%H:%M')} {'done' if done else 'FAILED'} {command}",
                      flush=True)
    finally:
        for process in running.values():
            process.terminate()


if __name__ == "__main__":
    main()
