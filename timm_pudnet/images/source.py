"""A set of images in any form, read again and again: `open_images` makes an `ImageSource` of what a caller has.

Letters: `n` images of the set, `b` of a batch, `c h w` channels, height and width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import shutil
import tempfile
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from timm.data.loader import PrefetchLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from tqdm import tqdm

from timm_pudnet.config import InputConfig, InputError, PudNetError, PudNetWarning, first_line, shown
from timm_pudnet.images.datasets import (
    class_names_of,
    dataset_targets,
    gives_next,
    index_labels,
    is_batched,
    is_timm_name,
    item_of,
    item_or_error,
    listed_item,
    reorders,
    runs_own_code,
    split_item,
    timm_dataset,
    to_label_tensor,
)
from timm_pudnet.images.folders import scan_folder
from timm_pudnet.images.pixels import Preprocess, quiet_pillow, reason_of, refuse_single, to_bchw

_ACCEPTED = (
    'a folder, a list of paths or images, an array [n, h, w, c], a tensor [n, c, h, w], a Dataset, a DataLoader '
    'or a timm dataset name (torch/cifar10)'
)
_DIM = 0.125  # of white: images of more bits whose pixels are all darker lose most of their grey levels
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
        self._preprocess = Preprocess(input)
        self._where = where
        self._names = names
        self._strict = strict
        self._reported: set[tuple[str, str]] = set()  # shared with subsets, so that a bad file is named once
        self._started: tuple[Any, Iterator[Any]] | None = None  # a stream's first item and the rest of that pass
        self._kept: _KeptImages | None = None  # what a full pass decoded
        self._batched = is_batched(data)
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
                if runs_own_code(self._data):
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
            _, labels = split_item(first, self._where, self._batched)
        elif isinstance(self._data, Dataset):
            labels = None
            for position in range(len(self._positions)):
                item = item_of(self._data, position)
                if not isinstance(item, Exception):  # an unreadable image says nothing about labels
                    _, labels = split_item(item, self._where)
                    break
        else:
            return False
        if labels is None or not with_labels:
            return False
        # timm's datasets give -1 where there is no label.
        self._without = not bool((to_label_tensor(labels if self._batched else [labels], self._where) >= 0).any())
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
                    items = [item_or_error(data, position, self._where) for position in positions.tolist()]
                    yield [image for image, _ in items], [label for _, label in items]
                else:
                    yield [listed_item(data, position) for position in positions.tolist()], None
            return
        stream = iter(data) if self._started is None else itertools.chain([self._started[0]], self._started[1])
        self._started = None
        if self._batched:
            for batch in stream:
                yield split_item(batch, self._where, batched=True)
            return
        while chunk := [split_item(item, self._where) for item in itertools.islice(stream, batch_size)]:
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
        labels = to_label_tensor(read_labels, self._where)
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
            found = to_label_tensor([read_labels[place] for place in kept], self._where)
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
        strict: Raise for an image that cannot be read, or a picture whose format Pillow lacks (HEIC, JPEG XL, raw),
            instead of skipping it with a warning. `wds/...` sets leave such images out themselves. A DataLoader of
            timm's `ImageDataset` puts the next image in their place: pass the dataset where that matters.
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
        images = timm_dataset(images, data_dir, split, channels, strict=strict, with_labels=with_labels)
    elif isinstance(images, (str, os.PathLike)):
        where = os.path.expanduser(os.fspath(images))
        if not where:
            raise InputError('images: an empty name, of no folder')
        images, names, found_labels, class_names = scan_folder(where, with_labels, strict)
    elif isinstance(images, Image.Image):
        raise InputError('one PIL image: pass a list of images, or the folder that holds them')
    elif isinstance(images, (np.ndarray, Tensor)):
        where = 'array' if isinstance(images, np.ndarray) else 'tensor'
        refuse_single(images, labels)
        if len(images):
            to_bchw(images[:1], where)  # so that a wrong type or shape is an error here, not at the first batch
    elif isinstance(images, (list, tuple)) or in_place:
        where = 'list'
        for index in range(1 if in_place else len(images)):
            listed_item(images, index)
    elif isinstance(images, (Dataset, DataLoader)):
        where = type(images).__name__
        if isinstance(images, DataLoader) and (strict or labels is not None) and gives_next(images.dataset):
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
        found_labels, class_names = index_labels(labels)
        if reorders(images):
            raise InputError(
                'labels do not fit a DataLoader that may give images in another order (it shuffles, has its own '
                'sampler, or workers share a stream): pass shuffle=False, or the Dataset itself'
            )
        if not is_stream and len(found_labels) != len(data):
            raise InputError(f'{len(found_labels)} labels for {len(data)} images')
    elif is_stream and with_labels:
        dataset = getattr(data, 'dataset', data)
        class_names = class_names_of(dataset)
        if isinstance(data, DataLoader) and not isinstance(dataset, IterableDataset):
            values, all_names = dataset_targets(dataset)
            if values is not None:
                numbers, class_names = index_labels(values, all_names)
                if isinstance(dataset, Subset) or not torch.equal(numbers, values):  # of some classes
                    renumber = dict(zip(values.tolist(), numbers.tolist(), strict=True))
    elif is_dataset and with_labels:
        declared, class_names = dataset_targets(data)
        if declared is not None:
            found_labels, class_names = index_labels(declared, class_names)
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
    known = (
        str,
        bytearray,
        memoryview,
        os.PathLike,
        list,
        tuple,
        Tensor,
        Dataset,
        DataLoader,
        Mapping,
        Set,
        Image.Image,
    )
    listed = isinstance(images, Iterable) and hasattr(images, '__len__')
    return listed and not isinstance(images, known) and not _is_table(images)


def _holds_pictures(column: Any) -> bool:
    """Whether a column decodes an image only when asked for it, as one of the package datasets does."""
    lazy = isinstance(column, Sequence) and len(column) > 0  # a Series is no Sequence
    return lazy and not isinstance(item_of(column, 0), (str, os.PathLike))


def _is_table(images: Any) -> bool:
    return hasattr(images, 'column_names') or hasattr(images, 'columns')  # of datasets and pandas


def _name_some(entries: Sequence[tuple[str, str]]) -> str:
    some = ', '.join(f'{shown(name, 300)} ({reason})' for name, reason in entries[:3])
    return some + (', ...' if len(entries) > 3 else '')
