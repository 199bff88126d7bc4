"""Videos: written by OpenCV, predicted by evaluate.py, and read again."""

import os
import re
import resource
import shutil
import signal
import struct
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

import evaluate
from dataset.labels import ClassTable
from tests.test_evaluate import snapshot  # noqa: F401, a fixture
from utils.common import command, progress
from utils.common.errors import UserError
from utils.imaging import video
from utils.inference.sliding import SlidingPredictor

pytestmark = pytest.mark.usefixtures("short_networks")
QUICK = ["--gpu", "cpu", "--num-workers", "0", "--scales", "1.0", "--no-flip", "--amp", "off"]
FRAMES = 8
SIZE = (48, 64)


def drawn_frames(number=FRAMES, size=SIZE):
    """A colored pattern that moves, RGB."""
    pattern = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    wide = cv2.resize(pattern, (size[1] + 3 * number, size[0]), interpolation=cv2.INTER_CUBIC)
    return [np.ascontiguousarray(wide[:, 3 * i:3 * i + size[1]]) for i in range(number)]


def write(path, frames, rate=12.5, codec="mp4v"):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), rate, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(frame[..., ::-1])
    writer.release()
    return path


def set_intervals(path, intervals):
    """Give the frames of an .mp4 that OpenCV wrote other intervals, in the units of its time scale: the table of times
    (stts) grows, and with it the boxes around it, which stand behind the frames."""
    data = bytearray(path.read_bytes())
    until = data.index(b"elst") + 12        # what is to be shown of it: more
    data[until:until + 4] = struct.pack(">I", 10 ** 6)
    place = data.index(b"stts") - 4
    size = int.from_bytes(data[place:place + 4], "big")
    table = b"stts" + bytes(4) + struct.pack(">I", len(intervals)) + b"".join(
        struct.pack(">II", 1, interval) for interval in intervals)
    table = struct.pack(">I", len(table) + 4) + table
    head = bytearray(data[:place])
    for box in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
        at = head.rindex(box) - 4
        head[at:at + 4] = struct.pack(">I", int.from_bytes(head[at:at + 4], "big") + len(table) - size)
    path.write_bytes(head + table + data[place + size:])


def read(path):
    """(frames (H, W, 3) RGB, frames/s) of a file."""
    capture, frames = cv2.VideoCapture(str(path)), []
    rate = capture.get(cv2.CAP_PROP_FPS)
    while (actual := capture.read())[0]:
        frames.append(actual[1][..., ::-1])
    return frames, rate


def predict(snapshot, folder, *places, save=("color",)):  # noqa: F811
    evaluate.main(["--restore-from", str(snapshot), "--images", *map(str, places), "--output-dir", str(folder), *QUICK,
                   *(["--save", *save] if save else [])])


def test_a_video_gets_the_pictures_of_its_frames(snapshot, tmp_path, capsys):  # noqa: F811
    """Rate, number and, as far as the codec goes, colors: those that the frames get as still pictures."""
    source = write(tmp_path / "drive.avi", drawn_frames(), codec="FFV1")
    (tmp_path / "stills").mkdir()
    for number, frame in enumerate(read(source)[0], 1):
        Image.fromarray(np.ascontiguousarray(frame)).save(tmp_path / f"stills/drive_{number:06}.png")
    kinds = ["color", "overlay", "confidence", "labels"]
    predict(snapshot, tmp_path / "v", source, save=kinds)
    shown = capsys.readouterr().out
    assert "8 frames, 12.5 frames/s" in shown and "8 frames predicted, 0 skipped" in shown
    assert "drive: 8/8 frames, " in shown and " frames/s, 0:00 left" in shown
    predict(snapshot, tmp_path / "s", tmp_path / "stills", save=kinds)
    for kind in ("color", "overlay", "confidence"):
        frames, rate = read(tmp_path / f"v/{kind}/drive.mp4")
        stills = [np.asarray(Image.open(path).convert("RGB")) for path in sorted((tmp_path / "s" / kind).iterdir())]
        assert rate == pytest.approx(12.5) and len(frames) == len(stills) == FRAMES
        assert [path.name for path in (tmp_path / "v" / kind).iterdir()] == ["drive.mp4"]
        for k, frame in enumerate(frames):
            distances = [np.abs(frame.astype(float) - still).mean() for still in stills]
            assert frame.shape == (*SIZE, 3) and distances[k] < 8, (kind, k, distances)
        # The colors of the classes, not some others: of pixels whose neighbors are of the same class.
        if kind == "color":
            palette = ClassTable.read().palette.astype(float)
            nearest = palette[((frames[-1][:, :, None] - palette) ** 2).sum(3).argmin(2)]
            assert (nearest == stills[-1]).all(2).mean() > 0.9
    names = sorted(path.name for path in (tmp_path / "s/labelIds").iterdir())
    assert sorted(path.name for path in (tmp_path / "v/labelIds").iterdir()) == names and len(names) == FRAMES
    for name in names:
        assert (tmp_path / "v/labelIds" / name).read_bytes() == (tmp_path / "s/labelIds" / name).read_bytes()


