"""The loop of a training: steps, checkpoints that a run resumes from, log, plot; over one or several processes.

A checkpoint is one safetensors file that holds the whole state of the run, so that a resumed run goes on as if it had
never stopped. It is written beside its place and renamed, so it is whole or absent.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import signal
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from timm_pudnet.config import DamagedFileError, InputError, PudNetConfig, PudNetWarning
from timm_pudnet.devices import forked_rng, machine, usable_device
from timm_pudnet.files import local_path, save_tensors, written_whole
from timm_pudnet.hypernet import target_of
from timm_pudnet.target import channels_last, create_feature_model
from timm_pudnet.training.processes import Processes
from timm_pudnet.training.recipe import Recipe
from timm_pudnet.training.watch import Board, plot_losses

CHECKPOINT_NAME = 'checkpoint.safetensors'
LOG_NAME = 'log.jsonl'
PLOT_NAME = 'losses.png'
MOST_SKIPPED = 10  # steps in a row
MOST_SLOWDOWN = 1.5  # bfloat16 is used even if it is so many times slower than float32: it saves memory


def go(
    run: Run,
    folder: str | os.PathLike[str] | None,
    checkpoint_seconds: float,
    max_steps: int | None,
    progress: bool,
) -> None:
    """Trains a run to its end, or to `max_steps`; from the checkpoint in `folder` on, where there is one."""
    checkpoint = local_path(folder) / CHECKPOINT_NAME if folder is not None else None
    last = run.num_steps if max_steps is None else min(run.num_steps, max_steps)
    if checkpoint is not None:
        if checkpoint.exists():
            run.load(checkpoint)
        _check_together(run, checkpoint)
        if run.step < last:
            run.check_room(checkpoint)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
    main = run.processes.rank == 0
    if run.unfit and run.step < last and main:  # not before: a checkpoint has a say in it
        warnings.warn(f'{run.unfit}: training in float32', PudNetWarning, stacklevel=2)
    with _held(checkpoint.parent if checkpoint is not None and main else None) as free:
        if run.processes.any_(not free):
            raise InputError(f'{folder}: another training is at work there: wait for it, or choose another folder')
        _go(run, checkpoint, last, checkpoint_seconds, progress)


def _check_together(run: Run, checkpoint: Path) -> None:
    """Refuses to go on where not every process has read the same checkpoint: on several machines it must be shared."""
    steps = torch.tensor(float(run.step), device=run.processes.device)
    run.processes.sum_([steps])
    if run.processes.any_(float(steps) != run.step * run.processes.count):
        raise InputError(f'{checkpoint}: not every process finds the same one: use a folder that all machines share')


def _go(run: Run, checkpoint: Path | None, last: int, checkpoint_seconds: float, progress: bool) -> None:
    """Trains a run up to step `last`."""
    main = run.processes.rank == 0
    if checkpoint is not None and main:
        # What a run killed while it wrote has left: our own files beside, and those of safetensors.
        for pattern in (f'.{CHECKPOINT_NAME}.*', f'.{LOG_NAME}.*', f'.{PLOT_NAME}.*', '.tmp??????'):
            for left in checkpoint.parent.glob(pattern):
                left.unlink(missing_ok=True)
    if run.step == 0:
        started = time.monotonic()
        run.prepare(progress and main)
        run.seconds += time.monotonic() - started
    each = run.recipe.images_per_step
    board = (
        Board(checkpoint.parent / 'board', run.step) if checkpoint is not None and main and run.step < last else None
    )
    saved = time.monotonic()
    bar = tqdm(
        total=last * each, initial=run.step * each, disable=not (progress and main), unit='image', unit_scale=True
    )
    with bar, contextlib.ExitStack() as stack, _interrupts(run.processes.count == 1) as stop:
        if board is not None:
            stack.callback(board.close)
        for losses in run.steps(last):
            bar.update(each)
            bar.set_postfix({name: f'{value:.3f}' for name, value in losses.items()}, refresh=False)
            if board is not None:
                board.add(run.step, {f'loss/{name}': value for name, value in losses.items()})
            due = run.step == last or stop.is_set() or time.monotonic() - saved > checkpoint_seconds
            if checkpoint is not None and due and main:
                run.save(checkpoint)
            if due:
                saved = time.monotonic()
            if stop.is_set():
                raise KeyboardInterrupt
    done = run.step == run.num_steps
    if done and not run.learned:
        raise FloatingPointError(
            'every step was skipped, for no loss and gradient was finite: lower the rate of the recipe, and choose '
            'another folder'
        )
    if checkpoint is not None and main and done:
        plot_losses(run.log, checkpoint.with_name(PLOT_NAME), title=run.recipe.hypernet.model_name)
    run.processes.wait()


@contextlib.contextmanager
def _interrupts(alone: bool) -> Iterator[threading.Event]:
    """Has a first Ctrl-C wait for the end of the step and its checkpoint; a second one stops at once.

    Gives what the first one sets. Not in several processes, which would not agree on the step, nor where somebody else
    handles Ctrl-C.
    """
    stop, usual = threading.Event(), signal.default_int_handler
    ours = alone and threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not usual:
        yield stop
        return

    def ask(*_: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, usual)


@contextlib.contextmanager
def _held(folder: Path | None) -> Iterator[bool]:
    """Keeps a folder for this process, and says whether it could; it is free again however the process ends."""
    if folder is None or fcntl is None:
        yield True
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system that knows no locks
            pass
        yield True
    finally:
        os.close(held)


def rate_at(step: int, num_steps: int, recipe: Recipe) -> float:
    """Share of the largest rate: a linear warm-up, then a cosine down to zero."""
    warm = max(1, round(recipe.schedule.warmup * num_steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, num_steps - warm)))


@functools.cache
def bfloat16_slowdown(device: torch.device) -> float:
    """How many times as long as in float32 a conv takes in bfloat16, forward and backward.

    Below one where the device computes in bfloat16; about ten on a processor that does not (those without AVX-512, for
    instance), which converts every number. Measured on processors, in a part of a second; of a GPU it is known.
    """
    if device.type == 'cuda':
        with torch.cuda.device(device):
            return 1.0 if torch.cuda.is_bf16_supported(including_emulation=False) else math.inf
    if device.type != 'cpu':
        return 1.0
    with torch.random.fork_rng(devices=[]):
        conv = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = torch.randn(8, 64, 14, 14).contiguous(memory_format=torch.channels_last)
    least = {}
    for half in (False, True):
        seconds = []
        for _ in range(4):  # the first prepares
            started = time.perf_counter()
            with torch.autocast('cpu', torch.bfloat16, enabled=half):
                output = conv(images)
            output.float().sum().backward()
            seconds.append(time.perf_counter() - started)
        least[half] = min(seconds)
    return least[True] / least[False]


def strided_on_one_pixel(config: PudNetConfig) -> str:
    """The first strided conv of the target that sees maps of one pixel, by its name; none where the text is empty.

    Of such a conv of several taps oneDNN's gradient in bfloat16 is whatever lay in memory (seen with torch 2.14).
    """
    found: list[str] = []

    def look(name: str, _: nn.Module, args: tuple[Tensor]) -> None:
        if args[0].shape[2:] == (1, 1):
            found.append(name)

    with forked_rng(torch.device('cpu')), torch.no_grad():
        model = create_feature_model(target_of(config)).eval()
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d) and max(module.stride) > 1 and max(module.kernel_size) > 1:
                module.register_forward_pre_hook(functools.partial(look, name))
        model(torch.zeros(1, *config.input.input_size))
    return next(iter(found), '')


class Run:
    """The whole state of a training run: modules, optimisers, step, log."""

    modules: dict[str, nn.Module]  # what is saved; of a hypernetwork's `target` only the norm statistics change

    def __init__(self, recipe: Recipe, device: str | torch.device | None) -> None:
        self.recipe, self.step, self.seconds, self.skipped = recipe, 0, 0.0, 0
        self.processes = Processes(device)
        self.device = self.processes.device or usable_device(device)
        self.unfit = self._unfit(MOST_SLOWDOWN)
        self.precision = 'float32' if self.unfit else recipe.schedule.precision
        self.num_steps = -(-recipe.schedule.images // recipe.images_per_step)
        self.log: list[dict[str, float]] = []
        if self.parts < self.processes.count:
            raise InputError(
                f'{self.processes.count} processes, but per_step is {self.parts}: raise it to their number or more'
            )
        config = recipe.hypernet
        spec = target_of(config)  # clear errors before any work
        with forked_rng(self.device):
            torch.manual_seed(recipe.seed)
            self.target = create_feature_model(spec)
            self.modules = {name: module.to(device=self.device).train() for name, module in self.build().items()}
            channels_last(self.target)
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
        # The mean of all steps at first, so that no average is of the first weights, however short a training.
        ema, modules = recipe.schedule.ema, nn.ModuleDict(self.modules)
        self.average = ModelEmaV3(modules, ema, use_warmup=True, warmup_power=1.0) if ema else None

    def _unfit(self, most: float) -> str:
        """Why the bfloat16 of the recipe is not used: it is wrong, or more than `most` times as slow; else empty."""
        if self.recipe.schedule.precision == 'float32':
            return ''
        slowdown = bfloat16_slowdown(self.device)
        if self.processes.any_(slowdown > most):  # all do as the slowest
            times = f' (a conv takes {slowdown:.1f} times as long as in float32)' if math.isfinite(slowdown) else ''
            return f'this {self.device.type} does not compute in bfloat16{times}'
        if self.device.type == 'cpu' and (name := strided_on_one_pixel(self.recipe.hypernet)):
            return f"torch's bfloat16 gradient of {name} is wrong, a strided conv on maps of one pixel"
        return ''

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
        """Whether an ordinary training of the target would train this parameter, where it is trained at all."""
        return name.startswith(('target.', 'head.', 'hypernet.shared.')) or name.endswith('.base')

    def build(self) -> dict[str, nn.Module]:
        """The modules of the run by name."""
        raise NotImplementedError

    def source(self) -> Iterator[Tensor | bytes]:
        """What the run learns from and starts from, for its checkpoints to tell from others."""
        raise NotImplementedError

    @functools.cached_property
    def origin(self) -> str:
        """A fingerprint of `source`."""
        found = 0
        for part in self.source():
            found = zlib.crc32(part if isinstance(part, bytes) else part.cpu().contiguous().numpy().data, found)
        return f'{found:08x}'

    def prepare(self, progress: bool) -> None:
        """What comes before the first step; a run that goes on from a checkpoint has it behind it."""

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
            loss, sums = self._gradients(before)
            # By the norm of each optimiser: large gradients of what the sketch steers would else slow down the rest.
            held = [[value for group in one.param_groups for value in group['params']] for one in self.optimizers]
            norm = math.hypot(*(float(nn.utils.clip_grad_norm_(values, schedule.clip)) for values in held))
            entry = {'step': self.step + 1, 'rate': rate * schedule.rate, **sums}
            if math.isfinite(norm) and math.isfinite(loss):  # a term of weight 0 is watched alone
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

    def _gradients(self, before: list[Tensor]) -> tuple[float, dict[str, float]]:
        """Gradients of one step; its mean loss, and the mean terms of that.

        Every part starts from the norm statistics `before` the step, and the mean of what they become is kept: so it
        does not matter in which order the parts run, or in which process.
        """
        wide = torch.float32 if self.device.type == 'mps' else torch.float64  # which Apple's GPUs do not have
        totals = [torch.zeros_like(buffer, dtype=wide) for buffer in self.statistics]
        values: dict[str, Tensor] = {}
        mean = torch.zeros((), device=self.device)
        for part in range(self.processes.rank, self.parts, self.processes.count):
            number = self.step * self.parts + part
            for buffer, start in zip(self.statistics, before, strict=True):
                buffer.copy_(start)
            with forked_rng(self.device):
                # Dropout and drop path in the target draw from torch itself.
                torch.manual_seed(zlib.crc32(f'{self.recipe.seed} target {number}'.encode()))
                loss, terms = self.losses(number)
                (loss / self.parts).backward()
            mean += loss.detach() / self.parts
            for total, buffer in zip(totals, self.statistics, strict=True):
                total.add_(buffer)
            for name, value in terms.items():
                values[name] = values.get(name, 0.0) + value.detach() / self.parts
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.processes.sum_([*gradients, *totals, mean, *values.values()])
        with torch.no_grad():
            for total, buffer in zip(totals, self.statistics, strict=True):
                buffer.copy_(total / self.parts)
        return float(mean), {name: float(value) for name, value in values.items()}

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

    def mixed_precision(self) -> torch.autocast:
        """The context of forward passes, by the run's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == 'bfloat16')

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

    def check_room(self, path: Path) -> None:
        """Raises unless the disk has room for a checkpoint at this path: for two while one is written over another."""
        sizes = [value.nbytes for module in self.modules.values() for value in module.state_dict().values()]
        moments = [
            value.nbytes * (1 if isinstance(optimizer, torch.optim.SGD) else 2)
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for value in group['params']
        ]
        needed = sum(moments) + sum(sizes) * (1 if self.average is None else 2)
        needed *= 1 if path.exists() else 2
        here = next(folder for folder in path.absolute().parents if folder.is_dir())
        usage = shutil.disk_usage(here)
        lacking = usage.total > 0 and usage.free < needed  # some file systems tell nothing
        if self.processes.any_(self.processes.rank == 0 and lacking):  # that writes; all stop by it
            raise InputError(
                f'{path.parent}: its disk has {usage.free / 1e6:,.0f} MB free, the checkpoints of this training need '
                f'{needed / 1e6:,.0f} MB: make room, or choose another folder'
            )

    def save(self, path: Path) -> None:
        """Writes the checkpoint and the log beside it, each whole or not at all."""
        about = {
            'kind': type(self).__name__,
            'recipe': self.recipe.digest,
            'step': str(self.step),
            'seconds': str(self.seconds),
            'skipped': str(self.skipped),
            'precision': self.precision,
            'origin': self.origin,
        }
        tensors = {
            key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for key, value in self._tensors().items()
        }
        # Not among the metadata, of which safetensors takes 100 MB and no more.
        tensors['log'] = torch.frombuffer(bytearray(json.dumps(self.log).encode()), dtype=torch.uint8)
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
        if not {'origin', 'precision', 'step', 'seconds', 'skipped'} <= about.keys() or 'log' not in tensors:
            raise DamagedFileError(f'{path} is damaged: remove it to start anew')
        if about['origin'] != self.origin:
            raise InputError(
                f'{path} was trained on other images, or from another start, than are there now: choose another '
                'folder, or remove it to start anew'
            )
        home = {id(p): o for o in self.optimizers for group in o.param_groups for p in group['params']}
        for number, parameter in enumerate(self.parameters):
            state = _taken(tensors, f'optimizer.{number}.')
            # Copies in the memory format of the parameter, which fused steps want; of the count of steps too, for
            # Windows cannot replace a file that is still mapped into memory.
            for name, value in state.items():
                room = torch.empty_like(value, device=self.device) if name == 'step' else torch.empty_like(parameter)
                home[id(parameter)].state[parameter][name] = room.copy_(value)
        if self.average is not None:
            self.average.module.load_state_dict(_taken(tensors, 'average.'))
        for name, module in self.modules.items():
            module.load_state_dict(_taken(tensors, f'{name}.'))
        # As it was begun, on another machine perhaps; but for bfloat16 where that is out of the question.
        self.precision = about['precision']
        if self.precision == 'bfloat16':
            self.unfit = self._unfit(2 * MOST_SLOWDOWN)
            self.precision = 'float32' if self.unfit else 'bfloat16'
        self.step, self.seconds, self.skipped = int(about['step']), float(about['seconds']), int(about['skipped'])
        self.log = json.loads(tensors['log'].numpy().tobytes())

    @property
    def learned(self) -> list[int]:
        """The steps so far, from 0 on, that were not skipped."""
        skipped = {entry['step'] for entry in self.log if 'skipped' in entry}
        return [step for step in range(self.step) if step + 1 not in skipped]

    def cost(self) -> dict[str, Any]:
        """What the training cost, as the config of a hypernetwork states it."""
        return {
            'images': len(self.learned) * self.recipe.images_per_step,
            'seconds': round(self.seconds),
            'machine': f'{machine(self.device)}, {self.processes.count} '
            f'process{"es" if self.processes.count > 1 else ""}, {self.precision}',
            'recipe_digest': self.recipe.digest,
        }


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Removes the tensors of a prefix and gives them without it."""
    return {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
