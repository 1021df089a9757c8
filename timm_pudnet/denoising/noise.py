"""Noise, and the blind-spot loss that learns to remove it without ever seeing a clean image (Noise2Void).

Dimension letters: `n` images, `c h w` an image, `k` blind spots of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from timm_pudnet.config import InputError

BOX = 3  # one pixel in each box of so many by so many is a blind spot
REACH = 2  # its value is that of another pixel, at most so far away in each direction


def add_noise(images: Tensor, kind: str, sigma: float, generator: torch.Generator) -> Tensor:
    """Noisy copies of images; pixels below 0 and above 1 are left so.

    Args:
        images: `[..., h, w]`, pixels in 0-1.
        kind: `gaussian`: added, with standard deviation `sigma` everywhere. `poisson`: of counted photons, with
            standard deviation `sigma` at a grey of 0.5, less in the dark. `own`: none, they are as noisy as they are.
        sigma: In units of the pixels, which are in 0-1 (sigma 25 of 255 is 0.098).
        generator: Of the draws, on the CPU.

    Raises:
        InputError: The kind is not known.

    Example:
        >>> noisy = add_noise(torch.full((3, 100, 100), 0.5), 'poisson', 0.25, torch.Generator().manual_seed(0))
        >>> round(float(noisy.mean()), 2), round(float(noisy.std()), 2)
        (0.5, 0.25)
    """
    if kind == 'own':
        return images
    if kind == 'gaussian':
        return images + sigma * torch.randn(images.shape, generator=generator).to(images.device)
    if kind == 'poisson':
        photons = 0.5 / sigma**2
        return (torch.poisson(images.cpu().clamp(min=0) * photons, generator=generator) / photons).to(images.device)
    raise InputError(f'noise {kind!r}: use gaussian, poisson or own')


def blind_spots(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hides some pixels of noisy images behind their neighbours, so that a network has to guess them from the rest.

    In every box of 3x3 pixels one is hidden, in all channels, by another one drawn from the 5x5 pixels around it.

    Args:
        images: `[n, c, h, w]`.
        generator: Of the draws, on the CPU.

    Returns:
        The images with hidden pixels, and where these are: `[n, k]`, `row * w + column`.

    Raises:
        InputError: An image of a single pixel has no neighbour.

    Example:
        >>> images = torch.arange(100.0).view(1, 1, 10, 10)
        >>> masked, places = blind_spots(images, torch.Generator().manual_seed(0))
        >>> places.shape, int((masked != images).sum())
        (torch.Size([1, 16]), 16)
    """
    count, _, height, width = images.shape
    if height * width < 2:
        raise InputError(f'images of {height}x{width} pixels: a pixel can only be guessed from others')
    tops, lefts = torch.arange(0, height, BOX), torch.arange(0, width, BOX)
    shape = (count, len(tops), len(lefts))

    def drawn(starts: Tensor, side: int) -> Tensor:
        """A place in every box, also in those at the end that are cut off."""
        sizes = (side - starts).clamp_max(BOX)
        return starts + (torch.rand(shape, generator=generator) * sizes).long()

    rows = drawn(tops[:, None], height)
    columns = drawn(lefts, width)
    # A step to one of the pixels around, never none; one out of the image is taken the other way.
    around = (2 * REACH + 1) ** 2
    step = torch.randint(1, around, shape, generator=generator)
    step = (step + around // 2) % around
    step_rows, step_columns = step // (2 * REACH + 1) - REACH, step % (2 * REACH + 1) - REACH
    from_rows, from_columns = _inside(rows, step_rows, height), _inside(columns, step_columns, width)
    alone = (from_rows == rows) & (from_columns == columns)  # where the image is too narrow for the step
    if height > 1:
        from_rows = torch.where(alone, torch.where(rows > 0, rows - 1, rows + 1), from_rows)
    else:
        from_columns = torch.where(alone, torch.where(columns > 0, columns - 1, columns + 1), from_columns)
    places = (rows * width + columns).flatten(1).to(images.device)
    sources = (from_rows * width + from_columns).flatten(1).to(images.device)
    masked = images.flatten(2)
    masked = masked.scatter(2, _all_channels(places, images), masked.gather(2, _all_channels(sources, images)))
    return masked.view(images.shape), places


def blind_spot_loss(guesses: Tensor, noisy: Tensor, masked: Tensor, places: Tensor) -> Tensor:
    """Mean squared error at the blind spots alone, against the noisy pixels that were hidden there.

    Over the root of the error that the neighbours make which hid them (twice the noise's variance, about, and the
    texture): so the noise in the gradient is about the same at all levels, and nothing needs to be known of them. Over
    the error itself strong noise would count for too little: what can be won there is a small share of it.

    Args:
        guesses: What the network gave for `masked`, `[n, c, h, w]`.
        noisy: The images before pixels were hidden.
        masked: The images with hidden pixels.
        places: Where, as `blind_spots` gives it.
    """
    index = _all_channels(places, noisy)
    hidden, shown, guessed = (values.flatten(2).gather(2, index) for values in (noisy, masked, guesses))
    return (guessed - hidden).square().mean() / (shown - hidden).square().mean().clamp_min(1e-6).sqrt()


def _inside(places: Tensor, steps: Tensor, side: int) -> Tensor:
    """Places after the steps; the other way where that leaves the image, and none where it is too narrow for both."""
    there, back = places + steps, places - steps
    there = torch.where((there >= 0) & (there < side), there, back)
    return torch.where((there >= 0) & (there < side), there, places)


def _all_channels(places: Tensor, images: Tensor) -> Tensor:
    return places[:, None].expand(-1, images.shape[1], -1)
