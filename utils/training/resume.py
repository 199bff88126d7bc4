"""What a snapshot takes from a run, and how a run goes on from one."""

from pathlib import Path

from ..common import files, flags
from ..common.errors import UserError, plural
from ..common.messages import logger
from ..ops.upsampling import round_size
from ..parallel.processes import gather_from_ranks, rank_and_size
from ..runs import snapshots
from ..runs.log import NoLog, RunLog, describe_run
from . import seeds

# Flags without which a snapshot belongs to another run: the network, how it learns, and the sequence of its samples.
SAME_RUN = ("model", "acf", "norm", "activation", "optimizer", "freeze", "ema", "split", "input_size", "batch_size",
            "random_seed", "random_mirror", "random_scale", "sampling", "jitter")
# Flags that change what is learnt from there on: allowed, with a message.
NEW_COURSE = ("learning_rate", "head_lr_factor", "momentum", "weight_decay", "power", "warmup_steps", "num_steps",
              "clip_gradient", "accumulate", "loss_weights", "class_weights", "ohem", "ohem_thres", "ohem_keep", "amp",
              "opt_level")
# Values of runs from before there was a flag.
BEFORE_THE_FLAG = {"acf": False, "optimizer": "sgd", "freeze": [], "head_lr_factor": 1.0, "warmup_steps": 0,
                   "loss_weights": "fine=0.7,coarse=0.6,aux=0.4"}


def content(engine, step, config):
    """What a snapshot holds: tensors and plain values only, so that it loads with `weights_only=True`.

    To be called by all processes at the same step: each has generators of its own.
    """
    rng = gather_from_ranks(engine.processes, seeds.random_state(engine.devices))
    average = {} if engine.average is None else {"average": engine.average.state_dict(),
                                                 "average_updates": engine.average_updates}
    return {"model": engine.network.state_dict(), "optimizer": engine.optimizer.state_dict(),
            "scaler": engine.precision.state_dict(), "step": step, "rng": rng, "config": config.plain(), **average}


class SnapshotFolder:
    """Writes the snapshots of a run.

    Args:
        folder: of the run.
        engine: of all processes; the first one writes.
        config: `snapshot.Config` of the run.
        keep: how many stay, the newest; None for all.
    """

    def __init__(self, folder, engine, config, keep=None):
        self.folder, self.engine, self.config, self.keep = Path(folder), engine, config, keep
        self.writes = rank_and_size(engine.processes)[0] == 0

    def save(self, step, healthy=None, remove=True):
        """The snapshot of a step; older ones go, but for that of the step `sound` (`checkpoint.save_step`)."""
        found = content(self.engine, step, self.config)
        if self.writes:
            snapshots.save_step(self.folder, step, found, self.keep if remove else None, healthy)

    def save_best(self, step, quick_mean_iou):
        """The snapshot with the best result of the quick validation."""
        found = content(self.engine, step, self.config)
        if self.writes:
            snapshots.save(self.folder / snapshots.BEST, found | {"quick_mean_iou": quick_mean_iou})


def check_room(folder, network, optimizer, ema):
    """Raise `UserError` where the disk has no room for a snapshot; arguments as of the flags of these names."""
    # The weights, what the optimizer keeps of each, and their average; all else is small.
    copies = 2 + (optimizer == "adamw") + (ema is not None)
    files.check_room(f"--snapshot-dir {folder}", folder,
                          4 * copies * sum(parameter.numel() for parameter in network.parameters()), "a snapshot")


def restore(found, engine):
    """Put the state of a `Snapshot` into an engine."""
    rank, world = rank_and_size(engine.processes)
    engine.network.load_state_dict(found.model)
    if engine.average is not None:
        engine.average.load_state_dict(found.average)
        engine.average_updates = found.average_updates
        if engine.average_updates is None:
            engine.average_updates = found.step
            logger.info(f"--ema: {found.path} does not say how often the average was updated, as earlier versions "
                        f"had no warm-up of its decay; it goes on as after {plural(found.step, 'update')}")
    # The flags of this run, and the momentum of the other.
    engine.optimizer.load_state_dict(engine.optimizer.state_dict() | {"state": found.optimizer})
    engine.precision.load_state_dict(found.scaler)
    rng = found.rng
    if len(rng) == world and len(rng[rank]["cuda"]) == sum(device.type == "cuda" for device in engine.devices):
        seeds.set_random_state(rng[rank], engine.devices)
    else:
        logger.info("random generators start anew: the snapshot has those of another number of devices. "
                    "Dropout draws other channels than an undisturbed run; samples are the same")
    logger.info(f"resumed {found.path}, {plural(found.step, 'step')} done")


