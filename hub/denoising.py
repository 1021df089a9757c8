"""Measures a hypernetwork of denoisers on one set of clean photographs, and writes results.NAME.json into its folder.

    python hub/denoising.py hub/blindspot_unet.mixed_noise .data/bsds500/test --protocol bsds500 \
        --plain hub/blindspot_unet.mixed_noise/plain --other .data/cifar10/test
    python hub/denoising.py hub/blindspot_unet.mixed_noise .data/bsds500/test --protocol bsds500 --scratch 100

Gaussian noise is added to the images, or that of counted photons (--kind poisson; sigma is then that of a grey of 0.5);
denoisers get the noisy ones alone, as floats that noise takes beyond 0-1, or with --clipped as a file of 8 bits holds
them, with --jpeg as one of that quality. With --kind camera noise is Gaussian on a sensor behind a Bayer mosaic, whose
missing colours are then interpolated (bilinear, by OpenCV, in 16 bits), so that neighbouring pixels share it; clean
images go through the same mosaic. The paper's sigma can be read in two ways: `standard`, in units of the
set's own standard deviation, as where images are standardised first, and `unit`, of pixels in 0-1. PSNR and SSIM are of
results clipped to 0-1, means over images, with 95 % intervals; gains are paired by image. Needs scikit-image (`pip
install -e '.[test]'`).

Denoisers by the network measure the noise of the images against their guesses, take each noisy pixel itself into
account, and correct what is coarse by the images at half and at a quarter of their size, each by weights for that size
(the control and training from scratch by the same ones, calibrated). Beside the predicted one (`predicted`) stand: that
without smaller sizes (`predicted, one size`), and its guesses at full size alone (`predicted, blind`); the noisy images; a
Gaussian filter and non-local means that are told sigma, with that strength of some that is best for the first four
images, known from their clean ones (of photons, behind Anscombe's transform, which makes the noise of all brightnesses
alike, and before its exact unbiased inverse, Makitalo and Foi 2011; with --clipped told what sigma is left, and besides with the mean that clipping
moves put back by the true sigma, `..., unclipped`); weights of the sketch of the same images with another sigma and of
another set, calibrated on the images (`sketch of ...`); all of the denoiser, norm statistics and noise too, from the
images with another sigma (`predicted for ...`); of noise that pixels share what is predicted as if they did not
(`predicted, as if white`); the control *plain*, one denoiser of the same training images for all
noise, with its own statistics, calibrated, and calibrated on the images with another sigma. With --scratch the rival
alone that trains on these very noisy images: the same UNet from random weights by the same loss, Adam with and without
centralised gradients, written to scratch.NAME.json; by its guesses alone (`psnr_blind`), with the noisy pixels
(`psnr_one_size`) and with smaller sizes too (`psnr`). One epoch of it sees as many pixels as the images have, in crops of
at most 128. With --bm3d the rival alone that is the standard one of classical denoising, told sigma, written to
bm3d.NAME.json (`pip install bm3d`, whose licence forbids commercial use).
"""

import copy
import importlib.util
import io
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import timm
import torch
from PIL import Image
from skimage.restoration import denoise_nl_means
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur, pil_to_tensor, to_pil_image
from tqdm import tqdm

from timm_pudnet import PudNet, PudNetError, denoise, load_hypernet
from timm_pudnet.denoising import (
    add_noise,
    blind_spot_loss,
    blind_spots,
    calibrated_denoiser,
    denoiser_of,
    joined,
    noisy_patches,
    psnr,
    shrunk,
    sketch_of,
    ssim,
    whitened,
)
from timm_pudnet.denoising.clipping import Unclip
from timm_pudnet.denoising.pictures import list_pictures, read_picture
from timm_pudnet.devices import library_versions
from timm_pudnet.evaluation import mean_interval
from timm_pudnet.evaluation.scratch import centralise_gradients
from timm_pudnet.files import config_sha256, weights_sha256, written_whole

