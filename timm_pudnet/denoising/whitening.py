"""Noise that neighbouring pixels share is made independent before an image is denoised, and shared again after.

A blind-spot network guesses a pixel's noise too where the neighbours tell it: cameras interpolate colours, JPEG drops
fine patterns, resizing blurs. Of smooth places the spectrum of such noise can be measured. A filter with the inverse of
its root makes the noise white, as that of training; what the network takes for noise then goes through a filter with
the root itself, and is taken from the image. Where noise has next to nothing of a frequency, no filter can make it
white, and the neighbours would tell all of it; so a little white noise is added first, which is removed with the rest.

Dimension letters: `n` images, `c` channels or colour components, `h w` height and width, `q` squares, `l` lags.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_pudnet.denoising.posterior import CONSTANT, colour_components, cosine_rows, line_through

Covariance = Sequence[Sequence[Sequence[float]]]

SIDE = 12  # pixels of a square whose spectrum is looked at
STRIDE = 4  # pixels from one to the next
LOWEST = 3  # half waves in a square: what is coarser is told by what is not
CUT = 0.1  # share of black and white pixels, whose noise was cut off, from which on a square is not looked at
SMOOTHEST = 0.02, 2.42  # share of the squares of one brightness that are taken to hold noise alone; how many standard
SMOOTH = 0.1, 1.755  # deviations their mean is below that of all squares of noise; more of them, where they are alike
LEAST = 16  # squares of such
FEWEST, ENOUGH = 400, 3000  # squares, of which some are smooth
MOST_PARTS = 8  # brightnesses apart
ROUNDS = 4
FLAT = 0.82  # flatness of a spectrum from which on noise is white as it is
UNLIKE = 2.0  # ratio of energies of the smoothest squares: from there on they hold texture
MOST_COARSER = 1.5  # times the variance of what is told, that coarser noise may have
COARSE = 0.1  # times the mean variance of noise, that the coarsest of it has at least
LAGS = 7  # pixels, own one included, over which noise is shared
REACH = 5  # pixels of the filters, in each direction
FLOOR = 0.02  # variance of the white noise that is added, of that of the coarsest noise
PERIOD = 128  # pixels after which the noise that is added comes again
PIXELS = 2**18  # of an image, that are filtered at once
STRONGER = 1.25  # noise counts as, once it is white: what is told of it is of the smoothest squares; set by hand


class SharedNoise(NamedTuple):
    """How neighbouring pixels share noise, and what it is once `Whitening` has made it white.

    Args:
        covariance: Of `Whitening`.
        noise: For each colour component its variance in black and in white, as a `BlindSpotUNet` takes it; None where
            that is told by the images made white (`estimate_noise`), for it was nearly so before.
    """

    covariance: Covariance
    noise: list[list[float] | None]


class Whitening(nn.Module):
    """Filters that make noise white, and undo that.

    Args:
        covariance: For each colour component that of the noise of two pixels, `[l, l]`, by how many rows and columns
            they are apart (`shared_noise`); all zero where it is left as it is.
    """

    before: Tensor
    after: Tensor
    added: Tensor
    components: Tensor
    shares: Tensor

    def __init__(self, covariance: Covariance) -> None:
        super().__init__()
        lags = torch.tensor(covariance, dtype=torch.float64, device='cpu')
        if lags.ndim != 3 or lags.shape[1] != lags.shape[2] or not 2 <= lags.shape[1] <= SIDE:
            raise ValueError(f'covariance must be [c, l, l] with l from 2 to {SIDE}, got {list(lags.shape)}')
        if not lags.isfinite().all():
            raise ValueError('covariance holds numbers that are not finite')
        spectrum = _spectrum(lags)
        coarsest = spectrum[:, :1, :1].clamp_min(0)
        spectrum = spectrum.clamp_min(0) + FLOOR * coarsest
        root = torch.where(coarsest > 0, (spectrum / spectrum[:, :1, :1].clamp_min(1e-30)).sqrt(), 1.0)
        for name, response in (('before', 1 / root), ('after', root)):
            self.register_buffer(name, _kernels(response).float(), persistent=False)
        # Of `noise`, which `SharedNoise` gives, what pixels have of it as they are.
        factors = lags.new_tensor([STRONGER if _flatness(own.clamp_min(1e-30)) < FLAT else 1.0 for own in spectrum])
        shares = lags[:, :1, :1] / (factors.view(-1, 1, 1) * spectrum[:, :1, :1]).clamp_min(1e-30)
        self.register_buffer('shares', torch.where(coarsest > 0, shares, 1.0).float(), persistent=False)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(len(lags), PERIOD, PERIOD, generator=generator, dtype=torch.float64, device='cpu')
        self.register_buffer('components', colour_components(len(lags)), persistent=False)
        self.register_buffer('added', (noise * (FLOOR * coarsest).sqrt()).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[n, c, h, w]` whose noise is white; of one channel for several components brightness alone."""
        result = torch.empty_like(images)
        for rows, strip in self._filtered(lambda rows: self._noisier(images, rows), images, self.before):
            result[..., rows, :] = strip
        return result

    def undo(self, answers: Tensor, whitened: Tensor, images: Tensor) -> Tensor:
        """`images` without the noise that `answers` lack beside `whitened`, which is what `forward` made of them."""
        result = torch.empty_like(images)
        noise = self._filtered(lambda rows: whitened[..., rows, :] - answers[..., rows, :], images, self.after)
        for rows, strip in noise:
            result[..., rows, :] = self._noisier(images, rows) - strip
        return result

    def _noisier(self, images: Tensor, rows: slice) -> Tensor:
        """Rows of images `[n, c, h, w]` and of the noise that is added to them, the same for all."""
        count, width = len(self.added), images.shape[3]
        places = torch.arange(rows.start, rows.stop, device=self.added.device) % PERIOD
        noise = self.added[:, places].repeat(1, 1, -(-width // PERIOD))[..., :width]
        if images.shape[1] == count:
            with torch.autocast(noise.device.type, enabled=False):
                noise = torch.einsum('kc,khw->chw', self.components, noise)
        else:
            noise = noise[:1] / math.sqrt(count)
        return images[..., rows, :] + noise.to(images)

    def _filtered(
        self, part: Callable[[slice], Tensor], like: Tensor, kernels: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        """Strip by strip what `part` gives of images, filtered; beyond the border are the pixels at it."""
        height, width = like.shape[2:]
        alone = like.shape[1] != len(kernels)
        many = max(1, PIXELS // width)
        for top in range(0, height, many):
            bottom = min(top + many, height)
            rows = slice(max(top - REACH, 0), min(bottom + REACH, height))
            with torch.autocast(kernels.device.type, enabled=False):
                weight = kernels[:1, None]
                if not alone:
                    weight = torch.einsum('kd,kij,kc->dcij', self.components, kernels, self.components)
                weight = weight if weight.dtype == torch.float64 else weight.float()
                strip = part(rows).to(weight)
                strip = strip.flatten(0, 1)[:, None] if alone else strip
                missing = (REACH, REACH, REACH - (top - rows.start), REACH - (rows.stop - bottom))
                strip = F.conv2d(F.pad(strip, missing, mode='replicate'), weight)
            yield slice(top, bottom), strip.view(*like.shape[:2], bottom - top, width).to(like)


def shared_noise(patches: Sequence[Tensor]) -> SharedNoise | None:
    """How neighbouring pixels of images share noise; None where that cannot be told from white noise.

    The cosine transform of squares of 12x12 pixels is looked at. Squares are sorted by how bright they are; among those
    of one brightness the fiftieth of least energy is taken to be smooth, so that it holds noise alone. Energy is
    relative to the spectrum of what is taken, which is found so in some rounds. Where even the energies of these differ
    by more than those of noise can, they hold texture (small images without noise, for instance), and nothing is told.
    Where noise turns out not to be white, and a tenth is as smooth, that tells more exactly how it is shared.

    Args:
        patches: Of the images, `[n, c, h, w]`, black 0 and white 1; those of other sides come next. The first that hold
            enough squares are looked at.
    """
    held = [
        len(noisy) * math.prod(max(0, (side - SIDE) // STRIDE + 1) for side in noisy.shape[2:]) for noisy in patches
    ]
    if max(held) < FEWEST:
        return None
    noisy = patches[next((place for place, count in enumerate(held) if count >= ENOUGH), held.index(max(held)))]
    waves = cosine_rows(SIDE).to(noisy)
    cut = ((noisy == 0) | (noisy == 1)).to(noisy).mean(1)
    lit = _squares(cut).mean((1, 2)) <= CUT
    components = colour_components(noisy.shape[1]).to(noisy)
    seen: list[tuple[Tensor, Tensor]] = []
    for component in components:
        squares, levels = (
            _squares(torch.einsum('c,nchw->nhw', weights, noisy)) for weights in (component, component.square())
        )
        blocks = squares.unflatten(1, (-1, STRIDE)).unflatten(3, (-1, STRIDE))
        told = lit & (blocks.amax((2, 4)) - blocks.amin((2, 4)) > CONSTANT).all(2).all(1)  # no part of a frame
        seen.append(((waves @ squares[told] @ waves.t()).square(), levels[told].mean((1, 2))))
    found = [_smoothest(energies, levels, *SMOOTHEST) for energies, levels in seen]
    found = [own if own is not None and _is_coarse(own[0]) else None for own in found]
    if found[0] is None or not any(own is not None and _flatness(own[0]) < FLAT for own in found):
        return None  # where brightness tells nothing, what colours seem to tell is texture too
    covariance, noise = [], []
    for first, (energies, levels) in zip(found, seen, strict=True):
        own = None if first is None else _smoothest(energies, levels, *SMOOTH) or first
        if own is None or not _is_coarse(own[0]):
            covariance.append([[0.0] * LAGS] * LAGS)
            noise.append(None)
            continue
        spectrum, line = own
        lags = _covariance(spectrum)
        coarsest = float(_spectrum(lags[None])[0, 0, 0])
        covariance.append(lags.tolist())
        shares = _flatness(spectrum) < FLAT
        noise.append([STRONGER * coarsest * (value + FLOOR) for value in line] if shares else None)
    return SharedNoise(covariance, noise)


def _is_coarse(spectrum: Tensor) -> bool:
    """Whether the coarsest noise is more than next to nothing, by which the filters are scaled; of dither it is not."""
    return bool(_spectrum(_covariance(spectrum)[None])[0, 0, 0] > COARSE * spectrum.mean())


def _squares(planes: Tensor) -> Tensor:
    """All squares of planes `[n, h, w]`, `[q, SIDE, SIDE]`."""
    return planes.unfold(1, SIDE, STRIDE).unfold(2, SIDE, STRIDE).flatten(0, 2)


def _smoothest(energies: Tensor, levels: Tensor, share: float, below: float) -> tuple[Tensor, list[float]] | None:
    """The spectrum of noise, and how strong it is in black and in white beside that; None where nothing is told of it.

    Args:
        energies: Of each pattern of squares `[q, SIDE, SIDE]`.
        levels: Their brightness `[q]`.
        share: How many of them are smooth.
        below: By how many standard deviations the mean energy of so many squares of noise is below that of all.
    """
    if len(energies) < FEWEST:
        return None
    parts = max(1, min(MOST_PARTS, int(len(energies) * share) // LEAST))
    order = levels.argsort().tensor_split(parts)
    by_level = [energies[part] for part in order]
    waves = torch.arange(SIDE, device=levels.device)
    height = (waves[:, None] ** 2 + waves**2).sqrt()
    told, lowest = height >= LOWEST, (height >= LOWEST) & (height < LOWEST + 1.5)
    next_lowest = (height >= LOWEST + 1.5) & (height < LOWEST + 3.5)
    spectrum = torch.ones_like(energies[0])
    for _ in range(ROUNDS):
        shapes, sizes, unlike = [], [], []
        for own in by_level:
            size, places = (own.flatten(1) @ (told / spectrum).flatten() / told.sum()).sort()
            few = max(LEAST, int(share * len(own)))
            unlike.append(size[min(2 * few, len(size) - 1)] / size[few // 4])
            sizes.append(size[:few].mean())
            shapes.append(own[places[:few]].mean(0) / sizes[-1])
        spectrum = torch.stack(shapes).mean(0).clamp_min(1e-6)
        # Slopes and texture are coarse: how much of the noise is, is told by how it grows towards that.
        here, there = (spectrum[ring].mean().log() for ring in (lowest, next_lowest))
        slope = (here - there) / (height[next_lowest].square().mean() - height[lowest].square().mean())
        more = (slope * (height[lowest].square().mean() - height.square())).clamp(0, math.log(MOST_COARSER))
        spectrum = torch.where(told, spectrum, (here + more).exp())
    if not float(torch.stack(unlike).mean()) < UNLIKE:
        return None
    strengths = torch.stack(sizes)
    places = torch.stack([levels[part].mean() for part in order])
    black, white = line_through(places, strengths)
    mean = black + (white - black) * float(places.mean())
    line = [black / mean, white / mean]
    return spectrum * strengths.mean() / (1 - below * math.sqrt(2 / int(told.sum()))), line


def _flatness(spectrum: Tensor) -> float:
    """Its geometric over its arithmetic mean: 1 of white noise, less the more of it pixels share."""
    return float(spectrum.log().mean().exp() / spectrum.mean())


def _covariance(spectrum: Tensor) -> Tensor:
    """Of a spectrum `[SIDE, SIDE]` the covariances at `[l, l]` lags, which fade out where nothing is told any more."""
    places = torch.arange(2 * SIDE, device=spectrum.device)
    places = torch.minimum(places, 2 * SIDE - places).clamp(max=SIDE - 1)
    lags = torch.fft.ifft2(spectrum[places][:, places]).real[:LAGS, :LAGS]
    fade = 0.5 + 0.5 * torch.cos(math.pi * torch.arange(LAGS, device=spectrum.device) / LAGS)
    return lags * fade[:, None] * fade


def _spectrum(lags: Tensor) -> Tensor:
    """The spectrum `[c, 2 SIDE, 2 SIDE]` of covariances `[c, l, l]`, which are the same in all four directions."""
    size, count = 2 * SIDE, lags.shape[1]
    whole = lags.new_zeros(len(lags), size, size)
    whole[:, :count, :count] = lags
    whole[:, -count + 1 :, :] = whole[:, 1:count, :].flip(1)
    whole[:, :, -count + 1 :] = whole[:, :, 1:count].flip(2)
    return torch.fft.fft2(whole).real


def _kernels(response: Tensor) -> Tensor:
    """Filters `[c, 2 REACH + 1, 2 REACH + 1]` with about these responses, that leave constant images as they are."""
    middle = response.shape[1] // 2
    rows = slice(middle - REACH, middle + REACH + 1)
    kernels = torch.fft.fftshift(torch.fft.ifft2(response).real, dim=(1, 2))[:, rows, rows]
    return kernels / kernels.sum((1, 2), keepdim=True)
