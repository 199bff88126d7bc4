"""Networks on the Hugging Face Hub: its own client, in processes of its own, against a server on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from networks.exporting import push_snapshot
from networks.predictor import load
from networks.weights import hub
from tests.conftest import ROOT, snapshot_content
from tests.hub_server import READER, WRITER, serve
from utils.common.errors import UserError
from utils.runs import snapshots

pytest.importorskip("safetensors")
pytest.importorskip("huggingface_hub")

RGB = np.random.default_rng(1).integers(0, 256, (40, 70, 3), dtype=np.uint8)
BEGIN = """
import json, os, sys, urllib.request
import numpy as np
from PIL import Image
import evaluate
from networks.predictor import load
from networks.weights import hub
from networks.weights.start import read_weights
from utils.common.errors import UserError
answers = {}
def note(name, work):
    try:
        answers[name] = work()
    except UserError as error:
        answers[name] = f"refused: {error}"
def probabilities(name):
    result = load(name, device="cpu", amp="off").predict("a.png")
    np.save(name.replace("/", "_").replace(":", "_"), result.probabilities)
def push(name, *words):
    evaluate.main(["--restore-from", sys.argv[1], "--push", name, *words])
"""
END = "\njson.dump(answers, open('answers.json', 'w'))\n"


def run(code, folder, address, *words, **environment):
    """Run lines in a process whose Hub is at this address: {name: what `note` noted}, standard output."""
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_ENDPOINT": address,
                   "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
                   "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1",
                   "CUDA_VISIBLE_DEVICES": "", **environment}
    others = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in
              name.lower()}
    done = subprocess.run([sys.executable, "-c", BEGIN + code + END, *map(str, words)], cwd=folder, capture_output=True,
                          text=True, timeout=240, env=others | environment)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "answers.json").read_text()), done.stdout


ONLINE = """
note("push", lambda: push("hf:me/net"))
note("push again", lambda: push("hf:me/net"))
note("load", lambda: probabilities("hf:me/net"))
note("load again", lambda: probabilities("hf:me/net"))
note("push half", lambda: push("hf:me/net", "--overwrite", "--export-precision", "fp16"))
note("the first commit", lambda: str(hub.fetch("hf:me/net@" + sys.argv[2])))
note("the newest commit", lambda: str(hub.fetch("hf:me/net")))
note("images", lambda: evaluate.main("--restore-from hf:me/net --images a.png --gpu cpu --num-workers 0 --amp off "
                                     "--scales 1 --no-flip --save labels".split()))
note("training", lambda: read_weights("hf:me/net").family)
note("push to a public one", lambda: push("hf:me/public"))
note("publish", lambda: push("hf:me/public", "--overwrite"))
for name in ("missing", "other", "no-weights", "outside"):
    note(name, lambda: hub.fetch(f"hf:me/{name}"))
