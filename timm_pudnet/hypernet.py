"""PudNet, the hypernetwork: a sketch in, the tensors of the target's state dict out.

Dimension letters: `n` images, `c h w` an image, `m` width of the sketch, `L` predicted layers.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import timm
import torch
from torch import Tensor, nn

from timm_pudnet import remote
from timm_pudnet.ahru import AHRU
from timm_pudnet.config import (
    DamagedFileError,
    InputConfig,
    InputError,
    NotFoundError,
    OutputExistsError,
    PudNetConfig,
    PudNetWarning,
    first_line,
    shown,
)
from timm_pudnet.devices import library_versions, own_defaults
from timm_pudnet.files import (
    CONFIG_NAME,
    INDEX_NAME,
    SHARD,
    WEIGHTS_NAME,
    as_tensors,
    folder_path,
    read_config,
    read_header,
    read_json,
    read_weights,
    save_tensors,
    weight_files,
    written_whole,
)
from timm_pudnet.generators import create_generator
from timm_pudnet.images import open_images
from timm_pudnet.sketch import Balance, SketchEncoder, SketchGate, StreamingSketch, in_eval_mode
from timm_pudnet.target import (
    TargetSpec,
    create_feature_model,
    describe_target,
    difference,
    fixed_size,
    img_size_of,
    input_of,
    keep_arguments,
    of_one_size,
)

if TYPE_CHECKING:
    from timm_pudnet.hub import Pushed

P = ParamSpec('P')
Result = TypeVar('Result')
MAX_SHARD_BYTES = 4_000_000_000  # weights above this size are saved as several files and an index
MOST_PARAMETERS = 15_000_000  # of a hypernetwork with the paper's generators: 30 MB in half precision
# Width of the sketch and rank of the changes (of norms too), for residual generators where nobody asks for a width: the
# first with which the hypernetwork has at most so many times the target's weights.
RESIDUAL_SIZES = ((128, 4), (64, 4), (32, 4), (16, 4), (16, 2), (16, 1), (8, 1))
MOST_OF_TARGET = 1.1
_EXACT = ('norm_statistics.', 'whitening', 'gate.')  # what half precision leaves alone
MOST_UNSAVED = 8192  # features whose whitening is not saved where it is the identity


def on_device(network: PudNet, device: torch.device, given: Any) -> PudNet:
    """The hypernetwork on a device, in float32; a copy where it is the one that the caller has `given`."""
    there = network.device == torch.empty(0, device=device).device  # with its number: cuda:0, not cuda
    if there and network.temperature.dtype == torch.float32:
        return network
    return (copy.deepcopy(network) if network is given else network).to(device, torch.float32)


def with_hypernet_as_saved(
    function: Callable[Concatenate[PudNet, P], Result],
) -> Callable[Concatenate[PudNet, P], Result]:
    """Gives a function the hypernetwork in eval mode and float32, and leaves the caller's as it was."""

    @functools.wraps(function)
    def wrapped(hypernet: PudNet, *args: P.args, **kwargs: P.kwargs) -> Result:
        hypernet = getattr(hypernet, '_orig_mod', hypernet)  # what torch.compile wraps
        if not isinstance(hypernet, PudNet):
            raise InputError(
                f'hypernet must be a PudNet, not a {type(hypernet).__name__}: timm_pudnet.load_hypernet(name) gives one'
            )
        with in_eval_mode(hypernet):
            return function(on_device(hypernet, hypernet.device, hypernet), *args, **kwargs)

    return wrapped