def test_a_varying_rate_is_said(tmp_path, capsys):
    """Frames at 0, 0.08, ... 0.4 s, then one at 2.4 and one at 3.4 s: OpenCV's rate is their mean."""
    constant = write(tmp_path / "constant.mp4", drawn_frames())
    varying = write(tmp_path / "varying.mp4", drawn_frames())
    data = varying.read_bytes()
    place = data.index(b"stts")
    unit = struct.unpack(">I", data[place + 16:place + 20])[0] * 12.5       # of the time scale, per second
    set_intervals(varying, [round(0.08 * unit)] * 5 + [round(2 * unit), round(unit), round(0.08 * unit)])
    capsys.readouterr()
    for path in (constant, varying):
        for _ in range(2):
            assert len([item for item in video.open_video(path) if "image" in item]) == FRAMES
    line, = capsys.readouterr().out.splitlines()
    rate = cv2.VideoCapture(str(varying)).get(cv2.CAP_PROP_FPS)
    assert line.startswith(f"{varying}: its frames come at varying intervals, but results have {rate:g} frames/s: ")
    number, ours, theirs = map(float, re.search(r"frame (\d+) at (\S+) s instead of (\S+) s$", line).groups())
    assert theirs == pytest.approx([0, 0.08, 0.16, 0.24, 0.32, 0.4, 2.4, 3.4][int(number) - 1], abs=0.02)
    assert ours == pytest.approx((number - 1) / rate, abs=0.01) and abs(ours - theirs) > 0.5


