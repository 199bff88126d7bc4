"""Train ACFNet.

The paper's setting, four GPUs:

    python train.py --data-dir CITYSCAPES --random-mirror --random-scale --restore-from dataset/WEIGHTS.pth \
        --gpu 0,1,2,3 --learning-rate 1e-2 --input-size 769,769 --weight-decay 1e-4 --batch-size 8 \
        --num-steps 60000

With OHEM add: --ohem 1 --ohem-thres 0.7 --ohem-keep 100000
Go on after an interruption: the same command and --resume. Ctrl-C, SIGTERM and a closed terminal finish the step and
save; the exit status is then 130, 143 or 129
Several hosts: torchrun --nproc_per_node 4 ... train.py in place of python train.py
A batch too large for the memory: --accumulate 4 takes it in four parts
"""

import argparse
import os
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from dataset.cityscapes import CityscapesDataset
from dataset.labels import IGNORE_INDEX, ClassTable
from dataset.sampling import ClassSampler, EpochSampler, WeightedSampler, class_index
from dataset.transforms import one_thread, train_transform
from libs import backend
from libs.abn import NORMS, layers_that_keep_their_input
from loss.criterion import WEIGHTS, SegmentationCriterion, upsample
from networks import ACTIVATIONS, BACKBONES, MODELS, STEMS, build_network, recompute_choices
from networks.pretrained import CAFFE, choose_backbone, load_weights, read_snapshot, read_weights, weights_of
from networks.resnet import CHECKPOINTS
from utils import checkpoint, cli, memory, visualize
from utils.cli import UserError
from utils.distributed import (
    join_processes,
    leave_processes,
    own_device,
    processes_started,
    rank_and_size,
    select_devices,
    share_cores,
    share_items,
    start_processes,
    started_by_torchrun,
)
from utils.engine import Course, Engine, NetworkWithLoss, NotFinite, compile_network
from utils.inference import Normalization, SlidingPredictor, fitting_size, round_size, score
from utils.logger import METRICS, QUICK, NoLog, RunLog, about_this_run, read_lines, speak_for_all
from utils.precision import CHOICES, OPT_LEVELS, Precision, best_precision, exact_float32
from utils.replicas import DataParallel
from utils.snapshot import Config

NORMALIZATIONS = {"rgb": Normalization(), "bgr": CAFFE}


def get_parser():
    parser = cli.Parser(description="Train ACFNet.", epilog=__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data(parser)
    add_network(parser)
    add_run(parser)
    return parser


def add_data(parser):
    """Flags that say from which samples."""
    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", required=True, type=cli.path,
                      help="folder with leftImg8bit/ and gtFine/, or the root of --data-list")
    data.add_argument("--data-list", type=cli.path, nargs="+", metavar="FILE",
                      help="files of \"image label\" lines, paths relative "
                      "to --data-dir or to the list; without it the folder is scanned")
    data.add_argument("--split", type=cli.split, default="train", help="split to scan, or several with weights if "
                      "wanted: train+val, train:2+train_extra:1 (train)")
    data.add_argument("--cache", type=cli.path, metavar="DIR", help="decode images once, into arrays in this folder")
    data.add_argument("--sampling", choices=("uniform", "class"), default="uniform",
                      help="class: each crop holds a pixel of a class drawn uniformly, so that rare ones are seen "
                      "(uniform)")
    data.add_argument("--classes", type=cli.path,
                      help="class table (CSV: name,id,train_id,red,green,blue[,category]); default Cityscapes")
    data.add_argument("--num-classes", type=cli.positive(int), help="checked against the class table")
    data.add_argument("--random-mirror", action="store_true", help="mirror every second sample")
    data.add_argument("--random-scale", type=cli.scale_range, nargs="?", const=(0.5, 2.0), metavar="LO,HI",
                      help="scale samples by factors of this range; without numbers 0.5,2.0")
    data.add_argument("--jitter", type=cli.jitter, metavar="B,C,S,H", help="change brightness, contrast and saturation "
                      "by factors up to 1 ± these, and the hue by up to this turn, such as 0.4,0.4,0.4,0.05")
    data.add_argument("--input-size", type=cli.size, default=(769, 769), metavar="H,W",
                      help="crop, pixels, rounded up to 8k + 1 (769,769)")
    data.add_argument("--batch-size", type=cli.batch_size, default=8, help="images a step, over all devices (8)")
    data.add_argument("--num-workers", type=cli.num_workers,
                      help="processes that read samples, for each that trains; default: by the number of cores")
    data.add_argument("--random-seed", type=cli.random_seed, default=1234, help="of everything random (1234)")


