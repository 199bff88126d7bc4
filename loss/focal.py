"""Focal loss: Lin et al., ICCV 2017, equation 4, for a softmax over classes: a term of the training loss."""

from .cross_entropy import CrossEntropy

GAMMA = 2       # the paper's


class FocalLoss(CrossEntropy):
    """Mean of -(1 - p)^γ · log p over the labeled pixels of a batch, where p is the probability of the true class.

    Arguments as in `CrossEntropy`. The class weights are the paper's α.
    """

    upsampled_sums = None       # that of cross-entropy has another gradient

    def pixel_losses(self, logits, labels):
        losses = super().pixel_losses(logits, labels)
        return losses * (1 - (-losses).exp()) ** GAMMA
