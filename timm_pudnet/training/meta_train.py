"""Meta-training (Algorithm 1): learns a hypernetwork from many groups of images.

A checkpoint is one safetensors file that holds the whole state of the run, so that a resumed run goes on as if it had
never stopped. It is written beside its place and renamed, so it is whole or absent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from timm_pudnet.adapt import Whitening, calibrate, centroid_logits, class_centroids
from timm_pudnet.config import DamagedFileError, InputError, PudNetConfig, PudNetWarning
from timm_pudnet.hypernet import PudNet, pretrained_model, save_tensors, target_of, usable_device, written_whole
from timm_pudnet.images import open_images
from timm_pudnet.target import create_feature_model
from timm_pudnet.training.episodes import Group, GroupSampler, ImageBank, bank_input
from timm_pudnet.training.losses import group_losses, sketch_loss
from timm_pudnet.training.processes import Processes
from timm_pudnet.training.recipe import Recipe
from timm_pudnet.training.watch import Board, plot_losses

CHECKPOINT_NAME = 'checkpoint.safetensors'
LOG_NAME = 'log.jsonl'
PLOT_NAME = 'losses.png'
MOST_SKIPPED = 10  # steps in a row


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
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    run = _MetaRun(recipe, banks or load_banks(recipe), device)
    _go(run, folder, checkpoint_seconds, max_steps, progress)
    return run.finished()


def train_plain(
    recipe: Recipe | str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    banks: Sequence[ImageBank] | None = None,
    device: str | torch.device | None = None,
    checkpoint_seconds: float = 120.0,
    max_steps: int | None = None,
    progress: bool = True,
) -> tuple[nn.Module, Tensor]:
    """Trains the control *plain*: the recipe's target as an ordinary classifier, on as many images of the same classes.

    Arguments and errors as `meta_train`.

    Returns:
        The target as a feature model (`num_classes=0`), in eval mode, and the whitening of its features, on the CPU.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    run = _PlainRun(recipe, banks or load_banks(recipe), device)
    _go(run, folder, checkpoint_seconds, max_steps, progress)
    run.settle()
    whitening = run.whitening()
    return run.target.cpu().eval(), whitening


