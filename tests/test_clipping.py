import math

import pytest
import timm
import torch
from torch.testing import assert_close

import timm_pudnet
from timm_pudnet.denoising import add_noise, denoise, estimate_noise, predict_denoiser, psnr
from timm_pudnet.denoising.clipping import Unclip, clipped_moments, estimate_clipped


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def slopes(count=16, side=64, seed=0):
    """Images from black to white, without texture."""
    corners = torch.rand(count, 3, 3, 3, generator=generator(seed)) * 1.4 - 0.2
    return torch.nn.functional.interpolate(corners, (side, side), mode='bilinear', align_corners=True).clamp(0, 1)


def as_a_file(noisy):
    return noisy.clamp(0, 1).mul(255).round().div(255)


@pytest.mark.parametrize('deviation', [0.03, 0.2, 0.75])
def test_moments_are_those_of_many_draws(deviation):
    clean = torch.tensor([0.0, 0.1, 0.5, 0.97, 1.0], dtype=torch.float64)
    draws = torch.randn(400_000, 1, generator=generator(), dtype=torch.float64) * deviation + clean
    means, variances = clipped_moments(clean, torch.tensor(deviation, dtype=torch.float64))
    assert_close(means, draws.clamp(0, 1).mean(0), atol=4 * deviation / math.sqrt(400_000), rtol=0)
    assert_close(variances, draws.clamp(0, 1).var(0), atol=1e-4, rtol=0.01)


@pytest.mark.parametrize('variances', [(0.01, 0.01), (0.2, 0.2), (0.0, 0.1), (0.0, 0.0)])
def test_a_mean_is_turned_back_into_its_clean_pixel(variances):
    clean = torch.linspace(0.02, 0.98, 200, dtype=torch.float64)
    deviation = (variances[0] + (variances[1] - variances[0]) * clean).clamp_min(1e-8).sqrt()
    means = clipped_moments(clean, deviation)[0].float().view(1, 1, 1, -1)
    assert_close(Unclip(variances)(means).flatten(), clean.float(), atol=2e-3, rtol=0)
    assert_close(Unclip(variances)(torch.tensor([[[[-3.0, 4.0]]]])).flatten(), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize('sigma', [0.1, 0.25, 0.5])
def test_noise_before_clipping_is_found_and_otherwise_none(sigma):
    clean = slopes()
    noisy = add_noise(clean, 'gaussian', sigma, generator(1))
    held = as_a_file(noisy)
    means = clipped_moments(clean.double(), torch.tensor(sigma, dtype=torch.float64))[0].float()  # what a network gives
    found = estimate_clipped(held, means, estimate_noise(held, means)[0])
    assert found is not None
    assert_close(torch.tensor(found).mean().sqrt(), torch.tensor(sigma), rtol=0.12, atol=0)
    assert estimate_clipped(noisy, clean, estimate_noise(noisy, clean)[0]) is None
    grey = 0.5 + 0.1 * (held - 0.5)  # nothing is black or white
    assert estimate_clipped(grey, 0.5 + 0.1 * (means - 0.5), [1e-4, 1e-4]) is None
    framed = held.clone()
    framed[..., :40] = 0.0  # black without any noise
    assert estimate_clipped(framed, framed * 0 + means, estimate_noise(held, means)[0]) is None


def test_what_a_file_clipped_is_won_back_and_saved_with_the_model(tmp_path):
    clean = slopes(seed=3)
    held = as_a_file(add_noise(clean, 'gaussian', 0.4, generator(2)))
    model = predict_denoiser(held, device='cpu')
    assert model.unclip is not None
    with_it = torch.stack([denoise(model, image) for image in held])
    timm_pudnet.save_model(model, tmp_path / 'model')
    again = timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True).eval()
    assert torch.equal(again(held), model(held))
    model.unclip = None
    without = torch.stack([denoise(model, image) for image in held])
    assert float((psnr(with_it, clean) - psnr(without, clean)).mean()) > 2