def test_numbered_images_are_a_video_and_broken_ones_are_named(snapshot, tmp_path, capsys):  # noqa: F811
    """Of odd size, with gaps in the numbers, one that cannot be read and one of another size."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, frame in enumerate(drawn_frames(size=(41, 63))):
        Image.fromarray(frame).save(folder / f"{10 * number:03}.png")
    (folder / "010.png").write_bytes((folder / "020.png").read_bytes()[:200])
    Image.fromarray(drawn_frames()[0]).save(folder / "030.png")
    (folder / "notes.png").write_text("no number")
    with pytest.raises(UserError, match="that are skipped") as caught:
        predict(snapshot, tmp_path / "r", folder / "%03d.png", save=None)
    shown = capsys.readouterr()
    assert caught.value.status == 1 and "6 frames predicted, 2 skipped" in shown.out
    skipped = [line for line in shown.err.splitlines() if line.startswith("skipped: ")]
    assert len(skipped) == 2 and "010.png: expected an image" in skipped[0]
    assert "%03d.png, frame 4: expected 63×41 pixels as before, found 64×48" in skipped[1]
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["color", "overlay", "written.json"]
    frames, rate = read(tmp_path / "r/color/frames.mp4")
    assert rate == 25 and len(frames) == 6 and frames[0].shape == (42, 64, 3)
    assert np.abs(frames[0][40].astype(int) - frames[0][41]).mean() < 4      # the last row twice


def test_a_broken_frame_is_named_and_skipped(snapshot, tmp_path, capsys):  # noqa: F811
    source = write(tmp_path / "a.avi", drawn_frames(), codec="MJPG")
    data = source.read_bytes()
    place = [k for k in range(data.index(b"movi"), len(data)) if data.startswith(b"00dc", k)][4]
    end = place + 8 + int.from_bytes(data[place + 4:place + 8], "little")
    source.write_bytes(data[:place + 8] + bytes(end - place - 8) + data[end:])
    with pytest.raises(UserError, match="that are skipped") as caught:
        predict(snapshot, tmp_path / "r", source)
    shown = capsys.readouterr()
    assert caught.value.status == 1 and "7 frames predicted, 1 skipped" in shown.out
    assert f"skipped: {source}, frame 5 of 8: expected data that can be decoded, found none\n" in shown.err
    assert len(read(tmp_path / "r/color/a.mp4")[0]) == 7


def test_what_a_file_that_was_cut_short_still_has_is_predicted(snapshot, tmp_path, capsys):  # noqa: F811
    source = write(tmp_path / "a.avi", drawn_frames(), codec="MJPG")
    source.write_bytes(source.read_bytes()[:source.stat().st_size * 6 // 10])
    with pytest.raises(UserError, match="that are skipped"):
        predict(snapshot, tmp_path / "r", source)
    there = len(read(source)[0])
    shown = capsys.readouterr()
    assert 1 < there < FRAMES and f"{there} frames predicted, {FRAMES - there} skipped" in shown.out
    assert f"frames {there + 1} to {FRAMES} of {FRAMES}: expected data" in shown.err
    assert len(read(tmp_path / "r/color/a.mp4")[0]) == there


def cut(path):
    write(path, drawn_frames())
    path.write_bytes(path.read_bytes()[:-600])      # without the table of frames, which comes last


@pytest.mark.parametrize("make, actual", [
    (cut, "expected a video that OpenCV can read, found one of another kind, or damaged"),
    (lambda path: path.write_text("text"), "expected a video that OpenCV can read"),
    (lambda path: path.write_bytes(b""), "expected a video that OpenCV can read"),
    (os.mkfifo, "expected a regular file")],
    ids=["cut", "text", "empty", "pipe"])
def test_no_video(snapshot, tmp_path, capfd, make, actual):  # noqa: F811
    """One sentence, without OpenCV's and FFmpeg's own, and before anything is written."""
    make(tmp_path / "a.mp4")
    with pytest.raises(UserError, match=f"a.mp4: {actual}"):
        predict(snapshot, tmp_path / "r", tmp_path / "a.mp4")
    assert capfd.readouterr().err == "" and not (tmp_path / "r").exists()


def test_images_and_videos_are_two_tasks(snapshot, tmp_path):  # noqa: F811
    Image.fromarray(drawn_frames()[0]).save(tmp_path / "a.png")
    write(tmp_path / "b.mp4", drawn_frames())
    with pytest.raises(UserError, match="--images: expected images or videos, found both, such as .*a.png and .*b.mp4"):
        predict(snapshot, tmp_path / "r", f"{tmp_path}/*.*")
    with pytest.raises(UserError, match=r"--images .*%02d.png: expected numbered images with such names, found none"):
        predict(snapshot, tmp_path / "r", tmp_path / "%02d.png")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_a_playable_file(snapshot, tmp_path, monkeypatch, capsys, number):  # noqa: F811
    """Under its own name, with the frames that were predicted; the exit status is the signal's."""
    called, predicted = [], SlidingPredictor.__call__

    def call(self, image):
        called.append(len(called))
        if len(called) == 3:
            os.kill(os.getpid(), number)
        return predicted(self, image)
    monkeypatch.setattr(SlidingPredictor, "__call__", call)
    source = write(tmp_path / "a.mp4", drawn_frames())
    with pytest.raises(command.Interrupted) as caught:
        predict(snapshot, tmp_path / "r", source, write(tmp_path / "b.mp4", drawn_frames()), save=["overlay", "labels"])
    assert caught.value.number == number and command._exit_status_and_message(caught.value)[0] == 128 + number
    assert "3 frames predicted, 0 skipped, then stopped" in capsys.readouterr().out
    frames, rate = read(tmp_path / "r/overlay/a.mp4")
    assert len(frames) == 3 and rate == pytest.approx(12.5)
    assert sorted(path.name for path in (tmp_path / "r/overlay").iterdir()) == ["a.mp4"]
    assert len(list((tmp_path / "r/labelIds").iterdir())) == 3


def test_what_was_predicted_before_an_error_is_kept(snapshot, tmp_path, monkeypatch):  # noqa: F811
    """Such as a second signal, which ends the work at once."""
    called, predicted = [], SlidingPredictor.__call__

    def call(self, image):
        called.append(len(called))
        if len(called) == 4:
            raise command.Interrupted(signal.SIGINT)
        return predicted(self, image)
    monkeypatch.setattr(SlidingPredictor, "__call__", call)
    with pytest.raises(command.Interrupted):
        predict(snapshot, tmp_path / "r", write(tmp_path / "a.mp4", drawn_frames()))
    assert 1 <= len(read(tmp_path / "r/color/a.mp4")[0]) <= 3
    assert [path.name for path in (tmp_path / "r/color").iterdir()] == ["a.mp4"]


def test_without_the_codec_it_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr(video, "CODECS", ("yyyy", "zzzz"))
    writer = video.VideoWriter(tmp_path / "a.mp4", 25)
    for frame in drawn_frames(2):       # the writing thread goes on until it is heard
        with pytest.raises(UserError, match="a.mp4: expected OpenCV to write yyyy or zzzz video of 64×48 pixels at 25 "
                           "frames"):
            writer.write(frame)
    writer.close()
    assert list(tmp_path.iterdir()) == []


