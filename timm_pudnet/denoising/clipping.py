"""Noise that a file has clipped to 0-1, and the mean that its clipping moved, put back.

A denoiser gives the mean of what a noisy pixel may be. Where noise was added and then clipped, as every file of 8 or
16 bits does it, that is not the clean pixel: black with noise is dark grey in the mean, and white is light grey. Of
Gaussian noise of a known strength the mean after clipping is known for every clean pixel, so it can be turned round.

Dimension letters: `n` images, `c` channels, `h w` height and width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

STEPS = 1024  # of the table that turns means round
LEAST_CLIPPED = 0.005  # share of pixels that are black or white, below which clipping moves nothing
STRONGEST = 1.0  # noise before clipping, beyond which nothing is known of it
# The share of black and white pixels over that which clipped Gaussian noise would make. Outside they have other
# reasons: few photons, or black and white that have no noise. Set by hand: eight training photographs of BSDS500, sixty
# training images of CIFAR-10 and a hundred of Fashion-MNIST, Gaussian and Poisson noise of sigma 0.05 to 0.75.
AS_CLIPPED = (0.7, 1.4)


class Unclip(nn.Module):
    """The clean pixel of which a denoised one is the mean after clipping.

    Args:
        variances: Of the noise before clipping, in black and in white, linear between.
    """

    table: Tensor
    ends: Tensor

    def __init__(self, variances: Sequence[float]) -> None:
        super().__init__()
        if len(variances) != 2 or not all(math.isfinite(value) and value >= 0 for value in variances):
            raise ValueError(f'clipped must be two variances, of black and of white, got {variances}')
        clean = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
        means = clipped_moments(clean, _deviation(variances, clean))[0].cummax(0).values
        wanted = torch.linspace(float(means[0]), float(means[-1]), STEPS + 1, dtype=torch.float64)
        above = torch.searchsorted(means, wanted).clamp(1, STEPS)
        low, high = means[above - 1], means[above]
        table = (above - 1 + ((wanted - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)) / STEPS
        self.register_buffer('table', table.float(), persistent=False)
        self.register_buffer('ends', wanted[[0, -1]].float(), persistent=False)

    def forward(self, means: Tensor) -> Tensor:
        """Images `[n, c, h, w]` in 0-1, of denoised ones."""
        low, high = self.ends
        place = ((means.float() - low) / (high - low)).clamp(0, 1) * STEPS
        before = place.floor().clamp(max=STEPS - 1)
        first, second = self.table[before.long()], self.table[before.long() + 1]
        return torch.lerp(first, second, place - before).to(means.dtype)


def clipped_moments(clean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of clean pixels with Gaussian noise, clipped to 0-1; float64.

    Example:
        >>> mean, variance = clipped_moments(torch.tensor([0.5, 0.0]).double(), torch.tensor(0.1).double())
        >>> [round(value, 4) for value in (*mean.tolist(), *variance.tolist())]
        [0.5, 0.0399, 0.01, 0.0034]
    """
    low, high = -clean / deviation, (1 - clean) / deviation
    under, over = torch.special.ndtr(low), torch.special.ndtr(-high)
    at_low, at_high = (torch.exp(-value.square() / 2) / math.sqrt(2 * math.pi) for value in (low, high))
    inside = 1 - under - over
    mean = clean * inside + deviation * (at_low - at_high) + over
    square = (clean.square() + deviation.square()) * inside + over
    square += deviation * (clean * at_low - (clean + 1) * at_high)
    return mean, (square - mean.square()).clamp_min(0)


def estimate_clipped(noisy: Tensor, guesses: Tensor, noise: Sequence[float]) -> list[float] | None:
    """Variance of noise before it was clipped, in black and in white; None where it was not, or differently.

    Args:
        noisy: `[n, c, h, w]`, as files hold them.
        guesses: The same without noise, each pixel from its neighbours.
        noise: Variance of brightness as it is after clipping, in black and in white (`estimate_noise`).
    """
    clipped = (noisy <= 0) | (noisy >= 1)
    share = float(clipped.double().mean())
    if share < LEAST_CLIPPED or not 0 <= float(noisy.min()) <= float(noisy.max()) <= 1:
        return None
    guesses = guesses.detach().double().cpu().clamp(0, 1)
    level = float(guesses.mean())
    found = noise[0] + (noise[1] - noise[0]) * level
    # The noise before that leaves so much variance at this level.
    clean = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
    deviations = torch.logspace(-3, math.log10(STRONGEST), 200, dtype=torch.float64)
    means, variances = clipped_moments(clean, deviations[:, None])
    place = (means - level).abs().argmin(1, keepdim=True)
    left = variances.gather(1, place).squeeze(1)
    above = int((left < found).sum())
    if found <= 0 or not 0 < above < len(deviations):
        return None
    ratio = float(deviations[above].square()) / found
    before = [ratio * value for value in noise]
    restored = Unclip(before)(guesses)
    deviation = _deviation(before, restored)
    expected = torch.special.ndtr(-restored / deviation) + torch.special.ndtr((restored - 1) / deviation)
    least, most = AS_CLIPPED
    return before if least < share / float(expected.mean()) < most else None


def _deviation(variances: Sequence[float], clean: Tensor) -> Tensor:
    black, white = variances
    return (black + (white - black) * clean).clamp_min(1e-8).sqrt()
