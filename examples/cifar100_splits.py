"""How much does the choice of unseen classes matter on CIFAR-100? A short recipe on several choices of 20 of the 100.

    python examples/cifar100_splits.py splits.json --out choices.json

`splits.json` names the unseen classes of each choice: `{"cifar100-set": {NAME: {"unseen": [CLASS, ...]}}}`. Takes the
first two recipes of `hub/resnet18.cifar100_superclass`, shortened: an ordinary ResNet-18 of the seen classes, then the
hypernetwork that starts from it. Trains both once for every choice in the file, and measures each on groups of its
unseen classes, beside the ordinary ResNet-18 that it started from (*base*: it has seen `--images` fewer). Choices that
are in the output file already are not trained again, so it can be stopped and started.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import choices

import timm_pudnet
from timm_pudnet.evaluation import TestGroups, mean_interval
from timm_pudnet.training import ImageBank, Recipe, meta_train, train_plain
from timm_pudnet.training.episodes import bank_input

RECIPES = Path(__file__).parents[1] / 'hub' / 'resnet18.cifar100_superclass'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('splits', type=Path, help='JSON: {"cifar100-set": {name: {"unseen": [class, ...]}}}')
    parser.add_argument('--data', default='.data/cifar100', help='folder with train and test, a folder a class in each')
    parser.add_argument('--base-images', type=int, default=120_000, help='images that the first training sees')
    parser.add_argument('--images', type=int, default=8_000, help='images that the hypernetwork sees')
    parser.add_argument('--groups', type=int, default=500, help='test groups of each choice')
    parser.add_argument('--out', type=Path, required=True)
    arguments = parser.parse_args()

    first, second = (Recipe.load(RECIPES / name) for name in ('base.toml', 'first.toml'))
    banks = {}
    for split in ('train', 'test'):
        source = timm_pudnet.open_images(f'{arguments.data}/{split}', input=bank_input(second.hypernet.input))
        banks[split] = ImageBank.from_source(source)
    names = banks['train'].class_names
    splits = json.loads(arguments.splits.read_text())['cifar100-set']
    for key, choice in sorted(splits.items()):
        if choices.has(arguments.out, settings(arguments), key):
            continue
        seen = [name for name in names if name not in choice['unseen']]
        bank = banks['train'].select(seen)
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder) / 'base'
            recipe = shortened(first, seen, arguments.base_images)
            control = train_plain(recipe, banks=[bank], progress=False)
            timm_pudnet.save_model(control[0], base)
            recipe = dataclasses.replace(shortened(second, seen, arguments.images), start=str(base))
            hypernet = meta_train(recipe, banks=[bank], progress=False)
        test = banks['test'].select(choice['unseen'])
        groups = TestGroups.draw(test, count=arguments.groups, n_way=5)
        result = timm_pudnet.evaluate(
            hypernet,
            test,
            groups,
            controls={'base': control},
            without=('mean_sketch', 'random_weights'),
            progress=False,
        )
        choices.add(arguments.out, settings(arguments), key, result, summary)


def shortened(recipe, seen, images):
    """A recipe with other classes and a shorter schedule."""
    return dataclasses.replace(
        recipe,
        data=(dataclasses.replace(recipe.data[0], classes=tuple(seen), unseen=()),),
        schedule=dataclasses.replace(recipe.schedule, images=images),
    )


def settings(arguments):
    """What all choices in one file have in common."""
    return {
        'base_images_each': arguments.base_images,
        'images_each': arguments.images,
        'groups_each': arguments.groups,
    }


def summary(done):
    """Mean over the random choices; the interval is that of the choices, each one value."""
    random = [choice for key, choice in done.items() if key.startswith('random')]
    arms = next(iter(done.values()))['accuracy']
    means = {name: [choice['accuracy'][name]['mean'] for choice in random] for name in arms}
    return {
        'number_of_random_choices': len(random),
        'mean_over_random_choices': {name: mean_interval(values) for name, values in means.items() if len(values) > 1},
        'choices': done,
    }


if __name__ == '__main__':
    main()
