"""Choice of a run's network from the flags and, for what they leave open, from the file of weights."""

from dataclasses import dataclass

from utils.common.errors import UserError
from utils.common.messages import logger
from utils.ops.normalization import NORMALIZATIONS

from ..backbones.choose import choose_backbone
from ..backbones.names import BACKBONE, find_backbone
from ..build import find_model


@dataclass(frozen=True, kw_only=True)
class NetworkChoice:
    """Values of the flags that describe the network.

    None means: the value of the file of weights, or else the default. `recompute`, `freeze` and `layer_decay` concern
    only the training, `normalization` the input; the others are arguments of `build_network`, except `downsample` of
    `choose_backbone`.
    """

    model: str = "acfnet"
    acf: bool = False
    ablations: tuple = ()
    norm: str = "inplace_abn"
    activation: str = "leaky_relu"
    backbone: str | None = None
    stem: str | None = None
    downsample: str | None = None
    eca_kernels: tuple | None = None
    output_stride: int | None = None
    normalization: str | None = None
    recompute: str = "none"
    freeze: tuple = ()
    layer_decay: float | None = None

    def find_model(self):
        """Return the `Model`; raise `UserError` if the flags do not fit together."""
        try:
            return find_model(self.model, self.acf)
        except ValueError as error:
            raise UserError(f"--{error}") from None

    def check(self, *, batch_size, accumulate=1, loss_weights=None, pretrained=False, restore_from=None):
        """Raise `UserError` for flags that cannot work together, before any file is read.

        Args:
            batch_size, accumulate, loss_weights, pretrained, restore_from: values of the flags of these names.
        """
        model, backbone = self.find_model(), find_backbone(self.backbone or BACKBONE)
        if self.activation == "relu" and self.norm != "bn":
            raise UserError(f"--activation relu: expected --norm bn with it, found --norm {self.norm}")
        if batch_size // accumulate < model.min_crops:
            raise UserError(f"--batch-size {batch_size}: expected at least two crops in each part with --model "
                            f"{self.model}, found one, so that its norms after pooling would see one value per channel")
        if self.ablations and model.head != "acf":
            raise UserError(f"--ablations {' '.join(self.ablations)}: expected a --model with ACF, found {self.model}")
        if loss_weights and loss_weights.keys() != model.loss_weights.keys():
            raise UserError(f"--loss-weights: expected a factor for each of {', '.join(model.loss_weights)}, the heads "
                            f"of --model {self.model}, found {', '.join(loss_weights)}")
        if pretrained and (restore_from or not backbone.weights_by_timm):
            raise UserError("--pretrained: expected --backbone timm:NAME and no --restore-from with it, found "
                            f"{'--restore-from' if restore_from else backbone.name}")
        if self.backbone:       # otherwise the file of weights determines the backbone
            self._choose_backbone(None)
        backbone.check_training(recompute=self.recompute, freeze=self.freeze,
                                layer_decay=self.layer_decay if self.backbone else None)

    def resolve(self, weights=None):
        """Choose the values that the flags leave open, and log the network.

        Args:
            weights: `Weights` that determine them, or None.

        Returns:
            (arguments of `build_network` without the number of classes, `Normalization` of the input).

        Raises:
            UserError: if weights and flags contradict each other.
        """
        arguments = {"model": self.model, "norm": self.norm, "activation": self.activation,
                     "ablations": self.ablations, **({"acf": True} if self.acf else {}),
                     **self._choose_backbone(weights)}
        backbone = find_backbone(arguments["backbone"])
        backbone.check_training(recompute=self.recompute, freeze=self.freeze, layer_decay=self.layer_decay)
        if self.normalization:
            normalization = NORMALIZATIONS[self.normalization]
        else:
            normalization = backbone.normalization() if weights is None else weights.normalization
        logger.info(f"network: {self.model}{' with ACF' if self.acf else ''}, {backbone.name}, "
                    f"{backbone.describe(arguments)}; input {normalization.order}, mean "
                    f"{', '.join(map(str, normalization.mean))}")
        return arguments, normalization

    def _choose_backbone(self, weights):
        return choose_backbone(weights, self.backbone, stem=self.stem, downsample=self.downsample,
                               eca_kernels=self.eca_kernels, output_stride=self.output_stride)
