"""Adds noise to a folder of images, predicts a denoiser for the noisy ones alone, and says how near it comes.

    python examples/denoise.py photos/ --sigma 0.2 --out denoised

The photos must all be in colour, or all grey: one denoiser serves them all. It sees no clean image, and nothing is
trained. In --out, which must be new: noisy/ and denoised/, as PNG files.
"""

from pathlib import Path

import click
import torch
from torchvision.utils import save_image

import timm_pudnet
from timm_pudnet.denoising import add_noise, psnr
from timm_pudnet.denoising.pictures import list_pictures, read_picture
from timm_pudnet.predict import check_output


@click.command(help=__doc__)
@click.argument('folder', type=click.Path(path_type=Path))
@click.option(
    '--sigma',
    type=click.FloatRange(0, min_open=True),
    default=0.2,
    show_default=True,
    help='Standard deviation of the noise, of pixels in 0-1.',
)
@click.option('--kind', type=click.Choice(['gaussian', 'poisson']), default='gaussian', show_default=True)
@click.option('--hypernet', help='Name or folder; by default the one that ships with the package.')
@click.option('--out', type=click.Path(path_type=Path), required=True)
def main(folder: Path, sigma: float, kind: str, hypernet: str | None, out: Path) -> None:
    check_output(out)
    generator = torch.Generator().manual_seed(0)
    clean = {name: read_picture(path).pixels for name, path in list_pictures(folder).items()}
    if len({len(image) for image in clean.values()}) > 1:
        raise click.UsageError(f'{folder} holds grey images and others in colour: give folders of one kind each')
    noisy = {name: add_noise(image, kind, sigma, generator) for name, image in clean.items()}
    model = timm_pudnet.predict_denoiser(list(noisy.values()), hypernet=hypernet, device='cpu')
    denoised = {name: timm_pudnet.denoise(model, image) for name, image in noisy.items()}
    for what, images in (('noisy', noisy), ('denoised', denoised)):
        values = [float(psnr(image.clamp(0, 1), clean[name])) for name, image in images.items()]
        click.echo(f'{what:9} PSNR {sum(values) / len(values):.2f} dB, mean of {len(values)} images')
        for name, image in images.items():
            path = out / what / (name if name.lower().endswith('.png') else f'{name}.png')
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image(image, path)


if __name__ == '__main__':
    main()
