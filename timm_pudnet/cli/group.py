"""The group of commands, how it tells errors, and what the commands share: options, checks, words."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from timm_pudnet.config import MOST_SEED, InputConfig, InputError, PudNetError, __version__, shown
from timm_pudnet.files import local_path
from timm_pudnet.images import any_timm_name, check_root, takes_folder
from timm_pudnet.predict import check_output
from timm_pudnet.target import is_ours


class _Unheard:
    """Standard output that nobody may read to its end (`timm-pudnet predict ... | head`): work goes on all the same."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of any text stream."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            return self._leave() or len(text)

    def flush(self) -> None:
        """As of any text stream."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._leave()

    def _leave(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


class _Commands(click.Group):
    """Prints an error as one line and exits with code 2; keeps the command line for the report."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta['command'] = f'{ctx.info_name} {shlex.join(args)}'
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with contextlib.ExitStack() as stack:
            for name in ('stdout', 'stderr'):
                if getattr(sys, name) is None:  # closed, `>&-`
                    setattr(sys, name, stack.enter_context(open(os.devnull, 'w')))
                    stack.callback(setattr, sys, name, None)
            return self._invoke(ctx)

    def _invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):  # a name that they cannot encode is no reason to stop
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors='backslashreplace')
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(_Unheard(sys.stdout)):  # type: ignore[type-var]
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except BrokenPipeError:  # of another pipe; click ends quietly then
            raise
        except (PudNetError, OSError, FloatingPointError) as error:
            text = ' '.join(str(error).split())
            click.echo(f'Error: {text}', err=True)
            ctx.exit(2)
        except torch.OutOfMemoryError as error:
            remedy = 'make the groups of the recipe smaller, or ' if ctx.invoked_subcommand == 'train' else ''
            click.echo(f'Error: {str(error).partition(". ")[0]}: {remedy}use --device cpu', err=True)
            ctx.exit(2)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and 'DefaultCPUAllocator' not in str(error):
                raise
            click.echo('Error: not enough memory: give fewer or smaller images', err=True)
            ctx.exit(2)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f'Warning: {" ".join(str(message).split())}', err=True)


@click.group(cls=_Commands, context_settings={'help_option_names': ['-h', '--help']})
@click.version_option(__version__, prog_name='timm-pudnet')
def main() -> None:
    """Predict the weights of timm's convolutional networks for images that they have never seen."""


class _Folder(click.Path):
    """A path with its `~` in full: the shell leaves it where it stands behind a `=`.

    An empty text, which is a variable that the shell does not know, is not the current folder.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if value == '':
            raise InputError(f'{param.opts[-1] if param else "a path"} is empty: name a file or folder')
        return Path(os.path.expanduser(os.fspath(value)))


FOLDER = _Folder()
SEED = click.IntRange(0, MOST_SEED)
device_option = click.option('--device', help='cpu, cuda, mps, ...; by default CUDA where there is one.')
strict_option = click.option('--strict', is_flag=True, help='An unreadable image is an error, not a warning.')


def data_options(split: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds --data-dir and --split, with its default."""

    def add(command: Callable[..., None]) -> Callable[..., None]:
        command = click.option('--split', default=split, show_default=True, help='Split of a timm dataset.')(command)
        return click.option('--data-dir', help='Root of a timm dataset.')(command)

    return add


def check_split(*images: str | None) -> None:
    """Refuses a --split that was given where none of the images is a timm dataset."""
    if was_given('split') and not any_timm_name(*images):
        raise InputError(
            f'--split is that of a timm dataset, and {images[0]} is not the name of one: name the folder of the split, '
            'or use torch/image_folder with --data-dir for a folder of splits'
        )


def was_given(name: str) -> bool:
    """Whether the command line of the running command says this parameter."""
    return click.get_current_context().get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def check_outside(out: Path, **given: str | Path | None) -> None:
    """Refuses an output folder among the images, which would be a class of them, or images, the next time."""
    for name, folder in given.items():
        path = None if folder is None else local_path(folder)
        if path is not None and path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise InputError(f'--out {out} is {name} or lies in it ({folder}): choose a folder outside')


def check_paths(images: str, out: Path | None, data_dir: str | None, unlabelled: str | None = None) -> None:
    """Refuses, before any work, what a command cannot read from or write to, by its arguments of these names."""
    if out is not None:
        check_output(out)
        root = data_dir if takes_folder(images) or takes_folder(unlabelled) else None
        check_outside(out, **{'IMAGES': images, '--unlabelled': unlabelled, '--data-dir': root})
    check_root(data_dir, images, unlabelled, option='--data-dir')
    check_split(images, unlabelled)


def loading(out: Path) -> str:
    """The lines of Python that load a saved model."""
    ours = is_ours(json.loads((out / 'config.json').read_text(encoding='utf-8'))['architecture'])
    imports = 'import timm\n    import timm_pudnet' if ours else 'import timm'
    return (
        f'Next, in Python{"" if ours else ", without this package if you like"}:\n\n    {imports}\n'
        f'    model = timm.create_model({f"local-dir:{out}"!r}, pretrained=True).eval()'
    )


def size_of(config: InputConfig) -> str:
    """An input's channels, height and width."""
    return 'x'.join(map(str, config.input_size))


def some(names: Sequence[str]) -> str:
    """The first of these names, and how many there are."""
    first = ', '.join(shown(name) for name in names[:8])
    return first if len(names) <= 8 else f'{first}, ... ({len(names)} in all)'
