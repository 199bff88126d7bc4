#!/usr/bin/env bash
# A demonstration on drawn streets, on any machine (two to twelve minutes on two cores):
#
#     ./run_local.sh [--gpu 0 ...]
#
# Training and evaluation on Cityscapes, with the README's numbers on all visible GPUs:
#
#     ./run_local.sh CITYSCAPES [--ohem 1 ...]
#     ./run_local.sh CITYSCAPES --from-scratch        without the weights in dataset/
#
# Run the same command again to continue after an interruption; the demonstration also needs --resume.
# Further arguments go to train.py; --gpu, --amp, --data-list and --classes also to the check and to evaluate.py.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 0 ;; esac

user_folder=$PWD
cd "$(dirname "$(realpath "$0")")"
. utils/environment.sh
choose_python requirements.txt
exec "$PYTHON" -m utils.demo.local "$user_folder" "$@"
