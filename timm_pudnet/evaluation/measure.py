"""Measures a hypernetwork on groups of unseen classes, beside the controls that could embarrass it.

Dimension letters: `n` images, `c h w` an image, `m` width of the sketch, `d` features, `k` classes.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from timm_pudnet.adapt import (
    HEADS,
    MANY_LABELS,
    StreamingBlend,
    StreamingLogistic,
    StreamingRidge,
    calibrate,
    centroid_logits,
    class_centroids,
    ridge_classifier,
    self_training_classifier,
)
from timm_pudnet.config import (
    PRIOR_IMAGES,
    Calibration,
    InputError,
    PudNetWarning,
    are_numbers,
    checked_seed,
    same_names,
)
from timm_pudnet.devices import forked_rng, library_versions, machine, own_defaults
from timm_pudnet.evaluation.holdout import raw_pixels
from timm_pudnet.evaluation.metrics import mean_interval, share_interval
from timm_pudnet.evaluation.protocols import GroupImages, TestGroups
from timm_pudnet.hypernet import PudNet, with_hypernet_as_saved
from timm_pudnet.target import (
    channels_last,
    create_feature_model,
    difference,
    normalised_otherwise,
    small_maps_first,
)
from timm_pudnet.training.episodes import ImageBank

# Features of the support, with labels and in batches, of the query and of the images without labels, from their images.
Features = tuple[Iterable[tuple[Tensor, Tensor]], Tensor, Tensor]
Extractor = Callable[[GroupImages, GroupImages, GroupImages], Features]

OVER_GROUPS = '95 %, over groups drawn from these classes and images; other classes would spread more'
OVER_QUERIES = "95 %, over the queries of the one group: half of Wilson's binomial interval; of gains normal and paired"


@own_defaults()
@torch.inference_mode()
@with_hypernet_as_saved
def evaluate(
    hypernet: PudNet,
    bank: ImageBank,
    groups: TestGroups,
    *,
    support_bank: ImageBank | None = None,
    other: ImageBank | None = None,
    controls: Mapping[str, tuple[nn.Module, Tensor]] | None = None,
    without: Collection[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Accuracy of predicted networks over groups of unseen classes, beside the controls.

    For every group the support images give the sketch, the norm statistics and the class centroids; the query images
    are classified by eq. 7 in eval mode, so no query image touches anything that classifies it. Two controls are the
    exception, without a support bank: the sketches of other groups may be of some of the tested images, which favours
    `swapped_sketch` and `mean_sketch`. Images without labels teach the self-trained head, and nothing else (it begins
    from the blend head, that of raw pixels from the ridge).
    Every network below gets the same support and head; predicted networks and controls get their whitening, and all but
    the controls' `..._own_statistics` are calibrated on the support:

    - `predicted`: the hypernetwork with the group's own sketch;
    - `predicted_without_whitening`: the same network, eq. 7 of its features as they are, as in the paper;
    - `swapped_sketch`: with the sketch of the nearest group before it that has another one (where all groups have all
      classes, it is one of other images of the same; not where all have one sketch, a single group for instance);
    - `mean_sketch`: with the mean sketch of all groups (not where all have one);
    - `other_domain_sketch`: with the sketch of as many images of another data set as the support has; each of these
      sketches passes the hypernetwork's gate, where it has one;
    - each of `controls` by its name, the same architecture trained without a hypernetwork, and `..._own_statistics`:
      the same with its own norm statistics instead of calibrated ones;
    - `random_weights`: timm's random init, calibrated as by a new hypernetwork, whose training says less;
    - `raw_pixels`: no network, the normalised pixels as features.

    Args:
        hypernet: The hypernetwork to measure.
        bank: Images of the unseen classes; a warning tells of one that was seen.
        groups: Which of them make up each group.
        support_bank: Other images of the same classes, which the support is taken from instead.
        other: Images of another data set, for `other_domain_sketch`; they are seen as they are, under no condition.
        controls: Feature models and their whitenings, as `train_plain` gives them, by name.
        without: Networks above to leave out by name, where there is no time for all; any but the first two.
        seed: Of the random weights.
        progress: Show a progress bar.

    Raises:
        InputError: The groups are not of these banks, or test an image of their support; images are not of the
            target's size; a control has the name of another result, or is of another architecture.

    Returns:
        A mapping that JSON can hold: `accuracy` in percent, by eq. 7, with the half-width of the 95 % interval over
        groups, `accuracy_ridge`, `accuracy_blend` and, with 40 labels a class or more, `accuracy_logistic` likewise
        with these heads (none of `predicted_without_whitening`, of `raw_pixels` the ridge alone), and
        `accuracy_self_training` with that of labelled and unlabelled images where the groups have some, with its gain
        over the blend head and over the controls' own;
        `conditioning_gain`, `conditioning_gain_over_mean_sketch`, `conditioning_gain_over_other_domain` and
        `gain_over_<control>` of the differences in `accuracy` group by group. With one group the intervals are over
        its queries; `interval` says which.
    """
    seed = checked_seed(seed)
    for given in (bank, support_bank, other):
        if given is not None and not isinstance(given, ImageBank):
            raise InputError(
                f'a {type(given).__name__} is no ImageBank: ImageBank.from_source(open_images(...)) gives one'
            )
    groups.check(bank, support_bank)
    both = same_names(bank.class_names, hypernet.config.class_names)
    if both and not are_numbers(bank.class_names):
        warnings.warn(
            f'{hypernet.name} was trained on a class named {sorted(both)[0]!r}: if it is the same, this is no measure '
            'of unseen classes',
            PudNetWarning,
            stacklevel=2,
        )
    for images_of in (bank, support_bank, other):
        if images_of is not None:
            images_of.check_size(hypernet.config.input)
    networks = _Networks(
        hypernet,
        bank,
        groups,
        support_bank=support_bank,
        other=other,
        controls=controls or {},
        without=without,
        seed=seed,
    )
    # Whether each query of each group is classified rightly, by head and score.
    right: dict[str, dict[str, list[Tensor]]] = {head: {} for head in (*HEADS, 'self_training')}
    support_images = 0
    for number in tqdm(range(len(groups)), disable=not progress, unit='group'):
        support, query = networks.images(number)
        support_images += len(support)
        for score, guesses in networks.guesses(number, support, query).items():
            for head, guessed in guesses.items():
                right[head].setdefault(score, []).append(guessed == query.labels)

    config, n_way = hypernet.config, groups.query.shape[1]
    return {
        'hypernet': hypernet.name,
        'weights_digest': weights_digest(hypernet),
        'groups': len(groups),
        'groups_digest': groups.digest,
        'n_way': n_way,
        'n_shot': 'all' if groups.support is None else groups.support.shape[2],
        'n_query': groups.query.shape[2],
        'n_unlabelled': groups.n_unlabelled,
        'support_images': support_images / len(groups),
        'separate_support': support_bank is not None,
        'conditions': groups.conditions is not None,
        'classes': list(bank.class_names),
        **({} if other is None else {'other_classes': list(other.class_names)}),
        'input_size': list(config.input.input_size),
        'chance': 100 / n_way,
        'training': config.training,
        'interval': OVER_GROUPS if len(groups) > 1 else OVER_QUERIES,
        'library_versions': library_versions(),
        'machine': machine(hypernet.device),
        **_scores(right, controls or {}),
    }


