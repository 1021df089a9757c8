"""The files of a hypernetwork, read as if a stranger had written them: nothing is allocated before it is checked.

A weights file is safetensors: eight bytes with the length of a JSON header, the header (name, type, shape and place of
every tensor), the tensors. No pickle and no code is read from anywhere. What is written, here and in other rooms,
appears whole or not at all (`written_whole`, `folder_written_whole`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from timm_pudnet.config import DamagedFileError, InputError, NotFoundError, OutputExistsError, PudNetConfig, shown

CONFIG_NAME = 'config.json'
WEIGHTS_NAME = 'model.safetensors'
INDEX_NAME = 'model.safetensors.index.json'
HASHES_NAME = 'sha256.json'  # of every published file, by name
SHARD = re.compile(r'model-\d{5}-of-\d{5}\.safetensors')
# Of a config, how a hypernetwork came about and what it is called; all the rest changes what it predicts.
HISTORY = ('training', 'library_versions', 'class_names', 'tag')

MAX_JSON_BYTES = 4_000_000  # parsed, at most 130 MB of Python objects
MAX_DEPTH = 32
DTYPES = {
    'F64': torch.float64,
    'F32': torch.float32,
    'F16': torch.float16,
    'BF16': torch.bfloat16,
    'I64': torch.int64,
    'I32': torch.int32,
    'I16': torch.int16,
    'I8': torch.int8,
    'U8': torch.uint8,
    'BOOL': torch.bool,
}
OF_THE_SYSTEM = ('.DS_Store', 'desktop.ini', 'Thumbs.db')  # that macOS and Windows leave in folders


@dataclass(frozen=True)
class Entry:
    """Where a weights file holds a tensor.

    Args:
        dtype: Type of its scalars.
        shape: Its shape.
        start: First byte, counted from the end of the header.
        end: The byte after its last.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a disk or a quota


def local_path(text: str | os.PathLike[str]) -> Path:
    """A path with its `~` put in full, where that names somebody's home."""
    return Path(os.path.expanduser(os.fspath(text)))


def folder_path(folder: str | os.PathLike[str], remedy: str = 'pull or load it by its name') -> Path:
    """The path of a folder, before which a text may have timm's prefix `local-dir:`.

    Raises:
        InputError: It has the prefix of the Hub, or is empty.
    """
    if isinstance(folder, str):
        if folder.startswith(('hf-hub:', 'hf_hub:')):
            raise InputError(f'{folder} is no folder but a name on the Hub: {remedy}')
        folder = folder.removeprefix('local-dir:')
    if not os.fspath(folder):  # which for a path is the folder that one is in
        raise InputError('an empty name: give that of a folder, "." for the one that you are in')
    return local_path(folder)


def has_separator(text: str) -> bool:
    """Whether a text can only be a path, and no plain name: `/` separates on Windows too."""
    return '/' in text or os.sep in text


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds.

    Raises:
        DamagedFileError: It is no JSON, larger than any of ours, nested too deeply, or holds NaN or Infinity.
    """
    path = Path(path)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise DamagedFileError(f'{path} has {path.stat().st_size:,} bytes, at most {MAX_JSON_BYTES:,} are read')
    with path.open('rb') as file:
        return parse_json(file.read(MAX_JSON_BYTES), str(path))


def parse_json(text: bytes, where: str) -> Any:
    """The JSON in these bytes; `where` names them in errors.

    Raises:
        DamagedFileError: As `read_json`.
    """
    try:
        found = json.loads(text.decode('utf-8'), parse_constant=_refuse_constant)
    except RecursionError:
        raise DamagedFileError(f'{where} is nested too deeply') from None
    except ValueError as error:
        raise DamagedFileError(f'{where} is not JSON: {shown(str(error), 200)}') from error
    level, depth = [found], 0
    while level := [item for node in level if isinstance(node, (dict, list)) for item in _items(node)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise DamagedFileError(f'{where} is nested too deeply')
    return found


def _items(node: dict[str, Any] | list[Any]) -> list[Any]:
    return [item for item in (node.values() if isinstance(node, dict) else node) if isinstance(item, (dict, list))]


def _refuse_constant(name: str) -> None:
    raise ValueError(f'{name} is no number of JSON')


def weight_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The weights files of a hypernetwork's folder: one, or the shards that its index names.

    Raises:
        NotFoundError: There are none.
        DamagedFileError: The index is damaged, names something else than a shard beside it, or a shard is not there.
    """
    folder = Path(folder)
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    if not (folder / INDEX_NAME).is_file():
        raise NotFoundError(f'{folder} is no hypernetwork: it has no {WEIGHTS_NAME}')
    names = sorted(set(read_index(folder / INDEX_NAME).values()))
    for name in names:
        if not (folder / name).is_file():
            raise DamagedFileError(f'{folder / INDEX_NAME} names {name}, which is not there: fetch the folder again')
    return [folder / name for name in names]


