import copy
import dataclasses
import importlib
import itertools
import json
import math

import numpy as np
import pytest
import timm
import torch
from torch.testing import assert_close

from timm_pudnet.adapt import (
    StreamingCentroids,
    StreamingRidge,
    calibrate,
    ridge_classifier,
    self_training_classifier,
)
from timm_pudnet.cli.evaluate import _read_controls
from timm_pudnet.config import DamagedFileError, InputConfig, InputError, PudNetWarning
from timm_pudnet.evaluation import (
    TestGroups,
    compare_scratch,
    evaluate,
    format_table,
    mean_interval,
    share_interval,
    train_from_scratch,
    weights_digest,
)
from timm_pudnet.evaluation.holdout import HeldOutTest
from timm_pudnet.hypernet import PudNet
from timm_pudnet.predict import predict_model
from timm_pudnet.target import create_feature_model, with_own_config
from timm_pudnet.training import ImageBank
from timm_pudnet.training.conditions import Condition
from timm_pudnet.training.meta_train import save_control

protocols = importlib.import_module('timm_pudnet.evaluation.protocols')
scratch = importlib.import_module('timm_pudnet.evaluation.scratch')
measure = importlib.import_module('timm_pudnet.evaluation.measure')
ARMS = ['predicted', 'predicted_without_whitening', 'swapped_sketch', 'mean_sketch', 'random_weights', 'raw_pixels']


def coloured(labels, seed, noise=10):
    """A bank of four classes, a colour each, under a little noise."""
    colours = torch.tensor([[250, 10, 10], [10, 250, 10], [10, 10, 250], [240, 240, 10]])
    size = (len(labels), 3, 16, 16)
    noise = torch.randint(-noise, noise + 1, size, generator=torch.Generator().manual_seed(seed))
    images = colours[labels][:, :, None, None] + noise
    return ImageBank(images.clamp(0, 255).to(torch.uint8), labels, ['red', 'green', 'blue', 'yellow'])


@pytest.fixture(scope='module')
def bank():
    return coloured(torch.arange(40) % 4, seed=7)


@pytest.fixture(scope='module')
def support_bank():
    """Other images of the classes, of unequal counts: 6, 12, 18, 24."""
    return coloured(torch.arange(4).repeat_interleave(torch.tensor([6, 12, 18, 24])), seed=8)


@pytest.fixture(scope='module')
def groups(bank):
    return TestGroups.draw(bank, count=5, n_way=3, n_shot=3, n_query=2)


@pytest.fixture
def hypernet(with_whitening):
    return with_whitening(PudNet.for_target('test_resnet', sketch_width=16, input=InputConfig(input_size=(3, 16, 16))))


@pytest.fixture
def recorded(monkeypatch):
    """What the head of every arm gets: support and query features and whitening, in the order of groups and arms."""
    calls = {'support': [], 'query': [], 'whitening': []}
    centroids, logits = measure.class_centroids, measure.centroid_logits

    def record_centroids(features, *args):
        calls['support'].append(features.clone())
        return centroids(features, *args)

    def record_logits(features, *args):
        calls['query'].append(features.clone())
        calls['whitening'].append(args[-1])
        return logits(features, *args)

    monkeypatch.setattr(measure, 'class_centroids', record_centroids)
    monkeypatch.setattr(measure, 'centroid_logits', record_logits)
    return calls


@pytest.mark.parametrize('count', [2, 3, 5, 20, 31, 32, 60, 100, 101, 500])
def test_mean_interval_is_student_s_and_for_many_values_normal(count):
    stats = pytest.importorskip('scipy.stats')
    values = np.random.default_rng(0).normal(50, 8, count)
    found = mean_interval(values.tolist())
    assert_close(found['mean'], float(values.mean()))
    quantile = stats.t.ppf(0.975, count - 1) if count < 101 else 1.96
    assert_close(found['interval'], float(quantile * values.std(ddof=1) / np.sqrt(count)), rtol=1e-3, atol=0)


def test_the_interval_of_an_accuracy_is_over_groups_and_that_of_a_gain_over_pairs():
    generator = torch.Generator().manual_seed(0)
    right, rival = ([torch.rand(20, generator=generator) < level for level in (0.9, 0.7, 0.5, 0.8, 0.6)] for _ in '12')
    shares, others = ([100 * found.float().mean().item() for found in every] for every in (right, rival))
    assert measure.accuracy_interval(right) == mean_interval(shares)
    pairs = [a - b for a, b in zip(shares, others, strict=True)]
    found = measure._gain(right, rival)
    assert_close(found, mean_interval(pairs), rtol=1e-4, atol=1e-4)
    assert found['interval'] < measure.accuracy_interval(right)['interval']


def test_a_test_of_images_kept_aside_is_told_with_wilson_s_intervals():
    labels = torch.zeros(10, dtype=torch.long)
    none = torch.zeros(0)
    test = HeldOutTest(
        labels=labels,
        guesses=(torch.arange(10) >= 5).long(),
        confidences=torch.ones(10),
        names=[str(number) for number in range(10)],
        mistakes=[],
        places=none,
        features=none.view(0, 1),
        num_classes=4,
        right_raw=10,
        raw_head='ridge regression',
        repeated=0,
        seconds=0.0,
    )
    assert [' '.join(line.split()) for line in test.lines()] == [
        'Accuracy 50.0% on the images kept aside (5 of 10; 95 % interval 23.7% to 76.3%)',
        'Raw pixels 100.0% by ridge regression (10 of 10; 95 % interval 72.2% to 100.0%)',
        'Chance 25.0%; 100.0% by always naming the largest class',
    ]
    equal = dataclasses.replace(test, labels=torch.arange(10) % 4)
    assert list(equal.lines())[2] == 'Chance      25.0%'


def test_mean_interval_of_one_value_or_of_equal_ones():
    assert mean_interval([3.0])['mean'] == 3.0
    assert math.isnan(mean_interval([3.0])['interval'])
    assert mean_interval([2.0, 2.0, 2.0]) == {'mean': 2.0, 'interval': 0.0}


@pytest.mark.parametrize(
    ('right', 'total', 'low', 'high'),
    [(5, 10, 0.23659, 0.76341), (0, 10, 0.0, 0.27754), (10, 10, 0.72246, 1.0), (1, 1, 0.20655, 1.0)],
)
def test_share_interval_is_wilson_s(right, total, low, high):
    assert_close(share_interval(right, total), (low, high), rtol=0, atol=1e-4)


def test_share_interval_holds_the_share_itself():
    for total in range(1, 500):
        for right in (0, total // 3, total):
            low, high = share_interval(right, total)
            assert 0 <= low <= right / total <= high <= 1


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
    'text',
    [
        '{"support": [[[1',
        '{"support": [[[1]]]}',
        '[]',
        '{"support": [[1], []], "query": 1}',
        '{"support": [[[1]]], "query": [[1]]}',
        '{"support": "some", "query": [[[1]]]}',
        '{"support": [[[1]]], "query": [[[1.5]]]}',
        '{"support": [[[1]]], "query": [[[2]]], "conditions": []}',
        '{"support": [[[1]]], "query": [[[2]]], "conditions": [{"order": [0, 0]}]}',
        '{"support": [[[1]]], "query": [[[2]]], "conditions": [{"ordre": [0]}]}',
    ],
)
def test_a_file_without_groups_is_told_in_one_line(text, tmp_path, one_line):
    (tmp_path / 'groups.json').write_text(text)
    with pytest.raises(DamagedFileError) as error:
        TestGroups.load(tmp_path / 'groups.json')
    one_line(error, tmp_path / 'groups.json')


