"""The target network: walks a timm CNN on the meta device and says where each of its tensors will come from.

Dimension letters: `o i kh kw` the shape of a conv kernel tensor, `i` already divided by groups.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, cast

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.layers.cond_conv2d import CondConv2d
from timm.models import model_entrypoint, register_model
from torch import Tensor, nn

from timm_pudnet.config import (
    MIN_PREDICTED,
    InputConfig,
    InputError,
    PudNetConfig,
    PudNetError,
    PudNetWarning,
    UnsupportedTargetError,
    close_names,
    first_line,
    shown,
)

Role = Literal['predicted', 'shared', 'calibrated', 'classifier']
BATCH_NORM_BUFFERS = ('running_mean', 'running_var', 'num_batches_tracked')
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# What timm's architectures raise of arguments that they cannot take; OSError of a file that is not there (pruned=True).
REFUSALS = (TypeError, ValueError, RuntimeError, AssertionError, LookupError, AttributeError, ArithmeticError, OSError)
_WIDE = 256  # fewest input channels of a wide conv
_SMALL = 16  # most pixels of a small map
_MARK = 9973  # classes of the target that is walked: no other dimension is this prime


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
        shapes: For every key of the state dict its shape; of the classifier's that of one class.
        layers: The predicted tensors in the order in which the network holds them.
        constants: Those of the shared keys that are buffers (index tables and the like, never trained), by dtype.
        tied: Keys whose tensor is that of another key, and that key.
        classifiers: Names of the modules, Linear or 1x1 conv, that turn features into logits: one, or none, or
            several whose logits the network puts together.
        num_features: Width of the features that the first of them reads.
        in_chans: Channels of the images that it takes.
    """

    model_name: str
    model_kwargs: dict[str, Any]
    roles: dict[str, Role]
    shapes: dict[str, tuple[int, ...]]
    layers: tuple[LayerSpec, ...]
    constants: dict[str, torch.dtype]
    tied: dict[str, str]
    classifiers: tuple[str, ...]
    num_features: int
    in_chans: int

    @property
    def kept(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all keys but the classifier's."""
        return {key: shape for key, shape in self.shapes.items() if self.roles[key] != 'classifier'}

    def keys(self, role: Role) -> Iterator[str]:
        """Keys of one role, in the order of the state dict; of tied ones the first alone."""
        return (key for key, value in self.roles.items() if value == role and key not in self.tied)

    def numel(self, role: Role) -> int:
        """Scalars in all tensors of one role."""
        return sum(math.prod(self.shapes[key]) for key in self.keys(role))

    @property
    def headless(self) -> frozenset[str]:
        """Keys of timm's model of `num_classes=0`; a few architectures lose more than the classifier there."""
        key = json.dumps(self.model_kwargs, sort_keys=True)
        return _headless(self.model_name, key, model_entrypoint(self.model_name))

    @property
    def ends_in_classifier(self) -> bool:
        """Whether timm's model of `num_classes=0` loses the classifier and nothing else."""
        return self.headless == self.kept.keys()

    @property
    def predicted_share(self) -> float:
        """Share of the weights that are predicted, of all but the classifier."""
        predicted, shared = self.numel('predicted'), self.numel('shared')
        return predicted / max(1, predicted + shared)


def describe_target(
    model_name: str,
    *,
    predict_norm: bool = False,
    predict_linear: bool = False,
    min_predicted: float = MIN_PREDICTED,
    **model_kwargs: Any,
) -> TargetSpec:
    """Puts every state-dict key of a timm CNN into predicted, shared, calibrated or classifier.

    Conv kernels of every kind (grouped, depthwise, transposed, of one to three dimensions, weight-standardised, mixed
    from experts) are *predicted*; the statistics of BatchNorm are *calibrated* on the caller's images; what turns
    features into logits is the *classifier*; every other parameter (norm affine, biases, gains, LayerScale, position
    embeddings, `Linear` inside blocks) is *shared*, that is learned once and the same for every data set, and so is
    every constant buffer. Nothing is built but on the meta device, if timm can.

    Args:
        model_name: timm architecture, without a tag.
        predict_norm: Predict the affine parameters of norm layers too.
        predict_linear: Predict the weights of `Linear` layers inside blocks too, as 1x1 convs.
        min_predicted: Least share of the weights that must be predicted.
        model_kwargs: Passed to `timm.create_model`.

    Returns:
        The roles and shapes of all keys, and the predicted layers in order.

    Raises:
        InputError: timm does not know the architecture, or refuses an argument.
        UnsupportedTargetError: A key fits no role, or too few of the weights are predicted.

    Example:
        >>> spec = describe_target('resnet18')
        >>> len(spec.layers), spec.roles['conv1.weight'], spec.roles['bn1.weight'], spec.roles['fc.weight']
        (20, 'predicted', 'shared', 'classifier')
    """
    # Walking costs as much as a small prediction, so equal questions share one answer; JSON makes kwargs hashable.
    for name, value in model_kwargs.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise InputError(
                f'{model_name}: {name}={value!r} is nothing that a file can hold; timm takes names too, '
                "act_layer='gelu' for instance"
            ) from error
        share = isinstance(value, (int, float)) and 0 <= value <= 1
        if 'drop' in name and name.endswith('_rate') and value is not None and not share:  # else an error of torch's
            raise InputError(f'{model_name}: {name} must be a share in 0-1, got {value!r}')
    key = json.dumps(model_kwargs, sort_keys=True)
    check_architecture(model_name)
    # By the function too: a notebook's cell may register a network of that name anew.
    spec, hint = _describe(model_name, predict_norm, predict_linear, key, model_entrypoint(model_name))
    if not spec.layers:
        raise UnsupportedTargetError(
            f'{model_name} has no conv whose kernels could be predicted: choose a convolutional network, resnet18 for '
            'instance, or have its Linear layers predicted (predict_linear=True of PudNet.for_target or a recipe)'
        )
    if spec.predicted_share < min_predicted:
        raise UnsupportedTargetError(
            f'{model_name}: convs hold {spec.predicted_share:.1%} of its weights, only their kernels are predicted. '
            + (hint or 'Choose a convolutional network, resnet18 for instance')
            + '; or make a hypernetwork (PudNet.for_target, a recipe) that shares the rest (min_predicted=0) or '
            'predicts Linear layers too (predict_linear=True).'
        )
    return spec


def check_architecture(model_name: str) -> None:
    """Raises InputError, with the close names, unless timm knows the architecture."""
    if not isinstance(model_name, str):
        raise InputError(f'the architecture must be a name, resnet18 for instance, got {shown(model_name)}')
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


def fixed_size(model_name: str) -> tuple[int, int] | None:
    """Height and width of the images of an architecture that is made for one size, by timm's `img_size`; else None."""
    usual = timm.get_pretrained_cfg(model_name.partition('.')[0])
    return usual.input_size[1:] if usual is not None and usual.fixed_input_size else None


def img_size_of(config: PudNetConfig) -> tuple[Any, ...] | None:
    """The size that a config asks such an architecture to be made for; None where it asks for none."""
    given = config.model_kwargs.get('img_size')
    if given is None or fixed_size(config.model_name) is None:
        return None
    size = tuple(given) if isinstance(given, list) else (given, given)
    if len(size) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in size):
        raise InputError(f'{config.model_name}: img_size must be a side, or height and width, got {shown(given)}')
    return size


