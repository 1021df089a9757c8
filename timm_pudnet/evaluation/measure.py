"""Measures a hypernetwork on groups of unseen classes, beside the controls that could embarrass it.

Dimension letters: `n` images, `c h w` an image, `m` width of the sketch, `d` features, `k` classes.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

from timm_pudnet.adapt import calibrate, centroid_logits, class_centroids
from timm_pudnet.config import InputError
from timm_pudnet.evaluation.metrics import mean_interval
from timm_pudnet.evaluation.protocols import TestGroups
from timm_pudnet.hypernet import PudNet, library_versions
from timm_pudnet.training.episodes import ImageBank

# Features of the support and of the query, from their images.
Classifier = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@torch.inference_mode()
def evaluate(
    hypernet: PudNet,
    bank: ImageBank,
    groups: TestGroups,
    *,
    controls: Mapping[str, tuple[nn.Module, Tensor]] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Accuracy of predicted networks over groups of unseen classes, beside the controls.

    For every group the support images give the sketch, the norm statistics and the class centroids; the query images
    are classified by eq. 7 in eval mode, so no query image touches anything that classifies it. Every network below
    gets the same support and head; predicted networks and controls get their whitening, and all but the controls'
    `..._own_statistics` are calibrated on the support:

    - `predicted`: the hypernetwork with the group's own sketch;
    - `predicted_without_whitening`: the same network, eq. 7 of its features as they are, as in the paper;
    - `swapped_sketch`: with the sketch of the group before it;
    - `mean_sketch`: with the mean sketch of all groups;
    - each of `controls` by its name, the same architecture trained without a hypernetwork, and `..._own_statistics`:
      the same with its own norm statistics instead of calibrated ones;
    - `random_weights`: timm's random init;
    - `raw_pixels`: no network, the normalised pixels as features.

    Args:
        hypernet: The hypernetwork to measure.
        bank: Images of the unseen classes.
        groups: Which of them make up each group.
        controls: Feature models and their whitenings, as `train_plain` gives them, by name.
        seed: Of the random weights.
        progress: Show a progress bar.

    Raises:
        InputError: A control has the name of another result, or is of another architecture.

    Returns:
        A mapping that JSON can hold: `accuracy` in percent with the half-width of the 95 % interval over groups,
        `conditioning_gain` and `gain_over_<control>` likewise, of the differences group by group.
    """
    hypernet.eval()
    config = hypernet.config
    # How each arm's features are read: the names of its scores, and the whitening of each.
    whitening = hypernet.whitening
    readings: dict[str, dict[str, Tensor | None]] = {
        'predicted': {'predicted': whitening, 'predicted_without_whitening': None},
        'swapped_sketch': {'swapped_sketch': whitening},
        'mean_sketch': {'mean_sketch': whitening},
        'random_weights': {'random_weights': None},
        'raw_pixels': {'raw_pixels': None},
    }
    reserved = {score for names in readings.values() for score in names}
    expected = {
        key: shape for key, shape in hypernet.target.shapes.items() if hypernet.target.roles[key] != 'classifier'
    }
    for name, (control, _) in (controls or {}).items():
        if name in reserved:
            raise InputError(f'a control cannot be called {name}: that is the name of another result')
        if {key: tuple(value.shape) for key, value in control.state_dict().items()} != expected:
            raise InputError(
                f'control {name} is no {config.model_name} without classifier, which {hypernet.name} predicts'
            )
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.input.mean, config.input.std))
    device = hypernet.device

    def images(places: Tensor) -> Tensor:
        return ((bank.images[places.flatten()].float() / 255 - mean) / std).to(device)

    sketches = torch.stack([hypernet.encoder(images(support)).mean(0) for support in groups.support])
    average = sketches.double().mean(0).float()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        scratch = timm.create_model(config.model_name, **{**config.model_kwargs, 'num_classes': 0}).to(device).eval()
    initial = {key: value.clone() for key, value in scratch.state_dict().items()}
    model = scratch

    def with_weights(weights: dict[str, Tensor], calibrated: bool = True) -> Classifier:
        def run(support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
            model.load_state_dict(weights)
            return calibrate(model, support, weights) if calibrated else model(support), model(query)

        return run

    arms: dict[str, Callable[[int], Classifier]] = {
        'predicted': lambda number: with_weights(hypernet(sketches[number])),
        'swapped_sketch': lambda number: with_weights(hypernet(sketches[number - 1])),
        'mean_sketch': lambda number: with_weights(hypernet(average)),
        'random_weights': lambda number: with_weights(initial),
        'raw_pixels': lambda number: lambda support, query: (support.flatten(1), query.flatten(1)),
    }
    for name, (control, learned) in (controls or {}).items():
        own = {key: value.to(device) for key, value in control.state_dict().items()}
        arms[name] = lambda number, own=own: with_weights(own)
        for arm in (name, f'{name}_own_statistics'):
            readings[arm] = {arm: learned.to(device)}
        arms[f'{name}_own_statistics'] = lambda number, own=own: with_weights(own, calibrated=False)

    n_way, n_shot, n_query = groups.support.shape[1], groups.support.shape[2], groups.query.shape[2]
    labels, answers = torch.arange(n_way).repeat_interleave(n_shot), torch.arange(n_way).repeat_interleave(n_query)
    scores: dict[str, list[float]] = {name: [] for names in readings.values() for name in names}
    for number in tqdm(range(len(groups)), disable=not progress, unit='group'):
        support, query = images(groups.support[number]), images(groups.query[number])
        for name, arm in arms.items():
            features, tested = arm(number)(support, query)
            centroids = class_centroids(features, labels.to(device), n_way)
            for reading, space in readings[name].items():
                guesses = centroid_logits(tested, centroids, 1.0, space).argmax(1).cpu()
                scores[reading].append(100 * float((guesses == answers).float().mean()))

    def gain(name: str) -> dict[str, float]:
        return mean_interval([a - b for a, b in zip(scores['predicted'], scores[name], strict=True)])

    result = {
        'hypernet': hypernet.name,
        'weights_digest': weights_digest(hypernet),
        'groups': len(groups),
        'groups_digest': groups.digest,
        'n_way': n_way,
        'n_shot': n_shot,
        'n_query': n_query,
        'classes': list(bank.class_names),
        'input_size': list(config.input.input_size),
        'chance': 100 / n_way,
        'training': config.training,
        'accuracy': {name: mean_interval(values) for name, values in scores.items()},
        'conditioning_gain': gain('swapped_sketch'),
        'conditioning_gain_over_mean_sketch': gain('mean_sketch'),
        'library_versions': library_versions(),
        'machine': f'{platform.machine()}, {torch.get_num_threads()} threads, {device.type}',
    }
    result.update({f'gain_over_{name}': gain(name) for name in controls or {}})
    return result


def weights_digest(hypernet: PudNet) -> str:
    """A short hash of all tensors of a hypernetwork, the same before and after saving in their own precision."""
    digest = hashlib.sha256()
    for key, value in sorted(hypernet.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def format_table(result: dict[str, Any]) -> str:
    """The accuracies of a result as lines of text."""
    lines = [
        f'{result["hypernet"]}: {result["groups"]} groups, {result["n_way"]}-way, {result["n_shot"]} labels a class'
    ]
    rows = {**result['accuracy'], **{name: row for name, row in result.items() if 'gain' in name}}
    lines += [f'  {name:36}{row["mean"]:7.2f} +- {row["interval"]:.2f}' for name, row in rows.items()]
    return '\n'.join(lines)
