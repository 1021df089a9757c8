"""Will it work here? The accuracy to expect on a set of images before any of them is tested.

Two things tell it. How far the set's sketch lies from the sketches of what the hypernetwork was trained on, with the
numbers of classes and images, gives a first guess. How well the set's own labelled images find their class, each left
out of its centroid, is then added to it: the guess counts as so many further images. `fit_expectation` learns on
held-out sets of many domains how accuracy follows, and checks itself on domains that it was not fitted on;
`hub/expectation.py` is the command. The fit stands in `expectation.json` beside a hypernetwork's weights.

Dimension letters: `n` images, `m` width of the sketch, `d` features, `k` classes, `r` reference sketches, `t` traits.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_pudnet.adapt import class_centroids
from timm_pudnet.config import DamagedFileError, InputError
from timm_pudnet.evaluation.holdout import pre_logits
from timm_pudnet.evaluation.metrics import rank_correlation
from timm_pudnet.files import local_path, read_json, written_whole
from timm_pudnet.hypernet import PudNet
from timm_pudnet.images import ImageSource
from timm_pudnet.predict import in_memory
from timm_pudnet.sketch import StreamingSketch, content_keys

EXPECTATION_NAME = 'expectation.json'
SURE = 0.95  # of intervals
NEIGHBOURS = 5  # reference sketches that a distance is the mean of
MOST_IMAGES = 2048  # that traits are read from, where that is 20 a class
Familiarity = Literal['like', 'edge', 'unlike']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
    """What is known of a labelled set before any test.

    Args:
        distance: Of its sketch from the reference sketches.
        leave_one_out: Share of its images that eq. 7 classifies rightly when each is left out of its centroid.
        num_classes: `k`.
        images: `n`, of classes with two or more.
        sketch_images: Of how many images the sketch is worth the mean, which are fewer where classes are unequal; by
            default `images`.
    """

    distance: float
    leave_one_out: float
    num_classes: int
    images: int
    sketch_images: float | None = None

    def row(self) -> list[float]:
        """What the first guess is a regression on, `[t]`, and a constant."""
        return [
            math.log(max(self.distance, 1e-6)),
            math.log(self.num_classes),
            math.log(self.images / self.num_classes),
            1.0,
        ]

    def log_odds(self, guess: float, worth: float) -> float:
        """Of being right, where a first guess in log odds counts as `worth` images beside those left out."""
        share = 1 / (1 + math.exp(-max(-20.0, min(20.0, guess))))
        right = self.leave_one_out * self.images + worth * share
        return math.log(right / (self.images + worth - right))


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutSet:
    """A set with its traits, tested: what the expectation is fitted and checked on."""

    domain: str
    traits: Traits
    right: int
    total: int

    @property
    def log_odds(self) -> float:
        """Of being right, with half an image added to either side."""
        return math.log((self.right + 0.5) / (self.total - self.right + 0.5))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expectation:
    """A fitted expectation.

    Args:
        weights_digest: `evaluation.weights_digest` of the hypernetwork that it is of.
        references: Sketches of groups of seen classes, `[r, m]`.
        sizes: Numbers of images of the groups that `familiar` is of, rising.
        familiar: For each of these sizes two distances of groups of seen classes: the 95 % quantile and the largest.
        weights: Of the traits' row, for the first guess.
        worth: Images that the first guess counts as.
        noise: `a` and `b` of the variance `a + b / n` of what is wrong with the expectation, in log odds.
        width: Half the interval in standard deviations of that.
        check: How well it held on domains that it was not fitted on (`fit_expectation`).
        config_sha256: Of the hypernetwork's `config.json` (`files.config_sha256`), whose calibration accuracy depends
            on; empty where it is not known.

    Raises:
        InputError: The parts do not fit each other.
    """

    weights_digest: str
    references: tuple[tuple[float, ...], ...]
    sizes: tuple[int, ...]
    familiar: tuple[tuple[float, float], ...]
    weights: tuple[float, ...]
    worth: float
    noise: tuple[float, float]
    width: float
    check: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config_sha256: str = ''

    def __post_init__(self) -> None:
        for name in ('references', 'familiar'):
            object.__setattr__(self, name, tuple(tuple(row) for row in getattr(self, name)))
        for name in ('sizes', 'weights', 'noise'):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        numbers = [*self.sizes, *self.weights, *self.noise, self.worth, self.width, *sum(self.familiar, ())]
        if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
            raise InputError('expectation: a number is not finite')
        if len(self.weights) != 4 or len(self.noise) != 2 or len(self.references) < NEIGHBOURS:
            raise InputError('expectation: weights, noise or references are too few or too many')
        if len({len(row) for row in self.references}) != 1 or not all(
            isinstance(number, (int, float)) and math.isfinite(number) for row in self.references for number in row
        ):
            raise InputError('expectation: references must be sketches of one width')
        if not isinstance(self.check, dict) or (self.check and not _CHECKED.keys() <= self.check.keys()):
            raise InputError(f'expectation: check must have {", ".join(_CHECKED)}')
        if any(key in self.check and not isinstance(self.check[key], kind) for key, kind in _CHECKED.items()):
            raise InputError('expectation: a value of check is of another type')
        if min(self.noise) < 0 or self.worth <= 0 or self.width <= 0:
            raise InputError('expectation: noise must not be below zero, worth and width above it')
        if list(self.sizes) != sorted(set(self.sizes)) or (self.sizes and self.sizes[0] < 1):
            raise InputError('expectation: sizes must be rising, from 1')
        if len(self.sizes) != len(self.familiar) or not self.sizes or any(len(row) != 2 for row in self.familiar):
            raise InputError('expectation: sizes and familiar must be alike in number, two distances a size')

    def distance(self, sketch: Tensor) -> float:
        """How far a sketch `[m]` lies from the references (`sketch_distance`)."""
        return sketch_distance(sketch, torch.tensor(self.references))

    def expect(self, traits: Traits) -> tuple[float, float, float]:
        """The accuracy to expect, a share, and its 95 % interval."""
        guess = sum(a * b for a, b in zip(self.weights, traits.row(), strict=True))
        middle = traits.log_odds(guess, self.worth)
        half = self.width * math.sqrt(self.noise[0] + self.noise[1] / traits.images)
        low, accuracy, high = torch.tensor([middle - half, middle, middle + half]).double().sigmoid().tolist()
        return accuracy, low, high

    def familiarity(self, distance: float, images: float) -> Familiarity:
        """Whether a sketch of so many images is at a distance that groups of seen classes of that size are at too.

        `like`: as near as 95 % of them; `edge`: as near as some; `unlike`: farther than all.
        """
        at = np.log([max(1, images), *self.sizes])  # between the sizes, on a logarithmic scale
        inner, outer = (np.interp(at[0], at[1:], [row[part] for row in self.familiar]) for part in (0, 1))
        return 'like' if distance <= inner else 'edge' if distance <= outer else 'unlike'

    def in_words(self) -> str:
        """How well it held when it was checked, in a sentence; empty where it was not."""
        if not self.check:
            return ''
        return (
            f'The expectation is from {self.check["sets"]} held-out sets of {len(self.check["domains"])} domains; '
            f'checked on each domain by a fit without it, its rank correlation with the true accuracy is '
            f'{self.check["rank_correlation"]:.2f}, its mean error {100 * self.check["mean_error"]:.0f} points, and '
            f'{self.check["coverage"]:.0%} of the sets lie in their 95 % interval.'
        )

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes `expectation.json` into a hypernetwork's folder, in place of an earlier one."""
        path = local_path(folder) / EXPECTATION_NAME
        with written_whole(path) as beside:
            beside.write_text(json.dumps(dataclasses.asdict(self), allow_nan=False) + '\n', encoding='utf-8')
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Expectation | None:
        """Reads what `save` wrote; None where a hypernetwork has none.

        Raises:
            DamagedFileError: The file holds something else.
        """
        path = local_path(folder) / EXPECTATION_NAME
        if not path.is_file():
            return None
        try:
            return cls(**read_json(path))
        except (ValueError, TypeError, OverflowError) as error:
            raise DamagedFileError(f'{path} holds no expectation ({error}): remove it, or fit it again') from error


