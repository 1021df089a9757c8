"""`timm-pudnet denoise`: a folder of noisy images, by one denoiser predicted for all of them."""

from __future__ import annotations

import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import click
from torch import Tensor, nn
from tqdm import tqdm

from timm_pudnet.cli.group import FOLDER, check_outside, device_option, main, strict_option
from timm_pudnet.config import InputError, NotFoundError, PudNetWarning
from timm_pudnet.denoising import metrics, pictures, predict_denoiser, tiles
from timm_pudnet.devices import usable_device
from timm_pudnet.evaluation import mean_interval
from timm_pudnet.files import folder_written_whole
from timm_pudnet.hub import resolve_hypernet
from timm_pudnet.predict import check_output

HARDLY_ANY = 0.003  # noise, of white; the rounding to 8 bits alone is 0.001


@main.command()
@click.argument('images', type=FOLDER)
@click.option('--out', required=True, type=FOLDER, help='New folder for the denoised images.')
@click.option('--hypernet', help='Hypernetwork: name, folder or org/name on the Hub; by default the one for denoising.')
@click.option('--clean', type=FOLDER, help='Folder of the same images without noise, for PSNR and SSIM.')
@click.option(
    '--turns',
    type=click.Choice(['1', '2', '4']),
    default='1',
    show_default=True,
    help='Mean over so many turned copies of each image: better where noise is strong, in so many times the time.',
)
@device_option
@strict_option
@click.pass_context
def denoise(
    context: click.Context,
    images: Path,
    out: Path,
    hypernet: str | None,
    clean: Path | None,
    turns: str,
    device: str | None,
    strict: bool,
) -> None:
    """Denoise IMAGES, a folder (its subfolders are kept) or a file, by one denoiser predicted for all of them.

    Grey images and those in colour, whose noise is of other kinds, each have a denoiser of their own. Every image is
    written under its name, in its format and bit depth, with its alpha channel as it was.
    """
    check_outside(out, **{'IMAGES': images, '--clean': clean})
    if clean is not None and clean.resolve().is_relative_to(images.resolve()):
        raise InputError(f'--clean {clean} is IMAGES or lies in it ({images}): keep clean images apart')
    check_output(out)
    where = usable_device(device)
    network = resolve_hypernet('blindspot_unet', hypernet)
    paths = pictures.list_pictures(images, strict)
    others = {} if clean is None else pictures.list_pictures(clean, strict)  # before any work
    found, skipped = _looked_at(paths, strict)
    if not found:
        raise InputError(f'none of the {len(paths):,} images of {images} can be denoised: {pictures.in_short(skipped)}')
    readable = {name: paths[name] for name in found}
    partners = {} if clean is None else _partners(readable, others, clean)
    if skipped:
        warnings.warn(
            f'skipped {len(skipped):,} of {len(paths):,} images: {pictures.in_short(skipped)}',
            PudNetWarning,
            stacklevel=2,
        )
    click.echo(f'Found      {_of_kinds(found)} in {images}{"" if clean is None else f", clean ones in {clean}"}')
    if compressed := sum(facts['format'] == 'JPEG' for facts in found.values()):
        warnings.warn(
            f'{compressed:,} of {len(found):,} images are JPEG, whose compression has changed the noise, and taken '
            'detail with it: PNG or TIFF files of the camera come out better',
            PudNetWarning,
            stacklevel=2,
        )

    started = time.perf_counter()
    models: dict[int, Any] = {
        channels: predict_denoiser(
            [str(readable[name]) for name, facts in found.items() if facts['channels'] == channels],
            hypernet=network,
            device=where,
        )
        for channels in sorted({facts['channels'] for facts in found.values()})
    }
    seconds = time.perf_counter() - started
    count = sum(parameter.numel() for parameter in models[min(models)].parameters())
    whom = 'all of them' if len(models) == 1 else 'the grey ones and for those in colour'
    click.echo(f'Predicted  {count / 1e6:.2f}M weights for {whom} on {where} in {seconds:.2f} s')
    for channels, model in models.items():
        whose = '' if len(models) == 1 else 'grey images: ' if channels == 1 else 'images in colour: '
        shares = 1.0 if model.whitening is None else model.whitening.shares
        black, white = noise = model.posterior.deviations(shares)
        click.echo(f'Noise      {whose}{_noise_in_words(black, white, model.scale)}')
        if model.whitening is not None:
            click.echo(
                f'           {whose}neighbouring pixels share it, as where a camera interpolates colours, or a file is '
                'resized or compressed: that is allowed for'
            )
        if max(noise) < HARDLY_ANY:
            warnings.warn(
                f'{whose}hardly any noise was found, so hardly any is removed: take images that were not resized or '
                'compressed',
                PudNetWarning,
                stacklevel=2,
            )

    taken = {name.split('/')[0].lower() for name in found}
    sheet_name, json_name = _free_name('side-by-side.png', taken), _free_name('denoised.json', taken)
    with folder_written_whole(out) as beside:
        started = time.perf_counter()
        rows = _write_denoised(beside, models, readable, partners, found, int(turns))
        seconds = time.perf_counter() - started
        pictures.side_by_side(rows, ('noisy', 'denoised', 'clean')[: len(rows[0])]).save(beside / sheet_name)
        means = _mean_gains(list(found.values())) if partners else {}
        if partners:
            result = {'command': context.meta['command'], 'seconds': seconds, 'device': str(where), 'mean': means}
            result |= {'images': found, 'skipped': skipped}
            (beside / json_name).write_text(json.dumps(result, indent=2, allow_nan=False) + '\n', encoding='utf-8')
    for measure, unit in (('psnr', ' dB'), ('ssim', '')) if partners else ():
        click.echo(_in_words(measure, unit, means[measure]))
    if whites := sorted({facts['white'] for facts in found.values()} - {1.0} if partners else ()):
        click.echo(f'           where white is {" or ".join(f"{white:.3g}" for white in whites)} of that of the files')
    what = 'reading, writing and measuring' if partners else 'reading and writing'
    click.echo(f'Denoised   {len(found):,} images in {seconds:.1f} s, {what} included')
    click.echo(f'Wrote      {out}; noisy and denoised ones side by side: {out / sheet_name}')
    if partners:
        click.echo(f'           PSNR and SSIM of each image: {out / json_name}')
    such = ' '.join(['of one kind'] * (len(models) > 1) + ['that can be read'] * bool(skipped))
    click.echo(f'Next, in Python, to keep this denoiser{f" (give images {such})" if such else ""}:')
    more = '' if hypernet is None else f', hypernet={hypernet!r}'
    once_turned = '' if turns == '1' else f'  # run it by timm_pudnet.denoise(model, image, turns={turns})'
    click.echo(
        f'\n    import timm_pudnet\n    model = timm_pudnet.predict_denoiser({str(images)!r}{more})\n'
        f"    timm_pudnet.save_model(model, 'denoiser'){once_turned}\n"
    )


