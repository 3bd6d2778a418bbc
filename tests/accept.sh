#!/bin/bash
# The first 25 minutes on one H100 (an estimate), in three parts. From the repository:
#
#     bash tests/accept.sh 1      # is it right, how fast is it, does a stopped run resume
#     bash tests/accept.sh 2      # the GPU trains like the CPU; the study at 1e14 and 1e15
#     bash tests/accept.sh 3      # needs a network: the study at 1e16 on c4, and enwik8
#
# What it prints goes into runs/accept/N.txt too. Cut off, runs resume; tests/gpu.py begins anew.
set -uo pipefail
export PYTHONUNBUFFERED=1
part=${1:-}
mkdir -p runs/accept

say() { echo "== $(date +%T) $*"; }

# Start a run, stop it as soon as it has saved, and resume it.
stop_and_resume() {
    local out=runs/accept/stopped
    local command=(python train_ar.py --flops 1e16 --data pysrc --out $out)
    timeout 200 "${command[@]}" > $out.txt 2>&1 &
    local run=$!
    until [ -e $out/checkpoint.pt ] || ! kill -0 $run 2> /dev/null; do sleep 1; done
    kill -TERM $run 2> /dev/null
    wait $run
    tail -1 $out.txt
    timeout 200 "${command[@]}" | grep -e "of them done" -e "bits per byte"
}

part1() {
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    say truth; timeout 200 python tests/gpu.py truth
    say ddp; timeout 150 python tests/gpu.py ddp
    say speed; timeout 280 python tests/gpu.py speed
    say profile; timeout 60 python tests/gpu.py profile
    say "the default command"; timeout 150 python train_ar.py
    say "a run stopped after its first checkpoint, and resumed"; stop_and_resume
    say sample; timeout 60 python sample.py runs/accept/stopped --prompt "def "
}

part2() {
    say "the same runs on the CPU and on the GPU: they should agree to 0.02 bits per byte"
    for objective in ar mdm; do
        for device in cpu cuda; do
            timeout 120 python train_$objective.py --tokenizer bpe --flops 1e12 --device $device \
                --out runs/accept/parity-$objective-$device | tail -1
        done
    done
    say "the study at 1e14 and 1e15, on pysrc"
    timeout -s TERM 170 python scaling.py --data pysrc --budgets 1e14 --jobs 6 \
        --out runs/accept/pysrc | tail -20
    timeout -s TERM 290 python scaling.py --data pysrc --budgets 1e15 --jobs 6 \
        --out runs/accept/pysrc | tail -20
}

part3() {
    say "bits per byte on enwik8, to set beside nanoGPT's"
    timeout -s TERM 200 python train_ar.py --data enwik8 --flops 1e16 --out runs/accept/enwik8 \
        | tail -1
    say "the study at 1e16: another text, another table"
    timeout -s TERM 500 python scaling.py --data c4 --budgets 1e16 --widths 256 --jobs 4 \
        --out runs/accept/c4 | tail -20
}

case $part in
    1 | 2 | 3) "part$part" 2>&1 | tee -a "runs/accept/$part.txt" ;;
    *) sed -n '2,8s/^# \{0,1\}//p' "$0" ;;
esac
