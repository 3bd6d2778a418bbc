"""A stress test: kills, two processes in one folder, full disks, cut files, damaged checkpoints.

    python tests/stress.py [--minutes 10] [--seed 0]

Each case must end with the digits of a run that nothing happened to, or in one line and status 2.
"""
import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# It sets the environment of all runs.
import conftest  # noqa: F401

ARGUMENTS = "--vocab 300 --context 64 --width 32 --batch 256 --flops 1e10".split()


def start(objective, out, data="text.txt", until=None, **options):
    """Start a run that saves at every row of its log, and wait for a file of a pattern."""
    code = (f"import log, run, train_{objective}; log.SAVE_SECONDS = 0; "
            f"run.run_script(train_{objective}.main)")
    process = subprocess.Popen(
        [sys.executable, "-c", code, *ARGUMENTS, "--out", out, "--data", data], text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options)
    while until and process.poll() is None and not list(Path().glob(until)):
        time.sleep(0.001)
    return process


def end_of(out):
    """Return the log of a run without its seconds. It ends with the loss of the result."""
    return [line.rpartition(",")[0] for line in Path(out, "log.csv").read_text().splitlines()]


def wrong(process, out, objective):
    """Return what is wrong with the end of a run, None if nothing is."""
    _, stderr = process.communicate(timeout=300)
    if process.returncode == 0:
        return None if end_of(out) == end_of(objective) else "another result"
    held = process.returncode == 2 and stderr.count("error: ") == 1
    return None if held else f"status {process.returncode}: {stderr[-300:]}"


def kill(rng, name, objective):
    """Kill a run at random moments, as it prepares its data, or as it writes, until it ends."""
    data = shutil.copy("text.txt", f"{name}.txt")
    moments = ["data/.preparing*", f"{name}/.checkpoint*", f"{name}/loss.png", None, None, None]
    for moment in rng.choices(moments, k=rng.randint(1, 6)):
        process = start(objective, name, data, until=moment)
        time.sleep(0 if moment else rng.uniform(1.2, 6))
        process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        process.communicate()
    yield wrong(start(objective, name, data), name, objective)


def freeze(rng, name, objective):
    """Freeze a run, start a second one in its folder, and let the first one go on."""
    first = start(objective, name, until=f"{name}/checkpoint.pt")
    first.send_signal(signal.SIGSTOP)
    yield wrong(start(objective, name), name, objective)
    first.send_signal(signal.SIGCONT)
    yield wrong(first, name, objective)


def fill_disk(rng, name, objective):
    """Let no file grow beyond a random size, then lift the limit."""
    limits = resource.RLIMIT_FSIZE, (rng.randrange(1000, 600_000),) * 2
    yield wrong(start(objective, name, preexec_fn=lambda: resource.setrlimit(*limits)), name,
                objective)
    yield wrong(start(objective, name), name, objective)


def damage(rng, name, objective):
    """Cut a file of the cache, cut or damage a checkpoint; then delete the checkpoint."""
    shutil.copytree(objective, name)
    Path(name, "result.json").unlink()
    checkpoint = Path(name, "checkpoint.pt")
    path = rng.choice([checkpoint, checkpoint, *Path("data").glob("text-*/*")])
    content = path.read_bytes()
    at = rng.randrange(len(content))
    noise = rng.randbytes(rng.randint(1, 400)) if path == checkpoint else b""
    path.write_bytes(content[:at] + rng.choice([b"", noise + content[at + len(noise):]]))
    yield wrong(start(objective, name), name, objective)
    checkpoint.unlink()
    yield wrong(start(objective, name), name, objective)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, results = random.Random(args.seed), []
    os.chdir(tempfile.mkdtemp())
    Path("text.txt").write_bytes(Path(argparse.__file__).read_bytes() * 3)
    for objective in ("ar", "mdm"):
        start(objective, objective).communicate()
    end, kinds = time.monotonic() + 60 * args.minutes, (kill, freeze, fill_disk, damage)
    while time.monotonic() < end:
        kind, objective, name = rng.choice(kinds), rng.choice(["ar", "mdm"]), f"case{len(results)}"
        for problem in kind(rng, name, objective):
            print(name, kind.__name__, problem or "held", flush=True)
            results.append((kind, problem))
    print("| what | tried | held |\n|---|---|---|")
    for kind in kinds:
        problems = [problem for case, problem in results if case is kind]
        print(f"| {kind.__doc__} | {len(problems)} | {problems.count(None)} |")
    sys.exit(any(problem for _, problem in results))


if __name__ == "__main__":
    main()
