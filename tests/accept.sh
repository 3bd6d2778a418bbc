#!/bin/bash
# The first minutes on a GPU, without a network: two commands of at most 400 and 300 seconds.
#
#     bash tests/accept.sh expect    # before, on a CPU (5 minutes): what part 2 is compared with
#     bash tests/accept.sh 1         # is it right, and how fast?
#     bash tests/accept.sh 2         # do runs end, resume, and reach the losses of the CPU?
#
# Part 2 needs the folder runs/accept, which "expect" fills. A part ends with a table. The table goes
# to $OUT/1.md or $OUT/2.md, all that was printed to 1.txt or 2.txt; $OUT is runs/accept by default.
# With DRY=1 all is tiny and runs on a CPU.
set -uo pipefail
home=runs/accept
out=${OUT:-$home}
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TQDM_MININTERVAL=20

device=cuda
dry=()
names="ar-byte ar-bpe mdm-byte mdm-bpe"
text_bytes=20000000
small=(--data "$home/text" --flops 1e12)
default=()
# What the trend of results/runs.csv lets expect at 1e15 FLOPs.
default_loss=(1.35 0.15)
save_seconds=5
if [ -n "${DRY:-}" ]; then
    device=cpu
    dry=(--dry)
    names=mdm-bpe
    text_bytes=400000
    small=(--data "$home/text" --flops 3e8 --width 16 --context 64 --batch 64 --vocab 300)
    default=("${small[@]}" --flops 1e9)
    default_loss=(4 4)
    save_seconds=0
fi

row() { echo "| $1 | $2 | $3 | $4 |"; }

# Print the loss of a run folder.
loss_of() {
    python3 -c "import json, sys
print(json.load(open(sys.argv[1] + '/result.json'))['val_bpb'])" "$1" 2> /dev/null || echo nan
}

# Print a row: a run, the loss that it should have, within what, and the loss that it has.
row_of_loss() {
    python3 -c "import sys
expected, within, loss = map(float, sys.argv[2:])
print(f'| {sys.argv[1]}: bits per byte | {expected:.4f}, within {within} | {loss:.4f} |',
      'yes |' if abs(loss - expected) <= within else 'NO |')" "$@"
}

# Run a command for so many seconds at most, and print a row about how it ended.
step() {
    local name=$1 limit=$2 began=$SECONDS status ok=yes
    shift 2
    echo "== $name: $*"
    timeout -k 5 "$limit" "$@"
    status=$?
    [ $status = 0 ] || ok=NO
    # A process that was killed may have left half a line.
    echo
    row "$name" "ends within $limit s" "status $status after $((SECONDS - began)) s" $ok
    return $status
}

# Train the configurations side by side, on device $2, into folders that begin with $1.
train_all() {
    local name process status=0
    for name in $names; do
        python3 "$root/train_${name%-*}.py" --tokenizer "${name#*-}" "${small[@]}" --device "$2" \
            --out "$home/$1-$name" &
    done
    for process in $(jobs -p); do wait "$process" || status=1; done
    return $status
}

# Train the default run. Stop it at its first checkpoint, and resume it.
stop_and_resume() {
    local command=("${default[@]}" --device $device --out "$home/stopped") status ok=yes
    python3 -c "import log, run, train_ar
log.SAVE_SECONDS = $save_seconds
run.run_script(train_ar.main)" "${command[@]}" &
    until [ -e "$home/stopped/checkpoint.pt" ] || ! kill -0 $!; do sleep 0.1; done
    kill -TERM $!
    wait $!
    status=$?
    [ $status = 130 ] || ok=NO
    row "a stopped run" "status 130" "status $status" $ok
    python3 "$root/train_ar.py" "${command[@]}"
}

expect() {
    rm -rf "$home/text" "$home"/expected*
    mkdir -p "$home/text"
    python3 - "$home/text" "$text_bytes" <<'END'
import shutil, sys
import data
written = 0
for i, file in enumerate(data.find_files("pysrc")[1][::4]):
    if written < int(sys.argv[2]):
        shutil.copyfile(file, f"{sys.argv[1]}/{i:05d}.py")
        written += file.stat().st_size
END
    OMP_NUM_THREADS=1 train_all expected cpu
    local name
    for name in $names; do echo "$name $(loss_of "$home/expected-$name")"; done \
        | tee "$home/expected.txt"
    rm -rf "$home"/expected-*
}

part1() {
    # Speeds of wrong results are worth nothing.
    step truth 90 python3 "$root/tests/gpu.py" truth "${dry[@]}" || return
    step ddp 50 python3 "$root/tests/gpu.py" ddp "${dry[@]}"
    step speed 110 python3 "$root/tests/gpu.py" speed "${dry[@]}"
    step variants 100 python3 "$root/tests/gpu.py" variants "${dry[@]}"
    step profile 50 python3 "$root/tests/gpu.py" profile "${dry[@]}"
}

part2() {
    local name expected
    rm -rf "$home"/{default,stopped} "$home"/found-*
    step default 90 python3 "$root/train_ar.py" "${default[@]}" --device $device \
        --out "$home/default"
    row_of_loss "the default run" "${default_loss[@]}" "$(loss_of "$home/default")"
    step resume 100 bash "$0" stop_and_resume
    row_of_loss "the stopped run" "$(loss_of "$home/default")" 0.02 "$(loss_of "$home/stopped")"
    step sample 15 python3 "$root/sample.py" "$home/default" --prompt "def " --device $device
    step parity 95 bash "$0" train_all found $device
    for name in $names; do
        expected=$(sed -n "s/^$name //p" "$home/expected.txt")
        row_of_loss "$name at 1e12" "${expected:-nan}" 0.02 "$(loss_of "$home/found-$name")"
    done
}

mkdir -p "$home" "$out"
case ${1:-} in
    1 | 2)
        "part$1" 2>&1 | tee "$out/$1.txt"
        {
            row step expected found ok
            row --- --- --- ---
            grep '^| ' "$out/$1.txt"
        } | tee "$out/$1.md"
        ! grep -q '| NO |$' "$out/$1.md"
        ;;
    expect | stop_and_resume | train_all) "$@" ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0" ;;
esac