# Of a check, what the report tells, and its types.
_CHECKED: dict[str, Any] = {
    'sets': int,
    'domains': (list, dict),
    'rank_correlation': (int, float),
    'mean_error': (int, float),
    'coverage': (int, float),
}
IN_WORDS: dict[Familiarity, str] = {
    'like': 'These images look like those that the hypernetwork was trained on.',
    'edge': 'These images lie at the edge of what the hypernetwork was trained on: trust a test more than this number.',
    'unlike': 'These images are unlike anything that the hypernetwork was trained on: the expectation is a guess, '
    'only a test on labelled images tells.',
}


def sketch_distance(sketch: Tensor, references: Tensor) -> float:
    """Mean distance of a sketch `[m]` from its nearest references `[r, m]`, in standard deviations of the references.

    Example:
        >>> sketch_distance(torch.tensor([1.0, 3.0]), torch.tensor([[0.0, 0.0], [2.0, 4.0]] * 5))
        1.0606601717798212
    """
    references = references.double()
    scale = references.std(0).clamp(min=1e-6)
    gaps = ((sketch.detach().cpu().double() - references) / scale).norm(dim=1)
    return float(gaps.topk(NEIGHBOURS, largest=False).values.mean())


def leave_one_out(features: Tensor, labels: Tensor, whitening: Tensor) -> Tensor:
    """Eq. 7 on the very images that give the centroids, each left out of its own class's.

    Args:
        features: `[n, d]`.
        labels: `[n]`, in `0..k-1`; images that are alone in their class are left out.
        whitening: `[d, d]`.

    Returns:
        Whether each image is classified rightly, bool.

    Example:
        >>> points = torch.tensor([[2.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.2, 3.0]])
        >>> leave_one_out(points, torch.tensor([0, 0, 1, 1]), torch.eye(2))
        tensor([True, True, True, True])
    """
    counts = labels.bincount()
    centroids = class_centroids(features, labels, len(counts))
    usable = counts[labels] > 1
    if len(counts) < 2 or not usable.any():
        raise InputError('to leave one image out takes two classes, and two images in one of them')
    cosines = F.normalize(features @ whitening, dim=1) @ F.normalize(centroids @ whitening, dim=1).t()
    others = counts[labels, None].to(features.dtype)
    without = (centroids[labels] * others - features) / (others - 1).clamp(min=1)
    own = F.cosine_similarity(features @ whitening, without @ whitening)
    cosines[torch.arange(len(labels)), labels] = -math.inf
    return (own > cosines.max(1).values)[usable]


