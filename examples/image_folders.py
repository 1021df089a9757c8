"""Writes an image set of torchvision as image folders, `<out>/<name>/<split>/<class>/<number>.png`, downloading it.

    python examples/image_folders.py CIFAR100 --out .data      # .data/cifar100/train/apple/00007.png, ...

The recipes of `hub/` read such folders; so does every other image tool.
"""

from pathlib import Path

import click
import torchvision
from tqdm import tqdm

SETS = ('CIFAR10', 'CIFAR100', 'FashionMNIST')


@click.command(help=__doc__)
@click.argument('name', type=click.Choice(SETS))
@click.option('--out', type=click.Path(path_type=Path), default='.data', show_default=True)
def main(name: str, out: Path) -> None:
    for split in ('train', 'test'):
        found = getattr(torchvision.datasets, name)(str(out), train=split == 'train', download=True)
        folder = out / name.lower() / split
        for number, (image, label) in enumerate(tqdm(found, desc=str(folder), unit='image')):
            path = folder / found.classes[label].replace('/', '-') / f'{number:05d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)


if __name__ == '__main__':
    main()
