"""A denoiser over an image of any size, tile by tile, without seams.

Letters: `c h w` channels, height and width of an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from timm_pudnet.config import InputError
from timm_pudnet.denoising.pictures import check_range
from timm_pudnet.denoising.scales import add_difference, halved, in_strips

WORTH_FUSING = 2**17  # pixels of an image; for fewer the copy takes longer than it saves
LARGER = 1.25  # than asked for a tile may be


def denoise(model: nn.Module, image: Tensor, *, tile: int = 512, turns: int = 1) -> Tensor:
    """What `model` makes of an image, in overlapping tiles: the same as of the whole image at once, in little memory.

    A tile begins on the model's pooling grid and is read with a margin that its outermost pixels depend on; only where
    it touches the image's border does the network see a border. Beyond image and result the memory needed is that of
    one tile, whatever the image's size (where the model has networks for smaller sizes, which are run one by one, that
    of another image more; where its `scale` is not 1, it has `covariance`, or with `turns`, of up to three besides).

    A grey image goes through a model of three channels as three equal ones, and comes back as their mean (taken before
    what clipping moved is put back); the channels of a colour image go through a model of one channel apart.

    Args:
        model: A denoiser in eval mode, with `in_chans` (1 or 3), `multiple` (pixels, its pooling grid; it pads images
            to that at the right and at the bottom) and `receptive_field` (pixels in each direction that an output
            depends on at most; of a `BlindSpotUNet` that of its network for full size).
        image: Float `[c, h, w]` in 0-1, noise may go beyond; 1 or 3 channels.
        tile: About the height and width of a tile in pixels, without its margin; those of an image are alike, at most
            a quarter larger, and rounded up to the pooling grid.
        turns: With 2 or 4, the mean of what the model makes of the image and of it turned by a half or by quarter
            turns, turned back: nearer to the clean image where noise is strong, in so many times the time.

    Returns:
        `[c, h, w]`, of the image's type and on its device.

    Raises:
        InputError: The image's shape or type is another one, its floats are in 0-255, `tile` is below 1, `turns` is
            not 1, 2 or 4, or the model is no denoiser, or in training mode.

    Example:
        >>> class Halve(nn.Conv2d):
        ...     in_chans, multiple, receptive_field = 1, 8, 0
        >>> model = Halve(1, 1, 1, bias=False).eval()
        >>> _ = nn.init.constant_(model.weight, 0.5)
        >>> denoise(model, torch.ones(3, 1, 50), tile=8).unique()
        tensor([0.5000])
    """
    if not isinstance(image, Tensor):
        raise InputError(
            f'a {type(image).__name__} cannot be denoised: pass a float tensor [c, h, w] (the command takes files)'
        )
    if image.ndim != 3 or image.shape[0] not in (1, 3) or not image.numel() or not image.is_floating_point():
        raise InputError(
            f'an image of shape {tuple(image.shape)} and {image.dtype} cannot be denoised: float [c, h, w], 1 or 3 '
            'channels'
        )
    check_range(image, 'the image')
    for name in ('in_chans', 'multiple', 'receptive_field'):
        if not hasattr(model, name):
            raise InputError(f'a {type(model).__name__} is no denoiser, it has no {name}: predict_denoiser gives one')
    if model.training:
        raise InputError('the model is in training mode, in which each tile would change it: call model.eval() first')
    if tile < 1:
        raise InputError(f'tile must be at least 1 pixel, got {tile}')
    if not isinstance(turns, int) or turns not in (1, 2, 4):
        raise InputError(f'turns must be 1, 2 or 4, got {turns!r}')
    if image.shape[1] * image.shape[2] >= WORTH_FUSING and any(hasattr(part, 'fuse') for part in model.modules()):
        model = fused(model)
    result = _denoised(model, image, tile)
    for turn in range(4 // turns, 4, 4 // turns):
        result += _denoised(model, image.rot90(turn, (1, 2)), tile).rot90(-turn, (1, 2))
    return result.div_(turns)


def fused(model: nn.Module) -> nn.Module:
    """A copy of a denoiser in eval mode whose norms are part of its convs, with channels last: both are faster.

    `denoise` makes one for each large image, unless it is given one: for many images make it once. It cannot be saved.

    Raises:
        InputError: The model is in training mode.
    """
    if model.training:
        raise InputError('the model is in training mode: call model.eval() first')
    return reparameterize_model(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _denoised(model: Any, image: Tensor, tile: int) -> Tensor:
    """What a model makes of one image `[c, h, w]`; each of its sizes, where it has several, in tiles by itself."""
    if getattr(model, 'coarser', None) is None and getattr(model, 'whitening', None) is None:
        return _in_tiles(model, model, image, tile)
    like = next(model.parameters())
    with torch.no_grad():
        result = _by_sizes(model, model.prepared(image), tile)
        return in_strips(result, lambda part, its: model.restored(part.to(like), its.to(like)).to(part), image)


def _by_sizes(model: Any, image: Tensor, tile: int) -> Tensor:
    """`BlindSpotUNet.by_sizes` of one image `[c, h, w]`, each size in tiles; of a grey one the mean of the channels."""
    seen = model.seen(image[None])[0]
    result = _in_tiles(model, model.fine, seen, tile)
    if model.coarser is not None:
        coarse = _by_sizes(model.coarser, halved(seen[None])[0], tile)
        # Of the mean of three channels brightness is all there is.
        matrix = model.share[:1, None] if len(image) < model.in_chans else model.matrix()
        planes = (result[:, None], coarse[:, None]) if len(matrix) == 1 else (result[None], coarse[None])
        add_difference(*planes, matrix)
    return result if model.whitening is None else model.whitening.undo(result[None], seen[None], image[None])[0]


def _in_tiles(model: nn.Module, network: Callable[[Tensor], Tensor], image: Tensor, tile: int) -> Tensor:
    """What `network`, the model or a part of it, makes of one image `[c, h, w]`, tile by tile."""
    in_chans, grid, reach = (int(getattr(model, name)) for name in ('in_chans', 'multiple', 'receptive_field'))
    # Alike, so that none is margin for the most part.
    rows, columns = (math.ceil(side / math.ceil(side / (LARGER * tile)) / grid) * grid for side in image.shape[1:])
    # At least one step of the grid, so that every tile at the far border has the rows that the model's padding repeats.
    margin = max(-(-reach // grid), 1) * grid
    like = next(model.parameters())
    _, height, width = image.shape
    result = torch.empty_like(image)
    with torch.inference_mode():
        for top, left in product(range(0, height, rows), range(0, width, columns)):
            first_row, first_column = max(top - margin, 0), max(left - margin, 0)
            part = image[:, first_row : top + rows + margin, first_column : left + columns + margin].to(like)
            if in_chans == 3:
                part = part.expand(3, -1, -1)[None].contiguous(memory_format=torch.channels_last)
                denoised = network(part)[0]
                denoised = denoised.mean(0, keepdim=True) if len(image) == 1 else denoised
            else:
                denoised = network(part[:, None])[:, 0]
            core = denoised[:, top - first_row :, left - first_column :][:, :rows, :columns]
            result[:, top : top + rows, left : left + columns] = core.to(result)
    return result
