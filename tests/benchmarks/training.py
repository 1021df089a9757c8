"""Cost of a training step of a hypernetwork, as ratios to an ordinary training step of its target in the same run.

    python tests/benchmarks/training.py RECIPE --out FILE.json

Both steps see as many images of the same size. The images are noise, and the weights that training starts from are
random; both cost the same. Steps alternate, and medians are compared. The shares come from timing the parts of the
step one by one, forward and backward.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch

import timm_pudnet
from timm_pudnet.devices import library_versions, machine
from timm_pudnet.training import Data, ImageBank, Recipe
from timm_pudnet.training.meta_train import _MetaRun, _PlainRun


def seconds(work: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each call, the first one left out."""
    times = []
    for number in range(repeats + 1):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number:
            times.append(time.perf_counter() - started)
    return times


def measure(recipe: Recipe, repeats: int, num_classes: int = 80) -> dict:
    """The ratio of the two steps, and the shares of the hypernetwork's."""
    each = max(20, recipe.groups.n_shot + recipe.groups.n_query)
    size = recipe.hypernet.input.input_size
    images = torch.randint(0, 256, (num_classes * each, *size), dtype=torch.uint8)
    labels = torch.arange(len(images)) % num_classes
    banks = [ImageBank(images, labels, [str(label) for label in range(num_classes)])]
    with tempfile.TemporaryDirectory() as folder:
        random = timm.create_model(recipe.hypernet.model_name, num_classes=num_classes, **recipe.hypernet.model_kwargs)
        path = timm_pudnet.save_model(random, Path(folder, 'start'))
        recipe = dataclasses.replace(recipe, data=(Data(images='noise'),), start=str(path))
        meta, plain = _MetaRun(recipe, banks, None), _PlainRun(recipe, banks, None)
    times: dict[str, list[float]] = {'meta': [], 'plain': []}
    for _ in range(repeats):
        for name, run in (('meta', meta), ('plain', plain)):
            times[name] += seconds(lambda run=run: next(run.steps(run.step + 1)), 1)

    net, parts = meta.hypernet, recipe.groups.per_step
    group = meta.sampler.draw(0)
    support = group.support.to(meta.device)
    both = torch.cat([support, group.query.to(meta.device)])
    further = meta.sampler.draw_halves(0).to(meta.device).flatten(0, 2) if recipe.groups.sketch_groups else support[:0]

    def sketch() -> None:
        with meta.mixed_precision():
            total = net.encoder(torch.cat([support, further])).sum()
            if total.requires_grad:  # not where the recipe keeps the encoder as it is
                total.backward()

    code = net.encoder(support).mean(0).detach()
    start = {key: torch.randn_like(value) for key, value in net(code).items() if value.requires_grad}

    def generation() -> None:
        made = net(code)
        torch.autograd.backward([made[key] for key in start], list(start.values()))

    fixed = {key: value.detach().requires_grad_() for key, value in net(code).items() if key in start}

    def target() -> None:
        meta.features(both, fixed).sum().backward()

    def optimiser() -> None:
        for one in meta.optimizers:
            one.step()

    def data() -> None:
        meta.sampler.draw(0)
        if recipe.groups.sketch_groups:
            meta.sampler.draw_halves(0)

    whole = statistics.median(times['meta'])
    shares = {
        work.__name__: times_a_step * statistics.median(seconds(work, repeats)) / whole
        for work, times_a_step in ((data, parts), (sketch, parts), (generation, parts), (target, parts), (optimiser, 1))
    }
    shares['rest'] = 1 - sum(shares.values())
    ordinary = statistics.median(times['plain'])
    return {
        'model_name': recipe.hypernet.model_name,
        'images_per_step': recipe.groups.images_per_step,
        'groups_per_step': parts,
        'step_over_ordinary_step': whole / ordinary,
        'images_per_second': recipe.groups.images_per_step / whole,
        'images_per_second_ordinary': recipe.groups.images_per_step / ordinary,
        'shares': shares,
        'parameters_over_target': sum(p.numel() for p in net.parameters())
        / sum(p.numel() for p in plain.target.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('recipes', type=Path, nargs='+')
    parser.add_argument('--repeats', type=int, default=12)
    parser.add_argument('--out', type=Path)
    arguments = parser.parse_args()
    result = {
        'recipes': {str(path): measure(Recipe.load(path), arguments.repeats) for path in arguments.recipes},
        'library_versions': library_versions(),
        'machine': machine(torch.device('cuda' if torch.cuda.is_available() else 'cpu')),
    }
    text = json.dumps(result, indent=2) + '\n'
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding='utf-8')


if __name__ == '__main__':
    main()
