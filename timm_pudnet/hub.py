"""Which hypernetwork serves a name: those that ship with the package, and folders."""

from __future__ import annotations

import os
from pathlib import Path

from timm_pudnet.config import (
    InputError,
    NotFoundError,
    PudNetConfig,
    UnsupportedTargetError,
    close_names,
)
from timm_pudnet.hypernet import CONFIG_NAME, PudNet, read_config
from timm_pudnet.target import check_architecture, describe_target

# Which of several that ship with the package serves an architecture: the one for the widest kind of images.
DEFAULTS = {'resnet18': 'resnet18.mixed'}


def _shelves() -> list[Path]:
    """Folders that hold one hypernetwork a subfolder: the wheel's, and the checkout's of an editable install."""
    package = Path(__file__).resolve().parent
    shelves = [package / 'embedded']
    if (package.parent / 'pyproject.toml').is_file():
        shelves.append(package.parent / 'hub')
    return [shelf for shelf in shelves if shelf.is_dir()]


def embedded() -> dict[str, Path]:
    """Folder of every hypernetwork that ships with the package, by its name `architecture.tag`."""
    found = {}
    for shelf in _shelves():
        for path in sorted(shelf.glob(f'*/{CONFIG_NAME}')):
            found.setdefault(path.parent.name, path.parent)
    return found


def list_hypernets() -> dict[str, PudNetConfig]:
    """Config of every hypernetwork at hand, by name; `results.json` beside it says what was measured.

    Example:
        >>> 'resnet18.fashion_set' in list_hypernets()
        True
    """
    return {name: read_config(folder / CONFIG_NAME) for name, folder in embedded().items()}


def load_hypernet(name: str | os.PathLike[str]) -> PudNet:
    """Loads a hypernetwork, ready to predict.

    Args:
        name: An architecture (`resnet18`: the hypernetwork that serves it), the name of one that ships with the package
            (`resnet18.fashion_set`), or a folder that `PudNet.save_pretrained` wrote.

    Raises:
        NotFoundError: Nothing has that name; the close ones are named.
        UnsupportedTargetError: timm knows the architecture, but no hypernetwork serves it.
        DamagedFileError: Its files are damaged.

    Example:
        >>> load_hypernet('resnet18').name
        'resnet18.mixed'
    """
    return PudNet.from_pretrained(_folder(name))


def _folder(name: str | os.PathLike[str]) -> Path:
    if not isinstance(name, (str, os.PathLike)):
        raise InputError(f'hypernet must be a PudNet, a folder or a name, not a {type(name).__name__}')
    # A name of ours goes before a folder of the same name, which ./NAME still reaches.
    text, at_hand = os.fspath(name), embedded()
    if text in at_hand or DEFAULTS.get(text) in at_hand:
        return at_hand[text if text in at_hand else DEFAULTS[text]]
    serving = [folder for key, folder in at_hand.items() if text == key.split('.')[0]]
    if serving:
        return serving[0]
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    known = f'At hand: {", ".join(at_hand) or "none"}'
    if os.sep in text or not isinstance(name, str):
        raise NotFoundError(f'{text}: no such folder of a hypernetwork. {known}')
    if '.' not in text:
        describe_target(text)  # says what is wrong with the architecture, if anything
        raise UnsupportedTargetError(
            f'no hypernetwork predicts {text}. {known}. Train one (timm-pudnet train) or name its folder'
        )
    raise NotFoundError(f'no hypernetwork {text!r}.{close_names(text, at_hand)} {known}; a folder will do too')


def resolve_hypernet(model_name: str, hypernet: PudNet | str | os.PathLike[str] | None) -> PudNet:
    """The hypernetwork to use for an architecture.

    Raises:
        InputError: timm does not know the architecture.
        UnsupportedTargetError: The hypernetwork was made for another architecture.
    """
    check_architecture(model_name)
    found = hypernet if isinstance(hypernet, PudNet) else load_hypernet(model_name if hypernet is None else hypernet)
    if found.config.model_name != model_name:
        raise UnsupportedTargetError(
            f'hypernetwork {found.name} predicts {found.config.model_name}, not {model_name}: '
            f'pass another hypernet, or predict {found.config.model_name}'
        )
    return found
