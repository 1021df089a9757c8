"""What a noisy pixel itself tells beside the guess from its neighbours; and how strong the noise of images is.

A blind-spot network guesses each pixel without looking at it. Where the noise is weak that gives away what could be
known best, fine texture. Given the noise's variance `v` and the guess's own error of variance `e`, the mean of the
clean pixel is `guess + e / (e + v) (noisy - guess)` (Laine et al., High-Quality Self-Supervised Deep Image Denoising,
for networks that give `e`). Here `e + v` is measured around each pixel, and what of it is `e` is shared out among the
pixels there by the contrast of the guess: it errs at edges, not in the sky. This is done for brightness and two colour
components apart: what texture the guess misses is in brightness nearly alone, the noise in all three.

Dimension letters: `n` images, `c` channels, `k` colour components, `h w` height and width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_pudnet.config import InputError

WINDOW = 31  # pixels, in each direction, over which the guess's error is measured
EVEN = 0.2  # of the mean contrast there that every pixel has beside its own, in sharing the error out
FAINT = 1e-4  # contrast that is none
BLOCK = 6  # pixels of a block whose fine patterns the noise is measured by; not the 8 of JPEG
BLOCKS = 2  # in each direction, that are taken together
FINE = 8  # patterns of a block with so many half waves or more, of its two directions together, are looked at
SMOOTH = 0.1  # share of what has one brightness that is taken to hold noise alone: where these are weakest
LEAST_BLOCKS = 64  # of one brightness
DARK = 0.03  # of the mean variance of noise: added to all where dark places are compared with others
CONSTANT = 1e-6  # range of pixels that are all the same
FEW = 0.15  # of the squares, that are not looked at where they hold a part of one value; set by hand
LEVEL_ERROR = 0.02  # of a brightness; levels no further apart than this say nothing about how noise grows with it


def colour_components(channels: int) -> Tensor:
    """Orthonormal rows `[c, c]`: brightness, and for three channels red against blue, and green against both."""
    return cosine_rows(channels)


def cosine_rows(count: int) -> Tensor:
    """Orthonormal rows `[count, count]` of the cosine transform, each of half a wave more than the one before."""
    place = torch.arange(count, dtype=torch.float32)  # whatever torch's default is
    rows = torch.cos((2 * place + 1) * place[:, None] * math.pi / (2 * count)) * math.sqrt(2 / count)
    rows[0] /= math.sqrt(2)
    return rows


class Posterior(nn.Module):
    """Mean of the clean image, given the noisy one, a guess without each pixel itself, and the noise.

    Args:
        noise: For each colour component the variance of its noise in black and in white, as `estimate_noise` gives
            them; linear between, in the guessed channels that the component is made of.
        left: Where files clipped the noise, the share of that variance which is left `[k]`, of guesses from 0 to 1
            (`clipped_share`).
    """

    black: Tensor
    white: Tensor
    components: Tensor
    left: Tensor | None

    def __init__(self, noise: Sequence[Sequence[float]], left: Tensor | None = None) -> None:
        super().__init__()
        variances = torch.tensor(noise, dtype=torch.float32)
        if variances.ndim != 2 or variances.shape[1] != 2 or not variances.isfinite().all() or variances.min() < 0:
            raise ValueError(f'noise must be two variances, of black and of white, for each channel, got {noise}')
        self.register_buffer('black', variances[:, :1, None], persistent=False)
        self.register_buffer('white', variances[:, 1:, None], persistent=False)
        self.register_buffer('components', colour_components(len(variances)), persistent=False)
        self.register_buffer('left', left, persistent=False)

    def deviations(self, shares: Tensor | float = 1.0) -> list[float]:
        """Standard deviation of the noise of a channel in black and in white, in the mean over the channels.

        Where it was made white first, `shares` of each component's variance are what it had before (`Whitening`).
        """
        return [float((variances * shares).mean().sqrt()) for variances in (self.black, self.white)]

    def forward(self, noisy: Tensor, guess: Tensor) -> Tensor:
        """Images `[n, c, h, w]` of such, both with black 0 and white 1; of the guess's type, weighed in float32."""
        with torch.autocast(guess.device.type, enabled=False):
            return self._weighed(_exact(noisy), _exact(guess)).to(guess.dtype)

    def _weighed(self, noisy: Tensor, guess: Tensor) -> Tensor:
        components, noise = self.components.to(guess), self.variances(guess)
        rest = torch.einsum('kc,nchw->nkhw', components, noisy - guess)
        # Measured over so many pixels, the variance of noise alone is above `noise` as often as below.
        error = _around(rest.square() - noise * (1 + math.sqrt(2) / WINDOW)).clamp_min(0)
        contrast = _contrast(torch.einsum('kc,nchw->nkhw', components, guess))
        its_mean = _around(contrast)
        error = error * (contrast + EVEN * its_mean) / ((1 + EVEN) * its_mean)
        share = error / (error + noise).clamp_min(1e-12)
        return guess + torch.einsum('kc,nkhw->nchw', components, share * rest)

    def variances(self, guess: Tensor) -> Tensor:
        """Of the components' noise at each pixel, `[n, k, h, w]`, by guesses `[n, c, h, w]`."""
        black, white, components = (tensor.to(guess) for tensor in (self.black, self.white, self.components))
        if self.left is None:
            return torch.lerp(black, white, _levels(guess, components))
        levels = guess.nan_to_num().clamp(0, 1)
        left = self.left.to(guess)[(levels * (len(self.left) - 1)).round().long()]
        shares = components.square()
        dark, bright = (torch.einsum('kc,nchw->nkhw', shares, part) for part in (left * (1 - levels), left * levels))
        return black * dark + white * bright