def add_network(parser):
    """Flags that say what is learnt, and by which steps."""
    net = parser.add_argument_group("network")
    net.add_argument("--model", choices=MODELS, default="acfnet", help="acfnet: with ASPP; acfnet_resnet: without; "
                     "base: ASPP without ACF (acfnet)")
    net.add_argument("--backbone", choices=BACKBONES, help="default: that of --restore-from, else eca_resnet101")
    net.add_argument("--stem", choices=STEMS, help="first convolutions; default: that of --restore-from, else 7x7")
    net.add_argument("--downsample", choices=("strided", "average"), help="how shortcuts shrink: by a strided "
                     "convolution or average pooling; default: that of --restore-from, else strided")
    net.add_argument("--eca-kernels", type=cli.kernels, metavar="K,K,K,K", help="of stages 1 to 4; default: those of "
                     "--restore-from, else as ECANet released them")
    net.add_argument("--normalization", choices=NORMALIZATIONS, help="of the input: rgb, ImageNet's mean and "
                     "deviation; bgr, Caffe's mean; default: that of --restore-from, else rgb")
    net.add_argument("--ablations", nargs="+", choices=("norms", "fusion"), default=[], help="norms after the ACF "
                     "module's convolutions, a fusion convolution before the classifier: not in the paper (none)")
    net.add_argument("--norm", choices=NORMS, default="inplace_abn", help="(inplace_abn)")
    net.add_argument("--activation", choices=ACTIVATIONS, default="leaky_relu",
                     help="relu needs --norm bn (leaky_relu)")
    net.add_argument("--abn-backend", choices=backend.CHOICES, default="auto",
                     help="kernels of the in-place norms: PyTorch's, the package's, or whichever fits (auto)")
    net.add_argument("--checkpoint", choices=CHECKPOINTS, default="none",
                     help="memory for time: light recomputes the expansion of each bottleneck (from 50 layers on), "
                     "full groups of blocks (none)")
    net.add_argument("--restore-from", type=cli.path, nargs="+", metavar="FILE",
                     help="weights to start from, of ECANet, timm, "
                     "torchvision (also by name: ResNet101_Weights.IMAGENET1K_V2), CSAIL or a snapshot; without it, "
                     "random ones")
    net.add_argument("--allow-partial", action="store_true", help="also when less than half of the backbone's values "
                     "come from --restore-from")

    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--learning-rate", type=cli.positive(float), default=1e-2, help="of the first step (1e-2)")
    optim.add_argument("--momentum", type=cli.probability, default=0.9, help="of SGD (0.9)")
    optim.add_argument("--weight-decay", type=cli.not_negative(float), default=1e-4, help="(1e-4)")
    optim.add_argument("--power", type=cli.not_negative(float), default=0.9, help="of the poly rate (0.9)")
    optim.add_argument("--num-steps", type=cli.positive(int), default=60000, help="(60000)")
    optim.add_argument("--accumulate", type=cli.positive(int), default=1, metavar="PARTS",
                       help="take each batch in so many parts, one after the other, in the memory of one (1)")
    optim.add_argument("--ohem", type=int, choices=(0, 1), default=0,
                       help="1: only hard pixels count in the fine loss (0)")
    optim.add_argument("--ohem-thres", type=cli.probability, default=0.7,
                       help="a pixel whose class has at most this probability is hard (0.7)")
    optim.add_argument("--ohem-keep", type=cli.positive(int), default=100000,
                       help="pixels kept at least, for every two images of the batch (100000)")


