"""Images of every kind as tensors: files, PIL images, arrays -> the same bits as timm's eval transform would give.

Letters: `b` images of a batch, `c h w` channels, height and width.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from timm.data.transforms import center_crop_or_pad
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from timm_pudnet.config import InputConfig, InputError, first_line

# A file's content decides its format, not its name: without this list PIL would hand an EPS to Ghostscript.
_FORMATS = (
    *('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'AVIF', 'DIB', 'PPM', 'JPEG2000'),
    *('TGA', 'ICO', 'PCX', 'QOI', 'SGI', 'DDS', 'PSD'),
)
_FLOAT_TOLERANCE = 1e-3
_MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}
# The weights of PIL's convert('L'), whatever torch's defaults are when this is imported.
_LUMA = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float32, device='cpu').view(3, 1, 1)
_quiet_lock = threading.Lock()


def channel_statistics(input: InputConfig) -> tuple[Tensor, Tensor]:
    """Mean and std that pixels are normalised by, each `[c, 1, 1]`; float32 on the CPU, whatever torch's defaults."""
    mean, std = (torch.tensor(values, dtype=torch.float32, device='cpu') for values in (input.mean, input.std))
    return mean[:, None, None], std[:, None, None]


class Preprocess:
    """timm's eval transform, split so that normalising is done for a whole batch at once."""

    def __init__(self, input: InputConfig) -> None:
        self.channels, *self.size = input.input_size
        self.mean, self.std = channel_statistics(input)
        self.crop_mode = input.crop_mode
        self.crop_pct = input.crop_pct
        self.transform: Any = create_transform(
            input_size=input.input_size,
            is_training=False,
            mean=input.mean,
            std=input.std,
            interpolation=input.interpolation,
            crop_pct=input.crop_pct,
            crop_mode=input.crop_mode,
            normalize=False,
        )
        self.fill = (self.mean * 255).round() / 255  # timm's border colour
        self.whites: dict[str, tuple[int, str]] = {}  # of float and int images: by mode, and of which image
        self.brightest = 0.0  # of those of more than 8 bits, as a share of white

    def fits(self, height: int, width: int) -> bool:
        """Whether the transform would leave an image of this size as it is."""
        return self.crop_pct == 1 and [height, width] == self.size

    def normalise(self, x: Tensor) -> Tensor:
        """`[b, c, h, w]`, uint8 or float in 0-1, as the network wants it."""
        x = x.to(torch.float32).div_(255) if x.dtype == torch.uint8 else x
        return x.sub(self.mean).div_(self.std)

    def any_image(self, image: Any, name: str) -> Tensor:
        """One image of a list or Dataset, `[c, h, w]`."""
        if isinstance(image, Exception):
            raise image
        if isinstance(image, (str, os.PathLike)):
            with open_file(image) as opened:
                return self.picture(opened, name)
        if isinstance(image, Image.Image):
            return self.picture(image, name)
        return self.arrays(image[None], [name])[0]

    def picture(self, image: Image.Image, name: str) -> Tensor:
        """A PIL image as uint8 `[c, h, w]`."""
        if image.mode.startswith('I') or image.mode == 'F':
            image = self._to_8_bit(image, name)
        if image.mode != _MODES[self.channels]:
            image = image.convert(_MODES[self.channels])
        if self.fits(image.height, image.width):
            return pil_to_tensor(image)
        self._refuse_sliver(*image.size)
        return self.transform(image)

    def _to_8_bit(self, image: Image.Image, name: str) -> Image.Image:
        """16-bit, int and float images as grey ones; PIL's own conversion would clip at 255."""
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError('pixels that are NaN or infinite')
        if values.min() < -_FLOAT_TOLERANCE:
            raise ValueError(f'pixels down to {values.min():.3g}, where 0 is black')
        white, brightest = 65535, values.max()
        # Float images come in three ranges, 32-bit ones in two; but PGM files say theirs: PIL scales to 16 bits.
        scaled = image.mode == 'I' and image.format == 'PPM'
        if image.mode in ('F', 'I') and not scaled and brightest:
            # Bright pixels of floats go beyond white: the nearest white as ratios go, as of noisy images.
            white = 65535 if brightest > (255 if image.mode == 'I' else 4096) else 255
            white = 1 if image.mode == 'F' and brightest <= 16 else white
            other, its_name = self.whites.setdefault(image.mode, (white, name))
            if white != other:
                raise InputError(
                    f'{name} has white at {white}, {its_name} at {other}, by their largest values: save them as 16 bits'
                )
        self.brightest = max(self.brightest, brightest / white)
        return Image.fromarray((values.clip(0, white) * (255 / white)).round().astype(np.uint8))

    def arrays(self, value: np.ndarray | Tensor, names: Sequence[str]) -> Tensor:
        """Arrays or tensors of one size as `[b, c, h, w]`: uint8 for uint8, float32 in 0-1 for floats."""
        x = to_bchw(value, names[0])
        if str(value.dtype).endswith(('uint16', '>u2')):
            self.brightest = max(self.brightest, x.max().item() / 255)
        if x.dtype != torch.uint8:
            _check_range(x, names)
            x = self._adapt_channels(x)
            return x if self.fits(*x.shape[2:]) else torch.stack([self._resize_float(image) for image in x])
        if self.fits(*x.shape[2:]) and (self.channels == 3 or self.channels == x.shape[1]):
            return self._adapt_channels(x)
        images = (Image.fromarray(image.permute(1, 2, 0).squeeze(2).contiguous().numpy()) for image in x)
        return torch.stack([self.picture(*pair) for pair in zip(images, names, strict=True)])

    def _adapt_channels(self, x: Tensor) -> Tensor:
        if x.shape[1] == 4 and self.channels < 4:
            x = x[:, :3]
        if x.shape[1] == 1 and self.channels > 1:
            x = x.expand(-1, 3, -1, -1)
        if x.shape[1] == 3 and self.channels == 1:
            x = (x * _LUMA).sum(1, keepdim=True)
        if x.shape[1] == 3 and self.channels == 4:
            x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        return x

    def _resize_float(self, image: Tensor) -> Tensor:
        """PIL resizes float planes too, with every filter; torchvision's tensor version lacks three of them."""
        self._refuse_sliver(image.shape[2], image.shape[1])
        resize = self.transform.transforms[0]
        if self.channels == 4:  # as PIL does, so that invisible pixels do not bleed into visible ones
            image = torch.cat([image[:3] * image[3:], image[3:]])
        planes = [np.array(resize(Image.fromarray(plane.numpy()))) for plane in image.contiguous()]
        resized = torch.from_numpy(np.stack(planes))
        if self.channels == 4:
            resized[:3] /= resized[3:].clamp_min(1e-6)
        resized.clamp_(0, 1)  # bicubic overshoots
        return center_crop_or_pad(resized - self.fill, self.size) + self.fill

    def _refuse_sliver(self, width: int, height: int) -> None:
        """A 1 x 60000 image with its shorter side made 224 would take gigabytes; with its longer one, have no width."""
        ratio = max(width, height) / min(width, height)
        target = max(self.size) / self.crop_pct
        too_large = self.crop_mode == 'center' and ratio * target**2 > (Image.MAX_IMAGE_PIXELS or math.inf)
        if too_large or (self.crop_mode == 'border' and ratio > 2 * min(self.size)):
            raise ValueError(f'{width} x {height} pixels are too long and thin to be resized')


