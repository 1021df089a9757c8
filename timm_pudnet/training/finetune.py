"""Fine-tuning a timm model on the caller's images: the head first, then all layers, each at its own rate.

The optimiser, its layer-wise groups, the schedule and the random changes of images are timm's.

Dimension letters: `n` images, `c h w` an image, `d` features, `k` classes.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from timm.optim import create_optimizer_v2  # type: ignore[reportPrivateImportUsage]
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from tqdm import tqdm

from timm_pudnet.adapt import class_centroids
from timm_pudnet.config import InputConfig, InputError, PudNetWarning, as_plain, checked_seed
from timm_pudnet.devices import forked_rng, own_defaults, usable_device
from timm_pudnet.files import folder_path, has_separator
from timm_pudnet.hub import resolve_hypernet
from timm_pudnet.hypernet import PudNet, pretrained_model
from timm_pudnet.images import channel_statistics, check_root, open_images
from timm_pudnet.predict import predict_model
from timm_pudnet.target import batch_norms, input_of, laid_out, small_maps_first
from timm_pudnet.training.episodes import ImageBank, bank_input, timm_augmented

HEAD_STRENGTH = 0.1  # of the head's penalty, see _fit_head
FEW_IMAGES = 50  # a class to train on, on average, below which a set has few


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """How a model is fine-tuned.

    Args:
        epochs: Passes over the images, that for the head included.
        head_first: Whether the first pass fits the head alone, on features that stay as they are.
        rate: AdamW's for the head, at its largest: it rises, then falls to zero by a cosine.
        layer_decay: Each layer's rate is so many times that of the layer above it; 1 for one rate.
        weight_decay: AdamW's, of weights with more than one dimension.
        warmup: Share of the steps in which the rate rises.
        batch_size: Most images in a step (but two at the least, where norms see them).
        frozen_statistics: Whether norm layers keep their statistics, as a handful of images asks for.
        label_smoothing: Of the loss.
        patience: Epochs without a better result on the images kept aside, after which training stops.
        augmentation: Arguments of `timm.data.create_transform`, by which each image is changed at random.

    Raises:
        InputError: A value is out of range.
    """

    epochs: int
    head_first: bool = True
    rate: float = 1e-3
    layer_decay: float = 0.7
    weight_decay: float = 0.05
    warmup: float = 0.1
    batch_size: int = 64
    frozen_statistics: bool = False
    label_smoothing: float = 0.1
    patience: int = 10
    augmentation: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {'scale': (0.6, 1.0), 'color_jitter': 0.2}
    )

    def __post_init__(self) -> None:
        for name in ('epochs', 'batch_size', 'patience'):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f'{name} must be a whole number above zero, got {value!r}')
        if not 0 < self.rate <= 1:
            raise InputError(f'rate must be above 0 and at most 1, got {self.rate}')
        if not 0 < self.layer_decay <= 1:
            raise InputError(f'layer_decay must be above 0 and at most 1, got {self.layer_decay}')
        if not isinstance(self.augmentation, Mapping):
            raise InputError(
                f'augmentation: a {type(self.augmentation).__name__}; pass arguments of timm.data.create_transform '
                'by name'
            )


Mode = Literal['auto', 'few', 'full']
MODES = {
    'few': Tuning(epochs=30, rate=3e-4, layer_decay=0.6, batch_size=32, frozen_statistics=True),
    'full': Tuning(epochs=30, layer_decay=0.95),
}


@own_defaults()
def finetune(
    model: nn.Module | str | os.PathLike[str],
    images: Any,
    labels: Any = None,
    *,
    mode: Mode = 'auto',
    holdout: float = 0.2,
    epochs: int | None = None,
    rate: float | None = None,
    layer_decay: float | None = None,
    batch_size: int | None = None,
    augmentation: Mapping[str, Any] | None = None,
    hypernet: PudNet | str | os.PathLike[str] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    split: str = 'train',
    data_dir: str | None = None,
    strict: bool = False,
    progress: bool = True,
) -> nn.Module:
    """Fine-tunes a model on labelled images: first the head alone, then all layers, the lower ones more slowly.

    A part of the images is kept aside; training stops when they are no longer classified better, and the model of the
    best epoch is what comes back. The images are held in memory, as 8-bit pixels at the model's input size.

    A model that was predicted from these very images has seen those kept aside, by its head: what it gets right of them
    before flatters it, and training may seem to make nothing better. Give the architecture's name instead: its weights
    are then predicted from the others alone.

    Args:
        model: A timm model, which stays as it is; the folder of one (`save_model`); or the name of an architecture,
            whose weights are then predicted for these images. A head for other classes is replaced, and that of a model
            which does not name its classes (`label_names` of its `pretrained_cfg`).
        images: Labelled images in any form that `predict_model` takes.
        labels: Class of every image, as numbers or names; else those of the data.
        mode: `few` keeps norm statistics, moves the lower layers less and takes small steps; `full` trains
            everything; `auto` is `few` below 50 images a class to train on. `MODES` has their numbers.
        holdout: Share of the images that is kept aside, from classes of four or more; 0 for none and all epochs.
        epochs: Most passes over the images, that for the head included, in place of the mode's.
        rate: AdamW's largest rate, of the head, in place of the mode's.
        layer_decay: Rate of a layer over that of the next one above, in place of the mode's.
        batch_size: Most images in a step, in place of the mode's.
        augmentation: Arguments of `timm.data.create_transform`, in place of the mode's.
        hypernet: For an architecture's name: the hypernetwork that predicts its weights.
        seed: Of the choice of images kept aside, their order and random changes; from 0 to 2**31 - 1.
        device: Where to train; by default CUDA where there is one. The model is returned there.
        split: Split of a timm dataset.
        data_dir: Root of a timm dataset.
        strict: An unreadable image is an error; otherwise it is skipped, with a warning that counts them.
        progress: Show a progress bar.

    Returns:
        A timm model in eval mode; `save_model` writes it in timm's format, if timm.create_model made it.

    Raises:
        InputError: The images, labels, model or arguments cannot be used.
        NotFoundError: A folder or hypernetwork is not there.
        FloatingPointError: The loss is no longer finite.

    Warns:
        PudNetWarning: Some images are copies of others, or none could be kept aside.

    Example:
        >>> import timm
        >>> pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
        >>> model = timm.create_model('test_resnet', num_classes=7)
        >>> finetune(model, pixels, ['cup', 'cup', 'jar', 'jar'], epochs=2, holdout=0, progress=False).num_classes
        2
    """
    run = FineTuning(
        model,
        images,
        labels,
        mode=mode,
        holdout=holdout,
        hypernet=hypernet,
        seed=seed,
        device=device,
        split=split,
        data_dir=data_dir,
        strict=strict,
        progress=progress,
        epochs=epochs,
        rate=rate,
        layer_decay=layer_decay,
        batch_size=batch_size,
        augmentation=augmentation,
    )
    run.run(progress)
    return run.result()


class FineTuning:
    """One fine-tuning, for those who want to see it go or to stop it; `finetune` has the meaning of all arguments.

    Attributes:
        source: One line on the images, as `ImageSource.description`.
        mode: `few` or `full`.
        tuning: The numbers.
        images: What is trained on.
        held: The images kept aside, or None.
        before: What the model was worth on them before, as `measured`; None where it had no head for these classes.
        history: What `finetune_epochs` gave after each epoch.
        best_epoch: The one whose model is kept; 0 where none was better than before.
    """

    @own_defaults()
    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        images: Any,
        labels: Any = None,
        *,
        mode: Mode = 'auto',
        holdout: float = 0.2,
        hypernet: PudNet | str | os.PathLike[str] | None = None,
        seed: int = 0,
        device: str | torch.device | None = None,
        split: str = 'train',
        data_dir: str | None = None,
        strict: bool = False,
        progress: bool = True,
        **changes: Any,
    ) -> None:
        if mode != 'auto' and mode not in MODES:
            raise InputError(f'mode {mode!r}: use auto, {" or ".join(MODES)}')
        if not 0 <= holdout < 1:
            raise InputError(f'holdout must be in [0, 1), got {holdout}')
        seed = checked_seed(seed)
        changes = {name: as_plain(value) for name, value in changes.items() if value is not None}
        for tuning in MODES.values():
            dataclasses.replace(tuning, **changes)  # refuses bad numbers before any work
        check_root(data_dir, images)
        device = usable_device(device)
        start = _opened(model)
        network = resolve_hypernet(start, hypernet) if isinstance(start, str) else None
        if network is None and hypernet is not None:
            raise InputError('hypernet is for an architecture, whose weights it predicts; this model has weights')
        config = input_of(start) if isinstance(start, nn.Module) else network.config.input  # type: ignore[union-attr]
        source = open_images(images, labels, input=bank_input(config), split=split, data_dir=data_dir, strict=strict)
        self.source = source.description
        bank = ImageBank.from_source(source, progress=progress)
        used, aside, copies = split_copies(bank, holdout, seed, least=4)
        self.images, self.held = bank.part(used), bank.part(aside) if len(aside) else None
        if copies:
            warnings.warn(copies_line(copies, config), PudNetWarning, stacklevel=2)
        if holdout and self.held is None:
            warnings.warn(
                'no image is kept aside, since no class has four: training goes through all its epochs',
                PudNetWarning,
                stacklevel=2,
            )
        self.mode, self.tuning = tuning_for(mode, self.images, **changes)
        self.seed, self.best_epoch = seed, 0
        self.before: dict[str, Any] | None = None
        self.history: list[dict[str, Any]] = []
        if isinstance(start, str):
            start = predict_model(start, self.images.source(config), hypernet=network, device=device)
            name_classes(start, bank.class_names)
        fits = fit_classifier(start, bank.class_names)
        self.model = start.to(device)
        if self.held is not None and fits:
            self.before = measured(self.model, self.held)
        self._kept: dict[str, Tensor] = {}

    @own_defaults()
    def run(self, progress: bool = True) -> None:
        """Trains until nothing gets better, or to the last epoch. When interrupted, `result` has the best so far."""
        if self.history:
            raise InputError('this fine-tuning has run: make a new one, of its `result` for instance')
        best = _rank(self.before) if self.before else None
        if best:
            self._keep()
        epochs = finetune_epochs(self.model, self.images, self.held, self.tuning, seed=self.seed)
        with tqdm(total=self.tuning.epochs, disable=not progress, unit='epoch') as bar:
            for point in self._while_finite(epochs):
                self.history.append(point)
                bar.update()
                bar.set_postfix({name: f'{point[name]:.3g}' for name in ('loss', 'accuracy') if name in point})
                if self.held is None or best is None or _rank(point) > best:
                    best = _rank(point) if self.held is not None else None
                    self.best_epoch = point['epoch']
                    self._keep()
                elif point['epoch'] - self.best_epoch >= self.tuning.patience:
                    break

    def _while_finite(self, epochs: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The epochs, up to one whose loss is not finite; an error where that is the first."""
        try:
            yield from epochs
        except FloatingPointError as error:
            if not self.history:
                raise
            warnings.warn(f'{error}; stopped, the best model before is kept', PudNetWarning, stacklevel=3)

    def result(self) -> nn.Module:
        """The model of the best epoch, in eval mode."""
        if self._kept:
            self.model.load_state_dict(self._kept)
        return self.model.eval()

    @property
    def best(self) -> dict[str, Any] | None:
        """The entry of `history` whose model is kept; `before` where none was better."""
        return self.history[self.best_epoch - 1] if self.best_epoch else self.before

    def _keep(self) -> None:
        self._kept = {key: value.detach().clone() for key, value in self.model.state_dict().items()}


