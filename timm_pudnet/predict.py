"""A prediction from beginning to end: images in, an ordinary timm model out.

Dimension letters: `n` images, `c h w` an image, `m` width of the sketch, `d` features, `k` classes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from timm_pudnet.adapt import (
    HEADS,
    MOST_UNLABELLED,
    StreamingCentroids,
    StreamingLogistic,
    StreamingRidge,
    calibrate,
    self_training_classifier,
)
from timm_pudnet.config import (
    InputConfig,
    InputError,
    NotFoundError,
    OutputExistsError,
    PudNetError,
    PudNetWarning,
    as_plain,
    first_line,
    shown,
)
from timm_pudnet.devices import own_defaults, usable_device
from timm_pudnet.files import folder_path, folder_written_whole, names_in
from timm_pudnet.hub import Pushed, push, resolve_hypernet
from timm_pudnet.hypernet import PudNet, on_device, target_of
from timm_pudnet.images import ImageSource, check_root, open_images
from timm_pudnet.sketch import Balance, ImageSample, content_keys
from timm_pudnet.target import (
    TargetSpec,
    check_loadable,
    difference,
    keep_arguments,
    laid_out,
    of_one_size,
    pretrained_cfg_of,
    small_maps_first,
)

Head = Literal['centroid', 'ridge', 'blend', 'logistic', 'none']
_HeadStream = StreamingCentroids | StreamingRidge | StreamingLogistic
# Arguments of timm.create_model that change what the model gives, not its weights.
_NOT_OF_TARGET = ('num_classes', 'pretrained_cfg_overlay', 'features_only', 'out_indices', 'feature_cls')
_NOT_OF_TARGET += ('cache_dir', 'scriptable', 'exportable', 'no_jit')
# Of a timm config, what is as it is for the predicted weights.
_FIXED = {'architecture', 'num_classes', 'classifier', 'first_conv'}
_FIXED |= {field.name for field in dataclasses.fields(InputConfig)}
_WHERE_WEIGHTS_ARE = {'state_dict', 'file', 'url', 'hf_hub_id', 'hf_hub_filename', 'source'}  # of a timm config
_WEIGHTS_FROM_ELSEWHERE = ('pretrained', 'checkpoint_path', 'pretrained_cfg')  # arguments of timm.create_model


@own_defaults()
def predict_model(
    model_name: str,
    images: Any,
    labels: Any = None,
    *,
    unlabelled: Any = None,
    hypernet: PudNet | str | os.PathLike[str] | None = None,
    head: Head | None = None,
    device: str | torch.device | None = None,
    balance: Balance | None = None,
    batch_size: int = 256,
    split: str = 'train',
    data_dir: str | None = None,
    strict: bool = False,
    **timm_kwargs: Any,
) -> nn.Module:
    """Predicts the weights of a timm CNN for a set of images, without training on them.

    Compresses the images into a sketch (eq. 3), walks the layers (eq. 4, 5), generates their kernels (eq. 6),
    calibrates the norm statistics on the images and writes the class centroids into the classifier (eq. 7, in the
    features' whitened space, `adapt.Whitening`), or the head that was asked for.

    Args:
        model_name: timm architecture, without a tag.
        images: A folder (with a subfolder per class, or flat and then unlabelled), a list of paths or PIL images, a
            uint8 or float array `[n, h, w, c]` or tensor `[n, c, h, w]` with 1, 3 or 4 channels (floats in 0-1), a
            `Dataset`, a `DataLoader`, or a timm dataset name such as `torch/cifar10`. Images of any size are resized.
        labels: Class of every image, as numbers or names; else those of the data. Without labels the model has no
            classifier and gives features.
        unlabelled: More images of the same classes, in any form that `images` may have; labels of theirs are not
            looked at. They teach the head alone, by self-training (`adapt.self_training_classifier`; of more than
            4,096 a sample). They help most where there are as many of each class and none of others, and
            little where most guesses are wrong.
        hypernet: A `PudNet`, its folder, its name, or `org/name@revision` on the Hub; by default the one that serves
            the architecture.
        head: What is written into the classifier: `centroid` (eq. 7), `ridge` (a ridge regression to the classes, in
            closed form, `adapt.StreamingRidge`), `blend` (naive Bayes and ridge, for any number of labels,
            `adapt.StreamingBlend`), `logistic` (a logistic regression, the best with forty labels a class and more,
            `adapt.StreamingLogistic`; it keeps the features), or `none` for a feature model in spite of labels. By
            default `centroid`; with unlabelled images `blend`, which guesses their classes first, or `ridge` where it
            is asked for.
        device: Where to predict; by default CUDA where there is one. The model is returned there.
        balance: How the sketch weighs images: `none`, `class` or `kmeans`; by default `class` where there are labels.
        batch_size: Images read at a time. Changes nothing in the result.
        split: Split of a timm dataset.
        data_dir: Root of a timm dataset.
        strict: An unreadable image is an error; otherwise it is skipped, with a warning that counts them.
        timm_kwargs: Passed to `timm.create_model`: `drop_rate`, `drop_path_rate` and so on.

    Returns:
        A timm model in eval mode, whose `pretrained_cfg` has the right input size, mean, std and label names.

    Raises:
        InputError: The images, labels or arguments cannot be used.
        NotFoundError: A folder or hypernetwork is not there.
        UnsupportedTargetError: The hypernetwork was not made for this architecture or these arguments.

    Example:
        >>> images = torch.rand(6, 3, 28, 28)
        >>> model = predict_model('resnet18', images, ['cup', 'cup', 'cup', 'jar', 'jar', 'jar'])
        >>> model(torch.rand(1, 3, 32, 32)).shape, model.pretrained_cfg['label_names']
        (torch.Size([1, 2]), ('cup', 'jar'))
    """
    if head not in (*HEADS, 'none', None):
        raise InputError(f'head {head!r}: use {", ".join(HEADS)} or none')
    headless = 'num_classes=0' if timm_kwargs.get('num_classes') == 0 else 'head="none"' if head == 'none' else ''
    if timm_kwargs.get('features_only'):
        headless = 'features_only=True'
    if headless and head not in ('none', None):
        raise InputError(f'{headless} gives features, which head {head!r} has no place in: leave one of them out')
    if headless and unlabelled is not None:
        raise InputError(f'{headless} gives features, and unlabelled images teach a head: leave one of them out')
    if head is None:
        head = 'none' if headless else 'centroid' if unlabelled is None else 'blend'
    asked = timm_kwargs.get('num_classes')
    if headless and asked:
        raise InputError(f'{headless} gives features, not num_classes={asked}: leave one of them out')
    # As timm does, which takes None for an argument that is not given.
    timm_kwargs = {name: as_plain(value) for name, value in timm_kwargs.items() if value is not None}
    batch_size = as_plain(batch_size)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f'batch_size must be a whole number above zero, got {batch_size!r}')
    for name in _WEIGHTS_FROM_ELSEWHERE:
        if timm_kwargs.pop(name, None):
            raise InputError(f'{name}: the weights come from the images; leave it out')
    if 'dtype' in timm_kwargs:
        raise InputError(f'dtype: the weights are predicted in float32; call .to({timm_kwargs["dtype"]}) on the model')
    if unlabelled is not None and head in ('centroid', 'logistic'):
        raise InputError(f'head {head} cannot use unlabelled images: leave head out (it is blend then), or these')
    if model_name == 'blindspot_unet':
        raise InputError(
            f'{model_name} gives images, not classes: predict_denoiser takes noisy images (timm-pudnet denoise)'
        )
    check_root(data_dir, images, unlabelled)
    device = usable_device(device)
    network = resolve_hypernet(model_name, hypernet)
    spec = _target_asked_for(network, model_name, timm_kwargs)
    source = open_images(images, labels, input=network.config.input, split=split, data_dir=data_dir, strict=strict)
    if asked and source.labels is not None:
        _check_asked(asked, len(source.class_names or ()) or int(source.labels.max()) + 1)
    others = None
    if unlabelled is not None:
        if not source.labelled:
            raise InputError(f'{source.description}: none has a label, so give the unlabelled ones as images too')
        others = open_images(
            unlabelled, input=network.config.input, split=split, data_dir=data_dir, strict=strict, with_labels=False
        )
    try:
        network = on_device(network, device, hypernet)
        return _predict(network, spec, source, others, head, device, balance, batch_size, timm_kwargs)
    except torch.OutOfMemoryError as error:
        raise InputError(f'{device} has not enough memory for {model_name} on one image: use device="cpu"') from error


def create_model(model_name: str, *args: Any, pretrained_from: Any = None, **kwargs: Any) -> nn.Module:
    """`timm.create_model` with one more argument: `pretrained_from`, the images to predict weights for.

    Without it this is timm's function, to the bit. With it, `predict_model`: every other argument is timm's, or one of
    `predict_model`'s own (`labels`, `hypernet`, `device`, ...).

    Args:
        model_name: timm architecture, without a tag.
        args: timm's positional arguments; none with `pretrained_from`.
        pretrained_from: Anything that `predict_model` takes as images.
        kwargs: timm's arguments. `num_classes` must be the number of classes found, or 0 for a feature model.

    Raises:
        InputError: An argument contradicts `pretrained_from`, or as `predict_model`.

    Example:
        >>> create_model('resnet18', num_classes=10).num_classes
        10
    """
    if pretrained_from is None:
        return timm.create_model(model_name, *args, **kwargs)
    if args:
        raise InputError('with pretrained_from, give every argument but the architecture by name')
    for name in _WEIGHTS_FROM_ELSEWHERE:
        if kwargs.pop(name, None):
            raise InputError(f'{name} and pretrained_from both say where the weights come from: give one of them')
    return predict_model(model_name, pretrained_from, **kwargs)


def predict_state_dict(model_name: str, images: Any, labels: Any = None, **kwargs: Any) -> dict[str, Tensor]:
    """The state dict of the model that `predict_model` gives for the same arguments: every key of it, ready to load.

    Example:
        >>> state = predict_state_dict('resnet18', torch.rand(4, 3, 28, 28))
        >>> state['conv1.weight'].shape, 'fc.weight' in state
        (torch.Size([64, 3, 7, 7]), False)
    """
    return dict(predict_model(model_name, images, labels, **kwargs).state_dict())


def save_model(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Saves a model in timm's own format, for `timm.create_model('local-dir:FOLDER', pretrained=True)`.

    Writes `config.json` and `model.safetensors` into a new folder, which appears whole or not at all.

    Raises:
        OutputExistsError: The folder exists and is not empty, or is a file.
        NotFoundError: Its parent is not there.
        InputError: Nothing can be written there; or it is no whole timm model, one of `features_only` for instance, or
            timm could not load it.
    """
    folder = folder_path(folder, 'timm_pudnet.push_model publishes a model there')
    check_output(folder)
    model = getattr(model, '_orig_mod', model)  # of torch.compile
    described = getattr(model, 'pretrained_cfg', None)  # `finetune` names classes in that of any model
    if not hasattr(model, 'num_classes') or not isinstance(described, Mapping) or 'architecture' not in described:
        raise InputError(
            f'a {type(model).__name__} cannot be saved: timm has no format for what timm.create_model did not make as '
            'a whole. Save the whole model, or keep its state_dict by torch.save'
        )
    check_loadable(model)
    state, first = model.state_dict(), {}
    for key, value in state.items():
        if value.is_meta:
            raise InputError(f'{key} is on the meta device, without values: load weights into the model first')
        if value.numel() and (other := first.setdefault((value.device, value.data_ptr()), key)) != key:
            raise InputError(
                f'{key} and {other} share their memory, which a file cannot tell: give each its own, by .clone(), or '
                'keep the state_dict by torch.save'
            )
    if not all(value.is_contiguous() for value in state.values()):  # channels_last, which files have not
        model = copy.deepcopy(model)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.contiguous()
    with folder_written_whole(folder) as beside:
        try:
            earlier = not hasattr(timm.models, 'get_model_args')  # than 1.0.31, which finds them by itself
            arguments = {'model_args': getattr(model, '_model_args', None)} if earlier else {}
            timm.models.save_for_hf(model, str(beside), safe_serialization=True, **arguments)
        except SafetensorError as error:
            raise OSError(f'{folder} cannot be written: {error}') from error
    return folder


def push_model(model: nn.Module, repo: str, *, license: str | None = None, private: bool = False) -> Pushed:
    """Publishes a model on the Hub in timm's own format, for `timm.create_model('hf-hub:ORG/NAME', pretrained=True)`.

    Args:
        model: A timm model, such as `predict_model` gives.
        repo: `org/name`; made where there is none.
        license: Of its card.
        private: Whether a repository that is made is private.

    Raises:
        InputError: The name is not one of the Hub.
        HubError: The Hub cannot be asked, or refuses.
    """
    with tempfile.TemporaryDirectory() as parent:
        return push(save_model(model, Path(parent) / 'model'), repo, license=license, private=private)


def check_output(folder: Path) -> None:
    """Raises unless a new folder can be made at this path."""
    there = os.path.isdir(folder)  # unlike Path's, no error where a name is too long
    # A link that leads nowhere and a device too.
    if names_in(folder) if there else os.path.lexists(folder):
        raise OutputExistsError(f'{folder} exists: choose another output folder, or remove it first')
    if not os.path.isdir(folder.parent):
        raise NotFoundError(f'{folder.parent} is not there: make it first, or choose another output folder')
    try:  # before any work
        with tempfile.TemporaryDirectory(prefix=f'.{folder.name}.', dir=folder if there else folder.parent):
            pass
    except OSError as error:  # which names a temporary folder
        name = shown(str(folder), 200)
        raise InputError(f'{name}: no folder can be made there ({error.strerror}): choose another') from error


def _target_asked_for(network: PudNet, model_name: str, timm_kwargs: dict[str, Any]) -> TargetSpec:
    """The target with the caller's arguments; its tensors must be those that the hypernetwork fills."""
    kwargs = {key: value for key, value in timm_kwargs.items() if key not in _NOT_OF_TARGET}
    if 'img_size' in kwargs:
        of_one_size(dataclasses.replace(network.config, model_kwargs={'img_size': kwargs['img_size']}))
    spec = target_of(network.config, **kwargs)
    if different := difference(spec.kept, network.target.kept):
        # Those that make it so by themselves; all of them where none does.
        alone = {}
        for key, value in kwargs.items():
            with contextlib.suppress(PudNetError):  # timm may take it beside the others only
                if difference(target_of(network.config, **{key: value}).kept, network.target.kept):
                    alone[key] = value
        given = ', '.join(f'{key}={value!r}' for key, value in (alone or kwargs).items())
        raise InputError(
            f'{model_name} with {given} has other weights than hypernetwork {network.name} predicts ({different}): '
            f'leave {"that argument" if len(alone or kwargs) == 1 else "these arguments"} out'
        )
    return spec


def _predict(
    network: PudNet,
    spec: TargetSpec,
    source: ImageSource,
    others: ImageSource | None,
    head: Head,
    device: torch.device,
    balance: Balance | None,
    batch_size: int,
    timm_kwargs: dict[str, Any],
) -> nn.Module:
    classifies = source.labelled and head != 'none'
    if classifies and timm_kwargs.get('global_pool') == '':
        raise InputError("global_pool='' gives maps, which no classifier can read: head='none' gives them alone")
    # First pass over the images: the sketch, and a sample of them for calibration.
    sketch = network.streaming_sketch(balance or ('class' if source.labelled else 'none'))
    sample = ImageSample.for_size(network.config.input.input_size)
    for images, labels in source.batches(batch_size, keep=classifies):
        in_memory(lambda part, labels: sketch.add(part.to(device), labels), images, labels)
        sample.add(images, labels)
    if head not in ('centroid', 'none') and not source.labelled:
        warnings.warn(
            f'{source.description}: no labels, so no head: the model gives features', PudNetWarning, stacklevel=3
        )
    num_classes = _classes_found(spec, source, sample) if classifies else 0
    _check_asked(timm_kwargs.pop('num_classes', None), num_classes)

    with torch.inference_mode():
        weights = network(sketch.result(), sketch.num_images)
    taken_apart = bool(timm_kwargs.get('features_only'))  # timm wraps such a model; it is calibrated whole before
    adapting = {key: value for key, value in timm_kwargs.items() if not (taken_apart and key in _NOT_OF_TARGET)}
    model = build_model(network, spec, weights, num_classes, source.class_names, adapting).to(device)
    read = _Reader(model, spec.classifiers if num_classes else (), device)
    images = sample.images
    while True:
        try:
            sampled = calibrate(model, images.to(device), weights, **network.config.calibration, forward=read)
            break
        except torch.OutOfMemoryError as error:
            images = images[: _fewer(len(images), error)]
    if num_classes:
        streams = [HEADS[head](num_classes, source.class_names) for _ in read.classifiers]
        if sample.complete and len(images) == sample.seen:
            assert sample.labels is not None
            for stream, rows in zip(streams, sampled, strict=True):
                stream.add(rows, sample.labels)
        else:  # second pass, over more images than one batch holds
            _add_labelled(streams, read, source, batch_size)
        unlabelled = [None for _ in streams] if others is None else _unlabelled_rows(read, others, batch_size)
        for classifier, stream, rows in zip(read.classifiers, streams, unlabelled, strict=True):
            _write_head(classifier, stream, rows, network, head)
    if taken_apart:
        model = build_model(network, spec, model.state_dict(), 0, None, timm_kwargs).to(device)
    return model.eval()


def _classes_found(spec: TargetSpec, source: ImageSource, sample: ImageSample) -> int:
    """How many classes the labels tell of, at least two."""
    if not spec.classifiers:
        raise InputError(f'{spec.model_name} has no classifier: head="none" gives a feature model')
    top = max(sample.classes)
    source.check_classes(top, len(sample.classes))
    num_classes = len(source.class_names or ()) or top + 1
    if num_classes < 2:
        raise InputError(
            f'{source.description}: one class only, a classifier needs two; head="none" gives a feature model'
        )
    return num_classes


class _Reader:
    """Called with images, gives what each classifier of a model reads of them, `[n, d]`, or what one without gives."""

    def __init__(self, model: nn.Module, classifiers: Iterable[str], device: torch.device) -> None:
        self.model, self.device = model, device
        self.classifiers = [model.get_submodule(name) for name in classifiers]

    def __call__(self, images: Tensor) -> list[Tensor]:
        images = laid_out(images.to(self.device))
        found: dict[nn.Module, Tensor] = {}
        hooks = [
            module.register_forward_pre_hook(lambda module, inputs: found.update({module: _rows(module, inputs[0])}))
            for module in self.classifiers
        ]
        try:
            with small_maps_first(self.model):
                output = self.model(images)
        finally:
            for hook in hooks:
                hook.remove()
        return [found[module] for module in self.classifiers] if self.classifiers else [output]


def _add_labelled(streams: Sequence[_HeadStream], read: _Reader, source: ImageSource, batch_size: int) -> None:
    """Shows every labelled image to the streams of the classifiers."""

    def add(images: Tensor, labels: Tensor) -> None:
        for stream, rows in zip(streams, read(images), strict=True):
            stream.add(rows, labels)

    with torch.inference_mode():
        for images, labels in source.batches(batch_size):
            assert labels is not None
            in_memory(add, images, labels)


def _unlabelled_rows(read: _Reader, others: ImageSource, batch_size: int) -> list[Tensor]:
    """What each classifier reads of images without labels, or of a sample of these: a row `[n, d]` an image."""
    samples = [ImageSample(MOST_UNLABELLED) for _ in read.classifiers]

    def add(images: Tensor, keys: Tensor) -> None:
        for sample, rows in zip(samples, read(images), strict=True):
            sample.add(rows.cpu(), keys=keys)

    with torch.inference_mode():
        for images, _ in others.batches(batch_size):
            keys = content_keys(images)
            wanted = samples[0].wanted(keys)
            if wanted.any():
                in_memory(add, images[wanted], keys[wanted])
    return [sample.images for sample in samples]


def _write_head(
    classifier: nn.Module, stream: _HeadStream, unlabelled: Tensor | None, network: PudNet, head: Head
) -> None:
    """Puts the head of a stream, self-trained where there are unlabelled rows, into a classifier."""
    assert isinstance(classifier, nn.Linear | nn.Conv2d)
    width, whitening = classifier.weight.shape[1], network.whitening  # that of the first one's features
    whitening = whitening if width == len(whitening) else torch.eye(width)
    if unlabelled is None:
        weight, bias = stream.classifier(whitening)
    else:
        assert isinstance(stream, StreamingRidge)
        weight, bias = self_training_classifier(stream, unlabelled, whitening)
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise InputError(f'{network.name}: what it predicts for these images is not finite: use another hypernetwork')
    if classifier.bias is None and bias.any():
        raise InputError(f'{network.config.model_name}: its classifier has no bias, which head {head!r} needs')
    with torch.no_grad():
        classifier.weight.copy_(weight.view_as(classifier.weight))
        if classifier.bias is not None:
            classifier.bias.copy_(bias)


def _check_asked(num_classes: int | None, found: int) -> None:
    if num_classes is not None and num_classes != found:
        raise InputError(f'num_classes is {num_classes}, but the images have {found} classes: leave it out')


def in_memory(run: Callable[[Tensor, Any], None], images: Tensor, labels: Tensor | None) -> None:
    """Runs something over a batch; in halves, and halves of these, where the device has no memory for it."""
    try:
        run(images, labels)
        return
    except torch.OutOfMemoryError as error:
        half = _fewer(len(images), error)
    for part in (slice(None, half), slice(half, None)):
        in_memory(run, images[part], None if labels is None else labels[part])


def _fewer(count: int, error: torch.OutOfMemoryError) -> int:
    if count < 2:
        raise error
    warnings.warn(f'out of memory with {count} images at once: going on with {count // 2}', PudNetWarning, stacklevel=2)
    return count // 2


def _rows(classifier: nn.Module, features: Tensor) -> Tensor:
    """One row `[n, d]` an image of what a classifier reads; the mean over places where it reads several."""
    if features.ndim > 2:
        return features.flatten(2).mean(2) if isinstance(classifier, nn.Conv2d) else features.flatten(1, -2).mean(1)
    return features


def build_model(
    network: PudNet,
    spec: TargetSpec,
    weights: dict[str, Tensor],
    num_classes: int,
    class_names: tuple[str, ...] | None,
    timm_kwargs: dict[str, Any],
) -> nn.Module:
    """A timm model with these weights, by timm's own way of loading pretrained ones."""
    usual = timm.get_pretrained_cfg(network.config.model_name)
    state = {key: value.detach() for key, value in weights.items()}
    if num_classes:
        for key in spec.keys('classifier'):
            state[key] = torch.zeros(num_classes, *spec.shapes[key][1:])
    else:
        state = {key: value for key, value in state.items() if key in spec.headless}
    own = timm_kwargs.get('pretrained_cfg_overlay') or {}
    if not isinstance(own, Mapping):
        raise InputError(f'pretrained_cfg_overlay must be a mapping of names to values, got {shown(own)}')
    overlay = {
        'state_dict': state,
        'num_classes': num_classes,
        'tag': network.config.tag or None,
        **pretrained_cfg_of(network.config.input, usual.to_dict() if usual else {}),
        # Not None, which would stop timm's pruned networks.
        **({} if _takes_other_channels(network, usual, state) else {'first_conv': ()}),
        'label_offset': 0,
        'label_names': tuple(class_names or map(str, range(num_classes))) if num_classes else None,
    }
    fixed = {**(usual.to_dict() if usual else {}), **overlay, 'architecture': network.config.model_name}
    for key, value in own.items():
        if key in _WHERE_WEIGHTS_ARE and value is not None:
            raise InputError(f'pretrained_cfg_overlay: {key} and the images both say where the weights come from')
        if key in _FIXED and fixed.get(key) != (tuple(value) if isinstance(value, list) else value):
            raise InputError(f'pretrained_cfg_overlay: {key} is {fixed.get(key)!r} for these weights, not {value!r}')
        named = isinstance(value, (list, tuple)) and len(value) == num_classes
        if key == 'label_names' and value is not None and not named:
            raise InputError(
                f'pretrained_cfg_overlay: label_names must be {num_classes} names, one a class, got {shown(value)}'
            )
        overlay[key] = value
    kwargs = {
        **network.config.model_kwargs,
        **timm_kwargs,
        'num_classes': num_classes,
        'pretrained_cfg_overlay': overlay,
    }
    name = network.config.model_name
    # timm tells of tensors that a model of features_only leaves out.
    quiet = _quiet_builder() if timm_kwargs.get('features_only') else contextlib.nullcontext()
    with _NoRandomInit(), quiet:
        try:
            model = timm.create_model(name, pretrained=True, **kwargs)
        except (TypeError, ValueError, AssertionError, IndexError, RuntimeError) as error:  # those of _NOT_OF_TARGET
            given = ', '.join(f'{key}={value!r}' for key, value in timm_kwargs.items() if key in _NOT_OF_TARGET)
            if not given:
                raise
            raise InputError(f'timm.create_model({name!r}) refused {given}: {first_line(error)}') from error
        except OSError as error:  # vit_small_resnet26d_224 for one
            reason = first_line(error)
            raise NotFoundError(f'{name}: timm fetches pretrained weights of a part of it first ({reason})') from error
    for module in model.modules():  # timm's wrapper for features has a config of its own beside the model's
        if isinstance(config := getattr(module, 'pretrained_cfg', None), dict):
            config.pop('state_dict', None)
    model.default_cfg = model.pretrained_cfg
    keep_arguments(model, kwargs)
    return model


def _takes_other_channels(network: PudNet, usual: Any, state: Mapping[str, Tensor]) -> bool:
    """Whether timm may be told which first convs to change for images of other channels.

    Before 1.0.31 it takes all weights for those of three channels, even where it need not change them: a conv that
    reads one channel it leaves as it is, one of four it makes anew, and a stem that folds pixels into channels fails.
    """
    chans, convs = network.config.input.input_size[0], (usual and usual.first_conv) or ()
    kernels = [state.get(f'{name}.weight') for name in ((convs,) if isinstance(convs, str) else convs)]
    return chans == 3 or all(kernel is not None and kernel.shape[1:2] == (1,) for kernel in kernels)


@contextlib.contextmanager
def _quiet_builder() -> Iterator[None]:
    """No warnings of timm's about tensors that it does not load."""
    logger, thread = logging.getLogger('timm.models._builder'), threading.get_ident()

    def lets_through(record: logging.LogRecord) -> bool:
        return record.thread != thread or record.levelno >= logging.ERROR

    logger.addFilter(lets_through)
    try:
        yield
    finally:
        logger.removeFilter(lets_through)


class _NoRandomInit(TorchFunctionMode):
    """Leaves out the random draws of a model's making, since every parameter of it is loaded right after."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Passes every call on but random fills of parameters.

        Other tensors are filled: torch's own `trunc_normal_` draws into one again and again until all is within bounds.
        """
        name = getattr(func, '__name__', '')
        if name in ('uniform_', 'normal_', 'trunc_normal_') or name.startswith(('kaiming_', 'xavier_')):
            tensor = args[0] if args else (kwargs or {})['tensor']
            if isinstance(tensor, nn.Parameter):
                return tensor
        return func(*args, **(kwargs or {}))
