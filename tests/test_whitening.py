"""Noise that neighbouring pixels share: how it is found out, made white, and shared again."""

import json
import math

import pytest
import timm
import torch
from denoisers import NOISE, SHARES, generator, slopes, unet
from torch.nn import functional as F
from torch.testing import assert_close

import timm_pudnet
from timm_pudnet.denoising import (
    add_noise,
    denoise,
    denoiser_of,
    noisy_patches,
    predict_denoiser,
    psnr,
    shrunk,
    sketch_of,
    whitening,
)
from timm_pudnet.denoising.posterior import colour_components
from timm_pudnet.denoising.whitening import FLOOR, LAGS, Whitening, shared_noise


def greys(count, side):
    """Images without texture, and without what is nearly black or white."""
    return slopes(count, side) * 0.6 + 0.2


def shared(images, sigma, seed=1):
    """Images with noise of standard deviation `sigma` that went through a filter of 1 2 1 in both directions."""
    taps = torch.tensor([1.0, 2.0, 1.0], dtype=images.dtype) / math.sqrt(6)
    noise = torch.randn(*images.shape[:2], *(size + 2 for size in images.shape[2:]), generator=generator(seed))
    noise = F.conv2d(noise.to(images).flatten(0, 1)[:, None], (taps[:, None] * taps)[None, None])
    return images + sigma * noise.view(images.shape)


def true_covariance(sigma, channels=3):
    """That of `shared` noise."""
    own = torch.zeros(LAGS)
    own[:3] = torch.tensor([1, 4 / 6, 1 / 6])
    return (sigma**2 * own[:, None] * own).expand(channels, -1, -1)


def correlations(noise):
    """Of noise `[n, c, h, w]` with its neighbour in the row, and with the next but one, the diagonal one."""
    noise = noise - noise.mean((2, 3), keepdim=True)
    pairs = ((noise[..., 1:], noise[..., :-1]), (noise[..., 2:], noise[..., :-2]))
    pairs += ((noise[..., 1:, 1:], noise[..., :-1, :-1]),)
    return [float((one * other).mean() / noise.square().mean()) for one, other in pairs]


