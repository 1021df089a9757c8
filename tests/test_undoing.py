import dataclasses
import importlib
import json

import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close

from timm_pudnet import PudNet, save_model
from timm_pudnet.config import InputConfig, InputError
from timm_pudnet.target import batch_norms
from timm_pudnet.training import Condition, GroupSampler, ImageBank, LossWeights, meta_train
from timm_pudnet.training.undoing import LEAST_SHARE, ChannelUndoing

INPUT = InputConfig(input_size=(3, 16, 16), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
ORDERS = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
CONDITIONS = [None, *(Condition(order=order, inverted=inverted) for order in ORDERS for inverted in (False, True))]


@pytest.fixture(scope='module', autouse=True)
def few_steps():
    """Sketches so small need no thousands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('timm_pudnet.training.undoing.MOST_STEPS', 1000)
        yield


def normalised(images):
    return (images - torch.tensor(INPUT.mean)[:, None, None]) / torch.tensor(INPUT.std)[:, None, None]


@pytest.fixture(scope='module')
def target():
    """A target, and weights of it whose norms are not those of a new one."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=0).eval()
    for _, norm in batch_norms(model):
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(value, 0.5, 1.5)
    return model, {key: value.clone() for key, value in model.state_dict().items()}


def make(generator='residual', **changes):
    return PudNet.for_target(
        'test_resnet',
        generator=generator,
        predict_norm=True,
        input=INPUT,
        sketch_width=16,
        sketch_channels=(4, 8),
        **changes,
    )


@pytest.mark.parametrize('condition', CONDITIONS)
def test_the_first_layers_give_what_they_gave_before_the_condition(target, condition):
    model, weights = target
    kernel, bias = ChannelUndoing(make(), model, weights).wanted(condition)
    images = torch.rand(4, 3, 16, 16)
    seen = images if condition is None else condition.apply(images)
    first, norm = model.conv1[0], next(iter(batch_norms(model)))[1]

    def given(images, kernel, bias):
        out = nn.functional.conv2d(normalised(images), kernel, stride=first.stride, padding=first.padding)
        return nn.functional.batch_norm(out, norm.running_mean, norm.running_var, norm.weight, bias, eps=norm.eps)

    found, expected = given(seen, kernel, bias), given(images, first.weight, norm.bias)
    assert_close(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], rtol=1e-4, atol=1e-4)  # edges are padded with zeros
    if condition is not None and condition.inverted:
        assert (found - expected).abs().max() > 1e-2


def test_the_loss_is_zero_for_what_is_wanted_and_grows_with_the_square_of_the_distance(target):
    model, weights = target
    hypernet = make()
    hypernet.start_from(weights)
    undoing = ChannelUndoing(hypernet, model, weights)
    sketches, same = torch.rand(3, 16), undoing.wanted(None)
    assert float(undoing.loss(sketches, [same] * 3).detach()) == pytest.approx(0.0, abs=1e-9)
    for factor in (0.1, 0.2):
        off = [(same[0] * (1 + factor), same[1] + factor * undoing.gain)] * 3
        assert float(undoing.loss(sketches, off).detach()) == pytest.approx(2 * factor**2, rel=1e-4)


@pytest.mark.parametrize(('changes', 'left'), [({}, 0.05), ({'context': False}, 0.05), ({'generator': 'paper'}, 0.3)])
def test_a_hypernetwork_learns_it_from_sketches_that_tell_conditions_apart(target, changes, left):
    model, weights = target
    hypernet = make(**changes)
    hypernet.start_from(weights)
    before = {key: value.clone() for key, value in hypernet.state_dict().items()}
    undoing = ChannelUndoing(hypernet, model, weights)
    rng = torch.Generator().manual_seed(1)
    picks = torch.randint(len(CONDITIONS), (60,), generator=rng)
    # Of one image to six.
    images = [torch.eye(16)[pick] + 0.05 * torch.randn(1 + pick % 6, 16, generator=rng) for pick in picks.tolist()]
    sketches = torch.stack([one.mean(0) for one in images])
    conditions = [CONDITIONS[pick] for pick in picks.tolist()]
    wanted = [undoing.wanted(condition) for condition in conditions]
    first = float(undoing.loss(sketches, wanted).detach())
    undoing.learn(images, conditions, rng)
    assert float(undoing.loss(sketches, wanted).detach()) < left * first
    moved = {key for key, value in hypernet.state_dict().items() if not torch.equal(value, before[key])}
    assert not [
        key for key in moved if key.startswith(('encoder.', 'shared.', 'norm_statistics.')) or key.endswith('.base')
    ]
    assert {key.split('.')[1] for key in moved if key.startswith('generators.')} == set(map(str, undoing.places))
    rows = getattr(hypernet.generators[0], 'channel_rows', None)
    if rows is not None:  # of the steering only what mixes channels has learned
        steer = hypernet.generators[0].steer
        assert not torch.cat([steer[: rows.start], steer[rows.stop :]]).any()
        assert steer[rows].any()
    assert all(parameter.grad is None for parameter in hypernet.parameters())


