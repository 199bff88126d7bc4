"""How much leaky ReLU (0.01), which in-place norms need, shifts the features of weights trained with ReLU.

    python -m tests.benchmarks.leaky WEIGHTS.pth

Photographs that scikit-image ships, through the file's backbone with either activation: the relative difference of each
stage's output, ‖leaky - relu‖ / ‖relu‖, and how often both give the same most probable ImageNet class.
"""

import torch
import torch.nn.functional as F
from skimage import data

from networks.backbones.names import build_backbone
from networks.weights.start import read_weights
from utils.common import flags


def main():
    parser = flags.Parser(description=__doc__)
    parser.add_argument("weights")
    weights = read_weights(parser.parse_args().weights)
    actual = weights.structure
    state = {key.removeprefix("backbone."): value for key, value in weights.state.items()}
    classifier = {key: state.pop(f"fc.{key}").float() for key in ("weight", "bias") if f"fc.{key}" in state}
    networks = {}
    for activation in ("relu", "leaky_relu"):
        networks[activation] = build_backbone(actual["backbone"], "bn", activation, actual["stem"],
                                              actual["average_downsample"], actual["eca_kernels"], 32)
        networks[activation].load_state_dict(state)
        networks[activation].eval()
    shifts, same, count = [[] for _ in range(4)], 0, 0
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        image = torch.from_numpy(getattr(data, name)().copy()).permute(2, 0, 1)[None].float()
        image = F.interpolate(image, size=(256, 320), mode="bilinear", antialias=True)
        with torch.no_grad():
            relu, leaky = (networks[a](weights.normalization(image)) for a in ("relu", "leaky_relu"))
        for values, a, b in zip(shifts, relu, leaky, strict=True):
            values.append(float((b - a).norm() / a.norm()))
        if classifier:
            tops = [(maps[-1].mean((2, 3)) @ classifier["weight"].T + classifier["bias"]).argmax()
                    for maps in (relu, leaky)]
            same, count = same + int(tops[0] == tops[1]), count + 1
    for stage, values in enumerate(shifts, 1):
        print(f"stage {stage}: {100 * sum(values) / len(values):.1f} % ({100 * min(values):.1f} to "
              f"{100 * max(values):.1f} over {len(values)} photographs)")
    if count:
        print(f"the same most probable class in {same} of {count}")


if __name__ == "__main__":
    main()
