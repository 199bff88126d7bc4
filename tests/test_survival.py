"""Nothing is lost: exact resume, kills, full disks, dead processes, too little memory."""

import json
import os
import resource
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch

import train
from tests.conftest import ROOT, SMALL, finish, read_until, start
from tests.crash import same
from utils import checkpoint, cli
from utils.cli import UserError
from utils.logger import RunLog


def words(streets, folder, *more, steps=4):
    return ["--data-dir", str(streets), "--snapshot-dir", str(folder), *SMALL, "--batch-size", "4", "--num-steps",
            str(steps), "--save-pred-every", "2", "--random-mirror", "--random-scale", *more]


def end(folder, steps=4):
    return checkpoint.load_snapshot(folder / f"CS_scenes_{steps}.pth")


def cut(whole, part):
    """A folder as a run has left it that was killed after its snapshot of step 2."""
    part.mkdir()
    for name in ("CS_scenes_2.pth", "metrics.jsonl"):
        (part / name).write_bytes((whole / name).read_bytes())


@pytest.mark.parametrize("more", [(), ("--num-workers", "2"), ("--backbone", "eca_resnet18", "--amp", "bf16"),
                                  ("--accumulate", "2", "--ohem", "1", "--ohem-keep", "300")], ids=" ".join)
def test_a_resumed_run_ends_bit_equal(streets, tmp_path, more):
    train.main(words(streets, tmp_path / "whole", *more))
    cut(tmp_path / "whole", tmp_path / "part")
    torch.manual_seed(77)
    train.main(words(streets, tmp_path / "part", *more, "--resume"))
    assert same(end(tmp_path / "whole") | {"config": 0}, end(tmp_path / "part") | {"config": 0})
    losses = [[(line["step"], line["loss"]) for line in map(json.loads, open(tmp_path / name / "metrics.jsonl"))]
              for name in ("whole", "part")]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == [1, 2, 3, 4]


def test_two_processes_resume_bit_equal_and_one_says_what_it_lacks(streets, tmp_path, capsys):
    assert finish(start("train.py", *words(streets, tmp_path / "whole"), processes=2))[0] == 0
    cut(tmp_path / "whole", tmp_path / "part")
    assert finish(start("train.py", *words(streets, tmp_path / "part", "--resume"), processes=2))[0] == 0
    whole, part = end(tmp_path / "whole"), end(tmp_path / "part")
    assert len(whole["rng"]) == 2 and not torch.equal(whole["rng"][0]["torch"], whole["rng"][1]["torch"])
    assert same(whole | {"config": 0}, part | {"config": 0})
    cut(tmp_path / "whole", tmp_path / "alone")
    train.main(words(streets, tmp_path / "alone", "--resume"))
    assert "random generators start anew" in capsys.readouterr().out


def test_kills_at_any_moment_lose_nothing():
    status, out, error = finish(start("-m", "tests.crash", "--kills", "6"), 300)
    assert status == 0, error
    assert "each equal to the bit to the undisturbed one" in out
    assert int(out.split("kills, ")[1].split()[0]) >= 2     # provably while a snapshot was being written


def test_keep_and_latest(streets, tmp_path):
    folder = tmp_path / "s"
    train.main(words(streets, folder, "--save-pred-every", "1", "--keep", "2", steps=4))
    assert [step for step, _ in checkpoint.snapshots(folder)] == [3, 4]
    assert (folder / "latest.pth").is_symlink() and os.readlink(folder / "latest.pth") == "CS_scenes_4.pth"
    assert checkpoint.load_snapshot(folder / "latest.pth")["step"] == 4
    assert not list(folder.glob(".*.tmp"))


def test_what_a_run_leaves_beside_its_snapshots(streets, tmp_path, capsys):
    train.main(words(streets, tmp_path / "s", steps=2))
    train.main(words(streets, tmp_path / "s", "--resume", "--learning-rate", "0.005", steps=4))
    shown = capsys.readouterr().out
    assert "from here on --learning-rate 0.005, before it was 0.01" in shown
    assert "from here on --num-steps 4, before it was 2" in shown
    first, second = json.loads((tmp_path / "s/runs.json").read_text())
    assert second["arguments"]["learning_rate"] == 0.005 and first["versions"]["torch"] == torch.__version__
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert first["git_commit"] == (commit or None) and first["devices"] == ["CPU"]
    assert (tmp_path / "s/curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_full_disk_is_a_sentence_and_the_old_snapshot_stays(streets, tmp_path):
    folder = tmp_path / "s"
    train.main(words(streets, folder, steps=2))
    before = (folder / "CS_scenes_2.pth").read_bytes()
    limit = len(before) // 2        # a file cannot grow beyond it, as on a full disk
    process = start("train.py", *words(streets, folder, "--resume"),
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    status, _, error = finish(process)
    assert status == 2 and error.startswith("error: ") and "CS_scenes_4.pth: expected to write a file there" in error
    assert "Traceback" not in error
    assert (folder / "CS_scenes_2.pth").read_bytes() == before
    assert [step for step, _ in checkpoint.snapshots(folder)] == [2] and not list(folder.glob(".*.tmp"))


def test_too_little_room_is_said_before_the_first_step(streets, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda place: SimpleNamespace(free=10_000_000))
    with pytest.raises(UserError, match=r"--snapshot-dir .*: expected \d+ MB free for a snapshot, found 10 MB"):
        train.main(words(streets, tmp_path / "s"))
    assert not (tmp_path / "s").exists()


def test_a_folder_that_cannot_be_written(streets, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--snapshot-dir .*: expected a folder to write to, found"):
        train.main(words(streets, tmp_path / "file" / "s"))


def test_two_runs_do_not_write_to_one_folder(streets, tmp_path):
    with RunLog(tmp_path / "s", 1):
        with pytest.raises(UserError, match="expected a folder to which no other run is writing, found one in use"):
            train.main(words(streets, tmp_path / "s"))
    train.main(words(streets, tmp_path / "s", steps=1))


@pytest.mark.parametrize("more, found", [(("--batch-size", "2"), "--batch-size 2, found 4"),
                                         (("--random-seed", "9"), "--random-seed 9, found 1234"),
                                         (("--model", "base"), "--model base, found acfnet_resnet")])
def test_the_folder_of_another_run(streets, tmp_path, more, found):
    train.main(words(streets, tmp_path / "s", steps=1))
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "s").iterdir())
    with pytest.raises(UserError, match=f"expected a run with {found}; another --snapshot-dir starts another run"):
        train.main(words(streets, tmp_path / "s", *more, "--resume"))
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "s").iterdir()) == before


