"""The command line, `timm-pudnet`: calls the public API, says what it found, what it wrote and what to do next."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import os
import platform
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import click
import torch

import timm_pudnet
from timm_pudnet.config import MIN_PREDICTED, InputError, OutputExistsError, PudNetError, PudNetWarning
from timm_pudnet.predict import Head


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


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f'Warning: {" ".join(str(message).split())}', err=True)


@click.group(cls=_Commands, context_settings={'help_option_names': ['-h', '--help']})
@click.version_option(timm_pudnet.__version__, prog_name='timm-pudnet')
def main() -> None:
    """Predict the weights of timm's convolutional networks for images that they have never seen."""


class _Folder(click.Path):
    """A path with its `~` in full: the shell leaves it where it stands behind a `=`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return Path(os.path.expanduser(os.fspath(value)))


_FOLDER = _Folder()
_SEED = click.IntRange(0, 2**31 - 1)
_MANY = 20  # labelled images a class, from which on the blend head is measurably ahead of class centroids


def _data_options(split: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def add(command: Callable[..., None]) -> Callable[..., None]:
        command = click.option('--split', default=split, show_default=True, help='Split of a timm dataset.')(command)
        return click.option('--data-dir', help='Root of a timm dataset.')(command)

    return add


def _check_data_dir(data_dir: str | None, *images: str | None) -> None:
    if data_dir is not None and not _any_timm_name(images):
        raise InputError(
            f'--data-dir is the root of a timm dataset, and {images[0]} is not the name of one: leave it out, '
            'or name one, torch/image_folder for instance'
        )


def _check_split(*images: str | None) -> None:
    given = click.get_current_context().get_parameter_source('split') == click.core.ParameterSource.COMMANDLINE
    if given and not _any_timm_name(images):
        raise InputError(
            f'--split is that of a timm dataset, and {images[0]} is not the name of one: name the folder of the split, '
            'or use torch/image_folder with --data-dir for a folder of splits'
        )


def _any_timm_name(images: Sequence[str | None]) -> bool:
    from timm_pudnet.images import is_timm_name

    return any(name is not None and is_timm_name(name) for name in images)


@main.command()
@click.argument('model_name')
@click.argument('images')
@click.option('--out', type=_FOLDER, help='New folder for the model, in timm format.')
@click.option(
    '--hypernet',
    help='Hypernetwork: name, folder or org/name on the Hub; by default the one that serves MODEL_NAME.',
)
@click.option(
    '--head',
    type=click.Choice(get_args(Head)),
    help='Classifier: class centroids (default), ridge regression, a blend of naive Bayes and ridge (for any number of '
    'labels; default with --unlabelled), or none for a feature model.',
)
@click.option(
    '--unlabelled',
    help='More images of the same classes, without labels: a folder or a timm dataset name. The head learns from them '
    'too (self-training).',
)
@click.option(
    '--holdout', default=0.25, show_default=True, help='Share of the labelled images kept aside for the test.'
)
@click.option('--seed', type=_SEED, default=0, show_default=True, help='Of the choice of images kept aside.')
@click.option('--device', help='cpu, cuda, ...; by default CUDA where there is one.')
@click.option('--strict', is_flag=True, help='An unreadable image is an error, not a warning.')
@click.option('--report/--no-report', default=True, help='Write a page about the prediction too, OUT/report.')
@_data_options('train')
@click.pass_context
def predict(
    context: click.Context,
    model_name: str,
    images: str,
    out: Path | None,
    hypernet: str | None,
    head: Head | None,
    unlabelled: str | None,
    holdout: float,
    seed: int,
    device: str | None,
    strict: bool,
    report: bool,
    data_dir: str | None,
    split: str,
) -> None:
    """Predict MODEL_NAME's weights for IMAGES, a folder (one subfolder a class) or a timm dataset name."""
    by_default = head is None
    head = head or ('centroid' if unlabelled is None else 'blend')

    from timm_pudnet import evaluation
    from timm_pudnet import predict as room
    from timm_pudnet.files import sha256
    from timm_pudnet.hub import resolve_hypernet
    from timm_pudnet.hypernet import library_versions, usable_device
    from timm_pudnet.images import open_images

    if not 0 <= holdout < 1:
        raise InputError(f'--holdout must be in [0, 1), got {holdout}')
    if out is not None:
        room.check_output(out)
        _check_outside(out, **{'IMAGES': images, '--unlabelled': unlabelled})
    _check_data_dir(data_dir, images, unlabelled)
    _check_split(images, unlabelled)
    network = resolve_hypernet(model_name, hypernet)
    config = network.config.input
    expectation = _expectation_of(network)
    source = open_images(images, input=config, split=split, data_dir=data_dir, strict=strict)
    source.progress = True
    click.echo(f'Found      {source.description}')
    others = None
    if unlabelled is not None:
        others = open_images(unlabelled, input=config, split=split, data_dir=data_dir, strict=strict, with_labels=False)
        others.progress = True
        click.echo(f'Also       {others.description}, for the head')
    kept, tested = evaluation.split_held_out(source, holdout if head != 'none' else 0, seed)
    single = []
    if tested is not None and source.class_names:
        click.echo(f'Classes    {_some(source.class_names)}')
        single = [name for label, name in enumerate(source.class_names) if (source.labels == label).sum() == 1]
        if single:
            click.echo(f'Only one image each, none kept aside: {_some(tuple(single))}')
        click.echo(f'Kept aside {len(tested):,} of them for the test, {len(kept):,} give the weights')
    where = usable_device(device)
    click.echo(f'Device     {where}; images are seen at {_size(config)}')
    notes, started = [], time.perf_counter()
    try:
        model = room.predict_model(model_name, kept, unlabelled=others, hypernet=network, head=head, device=where)
    except InputError:
        if tested is None or kept.labels is None or not _a_class_is_unread(kept):
            raise
        # The class may have readable images among those that were kept aside: all are used.
        notes = ['Too few images of a class can be read to keep one aside: all gave the weights, none is tested.']
        click.echo(f'Warning: {notes[0]}', err=True)
        kept, tested, started = source, None, time.perf_counter()
        model = room.predict_model(model_name, kept, unlabelled=others, hypernet=network, head=head, device=where)
    seconds = time.perf_counter() - started
    count = sum(parameter.numel() for parameter in model.parameters())
    click.echo(f'Predicted  {count / 1e6:.1f}M weights of {model_name} with {network.name} in {seconds:.2f} s')
    sketch = _said_by_sketch(network, model)
    if sketch:
        click.echo(f'Sketch     {sketch}')
    told: dict[str, Any] = {}
    if expectation is not None:
        told = _expect(expectation, network, model, kept, head)
    test = None
    try:
        test = None if tested is None else evaluation.measure_held_out(model, kept, tested, others)
    except InputError as error:
        if strict or tested is None or not tested.skipped:
            raise
        # None of them can be read; the model is there.
        notes.append(f'Not tested: {error}')
        click.echo(f'Warning: {notes[-1]}', err=True)
    for row in () if test is None else test.lines():
        click.echo(row)
    if test is not None and test.right_raw >= test.right:
        remedy = 'try --head blend, or ' if head == 'centroid' else ''
        click.echo(f'Note       raw pixels do as well: {remedy}train a hypernetwork for images of this family')
    elif by_default and head == 'centroid' and _has_many_labels(kept, model):
        click.echo('Note       with so many labels a class --head blend is usually better than class centroids')
    if not source.labelled:
        click.echo(
            'No labels  the model gives features; put the images of each class into a subfolder for a classifier'
        )
    if out is None:
        click.echo('Not saved: add --out FOLDER to keep the model and a page about it')
        return
    notes += [f'Only one image each, none kept aside: {_some(tuple(single))}'] if single else []
    skipped = sum(len(part.skipped) for part in (kept, tested, others) if part is not None)
    notes += [f'{skipped:,} images could not be read and were left out.'] if skipped else []
    if others is not None:
        notes.append(
            f'{others.description} taught the head too; they are not shown here, and what raw pixels reach is by the '
            'labelled images alone.'
        )
    without = 'no head' if source.labelled else 'no labels'
    classes = f'{model.num_classes:,} classes' if model.num_classes else without
    gave = 'all gave the weights'
    if tested is not None or (kept.skipped and not kept.is_stream):
        gave = f'{len(kept) - len(kept.skipped):,} gave the weights'
    tiles = [('Predicted in', f'{seconds:.2f} s', f'{count / 1e6:.1f}M weights, on {where}')]
    if source.labels is not None:
        tiles.append(('Images', f'{len(source.labels):,}', f'{classes}; {gave}'))
    page = None
    if report:
        page = evaluation.make_report(
            model,
            kept,
            test,
            title=f'{model_name} for {images}',
            tiles=tiles,
            notes=notes,
            **told,
        )
    room.save_model(model, out)
    files = {path.name: path for path in out.iterdir()}
    size = sum(path.stat().st_size for path in files.values()) / 1e6
    written = ''
    if page is not None:
        facts = {
            'Command': context.meta['command'],
            'In the folder': str(Path.cwd()),
            'Images': source.description,
            'Hypernetwork': f'{network.name}, weights {evaluation.weights_digest(network)}',
            **({'Sketch': sketch} if sketch else {}),
            'Head': head if model.num_classes else 'none',
            **({'Unlabelled images': others.description} if others is not None else {}),
            'Input': _size(config),
            'Model': f'{count:,} weights, {size:.1f} MB on disk',
            'sha256 of model.safetensors': sha256(files['model.safetensors']),
            'Seconds of predicting': f'{seconds:.2f}, reading the images included',
            **({'Milliseconds an image': f'{1000 * test.seconds / len(test.labels):.2f}, on {where}'} if test else {}),
            'Machine': f'{platform.machine()}, {torch.get_num_threads()} threads, {where}',
            'Versions': ', '.join(f'{name} {version}' for name, version in library_versions().items()),
            'Python': platform.python_version(),
        }
        try:
            written = dataclasses.replace(page, facts=facts).write(out / 'report')
        except OSError as error:  # the model is there all the same
            click.echo(f'Warning: the report could not be written: {error}', err=True)
    click.echo(f'Wrote      {out} ({size:.0f} MB, timm format). {_loading(out)}')
    click.echo('    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n')
    if written:
        click.echo(f'Report     {written}: open it in a browser; it needs no network')
        if importlib.util.find_spec('matplotlib') is None:
            click.echo('           Its plots are not there as PNG files: pip install matplotlib')


