"""Groups of unseen classes to measure on, drawn once and saved, and their images.

Dimension letters: `n` images, `c h w` an image.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from timm_pudnet.adapt import MOST_UNLABELLED
from timm_pudnet.config import DamagedFileError, InputConfig, InputError, PudNetWarning, as_plain, checked_seed
from timm_pudnet.files import local_path, sha256, written_whole
from timm_pudnet.images import channel_statistics
from timm_pudnet.sketch import ImageSample
from timm_pudnet.training.conditions import Condition
from timm_pudnet.training.episodes import ImageBank


@dataclasses.dataclass(frozen=True)
class TestGroups:
    """Images of each group by their place in the bank.

    Args:
        support: `[groups, n_way, n_shot]`: they give sketch, norm statistics and heads; places in the support bank
            where there is one. None for all images of the group's classes in the support bank.
        query: `[groups, n_way, n_query]`: they are tested; no image is in both.
        conditions: The imaging condition of each group, under which its support and query are seen; None for none.
        n_unlabelled: Further images a class, without their labels: drawn, by the group's number as seed, from those of
            the class in the support's bank that are in neither support nor query.
    """

    __test__ = False  # not a pytest class, in spite of its name

    support: Tensor | None
    query: Tensor
    conditions: tuple[Condition, ...] | None = None
    n_unlabelled: int = 0

    @classmethod
    def draw(
        cls,
        bank: ImageBank,
        *,
        count: int = 500,
        n_way: int = 4,
        n_shot: int | Literal['all'] = 10,
        n_query: int = 15,
        seed: int = 0,
        support_bank: ImageBank | None = None,
        conditions: bool = False,
        n_unlabelled: int = 0,
    ) -> TestGroups:
        """Draws groups from the classes of a bank.

        Args:
            bank: Gives the query images, and the support images where there is no support bank.
            count: Groups.
            n_way: Classes a group.
            n_shot: Support images a class; `all` for all that the support bank has.
            n_query: Query images a class.
            seed: Of all draws, from 0 to 2**31 - 1.
            support_bank: Other images of the same classes, the train split for instance.
            conditions: Whether to draw an imaging condition for every group; the images are the same ones then.
            n_unlabelled: Further images a class, without labels; support and query are the same ones then.

        Raises:
            InputError: There are too few classes, or a class has too few images.
        """
        count, n_way, n_query, n_unlabelled = map(as_plain, (count, n_way, n_query, n_unlabelled))
        n_shot, seed = as_plain(n_shot), checked_seed(seed)
        shot = 0 if n_shot == 'all' else n_shot  # that are drawn
        for name, value in (('count', count), ('n_shot', 1 if n_shot == 'all' else n_shot), ('n_query', n_query)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f'{name} must be a whole number, at least 1, got {value}')
        if not isinstance(n_way, int) or not 2 <= n_way <= len(bank.class_names):
            raise InputError(
                f'n_way must be a whole number from 2 to {len(bank.class_names)}, the number of classes; got {n_way}'
            )
        if not isinstance(n_unlabelled, int) or not 0 <= n_unlabelled * n_way <= MOST_UNLABELLED:
            raise InputError(
                f'n_unlabelled must be a whole number from 0 to {MOST_UNLABELLED // n_way}, for a head is fitted to '
                f'{MOST_UNLABELLED:,} such images at most; got {n_unlabelled}'
            )
        if n_unlabelled and n_shot == 'all':
            raise InputError('n_shot all leaves no image of a class without its label: give a number')
        if n_shot == 'all' and support_bank is None:
            raise InputError('n_shot all needs a support bank: images of the classes beside those that are tested')
        if support_bank is None:
            _refuse_small_classes(bank, shot + n_query + n_unlabelled)
        else:
            check_same_classes(bank, support_bank)
            _refuse_small_classes(bank, n_query)
            _refuse_small_classes(support_bank, max(1, shot + n_unlabelled), ' for support')
        generator = torch.Generator().manual_seed(seed)

        def pick(members: Tensor, number: int) -> Tensor:
            return members[torch.randperm(len(members), generator=generator)[:number]]

        support, query = [], []
        for _ in range(count):
            classes = torch.randperm(len(bank.members), generator=generator)[:n_way].sort().values.tolist()
            if support_bank is None:
                picks = torch.stack([pick(bank.members[label], shot + n_query) for label in classes])
                support.append(picks[:, :shot])
                query.append(picks[:, shot:])
            else:
                query.append(torch.stack([pick(bank.members[label], n_query) for label in classes]))
                if shot:
                    support.append(torch.stack([pick(support_bank.members[label], shot) for label in classes]))
        _, chans, height, width = bank.images.shape
        shown = [Condition.draw(generator, chans, square=height == width) for _ in range(count * conditions)]
        return cls(
            torch.stack(support) if shot else None,
            torch.stack(query),
            tuple(shown) if conditions else None,
            n_unlabelled,
        )

    def __len__(self) -> int:
        return len(self.query)

    def check(self, bank: ImageBank, support_bank: ImageBank | None = None) -> None:
        """Raises InputError unless these can be groups of these banks, none of whose images gives and is tested."""
        if support_bank is not None:
            check_same_classes(bank, support_bank)
        elif self.support is None:
            raise InputError('these groups are of all images of a class: they need a support bank')
        else:
            _warn_of_copies(bank)
            for number, (support, query) in enumerate(zip(self.support, self.query, strict=True)):
                if torch.isin(query, support).any():
                    raise InputError(
                        f'group {number} tests images that are in its support too: were these groups drawn '
                        'with a support bank?'
                    )
        for places, images in ((self.support, support_bank or bank), (self.query, bank)):
            if places is not None and not 0 <= int(places.min()) <= int(places.max()) < len(images.labels):
                raise InputError(f'these groups are not of this bank: it has {len(images.labels)} images')
        tested = bank.labels[self.query]
        first = tested[:, :, :1]
        given = first if self.support is None else (support_bank or bank).labels[self.support]
        apart = first.flatten(1).sort(1).values.diff(dim=1)  # of the classes of each group
        if not ((tested == first).all() and (given == first).all() and (apart > 0).all()):
            raise InputError('these groups are not of this bank: its images at these places are of other classes')
        for number in range(len(self)) if self.n_unlabelled else ():
            self._unlabelled(number, bank, support_bank)

    def classes(self, number: int, bank: ImageBank) -> list[int]:
        """The classes of a group, by their numbers in the bank."""
        return bank.labels[self.query[number, :, 0]].tolist()

    def images(
        self, number: int, bank: ImageBank, support_bank: ImageBank | None, config: InputConfig, device: torch.device
    ) -> tuple[GroupImages, GroupImages]:
        """Support and query of a group; labels are `0..n_way-1`."""
        given = support_bank or bank
        if self.support is None:
            support = [given.members[label] for label in self.classes(number, bank)]
        else:
            support = list(self.support[number])
        condition = None if self.conditions is None else self.conditions[number]
        return (
            GroupImages(given, support, config, device, condition, 2 * number),
            GroupImages(bank, list(self.query[number]), config, device, condition, 2 * number + 1),
        )

    def unlabelled(
        self, number: int, bank: ImageBank, support_bank: ImageBank | None, config: InputConfig, device: torch.device
    ) -> GroupImages:
        """The images of a group that come without labels, as one heap."""
        condition = None if self.conditions is None else self.conditions[number]
        places = [self._unlabelled(number, bank, support_bank)]
        return GroupImages(support_bank or bank, places, config, device, condition, 2**32 + number)

    def _unlabelled(self, number: int, bank: ImageBank, support_bank: ImageBank | None) -> Tensor:
        """Places of a group's images without labels, in the bank of its support."""
        given, picks = support_bank or bank, [torch.empty(0, dtype=torch.long)]
        if self.n_unlabelled:
            assert self.support is not None
            generator = torch.Generator().manual_seed(number)
            used = self.support[number] if support_bank else torch.cat([self.support[number], self.query[number]], 1)
            for label in self.classes(number, bank):
                rest = given.members[label][~torch.isin(given.members[label], used)]
                if len(rest) < self.n_unlabelled:
                    raise InputError(
                        f'class {given.class_names[label]!r} has {len(rest)} images beside those of group {number}, '
                        f'{self.n_unlabelled} without labels are asked for'
                    )
                picks.append(rest[torch.randperm(len(rest), generator=generator)[: self.n_unlabelled]])
        return torch.cat(picks)

    @property
    def digest(self) -> str:
        """A short hash that tells one list of groups from another."""
        return sha256(json.dumps(self._lists()).encode())[:16]

    def _lists(self) -> dict[str, Any]:
        lists = {'support': 'all' if self.support is None else self.support.tolist(), 'query': self.query.tolist()}
        if self.conditions is not None:
            lists['conditions'] = [
                {**dataclasses.asdict(condition), 'order': list(condition.order)} for condition in self.conditions
            ]
        if self.n_unlabelled:
            lists['n_unlabelled'] = self.n_unlabelled
        return lists

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the groups as JSON."""
        with written_whole(local_path(path)) as beside:
            beside.write_text(json.dumps(self._lists(), separators=(',', ':')) + '\n', encoding='utf-8')

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TestGroups:
        """Reads what `save` wrote.

        Raises:
            DamagedFileError: The file holds no such groups.
        """
        try:
            data = json.loads(local_path(path).read_text(encoding='utf-8'))
            support = None if data['support'] == 'all' else torch.tensor(data['support'])
            query, conditions = torch.tensor(data['query']), data.get('conditions')
            unlabelled = data.get('n_unlabelled', 0)
            if not isinstance(unlabelled, int) or unlabelled < 0 or (unlabelled and support is None):
                raise ValueError(f'n_unlabelled is {unlabelled!r}')
            for places in (query,) if support is None else (support, query):
                if places.ndim != 3 or places.shape[:2] != query.shape[:2] or places.is_floating_point():
                    raise ValueError(f'places of the shape {list(places.shape)}')
            if conditions is not None:
                conditions = tuple(Condition(**condition) for condition in conditions)
                if len(conditions) != len(query):
                    raise ValueError(f'{len(conditions)} conditions for {len(query)} groups')
            return cls(support, query, conditions, unlabelled)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedFileError(f'{path} holds no groups: {error}') from error


class GroupImages:
    """Images of a group as networks get them: under the group's condition, normalised, in batches.

    Args:
        bank: Where they are.
        places: Places of the images of each class in the bank, a list of `[n]` a class.
        config: The target's input, for mean and std.
        device: Where the batches go.
        condition: The imaging condition that they are seen under.
        seed: Of the condition's noise.
    """

    def __init__(
        self,
        bank: ImageBank,
        places: list[Tensor],
        config: InputConfig,
        device: torch.device,
        condition: Condition | None = None,
        seed: int = 0,
    ) -> None:
        self.bank, self.places, self.config = bank, torch.cat(places), config
        self.labels = torch.arange(len(places)).repeat_interleave(torch.tensor([len(part) for part in places]))
        self.device, self.condition, self.seed = device, condition, seed
        self.size = ImageSample.for_size(config.input_size).size  # of a batch

    def __len__(self) -> int:
        return len(self.places)

    @property
    def fits(self) -> bool:
        """Whether one batch holds all."""
        return len(self) <= self.size

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images `[n, c, h, w]` on the device and labels `[n]` on the CPU; the same bits in every pass."""
        if self.fits:
            yield self._all, self.labels
            return
        yield from zip(self._parts(), self.labels.split(self.size), strict=True)

    @functools.cached_property
    def sample(self) -> Tensor:
        """The images, or where one batch does not hold them a sample of that size, as `predict_model` takes it."""
        if self.fits:
            return self._all
        sample = ImageSample(self.size)
        for images in self._parts():
            sample.add(images.cpu())
        return sample.images.to(self.device)

    @functools.cached_property
    def _all(self) -> Tensor:
        return torch.cat(list(self._parts()))

    def _parts(self) -> Iterator[Tensor]:
        mean, std = (values.to(self.bank.images.device) for values in channel_statistics(self.config))
        generator = torch.Generator().manual_seed(self.seed)
        for places in self.places.split(self.size):
            images = self.bank.images[places].float() / 255
            if self.condition is not None:
                images = self.condition.apply(images, generator)
            yield ((images - mean) / std).to(self.device)


