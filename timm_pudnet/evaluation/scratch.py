"""The control *scratch*: training on the test group itself, accuracy against seconds.

Dimension letters: `n` images, `c h w` an image.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from timm_pudnet.adapt import StreamingCentroids, centroid_logits
from timm_pudnet.config import InputError
from timm_pudnet.devices import forked_rng, own_defaults
from timm_pudnet.evaluation.measure import accuracy_interval, group_sketch, support_features
from timm_pudnet.evaluation.metrics import mean_interval
from timm_pudnet.evaluation.protocols import GroupImages, TestGroups
from timm_pudnet.hypernet import PudNet, with_hypernet_as_saved
from timm_pudnet.target import channels_last, create_feature_model, small_maps_first
from timm_pudnet.training.episodes import ImageBank
from timm_pudnet.training.finetune import even_parts, seconds_since

RATE, BATCH_SIZE = 1e-3, 64  # of Adam; most images in a step

SETTING = (
    "scratch trains on all images of a group's classes in the support split, the predicted network gets the group's "
    'support alone; seconds are of training alone, and of sketch, weights, calibration and centroids'
)


def train_from_scratch(
    model_name: str,
    model_kwargs: Mapping[str, Any],
    images: Tensor,
    labels: Tensor,
    tested: Tensor,
    answers: Tensor,
    *,
    num_epochs: int,
    centralise: bool = False,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Trains timm's freshly initialised model by Adam, with random flips and shifts, and tests it after every epoch.

    Args:
        model_name: timm architecture.
        model_kwargs: Arguments of `timm.create_model` but `num_classes`.
        images: `[n, c, h, w]`, normalised, on the device to train on.
        labels: `[n]`, on the CPU, in `0..k-1`, every class at least once.
        tested: `[n, c, h, w]`, normalised.
        answers: Their labels.
        num_epochs: Passes over the images.
        centralise: Whether gradients are centralised (`centralise_gradients`).
        seed: Of the initial weights, the order of the images, flips and shifts.

    Yields:
        After each epoch `epoch` from 1, `seconds` of training up to there without the tests, `right`: which of the
        tested images are classified rightly, bool `[n]`, and `accuracy`: their share in percent.

    Raises:
        InputError: `num_epochs` is below 1.
    """
    if num_epochs < 1:
        raise InputError(f'num_epochs must be above zero, got {num_epochs}')
    with forked_rng(images.device):
        torch.manual_seed(seed)
        kwargs = {**model_kwargs, 'num_classes': int(labels.max()) + 1}
        model = channels_last(timm.create_model(model_name, **kwargs).to(images.device))
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    seconds, labels = 0.0, labels.to(images.device)
    for epoch in range(1, num_epochs + 1):
        started = time.perf_counter()
        with forked_rng(images.device), small_maps_first(model):
            torch.manual_seed(seed + epoch)
            model.train()
            # Parts of nearly equal size, of two images at least: one alone would have no batch statistics.
            for picks in torch.randperm(len(images)).tensor_split(even_parts(len(images), BATCH_SIZE)):
                loss = F.cross_entropy(model(_flipped_and_shifted(images[picks])), labels[picks])
                optimizer.zero_grad()
                loss.backward()
                if centralise:
                    centralise_gradients(model.parameters())
                optimizer.step()
        seconds += seconds_since(started, images.device)
        with torch.inference_mode(), small_maps_first(model):
            model.eval()
            guesses = torch.cat([model(part).argmax(1).cpu() for part in tested.split(256)])
        right = guesses == answers
        yield {'epoch': epoch, 'seconds': seconds, 'accuracy': 100 * float(right.float().mean()), 'right': right}


