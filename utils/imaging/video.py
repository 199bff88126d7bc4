"""Reading videos, from a file or from numbered images, and writing them."""

import contextlib
import itertools
import math
import os
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import torch

from ..common import files
from ..common.compat import opencv_silent
from ..common.errors import UserError, first_line
from ..common.files import open_file
from ..common.messages import logger
from ..common.progress import log_once
from .decode import read_image

SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv"}
COUNTED = {".avi", ".m4v", ".mov", ".mp4"}      # files that store their frame count; for others OpenCV guesses it
NUMBER = re.compile(r"%0?\d*d")                 # in "frames/%05d.png", as FFmpeg and OpenCV write it
DEFAULT_RATE = 25.0     # frames/s of numbered images, as in FFmpeg
MAX_RATE = 1000.0       # frames/s; more is an error in the file's header, and cannot be written
CODECS = ("vp09", "mp4v")       # without PyAV: VP9, which browsers play; MPEG-4, which every OpenCV can write
# Options of H.264. Players would guess the color matrix by the size of the video; FFmpeg converts RGB by this one.
H264 = {"crf": "18", "preset": "veryfast",
        "x264-params": "colorprim=smpte170m:transfer=smpte170m:colormatrix=smpte170m"}
# A frame is written only with this much free space on the disk, plus an amount per pixel of a frame: encoders hold back
# some frames until a file is closed, and there may be three videos.
MIN_FREE_BYTES, MIN_FREE_BYTES_PER_PIXEL = 16 * 10 ** 6, 10
MAX_FAILED_READS = 250          # consecutive frames that cannot be read before reading stops


def is_video(path):
    """Whether a path is read as a video: by its suffix, or as a pattern of numbered images."""
    return Path(path).suffix.lower() in SUFFIXES or is_numbered(path)


def is_numbered(path):
    """Whether a path is a pattern of numbered images, such as "frames/%05d.png"."""
    return len(NUMBER.findall(os.path.basename(path))) == 1 and not os.path.lexists(path)


def numbered_images(path):
    """The files that match a pattern such as "frames/%05d.png", sorted by number; numbers may have gaps."""
    before, after = map(re.escape, NUMBER.split(Path(path).name))
    paths = {}
    with contextlib.suppress(OSError):
        for name in os.listdir(Path(path).parent):
            if match := re.fullmatch(f"{before}([0-9]+){after}", name):
                paths[int(match[1]), name] = Path(path).with_name(name)
    return [paths[key] for key in sorted(paths)]


@dataclass(frozen=True)
class Video:
    """The frames of a video, turned upright as the file specifies.

    Iterating yields items as `ImageFiles` does: {"image": uint8 (3, H, W) RGB, "name": frame number from 1, in at least
    six digits}, or {"error": message, "frames": number of frames affected}.

    Attributes:
        path: of the file, or pattern of numbered images.
        rate: frames/s.
        count: number of frames according to the file; 0 if unknown.
    """

    path: Path
    rate: float
    count: int

    def __len__(self):
        return self.count

    def __iter__(self):
        size = None
        for number, frame in self._numbered() if is_numbered(self.path) else self._decoded():
            if isinstance(frame, dict):     # an error
                yield frame
            elif frame.shape != (size := size or frame.shape):
                yield {"error": f"{self.path}, frame {number}: expected {size[1]}×{size[0]} pixels as before, found "
                                f"{frame.shape[1]}×{frame.shape[0]}", "frames": 1}
            else:
                yield {"image": torch.from_numpy(frame).permute(2, 0, 1), "name": f"{number:06}"}

    def last_frame(self):
        """The number of the last readable frame. Reads all frames, since headers cannot be trusted."""
        return max((int(item["name"]) for item in self if "name" in item), default=0)

    def _numbered(self):
        """Yield (number, frame or error) of numbered images."""
        for number, path in enumerate(numbered_images(self.path), 1):
            try:
                yield number, read_image(path)
            except UserError as error:
                yield number, {"error": str(error), "frames": 1}

    def _decoded(self):
        """Yield (number, frame or error) of a file. `read` fails once per frame that OpenCV cannot decode."""
        capture = _capture(self.path)
        number = failed = 0
        times = {}      # frame number → seconds
        while failed < MAX_FAILED_READS and (not failed or number + failed < self.count):
            success, frame = capture.read()
            if not success:
                failed += 1
                continue
            if failed:
                yield self._missing(number + 1, failed)
            number, failed = number + failed + 1, 0
            times[number] = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            yield number, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        capture.release()
        self._compare_times(times)
        if number < self.count and self.path.suffix.lower() in COUNTED:
            yield self._missing(number + 1, self.count - number)

    def _compare_times(self, times):
        """Warn if frames, {number: seconds}, deviate from the constant rate at which results are written."""
        if len(times) < 2 or not all(earlier < later for earlier, later in itertools.pairwise(times.values())):
            return      # a single frame, or a file without valid times
        start = min(times.values())
        errors = {number: (number - 1) / self.rate - (time - start) for number, time in times.items()}
        worst = max(errors, key=lambda number: abs(errors[number]))
        if abs(errors[worst]) > 1.5 / self.rate:
            log_once(f"{self.path}: its frames come at varying intervals, but results have {self.rate:g} frames/s: "
                     f"frame {worst} at {(worst - 1) / self.rate:.2f} s instead of {times[worst] - start:.2f} s")

    def _missing(self, first, frames):
        names = f"frame {first}" if frames == 1 else f"frames {first} to {first + frames - 1}"
        return first, {"error": f"{self.path}, {names} of {self.count}: expected data that can be decoded, found none",
                       "frames": frames}


