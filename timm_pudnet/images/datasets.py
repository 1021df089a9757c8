"""Labels in every form, and what datasets, DataLoaders and the names of timm's datasets hold."""

from __future__ import annotations

import bisect
import dataclasses
import importlib.util
import math
import operator
import os
import traceback
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.dataset import ImageDataset
from timm.data.dataset_factory import create_dataset
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

from timm_pudnet.config import InputError, NotFoundError, first_line, shown
from timm_pudnet.images.folders import SPLIT_NAMES, are_splits, holds_images, natural_key, warn
from timm_pudnet.images.pixels import open_image, values_of

_TIMM_PACKAGES = {  # prefix of a timm dataset name: (module, name to install)
    'torch': ('torchvision', 'torchvision'),
    'hfds': ('datasets', 'datasets'),
    'hfids': ('datasets', 'datasets'),
    'wds': ('webdataset', 'webdataset'),
    'tfds': ('tensorflow_datasets', 'tensorflow-datasets'),
}
# Of which timm gives the test images for whatever is not called train or training.
TRAIN_OR_TEST = {'cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist', 'qmnist'}


def index_labels(values: Any, names: Sequence[str] | None = None) -> tuple[Tensor, tuple[str, ...] | None]:
    """Labels as 0 to k - 1, int64 `[n]`, and class names; `names` are those of the numbers, where known."""
    if isinstance(values, Tensor):
        values = values_of(values, 'labels').numpy()
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
    labels = to_label_tensor(values, 'labels')
    unique, numbers = labels.unique(return_inverse=True)
    k = len(unique)
    if names is not None and k and unique[0] >= 0 and unique[-1] < len(names):
        return numbers, tuple(str(names[number]) for number in unique.tolist())
    if unique.tolist() == list(range(k)):
        return labels, None
    return numbers, tuple(str(number) for number in unique.tolist())


def _column(values: Any) -> Any:
    """Labels `[n, 1]` as `[n]`; others as they are."""
    if getattr(values, 'ndim', 1) != 2 or values.shape[1] != 1:
        return values
    return (values.to_numpy() if hasattr(values, 'to_numpy') else values)[:, 0]


def to_label_tensor(values: Any, where: str) -> Tensor:
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


def is_batched(data: Any) -> bool:
    """Whether it gives batches, and not images one by one."""
    return isinstance(data, DataLoader) and not (data.batch_size is None and data.batch_sampler is None)


def split_item(item: Any, where: str, batched: bool = False) -> tuple[Any, Any]:
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


def item_or_error(dataset: Any, position: int, where: str) -> tuple[Any, Any]:
    """Image and label of what a dataset has there; in place of an image that cannot be read the error, and -1."""
    item = item_of(dataset, position)
    return (item, -1) if isinstance(item, Exception) else split_item(item, where)


def listed_item(images: Any, position: int) -> Any:
    """What a list or column has there, or what is wrong with the image that a column cannot decode."""
    item = item_of(images, position)
    if not isinstance(item, (str, os.PathLike, Image.Image, np.ndarray, Tensor, Exception)):
        kind = f'{type(item).__module__}.{type(item).__name__}'.removeprefix('builtins.')
        raise InputError(f'images[{position}] is a {kind}, not a path, image, array or tensor')
    return item


def item_of(dataset: Any, position: int) -> Any:
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
        if runs_own_code(dataset) and not (_is_library_s(dataset) and _is_of_reading(error)):
            raise
        return error


