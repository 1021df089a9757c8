"""Fits what accuracy to expect of a published hypernetwork, and writes expectation.json into its folder.

    python hub/expectation.py hub/resnet18.mixed --domain .data/cifar10/test

Sketches of groups of seen classes, drawn from the recipe's own data, are what distances are measured from. Accuracy is
learned from held-out sets, each of 2 to 20 classes with 3 to 20 labels, tested on other images of these classes: of the
unseen classes of each of the recipe's sets, of every --domain, and of three domains that are made here (letters in many
fonts, textures, cells). A third of the sets is seen as it is, a third under an imaging condition as in training, a third
under a stronger one than any in training. Fit and check share no image and no domain: each domain is expected by a fit
of the others alone. (Some of Tiny-ImageNet's classes show what classes of CIFAR-10 and unseen ones of CIFAR-100 do.)
matplotlib brings the fonts (`pip install -e '.[train]'`).
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from timm_pudnet import PudNet, load_hypernet, open_images
from timm_pudnet.adapt import centroid_logits, class_centroids
from timm_pudnet.config import InputConfig, PudNetError, same_names
from timm_pudnet.evaluation import TestGroups, weights_digest
from timm_pudnet.evaluation.expectation import Expectation, HeldOutSet, fit_expectation, measure_traits, sketch_distance
from timm_pudnet.evaluation.measure import group_sketch, support_features
from timm_pudnet.files import config_sha256
from timm_pudnet.images import ImageSource
from timm_pudnet.target import create_feature_model
from timm_pudnet.training import Recipe
from timm_pudnet.training.conditions import Condition
from timm_pudnet.training.episodes import ImageBank, bank_input

SIDE = 32  # of the images made here, before they are resized as a user's of that size are
EACH = 100  # most images a class of a held-out domain
SEEN = 40  # images of each seen class
SHOTS = (3, 5, 10, 20)  # labelled images a class of a held-out set
REFERENCES = 32  # groups of each of the recipe's sets
SIZES = {4: (2, 2), 16: (4, 4), 64: (8, 8), 256: (8, 32)}  # images: classes, images a class


def main() -> None:
    """Reads the arguments, measures, fits, writes and says how well it held."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('folder', type=Path, help='of the hypernetwork, with its recipe.toml')
    parser.add_argument('--domain', action='append', default=[], help='folder of one more held-out domain')
    parser.add_argument('--sets', type=int, default=60, help='held-out sets a domain')
    options = parser.parse_args()
    hypernet, recipe = load_hypernet(options.folder), Recipe.load(options.folder / 'recipe.toml')
    seen_names, config = set(hypernet.config.class_names), bank_input(hypernet.config.input)

    seen: list[ImageBank] = []
    domains: list[tuple[str, ImageBank]] = []  # two splits of one set are one domain, of two banks
    for data in recipe.data:
        source = open_images(data.images, input=config, split=data.split, data_dir=data.data_dir)
        known = same_names(source.class_names, seen_names)
        names = [name for name in source.class_names if name in known]
        others = [name for name in source.class_names if name not in known]
        seen.append(_bank(source, names, SEEN))
        if len(others) > 1:
            domains.append((data.images, _unseen(data.images, source, others)))
    for folder in options.domain:
        source = open_images(folder, input=config)
        known = same_names(source.class_names, seen_names)
        others = [name for name in source.class_names if name not in known]
        domains.append((folder, _unseen(folder, source, others)))
    domains += [('letters', letters(config)), ('textures', textures(config)), ('cells', cells(config))]
    for _, bank in domains:
        bank.check_size(config)

    references, sizes, familiar = _seen_sketches(hypernet, seen, recipe.groups.conditions)
    model = create_feature_model(hypernet.target).eval()
    sets = []
    for place, (name, bank) in enumerate(domains):
        sets += [_held_out(hypernet, model, name, bank, references, 1000 * place + i) for i in range(options.sets)]
        mean = sum(one.right / one.total for one in sets[-options.sets :]) / options.sets
        print(f'{name}: {options.sets} sets of {len(bank.class_names)} classes, mean accuracy {mean:.1%}', flush=True)
    found = fit_expectation(
        sets,
        weights_digest=weights_digest(hypernet),
        config_sha256=config_sha256(options.folder),
        references=references,
        sizes=sizes,
        familiar=familiar,
    )
    path = found.save(options.folder)
    for name, row in [('all', found.check), *found.check['domains'].items()]:
        print(
            f'{name:28} rank correlation {row["rank_correlation"]:.3f}, mean error {row["mean_error"]:.3f}, '
            f'in the 95 % interval {row["coverage"]:.1%}, unlike anything seen {_unlike(found, sets, name):.1%}'
        )
    print(f'rank correlation at equal classes: {found.check["rank_correlation_at_equal_classes"]:.3f}', end='; ')
    print(f'of the first guess alone: {found.check["rank_correlation_of_sketch"]:.3f}', end='; ')
    print(f'of leave-one-out alone: {found.check["rank_correlation_of_leave_one_out"]:.3f}')
    print(f'Wrote {path}')