def try_recipe(
    recipe: Recipe | str | os.PathLike[str],
    *,
    banks: Sequence[ImageBank] | None = None,
    device: str | torch.device | None = None,
    seconds: float = 80.0,
    progress: bool = True,
) -> dict[str, float]:
    """Whether a recipe learns at all: its whole schedule, squeezed into a minute or two.

    Args:
        recipe: A recipe or the path of its file.
        banks: As in `meta_train`.
        device: As in `meta_train`.
        seconds: What the squeezed training may take.
        progress: Show a progress bar.

    Returns:
        `before` and `after`, the share of query images that eq. 7 gets right in groups of the *seen* classes (so no
        measure of quality), `chance`, `images` and `seconds` of the squeezed training, and `images_per_second`, from
        which the time of the whole recipe follows.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    banks = banks or load_banks(recipe)
    run = _MetaRun(recipe, banks, device)
    each, chance = recipe.groups.images_per_step, run.accuracy()[1]
    for _ in run.steps(1):  # the first step is slower
        run.seconds = 0.0
    started = time.monotonic()
    while time.monotonic() - started < seconds / 20:
        next(run.steps(run.step + 1))
    speed = (run.step - 1) * each / run.seconds
    images = min(recipe.schedule.images, max(10 * each, int(speed * seconds)))
    short = dataclasses.replace(recipe, schedule=dataclasses.replace(recipe.schedule, images=images))
    run = _MetaRun(short, banks, device)
    before = run.accuracy()[0]
    _go(run, None, math.inf, None, progress)
    run.finished()
    return {
        'before': before,
        'after': run.accuracy()[0],
        'chance': chance,
        'images': run.step * each,
        'seconds': run.seconds,
        'images_per_second': speed,
    }


def _go(
    run: _Run,
    folder: str | os.PathLike[str] | None,
    checkpoint_seconds: float,
    max_steps: int | None,
    progress: bool,
) -> None:
    checkpoint = Path(folder) / CHECKPOINT_NAME if folder is not None else None
    if checkpoint is not None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        if checkpoint.exists():
            run.load(checkpoint)
    main = run.processes.rank == 0
    if checkpoint is not None and main:
        # What a run killed while it wrote has left: our own files beside, and those of safetensors.
        for pattern in (f'.{CHECKPOINT_NAME}.*', f'.{LOG_NAME}.*', f'.{PLOT_NAME}.*', '.tmp??????'):
            for left in checkpoint.parent.glob(pattern):
                left.unlink(missing_ok=True)
    last = min(run.num_steps, max_steps or run.num_steps)
    each = run.recipe.groups.images_per_step
    board = (
        Board(checkpoint.parent / 'board', run.step) if checkpoint is not None and main and run.step < last else None
    )
    saved = time.monotonic()
    bar = tqdm(
        total=last * each, initial=run.step * each, disable=not (progress and main), unit='image', unit_scale=True
    )
    with bar, contextlib.ExitStack() as stack:
        if board is not None:
            stack.callback(board.close)
        for losses in run.steps(last):
            bar.update(each)
            bar.set_postfix({name: f'{value:.3f}' for name, value in losses.items()}, refresh=False)
            if board is not None:
                board.add(run.step, {f'loss/{name}': value for name, value in losses.items()})
            due = run.step == last or time.monotonic() - saved > checkpoint_seconds
            if checkpoint is not None and due and main:
                run.save(checkpoint)
            if due:
                saved = time.monotonic()
    if checkpoint is not None and main and run.step == run.num_steps and any('skipped' not in e for e in run.log):
        plot_losses(run.log, checkpoint.with_name(PLOT_NAME), title=run.recipe.hypernet.model_name)
    run.processes.wait()


def load_banks(recipe: Recipe, data_dir: str | os.PathLike[str] | None = None) -> list[ImageBank]:
    """Reads the seen classes' images into memory, a bank a data set, from `data_dir` in place of the recipe's if given.

    Raises:
        InputError: A set cannot be read, has no labels, or lacks a class that the recipe names.
    """
    banks = []
    for data in recipe.data:
        source = open_images(
            data.images, input=bank_input(recipe.hypernet.input), split=data.split, data_dir=data_dir or data.data_dir
        )
        names = source.class_names or ()
        absent = [name for name in data.unseen if name not in names]
        if absent:
            raise InputError(f'{source.description}: no class {absent[0]!r}, which unseen names')
        chosen = data.classes or tuple(name for name in names if name not in data.unseen)
        if names and not chosen:
            raise InputError(f'{source.description}: unseen names every class, none is left to train on')
        banks.append(ImageBank.from_source(source, chosen or None))
    return banks


def group_sampler(recipe: Recipe, banks: Sequence[ImageBank]) -> GroupSampler:
    """The sampler that a recipe describes."""
    return GroupSampler(
        banks,
        recipe.hypernet.input,
        recipe.groups,
        shares=[data.share for data in recipe.data],
        augmentation=recipe.augmentation,
        seed=recipe.seed,
    )


def rate_at(step: int, num_steps: int, recipe: Recipe) -> float:
    """Share of the largest rate: a linear warm-up, then a cosine down to zero."""
    warm = max(1, round(recipe.schedule.warmup * num_steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, num_steps - warm)))


class _Run:
    """The whole state of a training run: modules, optimisers, sampler, step, log."""

    modules: dict[str, nn.Module]  # what is saved; `target` holds norm statistics, the rest is trained

    def __init__(self, recipe: Recipe, banks: Sequence[ImageBank], device: str | torch.device | None) -> None:
        self.recipe, self.step, self.seconds, self.skipped = recipe, 0, 0.0, 0
        self.processes = Processes(device)
        self.device = self.processes.device or usable_device(device)
        self.num_steps = -(-recipe.schedule.images // recipe.groups.images_per_step)
        self.sampler = group_sampler(recipe, banks)
        self.log: list[dict[str, float]] = []
        if self.parts < self.processes.count:
            raise InputError(
                f'{self.processes.count} processes, but per_step is {self.parts}: raise it to their number or more'
            )
        config = recipe.hypernet
        spec = target_of(config)  # clear errors before any work
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)
            self.target = create_feature_model(spec)
            self.head = nn.Linear(spec.num_features, self.sampler.num_classes)
            self.modules = {name: module.to(device=self.device).train() for name, module in self.build(banks).items()}
            self.target.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        named = [
            (f'{name}.{key}', value)
            for name, module in self.modules.items()
            for key, value in module.named_parameters()
            if value.requires_grad
        ]
        self.parameters = [value for _, value in named]
        # Statistics of norm layers: of the target over groups, and of the sketch encoder.
        self.statistics = [
            buffer
            for module in self.modules.values()
            for part in module.modules()
            if isinstance(part, nn.modules.batchnorm._NormBase)
            for buffer in part.buffers()
        ]
        self.optimizers = self._make_optimizers(named)
        self.average = ModelEmaV3(nn.ModuleDict(self.modules), recipe.schedule.ema) if recipe.schedule.ema else None

    def _started_target(self) -> dict[str, Tensor]:
        """State dict, without classifier, of the model that the recipe starts from."""
        start, config = self.recipe.start, self.recipe.hypernet
        is_folder = Path(start).is_dir()
        if not is_folder and start.partition('.')[0] != config.model_name:
            raise InputError(
                f'start {start} is neither the folder of a timm model nor timm weights of {config.model_name} '
                f'({config.model_name}.TAG)'
            )
        model = pretrained_model(start, start if is_folder else True, config.model_kwargs)
        found, expected = model.state_dict(), self.target.state_dict()
        for key, value in expected.items():
            if key not in found or found[key].shape != value.shape:
                raise InputError(
                    f'start {start} is no {config.model_name} with the arguments of the recipe: {key} is '
                    f'{tuple(found[key].shape) if key in found else "not there"}, not {tuple(value.shape)}'
                )
        return {key: found[key] for key in expected}

    def _make_optimizers(self, named: list[tuple[str, nn.Parameter]]) -> list[torch.optim.Optimizer]:
        schedule = self.recipe.schedule
        ordinary = [value for name, value in named if schedule.optimizer == 'adamw' or self.is_ordinary(name)]
        chosen = {id(value) for value in ordinary}
        others = [value for _, value in named if id(value) not in chosen]
        groups = [
            {'params': [p for p in ordinary if p.ndim > 1], 'weight_decay': schedule.weight_decay},
            {'params': [p for p in ordinary if p.ndim <= 1], 'weight_decay': 0.0},
        ]
        if schedule.optimizer == 'adamw':
            return [torch.optim.AdamW(groups, lr=schedule.rate, fused=True)]
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.SGD(groups, lr=schedule.rate, momentum=0.9, nesterov=True, fused=True)
        ]
        if others:
            optimizers.append(torch.optim.AdamW(others, lr=schedule.sketch_rate, weight_decay=0.0, fused=True))
        return optimizers

    def is_ordinary(self, name: str) -> bool:
        """Whether an ordinary training of the target would train this parameter."""
        raise NotImplementedError

    def build(self, banks: Sequence[ImageBank]) -> dict[str, nn.Module]:
        """The modules of the run by name."""
        raise NotImplementedError

    def losses(self, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a part of a step, and its terms by name; parts are numbered through the run."""
        raise NotImplementedError

    @property
    def parts(self) -> int:
        """Parts of a step, each with a backward pass of its own."""
        raise NotImplementedError

    def steps(self, last: int) -> Iterator[dict[str, float]]:
        """Trains up to step `last`, and gives the mean terms of the loss of every step."""
        schedule = self.recipe.schedule
        while self.step < last:
            started = time.monotonic()
            rate = rate_at(self.step, self.num_steps, self.recipe)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group['lr'] = rate * optimizer.defaults['lr']
            before = [buffer.clone() for buffer in self.statistics]
            sums = self._gradients(before)
            norm = float(nn.utils.clip_grad_norm_(self.parameters, schedule.clip))
            entry = {'step': self.step + 1, 'rate': rate * schedule.rate, **sums}
            if all(map(math.isfinite, [norm, *sums.values()])):
                self.skipped = 0
                for optimizer in self.optimizers:
                    optimizer.step()
            else:
                self._skip(sums, norm, before)
                entry = {'step': self.step + 1, 'rate': rate * schedule.rate, 'skipped': 1.0}
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            self.step += 1
            if self.average is not None:
                self.average.update(nn.ModuleDict(self.modules), self.step)
            self.seconds += time.monotonic() - started
            self.log.append(entry)
            yield sums

    def _gradients(self, before: list[Tensor]) -> dict[str, float]:
        """Gradients of one step, and the mean terms of its loss.

        Every part starts from the norm statistics `before` the step, and the mean of what they become is kept: so it
        does not matter in which order the parts run, or in which process.
        """
        totals = [torch.zeros_like(buffer, dtype=torch.float64) for buffer in self.statistics]
        values: dict[str, Tensor] = {}
        for part in range(self.processes.rank, self.parts, self.processes.count):
            number = self.step * self.parts + part
            for buffer, start in zip(self.statistics, before, strict=True):
                buffer.copy_(start)
            with torch.random.fork_rng([self.device] if self.device.type == 'cuda' else []):
                # Dropout and drop path in the target draw from torch itself.
                torch.manual_seed(zlib.crc32(f'{self.recipe.seed} target {number}'.encode()))
                loss, terms = self.losses(number)
                (loss / self.parts).backward()
            for total, buffer in zip(totals, self.statistics, strict=True):
                total.add_(buffer)
            for name, value in terms.items():
                values[name] = values.get(name, 0.0) + value.detach() / self.parts
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.processes.sum_([*gradients, *totals, *values.values()])
        with torch.no_grad():
            for total, buffer in zip(totals, self.statistics, strict=True):
                buffer.copy_(total / self.parts)
        return {name: float(value) for name, value in values.items()}

    def _skip(self, sums: dict[str, float], norm: float, before: list[Tensor]) -> None:
        """Leaves a step out whose loss or gradient is not finite; too many in a row stop the run."""
        for buffer, start in zip(self.statistics, before, strict=True):
            buffer.copy_(start)
        self.skipped += 1
        reason = f'step {self.step}: the loss is {sums}, the norm of its gradient {norm}'
        if self.skipped >= MOST_SKIPPED:
            raise FloatingPointError(
                f'{reason}; {self.skipped} such steps in a row: lower the rate of the recipe. '
                'The last checkpoint is as it was'
            )
        warnings.warn(f'{reason}; skipped', PudNetWarning, stacklevel=2)

    def settle(self) -> None:
        """Puts the moving average, where the recipe asks for one, in place of the weights."""
        if self.average is not None:
            for name, module in self.modules.items():
                module.load_state_dict(self.average.module[name].state_dict())  # type: ignore[index, union-attr]

    @torch.inference_mode()
    def tested(self, groups: int, what: str) -> Iterator[tuple[Group, Tensor, Tensor]]:
        """New groups of seen classes, each treated as one of unseen classes; features of support and query."""
        with torch.random.fork_rng():
            model = create_feature_model(target_of(self.recipe.hypernet)).to(self.device)
        sampler = group_sampler(self.recipe, self.sampler.banks)
        sampler.augmentation = None
        modes = {module: module.training for one in self.modules.values() for module in one.modules()}
        for number in range(groups):
            group = sampler.draw(number, what)
            support, query = group.support.to(self.device), group.query.to(self.device)
            weights = self.weights_of(support)
            model.load_state_dict(weights)
            features = calibrate(model, support, weights, prior_images=self.recipe.hypernet.prior_images)
            yield group, features, model(query)
        for module, mode in modes.items():
            module.training = mode

    def whitening(self) -> Tensor:
        """The whitening of the features within classes; the identity where the recipe wants none."""
        learned = Whitening(self.head.in_features)
        if self.recipe.schedule.whitening:
            for group, support, query in self.tested(40, 'whitening'):
                learned.add(torch.cat([support, query]), torch.cat([group.support_classes, group.query_classes]))
        return learned.result()

    def accuracy(self, groups: int = 10) -> tuple[float, float]:
        """Share of query images of seen classes that eq. 7 gets right, and chance."""
        right, chance = [], []
        for group, support, query in self.tested(groups, 'accuracy'):
            classes, labels = group.support_classes.unique(return_inverse=True)
            centroids = class_centroids(support, labels, len(classes))
            guesses = classes[centroid_logits(query, centroids, 1.0).argmax(1).cpu()]
            right.append(float((guesses == group.query_classes).float().mean()))
            chance.append(1 / len(classes))
        return sum(right) / groups, sum(chance) / groups

    def weights_of(self, support: Tensor) -> dict[str, Tensor]:
        """State dict of the target for a group's support images."""
        raise NotImplementedError

    def mixed_precision(self) -> torch.autocast:
        """The context of forward passes, as the recipe's precision says."""
        half = self.recipe.schedule.precision == 'bfloat16'
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)

    def features(self, images: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        """The target's features `[n, d]` in float32; with its own weights, or with these."""
        images = images.contiguous(memory_format=torch.channels_last)
        with self.mixed_precision():
            if weights is None:
                return self.target(images).float()
            return torch.func.functional_call(self.target, weights, (images,)).float()

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {
            f'{name}.{key}': value
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
        }
        for number, parameter in enumerate(self.parameters):
            for optimizer in self.optimizers:
                for name, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        tensors[f'optimizer.{number}.{name}'] = value
        if self.average is not None:
            tensors.update({f'average.{key}': value for key, value in self.average.module.state_dict().items()})
        return tensors

    def save(self, path: Path) -> None:
        """Writes the checkpoint and the log beside it, each whole or not at all."""
        about = {
            'kind': type(self).__name__,
            'recipe': self.recipe.digest,
            'step': str(self.step),
            'seconds': str(self.seconds),
            'skipped': str(self.skipped),
            'log': json.dumps(self.log),
        }
        tensors = {
            key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for key, value in self._tensors().items()
        }
        # The log takes its place first: a run stopped between the two writes it again, one at its end would not.
        with written_whole(path) as beside, written_whole(path.with_name(LOG_NAME)) as log:
            save_tensors(tensors, beside, about)
            log.write_text(''.join(json.dumps(entry) + '\n' for entry in self.log), encoding='utf-8')

    def load(self, path: Path) -> None:
        """Goes back to the state of a checkpoint."""
        try:
            with safe_open(path, 'pt') as file:
                about = file.metadata() or {}
            tensors = safetensors.torch.load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise DamagedFileError(f'{path} is damaged ({error}): remove it to start anew') from error
        if (about.get('recipe'), about.get('kind')) != (self.recipe.digest, type(self).__name__):
            raise InputError(f'{path} belongs to another recipe: choose another folder, or remove it to start anew')
        home = {id(p): o for o in self.optimizers for group in o.param_groups for p in group['params']}
        for number, parameter in enumerate(self.parameters):
            state = _taken(tensors, f'optimizer.{number}.')
            if state:
                home[id(parameter)].state[parameter] = {
                    # In the memory format of the parameter, which fused steps want.
                    name: value.to(self.device) if name == 'step' else torch.empty_like(parameter).copy_(value)
                    for name, value in state.items()
                }
        if self.average is not None:
            self.average.module.load_state_dict(_taken(tensors, 'average.'))
        for name, module in self.modules.items():
            module.load_state_dict(_taken(tensors, f'{name}.'))
        self.step, self.seconds, self.skipped = int(about['step']), float(about['seconds']), int(about['skipped'])
        self.log = json.loads(about['log'])


class _MetaRun(_Run):
    """Algorithm 1. The target lends its forward pass and its norm statistics; its own weights are never used."""

    def build(self, banks: Sequence[ImageBank]) -> dict[str, nn.Module]:
        names = tuple(name for bank in banks for name in bank.class_names)
        self.hypernet = PudNet.for_target(**_fields(self.recipe.hypernet, class_names=names))
        if self.recipe.start:
            state = self._started_target()
            self.hypernet.start_from(state)
            self.target.load_state_dict(state)  # for the norm statistics
        self.target.requires_grad_(False)
        return {'hypernet': self.hypernet, 'head': self.head, 'target': self.target}

    def is_ordinary(self, name: str) -> bool:
        return name.startswith(('head.', 'hypernet.shared.')) or name.endswith('.base')

    @property
    def parts(self) -> int:
        return self.recipe.groups.per_step

    def losses(self, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward pass of one group: sketch, weights, features of support and query in one batch, losses."""
        weigh = self.recipe.losses
        group = self.sampler.draw(number)
        support, query = (images.to(self.device) for images in (group.support, group.query))
        further = None  # groups for the sketch's own loss
        if weigh.sketch and self.recipe.groups.sketch_groups:
            further = self.sampler.draw_halves(number).to(self.device)
        with self.mixed_precision():
            rows = self.hypernet.encoder(support if further is None else torch.cat([support, further.flatten(0, 2)]))
        weights = self.hypernet(rows[: len(support)].mean(0))
        for key in self.hypernet.target.keys('calibrated'):
            del weights[key]  # the target keeps its own: batch statistics in training
        features = self.features(torch.cat([support, query]), weights)
        losses = group_losses(
            features[: len(support)],
            features[len(support) :],
            group.support_classes.to(self.device),
            group.query_classes.to(self.device),
            full_logits=self.head(features),
            temperature=self.hypernet.temperature,
            label_smoothing=self.recipe.schedule.label_smoothing,
        )
        terms = {'metric': losses.metric, 'full': losses.full, 'consistency': losses.consistency}
        if further is not None:
            terms['sketch'] = sketch_loss(rows[len(support) :].unflatten(0, further.shape[:3]).mean(2))
        # A term of weight 0 is watched, not trained on.
        kept = [getattr(weigh, name) * value for name, value in terms.items() if getattr(weigh, name)]
        return torch.stack(kept).sum(), terms

    def finished(self) -> PudNet:
        """The hypernetwork, with the norm statistics that the target gathered over the groups."""
        self.settle()
        buffers = dict(self.target.named_buffers())
        for key in self.hypernet.target.keys('calibrated'):
            self.hypernet.statistics(key).copy_(buffers[key])
        cost = {
            'images': self.step * self.recipe.groups.images_per_step,
            'seconds': round(self.seconds),
            'machine': f'{platform.machine()}, {torch.get_num_threads()} threads, {self.device.type}, '
            f'{self.processes.count} process{"es" if self.processes.count > 1 else ""}',
            'recipe_digest': self.recipe.digest,
        }
        self.hypernet.config = dataclasses.replace(self.hypernet.config, training=cost)
        self.hypernet.whitening.copy_(self.whitening())
        return self.hypernet.cpu().eval()

    def weights_of(self, support: Tensor) -> dict[str, Tensor]:
        """The hypernetwork's weights, with the norm statistics of training."""
        return self.hypernet.eval()(self.hypernet.encoder(support).mean(0))


class _PlainRun(_Run):
    """The control *plain*: the target itself as an ordinary classifier of the seen classes."""

    def is_ordinary(self, name: str) -> bool:
        return True

    def weights_of(self, support: Tensor) -> dict[str, Tensor]:
        """The target's own weights, whatever the group."""
        return self.target.state_dict()

    def build(self, banks: Sequence[ImageBank]) -> dict[str, nn.Module]:
        if self.recipe.start:
            self.target.load_state_dict(self._started_target())
        return {'target': self.target, 'head': self.head}

    @property
    def parts(self) -> int:
        return self.processes.count

    def losses(self, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward pass of an ordinary batch, cross-entropy of the full head."""
        images, labels = self.sampler.batch(number, self.recipe.groups.images_per_step // self.parts)
        logits = self.head(self.features(images.to(self.device)))
        smoothing = self.recipe.schedule.label_smoothing
        loss = F.cross_entropy(logits, labels.to(self.device), label_smoothing=smoothing)
        return loss, {'full': loss}


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Removes the tensors of a prefix and gives them without it."""
    return {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}


def _fields(config: PudNetConfig, **changes: Any) -> dict[str, Any]:
    """The fields of a config as arguments, nested configs left whole."""
    return {**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)}, **changes}