def open_file(path: str | os.PathLike[str]) -> ImageFile.ImageFile:
    """Opens an image file of a format that images come in, by its content; raises what PIL raises."""
    return open_image(os.path.expanduser(path))


def open_image(file: str | IO[bytes]) -> ImageFile.ImageFile:
    """A picture of a format that is read here, not decoded yet."""
    Image.preinit()
    try:
        image = Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:  # maybe a format that PIL loads on demand, and that its build may lack
        Image.init()
        image = Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])
    if image.format == 'TIFF':
        image.filename = ''  # or PIL maps the file into memory, with the sides that its orientation is yet to swap
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        image.close()  # PIL itself only warns up to twice the limit
        raise Image.DecompressionBombError
    return image


def to_bchw(value: np.ndarray | Tensor, name: str) -> Tensor:
    """Arrays `[b, h, w]`, `[b, h, w, c]` or tensors `[b, h, w]`, `[b, c, h, w]` as uint8 or float32 `[b, c, h, w]`."""
    is_array = isinstance(value, np.ndarray)
    dtype = value.dtype.name if is_array else str(value.dtype).removeprefix('torch.')
    if dtype not in ('bool', 'uint8', 'uint16') and 'float' not in dtype:
        remedy = ".astype('uint8')" if is_array else '.to(torch.uint8)'
        raise InputError(f'{name}: pixels of type {dtype}; pass uint8 in 0-255, {remedy}, or float in 0-1')
    shape = tuple(value.shape)
    channels = 1 if len(shape) == 3 else shape[-1 if is_array else 1] if len(shape) == 4 else 0
    if channels not in _MODES or 0 in shape[1:]:
        raise InputError(
            f'{name}: shape {shape[1:]} of one image; arrays are (h, w, c) or (h, w), tensors (c, h, w) or (h, w), '
            'with 1, 3 or 4 channels'
        )
    if isinstance(value, np.ndarray):
        value = np.array(value, np.float32 if 'float' in dtype else value.dtype.newbyteorder('='))
        x = torch.from_numpy(value.reshape(*shape[:3], channels)).permute(0, 3, 1, 2)
    else:
        x = values_of(value, name).reshape(shape[0], channels, *shape[-2:])
    if dtype == 'bool':
        return x.to(torch.uint8) * 255
    if dtype == 'uint16':
        return ((x.to(torch.int32) + 128) // 257).to(torch.uint8)
    return x if dtype == 'uint8' else x.to(torch.float32)


def _check_range(x: Tensor, names: Sequence[str]) -> None:
    finite = x.isfinite().flatten(1).all(1)
    if not finite.all():
        raise InputError(f'{names[int(finite.int().argmin())]} has pixels that are NaN or infinite')
    low, high = x.min().item(), x.max().item()
    if low < -_FLOAT_TOLERANCE:
        raise InputError(
            f'float images with values down to {low:.3g} look already normalised: pass pixels in 0-1; '
            'mean and std are applied here'
        )
    if high > 1 + _FLOAT_TOLERANCE:
        raise InputError(f'float images with values up to {high:.4g}: divide by 255 or pass uint8')


def refuse_single(images: np.ndarray | Tensor, labels: Any) -> None:
    """An array `[h, w, 3]` or tensor `[3, h, w]` is most likely one colour image, unless labels say otherwise."""
    shape = tuple(images.shape)
    is_array = isinstance(images, np.ndarray)
    is_colour = len(shape) == 3 and (shape[2] in (3, 4) if is_array else shape[0] == 3)
    if 0 not in shape[:1] and (len(shape) < 3 or (is_colour and labels is None)):
        layout = '[n, h, w, c]' if is_array else '[n, c, h, w]'
        raise InputError(f'shape {shape} is that of one image: pass {layout}, or a list of images')


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """PIL's remarks on metadata, transparency and sizes stay inside; the lock keeps our threads' filters apart."""
    with _quiet_lock, warnings.catch_warnings():
        warnings.filterwarnings('ignore', module=r'PIL\.')  # filters hold for all threads: what others warn is heard
        yield


def reason_of(error: Exception) -> str:
    """Why an image could not be read, in a few words for a warning or an error line."""
    if isinstance(error, UnidentifiedImageError):
        return 'empty or not an image'
    if isinstance(error, Image.DecompressionBombError):
        return f'more than {Image.MAX_IMAGE_PIXELS:,} pixels'
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    text = first_line(error)
    return 'truncated' if 'truncated' in text.lower() else text


def values_of(tensor: Tensor, name: str) -> Tensor:
    """A tensor's numbers, in memory and dense."""
    if tensor.is_meta:
        raise InputError(f'{name}: a tensor on the device meta has no values')
    return tensor.detach().cpu().to_dense()