def _unlike(found: Expectation, sets: list[HeldOutSet], domain: str) -> float:
    rows = [one.traits for one in sets if domain in ('all', one.domain)]
    return sum(found.familiarity(one.distance, one.images) == 'unlike' for one in rows) / len(rows)


def _bank(source: ImageSource, names: list[str], each: int) -> ImageBank:
    generator = torch.Generator().manual_seed(0)
    picks = []
    for name in names:
        members = (source.labels == source.class_names.index(name)).nonzero().flatten()
        picks.append(members[torch.randperm(len(members), generator=generator)[:each]])
    return ImageBank.from_source(source.subset(torch.cat(picks)), names)


def _unseen(domain: str, source: ImageSource, names: list[str]) -> ImageBank:
    """The images of the unseen classes of a domain; exits where they are too few for the smallest held-out set."""
    bank = _bank(source, names, EACH) if len(names) > 1 else None
    if bank is None or min(map(len, bank.members)) <= SHOTS[0]:
        sys.exit(
            f'{domain}: two classes that the hypernetwork has not seen are needed, each of {SHOTS[0] + 1} images or more'
        )
    return bank


@torch.inference_mode()
def _seen_sketches(
    hypernet: PudNet, banks: list[ImageBank], share: float
) -> tuple[Tensor, list[int], list[tuple[float, float]]]:
    """References, and of other groups of each size the 95 % quantile and the largest of their distances."""

    def sketches(bank: ImageBank, size: int, seed: int) -> list[Tensor]:
        n_way, n_shot = SIZES[size]
        n_way = min(n_way, len(bank.class_names))
        drawn = TestGroups.draw(
            bank, count=REFERENCES, n_way=n_way, n_shot=n_shot, n_query=1, seed=seed, conditions=True
        )
        return [
            _sketch(hypernet, bank, drawn, i, drawn.conditions[i] if i < share * REFERENCES else None)
            for i in range(REFERENCES)
        ]

    references = torch.stack([sketch for bank in banks for sketch in sketches(bank, 64, 0)])
    references = (references * 1000).round() / 1000
    familiar = []
    for size in SIZES:
        distances = [sketch_distance(sketch, references) for bank in banks for sketch in sketches(bank, size, size)]
        familiar.append((float(torch.tensor(distances).quantile(0.95)), max(distances)))
    return references, list(SIZES), familiar


def _sketch(hypernet: PudNet, bank: ImageBank, drawn: TestGroups, number: int, condition: Condition | None) -> Tensor:
    shown = None if condition is None else (condition,)
    one = TestGroups(drawn.support[number : number + 1], drawn.query[number : number + 1], shown)
    return group_sketch(hypernet, one.images(0, bank, None, hypernet.config.input, hypernet.device)[0])[0]


