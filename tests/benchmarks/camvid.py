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

import torch
from torch.utils.data import DataLoader

from dataset.cityscapes import CityscapesDataset
from dataset.labels import IGNORE_INDEX, ClassTable
from dataset.sampling import EpochSampler
from dataset.transforms import train_transform
from libs.convert import fold_norms
from loss.criterion import WEIGHTS, SegmentationCriterion
from networks import build_network
from networks.pretrained import choose_backbone, load_weights, read_weights
from train import poly_rate
from utils import checkpoint, cli, visualize
from utils.distributed import select_devices
from utils.engine import Engine, NetworkWithLoss
from utils.inference import SlidingPredictor, score
from utils.logger import progress, read_lines
from utils.precision import AUTOCAST, Precision, best_precision

VARIANTS = {        # model, ablations
    "base": ("base", ()),
    "base, fine 1.3": ("base", ()),     # its head counts as much as both heads of ACFNet
    "acfnet_resnet": ("acfnet_resnet", ()),
    "acfnet": ("acfnet", ()),
    "acfnet_resnet, no term": ("acfnet_resnet", ()),        # fine is a second plain classifier of F; all else equal
    "acfnet_resnet, norms": ("acfnet_resnet", ("norms",)),
    "acfnet_resnet, norms and fusion": ("acfnet_resnet", ("norms", "fusion")),
    "acfnet_resnet, true centers": ("acfnet_resnet", ("true_centers",)),
}
BASES = ("base, fine 1.3", "base")
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}        # Student's t, 95 %, by number of seeds


class WithTruth(SlidingPredictor):
    """Takes the truth as a fourth channel of the image."""

    def checked(self, image):
        return image


def validate(network, items, classes, normalization, args, device, autocast):
    """{head: mean IoU}; the ablation with true centers is shown the truth, as a fourth channel of the image."""
    forward, prepare = network.eval(), normalization
    if getattr(network, "true_centers", False):
        items = ({**item, "image": torch.cat([item["image"], item["label"][None].to(torch.uint8)])} for item in items)

        def forward(pixels):
            return network(pixels[:, :3], pixels[:, 3].round())

        def prepare(pixels):
            return torch.cat([normalization(pixels[:, :3]), pixels[:, 3:].float()], dim=1)
    else:
        forward = fold_norms(network).to(memory_format=torch.channels_last)
    kind = WithTruth if prepare is not normalization else SlidingPredictor
    predictor = kind(forward, args.size, normalization=prepare, device=device, autocast=autocast,
                     memory_format=torch.channels_last)
    scores = score(predictor, items, classes.num_classes, IGNORE_INDEX)["single_scale"]
    return {head: matrix.mean_iou() for head, matrix in scores.items()}


def run(variant, seed, args, weights, device):
    """Train one network; a line of results every third of the steps, from every fourth image but for the last."""
    model, ablations = VARIANTS[variant]
    torch.manual_seed(seed)
    classes = ClassTable.read(args.data / "classes.csv")
    network = build_network(model, classes.num_classes, norm="bn", activation="relu", ablations=ablations,
                            **choose_backbone(weights))
    load_weights(network, weights)
    if variant.endswith("no term"):
        for parameter in network.acf.requires_grad_(False).cab.parameters():
            torch.nn.init.zeros_(parameter)
    network.to(device, memory_format=torch.channels_last)
    frozen = [network.backbone.conv1, network.backbone.bn1, network.backbone.layer1, network.backbone.layer2]
    for module in frozen:
        module.requires_grad_(False)
    amp = args.amp or best_precision(device)
    precision = Precision(amp, device)
    criterion = SegmentationCriterion({head: WEIGHTS[head] for head in WEIGHTS if hasattr(network, head)}
                                      | ({"fine": 1.3} if variant.endswith("fine 1.3") else {}))
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], args.learning_rate, 0.9,
                                weight_decay=1e-4)
    engine = Engine(NetworkWithLoss(network, criterion, weights.normalization, precision.autocast), network, criterion,
                    optimizer, precision, [device], memory_format=torch.channels_last)
    data = CityscapesDataset(args.data, data_list=args.data / "train.lst", classes=classes, seed=seed,
                             transform=train_transform(args.size))
    val = CityscapesDataset(args.data, data_list=args.data / "val.lst", classes=classes)
    sampler = EpochSampler(len(data), seed, 0, args.batch_size * args.steps, args.batch_size)
    loader = DataLoader(data, args.batch_size, sampler=sampler, num_workers=1)
    every = max(1, args.steps // 3)
    for step, batch in enumerate(progress(loader, f"{variant}, seed {seed}", "step", every=60), 1):
        network.train()
        for module in frozen:
            module.eval()
        terms, _ = engine.step([batch], poly_rate(args.learning_rate, step - 1, args.steps, 0.9))
        if step % every == 0 or step == args.steps:
            items = (val[index] for index in range(0, len(val), 1 if step == args.steps else 4))
            scores = validate(network, items, classes, weights.normalization, args, device, AUTOCAST[amp])
            with open(args.output_dir / "results.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"variant": variant, "seed": seed, "steps": args.steps, "step": step,
                                       "loss": criterion.total({name: terms[name] for name in criterion.weights}),
                                       **scores}) + "\n")
            print(f"{variant}, seed {seed}, step {step}: "
                  + ", ".join(f"{head} {100 * value:.2f} %" for head, value in scores.items()), flush=True)
    checkpoint.save(args.output_dir / f"{variant}, seed {seed}.pth".replace(", ", "_").replace(" ", "_"),
                    {"variant": variant, "model": network.state_dict()})


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
