"""What ACF gains on real photographs: CamVid, from ImageNet weights, by `tests.benchmarks.compare`.

    python -m tests.benchmarks.camvid CAMVID WEIGHTS.pth [--steps 600] [--seeds 3] [--variants ...]

A ResNet-50 whose stem and first two stages are frozen, ordinary norms with ReLU as the weights were trained. Scale 1,
windows of the size of the crops: in larger ones ASPP's far taps, which see nothing but padding in small crops, would
speak untrained. The same command goes on where it was stopped.
"""

from pathlib import Path

from tests.benchmarks.compare import Comparison, Variant, compare, for_all
from utils.common import command, flags
from utils.devices.select import select_devices

PLAIN, ACF = ("--model", "base"), ("--model", "acfnet_resnet")


def altered(name, how):
    """A variant whose network `tests.benchmarks.altered` makes."""
    return Variant(name, ACF, *(("-m", "tests.benchmarks.altered", how, script) for script in ("train", "evaluate")))


VARIANTS = {variant.name: variant for variant in (
    Variant("base", (*PLAIN, "--loss-weights", "fine=0.7,aux=0.4")),            # as the fine head of ACFNet alone
    Variant("base, fine 1.3", (*PLAIN, "--loss-weights", "fine=1.3,aux=0.4")),  # as both of its heads
    Variant("acfnet_resnet", ACF),
    Variant("acfnet", ("--model", "acfnet")),
    altered("acfnet_resnet, no term", "no_term"),
    Variant("acfnet_resnet, norms", (*ACF, "--ablations", "norms")),
    Variant("acfnet_resnet, norms and fusion", (*ACF, "--ablations", "norms", "fusion")),
    altered("acfnet_resnet, true centers", "true_centers"),
)}
BASES = ("base, fine 1.3", "base")


def main(argv=None):
    parser = flags.Parser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("weights", type=flags.path)
    parser.add_argument("--steps", type=flags.positive(int), default=600)
    parser.add_argument("--seeds", type=flags.positive(int, 30), default=3)
    parser.add_argument("--size", default="209,209")
    parser.add_argument("--batch-size", default="6")
    parser.add_argument("--learning-rate", default="1e-2")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--amp", choices=("off", "bf16", "fp16"))
    parser.add_argument("--gpu")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/camvid"))
    args = parser.parse_args(argv)
    devices = select_devices(args.gpu)
    words = ["--data-list", args.data / "train.lst", "--val-list", args.data / "val.lst", "--classes",
             args.data / "classes.csv", "--restore-from", args.weights, "--input-size", args.size, "--batch-size",
             args.batch_size, "--learning-rate", args.learning_rate, "--norm", "bn", "--activation", "relu", "--freeze",
             "stem,1,2", "--channels-last", *(["--amp", args.amp] if args.amp else [])]
    compare(Comparison(
        variants=tuple(VARIANTS[name] for name in args.variants),
        base=next((name for name in BASES if name in args.variants), args.variants[0]), seeds=args.seeds,
        steps=args.steps, words=for_all(str(args.data), list(map(str, words)), args.steps, len(devices)),
        protocol=("--scales", "1.0", "--no-flip"), folder=args.output_dir), devices)


if __name__ == "__main__":
    command.run(main)