@pytest.mark.parametrize(
    ('changes', 'needles'),
    [
        ({'n_way': 5}, ['n_way', 'from 2 to 4', 'got 5']),
        ({'n_shot': 8, 'n_query': 3}, ["'red'", '10 images', '11']),
        ({'n_shot': 0}, ['n_shot must be a whole number, at least 1']),
        ({'n_query': 0}, ['n_query must be a whole number, at least 1']),
        ({'count': 0}, ['count must be a whole number, at least 1']),
        ({'n_way': 3.0}, ['n_way', 'whole number', 'got 3.0']),
        ({'seed': 1.5}, ['seed', 'whole number', '1.5']),
        ({'seed': -1}, ['seed', 'from 0', '-1']),
    ],
)
def test_impossible_groups_are_refused(changes, needles, bank, one_line):
    with pytest.raises(InputError) as error:
        TestGroups.draw(bank, **{'n_way': 2, 'n_shot': 2, 'n_query': 2, **changes})
    one_line(error, *needles)


def test_numbers_of_numpy_are_numbers(bank):
    given = {'count': 2, 'n_way': 2, 'n_shot': 2, 'n_query': 2, 'n_unlabelled': 1, 'seed': 3}
    found = TestGroups.draw(bank, **{name: np.int64(value) for name, value in given.items()})
    assert found.digest == TestGroups.draw(bank, **given).digest


def test_what_is_no_hypernetwork_and_no_bank_is_told_in_one_line(hypernet, bank, groups, one_line):
    for wrong, needles in ((('net', bank), ['str', 'load_hypernet']), ((hypernet, 'images'), ['str', 'ImageBank'])):
        with pytest.raises(InputError) as error:
            evaluate(*wrong, groups, progress=False)
        one_line(error, *needles)


def test_no_label_a_class_is_not_taken_for_all_of_them(bank, support_bank, one_line):
    with pytest.raises(InputError) as error:
        TestGroups.draw(bank, n_way=2, n_shot=0, n_query=2, support_bank=support_bank)
    one_line(error, 'n_shot must be a whole number, at least 1, got 0')


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
    gain = result['accuracy']['predicted']['mean'] - result['accuracy']['plain_own_statistics']['mean']
    assert_close(result['gain_over_plain_own_statistics']['mean'], gain)
    assert list(result['accuracy_ridge']) == [name for name in result['accuracy'] if not name.endswith('whitening')]
    assert result['accuracy_ridge']['raw_pixels'] == {'mean': 100.0, 'interval': 0.0}
    assert 'conditioning_gain' in format_table(result)


@pytest.mark.parametrize('where', ['bank', 'other'])
def test_images_of_another_size_than_the_target_takes_are_refused(where, hypernet, bank, groups, one_line):
    large = ImageBank(bank.images.repeat(1, 1, 2, 2), bank.labels, bank.class_names)
    with pytest.raises(InputError) as error:
        evaluate(hypernet, **{'bank': bank, where: large}, groups=groups, progress=False)
    one_line(error, '3x32x32', '3x16x16')