def add_run(parser):
    """Flags that say on which machine, watched by what, and kept where."""
    run = parser.add_argument_group("machine")
    run.add_argument("--gpu", help="ids such as 0,1,2,3, or cpu; default: all visible GPUs, else the CPU")
    run.add_argument("--parallel", choices=("ddp", "dp", "none"), default="ddp",
                     help="ddp: a process for each GPU, which torchrun starts too; dp: threads of this process share "
                     "the GPUs, slower because they take turns to run Python; none: the first GPU only (ddp)")
    run.add_argument("--amp", choices=CHOICES, help="mixed precision: autocast to bf16, or fp16 with a gradient "
                     "scaler; apex: NVIDIA's apex.amp of tag 25.04 or older; default: bf16 where the device has "
                     "instructions for it, else fp16 on a GPU and off on a CPU; off is fp32 without TF32")
    run.add_argument("--opt-level", choices=OPT_LEVELS, default="O1", help="of apex (O1)")
    run.add_argument("--channels-last", action=argparse.BooleanOptionalAction,
                     help="keep feature maps with channels innermost; default: on a GPU yes, on the CPU no")
    run.add_argument("--compile", action="store_true", help="torch.compile the network; not with dp over several GPUs")

    val = parser.add_argument_group("quick validation, whole images at scale 1; the official number is evaluate.py's")
    val.add_argument("--val-every", type=cli.not_negative(int), default=0, metavar="STEPS",
                     help="steps between quick validations; 0: none (0)")
    val.add_argument("--val-split", type=cli.split, default="val", help="split to scan (val)")
    val.add_argument("--val-list", type=cli.path, metavar="FILE",
                     help="file of \"image label\" lines, instead of a split")

    out = parser.add_argument_group("results")
    out.add_argument("--snapshot-dir", type=cli.path, default="snapshots", help="(snapshots)")
    out.add_argument("--save-pred-every", type=cli.positive(int), default=5000,
                     help="steps between snapshots (5000)")
    out.add_argument("--keep", type=cli.positive(int), metavar="N", help="remove all snapshots but "
                     "the newest N, and never the newest from which training went on normally; default: none")
    out.add_argument("--log-every", type=cli.positive(int), default=10, help="steps between log lines (10)")
    out.add_argument("--panel-every", type=cli.positive(int), default=500,
                     help="steps between TensorBoard pictures (500)")
    out.add_argument("--resume", type=cli.path, nargs="?", const="newest", metavar="FILE",
                     help="go on from a snapshot: of this file, or the newest in --snapshot-dir")


def poly_rate(base, step, num_steps, power):
    """base · (1 - step / num_steps) ^ power, step from 0."""
    return base * (1 - step / num_steps) ** power


def snapshot(engine, step, config):
    """What a snapshot holds: tensors and plain values only, so that it loads with `weights_only=True`.

    To be called by all processes at the same step: each has generators of its own.
    """
    generators = checkpoint.random_state(engine.devices)
    rng = [generators] if engine.processes is None else engine.processes.gather_objects(generators)
    return {"model": engine.network.state_dict(), "optimizer": engine.optimizer.state_dict(),
            "scaler": engine.precision.state_dict(), "step": step, "rng": rng, "config": config.plain()}


def draw_panel(network, normalization, sample, classes, device):
    """Image, truth, the result of each head and where they differ, side by side: (H, W · pictures, 3) uint8."""
    network.eval()
    with torch.no_grad():       # not the network itself: what is compiled for training would be compiled anew
        outputs = network.forward(normalization(sample["image"][None].to(device)))
    network.train()
    truth = sample["label"].numpy()
    maps = [upsample(outputs[name], truth.shape).argmax(1)[0].cpu().numpy() for name in ("coarse", "fine")
            if name in outputs]
    pictures = [sample["image"].permute(1, 2, 0).numpy(), classes.color(truth), *(classes.color(m) for m in maps)]
    if len(maps) == 2:
        pictures.append(visualize.difference(truth, *maps, IGNORE_INDEX))
    return visualize.panel(pictures)


# Flags without which a snapshot belongs to another run: the network, and the sequence of its samples.
SAME_RUN = ("model", "norm", "activation", "split", "input_size", "batch_size", "random_seed", "random_mirror",
            "random_scale", "sampling", "jitter")
# Flags that change what is learnt from there on: allowed, and said.
NEW_COURSE = ("learning_rate", "momentum", "weight_decay", "power", "num_steps", "accumulate", "ohem", "ohem_thres",
              "ohem_keep", "amp", "opt_level")


def find_snapshot(path, folder, processes):
    """The `Snapshot` to go on from; None without any. `path` is a file, or "newest".

    The first process reads for all: hosts may share no disk.
    """
    if processes is not None:
        return processes.first(find_snapshot(path, folder, None) if processes.rank == 0 else None)
    if path == "newest":
        return checkpoint.newest(folder, partial(read_snapshot, resuming=True))
    found, existing = read_snapshot(path, resuming=True), checkpoint.snapshots(folder)
    if existing and existing[-1][0] > found.step:
        raise UserError(f"--resume {path}, {found.step} steps done: expected no later snapshot in "
                        f"--snapshot-dir {folder}, found {existing[-1][1].name}, which this run would replace")
    return found


