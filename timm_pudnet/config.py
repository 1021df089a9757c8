"""What a hypernetwork is made of (its config) and everything that can go wrong with it (the error classes)."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import unicodedata
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

__version__ = '0.1.0'
FORMAT_VERSION = 1
# Statistics of so many images' weight are taken from training, so that a handful of images calibrates a network too.
PRIOR_IMAGES = 8.0
MOST_SEED = 2**31 - 1
MIN_PREDICTED = 0.5  # of a target's weights, below which it is refused
_CONTROL = re.compile(r'[\x00-\x1f\x7f-\x9f]')


class PudNetError(Exception):
    """Base of every error that this package raises on purpose: one line that names the thing and the remedy."""


class InputError(PudNetError, ValueError):
    """What the caller handed over cannot be used."""


class NotFoundError(PudNetError, FileNotFoundError):
    """A file, folder or hypernetwork that was named is not there."""


class OutputExistsError(PudNetError, FileExistsError):
    """Writing would have overwritten something in silence."""


class UnsupportedTargetError(PudNetError, ValueError):
    """The architecture has a part that no hypernetwork of ours can fill, or none made for it was given."""


class DamagedFileError(PudNetError, ValueError):
    """A hypernetwork's or checkpoint's file is truncated, incomplete or not what its config says."""


class HubError(PudNetError, OSError):
    """The Hugging Face Hub cannot be asked, or refuses."""

    passing = False  # whether it may pass when tried again


class PudNetWarning(UserWarning):
    """Something was skipped, dropped or adapted; the text says what and how often."""


def close_names(name: str, known: Iterable[str]) -> str:
    """A ' Did you mean ...?' tail for an error line, or an empty string.

    Example:
        >>> close_names('resnet81', ['resnet18', 'vgg16'])
        ' Did you mean resnet18?'
    """
    found = difflib.get_close_matches(name, list(known), n=3)
    return f' Did you mean {", ".join(found)}?' if found else ''


def shown(name: object, most: int = 80) -> str:
    r"""A name out of a file as an error line can show it: no control characters, not too long.

    Example:
        >>> shown('conv.weight'), shown('\x1b[2J')
        ('conv.weight', "'\\x1b[2J'")
    """
    text = name if isinstance(name, str) and name.isprintable() else repr(name)
    return text if len(text) <= most else f'{text[:most]}...'


def name_key(name: str) -> str:
    """What two spellings of a class's name have in common: all but case and what separates words.

    Example:
        >>> name_key('T-shirt/top') == name_key('t_shirt top'), name_key('1.0') == name_key('10')
        (True, False)
    """
    text = unicodedata.normalize('NFC', name).casefold()  # file systems spell accents in two ways
    text = re.sub(r'(?<![^\W\d_])[.,-](?=\d)', '·', text)  # a sign or a point of a number separates nothing
    return re.sub(r'[\s_/.,-]+', '', text) or name


def same_names(names: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """Those of a set's class names that are among others, spelled otherwise too, with the other spelling.

    What the set spells as the others do is that very class there, so no further class of the set is (`A` beside `a`).

    Example:
        >>> same_names(['T-shirt-top', 'Bag', 'a', 'A'], ['T-shirt/top', 'A', 'Coat'])
        {'T-shirt-top': 'T-shirt/top', 'A': 'A'}
    """
    names, others = list(names), set(others)
    exact = others.intersection(names)
    known = {name_key(other): other for other in sorted(others - exact)}
    found = {name: name if name in exact else known.get(name_key(name)) for name in names}
    return {name: other for name, other in found.items() if other is not None}


def are_numbers(names: Iterable[str]) -> bool:
    """Whether class names are only the numbers of the classes, which say nothing of what these are.

    Example:
        >>> are_numbers(['0', '1']), are_numbers(['1', '2']), are_numbers(['cup', 'jar'])
        (True, False, False)
    """
    return all(name == str(number) for number, name in enumerate(names))


def spelled(name: str, other: str) -> str:
    """A class's name in an error line, with the spelling that it has elsewhere."""
    return repr(name) if name == other else f'{name!r} ({other!r} there)'