def measure_traits(
    sketch: Tensor, features: Tensor, labels: Tensor, whitening: Tensor, references: Tensor
) -> Traits | None:
    """Traits of a set from its sketch `[m]`, features `[n, d]` and labels `[n]`; None where no class has two images."""
    if len(labels.unique()) < 2 or labels.bincount().max() < 2:
        return None
    right = leave_one_out(features.cpu(), labels, whitening.cpu())
    return Traits(
        distance=sketch_distance(sketch, references),
        leave_one_out=float(right.float().mean()),
        num_classes=len(labels.unique()),
        images=len(right),
    )


@torch.inference_mode()
def read_traits(hypernet: PudNet, model: nn.Module, source: ImageSource, expectation: Expectation) -> Traits | None:
    """Traits of the images that a model was predicted from; of at most 2,048 of them, or 20 a class if that is more.

    Args:
        hypernet: That predicted the model.
        model: With a classifier; already calibrated.
        source: The images, with labels known before reading.
        expectation: Has the reference sketches.

    Returns:
        None where there are no labels, or no class has two images. Copies of an image count once: each would find its
        class by the others.
    """
    if source.labels is None or source.is_stream:
        return None
    classes, labels = source.labels.unique(return_inverse=True)
    each = max(20, MOST_IMAGES // len(classes))
    members = [(labels == label).nonzero().flatten() for label in range(len(classes))]
    # Spread evenly over each class, so that files which came in a row do not stand for it.
    picks = torch.cat([part[torch.linspace(0, len(part) - 1, min(each, len(part))).long()] for part in members])
    device = next(model.parameters()).device
    encoder = hypernet.encoder if hypernet.device == device else copy.deepcopy(hypernet.encoder).to(device)
    stream, rows, found, keys = StreamingSketch(encoder, 'class'), [], [], set()
    for images, batch_labels in source.subset(picks.sort().values).batches():
        assert batch_labels is not None
        in_memory(lambda part, labels: stream.add(part.to(device), labels), images, batch_labels)
        fresh = [row for row, key in enumerate(content_keys(images).tolist()) if key not in keys and not keys.add(key)]
        rows.append(pre_logits(model, images)[fresh])
        found.append(batch_labels[fresh])
    sketch = stream.result()
    # Classes whose every file was unreadable leave no gap in the numbers.
    numbers = torch.cat(found).unique(return_inverse=True)[1]
    references = torch.tensor(expectation.references)
    traits = measure_traits(sketch, torch.cat(rows), numbers, hypernet.whitening, references)
    return None if traits is None else dataclasses.replace(traits, sketch_images=stream.num_images)


def fit_expectation(
    sets: Sequence[HeldOutSet],
    *,
    weights_digest: str,
    references: Tensor,
    sizes: Sequence[int],
    familiar: Sequence[tuple[float, float]],
    config_sha256: str = '',
) -> Expectation:
    """Fits the expectation on all sets, and checks it domain by domain.

    The first guess is a regression of the log odds of being right. What it is worth, and the interval, come from
    guesses at domains that were left out of the regression. The check leaves each domain out of all of that once more.

    Args:
        sets: Held-out sets of at least four domains.
        weights_digest: Of the hypernetwork.
        references: Sketches `[r, m]` that the traits' distances are from.
        sizes: See `Expectation`.
        familiar: See `Expectation`.
        config_sha256: See `Expectation`.

    Returns:
        The expectation. Its `check` has `rank_correlation` of expected and true accuracy over all sets, each expected
        by a fit without its domain, `rank_correlation_at_equal_classes` (the mean of that over sets of as many classes,
        since their number alone ranks much), `rank_correlation_of_sketch` (of the first guess alone, likewise) and
        `rank_correlation_of_leave_one_out` (of that trait alone), `mean_error`, `coverage` of the interval, and the
        same by domain under `domains`. Where all sets are as accurate as each other none is ranked: 0.

    Raises:
        InputError: There are fewer than four domains.
    """
    domains = list(dict.fromkeys(one.domain for one in sets))
    if len(domains) < 4:
        raise InputError(f'an expectation needs held-out sets of at least 4 domains, these are of {len(domains)}')
    fixed: dict[str, Any] = {
        'weights_digest': weights_digest,
        'references': [[round(value, 4) for value in row] for row in references.tolist()],
        'sizes': sizes,
        'familiar': familiar,
        'config_sha256': config_sha256,
    }
    found: dict[str, list[tuple[HeldOutSet, tuple[float, float, float]]]] = {}
    for domain in domains:
        without = Expectation(**fixed, **_regress([one for one in sets if one.domain != domain]))
        found[domain] = [(one, without.expect(one.traits)) for one in sets if one.domain == domain]
    pooled = [row for rows in found.values() for row in rows]
    truth = [one.right / one.total for one, _ in pooled]
    guesses = [guess for _, guess in _left_out_guesses(sets)]
    check = {
        'sets': len(sets),
        **_scores(pooled),
        'rank_correlation_at_equal_classes': _at_equal_classes(pooled),
        'rank_correlation_of_sketch': rank_correlation(guesses, truth),
        'rank_correlation_of_leave_one_out': rank_correlation([one.traits.leave_one_out for one, _ in pooled], truth),
        'domains': {domain: {'sets': len(rows), **_scores(rows)} for domain, rows in found.items()},
    }
    return Expectation(**fixed, **_regress(sets), check=check)


def _scores(rows: Sequence[tuple[HeldOutSet, tuple[float, float, float]]]) -> dict[str, float]:
    truth = [one.right / one.total for one, _ in rows]
    return {
        'mean_accuracy': sum(truth) / len(truth),
        'rank_correlation': rank_correlation([expected[0] for _, expected in rows], truth),
        'mean_error': sum(abs(expected[0] - true) for (_, expected), true in zip(rows, truth, strict=True)) / len(rows),
        'coverage': sum(low <= true <= high for (_, (_, low, high)), true in zip(rows, truth, strict=True)) / len(rows),
    }


def _at_equal_classes(rows: Sequence[tuple[HeldOutSet, tuple[float, float, float]]]) -> float:
    """Rank correlation among sets of as many classes, the mean over sets that are not alone in that."""
    found = []
    for k in {one.traits.num_classes for one, _ in rows}:
        inside = [(expected[0], one.right / one.total) for one, expected in rows if one.traits.num_classes == k]
        if len(inside) > 1:
            found += len(inside) * [rank_correlation(*zip(*inside, strict=True))]
    return sum(found) / max(1, len(found))


def _regress(sets: Sequence[HeldOutSet]) -> dict[str, Any]:
    """`weights`, `worth`, `noise` and `width`; the last three from sets whose domain was left out."""
    found = _left_out_guesses(sets)

    def gaps(worth: float) -> Tensor:
        return torch.tensor([one.log_odds - one.traits.log_odds(guess, worth) for one, guess in found]).double()

    worth = min((2.0**power for power in range(1, 8)), key=lambda one: float(gaps(one).square().sum()))
    squares = gaps(worth).square()
    images = torch.tensor([one.traits.images for one, _ in found])
    design = torch.stack([torch.ones(len(images)), 1 / images], 1).double()
    noise = torch.linalg.lstsq(design, squares[:, None]).solution.flatten().clamp(min=1e-3)
    width = float((squares / (design @ noise)).sqrt().quantile(SURE))
    return {'weights': _ridge(sets).tolist(), 'worth': worth, 'noise': noise.tolist(), 'width': width}


def _left_out_guesses(sets: Sequence[HeldOutSet]) -> list[tuple[HeldOutSet, float]]:
    """Every set, domain by domain, and its first guess by a regression without its domain."""
    found = []
    for domain in dict.fromkeys(one.domain for one in sets):
        weights = _ridge([one for one in sets if one.domain != domain])
        inside = [one for one in sets if one.domain == domain]
        found += [(one, float(weights @ torch.tensor(one.traits.row()).double())) for one in inside]
    return found


def _ridge(sets: Sequence[HeldOutSet]) -> Tensor:
    """Weights of a ridge regression on the standardised rows, mapped back to the rows as they are."""
    rows = torch.tensor([one.traits.row()[:-1] for one in sets]).double()
    truth = torch.tensor([one.log_odds for one in sets]).double()
    mean, scale = rows.mean(0), rows.std(0).clamp(min=1e-6)
    design = (rows - mean) / scale
    slopes = torch.linalg.solve(
        design.t() @ design + torch.eye(len(mean)).double(), design.t() @ (truth - truth.mean())
    )
    slopes = slopes / scale
    return torch.cat([slopes, (truth.mean() - slopes @ mean)[None]])