def of_one_size(config: PudNetConfig) -> PudNetConfig:
    """The config with such an architecture made for the size of its images; of any other architecture as it is.

    Raises:
        InputError: It is to be made for another size.
    """
    usual, size, asked = fixed_size(config.model_name), config.input.input_size[1:], img_size_of(config)
    if usual is None or size == (asked or usual):
        return config
    if asked is not None:
        raise InputError(
            f'{config.model_name}: img_size {config.model_kwargs["img_size"]} in model_kwargs is not the size of its '
            f'images, {"x".join(map(str, size))} by input_size: leave one of them out'
        )
    return dataclasses.replace(config, model_kwargs={**config.model_kwargs, 'img_size': list(size)})


@functools.lru_cache(maxsize=64)
def _describe(
    model_name: str, predict_norm: bool, predict_linear: bool, kwargs_json: str, made_by: Callable[..., nn.Module]
) -> tuple[TargetSpec, str]:
    model_kwargs = json.loads(kwargs_json)
    model = _meta_model(model_name, model_kwargs, _MARK)
    in_chans = _in_chans(model, model_kwargs)
    if 'img_size' in model_kwargs and fixed_size(model_name) is not None:
        _check_size(model_name, model, in_chans, model_kwargs['img_size'])
    state = model.state_dict(keep_vars=True)
    roles: dict[str, Role] = {}
    layers: dict[str, LayerSpec] = {}
    constants: dict[str, torch.dtype] = {}
    tied: dict[str, str] = {}
    seen: dict[int, str] = {}
    classifiers: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f'{name}.' if name else ''
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        for short, tensor in own.items():
            key = prefix + short
            if key not in state:  # a buffer that is not persistent is made by the model itself
                continue
            first = seen.setdefault(id(tensor), key)
            if first != key:
                tied[key], roles[key] = first, roles[first]
                continue
            if _MARK in tensor.shape:
                roles[key] = 'classifier'
                _check_classifier(model_name, name, module)
                if name not in classifiers:
                    classifiers.append(name)
                continue
            layer = _layer(model_name, key, short, module, predict_norm, predict_linear)
            if layer is not None:
                layers[key], roles[key] = layer, 'predicted'
            elif isinstance(tensor, nn.Parameter):
                roles[key] = 'shared'
            elif isinstance(module, nn.modules.batchnorm._NormBase) and short in BATCH_NORM_BUFFERS:
                roles[key] = 'calibrated'
            elif short.startswith('running'):
                raise UnsupportedTargetError(
                    f'{model_name}: {key} is a statistic of a {type(module).__name__}, which cannot be calibrated'
                )
            else:
                roles[key] = 'shared'
                constants[key] = tensor.dtype
    missing = [key for key in state if key not in roles]
    if missing:
        raise UnsupportedTargetError(f'{model_name}: {missing[0]} belongs to no module that can be walked')
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    for key, role in roles.items():
        if role == 'classifier':
            shapes[key] = (1, *shapes[key][1:])
    reads = model.get_submodule(classifiers[0]) if classifiers else None
    width = reads.weight.shape[1] if reads is not None else getattr(model, 'num_features')  # type: ignore  # noqa: B009
    spec = TargetSpec(
        model_name=model_name,
        model_kwargs=model_kwargs,
        roles={key: roles[key] for key in state},
        shapes=shapes,
        layers=tuple(layers[key] for key in state if key in layers),
        constants=constants,
        tied=tied,
        classifiers=tuple(classifiers),
        num_features=int(width),
        in_chans=in_chans,
    )
    return spec, _conv_mlp_hint(model)


