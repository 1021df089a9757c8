"""Watching a run: its losses as a figure (the paper's figure 7) and as TensorBoard events.

Both packages behind this, matplotlib and tensorboard, are optional (extra `train`). Without one of
them its part does nothing but warn once: no run ends for want of a picture.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from timm_pudnet.config import InputError, PudNetWarning
from timm_pudnet.files import local_path, written_whole

NO_LOSS = ('step', 'rate', 'skipped')  # what an entry of the log holds beside the terms of the loss
SMOOTHED_SHARE = 0.02  # of the steps, over which the running mean goes


def plot_losses(log: Iterable[Mapping[str, float]], path: str | os.PathLike[str], title: str = '') -> Path | None:
    """Draws the terms of the loss by step into a PNG file: a running mean each, its raw values faint behind it.

    The file is written whole or not at all, and replaces an earlier one. The caller's matplotlib backend and its open
    figures stay as they are.

    Args:
        log: Entries `{'step': 3, 'rate': 0.01, 'metric': 1.2, ...}`: every name but `step`, `rate` and `skipped` is a
            term. A term may be missing from some entries.
        path: Where the figure goes, PNG whatever its suffix; its folder must be there.
        title: Stands above the figure.

    Returns:
        The path; None, after a warning, where matplotlib is not installed.

    Raises:
        InputError: No entry of the log holds a term.
    """
    path, entries = local_path(path), list(log)
    terms = dict.fromkeys(name for entry in entries for name in entry if name not in NO_LOSS)
    if not terms:
        raise InputError(f'{path}: the log of {len(entries)} steps holds no loss to draw')
    try:
        from matplotlib.figure import Figure
    except ImportError:
        warn_missing('matplotlib', f'{path} is not drawn')
        return None

    # A Figure of its own, not pyplot's: saving it as PNG uses Agg and leaves the global backend alone.
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.add_subplot()
    for number, name in enumerate(terms):
        steps = [entry['step'] for entry in entries if name in entry]
        values = np.array([entry[name] for entry in entries if name in entry], dtype=np.float64)
        color = f'C{number}'
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        marker = '.' if len(steps) == 1 else None  # a line of one point shows nothing
        axes.plot(steps, running_mean(values), color=color, linewidth=1.8, marker=marker, label=name)
    axes.set_xlabel('step')
    axes.set_ylabel('loss')
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    with written_whole(path) as beside:
        figure.savefig(beside, format='png', dpi=150)
    return path


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean of each value and its neighbours, one step in fifty of them; at the ends, of those that there are.

    Example:
        >>> running_mean(np.array([2.0, 4.0, 9.0])).tolist()  # too short to smooth
        [2.0, 4.0, 9.0]
    """
    window = np.ones(max(1, round(SMOOTHED_SHARE * len(values))))
    return np.convolve(values, window, 'same') / np.convolve(np.ones_like(values), window, 'same')


class Board:
    """Writes numbers for TensorBoard; without the package `tensorboard` it warns once and writes nothing.

    Args:
        folder: Where the event files go; made if it is not there. A resumed run gives the same one.
        step: Steps that the run has done already. What an earlier, interrupted run wrote for later steps is hidden.
    """

    def __init__(self, folder: str | os.PathLike[str], step: int = 0) -> None:
        self._writer = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            warn_missing('tensorboard', f'nothing is written to {folder}')
            return
        # TensorBoard hides what is at purge_step and after it; the event of `step` itself belongs to the state resumed.
        self._writer = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=10)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the values of a step, each under its name; a slash in a name makes a section."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is still in memory; what is added afterwards is ignored."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def warn_missing(package: str, consequence: str) -> None:
    """Warns the caller's caller that an optional package is not there, and what follows from that."""
    warnings.warn(
        f'{package} cannot be imported, so {consequence}: pip install {package}',
        PudNetWarning,
        stacklevel=3,
    )
