"""A stress test: kills, full disks, damaged files, hostile downloads, random flags.

    python tests/stress.py [--minutes 30] [--seed 0]

Each case must end with the digits of a run that nothing happened to, or in one line on stderr and
status 2. Prints a table of what was tried and what held, and each failure with its command.
"""
import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import test_data
from conftest import ROOT, here, library_text

TRAIN = ("--data", "text.txt", "--width", "32", "--context", "64", "--batch", "256", "--vocab",
         "300", "--flops", "1e10")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
NUMBERS = ("0", "1", "-1", "7", "16", "64", "1e3", "1e9", "nan", "inf", "1e400", "x", "", "9" * 400)
COUNTED = ("flops", "width", "context", "batch", "micro", "lr", "seed", "shuffle", "span", "vocab",
           "steps", "length", "samples", "temperature", "top-k", "budgets", "widths", "seeds")
FLAGS = {f"--{name}": NUMBERS for name in COUNTED} | {
    "--tokenizer": ("bpe", "word", ""), "--schedule": ("cosine", "none"), "--device": ("meta", ""),
    "--data": ("noise", "empty", "bad.gz", "bad.jsonl", "c4:0", "/dev/zero", "fifo", "..", ""),
    "--out": ("", "text.txt", "a/b/c", "/proc/x", "$\\foo$"), "--prompt": ("\udcff", "\x1b[2J"),
    "--infill": ("a___b", "", "_" * 500), "--order": ("blocks", "?"), "--score": ("noise", "?")}
SCRIPTS = {"train_ar.py": (*TRAIN[:-1], "2e8", "--out", "flags"),
           "train_mdm.py": (*TRAIN[:-1], "2e8", "--out", "flags"),
           "sample.py": ("runs/ar", "--length", "20"),
           "scaling.py": ("--data", "text.txt", "--dry-run", "--budgets", "1e10", "--widths", "16"),
           "fragility.py": ("shuffle", "--data", "text.txt", "--dry-run", "--budgets", "1e10")}


