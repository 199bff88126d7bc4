"""Snapshots of a run: their content, and resuming a run from them."""

from pathlib import Path

from ..common import files, flags
from ..common.errors import UserError, plural
from ..common.messages import logger
from ..ops.upsampling import round_size
from ..parallel.processes import gather_from_ranks, rank_and_size
from ..runs import snapshots
from ..runs.log import NoLog, RunLog, describe_run
from . import seeds

# Flags that must not change in a resumed run: the network, how it is trained, and the sequence of samples.
SAME_RUN = ("model", "acf", "norm", "activation", "optimizer", "freeze", "ema", "split", "input_size", "batch_size",
            "random_seed", "random_mirror", "random_scale", "rotate", "vertical_flip", "quarter_turns", "blur",
            "sampling", "jitter")
# Flags that change the result but may change in a resumed run, with a message.
MAY_CHANGE = ("learning_rate", "head_lr_factor", "layer_decay", "momentum", "weight_decay", "schedule", "power",
              "warmup_steps", "num_steps", "clip_gradient", "accumulate", "loss", "loss_weights", "class_weights",
              "ohem", "ohem_thres", "ohem_keep", "amp", "opt_level")
# Values of the arguments of `build_network` that a snapshot may lack.
ABSENT = {"ablations": [], "output_stride": 8}
# Values of the flags that runs of earlier versions did not have.
OLD_DEFAULTS = {"acf": False, "optimizer": "sgd", "freeze": [], "head_lr_factor": 1.0, "warmup_steps": 0,
                "loss": "ce", "loss_weights": "fine=0.7,coarse=0.6,aux=0.4", "vertical_flip": False,
                "quarter_turns": False, "schedule": "poly"}


def content(engine, step, config):
    """Return the content of a snapshot: tensors and plain values, which can be loaded with `weights_only=True`.

    All processes must call this at the same step, as the states of their random generators are gathered.
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
        engine: of the run; the first of its processes writes.
        config: `snapshot.Config` of the run.
        keep: number of newest snapshots to keep; None for all.
    """

    def __init__(self, folder, engine, config, keep=None):
        self.folder, self.engine, self.config, self.keep = Path(folder), engine, config, keep
        self.writes = rank_and_size(engine.processes)[0] == 0

    def save(self, step, healthy=None, remove=True):
        """Save the snapshot of a step; remove: whether old ones are removed, except `healthy`, the step of one."""
        snapshot = content(self.engine, step, self.config)
        if self.writes:
            snapshots.save_step(self.folder, step, content=snapshot, keep=self.keep if remove else None,
                                healthy=healthy)

    def save_best(self, step, quick_mean_iou):
        """Save the snapshot with the best result of the quick validation."""
        snapshot = content(self.engine, step, self.config)
        if self.writes:
            snapshots.save(self.folder / snapshots.BEST, snapshot | {"quick_mean_iou": quick_mean_iou})


def check_room(folder, network, optimizer, ema):
    """Raise `UserError` if the disk has no room for a snapshot; optimizer and ema: values of these flags."""
    # Weights, optimizer state per weight, and average of the weights, in float32; all else is small.
    copies = 2 + (optimizer == "adamw") + (ema is not None)
    size = 4 * copies * sum(parameter.numel() for parameter in network.parameters())
    files.check_room(f"--snapshot-dir {folder}", folder, size, "a snapshot")


def restore(snapshot, engine):
    """Restore the state of an engine from a `Snapshot`."""
    rank, world = rank_and_size(engine.processes)
    engine.network.load_state_dict(snapshot.model)
    if engine.average is not None:
        engine.average.load_state_dict(snapshot.average)
        engine.average_updates = snapshot.average_updates
        if engine.average_updates is None:
            engine.average_updates = snapshot.step
            logger.info(f"--ema: {snapshot.path} has no count of the average's updates, as earlier versions had no "
                        f"warm-up of its decay; it continues as after {plural(snapshot.step, 'update')}")
    # Parameter groups of this run's flags, with the optimizer state of the snapshot.
    engine.optimizer.load_state_dict(engine.optimizer.state_dict() | {"state": snapshot.optimizer})
    engine.precision.load_state_dict(snapshot.scaler)
    rng = snapshot.rng
    if len(rng) == world and len(rng[rank]["cuda"]) == sum(device.type == "cuda" for device in engine.devices):
        seeds.set_random_state(rng[rank], engine.devices)
    else:
        logger.info("random generators start anew, as the snapshot has those of another number of devices: dropout "
                    "differs from an uninterrupted run, the samples do not")
    logger.info(f"resumed {snapshot.path}, {plural(snapshot.step, 'step')} done")