@functools.lru_cache(maxsize=64)
def _headless(model_name: str, kwargs_json: str, made_by: Callable[..., nn.Module]) -> frozenset[str]:
    return frozenset(_meta_model(model_name, json.loads(kwargs_json), 0).state_dict())


def _check_size(model_name: str, model: nn.Module, in_chans: int, img_size: Any) -> None:
    """Refuses images of a size that the architecture, though made for it, cannot see: its windows do not fit, say."""
    sides = img_size if isinstance(img_size, list) else (img_size, img_size)
    try:
        with torch.device('meta'), torch.no_grad():
            model.eval()(torch.zeros(1, in_chans, *sides))
    except REFUSALS as error:
        raise InputError(
            f'{model_name} cannot be made for images of size {img_size} ({first_line(error)}): choose '
            f'another size, its own is {"x".join(map(str, fixed_size(model_name) or ()))}'
        ) from error


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first tensor, or shape of one, that is not as wanted, in words; an empty text where there is none."""
    for key in [*wanted, *found]:
        its, other = (tuple(getattr(one[key], 'shape', one[key])) if key in one else None for one in (found, wanted))
        if its != other:
            return f'{key} is {"not there" if its is None else its}, not {"there" if other is None else other}'
    return ''


def check_loadable(model: nn.Module) -> None:
    """Raises InputError where timm, told what a file of this model would say, makes other tensors than it has."""
    name, classes = str(model.pretrained_cfg['architecture']), int(cast(Any, model.num_classes))  # type: ignore[index]
    arguments = {key: value for key, value in arguments_of(model).items() if key != 'num_classes'}
    try:
        expected = _meta_model(name, arguments, classes).state_dict()
    except PudNetError:  # vit_small_resnet26d_224 fetches weights; what is wrong otherwise timm says
        return
    own, heads = model.state_dict(), model.pretrained_cfg.get('classifier') or ()  # type: ignore[union-attr]
    heads = (heads,) if isinstance(heads, str) else heads
    for key in [*own, *expected]:
        if key not in own and key.endswith('.num_batches_tracked'):  # torch adds it; timm's frozen norms have none
            continue
        # What quantised layers hold is no tensor.
        shapes = [tuple(getattr(state[key], 'shape', ())) if key in state else 'not there' for state in (own, expected)]
        if shapes[0] != shapes[1]:
            of_head = key.startswith(tuple(f'{head}.' for head in heads)) and key.endswith(('.weight', '.bias'))
            remedy = (
                'the classes are changed by model.reset_classifier'
                if of_head
                else 'undo what was changed in it by hand (pruning, parametrisation, quantisation, a buffer), or keep '
                'its state_dict by torch.save'
            )
            raise InputError(
                f'{key} is {shapes[0]}, but {shapes[1]} in the {name} of {classes} classes that timm would make, so it '
                f'could not load this model; {remedy}'
            )


def _meta_model(model_name: str, model_kwargs: dict[str, Any], num_classes: int) -> nn.Module:
    if model_kwargs.get('features_only'):
        raise InputError('features_only changes what a model gives, not its weights: leave it out here')
    made = {**model_kwargs, 'num_classes': num_classes, 'pretrained': False}
    try:
        try:
            with torch.device('meta'):
                return timm.create_model(model_name, **made)
        except NotImplementedError:  # a RegNet of an earlier timm works its widths out with tensors
            with torch.random.fork_rng(devices=[]):
                return timm.create_model(model_name, **made)
    except REFUSALS as error:
        raise InputError(f'timm.create_model({model_name!r}) refused {model_kwargs}: {first_line(error)}') from error


def _check_classifier(model_name: str, name: str, module: nn.Module) -> None:
    pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    if not (isinstance(module, nn.Linear) or pointwise):
        raise UnsupportedTargetError(
            f'{model_name}: classifier {name} is a {type(module).__name__}, neither a Linear layer nor a 1x1 conv'
        )


def _layer(
    model_name: str, key: str, short: str, module: nn.Module, predict_norm: bool, predict_linear: bool
) -> LayerSpec | None:
    """The layer that a tensor is, where it is predicted."""
    tensor = getattr(module, short)
    shape = tuple(tensor.shape)
    if short == 'weight' and isinstance(module, _TRANSPOSED):
        # Every output sums over the inputs that its stride lets reach it.
        fan_in = math.prod((shape[0], *shape[2:])) // module.groups // math.prod(module.stride)
        return LayerSpec(key, shape, fan_in=max(1, fan_in))
    if short == 'weight' and isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return LayerSpec(key, shape)
    if short == 'weight' and isinstance(module, CondConv2d):
        # As timm keeps them: `(o, i, kh, kw)` of one expert.
        out_chans, *rest = map(int, cast(Any, module.weight_shape))
        return LayerSpec(key, shape, (int(cast(Any, module.num_experts)) * out_chans, *rest), math.prod(rest))
    if short == 'weight' and isinstance(module, nn.Linear) and predict_linear:
        return LayerSpec(key, shape, (*shape, 1))
    if not isinstance(tensor, nn.Parameter):
        return None
    if predict_norm and is_norm(module) and tensor.ndim == 1 and short in ('weight', 'bias'):
        return LayerSpec(key, shape)
    if short == 'weight' and tensor.ndim > 2 and 'conv' in type(module).__name__.lower():
        raise UnsupportedTargetError(f'{model_name}: {key} is the kernel of a {type(module).__name__}, an unknown conv')
    return None


def create_feature_model(spec: TargetSpec) -> nn.Module:
    """The target without its classifiers: a timm model that gives what they read, its weights new.

    That is timm's model of `num_classes=0` where it has the same weights; a few architectures have further layers in
    their heads (an MLP, a norm), which are kept.

    Args:
        spec: The target.

    Example:
        >>> model = create_feature_model(describe_target('test_resnet'))
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 96])
    """
    if spec.ends_in_classifier:
        model = timm.create_model(spec.model_name, **{**spec.model_kwargs, 'num_classes': 0})
        keep_arguments(model, spec.model_kwargs)
        return model
    model = timm.create_model(spec.model_name, **{**spec.model_kwargs, 'num_classes': 2})
    for name in spec.classifiers:
        parent, _, last = name.rpartition('.')
        setattr(model.get_submodule(parent), last, nn.Identity())
    return model


def channels_last(model: nn.Module) -> nn.Module:
    """Lays a model's kernels out with channels last, in place, which is faster, except those of `small_maps_first`.

    Kernels of other ranks stay as they are.
    """
    kept = {id(conv.weight) for conv in _slow_on_small_maps(model)}
    for value in model.parameters():
        if value.ndim == 4 and id(value) not in kept:
            value.data = value.data.contiguous(memory_format=torch.channels_last)
    return model


def laid_out(images: Tensor) -> Tensor:
    """Images with channels last in memory where a processor reads them, which most CNNs are faster with."""
    return images.contiguous(memory_format=torch.channels_last) if images.is_cpu else images


@contextlib.contextmanager
def small_maps_first(model: nn.Module) -> Iterator[None]:
    """Inside, a model's wide convs see small maps with channels first in memory, all else as it comes (`laid_out`).

    With channels last these convs took up to three times as long on the processor with AVX-512 where it was measured,
    and no longer without AVX-512. ResNet-18 at 56x56 is faster by nearly a half.
    """
    hooks = [
        hook
        for conv in _slow_on_small_maps(model)
        for hook in (conv.register_forward_pre_hook(_channels_first), conv.register_forward_hook(_channels_last_again))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _slow_on_small_maps(model: nn.Module) -> list[nn.Conv2d]:
    if torch.backends.cpu.get_cpu_capability() != 'AVX512':
        return []
    # With channels last in the kernel torch takes maps so too, however they come.
    return [
        conv
        for conv in model.modules()
        if isinstance(conv, nn.Conv2d)
        and conv.groups == 1
        and conv.in_channels >= _WIDE
        and max(conv.kernel_size) > 1
        and conv.weight.is_cpu
        and conv.weight.is_contiguous()
    ]


def _channels_first(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    return (args[0].contiguous(), *args[1:]) if _sees_small_maps(args) else None


def _channels_last_again(_: nn.Module, args: tuple[Any, ...], maps: Tensor) -> Tensor | None:
    return laid_out(maps) if _sees_small_maps(args) else None


def _sees_small_maps(args: tuple[Any, ...]) -> bool:
    return bool(args) and args[0].ndim == 4 and 1 < args[0].shape[2] * args[0].shape[3] <= _SMALL


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises its input and may carry an affine weight and bias."""
    kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    return isinstance(module, kinds) or 'norm' in type(module).__name__.lower()


