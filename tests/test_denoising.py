import json
import math
import os

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from denoisers import SMALL, generator
from huggingface_hub import ModelCard
from PIL import Image
from torch.testing import assert_close

import timm_pudnet
from timm_pudnet.adapt import calibrate
from timm_pudnet.cli import main
from timm_pudnet.config import InputError, NotFoundError, PudNetWarning
from timm_pudnet.denoising import (
    PatchBank,
    add_noise,
    blind_spot_loss,
    blind_spots,
    denoise,
    denoiser_of,
    meta_train_denoiser,
    noisy_patches,
    predict_denoiser,
    psnr,
    sketch_of,
    train_plain_denoiser,
)
from timm_pudnet.denoising.noise import BOX
from timm_pudnet.denoising.predict import _check_black, white_used
from timm_pudnet.denoising.training import PatchSampler
from timm_pudnet.files import weights_sha256
from timm_pudnet.hub import describe_hypernet, hypernet_files
from timm_pudnet.training.recipe import Data, Denoising, Recipe
from timm_pudnet.training.run import CHECKPOINT_NAME, LOG_NAME


def smooth_images(count=12, side=40, channels=3, seed=0):
    """Colourful slopes: what is left of an image when it has no texture."""
    corners = torch.rand(count, channels, 3, 3, generator=generator(seed))
    return torch.nn.functional.interpolate(corners, (side, side), mode='bilinear', align_corners=True)


def bank(seed=0, **kwargs):
    return PatchBank([(image * 255).to(torch.uint8) for image in smooth_images(seed=seed, **kwargs)])


def recipe(steps=4, folder='nowhere', hypernet=None, **changes):
    return Recipe.from_dict(
        {
            'hypernet': {
                'model_name': 'blindspot_unet',
                'model_kwargs': SMALL,
                'generator': 'residual',
                'predict_norm': True,
                'sketch_width': 8,
                'sketch_channels': [4, 8],
                'input': {'input_size': [3, 16, 16], 'mean': [0, 0, 0], 'std': [1, 1, 1]},
                **(hypernet or {}),
            },
            'data': [{'images': str(folder)}],
            'denoising': {'patch': 16, 'per_group': 4, 'per_step': 2, **changes.pop('denoising', {})},
            'schedule': {'images': 8 * steps, 'rate': 5e-3, **changes.pop('schedule', {})},
            **changes,
        }
    )


@pytest.fixture(scope='module')
def trained():
    return meta_train_denoiser(recipe(100), banks=[bank()], device='cpu', progress=False)


def unet(**kwargs):
    """A new one, whose last conv is not zero as it is at the start of a training."""
    model = timm.create_model('blindspot_unet', **kwargs)
    torch.nn.init.normal_(model.output.weight, std=0.3)
    return model


