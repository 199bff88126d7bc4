"""Quick validation, pictures of predictions, and curves during training."""

import itertools
from pathlib import Path

import torch

from ..common.errors import UserError
from ..common.messages import logger
from ..common.progress import progress
from ..imaging import draw
from ..inference.sliding import SlidingPredictor
from ..metrics.evaluation import score, sum_of_matrices
from ..ops.upsampling import upsample
from ..parallel.processes import broadcast_from_rank0, gather_from_ranks, share_items
from ..parallel.workers import Loader
from ..reports import charts
from ..runs import snapshots
from ..runs.log import METRICS, QUICK, read_lines


class QuickValidation:
    """Scores the network of an engine on whole images, at scale 1 and without mirroring.

    Args:
        engine: of the run; its processes share the images.
        dataset: with labels; a `CityscapesDataset`.
        normalization: of the network's input.
        ignore_index: label of pixels that do not count.
        workers: processes that read images.
        log: `RunLog` or `NoLog`.
        highest: the best mean IoU so far, a fraction, or None; the value of the first process counts.
        folder: of the run, whose earlier quick validations the first process reads; None for none.

    Attributes:
        scores: [(step, mean IoU of the fine head)] of all quick validations of the run.
    """

    def __init__(self, *, engine, dataset, normalization, ignore_index, workers, log, highest=None, folder=None):
        self.engine, self.classes, self.log, self.ignore_index = engine, dataset.classes, log, ignore_index
        self.folder = folder
        self.loader = Loader(share_items(dataset, engine.processes), workers=workers)
        # `forward` bypasses compiled code, which would be compiled again for each image size.
        self.predictor = SlidingPredictor(engine.scored_network.forward, None, normalization=normalization,
                                          device=engine.devices[0], autocast=engine.precision.autocast)
        # All processes must save and stop at the same steps.
        self.highest, self.scores = broadcast_from_rank0(engine.processes, lambda: (
            -1.0 if highest is None else highest,
            [(entry["step"], entry.get("quick_mean_iou_fine") or 0.0) for entry in read_lines(Path(folder, QUICK))]
            if folder else []))

    def __call__(self, step, stop_requested):
        """Score the network and log the scores.

        Args:
            step: steps done.
            stop_requested: function that returns whether to stop early, without scores.

        Returns:
            The mean IoU of the fine head if it is the best in this folder so far, else None.
        """
        self.engine.scored_network.eval()
        items = itertools.takewhile(lambda _: not stop_requested(), progress(self.loader, "quick validation", "image"))
        total = sum_of_matrices(image.matrices for image in score(
            self.predictor, items, self.classes.num_classes, self.ignore_index))
        self.engine.train_mode()
        if any(gather_from_ranks(self.engine.processes, stop_requested())):
            self.log.info(f"the quick validation of step {step} is left out until --resume")
            return None
        if self.engine.processes is not None:
            total = sum_of_matrices(self.engine.processes.gather_objects(total))
        matrices = total["single_scale"]
        scores = {head: matrix.scores(self.classes.names, self.classes.categories) for head, matrix in matrices.items()}
        self.log.quick_validation(step, scores)
        score_of_step = scores["fine"]["mean_iou"] or 0.0
        self.scores.append((step, score_of_step))
        if score_of_step <= self.highest:
            return None
        self.highest = score_of_step
        return self.highest

    def has_scored(self, step):
        """Whether the network was scored after this step."""
        return step in dict(self.scores)

    def lost_patience(self, patience):
        """Return a sentence if `patience` validations have brought no better score, so that the run ends, else ""."""
        best = max(range(len(self.scores)), key=lambda index: self.scores[index][1], default=0)     # the first of them
        if not patience or len(self.scores) - 1 - best < patience:
            return ""
        step, highest = self.scores[best]
        other = f", which has {100 * self.highest:.2f} %" * (self.highest > highest)    # of steps before a resume
        return (f"--patience {patience}: no quick validation since step {step} was better than its mIoU of "
                f"{100 * highest:.2f} %; the best snapshot is {Path(self.folder or '', snapshots.BEST)}{other}")


@torch.no_grad()
def draw_panel(engine, normalization, sample, classes, ignore_index):
    """Draw image, truth, the prediction of each head and the difference of the heads, side by side.

    Args:
        sample: an item of the training data.
        classes: its `ClassTable`.

    Returns:
        (H, W · pictures, 3) uint8.
    """
    network = engine.scored_network.eval()
    # `forward` bypasses code that was compiled for training and would be compiled again.
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
    """Draw curves.png of the run in a folder; errors, such as of a full disk, are only logged."""
    metrics, quick = (read_lines(folder / name) for name in (METRICS, QUICK))
    try:
        if metrics:
            charts.training_curves(folder / "curves.png", metrics, quick)
    except (OSError, UserError) as error:
        logger.info(f"curves.png is left out: {error}")
