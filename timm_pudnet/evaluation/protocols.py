"""Groups of unseen classes to measure on, drawn once and saved."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import torch
from torch import Tensor

from timm_pudnet.config import DamagedFileError, InputError
from timm_pudnet.hypernet import written_whole
from timm_pudnet.training.episodes import ImageBank


@dataclasses.dataclass(frozen=True)
class TestGroups:
    """Images of each group by their place in the bank.

    Args:
        support: `[groups, n_way, n_shot]`: they give sketch, norm statistics and centroids.
        query: `[groups, n_way, n_query]`: they are tested; no image is in both.
    """

    __test__ = False  # not a pytest class, in spite of its name

    support: Tensor
    query: Tensor

    @classmethod
    def draw(
        cls, bank: ImageBank, *, count: int = 500, n_way: int = 4, n_shot: int = 10, n_query: int = 15, seed: int = 0
    ) -> TestGroups:
        """Draws groups from the classes of a bank.

        Raises:
            InputError: There are too few classes, or a class has too few images.
        """
        for name, value in (('count', count), ('n_shot', n_shot), ('n_query', n_query)):
            if value < 1:
                raise InputError(f'{name} must be at least 1, got {value}')
        if not 2 <= n_way <= len(bank.class_names):
            raise InputError(f'n_way is {n_way}, but there are {len(bank.class_names)} classes')
        for name, members in zip(bank.class_names, bank.members, strict=True):
            if len(members) < n_shot + n_query:
                raise InputError(f'class {name!r} has {len(members)} images, a group needs {n_shot + n_query}')
        generator = torch.Generator().manual_seed(seed)
        groups = []
        for _ in range(count):
            classes = torch.randperm(len(bank.members), generator=generator)[:n_way].sort().values.tolist()
            members = [bank.members[label] for label in classes]
            picks = [m[torch.randperm(len(m), generator=generator)[: n_shot + n_query]] for m in members]
            groups.append(torch.stack(picks))
        support, query = torch.stack(groups).split([n_shot, n_query], 2)
        return cls(support, query)

    def __len__(self) -> int:
        return len(self.support)

    @property
    def digest(self) -> str:
        """A short hash that tells one list of groups from another."""
        return hashlib.sha256(json.dumps(self._lists()).encode()).hexdigest()[:16]

    def _lists(self) -> dict[str, list]:
        return {'support': self.support.tolist(), 'query': self.query.tolist()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the groups as JSON."""
        with written_whole(Path(path)) as beside:
            beside.write_text(json.dumps(self._lists(), separators=(',', ':')) + '\n', encoding='utf-8')

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TestGroups:
        """Reads what `save` wrote.

        Raises:
            DamagedFileError: The file holds no such groups.
        """
        try:
            data = json.loads(Path(path).read_text(encoding='utf-8'))
            return cls(torch.tensor(data['support']), torch.tensor(data['query']))
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedFileError(f'{path} holds no groups: {error}') from error