class PudNet(nn.Module):
    """A hypernetwork for one target architecture.

    Args:
        config: Architecture of the target and of the hypernetwork.

    Raises:
        InputError: timm does not know the target, or makes it for images of another size or other channels.
        UnsupportedTargetError: The target has a tensor that nothing can fill.

    Example:
        >>> hypernet = PudNet.for_target('test_resnet', sketch_width=16)
        >>> weights = hypernet(torch.zeros(16))
        >>> weights['conv1.0.weight'].shape
        torch.Size([16, 3, 3, 3])
    """

    def __init__(self, config: PudNetConfig) -> None:
        super().__init__()
        # Once a block of this size is given back, glibc keeps freed memory for the next kernels instead of fetching
        # fresh pages for each of them (its dynamic threshold, of 32 MB at most). The zeros are never written.
        bytes(31 << 20)
        self.config = config = of_one_size(config)
        self.folder: Path | None = None  # that it was read from
        self.target: TargetSpec = target_of(config)
        layers = self.target.layers
        chans = config.input.input_size[0]
        if chans != self.target.in_chans:
            raise InputError(
                f'input_size has {chans} channels, but {config.model_name} takes {self.target.in_chans}: '
                f'set one to the other (model_kwargs in_chans={chans} makes such a target)'
            )
        self.encoder = SketchEncoder(chans, config.sketch_width, config.sketch_channels)
        self.gate = SketchGate(config.sketch_width) if config.sketch_gate else None
        self.ahru = AHRU(config.sketch_width, len(layers), config.eta) if config.context else None
        self.generators = nn.ModuleList(
            create_generator(
                config.generator, layer, config.sketch_width, config.gain, config.norm_rank, **config.generator_kwargs
            )
            for layer in layers
        )
        self.temperature = nn.Parameter(torch.tensor(10.0))  # tau of eq. 7
        self.whitening: Tensor  # of the features, before eq. 7; the identity until training has ended
        self.register_buffer('whitening', torch.eye(self.target.num_features))
        # Torch allows no dots in the names of parameters, and a slash in no name of a module.
        shared = [key for key in self.target.keys('shared') if key not in self.target.constants]
        self.shared = nn.ParameterDict({_slashed(key): torch.zeros(self.target.shapes[key]) for key in shared})
        self.constants = nn.Module()
        for key, dtype in self.target.constants.items():
            self.constants.register_buffer(_slashed(key), torch.zeros(self.target.shapes[key], dtype=dtype))
        self.norm_statistics = nn.Module()  # of BatchNorms, over all training groups: the prior of calibration
        for key in self.target.keys('calibrated'):
            dtype = torch.long if key.endswith('num_batches_tracked') else torch.float32
            self.norm_statistics.register_buffer(
                _slashed(key), torch.full(self.target.shapes[key], float(key.endswith('var'))).to(dtype)
            )
        # Where each of these is held, whatever is loaded or moved later.
        self._places: list[tuple[str, dict[str, Any], str]] = []
        self._places += [(key, self.shared._parameters, _slashed(key)) for key in shared]
        self._places += [(key, self.constants._buffers, _slashed(key)) for key in self.target.constants]
        self._places += [(key, self.norm_statistics._buffers, _slashed(key)) for key in self.target.keys('calibrated')]

    @classmethod
    @own_defaults()
    def for_target(
        cls, model_name: str, *, generator: str = 'auto', pretrained: bool | str = False, **config: Any
    ) -> PudNet:
        """A new, untrained hypernetwork for a timm architecture.

        Args:
            model_name: timm architecture; with a tag (`resnet50.a1_in1k`) where `pretrained` is true.
            generator: Kind of weight generator. `auto`: `paper` where the hypernetwork then has at most 15 million
                parameters (30 MB in half precision), `residual` otherwise, with a warning that says so.
            pretrained: Start from timm's pretrained weights, or from those in a folder in timm's format: what it
                predicts, for any images, is that network until it is trained. Otherwise the shared parameters start as
                timm starts them.
            config: Further fields of `PudNetConfig`. Without `input`, the architecture's own input size, mean and std.
                An architecture that is made for one size (`fixed_input_size`, as timm calls it) is made for that of
                `input`, by timm's `img_size` among `model_kwargs`; where that alone is given, it is the input's.
                With generator `residual`, and neither `sketch_width` nor `sketch_channels` nor a `rank`, sketches are
                as wide (128, 64, 32, 16, 8) and changes of as high a rank, those of norms too, as lets the hypernetwork
                be at most 1.1 times the target, or nearly so. (A recipe has sketches of 128 where it names no other
                width.)

        Raises:
            InputError: timm does not know the target, or a field is out of range.
            NotFoundError: The pretrained weights cannot be had.
            UnsupportedTargetError: The target has a tensor that nothing can fill.

        Example:
            >>> PudNet.for_target('test_resnet', sketch_width=16).config.generator
            'paper'
        """
        name, _, tag = str(model_name).partition('.')
        wanted = PudNetConfig(model_name=name if pretrained else model_name, **config)
        if 'input' in config:
            wanted = of_one_size(wanted)
        spec = target_of(wanted)  # clear errors first
        if pretrained:
            model = start_model(model_name if pretrained is True else folder_path(pretrained), wanted)
        else:
            model = create_feature_model(spec)
        if 'input' not in config:
            own = input_of(model)
            size = (own.input_size[0], *(img_size_of(wanted) or own.input_size[1:]))
            config['input'] = dataclasses.replace(own, input_size=size)
        if tag and pretrained is True:
            config.setdefault('tag', tag)
        wanted = of_one_size(PudNetConfig(model_name=wanted.model_name, **config))
        hypernet = cls(_chosen(wanted, generator, config))
        start = model.state_dict()
        if pretrained:
            hypernet.start_from(start)
            return hypernet
        with torch.no_grad():
            for key, room, place in hypernet._places:
                if room is not hypernet.norm_statistics._buffers:
                    room[place].copy_(start[key])
            for layer, weights in zip(hypernet.target.layers, hypernet.generators, strict=True):
                if len(layer.kernel) == 1 or not start[layer.key].any():  # kernels that timm starts at zero start there
                    weights.start_from(start[layer.key])  # type: ignore[operator]
        return hypernet

    @torch.no_grad()
    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Makes these the weights that the hypernetwork predicts until its sketch has learned to change them.

        Args:
            weights: Every key of the target's state dict but the classifier's.

        Raises:
            InputError: Its generators cannot take them, or a key is not there or of another shape.
        """
        wanted = self.target.kept
        if wrong := difference({key: weights[key] for key in wanted if key in weights}, wanted):
            raise InputError(f'{self.config.model_name}: cannot start from these weights: {wrong}')
        for layer, generator in zip(self.target.layers, self.generators, strict=True):
            if not hasattr(generator, 'start_from'):
                raise InputError(f'generator {self.config.generator!r} cannot start from given weights: use residual')
            generator.start_from(weights[layer.key])  # type: ignore[operator]
        for key, room, place in self._places:
            room[place].copy_(weights[key])

    @own_defaults()
    def sketch(self, images: Any, labels: Any = None, *, balance: Balance | None = None, **kwargs: Any) -> Tensor:
        """The sketch `[m]` of an image set (eq. 3), read once, in memory that does not grow with it.

        Args:
            images: Anything that `predict_model` takes.
            labels: Class of every image; else those of the data.
            balance: `none`, `class` or `kmeans`; by default `class` where there are labels, else `none`.
            kwargs: Arguments of `open_images`.

        Raises:
            InputError: The images cannot be read.
        """
        source = open_images(images, labels, input=self.config.input, **kwargs)
        balance = balance or ('class' if source.labelled else 'none')
        stream = self.streaming_sketch(balance)
        for batch, batch_labels in source.batches():
            stream.add(batch.to(self.device), batch_labels)
        return stream.result()

    def streaming_sketch(self, balance: Balance = 'none') -> StreamingSketch:
        """An empty sketch that image batches can be added to."""
        return StreamingSketch(self.encoder, balance)

    def forward(self, sketch: Tensor, num_images: float | None = None) -> dict[str, Tensor]:
        """Every tensor of the target's state dict but the classifier's.

        Args:
            sketch: `[m]`; shortened to the config's `sketch_limit` where it is longer.
            num_images: That the sketch is of. With a `sketch_gate` it changes nothing (`base`) where it shows no more
                than chance would with so many; without this number the gate is not asked.

        Returns:
            Predicted kernels, shared parameters and, to start calibration from, the norm statistics of training.
        """
        if self.gate is not None and num_images is not None and not self.gate.opens(sketch, num_images):
            return self.base()
        return self._generated(self.codes(sketch))

    def base(self) -> dict[str, Tensor]:
        """The network that the sketch changes: what `forward` gives where the code of every layer is zero."""
        return self._generated(self.temperature.new_zeros(len(self.target.layers), self.config.sketch_width))

    def _generated(self, codes: Tensor) -> dict[str, Tensor]:
        parts = zip(self.target.layers, self.generators, codes, strict=True)
        with _no_autocast(codes.device):
            state = {layer.key: generator(code) for layer, generator, code in parts}
        state.update({key: room[place] for key, room, place in self._places})
        state.update({key: state[first] for key, first in self.target.tied.items() if first in state})
        return state

    def codes(self, sketch: Tensor, num_layers: int | None = None) -> Tensor:
        """Codes `[L, m]` of all predicted layers or of the first ones, for a sketch `[m]`; `[b, L, m]` for `[b, m]`."""
        limit, count = self.config.sketch_limit, num_layers or len(self.target.layers)
        sketch = sketch.to(self.temperature.dtype)  # of an encoder in mixed precision
        if limit:
            sketch = sketch * (limit / sketch.norm(dim=-1, keepdim=True).clamp_min(limit))
        if self.ahru is None:
            return sketch.unsqueeze(-2).expand(*sketch.shape[:-1], count, -1)
        with _no_autocast(sketch.device):
            return self.ahru(sketch, count)

    def captured(self) -> Callable[[Tensor], dict[str, Tensor]]:
        """Weight generation as a CUDA graph, for many sketches: launching its small steps one by one takes far longer.

        Returns:
            What gives `forward`'s tensors for a sketch `[m]`, without gradients. They are the same tensors every time:
            the next call overwrites them. It keeps the weights that the hypernetwork has on the GPU now.

        Raises:
            InputError: The hypernetwork is not on a GPU.
        """
        if self.device.type != 'cuda':
            raise InputError(f'a CUDA graph needs a GPU, {self.name} is on {self.device}: call it as it is')
        return _Captured(self)

    def statistics(self, key: str) -> Tensor:
        """The buffer that holds a norm statistic of the target, over all groups seen in training."""
        return self.norm_statistics.get_buffer(_slashed(key))

    @torch.no_grad()
    def take_statistics(self, target: nn.Module) -> None:
        """Takes over the norm statistics that a model of the target has gathered in training."""
        buffers = dict(target.named_buffers())
        for key in self.target.keys('calibrated'):
            self.statistics(key).copy_(buffers[key])

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.temperature.device

    @property
    def name(self) -> str:
        """`architecture.tag`, as timm writes it."""
        return '.'.join(filter(None, (self.config.model_name, self.config.tag)))

    def push_to_hub(
        self,
        repo: str,
        folder: str | os.PathLike[str],
        *,
        license: str | None = None,
        private: bool = False,
        dry_run: bool = False,
    ) -> Pushed:
        """Publishes this hypernetwork on the Hub as `org/name`, as `timm-pudnet push` does.

        Args:
            repo: `org/name`; made where there is none.
            folder: Where it was saved; with its recipe, and results that were measured on these weights.
            license: Of the card, where the folder has no `README.md` that says one.
            private: Whether a repository that is made is private.
            dry_run: Only tell what would change.

        Raises:
            InputError: The folder holds another config or other weights (to the precision of float16), or is not
                complete.
            HubError: The Hub cannot be asked, or refuses.
        """
        from timm_pudnet.hub import push

        loaded = PudNet.from_pretrained(folder)
        configs = [{**net.config.to_dict(), 'library_versions': {}} for net in (loaded, self)]
        saved, ours = loaded.state_dict(), self.state_dict()
        if configs[0] != configs[1] or any(
            not torch.equal(*(one if key.startswith(_EXACT) else one.half() for one in (value, ours[key].cpu())))
            for key, value in saved.items()
        ):
            raise InputError(
                f'{folder} holds another config or other weights than {self.name} has here: save and measure it there '
                'first'
            )
        return push(folder, repo, license=license, private=private, dry_run=dry_run)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        half: bool = False,
        overwrite: bool = False,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> Path:
        """Writes `config.json` and `model.safetensors`, whole or not at all (what it overwrites, file by file).

        Args:
            folder: Made if it is not there; other files in it are left alone.
            half: Store floating-point tensors as float16 (all but norm statistics, whitening and gate).
            overwrite: Replace the files where they exist.
            max_shard_bytes: Above this size the weights become several files and an index.

        Raises:
            OutputExistsError: One of the files exists and `overwrite` is false.
        """
        folder = folder_path(folder, 'PudNet.push_to_hub publishes a hypernetwork there')
        if not overwrite:
            for name in (CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME):
                if (folder / name).exists():
                    raise OutputExistsError(f'{folder / name} exists: choose another folder or pass overwrite=True')
        state = {}
        most = torch.finfo(torch.float16).max
        for key, value in self.state_dict().items():
            narrow = half and value.is_floating_point() and not key.startswith(_EXACT)
            narrow = narrow and not (value.abs() > most).any()  # which would be infinite
            wide = torch.float32 if value.dtype == torch.float64 else value.dtype  # as which it is loaded
            state[key] = value.detach().cpu().to(torch.float16 if narrow else wide).contiguous()
        whitening = state['whitening']
        if len(whitening) <= MOST_UNSAVED and torch.equal(whitening, torch.zeros_like(whitening).fill_diagonal_(1)):
            del state['whitening']  # it may be larger than all the rest
        shards = _shards(state, max_shard_bytes)
        config = dataclasses.replace(self.config, library_versions=library_versions())
        texts = {CONFIG_NAME: config.to_dict()}
        if len(shards) > 1:
            size = sum(value.nbytes for value in state.values())
            weight_map = {key: name for name, keys in shards.items() for key in keys}
            texts[INDEX_NAME] = {'metadata': {'total_size': size}, 'weight_map': weight_map}
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with ExitStack() as stack:  # no file takes its place before all are written
                for name, keys in shards.items():
                    beside = stack.enter_context(written_whole(folder / name))
                    save_tensors({key: state[key] for key in keys}, beside, {'format': 'pt'})
                for name, content in texts.items():
                    beside = stack.enter_context(written_whole(folder / name))
                    beside.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
        except BaseException:
            if made:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        for path in folder.glob('model*.safetensors*') if overwrite else ():  # of another number of shards
            old = path.name in (WEIGHTS_NAME, INDEX_NAME) or SHARD.fullmatch(path.name)
            if old and path.name not in shards and path.name not in texts:
                path.unlink()
        return folder

    @classmethod
    @own_defaults()
    def from_pretrained(cls, name: str | os.PathLike[str]) -> PudNet:
        """Reads what `save_pretrained` wrote; ready to predict (eval mode, float32).

        Whoever wrote the files, nothing of them is run, and no memory beyond their size is taken before they are found
        to be what the config says.

        Args:
            name: A folder, or a repository on the Hugging Face Hub: `org/name`, `org/name@revision`. With timm's
                prefixes `local-dir:` and `hf-hub:` it is never taken for the other.

        Raises:
            NotFoundError: The folder, the repository or one of its files is not there. (By name alone `load_hypernet`
                finds those that ship with the package.)
            DamagedFileError: A file is truncated, or a tensor is missing, extra, mis-shaped or not finite.
            HubError: The Hub cannot be asked, or refuses.
        """
        folder = remote.local_folder(name)
        stored = read_weights(folder)
        config = read_config(folder / CONFIG_NAME)
        with _described_by(folder, sum(len(file.entries) for file in stored)), torch.device('meta'):
            hypernet = cls(config)
        expected, features = hypernet.state_dict(), len(hypernet.whitening)
        whitened = any('whitening' in file.entries for file in stored)
        if not whitened and features <= MOST_UNSAVED:
            del expected['whitening']
        state = as_tensors(stored, expected)
        hypernet.load_state_dict(state if whitened else {**state, 'whitening': torch.eye(features)}, assign=True)
        hypernet.folder = folder
        return hypernet.requires_grad_(True).eval()


class _Captured:
    """Weight generation of a hypernetwork on a GPU as a CUDA graph."""

    def __init__(self, hypernet: PudNet) -> None:
        here = hypernet.device
        # The graph reads this memory, whatever becomes of the hypernetwork.
        self._held = [value.detach() for value in (*hypernet.parameters(), *hypernet.buffers())]
        with torch.inference_mode(False), torch.no_grad():
            self._sketch = torch.zeros(hypernet.config.sketch_width, device=here)
            stream = torch.cuda.Stream(here)
            stream.wait_stream(torch.cuda.current_stream(here))
            with torch.cuda.stream(stream):  # once before, so that nothing is set up while it is captured
                hypernet(self._sketch)
            torch.cuda.current_stream(here).wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream):
                weights = hypernet(self._sketch)
            self._weights = {key: value.detach() for key, value in weights.items()}

    @torch.no_grad()
    def __call__(self, sketch: Tensor) -> dict[str, Tensor]:
        if sketch.shape != self._sketch.shape:
            raise InputError(f'a sketch of shape {tuple(sketch.shape)}: it must be {tuple(self._sketch.shape)}')
        self._sketch.copy_(sketch)
        self._graph.replay()
        return dict(self._weights)


@contextmanager
def _described_by(folder: Path, tensors: int) -> Iterator[None]:
    """Whatever a stranger's config makes timm or torch raise in the block is an error of that file."""
    try:
        with _at_most_modules(1000 + 10 * tensors):  # target and hypernetwork have about as many as the files tensors
            yield
    except Exception as error:
        raise DamagedFileError(f'{folder / CONFIG_NAME}: {shown(first_line(error), 300)}') from error


