"""Meta-training (Algorithm 1): learns a hypernetwork from many groups of images."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from timm_pudnet import remote
from timm_pudnet.adapt import Whitening, calibrate, centroid_logits, class_centroids
from timm_pudnet.config import (
    DamagedFileError,
    InputError,
    PudNetConfig,
    PudNetWarning,
    are_numbers,
    first_line,
    same_names,
    spelled,
)
from timm_pudnet.devices import forked_rng, own_defaults
from timm_pudnet.files import CONFIG_NAME, folder_path, local_path, read_config, read_json, save_tensors, written_whole
from timm_pudnet.hub import embedded
from timm_pudnet.hypernet import MOST_PARAMETERS, PudNet, start_model, target_of
from timm_pudnet.images import ImageSource, is_timm_name, open_images
from timm_pudnet.predict import check_output, save_model
from timm_pudnet.sketch import in_eval_mode
from timm_pudnet.target import (
    REFUSALS,
    batch_norms,
    channels_last,
    create_feature_model,
    difference,
    normalised_otherwise,
    small_maps_first,
    with_own_config,
)
from timm_pudnet.training.episodes import Group, GroupSampler, ImageBank, bank_input, mixed, timm_augmented
from timm_pudnet.training.losses import NormOutputs, distillation_loss, group_losses, sketch_loss
from timm_pudnet.training.recipe import Data, Recipe
from timm_pudnet.training.run import Run, go
from timm_pudnet.training.undoing import ChannelUndoing

# Fields of its config in which a hypernetwork may differ from the one that it starts from.
_FREE = ('input', 'prior_images', 'deep_share', 'sketch_limit', 'sketch_gate', 'tag', 'class_names')
_FREE += ('training', 'library_versions')
UNDOING_GROUPS = 4000  # of which the first layers learn to undo conditions, at most
UNDOING_SHARE = 10  # of these for each group of the steps that follow, at most
UNDOING_CONDITIONS = 0.95  # share of these that have one, at least
MANY_CLASSES = 20  # seen, from which on features are not whitened unless the recipe says so
TRIED_GROUPS = 30  # that tell whether a recipe learns
GATE_IMAGES = 64  # of each class, at most, that tell how sketches differ by chance
START_GROUPS = 64  # whose mean sketch says what a hypernetwork that training starts from usually predicts


@own_defaults()
def meta_train(
    recipe: Recipe | str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    banks: Sequence[ImageBank] | None = None,
    device: str | torch.device | None = None,
    checkpoint_seconds: float = 120.0,
    max_steps: int | None = None,
    progress: bool = True,
) -> PudNet:
    """Trains a hypernetwork by a recipe; goes on where an earlier run of the same recipe in `folder` stopped.

    Under `accelerate launch` or `torchrun` the groups of each step are spread over the processes; the result is that of
    one process, to rounding.

    Args:
        recipe: A recipe or the path of its file.
        folder: Where checkpoint, log (JSON lines, TensorBoard) and plot go; without it nothing is written.
        banks: The seen classes' images, one bank a data set of the recipe, if they are in memory already; otherwise
            they are read as the recipe says.
        device: Default: CUDA where there is one.
        checkpoint_seconds: Seconds between checkpoints.
        max_steps: Stop after so many steps in all, with a checkpoint, as if interrupted.
        progress: Show a progress bar.

    Returns:
        The trained hypernetwork, in eval mode, on the CPU.

    Raises:
        InputError: The recipe, its data, or a checkpoint of another recipe.
        FloatingPointError: The loss was not finite for ten steps in a row; the last checkpoint remains.
    """
    recipe = _checked(recipe)
    run = _MetaRun(recipe, _banks(recipe, banks), device)
    go(run, folder, checkpoint_seconds, max_steps, progress)
    return run.finished()


@own_defaults()
def train_plain(
    recipe: Recipe | str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    banks: Sequence[ImageBank] | None = None,
    device: str | torch.device | None = None,
    checkpoint_seconds: float = 120.0,
    max_steps: int | None = None,
    progress: bool = True,
    result: str | os.PathLike[str] | None = None,
) -> tuple[nn.Module, Tensor]:
    """Trains the control *plain*: the recipe's target as an ordinary classifier, on as many images of the same classes.

    Arguments and errors as `meta_train`; `result` is a folder to save the control in, as `save_control` does, with what
    its training cost (where `max_steps` ends it before, nothing is saved). Over several processes each takes its part
    of a batch by itself, its norm statistics too: as good, but not the same weights.

    Returns:
        The target as a feature model (`num_classes=0`), in eval mode, and the whitening of its features, on the CPU.
    """
    recipe = _checked(recipe)
    if recipe.schedule.frozen:
        raise InputError('schedule: a rate of 0 trains no control: give it a recipe of its own, with a rate')
    if result is not None:
        check_output(local_path(result))
        check_control(recipe.hypernet)
    run = _PlainRun(recipe, _banks(recipe, banks), device)
    go(run, folder, checkpoint_seconds, max_steps, progress)
    run.settle()
    whitening = run.whitening()
    model = with_own_config(run.target.cpu().eval(), recipe.hypernet.input)
    if result is not None and run.processes.rank == 0 and run.step == run.num_steps:
        save_control(local_path(result), model, whitening, run.seen, run.cost())
    return model, whitening


@own_defaults()
def try_recipe(
    recipe: Recipe | str | os.PathLike[str],
    *,
    banks: Sequence[ImageBank] | None = None,
    device: str | torch.device | None = None,
    seconds: float = 80.0,
    progress: bool = True,
) -> dict[str, Any]:
    """Whether a recipe learns at all: its whole schedule, squeezed into a minute or two.

    Args:
        recipe: A recipe or the path of its file.
        banks: As in `meta_train`.
        device: As in `meta_train`.
        seconds: What the squeezed training may take.
        progress: Show a progress bar.

    Raises:
        InputError: As `meta_train`; or this is one of several processes, whose clocks would not agree on the steps.

    Returns:
        `before` and `after`, the share of query images that eq. 7 gets right in groups of the *seen* classes (so no
        measure of quality), `gains`, the differences in each of these groups, `chance`, `images` and `seconds` of the
        squeezed training, `images_per_second`, and `whole_seconds`, which the whole recipe would take.
    """
    if not seconds > 0:
        raise InputError(f'seconds must be above zero, got {seconds}')
    if int(os.environ.get('WORLD_SIZE', '1')) > 1:
        raise InputError('a short try is for one process: start it without torchrun or accelerate launch')
    recipe = _checked(recipe)
    banks = _banks(recipe, banks)
    run = _MetaRun(recipe, banks, device)
    each = recipe.images_per_step
    for _ in run.steps(1):  # the first step is slower
        run.seconds = 0.0
    started = time.monotonic()
    while time.monotonic() - started < seconds / 20:
        next(run.steps(run.step + 1))
    speed, pace = run.shown(1) / run.seconds, run.seconds / (run.step - 1)  # images a second, seconds a step
    whole = run.num_steps * pace
    images = min(recipe.schedule.images, max(10 * each, int(seconds / pace * each)))
    short = dataclasses.replace(recipe, schedule=dataclasses.replace(recipe.schedule, images=images))
    run = _MetaRun(short, banks, device)
    before, chance = run.accuracy()
    go(run, None, math.inf, None, progress)
    run.settle()
    run.hypernet.take_statistics(run.target)
    after, _ = run.accuracy()
    return {
        'before': sum(before) / TRIED_GROUPS,
        'after': sum(after) / TRIED_GROUPS,
        'gains': [b - a for a, b in zip(before, after, strict=True)],
        'chance': chance,
        'images': run.shown(),
        'seconds': run.seconds,
        'images_per_second': speed,
        'whole_seconds': whole,
    }


def _checked(recipe: Recipe | str | os.PathLike[str]) -> Recipe:
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    if recipe.denoising is not None:
        raise InputError('the recipe has a table [denoising]: meta_train_denoiser takes recipes of denoisers')
    check_start(recipe)
    return recipe


def _banks(recipe: Recipe, banks: Sequence[ImageBank] | None) -> Sequence[ImageBank]:
    if not banks:
        return load_banks(recipe)
    if len(banks) == len(recipe.data):  # `GroupSampler` tells of another number
        _refuse_overlap(recipe, [bank.class_names for bank in banks])
    return banks


def check_control(config: PudNetConfig) -> None:
    """Raises InputError where timm's format could not hold a control of this hypernetwork's target."""
    if not target_of(config).ends_in_classifier:
        raise InputError(
            f"{config.model_name}: its head has layers before the classifier, without which timm's format cannot hold "
            'it: train the control in Python, timm_pudnet.training.train_plain without `result`'
        )


def load_banks(
    recipe: Recipe, data_dir: str | os.PathLike[str] | None = None, *, progress: bool = False
) -> list[ImageBank]:
    """Reads the seen classes' images into memory, a bank a data set, from `data_dir` in place of the recipe's if given.

    With `progress`, a bar shows what takes longer than two seconds.

    Raises:
        InputError: A set cannot be read, has no labels, or lacks a class that the recipe names; or a class of one
            set is unseen in another.
    """
    for data in recipe.data:
        if not is_timm_name(data.images) and (name := data.timm_field):
            raise InputError(
                f'{data.images}: {name} is of a timm dataset, and this is not the name of one: leave it out'
            )
    opened = [
        open_images(
            data.images, input=bank_input(recipe.hypernet.input), split=data.split, data_dir=data_dir or data.data_dir
        )
        for data in recipe.data
    ]
    # Before any image is read, where the names are known before.
    seen = [_seen_classes(data, source.class_names, source) for data, source in zip(recipe.data, opened, strict=True)]
    _refuse_overlap(recipe, seen)
    banks = [
        ImageBank.from_source(source, names or None, progress=progress)
        for source, names in zip(opened, seen, strict=True)
    ]
    for place, (data, source, bank) in enumerate(zip(recipe.data, opened, banks, strict=True)):
        if source.class_names is None:  # the classes are numbers, known only now
            seen[place] = _seen_classes(data, bank.class_names, source)
            if seen[place] != bank.class_names:
                banks[place] = bank.select(seen[place])
    _refuse_overlap(recipe, seen)
    return banks


def _seen_classes(data: Data, names: tuple[str, ...] | None, source: ImageSource) -> tuple[str, ...]:
    """The classes of a set to train on, out of all of its `names`; where these are None, those to read (none: all)."""
    if names is None:
        return () if data.unseen else data.classes
    absent = [name for name in data.unseen if name not in names]
    if absent:
        raise InputError(f'{source.description}: no class {absent[0]!r}, which unseen names')
    chosen = data.classes or tuple(name for name in names if name not in data.unseen)
    if not chosen:
        raise InputError(f'{source.description}: unseen names every class, none is left to train on')
    return chosen


def _refuse_overlap(recipe: Recipe, seen: Sequence[Sequence[str]]) -> None:
    for data, own in zip(recipe.data, seen, strict=True):
        for other, names in zip(recipe.data, seen, strict=True):
            known = same_names((*own, *data.unseen), names)
            if both := sorted(known.keys() & {*data.unseen}):
                name = spelled(both[0], known[both[0]])
                raise InputError(f'class {name} is unseen in {data.images}, but seen in {other.images}: choose one')


def _as_toml(value: Any) -> str:
    """A value of a config as TOML has it, on one line."""
    if isinstance(value, dict):
        return f'{{{", ".join(f"{key} = {_as_toml(one)}" for key, one in value.items())}}}'
    return json.dumps(value)


def _is_hypernet(folder: Path) -> bool:
    """Whether the folder holds a hypernetwork, rather than a timm model."""
    try:
        found = read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else None
    except DamagedFileError:
        return False
    return isinstance(found, dict) and 'format_version' in found


def _hypernet_folder(start: str) -> Path | None:
    """Where the hypernetwork of that name or folder is, from the Hub too; None where it means none."""
    if shipped := embedded().get(start):
        return shipped
    if remote.split_repo(start):
        return remote.local_folder(start)
    path = folder_path(start)
    return path if _is_hypernet(path) else None


def group_sampler(recipe: Recipe, banks: Sequence[ImageBank], **changes: Any) -> GroupSampler:
    """The sampler that a recipe describes, with changes of its groups."""
    return GroupSampler(
        banks,
        recipe.hypernet.input,
        dataclasses.replace(recipe.groups, **changes),
        shares=[data.share for data in recipe.data],
        augmentation=recipe.augmentation,
        seed=recipe.seed,
    )


@torch.no_grad()
def _usual_weights(hypernet: PudNet, sampler: GroupSampler) -> dict[str, Tensor]:
    """What a hypernetwork predicts for the mean sketch of groups."""
    supports = (sampler.draw(number, 'start').support for number in range(START_GROUPS))
    return hypernet(torch.stack([hypernet.encoder(support).mean(0) for support in supports]).mean(0))


@torch.inference_mode()
def fit_gate(hypernet: PudNet, recipe: Recipe, banks: Sequence[ImageBank]) -> None:
    """Fits the gate of a hypernetwork to the classes of a recipe as they are, with the shares of its data sets."""
    assert hypernet.gate is not None
    encoder, classes = hypernet.encoder.eval(), []
    for data, bank in zip(recipe.data, banks, strict=True):
        generator = torch.Generator().manual_seed(recipe.seed)
        for members in bank.members:
            picks = members[torch.randperm(len(members), generator=generator)[:GATE_IMAGES]]
            batches = bank.part(picks).source(recipe.hypernet.input).batches()
            features = torch.cat([encoder(images.to(hypernet.device)) for images, _ in batches])
            classes.append((features, data.share / len(bank.members)))
    hypernet.gate.fit(classes)


def classes_seen(recipe: Recipe, banks: Sequence[ImageBank]) -> tuple[str, ...]:
    """Every class that a training by this recipe, and what it starts from, has seen, as far as that says."""
    names = seen_by(recipe.start)
    return tuple(dict.fromkeys((*names, *(name for bank in banks for name in bank.class_names))))


def _check_target(config: PudNetConfig) -> None:
    """Refuses a target that is no classifier, or whose maps shrink to nothing at the size of its input."""
    spec = target_of(config)
    if not spec.classifiers:
        raise InputError(f'{config.model_name} does not classify: add a table [denoising]')
    size = config.input.input_size
    try:
        with forked_rng(torch.device('cpu')), torch.no_grad():
            create_feature_model(spec).eval()(torch.zeros(1, *size))
    except REFUSALS as error:
        raise InputError(
            f'{config.model_name} takes no images of {"x".join(map(str, size))} ({first_line(error)}): set another '
            'input_size in [hypernet.input]'
        ) from error


def check_start(recipe: Recipe) -> None:
    """Looks at the target and at what its training starts from, before any image is read.

    Raises:
        InputError: It is not there, is a hypernetwork of another make than `[hypernet]` says, is none where one is
            wanted, or was trained on a class that the recipe keeps for the test; or timm refuses the augmentation; or
            the target is no classifier, or not for images of that size.

    Warns:
        PudNetWarning: The recipe keeps classes for the test, and what it starts from does not say which it has seen.
    """
    start, config = recipe.start, recipe.hypernet
    if recipe.denoising is None:
        _check_target(config)
    _check_augmentation(recipe)
    folder = _hypernet_folder(start) if start else None
    if folder is not None:
        found = read_config(folder / CONFIG_NAME)
        fields = [(name, found, config) for name in vars(config) if name not in _FREE]
        fields += [(name, found.input, config.input) for name in ('mean', 'std')]
        # As text: lists that were read from a file are tuples in Python.
        lines = [[f'{name} = {_as_toml(getattr(one, name))}' for one in both] for name, *both in fields]
        if wrong := [wanted for wanted, given in lines if wanted != given]:
            raise InputError(
                f'start {start} is a hypernetwork of another make than [hypernet] (and its input) says; set there: '
                + ', '.join(wrong)
            )
    elif start and not folder_path(start).is_dir() and start.partition('.')[0] != config.model_name:
        raise InputError(
            f'start {start} is neither the folder of a timm model or hypernetwork, nor a hypernetwork that ships '
            f'with the package, nor timm weights of {config.model_name} ({config.model_name}.TAG)'
        )
    elif recipe.schedule.fixed_encoder:
        raise InputError('schedule: fixed_encoder needs a hypernetwork as start, whose encoder it is')
    elif recipe.losses.undoing:
        raise InputError('losses: undoing needs a hypernetwork as start, whose sketch tells conditions apart')
    if not start:
        return
    names = seen_by(start)
    for data in recipe.data:
        known = same_names((*data.classes, *data.unseen), names)
        if both := sorted(known.keys() & {*data.unseen}):
            name = spelled(both[0], known[both[0]])
            raise InputError(f'start {start} was trained on class {name}: leave it out of unseen')
    if not names and any(data.unseen for data in recipe.data):
        warnings.warn(
            f'start {start} does not say which classes it has seen: see to it that the unseen ones are not among them',
            PudNetWarning,
            stacklevel=1,  # once, whoever asks
        )


def _check_augmentation(recipe: Recipe) -> None:
    """Tries on two black images what timm is told of augmentation."""
    how, size = recipe.augmentation, recipe.hypernet.input.input_size
    black, generator = torch.zeros(2, *size, dtype=torch.uint8), torch.Generator().manual_seed(0)
    if how and how.timm:
        timm_augmented(black, how.timm, generator)
    if how and how.mixup:
        mixed(black.float(), torch.zeros(2, dtype=torch.long), 2, how.mixup, generator)


def seen_by(start: str) -> tuple[str, ...]:
    """Classes that went into a hypernetwork or a network, as its files say; none where they do not."""
    if not start:
        return ()
    if folder := _hypernet_folder(start):
        return read_config(folder / CONFIG_NAME).class_names
    path = folder_path(start)
    names: list[str] = []
    with contextlib.suppress(DamagedFileError, OSError, LookupError, AttributeError, TypeError):  # anybody's model
        config = read_json(path / CONFIG_NAME)
        labels = config.get('label_names') or config['pretrained_cfg'].get('label_names') or ()
        labels = [*(labels.values() if isinstance(labels, dict) else labels)]
        names += [] if are_numbers(labels) else labels
    classes = _beside(path, 'classes')
    names += classes if isinstance(classes, list) else []
    return tuple(str(name) for name in names)


def cost_of(control: str | os.PathLike[str]) -> dict[str, Any]:
    """What the training of a control cost, as `train --plain` wrote it; nothing where an earlier version did."""
    found = _beside(local_path(control), 'training')
    return found if isinstance(found, dict) else {}


def _beside(control: Path, key: str) -> Any:
    """What is written of a control beside its whitening, under this key; None where nothing is."""
    with contextlib.suppress(SafetensorError, OSError, ValueError), safe_open(whitening_path(control), 'pt') as file:
        return json.loads((file.metadata() or {}).get(key, 'null'))
    return None


def whitening_path(control: Path) -> Path:
    """Where `train --plain` writes the whitening of a control's features, and which classes it has seen."""
    control = control.absolute()  # `.` has no name
    return control.with_name(f'{control.name}.whitening.safetensors')