def _looked_at(paths: dict[str, Path], strict: bool) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """A first look at all images, so that what is wrong with one is said before the work.

    Returns:
        Facts about each that can be read; what is wrong with the others.
    """
    found: dict[str, dict[str, Any]] = {}
    skipped: list[str] = []
    whites: dict[float, Path] = {}  # of float files, whose pixels do not tell it
    for name, path in tqdm(paths.items(), desc='Reading', unit='image', delay=2):
        try:
            picture = pictures.read_picture(path)
        except (InputError, NotFoundError) as error:  # the latter of links that lead nowhere
            if strict:
                raise
            skipped.append(str(error))
            continue
        chans, height, width = picture.pixels.shape
        found[name] = {'size': (height, width), 'channels': chans, 'depth': picture.depth, 'format': picture.format}
        if picture.depth == 32:
            whites.setdefault(picture.white, path)
    pictures.check_whites(whites)
    return found, skipped


def _partners(paths: dict[str, Path], others: dict[str, Path], clean: Path) -> dict[str, Path]:
    """The clean image of each noisy one, which it is like in size, channels and white."""
    partners = pictures.pair_pictures(paths, others, clean)
    for name, partner in tqdm(partners.items(), desc='Comparing', unit='pair', delay=2):
        pictures.check_pair(paths[name], pictures.read_picture(paths[name]), partner, pictures.read_picture(partner))
    return partners


