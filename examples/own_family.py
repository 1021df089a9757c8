"""Your own family of image sets: train a hypernetwork on some of them, measure it on one that it has not seen, use it.

    python examples/own_family.py family/ --start resnet18.mixed56 --out my-hypernet    # goes on with a published one
    python examples/own_family.py family/ --out my-other                                # from random weights

FAMILY has a folder for each set, and each of these one for each class: family/cups/handle/0001.png. The last set by
name is kept for the test; its classes, and how they look, are then new to the hypernetwork. The control, the same
network trained as an ordinary classifier on as many images, tells whether it was worth it. From random weights it takes
dozens of classes and hundreds of thousands of images: an ordinary classifier is trained first, and the hypernetwork
begins with it, for a fifth of the images.
"""

import dataclasses
import re
from pathlib import Path

import click

import timm_pudnet
from timm_pudnet.evaluation import TestGroups, evaluate, format_table
from timm_pudnet.training import Data, Groups, Recipe, Schedule, meta_train, train_plain
from timm_pudnet.training.episodes import ImageBank, bank_input


@click.command(help=__doc__)
@click.argument('family', type=click.Path(path_type=Path, exists=True))
@click.option('--start', default='', help='Hypernetwork that training goes on with, in place of --model and --side.')
@click.option('--model', 'model_name', default='resnet18', show_default=True)
@click.option('--side', default=32, show_default=True, help='Height and width of the input in pixels.')
@click.option('--images', default=50_000, show_default=True, help='Seen in training; the first thing to raise.')
@click.option('--n-shot', default=5, show_default=True, help='Labelled images a class in the test.')
@click.option('--groups', default=200, show_default=True, help='Of the test.')
@click.option('--out', type=click.Path(path_type=Path), required=True, help='New folder for the hypernetwork.')
def main(
    family: Path, start: str, model_name: str, side: int, images: int, n_shot: int, groups: int, out: Path
) -> None:
    sets = sorted(path for path in family.iterdir() if path.is_dir() and not path.name.startswith('.'))
    if len(sets) < 2:
        raise click.UsageError(f'{family} holds {len(sets)} folders: two sets at least, one of them for the test')
    if (out / 'config.json').exists():
        raise click.UsageError(f'{out} holds a hypernetwork already: choose another folder')
    *seen, unseen = sets
    print(f'trained on {", ".join(path.name for path in seen)}; tested on {unseen.name}')
    tag = re.sub(r'[^A-Za-z0-9_-]+', '_', family.resolve().name)
    data = tuple(Data(images=str(path)) for path in seen)
    classes = sum(child.is_dir() for path in seen for child in path.iterdir())
    each = Groups(n_way=min(64, classes), n_shot=2, n_query=2, per_step=max(1, 64 // classes))
    if start:  # it has learned: small steps
        config = timm_pudnet.load_hypernet(start).config
        schedule = Schedule(images=images, optimizer='sgd', rate=0.005, sketch_rate=1e-4, fixed_statistics=True)
    else:  # an ordinary classifier first
        size = timm_pudnet.InputConfig(input_size=(3, side, side))
        config = timm_pudnet.PudNetConfig(model_name=model_name, generator='residual', prior_images=400, input=size)
        first = Schedule(images=images, optimizer='sgd', rate=0.2, weight_decay=5e-4)
        base = out / 'base'
        if not base.exists():
            out.mkdir(exist_ok=True)
            train_plain(Recipe(hypernet=config, data=data, groups=each, schedule=first), out / 'run-base', result=base)
        start = str(base)
        schedule = dataclasses.replace(first, images=images // 5, rate=0.005, sketch_rate=1e-4, fixed_statistics=True)
    recipe = Recipe(
        hypernet=dataclasses.replace(config, tag=tag, class_names=(), training={}, sketch_limit=0.0, sketch_gate=False),
        data=data,
        groups=each,
        schedule=schedule,
        start=start,
    )
    bank = ImageBank.from_source(timm_pudnet.open_images(unseen, input=bank_input(recipe.hypernet.input)))
    ways = min(5, len(bank.class_names))
    drawn = TestGroups.draw(bank, count=groups, n_way=ways, n_shot=n_shot, n_query=n_shot)

    hypernet = meta_train(recipe, out / 'run')  # goes on where it was stopped
    plain = train_plain(recipe, out / 'run-plain')
    hypernet.save_pretrained(out, half=True)
    print(format_table(evaluate(hypernet, bank, drawn, controls={'plain': plain})))
    model = timm_pudnet.predict_model(config.model_name, unseen, hypernet=out)
    print(f'a {config.model_name} for the {model.num_classes} classes of {unseen.name}; predict with --hypernet {out}')


if __name__ == '__main__':
    main()
