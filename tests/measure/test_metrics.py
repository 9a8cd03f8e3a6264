"""Counts of outputs agree with timm's, with each other, and with counting by hand."""

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from timm.utils import accuracy

from ema_timm.measure.metrics import Tally


@pytest.mark.parametrize("classes", [3, 9])
def test_counts_are_timms_and_agree_with_each_other(classes):
    logits, targets = torch.randn(64, classes), torch.randint(classes, (64,))
    logits[:8] = 0.0  # ties
    counts = Tally(classes)
    for batch in (slice(0, 10), slice(10, 11), slice(11, 64)):
        counts.add(logits[batch], targets[batch])
    metrics = counts.metrics(torch.device("cpu"))
    top1, top5 = accuracy(logits, targets, topk=(1, 5))
    assert metrics.top1 == pytest.approx(float(top1))
    assert metrics.top5 == (pytest.approx(float(top5)) if classes > 5 else None)
    assert metrics.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)))
    images, correct = counts.per_class()
    confusion = counts.confusion()
    assert confusion.diagonal().tolist() == correct.tolist()
    assert confusion.sum(1).tolist() == images.tolist() == torch.bincount(targets).tolist()
    assert (metrics.images, metrics.correct) == (64, int(correct.sum()))


def test_confusion_by_hand():
    counts = Tally(3)
    counts.add(torch.tensor([[1.0, 2, 3], [3, 2, 1], [1, 3, 2]]), torch.tensor([0, 0, 1]))
    assert counts.confusion().tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]


def test_balanced_accuracy_is_the_mean_recall_of_the_classes_that_have_images():
    targets = torch.tensor([0] * 8 + [1] * 2)  # no image of class 2
    predicted = torch.tensor([0] * 8 + [0, 1])
    counts = Tally(3)
    counts.add(torch.nn.functional.one_hot(predicted, 3).float(), targets)
    metrics = counts.metrics(torch.device("cpu"))
    assert metrics.top1 == pytest.approx(90.0)
    assert metrics.balanced_accuracy == pytest.approx(75.0)
    assert metrics.balanced_accuracy == pytest.approx(
        100 * balanced_accuracy_score(targets, predicted)
    )