note("revision", lambda: hub.fetch("hf:me/net@v7"))
os.environ["HF_TOKEN"] = "hf_reader"
note("push by a reader", lambda: push("hf:me/net", "--overwrite"))
note("push a new one by a reader", lambda: push("hf:me/mine"))
del os.environ["HF_TOKEN"]
note("private", lambda: hub.fetch("hf:me/secret"))
note("push without a token", lambda: push("hf:me/net", "--overwrite"))
urllib.request.urlopen(urllib.request.Request(os.environ["HF_ENDPOINT"] + "/stop", method="POST")).read()
note("down, cached", lambda: str(hub.fetch("hf:me/net")))
"""
REFUSED = {     # name → parts of the sentence
    "push again": ("--push hf:me/net: expected a repository without these files (or --overwrite; ", "config.json"),
    "push to a public one": ("--push hf:me/public: expected a private repository (or --overwrite, ", "found a public"),
    "missing": ("hf:me/missing: expected a repository that your token may use, found none", "(404); hf auth login"),
    "other": ("hf:me/other: expected a network of evaluate.py --push, found a config.json of something else",),
    "no-weights": ("hf:me/no-weights: expected config.json and the weights that it names, ", "found not both"),
    "outside": ("hf:me/outside: expected a network of evaluate.py --push, found a config.json of something else",),
    "revision": ("hf:me/net@v7: expected a branch, tag or commit of the repository, found no v7",),
    "push by a reader": ("--push hf:me/net: expected a repository that your token may use, ", "(403); hf auth login"),
    "push a new one by a reader": ("--push hf:me/mine: expected a repository that your token may use, ", "(403)"),
    "private": ("hf:me/secret: expected a repository that your token may use, found none, ", "(401); hf auth login"),
    "push without a token": ("--push hf:me/net: expected a token that may write, found none; hf auth login",)}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    path = tmp_path_factory.mktemp("snapshot") / "CS_scenes_7.pth"
    snapshots.save(path, snapshot_content())
    return path


@pytest.fixture(scope="module")
def online(snapshot, tmp_path_factory):
    """(folder of the process, `Hub`, answers, standard output) of a process that does all of `ONLINE`."""
    folder = tmp_path_factory.mktemp("hub")
    Image.fromarray(RGB).save(folder / "a.png")
    mark = '{"written_by": "evaluate.py --export", "file": '
    with serve() as server:
        server.add("me/public", {"notes.txt": b"mine"})
        server.add("me/secret", {}, private=True)
        server.add("me/other", {"config.json": b'{"model_type": "bert", "file": "model.safetensors"}'})
        server.add("me/no-weights", {"config.json": f'{mark}"model.safetensors"}}'.encode()})
        server.add("me/outside", {"config.json": f'{mark}"../../a.safetensors"}}'.encode()})
        first = hub_commit("me/net", 1)
        yield folder, server, *run(ONLINE, folder, server.address, snapshot, first, HF_TOKEN=WRITER)


def hub_commit(name, number):
    """The hash that the server gives to a commit."""
    from tests.hub_server import Hub

    server = Hub()
    server.add(name, {})
    return [server.commit(name, {}) for _ in range(number)][-1]


def test_a_network_is_pushed_and_loaded_again(snapshot, online):
    folder, server, answers, out = online
    expected = load(snapshot, device="cpu", amp="off").predict(RGB).probabilities
    assert [answers[name] for name in ("push", "load", "load again", "push half", "images")] == [None] * 5
    np.testing.assert_allclose(np.load(folder / "hf_me_net.npy"), expected, atol=1e-6)
    repository = server.repositories["me/net"]
    assert repository["private"] and len(repository["commits"]) == 3
    (_, before), (_, after) = repository["commits"][1:]
    assert {*after} == {".gitattributes", "config.json", "README.md", "model.safetensors"}
    assert len(after["model.safetensors"]) < 0.6 * len(before["model.safetensors"])
    assert b'load("hf:me/net").predict("image.jpg")' in after["README.md"]
    assert "hf:me/net, with config.json and README.md; checked against PyTorch: largest difference" in out
    assert f"; private at {server.address}/me/net\n" in out and f"; public at {server.address}/me/public\n" in out
    assert server.repositories["me/public"]["commits"][-1][1]["notes.txt"] == b"mine"


def test_files_come_from_the_hubs_own_cache(online):
    folder, server, answers, _ = online
    downloads = [line for line in server.requests if line.startswith("GET") and line.endswith("model.safetensors")]
    assert len(downloads) == 2      # one of each commit
    first, newest = Path(answers["the first commit"]), Path(answers["the newest commit"])
    assert first.parent.name == hub_commit("me/net", 1) != newest.parent.name
    assert first.read_bytes() == server.repositories["me/net"]["commits"][1][1]["model.safetensors"]
    assert (folder / "hf/hub") in newest.parents and answers["down, cached"] == str(newest)


def test_results_are_in_the_working_directory(online):
    folder, _, answers, _ = online
    assert answers["training"] == "ours"
    assert (folder / "snapshots/me--net_images/labelIds/a.png").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "answers.json", "hf", "hf_me_net.npy",
                                                              "snapshots"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_hub_refuses_is_a_sentence(online, name):
    _, server, answers, _ = online
    assert str(answers[name]).startswith("refused: ") and "\n" not in answers[name], answers[name]
    assert all(part in answers[name] for part in REFUSED[name]), answers[name]
    assert "me/mine" not in server.repositories


def test_offline_only_what_is_cached_can_be_used(online):
    folder, server, before, _ = online
    answers, _ = run("note('cached', lambda: str(hub.fetch('hf:me/net')))\nnote('other', lambda: hub.fetch('hf:me/x'))",
                     folder, server.address, HF_HUB_OFFLINE="1", HF_TOKEN=READER)
    assert answers["cached"] == before["the newest commit"]
    assert "hf:me/x: expected a connection to" in answers["other"] and "found neither" in answers["other"]


@pytest.mark.parametrize("name", ["hf:net", "hf:a/b/c", "hf:/net", "hf:me/net@", "hf:me/../x", "hf:me/n t"])
def test_names_are_checked_before_anything_else(name):
    with pytest.raises(UserError, match="expected hf:owner/name or hf:owner/name@revision, found another form"):
        load(name, device="cpu", amp="off")
    with pytest.raises(UserError, match="--push .*: expected hf:owner/name or"):
        push_snapshot("a.pth", name)


def test_without_the_package_it_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="^hf:me/net: expected the package huggingface_hub, found none; pip install"):
        hub.fetch("hf:me/net")
    with pytest.raises(UserError, match="^--push hf:me/net@v1: expected the package huggingface_hub"):
        push_snapshot("a.pth", "hf:me/net@v1")
