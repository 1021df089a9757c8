"""Recipes that start from a model of the target, and short tries of a recipe."""

import importlib
import json

import pytest
import timm
import torch
from torch.testing import assert_close

from timm_pudnet import PudNet, save_model
from timm_pudnet.config import InputError, NotFoundError
from timm_pudnet.training import ImageBank, LossWeights, meta_train, train_plain, try_recipe
from timm_pudnet.training.run import config_fields

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


@pytest.fixture(scope='module')
def learned(make_recipe, bank, tmp_path_factory):
    model, _ = train_plain(make_recipe(40), banks=[bank], device='cpu', progress=False)
    return model, save_model(model, tmp_path_factory.mktemp('learned') / 'start')


def frozen(start, make_recipe, steps, **losses):
    return make_recipe(
        steps,
        start=str(start),
        hypernet=RESIDUAL,
        groups={'conditions': 1.0, 'per_step': 4},
        losses=LossWeights(**{'metric': 0.0, 'full': 0.0, 'consistency': 0.0, 'sketch': 0.0, **losses}),
        schedule={'optimizer': 'sgd', 'rate': 0.0, 'sketch_rate': 1e-2, 'fixed_statistics': True},
    )


def test_a_rate_of_zero_leaves_the_start_as_it_is_and_learns_the_change(learned, make_recipe, bank, tmp_path):
    model, folder = learned
    recipe = frozen(folder, make_recipe, 120, distillation=1.0)
    hypernet = meta_train(recipe, tmp_path / 'run', banks=[bank], device='cpu', progress=False)
    given, changed = dict(model.named_parameters()), []
    for name, value in hypernet.named_parameters():
        assert value.requires_grad == (not name.startswith('shared.') and not name.endswith('.base')), name
        changed += [name] if name.endswith('.steer') and value.abs().sum() > 0 else []
    assert changed
    unmoved = PudNet.for_target(**config_fields(recipe.hypernet, class_names=tuple('abcdef')))
    unmoved.start_from(model.state_dict())
    for name, value in unmoved.named_parameters():
        if name.startswith('shared.') or name.endswith('.base'):
            assert_close(hypernet.get_parameter(name), value, rtol=0, atol=0)
    sketches = torch.randn(2, hypernet.config.sketch_width)
    one, two = (hypernet(sketch) for sketch in sketches)
    assert any(not torch.equal(one[key], two[key]) for key in given)
    lines = [json.loads(line) for line in (tmp_path / 'run' / 'log.jsonl').read_text().splitlines()]
    losses = [line['distillation'] for line in lines]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


def test_what_is_wanted_are_the_features_of_the_start_before_the_condition(learned, make_recipe, bank, monkeypatch):
    model, folder = learned
    seen = []
    loss = loop.distillation_loss
    monkeypatch.setattr(loop, 'distillation_loss', lambda *args: seen.append(args) or loss(*args))
    recipe = frozen(folder, make_recipe, 1, distillation=1.0)
    meta_train(recipe, banks=[bank], device='cpu', progress=False)
    group = loop.group_sampler(recipe, [bank]).draw(0, plain=True)
    found, wanted = seen[0]
    with torch.no_grad():
        assert_close(wanted[0], model.eval()(group.plain), rtol=1e-4, atol=1e-4)
        assert_close(found[0], model(torch.cat([group.support, group.query])), rtol=1e-4, atol=1e-4)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert [tuple(one.shape) for one in wanted[1:]] == [(len(group.plain), norm.num_features) for norm in norms]


@pytest.mark.parametrize(
    ('changes', 'needles'),
    [
        ({'losses': LossWeights(distillation=1.0)}, ('distillation', 'start')),
        ({'schedule': {'optimizer': 'sgd', 'rate': 0.0}, 'losses': LossWeights(full=0.0, consistency=0.0)}, ('start',)),
        ({'schedule': {'optimizer': 'sgd', 'rate': 0.0}, 'start': 'somewhere'}, ('rate of 0', 'full')),
    ],
)
def test_what_distillation_and_a_rate_of_zero_need(changes, needles, make_recipe, one_line):
    with pytest.raises(InputError) as error:
        make_recipe(**changes)
    one_line(error, *needles)


def test_a_rate_of_zero_trains_no_control(learned, make_recipe, bank, one_line):
    with pytest.raises(InputError) as error:
        train_plain(frozen(learned[1], make_recipe, 1, distillation=1.0), banks=[bank], progress=False)
    one_line(error, 'rate of 0', 'control')


def test_adamw_wants_a_rate(make_recipe, one_line):
    with pytest.raises(InputError) as error:
        make_recipe(schedule={'rate': 0.0})
    one_line(error, 'rate', 'above zero')


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
