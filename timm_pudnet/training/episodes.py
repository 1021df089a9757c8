"""Groups of images, each a rehearsal of an unseen data set (paper IV-A).

Dimension letters: `n` images, `c h w` an image.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from timm_pudnet.config import InputConfig, InputError
from timm_pudnet.images import ImageSource


@dataclasses.dataclass(frozen=True)
class Group:
    """One group: `[n, c, h, w]` images, normalised, and their training classes `[n]`."""

    support: Tensor
    support_classes: Tensor
    query: Tensor
    query_classes: Tensor


class ImageBank:
    """Images held in memory as 8-bit pixels at the target's input size, by class.

    Args:
        images: uint8 `[n, c, h, w]`.
        labels: `[n]`, in `0..k-1`.
        class_names: `k` names.
    """

    def __init__(self, images: Tensor, labels: Tensor, class_names: Sequence[str]) -> None:
        self.images, self.labels, self.class_names = images, labels, tuple(class_names)
        self.members = [(labels == label).nonzero().flatten() for label in range(len(self.class_names))]

    @classmethod
    def from_source(cls, source: ImageSource, classes: Sequence[str] | None = None) -> ImageBank:
        """Reads the images of some classes (by default all), in the order of `classes`.

        The source must not normalise: `bank_input` gives the right config to open it with.

        Raises:
            InputError: The images have no labels, or a class is not among them.
        """
        if not source.labelled or source.class_names is None:
            raise InputError(f'{source.description}: training needs labelled images')
        names = list(source.class_names)
        chosen = names if classes is None else [str(name) for name in classes]
        for name in chosen:
            if name not in names:
                raise InputError(f'{source.description}: no class {name!r}; it has {", ".join(names)}')
        number = torch.full((len(names),), -1, dtype=torch.long)
        for label, name in enumerate(chosen):
            number[names.index(name)] = label
        images, labels = [], []
        for batch, batch_labels in source.batches(1024):
            assert batch_labels is not None
            label = number[batch_labels]
            images.append((batch[label >= 0] * 255).round().to(torch.uint8))
            labels.append(label[label >= 0])
        return cls(torch.cat(images), torch.cat(labels), chosen)

    def select(self, classes: Sequence[str]) -> ImageBank:
        """The images of some classes, numbered in the order of `classes`."""
        members = [self.members[self.class_names.index(name)] for name in classes]
        labels = torch.arange(len(members)).repeat_interleave(torch.tensor([len(m) for m in members]))
        return ImageBank(self.images[torch.cat(members)], labels, classes)


def bank_input(config: InputConfig) -> InputConfig:
    """The same input, its pixels left in 0-1."""
    chans = config.input_size[0]
    return dataclasses.replace(config, mean=(0.0,) * chans, std=(1.0,) * chans)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes of an image, each drawn anew for every image; 0 switches one off.

    Args:
        flip: Mirror left to right in half of the cases.
        shift: Largest shift, as a share of the side.
        rotation: Largest turn in degrees.
        scale: Largest change of size, as a share.
        brightness: Largest change of the pixel values, as a share.
    """

    flip: bool = True
    shift: float = 0.1
    rotation: float = 10.0
    scale: float = 0.15
    brightness: float = 0.3

    def __post_init__(self) -> None:
        for name, top in (('shift', 1), ('rotation', 180), ('scale', 1), ('brightness', 1)):
            if not 0 <= getattr(self, name) <= top:
                raise InputError(f'augmentation: {name} must be in 0-{top}, got {getattr(self, name)}')


