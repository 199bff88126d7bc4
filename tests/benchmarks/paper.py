"""ACFNet's published settings and figures beside those of a comparison: `tests.benchmarks.compare CITYSCAPES --paper`.

Published: Zhang et al., "ACFNet", ICCV 2019, arXiv 1909.09408: the mean IoU of val and test; arXiv 2007.09183, which
quotes it in a table, for the IoU of each class, on test. `SETTINGS` are those of dataset/recipes/cityscapes.txt, also
where the paper is silent.
"""

from statistics import mean

from utils.demo.local import PAPER
from utils.runs import recipes

MODEL, STEPS = "acfnet", 60000
VAL, TEST = 81.46, 81.85        # mean IoU in percent, six scales and mirror
CLASSES = dict(zip((
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"), (
    98.7, 87.1, 93.9, 60.2, 63.9, 71.1, 78.6, 81.5, 94.0, 72.9, 95.9, 88.1, 74.1, 96.5, 76.6, 89.3, 81.5, 72.1, 79.2),
    strict=True))       # IoU in percent on test
SETTINGS = {"backbone": "eca_resnet101", "input_size": [769, 769], "batch_size": 8, "learning_rate": 1e-2,
            "weight_decay": 1e-4, "momentum": 0.9, "power": 0.9, "num_steps": STEPS}


def words():
    """Flags of train.py, except the number of steps."""
    flags = list(recipes.expand([PAPER]))
    number = flags.index("--num-steps")
    return flags[:number] + flags[number + 2:]


def table(results, training):
    """The text of the table.

    Args:
        results: what `result.json` holds of each run of `MODEL`.
        training: {name: value} of the flags of train.py.

    Returns:
        Lines of settings, mean IoU and the IoU of each class; figures here are means over the runs.
    """
    protocol = results[0]["protocol"]
    rows = [("", "published", "here")]
    rows += [(name.replace("_", " "), _format(value), _format(training[name])) for name, value in SETTINGS.items()]
    rows += [("scales", "0.75 to 2.0", " ".join(f"{scale:g}" for scale in protocol["scales"])),
             ("mirror", "yes", "yes" if protocol["flip"] else "no"),
             ("mean IoU, %, val", f"{VAL:.2f}", _percent([result["mean_iou"] for result in results])),
             ("mean IoU, %, test", f"{TEST:.2f}", "")]
    measured = [result["multi_scale" if "multi_scale" in result else "single_scale"]["class_iou"] for result in results]
    rows += [(f"{name}, test / val", f"{value:.1f}", _percent([iou.get(name) for iou in measured], 1))
             for name, value in CLASSES.items()]
    width = max(len(name) for name, _, _ in rows)
    other = max(len(value) for _, value, _ in rows)
    lines = [f"{name:<{width}}   {published:>{other}}   {here}".rstrip() for name, published, here in rows]
    return "\n".join([*lines, "published settings: of the paper or, where it is silent, of "
                      "dataset/recipes/cityscapes.txt; test: by the Cityscapes server"])


def _percent(values, digits=2):
    """Format the mean of fractions, of which those that are None do not count, in percent."""
    values = [value for value in values if value is not None]
    return f"{100 * mean(values):.{digits}f}" if values else ""


def _format(value):
    return "×".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