def codec_of(path):
    return int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little").decode()


def test_videos_are_h264_that_players_can_read_while_they_load(tmp_path, capsys):
    """Decoded by PyAV and by OpenCV: every frame, in order, of an odd size that grows to an even one."""
    av, frames = pytest.importorskip("av"), drawn_frames(60, size=(47, 63))      # more than the encoder holds back
    writer = video.VideoWriter(tmp_path / "a.mp4", 24000 / 1001)
    for frame in frames:
        writer.write(frame)
    writer.close()
    with av.open(str(tmp_path / "a.mp4")) as file:
        stream, = file.streams.video
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.codec_context.colorspace == 6     # SMPTE 170M
        assert float(stream.average_rate) == pytest.approx(24000 / 1001, rel=1e-5)
        actual = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
    assert len(actual) == len(read(tmp_path / "a.mp4")[0]) == 60
    for decoded in (actual, read(tmp_path / "a.mp4")[0]):
        for frame, wanted in zip(decoded, frames, strict=True):
            assert frame.shape == (48, 64, 3) and np.abs(frame[:47, :63].astype(float) - wanted).mean() < 6
        assert np.abs(decoded[30][:47, :63].astype(float) - frames[0]).mean() > 12       # they do differ
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")        # a browser plays before it has all of it
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("missing", ["the package", "the encoder", "its options"])
def test_without_pyav_the_way_to_h264_is_said(tmp_path, monkeypatch, capsys, missing):
    """VP9 is what the wheels of OpenCV can write of what browsers play; builds of others may lack it."""
    if missing == "the package":
        monkeypatch.setitem(sys.modules, "av", None)
    elif missing == "the encoder":
        def unknown(*words):
            raise ValueError(words)
        monkeypatch.setattr(pytest.importorskip("av"), "Codec", unknown)
    else:       # found when the encoder opens
        monkeypatch.setitem(video.H264, "preset", "none of its own")
    for number, (codecs, expected, advices) in enumerate(((video.CODECS, ("vp09", "VP90"), 0),
                                                          (("yyyy", "mp4v"), ("mp4v", "FMP4"), 1))):
        monkeypatch.setattr(video, "CODECS", codecs)
        progress.log_once.cache_clear()
        writer = video.VideoWriter(tmp_path / f"{number}.mp4", 25)
        writer.write(drawn_frames()[0])
        writer.close()
        assert codec_of(tmp_path / f"{number}.mp4") in expected
        output = capsys.readouterr().out
        assert output.count("pip install av") == 1 and output.count("-c:v libx264") == advices


@pytest.mark.parametrize("package", ["av", "cv2"])
def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch, package):
    """OpenCV says nothing of it. RLIMIT_FSIZE lets no file grow beyond 3000 bytes, as a full disk would."""
    if package == "cv2":
        monkeypatch.setitem(sys.modules, "av", None)
    writer, before = video.VideoWriter(tmp_path / "a.mp4", 25), resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).integers(0, 256, (FRAMES, 240, 320, 3), dtype=np.uint8)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
        for frame in noise:
            writer.write(frame)
        with pytest.raises(UserError, match="a.mp4: expected room on the disk for 8 frames, found 0 of them written"):
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_before_the_disk_is_full_what_was_predicted_is_kept(snapshot, tmp_path, monkeypatch):  # noqa: F811
    requested, usage = [], shutil.disk_usage

    def filling(place):
        requested.append(place)
        return usage(place)._replace(free=0 if len(requested) > 3 else 2 * video.MIN_FREE_BYTES)
    monkeypatch.setattr(shutil, "disk_usage", filling)
    with pytest.raises(UserError, match="color/a.mp4: expected 16 MB free for the frames that follow, found 0 MB"):
        predict(snapshot, tmp_path / "r", write(tmp_path / "a.mp4", drawn_frames()))
    assert len(read(tmp_path / "r/color/a.mp4")[0]) == 3


@pytest.mark.parametrize("rate", [0.5, 24000 / 1001, 29.97, 66.6667, 120, 239.7612, 999.97])
def test_rates_are_kept(tmp_path, rate):
    writer = video.VideoWriter(tmp_path / "a.mp4", rate)
    writer.write(drawn_frames()[0])
    writer.close()
    actual = video.open_video(tmp_path / "a.mp4")
    assert actual.rate == pytest.approx(rate, rel=1e-4) and actual.count == 1
