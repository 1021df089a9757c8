import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from timm_pudnet.config import InputError
from timm_pudnet.sketch import (
    ImageSample,
    RunningBatchNorm2d,
    SketchEncoder,
    StreamingSketch,
    content_keys,
    kmeans_centroids,
)


def make_encoder(width=16):
    """An encoder whose norms have statistics and affine parameters of their own, as after training."""
    torch.manual_seed(1)
    encoder = SketchEncoder(3, width, (8, 12))
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.3, 2.0)
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, std=0.3)
    return encoder.eval()


ENCODER = make_encoder()
IMAGES = torch.randn(13, 3, 20, 24, generator=torch.Generator().manual_seed(2))
LABELS = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 0, 2])


def plain_features(encoder, images):
    """T of eq. 3, rewritten in float64."""
    x = images.double()
    for conv, _, norm in encoder.blocks:
        x = F.conv2d(x, conv.weight.double(), conv.bias.double(), stride=2, padding=2)
        x = torch.where(x > 0, x, 0.1 * x)
        mean, variance, weight, bias = (
            values.double()[:, None, None] for values in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        x = (x - mean) / (variance + norm.eps).sqrt() * weight + bias
    return x.sum((2, 3)) / (x.shape[2] * x.shape[3])


def sketch(images, labels=None, balance='none', chunk=5, num_clusters=8):
    stream = StreamingSketch(ENCODER, balance)
    stream.num_clusters = num_clusters
    for start in range(0, len(images), chunk):
        stream.add(images[start : start + chunk], None if labels is None else labels[start : start + chunk])
    return stream.result()


def coloured_clusters():
    """Images in three clear clusters of 20, 6 and 2."""
    centres = torch.tensor([[2.0, -2.0, 0.0], [-2.0, 2.0, 1.0], [0.0, 0.0, -3.0]])
    labels = torch.tensor([0] * 20 + [1] * 6 + [2] * 2)
    noise = 0.05 * torch.randn(28, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    return centres[labels][:, :, None, None] + noise, labels


def test_features_are_those_of_a_plain_rewrite():
    assert_close(ENCODER(IMAGES).double(), plain_features(ENCODER, IMAGES), rtol=1e-4, atol=1e-5)


def test_sketch_is_the_mean_feature():
    expected = torch.stack(list(plain_features(ENCODER, IMAGES))).mean(0).float()
    assert_close(sketch(IMAGES), expected, rtol=1e-4, atol=1e-5)
    assert_close(sketch(IMAGES, LABELS, 'none'), expected, rtol=1e-4, atol=1e-5)


def test_class_balanced_sketch_is_the_mean_of_class_means():
    features = plain_features(ENCODER, IMAGES)
    means = [
        torch.stack([f for f, y in zip(features, LABELS, strict=True) if y == label]).mean(0) for label in range(3)
    ]
    expected = (sum(means) / 3).float()
    assert_close(sketch(IMAGES, LABELS, 'class'), expected, rtol=1e-4, atol=1e-5)
    assert (sketch(IMAGES) - expected).abs().max() > 1e-3  # the classes are unequal, so balancing changes something


def test_kmeans_balanced_sketch_finds_clear_clusters_without_labels():
    images, labels = coloured_clusters()
    found = sketch(images, None, 'kmeans', num_clusters=3)
    assert_close(found, sketch(images, labels, 'class'), rtol=1e-4, atol=1e-5)
    assert (found - sketch(images)).abs().max() > 0.05


@settings(max_examples=15, deadline=None)
@given(
    order=st.permutations(range(len(IMAGES))),
    chunk=st.integers(1, 13),
    repeats=st.integers(1, 3),
    balance=st.sampled_from(['none', 'class']),
)
def test_order_chunking_and_duplication_do_not_change_a_sketch(order, chunk, repeats, balance):
    rows = torch.tensor(order).repeat(repeats)
    assert_close(
        sketch(IMAGES[rows], LABELS[rows], balance, chunk), sketch(IMAGES, LABELS, balance), rtol=1e-5, atol=1e-6
    )


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(28)), chunk=st.integers(1, 28))
def test_order_and_chunking_do_not_change_a_kmeans_sketch(order, chunk):
    images, _ = coloured_clusters()
    assert_close(
        sketch(images[list(order)], None, 'kmeans', chunk, num_clusters=3),
        sketch(images, None, 'kmeans', num_clusters=3),
        rtol=1e-5,
        atol=1e-6,
    )