class TestUNet:
    @pytest.mark.parametrize('size', [(37, 50), (8, 8), (1, 30), (3, 1), (1, 1)])
    @pytest.mark.parametrize('kwargs', [{}, {'transposed': True}, {'in_chans': 1}])
    def test_gives_images_of_any_size_back(self, size, kwargs):
        model = unet(**SMALL, **kwargs).eval()
        images = torch.rand(2, kwargs.get('in_chans', 3), *size)
        assert model(images).shape == images.shape

    def test_its_size_is_that_of_its_width(self):
        wide, narrow = (timm.create_model('blindspot_unet', **kwargs) for kwargs in ({}, {'width': 32}))
        assert wide.encoder[0][0].conv.out_channels == 64
        count = [sum(p.numel() for p in model.parameters()) for model in (wide, narrow)]
        assert 3.8 < count[0] / count[1] < 4

    def test_every_kernel_is_predicted_and_nothing_is_a_classifier(self):
        for kwargs in ({}, {'transposed': True}):
            spec = timm_pudnet.describe_target('blindspot_unet', **kwargs)
            kernels = {key for key, shape in spec.shapes.items() if len(shape) == 4}
            assert kernels == set(spec.keys('predicted'))
            assert not spec.classifiers
            assert spec.predicted_share > 0.99

    @pytest.mark.parametrize('transposed', [False, True])
    @pytest.mark.parametrize('depth', [1, 2])
    def test_no_output_depends_on_pixels_out_of_its_receptive_field(self, transposed, depth):
        model = unet(width=4, depth=depth, transposed=transposed).eval()
        side = 4 * model.receptive_field // model.multiple * model.multiple
        farthest = 0
        for place in range(side // 2, side // 2 + model.multiple):
            images = torch.rand(1, 3, side, side, requires_grad=True)
            model(images)[0, :, place, place].sum().backward()
            rows = images.grad.abs().sum((0, 1, 3)).nonzero().flatten()
            farthest = max(farthest, int((rows - place).abs().max()))
        assert farthest <= model.receptive_field
        assert farthest >= model.receptive_field / 2  # not a wild guess either

    def test_brighter_images_of_more_contrast_come_out_so(self):
        model = unet(**SMALL)
        images = torch.rand(4, 3, 16, 16)
        for change in (model.train, lambda: calibrate(model, images, model.state_dict(), prior_images=0)):
            change()
            before = model(images).detach()
            if not model.training:
                calibrate(model, 0.3 * images + 0.2, model.state_dict(), prior_images=0)
            assert_close(model(0.3 * images + 0.2).detach(), 0.3 * before + 0.2, atol=1e-3, rtol=1e-3)

    def test_it_starts_from_a_small_blur(self):
        images = torch.rand(1, 3, 16, 16)
        model = timm.create_model('blindspot_unet', **SMALL).eval()
        blurred = torch.nn.functional.avg_pool2d(images, 3, stride=1)
        assert_close(model(images)[..., 1:-1, 1:-1].detach(), blurred, atol=1e-4, rtol=1e-4)

    def test_an_image_is_denoised_alike_in_any_batch(self):
        model = unet(**SMALL).eval()
        images = torch.rand(3, 3, 20, 20)
        assert_close(model(images)[:1], model(images[:1]))

    def test_a_large_image_is_denoised_as_by_the_network_itself(self):
        model = unet(**SMALL)
        images = torch.rand(1, 3, 400, 400)
        model(images)  # in training mode: statistics of its norms that are none of a new one
        model.eval()
        with torch.no_grad():
            assert_close(denoise(model, images[0]), model(images)[0], atol=1e-5, rtol=1e-5)

    def test_features_only_is_refused(self):
        with pytest.raises(RuntimeError, match='features_only'):
            timm.create_model('blindspot_unet', features_only=True)

    def test_saved_and_loaded_by_timm_it_gives_the_same_bits(self, tmp_path):
        model = unet(**SMALL).eval()
        timm_pudnet.save_model(model, tmp_path / 'saved')
        again = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).eval()
        images = torch.rand(1, 3, 16, 16)
        assert torch.equal(again(images), model(images))


class TestNoise:
    def test_sigma_is_the_standard_deviation(self):
        grey = torch.full((3, 200, 200), 0.5)
        for kind in ('gaussian', 'poisson'):
            for sigma in (0.05, 0.25, 0.75):
                noise = add_noise(grey, kind, sigma, generator()) - grey
                assert abs(float(noise.std()) / sigma - 1) < 0.02
                assert abs(float(noise.mean())) < 0.02 * sigma

    def test_poisson_noise_is_less_in_the_dark(self):
        spreads = [float(add_noise(torch.full((1, 99, 99), v), 'poisson', 0.2, generator()).std()) for v in (0.05, 0.8)]
        assert abs(spreads[1] / spreads[0] - 4) < 0.2

    def test_pixels_below_zero_give_no_photons(self):
        assert not add_noise(torch.full((3, 5, 5), -0.1), 'poisson', 0.3, generator()).any()

    def test_own_noise_is_left_as_it_is(self):
        images = torch.rand(3, 5, 5)
        assert add_noise(images, 'own', 0.3, generator()) is images

    def test_an_unknown_kind_is_named(self):
        with pytest.raises(InputError, match='salt'):
            add_noise(torch.zeros(1, 2, 2), 'salt', 0.1, generator())


