import importlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from safetensors import safe_open
from torch.testing import assert_close

from timm_pudnet.config import DamagedFileError, InputConfig, InputError, PudNetError, PudNetWarning
from timm_pudnet.hypernet import PudNet
from timm_pudnet.predict import save_model
from timm_pudnet.training import Augmentation, Data, ImageBank, LossWeights, meta_train, train_plain, try_recipe
from timm_pudnet.training import run as engine

loop = importlib.import_module('timm_pudnet.training.meta_train')  # the package's name for it is the function

TRAINERS = pytest.mark.parametrize('train', [meta_train, train_plain])
# All parts of the state that a run can have.
RECIPES = {
    'adamw': {'schedule': {'whitening': True}},
    'sgd and average': {
        'hypernet': {'generator': 'residual', 'predict_norm': True},
        'schedule': {'optimizer': 'sgd', 'rate': 0.02, 'ema': 0.9},
        'groups': {'conditions': 1.0, 'sketch_groups': 3, 'sketch_images': 2},
    },
}


def log_of(folder):
    return [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]


def run(train, recipe, folder, bank, **kwargs):
    """Tensors of what comes out."""
    banks = bank if isinstance(bank, list) else [bank]
    found = train(recipe, folder, banks=banks, device='cpu', progress=False, **kwargs)
    module, whitening = found if isinstance(found, tuple) else (found, found.whitening)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    return {**state, 'the whitening': whitening.clone()}


def assert_same_run(folder, weights, other_folder, other_weights):
    assert_close(weights, other_weights, rtol=0, atol=0)
    assert (folder / 'log.jsonl').read_text() == (other_folder / 'log.jsonl').read_text()
    tensors, others = (safetensors.torch.load_file(path / engine.CHECKPOINT_NAME) for path in (folder, other_folder))
    assert_close(tensors, others, rtol=0, atol=0)


def mean(entries, name):
    return sum(entry[name] for entry in entries) / len(entries)


# Learning


def test_the_rate_rises_then_falls_to_nearly_zero(make_recipe):
    recipe = make_recipe(schedule={'rate': 1.0, 'warmup': 0.2})
    rates = [engine.rate_at(step, 100, recipe) for step in range(100)]
    assert_close(rates[:20], [(step + 1) / 20 for step in range(20)])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert_close(rates[60], 0.5, rtol=0, atol=1e-6)
    assert 0 < rates[-1] < 0.001


@pytest.fixture
def easy_recipe(make_recipe):
    groups = {'n_way': 4, 'n_shot': 3, 'n_query': 3, 'per_step': 1, 'turns': 1}

    def make(**changes):
        schedule = {'rate': 5e-3, 'whitening': True, **changes.pop('schedule', {})}
        changes = {'augmentation': Augmentation(flip=False, rotation=0), **changes}
        return make_recipe(40, **{**changes, 'schedule': schedule, 'groups': {**groups, **changes.get('groups', {})}})

    return make


@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'hypernet': {'generator': 'residual'}, 'schedule': {'optimizer': 'sgd', 'rate': 0.1, 'sketch_rate': 5e-3}},
        {'hypernet': {'context': False}},
    ],
    ids=['paper', 'residual by sgd', 'no context'],
)
def test_meta_training_learns(changes, easy_recipe, bank, tmp_path):
    hypernet = meta_train(easy_recipe(**changes), tmp_path, banks=[bank], device='cpu', progress=False)
    log = log_of(tmp_path)
    assert [entry['step'] for entry in log] == list(range(1, 41))
    for name in ('metric', 'full'):
        assert mean(log[-8:], name) < 0.7 * mean(log[:8], name), name
    assert not hypernet.training
    assert hypernet.config.class_names == tuple('abcdef')
    with torch.no_grad():
        weights = hypernet(hypernet.sketch(torch.rand(4, 3, 16, 16)))
    assert all(value.isfinite().all() for value in weights.values())
    assert (weights['bn1.running_var'] - 1).abs().max() > 1e-2  # the prior of calibration was gathered
    assert not torch.equal(hypernet.whitening, torch.eye(len(hypernet.whitening)))


@pytest.mark.parametrize('kind', [loop._MetaRun, loop._PlainRun])
def test_the_whitening_is_of_the_spread_within_the_classes_of_groups(kind, easy_recipe, bank):
    run_of = kind(easy_recipe(), [bank], 'cpu')
    scatter, count = 0, 0
    for group, support, query in run_of.tested(40, 'whitening'):
        for name in group.support_classes.unique():
            rows = torch.cat([support[group.support_classes == name], query[group.query_classes == name]]).double()
            scatter, count = scatter + (rows - rows.mean(0)).t() @ (rows - rows.mean(0)), count + len(rows) - 1
    covariance = scatter / count
    values, vectors = torch.linalg.eigh(
        covariance + 0.1 * covariance.trace() / len(covariance) * torch.eye(len(covariance))
    )
    inverse_root = vectors * values.rsqrt() @ vectors.t()
    assert_close(run_of.whitening().double(), inverse_root / values.rsqrt().mean(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ('wanted', 'many', 'whitened'), [(None, 7, True), (None, 6, False), (True, 6, True), (False, 7, False)]
)
def test_features_are_whitened_where_the_seen_classes_are_few(wanted, many, whitened, easy_recipe, bank, monkeypatch):
    monkeypatch.setattr(loop, 'MANY_CLASSES', many)
    found = loop._PlainRun(easy_recipe(schedule={'whitening': wanted}), [bank], 'cpu').whitening()
    assert torch.equal(found, torch.eye(len(found))) != whitened


def test_plain_training_gives_a_feature_model_that_learned(easy_recipe, bank, tmp_path):
    model, whitening = train_plain(easy_recipe(), tmp_path, banks=[bank], device='cpu', progress=False)
    assert whitening.shape == (model.num_features, model.num_features)
    assert not torch.equal(whitening, torch.eye(len(whitening)))
    losses = [entry['full'] for entry in log_of(tmp_path)]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    assert not model.training
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, model.num_features)


@TRAINERS
def test_several_sets_are_trained_on_together(train, make_recipe, bank):
    data = (Data(images='one'), Data(images='two', share=2.0))
    banks = [bank.select(['a', 'b', 'c']), bank.select(['d', 'e', 'f'])]
    recipe = make_recipe(2, data=data, groups={'turns': 2})
    run_of = loop._MetaRun(recipe, banks, 'cpu')
    assert run_of.head.out_features == 12
    assert run_of.hypernet.config.class_names == tuple('abcdef')
    assert run_of.sampler.shares.tolist() == [1, 2]
    assert all(value.isfinite().all() for value in run(train, recipe, None, banks).values())
    with pytest.raises(InputError, match='2 banks'):
        train(make_recipe(2), banks=banks, device='cpu', progress=False)