def resume(found, engine):
    """Restore a run from a `Snapshot`; returns the number of steps done."""
    rank, world = rank_and_size(engine.processes)
    engine.network.load_state_dict(found.model)
    # The flags of this run, and the momentum of the other.
    engine.optimizer.load_state_dict(engine.optimizer.state_dict() | {
        "state": {number: {"momentum_buffer": momentum} for number, momentum in found.momentum.items()}})
    engine.precision.load_state_dict(found.scaler)
    rng = found.rng
    if len(rng) == world and len(rng[rank]["cuda"]) == sum(device.type == "cuda" for device in engine.devices):
        checkpoint.set_random_state(rng[rank], engine.devices)
    else:
        print("random generators start anew: the snapshot has those of another number of devices. "
              "Dropout draws other channels than an undisturbed run; samples are the same")
    print(f"resumed {found.path}, {found.step} steps done")
    return found.step


def compare(path, before, now):
    """Refuse to go on from a snapshot of another run; say which flags take another course from here on.

    before, now: `Config` of the snapshot and of this run.
    """
    for name, value in now.network.items():
        found = before.network.get(name)
        if name not in ("model", "norm", "activation", "num_classes") and found != value:
            raise UserError(f"--resume {path}: expected a network with {name} {value}, found {found}; the same "
                            "flags go on with that run")
    if before.normalization != now.normalization:
        raise UserError(f"--resume {path}: expected an input normalised by {now.normalization.as_config()}, found "
                        f"{before.normalization.as_config()}; without --normalization the run goes on")
    if before.classes != now.classes:
        raise UserError(f"--resume {path}: expected a run with the classes of this one, found another table")
    old, new = dict(before.arguments), now.arguments
    if before.input_size != now.input_size == round_size(before.input_size):
        print(f"--resume: from here on crops are {new['input_size']}, before they were {list(before.input_size)}, "
              "which earlier versions did not round")
        old["input_size"] = new["input_size"]
    # Older snapshots know the lists' names, but not what was in them.
    for name in (*SAME_RUN, *["data_list"] * (before.samples is None), *NEW_COURSE):
        flag = f"--{name.replace('_', '-')}"
        if old.get(name) == new[name]:
            continue
        if name not in NEW_COURSE:
            raise UserError(f"--resume {path}: expected a run with {flag} {new[name]}, found {old.get(name)}; "
                            "another --snapshot-dir starts another run")
        print(f"--resume: from here on {flag} {new[name]}, before it was {old.get(name)}")
    if before.samples not in (None, now.samples):
        raise UserError(f"--resume {path}: expected a run on the {now.samples['count']} pairs of image and label of "
                        f"{'--data-list' if new['data_list'] else '--data-dir'}, found one on "
                        f"{before.samples['count']} pairs, of other names or in another order; another "
                        "--snapshot-dir starts another run")


def check(args, devices, classes):
    """Refuse what cannot work, before anything is read or written."""
    sharing = max(len(devices), processes_started()) * args.accumulate
    if args.batch_size % sharing:
        of = f" times {args.accumulate} parts of --accumulate" if args.accumulate > 1 else ""
        raise UserError(f"--batch-size {args.batch_size}: expected a multiple of the {sharing // args.accumulate} "
                        f"devices{of} that share it")
    if args.num_classes not in (None, classes.num_classes):
        raise UserError(f"--num-classes {args.num_classes}: expected the {classes.num_classes} classes of "
                        f"{classes.source}")
    if args.activation == "relu" and args.norm != "bn":
        raise UserError(f"--activation relu: expected --norm bn with it, found --norm {args.norm}")
    if args.ablations and not MODELS[args.model]["acf"]:
        raise UserError(f"--ablations {' '.join(args.ablations)}: expected a --model with ACF, found {args.model}")
    if args.restore_from and len(args.restore_from) > 1:
        raise UserError(f"--restore-from: expected one file, found {len(args.restore_from)} (did the shell expand "
                        f"a pattern?): {' '.join(args.restore_from)}")
    if args.compile and len(devices) > 1 and args.parallel == "dp":
        raise UserError("--compile: expected one GPU or --parallel ddp, found several GPUs with --parallel dp, whose "
                        "replicas cannot share compiled code")
    if args.compile and args.checkpoint == "full":
        raise UserError("--compile: expected --checkpoint none or light with it, found full, whose recomputation "
                        "cannot be compiled")
    if args.sampling == "class" and args.data_list is None and ":" in args.split:
        raise UserError(f"--sampling class: expected a --split without weights, found {args.split}")
    if args.val_every and args.data_list and not args.val_list:
        raise UserError("--val-every: expected --val-list with --data-list, found none")
    existing = checkpoint.snapshots(args.snapshot_dir)
    if existing and not args.resume:
        raise UserError(f"--snapshot-dir {args.snapshot_dir}: expected a folder without snapshots, or --resume to "
                        f"go on, found {existing[-1][1]}")
    Precision(args.amp or "off", devices[0], args.opt_level)
    try:
        backend.choose(args.abn_backend)
    except RuntimeError as error:
        raise UserError(f"--abn-backend: {error}") from None


