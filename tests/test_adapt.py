import copy

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from timm_pudnet.adapt import (
    LOGISTIC_PENALTY,
    SPREAD_FLOOR,
    StreamingBlend,
    StreamingCentroids,
    StreamingLogistic,
    StreamingRidge,
    Whitening,
    calibrate,
    centroid_classifier,
    centroid_logits,
    class_centroids,
    ridge_classifier,
    self_training_classifier,
)
from timm_pudnet.config import InputError
from timm_pudnet.target import batch_norms


@pytest.fixture
def model():
    """A feature model whose weights and statistics are unlike those of a new one."""
    model = timm.create_model('test_resnet', num_classes=0)
    for _, norm in batch_norms(model):
        nn.init.normal_(norm.weight, 1.0, 0.2)
        nn.init.normal_(norm.bias, std=0.2)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return model


def statistics(model):
    return {key: value.clone() for key, value in model.state_dict().items() if 'running' in key}


def test_calibrating_gives_what_the_calibrated_model_gives(model, random_images):
    images, prior = random_images()[0], statistics(model)
    found = calibrate(model.train(), images, prior)
    assert not model.training
    with torch.no_grad():
        assert_close(found, model(images), rtol=1e-5, atol=1e-5)


def test_without_a_prior_the_statistics_are_those_of_the_batch(model, random_images):
    images = random_images()[0]
    rival, rows = copy.deepcopy(model).train(), {}
    for name, norm in batch_norms(rival):
        norm.momentum = 1.0
        norm.register_forward_pre_hook(lambda _, x, name=name: rows.update({name: x[0].numel() // x[0].shape[1]}))
    with torch.no_grad():
        rival(images)
    calibrate(model, images, statistics(model), prior_images=0)
    theirs = dict(batch_norms(rival))
    for name, norm in batch_norms(model):
        biased = theirs[name].running_var * (rows[name] - 1) / rows[name]
        assert_close(norm.running_mean, theirs[name].running_mean, rtol=1e-4, atol=1e-4)
        assert_close(norm.running_var, biased, rtol=1e-4, atol=1e-4)


def test_a_prior_of_very_many_images_stays(model, random_images):
    prior = statistics(model)
    calibrate(model, random_images()[0], prior, prior_images=1e12)
    assert_close(statistics(model), prior, rtol=1e-5, atol=1e-5)


def test_blended_statistics_are_the_moments_of_the_mixture():
    norm, images = nn.BatchNorm2d(3), 2 * torch.randn(6, 3, 5, 5) + 1
    prior = {'0.running_mean': torch.tensor([0.0, -1.0, 4.0]), '0.running_var': torch.tensor([1.0, 0.1, 3.0])}
    calibrate(nn.Sequential(norm), images, prior, prior_images=2)
    rows = images.double().transpose(0, 1).flatten(1)
    mean = (6 * rows.mean(1) + 2 * prior['0.running_mean']) / 8
    square = (6 * rows.square().mean(1) + 2 * (prior['0.running_var'] + prior['0.running_mean'].square())) / 8
    assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    assert_close(norm.running_var.double(), square - mean.square(), rtol=1e-5, atol=1e-5)


def test_norms_after_the_first_take_no_more_than_their_share_from_the_images(model, random_images):
    images, prior = random_images()[0], statistics(model)
    calibrate(model, images, prior, prior_images=len(images), deep_share=0.1)
    inputs, norms = {}, dict(batch_norms(model))
    for name, norm in norms.items():
        norm.register_forward_pre_hook(lambda _, x, name=name: inputs.update({name: x[0]}))
    with torch.no_grad():
        model(images)
    for number, (name, norm) in enumerate(norms.items()):
        own, training = inputs[name].mean((0, 2, 3)), prior[f'{name}.running_mean']
        assert_close(norm.running_mean, torch.lerp(training, own, 0.1 if number else 0.5), rtol=1e-4, atol=1e-4)
    # It is the most that they count, not what they count.
    calibrate(model, images[:1], prior, prior_images=len(images), deep_share=0.9)
    capped = statistics(model)
    calibrate(model, images[:1], prior, prior_images=len(images))
    assert_close(statistics(model), capped, rtol=0, atol=0)


def test_the_spread_of_a_channel_far_from_zero_is_kept():
    norm, images = nn.BatchNorm2d(2), torch.randn(6, 2, 40, 40) * torch.tensor([1.0, 0.01])[:, None, None] + 1
    prior = {'0.running_mean': torch.zeros(2), '0.running_var': torch.ones(2)}
    calibrate(nn.Sequential(norm), images, prior, prior_images=0)
    assert_close(norm.running_var.double(), images.double().var((0, 2, 3), correction=0), rtol=2e-3, atol=0)


def test_after_calibrating_an_answer_does_not_depend_on_the_rest_of_the_batch(model, random_images):
    images = random_images(8)[0]
    calibrate(model, images, statistics(model))
    with torch.no_grad():
        alone = torch.cat([model(image[None]) for image in images])
        assert_close(model(images), alone, rtol=1e-4, atol=1e-4)
        among_others = model(torch.cat([images[:1], 100 * torch.randn(5, 3, 32, 32)]))
        assert_close(among_others[:1], alone[:1], rtol=1e-4, atol=1e-4)


def test_one_image_is_enough_to_calibrate(model):
    found = calibrate(model, torch.full((1, 3, 32, 32), 0.3), statistics(model))
    assert found.isfinite().all()


def test_no_images_are_refused(model):
    with pytest.raises(InputError, match='at least one'):
        calibrate(model, torch.zeros(0, 3, 32, 32), statistics(model))


def test_a_failed_calibration_leaves_no_hooks(model, random_images):
    def fail(images):
        model(images)
        raise RuntimeError('stop')

    with pytest.raises(RuntimeError, match='stop'):
        calibrate(model, random_images()[0], statistics(model), forward=fail)
    before = statistics(model)
    with torch.no_grad():
        model(random_images(seed=1)[0])
    assert_close(statistics(model), before, rtol=0, atol=0)


def plain_logits(support, labels, query, num_classes, temperature):
    """Eq. 7, rewritten in float64 with explicit loops."""
    centroids = []
    for label in range(num_classes):
        rows = [row.double() for row, y in zip(support, labels, strict=True) if y == label]
        centroids.append(sum(rows) / len(rows))
    return torch.stack(
        [
            torch.stack(
                [temperature * (f @ u) / (f.square().sum().sqrt() * u.square().sum().sqrt()) for u in centroids]
            )
            for f in query.double()
        ]
    )


def labelled_features(count=40, num_classes=4, width=9):
    labels = torch.arange(count) % (num_classes + 1) % num_classes  # class 0 has twice as many
    return torch.randn(count, width) + torch.eye(num_classes, width)[labels], labels


def test_logits_are_those_of_a_plain_rewrite():
    support, labels = labelled_features()
    query = torch.randn(7, 9)
    found = centroid_logits(query, class_centroids(support, labels, 4), torch.tensor(3.5))
    assert_close(found.double(), plain_logits(support, labels, query, 4, 3.5), rtol=1e-4, atol=1e-5)


def test_a_classifier_of_centroids_has_the_same_top_1():
    support, labels = labelled_features()
    query, centroids = torch.randn(500, 9) * torch.rand(500, 1) * 10, class_centroids(support, labels, 4)
    centroids = centroids * torch.tensor([0.1, 1.0, 10.0, 3.0])[:, None]  # cosines do not see this
    weight, bias = centroid_classifier(centroids, torch.eye(9))
    assert_close(weight.norm(dim=1), torch.ones(4))
    guesses = (query @ weight.t() + bias).argmax(1)
    assert torch.equal(guesses, plain_logits(centroids, torch.arange(4), query, 4, 10.0).argmax(1))
    assert not torch.equal(guesses, (query @ centroids.t()).argmax(1))


def spread_within_classes(count=4000):
    """Features of 4 classes whose images spread 5 times as far in the last two directions, and its whitening."""
    torch.manual_seed(1)
    labels = torch.arange(count) % 4
    stretch = torch.tensor([1.0] * 7 + [5.0] * 2)
    features = torch.randn(count, 9) * stretch + 20 * torch.eye(4, 9)[labels]
    learned = Whitening(9, shrinkage=0.0)
    for chunk in torch.arange(count).split(500):
        learned.add(features[chunk], labels[chunk])
    return features, labels, learned.result()


def test_whitening_makes_classes_spread_alike_in_all_directions():
    features, labels, whitening = spread_within_classes()
    spread = (features - class_centroids(features, labels, 4)[labels]) @ whitening
    covariance = spread.t() @ spread / len(spread)
    assert_close(covariance / covariance.diagonal().mean(), torch.eye(9), rtol=0, atol=0.06)
    assert_close(whitening, whitening.t())


def test_whitening_of_nothing_is_the_identity():
    assert torch.equal(Whitening(5).result(), torch.eye(5))


def test_shrinkage_draws_the_whitening_towards_the_identity():
    features, labels, sharp = spread_within_classes()
    learned = Whitening(9, shrinkage=100.0)
    learned.add(features, labels)
    assert (learned.result() - torch.eye(9)).abs().max() < 0.02 < (sharp - torch.eye(9)).abs().max()


def test_a_whitened_classifier_has_the_top_1_of_whitened_cosines():
    _, _, whitening = spread_within_classes()
    centroids, query = torch.randn(4, 9) + 1, torch.randn(500, 9) + 1
    weight, bias = centroid_classifier(centroids, whitening)
    guesses = (query @ weight.t() + bias).argmax(1)
    assert torch.equal(guesses, centroid_logits(query, centroids, 10.0, whitening).argmax(1))
    expected = plain_logits(centroids @ whitening, torch.arange(4), query @ whitening, 4, 10.0)
    assert torch.equal(guesses, expected.argmax(1))
    assert not torch.equal(guesses, centroid_logits(query, centroids, 10.0).argmax(1))


@settings(max_examples=25, deadline=None)
@given(chunks=st.lists(st.integers(1, 20), min_size=1, max_size=8), order=st.permutations(range(40)))
def test_streamed_centroids_are_the_class_means(chunks, order):
    torch.manual_seed(0)
    features, labels = labelled_features()
    expected = class_centroids(features.double(), labels, 4).float()
    features, labels, stream, start = features[list(order)], labels[list(order)], StreamingCentroids(4), 0
    for chunk in [*chunks, 40]:
        stream.add(features[start : start + chunk], labels[start : start + chunk])
        start += chunk
    assert_close(stream.result(), expected, rtol=1e-6, atol=1e-7)


def test_an_empty_class_is_named():
    stream = StreamingCentroids(3)
    with pytest.raises(InputError, match='no image of class 0, 1, 2'):
        stream.result()
    stream.add(torch.ones(2, 5), torch.tensor([0, 2]))
    with pytest.raises(InputError, match='no image of class 1: '):
        stream.result()


def test_gradients_flow_through_centroids_and_logits():
    support, labels = labelled_features()
    support, query = support.requires_grad_(), torch.randn(5, 9, requires_grad=True)
    temperature = torch.tensor(10.0, requires_grad=True)
    (centroid_logits(query, class_centroids(support, labels, 4), temperature) * torch.randn(5, 4)).sum().backward()
    assert all((tensor.grad.abs() > 0).all() for tensor in (support, query, temperature))


def plain_ridge(features, labels, num_classes, strength=0.3):
    """Weight and bias by numpy's least squares, the penalty as further rows of the data."""
    x, y = features.double().numpy(), np.eye(num_classes)[labels.numpy()]
    mean, shares = x.mean(0), y.mean(0)
    x, y = x - mean, y - shares
    penalty = strength * (x**2).sum() / len(x)
    rows = np.concatenate([x, np.sqrt(penalty) * np.eye(x.shape[1])])
    weight = np.linalg.lstsq(rows, np.concatenate([y, np.zeros((x.shape[1], num_classes))]), rcond=None)[0].T
    return torch.from_numpy(weight).float(), torch.from_numpy(shares - weight @ mean).float()


def streamed_ridge(features, labels, chunks=(), whitening=None, **kwargs):
    stream, start = StreamingRidge(4, **kwargs), 0
    for chunk in [*chunks, len(features)]:
        stream.add(features[start : start + chunk], labels[start : start + chunk])
        start += chunk
    return stream.classifier(whitening)


@pytest.mark.parametrize('count', [5, 8, 9, 40, 3000])
@pytest.mark.parametrize('strength', [0.01, 1.0, 5.0])
def test_ridge_is_that_of_a_plain_rewrite(count, strength):
    features, labels = labelled_features(count)
    features = 3 * features + 7
    expected = plain_ridge(features, labels, 4, strength)
    assert expected[0].abs().max() > 1e-3
    assert_close(streamed_ridge(features, labels, strength=strength), expected, rtol=1e-5, atol=1e-6)
    assert_close(ridge_classifier(features, labels, 4, strength=strength), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('count', [8, 40])
def test_ridge_of_whitened_features_is_mapped_back(count):
    features, labels = labelled_features(count)
    _, _, whitening = spread_within_classes()
    weight, bias = plain_ridge(features.double() @ whitening.double(), labels, 4)
    expected = weight @ whitening, bias
    assert_close(streamed_ridge(features, labels, whitening=whitening), expected, rtol=1e-4, atol=1e-5)
    assert_close(ridge_classifier(features, labels, 4, whitening), expected, rtol=1e-4, atol=1e-5)
    assert (ridge_classifier(features, labels, 4)[0] - expected[0]).abs().max() > 1e-3


@settings(max_examples=25, deadline=None)
@given(chunks=st.lists(st.integers(1, 20), max_size=8), order=st.permutations(range(40)))
def test_neither_order_nor_batches_change_the_ridge(chunks, order):
    torch.manual_seed(0)
    features, labels = labelled_features()
    found = streamed_ridge(features[list(order)], labels[list(order)], chunks)
    assert_close(found, streamed_ridge(features, labels), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('count', [8, 400])
def test_the_scale_of_features_does_not_change_the_answers_of_the_ridge(count):
    features, labels = labelled_features(count)
    query = torch.randn(50, 9)
    answers = []
    for scale in (1e-3, 1.0, 1e4):
        weight, bias = ridge_classifier(scale * features, labels, 4)
        answers.append(scale * query @ weight.t() + bias)
    assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-4)
    assert_close(answers[2], answers[1], rtol=1e-4, atol=1e-4)
    assert answers[1].std(0).min() > 0.01


def test_the_ridge_is_held_back_with_few_images_and_free_with_many():
    """With many images the penalty vanishes against the data; with few the weights are much smaller than without."""
    for count, low, high in ((5, 0.0, 0.8), (20_000, 0.99, 1.0)):
        features, labels = labelled_features(count)
        ratio = ridge_classifier(features, labels, 4)[0].norm() / plain_ridge(features, labels, 4, 1e-9)[0].norm()
        assert low < ratio < high


def test_memory_of_the_ridge_does_not_grow_with_the_images():
    stream = StreamingRidge(4)
    for _ in range(3):
        stream.add(*labelled_features())
        tensors = [value for value in {**vars(stream), **vars(stream.centroids)}.values() if torch.is_tensor(value)]
        assert sum(tensor.numel() for tensor in tensors) == 9 * 9 + 4 * 9 + 4
        assert {tensor.dtype for tensor in tensors} == {torch.float64, torch.int64}


def test_features_without_spread_give_the_shares_of_the_classes():
    labels = torch.tensor([0, 0, 0, 1])
    for features in (torch.zeros(4, 9), torch.full((4, 9), 0.1), torch.full((4, 3), 0.1)):
        weight, bias = ridge_classifier(features, labels, 2)
        assert_close(features @ weight.t() + bias, torch.tensor([[0.75, 0.25]] * 4), rtol=1e-3, atol=1e-3)


def test_an_empty_class_of_the_ridge_is_named():
    stream = StreamingRidge(3, ['cup', 'jar', 'pan'])
    with pytest.raises(InputError, match='no image of class cup, jar, pan'):
        stream.classifier()
    stream.add(torch.ones(2, 5), torch.tensor([0, 2]))
    with pytest.raises(InputError, match='no image of class jar: '):
        stream.classifier()
    with pytest.raises(InputError, match='no image of class 1: '):
        ridge_classifier(torch.ones(2, 5), torch.tensor([0, 2]), 3)


def plain_self_training(labelled, labels, unlabelled, num_classes):
    """numpy: ridge on hard and soft labels by least squares, five rounds and the last fit."""

    def softmax(scores):
        powers = np.exp(np.log(99 * (num_classes - 1)) * (scores - scores.max(1, keepdims=True)))
        return powers / powers.sum(1, keepdims=True)

    weight, bias = plain_ridge(labelled, labels, num_classes)
    x, rest = labelled.double().numpy(), unlabelled.double().numpy()
    first = guess = softmax(rest @ weight.double().numpy().T + bias.double().numpy())
    both = np.concatenate([x, rest])
    centred = both - both.mean(0)
    penalty = (centred**2).sum() / len(both)
    for step in range(6):
        y = np.concatenate([np.eye(num_classes)[labels.numpy()], guess])
        rows = np.concatenate([centred, np.sqrt(penalty) * np.eye(x.shape[1])])
        goal = np.concatenate([y - y.mean(0), np.zeros((x.shape[1], num_classes))])
        weight = np.linalg.lstsq(rows, goal, rcond=None)[0].T
        class_means = [np.average(both, axis=0, weights=y[:, k]) for k in range(num_classes)]
        bias = -weight @ np.mean(class_means, axis=0)
        if step < 5:
            guess = 0.7 * softmax(rest @ weight.T + bias) + 0.3 * first
    return torch.from_numpy(weight).float(), torch.from_numpy(bias).float()


def self_trained(features, labels, unlabelled, whitening=None):
    ridge = StreamingRidge(4)
    ridge.add(features, labels)
    return self_training_classifier(ridge, unlabelled, whitening)


@pytest.mark.parametrize('whitened', [False, True])
@pytest.mark.parametrize('count', [1, 300])
def test_self_training_is_that_of_a_plain_rewrite(count, whitened):
    features, labels = labelled_features(12)
    unlabelled = labelled_features(400)[0][-count:] + 0.3
    _, _, whitening = spread_within_classes()
    if not whitened:
        whitening = torch.eye(9)
    weight, bias = plain_self_training(features @ whitening, labels, unlabelled @ whitening, 4)
    expected = weight @ whitening, bias
    found = self_trained(features, labels, unlabelled, whitening if whitened else None)
    assert_close(found, expected, rtol=1e-3, atol=1e-4)
    alone = ridge_classifier(features, labels, 4, whitening)[0]
    assert (found[0] - alone).abs().max() > 1e-3


@pytest.mark.parametrize('shares', [(1, 1, 1, 1), (8, 4, 2, 1)])
def test_unlabelled_images_help_where_labels_are_few(shares):
    """Four clouds in 32 dimensions, two labels each: what the others tell about the clouds, also in unequal numbers."""
    torch.manual_seed(0)
    right = {'alone': 0.0, 'with': 0.0}
    for _ in range(10):
        places = 1.2 * torch.randn(4, 32)
        counts = torch.tensor(shares) * 400 // sum(shares)
        rest = places.repeat_interleave(counts, 0) + 2 * torch.randn(int(counts.sum()), 32)
        labels, tests = torch.arange(4).repeat(2), torch.arange(4).repeat(200)
        features, tested = places[labels] + 2 * torch.randn(8, 32), places[tests] + 2 * torch.randn(800, 32)
        for name, (weight, bias) in {
            'alone': ridge_classifier(features, labels, 4),
            'with': self_trained(features, labels, rest),
        }.items():
            right[name] += float(((tested @ weight.t() + bias).argmax(1) == tests).float().mean()) / 10
    assert right['with'] > right['alone'] + 0.05, right


def test_neither_order_nor_scale_changes_self_training():
    features, labels = labelled_features(12)
    unlabelled, query = labelled_features(100)[0], torch.randn(50, 9)
    answers = []
    for scale, order in ((1.0, torch.arange(100)), (1e-3, torch.arange(100).flip(0)), (1e4, torch.randperm(100))):
        weight, bias = self_trained(scale * features, labels, scale * unlabelled[order])
        answers.append(scale * query @ weight.t() + bias)
    assert_close(answers[1], answers[0], rtol=1e-3, atol=1e-4)
    assert_close(answers[2], answers[0], rtol=1e-3, atol=1e-4)
    assert answers[0].std(0).min() > 0.01


def test_self_training_of_features_without_spread_is_finite():
    for weight, bias in (
        self_trained(torch.full((4, 3), 0.1), torch.arange(4), torch.full((2, 3), 0.1)),
        self_trained(torch.zeros(4, 3), torch.arange(4), torch.zeros(1, 3)),
    ):
        assert weight.isfinite().all()
        assert bias.isfinite().all()


def test_thousands_of_images_that_are_alike_are_no_error():
    rows = torch.full((1, 64), 30.0) + 1e-4 * torch.randn(64)
    labels = torch.arange(4).repeat(500)
    weight, bias = self_trained(rows.repeat(2000, 1), labels, rows.repeat(3000, 1))
    assert weight.isfinite().all()
    assert bias.isfinite().all()


def test_self_training_of_one_class_is_refused():
    ridge = StreamingRidge(1)
    ridge.add(torch.randn(3, 5), torch.zeros(3, dtype=torch.long))
    with pytest.raises(InputError, match='one class only'):
        self_training_classifier(ridge, torch.randn(9, 5))


def test_a_class_without_a_labelled_image_is_named_in_spite_of_others():
    with pytest.raises(InputError, match='no image of class 3: '):
        self_trained(torch.randn(3, 5), torch.arange(3), torch.randn(9, 5))


def plain_blend(features, labels, num_classes, generative):
    """numpy: naive Bayes or centroids, scaled by least squares to one-hot classes, and ridge by images a feature."""
    x, y = features.double().numpy(), np.eye(num_classes)[labels.numpy()]
    means = (y.T @ x) / y.sum(0)[:, None]
    if generative == 'bayes':
        seen = y.sum(0).min() * means + 2 * means.mean()
        rows = np.log(seen / seen.sum(1, keepdims=True))
    else:
        rows = means / np.linalg.norm(means, axis=1, keepdims=True)
    rows = rows - rows.mean(0)
    scores = x @ rows.T
    scores, targets = scores - scores.mean(0), y - y.mean(0)
    scale = np.linalg.lstsq(scores.reshape(-1, 1), targets.reshape(-1), rcond=None)[0][0]
    weight, bias = (value.double().numpy() for value in plain_ridge(features, labels, num_classes))
    images, width = x.shape
    weight = (2 * width * scale * rows + images * weight) / (images + 2 * width)
    return torch.from_numpy(weight).float(), torch.from_numpy(images * bias / (images + 2 * width)).float()


def streamed_blend(features, labels, chunks=(), whitening=None):
    stream, start = StreamingBlend(4), 0
    for chunk in [*chunks, len(features)]:
        stream.add(features[start : start + chunk], labels[start : start + chunk])
        start += chunk
    return stream.classifier(whitening)


@pytest.mark.parametrize('count', [5, 9, 40, 3000])
def test_blend_is_that_of_a_plain_rewrite(count):
    features, labels = labelled_features(count)
    assert features.min() < 0
    by = {
        'centroids': plain_blend(features, labels, 4, 'centroids'),
        'bayes': plain_blend(features.relu(), labels, 4, 'bayes'),
    }
    assert_close(streamed_blend(features, labels), by['centroids'], rtol=1e-4, atol=1e-5)
    assert_close(streamed_blend(features.relu(), labels), by['bayes'], rtol=1e-4, atol=1e-5)
    assert_close(streamed_blend(features.relu(), labels, whitening=torch.eye(9)), by['bayes'], rtol=1e-4, atol=1e-5)
    other = plain_blend(features.relu(), labels, 4, 'centroids')
    assert count > 40 or (other[0] - by['bayes'][0]).abs().max() > 1e-3


@pytest.mark.parametrize('count', [8, 40])
def test_blend_of_whitened_features_is_mapped_back(count):
    features, labels = labelled_features(count)
    features = features.relu()  # and no naive Bayes, for what is read may be negative
    _, _, whitening = spread_within_classes()
    weight, bias = plain_blend(features.double() @ whitening.double(), labels, 4, 'centroids')
    assert_close(
        streamed_blend(features, labels, whitening=whitening), (weight @ whitening, bias), rtol=1e-4, atol=1e-5
    )


@settings(max_examples=25, deadline=None)
@given(chunks=st.lists(st.integers(1, 20), max_size=8), order=st.permutations(range(40)))
def test_neither_order_nor_batches_change_the_blend(chunks, order):
    torch.manual_seed(0)
    features, labels = labelled_features()
    features = features.relu()
    found = streamed_blend(features[list(order)], labels[list(order)], chunks)
    assert_close(found, streamed_blend(features, labels), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('counts', [True, False])
def test_the_scale_of_features_does_not_change_the_answers_of_the_blend(counts):
    features, labels = labelled_features(40)
    features, query = (value.relu() if counts else value for value in (features, torch.randn(50, 9)))
    answers = []
    for scale in (1e-3, 1.0, 1e4):
        weight, bias = streamed_blend(scale * features, labels)
        answers.append(scale * query @ weight.t() + bias)
    assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-4)
    assert_close(answers[2], answers[1], rtol=1e-4, atol=1e-4)
    assert answers[1].std(0).min() > 0.01


def test_the_blend_leans_on_the_ridge_the_more_images_there_are():
    shares = []
    for count in (8, 90, 20_000):
        features, labels = labelled_features(count)
        blend, ridge = streamed_blend(features.relu(), labels)[0], streamed_ridge(features.relu(), labels)[0]
        generative = blend - ridge * count / (count + 18)
        shares.append(float((blend - generative).norm() / (blend.norm() + generative.norm())))
    assert shares[0] < shares[1] < shares[2]
    assert shares[2] > 0.98


@pytest.mark.parametrize('value', [0.0, 0.1])
def test_a_blend_of_features_without_spread_is_finite(value):
    labels = torch.tensor([0, 0, 0, 1, 2, 3])
    weight, bias = streamed_blend(torch.full((6, 9), value), labels)
    assert torch.isfinite(weight).all()
    assert torch.isfinite(bias).all()


def test_the_blend_is_better_than_ridge_and_centroids_with_few_labels_and_as_good_with_many():
    """On Poisson counts of classes that differ in rare channels, not in loud ones, which naive Bayes is made for."""
    torch.manual_seed(0)
    rates = torch.rand(4, 60).pow(4) * 3 + 0.02
    rates[:, :10] = 10

    def draw(count):
        labels = torch.arange(count) % 4
        return torch.poisson(rates[labels] * torch.rand(count, 1).mul(2)), labels

    query, wanted = draw(4000)
    found = {}
    for count in (8, 4000):
        features, labels = draw(count)
        heads = {'ridge': streamed_ridge(features, labels), 'blend': streamed_blend(features, labels)}
        heads['centroid'] = centroid_classifier(class_centroids(features, labels, 4), torch.eye(60))
        for name, (weight, bias) in heads.items():
            found[name, count] = float(((query @ weight.t() + bias).argmax(1) == wanted).float().mean())
    for other in ('ridge', 'centroid'):
        assert found['blend', 8] > found[other, 8] + 0.01
        assert found['blend', 4000] > found[other, 4000] - 0.01
    assert found['blend', 4000] > found['blend', 8]


def test_the_blend_prefers_no_class_for_its_number_of_images():
    """As the features are, the small class is guessed about as often as the others; the ridge forgets it."""
    torch.manual_seed(0)
    rates = torch.rand(4, 200).pow(4) * 3 + 0.02

    def draw(counts):
        labels = torch.arange(4).repeat_interleave(torch.tensor(counts))
        return torch.poisson(rates[labels] * torch.rand(len(labels), 1).mul(0.2)), labels

    query, wanted = draw([2000] * 4)
    recalls = {}
    for head in (StreamingRidge, StreamingBlend):
        stream = head(4)
        stream.add(*draw([40, 40, 40, 2]))
        weight, bias = stream.classifier()
        right = (query @ weight.t() + bias).argmax(1) == wanted
        recalls[head] = right.view(4, -1).float().mean(1)
    assert recalls[StreamingRidge][3] < 0.2
    assert recalls[StreamingBlend][3] > 2 * recalls[StreamingRidge][3]
    assert recalls[StreamingBlend].mean() > recalls[StreamingRidge].mean()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_blend_of_features_that_differ_by_rounding_alone_is_finite(seed):
    torch.manual_seed(seed)
    labels = (torch.arange(50) >= 45).long()
    features = torch.rand(1, 64).expand(50, 64) * (1 + 1e-7 * (torch.rand(50, 1) > 0.5))
    stream = StreamingBlend(2)
    stream.add(features, labels)
    weight, bias = stream.classifier()
    generative = weight - StreamingRidge.classifier(stream)[0] * 50 / (50 + 2 * 64)
    assert torch.isfinite(generative).all()
    assert generative.abs().max() < 1e3
    assert torch.isfinite(bias).all()


def streamed_logistic(features, labels, chunks=(), whitening=None):
    stream, start = StreamingLogistic(4), 0
    for size in (*chunks, len(features)):
        stream.add(features[start : start + size], labels[start : start + size])
        start += size
    return stream.classifier(whitening)


def four_classes(count, seed=0):
    """Images of four classes, some of which are many times clearer than others."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    clear = torch.rand(count, 1, generator=generator).log().neg()
    ways = torch.randn(4, 9, generator=torch.Generator().manual_seed(9))
    return 3 * clear * ways[labels] + torch.randn(count, 9, generator=generator), labels


@pytest.mark.parametrize('count', [8, 300])
def test_the_logistic_regression_is_where_the_gradient_of_a_plain_rewrite_is_zero(count):
    features, labels = four_classes(count)
    weight, bias = (part.double().requires_grad_() for part in streamed_logistic(features, labels))
    deviation = features.double().std(0, correction=0)
    deviation = deviation + SPREAD_FLOOR * deviation.mean()
    loss = F.cross_entropy(features.double() @ weight.t() + bias, labels, reduction='sum')
    loss = loss + LOGISTIC_PENALTY * (weight * deviation).square().sum()
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert gradient.abs().max() < 1e-3 * count


@settings(max_examples=10, deadline=None)
@given(chunks=st.lists(st.integers(1, 9), max_size=3), order=st.permutations(range(24)))
def test_neither_order_nor_batches_change_the_logistic_regression(chunks, order):
    features, labels = four_classes(24)
    found = streamed_logistic(features[list(order)], labels[list(order)], chunks)
    assert_close(found, streamed_logistic(features, labels), rtol=1e-3, atol=1e-4)


def test_the_logistic_regression_of_whitened_features_is_mapped_back():
    features, labels = four_classes(40)
    root = torch.randn(9, 9, generator=torch.Generator().manual_seed(2))
    whitening = torch.eye(9) + root @ root.t() / 9
    weight, bias = streamed_logistic((features.double() @ whitening.double()).float(), labels)
    found = streamed_logistic(features, labels, whitening=whitening)
    assert_close(found, (weight @ whitening, bias), rtol=1e-3, atol=1e-4)


def test_the_scale_of_features_does_not_change_the_answers_of_the_logistic_regression():
    features, labels = four_classes(60)
    answers = []
    for scale in (1e-3, 1.0, 1e3):
        weight, bias = streamed_logistic(scale * features, labels)
        answers.append((scale * features @ weight.t() + bias).softmax(1))
    assert_close(answers[0], answers[1], rtol=1e-2, atol=1e-3)
    assert_close(answers[2], answers[1], rtol=1e-2, atol=1e-3)


def test_the_logistic_regression_is_the_best_head_with_many_labels():
    features, labels = four_classes(4000)
    tested, truth = four_classes(4000, seed=1)
    heads = {
        'logistic': streamed_logistic(features, labels),
        'ridge': streamed_ridge(features, labels),
        'blend': streamed_blend(features, labels),
    }
    found = {name: float(((tested @ w.t() + b).argmax(1) == truth).float().mean()) for name, (w, b) in heads.items()}
    assert found['logistic'] > max(found['ridge'], found['blend']) + 0.005, found
    assert found['logistic'] < 0.99


@pytest.mark.parametrize('value', [0.0, 0.3])
def test_a_logistic_regression_of_features_without_spread_is_finite(value):
    weight, bias = streamed_logistic(torch.full((6, 9), value), torch.tensor([0, 1, 2, 3, 3, 3]))
    assert weight.isfinite().all()
    assert (torch.full((9,), value) @ weight.t() + bias).argmax() == 3, 'the most frequent class'


def test_a_class_without_an_image_has_no_logistic_regression():
    stream = StreamingLogistic(2, ['cup', 'jar'])
    stream.add(torch.rand(3, 4), torch.zeros(3, dtype=torch.long))
    with pytest.raises(InputError, match='no image of class jar'):
        stream.classifier()


def test_a_channel_that_is_the_same_everywhere_has_no_negative_variance():
    norm, images = nn.BatchNorm2d(3), torch.tensor([1.1, 1234.567, 98765.4])[:, None, None].expand(5, -1, 7, 7)
    prior = {'0.running_mean': torch.zeros(3), '0.running_var': torch.ones(3)}
    assert calibrate(nn.Sequential(norm), images, prior, prior_images=0).isfinite().all()
    assert (norm.running_var >= 0).all()


def test_the_spread_of_a_channel_far_from_zero_is_kept_over_many_images():
    norm, images = nn.BatchNorm2d(1), 1 + 0.003 * torch.randn(1000, 1, 8, 8)
    prior = {'0.running_mean': torch.zeros(1), '0.running_var': torch.ones(1)}
    calibrate(nn.Sequential(norm), images, prior, prior_images=0)
    assert_close(norm.running_var.double(), images.double().var((0, 2, 3), correction=0), rtol=1e-3, atol=0)