def _has_many_labels(source: Any, model: Any) -> bool:
    return source.labels is not None and len(source.labels) >= _MANY * model.num_classes


def _said_by_sketch(network: Any, model: Any) -> str:
    """What came of the sketch of a hypernetwork with a gate, in words; nothing of one without."""
    if network.gate is None:
        return ''
    found = model.state_dict()
    with torch.inference_mode():
        base = network.base()
    keys = [layer.key for layer in network.target.layers if layer.key in found]
    if all(torch.allclose(found[key].cpu(), base[key].cpu(), rtol=1e-4, atol=1e-5) for key in keys):
        return 'changed nothing: the weights are those of the base network'
    return 'changed the weights of the base network'


def _a_class_is_unread(source: Any) -> bool:
    """Whether no image of some class could be read in the latest pass."""
    unread = {name for name, _ in source.skipped}
    read = {label for row, label in enumerate(source.labels.tolist()) if source.name(row) not in unread}
    return len(read) < len(source.labels.unique())


def _expectation_of(network: Any) -> Any:
    """The fitted expectation of a hypernetwork; None where it has none, or one of other weights."""
    from timm_pudnet import evaluation
    from timm_pudnet.files import config_sha256

    if network.folder is None:
        return None
    found = evaluation.Expectation.load(network.folder)
    if found is not None and (
        found.weights_digest != evaluation.weights_digest(network)
        or found.config_sha256 not in ('', config_sha256(network.folder))
        or len(found.references[0]) != network.config.sketch_width
    ):
        warnings.warn(
            f'{network.folder}: its expectation.json is of other weights, or of another config, and is not used; fit '
            'it again (hub/expectation.py)',
            PudNetWarning,
            stacklevel=2,
        )
        return None
    return found


def _expect(expectation: Any, network: Any, model: Any, used: Any, head: str) -> dict[str, Any]:
    """Says what to expect of the model, and gives it as the report wants it."""
    from timm_pudnet.evaluation import read_traits
    from timm_pudnet.evaluation.expectation import IN_WORDS, MOST_IMAGES
    from timm_pudnet.evaluation.report import first_images

    told: dict[str, Any] = {}
    traits = read_traits(network, model, used, expectation) if model.num_classes else None
    if traits is not None:
        accuracy, low, high = told['expected'] = expectation.expect(traits)
        of_what = '' if head == 'centroid' else ', of the centroid head'
        told['expected_from'] = expectation.in_words() + (of_what and ' It is of the centroid head.')
        told['familiarity'] = expectation.familiarity(traits.distance, traits.sketch_images or traits.images)
        click.echo(f'Expected   {accuracy:6.1%} before any test{of_what} (95 % interval {low:.1%} to {high:.1%})')
    elif not used.labelled:
        stream = network.streaming_sketch()
        if used.is_stream:
            batches = first_images(used, MOST_IMAGES)
        else:
            count = len(used)
            batches = used.subset(torch.linspace(0, count - 1, min(count, MOST_IMAGES)).long()).batches()
        for images, _ in batches:
            stream.add(images)
        told['familiarity'] = expectation.familiarity(expectation.distance(stream.result()), stream.counts[0])
    if 'familiarity' in told:
        click.echo(f'           {IN_WORDS[told["familiarity"]]}')
    return told


