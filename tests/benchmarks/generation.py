"""What weight generation and prediction cost over the bytes they move, for networks small and large.

    python tests/benchmarks/generation.py [--out FILE.json] [--plot FILE.png] [--images 100 1000 10000]
        [--files 3000] [--photos 150] [--largest NAME]

Run it on an otherwise idle machine. Ratios are of medians in one run: generation over reading the hypernetwork's bytes
once and writing the target's once; the same with loading into a model; a prediction beside reading its images and one
forward pass of the predicted network over them.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from prediction import in_its_own_process, median_seconds, moves_its_bytes, peak_mb, show
from torchvision.io import write_jpeg

import timm_pudnet
from timm_pudnet.devices import library_versions
from timm_pudnet.target import create_feature_model

TARGETS = {
    'resnet18': {},
    'resnet50': {},
    'efficientnet_b0': {},
    'convnext_tiny': {'conv_mlp': True},
    'mobilenetv3_small_050': {},
    'densenet121': {},
    'resnet152': {},
    'convnext_large': {'conv_mlp': True},
}


def steered(name, model_kwargs):
    """A residual hypernetwork in which nothing is zero, so that no work can be left out."""
    hypernet = timm_pudnet.PudNet.for_target(
        name, generator='residual', sketch_width=64, model_kwargs=model_kwargs
    ).eval()
    for parameter in hypernet.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.01)
    return hypernet


def one_by_one(hypernet, sketch):
    """Residual generators as one would first write them: a product for every part of every layer."""
    weights = {}
    for layer, generator, code in zip(hypernet.target.layers, hypernet.generators, hypernet.ahru(sketch), strict=True):
        if len(layer.kernel) == 1:
            weights[layer.key] = generator.base + generator.change @ (code / len(code) ** 0.5)
        elif not generator.changed:
            weights[layer.key] = generator.base.clone()
        else:
            given, kernel = generator.steer @ code, generator.base
            taps, channels, rank = given.split(generator.sizes)
            if len(taps):
                kernel = kernel @ (taps.view(generator.taps, -1) + torch.eye(generator.taps))
            if len(channels):
                mixing = channels.view(generator.channels, -1) + torch.eye(generator.channels)
                kernel = torch.einsum('ji,oit->ojt', mixing, kernel)
            if len(rank):
                change = generator.left @ torch.diag(rank) @ generator.right
                kernel = kernel + generator.scale * change.view_as(kernel)
            weights[layer.key] = kernel.reshape(layer.shape)
    return weights


@torch.inference_mode()
def generation(name, model_kwargs):
    hypernet = steered(name, model_kwargs)
    model = create_feature_model(hypernet.target).eval()
    sketch = torch.randn(hypernet.config.sketch_width)
    found, expected = hypernet(sketch), one_by_one(hypernet, sketch)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4)
    runs = 41 if hypernet.target.numel('predicted') < 5e7 else 9
    floor_seconds = median_seconds(moves_its_bytes(hypernet), runs)
    seconds = {
        'generation': median_seconds(lambda: hypernet(sketch), runs),
        'generation_and_loading': median_seconds(lambda: model.load_state_dict(hypernet(sketch)), runs),
        'one_by_one': median_seconds(lambda: one_by_one(hypernet, sketch), runs),
    }
    weights = hypernet.target.numel('predicted') + hypernet.target.numel('shared')
    return {
        'weights': weights,
        'layers': len(hypernet.target.layers),
        'parameters_over_weights': sum(parameter.numel() for parameter in hypernet.parameters()) / weights,
        'floor_ms': 1e3 * floor_seconds,
        **{f'{key}_ms': 1e3 * value for key, value in seconds.items()},
        **{f'{key}_over_floor': value / floor_seconds for key, value in seconds.items()},
    }


class Noise(torch.utils.data.Dataset):
    """Images made when asked for, of which nothing is kept."""

    def __init__(self, count):
        self.count = count
        self.pixels = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.pixels[index % 64].roll(index // 64, -1), index % 4


def streamed(count, queue):
    """A prediction over so many images, the two parts that it cannot do without, and the peak of memory."""
    queue.put(timed(Noise(count), rounds=3 if count <= 10_000 else 1))


def from_files(count, height, width, queue):
    """The same from a folder of so many JPEG files of this size."""
    with tempfile.TemporaryDirectory() as folder:
        shades = torch.rand(3, 12, 16)
        for number in range(count):
            path = Path(folder, str(number % 4), f'{number}.jpg')
            path.parent.mkdir(exist_ok=True)
            pixels = torch.nn.functional.interpolate(shades.roll(number, 2)[None], (height, width), mode='bicubic')[0]
            write_jpeg((255 * pixels.clamp(0, 1)).byte(), str(path))
        queue.put(timed(folder, rounds=3))


def timed(images, rounds):
    """Seconds of a prediction from some images, and of reading them and one forward pass; medians of some rounds."""
    config = timm_pudnet.load_hypernet('resnet18').config.input
    seconds = {'predict_s': [], 'read_s': [], 'forward_s': []}
    peak = 0.0
    for _ in range(rounds):
        started = time.perf_counter()
        model = timm_pudnet.predict_model('resnet18', images, device='cpu')
        seconds['predict_s'].append(time.perf_counter() - started)
        read = forward = 0.0
        with torch.inference_mode():
            marked = time.perf_counter()
            for batch, _ in timm_pudnet.open_images(images, input=config).batches():
                read += time.perf_counter() - marked
                marked = time.perf_counter()
                model(batch)
                forward += time.perf_counter() - marked
                marked = time.perf_counter()
        seconds['read_s'].append(read)
        seconds['forward_s'].append(forward)
        peak = peak or peak_mb()  # of the first round
    found = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        **found,
        'predict_over_both': found['predict_s'] / (found['read_s'] + found['forward_s']),
        'share_of_decode_speed': found['read_s'] / found['predict_s'],
        'peak_mb': peak,
    }


def predicted(name, queue):
    """The largest one: planned, made, its weights predicted from random images."""
    started = time.perf_counter()
    side = timm_pudnet.InputConfig(input_size=(3, 64, 64))
    plan = timm_pudnet.plan_hypernet(name, generator='residual', sketch_width=64)
    hypernet = timm_pudnet.PudNet.for_target(name, generator='residual', sketch_width=64, input=side).eval()
    made = time.perf_counter()
    images, labels = torch.rand(16, 3, 64, 64), torch.arange(16) % 4
    model = timm_pudnet.predict_model(name, images, labels, hypernet=hypernet, device='cpu')
    done = time.perf_counter()
    with torch.inference_mode():
        assert model(images).isfinite().all()
        forward = time.perf_counter() - done
    queue.put(
        {
            'name': name,
            'weights': plan.weights,
            'make_s': made - started,
            'predict_s': done - made,
            'forward_s': forward,
            'peak_mb': peak_mb(),
        }
    )


def plot(result, path):
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout='constrained')
    rows = sorted(result['generation'].items(), key=lambda item: item[1]['weights'])
    for key in ('generation', 'generation_and_loading', 'one_by_one'):
        left.plot([r['weights'] / 1e6 for _, r in rows], [r[f'{key}_over_floor'] for _, r in rows], 'o-', label=key)
    left.axhline(1.3, color='grey', linestyle=':')
    left.set(xscale='log', xlabel='million weights', ylabel='over reading and writing the bytes', ylim=(0, None))
    left.legend()
    counts = sorted(map(int, result['streamed']))
    for key in ('predict_s', 'read_s', 'forward_s'):
        right.plot(counts, [result['streamed'][str(count)][key] for count in counts], 'o-', label=key)
    right.set(xscale='log', yscale='log', xlabel='images', ylabel='seconds')
    right.legend()
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, help='write the JSON here too')
    parser.add_argument('--plot', type=Path, help='draw it here')
    parser.add_argument('--images', type=int, nargs='*', default=[100, 1000, 10_000])
    parser.add_argument('--only-images', action='store_true', help='measure images and files alone')
    parser.add_argument('--files', type=int, default=3000, help='JPEG files of 500x375, more than calibration takes')
    parser.add_argument('--photos', type=int, default=150, help='JPEG files of 4000x3000')
    parser.add_argument('--largest', help='an architecture to plan, make and predict')
    arguments = parser.parse_args()
    warnings.simplefilter('ignore')
    rest = not arguments.only_images
    result = {
        'machine': f'{platform.machine()}, {torch.get_num_threads()} threads',
        'library_versions': library_versions(),
        'hypernet': timm_pudnet.load_hypernet('resnet18').name,  # where none is named
        'generation': {name: generation(name, kwargs) for name, kwargs in TARGETS.items()} if rest else {},
        'streamed': {str(count): in_its_own_process(streamed, count) for count in arguments.images},
    }
    for kind, count, size in (('files', arguments.files, (375, 500)), ('photos', arguments.photos, (3000, 4000))):
        if count:
            result[kind] = in_its_own_process(from_files, count, *size) | {'images': count}
    if arguments.largest:
        result['largest'] = in_its_own_process(predicted, arguments.largest)
    show(result, arguments.out)
    if arguments.plot:
        plot(result, arguments.plot)


if __name__ == '__main__':
    main()
