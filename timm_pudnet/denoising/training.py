"""Training of denoisers: groups of noisy patches, and a hypernetwork that learns from them without a clean image.

Dimension letters: `n` images, `c h w` an image.
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from timm_pudnet.config import InputError, NotFoundError, PudNetWarning
from timm_pudnet.denoising.noise import add_noise, blind_spot_loss, blind_spots
from timm_pudnet.denoising.pictures import check_whites, in_short, list_pictures, read_picture
from timm_pudnet.denoising.predict import LEAST_SIDE, white_used
from timm_pudnet.denoising.unet import MOST_WHITES
from timm_pudnet.devices import own_defaults
from timm_pudnet.files import local_path
from timm_pudnet.hypernet import PudNet
from timm_pudnet.images import scan_folder
from timm_pudnet.training.recipe import Data, Denoising, Recipe
from timm_pudnet.training.run import Run, go

PIXELS_SEEN = 4_000_000  # about so many of a data set tell what serves as white


class PatchBank:
    """Images held in memory at their own sizes, to cut patches from.

    Args:
        images: uint8 `[c, h, w]`, or floats with black 0 and white 1; all with the same channels, sides of 8 or more.

    Raises:
        InputError: There are no images, or one is too small.
    """

    def __init__(self, images: Sequence[Tensor]) -> None:
        if not images:
            raise InputError('no images to cut patches from')
        for image in images:
            if min(image.shape[1:]) < LEAST_SIDE:
                size = 'x'.join(map(str, image.shape[:0:-1]))
                raise InputError(f'an image of {size} pixels is too small to train on: {LEAST_SIDE} or more are needed')
        self.images = list(images)

    @classmethod
    def from_folder(cls, data: Data, channels: int) -> PatchBank:
        """Reads the images of a folder, of the classes that a recipe names where it names any.

        Those that cannot be read, or are too small, are skipped with one warning.

        Raises:
            InputError: The folder cannot be read, has no such images, or lacks a class that is named.
        """
        paths: Iterable[str | Path]
        if not (data.classes or data.unseen):
            paths = list_pictures(data.images).values()
        else:
            names, _, labels, classes = scan_folder(str(local_path(data.images)))
            absent = [name for name in (*data.classes, *data.unseen) if name not in (classes or ())]
            if absent or labels is None or classes is None:
                raise InputError(f'{data.images}: no class {absent[0]!r}, which the recipe names')
            chosen = data.classes or [name for name in classes if name not in data.unseen]
            paths = [path for path, label in zip(names, labels.tolist(), strict=True) if classes[label] in chosen]
        images: list[Tensor] = []
        skipped: list[str] = []
        whites: dict[float, object] = {}
        for path in paths:
            try:
                picture = read_picture(path)
            except (InputError, NotFoundError) as error:  # the latter of links that lead nowhere
                skipped.append(str(error))
                continue
            if min(picture.pixels.shape[1:]) < LEAST_SIDE:
                skipped.append(f'{path}: smaller than {LEAST_SIDE} pixels')
                continue
            if picture.depth == 32:
                whites.setdefault(picture.white, path)
                check_whites(whites)
            pixels = picture.pixels.mean(0, keepdim=True) if channels == 1 else picture.pixels.expand(3, -1, -1)
            # What has more than 8 bits keeps 11 of them: its own noise may lie there.
            images.append(pixels.mul(255).round_().to(torch.uint8) if picture.depth <= 8 else pixels.half())
        if skipped:
            some = in_short(skipped)
            if not images:
                raise InputError(f'none of the {len(skipped):,} images of {data.images} can be trained on: {some}')
            if os.environ.get('RANK', '0') == '0':  # of several processes the first one speaks
                message = f'skipped {len(skipped):,} of {len(skipped) + len(images):,} images: {some}'
                warnings.warn(message, PudNetWarning, stacklevel=2)
        each = PIXELS_SEEN // len(images) + 1
        seen = torch.cat([_as_floats(image.flatten()[:: image.numel() // each + 1]) for image in images])
        scale = white_used(seen)  # as for a prediction
        if scale == 1:
            return cls(images)
        most = MOST_WHITES if scale < 1 else math.inf
        return cls([(_as_floats(image) / scale).clamp(max=most).half() for image in images])

    def draw(self, count: int, side: int, generator: torch.Generator) -> Tensor:
        """Patches `[n, c, side, side]` of so many images, floats in 0-1, each mirrored and turned by chance.

        They are smaller where one of the images is.
        """
        picks = torch.randint(len(self.images), (count,), generator=generator).tolist()
        side = min(side, *(min(self.images[pick].shape[1:]) for pick in picks))
        patches = []
        for pick in picks:
            image = self.images[pick]
            top, left = (int(torch.randint(size - side + 1, (), generator=generator)) for size in image.shape[1:])
            turn, mirror = int(torch.randint(4, (), generator=generator)), torch.rand((), generator=generator) < 0.5
            patch = image[:, top : top + side, left : left + side].rot90(turn, (1, 2))
            patch = patch.flip(2) if mirror else patch
            patches.append(_as_floats(patch))
        return torch.stack(patches)


def _as_floats(pixels: Tensor) -> Tensor:
    """Pixels of a bank as floats where white is 1."""
    return pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels.float()


class PatchSampler:
    """Draws groups of noisy patches; each group has a number, and is the same whenever and wherever it is drawn.

    Args:
        banks: The images, a bank for each data set.
        how: What a group is.
        shares: How often groups come from each bank, in any unit.
        seed: Of all draws.
    """

    def __init__(self, banks: Sequence[PatchBank], how: Denoising, shares: Sequence[float], seed: int) -> None:
        self.banks, self.how, self.seed = list(banks), how, seed
        self.shares = torch.tensor(shares, dtype=torch.float64)

    def draw(self, number: int) -> tuple[Tensor, torch.Generator]:
        """Group `number`: noisy patches `[n, c, h, w]`, and the generator that goes on with it."""
        how = self.how
        generator = torch.Generator().manual_seed(zlib.crc32(f'{self.seed} patches {number}'.encode()))

        def chance() -> float:
            return float(torch.rand((), generator=generator))

        bank = self.banks[int(torch.multinomial(self.shares, 1, generator=generator))]
        patches = bank.draw(how.per_group, how.patch, generator)
        kind = how.kinds[int(chance() * len(how.kinds))]
        sigma = how.least * math.exp(chance() * math.log(how.most / how.least))
        if chance() < how.grey:
            noisy = add_noise(patches.mean(1, keepdim=True), kind, sigma, generator).expand_as(patches)
        else:
            noisy = add_noise(patches, kind, sigma, generator)
        return (noisy.clamp(0, 1) if chance() < how.clipped else noisy), generator


@own_defaults()
def meta_train_denoiser(
    recipe: Recipe | str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    banks: Sequence[PatchBank] | None = None,
    device: str | torch.device | None = None,
    checkpoint_seconds: float = 120.0,
    max_steps: int | None = None,
    progress: bool = True,
) -> PudNet:
    """Trains a hypernetwork of denoisers by a recipe with a table `[denoising]`, from noisy images alone.

    Each group of patches has noise of its own. Its sketch is that of the noisy patches, the target predicted from it
    guesses hidden pixels (`noise.blind_spot_loss`); no clean pixel is ever compared with.

    Args:
        recipe: A recipe or the path of its file.
        folder: As in `meta_train`.
        banks: The images, one bank a data set of the recipe, if they are in memory already.
        device: As in `meta_train`.
        checkpoint_seconds: As in `meta_train`.
        max_steps: As in `meta_train`.
        progress: As in `meta_train`.

    Returns:
        The trained hypernetwork, in eval mode, on the CPU.

    Raises:
        InputError: The recipe, its data, or a checkpoint of another recipe.
        FloatingPointError: As in `meta_train`.
    """
    run = _HypernetRun(*_read(recipe, banks), device)
    go(run, folder, checkpoint_seconds, max_steps, progress)
    return run.finished()


@own_defaults()
def train_plain_denoiser(
    recipe: Recipe | str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    banks: Sequence[PatchBank] | None = None,
    device: str | torch.device | None = None,
    checkpoint_seconds: float = 120.0,
    max_steps: int | None = None,
    progress: bool = True,
) -> nn.Module:
    """Trains the control *plain*: the target itself, one denoiser for all noise, on the same groups of patches.

    Arguments and errors as `meta_train_denoiser`.

    Returns:
        The denoiser, in eval mode, on the CPU.
    """
    run = _PlainRun(*_read(recipe, banks), device)
    go(run, folder, checkpoint_seconds, max_steps, progress)
    run.settle()
    return run.target.cpu().eval()


def load_patches(recipe: Recipe) -> list[PatchBank]:
    """Reads the images of a recipe into memory, a bank a data set."""
    channels = recipe.hypernet.input.input_size[0]
    for data in recipe.data:
        if name := data.timm_field:
            raise InputError(f'{data.images}: a denoiser learns from a folder of images, leave {name} out')
    return [PatchBank.from_folder(data, channels) for data in recipe.data]


def _read(
    recipe: Recipe | str | os.PathLike[str], banks: Sequence[PatchBank] | None
) -> tuple[Recipe, Sequence[PatchBank]]:
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    if recipe.denoising is None:
        raise InputError('the recipe has no table [denoising]: meta_train takes recipes of classifiers')
    config = recipe.hypernet
    if config.model_name != 'blindspot_unet':
        raise InputError(f'[denoising] is for blindspot_unet, not for {config.model_name}')
    if config.input.input_size[0] not in (1, 3):
        raise InputError(f'input_size: a denoiser has 1 or 3 channels, not {config.input.input_size[0]}')
    if {*config.input.mean} != {0.0} or {*config.input.std} != {1.0}:
        raise InputError('[hypernet.input]: pixels of a denoiser stay as they are: mean must be 0 and std 1')
    banks = banks or load_patches(recipe)
    if len(banks) != len(recipe.data):
        raise InputError(f'{len(banks)} banks of images for {len(recipe.data)} sets of the recipe')
    return recipe, banks


class _DenoiserRun(Run):
    """A training on groups of noisy patches."""

    def __init__(self, recipe: Recipe, banks: Sequence[PatchBank], device: str | torch.device | None) -> None:
        assert recipe.denoising is not None
        self.sampler = PatchSampler(banks, recipe.denoising, [data.share for data in recipe.data], recipe.seed)
        super().__init__(recipe, device)

    def source(self) -> Iterator[Tensor | bytes]:
        """The images."""
        return (image for bank in self.sampler.banks for image in bank.images)

    @property
    def parts(self) -> int:
        return self.sampler.how.per_step

    def losses(self, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The blind-spot loss of one group."""
        noisy, generator = self.sampler.draw(number)
        masked, places = blind_spots(noisy, generator)
        noisy, masked, places = (tensor.to(self.device) for tensor in (noisy, masked, places))
        masked = masked.contiguous(memory_format=torch.channels_last)
        weights = self.weights_of(noisy)
        with self.mixed_precision():
            guesses = torch.func.functional_call(self.target, weights, (masked,))
        loss = blind_spot_loss(guesses.float(), noisy, masked, places)
        return loss, {'blind_spot': loss}

    def weights_of(self, noisy: Tensor) -> dict[str, Tensor]:
        """The target's weights for a noisy group; none where its own are meant."""
        return {}


class _HypernetRun(_DenoiserRun):
    """The target lends its forward pass and its norm statistics; its weights are those that the sketch gives."""

    def build(self) -> dict[str, nn.Module]:
        self.hypernet = PudNet.for_target(**vars(self.recipe.hypernet))
        self.target.requires_grad_(False)
        return {'hypernet': self.hypernet, 'target': self.target}

    def weights_of(self, noisy: Tensor) -> dict[str, Tensor]:
        """Those that the sketch of the noisy patches gives."""
        with self.mixed_precision():
            rows = self.hypernet.encoder(noisy)
        weights = self.hypernet(rows.mean(0))
        for key in self.hypernet.target.keys('calibrated'):
            del weights[key]  # batch statistics in training
        return weights

    def finished(self) -> PudNet:
        """The hypernetwork, with the norm statistics that the target gathered over the groups."""
        self.settle()
        self.hypernet.take_statistics(self.target)
        self.hypernet.config = dataclasses.replace(self.hypernet.config, training=self.cost())
        return self.hypernet.cpu().eval()


class _PlainRun(_DenoiserRun):
    """The control: one target for all groups."""

    def build(self) -> dict[str, nn.Module]:
        return {'target': self.target}
