"""images/: every form of images people have, and every way in which they go wrong."""

import dataclasses
import enum
import io
import os
import pickle
import re
import shutil
import struct
import tarfile
import threading
import time
import warnings
import zlib
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pngs import bomb, png
from torch.testing import assert_close
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from timm_pudnet.config import InputConfig, InputError, NotFoundError, PudNetError, PudNetWarning
from timm_pudnet.images import folders, open_images, reorders
from timm_pudnet.images import source as images_room

RGB = InputConfig(input_size=(3, 16, 16), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
GREY = InputConfig(input_size=(1, 16, 16), mean=(0.4,), std=(0.2,))


leaves_files_open = pytest.mark.filterwarnings(  # timm's readers and webdataset do
    'ignore::pytest.PytestUnraisableExceptionWarning', 'ignore::ResourceWarning'
)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def read(source, batch_size=256):
    parts = list(source.batches(batch_size))
    labels = None if parts[0][1] is None else torch.cat([y for _, y in parts])
    return torch.cat([x for x, _ in parts]), labels


def timm_transform(config):
    return timm.data.create_transform(
        input_size=config.input_size,
        is_training=False,
        mean=config.mean,
        std=config.std,
        interpolation=config.interpolation,
        crop_pct=config.crop_pct,
        crop_mode=config.crop_mode,
    )


def expect(images, config=RGB):
    mode = {1: 'L', 3: 'RGB', 4: 'RGBA'}[config.input_size[0]]
    return torch.stack([timm_transform(config)(image.convert(mode)) for image in images])


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.fixture
def folder(tmp_path):
    for name, count in (('dog', 3), ('cat', 2)):
        for index in range(count):
            save(tmp_path / 'pets' / name / f'{index}.png', noise(20, 24, 3, seed=ord(name[0]) + index))
    return tmp_path / 'pets'


# Folders


def test_a_folder_of_classes(folder):
    source = open_images(folder, input=RGB)
    x, y = read(source)
    paths = [folder / 'cat' / f'{i}.png' for i in range(2)] + [folder / 'dog' / f'{i}.png' for i in range(3)]
    same(x, expect([Image.open(path) for path in paths]))
    assert y.tolist() == source.labels.tolist() == [0, 0, 1, 1, 1]
    assert y.dtype == source.labels.dtype == torch.int64
    assert source.class_names == ('cat', 'dog')
    assert source.labelled
    assert len(source) == 5
    assert source.description == f'5 images in 2 classes in {folder}'
    assert source.skipped == []
    same(read(source)[0], x)


def test_classes_are_numbered_as_timm_numbers_them(tmp_path):
    for name in ('c10', 'c2', 'B', 'a', 'c1'):
        save(tmp_path / name / 'x.png', noise(16, 16, 3))
    theirs = timm.data.create_dataset('', root=str(tmp_path)).reader.class_to_idx
    assert {name: index for index, name in enumerate(open_images(tmp_path, input=RGB).class_names)} == theirs
    assert list(theirs) == ['a', 'B', 'c1', 'c2', 'c10']


def test_a_flat_folder_has_no_labels(tmp_path):
    for index in range(3):
        save(tmp_path / f'{index}.PNG', noise(16, 16, 3, seed=index))
    source = open_images(str(tmp_path), input=RGB)
    x, y = read(source)
    assert (tuple(x.shape), y, source.labels, source.class_names, source.labelled) == (
        (3, 3, 16, 16),
        None,
        None,
        None,
        False,
    )
    assert source.description == f'3 unlabelled images in {tmp_path}'


def test_images_lie_nested_hidden_and_behind_links(tmp_path):
    root = tmp_path / 'photos'
    save(root / 'a' / 'deep' / 'er' / 'x.JPeG', noise(16, 16, 3))
    save(root / 'a' / '.hidden' / 'x.png', noise(16, 16, 3))
    save(root / 'a' / '.x.png', noise(16, 16, 3))
    save(root / '.git' / 'x.png', noise(16, 16, 3))
    (root / 'a' / 'notes.txt').write_text('none')
    save(tmp_path / 'elsewhere' / 'é 猫.png', noise(16, 16, 3))
    (root / 'ü').symlink_to(tmp_path / 'elsewhere')
    (root / 'a' / 'loop').symlink_to(root / 'a')
    (root / 'a' / 'up').symlink_to(root)
    source = open_images(root, input=RGB)
    assert source.class_names == ('a', 'ü')
    assert source.labels.tolist() == [0, 1]
    assert len(read(source)[0]) == 2


def test_loose_images_and_empty_class_folders_are_named(folder):
    save(folder / 'loose.png', noise(16, 16, 3))
    (folder / 'bird').mkdir()
    with pytest.warns(PudNetWarning) as caught:
        source = open_images(folder, input=RGB)
    texts = [str(warning.message) for warning in caught]
    assert any('ignored 1 images beside the class folders' in text for text in texts)
    assert any('without images: bird' in text for text in texts)
    assert source.class_names == ('cat', 'dog')
    assert len(source) == 5


def test_one_folder_among_many_images_does_not_take_their_place(tmp_path, one_line):
    for place in ('1.png', '2.png', 'thumbs/1.png'):
        save(tmp_path / place, noise(16, 16, 3))
    with pytest.raises(InputError) as error:
        open_images(tmp_path, input=RGB)
    one_line(error, '2 images and one folder with images (thumbs)')
    assert len(open_images(tmp_path, input=RGB, with_labels=False)) == 3


def test_pictures_that_cannot_be_read_are_counted_before_reading(folder, one_line):
    (folder / 'cat' / 'raw.jpg').write_bytes(next((folder / 'cat').iterdir()).read_bytes())
    for name in ('a.HEIC', 'b.heic', 'x.jpg?w=300', 'x.jpg_large', 'notes.txt', 'raw.CR2', 'set.psd1', 'LICENSE'):
        (folder / 'cat' / name).write_bytes(b'x')
    with pytest.warns(PudNetWarning, match=r'ignored 4 pictures .*\(\.HEIC, \.heic, \.jpg\?w=300, \.jpg_large\)$'):
        assert len(open_images(folder, input=RGB)) == 6
    with pytest.raises(InputError) as error:
        open_images(folder, input=RGB, strict=True)
    one_line(error, str(folder), '4 pictures', 'convert or rename them')


def test_a_picture_without_its_extension_is_told_by_its_first_bytes(folder, one_line):
    picture = next((folder / 'cat').iterdir()).read_bytes()
    for name in ('photo', 'IMG_1.3', 'photo.txt'):  # a text is not looked into
        (folder / 'cat' / name).write_bytes(picture)
    (folder / 'cat' / 'LICENSE').write_bytes(b'MIT')
    if hasattr(os, 'mkfifo'):
        os.mkfifo(folder / 'cat' / 'pipe')  # which nobody writes to
    for with_labels in (True, False):
        with pytest.warns(PudNetWarning, match=r'ignored 2 pictures .*\(\.3, no extension\)$'):
            open_images(folder, input=RGB, with_labels=with_labels)
        with pytest.raises(InputError) as error:
            open_images(folder, input=RGB, with_labels=with_labels, strict=True)
        one_line(error, str(folder), '2 pictures')


def test_of_many_files_that_are_no_pictures_only_some_are_opened(folder, monkeypatch):
    opened = []
    monkeypatch.setattr(folders, 'open', lambda path, mode: opened.append(path) or io.BytesIO(b'x'), raising=False)
    for number in range(130):
        (folder / 'cat' / f'{number}.pkl').write_bytes(b'x')
    open_images(folder, input=RGB)
    assert len(opened) == 100


@pytest.mark.skipif(os.name == 'nt', reason='names of files are no bytes there')
def test_a_class_name_that_the_locale_cannot_decode_is_text_all_the_same(folder):
    for name, wanted in ((b'na\xc3\xafve', 'naïve'), (b'caf\xe9', 'caf\\xe9')):
        (folder / 'cat').rename(folder / name.decode('ascii', 'surrogateescape'))
        assert wanted in open_images(folder, input=RGB).class_names
        (folder / name.decode('ascii', 'surrogateescape')).rename(folder / 'cat')


def test_splits_beside_a_folder_that_is_none_are_named(tmp_path):
    for name in ('Train', 'dev', 'extra'):
        save(tmp_path / name / 'x.png', noise(16, 16, 3))
    with pytest.warns(PudNetWarning, match='took dev, Train for classes'):
        assert open_images(tmp_path, input=RGB).class_names == ('dev', 'extra', 'Train')
    (tmp_path / 'extra' / 'x.png').unlink()
    with pytest.raises(InputError, match='holds splits, not classes'):
        open_images(tmp_path, input=RGB)


def test_names_from_files_are_shown_in_one_line(tmp_path, one_line):
    with pytest.raises(InputError) as error:
        read(open_images(['a.png\n', '\x1b[31mb.png'], input=RGB))
    one_line(error, "'a.png\\n'", "'\\x1b[31mb.png'")


def test_one_class_is_fine(tmp_path):
    save(tmp_path / 'only' / 'x.png', noise(16, 16, 3))
    source = open_images(tmp_path, input=RGB)
    assert source.labels.tolist() == [0]
    assert source.description == f'1 image in 1 class in {tmp_path}'


def test_folder_errors(folder, tmp_path):
    with pytest.raises(NotFoundError, match=r'pest: no such folder. Did you mean pets\?'):
        open_images(tmp_path / 'pest', input=RGB)
    with pytest.raises(InputError, match=r'one file: pass a list'):
        open_images(folder / 'cat' / '0.png', input=RGB)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(InputError, match='the folder is empty'):
        open_images(tmp_path / 'empty', input=RGB)
    (tmp_path / 'text').mkdir()
    for index in range(12):
        (tmp_path / 'text' / f'{index}.txt').write_text('x')
    with pytest.raises(InputError, match=r'no images in .*text: 12 other files \(\.txt\); images end in \.jpg'):
        open_images(tmp_path / 'text', input=RGB)
    for part in ('train', 'val'):
        save(tmp_path / 'split' / part / 'cat' / 'x.png', noise(16, 16, 3))
    with pytest.raises(InputError, match=r'holds splits, not classes: pass .*split.train'):
        open_images(tmp_path / 'split', input=RGB)
    assert len(open_images(tmp_path / 'split' / 'train', input=RGB)) == 1
    for path in ('cat/day1', 'cat/day2', 'dog/day1', 'dog/day2', 'training_set/cat', 'test_set/cat'):
        save(tmp_path / ('parts' if 'set' in path else 'pets by day') / path / 'x.png', noise(16, 16, 3))
    assert open_images(tmp_path / 'pets by day', input=RGB).class_names == ('cat', 'dog')
    with pytest.raises(InputError, match='holds splits, not classes'):
        open_images(tmp_path / 'parts', input=RGB)
    (tmp_path / 'one').mkdir()
    (tmp_path / 'pets by day').rename(tmp_path / 'one' / 'pets')
    with pytest.raises(InputError, match=r'one holds one folder, with others \(cat, dog\): pass .*pets$'):
        open_images(tmp_path / 'one', input=RGB)


# Lists, arrays, tensors


def test_files_pil_images_and_arrays_of_the_same_pixels_give_the_same_bits(tmp_path):
    for size in (16, 21):
        pixels = noise(4, size, size, 3)
        paths = [save(tmp_path / f'{size}-{index}.png', image) for index, image in enumerate(pixels)]
        x = read(open_images(paths, input=RGB))[0]
        same(x, expect([Image.fromarray(image) for image in pixels]))
        tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        mixed = [str(paths[0]), Image.fromarray(pixels[1]), pixels[2], tensor[3]]
        for other in (pixels, tensor, [Image.fromarray(image) for image in pixels], list(pixels), mixed, tuple(tensor)):
            same(read(open_images(other, input=RGB))[0], x)


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'LA', 'RGB', 'RGBA', 'CMYK', 'YCbCr'])
@pytest.mark.parametrize('channels', [1, 3, 4])
def test_channels_are_adapted_as_pil_does(mode, channels):
    config = InputConfig(input_size=(channels, 16, 16), mean=(0.5,) * channels, std=(0.25,) * channels)
    for size in (16, 20):
        image = Image.fromarray(noise(size, size, 3) // 2 + 64).convert(mode)
        if mode == 'RGBA':
            image.putalpha(Image.fromarray(noise(size, size, seed=3) // 2 + 64))
        same(read(open_images([image], input=config))[0], expect([image], config))
        if mode in ('L', 'RGB', 'RGBA'):
            same(read(open_images(np.asarray(image)[None], [0], input=config))[0], expect([image], config))
            floats = np.asarray(image)[None].astype(np.float64) / 255
            steps = 6 if mode == 'RGBA' and channels == 4 else 1.6  # PIL rounds colours multiplied by alpha >= 64
            x = read(open_images(floats, [0], input=config))[0]
            torch.testing.assert_close(x, expect([image], config), rtol=0, atol=steps / 255 / 0.25)


def test_palette_with_transparency_and_animation_give_no_warning(tmp_path):
    palette = Image.fromarray(noise(16, 16, 3)).quantize(8)
    palette.save(tmp_path / 'p.png', transparency=bytes([0, 128] * 4))
    frames = [Image.fromarray(noise(16, 16, seed=seed)) for seed in range(3)]
    frames[0].save(tmp_path / 'a.gif', save_all=True, append_images=frames[1:])
    x, _ = read(open_images([tmp_path / 'p.png', tmp_path / 'a.gif'], input=RGB))
    same(x, expect([palette, frames[0]]))


def test_orientation_is_left_alone_as_timm_does(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / 'x.jpg', noise(16, 16, 3), exif=exif)
    same(read(open_images([path], input=RGB))[0], expect([Image.open(path)]))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    pixels = np.array([[0, 200, 32896, 65535]] * 16, dtype=np.uint16).repeat(4, 1)
    eight = np.array([[0, 1, 128, 255]] * 16, dtype=np.uint8).repeat(4, 1)
    want = expect([Image.fromarray(eight)], GREY)
    png = save(tmp_path / 'x.png', pixels)
    as_int, as_float = Image.fromarray(pixels.astype(np.int32)), Image.fromarray(pixels.astype(np.float32))
    unit = Image.fromarray(eight.astype(np.float32) / 255)
    with Image.open(png) as opened:
        assert opened.mode == 'I;16'
    assert [as_int.mode, as_float.mode] == ['I', 'F']
    for images in ([png], [as_int], [as_float], [unit]):
        with pytest.warns(PudNetWarning, match=r"more than 8 bits .*convert\('RGB'\)"):
            same(read(open_images(images, input=GREY))[0], want)
    for image in (as_float, unit):  # PFM has no range of its own, as PGM has
        with pytest.warns(PudNetWarning, match=r'more than 8 bits'):
            same(read(open_images([save(tmp_path / 'x.pfm', np.asarray(image))], input=GREY))[0], want)
    with pytest.warns(PudNetWarning, match=r'more than 8 bits'):
        same(read(open_images(tmp_path, input=GREY, with_labels=False))[0], torch.cat([want, want]))  # both files
    for images in (pixels[None], torch.from_numpy(pixels)[None], [pixels], pixels.astype('>u2')[None]):
        with pytest.warns(PudNetWarning, match=r'too$'):
            same(read(open_images(images, input=GREY))[0], want)
        with pytest.warns(PudNetWarning, match=r'brightest pixel is 6\.\d% of white'):  # of 12 bits
            read(open_images(pixels[None] // 16, input=GREY))


def test_what_is_white_is_one_thing_for_all_images(one_line):
    values = noise(16, 16).astype(np.float32) / 255
    for other in (values * 255, values * 65535):
        with pytest.raises(InputError) as error:
            read(open_images([Image.fromarray(values), Image.fromarray(other)], input=GREY))
        one_line(error, 'image 1', 'image 0', 'save them as 16 bits')
    with pytest.warns(PudNetWarning, match='more than 8 bits'):  # floats may be a little brighter than white
        bright = read(open_images([Image.fromarray(values), Image.fromarray(values * 1.5)], input=GREY))[0]
    assert bright[1].mean() > bright[0].mean()
    black = Image.fromarray(np.zeros((16, 16), np.float32))
    with pytest.warns(PudNetWarning, match='more than 8 bits'):
        read(open_images([black, Image.fromarray(values * 255), black], input=GREY))
    with pytest.raises(InputError, match=re.escape('(pixels down to -1, where 0 is black)')):
        read(open_images([Image.fromarray(np.full((16, 16), -1, np.float32))], input=GREY))


def test_of_images_that_use_little_of_their_range_it_is_said(tmp_path):
    png = save(tmp_path / 'x.png', noise(16, 16).astype(np.uint16) * 16)
    source = open_images([png], input=GREY)
    with pytest.warns(PudNetWarning, match=r'the brightest pixel is 6\.\d% of white: scale them'):
        read(source)
    read(source.subset([0]))  # it is told once


def test_arrays_of_all_kinds():
    grey, colour = noise(5, 16, 16), noise(5, 16, 16, 4)
    same(read(open_images(grey, input=GREY))[0], expect([Image.fromarray(image) for image in grey], GREY))
    same(read(open_images(grey[..., None], input=RGB))[0], expect([Image.fromarray(image) for image in grey]))
    same(read(open_images(torch.from_numpy(grey), input=RGB))[0], expect([Image.fromarray(image) for image in grey]))
    same(read(open_images(colour, input=RGB))[0], expect([Image.fromarray(image) for image in colour]))
    mask = grey > 99
    same(read(open_images(mask, input=GREY))[0], read(open_images(np.where(mask, 255, 0).astype('u1'), input=GREY))[0])
    frozen = grey.copy()
    frozen.flags.writeable = False
    same(read(open_images(frozen[::-1], input=GREY))[0], read(open_images(grey[::-1], input=GREY))[0])
    sizes = [noise(20, 30, 3), noise(16, 16), noise(40, 17, 4)]
    same(read(open_images(sizes, input=RGB))[0], expect([Image.fromarray(image) for image in sizes]))
    assert open_images(grey, input=GREY).description == '5 unlabelled images (array)'
    assert open_images(noise(1000, 2, 2), input=GREY).description == '1,000 unlabelled images (array)'


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_are_uint8_divided_by_255_and_stay_unchanged(dtype):
    pixels = torch.from_numpy(noise(3, 3, 16, 16))
    floats = (pixels.double() / 255).to(dtype).requires_grad_()
    before = floats.detach().clone()
    x = read(open_images(floats, input=RGB))[0]
    tolerance = {torch.float16: 5e-3, torch.bfloat16: 3e-2}.get(dtype, 1e-6)
    torch.testing.assert_close(x, read(open_images(pixels, input=RGB))[0], rtol=0, atol=tolerance)
    assert x.dtype == torch.float32
    same(floats.detach(), before)
    mixed = [pixels[0], pixels[1].float() / 255]
    torch.testing.assert_close(read(open_images(mixed, input=RGB))[0], read(open_images(pixels[:2], input=RGB))[0])


@pytest.mark.parametrize('crop_mode', ['center', 'squash', 'border'])
@pytest.mark.parametrize('crop_pct', [1.0, 0.875])
@pytest.mark.parametrize('size', [(16, 16), (12, 20)])
@pytest.mark.parametrize('interpolation', ['bicubic', 'bilinear', 'nearest', 'lanczos', 'box'])
def test_equals_timms_eval_transform(crop_mode, crop_pct, size, interpolation):
    config = InputConfig(
        input_size=(3, *size),
        mean=RGB.mean,
        std=RGB.std,
        crop_mode=crop_mode,
        crop_pct=crop_pct,
        interpolation=interpolation,
    )
    for height, width in (size, (33, 21), (9, 40)):
        pixels = noise(2, height, width, 3)
        want = expect([Image.fromarray(image) for image in pixels], config)
        same(read(open_images(pixels, input=config))[0], want)
        # Floats: PIL rounds and clips a uint8 image after each of its two passes, so stay off 0 and 255.
        dull = pixels // 2 + 64
        want = expect([Image.fromarray(image) for image in dull], config)
        floats = read(open_images(dull.astype(np.float32) / 255, input=config))[0]
        torch.testing.assert_close(floats, want, rtol=0, atol=1.6 / 255 / min(config.std))


def test_equals_the_transform_that_timm_resolves_from_a_model(tmp_path):
    model = timm.create_model('test_resnet')
    data = timm.data.resolve_model_data_config(model)
    config = InputConfig(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})
    path = save(tmp_path / 'x.jpg', noise(200, 170, 3))
    want = timm.data.create_transform(**data)(Image.open(path).convert('RGB'))
    same(read(open_images([path], input=config))[0][0], want)


@settings(max_examples=25, deadline=None)
@given(
    batch_size=st.integers(1, 9),
    count=st.integers(1, 8),
    kind=st.sampled_from(['array', 'list', 'dataset', 'stream', 'loader']),
)
def test_chunking_changes_nothing(batch_size, count, kind):
    pixels, labels = torch.from_numpy(noise(count, 3, 18, 16)), torch.arange(count) // 2
    data = {
        'array': (pixels.permute(0, 2, 3, 1).numpy(), labels),
        'list': (list(pixels), labels),
        'dataset': (TensorDataset(pixels, labels), None),
        'stream': (Stream(list(zip(pixels, labels, strict=True))), None),
        'loader': (DataLoader(TensorDataset(pixels, labels), batch_size=3), None),
    }[kind]
    source = open_images(*data, input=RGB)
    want = read(open_images(pixels, input=RGB))[0]
    for _ in range(2):
        batches = list(source.batches(batch_size))
        assert max(len(x) for x, _ in batches) <= batch_size
        same(torch.cat([x for x, _ in batches]), want)
        assert torch.cat([y for _, y in batches]).tolist() == labels.tolist()


# Labels


def test_labels_of_all_kinds():
    images = noise(4, 8, 8)
    for labels, numbers, names in (
        ([0, 1, 1, 0], [0, 1, 1, 0], None),
        (np.array([5, -1, 5, 7]), [1, 0, 1, 2], ('-1', '5', '7')),
        (torch.tensor([1, 2, 1, 2]), [0, 1, 0, 1], ('1', '2')),
        (['dog', 'cat', 'dog', 'ant'], [2, 1, 2, 0], ('ant', 'cat', 'dog')),
        (np.array(['b', 'a', 'b', 'b']), [1, 0, 1, 1], ('a', 'b')),
        ((np.int8(1), torch.tensor(0), True, 0), [1, 0, 1, 0], None),
    ):
        source = open_images(images, labels, input=RGB)
        assert source.labels.tolist() == read(source, 3)[1].tolist() == numbers
        assert source.class_names == names
        assert source.labelled


def test_explicit_labels_override_those_of_the_data(folder):
    source = open_images(folder, ['x', 'y', 'x', 'y', 'z'], input=RGB)
    assert source.class_names == ('x', 'y', 'z')
    assert read(source)[1].tolist() == [0, 1, 0, 1, 2]
    pixels = torch.from_numpy(noise(5, 3, 8, 8))
    data = TensorDataset(pixels, torch.zeros(5).long())
    for images in (data, DataLoader(data, 2), Stream(list(pixels))):
        assert read(open_images(images, [3, 1, 3, 1, 2], input=RGB), 2)[1].tolist() == [2, 0, 2, 0, 1]


@pytest.mark.parametrize('labels', [[0.5, 1, 2, 3], 'abcd', 3, [0, 'a', 1, 2], [[0], [1], [2], [3]], [0, None, 1, 2]])
def test_wrong_labels(labels):
    with pytest.raises(InputError, match='labels'):
        open_images(noise(4, 8, 8), labels, input=RGB)


def test_a_column_of_labels_is_as_good_as_a_row():
    images, row = noise(4, 8, 8, 3), [2, 0, 1, 2]
    column = np.array(row)[:, None]
    pairs = [(image, label) for image, label in zip(torch.from_numpy(images).permute(0, 3, 1, 2), column, strict=True)]
    loader = DataLoader(TensorDataset(torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor(column)), batch_size=3)
    for source in (open_images(images, column, input=RGB), open_images(Pairs(pairs), input=RGB)):
        assert read(source)[1].tolist() == row
    assert read(open_images(loader, input=RGB))[1].tolist() == row


def test_labels_may_be_a_table_of_one_column_or_members_of_an_enum():
    class Kind(str, enum.Enum):  # noqa: UP042 - whose str() is not its value
        cat, dog = 'cat', 'dog'

    pandas = pytest.importorskip('pandas')
    frame = pandas.DataFrame({'label': ['dog', 'cat', 'dog', 'dog']})
    assert open_images(noise(4, 8, 8, 3), frame, input=RGB).labels.tolist() == [1, 0, 1, 1]
    source = open_images(noise(4, 8, 8, 3), [Kind.dog, Kind.cat, Kind.cat, Kind.dog], input=RGB)
    assert (source.class_names, source.labels.tolist()) == (('cat', 'dog'), [1, 0, 0, 1])


@pytest.mark.parametrize('labels', [lambda: [0, 1], {0: 1, 1: 0}, 3])
def test_what_a_dataset_calls_labels_need_not_be_a_list_of_them(labels):
    dataset = Pairs([(image, 1 - place % 2) for place, image in enumerate(torch.rand(4, 3, 8, 8))])
    dataset.labels = labels
    assert read(open_images(dataset, input=RGB))[1].tolist() == [1, 0, 1, 0]


def test_tensors_without_values_and_batches_in_place_of_images_are_refused(one_line):
    with pytest.raises(InputError) as error:
        open_images(torch.rand(4, 3, 8, 8, device='meta'), input=RGB)
    one_line(error, 'on the device meta')
    with pytest.raises(InputError) as error:
        open_images(torch.rand(4, 3, 8, 8), torch.zeros(4, device='meta'), input=RGB)
    one_line(error, 'labels', 'on the device meta')
    batched = Stream([(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))])
    with pytest.raises(InputError) as error:
        open_images(DataLoader(batched, batch_size=None), input=RGB)
    one_line(error, 'gives batches of shape (4, 3, 8, 8)')


def test_names_are_numbered_as_folders_of_these_names_are(tmp_path):
    names = ['class10', 'Banana', 'class2', 'apple']
    for name in names:
        save(tmp_path / name / 'x.png', noise(8, 8, 3))
    given = open_images(noise(4, 8, 8, 3), names, input=RGB)
    assert given.class_names == open_images(tmp_path, input=RGB).class_names == ('apple', 'Banana', 'class2', 'class10')
    assert given.labels.tolist() == [3, 1, 2, 0]


def test_labels_in_no_order_are_refused():
    with pytest.raises(InputError, match='labels: a set; pass one int or string for each image, in their order'):
        open_images(noise(2, 8, 8, 3), {'a', 'b'}, input=RGB)


@pytest.mark.parametrize('labels', [torch.zeros(4, 2), np.eye(4, dtype=int)])
def test_labels_of_another_shape_are_told_theirs(labels):
    with pytest.raises(InputError, match=re.escape(f'shape {list(labels.shape)}: pass one int or string for each')):
        open_images(noise(4, 8, 8), labels, input=RGB)


def test_the_number_of_labels_must_fit(folder):
    with pytest.raises(InputError, match='2 labels for 5 images'):
        open_images(folder, [0, 1], input=RGB)
    with pytest.raises(InputError, match='6 labels for 5 images'):
        open_images(noise(5, 8, 8), range(6), input=RGB)
    stream = Stream(list(noise(5, 8, 8)))
    with pytest.raises(InputError, match='6 labels for 5 images'):
        read(open_images(stream, range(6), input=RGB))
    with pytest.raises(InputError, match='4 labels for at least 5 images'):
        read(open_images(stream, range(4), input=RGB))
    with pytest.raises(InputError, match='shuffle'):
        open_images(DataLoader(list(noise(5, 8, 8)), shuffle=True), range(5), input=RGB)


# Datasets and loaders


class Stream(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


class Backwards(BatchSampler):
    def __iter__(self):
        return iter(list(super().__iter__())[::-1])


class Pairs(Dataset):
    def __init__(self, items, **attributes):
        self.items = items
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item


def test_datasets_of_images_alone_and_of_pairs():
    pixels = noise(4, 18, 16, 3)
    pictures = [Image.fromarray(image) for image in pixels]
    want = expect(pictures)
    for items in (pictures, list(pixels), [(image,) for image in pictures], [(image, -1) for image in pictures]):
        for dataset in (Pairs(items), Stream(items)):
            source = open_images(dataset, input=RGB)
            x, y = read(source, 3)
            same(x, want)
            assert (y, source.labelled, source.labels) == (None, False, None)
    items = [(image, label, 'more') for image, label in zip(pictures, [2, 0, 1, 2], strict=True)]
    for dataset in (Pairs(items), Stream(items)):
        source = open_images(dataset, input=RGB)
        assert (source.labelled, source.labels, source.class_names) == (True, None, None)
        assert read(source, 3)[1].tolist() == [2, 0, 1, 2]
    assert len(open_images(Pairs(items), input=RGB)) == 4
    assert open_images(Pairs(items), input=RGB).description == '4 labelled images (Pairs)'
    stream = open_images(Stream(items), input=RGB)
    assert stream.description == 'labelled images (Stream)'
    with pytest.raises(TypeError, match='only after reading'):
        len(stream)


def test_items_with_other_labels_than_their_list_of_targets_are_no_guess(one_line):
    items = [(pixels, label) for pixels, label in zip(noise(6, 8, 8, 3), [0, 1, 2, 0, 1, 2], strict=True)]
    right = open_images(Pairs(items, targets=[0, 1, 2, 0, 1, 2]), input=RGB)
    assert read(right.subset([5, 0]))[1].tolist() == [2, 0]
    for targets in ([0, 1, 2, 0, 1, 1], [0, 1, 2, 0, 1, 5]):
        for dataset in (Pairs(items, targets=targets), Subset(Pairs(items, targets=targets), [1, 5])):
            with pytest.raises(InputError) as error:
                read(open_images(dataset, input=RGB))
            one_line(error, 'comes with label 2', f'its list of targets says {targets[-1]}', 'labels=')
    # Items that say nothing of one class leave it to the list.
    several = Pairs([(pixels, (label, 7)) for pixels, label in items], targets=[0, 1, 2, 0, 1, 2])
    assert read(open_images(several, input=RGB))[1].tolist() == [0, 1, 2, 0, 1, 2]


def test_one_picture_many_times_is_read_each_time(tmp_path):
    files = [save(tmp_path / f'{number}.png', noise(300, 300, 3, seed=number)) for number in range(20)]
    opened = [Image.open(file) for file in files]
    same(read(open_images(opened + opened + opened, input=RGB))[0], read(open_images(files * 3, input=RGB))[0])


def test_a_table_s_column_of_paths_is_a_list_of_them(folder, monkeypatch):
    pandas = pytest.importorskip('pandas')
    paths = sorted(str(path) for path in folder.rglob('*.png'))
    table = pandas.DataFrame({'path': paths, 'label': [number % 2 for number in range(len(paths))]})
    x, y = read(open_images(table['path'], table['label'], input=RGB))
    same(x, read(open_images(paths, input=RGB))[0])
    assert y.tolist() == table['label'].tolist()
    with pytest.raises(InputError, match='DataFrame is a table: pass its column of paths or images'):
        open_images(table, input=RGB)
    monkeypatch.setenv('HOME', str(folder))
    homely = ['~' + path.removeprefix(str(folder)) for path in paths]
    same(read(open_images(homely, input=RGB))[0], x)


def test_a_split_that_is_not_there_is_no_other_one(tmp_path, write_folder):
    for split in ('train', 'val'):
        write_folder(tmp_path / split, noise(2, 8, 8), ['cup', 'jar'])
    found = open_images('torch/image_folder', input=RGB, data_dir=tmp_path, split='val')
    assert (len(found), found.class_names) == (2, ('cup', 'jar'))
    for name in ('torch/image_folder', 'torch/folder', 'torch/Image_Folder'):
        with pytest.raises(InputError, match=r"has no split 'test': name one of train, val"):
            open_images(name, input=RGB, data_dir=tmp_path, split='test')
    for name in ('torch/cifar10', 'torch/CIFAR10', 'torch/qmnist'):
        for split in ('Train', 'trian'):  # timm would give the test images
            with pytest.raises(InputError, match=rf"{name}: no split '{split}': name train or test"):
                open_images(name, input=RGB, data_dir=tmp_path, split=split)


def test_targets_and_classes_of_a_dataset_are_known_before_reading():
    items = [(Image.fromarray(image), label) for image, label in zip(noise(4, 8, 8), [0, 2, 2, 1], strict=True)]
    dataset = Pairs(items, targets=[0, 2, 2, 1], classes=['a', 'b', 'c'])
    source = open_images(dataset, input=RGB)
    assert source.labels.tolist() == [0, 2, 2, 1]
    assert source.class_names == ('a', 'b', 'c')
    part = open_images(Subset(dataset, [2, 0, 1]), input=RGB)  # b has no image, so it is no class
    assert part.labels.tolist() == read(part)[1].tolist() == [1, 0, 1]
    assert part.class_names == ('a', 'c')
    nested = open_images(Subset(Subset(dataset, [3, 2, 0, 1]), [1, 0]), input=RGB)
    assert nested.labels.tolist() == read(nested)[1].tolist() == [1, 0]
    assert nested.class_names == ('b', 'c')
    loader = open_images(DataLoader(Subset(dataset, [2, 0, 1]), 2, collate_fn=stack), input=RGB)
    assert read(loader)[1].tolist() == [1, 0, 1]
    assert loader.class_names == ('a', 'c')
    nested = open_images(DataLoader(Subset(Subset(dataset, [3, 2, 0, 1]), [1, 0]), 2, collate_fn=stack), input=RGB)
    assert (read(nested)[1].tolist(), nested.class_names) == ([1, 0], ('b', 'c'))
    untold = open_images(DataLoader(Subset(Pairs(items, classes=['a', 'b', 'c']), [1, 2]), collate_fn=stack), input=RGB)
    assert (read(untold)[1].tolist(), untold.class_names) == ([2, 2], None)
    others = DataLoader(Subset(dataset, [1, 2]), 2, collate_fn=lambda items: (stack(items)[0], [0, 1]))
    with pytest.raises(InputError, match='collate_fn'):
        read(open_images(others, input=RGB))
    some = Pairs(items[1:3], targets=[2, 2], classes=['a', 'b', 'c'])  # filtered in place
    for same in (some, DataLoader(some, 2, collate_fn=stack)):
        found = open_images(same, input=RGB)
        assert (read(found)[1].tolist(), found.class_names) == ([0, 0], ('c',))
    first = Pairs([items[0], items[3]], targets=[0, 1], classes=['a', 'b', 'c'])  # whose numbers stay
    for same in (first, DataLoader(first, 2, collate_fn=stack)):
        found = open_images(same, input=RGB)
        assert (read(found)[1].tolist(), found.class_names) == ([0, 1], ('a', 'b'))
    moved = Pairs(items, targets=[0, 2, 2, 1], classes=['a', 'b', 'c'], target_transform=abs)
    other = open_images(moved, input=RGB)
    assert other.labels is other.class_names is None, 'the names are those of the numbers before'
    assert open_images(DataLoader(moved, collate_fn=stack), input=RGB).class_names is None
    assert read(other)[1].tolist() == [0, 2, 2, 1]
    assert open_images(DataLoader(dataset, collate_fn=stack), input=RGB).class_names == ('a', 'b', 'c')


@pytest.mark.parametrize(
    'how',
    [
        {'shuffle': True},
        {'sampler': SubsetRandomSampler(range(4))},
        {'sampler': WeightedRandomSampler([1.0] * 4, 4)},
        {'batch_sampler': BatchSampler(RandomSampler(range(4)), 2, False)},
        {'batch_sampler': Backwards(SequentialSampler(range(4)), 2, False)},
        {'num_workers': 2, 'in_order': False},
    ],
)
def test_labels_beside_a_loader_of_another_order_are_refused(how):
    dataset = Pairs(list(torch.rand(4, 3, 8, 8)))
    with pytest.raises(InputError, match='shuffles'):
        open_images(DataLoader(dataset, **how), [0, 1, 0, 1], input=RGB)
    with pytest.raises(InputError, match='workers share a stream'):
        open_images(DataLoader(Stream(list(torch.rand(4, 3, 8, 8))), 2, num_workers=2), [0, 1, 0, 1], input=RGB)
    for in_order in (
        DataLoader(dataset, 2),
        DataLoader(dataset, None),
        DataLoader(Stream(list(torch.rand(4, 3, 8, 8))), 2),
        DataLoader(dataset, batch_sampler=BatchSampler(SequentialSampler(dataset), 3, False)),
    ):
        assert read(open_images(in_order, [0, 1, 0, 1], input=RGB))[1].tolist() == [0, 1, 0, 1]


@leaves_files_open
def test_a_map_style_dataset_of_timm_knows_its_labels(folder):
    source = open_images(timm.data.create_dataset('', root=str(folder)), input=RGB)
    assert source.labels.tolist() == read(source)[1].tolist() == [0, 0, 1, 1, 1]
    assert source.class_names == ('cat', 'dog')
    same(read(source)[0], read(open_images(folder, input=RGB))[0])


@leaves_files_open
@pytest.mark.parametrize('labelled', [True, False])
def test_a_set_of_hugging_face_may_have_labels_or_none(labelled, folder, tmp_path, monkeypatch):
    pytest.importorskip('datasets')
    monkeypatch.setattr('datasets.config.HF_CACHE_HOME', tmp_path)
    where = folder if labelled else folder / 'dog'
    source = open_images(f'hfds/{where}', input=RGB, split='train', data_dir=str(tmp_path), with_labels=labelled)
    images, labels = read(source)
    if labelled:
        assert labels.tolist() == [0, 0, 1, 1, 1]
        assert source.class_names == ('cat', 'dog')
    else:
        assert not source.labelled
        assert len(images) == 3
        assert not open_images(f'hfds/{where}', input=RGB, split='train', data_dir=str(tmp_path)).labelled


@leaves_files_open
def test_columns_of_a_set_of_hugging_face_may_have_names_of_their_own(tmp_path, monkeypatch, one_line):
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr('datasets.config.HF_CACHE_HOME', tmp_path / 'cache')
    names, kind, pictures = datasets.ClassLabel(names=['a', 'b']), datasets.Image(), [Image.new('RGB', (8, 8))] * 4

    def opened(place, columns, kinds):
        (tmp_path / place).mkdir()
        (tmp_path / 'cache').mkdir(exist_ok=True)
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
        table.to_parquet(tmp_path / place / 'train.parquet')
        return open_images(f'hfds/{tmp_path / place}', input=RGB, data_dir=str(tmp_path / 'cache'))

    source = opened('cifar', {'img': pictures, 'label': [0, 1, 1, 0]}, {'img': kind, 'label': names})
    assert [len(read(source)[0]), source.class_names, source.labels.tolist()] == [4, ('a', 'b'), [0, 1, 1, 0]]
    fine = {'img': pictures, 'fine': [0, 1, 1, 0], 'coarse': [0, 0, 0, 1]}
    with pytest.warns(PudNetWarning, match=r'taken as unlabelled: of its columns \(img, fine, coarse\)'):
        assert not opened('two', fine, {'img': kind, 'fine': names, 'coarse': names}).labelled
    with pytest.raises(InputError) as error:
        opened('pairs', {'left': pictures, 'right': pictures}, {'left': kind, 'right': kind})
    one_line(error, 'not one alone of its columns (left, right) holds images')


@leaves_files_open
def test_a_broken_image_of_timm_s_dataset_does_not_lend_its_label_to_the_next_one(folder):
    """timm itself gives the next image, and its label, in its place."""
    first = sorted((folder / 'cat').iterdir())[0]
    first.write_bytes(first.read_bytes()[:40])
    data = timm.data.create_dataset('', root=str(folder))
    source = open_images(data, input=RGB)
    with pytest.warns(PudNetWarning, match='skipped 1 of'):
        images, labels = read(source)
    assert labels.tolist() == [0, 1, 1, 1]
    assert len(source.skipped) == 1
    part = open_images(Subset(data, [1, 0, 3]), input=RGB)
    with pytest.warns(PudNetWarning, match='skipped 1 of'):
        assert read(part)[1].tolist() == [0, 1]
    same(read(part)[0], images[[0, 2]])
    with pytest.raises(InputError, match='cannot be read'):
        read(open_images(data, input=RGB, strict=True))


class Named(timm.data.ImageDataset):
    """A user's, which reads as timm does."""


@leaves_files_open
def test_nor_does_it_in_a_subclass_or_among_several(folder):
    first = sorted((folder / 'cat').iterdir())[0]
    first.write_bytes(first.read_bytes()[:40])
    data = Named(str(folder))
    joined = ConcatDataset([data, data])
    with pytest.warns(PudNetWarning, match='skipped 1 of 5'):
        assert read(open_images(data, input=RGB))[1].tolist() == [0, 1, 1, 1]
    with pytest.warns(PudNetWarning, match='skipped 2 of 10'):
        assert read(open_images(joined, input=RGB), 3)[1].tolist() == 2 * [0, 1, 1, 1]
    with pytest.warns(PudNetWarning, match='skipped 2 of 10'):
        assert read(open_images(joined, range(10), input=RGB))[1].tolist() == [1, 2, 3, 4, 6, 7, 8, 9]
    part = Subset(ConcatDataset([data, Subset(data, [0, 4, 1])]), [-1, 0, 5, 6])
    with pytest.warns(PudNetWarning, match='skipped 2 of 4'):
        assert read(open_images(part, input=RGB))[1].tolist() == [0, 1]
    for other in (data, joined):
        with pytest.raises(InputError, match='cannot be read'):
            read(open_images(other, input=RGB, strict=True))


@leaves_files_open
def test_several_torchvision_datasets_skip_what_one_skips(folder):
    sorted((folder / 'dog').iterdir())[0].write_bytes(b'P6\n')  # a ValueError
    data = torchvision.datasets.ImageFolder(str(folder))
    with pytest.warns(PudNetWarning, match='skipped 2 of 10'):
        assert read(open_images(ConcatDataset([data, data]), input=RGB))[1].tolist() == 2 * [0, 0, 1, 1]


@leaves_files_open
def test_behind_a_loader_it_would_so_that_strict_and_labels_are_refused(folder, one_line):
    plain = timm.data.ImageDataset(str(folder), transform=torchvision.transforms.ToTensor())
    for data in (plain, Named(str(folder)), Subset(plain, range(5)), ConcatDataset([Pairs([]), plain])):
        for options, name in (({'strict': True}, 'strict'), ({'labels': range(5)}, 'labels=...')):
            with pytest.raises(InputError) as error:
                open_images(DataLoader(data), input=RGB, **options)
            one_line(error, 'the next image', f'for {name} pass the dataset itself')
    assert len(read(open_images(DataLoader(plain, 1), input=RGB))[1]) == 5
    source = open_images(DataLoader(TensorDataset(torch.rand(2, 3, 8, 8))), [1, 0], input=RGB, strict=True)
    assert read(source)[1].tolist() == [1, 0]


def png_with_a_broken_chunk():
    """PIL opens it, and raises a SyntaxError when it decodes it."""
    rows = zlib.compress(b''.join(b'\0' + row.tobytes() for row in noise(64, 64, 3)))
    header = struct.pack('>IIBBBBB', 64, 64, 8, 2, 0, 0, 0)
    return png([(b'IHDR', header), (b'IDAT', rows[:3000]), (b'\0\1\2\3', rows[3000:]), (b'IEND', b'')])


@leaves_files_open
@pytest.mark.parametrize('kind', ['timm', 'torchvision', 'timm, transformed', 'torchvision, transformed'])
def test_whatever_is_wrong_with_an_image_of_a_dataset_it_is_skipped(kind, folder):
    first, second = sorted((folder / 'cat').iterdir())[:2]
    third = sorted((folder / 'dog').iterdir())[0]
    first.write_bytes(png_with_a_broken_chunk())
    second.write_bytes(bomb(60_000))
    third.write_bytes(b'P6\n')  # a ValueError
    made = {
        'timm': lambda: timm.data.create_dataset('', root=str(folder)),
        'torchvision': lambda: torchvision.datasets.ImageFolder(str(folder)),
        'timm, transformed': lambda: timm.data.ImageDataset(str(folder), transform=torchvision.transforms.ToTensor()),
        'torchvision, transformed': lambda: torchvision.datasets.ImageFolder(
            str(folder), transform=torchvision.transforms.ToTensor()
        ),
    }
    source = open_images(made[kind](), input=RGB)
    with pytest.warns(PudNetWarning, match='skipped 3 of'):
        _, labels = read(source)
    assert len(labels) == len(source) - 3
    assert len(source.skipped) == 3


def test_an_error_in_a_dataset_of_the_user_s_own_is_not_taken_for_a_damaged_image():
    class Mine(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise ValueError('mine')

    with pytest.raises(ValueError, match='mine'):
        open_images(Mine(), input=RGB)


@leaves_files_open
@pytest.mark.parametrize('kind', ['timm', 'torchvision'])
def test_nor_is_one_in_a_transform_of_the_user_s_own(kind, folder):
    def mine(image):
        raise ValueError('mine')

    made = {
        'timm': lambda: timm.data.ImageDataset(str(folder), transform=mine),
        'torchvision': lambda: torchvision.datasets.ImageFolder(str(folder), transform=mine),
    }
    with pytest.raises(ValueError, match='mine'):
        read(open_images(made[kind](), input=RGB))


def test_some_images_without_a_label_among_named_classes_are_an_error():
    data = TensorDataset(torch.rand(3, 3, 8, 8), torch.tensor([0, 1, -1]))
    data.targets, data.classes = [0, 1, -1], ['cat', 'dog']
    with pytest.raises(InputError, match='label -1 among those of 2 classes'):
        open_images(data, input=RGB)
    assert open_images(Subset(data, [0, 1]), input=RGB).class_names == ('cat', 'dog')
    data.classes = None
    data.targets = [1, 1, -1]  # classes of that number
    assert open_images(data, input=RGB).class_names == ('-1', '1')


def test_a_dataset_whose_targets_are_all_minus_one_has_no_labels():
    def made(targets):
        data = TensorDataset(torch.rand(3, 3, 8, 8), torch.tensor(targets))
        data.targets = targets
        return data

    assert not open_images(made([-1, -1, -1]), input=RGB).labelled
    assert open_images(made([2, 1, 1]), input=RGB).labels.tolist() == [1, 0, 0]


def test_a_subset_without_images_is_said_to_be_empty():
    data = TensorDataset(torch.rand(3, 3, 8, 8), torch.tensor([0, 1, 1]))
    data.targets, data.classes = [0, 1, 1], ['cat', 'dog']
    for empty in (Subset(data, []), DataLoader(Subset(data, []), 2)):
        with pytest.raises(InputError, match='no images'):
            open_images(empty, input=RGB)


def stack(items):
    return torch.stack([torch.from_numpy(np.array(image)) for image, _ in items]), [label for _, label in items]


def test_loaders_are_peeked_at_without_losing_a_batch():
    pixels, labels = torch.from_numpy(noise(7, 3, 16, 16)), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    want = read(open_images(pixels, input=RGB))[0]
    loader = DataLoader(TensorDataset(pixels, labels), batch_size=3)
    source = open_images(loader, input=RGB)
    assert (source.labelled, source.labels, len(source)) == (True, None, 7)
    for _ in range(2):
        x, y = read(source)
        same(x, want)
        assert y.tolist() == labels.tolist()
    assert read(open_images(DataLoader(TensorDataset(pixels), batch_size=3), input=RGB))[1] is None
    assert len(open_images(DataLoader(TensorDataset(pixels), batch_size=3, drop_last=True), input=RGB)) == 6
    unbatched = open_images(DataLoader(TensorDataset(pixels, labels), batch_size=None), input=RGB)
    same(read(unbatched, 4)[0], want)
    streamed = open_images(DataLoader(Stream(list(pixels)), batch_size=2), input=RGB)
    same(read(streamed, 4)[0], want)
    with pytest.raises(TypeError):
        len(streamed)


@leaves_files_open
def test_timm_s_loader_is_refused_before_it_is_read(folder, one_line):
    options = {'input_size': (3, 16, 16), 'batch_size': 2, 'num_workers': 0, 'device': torch.device('cpu')}
    loader = timm.data.create_loader(timm.data.ImageDataset(str(folder)), **options)
    with pytest.raises(InputError) as error:
        open_images(loader, input=RGB)
    one_line(error, 'PrefetchLoader', 'pass the Dataset', 'use_prefetcher=False, mean=(0, 0, 0), std=(1, 1, 1)')
    options |= {'use_prefetcher': False, 'mean': (0, 0, 0), 'std': (1, 1, 1)}
    loader = timm.data.create_loader(timm.data.ImageDataset(str(folder)), **options)
    assert read(open_images(loader, input=RGB))[1].tolist() == [0, 0, 1, 1, 1]


def test_a_stream_that_runs_dry_is_an_error():
    source = open_images(OnceOnly(noise(3, 8, 8)), input=RGB)
    assert len(read(source)[0]) == 3
    with pytest.raises(InputError, match='possible to read it again'):
        read(source)


class OnceOnly(IterableDataset):
    def __init__(self, items):
        self.items = iter(items)

    def __iter__(self):
        return self.items


@pytest.mark.parametrize(
    ('images', 'message'),
    [
        (Pairs([]), 'empty'),
        (Stream([]), 'empty'),
        (DataLoader([]), 'empty'),
        (Pairs([{'image': 0}]), r'must give an image or \(image, label\), not a dict'),
        (DataLoader([{'image': 0}]), r'must give a tensor or \(tensor, labels\), not a dict'),
        (Pairs([(noise(8, 8), 'cat')]), 'labels must be one int'),
        (Dataset(), 'has no length'),
        (DataLoader(TensorDataset(torch.zeros(4, 1, 8, 8), torch.zeros(4, 3).long())), 'labels must be one int'),
    ],
)
def test_wrong_datasets(images, message):
    with pytest.raises(InputError, match=message):
        open_images(images, input=RGB)


def test_a_negative_label_amid_others_is_an_error():
    with pytest.raises(InputError, match='label -1 among others'):
        read(open_images(Pairs([(noise(8, 8), 0), (noise(8, 8), -1)]), input=RGB))


@pytest.mark.parametrize(
    'kind',
    [
        Pairs,
        lambda items: DataLoader(TensorDataset(torch.zeros(3, 3, 8, 8), torch.tensor([label for _, label in items]))),
    ],
)
def test_a_first_image_without_a_label_does_not_hide_those_of_the_others(kind):
    source = open_images(kind([(noise(8, 8), -1), (noise(8, 8), -1), (noise(8, 8), 2)]), input=RGB)
    with pytest.raises(InputError, match='label -1 among others'):
        read(source)
    assert read(open_images(kind(3 * [(noise(8, 8), -1)]), input=RGB))[1] is None


def test_names_of_classes_come_in_many_forms():
    items = [(noise(8, 8), 0), (noise(8, 8), 1)]
    for classes, names in {
        'list': (['cat', 'dog'], ('cat', 'dog')),
        'array': (np.array(['cat', 'dog']), ('cat', 'dog')),
        'all words for a class': ([('cat', 'kitty'), ('dog',)], ('cat, kitty', 'dog')),
        'by name': ({'dog': 1, 'cat': 0}, ('cat', 'dog')),
        'by number': ({1: 'dog', 0: 'cat'}, ('cat', 'dog')),
        'their number': (2, None),
        'numbers': (torch.tensor([5, 7]), ('5', '7')),
        'none': ([], None),
    }.values():
        data = Pairs(items)
        data.classes = classes
        assert open_images(data, input=RGB).class_names == names, classes


@pytest.mark.parametrize('name', ['targets', 'labels', '_labels'])
def test_labels_that_a_dataset_knows_are_numbered_without_gaps(name):
    data = Pairs([(noise(8, 8), 3), (noise(8, 8), 7), (noise(8, 8), 3)])
    setattr(data, name, [3, 7, 3])
    source = open_images(data, input=RGB)
    assert read(source)[1].tolist() == [0, 1, 0]
    assert source.class_names == ('3', '7')


def test_an_array_of_paths_is_a_list_of_them_and_a_tilde_is_home(folder, monkeypatch):
    paths = sorted(str(path) for path in (folder / 'cat').iterdir())
    assert len(read(open_images(np.array(paths), input=RGB))[0]) == len(paths)
    monkeypatch.setenv('HOME', str(folder.parent))
    assert open_images(f'~/{folder.name}', input=RGB).class_names == ('cat', 'dog')


@leaves_files_open
def test_a_table_is_no_set_of_images_and_its_column_of_classes_may_have_another_name(folder, tmp_path, monkeypatch):
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr('datasets.config.HF_CACHE_HOME', tmp_path)
    table = datasets.load_dataset(str(folder), split='train', cache_dir=str(tmp_path))
    with pytest.raises(InputError, match='is a table'):
        open_images(table, input=RGB)
    paths = sorted(folder.rglob('*.png'))
    same(read(open_images(table['image'], table['label'], input=RGB))[0], read(open_images(paths, input=RGB))[0])
    with pytest.raises(InputError, match=r'data_dir is where the package datasets keeps .* holds images'):
        open_images('hfds/imagefolder', input=RGB, data_dir=folder)
    (tmp_path / 'set').mkdir()
    table.rename_column('label', 'labels').to_parquet(tmp_path / 'set' / 'train.parquet')
    source = open_images(f'hfds/{tmp_path / "set"}', input=RGB, split='train', data_dir=str(tmp_path))
    assert read(source)[1].tolist() == [0, 0, 1, 1, 1]
    assert source.class_names == ('cat', 'dog')


class Column(Sequence):
    """As that of the package datasets: it decodes an image when it is asked for it."""

    def __init__(self, items):
        self.items, self.asked = items, []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.asked.append(index)
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item


def test_a_column_of_images_is_decoded_as_it_is_read():
    pictures = [Image.fromarray(image) for image in noise(5, 18, 16, 3)]
    column = Column([OSError('image file is truncated'), *pictures])
    source = open_images(column, [0, 1, 0, 1, 0, 1], input=RGB)
    assert set(column.asked) == {0}, 'not the whole column before the first batch'
    with pytest.warns(PudNetWarning, match=r'skipped 1 of 6 images .*: image 0 \(truncated\)'):
        batches = list(source.batches(2))
    assert [len(x) for x, _ in batches] == [1, 2, 2]
    same(torch.cat([x for x, _ in batches]), expect(pictures))
    assert torch.cat([y for _, y in batches]).tolist() == [1, 0, 1, 0, 1]
    same(read(source.subset([3, 1]))[0], expect([pictures[2], pictures[0]]))
    with pytest.raises(InputError, match=r'image 0: cannot be read \(truncated\)'):
        read(open_images(column, input=RGB, strict=True))
    with pytest.raises(InputError, match=r'images\[1\] is a NoneType, not a path, image'):
        read(open_images(Column([pictures[0], None]), input=RGB))
    for wrong, message in ((range(3), r'images\[0\] is a int'), (Column([]), 'no images: list is empty')):
        with pytest.raises(InputError, match=message):
            open_images(wrong, input=RGB)


def test_a_column_of_paths_names_its_files(folder):
    paths = [str(folder / 'gone.png'), *sorted(str(path) for path in folder.rglob('*.png'))]
    with pytest.warns(PudNetWarning, match=r'skipped 1 of 6 images .*gone\.png'):
        read(open_images(Column(paths), input=RGB))


@leaves_files_open
def test_a_broken_image_in_a_column_of_hugging_face_is_skipped(folder):
    datasets = pytest.importorskip('datasets')
    paths = sorted(folder.rglob('*.png'))
    paths[1].write_bytes(paths[1].read_bytes()[:40])
    table = datasets.Dataset.from_dict({'image': list(map(str, paths)), 'label': [0, 0, 1, 1, 1]})
    table = table.cast_column('image', datasets.Image())
    source = open_images(table['image'], table['label'], input=RGB)
    with pytest.warns(PudNetWarning, match='skipped 1 of 5'):
        x, y = read(source)
    assert y.tolist() == [0, 1, 1, 1]
    same(x, read(open_images([paths[0], *paths[2:]], input=RGB))[0])


def test_an_item_that_cannot_be_read_is_skipped():
    items = [OSError('image file is truncated'), (noise(8, 8), 1), (noise(8, 8), 0)]
    source = open_images(Pairs(items), input=RGB)
    with pytest.warns(PudNetWarning, match=r'skipped 1 of 3 images .*: image 0 \(truncated\)'):
        assert read(source)[1].tolist() == [1, 0]


# Subsets


def test_subset_keeps_numbers_names_and_order(folder):
    pixels, labels = noise(5, 16, 16, 3), [0, 1, 2, 0, 1]
    listed = [Image.fromarray(image) for image in pixels]
    want = expect(listed)
    for images in (pixels, torch.from_numpy(pixels).permute(0, 3, 1, 2), listed, Pairs(list(pixels))):
        source = open_images(images, labels, input=RGB)
        part = source.subset(torch.tensor([4, 2, 2, 0])).subset([0, 1, 3])
        x, y = read(part, 2)
        same(x, want[[4, 2, 0]])
        assert y.tolist() == part.labels.tolist() == [1, 2, 0]
        assert (len(part), len(source)) == (3, 5)
    part = open_images(folder, input=RGB).subset(np.array([4]))
    assert part.labels.tolist() == [1]
    assert part.class_names == ('cat', 'dog')
    assert part.description == f'1 image in 1 class in {folder}'


def test_subset_errors():
    source = open_images(noise(5, 8, 8), input=RGB)
    for indices in ([5], [-1], [], [0.5], 3, [[0]], [True, False]):
        with pytest.raises(InputError, match='subset'):
            source.subset(indices)
    with pytest.raises(InputError, match='only be read in order'):
        open_images(Stream(list(noise(5, 8, 8))), input=RGB).subset([0])


# Things that cannot be read


@pytest.fixture
def damaged(folder):
    good = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(good, 'JPEG')
    (folder / 'cat' / 'truncated.jpg').write_bytes(good.getvalue()[:-500])
    (folder / 'cat' / 'zero.png').write_bytes(b'')
    (folder / 'cat' / 'text.png').write_text('no image')
    (folder / 'dog' / 'bomb-warning.png').write_bytes(bomb(12000))
    (folder / 'dog' / 'bomb-error.png').write_bytes(bomb(60000))
    (folder / 'dog' / 'gone.png').symlink_to(folder / 'nowhere')
    (folder / 'dog' / 'script.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n')
    return folder


REASONS = {
    'truncated.jpg': 'truncated',
    'zero.png': 'empty or not an image',
    'text.png': 'empty or not an image',
    'script.png': 'empty or not an image',
    'bomb-warning.png': f'more than {Image.MAX_IMAGE_PIXELS:,} pixels',
    'bomb-error.png': f'more than {Image.MAX_IMAGE_PIXELS:,} pixels',
    'gone.png': 'no such file or directory',
}


@pytest.mark.parametrize('action', ['ignore', 'default', 'error'])
def test_damaged_files_are_skipped_and_named_once(damaged, action):
    source = open_images(damaged, input=RGB)
    assert len(source) == 12
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)
        warnings.simplefilter('always', PudNetWarning)
        x, y = read(source, 2)
        again, _ = read(source, 5)
    assert [warning.category for warning in caught] == [PudNetWarning]
    assert caught[0].filename == __file__
    text = str(caught[0].message)
    assert text.startswith('skipped 7 of 12 images that could not be read: cat/text.png (empty or not an image), ')
    assert text.endswith(', ...')
    assert text.count('(') == 3
    assert {os.path.basename(name): reason for name, reason in source.skipped} == REASONS
    assert len(source.skipped) == 7
    assert y.tolist() == [0, 0, 1, 1, 1]
    paths = [damaged / 'cat' / f'{i}.png' for i in range(2)] + [damaged / 'dog' / f'{i}.png' for i in range(3)]
    same(x, expect([Image.open(path) for path in paths]))
    same(again, x)
    read(source.subset(range(12)))  # does not repeat the warning


def test_another_thread_is_heard_while_images_are_decoded(folder, monkeypatch):
    original = images_room.Preprocess.any_image

    def decode(*arguments):
        other = threading.Thread(target=warnings.warn, args=('ours', PudNetWarning))
        other.start()
        other.join()
        return original(*arguments)

    monkeypatch.setattr(images_room.Preprocess, 'any_image', decode)
    with pytest.warns(PudNetWarning, match='ours'):
        read(open_images(folder, input=RGB))


def count_decoded(monkeypatch):
    """Counts images decoded from here on."""
    counted = []
    original = images_room.Preprocess.any_image
    monkeypatch.setattr(
        images_room.Preprocess,
        'any_image',
        lambda self, image, name: (counted.append(name), original(self, image, name))[1],
    )
    return counted


@pytest.mark.parametrize('batch_size', [2, 3, 256])
def test_kept_images_are_decoded_once_and_come_again_to_the_bit(damaged, monkeypatch, batch_size):
    source, again = open_images(damaged, input=RGB), open_images(damaged, input=RGB)
    with pytest.warns(PudNetWarning, match='skipped'):
        expected, labels = read(again)
    decoded = count_decoded(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', PudNetWarning)
        passed = [(x.clone(), y) for x, y in source.batches(batch_size, keep=True)]
    assert len(decoded) == len(again)
    for _ in range(2):
        found, found_labels = read(source, batch_size)
        same(found, expected)
        same(found, torch.cat([x for x, _ in passed]))
        assert found_labels.tolist() == labels.tolist()
        assert source.skipped == again.skipped != []
    first = source.batches(2)
    next(first)
    read(source)  # passes do not disturb each other
    same(torch.cat([x for x, _ in first]), expected[2:])
    for _, found_labels in source.batches():
        found_labels += 5  # noqa: PLW2901
    assert read(source)[1].tolist() == labels.tolist()
    assert len(decoded) == len(again)
    assert len(pickle.loads(pickle.dumps(source))) == len(source)
    subset = source.subset([1, 0])
    assert len(read(subset)[0]) <= 2
    assert len(decoded) > len(again)


@pytest.mark.parametrize('trouble', ['a small limit', 'half of a disk', 'a full disk', 'no temporary folder'])
def test_images_that_cannot_be_kept_are_decoded_again(folder, monkeypatch, trouble):
    source = open_images(folder, input=RGB)
    expected, _ = read(source)
    if trouble == 'a small limit':
        monkeypatch.setattr(images_room, '_MOST_KEPT', 1000)
    elif trouble == 'half of a disk':
        usage = SimpleNamespace(free=2 * expected.numel() - 2)  # one byte a value
        monkeypatch.setattr(images_room.shutil, 'disk_usage', lambda _: usage)
    elif trouble == 'a full disk':
        full = open('/dev/full', 'w+b', 0)  # noqa: SIM115
        monkeypatch.setattr(images_room.tempfile, 'TemporaryFile', lambda **_: full)
    else:

        def nowhere(**_):
            raise FileNotFoundError(2, 'No usable temporary directory found')

        monkeypatch.setattr(images_room.tempfile, 'TemporaryFile', nowhere)
    decoded = count_decoded(monkeypatch)
    same(torch.cat([x for x, _ in source.batches(2, keep=True)]), expected)
    same(read(source)[0], expected)
    assert len(decoded) == 2 * len(source)
    if trouble == 'half of a disk':
        usage.free += 2
        fits = open_images(folder, input=RGB)
        assert len([*fits.batches(2, keep=True), *fits.batches(2)]) == 2 * -(-len(fits) // 2)
        assert len(decoded) == 3 * len(source)


def test_a_stream_that_outgrows_the_room_is_read_again(monkeypatch):
    monkeypatch.setattr(images_room, '_MOST_KEPT', 3 * 768)  # it has seven images, which is not known before
    asked = []

    class Counted(Dataset):
        def __len__(self):
            return 7

        def __getitem__(self, index):
            asked.append(index)
            return torch.full((3, 16, 16), index, dtype=torch.uint8)

    source = open_images(DataLoader(Counted(), batch_size=2), input=RGB)
    first = torch.cat([x for x, _ in source.batches(2, keep=True)])
    before = len(asked)
    same(read(source)[0], first)
    assert len(asked) == before + 7


def test_a_stream_that_was_kept_can_be_read_again():
    source = open_images(OnceOnly(noise(3, 8, 8)), input=RGB)
    first = torch.cat([x for x, _ in source.batches(2, keep=True)])
    same(read(source)[0], first)


def test_strict_raises_at_once(damaged):
    source = open_images(damaged, input=RGB, strict=True)
    with pytest.raises(InputError, match=r'cat/text.png: cannot be read \(empty or not an image\)'):
        read(source)


def test_nothing_readable_is_an_error(tmp_path):
    paths = [tmp_path / 'gone.png', tmp_path]
    with pytest.raises(InputError, match=r'none of the 2 images .*gone.png \(no such file or directory\), '):
        read(open_images(paths, input=RGB))


def test_slivers_do_not_fill_the_memory():
    sliver = noise(1, 200_000)
    config = InputConfig(input_size=(3, 224, 224))
    source = open_images([Image.fromarray(sliver), Image.fromarray(noise(8, 8))], input=config)
    with pytest.warns(PudNetWarning, match=r'image 0 \(200000 x 1 pixels are too long'):
        assert len(read(source)[0]) == 1
    for mode in ('center', 'border'):
        config = InputConfig(input_size=(3, 224, 224), crop_mode=mode)
        with pytest.raises(InputError, match='too long'):
            read(open_images(sliver[None], input=config))
        with pytest.raises(InputError, match='too long'):
            read(open_images(sliver[None] / 255, input=config))


@pytest.mark.parametrize(
    ('images', 'message'),
    [
        (np.zeros((0, 8, 8, 3), np.uint8), 'no images: array is empty'),
        (np.zeros(0), 'no images: array is empty'),
        (torch.zeros(0, 3, 8, 8), 'no images: tensor is empty'),
        ([], 'no images: list is empty'),
        (noise(8, 8, 3), 'is that of one image'),
        (noise(8, 8), 'is that of one image'),
        (torch.zeros(3, 8, 8), 'is that of one image'),
        (np.uint8(3), 'cannot be read; pass a folder'),
        (noise(4, 3, 8, 8), r'shape \(3, 8, 8\) of one image; arrays are \(h, w, c\)'),
        (torch.zeros(4, 8, 8, 3), r'shape \(8, 8, 3\) of one image'),
        (noise(4, 8, 8, 2), 'with 1, 3 or 4 channels'),
        (noise(4, 0, 8, 3), 'shape'),
        (noise(2, 4, 8, 8, 3), 'shape'),
        (noise(4, 8, 8).astype(np.int64), r"pixels of type int64; pass uint8 in 0-255, \.astype\('uint8'\)"),
        (torch.zeros(4, 8, 8, dtype=torch.int32), r'type int32; pass uint8 in 0-255, \.to\(torch\.uint8\)'),
        (noise(4, 8, 8).astype(object), 'type object'),
        (noise(4, 8, 8).astype(np.float32), r'values up to 255: divide by 255 or pass uint8'),
        (noise(4, 8, 8) / 255 - 0.5, r'down to -0\.5 look already normalised: pass pixels in 0-1; mean and std'),
        (np.stack([np.zeros((8, 8)), np.full((8, 8), np.nan)]), 'image 1 has pixels that are NaN'),
        ([np.zeros((8, 8)), np.full((8, 8), np.inf)], 'image 1 has pixels that are NaN'),
        ([noise(8, 8), 3], r'images\[1\] is a int'),
        ([(noise(8, 8), 0)], r'images\[0\] is a tuple'),
        (Image.new('L', (8, 8)), 'one PIL image: pass a list'),
        (None, 'a NoneType cannot be read; pass a folder'),
        ({'a': 1}, 'a dict cannot be read'),
        (iter([1]), 'cannot be read'),
    ],
)
def test_wrong_images(images, message):
    with pytest.raises(InputError, match=message) as caught:
        read(open_images(images, input=RGB))
    assert '\n' not in str(caught.value)


def test_the_image_with_nan_is_named_in_any_batch():
    pixels = np.zeros((7, 8, 8))
    pixels[5, 2, 2] = np.nan
    with pytest.raises(InputError, match='image 5 has'):
        read(open_images(pixels, input=RGB), 2)
    with pytest.raises(InputError, match='image 5 has'):
        read(open_images(DataLoader(list(pixels[..., None].transpose(0, 3, 1, 2)), 2), input=RGB), 2)


def test_floats_within_the_tolerance_pass():
    x, _ = read(open_images(np.array([-0.0005, 1.0005]).repeat(64).reshape(2, 8, 8), input=RGB))
    assert x.isfinite().all()


def test_wrong_batch_size():
    with pytest.raises(InputError, match='batch_size'):
        list(open_images(noise(2, 8, 8), input=RGB).batches(0))


def test_global_state_is_left_alone(damaged):
    before = warnings.filters[:], Image.MAX_IMAGE_PIXELS, torch.get_rng_state(), np.random.get_state()[1].copy()
    with pytest.warns(PudNetWarning):
        read(open_images(damaged, input=RGB))
    assert warnings.filters[:] == before[0]
    assert before[1] == Image.MAX_IMAGE_PIXELS
    same(torch.get_rng_state(), before[2])
    np.testing.assert_array_equal(np.random.get_state()[1], before[3])


def test_240_small_files_are_read_fast(tmp_path):
    for index in range(240):
        save(tmp_path / f'{index}.png', noise(28, 28, seed=index))
    config = InputConfig(input_size=(1, 28, 28), mean=(0.5,), std=(0.5,))

    def seconds(work):
        times = []
        for _ in range(5):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
        return min(times)

    def plain():
        for path in sorted(tmp_path.iterdir()):
            with Image.open(path) as image:
                np.asarray(image.convert('L'))

    assert seconds(lambda: read(open_images(tmp_path, input=config))) < 6 * seconds(plain)


@pytest.mark.parametrize('small', [0.0, 1.0])
def test_images_are_the_same_whether_threads_read_them_or_not(tmp_path, monkeypatch, small):
    monkeypatch.setattr(images_room, '_SMALL', small)
    monkeypatch.setattr(images_room, '_CORES', 4)
    pixels = noise(100, 20, 24)
    for index, image in enumerate(pixels):
        save(tmp_path / f'{index:03}.png', image)
    (tmp_path / '050.png').write_bytes(b'no image')
    config = InputConfig(input_size=(1, 20, 24), mean=(0.0,), std=(1.0,))
    source = open_images(tmp_path, input=config)
    with pytest.warns(PudNetWarning, match=r'skipped 1 of 100'):
        found = torch.cat([images for images, _ in source.batches(64)])
    expected = torch.from_numpy(np.delete(pixels, 50, 0)).reshape(99, 1, 20, 24) / 255
    assert_close(found, expected)


# timm's names


@pytest.fixture
def fashion(tmp_path):
    raw = tmp_path / 'FashionMNIST' / 'raw'
    raw.mkdir(parents=True)
    pixels, labels = noise(6, 28, 28), np.array([9, 0, 3, 3, 0, 9], dtype=np.uint8)
    for part in ('train', 't10k'):
        with open(raw / f'{part}-images-idx3-ubyte', 'wb') as file:
            file.write(struct.pack('>IIII', 0x803, 6, 28, 28) + pixels.tobytes())
        with open(raw / f'{part}-labels-idx1-ubyte', 'wb') as file:
            file.write(struct.pack('>II', 0x801, 6) + labels.tobytes())
    return tmp_path, pixels


def test_a_torch_dataset_by_name(fashion):
    root, pixels = fashion
    source = open_images('torch/fashion_mnist', input=RGB, data_dir=root)
    x, y = read(source)
    same(x, expect([Image.fromarray(image) for image in pixels]))
    assert source.class_names == ('T-shirt/top', 'Dress', 'Ankle boot')
    assert y.tolist() == source.labels.tolist() == [2, 0, 1, 1, 0, 2]
    assert source.description == '6 images in 3 classes (torch/fashion_mnist)'
    assert len(open_images('torch/fashion_mnist', input=RGB, data_dir=str(root), split='test')) == 6


def test_names_that_timm_cannot_open(fashion, monkeypatch, tmp_path):
    root, _ = fashion
    with pytest.raises(InputError, match=r'torch/cifar10: .*data_dir=\.\.\.'):
        open_images('torch/cifar10', input=RGB)
    with pytest.raises(NotFoundError, match=r'data_dir .*gone: no such folder; nothing is downloaded'):
        open_images('torch/cifar10', input=RGB, data_dir=root / 'gone')
    with pytest.raises(NotFoundError, match=r'torch/cifar10: not in data_dir=.*nothing is downloaded'):
        open_images('torch/cifar10', input=RGB, data_dir=root)
    with pytest.raises(InputError, match='Unknown torchvision dataset'):
        open_images('torch/nonsense', input=RGB, data_dir=root)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    for name, package in (('hfds/x', 'datasets'), ('wds/x', 'webdataset'), ('tfds/x', 'tensorflow-datasets')):
        with pytest.raises(InputError, match=f'{name}: needs the package {package}: pip install {package}'):
            open_images(name, input=RGB, data_dir=root)
    monkeypatch.chdir(tmp_path)
    save(tmp_path / 'torch' / 'mine' / 'x.png', noise(8, 8))
    assert len(open_images('torch/mine', input=RGB)) == 1  # a folder of that name goes first


@leaves_files_open
def test_a_web_dataset(tmp_path, write_web_dataset):
    pytest.importorskip('webdataset')
    pixels = noise(3, 16, 16, 3)
    write_web_dataset(tmp_path, pixels, [0, 1, 0])
    source = open_images('wds/mine', input=RGB, data_dir=tmp_path)
    for _ in range(2):
        x, y = read(source, 2)
        same(x, expect([Image.fromarray(image) for image in pixels]))
        assert y.tolist() == [0, 1, 0]
    with pytest.raises(InputError, match=r'wds/mine: timm leaves out .* leave out strict'):
        open_images('wds/mine', input=RGB, data_dir=tmp_path, strict=True)


@leaves_files_open
def test_of_a_web_dataset_without_labels_timm_gives_nothing(tmp_path, write_web_dataset, one_line):
    pytest.importorskip('webdataset')
    write_web_dataset(tmp_path, noise(2, 16, 16, 3), [0, 1])
    with tarfile.open(tmp_path / 'train.tar', 'w') as tar:
        tar.add(save(tmp_path / '0.png', noise(16, 16, 3)), '0.png')
    with pytest.raises(InputError) as error:
        open_images('wds/rest', input=RGB, data_dir=tmp_path, with_labels=False)
    one_line(error, 'no images: wds/rest is empty', 'no .cls: timm leaves those out')


@leaves_files_open
def test_what_timm_raises_of_a_set_of_hugging_face_is_one_line(folder, tmp_path, monkeypatch, one_line):
    pytest.importorskip('datasets')
    monkeypatch.setattr('datasets.config.HF_CACHE_HOME', tmp_path)
    flat = folder / 'dog'
    counts = '{name: train, num_examples: 3, num_bytes: 9}'
    (flat / 'README.md').write_text(f'---\ndataset_info:\n  splits:\n  - {counts}\n---\n')
    with pytest.raises(InputError) as error:
        open_images(f'hfids/{flat}', input=RGB, data_dir=tmp_path, with_labels=False)
    one_line(error, "timm cannot read its first image (KeyError: 'label')", 'hfds/... does without')
    with pytest.raises(InputError, match="cannot be opened for split 'trian'") as error:
        open_images(f'hfds/{flat}', input=RGB, data_dir=tmp_path, split='trian')
    assert 'downloaded' not in str(error.value)


def test_an_error_in_a_stream_of_the_user_s_own_stays_his():
    def mine():
        raise KeyError('mine')
        yield

    with pytest.raises(KeyError, match='mine'):
        open_images(Stream(mine()), input=RGB)


def test_images_that_were_opened_are_not_strict_later():
    source = open_images(noise(2, 8, 8, 3), input=RGB)
    with pytest.raises(InputError, match='opened already, without strict'):
        open_images(source, input=RGB, strict=True)
    strict = open_images(noise(2, 8, 8, 3), input=RGB, strict=True)
    assert open_images(strict, input=RGB) is strict


def test_images_that_were_opened_keep_their_labels_and_input():
    source = open_images(noise(2, 8, 8, 3), ['a', 'b'], input=RGB)
    assert open_images(source, input=dataclasses.replace(RGB, crop_pct=0.5)) is source
    for changes in ({'mean': (0.1, 0.2, 0.3)}, {'std': (0.1, 0.2, 0.3)}, {'input_size': (3, 8, 8)}):
        with pytest.raises(InputError, match='opened already, with its own labels and input'):
            open_images(source, input=dataclasses.replace(RGB, **changes))
    with pytest.raises(InputError, match='opened already, with its own labels and input'):
        open_images(source, ['b', 'a'], input=RGB)


def test_every_error_is_ours():
    assert all(issubclass(InputError, base) for base in (PudNetError, ValueError))
    assert all(issubclass(NotFoundError, base) for base in (PudNetError, FileNotFoundError))


def test_names_may_hold_figures_that_are_no_decimal_ones():
    source = open_images(torch.zeros(4, 3, 8, 8), ['²', '10', '2', 'm²'], input=RGB)
    assert source.class_names == ('2', '10', 'm²', '²')


@pytest.mark.parametrize('interpolation', ['bicubic', 'lanczos'])
def test_floats_stay_between_black_and_white_when_they_are_resized(interpolation):
    images = torch.zeros(1, 3, 8, 8)
    images[..., 4:] = 1
    plain = InputConfig(input_size=(3, 32, 32), mean=(0.0,) * 3, std=(1.0,) * 3, interpolation=interpolation)
    found = read(open_images(images, input=plain))[0]
    assert (float(found.min()), float(found.max())) == (0.0, 1.0)


def test_a_stream_comes_in_its_order_from_one_worker():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(torch.zeros(4, 3, 8, 8))

    assert [reorders(DataLoader(Stream(), num_workers=workers)) for workers in (0, 1, 2)] == [False, False, True]


def test_sets_of_the_same_classes_are_one_and_those_of_others_are_refused(folder, tmp_path, one_line):
    data = torchvision.datasets.ImageFolder(str(folder))
    both = Subset(ConcatDataset([data, Subset(data, [0, 4])]), [-1, 0, 5])
    source = open_images(both, input=RGB)
    assert source.labels.tolist() == [1, 0, 0]
    assert source.class_names == ('cat', 'dog')
    shutil.copytree(folder / 'cat', tmp_path / 'birds' / 'bird')
    shutil.copytree(folder / 'dog', tmp_path / 'birds' / 'fish')
    mixed = ConcatDataset([data, torchvision.datasets.ImageFolder(str(tmp_path / 'birds'))])
    with pytest.raises(InputError) as error:
        open_images(mixed, input=RGB)
    one_line(error, 'cat', 'bird', 'labels=...')
    assert open_images(mixed, ['cat', 'dog'] * (len(mixed) // 2), input=RGB).class_names == ('cat', 'dog')


class Offset(ConcatDataset):
    """A user's, whose second part has classes of its own."""

    def __getitem__(self, position):
        image, label = super().__getitem__(position)
        return image, label + (2 if position >= self.cumulative_sizes[0] else 0)


def test_a_join_of_a_user_s_own_tells_its_labels_itself(folder):
    data = torchvision.datasets.ImageFolder(str(folder))
    own = Offset([data, data])
    assert read(open_images(own, input=RGB))[1].tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    named = ConcatDataset([data, data])
    named.classes, named.targets = ['a', 'b'], [*data.targets, *data.targets]
    assert open_images(named, input=RGB).class_names == ('a', 'b')
