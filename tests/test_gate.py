"""The sketch gate: where the choice of the images explains a sketch, the base network is predicted."""

import copy
import dataclasses
import importlib

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from torch.testing import assert_close

from timm_pudnet import InputConfig, PudNet
from timm_pudnet.cli import main
from timm_pudnet.config import InputError
from timm_pudnet.evaluation import TestGroups, evaluate
from timm_pudnet.predict import predict_state_dict, save_model
from timm_pudnet.sketch import SketchGate, StreamingSketch
from timm_pudnet.target import create_feature_model
from timm_pudnet.training import Data, LossWeights, meta_train
from timm_pudnet.training.meta_train import fit_gate

measure = importlib.import_module('timm_pudnet.evaluation.measure')
SMALL = InputConfig(input_size=(3, 16, 16))
RESIDUAL = {'generator': 'residual', 'predict_norm': True}
GATED = {**RESIDUAL, 'sketch_gate': True}


def normal(classes, each, seed=0, width=6):
    """Features `[classes, each, width]` of images of so many classes, alike in how they vary."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(0.2, 2.0, width)
    means = torch.randn(classes, 1, width, generator=generator) * scales.flip(0)
    return means + torch.randn(classes, each, width, generator=generator) * scales + 3


def fitted(features, weights=None):
    gate = SketchGate(features[0].shape[1])
    gate.fit(list(zip(features, weights or [1.0] * len(features), strict=True)))
    return gate


def test_mean_and_covariances_are_those_of_a_plain_rewrite():
    features = [part[:count] for part, count in zip(normal(4, 8), (8, 5, 1, 8), strict=True)]
    weights = [0.5, 1.5, 1.0, 3.0]
    gate = fitted(features, weights)
    x, shares = [part.double().numpy() for part in features], np.array(weights) / 6
    mean = sum(share * part.mean(0) for share, part in zip(shares, x, strict=True))
    between = sum(s * np.outer(p.mean(0) - mean, p.mean(0) - mean) for s, p in zip(shares, x, strict=True))
    within = sum(shares[k] * np.cov(x[k].T) for k in (0, 1, 3)) / (shares[0] + shares[1] + shares[3])
    for found, expected in ((gate.mean, mean), (gate.within, within), (gate.between, between)):
        assert_close(found.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('count', [1, 10, 1000])
def test_it_opens_where_hotelling_s_statistic_is_twice_the_width(count):
    gate = fitted(normal(40, 20))
    within, between = (value.double().numpy() for value in (gate.within, gate.between))
    direction = np.random.default_rng(0).normal(size=6)
    squared = direction @ np.linalg.inv(within / count + between) @ direction
    edge = torch.from_numpy(direction * np.sqrt(2 * 6 / squared))
    assert not gate.opens(gate.mean + 0.999 * edge, count)
    assert gate.opens(gate.mean + 1.001 * edge, count)


@pytest.mark.parametrize('each', [1, 5, 40, 2000])
def test_images_of_new_classes_keep_it_closed_and_a_shift_of_all_opens_it(each):
    gate = fitted(normal(60, 40, seed=2))
    sketches = normal(500, each, seed=3).view(100, 5 * each, 6).mean(1)  # of five classes each, none of the 60
    assert sum(gate.opens(sketch, 5 * each) for sketch in sketches) <= 3
    assert all(gate.opens(sketch + torch.tensor([12.0, 0, 0, 0, 0, 0]), 5 * each) for sketch in sketches)


def test_the_more_images_the_smaller_a_shift_opens_it():
    gate = fitted(normal(60, 40, seed=2))
    off = gate.mean + 2.5 * gate.within.diagonal().sqrt() * torch.tensor([0, 0, 0, 0, 0, 1.0])
    assert [gate.opens(off, count) for count in (1, 1000)] == [False, True]


def test_a_sketch_that_is_not_finite_is_not_hidden():
    gate = fitted(normal(10, 5))
    assert gate.opens(torch.full((6,), torch.nan), 5)
    assert gate.opens(torch.full((6,), torch.inf), 5)


def test_until_it_is_fitted_it_is_open():
    gate = SketchGate(4)
    assert gate.opens(torch.tensor([1e-3, 0.0, 0.0, 0.0]), 10_000)


def test_classes_of_one_image_each_do_not_fit(one_line):
    with pytest.raises(InputError) as error:
        fitted(torch.randn(4, 1, 3))
    one_line(error, 'sketch_gate', 'two images')


def test_unequal_classes_count_as_fewer_images():
    encoder = PudNet.for_target('test_resnet', sketch_width=8, input=SMALL).encoder
    images, labels = torch.randn(9, 3, 16, 16), torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 1])
    for balance, expected in (('none', 9), ('class', 4 / (1 + 1 / 8)), ('kmeans', 3)):
        stream = StreamingSketch(encoder, balance)
        stream.num_clusters = 3
        assert stream.num_images == 0
        stream.add(images[:4], labels[:4])
        stream.add(images[4:], labels[4:])
        assert stream.num_images == pytest.approx(expected)


@pytest.fixture(scope='module')
def gated():
    """A hypernetwork whose gate knows images of normal noise; not to be changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        hypernet = PudNet.for_target('test_resnet', sketch_width=16, input=SMALL, sketch_gate=True).eval()
        images = torch.randn(400, 3, 16, 16).mul(0.3).clamp(-1, 1)
        with torch.no_grad():
            hypernet.gate.fit([(rows, 1.0) for rows in hypernet.encoder(images).split(50)])
    return hypernet


