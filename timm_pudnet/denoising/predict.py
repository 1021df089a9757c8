"""A denoiser predicted for noisy images: their sketch in, an ordinary timm model out; no clean image, no training.

Dimension letters: `n` images, `c h w` an image.
"""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from timm_pudnet.adapt import calibrate
from timm_pudnet.config import InputError, PudNetWarning
from timm_pudnet.denoising.clipping import known_noise
from timm_pudnet.denoising.pictures import check_range, check_whites, list_pictures, read_picture, white_of
from timm_pudnet.denoising.posterior import estimate_noise
from timm_pudnet.denoising.scales import best_shares, halved
from timm_pudnet.denoising.unet import MOST_WHITES, BlindSpotUNet
from timm_pudnet.denoising.whitening import SharedNoise, Whitening, shared_noise
from timm_pudnet.devices import own_defaults, usable_device
from timm_pudnet.hub import resolve_hypernet
from timm_pudnet.hypernet import PudNet, on_device
from timm_pudnet.images import to_bchw
from timm_pudnet.predict import build_model

MOST_PATCHES = 128  # of all images: enough for sketch and norm statistics, whose means are over all their pixels
LEAST_SIDE = 8
SCALES = 3  # sizes at which an image is denoised: its own, half and quarter of it
LEAST_SHRUNK = 16  # pixels of a patch in each direction, or there is no such size
SHARE_PATCHES = 16  # of a size, by which it is told how far the smaller ones correct it
MOST_VALUES = 2**18  # that quantiles are of
# Images whose brightest pixels (but for the thousandth part) lie outside are seen as if these were white: training had
# none such. Strong noise alone makes pixels of 3.
DIM, BRIGHT = 0.5, 4.0


@own_defaults()
def predict_denoiser(
    images: Any,
    *,
    hypernet: PudNet | str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
) -> nn.Module:
    """Predicts a denoiser for noisy images that come without clean ones (paper section IV-D).

    All images should be in colour, or all grey, and have the same kind and level of noise; one image is enough. They
    are not resized: patches of at most 128 of them, spread over their order, give the sketch, calibrate the norm
    statistics and tell how strong the noise is, and how far neighbouring pixels share it, which is undone first
    (`denoising.whitening`). Where they are large enough the same is done for the images at half and at a quarter of
    their size: three networks in one model, of which those for smaller images correct the coarse part of what the
    others give, by so much as the patches tell (`denoising.scales`).

    Args:
        images: A folder (with all its subfolders), a file, a list of paths, PIL images, arrays `[h, w, c]` or tensors
            `[c, h, w]` of any sizes; an array `[n, h, w, c]` or tensor `[n, c, h, w]`. Pixels are uint8, uint16 or
            floats where black is 0 and white is 1; noisy floats may go beyond. Alpha is left out. Images that use a
            small part of that range, of 12 bits in 16 for instance, are denoised as if they used all of it.
        hypernet: A `PudNet`, its folder, its name, or `org/name@revision` on the Hub; by default the one that serves
            `blindspot_unet`.
        device: Where to predict; by default CUDA where there is one. The model is returned there.

    Returns:
        A timm model in eval mode: float images `[n, c, h, w]` of any size in, denoised ones out, both with black 0 and
        white 1. `denoise` runs it over one image of any size in tiles.

    Raises:
        InputError: The images cannot be read, or there are none.
        NotFoundError: A file, folder or hypernetwork is not there.
        UnsupportedTargetError: The hypernetwork was made for another architecture.

    Example:
        >>> model = predict_denoiser(torch.rand(2, 3, 50, 70))
        >>> model(torch.rand(1, 3, 33, 20)).shape
        torch.Size([1, 3, 33, 20])
    """
    device = usable_device(device)
    network = resolve_hypernet('blindspot_unet', hypernet)
    channels, side, _ = network.config.input.input_size
    patches = [shown.to(device) for shown in noisy_patches(images, channels, side)]
    network = on_device(network, device, hypernet)
    _check_black(patches[0])
    scale = white_used(patches[0])
    patches = [shown / scale if scale >= 1 else (shown / scale).clamp(max=MOST_WHITES) for shown in patches]
    patches, shared = whitened(patches)
    patches = shrunk(patches)
    return denoiser_of(network, [sketch_of(network, shown) for shown in patches], patches, scale, shared)


