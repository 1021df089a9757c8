"""`timm-pudnet predict`: a model for a set of images, its test on images kept aside, and a page about both."""

from __future__ import annotations

import dataclasses
import importlib.util
import platform
import time
import warnings
from pathlib import Path
from typing import Any, get_args

import click
import torch
from torch import nn

from timm_pudnet import evaluation
from timm_pudnet.adapt import MANY_LABELS
from timm_pudnet.cli.group import (
    FOLDER,
    SEED,
    check_paths,
    data_options,
    device_option,
    loading,
    main,
    size_of,
    some,
    strict_option,
)
from timm_pudnet.config import InputError, PudNetWarning
from timm_pudnet.devices import library_versions, machine, usable_device
from timm_pudnet.evaluation.expectation import IN_WORDS, MOST_IMAGES, Expectation
from timm_pudnet.evaluation.holdout import HeldOutTest
from timm_pudnet.evaluation.report import Report, some_images
from timm_pudnet.files import config_sha256, sha256
from timm_pudnet.hub import resolve_hypernet
from timm_pudnet.hypernet import PudNet
from timm_pudnet.images import ImageSource, open_images
from timm_pudnet.predict import Head, predict_model, save_model

# Labelled images a class, from which on a head is measurably better than class centroids, and than those before it.
_BETTER_HEADS = {20: 'blend', MANY_LABELS: 'logistic'}


