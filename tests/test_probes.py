import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

import probes


@pytest.mark.parametrize("chunk, queries", [(1000, 1000), (7, 5), (64, 1)])
def test_knn_is_that_of_scikit_learn(chunk, queries):
    centres = torch.randn(7, 16)
    labels, test_labels = torch.randint(7, (90,)), torch.randint(7, (40,))
    x, test = (centres[wanted] + 3 * torch.randn(len(wanted), 16) for wanted in (labels, test_labels))
    ours = probes.knn_classify(
        x, labels, test, ks=[1, 5, 20, 90], classes=7, temperature=0.3, chunk=chunk, queries=queries
    )
    for k in ours:
        peer = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.3))
        assert (peer.fit(x.numpy(), labels.numpy()).predict(test.numpy()) == ours[k].numpy()).all()
    assert len({tuple(predicted.tolist()) for predicted in ours.values()}) == 4  # k makes a difference


def test_knn_bears_small_temperatures_and_more_neighbours_than_pictures():
    x = torch.eye(3)
    predicted = probes.knn_classify(x, torch.tensor([2, 0, 1]), x, ks=[50], classes=3, temperature=1e-3)
    assert predicted[50].tolist() == [2, 0, 1]


def test_heads_trained_together_are_those_trained_alone():
    x, labels = torch.randn(60, 8), torch.randint(3, (60,))
    how = dict(classes=3, epochs=3, batch_size=16, seed=0)
    settings = [(0.01, 0.0), (0.1, 0.01), (10.0, 0.0)]
    rows = torch.arange(0, 60, 2)
    together = probes.fit_heads(x, labels, rows, settings=settings, **how)(x)
    labels[1::2] += 1  # of no consequence
    for logits, setting in zip(together, settings):
        torch.testing.assert_close(logits, probes.fit_heads(x, labels, rows, settings=[setting], **how)(x)[0])


def test_a_learning_rate_of_0_is_one():
    features = probes.Features(torch.randn(20, 4), torch.arange(20) % 2)
    result = probes.evaluate_linear(features, features, classes=2, epochs=1, batch_size=10, lr=0.0)
    assert {row["lr"] for row in result["grid"]} == {0.0} and len(result["grid"]) == 4


def test_a_head_finds_what_logistic_regression_finds():
    centres = torch.randn(4, 6)
    labels = torch.randint(4, (400,))
    x = 5 + 3 * (centres[labels] + 0.7 * torch.randn(400, 6))
    how = dict(classes=4, settings=[(0.1, 0.0)], epochs=100, batch_size=100, seed=0)
    logits = probes.fit_heads(x, labels, torch.arange(400), **how)(x)[0]
    peer = LogisticRegression(C=1e6, max_iter=1000).fit(x.numpy(), labels.numpy())
    assert (logits.argmax(1).numpy() == peer.predict(x.numpy())).mean() > 0.97
