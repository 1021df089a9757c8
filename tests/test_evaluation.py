import copy
import importlib
import json
import math

import numpy as np
import pytest
import timm
import torch
from torch.testing import assert_close

from timm_pudnet.config import DamagedFileError, InputConfig, InputError
from timm_pudnet.evaluation import TestGroups, evaluate, format_table, mean_interval, share_interval, weights_digest
from timm_pudnet.hypernet import PudNet
from timm_pudnet.training import ImageBank

measure = importlib.import_module('timm_pudnet.evaluation.measure')
ARMS = ['predicted', 'predicted_without_whitening', 'swapped_sketch', 'mean_sketch', 'random_weights', 'raw_pixels']


@pytest.fixture(scope='module')
def bank():
    """Four classes, a colour each, under a little noise."""
    colours = torch.tensor([[250, 10, 10], [10, 250, 10], [10, 10, 250], [240, 240, 10]])
    labels = torch.arange(40) % 4
    noise = torch.randint(-10, 11, (40, 3, 16, 16), generator=torch.Generator().manual_seed(7))
    images = colours[labels][:, :, None, None] + noise
    return ImageBank(images.clamp(0, 255).to(torch.uint8), labels, ['red', 'green', 'blue', 'yellow'])


@pytest.fixture(scope='module')
def groups(bank):
    return TestGroups.draw(bank, count=5, n_way=3, n_shot=3, n_query=2)


@pytest.fixture
def hypernet():
    return PudNet.for_target('test_resnet', sketch_width=16, input=InputConfig(input_size=(3, 16, 16)))


@pytest.fixture
def recorded(monkeypatch):
    """What the head of every arm gets: support features and query features, in the order of groups and arms."""
    calls = {'support': [], 'query': []}
    centroids, logits = measure.class_centroids, measure.centroid_logits

    def record_centroids(features, *args):
        calls['support'].append(features.clone())
        return centroids(features, *args)

    def record_logits(features, *args):
        calls['query'].append(features.clone())
        return logits(features, *args)

    monkeypatch.setattr(measure, 'class_centroids', record_centroids)
    monkeypatch.setattr(measure, 'centroid_logits', record_logits)
    return calls


def test_mean_interval_is_numpy_s():
    values = np.random.default_rng(0).normal(50, 8, 37)
    found = mean_interval(values.tolist())
    assert_close(found['mean'], float(values.mean()))
    assert_close(found['interval'], float(1.96 * values.std(ddof=1) / np.sqrt(37)))
    assert mean_interval([3.0])['mean'] == 3.0
    assert math.isnan(mean_interval([3.0])['interval'])
    assert mean_interval([2.0, 2.0, 2.0]) == {'mean': 2.0, 'interval': 0.0}


@pytest.mark.parametrize(
    ('right', 'total', 'low', 'high'),
    [(5, 10, 0.23659, 0.76341), (0, 10, 0.0, 0.27754), (10, 10, 0.72246, 1.0), (1, 1, 0.20655, 1.0)],
)
def test_share_interval_is_wilson_s(right, total, low, high):
    assert_close(share_interval(right, total), (low, high), rtol=0, atol=1e-4)


def test_share_interval_narrows_with_the_count():
    low, high = share_interval(7000, 10_000)
    assert 0.69 < low < 0.7 < high < 0.71


def test_drawn_groups_share_no_image_between_support_and_query(bank):
    groups = TestGroups.draw(bank, count=30, n_way=3, n_shot=4, n_query=5, seed=1)
    assert (len(groups), groups.support.shape, groups.query.shape) == (30, (30, 3, 4), (30, 3, 5))
    for support, query in zip(groups.support, groups.query, strict=True):
        assert len(set(support.flatten().tolist()) | set(query.flatten().tolist())) == 27
        classes = bank.labels[torch.cat([support, query], 1)]
        assert (classes == classes[:, :1]).all()
        assert len(classes[:, 0].unique()) == 3
    assert len({tuple(bank.labels[support[:, 0]].tolist()) for support in groups.support}) > 1


