"""Meta-training (Algorithm 1): learns a hypernetwork from many groups of images.

A checkpoint is one safetensors file that holds the whole state of the run, so that a resumed run goes on as if it had
never stopped. It is written beside its place and renamed, so it is whole or absent.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from timm_pudnet.adapt import Whitening, calibrate
from timm_pudnet.config import DamagedFileError, InputError, PudNetConfig
from timm_pudnet.hypernet import PudNet, save_tensors, usable_device, written_whole
from timm_pudnet.images import open_images
from timm_pudnet.target import describe_target
from timm_pudnet.training.episodes import GroupSampler, ImageBank, bank_input
from timm_pudnet.training.losses import group_losses
from timm_pudnet.training.recipe import Recipe

CHECKPOINT_NAME = 'checkpoint.safetensors'
LOG_NAME = 'log.jsonl'


def meta_train(
    recipe: Recipe | str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    bank: ImageBank | None = None,
    device: str | torch.device | None = None,
    checkpoint_seconds: float = 120.0,
    max_steps: int | None = None,
    progress: bool = True,
) -> PudNet:
    """Trains a hypernetwork by a recipe; goes on where an earlier run of the same recipe in `folder` stopped.

    Args:
        recipe: A recipe or the path of its file.
        folder: Where checkpoint and log go; without it nothing is written.
        bank: The seen classes' images, if they are in memory already; otherwise they are read as the recipe says.
        device: Default: CUDA where there is one.
        checkpoint_seconds: Seconds between checkpoints.
        max_steps: Stop after so many steps in all, with a checkpoint, as if interrupted.
        progress: Show a progress bar.

    Returns:
        The trained hypernetwork, in eval mode, on the CPU.

    Raises:
        InputError: The recipe, its data, or a checkpoint of another recipe.
        FloatingPointError: The loss is no longer finite; the last checkpoint remains.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    run = _MetaRun(recipe, bank or load_bank(recipe), usable_device(device))
    _go(run, folder, checkpoint_seconds, max_steps, progress)
    return run.finished()