def loss_weights(config, heads):
    """Return the loss weights of the run of a `Config` for these heads: {head: factor}."""
    weights = flags.named_numbers((OLD_DEFAULTS | config.arguments)["loss_weights"])
    return {head: weights.get(head, 0.0) for head in heads}


def check_same_run(path, before, now):
    """Check that a snapshot belongs to this run, and log the flags that change.

    Args:
        path: of the snapshot.
        before, now: `Config` of the snapshot and of this run.

    Raises:
        UserError: if the snapshot is of another run.
    """
    for name in before.network | now.network:
        old_value, value = (config.network.get(name, ABSENT.get(name)) for config in (before, now))
        if name not in ("model", "acf", "norm", "activation", "num_classes") and old_value != value:
            raise UserError(f"--resume {path}: expected a network with {name} {value}, found {old_value}; use the same "
                            "flags to continue that run")
    if before.normalization != now.normalization:
        raise UserError(f"--resume {path}: expected an input normalized by {now.normalization.as_config()}, found "
                        f"{before.normalization.as_config()}; omit --normalization to continue that run")
    if before.classes != now.classes:
        names = [row["name"] for row in before.classes]
        raise UserError(f"--resume {path}: expected a run with the classes of this one, found another table "
                        f"({', '.join(names[:3])}{' ...' * (len(names) > 3)}); use --classes with that table to "
                        "continue that run")
    old, new = OLD_DEFAULTS | before.arguments, now.arguments
    old["loss_weights"] = flags.format_named_numbers(loss_weights(before, flags.named_numbers(new["loss_weights"])))
    if before.input_size != now.input_size == round_size(before.input_size):
        logger.info(f"--resume: from here on crops are {new['input_size']}, before they were "
                    f"{list(before.input_size)}, because earlier versions did not round the size")
        old["input_size"] = new["input_size"]
    # Older snapshots have the names of the lists, but no fingerprint of the samples.
    for name in (*SAME_RUN, *["data_list"] * (before.samples is None), *MAY_CHANGE):
        flag = f"--{name.replace('_', '-')}"
        if old.get(name) == new[name]:
            continue
        if name not in MAY_CHANGE:
            difference = (f"without {flag}, found one with {old.get(name)}" if new[name] is None else
                          f"with {flag} {new[name]}, found {old.get(name)}")
            raise UserError(f"--resume {path}: expected a run {difference}; another --snapshot-dir starts another run")
        logger.info(f"--resume: from here on {flag} {new[name]}, before it was {old.get(name)}")
    if before.samples not in (None, now.samples):
        samples_flag = "--data-list" if new["data_list"] else "--images-dir" if new.get("images_dir") else "--data-dir"
        raise UserError(f"--resume {path}: expected a run on the {now.samples['count']} pairs of image and label of "
                        f"{samples_flag}, found one on "
                        f"{before.samples['count']} pairs, with other names or in another order; another "
                        "--snapshot-dir starts another run")


def open_log(folder, engine, config, *, num_steps, start=0, account=None, track=()):
    """Open the log of a run in the first process.

    Args:
        folder: of the run.
        engine: of the run.
        config: `Config` of the run.
        num_steps, start: total number of steps, and steps done before.
        account: `Account` of the weights that the run starts from, or None.
        track: as in `RunLog`.

    Returns:
        `RunLog`; in all processes but the first `NoLog`.
    """
    folder, log = Path(folder), NoLog()
    if rank_and_size(engine.processes)[0] == 0:
        log = RunLog(folder, num_steps, start=start, description=describe_run(config.arguments, engine.devices),
                     track=track)
        if account is not None:
            files.write_json(folder / "weights.json", account.as_json())
        best = folder / snapshots.BEST
        if start == 0 and best.exists():
            logger.info(f"{best} is of an earlier run, kept as {snapshots.set_aside(best)}")
    if engine.processes is not None:
        engine.processes.barrier()      # all processes must see the same best snapshot
    return log
