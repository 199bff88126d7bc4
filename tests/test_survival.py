"""Nothing is lost: exact resume, kills, full disks, dead processes, too little memory."""

import fcntl
import json
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

import train
from networks.backbones.names import BACKBONES
from tests.conftest import ROOT, SMALL, children, finish, finish_all, fork, fork_ranks, read_until, start
from tests.crash import same
from tests.test_evaluate import snapshot  # noqa: F401, a fixture
from utils.common import command as command_module
from utils.common import files
from utils.common.command import Interrupted, StopRequest, _exit_status_and_message
from utils.common.errors import UserError
from utils.devices import memory
from utils.runs import log as log_module
from utils.runs import snapshots
from utils.runs.log import RunLog, describe_run

pytestmark = pytest.mark.usefixtures("short_networks")


def words(streets, folder, *more, steps=4):
    return ["--data-dir", str(streets), "--snapshot-dir", str(folder), *SMALL, "--batch-size", "4", "--num-steps",
            str(steps), "--save-pred-every", "2", "--random-mirror", "--random-scale", *more]


def end(folder, steps=4):
    return files.load(folder / f"CS_scenes_{steps}.pth")


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


def test_two_processes_resume_bit_equal_one_speaks_and_one_alone_says_what_it_lacks(streets, tmp_path, capsys):
    ohem = ("--ohem", "1", "--ohem-keep", "300")
    out = finish_all(fork_ranks("train.py", *words(streets, tmp_path / "whole", *ohem)))
    assert "2 processes share each batch" in out        # and one speaks
    assert out.count("step 3/4") == 1 and out.count("saved the snapshot of step 4") == 1
    assert [json.loads(line)["step"] for line in open(tmp_path / "whole/metrics.jsonl")] == [1, 2, 3, 4]
    cut(tmp_path / "whole", tmp_path / "part")
    finish_all(fork_ranks("train.py", *words(streets, tmp_path / "part", *ohem, "--resume")))
    whole, part = end(tmp_path / "whole"), end(tmp_path / "part")
    assert len(whole["rng"]) == 2 and not torch.equal(whole["rng"][0]["torch"], whole["rng"][1]["torch"])
    assert same(whole | {"config": 0}, part | {"config": 0})
    cut(tmp_path / "whole", tmp_path / "alone")
    train.main(words(streets, tmp_path / "alone", *ohem, "--resume"))
    assert "random generators start anew" in capsys.readouterr().out


def test_kills_at_any_moment_lose_nothing():
    status, out, error = finish(fork("-m", "tests.crash", "--kills", "2", "--steps", "12"), 300)
    assert status == 0, error
    assert "each equal to the bit to the undisturbed one" in out
    assert int(out.split("kills, ")[1].split()[0]) >= 1     # provably while a snapshot was being written


def test_keep_and_latest(streets, tmp_path):
    folder = tmp_path / "s"
    train.main(words(streets, folder, "--save-pred-every", "1", "--keep", "2", steps=4))
    assert [step for step, _ in snapshots.list_snapshots(folder)] == [3, 4]
    assert (folder / "latest.pth").is_symlink() and os.readlink(folder / "latest.pth") == "CS_scenes_4.pth"
    assert files.load(folder / "latest.pth")["step"] == 4
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


def test_the_commit_of_an_outer_repository_is_not_ours(tmp_path, monkeypatch):
    def git(*words):
        return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words], cwd=tmp_path, check=True,
                              capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "theirs")
    for folder, expected in ((tmp_path / "ACFNet", None), (tmp_path, git("rev-parse", "HEAD"))):
        folder.mkdir(exist_ok=True)
        monkeypatch.setattr(log_module, "__file__", str(folder / "utils/runs/log.py"))
        assert describe_run({}, [])["git_commit"] == expected


def test_a_full_disk_is_a_sentence_and_the_old_snapshot_stays(streets, tmp_path):
    folder = tmp_path / "s"
    train.main(words(streets, folder, steps=2))
    before = (folder / "CS_scenes_2.pth").read_bytes()
    limit = len(before) // 2        # a file cannot grow beyond it, as on a full disk
    status, _, error = finish(fork("-c", (
        f"import resource, train; from utils.common import command\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit},"
        f" {limit}))\ncommand.run(lambda: train.main({words(streets, folder, '--resume')!r}))")))
    assert status == 2 and error.startswith("error: ") and "CS_scenes_4.pth: expected to write a file there" in error
    assert "Traceback" not in error
    assert (folder / "CS_scenes_2.pth").read_bytes() == before
    assert [step for step, _ in snapshots.list_snapshots(folder)] == [2] and not list(folder.glob(".*.tmp"))