def test_groups_are_not_learned_by_heart(target, monkeypatch):
    model, weights = target

    def draw(count, seed):
        rng = torch.Generator().manual_seed(seed)
        conditions = [Condition.draw(rng) for _ in range(count)]
        codes = [torch.tensor([*one.order, one.inverted, *[0] * 12]).float() for one in conditions]
        return [code + 2 * torch.randn(12, 16, generator=rng) for code in codes], conditions

    groups, (others, answers) = draw(20, 1), draw(100, 2)
    left = []
    for share in (LEAST_SHARE, 1.0):
        monkeypatch.setattr('timm_pudnet.training.undoing.LEAST_SHARE', share)
        torch.manual_seed(0)
        hypernet = make()
        hypernet.start_from(weights)
        undoing = ChannelUndoing(hypernet, model, weights)
        undoing.learn(*groups, torch.Generator().manual_seed(3))
        sketches = torch.stack([one.mean(0) for one in others])
        left.append(float(undoing.loss(sketches, [undoing.wanted(one) for one in answers]).detach()))
    assert left[0] < 0.8 * left[1], left


def no_norm(model):
    return nn.Sequential(model.conv1[0], nn.Identity())


def test_a_target_that_cannot_be_told_so_is_refused(target, one_line):
    model, weights = target
    with pytest.raises(InputError) as error:
        ChannelUndoing(make(), no_norm(model), weights)
    one_line(error, 'undoing', 'BatchNorm', 'test_resnet')
    hypernet = PudNet.for_target('test_resnet', generator='residual', input=INPUT, sketch_width=16)
    with pytest.raises(InputError) as error:
        ChannelUndoing(hypernet, model, weights)
    one_line(error, 'undoing', 'predict_norm = true')


@pytest.fixture(scope='module')
def coloured(bank):
    """Images whose channels are not alike, so that they tell what a condition did to them."""
    levels = torch.tensor([1.0, 0.5, 0.2])[:, None, None]
    return ImageBank((bank.images * levels).to(torch.uint8), bank.labels, bank.class_names)


@pytest.fixture(scope='module')
def earlier(make_recipe, coloured, tmp_path_factory):
    """A hypernetwork whose sketch tells conditions apart."""
    recipe = make_recipe(
        60,
        hypernet={'generator': 'residual', 'predict_norm': True},
        groups={'conditions': 1.0, 'sketch_groups': 6, 'sketch_images': 8},
        schedule={'rate': 1e-2},
    )
    hypernet = meta_train(recipe, banks=[coloured], device='cpu', progress=False)
    return hypernet.save_pretrained(tmp_path_factory.mktemp('earlier') / 'hypernet')


def undoing_recipe(make_recipe, folder, steps=8, **schedule):
    return make_recipe(
        steps,
        start=str(folder),
        hypernet={'generator': 'residual', 'predict_norm': True},
        groups={'n_shot': 4, 'conditions': 1.0, 'per_step': 4},
        losses=LossWeights(metric=0.0, full=0.0, consistency=0.0, sketch=0.0, undoing=1.0),
        schedule={
            'optimizer': 'sgd',
            'rate': 0.0,
            'sketch_rate': 1e-4,
            'fixed_statistics': True,
            'fixed_encoder': True,
            **schedule,
        },
    )


