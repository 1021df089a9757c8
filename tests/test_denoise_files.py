"""denoising/pictures.py and the command `denoise`: what is written is what was read but for the noise."""

import functools
import json
import re
import struct
import sys
import zlib
from pathlib import Path

import commands
import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo
from pngs import png
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn
from torch.testing import assert_close

from timm_pudnet import InputError, NotFoundError, PudNetError, PudNetWarning
from timm_pudnet.cli import denoise as room
from timm_pudnet.denoising.pictures import (
    _encode_png,
    _png_chunks,
    list_pictures,
    pair_pictures,
    read_picture,
    write_picture,
)
from timm_pudnet.denoising.posterior import Posterior

pytestmark = pytest.mark.filterwarnings('default::timm_pudnet.PudNetWarning')  # they are shown, as lines
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
DEEP = np.random.default_rng(0).integers(0, 65536, (21, 30, 4), dtype=np.uint16)
FLOATS = DEEP[..., :3] / np.float32(65535)
BYTES = (DEEP >> 8).astype(np.uint8)
BITS = DEEP[..., 0] > 30000
NAME = 'blindspot_unet.mixed_noise'


def pil(samples, **options):
    return lambda path: Image.fromarray(samples).save(path, **options)


def tiff(samples, **options):
    return lambda path: tifffile.imwrite(path, samples, **options)


def opencv(samples):  # which has blue first
    return lambda path: cv2.imwrite(str(path), samples[..., [2, 1, 0, 3][: samples.shape[2]]])


def png_of_la16(path):
    """Grey and alpha of 16 bits, by hand: no library at hand writes it."""
    with path.open('wb') as file:
        _encode_png(file, DEEP[..., :2], {})


def bmp_with_alpha(path):
    """A BMP with a mask for each channel, alpha too, which PIL reads and does not write."""
    masks = [0x00FF0000, 0x0000FF00, 0x000000FF, 0xFF000000]
    head = struct.pack('<IiiHHIIiiII4I4s48x', 108, 30, -21, 1, 32, 3, 0, 0, 0, 0, 0, *masks, b'BGRs')
    pixels = BYTES[..., [2, 1, 0, 3]].tobytes()
    path.write_bytes(b'BM' + struct.pack('<IHHI', 14 + len(head) + len(pixels), 0, 0, 14 + len(head)) + head + pixels)


def jpeg_of_long_exif(path):
    """A JPEG whose EXIF takes two segments, which PIL joins on reading and cannot write."""
    Image.fromarray(BYTES[..., 0]).save(path)
    parts = [
        b'Exif\0\0' + Image.Exif().tobytes().removeprefix(b'Exif\0\0').ljust(60_000, b'\0'),
        b'Exif\0\0' + bytes(60_000),
    ]
    segments = b''.join(b'\xff\xe1' + struct.pack('>H', len(part) + 2) + part for part in parts)
    path.write_bytes(b'\xff\xd8' + segments + path.read_bytes()[2:])


def png_of_small_grey(bits, values, transparent):
    """A grey PNG of 2 or 4 bits, by hand, of one row, with one grey that stands for transparent."""

    row = int(''.join(f'{value:0{bits}b}' for value in values), 2).to_bytes(len(values) * bits // 8, 'big')
    head = struct.pack('>IIBBBBB', len(values), 1, bits, 0, 0, 0, 0)
    chunks = {b'IHDR': head, b'tRNS': struct.pack('>H', transparent)}
    return png([*chunks.items(), (b'IDAT', zlib.compress(b'\0' + row)), (b'IEND', b'')])


# name: (writes it, format, depth, the samples that it holds [h, w] or [h, w, c] with alpha last)
KINDS = {
    'grey.png': (pil(BYTES[..., 0]), 'PNG', 8, BYTES[..., 0]),
    'grey and alpha.png': (pil(BYTES[..., :2]), 'PNG', 8, BYTES[..., :2]),
    'colour.png': (pil(BYTES[..., :3]), 'PNG', 8, BYTES[..., :3]),
    'colour and alpha.png': (pil(BYTES), 'PNG', 8, BYTES),
    'bits.png': (pil(BITS), 'PNG', 1, BITS),
    'grey16.png': (pil(DEEP[..., 0]), 'PNG', 16, DEEP[..., 0]),
    'grey16 and alpha.png': (png_of_la16, 'PNG', 16, DEEP[..., :2]),
    'colour16.png': (opencv(DEEP[..., :3]), 'PNG', 16, DEEP[..., :3]),
    'colour16 and alpha.png': (opencv(DEEP), 'PNG', 16, DEEP),
    'grey.tif': (tiff(BYTES[..., 0]), 'TIFF', 8, BYTES[..., 0]),
    'white is zero.tif': (tiff(BYTES[..., 0], photometric='miniswhite'), 'TIFF', 8, 255 - BYTES[..., 0]),
    'colour.tiff': (tiff(BYTES[..., :3], photometric='rgb'), 'TIFF', 8, BYTES[..., :3]),
    'colour and alpha.tif': (pil(BYTES, compression='tiff_lzw'), 'TIFF', 8, BYTES),
    'bits.tif': (pil(BITS, compression='group4'), 'TIFF', 1, BITS),
    'grey16.tif': (tiff(DEEP[..., 0]), 'TIFF', 16, DEEP[..., 0]),
    'grey16 big-endian.tif': (tiff(DEEP[..., 0], byteorder='>'), 'TIFF', 16, DEEP[..., 0]),
    'colour16.tif': (tiff(DEEP[..., :3], photometric='rgb', byteorder='>'), 'TIFF', 16, DEEP[..., :3]),
    'colour16 lzw.tif': (opencv(DEEP[..., :3]), 'TIFF', 16, DEEP[..., :3]),
    'colour16 and alpha.tif': (tiff(DEEP, photometric='rgb', extrasamples=['unassalpha']), 'TIFF', 16, DEEP),
    'float.tif': (tiff(DEEP[..., 0] / np.float32(40000) - 0.1), 'TIFF', 32, DEEP[..., 0] / np.float32(40000) - 0.1),
    'colour.webp': (pil(BYTES[..., :3], lossless=True), 'WEBP', 8, BYTES[..., :3]),
    'colour and alpha.webp': (pil(BYTES, lossless=True, exact=True), 'WEBP', 8, BYTES),
    'grey.bmp': (pil(BYTES[..., 0]), 'BMP', 8, BYTES[..., 0]),
    'colour.bmp': (pil(BYTES[..., :3]), 'BMP', 8, BYTES[..., :3]),
    'bits.bmp': (pil(BITS), 'BMP', 1, BITS),
    'bits.pbm': (pil(BITS), 'PPM', 1, BITS),
    'grey.pgm': (pil(BYTES[..., 0]), 'PPM', 8, BYTES[..., 0]),
    'grey16.pgm': (pil(DEEP[..., 0]), 'PPM', 16, DEEP[..., 0]),
    'colour.ppm': (pil(BYTES[..., :3]), 'PPM', 8, BYTES[..., :3]),
    'png by content.jpg': (pil(BYTES[..., :3], format='PNG'), 'PNG', 8, BYTES[..., :3]),
}


def look(path, depth, channels):
    """The samples of a file, by another reader than ours where PIL has not all bits."""
    if depth == 16 and channels > 1:
        if path.suffix != '.png':
            return tifffile.imread(path)
        found = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        return found[..., {2: [0, 3], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]]
    with Image.open(path) as image:
        return np.array(image)


# Pictures


@pytest.mark.parametrize('name', KINDS)
def test_format_depth_and_samples_survive_the_way_through(tmp_path, name):
    write, format, depth, samples = KINDS[name]
    write(tmp_path / name)
    picture = read_picture(tmp_path / name)
    channels = 1 if samples.ndim == 2 else samples.shape[2]
    assert (picture.format, picture.depth) == (format, depth)
    assert picture.pixels.shape == (3 if channels > 2 else 1, 21, 30)
    assert picture.pixels.dtype == torch.float32
    white = 1 if depth == 32 else 2**depth - 1
    planes = samples.reshape(21, 30, channels)[..., : 3 if channels > 2 else 1].transpose(2, 0, 1)
    assert_close(picture.pixels, torch.from_numpy(planes / white).float(), rtol=0, atol=1e-7)

    write_picture(picture, picture.pixels, tmp_path / f'again-{name}')
    found = look(tmp_path / f'again-{name}', depth, channels)
    np.testing.assert_array_equal(found, samples)
    assert found.dtype == samples.dtype or name == 'grey16.pgm'  # which PIL reads as int32
    with Image.open(tmp_path / f'again-{name}') as image:
        assert image.format == format
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, f'again-{name}'])


