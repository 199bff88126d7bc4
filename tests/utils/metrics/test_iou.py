"""Scores against cityscapesScripts' pixel-level evaluation."""

import math
import pickle

import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as official
import numpy as np
import pytest
import torch
from cityscapesscripts.helpers.labels import id2label, trainId2label
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dataset.labels import ClassTable
from utils.metrics.iou import ConfusionMatrix, InstanceIoU


def official_scores(predictions, truths):
    """Maps of label ids through the official functions. Returns ({class: IoU}, {category: IoU})."""
    args = official.args
    matrix = official.generateMatrix(args)
    for prediction, truth in zip(predictions, truths, strict=True):
        np.add.at(matrix, (truth.ravel(), prediction.ravel()), 1)
    classes = {id2label[i].name: official.getIouScoreForLabel(i, matrix, args) for i in args.evalLabels
               if not id2label[i].ignoreInEval}
    categories = {name: official.getIouScoreForCategory(name, matrix, args) for name in official.category2labels
                  if name != "void"}
    return classes, categories, official.getScoreAverage(classes, args), official.getScoreAverage(categories, args)


def equal(actual, expected):
    return (actual is None and math.isnan(expected)) or actual == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 19), st.integers(0, 19))
def test_equal_to_the_last_digit(seed, true_kinds, predicted_kinds):
    """Random maps in which some classes are absent from truth, prediction or both; void in either."""
    rng = np.random.default_rng(seed)
    classes = ClassTable.read()
    true_values = [0, 1, 4, 9, *rng.choice(classes.ids, true_kinds, replace=False)]
    predicted_values = [0, *rng.choice(classes.ids, predicted_kinds, replace=False)]
    truth_ids, predicted_ids = (rng.choice(values, (3, 9, 11)).astype(np.uint8)
                                for values in (true_values, predicted_values))
    matrix = ConfusionMatrix(19)
    for prediction, truth in zip(predicted_ids, truth_ids, strict=True):
        matrix.update(classes.encode(prediction), torch.from_numpy(classes.encode(truth)))
    scores = matrix.scores(classes.names, classes.categories)
    class_iou, category_iou, mean, category_mean = official_scores(predicted_ids, truth_ids)
    assert scores["class_iou"].keys() == class_iou.keys() and scores["category_iou"].keys() == category_iou.keys()
    assert all(equal(scores["class_iou"][name], iou) for name, iou in class_iou.items())
    assert all(equal(scores["category_iou"][name], iou) for name, iou in category_iou.items())
    assert equal(scores["mean_iou"], mean) and equal(scores["mean_category_iou"], category_mean)
    assert scores["classes_averaged"] == sum(not math.isnan(iou) for iou in class_iou.values())


def test_absent_classes_are_not_a_number_only_without_any_pixel():
    matrix = ConfusionMatrix(4)
    matrix.update(torch.tensor([0, 1, 1, 255, 9]), torch.tensor([0, 0, 255, 3, 3]))
    assert matrix.matrix.tolist() == [[1, 1, 0, 0, 0], [0] * 5, [0] * 5, [0, 0, 0, 0, 2]]
    iou = matrix.class_iou()
    assert iou[:2].tolist() == [0.5, 0.0]       # class 1 is only predicted: 0, and it counts
    assert math.isnan(iou[2]) and iou[3] == 0   # void predictions are misses
    assert matrix.mean_iou() == pytest.approx(0.5 / 3)
    assert matrix.pixel_accuracy() == 0.25


def test_nothing_seen_is_not_a_number():
    matrix = ConfusionMatrix(2)
    matrix.update(np.array([0]), np.array([255]))
    assert math.isnan(matrix.mean_iou()) and math.isnan(matrix.pixel_accuracy())
    assert matrix.scores(["a", "b"], ["a", "b"])["mean_iou"] is None


def test_a_label_beyond_the_classes_is_refused():
    with pytest.raises(ValueError, match="expected train ids 0 to 1 or 255, found 2"):
        ConfusionMatrix(2).update(np.array([0]), np.array([2]))


def test_table_order_is_the_official_train_id_order():
    assert ClassTable.read().names == [trainId2label[i].name for i in range(19)]