def prepare(args, devices, processes, precision, dataset):
    """Network and optimiser, from random weights, a file's, or a snapshot of this run.

    Returns (engine, steps done, what a snapshot says of the run, account of the file's weights or None).
    """
    classes = dataset.classes
    found = find_snapshot(args.resume, args.snapshot_dir, processes) if args.resume else None
    weights = read_weights(args.restore_from[0]) if args.restore_from and found is None else None
    if found is not None and args.restore_from:
        print("--resume: the weights are the snapshot's; --restore-from is not read")
    elif args.resume and found is None:
        print(f"--resume: no snapshot in {args.snapshot_dir} yet, so this run starts from the beginning")
    followed = weights if found is None else weights_of(found)
    shape = {"model": args.model, "num_classes": classes.num_classes, "norm": args.norm, "activation": args.activation,
             "ablations": args.ablations,
             **choose_backbone(followed, args.backbone, args.stem, args.downsample, args.eca_kernels)}
    args.backbone = shape["backbone"]       # for the record, and should the memory run out
    if args.checkpoint not in recompute_choices(args.backbone):
        raise UserError(f"--checkpoint {args.checkpoint}: expected a backbone of at least 50 layers, found "
                        f"{args.backbone}, in which it would save nothing; --checkpoint full works there")
    normalization = NORMALIZATIONS[args.normalization] if args.normalization else (
        followed.normalization if followed else Normalization())
    print(f"network: {args.model}, {shape['backbone']}, stem {shape['stem']}, "
          f"{'average' if shape['average_downsample'] else 'strided'} downsampling; input {normalization.order}, mean "
          f"{', '.join(map(str, normalization.mean))}")
    config = Config(shape, normalization, classes.rows, args.input_size, plain_values(args), dataset.fingerprint())
    if found is not None:
        compare(found.path, found.config, config)

    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    network = build_network(**shape, recompute=args.checkpoint).to(devices[0], memory_format=memory_format)
    optimizer = torch.optim.SGD(network.parameters(), args.learning_rate, args.momentum,
                                weight_decay=args.weight_decay)
    if args.norm == "inplace_abn":
        print(backend.describe())
    account = None
    if weights is not None:
        account = load_weights(network, weights, allow_partial=args.allow_partial)
        print(account)
    elif found is None:
        print("no --restore-from: the network starts from random weights")
    # A snapshot has the weights, their momentum, and whatever else is small.
    checkpoint.check_room(f"--snapshot-dir {args.snapshot_dir}", args.snapshot_dir,
                          8 * sum(parameter.numel() for parameter in network.parameters()), "a snapshot")
    network, optimizer = precision.prepare(network, optimizer)

    factors = {head: factor for head, factor in WEIGHTS.items() if hasattr(network, head)}
    criterion = SegmentationCriterion(factors, IGNORE_INDEX, bool(args.ohem), args.ohem_thres, args.ohem_keep)
    rank, _ = rank_and_size(processes)
    if rank:
        checkpoint.seed_generators(args.random_seed + rank)     # dropout differs from process to process
    if args.compile:
        compile_network(network)
    module = share_batches(NetworkWithLoss(network, criterion, normalization, precision.autocast), devices, processes)
    engine = Engine(module, network, criterion, optimizer, precision, devices, processes, memory_format)
    return engine, 0 if found is None else resume(found, engine), config, account


def share_batches(module, devices, processes):
    """Wrap the module so that several devices share each batch."""
    if processes is not None:
        print(f"{processes.size} processes share each batch, and the statistics of its norms")
        return DistributedDataParallel(module, forward_sync_buffers=False)  # norms keep the same ones in all
    if len(devices) > 1:
        print(f"{len(devices)} GPUs share each batch, and the statistics of its norms")
        return DataParallel(module, device_ids=devices)
    return module


def start_worker(worker):
    """A process that reads samples: it leaves signals to the parent, and other cores to other workers."""
    cli.leave_signals_to_the_parent(worker)
    one_thread()