def start(objective, out, *more, until=None, **options):
    """Start a run that saves at every row of its log, and wait for a file of this pattern."""
    code = (f"import run, train_{objective}; run.SAVE_SECONDS = 0; "
            f"run.run_script(train_{objective}.main)")
    process = subprocess.Popen([sys.executable, "-c", code, *TRAIN, "--out", out, *more], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    while until and process.poll() is None and not list(Path().glob(until)):
        time.sleep(0.001)
    return process


def stop(process, number=signal.SIGKILL):
    process.send_signal(number)
    process.communicate()


def end_of(out):
    """Return what must not depend on what happened to a run: its result and its curve."""
    result = json.loads((Path(out) / "result.json").read_text())
    rows = [line.rpartition(",")[0] for line in (Path(out) / "log.csv").read_text().splitlines()]
    return result["val_bpb"], result["bytes"], rows


def same_or_one_line(process, out, expected):
    """Return what is wrong with the end of a run: None, or a line."""
    _, stderr = process.communicate(timeout=120)
    if process.returncode == 0 and end_of(out) != expected:
        return f"another result: {end_of(out)[:2]}, not {expected[:2]}"
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    if process.returncode != 0 and (process.returncode != 2 or len(errors) != 1):
        return f"status {process.returncode}: {stderr[-300:]}"
    return None


def kill(rng, name, objective, expected):
    """Kill a run at random moments, until it ends."""
    for _ in range(rng.randint(1, 6)):
        process = start(objective, name)
        time.sleep(rng.uniform(1.2, 4))
        stop(process, rng.choice(SIGNALS))
        yield None
    yield same_or_one_line(start(objective, name), name, expected)


def kill_when(rng, name, objective, expected):
    """Kill a run while it prepares its data, or while it writes a file; then let it end."""
    fresh = Path(f"{name}.txt")
    fresh.write_bytes(Path("text.txt").read_bytes())
    more = ("--data", fresh)
    moment = rng.choice(["data/.preparing-*", f"{name}/.checkpoint.pt.tmp", f"{name}/.log.csv.tmp",
                         f"{name}/loss.png"])
    stop(start(objective, name, *more, until=moment))
    yield same_or_one_line(start(objective, name, *more), name, expected)


def freeze(rng, name, objective, expected):
    """Freeze a run, start a second one in its folder, and let the first one go on."""
    first = start(objective, name, until=f"{name}/checkpoint.pt")
    first.send_signal(signal.SIGSTOP)
    yield same_or_one_line(start(objective, name), name, expected)
    first.send_signal(signal.SIGCONT)
    yield same_or_one_line(first, name, expected)


def fill_disk(rng, name, objective, expected):
    """Let no file grow beyond a random size, then lift the limit."""
    size = rng.randrange(1000, 600_000)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    yield same_or_one_line(start(objective, name, preexec_fn=limit), name, expected)
    yield same_or_one_line(start(objective, name), name, expected)


def damage(rng, name, objective, expected):
    """Damage a file of the cache or of an interrupted run; delete what the error names."""
    stop(start(objective, name, until=f"{name}/checkpoint.pt"))
    path = rng.choice([*Path("data").glob("text-*/*"), *Path(name).glob("[a-z]*")])
    content = path.read_bytes()
    at = rng.randrange(len(content) + 1)
    end = at + rng.randint(1, 400)
    middle = rng.choice([bytes(255 - byte for byte in content[at:end]), rng.randbytes(end - at)])
    path.write_bytes(content[:at] + rng.choice([b"", middle + content[end:]]))
    problem = same_or_one_line(start(objective, name), name, expected)
    yield f"{path}, bytes {at} to {end}: {problem}" if problem else None
    Path(name, "checkpoint.pt").unlink(missing_ok=True)
    yield same_or_one_line(start(objective, name), name, expected)


def download(rng, name, *_):
    """Run the tests of hostile downloads, each against a local server."""
    words = "download or server or arrives or mirror or archive"
    status = pytest.main(["-q", "-k", words, "-p", "no:cacheprovider", test_data.__file__])
    for _ in range(13):
        yield None if status == 0 else f"pytest tests/test_data.py -k '{words}'"


def type_flags(rng, name, *_):
    """Run commands with random flags in this process."""
    for _ in range(20):
        script, words = rng.choice(list(SCRIPTS.items()))
        for flag in rng.sample(list(FLAGS), rng.randint(1, 2)):
            words += (flag, rng.choice(FLAGS[flag]))
        began = time.monotonic()
        done = here(Path.cwd(), script, *words)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        held = done.returncode == 0 or done.returncode == 2 and len(errors) == 1
        slow = time.monotonic() - began > 20
        yield None if held and not slow else f"{script} {words}: {done.stderr[-300:]}"


def prepare(rng):
    """Make the files that the cases read in the current folder. Return how the plain runs end."""
    Path("text.txt").write_bytes(library_text())
    Path("noise").write_bytes(rng.randbytes(30_000))
    Path("empty").touch()
    Path("bad.gz").write_bytes(b"\x1f\x8b\x08\x00" + rng.randbytes(100))
    Path("bad.jsonl").write_bytes(b'{"text": "a"}\n{"text": 3}\n')
    os.mkfifo("fifo")
    for objective in ("ar", "mdm"):
        start(objective, f"runs/{objective}").communicate()
    return {objective: end_of(f"runs/{objective}") for objective in ("ar", "mdm")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    os.environ["PYTHONPATH"] = str(ROOT)
    os.chdir(tempfile.mkdtemp())
    expected = prepare(rng)
    kinds = (kill, kill, kill_when, freeze, fill_disk, damage, type_flags, download)
    tried, held = Counter(), Counter()
    end, case = time.monotonic() + 60 * args.minutes, 0
    while time.monotonic() < end:
        kind, objective = kinds[case % len(kinds)], rng.choice(["ar", "mdm"])
        for problem in kind(rng, f"runs/case{case}", objective, expected[objective]):
            tried[kind] += 1
            held[kind] += problem is None
            if problem:
                print(f"{kind.__name__}, --seed {args.seed}, case {case}: {problem}", flush=True)
        case += 1
    print("| what | tried | held |\n|---|---|---|")
    for kind, count in tried.items():
        print(f"| {kind.__doc__} | {count} | {held[kind]} |")
    sys.exit(held != tried)


if __name__ == "__main__":
    main()
