"""Train ACFNet.

The paper's setting, four GPUs:

    python train.py --data-dir CITYSCAPES --random-mirror --random-scale --restore-from dataset/WEIGHTS.pth \
        --gpu 0,1,2,3 --learning-rate 1e-2 --input-size 769,769 --weight-decay 1e-4 --batch-size 8 \
        --num-steps 60000

With OHEM add: --ohem 1 --ohem-thres 0.7 --ohem-keep 100000
Go on after an interruption: the same command and --resume
A process for each GPU: the same command with torchrun --nproc_per_node 4 in place of python, or --parallel ddp
"""

import argparse
import math
import os
import sys
import time

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from dataset.cityscapes import CityscapesDataset, EpochSampler
from dataset.labels import ClassTable
from dataset.transforms import train_transform
from libs import backend
from libs.abn import NORMS, layers_that_keep_their_input
from loss.criterion import WEIGHTS, SegmentationCriterion, upsample
from networks import ACTIVATIONS, BACKBONES, MODELS, build_network
from networks.pretrained import load_weights
from networks.resnet import CHECKPOINTS
from utils import checkpoint, cli, visualize
from utils.cli import UserError
from utils.distributed import (
    DataParallel,
    join_processes,
    leave_processes,
    own_device,
    processes_started,
    select_devices,
    start_processes,
    started_by_torchrun,
)
from utils.inference import Normalization
from utils.logger import NoLog, RunLog
from utils.precision import CHOICES, OPT_LEVELS, Precision


def get_parser():
    parser = cli.Parser(description="Train ACFNet.", epilog=__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", required=True,
                      help="folder with leftImg8bit/ and gtFine/, or the root of --data-list")
    data.add_argument("--data-list", help="file of \"image label\" lines, paths relative to --data-dir; "
                      "without it the folder is scanned")
    data.add_argument("--split", default="train", help="split to scan (train)")
    data.add_argument("--classes",
                      help="class table (CSV: name,id,train_id,red,green,blue[,category]); default Cityscapes")
    data.add_argument("--num-classes", type=cli.positive(int), help="checked against the class table")
    data.add_argument("--random-mirror", action="store_true", help="mirror every second sample")
    data.add_argument("--random-scale", action="store_true", help="scale samples by 0.5 to 2.0")
    data.add_argument("--input-size", type=cli.size, default=(769, 769), metavar="H,W", help="crop, pixels (769,769)")
    data.add_argument("--batch-size", type=cli.positive(int), default=8, help="images a step, over all devices (8)")
    data.add_argument("--num-workers", type=cli.not_negative(int), default=2, help="processes that read samples (2)")
    data.add_argument("--random-seed", type=cli.not_negative(int), default=1234, help="of everything random (1234)")

    net = parser.add_argument_group("network")
    net.add_argument("--model", choices=MODELS, default="acfnet", help="acfnet: with ASPP; acfnet_resnet: without; "
                     "base: ASPP without ACF (acfnet)")
    net.add_argument("--backbone", choices=BACKBONES, default="eca_resnet101", help="(eca_resnet101)")
    net.add_argument("--norm", choices=NORMS, default="inplace_abn", help="(inplace_abn)")
    net.add_argument("--activation", choices=ACTIVATIONS, default="leaky_relu",
                     help="relu needs --norm bn (leaky_relu)")
    net.add_argument("--abn-backend", choices=backend.CHOICES, default="auto",
                     help="kernels of the in-place norms: PyTorch's, the package's, or whichever fits (auto)")
    net.add_argument("--checkpoint", choices=CHECKPOINTS, default="none",
                     help="memory for time: light recomputes the expansion of each bottleneck, full groups of blocks "
                     "(none)")
    net.add_argument("--restore-from", nargs="+", metavar="FILE", help="weights to start from; without it, random ones")

    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--learning-rate", type=cli.positive(float), default=1e-2, help="of the first step (1e-2)")
    optim.add_argument("--momentum", type=cli.not_negative(float), default=0.9, help="of SGD (0.9)")
    optim.add_argument("--weight-decay", type=cli.not_negative(float), default=1e-4, help="(1e-4)")
    optim.add_argument("--power", type=cli.not_negative(float), default=0.9, help="of the poly rate (0.9)")
    optim.add_argument("--num-steps", type=cli.positive(int), default=60000, help="(60000)")
    optim.add_argument("--ohem", type=int, choices=(0, 1), default=0,
                       help="1: only hard pixels count in the fine loss (0)")
    optim.add_argument("--ohem-thres", type=cli.probability, default=0.7,
                       help="a pixel whose class has at most this probability is hard (0.7)")
    optim.add_argument("--ohem-keep", type=cli.positive(int), default=100000,
                       help="pixels kept at least, for every two images of the batch (100000)")

    run = parser.add_argument_group("machine")
    run.add_argument("--gpu", help="ids such as 0,1,2,3, or cpu; default: all visible GPUs, else the CPU")
    run.add_argument("--parallel", choices=("dp", "ddp", "none"), default="dp",
                     help="dp: threads of this process share the GPUs; ddp: a process for each, which torchrun starts "
                     "too; none: the first GPU only (dp)")
    run.add_argument("--amp", choices=CHOICES, default="off", help="mixed precision: autocast to bf16, or fp16 with a "
                     "gradient scaler; apex: NVIDIA's apex.amp of tag 25.04 or older (off)")
    run.add_argument("--opt-level", choices=OPT_LEVELS, default="O1", help="of apex (O1)")

    out = parser.add_argument_group("results")
    out.add_argument("--snapshot-dir", default="snapshots", help="(snapshots)")
    out.add_argument("--save-pred-every", type=cli.positive(int), default=5000,
                     help="steps between snapshots (5000)")
    out.add_argument("--log-every", type=cli.positive(int), default=10, help="steps between log lines (10)")
    out.add_argument("--panel-every", type=cli.positive(int), default=500,
                     help="steps between TensorBoard pictures (500)")
    out.add_argument("--resume", nargs="?", const="newest", metavar="FILE",
                     help="go on from a snapshot: of this file, or the newest in --snapshot-dir")
    return parser


