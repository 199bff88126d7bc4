"""Both scripts called from a notebook: without a script or a terminal, and with a running event loop."""

import os
import subprocess
import sys

from PIL import Image

from tests.conftest import ROOT, SMALL

CELLS = """
import asyncio, os, signal, sys
sys.argv = ["/opt/env/lib/python3.11/site-packages/ipykernel_launcher.py", "-f", "kernel.json"]
import evaluate, train
from utils.common.command import STOP_SIGNALS
from utils.common.errors import UserError
data, small = {data!r}, {small!r}
globals().pop("__file__", None)     # some versions call standard input a file
signal.signal(signal.SIGINT, signal.default_int_handler)        # a job in the background ignores it

def handlers():
    return [signal.getsignal(number) for number in STOP_SIGNALS]

def refused(main, words, sentence):
    try:
        main(words)
    except UserError as error:
        assert sentence in str(error), error
    else:
        raise AssertionError(sentence)

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

async def notebook():
    before, ticks = handlers(), []
    async def tick():
        while True:
            ticks.append(1)
            await asyncio.sleep(0.01)
    ticking = asyncio.create_task(tick())
    words = ["--data-dir", data, "--snapshot-dir", "run", *small, "--batch-size", "2", "--num-workers", "2"]
    train.main([*words, "--num-steps", "1"])
    refused(train.main, [*words, "--num-steps", "1"], "expected a folder without snapshots, or --resume")
    refused(train.main, ["--no-such-flag"], "--no-such-flag: expected a flag of this command")
    refused(train.main, [*words, "--num-steps", "x"], "--num-steps: expected a whole number")
    await asyncio.to_thread(train.main, [*words, "--num-steps", "2", "--resume"])      # signals are the main thread's
    assert handlers() == before
    asyncio.get_running_loop().call_soon(interrupt)
    try:
        await asyncio.sleep(60)
        raise AssertionError("the interrupt of the kernel is lost")
    except asyncio.CancelledError:
        pass
    quick = ["--restore-from", "run/CS_scenes_2.pth", "--gpu", "cpu", "--num-workers", "2", "--amp", "off",
             "--scales", "1", "--no-flip"]
    refused(evaluate.main, [*quick, "--images", "a.png", "broken.png"], "expected images that can be read, found 1")
    refused(evaluate.main, quick, "--data-dir: expected")
    assert handlers() == before and len(ticks) > 1
    ticking.cancel()

try:
    asyncio.run(notebook())
except KeyboardInterrupt:       # raised by asyncio after an interrupt that it has handled
    pass
print("the kernel lives")
"""


def test_scripts_called_from_a_notebook(streets, tmp_path):
    image = next(streets.glob("leftImg8bit/val/*/*.png"))
    Image.open(image).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(image.read_bytes()[:200])
    done = subprocess.run([sys.executable, "-"], input=CELLS.format(data=str(streets), small=SMALL), cwd=tmp_path,
                          capture_output=True, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "the kernel lives" and "1 image predicted, 1 skipped" in done.stdout
    assert (tmp_path / "run/CS_scenes_2.pth").exists()