@pytest.mark.parametrize('name', [name for name in KINDS if 'alpha' in name])
def test_other_pixels_are_clipped_and_rounded_under_the_same_alpha(tmp_path, name):
    write, _, depth, samples = KINDS[name]
    write(tmp_path / name)
    picture = read_picture(tmp_path / name)
    white, pixels = 2**depth - 1, picture.pixels.clone()
    pixels[:, 0], pixels[:, 1], pixels[:, 2], pixels[:, 3] = -0.5, 1.5, 100.4 / white, 100.6 / white
    write_picture(picture, pixels, tmp_path / name)
    found = look(tmp_path / name, depth, samples.shape[2]).astype(int)
    for row, value in enumerate((0, white, 100, 101)):
        assert (found[row, :, :-1] == value).all()
    np.testing.assert_array_equal(found[..., -1], samples[..., -1])
    assert_close(picture.rounded(pixels), read_picture(tmp_path / name).pixels)


def test_a_float_file_is_neither_clipped_nor_rounded_and_keeps_its_range(tmp_path):
    for top, white in ((1, 1), (3, 1), (255, 255), (900, 255), (65535, 65535)):
        tifffile.imwrite(tmp_path / 'float.tif', np.linspace(-0.2 * top, top, 12, dtype=np.float32).reshape(3, 4))
        picture = read_picture(tmp_path / 'float.tif')
        assert_close(picture.pixels.max().item(), top / white)
        write_picture(picture, picture.pixels * 1.001, tmp_path / 'float.tif')
        assert_close(tifffile.imread(tmp_path / 'float.tif').max().item(), top * 1.001, rtol=1e-5, atol=0)


def test_a_jpeg_comes_back_near_what_it_was_in_grey_and_in_colour(tmp_path):
    ramp = np.linspace(0, 255, 32 * 48).reshape(32, 48).astype(np.uint8)
    for samples in (ramp, np.stack([ramp, ramp[::-1], ramp[:, ::-1]], 2)):
        Image.fromarray(samples).save(tmp_path / 'a.jpg', quality=98)
        picture = read_picture(tmp_path / 'a.jpg')
        write_picture(picture, picture.pixels, tmp_path / 'b.jpg')
        with Image.open(tmp_path / 'b.jpg') as image:
            assert image.format == 'JPEG'
            assert image.mode == ('L' if samples.ndim == 2 else 'RGB')
            assert np.abs(np.array(image).astype(int) - samples).max() <= 8


def test_a_palette_becomes_colours_and_a_transparent_colour_becomes_alpha(tmp_path):
    image = Image.fromarray(BYTES[..., :3]).quantize(16)
    expected = np.array(image.convert('RGB'))
    image.save(tmp_path / 'plain.png')
    image.save(tmp_path / 'some.png', transparency=image.getpixel((4, 2)))
    for name, mode in (('plain.png', 'RGB'), ('some.png', 'RGBA')):
        picture = read_picture(tmp_path / name)
        write_picture(picture, picture.pixels, tmp_path / name)
        with Image.open(tmp_path / name) as found:
            assert found.mode == mode
            np.testing.assert_array_equal(np.array(found)[..., :3], expected)
            assert mode == 'RGB' or found.getpixel((4, 2))[3] == 0