def test_labels_that_say_nothing_give_chance(hypernet, bank):
    shuffled = ImageBank(bank.images, torch.arange(40) // 4 % 4, bank.class_names)  # every class of all colours
    groups = TestGroups.draw(shuffled, count=60, n_way=3, n_shot=4, n_query=4)
    without = ['swapped_sketch', 'mean_sketch', 'random_weights']
    result = evaluate(hypernet, shuffled, groups, without=without, progress=False)
    for arm in ('predicted', 'raw_pixels'):
        assert abs(result['accuracy'][arm]['mean'] - 100 / 3) < 15


def test_a_hypernetwork_that_ignores_the_sketch_has_no_conditioning_gain(hypernet, bank, groups):
    for generator in hypernet.generators:
        torch.nn.init.zeros_(generator.embed.weight)
    result = evaluate(torch.compile(hypernet), bank, groups, progress=False)  # as if it were not compiled
    assert result['conditioning_gain'] == {'mean': 0.0, 'interval': 0.0}
    assert result['conditioning_gain_over_mean_sketch'] == {'mean': 0.0, 'interval': 0.0}


def test_every_arm_gets_its_own_sketch(hypernet, bank, groups, monkeypatch):
    used, counts, forward = [], [], PudNet.forward

    def recording(self, sketch, num_images):
        used.append(sketch.clone())
        counts.append(num_images)
        return forward(self, sketch, num_images)

    monkeypatch.setattr(PudNet, 'forward', recording)
    evaluate(hypernet, bank, groups, progress=False)
    hypernet.eval()
    with torch.no_grad():
        sketches = torch.stack(
            [hypernet.encoder(bank.images[s.flatten()].float() / 127.5 - 1).mean(0) for s in groups.support]
        )
    assert counts == [9, 9, 45] * 5
    expected = [[sketches[k], sketches[k - 1], sketches.mean(0)] for k in range(len(groups))]
    assert_close(torch.stack(used).unflatten(0, (5, 3)), torch.stack([torch.stack(row) for row in expected]))
    assert torch.pdist(sketches).min() > 1e-4


def left_over(bank, groups, number, row):
    """Places of the images of a group's class that the group does not show."""
    members = bank.members[groups.classes(number, bank)[row]]
    return members[~torch.isin(members, torch.cat([groups.support[number, row], groups.query[number, row]]))]


def test_weights_and_statistics_of_each_arm_come_from_the_support_alone(hypernet, bank, groups, recorded):
    evaluate(hypernet, bank, groups, progress=False)
    support, query = recorded['support'], recorded['query']
    recorded['support'], recorded['query'] = [], []
    changed = groups.query.clone()
    changed[1] = torch.stack([left_over(bank, groups, 1, row)[:2] for row in range(3)])
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
    changed[:, -1, -1] = torch.stack([left_over(bank, groups, number, -1)[0] for number in range(len(groups))])
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


def test_a_network_that_no_group_changes_sees_each_image_once_and_gives_the_same(hypernet, bank, groups, monkeypatch):
    plain = timm.create_model('test_resnet', num_classes=0)
    control = {'plain': (plain, torch.eye(plain.num_features))}
    many = TestGroups.draw(bank, count=5, n_way=4, n_shot=5, n_query=4)  # 36 images a group, of 40
    seen, given = [], measure.support_features

    def counting(model, weights, support, calibration):
        seen.append((calibration is None, len(support)))
        return given(model, weights, support, calibration)

    monkeypatch.setattr(measure, 'support_features', counting)
    once = evaluate(hypernet, bank, many, controls=control, progress=False)
    assert [size for own, size in seen if own] == [40]
    first = TestGroups.draw(bank, count=1, n_way=4, n_shot=5, n_query=4)
    few = evaluate(hypernet, bank, first, controls=control, progress=False)
    assert seen[-1] == (True, 20)  # 36 images in all: fewer than there are
    seen.clear()
    shown = dataclasses.replace(many, conditions=(Condition(order=(2, 1, 0)),) * 5)
    for changes in ({'support_bank': coloured(bank.labels, seed=9)}, {}):
        seen.clear()
        evaluate(hypernet, bank, many if changes else shown, controls=control, progress=False, **changes)
        assert [size for own, size in seen if own] == [20] * 5
    name = 'plain_own_statistics'
    with torch.no_grad():
        rows = plain.eval()(bank.images.float() / 127.5 - 1)
    right = []
    for support, query in zip(many.support, many.query, strict=True):
        centroids = torch.nn.functional.normalize(rows[support].mean(1), dim=1)
        guesses = (torch.nn.functional.normalize(rows[query].flatten(0, 1), dim=1) @ centroids.t()).argmax(1)
        right.append(100 * float((guesses == torch.arange(4).repeat_interleave(4)).float().mean()))
    assert once['accuracy'][name]['mean'] == pytest.approx(sum(right) / 5)
    assert few['accuracy'][name]['mean'] == pytest.approx(right[0])


def test_random_weights_are_calibrated_by_the_images_for_their_own_statistics_say_nothing(bank, groups, monkeypatch):
    found, calibrate = [], measure.calibrate

    def recording(*args, **kwargs):
        found.append(kwargs)
        return calibrate(*args, **kwargs)

    monkeypatch.setattr(measure, 'calibrate', recording)
    config = InputConfig(input_size=(3, 16, 16))
    network = PudNet.for_target('test_resnet', sketch_width=8, input=config, prior_images=400.0, deep_share=0.1)
    evaluate(
        network,
        bank,
        TestGroups.draw(bank, count=1, n_way=3, n_shot=3, n_query=2),
        without=['raw_pixels'],
        progress=False,
    )
    assert found == [{'prior_images': 400.0, 'deep_share': 0.1}, {'prior_images': 8.0, 'deep_share': 1.0}]


def test_each_arm_is_read_in_its_own_whitened_space(hypernet, bank, groups, recorded):
    plain = timm.create_model('test_resnet', num_classes=0)
    learned = 2 * torch.eye(plain.num_features)
    evaluate(hypernet, bank, groups, controls={'plain': (plain, learned)}, progress=False)
    ours = hypernet.whitening
    expected = [ours, None, ours, ours, None, None, learned, learned]  # in the order of ARMS, and the control's two
    assert len(recorded['whitening']) == len(expected) * len(groups)
    for place, found in enumerate(recorded['whitening']):
        wanted = expected[place % len(expected)]
        assert found is None if wanted is None else torch.equal(found, wanted)


def test_the_seed_is_that_of_the_random_weights(hypernet, bank, groups, recorded):
    for seed in (0, 1):
        evaluate(hypernet, bank, groups, seed=seed, progress=False)
    first, second = recorded['query'][: len(recorded['query']) // 2], recorded['query'][len(recorded['query']) // 2 :]
    for place, (one, other) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(one, other) != (ARMS[place % len(ARMS)] == 'random_weights')


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


# Support from another bank


def test_without_a_support_bank_groups_are_drawn_as_ever(bank):
    """The published groups stay what they are."""
    assert TestGroups.draw(bank, count=5, n_way=3, n_shot=3, n_query=2).digest == '5039a3a5cb1d3cbd'


def test_support_images_come_from_the_support_bank(bank, support_bank):
    groups = TestGroups.draw(bank, count=20, n_way=3, n_shot=5, n_query=6, support_bank=support_bank, seed=2)
    assert (groups.support.shape, groups.query.shape) == ((20, 3, 5), (20, 3, 6))
    support, query = support_bank.labels[groups.support], bank.labels[groups.query]
    assert torch.equal(support, query[:, :, :1].expand(-1, -1, 5))
    assert (query == query[:, :, :1]).all()
    assert groups.support.max() >= 40  # a place that only the support bank has
    for places in (*groups.support, *groups.query):
        assert len(places.unique()) == places.numel()
    with pytest.raises(InputError, match="'red' has 6 images for support, a group needs 7"):
        TestGroups.draw(bank, n_shot=7, n_query=2, support_bank=support_bank)
    with pytest.raises(InputError, match="'red' has 10 images, a group needs 11"):
        TestGroups.draw(bank, n_query=11, n_shot=1, support_bank=support_bank)


def test_all_images_of_a_class_are_the_support_and_the_file_says_all(bank, support_bank, tmp_path):
    groups = TestGroups.draw(bank, count=6, n_way=2, n_shot='all', n_query=3, support_bank=support_bank)
    assert groups.support is None
    groups.save(tmp_path / 'groups.json')
    assert json.loads((tmp_path / 'groups.json').read_text())['support'] == 'all'
    loaded = TestGroups.load(tmp_path / 'groups.json')
    assert (loaded.support, loaded.digest) == (None, groups.digest)
    for number in range(6):
        support, query = loaded.images(number, bank, support_bank, InputConfig(), torch.device('cpu'))
        classes = bank.labels[groups.query[number, :, 0]]
        assert torch.equal(support.places.sort().values, torch.isin(support_bank.labels, classes).nonzero().flatten())
        assert torch.equal(classes[support.labels], support_bank.labels[support.places])
        assert torch.equal(classes[query.labels], bank.labels[query.places])
    with pytest.raises(InputError, match='support bank'):
        TestGroups.draw(bank, n_shot='all')


@pytest.mark.parametrize(('many', 'measured'), [(9, True), (12, False)])
def test_a_logistic_head_is_measured_where_every_group_has_many_labels(
    many, measured, bank, support_bank, hypernet, monkeypatch
):
    monkeypatch.setattr('timm_pudnet.evaluation.measure.MANY_LABELS', many)
    groups = TestGroups.draw(bank, count=8, n_way=2, n_shot='all', n_query=3, support_bank=support_bank)
    counts = support_bank.labels.bincount()[bank.labels[groups.query[:, :, 0]]].sum(1)
    assert counts.min() < 24 <= counts.max()  # of classes of 6 to 24
    found = evaluate(hypernet, bank, groups, support_bank=support_bank, progress=False)
    assert ('accuracy_logistic' in found) == measured


def small_batches(monkeypatch, size=7):
    monkeypatch.setattr(protocols.ImageSample, 'for_size', lambda input_size: protocols.ImageSample(size))


@pytest.mark.parametrize('n_shot', [6, 'all'])
def test_a_support_in_many_batches_gives_what_one_batch_gives(n_shot, hypernet, bank, support_bank, monkeypatch):
    """But for the statistics, which are calibrated on a sample: here on all."""
    groups = TestGroups.draw(bank, count=3, n_way=3, n_shot=n_shot, n_query=5, support_bank=support_bank)
    one = evaluate(hypernet, bank, groups, support_bank=support_bank, progress=False)
    small_batches(monkeypatch)
    whole = property(lambda images: images._all)
    monkeypatch.setattr(protocols.GroupImages, 'sample', whole)
    many = evaluate(hypernet, bank, groups, support_bank=support_bank, progress=False)
    assert many == one
    assert one['accuracy']['predicted']['mean'] > 40
    assert one['n_shot'] == n_shot
    counts = torch.tensor([6, 12, 18, 24])[bank.labels[groups.query[:, :, 0]]]
    assert one['support_images'] == (18 if n_shot == 6 else float(counts.sum() / 3))
    assert one['separate_support']
    assert ('all' in format_table(one)) == (n_shot == 'all')


def test_a_large_support_is_calibrated_on_a_sample_and_its_heads_are_of_all(hypernet, bank, support_bank, monkeypatch):
    small_batches(monkeypatch)
    samples, centroids, ridges = [], [], []

    def record_calibrate(model, images, *args, **kwargs):
        samples.append(images)
        assert kwargs == hypernet.config.calibration
        return calibrate(model, images, *args, **kwargs)

    class Centroids(StreamingCentroids):
        def result(self):
            centroids.append((self.counts.tolist(), super().result()))
            return centroids[-1][1]

    solve = StreamingRidge.classifier

    def record_ridge(stream, whitening=None):
        ridges.append(stream.centroids.counts.tolist())
        return solve(stream, whitening)

    monkeypatch.setattr(measure, 'calibrate', record_calibrate)
    monkeypatch.setattr('timm_pudnet.adapt.StreamingCentroids', Centroids)
    monkeypatch.setattr(StreamingRidge, 'classifier', record_ridge)
    groups = TestGroups.draw(bank, count=1, n_way=4, n_shot='all', n_query=5, support_bank=support_bank)
    result = evaluate(hypernet, bank, groups, support_bank=support_bank, progress=False)
    assert [len(sample) for sample in samples] == [7, 7]  # predicted, random weights
    assert ridges == [[6, 12, 18, 24]] * 3
    assert [counts for counts, _ in centroids] == [[6, 12, 18, 24]] * 3
    pixels = support_bank.images.float().flatten(1) / 127.5 - 1
    expected = torch.stack([pixels[support_bank.labels == label].mean(0) for label in range(4)])
    assert_close(centroids[2][1], expected, rtol=1e-4, atol=1e-4)
    assert result['accuracy']['raw_pixels']['mean'] == 100.0


def test_the_sketch_of_all_images_is_the_mean_of_the_class_means(hypernet, bank, support_bank, monkeypatch):
    used, forward = [], PudNet.forward

    def recording(self, sketch, num_images):
        used.append(sketch.clone())
        assert num_images == pytest.approx(16 / (1 / 6 + 1 / 12 + 1 / 18 + 1 / 24))
        return forward(self, sketch, num_images)

    monkeypatch.setattr(PudNet, 'forward', recording)
    groups = TestGroups.draw(bank, count=1, n_way=4, n_shot='all', n_query=5, support_bank=support_bank)
    for size in (100, 7):
        small_batches(monkeypatch, size)
        evaluate(hypernet, bank, groups, support_bank=support_bank, progress=False)
        with torch.no_grad():
            features = hypernet.eval().encoder(support_bank.images.float() / 127.5 - 1)
        means = torch.stack([features[support_bank.labels == label].mean(0) for label in range(4)])
        assert_close(used[-1], means.mean(0), rtol=1e-4, atol=1e-5)
        assert (means.mean(0) - features.mean(0)).abs().max() > 1e-4


def test_groups_of_other_banks_are_refused(hypernet, bank, support_bank, groups, one_line):
    drawn = TestGroups.draw(bank, count=4, n_way=4, n_shot=4, n_query=6, support_bank=support_bank)
    everything = TestGroups.draw(bank, count=4, n_way=4, n_shot='all', n_query=6, support_bank=support_bank)
    overlap = TestGroups(groups.support, torch.cat([groups.query[:, :, :1], groups.support[:, :, :1]], 2))
    renamed = ImageBank(support_bank.images, support_bank.labels, ['red', 'green', 'yellow', 'blue'])
    smaller = ImageBank(support_bank.images[..., :8], support_bank.labels, support_bank.class_names)
    beyond = TestGroups(groups.support + 100, groups.query)
    cases = [
        (overlap, None, ['group 0', 'support']),
        (everything, None, ['support bank']),
        (beyond, None, ['40 images']),
        (drawn, renamed, ['red, green, yellow, blue', 'red, green, blue, yellow']),
        (drawn, smaller, ['[3, 16, 8]', '[3, 16, 16]']),
        (drawn, bank, ['40 of the 40 tested images', 'another split']),
    ]
    for chosen, given, needles in cases:
        with pytest.raises(InputError) as error:
            evaluate(hypernet, bank, chosen, support_bank=given, progress=False)
        one_line(error, *needles)


def test_tested_images_that_are_in_the_support_bank_too_are_told(hypernet, bank, support_bank):
    images = torch.cat([support_bank.images, bank.images[:3]])
    leaky = ImageBank(images, torch.cat([support_bank.labels, bank.labels[:3]]), support_bank.class_names)
    drawn = TestGroups.draw(bank, count=2, n_way=4, n_shot='all', n_query=6, support_bank=support_bank)
    with pytest.warns(PudNetWarning, match='3 of the 40 tested images are in the support bank too'):
        evaluate(hypernet, bank, drawn, support_bank=leaky, progress=False)


def test_copies_among_the_tested_images_are_told(hypernet, bank):
    twice = ImageBank(
        torch.cat([bank.images, bank.images[:3]]), torch.cat([bank.labels, bank.labels[:3]]), bank.class_names
    )
    drawn = TestGroups.draw(twice, count=2, n_way=4, n_shot=2, n_query=6)
    with pytest.warns(PudNetWarning, match='3 of the 43 images are copies of others'):
        evaluate(hypernet, twice, drawn, progress=False)


def test_groups_of_the_same_images_have_no_sketch_of_another(hypernet, support_bank):
    tested = coloured(torch.arange(80) % 4, seed=9, noise=250)
    groups = TestGroups.draw(tested, count=3, n_way=4, n_shot='all', n_query=5, support_bank=support_bank)
    result = evaluate(hypernet, tested, groups, support_bank=support_bank, progress=False)
    assert not {'swapped_sketch', 'mean_sketch'} & set(result['accuracy'])
    assert not any(name.startswith('conditioning_gain') for name in result)


def test_a_swapped_sketch_is_of_other_images(hypernet, support_bank):
    """Of three classes of four at a time, all images of each: a group's neighbour may be of the same ones."""
    tested = coloured(torch.arange(80) % 4, seed=9, noise=250)
    groups = TestGroups.draw(tested, count=12, n_way=3, n_shot='all', n_query=5, support_bank=support_bank)
    supports = [groups.images(n, tested, support_bank, hypernet.config.input, hypernet.device)[0] for n in range(12)]
    found = measure._sketches(hypernet, iter(supports), None)
    own = [found['predicted'](number) for number in range(12)]
    assert any(torch.equal(own[number - 1][0], own[number][0]) for number in range(12)), 'or this shows nothing'
    for number in range(12):
        swapped, size = found['swapped_sketch'](number)
        assert not torch.equal(swapped, own[number][0])
        assert any(torch.equal(swapped, sketch) and size == images for sketch, images in own)


def test_a_control_with_the_whitening_of_another_network_is_refused(hypernet, bank, one_line):
    groups = TestGroups.draw(bank, count=1, n_way=2, n_shot=1, n_query=1)
    plain = timm.create_model('test_resnet', num_classes=0)
    with pytest.raises(InputError) as error:
        evaluate(hypernet, bank, groups, controls={'plain': (plain, torch.eye(7))}, progress=False)
    one_line(error, 'control plain', '7 features', str(plain.num_features))


@pytest.mark.parametrize('name', ['mean', 'std'])
def test_a_control_that_sees_images_otherwise_is_refused(name, hypernet, bank, one_line):
    plain = timm.create_model('test_resnet', num_classes=0)
    plain.pretrained_cfg[name] = (0.45, 0.45, 0.45)
    with pytest.raises(InputError) as error:
        evaluate(
            hypernet,
            bank,
            TestGroups.draw(bank, count=1, n_way=2, n_shot=1, n_query=1),
            controls={'plain': (plain, torch.eye(plain.num_features))},
            progress=False,
        )
    one_line(error, 'control plain', '0.45', hypernet.name)


def test_one_group_has_the_binomial_interval_and_no_gain_over_its_own_sketch(hypernet, support_bank):
    noisy = coloured(torch.arange(80) % 4, seed=9, noise=250)
    groups = TestGroups.draw(noisy, count=1, n_way=4, n_shot=2, n_query=18)
    plain = timm.create_model('test_resnet', num_classes=0)
    controls = {'plain': (plain, torch.eye(plain.num_features))}
    result = evaluate(hypernet, noisy, groups, controls=controls, progress=False)
    assert 'Wilson' in result['interval']
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert not {'swapped_sketch', 'mean_sketch'} & set(result['accuracy'])
    assert not any(name.startswith('conditioning_gain') for name in result)
    for row in [*result['accuracy'].values(), *result['accuracy_ridge'].values()]:
        low, high = share_interval(round(row['mean'] * 0.72), 72)
        assert_close(row['interval'], 50 * (high - low))
    gain = result['accuracy']['predicted']['mean'] - result['accuracy']['plain']['mean']
    assert_close(result['gain_over_plain']['mean'], gain, rtol=1e-4, atol=1e-4)
    assert 0 < result['gain_over_plain']['interval'] < 25
    assert 'Wilson' in format_table(result)


# Heads


def test_the_ridge_of_an_arm_is_that_of_its_features_in_its_space(hypernet, bank, groups, recorded, monkeypatch):
    spaces = []

    def record(features, labels, num_classes, whitening):
        spaces.append((features, labels, whitening))
        weight, bias = ridge_classifier(features, labels, num_classes, whitening)
        return -weight, -bias  # the ridge head alone gets worse

    right = evaluate(hypernet, bank, groups, progress=False)
    recorded['support'].clear()
    monkeypatch.setattr(measure, 'ridge_classifier', record)
    wrong = evaluate(hypernet, bank, groups, progress=False)
    assert wrong['accuracy'] == right['accuracy']
    assert right['accuracy_ridge']['raw_pixels']['mean'] == 100
    assert wrong['accuracy_ridge']['raw_pixels']['mean'] < 20
    assert_close([features for features, _, _ in spaces], recorded['support'], rtol=0, atol=0)
    for place, (_, labels, whitening) in enumerate(spaces):
        assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        if place % 5 < 3:  # predicted, swapped, mean
            assert torch.equal(whitening, hypernet.whitening)
        else:  # random weights, raw pixels
            assert whitening is None


# Conditions


def test_conditions_change_no_image_and_travel_in_the_file(bank, tmp_path):
    plain, groups = (TestGroups.draw(bank, count=6, n_way=3, n_shot=3, n_query=2, conditions=c) for c in (False, True))
    assert torch.equal(plain.support, groups.support)
    assert torch.equal(plain.query, groups.query)
    assert plain.conditions is None
    assert len(set(groups.conditions)) == 6
    assert groups.digest != plain.digest
    other = TestGroups(groups.support, groups.query, groups.conditions[::-1])
    assert other.digest != groups.digest
    plain.save(tmp_path / 'plain.json')
    assert set(json.loads((tmp_path / 'plain.json').read_text())) == {'support', 'query'}
    groups.save(tmp_path / 'groups.json')
    loaded = TestGroups.load(tmp_path / 'groups.json')
    assert loaded.conditions == groups.conditions
    assert loaded.digest == groups.digest
    assert TestGroups.load(tmp_path / 'plain.json').conditions is None


@pytest.mark.parametrize('size', [100, 4])
def test_a_group_is_seen_under_its_condition(size, monkeypatch):
    small_batches(monkeypatch, size)
    noise = torch.randint(100, 156, (40, 3, 16, 16), generator=torch.Generator().manual_seed(7))
    grey = ImageBank(noise.to(torch.uint8), torch.arange(40) % 4, 'abcd')
    groups = TestGroups.draw(grey, count=3, n_way=3, n_shot=3, n_query=2, conditions=True)
    config = InputConfig(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    for number, condition in enumerate(groups.conditions):
        shown = groups.images(number, grey, None, config, torch.device('cpu'))
        noises = []
        for images, places in zip(shown, (groups.support[number], groups.query[number]), strict=True):
            first, again = (torch.cat([batch for batch, _ in images.batches()]) for _ in range(2))
            assert torch.equal(first, again)
            quiet = dataclasses.replace(condition, noise=0.0).apply(grey.images[places.flatten()].float() / 255)
            found = first * torch.tensor(config.std)[:, None, None] + torch.tensor(config.mean)[:, None, None]
            noises.append((found - quiet)[:6].flatten())
            assert_close(float(noises[-1].std()), condition.noise, rtol=0.1, atol=0)
        assert torch.corrcoef(torch.stack(noises))[0, 1].abs() < 0.1


def test_every_arm_sees_support_and_query_under_the_condition(hypernet, bank, groups, recorded):
    inverted = Condition(order=(0, 1, 2), inverted=True)
    negatives = ImageBank(255 - bank.images, bank.labels, bank.class_names)
    one = evaluate(hypernet, negatives, groups, progress=False)
    expected = [*recorded['support'], *recorded['query']]
    recorded['support'].clear()
    recorded['query'].clear()
    conditioned = TestGroups(groups.support, groups.query, (inverted,) * 5)
    two = evaluate(hypernet, bank, conditioned, progress=False)
    assert_close([*recorded['support'], *recorded['query']], expected, rtol=1e-3, atol=1e-3)
    assert (one['conditions'], two['conditions']) == (False, True)
    assert evaluate(hypernet, bank, conditioned, progress=False) == two


# Another domain


def test_the_sketch_of_another_domain_gives_the_weights_of_its_arm(hypernet, bank, groups, monkeypatch):
    seen, sketch = [], measure.group_sketch

    def recording(net, support):
        seen.append(support)
        return sketch(net, support)

    monkeypatch.setattr(measure, 'group_sketch', recording)
    grey = torch.randint(0, 256, (30, 1, 16, 16), dtype=torch.uint8).expand(-1, 3, -1, -1).contiguous()
    other = ImageBank(grey, torch.arange(30) % 2, ['letter', 'digit'])
    conditioned = TestGroups(groups.support, groups.query, (Condition(order=(2, 1, 0)),) * 5)
    result = evaluate(hypernet, bank, conditioned, other=other, progress=False)
    picks = [images for images in seen if images.bank is other]
    assert [len(images) for images in picks] == [9] * 5
    assert len({tuple(images.places.tolist()) for images in picks}) == 5
    assert all(images.condition is None for images in picks)
    assert [images.condition for images in seen if images.bank is bank] == list(conditioned.conditions)
    assert result['other_classes'] == ['letter', 'digit']
    found = result['accuracy']['predicted']['mean'] - result['accuracy']['other_domain_sketch']['mean']
    assert_close(result['conditioning_gain_over_other_domain']['mean'], found)
    assert 'other_domain_sketch' in result['accuracy_ridge']
    assert evaluate(hypernet, bank, conditioned, other=other, progress=False) == result
    wrong = ImageBank(grey[..., :8], other.labels, other.class_names)
    with pytest.raises(InputError, match='3x16x8'):
        evaluate(hypernet, bank, groups, other=wrong, progress=False)
    for generator in hypernet.generators:
        torch.nn.init.zeros_(generator.embed.weight)
    blind = evaluate(hypernet, bank, groups, other=other, progress=False)
    assert blind['conditioning_gain_over_other_domain'] == {'mean': 0.0, 'interval': 0.0}


# Scratch


def test_centralised_gradients_have_no_mean_over_all_but_the_output():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 5))
    model(torch.randn(6, 3, 3, 3)).square().sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    scratch.centralise_gradients(model.parameters())
    kernel, bias, weight, offset = (parameter.grad for parameter in model.parameters())
    assert_close(kernel, before[0] - before[0].mean((1, 2, 3), keepdim=True))
    assert_close(weight, before[2] - before[2].mean(1, keepdim=True))
    assert (before[0].mean((1, 2, 3)).abs() > 1e-3).all()
    assert torch.equal(bias, before[1])
    assert torch.equal(offset, before[3])


def test_flips_and_shifts_move_each_image_by_itself():
    images = torch.rand(64, 2, 16, 8) + 1
    moved = scratch._flipped_and_shifted(images)
    ways = set()
    for image, found in zip(images, moved, strict=True):
        padded = torch.nn.functional.pad(torch.stack([image, image.flip(2)]), (1, 1, 2, 2))
        fits = [
            (flip, row, column)
            for flip in range(2)
            for row in range(5)
            for column in range(3)
            if torch.equal(padded[flip, :, row : row + 16, column : column + 8], found)
        ]
        assert len(fits) == 1
        ways.update(fits)
    assert len(ways) > 20


def colours_as_tensors(bank):
    return bank.images.float() / 127.5 - 1, bank.labels


@pytest.mark.parametrize('centralise', [False, True])
def test_training_from_scratch_learns_and_is_the_same_again(centralise, bank, support_bank, monkeypatch):
    calls, centralised = [], scratch.centralise_gradients
    monkeypatch.setattr(scratch, 'centralise_gradients', lambda p: calls.append(1) or centralised(p))
    before = torch.get_rng_state()

    monkeypatch.setattr(scratch, 'BATCH_SIZE', 16)

    def train(epochs=12):
        arguments = ('test_resnet', {}, *colours_as_tensors(support_bank), *colours_as_tensors(bank))
        return list(train_from_scratch(*arguments, num_epochs=epochs, centralise=centralise))

    curve = train()
    assert torch.equal(torch.get_rng_state(), before)
    assert [point['epoch'] for point in curve] == list(range(1, 13))
    seconds = [0.0, *(point['seconds'] for point in curve)]
    assert all(early < late for early, late in itertools.pairwise(seconds))
    assert curve[-1]['accuracy'] > 90
    assert curve[0]['accuracy'] < curve[-1]['accuracy']
    assert_close(curve[3]['accuracy'], 100 * float(curve[3]['right'].float().mean()))
    assert [point['accuracy'] for point in train(3)] == [point['accuracy'] for point in curve[:3]]
    assert len(calls) == (60 if centralise else 0)  # 4 batches in 15 epochs


def test_a_last_batch_of_one_image_does_not_stop_training(monkeypatch):
    monkeypatch.setattr(scratch, 'BATCH_SIZE', 8)
    images, labels = torch.randn(17, 3, 32, 32), torch.arange(17) % 2
    curve = train_from_scratch('test_resnet', {}, images, labels, images, labels, num_epochs=1)
    assert len(list(curve)) == 1
    with pytest.raises(InputError, match='num_epochs'):
        list(train_from_scratch('test_resnet', {}, images, labels, images, labels, num_epochs=0))


def test_scratch_stands_beside_the_predicted_network(hypernet, bank, support_bank, monkeypatch):
    groups = TestGroups.draw(bank, count=3, n_way=2, n_shot=5, n_query=8, support_bank=support_bank, conditions=True)
    sizes, train = [], scratch.train_from_scratch

    def recording(name, kwargs, images, labels, tested, answers, **more):
        sizes.append((len(images), labels.bincount().tolist(), len(tested), more['centralise']))
        return train(name, kwargs, images, labels, tested, answers, **more)

    monkeypatch.setattr(scratch, 'train_from_scratch', recording)
    monkeypatch.setattr(scratch, 'BATCH_SIZE', 8)
    result = compare_scratch(hypernet, bank, groups, support_bank, 2, num_epochs=8, progress=False)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    counts = [[[6, 12, 18, 24][label] for label in groups.classes(number, bank)] for number in range(2)]
    expected = [(sum(c), c, 16, centralise) for c in counts for centralise in (False, True)]
    assert sizes == expected
    assert (result['groups'], result['epochs'], result['training_images']) == (2, 8, sum(map(sum, counts)) / 2)
    measured = TestGroups(groups.support[:2], groups.query[:2], groups.conditions[:2])
    accuracies = evaluate(hypernet, bank, measured, support_bank=support_bank, progress=False)['accuracy']
    assert result['predicted']['accuracy'] == accuracies['predicted']
    assert 'all images' in result['setting']
    for name in ('adam', 'adam_centralised'):
        part = result[name]
        means = [point['accuracy']['mean'] for point in part['curve']]
        reached = [k for k, mean in enumerate(means) if mean >= accuracies['predicted']['mean']]
        if reached:
            assert part['seconds_to_predicted'] == part['curve'][reached[0]]['seconds']['mean']
            assert_close(part['seconds_ratio'], part['seconds_to_predicted'] / result['predicted']['seconds']['mean'])
            assert part['reached'] == 'yes'
        else:
            assert part['seconds_to_predicted'] is part['seconds_ratio'] is None
            assert 'not within 8' in part['reached']


def test_scratch_that_never_gets_there_says_so(hypernet, bank, support_bank, monkeypatch):
    groups = TestGroups.draw(bank, count=1, n_way=2, n_shot=5, n_query=8, support_bank=support_bank)
    monkeypatch.setattr(scratch, '_predicted', lambda *args: (torch.ones(16, dtype=torch.bool), 0.5))
    monkeypatch.setattr(scratch, 'RATE', 1e-9)
    settings = {'num_epochs': 1, 'progress': False}
    result = compare_scratch(hypernet, bank, groups, support_bank, 1, **settings)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result['predicted']['seconds'] == {'mean': 0.5, 'interval': None}
    assert result['adam']['curve'][0]['accuracy']['interval'] > 0
    assert result['adam']['seconds_ratio'] is None
    monkeypatch.setattr(scratch, '_predicted', lambda *args: (torch.zeros(16, dtype=torch.bool), 0.5))
    result = compare_scratch(hypernet, bank, groups, support_bank, 1, **settings)
    assert result['adam']['reached'] == 'yes'
    assert_close(result['adam']['seconds_ratio'], result['adam']['curve'][0]['seconds']['mean'] / 0.5)
    with pytest.raises(InputError, match='2 groups, there are 1'):
        compare_scratch(hypernet, bank, groups, support_bank, 2, progress=False)


# Images without labels


@pytest.mark.parametrize('with_bank', [False, True])
def test_unlabelled_images_are_in_neither_support_nor_query(with_bank, bank, support_bank, tmp_path):
    given = support_bank if with_bank else None
    asked = {'count': 8, 'n_way': 3, 'n_shot': 2, 'n_query': 3, 'support_bank': given}
    groups = TestGroups.draw(bank, **asked, n_unlabelled=4)
    same = TestGroups.draw(bank, **asked)
    assert_close((groups.support, groups.query), (same.support, same.query), rtol=0, atol=0)
    assert groups.digest != same.digest
    groups.save(tmp_path / 'groups.json')
    loaded = TestGroups.load(tmp_path / 'groups.json')
    assert (loaded.digest, loaded.n_unlabelled) == (groups.digest, 4)
    seen = []
    for number in range(8):
        support, query = loaded.images(number, bank, given, InputConfig(), torch.device('cpu'))
        rest = loaded.unlabelled(number, bank, given, InputConfig(), torch.device('cpu'))
        assert support.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert rest.labels.tolist() == [0] * 12
        classes = (given or bank).labels
        assert torch.equal(classes[rest.places], classes[support.places][::2].repeat_interleave(4))
        places = [*support.places.tolist(), *rest.places.tolist(), *([] if with_bank else query.places.tolist())]
        assert len(set(places)) == len(places)
        seen.append(tuple(rest.places.tolist()))
    assert len(set(seen)) == 8
    changed = json.loads((tmp_path / 'groups.json').read_text()) | {'n_unlabelled': '4'}
    (tmp_path / 'groups.json').write_text(json.dumps(changed))
    with pytest.raises(DamagedFileError, match='n_unlabelled'):
        TestGroups.load(tmp_path / 'groups.json')


def test_more_unlabelled_images_than_there_are_are_refused(bank, support_bank, one_line):
    with pytest.raises(InputError) as error:
        TestGroups.draw(bank, n_way=2, n_shot=3, n_query=3, n_unlabelled=5)
    one_line(error, "'red'", '10 images', '11')
    with pytest.raises(InputError, match="'red' has 6 images for support, a group needs 7"):
        TestGroups.draw(bank, n_way=2, n_shot=3, n_query=3, n_unlabelled=4, support_bank=support_bank)
    with pytest.raises(InputError, match='n_shot all leaves no image'):
        TestGroups.draw(bank, n_shot='all', n_query=3, n_unlabelled=1, support_bank=support_bank)
    for number in (-1, 2.5, 5000):
        with pytest.raises(InputError) as error:
            TestGroups.draw(bank, n_way=2, n_shot=3, n_query=3, n_unlabelled=number)
        one_line(error, 'n_unlabelled', '0 to 2048', str(number))


@pytest.mark.parametrize('whole', [True, False])
def test_a_self_trained_head_is_that_of_predict_model(whole, bank, monkeypatch):
    """The same images through the public function, which is never shown labels of the unlabelled ones."""
    if not whole:
        small_batches(monkeypatch)
    torch.manual_seed(3)
    net = PudNet.for_target('test_resnet', sketch_width=16, input=InputConfig(input_size=(3, 16, 16)))
    noisy = ImageBank(
        (bank.images.float() * 0.2 + 100 + 60 * torch.randn(bank.images.shape)).clamp(0, 255).byte(),
        bank.labels,
        bank.class_names,
    )
    groups = TestGroups.draw(noisy, count=6, n_way=4, n_shot=1, n_query=3, n_unlabelled=6)
    result = evaluate(net, noisy, groups, progress=False)
    right = blended = regressed = 0
    for number in range(6):
        support, query = groups.images(number, noisy, None, net.config.input, torch.device('cpu'))
        rest = groups.unlabelled(number, noisy, None, net.config.input, torch.device('cpu'))
        given, others = noisy.images[support.places], noisy.images[rest.places]
        model = predict_model('test_resnet', given, support.labels, unlabelled=others, hypernet=net)
        blend, logistic = (
            predict_model('test_resnet', given, support.labels, head=head, hypernet=net)
            for head in ('blend', 'logistic')
        )
        with torch.inference_mode():
            images = torch.cat([part for part, _ in query.batches()])
            right += int((model(images).argmax(1) == query.labels).sum())
            blended += int((blend(images).argmax(1) == query.labels).sum())
            regressed += int((logistic(images).argmax(1) == query.labels).sum())
    found = result['accuracy_self_training']
    assert_close(found['predicted']['mean'], 100 * right / 72, rtol=1e-4, atol=1e-4)
    assert_close(result['accuracy_blend']['predicted']['mean'], 100 * blended / 72, rtol=1e-4, atol=1e-4)
    assert result['accuracy_blend']['predicted'] != result['accuracy_ridge']['predicted']
    assert set(result['accuracy_blend']) == {*found} - {'raw_pixels'}
    assert set(found) == set(result['accuracy_ridge'])
    assert_close(
        result['self_training_gain']['mean'], found['predicted']['mean'] - result['accuracy_blend']['predicted']['mean']
    )
    assert_close(
        result['self_training_gain_over_raw_pixels']['mean'], found['predicted']['mean'] - found['raw_pixels']['mean']
    )
    assert (result['n_unlabelled'], result['support_images']) == (6, 4)
    table = format_table(result).splitlines()
    row = next(line for line in table if line.startswith('  raw_pixels'))  # which has no blend
    assert row.index(f'{found["raw_pixels"]["mean"]:7.2f}', 70) > table[1].index('self-training') - 8
    assert len({row['mean'] for row in found.values()}) > 1
    assert 'accuracy_logistic' not in result, 'with so few labels'
    monkeypatch.setattr('timm_pudnet.evaluation.measure.MANY_LABELS', 1)
    alone = evaluate(net, noisy, TestGroups(groups.support, groups.query), progress=False)
    for name in ('accuracy', 'accuracy_ridge', 'accuracy_blend'):
        assert alone[name] == result[name]
    assert_close(alone['accuracy_logistic']['predicted']['mean'], 100 * regressed / 72, rtol=1e-4, atol=1e-4)
    assert 'logistic' in format_table(alone).splitlines()[1]


def test_the_draw_of_unlabelled_images_stays_what_it_was(bank):
    """Published groups keep their number alone; these are the places that it stands for."""
    groups = TestGroups.draw(bank, count=3, n_way=2, n_shot=2, n_query=3, n_unlabelled=2)
    found = [
        groups.unlabelled(number, bank, None, InputConfig(), torch.device('cpu')).places.tolist() for number in range(3)
    ]
    assert found == [[28, 4, 21, 37], [0, 36, 23, 19], [32, 36, 22, 34]]


def test_scratch_has_no_use_for_images_without_labels(hypernet, bank, support_bank, one_line):
    groups = TestGroups.draw(bank, n_way=2, n_shot=2, n_query=3, n_unlabelled=2, support_bank=support_bank)
    with pytest.raises(InputError) as error:
        compare_scratch(hypernet, bank, groups, support_bank, 1)
    one_line(error, 'scratch', 'without unlabelled')


def test_hidden_labels_are_hidden(hypernet, bank, monkeypatch):
    """The head gets two labels a class and the other images in one heap; which class they are of changes nothing."""
    given = []

    def record(labelled, unlabelled, whitening):
        given.append((labelled.centroids.counts.tolist(), unlabelled[unlabelled.sum(1).argsort()]))
        return self_training_classifier(labelled, unlabelled, whitening)

    monkeypatch.setattr(measure, 'self_training_classifier', record)
    groups = TestGroups.draw(bank, count=1, n_way=4, n_shot=2, n_query=2, n_unlabelled=3)
    hidden = groups.unlabelled(0, bank, None, InputConfig(), torch.device('cpu')).places
    before = evaluate(hypernet, bank, groups, progress=False)
    # The images of hidden labels change places with each other: other images in these classes, the same set.
    images = bank.images.clone()
    images[hidden] = bank.images[hidden[torch.randperm(12, generator=torch.Generator().manual_seed(0))]]
    after = evaluate(hypernet, ImageBank(images, bank.labels, bank.class_names), groups, progress=False)
    assert after['accuracy_self_training'] == before['accuracy_self_training']
    half = len(given) // 2
    assert half == len(before['accuracy_self_training'])
    for (counts, rows), (others, mixed) in zip(given[:half], given[half:], strict=True):
        assert counts == others == [2, 2, 2, 2]
        assert rows.shape[0] == 12
        if rows.shape[1] > 20:  # not the pixels, which are in a basis of their span
            assert_close(mixed, rows, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name', ['swapped_sketch', 'mean_sketch', 'random_weights', 'raw_pixels', 'plain'])
def test_a_control_can_be_left_out(name, hypernet, bank, groups):
    plain = timm.create_model('test_resnet', num_classes=0)
    controls = {'plain': (plain, torch.eye(plain.num_features))}
    result = evaluate(hypernet, bank, groups, controls=controls, without=[name], progress=False)
    assert list(result['accuracy']) == [arm for arm in [*ARMS, 'plain', 'plain_own_statistics'] if arm != name]
    gains = {'swapped_sketch': 'conditioning_gain', 'mean_sketch': 'conditioning_gain_over_mean_sketch'}
    assert gains.get(name, f'gain_over_{name}') not in result


@pytest.mark.parametrize('name', ['predicted', 'swapped', 'other_domain_sketch'])
def test_what_is_not_measured_cannot_be_left_out(name, hypernet, bank, groups, one_line):
    with pytest.raises(InputError) as error:
        evaluate(hypernet, bank, groups, without=[name], progress=False)
    one_line(error, name, 'mean_sketch')


def test_groups_of_another_bank_are_told(bank, hypernet):
    groups = TestGroups.draw(bank, count=3, n_way=3, n_shot=2, n_query=2)
    shuffled = bank.part(torch.randperm(len(bank.labels), generator=torch.Generator().manual_seed(1)))
    with pytest.raises(InputError, match='not of this bank'):
        groups.check(shuffled)
    with pytest.raises(InputError, match='not of this bank'):
        evaluate(hypernet, shuffled, groups)


def test_two_controls_of_one_name_are_refused(bank, hypernet, groups):
    control = (create_feature_model(hypernet.target), torch.eye(hypernet.whitening.shape[0]))
    with pytest.raises(InputError, match='cannot be called plain_own_statistics'):
        evaluate(hypernet, bank, groups, controls={'plain': control, 'plain_own_statistics': control})


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_a_hypernetwork_in_training_or_in_another_type_is_measured_and_left_as_it_is(dtype, hypernet, bank, groups):
    wanted = evaluate(hypernet, bank, groups, progress=False, without=['random_weights', 'raw_pixels'])
    other = copy.deepcopy(hypernet).to(dtype).train()
    other.encoder.blocks[0].eval()
    modes = [part.training for part in other.modules()]
    found = evaluate(other, bank, groups, progress=False, without=['random_weights', 'raw_pixels'])
    assert [part.training for part in other.modules()] == modes
    assert {value.dtype for value in other.parameters()} == {dtype}
    assert abs(found['accuracy']['predicted']['mean'] - wanted['accuracy']['predicted']['mean']) <= 10
    assert other.eval().sketch(bank.images).dtype == torch.float32


def test_training_from_scratch_takes_two_images_at_least_at_a_time(bank, monkeypatch):
    monkeypatch.setattr(scratch, 'BATCH_SIZE', 1)
    images = bank.images[:5].float() / 255
    points = list(train_from_scratch('resnet18', {}, images, bank.labels[:5], images, bank.labels[:5], num_epochs=1))
    assert points[0]['epoch'] == 1


@pytest.fixture
def control(tmp_path):
    """Writes the folder of a control, of new weights."""

    def write(name, size=16, **kwargs):
        model = timm.create_model(name, num_classes=0, **kwargs)
        width = model.num_features
        model = with_own_config(model, InputConfig(input_size=(3, size, size)))
        save_control(tmp_path / 'plain', model, torch.eye(width), ['cup'])
        return tmp_path / 'plain'

    return write


@pytest.mark.parametrize('kwargs', [{}, {'act_layer': 'gelu'}], ids=str)
def test_a_control_of_the_network_that_is_predicted_is_read(kwargs, control):
    config = InputConfig(input_size=(3, 16, 16))
    hypernet = PudNet.for_target('test_resnet', model_kwargs=kwargs, sketch_width=16, input=config)
    path = control('test_resnet', **kwargs, drop_path_rate=0.1)  # which says something of its training alone
    (found,) = _read_controls([path], hypernet).values()
    assert_close(found[0].state_dict(), timm.create_model(f'local-dir:{path}', pretrained=True).state_dict())


@pytest.mark.parametrize(
    ('target', 'name', 'changes', 'needles'),
    [
        ('test_resnet', 'test_resnet', {'size': 32}, ['3x32x32', '3x16x16']),
        ('test_resnet', 'test_resnet', {'act_layer': 'gelu'}, ['act_layer="gelu"']),
        ('test_resnet', 'test_resnet', {'global_pool': 'max'}, ['global_pool="max"', 'global_pool="avg"']),
        ('mobilenetv3_small_075', 'tf_mobilenetv3_small_075', {}, ['is tf_mobilenet', 'predicts mobilenet']),
    ],
)
def test_a_control_of_other_images_or_of_another_network_with_the_same_tensors_is_refused(
    target, name, changes, needles, control, one_line
):
    config = InputConfig(input_size=(3, 16, 16))
    hypernet = PudNet.for_target(target, generator='residual', sketch_width=16, input=config)
    path = control(name, **changes)
    shapes = {key: value.shape for key, value in create_feature_model(hypernet.target).state_dict().items()}
    assert {key: value.shape for key, value in timm.create_model(name, num_classes=0).state_dict().items()} == shapes
    with pytest.raises(InputError) as error:
        _read_controls([path], hypernet)
    one_line(error, path, hypernet.name, 'train it by the recipe', *needles)


def test_images_without_labels_are_seen_under_the_condition_of_their_group(bank):
    groups = TestGroups.draw(bank, count=2, n_way=3, n_shot=3, n_query=2, n_unlabelled=4)
    inverted = Condition(order=(0, 1, 2), inverted=True)
    seen = TestGroups(groups.support, groups.query, (inverted,) * 2, 4)
    negatives = ImageBank(255 - bank.images, bank.labels, bank.class_names)
    config, device = InputConfig(), torch.device('cpu')
    for number in range(2):
        found = seen.unlabelled(number, bank, None, config, device).sample
        assert_close(found, groups.unlabelled(number, negatives, None, config, device).sample)


def test_a_support_bank_that_holds_most_tested_images_is_refused(bank, support_bank):
    picks = torch.arange(21)
    leaky = ImageBank(
        torch.cat([support_bank.images, bank.images[picks]]),
        torch.cat([support_bank.labels, bank.labels[picks]]),
        bank.class_names,
    )
    with pytest.raises(InputError, match='21 of the 40 tested images are in the support bank too: choose another'):
        TestGroups.draw(bank, count=1, n_way=4, n_shot=2, n_query=2, support_bank=leaky)


def test_every_epoch_from_scratch_draws_its_own_order_and_changes(monkeypatch):
    images, labels, shown, change = torch.randn(8, 3, 16, 16), torch.arange(8) % 2, [], scratch._flipped_and_shifted
    monkeypatch.setattr(scratch, '_flipped_and_shifted', lambda batch: shown.append(change(batch)) or shown[-1])
    for seed in (0, 1):
        list(train_from_scratch('test_resnet', {}, images, labels, images, labels, num_epochs=2, seed=seed))
    first, second, other, _ = shown
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_scratch_trains_under_the_condition_that_it_is_tested_under(hypernet, bank, support_bank, monkeypatch):
    shown = []

    def train(name, kwargs, images, labels, tested, answers, **how):
        shown.append((images, tested))
        yield {'epoch': 1, 'seconds': 1.0, 'accuracy': 50.0, 'right': answers == 0}

    monkeypatch.setattr(scratch, 'train_from_scratch', train)
    drawn = TestGroups.draw(bank, count=1, n_way=3, n_shot=3, n_query=2, support_bank=support_bank)
    inverted = TestGroups(drawn.support, drawn.query, (Condition(order=(0, 1, 2), inverted=True),))
    compare_scratch(hypernet, bank, inverted, support_bank, 1, num_epochs=1, progress=False)
    negatives, others = (ImageBank(255 - one.images, one.labels, one.class_names) for one in (bank, support_bank))
    compare_scratch(hypernet, negatives, drawn, others, 1, num_epochs=1, progress=False)
    assert_close(shown[:2], shown[2:], rtol=0, atol=1e-5)


def test_classes_that_were_seen_are_told(hypernet, bank, groups):
    hypernet.config = dataclasses.replace(hypernet.config, class_names=('another', bank.class_names[1].upper()))
    with pytest.warns(PudNetWarning, match=f'was trained on a class named {bank.class_names[1]!r}'):
        evaluate(hypernet, bank, groups, without=('random_weights', 'raw_pixels'), progress=False)


def test_a_control_in_half_precision_is_measured(hypernet, bank, groups):
    control = timm.create_model('test_resnet', num_classes=0).eval()
    whitening = torch.eye(len(hypernet.whitening))
    found = [
        evaluate(hypernet, bank, groups, controls={'plain': (model, whitening)}, progress=False)['accuracy']['plain']
        for model in (copy.deepcopy(control).half(), control)
    ]
    assert found[0]['mean'] == pytest.approx(found[1]['mean'], abs=5)


def test_groups_are_kept_in_somebody_s_home(bank, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    groups = TestGroups.draw(bank, count=2, n_way=3, n_shot=2, n_query=2)
    groups.save('~/groups.json')
    assert TestGroups.load('~/groups.json').digest == groups.digest
    assert (tmp_path / 'groups.json').is_file()


def test_copies_are_told_by_every_pixel():
    """`content_keys`, which looks at 4096 values at most, is not for this."""
    images = torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    images[1, 0, 0, 1] = 1
    keys = ImageBank(images, torch.zeros(3, dtype=torch.long), ['a']).keys
    assert keys[0] == keys[2]
    assert keys[0] != keys[1]