def make_sampler(args, dataset, shares, workers, processes):
    """Which sample comes when; shares: seed, first and last entry, and which of them are this process's."""
    if args.sampling == "class":
        rank, _ = rank_and_size(processes)
        index = None if rank else class_index(dataset, args.cache or args.snapshot_dir, workers)
        return ClassSampler(index if processes is None else processes.first(index), *shares)
    if dataset.weights:
        return WeightedSampler(dataset.parts, dataset.weights, *shares)
    return EpochSampler(len(dataset), *shares)


def quick_validation(args, engine, normalization, classes, workers, log):
    """A function of the step that scores the network on the validation images, which all processes share.

    It returns the mean IoU of the fine head if it has never been better in this folder, else None. Quick: whole
    images, scale 1, no mirror.
    """
    dataset = CityscapesDataset(args.data_dir, args.val_split, args.val_list, classes)
    processes = engine.processes
    loader = DataLoader(share_items(dataset, processes), batch_size=None, num_workers=workers,
                        worker_init_fn=cli.leave_signals_to_the_parent)
    # Not the network itself: compiled code would be compiled anew for every size of image.
    predictor = SlidingPredictor(engine.network.forward, None, normalization=normalization, device=engine.devices[0],
                                 autocast=engine.precision.autocast)
    best = Path(args.snapshot_dir, checkpoint.BEST)
    highest = read_snapshot(best).quick_mean_iou if best.exists() else -1.0
    if processes is not None:
        highest = processes.first(highest)      # all must agree when to save
    print(f"quick validation every {args.val_every} steps: {dataset.describe()}")

    def validate(step):
        nonlocal highest
        engine.network.eval()
        matrices = score(predictor, loader, classes.num_classes, IGNORE_INDEX, processes)["single_scale"]
        engine.network.train()
        scores = {head: matrix.scores(classes.names, classes.categories) for head, matrix in matrices.items()}
        log.quick_validation(step, scores)
        if (scores["fine"]["mean_iou"] or 0.0) <= highest:
            return None
        highest = scores["fine"]["mean_iou"] or 0.0
        return highest

    return validate


def explain(found, args, crops):
    """The `UserError` for too little memory. found: the error's first words; crops: of a pass on one device."""
    pixels = args.input_size[0] * args.input_size[1]

    def kept(recompute, amp, share=1):
        """" 1.2 GB", or nothing for a network that nobody has counted."""
        size = memory.bytes_a_pixel(model=args.model, backbone=args.backbone, norm=args.norm, recompute=recompute,
                                    amp=amp)
        return f" {size * crops * pixels / share / 1e9:.1f} GB" if size else ""

    now = kept(args.checkpoint, args.amp)
    choices = [f"--checkpoint {recompute}{kept(recompute, args.amp)}"
               for recompute in recompute_choices(args.backbone)
               if CHECKPOINTS.index(recompute) > CHECKPOINTS.index(args.checkpoint)]
    if args.amp == "off":
        choices.insert(0, f"--amp bf16{kept(args.checkpoint, 'bf16')}")
    if crops > 1:
        choices.append(f"--accumulate {2 * args.accumulate}{kept(args.checkpoint, args.amp, 2) or ' half as much'}")
    choices.append("a smaller --input-size less in proportion to its pixels")
    what = f"about{now}" if now else "most of the memory"
    return UserError(f"out of memory: expected room for {crops} crops of {args.input_size[0]}×{args.input_size[1]} on "
                     f"a device, which keep {what} for the backward pass besides the weights, found: "
                     f"{found}; what helps, and what it would keep: {', '.join(choices)}")