@main.command()
@click.argument('recipe', type=_FOLDER)
@click.option('--out', type=_FOLDER, help='Folder for the result and its checkpoints.')
@click.option('--short', is_flag=True, help='Only try for two minutes whether the recipe learns; writes nothing.')
@click.option('--plain', is_flag=True, help='Train the control instead: the target by itself, without a sketch.')
@click.option('--device', help='cpu, cuda, ...; by default CUDA where there is one.')
@click.option('--data-dir', help="Root of a timm dataset, in place of the recipe's.")
def train(recipe: Path, out: Path | None, short: bool, plain: bool, device: str | None, data_dir: str | None) -> None:
    """Train a hypernetwork by a RECIPE file; goes on where an earlier run in --out stopped."""
    from timm_pudnet import denoising, training
    from timm_pudnet.hypernet import save_tensors, target_of, usable_device, written_whole
    from timm_pudnet.images import is_timm_name
    from timm_pudnet.predict import save_model

    loaded = training.Recipe.load(recipe)
    text = recipe.read_bytes()  # now: the file may be another one when training is done
    if loaded.denoising is not None and (short or data_dir):
        option = '--short' if short else '--data-dir'
        raise InputError(f'{recipe}: {option} is not for recipes of denoisers: leave it out')
    _check_data_dir(data_dir, *(data.images for data in loaded.data))
    training.check_start(loaded)  # before any image is read
    several = int(os.environ.get('WORLD_SIZE', '1')) > 1  # processes, each of which takes a GPU of its own
    if short:
        if out is not None or plain:
            raise InputError(
                f'--short writes nothing and tries no control: leave {"--plain" if plain else "--out"} out'
            )
        if several:
            raise InputError('--short is for one process: start it without torchrun or accelerate launch')
        where = usable_device(device)
        _try_recipe(loaded, training.load_banks(loaded, data_dir, progress=True), where)
        return
    if out is None:
        raise InputError('--out is missing: name a folder for the result, or try the recipe with --short')
    result = out / ('plain' if plain else 'model.safetensors')
    kept = out / 'recipe.toml'
    for path in [result] if plain else [result, out / 'config.json']:
        if path.exists():
            raise OutputExistsError(f'{path} exists: choose another --out, or remove it first')
    if not plain and kept.exists() and kept.read_bytes() != text:
        raise OutputExistsError(f'{kept} exists and is another recipe: choose another --out, or remove it first')
    if plain and loaded.denoising is None and not target_of(loaded.hypernet).ends_in_classifier:
        raise InputError(
            f"{loaded.hypernet.model_name}: its head has layers before the classifier, without which timm's format "
            'cannot hold it: train the control in Python, timm_pudnet.training.train_plain'
        )
    where: Any = device if several else usable_device(device)
    banks: Any
    first = os.environ.get('RANK', '0') == '0'  # of several processes the first one speaks and writes
    if loaded.denoising is None:
        banks = training.load_banks(loaded, data_dir, progress=first)
    else:
        banks = denoising.load_patches(loaded)
    if first:
        _say_found(banks)
        kind = 'images' if loaded.denoising is None else 'patches'
        click.echo(
            f'Training   {loaded.hypernet.model_name} on {loaded.schedule.images:,} {kind} of '
            f'{_size(loaded.hypernet.input)}{"" if several else f", on {where}"}; stop and resume at will'
        )
    if plain:
        whitening = None
        if loaded.denoising is None:
            model, whitening = training.train_plain(loaded, out / 'run-plain', banks=banks, device=where)
        else:
            model = denoising.train_plain_denoiser(loaded, out / 'run-plain', banks=banks, device=where)
        if not first:
            return
        if whitening is not None:
            seen = json.dumps(training.classes_seen(loaded, banks))
            with written_whole(training.whitening_path(result)) as beside:
                save_tensors({'whitening': whitening}, beside, {'classes': seen})
        save_model(model, result)
    else:
        trainer = training.meta_train if loaded.denoising is None else denoising.meta_train_denoiser
        hypernet = trainer(loaded, out / 'run', banks=banks, device=where)
        if not first:
            return
        hypernet.save_pretrained(out, half=True)
        if not recipe.exists() or recipe.resolve() != kept.resolve():
            with written_whole(kept) as beside:
                beside.write_bytes(text)
    name = str(out) if len(out.parts) > 1 else f'./{out}'  # a folder's name, whatever hypernetwork is called so
    first_data = loaded.data[0]
    some_left = first_data.classes or first_data.unseen
    words = ['timm-pudnet', 'evaluate', name, first_data.images if some_left else 'IMAGES_OF_OTHER_CLASSES']
    root = data_dir or first_data.data_dir
    words += ['--data-dir', root] if root and some_left and is_timm_name(first_data.images) else []
    words += ['--control', str(result)] if plain else []
    if loaded.denoising is not None:
        words = ['timm-pudnet', 'denoise', 'NOISY', '--hypernet', name, '--out', 'denoised']
    then = 'Next, where the hypernetwork is trained too' if plain else 'Next'
    click.echo(f'Wrote      {result}. {then}:')
    click.echo(f'\n    {shlex.join(words)}\n')


def _say_found(banks: Any) -> None:
    for bank in banks:
        names = getattr(bank, 'class_names', None)
        if names is None:  # of a denoiser
            click.echo(f'Found      {len(bank.images):,} images')
            continue
        click.echo(f'Found      {len(bank.labels):,} images in {len(names)} classes: {_some(names)}')


def _try_recipe(recipe: Any, banks: Any, device: str | None) -> None:
    from timm_pudnet import training

    _say_found(banks)
    found = training.try_recipe(recipe, banks=banks, device=device)
    hours = recipe.schedule.images / found['images_per_second'] / 3600
    click.echo(
        f'Tried      {found["images"]:,} images in {found["seconds"]:.0f} s; right in groups of seen classes: '
        f'{found["before"]:.1%} before, {found["after"]:.1%} after (chance {found["chance"]:.1%})'
    )
    if recipe.start:
        kept = found['after'] > found['before'] - found['chance'] / 2
        verdict = 'It keeps what it starts with' if kept else 'It loses what it starts with'
    else:
        learns = 1 - found['after'] < 0.9 * (1 - found['before'])
        verdict = 'It learns' if learns else 'It does not learn yet'
    click.echo(
        f'{verdict}; the whole recipe takes about {hours:.1f} hours here, at {found["images_per_second"]:.0f} images/s'
    )