def test_too_little_room_is_said_before_the_first_step(streets, tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda place: SimpleNamespace(free=10_000_000))
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


@pytest.mark.parametrize("more, actual", [(("--batch-size", "2"), "--batch-size 2, found 4"),
                                         (("--random-seed", "9"), "--random-seed 9, found 1234"),
                                         (("--model", "base"), "--model base, found acfnet_resnet")])
def test_the_folder_of_another_run(streets, tmp_path, more, actual):
    train.main(words(streets, tmp_path / "s", steps=1))
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "s").iterdir())
    with pytest.raises(UserError, match=f"expected a run with {actual}; another --snapshot-dir starts another run"):
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
    assert "nothing is left to do: 2 steps done" in capsys.readouterr().out


@pytest.mark.parametrize("name, kind, message", [
    ("metrics.jsonl", "folder", "metrics.jsonl: expected a text file of JSON lines, found: Is a directory"),
    ("metrics.jsonl", "binary", "metrics.jsonl: expected a text file of JSON lines, found a binary file"),
    ("quick_validation.jsonl", "binary", "quick_validation.jsonl: expected a text file"),
    ("tensorboard", "binary", "tensorboard: expected a folder to write to, found: File exists"),
    ("runs.json", "folder", "runs.json: expected the list of this folder's runs, found: Is a directory"),
    ("runs.json", "binary", "runs.json: expected the list of this folder's runs, found a binary file"),
    ("runs.json", "object", "runs.json: expected the list of this folder's runs, found something else"),
    (".lock", "folder", "--snapshot-dir .*: expected an ordinary file .lock there, found: .*Is a directory"),
    (".lock", "link", "--snapshot-dir .*: expected an ordinary file .lock there, found: .*symbolic links"),
    (".lock", "pipe", "--snapshot-dir .*: expected an ordinary file .lock there, found: not a regular file"),
])
def test_what_is_no_log_of_ours_stays_as_it_is(tmp_path, name, kind, message):
    path, other = tmp_path / "s" / name, tmp_path / "precious.txt"
    path.parent.mkdir()
    other.write_text("precious")
    {"folder": path.mkdir, "binary": lambda: path.write_bytes(b"\x89PNG\xff"), "link": lambda: path.symlink_to(other),
     "object": lambda: path.write_text('{"a": 1}'), "pipe": lambda: os.mkfifo(path)}[kind]()
    with pytest.raises(UserError, match=message):
        RunLog(tmp_path / "s", 1)
    assert other.read_text() == "precious"
    assert kind != "binary" or path.read_bytes() == b"\x89PNG\xff"
    assert kind != "object" or path.read_text() == '{"a": 1}'


def test_lines_without_a_step_are_left_out_with_a_word(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"loss": 3}\n[4]\n5\n"x"\n{"step": "6"}\n{"st')
    with RunLog(tmp_path, 9, start=3):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2}\n'
    assert "metrics.jsonl: 6 lines without a step are left out" in capsys.readouterr().out


def test_a_disk_that_fills_between_snapshots_does_not_stop_the_training(streets, tmp_path):
    """RLIMIT_FSIZE lets no file grow beyond 1500 bytes, as a full disk would, until the snapshot is written."""
    (tmp_path / "limited.py").write_text(
        f"import resource, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train\n"
        "from utils.common import command\nfrom utils.runs import snapshots\n"
        "from utils.training.engine import Engine\n"
        "def limit(size):\n    resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))\n"
        "def save(*args, before=snapshots.save_step, **named):\n    limit(-1)\n    before(*args, **named)\n"
        "def step(self, *args, before=Engine.step, **named):\n    limit(1500)\n"
        "    return before(self, *args, **named)\n"
        "snapshots.save_step, Engine.step = save, step\ncommand.run(train.main)\n")
    status, out, error = finish(fork(tmp_path / "limited.py", *words(
        streets, tmp_path / "s", "--save-pred-every", "12", "--panel-every", "5", steps=12)), 100)
    assert status == 0, error
    assert [step for step, _ in snapshots.list_snapshots(tmp_path / "s")] == [12]
    for name in ("metrics.jsonl", "events.out.tfevents"):
        output = [line for line in error.splitlines() if name in line]
        assert len(output) == 1 and "expected to write there" in output[0] and "training goes on" in output[0]
    steps = [json.loads(line)["step"] for line in open(tmp_path / "s/metrics.jsonl")]     # whole lines only
    assert 2 < len(steps) < 12 and steps == sorted(set(steps)) and "Traceback" not in error
    assert "step 12/12" in out