def plain_values(args):
    """The flags' values as a snapshot and JSON can hold them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(args).items()}


def prepare_device(args, amp, device):
    """What this process sets for its device; it says what was not asked for."""
    on_gpu = device.type == "cuda"
    if args.channels_last is None:
        args.channels_last = on_gpu
        print("--channels-last: the default on a GPU, whose convolutions are made for it" if on_gpu else
              "--no-channels-last: the default on a CPU, where it makes no difference")
    if on_gpu:
        torch.cuda.set_device(device)               # for the thread that pins memory, too
        torch.backends.cudnn.benchmark = True       # crops are of one size, for which it finds the fastest kernels
    exact_float32(amp, device)


def main(argv=None):
    args = get_parser().parse_args(argv)
    devices = select_devices(args.gpu)
    classes = ClassTable.read(args.classes) if args.classes else ClassTable.read()
    if started_by_torchrun() or args.parallel == "none":
        devices = [own_device(devices)]
    device = devices[0]
    check(args, devices, classes)
    if args.parallel == "ddp" and len(devices) > 1:     # before this process uses a GPU, whose memory that would take
        start_processes(len(devices), argv)
    amp = args.amp or best_precision(device)
    precision = Precision(amp, device, args.opt_level)
    processes = join_processes(device)
    speak_for_all(processes)
    prepare_device(args, amp, device)
    args.input_size = fitting_size(args.input_size, "crops")
    workers, cores = share_cores(devices, args.num_workers)
    print(cores)
    if args.amp is None:
        print(f"--amp {amp}: the best that the {'CPU' if device.type == 'cpu' else 'GPU'} has instructions for")
        args.amp = amp
    checkpoint.seed_generators(args.random_seed)

    transform = train_transform(args.input_size, args.random_scale, args.random_mirror)
    dataset = CityscapesDataset(args.data_dir, args.split, args.data_list, classes, transform, args.random_seed,
                                cache=args.cache, jitter=args.jitter)
    print(dataset.describe())
    dataset.check_labels()
    if args.cache:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:       # one process of each host
            dataset.fill_cache(workers)
        if processes is not None:
            processes.wait()
    crops = args.batch_size // args.accumulate // max(len(devices), processes_started())
    stopped = memory.explained(lambda: run(args, devices, processes, precision, dataset, workers),
                               lambda found: explain(found, args, crops))
    leave_processes()
    if stopped:     # after everything else: nothing that waits for a finished training may follow
        raise cli.Interrupted(stopped)


def run(args, devices, processes, precision, dataset, workers):
    """Train: this process's part of it, on these devices. Returns the signal that stopped it early, else 0."""
    device, classes = devices[0], dataset.classes
    rank, world = rank_and_size(processes)
    engine, start, config, account = prepare(args, devices, processes, precision, dataset)
    network, normalization = engine.network, config.normalization

    part = args.batch_size // args.accumulate       # crops of a pass, over all devices
    shares = (args.random_seed, start * args.batch_size, args.num_steps * args.batch_size, part, rank, world)
    loader = DataLoader(dataset, part // world, sampler=make_sampler(args, dataset, shares, workers, processes),
                        num_workers=workers, pin_memory=device.type == "cuda", persistent_workers=workers > 0,
                        prefetch_factor=4 if workers else None, worker_init_fn=start_worker,
                        generator=torch.Generator())    # its own: dropout goes on with what was resumed

    def save(step, best=None, keep=args.keep, sound=None):
        content = snapshot(engine, step, config)
        if rank == 0 and best is None:
            checkpoint.save_step(args.snapshot_dir, step, content, keep, sound)
        elif rank == 0:
            checkpoint.save(Path(args.snapshot_dir, checkpoint.BEST), content | {"quick_mean_iou": best})

    about = about_this_run(config.arguments, devices)
    with NoLog() if rank else RunLog(args.snapshot_dir, args.num_steps, start, about) as log:
        if account is not None and rank == 0:
            checkpoint.write_json(Path(args.snapshot_dir, "weights.json"), account.as_json())
        best = Path(args.snapshot_dir, checkpoint.BEST)
        if start == 0 and rank == 0 and best.exists():
            log.say(f"{best} is of an earlier run, kept as {checkpoint.set_aside(best)}")
        if processes is not None:
            processes.wait()        # all must have the same record to beat
        stopped = train(
            engine, loader, start, args.num_steps, args.accumulate, args.learning_rate, args.power,
            args.save_pred_every, args.val_every, args.log_every, args.panel_every, log, save,
            panel=lambda: draw_panel(network, normalization, dataset[0, 0], classes, device),
            validate=args.val_every and quick_validation(args, engine, normalization, classes, workers, log))
        if engine.skipped:
            log.say(f"{engine.skipped} steps were left out, because gradients overflowed in half precision")
    metrics, quick = ([] if rank else read_lines(Path(args.snapshot_dir, name)) for name in (METRICS, QUICK))
    if metrics:
        try:
            visualize.training_curves(Path(args.snapshot_dir, "curves.png"), metrics, quick)
        except (OSError, UserError) as error:       # a full disk: the snapshots are what counts
            print(f"curves.png is missing: {error}")
    return stopped