def first_line(error: BaseException) -> str:
    r"""The first line of what another library raised; the name of the error where it says nothing.

    Example:
        >>> first_line(OSError('no network\nat all')), first_line(MemoryError())
        ('no network', 'MemoryError')
    """
    return (str(error).splitlines() or [''])[0] or type(error).__name__


def reject_unknown_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises InputError for the first key that is not known, naming the close ones."""
    known = list(known)
    for key in given:
        if key not in known:
            raise InputError(f'{where}: unknown key {key!r}.{close_names(key, known) or " Known: " + ", ".join(known)}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputConfig:
    """How an image becomes the target's input; the names are those of timm's data config.

    Args:
        input_size: `(channels, height, width)` in pixels; 1, 3 or 4 channels.
        mean: Per channel, in the 0-1 range of pixel values.
        std: Per channel, in the 0-1 range of pixel values.
        interpolation: A name that timm's transforms know.
        crop_pct: Share of the resized image that the crop keeps, in (0, 1].
        crop_mode: `center`, `squash` or `border`, as in timm.

    Raises:
        InputError: A value is out of range.
    """

    input_size: tuple[int, int, int] = (3, 32, 32)
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: str = 'bicubic'
    crop_pct: float = 1.0
    crop_mode: str = 'center'

    def __post_init__(self) -> None:
        _check_types(self)
        size = self.input_size
        if len(size) != 3 or not all(isinstance(side, int) and 0 < side <= 16384 for side in size):
            raise InputError(f'input_size must be (channels, height, width) with sides in 1-16384, got {size}')
        if size[0] not in (1, 3, 4):
            raise InputError(f'input_size: {size[0]} channels; images have 1, 3 or 4')
        for name in ('mean', 'std'):
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) != size[0] or not all(math.isfinite(value) for value in values):
                raise InputError(f'{name} must be {size[0]} finite numbers, one a channel, got {values}')
            object.__setattr__(self, name, values)
        if min(self.std) <= 0:
            raise InputError(f'std must be above zero, got {self.std}')
        if not -1 <= min(self.mean) <= max(self.mean) <= 2:
            raise InputError(f'mean is that of pixels in 0-1, got {self.mean}: divide mean and std by 255?')
        if self.interpolation not in ('nearest', 'bilinear', 'bicubic', 'lanczos', 'box', 'hamming'):
            raise InputError(
                f'interpolation {self.interpolation!r}: use bilinear, bicubic, nearest, lanczos, box, hamming'
            )
        if not 0 < self.crop_pct <= 1:
            raise InputError(f'crop_pct must be in (0, 1], got {self.crop_pct}')
        if self.crop_mode not in ('center', 'squash', 'border'):
            raise InputError(f'crop_mode {self.crop_mode!r}: use center, squash or border')


class Calibration(TypedDict):
    """Arguments of `adapt.calibrate` that a config has."""

    prior_images: float
    deep_share: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PudNetConfig:
    """Everything but the weights that a hypernetwork needs to be used; stored as `config.json` beside them.

    Args:
        model_name: timm architecture of the target, without a tag.
        model_kwargs: Arguments of `timm.create_model` that change the target's weights (not `num_classes`).
        input: How images become the target's input.
        sketch_width: `m`, width of the dataset sketch and of the AHRU's state.
        sketch_channels: Channels of the first two blocks of the sketch encoder; the third has `sketch_width`.
        eta: Share of the sketch in the initial residual (eq. 5), in [0, 1].
        context: Whether the AHRU walks the layers; without it every layer's code is the sketch (an ablation).
        generator: Kind of weight generator, a name of the registry.
        generator_kwargs: Arguments of that kind.
        predict_norm: Whether the affine parameters of norm layers are predicted too, instead of shared.
        norm_rank: Rank of the change of each of them by the sketch, where it has more channels than the sketch; 0 for
            any rank. Networks with many norms (MobileNets) have hypernetworks of nearly twice their size without it.
        predict_linear: Whether the weights of Linear layers inside blocks are predicted too, as 1x1 convs.
        min_predicted: Least share of the target's weights that must be predicted, in [0, 1].
        gain: Predicted kernels are scaled by `sqrt(gain / fan_in)`.
        prior_images: Weight, in images, of the norm statistics of training when a model is calibrated.
        deep_share: Upper limit, in [0, 1], on the weight of the given images in every norm but the first. A network
            that was trained with fixed statistics works best with those; most of what calibration is worth is the first
            norm's, which sees brightness and contrast.
        sketch_limit: Longer sketches are shortened to this norm; 0 for none. Meta-training of classifiers sets it,
            where it is 0, to the longest norm of its own sketches: images of kinds that it never saw have sketches
            of any length.
        sketch_gate: Whether the sketch changes the base network only where it shows that the images were taken
            otherwise than those of training (`sketch.SketchGate`).
        tag: The part of a hypernetwork's name after the architecture, `cifar100_set` for instance.
        class_names: Classes seen in training.
        training: What training cost: images seen (`sketch_images`: by the sketch encoder alone), seconds, machine; the
            digest of the recipe and what it started from.
        library_versions: Versions of the libraries that wrote the file.

    Raises:
        InputError: A value is out of range.

    Example:
        >>> PudNetConfig(model_name='resnet18').sketch_width
        128
    """

    model_name: str
    model_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    input: InputConfig = dataclasses.field(default_factory=InputConfig)
    sketch_width: int = 128
    sketch_channels: tuple[int, int] = (16, 32)
    eta: float = 0.5
    context: bool = True
    generator: str = 'paper'
    generator_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    predict_norm: bool = False
    norm_rank: int = 0
    predict_linear: bool = False
    min_predicted: float = MIN_PREDICTED
    gain: float = 2.0
    prior_images: float = PRIOR_IMAGES
    deep_share: float = 1.0
    sketch_limit: float = 0.0
    sketch_gate: bool = False
    tag: str = ''
    class_names: tuple[str, ...] = ()
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    library_versions: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_types(self)
        if not self.model_name:
            raise InputError('model_name must be the name of a timm architecture, resnet18 for instance')
        if not 1 <= self.sketch_width <= 8192:
            raise InputError(f'sketch_width must be in 1-8192, got {self.sketch_width}')
        if not re.fullmatch(r'[A-Za-z0-9_.+-]*', self.tag) or '..' in self.tag:
            raise InputError(f'tag must be letters, digits, dots, - and _, got {self.tag!r}')
        if any(_CONTROL.search(name) for name in self.class_names):
            raise InputError('class_names must be texts without control characters')
        channels = self.sketch_channels
        if len(channels) != 2 or not all(isinstance(width, int) and 1 <= width <= 8192 for width in channels):
            raise InputError(f'sketch_channels must be two widths in 1-8192, got {channels}')
        for name in ('model_kwargs', 'generator_kwargs'):
            object.__setattr__(self, name, _as_json(getattr(self, name)))
        _check_model_kwargs(self.model_kwargs)  # else what comes of it could not be read again
        for name in ('eta', 'min_predicted', 'deep_share'):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f'{name} must be in [0, 1], got {getattr(self, name)}')
        for name in ('prior_images', 'sketch_limit', 'norm_rank'):
            if getattr(self, name) < 0:
                raise InputError(f'{name} must be at least 0, got {getattr(self, name)}')
        if self.gain <= 0:
            raise InputError(f'gain must be above zero, got {self.gain}')

    @property
    def calibration(self) -> Calibration:
        """What `adapt.calibrate` is told of it."""
        return {'prior_images': self.prior_images, 'deep_share': self.deep_share}

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON can hold it, with the version of the format."""
        return {'format_version': FORMAT_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PudNetConfig:
        """Reads what `to_dict` gave, perhaps by another version of this library.

        Raises:
            DamagedFileError: The format is newer than this library, or a value is missing or of the wrong type.
        """
        if not isinstance(data, Mapping):
            raise DamagedFileError(f'holds a {type(data).__name__}, not an object')
        version = data.get('format_version')
        if version is None:
            raise DamagedFileError('is not the config of a hypernetwork: it has no format_version')
        if version != FORMAT_VERSION:
            raise DamagedFileError(
                f'format version {shown(version)}, this library reads {FORMAT_VERSION}: update timm-pudnet'
            )
        try:
            values = _known('config.json', cls, data, {'format_version'})
            given = data.get('input', {})
            if not isinstance(given, Mapping):
                raise InputError(f'input must be an object, got {shown(given)}')
            values['input'] = InputConfig(**_known('config.json, input', InputConfig, given))
            return cls(**values)
        except (TypeError, AttributeError, ValueError, OverflowError) as error:
            raise DamagedFileError(str(error)) from error


def _known(where: str, cls: type, data: Mapping[str, Any], others: Iterable[str] = ()) -> dict[str, Any]:
    """The values that a config class knows; warns of any others."""
    fields = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(data) - fields - set(others))
    if unknown:
        names = ', '.join(map(shown, unknown[:10]))
        warnings.warn(
            f'{where}: ignored {names}, which this version of timm-pudnet does not know', PudNetWarning, stacklevel=4
        )
    return {key: value for key, value in data.items() if key in fields}