def test_the_hypernetwork_says_what_its_training_cost(make_recipe, bank):
    recipe = make_recipe()
    training = meta_train(recipe, None, banks=[bank], device='cpu', progress=False, max_steps=2).config.training
    assert training['images'] == 2 * recipe.groups.images_per_step == 48
    assert training['recipe_digest'] == recipe.digest
    assert '1 process' in training['machine']


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_parts(make_recipe, bank, tmp_path, monkeypatch):
    clock = SimpleNamespace(monotonic=itertools.count(step=10).__next__, perf_counter=time.perf_counter)
    monkeypatch.setattr(engine, 'time', clock)

    def seconds(folder, **kwargs):
        net = meta_train(make_recipe(4), folder, banks=[bank], device='cpu', progress=False, **kwargs)
        return net.config.training['seconds']

    straight = seconds(tmp_path / 'straight')
    assert 0 < seconds(tmp_path / 'resumed', max_steps=1) < straight
    assert seconds(tmp_path / 'resumed') == straight


def test_sketches_are_limited_to_those_of_training(make_recipe, bank):
    recipe = make_recipe(3)
    hypernet = meta_train(recipe, banks=[bank], device='cpu', progress=False)
    limit = hypernet.config.sketch_limit
    with torch.no_grad():
        supports = [loop.group_sampler(recipe, [bank]).draw(number, 'sketch').support for number in range(3 * 2)]
        norms = [float(hypernet.encoder(support).mean(0).norm()) for support in supports]
        far = hypernet.encoder(50 * torch.randn(8, 3, 16, 16)).mean(0)
    assert limit == pytest.approx(max(norms), rel=1e-5)
    assert min(norms) < 0.99 * limit
    assert far.norm() > 3 * limit
    with torch.no_grad():
        assert_close(hypernet(far), hypernet(far * limit / far.norm()))
    told = meta_train(make_recipe(1, hypernet={'sketch_limit': 7.5}), banks=[bank], device='cpu', progress=False)
    assert told.config.sketch_limit == 7.5


def test_training_leaves_the_global_random_states_alone(make_recipe, bank):
    recipe = make_recipe(augmentation=Augmentation(timm={'auto_augment': 'rand-m5', 're_prob': 0.3}))

    def states():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before = states()
    first = run(meta_train, recipe, None, bank, max_steps=2)
    assert states() == before
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert_close(run(meta_train, recipe, None, bank, max_steps=2), first, rtol=0, atol=0)