def test_groups_follow_the_seed_and_survive_a_file(bank, tmp_path):
    def draw(seed):
        return TestGroups.draw(bank, count=3, n_way=2, n_shot=2, n_query=2, seed=seed)

    groups = draw(1)
    assert draw(1).digest == groups.digest != draw(2).digest
    groups.save(tmp_path / 'groups.json')
    loaded = TestGroups.load(tmp_path / 'groups.json')
    assert_close((loaded.support, loaded.query), (groups.support, groups.query), rtol=0, atol=0)
    assert loaded.digest == groups.digest
    assert [path.name for path in tmp_path.iterdir()] == ['groups.json']


@pytest.mark.parametrize(
    'text', ['{"support": [[[1', '{"support": [[[1]]]}', '[]', '{"support": [[1], []], "query": 1}']
)
def test_a_file_without_groups_is_told_in_one_line(text, tmp_path, one_line):
    (tmp_path / 'groups.json').write_text(text)
    with pytest.raises(DamagedFileError) as error:
        TestGroups.load(tmp_path / 'groups.json')
    one_line(error, tmp_path / 'groups.json')


@pytest.mark.parametrize(
    ('changes', 'needles'),
    [({'n_way': 5}, ['n_way is 5', '4 classes']), ({'n_shot': 8, 'n_query': 3}, ["'red'", '10 images', '11'])],
)
def test_impossible_groups_are_refused(changes, needles, bank, one_line):
    with pytest.raises(InputError) as error:
        TestGroups.draw(bank, **{'n_way': 2, 'n_shot': 2, 'n_query': 2, **changes})
    one_line(error, *needles)


