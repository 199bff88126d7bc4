#!/usr/bin/env bash
# Everything that decides whether a change lands: the linter, then the tests. Words go to pytest.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."
. utils/environment.sh
choose_python requirements.txt tests/requirements.txt
install_inplace_abn     # what libs/abn.py is compared with
install_chromium        # what report.html is opened in
"$PYTHON" -m ruff check .
run_pytest "$PYTHON" --durations=12 "$@"
