r"""Train ACFNet.

The paper's setting, four GPUs:

    python train.py --data-dir CITYSCAPES --random-mirror --random-scale --restore-from dataset/WEIGHTS.pth \
        --gpu 0,1,2,3 --learning-rate 1e-2 --input-size 769,769 --weight-decay 1e-4 --batch-size 8 \
        --num-steps 60000

With OHEM, add: --ohem 1 --ohem-thres 0.7 --ohem-keep 100000
To continue after an interruption, repeat the command with --resume. Ctrl-C, SIGTERM and a closed terminal end the run
after the current step, with a snapshot; the exit status is then 130, 143 or 129.
Several hosts: torchrun --nproc_per_node 4 ... train.py in place of python train.py
A batch that does not fit into memory: --accumulate 4 processes it in four parts
Flags can be in a file, one per line; later ones on the command line replace them. dataset/recipes/ has files for the
paper's setting, CamVid and fine-tuning:

    python train.py @dataset/recipes/cityscapes.txt --data-dir CITYSCAPES --restore-from dataset/WEIGHTS.pth --ohem 1
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))     # PYTHONSAFEPATH leaves it out
if __name__ == "__main__":      # before anything is imported that may be missing
    from utils import environment
    environment.check_packages()


from dataset import folders, infer
from dataset.cityscapes import CityscapesDataset, all_label_maps
from dataset.sampling import class_index, make_loader
from dataset.transforms import train_transform
from dataset.weights import class_weights
from libs import backend
from libs.abn import NORMS, count_input_keeping_norms, set_backend, set_group
from loss.criterion import SegmentationCriterion
from loss.terms import TERMS, choose_terms
from networks.backbones.names import ACTIVATIONS, BACKBONE, BACKBONES, STEMS, find_backbone
from networks.backbones.resnet import RECOMPUTE
from networks.backbones.timm import PREFIX, synchronize_norms
from networks.build import ABLATIONS, MODELS, build_network
from networks.weights.choice import NetworkChoice
from networks.weights.families import weights_of_snapshot
from networks.weights.loading import load_weights
from networks.weights.snapshot import Config
from networks.weights.start import best_quick_score, find_start
from utils.common import command, flags
from utils.common.compat import cpu_computes_in_bf16
from utils.common.errors import UserError, plural
from utils.common.messages import logger, show_messages
from utils.devices import capture, memory
from utils.devices.compilation import check_compile
from utils.devices.precision import CHOICES, OPT_LEVELS, Precision, describe_default
from utils.devices.select import (
    check_kernels,
    own_device,
    prepare_device,
    select_devices,
    share_cores,
    shared_precision,
)
from utils.imaging.classes import IGNORE_INDEX
from utils.inference.sliding import fitting_size
from utils.ops.normalization import NORMALIZATIONS, Normalization
from utils.parallel.launch import (
    crops_per_device,
    join_processes,
    leave_processes,
    new_group,
    start_processes,
    started_by_torchrun,
)
from utils.parallel.processes import broadcast_from_rank0, gather_from_ranks, rank_and_size
from utils.runs import recipes, snapshots
from utils.runs.history import History
from utils.runs.trackers import SERVICES, check_packages
from utils.training import optimization, resume, seeds
from utils.training.engine import NotFinite, make_engine
from utils.training.optimization import OPTIMIZERS, SCHEDULES, Schedule, make_optimizer
from utils.training.options import DataOptions, LearningOptions, MachineOptions, ResultOptions
from utils.training.run import Run
from utils.training.validation import QuickValidation, draw_curves, draw_panel


def get_parser():
    parser = flags.Parser(usage="%(prog)s [@FILE] [flags]", description="Train ACFNet.", epilog=__doc__)
    parser.add_argument("--like", type=flags.path, metavar="RUN", help="take the flags of an earlier run from its "
                        "folder, except those of the machine and the results; flags of the command line replace them")
    add_data(parser)
    add_network(parser)
    add_learning(parser)
    add_run(parser)
    return parser


def add_data(parser):
    """Flags of the training samples."""
    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", type=flags.path,
                      help="folder with leftImg8bit/ and gtFine/, or the root of --data-list")
    folders.add_data_flags(data, folders.DEFAULT_TABLE)
    data.add_argument("--split", type=flags.split, default="train", help="split to train on, or several joined by +, "
                      "each with a weight if wanted: train+val, train:2+train_extra:1 (default: train)")
    data.add_argument("--cache", type=flags.path, metavar="DIR",
                      help="decode each image once and keep it as an array in this folder (default: no cache)")
    data.add_argument("--sampling", choices=("uniform", "class"), default="uniform", help="uniform: crops anywhere in "
                      "the image; class: each crop contains a pixel of a class that is drawn uniformly, so that rare "
                      "classes are seen more often (default: uniform)")
    data.add_argument("--num-classes", type=flags.positive(int),
                      help="expected number of classes, checked against the class table (default: not checked)")
    data.add_argument("--random-mirror", action="store_true", help="mirror half of the samples (default: none)")
    data.add_argument("--random-scale", type=flags.scale_range, nargs="?", const=(0.5, 2.0), metavar="LO,HI",
                      help="scale samples by random factors of this range; 0.5,2.0 if no range follows "
                      "(default: no scaling)")
    data.add_argument("--rotate", type=flags.positive(float, 180), metavar="DEGREES", help="rotate samples by random "
                      "angles of at most this size (default: no rotation)")
    data.add_argument("--vertical-flip", action="store_true", help="flip half of the samples top-bottom, as suits "
                      "images from above and from microscopes (default: none)")
    data.add_argument("--quarter-turns", action="store_true", help="turn samples by random multiples of 90 degrees "
                      "(default: none)")
    data.add_argument("--blur", type=flags.positive(float, 100), metavar="PIXELS", help="blur half of the samples with "
                      "a Gaussian of a random standard deviation up to this (default: no blur)")
    data.add_argument("--jitter", type=flags.jitter, metavar="B,C,S,H", help="multiply brightness, contrast and "
                      "saturation by random factors in 1 ± B, 1 ± C and 1 ± S, and rotate the hue by at most H of "
                      "a full turn, such as 0.4,0.4,0.4,0.05 (default: no jitter)")
    data.add_argument("--input-size", type=flags.size, default=(769, 769), metavar="H,W",
                      help="crop size in pixels, rounded up to 8k + 1, or to a size that a timm backbone accepts "
                      "(default: 769,769)")
    data.add_argument("--batch-size", type=flags.batch_size, default=8,
                      help="images per step, over all devices (default: 8)")
    data.add_argument("--num-workers", type=flags.num_workers, help="processes that read samples, per training process "
                      "(default: depends on the number of cores)")
    data.add_argument("--random-seed", type=flags.random_seed, default=1234,
                      help="seed of all random numbers (default: 1234)")


def add_network(parser):
    """Flags of the network and its initial weights."""
    net = parser.add_argument_group("network")
    net.add_argument("--model", choices=MODELS, default="acfnet", help="acfnet: ACF on ASPP; acfnet_resnet: ACF on a "
                     "3×3 convolution; base: ASPP without ACF; the others are models to compare with "
                     "(default: acfnet)")
    net.add_argument("--acf", action="store_true", help="add the ACF head to a --model that has one feature map "
                     "before its classifier: all but danet and ocrnet")
    net.add_argument("--backbone", type=backbone_name, metavar="NAME", help=f"{', '.join(BACKBONES)}, or {PREFIX}NAME "
                     f"for a network of timm, such as {PREFIX}convnext_tiny (default: that of --restore-from, else "
                     f"{BACKBONE})")
    net.add_argument("--stem", choices=STEMS,
                     help="first convolutions of a residual network (default: those of --restore-from, else 7x7)")
    net.add_argument("--downsample", choices=("strided", "average"), help="downsampling in the shortcuts of a residual "
                     "network: strided convolution or average pooling (default: that of --restore-from, else strided)")
    net.add_argument("--eca-kernels", type=flags.kernels, metavar="K,K,K,K", help="kernel sizes of ECA in stages 1 to "
                     "4 (default: those of --restore-from, else of the released ECANet)")
    net.add_argument("--output-stride", type=int, choices=(8, 16), help="input size divided by the size of the logits; "
                     "16 takes less time and memory, and misses small objects (default: that of --restore-from, else "
                     "8, or its own for a network of timm that cannot have 8)")
    net.add_argument("--normalization", choices=NORMALIZATIONS, help="normalization of the input; rgb: ImageNet's mean "
                     "and standard deviation; bgr: Caffe's mean (default: that of --restore-from or of timm's weights, "
                     "else rgb)")
    net.add_argument("--ablations", nargs="+", choices=ABLATIONS, default=[], help="parts that the paper's ACF module "
                     "does not have; norms: a norm after each of its convolutions; fusion: a convolution before the "
                     "classifier (default: none)")
    net.add_argument("--norm", choices=NORMS, default="inplace_abn",
                     help="batch norm, synchronized over all devices; inplace_abn: in place, which saves memory; bn: "
                     "not in place (default: inplace_abn)")
    net.add_argument("--activation", choices=ACTIVATIONS, default="leaky_relu",
                     help="activation after each norm; relu requires --norm bn (default: leaky_relu)")
    net.add_argument("--kernels", "--abn-backend", choices=backend.CHOICES, default="auto",
                     help="kernels of norms and of the ends of residual blocks; triton: few passes over the maps; "
                     "package: those of inplace_abn for in-place norms; torch: PyTorch's; auto: triton on a GPU where "
                     "it agrees with PyTorch, else package if it can be used, else torch (default: auto)")
    net.add_argument("--recompute", "--checkpoint", choices=RECOMPUTE, default="none",
                     help="compute activations again in the backward pass to save memory; light: those of the "
                     "expansion in each bottleneck (50 layers and more); full: those of groups of blocks; light and "
                     "full also recompute the ACF module (default: none)")
    net.add_argument("--freeze", type=flags.words, default=(), metavar="STAGES", help="freeze the first stages of the "
                     "backbone, weights and norm statistics: stem or stem,1,2 (default: none)")
    net.add_argument("--restore-from", type=flags.path, nargs="+", metavar="FILE", help="initial weights: a file of "
                     "ECANet, timm, torchvision or CSAIL, a snapshot, or a name of torchvision such as "
                     "ResNet101_Weights.IMAGENET1K_V2 (default: random weights)")
    net.add_argument("--pretrained", action="store_true", help=f"with --backbone {PREFIX}NAME: start from timm's "
                     "weights of that name, from its cache or the network")
    net.add_argument("--allow-partial", action="store_true", help="accept a --restore-from that initializes less than "
                     "half of the backbone's values")


def add_learning(parser):
    """Flags of the loss and the optimizer."""
    optim = parser.add_argument_group("loss and optimization")
    optim.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd", help="(default: sgd)")
    optim.add_argument("--learning-rate", type=flags.positive(float), default=1e-2,
                       help="initial learning rate of the backbone, reached after the warmup if there is one "
                       "(default: 1e-2)")
    optim.add_argument("--head-lr-factor", type=flags.positive(float), default=1.0, metavar="FACTOR",
                       help="learning rate of all other layers, as a multiple of --learning-rate (default: 1)")
    optim.add_argument("--layer-decay", type=flags.positive(float, 1), metavar="FACTOR", help=f"with a {PREFIX}NAME "
                       "backbone: multiply the learning rate by this from each layer to the layer before it, in timm's "
                       "own grouping (default: one rate for the backbone)")
    optim.add_argument("--momentum", type=flags.probability, default=0.9,
                       help="momentum of sgd, beta 1 of adamw (default: 0.9)")
    optim.add_argument("--weight-decay", type=flags.not_negative(float), default=1e-4, help="(default: 1e-4)")
    optim.add_argument("--schedule", choices=SCHEDULES, default="poly", help="learning rate over the steps; poly: "
                       "(1 - step / steps) ^ power; cosine: half a period of a cosine, down to 0; constant: the "
                       "initial rate (default: poly)")
    optim.add_argument("--power", type=flags.not_negative(float), default=0.9,
                       help="exponent of the poly schedule (default: 0.9)")
    optim.add_argument("--warmup-steps", type=flags.not_negative(int), default=0, metavar="STEPS",
                       help="steps over which the learning rate grows linearly from 0 (default: 0)")
    optim.add_argument("--num-steps", type=flags.positive(int), default=60000,
                       help="training steps (default: 60000)")
    optim.add_argument("--clip-gradient", type=flags.positive(float), metavar="NORM",
                       help="maximum norm of the gradient; a larger gradient is scaled down (default: no clipping)")
    optim.add_argument("--ema", type=flags.probability, metavar="DECAY", help="also keep an exponential moving "
                       "average of the weights, and score it instead of them; its decay after t updates is the "
                       "smaller of DECAY, such as 0.999, and (1 + t) / (10 + t) (default: no average)")
    optim.add_argument("--loss", default="ce", metavar="TERMS", help=f"sum of {', '.join(TERMS)} for "
                       "all heads, such as ce+lovasz, or HEAD=TERMS,... such as fine=ce+0.5*dice,aux=ce, where other "
                       "heads keep ce (default: ce)")
    optim.add_argument("--loss-weights", type=flags.named_numbers, metavar="HEAD=W,...", help="factor of the loss of "
                       "each head (default: those of the model, for acfnet fine=0.7,coarse=0.6,aux=0.4)")
    optim.add_argument("--class-weights", type=flags.path, metavar="NAME", help="weights of the classes in the loss; "
                       "cityscapes: the published list; balanced: 1 / log of the number of pixels of each class, with "
                       "mean 1; or a CSV file with columns name and weight (default: 1 for all)")
    optim.add_argument("--accumulate", type=flags.positive(int), default=1, metavar="PARTS",
                       help="process each batch in this many parts, one after the other, to save memory (default: 1)")
    optim.add_argument("--ohem", type=int, choices=(0, 1), default=0,
                       help="1: ohem in place of ce in the loss of fine: count only hard pixels (default: 0)")
    optim.add_argument("--ohem-thres", type=flags.probability, default=0.7,
                       help="a pixel is hard if the probability of its class is at most this (default: 0.7)")
    optim.add_argument("--ohem-keep", type=flags.positive(int), default=100000,
                       help="minimum number of pixels that count, per two images of the batch (default: 100000)")


def backbone_name(text):
    """Flag type: a key of `BACKBONES`, or the name of a network of timm."""
    try:
        return find_backbone(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("backbone: ")) from None


def add_run(parser):
    """Flags of the machine, the quick validation and the results."""
    run = parser.add_argument_group("machine")
    run.add_argument("--gpu", help="ids of GPUs such as 0,1,2,3, or cpu (default: all visible GPUs, else the CPU)")
    run.add_argument("--parallel", choices=("ddp", "dp", "none"), default="ddp",
                     help="how several GPUs are used; ddp: a process per GPU, as torchrun starts them; dp: threads of "
                     "one process, which is slower because only one thread at a time can run Python; none: only the "
                     "first GPU (default: ddp)")
    run.add_argument("--amp", choices=CHOICES, help="mixed precision; bf16: autocast; fp16: autocast with a gradient "
                     "scaler; apex: NVIDIA's apex.amp, tag 25.04 or older; off: float32 without TF32 (default: on a "
                     "GPU bf16 if it has instructions for it, else fp16; on a CPU bf16 if a measurement shows that it "
                     "is faster, else off)")
    run.add_argument("--opt-level", choices=OPT_LEVELS, default="O1",
                     help="optimization level of apex: O1, or O0 for float32 (default: O1)")
    run.add_argument("--channels-last", action=argparse.BooleanOptionalAction,
                     help="keep feature maps in channels-last memory format (default: on a GPU yes, on a CPU no)")
    run.add_argument("--compile", action="store_true", help="compile the network with torch.compile; "
                     "not possible with --parallel dp over several GPUs")
    run.add_argument("--cuda-graph", choices=capture.CHOICES, default="off", help="launch the forward and backward "
                     "pass of a process as one CUDA graph, which saves Python's time between operations; auto: if that "
                     "is possible; on: or end with an error; not tested on a GPU yet (default: off)")

    val = parser.add_argument_group("quick validation on whole images at scale 1; evaluate.py computes the official "
                                    "scores")
    val.add_argument("--val-every", type=flags.not_negative(int), default=0, metavar="STEPS",
                     help="steps between quick validations, 0 for none (default: 0)")
    val.add_argument("--val-split", type=flags.split, default="val", help="split to validate on (default: val)")
    val.add_argument("--val-list", type=flags.path, metavar="FILE",
                     help="list of images to validate on, like --data-list, instead of a split")
    val.add_argument("--patience", type=flags.not_negative(int), default=0, metavar="N", help="end the training after "
                     "N quick validations without a better score, with status 0; 0 to train for all steps (default: 0)")

    out = parser.add_argument_group("results")
    out.add_argument("--snapshot-dir", type=flags.path, default="snapshots",
                     help="folder of snapshots and logs (default: snapshots)")
    out.add_argument("--save-pred-every", type=flags.positive(int), default=5000,
                     help="steps between snapshots (default: 5000)")
    out.add_argument("--keep", type=flags.positive(int), metavar="N", help="keep only the newest N snapshots, and "
                     "the newest one after which training continued normally (default: all)")
    out.add_argument("--log-every", type=flags.positive(int), default=10, help="steps between log lines (default: 10)")
    out.add_argument("--panel-every", type=flags.positive(int), default=500,
                     help="steps between pictures in TensorBoard (default: 500)")
    out.add_argument("--resume", type=flags.path, nargs="?", const="newest", metavar="FILE",
                     help="continue from this snapshot; without FILE, from the newest one in --snapshot-dir")
    out.add_argument("--log", "--track", choices=SERVICES, nargs="+", default=[], help="experiment trackers that also "
                     "receive metrics and pictures, if their packages are installed; use --track with torchrun, which "
                     "has a --log flag of its own (default: none)")


def check(args, devices, classes):
    """Raise `UserError` for flags that cannot work, before anything is read or written."""
    if classes is not None:     # else they are inferred from the label maps later
        classes.check_count(args.num_classes)
    if args.compile:
        check_compile(devices=devices, parallel=args.parallel, recompute=args.recompute, amp=args.amp)
    if args.cuda_graph == "on":
        capture.resolve("on", devices=devices, parallel=args.parallel, accumulate=args.accumulate, amp=args.amp,
                        recompute=args.recompute)
    choice = flags.from_flags(NetworkChoice, vars(args))
    choice.check(batch_size=args.batch_size, accumulate=args.accumulate, loss_weights=args.loss_weights,
                 pretrained=args.pretrained, restore_from=args.restore_from)
    choose_terms(args.loss, choice.find_model().loss_weights, ohem=bool(args.ohem), parts=args.accumulate)
    optimization.check(kind=args.optimizer, momentum=args.momentum, ema=args.ema, warmup_steps=args.warmup_steps,
                       num_steps=args.num_steps)
    if args.restore_from and len(args.restore_from) > 1:
        raise UserError(f"--restore-from: expected one file, found {len(args.restore_from)} (did the shell expand "
                        f"a pattern?): {' '.join(args.restore_from)}")
    if args.sampling == "class" and args.data_list is None and ":" in args.split:
        raise UserError(f"--sampling class: expected a --split without weights, found {args.split}")
    if args.patience and not args.val_every:
        raise UserError(f"--patience {args.patience}: expected --val-every with it, found none")
    existing = snapshots.list_snapshots(args.snapshot_dir)
    if existing and not args.resume:
        raise UserError(f"--snapshot-dir {args.snapshot_dir}: expected a folder without snapshots, or --resume to "
                        f"go on, found {existing[-1][1]}")
    Precision(args.amp or "off", devices[0], args.opt_level)
    backend.check(args.kernels, **kernel_conditions(args, args.amp, args.channels_last, devices, processes=None))


def kernel_conditions(args, amp, channels_last, devices, processes):
    """Arguments of `libs.backend.check`; amp, channels_last: resolved, or None where the flags do not say."""
    return {"norm": args.norm, "amp": amp, "recompute": args.recompute, "compiled": args.compile,
            "shared": processes is not None or len(devices) > 1, "channels_last": channels_last,
            "replicas": args.parallel == "dp" and len(devices) > 1}


def parse_and_check(argv=None):
    """Parse the command line and check it, before any data are read.

    Returns:
        Flags, `folders.data_root`, the devices of this process, the `ClassTable` (None if it is to be inferred from the
        label maps), and the number of crops that each device processes at once.

    Raises:
        UserError: flags that cannot work.
    """
    args = recipes.parse_args(get_parser(), argv)
    check_packages(args.log)
    root = folders.data_root(args.data_dir, args.images_dir, args.labels_dir)
    if args.val_every:
        folders.check_validation(root, args.data_list, args.val_list, args.val_split)
    devices = select_devices(args.gpu)
    classes = folders.read_table(args.classes, args.images_dir, args.data_list)
    if started_by_torchrun() or args.parallel == "none":
        devices = [own_device(devices)]
    crops = crops_per_device(args.batch_size, args.accumulate, devices)
    check(args, devices, classes)
    if args.parallel == "dp":
        for device in devices:
            check_kernels(device)
    return args, root, devices, classes, crops


@dataclass(frozen=True, kw_only=True)
class Options:
    """The resolved options of a run: flags, completed by the files it starts from and the device.

    Attributes:
        root: of `folders.data_root`.
        data, learning, machine, results: groups of flags.
        network: arguments of `build_network`, without the number of classes.
        normalization: `Normalization` of the input.
        arguments: {name of flag: plain value}, which snapshots record.
    """

    root: str | tuple
    data: DataOptions
    learning: LearningOptions
    machine: MachineOptions
    results: ResultOptions
    network: dict
    normalization: Normalization
    arguments: dict


def resolve(args, root, devices, processes, begin):
    """Resolve flags into `Options`.

    Args:
        args: flags of `parse_and_check`.
        root: of `folders.data_root`.
        devices: of this process.
        processes: `Processes` that share the run, or None.
        begin: `Start`.
    """
    amp = args.amp or default_precision(devices, processes, begin.snapshot)
    choice = flags.from_flags(NetworkChoice, vars(args))
    weights = begin.weights if begin.snapshot is None else weights_of_snapshot(begin.snapshot)
    network, normalization = choice.resolve(weights)
    heads = choice.find_model().loss_weights
    loss_weights = args.loss_weights or (
        heads if begin.snapshot is None else resume.loss_weights(begin.snapshot.config, heads))
    report_flags_without_effect(args, heads)
    channels_last = prepare_device(devices[0], args.channels_last, amp)
    kernels, message = backend.choose(args.kernels, devices[0],
                                      **kernel_conditions(args, amp, channels_last, devices, processes))
    if message:
        logger.info(message)
    values = vars(args) | {
        "amp": amp,
        "cuda_graph": capture.resolve(args.cuda_graph, devices=devices, parallel=args.parallel,
                                      accumulate=args.accumulate, amp=amp, recompute=args.recompute),
        "channels_last": channels_last, "kernels": kernels,
        "backbone": network["backbone"], "loss_weights": {head: loss_weights[head] for head in heads},
        "input_size": fitting_size(args.input_size, "crops", find_backbone(network["backbone"]).grid(network))}
    return Options(
        root=root, data=flags.from_flags(DataOptions, values), learning=flags.from_flags(LearningOptions, values),
        machine=flags.from_flags(MachineOptions, values), results=flags.from_flags(ResultOptions, values),
        network=network, normalization=normalization, arguments=flags.plain_values(values))


def report_flags_without_effect(args, heads):
    """Log flags that the loss of these heads or the schedule does not use."""
    terms = choose_terms(args.loss, heads, ohem=bool(args.ohem))
    unused = {} if any("ohem" in factors for factors in terms.values()) else dict.fromkeys(
        ("ohem_thres", "ohem_keep"), "no loss uses OHEM (--ohem 1)")
    if args.schedule != "poly":
        unused["power"] = f"--schedule is {args.schedule}"
    parser = get_parser()
    for name, reason in unused.items():
        if getattr(args, name) != parser.get_default(name):
            logger.info(f"--{name.replace('_', '-')} has no effect: {reason}")


def main(argv=None):
    show_messages()
    args, root, devices, classes, crops = parse_and_check(argv)
    if args.parallel == "ddp" and len(devices) > 1:     # before this process takes memory of a GPU
        start_processes(len(devices), argv)
    processes = join_processes(devices[0])
    show_messages(rank_and_size(processes)[0])
    begin = find_start(
        resume_from=args.resume, folder=args.snapshot_dir, restore_from=args.restore_from and args.restore_from[0],
        pretrained=args.pretrained, backbone=args.backbone, processes=processes)
    workers, cores = share_cores(devices, args.num_workers)
    logger.info(cores)
    options = resolve(args, root, devices, processes, begin)
    seeds.seed_generators(args.random_seed)
    if classes is None:
        table = os.path.join(args.snapshot_dir, "classes.csv")
        classes = broadcast_from_rank0(processes, lambda: infer_classes(
            options.data, root, folders.data_flag(args), workers, table))
        classes.check_count(args.num_classes)
    dataset, validation = make_data(options.data, root, classes=classes, processes=processes, workers=workers)

    def work():
        nonlocal begin
        run = assemble(options, begin, dataset, validation, devices=devices, processes=processes, workers=workers,
                       allow_partial=args.allow_partial)
        begin = None        # frees its memory for training
        return perform(run)

    stopped = memory.catch_out_of_memory(work, lambda problem: memory.out_of_memory_error(
        problem, crops=crops, input_size=options.data.input_size, accumulate=args.accumulate, recompute=args.recompute,
        recompute_choices=find_backbone(options.network["backbone"]).recompute_choices(), amp=options.machine.amp))
    leave_processes()
    if stopped:     # the exit status says that the training is not finished
        raise command.Interrupted(stopped)


def default_precision(devices, processes, snapshot):
    """Choose --amp if the user did not. snapshot: the one to continue from, or None."""
    previous = None if snapshot is None else snapshot.config.arguments.get("amp")
    usable = gather_from_ranks(processes, previous == "off" or previous == "bf16" and cpu_computes_in_bf16())
    if devices[0].type == "cpu" and all(usable):       # exact resumption, whatever a new measurement would choose
        logger.info(f"--amp {previous}: that of the snapshot")
        return previous
    amp = shared_precision(devices, processes)
    logger.info(f"--amp {amp}: {describe_default(devices[0])}")
    return amp


def infer_classes(data, root, flag, workers, path):
    """Infer the `ClassTable` from the values of the label maps of every split or list.

    Args:
        data: `DataOptions`.
        root: of `folders.data_root`.
        flag: the flag of the label maps, used in messages.
        workers: number of processes that read.
        path: file the table would be written to, used in messages.
    """
    sets = [(data.split, data.data_list)] + [(data.val_split, data.val_list)] * bool(data.val_every)
    for split, lists in sets:        # raises for missing or damaged files before all label maps are read
        CityscapesDataset(root, split, lists)
    lists = data.data_list and [*data.data_list, *([data.val_list] if data.val_list else [])]
    return infer.infer_classes(all_label_maps(root, lists), root, flag, workers, path)


def make_data(data, root, classes, processes, workers):
    """Training samples, and the images of the quick validation or None.

    Args:
        data: `DataOptions`.
        root: of `folders.data_root`.
        classes: `ClassTable`.
        processes: `Processes` that share the run, or None.
        workers: number of processes that fill the cache.
    """
    dataset = CityscapesDataset(
        root, data.split, data.data_list, classes, seed=data.random_seed, cache=data.cache, jitter=data.jitter,
        transform=train_transform(data.input_size, data.random_scale, data.random_mirror, rotate=data.rotate,
                                  vertical_flip=data.vertical_flip, quarter_turns=data.quarter_turns, blur=data.blur))
    logger.info(dataset.describe())
    for remark in classes.remarks:
        logger.info(remark)
    dataset.check_labels()
    validation = CityscapesDataset(root, data.val_split, data.val_list, classes) if data.val_every else None
    if data.cache:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:       # one process of each host
            dataset.fill_cache(workers)
        if processes is not None:
            processes.barrier()
    return dataset, validation


def assemble(options, begin, dataset, validation, *, devices, processes, workers, allow_partial=False):
    """Make the `Run` of resolved options.

    Args:
        options: `Options`.
        begin: `Start`: the snapshot to continue from, or the weights to start from.
        dataset: training samples.
        validation: images of the quick validation, or None.
        devices: of this process.
        processes: `Processes` that share the run, or None.
        workers: number of processes that read samples.
        allow_partial: as in `load_weights`.
    """
    data, learning, machine, results = options.data, options.learning, options.machine, options.results
    config = make_config(options, dataset)
    if begin.snapshot is not None:
        resume.check_same_run(begin.snapshot.path, begin.snapshot.config, config)
    network, account = make_network(options, config, begin=begin, devices=devices, processes=processes,
                                    allow_partial=allow_partial)
    engine = make_engine(
        network, devices=devices, processes=processes, normalization=options.normalization,
        optimizer=make_optimizer(network, kind=learning.optimizer, learning_rate=learning.learning_rate,
                                 momentum=learning.momentum, weight_decay=learning.weight_decay,
                                 head_lr_factor=learning.head_lr_factor, layer_decay=learning.layer_decay),
        criterion=SegmentationCriterion(
            learning.loss_weights, IGNORE_INDEX, loss=learning.loss, ohem=bool(learning.ohem),
            ohem_thres=learning.ohem_thres, ohem_keep=learning.ohem_keep, kernels=machine.kernels,
            class_weights=learning.class_weights and broadcast_from_rank0(
                processes, lambda: class_weights(learning.class_weights, dataset, workers))),
        precision=Precision(machine.amp, devices[0], machine.opt_level), memory_format=machine.memory_format,
        freeze=learning.freeze, clip_gradient=learning.clip_gradient, ema=learning.ema, compiled=machine.compile,
        cuda_graph=machine.cuda_graph)
    index = broadcast_from_rank0(
        processes, lambda: class_index(dataset, data.cache or results.snapshot_dir, workers)) \
        if data.sampling == "class" else None
    rank, world = rank_and_size(processes)
    if rank:
        seeds.seed_generators(data.random_seed + rank)     # dropout differs from process to process
    start = 0
    if begin.snapshot is not None:
        resume.restore(begin.snapshot, engine)
        start = begin.snapshot.step
    if dataset.classes.source == infer.ASSUMED and rank == 0:
        infer.keep_table(os.path.join(results.snapshot_dir, "classes.csv"), dataset.classes)
    batches = make_loader(dataset, kind=data.sampling, index=index, seed=data.random_seed, start=start,
                          stop=learning.num_steps, batch_size=data.batch_size, parts=learning.accumulate, rank=rank,
                          world=world, workers=workers, pin_memory=devices[0].type == "cuda")
    log = resume.open_log(results.snapshot_dir, engine, config, num_steps=learning.num_steps, start=start,
                          account=account, track=results.log)
    if validation is not None:
        logger.info(f"quick validation every {plural(data.val_every, 'step')}: {validation.describe()}")
        validation = QuickValidation(engine=engine, dataset=validation, normalization=options.normalization,
                                     ignore_index=IGNORE_INDEX, workers=workers, log=log,
                                     highest=best_quick_score(results.snapshot_dir), folder=results.snapshot_dir)
    return Run(
        engine=engine, start=start, patience=data.patience,
        schedule=Schedule(learning.num_steps, learning.power, learning.warmup_steps, learning.schedule),
        accumulate=learning.accumulate, save_every=results.save_pred_every, val_every=data.val_every,
        log_every=results.log_every, panel_every=results.panel_every, log=log, validate=validation,
        snapshots=resume.SnapshotFolder(results.snapshot_dir, engine, config, results.keep), batches=batches,
        panel=lambda: draw_panel(engine, options.normalization, sample=dataset[0, 0], classes=dataset.classes,
                                 ignore_index=IGNORE_INDEX))


def make_config(options, dataset):
    """The `Config` that the snapshots of a run contain."""
    return Config(options.network | {"num_classes": dataset.classes.num_classes}, options.normalization,
                  dataset.classes.rows, options.data.input_size, arguments=options.arguments,
                  samples=dataset.fingerprint())


def make_network(options, config, begin, devices, processes, allow_partial):
    """The network on its device, and the `Account` of the weights it starts from, or None."""
    network = build_network(**config.network, recompute=options.machine.recompute).to(
        devices[0], memory_format=options.machine.memory_format)
    synchronize_norms(network, devices, processes)
    if processes is not None:
        set_group(network, new_group())     # in the default group, norms would wait for gradients on GPUs
    set_backend(network, options.machine.kernels)
    resume.check_room(options.results.snapshot_dir, network, options.learning.optimizer, options.learning.ema)
    if begin.weights is not None:
        account = load_weights(network, begin.weights, allow_partial=allow_partial)
        logger.info(account)
        return network, account
    if begin.snapshot is None:
        logger.info("no --restore-from: the network starts from random weights")
    return network, None


def perform(run):
    """Train and draw the curves. Returns the number of the signal that stopped the training early, else 0."""
    with run.log:
        try:
            stopped = train(run)
        finally:
            run.engine.release()
        if run.engine.skipped:
            run.log.info(f"{plural(run.engine.skipped, 'step')} skipped, because gradients overflowed in half "
                        "precision")
    if run.snapshots.writes:
        draw_curves(run.snapshots.folder)
    return stopped


def train(run):
    """The training loop. Steps count from 1; the snapshot of step t contains the result of t steps.

    Returns the number of the signal that stopped it early, else 0.
    """
    engine, log, num_steps = run.engine, run.log, run.schedule.num_steps
    with command.StopRequest() as stop:
        if is_over(run, stop):
            return max(gather_from_ranks(engine.processes, stop.number))
        engine.train_mode()
        window, waited, images, ending = time.monotonic(), 0.0, 0, ""
        history = History(engine, saved=run.start)
        batches = iter(run.batches)
        for step in range(run.start + 1, num_steps + 1):
            before = time.monotonic()
            parts = [next(batches) for _ in range(run.accumulate)]
            waited += time.monotonic() - before

            factor = run.schedule.factor(step - 1)
            try:
                terms, stopping = engine.step(parts, factor, stop=stop.requested)
            except NotFinite as error:
                raise history.make_error(error, run, step=step, factor=factor, parts=parts) from None
            losses = {name: terms[name] for name in engine.criterion.weights}
            loss = engine.criterion.total(losses)
            history.add(loss, step)
            images += sum(len(part["image"]) for part in parts) * (engine.processes.size if engine.processes else 1)
            log.step()

            last, logged = step == num_steps, step % run.log_every == 0 or step == num_steps
            if step == run.start + 1:
                # The first step, in which cuDNN tries algorithms, needs several times as much.
                memory.reset_peak(engine.devices[0])
                keeping, norms = count_input_keeping_norms(engine.network)
                if keeping:
                    log.info(f"{keeping} of {norms} in-place norms keep their input: half precision cannot recover it")
            if logged:
                now = time.monotonic()
                log.metric(step, {"lr": factor * engine.optimizer.defaults["lr"], "loss": loss}
                           | {f"loss_{name}": value for name, value in losses.items()}
                           | {"gradient_norm": terms["gradient_norm"], "images_per_second": images / (now - window),
                              "seconds_data": waited, "memory_bytes": memory.peak_bytes(engine.devices[0])}
                           | ({"skipped_steps": engine.skipped} if engine.skipped else {}), now - window)
            if run.panel and (step % run.panel_every == 0 or last):
                log.picture("image_truth_coarse_fine_difference", run.panel(), step)
            if run.validate and (step % run.val_every == 0 or last):
                ending, left_out = validate(run, step, stop)
                stopping = stopping or left_out
            if step % run.save_every == 0 or last or stopping or ending:
                run.snapshots.save(step, history.healthy)
                history.saved = step
                log.info(f"saved the snapshot of step {step}")
            if ending:
                log.info(f"ended after step {step}, {ending}")
                break
            if stopping:
                log.info(f"stopped after step {step}; the same command with --resume goes on")
                break
            if logged:      # pictures, validation and snapshots do not count
                window, waited, images = time.monotonic(), 0.0, 0
    return max(gather_from_ranks(engine.processes, stop.number))


def is_over(run, stop):
    """Whether a run that goes on has no steps left, or none to do before it is stopped; says which.

    A validation that a signal ended early is done before that.
    """
    start, num_steps = run.start, run.schedule.num_steps
    ending, stopping = run.patience and run.validate.lost_patience(run.patience), False
    due = run.validate and start and (start % run.val_every == 0 or start >= num_steps)
    if due and not run.validate.has_scored(start):
        ending, stopping = validate(run, start, stop)
    if stopping:
        run.log.info(f"stopped after step {start}; the same command with --resume goes on")
    elif ending or start >= num_steps:
        run.log.info(f"nothing is left to do: {plural(start, 'step')} done; {ending or f'--num-steps is {num_steps}'}")
    return bool(stopping or ending or start >= num_steps)


def validate(run, step, stop):
    """Validate the network after a step, and save it if it is the best so far.

    Args:
        run: `Run`.
        step: steps done.
        stop: `StopRequest`.

    Returns:
        Why the run ends now, or ""; and whether a signal ended the validation early: it is then done again on resume.
    """
    best = run.validate(step, lambda: stop.requested)
    if best is not None:
        run.snapshots.save_best(step, best)
    return run.validate.lost_patience(run.patience), not run.validate.has_scored(step)


if __name__ == "__main__":
    command.run(main)
