"""The image files of a folder, with the classes that its subfolders are."""

from __future__ import annotations

import collections
import mimetypes
import os
import re
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from timm_pudnet.config import InputError, NotFoundError, PudNetWarning, close_names, shown

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
_FIRST_BYTES = re.compile(rb'\x89PNG|\xff\xd8\xff|II\*\0|MM\0\*|RIFF....WEBP|GIF8', re.DOTALL)  # of pictures
_KNOWN = mimetypes.MimeTypes()  # not the machine's own table
_MOST_OPENED = 100  # files of an extension, none of which is a picture
SPLIT_NAMES = {
    *('train', 'training', 'val', 'valid', 'validation', 'dev', 'eval', 'evaluation', 'test', 'testing', 'holdout'),
}


def scan_folder(
    root: str, with_labels: bool = True, strict: bool = False
) -> tuple[list[str], list[str], Tensor | None, tuple[str, ...] | None]:
    """Paths, names relative to the folder, labels and class names.

    The last two are None for a flat folder, and for all images below a folder without labels.
    """
    parent, name = os.path.split(os.path.abspath(root))
    if not os.path.exists(root):
        near = close_names(name, os.listdir(parent)) if os.path.isdir(parent) else ''
        raise NotFoundError(f'{root}: no such {"folder" if with_labels else "file or folder"}.{near}')
    if not os.path.isdir(root):
        raise InputError(f'{root} is one file: pass a list of paths, or the folder that holds the images')
    loose: list[str] = []
    found: dict[str, list[str]] = {}
    others: collections.Counter[str] = collections.Counter()
    unread: collections.Counter[str] = collections.Counter()
    opened: collections.Counter[str] = collections.Counter()
    seen = {os.path.realpath(root)}
    for name in _visible_names(root):
        path = os.path.join(root, name)
        # What is the same below two classes is of both.
        files = list(_walk_files(path, {*seen} if with_labels else seen)) if os.path.isdir(path) else [path]
        pictures = [file for file in files if file.lower().endswith(IMAGE_EXTENSIONS)]
        rest = [(*os.path.splitext(file), file) for file in set(files).difference(pictures)]
        others.update(kind or 'no extension' for _, kind, _ in rest)
        if missed := [(stem, kind) for stem, kind, file in rest if _is_picture(file, kind, opened)]:
            read = {os.path.splitext(file)[0] for file in pictures}  # a raw file beside its JPEG is the same picture
            unread.update(kind or 'no extension' for stem, kind in missed if not kind or stem not in read)
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
        warn(f'{root}: ignored {what}')
    if not classes or not with_labels:
        paths = [*loose, *(path for name in classes for path in found[name])]
        return paths, [os.path.relpath(path, root) for path in paths], None, None
    if len(classes) > 1 and are_splits(classes):
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
        warn(f'{root}: ignored {len(loose):,} images beside the class folders')
    splits = [name for name in classes if are_splits([name])]
    if len(splits) > 1 and any('train' in name.lower() for name in splits):
        warn(f'{root}: took {", ".join(splits)} for classes; if they are splits, pass one of them')
    if len(classes) < len(found):
        warn(
            f'{root}: ignored folders without images: {", ".join(shown(name) for name in found if name not in classes)}'
        )
    paths = [path for name in classes for path in found[name]]
    labels = torch.tensor([label for label, name in enumerate(classes) for _ in found[name]])
    return paths, [os.path.relpath(path, root) for path in paths], labels, tuple(map(_decoded, classes))


def _is_picture(file: str, kind: str, opened: collections.Counter[str]) -> bool:
    """Whether a file with an extension that is not read is a picture all the same, by that or by its first bytes.

    `opened` counts files of each extension that were no pictures: where there are many, the rest are not opened.
    """
    if _PICTURE.fullmatch(kind.lower()):
        return True
    if _KNOWN.guess_type(file)[0] is not None or opened[kind] >= _MOST_OPENED or not os.path.isfile(file):
        return False
    try:
        with open(file, 'rb') as content:
            if _FIRST_BYTES.match(content.read(12)):
                return True
    except OSError:
        pass
    opened[kind] += 1
    return False


def _decoded(name: str) -> str:
    """A file's name as UTF-8, where the locale could not decode it."""
    return (
        os.fsencode(name).decode('utf-8', 'backslashreplace')
        if any('\udc80' <= one <= '\udcff' for one in name)
        else name
    )


def _folders_of_images(folder: str, pictures: Sequence[str]) -> list[str]:
    """Names of the folders right below that hold all of these images; none where some lie in it directly."""
    parts = [os.path.relpath(path, folder).split(os.sep) for path in pictures]
    return [] if any(len(part) == 1 for part in parts) else list(dict.fromkeys(part[0] for part in parts))


def warn(text: str) -> None:
    """A warning at the line that opens the images."""
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


def _walk_files(folder: str, seen: set[str]) -> Iterator[str]:
    """Every visible file below; a folder that links lead to twice is read once."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    for name in _visible_names(folder):
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            yield from _walk_files(path, seen)
        else:
            yield path


def holds_images(folder: str) -> bool:
    """Whether images lie in a folder, or in one right below it."""
    below = [os.path.join(folder, name) for name in _visible_names(folder)]
    files = [*below, *(name for path in below if os.path.isdir(path) for name in _visible_names(path))]
    return any(name.lower().endswith(IMAGE_EXTENSIONS) for name in files)


def are_splits(names: Sequence[str]) -> bool:
    """Whether folders of these names are splits of a set (train, val, ...), not classes."""
    plain = (re.sub(r'[ _-]?(set|data|images|split)$', '', name.lower()) for name in names)
    return SPLIT_NAMES.issuperset(plain)
