"""Recipes: small TOML files that say everything about a training run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tomllib
import types
import typing
from collections.abc import Mapping
from typing import Any

from timm_pudnet.config import (
    InputConfig,
    InputError,
    NotFoundError,
    PudNetConfig,
    reject_unknown_keys,
    shown,
)
from timm_pudnet.files import local_path, sha256
from timm_pudnet.target import img_size_of, of_one_size
from timm_pudnet.training.episodes import Augmentation, Groups

# What a hypernetwork's config says of its training, which a recipe cannot know.
_OF_TRAINING = {
    'class_names': 'name the classes to train on in [data] classes',
    'training': 'leave it out',
    'library_versions': 'leave it out',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Where the images come from.

    Args:
        images: A folder, or a timm dataset name such as `torch/fashion_mnist`.
        data_dir: Root of a timm dataset.
        split: Split of a timm dataset.
        classes: Names of the classes to train on; all where empty.
        unseen: Names of classes that are kept for the test: all others are trained on.
        share: How often groups come from this set, where there are several, in any unit.

    Raises:
        InputError: A class is both seen and unseen, or the share is not above zero.
    """

    images: str
    data_dir: str | None = None
    split: str = 'train'
    classes: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    share: float = 1.0

    def __post_init__(self) -> None:
        for name in ('classes', 'unseen'):  # which may be written as numbers
            object.__setattr__(self, name, tuple(map(str, getattr(self, name))))
        both = sorted(set(self.classes) & set(self.unseen))
        if both:
            raise InputError(f'{self.images}: {", ".join(both)} cannot be both in classes (seen) and in unseen')
        if not 0 < self.share < math.inf:
            raise InputError(f'{self.images}: share must be above zero, got {self.share}')

    @property
    def timm_field(self) -> str:
        """Which of the fields that a timm dataset alone has is set; empty where none is."""
        return 'data_dir' if self.data_dir is not None else 'split' if self.split != 'train' else ''


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoising:
    """What a denoiser learns from: groups of noisy patches, each group with noise of its own (paper IV-D).

    Args:
        kinds: Of noise, one drawn for each group: `gaussian`, `poisson`, or `own` for images that are noisy already.
        least: Smallest standard deviation of the noise, for pixels in 0-1; levels are drawn evenly on a log scale.
        most: Largest one. Of Poisson noise it is that of a grey of 0.5.
        clipped: Share of the groups whose noisy pixels are clipped to 0-1, as a file does it.
        grey: Share of the groups that are seen in grey, with noise alike in all channels.
        patch: Side of a patch in pixels; images that are smaller in a direction give smaller ones.
        per_group: Patches of a group, at least 2.
        per_step: Groups in an optimiser step.

    Raises:
        InputError: A value is out of range.
    """

    kinds: tuple[str, ...] = ('gaussian', 'poisson')
    least: float = 0.02
    most: float = 0.8
    clipped: float = 0.25
    grey: float = 0.25
    patch: int = 64
    per_group: int = 8
    per_step: int = 4

    def __post_init__(self) -> None:
        unknown = sorted(set(self.kinds) - {'gaussian', 'poisson', 'own'})
        if unknown or not self.kinds:
            raise InputError(f'kinds must name gaussian, poisson or own, got {", ".join(unknown) or "none"}')
        if not 0 < self.least <= self.most < math.inf:
            raise InputError(f'least and most must be above zero and in this order, got {self.least} and {self.most}')
        for name in ('clipped', 'grey'):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f'{name} must be a share in 0-1, got {getattr(self, name)}')
        for name, least in (('patch', 8), ('per_group', 2), ('per_step', 1)):
            if getattr(self, name) < least:
                raise InputError(f'{name} must be at least {least}, got {getattr(self, name)}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the terms of the loss; the paper has 1 for its three (eq. 11). 0 leaves a term out (its ablations).

    Args:
        metric: Of L1, cross-entropy of eq. 7.
        full: Of L2, cross-entropy of the full head.
        consistency: Of L3, the divergence of the two.
        sketch: Of the sketch's own loss; it needs `sketch_groups`.
        distillation: Of the distance between the features (and the outputs of the norm layers) of the predicted network
            for images under a condition and those of `start` (of what it predicts, if it is a hypernetwork) for the
            same images without it; it needs `start`. So the hypernetwork learns to undo conditions (but turns, which a
            plain training with `turns = 4` knows). After `undoing` it brought nothing more in what ships, or harm.
        undoing: Of the distance of the first kernel, and of the bias of the norm behind it, from those that undo what
            the condition did to order and sign of the channels, which is hardly learned through the layers behind. The
            hypernetwork learns it by itself before the first step, from ten groups for each that training has, 4,000 at
            most, nearly all under a condition; so it needs a hypernetwork as `start`, best with its encoder
            (`fixed_encoder`).
    """

    metric: float = 1.0
    full: float = 1.0
    consistency: float = 1.0
    sketch: float = 1.0
    distillation: float = 0.0
    undoing: float = 0.0

    def __post_init__(self) -> None:
        values = dataclasses.astuple(self)
        if not all(0 <= value < math.inf for value in values) or not any(values):
            raise InputError('losses: no weight may be below zero or infinite, and one must be above')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast.

    Args:
        images: Images seen in all, in whole steps; groups of a set with fewer classes than `n_way` may hold fewer.
            Those of the sketches that `undoing` learns from before are not counted.
        optimizer: `adamw` for all; or `sgd` (Nesterov, 0.9) for what an ordinary training of the target would train,
            base kernels, shared weights and the full head, and AdamW for the rest.
        rate: Largest rate: AdamW's, or SGD's where that is the optimizer; there 0 leaves what an ordinary training of
            the target would train as it is in `start`, and only the change that the sketch makes is learned.
        sketch_rate: Largest rate of AdamW beside SGD.
        warmup: Share of the steps in which the rate rises; it then falls to zero by a cosine.
        weight_decay: Of weights with more than one dimension; decoupled in AdamW.
        clip: Largest norm of the gradient; of each of the two parts, where SGD has AdamW beside it.
        label_smoothing: Of the full head's loss.
        precision: `float32` or `bfloat16` (mixed, for the target's passes; float32 all the same, with a warning, where
            bfloat16 takes far longer: on processors and GPUs that do not compute in it).
        whitening: Whether features are whitened within classes after training (`adapt.Whitening`). Left out, they are
            where fewer than 20 classes are seen, those of `start` among them: it helps where they are few and costs
            points where they are many.
        fixed_statistics: Whether the target's norm layers keep the statistics of `start` while the hypernetwork
            learns, in place of those of each group. For images of one kind: what is predicted then works by these
            statistics, as what an ordinary training gives does; `prior_images` and `deep_share` of the hypernetwork
            say how much they count. The control *plain* has no use for it.
        fixed_encoder: Whether the sketch encoder stays as it is in the hypernetwork of `start`. (Its norms keep their
            statistics in any case: those of other images would change what every sketch says.)
        ema: Decay of the moving average of all weights that is kept in the end, 0.999 for instance; 0 for none. At
            first it is the mean over all steps, up to `1 / (1 - ema)` of them.
    """

    images: int = 100_000
    optimizer: str = 'adamw'
    rate: float = 3e-3
    sketch_rate: float = 1e-3
    warmup: float = 0.15
    weight_decay: float = 0.05
    clip: float = 5.0
    label_smoothing: float = 0.1
    precision: str = 'float32'
    whitening: bool | None = None
    fixed_statistics: bool = False
    fixed_encoder: bool = False
    ema: float = 0.0

    def __post_init__(self) -> None:
        if self.optimizer not in ('adamw', 'sgd'):
            raise InputError(f'optimizer {self.optimizer!r}: use adamw or sgd')
        if not 0 <= self.ema < 1:
            raise InputError(f'ema must be in [0, 1), got {self.ema}')
        if self.precision not in ('float32', 'bfloat16'):
            raise InputError(f'precision {self.precision!r}: use float32 or bfloat16')
        rates = (0 < self.rate < math.inf or self.frozen) and 0 < self.sketch_rate < math.inf
        if self.images < 1 or not rates or not 0 <= self.warmup < 1:
            raise InputError(
                'schedule: images, rate and sketch_rate must be above zero, warmup in [0, 1); got '
                f'{self.images}, {self.rate}, {self.sketch_rate}, {self.warmup}'
            )
        if not self.clip > 0 or not 0 <= self.weight_decay < math.inf or not 0 <= self.label_smoothing < 1:
            raise InputError(
                'schedule: clip must be above zero, weight_decay not below, label_smoothing in [0, 1); got '
                f'{self.clip}, {self.weight_decay}, {self.label_smoothing}'
            )

    @property
    def frozen(self) -> bool:
        """Whether only the change that the sketch makes is learned."""
        return self.optimizer == 'sgd' and self.rate == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything about a training run; `Recipe.load` reads one from a TOML file.

    Args:
        hypernet: Architecture of target and hypernetwork.
        data: Where the images come from: a set, or several (`[[data]]` in a file).
        groups: What a group is.
        augmentation: Random changes of every image.
        losses: Weights of the terms of the loss.
        schedule: How long and how fast.
        denoising: Where given, the target is a denoiser (`blindspot_unet`): groups are of noisy patches, as this says,
            and what is above of groups, augmentation and losses is not used.
        start: Folder of a model of the target in timm's format, of a plain training for instance, or the name of timm's
            own pretrained weights (`resnet50.a1_in1k`): what the hypernetwork predicts at first, whatever the images,
            and what the control starts from. Or a hypernetwork that training goes on with, by its folder, the name of
            one that ships with the package, or `org/name@revision` on the Hub; `[hypernet]` must be as its own, but for
            tag, `input_size`, `prior_images`, `deep_share`, `sketch_limit` and `sketch_gate`. The control then starts
            from what it predicts for the mean sketch of 64 groups.
        seed: Of everything random.
    """

    hypernet: PudNetConfig
    data: tuple[Data, ...]
    groups: Groups = dataclasses.field(default_factory=Groups)
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    losses: LossWeights = dataclasses.field(default_factory=LossWeights)
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    denoising: Denoising | None = None
    start: str = ''
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise InputError(f'seed must be in 0-{2**63 - 1}, got {shown(self.seed)}')
        object.__setattr__(self, 'hypernet', of_one_size(self.hypernet))
        if not self.data:
            raise InputError('data: a recipe needs at least one set of images')
        if self.denoising is not None:
            for name, default in (('groups', Groups()), ('augmentation', Augmentation()), ('losses', LossWeights())):
                if getattr(self, name) != default:
                    raise InputError(f'[{name}] is not used where there is [denoising]: remove one of them')
            for name in ('label_smoothing', 'whitening'):
                if getattr(self.schedule, name) != getattr(Schedule(), name):
                    raise InputError(f'[schedule] {name} is not used where there is [denoising]: remove it')
            if self.start:
                raise InputError('start is not used where there is [denoising]: remove it')
        if self.hypernet.sketch_gate and not (0 < self.groups.conditions < 1 and self.schedule.frozen):
            raise InputError(
                'hypernet: sketch_gate keeps the base network for images as they are, so it needs one that stays as it '
                f'is (schedule: rate = 0, got {self.schedule.rate:g}) and groups with and without conditions (groups: '
                f'conditions between 0 and 1, got {self.groups.conditions:g})'
            )
        if self.schedule.fixed_statistics and not self.start:
            raise InputError('schedule: fixed_statistics needs start, which they are taken from')
        if self.schedule.fixed_encoder and not self.start:
            raise InputError('schedule: fixed_encoder needs start, a hypernetwork whose encoder it is')
        weigh = self.losses
        if weigh.distillation and not self.start:
            raise InputError('losses: distillation needs start, whose features are wanted')
        if weigh.undoing and not (self.start and self.groups.conditions and self.schedule.fixed_statistics):
            raise InputError(
                'losses: undoing needs start, groups with conditions, and schedule: fixed_statistics = true'
            )
        if self.schedule.frozen and (not self.start or weigh.full or weigh.consistency):
            raise InputError('schedule: a rate of 0 needs start, and losses with full = 0.0 and consistency = 0.0')
        if self.schedule.frozen and self.hypernet.generator in ('paper', 'auto'):
            raise InputError(
                'schedule: a rate of 0 leaves the base of a network as it is, and generator "paper" has none: use '
                '"residual"'
            )
        if self.schedule.fixed_encoder and self.groups.sketch_groups:
            raise InputError(
                'schedule: fixed_encoder leaves sketch_groups nothing to teach: set one of them to its default'
            )
        others = [field.name for field in dataclasses.fields(weigh) if field.name != 'sketch']
        if not (self.groups.sketch_groups or any(getattr(weigh, name) for name in others)):
            raise InputError('losses: the sketch alone has a weight, but groups: sketch_groups is 0')

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Reads a recipe file.

        Raises:
            NotFoundError: There is no such file.
            InputError: It is no TOML, or has an unknown key (the close ones are named) or a value out of range.
        """
        path = local_path(path)
        if not path.is_file():
            raise NotFoundError(f'{path}: no such recipe file')
        try:
            found = tomllib.loads(path.read_text(encoding='utf-8-sig'))
        except (ValueError, RecursionError) as error:  # no TOML or UTF-8; a number of thousands of digits
            raise InputError(f'{path} is no recipe: {error}') from error
        return cls.from_dict(found, str(path))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = 'recipe') -> Recipe:
        """Builds a recipe from nested mappings; `where` names them in errors."""
        reject_unknown_keys(data, [field.name for field in dataclasses.fields(cls)], where)
        for name in ('hypernet', 'data'):
            if name not in data:
                raise InputError(f'{where}: the table [{name}] is missing')
        values: dict[str, Any] = dict(data)
        hypernet = values['hypernet']
        if isinstance(hypernet, Mapping):
            for name, remedy in _OF_TRAINING.items():
                if hypernet.get(name):
                    raise InputError(f'{where}: [hypernet] {name} is what training writes: {remedy}')
            if 'input' in hypernet:
                hypernet = {**hypernet, 'input': _build(InputConfig, hypernet['input'], f'{where}: [hypernet.input]')}
        made = values['hypernet'] = _build(PudNetConfig, hypernet, f'{where}: [hypernet]')
        if (size := img_size_of(made)) and 'input_size' not in data['hypernet'].get('input', {}):
            input = dataclasses.replace(made.input, input_size=(made.input.input_size[0], *size))
            values['hypernet'] = dataclasses.replace(made, input=input)
        for name, kind in (('seed', int), ('start', str)):
            if name in values:
                values[name] = _typed(values[name], kind, f'{where}: {name}')
        if not values['data']:
            raise InputError(f'{where}: data needs at least one set of images')
        sets = values['data'] if isinstance(values['data'], list | tuple) else [values['data']]
        values['data'] = tuple(_build(Data, one, f'{where}: [data]') for one in sets)
        tables = {
            'groups': Groups,
            'augmentation': Augmentation,
            'losses': LossWeights,
            'schedule': Schedule,
            'denoising': Denoising,
        }
        for name, kind in tables.items():
            if name in values:
                values[name] = _build(kind, values[name], f'{where}: [{name}]')
        try:
            return cls(**values)
        except InputError as error:
            raise InputError(f'{where}: {error}') from error

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON can hold it."""
        found = json.loads(json.dumps(dataclasses.asdict(self)))
        return found if self.denoising is not None else {key: found[key] for key in found if key != 'denoising'}

    @property
    def images_per_step(self) -> int:
        """Images that one optimiser step shows the target; patches, of a denoiser."""
        if self.denoising is not None:
            return self.denoising.per_group * self.denoising.per_step
        return self.groups.images_per_step

    @property
    def digest(self) -> str:
        """A short hash that tells one recipe from another; new fields of later versions, left alone, change nothing."""
        return sha256(json.dumps(_told(self), sort_keys=True).encode())[:16]


def _told(value: Any) -> Any:
    """What a recipe says, defaults left out, as JSON can hold it."""
    if isinstance(value, tuple):
        return [_told(one) for one in value]
    if not dataclasses.is_dataclass(value):
        return value
    said = {}
    for field in dataclasses.fields(value):
        made = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if made else field.default  # type: ignore[misc]
        if getattr(value, field.name) != default:
            said[field.name] = _told(getattr(value, field.name))
    return said


def _build(kind: Any, table: Any, where: str) -> Any:
    if not isinstance(table, Mapping):
        raise InputError(f'{where} must be a table, got {table!r}')
    hints = typing.get_type_hints(kind)
    reject_unknown_keys(table, list(hints), where)
    values = {key: _typed(value, hints[key], f'{where} {key}') for key, value in table.items()}
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f'{where}: {error}') from error


def _typed(value: Any, hint: Any, where: str) -> Any:
    """The value as its field wants it, or an InputError that says what the field wants."""
    kinds = [typing.get_origin(one) or one for one in typing.get_args(hint) if typing.get_origin(hint) is not tuple]
    kinds = kinds if isinstance(hint, types.UnionType) else [typing.get_origin(hint) or hint]
    if isinstance(value, list) and tuple in kinds:
        return tuple(value)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise InputError(f'{where} must be below 2**63, got {shown(value)}')
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and not (math.isfinite(value) or where.endswith(' clip')):  # inf: no clipping
        raise InputError(f'{where} must be a finite number, got {value}')
    if isinstance(value, tuple(kinds)) and (not isinstance(value, bool) or bool in kinds):
        return value
    wanted = {
        int: 'a whole number',
        float: 'a number',
        str: 'a text',
        bool: 'true or false',
        tuple: 'a list',
        dict: 'a table',
    }
    raise InputError(f'{where} must be {" or ".join(wanted[one] for one in kinds if one in wanted)}, got {value!r}')