def test_colours_are_told_apart_and_the_result_is_json(hypernet, bank, groups):
    before = torch.get_rng_state()
    plain = timm.create_model('test_resnet', num_classes=0)
    torch.set_rng_state(before)
    plain_before = copy.deepcopy(plain.state_dict())
    result = evaluate(
        hypernet, bank, groups, controls={'plain': (plain, torch.eye(plain.num_features))}, progress=False
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(dict(plain.state_dict()), dict(plain_before), rtol=0, atol=0)
    assert json.loads(json.dumps(result)) == result
    assert list(result['accuracy']) == [*ARMS, 'plain', 'plain_own_statistics']
    assert result['accuracy']['raw_pixels'] == {'mean': 100.0, 'interval': 0.0}
    assert 30 < result['accuracy']['predicted']['mean'] <= 100
    assert (result['groups'], result['n_way'], result['n_shot'], result['n_query']) == (5, 3, 3, 2)
    assert_close(result['chance'], 100 / 3)
    assert result['groups_digest'] == groups.digest
    gain = result['accuracy']['predicted']['mean'] - result['accuracy']['plain']['mean']
    assert_close(result['gain_over_plain']['mean'], gain)
    assert 'conditioning_gain' in format_table(result)


def test_labels_that_say_nothing_give_chance(hypernet, bank):
    shuffled = ImageBank(bank.images, torch.arange(40) // 4 % 4, bank.class_names)  # every class of all colours
    groups = TestGroups.draw(shuffled, count=60, n_way=3, n_shot=4, n_query=4)
    result = evaluate(hypernet, shuffled, groups, progress=False)
    assert abs(result['accuracy']['raw_pixels']['mean'] - 100 / 3) < 15


def test_a_hypernetwork_that_ignores_the_sketch_has_no_conditioning_gain(hypernet, bank, groups):
    for generator in hypernet.generators:
        torch.nn.init.zeros_(generator.embed.weight)
    result = evaluate(hypernet, bank, groups, progress=False)
    assert result['conditioning_gain'] == {'mean': 0.0, 'interval': 0.0}
    assert result['conditioning_gain_over_mean_sketch'] == {'mean': 0.0, 'interval': 0.0}


def test_every_arm_gets_its_own_sketch(hypernet, bank, groups, monkeypatch):
    used, forward = [], PudNet.forward

    def recording(self, sketch):
        used.append(sketch.clone())
        return forward(self, sketch)

    monkeypatch.setattr(PudNet, 'forward', recording)
    evaluate(hypernet, bank, groups, progress=False)
    with torch.no_grad():
        sketches = torch.stack(
            [hypernet.encoder(bank.images[s.flatten()].float() / 127.5 - 1).mean(0) for s in groups.support]
        )
    expected = [[sketches[k], sketches[k - 1], sketches.mean(0)] for k in range(len(groups))]
    assert_close(torch.stack(used).unflatten(0, (5, 3)), torch.stack([torch.stack(row) for row in expected]))
    assert torch.pdist(sketches).min() > 1e-4


def test_weights_and_statistics_of_each_arm_come_from_the_support_alone(hypernet, bank, groups, recorded):
    evaluate(hypernet, bank, groups, progress=False)
    support, query = recorded['support'], recorded['query']
    recorded['support'], recorded['query'] = [], []
    changed = groups.query.clone()
    others = [k for k in range(40) if k not in groups.support[1].flatten().tolist()]
    changed[1] = torch.tensor(others[:6]).view(3, 2)
    recorded['support'].clear()
    evaluate(hypernet, bank, TestGroups(groups.support, changed), progress=False)
    assert_close(recorded['support'], support, rtol=0, atol=0)
    for place, (found, before) in enumerate(zip(recorded['query'], query, strict=True)):
        if place // len(ARMS) == 1:
            assert not torch.equal(found, before)
        else:
            assert_close(found, before, rtol=0, atol=0)


def test_a_query_image_s_features_do_not_depend_on_the_other_query_images(hypernet, bank, groups, recorded):
    evaluate(hypernet, bank, groups, progress=False)
    query = [*recorded['query']]
    recorded['query'].clear()
    changed = groups.query.clone()
    changed[:, -1, -1] = groups.query[:, 0, 0]
    evaluate(hypernet, bank, TestGroups(groups.support, changed), progress=False)
    for found, before in zip(recorded['query'], query, strict=True):
        assert_close(found[:-1], before[:-1], rtol=1e-4, atol=1e-4)
        assert (found[-1] - before[-1]).abs().max() > 1e-3


def test_plain_with_its_own_statistics_is_the_model_itself(hypernet, bank, groups, recorded):
    plain = timm.create_model('test_resnet', num_classes=0)
    plain.bn1.running_mean.fill_(0.2)
    evaluate(hypernet, bank, groups, controls={'plain': (plain, torch.eye(plain.num_features))}, progress=False)
    arms = len(ARMS) + 2
    with torch.no_grad():
        expected = plain.eval()(bank.images[groups.query[2].flatten()].float() / 127.5 - 1)
    assert_close(recorded['query'][2 * arms + arms - 1], expected, rtol=1e-4, atol=1e-4)
    assert (recorded['query'][2 * arms + arms - 2] - expected).abs().max() > 1e-2


def test_evaluating_twice_gives_the_same(hypernet, bank, groups):
    first, second = (evaluate(hypernet, bank, groups, progress=False) for _ in range(2))
    assert first == second


def test_the_digest_of_weights_survives_saving_and_sees_every_change(hypernet, tmp_path):
    digest = weights_digest(hypernet)
    assert weights_digest(PudNet.from_pretrained(hypernet.save_pretrained(tmp_path / 'net'))) == digest
    with torch.no_grad():
        hypernet.ahru.start[3] += 1e-6
    assert weights_digest(hypernet) != digest


@pytest.mark.parametrize(
    ('name', 'model_name', 'needles'),
    [('predicted', 'test_resnet', ['predicted']), ('plain', 'test_efficientnet', ['plain', 'test_resnet'])],
)
def test_a_control_of_a_taken_name_or_another_architecture_is_refused(
    name, model_name, needles, hypernet, bank, groups, one_line
):
    model = timm.create_model(model_name, num_classes=0)
    with pytest.raises(InputError) as error:
        evaluate(hypernet, bank, groups, controls={name: (model, torch.eye(model.num_features))}, progress=False)
    one_line(error, *needles)
