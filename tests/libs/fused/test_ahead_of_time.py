"""Triton's kernels compiled for GPUs that are not there."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SMALL = ("merge", "attention", "logit")     # kernels that read no map
# Of the loss. Neither the logits of a pixel nor rows of labels begin at a multiple of 16 bytes.
SCALAR = ("losses_kernel", "sums_kernel")


def obstacle():
    spec = importlib.util.find_spec("triton")
    if spec is None:
        return "Triton is not installed"
    if importlib.metadata.version("triton").startswith(("3.0", "3.1", "3.2")):
        return "the compiler of this Triton is called in another way"
    return None if Path(spec.origin).with_name("backends").joinpath("nvidia/bin/ptxas").exists() else "no ptxas"


@pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))
def test_kernels_fit_into_registers_and_read_vectors():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "tests.libs.fused.ahead_of_time"], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert [sum(kernel["capability"] == capability for kernel in kernels) for capability in (80, 90)] == [9, 14]
    assert [kernel["kernel"] for kernel in kernels if kernel["spilled"] or kernel["atomics"]] == []
    for kernel in kernels:
        if kernel["kernel"] in SCALAR:
            assert kernel["registers"] <= 80        # 12 programs on each multiprocessor
            continue
        assert kernel["maps"] or kernel["kernel"].startswith(SMALL)
        read_and_written = kernel["vector_loads"] + kernel["vector_stores"]
        assert read_and_written >= kernel["maps"] and (kernel["vector_loads"] or not kernel["maps"]), kernel
