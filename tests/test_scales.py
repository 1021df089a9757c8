"""What is denoised at half and at a quarter of the size, and how far it corrects what is denoised at full size."""

from types import SimpleNamespace

import pytest
import timm
import torch
from denoisers import NOISE, SHARES, SMALL, generator, slopes, unet
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
    scales,
    shrunk,
    sketch_of,
)
from timm_pudnet.denoising.posterior import Posterior
from timm_pudnet.denoising.scales import add_difference, best_shares, enlarged, halved, mixing


def by_hand(model, images):
    """Answers of a model of several sizes, each size by a model of its own."""
    answers = model.fine(images)
    if model.coarse is None:
        return answers
    height, width = images.shape[-2:]
    small = F.avg_pool2d(F.pad(images, (0, width % 2, 0, height % 2), mode='replicate'), 2)
    down = F.avg_pool2d(F.pad(answers, (0, width % 2, 0, height % 2), mode='replicate'), 2)
    difference = F.interpolate(by_hand(model.coarse, small) - down, scale_factor=2, mode='bilinear')
    rows = model.posterior.components.to(images)
    weighed = torch.einsum('kc,k,kd,ndhw->nchw', rows, model.share.to(images), rows, difference)
    return answers + weighed[..., :height, :width]


class TestSizes:
    @pytest.mark.parametrize('size', [(1, 1), (2, 3), (7, 8), (9, 1)])
    def test_halved_and_enlarged_again_constant_images_are_as_they_were(self, size):
        images = torch.full((2, 3, *size), 0.3)
        assert halved(images).shape == (2, 3, -(-size[0] // 2), -(-size[1] // 2))
        assert_close(enlarged(halved(images), *size), images)

    def test_the_noise_of_what_is_halved_has_a_quarter_of_the_variance(self):
        noise = torch.randn(4, 3, 64, 64, generator=generator())
        assert float(halved(noise).var()) == pytest.approx(0.25, rel=0.05)

    @pytest.mark.parametrize('size', [(1, 1), (5, 6), (8, 7), (9, 9), (16, 3), (17, 3), (23, 5)])
    def test_strips_are_the_whole(self, size, monkeypatch):
        answers = torch.rand(2, 3, *size, dtype=torch.float64)
        coarse = torch.rand(2, 3, *halved(answers).shape[-2:], dtype=torch.float64)
        matrix = torch.rand(3, 3, dtype=torch.float64)
        difference = enlarged(coarse - halved(answers), *size)
        wanted = answers + torch.einsum('dc,nchw->ndhw', matrix, difference)
        monkeypatch.setattr(scales, 'ROWS', 4)
        add_difference(answers, coarse, matrix)
        assert_close(answers, wanted)

    def test_shares_of_one_mix_nothing(self):
        components = Posterior(NOISE).components
        assert_close(mixing(components, torch.ones(3)), torch.eye(3), atol=1e-6, rtol=0)
        grey = mixing(components, torch.tensor([1.0, 0.0, 0.0]))
        assert_close(grey, torch.full((3, 3), 1 / 3))


def blurred(images):
    return F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)


class TestShares:
    def model(self, strength, noise, coarse=lambda images: images):
        """A weak blur at full size, beside one of what is halved."""
        return SimpleNamespace(
            posterior=Posterior(noise),
            fine=lambda images: torch.lerp(images, blurred(images), strength),
            coarse=SimpleNamespace(by_sizes=lambda images: coarse(blurred(images))),
        )

    @pytest.mark.parametrize('sigma', [0.05, 0.1, 0.2])
    def test_they_are_those_that_come_nearest_to_the_clean_images(self, sigma):
        texture = 0.3 * torch.rand(8, 1, 64, 64, generator=generator(2)) - 0.15  # of brightness alone
        clean = slopes(8, 64) * 0.5 + 0.25 + texture
        noisy = clean + sigma * torch.randn(clean.shape, generator=generator(1))
        model = self.model(0.8, [[sigma**2] * 2] * 3)
        found = best_shares(model, noisy)
        answers = model.fine(noisy)
        difference = enlarged(model.coarse.by_sizes(halved(noisy)) - halved(answers), 64, 64)
        error, direction = (
            torch.einsum('kc,nchw->nkhw', model.posterior.components, values)
            for values in (clean - answers, difference)
        )
        best = ((error * direction).sum((0, 2, 3)) / direction.square().sum((0, 2, 3))).clamp(0, 1)
        assert_close(torch.tensor(found), best, atol=0.08, rtol=0)
        assert best[0] < 0.9
        assert best[1] > best[0] + 0.1  # colours are smoother

    def test_where_the_answer_is_clean_already_nothing_is_added(self):
        clean = slopes(4, 64) * 0.5 + 0.25 + 0.2 * torch.rand(4, 3, 64, 64, generator=generator(3)) - 0.1
        model = self.model(0.0, [[1e-8] * 2] * 3)
        assert max(best_shares(model, clean)) < 0.01

    def test_what_a_file_cuts_off_does_not_count(self):
        noisy = slopes(4, 64) * 0.5 + 0.25 + 0.1 * torch.randn(4, 3, 64, 64, generator=generator(1))
        noisy[..., :24], noisy[..., 24:32] = -0.5, -0.2  # far below black; and where the two meet
        red = torch.tensor([3.0, 0.0, 0.0]).view(3, 1, 1)
        usual, wrong = (
            best_shares(self.model(0.8, [[0.01] * 2] * 3, coarse), noisy)
            for coarse in (lambda images: images, lambda images: torch.where(images < -0.25, images + red, images))
        )
        assert wrong == pytest.approx(usual, abs=0.02)
        assert min(usual[1:]) > 0.9


class TestNetwork:
    def test_each_size_corrects_the_one_above(self):
        model, images = unet(noise=NOISE, shares=SHARES), torch.rand(2, 3, 37, 50)
        assert_close(model(images), by_hand(model, images))
        model.set_shares([[0.0] * 3] * 2)
        assert_close(model(images), model.fine(images))

    def test_the_noise_of_smaller_images_is_that_of_means_of_four_pixels(self):
        model = unet(noise=NOISE, shares=SHARES)
        for size, parts in ((model.coarse, 4), (model.coarse.coarse, 16)):
            assert_close(size.posterior.black.flatten(), torch.tensor(NOISE)[:, 0] / parts)
            assert_close(size.posterior.white.flatten(), torch.tensor(NOISE)[:, 1] / parts)
            assert size.unclip is None

    def test_what_clipping_moved_is_put_back_once(self):
        model, images = unet(noise=NOISE, clipped=[0.02, 0.02], shares=SHARES), torch.rand(2, 3, 37, 50)
        assert_close(model(images), model.unclip(by_hand(model, images)))
        assert model.coarse.posterior.left is not None

    def test_in_training_and_without_noise_the_network_for_full_size_is_alone(self):
        model, images = unet(noise=NOISE, shares=SHARES), torch.rand(2, 3, 20, 20)
        model.train()
        assert_close(model(images), model.fine(images))
        model.eval().set_noise(None)
        assert_close(model(images), model.fine(images))
        assert model.coarse.posterior is None

    def test_gradients_pass_through_all_sizes(self):
        model, images = unet(noise=NOISE, shares=SHARES), torch.rand(1, 3, 20, 20)
        model(images).square().sum().backward()
        assert all(
            float(size.output.weight.grad.abs().sum()) > 0 for size in (model, model.coarse, model.coarse.coarse)
        )

    @pytest.mark.parametrize('size', [(150, 203), (151, 30), (41, 300)])
    @pytest.mark.parametrize(
        'kwargs', [{}, {'scale': 0.1}, {'scale': 3.0}, {'clipped': [0.02, 0.02]}, {'in_chans': 1}], ids=str
    )
    def test_tiles_are_the_whole_image(self, size, kwargs, monkeypatch):
        monkeypatch.setattr(scales, 'ROWS', 64)
        channels = kwargs.get('in_chans', 3)
        shares = [row[:channels] for row in SHARES]
        model = unet(noise=NOISE[:channels], shares=shares, **kwargs).double()
        image = torch.rand(3, *size, dtype=torch.float64) * kwargs.get('scale', 1)
        with torch.no_grad():
            whole = model(image[None])[0] if channels == 3 else model(image[:, None])[:, 0]
            assert_close(denoise(model, image, tile=40), whole, atol=1e-7, rtol=0)

    def test_tiles_of_a_grey_image_too(self):
        model, image = unet(noise=NOISE, shares=SHARES).double(), torch.rand(1, 100, 75, dtype=torch.float64)
        with torch.no_grad():
            whole = model(image.expand(1, 3, -1, -1))[0].mean(0, keepdim=True)
        found = denoise(model, image, tile=40, turns=1)
        assert_close(found, whole, atol=1e-7, rtol=0)
        assert not found.is_inference()
        assert denoise(model, image, turns=4).shape == image.shape

    @pytest.mark.parametrize('shares', [[[0.5] * 2] * 2, [[0.5] * 3] * 3, [[0.5] * 3], [[0.5] * 3, [float('nan')] * 3]])
    def test_shares_of_other_sizes_or_channels_are_refused(self, shares):
        model = unet(noise=NOISE, shares=SHARES)
        with pytest.raises(ValueError, match='shares must be 2 rows of 3 numbers'):
            model.set_shares(shares)
        assert model.share.tolist() == pytest.approx(SHARES[0])

    def test_a_new_one_starts_from_smoothing_at_every_size(self):
        model = timm.create_model('blindspot_unet', **SMALL, noise=NOISE, shares=SHARES)
        assert not any(size.output.weight.any() for size in (model, model.coarse, model.coarse.coarse))

    def test_what_clipping_moved_is_put_back_where_the_model_is(self, monkeypatch):
        model, image = unet(noise=NOISE, clipped=[0.02, 0.02], shares=SHARES).double(), torch.rand(3, 40, 40)
        seen, unclip = [], model.unclip.forward
        monkeypatch.setattr(model.unclip, 'forward', lambda values: seen.append(values.dtype) or unclip(values))
        assert denoise(model, image).dtype == torch.float32
        assert set(seen) == {torch.float64}  # of the model, on whose device it is too


class TestPredicted:
    def noisy(self, sigma=0.5, side=160, count=4):
        clean = slopes(count, side, seed=5)
        return clean, clean + sigma * torch.randn(clean.shape, generator=generator(2))

    def test_strong_noise_leaves_less_behind_than_by_full_size_alone(self):
        clean, noisy = self.noisy()
        model = predict_denoiser(noisy, device='cpu')
        found = torch.stack([denoise(model, image) for image in noisy])
        model.set_coarse([])
        alone = torch.stack([denoise(model, image) for image in noisy])
        assert psnr(found.clamp(0, 1), clean).mean() > psnr(alone.clamp(0, 1), clean).mean() + 1

    @pytest.mark.filterwarnings('ignore')  # tracing is on its way out, and warns of what depends on the shape
    def test_torch_can_trace_what_has_other_sizes(self):
        noisy = self.noisy(side=64, count=2)[1]
        model = predict_denoiser(noisy, device='cpu')
        with torch.no_grad():
            assert_close(torch.jit.trace(model, noisy)(noisy), model(noisy))

    @pytest.mark.parametrize(('side', 'sizes'), [(20, 1), (32, 2), (60, 2), (64, 3), (200, 3)])
    def test_small_images_have_fewer_sizes(self, side, sizes):
        noisy = self.noisy(side=side)[1]
        model = predict_denoiser(noisy, device='cpu')
        found = [size for size in (model, model.coarse, model.coarse and model.coarse.coarse) if size is not None]
        assert len(found) == sizes

    def test_each_size_has_weights_of_its_own_sketch_and_its_own_statistics(self):
        noisy = self.noisy()[1]
        network = timm_pudnet.load_hypernet('blindspot_unet')
        patches = shrunk(noisy_patches(noisy, 3, 64))
        assert [shown.shape[-1] for shown in patches] == [64, 64, 40]  # of 160 pixels there is no patch of 256
        sketches = [sketch_of(network, shown) for shown in patches]
        model = predict_denoiser(noisy, hypernet=network, device='cpu')
        again = denoiser_of(network, sketches, patches)
        for key, value in model.state_dict().items():
            assert_close(again.state_dict()[key], value, atol=1e-5, rtol=1e-4)
        alone = denoiser_of(network, sketches[1:2], patches[1:2])
        for key, value in alone.state_dict().items():
            assert_close(model.state_dict()[f'coarse.{key}'], value, atol=1e-5, rtol=1e-4)

    def test_half_as_many_patches_of_twice_the_side(self):
        shapes = [tuple(shown.shape) for shown in noisy_patches(torch.rand(200, 3, 70, 70), 3, 16)]
        assert shapes == [(128, 3, 16, 16), (64, 3, 32, 32), (32, 3, 64, 64)]

    def test_hot_pixels_are_cut_before_they_are_halved(self):
        clean, noisy = self.noisy(0.1)
        noisy = 0.002 * noisy
        hot = torch.rand(noisy.shape, generator=generator(3)) < 0.0005
        model = predict_denoiser(noisy.masked_fill(hot, 1.0), device='cpu')
        found = torch.stack([denoise(model, image) for image in noisy.masked_fill(hot, 1.0)])
        before, after = ((image / 0.002 - clean)[~hot].square().mean().sqrt() for image in (noisy, found))
        assert after < 0.35 * before
        assert float(model.coarse.standardize.running_mean.max()) < 1.5

    def test_gradients_pass_through_it(self):
        noisy = self.noisy(side=64)[1].requires_grad_()
        predict_denoiser(noisy.detach(), device='cpu')(noisy).sum().backward()
        assert float(noisy.grad.abs().max()) > 0

    @pytest.mark.parametrize('count', [60, 128])
    def test_larger_patches_are_of_all_parts_of_the_images(self, count):
        slope = torch.linspace(0, 1, 128).expand(3, 128, 128)
        for images in ([slope] * count, [slope.transpose(1, 2)] * count):
            for shown in noisy_patches(images, 3, 16):
                assert abs(float(shown.mean()) - 0.5) < 0.06

    def test_images_with_hardly_any_noise_come_back_nearly_as_they_are(self):
        clean = slopes(2, 96)
        model = predict_denoiser(add_noise(clean, 'gaussian', 1e-4, generator()), device='cpu')
        found = torch.stack([denoise(model, image) for image in clean])
        assert psnr(found, clean).min() > 40