class NetworkWithLoss(nn.Module):
    """The part of a step that runs on every device: uint8 images and labels in, sums and counts out.

    Its outputs are a row a device, so `nn.DataParallel` gathers scalars and no logits.
    """

    def __init__(self, network, criterion, normalization, autocast):
        super().__init__()
        self.network, self.criterion = network, criterion
        self.normalization, self.autocast = normalization, autocast

    def forward(self, images, labels):
        """images (B, 3, H, W) uint8, labels (B, H, W) → sums (1, T) float, counts (1, T) int64 of T terms."""
        with torch.autocast(images.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            outputs = self.network(self.normalization(images))
        sums = self.criterion.sums(outputs, labels)
        return (torch.stack([total for total, _ in sums.values()])[None],
                torch.stack([count for _, count in sums.values()])[None])


def step_loss(module, criterion, images, labels, processes=None):
    """Run the module on this process's images and labels.

    Returns (loss, terms): the loss to differentiate, and {name: scalar} of the whole batch over all processes.
    The criterion has a weight for each head of the network, and no other. Each term is divided by the pixels of the
    whole batch. `DistributedDataParallel` averages gradients where their sum is meant, hence the factor.
    """
    sums, counts = (rows.sum(0) for rows in module(images, labels))                 # (T,), (T,)
    world = 1
    if processes is not None:
        counts, world = processes.total(counts), processes.size
    terms = sums / counts.clamp(min=1)
    loss = criterion.total(dict(zip(criterion.weights, terms, strict=True))) * world
    shown = terms.detach() if processes is None else processes.total(terms.detach())
    return loss, dict(zip(criterion.weights, shown, strict=True))


def poly_rate(base, step, num_steps, power):
    """base · (1 - step / num_steps) ^ power, step from 0."""
    return base * (1 - step / num_steps) ** power


def snapshot(network, optimizer, precision, step, config):
    """What a snapshot holds: tensors and plain values only, so that it loads with `weights_only=True`."""
    return {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "scaler": precision.state_dict(),
            "step": step, "rng": {"torch": torch.get_rng_state()}, "config": config}


def draw_panel(network, normalization, sample, classes, device):
    """Image, truth and the result of each head, side by side: (H, W · pictures, 3) uint8."""
    network.eval()
    with torch.no_grad():
        outputs = network(normalization(sample["image"][None].to(device)))
    network.train()
    truth = sample["label"].numpy()
    maps = [upsample(outputs[name], truth.shape).argmax(1)[0].cpu().numpy() for name in ("coarse", "fine")
            if name in outputs]
    image = sample["image"].permute(1, 2, 0).numpy()
    return visualize.panel([image, classes.color(truth), *(classes.color(m) for m in maps)])


def resume(path, folder, network, optimizer, precision, config):
    """Restore a run; returns the number of steps done. `path` is a file, or "newest" for that of the folder."""
    if path == "newest":
        path, content = checkpoint.newest(folder)
        if path is None:
            print(f"--resume: no snapshot in {folder} yet, so this run starts from the beginning")
            return 0
    else:
        content = checkpoint.load_snapshot(path)
    different = [key for key in config["network"] if content["config"]["network"].get(key) != config["network"][key]]
    if different:
        raise UserError(f"--resume {path}: expected a run with the same network, found another "
                        f"{', '.join(different)}: {[content['config']['network'].get(key) for key in different]}")
    network.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    precision.load_state_dict(content.get("scaler"))
    torch.set_rng_state(content["rng"]["torch"])
    print(f"resumed {path}, {content['step']} steps done")
    return content["step"]


def check(args, sharing, classes):
    """Refuse what cannot work, before anything is read or written; sharing: devices a batch is shared by."""
    if args.batch_size % sharing:
        raise UserError(f"--batch-size {args.batch_size}: expected a multiple of the {sharing} devices that share it")
    if args.num_classes not in (None, classes.num_classes):
        raise UserError(f"--num-classes {args.num_classes}: expected the {classes.num_classes} classes of "
                        f"{classes.source}")
    if args.activation == "relu" and args.norm != "bn":
        raise UserError(f"--activation relu: expected --norm bn with it, found --norm {args.norm}")
    if args.restore_from and len(args.restore_from) > 1:
        raise UserError(f"--restore-from: expected one file, found {len(args.restore_from)} (did the shell expand "
                        f"a pattern?): {' '.join(args.restore_from)}")
    existing = checkpoint.snapshots(args.snapshot_dir)
    if existing and not args.resume:
        raise UserError(f"--snapshot-dir {args.snapshot_dir}: expected a folder without snapshots, or --resume to "
                        f"go on, found {existing[-1][1]}")
    try:
        backend.choose(args.abn_backend)
    except RuntimeError as error:
        raise UserError(f"--abn-backend: {error}") from None


def prepare_network(args, shape, config, precision, device):
    """Build network and optimiser, restore what is asked for. Returns (network, optimizer, steps done)."""
    network = build_network(**shape, recompute=args.checkpoint).to(device)
    optimizer = torch.optim.SGD(network.parameters(), args.learning_rate, args.momentum,
                                weight_decay=args.weight_decay)
    if args.norm == "inplace_abn":
        print(backend.describe())
    if args.restore_from:
        print(load_weights(network, checkpoint.load(args.restore_from[0]), args.restore_from[0]))
    elif not args.resume:
        print("no --restore-from: the network starts from random weights")
    network, optimizer = precision.prepare(network, optimizer)
    start = 0
    if args.resume:
        start = resume(args.resume, args.snapshot_dir, network, optimizer, precision, config)
    return network, optimizer, start


def share_batches(module, devices, processes):
    """Wrap the module so that several devices share each batch."""
    if processes is not None:
        print(f"{processes.size} processes share each batch, and the statistics of its norms")
        return DistributedDataParallel(module, broadcast_buffers=False)     # norms keep the same ones in all
    if len(devices) > 1:
        print(f"{len(devices)} GPUs share each batch, and the statistics of its norms")
        return DataParallel(module, device_ids=devices)
    return module


def main(argv=None):
    args = get_parser().parse_args(argv)
    devices = select_devices(args.gpu)
    if args.parallel == "ddp" and len(devices) > 1 and not started_by_torchrun():
        start_processes(len(devices), argv)
    if started_by_torchrun() or args.parallel == "none":
        devices = [own_device(devices)]
    device = devices[0]
    classes = ClassTable.read(args.classes) if args.classes else ClassTable.read()
    check(args, max(len(devices), processes_started()), classes)
    precision = Precision(args.amp, device, args.opt_level)
    processes = join_processes(device)
    rank, world = (processes.rank, processes.size) if processes else (0, 1)
    if rank:
        sys.stdout = open(os.devnull, "w")      # noqa: SIM115, the first process speaks for all
    torch.manual_seed(args.random_seed)

    scale_range = (0.5, 2.0) if args.random_scale else None
    transform = train_transform(args.input_size, scale_range, args.random_mirror)
    dataset = CityscapesDataset(args.data_dir, args.split, args.data_list, classes, transform, args.random_seed)
    print(dataset.describe())

    shape = {"model": args.model, "num_classes": classes.num_classes, "backbone": args.backbone,
             "norm": args.norm, "activation": args.activation}
    normalization = Normalization()
    config = {"network": shape, "normalization": normalization.as_config(), "classes": classes.rows,
              "input_size": list(args.input_size), "arguments": vars(args) | {"input_size": list(args.input_size)}}
    network, optimizer, start = prepare_network(args, shape, config, precision, device)
    if rank:
        torch.manual_seed(args.random_seed + rank)      # dropout differs from process to process
    weights = {head: factor for head, factor in WEIGHTS.items() if hasattr(network, head)}
    criterion = SegmentationCriterion(weights, ohem=bool(args.ohem), ohem_thres=args.ohem_thres,
                                      ohem_keep=args.ohem_keep)
    module = share_batches(NetworkWithLoss(network, criterion, normalization, precision.autocast), devices, processes)
    sampler = EpochSampler(len(dataset), args.random_seed, start * args.batch_size, args.num_steps * args.batch_size,
                           args.batch_size, rank, world)
    loader = DataLoader(dataset, args.batch_size // world, sampler=sampler, num_workers=args.num_workers,
                        pin_memory=device.type == "cuda", persistent_workers=args.num_workers > 0,
                        worker_init_fn=cli.leave_ctrl_c_to_the_parent,
                        generator=torch.Generator())    # its own: dropout goes on with what was resumed
    log = NoLog() if rank else RunLog(args.snapshot_dir, args.num_steps, start)
    train(module, network, criterion, optimizer, precision, loader, device, processes, start, args.num_steps,
          args.learning_rate, args.power, args.save_pred_every, args.log_every, args.panel_every, log,
          panel=lambda: draw_panel(network, normalization, dataset[0], classes, device),
          save=lambda step: checkpoint.save(f"{args.snapshot_dir}/{checkpoint.NAME.format(step=step)}",
                                            snapshot(network, optimizer, precision, step, config)))
    log.close()
    leave_processes()


def train(module, network, criterion, optimizer, precision, loader, device, processes, start, num_steps,
          learning_rate, power, save_every, log_every, panel_every, log, panel, save):
    """The loop. Steps count from 1; the snapshot of step t holds what t steps made."""
    network.train()
    first = processes is None or processes.rank == 0
    window, waited, images_done = time.monotonic(), 0.0, 0
    batches = iter(loader)
    with cli.StopRequest() as stop:
        for step in range(start + 1, num_steps + 1):
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked

            rate = poly_rate(learning_rate, step - 1, num_steps, power)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, terms = step_loss(module, criterion, batch["image"].to(device, non_blocking=True),
                                    batch["label"].to(device, non_blocking=True), processes)
            precision.step(loss, optimizer)
            images_done += len(batch["image"]) * (processes.size if processes else 1)
            log.step()

            if step == start + 1:
                keeping, norms = layers_that_keep_their_input(network)
                if keeping:
                    log.say(f"{keeping} of {norms} in-place norms keep their input: half precision cannot recover it")
            logged = step % log_every == 0 or step == num_steps
            if logged:
                values = {"lr": rate, "loss": criterion.total(terms).item()}
                values |= {f"loss_{name}": term.item() for name, term in terms.items()}
                if not math.isfinite(values["loss"]):
                    raise UserError(f"step {step}: expected a finite loss, found {values}; images: "
                                    f"{', '.join(batch['name'])}; a lower --learning-rate may help")
                now = time.monotonic()
                values["images_per_second"] = images_done / (now - window)
                values["seconds_data"] = waited
                values["memory_bytes"] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
                log.metric(step, values)
                window, waited, images_done = now, 0.0, 0
            stopping = stop.asked
            if processes is not None:       # all stop at the same step; asking each time would cost an exchange
                stopping = logged and bool(processes.total(torch.tensor([int(stop.asked)], device=device)))
            if first and (step % panel_every == 0 or step == num_steps):
                log.picture("image_truth_coarse_fine", panel(), step)
            if first and (step % save_every == 0 or step == num_steps or stopping):
                save(step)
                log.say(f"saved the snapshot of step {step}")
            if stopping:
                log.say(f"stopped after step {step}; the same command with --resume goes on")
                break


if __name__ == "__main__":
    cli.run(main)
