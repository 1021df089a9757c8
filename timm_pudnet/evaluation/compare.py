"""Accuracy against seconds on the caller's own images: predicted, fine-tuned, from scratch, timm's pretrained weights.

Dimension letters: `n` images, `c h w` an image, `d` features, `k` classes.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from torch import Tensor
from tqdm import tqdm

from timm_pudnet.adapt import centroid_logits, class_centroids
from timm_pudnet.config import (
    InputConfig,
    InputError,
    NotFoundError,
    PudNetWarning,
    as_plain,
    checked_seed,
    close_names,
    first_line,
)
from timm_pudnet.devices import forked_rng, library_versions, machine, own_defaults, usable_device
from timm_pudnet.evaluation.metrics import share_interval
from timm_pudnet.evaluation.scratch import train_from_scratch
from timm_pudnet.files import folder_path, local_path, written_whole
from timm_pudnet.hub import resolve_hypernet
from timm_pudnet.hypernet import PudNet, pretrained_model
from timm_pudnet.images import ImageSource, check_root, open_images, reorders
from timm_pudnet.predict import predict_model
from timm_pudnet.target import input_of, laid_out, small_maps_first
from timm_pudnet.training.episodes import ImageBank, bank_input
from timm_pudnet.training.finetune import (
    MODES,
    copies_line,
    finetune_epochs,
    fit_classifier,
    measured,
    name_classes,
    normalised_batches,
    seconds_since,
    split_copies,
    tuning_for,
)
from timm_pudnet.training.watch import warn_missing

ARMS = {
    'predicted': 'predicted',
    'fine_tuned': 'predicted, fine-tuned',
    'adam': 'from scratch, Adam',
    'adam_centralised': 'from scratch, centralised',
    'random': 'random, tuned likewise',
    'pretrained': "timm's pretrained weights",
}
SETTING = (
    'all arms get the same images to learn from and are tested on the same others; seconds are of prediction and '
    'training alone, without reading images, loading weights and tests; fine_tuned starts with the seconds of '
    "predicted; pretrained is eq. 7 on the features of timm's pretrained weights, at their own input size"
)


@own_defaults()
def compare(
    model_name: str,
    images: Any,
    labels: Any = None,
    *,
    hypernet: PudNet | str | os.PathLike[str] | None = None,
    epochs: int = 20,
    budget: float | None = None,
    holdout: float = 0.25,
    arms: Sequence[str] = ('fine_tuned', 'adam', 'adam_centralised', 'pretrained'),
    pretrained: str | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    split: str = 'train',
    data_dir: str | None = None,
    strict: bool = False,
    progress: bool = True,
    on_result: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measures on the caller's images and machine what a prediction is worth, in accuracy against seconds.

    The arms are predicted weights, these fine-tuned, training from scratch by Adam and by Adam with gradient
    centralisation, and timm's pretrained weights with the same head (eq. 7) where they can be had. The arm that has
    had the fewest seconds goes next, so that the curves are as long as each other whenever this ends. An interrupt
    (Ctrl-C) ends it, and what was measured comes back.

    Args:
        model_name: timm architecture.
        images: Labelled images in any form that `predict_model` takes; they are held in memory.
        labels: Class of every image, as numbers or names; else those of the data.
        hypernet: A `PudNet`, its folder or its name; by default the one that serves the architecture.
        epochs: Passes over the images of each training.
        budget: Seconds after which no further epoch is begun, of everything but the reading of the images; without
            one all epochs run.
        holdout: Share of the images that is tested, in (0, 1).
        arms: Which stand beside the predicted weights: those above by default; `random` is a random initialisation
            trained by the optimiser, schedule and random changes of images of `fine_tuned` for many images, all layers
            at one rate.
        pretrained: Name of the model with pretrained weights, `resnet18.a1_in1k` or `local-dir:FOLDER` for instance; by
            default the architecture's own.
        seed: Of the choice of tested images and of all that training draws; from 0 to 2**31 - 1.
        device: Where to run; by default CUDA where there is one.
        split: Split of a timm dataset.
        data_dir: Root of a timm dataset.
        strict: An unreadable image is an error; otherwise it is skipped, with a warning that counts them.
        progress: Show a progress bar.
        on_result: Called with the result so far, after each point of a curve.

    Returns:
        A mapping that JSON can hold: `arms` with the points of each, `seconds`, `accuracy` in percent with its 95 %
        interval `low` to `high` (Wilson's) and `epoch`; `left_out`: why an arm is not there, or ended early;
        `break_even`: for each training from scratch the seconds until it is as good as `predicted`, and until it is as
        good as `fine_tuned` was by then, None where it never was; `ended`: by `epochs`, `budget` or `interrupt`;
        `running` in a file whose comparison was killed.

    Raises:
        InputError: The images, labels or arguments cannot be used.
        NotFoundError: A folder or hypernetwork is not there.
        UnsupportedTargetError: The hypernetwork was not made for this architecture.
        KeyboardInterrupt: Interrupted before anything was measured.

    Warns:
        PudNetWarning: Some images are copies of others.
    """
    epochs, seed = as_plain(epochs), checked_seed(seed)
    if not isinstance(epochs, int) or epochs < 1:
        raise InputError(f'epochs must be a whole number above zero, got {epochs!r}')
    if not 0 < holdout < 1:
        raise InputError(f'holdout must be in (0, 1), some images are tested, got {holdout}')
    if budget is not None and not budget > 0:
        raise InputError(f'budget must be above zero seconds, got {budget}')
    for name in arms:
        if name == 'predicted' or name not in ARMS:
            raise InputError(f'arm {name!r}: use some of {", ".join(list(ARMS)[1:])}')
    if pretrained is not None:
        _check_name(pretrained)
    if 'pretrained' in arms and reorders(images):
        raise InputError(
            'a DataLoader that shuffles cannot be read twice alike, as the arm pretrained does; pass shuffle=False, or '
            'the Dataset itself'
        )
    if isinstance(labels, Iterator):  # read once for each opening
        labels = list(labels)
    check_root(data_dir, images)
    device = usable_device(device)
    network = resolve_hypernet(model_name, hypernet)
    config = network.config.input

    def opened(input: InputConfig) -> ImageSource:
        return open_images(images, labels, input=input, split=split, data_dir=data_dir, strict=strict)

    bank = ImageBank.from_source(opened(bank_input(config)), progress=progress)
    picks, aside, copies = split_copies(bank, holdout, seed)
    if copies:
        warnings.warn(copies_line(copies, config), PudNetWarning, stacklevel=2)
    if not len(aside):
        raise InputError('no image can be kept aside for the test: some class needs two different images')
    used, tested = bank.part(picks), bank.part(aside)
    networks = _Networks(model_name, network, used=used, tested=tested, epochs=epochs, seed=seed, device=device)
    runs = {
        'fine_tuned': networks.fine_tuned,
        'adam': lambda: networks.from_scratch(centralise=False),
        'adam_centralised': lambda: networks.from_scratch(centralise=True),
        'random': networks.random,
        'pretrained': lambda: _pretrained(pretrained or model_name, opened, bank, picks, aside, device),
    }
    result: dict[str, Any] = {
        'setting': SETTING,
        'model_name': model_name,
        'hypernet': network.name,
        'images': len(used.labels),
        'tested': len(tested.labels),
        'classes': len(bank.class_names),
        'copies': copies,
        'mode': networks.mode,
        'epochs': epochs,
        'budget': budget,
        'seed': seed,
        'arms': {},
        'left_out': {},
        'break_even': {},
        'ended': 'running',
        'library_versions': library_versions(),
        'machine': machine(device),
    }
    points = 1 + sum(1 if name == 'pretrained' else epochs for name in arms)
    curves = _Curves(result, tqdm(total=points, disable=not progress, unit='point'), on_result)
    try:
        with curves.bar:
            curves.add('predicted', networks.predict())
            curves.extend({name: runs[name]() for name in arms})
    except KeyboardInterrupt:
        if not result['arms']:
            raise
        result['ended'] = 'interrupt'
        for name in arms:
            if name not in result['arms']:
                result['left_out'].setdefault(name, 'interrupted before')
    if on_result is not None:
        on_result(result)
    return result