def white_used(pixels: Tensor) -> float:
    """The brightness that serves as white of these pixels: 1 as a rule, their brightest where that is far from it."""
    most, brightest = _quantiles(pixels, 0.995, 0.999)
    if 0 < most < DIM / 4:  # of images so dark, more than a thousandth of the pixels may be hot
        brightest = min(brightest, 2 * most)
    return 1.0 if DIM <= brightest <= BRIGHT or brightest <= 0 else brightest


def _quantiles(pixels: Tensor, *shares: float) -> list[float]:
    values = pixels.flatten()
    values = values[:: values.numel() // MOST_VALUES + 1].cpu().sort().values
    return [float(values[math.ceil(share * len(values)) - 1]) for share in shares]


def _check_black(patches: Tensor) -> None:
    """Warns of floats whose black is far from 0; integers are never so."""
    low, middle, high = _quantiles(patches, 0.001, 0.5, 0.999)
    if middle < -0.02 * (high - low) or low > max(1.0, high / 2):  # noise around black is below 0 half of the time
        warnings.warn(
            f'pixels from {low:.3g} to {high:.3g} of white, half below {middle:.3g}: black must be 0, or little noise '
            f'is removed: {"add what was subtracted from them" if middle < 0 else "subtract their black"}',
            PudNetWarning,
            stacklevel=4,
        )


def sketch_of(network: PudNet, patches: Tensor) -> Tensor:
    """The sketch `[m]` of noisy patches `[n, c, h, w]`, as they are."""
    stream = network.streaming_sketch()
    stream.add(patches)
    return stream.result()


def denoiser_of(
    network: PudNet,
    sketches: Sequence[Tensor],
    patches: Sequence[Tensor],
    scale: float = 1.0,
    shared: SharedNoise | None = None,
) -> BlindSpotUNet:
    """The denoiser that sketches `[m]` give, calibrated on noisy patches `[n, c, h, w]`; in eval mode.

    One of each for every size of the images, each half of the last: the patches as `shrunk` gives them, and what
    `sketch_of` makes of them. It is one for images `scale` times as bright as these patches.

    How much a noisy pixel counts follows from the noise, which is what the patches differ by from the blind guesses;
    whether it was clipped, their black and white pixels tell. Of images whose pixels share noise the patches are
    `whitened`, and `shared` is what their noise was and is.
    """
    with torch.inference_mode():
        weights = [network(sketch) for sketch in sketches]
    return calibrated_denoiser(network, weights, patches, scale, shared)


def calibrated_denoiser(
    network: PudNet,
    weights: Sequence[dict[str, Tensor]],
    patches: Sequence[Tensor],
    scale: float = 1.0,
    shared: SharedNoise | None = None,
) -> BlindSpotUNet:
    """A denoiser from given weights, those of each size, calibrated on the patches as `denoiser_of` does.

    `network` says only how the target is made.
    """
    models: list[BlindSpotUNet] = []
    guesses: list[Tensor] = []
    for own, shown in zip(weights, patches, strict=True):
        model = build_model(network, network.target, own, 0, None, {}).to(shown.device)
        assert isinstance(model, BlindSpotUNet)
        guesses.append(calibrate(model, shown, own, **network.config.calibration))
        models.append(model.eval())
    return joined(models, patches, scale, shared, guesses[0])


def joined(
    models: Sequence[BlindSpotUNet],
    patches: Sequence[Tensor],
    scale: float = 1.0,
    shared: SharedNoise | None = None,
    guesses: Tensor | None = None,
) -> BlindSpotUNet:
    """Joins the denoisers of all sizes into the first, which is told the noise and has the others as coarser ones.

    Args:
        models: In eval mode, with norm statistics that are right for the patches.
        patches: Of every size, as `shrunk` gives them.
        scale: How much brighter than these the images are.
        shared: How their pixels share noise, where the patches are `whitened`.
        guesses: What the first makes of the first patches without knowing of noise, where it is known.
    """
    model, coarser = models[0], models[1:]
    with torch.no_grad():
        model.set_noise(None)
        model.set_covariance(None)
        model.set_coarse(coarser)
        blind = model(patches[0]) if guesses is None else guesses
        if shared is None:
            model.set_noise(*known_noise(patches[0], blind))
        else:
            told = zip(shared.noise, estimate_noise(patches[0], blind), strict=True)
            model.set_noise([estimate if own is None else own for own, estimate in told])
        shares = [[0.0] * model.in_chans] * len(coarser)
        for level in reversed(range(len(shares))):  # those of the sizes below come first
            shown = patches[level][:: -(-len(patches[level]) // SHARE_PATCHES)]
            shares[level] = best_shares(models[level], shown)
            model.set_shares(shares)
    model.set_covariance(None if shared is None else shared.covariance)
    model.set_scale(scale)
    return model


def whitened(patches: Sequence[Tensor]) -> tuple[list[Tensor], SharedNoise | None]:
    """Patches, as `noisy_patches` gives them, with white noise; how they shared it, None where they did not."""
    shared = shared_noise(patches)
    if shared is None:
        return list(patches), None
    whitening = Whitening(shared.covariance).to(patches[0].device)
    return [whitening(shown) for shown in patches], shared


def shrunk(patches: Sequence[Tensor]) -> list[Tensor]:
    """Patches of several sides, as `noisy_patches` gives them: the second halved, the third halved twice, and so on.

    As far as they still have 16 pixels in each direction.
    """
    found = []
    for level, shown in enumerate(patches):
        small = shown
        for _ in range(level):
            small = halved(small)
        if level and min(small.shape[2:]) < LEAST_SHRUNK:
            break
        found.append(small)
    return found


def noisy_patches(images: Any, channels: int, side: int) -> list[Tensor]:
    """Patches `[n, channels, s, s]` spread evenly over the images, in their order, and over each of them; at most 128.

    `s` is `side`, or less where half of the images are smaller; those that are smaller still are mirrored at their
    borders, and those of less than 8 pixels left out where there are others. Grey images are repeated for three
    channels; of colour images each channel is an image for one channel. One image is held at a time, whatever their
    number and sizes.

    Returns:
        Three tensors, for `shrunk`: these, half as many of twice the side, and a quarter as many of four times.
    """
    items = _items(images)
    if not len(items):
        raise InputError('no images: a denoiser needs at least one')
    count = min(len(items), MOST_PATCHES)
    each: list[list[list[Tensor]]] = [[] for _ in range(SCALES)]
    small: list[list[list[Tensor]]] = [[] for _ in range(SCALES)]  # mirrored, so their noise is not independent
    whites: dict[float, object] = {}  # of float files and images
    for number in range(count):
        place = number * len(items) // count
        image = _pixels(items[place], place, whites)
        check_whites(whites)
        for scale in range(SCALES):
            own = max(LEAST_SIDE, min(side << scale, *image.shape[1:]))
            most = MOST_PATCHES >> scale
            turn, other = divmod(number, -(-count // most))
            if not other:
                found = _patches_of(_at_least(image, own), own, max(1, most // count), turn)
                (small if min(image.shape[1:]) < LEAST_SIDE else each)[scale].append(found)
    return [_alike(big or little, channels) for big, little in zip(each, small, strict=True)]


def _alike(found: list[list[Tensor]], channels: int) -> Tensor:
    """Patches of images, of one size `[n, channels, s, s]`: that of the middle one."""
    sides = sorted(patches[0].shape[1] for patches in found)
    side = sides[len(sides) // 2]
    patches = [_at_least(patch, side)[:, :side, :side] for own in found for patch in own]
    if channels == 1:
        planes = [patch[channel] for channel in range(3) for patch in patches if channel < len(patch)]
        kept = min(len(planes), MOST_PATCHES)
        return torch.stack([planes[place * len(planes) // kept][None] for place in range(kept)])
    return torch.stack([patch.expand(channels, -1, -1) for patch in patches])


def _items(images: Any) -> Any:
    """Something with a length whose items are images or paths."""
    if isinstance(images, (str, bytes, os.PathLike)):
        images = os.fsdecode(images)
        return list(list_pictures(images).values())
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, (np.ndarray, Tensor)):
        if images.ndim != 4:
            layout = '[n, h, w, c]' if isinstance(images, np.ndarray) else '[n, c, h, w]'
            raise InputError(f'shape {tuple(images.shape)}: pass {layout}, or a list of images')
        return images
    if isinstance(images, Iterable) and not isinstance(images, Mapping):
        return list(images)
    raise InputError(f'images: a {type(images).__name__}; pass a folder, a list of paths or images, or an array')


def _pixels(image: Any, number: int, whites: dict[float, object]) -> Tensor:
    """One image as float32 `[c, h, w]`, 1 or 3 channels; of a float file or PIL image its white goes to `whites`."""
    if isinstance(image, (str, os.PathLike)):
        picture = read_picture(image)
        if picture.depth == 32:
            whites.setdefault(picture.white, image)
        return picture.pixels
    if isinstance(image, Image.Image):
        if image.mode == 'I':
            raise InputError(f'images[{number}] has integers of 32 bits: convert it to 8 or 16 bits')
        try:
            if image.mode.startswith('I;16'):
                image = np.array(image).astype(np.uint16)
            elif image.mode == 'F':
                values = np.array(image)
                white = white_of(float(np.abs(values).max()))
                whites.setdefault(white, f'images[{number}]')
                image = values / np.float32(white)
            else:
                image = np.array(image.convert('L' if image.mode in ('1', 'L', 'LA') else 'RGB'))
        except (OSError, ValueError) as error:  # PIL reads its pixels only now
            raise InputError(f'images[{number}] cannot be read ({error})') from error
    if not isinstance(image, (np.ndarray, Tensor)):
        raise InputError(f'images[{number}] is a {type(image).__name__}, not a path, image, array or tensor')
    name = image.dtype.name if isinstance(image, np.ndarray) else str(image.dtype)  # big-endian ones are '>u2' by str
    if name.endswith('uint16'):
        image = image.astype(np.float32) / 65535 if isinstance(image, np.ndarray) else image.float() / 65535
    pixels = to_bchw(image[None], f'images[{number}]')[0]
    pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
    check_range(pixels, f'images[{number}]')
    return pixels[: 1 if len(pixels) == 1 else 3]


def _at_least(image: Tensor, side: int) -> Tensor:
    """The image `[c, h, w]`, mirrored at its borders where it is smaller than `side` in a direction."""
    short = [max(0, side - size) for size in image.shape[1:]]
    if not any(short):
        return image
    widths = [(0, 0)] + [(missing // 2, missing - missing // 2) for missing in short]
    return torch.from_numpy(np.pad(image.numpy(), widths, mode='symmetric'))


def _patches_of(image: Tensor, side: int, most: int, number: int) -> list[Tensor]:
    """At most so many patches `[c, side, side]` of an image, on a grid; others for the next `number`."""
    height, width = image.shape[1:]
    starts = [range(size % side // 2, size - side + 1, side) for size in (height, width)]
    corners = list(itertools.product(*starts))
    kept = min(most, len(corners))
    first = number * (len(corners) // 2 + 1)  # so that one patch of each of many images is not always its corner
    picks = [(first + place * len(corners) // kept) % len(corners) for place in range(kept)]
    return [image[:, top : top + side, left : left + side].clone() for top, left in (corners[pick] for pick in picks)]