def _is_of_reading(error: Exception) -> bool:
    """Whether an error comes from within PIL's opening or decoding of a file."""
    frames = [(frame.name, frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    return any(name in ('open', 'load') and os.path.dirname(file).endswith('PIL') for name, file in frames)


def _is_library_s(dataset: Any) -> bool:
    return type(dataset).__module__.startswith(('torchvision.', 'timm.'))


def runs_own_code(dataset: Any) -> bool:
    """Whether code of the user's runs where it gives an image: an error may be one of his."""
    places = ('transform', 'transforms', 'target_transform')
    return not _is_library_s(dataset) or any(getattr(dataset, place, None) is not None for place in places)


def _is_timm_s(dataset: Any) -> bool:
    return isinstance(dataset, ImageDataset) and type(dataset).__getitem__ is ImageDataset.__getitem__


def gives_next(dataset: Any) -> bool:
    """Whether timm's code gives the next image in place of one that cannot be read."""
    if isinstance(dataset, ConcatDataset):
        return any(map(gives_next, dataset.datasets))
    return gives_next(dataset.dataset) if isinstance(dataset, Subset) else _is_timm_s(dataset)


def _timm_item(dataset: Any, position: int) -> Any:
    """What timm's dataset has there; itself it gives the next image and its label in place of one it cannot read."""
    if dataset.load_bytes:
        return dataset[position]
    file, target, *_ = dataset.reader[position]
    try:
        image = open_image(file)
        image = image.convert(dataset.input_img_mode) if dataset.input_img_mode else image
    except Exception:
        file.close()
        raise
    if target is not None and dataset.target_transform is not None:
        target = dataset.target_transform(target)
    return image if dataset.transform is None else dataset.transform(image), -1 if target is None else target


def class_names_of(dataset: Any) -> tuple[str, ...] | None:
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


def dataset_targets(dataset: Any) -> tuple[Tensor | None, tuple[str, ...] | None]:
    """Labels as its items have them, and names of all classes, that a map-style dataset knows without an image."""
    base, chosen = dataset, None
    while isinstance(base, Subset):
        indices = base.indices.tolist() if isinstance(base.indices, Tensor) else list(base.indices)
        base, chosen = base.dataset, indices if chosen is None else [indices[place] for place in chosen]
    if type(base) is ConcatDataset and not (hasattr(base, 'targets') or hasattr(base, 'classes')):
        targets, names = _joined_targets(base.datasets)
    else:
        targets, names = _own_targets(base)
    if targets is None or getattr(base, 'target_transform', None) is not None:
        return None, names
    try:
        values = to_label_tensor(targets, 'targets')[slice(None) if chosen is None else chosen]
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


def _own_targets(dataset: Any) -> tuple[Iterable[Any] | None, tuple[str, ...] | None]:
    """Targets and names of classes as a dataset itself tells them, none where it does not."""
    # The names that torchvision's datasets have for them.
    known = (getattr(dataset, name, None) for name in ('targets', 'labels', '_labels'))
    targets = next(
        (found for found in known if isinstance(found, Iterable) and not isinstance(found, (str, bytes, Mapping))), None
    )
    reader: Any = getattr(dataset, 'reader', None)  # timm's: of a folder, of Hugging Face
    if targets is None and hasattr(reader, 'samples'):
        targets = [target for _, target in reader.samples]
    elif targets is None and hasattr(reader, 'iter_targets'):
        targets = list(reader.iter_targets())
    return targets, class_names_of(dataset)


def _joined_targets(datasets: Sequence[Any]) -> tuple[Tensor | None, tuple[str, ...] | None]:
    """Those of datasets that are joined; none where one of them does not tell."""
    targets, names = zip(*map(dataset_targets, datasets), strict=True)
    if len(named := [*dict.fromkeys(one for one in names if one is not None)]) > 1:
        some = '; '.join(', '.join(map(shown, one[:3])) for one in named[:2])
        raise InputError(f'a ConcatDataset of sets with other classes ({some}; ...): give labels=...')
    if any(part is None for part in targets):
        return None, None
    return torch.cat(targets), None if None in names else names[0]


def check_root(data_dir: str | None, *images: Any, option: str = 'data_dir') -> None:
    """Refuses a `data_dir` where none of the images is the name of a timm dataset."""
    if data_dir is not None and not any_timm_name(*images):
        given = f'{images[0]} is not' if isinstance(images[0], str) else 'these images are not'
        said = option if option.startswith('--') else f'{option}={data_dir!r}'
        raise InputError(
            f'{said} is the root of a timm dataset, and {given} the name of one: leave it out, or name '
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
            warn(
                f'taken as unlabelled: of its columns ({columns}) none is called label, and not one alone holds classes'
            )
        reader.dataset = table.add_column('label', [-1] * len(table))  # timm asks for one


def timm_dataset(
    name: str, data_dir: str | os.PathLike[str] | None, split: str, channels: int, *, strict: bool, with_labels: bool
) -> Dataset:
    """The dataset that timm makes for a name; nothing is downloaded, but for `hfds/...`.

    Raises:
        InputError: A package, `data_dir` or the split is missing, or timm cannot open it.
        NotFoundError: There is no such folder or dataset.
    """
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
    if prefix.startswith('hf') and root is not None and holds_images(root):
        raise InputError(
            f'{name}: data_dir is where the package datasets keeps what it downloads, and {root} holds images: pass '
            'that folder itself as the images'
        )
    if torch_name(name) in TRAIN_OR_TEST and split not in SPLIT_NAMES:
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
    classes = sorted(class_names_of(found) or ()) if takes_folder(name) else []
    if len(classes) > 1 and are_splits(classes):
        raise InputError(f'{name}: {root} has no split {split!r}: name one of {", ".join(classes)}')
    return found
