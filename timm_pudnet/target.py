"""The target network: walks a timm CNN on the meta device and says where each of its tensors will come from.

Dimension letters: `o i kh kw` the shape of a conv kernel tensor, `i` already divided by groups.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import timm
import torch
from torch import nn

from timm_pudnet.config import InputError, UnsupportedTargetError, close_names

Role = Literal['predicted', 'shared', 'calibrated', 'classifier']
MIN_PREDICTED_SHARE = 0.5
BATCH_NORM_BUFFERS = ('running_mean', 'running_var', 'num_batches_tracked')


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """A tensor of the target that the hypernetwork predicts.

    Args:
        key: Its key in the target's state dict.
        shape: Its shape there: `(o, i, kh, kw)` of an ordinary kernel, `(o,)` of a norm's affine parameter.
        kernel: Its shape as kernels, `(o, i, *taps)`, where it has another: `(o, i, 1)` for a Linear's weight
            `(o, i)`, the kernels of all experts below each other for a `CondConv2d`.
        fan_in: Inputs that one output of the layer sums over (1 for a norm's affine parameter); by default those of a
            conv with such kernels.
    """

    key: str
    shape: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    fan_in: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, 'kernel', self.kernel or self.shape)
        object.__setattr__(self, 'fan_in', self.fan_in or math.prod(self.kernel[1:]))

    @property
    def numel(self) -> int:
        """Number of scalars in the tensor."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """Where every key of a target's state dict comes from; made by `describe_target`.

    Args:
        model_name: timm architecture.
        model_kwargs: Arguments of `timm.create_model` it was described with.
        roles: For every key of the state dict one of `predicted`, `shared`, `calibrated`, `classifier`.
        shapes: For every key of the state dict its shape.
        layers: The predicted tensors in the order in which the network holds them.
        num_features: Width of the features that the classifier reads.
        classifier: Name of the classifier module.
        in_chans: Channels of the images that it takes.
    """

    model_name: str
    model_kwargs: dict[str, Any]
    roles: dict[str, Role]
    shapes: dict[str, tuple[int, ...]]
    layers: tuple[LayerSpec, ...]
    num_features: int
    classifier: str
    in_chans: int

    def keys(self, role: Role) -> Iterator[str]:
        """Keys of one role, in the order of the state dict."""
        return (key for key, value in self.roles.items() if value == role)

    def numel(self, role: Role) -> int:
        """Scalars in all tensors of one role."""
        return sum(math.prod(self.shapes[key]) for key in self.keys(role))

    @property
    def predicted_share(self) -> float:
        """Share of the weights that are predicted, of all but the classifier."""
        predicted, shared = self.numel('predicted'), self.numel('shared')
        return predicted / max(1, predicted + shared)


def describe_target(model_name: str, *, predict_norm: bool = False, **model_kwargs: Any) -> TargetSpec:
    """Puts every state-dict key of a timm CNN into predicted, shared, calibrated or classifier.

    Conv kernels are *predicted*; the statistics of BatchNorm are *calibrated* on the caller's images; the final
    `Linear` is the *classifier*; every other parameter (norm affine, biases, gains, `Linear` inside blocks) is
    *shared*, that is learned once and the same for every data set. Nothing is built but on the meta device.

    Args:
        model_name: timm architecture, without a tag.
        predict_norm: Predict the affine parameters of norm layers too.
        model_kwargs: Passed to `timm.create_model`.

    Returns:
        The roles and shapes of all keys, and the predicted layers in order.

    Raises:
        InputError: timm does not know the architecture, or refuses an argument.
        UnsupportedTargetError: A key fits no role, or convs hold less than half of the weights.

    Example:
        >>> spec = describe_target('resnet18')
        >>> len(spec.layers), spec.roles['conv1.weight'], spec.roles['bn1.weight'], spec.roles['fc.weight']
        (20, 'predicted', 'shared', 'classifier')
    """
    # Walking costs as much as a small prediction, so equal questions share one answer; JSON makes kwargs hashable.
    try:
        key = json.dumps(model_kwargs, sort_keys=True)
    except TypeError as error:
        raise InputError(f'{model_name}: arguments must be plain values that JSON can hold: {error}') from error
    return _describe(model_name, predict_norm, key)


def check_architecture(model_name: str) -> None:
    """Raises InputError, with the close names, unless timm knows the architecture."""
    if '.' not in model_name and timm.is_model(model_name):
        return
    if model_name.startswith(('hf-hub:', 'local-dir:', 'hf_hub:')):
        raise InputError(
            f'{model_name!r}: give the architecture alone, resnet18 for instance; its weights are predicted'
        )
    name = model_name.split('.', maxsplit=1)[0]
    if name != model_name and timm.is_model(name):
        raise InputError(f'{model_name!r}: give the architecture without a tag ({name}); its weights are predicted')
    raise InputError(
        f'timm {timm.__version__} has no architecture {model_name!r}.{close_names(name, timm.list_models())} '
        'timm.list_models() lists all.'
    )


@functools.lru_cache(maxsize=64)
def _describe(model_name: str, predict_norm: bool, kwargs_json: str) -> TargetSpec:
    model_kwargs = json.loads(kwargs_json)
    check_architecture(model_name)
    # A classifier must be there to be found; how many classes it has changes nothing else.
    kwargs = {'num_classes': 2, **model_kwargs, 'pretrained': False}
    try:
        with torch.device('meta'):
            model = timm.create_model(model_name, **kwargs)
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f'timm.create_model({model_name!r}) refused {model_kwargs}: {reason}') from error

    state = model.state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    classifier = _classifier_name(model, model_name)
    roles: dict[str, Role] = {}
    seen: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f'{name}.' if name else ''
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        for short, tensor in own.items():
            key = prefix + short
            if key not in state:  # a buffer that is not persistent is made by the model itself
                continue
            if id(tensor) in seen:
                raise UnsupportedTargetError(
                    f'{model_name}: {key} is tied to {seen[id(tensor)]}; tied weights are not supported'
                )
            seen[id(tensor)] = key
            roles[key] = _role(model_name, key, short, module, tensor, classifier, predict_norm)
    missing = [key for key in state if key not in roles]
    if missing:
        raise UnsupportedTargetError(f'{model_name}: {missing[0]} belongs to no module that can be walked')

    spec = TargetSpec(
        model_name=model_name,
        model_kwargs=model_kwargs,
        roles={key: roles[key] for key in state},
        shapes=shapes,
        layers=tuple(LayerSpec(key, shapes[key]) for key in state if roles[key] == 'predicted'),
        num_features=int(model.get_submodule(classifier).in_features),  # type: ignore[arg-type]
        classifier=classifier,
        in_chans=_in_chans(model, model_kwargs),
    )
    if spec.predicted_share < MIN_PREDICTED_SHARE:
        hint = _conv_mlp_hint(model)
        raise UnsupportedTargetError(
            f'{model_name}: convs hold {spec.predicted_share:.1%} of its weights, only their kernels are predicted. '
            + (hint or 'Choose a convolutional network, resnet18 for instance.')
        )
    return spec


def _classifier_name(model: nn.Module, model_name: str) -> str:
    """Name of the one Linear that turns pooled features into logits."""
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('classifier')
    names = [names] if isinstance(names, str) else list(names or [])
    get_classifier = getattr(model, 'get_classifier', None)
    head = get_classifier() if callable(get_classifier) else None
    found = [name for name, module in model.named_modules() if module is head] if isinstance(head, nn.Module) else names
    if len(found) != 1:
        raise UnsupportedTargetError(f'{model_name}: has {len(found)} classifiers ({", ".join(found)}); one is needed')
    module = model.get_submodule(found[0])
    if not isinstance(module, nn.Linear):
        raise UnsupportedTargetError(
            f'{model_name}: classifier {found[0]} is a {type(module).__name__}, not a Linear layer'
        )
    return found[0]


def _role(
    model_name: str, key: str, short: str, module: nn.Module, tensor: torch.Tensor, classifier: str, predict_norm: bool
) -> Role:
    if key.startswith(f'{classifier}.'):
        return 'classifier'
    if isinstance(module, nn.modules.batchnorm._NormBase) and short in BATCH_NORM_BUFFERS:
        return 'calibrated'
    if not isinstance(tensor, nn.Parameter):
        raise UnsupportedTargetError(
            f'{model_name}: {key} is a buffer of a {type(module).__name__}; where its values come from is not known'
        )
    if isinstance(module, nn.Conv2d) and short == 'weight':
        return 'predicted'
    if predict_norm and is_norm(module) and tensor.ndim == 1 and short in ('weight', 'bias'):
        return 'predicted'
    return 'shared'


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises its input and may carry an affine weight and bias."""
    kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    return isinstance(module, kinds)


def _in_chans(model: nn.Module, model_kwargs: dict[str, Any]) -> int:
    """Channels of the images: as asked for, else what the architecture's config says."""
    if 'in_chans' in model_kwargs:
        return int(model_kwargs['in_chans'])
    return int((getattr(model, 'pretrained_cfg', None) or {}).get('input_size', (3,))[0])


def _conv_mlp_hint(model: nn.Module) -> str:
    """Timm's ConvNeXt and kin can hold their MLPs as 1x1 convs; then they are predicted."""
    name = type(model).__name__
    return 'Pass conv_mlp=True, so that its MLPs are 1x1 convs.' if name == 'ConvNeXt' else ''


def batch_norms(model: nn.Module) -> Iterable[tuple[str, nn.modules.batchnorm._NormBase]]:
    """The BatchNorm layers of a model whose statistics are calibrated, by name, in the order of the network."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            yield name, module