def loss_weights(config, heads):
    """{head: factor} of the run that a `Config` is of, for these heads."""
    found = flags.named_numbers((BEFORE_THE_FLAG | config.arguments)["loss_weights"])
    return {head: found.get(head, 0.0) for head in heads}


def compare(path, before, now):
    """Refuse to go on from a snapshot of another run; say which flags take another course from here on.

    before, now: `Config` of the snapshot and of this run.
    """
    for name, value in now.network.items():
        found = before.network.get(name, [] if name == "ablations" else None)
        if name not in ("model", "acf", "norm", "activation", "num_classes") and found != value:
            raise UserError(f"--resume {path}: expected a network with {name} {value}, found {found}; the same "
                            "flags go on with that run")
    if before.normalization != now.normalization:
        raise UserError(f"--resume {path}: expected an input normalized by {now.normalization.as_config()}, found "
                        f"{before.normalization.as_config()}; without --normalization the run goes on")
    if before.classes != now.classes:
        names = [row["name"] for row in before.classes]
        raise UserError(f"--resume {path}: expected a run with the classes of this one, found another table "
                        f"({', '.join(names[:3])}{' ...' * (len(names) > 3)}); --classes with that table goes on with "
                        "that run")
    old, new = BEFORE_THE_FLAG | before.arguments, now.arguments
    old["loss_weights"] = flags.plain_numbers(loss_weights(before, flags.named_numbers(new["loss_weights"])))
    if before.input_size != now.input_size == round_size(before.input_size):
        logger.info(f"--resume: from here on crops are {new['input_size']}, before they were "
                    f"{list(before.input_size)}, which earlier versions did not round")
        old["input_size"] = new["input_size"]
    # Older snapshots know the lists' names, but not what was in them.
    for name in (*SAME_RUN, *["data_list"] * (before.samples is None), *NEW_COURSE):
        flag = f"--{name.replace('_', '-')}"
        if old.get(name) == new[name]:
            continue
        if name not in NEW_COURSE:
            differ = (f"without {flag}, found one with {old.get(name)}" if new[name] is None else
                      f"with {flag} {new[name]}, found {old.get(name)}")
            raise UserError(f"--resume {path}: expected a run {differ}; another --snapshot-dir starts another run")
        logger.info(f"--resume: from here on {flag} {new[name]}, before it was {old.get(name)}")
    if before.samples not in (None, now.samples):
        samples_flag = "--data-list" if new["data_list"] else "--images-dir" if new.get("images_dir") else "--data-dir"
        raise UserError(f"--resume {path}: expected a run on the {now.samples['count']} pairs of image and label of "
                        f"{samples_flag}, found one on "
                        f"{before.samples['count']} pairs, of other names or in another order; another "
                        "--snapshot-dir starts another run")


def open_log(folder, engine, config, *, num_steps, start=0, account=None, track=()):
    """Begin the record of a run in its folder, which the first process does.

    Args:
        folder: of the run.
        engine: of the run.
        config: its `Config`.
        num_steps, start: steps in all, and done before.
        account: of the weights it starts from, or None.
        track: as in `RunLog`.

    Returns:
        `RunLog`; in all processes but the first `NoLog`.
    """
    folder, log = Path(folder), NoLog()
    if rank_and_size(engine.processes)[0] == 0:
        log = RunLog(folder, num_steps, start, describe_run(config.arguments, engine.devices), track)
        if account is not None:
            files.write_json(folder / "weights.json", account.as_json())
        best = folder / snapshots.BEST
        if start == 0 and best.exists():
            logger.info(f"{best} is of an earlier run, kept as {snapshots.set_aside(best)}")
    if engine.processes is not None:
        engine.processes.barrier()      # all must see the same best snapshot
    return log