EPOCHS = (1, 10, 30, 100, 300)  # of scratch, after which it is tested
CROP = 128
SSIM_OF = ('noisy', 'non-local means', 'predicted', 'plain, calibrated')  # it takes longer than denoising
STRENGTHS = {
    'gaussian filter': (0.4, 0.6, 0.9, 1.3, 1.9, 2.7, 3.8, 5.4),
    'non-local means': (0.1, 0.15, 0.2, 0.3, 0.45, 0.65, 0.9, 1.3),
}


@click.command(help=__doc__)
@click.argument('hypernet', type=click.Path(path_type=Path))
@click.argument('folder')
@click.option('--protocol', required=True, help='Name of the results file.')
@click.option('--plain', type=click.Path(path_type=Path), help='Folder of the control.')
@click.option('--other', help='Folder of another set, for its sketch.')
@click.option(
    '--images',
    'count',
    type=click.IntRange(2),
    default=100,
    show_default=True,
    help='Images, spread evenly over the folder.',
)
@click.option(
    '--sigma',
    'sigmas',
    multiple=True,
    type=click.FloatRange(0, min_open=True),
    default=(0.25, 0.5, 0.75),
    show_default=True,
)
@click.option('--reading', type=click.Choice(['standard', 'unit']), default='standard', show_default=True)
@click.option('--kind', type=click.Choice(['gaussian', 'poisson', 'camera']), default='gaussian', show_default=True)
@click.option(
    '--turns',
    type=click.Choice(['1', '2', '4']),
    default='1',
    show_default=True,
    help='Turned copies whose mean every denoiser by a network gives.',
)
@click.option('--clipped', is_flag=True, help='Noisy images as files hold them: clipped to 0-1, of 8 bits.')
@click.option('--jpeg', type=click.IntRange(1, 100), help='Noisy images as JPEG files of this quality hold them.')
@click.option('--scratch', default=0, show_default=True, help='Epochs of training from scratch; measures that alone.')
@click.option('--bm3d', is_flag=True, help='Measures BM3D beside the predicted denoiser, and these alone.')
@click.option('--out', type=click.Path(path_type=Path), help='Where the results go, in place of the folder.')
def main(
    hypernet: Path,
    folder: str,
    protocol: str,
    plain: Path | None,
    other: str | None,
    count: int,
    sigmas: tuple[float, ...],
    reading: str,
    kind: str,
    turns: str,
    clipped: bool,
    jpeg: int | None,
    scratch: int,
    bm3d: bool,
    out: Path | None,
) -> None:
    """What the module's docstring says."""
    if scratch and (turns != '1' or plain or other):
        raise click.UsageError('--turns, --plain and --other are not for --scratch: leave them out')
    if jpeg and clipped:
        raise click.UsageError('--jpeg clips by itself: leave --clipped out')
    if scratch and (jpeg or kind == 'camera'):
        raise click.UsageError('--scratch is of noise that pixels do not share: leave --jpeg and --kind camera out')
    if bm3d and (scratch or turns != '1' or plain or other or clipped or jpeg or kind != 'gaussian'):
        raise click.UsageError('--bm3d is of Gaussian noise of floats, and measured alone: leave the others out')
    if bm3d and importlib.util.find_spec('bm3d') is None:
        raise click.UsageError('--bm3d needs its package, whose licence forbids commercial use: pip install bm3d')
    if not (out or hypernet).is_dir():
        raise click.UsageError(f'{out or hypernet}: no such folder')
    network = load_hypernet(hypernet).eval()
    control = None if plain is None else timm.create_model(f'local-dir:{plain}', pretrained=True).eval()
    clean, elsewhere = pictures(folder, count), pictures(other, count) if other else []
    if kind == 'camera':
        if len(clean[0]) != 3:
            raise click.UsageError('--kind camera is of images in colour')
        clean, elsewhere = ([demosaiced(image) for image in images] for images in (clean, elsewhere))
    spread = float(torch.cat([image.flatten() for image in clean]).std())
    result: dict[str, Any] = {
        'protocol': protocol,
        'weights_sha256': weights_sha256(hypernet),
        'config_sha256': config_sha256(hypernet),
        **({} if plain is None else {'plain_sha256': weights_sha256(plain)}),
        'folder': folder,
        'images': len(clean),
        'standard_deviation': spread,
        **({} if scratch else {'turns': int(turns)}),
        **({'kind': kind} if kind != 'gaussian' else {}),
        **({'clipped': True} if clipped else {}),
        **({'jpeg': jpeg} if jpeg else {}),
        'training': network.config.training,
        'library_versions': library_versions(),
        'threads': torch.get_num_threads(),
        'noises': [],
    }
    path = (out or hypernet) / f'{"scratch" if scratch else "bm3d" if bm3d else "results"}.{protocol}.json'
    for sigma in sigmas:
        absolute = sigma * (spread if reading == 'standard' else 1)
        away = 0.75 if sigma < 0.5 else 0.25
        if jpeg or kind == 'camera':
            away = 4 * sigma if sigma < 0.1 else sigma / 4
        noisy = made_noisy(clean, kind, absolute, clipped, jpeg)
        noisier = made_noisy(clean, kind, absolute * away / sigma, clipped, jpeg)
        condition: dict[str, Any] = {'reading': reading, 'sigma': sigma, 'absolute': absolute, 'other_sigma': away}
        click.echo(f'{kind}, {reading} sigma {sigma} ({absolute:.3f} of 0-1)')
        if scratch:
            condition['predicted_seconds'] = timed_prediction(network, noisy)[0]
            for name in ('adam', 'adam_centralised'):
                condition[name] = from_scratch(network, clean, noisy, scratch, centralise=name == 'adam_centralised')
                for point in condition[name]:
                    both = (
                        f'{point["psnr"]:6.2f} dB ({point["psnr_one_size"]:.2f}, {point["psnr_blind"]:.2f} by guesses)'
                    )
                    click.echo(f'  {name}, epoch {point["epoch"]:3} {both} in {point["seconds"]:.0f} s')
        elif bm3d:
            condition |= beside_bm3d(network, clean, noisy, absolute)
            click.echo('  ' + ', '.join(f'{name} {row["mean"]:.2f} dB' for name, row in condition['psnr'].items()))
        else:
            third = made_noisy(elsewhere, kind, absolute, clipped, jpeg)
            condition |= measure(
                network, control, clean, noisy, noisier, third, kind, absolute, int(turns), clipped, bool(jpeg)
            )
            click.echo(f'  predicted in {condition["seconds"]:.2f} s')
            for name, row in condition['psnr'].items():
                gain = condition['gain'].get(name)
                over = '' if gain is None else f', gain {gain["mean"]:+.2f} +- {gain["interval"]:.2f}'
                click.echo(f'  {name:27} {row["mean"]:6.2f} +- {row["interval"]:.2f} dB{over}')
        result['noises'].append(condition)
    with written_whole(path) as beside:
        beside.write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')