def _write_denoised(
    folder: Path,
    models: dict[int, nn.Module],
    paths: dict[str, Path],
    partners: dict[str, Path],
    found: dict[str, dict[str, Any]],
    turns: int,
) -> list[list[Tensor]]:
    """Writes every image denoised, and puts PSNR and SSIM into `found`; gives rows of a side-by-side picture."""
    rows = []
    models = {channels: tiles.fused(model) for channels, model in models.items()}
    for name, path in tqdm(paths.items(), desc='Denoising', unit='image', delay=2):
        picture, model = pictures.read_picture(path), models[found[name]['channels']]
        pixels = picture.rounded(tiles.denoise(model, picture.pixels, turns=turns))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pictures.write_picture(picture, pixels, folder / name)
        clean = [pictures.read_picture(partners[name]).pixels] if partners else []
        white = getattr(model, 'scale', 1.0)  # of images that use a part of their range
        versions = [version / white for version in (picture.pixels, pixels, *clean)]
        if partners:
            found[name].update(_measured(*versions), white=float(white))
        if len(rows) < 4:
            rows.append([pictures.middle(version) for version in versions])
    return rows


def _noise_in_words(black: float, white: float, scale: float) -> str:
    """Its standard deviation in black and in white; of dark images as a part of their own white."""
    low, high = f'{black:.3f}', f'{white:.3f}'
    found = f'{low} of white' if low == high else f'{low} of white in black, {high} in white'
    return found + ('' if scale == 1 else f'; white is {scale:.3g} of that of the files')


def _of_kinds(found: dict[str, dict[str, Any]]) -> str:
    """Images, sizes, channels, depths and formats in words."""
    sizes = sorted({facts['size'] for facts in found.values()}, key=lambda size: size[0] * size[1])
    shown = [f'{width}x{height}' for height, width in dict.fromkeys([sizes[0], sizes[-1]])]
    channels = [facts['channels'] for facts in found.values()]
    kinds = [f'{channels.count(c):,} {what}' for c, what in ((3, 'in colour'), (1, 'grey')) if c in channels]
    depths = ' and '.join(str(depth) for depth in sorted({facts['depth'] for facts in found.values()}))
    formats = ', '.join(sorted({facts['format'] for facts in found.values()}))
    plural = 'image' if len(found) == 1 else 'images'
    return f'{len(found):,} {plural} ({", ".join(kinds)}; {" to ".join(shown)} pixels; {depths} bit; {formats})'


def _measured(noisy: Tensor, denoised: Tensor, clean: Tensor) -> dict[str, Any]:
    """PSNR and SSIM of one image before and after; None where infinite or not defined."""
    found: dict[str, Any] = {'psnr': {}, 'ssim': {}}
    for what, image in (('noisy', noisy), ('denoised', denoised)):
        decibel = metrics.psnr(image, clean).item()
        found['psnr'][what] = decibel if math.isfinite(decibel) else None
        small = min(clean.shape[1:]) < metrics.SSIM_WINDOW
        found['ssim'][what] = None if small else metrics.ssim(image, clean).item()
    return found


def _mean_gains(images: list[dict[str, Any]]) -> dict[str, Any]:
    """Means, with 95 % intervals, of each measure over the images that have it before and after."""
    means: dict[str, Any] = {}
    for measure in ('psnr', 'ssim'):
        pairs = [(facts[measure]['noisy'], facts[measure]['denoised']) for facts in images]
        pairs = [(before, after) for before, after in pairs if before is not None and after is not None]
        means[measure] = {'images': len(pairs)}
        if pairs:
            values = {'noisy': [a for a, _ in pairs], 'denoised': [b for _, b in pairs]}
            values['gain'] = [after - before for before, after in pairs]
            for what, numbers in values.items():
                mean = mean_interval(numbers)
                means[measure][what] = mean if len(pairs) > 1 else {**mean, 'interval': None}
    return means


def _in_words(measure: str, unit: str, mean: dict[str, Any]) -> str:
    if not mean['images']:
        return f'{measure.upper():10} not defined for any image'
    digits = 2 if unit else 4

    def show(what: str, sign: str = '') -> str:
        found = mean[what]
        interval = '' if found['interval'] is None else f' ± {found["interval"]:.{digits}f}'
        return f'{found["mean"]:{sign}.{digits}f}{interval}{unit}'

    return f'{measure.upper():10} noisy {show("noisy")}, denoised {show("denoised")}: {show("gain", "+")} ' + (
        f'(means of {mean["images"]:,} with 95 % intervals)' if mean['images'] > 1 else '(1 image)'
    )


def _free_name(name: str, taken: set[str]) -> str:
    """`name`, or name-2, name-3, ..., which none of the images has."""
    stem, suffix = Path(name).stem, Path(name).suffix
    number = 2
    while name in taken:
        name, number = f'{stem}-{number}{suffix}', number + 1
    return name
