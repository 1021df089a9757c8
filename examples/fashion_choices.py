"""How much does the choice of unseen classes matter? A short recipe on 20 of the 210 choices of four of Fashion-MNIST.

    python examples/fashion_choices.py --data-dir .data --out choices.json

Takes the recipe of `hub/resnet18.fashion_set`, shortened, trains it once for every tenth choice in lexical order of the
unseen classes ({0, 1, 2, 3} is the first), and measures each on groups of its four unseen classes. Choices that are
in the output file already are not trained again, so it can be stopped and started.
"""

import argparse
import dataclasses
import itertools
from pathlib import Path

import choices

import timm_pudnet
from timm_pudnet.evaluation import TestGroups, mean_interval
from timm_pudnet.training import ImageBank, Recipe, meta_train
from timm_pudnet.training.episodes import bank_input

RECIPE = Path(__file__).parents[1] / 'hub' / 'resnet18.fashion_set' / 'recipe.toml'
PUBLISHED = (6, 7, 8, 9)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', default='.data', help="root of torchvision's FashionMNIST")
    parser.add_argument('--images', type=int, default=12_000, help='images that each training sees')
    parser.add_argument('--groups', type=int, default=30, help='test groups of each choice')
    parser.add_argument('--out', type=Path, required=True)
    arguments = parser.parse_args()

    base = Recipe.load(RECIPE)
    input_config = bank_input(base.hypernet.input)
    sources = {
        split: timm_pudnet.open_images(
            'torch/fashion_mnist', data_dir=arguments.data_dir, split=split, input=input_config
        )
        for split in ('train', 'test')
    }
    names = sources['train'].class_names
    banks = {split: ImageBank.from_source(source) for split, source in sources.items()}
    fours = [unseen for unseen in itertools.combinations(range(len(names)), 4) if unseen != PUBLISHED]
    for number, unseen in enumerate(fours[:200:10]):
        key = ' '.join(map(str, unseen))
        if choices.has(arguments.out, settings(arguments), key):
            continue
        seen = [name for label, name in enumerate(names) if label not in unseen]
        recipe = dataclasses.replace(
            base,
            data=(dataclasses.replace(base.data[0], classes=tuple(seen)),),
            schedule=dataclasses.replace(base.schedule, images=arguments.images),
        )
        hypernet = meta_train(recipe, banks=[banks['train'].select(seen)], progress=False)
        test = banks['test'].select([names[label] for label in unseen])
        groups = TestGroups.draw(test, count=arguments.groups, n_way=4, seed=number)
        result = timm_pudnet.evaluate(hypernet, test, groups, progress=False)
        choices.add(arguments.out, settings(arguments), key, result, summary)


def settings(arguments):
    """What all choices in one file have in common."""
    return {'images_each': arguments.images, 'groups_each': arguments.groups}


def summary(done):
    """Means over choices; the interval is that of the choices, each one value."""
    arms = next(iter(done.values()))['accuracy']
    if len(done) < 2:  # whose interval is none
        return {'number_of_choices': len(done), 'choices': done}
    return {
        'number_of_choices': len(done),
        'mean_over_choices': {
            name: mean_interval([choice['accuracy'][name]['mean'] for choice in done.values()]) for name in arms
        },
        'conditioning_gain': mean_interval([choice['conditioning_gain']['mean'] for choice in done.values()]),
        'choices': done,
    }


if __name__ == '__main__':
    main()
