"""An image halved, and halved again: what is denoised there corrects what is denoised at full size.

Pixels that are means of four have a quarter of the noise's variance, and a network that sees as many of them sees four
times the area. So what a denoiser makes of the halved image is the better witness of all that is not fine detail: the
difference between it and the halved answer, enlarged, is added to the answer, as in a Laplacian pyramid (Burt and
Adelson 1983). How much of it is told by the noisy images alone: Stein's unbiased estimate of the squared error (SURE;
by Monte Carlo, Ramani, Blu and Unser 2008) is least at a share that can be written down.

Dimension letters: `n` images, `c` channels, `k` colour components, `h w` height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PROBE = 0.1  # of the noise, that is added to see what the difference makes of it
ROWS = 256  # of a large image, that are corrected at once; even


def halved(images: Tensor) -> Tensor:
    """Images `[n, c, h, w]` at half their size, rounded up: means of 2x2 pixels, or of those that there are."""
    return F.avg_pool2d(images, 2, ceil_mode=True)


def enlarged(images: Tensor, height: int, width: int) -> Tensor:
    """Images of half the size (rounded up) at that of `height` and `width`, bilinear."""
    return F.interpolate(images, scale_factor=2.0, mode='bilinear', align_corners=False)[..., :height, :width]


def mixing(components: Tensor, shares: Tensor) -> Tensor:
    """A matrix `[c, c]` that takes `shares[k]` of each colour component, the rows of `components` `[k, c]`."""
    return components.t() @ (shares[:, None] * components)


def mixed(images: Tensor, matrix: Tensor) -> Tensor:
    """The matrix `[d, c]` times the channels of images `[n, c, h, w]`."""
    return torch.einsum('dc,nchw->ndhw', matrix.to(images), images)


def difference_of(answers: Tensor, coarse: Tensor) -> Tensor:
    """What `coarse`, answers for the images halved, has beyond `answers` `[n, c, h, w]`, at their size."""
    return enlarged(coarse - halved(answers), *answers.shape[-2:])


def add_difference(answers: Tensor, coarse: Tensor, matrix: Tensor) -> None:
    """Adds `matrix` (of `mixing`) times the difference to answers, in place: of a large image, which has no gradient.

    In strips of rows, and in the memory of `coarse`, which is used up.
    """
    height, width = answers.shape[-2:]
    for top in range(0, height, ROWS):
        coarse[..., top // 2 : (top + ROWS) // 2, :] -= halved(answers[..., top : top + ROWS, :])
    for top in range(0, height, ROWS):
        first, bottom = max(top // 2 - 1, 0), min(top + ROWS, height)
        strip = enlarged(coarse[..., first : bottom // 2 + 2, :], bottom - 2 * first, width)
        answers[..., top:bottom, :] += mixed(strip[..., top - 2 * first :, :], matrix)


def best_shares(model: Any, noisy: Tensor) -> list[float]:
    """For each colour component the share of the difference by which a denoiser's squared error is least, in 0-1.

    Only pixels are counted whose answer is between black and white: beyond, a file cuts off what is wrong.

    Args:
        model: A `BlindSpotUNet` with a coarser one and `noise`, in eval mode.
        noisy: Images `[n, c, h, w]` as its `by_sizes` takes them.
    """
    components = model.posterior.components

    def parts(images: Tensor) -> tuple[Tensor, Tensor]:
        answers = model.fine(images)
        difference = difference_of(answers, model.coarse.by_sizes(halved(images)))
        return answers, difference * ((answers > 0) & (answers < 1))

    answers, difference = parts(noisy)
    probe = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(0)).to(noisy)
    probe *= model.posterior.variances(answers).sqrt()
    moved = parts(noisy + PROBE * mixed(probe, components.t()))[1]
    towards = mixed(noisy - answers, components) * mixed(difference, components)
    chance = probe * mixed(moved - difference, components) / PROBE  # what of that the noise itself does, in the mean
    size = mixed(difference, components).square().sum((0, 2, 3)).clamp_min(1e-12)
    return ((towards - chance).sum((0, 2, 3)) / size).clamp(0, 1).tolist()


def in_strips(result: Tensor, change: Callable[[Tensor, Tensor], Tensor], image: Tensor) -> Tensor:
    """`result` `[c, h, w]` with `change(strip of it, strip of image)` in the place of every strip of rows."""
    for top in range(0, result.shape[-2], ROWS):
        rows = slice(top, top + ROWS)
        result[..., rows, :] = change(result[..., rows, :], image[..., rows, :])
    return result