def official_instance_scores(truths, instances, predictions, folder):
    """The package's own pair evaluation on files."""
    args = official.args
    matrix, statistics = official.generateMatrix(args), official.generateInstanceStats(args)
    for number, maps in enumerate(zip(truths, instances, predictions, strict=True)):
        names = [folder / f"{number}_{name}.png" for name in ("labelIds", "instanceIds", "prediction")]
        for name, values in zip(names, maps, strict=True):
            Image.fromarray(values).save(name)
        official.evaluatePair(str(names[2]), str(names[0]), matrix, statistics, {}, args)
    classes = {id2label[i].name: official.getInstanceIouScoreForLabel(i, matrix, statistics, args)
               for i in args.evalLabels if not id2label[i].ignoreInEval}
    categories = {name: official.getInstanceIouScoreForCategory(name, matrix, statistics, args)
                  for name in official.category2labels if name != "void"}
    return classes, categories, official.getScoreAverage(classes, args), official.getScoreAverage(categories, args)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_instance_scores_equal_the_official_ones(tmp_path, monkeypatch, seed, images):
    """Random regions: instances of every kind, crowds (ids below 1000), ignored classes with instances."""
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)     # the package calls a name that NumPy removed
    rng = np.random.default_rng(seed)
    classes = ClassTable.read()
    truths, instances, predictions = [], [], []
    for _ in range(images):
        regions = rng.integers(0, 25, (13, 17))
        ids = rng.choice([7, 11, 24, 25, 26, 27, 28, 29, 31, 32, 33], 25)
        truth = ids[regions].astype(np.uint8)
        counted = np.where((ids >= 24) & (rng.uniform(size=25) < 0.8), ids * 1000 + np.arange(25), ids)
        instances.append(counted[regions].astype(np.uint16))
        noise = rng.choice([0, *classes.ids], truth.shape)
        predictions.append(np.where(np.isin(truth, classes.ids) & (rng.uniform(size=truth.shape) < 0.7), truth,
                                    noise).astype(np.uint8))
        truths.append(truth)
    matrix = ConfusionMatrix(19)
    ours = InstanceIoU(classes.instance_sizes, classes.train_ids, classes.categories, classes.whole_categories)
    for number in rng.permutation(images):      # the order in which processes come to them must not matter
        predicted = classes.encode(predictions[number])
        matrix.update(predicted, classes.encode(truths[number]))
        ours.update(int(number), instances[number], predicted)
    scores = ours.scores(matrix, classes.names)
    class_iiou, category_iiou, mean, category_mean = official_instance_scores(truths, instances, predictions, tmp_path)
    assert scores["class_iiou"].keys() == class_iiou.keys()
    assert all(equal(scores["class_iiou"][name], value) for name, value in class_iiou.items())
    assert all(equal(scores["category_iiou"][name], value) for name, value in category_iiou.items())
    assert equal(scores["mean_iiou"], mean) and equal(scores["mean_category_iiou"], category_mean)
    assert not math.isnan(mean)


def test_sizes_of_instances_are_the_official_ones():
    classes = ClassTable.read()
    assert {id2label[i].name: size for i, size in classes.instance_sizes.items()} == official.args.avgClassSize
    assert classes.whole_categories == {"human", "vehicle"}


def elsewhere(monkeypatch):
    """Tensors say that they are on a device that must not be waited for."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("ignore", [255, 1])
def test_counts_on_a_device_are_those_of_the_cpu(monkeypatch, ignore, dtype):
    torch.manual_seed(0)
    prediction, label = torch.randint(-1, 6, (3, 40)), torch.randint(0, 4, (3, 40))
    label[0, ::3] = ignore
    prediction, label = prediction.to(dtype), label.to(dtype)
    here, there = ConfusionMatrix(4, ignore), ConfusionMatrix(4, ignore)
    here.update(prediction, label)
    with monkeypatch.context() as patch:
        elsewhere(patch)
        for p, y in zip(prediction, label, strict=True):
            there.update(p, y)
    assert there.matrix.tolist() == here.matrix.tolist() and there.matrix.sum() == (label != ignore).sum()


def test_a_wrong_label_on_a_device_is_found_when_the_counts_are_read(monkeypatch):
    matrix, whole = ConfusionMatrix(4), ConfusionMatrix(4)
    with monkeypatch.context() as patch:
        elsewhere(patch)
        matrix.update(torch.tensor([0, 1, 2]), torch.tensor([0, 4, -1]))
        whole.add(matrix)
    sent = pickle.loads(pickle.dumps(whole))        # to another process
    for one in (matrix, whole, sent):
        with pytest.raises(ValueError, match="label: expected train ids 0 to 3 or 255, found 2 pixels of other values"):
            one.class_iou()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_a_refused_label_leaves_the_counts_as_they_were(dtype):
    matrix = ConfusionMatrix(4)
    matrix.update(torch.tensor([0, 1], dtype=dtype), torch.tensor([0, 1], dtype=dtype))
    with pytest.raises(ValueError, match="found 7 to 9"):
        matrix.update(torch.tensor([0, 1, 2], dtype=dtype), torch.tensor([0, 7, 9], dtype=dtype))
    assert matrix.matrix.diagonal().tolist() == [1, 1, 0, 0]


def test_instances_of_classes_that_a_table_has_merged():
    """Each counts with the average size of its own kind; a class of which one kind has none is left out."""
    metric = InstanceIoU({26: 10.0, 27: 40.0}, {26: 0, 27: 0, 28: 1, 7: 2}, ["vehicle", "other", "flat"], {"vehicle"})
    instances = np.array([[26001, 26001, 27001, 27001, 28001, 7]])
    prediction = np.array([[0, 2, 0, 0, 1, 2]])
    metric.update(0, instances, prediction)
    matrix = ConfusionMatrix(3)
    matrix.update(prediction, np.array([[0, 0, 0, 0, 1, 2]]))
    actual = metric.scores(matrix, ["vehicle", "other", "flat"])
    # 10 / 2 and 40 / 2 a pixel: 5 + 40 of 10 + 40 are found, and nothing else is taken for a vehicle.
    assert actual["class_iiou"] == {"vehicle": 45 / 50, "other": None, "flat": None}
    assert actual["mean_iiou"] == 45 / 50
