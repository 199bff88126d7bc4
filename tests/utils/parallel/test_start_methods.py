"""train.py and evaluate.py where worker processes do not inherit the parent's memory: macOS, Windows, Python 3.14."""

import pytest

from tests.conftest import ROOT, SMALL, finish, fork

pytestmark = pytest.mark.usefixtures("short_networks")

# As a script of its own: worker processes import the main module again, which must then start nothing.
STARTER = """
import multiprocessing
import runpy
import sys

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv.pop(1), force=True)
    sys.argv.pop(0)
    sys.path.insert(0, {root!r})
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_training_and_evaluation_need_no_inherited_memory(streets, tmp_path):
    """With spawn, which needs all that forkserver needs."""
    starter = tmp_path / "starter.py"
    starter.write_text(STARTER.format(root=str(ROOT)))

    def call(script, *words):
        status, out, error = finish(fork(starter, "spawn", ROOT / script, "--data-dir", streets, *words), 250)
        assert status == 0, error
        return out

    small = [*SMALL, "--num-workers", 1]       # the last --num-workers counts
    call("train.py", *small, "--snapshot-dir", tmp_path / "run", "--batch-size", 2, "--num-steps", 1, "--jitter",
         "0.1,0.1,0.1,0.1", "--random-scale", "--random-mirror", "--sampling", "class", "--cache", tmp_path / "cache")
    output = call("evaluate.py", "--restore-from", tmp_path / "run/CS_scenes_1.pth", "--num-workers", 1, "--gpu", "cpu",
                "--scales", 1, "--no-flip", "--input-size", "65,129", "--save", "none")
    assert "mean IoU" in output
