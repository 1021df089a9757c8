"""PSNR and SSIM, how near an image is to the clean one; the same numbers as scikit-image and torchmetrics give.

Letters: `n` images, `c h w` channels, height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from timm_pudnet.config import InputError

SSIM_WINDOW = 11  # pixels; what a Gaussian of sigma 1.5 is cut to, at 3.5 sigma


def psnr(image: Tensor, clean: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio in dB, `10 log10(data_range^2 / mean squared error)`; infinite for equal images.

    Args:
        image: Float `[c, h, w]` or `[n, c, h, w]`.
        clean: What it should be, of the same shape.
        data_range: Largest minus smallest value that an image can have.

    Returns:
        float64, one value per image: `[n]`, or `[]` for one image.

    Raises:
        InputError: The shapes differ or are none of images, or the values are no floats.

    Example:
        >>> psnr(torch.full((1, 8, 8), 0.6), torch.full((1, 8, 8), 0.5)).item()  # doctest: +ELLIPSIS
        19.99999...
    """
    image, clean = _checked(image, clean)
    return 10 * torch.log10(data_range**2 / (image - clean).square().mean((-3, -2, -1)))


def ssim(image: Tensor, clean: Tensor, data_range: float = 1.0) -> Tensor:
    """Structural similarity of Wang, Bovik, Sheikh and Simoncelli (2004), 1 for equal images.

    Gaussian window of sigma 1.5 and 11x11 pixels, population covariance, K1 = 0.01 and K2 = 0.03. The mean is over the
    places where the window lies wholly within the image, and over channels: that of
    `skimage.metrics.structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`. torchmetrics
    averages over a mirrored border of 5 pixels as well; without that border its mean is the same.

    Args:
        image: Float `[c, h, w]` or `[n, c, h, w]`.
        clean: What it should be, of the same shape.
        data_range: Largest minus smallest value that an image can have.

    Returns:
        float64, one value per image: `[n]`, or `[]` for one image.

    Raises:
        InputError: As `psnr`; or an image is smaller than the window, for which SSIM is not defined.

    Example:
        >>> image = torch.arange(256.0).view(1, 16, 16) / 255
        >>> ssim(image, image).item(), round(ssim(image, image.flip(1)).item(), 4)
        (1.0, -0.8197)
    """
    image, clean = _checked(image, clean)
    height, width = image.shape[-2:]
    if min(height, width) < SSIM_WINDOW:
        raise InputError(f'SSIM needs images of {SSIM_WINDOW}x{SSIM_WINDOW} pixels at least, got {height}x{width}')
    offsets = torch.arange(SSIM_WINDOW, dtype=image.dtype, device=image.device) - SSIM_WINDOW // 2
    window = torch.exp(-0.5 * (offsets / 1.5) ** 2)
    window = window / window.sum()

    def local_mean(x: Tensor) -> Tensor:
        planes = x.reshape(-1, 1, height, width)
        planes = functional.conv2d(functional.conv2d(planes, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
        return planes.view(*x.shape[:-2], *planes.shape[-2:])

    mean_x, mean_y = local_mean(image), local_mean(clean)
    var_x = local_mean(image * image) - mean_x**2
    var_y = local_mean(clean * clean) - mean_y**2
    covariance = local_mean(image * clean) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    found = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    found = found / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return found.mean((-3, -2, -1))


def _checked(image: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64: a variance as a difference of means would lose digits in float32."""
    if image.shape != clean.shape or image.ndim not in (3, 4) or not image.numel():
        raise InputError(
            f'images of shape {tuple(image.shape)} and {tuple(clean.shape)} cannot be compared: both [c, h, w] or both '
            '[n, c, h, w]'
        )
    if not (image.is_floating_point() and clean.is_floating_point()):
        raise InputError(f'images of {image.dtype} and {clean.dtype}: pass floats in 0-1')
    image, clean = (one.cpu() if one.device.type == 'mps' else one for one in (image, clean))  # it has no float64
    return image.double(), clean.double()
