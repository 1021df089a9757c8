"""`timm-pudnet info` and `list`: what a hypernetwork is or would be, and which are at hand."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from pathlib import Path
from typing import Any

import click
import timm

from timm_pudnet.cli.group import main, size_of, some, was_given
from timm_pudnet.config import MIN_PREDICTED, InputError, shown
from timm_pudnet.devices import copy_speed
from timm_pudnet.hub import describe_hypernet, list_hypernets
from timm_pudnet.hypernet import plan_hypernet, plan_of
from timm_pudnet.target import check_architecture


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
    if '.' in name and timm.models.is_model_pretrained(name):
        check_architecture(name)  # says that it goes without the tag
    if re.search(r'[./:]', name) or (not timm.is_model(name) and (Path(name) / 'config.json').is_file()):
        found = describe_hypernet(name)
        for option in click.get_current_context().command.params:
            if isinstance(option, click.Option) and was_given(option.name or ''):
                raise InputError(f'{option.opts[0]} is for a new hypernetwork, {name} is one already: leave it out')
        click.echo(f'Hypernet   {found}')
        assert found.config is not None  # as of all but those listed by the Hub
        assert found.folder is not None
        config, model_name = found.config, found.model_name
        if config.class_names:  # denoisers have none
            click.echo(f'Seen       {len(config.class_names)} classes: {some(config.class_names)}')
        click.echo(f'Input      {size_of(config.input)}, mean {config.input.mean}')
        training = (f'{shown(key)} {shown(value)}' for key, value in config.training.items())
        click.echo(f'Training   {", ".join(training) or "not told"}')
        plan, file = plan_of(found.folder), f'a file of {found.size / 1e6:.0f} MB'
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
        file = f'a file of about {plan.file_bytes / 1e6:.0f} MB'
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
        f"the target's, {file}; sketches of width {plan.config.sketch_width}"
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
    for read in (json.loads, ast.literal_eval):  # true as in a recipe, and True as in Python
        with contextlib.suppress(ValueError, SyntaxError):
            return key, read(value)
    return key, value


@main.command(name='list')
@click.option('--hub', is_flag=True, help='Ask the Hugging Face Hub too for those that are not at hand.')
def list_command(hub: bool) -> None:
    """List the hypernetworks at hand: name, where it is, measured accuracy, size, licence."""
    found = list_hypernets(hub=hub)
    if not found:
        click.echo('No hypernetwork is at hand: train one (timm-pudnet train) and name its folder')
    for info in found.values():
        click.echo(str(info))