class _Networks:
    """The networks of `evaluate`, whose arguments these are, and what each of them guesses.

    An *arm* is a way to features of a group; each is read by one score or more, by the whitening that the score has.
    """

    def __init__(
        self,
        hypernet: PudNet,
        bank: ImageBank,
        groups: TestGroups,
        *,
        support_bank: ImageBank | None,
        other: ImageBank | None,
        controls: Mapping[str, tuple[nn.Module, Tensor]],
        without: Collection[str],
        seed: int,
    ) -> None:
        self.hypernet, self.bank, self.groups, self.support_bank = hypernet, bank, groups, support_bank
        self.calibration = hypernet.config.calibration
        whitening = hypernet.whitening
        self.readings: dict[str, dict[str, Tensor | None]] = {
            'predicted': {'predicted': whitening, 'predicted_without_whitening': None},
            'swapped_sketch': {'swapped_sketch': whitening},
            'mean_sketch': {'mean_sketch': whitening},
            'other_domain_sketch': {'other_domain_sketch': whitening},
            'random_weights': {'random_weights': None},
            'raw_pixels': {'raw_pixels': None},
        }
        _check_controls(hypernet, controls, {score for names in self.readings.values() for score in names})
        _check_without(without, controls, several=len(groups) > 1, other=other is not None)
        supports = (self.images(number)[0] for number in range(len(groups)))  # one at a time in memory
        least = MANY_LABELS * groups.query.shape[1]
        self.many = all(len(self.images(number)[0]) >= least for number in range(len(groups)))  # for a logistic head
        with forked_rng(hypernet.device):
            torch.manual_seed(seed)
            self.model = channels_last(create_feature_model(hypernet.target).to(hypernet.device).eval())
        # Arms that have a sketch for each group, by what gives it.
        self.sketched = {
            name: sketch for name, sketch in _sketches(hypernet, supports, other).items() if name not in without
        }
        # Arms that have none; and weights of those that may be what is predicted behind a closed gate.
        self.fixed: dict[str, Extractor] = {}
        self.bases: dict[str, dict[str, Tensor]] = {}
        self._add_fixed(controls)
        self.fixed = {name: arm for name, arm in self.fixed.items() if name not in without}

    def images(self, number: int) -> tuple[GroupImages, GroupImages]:
        """Support and query of a group."""
        input, device = self.hypernet.config.input, self.hypernet.device
        return self.groups.images(number, self.bank, self.support_bank, input, device)

    def _add_fixed(self, controls: Mapping[str, tuple[nn.Module, Tensor]]) -> None:
        """Adds the arms without a sketch, and how those of controls are read."""
        model, groups, device = self.model, self.groups, self.hypernet.device
        initial = {key: value.clone() for key, value in model.state_dict().items()}
        untrained = Calibration(prior_images=PRIOR_IMAGES, deep_share=1.0)  # whose own statistics say nothing
        self.fixed = {'random_weights': _with_weights(model, initial, untrained), 'raw_pixels': _raw_pixels}
        looks = groups.query.numel() + (0 if groups.support is None else groups.support.numel())
        once = groups.conditions is None and self.support_bank is None and len(self.bank.labels) < looks
        whole = [torch.arange(len(self.bank.labels))]
        everything = GroupImages(self.bank, whole, self.hypernet.config.input, device)
        for name, (control, learned) in controls.items():
            own = {
                key: value.to(device, torch.float32 if value.is_floating_point() else value.dtype)
                for key, value in control.state_dict().items()
            }
            with_own = _looked_up(model, own, everything) if once else _with_weights(model, own, None)
            for arm, extractor in (
                (name, _with_weights(model, own, self.calibration)),
                (f'{name}_own_statistics', with_own),
            ):
                self.fixed[arm] = extractor
                self.readings[arm] = {arm: learned.to(device)}
            if torch.equal(learned.to(device), self.hypernet.whitening):
                self.bases[name] = own

    def guesses(self, number: int, support: GroupImages, query: GroupImages) -> dict[str, dict[str, Tensor]]:
        """Guessed classes of a group's query, by score and head."""
        input, device = self.hypernet.config.input, self.hypernet.device
        rest = self.groups.unlabelled(number, self.bank, self.support_bank, input, device)
        n_way = self.groups.query.shape[1]
        found: dict[str, dict[str, Tensor]] = {}
        predicted: dict[str, Tensor] = {}
        with small_maps_first(self.model):
            for name, sketch in self.sketched.items():
                weights = self.hypernet(*sketch(number))
                if predicted and _alike(weights, predicted):
                    found[name] = found['predicted']  # behind a closed gate, both
                    continue
                predicted = predicted or weights
                arm = _with_weights(self.model, weights, self.calibration)
                found |= _read(arm(support, query, rest), self.readings[name], support, n_way, self.many)
            for name, arm in self.fixed.items():
                if name in self.bases and _alike(self.bases[name], predicted):
                    found[name] = found['predicted']
                    continue
                found |= _read(arm(support, query, rest), self.readings[name], support, n_way, self.many)
        return found


