"""What is looked at while a network learns: a quick score, a picture, and curves."""

import contextlib
import itertools

import torch

from ..common.errors import UserError
from ..common.messages import logger
from ..common.progress import progress
from ..imaging import draw
from ..inference.sliding import SlidingPredictor
from ..metrics import charts
from ..metrics.evaluation import score, sum_of_matrices
from ..ops.upsampling import upsample
from ..parallel.processes import gather_from_ranks, share_items
from ..parallel.workers import Loader
from ..runs.log import METRICS, QUICK, read_lines


class QuickValidation:
    """Scores the network that an engine trains: whole images, scale 1, no mirror.

    Args:
        engine: all its processes share the images.
        dataset: with labels; a `CityscapesDataset`.
        normalization: of the network's input.
        ignore_index: label that does not count.
        workers: processes that read images.
        log: `RunLog` or `NoLog`.
        highest: the best result so far, a fraction, or None; that of the first process counts.
    """

    def __init__(self, *, engine, dataset, normalization, ignore_index, workers, log, highest=None):
        self.engine, self.classes, self.log, self.ignore_index = engine, dataset.classes, log, ignore_index
        self.loader = Loader(share_items(dataset, engine.processes), workers=workers)
        # Not the network itself: compiled code would be compiled anew for every size of image.
        self.predictor = SlidingPredictor(engine.scored_network.forward, None, normalization=normalization,
                                          device=engine.devices[0], autocast=engine.precision.autocast)
        self.highest = -1.0 if highest is None else highest
        if engine.processes is not None:
            self.highest = engine.processes.broadcast(self.highest)     # all must save at the same steps

    def __call__(self, step, asked):
        """Score and log; returns the mean IoU of the fine head if it has never been better in this folder, else
        None. asked: () → whether the training is to stop, which does not wait for all images."""
        self.engine.scored_network.eval()
        items = itertools.takewhile(lambda _: not asked(), progress(self.loader, "quick validation", "image"))
        with without_cudnn_benchmark():
            total = sum_of_matrices(image.matrices for image in score(
                self.predictor, items, self.classes.num_classes, self.ignore_index))
        self.engine.train_mode()
        if any(gather_from_ranks(self.engine.processes, asked())):
            self.log.info(f"the quick validation of step {step} is left out")
            return None
        if self.engine.processes is not None:
            total = sum_of_matrices(self.engine.processes.gather_objects(total))
        matrices = total["single_scale"]
        scores = {head: matrix.scores(self.classes.names, self.classes.categories) for head, matrix in matrices.items()}
        self.log.quick_validation(step, scores)
        if (scores["fine"]["mean_iou"] or 0.0) <= self.highest:
            return None
        self.highest = scores["fine"]["mean_iou"] or 0.0
        return self.highest


@contextlib.contextmanager
def without_cudnn_benchmark():
    """Inside, cuDNN does not try all its ways for every size of image that it has not seen: images have many, and the
    trials take more time and memory than the passes."""
    tries, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = tries


@torch.no_grad()
def draw_panel(engine, normalization, sample, classes, ignore_index):
    """Image, truth, the result of each head and where they differ, side by side: (H, W · pictures, 3) uint8.

    sample: an item of the training data; classes: its `ClassTable`.
    """
    network = engine.scored_network.eval()
    # Not the network itself: what is compiled for training would be compiled anew.
    outputs = network.forward(normalization(sample["image"][None].to(engine.devices[0])))
    engine.train_mode()
    truth = sample["label"].numpy()
    maps = [upsample(outputs[name], truth.shape).argmax(1)[0].cpu().numpy() for name in ("coarse", "fine")
            if name in outputs]
    pictures = [sample["image"].permute(1, 2, 0).numpy(), classes.color(truth), *(classes.color(m) for m in maps)]
    if len(maps) == 2:
        pictures.append(draw.difference(truth, *maps, ignore_index))
    return draw.panel(pictures)


def draw_curves(folder):
    """curves.png of the run in a folder, or a word why it is missing: on a full disk, the snapshots are what counts."""
    metrics, quick = (read_lines(folder / name) for name in (METRICS, QUICK))
    try:
        if metrics:
            charts.training_curves(folder / "curves.png", metrics, quick)
    except (OSError, UserError) as error:
        logger.info(f"curves.png is missing: {error}")
