"""Which Python the scripts take, and what they say where none can be made."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from utils import environment


def test_versions_are_compared_as_pip_does(tmp_path):
    from pip._vendor.packaging.specifiers import SpecifierSet
    versions = ("2.4", "2.4.0", "2.4.1+cu121", "2.10.0", "1.26", "3")
    for version in versions:
        for bound in (">=2.4", ">=2.4.1", "<2.10", "==2.4", ">=2.5,<3"):
            (tmp_path / "file.txt").write_text(f"# words\nname{bound}  # more\n\n")
            ((name, bounds),) = environment.requirements([tmp_path / "file.txt"])
            met = all(environment.meets(version, *one) for one in bounds)
            plain = version.split("+")[0]
            assert name == "name" and met == SpecifierSet(bound).contains(plain), (version, bound)
    assert environment.meets("2.5.0a0+872d972e41.nv24.08", ">=", "2.5")      # a vendor's build of that version


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "file.txt").write_text("numpy>=1.0\nno-such-package>=2\nnumpy>=1.0,<1.1\n")
    lacking = environment.missing([tmp_path / "file.txt"])
    assert len(lacking) == 2 and lacking[0] == "no-such-package>=2"
    assert lacking[1].startswith("numpy>=1.0,<1.1 (found ")


def without(folder, module, error):
    """Words of the environment in which a module cannot be imported: `error` is raised instead."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import sys\nclass Finder:\n    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n            raise {error}\nsys.meta_path.insert(0, Finder())\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


LIBGL = "libGL.so.1: cannot open shared object file: No such file or directory"      # what python:3.11-slim says


@pytest.mark.parametrize("words", [["train.py", "--help"], ["-m", "dataset.check", "x"],
                                   ["utils/environment.py", "--missing", "requirements.txt"],
                                   ["utils/environment.py", "requirements.txt"]])
def test_opencv_that_lacks_a_library_is_a_sentence(tmp_path, words):
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True,
                          env=without(tmp_path / "lacks", "cv2", f"ImportError({LIBGL!r})"))
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: expected the package opencv-python, ") and f"found {LIBGL}; " in done.stderr
    assert "pip install opencv-python-headless" in done.stderr and "apt install libgl1" in done.stderr


@pytest.mark.parametrize("package, module", [("tensorboardX", "tensorboardX"), ("Jinja2", "jinja2")])
def test_a_package_that_is_missing_is_a_sentence(tmp_path, package, module):
    done = subprocess.run([sys.executable, "evaluate.py", "--help"], cwd=ROOT, capture_output=True, text=True,
                          env=without(tmp_path / "lacks", module, f"ModuleNotFoundError('No module named {module}')"))
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: expected the package {package}, ")
    assert f"-m pip install -r {ROOT / 'requirements.txt'}" in done.stderr


def test_every_required_package_is_looked_for():
    names = {name for name, _ in environment.requirements([ROOT / "requirements.txt"])}
    assert names == environment.MODULES.keys() | environment.LAZY_MODULES.keys()


def test_a_python_that_is_too_old_is_missing_something(monkeypatch):
    assert environment.missing([]) == []
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    lacking, = environment.missing([])
    assert lacking.startswith("Python>=3.10 (found ")


def test_a_file_where_the_venv_would_be(tmp_path, capsys):
    (tmp_path / ".venv").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        environment.make_venv([], tmp_path / ".venv")
    output = capsys.readouterr().err
    assert caught.value.code == 2 and output.endswith("found a file of that name\n") and output.count("\n") == 1


@pytest.mark.parametrize("name, script, actual", [
    (None, "", "none"), ("python", "echo Python 2.7.18 >&2", "Python 2.7.18"),
    ("python3", "echo Python 3.8.1", "Python 3.8.1")])
def test_only_an_old_python_is_named(tmp_path, name, script, actual):
    (tmp_path / "tail").symlink_to(shutil.which("tail"))
    if name:
        (tmp_path / name).write_text(f"#!/bin/sh\n[ $1 = --version ] || exit 1\n{script}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run([shutil.which("bash"), "-c", f". {ROOT}/utils/environment.sh; find_python"], cwd=tmp_path,
                          env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == (
        f"error: expected Python 3.10 or newer as python or python3 on the PATH, found {actual}\n")


def test_the_lowest_versions_are_those_of_the_files():
    done = subprocess.run([sys.executable, "utils/environment.py", "--lowest", "requirements.txt"], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    assert "torch==2.4\n" in done.stdout and len(done.stdout.splitlines()) == 10


def test_a_venv_that_was_only_begun_or_is_too_old_is_made_again(tmp_path, monkeypatch):
    venv = tmp_path / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    assert subprocess.run([venv / "bin/python", "-m", "pip", "--version"], capture_output=True).returncode
    (tmp_path / "file.txt").write_text("")
    python = environment.make_venv([tmp_path / "file.txt"], venv)
    assert subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0
    (venv / "mine").touch()
    environment.make_venv([tmp_path / "file.txt"], venv)
    assert (venv / "mine").exists()
    monkeypatch.setattr(environment, "OLDEST", (3, 99))
    environment.make_venv([tmp_path / "file.txt"], venv)
    assert not (venv / "mine").exists() and python.exists()


@pytest.mark.parametrize("output, reason", [
    ("Retrying ... Failed to establish a new connection: [Errno -3] Temporary failure in name resolution\n"
     "ERROR: No matching distribution found for torch>=2.4", "no connection"),
    ("ERROR: No matching distribution found for torch>=2.4", "no package for Python"),
    ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "a full disk")])
def test_the_cause_is_said_before_what_pip_says(tmp_path, monkeypatch, capfd, output, reason):
    venv = tmp_path / ".venv"
    (venv / "bin").mkdir(parents=True)
    fake = venv / "bin/python"
    fake.write_text(f"#!/bin/sh\n[ \"$1\" = -c ] && exit 0\ncat >&2 <<'EOF'\n{output}\nEOF\nexit 1\n")
    fake.chmod(0o755)
    with pytest.raises(SystemExit) as caught:
        environment.make_venv([tmp_path / "file.txt"], venv)
    lines = capfd.readouterr().err.splitlines()
    assert caught.value.code == 2 and lines[1].startswith("error: expected to install") and reason in lines[1]
    assert lines[2:] == output.splitlines()