class TestWhitening:
    def test_it_makes_shared_noise_white(self):
        clean = torch.full((2, 3, 128, 128), 0.5)
        noisy = shared(clean, 0.1)
        assert correlations(noisy)[0] > 0.6
        found = Whitening(true_covariance(0.1).tolist())(noisy) - clean
        assert max(map(abs, correlations(found))) < 0.06
        # About as strong as the coarsest of it was, which the filter leaves as it is, with what was added.
        taps = torch.tensor([1, 4 / 6, 1 / 6]) * torch.tensor([1.0, 2.0, 2.0])
        assert float(found.var()) == pytest.approx(0.01 * float(taps.sum()) ** 2 * (1 + FLOOR), rel=0.2)

    def test_images_stay_as_they_are_but_for_what_is_taken_for_noise(self):
        model, clean = Whitening(true_covariance(0.1).tolist()), greys(2, 100)
        noisy = shared(clean, 0.1)
        seen = model(noisy)
        added = model.undo(seen, seen, noisy) - noisy
        assert_close(added[0], added[1], atol=1e-6, rtol=0)
        assert float(added.std()) == pytest.approx(float(model.added.std()), rel=0.1)
        best = model(clean) - model(torch.zeros_like(clean))  # by a network that knows the clean images
        left = model.undo(best, seen, noisy) - clean
        assert float(left.std()) < 0.15 * float((noisy - clean).std())

    def test_components_whose_noise_is_white_are_left_alone(self):
        none = torch.zeros(3, LAGS, LAGS).tolist()
        model, images = Whitening(none), torch.rand(2, 3, 20, 30)
        assert_close(model(images), images, atol=1e-6, rtol=0)
        model = Whitening([none[0], true_covariance(0.1)[0].tolist(), none[2]])
        rows = colour_components(3)
        before, after = (torch.einsum('kc,nchw->nkhw', rows, values) for values in (images, model(images)))
        assert_close(after[:, 0], before[:, 0], atol=1e-5, rtol=0)
        assert_close(after[:, 2], before[:, 2], atol=1e-5, rtol=0)
        assert float((after[:, 1] - before[:, 1]).std()) > 0.1

    @pytest.mark.parametrize('size', [(1, 1), (5, 3), (300, 7), (37, 290)])
    def test_strips_are_the_whole_at_any_size(self, size, monkeypatch):
        model = Whitening(true_covariance(0.1).tolist()).double()
        images = torch.rand(2, 3, *size, dtype=torch.float64)
        whole = model(images), model.undo(images / 2, images, images)
        assert whole[0].shape == images.shape
        monkeypatch.setattr(whitening, 'PIXELS', 16 * size[1])
        assert_close((model(images), model.undo(images / 2, images, images)), whole)

    def test_a_grey_image_is_one_of_three_equal_channels(self):
        lags = true_covariance(0.1).clone()
        lags[1:] = 0  # as of grey images, which have no other colours
        model, image = Whitening(lags.tolist()), torch.rand(1, 1, 40, 200)
        assert_close(model(image).expand(-1, 3, -1, -1), model(image.expand(-1, 3, -1, -1)))

    def test_half_precision_is_filtered_in_single(self):
        model, images = Whitening(true_covariance(0.1).tolist()), torch.rand(1, 3, 30, 30)
        found = model(images.half())
        assert found.dtype == torch.float16
        # Of single precision but for rounding the images with noise before, and the answer.
        noisier = (model._noisier(images.half(), slice(0, 30))).float() - model._noisier(images * 0, slice(0, 30))
        assert_close(found, model(noisier).half(), atol=1e-3, rtol=1e-3)

    def test_under_autocast_it_is_what_it_is_without(self):
        model, images = Whitening(true_covariance(0.1).tolist()), torch.rand(1, 3, 30, 30)
        wanted = model(images), model.undo(images / 2, images, images)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert_close((model(images), model.undo(images / 2, images, images)), wanted)

    @pytest.mark.parametrize('wrong', [[[0.1]], [[[0.1]]], [[[0.1, 0.2]]], torch.zeros(1, 13, 13).tolist()], ids=str)
    def test_what_is_no_covariance_is_refused(self, wrong):
        with pytest.raises(ValueError, match=r'covariance must be \[c, l, l\] with l from 2 to 12, got'):
            Whitening(wrong)

    def test_numbers_that_are_not_finite_are_refused(self):
        with pytest.raises(ValueError, match='covariance holds numbers that are not finite'):
            Whitening(torch.full((1, 3, 3), torch.nan).tolist())


