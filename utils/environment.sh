# Sourced by run_local.sh and the scripts in tests/, in the project's folder.

unset PYTHONSAFEPATH    # it would keep python -m from finding modules in this folder

find_python() {     # sets ACTIVE to the first of python, python3 and .venv's Python that is new enough
    for ACTIVE in python python3 .venv/bin/python; do
        "$ACTIVE" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && return
    done
    echo "error: expected Python 3.10 or newer as python or python3 on the PATH, found" \
        "$({ python3 --version || python --version || echo none; } 2>&1 | tail -n 1)" >&2     # Python 2 uses stderr
    exit 2
}

choose_python() {   # FILE...  sets PYTHON to a Python that meets these requirement files
    find_python
    PYTHON=$("$ACTIVE" utils/environment.py "$@") || exit $?
    echo "Python: $PYTHON"
}

install_inplace_abn() {    # into $PYTHON, if that is our .venv; without the package, comparisons with it are skipped
    "$PYTHON" -c "import inplace_abn" 2>/dev/null && return
    if [ "$PYTHON" != "$PWD/.venv/bin/python" ]; then
        echo "inplace-abn is not installed: comparisons with it will be skipped"
        return
    fi
    echo "building inplace-abn for comparisons (two minutes)"
    local libraries     # folders of nvcc's libraries, which not every installation passes to the linker
    libraries=$(nvcc --dryrun -x cu /dev/null 2>&1 | grep LIBRARIES= | grep -o '"-L[^"]*"' | tr -d '"' | cut -c3- |
        paste -sd: || true)
    "$PYTHON" -m pip install --quiet setuptools setuptools_scm ninja wheel
    PATH="$PWD/.venv/bin:$PATH" TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0}" \
        LIBRARY_PATH="$libraries:${LIBRARY_PATH:-}" \
        "$PYTHON" -m pip install --quiet --no-build-isolation -r libs/requirements-extensions.txt ||
        echo "inplace-abn did not build: comparisons with it will be skipped"
}

install_chromium() {    # from Debian's packages, if possible; without it the test of report.html is skipped
    ! command -v chromium >/dev/null || return 0
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing chromium to render report.html in a test (a minute)"
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } >/dev/null 2>&1 ||
            echo "chromium could not be installed: a test that opens report.html will be skipped"
    fi
}

run_pytest() {      # PYTHON [arguments]
    # Runs one more test at a time than there are cores, at most four, because many tests wait for processes that they
    # started; each computes on one core. Arguments such as -n 0 change that.
    local cores
    cores=$("$1" -c "from utils.common.limits import available_cores; print(available_cores())")
    OMP_NUM_THREADS=1 "$1" -m pytest -n "$((cores < 4 ? cores + 1 : 4))" --dist worksteal "${@:2}"
}