@main.command()
@click.argument('hypernet')
@click.argument('images')
@click.option('--control', 'controls', multiple=True, type=_FOLDER, help='Folder that `train --plain` wrote.')
@click.option('--groups', default=500, show_default=True, help='Groups of unseen classes.')
@click.option('--n-way', default=None, type=int, help='Classes a group; by default all unseen ones, at most 5.')
@click.option('--n-shot', default='10', show_default=True, help='Labelled images a class; `all` with --support-split.')
@click.option('--n-query', default=15, show_default=True, help='Tested images a class.')
@click.option('--seed', type=_SEED, default=0, show_default=True, help='Of the groups and of the random weights.')
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
@click.option('--device', help='cpu, cuda, ...; by default CUDA where there is one.')
@_data_options('test')
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
    from timm_pudnet import evaluation
    from timm_pudnet.files import config_sha256, weights_sha256
    from timm_pudnet.hub import load_hypernet
    from timm_pudnet.hypernet import usable_device, written_whole
    from timm_pudnet.images import open_images
    from timm_pudnet.training.episodes import ImageBank, bank_input
    from timm_pudnet.training.meta_train import seen_by

    shot = _labels_a_class(n_shot, support_split)
    if groups < 1:
        raise InputError(f'--groups must be at least 1, got {groups}')
    _check_data_dir(data_dir, images)
    _check_split(images, other)
    if support_split == split:
        raise InputError(f'--support-split {split} is the tested split too: choose another one')
    if support_split is not None and Path(images).exists():
        raise InputError(
            f'--support-split: {images} is a folder, which has no splits; for folders train and test of class folders '
            'use IMAGES torch/image_folder with --data-dir'
        )
    if not 0 <= scratch <= groups or scratch_epochs < 1:
        raise InputError(
            f'--scratch must be in 0-{groups}, the number of groups, and --scratch-epochs at least 1, '
            f'got {scratch} and {scratch_epochs}'
        )
    if scratch and support_split is None:
        raise InputError('--scratch trains on all images of the support split: add --support-split')
    if scratch and n_unlabelled:
        raise InputError('--scratch trains on labelled images: leave out one of it and --n-unlabelled')
    if other_data_dir and not other:
        raise InputError('--other-data-dir is the root of the set that --other names: add --other, or leave it out')
    if protocol is not None and not (save and re.fullmatch(r'[\w-]+', protocol)):
        raise InputError(f'--protocol {protocol}: needs --save, and a name of letters, digits, - and _')
    if save and not Path(hypernet).is_dir():
        raise InputError(f'--save needs the folder of a hypernetwork, {hypernet} is none')
    if save and not os.access(hypernet, os.W_OK):
        raise InputError(f'--save: {hypernet} cannot be written to: copy it, or leave --save out')
    network = load_hypernet(Path(hypernet).resolve() if save else hypernet)  # the folder, whatever else has its name
    hashes: dict[str, Any] = {}
    if save:  # now: the files may be others when the measuring is done
        hashes = {'weights_sha256': weights_sha256(hypernet), 'config_sha256': config_sha256(hypernet)}
    if not network.target.classifiers:
        raise InputError(
            f'{network.name} predicts a {network.config.model_name}, which does not classify; denoisers are '
            'measured by timm-pudnet denoise --clean, or by hub/denoising.py of a checkout'
        )
    rivals = _read_controls(controls)
    network = network.to(usable_device(device))
    config = bank_input(network.config.input)
    source = open_images(images, input=config, split=split, data_dir=data_dir)
    whole = None
    names = source.class_names
    if not network.config.class_names:
        click.echo(f'Note       {network.name} does not say which classes it was trained on: all are taken for unseen')
    if names is None and source.labelled:  # the classes are numbers, known when all is read
        if not all(name.isdigit() for name in network.config.class_names):
            raise InputError(
                f'{source.description}: its classes have no names, by which to tell those that {network.name} was '
                'trained on: use image folders'
            )
        whole = ImageBank.from_source(source, progress=True)
        names = whole.class_names
    unseen = [name for name in names or () if name not in network.config.class_names]
    if len(unseen) < 2:
        raise InputError(
            f'{source.description}: {len(unseen)} classes that {network.name} was not trained on; two needed'
        )
    for path in controls:
        known = sorted({*unseen} & {*seen_by(str(path))})
        if known:
            raise InputError(
                f'--control {path} was trained on class {known[0]!r}, which {network.name} is tested on: train it by '
                'the recipe of the hypernetwork'
            )
    bank = ImageBank.from_source(source, unseen, progress=True) if whole is None else whole.select(unseen)
    click.echo(f'Found      {len(bank.labels):,} images in {len(unseen)} unseen classes: {_some(bank.class_names)}')
    support_bank = other_bank = None
    if support_split is not None:
        given = open_images(images, input=config, split=support_split, data_dir=data_dir)
        support_bank = ImageBank.from_source(given, unseen, progress=True)
        click.echo(f'Support    {len(support_bank.labels):,} images of these classes in split {support_split}')
    if other is not None:
        given = open_images(other, input=config, split=split, data_dir=other_data_dir)
        other_bank = ImageBank.from_source(given, progress=True)
        click.echo(f'Other      {len(other_bank.labels):,} images of {_some(other_bank.class_names)}')
    drawn = evaluation.TestGroups.draw(
        bank,
        count=groups,
        n_way=min(5, len(unseen)) if n_way is None else n_way,
        n_shot=shot,
        n_query=n_query,
        seed=seed,
        support_bank=support_bank,
        conditions=conditions,
        n_unlabelled=n_unlabelled,
    )
    click.echo(f'Measuring  {len(drawn):,} groups of images of {_size(config)}, on {network.device}')
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
    if scratch:
        assert support_bank is not None
        result['scratch'] = evaluation.compare_scratch(
            network, bank, drawn, support_bank, scratch, num_epochs=scratch_epochs, seed=seed
        )
    click.echo(evaluation.format_table(result))
    if not save:
        click.echo('Not saved: add --save to keep numbers and groups beside the hypernetwork')
    else:
        named = Path(images).name if Path(images).is_absolute() else images
        folder = Path(images).is_dir()  # which has no splits
        result.update(**hashes, images=named, split=None if folder else split, support_split=support_split)
        ending = 'json' if protocol is None else f'{protocol}.json'
        results, listed = (Path(hypernet) / f'{name}.{ending}' for name in ('results', 'groups'))
        verb = 'Replaced  ' if results.exists() else 'Wrote     '
        with written_whole(results) as beside:
            beside.write_text(json.dumps(result, indent=2) + '\n', encoding='utf-8')
            drawn.save(listed)
        click.echo(f'{verb} {results}, {listed}. Next:')
        licence = [] if (Path(hypernet) / 'README.md').exists() else ['--license', 'LICENCE']
        words = ['timm-pudnet', 'push', hypernet, f'ORG/{network.name}', *licence, '--dry-run']
        click.echo(f'\n    {shlex.join(words)}\n')