class TestCovariance:
    @pytest.mark.parametrize('sigma', [0.02, 0.1, 0.3])
    def test_it_is_told_by_smooth_places(self, sigma):
        clean = greys(16, 64)
        clean[:8] += 0.2 * torch.rand(8, 1, 64, 64, generator=generator(4)) - 0.1  # half of them with texture
        found = torch.tensor(shared_noise([shared(clean, sigma)]).covariance)
        wanted = true_covariance(sigma)
        for lag in ((0, 0), (0, 1), (1, 1), (1, 0)):
            # It fades towards the last lag, and the squares taken are those of least noise.
            assert found[(slice(None), *lag)].tolist() == pytest.approx(wanted[(slice(None), *lag)].tolist(), rel=0.4)

    @pytest.mark.parametrize('kind', ['gaussian', 'poisson'])
    @pytest.mark.parametrize('clipped', [False, True])
    @pytest.mark.parametrize('sigma', [0.02, 0.1, 0.5])
    def test_white_noise_is_seen_to_be_white(self, kind, clipped, sigma):
        noisy = add_noise(greys(16, 64), kind, sigma, generator())
        assert shared_noise([noisy.clamp(0, 1).mul(255).round() / 255 if clipped else noisy]) is None

    def test_texture_without_noise_is_none(self):
        blurred = F.avg_pool2d(torch.rand(16, 3, 66, 66, generator=generator()), 3, 1)
        strength = torch.linspace(0.01, 1, 16)[torch.randperm(16, generator=generator())].view(-1, 1, 1, 1)
        noisy = 0.5 + strength * (blurred - 0.5)
        assert shared_noise([noisy]) is None

    @pytest.mark.parametrize('images', [torch.full((4, 3, 64, 64), 0.5), torch.rand(4, 3, 11, 64)], ids=['flat', 'low'])
    def test_of_what_has_no_squares_nothing_is_told(self, images):
        assert shared_noise([images]) is None

    def test_where_files_cut_noise_off_everywhere_nothing_is_told(self):
        clean = torch.full((16, 3, 64, 64), 0.02)
        assert shared_noise([shared(clean, 0.05)]) is not None
        assert shared_noise([shared(clean, 0.05).clamp(0, 1)]) is None

    def test_one_channel_has_one(self):
        found = shared_noise([shared(greys(16, 64)[:, :1], 0.1)])
        assert (len(found.covariance), len(found.noise)) == (1, 1)

    def test_noise_that_grows_with_brightness_is_told_to(self):
        clean = greys(16, 64)
        found = shared_noise([clean + shared(torch.zeros_like(clean), 0.2) * clean.mean(1, keepdim=True).sqrt()])
        for black, white in found.noise:
            assert black < 0.25 * white
        for black, white in shared_noise([shared(clean, 0.1)]).noise:
            assert black == pytest.approx(white, rel=0.5)

    def test_a_component_of_white_noise_among_others_keeps_its_strength(self):
        noise = torch.randn(2, 16, 3, 64, 64, generator=generator())
        rows = colour_components(3)
        of_components = torch.stack([noise[0][:, 0], *shared(noise[0] * 0, 1)[:, 1:].unbind(1)], 1)
        noisy = greys(16, 64) + 0.1 * torch.einsum('kc,nkhw->nchw', rows, of_components)
        found = shared_noise([noisy])
        assert [line is None for line in found.noise] == [True, False, False]
        brightness, *colours = Whitening(found.covariance).shares.flatten().tolist()
        assert brightness == pytest.approx(1, rel=0.15)  # estimated once it is made white, as which it was
        assert max(colours) < 0.6

    def test_noise_of_fine_patterns_alone_is_left_as_it_is(self):
        noise = torch.randn(16, 3, 64, 64, generator=generator())
        dither = noise - F.avg_pool2d(noise, 5, 1, 2)
        assert shared_noise([greys(16, 64) + 0.1 * dither]) is None
        predict_denoiser(greys(4, 64) + 0.1 * dither[:4], device='cpu')

    def test_larger_patches_are_looked_at_where_there_are_few(self):
        image = shared(greys(1, 127), 0.1)
        assert shared_noise([image[..., :64, :64]]) is None
        assert shared_noise([image[..., :64, :64], image]) is not None

    def test_a_frame_of_one_grey_hides_nothing(self):
        noisy = shared(greys(16, 64), 0.1)
        framed = noisy.clone()
        framed[..., :28, :] = 0.5
        found, wanted = (torch.tensor(shared_noise([images]).covariance)[:, 0, 0] for images in (framed, noisy))
        assert found.tolist() == pytest.approx(wanted.tolist(), rel=0.3)