def _exact(values: Tensor) -> Tensor:
    """In float32, or float64 where they are: half precision has no room for variances."""
    return values if values.dtype == torch.float64 else values.float()


def _levels(guesses: Tensor, components: Tensor) -> Tensor:
    """How bright the channels of each component are, by their share in it, in 0-1: its noise is the sum of theirs."""
    return torch.einsum('kc,nchw->nkhw', components.square(), guesses.clamp(0, 1))


def _contrast(values: Tensor) -> Tensor:
    """The range of the 3x3 pixels around each."""
    most = least = F.pad(values, (1, 1, 1, 1), mode='replicate')
    for dim in (3, 2):  # many times as fast as pooling
        length = values.shape[dim]
        most, least = (
            functools.reduce(pick, [found.narrow(dim, start, length) for start in range(3)])
            for found, pick in ((most, torch.maximum), (least, torch.minimum))
        )
    return most - least + FAINT


def _around(values: Tensor) -> Tensor:
    """Means over the window around each pixel, of what of it is in the image."""
    reach = WINDOW // 2
    for dim, padding in ((3, (reach, reach)), (2, (0, 0, reach, reach))):
        places = torch.arange(values.shape[dim], device=values.device)
        inside = (places + reach).clamp(max=len(places) - 1) - (places - reach).clamp(min=0) + 1
        values = _window_sums(F.pad(values, padding), dim) / inside.view(-1, *[1] * (3 - dim)).to(values)
    return values