def _check_types(config: Any) -> None:
    """Brings numbers and arrays of numpy and torch to Python's; refuses values of other types than the defaults have.

    A file that holds such could not be read.
    """
    for field in dataclasses.fields(config):
        key, value = field.name, as_plain(getattr(config, field.name))
        default = field.default_factory() if callable(field.default_factory) else field.default
        if isinstance(default, tuple) and isinstance(value, Iterable) and not isinstance(value, (str, Mapping)):
            value = tuple(map(as_plain, value))
        object.__setattr__(config, key, value)
        wanted = str if default is dataclasses.MISSING else list if isinstance(default, tuple) else type(default)
        if not _is_json(value, wanted):
            raise InputError(f'{key} must be a {wanted.__name__}, got {shown(value)}')
        kinds = str if key == 'class_names' else (int, float)
        if wanted is list and any(isinstance(item, bool) or not isinstance(item, kinds) for item in value):
            raise InputError(f'{key} holds values of a wrong type: {shown(value)}')


def _is_json(value: Any, wanted: type) -> bool:
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    kinds = (list, tuple) if wanted is list else wanted
    return isinstance(value, kinds) and isinstance(value, bool) == (wanted is bool)


# Arguments of timm.create_model that would fetch, unpickle or change something else than the architecture.
_NOT_FROM_A_FILE = {'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'pretrained_strict', 'checkpoint_path'}
_NOT_FROM_A_FILE |= {'cache_dir', 'num_classes', 'scriptable', 'exportable', 'no_jit', 'features_only'}
_NOT_FROM_A_FILE |= {'device', 'dtype'}  # which would take memory, where the meta device takes none


def as_plain(value: Any) -> Any:
    """Python's own numbers, and lists of them, in place of numpy's and torch's."""
    return value.tolist() if hasattr(value, 'tolist') else value


def checked_seed(seed: Any) -> int:
    """A seed of random numbers as Python's own whole number.

    Raises:
        InputError: It is none, or out of range.
    """
    seed = as_plain(seed)
    if not isinstance(seed, int) or not 0 <= seed <= MOST_SEED:
        raise InputError(f'seed must be a whole number from 0 to {MOST_SEED}, got {shown(seed)}')
    return seed


def _as_json(value: Any) -> Any:
    """With lists in place of tuples, as JSON gives it back, and Python's own numbers."""
    if isinstance(value, dict):
        return {key: _as_json(inner) for key, inner in value.items()}
    return [_as_json(inner) for inner in value] if isinstance(value, (list, tuple)) else as_plain(value)


def _check_model_kwargs(given: Mapping[str, Any]) -> None:
    """Refuses what no architecture needs: a stranger may have written it, and timm builds whatever it is told to."""

    def plain(value: Any, depth: int) -> bool:
        if isinstance(value, (list, dict)):
            inner = list(value.values()) if isinstance(value, dict) else value
            return depth > 0 and len(inner) <= 32 and all(plain(item, depth - 1) for item in inner)
        if isinstance(value, str):
            return len(value) <= 100 and value.isprintable()
        return value is None or (isinstance(value, (bool, int, float)) and abs(value) <= 8192)

    for key, value in given.items():
        if key in _NOT_FROM_A_FILE:
            raise InputError(f'model_kwargs: {key} is no part of an architecture; refused')
        if len(given) > 32 or not plain(key, 0) or not plain(value, 2):
            raise InputError(f'model_kwargs: {shown(key)} is {shown(value)}; no architecture needs that, refused')
