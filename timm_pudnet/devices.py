"""The machine that a computation is on: its devices, torch's defaults and random numbers, versions of libraries."""

from __future__ import annotations

import importlib.metadata
import platform
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch

from timm_pudnet.config import InputError, PudNetWarning, __version__, first_line


@contextmanager
def own_defaults() -> Iterator[None]:
    """Torch's defaults as they are at first, whatever the caller has set.

    That is float32, tensors on the CPU, no autocast, and gradients.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device() != torch.device('cpu'):
            stack.enter_context(torch.device('cpu'))
        for kind in ('cpu', 'cuda', 'mps'):
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_FLOAT32)
        yield


class _Float32:
    """Float32 as torch's default type, which all threads share: until the last of them is out of here."""

    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, torch.float32

    def __enter__(self) -> None:
        with self.lock:
            if torch.get_default_dtype() != torch.float32:
                self.before = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside and self.before != torch.float32:
                torch.set_default_dtype(self.before)
                self.before = torch.float32


_FLOAT32 = _Float32()


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device of that name, or CUDA where there is one, tried out.

    Raises:
        InputError: There is no such device here, or it holds no values.

    Warns:
        PudNetWarning: No device was named, and the CUDA that is here cannot be used: the CPU is taken.
    """
    try:
        found = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        if not device:
            warnings.warn(
                f'CUDA is here, but cannot be used ({first_line(error)}): going on with the CPU',
                PudNetWarning,
                stacklevel=2,
            )
            return torch.device('cpu')
        raise InputError(f'device {str(device)!r} cannot be used here: use cpu, or cuda where there is one') from error
    return found


def forked_rng(device: torch.device) -> AbstractContextManager[None]:
    """Random numbers drawn in here, after a `torch.manual_seed` too, leave those outside as they were.

    Torch's `fork_rng` by itself would wake CUDA for work on the CPU, and warn of every further GPU.
    """
    awake = device.type == 'cuda' or torch.cuda.is_initialized()
    return torch.random.fork_rng(list(range(torch.cuda.device_count())) if awake else [])


def copy_speed() -> float:
    """Bytes a second that this machine reads and writes in memory, measured in a fraction of a second."""
    source, target = torch.ones(2**23), torch.ones(2**23)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        source.sum()
        target.fill_(2.0)
        seconds.append(time.perf_counter() - started)
    return 2**26 / min(seconds)


def machine(device: torch.device) -> str:
    """What a result was measured on, in words."""
    return f'{platform.machine()}, {torch.get_num_threads()} threads, {device.type}'


def library_versions() -> dict[str, str]:
    """Versions of the libraries that shape a result."""
    others = ('torch', 'timm', 'torchvision', 'safetensors')
    return {'timm-pudnet': __version__, **{name: importlib.metadata.version(name) for name in others}}