def read_index(path: Path) -> dict[str, str]:
    """Shard of every tensor, by the index beside the shards.

    Raises:
        DamagedFileError: It is damaged, or a shard's name is no plain `model-00001-of-00002.safetensors`.
    """
    found = read_json(path)
    weight_map = found.get('weight_map') if isinstance(found, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedFileError(f'{path} has no weight_map')
    for name in weight_map.values():
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            raise DamagedFileError(f'{path}: {shown(name)} is no name of a shard; refused')
    return weight_map


def read_header(path: Path) -> tuple[int, dict[str, Entry]]:
    """Length in bytes of what stands before the tensors, and the place of each; checked against the file's size.

    Raises:
        DamagedFileError: The header is damaged, or the file ends before or after its last tensor.
    """
    size = path.stat().st_size
    with path.open('rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        if size < 8 or length > size - 8:
            raise DamagedFileError(f'{path} is damaged (it ends in its header): fetch or write it again')
        if length > MAX_JSON_BYTES:
            raise DamagedFileError(f'{path}: its header has {length:,} bytes, at most {MAX_JSON_BYTES:,} are read')
        header = parse_json(file.read(length), f'the header of {path}')
    if not isinstance(header, dict):
        raise DamagedFileError(f'{path} is damaged (its header is no object)')
    header.pop('__metadata__', None)
    entries = {name: _entry(path, name, found) for name, found in header.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            raise DamagedFileError(f'{path} is damaged (tensor {shown(name)} is not where the one before it ends)')
        end = entry.end
    if 8 + length + end != size:
        raise DamagedFileError(
            f'{path} is damaged ({size:,} bytes, its header says {8 + length + end:,}): fetch or write it again'
        )
    return 8 + length, entries


def has_all_bytes(path: Path) -> bool:
    """Whether a weights file is as long as its header says; a glance, `read_header` looks closely."""
    with path.open('rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        header = file.read(min(length, MAX_JSON_BYTES))
    ends = re.findall(rb'"data_offsets":\s*\[\s*\d+\s*,\s*(\d{1,18})\s*\]', header)
    return path.stat().st_size == 8 + length + max(map(int, ends), default=0)


def _entry(path: Path, name: str, found: Any) -> Entry:
    try:
        dtype, shape, (start, end) = DTYPES[found['dtype']], found['shape'], found['data_offsets']
        numbers = [*shape, start, end]
    except (KeyError, TypeError, ValueError):
        numbers = [-1]
    if not all(type(number) is int and 0 <= number < 2**48 for number in numbers) or len(numbers) > 10:
        raise DamagedFileError(f'{path}: the header says nothing usable of tensor {shown(name)}')
    *shape, start, end = numbers
    if end - start != math.prod(shape) * dtype.itemsize:
        raise DamagedFileError(f'{path}: tensor {shown(name)} of shape {tuple(shape)} has {end - start:,} bytes')
    return Entry(dtype, tuple(shape), start, end)


@dataclass
class Stored:
    """A weights file as it was read.

    Args:
        path: The file.
        start: Bytes before the first tensor.
        entries: Place of every tensor.
        data: All of the file's bytes.
    """

    path: Path
    start: int
    entries: dict[str, Entry]
    data: bytes


def read_weights(folder: str | os.PathLike[str]) -> list[Stored]:
    """The weights files of a hypernetwork's folder; takes the memory of their size and no more.

    Raises:
        NotFoundError: There is no weights file.
        DamagedFileError: A file is damaged.
    """
    found = []
    for path in weight_files(folder):
        start, entries = read_header(path)
        # Read as one block, not mapped: once that is given back, the allocator keeps blocks of any layer's size for
        # the next kernels, instead of fetching fresh pages for each generation (glibc's dynamic threshold).
        data = path.read_bytes()
        if len(data) != start + max((entry.end for entry in entries.values()), default=0):
            raise DamagedFileError(f'{path} is damaged (it changed while it was read)')
        found.append(Stored(path, start, entries, data))
    return found


def as_tensors(stored: list[Stored], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of weights files, in the types that are expected of them; uses `stored` up.

    Names, shapes and types are all compared before the first tensor is made.

    Args:
        stored: What `read_weights` gave.
        expected: Tensors of the right shape and type, on the meta device for instance.

    Raises:
        DamagedFileError: A tensor is missing, extra, of another shape or type, or not finite.
    """
    where = {key: file.path for file in stored for key in file.entries}
    home = stored[0].path if len(stored) == 1 else stored[0].path.with_name(INDEX_NAME)
    if sum(len(file.entries) for file in stored) != len(where):
        raise DamagedFileError(f'{home}: a tensor stands in two of its shards')
    for key in sorted(expected.keys() ^ where.keys()):
        what = 'missing' if key in expected else 'not expected'
        raise DamagedFileError(f'{where.get(key, home)}: tensor {shown(key)} is {what}')
    for file in stored:
        for key, entry in file.entries.items():
            wanted = expected[key]
            if entry.shape != tuple(wanted.shape):
                raise DamagedFileError(
                    f'{file.path}: tensor {key} has shape {entry.shape}, its config asks for {tuple(wanted.shape)}'
                )
            narrow = wanted.is_floating_point() and entry.dtype in (torch.float16, torch.bfloat16)
            if entry.dtype != wanted.dtype and not narrow:
                raise DamagedFileError(f'{file.path}: tensor {key} is of {entry.dtype}, not of {wanted.dtype}')
    state = {}
    while stored:
        file = stored.pop()
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'The given buffer is not writable')  # nor is it written to
            block = torch.frombuffer(file.data, dtype=torch.uint8)
        for key, entry in file.entries.items():
            start, end = file.start + entry.start, file.start + entry.end
            held = block[start:end].clone() if start % entry.dtype.itemsize else block[start:end]
            # A copy, since the block's tensors are aligned by chance, and kernels round by alignment.
            value = held.view(entry.dtype).view(entry.shape).to(expected[key].dtype, copy=True)
            # One sum finds any NaN or infinity at the cost of reading the tensor once.
            if value.is_floating_point() and not value.sum().isfinite():
                raise DamagedFileError(f'{file.path}: tensor {key} holds values that are not finite')
            state[key] = value
    return state


def sha256(content: bytes | Path) -> str:
    """The sha256 of bytes, or of a file, in hexadecimal digits."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def weights_sha256(folder: str | os.PathLike[str]) -> dict[str, str]:
    """The sha256 of every weights file of a hypernetwork's folder, by file name.

    Results that were measured name it, so that whoever publishes the folder can tell whether they are of these weights.
    """
    return {path.name: sha256(path) for path in weight_files(folder)}


def config_sha256(folder: str | os.PathLike[str]) -> str:
    """The sha256 of what in the config of a hypernetwork's folder changes its predictions, whatever it came from."""
    config = read_json(Path(folder) / CONFIG_NAME)
    settings = {key: value for key, value in config.items() if key not in HISTORY}
    return sha256(json.dumps(settings, sort_keys=True).encode())


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file; a failure, a full disk for instance, is an OSError."""
    try:
        safetensors.torch.save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f'{path.parent} cannot be written: {error}') from error


def read_config(path: Path) -> PudNetConfig:
    """The config of a hypernetwork.

    Raises:
        DamagedFileError: It is no JSON, of a newer format, or a value is missing or out of range.
    """
    try:
        return PudNetConfig.from_dict(read_json(path))
    except DamagedFileError as error:
        text = str(error)
        raise DamagedFileError(text if text.startswith(str(path)) else f'{path}: {text}') from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to, renamed when the block ends well; nothing is left when it fails."""
    handle, name = tempfile.mkstemp(prefix=f'.{path.name}.', dir=path.parent)
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        with suppress(OSError):  # some file systems have no modes
            beside.chmod(0o666 & ~_umask())
        _replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def names_in(folder: Path) -> set[str]:
    """Names of what lies in a folder, but for what an operating system leaves there."""
    return {path.name for path in folder.iterdir()} - {*OF_THE_SYSTEM}


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """Gives a folder to fill, beside `folder` and renamed when the block ends well; nothing is left when it fails.

    An empty folder that is there already, which may be a mount or a link, stays itself: it is filled.
    """
    there = folder.is_dir()
    beside = Path(tempfile.mkdtemp(prefix=f'.{folder.name}.', dir=folder if there else folder.parent))
    try:
        yield beside
        mask = _umask()
        for path in (beside, *beside.rglob('*')):  # safetensors and mkdtemp make them for their owner alone
            with suppress(OSError):  # some file systems have no modes
                path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        if not there:
            try:
                _replace(beside, folder)
            except OSError as error:
                if not os.path.lexists(folder):
                    raise
                raise OutputExistsError(f'{folder} was made meanwhile: choose another output folder') from error
            return
        if others := names_in(folder) - {beside.name}:
            raise OutputExistsError(f'{folder} has got {min(others)} meanwhile: choose another output folder')
        names = [path.name for path in beside.iterdir()]
        try:
            for name in names:
                _replace(beside / name, folder / name)
        except OSError:
            for name in names:
                if (folder / name).exists():
                    _replace(folder / name, beside / name)
            raise
    except OSError as error:
        if error.filename is None and error.errno in FULL:  # of a file that was open
            raise OSError(f'{folder} cannot be written: {error.strerror}') from error
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _replace(source: Path, target: Path) -> None:
    """`os.replace`; on Windows again and again for some seconds, where a virus scanner or an indexer holds a file."""
    for wait in (0.1, 0.3, 1.0, 3.0):
        try:
            os.replace(source, target)
            return
        except OSError as error:
            if getattr(error, 'winerror', None) not in (5, 32, 33):
                raise
            time.sleep(wait)
    os.replace(source, target)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
