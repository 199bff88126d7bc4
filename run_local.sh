#!/usr/bin/env bash
# A demonstration on drawn streets, on any machine, in ten to fifteen minutes:
#
#     ./run_local.sh
#
# The real thing, with the README's numbers on all visible GPUs; further words go to train.py:
#
#     ./run_local.sh CITYSCAPES [--ohem 1 ...]
#     ./run_local.sh CITYSCAPES --from-scratch        without weights in dataset/
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;; esac

data=${1:-}
[ -z "$data" ] || data=$(realpath -m -- "$data")
shift || true
cd "$(dirname "$(realpath "$0")")"
. utils/environment.sh
choose_python requirements.txt

demonstrate() {
    local run
    run="demo/run_$(date +%Y%m%d_%H%M%S)"
    echo "This is a demonstration: streets that a program draws, an ECA-ResNet18 from random weights, ten to fifteen minutes."
    if [ ! -d demo/streets ]; then
        rm -rf demo/streets.part
        "$PYTHON" -m dataset.streets demo/streets.part --train 200 --val 50 --size 256,512 --seed 0
        mv demo/streets.part demo/streets
    fi
    "$PYTHON" train.py --data-dir demo/streets --snapshot-dir "$run" --backbone eca_resnet18 \
        --random-mirror --input-size 129,257 --batch-size 4 --num-steps 1500 --learning-rate 4e-2 \
        --ohem 1 --ohem-keep 10000 --amp bf16 --parallel none --log-every 50
    [ -f "$run/CS_scenes_1500.pth" ] || { echo "stopped before the end; what there is lies in $run"; exit 1; }
    "$PYTHON" evaluate.py --data-dir demo/streets --restore-from "$run/CS_scenes_1500.pth" \
        --input-size 257,513 --scales 1.0 --no-flip --amp bf16
    "$PYTHON" - "$run/CS_scenes_1500_val" <<'EOF'
import json
import sys

folder = sys.argv[1]
result = json.load(open(f"{folder}/result.json", encoding="utf-8"))
fine, coarse = result["mean_iou"], result["coarse"]["single_scale"]["mean_iou"]
print(f"\nmIoU of the demonstration: coarse {100 * coarse:.1f} %, fine {100 * fine:.1f} % "
      "(four runs of three seeds gave 55 to 58 % and 60 to 64 %)")
print("most of the difference is OHEM's, which only the fine loss uses: without it one seed gave 53.8 and 54.2 %")
print(f"look at {folder}/report.html for what went right and wrong, {folder}/overlay/ for all pictures")
EOF
}

find_weights() {    # sets WEIGHTS to the one file of weights in dataset/
    shopt -s nullglob
    local found=(dataset/*.pth dataset/*.pth.tar)
    if [ ${#found[@]} -ne 1 ]; then
        echo "error: dataset/: expected one file of backbone weights (*.pth, *.pth.tar), found" \
            "${#found[@]}${found[*]:+: ${found[*]}}; --restore-from FILE names one, --from-scratch trains without" >&2
        exit 2
    fi
    WEIGHTS=(--restore-from "${found[0]}")
}

run_for_real() {    # CITYSCAPES [words for train.py]
    local data=$1 folder=snapshots words=() choose=yes previous=
    WEIGHTS=()
    shift
    for word in "$@"; do
        case "$word" in --from-scratch) choose=; continue ;; --restore-from*) choose= ;; --snapshot-dir=*) folder=${word#*=} ;; esac
        [ "$previous" != --snapshot-dir ] || folder=$word
        words+=("$word")
        previous=$word
    done
    [ -z "$choose" ] || find_weights
    "$PYTHON" -m dataset.check "$data" --fast || { [ $? = 1 ] && echo "error: $data: mend what is WRONG above, or run" \
        "train.py and evaluate.py yourself" >&2; exit 2; }
    "$PYTHON" train.py --data-dir "$data" --random-mirror --random-scale "${WEIGHTS[@]}" --learning-rate 1e-2 \
        --input-size 769,769 --weight-decay 1e-4 --batch-size 8 --num-steps 60000 --resume "${words[@]}"
    local last
    last=$(ls -v "$folder"/CS_scenes_*.pth | tail -n 1)
    "$PYTHON" evaluate.py --data-dir "$data" --restore-from "$last"
}

if [ -z "$data" ]; then demonstrate; else run_for_real "$data" "$@"; fi