def sketch_distance_in_training(encoder, first, second):
    """Relative distance of the sketches of two image sets that an encoder gives while it trains."""
    encoder.train()
    a, b = encoder(first).mean(0).detach(), encoder(second).mean(0).detach()
    return float((a - b).norm() / (a.norm() + b.norm()))


def literal_encoder():
    """The paper's wording: the same blocks, with ordinary BatchNorm."""
    encoder = make_encoder()
    for block in encoder.blocks:
        norm = nn.BatchNorm2d(block[2].num_features)
        norm.load_state_dict(block[2].state_dict())
        block[2] = norm
    return encoder


def test_sketches_of_different_sets_differ_in_training_and_with_ordinary_batch_norm_they_would_not():
    first, second = torch.rand(32, 3, 20, 20), 0.2 * torch.rand(32, 3, 20, 20) - 1.0
    assert sketch_distance_in_training(make_encoder(), first, second) > 0.05
    assert sketch_distance_in_training(literal_encoder(), first, second) < 1e-5


def test_sketches_still_differ_after_many_training_steps_on_both_sets():
    encoder, sets = make_encoder(), (torch.rand(16, 3, 20, 20), 0.2 * torch.rand(16, 3, 20, 20) - 1.0)
    encoder.train()
    with torch.no_grad():
        for step in range(200):
            encoder(sets[step % 2])
    assert sketch_distance_in_training(encoder, *sets) > 0.05


def test_training_sketch_teaches_every_conv_and_with_ordinary_batch_norm_it_would_not():
    images, direction = torch.rand(16, 3, 20, 20), torch.randn(16)

    def largest_last_gradient(encoder):
        (encoder.train()(images).mean(0) @ direction).backward()
        return [float(block[0].weight.grad.abs().max()) for block in encoder.blocks]

    assert min(largest_last_gradient(make_encoder())) > 1e-3
    assert largest_last_gradient(literal_encoder())[-1] < 1e-5


def test_running_batch_norm_equals_batch_norm_in_eval_mode():
    ours, theirs = RunningBatchNorm2d(5), nn.BatchNorm2d(5)
    ours.train()(torch.randn(4, 5, 6, 6) * 3 + 1)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(3, 5, 7, 7)
    assert_close(ours.eval()(images), theirs.eval()(images), rtol=0, atol=0)


def test_running_batch_norm_averages_its_first_batches():
    norm, batches = RunningBatchNorm2d(5).train(), torch.randn(3, 4, 5, 6, 6) * 2 + 3
    for batch in batches:
        norm(batch)
    assert_close(norm.running_mean, batches.mean((0, 1, 3, 4)))
    assert_close(norm.running_var, batches.var((1, 3, 4), correction=0).mean(0))


def test_running_batch_norm_forgets_its_first_batches():
    norm, mean, variance = RunningBatchNorm2d(5).train(), torch.zeros(5), torch.ones(5)
    for number, batch in enumerate(
        torch.randn(40, 4, 5, 6, 6) + torch.linspace(0, 3, 40)[:, None, None, None, None], 1
    ):
        norm(batch)
        mean = mean.lerp(batch.mean((0, 2, 3)), max(0.1, 1 / number))
        variance = variance.lerp(batch.var((0, 2, 3), correction=0), max(0.1, 1 / number))
    assert_close(norm.running_mean, mean)
    assert_close(norm.running_var, variance)
    assert mean.min() > 2, 'a plain average would be 1.5'


def test_sketching_leaves_the_encoder_as_it_was():
    encoder = make_encoder()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoder.train()
    StreamingSketch(encoder).add(IMAGES)
    assert_close(encoder.state_dict(), before, rtol=0, atol=0)


def test_threads_that_share_an_encoder_in_training_give_the_same_sketches_and_leave_it_as_it_was():
    encoder = make_encoder().train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoder.blocks[0].register_forward_pre_hook(lambda *_: time.sleep(0.005))  # others come between
    expected = StreamingSketch(encoder)
    expected.add(IMAGES)

    def sketch(number):
        time.sleep(0.001 * number)
        stream = StreamingSketch(encoder)
        stream.add(IMAGES)
        return stream.result()

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(sketch, range(12)):
            assert_close(found, expected.result())
    assert encoder.training
    assert_close(encoder.state_dict(), before, rtol=0, atol=0)


