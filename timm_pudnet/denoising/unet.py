"""The denoiser of Noise2Void, a small UNet, as the timm architecture `blindspot_unet`.

Importing this module (the package does) registers it, so `timm.create_model('blindspot_unet')` and `local-dir:` folders
of it work. It is written the way timm's own models are.

The paper (section IV-D) says "a well-established convolutional blind-spot network, which is built upon the UNet
architecture" and no more. Settled here, after Noise2Void and UNet: at each of four sizes two blocks of conv 3x3,
BatchNorm, ReLU; max pool 2x2 between them on the way down; on the way up a block that halves the channels, nearest
upsampling (or a transposed conv in place of both), the maps of the same size beside it, two blocks; a 1x1 conv to the
channels of the image. Four things are ours: images are standardised by their set, within the network; what it gives
is added to a small blur of them, whose bands (the differences of ever stronger blurs) the last conv sees too: so it
starts from smoothing, and can learn at once how strong that should be; and where the noise is known, the answer takes
the noisy pixel itself into account (`denoising.posterior`), that a file has clipped it (`denoising.clipping`), that
neighbouring pixels share noise (`denoising.whitening`), and what networks like it make of the image at half its size
and less (`denoising.scales`). The blind spot is in the training (`denoising.noise`), not in the network.

Dimension letters: `n` images, `c` channels, `h w` height and width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from timm.layers.conv_bn_act import ConvNormAct
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from timm_pudnet.denoising.clipping import Unclip, clipped_share
from timm_pudnet.denoising.posterior import WINDOW, Posterior
from timm_pudnet.denoising.scales import difference_of, halved, mixed, mixing
from timm_pudnet.denoising.whitening import Covariance, Whitening
from timm_pudnet.target import register_architecture

MOST_WHITES = 2.0  # of dark images: what is brighter (hot pixels, lamps) is cut for the network, and put back


class Block(ConvNormAct):
    """Conv 3x3, BatchNorm, ReLU: `[n, i, h, w]` to `[n, o, h, w]`.

    Args:
        in_chs: Channels `i` that it takes.
        out_chs: Channels `o` that it gives.
    """

    def __init__(self, in_chs: int, out_chs: int) -> None:
        super().__init__(in_chs, out_chs, 3)

    def fuse(self) -> nn.Module:
        """The same as one conv and ReLU, for prediction alone; `timm.utils.reparameterize_model` calls it."""
        return nn.Sequential(fuse_conv_bn_eval(cast(Any, self.conv), cast(Any, self.bn)), nn.ReLU(inplace=True))


def _blocks(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(Block(before, after), Block(after, after))


class Standardize(nn.BatchNorm2d):
    """Brings images to mean 0 and variance 1 over the set, per channel, and what is made of them back.

    Noise2Void standardises by the set too. Without it the norms behind it would hide how bright and how strong in
    contrast a set is, and a network could only guess that.

    Args:
        num_features: Channels.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, affine=False)
        self._batch: tuple[Tensor, Tensor] | None = None  # statistics of the last batch, in training

    def forward(self, input: Tensor) -> Tensor:
        """Standardised images `[n, c, h, w]`."""
        if self.training:
            self._batch = input.mean((0, 2, 3)), input.var((0, 2, 3), unbiased=False)
        return super().forward(input)

    def undo(self, images: Tensor) -> Tensor:
        """Images `[n, c, h, w]` in the units of those that went in last."""
        statistics = self._batch if self.training else (self.running_mean, self.running_var)
        assert statistics is not None
        mean, variance = (cast(Tensor, value).view(-1, 1, 1) for value in statistics)
        return torch.addcmul(mean, images, (variance + self.eps).sqrt())