def test_an_ordinary_training_mixes_its_batches_where_the_recipe_says_so(make_recipe, bank, monkeypatch):
    """The loss is the cross-entropy by the classes' shares; another step mixes in another way."""
    recipe = make_recipe(augmentation=Augmentation(mixup={'cutmix_alpha': 1.0}), schedule={'label_smoothing': 0.0})
    loop_run = loop._PlainRun(recipe, [bank], 'cpu')
    sampler = loop.group_sampler(recipe, [bank])
    for number in (0, 5):
        images, shares = loop.mixed(
            *sampler.batch(number, recipe.images_per_step),
            sampler.num_classes,
            {'cutmix_alpha': 1.0},
            sampler.generator('mixup', number),
        )
        assert not torch.equal(shares, shares.round())
        with torch.no_grad():
            wanted = -(loop_run.head(loop_run.features(images)).log_softmax(1) * shares).sum(1).mean()
            assert_close(loop_run.losses(number)[0], wanted)
    monkeypatch.setattr(sampler.__class__, 'images_of', lambda *_: 7)  # mixed in pairs, so six
    sizes = []
    features = loop_run.features
    monkeypatch.setattr(loop_run, 'features', lambda images: sizes.append(len(images)) or features(images))
    loop_run.losses(0)
    assert sizes == [7 * recipe.groups.per_step // 2 * 2]
    monkeypatch.undo()
    images, labels = sampler.batch(0, recipe.images_per_step)
    with torch.no_grad():
        plain = torch.nn.functional.cross_entropy(loop_run.head(loop_run.features(images)), labels)
        assert abs(float(loop_run.losses(0)[0]) - float(plain)) > 1e-3


# The terms of the loss


def tensors_of(run_of):
    return {key: value.detach().clone() for key, value in run_of._tensors().items()}


@pytest.mark.parametrize(
    'weights',
    [
        {},
        {'full': 0.0, 'consistency': 0.0},
        {'consistency': 0.0},
        {'metric': 0.0, 'sketch': 3.0},
        {'metric': 0.0, 'full': 0.0, 'consistency': 0.0},
        {'metric': 2.5, 'full': 0.5, 'sketch': 0.0},
    ],
    ids=str,
)
def test_the_loss_is_the_weighed_sum_and_a_weight_of_zero_leaves_a_term_out(weights, make_recipe, bank, tmp_path):
    weigh = LossWeights(**weights)
    recipe = make_recipe(2, losses=weigh, groups={'sketch_groups': 3, 'sketch_images': 2})
    run_of = loop._MetaRun(recipe, [bank], 'cpu')
    before = tensors_of(run_of)
    loss, terms = run_of.losses(0)
    watched = {'metric', 'full', 'consistency'} | ({'sketch'} if weigh.sketch else set())
    assert set(terms) == watched  # the groups for a sketch loss of weight 0 are not even drawn
    assert_close(loss, sum(getattr(weigh, name) * value for name, value in terms.items()))
    loss.backward()
    reached = {
        name: any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
        for name, module in [
            ('head', run_of.head),
            ('encoder', run_of.hypernet.encoder),
            ('generators', run_of.hypernet.generators),
        ]
    }
    through_target = weigh.metric or weigh.full or weigh.consistency
    assert reached == {
        'head': bool(weigh.full or weigh.consistency),
        'encoder': True,
        'generators': bool(through_target),
    }
    assert (run_of.hypernet.temperature.grad is None) == (not (weigh.metric or weigh.consistency))

    run_of = loop._MetaRun(recipe, [bank], 'cpu')
    list(run_of.steps(2))
    after = tensors_of(run_of)
    changed = {key.split('.')[0] for key in after if key in before and not torch.equal(after[key], before[key])}
    assert ('head' in changed) == reached['head']
    run(meta_train, recipe, tmp_path, bank)
    assert all(set(entry) == {'step', 'rate'} | watched for entry in log_of(tmp_path))


def test_a_zero_weight_equals_a_loss_without_the_term(make_recipe, bank, monkeypatch):
    """Against gradients of the two other terms by hand."""
    recipe = make_recipe(2, losses=LossWeights(consistency=0.0), groups={'per_step': 1})
    run_of = loop._MetaRun(recipe, [bank], 'cpu')
    loss, _ = run_of.losses(0)
    found = torch.autograd.grad(loss, run_of.parameters)
    run_of = loop._MetaRun(recipe, [bank], 'cpu')
    _, terms = run_of.losses(0)
    expected = torch.autograd.grad(terms['metric'] + terms['full'], run_of.parameters)
    assert_close(found, expected)


def test_a_recipe_whose_every_weighed_term_is_missing_is_refused(make_recipe, one_line):
    only = LossWeights(metric=0.0, full=0.0, consistency=0.0)
    with pytest.raises(InputError) as error:
        make_recipe(losses=only)
    one_line(error, 'sketch_groups')
    make_recipe(losses=only, groups={'sketch_groups': 2})


def test_metric_alone_learns(easy_recipe, bank, tmp_path):
    recipe = easy_recipe(losses=LossWeights(full=0.0, consistency=0.0))
    run(meta_train, recipe, tmp_path, bank)
    log = log_of(tmp_path)
    assert mean(log[-8:], 'metric') < 0.8 * mean(log[:8], 'metric')
    assert mean(log[-8:], 'full') > 0.9 * mean(log[:8], 'full')  # watched, not learned: the head is as it was


def test_the_sketch_s_own_loss_teaches_it_to_tell_conditions_apart(easy_recipe, bank, tmp_path):
    # As in photographs, what a condition changes is alike in all classes: the sky above, warm colours.
    size = bank.images.shape[-1]
    falling = torch.linspace(220, 60, size)[:, None] * torch.tensor([1.0, 0.7, 0.4])[:, None, None]
    pictures = (falling + 30 * torch.rand(len(bank.images), 3, 1, size)).round().to(torch.uint8)
    pictures = ImageBank(pictures, bank.labels, bank.class_names)
    groups = {'conditions': 1.0, 'sketch_groups': 6, 'sketch_images': 4}
    log = {}
    for weight in (0.001, 1.0):
        folder = tmp_path / str(weight)
        run(meta_train, easy_recipe(groups=groups, losses=LossWeights(sketch=weight)), folder, pictures)
        log[weight] = mean(log_of(folder)[-10:], 'sketch')
    assert log[1.0] < 0.7 * log[0.001]
    assert log[1.0] < 0.7 * math.log(11)


# Optimisers, average, precision


@pytest.mark.parametrize('generator', ['paper', 'residual'])
def test_sgd_trains_what_ordinary_training_would_and_adamw_the_rest(generator, make_recipe, bank):
    schedule = {'optimizer': 'sgd', 'rate': 0.1, 'sketch_rate': 2e-3, 'weight_decay': 0.01, 'warmup': 0.0}
    recipe = make_recipe(4, hypernet={'generator': generator, 'predict_norm': True}, schedule=schedule)
    run_of = loop._MetaRun(recipe, [bank], 'cpu')
    names = {id(p): f'{m}.{key}' for m, module in run_of.modules.items() for key, p in module.named_parameters()}
    sgd, adamw = run_of.optimizers
    assert (type(sgd).__name__, type(adamw).__name__) == ('SGD', 'AdamW')
    groups = [[names[id(p)] for p in group['params']] for group in [*sgd.param_groups, *adamw.param_groups]]
    flat = [name for group in groups for name in group]
    trained = {names[id(p)] for p in run_of.parameters}
    assert sorted(flat) == sorted(trained)  # each once
    assert not any(name.startswith('target.') for name in trained)
    by_sgd = set(groups[0] + groups[1])
    assert {'head.weight', 'head.bias'} <= by_sgd
    kernels = {f'hypernet.generators.{k}.base' for k, layer in enumerate(run_of.hypernet.target.layers)}
    assert (kernels <= by_sgd) == (generator == 'residual')
    assert not any('encoder' in name or 'ahru' in name or name.endswith('temperature') for name in by_sgd)
    assert [group['weight_decay'] for group in sgd.param_groups] == [0.01, 0.0]
    assert all(p.ndim > 1 for p in sgd.param_groups[0]['params'])
    assert all(p.ndim <= 1 for p in sgd.param_groups[1]['params'])
    assert all(group['nesterov'] and group['momentum'] == 0.9 for group in sgd.param_groups)
    list(run_of.steps(3))
    share = engine.rate_at(2, 4, recipe)
    assert [o.param_groups[0]['lr'] for o in run_of.optimizers] == pytest.approx([0.1 * share, 2e-3 * share])
    assert run_of.log[-1]['rate'] == pytest.approx(0.1 * share)

    (plain,) = loop._PlainRun(recipe, [bank], 'cpu').optimizers
    assert type(plain).__name__ == 'SGD'


def test_the_gradient_is_clipped(make_recipe, bank):
    schedule = {'optimizer': 'sgd', 'clip': 1e-6, 'weight_decay': 0.0}
    run_of = loop._PlainRun(make_recipe(2, schedule=schedule), [bank], 'cpu')
    before = [p.detach().clone() for p in run_of.parameters]
    list(run_of.steps(1))
    moved = torch.stack([(p - b).norm() for p, b in zip(run_of.parameters, before, strict=True)]).norm()
    assert 0 < moved < 1e-5


def test_large_gradients_of_what_is_steered_do_not_slow_down_the_rest(make_recipe, bank):
    moved = []
    for factor in (1.0, 1e6):
        schedule = {'optimizer': 'sgd', 'rate': 0.1, 'clip': 1.0}
        run_of = loop._MetaRun(make_recipe(2, hypernet={'generator': 'residual'}, schedule=schedule), [bank], 'cpu')
        for group in run_of.optimizers[1].param_groups:
            for value in group['params']:
                value.register_hook(lambda gradient, factor=factor: gradient * factor)
        list(run_of.steps(1))
        moved.append([p.detach().clone() for group in run_of.optimizers[0].param_groups for p in group['params']])
    assert_close(*moved)


@pytest.mark.parametrize('decay', [0.5, 0.9])
@pytest.mark.parametrize('kind', [loop._MetaRun, loop._PlainRun])
def test_the_average_is_that_of_hand(kind, decay, make_recipe, bank):
    """Of ModelEmaV3: it starts as the weights after the first step, and its decay rises; integers are the last ones."""
    recipe = make_recipe(5, schedule={'ema': decay})
    run_of, average = kind(recipe, [bank], 'cpu'), None
    for step, _ in enumerate(run_of.steps(5)):
        least = min(decay, 1 - 1 / (1 + step))
        states = {name: module.state_dict() for name, module in run_of.modules.items()}
        state = {f'{name}.{key}': v.clone() for name, values in states.items() for key, v in values.items()}
        if average is None:
            average = {key: value.double() for key, value in state.items()}
        else:
            average = {key: least * average[key] + (1 - least) * value.double() for key, value in state.items()}
    average = {key: average[key].float() if value.is_floating_point() else value for key, value in state.items()}
    run_of.settle()
    states = {name: module.state_dict() for name, module in run_of.modules.items()}
    found = {f'{name}.{key}': v for name, values in states.items() for key, v in values.items()}
    assert_close(found, average, rtol=1e-5, atol=1e-6)
    assert not all(torch.equal(found[key], state[key]) for key in state)
    if kind is loop._MetaRun:
        hypernet = run_of.finished()
        for name, value in hypernet.named_parameters():
            assert_close(value.detach(), average[f'hypernet.{name}'], rtol=1e-5, atol=1e-6)
        for key in hypernet.target.keys('calibrated'):
            assert_close(hypernet.statistics(key), average[f'target.{key}'], rtol=1e-5, atol=1e-6)


def test_the_average_changes_nothing_of_the_training_itself(make_recipe, bank, tmp_path):
    for ema in (0.0, 0.9):
        run(meta_train, make_recipe(3, schedule={'ema': ema}), tmp_path / str(ema), bank)
    assert log_of(tmp_path / '0.0') == log_of(tmp_path / '0.9')


# 32 pixels, for `strided_on_one_pixel`.
LARGER = {'input': InputConfig(input_size=(3, 32, 32))}


@pytest.fixture(scope='module')
def larger(bank):
    return ImageBank(bank.images.repeat_interleave(2, 2).repeat_interleave(2, 3), bank.labels, bank.class_names)


@TRAINERS
def test_bfloat16_is_nearly_float32(train, make_recipe, larger, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, 'bfloat16_slowdown', lambda device: 0.5)  # used, however slow it is here
    for precision in ('float32', 'bfloat16'):
        groups = {'sketch_groups': 2, 'sketch_images': 4}
        recipe = make_recipe(2, hypernet=LARGER, schedule={'precision': precision}, groups=groups)
        weights = run(train, recipe, tmp_path / precision, larger)
        assert all(value.dtype == torch.float32 for value in weights.values() if value.is_floating_point())
    whole, half = (log_of(tmp_path / precision) for precision in ('float32', 'bfloat16'))
    for first, second in zip(whole, half, strict=True):
        assert first != second
        for name in first:
            assert abs(first[name] - second[name]) < 0.3 * abs(first[name]), name


@pytest.mark.parametrize(('slowdown', 'told'), [(9.8, 'a conv takes 9.8 times'), (math.inf, 'cpu does not compute')])
@TRAINERS
def test_without_bfloat16_arithmetic_training_is_in_float32_and_says_so(
    train, slowdown, told, make_recipe, bank, tmp_path, monkeypatch
):
    monkeypatch.setattr(engine, 'bfloat16_slowdown', lambda device: slowdown)
    whole = run(train, make_recipe(2), tmp_path / 'float32', bank)
    with pytest.warns(PudNetWarning, match=told) as caught:
        half = run(train, make_recipe(2, schedule={'precision': 'bfloat16'}), tmp_path / 'bfloat16', bank)
    assert all('inf times' not in str(one.message) for one in caught)
    assert_close(half, whole, rtol=0, atol=0)


@TRAINERS
def test_small_images_are_trained_on_in_float32_where_bfloat16_gradients_are_wrong(
    train, make_recipe, bank, tmp_path, monkeypatch
):
    monkeypatch.setattr(engine, 'bfloat16_slowdown', lambda device: 0.5)
    whole = run(train, make_recipe(2), tmp_path / 'float32', bank)
    before = torch.get_rng_state()
    with pytest.warns(PudNetWarning, match=r'layer4\.0\.conv1 is wrong, .*: training in float32'):
        half = run(train, make_recipe(2, schedule={'precision': 'bfloat16'}), tmp_path / 'bfloat16', bank)
    assert_close(half, whole, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert engine.strided_on_one_pixel(make_recipe(hypernet=LARGER).hypernet) == ''


def test_a_run_goes_on_in_the_precision_that_it_was_begun_in(make_recipe, larger, tmp_path, monkeypatch):
    straight = run(meta_train, make_recipe(3, hypernet=LARGER), None, larger)
    recipe = make_recipe(3, hypernet=LARGER, schedule={'precision': 'bfloat16'})
    monkeypatch.setattr(engine, 'bfloat16_slowdown', lambda device: 9.0)
    with pytest.warns(PudNetWarning, match='float32'):
        run(meta_train, recipe, tmp_path, larger, max_steps=1)
    monkeypatch.setattr(engine, 'bfloat16_slowdown', lambda device: 0.5)
    assert_close(run(meta_train, recipe, tmp_path, larger), straight, rtol=0, atol=0)


def test_a_busy_moment_does_not_change_the_precision_of_a_run(make_recipe, larger, tmp_path, monkeypatch):
    recipe = make_recipe(3, hypernet=LARGER, schedule={'precision': 'bfloat16'})
    monkeypatch.setattr(engine, 'bfloat16_slowdown', lambda device: 1.0)
    straight = run(meta_train, recipe, None, larger)
    run(meta_train, recipe, tmp_path, larger, max_steps=1)
    monkeypatch.setattr(engine, 'bfloat16_slowdown', lambda device: 1.6)
    assert_close(run(meta_train, recipe, tmp_path, larger), straight, rtol=0, atol=0)  # and no word of float32


@pytest.mark.parametrize(('slowdown', 'told'), [(9.0, 'a conv takes 9.0 times'), (0.5, 'layer4.0.conv1 is wrong')])
def test_where_bfloat16_is_out_of_the_question_a_run_does_not_go_on_in_it(
    slowdown, told, make_recipe, bank, tmp_path, monkeypatch
):
    """As one that was begun on a GPU: float32 it is then, as the warning says."""
    recipe = make_recipe(3, schedule={'precision': 'bfloat16'})
    monkeypatch.setattr(engine, 'bfloat16_slowdown', lambda device: slowdown)
    begun = loop._MetaRun(recipe, [bank], 'cpu')
    begun.precision = 'bfloat16'
    begun.save(tmp_path / engine.CHECKPOINT_NAME)
    with pytest.warns(PudNetWarning, match=f'{told}.*: training in float32') as caught:
        net = meta_train(recipe, tmp_path, banks=[bank], device='cpu', progress=False)
    assert len(caught) == 1
    assert net.config.training['machine'].endswith('float32')


def test_a_folder_belongs_to_one_training_at_a_time(make_recipe, bank, tmp_path):
    run(meta_train, make_recipe(2), tmp_path, bank, max_steps=1)
    (tmp_path / '.checkpoint.safetensors.abc').write_text('being written')
    with engine._held(tmp_path), pytest.raises(InputError, match='another training is at work there'):
        run(meta_train, make_recipe(2), tmp_path, bank)
    assert (tmp_path / '.checkpoint.safetensors.abc').exists()
    run(meta_train, make_recipe(2), tmp_path, bank)
    assert not (tmp_path / '.checkpoint.safetensors.abc').exists()


def test_the_control_sees_as_many_images_as_the_groups_hold(make_recipe, bank, monkeypatch):
    """Of fewer classes than n_way, which do not divide it, a group is smaller."""
    recipe = make_recipe(2, groups={'n_way': 7, 'n_shot': 2, 'n_query': 1, 'turns': 1, 'per_step': 2})
    sampler, seen = loop.group_sampler(recipe, [bank]), []
    assert sampler.images_of(0) == 18  # where 7 classes would have 21
    original = loop.GroupSampler.batch
    monkeypatch.setattr(
        loop.GroupSampler, 'batch', lambda self, number, size: (seen.append(size), original(self, number, size))[1]
    )
    train_plain(recipe, None, banks=[bank], device='cpu', progress=False)
    assert seen == [36, 36]


@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
def test_the_cost_of_training_names_its_precision(precision, make_recipe, larger, monkeypatch, recwarn):
    monkeypatch.setattr(engine, 'bfloat16_slowdown', lambda device: 1.0)
    recipe = make_recipe(hypernet=LARGER, schedule={'precision': precision})
    net = meta_train(recipe, None, banks=[larger], device='cpu', progress=False, max_steps=1)
    assert net.config.training['machine'].endswith(f'1 process, {precision}')
    assert not [one for one in recwarn if issubclass(one.category, PudNetWarning)]


def test_the_slowdown_by_bfloat16_is_measured_without_touching_random_numbers(monkeypatch):
    lasts = [7.0, 1.0, 1.5, 1.2, 9.0, 4.0, 3.0, 3.5]  # in float32, then in bfloat16; the first of each prepares
    ticks = itertools.accumulate(part for last in lasts for part in (0.0, last))
    monkeypatch.setattr(engine, 'time', SimpleNamespace(perf_counter=ticks.__next__))
    before = torch.random.get_rng_state()
    assert engine.bfloat16_slowdown.__wrapped__(torch.device('cpu')) == 3.0
    assert torch.equal(torch.random.get_rng_state(), before)


# Variants of the hypernetwork


@pytest.mark.parametrize(
    'changes', [{'context': False}, {'eta': 0.0}, {'eta': 1.0}, {'generator': 'residual'}], ids=str
)
def test_variants_train_and_survive_their_files(changes, make_recipe, bank, tmp_path):
    recipe = make_recipe(2, hypernet=changes)
    hypernet = meta_train(recipe, None, banks=[bank], device='cpu', progress=False)
    loaded = PudNet.from_pretrained(hypernet.save_pretrained(tmp_path / 'net'))
    name, value = next(iter(changes.items()))
    assert getattr(loaded.config, name) == value
    sketch = torch.rand(16)
    with torch.no_grad():
        assert_close(loaded(sketch), hypernet(sketch), rtol=0, atol=0)
    has_ahru = any(key.startswith('ahru.') for key in loaded.state_dict())
    assert has_ahru == (name != 'context')


# Resuming


@TRAINERS
@pytest.mark.parametrize('case', RECIPES)
def test_a_resumed_run_ends_as_if_it_had_never_stopped(case, train, make_recipe, bank, tmp_path):
    recipe = make_recipe(**RECIPES[case])
    straight = run(train, recipe, tmp_path / 'straight', bank)
    run(train, recipe, tmp_path / 'resumed', bank, max_steps=3)
    assert len(log_of(tmp_path / 'resumed')) == 3
    torch.manual_seed(99)  # another process has another global state
    resumed = run(train, recipe, tmp_path / 'resumed', bank)
    assert len(log_of(tmp_path / 'resumed')) == 6
    assert_same_run(tmp_path / 'straight', straight, tmp_path / 'resumed', resumed)
    if case == 'adamw':
        again = run(train, recipe, tmp_path / 'resumed', bank)  # nothing is left to do
        assert_same_run(tmp_path / 'straight', straight, tmp_path / 'resumed', again)
        other = run(train, make_recipe(seed=1), None, bank)
        assert any(not torch.equal(other[key], straight[key]) for key in straight)


@pytest.fixture
def ctrl_c():
    """Python's own handling of Ctrl-C, which a shell takes from what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures('ctrl_c')
def test_ctrl_c_waits_for_the_step_and_leaves_a_checkpoint(make_recipe, bank, tmp_path, monkeypatch):
    recipe = make_recipe(6)
    straight = run(meta_train, recipe, tmp_path / 'straight', bank)
    steps = engine.Run.steps

    def interrupted(self, last):
        for number, losses in enumerate(steps(self, last), 1):
            if number == 3:
                signal.raise_signal(signal.SIGINT)
            yield losses

    with monkeypatch.context() as patched:
        patched.setattr(engine.Run, 'steps', interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(meta_train, recipe, tmp_path / 'resumed', bank)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(log_of(tmp_path / 'resumed')) == 3
    resumed = run(meta_train, recipe, tmp_path / 'resumed', bank)
    assert_same_run(tmp_path / 'straight', straight, tmp_path / 'resumed', resumed)


@pytest.mark.usefixtures('ctrl_c')
def test_a_second_ctrl_c_does_not_wait(make_recipe, bank, tmp_path, monkeypatch):
    losses = loop._MetaRun.losses
    asked = []

    def interrupted(self, number):
        asked.append(number)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return losses(self, number)

    monkeypatch.setattr(loop._MetaRun, 'losses', interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(meta_train, make_recipe(6), tmp_path / 'run', bank)
    assert len(asked) == 1
    assert not (tmp_path / 'run' / engine.CHECKPOINT_NAME).exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_of_a_target_with_dropout_resumes_too(make_recipe, bank, tmp_path):
    recipe = make_recipe(3, hypernet={'model_kwargs': {'drop_rate': 0.3}})
    straight = run(meta_train, recipe, tmp_path / 'straight', bank)
    torch.manual_seed(5)
    run(meta_train, recipe, tmp_path / 'resumed', bank, max_steps=2)
    torch.manual_seed(7)
    resumed = run(meta_train, recipe, tmp_path / 'resumed', bank)
    assert_same_run(tmp_path / 'straight', straight, tmp_path / 'resumed', resumed)


# Starts a training again and again and kills it, a moment after some step, until one comes to its end.
KILLER = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import safetensors.torch
from timm_pudnet.training import ImageBank, Recipe, meta_train

root = sys.argv[1]
tensors = safetensors.torch.load_file(root + '/bank.safetensors')
bank = ImageBank(tensors['images'], tensors['labels'], list('abcdef'))
chance = random.Random(0)
for name, recipe in json.load(open(root + '/recipes.json')).items():
    kills, folder = 0, f'{root}/{name}'
    checkpoint = folder + '/checkpoint.safetensors'
    while True:
        before = os.stat(checkpoint).st_mtime_ns if os.path.exists(checkpoint) else 0
        child = os.fork()
        if child == 0:
            hypernet = meta_train(
                Recipe.from_dict(recipe), folder, banks=[bank], device='cpu', progress=False, checkpoint_seconds=0
            )
            hypernet.save_pretrained(folder + '/out')
            os._exit(0)
        gone, status = 0, 0
        while not gone:  # a step more, then some moment of the next ones
            gone, status = os.waitpid(child, os.WNOHANG)
            if os.path.exists(checkpoint) and os.stat(checkpoint).st_mtime_ns != before:
                break
            time.sleep(0.001)
        if not gone and kills < 6:
            time.sleep(chance.uniform(0, 0.12))
            os.kill(child, signal.SIGKILL)
        if not gone:
            _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            break
        kills += 1
    print(name, kills, os.waitstatus_to_exitcode(status))
"""


def test_a_run_killed_at_any_moment_ends_as_if_it_had_never_been(make_recipe, bank, tmp_path, fresh_process):
    recipes = {case: make_recipe(10, **changes) for case, changes in RECIPES.items()}
    safetensors.torch.save_file({'images': bank.images, 'labels': bank.labels}, tmp_path / 'bank.safetensors')
    (tmp_path / 'recipes.json').write_text(json.dumps({case: recipe.to_dict() for case, recipe in recipes.items()}))
    code, printed, errors = fresh_process('-c', KILLER, tmp_path)
    assert code == 0, errors
    for line, (case, recipe) in zip(printed.splitlines(), recipes.items(), strict=True):
        assert line.startswith(case)
        kills, status = map(int, line.split()[-2:])
        assert kills >= 3
        assert status == 0
        straight = run(meta_train, recipe, tmp_path / 'straight' / case, bank)
        straight.pop('the whitening')
        killed = PudNet.from_pretrained(tmp_path / case / 'out').state_dict()
        assert_same_run(tmp_path / 'straight' / case, straight, tmp_path / case, dict(killed))
        left = {path.name for path in (tmp_path / case).iterdir()}
        assert left == {'checkpoint.safetensors', 'log.jsonl', 'losses.png', 'board', 'out'}


@pytest.mark.parametrize('rename', range(1, 6))
def test_a_run_stopped_at_any_rename_of_a_file_ends_as_if_it_had_not(rename, make_recipe, bank, tmp_path, monkeypatch):
    recipe = make_recipe(2)
    straight = run(meta_train, recipe, tmp_path / 'straight', bank)
    replace, calls = os.replace, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == rename:
            raise KeyboardInterrupt
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', stopped)
        with pytest.raises(KeyboardInterrupt):
            run(meta_train, recipe, tmp_path / 'stopped', bank, checkpoint_seconds=0)
    again = run(meta_train, recipe, tmp_path / 'stopped', bank)
    assert_same_run(tmp_path / 'straight', straight, tmp_path / 'stopped', again)
    assert (tmp_path / 'stopped' / engine.PLOT_NAME).is_file()


def test_a_checkpoint_is_written_at_its_times_and_at_the_end(make_recipe, bank, tmp_path, monkeypatch):
    saved, save = [], engine.Run.save
    monkeypatch.setattr(engine.Run, 'save', lambda self, path: (saved.append(self.step), save(self, path)))
    run(meta_train, make_recipe(3), tmp_path / 'seldom', bank, checkpoint_seconds=1000)
    run(meta_train, make_recipe(3), tmp_path / 'often', bank, checkpoint_seconds=0)
    assert saved == [3, 1, 2, 3]


def test_a_long_log_goes_through_a_checkpoint_whole(make_recipe, bank, tmp_path):
    """Not among the metadata: safetensors takes 100 MB of it, and no more."""
    one, other = (loop._PlainRun(make_recipe(), [bank], 'cpu') for _ in range(2))
    one.log = [{'step': step, 'full': step / 7} for step in range(2000)]
    one.save(tmp_path / 'checkpoint.safetensors')
    with safe_open(tmp_path / 'checkpoint.safetensors', 'pt') as file:
        assert len(str(file.metadata())) < 500
    other.load(tmp_path / 'checkpoint.safetensors')
    assert other.log == one.log


def test_a_checkpoint_of_another_recipe_or_kind_is_refused(make_recipe, bank, tmp_path, one_line):
    run(meta_train, make_recipe(), tmp_path, bank, max_steps=1)
    others = [
        (meta_train, make_recipe(seed=1)),
        (meta_train, make_recipe(losses=LossWeights(full=0.0))),
        (meta_train, make_recipe(schedule={'ema': 0.9})),
        (train_plain, make_recipe()),
    ]
    for train, recipe in others:
        with pytest.raises(InputError) as error:
            run(train, recipe, tmp_path, bank)
        one_line(error, tmp_path / engine.CHECKPOINT_NAME, 'another recipe')


def test_a_checkpoint_of_other_images_or_another_start_is_refused(make_recipe, bank, tmp_path, one_line):
    model = timm.create_model('test_resnet', num_classes=0)
    started = make_recipe(start=str(save_model(model, tmp_path / 'start')), hypernet={'generator': 'residual'})
    run(meta_train, started, tmp_path / 'run', bank, max_steps=1)
    run(meta_train, started, tmp_path / 'run', bank, max_steps=2)
    other = ImageBank(bank.images.clone(), bank.labels, bank.class_names)
    other.images[0, 0, 0, 0] ^= 1
    for images in (other, ImageBank(bank.images, bank.labels, [f'{name}s' for name in bank.class_names])):
        with pytest.raises(InputError) as error:
            run(meta_train, started, tmp_path / 'run', images)
        one_line(error, tmp_path / 'run' / engine.CHECKPOINT_NAME, 'other images, or from another start')
    with torch.no_grad():
        model.conv1[0].weight.add_(1)
    shutil.rmtree(tmp_path / 'start')
    save_model(model, tmp_path / 'start')
    with pytest.raises(InputError, match='another start'):
        run(meta_train, started, tmp_path / 'run', bank)


def test_the_cost_counts_the_images_that_were_shown(make_recipe, bank):
    """Of a set with fewer classes than a group has by the recipe; and those that the sketch encoder alone saw."""
    groups = {'n_way': 8, 'n_shot': 1, 'n_query': 1, 'turns': 1, 'per_step': 1, 'sketch_groups': 2, 'sketch_images': 3}
    recipe = make_recipe(2, groups=groups, losses=LossWeights(sketch=0.1))
    sampler = loop.group_sampler(recipe, [bank])
    shown = [len(sampler.draw(number).support) + len(sampler.draw(number).query) for number in range(2)]
    cost = meta_train(recipe, banks=[bank], device='cpu', progress=False).config.training
    assert (cost['images'], cost['sketch_images']) == (sum(shown), 2 * sampler.draw_halves(0).flatten(0, 2).shape[0])
    assert cost['images'] != 2 * recipe.images_per_step


def test_a_control_says_what_its_training_cost(make_recipe, bank, tmp_path):
    groups = {'n_way': 8, 'n_shot': 1, 'n_query': 1, 'turns': 1, 'per_step': 2}  # the bank has six classes
    recipe = make_recipe(2, groups=groups)
    train_plain(recipe, banks=[bank], device='cpu', progress=False, result=tmp_path / 'plain')
    cost = loop.cost_of(tmp_path / 'plain')
    assert (cost['images'], cost['recipe_digest']) == (2 * 24, recipe.digest)
    assert loop.seen_by(str(tmp_path / 'plain')) == bank.class_names


def test_a_short_try_counts_the_images_that_were_shown(make_recipe, bank):
    groups = {'n_way': 8, 'n_shot': 1, 'n_query': 1, 'turns': 1, 'per_step': 2}  # the bank has six classes
    found = try_recipe(make_recipe(4, groups=groups), banks=[bank], device='cpu', seconds=1, progress=False)
    assert found['images'] == 4 * 24
    assert found['images_per_second'] * found['whole_seconds'] == pytest.approx(4 * 24)
    assert sum(found['gains']) / len(found['gains']) == pytest.approx(found['after'] - found['before'])


@pytest.mark.parametrize('keep', [0.0, 0.5, 0.999])
def test_a_truncated_checkpoint_is_refused_in_one_line(keep, make_recipe, bank, tmp_path, one_line):
    run(meta_train, make_recipe(), tmp_path, bank, max_steps=1)
    path = tmp_path / engine.CHECKPOINT_NAME
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(DamagedFileError) as error:
        run(meta_train, make_recipe(), tmp_path, bank)
    one_line(error, path, 'damaged')


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')  # TensorBoard's writer fails too
def test_a_full_disk_leaves_the_earlier_checkpoint(make_recipe, bank, tmp_path, full_disk):
    """For native code too: no file can grow past 8 kB."""
    run(meta_train, make_recipe(), tmp_path, bank, max_steps=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with full_disk(), pytest.raises(OSError, match='large'):
        run(meta_train, make_recipe(), tmp_path, bank, max_steps=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    run(meta_train, make_recipe(), tmp_path, bank, max_steps=2)
    assert len(log_of(tmp_path)) == 2


def test_a_disk_without_room_for_the_checkpoints_is_told_before_the_work(make_recipe, bank, tmp_path, monkeypatch):
    recipe = make_recipe(2, **RECIPES['sgd and average'])
    run(meta_train, recipe, tmp_path / 'first', bank, max_steps=1)
    size = (tmp_path / 'first' / engine.CHECKPOINT_NAME).stat().st_size

    def with_free(free):
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(engine.shutil, 'disk_usage', lambda path: usage._replace(free=free))

    monkeypatch.setattr(engine.Run, 'steps', None)  # no step is begun
    with_free(int(1.9 * size))
    with pytest.raises(InputError, match='make room') as error:
        run(meta_train, recipe, tmp_path / 'other' / 'run', bank)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'other').exists()
    with_free(int(0.9 * size))  # the earlier one has its place already
    with pytest.raises(InputError, match='make room'):
        run(meta_train, recipe, tmp_path / 'first', bank)
    monkeypatch.undo()
    with_free(int(1.1 * size))
    run(meta_train, recipe, tmp_path / 'first', bank)
    with_free(int(2.1 * size))
    run(meta_train, recipe, tmp_path / 'other' / 'run', bank)


# Steps that are not finite


def break_losses(monkeypatch, steps, how, per_step=2):
    """Makes the loss, or only its gradient, not finite in these steps (counted from 0)."""
    losses, calls = loop.group_losses, []

    def broken(*args, **kwargs):
        found = losses(*args, **kwargs)
        calls.append(1)
        if (len(calls) - 1) // per_step not in steps:
            return found
        metric = found['metric']
        bad = metric * math.nan if how == 'loss' else metric + (metric * 0).sqrt()  # slope 0 * inf
        return {**found, 'metric': bad}

    monkeypatch.setattr(loop, 'group_losses', broken)


def test_a_term_that_is_only_watched_stops_nothing(make_recipe, bank, monkeypatch):
    losses = loop.group_losses

    def infinite(*args, **kwargs):
        found = losses(*args, **kwargs)
        return {**found, 'consistency': found['consistency'] * math.inf}

    monkeypatch.setattr(loop, 'group_losses', infinite)
    run_of = loop._MetaRun(make_recipe(3, losses=LossWeights(consistency=0.0)), [bank], 'cpu')
    before = tensors_of(run_of)
    list(run_of.steps(3))
    assert not any('skipped' in entry for entry in run_of.log)
    assert not all(torch.equal(value, before[key]) for key, value in tensors_of(run_of).items() if key in before)


BROKEN = pytest.mark.parametrize('how', ['loss', 'gradient'])


@BROKEN
@pytest.mark.parametrize('case', RECIPES)
def test_a_step_that_is_not_finite_changes_nothing(case, how, make_recipe, bank, monkeypatch):
    recipe = make_recipe(5, **RECIPES[case])
    run_of = loop._MetaRun(recipe, [bank], 'cpu')
    list(run_of.steps(2))
    before = tensors_of(run_of)
    break_losses(monkeypatch, [0], how)
    with pytest.warns(PudNetWarning, match=r'step 2: .* skipped') as caught:
        list(run_of.steps(3))
    assert len(caught) == 1
    after = tensors_of(run_of)
    for tensors in (before, after):  # the average goes on towards the weights
        [tensors.pop(key) for key in list(tensors) if key.startswith('average.')]
    assert_close(after, before, rtol=0, atol=0)
    assert run_of.step == 3
    assert set(run_of.log[-1]) == {'step', 'rate', 'skipped'}
    list(run_of.steps(4))
    last = tensors_of(run_of)
    assert any(not torch.equal(last[key], before[key]) for key in before)
    assert 'skipped' not in run_of.log[-1]
    assert all(value.isfinite().all() for value in last.values() if value.is_floating_point())


@BROKEN
def test_a_skipped_step_stands_in_the_log_and_in_the_warnings(how, make_recipe, bank, tmp_path, monkeypatch):
    break_losses(monkeypatch, [1, 2], how)
    with pytest.warns(PudNetWarning, match='skipped') as caught:
        weights = run(meta_train, make_recipe(4), tmp_path, bank)
    assert len(caught) == 2
    assert [entry.get('skipped') for entry in log_of(tmp_path)] == [None, 1.0, 1.0, None]
    assert all(value.isfinite().all() for value in weights.values())
    with Image.open(tmp_path / engine.PLOT_NAME) as image:
        assert image.format == 'PNG'


def test_images_of_skipped_steps_are_not_counted(make_recipe, bank, tmp_path, monkeypatch):
    groups = {'sketch_groups': 2, 'sketch_images': 3}
    recipe = make_recipe(4, groups=groups)
    break_losses(monkeypatch, [1, 2], 'loss')
    with pytest.warns(PudNetWarning, match='skipped'):
        run(meta_train, recipe, tmp_path, bank, max_steps=2)
    with pytest.warns(PudNetWarning, match='skipped'):
        cost = meta_train(recipe, tmp_path, banks=[bank], device='cpu', progress=False).config.training
    assert (cost['images'], cost['sketch_images']) == (2 * recipe.images_per_step, 2 * 2 * 2 * 2 * 3)


def test_a_run_of_nothing_but_skipped_steps_is_an_error(make_recipe, bank, tmp_path, monkeypatch):
    break_losses(monkeypatch, range(3), 'loss')
    with pytest.warns(PudNetWarning, match='skipped'), pytest.raises(FloatingPointError, match='every step was'):
        run(meta_train, make_recipe(3), tmp_path, bank)
    with pytest.raises(FloatingPointError, match='every step was skipped'):  # nor is it a result the next time
        run(meta_train, make_recipe(3), tmp_path, bank)
    assert [entry['skipped'] for entry in log_of(tmp_path)] == [1.0] * 3


@BROKEN
def test_ten_such_steps_in_a_row_stop_the_run_and_nothing_of_them_is_saved(
    how, make_recipe, bank, tmp_path, monkeypatch
):
    recipe = make_recipe(30)
    run(meta_train, recipe, tmp_path, bank, max_steps=2)
    before = safetensors.torch.load_file(tmp_path / engine.CHECKPOINT_NAME)
    break_losses(monkeypatch, range(1000), how)
    with pytest.warns(PudNetWarning, match='skipped') as caught:
        with pytest.raises(FloatingPointError, match=r'step 11: .*10 such steps'):
            run(meta_train, recipe, tmp_path, bank, checkpoint_seconds=0)
    assert len(caught) == 9
    after = safetensors.torch.load_file(tmp_path / engine.CHECKPOINT_NAME)
    del after['log'], before['log']  # it tells of the steps that were left out
    assert_close(after, before, rtol=0, atol=0)


def test_nine_in_a_row_are_forgiven_and_the_count_survives_a_stop(make_recipe, bank, tmp_path, monkeypatch):
    recipe = make_recipe(30, groups={'per_step': 1})
    break_losses(monkeypatch, [*range(1, 10), *range(11, 16)], 'loss', per_step=1)
    with pytest.warns(PudNetWarning, match='skipped') as caught:
        run(meta_train, recipe, tmp_path, bank, max_steps=16)
    assert len(caught) == 14
    break_losses(monkeypatch, range(1000), 'loss', per_step=1)
    with pytest.warns(PudNetWarning, match='skipped') as caught, pytest.raises(FloatingPointError, match='step 20'):
        run(meta_train, recipe, tmp_path, bank)
    assert len(caught) == 4  # after the 5 before the stop


# What the folder holds


def test_log_events_and_figure_tell_the_same_run(make_recipe, bank, tmp_path):
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    recipe = make_recipe(5, groups={'sketch_groups': 2, 'sketch_images': 2})
    run(meta_train, recipe, tmp_path, bank, max_steps=3)
    assert not (tmp_path / engine.PLOT_NAME).exists()  # it is drawn at the end
    run(meta_train, recipe, tmp_path, bank)
    log = log_of(tmp_path)
    terms = ['metric', 'full', 'consistency', 'sketch']
    assert [list(entry) for entry in log] == [['step', 'rate', *terms]] * 5
    assert [entry['rate'] for entry in log] == pytest.approx([2e-3 * engine.rate_at(k, 5, recipe) for k in range(5)])
    events = accumulator.EventAccumulator(str(tmp_path / 'board')).Reload()
    assert sorted(events.Tags()['scalars']) == sorted(f'loss/{name}' for name in terms)
    for name in terms:
        found = events.Scalars(f'loss/{name}')
        assert [event.step for event in found] == [1, 2, 3, 4, 5]
        assert [event.value for event in found] == pytest.approx([entry[name] for entry in log], rel=1e-5)
    with Image.open(tmp_path / engine.PLOT_NAME) as image:
        assert image.format == 'PNG'
    assert {path.name for path in tmp_path.iterdir()} == {
        engine.CHECKPOINT_NAME,
        engine.LOG_NAME,
        engine.PLOT_NAME,
        'board',
    }


def test_without_a_folder_nothing_is_written(make_recipe, bank, tmp_path, monkeypatch, nothing_written):
    monkeypatch.chdir(tmp_path)
    with nothing_written(tmp_path):
        run(meta_train, make_recipe(2), None, bank)


def test_the_last_step_of_a_run_is_no_less_than_its_images(make_recipe, bank, tmp_path):
    recipe = make_recipe(schedule={'images': 49})  # 24 a step
    assert loop._MetaRun(recipe, [bank], 'cpu').num_steps == 3


def test_what_a_target_draws_in_training_differs_by_group(bank, make_recipe, monkeypatch):
    room, drawn = importlib.import_module('timm_pudnet.training.meta_train'), []
    losses = room._MetaRun.losses

    def recording(self, number):
        drawn.append(float(torch.rand(())))
        return losses(self, number)

    monkeypatch.setattr(room._MetaRun, 'losses', recording)
    meta_train(make_recipe(steps=2), banks=[bank], progress=False)
    assert len(set(drawn)) == len(drawn) == 4


def test_groups_of_a_step_are_counted_each_by_its_own_size(bank, make_recipe):
    room = importlib.import_module('timm_pudnet.training.meta_train')
    recipe = make_recipe(groups={'turns': 1}, data=(Data(images='many'), Data(images='two')))
    run = room._MetaRun(recipe, [bank, bank.select(bank.class_names[:2])], 'cpu')
    run.step = 6
    drawn = [len(torch.cat([group.support, group.query])) for group in map(run.sampler.draw, range(12))]
    assert {*drawn} == {8, 12}, 'or this shows nothing'
    assert run.shown() == sum(drawn)


def no_images(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('images were read first')

    monkeypatch.setattr(importlib.import_module('timm_pudnet.training.meta_train'), 'load_banks', refuse)


def test_a_control_that_no_file_could_hold_is_refused_before_the_images_are_read(
    make_recipe, tmp_path, monkeypatch, one_line, nothing_written
):
    no_images(monkeypatch)
    recipe = make_recipe(1, hypernet={'model_name': 'repvit_m0_9', 'generator': 'residual'})
    with nothing_written(tmp_path), pytest.raises(InputError) as error:
        train_plain(recipe, result=tmp_path / 'plain', progress=False)
    one_line(error, 'repvit_m0_9', 'layers before the classifier')
    (tmp_path / 'there').mkdir()
    (tmp_path / 'there' / 'mine').touch()
    with pytest.raises(PudNetError) as error:
        train_plain(make_recipe(1), result=tmp_path / 'there', progress=False)
    one_line(error, tmp_path / 'there', 'exists')


@pytest.mark.parametrize('name', ['timm', 'mixup'])
@pytest.mark.parametrize('train', [meta_train, train_plain, try_recipe])
def test_what_timm_refuses_of_augmentation_is_told_before_the_images_are_read(
    name, train, make_recipe, monkeypatch, one_line
):
    no_images(monkeypatch)
    wrong = {'timm': {'auto_augmnt': 'rand-m5'}, 'mixup': {'mixup_alfa': 1.0}}[name]
    with pytest.raises(InputError) as error:
        train(make_recipe(1, augmentation=Augmentation(**{name: wrong})), progress=False)
    one_line(error, 'augmentation', next(iter(wrong)))


@pytest.mark.parametrize('train', [meta_train, train_plain, try_recipe])
def test_banks_of_one_s_own_hold_no_class_that_is_to_be_unseen(train, make_recipe, bank, one_line):
    with pytest.raises(InputError) as error:
        train(make_recipe(1, data=(Data(images='mine', unseen=('c',)),)), banks=[bank], progress=False)
    one_line(error, "class 'c'", 'unseen in mine')