def check_same_classes(bank: ImageBank, support_bank: ImageBank) -> None:
    """Raises unless the support bank has other images of the same classes."""
    if support_bank.class_names != bank.class_names:
        raise InputError(
            f'the support bank has the classes {", ".join(support_bank.class_names)}, '
            f'the tested one {", ".join(bank.class_names)}: they must be the same, in the same order'
        )
    if support_bank.images.shape[1:] != bank.images.shape[1:]:
        raise InputError(
            f'the support bank has images of {list(support_bank.images.shape[1:])}, '
            f'the tested one of {list(bank.images.shape[1:])}'
        )
    shared = int(torch.isin(bank.keys, support_bank.keys).sum())
    if shared > len(bank.images) / 2:
        raise InputError(
            f'{shared:,} of the {len(bank.images):,} tested images are in the support bank too: choose another split'
        )
    if shared:
        warnings.warn(
            f'{shared:,} of the {len(bank.images):,} tested images are in the support bank too, pixel by pixel: they '
            'flatter the result',
            PudNetWarning,
            stacklevel=2,
        )


def _warn_of_copies(bank: ImageBank) -> None:
    """Of images that are there more than once: one may be in a group's support, another among those it is tested on."""
    copies = len(bank.keys) - len(bank.keys.unique())
    if copies:
        warnings.warn(
            f'{copies:,} of the {len(bank.images):,} images are copies of others, pixel by pixel: where one gives the '
            'weights and the other is tested they flatter the result. Keep one of each',
            PudNetWarning,
            stacklevel=3,
        )


def _refuse_small_classes(bank: ImageBank, needed: int, what: str = '') -> None:
    for name, members in zip(bank.class_names, bank.members, strict=True):
        if len(members) < needed:
            raise InputError(f'class {name!r} has {len(members)} images{what}, a group needs {needed}')
