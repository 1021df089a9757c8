"""Dataset compression (paper III-C): an image set of any size becomes one vector, its sketch.

Dimension letters: `n` images, `c h w` an image, `m` width of the sketch, `k` classes or clusters.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_pudnet.config import InputError

Balance = Literal['none', 'class', 'kmeans']

_sketching = threading.RLock()


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards every part in the mode that it had."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


class RunningBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that normalises by its running statistics in training too.

    The mean of an ordinary BatchNorm's output over the images that it normalised is its bias, whatever they are: a
    sketch behind it is a constant in training. Here each batch updates the running statistics first and is then
    normalised by them, so that what sets one image set apart from the others survives.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalises `[n, c, h, w]` per channel by the running statistics."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        if self.training:
            with torch.no_grad():
                self.num_batches_tracked += 1
                # A plain average at first, so that the start depends on the images and not on the initial 0 and 1.
                rate = max(self.momentum or 0.1, 1.0 / float(self.num_batches_tracked))
                rows = input.float().transpose(0, 1).flatten(1)  # plain means of rows: faster than var_mean here
                mean = rows.mean(1)
                variance = (rows - mean[:, None]).square_().mean(1)
                self.running_mean.lerp_(mean, rate)
                self.running_var.lerp_(variance, rate)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class SketchEncoder(nn.Module):
    """T of eq. 3: three blocks of 5x5 conv, LeakyReLU and BatchNorm, then a spatial mean.

    Args:
        in_chans: Channels of an image.
        width: `m`, width of the sketch.
        channels: Channels of the first and second block.

    Example:
        >>> SketchEncoder(3, 128)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 128])
    """

    def __init__(self, in_chans: int, width: int, channels: tuple[int, int] = (16, 32)) -> None:
        super().__init__()
        sizes = (in_chans, *channels, width)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(before, after, 5, stride=2, padding=2), nn.LeakyReLU(0.1), RunningBatchNorm2d(after)
                )
                for before, after in itertools.pairwise(sizes)
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        """Features `[n, m]` of images `[n, c, h, w]`; in eval mode a row depends on its image alone."""
        return self.blocks(images).float().mean(dim=(2, 3))


class StreamingSketch:
    """Adds up the features of image batches into a sketch, in memory that does not grow with their number.

    Sums are kept in float64, so that neither the order of the images nor the size of the batches changes the sketch
    beyond float32 rounding.

    Args:
        encoder: The encoder; used in eval mode, and left in the mode that it has.
        balance: `none`: the mean over all images (eq. 3). `class`: the mean of the class means, for unequal classes.
            `kmeans`: the mean of k-means centroids, for unequal classes without labels (paper III-C, discussion).

    Raises:
        InputError: `class` without labels; an empty set.
    """

    sample_size = 4096  # most features that are kept for k-means
    num_clusters = 8  # of `kmeans`

    def __init__(self, encoder: SketchEncoder, balance: Balance = 'none') -> None:
        if balance not in ('none', 'class', 'kmeans'):
            raise InputError(f'balance {balance!r}: use none, class or kmeans')
        self.encoder, self.balance = encoder, balance
        self.sums: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}
        self.sample = ImageSample(self.sample_size)  # of the images' features, for k-means

    @torch.inference_mode()
    def add(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Takes in a batch `[n, c, h, w]` and its labels `[n]`."""
        dtype = next(self.encoder.parameters()).dtype
        with ExitStack() as stack:
            stack.enter_context(_sketching)  # of threads that share an encoder in training mode one at a time
            if any(part.training for part in self.encoder.modules()):
                stack.enter_context(in_eval_mode(self.encoder))
            else:
                stack.close()
            features = self.encoder(images.to(dtype)).cpu().double()
        if self.balance == 'kmeans':
            self.sample.add(features, keys=content_keys(images))
        if self.balance == 'class':
            if labels is None:
                raise InputError("balance 'class' needs labels; use 'kmeans' or 'none' for unlabelled images")
            groups: Iterable[int] = labels.unique().tolist()
        else:
            labels, groups = torch.zeros(len(features), dtype=torch.long), [0]
        for label in groups:
            rows = features[labels.cpu() == label]
            self.sums[label] = self.sums.get(label, 0) + rows.sum(0)
            self.counts[label] = self.counts.get(label, 0) + len(rows)

    @property
    def num_images(self) -> float:
        """How many images, drawn at random, would give as sure a sketch.

        With unequal classes that is fewer than there are; of k-means a centroid, which may be of one image, counts as
        one.
        """
        if self.balance == 'kmeans':
            return min(self.num_clusters, sum(self.counts.values()))
        return len(self.counts) ** 2 / sum(1 / count for count in self.counts.values()) if self.counts else 0

    def result(self) -> Tensor:
        """The sketch `[m]` of all images taken in, float32 on the encoder's device."""
        if not sum(self.counts.values()):
            raise InputError('no images: a sketch needs at least one')
        if self.balance == 'kmeans':
            sketch = kmeans_centroids(self.sample.images, self.num_clusters).mean(0)
        else:
            sketch = torch.stack([self.sums[label] / self.counts[label] for label in sorted(self.sums)]).mean(0)
        return sketch.float().to(next(self.encoder.parameters()).device)


