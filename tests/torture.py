"""Torture: kill -9 at random instants, and commands that nobody would type.

    python tests/torture.py                     # 50 kills of each objective, 200 fuzzed commands: about ten minutes on two cores
    python tests/torture.py --kills 3 --fuzz 40 # the short form, which test_torture.py runs

After every kill all files are whole; runs that were killed end with the weights of one that was not, to the bit. Fuzzed commands
end well or in one line on stderr, and leave no half-made file.
"""
import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from conftest import command, environment, here, library_text

import model
import run

RUN = ("--data", "text.txt", "--width", 32, "--context", 64, "--batch", 256)


def check_whole(out):
    """Raises unless every file of a run folder is whole."""
    if (out / "checkpoint.pt").exists():
        model.load_checkpoint(out / "checkpoint.pt")
    if (out / "log.csv").exists():
        rows = list(csv.reader((out / "log.csv").read_text().splitlines()))
        assert all(len(row) == len(run.LOG_COLUMNS) for row in rows), out
    if (out / "result.json").exists():
        json.loads((out / "result.json").read_text())
    if (out / "loss.png").exists():
        assert (out / "loss.png").read_bytes().endswith(b"IEND\xaeB`\x82"), out


def weights(out):
    return model.load_checkpoint(out / "checkpoint.pt")["model"]


def kill(folder, objective, kills, rng, flops=2e10):
    """Kill runs of one command until so many kills are done, and let the last one end: -> how many runs ended."""
    script = f"train_{objective}.py"
    whole, began = folder / f"whole-{objective}", time.monotonic()
    words = (*RUN, "--flops", flops, "--out")
    subprocess.run(command(script, *words, whole), cwd=folder, env=environment(), capture_output=True, check=True)
    seconds, done, ended = time.monotonic() - began, 0, 0
    while done < kills or ended == 0:
        out = folder / f"killed-{objective}-{ended}"
        running = subprocess.Popen(command(script, *words, out), cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            running.communicate(timeout=rng.uniform(0, 1.3) * seconds if done < kills else None)
        except subprocess.TimeoutExpired:
            running.kill()
            running.communicate()
            done += 1
        if running.returncode == 0:
            ended += 1
            a, b = weights(out), weights(whole)
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), f"{out} ended with other weights"
            stale = [path for path in out.iterdir() if path.name.startswith(".")]
            assert len(stale) < 4, f"{out} keeps {stale}"
        else:
            assert running.returncode == -9, running.stderr
        if out.exists():
            check_whole(out)
    print(f"{objective}: {done} kills, {ended} runs that ended in spite of them, all with the weights of the run that was not killed", flush=True)
    return ended


NUMBERS = ("0", "1", "-1", "3", "7", "16", "64", "1e3", "1e8", "1e9", "nan", "inf", "-inf", "1e400", "x", "", "0x10", "１６", "1_000", "1e-300")
VALUES = {"--flops": NUMBERS, "--width": ("8", "16", "24", "33", "48", *NUMBERS[:5], "10000000"), "--context": ("16", "33", "64", *NUMBERS), "--batch": NUMBERS, "--lr": NUMBERS,
          "--seed": NUMBERS, "--shuffle": ("1", "2", "5", "64", *NUMBERS[:4]), "--span": ("1", "4", "5", *NUMBERS[:4]), "--vocab": ("257", "300", "256", "65537", *NUMBERS[:8]),
          "--tokenizer": ("byte", "bpe", "word"), "--schedule": ("linear", "cosine", ""), "--compile": ("off", "auto", "no"), "--device": ("cpu", "cuda:9", "meta", ""),
          "--data": ("text.txt", "noise.bin", "empty", "tiny.txt", "bad.gz", "bad.jsonl", "folder", "missing", "c4:0", "..", ""), "--out": ("out", "text.txt", "a/b/c", "/proc/x", ""),
          "--prompt": ("", "x", "\udcff\udc80", "\x1b[2J" * 50, "\\n"), "--infill": ("a___b", "___", "", "_" * 500), "--steps": NUMBERS, "--length": NUMBERS[:6], "--temperature": NUMBERS,
          "--top-k": NUMBERS, "--top-p": NUMBERS, "--order": ("random", "confident", "blocks", "?"), "--inspect": ("noise.bin", "empty", "missing", "folder"),
          "--budgets": NUMBERS, "--study": ("gap", "tune", "span", "shuffle", "segmentation", "?"), "--jobs": NUMBERS[:3], "--runs": ("run-ar", "folder", "missing")}
