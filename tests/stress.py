"""A stress test: kills, two processes in one folder, full disks, cut files, damaged checkpoints.

    python tests/stress.py [--minutes 10] [--seed 0]

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
import sysconfig
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARGUMENTS = ("--vocab 300 --context 64 --width 32 --batch 256 --flops 1e10").split()
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def start(objective, out, data="text.txt", until=None, **options):
    """Start a run that saves at every row of its log, and wait for a file of a pattern."""
    code = (f"import log, run, train_{objective}; log.SAVE_SECONDS = 0; "
            f"run.run_script(train_{objective}.main)")
    words = [sys.executable, "-c", code, *ARGUMENTS, "--out", out, "--data", data]
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
    rows = [line.rpartition(",")[0] for line in Path(out, "log.csv").read_text().splitlines()]
    return json.loads(Path(out, "result.json").read_text())["val_bpb"], rows


def wrong(process, out, expected):
    """Return what is wrong with the end of a run, None if nothing is."""
    _, stderr = process.communicate(timeout=300)
    # Lines with \r are progress bars.
    lines = [line for line in stderr.split("\n") if line and "\r" not in line]
    if process.returncode == 0:
        return None if end_of(out) == expected else "another result"
    held = process.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return None if held else f"status {process.returncode}: {stderr[-300:]}"


def kill(rng, name, objective, expected):
    """Kill a run at random moments, as it prepares its data, or as it writes, until it ends."""
    data = f"{name}.txt"
    Path(data).write_bytes(Path("text.txt").read_bytes())
    moments = ["data/.preparing-*", f"{name}/.checkpoint*", f"{name}/.log*", f"{name}/loss.png"]
    for _ in range(rng.randint(1, 6)):
        moment = rng.choice([*moments, None, None, None, None])
        process = start(objective, name, data, until=moment)
        time.sleep(0 if moment else rng.uniform(1.2, 6))
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
    """Cut a file of the cache, cut or damage a checkpoint; then delete the checkpoint."""
    stop(start(objective, name, until=f"{name}/checkpoint.pt"))
    checkpoint = Path(name, "checkpoint.pt")
    path = rng.choice([checkpoint, checkpoint, *Path("data").glob("text-*/*")])
    content = path.read_bytes()
    at = rng.randrange(len(content))
    noise = rng.randbytes(rng.randint(1, 400)) if path == checkpoint else b""
    path.write_bytes(content[:at] + rng.choice([b"", noise + content[at + len(noise):]]))
    yield wrong(start(objective, name), name, expected)
    checkpoint.unlink(missing_ok=True)
    yield wrong(start(objective, name), name, expected)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, tried, held, expected = random.Random(args.seed), Counter(), Counter(), {}
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.chdir(tempfile.mkdtemp())
    library = Path(sysconfig.get_path("stdlib"))
    Path("text.txt").write_bytes((library / "argparse.py").read_bytes() * 3)
    for objective in ("ar", "mdm"):
        start(objective, objective).communicate()
        expected[objective] = end_of(objective)
    end = time.monotonic() + 60 * args.minutes
    while time.monotonic() < end:
        case = sum(tried.values())
        kind = rng.choice([kill, kill, freeze, fill_disk, damage])
        objective = rng.choice(["ar", "mdm"])
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