@dataclasses.dataclass(kw_only=True)
class _Prediction:
    """What is predicted from, and what comes of it step by step.

    Args:
        model_name: timm architecture.
        network: The hypernetwork.
        source: All images.
        head: That the model gets, if there are labels.
        device: Where all of it runs.
        used: The images that give the weights.
        tested: Those kept aside, if some are.
        unlabelled: Those that teach the head alone, if there are some.
        notes: What the page says besides.
        told: What the page says of the accuracy to expect.
    """

    model_name: str
    network: PudNet
    source: ImageSource
    head: Head
    device: torch.device
    used: ImageSource
    tested: ImageSource | None
    unlabelled: ImageSource | None
    notes: list[str] = dataclasses.field(default_factory=list)
    told: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: Any = dataclasses.field(init=False, default=None)  # of timm
    seconds: float = dataclasses.field(init=False, default=0.0)  # of predicting
    sketch: str = dataclasses.field(init=False, default='')  # what came of it, in words
    test: HeldOutTest | None = dataclasses.field(init=False, default=None)

    def predict(self) -> None:
        """Predicts the model, from all images where a class cannot be read among those that are used, and says so."""
        started = time.perf_counter()
        try:
            self.model = self._predicted()
        except InputError:
            if self.tested is None or self.used.labels is None or not _a_class_is_unread(self.used):
                raise
            # The class may have readable images among those that were kept aside: all are used.
            self._note('Too few images of a class can be read to keep one aside: all gave the weights, none is tested.')
            self.used, self.tested, started = self.source, None, time.perf_counter()
            self.model = self._predicted()
        self.seconds = time.perf_counter() - started
        self.sketch = _said_by_sketch(self.network, self.model)
        click.echo(
            f'Predicted  {self.num_weights / 1e6:.1f}M weights of {self.model_name} with {self.network.name} in '
            f'{self.seconds:.2f} s'
        )
        if self.sketch:
            click.echo(f'Sketch     {self.sketch}')

    def _predicted(self) -> nn.Module:
        return predict_model(
            self.model_name,
            self.used,
            unlabelled=self.unlabelled,
            hypernet=self.network,
            head=self.head,
            device=self.device,
        )

    @property
    def num_weights(self) -> int:
        """Parameters of the model."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def measure(self, strict: bool) -> None:
        """Tests the model on the images kept aside, where there are some, and says how it did."""
        try:
            if self.tested is not None:
                self.test = evaluation.measure_held_out(self.model, self.used, self.tested, self.unlabelled)
        except InputError as error:
            if strict or self.tested is None or not self.tested.skipped:
                raise
            self._note(f'Not tested: {error}')  # none of them can be read; the model is there
        for row in () if self.test is None else self.test.lines():
            click.echo(row)

    def _note(self, text: str) -> None:
        self.notes.append(text)
        click.echo(f'Warning: {text}', err=True)

    def better_head(self) -> str:
        """The head that is usually better than class centroids with so many labels; none with few."""
        each = 0 if self.used.labels is None else len(self.used.labels) / max(1, self.model.num_classes)
        return next((head for many, head in reversed(_BETTER_HEADS.items()) if each >= many), '')

    def report(self, images: str) -> Report:
        """The page about the prediction, but for its facts, which the saved model gives."""
        skipped = sum(len(part.skipped) for part in (self.used, self.tested, self.unlabelled) if part is not None)
        notes = [*self.notes, *([f'{skipped:,} images could not be read and were left out.'] if skipped else [])]
        if self.unlabelled is not None:
            notes.append(
                f'{self.unlabelled.description} taught the head too; they are not shown here, and what raw pixels '
                'reach is by the labelled images alone.'
            )
        tiles = [
            ('Predicted in', f'{self.seconds:.2f} s', f'{self.num_weights / 1e6:.1f}M weights, on {self.device}'),
        ]
        if self.source.labels is not None:
            classes = f'{self.model.num_classes:,} classes' if self.model.num_classes else 'no head'
            gave = 'all gave the weights'
            if self.tested is not None or (self.used.skipped and not self.used.is_stream):
                gave = f'{len(self.used) - len(self.used.skipped):,} gave the weights'
            tiles.append(('Images', f'{len(self.source.labels):,}', f'{classes}; {gave}'))
        title = f'{self.model_name} for {images}'
        return evaluation.make_report(
            self.model, self.used, self.test, title=title, tiles=tiles, notes=notes, **self.told
        )

    def facts(self, command: str, out: Path, size: float) -> dict[str, str]:
        """How the model in folder `out`, of so many megabytes, was made."""
        facts = {
            'Command': command,
            'In the folder': str(Path.cwd()),
            'Images': self.source.description,
            'Hypernetwork': f'{self.network.name}, weights {evaluation.weights_digest(self.network)}',
            'Sketch': self.sketch,
            'Head': self.head if self.model.num_classes else 'none',
            'Unlabelled images': '' if self.unlabelled is None else self.unlabelled.description,
            'Input': size_of(self.network.config.input),
            'Model': f'{self.num_weights:,} weights, {size:.1f} MB on disk',
            'sha256 of model.safetensors': sha256(out / 'model.safetensors'),
            'Seconds of predicting': f'{self.seconds:.2f}, reading the images included',
            'Milliseconds an image': ''
            if self.test is None
            else f'{1000 * self.test.seconds / len(self.test.labels):.2f}, on {self.device}',
            'Machine': machine(self.device),
            'Versions': ', '.join(f'{name} {version}' for name, version in library_versions().items()),
            'Python': platform.python_version(),
        }
        return {name: fact for name, fact in facts.items() if fact}


@main.command()
@click.argument('model_name')
@click.argument('images')
@click.option('--out', type=FOLDER, help='New folder for the model, in timm format.')
@click.option(
    '--hypernet',
    help='Hypernetwork: name, folder or org/name on the Hub; by default the one that serves MODEL_NAME.',
)
@click.option(
    '--head',
    type=click.Choice(get_args(Head)),
    help='Classifier: class centroids (default), ridge regression, a blend of naive Bayes and ridge (for any number of '
    'labels; default with --unlabelled), logistic regression (for many), or none for a feature model.',
)
@click.option(
    '--unlabelled',
    help='More images of the same classes, without labels: a folder or a timm dataset name. The head learns from them '
    'too (self-training).',
)
@click.option(
    '--holdout', default=0.25, show_default=True, help='Share of the labelled images kept aside for the test.'
)
@click.option('--seed', type=SEED, default=0, show_default=True, help='Of the choice of images kept aside.')
@device_option
@strict_option
@click.option('--report/--no-report', default=True, help='Write a page about the prediction too, OUT/report.')
@data_options('train')
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
    if not 0 <= holdout < 1:
        raise InputError(f'--holdout must be in [0, 1), got {holdout}')
    check_paths(images, out, data_dir, unlabelled)
    network = resolve_hypernet(model_name, hypernet)
    expectation = _expectation_of(network)
    source = open_images(images, input=network.config.input, split=split, data_dir=data_dir, strict=strict)
    source.progress = True
    click.echo(f'Found      {source.description}')
    others = None
    if unlabelled is not None:
        others = open_images(
            unlabelled, input=network.config.input, split=split, data_dir=data_dir, strict=strict, with_labels=False
        )
        others.progress = True
        click.echo(f'Also       {others.description}, for the head')

    wanted: Head = head or ('centroid' if unlabelled is None else 'blend')
    used, tested = evaluation.split_held_out(source, holdout if wanted != 'none' else 0, seed)
    if source.class_names and source.labels is not None and wanted != 'none':
        click.echo(f'Classes    {some(source.class_names)}')
    note = ''
    if tested is not None:
        note = _said_of_single(source)
        click.echo(f'Kept aside {len(tested):,} of them for the test, {len(used):,} give the weights')
    elif source.labelled and holdout and wanted != 'none':
        why = (
            'these images tell their labels only as they are read, in order, so none is kept aside'
            if source.labels is None
            else 'no class has two images, so none is kept aside'
        )
        click.echo(f'Not tested {why}')
        note = f'Not tested: {why}.'
    run = _Prediction(
        model_name=model_name,
        network=network,
        source=source,
        head=wanted,
        device=usable_device(device),
        used=used,
        tested=tested,
        unlabelled=others,
    )
    click.echo(f'Device     {run.device}; images are seen at {size_of(network.config.input)}')
    run.predict()
    if expectation is not None:
        run.told = _expect(expectation, network, run.model, run.used, wanted)
    run.measure(strict)
    if run.test is not None and run.test.right_raw >= run.test.right:
        remedy = f'try --head {run.better_head() or "blend"}, or ' if wanted == 'centroid' else ''
        click.echo(f'Note       raw pixels do as well: {remedy}train a hypernetwork for images of this family')
    elif head is None and wanted == 'centroid' and (better := run.better_head()):
        click.echo(f'Note       with so many labels a class --head {better} is usually better than class centroids')
    if not source.labelled:
        click.echo(
            'No labels  the model gives features; put the images of each class into a subfolder for a classifier'
        )
    if out is None:
        click.echo('Not saved: add --out FOLDER to keep the model and a page about it')
        return

    run.notes += [note] if note else []
    page = run.report(images) if report else None
    save_model(run.model, out)
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    written = None
    if page is not None:
        facts = run.facts(context.meta['command'], out, size)
        try:
            written = dataclasses.replace(page, facts=facts).write(out / 'report')
        except OSError as error:  # the model is there all the same
            click.echo(f'Warning: the report could not be written: {error}', err=True)
    click.echo(f'Wrote      {out} ({size:.0f} MB, timm format). {loading(out)}')
    click.echo('    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n')
    if written is not None:
        click.echo(f'Report     {written}: open it in a browser; it needs no network')
        if importlib.util.find_spec('matplotlib') is None:
            click.echo('           Its plots are not there as PNG files: pip install matplotlib')


def _said_of_single(source: ImageSource) -> str:
    """Says which of the classes, if they have names, have but one image."""
    if not source.class_names or source.labels is None:
        return ''
    single = [name for label, name in enumerate(source.class_names) if (source.labels == label).sum() == 1]
    if not single:
        return ''
    alone = f'Only one image each, none kept aside: {some(single)}'
    click.echo(alone)
    return alone


def _said_by_sketch(network: PudNet, model: nn.Module) -> str:
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


def _a_class_is_unread(source: ImageSource) -> bool:
    """Whether no image of some class could be read in the latest pass."""
    assert source.labels is not None
    unread = {name for name, _ in source.skipped}
    read = {label for row, label in enumerate(source.labels.tolist()) if source.name(row) not in unread}
    return len(read) < len(source.labels.unique())


def _expectation_of(network: PudNet) -> Expectation | None:
    """The fitted expectation of a hypernetwork; None where it has none, or one of other weights."""
    if network.folder is None:
        return None
    found = Expectation.load(network.folder)
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


def _expect(
    expectation: Expectation, network: PudNet, model: nn.Module, used: ImageSource, head: Head
) -> dict[str, Any]:
    """Says what to expect of the model, and gives it as the report wants it."""
    told: dict[str, Any] = {}
    traits = evaluation.read_traits(network, model, used, expectation) if model.num_classes else None
    if traits is not None:
        accuracy, low, high = told['expected'] = expectation.expect(traits)
        of_what = '' if head == 'centroid' else ', of the centroid head'
        told['expected_from'] = expectation.in_words() + (of_what and ' It is of the centroid head.')
        told['familiarity'] = expectation.familiarity(traits.distance, traits.sketch_images or traits.images)
        click.echo(f'Expected   {accuracy:6.1%} before any test{of_what} (95 % interval {low:.1%} to {high:.1%})')
    elif not used.labelled:
        stream = network.streaming_sketch()
        for images, _ in some_images(used, MOST_IMAGES):
            stream.add(images)
        told['familiarity'] = expectation.familiarity(expectation.distance(stream.result()), stream.counts[0])
    if 'familiarity' in told:
        click.echo(f'           {IN_WORDS[told["familiarity"]]}')
    return told