def _window_sums(values: Tensor, dim: int) -> Tensor:
    """Sums of `WINDOW` values that follow each other along a dimension: of ones, twos, fours, ... of them."""
    sums, width, start = values, 1, 0
    total: Tensor | None = None
    length = values.shape[dim] - WINDOW + 1
    while width <= WINDOW:
        if WINDOW & width:
            part = sums.narrow(dim, start, length)
            total, start = part if total is None else total + part, start + width
        left, width = sums.shape[dim] - width, 2 * width
        if width <= WINDOW:
            sums = sums.narrow(dim, 0, left) + sums.narrow(dim, width // 2, left)
    assert total is not None
    return total


def estimate_noise(noisy: Tensor, guesses: Tensor) -> list[list[float]]:
    """Variance of the noise of images, from blind guesses of them: of each colour component in black and in white.

    Of squares of 12x12 pixels the finest patterns are looked at (the last of the cosine transform of each 6x6): images
    have least there, noise that is independent from pixel to pixel as much as anywhere. Squares are sorted by how
    bright the guess is; among those of one brightness the tenth where these patterns are weakest is taken to be smooth,
    so that it holds noise alone. A line is put through what these give, as a first guess of how noise grows with
    brightness, by which squares of unlike brightness are compared once more. Squares with a part of one value, where
    they are few, are not looked at.

    Args:
        noisy: `[n, c, h, w]`, black 0 and white 1, sides of 6 pixels or more.
        guesses: The same without noise, each pixel from its neighbours.

    Returns:
        `c` pairs, for `Posterior`; none below zero.

    Raises:
        InputError: The images are too small, or not of one shape with the guesses.

    Example:
        >>> clean = torch.full((8, 3, 64, 64), 0.5)
        >>> noisy = clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        >>> black, white = estimate_noise(noisy, clean)[0]
        >>> round(black, 3), round(white, 3)
        (0.01, 0.01)
    """
    if noisy.ndim != 4 or noisy.shape != guesses.shape or min(noisy.shape[2:]) < BLOCK or not len(noisy):
        raise InputError(
            f'noise cannot be estimated from images {list(noisy.shape)} and guesses {list(guesses.shape)}: both must '
            f'be [n, c, h, w] with sides of at least {BLOCK} pixels'
        )
    noisy, guesses = _exact(noisy), _exact(guesses)
    components = colour_components(noisy.shape[1]).to(noisy)
    return [line_through(*found) for found in zip(*noise_by_level(noisy, guesses, components), strict=True)]


def noise_by_level(noisy: Tensor, guesses: Tensor, components: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Two lists with a tensor for each component: levels of brightness, and the variance of its noise at each.

    Args:
        noisy: As those of `estimate_noise`.
        guesses: As those of `estimate_noise`.
        components: Orthonormal rows, of colour components or of the channels themselves.
    """
    patterns = fine_patterns().to(noisy)
    planes = torch.einsum('kc,nchw->knhw', components, noisy).flatten(0, 1)[:, None]
    fine = F.conv2d(planes, patterns, stride=BLOCK).square().mean(1)
    side = min(BLOCKS, *fine.shape[1:])
    blocks = F.avg_pool2d(fine, side, 1).view(len(components), -1)  # [c, k]
    levels = F.avg_pool2d(F.avg_pool2d(_levels(guesses, components), BLOCK), side, 1).transpose(0, 1).flatten(1)
    # Where black or white is all there is, the noise was clipped away, or there never was any: nothing is told of it.
    lit = ((noisy > 0) & (noisy < 1)).any(1, keepdim=True).to(noisy)
    lit = -F.max_pool2d(-F.max_pool2d(lit, BLOCK), side, 1).flatten() > 0  # every block of a square has such pixels
    if not lit.any():
        lit = torch.ones_like(lit)
    # Nor is it where a component is constant (frames, colours hidden under alpha, the chroma of grey among colour); but
    # where that is so in many places there is no noise. Black stays: of few photons there may be none.
    ranges = F.max_pool2d(planes, BLOCK) + F.max_pool2d(-planes, BLOCK)
    black = F.max_pool2d(_levels(noisy, components), BLOCK).transpose(0, 1).flatten(0, 1)[:, None] <= CONSTANT
    varied = -F.max_pool2d(-((ranges > CONSTANT) | black).to(noisy), side, 1).view(len(components), -1) > 0
    told = torch.where((lit & varied).sum(1, keepdim=True) >= (1 - FEW) * lit.sum(), lit & varied, lit)
    # Of blocks of noise alone with one variance, the tenth of least is so much below it (Wilson and Hilferty).
    spread = 2 / (9 * side**2 * len(patterns))
    below = (1 - spread - 1.2816 * math.sqrt(spread)) ** 3
    places, noise = [], []
    for all_variances, all_levels, where in zip(blocks, levels, told, strict=True):
        variances, its_levels = all_variances[where], all_levels[where]
        parts = its_levels.argsort().tensor_split(max(1, min(8, len(its_levels) // LEAST_BLOCKS)))
        middles = torch.stack([its_levels[part].mean() for part in parts])
        found = torch.stack([variances[part].quantile(SMOOTH) for part in parts]) / below
        # Levels differ within a part, in the darkest one many times over. Where noise grows with them the least tenth
        # has its darkest squares alone: so once more, each square brought to the part's level first.
        black, white = line_through(middles, found)
        grown = torch.lerp(its_levels.new_tensor(black), its_levels.new_tensor(white), its_levels)
        grown = grown + DARK * grown.mean() + 1e-12
        alike = [variances[part] * (grown[part].mean() / grown[part]) for part in parts]
        places.append(middles)
        noise.append(torch.stack([part.quantile(SMOOTH) for part in alike]) / below)
    return places, noise


def fine_patterns() -> Tensor:
    """The finest patterns of the orthonormal cosine transform of a block, `[p, 1, BLOCK, BLOCK]`."""
    waves, rows = torch.arange(BLOCK), cosine_rows(BLOCK)
    fine = waves[:, None] + waves >= FINE
    return torch.einsum('ui,vj->uvij', rows, rows)[fine][:, None]


def line_through(places: Tensor, variances: Tensor) -> list[float]:
    """Ends at 0 and 1 of a line through variances at places, which does not fall and is nowhere below zero.

    By least squares of about relative errors: where nothing is smooth variances are too large, and count for little.
    """
    weight = (variances + 0.3 * variances.mean()).clamp_min(1e-12) ** -2
    middle, level = ((weight * values).sum() / weight.sum() for values in (places, variances))
    away = places - middle
    spread = (weight * (away.square() + LEVEL_ERROR**2)).sum().clamp_min(1e-12)
    slope = (weight * away * (variances - level)).sum() / spread
    slope = slope.clamp(torch.zeros_like(level), level / middle.clamp_min(1e-6))
    return torch.stack([level - slope * middle, level + slope * (1 - middle)]).clamp_min(0).tolist()