def _check_without(without: Collection[str], controls: Collection[str], *, several: bool, other: bool) -> None:
    optional = {'random_weights', 'raw_pixels', *controls, *(f'{name}_own_statistics' for name in controls)}
    optional |= {'swapped_sketch', 'mean_sketch'} if several else set()
    optional |= {'other_domain_sketch'} if other else set()
    if unknown := set(without) - optional:
        raise InputError(f'{min(unknown)} cannot be left out: use {", ".join(sorted(optional))}')


def _sketches(
    hypernet: PudNet, supports: Iterable[GroupImages], other: ImageBank | None
) -> dict[str, Callable[[int], tuple[Tensor, float]]]:
    """By arm, what gives the sketch of a group by its number, and of how many images it is."""
    input, device = hypernet.config.input, hypernet.device
    own, sizes = zip(*((group_sketch(hypernet, support), len(support)) for support in supports), strict=True)
    mean = torch.stack([sketch.cpu() for sketch, _ in own]).double().mean(0).float().to(device)
    average = mean, sum(size for _, size in own)

    def of_other(number: int) -> tuple[Tensor, float]:
        assert other is not None
        picks = torch.randperm(len(other.labels), generator=torch.Generator().manual_seed(number))
        return group_sketch(hypernet, GroupImages(other, [picks[: sizes[number]]], input, device))

    def of_another(number: int) -> tuple[Tensor, float]:
        before = (own[number - back] for back in range(1, len(own)))
        return next(pair for pair in before if not torch.equal(pair[0], own[number][0]))

    found: dict[str, Callable[[int], tuple[Tensor, float]]] = {'predicted': lambda number: own[number]}
    # Groups of all images of the same classes have one sketch, which is also the mean of them all.
    if any(not torch.equal(sketch, own[0][0]) for sketch, _ in own):
        found |= {'swapped_sketch': of_another, 'mean_sketch': lambda _: average}
    return found if other is None else {**found, 'other_domain_sketch': of_other}