def noise(count, seed=4, shift=0.0):
    """Images in 0-1, as the gate knows them or shifted."""
    images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 0.15 + 0.5 + shift
    return images.clamp(0, 1)


def same(first, second):
    return all(torch.equal(value, second[key]) for key, value in first.items())


def base_of(hypernet):
    with torch.no_grad():
        return hypernet.base()


def test_a_closed_gate_gives_the_base_network(gated):
    with torch.no_grad():
        usual, far = base_of(gated), gated.gate.mean + 5
        near = gated.encoder(noise(20) * 2 - 1).mean(0)
        assert same(gated(near, 20), usual)
        assert not same(gated(near), usual)  # it does not know of how many images
        assert same(gated(far, 20), gated(far))
        assert not same(gated(far), usual)


def test_a_prediction_says_of_how_many_images_its_sketch_is(gated):
    usual = base_of(gated)
    for images, closed in ((noise(24), True), (noise(24, shift=0.3), False)):
        state = predict_state_dict('test_resnet', images, [0, 1] * 12, hypernet=gated)
        for key in gated.target.keys('predicted'):
            assert torch.equal(state[key], usual[key]) == closed, key


def test_the_command_says_whether_the_sketch_changed_the_weights(gated, write_folder, tmp_path):
    folder = gated.save_pretrained(tmp_path / 'gated')
    bare = PudNet(dataclasses.replace(gated.config, sketch_gate=False)).save_pretrained(tmp_path / 'bare')
    for name, shift in (('near', 0.0), ('far', 0.3)):
        pixels = (noise(24, shift=shift) * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        write_folder(tmp_path / name, pixels, ['cup', 'jar'] * 12)

    def lines(name, hypernet):
        done = CliRunner().invoke(main, ['predict', 'test_resnet', str(tmp_path / name), '--hypernet', str(hypernet)])
        assert done.exit_code == 0, done.output
        return [line for line in done.output.splitlines() if line.startswith('Sketch')]

    assert ['changed nothing' in line for line in lines('near', folder)] == [True]
    assert ['changed the weights' in line for line in lines('far', folder)] == [True]
    assert lines('near', bare) == []


def test_the_gate_survives_saving_in_half_precision_exactly(gated, tmp_path):
    found = PudNet.from_pretrained(gated.save_pretrained(tmp_path / 'gated', half=True))
    assert found.config.sketch_gate
    assert_close(dict(found.gate.state_dict()), dict(gated.gate.state_dict()), rtol=0, atol=0)


def test_the_base_network_is_that_of_codes_of_zeros_and_a_frozen_one_is_the_start(trained, start):
    hypernet, _, _ = trained
    base, own = base_of(hypernet), start[0].state_dict()
    for layer, generator in zip(hypernet.target.layers, hypernet.generators, strict=True):
        with torch.no_grad():
            assert torch.equal(base[layer.key], generator(torch.zeros(16)))
        assert torch.equal(base[layer.key], own[layer.key]), layer.key
    with torch.no_grad():
        far = hypernet(hypernet.gate.mean + 5)
    assert not same({layer.key: far[layer.key] for layer in hypernet.target.layers}, base)


def test_arms_of_the_same_weights_are_measured_once_and_alike(gated, bank, monkeypatch):
    groups = TestGroups.draw(bank, count=4, n_way=3, n_shot=2, n_query=2)
    calls, given = [], measure.support_features

    def counting(model, weights, *args):
        calls.append(weights)
        return given(model, weights, *args)

    monkeypatch.setattr(measure, 'support_features', counting)
    monkeypatch.setattr(SketchGate, 'opens', lambda *_: True)
    apart = evaluate(gated, bank, groups, without=['random_weights', 'raw_pixels'], progress=False)
    assert len(calls) == 3 * 4
    calls.clear()
    monkeypatch.setattr(SketchGate, 'opens', lambda *_: False)
    closed = evaluate(gated, bank, groups, without=['random_weights', 'raw_pixels'], progress=False)
    assert len(calls) == 4
    assert all(same(weights, base_of(gated)) for weights in calls)
    scores = closed['accuracy']
    assert scores['predicted'] == scores['swapped_sketch'] == scores['mean_sketch']
    assert closed['conditioning_gain'] == {'mean': 0.0, 'interval': 0.0}
    assert closed['accuracy_ridge']['predicted'] == closed['accuracy_ridge']['swapped_sketch']
    assert set(scores) == set(apart['accuracy'])
    # So is a control that is the base network, where it is read in the same space.
    base = create_feature_model(gated.target)
    base.load_state_dict(base_of(gated))
    for space, times in ((gated.whitening, 4), (2 * gated.whitening, 8)):
        calls.clear()
        leave = ['random_weights', 'raw_pixels', 'base_own_statistics']
        beside = evaluate(gated, bank, groups, controls={'base': (base, space)}, without=leave, progress=False)
        assert len(calls) == times
        assert beside['accuracy']['base'] == closed['accuracy']['predicted']
    monkeypatch.setattr(SketchGate, 'opens', lambda *_: True)
    calls.clear()
    evaluate(gated, bank, groups, controls={'base': (base, gated.whitening)}, without=leave, progress=False)
    assert len(calls) == 4 * 4


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    """A model of the target, and its folder."""
    model = timm.create_model('test_resnet', num_classes=0)
    return model, save_model(model, tmp_path_factory.mktemp('start') / 'net')


FROZEN = {
    'losses': LossWeights(full=0.0, consistency=0.0),
    'schedule': {'optimizer': 'sgd', 'rate': 0.0, 'sketch_rate': 1e-2},
}


@pytest.fixture(scope='module')
def trained(make_recipe, bank, start, tmp_path_factory):
    """A hypernetwork that was trained with a gate, its recipe and its folder; not to be changed."""
    recipe = make_recipe(2, hypernet=GATED, groups={'conditions': 0.5}, start=str(start[1]), **FROZEN)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hypernet = meta_train(recipe, banks=[bank], device='cpu', progress=False)
    return hypernet, recipe, hypernet.save_pretrained(tmp_path_factory.mktemp('gated') / 'net')


def test_training_fits_it_to_the_images_as_they_are(trained, bank):
    hypernet, _, _ = trained
    with torch.no_grad():
        rows = hypernet.encoder(bank.images.float() / 127.5 - 1)
    gate = fitted([rows[bank.labels == label] for label in range(6)])
    assert_close(dict(hypernet.gate.state_dict()), dict(gate.state_dict()), rtol=1e-4, atol=1e-5)
    assert hypernet.gate.within.diagonal().min() > 0


def test_data_sets_count_by_their_shares(trained, make_recipe, bank):
    hypernet, _, _ = trained
    banks = [bank.select(list('ab')), bank.select(list('cdef'))]
    data = (Data(images='one', share=3.0), Data(images='two'))
    recipe = make_recipe(1, hypernet=GATED, groups={'conditions': 0.5}, data=data, start='nowhere', **FROZEN)
    net = copy.deepcopy(hypernet)
    fit_gate(net, recipe, banks)
    with torch.no_grad():
        rows = hypernet.encoder(bank.images.float() / 127.5 - 1)
    gate = fitted([rows[bank.labels == label] for label in range(6)], [1.5, 1.5, 0.25, 0.25, 0.25, 0.25])
    assert_close(dict(net.gate.state_dict()), dict(gate.state_dict()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('gates', [(True, False), (False, True), (True, True)], ids=str)
def test_training_goes_on_from_one_with_a_gate_or_without(gates, trained, make_recipe, bank, tmp_path):
    before, after = gates
    hypernet, _, _ = trained
    other = copy.deepcopy(hypernet)
    other.gate.mean.add_(1.0)
    folder = other.save_pretrained(tmp_path / 'other')
    if not before:
        bare = PudNet(dataclasses.replace(hypernet.config, sketch_gate=False))
        bare.load_state_dict({key: value for key, value in hypernet.state_dict().items() if 'gate.' not in key})
        folder = bare.save_pretrained(tmp_path / 'bare')
    fields = {**RESIDUAL, 'sketch_gate': after}
    further = make_recipe(1, hypernet=fields, groups={'conditions': 0.5}, start=str(folder), **FROZEN)
    found = meta_train(further, banks=[bank], device='cpu', progress=False)
    assert (found.gate is not None) == after
    for key, value in hypernet.encoder.named_parameters():
        assert_close(found.encoder.get_parameter(key), value, rtol=0, atol=0.1)
    if after:  # its own, not that of the start
        fresh = copy.deepcopy(found)
        fit_gate(fresh, further, [bank])
        assert_close(dict(found.gate.state_dict()), dict(fresh.gate.state_dict()), rtol=1e-5, atol=1e-6)


def test_recipes_without_images_as_they_are_have_no_gate(make_recipe, one_line):
    for share in (0.0, 1.0):
        with pytest.raises(InputError) as error:
            make_recipe(1, hypernet=GATED, groups={'conditions': share}, start='nowhere', **FROZEN)
        one_line(error, 'sketch_gate', 'conditions', f'got {share:g}')


def test_recipes_whose_base_network_learns_have_no_gate(make_recipe, one_line):
    with pytest.raises(InputError) as error:
        make_recipe(1, hypernet=GATED, groups={'conditions': 0.5}, start='nowhere')
    one_line(error, 'sketch_gate', 'rate', '0.002')