@pytest.mark.parametrize('name', ['o.jpg', 'o.png', 'o.webp', 'o.tif', 'deep.png', 'deep.tif'])
def test_colour_profile_and_orientation_are_kept_and_the_picture_is_turned_once(tmp_path, name):
    samples = DEEP[..., :3] if 'deep' in name else BYTES[..., :3].copy()
    samples[:10] = samples[:10] // 16  # dark at the top, as stored
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter: what is stored at the top is seen at the right
    if name == 'deep.tif':
        tifffile.imwrite(
            tmp_path / name,
            samples,
            photometric='rgb',
            extratags=[(34675, 7, len(ICC), ICC, True), (274, 3, 1, 6, True)],
        )
    elif name == 'deep.png':
        with (tmp_path / name).open('wb') as file:
            _encode_png(file, samples, {'icc_profile': ICC, 'exif': exif.tobytes()})
    else:
        Image.fromarray(samples).save(tmp_path / name, exif=exif, icc_profile=ICC)
    picture = read_picture(tmp_path / name)
    write_picture(picture, picture.pixels, tmp_path / f'again-{name}')
    seen = []
    for path in (tmp_path / name, tmp_path / f'again-{name}'):
        with Image.open(path) as image:
            assert image.info['icc_profile'] == ICC
            seen.append(np.array(ImageOps.exif_transpose(image)).astype(int))
    assert seen[0].shape == seen[1].shape == (30, 21, 3)
    assert np.abs(seen[0] - seen[1]).max() < (80 if name.endswith('jpg') else 1)
    assert seen[1][:, 12:].mean() < 0.2 * seen[1][:, :8].mean()


@pytest.mark.parametrize('name', ['colour.png', 'colour16.png'])
def test_what_the_values_of_a_png_mean_and_its_resolution_are_kept(tmp_path, name):
    pixels = struct.pack('>IIB', 11811, 11811, 1)  # a metre: 300 dpi
    told = {b'gAMA': struct.pack('>I', 100_000), b'sRGB': b'\0', b'cICP': bytes([9, 16, 0, 1]), b'pHYs': pixels}
    chunks = b''.join(
        struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        for kind, data in told.items()
    )
    KINDS[name][0](tmp_path / name)
    plain = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(plain[:33] + chunks + plain[33:])
    picture = read_picture(tmp_path / name)
    write_picture(picture, picture.pixels, tmp_path / 'again.png')
    assert _png_chunks(tmp_path / 'again.png') == chunks
    with Image.open(tmp_path / 'again.png') as image:
        image.load()
        assert (image.info['gamma'], round(image.info['dpi'][0]), image.info['srgb']) == (1, 300, 0)
    np.testing.assert_array_equal(look(tmp_path / 'again.png', *KINDS[name][2:3], 3), KINDS[name][3])


@pytest.mark.parametrize(
    ('of', 'samples'),
    [('imagej', BYTES[..., 0]), ('imagej', DEEP[..., 0]), ('ome', BYTES[..., :3]), ('ome', DEEP[..., :3])],
    ids=['grey', 'grey16', 'colour', 'colour16'],
)
def test_the_size_of_a_pixel_of_a_tiff_is_kept(tmp_path, of, samples):
    size = {'unit': 'um'} if of == 'imagej' else {'PhysicalSizeX': 0.1}
    options = {'photometric': 'rgb'} if samples.ndim == 3 else {}
    options |= {of: True, 'resolution': (4, 5), 'resolutionunit': 3}
    tifffile.imwrite(tmp_path / 'a.tif', samples, metadata=size, **options)
    picture = read_picture(tmp_path / 'a.tif')
    write_picture(picture, picture.pixels, tmp_path / 'b.tif')
    told = []
    for name in ('a.tif', 'b.tif'):
        with tifffile.TiffFile(tmp_path / name) as file:
            tags = file.pages[0].tags
            ratios = [tags[key].value[0] / tags[key].value[1] for key in (282, 283)]
            told.append((tags[270].value, *ratios, int(tags[296].value)))
    assert told[0] == told[1]
    assert told[0][1:3] == (4, 5)


@pytest.mark.parametrize('samples', [BYTES[..., 0], DEEP[..., 0]], ids=['8 bits', '16 bits'])
def test_a_grey_tiff_without_compression_is_turned_as_it_says(tmp_path, samples):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(samples).save(tmp_path / 'a.tif', exif=exif)
    turned = np.rot90(samples, -1).astype(np.float32)
    np.testing.assert_allclose(
        read_picture(tmp_path / 'a.tif').pixels[0] * np.iinfo(samples.dtype).max, turned, atol=0.1
    )


