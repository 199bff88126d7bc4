# Sourced by run_local.sh and tests/run.sh: find or make a Python that has what the given requirement files name.
#
#     choose_python requirements.txt [more.txt ...]     sets PYTHON
#
# The active Python is taken as it is if nothing is missing; otherwise .venv is made beside the project and filled.

requirements_met() {    # PYTHON FILE...
    "$@" <<'EOF'
import sys
from importlib import metadata

try:
    from pip._vendor.packaging.requirements import Requirement
except ImportError:
    sys.exit("this Python has no pip")
missing = []
for path in sys.argv[1:]:
    for line in open(path, encoding="utf-8"):
        line = line.split("#")[0].strip()
        if line:
            wanted = Requirement(line)
            try:
                if not wanted.specifier.contains(metadata.version(wanted.name), prereleases=True):
                    missing.append(f"{line} (found {metadata.version(wanted.name)})")
            except metadata.PackageNotFoundError:
                missing.append(line)
if missing:
    sys.exit(f"{sys.executable} lacks {', '.join(missing)}")
EOF
}

choose_python() {    # FILE...
    local venv="$PWD/.venv" active
    active=$(command -v python || command -v python3) || { echo "error: expected python on the PATH, found none" >&2; exit 2; }
    if [ -x "$venv/bin/python" ] && requirements_met "$venv/bin/python" - "$@" 2>/dev/null; then
        PYTHON="$venv/bin/python"
    elif requirements_met "$active" - "$@"; then
        PYTHON="$active"
    else
        echo "installing into .venv (PyTorch is several GB; a few minutes)"
        [ -x "$venv/bin/python" ] || "$active" -m venv "$venv"
        local wanted=()
        for file in "$@"; do wanted+=(-r "$file"); done
        "$venv/bin/python" -m pip install --quiet "${wanted[@]}"
        PYTHON="$venv/bin/python"
    fi
    echo "Python: $PYTHON"
}

install_inplace_abn() {    # into $PYTHON, if it is our .venv; without it the tests that compare with it are skipped
    "$PYTHON" -c "import inplace_abn" 2>/dev/null && return
    if [ "$PYTHON" != "$PWD/.venv/bin/python" ]; then
        echo "inplace-abn is not installed: comparisons with it will be skipped"
        return
    fi
    echo "building inplace-abn for comparisons (two minutes)"
    local libraries     # where nvcc's own libraries lie: the linker is not told by everyone
    libraries=$(nvcc --dryrun -x cu /dev/null 2>&1 | grep LIBRARIES= | grep -o '"-L[^"]*"' | tr -d '"' | cut -c3- |
        paste -sd: || true)
    "$PYTHON" -m pip install --quiet setuptools setuptools_scm ninja wheel
    PATH="$PWD/.venv/bin:$PATH" TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0}" \
        LIBRARY_PATH="$libraries:${LIBRARY_PATH:-}" \
        "$PYTHON" -m pip install --quiet --no-build-isolation -r libs/requirements-extensions.txt ||
        echo "inplace-abn did not build: comparisons with it will be skipped"
}

install_chromium() {    # with Debian's packages, where that is possible; without it the test of report.html is skipped
    ! command -v chromium >/dev/null || return 0
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing chromium to look at a report (a minute)"
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } >/dev/null 2>&1 ||
            echo "chromium could not be installed: a test that opens report.html will be skipped"
    fi
}
