"""`timm-pudnet pull` and `push`: from the Hugging Face Hub and to it."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from timm_pudnet import hub
from timm_pudnet.cli.group import FOLDER, main


@main.command()
@click.argument('name')
def pull(name: str) -> None:
    """Fetch the hypernetwork NAME from the Hugging Face Hub, or bring it up to date: org/name or org/name@revision."""
    folder = hub.pull(name)
    info = hub.describe_hypernet(folder)
    click.echo(f'At hand    {folder} ({info.size / 1e6:.0f} MB, {info.license or "no licence"})')
    denoises = info.model_name == 'blindspot_unet'
    words = 'denoise NOISY --out denoised' if denoises else f'predict {info.model_name} IMAGES'
    if Path(name).is_dir():  # which would be taken for it
        name = f'hf-hub:{name}' if '/' in name else str(folder)
    click.echo(f'\n    timm-pudnet {words} --hypernet {shlex.quote(name)}\n')


@main.command()
@click.argument('folder', type=FOLDER)
@click.argument('repo')
@click.option('--dry-run', is_flag=True, help='Only check, and say what would change.')
@click.option('--private', is_flag=True, help='Make the repository private, where it is made.')
@click.option('--license', 'license_', help='Of the card, where FOLDER has no README.md that says one.')
@click.option('--message', default='Upload by timm-pudnet', show_default=True, help='Of the commit.')
def push(folder: Path, repo: str, dry_run: bool, private: bool, license_: str | None, message: str) -> None:
    """Publish FOLDER, a hypernetwork or a predicted model, as REPO (org/name) on the Hugging Face Hub."""
    pushed = hub.push(folder, repo, license=license_, private=private, dry_run=dry_run, message=message)
    for name, what in pushed.changes.items():
        click.echo(f'{what.capitalize():10} {name}')
    if not pushed.changes:
        click.echo(f'{pushed.repo} has all of {folder} already')
    elif dry_run:
        click.echo('Nothing sent: leave out --dry-run to publish')
    else:
        click.echo(f'Published  {pushed.address}')