def test_the_orientation_of_a_png_is_kept_where_it_stands_behind_the_pixels(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(BYTES[..., 0]).save(tmp_path / 'a.png', exif=exif)
    content = (tmp_path / 'a.png').read_bytes()
    start = content.index(b'eXIf') - 4
    length = 12 + int.from_bytes(content[start : start + 4], 'big')
    end = content.index(b'IEND') - 4
    moved = content[:start] + content[start + length : end] + content[start : start + length] + content[end:]
    (tmp_path / 'a.png').write_bytes(moved)
    picture = read_picture(tmp_path / 'a.png')
    write_picture(picture, picture.pixels, tmp_path / 'b.png')
    with Image.open(tmp_path / 'b.png') as image:
        assert image.getexif()[274] == 6


@pytest.mark.parametrize('name', ['a.png', 'deep.png'])
@pytest.mark.parametrize('place', ['Raw profile type exif', 'XML:com.adobe.xmp'])
def test_the_orientation_of_a_png_is_kept_where_it_stands_in_a_text(tmp_path, name, place):
    exif = Image.Exif()
    exif[274] = 6
    content = exif.tobytes()
    text = f'\nexif\n{len(content):8}\n{content.hex()}\n' if 'exif' in place else '<x tiff:Orientation="6"/>'
    info = PngInfo()
    info.add_itxt(place, text)
    if name == 'deep.png':
        cv2.imwrite(str(tmp_path / name), DEEP[..., :3])
        content = (tmp_path / name).read_bytes()
        start = content.index(b'IDAT') - 4
        (chunk,) = (bytes(kind + data) for kind, data, *_ in info.chunks)
        chunk = struct.pack('>I', len(chunk) - 4) + chunk + struct.pack('>I', zlib.crc32(chunk))
        (tmp_path / name).write_bytes(content[:start] + chunk + content[start:])
    else:
        Image.fromarray(BYTES[..., 0]).save(tmp_path / name, pnginfo=info)
    picture = read_picture(tmp_path / name)
    write_picture(picture, picture.pixels, tmp_path / 'b.png')
    with Image.open(tmp_path / 'b.png') as image:
        assert image.getexif()[274] == 6
        assert ImageOps.exif_transpose(image).size == (21, 30)


@pytest.mark.parametrize(('bits', 'values', 'grey'), [(2, [0, 1, 2, 3], 85), (4, [0, 1, 5, 15], 17)])
def test_the_transparent_grey_of_few_bits_becomes_alpha(tmp_path, bits, values, grey):
    (tmp_path / 'a.png').write_bytes(png_of_small_grey(bits, values, transparent=1))
    picture = read_picture(tmp_path / 'a.png')
    assert_close(picture.pixels[0, 0] * 255, torch.tensor(values) * float(grey))
    assert picture.alpha.tolist() == [[255, 0, 255, 255]]


def test_a_picture_of_too_many_pixels_says_what_helps(tmp_path, monkeypatch, one_line):
    KINDS['colour.png'][0](tmp_path / 'a.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 600)
    with pytest.raises(InputError) as error:
        read_picture(tmp_path / 'a.png')
    one_line(error, tmp_path / 'a.png', 'more than 600 pixels', 'split it, or raise PIL.Image.MAX_IMAGE_PIXELS')


REFUSED = {
    'planes.tif': (
        tiff(np.ascontiguousarray(DEEP[..., :3].transpose(2, 0, 1)), photometric='rgb', planarconfig='separate'),
        'stored in an unusual way',
    ),
    'nan.tif': (tiff(np.full((9, 9), np.nan, np.float32)), 'NaN or infinite'),
    'infinite.tif': (tiff(np.full((9, 9), np.inf, np.float32)), 'NaN or infinite'),
    'moving.png': (pil(BYTES[..., :3], save_all=True, append_images=[Image.fromarray(BYTES[..., 1:])]), '2 pages'),
    'pages.tif': (tiff(DEEP[:5], photometric='minisblack'), '5 pages'),
    'alpha.bmp': (bmp_with_alpha, 'BMP with alpha'),
    'long exif.jpg': (jpeg_of_long_exif, 'of EXIF'),
    'a.gif': (pil(BYTES[..., 0]), 'GIF'),
    'cmyk.jpg': (lambda path: Image.fromarray(BYTES[..., :3]).convert('CMYK').save(path), 'CMYK'),
    'signed.tif': (tiff(BYTES[..., 0].astype(np.int16)), 'with a sign'),
    'signed 8.tif': (tiff(BYTES[..., 0].astype(np.int8)), 'with a sign'),
    'white is zero 16.tif': (tiff(DEEP[..., 0], photometric='miniswhite'), '16 bits with white as zero'),
    'white is zero float.tif': (tiff(FLOATS[..., 0], photometric='miniswhite'), 'floats with white as zero'),
    'colour float.tif': (tiff(FLOATS, photometric='rgb'), 'samples that Pillow cannot read: save it with 8 or 16'),
    'colour float big-endian.tif': (tiff(FLOATS, photometric='rgb', byteorder='>'), 'samples that Pillow cannot read'),
    'big float.tif': (tiff(FLOATS, photometric='rgb', bigtiff=True), 'samples that Pillow cannot read'),
    'two channels.tif': (tiff(BYTES[..., :2], photometric='minisblack', planarconfig='contig'), 'Pillow'),
    'infrared.tif': (
        tiff(BYTES, photometric='rgb', extrasamples=['unspecified']),
        '4 channels, of which Pillow reads 3',
    ),
    'infrared 16.tif': (tiff(DEEP, photometric='rgb', extrasamples=['unspecified']), 'save each as a file of its own'),
    'far too bright.tif': (tiff(FLOATS[..., 0] * np.float32(1e7)), 'divide them by their white'),
    'float64.tif': (tiff(FLOATS[..., 0].astype(np.float64)), 'or in grey as float32'),
    'float16.tif': (tiff(FLOATS[..., 0].astype(np.float16)), 'samples that Pillow cannot read'),
    'grey16 and alpha.tif': (
        tiff(DEEP[..., :2], photometric='minisblack', extrasamples=['unassalpha'], planarconfig='contig'),
        'samples that Pillow cannot read',
    ),
    'deep.ppm': (lambda path: path.write_bytes(b'P6 3 2 65535\n' + bytes(36)), 'PPM'),
    'see-through 16.png': (pil(DEEP[..., 0], transparency=5), 'transparent'),
    'empty.png': (lambda path: path.write_bytes(b''), 'empty or not an image'),
    'text.png': (lambda path: path.write_text('no image'), 'empty or not an image'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_could_not_be_written_back_is_refused_in_one_line(tmp_path, name, one_line):
    write, needle = REFUSED[name]
    write(tmp_path / name)
    with pytest.raises(InputError) as error:
        read_picture(tmp_path / name)
    one_line(error, tmp_path / name, needle)


@pytest.mark.parametrize('name', ['colour16.png', 'colour16.tif', 'colour.png', 'grey16.png'])
def test_a_truncated_file_is_never_read_in_part(tmp_path, name):
    KINDS[name][0](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for cut in (60, len(content) // 2, len(content) - 100):
        (tmp_path / name).write_bytes(content[:cut])
        with pytest.raises(InputError):
            read_picture(tmp_path / name)


def test_only_16_bit_colours_need_opencv_and_say_how_to_get_it(tmp_path, monkeypatch, one_line):
    for name in ('colour16.png', 'colour16.tif', 'grey16.png', 'grey16.tif', 'colour.png'):
        KINDS[name][0](tmp_path / name)
    monkeypatch.setitem(sys.modules, 'cv2', None)
    for name in ('grey16.png', 'grey16.tif', 'colour.png'):
        read_picture(tmp_path / name)
    for name in ('colour16.png', 'colour16.tif'):
        with pytest.raises(PudNetError) as error:
            read_picture(tmp_path / name)
        one_line(error, tmp_path / name, 'pip install opencv-python-headless')
        assert not isinstance(error.value, InputError)  # or the command would leave it out with a warning


def test_writing_refuses_what_no_file_holds_and_leaves_what_was_there(tmp_path, one_line, nothing_written, full_disk):
    KINDS['colour.png'][0](tmp_path / 'a.png')
    picture = read_picture(tmp_path / 'a.png')
    with nothing_written(tmp_path):
        with pytest.raises(InputError) as error:
            write_picture(picture, picture.pixels[:1], tmp_path / 'a.png')
        one_line(error, 'a.png', (1, 21, 30), (3, 21, 30))
        with pytest.raises(FloatingPointError):
            write_picture(picture, picture.pixels * torch.nan, tmp_path / 'a.png')
        with full_disk(500), pytest.raises(OSError, match='too large'):
            write_picture(picture, picture.pixels, tmp_path / 'a.png')


def test_a_folder_is_listed_below_in_natural_order_without_what_is_no_image(tmp_path, one_line):
    for name in ('img10.png', 'img2.PNG', 'b/c/x.tif', '.hidden.png', 'notes.txt', 'b/.y/z.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list(list_pictures(tmp_path)) == ['b/c/x.tif', 'img2.PNG', 'img10.png']
    assert list_pictures(tmp_path / 'img10.png') == {'img10.png': tmp_path / 'img10.png'}
    with pytest.raises(NotFoundError) as error:
        list_pictures(tmp_path / 'bb')
    one_line(error, tmp_path / 'bb', 'Did you mean b?')
    (tmp_path / 'd').mkdir()
    with pytest.raises(InputError) as error:
        list_pictures(tmp_path / 'd')
    one_line(error, 'no images', 'empty')
    (tmp_path / 'd' / 'a.txt').touch()
    with pytest.raises(InputError) as error:
        list_pictures(tmp_path / 'd')
    one_line(error, 'no images', '.txt')


def test_a_folder_that_links_lead_to_is_listed_once(tmp_path, one_line):
    (tmp_path / 'all' / 'run3').mkdir(parents=True)
    (tmp_path / 'all' / 'run3' / 'a.png').touch()
    (tmp_path / 'all' / 'latest').symlink_to('run3')
    assert list(list_pictures(tmp_path / 'all')) == ['latest/a.png']
    with pytest.raises(NotFoundError) as error:
        list_pictures(tmp_path / 'gone.png')
    one_line(error, 'gone.png: no such file or folder')


def test_pictures_of_formats_that_are_not_read_are_told(tmp_path, one_line):
    for name in ('a.png', 'raw.dng', 'sub/b.CR2'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.warns(PudNetWarning, match='ignored 2 pictures'):
        assert list(list_pictures(tmp_path)) == ['a.png']
    with pytest.raises(InputError) as error:
        list_pictures(tmp_path, strict=True)
    one_line(error, '2 pictures', '.dng', 'convert')


def test_a_clean_image_has_the_same_name_or_another_extension(tmp_path, one_line):
    for name in ('noisy/a.png', 'noisy/s/b.jpg', 'clean/a.tif', 'clean/a.png', 'clean/s/b.png', 'clean/c.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    noisy, clean = list_pictures(tmp_path / 'noisy'), tmp_path / 'clean'
    found = pair_pictures(noisy, list_pictures(clean), clean)
    assert found == {'a.png': clean / 'a.png', 's/b.jpg': clean / 's' / 'b.png'}
    one = clean / 'c.png'
    assert pair_pictures({'x.png': tmp_path}, list_pictures(one), one) == {'x.png': one}
    (clean / 's' / 'b.bmp').touch()
    with pytest.raises(InputError) as error:
        pair_pictures(noisy, list_pictures(clean), clean)
    one_line(error, 's/b.png', 's/b.bmp')
    (clean / 's' / 'b.bmp').unlink()
    (clean / 's' / 'b.png').unlink()
    with pytest.raises(NotFoundError) as error:
        pair_pictures(noisy, list_pictures(clean), clean)
    one_line(error, 'b.jpg', clean)


def test_a_noisy_image_is_not_its_own_clean_one(tmp_path, one_line):
    (tmp_path / 'noisy').mkdir()
    KINDS['grey.png'][0](tmp_path / 'noisy' / 'a.png')
    (tmp_path / 'clean').mkdir()
    (tmp_path / 'clean' / 'a.png').symlink_to(tmp_path / 'noisy' / 'a.png')
    paths = list_pictures(tmp_path / 'noisy' / 'a.png')
    for clean in (tmp_path / 'noisy', tmp_path / 'noisy' / 'a.png', tmp_path / 'clean'):
        with pytest.raises(InputError) as error:
            pair_pictures(paths, list_pictures(clean), clean)
        one_line(error, tmp_path / 'noisy' / 'a.png', clean, 'this very file', 'apart')


# The command


class Average(nn.Module):
    """A denoiser that everyone can check: the mean of 3x3 pixels, of those that are there at the border."""

    in_chans, multiple, receptive_field = 3, 8, 1

    def __init__(self):
        super().__init__()
        self.strength = nn.Parameter(torch.ones(1))
        self.posterior, self.scale, self.whitening = Posterior([[0.0025, 0.01]] * 3), 1.0, None

    def forward(self, x):
        return self.strength * nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


@pytest.fixture
def predicted(monkeypatch):
    """Averages in place of a predicted network; gives the calls of `predict_denoiser`."""
    calls = []

    def predict_denoiser(images, *, hypernet=None, device=None):
        calls.append((images, hypernet.name, str(device)))
        return Average().eval()

    monkeypatch.setattr(room, 'predict_denoiser', predict_denoiser)
    return calls


run, succeeds, fails = (functools.partial(how, 'denoise') for how in (commands.run, commands.succeeds, commands.fails))


def smooth(height, width, channels=3):
    coarse = torch.rand(1, channels, 4, 4, generator=torch.Generator().manual_seed(height + width))
    found = nn.functional.interpolate(coarse, (height, width), mode='bicubic').clamp(0.1, 0.9)[0]
    return found.permute(1, 2, 0).squeeze(2).numpy() if channels == 1 else found.permute(1, 2, 0).numpy()


def put(path, pixels, sigma, white=255):
    """Writes pixels in 0-1 with noise of sigma as a file of 8 or 16 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(4).normal(0, sigma, pixels.shape)
    samples = ((pixels + noise).clip(0, 1) * white).round().astype(np.uint8 if white == 255 else np.uint16)
    if white > 255 and samples.ndim == 3:
        tifffile.imwrite(path, samples, photometric='rgb')
    else:
        Image.fromarray(samples).save(path)


@pytest.fixture
def folders(tmp_path):
    """Noisy images of all kinds and sizes, and the clean ones."""
    for root, sigma in (('noisy', 0.1), ('clean', 0)):
        put(tmp_path / root / 'colour.png', smooth(40, 60), sigma)
        put(tmp_path / root / 'deep' / 'colour.tif', smooth(70, 33), sigma, 65535)
        put(tmp_path / root / 'deep' / 'grey.png', smooth(20, 30, 1), sigma, 65535)
        put(tmp_path / root / 'deep' / 'thin.bmp', smooth(50, 1), sigma)
    (tmp_path / 'clean' / 'colour.png').rename(tmp_path / 'clean' / 'colour.bmp')  # PNG by content, paired by its stem
    return tmp_path


def test_every_image_is_denoised_under_its_name_in_its_format_and_depth(folders, predicted):
    out = succeeds(folders / 'noisy', '--out', folders / 'out', '--hypernet', NAME, '--device', 'cpu').stdout
    names = ['colour.png', 'deep/colour.tif', 'deep/grey.png', 'deep/thin.bmp']
    asked = [[str(folders / 'noisy' / name) for name in names if ('grey' in name) == grey] for grey in (True, False)]
    assert predicted == [(paths, NAME, 'cpu') for paths in asked]
    files = [path for path in (folders / 'out').rglob('*') if path.is_file()]
    assert sorted(path.relative_to(folders / 'out').as_posix() for path in files) == [*names, 'side-by-side.png']
    for name in names:
        noisy, found = read_picture(folders / 'noisy' / name), read_picture(folders / 'out' / name)
        assert (found.format, found.depth, found.pixels.shape) == (noisy.format, noisy.depth, noisy.pixels.shape)
        expected = Average()(noisy.pixels[None])[0]
        assert_close(found.pixels, expected, rtol=0, atol=0.51 / found.white)
    for needle in ('4 images', '3 in colour', '1 grey', '1x50 to 60x40', '8 and 16 bit', 'BMP, PNG, TIFF', 'on cpu'):
        assert needle in out
    assert 'for the grey ones and for those in colour' in out
    for needle in (str(folders / 'out'), 'side-by-side.png', 'predict_denoiser', f"hypernet='{NAME}'"):
        assert needle in out
    assert 'PSNR' not in out
    assert not [path for path in folders.iterdir() if path.name.startswith('.')]


def test_grey_images_and_those_in_colour_are_each_denoised_by_their_own_network(folders, predicted, monkeypatch):
    def predict_denoiser(images, **_):
        model = Average().eval()
        nn.init.constant_(model.strength, 0.0 if all(Path(image).name.startswith('grey') for image in images) else 1.0)
        return model

    monkeypatch.setattr(room, 'predict_denoiser', predict_denoiser)
    succeeds(folders / 'noisy', '--out', folders / 'out')
    assert read_picture(folders / 'out' / 'deep' / 'grey.png').pixels.max() == 0
    assert read_picture(folders / 'out' / 'colour.png').pixels.mean() > 0.2


def test_turned_copies_are_averaged_where_that_is_asked_for(folders, predicted, monkeypatch):
    class Brighter(Average):
        def forward(self, x):
            return x + 0.2 * torch.linspace(0, 1, x.shape[-1])  # to the right, which four turns make even

    monkeypatch.setattr(room, 'predict_denoiser', lambda images, **_: Brighter().eval())
    noisy = read_picture(folders / 'noisy' / 'colour.png').pixels
    for turns, added in ((1, 0.2 * torch.linspace(0, 1, 60).expand(40, 60)), (4, torch.full((40, 60), 0.1))):
        out = succeeds(folders / 'noisy', '--out', folders / f'out{turns}', '--turns', turns).stdout
        assert (f'turns={turns})' in out) == (turns > 1)
        found = read_picture(folders / f'out{turns}' / 'colour.png').pixels
        assert_close(found, (noisy + added).clamp(0, 1), rtol=0, atol=0.51 / 255)
    assert 'turns' in run(folders / 'noisy', '--out', folders / 'out', '--turns', 3).stderr


def test_the_noise_is_measured_against_clean_images_and_each_number_is_kept(folders, predicted):
    out = succeeds(folders / 'noisy', '--out', folders / 'out', '--clean', folders / 'clean').stdout
    result = json.loads((folders / 'out' / 'denoised.json').read_text())
    assert len(result['images']) == 4
    clean = read_picture(folders / 'clean' / 'colour.bmp').pixels.numpy()
    for what, root in (('noisy', 'noisy'), ('denoised', 'out')):  # what is told is what is on disk
        pixels = read_picture(folders / root / 'colour.png').pixels.numpy()
        told = result['images']['colour.png']
        assert_close(told['psnr'][what], peak_signal_noise_ratio(clean, pixels, data_range=1), rtol=0, atol=1e-4)
        similarity = structural_similarity(
            clean, pixels, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=0
        )
        assert_close(told['ssim'][what], similarity, rtol=0, atol=1e-4)
    assert result['images']['deep/thin.bmp']['ssim'] == {'noisy': None, 'denoised': None}
    assert result['images']['deep/colour.tif']['depth'] == 16
    values = [image['psnr']['denoised'] for image in result['images'].values()]
    assert_close(result['mean']['psnr']['denoised']['mean'], float(np.mean(values)))
    assert result['mean']['psnr']['gain']['mean'] > 3
    assert {image['white'] for image in result['images'].values()} == {1}
    assert 'where white is' not in out
    assert (result['mean']['psnr']['images'], result['mean']['ssim']['images']) == (4, 3)
    gain, over = re.search(r'PSNR .* dB: \+([\d.]+) ± [\d.]+ dB \(means of (\d)', out).groups()
    assert_close(float(gain), result['mean']['psnr']['gain']['mean'], rtol=0, atol=0.006)
    assert over == '4'
    assert 'means of 3' in out
    with Image.open(folders / 'out' / 'side-by-side.png') as image:
        assert image.width > 3 * 256
        assert image.height > 4 * 256


def test_the_noise_that_was_found_is_said_and_where_it_is_hardly_any(folders, predicted, monkeypatch):
    assert (
        'Noise      images in colour: 0.050 of white in black, 0.100 in white\n'
        in succeeds(folders / 'noisy', '--out', folders / 'out').output
    )
    faint = Average().eval()
    faint.posterior, faint.scale = Posterior([[4e-6, 4e-6]] * 3), 0.25
    monkeypatch.setattr(room, 'predict_denoiser', lambda *args, **options: faint)
    result = succeeds(folders / 'noisy' / 'colour.png', '--out', folders / 'faint')
    assert 'Noise      0.002 of white; white is 0.25 of that of the files\n' in result.output
    assert 'Warning: hardly any noise was found' in result.stderr


@pytest.mark.skipif(not Path('/proc/self').exists(), reason='no folder where nothing can be made')
def test_a_place_where_nothing_can_be_made_is_named_before_any_work(folders, predicted):
    fails(folders / 'noisy', '--out', '/proc/denoised', needles=['/proc/denoised: no folder can be made there'])
    assert not predicted


def test_it_is_said_of_which_white_the_noise_is_measured(folders, predicted, monkeypatch):
    def predict_denoiser(*_, **__):
        model = Average().eval()
        model.scale = 0.5  # of images that use half of their range
        return model

    monkeypatch.setattr(room, 'predict_denoiser', predict_denoiser)
    out = succeeds(folders / 'noisy', '--out', folders / 'out', '--clean', folders / 'clean').stdout
    assert 'where white is 0.5 of that of the files' in out
    told = json.loads((folders / 'out' / 'denoised.json').read_text())['images']['colour.png']
    assert told['white'] == 0.5
    clean, found = (read_picture(folders / root).pixels.numpy() for root in ('clean/colour.bmp', 'out/colour.png'))
    assert_close(told['psnr']['denoised'], peak_signal_noise_ratio(clean, found, data_range=0.5), rtol=0, atol=1e-4)


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    put(tmp_path / 'deep.tif', smooth(20, 30), 0, 65535)
    assert_close(read_picture('~/deep.tif').pixels, read_picture(tmp_path / 'deep.tif').pixels)


def test_one_file_and_its_clean_one(folders, predicted):
    deep = folders / 'noisy' / 'deep'
    out = succeeds(
        deep / 'thin.bmp', '--out', folders / 'noisy' / 'out', '--clean', folders / 'clean' / 'deep' / 'thin.bmp'
    ).stdout
    assert (folders / 'noisy' / 'out' / 'thin.bmp').is_file()
    assert '1 image (' in out
    assert 'SSIM       not defined' in out
    assert json.loads((folders / 'noisy' / 'out' / 'denoised.json').read_text())['mean']['psnr']['gain']['mean'] > 0


def test_the_names_of_images_are_never_taken_for_something_else(tmp_path, predicted):
    for name in ('side-by-side.png', 'Side-by-side-2.png'):
        put(tmp_path / 'noisy' / name, smooth(20, 20), 0.1)
    succeeds(tmp_path / 'noisy', '--out', tmp_path / 'out')
    names = sorted(path.name for path in (tmp_path / 'out').iterdir())
    assert names == ['Side-by-side-2.png', 'side-by-side-3.png', 'side-by-side.png']
    assert read_picture(tmp_path / 'out' / 'side-by-side.png').pixels.shape == (3, 20, 20)


def test_what_cannot_be_read_is_left_out_and_counted_or_an_error_with_strict(folders, predicted, nothing_written):
    REFUSED['nan.tif'][0](folders / 'noisy' / 'nan.tif')
    REFUSED['empty.png'][0](folders / 'noisy' / 'empty.png')
    with nothing_written(folders):
        fails(folders / 'noisy', '--out', folders / 'out', '--strict', needles=['empty.png', 'not an image'])
        fails(folders / 'noisy' / 'nan.tif', '--out', folders / 'out', needles=['nan.tif', 'NaN'])
    assert not predicted
    result = succeeds(folders / 'noisy', '--out', folders / 'out')
    assert 'Warning: skipped 2 of 6 images' in result.stderr
    assert 'that can be read' in result.stdout
    assert 'nan.tif' in result.stderr
    assert sum(len(paths) for paths, _, _ in predicted) == 4
    assert not (folders / 'out' / 'nan.tif').exists()
    result = succeeds(folders / 'noisy', '--out', folders / 'more', '--clean', folders / 'clean')
    assert 'Warning: skipped 2 of 6 images' in result.stderr  # which need no clean ones


def test_a_link_that_leads_nowhere_is_left_out_too(folders, predicted, nothing_written):
    (folders / 'noisy' / 'gone.png').symlink_to(folders / 'nowhere.png')
    with nothing_written(folders):
        fails(folders / 'noisy', '--out', folders / 'out', '--strict', needles=['gone.png', 'no such file'])
    assert 'skipped 1 of 5 images' in succeeds(folders / 'noisy', '--out', folders / 'out').stderr


def test_bad_folders_are_said_before_any_work(folders, predicted, nothing_written):
    noisy, clean, out = folders / 'noisy', folders / 'clean', folders / 'out'
    (folders / 'empty').mkdir()
    with nothing_written(folders):
        fails(noisy, needles=['--out'])
        fails(noisy, '--out', '', needles=['--out is empty'])
        fails('', '--out', out, needles=['images is empty'])
        fails(noisy, '--out', noisy, needles=['IMAGES', noisy])
        fails(noisy, '--out', noisy / 'deep' / 'out', needles=['lies in it', noisy])
        fails(noisy, '--out', clean / 'out', '--clean', clean, needles=['--clean', clean])
        fails(noisy, '--out', clean, needles=['exists', clean])
        fails(noisy, '--out', folders / 'no' / 'out', needles=['not there'])
        fails(noisy, '--out', out, '--clean', noisy, needles=['--clean', noisy])
        fails(noisy, '--out', out, '--clean', noisy / 'deep', needles=['--clean', 'apart'])
        fails(noisy / 'colour.png', '--out', out, '--clean', noisy, needles=['colour.png', 'this very file', 'apart'])
        fails(noisy, '--out', out, '--clean', folders / 'cleam', needles=['cleam', 'Did you mean clean?'])
        fails(folders / 'empty', '--out', out, needles=['no images', folders / 'empty'])
        fails(folders / 'noissy', '--out', out, needles=['noissy', 'Did you mean noisy?'])
        fails(noisy, '--out', out, '--device', 'warp', needles=['warp'])
        fails(noisy, '--out', out, '--hypernet', 'resnet18', needles=['resnet18', 'blindspot_unet'])
    assert not predicted


def test_clean_images_must_be_there_and_alike(folders, predicted, nothing_written):
    arguments = (folders / 'noisy', '--out', folders / 'out', '--clean', folders / 'clean')
    grey = folders / 'clean' / 'deep' / 'grey.png'
    for pixels, needle in ((smooth(20, 31, 1), '31x20'), (smooth(20, 30), 'in colour')):
        put(grey, pixels, 0)
        with nothing_written(folders):
            fails(*arguments, needles=['grey.png', '30x20 grey', needle])
    grey.write_bytes(b'')
    fails(*arguments, needles=[grey, 'not an image'])
    grey.unlink()
    fails(*arguments, needles=['grey.png', 'no clean image'])
    assert not predicted


def test_float_files_share_one_range_and_go_with_clean_ones_of_other_depths(tmp_path, predicted, nothing_written):
    for root in ('noisy', 'clean'):
        (tmp_path / root).mkdir(exist_ok=True)
        put(tmp_path / 'clean' / f'{root}.png', smooth(20, 30, 1), 0)
        tifffile.imwrite(tmp_path / 'noisy' / f'{root}.tif', smooth(20, 30, 1).astype(np.float32))
    succeeds(tmp_path / 'noisy', '--out', tmp_path / 'out', '--clean', tmp_path / 'clean')
    (tmp_path / 'clean' / 'noisy.png').unlink()
    tifffile.imwrite(tmp_path / 'clean' / 'noisy.tif', 200 * smooth(20, 30, 1).astype(np.float32))
    with nothing_written(tmp_path):
        needles = ['noisy.tif has white at 1,', 'at 255', 'scale one']
        fails(tmp_path / 'noisy', '--out', tmp_path / 'more', '--clean', tmp_path / 'clean', needles=needles)
    tifffile.imwrite(tmp_path / 'noisy' / 'clean.tif', 200 * smooth(20, 30, 1).astype(np.float32))
    with nothing_written(tmp_path):
        needles = ['white at 255', 'at 1,', 'clean.tif', 'noisy.tif', 'scale them alike']
        fails(tmp_path / 'noisy', '--out', tmp_path / 'more', needles=needles)


def test_of_jpeg_files_it_is_said_that_their_noise_is_smeared(tmp_path, predicted):
    put(tmp_path / 'noisy' / 'a.png', smooth(20, 30), 0.1)
    assert 'JPEG' not in succeeds(tmp_path / 'noisy', '--out', tmp_path / 'out').stderr
    put(tmp_path / 'noisy' / 'b.jpg', smooth(20, 30), 0.1)
    assert '1 of 2 images are JPEG' in succeeds(tmp_path / 'noisy', '--out', tmp_path / 'more').stderr


def test_nothing_is_left_when_it_breaks_on_the_way(folders, predicted, monkeypatch, nothing_written, full_disk):
    with nothing_written(folders), full_disk(3000):
        fails(folders / 'noisy', '--out', folders / 'out', needles=[str(folders / 'out'), 'too large'])
    forward = Average.forward
    monkeypatch.setattr(Average, 'forward', lambda self, x: forward(self, x) * torch.nan)
    with nothing_written(folders):
        fails(folders / 'noisy', '--out', folders / 'out', needles=['NaN'])


@pytest.mark.parametrize(
    ('text', 'planes', 'kept'),
    [('ImageJ=1.53', False, True), ('ImageJ=1.53', True, False), ('ImageJ=1.53\nunit=µm', False, False)],
)
def test_a_description_is_kept_where_it_still_says_how_the_file_is_written(tmp_path, text, planes, kept):
    samples = np.moveaxis(BYTES[..., :3], 2, 0) if planes else BYTES[..., :3]
    how = {'planarconfig': 'separate' if planes else 'contig', 'photometric': 'rgb', 'metadata': None}
    tifffile.imwrite(tmp_path / 'a.tif', samples, description=text.encode(), **how)
    picture = read_picture(tmp_path / 'a.tif')
    write_picture(picture, picture.pixels, tmp_path / 'b.tif')
    with tifffile.TiffFile(tmp_path / 'b.tif') as file:
        np.testing.assert_array_equal(file.pages[0].asarray(), BYTES[..., :3])
        assert file.pages[0].description == (text if kept else '')


def test_a_resolution_of_zero_is_left_out_and_its_unit_with_it(tmp_path):
    tifffile.imwrite(tmp_path / 'a.tif', BYTES[..., 0], resolution=(0, 0), resolutionunit=3, metadata=None)
    picture = read_picture(tmp_path / 'a.tif')
    assert picture.metadata['tiffinfo'] == {}
    write_picture(picture, picture.pixels, tmp_path / 'b.tif')
    with tifffile.TiffFile(tmp_path / 'b.tif') as file:
        np.testing.assert_array_equal(file.pages[0].asarray(), BYTES[..., 0])


def test_it_is_said_where_neighbouring_pixels_share_noise(tmp_path):
    noise = np.random.default_rng(3).normal(0, 0.15, (162, 162, 3))
    noise = sum(noise[row : row + 160, column : column + 160] for row in range(3) for column in range(3)) / 9
    pixels = ((smooth(160, 160) * 0.6 + 0.2 + noise).clip(0, 1) * 255).round().astype(np.uint8)
    (tmp_path / 'noisy').mkdir()
    Image.fromarray(pixels).save(tmp_path / 'noisy' / 'a.png')
    out = succeeds(tmp_path / 'noisy', '--out', tmp_path / 'out').output
    assert 'neighbouring pixels share it' in out
    assert float(re.search(r'Noise      ([\d.]+) of white', out)[1]) == pytest.approx(0.05, rel=0.25)


def test_noise_of_what_is_bright_alone_is_noise(folders, predicted, monkeypatch):
    photons = Average().eval()
    photons.posterior = Posterior([[0.0, 0.01]] * 3)
    monkeypatch.setattr(room, 'predict_denoiser', lambda *args, **options: photons)
    result = succeeds(folders / 'noisy' / 'colour.png', '--out', folders / 'photons')
    assert 'Noise      0.000 of white in black, 0.100 in white\n' in result.output
    assert 'hardly any noise' not in result.stderr
