#!/usr/bin/env bash
# A demonstration on drawn streets, on any machine, in about three minutes on two cores:
#
#     ./run_local.sh [--gpu 0 ...]
#
# The real thing, with the README's numbers on all visible GPUs:
#
#     ./run_local.sh CITYSCAPES [--ohem 1 ...]
#     ./run_local.sh CITYSCAPES --from-scratch        without weights in dataset/
#
# It goes on after an interruption with the same words; the demonstration needs --resume too.
# Further words go to train.py; --gpu, --amp, --data-list and --classes also to the check and to evaluate.py.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 0 ;; esac

stood=$PWD
cd "$(dirname "$(realpath "$0")")"
. utils/environment.sh
choose_python requirements.txt
exec "$PYTHON" -m utils.demo.local "$stood" "$@"
