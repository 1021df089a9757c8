"""`timm-pudnet compare`: predicted, fine-tuned, trained from scratch and pretrained, on the same images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from timm_pudnet import evaluation
from timm_pudnet.cli.group import (
    FOLDER,
    SEED,
    check_paths,
    data_options,
    device_option,
    main,
    strict_option,
)
from timm_pudnet.devices import usable_device
from timm_pudnet.files import written_whole


@main.command()
@click.argument('model_name')
@click.argument('images')
@click.option('--out', type=FOLDER, help='New folder for compare.json, compare.txt, compare.png.')
@click.option(
    '--hypernet',
    help='Hypernetwork: a name, a folder, or org/name on the Hub; by default the one that serves MODEL_NAME.',
)
@click.option('--epochs', default=20, show_default=True, help='Passes over the images of each training.')
@click.option('--budget', type=float, help='Seconds after which no further epoch is begun; by default no limit.')
@click.option('--holdout', default=0.25, show_default=True, help='Share of the images that is tested.')
@click.option('--pretrained', help="Name of the pretrained weights beside, or none; by default MODEL_NAME's own.")
@click.option(
    '--seed', type=SEED, default=0, show_default=True, help='Of the tested images and of all that training draws.'
)
@device_option
@strict_option
@data_options('train')
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
    check_paths(images, out, data_dir)
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
