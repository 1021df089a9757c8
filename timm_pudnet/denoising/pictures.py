"""Pictures read from files and written back as they were.

Format, bit depth, alpha, colour profile and EXIF (not of TIFF files) are kept; of PNG the colour space and resolution,
of TIFF the resolution and the description by ImageJ or OME.

Letters: `c h w` channels, height and width.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile
from torch import Tensor

from timm_pudnet.config import InputError, NotFoundError, PudNetError
from timm_pudnet.files import local_path, written_whole
from timm_pudnet.images import natural_key, open_file, quiet_pillow, reason_of, scan_folder

# Formats that can hold again what was read from them, and how they are written. Those that are missing cannot (GIF has
# 256 colours), are never written by PIL (PSD), or are read by it with fewer bits than they may have (AVIF, JPEG 2000).
FORMATS: dict[str, dict[str, Any]] = {
    'PNG': {},
    'TIFF': {'compression': 'tiff_adobe_deflate'},
    'JPEG': {'quality': 95, 'subsampling': 0},
    'WEBP': {'lossless': True, 'exact': True},
    'BMP': {},
    'PPM': {},
}
_MODES = ('1', 'L', 'LA', 'RGB', 'RGBA', 'I;16', 'I;16L', 'I;16B', 'F')
_MOST_EXIF = 65_533  # bytes, in a JPEG file
_PNG_KEPT = (b'gAMA', b'cHRM', b'sRGB', b'cICP', b'pHYs')  # what its values mean, and the size of a pixel
_CELL = 256  # most pixels that a side-by-side picture shows of an image's height and width


@dataclass(frozen=True)
class Picture:
    """What a file held.

    Args:
        pixels: float32 `[c, h, w]`, 1 channel or 3; black is 0 and white is 1, and only float files go beyond.
        alpha: The transparency `[h, w]` as the file has it, or None.
        depth: Bits of a sample: 1, 8, 16, or 32 for floats.
        white: The sample that is 1 in `pixels`.
        format: PIL's name of the format.
        metadata: Colour profile and EXIF (not of TIFF files; with its orientation, which is not applied to the pixels),
            as PIL saves them; `tiffinfo`, tags of a TIFF file; `chunks` of a PNG file, as they stand in it.
    """

    pixels: Tensor
    alpha: np.ndarray | None
    depth: int
    white: float
    format: str
    metadata: dict[str, Any]

    def rounded(self, pixels: Tensor) -> Tensor:
        """Other pixels `[c, h, w]` as a file of this depth holds them: clipped and rounded, but for floats."""
        if self.depth == 32:
            return pixels
        return pixels.clamp(0, 1).mul(self.white).round().div(self.white)


def list_pictures(path: str | os.PathLike[str], strict: bool = False) -> dict[str, Path]:
    """The image files in a folder and its subfolders by their names relative to it, in natural order; or the one file.

    Raises:
        NotFoundError: There is no such file or folder.
        InputError: The folder holds no images; with `strict`, it holds some of formats that are not read.

    Warns:
        PudNetWarning: It holds some of formats that are not read.
    """
    path = local_path(path)
    if path.is_file():
        return {path.name: path}
    paths, names, *_ = scan_folder(str(path), with_labels=False, strict=strict)
    found = {Path(name).as_posix(): Path(file) for file, name in zip(paths, names, strict=True)}
    return {name: found[name] for name in sorted(found, key=natural_key)}


def pair_pictures(paths: dict[str, Path], others: dict[str, Path], clean: str | os.PathLike[str]) -> dict[str, Path]:
    """The clean image of each noisy one: of the same name in its folder, or but for the extension.

    Args:
        paths: The noisy images by name, of `list_pictures`.
        others: The clean ones likewise.
        clean: Folder of the clean ones; or, for a single noisy image, its clean one.

    Raises:
        NotFoundError: There is no clean image of that name.
        InputError: Two clean images have the name but for the extension, or one is the noisy image itself.
    """
    folder = local_path(clean)
    by_stem: dict[str, list[str]] = {}
    for name in others:
        by_stem.setdefault(os.path.splitext(name)[0], []).append(name)
    pairs = {}
    for name, path in paths.items():
        if len(paths) == 1 and folder.is_file():
            near = list(others)
        else:
            near = [name] if name in others else by_stem.get(os.path.splitext(name)[0], [])
        if not near:
            raise NotFoundError(f'{path} has no clean image: {clean} has no {name}, nor one of another extension')
        if len(near) > 1:
            raise InputError(f'{path}: which of {", ".join(near)} in {clean} is its clean image? Keep one of them')
        pairs[name] = others[near[0]]
        if pairs[name].exists() and path.samefile(pairs[name]):
            raise InputError(f'{path}: {clean} has this very file as its clean image: keep clean images apart')
    return pairs


def check_pair(path: Path, noisy: Picture, other: Path, clean: Picture) -> None:
    """Raises InputError unless the two have the same size, as many channels, and white alike in `pixels`."""
    if noisy.pixels.shape != clean.pixels.shape:
        sizes = [
            f'{p.shape[2]}x{p.shape[1]} {"in colour" if len(p) == 3 else "grey"}' for p in (noisy.pixels, clean.pixels)
        ]
        raise InputError(f'{path} is {sizes[0]}, but its clean image {other} is {sizes[1]}: they must be alike')
    floats = {one.white for one in (noisy, clean) if one.depth == 32}
    if floats - {1.0} and noisy.white != clean.white:
        raise InputError(f'{path} has white at {noisy.white:g}, its clean image {other} at {clean.white:g}: scale one')


def read_picture(path: str | os.PathLike[str]) -> Picture:
    """Reads a PNG, TIFF, JPEG, WebP, BMP or PPM (PBM, PGM, PFM) file of 1, 8 or 16 bits, or of floats in grey.

    A palette becomes colours, and one colour that stands for transparent becomes an alpha channel; grey of 2 or 4 bits
    becomes 8. Float files come in three ranges: white is 1, 255 or 65535, whichever is nearest to the largest value.

    Raises:
        NotFoundError: There is no such file.
        InputError: It is damaged, no image, or could not be written back as it was: another format (GIF), several
            pages or frames, another colour space (CMYK); or it holds NaN or infinity.
        PudNetError: It has 16 bits and several channels, and opencv is not installed.
    """
    try:
        with quiet_pillow(), open_file(path) as image:
            return _read(image, local_path(path))
    except FileNotFoundError as error:
        raise NotFoundError(f'{path}: no such file') from error
    except PudNetError:
        raise
    except Exception as error:  # a damaged file can make PIL raise nearly anything
        raise InputError(f'{path}: cannot be read ({_reason(error, local_path(path))})') from error


def _reason(error: Exception, path: Path) -> str:
    """What is wrong with a file, and what helps."""
    if isinstance(error, Image.DecompressionBombError):
        return f'{reason_of(error)}: split it, or raise PIL.Image.MAX_IMAGE_PIXELS'
    if isinstance(error, UnidentifiedImageError):
        with path.open('rb') as file:
            is_tiff = file.read(4) in (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')
        if is_tiff:
            return (
                'a TIFF cut short, or of samples that Pillow cannot read: save it with 8 or 16 bits, or in grey as '
                'float32'
            )
    return reason_of(error)


def _read(file: ImageFile.ImageFile, path: Path) -> Picture:
    format = 'JPEG' if file.format == 'MPO' else str(file.format)  # phones': a JPEG, with extras behind it
    if format not in FORMATS:
        raise ValueError(f'{format} cannot be written back as it was: convert it to PNG')
    pages = 1 if format == 'JPEG' else getattr(file, 'n_frames', 1)
    if pages > 1:
        raise ValueError(f'{pages} pages or frames: split them into one file each')
    tiles = str(file.tile)  # which loading empties
    if format == 'PNG':
        file.load()  # its EXIF may stand behind the pixels
    metadata: dict[str, Any] = {name: file.info[name] for name in ('icc_profile', 'exif') if file.info.get(name)}
    if format == 'PNG':
        if 'exif' not in metadata and file.getexif():  # in text: ImageMagick's, or XMP's orientation
            metadata['exif'] = file.getexif().tobytes()
        metadata['chunks'] = _png_chunks(path)
    if format == 'JPEG' and len(metadata.get('exif', b'')) > _MOST_EXIF:
        raise ValueError(f'more than {_MOST_EXIF:,} bytes of EXIF, which cannot be written again: take some out')
    deep = file.mode in ('RGB', 'RGBA') and ';16' in tiles  # of which PIL would keep 8 bits
    grey = 'LA;16' in tiles
    if isinstance(file, TiffImageFile):
        bits, white_is_zero = {*file.tag_v2.get(258, (1,))}, file.tag_v2.get(262) == 0
        deep = file.mode in ('RGB', 'RGBA') and 16 in bits
        if not bits <= {1, 2, 4, 8, 16, 32}:
            raise ValueError(f'samples of {", ".join(map(str, sorted(bits)))} bits: convert it to 8 or 16')
        if bits <= {8} and 2 in file.tag_v2.get(339, (1,)):
            raise ValueError('integers with a sign: convert it to 8 or 16 bits without')
        kept, there = len(file.getbands()), file.tag_v2.get(277, 1)
        if file.mode != 'P' and there > kept:
            raise ValueError(f'{there} channels, of which Pillow reads {kept}: save each as a file of its own')
        if file.mode.startswith(('I;16', 'F')) and white_is_zero:  # PIL inverts up to 8 bits alone
            raise ValueError(f'{"floats" if file.mode == "F" else "16 bits"} with white as zero: invert it')
        metadata['tiffinfo'] = _tiff_tags(file)
    elif format == 'PPM' and file.mode == 'RGB' and str(file.tile[0].args) not in ('RGB', "('RGB', 255)"):
        raise ValueError('colours with a maximum other than 255 in PPM: convert it to PNG')
    if file.mode == 'I' and format == 'PPM':  # PGM of more than 8 bits
        samples = np.array(file).astype(np.uint16)
    elif deep:
        samples = _decode_deep(path, grey=grey)
        # PIL has the upper 8 bits, and tells of truncated files; opencv takes planes that lie apart for others.
        colours = 1 if grey else 3
        if np.abs(samples[..., :colours] / 257 - np.array(file)[..., :colours]).max() > 1:
            raise ValueError('its 16-bit channels are stored in an unusual way: write it again, as PNG')
    else:
        image: Image.Image = file
        if file.mode in ('P', 'PA'):
            image = file.convert('RGBA' if file.has_transparency_data else 'RGB')
        elif file.mode in ('1', 'L', 'RGB') and file.has_transparency_data:
            if isinstance(file.info['transparency'], int):  # PIL scales grey of 2 and 4 bits, and leaves this as it is
                file.info['transparency'] *= 85 if 'L;2' in tiles else 17 if 'L;4' in tiles else 1
            image = file.convert('RGBA' if file.mode == 'RGB' else 'LA')
        if image.mode not in _MODES:
            what = 'integers of 32 bits or with a sign' if image.mode == 'I' else f'colour mode {image.mode}'
            raise ValueError(f'{what}: convert it to RGB or grey')
        if format == 'BMP' and image.mode == 'RGBA':
            raise ValueError('BMP with alpha, which cannot be written again: convert it to PNG')
        if image.mode.startswith('I') and image.has_transparency_data:
            raise ValueError('16 bits with one grey as transparent: give it an alpha channel, or none')
        samples = np.array(image)
    return _picture(samples, format, metadata)


def _png_chunks(path: Path) -> bytes:
    """Chunks of a PNG file that are kept, whole, one after the other."""
    kept = b''
    with path.open('rb') as file:
        file.seek(8)
        while (head := file.read(8))[4:] not in (b'IDAT', b''):  # they stand before the pixels
            body = file.read(int.from_bytes(head[:4], 'big') + 4)
            kept += head + body if head[4:] in _PNG_KEPT else b''
    return kept


def _tiff_tags(file: TiffImageFile) -> dict[int, Any]:
    """Resolution, and the description that ImageJ or OME gave, which has the size of a pixel; where they are there."""
    tags = file.tag_v2
    found = {key: tags[key] for key in (282, 283) if key in tags and 0 < tags[key] < math.inf}
    if found and tags.get(296) in (1, 2, 3):
        found[296] = tags[296]
    text = tags.get(270)
    of_planes = file.mode == 'P' or tags.get(284) == 2  # which are written otherwise than it says
    if isinstance(text, str) and text.isascii() and (text.startswith('ImageJ=') or '<OME' in text) and not of_planes:
        found[270] = text
    return found


def _picture(samples: np.ndarray, format: str, metadata: dict[str, Any]) -> Picture:
    """From samples `[h, w]` or `[h, w, c]` of a file."""
    if samples.dtype.kind == 'f':
        if not np.isfinite(samples).all():
            raise ValueError('pixels that are NaN or infinite')
        depth, white = 32, white_of(float(np.abs(samples).max()))
    else:
        depth = 1 if samples.dtype == bool else 8 * samples.dtype.itemsize
        white = 2**depth - 1
    samples = samples[..., None] if samples.ndim == 2 else samples
    alpha = samples[..., -1] if samples.shape[2] in (2, 4) else None
    planes = samples[..., : 3 if samples.shape[2] > 2 else 1].transpose(2, 0, 1)
    pixels = torch.from_numpy(planes.astype(np.float32) / np.float32(white))
    return Picture(pixels, alpha, depth, float(white), format, metadata)


def in_short(skipped: Sequence[str]) -> str:
    """What is wrong with the first three of the files that were skipped."""
    return '; '.join(skipped[:3]) + ('; ...' if len(skipped) > 3 else '')


def white_of(peak: float) -> int:
    """White of float pixels whose largest is `peak`: 1, 255 or 65535, the nearest as ratios go; ValueError beyond."""
    if 32 * 65535 < peak < math.inf:
        raise ValueError(f'floats up to {peak:g}: divide them by their white')
    return 1 if peak <= 16 else 255 if peak <= 4096 else 65535


def check_range(pixels: Tensor, name: str) -> None:
    """Raises InputError for NaN, and floats that cannot be meant as black 0 and white 1; bright files go up to 16."""
    exact = torch.float32 if pixels.dtype == torch.float16 else pixels.dtype
    if not math.isfinite(float(pixels.sum(dtype=exact))):  # isfinite() of each would take as much memory again
        raise InputError(f'{name} has pixels that are NaN or infinite')
    peak = max(float(pixels.max()), -float(pixels.min()))
    if 32 < peak < math.inf:
        white = white_of(peak) if peak <= 32 * 65535 else 'their white'
        raise InputError(f'{name} has floats up to {peak:g}: divide them by {white}, so that white is 1')


def check_whites(whites: Mapping[float, object]) -> None:
    """Raises InputError where float images, one for each white among them, have more than one."""
    if len(whites) > 1:
        (low, one), (high, other) = list(whites.items())[:2]
        raise InputError(f'{one} has white at {low:g}, {other} at {high:g}, by their largest values: scale them alike')


def write_picture(picture: Picture, pixels: Tensor, path: str | os.PathLike[str]) -> None:
    """Writes other pixels as `picture` was: its format, depth, alpha and what is in its `metadata`.

    Nothing else of it is kept. JPEG is written at quality 95, WebP without loss. The file appears whole or not at all.

    Args:
        picture: What was read.
        pixels: Float `[c, h, w]`, as `picture.pixels`; clipped to 0-1 and rounded, in float files neither.
        path: File to write; one that is there is replaced. Its name does not decide its format.

    Raises:
        InputError: The shape is not the picture's.
        FloatingPointError: Pixels are NaN or infinite.
    """
    if pixels.shape != picture.pixels.shape:
        raise InputError(f'{path}: pixels {tuple(pixels.shape)} for a picture of {tuple(picture.pixels.shape)}')
    if not pixels.isfinite().all():
        raise FloatingPointError(f'{path}: pixels that are NaN or infinite cannot be written')
    kinds = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.float32}
    values = picture.rounded(pixels.detach().cpu().to(torch.float32)).mul(picture.white).permute(1, 2, 0).numpy()
    samples = (values if picture.depth == 32 else values.round()).astype(kinds[picture.depth])
    if picture.alpha is not None:
        samples = np.concatenate([samples, picture.alpha[..., None]], 2)
    metadata = dict(picture.metadata)
    chunks = metadata.pop('chunks', b'')
    with written_whole(Path(path)) as beside, beside.open('r+b') as file:
        if picture.depth == 16 and samples.shape[2] > 1:
            (_encode_png if picture.format == 'PNG' else _encode_tiff)(file, samples, metadata)
        else:
            image = Image.fromarray(samples.squeeze(2) if samples.shape[2] == 1 else samples)
            image.save(file, picture.format, **FORMATS[picture.format], **metadata)
        if chunks:
            file.seek(33)  # behind the header, whatever wrote it
            others = file.read()
            file.seek(33)
            file.write(chunks + others)


def _decode_deep(path: Path, grey: bool) -> np.ndarray:
    """uint16 `[h, w, c]` of a PNG or TIFF file with several channels of 16 bits, which PIL cannot hold."""
    try:
        import cv2  # type: ignore[import-not-found]
    except ImportError as error:
        # No InputError, for which a folder's file would be left out with a warning.
        raise PudNetError(f'{path}: 16-bit colours need opencv: pip install opencv-python-headless') from error

    log: Any = getattr(cv2.utils, 'logging', cv2)  # there before opencv 4.13
    level = log.getLogLevel()
    log.setLogLevel(0)  # its remarks on metadata
    try:
        samples = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    finally:
        log.setLogLevel(level)
    if samples is None or samples.dtype != np.uint16 or samples.ndim != 3:
        raise ValueError('opencv cannot read it')
    return samples[..., [0, 3] if grey else [2, 1, 0, 3][: samples.shape[2]]]


def _encode_png(file: BinaryIO, samples: np.ndarray, metadata: dict[str, Any]) -> None:
    """uint16 `[h, w, c]` with 2 to 4 channels as a PNG file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    height, width, channels = samples.shape
    rows = np.frombuffer(samples.astype('>u2').tobytes(), np.uint8).reshape(height, -1)
    up = np.diff(rows, axis=0, prepend=np.zeros_like(rows[:1]))  # PNG's filter 2: less the row above
    header = struct.pack('>IIBBBBB', width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    file.write(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header))
    if 'icc_profile' in metadata:
        file.write(chunk(b'iCCP', b'ICC\0\0' + zlib.compress(metadata['icc_profile'])))
    if 'exif' in metadata:
        file.write(chunk(b'eXIf', metadata['exif'].removeprefix(b'Exif\0\0')))
    file.write(chunk(b'IDAT', zlib.compress(np.pad(up, ((0, 0), (1, 0)), constant_values=2).tobytes())))
    file.write(chunk(b'IEND', b''))