class TestBlindSpots:
    @pytest.mark.parametrize('size', [(20, 30), (17, 23), (5, 5), (3, 4), (2, 2), (1, 7), (9, 1), (1, 2)])
    def test_one_pixel_of_each_box_is_hidden_by_another_nearby(self, size):
        height, width = size
        pixels = torch.arange(float(height * width)).view(1, 1, height, width)
        images = torch.cat([pixels, pixels + 1000], 1).repeat(4, 1, 1, 1)
        masked, places = blind_spots(images, generator())
        assert places.shape == (4, math.ceil(height / BOX) * math.ceil(width / BOX))
        changed = (masked != images).flatten(2)
        assert torch.equal(changed[:, 0], changed[:, 1])  # in all channels
        for image, its_places in enumerate(places.tolist()):
            assert changed[image, 0].nonzero().flatten().tolist() == sorted(its_places)
            boxes = {(place // width // BOX, place % width // BOX) for place in its_places}
            assert len(boxes) == len(its_places)
            for place in its_places:
                source = int(masked[image, 0].flatten()[place])
                assert masked[image, 1].flatten()[place] == source + 1000  # the same one in all channels
                assert abs(source // width - place // width) <= 2
                assert abs(source % width - place % width) <= 2

    def test_every_pixel_and_every_neighbour_has_its_turn(self):
        pixels = torch.arange(100.0).view(1, 1, 10, 10).repeat(3000, 1, 1, 1)
        masked, places = blind_spots(pixels, generator())
        assert len(places.unique()) == 100
        sources = masked.flatten(1).gather(1, places)[(places == 44)]
        assert len(sources.unique()) == 24

    def test_a_single_pixel_has_no_neighbour(self):
        with pytest.raises(InputError, match='1x1'):
            blind_spots(torch.zeros(2, 3, 1, 1), generator())

    def test_the_loss_looks_at_blind_spots_alone(self):
        noisy = torch.rand(2, 3, 10, 10)
        masked, places = blind_spots(noisy, generator())
        guesses = torch.rand(2, 3, 10, 10, requires_grad=True)
        loss = blind_spot_loss(guesses, noisy, masked, places)
        loss.backward()
        touched = guesses.grad.abs().sum(1).flatten(1) > 0
        assert [row.nonzero().flatten().tolist() for row in touched] == [sorted(row) for row in places.tolist()]
        rows, columns = places // 10, places % 10
        each = torch.arange(2)[:, None]
        hidden, shown, guessed = (x[each, :, rows, columns] for x in (noisy, masked, guesses.detach()))
        assert_close(loss.detach(), (guessed - hidden).square().mean() / (shown - hidden).square().mean().sqrt())

    def test_the_loss_grows_as_the_noise_does(self):
        noisy = torch.rand(2, 3, 10, 10)
        masked, places = blind_spots(noisy, generator())
        guesses = torch.rand(2, 3, 10, 10)
        assert_close(
            blind_spot_loss(guesses / 9, noisy / 9, masked / 9, places),
            blind_spot_loss(guesses, noisy, masked, places) / 9,
        )
        assert blind_spot_loss(noisy, noisy, masked, places) == 0


class TestBank:
    def test_what_cannot_be_trained_on_is_left_out_and_named(self, tmp_path):
        for name, side in (('good.png', 20), ('small.png', 4), ('moving.gif', 20)):
            Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(tmp_path / name)
        with pytest.warns(PudNetWarning, match=r'skipped 2 of 3 images.*(moving.gif.*small.png|small.png.*moving.gif)'):
            assert len(PatchBank.from_folder(Data(images=str(tmp_path)), 3).images) == 1
        (tmp_path / 'good.png').unlink()
        with pytest.raises(InputError, match='none of the 2 images'):
            PatchBank.from_folder(Data(images=str(tmp_path)), 3)

    def test_a_link_that_leads_nowhere_is_left_out(self, tmp_path):
        Image.new('RGB', (20, 20)).save(tmp_path / 'good.png')
        (tmp_path / 'gone.png').symlink_to(tmp_path / 'nowhere.png')
        with pytest.warns(PudNetWarning, match=r'skipped 1 of 2 images: .*gone.png: no such file'):
            assert len(PatchBank.from_folder(Data(images=str(tmp_path)), 3).images) == 1


class TestSampler:
    def test_a_group_is_the_same_whenever_it_is_drawn(self):
        sampler = PatchSampler([bank(), bank(1)], Denoising(patch=16, per_group=4), [1, 1], 0)
        first, (second, _) = sampler.draw(0)[0], sampler.draw(1)
        assert first.shape == (4, 3, 16, 16)
        assert torch.equal(sampler.draw(0)[0], first)
        assert not torch.equal(first, second)

    def test_noise_kinds_levels_grey_and_clipping_are_as_asked_for(self):
        flat = PatchBank([torch.full((3, 32, 32), 128, dtype=torch.uint8)])
        how = Denoising(patch=32, per_group=2, least=0.1, most=0.4, grey=0.5, clipped=0.5)
        groups = [PatchSampler([flat], how, [1], 0).draw(number)[0] for number in range(200)]
        spreads = [float(group.std()) for group in groups]
        assert 0.09 < min(spreads) < 0.12
        assert 0.3 < max(spreads) < 0.42
        grey = sum(torch.equal(group[:, 0], group[:, 1]) for group in groups) / 200
        inside = sum(bool(group.min() >= 0 and group.max() <= 1) for group in groups) / 200
        assert 0.4 < grey < 0.6
        assert 0.5 < inside < 0.9  # the clipped half, and those of low noise

    def test_patches_are_cut_from_the_images_and_turned(self):
        image = torch.arange(400, dtype=torch.float32).view(1, 20, 20).div(2).to(torch.uint8)
        patches = PatchBank([image]).draw(64, 8, generator())
        windows = (image.float() / 255).unfold(1, 8, 1).unfold(2, 8, 1).reshape(-1, 8, 8)
        turned = [windows.rot90(turn, (1, 2)) for turn in range(4)]
        known = torch.cat([*turned, *(window.flip(2) for window in turned)])
        found = [int((known == patch[0]).all((1, 2)).nonzero()[0]) // len(windows) for patch in patches]
        assert len(set(found)) == 8

    def test_small_images_give_small_patches(self):
        assert bank(side=10).draw(3, 64, generator()).shape == (3, 3, 10, 10)

    def test_reads_the_folder_that_the_recipe_names(self, tmp_path):
        for name, grey in (('day', 200), ('night', 20)):
            (tmp_path / name).mkdir()
            Image.new('RGB', (9, 12), (grey,) * 3).save(tmp_path / name / 'one.png')
        made = recipe(folder=tmp_path, data=[{'images': str(tmp_path), 'unseen': ['night']}])
        (found,) = timm_pudnet.denoising.load_patches(made)
        assert [tuple(image.shape) for image in found.images] == [(3, 12, 9)]
        assert found.images[0].unique().tolist() == [200]
        with pytest.raises(InputError, match='dusk'):
            timm_pudnet.denoising.load_patches(recipe(data=[{'images': str(tmp_path), 'classes': ['dusk']}]))


class TestRecipe:
    @pytest.mark.parametrize(
        ('table', 'word'),
        [
            ({'kinds': ['salt']}, 'salt'),
            ({'least': 0.5, 'most': 0.1}, 'least'),
            ({'grey': 2.0}, 'grey'),
            ({'patch': 1}, 'patch'),
            ({'per_group': 1}, 'per_group'),
            ({'sigma': 1.0}, 'sigma'),
        ],
    )
    def test_a_value_that_cannot_be_is_named(self, table, word):
        with pytest.raises(InputError, match=word):
            recipe(denoising=table)

    @pytest.mark.parametrize(
        ('changes', 'word'),
        [
            ({'hypernet': {'model_name': 'test_resnet', 'model_kwargs': {}}}, 'test_resnet'),
            ({'hypernet': {'input': {'input_size': [3, 16, 16]}}}, 'mean'),
            ({'data': [{'images': '.', 'data_dir': '.'}]}, 'data_dir'),
        ],
    )
    def test_what_a_denoiser_cannot_be_is_refused_before_any_work(self, changes, word):
        with pytest.raises(InputError, match=word):
            meta_train_denoiser(recipe(**changes))

    def test_a_model_in_training_mode_is_not_run_in_tiles(self):
        with pytest.raises(InputError, match='eval'):
            denoise(timm.create_model('blindspot_unet', **SMALL).train(), torch.rand(3, 9, 9))

    def test_what_a_denoiser_does_not_use_is_refused(self):
        with pytest.raises(InputError, match='groups'):
            recipe(groups={'n_way': 3})

    def test_each_training_refuses_the_recipes_of_the_other(self, make_recipe):
        with pytest.raises(InputError, match='meta_train_denoiser'):
            timm_pudnet.meta_train(recipe())
        with pytest.raises(InputError, match='denoising'):
            meta_train_denoiser(make_recipe(1))


class TestTraining:
    def test_it_learns_to_remove_noise_without_a_clean_image(self, trained):
        clean = smooth_images(6, seed=9)
        untrained = meta_train_denoiser(recipe(1), banks=[bank()], device='cpu', progress=False)
        for sigma, least in ((0.1, 8), (0.4, 8)):
            noisy = add_noise(clean, 'gaussian', sigma, generator())
            quality = {}
            for name, network in (('trained', trained), ('untrained', untrained)):
                model = predict_denoiser(noisy, hypernet=network, device='cpu')
                quality[name] = float(psnr(model(noisy).detach(), clean).mean())
            assert quality['trained'] > float(psnr(noisy, clean).mean()) + least
        assert quality['trained'] > quality['untrained'] + 1  # which blurs, and no more

    @pytest.mark.parametrize('train', [meta_train_denoiser, train_plain_denoiser])
    def test_a_run_that_was_interrupted_ends_the_same(self, train, tmp_path):
        def go(folder, **kwargs):
            made = recipe(4, schedule={'ema': 0.9})
            return train(made, folder, banks=[bank()], device='cpu', progress=False, **kwargs).state_dict()

        whole = go(tmp_path / 'whole')
        go(tmp_path / 'parts', max_steps=2)
        assert (tmp_path / 'parts' / CHECKPOINT_NAME).exists()
        resumed = go(tmp_path / 'parts')
        assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
        whole_log, parts_log = ((tmp_path / name / LOG_NAME).read_text() for name in ('whole', 'parts'))
        assert whole_log == parts_log
        assert whole_log.count('\n') == 4

    def test_both_trainings_see_the_same_patches(self, monkeypatch):
        drawn = {}
        draw = PatchSampler.draw
        for train in (meta_train_denoiser, train_plain_denoiser):
            seen = drawn[train] = []

            def recorded(self, number, seen=seen):
                found = draw(self, number)
                seen.append(found[0].clone())
                return found

            monkeypatch.setattr(PatchSampler, 'draw', recorded)
            train(recipe(3), banks=[bank()], device='cpu', progress=False)
        first, second = (torch.stack(drawn[train]) for train in (meta_train_denoiser, train_plain_denoiser))
        assert len(first) == 6
        assert_close(first, second, rtol=0, atol=0)

    def test_the_weights_depend_on_the_noise(self, trained):
        clean = smooth_images(6, seed=9)
        sketches = []
        for sigma in (0.05, 0.5):
            patches = noisy_patches(add_noise(clean, 'gaussian', sigma, generator()), 3, 16)[0]
            sketches.append(sketch_of(trained, patches))
        with torch.no_grad():
            first, second = (trained(sketch) for sketch in sketches)
        changed = [
            key
            for key in trained.target.keys('predicted')
            if float((first[key] - second[key]).norm() / first[key].norm().clamp_min(1e-3)) > 1e-4
        ]
        assert len(changed) == len(list(trained.target.keys('predicted')))


class TestPredict:
    def test_takes_images_in_every_form(self, trained, tmp_path):
        pixels = (smooth_images(4, 20) * 255).round().to(torch.uint8)
        arrays = pixels.permute(0, 2, 3, 1).numpy()
        pictures = [Image.fromarray(array) for array in arrays]
        (tmp_path / 'below').mkdir()
        for number, picture in enumerate(pictures):
            picture.save(tmp_path / ('below' if number % 2 else '.') / f'{number}.png')
        paths = [tmp_path / ('below' if number % 2 else '.') / f'{number}.png' for number in range(4)]
        forms = [pixels, pixels.float() / 255, arrays, arrays.astype(np.float32) / 255, list(pixels), pictures, paths]
        forms += [[str(path) for path in paths], (arrays.astype(np.uint16) * 257), tmp_path, os.fsencode(tmp_path)]
        states = [predict_denoiser(form, hypernet=trained, device='cpu').state_dict() for form in forms]
        for state in states[1:]:
            for key, value in states[0].items():
                assert_close(state[key], value, atol=1e-4, rtol=1e-3)

    def test_images_by_name_are_refused(self):
        with pytest.raises(InputError, match='a dict; pass a folder'):
            predict_denoiser({'one': torch.rand(3, 20, 20)}, device='cpu')

    def test_patches_are_spread_over_images_of_all_sizes(self):
        images = [torch.full((3, size, 30), size / 100) for size in (16, 20, 50, 8)]
        patches = noisy_patches(images, 3, 16)[0]
        assert patches.shape[1:] == (3, 16, 16)
        assert {round(float(patch.mean()), 2) for patch in patches} == {0.16, 0.2, 0.5, 0.08}
        assert len(noisy_patches(torch.rand(300, 1, 12, 12), 3, 16)[0]) == 128
        slope = torch.linspace(0, 1, 90).expand(3, 70, 90)
        for count in (1, 2, 100):
            seen = noisy_patches([slope] * count, 3, 16)[0]
            assert abs(float(seen.mean()) - 0.5) < 0.05
            assert float(seen.amax() - seen.amin()) > 0.7
        assert noisy_patches(torch.rand(2, 3, 12, 12), 1, 8)[0].shape == (6, 1, 8, 8)

    def test_a_denoiser_of_one_channel_sees_all_channels(self):
        image = torch.tensor([0.2, 0.5, 0.8]).view(3, 1, 1).expand(3, 200, 200)
        for images in ([image], [image[:, :16, :16]] * 300):
            patches = noisy_patches(images, 1, 16)[0]
            assert len(patches) == 128
            values, counts = patches.mean((1, 2, 3)).mul(10).round().unique(return_counts=True)
            assert values.tolist() == [2, 5, 8]
            assert counts.max() - counts.min() <= 1

    def test_pictures_in_memory_keep_their_depth(self):
        grey = np.full((16, 16), 30_000, np.uint16)
        pictures = [Image.fromarray(grey), Image.fromarray((grey / 65535).astype(np.float32)), grey, grey.astype('>u2')]
        for picture in [*pictures, torch.from_numpy(grey)]:
            assert_close(noisy_patches([picture], 3, 16)[0], torch.full((1, 3, 16, 16), 30_000 / 65535))
        with pytest.raises(InputError, match='32 bits'):
            noisy_patches([Image.fromarray(grey.astype(np.int32))], 3, 16)[0]

    @pytest.mark.parametrize('white', [1 / 16, 1 / 255, 12.0])
    def test_images_of_another_range_are_denoised_as_well(self, white):
        clean = smooth_images(8, 64, seed=5)
        noisy = clean + 0.1 * torch.randn(clean.shape, generator=generator(2))
        usual, other = (predict_denoiser(scale * noisy, device='cpu') for scale in (1.0, white))
        its_noise = other.posterior.black * (other.scale / white) ** 2
        assert_close(its_noise, usual.posterior.black, rtol=0.05, atol=0)
        with torch.inference_mode():
            before, after = (
                psnr(model(noisy * scale) / scale, clean) for model, scale in ((usual, 1.0), (other, white))
            )
        assert float((after - before).abs().max()) < 0.6  # without it more than 3

    @pytest.mark.parametrize('scale', [1 / 16, 12.0, 1e-6])
    def test_a_denoiser_of_another_scale_does_the_same_to_images_of_it(self, trained, tmp_path, scale):
        noisy = add_noise(smooth_images(4, seed=3), 'poisson', 0.2, generator())
        sketch = sketch_of(trained, noisy)
        usual, other = (denoiser_of(trained, [sketch], [noisy], white) for white in (1.0, scale))
        assert_close(other(scale * noisy) / scale, usual(noisy), atol=1e-5, rtol=1e-4)
        assert_close(other.forward_features(scale * noisy), usual.forward_features(noisy), atol=1e-5, rtol=1e-3)
        timm_pudnet.save_model(other, tmp_path / 'model')
        again = timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True).eval()
        assert torch.equal(again(noisy * scale), other(noisy * scale))

    @pytest.mark.parametrize('share', [0.0005, 0.003])
    def test_hot_pixels_of_dark_images_leave_the_noise_of_the_others_removed(self, share):
        clean = smooth_images(8, 64, seed=5)
        noisy = 0.002 * (clean + 0.1 * torch.randn(clean.shape, generator=generator(2)))
        hot = torch.rand(clean.shape, generator=generator(3)) < share
        model = predict_denoiser(noisy.masked_fill(hot, 1.0), device='cpu')
        with torch.inference_mode():
            found = model(noisy.masked_fill(hot, 1.0))
        before, after = ((image / 0.002 - clean)[~hot].square().mean().sqrt() for image in (noisy, found))
        assert after < 0.75 * before  # without it 1.1 of it, and more
        assert found[hot].min() > 0.9  # what is bright is not removed

    def test_images_of_few_pixels_tell_no_noise_where_there_are_others(self):
        noisy = smooth_images(4, 64, seed=5) + 0.1 * torch.randn(4, 3, 64, 64, generator=generator(2))
        thin = [image[:, :, 7:8] for image in noisy] * 2
        assert_close(noisy_patches([*noisy, *thin], 3, 64)[0], noisy)
        assert len(noisy_patches(thin, 3, 64)[0]) == 8 * 8

    @pytest.mark.parametrize(('black', 'word'), [(-1, 'add what was subtracted'), (-0.5, 'add'), (3, 'subtract their')])
    def test_floats_whose_black_is_elsewhere_are_told(self, trained, black, word):
        with pytest.warns(PudNetWarning, match=f'black must be 0.*{word}'):
            predict_denoiser(smooth_images(4, seed=3) * 0.8 + black, hypernet=trained)

    def test_a_bank_of_dark_images_is_seen_as_a_prediction_sees_them(self, tmp_path):
        for number, image in enumerate(smooth_images(4, 24, channels=1)):
            Image.fromarray((image[0].numpy() * 4095).astype(np.uint16)).save(tmp_path / f'{number}.png')
        images = PatchBank.from_folder(Data(images=str(tmp_path)), 3).images
        assert 0.9 < max(float(image.max()) for image in images) < 1.1

    def test_ranges_that_differ_are_refused(self, trained, tmp_path):
        paths = [tmp_path / f'{top}.tif' for top in (1, 255)]
        for path, top in zip(paths, (1, 255), strict=True):
            Image.fromarray(np.full((16, 16), 0.9 * top, np.float32)).save(path)
        with pytest.raises(InputError, match='scale them alike'):
            predict_denoiser(paths, hypernet=trained)
        with pytest.raises(InputError, match='scale them alike'):
            predict_denoiser([Image.open(path) for path in paths], hypernet=trained)
        with pytest.raises(InputError, match='scale them alike'):
            PatchBank.from_folder(Data(images=str(tmp_path)), 1)
        for images in ([torch.rand(3, 16, 16), 200 * torch.rand(3, 16, 16)], 200 * torch.rand(2, 3, 16, 16)):
            with pytest.raises(InputError, match='divide them by 255'):
                predict_denoiser(images, hypernet=trained)
        with pytest.raises(InputError, match='divide them by 255'):
            denoise(predict_denoiser(torch.rand(2, 3, 16, 16), hypernet=trained), 200 * torch.rand(3, 16, 16))

    def test_a_picture_cut_short_is_named(self, trained, tmp_path):
        Image.fromarray((255 * np.random.default_rng(0).random((40, 40, 3))).astype(np.uint8)).save(tmp_path / 'a.png')
        (tmp_path / 'a.png').write_bytes((tmp_path / 'a.png').read_bytes()[:2000])
        with Image.open(tmp_path / 'a.png') as picture, pytest.raises(InputError, match=r'images\[0\] cannot be read'):
            predict_denoiser([picture], hypernet=trained)

    def test_the_order_of_the_images_does_not_matter_where_each_is_one_patch(self, trained):
        images = add_noise(smooth_images(5, seed=3), 'gaussian', 0.2, generator())
        first, second = (
            predict_denoiser(x, hypernet=trained, device='cpu').state_dict() for x in (images, images.flip(0))
        )
        for key, value in first.items():
            assert_close(second[key], value, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize(
        ('images', 'error', 'word'),
        [
            ([], InputError, 'no images'),
            (torch.zeros(3, 9, 9), InputError, 'shape'),
            (torch.full((2, 3, 9, 9), math.nan), InputError, r'images\[0\].*NaN'),
            ([3], InputError, 'int'),
            ('nowhere/at/all', NotFoundError, 'nowhere'),
            (7, InputError, 'int'),
        ],
    )
    def test_what_cannot_be_read_is_named(self, trained, images, error, word):
        with pytest.raises(error, match=word):
            predict_denoiser(images, hypernet=trained, device='cpu')

    def test_a_classifier_is_asked_for_elsewhere(self):
        with pytest.raises(InputError, match='predict_denoiser'):
            timm_pudnet.predict_model('blindspot_unet', torch.rand(2, 3, 8, 8))


class TestPublishing:
    @pytest.fixture
    def folder(self, trained, tmp_path):
        trained.save_pretrained(tmp_path)
        (tmp_path / 'recipe.toml').write_text('seed = 0')
        rows = {'noisy': {'mean': 12.0, 'interval': 0.1}, 'predicted': {'mean': 24.5, 'interval': 0.2}}
        one = {'sigma': 0.25, 'reading': 'unit', 'psnr': rows}
        more = {'sigma': 0.5, 'reading': 'unit', 'psnr': {**rows, 'predicted': {'mean': 21.5, 'interval': 0.2}}}
        found = {'protocol': 'birds', 'images': 9, 'noises': [one, more], 'weights_sha256': weights_sha256(tmp_path)}
        (tmp_path / 'results.birds.json').write_text(json.dumps(found))
        return tmp_path

    def test_the_card_of_a_denoiser_has_its_psnr(self, folder):
        files = hypernet_files(folder, 'org/net', 'mit')
        assert {'results.birds.json', 'classes.json', 'config.json', 'model.safetensors'} <= set(files)
        card = files['README.md'].decode()
        assert '| 0.25 (unit) | 12.00 ± 0.10 | 24.50 ± 0.20 |' in card
        assert "predict_denoiser('noisy/', hypernet='org/net')" in card
        results = ModelCard(card).data.eval_results
        found = [(result.metric_type, result.metric_value, result.task_type) for result in results]
        assert found == [('psnr', 24.5, 'image-to-image'), ('psnr', 21.5, 'image-to-image')]
        assert ['sigma 0.25' in result.dataset_name for result in results] == [True, False], 'each under its own noise'

    def test_its_psnr_is_known_without_loading_it(self, folder):
        found = describe_hypernet(folder)
        assert found.psnr == {'mean': 24.5, 'interval': 0.2, 'sigma': 0.25, 'reading': 'unit'}
        assert '24.50 ± 0.20 dB (sigma 0.25 unit)' in str(found)

    def test_results_of_other_weights_are_refused(self, folder):
        text = (folder / 'results.birds.json').read_text()
        digest = json.loads(text)['weights_sha256']['model.safetensors']
        (folder / 'results.birds.json').write_text(text.replace(digest, '0' * 64))
        with pytest.raises(InputError, match=r'other weights .* run hub/denoising\.py'):
            hypernet_files(folder, 'org/net', 'mit')

    def test_results_without_a_psnr_are_refused(self, folder):
        text = (folder / 'results.birds.json').read_text()
        (folder / 'results.birds.json').write_text(text.replace('24.5', '"high"'))
        with pytest.raises(InputError, match='no results file'):
            hypernet_files(folder, 'org/net', 'mit')


class TestCommands:
    @pytest.mark.parametrize(
        ('more', 'needle'),
        [
            ('label_smoothing = 0.2', '[schedule] label_smoothing is not used'),
            ('whitening = false', '[schedule] whitening is not used'),
            ('[groups]\nn_way = 3', '[groups] is not used'),
            ('[losses]\nfull = 2.0', '[losses] is not used'),
        ],
    )
    def test_what_a_denoiser_s_training_does_not_use_is_refused(self, more, needle, tmp_path):
        text = (
            '[hypernet]\nmodel_name = "blindspot_unet"\n[data]\nimages = "x"\n[denoising]\n[schedule]\nimages = 480\n'
        )
        (tmp_path / 'recipe.toml').write_text(text)
        Recipe.load(tmp_path / 'recipe.toml')
        (tmp_path / 'recipe.toml').write_text(text + more)
        with pytest.raises(InputError) as error:
            Recipe.load(tmp_path / 'recipe.toml')
        assert needle in str(error.value)

    def test_from_a_recipe_to_a_denoised_folder(self, tmp_path):
        (tmp_path / 'photos').mkdir()
        (tmp_path / 'noisy').mkdir()
        for number, image in enumerate(smooth_images(6, 24)):
            noisy = add_noise(image, 'gaussian', 0.2, generator(number)).clamp(0, 1)
            for folder, pixels in (('photos', image), ('noisy', noisy)):
                array = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
                Image.fromarray(array).save(tmp_path / folder / f'{number}.png')
        lines = [
            '[hypernet]',
            'model_name = "blindspot_unet"',
            'generator = "residual"',
            'sketch_width = 8',
            'model_kwargs = { width = 4, depth = 2 }',
            'input = { input_size = [3, 16, 16], mean = [0, 0, 0], std = [1, 1, 1] }',
            '[data]',
            f'images = {json.dumps(str(tmp_path / "photos"))}',
            '[denoising]',
            'patch = 16',
            'per_group = 4',
            '[schedule]',
            'images = 480',
            'rate = 5e-3',
        ]
        (tmp_path / 'recipe.toml').write_text('\n'.join(lines))

        def run(*args):
            return CliRunner().invoke(main, [str(arg) for arg in args])

        found = run('train', tmp_path / 'recipe.toml', '--out', tmp_path / 'net')
        assert found.exit_code == 0, found.output
        assert '6 images' in found.output
        found = run('train', tmp_path / 'recipe.toml', '--out', tmp_path / 'net', '--plain')
        assert found.exit_code == 0, found.output
        assert timm.create_model(f'local-dir:{tmp_path / "net/plain"}', pretrained=True).in_chans == 3
        found = run('train', tmp_path / 'recipe.toml', '--short')
        assert found.exit_code == 2
        assert '--short' in found.output
        more = ('--hypernet', tmp_path / 'net', '--device', 'cpu', '--clean', tmp_path / 'photos')
        found = run('denoise', tmp_path / 'noisy', '--out', tmp_path / 'clean', *more)
        assert found.exit_code == 0, found.output
        means = json.loads((tmp_path / 'clean/denoised.json').read_text())['mean']['psnr']
        assert means['denoised']['mean'] > means['noisy']['mean'] + 2

        # What the command wrote is what Python gives.
        names = [f'{number}.png' for number in range(6)]
        model = predict_denoiser(tmp_path / 'noisy', hypernet=tmp_path / 'net', device='cpu')
        for name in names:
            pixels = torch.from_numpy(np.array(Image.open(tmp_path / 'noisy' / name))).permute(2, 0, 1) / 255
            written = np.array(Image.open(tmp_path / 'clean' / name))
            made = (denoise(model, pixels).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            assert np.abs(written.astype(int) - made).max() <= 1


def test_of_dark_images_that_are_black_but_for_a_few_pixels_these_are_white():
    pixels = torch.zeros(10_000)
    pixels[:40] = 0.01
    assert white_used(pixels) == pytest.approx(0.01)


def test_bright_images_whose_darkest_pixel_is_no_black_are_no_reason_to_warn():
    _check_black(0.6 + 0.4 * torch.rand(4, 3, 16, 16))  # a warning is an error here