class _Curves:
    """The points of each arm of a result of `compare`, as they are measured."""

    def __init__(self, result: dict[str, Any], bar: tqdm, on_result: Callable[[dict[str, Any]], None] | None) -> None:
        self.result, self.bar, self.on_result = result, bar, on_result
        self.began = time.perf_counter()

    def add(self, name: str, point: dict[str, Any]) -> None:
        """Adds a point to an arm, tells of it, and hands the result so far on."""
        result, right, count = self.result, point['right'], self.result['tested']
        low, high = share_interval(right, count)
        row = {**{key: point[key] for key in ('epoch', 'seconds')}, 'accuracy': 100 * right / count}
        if name == 'fine_tuned':  # whose curve begins where the prediction is
            result['arms'].setdefault(name, list(result['arms']['predicted']))
        result['arms'].setdefault(name, []).append({**row, 'low': 100 * low, 'high': 100 * high})
        result['break_even'] = _break_even(result['arms'])
        self.bar.update()
        self.bar.set_postfix({name: f'{row["accuracy"]:.1f} %'})
        if self.on_result is not None:
            self.on_result(result)

    def extend(self, arms: dict[str, Iterator[dict[str, Any]]]) -> None:
        """Takes points from these arms until they or the budget end; the arm that had the fewest seconds goes next."""
        result, budget, waiting = self.result, self.result['budget'], dict(arms)
        spent = dict.fromkeys(arms, 0.0)
        while waiting:
            name = min(waiting, key=spent.__getitem__)
            if budget is not None and time.perf_counter() - self.began >= budget:
                waiting.pop(name)
                result['ended'] = 'budget'
                if name not in result['arms']:
                    result['left_out'][name] = f'not done within the budget of {budget:g} s'
                continue
            try:
                point = next(waiting[name], None)
            except (InputError, FloatingPointError, NotFoundError, torch.OutOfMemoryError) as error:
                result['left_out'][name] = str(error)
                point = None
            if point is None:
                waiting.pop(name)
                continue
            spent[name] = point['seconds']
            if 'accuracy' in point:
                self.add(name, point)
        if result['ended'] == 'running':
            result['ended'] = 'epochs'


