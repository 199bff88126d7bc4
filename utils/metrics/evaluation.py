"""One pass over a data set: predictions compared with the truth."""

from .iou import ConfusionMatrix


def score(predictor, items, num_classes, ignore_index, processes=None, seen=None):
    """Predict and count.

    Args:
        predictor: `SlidingPredictor`.
        items: {"image": (3, H, W) uint8, "label": (H, W) train ids, ...}; with processes, those of this one.
        processes: `Processes` that share the data set; the counts of all are added up.
        seen: called for every item with (item, probabilities (N, H, W), the largest of each pixel (H, W), its class
            (H, W), ConfusionMatrix of this item), each but the first by head and of the richest protocol, and the truth
            where they are; or None.

    Returns:
        {protocol: {head: ConfusionMatrix}}, the richest protocol last.
    """
    matrices = {}
    for item in items:
        truth = item["label"]
        for protocol, heads in predictor.predict(item["image"].permute(1, 2, 0)).items():
            confidence, labels = {}, {}
            for head, probabilities in heads.items():
                confidence[head], labels[head] = probabilities.max(0)
            counts = {}
            for head, predicted in labels.items():
                truth = truth.to(predicted.device)
                counts[head] = ConfusionMatrix(num_classes, ignore_index)
                counts[head].update(predicted, truth)
                matrices.setdefault(protocol, {}).setdefault(
                    head, ConfusionMatrix(num_classes, ignore_index)).add(counts[head])
        if seen is not None:
            seen(item, heads, confidence, labels, counts, truth)
    if processes is None:
        return matrices
    total = {}      # a process without images has neither protocols nor heads
    for part in processes.gather_objects(matrices):
        for protocol, heads in part.items():
            for head, matrix in heads.items():
                total.setdefault(protocol, {}).setdefault(head, ConfusionMatrix(num_classes, ignore_index)).add(matrix)
    return total
