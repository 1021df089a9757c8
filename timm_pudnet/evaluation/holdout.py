"""A first number for one's own images: some are kept aside, and the predicted model is tested on them.

Dimension letters: `n` images, `p` those of them on a map, `c h w` an image, `d` features, `k` classes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_pudnet.adapt import StreamingCentroids, centroid_logits, ridge_classifier
from timm_pudnet.evaluation.metrics import share_interval
from timm_pudnet.images import ImageSource, channel_statistics
from timm_pudnet.predict import in_memory
from timm_pudnet.sketch import content_keys

MOST_MISTAKES = 24
MOST_ON_A_MAP = 1000
MOST_RAW_PIXELS = 64  # a side
MOST_RIDGE_PIXELS, MOST_RAW_IMAGES = 32, 2000  # of a ridge of raw pixels


def split_held_out(source: ImageSource, share: float, seed: int = 0) -> tuple[ImageSource, ImageSource | None]:
    """Splits a labelled set, class by class, into the images that are used and those that are kept aside.

    A class keeps at least one image in use; a class of two or more gives at least one to the test.

    Returns:
        The two parts; the second is None where nothing is kept aside: no labels, a stream, or a share of 0.
    """
    if source.labels is None or source.is_stream or share == 0:
        return source, None
    generator = torch.Generator().manual_seed(seed)
    used, tested = [], []
    for label in source.labels.unique().tolist():
        members = (source.labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        count = min(len(members) - 1, max(1, round(share * len(members))))
        tested += members[:count].tolist()
        used += members[count:].tolist()
    if not tested:
        return source, None
    return source.subset(sorted(used)), source.subset(sorted(tested))


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutTest:
    """How a model did on the images kept aside.

    Args:
        labels: Class of each image, `[n]`.
        guesses: The model's, `[n]`.
        confidences: Softmax of its output for that class, `[n]`.
        names: Of the images.
        mistakes: Places in `labels` of the most confident mistakes, those first, and the images, uint8 `[c, h, w]`.
        places: Those of the images whose features are kept, `[p]`.
        features: Of these, `[p, d]`.
        num_classes: `k`.
        right_raw: How many of the images raw pixels classify rightly, by the better of the heads (`raw_head`).
        raw_head: `nearest class mean`, `ridge regression`, or where that is of fewer images than gave the weights
            `ridge regression of 1,974 images`.
        repeated: How many of the images are, pixel by pixel, among those that gave the weights too.
        seconds: Of the model over all of them.
    """

    labels: Tensor
    guesses: Tensor
    confidences: Tensor
    names: list[str]
    mistakes: list[tuple[int, Tensor]]
    places: Tensor
    features: Tensor
    num_classes: int
    right_raw: int
    raw_head: str
    repeated: int
    seconds: float

    @property
    def right(self) -> int:
        """How many images the model classifies rightly."""
        return int((self.guesses == self.labels).sum())

    @property
    def by_largest(self) -> str:
        """What always naming the largest class reaches, in words, where that is well above chance."""
        share = float(self.labels.bincount().max()) / len(self.labels)
        return f'; {share:.1%} by always naming the largest class' if share > 1.5 / self.num_classes else ''

    def lines(self) -> Iterator[str]:
        """The accuracy beside raw pixels and chance, with 95 % intervals, and what is wrong with the test."""
        total = len(self.labels)
        for name, what, count in (
            ('Accuracy  ', 'on the images kept aside', self.right),
            ('Raw pixels', f'by {self.raw_head}', self.right_raw),
        ):
            low, high = share_interval(count, total)
            yield f'{name} {count / total:6.1%} {what} ({count} of {total}; 95 % interval {low:.1%} to {high:.1%})'
        yield f'Chance     {1 / self.num_classes:6.1%}{self.by_largest}'
        if self.repeated:
            yield f'Repeated   {self.repeated} of the images kept aside are among the others too: {REPEATED}'


REPEATED = 'the accuracy is too good by them; remove the copies'


@torch.inference_mode()
def measure_held_out(
    model: nn.Module, used: ImageSource, tested: ImageSource, unlabelled: ImageSource | None = None
) -> HeldOutTest:
    """Tests a model with a classifier on images that gave it nothing; `used` are those that did, and `unlabelled`."""
    num_classes = int(model.num_classes)  # type: ignore[arg-type]
    raw, keys = _RawPixels(num_classes, len(used)), set()
    for images, labels in used.batches():
        assert labels is not None
        raw.add(images, labels)
        keys.update(content_keys(images).tolist())
    for images, _ in () if unlabelled is None else unlabelled.batches():
        keys.update(content_keys(images).tolist())
    heads = raw.heads()
    every = -(-len(tested) // MOST_ON_A_MAP)
    truth, guesses, confidences, places, features = [], [], [], [], []
    mistakes: list[tuple[float, int, Tensor]] = []
    right_raw = dict.fromkeys(heads, 0)
    repeated, total, seconds = 0, 0, 0.0
    for images, labels in tested.batches():
        assert labels is not None
        scores, rows, spent = _answers(model, images)
        seconds += spent
        confidence, guess = scores.softmax(1).max(1)
        for name, head in heads.items():
            right_raw[name] += int((head(images) == labels).sum())
        repeated += sum(key in keys for key in content_keys(images).tolist())
        wrong = [(float(confidence[i]), total + i, images[i]) for i in (guess != labels).nonzero().flatten().tolist()]
        mistakes = sorted([*mistakes, *wrong], key=lambda one: -one[0])[:MOST_MISTAKES]
        mistakes = [(sure, place, image.clone()) for sure, place, image in mistakes]  # or each keeps its batch
        kept = torch.arange(len(labels))
        kept = kept[(total + kept) % every == 0]
        places.append(total + kept)
        features.append(rows[kept])
        truth.append(labels)
        guesses.append(guess)
        confidences.append(confidence)
        total += len(labels)
    unread = {name for name, _ in tested.skipped}
    return HeldOutTest(
        labels=torch.cat(truth),
        guesses=torch.cat(guesses),
        confidences=torch.cat(confidences),
        names=[name for name in map(tested.name, range(len(tested))) if name not in unread],
        mistakes=[(place, as_pixels(image, tested)) for _, place, image in mistakes],
        places=torch.cat(places),
        features=torch.cat(features),
        num_classes=num_classes,
        right_raw=max(right_raw.values()),
        raw_head=max(right_raw, key=right_raw.__getitem__),
        repeated=repeated,
        seconds=seconds,
    )


class _RawPixels:
    """What labelled images tell without a network; `num_images` of them are to come."""

    def __init__(self, num_classes: int, num_images: int) -> None:
        self.num_classes = num_classes
        self.means = StreamingCentroids(num_classes)
        self.sample: list[tuple[Tensor, Tensor]] = []  # evenly of each class, at least one, for the ridge
        self.each, self.seen = -(-num_images // MOST_RAW_IMAGES), torch.zeros(num_classes, dtype=torch.long)

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Takes a batch in."""
        self.means.add(raw_pixels(images), labels)
        places = torch.zeros_like(labels)  # of each image among those of its class
        for label in labels.unique().tolist():
            members = (labels == label).nonzero().flatten()
            places[members] = self.seen[label] + torch.arange(len(members))
            self.seen[label] += len(members)
        chosen = places % self.each == 0
        self.sample.append((raw_pixels(images[chosen], MOST_RIDGE_PIXELS), labels[chosen]))

    def heads(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Classifiers of images by name.

        Raises:
            InputError: No image of a class could be read.
        """
        centroids = self.means.result()
        rows, classes = map(torch.cat, zip(*self.sample, strict=True))
        heads: dict[str, Callable[[Tensor], Tensor]] = {
            'nearest class mean': lambda images: centroid_logits(raw_pixels(images), centroids, 1.0).argmax(1)
        }
        weight, bias = ridge_classifier(rows, classes, self.num_classes)
        name = 'ridge regression' + (f' of {len(rows):,} images' if len(rows) < self.seen.sum() else '')
        heads[name] = lambda images: (raw_pixels(images, MOST_RIDGE_PIXELS) @ weight.t() + bias).argmax(1)
        return heads


def _answers(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, float]:
    """Logits `[n, k]`, the features `[n, d]` that the classifier reads, and the seconds that the logits took."""
    device, found, seconds = next(model.parameters()).device, [], 0.0

    def forward(part: Tensor, _: None) -> None:
        nonlocal seconds
        started = time.perf_counter()
        maps = model.forward_features(part.to(device))  # type: ignore[operator]
        scores = model.forward_head(maps).float().cpu()  # type: ignore[operator]
        seconds += time.perf_counter() - started
        found.append((scores, model.forward_head(maps, pre_logits=True).float().cpu()))  # type: ignore[operator]

    in_memory(forward, images, None)
    scores, rows = map(torch.cat, zip(*found, strict=True))
    return scores, rows, seconds


def pre_logits(model: nn.Module, images: Tensor) -> Tensor:
    """The features `[n, d]` of images `[n, c, h, w]` that the model's classifier reads, on the CPU."""
    return _answers(model, images)[1]


def raw_pixels(images: Tensor, most: int = MOST_RAW_PIXELS) -> Tensor:
    """One row `[n, d]` of pixels an image; of large ones at a smaller size, so that a head of them fits in memory."""
    height, width = (min(side, most) for side in images.shape[2:])
    return F.adaptive_avg_pool2d(images, (height, width)).flatten(1)


def as_pixels(image: Tensor, source: ImageSource) -> Tensor:
    """A normalised image `[c, h, w]` of a source as uint8, to be looked at."""
    mean, std = channel_statistics(source.input)
    return ((image.cpu() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
