"""Weight generation, prediction and training on a GPU.

    python tests/benchmarks/gpu.py [--out FILE.json]

Needs CUDA. Times are medians in milliseconds, with the GPU waited for. The floor of generation is reading the
hypernetwork's bytes once and writing the target's once at the speed of a large copy on the same GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import time
import warnings
from pathlib import Path

import torch
from generation import TARGETS, steered
from prediction import median_seconds, show

import timm_pudnet
from timm_pudnet.devices import library_versions
from timm_pudnet.training import Data, ImageBank, Recipe
from timm_pudnet.training.meta_train import _MetaRun, _PlainRun

RECIPE = Path(__file__).resolve().parents[2] / 'hub' / 'resnet18.cifar100_set' / 'recipe.toml'


def median_ms(work):
    def waited():
        work()
        torch.cuda.synchronize()

    return 1e3 * median_seconds(waited)


def copy_speed():
    """Bytes read and written per millisecond by a copy of a gigabyte."""
    source = torch.randn(2**28, device='cuda')
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source))


@torch.no_grad()
def generation(hypernet, speed):
    hypernet = hypernet.cuda()
    sketch = torch.rand(hypernet.config.sketch_width, device='cuda')
    # Kernels that are their base alone are given as they are: nothing of them is read or written.
    weights = hypernet(sketch)
    given = {value.data_ptr() for value in hypernet.parameters()} & {value.data_ptr() for value in weights.values()}
    moved = sum(v.nbytes for v in (*hypernet.parameters(), *weights.values()) if v.data_ptr() not in given)
    called = median_ms(lambda: hypernet(sketch))
    started = time.perf_counter()
    generate = hypernet.captured()
    torch.cuda.synchronize()
    capturing = 1e3 * (time.perf_counter() - started)
    return {
        'layers': len(hypernet.target.layers),
        'megabytes_read_and_written': moved / 1e6,
        'called_ms': called,
        'captured_ms': median_ms(lambda: generate(sketch)),
        'capturing_ms': capturing,
        'floor_ms': moved / speed,
    }


def prediction():
    """Of the 240 images of the README's size, from memory."""
    images, labels = torch.rand(240, 3, 32, 32), torch.arange(240) % 4
    hypernet = timm_pudnet.load_hypernet('resnet18').cuda()
    model = timm_pudnet.predict_model('resnet18', images, labels, hypernet=hypernet)
    with torch.inference_mode():
        shown = images.cuda()
        forward = median_ms(lambda: model(shown))
    return {
        'predict_ms': median_ms(lambda: timm_pudnet.predict_model('resnet18', images, labels, hypernet=hypernet)),
        'forward_ms': forward,
    }


def training(size, n_way, steps=15):
    """Images a second of a training step of a hypernetwork, of an ordinary one, and of the target's passes alone."""
    recipe = Recipe.load(RECIPE)
    config = recipe.hypernet
    recipe = dataclasses.replace(
        recipe,
        hypernet=dataclasses.replace(config, input=dataclasses.replace(config.input, input_size=(3, size, size))),
        data=(Data(images='noise'),),
        groups=dataclasses.replace(recipe.groups, n_way=n_way),
        schedule=dataclasses.replace(recipe.schedule, fixed_statistics=False),
        start='',
    )
    pixels = torch.randint(0, 256, (4000, 3, size, size), dtype=torch.uint8)
    banks = [ImageBank(pixels, torch.arange(4000) % 80, [str(label) for label in range(80)])]
    runs = {'meta': _MetaRun(recipe, banks, None), 'plain': _PlainRun(recipe, banks, None)}
    each, found = recipe.images_per_step, {}
    for name, run in runs.items():
        for _ in run.steps(6):
            pass
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in run.steps(6 + steps):
            pass
        torch.cuda.synchronize()
        found[f'{name}_images_per_second'] = steps * each / (time.perf_counter() - started)
    batch = runs['plain'].sampler.batch(0, each)[0]
    passes = median_ms(lambda: runs['plain'].features(batch).sum().backward())
    return {
        'input_size': size,
        'images_per_step': each,
        **found,
        'step_over_ordinary_step': found['plain_images_per_second'] / found['meta_images_per_second'],
        'passes_of_target_images_per_second': 1e3 * each / passes,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, help='write the JSON here too')
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error('there is no CUDA here')
    warnings.simplefilter('ignore')
    speed = copy_speed()
    nets = {f'{name} (residual, new)': steered(name, kwargs) for name, kwargs in TARGETS.items()}
    nets['resnet18.mixed'] = timm_pudnet.load_hypernet('resnet18.mixed')
    result = {
        'machine': f'{platform.machine()}, {torch.cuda.get_device_name()}',
        'library_versions': library_versions(),
        'copy_gigabytes_per_second': speed / 1e6,
        'generation': {name: generation(net, speed) for name, net in nets.items()},
        'prediction': prediction(),
        'training': [training(*sizes) for sizes in ((64, 32), (96, 64), (96, 128), (128, 64))],
    }
    show(result, arguments.out)


if __name__ == '__main__':
    main()
