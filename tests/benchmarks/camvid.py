"""What ACF gains on real photographs: CamVid, from ImageNet weights, by `tests.benchmarks.compare`.

    python -m tests.benchmarks.camvid CAMVID WEIGHTS.pth [--steps 600] [--seeds 3] [--variants ...] [flags of train.py]

Ordinary norms with ReLU, as the weights were trained, AdamW, and windows of the size of the crops at scale 1: in larger
ones ASPP's far taps, which see nothing but padding in small crops, would speak untrained. The flags of train.py replace
these and those of the crops. The same command goes on where it was stopped.
"""

from pathlib import Path

from tests.benchmarks.compare import Comparison, Variant, compare, for_all
from utils.common import command, flags
from utils.devices.select import select_devices

ACF = ("--model", "acfnet_resnet")


def altered(name, how):
    """A variant of `acfnet_resnet` that `tests.benchmarks.altered` makes."""
    return Variant(name, ACF, *(("-m", "tests.benchmarks.altered", how, script) for script in ("train", "evaluate")))


# The only head weighs as much as the fine and the coarse one of ACFNet, so that the layers common to both networks get
# gradients of the same scale.
AS_BOTH = ("--loss-weights", "fine=1.3,aux=0.4")
VARIANTS = {variant.name: variant for variant in (
    Variant("fcn", ("--model", "fcn", *AS_BOTH)),
    Variant("acfnet_resnet", ACF),
    Variant("deeplabv3", ("--model", "deeplabv3", *AS_BOTH)),
    Variant("acfnet", ("--model", "acfnet")),
    altered("acfnet_resnet, no term", "no_term"),
    altered("acfnet_resnet, centers detached", "detached_centers"),
    altered("acfnet_resnet, P detached", "detached_p"),
    Variant("acfnet_resnet, norms", (*ACF, "--ablations", "norms")),
    Variant("acfnet_resnet, norms and fusion", (*ACF, "--ablations", "norms", "fusion")),
    altered("acfnet_resnet, true centers", "true_centers"),
)}
TRAINING = ("--input-size", "209,209", "--batch-size", "4", "--norm", "bn", "--activation", "relu", "--channels-last",
            "--optimizer", "adamw", "--learning-rate", "1e-3", "--weight-decay", "0.02", "--clip-gradient", "5",
            "--sampling", "class", "--random-mirror")


def main(argv=None):
    parser = flags.Parser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("weights", type=flags.path)
    parser.add_argument("--steps", type=flags.positive(int), default=600)
    parser.add_argument("--seeds", type=flags.positive(int, 30), default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--gpu")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/camvid"))
    args, given = parser.parse_known_args(argv)
    devices = select_devices(args.gpu)
    words = ["--data-list", args.data / "train.lst", "--val-list", args.data / "val.lst", "--classes",
             args.data / "classes.csv", "--restore-from", args.weights, *TRAINING, *given]
    compare(Comparison(
        variants=tuple(VARIANTS[name] for name in args.variants),
        base="fcn" if "fcn" in args.variants else args.variants[0], seeds=args.seeds, steps=args.steps,
        words=for_all(str(args.data), list(map(str, words)), args.steps, len(devices)),
        protocol=("--scales", "1.0", "--no-flip"), folder=args.output_dir), devices)


if __name__ == "__main__":
    command.run(main)