def test_an_older_file_does_not_replace_later_snapshots(streets, tmp_path):
    train.main(words(streets, tmp_path / "s"))
    with pytest.raises(UserError, match="2 steps done: expected no later snapshot .* found CS_scenes_4.pth"):
        train.main(words(streets, tmp_path / "s", "--resume", str(tmp_path / "s/CS_scenes_2.pth")))
    train.main(words(streets, tmp_path / "other", "--resume", str(tmp_path / "s/CS_scenes_2.pth")))
    assert same(end(tmp_path / "s") | {"config": 0}, end(tmp_path / "other") | {"config": 0})


def test_a_run_that_is_done_says_so(streets, tmp_path, capsys):
    train.main(words(streets, tmp_path / "s", steps=2))
    train.main(words(streets, tmp_path / "s", "--resume", steps=2))
    assert "nothing is left to do: 2 steps are done" in capsys.readouterr().out


def children(pid):
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "train.py" in line]


def test_a_dead_worker_ends_the_run_with_a_sentence(streets, tmp_path):
    process = start("train.py", *words(streets, tmp_path / "s", "--num-workers", "1", steps=100000))
    read_until(process, "step 2/")
    worker, = children(process.pid)
    os.kill(worker, signal.SIGKILL)
    status, _, error = finish(process, 30)
    assert status == 2 and "error: a process that reads samples died" in error and "Killed" in error
    assert "Traceback" not in error


def test_a_dead_process_ends_the_others(streets, tmp_path):
    process = start("train.py", *words(streets, tmp_path / "s", steps=100000), processes=2)
    read_until(process, "step 2/")
    victim = children(process.pid)[1]
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    status, _, error = finish(process, 60)
    assert status != 0 and time.monotonic() - began < 30
    assert "another process of this run has ended" in error and "SIGKILL" in error


def test_the_error_of_one_process_comes_first_and_is_the_status(streets, tmp_path):
    """Started by --parallel ddp's own launcher, without torchrun's report; the second process's image is broken."""
    lines = []
    for number, image in enumerate(sorted(streets.glob("leftImg8bit/train/*/*.png"))[:4]):
        label = str(image).replace("leftImg8bit/", "gtFine/").replace("_leftImg8bit.png", "_gtFine_labelIds.png")
        if number == 3:
            (tmp_path / "broken.png").write_bytes(image.read_bytes()[:2000])
            image = tmp_path / "broken.png"
        lines.append(f"{image} {label}\n")
    (tmp_path / "list.txt").write_text("".join(lines))
    arguments = words("/", tmp_path / "s", "--data-list", str(tmp_path / "list.txt"), "--random-seed", "7")
    process = start("-c", "import sys; from utils.distributed import start_processes; sys.argv[0] = 'train.py'; "
                    f"start_processes(2, {arguments!r})")
    began = time.monotonic()
    status, _, error = finish(process, 60)
    assert status == 2 and time.monotonic() - began < 45, error
    first = next(line for line in error.splitlines() if "process" in line)
    assert "error: " in first and "broken.png: expected an image, found one that cannot be read" in first, error
    assert "Traceback" not in error


def test_a_signal_stops_all_processes_at_the_same_step(streets, tmp_path):
    process = start("train.py", *words(streets, tmp_path / "s", "--save-pred-every", "100000", steps=100000),
                    processes=2)
    read_until(process, "step 3/")
    process.send_signal(signal.SIGTERM)
    _, out, error = finish(process, 60)
    (step, path), = checkpoint.snapshots(tmp_path / "s")
    assert f"stopped after step {step}" in out, error
    assert checkpoint.load_snapshot(path)["step"] == step


def test_a_second_signal_at_once_is_torchruns_and_a_later_one_ends():
    with cli.StopRequest(deaf=0.2) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        time.sleep(0.25)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)


def test_too_little_memory_names_the_flags_that_help(streets, tmp_path):
    code = ("import resource, train, utils.engine as e\n"
            "def step(*args, before=e.step_loss, **named):\n"
            "    size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
            "    resource.setrlimit(resource.RLIMIT_AS, (size + 100_000_000, -1))\n"
            "    try:\n        return before(*args, **named)\n"
            "    finally:\n        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n"
            "e.step_loss = step\n"
            "from utils import cli\n"
            f"cli.run(lambda: train.main({words(streets, tmp_path / 's', '--input-size', '513,513')!r}))\n")
    status, _, error = finish(start("-c", code))
    assert status == 2, error
    assert "out of memory: expected room for 4 crops of 513×513 on a device, which keep about" in error
    for flag in ("--amp bf16", "--checkpoint light", "--checkpoint full", "--accumulate 2", "--input-size"):
        assert flag in error
    assert "Traceback" not in error