def test_the_tensorboard_file_holds_whole_records(tmp_path):
    """The same as tensorboardX's own writer, but for times."""
    with RunLog(tmp_path, 2) as log:
        log.metric(2, {"loss": 0.5, "lr": 0.1, "images_per_second": 1.0, "seconds_data": 0.0}, 1.0)
        log.picture("panel", np.full((4, 6, 3), 7, np.uint8), 2)
    with SummaryWriter(str(tmp_path / "theirs")) as theirs:
        for name, value in (("loss", 0.5), ("lr", 0.1), ("images_per_second", 1.0), ("seconds_data", 0.0)):
            theirs.add_scalar(name, value, 2)
        theirs.add_image("panel", np.full((4, 6, 3), 7, np.uint8), 2, dataformats="HWC")

    def events(folder):
        (path,), actual = folder.iterdir(), []
        data = path.read_bytes()
        while data:
            length, = struct.unpack("<Q", data[:8])
            assert struct.unpack("<I", data[8:12]) == (masked_crc32c(data[:8]),)
            assert struct.unpack("<I", data[12 + length:16 + length]) == (masked_crc32c(data[12:12 + length]),)
            event, data = Event.FromString(data[12:12 + length]), data[16 + length:]
            event.wall_time = 0
            actual.append(event)
        return actual

    assert events(tmp_path / "tensorboard") == events(tmp_path / "theirs") and len(events(tmp_path / "theirs")) == 6


# Of a worker that is gone; under load PyTorch finds it before its signal does.
DEAD_WORKER = "error: a process that reads samples died.*(Killed|exited unexpectedly)"


def test_a_dead_worker_ends_the_run_with_a_sentence(streets, tmp_path):
    process = fork("train.py", *words(streets, tmp_path / "s", "--num-workers", "1", steps=100000))
    read_until(process, "step 2/")
    worker, = children(process.pid)
    os.kill(worker, signal.SIGKILL)
    status, _, error = finish(process, 30)
    assert status == 2 and re.search(DEAD_WORKER, error)
    assert "Traceback" not in error


def test_a_dead_worker_ends_an_evaluation_with_a_sentence(streets, snapshot, tmp_path):  # noqa: F811
    process = fork("evaluate.py", "--data-dir", streets, "--restore-from", snapshot, "--gpu", "cpu", "--num-workers",
                   "1", "--amp", "off", "--batch-size", "1", "--output-dir", tmp_path / "r")
    read_until(process, "first image: ")        # the worker waits until another is wanted
    worker, = children(process.pid)
    os.kill(worker, signal.SIGKILL)
    status, _, error = finish(process, 60)
    assert status == 2 and re.search(DEAD_WORKER, error)
    assert "Traceback" not in error and not (tmp_path / "r/result.json").exists()


def test_a_dead_process_ends_the_others(streets, tmp_path):
    process = start("train.py", *words(streets, tmp_path / "s", steps=100000), processes=2)
    read_until(process, "step 2/")
    victim = children(process.pid, "train.py")[1]
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    status, _, error = finish(process, 60)
    assert status != 0 and time.monotonic() - began < 30
    assert "another process of this run has ended" in error and "SIGKILL" in error


def test_a_lost_process_is_said_although_sigterm_comes_meanwhile(streets, tmp_path):
    """torchrun sends SIGTERM when it sees a death; here it finds the survivor between its handlers."""
    (tmp_path / "slow.py").write_text(
        f"import sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport train\nfrom utils.common import command\n"
        "def leave(self, *error, before=command.StopRequest.__exit__):\n"
        "    before(self, *error)\n    time.sleep(0.7 if error[0] else 0)\n"
        "command.StopRequest.__exit__ = leave\ncommand.run(train.main)\n")
    process = start(tmp_path / "slow.py", *words(streets, tmp_path / "s", steps=100000), processes=2)
    read_until(process, "step 2/")
    os.kill(children(process.pid, "slow.py")[1], signal.SIGKILL)
    status, _, error = finish(process, 60)
    assert status != 0 and "another process of this run has ended" in error