def test_an_image_s_feature_does_not_depend_on_its_batch():
    assert_close(torch.cat([ENCODER(image[None]) for image in IMAGES]), ENCODER(IMAGES), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('balance', ['none', 'class', 'kmeans'])
def test_a_sketch_of_no_images_is_refused(balance):
    with pytest.raises(InputError, match='at least one'):
        StreamingSketch(ENCODER, balance).result()


def test_wrong_balance_is_refused():
    with pytest.raises(InputError, match='none, class or kmeans'):
        StreamingSketch(ENCODER, 'classes')
    with pytest.raises(InputError, match='needs labels'):
        StreamingSketch(ENCODER, 'class').add(IMAGES)


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(30)), chunk=st.integers(1, 30), size=st.integers(1, 35), labelled=st.booleans())
def test_sample_is_the_images_of_the_smallest_keys_whatever_the_order(order, chunk, size, labelled):
    images = torch.randn(30, 1, 4, 4, generator=torch.Generator().manual_seed(4))
    labels = torch.arange(30)
    shuffled, sample = torch.tensor(order), ImageSample(size)
    for rows in shuffled.split(chunk):
        sample.add(images[rows], labels[rows] if labelled else None)
        assert len(sample.images) <= size
    keys = content_keys(images).tolist()
    expected = sorted(range(30), key=lambda row: keys[row])[:size]
    assert_close(sample.images, images[expected], rtol=0, atol=0)
    assert sample.labels is None if not labelled else sample.labels.tolist() == expected
    assert sample.complete == (size >= 30)
    assert sample.seen == 30
    assert sample.classes == (set(range(30)) if labelled else set())


def test_sample_is_not_chosen_by_brightness():
    sample = ImageSample(200)
    sample.add(torch.linspace(0, 1, 2000)[:, None, None, None].expand(2000, 1, 4, 4))
    assert 0.4 < sample.images.mean() < 0.6
    assert sample.images.max() > 0.9
    assert sample.images.min() < 0.1


def test_an_empty_sample_is_an_error():
    with pytest.raises(InputError, match='at least one'):
        _ = ImageSample(4).images


def test_sample_sizes_shrink_with_the_images():
    assert [ImageSample.for_size((3, side, side)).size for side in (32, 224, 4096)] == [1024, 334, 64]


def test_content_keys_depend_on_the_image_alone():
    images = torch.randn(300, 3, 40, 40)
    keys = content_keys(images)
    assert len(keys.unique()) == 300
    assert content_keys(images[7:8]).tolist() == keys[7:8].tolist()
    assert content_keys(images.flip(0)).tolist() == keys.flip(0).tolist()
    assert content_keys(images.contiguous(memory_format=torch.channels_last)).tolist() == keys.tolist()
    large = torch.randn(1, 3, 224, 224).repeat(4, 1, 1, 1)
    large[1, 0, :9] += 1
    large[2, 2, -9:] += 1
    large[3, 1, 100:120, 100:120] += 1
    assert len(content_keys(large).unique()) == 4
    small = torch.randn(2, 1, 5, 5)
    small[1] = small[0]
    small[1, 0, 3, 2] += 1e-6
    assert len(content_keys(small).unique()) == 2


def test_kmeans_gives_no_more_centroids_than_there_are_different_rows():
    rows = torch.tensor([[0.0], [0.0], [1.0]])
    assert kmeans_centroids(rows, 8).sort(0).values.tolist() == [[0.0], [1.0]]
    with pytest.raises(InputError, match='at least 1'):
        kmeans_centroids(rows, 0)


def test_kmeans_starts_from_rows_that_are_far_from_all_chosen_ones():
    places = torch.tensor([0.0, 12.0, 100.0, 130.0])
    rows = (places[:, None] + torch.tensor([-0.5, 0.0, 0.5])).view(-1, 1)
    assert kmeans_centroids(rows, 4).flatten().sort().values.tolist() == places.tolist()