@contextmanager
def _at_most_modules(most: int) -> Iterator[None]:
    """In the block, building a network stops at so many modules, long before they fill the memory."""
    count, mine = 0, threading.get_ident()

    def add(*_: Any) -> None:
        nonlocal count
        count += threading.get_ident() == mine
        if count > most:
            raise InputError(f'asks for a network of over {most:,} modules, far more than the weights have; refused')

    with nn.modules.module.register_module_module_registration_hook(add):
        yield


def _shards(state: Mapping[str, Tensor], most: int) -> dict[str, list[str]]:
    """Keys of each weights file, by its name; one file unless it would have more than `most` bytes."""
    groups: list[list[str]] = []
    room = 0
    for key, value in state.items():
        if not groups or value.nbytes > room:
            groups.append([])
            room = most
        groups[-1].append(key)
        room -= value.nbytes
    if len(groups) == 1:
        return {WEIGHTS_NAME: groups[0]}
    return {f'model-{number:05}-of-{len(groups):05}.safetensors': keys for number, keys in enumerate(groups, 1)}


def target_of(config: PudNetConfig, **model_kwargs: Any) -> TargetSpec:
    """The target that a config describes, perhaps with further arguments of timm; errors as `describe_target`."""
    ours = {name: getattr(config, name) for name in ('predict_norm', 'predict_linear', 'min_predicted')}
    given = {**config.model_kwargs, **model_kwargs}
    for name in ('model_name', *ours):
        if name in given:
            raise InputError(f"{name} is no argument of timm's, but one of the hypernetwork: leave it out here")
    return describe_target(config.model_name, **ours, **given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a hypernetwork for a target would be; made by `plan_hypernet`. Numbers are of scalars.

    Args:
        config: Of the hypernetwork, its generator chosen.
        target: Where every tensor of the target would come from.
        parameters: Of the hypernetwork.
        steered: Predicted weights of the target that change with the sketch; the others (late, large layers of
            `residual`) are learned once.
    """

    config: PudNetConfig
    target: TargetSpec
    parameters: int
    steered: int

    @property
    def kernels(self) -> int:
        """Kernels `o * i` of all predicted layers."""
        return sum(math.prod(layer.kernel[:2]) for layer in self.target.layers if len(layer.kernel) > 1)

    @property
    def weights(self) -> int:
        """Weights of the target, all but the classifier's: predicted and shared."""
        return self.target.numel('predicted') + self.target.numel('shared')

    @property
    def file_bytes(self) -> int:
        """About the size of a classifier's file in half precision, with the whitening that a recipe may leave out."""
        return 2 * self.parameters + 4 * (self.target.num_features**2 + self.target.numel('calibrated'))

    @property
    def memory_bytes(self) -> int:
        """About what predicting takes beside images and activations: hypernetwork, its output, the model; float32."""
        return 4 * (self.parameters + 2 * self.weights)


def plan_hypernet(model_name: str, *, generator: str = 'auto', **config: Any) -> Plan:
    """Works out what a hypernetwork for a timm architecture would be, without making it.

    Arguments and errors as `PudNet.for_target`, but for `pretrained`.

    Example:
        >>> plan = plan_hypernet('resnet18')
        >>> plan.config.generator, plan.kernels, len(plan.target.layers)
        ('paper', 1392832, 20)
    """
    wanted = PudNetConfig(model_name=model_name, **config)
    if 'input' in config:
        wanted = of_one_size(wanted)
    spec = target_of(wanted)
    if 'input' not in config:  # of any size, where the target is made for any: only its channels matter here
        grey = (0.5,) * spec.in_chans
        height, width = img_size_of(wanted) or fixed_size(model_name) or (32, 32)
        input = InputConfig(input_size=(spec.in_chans, height, width), mean=grey, std=grey)
        wanted = dataclasses.replace(wanted, input=input)
    return _plan(_chosen(wanted, generator, config))


def plan_of(folder: Path) -> Plan:
    """What the hypernetwork in a folder is, by its config.

    Raises:
        NotFoundError: Its files are not there.
        DamagedFileError: It says something else than its weights.
    """
    config, tensors = read_config(folder / CONFIG_NAME), sum(len(read_header(path)[1]) for path in weight_files(folder))
    with _described_by(folder, tensors):
        return _plan(config)


def _plan(config: PudNetConfig) -> Plan:
    with torch.device('meta'):
        made = PudNet(config)
    parts = zip(made.target.layers, made.generators, strict=True)
    return Plan(
        config=config,
        target=made.target,
        parameters=sum(parameter.numel() for parameter in made.parameters()),
        steered=sum(layer.numel for layer, generator in parts if getattr(generator, 'steered', True)),
    )


def _chosen(config: PudNetConfig, generator: str, given: Mapping[str, Any]) -> PudNetConfig:
    """The config with its kind of generator, and with the width of sketches where it is not among the given fields."""
    if generator == 'auto':
        generator = 'paper'
        size = _plan(dataclasses.replace(config, generator=generator)).parameters
        if size > MOST_PARAMETERS:
            generator = 'residual'
            warnings.warn(
                f"{config.model_name}: generator='residual', since the paper's would make a hypernetwork of "
                f'{size / 1e6:.0f} million parameters',
                PudNetWarning,
                stacklevel=3,
            )
    config = dataclasses.replace(config, generator=generator)
    asked = 'rank' in config.generator_kwargs or not {'sketch_width', 'sketch_channels'}.isdisjoint(given)
    if generator != 'residual' or asked:
        return config
    for width, rank in RESIDUAL_SIZES:
        sized = dataclasses.replace(
            config,
            sketch_width=width,
            sketch_channels=(width // 8, width // 4),
            generator_kwargs={'rank': rank, **config.generator_kwargs},
            norm_rank=given.get('norm_rank', rank if config.predict_norm else 0),
        )
        plan = _plan(sized)
        if plan.parameters <= MOST_OF_TARGET * plan.weights:
            break
    return sized


# Arguments that change no weight's meaning: of the classifier, of training, or told by shapes.
_NO_OTHER_NETWORK = {'num_classes', 'global_pool', 'in_chans', 'img_size'}
_NO_OTHER_NETWORK |= {'drop_rate', 'drop_path_rate', 'drop_block_rate', 'proj_drop_rate', 'attn_drop_rate'}
_NO_OTHER_NETWORK |= {'pos_drop_rate', 'patch_drop_rate', 'zero_init_last', 'weight_init'}
_USUAL = {'output_stride': 32}


def start_model(source: str | Path, config: PudNetConfig) -> nn.Module:
    """The model that a hypernetwork of this config starts from; arguments and errors as `pretrained_model`.

    Raises:
        InputError: It is another network than the config's target.
    """
    model = pretrained_model(source, config.model_kwargs)
    if isinstance(source, Path):  # tensors alone do not tell: an activation has none
        told, asked = read_json(source / CONFIG_NAME), config.model_kwargs
        name, own = told['architecture'], told.get('model_args') or asked
        own, asked = ({**_USUAL, **arguments} for arguments in (own, asked))
        other = {key for key in {*own, *asked} - _NO_OTHER_NETWORK if own.get(key) != asked.get(key)}
        if name != config.model_name or other:
            its = {key: own.get(key) for key in sorted(other)}
            raise InputError(
                f'{source} holds {name} with the arguments {its}, not {config.model_name} with the model_kwargs '
                f'{config.model_kwargs}'
            )
    return model


def pretrained_model(source: str | Path, model_kwargs: Mapping[str, Any]) -> nn.Module:
    """Timm's model of that name with its pretrained weights, or the one in a folder, where it is a Path.

    Raises:
        NotFoundError: The weights cannot be had.
        InputError: The folder holds no such model.
    """
    folder = isinstance(source, Path)
    if folder and not source.is_dir():
        raise NotFoundError(f'{source}: no such folder of a timm model (`timm-pudnet predict --out` writes one)')
    if folder and not (source / WEIGHTS_NAME).is_file():  # timm would take a pickle then
        raise InputError(f'{source} holds no timm model that can be loaded: no {WEIGHTS_NAME}')
    try:
        told = json.loads((source / CONFIG_NAME).read_text(encoding='utf-8')) if folder else {}
        if 'format_version' in told and 'architecture' not in told:
            raise InputError(
                f'{source} is a hypernetwork, no timm model: give the architecture ({shown(told.get("model_name"))}), '
                'and this folder as hypernet (--hypernet)'
            )
        model = timm.create_model(f'local-dir:{source}' if folder else source, pretrained=True, **model_kwargs)
        keep_arguments(model, {**(told.get('model_args') or {}), **model_kwargs})
        return model
    except InputError:
        raise
    except Exception as error:  # whatever transports and formats raise
        if folder:
            raise InputError(f'{source} holds no timm model that can be loaded: {first_line(error)}') from error
        raise NotFoundError(f'the pretrained weights of {source} cannot be had: {first_line(error)}') from error


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Weights are as exact as the hypernetwork's, whatever mixed precision the images go through."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def _slashed(key: str) -> str:
    return key.replace('.', '/')
