"""What ACF gains on real photographs: CamVid, from ImageNet weights, same steps and seeds for every model.

    python -m tests.benchmarks.camvid CAMVID WEIGHTS.pth [--steps 600] [--seeds 3] [--variants ...]

A ResNet-50 whose stem and first two stages are frozen, bf16, channels-last, ordinary norms with ReLU as the weights
were trained. Scale 1, windows of the size of the crops: in larger ones ASPP's far taps, which see nothing but padding
in small crops, would speak untrained. Results go to --output-dir as they come (results.jsonl, a table, curves.png, the
networks); the same command goes on where it was stopped.
"""

import argparse
import json
import math
from pathlib import Path
from types import SimpleNamespace

import torch

import train
from dataset.cityscapes import CityscapesDataset
from dataset.labels import IGNORE_INDEX, ClassTable
from dataset.transforms import train_transform
from libs.convert import fold_norms
from loss.criterion import SegmentationCriterion
from networks import MODELS, build_network
from networks.acf import ACFModule
from networks.acfnet import SegmentationNet
from networks.pretrained import choose_backbone, load_weights, read_weights
from utils import checkpoint, cli, visualize
from utils.distributed import select_devices
from utils.inference import SlidingPredictor, score
from utils.logger import progress, read_lines
from utils.optimization import PolySchedule, make_optimizer
from utils.precision import AUTOCAST, Precision, at_least_float32, best_precision

VARIANTS = {        # model, ablations
    "base": ("base", ()),               # its only head weighs 0.7, as the fine one of ACFNet alone
    "base, fine 1.3": ("base", ()),     # as both heads of ACFNet, and as train.py has it
    "acfnet_resnet": ("acfnet_resnet", ()),
    "acfnet": ("acfnet", ()),
    "acfnet_resnet, no term": ("acfnet_resnet", ()),        # fine is a second plain classifier of F; all else equal
    "acfnet_resnet, norms": ("acfnet_resnet", ("norms",)),
    "acfnet_resnet, norms and fusion": ("acfnet_resnet", ("norms", "fusion")),
    "acfnet_resnet, true centers": ("acfnet_resnet", ()),   # class centers from the truth, as an upper bound
}
BASES = ("base, fine 1.3", "base")
FROZEN = ("stem", "1", "2")
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}        # Student's t, 95 %, by number of seeds


def true_logits(labels, num_classes, size, dtype=torch.float32):
    """Labels (B, H, W), any other value than a class ignored → logits (B, N, *size) whose softmax they are.

    An ignored pixel belongs to all classes alike.
    """
    labels = torch.nn.functional.interpolate(labels[:, None].float(), size=size, mode="nearest-exact")[:, 0].long()
    known = labels < num_classes
    chosen = torch.nn.functional.one_hot(labels.where(known, 0), num_classes) * known[..., None]      # (B, h, w, N)
    return 50 * chosen.permute(0, 3, 1, 2).to(dtype)


class TrueCentersModule(ACFModule):
    """The ACF module with class centers from `truth`, labels (B, H, W); attention to them is as ever."""

    truth = None

    def class_centers(self, features, coarse_logits):
        return super().class_centers(features, true_logits(
            self.truth, coarse_logits.shape[1], coarse_logits.shape[2:], at_least_float32(coarse_logits).dtype))


class TrueCentersNet(SegmentationNet):
    """Takes images (B, 4, H, W), whose last channel is the truth."""

    def forward(self, images):
        self.head.acf.truth = images[:, 3].round()
        return super().forward(images[:, :3])