FLAGS = {"train_ar.py": ("--flops", "--width", "--context", "--batch", "--lr", "--seed", "--shuffle", "--vocab", "--tokenizer", "--compile", "--device", "--data", "--out", "--span"),
         "train_mdm.py": ("--flops", "--width", "--context", "--batch", "--lr", "--seed", "--shuffle", "--vocab", "--tokenizer", "--data", "--out", "--span", "--schedule"),
         "sample.py": ("--prompt", "--infill", "--steps", "--length", "--temperature", "--top-k", "--top-p", "--order", "--inspect", "--seed"),
         "scaling.py": ("--budgets", "--study", "--jobs", "--vocab", "--context", "--data", "--out"), "data.py": ("--data", "--vocab"), "bpe.py": ("--vocab",)}
BASE = {"train_ar.py": ["--data", "text.txt", "--flops", "1e8", "--width", "16", "--context", "64", "--vocab", "300", "--compile", "off"], "sample.py": ["--steps", "3", "--length", "20"],
        "scaling.py": ["--data", "text.txt", "--vocab", "300", "--context", "64", "--dry-run"], "data.py": ["--data", "text.txt", "--vocab", "300"], "bpe.py": ["text.txt", "--vocab", "300"]}
BASE["train_mdm.py"] = BASE["train_ar.py"]


def corpora(folder, rng):
    """Files that are no text, and less than that."""
    (folder / "noise.bin").write_bytes(rng.randbytes(30_000))
    (folder / "empty").write_bytes(b"")
    (folder / "tiny.txt").write_bytes(b"x")
    (folder / "bad.gz").write_bytes(b"\x1f\x8b\x08\x00" + rng.randbytes(100))
    (folder / "bad.jsonl").write_bytes(b'{"text": "a"}\n{"text": 3}\n')
    (folder / "folder").mkdir()
    for i in range(3):
        (folder / "folder" / f"{i}").write_bytes(rng.randbytes(i * 500))


def fuzz(folder, count, rng):
    """Random commands, in this process: -> how many ended well. Raises if one ends in anything but success or one line."""
    corpora(folder, rng)
    for objective in ("ar", "mdm"):
        assert here(folder, f"train_{objective}.py", *BASE["train_ar.py"], "--out", f"runs/run-{objective}").returncode == 0
    well = 0
    for i in range(count):
        script = rng.choice(list(FLAGS))
        words = list(BASE[script])
        if script == "sample.py":
            words.insert(0, rng.choice(["runs/run-ar", "runs/run-mdm", "missing", "folder"]))
        for flag in rng.sample(FLAGS[script], rng.randint(1, min(3, len(FLAGS[script])))):
            words += [flag, rng.choice(VALUES[flag])]
        try:
            done = here(folder, script, *words)
        except BaseException as error:
            raise AssertionError(f"{script} {words}: {type(error).__name__}: {error}") from error
        well += done.returncode == 0
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode in (0, 1, 2) and (done.returncode == 0) == (not errors) and len(errors) < 2, (script, words, done)
        for out in {path.parent for path in folder.rglob("checkpoint.pt")}:
            check_whole(out)
        half = [path for path in folder.rglob(".*") if path.name not in (".", "..")]
        assert not half, (script, words, half)
    print(f"fuzz: {count} commands, {well} ended well, {count - well} in one line, none otherwise", flush=True)
    return well


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--fuzz", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "text.txt").write_bytes(library_text())
        fuzz(folder, args.fuzz, rng)
        for objective in ("ar", "mdm"):
            kill(folder, objective, args.kills, rng)


if __name__ == "__main__":
    sys.exit(main())
