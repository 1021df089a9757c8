import math

import pytest
import timm
import torch
from torch.testing import assert_close

import timm_pudnet
from timm_pudnet.denoising import add_noise, denoise, predict_denoiser, psnr
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
@pytest.mark.parametrize('shown', ['colour', 'grey', 'grey in three channels', 'dark'])
def test_noise_before_clipping_is_found_and_otherwise_none(sigma, shown):
    clean = slopes()[:, : 1 if 'grey' in shown else 3]
    clean = 0.3 * clean if shown == 'dark' else clean
    noisy = add_noise(clean, 'gaussian', sigma, generator(1))
    if shown == 'grey in three channels':
        clean, noisy = clean.expand(-1, 3, -1, -1), noisy.expand(-1, 3, -1, -1)
    held = as_a_file(noisy)
    means = clipped_moments(clean.double(), torch.tensor(sigma, dtype=torch.float64))[0].float()  # what a network gives
    found = estimate_clipped(held, means)
    assert found is not None
    black, white = found
    for level in (clean.min(), clean.mean(), clean.max()):
        assert abs(float((black + (white - black) * level).sqrt()) / sigma - 1) < 0.15
    assert estimate_clipped(noisy, clean) is None
    grey = 0.5 + 0.1 * (held - 0.5)  # nothing is black or white
    assert estimate_clipped(grey, 0.5 + 0.1 * (means - 0.5)) is None
    framed = held.clone()
    framed[..., :40] = 0.0  # black without any noise, where the guesses are bright
    assert estimate_clipped(framed, means) is None


def test_strong_noise_of_few_photons_is_left_alone():
    clean = slopes()
    held = as_a_file(add_noise(clean, 'poisson', 0.5, generator(1)))
    assert estimate_clipped(held, clean) is None


def test_dead_pixels_are_no_clipped_noise():
    clean = (0.3 + 0.4 * slopes()).double().float()
    noisy = add_noise(clean, 'gaussian', 0.005, generator(1))
    noisy[torch.rand(noisy.shape, generator=generator(2)) < 0.01] = 1.0
    assert estimate_clipped(noisy, clean) is None


def test_any_precision_and_nan_go_through():
    means = torch.rand(1, 3, 8, 8, generator=generator())
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert_close(
            Unclip((0.02, 0.02)).to(dtype)(means.to(dtype)).float(), Unclip((0.02, 0.02))(means), atol=0.02, rtol=0
        )
    means[0, 0, 0, 0] = math.nan
    assert int(Unclip((0.02, 0.02))(means).isnan().sum()) == 1


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
