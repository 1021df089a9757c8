"""What a rule from the pixels alone comes to under imaging conditions, beside a hypernetwork: a control for its sketch.

    python hub/undone.py HYPERNET IMAGES --train FOLDER

On the groups of HYPERNET/groups.conditions.json, which are of IMAGES. The rule knows no network and no label: a Gaussian
of 43 pixel statistics (means, covariances and skewness of the channels, the layout of brightness) of sets of 50 images
at 16x16, fitted to 1,000 sets of classes that were seen in training, of FOLDER, of any gamma and noise. Of the 6 orders
of the channels, 2 signs and 4 turns it takes those under which the support images are likeliest, and undoes them; then
the base network judges support and query as they are. Writes HYPERNET/undone.conditions.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from timm_pudnet import PudNet, open_images
from timm_pudnet.adapt import calibrate, centroid_logits, class_centroids
from timm_pudnet.config import PudNetError, same_names
from timm_pudnet.evaluation import TestGroups, mean_interval
from timm_pudnet.evaluation.measure import group_sketch
from timm_pudnet.files import weights_sha256, written_whole
from timm_pudnet.target import create_feature_model
from timm_pudnet.training import ImageBank
from timm_pudnet.training.conditions import Condition
from timm_pudnet.training.episodes import bank_input

SIDE = 16
SETS = 1000
RIDGE = 0.02  # on the correlations
IMAGES_A_CLASS = 40
GUESSES = [
    Condition(order=order, inverted=inverted, turns=turns)
    for order in itertools.permutations(range(3))
    for inverted in (False, True)
    for turns in range(4)
]


def undo(images: Tensor, guess: Condition) -> Tensor:
    """Images `[n, 3, h, w]` in 0-1 without the order, sign and turns of a condition."""
    places = torch.tensor(guess.order).argsort().tolist()
    return (1 - images if guess.inverted else images)[:, places].rot90(-guess.turns, (2, 3))


def small(images: Tensor) -> Tensor:
    """Images `[n, 3, h, w]` at 16x16, where noise is weak."""
    return F.adaptive_avg_pool2d(images, SIDE)


def statistics(images: Tensor) -> Tensor:
    """`[43]` of a set `[n, 3, h, w]` in 0-1."""
    values, means = images.transpose(0, 1).flatten(1), images.mean((2, 3))
    upper = torch.triu_indices(3, 3)
    layout = F.adaptive_avg_pool2d(images.mean((0, 1))[None], 4)
    within = images - means[..., None, None]
    pairs = torch.stack([(images[:, a] - images[:, b]).pow(3).mean() for a, b in ((0, 1), (1, 2), (0, 2))])
    return torch.cat(
        [
            values.mean(1),
            values.cov()[upper[0], upper[1]],
            means.t().cov()[upper[0], upper[1]],
            (values - values.mean(1, keepdim=True)).pow(3).mean(1),
            (layout - layout.mean()).flatten(),
            images.std((2, 3)).mean(0),
            within.pow(3).mean((0, 2, 3)),
            pairs,
        ]
    ).double()


class Rule:
    """Guesses order, sign and turns of a set; fitted to a bank of images `[classes, n, 3, h, w]` as they are."""

    def __init__(self, bank: Tensor, n_way: int, n_shot: int) -> None:
        generator = torch.Generator().manual_seed(1)
        rows = []
        for _ in tqdm(range(SETS), 'fitting the rule', leave=False):
            picks = torch.randperm(len(bank), generator=generator)[:n_way].tolist()
            chosen = [bank[label][torch.randperm(bank.shape[1], generator=generator)[:n_shot]] for label in picks]
            drawn = Condition.draw(generator)
            plain = dataclasses.replace(drawn, order=(0, 1, 2), inverted=False, turns=0)
            rows.append(statistics(small(plain.apply(torch.cat(chosen), generator))))
        found = torch.stack(rows)
        self.mean, self.scale = found.mean(0), found.std(0)
        self.precision = torch.linalg.inv(found.t().corrcoef() + RIDGE * torch.eye(len(self.mean)).double())

    def guess(self, images: Tensor) -> Condition:
        """The likeliest condition of images `[n, 3, h, w]` in 0-1."""

        def distance(guess: Condition) -> float:
            row = (statistics(undo(images, guess)) - self.mean) / self.scale
            return float(row @ self.precision @ row)

        return min(GUESSES, key=distance)


@torch.inference_mode()
def main() -> None:
    """Reads the arguments and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('hypernet', type=Path, help='folder of one, with groups.conditions.json and its results')
    parser.add_argument('images', help='folder of the tested classes, which the groups are of')
    parser.add_argument('--train', required=True, help='folder of images of the classes seen in training')
    options = parser.parse_args()
    network = PudNet.from_pretrained(options.hypernet)
    config, groups = network.config.input, TestGroups.load(options.hypernet / 'groups.conditions.json')
    results = json.loads((options.hypernet / 'results.conditions.json').read_text(encoding='utf-8'))
    bank = ImageBank.from_source(
        open_images(options.images, input=bank_input(config)), results['classes'], progress=True
    )
    groups.check(bank)
    if groups.conditions is None or groups.digest != results['groups_digest']:
        parser.error(f'{options.hypernet}: groups.conditions.json is not of results.conditions.json')

    given = open_images(options.train, input=bank_input(config))
    names = given.class_names or ()
    seen = [*same_names(names, network.config.class_names).keys() - same_names(names, results['classes']).keys()]
    seen.sort(key=names.index)
    train = ImageBank.from_source(given, seen, progress=True)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (config.mean, config.std))

    members = [train.images[rows[:IMAGES_A_CLASS]].float() / 255 for rows in train.members]
    if (few := min(map(len, members), default=0)) < IMAGES_A_CLASS:
        parser.error(f'{options.train}: a seen class has {few} images, {IMAGES_A_CLASS} are wanted of each')
    rule = Rule(torch.stack(members), results['n_way'], results['n_shot'])
    model, base = create_feature_model(network.target).eval(), network.base()

    def accuracy(weights: dict[str, Tensor], support: Tensor, query: Tensor) -> float:
        model.load_state_dict(weights)
        features = calibrate(model, support, weights, **network.config.calibration)
        centroids = class_centroids(features, support_labels, results['n_way'])
        guesses = centroid_logits(model(query), centroids, 1.0, network.whitening).argmax(1)
        return 100 * float((guesses == query_labels).float().mean())

    found: dict[str, list[float]] = {'predicted': [], 'order_and_sign_undone': [], 'turns_undone_too': []}
    right = {'order_and_sign': 0, 'turns': 0}
    for number, condition in enumerate(tqdm(groups.conditions, 'groups')):
        shown, tested = groups.images(number, bank, None, config, torch.device('cpu'))
        support, query = shown.sample, torch.cat([images for images, _ in tested.batches()])
        support_labels, query_labels = shown.labels, tested.labels
        found['predicted'].append(accuracy(network(*group_sketch(network, shown)), support, query))
        guess = rule.guess(small((support * std + mean).clamp(0, 1)))
        right['order_and_sign'] += (guess.order, guess.inverted) == (condition.order, condition.inverted)
        right['turns'] += guess.turns == condition.turns
        for name, taken in (
            ('order_and_sign_undone', dataclasses.replace(guess, turns=0)),
            ('turns_undone_too', guess),
        ):
            images = ((undo((part * std + mean).clamp(0, 1), taken) - mean) / std for part in (support, query))
            found[name].append(accuracy(base, *images))
    count = len(found['predicted'])
    result = {
        'hypernet': network.name,
        'weights_sha256': weights_sha256(options.hypernet),
        'groups': count,
        'groups_digest': groups.digest,
        'right': {name: times / count for name, times in right.items()},
        'accuracy': {name: mean_interval(values) for name, values in found.items()},
        'over_predicted': {
            name: mean_interval([a - b for a, b in zip(values, found['predicted'], strict=True)])
            for name, values in found.items()
            if name != 'predicted'
        },
    }
    with written_whole(options.hypernet / 'undone.conditions.json') as beside:
        beside.write_text(json.dumps(result, indent=2) + '\n', encoding='utf-8')


if __name__ == '__main__':
    try:
        main()
    except (PudNetError, OSError) as error:
        print(f'Error: {error}', file=sys.stderr)
        sys.exit(2)