def test_the_account_of_an_error(monkeypatch):
    """Several processes: only a lost connection gets the short sentence; everything else says itself."""
    def account(error):
        try:
            raise error
        except BaseException as caught:
            return _exit_status_and_message(caught)

    monkeypatch.setattr(command_module, "_among_processes", lambda: True)
    for text in ("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:3",
                 "NCCL error: remote process exited or there was a network error, NCCL version 2.27\nncclRemoteError"):
        status, output = account(RuntimeError(text))
        assert status == 1 and output.startswith("another process of this run has ended") and "Traceback" not in output
    for error in (RuntimeError("NCCL error: invalid usage\nDuplicate GPU detected : rank 0 and rank 1 both on CUDA"),
                  RuntimeError("[/gloo/transport/tcp/device.cc:80] Unable to find interface for: eth7"),
                  BrokenPipeError(32, "Broken pipe"), ValueError("connection reset by peer"),
                  RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback: a bug")):
        status, output = account(error)
        assert status == 1 and "Traceback" in output and str(error).splitlines()[-1] in output
    status, output = account(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "))
    assert status == 2 and output.startswith("error: a process that reads samples died")


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
    process = start_with_launcher(*arguments)
    status, _, error = finish(process, 120)
    assert status == 2, error
    first = next(line for line in error.splitlines() if "process" in line)
    assert "error: " in first and "broken.png: expected an image, found one that cannot be read" in first, error
    assert "Traceback" not in error


def start_with_launcher(*arguments):
    """train.py in two processes that `--parallel ddp`'s own launcher starts, without torchrun's report."""
    return start("-c", "import sys; from utils.common import command; "
                 "from utils.parallel.launch import start_processes; "
                 f"sys.argv[0] = 'train.py'; command.run(lambda: start_processes(2, {list(arguments)!r}))")


@pytest.mark.parametrize("launcher, number", [("torchrun", signal.SIGTERM), ("own", signal.SIGINT)])
def test_a_signal_stops_all_processes_at_the_same_step(streets, tmp_path, launcher, number):
    arguments = words(streets, tmp_path / "s", "--save-pred-every", "100000", steps=100000)
    process = start("train.py", *arguments, processes=2) if launcher == "torchrun" else start_with_launcher(*arguments)
    read_until(process, "step 3/")
    process.send_signal(number)
    status, out, error = finish(process, 60)
    (step, path), = snapshots.list_snapshots(tmp_path / "s")
    assert f"stopped after step {step}" in out, error
    assert files.load(path)["step"] == step
    assert status == (1 if launcher == "torchrun" else 128 + number)     # torchrun has no other for it


def test_the_launcher_waits_for_what_is_saved_although_it_is_told_again(tmp_path):
    """Supervisors send SIGTERM twice or more, here while the processes take two seconds to save."""
    (tmp_path / "slow.py").write_text(
        f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from utils.common import command\nfrom utils.parallel import launch\n"
        "def main():\n"
        "    if not launch.started_by_torchrun():\n        launch.start_processes(2)\n"
        "    with command.StopRequest() as stop:\n        print('ready', flush=True)\n"
        "        while not stop.requested:\n            time.sleep(0.01)\n        time.sleep(2)\n"
        "        open(sys.argv[1] + os.environ['RANK'], 'w').close()\n"
        "    raise command.Interrupted(stop.number)\ncommand.run(main)\n")
    process = start(tmp_path / "slow.py", tmp_path / "saved")
    for _ in range(2):
        read_until(process, "ready")
    for _ in range(4):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert process.wait(40) == 128 + signal.SIGTERM
    assert sorted(path.name for path in tmp_path.glob("saved*")) == ["saved0", "saved1"]
    finish(process)


def test_one_signalled_process_stops_all_with_its_status(streets, tmp_path):
    process = start_with_launcher(*words(streets, tmp_path / "s", "--save-pred-every", "100000", steps=100000))
    read_until(process, "step 3/")
    os.kill(children(process.pid, "train.py")[1], signal.SIGTERM)
    status, out, error = finish(process, 60)
    (step, path), = snapshots.list_snapshots(tmp_path / "s")
    assert status == 128 + signal.SIGTERM and f"stopped after step {step}" in out, error


def test_a_second_signal_at_once_does_not_count_and_a_later_one_ends():
    before = signal.getsignal(signal.SIGHUP)
    with StopRequest(debounce=0.2) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and stop.number == signal.SIGHUP
        time.sleep(0.25)
        with pytest.raises(Interrupted) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    assert caught.value.number == signal.SIGTERM and signal.getsignal(signal.SIGHUP) == before


def test_nohup_stays_deaf_to_hanging_up():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("redirection", ["| head -n 1 >/dev/null", ">/dev/full 2>/dev/full", "<&- >&- 2>&-"])
def test_output_that_nobody_takes_is_silence(streets, tmp_path, redirection):
    """Under a terminal of ASCII letters, too: images × seconds and arrows are printed without an error."""
    command = shlex.join([sys.executable, "train.py", *words(streets, tmp_path / "s")])
    done = subprocess.run(["bash", "-c", f"{command} {redirection}; exit ${{PIPESTATUS[0]}}"], cwd=ROOT, timeout=120,
                          capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stderr == "" == done.stdout
    assert [step for step, _ in snapshots.list_snapshots(tmp_path / "s")] == [2, 4]
    assert [json.loads(line)["step"] for line in open(tmp_path / "s/metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_letters_that_the_terminal_lacks(encoding, tmp_path):
    code = ("from utils.common import command, errors\n"
            "def main():\n    print('769×769 → x')\n    raise errors.UserError('größe→')\ncommand.run(main)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": encoding})
    assert done.returncode == 2 and b"769" in done.stdout and b"\\u2192 x" in done.stdout
    assert done.stderr.startswith(b"error: gr") and b"Traceback" not in done.stderr


def test_a_closed_terminal_saves_and_ends(streets, tmp_path):
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    process = start("train.py", *words(streets, tmp_path / "s", "--num-workers", "1", "--save-pred-every", "100000",
                                       steps=100000),
                    stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
                    preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(slave)
    shown = b""
    while b"2/100000" not in shown:
        shown += os.read(master, 1 << 16)
    os.close(master)
    assert process.wait(60) == 128 + signal.SIGHUP
    (step, path), = snapshots.list_snapshots(tmp_path / "s")
    assert files.load(path)["step"] == step


def test_too_little_memory_is_a_sentence_with_remedies():
    error = memory.out_of_memory_error(
        "CUDA out of memory. Tried to allocate 2 GiB", crops=4, input_size=(769, 769), accumulate=2, recompute="light",
        recompute_choices=BACKBONES["eca_resnet101"].recompute_choices(), amp="off")
    assert str(error) == ("out of memory: expected room for 4 crops of 769×769 on a device, found: CUDA out of memory. "
                          "Tried to allocate 2 GiB; these need less memory: --amp bf16, --recompute full, "
                          "--accumulate 4, a smaller --input-size")
    assert memory.is_out_of_memory(MemoryError())
    assert memory.is_out_of_memory(RuntimeError("[enforce fail] can't allocate memory"))
    assert not memory.is_out_of_memory(RuntimeError("a bug"))


@pytest.mark.parametrize("more, message", [
    (("--compile", "--recompute", "full"), "--compile: expected --recompute none with it, found full"),
    (("--compile", "--recompute", "light"), "--compile: expected --recompute none with it, found light"),
    (("--optimizer", "adamw", "--momentum", "1"), "--momentum 1: expected less than 1 with --optimizer adamw"),
    (("--ema", "1"), "--ema 1: expected less than 1"),
    (("--warmup-steps", "9", "--num-steps", "9"), "--warmup-steps 9: expected fewer than the 9 steps"),
    (("--backbone", "resnet18", "--eca-kernels", "3,3,3,3"), "--eca-kernels: expected a --backbone with channel"),
    (("--freeze", "2"), "--freeze 2: expected stages from stem,1,2,3,4 that begin with stem"),
    (("--loss-weights", "fine=1"), "--loss-weights: expected a factor for each of fine, coarse, aux")])
def test_flags_that_do_not_fit_each_other_are_refused(streets, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        train.main(words(streets, tmp_path / "s", *more))
    assert not (tmp_path / "s").exists()


def test_too_little_memory_names_the_flags_that_help(streets, tmp_path):
    code = ("import resource, train, utils.training.engine as e\n"
            "def step(*args, before=e.step_loss, **named):\n"
            "    size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
            "    resource.setrlimit(resource.RLIMIT_AS, (size + 100_000_000, -1))\n"
            "    try:\n        return before(*args, **named)\n"
            "    finally:\n        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n"
            "e.step_loss = step\n"
            "from utils.common import command\n"
            f"command.run(lambda: train.main({words(streets, tmp_path / 's', '--input-size', '513,513')!r}))\n")
    status, _, error = finish(fork("-c", code))
    assert status == 2, error
    assert "out of memory: expected room for 4 crops of 513×513 on a device, found: " in error
    assert "--recompute light" not in error        # there is none for 18 layers
    for flag in ("--amp bf16", "--recompute full", "--accumulate 2", "--input-size"):
        assert flag in error
    assert "Traceback" not in error