@pytest.fixture(scope='module')
def taught(earlier, make_recipe, coloured, tmp_path_factory):
    """What a training with it makes of the earlier hypernetwork, its recipe and the folder of its log."""
    recipe, folder = undoing_recipe(make_recipe, earlier, 40, ema=0.999), tmp_path_factory.mktemp('taught')
    with pytest.MonkeyPatch.context() as patch:
        # In less time, and with as many groups before as after.
        patch.setattr(importlib.import_module('timm_pudnet.training.meta_train'), 'UNDOING_SHARE', 1)
        return meta_train(recipe, folder, banks=[coloured], device='cpu', progress=False), recipe, folder


def test_training_learns_it_before_its_first_step_and_keeps_it(earlier, taught):
    after, recipe, folder = taught
    before = PudNet.from_pretrained(earlier)
    for key, value in before.encoder.state_dict().items():
        assert_close(after.encoder.state_dict()[key], value, rtol=0, atol=0)
    losses = [json.loads(line)['undoing'] for line in (folder / 'log.jsonl').read_text().splitlines()]
    assert sum(losses) / len(losses) < 0.5  # 2.0 where nothing is known
    assert sum(losses[-10:]) < 1.5 * sum(losses[:10])
    cost = after.config.training
    assert cost['images'] == cost['sketch_images'] == recipe.schedule.images


def test_what_it_learned_is_in_the_hypernetwork_for_new_groups_too(earlier, taught, coloured):
    after, recipe, _ = taught  # a moving average, which begins with what was learned before the first step
    sampler = GroupSampler([coloured], recipe.hypernet.input, recipe.groups, seed=9)
    groups = [sampler.draw(number) for number in range(20)]
    before = PudNet.from_pretrained(earlier)
    as_they_are = GroupSampler([coloured], recipe.hypernet.input, dataclasses.replace(recipe.groups, conditions=0.0))
    with torch.no_grad():
        sketches = torch.stack([before.encoder(group.support).mean(0) for group in groups])
        usual = [before.encoder(as_they_are.draw(number, 'start').support).mean(0) for number in range(64)]
        weights = before(torch.stack(usual).mean(0))
    model, losses = timm.create_model('test_resnet', num_classes=0), []
    for hypernet in (before, after):
        undoing = ChannelUndoing(hypernet, model, weights)
        losses.append(float(undoing.loss(sketches, [undoing.wanted(group.condition) for group in groups]).detach()))
    assert losses[1] < 0.5 * losses[0]


def test_a_run_that_goes_on_has_it_behind_it(earlier, make_recipe, bank, tmp_path, monkeypatch):
    monkeypatch.setattr('timm_pudnet.training.undoing.MOST_STEPS', 40)
    recipe = undoing_recipe(make_recipe, earlier, ema=0.9)
    whole = meta_train(recipe, banks=[bank], device='cpu', progress=False)
    for most in (3, None):
        parts = meta_train(recipe, tmp_path, banks=[bank], device='cpu', progress=False, max_steps=most)
    for key, value in whole.state_dict().items():
        assert_close(parts.state_dict()[key], value, rtol=0, atol=0)
    cost = whole.config.training
    assert cost['sketch_images'] == 10 * cost['images'], 'ten groups before the first step for each after it'


def test_it_needs_an_earlier_hypernetwork(make_recipe, bank, tmp_path, one_line):
    start = save_model(timm.create_model('test_resnet', num_classes=0), tmp_path / 'start')
    with pytest.raises(InputError) as error:
        meta_train(undoing_recipe(make_recipe, start, fixed_encoder=False), banks=[bank], device='cpu', progress=False)
    one_line(error, 'undoing', 'hypernetwork', 'start')


def test_what_was_worked_out_for_a_condition_is_of_no_other(target):
    model, weights = target
    undoing = ChannelUndoing(make(), model, weights)
    for _ in range(2):
        for condition in CONDITIONS:
            assert_close(undoing.wanted(condition), ChannelUndoing(make(), model, weights).wanted(condition))


def test_a_first_conv_of_folded_pixels_is_refused(target, one_line):
    """As that of tresnet_m, before which four by four pixels become channels."""
    model, weights = target
    with pytest.raises(InputError) as error:
        ChannelUndoing(make(), model, {**weights, 'conv1.0.weight': torch.zeros(16, 48, 3, 3)})
    one_line(error, 'undoing', 'first conv', 'test_resnet')