def _read_controls(paths: Sequence[Path]) -> dict[str, Any]:
    """Controls that `train --plain` wrote, with their whitening, by the names of their folders."""
    import safetensors.torch
    from safetensors import SafetensorError

    from timm_pudnet.hypernet import pretrained_model
    from timm_pudnet.training import whitening_path

    found: dict[str, Any] = {}
    for path in paths:
        if path.name in found:
            raise InputError(f'--control {path}: another control is called {path.name} too; rename its folder')
        beside = whitening_path(path)
        if not beside.is_file():
            raise InputError(f'--control {path}: {beside} is not there; `train --plain` writes both')
        try:
            found[path.name] = pretrained_model(path, {}), safetensors.torch.load_file(beside)['whitening']
        except (KeyError, OSError, SafetensorError) as error:
            raise InputError(f'--control {path}: {beside} holds no whitening: {error}') from error
    return found


def _labels_a_class(text: str, support_split: str | None) -> int | Literal['all']:
    if text == 'all':
        if support_split is None:
            raise InputError('--n-shot all needs --support-split: images beside those that are tested')
        return 'all'
    try:
        return int(text)
    except ValueError as error:
        raise InputError(f'--n-shot must be a whole number or all, got {text!r}') from error


@main.command()
@click.argument('model')
@click.argument('images')
@click.option('--out', required=True, type=_FOLDER, help='New folder for the model, in timm format.')
@click.option(
    '--mode',
    type=click.Choice(['auto', 'few', 'full']),
    default='auto',
    show_default=True,
    help='For few images or for many; auto tells by their number.',
)
@click.option('--epochs', type=int, help="Most passes over the images, in place of the mode's.")
@click.option('--rate', type=float, help="Largest learning rate, the head's, in place of the mode's.")
@click.option('--layer-decay', type=float, help="Rate of a layer over the next one's above, in place of the mode's.")
@click.option('--batch-size', type=int, help="Most images in a step, in place of the mode's.")
@click.option(
    '--holdout',
    default=0.2,
    show_default=True,
    help='Share of the images kept aside to know when to stop; 0: none.',
)
@click.option(
    '--hypernet', help='Where MODEL is an architecture: the hypernetwork: a name, a folder, or org/name on the Hub.'
)
@click.option(
    '--seed', type=_SEED, default=0, show_default=True, help='Of the images kept aside, their order and changes.'
)
@click.option('--device', help='cpu, cuda, ...; by default CUDA where there is one.')
@click.option('--strict', is_flag=True, help='An unreadable image is an error, not a warning.')
@_data_options('train')
def finetune(
    model: str,
    images: str,
    out: Path,
    mode: Literal['auto', 'few', 'full'],
    epochs: int | None,
    rate: float | None,
    layer_decay: float | None,
    batch_size: int | None,
    holdout: float,
    hypernet: str | None,
    seed: int,
    device: str | None,
    strict: bool,
    data_dir: str | None,
    split: str,
) -> None:
    """Fine-tune MODEL on IMAGES: a folder in timm's format, or an architecture, whose weights are predicted first.

    IMAGES is a folder with one subfolder a class, or a timm dataset name. Ctrl-C ends it early; the best model so far
    is kept.
    """
    from timm_pudnet import predict as room
    from timm_pudnet.target import input_of
    from timm_pudnet.training import FineTuning

    room.check_output(out)
    _check_outside(out, IMAGES=images)
    _check_data_dir(data_dir, images)
    _check_split(images)
    run = FineTuning(
        model,
        images,
        mode=mode,
        epochs=epochs,
        rate=rate,
        layer_decay=layer_decay,
        batch_size=batch_size,
        holdout=holdout,
        hypernet=hypernet,
        seed=seed,
        device=device,
        strict=strict,
        data_dir=data_dir,
        split=split,
    )
    total = sum(parameter.numel() for parameter in run.model.parameters())
    kept = 0 if run.held is None else len(run.held.labels)
    click.echo(f'Found      {run.source}')
    click.echo(f'Classes    {_some(run.images.class_names)}')
    click.echo(f'Kept aside {kept:,} of them to know when to stop, {len(run.images.labels):,} are trained on')
    click.echo(
        f'Tuning     {total / 1e6:.1f}M weights on {next(run.model.parameters()).device}, on images of '
        f'{_size(input_of(run.model))}, {_MODES[run.mode]}: first the head, then all, at most '
        f'{run.tuning.epochs} epochs'
    )
    try:
        run.run()
    except KeyboardInterrupt:
        if not run.history:
            raise
        click.echo(f'Interrupted after {len(run.history)} of {run.tuning.epochs} epochs', err=True)
    room.save_model(run.result(), out)  # before a word that a closed pipe cannot take
    last = run.history[-1]
    click.echo(f'Trained    {last["epoch"]} epochs in {last["seconds"]:.0f} s; kept: {_kept(run.best_epoch)}')
    if run.held is not None:
        from timm_pudnet.evaluation import share_interval
        from timm_pudnet.files import local_path

        best = run.best
        assert best is not None
        low, high = share_interval(best['right'], kept)
        given = local_path(model.removeprefix('local-dir:')).is_dir()
        flattered = ' (flattered, if it was predicted from these images)' if given else ''
        was = '' if run.before is None else f'; {run.before["accuracy"]:.1f}% before{flattered}'
        click.echo(
            f'Accuracy   {best["accuracy"]:.1f}% on the images kept aside ({best["right"]} of {kept}; 95 % interval '
            f'{low:.1%} to {high:.1%}{was}). They chose the epoch: new images may do a little worse'
        )
    click.echo(f'Wrote      {out} (timm format). {_loading(out)}\n')


def _check_outside(out: Path, **given: str | Path | None) -> None:
    """Refuses an output folder among the images, which would be a class of them, or images, the next time."""
    for name, folder in given.items():
        if folder is not None and Path(folder).is_dir() and out.resolve().is_relative_to(Path(folder).resolve()):
            raise InputError(f'--out {out} is {name} or lies in it ({folder}): choose a folder outside')


def _loading(out: Path) -> str:
    """The lines of Python that load a saved model."""
    from timm_pudnet.target import is_ours

    ours = is_ours(json.loads((out / 'config.json').read_text(encoding='utf-8'))['architecture'])
    imports = 'import timm\n    import timm_pudnet' if ours else 'import timm'
    return (
        f'Next, in Python{"" if ours else ", without this package if you like"}:\n\n    {imports}\n'
        f'    model = timm.create_model({f"local-dir:{out}"!r}, pretrained=True).eval()'
    )


_MODES = {'few': 'as for few images', 'full': 'as for many images'}


def _kept(epoch: int) -> str:
    return f'the model after epoch {epoch}' if epoch else 'the model as it was, since none was better'


