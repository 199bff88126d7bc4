"""The house: which rooms there are, and that imports run one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"networks": {"libs", "utils"}, "dataset": {"utils"}, "loss": {"utils"}, "libs": {"utils"}, "utils": set()}
TOP = {"train.py", "evaluate.py", "run_local.sh", "networks", "dataset", "utils", "loss", "libs", "snapshots", "tests",
       "requirements.txt", "README.md", "pyproject.toml", "LICENSE", ".gitignore", ".ci"}
OPTIONAL = {"apex", "inplace_abn", "timm", "safetensors", "onnx", "onnxruntime", "wandb", "mlflow"}
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imports(tree):
    """(level, module's first name) of every import statement below a syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, (node.module or "").split(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    room = path.relative_to(ROOT).parts[0]
    ours = {*ROOMS, "train", "evaluate", "tests"}
    outside = {name for level, name in imports(ast.parse(path.read_text())) if level == 0 and name in ours}
    assert outside <= ROOMS[room] | ({room} if path.name == "__main__" else set())


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_scripts_do_not_know_each_other(script):
    found = {name for _, name in imports(ast.parse((ROOT / script).read_text()))}
    assert not found & {"train", "evaluate", "tests"}


@pytest.mark.parametrize("path", [*SOURCES, ROOT / "train.py", ROOT / "evaluate.py"],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_optional_packages_are_imported_where_they_are_used(path):
    """Nothing at import time needs them: only inside functions."""
    top = ast.Module([node for node in ast.parse(path.read_text()).body
                      if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert not {name for _, name in imports(top)} & OPTIONAL


def test_importing_touches_nothing():
    """Neither a GPU, a process group, the command line, an optional package, nor the compiler, whose import takes a
    second that --help and a refused flag would wait for too."""
    code = ("import sys, torch, train, evaluate, dataset.check, dataset.streets; "
            "sys.exit(torch.cuda.is_initialized() or torch.distributed.is_initialized() or "
            "str(sorted({'torch._dynamo', *sys.argv[2:]} & sys.modules.keys())).strip('[]') or None)")
    done = subprocess.run([sys.executable, "-c", code, "--no-such-flag", *OPTIONAL], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_else_lies_at_the_top():
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in listed} == TOP


def test_functions_stay_short():
    """About 60 lines at most; the training loop, the flags and main read better whole."""
    long = []
    for path in [*SOURCES, ROOT / "train.py", ROOT / "evaluate.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno > 65:
                long.append(f"{path.name}:{node.name}")
    assert long == []