def _with_weights(model: nn.Module, weights: dict[str, Tensor], how: Calibration | None) -> Extractor:
    """The arm of a network with these weights, calibrated on the support as `how` says."""

    def run(support: GroupImages, query: GroupImages, rest: GroupImages) -> Features:
        features = support_features(model, weights, support, how)
        return features, _rows(model, query), _rows(model, rest)

    return run


def _looked_up(model: nn.Module, weights: dict[str, Tensor], everything: GroupImages) -> Extractor:
    """The arm of a network that no group changes: it sees each image of the bank once."""

    @functools.cache
    def rows() -> Tensor:
        return torch.cat([part for part, _ in support_features(model, weights, everything, None)])

    def run(support: GroupImages, query: GroupImages, rest: GroupImages) -> Features:
        return [(rows()[support.places], support.labels)], rows()[query.places], rows()[rest.places]

    return run


def _scores(right: Mapping[str, Mapping[str, Sequence[Tensor]]], controls: Iterable[str]) -> dict[str, Any]:
    """Accuracies and gains of a result, from which queries of each group each head classifies rightly, by score."""
    found: dict[str, Any] = {}
    for head, scores in right.items():
        if scores:
            name = 'accuracy' if head == 'centroid' else f'accuracy_{head}'
            found[name] = {score: accuracy_interval(values) for score, values in scores.items()}
    trained = right['self_training']
    if trained:
        found['self_training_gain'] = _gain(trained['predicted'], right['blend']['predicted'])
    for name in trained:
        if name != 'predicted':
            found[f'self_training_gain_over_{name}'] = _gain(trained['predicted'], trained[name])
    rivals = {
        'conditioning_gain': 'swapped_sketch',
        'conditioning_gain_over_mean_sketch': 'mean_sketch',
        'conditioning_gain_over_other_domain': 'other_domain_sketch',
        **{f'gain_over_{name}{more}': f'{name}{more}' for name in controls for more in ('', '_own_statistics')},
    }
    scores = right['centroid']
    gains = {name: _gain(scores['predicted'], scores[rival]) for name, rival in rivals.items() if rival in scores}
    return {**found, **gains}


def _alike(weights: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(value, others[key]) for key, value in weights.items())