@main.command()
@click.argument('model_name')
@click.argument('images')
@click.option('--out', type=_FOLDER, help='New folder for compare.json, compare.txt, compare.png.')
@click.option(
    '--hypernet',
    help='Hypernetwork: a name, a folder, or org/name on the Hub; by default the one that serves MODEL_NAME.',
)
@click.option('--epochs', default=20, show_default=True, help='Passes over the images of each training.')
@click.option('--budget', type=float, help='Seconds after which no further epoch is begun; by default no limit.')
@click.option('--holdout', default=0.25, show_default=True, help='Share of the images that is tested.')
@click.option('--pretrained', help="Name of the pretrained weights beside, or none; by default MODEL_NAME's own.")
@click.option(
    '--seed', type=_SEED, default=0, show_default=True, help='Of the tested images and of all that training draws.'
)
@click.option('--device', help='cpu, cuda, ...; by default CUDA where there is one.')
@click.option('--strict', is_flag=True, help='An unreadable image is an error, not a warning.')
@_data_options('train')
def compare(
    model_name: str,
    images: str,
    out: Path | None,
    hypernet: str | None,
    epochs: int,
    budget: float | None,
    holdout: float,
    pretrained: str | None,
    seed: int,
    device: str | None,
    strict: bool,
    data_dir: str | None,
    split: str,
) -> None:
    """Compare on IMAGES: MODEL_NAME predicted, fine-tuned, trained from scratch, and with timm's pretrained weights.

    IMAGES is a folder with one subfolder a class, or a timm dataset name. Ctrl-C ends it early; what was measured is
    kept.
    """
    from timm_pudnet import evaluation
    from timm_pudnet import predict as room
    from timm_pudnet.hypernet import usable_device, written_whole

    if out is not None:
        room.check_output(out)
        _check_outside(out, IMAGES=images)
    _check_data_dir(data_dir, images)
    _check_split(images)
    where = usable_device(device)
    click.echo(f'Comparing  {model_name} on {where}')

    def keep(result: dict[str, Any]) -> None:
        if out is not None:  # after each point, so that nothing is lost however this ends
            out.mkdir(exist_ok=True)
            for name, text in (
                ('compare.json', json.dumps(result, indent=2)),
                ('compare.txt', evaluation.format_comparison(result)),
            ):
                with written_whole(out / name) as beside:
                    beside.write_text(text + '\n', encoding='utf-8')

    result = evaluation.compare(
        model_name,
        images,
        hypernet=hypernet,
        epochs=epochs,
        budget=budget,
        holdout=holdout,
        arms=('fine_tuned', 'adam', 'adam_centralised', *([] if pretrained == 'none' else ['pretrained'])),
        pretrained=None if pretrained == 'none' else pretrained,
        seed=seed,
        device=where,
        strict=strict,
        data_dir=data_dir,
        split=split,
        on_result=keep,
    )
    if out is not None:
        evaluation.plot_comparison(result, out / 'compare.png')
    click.echo(
        f'Compared   {result["tested"]:,} images tested, {result["images"]:,} others learned from, '
        f'{result["classes"]:,} classes; {result["machine"]}'
    )
    if result['ended'] != 'epochs':
        click.echo(f'Ended early by the {result["ended"]}')
    click.echo(evaluation.format_comparison(result))
    if out is None:
        click.echo('Not saved: add --out FOLDER to keep table, numbers and plot')
        return
    click.echo(f'Wrote      {", ".join(sorted(str(path) for path in out.iterdir()))}')


@main.command()
@click.argument('images', type=_FOLDER)
@click.option('--out', required=True, type=_FOLDER, help='New folder for the denoised images.')
@click.option('--hypernet', help='Hypernetwork: name, folder or org/name on the Hub; by default the one for denoising.')
@click.option('--clean', type=_FOLDER, help='Folder of the same images without noise, for PSNR and SSIM.')
@click.option(
    '--turns',
    type=click.Choice(['1', '2', '4']),
    default='1',
    show_default=True,
    help='Mean over so many turned copies of each image: better where noise is strong, in so many times the time.',
)
@click.option('--device', help='cpu, cuda, ...; by default CUDA where there is one.')
@click.option('--strict', is_flag=True, help='An unreadable image is an error, not a warning.')
@click.pass_context
def denoise(
    context: click.Context,
    images: Path,
    out: Path,
    hypernet: str | None,
    clean: Path | None,
    turns: str,
    device: str | None,
    strict: bool,
) -> None:
    """Denoise IMAGES, a folder (its subfolders are kept) or a file, by one network predicted for all of them.

    Grey images and those in colour, whose noise is of other kinds, each have a network of their own. Every image is
    written under its name, in its format and bit depth, with its alpha channel as it was.
    """
    from tqdm import tqdm

    from timm_pudnet import predict as room
    from timm_pudnet.denoising import pictures
    from timm_pudnet.denoising.predict import predict_denoiser
    from timm_pudnet.denoising.tiles import denoise
    from timm_pudnet.hub import resolve_hypernet
    from timm_pudnet.hypernet import folder_written_whole, usable_device

    _check_outside(out, IMAGES=images, **{'--clean': clean})
    if clean is not None and clean.resolve().is_relative_to(images.resolve()):
        raise InputError(f'--clean {clean} is IMAGES or lies in it ({images}): keep clean images apart')
    room.check_output(out)
    where = usable_device(device)
    network = resolve_hypernet('blindspot_unet', hypernet)
    paths = pictures.list_pictures(images)
    if clean is not None:
        pictures.list_pictures(clean)  # before any work: an error where there are none

    # A first look at all of them, so that what is wrong with one is said before the work.
    found: dict[str, dict[str, Any]] = {}
    skipped: list[str] = []
    whites: dict[float, Path] = {}  # of float files, whose pixels do not tell it
    for name, path in tqdm(paths.items(), desc='Reading', unit='image', delay=2):
        try:
            picture = pictures.read_picture(path)
        except InputError as error:
            if strict:
                raise
            skipped.append(str(error))
            continue
        chans, height, width = picture.pixels.shape
        found[name] = {'size': (height, width), 'channels': chans, 'depth': picture.depth, 'format': picture.format}
        if picture.depth == 32:
            whites.setdefault(picture.white, path)
    some = pictures.in_short(skipped)
    if not found:
        raise InputError(f'none of the {len(paths):,} images of {images} can be denoised: {some}')
    pictures.check_whites(whites)
    partners = {} if clean is None else pictures.pair_pictures({name: paths[name] for name in found}, clean)
    for name, partner in tqdm(partners.items(), desc='Comparing', unit='pair', delay=2):
        pictures.check_pair(paths[name], pictures.read_picture(paths[name]), partner, pictures.read_picture(partner))
    if skipped:
        warnings.warn(f'skipped {len(skipped):,} of {len(paths):,} images: {some}', PudNetWarning, stacklevel=2)
    click.echo(f'Found      {_of_kinds(found)} in {images}{"" if clean is None else f", clean ones in {clean}"}')
    compressed = sum(facts['format'] == 'JPEG' for facts in found.values())
    if compressed:
        warnings.warn(
            f'{compressed:,} of {len(found):,} images are JPEG, whose compression has smeared the noise: less of it is '
            'recognised and removed than in PNG or TIFF files of the camera',
            PudNetWarning,
            stacklevel=2,
        )

    started = time.perf_counter()
    models = {
        channels: predict_denoiser(
            [str(paths[name]) for name, facts in found.items() if facts['channels'] == channels],
            hypernet=network,
            device=where,
        )
        for channels in sorted({facts['channels'] for facts in found.values()})
    }
    seconds = time.perf_counter() - started
    count = sum(parameter.numel() for parameter in models[min(models)].parameters())
    whom = 'all of them' if len(models) == 1 else 'the grey ones and for those in colour'
    click.echo(f'Predicted  {count / 1e6:.2f}M weights for {whom} on {where} in {seconds:.2f} s')
    taken = {name.split('/')[0].lower() for name in found}
    sheet_name, json_name = _free_name('side-by-side.png', taken), _free_name('denoised.json', taken)
    rows = []
    with folder_written_whole(out) as beside:
        started = time.perf_counter()
        for name, facts in tqdm(found.items(), desc='Denoising', unit='image', delay=2):
            picture = pictures.read_picture(paths[name])
            pixels = picture.rounded(denoise(models[facts['channels']], picture.pixels, turns=int(turns)))
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            pictures.write_picture(picture, pixels, beside / name)
            clean_one = [pictures.read_picture(partners[name]).pixels] if partners else []
            white = getattr(models[facts['channels']], 'scale', 1.0)  # of images that use a part of their range
            versions = [version / white for version in (picture.pixels, pixels, *clean_one)]
            if partners:
                facts.update(_measured(*versions))
            if len(rows) < 4:
                rows.append([pictures.middle(version) for version in versions])
        seconds = time.perf_counter() - started
        pictures.side_by_side(rows, ('noisy', 'denoised', 'clean')[: len(rows[0])]).save(beside / sheet_name)
        means = _mean_gains(list(found.values())) if partners else {}
        if partners:
            result = {'command': context.meta['command'], 'seconds': seconds, 'device': str(where), 'mean': means}
            result |= {'images': found, 'skipped': skipped}
            (beside / json_name).write_text(json.dumps(result, indent=2, allow_nan=False) + '\n', encoding='utf-8')
    for measure, unit in (('psnr', ' dB'), ('ssim', '')) if partners else ():
        click.echo(_in_words(measure, unit, means[measure]))
    what = 'reading, writing and measuring' if partners else 'reading and writing'
    click.echo(f'Denoised   {len(found):,} images in {seconds:.1f} s, {what} included')
    click.echo(f'Wrote      {out}; noisy and denoised ones side by side: {out / sheet_name}')
    if partners:
        click.echo(f'           PSNR and SSIM of each image: {out / json_name}')
    such = ' '.join(['of one kind'] * (len(models) > 1) + ['that can be read'] * bool(skipped))
    click.echo(f'Next, in Python, to keep this denoiser{f" (give images {such})" if such else ""}:')
    more = '' if hypernet is None else f', hypernet={hypernet!r}'
    once_turned = '' if turns == '1' else f'  # run it by timm_pudnet.denoise(model, image, turns={turns})'
    click.echo(
        f'\n    import timm_pudnet\n    model = timm_pudnet.predict_denoiser({str(images)!r}{more})\n'
        f"    timm_pudnet.save_model(model, 'denoiser'){once_turned}\n"
    )