def train(engine, loader, start, num_steps, accumulate, learning_rate, power, save_every, val_every, log_every,
          panel_every, log, save, panel, validate):
    """The loop. Steps count from 1; the snapshot of step t holds what t steps made.

    Returns the number of the signal that stopped it early, else 0.
    """
    if start >= num_steps:
        log.say(f"nothing is left to do: {start} steps are done, --num-steps is {num_steps}")
    network, device = engine.network.train(), engine.devices[0]
    window, waited, images = time.monotonic(), 0.0, 0
    course, first_norm = Course(), engine.weight_norm()
    saved, sound = start, 0     # steps of the newest snapshot, and of the newest after which the loss was normal
    batches = iter(loader)
    with cli.StopRequest() as stop:
        for step in range(start + 1, num_steps + 1):
            asked = time.monotonic()
            parts = [next(batches) for _ in range(accumulate)]
            waited += time.monotonic() - asked

            rate = poly_rate(learning_rate, step - 1, num_steps, power)
            logged = step % log_every == 0 or step == num_steps
            try:
                terms, stopping = engine.step(parts, rate, asked=stop.asked)
            except NotFinite as error:
                names = [name for part in parts for name in part["name"]]
                if engine.processes is not None:
                    names = sum(engine.processes.gather_objects(names), [])
                raise UserError(f"step {step}: expected a finite {error.what}, found {error.terms} at the learning "
                                f"rate {rate:.3g}; images: {', '.join(names)}; "
                                + diverged(engine, course, error, first_norm, step - 1, saved, sound,
                                           save)) from None
            losses = {name: terms[name] for name in engine.criterion.weights}
            loss = engine.criterion.total(losses)
            if course.add(loss) and saved == step - 1:
                sound = saved
            images += sum(len(part["image"]) for part in parts) * (engine.processes.size if engine.processes else 1)
            log.step()

            if step == start + 1:
                keeping, norms = layers_that_keep_their_input(network)
                if keeping:
                    log.say(f"{keeping} of {norms} in-place norms keep their input: half precision cannot recover it")
            if logged:
                now = time.monotonic()
                log.metric(step, {"lr": rate, "loss": loss}
                           | {f"loss_{name}": value for name, value in losses.items()}
                           | {"gradient_norm": terms["gradient_norm"], "images_per_second": images / (now - window),
                              "seconds_data": waited, "memory_bytes": memory.peak_bytes(device)}
                           | ({"skipped_steps": engine.skipped} if engine.skipped else {}), now - window)
            if step % panel_every == 0 or step == num_steps:
                log.picture("image_truth_coarse_fine_difference", panel(), step)
            if validate and (step % val_every == 0 or step == num_steps):
                best = validate(step)
                if best is not None:
                    save(step, best)
            if step % save_every == 0 or step == num_steps or stopping:
                save(step, sound=sound)
                saved = step
                log.say(f"saved the snapshot of step {step}")
            if stopping:
                log.say(f"stopped after step {step}; the same command with --resume goes on")
                return stop.number if engine.processes is None else max(engine.processes.gather_objects(stop.number))
            if logged:      # what else was done is not the step's time
                window, waited, images = time.monotonic(), 0.0, 0
    return 0


def diverged(engine, course, error, first_norm, done, saved, sound, save):
    """Save the state before a step that was not finite, if it is worth it, and remove nothing.

    Args:
        course: the losses of the steps before.
        error: `NotFinite` of the step, which has left the state as it was.
        first_norm: of the weights, when this process began to train.
        done: steps that made the state.
        saved, sound: step of the newest snapshot, and of the newest whose loss was normal; 0 for none.
        save: as in `train`.

    Returns what the user can do, for the end of a sentence.
    """
    if error.what == "gradient":
        healthy = course.add(engine.criterion.total({name: error.terms[name] for name in engine.criterion.weights}))
    else:       # the batch may be at fault, if the step before was normal and has not blown the weights up
        healthy = course.normal and engine.weight_norm() < 10 * first_norm
    if healthy:
        if saved != done:
            save(done, keep=None)
        return f"the state before is the snapshot of step {done}: a lower --learning-rate with --resume may help"
    lost = "" if saved == done else ", so that state is not saved"
    elsewhere = " and another --snapshot-dir" if saved > sound else ""
    if sound:
        return (f"training had left its course before{lost}; the newest snapshot that trained on normally is "
                f"{checkpoint.NAME.format(step=sound)}: --resume with that file{elsewhere} and a lower "
                "--learning-rate may help")
    return (f"training had left its course before{lost}, and no snapshot of this start trained on normally: a lower "
            f"--learning-rate from the beginning{elsewhere} may help")


if __name__ == "__main__":
    cli.run(main)
