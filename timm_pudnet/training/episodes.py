"""Groups of images, each a rehearsal of an unseen data set (paper IV-A).

Dimension letters: `n` images, `c h w` an image.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import math
import random
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from timm.data.mixup import Mixup
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import to_pil_image

from timm_pudnet.config import InputConfig, InputError, first_line
from timm_pudnet.devices import forked_rng
from timm_pudnet.images import ImageSource, channel_statistics, open_images
from timm_pudnet.sketch import ImageSample
from timm_pudnet.training.conditions import Condition

MOST = 1_000_000  # of what a group counts; far more than fits anywhere


@dataclasses.dataclass(frozen=True)
class Group:
    """One group: `[n, c, h, w]` images, normalised, and their training classes `[n]`."""

    support: Tensor
    support_classes: Tensor
    query: Tensor
    query_classes: Tensor
    plain: Tensor | None = None  # support and query, turned as the condition says but else without it, if asked for
    condition: Condition | None = None  # that it is seen under


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
    def from_source(
        cls, source: ImageSource, classes: Sequence[str] | None = None, *, progress: bool = False
    ) -> ImageBank:
        """Reads the images of some classes (by default all), in the order of `classes`.

        The source must not normalise: `bank_input` gives the right config to open it with. Classes without names get
        their numbers. With `progress`, a bar shows what takes longer than two seconds.

        Raises:
            InputError: The source normalises, the images have no labels, a class is not among them, or the labels are
                no numbers of classes.
        """
        if source.input != bank_input(source.input):
            raise InputError(
                f'{source.description}: opened with a mean and std; training.bank_input gives an input without'
            )
        if not source.labelled:
            raise InputError(f'{source.description}: labelled images are needed')
        names = source.class_names
        if names is None and source.labels is not None:
            names = tuple(str(label) for label in range(int(source.labels.max()) + 1))
        chosen = list(names or ()) if classes is None else [str(name) for name in classes]
        number = None  # of each class among those chosen; None where their names come with the images
        if names is not None:
            number = torch.full((len(names),), -1, dtype=torch.long)
            places = slice(None) if classes is None else _numbers(chosen, names, source.description)
            number[places] = torch.arange(len(chosen))
        images, labels = [], []
        was, source.progress = source.progress, progress
        for batch, batch_labels in source.batches(ImageSample.for_size(source.input.input_size).size):
            assert batch_labels is not None
            if names is not None and len(batch_labels):
                source.check_classes(int(batch_labels.max()), len(names))
            label = batch_labels if number is None else number[batch_labels]
            images.append(batch[label >= 0].mul_(255).round_().to(torch.uint8))
            labels.append(label[label >= 0])
        source.progress = was
        if number is None:
            numbers = torch.cat(labels)
            found = numbers.unique()
            top = int(found.max()) if len(found) else -1
            if classes is None:
                source.check_classes(top, len(found))
            bank = cls(torch.cat(images), numbers, [str(label) for label in range(top + 1)])
            return bank if classes is None else bank.select(chosen)
        return cls(torch.cat(images), torch.cat(labels), chosen)

    @functools.cached_property
    def keys(self) -> Tensor:
        """A key `[n]` of each image by all its pixels, made once."""
        digests = (hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in self.images.cpu().numpy())
        return torch.tensor([int.from_bytes(digest, 'big', signed=True) for digest in digests], dtype=torch.long)

    def check_size(self, config: InputConfig) -> None:
        """Raises InputError unless the images are of the size that the target takes."""
        if tuple(self.images.shape[1:]) != config.input_size:
            found, wanted = ('x'.join(map(str, size)) for size in (self.images.shape[1:], config.input_size))
            raise InputError(f'these images are {found}, the target takes {wanted}: open them with its input')

    def to(self, device: torch.device) -> ImageBank:
        """The same bank, its images on a device."""
        return ImageBank(self.images.to(device), self.labels, self.class_names)

    def part(self, picks: Tensor) -> ImageBank:
        """The images of these numbers, with the classes of all."""
        return ImageBank(self.images[picks], self.labels[picks], self.class_names)

    def source(self, input: InputConfig) -> ImageSource:
        """Images and labels as `predict_model` takes them: at the input size already, so not cropped again."""
        return open_images(self.images, self.labels, input=dataclasses.replace(input, crop_pct=1.0))

    def select(self, classes: Sequence[str]) -> ImageBank:
        """The images of some classes, numbered in the order of `classes`.

        Raises:
            InputError: A class is not among them.
        """
        members = [self.members[number] for number in _numbers(classes, self.class_names, 'these images')]
        labels = torch.arange(len(members)).repeat_interleave(torch.tensor([len(m) for m in members]))
        return ImageBank(self.images[torch.cat(members)], labels, classes)


def _numbers(classes: Sequence[str], names: Sequence[str], where: str) -> list[int]:
    """The numbers of some classes among `names`; of those that share a name (ImageNet's cranes) all, or none."""
    places: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        places.setdefault(name, []).append(number)
    for name, count in collections.Counter(classes).items():
        if name not in places:
            raise InputError(f'{where}: no class {name!r}; it has {", ".join(names)}')
        if count != len(places[name]):
            raise InputError(f'{where}: class {name!r} is named {count} times, and {len(places[name])} have that name')
    return [places[name].pop(0) for name in classes]


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
        timm: Arguments of `timm.data.create_transform` (`auto_augment`, `re_prob`, `color_jitter`, ...). Where given,
            timm's own training transform takes the place of all of the above; several times slower.
        mixup: Arguments of `timm.data.Mixup` (`mixup_alpha`, `cutmix_alpha`, `prob`, ...), by which a plain training
            mixes the images of each batch, and their classes; groups are not mixed.
    """

    flip: bool = True
    shift: float = 0.1
    rotation: float = 10.0
    scale: float = 0.15
    brightness: float = 0.3
    timm: dict[str, Any] = dataclasses.field(default_factory=dict)
    mixup: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, top in (('shift', 1), ('rotation', 180), ('scale', 1), ('brightness', 1)):
            if not 0 <= getattr(self, name) <= top:
                raise InputError(f'augmentation: {name} must be in 0-{top}, got {getattr(self, name)}')


def timm_augmented(images: Tensor, kwargs: dict[str, Any], generator: torch.Generator) -> Tensor:
    """Uint8 images `[n, c, h, w]` through timm's training transform, one by one; floats `[n, c, h, w]`, about 0-1.

    Raises:
        InputError: timm refuses an argument.
    """
    _, chans, height, width = images.shape
    for name in ('use_prefetcher', 'separate', 'normalize'):
        if name in kwargs:
            raise InputError(
                f'augmentation: {name} changes what a transform gives, not how images change: leave it out'
            )
    try:
        transform: Any = create_transform(
            (chans, height, width), is_training=True, mean=(0.0,) * chans, std=(1.0,) * chans, **kwargs
        )
        with _seeded(generator):
            return torch.stack([transform(to_pil_image(image)) for image in images])
    except (TypeError, ValueError, LookupError, AssertionError, OSError) as error:
        raise InputError(
            f'augmentation: timm.data.create_transform refused {kwargs} for {chans} channels: {first_line(error)}'
        ) from error


def mixed(
    images: Tensor, labels: Tensor, num_classes: int, kwargs: dict[str, Any], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Images `[n, c, h, w]` mixed in pairs by timm's Mixup, in another order, and the shares of the classes `[n, k]`.

    Raises:
        InputError: timm refuses an argument, or the number of images is odd.
    """
    if len(images) % 2:
        raise InputError(f'augmentation: mixup pairs the images of a batch, but they are {len(images)}, an odd number')
    order = torch.randperm(len(images), generator=generator)  # else images of one set meet those of another alone
    try:
        mixup = Mixup(**{'label_smoothing': 0.0, **kwargs}, num_classes=num_classes)
        with _seeded(generator):
            return mixup(images[order], labels[order].to(images.device))
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f'augmentation: timm.data.Mixup refused {kwargs}: {error}') from error


