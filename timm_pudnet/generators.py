"""Weight generators (paper III-D3): a layer's code becomes that layer's tensor.

Dimension letters: `m` width of a code, `o i kh kw` a kernel tensor, `t = kh * kw` its taps, `p` flattened kernels of
the embedding, `q` basis kernels between the two 1x1 convs, `r` rank of a change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from timm_pudnet.config import InputError, close_names
from timm_pudnet.target import LayerSpec

_KINDS: dict[str, type[nn.Module]] = {}
# Spread of the large weights when new. An optimiser such as Adam moves every parameter by about its rate, whatever its
# size: at this spread one rate suits these weights and the ordinary parameters beside them.
SPREAD = 0.05
MOST_CHANNELS, MOST_TAPS, FEW_PIXELS = 4, 49, 16


def register_generator(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Makes a generator class known under a name; its instances map a code `[m]` to a tensor of their layer's shape.

    One that can start from given weights has a method `start_from(value)`; one that gives some layers the same tensor
    whatever the code says so by `steered` (true where it is not there).

    Raises:
        InputError: The name is taken.
    """

    def register(kind: type[nn.Module]) -> type[nn.Module]:
        if name in _KINDS:
            raise InputError(f'generator {name!r} is already registered by {_KINDS[name].__name__}')
        _KINDS[name] = kind
        return kind

    return register


def create_generator(
    name: str, layer: LayerSpec, width: int, gain: float, norm_rank: int = 0, **kwargs: Any
) -> nn.Module:
    """A new generator of a registered kind for one predicted layer.

    Args:
        name: Registered kind, `paper` for instance.
        layer: What to predict; a norm's affine parameter (one dimension) always takes `AffineGenerator`.
        width: `m`.
        gain: Kernels are scaled by `sqrt(gain / fan_in)`.
        norm_rank: `rank` of that.
        kwargs: Arguments of the kind.

    Raises:
        InputError: The kind is not known, or does not take these arguments.
    """
    if name not in _KINDS:
        raise InputError(f'no generator {name!r}; there are {", ".join(sorted(_KINDS))}.{close_names(name, _KINDS)}')
    if len(layer.shape) == 1:
        return AffineGenerator(layer, width, norm_rank)
    try:
        return _KINDS[name](layer, width, gain, **kwargs)
    except TypeError as error:
        raise InputError(f'generator {name!r}: {error}') from error


