#!/usr/bin/env bash
# All tests with the lowest version of everything that the requirement files allow, in .venv-oldest:
#
#     tests/oldest.sh [words for pytest]
#     tests/oldest.sh --short             the whole way once, with snapshots to and from the newest versions
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."
. utils/environment.sh
choose_python requirements.txt tests/requirements.txt

# The oldest Python there is; PyTorch 2.4 knows none after 3.12.
for oldest in python3.10 ~/.pyenv/versions/3.10.*/bin/python python3.11 python3.12 "$PYTHON"; do
    "$oldest" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null && break
done
lowest=$("$PYTHON" utils/environment.py --lowest requirements.txt tests/requirements.txt)
if [ "$lowest" != "$(cat .venv-oldest/lowest.txt 2>/dev/null)" ]; then
    echo "installing the lowest versions into .venv-oldest (5 GB) with $("$oldest" --version)"
    "$oldest" -m venv --clear .venv-oldest
    .venv-oldest/bin/python -m pip install --quiet -r /dev/stdin <<<"$lowest"
    echo "$lowest" >.venv-oldest/lowest.txt
fi
if [ "${1:-}" = --short ]; then
    shift
    export OTHER_PYTHON=$PYTHON
    set -- tests/utils/common/test_compat.py "$@"
fi
run_pytest .venv-oldest/bin/python --durations=5 "$@"