def pictures(folder: str, count: int) -> list[Tensor]:
    """So many images of a folder, spread evenly over it, each `[c, h, w]` in 0-1."""
    paths = list(list_pictures(folder).values())
    count = min(count, len(paths))
    return [read_picture(paths[number * len(paths) // count]).pixels for number in range(count)]


def demosaiced(image: Tensor) -> Tensor:
    """An image `[3, h, w]` of which each pixel has kept one colour (RGGB), the others interpolated; in 0-1."""
    sensor = image.clamp(0, 1).mul(65535).round().numpy().astype(np.uint16)
    mosaic = sensor[1].copy()
    mosaic[::2, ::2], mosaic[1::2, 1::2] = sensor[0, ::2, ::2], sensor[2, 1::2, 1::2]
    colours = cv2.demosaicing(mosaic, cv2.COLOR_BayerRGGB2RGB)
    return torch.from_numpy(colours.astype(np.float32) / 65535).permute(2, 0, 1).contiguous()


def compressed(image: Tensor, quality: int) -> Tensor:
    """An image `[c, h, w]` as a JPEG file of that quality holds it."""
    file = io.BytesIO()
    to_pil_image(image.clamp(0, 1)).save(file, 'JPEG', quality=quality)
    return pil_to_tensor(Image.open(file)) / 255


def made_noisy(
    images: Sequence[Tensor], kind: str, sigma: float, clipped: bool, jpeg: int | None = None
) -> list[Tensor]:
    """The images with noise, each with a seed of its own; as floats, or as a file of 8 bits or JPEG holds them."""
    of_pixels = 'gaussian' if kind == 'camera' else kind
    noisy = [
        add_noise(image, of_pixels, sigma, torch.Generator().manual_seed(number)) for number, image in enumerate(images)
    ]
    if kind == 'camera':
        noisy = [demosaiced(image) for image in noisy]
    if jpeg:
        return [compressed(image, jpeg) for image in noisy]
    return [image.clamp(0, 1).mul(255).round().div(255) for image in noisy] if clipped else noisy


def measure(
    network: PudNet,
    control: nn.Module | None,
    clean: list[Tensor],
    noisy: list[Tensor],
    noisier: list[Tensor],
    elsewhere: list[Tensor],
    kind: str,
    sigma: float,
    turns: int,
    clipped: bool,
    jpeg: bool,
) -> dict[str, Any]:
    """PSNR and SSIM of every arm, means over images, and gains of the predicted denoiser over the others."""
    seconds, predicted, patches, shared = timed_prediction(network, noisy)
    other_patches, other_shared = patches_of(network, noisier)
    other_sketches = sketches_of(network, other_patches, len(patches))
    blind, one_size = copy.deepcopy(predicted), copy.deepcopy(predicted)
    blind.posterior = None
    one_size.set_coarse([])
    models = {
        'predicted': predicted,
        'predicted, blind': blind,
        'predicted, one size': one_size,
        'sketch of another sigma': denoiser_of(network, other_sketches, patches, shared=shared),
        'predicted for another sigma': denoiser_of(network, other_sketches, other_patches, shared=other_shared),
    }
    if shared is not None:
        as_they_are = plain_patches_of(network, noisy)
        sketches = sketches_of(network, as_they_are, len(as_they_are))
        models['predicted, as if white'] = denoiser_of(network, sketches, as_they_are)
    if elsewhere:
        sketches = sketches_of(network, patches_of(network, elsewhere)[0], len(patches))
        models['sketch of another set'] = denoiser_of(network, sketches, patches, shared=shared)
    arms: dict[str, Callable[[Tensor], Tensor]] = {'noisy': lambda image: image}
    # By the true strength; that of photons grows with their number.
    strengths, unclip = {}, Unclip([0.0, 2 * sigma**2] if kind == 'poisson' else [sigma**2, sigma**2])
    photons = 0.5 / sigma**2
    if (
        kind == 'camera' or jpeg or (kind == 'gaussian' and clipped)
    ):  # the filters are told how strong the noise is that is left
        sigma = float(torch.cat([(n - c).flatten() for n, c in zip(noisy, clean, strict=True)]).std())
    for name, of_gaussian in (('gaussian filter', blurred), ('non-local means', non_local_means)):
        how = stabilised(of_gaussian, photons) if kind == 'poisson' else of_gaussian
        ways = {name: how}
        if clipped and not jpeg and kind != 'camera':
            ways[f'{name}, unclipped'] = lambda *args, how=how: unclip(how(*args))
        for way, what in ways.items():
            chosen = strengths[way] = best_strength(STRENGTHS[name], what, clean, noisy, sigma)
            arms[way] = lambda image, what=what, chosen=chosen: what(image, sigma, chosen)
    arms |= {name: lambda image, model=model: denoise(model, image, turns=turns) for name, model in models.items()}
    table: dict[str, dict[str, list[float]]] = {'psnr': {}, 'ssim': {}}

    def add(name: str, arm: Callable[[Tensor], Tensor]) -> None:
        found = [arm(image).clamp(0, 1) for image in tqdm(noisy, name, delay=5, leave=False)]
        pairs = list(zip(found, clean, strict=True))
        table['psnr'][name] = [float(psnr(one, other)) for one, other in pairs]
        if name in SSIM_OF:
            table['ssim'][name] = [float(ssim(one, other)) for one, other in pairs]

    for name, arm in arms.items():
        add(name, arm)
    if control is not None:
        as_it_is = joined([copy.deepcopy(control) for _ in patches], patches, shared=shared)
        add('plain, its own statistics', lambda image: denoise(as_it_is, image, turns=turns))
        weights = [control.state_dict()] * len(patches)
        for name, shown, its in (
            ('plain, calibrated', patches, shared),
            ('plain, calibrated for another sigma', other_patches, other_shared),
        ):
            calibrated = calibrated_denoiser(network, weights, shown, shared=its)
            add(name, lambda image, model=calibrated: denoise(model, image, turns=turns))
    gains = {
        name: mean_interval([a - b for a, b in zip(table['psnr']['predicted'], values, strict=True)])
        for name, values in table['psnr'].items()
        if name not in ('predicted', 'noisy')
    }
    means = {kind: {name: mean_interval(values) for name, values in rows.items()} for kind, rows in table.items()}
    return {**means, 'gain': gains, 'strengths': strengths, 'seconds': seconds}


def patches_of(network: PudNet, images: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
    """Patches of noisy images in memory, of every size, their noise made white; how pixels shared it."""
    patches, shared = whitened(noisy_patches(images, *network.config.input.input_size[:2]))
    return shrunk(patches), shared


def plain_patches_of(network: PudNet, images: Sequence[Tensor]) -> list[Tensor]:
    """The same as they are."""
    return shrunk(noisy_patches(images, *network.config.input.input_size[:2]))


def sketches_of(network: PudNet, patches: Sequence[Tensor], sizes: int) -> list[Tensor]:
    """Their sketches; of so many sizes, the last again where a set has not as many."""
    found = [sketch_of(network, shown) for shown in patches]
    return [found[min(size, len(found) - 1)] for size in range(sizes)]


def timed_prediction(network: PudNet, noisy: list[Tensor]) -> tuple[float, nn.Module, list[Tensor], Any]:
    """Seconds of predicting a denoiser for images in memory, the second time; it; patches and shared noise it is from."""
    for _ in range(2):
        started = time.perf_counter()
        patches, shared = patches_of(network, noisy)
        sketches = sketches_of(network, patches, len(patches))
        predicted = denoiser_of(network, sketches, patches, shared=shared)
        seconds = time.perf_counter() - started
    return seconds, predicted, patches, shared


def blurred(image: Tensor, sigma: float, strength: float) -> Tensor:
    """A Gaussian filter, `strength` its width in pixels; `sigma` is not used."""
    reach = 2 * round(3 * strength) + 1
    return gaussian_blur(image, [min(reach, 2 * ((side - 1) // 2) + 1) for side in image.shape[:0:-1]], strength)


def non_local_means(image: Tensor, sigma: float, strength: float) -> Tensor:
    """Non-local means of scikit-image, with a cut-off of `strength` times sigma."""
    grey = len(image) == 1
    found = denoise_nl_means(
        (image[0] if grey else image).double().numpy(),
        patch_size=5,
        patch_distance=6,
        h=strength * sigma,
        sigma=sigma,
        fast_mode=True,
        channel_axis=None if grey else 0,
    )
    return torch.from_numpy(np.ascontiguousarray(found)).float().view(image.shape)


def beside_bm3d(network: PudNet, clean: list[Tensor], noisy: list[Tensor], sigma: float) -> dict[str, Any]:
    """PSNR of the predicted denoiser and of BM3D (Dabov et al. 2007, in colour), told sigma, and what is between them."""
    from bm3d import bm3d_rgb

    predicted = timed_prediction(network, noisy)[1]

    def classical(image: Tensor) -> Tensor:
        return (
            torch.from_numpy(bm3d_rgb(image.permute(1, 2, 0).double().numpy(), sigma).copy()).float().permute(2, 0, 1)
        )

    arms = {'predicted': lambda image: denoise(predicted, image), 'bm3d': classical}
    found = {
        name: [
            float(psnr(arm(image).clamp(0, 1), other))
            for image, other in zip(tqdm(noisy, name, leave=False), clean, strict=True)
        ]
        for name, arm in arms.items()
    }
    gain = mean_interval([a - b for a, b in zip(found['predicted'], found['bm3d'], strict=True)])
    return {'psnr': {name: mean_interval(values) for name, values in found.items()}, 'gain': {'bm3d': gain}}


def stabilised(how: Callable, photons: float) -> Callable:
    """A filter for Gaussian noise as one for counted photons, so many at white."""

    def filtered(image: Tensor, sigma: float, strength: float) -> Tensor:
        roots = how(2 * (image * photons + 3 / 8).clamp_min(0).sqrt(), 1.0, strength).clamp_min(2 * math.sqrt(3 / 8))
        tail = math.sqrt(3 / 2) * (roots**-1 / 4 + 5 / 8 * roots**-3) - 11 / 8 * roots**-2 - 1 / 8
        return (roots.square() / 4 + tail).clamp_min(0) / photons

    return filtered


def best_strength(
    strengths: Sequence[float], how: Callable, clean: list[Tensor], noisy: list[Tensor], sigma: float
) -> float:
    """The strength that brings the first four images nearest to the clean ones."""

    def quality(strength: float) -> float:
        return sum(
            float(psnr(how(n, sigma, strength).clamp(0, 1), c)) for c, n in zip(clean[:4], noisy[:4], strict=True)
        )

    return max(strengths, key=quality)


def from_scratch(
    network: PudNet, clean: list[Tensor], noisy: list[Tensor], epochs: int, *, centralise: bool
) -> list[dict[str, float]]:
    """Trains the target on the noisy images alone; PSNR on them, and seconds of training, after some epochs."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(network.config.model_name, **network.config.model_kwargs)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    side = min(CROP, *(min(image.shape[1:]) for image in noisy))
    crops_of = torch.tensor([max(1, round(image[0].numel() / side**2)) for image in noisy])
    turns = torch.arange(len(noisy)).repeat_interleave(crops_of)
    patches = plain_patches_of(network, noisy)
    seconds, points = 0.0, []
    for epoch in range(1, epochs + 1):
        started = time.perf_counter()
        model.train()
        model.set_noise(None)
        for picks in turns[torch.randperm(len(turns), generator=generator)].split(8):
            crops = []
            for image in (noisy[pick] for pick in picks.tolist()):
                top, left = (int(torch.randint(size - side + 1, (), generator=generator)) for size in image.shape[1:])
                crops.append(image[:, top : top + side, left : left + side].expand(model.in_chans, -1, -1))
            batch = torch.stack(crops)
            masked, places = blind_spots(batch, generator)
            guesses = model(masked.contiguous(memory_format=torch.channels_last))
            loss = blind_spot_loss(guesses, batch, masked, places)
            optimizer.zero_grad()
            loss.backward()
            if centralise:
                centralise_gradients(model.parameters())
            optimizer.step()
        seconds += time.perf_counter() - started
        if epoch in (*EPOCHS, epochs):
            model.eval()
            point = {'epoch': epoch, 'seconds': seconds, 'psnr_blind': mean_psnr(model, noisy, clean)}
            own = copy.deepcopy(model)
            point['psnr_one_size'] = mean_psnr(joined([own], patches[:1]), noisy, clean)
            coarser = [
                calibrated_denoiser(network, [model.state_dict()], [shown]) for shown in patches[1:]
            ]  # by its weights, since it has seen images of full size alone
            points.append({**point, 'psnr': mean_psnr(joined([own, *coarser], patches), noisy, clean)})
    return points


def mean_psnr(model: nn.Module, noisy: list[Tensor], clean: list[Tensor]) -> float:
    """PSNR of the denoised images, the mean over them."""
    found = [float(psnr(denoise(model, n).clamp(0, 1), c)) for n, c in zip(noisy, clean, strict=True)]
    return sum(found) / len(found)


if __name__ == '__main__':
    try:
        main()
    except (PudNetError, OSError) as error:
        print(f'Error: {error}', file=sys.stderr)
        sys.exit(2)
