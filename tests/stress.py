"""A stress test: kills, full disks, damaged files, hostile downloads, random flags.

    python tests/stress.py [--minutes 30] [--seed 0]

Each case must end with the digits of a run that nothing happened to, or in one line on stderr and
status 2. Prints what was tried and what held, and each failure with the seed that repeats it.
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

SMALL = ("--data", "text.txt", "--vocab", "300", "--context", "64")
TRAIN = (*SMALL, "--width", "32", "--batch", "256", "--flops")
SCRIPTS = {"train_ar.py": (*TRAIN, "2e8", "--out", "o"), "sample.py": ("ar", "--length", "20"),
           "train_mdm.py": (*TRAIN, "2e8", "--out", "o"), "data.py": ("--data", "text.txt"),
           "scaling.py": (*SMALL, "--dry-run"), "fragility.py": (*SMALL, "shuffle", "--dry-run")}
NUMBERS = ("0", "1", "-1", "7", "16", "64", "1e3", "1e9", "nan", "inf", "1e400", "x", "", "9" * 400)
FLAGS = dict.fromkeys(
    ("--flops", "--width", "--context", "--batch", "--micro", "--lr", "--seed", "--shuffle",
     "--permutation", "--phase", "--span", "--span-share", "--vocab", "--steps", "--length",
     "--samples", "--temperature", "--top-k", "--budgets", "--widths", "--seeds"), NUMBERS) | {
    "--tokenizer": ("bpe", "word", ""), "--device": ("meta", ""), "--schedule": ("cosine", "none"),
    "--data": ("noise", "bad.gz", "c4:0", "/dev/zero", "fifo", "..", ""), "--infill": ("a___b", ""),
    "--out": ("", "text.txt", "/proc/x", "$\\foo$"), "--prompt": ("\udcff", "\x1b[2J")}
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def start(objective, out, data="text.txt", until=None, **options):
    """Start a run that saves at every row of its log, and wait for a file of a pattern."""
    code = (f"import run, train_{objective}; run.SAVE_SECONDS = 0; "
            f"run.run_script(train_{objective}.main)")
    words = [sys.executable, "-c", code, *TRAIN, "1e10", "--out", out, "--data", data]
    process = subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               **options)
    while until and process.poll() is None and not list(Path().glob(until)):
        time.sleep(0.001)
    return process


def stop(process, number=signal.SIGKILL):
    process.send_signal(number)
    process.communicate()


def end_of(out):
    """Return what must not depend on what happened to a run: its loss and its curve."""
    rows = [line.rpartition(",")[0] for line in (Path(out) / "log.csv").read_text().splitlines()]
    return json.loads((Path(out) / "result.json").read_text())["val_bpb"], rows


def wrong(process, out, expected):
    """Return what is wrong with the end of a run, None if nothing is."""
    _, stderr = process.communicate(timeout=200)
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    if process.returncode == 0:
        return None if end_of(out) == expected else "another result"
    held = process.returncode == 2 and len(errors) == 1
    return None if held else f"status {process.returncode}: {stderr[-300:]}"


def kill(rng, name, objective, expected):
    """Kill a run at random moments, as it prepares its data, or as it writes, until it ends."""
    data = f"{name}.txt"
    Path(data).write_bytes(library_text())
    moments = ["data/.preparing-*", f"{name}/.*.tmp", f"{name}/loss.png", None, None, None, None]
    for _ in range(rng.randint(1, 6)):
        moment = rng.choice(moments)
        process = start(objective, name, data, until=moment)
        time.sleep(0 if moment else rng.uniform(1.2, 4))
        stop(process, rng.choice(SIGNALS))
        yield None
    yield wrong(start(objective, name, data), name, expected)


def freeze(rng, name, objective, expected):
    """Freeze a run, start a second one in its folder, and let the first one go on."""
    first = start(objective, name, until=f"{name}/checkpoint.pt")
    first.send_signal(signal.SIGSTOP)
    yield wrong(start(objective, name), name, expected)
    first.send_signal(signal.SIGCONT)
    yield wrong(first, name, expected)


def fill_disk(rng, name, objective, expected):
    """Let no file grow beyond a random size, then lift the limit."""
    size = rng.randrange(1000, 600_000)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    yield wrong(start(objective, name, preexec_fn=limit), name, expected)
    yield wrong(start(objective, name), name, expected)


def damage(rng, name, objective, expected):
    """Damage a file of the cache or of an interrupted run; then delete its checkpoint."""
    stop(start(objective, name, until=f"{name}/checkpoint.pt"))
    path = rng.choice([*Path("data").glob("text-*/*"), *Path(name).glob("[a-z]*")])
    content = path.read_bytes()
    at = rng.randrange(len(content) + 1)
    noise = rng.randbytes(rng.randint(1, 400))
    path.write_bytes(content[:at] + rng.choice([b"", noise + content[at + len(noise):]]))
    yield wrong(start(objective, name), name, expected)
    Path(name, "checkpoint.pt").unlink(missing_ok=True)
    yield wrong(start(objective, name), name, expected)


def download(rng, *_):
    """Run the tests of hostile downloads, each against a local server."""
    words = "download or server or arrives or mirror or archive"
    status = pytest.main(["-q", "-k", words, "-p", "no:cacheprovider", test_data.__file__])
    yield from [None if status == 0 else f"pytest tests/test_data.py -k '{words}'"] * 13


def type_flags(rng, *_):
    """Run commands with random flags in this process."""
    for _ in range(20):
        script, words = rng.choice(list(SCRIPTS.items()))
        for flag in rng.sample(list(FLAGS), rng.randint(1, 2)):
            words += (flag, rng.choice(FLAGS[flag]))
        began = time.monotonic()
        done = here(Path.cwd(), script, *words)
        errors = [line for line in done.stderr.splitlines() if "error: " in line]
        held = done.returncode == 0 or done.returncode == 2 and len(errors) == 1
        quick = time.monotonic() - began < 20
        yield None if held and quick else f"{script} {words}: {done.stderr[-300:]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, tried, held, expected = random.Random(args.seed), Counter(), Counter(), {}
    os.environ["PYTHONPATH"] = str(ROOT)
    os.chdir(tempfile.mkdtemp())
    Path("text.txt").write_bytes(library_text())
    Path("noise").write_bytes(rng.randbytes(30_000))
    Path("bad.gz").write_bytes(b"\x1f\x8b\x08\x00" + rng.randbytes(100))
    os.mkfifo("fifo")
    for objective in ("ar", "mdm"):
        start(objective, objective).communicate()
        expected[objective] = end_of(objective)
    end, kinds = time.monotonic() + 60 * args.minutes, [kill, kill, freeze, fill_disk, damage]
    kinds += [type_flags, download]
    while time.monotonic() < end:
        case = sum(tried.values())
        kind, objective = rng.choice(kinds), rng.choice(["ar", "mdm"])
        for problem in kind(rng, f"case{case}", objective, expected[objective]):
            tried[kind] += 1
            held[kind] += problem is None
            if problem:
                print(f"--seed {args.seed}: case {case}, {kind.__name__}: {problem}", flush=True)
    print("| what | tried | held |\n|---|---|---|")
    for kind, count in tried.items():
        print(f"| {kind.__doc__} | {count} | {held[kind]} |")
    sys.exit(held != tried)


if __name__ == "__main__":
    main()