class _Networks:
    """A prediction from the images of `used`, and trainings on them, each tested on those of `tested`.

    Each gives points with `epoch`, `seconds`, the number of `right` answers and `accuracy`.
    """

    def __init__(
        self,
        model_name: str,
        network: PudNet,
        *,
        used: ImageBank,
        tested: ImageBank,
        epochs: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.model_name, self.network, self.used, self.tested = model_name, network, used, tested
        self.epochs, self.seed, self.device = epochs, seed, device
        self.mode, self.tuning = tuning_for('auto', used, epochs=epochs)
        self.predicted: torch.nn.Module
        self.predicted_seconds = 0.0

    def predict(self) -> dict[str, Any]:
        """Predicts the model, which fine-tuning starts from, and gives its point."""
        config, few = self.network.config.input, self.used.part(torch.arange(min(32, len(self.used.labels))))
        warm, given = few.source(config), self.used.source(config)
        predict_model(self.model_name, warm, hypernet=self.network, head='none', device=self.device)
        started = time.perf_counter()
        self.predicted = predict_model(self.model_name, given, hypernet=self.network, device=self.device)
        self.predicted_seconds = seconds_since(started, self.device)
        name_classes(self.predicted, self.used.class_names)
        return {'epoch': 0, 'seconds': self.predicted_seconds, **measured(self.predicted, self.tested)}

    def fine_tuned(self) -> Iterator[dict[str, Any]]:
        """The predicted model, trained on."""
        model = copy.deepcopy(self.predicted)
        fit_classifier(model, self.used.class_names)
        for point in finetune_epochs(model, self.used, self.tested, self.tuning, seed=self.seed):
            yield {**point, 'seconds': point['seconds'] + self.predicted_seconds}

    def random(self) -> Iterator[dict[str, Any]]:
        """A random initialisation, trained as fine-tuning trains on many images."""
        model = copy.deepcopy(self.predicted)
        with forked_rng(self.device):
            torch.manual_seed(self.seed)
            kwargs = {**self.network.config.model_kwargs, 'num_classes': len(self.used.class_names)}
            fresh = timm.create_model(self.model_name, **kwargs)
        model.load_state_dict(fresh.state_dict())
        how = dataclasses.replace(MODES['full'], epochs=self.epochs, head_first=False, layer_decay=1.0)
        return finetune_epochs(model, self.used, self.tested, how, seed=self.seed)

    @functools.cached_property  # for both that train from scratch
    def _as_shown(self) -> list[Tensor]:
        parts = (self.used, self.tested)
        found = [torch.empty(part.images.shape, device=self.device) for part in parts]
        for part, floats in zip(parts, found, strict=True):
            batches = normalised_batches(part, self.network.config.input, self.device)
            for shown, room in zip(batches, floats.split(256), strict=True):
                room.copy_(shown)
        return found

    def from_scratch(self, *, centralise: bool) -> Iterator[dict[str, Any]]:
        """Ordinary training by Adam, perhaps with gradient centralisation."""
        shown, asked = self._as_shown
        for point in train_from_scratch(
            self.model_name,
            self.network.config.model_kwargs,
            shown,
            self.used.labels,
            asked,
            self.tested.labels,
            num_epochs=self.epochs,
            centralise=centralise,
            seed=self.seed,
        ):
            yield {**point, 'right': int(point['right'].sum())}


def _pretrained(
    name: str,
    opened: Callable[[InputConfig], ImageSource],
    bank: ImageBank,
    picks: Tensor,
    aside: Tensor,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """Eq. 7 on features of timm's pretrained weights; gives `seconds` on its way, and in the end the accuracy too."""
    model = _downloaded(name).to(device).eval()
    is_used = torch.zeros(len(bank.labels)).index_fill_(0, picks, 1.0)
    seconds, features, labels, count = 0.0, [], [], 0
    for images, batch_labels in opened(input_of(model)).batches(32):
        started = time.perf_counter()
        with torch.inference_mode(), small_maps_first(model):
            features.append(model(laid_out(images.to(device))).float().cpu())
        # Only the images that it learns from count, as in the other arms.
        share = is_used[count : count + len(images)].sum() / len(images)
        seconds += float(share) * seconds_since(started, device)
        count += len(images)
        labels.append(batch_labels)
        yield {'seconds': seconds}
    if count != len(bank.labels):
        raise NotFoundError(f'at its input size {count:,} of {len(bank.labels):,} images can be read')
    if not torch.equal(torch.cat(labels), bank.labels):
        raise NotFoundError('the images come in another order when they are read again')
    rows = torch.cat(features)
    centroids = class_centroids(rows[picks], bank.labels[picks], len(bank.class_names))
    right = int((centroid_logits(rows[aside], centroids, 1.0).argmax(1) == bank.labels[aside]).sum())
    yield {'epoch': 0, 'seconds': seconds, 'right': right, 'accuracy': 100 * right / len(aside)}


def _check_name(name: str) -> None:
    """Refuses pretrained weights that nobody has, before any work."""
    if name.startswith('local-dir:'):
        if not folder_path(name).is_dir():
            raise NotFoundError(f'pretrained {name}: no such folder')
        return
    try:
        known = timm.get_pretrained_cfg(name) is not None
    except RuntimeError:  # a known architecture with an unknown tag
        known = False
    if not known:
        close = close_names(name, timm.list_pretrained())
        raise InputError(f'pretrained {name}: timm has no such weights.{close} A local-dir:FOLDER will do too')


def _downloaded(name: str) -> torch.nn.Module:
    """A feature model with pretrained weights, from timm's cache, the Hub or a folder."""
    if name.startswith('local-dir:'):
        return pretrained_model(folder_path(name), {'num_classes': 0})
    overlay: dict[str, Any] = {}
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise NotFoundError(f'timm has no pretrained weights for {name}')
    if config.hf_hub_id:
        cached = huggingface_hub.try_to_load_from_cache(config.hf_hub_id, 'model.safetensors')
        if isinstance(cached, str):
            overlay = {'pretrained_cfg_overlay': {'file': cached}}
        else:  # asked once and briefly: without a network the download itself would try for a minute
            try:
                huggingface_hub.HfApi().model_info(config.hf_hub_id, timeout=10)
            except Exception as error:
                raise NotFoundError(f'{config.hf_hub_id} cannot be had ({first_line(error)})') from error
    try:
        return timm.create_model(name, pretrained=True, num_classes=0, **overlay)
    except Exception as error:
        raise NotFoundError(f'{name} cannot be loaded ({first_line(error)})') from error


def _break_even(arms: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float | None]]:
    """Seconds until each training from scratch is as good as the prediction, and as its fine-tuning was by then."""

    def reached(points: list[dict[str, Any]], rival: str) -> float | None:
        for point in points:
            known = [row['accuracy'] for row in arms.get(rival, ()) if row['seconds'] <= point['seconds']]
            if known and point['accuracy'] >= max(known):
                return point['seconds']
        return None

    return {
        name: {rival: reached(arms[name], rival) for rival in ('predicted', 'fine_tuned') if rival in arms}
        for name in ('adam', 'adam_centralised', 'random')
        if name in arms
    }


def format_comparison(result: dict[str, Any]) -> str:
    """The last point of each arm of a result of `compare`, and the break-even times, as lines of text."""
    lines = [f'{"":28}{"epochs":>6}{"seconds":>10}  accuracy, % (95 % interval)']
    for name, title in ARMS.items():
        points = result['arms'].get(name)
        why = result['left_out'].get(name)
        if points:
            last = points[-1]
            row = f'{last["accuracy"]:6.1f} ({last["low"]:.1f} to {last["high"]:.1f})'
            lines.append(f'{title:28}{last["epoch"]:6}{last["seconds"]:10.2f}  {row}' + (f'; {why}' if why else ''))
        elif why:
            lines.append(f'{title:28}left out: {why}')
    first = result['arms']['predicted'][0]['seconds']
    for name, found in result['break_even'].items():
        most = result['arms'][name][-1]['seconds']
        whens = [
            f'as {"fine-tuned" if rival == "fine_tuned" else "good as predicted"} '
            + (
                f'not within {most:.1f} s'
                if seconds is None
                else f'after {seconds:.1f} s ({seconds / first:.0f} times predicted)'
            )
            for rival, seconds in found.items()
        ]
        lines.append(f'{ARMS[name]}: {", ".join(whens)}')
    return '\n'.join(lines)


def plot_comparison(result: dict[str, Any], path: str | os.PathLike[str]) -> Path | None:
    """Draws accuracy against seconds into a PNG file, written whole or not at all; it replaces an earlier one.

    Returns:
        The path; None, after a warning, where matplotlib is not installed.
    """
    path = local_path(path)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        warn_missing('matplotlib', f'{path} is not drawn')
        return None
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.add_subplot()
    for number, (name, title) in enumerate(ARMS.items()):
        points = result['arms'].get(name)
        if not points:
            continue
        seconds, accuracy, low, high = (
            [point[key] for point in points] for key in ('seconds', 'accuracy', 'low', 'high')
        )
        if len(points) == 1:
            errors = [[accuracy[0] - low[0]], [high[0] - accuracy[0]]]
            axes.errorbar(seconds, accuracy, errors, fmt='o', capsize=3, color=f'C{number}', label=title)
        else:
            axes.fill_between(seconds, low, high, color=f'C{number}', alpha=0.12, linewidth=0)
            axes.plot(seconds, accuracy, color=f'C{number}', marker='.', label=title)
        even = result['break_even'].get(name, {}).get('predicted')
        if even is not None:
            axes.axvline(even, color=f'C{number}', linewidth=0.8, linestyle='--', label=f'as predicted, {even:.3g} s')
    axes.axhline(100 / result['classes'], color='grey', linewidth=0.8, linestyle=':', label='chance')
    axes.set_xscale('log')
    axes.xaxis.set_major_formatter('{x:g}')
    axes.set_xlabel('seconds of prediction and training')
    axes.set_ylabel('accuracy on images kept aside, % (95 % interval)')
    axes.set_title(
        f'{result["model_name"]}, {result["images"]:,} images of {result["classes"]:,} classes, {result["machine"]}',
        parse_math=False,
    )
    axes.grid(alpha=0.3)
    axes.legend()
    with written_whole(path) as beside:
        figure.savefig(beside, format='png', dpi=150)
    return path