def centralise_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Subtracts from each weight's gradient its mean over all but the output dimension (Yong et al. 2020).

    Weights are the parameters of two or more dimensions, kernels of conv and Linear layers.
    """
    for parameter in parameters:
        if parameter.grad is not None and parameter.ndim > 1:
            parameter.grad -= parameter.grad.flatten(1).mean(1).view(-1, *[1] * (parameter.ndim - 1))


def _flipped_and_shifted(images: Tensor) -> Tensor:
    """Each image mirrored in half of the cases and shifted by up to an eighth of its side, the mean pixel around it."""
    count, _, height, width = images.shape
    mirrored = (torch.rand(count) < 0.5).to(images.device)
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    most = height // 8, width // 8
    rows, columns = (
        (torch.randint(2 * far + 1, (count, 1)) + torch.arange(side)).to(images.device)
        for far, side in zip(most, (height, width), strict=True)
    )
    padded = F.pad(images, (most[1], most[1], most[0], most[0]))
    number = torch.arange(count, device=images.device)[:, None, None]
    return padded[number, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@own_defaults()
@with_hypernet_as_saved
def compare_scratch(
    hypernet: PudNet,
    bank: ImageBank,
    groups: TestGroups,
    support_bank: ImageBank,
    count: int,
    *,
    num_epochs: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Accuracy against seconds of training from scratch, beside the predicted network, on the first groups.

    As in the paper, scratch trains on all images of the group's classes in the support bank, by Adam and by Adam with
    gradient centralisation, while the predicted network gets the group's own support. All run in this process.

    Args:
        hypernet: The hypernetwork to measure.
        bank: Gives the tested images.
        groups: Drawn with this support bank.
        support_bank: Other images of the same classes.
        count: How many groups, from the first on.
        num_epochs: Passes over the training images.
        seed: Of all that training draws.
        progress: Show a progress bar.

    Raises:
        InputError: The groups are not of these banks, are fewer than `count`, or have images without labels.

    Returns:
        A mapping that JSON can hold: `predicted` with `accuracy` and `seconds`, and for `adam` and
        `adam_centralised` the mean `curve` by epoch, `seconds_to_predicted`: where that curve first reaches the
        predicted networks' mean accuracy (None where it never does, and `reached` says so), and `seconds_ratio`, that
        over the seconds of prediction. Means have 95 % intervals over groups; with one group those of accuracies are
        over its queries and those of seconds None.
    """
    groups.check(bank, support_bank)
    if not 1 <= count <= len(groups):
        raise InputError(f'scratch is asked for {count} groups, there are {len(groups)}')
    if groups.n_unlabelled:
        raise InputError('scratch trains on labelled images: draw the groups without unlabelled ones')
    config, device = hypernet.config, hypernet.device
    with forked_rng(device):
        model = channels_last(create_feature_model(hypernet.target).to(device).eval())
    optimizers = {'adam': False, 'adam_centralised': True}
    predicted: list[tuple[Tensor, float]] = []
    curves: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in optimizers}
    trained_on = 0
    with tqdm(total=count * len(optimizers) * num_epochs, disable=not progress, unit='epoch') as bar:
        for number in range(count):
            support, query = groups.images(number, bank, support_bank, config.input, device)
            if not number:
                _predicted(hypernet, model, support, query)  # the first run warms up
            predicted.append(_predicted(hypernet, model, support, query))
            whole = TestGroups(None, groups.query, groups.conditions)
            train, _ = whole.images(number, bank, support_bank, config.input, device)
            images, tested = (torch.cat([batch for batch, _ in shown.batches()]) for shown in (train, query))
            trained_on += len(train)
            for name, centralise in optimizers.items():
                curve = []
                for point in train_from_scratch(
                    config.model_name,
                    config.model_kwargs,
                    images,
                    train.labels,
                    tested,
                    query.labels,
                    num_epochs=num_epochs,
                    centralise=centralise,
                    seed=seed,
                ):
                    curve.append(point)
                    bar.update()
                curves[name].append(curve)
    accuracy = accuracy_interval([right for right, _ in predicted])
    seconds = _seconds_interval([seconds for _, seconds in predicted])
    result: dict[str, Any] = {
        'setting': SETTING,
        'groups': count,
        'training_images': trained_on / count,
        'epochs': num_epochs,
        'rate': RATE,
        'batch_size': BATCH_SIZE,
        'predicted': {'accuracy': accuracy, 'seconds': seconds},
    }
    for name, runs in curves.items():
        curve = [
            {
                'epoch': points[0]['epoch'],
                'seconds': _seconds_interval([point['seconds'] for point in points]),
                'accuracy': accuracy_interval([point['right'] for point in points]),
            }
            for points in zip(*runs, strict=True)
        ]
        needed = next((p['seconds']['mean'] for p in curve if p['accuracy']['mean'] >= accuracy['mean']), None)
        result[name] = {
            'curve': curve,
            'reached': 'yes' if needed is not None else f'no: not within {num_epochs} epochs',
            'seconds_to_predicted': needed,
            'seconds_ratio': None if needed is None else needed / seconds['mean'],
        }
    return result


@torch.inference_mode()
def _predicted(hypernet: PudNet, model: nn.Module, support: GroupImages, query: GroupImages) -> tuple[Tensor, float]:
    """Which queries the predicted network classifies rightly, and the seconds until it could classify."""
    # Images that one batch holds are seen and normalised before the clock starts, as all are for scratch.
    support.sample  # noqa: B018
    started = time.perf_counter()
    weights = hypernet(*group_sketch(hypernet, support))
    centroids = StreamingCentroids(int(query.labels.max()) + 1)
    with small_maps_first(model):
        for features, labels in support_features(model, weights, support, hypernet.config.calibration):
            centroids.add(features, labels)
    rows = centroids.result().to(hypernet.device)
    seconds = seconds_since(started, hypernet.device)
    tested = torch.cat([model(images) for images, _ in query.batches()])
    return centroid_logits(tested, rows, 1.0, hypernet.whitening).argmax(1).cpu() == query.labels, seconds


def _seconds_interval(values: list[float]) -> dict[str, float | None]:
    found: dict[str, float | None] = dict(mean_interval(values))
    return found if len(values) > 1 else {**found, 'interval': None}