def _of_kinds(found: dict[str, dict[str, Any]]) -> str:
    """Images, sizes, channels, depths and formats in words."""
    sizes = sorted({facts['size'] for facts in found.values()}, key=lambda size: size[0] * size[1])
    shown = [f'{width}x{height}' for height, width in dict.fromkeys([sizes[0], sizes[-1]])]
    channels = [facts['channels'] for facts in found.values()]
    kinds = [f'{channels.count(c):,} {what}' for c, what in ((3, 'in colour'), (1, 'grey')) if c in channels]
    depths = ' and '.join(str(depth) for depth in sorted({facts['depth'] for facts in found.values()}))
    formats = ', '.join(sorted({facts['format'] for facts in found.values()}))
    plural = 'image' if len(found) == 1 else 'images'
    return f'{len(found):,} {plural} ({", ".join(kinds)}; {" to ".join(shown)} pixels; {depths} bit; {formats})'


def _measured(noisy: Any, denoised: Any, clean: Any) -> dict[str, Any]:
    """PSNR and SSIM of one image before and after; None where infinite or not defined."""
    from timm_pudnet.denoising import metrics

    found: dict[str, Any] = {'psnr': {}, 'ssim': {}}
    for what, image in (('noisy', noisy), ('denoised', denoised)):
        decibel = metrics.psnr(image, clean).item()
        found['psnr'][what] = decibel if math.isfinite(decibel) else None
        small = min(clean.shape[1:]) < metrics.SSIM_WINDOW
        found['ssim'][what] = None if small else metrics.ssim(image, clean).item()
    return found


def _mean_gains(images: list[dict[str, Any]]) -> dict[str, Any]:
    """Means, with 95 % intervals, of each measure over the images that have it before and after."""
    from timm_pudnet.evaluation.metrics import mean_interval

    means: dict[str, Any] = {}
    for measure in ('psnr', 'ssim'):
        pairs = [(facts[measure]['noisy'], facts[measure]['denoised']) for facts in images]
        pairs = [(before, after) for before, after in pairs if before is not None and after is not None]
        means[measure] = {'images': len(pairs)}
        if pairs:
            values = {'noisy': [a for a, _ in pairs], 'denoised': [b for _, b in pairs]}
            values['gain'] = [after - before for before, after in pairs]
            for what, numbers in values.items():
                mean = mean_interval(numbers)
                means[measure][what] = mean if len(pairs) > 1 else {**mean, 'interval': None}
    return means


def _in_words(measure: str, unit: str, mean: dict[str, Any]) -> str:
    if not mean['images']:
        return f'{measure.upper():10} not defined for any image'
    digits = 2 if unit else 4

    def show(what: str, sign: str = '') -> str:
        found = mean[what]
        interval = '' if found['interval'] is None else f' ± {found["interval"]:.{digits}f}'
        return f'{found["mean"]:{sign}.{digits}f}{interval}{unit}'

    return f'{measure.upper():10} noisy {show("noisy")}, denoised {show("denoised")}: {show("gain", "+")} ' + (
        f'(means of {mean["images"]:,} with 95 % intervals)' if mean['images'] > 1 else '(1 image)'
    )


def _free_name(name: str, taken: set[str]) -> str:
    """`name`, or name-2, name-3, ..., which none of the images has."""
    stem, suffix = Path(name).stem, Path(name).suffix
    number = 2
    while name in taken:
        name, number = f'{stem}-{number}{suffix}', number + 1
    return name


