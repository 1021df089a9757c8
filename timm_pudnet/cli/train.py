"""`timm-pudnet train`: a hypernetwork, or its control, by a recipe."""

from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from timm_pudnet import denoising, evaluation, training
from timm_pudnet.cli.group import FOLDER, check_outside, device_option, main, size_of, some
from timm_pudnet.config import InputError, OutputExistsError
from timm_pudnet.denoising.training import PatchBank
from timm_pudnet.devices import usable_device
from timm_pudnet.files import local_path, written_whole
from timm_pudnet.images import TRAIN_OR_TEST, check_root, is_timm_name, takes_folder, torch_name
from timm_pudnet.predict import save_model
from timm_pudnet.training import Recipe
from timm_pudnet.training.episodes import ImageBank


@main.command()
@click.argument('recipe', type=FOLDER)
@click.option('--out', type=FOLDER, help='Folder for the result and its checkpoints.')
@click.option('--short', is_flag=True, help='Only try for two minutes whether the recipe learns; writes nothing.')
@click.option('--plain', is_flag=True, help='Train the control instead: the target by itself, without a sketch.')
@device_option
@click.option('--data-dir', help="Root of a timm dataset, in place of the recipe's.")
def train(recipe: Path, out: Path | None, short: bool, plain: bool, device: str | None, data_dir: str | None) -> None:
    """Train a hypernetwork by a RECIPE file; goes on where an earlier run in --out stopped."""
    loaded = Recipe.load(recipe)
    text = recipe.read_bytes()  # now: the file may be another one when training is done
    if loaded.denoising is not None and (short or data_dir):
        option = '--short' if short else '--data-dir'
        raise InputError(f'{recipe}: {option} is not for recipes of denoisers: leave it out')
    check_root(data_dir, *(data.images for data in loaded.data), option='--data-dir')
    training.check_start(loaded)  # before any image is read
    several = int(os.environ.get('WORLD_SIZE', '1')) > 1  # processes, each of which takes a GPU of its own
    if short:
        if out is not None or plain:
            raise InputError(
                f'--short writes nothing and tries no control: leave {"--plain" if plain else "--out"} out'
            )
        if several:
            raise InputError('--short is for one process: start it without torchrun or accelerate launch')
        _try_recipe(loaded, data_dir, usable_device(device))
        return
    if out is None:
        raise InputError('--out is missing: name a folder for the result, or try the recipe with --short')
    for data in loaded.data:
        root = data_dir or data.data_dir
        check_outside(out, **{'images of the recipe': root if takes_folder(data.images) else data.images})
    _check_result(loaded, text, out, plain)
    where = device if several else usable_device(device)
    first = os.environ.get('RANK', '0') == '0'  # of several processes the first one speaks and writes
    run = out / ('run-plain' if plain else 'run')
    if first:
        _check_folder(run)
    banks: Any
    if loaded.denoising is None:
        banks = training.load_banks(loaded, data_dir, progress=first)
    else:
        banks = denoising.load_patches(loaded)
    if first:
        _say_found(banks)
        kind = 'images' if loaded.denoising is None else 'patches'
        click.echo(
            f'Training   {loaded.hypernet.model_name} on {loaded.schedule.images:,} {kind} of '
            f'{size_of(loaded.hypernet.input)}{"" if several else f", on {where}"}; stop and resume at will'
        )
    try:
        if plain:
            _train_plain(loaded, out, run, banks, where, first)
        else:
            trainer = training.meta_train if loaded.denoising is None else denoising.meta_train_denoiser
            hypernet = trainer(loaded, run, banks=banks, device=where)
            if first:
                hypernet.save_pretrained(out, half=True)
    except KeyboardInterrupt:
        if first:
            click.echo('Stopped: the same command goes on from its checkpoint', err=True)
        raise
    if not first:
        return
    kept = out / 'recipe.toml'
    if not plain and not (recipe.exists() and recipe.resolve() == kept.resolve()):
        with written_whole(kept) as beside:
            beside.write_bytes(text)
    then = 'Next, where the hypernetwork is trained too' if plain else 'Next'
    click.echo(f'Wrote      {_result(out, plain)}. {then}:')
    click.echo(f'\n    {_next_command(loaded, out, plain, data_dir)}\n')


def _result(out: Path, plain: bool) -> Path:
    return out / ('plain' if plain else 'model.safetensors')