def train_plain(
    recipe: Recipe | str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    bank: ImageBank | None = None,
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
    run = _PlainRun(recipe, bank or load_bank(recipe), usable_device(device))
    _go(run, folder, checkpoint_seconds, max_steps, progress)
    whitening = run.whitening()
    return run.target.cpu().eval(), whitening


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
    last = min(run.num_steps, max_steps or run.num_steps)
    saved = time.monotonic()
    with tqdm(total=last, initial=run.step, disable=not progress, unit='step') as bar:
        for losses in run.steps(last):
            bar.update()
            bar.set_postfix({name: f'{value:.3f}' for name, value in losses.items()}, refresh=False)
            if checkpoint is not None and (run.step == last or time.monotonic() - saved > checkpoint_seconds):
                run.save(checkpoint)
                saved = time.monotonic()


def load_bank(recipe: Recipe, data_dir: str | os.PathLike[str] | None = None) -> ImageBank:
    """Reads the images of the recipe's seen classes into memory, from `data_dir` in place of the recipe's if given."""
    data = recipe.data
    source = open_images(
        data.images, input=bank_input(recipe.hypernet.input), split=data.split, data_dir=data_dir or data.data_dir
    )
    return ImageBank.from_source(source, data.classes or None)


def group_sampler(recipe: Recipe, bank: ImageBank) -> GroupSampler:
    """The sampler that a recipe describes."""
    groups = recipe.groups
    return GroupSampler(
        bank,
        recipe.hypernet.input,
        n_way=groups.n_way,
        n_shot=groups.n_shot,
        n_query=groups.n_query,
        turns=groups.turns,
        augmentation=recipe.augmentation,
        seed=recipe.seed,
    )


def rate_at(step: int, num_steps: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to zero."""
    schedule = recipe.schedule
    warm = max(1, round(schedule.warmup * num_steps))
    if step < warm:
        return schedule.rate * (step + 1) / warm
    return schedule.rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, num_steps - warm)))


class _Run:
    """The whole state of a training run: modules, optimiser, sampler, step, log."""

    modules: dict[str, nn.Module]  # what is saved; `target` holds norm statistics, the rest is trained

    def __init__(self, recipe: Recipe, bank: ImageBank, device: torch.device) -> None:
        self.recipe, self.device, self.step, self.seconds = recipe, device, 0, 0.0
        self.num_steps = -(-recipe.schedule.images // recipe.groups.images_per_step)
        self.sampler = group_sampler(recipe, bank)
        self.log: list[dict[str, float]] = []
        config = recipe.hypernet
        describe_target(config.model_name, **config.model_kwargs)  # clear errors before any work
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)
            self.target_kwargs = {**config.model_kwargs, 'num_classes': 0}
            self.target = timm.create_model(config.model_name, **self.target_kwargs)
            self.head = nn.Linear(int(self.target.num_features), self.sampler.num_classes)  # type: ignore[arg-type]
            self.modules = {name: module.to(device).train() for name, module in self.build(bank).items()}
            self.random_state = self._get_random_state()  # of torch itself, which dropout in the target draws from
        self.parameters = [p for m in self.modules.values() for p in m.parameters() if p.requires_grad]
        decay = recipe.schedule.weight_decay
        self.optimizer = torch.optim.AdamW(
            [
                {'params': [p for p in self.parameters if p.ndim > 1], 'weight_decay': decay},
                {'params': [p for p in self.parameters if p.ndim <= 1], 'weight_decay': 0.0},
            ],
            lr=recipe.schedule.rate,
            fused=True,
        )

    def _get_random_state(self) -> dict[str, Tensor]:
        states = {'cpu': torch.get_rng_state()}
        if self.device.type == 'cuda':
            states['cuda'] = torch.cuda.get_rng_state(self.device)
        return states

    def _set_random_state(self, states: dict[str, Tensor]) -> None:
        torch.set_rng_state(states['cpu'])
        if self.device.type == 'cuda' and 'cuda' in states:
            torch.cuda.set_rng_state(states['cuda'], self.device)

    def build(self, bank: ImageBank) -> dict[str, nn.Module]:
        raise NotImplementedError

    def losses(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a part of the step, and its terms by name."""
        raise NotImplementedError

    @property
    def parts(self) -> int:
        """Parts of a step, each with a backward pass of its own."""
        raise NotImplementedError

    def steps(self, last: int) -> Iterator[dict[str, float]]:
        """Trains up to step `last`, and gives the mean terms of the loss of every step."""
        while self.step < last:
            started = time.monotonic()
            for group in self.optimizer.param_groups:
                group['lr'] = rate_at(self.step, self.num_steps, self.recipe)
            sums: dict[str, float] = {}
            devices = [self.device] if self.device.type == 'cuda' else []
            with torch.random.fork_rng(devices):
                self._set_random_state(self.random_state)
                for _ in range(self.parts):
                    loss, terms = self.losses()
                    (loss / self.parts).backward()
                    for name, value in terms.items():
                        sums[name] = sums.get(name, 0.0) + float(value.detach()) / self.parts
                self.random_state = self._get_random_state()
            norm = float(nn.utils.clip_grad_norm_(self.parameters, self.recipe.schedule.clip))
            if not all(map(math.isfinite, [norm, *sums.values()])):
                raise FloatingPointError(
                    f'step {self.step}: the loss is {sums}, the norm of its gradient {norm}; lower the rate of the '
                    'recipe. The last checkpoint is as it was'
                )
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            self.seconds += time.monotonic() - started
            self.log.append({'step': self.step, 'rate': self.optimizer.param_groups[0]['lr'], **sums})
            yield sums

    @torch.inference_mode()
    def whitening(self, groups: int = 40) -> Tensor:
        """The whitening of the features, from new groups of seen classes, each treated as a group of unseen ones."""
        learned = Whitening(self.head.in_features)
        with torch.random.fork_rng():
            model = timm.create_model(self.recipe.hypernet.model_name, **self.target_kwargs).to(self.device)
        sampler = copy.copy(self.sampler)
        sampler.augmentation = None
        for _ in range(groups):
            group = sampler.draw()
            support, query = group.support.to(self.device), group.query.to(self.device)
            weights = self.weights_of(support)
            model.load_state_dict(weights)
            features = [calibrate(model, support, weights), model(query)]
            learned.add(torch.cat(features), torch.cat([group.support_classes, group.query_classes]))
        return learned.result()

    def weights_of(self, support: Tensor) -> dict[str, Tensor]:
        """State dict of the target for a group's support images."""
        raise NotImplementedError

    def features(self, images: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        """The target's features `[n, d]` in float32; with its own weights, or with these."""
        images = images.contiguous(memory_format=torch.channels_last)
        half = self.recipe.schedule.precision == 'bfloat16'
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
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
            for name, value in self.optimizer.state[parameter].items():
                tensors[f'optimizer.{number}.{name}'] = value
        tensors['generator'] = self.sampler.generator.get_state()
        tensors.update({f'target_generator.{place}': state for place, state in self.random_state.items()})
        return tensors

    def save(self, path: Path) -> None:
        """Writes the checkpoint and the log beside it, each whole or not at all."""
        about = {
            'kind': type(self).__name__,
            'recipe': self.recipe.digest,
            'step': str(self.step),
            'seconds': str(self.seconds),
            'log': json.dumps(self.log),
        }
        tensors = {key: value.detach().cpu().contiguous() for key, value in self._tensors().items()}
        with written_whole(path) as beside:
            save_tensors(tensors, beside, about)
        with written_whole(path.with_name(LOG_NAME)) as beside:
            beside.write_text(''.join(json.dumps(entry) + '\n' for entry in self.log), encoding='utf-8')

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
        for number, parameter in enumerate(self.parameters):
            state = _taken(tensors, f'optimizer.{number}.')
            if state:
                self.optimizer.state[parameter] = {
                    name: value if name == 'step' else value.to(self.device) for name, value in state.items()
                }
        for name, module in self.modules.items():
            module.load_state_dict(_taken(tensors, f'{name}.'))
        self.sampler.generator.set_state(tensors['generator'])
        self.random_state = _taken(tensors, 'target_generator.')
        self.step, self.seconds = int(about['step']), float(about['seconds'])
        self.log = json.loads(about['log'])


class _MetaRun(_Run):
    """Algorithm 1. The target lends its forward pass and its norm statistics; its own weights are never used."""

    def build(self, bank: ImageBank) -> dict[str, nn.Module]:
        self.hypernet = PudNet.for_target(**_fields(self.recipe.hypernet, class_names=bank.class_names))
        self.target.requires_grad_(False)
        return {'hypernet': self.hypernet, 'head': self.head, 'target': self.target}

    @property
    def parts(self) -> int:
        return self.recipe.groups.per_step

    def losses(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward pass of one group: sketch, weights, features of support and query in one batch, losses."""
        group = self.sampler.draw()
        support, query = (images.to(self.device) for images in (group.support, group.query))
        weights = self.hypernet(self.hypernet.encoder(support).mean(0))
        for key in self.hypernet.target.keys('calibrated'):
            del weights[key]  # the target keeps its own: batch statistics in training
        features = self.features(torch.cat([support, query]), weights)
        halves = features.split([len(support), len(query)])
        losses = group_losses(
            halves[0],
            halves[1],
            group.support_classes.to(self.device),
            group.query_classes.to(self.device),
            full_logits=self.head(features),
            temperature=self.hypernet.temperature,
            label_smoothing=self.recipe.schedule.label_smoothing,
        )
        terms = {'metric': losses.metric, 'full': losses.full, 'consistency': losses.consistency}
        return losses.total, terms

    def finished(self) -> PudNet:
        """The hypernetwork, with the norm statistics that the target gathered over the groups."""
        buffers = dict(self.target.named_buffers())
        for key in self.hypernet.target.keys('calibrated'):
            self.hypernet.statistics(key).copy_(buffers[key])
        cost = {
            'images': self.step * self.recipe.groups.images_per_step,
            'seconds': round(self.seconds),
            'machine': f'{platform.machine()}, {torch.get_num_threads()} threads, {self.device.type}',
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

    def weights_of(self, support: Tensor) -> dict[str, Tensor]:
        """The target's own weights, whatever the group."""
        return self.target.state_dict()

    def build(self, bank: ImageBank) -> dict[str, nn.Module]:
        return {'target': self.target, 'head': self.head}

    @property
    def parts(self) -> int:
        return 1

    def losses(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward pass of an ordinary batch, cross-entropy of the full head."""
        images, labels = self.sampler.batch(self.recipe.groups.images_per_step)
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