def _check_controls(
    hypernet: PudNet, controls: Mapping[str, tuple[nn.Module, Tensor]], reserved: Iterable[str]
) -> None:
    width = hypernet.target.num_features
    for name, (control, learned) in controls.items():
        if name in reserved or name.removesuffix('_own_statistics') in controls.keys() - {name}:
            raise InputError(f'a control cannot be called {name}: that is the name of another result')
        if difference(control.state_dict(), hypernet.target.kept):
            raise InputError(
                f'control {name} is no {hypernet.config.model_name} without classifier, which {hypernet.name} predicts'
            )
        if learned.shape != (width, width):
            raise InputError(f'control {name}: its whitening is of {len(learned)} features, its network has {width}')
        if other := normalised_otherwise(control, hypernet.config.input):
            raise InputError(f'control {name} sees images {other}, which {hypernet.name} does not')


def group_sketch(hypernet: PudNet, support: GroupImages) -> tuple[Tensor, float]:
    """The sketch `[m]` of a group's support, the mean of the class means, and of how many images it is.

    Both as `predict_model` gives them to the hypernetwork.
    """
    equal = len(support.labels.bincount().unique()) == 1
    if support.fits and equal:  # the mean over all then
        return hypernet.encoder(support.sample).mean(0), len(support)
    stream = hypernet.streaming_sketch('class')
    for images, labels in support.batches():
        stream.add(images, labels)
    return stream.result(), stream.num_images


def support_features(
    model: nn.Module, weights: dict[str, Tensor], support: GroupImages, calibration: Calibration | None
) -> Iterable[tuple[Tensor, Tensor]]:
    """Gives a model these weights, calibrated on the support, as the config says, unless that is None.

    Returns:
        Features of the support with their labels, in batches. Those of a support that one batch does not hold are
        computed when they are asked for, so this must be before the model gets other weights.
    """
    model.load_state_dict(weights)
    if calibration is not None:
        sampled = calibrate(model, support.sample, weights, **calibration)
        if support.fits:
            return [(sampled, support.labels)]
    return ((model(images), labels) for images, labels in support.batches())


def _rows(network: Callable[[Tensor], Tensor], shown: GroupImages) -> Tensor:
    """Features `[n, d]`; of no images `[0, 0]`."""
    parts = [network(images) for images, _ in shown.batches()] if len(shown) else [torch.empty(0, 0)]
    return torch.cat(parts)


def _raw_pixels(support: GroupImages, query: GroupImages, rest: GroupImages) -> Features:
    if not support.fits:  # a ridge of them has a square matrix of as many rows as pixels
        tested, others = (_rows(raw_pixels, part) for part in (query, rest))
        return ((raw_pixels(images), labels) for images, labels in support.batches()), tested, others
    tested, others = (_rows(lambda images: images.flatten(1), part) for part in (query, rest))
    # More pixels than images: in a basis of the images' span every head finds the same classes, at once.
    rows = torch.cat([support.sample.flatten(1), others]) if len(others) else support.sample.flatten(1)
    basis = torch.linalg.qr(rows.t())[0] if len(rows) < rows.shape[1] else torch.eye(rows.shape[1], device=rows.device)
    given, others = (rows @ basis).tensor_split([len(support)])
    return [(given, support.labels)], tested @ basis, others


def _read(
    features: Features, spaces: Mapping[str, Tensor | None], support: GroupImages, n_way: int, many: bool
) -> dict[str, dict[str, Tensor]]:
    """Guessed classes of the query by each head, for each reading of an arm; its first reading has more than eq. 7.

    That of raw pixels, in a basis of few of their directions, has no blend: how many features there are weighs in it.
    """
    given, tested, rest = features
    first, space = next(iter(spaces.items()))
    stream = StreamingRidge(n_way) if 'raw_pixels' in spaces else StreamingBlend(n_way)
    given = list(given) if support.fits else given
    logistic = StreamingLogistic(n_way)
    many = many and 'raw_pixels' not in spaces
    for rows, labels in given:
        stream.add(rows, labels)
        if many:
            logistic.add(rows, labels)
    if support.fits:
        ((rows, labels),) = given
        centroids = class_centroids(rows, labels.to(rows.device), n_way)
        ridge = ridge_classifier(rows, labels, n_way, space)
    else:
        centroids, ridge = stream.centroids.result().to(tested.device), StreamingRidge.classifier(stream, space)
    guesses = {
        name: {'centroid': centroid_logits(tested, centroids, 1.0, space).argmax(1).cpu()}
        for name, space in spaces.items()
    }
    heads = {'ridge': ridge}
    if isinstance(stream, StreamingBlend):
        heads['blend'] = stream.blended(ridge, space)
    if many:
        heads['logistic'] = logistic.classifier(space)
    if len(rest):
        heads['self_training'] = self_training_classifier(stream, rest, space)
    for head, (weight, bias) in heads.items():
        guesses[first][head] = (tested.cpu() @ weight.t() + bias).argmax(1)
    return guesses