def normalised_otherwise(model: nn.Module, wanted: InputConfig) -> str:
    """Mean and std of a timm model in words, where its own config has others than wanted; else an empty text."""
    own = input_of(model)
    pairs = zip((*own.mean, *own.std), (*wanted.mean, *wanted.std), strict=False)
    alike = len(own.mean) == len(wanted.mean) and all(math.isclose(a, b, abs_tol=1e-6) for a, b in pairs)
    return '' if alike else f'of mean {own.mean} and std {own.std}'


def input_of(model: nn.Module) -> InputConfig:
    """How a timm model sees images, by its own config; channels by its first conv, for `in_chans` is not in there."""
    found = resolve_model_data_config(model)
    first = (getattr(model, 'pretrained_cfg', None) or {}).get('first_conv')
    conv = dict(model.named_modules()).get(first) if isinstance(first, str) else None
    channels = conv.in_channels if isinstance(conv, nn.Conv2d) else found['input_size'][0]
    if channels != found['input_size'][0]:
        found['input_size'] = (channels, *found['input_size'][1:])
        for name in ('mean', 'std'):
            found[name] = (sum(found[name]) / len(found[name]),) * channels
    found['crop_pct'] = min(1.0, found['crop_pct'])  # volo_d5_512 has more, to leave a border out
    names = [field.name for field in dataclasses.fields(InputConfig)]
    return InputConfig(**{name: found[name] for name in names})