def _encode_tiff(file: BinaryIO, samples: np.ndarray, metadata: dict[str, Any]) -> None:
    """uint16 `[h, w, c]` with 3 or 4 channels as a TIFF file: one strip, not compressed."""
    height, width, channels = samples.shape
    data = samples.astype('<u2').tobytes()
    tags = ImageFileDirectory_v2(prefix=b'II')
    tags[256], tags[257], tags[258], tags[277] = width, height, (16,) * channels, channels
    tags[259], tags[262] = 1, 2  # no compression, RGB
    tags[273], tags[278], tags[279] = 0, height, len(data)  # the strip: PIL moves its start behind the tags
    for key, value in metadata.get('tiffinfo', {}).items():
        tags[key] = value
    if channels == 4:
        tags[338] = 2  # the extra sample is alpha, not multiplied into the colours
    if 'icc_profile' in metadata:
        tags.tagtype[34675] = 7
        tags[34675] = metadata['icc_profile']
    tags.save(file)
    file.write(data)


def middle(pixels: Tensor) -> Tensor:
    """The middle of an image `[c, h, w]`, as much as a side-by-side picture shows."""
    _, height, width = pixels.shape
    top, left = max(height - _CELL, 0) // 2, max(width - _CELL, 0) // 2
    return pixels[:, top : top + _CELL, left : left + _CELL].clone()


def side_by_side(rows: Sequence[Sequence[Tensor]], titles: Sequence[str]) -> Image.Image:
    """A picture of the middles of images, a row for each one's versions; small ones are enlarged by whole numbers.

    Args:
        rows: For each image its versions `[c, h, w]` in 0-1, as `middle` gives them.
        titles: Of the columns.
    """
    gap, head = 8, 24
    sheet = Image.new('RGB', ((_CELL + gap) * len(titles) + gap, (_CELL + gap) * len(rows) + head), 'white')
    for column, title in enumerate(titles):
        left = gap + column * (_CELL + gap)
        ImageDraw.Draw(sheet).text((left, 6), title, fill='black')
        for row, versions in enumerate(rows):
            pixels = versions[column].clamp(0, 1).mul(255).round().to(torch.uint8).expand(3, -1, -1)
            cell = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
            factor = max(_CELL // max(cell.size), 1)
            cell = cell.resize((cell.width * factor, cell.height * factor), Image.Resampling.NEAREST)
            sheet.paste(cell, (left, head + row * (_CELL + gap)))
    return sheet
