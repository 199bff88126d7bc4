"""The house: which rooms there are, and that imports run one way."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"networks": {"libs", "utils"}, "loss": {"libs", "utils"}, "dataset": {"utils"}, "libs": {"utils"},
         "utils": set()}
PACKAGES = {        # of utils, and which of the others each may import
    "common": set(), "ops": {"common"}, "parallel": {"common"}, "imaging": {"common"},
    "devices": {"ops", "parallel", "common"},
    "inference": {"imaging", "devices", "parallel", "ops", "common"},
    "metrics": {"imaging", "devices", "parallel", "ops", "common"},
    "reports": {"metrics", "imaging", "common"},
    "runs": {"devices", "parallel", "common"},
    "training": {"runs", "reports", "metrics", "inference", "imaging", "devices", "parallel", "ops", "common"},
    "demo": {"runs", "common"},
}
LONGEST = 1000      # lines of a package of utils
TOP = {"train.py", "evaluate.py", "run_local.sh", "networks", "dataset", "utils", "loss", "libs", "snapshots", "tests",
       "requirements.txt", "README.md", "pyproject.toml", "LICENSE", ".gitignore", ".ci"}
OPTIONAL = {"apex", "inplace_abn", "timm", "safetensors", "onnx", "onnxruntime", "wandb", "mlflow", "triton",
            "av", "huggingface_hub"}
SCRIPTS = [ROOT / "train.py", ROOT / "evaluate.py"]
# Modules of Triton's kernels import Triton, and are themselves imported where they are used.
KERNELS = {path.stem for path in (ROOT / "libs/fused").glob("*.py")} - {"__init__", "launch"}
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path, tree=None):
    """Full dotted names of all that a file imports, such as utils.common.files.load."""
    here = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree or ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*here[:len(here) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def unit(name, depth=2):
    """The package that a dotted name belongs to."""
    return ".".join(name.split(".")[:depth])


def test_rooms_import_one_way():
    ours = {*ROOMS, "train", "evaluate", "tests"}
    wrong = {(str(path.relative_to(ROOT)), name) for path in SOURCES for name in imports(path)
             if unit(name, 1) in ours and unit(name, 1) not in ROOMS[path.relative_to(ROOT).parts[0]]
             and unit(name, 1) != path.relative_to(ROOT).parts[0]}
    assert wrong == set()
    assert not {unit(name, 1) for path in SCRIPTS for name in imports(path)} & {"train", "evaluate", "tests"}


def test_packages_of_utils_import_one_way():
    assert {path.name for path in (ROOT / "utils").iterdir() if path.is_dir() and path.name[0] != "_"} == set(PACKAGES)
    wrong = set()
    for package, allowed in PACKAGES.items():
        for path in (ROOT / "utils" / package).rglob("*.py"):
            wrong |= {(str(path.relative_to(ROOT)), name) for name in imports(path) if name.startswith("utils.")
                      and unit(name) not in {f"utils.{other}" for other in (package, *allowed)}}
    assert wrong == set()


def test_networks_import_one_way():
    """No circle of modules and packages, each standing for all that it holds."""
    arrows = {}
    for path in (ROOT / "networks").rglob("*.py"):
        here = unit(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if here != "networks.__init__":
            arrows.setdefault(here, set()).update(
                unit(name) for name in imports(path) if name.startswith("networks.") and unit(name) != here)
    assert {"networks.acf", "networks.build"} <= arrows.keys()
    while leaves := {name for name, others in arrows.items() if not others & arrows.keys()}:
        arrows = {name: others for name, others in arrows.items() if name not in leaves}
    assert arrows == {}


def test_no_package_of_utils_grows_too_long():
    lines = {package: sum(len(path.read_text().splitlines()) for path in (ROOT / "utils" / package).rglob("*.py"))
             for package in PACKAGES}
    assert {package: count for package, count in lines.items() if count > LONGEST} == {}


def test_optional_packages_are_imported_where_they_are_used():
    """Nothing at import time needs them: only inside functions."""
    wrong = set()
    for path in [*SOURCES, *SCRIPTS]:
        top = ast.Module([node for node in ast.parse(path.read_text()).body
                          if isinstance(node, ast.Import | ast.ImportFrom)], [])
        lazy = OPTIONAL | {f"libs.fused.{name}" for name in KERNELS}
        if path.parent.name == "fused" and path.stem in KERNELS:
            lazy = OPTIONAL - {"triton"}
        wrong |= {(path.name, name) for name in imports(path, top) if {unit(name, depth) for depth in (1, 3)} & lazy}
    assert wrong == set()


def test_names_that_others_rely_on_stay_where_they_are():
    """The contracts of the project; a package hands on names of its modules and does nothing else."""
    for name in ("networks.build_network", "networks.load", "networks.MODELS", "networks.acf.ACFHead",
                 "networks.acf.ACFModule", "libs.abn.InPlaceABN", "libs.abn.InPlaceABNSync", "libs.abn.ABN",
                 "loss.ohem.OhemCrossEntropy", "loss.criterion.SegmentationCriterion",
                 "dataset.cityscapes.CityscapesDataset", "dataset.transforms.train_transform",
                 "utils.metrics.ConfusionMatrix", "utils.inference.SlidingPredictor"):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    for path in (ROOT / "utils").rglob("__init__.py"):
        kinds = {type(node) for node in ast.parse(path.read_text()).body}
        assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign}, path


def test_importing_touches_nothing():
    """Neither a GPU, a process group, the command line, the environment, an optional package, nor the compiler, whose
    import takes a second that --help and a refused flag would wait for too."""
    code = ("import os, sys, cv2, tensorboardX, torch; before = dict(os.environ); "
            "import train, evaluate, dataset.check, dataset.convert, dataset.streets; "
            "sys.exit(torch.cuda.is_initialized() or torch.distributed.is_initialized() or "
            "str({*os.environ.items()} - {*before.items()}).removeprefix('set()') or "
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
    for path in [*SOURCES, *SCRIPTS]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno > 65:
                long.append(f"{path.name}:{node.name}")
    assert long == []