def pretrained_cfg_of(config: InputConfig, usual: Mapping[str, Any]) -> dict[str, Any]:
    """What timm's `pretrained_cfg` says of weights made here: how they see images, and that they are nobody else's.

    `usual` is that of the architecture, whose last maps are of another size.
    """
    pool, size = usual.get('pool_size'), usual.get('input_size')
    sides = zip(pool or (), config.input_size[1:], (size or (0,))[1:], strict=False)
    return {
        **vars(config),
        **({'pool_size': tuple(math.ceil(one * side / old) for one, side, old in sides)} if pool and size else {}),
        # What the architecture's own pretrained weights would bring along does not hold for these.
        **dict.fromkeys(('url', 'file', 'hf_hub_id', 'hf_hub_filename', 'test_input_size', 'test_crop_pct'), None),
        **dict.fromkeys(('license', 'origin_url', 'paper_ids', 'paper_name', 'notes', 'label_descriptions'), None),
    }


def keep_arguments(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Keeps the arguments that a model was made with, for `save_model`, where an earlier timm than 1.0.31 does not."""
    if hasattr(model, '_model_args'):
        return
    # What a file has by itself, what is of training alone, and what is timm.create_model's own.
    passing = {'num_classes', 'pretrained_cfg_overlay', 'drop_rate', 'drop_path_rate', 'drop_block_rate'}
    passing |= {'cache_dir', 'scriptable', 'exportable', 'no_jit', 'device', 'dtype'}
    kept = {}
    for key in {key for key, value in arguments.items() if value is not None} - passing:
        with contextlib.suppress(TypeError):  # a class or function, which no file can hold
            json.dumps(arguments[key])
            kept[key] = arguments[key]
    described: Any = model
    described._model_args = kept


def arguments_of(model: nn.Module) -> dict[str, Any]:
    """The arguments that a model was made with, as timm knows them, or an earlier timm by `keep_arguments`."""
    found = getattr(timm.models, 'get_model_args', lambda model: getattr(model, '_model_args', None))(model)
    return dict(found or {})


def with_own_config(model: nn.Module, config: InputConfig) -> nn.Module:
    """Tells timm how a model whose weights were trained here sees images, not its pretrained ones; gives the model."""
    own = {**model.pretrained_cfg, 'tag': None, **pretrained_cfg_of(config, model.pretrained_cfg)}  # type: ignore
    model.pretrained_cfg = model.default_cfg = own  # type: ignore[assignment]
    return model


def _in_chans(model: nn.Module, model_kwargs: dict[str, Any]) -> int:
    """Channels of the images: as asked for, else what the architecture's config says."""
    if 'in_chans' in model_kwargs:
        return int(model_kwargs['in_chans'])
    return int((getattr(model, 'pretrained_cfg', None) or {}).get('input_size', (3,))[0])


def _conv_mlp_hint(model: nn.Module) -> str:
    """Timm's ConvNeXt and kin can hold their MLPs as 1x1 convs; then they are predicted."""
    name = type(model).__name__
    return 'Pass conv_mlp=True, so that its MLPs are 1x1 convs' if name == 'ConvNeXt' else ''


def batch_norms(model: nn.Module) -> Iterable[tuple[str, nn.modules.batchnorm._NormBase]]:
    """The BatchNorm layers of a model whose statistics are calibrated, by name, in the order of the network."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            yield name, module


def is_ours(model_name: str) -> bool:
    """Whether timm knows an architecture through this package alone."""
    return timm.is_model(model_name) and model_entrypoint(model_name).__module__.startswith('timm_pudnet.')


def register_architecture(entrypoint: Callable[..., nn.Module]) -> None:
    """Adds an architecture to timm once; a network of that name that is not ours stays, with a warning."""
    name = entrypoint.__name__
    if not timm.is_model(name):
        register_model(entrypoint)
    elif model_entrypoint(name).__module__ != entrypoint.__module__:
        warnings.warn(
            f"timm's {name} is that of {model_entrypoint(name).__module__}, not the one of timm-pudnet: "
            'hypernetworks made for this one will not fit it',
            PudNetWarning,
            stacklevel=3,
        )
