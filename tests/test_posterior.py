import math

import numpy as np
import pytest
import timm
import torch
from denoisers import SMALL, generator
from torch.testing import assert_close

import timm_pudnet
from timm_pudnet.config import InputError
from timm_pudnet.denoising import add_noise, denoise, estimate_noise, predict_denoiser, psnr
from timm_pudnet.denoising.posterior import (
    BLOCK,
    EVEN,
    FAINT,
    WINDOW,
    Posterior,
    colour_components,
    fine_patterns,
    line_through,
    noise_by_level,
)


def slopes(count=16, side=64, channels=3):
    """Images without texture."""
    corners = torch.rand(count, channels, 2, 2, generator=generator())
    return torch.nn.functional.interpolate(corners, (side, side), mode='bilinear', align_corners=True)


def noisy_slopes(kind, sigma, **kwargs):
    return add_noise(slopes(**kwargs), kind, sigma, generator(1)), slopes(**kwargs)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_and_autocast(dtype):
    model = timm.create_model('blindspot_unet', width=4, depth=2, noise=[[0.0, 0.01]] * 3).eval()
    image = torch.rand(1, 3, 40, 40)
    image[:, :, :20] = 0
    with torch.inference_mode():
        expected = model(image)
        other = model.to(dtype)(image.to(dtype))
        assert other.dtype == dtype
        assert_close(other.float(), expected, atol=0.05, rtol=0)
        model.set_noise([[0.0, 0.01]] * 3)
        assert_close(model(image.to(dtype)).float(), expected, atol=0.05, rtol=0)
    model.float()
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
        assert_close(model(image).float(), expected, atol=0.05, rtol=0)
    clean = torch.full((4, 3, 64, 64), 0.5, dtype=dtype)
    noisy = clean + 0.1 * torch.randn(clean.shape, generator=generator()).to(dtype)
    assert_close(torch.tensor(estimate_noise(noisy, clean)), torch.full((3, 2), 0.01), atol=1e-3, rtol=0)


def test_what_noise_cannot_be_estimated_from_is_told(one_line):
    for noisy, guesses in (((1, 3, 5, 9), (1, 3, 5, 9)), ((3, 9, 9), (3, 9, 9)), ((1, 3, 9, 9), (1, 3, 9, 10))):
        with pytest.raises(InputError) as error:
            estimate_noise(torch.rand(noisy), torch.rand(guesses))
        one_line(error, list(noisy), list(guesses), '6 pixels')


def test_another_noise_is_saved(tmp_path):
    model = timm_pudnet.predict_denoiser(torch.rand(2, 3, 40, 40))
    image = torch.rand(1, 3, 32, 32)
    for noise in ([[0.02, 0.03]] * 3, None):
        model.set_noise(noise)
        folder = timm_pudnet.save_model(model, tmp_path / str(noise is None))
        with torch.inference_mode():
            loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
            assert_close(loaded(image), model(image), rtol=0, atol=0)


