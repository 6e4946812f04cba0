"""kNN and linear heads on extracted features: pure functions.

Letters in shapes: ``n`` training pictures, ``m`` test pictures, ``d`` width. Accuracies are in per
cent.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optim

# the grid of linear heads to choose from
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
WEIGHT_DECAYS = (0.0, 1e-4, 1e-3, 1e-2)


class Features(NamedTuple):
    """Features (n, d) float32 of pictures and their labels (n,) int64."""

    values: Tensor
    labels: Tensor


# --------------------------------------------------------------------------------- kNN


@torch.no_grad()
def knn_classify(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    ks: list[int],
    classes: int,
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
    chunk: int = 65536,
    queries: int = 1024,
) -> dict[int, Tensor]:
    """Predict the class (m,) of test features (m, d) from training features (n, d), for every k.

    The k nearest neighbours by cosine vote with weight exp(cosine / temperature) (Wu et al., CVPR
    2018; DINO). Training features go to ``device`` once, ``chunk`` at a time, so that only they
    take memory in proportion to the training data. Features must be finite. A k above n counts as n.
    """
    # the neighbours so far, joined with those in each chunk
    k = min(max(ks), len(train_features))
    test = F.normalize(test_features.float(), dim=1).to(device)
    nearest, votes = test.new_empty(len(test), 0), torch.empty(len(test), 0, dtype=torch.int64, device=device)
    for features, labels in zip(train_features.split(chunk), train_labels.split(chunk)):
        features, labels = F.normalize(features.to(device).float(), dim=1), labels.to(device)
        found = [(query @ features.T).topk(min(k, len(features))) for query in test.split(queries)]
        nearest = torch.cat([nearest, torch.cat([values for values, _ in found])], dim=1)  # (m, up to 2k)
        votes = torch.cat([votes, torch.cat([labels[indices] for _, indices in found])], dim=1)
        nearest, order = nearest.topk(min(k, nearest.shape[1]))
        votes = votes.gather(1, order)

    # sum the votes by class; the largest weight is 1, which prevents overflow
    weights = ((nearest - nearest[:, :1]) / temperature).exp()
    empty = weights.new_zeros(len(test), classes)
    return {k: empty.scatter_add(1, votes[:, :k], weights[:, :k]).argmax(dim=1).cpu() for k in ks}


def evaluate_knn(
    training: Features, tests: Features, *, ks: list[int], classes: int, temperature: float, device
) -> dict:
    """The accuracy of kNN: ``top1`` for the first of ``ks``, ``top1_by_k`` for all."""
    predictions = knn_classify(*training, tests.values, ks=ks, classes=classes, temperature=temperature, device=device)
    top1 = {k: 100 * (predicted == tests.labels).double().mean().item() for k, predicted in predictions.items()}
    return dict(top1=top1[ks[0]], top1_by_k=top1, images=len(tests.labels), train_images=len(training.labels))


# --------------------------------------------------------------------------------- linear heads


def evaluate_linear(
    training: Features,
    tests: Features,
    *,
    classes: int,
    epochs: int,
    batch_size: int,
    lr: float | None = None,
    weight_decay: float | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict:
    """The accuracy of the best of 40 linear heads, one for each learning rate and weight decay.

    A given ``lr`` (whatever the batch size) or ``weight_decay`` replaces its grid. The best head is
    chosen on a tenth of the training data, then fitted again on all of it. Returns "top1" and "top5"
    on the test pictures, the numbers of "images" and "train_images", the setting "chosen" with its
    accuracy on the held-out tenth, and the same of all settings, the "grid".
    """
    # settings, and the tenth of the data to choose on
    lrs = LEARNING_RATES if lr is None else [lr]
    decays = WEIGHT_DECAYS if weight_decay is None else [weight_decay]
    settings = [(lr, decay) for lr in lrs for decay in decays]
    how = dict(classes=classes, epochs=epochs, batch_size=batch_size, seed=seed, device=device)
    x, labels = training
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    tenth = math.ceil(len(x) / 10)
    held_out, kept = order[:tenth], order[tenth:]

    # choose the best head
    heads = fit_heads(x, labels, kept, settings=settings, **how)
    scores = [100 * (logits.argmax(1) == labels[held_out]).double().mean().item() for logits in heads(x[held_out])]
    best = max(range(len(settings)), key=scores.__getitem__)

    # fit it on all training data and test it
    logits = fit_heads(x, labels, order, settings=[settings[best]], **how)(tests.values)[0]
    hits = logits.topk(top(classes)).indices == tests.labels[:, None]
    return dict(
        top1=100 * hits[:, 0].double().mean().item(),
        top5=100 * hits.any(dim=1).double().mean().item(),
        images=len(tests.labels),
        train_images=len(labels),
        chosen=dict(lr=settings[best][0], weight_decay=settings[best][1], held_out_top1=scores[best]),
        grid=[dict(lr=lr, weight_decay=decay, held_out_top1=score) for (lr, decay), score in zip(settings, scores)],
    )


def top(classes: int) -> int:
    """The number of most likely classes that count as a hit in "top-5"."""
    return min(5, classes)


def fit_heads(
    x: Tensor,
    labels: Tensor,
    rows: Tensor,
    *,
    classes: int,
    settings: list[tuple[float, float]],
    epochs: int,
    batch_size: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> Callable[[Tensor], Tensor]:
    """Train linear heads on ``rows`` of the features (n, d) at once, one for each of ``settings``.

    ``settings`` are pairs of learning rate and weight decay. Features are standardised. Each head
    has its own SGD with Nesterov momentum; all have the same batches, cosine schedule and
    cross-entropy. Returns the function from features (m, d) to logits (heads, m, classes).
    """
    # standardise with all features, including those outside rows: no labels are used
    mean, std = x.mean(0).to(device), x.std(0).clamp(min=1e-6).to(device)

    # a head and a parameter group for each setting
    heads = [nn.Linear(x.shape[1], classes, device=device) for _ in settings]
    for head in heads:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    groups = [
        dict(params=list(head.parameters()), lr=lr, peak=lr, weight_decay=decay)
        for head, (lr, decay) in zip(heads, settings)
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)

    def logits(x: Tensor) -> Tensor:  # (m, d) to (heads, m, classes): one product for all heads
        weight, bias = (torch.cat([getattr(head, name) for head in heads]) for name in ("weight", "bias"))
        x = F.linear((x.to(device) - mean) / std, weight, bias)
        return x.unflatten(1, (len(heads), classes)).transpose(0, 1)

    # train all heads on the same batches
    generator = torch.Generator().manual_seed(seed)
    steps_per_epoch = math.ceil(len(rows) / batch_size)
    for epoch in range(epochs):
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        for step, part in enumerate(shuffled.split(batch_size)):
            left = optim.learning_rate(epoch * steps_per_epoch + step, epochs * steps_per_epoch, 0, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = left * group["peak"]
            target = labels[part].to(device).expand(len(heads), -1)
            loss = F.cross_entropy(logits(x[part]).flatten(0, 1), target.flatten(), reduction="sum") / len(part)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def predict(x: Tensor) -> Tensor:
        return torch.cat([logits(part).cpu() for part in x.split(4096)], dim=1)

    return predict