@register_generator('paper')
class PaperGenerator(nn.Module):
    """The paper's generator (eq. 6): a linear layer, then two 1x1 convs with an activation between them.

    The code becomes `p` flattened kernels `[p, t]`, the first 1x1 conv and the activation turn them into `q` basis
    kernels `[q, t]`, and the second mixes these into all `o * i` kernels. With `q >= t` every kernel tensor can be
    reached exactly. Its size is about `q * o * i`.

    It starts with basis kernels near the identity, so that the second conv's weight is the kernel tensor itself in
    units of its initial scale: the start of ordinary training, bent a little by the sketch.

    Args:
        layer: The kernel to predict.
        width: `m`.
        gain: The kernel is scaled by `sqrt(gain / fan_in)`, so that generators of all layers train at one rate.
        embed_kernels: `p`; raised to `t` where that is larger.
        basis_kernels: `q`; raised to `t` where that is larger.

    Example:
        >>> layer = LayerSpec('conv.weight', (64, 32, 3, 3))
        >>> PaperGenerator(layer, 128)(torch.zeros(128)).shape
        torch.Size([64, 32, 3, 3])
    """

    def __init__(
        self, layer: LayerSpec, width: int, gain: float = 2.0, *, embed_kernels: int = 16, basis_kernels: int = 9
    ) -> None:
        super().__init__()
        if min(embed_kernels, basis_kernels) < 1:
            raise InputError('embed_kernels and basis_kernels must be at least 1')
        self.shape = layer.shape
        self.scale = math.sqrt(gain / layer.fan_in) / SPREAD
        out_chans, in_chans, taps = layer.kernel[0], layer.kernel[1], math.prod(layer.kernel[2:])
        embed_kernels, basis_kernels = max(embed_kernels, taps), max(basis_kernels, taps)
        self.embed = nn.Linear(width, embed_kernels * taps)
        self.mix = nn.Linear(embed_kernels, basis_kernels)  # the first 1x1 conv: it acts on each tap alone
        self.expand = nn.Parameter(torch.randn(out_chans, in_chans, basis_kernels) * SPREAD)  # the second one's weight
        nn.init.normal_(self.embed.weight, std=0.2)
        nn.init.zeros_(self.mix.bias)
        with torch.no_grad():
            # mix @ embedding = the identity (its first t columns); the square and the wide case alike.
            rotation = nn.init.orthogonal_(torch.empty(embed_kernels, embed_kernels))
            self.embed.bias.copy_(rotation[:, :taps].flatten())
            if basis_kernels <= embed_kernels:
                self.mix.weight.copy_(rotation.t()[:basis_kernels])
            else:
                repeats = -(-basis_kernels // embed_kernels)
                self.mix.weight.copy_(rotation.t().repeat(repeats, 1)[:basis_kernels] / math.sqrt(repeats))

    def basis(self, code: Tensor) -> Tensor:
        """The `q` basis kernels `[q, t]` of a code `[m]`, scaled for the layer."""
        # Over sqrt(m), else one step on so many weights at once would turn the whole kernel tensor.
        flat = self.embed(code / math.sqrt(len(code)))
        embedding = rearrange(flat, '(p t) -> t p', p=self.mix.in_features)
        return F.leaky_relu(self.mix(embedding), 0.1).t() * self.scale

    def forward(self, code: Tensor) -> Tensor:
        """The kernel tensor of a code `[m]`, in the layer's shape."""
        return mix_kernels(self.expand, self.basis(code)).view(self.shape)

    @torch.no_grad()
    def start_from(self, value: Tensor) -> None:
        """Makes a tensor of the layer's shape the kernel of every code until the embedding has learned to bend it.

        By least squares over the basis kernels, of which there are at least as many as taps: so it is met exactly.
        """
        self.embed.weight.zero_()
        basis = self.basis(torch.zeros_like(self.embed.weight[0])).cpu().double()
        rows = value.reshape(-1, basis.shape[1]).cpu().double()
        solved = torch.linalg.lstsq(basis.t(), rows.t()).solution.t()
        self.expand.copy_(solved.reshape(self.expand.shape))


@register_generator('residual')
class ResidualGenerator(nn.Module):
    """A learned base kernel and a change of it that the code gives; about the size of the kernel tensor itself.

    `W = N base M + U diag(c) V`: what differs between image sets (order and sign of the channels, turns, sharpness,
    noise) acts on the axes of a kernel, so the code mixes its taps (`M`, `[t, t]`) and, where they are few, its input
    channels (`N`, `[i, i]`); a low-rank term (`U` `[o, r]`, `V` `[r, i t]`, coefficients `c` from the code) takes the
    rest. New, the change is zero and the kernel is the base, at the scale of ordinary initialisation.

    Args:
        layer: The kernel to predict.
        width: `m`.
        gain: The base starts at the scale `sqrt(gain / fan_in)`.
        rank: `r`; 0 for no low-rank term. Lowered where the layer is too small to be worth it.
        largest: Layers of more kernels `o * i` than this are the base alone, for speed: late layers, whose maps are so
            small that hardly a tap but the middle one counts.

    Example:
        >>> layer = LayerSpec('conv.weight', (64, 32, 3, 3))
        >>> ResidualGenerator(layer, 128)(torch.zeros(128)).shape
        torch.Size([64, 32, 3, 3])
    """

    def __init__(
        self, layer: LayerSpec, width: int, gain: float = 2.0, *, rank: int = 4, largest: int = 66_000
    ) -> None:
        super().__init__()
        if rank < 0 or largest < 0:
            raise InputError('rank and largest must be at least 0')
        self.shape = layer.shape
        out_chans, in_chans, taps = layer.kernel[0], layer.kernel[1], math.prod(layer.kernel[2:])
        scale = math.sqrt(gain / layer.fan_in)
        self.changed = out_chans * in_chans <= largest
        if not self.changed:
            self.base = nn.Parameter(torch.randn(layer.shape) * scale)
            return
        few = 1 < in_chans <= MOST_CHANNELS  # the image's own channels, or nearly so
        # A mixing of taps has t * t coefficients: small kernels are worth it, and the larger ones that see the image.
        worth = 1 < taps <= (MOST_TAPS if few else 9) and taps**2 <= layer.numel
        self.taps = taps if worth else 0
        self.channels = in_chans if few else 0
        self.rank = min(rank, out_chans // 2, in_chans * taps // 2)
        self.scale = scale / SPREAD / math.sqrt(width)
        self.sizes = [self.taps**2, self.channels**2, self.rank]
        # All that the code gives, as one product. Constants lie on the CPU until moved, never on the meta device.
        self.steer = nn.Parameter(torch.zeros(sum(self.sizes), width))
        unchanged = [torch.eye(size, device='cpu').flatten() for size in (self.taps, self.channels)]
        unchanged.append(torch.zeros(self.rank, device='cpu'))
        self.unchanged: Tensor
        self.register_buffer('unchanged', torch.cat(unchanged), persistent=False)
        self.base = nn.Parameter(torch.randn(out_chans, in_chans, taps) * scale)
        if self.rank:
            self.left = nn.Parameter(torch.randn(out_chans, self.rank) / math.sqrt(self.rank))
            self.right = nn.Parameter(torch.randn(self.rank, in_chans * taps) * SPREAD)

    def forward(self, code: Tensor) -> Tensor:
        """The kernel tensor of a code `[m]`, in the layer's shape."""
        # Torch looks attributes of modules up in Python, which takes as long as a small layer. (So parametrizations of
        # these parameters are not seen.)
        held = cast('dict[str, Tensor]', self._parameters)
        kernel = held['base']
        if not self.changed:
            return kernel
        if not (self.taps or self.channels):
            changed = self._add_low_rank(kernel, torch.mv(held['steer'], code)) if self.rank else kernel
            return changed.view(self.shape)
        given = torch.addmv(self.unchanged, held['steer'], code)
        taps, channels, rank = given.split(self.sizes)
        if self.taps:
            kernel = mix_kernels(kernel, taps.view(self.taps, -1))
        if self.channels:
            kernel = channels.view(self.channels, -1) @ kernel
        if self.rank:
            kernel = self._add_low_rank(kernel, rank, in_place=not torch.is_grad_enabled())  # which vmap cannot
        return kernel.view(self.shape)

    @property
    def steered(self) -> bool:
        """Whether the code changes the kernel at all."""
        return self.changed and sum(self.sizes) > 0

    @property
    def channel_rows(self) -> slice | None:
        """The rows of `steer` that give `N`; None where there is none."""
        return slice(self.sizes[0], self.sizes[0] + self.sizes[1]) if self.changed and self.channels else None

    def _add_low_rank(self, kernel: Tensor, coefficients: Tensor, in_place: bool = False) -> Tensor:
        held, flat = cast('dict[str, Tensor]', self._parameters), kernel.flatten(1)
        add = flat.addmm_ if in_place else flat.addmm
        return add(held['left'] * coefficients, held['right'], alpha=self.scale)

    @torch.no_grad()
    def start_from(self, value: Tensor) -> None:
        """Makes a tensor of the layer's shape the kernel that every code gives until the steering has learned."""
        self.base.copy_(value.reshape(self.base.shape))
        if self.changed:
            self.steer.zero_()


class AffineGenerator(nn.Module):
    """Predicts the weight or bias of a norm layer: a learned vector plus a linear change by the code.

    Args:
        layer: A parameter of shape `(o,)`.
        width: `m`.
        rank: `r`, of the change, where there are more channels than the code is wide; 0 for any.
    """

    def __init__(self, layer: LayerSpec, width: int, rank: int = 0) -> None:
        super().__init__()
        self.low = 0 < rank < width < layer.shape[0]
        self.base = nn.Parameter(torch.zeros(layer.shape))
        self.change = nn.Parameter(torch.zeros(layer.shape[0], rank if self.low else width))
        if self.low:
            self.right = nn.Parameter(torch.randn(rank, width) * SPREAD)

    def forward(self, code: Tensor) -> Tensor:
        """The parameter `(o,)` of a code `[m]`."""
        if self.low:
            code, scale = torch.mv(self.right, code), SPREAD * math.sqrt(len(code))
        else:
            scale = math.sqrt(len(code))
        return torch.addmv(self.base, self.change, code, alpha=1 / scale)

    @torch.no_grad()
    def start_from(self, value: Tensor) -> None:
        """Makes a vector the parameter that every code gives until the change has learned."""
        self.base.copy_(value)
        self.change.zero_()


def mix_kernels(weight: Tensor, basis: Tensor) -> Tensor:
    """`weight @ basis`: `[o, i, q]` times `[q, t]` gives `[o, i, t]`.

    Written as a 1x1 convolution over `o` images of `i` pixels with `q` channels where there are many pixels: with so
    few columns a matrix product then runs several times slower than the bytes it moves.
    """
    taps = basis.shape[1]
    if taps == 1:
        return torch.mv(weight.flatten(0, 1), basis[:, 0]).view(*weight.shape[:2], 1)
    if weight.shape[1] < FEW_PIXELS:
        return (weight.flatten(0, 1) @ basis).view(*weight.shape[:2], taps)
    # In memory the weight is channels-last already: o images, i rows of one pixel, q channels. Said with these very
    # strides, oneDNN takes it as it is.
    pixels = weight.unsqueeze(2).permute(0, 3, 1, 2)
    mixed = F.conv2d(pixels, basis.t().contiguous()[:, :, None, None])
    return mixed.permute(0, 2, 3, 1).reshape(*weight.shape[:2], taps)
