"""One process or several, started by `accelerate launch` or `torchrun`: who does what, and sums over all of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from timm_pudnet.config import InputError, PudNetError, first_line


class Processes:
    """This process among those that train together; alone, it needs no further library.

    Args:
        device: What the caller asked for; with several processes each takes its own GPU, or the CPU if that is asked
            for or there is no GPU.

    Raises:
        InputError: Several processes were started, but accelerate is not installed.
    """

    def __init__(self, device: str | torch.device | None = None) -> None:
        self.rank, self.count, self.device = 0, 1, None
        if int(os.environ.get('WORLD_SIZE', '1')) == 1:
            return
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise InputError('several processes need accelerate: pip install accelerate') from error
        on_cpu = not torch.cuda.is_available() or (device is not None and torch.device(device).type == 'cpu')
        state = PartialState(cpu=on_cpu)
        self.rank, self.count, self.device = state.process_index, state.num_processes, state.device

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Puts the sum over all processes in place of each tensor; all have the same tensors in the same order.

        Raises:
            PudNetError: Another process is gone.
        """
        if self.count == 1:
            return
        from accelerate.utils import reduce

        by_type: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_type.setdefault(tensor.dtype, []).append(tensor)
        with torch.no_grad():
            for ours in by_type.values():
                flat = torch.cat([tensor.flatten() for tensor in ours])
                with _together():
                    total = cast(Tensor, reduce(flat, reduction='sum'))
                for tensor, part in zip(ours, total.split([t.numel() for t in ours]), strict=True):
                    tensor.copy_(part.view_as(tensor))

    def any_(self, flag: bool) -> bool:
        """Whether it is true in one of the processes; the same answer in all."""
        found = torch.tensor(float(flag), device=self.device)
        self.sum_([found])
        return bool(found)

    def wait(self) -> None:
        """Returns when all processes are here.

        Raises:
            PudNetError: Another process is gone.
        """
        if self.count > 1:
            from accelerate import PartialState

            with _together():
                PartialState().wait_for_everyone()


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """What goes wrong between processes as one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PudNetError(
            f'another process of this training is gone ({first_line(error)}): its own message says why; '
            'started again, the training goes on from its last checkpoint'
        ) from error