def _check_result(recipe: Recipe, text: bytes, out: Path, plain: bool) -> None:
    """Refuses a folder that has a result or another recipe, and a control that could not be saved."""
    for path in [_result(out, plain)] if plain else [_result(out, plain), out / 'config.json']:
        if path.exists():
            raise OutputExistsError(f'{path} exists: choose another --out, or remove it first')
    kept = out / 'recipe.toml'
    if not plain and kept.exists() and kept.read_bytes() != text:
        raise OutputExistsError(f'{kept} exists and is another recipe: choose another --out, or remove it first')
    if plain and recipe.denoising is None:
        training.check_control(recipe.hypernet)


def _check_folder(run: Path) -> None:
    """Refuses, before any image is read, a folder of a run that cannot be made or written to; leaves none behind."""
    new: list[Path] = []
    try:
        new += [folder for folder in (run, *run.parents) if not folder.exists()]
        run.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.', dir=run):
            pass
    except OSError as error:
        raise InputError(f'--out {run.parent}: {error.strerror or error}: choose a folder that can be made') from error
    finally:
        for folder in new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _train_plain(
    recipe: Recipe, out: Path, run: Path, banks: Any, device: str | torch.device | None, first: bool
) -> None:
    """Trains the control, and saves it, with the whitening of its features if it classifies."""
    result = _result(out, plain=True)
    out.mkdir(parents=True, exist_ok=True)  # where no hypernetwork was trained before
    if recipe.denoising is None:
        training.train_plain(recipe, run, banks=banks, device=device, result=result)
        return
    model = denoising.train_plain_denoiser(recipe, run, banks=banks, device=device)
    if first:
        save_model(model, result)


def _next_command(recipe: Recipe, out: Path, plain: bool, data_dir: str | None) -> str:
    """The command that measures or uses what was trained."""
    name = str(out) if len(out.parts) > 1 else f'./{out}'  # a folder's name, whatever hypernetwork is called so
    if recipe.denoising is not None:
        return shlex.join(['timm-pudnet', 'denoise', 'NOISY', '--hypernet', name, '--out', 'denoised'])
    data = recipe.data[0]
    some_left = data.classes or data.unseen
    words = ['timm-pudnet', 'evaluate', name, data.images if some_left else 'IMAGES_OF_OTHER_CLASSES']
    if some_left and is_timm_name(data.images):
        root = data_dir or data.data_dir
        words += ['--data-dir', root] if root else []
        words += [] if _has_test(data.images, root) else ['--split', data.split]
    words += ['--control', str(_result(out, plain))] if plain else []
    return shlex.join(words)


def _has_test(images: str, root: str | None) -> bool:
    """Whether a timm dataset is known to have the split that is measured by default."""
    if takes_folder(images):
        return root is not None and (local_path(root) / 'test').is_dir()
    return torch_name(images) in TRAIN_OR_TEST


def _say_found(banks: Sequence[ImageBank | PatchBank]) -> None:
    for bank in banks:
        if isinstance(bank, PatchBank):
            click.echo(f'Found      {len(bank.images):,} images')
        else:
            count = len(bank.class_names)
            click.echo(f'Found      {len(bank.labels):,} images in {count} classes: {some(bank.class_names)}')


def _try_recipe(recipe: Recipe, data_dir: str | None, device: torch.device) -> None:
    """Says whether the recipe learns, and how long all of it would take."""
    banks = training.load_banks(recipe, data_dir, progress=True)
    _say_found(banks)
    found = training.try_recipe(recipe, banks=banks, device=device)
    hours = found['whole_seconds'] / 3600
    click.echo(
        f'Tried      {found["images"]:,} images in {found["seconds"]:.0f} s; right in groups of seen classes: '
        f'{found["before"]:.1%} before, {found["after"]:.1%} after (chance {found["chance"]:.1%})'
    )
    if recipe.start:
        kept = found['after'] > found['before'] - found['chance'] / 2
        verdict = 'It keeps what it starts with' if kept else 'It loses what it starts with'
    else:
        gain = evaluation.mean_interval(found['gains'])
        learns = gain['mean'] > gain['interval'] or found['after'] == 1
        verdict = 'It learns' if learns else 'It does not learn yet'
    click.echo(
        f'{verdict}; the whole recipe takes about {hours:.1f} hours here, at {found["images_per_second"]:.0f} images/s'
    )