def augment(images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Changed copies of float images `[n, c, h, w]` in 0-1."""
    count = len(images)

    def uniform(largest: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * largest

    angle, size = uniform(math.radians(how.rotation)), 1 + uniform(how.scale)
    mirror = torch.where(uniform(1) < 0, -1.0, 1.0) if how.flip else torch.ones(count)
    cos, sin = angle.cos() * size, angle.sin() * size
    matrix = torch.stack(
        [
            torch.stack([cos * mirror, -sin, uniform(2 * how.shift)], 1),
            torch.stack([sin * mirror, cos, uniform(2 * how.shift)], 1),
        ],
        1,
    )
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode='border', align_corners=False)
    return (moved * (1 + uniform(how.brightness))[:, None, None, None]).clamp_(0, 1)


class GroupSampler:
    """Draws groups from a bank; every choice comes from one generator, whose state a checkpoint can hold.

    With `turns` above 1 every class turned by quarter turns counts as a further class (`class + k * turn`), so that
    a few classes make many groups.

    Args:
        bank: The images of the seen classes.
        config: The target's input, for mean and std.
        n_way: Classes in a group.
        n_shot: Support images a class.
        n_query: Query images a class.
        turns: 1 for none, 2 for half turns, 4 for quarter turns.
        augmentation: Random changes of each image.
        seed: Of the generator.

    Raises:
        InputError: There are too few classes, or a class has too few images.
    """

    def __init__(
        self,
        bank: ImageBank,
        config: InputConfig,
        *,
        n_way: int,
        n_shot: int,
        n_query: int,
        turns: int = 1,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        if turns not in (1, 2, 4):
            raise InputError(f'turns must be 1, 2 or 4, got {turns}')
        height, width = bank.images.shape[2:]
        if turns == 4 and height != width:
            raise InputError(f'turns = 4 needs square images, these are {height}x{width}: use 2 or 1')
        self.bank, self.n_way, self.n_shot, self.n_query = bank, n_way, n_shot, n_query
        self.turns = turns
        self.num_classes = len(bank.class_names) * turns
        if not 2 <= n_way <= self.num_classes:
            raise InputError(f'n_way is {n_way}, but there are {self.num_classes} classes to draw from')
        for name, members in zip(bank.class_names, bank.members, strict=True):
            if len(members) < n_shot + n_query:
                raise InputError(f'class {name!r} has {len(members)} images, a group needs {n_shot + n_query}')
        self.mean = torch.tensor(config.mean)[:, None, None]
        self.std = torch.tensor(config.std)[:, None, None]
        self.augmentation = augmentation
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> Group:
        """The next group; support and query share no image."""
        each = self.n_shot + self.n_query
        classes = torch.randperm(self.num_classes, generator=self.generator)[: self.n_way]
        members = [self.bank.members[label % len(self.bank.members)] for label in classes.tolist()]
        picks = [m[torch.randperm(len(m), generator=self.generator)[:each]] for m in members]
        picks = torch.cat(picks)
        labels = classes.repeat_interleave(each)
        images = self._prepared(picks, labels).unflatten(0, (self.n_way, -1))
        labels = labels.view(self.n_way, -1)
        sizes = [self.n_shot, self.n_query]
        support, query = images.split(sizes, 1)
        support_classes, query_classes = labels.split(sizes, 1)
        return Group(support.flatten(0, 1), support_classes.flatten(), query.flatten(0, 1), query_classes.flatten())

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """An ordinary batch of `size` images of all classes, and their classes."""
        picks = torch.randint(len(self.bank.labels), (size,), generator=self.generator)
        turns = torch.randint(self.turns, (size,), generator=self.generator)
        labels = self.bank.labels[picks] + turns * len(self.bank.members)
        return self._prepared(picks, labels), labels

    def _prepared(self, picks: Tensor, labels: Tensor) -> Tensor:
        """Images of the bank, augmented, turned as their class says, normalised."""
        images = self.bank.images[picks].float().div_(255)
        if self.augmentation is not None:
            images = augment(images, self.augmentation, self.generator)
        images = quarter_turns(images, labels // len(self.bank.members) * (4 // self.turns))
        return (images - self.mean) / self.std


def quarter_turns(images: Tensor, turns: Tensor) -> Tensor:
    """Images `[n, c, h, w]`, each turned by its own number of quarter turns `[n]`."""
    turned = images.clone()
    for turn in turns.unique().tolist():
        chosen = turns == turn
        turned[chosen] = images[chosen].rot90(turn, (2, 3))
    return turned