@contextlib.contextmanager
def _seeded(generator: torch.Generator) -> Iterator[None]:
    """What draws from Python, NumPy or torch in here draws by the generator; afterwards as if it had not."""
    seed = int(torch.randint(2**31, (), generator=generator))
    state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with forked_rng(torch.device('cpu')):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


def augment(images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Changed copies of float images `[n, c, h, w]` in 0-1, on their device; the generator is the CPU's."""
    count = len(images)

    def uniform(largest: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * largest

    angle, size = uniform(math.radians(how.rotation)), 1 + uniform(how.scale)
    mirror = torch.where(uniform(1) < 0, -1.0, 1.0) if how.flip else torch.ones(count)
    cos, sin = angle.cos() * size, angle.sin() * size
    tall = images.shape[2] / images.shape[3]  # the grid is of -1 to 1 in both directions
    matrix = torch.stack(
        [
            torch.stack([cos * mirror, -sin * tall, uniform(2 * how.shift)], 1),
            torch.stack([sin * mirror / tall, cos, uniform(2 * how.shift)], 1),
        ],
        1,
    )
    light = 1 + uniform(how.brightness)[:, None, None, None]
    grid = F.affine_grid(matrix.to(images.device), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode='border', align_corners=False)
    return (moved * light.to(images.device)).clamp_(0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """What a group of images is.

    Args:
        n_way: Classes in a group, all of one data set. A set with fewer gives all of its classes, and as many times
            more images of each, so that groups stay about as large.
        n_shot: Support images a class: they give sketch and centroids.
        n_query: Query images a class.
        turns: With 2 or 4, classes turned by a half or by quarter turns count as further classes.
        per_step: Groups in an optimiser step.
        conditions: Share of the groups that are seen under a random imaging condition of their own, in 0-1; it turns no
            image where turned classes are classes of their own.
        sketch_groups: Further groups for each of these, for the sketch's own loss alone; 0 for no such loss.
        sketch_images: Images of each half of such a group.

    Raises:
        InputError: A value is out of range.
    """

    n_way: int = 8
    n_shot: int = 8
    n_query: int = 8
    turns: int = 1
    per_step: int = 1
    conditions: float = 0.0
    sketch_groups: int = 0
    sketch_images: int = 16

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            least = {'n_way': 2, 'sketch_groups': 0, 'conditions': 0}.get(field.name, 1)
            if getattr(self, field.name) < least:
                raise InputError(f'groups: {field.name} must be at least {least}, got {getattr(self, field.name)}')
            if getattr(self, field.name) > MOST:
                raise InputError(f'groups: {field.name} must be at most {MOST:,}, got {getattr(self, field.name):,}')
        if not self.conditions <= 1:
            raise InputError(f'groups: conditions must be a share in 0-1, got {self.conditions}')
        if self.sketch_groups == 1:
            raise InputError('groups: sketch_groups must be 0, or at least 2 to be told apart, got 1')
        if self.turns not in (1, 2, 4):
            raise InputError(f'groups: turns must be 1, 2 or 4, got {self.turns}')

    @property
    def images_per_step(self) -> int:
        """Images that one optimiser step shows the target."""
        return self.n_way * (self.n_shot + self.n_query) * self.per_step


class GroupSampler:
    """Draws groups from the banks of one or several data sets.

    Every group has a number and is drawn from a generator of its own, so that groups can be drawn in any order, by
    any process, and again. They are made on the device that holds the banks' images, from random numbers of the CPU.
    With `turns` above 1 every class turned by quarter turns counts as a further class (`class + k * turn`), so that a
    few classes make many groups. Classes are numbered through all banks.

    Args:
        banks: The images of the seen classes, a bank for each data set.
        config: The target's input.
        groups: What a group is.
        shares: How often groups come from each bank, in any unit; by default alike.
        augmentation: Random changes of each image.
        seed: Of all draws.

    Raises:
        InputError: There are too few classes, a class has too few images, or the images are of another size.
    """

    def __init__(
        self,
        banks: Sequence[ImageBank],
        config: InputConfig,
        groups: Groups,
        *,
        shares: Sequence[float] | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.banks, self.groups, self.seed, self.augmentation = list(banks), groups, seed, augmentation
        self.shares = torch.tensor(shares or [1.0] * len(self.banks), dtype=torch.float64)
        if len(self.shares) != len(self.banks):
            raise InputError(f'{len(self.banks)} banks of images, but {len(self.shares)} shares (sets of the recipe)')
        counts = [len(bank.class_names) * groups.turns for bank in self.banks]
        self.num_classes = sum(counts)
        self.first = [sum(counts[:number]) for number in range(len(counts))]  # number of each bank's first class
        for number, (bank, count) in enumerate(zip(self.banks, counts, strict=True), 1):
            bank.check_size(config)
            height, width = bank.images.shape[2:]
            if height != width and groups.turns == 4:
                raise InputError(f'turned images must be square, these are {height}x{width}: use turns = 2 or 1')
            if count < 2:
                raise InputError(
                    f'a group needs 2 classes, but set {number} has {count} to draw from '
                    f'({", ".join(bank.class_names)}): add one, or leave the set out'
                )
            each = sum(self._sizes(bank)[1:])
            for name, members in zip(bank.class_names, bank.members, strict=True):
                if len(members) < each:
                    times = min(map(len, bank.members)) // (groups.n_shot + groups.n_query)
                    fewer = f'n_way to {times * count}, or ' if times else ''  # as many times more images a class
                    raise InputError(
                        f'class {name!r} has {len(members)} images, a group needs {each}: lower {fewer}n_shot and '
                        'n_query, or leave the class out'
                    )
        self.mean, self.std = channel_statistics(config)

    def generator(self, what: str, number: int) -> torch.Generator:
        """The generator of one draw."""
        return torch.Generator().manual_seed(zlib.crc32(f'{self.seed} {what} {number}'.encode()))

    def draw(self, number: int, what: str = 'group', *, plain: bool = False) -> Group:
        """Group `number` of a series; support and query share no image, but of turned classes.

        With `plain`, also as `Group.plain` says.
        """
        generator = self.generator(what, number)
        place = self._bank(generator)
        bank = self.banks[place]
        n_way, n_shot, n_query = self._sizes(bank)
        each = n_shot + n_query
        classes = torch.randperm(len(bank.members) * self.groups.turns, generator=generator)[:n_way]
        members = [bank.members[label % len(bank.members)] for label in classes.tolist()]
        picks = torch.cat([m[torch.randperm(len(m), generator=generator)[:each]] for m in members])
        labels = classes.repeat_interleave(each)
        condition = self._condition(bank, generator)
        images = self._changed(bank, picks, labels, generator)
        seen = self._normalised(images, condition, generator)

        def split(rows: Tensor) -> list[Tensor]:
            return [part.flatten(0, 1) for part in rows.unflatten(0, (n_way, each)).split([n_shot, n_query], 1)]

        support, query = split(seen)
        support_classes, query_classes = split(labels + self.first[place])
        without = None
        if plain:
            without = torch.cat(split(self._normalised(images, condition and condition.turns_only())))
        return Group(support, support_classes, query, query_classes, without, condition)

    def draw_halves(self, number: int) -> Tensor:
        """Further groups for the sketch's own loss: `[sketch_groups, 2, sketch_images, c, h, w]`.

        The two halves of a group are seen alike. Where groups have conditions, all groups of a draw show the same
        classes, each under a condition of its own (one of them plainly, where groups without a condition are drawn
        too), and their halves different ones: nothing but the condition tells which halves belong together. Without
        conditions the classes of a group tell that. Images may repeat between halves.
        """
        generator = self.generator('sketch', number)
        size, share = self.groups.sketch_images, self.groups.conditions
        halves = []
        for place in range(self.groups.sketch_groups):
            if not share or not place:
                bank = self.banks[self._bank(generator)]
                classes = torch.randperm(len(bank.members) * self.groups.turns, generator=generator)
                classes = classes[: self.groups.n_way * (2 if share else 1)]
                parts = classes.tensor_split(2) if share else (classes, classes)
            labels = torch.cat([part[torch.randint(len(part), (size,), generator=generator)] for part in parts])
            members = [bank.members[label % len(bank.members)] for label in labels.tolist()]
            picks = torch.stack([m[torch.randint(len(m), (), generator=generator)] for m in members])
            told = bool(share) and (share == 1 or place > 0)
            condition = self._any_condition(bank, generator) if told else None
            images = self._normalised(self._changed(bank, picks, labels, generator), condition, generator)
            halves.append(images.unflatten(0, (2, -1)))
        return torch.stack(halves)

    def batch(self, number: int, size: int) -> tuple[Tensor, Tensor]:
        """An ordinary batch of about `size` images of all classes, and their classes, with the groups' shares.

        A class comes as often as it has images, unlike in groups, where all come alike.
        Where groups have conditions every 16 images have one of their own, so that a batch is a fair sample.
        """
        generator = self.generator('batch', number)
        wanted = torch.multinomial(self.shares, size, replacement=True, generator=generator).bincount(
            minlength=len(self.banks)
        )
        images, labels = [], []
        for bank, first, count in zip(self.banks, self.first, wanted.tolist(), strict=True):
            if not count:
                continue
            picks = torch.randint(len(bank.labels), (count,), generator=generator)
            turns = torch.randint(self.groups.turns, (count,), generator=generator)
            classes = bank.labels[picks] + turns * len(bank.members)
            changed = self._changed(bank, picks, classes, generator)
            for part in changed.split(16 if self.groups.conditions else size):
                images.append(self._normalised(part, self._condition(bank, generator), generator))
            labels.append(classes + first)
        return torch.cat(images), torch.cat(labels)

    def images_of(self, number: int, what: str = 'group') -> int:
        """Images of group `number` of a series, support and query."""
        n_way, n_shot, n_query = self._sizes(self.banks[self._bank(self.generator(what, number))])
        return n_way * (n_shot + n_query)

    def _sizes(self, bank: ImageBank) -> tuple[int, int, int]:
        """Classes, support and query images a class of a group from this bank."""
        groups = self.groups
        n_way = min(groups.n_way, len(bank.members) * groups.turns)
        more = groups.n_way // n_way
        return n_way, groups.n_shot * more, groups.n_query * more

    def _bank(self, generator: torch.Generator) -> int:
        return int(torch.multinomial(self.shares, 1, generator=generator))

    def _condition(self, bank: ImageBank, generator: torch.Generator) -> Condition | None:
        share = self.groups.conditions
        if not share or (share < 1 and float(torch.rand((), generator=generator)) >= share):
            return None
        return self._any_condition(bank, generator)

    def _any_condition(self, bank: ImageBank, generator: torch.Generator) -> Condition:
        """A random condition; one that turns no image where turned classes are to be told apart."""
        _, chans, height, width = bank.images.shape
        drawn = Condition.draw(generator, chans, square=height == width)
        return drawn if self.groups.turns == 1 else dataclasses.replace(drawn, turns=0)

    def _changed(self, bank: ImageBank, picks: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Images of a bank in 0-1, augmented, turned as their class says."""
        images = bank.images[picks]
        how = self.augmentation
        if how is not None and how.timm:
            images = timm_augmented(images.cpu(), how.timm, generator).to(images.device)
        else:
            images = images.float().div_(255)
            images = images if how is None else augment(images, how, generator)
        return quarter_turns(images, labels // len(bank.members) * (4 // self.groups.turns))

    def _normalised(
        self, images: Tensor, condition: Condition | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Images in 0-1, seen under the condition, normalised."""
        if condition is not None:
            images = condition.apply(images.clamp(0, 1), generator)  # timm erases with noise, below zero too
        return (images - self.mean.to(images.device)) / self.std.to(images.device)


def quarter_turns(images: Tensor, turns: Tensor) -> Tensor:
    """Images `[n, c, h, w]`, each turned by its own number of quarter turns `[n]`."""
    turned = images.clone()
    for turn in turns.unique().tolist():
        chosen = turns == turn
        turned[chosen] = images[chosen].rot90(turn, (2, 3))
    return turned