class BlindSpotUNet(nn.Module):
    """A UNet from noisy images to clean ones of the same size.

    Args:
        num_classes: Taken for timm's sake and not used: it gives images, not classes.
        in_chans: Channels of the images, in and out.
        width: Channels at full size; doubled at each smaller one.
        depth: How often the size is halved.
        transposed: Whether a transposed conv makes maps larger, in place of a block and nearest upsampling.
        noise: For each channel (colour component, rather) the variance of the noise in black and in white, as
            `known_noise` gives it; in eval mode the answer then takes each noisy pixel itself into account. Without
            it, and in training, it is the blind guess alone.
        clipped: Where files clipped the noise, its variance before, in black and in white (`known_noise`, whose `noise`
            is then that before clipping too); in eval mode the answer then is the clean pixel of which it would be the
            mean after clipping.
        scale: Pixels of this brightness are its white, for `noise` and `clipped` too. Where that is below 1, what
            pixels have beyond `MOST_WHITES` times it is cut off first, and put back.
        shares: Where given, there is a network like this one for images of half the size, `coarse`, and so on, one for
            each row: how much it corrects each colour component of the answer at the size above (`best_shares`). In
            training, and without `noise`, they are not used.
        covariance: Where neighbouring pixels share noise, how (`SharedNoise`): the networks then see images in which
            they do not, of which `noise` and the norm statistics are.

    Before it is trained on against clean images `set_noise(None)`, or what it learns is corrected once more; and
    `set_coarse([])`, for the networks for smaller sizes do not learn with it. Without clean ones `set_covariance(None)`
    too, since the pixels that are hidden from it would be in those around.
    """

    share: Tensor | None

    def __init__(
        self,
        num_classes: int = 0,
        in_chans: int = 3,
        width: int = 64,
        depth: int = 3,
        transposed: bool = False,
        noise: Sequence[Sequence[float]] | None = None,
        clipped: Sequence[float] | None = None,
        scale: float = 1.0,
        shares: Sequence[Sequence[float]] = (),
        covariance: Covariance | None = None,
    ) -> None:
        super().__init__()
        if min(in_chans, width, depth) < 1:
            raise ValueError(f'in_chans, width and depth must be at least 1, got {in_chans}, {width}, {depth}')
        self.num_classes = 0
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = width
        self.standardize = Standardize(in_chans)
        widths = [width * 2**level for level in range(depth + 1)]
        self.encoder = nn.ModuleList(
            _blocks(before, after) for before, after in zip([in_chans, *widths], widths, strict=False)
        )
        self.enlarge = nn.ModuleList(
            nn.ConvTranspose2d(2 * after, after, 2, stride=2)
            if transposed
            else nn.Sequential(Block(2 * after, after), nn.Upsample(scale_factor=2))
            for after in reversed(widths[:-1])
        )
        self.decoder = nn.ModuleList(_blocks(2 * after, after) for after in reversed(widths[:-1]))
        self.output = nn.Conv2d(width + in_chans * (depth + 1), in_chans, 1)
        self.multiple = 2**depth  # sizes inside are those of images padded to a multiple of it
        # A guess depends on so many pixels in each direction, at most: convs, and where a pooled pixel came from.
        self.reach = 9 * self.multiple - 7
        self.set_scale(scale)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_in', nonlinearity='relu')
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.output.weight)  # so it starts from smoothing
        self.register_buffer('share', None, persistent=False)
        self.coarse: BlindSpotUNet | None = None
        if len(shares):
            self.coarse = BlindSpotUNet(0, in_chans, width, depth, transposed, shares=shares[1:])
        self.set_shares(shares)
        self.set_covariance(covariance)
        self.set_noise(noise, clipped)

    @property
    def receptive_field(self) -> int:
        """So many pixels in each direction an output of `fine` depends on, at most."""
        return self.reach + (0 if self.posterior is None else WINDOW // 2 + 1)

    def set_noise(self, noise: Sequence[Sequence[float]] | None, clipped: Sequence[float] | None = None) -> None:
        """Puts another `noise` and `clipped` in place, or none; they are saved with the model."""
        if noise is not None and len(noise) != self.in_chans:
            raise ValueError(f'noise must be of {self.in_chans} channels, got {len(noise)}')
        device = self.output.weight.device
        left = None if clipped is None else clipped_share(clipped)
        self.posterior = None if noise is None else Posterior(noise, left).to(device)
        self.unclip = None if clipped is None else Unclip(clipped).to(device)
        self.noise, self.clipped = noise, clipped
        self._remember(noise=noise, clipped=clipped)
        coarse, quarters = self.coarse, noise
        while coarse is not None:  # whose pixels are means of four; what clipping moved is put back once, in the end
            quarters = None if quarters is None else [[value / 4 for value in line] for line in quarters]
            coarse.posterior = None if quarters is None else Posterior(quarters, left).to(device)
            coarse = coarse.coarse

    def set_covariance(self, covariance: Covariance | None) -> None:
        """Puts another `covariance` in place, or none; `noise` and norm statistics stay those of the one before."""
        if covariance is not None and len(covariance) != self.in_chans:
            raise ValueError(f'covariance must be of {self.in_chans} channels, got {len(covariance)}')
        self.whitening = None if covariance is None else Whitening(covariance).to(self.output.weight.device)
        self._remember(covariance=covariance)

    def set_scale(self, scale: float) -> None:
        """Puts another `scale` in place; it is saved with the model."""
        if not 0 < scale < math.inf:
            raise ValueError(f'scale must be above zero, got {scale}')
        self.scale = scale
        self._remember(scale=scale)

    def set_coarse(self, networks: Sequence[BlindSpotUNet]) -> None:
        """Puts networks like this one in place, for half the size, a quarter, ..., or none; `set_shares` comes next."""
        above = self
        for network in networks:
            network.set_covariance(None)  # what they see is white already
            above.coarse = network
            above = network
        above.coarse = None
        self.set_shares([[0.0] * self.in_chans] * len(networks))
        self.set_noise(self.noise, self.clipped)

    def set_shares(self, shares: Sequence[Sequence[float]]) -> None:
        """Puts other `shares` in place, as many as there are; they are saved with the model."""
        rows = [[float(value) for value in row] for row in shares]
        sizes: list[BlindSpotUNet] = [self]
        while (coarse := sizes[-1].coarse) is not None:
            sizes.append(coarse)
        wanted = [len(sizes) - 1, *[self.in_chans] * len(rows)]
        if [len(rows), *map(len, rows)] != wanted or not all(math.isfinite(sum(row)) for row in rows):
            raise ValueError(f'shares must be {wanted[0]} rows of {self.in_chans} numbers, got {shares}')
        for size, row in zip(sizes, rows, strict=False):
            size.share = torch.tensor(row, dtype=torch.float32, device=self.output.weight.device)
        self._remember(shares=rows)

    def _remember(self, **arguments: Any) -> None:
        made = getattr(self, '_model_args', None)  # where timm saves the arguments of a model from
        if made is not None:
            made |= arguments

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters form a layer, for timm's layer-wise rates."""
        return {'stem': r'^encoder\.0', 'blocks': [(r'^encoder\.(\d+)', None), (r'^(?:enlarge|decoder)\.(\d+)', (99,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Part of timm's interface."""
        assert not enable, 'gradient checkpointing is not supported'

    def get_classifier(self) -> nn.Module:
        """An `Identity`: there is no classifier."""
        return nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Part of timm's interface: there is no classifier to reset."""

    def forward_features(self, x: Tensor) -> Tensor:
        """The decoder's maps `[n, width, h', w']`, with sizes padded to multiples of `multiple`."""
        return self._decoded(self._standardized(self.seen(self.prepared(x))))

    def _cut(self, x: Tensor) -> Tensor:
        """Images `[n, c, h, w]` without what is far brighter than white: one hot pixel would drown the noise around."""
        return x if self.scale >= 1 else x.clamp(max=MOST_WHITES * self.scale)

    def _standardized(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        return F.pad(self.standardize(x), (0, -width % self.multiple, 0, -height % self.multiple), mode='replicate')

    def _decoded(self, x: Tensor) -> Tensor:
        kept = []
        for blocks in self.encoder:
            x = blocks(F.max_pool2d(x, 2) if kept else x)
            kept.append(x)
        kept.pop()
        for enlarge, blocks in zip(self.enlarge, self.decoder, strict=True):
            x = blocks(torch.cat([enlarge(x), kept.pop()], 1))
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Denoised images `[n, c, h, w]` of noisy ones, of any size, both with pixels of about 0 to `scale`."""
        return self.restored(self.by_sizes(self.prepared(x)), x)

    def prepared(self, x: Tensor) -> Tensor:
        """Images of 0 to `scale` as `by_sizes` takes them: white is 1, what is far brighter cut off."""
        return x if self.scale == 1 else self._cut(x) / self.scale

    def restored(self, answers: Tensor, x: Tensor) -> Tensor:
        """Answers of `by_sizes` as those to images `x`: what clipping moved and what was cut off is put back."""
        if self.unclip is not None and not self.training:
            answers = self.unclip(answers)
        return answers if self.scale == 1 else answers * self.scale + (x - self._cut(x))

    def by_sizes(self, x: Tensor) -> Tensor:
        """Denoised images of noisy ones whose white is 1, by all sizes together."""
        seen = self.seen(x)
        answers = self.fine(seen)
        if (coarser := self.coarser) is not None:
            answers = answers + mixed(difference_of(answers, coarser.by_sizes(halved(seen))), self.matrix())
        return answers if self.whitening is None else self.whitening.undo(answers, seen, x)

    def seen(self, x: Tensor) -> Tensor:
        """Images whose white is 1 as the networks see them: with white noise."""
        return x if self.whitening is None else self.whitening(x)

    @property
    def coarser(self) -> BlindSpotUNet | None:
        """The network for half the size, where it has a part in the answers."""
        return None if self.training or self.posterior is None else self.coarse

    def matrix(self) -> Tensor:
        """How much of each channel's difference is added to each channel `[c, c]` (`denoising.scales`)."""
        assert self.posterior is not None
        assert self.share is not None
        return mixing(self.posterior.components, self.share)

    def fine(self, x: Tensor) -> Tensor:
        """What the network for this size alone makes of images as `seen` gives them."""
        standardized = self._standardized(x)
        blurred = list(self._blurred(standardized))
        bands = [fine - coarse for fine, coarse in itertools.pairwise(blurred)]
        maps = torch.cat([self._decoded(standardized), *bands, blurred[-1]], 1)
        guess = self.standardize.undo(blurred[0] + self.output(maps))[..., : x.shape[-2], : x.shape[-1]]
        return guess if self.training or self.posterior is None else self.posterior(x, guess)

    def _blurred(self, x: Tensor) -> Iterator[Tensor]:
        """The images ever more blurred, each `[n, c, h, w]`."""
        yield F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        for level in range(1, len(self.encoder)):
            small = F.avg_pool2d(x, 2**level)
            yield F.interpolate(small, scale_factor=2.0**level, mode='bilinear', align_corners=False)


default_cfgs = generate_default_cfgs(
    {
        'blindspot_unet': {
            'url': '',
            'num_classes': 0,
            'input_size': (3, 64, 64),
            'pool_size': None,
            'crop_pct': 1.0,
            'interpolation': 'bicubic',
            'mean': (0.0, 0.0, 0.0),
            'std': (1.0, 1.0, 1.0),
            'first_conv': 'encoder.0.0.conv',
            'classifier': None,
        }
    }
)


def blindspot_unet(pretrained: bool = False, **kwargs: Any) -> BlindSpotUNet:
    """The blind-spot UNet for `timm.create_model`; `kwargs` are those of `BlindSpotUNet`.

    Example:
        >>> import timm
        >>> timm.create_model('blindspot_unet', width=8)(torch.zeros(1, 3, 37, 50)).shape
        torch.Size([1, 3, 37, 50])
    """
    if kwargs.get('features_only'):
        raise RuntimeError('features_only is not there for blindspot_unet: forward_features gives its last maps')
    return build_model_with_cfg(BlindSpotUNet, 'blindspot_unet', pretrained, **kwargs)


register_architecture(blindspot_unet)