@main.command()
@click.argument('name')
@click.option('--generator', default='auto', show_default=True, help='Weight generator: paper, residual or auto.')
@click.option('--predict-norm', is_flag=True, help="Predict the norms' affine parameters too.")
@click.option('--predict-linear', is_flag=True, help='Predict Linear layers inside blocks too, as 1x1 convs.')
@click.option(
    '--min-predicted',
    default=MIN_PREDICTED,
    show_default=True,
    help='Least share of the weights that must be predicted, 0 to 1.',
)
@click.option('--sketch-width', type=int, help='Width of the dataset sketch; by default one that suits the target.')
@click.option('--model-kwargs', multiple=True, metavar='KEY=VALUE', help="An argument of timm's, conv_mlp=true say.")
def info(
    name: str,
    generator: str,
    predict_norm: bool,
    predict_linear: bool,
    min_predicted: float,
    sketch_width: int | None,
    model_kwargs: tuple[str, ...],
) -> None:
    """Show what a hypernetwork for the timm architecture NAME would be, or what the hypernetwork NAME is."""
    import timm

    from timm_pudnet.hub import describe_hypernet, list_hypernets
    from timm_pudnet.hypernet import copy_speed, plan_hypernet
    from timm_pudnet.target import check_architecture

    if '.' in name and timm.models.is_model_pretrained(name):
        check_architecture(name)  # says that it goes without the tag
    if re.search(r'[./:]', name) or (Path(name) / 'config.json').is_file():  # no name of an architecture
        found = describe_hypernet(name)
        context = click.get_current_context()
        for option in context.command.params:
            given = context.get_parameter_source(option.name or '') is click.core.ParameterSource.COMMANDLINE
            if isinstance(option, click.Option) and given:
                raise InputError(f'{option.opts[0]} is for a new hypernetwork, {name} is one already: leave it out')
        click.echo(f'Hypernet   {found}')
        assert found.config is not None  # as of all but those listed by the Hub
        config, model_name = found.config, found.model_name
        if config.class_names:  # denoisers have none
            click.echo(f'Seen       {len(config.class_names)} classes: {_some(config.class_names)}')
        click.echo(f'Input      {"x".join(map(str, config.input.input_size))}, mean {config.input.mean}')
        click.echo(f'Training   {", ".join(f"{key} {value}" for key, value in config.training.items()) or "not told"}')
        plan = plan_hypernet(**vars(config))
    else:
        model_name = name
        plan = plan_hypernet(
            model_name,
            generator=generator,
            predict_norm=predict_norm,
            predict_linear=predict_linear,
            min_predicted=min_predicted,
            model_kwargs=dict(map(_key_value, model_kwargs)),
            **({} if sketch_width is None else {'sketch_width': sketch_width}),
        )
    target, weights = plan.target, max(1, plan.weights)
    shares = {role: target.numel(role) / weights for role in ('predicted', 'shared')}
    moved = 4 * (plan.parameters + plan.weights)
    click.echo(
        f'Target     {model_name}: {plan.weights:,} weights without the classifier, {target.num_features} features'
    )
    click.echo(f'Layers     {len(target.layers)} predicted, {plan.kernels:,} kernels')
    steered = plan.steered / max(1, target.numel('predicted'))
    click.echo(
        f'Weights    {shares["predicted"]:.1%} predicted, {shares["shared"]:.1%} shared by all image sets; '
        f'{steered:.1%} of the predicted ones change with the sketch'
    )
    click.echo(f'Calibrated {target.numel("calibrated"):,} norm statistics, on the images')
    click.echo(
        f'Generator  {plan.config.generator}: {plan.parameters:,} parameters, {plan.parameters / weights:.2f} times '
        f"the target's, a file of about {plan.file_bytes / 1e6:.0f} MB; sketches of width {plan.config.sketch_width}"
    )
    click.echo(
        f'Predicting about {plan.memory_bytes / 1e6:,.0f} MB of memory beside images and activations; its bytes move '
        f'in {1e3 * moved / copy_speed():.0f} ms on this machine, beside one forward pass over the images'
    )
    serving = [key for key, known in list_hypernets().items() if known.model_name == model_name]
    click.echo(f'At hand    {", ".join(serving) or "no hypernetwork; timm-pudnet train makes one from a recipe"}')


def _key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition('=')
    if not key or not equals:
        raise InputError(f'--model-kwargs {text}: write KEY=VALUE, conv_mlp=true for instance')
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


@main.command(name='list')
@click.option('--hub', is_flag=True, help='Ask the Hugging Face Hub too for those that are not at hand.')
def list_command(hub: bool) -> None:
    """List the hypernetworks at hand: name, where it is, measured accuracy, size, licence."""
    from timm_pudnet.hub import list_hypernets

    found = list_hypernets(hub=hub)
    if not found:
        click.echo('No hypernetwork is at hand: train one (timm-pudnet train) and name its folder')
    for info in found.values():
        click.echo(str(info))


@main.command()
@click.argument('name')
def pull(name: str) -> None:
    """Fetch the hypernetwork NAME from the Hugging Face Hub, or bring it up to date: org/name or org/name@revision."""
    from timm_pudnet import hub

    folder = hub.pull(name)
    info = hub.describe_hypernet(folder)
    click.echo(f'At hand    {folder} ({info.size / 1e6:.0f} MB, {info.license or "no licence"})')
    denoises = info.model_name == 'blindspot_unet'
    words = 'denoise NOISY --out denoised' if denoises else f'predict {info.model_name} IMAGES'
    click.echo(f'\n    timm-pudnet {words} --hypernet {shlex.quote(name)}\n')


@main.command()
@click.argument('folder', type=_FOLDER)
@click.argument('repo')
@click.option('--dry-run', is_flag=True, help='Only check, and say what would change.')
@click.option('--private', is_flag=True, help='Make the repository private, where it is made.')
@click.option('--license', 'license_', help='Of the card, where FOLDER has no README.md that says one.')
@click.option('--message', default='Upload by timm-pudnet', show_default=True, help='Of the commit.')
def push(folder: Path, repo: str, dry_run: bool, private: bool, license_: str | None, message: str) -> None:
    """Publish FOLDER, a hypernetwork or a predicted model, as REPO (org/name) on the Hugging Face Hub."""
    from timm_pudnet import hub

    pushed = hub.push(folder, repo, license=license_, private=private, dry_run=dry_run, message=message)
    for name, what in pushed.changes.items():
        click.echo(f'{what.capitalize():10} {name}')
    if not pushed.changes:
        click.echo(f'{pushed.repo} has all of {folder} already')
    elif dry_run:
        click.echo('Nothing sent: leave out --dry-run to publish')
    else:
        click.echo(f'Published  {pushed.address}')


def _size(config: Any) -> str:
    return 'x'.join(map(str, config.input_size))


def _some(names: tuple[str, ...]) -> str:
    shown = ', '.join(names[:8])
    return shown if len(names) <= 8 else f'{shown}, ... ({len(names)} in all)'


if __name__ == '__main__':
    sys.exit(main())