def accuracy_interval(right: Sequence[Tensor]) -> dict[str, float]:
    """Accuracy in percent and its 95 % interval, from which queries of each group were classified rightly.

    The interval is over groups; that of one group is over its queries, half the width of Wilson's.
    """
    if len(right) > 1:
        return mean_interval(_percents(right))
    low, high = share_interval(int(right[0].sum()), len(right[0]))
    return {'mean': 100 * float(right[0].float().mean()), 'interval': 50 * (high - low)}


def _gain(right: Sequence[Tensor], rival: Sequence[Tensor]) -> dict[str, float]:
    if len(right) > 1:
        return mean_interval([a - b for a, b in zip(_percents(right), _percents(rival), strict=True)])
    return mean_interval((100 * (right[0].float() - rival[0].float())).tolist())


def _percents(right: Sequence[Tensor]) -> list[float]:
    return [100 * float(found.float().mean()) for found in right]


def weights_digest(network: nn.Module) -> str:
    """A short hash of all tensors of a network, the same before and after saving in their own precision."""
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def format_table(result: dict[str, Any]) -> str:
    """The accuracies of a result, by every head, and its gains, as lines of text."""
    labels = result['n_shot'] if result['n_shot'] != 'all' else f'all {result["support_images"]:g}'
    budget = f'{labels} labels' + (' a class' if result['n_shot'] != 'all' else '')
    if result.get('n_unlabelled'):
        budget += f', and {result["n_unlabelled"]} images without'
    heads = [head for head in (*HEADS, 'self_training') if f'accuracy_{head}' in result]
    titles = ''.join(f'{head.replace("_", "-"):^16}' for head in ('centroid', *heads))
    lines = [
        f'{result["hypernet"]}: {result["groups"]} groups, {result["n_way"]}-way, {budget}',
        f'  {"":36}{titles}'.rstrip(),
    ]
    for name, row in result['accuracy'].items():
        others = [result[f'accuracy_{head}'].get(name) for head in heads]
        lines.append(
            f'  {name:36}{_cell(row)}{"".join(_cell(other) if other else " " * 16 for other in others)}'.rstrip()
        )
    lines += [f'  {name:36}{_cell(row)}'.rstrip() for name, row in result.items() if 'gain' in name]
    if 'interval' in result:
        lines.append(f'  +- {result["interval"]}')
    if 'scratch' in result:
        lines += _scratch_lines(result['scratch'])
    return '\n'.join(lines)


def _scratch_lines(scratch: dict[str, Any]) -> Iterator[str]:
    yield f'from scratch, {scratch["groups"]} groups, {scratch["training_images"]:g} training images:'
    predicted = scratch['predicted']
    yield f'  {"predicted":36}{_cell(predicted["accuracy"])} in {predicted["seconds"]["mean"]:.2f} s'
    for name in ('adam', 'adam_centralised'):
        last, ratio = scratch[name]['curve'][-1], scratch[name]['seconds_ratio']
        as_good = f'as good {"never" if ratio is None else f"after {ratio:.1f} times the seconds of predicted"}'
        yield f'  {name:36}{_cell(last["accuracy"])} in {last["seconds"]["mean"]:.2f} s, {as_good}'


def _cell(row: Mapping[str, float]) -> str:
    return f'{row["mean"]:7.2f} +- {row["interval"]:<5.2f}'
