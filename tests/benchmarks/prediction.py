"""Speed and memory of a prediction, as ratios in one run on one machine.

    python tests/benchmarks/prediction.py [--out FILE.json]

Run it on an otherwise idle machine. Every figure is the median of several runs after a warm-up.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import re
import statistics
import time
from pathlib import Path

import timm
import torch
from torch.nn import functional as F

import timm_pudnet
from timm_pudnet.devices import library_versions

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / 'examples' / 'fashion'


def median_seconds(function, runs=15):
    function()
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def naive_generation(hypernet, sketch):
    """The paper's generators as one would first write them: a matrix product a layer, a list of outputs."""
    weights = {}
    for layer, generator, code in zip(hypernet.target.layers, hypernet.generators, hypernet.ahru(sketch), strict=True):
        out_chans, in_chans, height, width = layer.shape
        embedding = generator.embed(code / math.sqrt(len(code))).view(-1, height * width)
        basis = F.leaky_relu(generator.mix.weight @ embedding + generator.mix.bias[:, None], 0.1)
        kernels = generator.expand.view(out_chans * in_chans, -1) @ basis
        weights[layer.key] = kernels.view(layer.shape) * generator.scale
    return weights


def moves_its_bytes(hypernet):
    """A function that reads the hypernetwork's bytes once and writes the target's once: the floor of generation."""
    tensors = [value for value in hypernet.state_dict().values() if value.is_floating_point()]
    target = [torch.empty(shape) for shape in hypernet.target.shapes.values()]

    def floor():
        for tensor in tensors:
            tensor.sum()
        for tensor in target:
            tensor.fill_(1.0)

    return floor


@torch.inference_mode()
def generation(hypernet):
    """Weight generation against reading the hypernetwork's bytes once and writing the target's once."""
    sketch = F.normalize(torch.randn(hypernet.config.sketch_width), dim=0)  # below any sketch_limit
    found, expected = hypernet(sketch), naive_generation(hypernet, sketch)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    floor_seconds = median_seconds(moves_its_bytes(hypernet), 41)
    seconds = {
        'generation': median_seconds(lambda: hypernet(sketch), 41),
        'naive_loop': median_seconds(lambda: naive_generation(hypernet, sketch), 41),
    }
    return {
        'floor_ms': 1e3 * floor_seconds,
        **{f'{name}_ms': 1e3 * value for name, value in seconds.items()},
        **{f'{name}_over_floor': value / floor_seconds for name, value in seconds.items()},
    }


@torch.inference_mode()
def prediction(name):
    """`predict_model` on the example images, from files, the hypernetwork's loading included."""
    model = timm_pudnet.predict_model(name, EXAMPLES, device='cpu')
    config = timm_pudnet.load_hypernet(name).config.input
    batches = list(timm_pudnet.open_images(EXAMPLES, input=config).batches(1024))
    images = torch.cat([batch for batch, _ in batches])
    forward = median_seconds(lambda: model(images))
    seconds = {
        'predict_model': median_seconds(lambda: timm_pudnet.predict_model(name, EXAMPLES, device='cpu')),
        'load_hypernet': median_seconds(lambda: timm_pudnet.load_hypernet(name)),
        'read_images': median_seconds(lambda: list(timm_pudnet.open_images(EXAMPLES, input=config).batches(1024))),
        'timm_create_model': median_seconds(lambda: timm.create_model(name)),
    }
    return {
        'images': len(images),
        'forward_ms': 1e3 * forward,
        **{f'{key}_ms': 1e3 * value for key, value in seconds.items()},
        'predict_model_over_forward': seconds['predict_model'] / forward,
        'predict_model_over_base': seconds['predict_model'] / (forward + seconds['read_images']),
    }


def unlabelled(name, labelled=100, count=5_000):
    """A prediction from few labelled images and many without labels, against one where all have labels."""
    images = torch.randint(256, (count, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(count) % 4
    ways = {
        'self_training': lambda: timm_pudnet.predict_model(
            name, images[:labelled], labels[:labelled], unlabelled=images[labelled:], device='cpu'
        ),
        'all_labelled': lambda: timm_pudnet.predict_model(name, images, labels, head='blend', device='cpu'),
    }
    seconds = {way: median_seconds(run, 5) for way, run in ways.items()}
    return {
        'images': count,
        'labelled': labelled,
        **{f'{way}_ms': 1e3 * value for way, value in seconds.items()},
        'self_training_over_all_labelled': seconds['self_training'] / seconds['all_labelled'],
    }


class Noise(torch.utils.data.Dataset):
    """Images made when asked for, so that only the prediction's own memory counts."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        pixels = torch.randint(256, (1, 28, 28), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        return pixels, index % 4


def peak_mb():
    """The most memory that this process had; not ru_maxrss, which a child inherits from its parent."""
    return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1]) / 1024


def in_its_own_process(function, *arguments):
    """What a function puts into the queue that it gets as its last argument."""
    context = multiprocessing.get_context('spawn')
    queue = context.Queue()
    process = context.Process(target=function, args=(*arguments, queue))
    process.start()
    result = queue.get(timeout=3600)
    process.join()
    return result


def peak_of(name, count, queue):
    timm_pudnet.predict_model(name, Noise(count), device='cpu')
    queue.put(peak_mb())


def memory(name, counts=(1_000, 100_000)):
    """Peak resident memory of predictions over few and many images, each in a process of its own."""
    peaks = {count: in_its_own_process(peak_of, name, count) for count in counts}
    first, *_, last = peaks.values()
    return {'peak_mb': {f'{count}_images': peak for count, peak in peaks.items()}, 'last_over_first': last / first}


def show(result, path):
    """Prints a result as JSON, and writes it where a path is given."""
    text = json.dumps(result, indent=2)
    print(text)
    if path:
        path.write_text(text + '\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, help='write the JSON here too')
    arguments = parser.parse_args()
    result = {
        'machine': f'{platform.machine()}, {torch.get_num_threads()} threads',
        'library_versions': library_versions(),
        'hypernet': timm_pudnet.load_hypernet('resnet18').name,  # where none is named
        'generation': generation(timm_pudnet.load_hypernet('resnet18.fashion_set')),
        'prediction': prediction('resnet18'),
        'unlabelled': unlabelled('resnet18'),
        'memory': memory('resnet18'),
    }
    show(result, arguments.out)


if __name__ == '__main__':
    main()
