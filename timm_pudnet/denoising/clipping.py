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

from timm_pudnet.denoising.posterior import estimate_noise, line_through, noise_by_level

STEPS = 1024  # of the table that turns means round
LEAST_CLIPPED = 0.005  # share of pixels that are black, or white, below which clipping moves nothing there
STRONGEST = 1.0  # noise before clipping, beyond which nothing is known of it
# The share of black pixels, and of white ones, over that which clipped Gaussian noise would make. Outside they have
# other reasons: few photons, or black and white that have no noise. From a deviation of `STRONG` on a mistake is dear,
# so less is let pass, and no noise that grows with brightness to more than `STEEP` times its variance. Set by hand:
# eight training photographs of BSDS500, in colour and in grey, sixty training images of CIFAR-10 and a hundred of
# Fashion-MNIST, Gaussian and Poisson noise of 0.05 to 0.75.
AS_CLIPPED, AS_STRONGLY_CLIPPED = (0.7, 2.5), (0.7, 1.5)
STRONG, STEEP = 0.3, 2.0


class Unclip(nn.Module):
    """The clean pixel of which a denoised one is the mean after clipping.

    What is brighter than white stays so: bright places of images that are dark as a whole, where nothing was clipped.

    Args:
        variances: Of the noise before clipping, in black and in white, linear between.
    """

    table: Tensor
    ends: Tensor

    def __init__(self, variances: Sequence[float]) -> None:
        super().__init__()
        if len(variances) != 2 or not all(math.isfinite(value) and value >= 0 for value in variances):
            raise ValueError(f'clipped must be two variances, of black and of white, got {variances}')
        clean = _levels()
        means = clipped_moments(clean, _deviation(variances, clean))[0].cummax(0).values
        wanted = torch.linspace(float(means[0]), float(means[-1]), STEPS + 1, dtype=torch.float64, device='cpu')
        above = torch.searchsorted(means, wanted).clamp(1, STEPS)
        low, high = means[above - 1], means[above]
        table = (above - 1 + ((wanted - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)) / STEPS
        self.register_buffer('table', table.float(), persistent=False)
        self.register_buffer('ends', wanted[[0, -1]].float(), persistent=False)

    def forward(self, means: Tensor) -> Tensor:
        """Images `[n, c, h, w]` with black 0 and white 1, of denoised ones."""
        table, (low, high) = self.table.float(), self.ends.float()
        place = ((means.float() - low) / (high - low)).clamp(0, 1) * STEPS
        before = place.nan_to_num().floor().clamp(max=STEPS - 1)
        found = torch.lerp(table[before.long()], table[before.long() + 1], place - before)
        return (found + (means.float() - 1).clamp_min(0)).to(means.dtype)


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


def clipped_share(variances: Sequence[float]) -> Tensor:
    """The share of the noise's variance that clipping leaves, by the mean after clipping: `[k]`, of means from 0 to 1.

    Args:
        variances: Of the noise before clipping, in black and in white, linear between.

    Example:
        >>> share = clipped_share([0.01, 0.01])
        >>> [round(float(share[round(mean * (len(share) - 1))]), 2) for mean in (0.0, 0.1, 0.5)]
        [0.34, 0.71, 1.0]
    """
    clean = _levels()
    deviation = _deviation(variances, clean)
    means, left = clipped_moments(clean, deviation)
    places = torch.searchsorted(means.cummax(0).values, clean).clamp(max=STEPS)
    return (left / deviation.square())[places].float()


def known_noise(noisy: Tensor, guesses: Tensor) -> tuple[list[list[float]], list[float] | None]:
    """`noise` and `clipped` of a `BlindSpotUNet`, from noisy images and blind guesses of them.

    Where the noise was clipped its variance is told by what it was before: no line fits what is left, which is less in
    black and in white than between. How the components share it (grey images have it in their brightness alone) is told
    by what they have.

    Args:
        noisy: As of `estimate_noise`.
        guesses: As of `estimate_noise`.
    """
    noise, clipped = estimate_noise(noisy, guesses), estimate_clipped(noisy, guesses)
    total = sum(map(sum, noise))
    if clipped is None or not total:
        return noise, clipped
    return [[len(noise) * sum(line) / total * value for value in clipped] for line in noise], clipped


def estimate_clipped(noisy: Tensor, guesses: Tensor) -> list[float] | None:
    """Variance of noise before it was clipped, in black and in white; None where it was not, or differently.

    Args:
        noisy: `[n, c, h, w]`, as files hold them.
        guesses: The same without noise, each pixel from its neighbours.
    """
    noisy, guesses = noisy.detach().cpu().float(), guesses.detach().cpu().float()
    seen = [float((noisy <= 0).float().mean()), float((noisy >= 1).float().mean())]
    if max(seen) < LEAST_CLIPPED or noisy.min() < 0 or (noisy.max() > 1 and seen[1] >= LEAST_CLIPPED):
        return None
    clean, variances = _before_clipping(*noise_by_level(noisy, guesses, torch.eye(noisy.shape[1], device='cpu')))
    if not len(clean):
        return None
    before = line_through(clean, variances)
    restored = Unclip(before)(guesses.clamp(max=1)).double()  # what is clean is in 0-1
    deviation = _deviation(before, restored)
    strong = sum(before) / 2 > STRONG**2
    if strong and before[1] > STEEP * before[0]:
        return None
    least, most = AS_STRONGLY_CLIPPED if strong else AS_CLIPPED
    for share, ends in zip(seen, (-restored / deviation, (restored - 1) / deviation), strict=True):
        expected = float(torch.special.ndtr(ends).mean())
        if max(share, expected) >= LEAST_CLIPPED and not least * expected < share < most * expected:
            return None
    return before


def _before_clipping(levels: Sequence[Tensor], variances: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Clean pixels and variances of the noise before clipping, that leave these means and variances; where any do."""
    clean = _levels()
    deviations = torch.logspace(-3, math.log10(STRONGEST), 200, dtype=torch.float64, device='cpu')
    means, left = clipped_moments(clean, deviations[:, None])
    found = []
    for level, variance in zip(torch.cat([*levels]).tolist(), torch.cat([*variances]).tolist(), strict=True):
        places = (means - level).abs().argmin(1, keepdim=True)
        above = int((left.gather(1, places).squeeze(1) < variance).sum())
        if 0 < above < len(deviations):
            found.append((float(clean[places[above]]), float(deviations[above].square())))
    return torch.tensor([x for x, _ in found]), torch.tensor([variance for _, variance in found])


def _levels() -> Tensor:
    return torch.linspace(0, 1, STEPS + 1, dtype=torch.float64, device='cpu')


def _deviation(variances: Sequence[float], clean: Tensor) -> Tensor:
    black, white = variances
    return (black + (white - black) * clean).clamp_min(1e-8).sqrt()