def _rank(point: Mapping[str, Any]) -> tuple[int, float]:
    """More images right is better; a handful of images often ties, then the loss tells."""
    return point['right'], -point['test_loss']


def tuning_for(mode: Mode, images: ImageBank, **changes: Any) -> tuple[str, Tuning]:
    """The mode's name and numbers for these images, some of them changed."""
    if mode == 'auto':
        mode = 'few' if len(images.labels) < FEW_IMAGES * len(images.class_names) else 'full'
    return mode, dataclasses.replace(MODES[mode], **changes)


def finetune_epochs(
    model: nn.Module, images: ImageBank, tested: ImageBank | None, tuning: Tuning, *, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Fine-tunes a timm model, in place, and tests it after every epoch.

    Args:
        model: A timm model with a classifier for the classes of the images, whose config says how it sees them.
        images: What it is trained on, at its input size.
        tested: Images of the same classes to test on; None for no test.
        tuning: How.
        seed: Of the order of the images and their random changes.

    Yields:
        After each epoch its number `epoch` from 1, `phase` (`head` or `all`), the mean `loss`, `seconds` of training
        up to there without the tests; and of the test `right`, the number of images classified rightly, `accuracy`
        in percent and `test_loss`.

    Raises:
        FloatingPointError: The loss is no longer finite; without a test, also that of the weights after the epoch.
    """
    config = input_of(model)
    device = next(model.parameters()).device
    if not any(value.requires_grad for value in model.get_classifier().parameters()):  # type: ignore[operator]
        tuning = dataclasses.replace(tuning, head_first=False)  # a frozen head stays as it is
    # Norm statistics need two images.
    parts = even_parts(len(images.labels), tuning.batch_size, least=1 if tuning.frozen_statistics else 2)
    steps = (tuning.epochs - tuning.head_first) * parts
    optimizer = create_optimizer_v2(
        model, opt='adamw', lr=tuning.rate, weight_decay=tuning.weight_decay, layer_decay=tuning.layer_decay
    )
    # timm's schedulers are what applies the scale of each layer's rate.
    warmup = round(tuning.warmup * steps)
    schedule = CosineLRScheduler(
        optimizer,
        max(2, steps - warmup),
        warmup_t=warmup,
        warmup_lr_init=tuning.rate / (warmup + 1),  # a first step of 0 would do nothing
        warmup_prefix=True,
        t_in_epochs=False,
    )
    seconds, step = 0.0, 0
    for epoch in range(1, tuning.epochs + 1):
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        is_head = tuning.head_first and epoch == 1
        if is_head:
            loss = _fit_head(model, images, config, tuning.label_smoothing, device)
        else:
            model.train()
            if tuning.frozen_statistics:
                for _, norm in batch_norms(model):
                    norm.eval()
            total = torch.zeros((), device=device)  # read once: a GPU goes on meanwhile
            with forked_rng(device), small_maps_first(model):
                torch.manual_seed(1000 * seed + epoch)  # of dropout
                # Parts of nearly equal size: a last one of a single image would have no batch statistics.
                for picks in torch.randperm(len(images.labels), generator=generator).tensor_split(parts):
                    shown = timm_augmented(images.images[picks], dict(tuning.augmentation), generator)
                    answers = images.labels[picks].to(device)
                    schedule.step_update(step)
                    logits = model(laid_out(normalised(shown, config).to(device)))
                    error = F.cross_entropy(logits, answers, label_smoothing=tuning.label_smoothing)
                    optimizer.zero_grad()
                    error.backward()
                    optimizer.step()
                    total += error.detach() * len(picks)
                    step += 1
            loss = float(total) / len(images.labels)
        seconds += seconds_since(started, device)
        first = torch.arange(len(images.labels))[: tuning.batch_size]
        found = measured(model, images.part(first) if tested is None else tested)
        # The loss alone has not seen what the last step made of the weights, and without a test they are kept unseen.
        seen = loss + found['test_loss'] if tested is None else loss
        if not math.isfinite(seen):
            why = 'the model gave such features' if is_head else f'try a lower rate than {tuning.rate:g}'
            raise FloatingPointError(f'the loss is {seen} in epoch {epoch}: {why}')
        point = {'epoch': epoch, 'phase': 'head' if is_head else 'all', 'seconds': seconds, 'loss': loss}
        yield point if tested is None else {**point, **found}


def even_parts(count: int, size: int, least: int = 2) -> int:
    """Into how many parts of nearly equal size to cut so many images: each of `size` at most, and of `least`."""
    return max(1, min(-(-count // size), count // least))


def _fit_head(
    model: nn.Module, images: ImageBank, config: InputConfig, label_smoothing: float, device: torch.device
) -> float:
    """Fits the classifier to the features, which stay as they are, over all images at once; gives the loss.

    Logistic regression of `s * l + W f + b`, `l` the logits of the head that is there, or of the class centroids where
    it is new. The penalty on `W` is scaled to the features and fades as images are added: with a few, the head stays
    what it was but for its temperature `s`, which label smoothing keeps finite.
    """
    classifier: Any = model.eval().get_classifier()  # type: ignore[operator]
    with torch.no_grad(), small_maps_first(model):
        features = torch.cat(
            [
                model.forward_head(model.forward_features(part), pre_logits=True).flatten(1)  # type: ignore[operator]
                for part in normalised_batches(images, config, device)
            ]
        ).float()
        labels, mean = images.labels.to(device), features.mean(0)
        scale = (features - mean).square().sum(1).mean().sqrt().clamp(min=1e-12)
        rows = (features - mean) / scale
        start = classifier.weight.detach().float().flatten(1).clone()
        if not start.any():
            start = F.normalize(class_centroids(features, labels, len(start)), dim=1)
        old = rows @ start.t()
        spread = old.std().clamp(min=1e-12)
        old = old / spread
    if not rows.isfinite().all():
        return math.nan
    weight, bias = torch.zeros_like(start), torch.zeros(len(start), device=device)
    factor = torch.ones((), device=device)
    unknowns = [tensor.requires_grad_() for tensor in (weight, bias, factor)]
    solver = torch.optim.LBFGS(unknowns, max_iter=100, line_search_fn='strong_wolfe')

    def error() -> Tensor:
        return F.cross_entropy(factor * old + rows @ weight.t() + bias, labels, label_smoothing=label_smoothing)

    def objective() -> Tensor:
        solver.zero_grad()
        loss = error() + HEAD_STRENGTH / len(rows) * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(objective)  # type: ignore[arg-type]
    with torch.no_grad():
        fitted = (factor * start / spread + weight) / scale
        classifier.weight.copy_(fitted.view_as(classifier.weight))
        if classifier.bias is not None:
            classifier.bias.copy_(bias - fitted @ mean)
        return float(error())


@torch.inference_mode()
def measured(model: nn.Module, tested: ImageBank) -> dict[str, Any]:
    """The number of images `right`, `accuracy` in percent and `test_loss` of a model in eval mode, on a bank."""
    model.eval()
    device = next(model.parameters()).device
    with small_maps_first(model):
        logits = torch.cat([model(part).float().cpu() for part in normalised_batches(tested, input_of(model), device)])
    right = int(((logits.argmax(1) == tested.labels) & logits.isfinite().all(1)).sum())
    loss = float(F.cross_entropy(logits, tested.labels))
    return {'right': right, 'accuracy': 100 * right / len(tested.labels), 'test_loss': loss}


def normalised_batches(bank: ImageBank, config: InputConfig, device: torch.device, size: int = 256) -> Iterator[Tensor]:
    """The images of a bank as a model sees them, `[n, c, h, w]`, a batch at a time."""
    return (laid_out(normalised(part.float() / 255, config).to(device)) for part in bank.images.split(size))


def normalised(images: Tensor, config: InputConfig) -> Tensor:
    """Images `[n, c, h, w]` in 0-1 as a model sees them."""
    mean, std = channel_statistics(config)
    return (images - mean) / std


def split_copies(bank: ImageBank, share: float, seed: int = 0, least: int = 2) -> tuple[Tensor, Tensor, int]:
    """Splits a bank, class by class, into images that are used and those kept aside; copies of an image stay together.

    Args:
        bank: The images.
        share: Of each class, kept aside.
        seed: Of the choice.
        least: Different images that a class must have to give any; it then gives at least one, and keeps one.

    Returns:
        The numbers of the images in the two parts, ascending, and how many images are copies of others,
        pixel for pixel.

    Raises:
        InputError: There are fewer than two classes, or one is left without an image.
    """
    if len(bank.class_names) < 2:
        raise InputError(f'one class only, {", ".join(bank.class_names)}: a classifier needs two')
    alike: dict[int, list[int]] = {}
    for number, key in enumerate(bank.keys.tolist()):
        alike.setdefault(key, []).append(number)
    families = list(alike.values())
    owners = bank.labels[[family[0] for family in families]]
    generator = torch.Generator().manual_seed(seed)
    used, aside = [], []
    for label in range(len(bank.class_names)):
        own = (owners == label).nonzero().flatten()
        own = own[torch.randperm(len(own), generator=generator)].tolist()
        count = min(len(own) - 1, max(1, round(share * len(own)))) if share and len(own) >= least else 0
        aside += [number for place in own[:count] for number in families[place]]
        used += [number for place in own[count:] for number in families[place]]
    parts = [torch.tensor(sorted(part), dtype=torch.long) for part in (used, aside)]
    empty = set(range(len(bank.class_names))).difference(bank.labels[parts[0]].tolist())
    if empty:
        raise InputError(
            f'class {bank.class_names[min(empty)]!r} has no image of its own: every class needs one that can be read '
            'and is no copy of an image of another class'
        )
    return parts[0], parts[1], len(bank.labels) - len(families)


def copies_line(copies: int, config: InputConfig) -> str:
    """What is said of copies."""
    height, width = config.input_size[1:]
    return (
        f'{copies:,} image{"s are copies" if copies > 1 else " is a copy"} of others, pixel for pixel at '
        f'{height}x{width}: copies stay in one part, so that no image is tested that was trained on'
    )


def _opened(model: nn.Module | str | os.PathLike[str]) -> nn.Module | str:
    """A model of one's own, or the name of an architecture."""
    if isinstance(model, nn.Module):
        own: Any = copy.deepcopy(getattr(model, '_orig_mod', model))  # what torch.compile wraps
        if any(value.is_meta for value in (*own.parameters(), *own.buffers())):
            raise InputError('this model is on the meta device, without values: load weights into it first')
        if not any(parameter.requires_grad for parameter in own.parameters()):
            raise InputError('no weight of this model can be trained: model.requires_grad_(True) lets all')
        return own.float()
    if not isinstance(model, (str, os.PathLike)):
        raise InputError(f'model must be a timm model, its folder or an architecture, not a {type(model).__name__}')
    named = isinstance(model, str) and model.startswith('local-dir:')
    path = folder_path(model, 'make it with timm.create_model, save_model it, and name that folder')
    if isinstance(model, str) and not named and not has_separator(model) and not path.is_dir():
        return model
    with torch.random.fork_rng(devices=[]):
        return pretrained_model(path, {})


def fit_classifier(model: nn.Module, class_names: Sequence[str]) -> bool:
    """Gives a timm model a head for these classes, unless it has one already; tells whether it had.

    Raises:
        InputError: Its head is none that can be fitted here, or it does not pool.
    """
    if not hasattr(model, 'reset_classifier') or not hasattr(model, 'forward_head'):
        raise InputError(f'a {type(model).__name__} is no timm model: it has no reset_classifier and forward_head')
    pool, reset = _pool_of(model), cast(Any, model.reset_classifier)
    if pool == '':
        raise InputError(
            f"a {type(model).__name__} of global_pool='' gives maps, which no classifier can read: make it with "
            "another one, global_pool='avg' for instance"
        )
    known = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names')
    fits = tuple(known or ()) == tuple(class_names) and bool(model.num_classes == len(class_names))
    if not fits:
        # Else a timm before 1.0.31 puts an average in place of another pool.
        kept = {'global_pool': pool} if pool and 'global_pool' in inspect.signature(reset).parameters else {}
        with torch.random.fork_rng(devices=[]):
            reset(len(class_names), **kept)
    classifier = model.get_classifier()  # type: ignore[operator]
    pointwise = isinstance(classifier, nn.Conv2d) and classifier.kernel_size == (1, 1) and classifier.groups == 1
    if not (isinstance(classifier, nn.Linear) or pointwise):
        raise InputError(
            f'the head of this {type(model).__name__} ends in a {type(classifier).__name__}, neither a Linear layer '
            'nor a 1x1 conv'
        )
    learns = any(value.requires_grad for value in classifier.parameters())
    if learns and parametrize.is_parametrized(classifier):
        raise InputError(
            f'the head of this {type(model).__name__} is parametrized, so no weights can be put in it: '
            'torch.nn.utils.parametrize.remove_parametrizations makes it a plain one'
        )
    if not fits:
        nn.init.zeros_(classifier.weight)  # no head yet, see _fit_head
    name_classes(model, class_names)
    return fits


def _pool_of(model: nn.Module) -> str | None:
    """How a timm model pools its maps, '' where it does not; None where it does not say."""
    head = getattr(model, 'head', None)
    for place in (getattr(model, 'global_pool', None), getattr(head, 'global_pool', None), head):
        name = getattr(place, 'pool_type', place)
        if isinstance(name, str):
            return name
    return None


def name_classes(model: nn.Module, class_names: Sequence[str]) -> None:
    """Gives a timm model's classes their names."""
    described: Any = model
    described.pretrained_cfg = {
        **(getattr(described, 'pretrained_cfg', None) or {}),
        'num_classes': len(class_names),
        'label_names': tuple(class_names),
    }
    described.default_cfg = described.pretrained_cfg


def seconds_since(started: float, device: torch.device) -> float:
    """Seconds since a `time.perf_counter`, once the device is done."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()
    return time.perf_counter() - started
