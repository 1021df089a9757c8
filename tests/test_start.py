"""Recipes that start from a model of the target, and short tries of a recipe."""

import importlib

import pytest
import timm
import torch
from torch.testing import assert_close

from timm_pudnet import save_model
from timm_pudnet.config import InputError, NotFoundError
from timm_pudnet.training import ImageBank, meta_train, train_plain, try_recipe

loop = importlib.import_module('timm_pudnet.training.meta_train')  # the package's name for it is the function
RESIDUAL = {'generator': 'residual', 'predict_norm': True}
SLOW = {'rate': 1e-9, 'sketch_rate': 1e-9, 'optimizer': 'sgd', 'weight_decay': 0.0}


@pytest.fixture
def start(tmp_path):
    model = timm.create_model('test_resnet', num_classes=0)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.rand_like(value))
    return model, save_model(model, tmp_path / 'start')


def test_hypernetwork_and_control_start_from_the_same_model(start, make_recipe, bank):
    model, folder = start
    recipe = make_recipe(1, start=str(folder), hypernet=RESIDUAL, schedule=SLOW)
    hypernet = meta_train(recipe, banks=[bank], device='cpu', progress=False)
    plain, _ = train_plain(recipe, banks=[bank], device='cpu', progress=False)
    predicted = hypernet(torch.zeros(hypernet.config.sketch_width))
    for key, value in model.named_parameters():
        assert_close(predicted[key], value.detach(), rtol=0, atol=1e-6)
        assert_close(plain.get_parameter(key).detach(), value.detach(), rtol=0, atol=1e-6)


def test_the_paper_s_generator_starts_from_a_model_too(start, make_recipe, bank):
    model, folder = start
    hypernet = meta_train(make_recipe(1, start=str(folder), schedule=SLOW), banks=[bank], device='cpu', progress=False)
    predicted = hypernet(torch.zeros(hypernet.config.sketch_width))
    for key, value in model.named_parameters():
        assert_close(predicted[key], value.detach(), rtol=1e-3, atol=1e-4)


def test_timm_s_own_weights_are_a_start(start, make_recipe, bank, monkeypatch):
    model, folder = start
    original = timm.create_model

    def create(name, *, pretrained=False, **kwargs):
        if pretrained and not name.startswith('local-dir:'):  # a file in place of a download
            assert name == 'test_resnet.r160_in1k'
            kwargs |= {'pretrained_cfg_overlay': {'file': str(folder / 'model.safetensors'), 'num_classes': 0}}
        return original(name, pretrained=pretrained, **kwargs)

    monkeypatch.setattr(timm, 'create_model', create)
    recipe = make_recipe(1, start='test_resnet.r160_in1k', hypernet=RESIDUAL, schedule=SLOW)
    hypernet = meta_train(recipe, banks=[bank], device='cpu', progress=False)
    predicted = hypernet(torch.zeros(hypernet.config.sketch_width))
    for key, value in model.named_parameters():
        assert_close(predicted[key], value.detach(), rtol=0, atol=1e-6)


def test_the_statistics_of_the_start_can_be_kept(start, make_recipe, bank, monkeypatch):
    model, folder = start
    stay = {'fixed_statistics': True}
    first = meta_train(
        make_recipe(1, start=str(folder), hypernet=RESIDUAL, schedule=stay), banks=[bank], progress=False
    )
    free = meta_train(make_recipe(1, start=str(folder), hypernet=RESIDUAL), banks=[bank], progress=False)
    own = model.state_dict()
    for key in first.target.keys('calibrated'):
        assert_close(first.statistics(key), own[key], rtol=0, atol=0)
        assert not torch.equal(free.statistics(key), own[key]), key
    # The loss is of features by these statistics: those of the start in eval mode, before the first step.
    seen = []
    losses = loop.group_losses
    monkeypatch.setattr(loop, 'group_losses', lambda *args, **kwargs: seen.append(args) or losses(*args, **kwargs))
    recipe = make_recipe(1, start=str(folder), hypernet=RESIDUAL, schedule=stay)
    meta_train(recipe, banks=[bank], progress=False)
    group = loop.group_sampler(recipe, [bank]).draw(0)
    with torch.no_grad():
        assert_close(seen[0][1], model.eval()(group.query), rtol=1e-4, atol=1e-4)


def test_kept_statistics_need_a_start(make_recipe, one_line):
    with pytest.raises(InputError) as error:
        make_recipe(schedule={'fixed_statistics': True})
    one_line(error, 'fixed_statistics', 'start')


def test_a_start_that_does_not_fit_is_one_line(start, make_recipe, bank, tmp_path, one_line):
    with pytest.raises(InputError) as error:
        meta_train(make_recipe(1, start=str(tmp_path / 'absent'), hypernet=RESIDUAL), banks=[bank], progress=False)
    one_line(error, 'absent', 'test_resnet.TAG')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(NotFoundError) as error:
        meta_train(make_recipe(1, start=str(tmp_path / 'empty'), hypernet=RESIDUAL), banks=[bank], progress=False)
    one_line(error, 'empty', 'cannot be had')
    other = save_model(timm.create_model('test_resnet', num_classes=0, in_chans=1), tmp_path / 'grey')
    with pytest.raises(InputError) as error:
        train_plain(make_recipe(1, start=str(other)), banks=[bank], progress=False)
    one_line(error, 'grey', 'conv1.0.weight')


def test_a_short_try_tells_whether_a_recipe_learns(make_recipe, bank):
    noise = ImageBank(torch.randint(0, 256, bank.images.shape, dtype=torch.uint8), bank.labels, bank.class_names)
    found, hopeless = (
        try_recipe(make_recipe(400), banks=[one], device='cpu', seconds=2, progress=False) for one in (bank, noise)
    )
    assert found['chance'] == pytest.approx(1 / 3)
    assert 0.9 < found['after'] <= 1
    assert 0 <= hopeless['before'] < 0.6
    for one in (found, hopeless):
        assert one['images'] > 0
        assert one['seconds'] > 0
        assert one['images_per_second'] > 0