class TestDenoiser:
    def covariance(self, channels=3):
        return true_covariance(0.1, channels).tolist()

    @pytest.mark.parametrize('size', [(150, 203), (151, 30), (41, 300)])
    @pytest.mark.parametrize('kwargs', [{}, {'scale': 0.1}, {'shares': ()}, {'in_chans': 1}], ids=str)
    def test_tiles_are_the_whole_image(self, size, kwargs, monkeypatch):
        monkeypatch.setattr(whitening, 'PIXELS', 64 * size[1])
        channels = kwargs.get('in_chans', 3)
        kwargs = {'shares': [row[:channels] for row in SHARES], **kwargs}
        model = unet(noise=NOISE[:channels], covariance=self.covariance(channels), **kwargs).double()
        image = torch.rand(3, *size, dtype=torch.float64) * kwargs.get('scale', 1)
        with torch.no_grad():
            whole = model(image[None])[0] if channels == 3 else model(image[:, None])[:, 0]
            assert_close(denoise(model, image, tile=40), whole, atol=1e-7, rtol=0)

    def test_it_is_the_network_on_white_noise_and_back(self):
        model, image = unet(noise=NOISE, shares=SHARES, covariance=self.covariance()), torch.rand(1, 3, 50, 60)
        white = unet(noise=NOISE, shares=SHARES)
        white.load_state_dict(model.state_dict())
        seen = model.whitening(image)
        assert_close(model(image), model.whitening.undo(white(seen), seen, image))
        assert_close(model.forward_features(image), white.forward_features(seen))

    def test_smaller_sizes_see_what_is_white_already(self):
        model, smaller = (unet(noise=NOISE, covariance=self.covariance()) for _ in range(2))
        model.set_coarse([smaller])
        assert smaller.whitening is None
        assert model.whitening is not None

    def test_a_grey_image_in_tiles_is_one_of_three_equal_channels(self):
        lags = true_covariance(0.1).clone()
        lags[1:] = 0
        model = unet(noise=NOISE, shares=SHARES, covariance=lags.tolist()).double()
        image = torch.rand(1, 100, 75, dtype=torch.float64)
        with torch.no_grad():
            whole = model(image.expand(1, 3, -1, -1))[0].mean(0, keepdim=True)
        assert_close(denoise(model, image, tile=40), whole, atol=1e-7, rtol=0)

    def test_covariance_of_other_channels_is_refused(self):
        model = unet(covariance=self.covariance())
        with pytest.raises(ValueError, match='covariance must be of 3 channels, got 1'):
            model.set_covariance(self.covariance(1))
        assert model.whitening is not None
        model.set_covariance(None)
        assert model.whitening is None

    def test_gradients_pass_through_it(self):
        model, image = unet(noise=NOISE, covariance=self.covariance()), torch.rand(1, 3, 30, 30).requires_grad_()
        model(image).square().sum().backward()
        assert float(model.output.weight.grad.abs().sum()) > 0
        model = Whitening(self.covariance()).double()
        image = torch.rand(1, 3, 4, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda image: model.undo(model(image).square(), model(image), image), image)


class TestPredicted:
    def test_shared_noise_is_removed_where_it_was_kept_before(self):
        clean = greys(4, 160)
        noisy = shared(clean, 0.08)
        model = predict_denoiser(noisy, device='cpu')
        found = torch.stack([denoise(model, image) for image in noisy])
        assert psnr(found, clean).mean() > psnr(noisy, clean).mean() + 8
        network = timm_pudnet.load_hypernet('blindspot_unet')
        patches = shrunk(noisy_patches(noisy, 3, 64))
        model = denoiser_of(network, [sketch_of(network, part) for part in patches], patches)
        as_if_white = torch.stack([denoise(model, image) for image in noisy])
        assert psnr(as_if_white, clean).mean() < psnr(found, clean).mean() - 5

    def test_its_strength_is_told_as_the_images_have_it(self):
        model = predict_denoiser(shared(greys(4, 160), 0.08), device='cpu')
        for deviation in model.posterior.deviations(model.whitening.shares):
            assert deviation == pytest.approx(0.08, rel=0.2)

    def test_white_noise_is_denoised_without(self):
        model = predict_denoiser(add_noise(greys(4, 160), 'gaussian', 0.1, generator()), device='cpu')
        assert model.whitening is None

    def test_saved_and_loaded_by_timm_it_gives_the_same_bits(self, tmp_path):
        noisy = shared(greys(4, 160), 0.1)
        model = predict_denoiser(noisy, device='cpu')
        timm_pudnet.save_model(model, tmp_path / 'saved')
        kept = json.loads((tmp_path / 'saved' / 'config.json').read_text())['model_args']
        assert (len(kept['covariance']), len(kept['shares'])) == (3, 2)
        assert max(kept['shares'][0]) > 0.3
        assert kept['clipped'] is None
        again = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).eval()
        with torch.no_grad():
            assert torch.equal(again(noisy[:1]), model(noisy[:1]))

    def test_the_same_images_give_the_same_answer_twice(self):
        noisy = shared(greys(4, 160), 0.1)
        first, second = (denoise(predict_denoiser(noisy, device='cpu'), noisy[0]) for _ in range(2))
        assert torch.equal(first, second)
