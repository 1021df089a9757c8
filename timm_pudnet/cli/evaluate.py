"""`timm-pudnet evaluate`: a hypernetwork on classes that it was not trained on, beside its controls."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click
import safetensors.torch
from safetensors import SafetensorError
from torch import nn

from timm_pudnet import evaluation
from timm_pudnet.cli.group import (
    FOLDER,
    SEED,
    check_split,
    data_options,
    device_option,
    main,
    size_of,
    some,
    was_given,
)
from timm_pudnet.config import InputError, same_names, shown, spelled
from timm_pudnet.devices import usable_device
from timm_pudnet.files import config_sha256, weights_sha256, written_whole
from timm_pudnet.hub import load_hypernet
from timm_pudnet.hypernet import PudNet, pretrained_model
from timm_pudnet.images import ImageSource, any_timm_name, check_root, open_images
from timm_pudnet.target import arguments_of, create_feature_model, input_of, with_own_config
from timm_pudnet.training import ImageBank, bank_input, whitening_path
from timm_pudnet.training.meta_train import cost_of, seen_by


@main.command()
@click.argument('hypernet')
@click.argument('images')
@click.option('--control', 'controls', multiple=True, type=FOLDER, help='Folder that `train --plain` wrote.')
@click.option('--groups', default=500, show_default=True, help='Groups of unseen classes.')
@click.option('--n-way', default=None, type=int, help='Classes a group; by default all unseen ones, at most 5.')
@click.option('--n-shot', default='10', show_default=True, help='Labelled images a class; `all` with --support-split.')
@click.option('--n-query', default=15, show_default=True, help='Tested images a class.')
@click.option('--seed', type=SEED, default=0, show_default=True, help='Of the groups and of the random weights.')
@click.option('--support-split', help='Take the labelled images from this split, and only tested ones from --split.')
@click.option('--conditions', is_flag=True, help='See each group under a random imaging condition.')
@click.option(
    '--other', help='Images of another domain, for weights from their sketch; a folder or a timm dataset name.'
)
@click.option('--other-data-dir', help='Root of the timm dataset of --other.')
@click.option('--scratch', default=0, help='Train from scratch too, on so many groups; needs --support-split.')
@click.option('--scratch-epochs', default=10, show_default=True, help='Epochs of training from scratch.')
@click.option(
    '--without',
    multiple=True,
    help='A network to leave out, to save time (may be given several times): swapped_sketch, mean_sketch, '
    'other_domain_sketch, random_weights, raw_pixels, NAME or NAME_own_statistics of a --control.',
)
@click.option('--n-unlabelled', default=0, help='Further images a class whose labels are hidden, for self-training.')
@click.option('--save', is_flag=True, help='Write results.json and groups.json into the folder of HYPERNET.')
@click.option('--protocol', help='Name for --save: writes results.NAME.json and groups.NAME.json instead.')
@device_option
@data_options('test')
def evaluate(
    hypernet: str,
    images: str,
    controls: tuple[Path, ...],
    groups: int,
    n_way: int | None,
    n_shot: str,
    n_query: int,
    seed: int,
    support_split: str | None,
    conditions: bool,
    other: str | None,
    other_data_dir: str | None,
    scratch: int,
    scratch_epochs: int,
    without: tuple[str, ...],
    n_unlabelled: int,
    save: bool,
    protocol: str | None,
    device: str | None,
    data_dir: str | None,
    split: str,
) -> None:
    """Measure HYPERNET on those classes of IMAGES that it was not trained on, beside its controls."""
    shot = _labels_a_class(n_shot, support_split)
    if groups < 1:
        raise InputError(f'--groups must be at least 1, got {groups}')
    check_root(data_dir, images, option='--data-dir')
    check_split(images, other)
    _check_support_split(images, split, support_split)
    _check_scratch(scratch, scratch_epochs, groups, support_split, n_unlabelled)
    if other_data_dir and not any_timm_name(other):
        raise InputError(
            '--other-data-dir is the root of the timm dataset that --other names: name one there, or leave it out'
        )
    _check_save(save, protocol, hypernet)
    network = load_hypernet(Path(hypernet).resolve() if save else hypernet)  # the folder, whatever else has its name
    hashes: dict[str, Any] = {}
    if save:  # now: the files may be others when the measuring is done
        hashes = {'weights_sha256': weights_sha256(hypernet), 'config_sha256': config_sha256(hypernet)}
    if not network.target.classifiers:
        raise InputError(
            f'{network.name} predicts a {network.config.model_name}, which does not classify; denoisers are '
            'measured by timm-pudnet denoise --clean, or by hub/denoising.py of a checkout'
        )
    rivals = _read_controls(controls, network)
    costs = _costs(controls, network)
    network = network.to(usable_device(device))
    config = bank_input(network.config.input)
    bank = _unseen_images(network, open_images(images, input=config, split=split, data_dir=data_dir), controls)
    support_bank = other_bank = None
    if support_split is not None:
        given = open_images(images, input=config, split=support_split, data_dir=data_dir)
        support_bank = ImageBank.from_source(given, bank.class_names, progress=True)
        click.echo(f'Support    {len(support_bank.labels):,} images of these classes in split {support_split}')
    if other is not None:
        given = open_images(other, input=config, split=split, data_dir=other_data_dir)
        other_bank = ImageBank.from_source(given, progress=True)
        click.echo(f'Other      {len(other_bank.labels):,} images of {some(other_bank.class_names)}')
    drawn = evaluation.TestGroups.draw(
        bank,
        count=groups,
        n_way=min(5, len(bank.class_names)) if n_way is None else n_way,
        n_shot=shot,
        n_query=n_query,
        seed=seed,
        support_bank=support_bank,
        conditions=conditions,
        n_unlabelled=n_unlabelled,
    )
    click.echo(f'Measuring  {len(drawn):,} groups of images of {size_of(config)}, on {network.device}')
    result = evaluation.evaluate(
        network,
        bank,
        drawn,
        support_bank=support_bank,
        other=other_bank,
        controls=rivals,
        without=without,
        seed=seed,
    )
    if costs:
        result['controls'] = costs
    named = Path(images).name if Path(images).is_absolute() else images
    folder = Path(images).is_dir()  # which has no splits
    result.update(**hashes, images=named, split=None if folder else split, support_split=support_split)
    ending = 'json' if protocol is None else f'{protocol}.json'
    results, listed = (Path(hypernet) / f'{name}.{ending}' for name in ('results', 'groups'))
    verb = 'Replaced  ' if results.exists() else 'Wrote     '

    def keep() -> None:
        with written_whole(results) as beside:
            beside.write_text(json.dumps(result, indent=2) + '\n', encoding='utf-8')
            drawn.save(listed)

    if scratch:
        assert support_bank is not None
        if save:  # what is measured already, should this end early
            keep()
        result['scratch'] = evaluation.compare_scratch(
            network, bank, drawn, support_bank, scratch, num_epochs=scratch_epochs, seed=seed
        )
    click.echo(evaluation.format_table(result))
    if not save:
        click.echo('Not saved: add --save to keep numbers and groups beside the hypernetwork')
        return
    keep()
    click.echo(f'{verb} {results}, {listed}. Next:')
    licence = [] if (Path(hypernet) / 'README.md').exists() else ['--license', 'LICENCE']
    words = ['timm-pudnet', 'push', hypernet, f'ORG/{network.name}', *licence, '--dry-run']
    click.echo(f'\n    {shlex.join(words)}\n')


def _labels_a_class(text: str, support_split: str | None) -> int | Literal['all']:
    if text == 'all':
        if support_split is None:
            raise InputError('--n-shot all needs --support-split: images beside those that are tested')
        return 'all'
    try:
        return int(text)
    except ValueError as error:
        raise InputError(f'--n-shot must be a whole number or all, got {text!r}') from error


def _check_support_split(images: str, split: str, support_split: str | None) -> None:
    if support_split == split:
        raise InputError(f'--support-split {split} is the tested split too: choose another one')
    if support_split is not None and Path(images).exists():
        raise InputError(
            f'--support-split: {images} is a folder, which has no splits; for folders train and test of class folders '
            'use IMAGES torch/image_folder with --data-dir'
        )


def _check_scratch(scratch: int, epochs: int, groups: int, support_split: str | None, n_unlabelled: int) -> None:
    if not 0 <= scratch <= groups or epochs < 1:
        raise InputError(
            f'--scratch must be in 0-{groups}, the number of groups, and --scratch-epochs at least 1, '
            f'got {scratch} and {epochs}'
        )
    if was_given('scratch_epochs') and not scratch:
        raise InputError('--scratch-epochs is of training from scratch: add --scratch, or leave it out')
    if scratch and support_split is None:
        raise InputError('--scratch trains on all images of the support split: add --support-split')
    if scratch and n_unlabelled:
        raise InputError('--scratch trains on labelled images: leave out one of it and --n-unlabelled')


def _check_save(save: bool, protocol: str | None, hypernet: str) -> None:
    if protocol is not None and not (save and re.fullmatch(r'[\w-]+', protocol)):
        raise InputError(f'--protocol {protocol}: needs --save, and a name of letters, digits, - and _')
    if save and not Path(hypernet).is_dir():
        raise InputError(f'--save needs the folder of a hypernetwork, {hypernet} is none')
    if save and not os.access(hypernet, os.W_OK):
        raise InputError(f'--save: {hypernet} cannot be written to: copy it, or leave --save out')


def _read_controls(paths: Sequence[Path], network: PudNet) -> dict[str, Any]:
    """Controls that `train --plain` wrote, with their whitening, by the names of their folders.

    One that was trained as another network, or for images of another size, is refused: its tensors would be measured in
    the hypernetwork's network, at the hypernetwork's size.
    """
    found: dict[str, Any] = {}
    wanted = _in_words(with_own_config(create_feature_model(network.target), network.config.input)) if paths else ''
    for path in map(Path.absolute, paths):  # `.` has no name
        if path.name in found:
            raise InputError(f'--control {path}: another control is called {path.name} too; rename its folder')
        beside = whitening_path(path)
        if not beside.is_file():
            raise InputError(f'--control {path}: {beside} is not there; `train --plain` writes both')
        model = pretrained_model(path, {})
        if (words := _in_words(model)) != wanted:
            raise InputError(
                f'--control {path} is {words}, but {network.name} predicts {wanted}: train it by the recipe of the '
                'hypernetwork'
            )
        try:
            found[path.name] = model, safetensors.torch.load_file(beside)['whitening']
        except (KeyError, OSError, SafetensorError) as error:
            raise InputError(f'--control {path}: {beside} holds no whitening: {error}') from error
    return found


def _costs(paths: Sequence[Path], network: PudNet) -> dict[str, dict[str, Any]]:
    """What the training of each control cost, as far as is known, by the names of their folders.

    Says which has seen fewer images than the hypernetwork: another recipe may have trained it.
    """
    found = {path.name: cost_of(path) for path in map(Path.absolute, paths)}
    ours = network.config.training.get('images')
    for name, cost in found.items():
        seen = cost.get('images')
        if isinstance(seen, int) and isinstance(ours, int) and seen < ours:
            click.echo(f'Note       control {name} saw {seen:,} images in training, {network.name} saw {ours:,}')
    return found


def _in_words(model: nn.Module) -> str:
    """Architecture, arguments and input size of a timm model, which its tensors alone do not tell."""
    found = {'global_pool': 'avg', **arguments_of(model)}  # which an earlier timm does not write
    told = (f'{key}={json.dumps(found[key])}' for key in sorted(found.keys() - {'num_classes', 'in_chans'}))
    name = model.pretrained_cfg['architecture']  # type: ignore[index]
    return f'{name} ({", ".join(told)}) of images of {size_of(input_of(model))}'


def _unseen_images(network: PudNet, source: ImageSource, controls: Sequence[Path]) -> ImageBank:
    """Reads the images of the classes that the hypernetwork was not trained on, and says so.

    A control that was trained on one of them is refused.
    """
    seen = network.config.class_names
    if not seen:
        click.echo(f'Note       {network.name} does not say which classes it was trained on: all are taken for unseen')
    names, whole = source.class_names, None
    if not source.labelled:
        raise InputError(
            f'{source.description}: labelled images are needed, of classes that {network.name} was not trained on: '
            'folders with a subfolder per class'
        )
    if names is None:  # the classes are numbers, known when all is read
        if not all(name.isdigit() for name in seen):
            raise InputError(
                f'{source.description}: its classes have no names, by which to tell those that {network.name} was '
                'trained on: use image folders'
            )
        whole = ImageBank.from_source(source, progress=True)
        names = whole.class_names
    known = same_names(names or (), seen)
    unseen = [name for name in names or () if name not in known]
    if respelled := [f'{shown(name)} ({shown(other)})' for name, other in known.items() if name != other]:
        click.echo(f'Note       left out as classes that {network.name} was trained on: {some(respelled)}')
    if len(unseen) < 2:
        raise InputError(
            f'{source.description}: {len(unseen)} classes that {network.name} was not trained on; two needed'
        )
    for path in controls:
        theirs = same_names(names or (), seen_by(str(path)))
        if both := sorted(theirs.keys() & {*unseen}):
            raise InputError(
                f'--control {path} was trained on class {spelled(both[0], theirs[both[0]])}, which {network.name} is '
                'tested on: train it by the recipe of the hypernetwork'
            )
    bank = ImageBank.from_source(source, unseen, progress=True) if whole is None else whole.select(unseen)
    click.echo(f'Found      {len(bank.labels):,} images in {len(unseen)} unseen classes: {some(bank.class_names)}')
    return bank
