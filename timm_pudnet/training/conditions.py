"""Imaging conditions: what cameras, stains and lighting do to all images of a set alike.

Dimension letters: `n` images, `c h w` an image.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from timm_pudnet.config import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Condition:
    """One way in which every image of a set was taken.

    Args:
        order: Place that each channel is taken from, a permutation of `0..c-1`.
        inverted: Whether bright is dark.
        turns: Quarter turns, 0-3; other than 0 or 2 only for square images.
        gamma: Exponent of the pixel values, above zero.
        noise: Standard deviation of Gaussian noise, in the 0-1 range of pixel values.

    Raises:
        InputError: A value is out of range.

    Example:
        >>> Condition(order=(0,), inverted=True).apply(torch.zeros(1, 1, 2, 2)).flatten().tolist()
        [1.0, 1.0, 1.0, 1.0]
    """

    order: tuple[int, ...]
    inverted: bool = False
    turns: int = 0
    gamma: float = 1.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, 'order', tuple(self.order))
        if sorted(self.order) != list(range(len(self.order))):
            raise InputError(f'order must be a permutation of the channels, got {self.order}')
        if self.turns not in range(4) or not 0 < self.gamma < math.inf or not 0 <= self.noise <= 1:
            raise InputError(f'turns must be in 0-3, gamma above zero, noise in 0-1, got {self}')

    @classmethod
    def draw(cls, generator: torch.Generator, chans: int = 3, *, square: bool = True) -> Condition:
        """A random condition: any order, inversion and turn alike, gamma 0.5-2, noise 0-0.1."""
        order = torch.randperm(chans, generator=generator).tolist()
        inverted, turns = torch.randint(0, 4, (2,), generator=generator).tolist()
        gamma, noise = torch.rand(2, generator=generator).tolist()
        return cls(
            order=tuple(order),
            inverted=inverted >= 2,
            turns=turns if square else turns // 2 * 2,
            gamma=2 ** (2 * gamma - 1),
            noise=0.1 * noise,
        )

    def turns_only(self) -> Condition:
        """The same turns, and nothing else."""
        return Condition(order=tuple(range(len(self.order))), turns=self.turns)

    def apply(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Float images `[n, c, h, w]` in 0-1 as this condition shows them; the noise comes from the CPU's generator."""
        images = images[:, list(self.order)].rot90(self.turns, (2, 3)) ** self.gamma
        if self.inverted:
            images = 1 - images
        if self.noise:
            images = images + self.noise * torch.randn(images.shape, generator=generator).to(images.device)
        return images.clamp(0, 1)
