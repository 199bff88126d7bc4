"""train.py and evaluate.py with an altered ACF module, for `tests.benchmarks.camvid`.

    python -m tests.benchmarks.altered ALTERATION train|evaluate [words of that script]

no_term             the term of the class centers is zero: fine is a second plain classifier of F, all else equal
true_centers        class centers come from the truth, as an upper bound; attention to them is as ever. Scale 1 only
detached_centers    the loss of fine reaches F and P not through the class centers; their convolution learns
detached_p          the loss of fine does not reach P: the coarse classifier learns from its own loss alone
"""

import sys
from functools import partial
from unittest.mock import patch

import torch

import evaluate
import train
from dataset.cityscapes import CityscapesDataset
from networks import predictor
from networks.acf import ACFModule
from networks.acfnet import SegmentationNet
from networks.build import build_network
from utils.common import command
from utils.inference.sliding import SlidingPredictor
from utils.metrics import evaluation
from utils.metrics.evaluation import score
from utils.ops.autocast import at_least_float32
from utils.training.engine import make_engine
from utils.training.validation import draw_panel


def without_term(**shape):
    """`build_network`, with the ACF term zero: so are the weights that would make it, and they learn nothing."""
    network = build_network(**shape)
    for parameter in network.head.acf.cab.parameters():
        torch.nn.init.zeros_(parameter)
    network.head.acf.register_forward_hook(lambda module, inputs, term: 0 * term)
    return network


def true_logits(labels, num_classes, size, dtype=torch.float32):
    """Labels (B, H, W), any other value than a class ignored → logits (B, N, *size) whose softmax they are.

    An ignored pixel belongs to all classes alike.
    """
    labels = torch.nn.functional.interpolate(labels[:, None].float(), size=size, mode="nearest-exact")[:, 0].long()
    known = labels < num_classes
    chosen = torch.nn.functional.one_hot(labels.where(known, 0), num_classes) * known[..., None]      # (B, h, w, N)
    return 50 * chosen.permute(0, 3, 1, 2).to(dtype)


class TrueCentersModule(ACFModule):
    """The ACF module with class centers from `truth`, labels (B, H, W), where there is one."""

    truth = None

    def class_centers(self, features, coarse_logits):
        if self.truth is not None:
            coarse_logits = true_logits(self.truth, coarse_logits.shape[1], coarse_logits.shape[2:],
                                        at_least_float32(coarse_logits).dtype)
        return super().class_centers(features, coarse_logits)


class TrueCentersNet(SegmentationNet):
    """Takes images (B, 4, H, W), whose last channel is the truth; without it, it is the network it was made of."""

    def forward(self, images):
        self.head.acf.truth = images[:, 3].round() if images.shape[1] == 4 else None
        return super().forward(images[:, :3])


class DetachedCentersModule(ACFModule):
    """The ACF module, whose class centers pass no gradient to features and probabilities."""

    def class_centers(self, features, coarse_logits):
        return super().class_centers(features.detach(), coarse_logits.detach())


class DetachedProbabilitiesModule(ACFModule):
    """The ACF module, which passes no gradient to the probabilities."""

    def forward(self, features, coarse_logits):
        return super().forward(features, coarse_logits.detach())


def with_module(kind, **shape):
    """`build_network` with an ACF module of a class that has the weights of `ACFModule`."""
    network = build_network(**shape)
    network.head.acf.__class__ = kind
    return network


def with_true_centers(**shape):
    """`build_network`, with class centers from the truth."""
    network = with_module(TrueCentersModule, **shape)
    return TrueCentersNet(network.backbone, network.context, network.head, network.aux)


def add_truth(item):
    """An item of a data set with its truth as the image's fourth channel."""
    return item | {"image": torch.cat([item["image"], item["label"][None].to(torch.uint8)])}


def hide_truth(item):
    return item | {"image": item["image"][:3]}


def beside_truth(normalization):
    """A normalization of the first three channels."""
    return lambda pixels: torch.cat([normalization(pixels[:, :3]), pixels[:, 3:].float()], dim=1)


class WithTruth(CityscapesDataset):
    """Items of four channels."""

    def __getitem__(self, index):
        return add_truth(super().__getitem__(index))


class PredictorWithTruth(SlidingPredictor):
    """Takes images of four channels."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.normalization = beside_truth(self.normalization)

    def as_tensor(self, image):
        return image


def score_with_truth(predicting, items, num_classes):
    """`score`, whose predictor sees the truth, which images do not show afterward."""
    for image in score(predicting, map(add_truth, items), num_classes):
        image.item = hide_truth(image.item)
        yield image


def engine_with_truth(network, *, normalization, **rest):
    return make_engine(network, normalization=beside_truth(normalization), **rest)


def panel_without_truth(engine, normalization, *, sample, **rest):
    return draw_panel(engine, normalization, sample=hide_truth(sample), **rest)


ALTERATIONS = {"no_term": without_term, "true_centers": with_true_centers,
               "detached_centers": partial(with_module, DetachedCentersModule),
               "detached_p": partial(with_module, DetachedProbabilitiesModule)}


def main(argv):
    how, script, *words = argv
    # `patch` raises AttributeError for a name that is no longer there, where plain assignment would alter nothing.
    for module in (train, predictor):
        patch.object(module, "build_network", ALTERATIONS[how]).start()
    if how == "true_centers":
        patch.multiple(train, CityscapesDataset=WithTruth, make_engine=engine_with_truth,
                       draw_panel=panel_without_truth).start()
        patch.object(predictor, "SlidingPredictor", PredictorWithTruth).start()
        patch.object(evaluation, "score", score_with_truth).start()
    {"train": train, "evaluate": evaluate}[script].main(words)


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