class WithTruth(CityscapesDataset):
    """Items whose image has the truth as a fourth channel."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return item | {"image": torch.cat([item["image"], item["label"][None].to(torch.uint8)])}


class PredictorWithTruth(SlidingPredictor):
    """Takes images of four channels."""

    def checked(self, image):
        return image


def make_network(variant, num_classes, weights):
    """The network of a variant, with its pretrained backbone."""
    model, ablations = VARIANTS[variant]
    network = build_network(model, num_classes, norm="bn", activation="relu", ablations=ablations,
                            **choose_backbone(weights))
    load_weights(network, weights)
    if variant.endswith("true centers"):
        convolution = network.head.acf.ccb.conv
        network.head.acf = TrueCentersModule(convolution.in_channels, convolution.out_channels)
        network = TrueCentersNet(network.backbone, network.context, network.head, network.aux)
    if variant.endswith("no term"):
        for parameter in network.head.acf.requires_grad_(False).cab.parameters():
            torch.nn.init.zeros_(parameter)
    return network


def run(variant, seed, args, weights, device):
    """Train one network; a line of results every third of the steps, from every fourth image but for the last."""
    torch.manual_seed(seed)
    classes = ClassTable.read(args.data / "classes.csv")
    network = make_network(variant, classes.num_classes, weights).to(device, memory_format=torch.channels_last)
    amp, normalization, kind, predictor_kind = (args.amp or best_precision(device), weights.normalization,
                                                CityscapesDataset, SlidingPredictor)
    if variant.endswith("true centers"):
        kind, predictor_kind = WithTruth, PredictorWithTruth

        def normalization(pixels):
            return torch.cat([weights.normalization(pixels[:, :3]), pixels[:, 3:].float()], dim=1)
    precision = Precision(amp, device)
    loss_weights = MODELS[VARIANTS[variant][0]].loss_weights | ({"fine": 0.7} if variant == "base" else {})
    engine = train.make_engine(
        network, criterion=SegmentationCriterion(loss_weights, IGNORE_INDEX), normalization=normalization,
        optimizer=make_optimizer(network, learning_rate=args.learning_rate), precision=precision, devices=[device],
        memory_format=torch.channels_last, freeze=FROZEN)
    val = kind(args.data, data_list=args.data / "val.lst", classes=classes)

    def validate(step):
        network.eval()
        forward = network.forward if kind is WithTruth else fold_norms(network).to(memory_format=torch.channels_last)
        predictor = predictor_kind(forward, args.size, normalization=normalization, device=device,
                                   autocast=AUTOCAST[amp], memory_format=torch.channels_last)
        items = (val[index] for index in range(0, len(val), 1 if step == args.steps else 4))
        scores = {head: matrix.mean_iou() for head, matrix in
                  score(predictor, items, classes.num_classes, IGNORE_INDEX)["single_scale"].items()}
        engine.train_mode()
        with open(args.output_dir / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"variant": variant, "seed": seed, "steps": args.steps, "step": step, **scores})
                       + "\n")
        print(f"{variant}, seed {seed}, step {step}: "
              + ", ".join(f"{head} {100 * value:.2f} %" for head, value in scores.items()), flush=True)

    def save(step, *_, **__):
        if step == args.steps:
            checkpoint.save(args.output_dir / f"{variant}, seed {seed}.pth".replace(", ", "_").replace(" ", "_"),
                            {"variant": variant, "model": network.state_dict()})

    training = train.Run(engine=engine, schedule=PolySchedule(args.steps), snapshots=SimpleNamespace(save=save),
                         validate=validate, val_every=max(1, args.steps // 3))
    data = kind(args.data, data_list=args.data / "train.lst", classes=classes, seed=seed,
                transform=train_transform(args.size))
    training.batches = progress(train.make_batches(data, training, seed=seed, batch_size=args.batch_size, workers=1),
                                f"{variant}, seed {seed}", "step", every=60)
    stopped = train.train(training)
    if stopped:
        raise cli.Interrupted(stopped)


def interval(values):
    """Mean and half of its 95 % interval; None with one value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean, T_95.get(len(values), 2.0) * deviation / math.sqrt(len(values))


def table(lines, steps):
    """Last results of each variant as text, with the gain of fine over coarse in the same networks, and over the base
    network of the same seeds: a seed fixes the samples, and matters more than the model."""
    bases = [{line["seed"]: line["fine"] for line in lines
              if line["variant"] == name and line["step"] == steps == line["steps"]} for name in BASES]
    base = max(bases, key=len)
    text = []
    for variant in VARIANTS:
        last = [line for line in lines if line["variant"] == variant and line["step"] == steps == line["steps"]]
        if not last:
            continue
        columns = {"fine": [line["fine"] for line in last]}
        if "coarse" in last[0]:
            columns |= {"coarse": [line["coarse"] for line in last],
                        "fine - coarse": [line["fine"] - line["coarse"] for line in last]}
        if variant not in BASES and all(line["seed"] in base for line in last):
            columns["fine - base"] = [line["fine"] - base[line["seed"]] for line in last]
        shown = []
        for name, values in columns.items():
            mean, half = interval(values)
            shown.append(f"{name} {100 * mean:.2f}" + (f" ± {100 * half:.2f}" if half is not None else ""))
        text.append(f"{variant:<34}{len(last)} seeds   {'   '.join(shown)}")
    return "\n".join(text)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("weights")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=cli.size, default=(209, 209))
    parser.add_argument("--batch-size", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--amp", choices=("off", "bf16", "fp16"))
    parser.add_argument("--gpu")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/camvid"))
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    device, weights = select_devices(args.gpu)[0], read_weights(args.weights)
    for seed in range(args.seeds):
        for variant in args.variants:
            done = {(line["variant"], line["seed"], line["step"], line["steps"])
                    for line in read_lines(args.output_dir / "results.jsonl")}
            if (variant, seed, args.steps, args.steps) not in done:
                run(variant, seed, args, weights, device)
    lines = read_lines(args.output_dir / "results.jsonl")
    result = table(lines, args.steps)
    checkpoint.write_atomically(args.output_dir / "table.txt", lambda file: file.write(f"{result}\n".encode()))
    visualize.score_curves(args.output_dir / "curves.png", [line for line in lines if line["steps"] == args.steps])
    print(f"mean IoU in per cent after {args.steps} steps, with the 95 % interval of the mean\n{result}")


if __name__ == "__main__":
    cli.run(main)