def open_video(path):
    """Open a file or a pattern of numbered images as `Video`. Raises `UserError` if no frame can be read."""
    path = Path(path)
    if is_numbered(path):
        video = Video(path, DEFAULT_RATE, len(numbered_images(path)))
    else:
        capture = _capture(path)
        rate, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        if not 0 < rate <= MAX_RATE:
            logger.info(f"{path}: its frame rate is unknown; {DEFAULT_RATE:g} frames/s are assumed")
            rate = DEFAULT_RATE
        video = Video(path, rate, int(count) if 0 < count < 2 ** 31 else 0)
    if not any("image" in item for item in video):
        raise UserError(f"{path}: expected a video with frames that can be read, found none")
    return video


def _capture(path):
    open_file(path, "a video").close()
    with opencv_silent():
        capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        raise UserError(f"{path}: expected a video that OpenCV can read, found one of another kind, or damaged")
    return capture


class H264Writer:
    """Writes H.264, which browsers and video editors play, by PyAV; arguments and methods as of `cv2.VideoWriter`.

    Raises:
        ImportError: without PyAV; ValueError: if it cannot write H.264; OSError: if the file cannot be written.
    """

    def __init__(self, path, rate, size):
        import av

        self.make_frame, self.error = av.VideoFrame.from_ndarray, av.error.FFmpegError
        av.Codec("libx264", "w")        # raises ValueError before the file is created
        with self._errors(), contextlib.ExitStack() as stack:
            self.file = stack.enter_context(av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}))
            self.stream = self.file.add_stream("libx264", rate=Fraction(rate).limit_denominator(65535), options=H264)
            self.stream.width, self.stream.height = size
            self.stream.pix_fmt = "yuv420p"     # what all players decode
            self.stream.codec_context.open()
            stack.pop_all()

    @contextlib.contextmanager
    def _errors(self):
        """Context in which errors of FFmpeg that are not of the system's are ValueError."""
        try:
            yield
        except self.error as error:
            if isinstance(error, OSError):
                raise
            raise ValueError(str(error)) from None

    def write(self, picture):
        with self._errors():
            self.file.mux(self.stream.encode(self.make_frame(picture, format="bgr24")))

    def release(self):
        with self._errors(), self.file:     # closes it
            self.file.mux(self.stream.encode())


class VideoWriter:
    """Writes a video file frame by frame under a temporary name; `close` renames it.

    The first frame creates the file and sets the size of all frames; without frames no file is written. Codecs need
    even sizes, so the last row or column of an odd size is repeated.

    Args:
        path: of the file, .mp4.
        rate: frames/s; rounded to so many decimals that its digits form an integer of at most 65535, MPEG-4's limit.
    """

    def __init__(self, path, rate):
        self.path, self.rate = Path(path), round(rate, int(math.log10(65535 / rate)))
        self.file, self.frames, self.open = None, 0, contextlib.ExitStack()     # holds `files.replacing`

    def write(self, picture):
        """Append a picture, (H, W, 3) RGB or (H, W) gray, uint8. Raises `UserError` if it cannot be written."""
        if picture.ndim == 2:
            picture = picture[..., None].repeat(3, 2)
        height, width, _ = picture.shape
        picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
        # OpenCV does not report a full disk, and without the index at the end of the file all frames would be lost.
        files.check_room(self.path, self.path.parent, MIN_FREE_BYTES + MIN_FREE_BYTES_PER_PIXEL * height * width,
                         "the frames that follow")
        if self.file is None:
            self._open(picture.shape[1::-1])
        try:
            self.file.write(np.ascontiguousarray(picture[..., ::-1]))
        except (OSError, ValueError) as error:      # of PyAV
            raise UserError(f"{self.path}: expected to write frame {self.frames + 1}, found: {first_line(error)}"
                            ) from None
        self.frames += 1

    def _open(self, size):
        with contextlib.ExitStack() as stack:
            self.temporary = stack.enter_context(files.replacing(self.path, self.path.suffix))
            self.temporary.unlink(missing_ok=True)      # never write through a link
            try:
                self.file = H264Writer(self.temporary, self.rate, size)
            except (ImportError, ValueError):
                self.file = self._open_by_opencv(size)
            self.open = stack.pop_all()

    def _open_by_opencv(self, size):
        """Return the `cv2.VideoWriter` of the first of `CODECS` that OpenCV can write."""
        for codec in CODECS:
            with opencv_silent():
                file = cv2.VideoWriter(str(self.temporary), cv2.VideoWriter_fourcc(*codec), self.rate, size)
            if file.isOpened():
                break
        else:
            raise UserError(f"{self.path}: expected OpenCV to write {' or '.join(CODECS)} video of "
                            f"{size[0]}×{size[1]} pixels at {self.rate:g} frames/s there, found that it cannot")
        limits = ("VP9, which not all video editors play" if codec == "vp09" else "MPEG-4, which browsers do not play; "
                  "ffmpeg -i VIDEO.mp4 -c:v libx264 OTHER.mp4 converts one")
        log_once(f"videos are {limits}; with PyAV (pip install av) they are H.264, which all play")
        return file

    def close(self):
        """Finish the file. Raises `UserError` if frames are missing from it, which OpenCV does not report."""
        with self.open:
            if self.frames:
                with contextlib.suppress(OSError, ValueError):      # of PyAV; the number of frames shows it too
                    self.file.release()
                with opencv_silent():
                    written = int(cv2.VideoCapture(str(self.temporary)).get(cv2.CAP_PROP_FRAME_COUNT))
                if written != self.frames:
                    raise UserError(f"{self.path}: expected room on the disk for {self.frames} frames, found "
                                    f"{max(0, written)} of them written")