class SketchGate(nn.Module):
    """Tells a sketch that shows how its images were taken from one that the choice of the images explains.

    The sketch `s` of `n` images is held against the seen classes as they are, with `mu` the mean of their sketches,
    `S_b` the covariance of these and `S_w` that of features within a class: `T = (s - mu)' (S_w / n + S_b)^-1 (s - mu)`
    (Hotelling's statistic). For images of one of the classes `T` is `m` on average, for those of several classes less.
    The gate is open from `2 m` on.

    Args:
        width: `m`.

    Example:
        >>> gate = SketchGate(2)
        >>> gate.fit([(torch.tensor([[0.0, 1.0], [0.0, -1.0]]), 0.5), (torch.tensor([[4.0, 0.0], [4.0, 2.0]]), 0.5)])
        >>> gate.opens(torch.tensor([3.0, 0.0]), 4), gate.opens(torch.tensor([2.0, 9.0]), 4)
        (False, True)
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.within: Tensor
        self.between: Tensor
        self.register_buffer('mean', torch.zeros(width))
        self.register_buffer('within', torch.zeros(width, width))  # zeros: open to all, until it is fitted
        self.register_buffer('between', torch.zeros(width, width))

    @torch.no_grad()
    def fit(self, classes: Sequence[tuple[Tensor, float]]) -> None:
        """Takes `mu`, `S_b` and `S_w` from features `[n, m]` of images of each class, and how much each class counts.

        Raises:
            InputError: No class has two images.
        """
        rows = [features.cpu().double() for features, _ in classes]
        weights = torch.tensor([weight for _, weight in classes], dtype=torch.float64)
        several = [(weight, part) for weight, part in zip(weights, rows, strict=True) if len(part) > 1]
        if not several:
            raise InputError('sketch_gate: no class has two images, so how those of a class vary cannot be told')
        means = torch.stack([part.mean(0) for part in rows])
        weights /= weights.sum()
        mean = weights @ means
        self.mean.copy_(mean)
        self.between.copy_((weights[:, None] * (means - mean)).t() @ (means - mean))
        scatter = torch.stack([weight * torch.cov(part.t()) for weight, part in several]).sum(0)
        self.within.copy_(scatter / sum(weight for weight, _ in several))

    def opens(self, sketch: Tensor, num_images: float) -> bool:
        """Whether the sketch `[m]` of so many images shows more than chance would; true of one that is not finite."""
        mean, within, between = (value.cpu().double() for value in (self.mean, self.within, self.between))
        off = sketch.detach().cpu().double() - mean
        spread = within / num_images + between
        spread.diagonal().add_(1e-9)
        return not float(off @ torch.linalg.solve_ex(spread, off)[0]) < 2 * len(off)


class ImageSample:
    """A sample of the images that pass by, of bounded size, chosen by their pixels alone.

    The images whose content keys are the smallest are kept, in the order of their keys: so the sample, and all that is
    computed from it, does not depend on the order of the images or on how they were batched.

    Args:
        size: Most images that it holds.
    """

    def __init__(self, size: int) -> None:
        self.size, self.seen = size, 0
        self.classes: set[int] = set()  # of all labels that passed by
        self._keys = torch.empty(0, dtype=torch.long)
        self._images: Tensor | None = None
        self._labels: Tensor | None = None

    @classmethod
    def for_size(cls, input_size: tuple[int, int, int]) -> ImageSample:
        """A sample that one forward pass can take at once: 1024 images, fewer where they are large, at least 64."""
        return cls(min(1024, max(64, 2**24 // (input_size[1] * input_size[2]))))

    def add(self, images: Tensor, labels: Tensor | None = None, keys: Tensor | None = None) -> None:
        """Takes in a batch `[n, c, h, w]`, or other rows with the keys of their images, and its labels `[n]`."""
        self.seen += len(images)
        if labels is not None:
            self.classes.update(labels.unique().tolist())
        keys = content_keys(images) if keys is None else keys
        if len(self._keys) == self.size:
            chosen = self.wanted(keys)
            keys, images, labels = keys[chosen], images[chosen], None if labels is None else labels[chosen]
        if not len(images):
            return
        if self._images is not None:
            images, keys = torch.cat([self._images, images]), torch.cat([self._keys, keys])
            labels = None if labels is None or self._labels is None else torch.cat([self._labels, labels])
        order = keys.argsort(stable=True)[: self.size]
        self._keys, self._images = keys[order], images[order]
        self._labels = None if labels is None else labels[order]

    def wanted(self, keys: Tensor) -> Tensor:
        """Which images of these keys it would take in now, a bool `[n]`; so their features need not be computed."""
        return keys < self._keys[-1] if len(self._keys) == self.size else torch.ones_like(keys, dtype=torch.bool)

    @property
    def complete(self) -> bool:
        """Whether it holds every image that passed by."""
        return self.seen == len(self._keys)

    @property
    def images(self) -> Tensor:
        """The sampled images `[n, c, h, w]`."""
        if self._images is None:
            raise InputError('no images: a prediction needs at least one')
        return self._images

    @property
    def labels(self) -> Tensor | None:
        """Their labels `[n]`, where the batches had any."""
        return self._labels


def content_keys(rows: Tensor) -> Tensor:
    """A pseudo-random int64 key `[n]` for each row of `[n, ...]`, by the bits of its float32 values.

    Equal rows have equal keys, in any batch and any order. At most 4096 values of a row, spread over it, are looked at.
    """
    flat = rows.detach().cpu().float().flatten(1)
    flat = flat[:, :: -(-flat.shape[1] // 4096)].contiguous()
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (flat.shape[1],), generator=generator) | 1
    keys = (flat.view(torch.int32).long() * factors).sum(1)  # wraps around, as meant
    return (keys ^ (keys >> 31)) * factors[0]


def kmeans_centroids(features: Tensor, num_clusters: int, steps: int = 20) -> Tensor:
    """Centroids `[k, m]` of features `[n, m]` by Lloyd's algorithm; deterministic and blind to the order of the rows.

    Starts from the row nearest to the mean, then again and again the row farthest from all chosen ones. Clusters that
    lose all rows are dropped, so fewer than `num_clusters` may come back.

    Example:
        >>> points = torch.tensor([[0.0, 0.0], [0.0, 2.0], [9.0, 0.0]])
        >>> kmeans_centroids(points, 2).tolist()
        [[0.0, 1.0], [9.0, 0.0]]
    """
    if num_clusters < 1:
        raise InputError(f'num_clusters must be at least 1, got {num_clusters}')
    chosen = [int((features - features.mean(0)).square().sum(1).argmin())]
    distance = (features - features[chosen[0]]).square().sum(1)
    while len(chosen) < min(num_clusters, len(features)) and distance.max() > 0:
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (features - features[chosen[-1]]).square().sum(1))
    centroids = features[chosen]
    for _ in range(steps):
        nearest = torch.cdist(features, centroids).argmin(1)
        used = nearest.unique()
        updated = torch.stack([features[nearest == cluster].mean(0) for cluster in used])
        if updated.shape == centroids.shape and torch.equal(updated, centroids):
            break
        centroids = updated
    return centroids
