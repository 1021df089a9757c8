"""`timm-pudnet finetune`: a predicted model, or another one, trained on."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

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
from timm_pudnet.evaluation import share_interval
from timm_pudnet.files import folder_path
from timm_pudnet.predict import save_model
from timm_pudnet.target import input_of
from timm_pudnet.training import FineTuning
from timm_pudnet.training.finetune import Mode


@main.command()
@click.argument('model')
@click.argument('images')
@click.option('--out', required=True, type=FOLDER, help='New folder for the model, in timm format.')
@click.option(
    '--mode',
    type=click.Choice(get_args(Mode)),
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
    '--hypernet', help='The hypernetwork, where MODEL is an architecture: a name, a folder, or org/name on the Hub.'
)
@click.option(
    '--seed', type=SEED, default=0, show_default=True, help='Of the images kept aside, their order and changes.'
)
@device_option
@strict_option
@data_options('train')
def finetune(
    model: str,
    images: str,
    out: Path,
    mode: Mode,
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
    check_paths(images, out, data_dir)
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
    click.echo(f'Classes    {some(run.images.class_names)}')
    click.echo(f'Kept aside {kept:,} of them to know when to stop, {len(run.images.labels):,} are trained on')
    click.echo(
        f'Tuning     {total / 1e6:.1f}M weights on {next(run.model.parameters()).device}, on images of '
        f'{size_of(input_of(run.model))}, {_MODES[run.mode]}: first the head, then all, at most '
        f'{run.tuning.epochs} epochs'
    )
    try:
        run.run()
    except KeyboardInterrupt:
        if not run.history:
            raise
        click.echo(f'Interrupted after {len(run.history)} of {run.tuning.epochs} epochs', err=True)
    save_model(run.result(), out)  # before a word that a closed pipe cannot take
    last = run.history[-1]
    click.echo(f'Trained    {last["epoch"]} epochs in {last["seconds"]:.0f} s; kept: {_kept(run.best_epoch)}')
    if run.held is not None:
        best = run.best
        assert best is not None
        low, high = share_interval(best['right'], kept)
        given = folder_path(model).is_dir()
        flattered = ' (flattered, if it was predicted from these images)' if given else ''
        was = '' if run.before is None else f'; {run.before["accuracy"]:.1f}% before{flattered}'
        click.echo(
            f'Accuracy   {best["accuracy"]:.1f}% on the images kept aside ({best["right"]} of {kept}; 95 % interval '
            f'{low:.1%} to {high:.1%}{was}). They chose the epoch: new images may do a little worse'
        )
    click.echo(f'Wrote      {out} (timm format). {loading(out)}\n')


_MODES = {'few': 'as for few images', 'full': 'as for many images'}


def _kept(epoch: int) -> str:
    return f'the model after epoch {epoch}' if epoch else 'the model as it was, since none was better'
