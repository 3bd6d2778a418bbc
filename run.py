"""What every script shares about a run: errors in one line, files written whole, the run folder, its plan and its report.

    python run.py runs/* [--out cells.png]      # a table of finished runs, and their curves in one figure
"""
import argparse
import csv
import io
import itertools
import json
import os
import sys
from pathlib import Path


class InputError(ValueError):
    """Bad input. The scripts show it as one line on stderr and exit with status 2."""


def usage_error(message):
    """For ArgumentParser.error, which would print the whole usage."""
    raise InputError(message)


def run_script(main):
    """Run a script's main(): bad input and failing files end in one line on stderr and status 2, never in a traceback."""
    try:
        main()
    except BrokenPipeError:                                   # whoever read our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (InputError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":                # of the processes of torchrun, one speaks
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def write_atomic(path, write):
    """Call write(file) on a temporary file beside path, then rename: path holds the old content or the new, never half of it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    for stale in path.parent.glob(f".{path.name}.[0-9]*"):    # of a process that was killed as it wrote
        try:
            os.kill(int(stale.suffix[1:]), 0)
        except (ProcessLookupError, ValueError):
            stale.unlink(missing_ok=True)
        except OSError:
            pass                                              # it lives, and is another user's
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# The run folder: result.json, log.csv, loss.png (and checkpoint.pt, which model.py writes).

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")        # Okabe and Ito: for all eyes
LOG_COLUMNS = ("step", "flops", "bytes", "train_bpb", "val_bpb", "lr", "grad_norm", "seconds")


def check_same(found, settings, path):
    """Return found, a result or a checkpoint's settings, if it belongs to these settings; else raise InputError."""
    for key, value in settings.items():
        if not isinstance(found, dict) or found.get(key) != value:
            was = found.get(key) if isinstance(found, dict) else found
            raise InputError(f"{path} belongs to another run: its {key} is {was}, not {value}; delete it, or take another --out")
    return found


def read_result(out, settings):
    """The result.json of a finished run, or None. Raises InputError if it is another run's."""
    path = out / "result.json"
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
    except ValueError:
        raise InputError(f"{path} is not a result: delete it, or take another --out") from None
    return check_same(result, settings, path)


def write_result(out, result):
    write_atomic(out / "result.json", lambda file: file.write((json.dumps(result, indent=1) + "\n").encode()))


def write_table(path, rows, columns):
    """rows: dicts -> a .csv with these columns"""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: file.write(text.getvalue().encode()))


def write_log(out, rows):
    """rows: lists in the order of LOG_COLUMNS, None where nothing was measured -> log.csv"""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([LOG_COLUMNS, *rows])
    write_atomic(out / "log.csv", lambda file: file.write(text.getvalue().encode()))


def plot_logs(path, logs):
    """logs: {label: rows of log.csv} -> a figure: bits per byte against FLOPs, validation over training (thin)."""
    from matplotlib.figure import Figure                      # here, since it is slow to import and only this needs it
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="training FLOPs", ylabel="bits per byte", xscale="log")
    columns = [LOG_COLUMNS.index(key) for key in ("flops", "train_bpb", "val_bpb")]
    for (label, rows), color in zip(logs.items(), itertools.cycle(COLORS)):
        flops, train, val = zip(*[[row[i] for i in columns] for row in rows])
        axes.plot(flops, train, color=color, linewidth=0.8, alpha=0.4)
        axes.plot(*zip(*[(x, y) for x, y in zip(flops, val) if y is not None]), "o-", color=color, markersize=4, label=label or "run")
    axes.grid(alpha=0.3)
    axes.legend(title="validation (thin: training)")
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=120))


def duration(seconds):
    """
    >>> duration(90), duration(7200), duration(4e6)
    ('1.5 minutes', '2.0 hours', '1.5 months')
    """
    for unit, length in (("years", 31.6e6), ("months", 2.63e6), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def print_plan(settings, model, done, speed, device, out):
    """What is going to happen, before it does. done: steps already trained; speed: FLOP/s just measured."""
    s, corpus = settings, settings["corpus"]
    tokens, left = s["steps"] * s["batch_tokens"], s["flops_budget"] * (1 - done / s["steps"])
    text = tokens * corpus["bytes_per_token"]
    print(f"model  {s['objective']}, width {s['width']}, depth {s['depth']}: {model.params():,} parameters, "
          f"{model.params(embedding=False):,} without embedding and head")
    print(f"data   {corpus['name']} as {s['tokenizer']}: {tokens:,} tokens in windows of {s['context_tokens']}, {text / 1e6:,.1f} MB of text, "
          f"{text / corpus['train_bytes']:.2f} epochs of the {corpus['train_bytes'] / 1e6:,.1f} MB there are")
    print(f"steps  {s['steps']:,} of {s['batch_tokens']:,} tokens, learning rate {s['lr']:g}, {s['flops_budget']:.3g} FLOPs in all"
          + (f"; {done:,} steps are done" if done else ""))
    print(f"time   about {duration(left / speed)} on {device} at the {speed / 1e9:,.0f} GFLOP/s just measured; into {out}", flush=True)
    if left / speed > 3 * 86400:
        print(f"note   {duration(left / speed)} is longer than most will wait: this budget is for a GPU. What this device does in "
              f"an hour is --flops {speed * 3600:.0e}. Starting all the same; Ctrl-C saves and stops.", flush=True)


def print_result(result, out):
    r = result
    print(f"{r['objective']} on {r['tokenizer']}: {r['val_bpb']:.4f} +- {r['val_bpb_stderr']:.4f} bits per byte on {r['val_bytes']:,} bytes of "
          f"{r['corpus']['name']} validation text, after {r['flops_spent']:.3g} FLOPs in {duration(r['seconds'])} ({out})")
    other = "byte" if r["tokenizer"] == "bpe" else "bpe"
    twin, flops = "mdm" if r["objective"] == "ar" else "ar", f"{r['flops_budget']:g}".replace("e+", "e")
    print(f"next, the same budget with other tokens or in another order: python train_{r['objective']}.py --tokenizer {other} --flops {flops}, "
          f"or python train_{twin}.py --tokenizer {r['tokenizer']} --flops {flops}")


def main():
    parser = argparse.ArgumentParser(description="A table of finished runs, and their curves in one figure.")
    parser.error = usage_error
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--out", type=Path, help="where to draw their curves (.png)")
    args = parser.parse_args()
    logs = {}
    print("| run | parameters without embeddings | tokens | FLOPs | bits per byte (validation) |\n|---|---|---|---|---|")
    for folder in args.runs:
        result = read_result(folder, {})
        if result is None:
            raise InputError(f"{folder} holds no finished run")
        print(f"| {folder.name} | {result['params_non_embedding']:,} | {result['tokens']:,} | {result['flops_spent']:.3g} | "
              f"{result['val_bpb']:.3f} +- {result['val_bpb_stderr']:.3f} |")
        rows = list(csv.DictReader(open(folder / "log.csv")))
        logs[f"{result['objective'].upper()} {result['tokenizer']}: {result['val_bpb']:.3f}"] = \
            [[float(row[key]) if row[key] else None for key in LOG_COLUMNS] for row in rows]
    if args.out:
        plot_logs(args.out, logs)


if __name__ == "__main__":
    run_script(main)