class TestPosterior:
    def test_it_is_the_formula_written_out(self):
        def around(values, row, column, reach):
            return values[max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1]

        noise = [[0.01, 0.03], [0.02, 0.005], [0.0, 0.01]]
        noisy, guess = torch.rand(2, 3, 40, 37, generator=generator()), torch.rand(2, 3, 40, 37, generator=generator(1))
        rows = np.array([[1, 1, 1], [math.sqrt(1.5), 0, -math.sqrt(1.5)], [0.5 * 2**0.5, -(2**0.5), 0.5 * 2**0.5]])
        rows /= math.sqrt(3)
        rest = np.einsum('kc,nchw->nkhw', rows, (noisy - guess).double().numpy())
        bright, shown = (np.einsum('kc,nchw->nkhw', part, guess.double().numpy()) for part in (rows**2, rows))
        expected = guess.double().numpy()
        for image in range(2):
            for k in range(3):
                black, white = noise[k]
                variance = black * (1 - bright[image, k]) + white * bright[image, k]
                contrast = np.array([[np.ptp(around(shown[image, k], r, c, 1)) for c in range(37)] for r in range(40)])
                contrast += FAINT
                for row in range(40):
                    for column in range(37):
                        squares, noises, contrasts = (
                            np.mean(around(values, row, column, WINDOW // 2))
                            for values in (rest[image, k] ** 2, variance, contrast)
                        )
                        error = max(0, squares - noises * (1 + math.sqrt(2) / WINDOW))
                        error *= (contrast[row, column] / contrasts + EVEN) / (1 + EVEN)
                        share = error / (error + variance[row, column])
                        expected[image, :, row, column] += rows[k] * share * rest[image, k, row, column]
        assert_close(Posterior(noise)(noisy, guess), torch.from_numpy(expected).float(), atol=1e-5, rtol=1e-5)

    def test_what_the_guess_misses_is_looked_for_at_its_edges(self):
        clean = torch.zeros(1, 1, 64, 64)
        clean[..., 32:] = 1
        noisy = add_noise(clean, 'gaussian', 0.1, generator())
        guess = torch.nn.functional.avg_pool2d(clean, 5, 1, 2, count_include_pad=False)  # wrong at the edge alone
        found = Posterior([[0.01, 0.01]])(noisy, guess)
        assert psnr(found[..., 28:36], clean[..., 28:36]) > psnr(guess[..., 28:36], clean[..., 28:36]) + 1
        assert psnr(found[..., :24], clean[..., :24]) > psnr(noisy[..., :24], clean[..., :24]) + 8

    def test_where_the_guess_is_flat_all_pixels_share_alike(self):
        noisy, guess = torch.rand(1, 1, 20, 20, generator=generator()), torch.full((1, 1, 20, 20), 0.5)
        share = (Posterior([[0.02, 0.02]])(noisy, guess) - guess) / (noisy - guess)
        assert_close(share, torch.full_like(share, float(share.mean())), atol=0.1, rtol=0)
        assert 0.4 < share.mean() < 0.9

    @pytest.mark.parametrize('channels', [1, 3])
    def test_without_noise_it_is_the_noisy_image_and_with_much_the_guess(self, channels):
        noisy, guess = torch.rand(1, channels, 20, 20), torch.rand(1, channels, 20, 20)
        assert_close(Posterior([[0, 0]] * channels)(noisy, guess), noisy, atol=1e-6, rtol=0)
        assert torch.equal(Posterior([[9, 9]] * channels)(noisy, guess), guess)

    def test_components_are_brightness_and_two_colours(self):
        for channels in (1, 3, 4):
            rows = colour_components(channels)
            assert_close(rows @ rows.t(), torch.eye(channels))
            assert_close(rows.sum(1)[1:], torch.zeros(channels - 1))

    @pytest.mark.parametrize('noise', [[[0.1]], [[0.1, -0.1]], [[0.1, math.nan]], [0.1, 0.2], [[[0.1, 0.1]]]])
    def test_noise_that_is_none_is_refused(self, noise):
        with pytest.raises(ValueError, match='noise must be'):
            Posterior(noise)

    def test_what_the_guess_misses_comes_back(self):
        clean = slopes() + 0.1 * torch.rand(16, 1, 64, 64, generator=generator(2))  # fine, grey texture
        noisy = add_noise(clean, 'gaussian', 0.02, generator(3))
        guess = slopes() + 0.05
        found = Posterior([[0.02**2, 0.02**2]] * 3)(noisy, guess)
        assert psnr(found, clean).mean() > max(psnr(guess, clean).mean(), psnr(noisy, clean).mean()) + 1


class TestEstimate:
    def test_the_patterns_are_orthonormal_and_blind_to_slopes(self):
        patterns = fine_patterns().flatten(1)
        assert_close(patterns @ patterns.t(), torch.eye(len(patterns)), atol=1e-6, rtol=0)
        rows, columns = torch.meshgrid(torch.arange(float(BLOCK)), torch.arange(float(BLOCK)), indexing='ij')
        for slope in (torch.ones(BLOCK, BLOCK), rows, columns, rows * 2 - columns):
            assert_close(patterns @ slope.flatten(), torch.zeros(len(patterns)), atol=1e-5, rtol=0)

    def test_smooth_texture_everywhere_does_not_count_as_noise(self):
        texture = torch.nn.functional.avg_pool2d(torch.rand(16, 3, 66, 66, generator=generator(4)), 3, 1)
        found = torch.tensor(estimate_noise(add_noise(texture, 'gaussian', 0.05, generator(5)), slopes()))
        assert ((found / 0.05**2 - 1).abs() < 0.4).all()  # that of the texture is 3.7 times as much

    @pytest.mark.parametrize('sigma', [0.01, 0.1, 0.5])
    @pytest.mark.parametrize('channels', [1, 3])
    def test_gaussian_noise_is_found(self, sigma, channels):
        found = torch.tensor(estimate_noise(*noisy_slopes('gaussian', sigma, channels=channels)))
        assert found.shape == (channels, 2)
        assert ((found / sigma**2 - 1).abs() < 0.15).all()

    def test_noise_that_is_less_in_the_dark_is_found(self):
        found = torch.tensor(estimate_noise(*noisy_slopes('poisson', 0.1)))
        assert (found[:, 0] < 0.002).all()
        assert ((found[:, 1] / 0.02 - 1).abs() < 0.2).all()

    def test_it_is_found_where_few_places_are_dark_and_of_all_sorts(self):
        dark, others = torch.linspace(0.01, 0.3, 32), torch.linspace(0.32, 0.8, 224)
        levels = torch.cat([dark, others])[torch.randperm(256, generator=generator(3))].view(16, 1, 4, 4)
        clean = levels.expand(-1, 3, -1, -1).repeat_interleave(24, 2).repeat_interleave(24, 3)
        found = torch.tensor(estimate_noise(add_noise(clean, 'poisson', 0.3, generator(1)), clean))
        assert ((found[:, 1] / 0.18 - 1).abs() < 0.1).all()

    def test_grey_images_in_three_channels_have_their_noise_in_brightness(self):
        noisy, clean = noisy_slopes('gaussian', 0.1, channels=1)
        found = estimate_noise(noisy.expand(-1, 3, -1, -1), clean.expand(-1, 3, -1, -1))
        assert all(abs(value / 0.03 - 1) < 0.15 for value in found[0])
        assert max(*found[1], *found[2]) < 1e-9

    def test_texture_in_most_places_does_not_count_as_noise(self):
        noisy, guess = noisy_slopes('gaussian', 0.1)
        textured = noisy + 0.5 * torch.rand(noisy.shape, generator=generator(4)) * (torch.rand(16, 1, 1, 1) < 0.6)
        found = torch.tensor(estimate_noise(textured, guess))
        assert ((found / 0.01).log2().abs() < 0.6).all()

    @pytest.mark.parametrize('value', [0.0, 1.0])
    def test_areas_of_clipped_black_or_white_do_not_hide_the_noise(self, value):
        noisy, guess = noisy_slopes('gaussian', 0.1)
        noisy, guess = noisy.clamp(0, 1), guess.clamp(0, 1)
        for images in (noisy, guess):
            images[:, :, :, :36] = value
        found = torch.tensor(estimate_noise(noisy, guess))
        assert ((found.mean(1) / 0.01).log2().abs() < 0.6).all()

    @pytest.mark.parametrize('width', [12, 17, 31])
    def test_a_frame_of_one_grey_does_not_hide_the_noise(self, width):
        noisy, guess = noisy_slopes('gaussian', 0.1, count=64)
        for images in (noisy, guess):
            images[: 128 // width, :, :, :width] = 0.5  # 3 % of all
        found = torch.tensor(estimate_noise(noisy, guess))
        assert ((found / 0.01 - 1).abs() < 0.15).all()

    def test_grey_images_among_those_in_colour_do_not_hide_the_noise_of_colours(self):
        noisy, guess = noisy_slopes('gaussian', 0.1, count=32)
        for images in (noisy, guess):
            images[::8] = images[::8, :1]
        found = torch.tensor(estimate_noise(noisy, guess))
        assert ((found / 0.01 - 1).abs() < 0.15).all()

    def test_a_clean_page_of_text_is_not_taken_for_noise(self):
        page = torch.full((8, 1, 120, 120), 0.8)
        strokes = torch.rand(8, 1, 60, 42, generator=generator()) < 0.3
        page[..., :84][strokes.repeat_interleave(2, 2).repeat_interleave(2, 3)] = 0.1
        ((black, white),) = estimate_noise(page, torch.full_like(page, 0.8))
        assert max(black, white) < 0.02**2

    def test_black_without_photons_is_no_frame(self):
        for dark, rows in (([1], torch.eye(3)), ([0, 2], colour_components(3))):
            clean = slopes()
            clean[:, dark, :, :24] = 0
            noisy = add_noise(clean, 'poisson', 0.3, generator(1))
            levels, variances = noise_by_level(noisy, clean, rows)
            assert levels[1][0] < 1e-6
            assert variances[1][0] < 1e-6

    def test_colours_without_noise_still_tell_that_there_is_none(self):
        flat = torch.rand(16, 3, 4, 4, generator=generator()).repeat_interleave(24, 2).repeat_interleave(24, 3)
        flat[:, :, :24] = 1
        assert torch.tensor(estimate_noise(flat, flat)).max() < 1e-6

    @pytest.mark.parametrize(('count', 'side'), [(1, 8), (1, 64), (3, 11)])
    def test_few_pixels_give_finite_numbers(self, count, side):
        for sigma in (0.0, 0.1):
            found = torch.tensor(estimate_noise(*noisy_slopes('gaussian', sigma, count=count, side=side)))
            assert found.isfinite().all()
            assert found.min() >= 0


class TestInTheNetwork:
    def noisy(self, **kwargs):
        return timm.create_model('blindspot_unet', **SMALL, noise=[[0.01, 0.02]] * 3, **kwargs)

    def test_it_counts_in_eval_mode_alone(self):
        model, images = self.noisy(), torch.rand(2, 3, 20, 20)
        without = timm.create_model('blindspot_unet', **SMALL)
        without.load_state_dict(model.state_dict())
        assert_close(model.train()(images), without.train()(images))
        assert_close(model.eval()(images), Posterior([[0.01, 0.02]] * 3)(images, without.eval()(images)))

    def test_the_weights_are_the_same_with_and_without(self):
        shapes = {key: value.shape for key, value in self.noisy().state_dict().items()}
        assert shapes == {k: v.shape for k, v in timm.create_model('blindspot_unet', **SMALL).state_dict().items()}

    def test_noise_of_other_channels_is_refused(self):
        with pytest.raises(ValueError, match='1 channels, got 3'):
            self.noisy(in_chans=1)

    def test_tiles_are_the_whole_image(self):
        model = self.noisy().double().eval()
        torch.nn.init.normal_(model.output.weight, std=0.3)
        image = torch.rand(3, 150, 203, dtype=torch.float64)
        with torch.no_grad():
            assert_close(denoise(model, image, tile=40), model(image[None])[0], atol=1e-10, rtol=0)

    def test_clean_images_come_back_nearly_as_they_are(self):
        clean = slopes(side=96) + 0.2 * torch.rand(16, 3, 96, 96, generator=generator(5)).round()
        clean[:8] = slopes(side=96)[:8]
        model = predict_denoiser(clean)
        found = torch.stack([denoise(model, image) for image in clean])
        blind = model
        blind.set_noise(None)
        guesses = torch.stack([denoise(blind, image) for image in clean])
        assert psnr(found, clean).mean() > psnr(guesses, clean).mean() + 6

    @pytest.mark.parametrize('kind', ['gaussian', 'poisson'])
    def test_weak_noise_of_textured_images_gets_weaker_and_not_stronger(self, kind):
        texture = 0.3 * torch.rand(16, 3, 64, 64, generator=generator(6)).round()
        texture[::2] = 0
        clean = (0.6 * slopes() + texture).clamp(0, 1)
        noisy = add_noise(clean, kind, 0.03, generator(7))
        model = predict_denoiser(noisy)
        found = torch.stack([denoise(model, image) for image in noisy])
        assert psnr(found, clean).mean() > psnr(noisy, clean).mean()


def test_a_line_that_would_begin_below_zero_is_turned_to_begin_there():
    places, variances = torch.tensor([0.4, 0.6]), torch.tensor([0.01, 0.2])
    weight = (variances + 0.3 * variances.mean()) ** -2
    middle, level = ((weight * values).sum() / weight.sum() for values in (places, variances))
    assert line_through(places, variances) == pytest.approx([0.0, float(level / middle)], abs=1e-6)


def test_levels_that_are_nearly_one_say_nothing_about_the_slope():
    black, white = line_through(torch.tensor([0.5, 0.501]), torch.tensor([0.010, 0.011]))
    assert black == pytest.approx(white, rel=0.1)


def test_the_noise_that_is_told_has_the_mean_power_of_that_of_the_colours():
    black, white = Posterior([[0.01, 0.04], [0.0, 0.04], [0.05, 0.04]]).deviations()
    assert (black, white) == (pytest.approx(0.02**0.5), pytest.approx(0.2))
    shares = torch.tensor([0.5, 1.0, 0.1]).view(3, 1, 1)
    black, white = Posterior([[0.01, 0.04], [0.0, 0.04], [0.05, 0.04]]).deviations(shares)
    assert (black, white) == (pytest.approx((0.01 / 3) ** 0.5), pytest.approx((0.064 / 3) ** 0.5))
