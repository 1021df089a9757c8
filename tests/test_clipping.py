import math

import pytest
import timm
import torch
from denoisers import generator
from torch.testing import assert_close

import timm_pudnet
from timm_pudnet.denoising import add_noise, denoise, predict_denoiser, psnr
from timm_pudnet.denoising.clipping import Unclip, clipped_moments, clipped_share, estimate_clipped, known_noise
from timm_pudnet.denoising.posterior import Posterior


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
    beyond = torch.tensor([-3.0, 1.0, 1.001, 4.0])
    assert_close(Unclip(variances)(beyond.view(1, 1, 1, -1)).flatten(), beyond.clamp_min(0))


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


@pytest.mark.parametrize('variances', [(0.01, 0.01), (0.0, 0.18), (0.5, 0.5)])
def test_the_share_of_noise_that_is_left_is_that_of_many_draws(variances):
    share = clipped_share(variances)
    for level in (0.03, 0.3, 0.5, 0.7, 0.97):
        variance = variances[0] + (variances[1] - variances[0]) * level
        drawn = (level + variance**0.5 * torch.randn(200_000, generator=generator(5))).clamp(0, 1)
        place = round(float(drawn.mean()) * (len(share) - 1))
        assert float(share[place]) == pytest.approx(float(drawn.var()) / variance, rel=0.03)


def test_clipped_noise_is_told_as_it_was_before_and_unclipped_as_it_is():
    for channels, expected in ((1, [1]), (3, [1, 1, 1])):
        clean = 0.1 + 0.8 * slopes()[:, :channels]
        noisy = add_noise(clean, 'gaussian', 0.3, generator(1))
        noise, clipped = known_noise(noisy, clean)
        assert clipped is None
        assert_close(torch.tensor(noise), torch.full((channels, 2), 0.09), rtol=0.15, atol=0)
        means = clipped_moments(clean.double(), torch.tensor(0.3, dtype=torch.float64))[0].float()
        noise, clipped = known_noise(as_a_file(noisy), means)
        assert_close(torch.tensor(noise).mean(1), 0.09 * torch.tensor(expected).float(), rtol=0.3, atol=0)
    grey, means = (images[:, :1].expand(-1, 3, -1, -1) for images in (as_a_file(noisy), means))
    brightness, *colours = known_noise(grey, means)[0]
    assert sum(brightness) / 2 == pytest.approx(3 * 0.09, rel=0.3)
    assert max(map(sum, colours)) < 1e-6


@pytest.mark.parametrize('level', [0.0, 0.1, 0.5, 0.95, 1.3])
def test_clipped_noise_is_weighed_by_what_is_left_of_it(level):
    lines, share = [[0.04, 0.09], [0.02, 0.01], [0.05, 0.05]], clipped_share([0.0625, 0.0625])
    noisy, guess = torch.rand(2, 3, 40, 40, generator=generator(4)), torch.full((2, 3, 40, 40), level)
    kept = min(level, 1)
    left = float(share[round(kept * (len(share) - 1))])
    of_here = [[left * (black + (white - black) * kept)] * 2 for black, white in lines]
    assert_close(Posterior(lines, share)(noisy, guess), Posterior(of_here)(noisy, guess))
    guess[0, 0, 0, 0] = math.nan
    assert Posterior(lines, share)(noisy, guess).isnan().any()


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


def test_few_bright_pixels_of_dark_images_stay_bright():
    clean = 0.25 * slopes(seed=3)
    clean[::4, :, 30:34, 30:34] = 0.95
    held = as_a_file(add_noise(clean, 'gaussian', 0.05, generator(2)))
    model = predict_denoiser(held, device='cpu')
    assert model.scale < 0.5
    assert model.unclip is not None
    found = denoise(model, held[0])
    assert_close(found[:, 30:34, 30:34].mean(), held[0, :, 30:34, 30:34].mean(), atol=0.03, rtol=0)


def test_guesses_brighter_than_white_tell_the_noise_as_white_ones_do():
    clean = slopes().round()
    held = as_a_file(add_noise(clean, 'gaussian', 0.25, generator(1)))
    found = estimate_clipped(held, clean)
    assert found is not None
    assert estimate_clipped(held, clean * 1.4) == found


def test_noise_that_white_alone_has_clipped_is_told_from_what_files_clip():
    clean = torch.linspace(0, 1, 128).expand(4, 3, 128, 128)
    noisy = clean + 0.2 * torch.randn(clean.shape)
    assert estimate_clipped(noisy.clamp(0, 1), clean) is not None
    assert estimate_clipped(noisy.abs().clamp(max=1), clean) is None, 'no pixel is black'
