"""Whatever a caller hands over -> batches of tensors and labels, the same bits as timm's eval transform would give.

Letters: `n` images of the set, `b` of a batch, `c h w` channels, height and width.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import importlib.util
import itertools
import math
import operator
import os
import re
import shutil
import tempfile
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, cast

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from timm.data.dataset import ImageDataset
from timm.data.dataset_factory import create_dataset
from timm.data.loader import PrefetchLoader
from timm.data.transforms import center_crop_or_pad
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
)
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from timm_pudnet.config import (
    InputConfig,
    InputError,
    NotFoundError,
    PudNetError,
    PudNetWarning,
    close_names,
    first_line,
    shown,
)

IMAGE_EXTENSIONS = (
    *('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.avif', '.jfif', '.jpe', '.apng', '.dib'),
    *('.ppm', '.pgm', '.pbm', '.pnm', '.pfm', '.jp2', '.j2k', '.tga', '.ico', '.pcx', '.qoi', '.sgi', '.dds', '.psd'),
)
_OTHER_PICTURES = (  # that PIL cannot read
    *('.heic', '.heif', '.jxl', '.jxr', '.exr', '.hdr', '.raw', '.dng', '.cr2', '.cr3', '.nef', '.arw', '.orf'),
    *('.rw2', '.raf'),
)
# With what follows in the names that some programs give to what they download: 'photo.jpg?w=300'.
_PICTURE = re.compile(rf'({"|".join(map(re.escape, (*IMAGE_EXTENSIONS, *_OTHER_PICTURES)))})([^a-z0-9].*)?', re.DOTALL)
# A file's content decides its format, not its name: without this list PIL would hand an EPS to Ghostscript.
_FORMATS = (
    *('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'AVIF', 'DIB', 'PPM', 'JPEG2000'),
    *('TGA', 'ICO', 'PCX', 'QOI', 'SGI', 'DDS', 'PSD'),
)
_TIMM_PACKAGES = {  # prefix of a timm dataset name: (module, name to install)
    'torch': ('torchvision', 'torchvision'),
    'hfds': ('datasets', 'datasets'),
    'hfids': ('datasets', 'datasets'),
    'wds': ('webdataset', 'webdataset'),
    'tfds': ('tensorflow_datasets', 'tensorflow-datasets'),
}
_SPLIT_NAMES = {
    *('train', 'training', 'val', 'valid', 'validation', 'dev', 'eval', 'evaluation', 'test', 'testing', 'holdout'),
}
# Of which timm gives the test images for whatever is not called train or training.
TRAIN_OR_TEST = {'cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist', 'qmnist'}
_ACCEPTED = (
    'a folder, a list of paths or images, an array [n, h, w, c], a tensor [n, c, h, w], a Dataset, a DataLoader '
    'or a timm dataset name (torch/cifar10)'
)
_FLOAT_TOLERANCE = 1e-3
_DIM = 0.125  # of white: images of more bits whose pixels are all darker lose most of their grey levels
_MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}
# The weights of PIL's convert('L'), whatever torch's defaults are when this is imported.
_LUMA = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float32, device='cpu').view(3, 1, 1)
_quiet_lock = threading.Lock()
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
_PART = 16  # images that a thread decodes at a time
_MOST_KEPT = 4 * 10**9  # bytes of decoded images in a temporary file
_SMALL = 5e-4  # seconds for an image, below which threads only wait for each other


class ImageSource:
    """A set of images that can be read again and again, in batches; made by `open_images`.

    Attributes:
        input: Size, mean, std and resizing that its images are brought to.
        class_names: Name of every class, or None where the data has none.
        description: One line, '240 images in 4 classes in examples/fashion' for instance.
        skipped: `(name, reason)` of the images that the latest pass could not read.
        labels: int64 `[n]` where known before reading, else None.
        labelled: Whether batches carry labels.
        is_stream: Whether images can only be read in order, so that there are no subsets.
        progress: Whether a bar shows passes over the images that take longer than two seconds.
    """

    progress = False

    def __init__(
        self,
        data: Any,
        input: InputConfig,
        *,
        where: str,
        labels: Tensor | None = None,
        class_names: tuple[str, ...] | None = None,
        names: Sequence[str] | None = None,
        strict: bool = False,
        with_labels: bool = True,
        renumber: Mapping[int, int] | None = None,
        declared: Tensor | None = None,
    ) -> None:
        self.labels = labels
        self._declared = declared  # the labels of all items, by the dataset's own list of them
        self._renumber = renumber  # from the labels that come with the images to ours, where they differ
        self.class_names = class_names
        self.skipped: list[tuple[str, str]] = []
        self._data = data
        self.input = input
        self._preprocess = _Preprocess(input)
        self._where = where
        self._names = names
        self._strict = strict
        self._reported: set[tuple[str, str]] = set()  # shared with subsets, so that a bad file is named once
        self._started: tuple[Any, Iterator[Any]] | None = None  # a stream's first item and the rest of that pass
        self._kept: _KeptImages | None = None  # what a full pass decoded
        self._batched = _is_batched(data)
        self.is_stream = isinstance(data, (DataLoader, IterableDataset))
        self._positions = np.arange(0 if self.is_stream else len(data))
        if not self.is_stream and not len(data):
            raise InputError(f'no images: {where} is empty')
        self._without = False  # whether the first item has the label -1, of none
        self.labelled = self._peek(with_labels)
        self.description = self._describe()

    def __len__(self) -> int:
        if not self.is_stream:
            return len(self._positions)
        if self._batched and self._data.batch_size is not None:
            count = len(self._data.sampler)  # TypeError where it wraps an IterableDataset
            return count - count % self._data.batch_size if self._data.drop_last else count
        raise TypeError(f'the number of images of {self._where} is known only after reading them')

    def batches(self, batch_size: int = 256, *, keep: bool = False) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Reads all images once, in order.

        Args:
            batch_size: Most images in a batch; a batch has fewer where images were skipped.
            keep: Later passes read what this one decoded from a temporary file (in `TMPDIR`, else /var/tmp), at most
                4 GB and half of the free disk; where it does not suffice, they decode again.

        Yields:
            Images, float32 `[b, c, h, w]`, normalised by mean and std, and labels, int64 `[b]` or None; on the CPU.

        Raises:
            InputError: Pixels or labels cannot be used, an image cannot be read and `strict` is set, or none can.

        Warns:
            PudNetWarning: Once, after the first full pass, if images were skipped.
        """
        if batch_size < 1:
            raise InputError(f'batch_size must be at least 1, got {batch_size}')
        total = None
        with contextlib.suppress(TypeError):  # a stream's is not known
            total = len(self)
        bar = tqdm(desc='Reading', total=total, unit='image', delay=2, leave=False, disable=not self.progress)
        with bar:
            for x, y in self._decoded(batch_size, keep) if self._kept is None else self._kept:
                for start in range(0, len(x), batch_size):
                    part = slice(start, start + batch_size)
                    yield self._preprocess.normalise(x[part]), (y[part] if y is not None else None)
                bar.update(len(x))

    def _decoded(self, batch_size: int, keep: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
        """A pass over the images themselves: `[b, c, h, w]`, uint8 or float in 0-1, and the labels of the readable."""
        skipped = self.skipped = []
        total = read = 0
        # Arrays and tensors lie in memory as they are.
        kept = None
        if keep and not isinstance(self._data, (np.ndarray, Tensor)):
            kept = _KeptImages.begin(len(self._positions) * math.prod(self.input.input_size))  # bytes, if not more
        for images, read_labels in self._groups(batch_size):
            rows = range(total, total + len(images))
            total += len(images)
            x, readable = self._decode(images, rows, skipped)
            if not readable:
                continue
            read += len(readable)
            y = self._labels_of(rows, read_labels, readable)
            if kept is not None:
                kept = kept.add(x, y)
            yield x, y
        self._finish(total, read, skipped)
        self._kept = kept

    def subset(self, indices: Any) -> ImageSource:
        """The images at `indices`, in that order, with the class numbers and names of the whole set.

        Args:
            indices: Positions in 0 to n - 1, as a sequence, an array or a tensor.

        Raises:
            InputError: The images are a stream, or an index is out of range.
        """
        if self.is_stream:
            raise InputError(f'{self._where} can only be read in order: pass a list, folder or Dataset for a subset')
        chosen = np.asarray(indices.cpu() if isinstance(indices, Tensor) else indices)
        if chosen.ndim != 1 or not chosen.size or chosen.dtype.kind not in 'iu':
            raise InputError(f'subset: indices must be a list of ints with at least one, got {indices!r:.80}')
        if chosen.min() < 0 or chosen.max() >= len(self):
            raise InputError(f'subset: an index of {chosen.min()} to {chosen.max()} is outside 0 to {len(self) - 1}')
        part = object.__new__(ImageSource)
        part.__dict__.update(self.__dict__)
        part.skipped, part._kept = [], None
        part._positions = self._positions[chosen]
        part.labels = None if self.labels is None else self.labels[torch.from_numpy(chosen.astype(np.int64))]
        part.description = part._describe()
        return part

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_kept': None}  # a copy, in another process for instance, decodes again

    def _describe(self) -> str:
        what = 'labelled' if self.labelled else 'unlabelled'
        try:
            count = len(self)
        except TypeError:
            return f'{what} images ({self._where})'
        where = f'in {self._where}' if self._names is not None else f'({self._where})'
        plural = 'image' if count == 1 else 'images'
        if self.labels is None:
            return f'{count:,} {what} {plural} {where}'
        classes = len(self.labels.unique())
        return f'{count:,} {plural} in {classes:,} {"class" if classes == 1 else "classes"} {where}'

    def _peek(self, with_labels: bool) -> bool:
        """Whether there are labels to take; looks at the first item only, and keeps it for the first pass."""
        if self.is_stream:
            stream = iter(self._data)
            try:
                first = next(stream, None)
            except Exception as error:
                if _runs_own_code(self._data):
                    raise
                unlabelled = self._where.startswith('hfids/') and error.args == ('label',)
                more = '; hfds/... does without such a column' if unlabelled else ''
                reason = f'{type(error).__name__}: {first_line(error)}'
                raise InputError(f'{self._where}: timm cannot read its first image ({reason}){more}') from error
            if first is None:
                more = ', or its samples have no .cls: timm leaves those out' if self._where.startswith('wds/') else ''
                raise InputError(f'no images: {self._where} is empty{more}')
            self._started = (first, stream)
        if self.labels is not None:
            return True
        if self.is_stream:
            _, labels = _split_item(first, self._where, self._batched)
        elif isinstance(self._data, Dataset):
            labels = None
            for position in range(len(self._positions)):
                item = _item(self._data, position)
                if not isinstance(item, Exception):  # an unreadable image says nothing about labels
                    _, labels = _split_item(item, self._where)
                    break
        else:
            return False
        if labels is None or not with_labels:
            return False
        # timm's datasets give -1 where there is no label.
        self._without = not bool((_to_label_tensor(labels if self._batched else [labels], self._where) >= 0).any())
        return not self._without

    def name(self, row: int) -> str:
        """Name of an image by its row: its path in the folder, or its number."""
        position = row if self.is_stream else self._positions[row]
        if self._names is not None:
            return self._names[position]
        path = self._data[position] if isinstance(self._data, (list, tuple)) else None
        return os.fspath(path) if isinstance(path, (str, os.PathLike)) else f'image {position}'

    def _groups(self, batch_size: int) -> Iterator[tuple[Any, Any]]:
        """Undecoded images and the labels that came with them, about a batch at a time.

        Images are a list of single ones, or one array or tensor that holds all of them.
        """
        data = self._data
        if not self.is_stream:
            for start in range(0, len(self._positions), batch_size):
                positions = self._positions[start : start + batch_size]
                if isinstance(data, np.ndarray):
                    yield data[positions], None
                elif isinstance(data, Tensor):
                    yield data[torch.from_numpy(positions).to(data.device)], None
                elif isinstance(data, Dataset):
                    items = [_item_or_error(data, position, self._where) for position in positions.tolist()]
                    yield [image for image, _ in items], [label for _, label in items]
                else:
                    yield [_listed(data, position) for position in positions.tolist()], None
            return
        stream = iter(data) if self._started is None else itertools.chain([self._started[0]], self._started[1])
        self._started = None
        if self._batched:
            for batch in stream:
                yield _split_item(batch, self._where, batched=True)
            return
        while chunk := [_split_item(item, self._where) for item in itertools.islice(stream, batch_size)]:
            yield [image for image, _ in chunk], [label for _, label in chunk]

    def _decode(self, images: Any, rows: range, skipped: list[tuple[str, str]]) -> tuple[Tensor, list[int]]:
        """`[b, c, h, w]`, uint8 or float in 0-1, of the readable images, and which they are; notes the others."""
        names = [self.name(row) for row in rows]
        if not isinstance(images, list):
            try:
                return self._preprocess.arrays(images, names), list(range(len(images)))
            except PudNetError:
                raise
            except ValueError as error:
                raise InputError(f'{self._where}: {error}') from error
        pixels, kept = [], []
        for index, (found, name) in enumerate(zip(self._read(images, names), names, strict=True)):
            if isinstance(found, Tensor):
                pixels.append(found)
                kept.append(index)
            elif isinstance(found, PudNetError):
                raise found
            elif self._strict:
                raise InputError(f'{name}: cannot be read ({reason_of(found)})') from found
            else:
                skipped.append((name, reason_of(found)))
        if len({image.dtype for image in pixels}) > 1:
            pixels = [image.float() / 255 if image.dtype == torch.uint8 else image for image in pixels]
        return (torch.stack(pixels) if pixels else torch.empty(0)), kept

    def _read(self, images: list[Any], names: list[str]) -> list[Tensor | Exception]:
        """Every image, or what went wrong with it; large ones on all cores, since PIL works without Python's lock."""

        def read(part: slice) -> list[Tensor | Exception]:
            found: list[Tensor | Exception] = []
            for image, name in zip(images[part], names[part], strict=True):
                try:
                    found.append(self._preprocess.any_image(image, name))
                except Exception as error:  # a damaged file can make PIL raise nearly anything
                    found.append(error)
            return found

        with quiet_pillow():
            started = time.perf_counter()
            found = read(slice(_PART))
            opened = [id(image) for image in images if isinstance(image, Image.Image)]
            shared = len(set(opened)) < len(opened)  # which two threads must not decode at once
            if time.perf_counter() - started < _PART * _SMALL or _CORES < 2 or shared:
                return found + read(slice(_PART, None))
            parts = [slice(start, start + _PART) for start in range(_PART, len(images), _PART)]
            with ThreadPoolExecutor(_CORES) as pool:
                return found + list(itertools.chain.from_iterable(pool.map(read, parts)))

    def _labels_of(self, rows: range, read_labels: Any, kept: list[int]) -> Tensor | None:
        if not self.labelled and not self._without:
            return None
        if self.labels is not None:
            if rows.stop > len(self.labels):
                raise InputError(f'{len(self.labels)} labels for at least {rows.stop} images of {self._where}')
            self._check_declared(rows, read_labels, kept)
            return self.labels[rows.start : rows.stop][kept]
        labels = _to_label_tensor(read_labels, self._where)
        if len(labels) != len(rows):
            raise InputError(f'{self._where}: a batch of {len(rows)} images with {len(labels)} labels')
        if self._without and (labels[kept] < 0).all():
            return None
        lowest = -1 if self._without else min(labels[kept].tolist(), default=0)
        if lowest < 0:
            raise InputError(f'{self._where}: label {lowest} among others; give all in labels=...')
        if self._renumber is None:
            return labels[kept]
        numbers = [self._renumber.get(label) for label in labels[kept].tolist()]
        if None in numbers:
            raise InputError(
                f'{self._where}: gives other labels than its Dataset has, by its collate_fn for instance: give them in '
                'labels=... (without shuffling)'
            )
        return torch.tensor(numbers)

    def _tell_of_more_bits(self) -> None:
        brightest = self._preprocess.brightest
        told = ('', 'more than 8 bits')
        if not brightest or told in self._reported:
            return
        self._reported.add(told)
        dim = f'; the brightest pixel is {brightest:.1%} of white: scale them' if brightest < _DIM else ''
        warnings.warn(
            f"{self._where}: images of more than 8 bits are brought to 8 here, but PIL's convert('RGB'), which timm's "
            f'datasets call, clips them at 255: show the model 8-bit ones too{dim}',
            PudNetWarning,
            stacklevel=5,
        )

    def _check_declared(self, rows: range, read_labels: Any, kept: list[int]) -> None:
        """Raises InputError where items have another label than their dataset says without reading them."""
        if self._declared is None:
            return
        try:
            found = _to_label_tensor([read_labels[place] for place in kept], self._where)
        except InputError:  # no single number, or none: the list tells
            return
        declared = self._declared[torch.from_numpy(self._positions[rows.start : rows.stop][kept].astype(np.int64))]
        wrong = (found != declared).nonzero().flatten().tolist()
        if wrong:
            name = self.name(rows[kept[wrong[0]]])
            raise InputError(
                f'{self._where}: {name} comes with label {int(found[wrong[0]])}, but its list of targets says '
                f'{int(declared[wrong[0]])}: give the right ones in labels=...'
            )

    def check_classes(self, top: int, found: int) -> None:
        """Raises InputError where a largest label, or so many different ones, cannot be numbers of its classes."""
        if self.class_names is not None and top >= len(self.class_names):
            names = len(self.class_names)
            raise InputError(f'{self.description}: label {top} where there are names of {names} classes')
        if self.class_names is None and self.labels is None and found <= top:
            raise InputError(
                f'{self.description}: labels up to {top}, but only {found:,} different ones: make them 0 to '
                f'{found - 1}, or give them in labels=...'
            )

    def _finish(self, total: int, read: int, skipped: list[tuple[str, str]]) -> None:
        if not read:
            if not skipped:
                raise InputError(f'{self._where} gave no images on this pass; it must be possible to read it again')
            raise InputError(f'none of the {total:,} images of {self._where} could be read: {_name_some(skipped)}')
        if self.is_stream and self.labels is not None and len(self.labels) != total:
            raise InputError(f'{len(self.labels)} labels for {total} images of {self._where}')
        self._tell_of_more_bits()
        fresh = [entry for entry in skipped if entry not in self._reported]
        if fresh:
            self._reported.update(fresh)
            warnings.warn(
                f'skipped {len(fresh):,} of {total:,} images that could not be read: {_name_some(fresh)}',
                PudNetWarning,
                stacklevel=4,
            )


class _KeptImages:
    """Decoded images in a temporary file, which is gone with this object."""

    def __init__(self) -> None:
        # /tmp is memory on some machines, /var/tmp on none.
        folder = '/var/tmp' if os.path.isdir('/var/tmp') and 'TMPDIR' not in os.environ else tempfile.gettempdir()
        self._room = min(_MOST_KEPT, shutil.disk_usage(folder).free // 2)
        self._file = tempfile.TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._parts: list[tuple[np.dtype, tuple[int, ...], Tensor | None]] = []

    @classmethod
    def begin(cls, num_bytes: int) -> _KeptImages | None:
        """An empty one; None where there is no place for so much."""
        try:
            kept = cls()
        except OSError:
            return None
        return kept if num_bytes <= kept._room else None

    def add(self, images: Tensor, labels: Tensor | None) -> _KeptImages | None:
        """Itself with these images; None where they found no room."""
        pixels = images.contiguous().numpy()
        self._room -= pixels.nbytes
        try:
            if self._room < 0 or self._file.write(pixels.data) != pixels.nbytes:
                return None
        except OSError:
            return None
        self._parts.append((pixels.dtype, pixels.shape, None if labels is None else labels.clone()))
        return self

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        place = 0
        for dtype, shape, labels in self._parts:
            pixels = np.empty(shape, dtype)
            if hasattr(os, 'preadv'):  # passes in several threads or processes do not share a place in the file
                read = os.preadv(self._file.fileno(), [pixels.data.cast('B')], place)
            else:
                self._file.seek(place)
                read = self._file.readinto(pixels.data.cast('B'))
            if read != pixels.nbytes:
                raise OSError('the temporary file of decoded images was cut')
            place += pixels.nbytes
            yield torch.from_numpy(pixels), None if labels is None else labels.clone()


def open_images(
    images: Any,
    labels: Any = None,
    *,
    input: InputConfig,
    split: str = 'train',
    data_dir: str | os.PathLike[str] | None = None,
    strict: bool = False,
    with_labels: bool = True,
) -> ImageSource:
    """Takes images in any form that people have them in, and says at once what is wrong with them.

    Args:
        images: A folder (its subfolders are the classes; without subfolders there are no labels); a list of paths, PIL
            images, arrays `[h, w, c]` or tensors `[c, h, w]`; an array `[n, h, w, c]` or tensor `[n, c, h, w]` with 1,
            3 or 4 channels (one channel may be left out), uint8 or float in 0-1; a `Dataset` whose items are an image
            or `(image, label, ...)`; a `DataLoader` of tensors or `(tensor, labels)`; a timm dataset name
            (`torch/cifar10`, `hfds/...`, `wds/...`, `tfds/...`), for which no download is asked (a `hfds` name that is
            not cached is still fetched by the package `datasets`, unless its HF_HUB_OFFLINE is set).
        labels: One a image, ints or strings, instead of those of the data. Numbers other than 0 to k - 1, and strings,
            become 0 to k - 1 in their order, with the originals as class names.
        input: Size, mean, std and resizing that the target network wants.
        split: Which part of a timm dataset.
        data_dir: Where a timm dataset lies.
        strict: Raise for an image that cannot be read, instead of skipping it with a warning.
        with_labels: False takes the images alone: all that lie below a folder, and no label is looked at.

    Returns:
        The images, to be read in batches. Class numbers follow the names of class folders in timm's natural order
        (`2` before `10`), so that timm's `validate.py` numbers them the same way.

    Raises:
        InputError: The images or labels cannot be used.
        NotFoundError: The folder or data set is not there.

    Warns:
        PudNetWarning: Images or class folders were left out.

    Example:
        >>> source = open_images(np.zeros((6, 8, 8, 3), np.uint8), ['cat', 'dog'] * 3, input=InputConfig())
        >>> source.description, source.class_names
        ('6 images in 2 classes (array)', ('cat', 'dog'))
        >>> [tuple(x.shape) for x, y in source.batches(4)]
        [(4, 3, 32, 32), (2, 3, 32, 32)]
    """
    if isinstance(images, ImageSource):
        if strict and not images._strict:
            raise InputError(f'{images.description}: opened already, without strict: open them with it')
        # Pixels at the input size are not cropped again, whatever share the network sees of others.
        if labels is not None or dataclasses.replace(images.input, crop_pct=input.crop_pct) != input:
            raise InputError(f'{images.description}: opened already, with its own labels and input')
        return images
    names = found_labels = class_names = renumber = declared = None
    images = os.fsdecode(images) if isinstance(images, bytes) else images
    if isinstance(images, PrefetchLoader):
        raise InputError(
            "images: timm's PrefetchLoader normalises: pass the Dataset, without a transform, or pixels in 0-1, "
            'create_loader(..., use_prefetcher=False, mean=(0, 0, 0), std=(1, 1, 1))'
        )
    in_place = False
    if _is_column(images):
        in_place = _holds_pictures(images)
        images = images if in_place else list(images)
    if isinstance(images, str) and is_timm_name(images):
        where = images
        channels = input.input_size[0]
        images = _timm_dataset(images, data_dir, split, channels, strict=strict, with_labels=with_labels)
    elif isinstance(images, (str, os.PathLike)):
        where = os.path.expanduser(os.fspath(images))
        if not where:
            raise InputError('images: an empty name, of no folder')
        images, names, found_labels, class_names = scan_folder(where, with_labels, strict)
    elif isinstance(images, Image.Image):
        raise InputError('one PIL image: pass a list of images, or the folder that holds them')
    elif isinstance(images, (np.ndarray, Tensor)):
        where = 'array' if isinstance(images, np.ndarray) else 'tensor'
        _refuse_single(images, labels)
        if len(images):
            to_bchw(images[:1], where)  # so that a wrong type or shape is an error here, not at the first batch
    elif isinstance(images, (list, tuple)) or in_place:
        where = 'list'
        for index in range(1 if in_place else len(images)):
            _listed(images, index)
    elif isinstance(images, (Dataset, DataLoader)):
        where = type(images).__name__
        if isinstance(images, DataLoader) and (strict or labels is not None) and _gives_next(images.dataset):
            raise InputError(
                f"{where}: timm's ImageDataset gives it the next image in place of one that cannot be read: for "
                f'{"strict" if strict else "labels=..."} pass the dataset itself'
            )
    elif _is_table(images):
        raise InputError(
            f'images: a {type(images).__module__}.{type(images).__name__} is a table: pass its column of '
            'paths or images, and another one as labels'
        )
    else:
        raise InputError(f'images: a {type(images).__name__} cannot be read; pass {_ACCEPTED}')

    data = cast(Any, images)
    is_stream = isinstance(images, (DataLoader, IterableDataset))
    is_dataset = isinstance(images, Dataset) and not is_stream
    if is_dataset and not hasattr(data, '__len__'):
        raise InputError(f'{where} has no length; make it an IterableDataset, or give it __len__')
    if labels is not None:
        found_labels, class_names = _index_labels(labels)
        if reorders(images):
            raise InputError(
                'labels do not fit a DataLoader that may give images in another order (it shuffles, has its own '
                'sampler, or workers share a stream): pass shuffle=False, or the Dataset itself'
            )
        if not is_stream and len(found_labels) != len(data):
            raise InputError(f'{len(found_labels)} labels for {len(data)} images')
    elif is_stream and with_labels:
        dataset = getattr(data, 'dataset', data)
        class_names = _class_names(dataset)
        if isinstance(data, DataLoader) and not isinstance(dataset, IterableDataset):
            values, all_names = _dataset_targets(dataset)
            if values is not None:
                numbers, class_names = _index_labels(values, all_names)
                if isinstance(dataset, Subset) or not torch.equal(numbers, values):  # of some classes
                    renumber = dict(zip(values.tolist(), numbers.tolist(), strict=True))
    elif is_dataset and with_labels:
        declared, class_names = _dataset_targets(data)
        if declared is not None:
            found_labels, class_names = _index_labels(declared, class_names)
    return ImageSource(
        data,
        input,
        where=where,
        labels=found_labels,
        class_names=class_names,
        names=names,
        strict=strict,
        with_labels=with_labels,
        renumber=renumber,
        declared=declared,
    )


def _is_column(images: Any) -> bool:
    """Whether this is a table's column of paths or images: an array of paths, a pandas Series, a column of datasets."""
    if isinstance(images, np.ndarray):
        return bool(images.size) and isinstance(images.flat[0], (str, os.PathLike))
    known = (str, os.PathLike, list, tuple, Tensor, Dataset, DataLoader, Mapping, Set, Image.Image)
    listed = isinstance(images, Iterable) and hasattr(images, '__len__')
    return listed and not isinstance(images, known) and not _is_table(images)


def _holds_pictures(column: Any) -> bool:
    """Whether a column decodes an image only when asked for it, as one of the package datasets does."""
    lazy = isinstance(column, Sequence) and len(column) > 0  # a Series is no Sequence
    return lazy and not isinstance(_item(column, 0), (str, os.PathLike))


def _is_table(images: Any) -> bool:
    return hasattr(images, 'column_names') or hasattr(images, 'columns')  # of datasets and pandas


def channel_statistics(input: InputConfig) -> tuple[Tensor, Tensor]:
    """Mean and std that pixels are normalised by, each `[c, 1, 1]`; float32 on the CPU, whatever torch's defaults."""
    mean, std = (torch.tensor(values, dtype=torch.float32, device='cpu') for values in (input.mean, input.std))
    return mean[:, None, None], std[:, None, None]


class _Preprocess:
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
    return _open(os.path.expanduser(path))


def _open(file: str | IO[bytes]) -> ImageFile.ImageFile:
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
        x = _values(value, name).reshape(shape[0], channels, *shape[-2:])
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


def _refuse_single(images: np.ndarray | Tensor, labels: Any) -> None:
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


def _name_some(entries: Sequence[tuple[str, str]]) -> str:
    some = ', '.join(f'{shown(name, 300)} ({reason})' for name, reason in entries[:3])
    return some + (', ...' if len(entries) > 3 else '')


def scan_folder(
    root: str, with_labels: bool = True, strict: bool = False
) -> tuple[list[str], list[str], Tensor | None, tuple[str, ...] | None]:
    """Paths, names relative to the folder, labels and class names.

    The last two are None for a flat folder, and for all images below a folder without labels.
    """
    parent, name = os.path.split(os.path.abspath(root))
    if not os.path.exists(root):
        near = close_names(name, os.listdir(parent)) if os.path.isdir(parent) else ''
        raise NotFoundError(f'{root}: no such folder.{near}')
    if not os.path.isdir(root):
        raise InputError(f'{root} is one file: pass a list of paths, or the folder that holds the images')
    loose: list[str] = []
    found: dict[str, list[str]] = {}
    others: collections.Counter[str] = collections.Counter()
    unread: collections.Counter[str] = collections.Counter()
    for name in _visible_names(root):
        path = os.path.join(root, name)
        files = list(walk_files(path, {os.path.realpath(root)})) if os.path.isdir(path) else [path]
        pictures = [file for file in files if file.lower().endswith(IMAGE_EXTENSIONS)]
        rest = [os.path.splitext(file) for file in set(files).difference(pictures)]
        others.update(kind or 'no extension' for _, kind in rest)
        if any(_PICTURE.fullmatch(kind.lower()) for _, kind in rest):
            read = {os.path.splitext(file)[0] for file in pictures}  # a raw file beside its JPEG is the same picture
            unread.update(kind for stem, kind in rest if _PICTURE.fullmatch(kind.lower()) and stem not in read)
        if os.path.isdir(path):
            found[name] = pictures
        else:
            loose += pictures
    classes = [name for name, pictures in found.items() if pictures]
    if not classes and not loose:
        kinds = ', '.join(sorted(others))
        what = f'{others.total()} other files ({kinds})' if others else 'the folder is empty'
        raise InputError(f'no images in {root}: {what}; images end in {", ".join(IMAGE_EXTENSIONS[:4])}, ...')
    if unread:
        kinds = ', '.join(shown(kind) for kind in sorted(unread)[:4]) + (', ...' if len(unread) > 4 else '')
        what = f'{unread.total():,} pictures that do not end as those that can be read do ({kinds})'
        if strict:
            raise InputError(f'{root}: {what}: convert or rename them, or move them away')
        _warn(f'{root}: ignored {what}')
    if not classes or not with_labels:
        paths = [*loose, *(path for name in classes for path in found[name])]
        return paths, [os.path.relpath(path, root) for path in paths], None, None
    if len(classes) > 1 and _are_splits(classes):
        raise InputError(f'{root} holds splits, not classes: pass {os.path.join(root, classes[0])} or another of them')
    inside = _folders_of_images(os.path.join(root, classes[0]), found[classes[0]]) if len(classes) == 1 else []
    if len(inside) > 1:
        some = ', '.join(inside[:3]) + (', ...' if len(inside) > 3 else '')
        raise InputError(f'{root} holds one folder, with others ({some}): pass {os.path.join(root, classes[0])}')
    if loose and len(classes) == 1:
        raise InputError(
            f'{root} holds {len(loose):,} images and one folder with images ({shown(classes[0])}): move either away'
        )
    if loose:
        _warn(f'{root}: ignored {len(loose):,} images beside the class folders')
    splits = [name for name in classes if _are_splits([name])]
    if len(splits) > 1 and any('train' in name.lower() for name in splits):
        _warn(f'{root}: took {", ".join(splits)} for classes; if they are splits, pass one of them')
    if len(classes) < len(found):
        _warn(
            f'{root}: ignored folders without images: {", ".join(shown(name) for name in found if name not in classes)}'
        )
    paths = [path for name in classes for path in found[name]]
    labels = torch.tensor([label for label, name in enumerate(classes) for _ in found[name]])
    return paths, [os.path.relpath(path, root) for path in paths], labels, tuple(classes)


def _folders_of_images(folder: str, pictures: Sequence[str]) -> list[str]:
    """Names of the folders right below that hold all of these images; none where some lie in it directly."""
    parts = [os.path.relpath(path, folder).split(os.sep) for path in pictures]
    return [] if any(len(part) == 1 for part in parts) else list(dict.fromkeys(part[0] for part in parts))


def _warn(text: str) -> None:
    warnings.warn(text, PudNetWarning, stacklevel=4)


def _visible_names(folder: str) -> list[str]:
    try:
        return sorted((name for name in os.listdir(folder) if not name.startswith('.')), key=natural_key)
    except OSError as error:
        raise InputError(f'{folder}: cannot be listed ({error.strerror})') from error


def natural_key(name: str) -> tuple[list[str | int], str]:
    """The order that timm gives class folders, with ties settled."""
    parts = re.split(r'(\d+)', name.lower())
    return [int(part) if part.isdecimal() else part for part in parts], name


def walk_files(folder: str, seen: set[str]) -> Iterator[str]:
    """Every visible file below; a folder that links lead to twice is read once."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    for name in _visible_names(folder):
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            yield from walk_files(path, seen)
        else:
            yield path


def _index_labels(values: Any, names: Sequence[str] | None = None) -> tuple[Tensor, tuple[str, ...] | None]:
    """Labels as 0 to k - 1, int64 `[n]`, and class names; `names` are those of the numbers, where known."""
    if isinstance(values, Tensor):
        values = _values(values, 'labels').numpy()
    if isinstance(values, (str, bytes, Mapping, Set)) or not isinstance(values, Iterable):
        raise InputError(f'labels: a {type(values).__name__}; pass one int or string for each image, in their order')
    values = _column(values)
    if getattr(values, 'ndim', 1) != 1:
        shape = list(getattr(values, 'shape', ()))
        raise InputError(f'labels of shape {shape}: pass one int or string for each image, shape [n]')
    values = values if isinstance(values, np.ndarray) else list(values)
    if all(isinstance(value, str) for value in values):
        values = [str.__str__(value) for value in values]  # an Enum's too
        class_names = sorted(set(values), key=natural_key)  # as folders of these names
        numbers = {name: number for number, name in enumerate(class_names)}
        return torch.from_numpy(np.array([numbers[value] for value in values], np.int64)), tuple(class_names)
    mixed = isinstance(values, list) or values.dtype == object
    if mixed and any(isinstance(value, str) for value in values):
        place, value = next((place, value) for place, value in enumerate(values) if not isinstance(value, str))
        raise InputError(f'labels: names, but number {place} is {shown(value)}: give each image a name')
    labels = _to_label_tensor(values, 'labels')
    unique, numbers = labels.unique(return_inverse=True)
    k = len(unique)
    if names is not None and k and unique[0] >= 0 and unique[-1] < len(names):
        return numbers, tuple(str(names[number]) for number in unique.tolist())
    if unique.tolist() == list(range(k)):
        return labels, None
    return numbers, tuple(str(number) for number in unique.tolist())


def _values(tensor: Tensor, name: str) -> Tensor:
    """A tensor's numbers, in memory and dense."""
    if tensor.is_meta:
        raise InputError(f'{name}: a tensor on the device meta has no values')
    return tensor.detach().cpu().to_dense()


def _column(values: Any) -> Any:
    """Labels `[n, 1]` as `[n]`; others as they are."""
    if getattr(values, 'ndim', 1) != 2 or values.shape[1] != 1:
        return values
    return (values.to_numpy() if hasattr(values, 'to_numpy') else values)[:, 0]


def _to_label_tensor(values: Any, where: str) -> Tensor:
    """int64 `[b]` of ints in whatever form."""
    if isinstance(values, (Tensor, np.ndarray)):
        values = _column(values).tolist()
    one = (value.item() if math.prod(getattr(value, 'shape', (0,))) == 1 else value for value in values)
    try:
        return torch.tensor([operator.index(value) for value in one], dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        wrong = next(((place, value) for place, value in enumerate(values) if not hasattr(value, '__index__')), None)
        reason = str(error) if wrong is None else f'number {wrong[0]} is {shown(wrong[1])}'
        more = '' if where == 'labels' else '; labels=... takes names too'
        raise InputError(f'{where}: labels must be one int for each image ({reason}){more}') from error


def reorders(images: Any) -> bool:
    """Whether these are a DataLoader whose images may come in another order than those of its dataset."""
    if not isinstance(images, DataLoader):
        return False
    is_stream = isinstance(images.dataset, IterableDataset)
    # Several workers share a stream as they like, and batches as they are done where `in_order` (torch 2.6) is False.
    if images.num_workers > 1 and (is_stream or not getattr(images, 'in_order', True)):
        return True
    if is_stream:
        return False
    batches: Any = images.batch_sampler
    if batches is not None and type(batches) is not BatchSampler:  # which may order them as it likes
        return True
    return type(images.sampler if batches is None else batches.sampler) is not SequentialSampler


def _is_batched(data: Any) -> bool:
    return isinstance(data, DataLoader) and not (data.batch_size is None and data.batch_sampler is None)


def _split_item(item: Any, where: str, batched: bool = False) -> tuple[Any, Any]:
    """Image and label of what a Dataset or DataLoader gave, which is an image or (image, label, ...)."""
    image, label = (*item, None)[:2] if isinstance(item, (tuple, list)) and item else (item, None)
    if not isinstance(image, (np.ndarray, Tensor) if batched else (np.ndarray, Tensor, Image.Image)):
        wanted = 'a tensor or (tensor, labels)' if batched else 'an image or (image, label)'
        how = '; a collate_fn may take them out of it' if batched and isinstance(item, dict) else ''
        raise InputError(f'{where} must give {wanted}, not a {type(image).__name__}{how}')
    if not batched and not isinstance(image, Image.Image) and image.ndim == 4:
        raise InputError(
            f'{where} gives batches of shape {tuple(image.shape)} where single images are wanted: let a DataLoader '
            'with a batch_size make them'
        )
    return image, label


def _item_or_error(dataset: Any, position: int, where: str) -> tuple[Any, Any]:
    item = _item(dataset, position)
    return (item, -1) if isinstance(item, Exception) else _split_item(item, where)


def _listed(images: Any, position: int) -> Any:
    """What a list or column has there, or what is wrong with the image that a column cannot decode."""
    item = _item(images, position)
    if not isinstance(item, (str, os.PathLike, Image.Image, np.ndarray, Tensor, Exception)):
        kind = f'{type(item).__module__}.{type(item).__name__}'.removeprefix('builtins.')
        raise InputError(f'images[{position}] is a {kind}, not a path, image, array or tensor')
    return item


def _item(dataset: Any, position: int) -> Any:
    """What a dataset has there, or what is wrong with the image that it cannot read."""
    while type(dataset) in (Subset, ConcatDataset):
        if type(dataset) is Subset:
            chosen: Any = dataset.indices[position]
            dataset, position = dataset.dataset, int(chosen) if isinstance(chosen, Tensor) else chosen
        else:
            position = range(len(dataset))[position]  # a Subset may count from the end
            part = bisect.bisect_right(dataset.cumulative_sizes, position)
            position -= dataset.cumulative_sizes[part - 1] if part else 0
            dataset = dataset.datasets[part]
    try:
        return _timm_item(dataset, position) if _is_timm_s(dataset) else dataset[position]
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's, of damaged files
        return error
    except Exception as error:  # nearly anything, of PIL too
        if _runs_own_code(dataset) and not (_is_library_s(dataset) and _is_of_reading(error)):
            raise
        return error


def _is_of_reading(error: Exception) -> bool:
    """Whether an error comes from within PIL's opening or decoding of a file."""
    frames = [(frame.name, frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    return any(name in ('open', 'load') and os.path.dirname(file).endswith('PIL') for name, file in frames)


def _is_library_s(dataset: Any) -> bool:
    return type(dataset).__module__.startswith(('torchvision.', 'timm.'))


def _runs_own_code(dataset: Any) -> bool:
    """Whether code of the user's runs where it gives an image: an error may be one of his."""
    places = ('transform', 'transforms', 'target_transform')
    return not _is_library_s(dataset) or any(getattr(dataset, place, None) is not None for place in places)


def _is_timm_s(dataset: Any) -> bool:
    return isinstance(dataset, ImageDataset) and type(dataset).__getitem__ is ImageDataset.__getitem__


def _gives_next(dataset: Any) -> bool:
    """Whether timm's code gives the next image in place of one that cannot be read."""
    if isinstance(dataset, ConcatDataset):
        return any(map(_gives_next, dataset.datasets))
    return _gives_next(dataset.dataset) if isinstance(dataset, Subset) else _is_timm_s(dataset)


def _timm_item(dataset: Any, position: int) -> Any:
    """What timm's dataset has there; itself it gives the next image and its label in place of one it cannot read."""
    if dataset.load_bytes:
        return dataset[position]
    file, target, *_ = dataset.reader[position]
    try:
        image = _open(file)
        image = image.convert(dataset.input_img_mode) if dataset.input_img_mode else image
    except Exception:
        file.close()
        raise
    if target is not None and dataset.target_transform is not None:
        target = dataset.target_transform(target)
    return image if dataset.transform is None else dataset.transform(image), -1 if target is None else target


def _class_names(dataset: Any) -> tuple[str, ...] | None:
    """From torchvision's `classes` or the `class_to_idx` of timm's readers; none where the targets are transformed."""
    if getattr(dataset, 'target_transform', None) is not None:
        return None
    classes: Any = getattr(dataset, 'classes', None)
    if classes is None:
        classes = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None)
    if isinstance(classes, dict):
        if sorted(classes, key=str) == sorted(range(len(classes)), key=str):  # names by number
            classes = [classes[number] for number in range(len(classes))]
        elif set(map(str, classes.values())) == set(map(str, range(len(classes)))):  # numbers by name
            classes = sorted(classes, key=lambda name: int(classes[name]))
    if isinstance(classes, (np.ndarray, Tensor)):
        classes = classes.tolist()
    if not isinstance(classes, (list, tuple)) or not classes:
        return None
    # torchvision's ImageNet has all words for a class.
    return tuple(', '.join(map(str, name)) if isinstance(name, (list, tuple)) else str(name) for name in classes)


def _dataset_targets(dataset: Any) -> tuple[Tensor | None, tuple[str, ...] | None]:
    """Labels as its items have them, and names of all classes, that a map-style dataset knows without an image."""
    base, chosen = dataset, None
    while isinstance(base, Subset):
        indices = base.indices.tolist() if isinstance(base.indices, Tensor) else list(base.indices)
        base, chosen = base.dataset, indices if chosen is None else [indices[place] for place in chosen]
    if isinstance(base, ConcatDataset):
        parts, its_names = zip(*map(_dataset_targets, base.datasets), strict=True)
        if len(known := [*dict.fromkeys(names for names in its_names if names is not None)]) > 1:
            some = '; '.join(', '.join(map(shown, names[:3])) for names in known[:2])
            raise InputError(f'a ConcatDataset of sets with other classes ({some}; ...): give labels=...')
        if any(part is None for part in parts):
            return None, None
        values = torch.cat(parts)
        return values if chosen is None else values[chosen], None if None in its_names else its_names[0]
    names = _class_names(base)
    # The names that torchvision's datasets have for them.
    known = (getattr(base, name, None) for name in ('targets', 'labels', '_labels'))
    targets = next(
        (found for found in known if isinstance(found, Iterable) and not isinstance(found, (str, bytes, Mapping))), None
    )
    reader: Any = getattr(base, 'reader', None)  # timm's: of a folder, of Hugging Face
    if targets is None and hasattr(reader, 'samples'):
        targets = [target for _, target in reader.samples]
    elif targets is None and hasattr(reader, 'iter_targets'):
        targets = list(reader.iter_targets())
    if targets is None or getattr(base, 'target_transform', None) is not None:
        return None, names
    try:
        values = _to_label_tensor(targets, 'targets')[slice(None) if chosen is None else chosen]
    except (InputError, IndexError):  # targets of another kind: the items tell
        return None, names
    if len(values) != len(dataset) or (len(values) and (values < 0).all()):  # timm's and others' -1 is no label
        return None, names
    if names is not None and (values < 0).any():
        raise InputError(
            f'{type(dataset).__name__}: label {int(values.min())} among those of {len(names)} classes: give all in '
            'labels=..., or only the images that have one (torch.utils.data.Subset)'
        )
    return values, names


def check_root(data_dir: str | None, *images: Any, option: str = 'data_dir') -> None:
    """Refuses a `data_dir` where none of the images is the name of a timm dataset."""
    if data_dir is not None and not any_timm_name(*images):
        given = f'{images[0]} is not' if isinstance(images[0], str) else 'these images are not'
        raise InputError(
            f'{option} {data_dir!r} is the root of a timm dataset, and {given} the name of one: leave it out, or name '
            'one, torch/image_folder for instance'
        )


def any_timm_name(*images: Any) -> bool:
    """Whether one of these is the name of a timm dataset."""
    return any(isinstance(given, str) and is_timm_name(given) for given in images)


def is_timm_name(text: str) -> bool:
    """Whether it names a timm dataset, as `torch/cifar10` does unless there is a folder of that name."""
    return text.partition('/')[0] in _TIMM_PACKAGES and '/' in text and not os.path.exists(text)


def takes_folder(images: Any) -> bool:
    """Whether it is a name under which timm reads the folders of classes in `data_dir`."""
    return any_timm_name(images) and torch_name(images) in ('image_folder', 'folder')


def torch_name(name: str) -> str:
    """Which of torchvision's datasets timm reads, in lower case; empty for those of others."""
    return name.split('/', 2)[-1].lower() if name.startswith('torch/') else ''


def _find_columns(reader: Any, with_labels: bool) -> None:
    """Has timm's reader of a Hugging Face set without columns `image` or `label` take those that there are."""
    table = reader.dataset
    if table.data.column('image').null_count == len(table):  # timm adds an empty one where there is none
        table = table.remove_columns('image')
        pictures = [name for name, kind in table.features.items() if type(kind).__name__ == 'Image']
        if len(pictures) != 1:
            raise ValueError(f'not one alone of its columns ({", ".join(map(shown, table.column_names))}) holds images')
        kind = dataclasses.replace(table.features[pictures[0]], decode=False)
        reader.image_key, reader.dataset = pictures[0], table.cast_column(pictures[0], kind)
        table = reader.dataset
    if 'label' in table.column_names:
        return
    named = [name for name, kind in table.features.items() if hasattr(kind, 'str2int')]  # a ClassLabel
    if len(named) == 1:
        reader.label_key = named[0]
        reader.class_to_idx = {name: number for number, name in enumerate(table.features[named[0]].names)}
    else:
        if with_labels and len(table.column_names) > 1:
            columns = ', '.join(map(shown, table.column_names))
            _warn(
                f'taken as unlabelled: of its columns ({columns}) none is called label, and not one alone holds classes'
            )
        reader.dataset = table.add_column('label', [-1] * len(table))  # timm asks for one


def _timm_dataset(
    name: str, data_dir: str | os.PathLike[str] | None, split: str, channels: int, *, strict: bool, with_labels: bool
) -> Dataset:
    prefix = name.partition('/')[0]
    if strict and prefix == 'wds':
        raise InputError(f'{name}: timm leaves out what it cannot read, with a line in its log alone: leave out strict')
    module, package = _TIMM_PACKAGES[prefix]
    if importlib.util.find_spec(module) is None:
        raise InputError(f'{name}: needs the package {package}: pip install {package}')
    if data_dir is None and prefix in ('torch', 'wds'):
        raise InputError(f'{name}: say where the data set lies, data_dir=...')
    root = None if data_dir is None else os.path.expanduser(os.fspath(data_dir))
    if root is not None and ':' not in root and not os.path.exists(root):  # wds takes URLs too
        raise NotFoundError(f'{name}: data_dir {root}: no such folder; nothing is downloaded')
    if prefix.startswith('hf') and root is not None and _holds_images(root):
        raise InputError(
            f'{name}: data_dir is where the package datasets keeps what it downloads, and {root} holds images: pass '
            'that folder itself as the images'
        )
    if torch_name(name) in TRAIN_OR_TEST and split not in _SPLIT_NAMES:
        raise InputError(f'{name}: no split {split!r}: name train or test')
    mode = '' if prefix == 'hfds' else 'L' if channels == 1 else 'RGB'  # hfds: undecoded, so that we see what is broken
    try:
        found: Any = create_dataset(name, root=root, split=split, download=False, input_img_mode=mode)
        if prefix == 'hfds':
            _find_columns(found.reader, with_labels)
    except Exception as error:
        reason = first_line(error)
        kind = NotFoundError if 'not found' in reason.lower() else InputError
        if prefix.startswith('hf'):  # which may have downloaded much by then
            raise kind(f'{name}: cannot be opened for split {split!r} ({reason})') from error
        raise kind(f'{name}: not in data_dir={root!r} for split {split!r} ({reason}); nothing is downloaded') from error
    # timm takes the folder itself where it has no such split.
    classes = sorted(_class_names(found) or ()) if takes_folder(name) else []
    if len(classes) > 1 and _are_splits(classes):
        raise InputError(f'{name}: {root} has no split {split!r}: name one of {", ".join(classes)}')
    return found


def _holds_images(folder: str) -> bool:
    """Whether images lie in a folder, or in one right below it."""
    below = [os.path.join(folder, name) for name in _visible_names(folder)]
    files = [*below, *(name for path in below if os.path.isdir(path) for name in _visible_names(path))]
    return any(name.lower().endswith(IMAGE_EXTENSIONS) for name in files)


def _are_splits(names: Sequence[str]) -> bool:
    plain = (re.sub(r'[ _-]?(set|data|images|split)$', '', name.lower()) for name in names)
    return _SPLIT_NAMES.issuperset(plain)
