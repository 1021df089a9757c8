"""Speed and memory of denoising, as ratios in one run on one machine.

    python tests/benchmarks/denoising.py [--hypernet NAME] [--out FILE.json]

Run it on an otherwise idle machine. Every figure is the median of several runs after a warm-up.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path

import torch
from prediction import in_its_own_process, median_seconds, peak_mb
from torch.nn import functional

import timm_pudnet
from timm_pudnet.denoising import fused
from timm_pudnet.devices import library_versions

SIDES = 1024, 4096  # of the images whose peak memory is compared


def shared(images):
    """Images of noise that neighbouring pixels share."""
    return functional.avg_pool2d(images, 3, 1, 1)


def peak_of(hypernet, side, share, queue):
    """Peak memory in MB of a denoiser and of denoising one colour image, less what the image and its result take."""
    torch.set_num_threads(2)
    image = torch.rand(3, side, side)
    if share:
        image = shared(image)
    model = timm_pudnet.predict_denoiser([image], hypernet=hypernet, device='cpu')
    denoised = timm_pudnet.denoise(model, image)
    queue.put(peak_mb() - (image.nbytes + denoised.nbytes) / 2**20)


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--hypernet', default='blindspot_unet')
    parser.add_argument('--out', type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    images = torch.rand(20, 3, 512, 512)
    hypernet = timm_pudnet.load_hypernet(options.hypernet)
    model = timm_pudnet.predict_denoiser(images, hypernet=hypernet, device='cpu')
    copied = fused(model)  # as the command makes it, once for all images
    images_shared = shared(images)
    model_shared = timm_pudnet.predict_denoiser(images_shared, hypernet=hypernet, device='cpu')
    assert model.whitening is None
    assert model_shared.whitening is not None
    seconds = {
        'denoise': median_seconds(lambda: timm_pudnet.denoise(model, images[0]), 9),
        'denoise_fused': median_seconds(lambda: timm_pudnet.denoise(copied, images[0]), 9),
        'denoise_in_tiles_of_128': median_seconds(lambda: timm_pudnet.denoise(model, images[0], tile=128), 5),
        'denoise_shared_noise': median_seconds(lambda: timm_pudnet.denoise(model_shared, images_shared[0]), 9),
        'forward': median_seconds(lambda: model(images[:1]), 9),
        'predict_denoiser': median_seconds(
            lambda: timm_pudnet.predict_denoiser(images, hypernet=hypernet, device='cpu'), 5
        ),
        'predict_denoiser_shared_noise': median_seconds(
            lambda: timm_pudnet.predict_denoiser(images_shared, hypernet=hypernet, device='cpu'), 5
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        hypernet.save_pretrained(Path(folder) / 'net')
        peaks, shared_peaks = (
            {side: in_its_own_process(peak_of, Path(folder) / 'net', side, share) for side in SIDES}
            for share in (False, True)
        )
    result = {
        'hypernet': hypernet.name,
        'machine': f'{platform.machine()}, {torch.get_num_threads()} threads',
        **{f'{name}_ms': 1e3 * value for name, value in seconds.items()},
        'images_512_per_second': 1 / seconds['denoise_fused'],
        'denoise_over_forward': seconds['denoise'] / seconds['forward'],
        'shared_noise_over_white': seconds['denoise_shared_noise'] / seconds['denoise'],
        'tiles_of_128_over_forward': seconds['denoise_in_tiles_of_128'] / seconds['forward'],
        'predict_over_forward_of_20_images': seconds['predict_denoiser'] / (20 * seconds['forward']),
        'peak_mb_less_images': peaks,
        'peak_mb_growth': peaks[SIDES[1]] - peaks[SIDES[0]],
        'peak_mb_growth_shared_noise': shared_peaks[SIDES[1]] - shared_peaks[SIDES[0]],
        'library_versions': library_versions(),
    }
    text = json.dumps(result, indent=2) + '\n'
    print(text, end='')
    if options.out:
        options.out.write_text(text)


if __name__ == '__main__':
    main()