@torch.inference_mode()
def _held_out(
    hypernet: PudNet, model: nn.Module, domain: str, bank: ImageBank, references: Tensor, seed: int
) -> HeldOutSet:
    """One set of a domain, its traits and its test."""
    generator = torch.Generator().manual_seed(seed)
    ways = [k for k in (2, 3, 5, 10, 20) if k <= len(bank.class_names)]
    n_way = ways[int(torch.randint(len(ways), (), generator=generator))]
    least = min(len(members) for members in bank.members)
    shots = [count for count in SHOTS if count < least]
    n_shot = shots[int(torch.randint(len(shots), (), generator=generator))]
    condition = (None, _mild(generator, bank), _strong(generator, bank))[seed % 3]
    n_query = min(max(300 // n_way, 15), least - n_shot)
    drawn = TestGroups.draw(bank, count=1, n_way=n_way, n_shot=n_shot, n_query=n_query, seed=seed)
    drawn = TestGroups(drawn.support, drawn.query, None if condition is None else (condition,))
    support, query = drawn.images(0, bank, None, hypernet.config.input, hypernet.device)
    sketch, size = group_sketch(hypernet, support)
    features = torch.cat(
        [f for f, _ in support_features(model, hypernet(sketch, size), support, hypernet.config.calibration)]
    )
    tested = torch.cat([model(images) for images, _ in query.batches()])
    centroids = class_centroids(features, support.labels, n_way)
    right = centroid_logits(tested, centroids, 1.0, hypernet.whitening).argmax(1) == query.labels
    traits = measure_traits(sketch, features, support.labels, hypernet.whitening, references)
    return HeldOutSet(domain=domain, traits=traits, right=int(right.sum()), total=len(right))


def _mild(generator: torch.Generator, bank: ImageBank) -> Condition:
    """A condition as in training, for images of this size."""
    chans, height, width = bank.images.shape[1:]
    return Condition.draw(generator, chans, square=height == width)


def _strong(generator: torch.Generator, bank: ImageBank) -> Condition:
    """A condition with more noise and a gamma farther from 1 than any of training."""
    noise, gamma, side = torch.rand(3, generator=generator).tolist()
    gamma = 2 + 3 * gamma
    drawn = _mild(generator, bank)
    return dataclasses.replace(drawn, noise=0.1 + 0.4 * noise, gamma=gamma if side < 0.5 else 1 / gamma)


def letters(config: InputConfig) -> ImageBank:
    """Capital letters in many fonts and two colours, turned and shifted a little."""
    wanted = ('DejaVuSans', 'DejaVuSerif', 'STIXGeneral', 'cmr', 'cmtt', 'cmss', 'cmb10')
    found = sorted((Path(matplotlib.get_data_path()) / 'fonts/ttf').glob('*.ttf'))
    fonts = [str(path) for path in found if path.stem.startswith(wanted) and 'Display' not in path.stem]
    rng, alphabet, images = np.random.default_rng(0), 'ABCDEFGHIJKLMNOPQRSTUVWXYZ', []
    for letter in alphabet:
        for _ in range(EACH):
            paper = ink = rng.integers(0, 256, 3)
            while abs(int(paper.sum()) - int(ink.sum())) < 150:
                ink = rng.integers(0, 256, 3)
            image = Image.new('RGB', (2 * SIDE, 2 * SIDE), tuple(map(int, paper)))
            font = ImageFont.truetype(fonts[rng.integers(len(fonts))], int(rng.integers(34, 52)))
            place = tuple(float(SIDE + shift) for shift in rng.integers(-5, 6, 2))
            ImageDraw.Draw(image).text(place, letter, fill=tuple(map(int, ink)), font=font, anchor='mm')
            turned = image.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC, fillcolor=tuple(map(int, paper)))
            images.append(np.asarray(turned.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
    return _made(images, list(alphabet), config)


def textures(config: InputConfig) -> ImageBank:
    """Gratings of four directions and three widths in any two colours, under noise."""
    rng, images = np.random.default_rng(0), []
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    classes = [(math.pi * turn / 4, waves) for turn in range(4) for waves in (2, 4, 7)]
    for direction, waves in classes:
        for _ in range(EACH):
            angle, count = direction + rng.normal(0, 0.25), waves * math.exp(rng.normal(0, 0.2))
            along = x * math.cos(angle) + y * math.sin(angle)
            wave = 0.5 + 0.5 * np.sin(2 * math.pi * (count * along + rng.uniform()))[..., None]
            first, second = rng.uniform(0, 255, (2, 3))
            images.append(first + (second - first) * wave + rng.normal(0, 25, (SIDE, SIDE, 3)))
    return _made(images, [f'texture {number}' for number in range(len(classes))], config)


def cells(config: InputConfig) -> ImageBank:
    """Dark discs on a bright ground, few to many, small to large, as of a stained section."""
    rng, images = np.random.default_rng(0), []
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    classes = [(count, radius) for count in (1, 4, 12) for radius in (2.0, 3.5, 5.0)]
    for count, radius in classes:
        for _ in range(EACH):
            image = np.array([225.0, 200.0, 215.0]) + rng.normal(0, 15, 3) + rng.normal(0, 8, (SIDE, SIDE, 3))
            for _ in range(max(1, int(rng.poisson(count)))):
                (left, top), size = rng.uniform(2, SIDE - 2, 2), radius * math.exp(rng.normal(0, 0.2))
                disc = 1 / (1 + np.exp(np.hypot(x - left, y - top) - size))[..., None]
                image = image * (1 - disc) + disc * (np.array([110.0, 50.0, 130.0]) + rng.normal(0, 20, 3))
            images.append(image)
    return _made(images, [f'cells {number}' for number in range(len(classes))], config)


def _made(images: list[np.ndarray], names: list[str], config: InputConfig) -> ImageBank:
    """Images that were drawn here, as a prediction would see them."""
    pixels = np.stack(images).clip(0, 255).astype(np.uint8)
    labels = [name for name in names for _ in range(EACH)]
    return ImageBank.from_source(open_images(pixels, labels, input=config), names)


if __name__ == '__main__':
    try:
        main()
    except (PudNetError, OSError) as error:
        print(f'Error: {error}', file=sys.stderr)
        sys.exit(2)