def save_control(
    folder: Path,
    model: nn.Module,
    whitening: Tensor,
    classes: Iterable[str],
    training: Mapping[str, Any] | None = None,
) -> None:
    """Writes a control in timm's format, after the whitening of its features, with the classes that it has seen.

    And with what its `training` cost, where that is known, as a hypernetwork's config states it.

    Raises:
        OutputExistsError: The folder is there; nothing is written then.
    """
    check_output(folder)
    told = {'classes': list(classes)} | ({} if training is None else {'training': dict(training)})
    with written_whole(whitening_path(folder)) as beside:
        save_tensors({'whitening': whitening}, beside, {key: json.dumps(value) for key, value in told.items()})
    save_model(model, folder)


class _ClassifierRun(Run):
    """A training on groups of labelled images."""

    head: nn.Linear  # the full head over all seen classes

    def __init__(self, recipe: Recipe, banks: Sequence[ImageBank], device: str | torch.device | None) -> None:
        self.sampler = group_sampler(recipe, banks)
        self.seen = classes_seen(recipe, banks)
        self.started: dict[str, Tensor] = {}  # what the recipe's start holds
        super().__init__(recipe, device)
        size = sum(bank.images.nbytes for bank in banks)
        if self.device.type == 'cuda' and size < torch.cuda.mem_get_info(self.device)[0] / 4:
            # Groups are then made there: the processor could not keep up.
            self.sampler.banks = [bank.to(self.device) for bank in banks]

    def source(self) -> Iterator[Tensor | bytes]:
        """Images, labels and names of their classes, and what the start holds."""
        yield from (json.dumps(bank.class_names).encode() for bank in self.sampler.banks)
        yield from (tensor for bank in self.sampler.banks for tensor in (bank.images, bank.labels))
        yield from self.started.values()

    def shown(self, first: int = 0) -> int:
        """Images of the groups of all steps that were learned from so far, from step `first` on."""
        each = self.recipe.groups.per_step  # groups a step; a control's batch is as large as they
        steps = (step for step in self.learned if step >= first)
        return sum(self.sampler.images_of(step * each + number) for step in steps for number in range(each))

    def cost(self) -> dict[str, Any]:
        """As of any run, and what it all started from."""
        started = {'start': self.recipe.start} if self.recipe.start else {}
        return {**super().cost(), 'images': self.shown(), **started}

    def make_head(self) -> nn.Linear:
        """A new full head."""
        return nn.Linear(target_of(self.recipe.hypernet).num_features, self.sampler.num_classes)

    def _started_target(self) -> dict[str, Tensor]:
        """State dict, without classifier, of the model that the recipe starts from."""
        start, config = self.recipe.start, self.recipe.hypernet
        folder = folder_path(start)
        model = start_model(folder if folder.is_dir() else start, config)
        found, expected = model.state_dict(), self.target.state_dict()
        if wrong := difference({key: found[key] for key in expected if key in found}, expected):
            raise InputError(f'start {start} is no {config.model_name} with the arguments of the recipe: {wrong}')
        if other := normalised_otherwise(model, config.input):
            warnings.warn(
                f'start {start} saw images {other}; set mean and std in [hypernet.input] alike, unless it is to learn '
                'another input',
                PudNetWarning,
                stacklevel=1,
            )
        self.started = {key: found[key] for key in expected}
        return self.started

    def _of_target(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of a hypernetwork's tensors that the target without classifier has."""
        return {key: weights[key] for key in self.target.state_dict()}

    def _started_hypernet(self) -> PudNet | None:
        """The hypernetwork that the recipe starts from, where it starts from one."""
        folder = _hypernet_folder(self.recipe.start) if self.recipe.start else None
        if folder is None:
            return None
        found = PudNet.from_pretrained(folder)
        self.started = dict(found.state_dict())
        return found

    @torch.inference_mode()
    def tested(self, groups: int, what: str) -> Iterator[tuple[Group, Tensor, Tensor]]:
        """New groups of seen classes, each treated as one of unseen classes; features of support and query."""
        with forked_rng(self.device):
            model = create_feature_model(target_of(self.recipe.hypernet)).to(self.device)
        sampler = group_sampler(self.recipe, self.sampler.banks)
        sampler.augmentation = None
        with in_eval_mode(nn.ModuleDict(self.modules)):
            for number in range(groups):
                group = sampler.draw(number, what)
                support, query = group.support.to(self.device), group.query.to(self.device)
                weights = self.weights_of(support)
                model.load_state_dict(weights)
                features = calibrate(model, support, weights, **self.recipe.hypernet.calibration)
                yield group, features, model(query)

    def whitening(self) -> Tensor:
        """The whitening of the features within classes; the identity where it is not wanted."""
        learned = Whitening(self.head.in_features)
        wanted = self.recipe.schedule.whitening
        if wanted or (wanted is None and len(self.seen) < MANY_CLASSES):
            for group, support, query in self.tested(40, 'whitening'):
                learned.add(torch.cat([support, query]), torch.cat([group.support_classes, group.query_classes]))
        return learned.result()

    def accuracy(self) -> tuple[list[float], float]:
        """Share of query images that eq. 7 gets right in each of some groups of seen classes, and chance."""
        right, chance = [], []
        for group, support, query in self.tested(TRIED_GROUPS, 'accuracy'):
            classes, labels = group.support_classes.unique(return_inverse=True)
            centroids = class_centroids(support, labels, len(classes))
            guesses = classes[centroid_logits(query, centroids, 1.0).argmax(1).cpu()]
            right.append(float((guesses == group.query_classes).float().mean()))
            chance.append(1 / len(classes))
        return right, sum(chance) / TRIED_GROUPS

    def weights_of(self, support: Tensor) -> dict[str, Tensor]:
        """State dict of the target for a group's support images."""
        raise NotImplementedError

    def features(
        self, images: Tensor, weights: dict[str, Tensor] | None = None, *, model: nn.Module | None = None
    ) -> Tensor:
        """The target's features `[n, d]` in float32; with its own weights, or with these; or those of another model."""
        model = model or self.target
        images = images.contiguous(memory_format=torch.channels_last)
        with self.mixed_precision(), small_maps_first(model):
            if weights is None:
                return model(images).float()
            return torch.func.functional_call(model, weights, (images,)).float()


class _MetaRun(_ClassifierRun):
    """Algorithm 1. The target lends its forward pass and its norm statistics; its own weights are never used."""

    def build(self) -> dict[str, nn.Module]:
        self.head = self.make_head()
        started = self._started_hypernet()
        self.hypernet = PudNet.for_target(**{**vars(self.recipe.hypernet), 'class_names': self.seen})
        size = sum(value.numel() for value in self.hypernet.parameters())
        if self.recipe.hypernet.generator == 'paper' and size > MOST_PARAMETERS:
            warnings.warn(
                f'the generator "paper" makes a hypernetwork of {size / 1e6:.0f} million parameters: generator = '
                '"residual" in [hypernet] makes it about as large as the target',
                PudNetWarning,
                stacklevel=2,
            )
        self.least_limit = 0.0 if started is None else started.config.sketch_limit
        if started is not None:
            ours = {key: value for key, value in self.hypernet.state_dict().items() if key.startswith('gate.')}
            theirs = {key: value for key, value in started.state_dict().items() if not key.startswith('gate.')}
            self.hypernet.load_state_dict(theirs | ours)
            with torch.no_grad():
                weights = started(torch.zeros(started.config.sketch_width))
            self.target.load_state_dict(self._of_target(weights))  # for the norm statistics
        elif self.recipe.start:
            state = self._started_target()
            self.hypernet.start_from(state)
            self.target.load_state_dict(state)  # for the norm statistics
        self.target.requires_grad_(False)
        if self.recipe.schedule.fixed_statistics and not any(self.hypernet.target.keys('calibrated')):
            warnings.warn(
                f'schedule: fixed_statistics does nothing, {self.recipe.hypernet.model_name} keeps no norm statistics',
                PudNetWarning,
                stacklevel=2,
            )
        if self.recipe.schedule.frozen:
            self.head.requires_grad_(False)
            for name, value in self.hypernet.named_parameters():
                value.requires_grad_(not self.is_ordinary(f'hypernet.{name}'))
        # Those of other images would change within a few steps what every sketch says.
        self.keeps_encoder_statistics = started is not None
        if self.recipe.schedule.fixed_encoder:
            self.hypernet.encoder.requires_grad_(False)
        self.undoing = self._channel_undoing(started) if self.recipe.losses.undoing else None
        self.teacher = None  # lends its forward pass to the network of `start`, where its features are wanted
        if self.recipe.losses.distillation:
            self.teacher = channels_last(copy.deepcopy(self.target).eval().to(self.device))
            self.outputs = [NormOutputs(model) for model in (self.target, self.teacher)]
            self.teaching = None if started is None else started.requires_grad_(False).to(self.device)
        return {'hypernet': self.hypernet, 'head': self.head, 'target': self.target}

    def _channel_undoing(self, started: PudNet | None) -> ChannelUndoing:
        """What the first layers are to give, by what `start` gives for the mean sketch of groups without conditions."""
        assert started is not None
        sampler = group_sampler(self.recipe, self.sampler.banks, conditions=0.0)
        weights = {key: value.to(self.device) for key, value in _usual_weights(started, sampler).items()}
        return ChannelUndoing(self.hypernet, self.target, weights)

    @property
    def _sizes_before(self) -> list[int]:
        """Images of each group that comes before the first step."""
        count = 0 if self.undoing is None else min(UNDOING_GROUPS, UNDOING_SHARE * self.num_steps * self.parts)
        return [self.sampler.images_of(number, 'undoing') for number in range(count)]

    def cost(self) -> dict[str, Any]:
        """As of any classifier; images that the sketch encoder alone has seen apart."""
        groups, drawn = self.recipe.groups, len(self.learned) * self.parts
        further = drawn * groups.sketch_groups * 2 * groups.sketch_images if self.recipe.losses.sketch else 0
        further += sum(self._sizes_before)
        return {**super().cost(), 'sketch_images': further}

    def prepare(self, progress: bool) -> None:
        """Has the first layers learn to undo conditions, where the recipe wants it."""
        if self.undoing is None:
            return
        encoder, sizes = self.hypernet.encoder.eval(), self._sizes_before
        conditions = max(self.recipe.groups.conditions, UNDOING_CONDITIONS)
        sampler = group_sampler(self.recipe, self.sampler.banks, conditions=conditions)
        rows = torch.zeros(sum(sizes), self.recipe.hypernet.sketch_width, device=self.device)
        seen = []
        for number, own in enumerate(tqdm(rows.split(sizes), 'sketches', disable=not progress, delay=2, leave=False)):
            group = sampler.draw(number, 'undoing')
            seen.append(group.condition)
            if number % self.processes.count == self.processes.rank:
                with torch.no_grad():
                    own.copy_(encoder(torch.cat([group.support, group.query]).to(self.device)))
        encoder.train()
        self.processes.sum_([rows])
        learned = self.undoing.learn(rows.split(sizes), seen, sampler.generator('undoing', 0), progress)
        with torch.no_grad():  # those of the first process, to the bit
            for value in learned if self.processes.rank else ():
                value.zero_()
            self.processes.sum_(learned)

    @property
    def parts(self) -> int:
        return self.recipe.groups.per_step

    def losses(self, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward pass of one group: sketch, weights, features of support and query in one batch, losses."""
        weigh = self.recipe.losses
        group = self.sampler.draw(number, plain=self.teacher is not None)
        support, query = (images.to(self.device) for images in (group.support, group.query))
        further = None  # groups for the sketch's own loss
        if weigh.sketch and self.recipe.groups.sketch_groups:
            further = self.sampler.draw_halves(number).to(self.device)
        if self.keeps_encoder_statistics:
            self.hypernet.encoder.eval()
        with self.mixed_precision():
            rows = self.hypernet.encoder(support if further is None else torch.cat([support, further.flatten(0, 2)]))
        sketch = rows[: len(support)].mean(0)
        weights = self.hypernet(sketch)
        if self.recipe.schedule.fixed_statistics:
            for _, norm in batch_norms(self.target):
                norm.eval()
        for key in self.hypernet.target.keys('calibrated'):
            del weights[key]  # the target keeps its own
        features = self.features(torch.cat([support, query]), weights)
        terms = group_losses(
            features[: len(support)],
            features[len(support) :],
            group.support_classes.to(self.device),
            group.query_classes.to(self.device),
            full_logits=self.head(features),
            temperature=self.hypernet.temperature,
            label_smoothing=self.recipe.schedule.label_smoothing,
        )
        if self.teacher is not None:
            assert group.plain is not None
            with torch.no_grad():
                plain, own = group.plain.to(self.device), None
                if self.teaching is not None:
                    own = self.teaching(self.teaching.encoder(plain[: len(support)]).mean(0), len(support))
                wanted = self.features(plain, own, model=self.teacher)
            found, goals = (
                [first, *outputs.take()] for first, outputs in zip((features, wanted), self.outputs, strict=True)
            )
            terms['distillation'] = distillation_loss(found, goals)
        if self.undoing is not None:
            terms['undoing'] = self.undoing.loss(sketch[None], [self.undoing.wanted(group.condition)])
        if further is not None:
            terms['sketch'] = sketch_loss(rows[len(support) :].unflatten(0, further.shape[:3]).mean(2))
        # A term of weight 0 is watched, not trained on.
        kept = [getattr(weigh, name) * value for name, value in terms.items() if getattr(weigh, name)]
        return torch.stack(kept).sum(), terms

    def finished(self) -> PudNet:
        """The hypernetwork, with the norm statistics that the target gathered over the groups."""
        self.settle()
        self.hypernet.take_statistics(self.target)
        limit = self.hypernet.config.sketch_limit or max(self.longest_sketch(), self.least_limit)
        self.hypernet.config = dataclasses.replace(self.hypernet.config, training=self.cost(), sketch_limit=limit)
        if self.hypernet.gate is not None:
            fit_gate(self.hypernet, self.recipe, self.sampler.banks)
        self.hypernet.whitening.copy_(self.whitening())
        return self.hypernet.cpu().requires_grad_(True).eval()

    @torch.inference_mode()
    def longest_sketch(self) -> float:
        """Largest norm of the sketches of new groups of seen classes, as many as in training or a thousand."""
        groups = min(1000, self.num_steps * self.parts)
        encoder, sampler = self.hypernet.encoder.eval(), group_sampler(self.recipe, self.sampler.banks)
        supports = (sampler.draw(number, 'sketch').support.to(self.device) for number in range(groups))
        return max(float(encoder(support).mean(0).norm()) for support in supports)

    def weights_of(self, support: Tensor) -> dict[str, Tensor]:
        """The hypernetwork's weights, with the norm statistics of training."""
        return self.hypernet(self.hypernet.encoder(support).mean(0), len(support))


class _PlainRun(_ClassifierRun):
    """The control *plain*: the target itself as an ordinary classifier of the seen classes."""

    def weights_of(self, support: Tensor) -> dict[str, Tensor]:
        """The target's own weights, whatever the group."""
        return self.target.state_dict()

    def build(self) -> dict[str, nn.Module]:
        self.head = self.make_head()
        hypernet = self._started_hypernet()
        if hypernet is not None:
            self.target.load_state_dict(self._of_target(_usual_weights(hypernet, self.sampler)))
        elif self.recipe.start:
            self.target.load_state_dict(self._started_target())
        return {'target': self.target, 'head': self.head}

    @property
    def parts(self) -> int:
        return self.processes.count

    def losses(self, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward pass of an ordinary batch, as large as the groups of that step; cross-entropy of the full head."""
        per_step = self.recipe.groups.per_step
        first = number // self.parts * per_step
        count = sum(self.sampler.images_of(group) for group in range(first, first + per_step))
        mixup, size = self.recipe.augmentation.mixup, count // self.parts
        images, labels = self.sampler.batch(number, size - size % 2 if mixup else size)  # timm mixes pairs
        if mixup:
            generator = self.sampler.generator('mixup', number)
            images, labels = mixed(images, labels, self.sampler.num_classes, mixup, generator)
        logits = self.head(self.features(images.to(self.device)))
        smoothing = self.recipe.schedule.label_smoothing
        loss = F.cross_entropy(logits, labels.to(self.device), label_smoothing=smoothing)
        return loss, {'full': loss}
