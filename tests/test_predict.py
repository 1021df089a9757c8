"""predict.py: from images in any form to an ordinary timm model that lives without this package."""

import copy
import errno
import io
import json
import logging
import os
import pickle
import re
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from timm_pudnet import (
    InputConfig,
    InputError,
    NotFoundError,
    OutputExistsError,
    PudNet,
    PudNetError,
    PudNetWarning,
    UnsupportedTargetError,
    create_model,
    finetune,
    load_hypernet,
    open_images,
    predict_model,
    predict_state_dict,
    save_model,
)
from timm_pudnet import predict as room
from timm_pudnet.adapt import HEADS, ridge_classifier, self_training_classifier
from timm_pudnet.devices import own_defaults, usable_device
from timm_pudnet.files import folder_written_whole, written_whole
from timm_pudnet.hypernet import on_device
from timm_pudnet.predict import _write_head, in_memory
from timm_pudnet.sketch import ImageSample
from timm_pudnet.target import batch_norms, pretrained_cfg_of

NAMES = ('cup', 'jar', 'pan')


def test_an_architecture_that_fetches_a_part_of_itself_is_one_line_without_a_network(monkeypatch, one_line):
    kwargs = {'sketch_width': 8, 'min_predicted': 0.0, 'generator': 'residual'}
    network = PudNet.for_target('vit_small_resnet26d_224', **kwargs).eval()

    def create_model(*args, **kwargs):
        raise FileNotFoundError('cannot find the file on the Hub')

    monkeypatch.setattr(room.timm, 'create_model', create_model)
    with pytest.raises(NotFoundError) as error:
        room.build_model(network, network.target, network(torch.zeros(8)), 2, None, {})
    one_line(error, 'vit_small_resnet26d_224', 'timm fetches', 'on the Hub')


@pytest.mark.parametrize('bounds', [(-2.0, 2.0), (1.5, 2.0)])
def test_leaving_out_random_draws_never_waits_for_one(bounds, monkeypatch):
    def full_of_leftovers(like, **_):
        return torch.full_like(like.detach(), 1e9)

    monkeypatch.setattr(torch, 'empty_like', full_of_leftovers)
    left_out = torch.nn.Parameter(torch.zeros(64))

    def run():
        with room._NoRandomInit():
            torch.nn.init.trunc_normal_(torch.nn.Parameter(torch.full((64,), 1e9)), 0, 1, *bounds)
            torch.nn.init.normal_(left_out)
        done.append(True)

    done = []
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(30)
    assert done
    assert not left_out.any()


@pytest.fixture(scope='module')
def net(tiny_folder):
    """Not to be changed."""
    return load_hypernet(tiny_folder)


@pytest.fixture(scope='module')
def support(pictures):
    return pictures(18)


@pytest.fixture(scope='module')
def model(net, support):
    """Predicted from the uint8 array; not to be changed."""
    return predict_model('test_resnet', *support, hypernet=net)


@pytest.fixture(scope='module')
def query(net, pictures):
    """Other pictures of the classes, as the network wants them, and their class numbers."""
    pixels, names = pictures(24, seed=1)
    ((images, _),) = open_images(pixels, input=net.config.input).batches()
    return images, torch.tensor([NAMES.index(name) for name in names])


def state_close(actual, expected, tolerance=1e-5):
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert_close(actual[key], value, rtol=tolerance, atol=tolerance, msg=lambda text, key=key: f'{key}: {text}')


def same_model(actual, expected, images):
    state_close(actual.state_dict(), expected.state_dict())
    with torch.inference_mode():
        assert_close(actual(images).argmax(1), expected(images).argmax(1), rtol=0, atol=0)


def numbers(names):
    return [NAMES.index(name) for name in names]


def nchw(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


# Every kind of images


class Pictures(Dataset):
    def __init__(self, pixels, names):
        self.pixels, self.names = pixels, names

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, position):
        return Image.fromarray(self.pixels[position]), NAMES.index(self.names[position])


class PicturesWithoutNumbers(Pictures):
    def __getitem__(self, position):
        return super().__getitem__(position)[0]


KINDS = {
    'folder': lambda root, pixels, names: (root, None),
    'folder as text': lambda root, pixels, names: (str(root), None),
    'paths': lambda root, pixels, names: ([root / name / f'{n:04}.png' for n, name in enumerate(names)], names),
    'PIL images': lambda root, pixels, names: ([Image.fromarray(image) for image in pixels], names),
    'arrays': lambda root, pixels, names: (list(pixels), names),
    'tensor': lambda root, pixels, names: (nchw(pixels), numbers(names)),
    'tensors': lambda root, pixels, names: (list(nchw(pixels)), torch.tensor(numbers(names))),
    'Dataset of PIL images': lambda root, pixels, names: (Pictures(pixels, names), None),
    'Dataset and labels': lambda root, pixels, names: (PicturesWithoutNumbers(pixels, names), names),
    'TensorDataset': lambda root, pixels, names: (TensorDataset(nchw(pixels), torch.tensor(numbers(names))), None),
    'torchvision ImageFolder': lambda root, pixels, names: (torchvision.datasets.ImageFolder(root), None),
    'timm dataset': lambda root, pixels, names: (timm.data.create_dataset('', root=str(root)), None),
    'DataLoader': lambda root, pixels, names: (
        DataLoader(TensorDataset(nchw(pixels), torch.tensor(numbers(names))), batch_size=5, shuffle=True),
        None,
    ),
    'DataLoader and labels': lambda root, pixels, names: (DataLoader(TensorDataset(nchw(pixels)), batch_size=5), names),
}


@pytest.fixture(scope='module')
def folder(support, write_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp('pictures') / 'support'
    write_folder(root, *support)
    return root


@pytest.mark.filterwarnings('ignore::ResourceWarning')  # timm's reader leaves files to the garbage collector
@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_of_images_gives_the_same_model(kind, folder, net, support, model, query):
    images, labels = KINDS[kind](folder, *support)
    found = predict_model('test_resnet', images, labels, hypernet=net)
    same_model(found, model, query[0])
    named = kind not in {'tensor', 'tensors', 'Dataset of PIL images', 'TensorDataset', 'DataLoader'}
    assert found.pretrained_cfg.get('label_names') == (NAMES if named else ('0', '1', '2'))


def test_floats_in_0_to_1_give_the_same_model(net, support, model, query):
    pixels, names = support
    same_model(predict_model('test_resnet', nchw(pixels) / 255, names, hypernet=net), model, query[0])
    same_model(predict_model('test_resnet', pixels.astype(np.float64) / 255, names, hypernet=net), model, query[0])


def test_a_torch_dataset_by_name_gives_the_model_of_its_pixels(net, tmp_path, pictures, query):
    pixels = pictures(12, size=28)[0][..., 0]
    labels = np.arange(12, dtype=np.uint8) % 3
    raw = tmp_path / 'FashionMNIST' / 'raw'
    raw.mkdir(parents=True)
    for part, step in (('train', 1), ('t10k', 2)):
        images = pixels[::step].tobytes()
        (raw / f'{part}-images-idx3-ubyte').write_bytes(struct.pack('>IIII', 0x803, 12 // step, 28, 28) + images)
        (raw / f'{part}-labels-idx1-ubyte').write_bytes(
            struct.pack('>II', 0x801, 12 // step) + labels[::step].tobytes()
        )
    by_name = predict_model('test_resnet', 'torch/fashion_mnist', hypernet=net, data_dir=str(tmp_path))
    same_model(by_name, predict_model('test_resnet', pixels, labels, hypernet=net), query[0])
    assert by_name.pretrained_cfg['label_names'] == ('T-shirt/top', 'Trouser', 'Pullover')
    tested = predict_model('test_resnet', 'torch/fashion_mnist', hypernet=net, data_dir=str(tmp_path), split='test')
    same_model(tested, predict_model('test_resnet', pixels[::2], labels[::2], hypernet=net), query[0])


def test_pictures_of_other_sizes_are_resized_as_timm_does(net, pictures, query):
    pixels, names = pictures(9, size=45)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=vars_of(net.config.input)))
    resized = torch.stack([transform(Image.fromarray(image)) for image in pixels])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (net.config.input.mean, net.config.input.std))
    expected = predict_model('test_resnet', (resized * std + mean).clamp(0, 1), names, hypernet=net)
    same_model(predict_model('test_resnet', pixels, names, hypernet=net), expected, query[0])


def vars_of(config):
    return {name: getattr(config, name) for name in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')}


# What must not matter


@settings(deadline=None, max_examples=10, derandomize=True)
@given(order=st.permutations(range(18)), batch_size=st.integers(1, 20), two_passes=st.booleans())
def test_order_and_batch_size_change_nothing(order, batch_size, two_passes, net, support, model, query):
    pixels, names = support
    with pytest.MonkeyPatch.context() as patch:
        if two_passes:
            patch.setattr(ImageSample, 'for_size', lambda size: ImageSample(7))
            model = predict_model('test_resnet', pixels, names, hypernet=net)
        found = predict_model(
            'test_resnet', pixels[order], [names[k] for k in order], hypernet=net, batch_size=batch_size
        )
    same_model(found, model, query[0])


def test_a_set_larger_than_the_sample_gets_centroids_of_all_its_images(net, support, monkeypatch):
    pixels, names = support
    samples = []

    def recorded(size):
        samples.append(ImageSample(7))
        return samples[-1]

    monkeypatch.setattr(ImageSample, 'for_size', recorded)
    model = predict_model('test_resnet', pixels, names, hypernet=net, batch_size=4)
    assert [len(sample.images) for sample in samples] == [7]
    assert not samples[0].complete
    images, labels = in_one_batch(net, pixels, numbers(names))
    assert_close(model.fc.weight.detach(), rows_by_hand(model, images, labels, net.whitening))


def test_the_sample_stays_bounded(net, pictures, monkeypatch):
    """Memory does not grow with the set: after every batch the sample holds what it may, and no more."""
    held = []
    add = ImageSample.add

    def recorded(self, *args, **kwargs):
        add(self, *args, **kwargs)
        held.append((len(self.images), len(self.labels), self.images.untyped_storage().nbytes()))

    monkeypatch.setattr(ImageSample, 'add', recorded)
    monkeypatch.setattr(ImageSample, 'for_size', lambda size: ImageSample(5))
    predict_model('test_resnet', *pictures(60, size=32), hypernet=net, batch_size=6)
    assert held == [(5, 5, 5 * 3 * 32 * 32 * 4)] * 10
    monkeypatch.undo()
    for side in (8, 36, 224, 448):
        assert 64 <= ImageSample.for_size((3, side, side)).size <= max(64, min(1024, 2**24 // side**2))


def test_an_answer_does_not_depend_on_the_rest_of_the_batch(model, query):
    with torch.inference_mode():
        together = model(query[0])
        assert_close(torch.cat([model(image[None]) for image in query[0]]), together, rtol=1e-5, atol=1e-5)
        assert_close(model(query[0].flip(0)).flip(0), together, rtol=1e-5, atol=1e-5)


def test_other_images_give_another_model(net, support, model):
    pixels, names = support
    other = predict_model('test_resnet', 255 - pixels, names, hypernet=net).state_dict()
    assert not torch.allclose(other['layer1.0.conv1.weight'], model.state_dict()['layer1.0.conv1.weight'], atol=1e-5)


# The model


def in_one_batch(net, pixels, labels=None):
    ((images, labels),) = open_images(pixels, labels, input=net.config.input).batches()
    return images, labels


def centroids_by_hand(model, images, labels):
    with torch.inference_mode():
        features = model.forward_head(model.forward_features(images), pre_logits=True).double()
    return torch.stack([features[labels == label].mean(0) for label in range(int(labels.max()) + 1)])


def rows_by_hand(model, images, labels, whitening):
    """The classifier's weight: whitened centroids of length 1, mapped back."""
    whitening = whitening.double()
    return (F.normalize(centroids_by_hand(model, images, labels) @ whitening) @ whitening).float()


def test_logits_choose_as_equation_7_does(net, support, model, query):
    pixels, names = support
    whitening = net.whitening.double()
    assert (whitening - torch.eye(len(whitening))).abs().max() > 0.05
    centroids = centroids_by_hand(model, *in_one_batch(net, pixels, numbers(names))) @ whitening
    with torch.inference_mode():
        features = model.forward_head(model.forward_features(query[0]), pre_logits=True).double() @ whitening
        cosines = torch.stack([(f @ centroids.T) / (f.norm() * centroids.norm(dim=1)) for f in features])
        logits = model(query[0])
    assert_close(logits.argmax(1), cosines.argmax(1), rtol=0, atol=0)
    assert len(logits.argmax(1).unique()) == 3
    assert_close((logits / features.norm(dim=1, keepdim=True)).double(), cosines, rtol=1e-4, atol=1e-5)
    assert_close(model.fc.bias.detach(), torch.zeros(3), rtol=0, atol=0)
    assert (logits.argmax(1) == query[1]).float().mean() > 0.9


def test_predicted_tensors_are_those_of_the_hypernetwork(net, support, model):
    """Kernels and shared parameters come from the sketch; no tensor is left as timm drew it."""
    pixels, names = support
    with torch.inference_mode():
        weights = net(net.sketch(pixels, names))
    state = model.state_dict()
    assert set(state) == set(weights) | {'fc.weight', 'fc.bias'}
    for key, value in weights.items():
        if net.target.roles[key] != 'calibrated':
            assert_close(state[key], value, rtol=1e-5, atol=1e-5)
    torch.manual_seed(123)
    state_close(predict_model('test_resnet', pixels, names, hypernet=net).state_dict(), state, tolerance=0)


def test_the_hypernetwork_says_how_much_its_own_statistics_weigh(support):
    statistics = {}
    for prior_images in (0.0, 8.0, 1e9):
        hypernet = PudNet.for_target(
            'test_resnet', sketch_width=16, input=InputConfig(input_size=(3, 32, 32)), prior_images=prior_images
        )
        norm = predict_model('test_resnet', *support, hypernet=hypernet).bn1
        statistics[prior_images] = norm.running_mean.abs().max(), (norm.running_var - 1).abs().max()
    for own, some, none in zip(statistics[1e9], statistics[8.0], statistics[0.0], strict=True):
        assert own < 1e-4 < some < none


def test_the_hypernetwork_says_how_much_images_count_after_the_first_norm(support):
    hypernet = PudNet.for_target(
        'test_resnet', sketch_width=16, input=InputConfig(input_size=(3, 32, 32)), deep_share=0.0
    )
    (_, first), *others = batch_norms(predict_model('test_resnet', *support, hypernet=hypernet))
    assert first.running_mean.abs().max() > 1e-3
    assert others
    for _, norm in others:
        assert_close(norm.running_mean, torch.zeros_like(norm.running_mean))
        assert_close(norm.running_var, torch.ones_like(norm.running_var))


def test_pretrained_cfg_says_what_timm_needs(net, model, support):
    cfg = model.pretrained_cfg
    assert 'state_dict' not in cfg
    assert model.default_cfg is cfg
    found = {name: cfg[name] for name in ('architecture', 'tag', 'num_classes', 'label_names', 'label_offset')}
    assert found == {
        'architecture': 'test_resnet',
        'tag': 'tiny',
        'num_classes': 3,
        'label_names': NAMES,
        'label_offset': 0,
    }
    data = timm.data.resolve_model_data_config(model)
    assert {name: data[name] for name in vars_of(net.config.input)} == vars_of(net.config.input)
    assert timm.data.resolve_model_data_config(model, use_test_size=True) == data
    for name in ('url', 'hf_hub_id', 'license', 'origin_url', 'paper_ids'):
        assert not cfg.get(name), name
    usual = timm.get_pretrained_cfg('test_resnet')
    assert usual is not None
    assert usual.pool_size is not None
    side = -(-usual.pool_size[0] * cfg['input_size'][1] // usual.input_size[1])
    assert cfg['pool_size'] == (side, side)
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    assert len(pickle.dumps(model)) < 1.2 * weights, 'a copy of the weights is kept somewhere'


def test_the_model_is_in_eval_mode_and_can_be_finetuned_without_touching_the_hypernetwork(net, support, model, query):
    model = copy.deepcopy(model)
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    before = {key: value.clone() for key, value in net.state_dict().items()}
    fresh = predict_model('test_resnet', *support, hypernet=net).train()
    F.cross_entropy(fresh(query[0]), query[1]).backward()
    assert all(parameter.grad is not None for parameter in fresh.parameters())
    torch.optim.SGD(fresh.parameters(), 0.1).step()
    assert not torch.equal(fresh.conv1[0].weight, model.conv1[0].weight)
    state_close(net.state_dict(), before, tolerance=0)


def test_unlabelled_images_give_a_feature_model(net, support, query, tmp_path, write_folder):
    pixels, names = support
    model = predict_model('test_resnet', pixels, hypernet=net)
    assert model.num_classes == model.pretrained_cfg['num_classes'] == 0
    assert model.pretrained_cfg.get('label_names') is None
    with torch.inference_mode():
        assert model(query[0]).shape == (24, net.target.num_features)
    assert not {'fc.weight', 'fc.bias'} & model.state_dict().keys()
    write_folder(tmp_path / 'flat', pixels)
    same_model(predict_model('test_resnet', tmp_path / 'flat', hypernet=net), model, query[0])
    headless = predict_model('test_resnet', pixels, names, hypernet=net, head='none')
    asked = create_model('test_resnet', pretrained_from=pixels, labels=names, hypernet=net, num_classes=0)
    same_model(headless, asked, query[0])


def test_head_none_differs_from_a_classifier_in_nothing_but_the_head(net, support, model):
    state = predict_model('test_resnet', *support, hypernet=net, head='none').state_dict()
    state_close(state, {key: value for key, value in model.state_dict().items() if key[:3] != 'fc.'})


@pytest.mark.parametrize('two_passes', [False, True])
@pytest.mark.parametrize('head', ['ridge', 'blend', 'logistic'])
def test_a_head_with_a_bias_is_that_of_the_features_of_all_images(
    two_passes, head, net, support, model, query, monkeypatch
):
    pixels, names = support
    if two_passes:
        monkeypatch.setattr(ImageSample, 'for_size', lambda size: ImageSample(7))
    found = predict_model('test_resnet', pixels, names, hypernet=net, head=head, batch_size=4)
    images, labels = in_one_batch(net, pixels, numbers(names))
    with torch.inference_mode():
        features = found.forward_head(found.forward_features(images), pre_logits=True)
        right = (found(query[0]).argmax(1) == query[1]).float().mean()
    expected = ridge_classifier(features, labels, 3, net.whitening)
    if head != 'ridge':
        stream = HEADS[head](3)
        stream.add(features, labels)
        expected = stream.classifier(net.whitening)
    assert_close((found.fc.weight.detach(), found.fc.bias.detach()), expected, rtol=1e-3, atol=1e-4)
    assert found.fc.bias.abs().max() > 0.01
    assert right > 0.9
    if not two_passes:
        for key, value in model.state_dict().items():
            assert torch.equal(found.state_dict()[key], value) != key.startswith('fc.'), key


@pytest.mark.parametrize('order', [list(range(17, -1, -1)), [*range(0, 18, 2), *range(1, 18, 2)]])
@pytest.mark.parametrize('head', ['ridge', 'blend', 'logistic'])
def test_order_changes_nothing_in_a_head_with_a_bias(order, head, net, support, query):
    pixels, names = support
    model = predict_model('test_resnet', pixels, names, hypernet=net, head=head)
    found = predict_model(
        'test_resnet', pixels[order], [names[k] for k in order], hypernet=net, head=head, batch_size=5
    )
    with torch.inference_mode():
        assert_close(found(query[0]), model(query[0]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(('two_passes', 'head'), [(False, None), (True, None), (False, 'blend'), (False, 'ridge')])
def test_unlabelled_images_teach_the_head_alone(two_passes, head, net, support, query, pictures, monkeypatch):
    pixels, names = support
    pixels, names, rest = pixels[:6], names[:6], pictures(30, seed=5)[0]
    if two_passes:
        monkeypatch.setattr(ImageSample, 'for_size', lambda size: ImageSample(4))
    found = predict_model('test_resnet', pixels, names, unlabelled=rest, hypernet=net, head=head, batch_size=4)
    alone = predict_model('test_resnet', pixels, names, hypernet=net, head=head or 'blend', batch_size=4)
    for key, value in alone.state_dict().items():
        assert torch.equal(found.state_dict()[key], value) != key.startswith('fc.'), key
    images, _ = in_one_batch(net, np.concatenate([pixels, rest]))
    with torch.inference_mode():
        features = found.forward_head(found.forward_features(images), pre_logits=True)
        right = (found(query[0]).argmax(1) == query[1]).float().mean()
    stream = HEADS[head or 'blend'](3)
    stream.add(features[:6], torch.tensor(numbers(names)))
    expected = self_training_classifier(stream, features[6:], net.whitening)
    assert_close((found.fc.weight.detach(), found.fc.bias.detach()), expected, rtol=1e-3, atol=1e-4)
    assert right > 0.9


def test_labels_of_unlabelled_images_are_not_looked_at(net, support, pictures, write_folder, tmp_path, query):
    rest = pictures(12, seed=5)[0]
    write_folder(tmp_path / 'flat', rest)
    write_folder(tmp_path / 'classes', rest, ['a', 'b'] * 6)
    models = [
        predict_model('test_resnet', *support, unlabelled=given, hypernet=net, batch_size=size)
        for given, size in ((rest, 5), (rest[::-1].copy(), 256), (tmp_path / 'flat', 256), (tmp_path / 'classes', 7))
    ]
    for model in models[1:]:
        state_close(model.state_dict(), models[0].state_dict(), 1e-4)
        assert model.pretrained_cfg['label_names'] == NAMES
    assert models[0].num_classes == 3


class SomeLabels(PicturesWithoutNumbers):
    """A semi-supervised set as people have them: the first image has a label, others have -1, or what is no label."""

    def __getitem__(self, position):
        return super().__getitem__(position), [0, -1, {'box': 3}][position % 3]


@pytest.mark.parametrize('kind', ['dataset', 'loose images beside a class folder', 'folders like splits', 'loader'])
def test_whatever_labels_the_unlabelled_have_all_their_images_are_used(
    kind, net, support, pictures, write_folder, tmp_path
):
    rest = pictures(12, seed=5)[0]
    given = SomeLabels(rest, ['cup'] * 12)
    if kind == 'loader':
        given = DataLoader(TensorDataset(nchw(rest), torch.tensor([0, *[-1] * 11])), batch_size=5)
    elif kind != 'dataset':
        write_folder(tmp_path, rest, ['a'] * 3 + ['.'] * 9 if 'loose' in kind else ['train', 'test'] * 6)
        given = tmp_path
    model, expected = (
        predict_model('test_resnet', *support, unlabelled=unlabelled, hypernet=net) for unlabelled in (given, rest)
    )
    state_close(model.state_dict(), expected.state_dict(), 1e-4)


def test_of_very_many_unlabelled_images_a_sample_is_used(net, support, pictures, monkeypatch):
    monkeypatch.setattr('timm_pudnet.predict.MOST_UNLABELLED', 9)
    monkeypatch.setattr(ImageSample, 'for_size', lambda size: ImageSample(7))
    used = []

    def record(labelled, unlabelled, whitening):
        used.append(unlabelled)
        return self_training_classifier(labelled, unlabelled, whitening)

    monkeypatch.setattr('timm_pudnet.predict.self_training_classifier', record)
    rest = pictures(40, seed=5)[0]
    for order in (slice(None), slice(None, None, -1)):
        predict_model('test_resnet', *support, unlabelled=rest[order].copy(), hypernet=net, batch_size=6)
    assert len(used[0]) == 9
    in_order = [rows[rows.sum(1).argsort()] for rows in used]
    assert_close(in_order[0], in_order[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ('kwargs', 'needles'),
    [
        ({'head': 'centroid'}, ['head centroid', 'unlabelled']),
        ({'head': 'none'}, ['head="none"', 'unlabelled']),
        ({'num_classes': 0}, ['num_classes=0', 'unlabelled']),
        ({'labels': None}, ['label', 'images']),
    ],
)
def test_what_unlabelled_images_do_not_go_with_is_told_in_one_line(kwargs, needles, net, support, one_line):
    pixels, names = support
    with pytest.raises(InputError) as error:
        predict_model('test_resnet', pixels, **{'labels': names, **kwargs}, unlabelled=pixels, hypernet=net)
    one_line(error, *needles)


@pytest.mark.parametrize('counts', [{'cup': 3, 'jar': 2}, {'cup': 1, 'jar': 1}, {'cup': 9, 'jar': 1, 'pan': 4}])
def test_few_images_and_unequal_classes_are_enough(counts, net, pictures):
    names = [name for name, count in counts.items() for _ in range(count)]
    pixels = pictures(len(names), names=names)[0]
    model = predict_model('test_resnet', pixels, names, hypernet=net)
    images, labels = in_one_batch(net, pixels, names)
    assert model.num_classes == len(counts)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    expected = rows_by_hand(model, images, labels, net.whitening)
    assert_close(model.fc.weight.detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('head', ['centroid', 'ridge'])
def test_one_class_only_is_an_error_that_says_what_to_do(head, net, support, one_line):
    with pytest.raises(InputError) as error:
        predict_model('test_resnet', support[0], ['cup'] * 18, hypernet=net, head=head)
    one_line(error, 'one class', 'head="none"')
    assert predict_model('test_resnet', support[0], ['cup'] * 18, hypernet=net, head='none').num_classes == 0


def test_one_class_is_enough_for_the_feature_model_that_num_classes_0_asks_for(net, support):
    assert predict_model('test_resnet', support[0], ['cup'] * 18, hypernet=net, num_classes=0).num_classes == 0


def test_unreadable_images_are_skipped_or_refused(net, support, model, tmp_path, write_folder, query):
    root = tmp_path / 'set'
    write_folder(root, *support)
    buffer = io.BytesIO()
    Image.fromarray(support[0][0]).save(buffer, 'JPEG')
    (root / 'cup' / 'bad.jpg').write_bytes(buffer.getvalue()[:-200])
    with pytest.warns(PudNetWarning, match=r'skipped 1 of 19 images .*cup/bad.jpg'):
        same_model(predict_model('test_resnet', root, hypernet=net), model, query[0])
    with pytest.raises(InputError, match=r'cup/bad.jpg: cannot be read'):
        predict_model('test_resnet', root, hypernet=net, strict=True)


@pytest.mark.filterwarnings('ignore::timm_pudnet.PudNetWarning')
@pytest.mark.parametrize('head', ['centroid', 'ridge'])
def test_a_class_without_a_readable_image_is_named(head, net, support, tmp_path, write_folder, one_line):
    write_folder(tmp_path, *support)
    (tmp_path / 'lid').mkdir()
    (tmp_path / 'lid' / 'bad.png').write_bytes(b'')
    with pytest.raises(InputError) as error:
        predict_model('test_resnet', tmp_path, hypernet=net, head=head)
    one_line(error, 'lid')


def test_a_state_dict_is_that_of_the_model(net, support, model):
    state_close(predict_state_dict('test_resnet', *support, hypernet=net), model.state_dict())
    plain = timm.create_model('test_resnet', num_classes=3)
    plain.load_state_dict(predict_state_dict('test_resnet', *support, hypernet=net))


@pytest.mark.parametrize('balance', ['none', 'class', 'kmeans'])
def test_balance_reaches_the_sketch(balance, net, pictures):
    names = ['cup'] * 9 + ['jar'] * 3
    pixels = pictures(12, names=names)[0]
    model = predict_model('test_resnet', pixels, names, hypernet=net, balance=balance)
    with torch.inference_mode():
        expected = net(net.sketch(pixels, names, balance=balance))['conv1.0.weight']
    assert_close(model.conv1[0].weight.detach(), expected, rtol=1e-5, atol=1e-6)


# timm's arguments


CALLS = [
    (('test_resnet',), {}),
    (('test_resnet', False), {'num_classes': 5, 'in_chans': 1, 'drop_rate': 0.2, 'drop_path_rate': 0.1}),
    ((), {'model_name': 'test_vit', 'num_classes': 0, 'img_size': 96}),
    (('test_efficientnet.r160_in1k',), {'global_pool': 'max', 'pretrained_cfg_overlay': {'crop_pct': 0.5}}),
    (('test_resnet',), {'features_only': True, 'out_indices': (1, 2)}),
    (('test_resnet',), {'pretrained_from': None, 'scriptable': True, 'no_jit': True}),
]


@pytest.mark.parametrize(('args', 'kwargs'), CALLS)
def test_without_images_create_model_is_timm_s_to_the_bit(args, kwargs):
    torch.manual_seed(3)
    found = create_model(*args, **kwargs)
    torch.manual_seed(3)
    expected = timm.create_model(*args, **{key: value for key, value in kwargs.items() if key != 'pretrained_from'})
    assert type(found) is type(expected)
    assert repr(found) == repr(expected)
    state_close(found.state_dict(), expected.state_dict(), tolerance=0)
    assert [module.training for module in found.modules()] == [module.training for module in expected.modules()]
    assert getattr(found, 'pretrained_cfg', None) == getattr(expected, 'pretrained_cfg', None)


def test_without_images_create_model_passes_everything_on(monkeypatch):
    calls = []
    monkeypatch.setattr(timm, 'create_model', lambda *args, **kwargs: calls.append((args, kwargs)))
    create_model('resnet18', True, pretrained_cfg={'url': 'x'}, checkpoint_path='y', cache_dir='z', anything=1)
    create_model('hf-hub:org/name', pretrained=True, labels=[1], hypernet='as timm likes')
    assert calls == [
        (('resnet18', True), {'pretrained_cfg': {'url': 'x'}, 'checkpoint_path': 'y', 'cache_dir': 'z', 'anything': 1}),
        (('hf-hub:org/name',), {'pretrained': True, 'labels': [1], 'hypernet': 'as timm likes'}),
    ]


def test_without_images_timm_s_own_error_comes_through():
    with pytest.raises(RuntimeError, match='Unknown model'):
        create_model('no_such_model')


def test_create_model_with_images_is_predict_model(net, folder, model, query):
    same_model(create_model('test_resnet', pretrained_from=folder, hypernet=net), model, query[0])
    asked = create_model(
        'test_resnet', pretrained_from=folder, pretrained=False, hypernet=net, num_classes=3, checkpoint_path=''
    )
    same_model(asked, model, query[0])


@pytest.mark.parametrize(
    ('kwargs', 'needles'),
    [
        ({'num_classes': 5}, ['num_classes is 5', '3 classes']),
        ({'num_classes': -1}, ['num_classes']),
        ({'pretrained': True}, ['pretrained and pretrained_from']),
        ({'checkpoint_path': 'x'}, ['checkpoint_path and pretrained_from']),
        ({'pretrained_cfg': {'url': 'x'}}, ['pretrained_cfg and pretrained_from']),
        ({'in_chans': 1}, ['in_chans=1', 'test_resnet.tiny', 'conv1.0.weight']),
        ({'stem_width': 8}, ['stem_width=8', 'test_resnet.tiny']),
        # Of several that which makes the weights other ones, and no other.
        ({'drop_rate': 0.1, 'in_chans': 1}, ['test_resnet with in_chans=1 has', 'leave that argument out']),
        ({'predict_norm': True}, ['predict_norm', 'one of the hypernetwork', 'leave it out']),
        ({'in_chans': 1, 'stem_width': 8}, ['with in_chans=1, stem_width=8 has', 'leave these arguments out']),
        ({'block_args': {'attn_layer': 'se'}}, ['block_args', 'test_resnet.tiny']),
        ({'nonsense': 1}, ["'nonsense'"]),
        ({'drop_rate': 2}, ['drop_rate', '0-1', '2']),
        ({'act_layer': torch.nn.GELU}, ['act_layer=', "'gelu'"]),
        ({'global_pool': ''}, ["global_pool=''", "head='none'"]),
        ({'batch_size': 0}, ['batch_size', '0']),
        ({'batch_size': 2.0}, ['batch_size', '2.0']),
        ({'head': 'linear'}, ["'linear'", 'centroid', 'ridge', 'none']),
        ({'balance': 'classes'}, ["'classes'", 'kmeans']),
        ({'device': 'gpu'}, ["'gpu'", 'cpu']),
        ({'labels': [0] * 4}, ['4 labels', '18']),
        ({'data_dir': 'nowhere', 'pretrained_from': 'torch/fashion_mnist'}, ['nowhere']),
        ({'data_dir': 'nowhere'}, ["data_dir='nowhere'", 'leave it out']),
        ({'pretrained_from': 'nowhere'}, ['nowhere: no such folder']),
        ({'pretrained_from': {'a': 1}}, ['dict']),
    ],
)
def test_arguments_that_cannot_be_used_are_told_in_one_line(kwargs, needles, net, folder, one_line):
    with pytest.raises(PudNetError) as error:
        create_model('test_resnet', **{'pretrained_from': folder, 'hypernet': net, **kwargs})
    one_line(error, *needles)


def test_positional_arguments_beside_images_are_refused(net, folder, one_line):
    with pytest.raises(InputError) as error:
        create_model('test_resnet', True, pretrained_from=folder, hypernet=net)
    one_line(error, 'pretrained_from', 'by name')


def test_pretrained_means_nothing_to_predict_model(net, folder, one_line):
    with pytest.raises(InputError) as error:
        predict_model('test_resnet', folder, hypernet=net, pretrained=True)
    one_line(error, 'pretrained')


def test_dropout_and_stochastic_depth_travel(net, folder, model, query):
    found = create_model(
        'test_resnet', pretrained_from=folder, hypernet=net, drop_rate=0.25, drop_path_rate=0.3, global_pool='avg'
    )
    same_model(found, model, query[0])
    kinds = {type(module).__name__ for module in found.modules()}
    assert (found.drop_rate, 'DropPath' in kinds) == (0.25, True)


@pytest.mark.parametrize(
    ('kwargs', 'needles'),
    [
        ({'head': 'none', 'num_classes': 3}, ['head="none"', 'num_classes=3']),
        ({'features_only': True, 'num_classes': 3}, ['features_only=True', 'num_classes=3']),
        ({'head': 'ridge', 'num_classes': 0}, ['num_classes=0', "'ridge'"]),
        ({'head': 'centroid', 'features_only': True}, ['features_only=True', "'centroid'"]),
        ({'num_classes': 0, 'unlabelled': 'nowhere'}, ['num_classes=0', 'unlabelled']),
        ({'num_classes': 7}, ['num_classes is 7', '3 classes']),
    ],
)
def test_arguments_that_contradict_each_other_are_told_before_an_image_is_read(
    kwargs, needles, net, folder, one_line, monkeypatch
):
    monkeypatch.setattr(Image, 'open', None)
    with pytest.raises(InputError) as error:
        predict_model('test_resnet', folder, hypernet=net, **kwargs)
    one_line(error, *needles)


@pytest.mark.parametrize(
    ('labels', 'needles'),
    [
        (['a', None, 'b', 'a'], ['number 1 is None', 'a name']),
        (np.array(['a', None, 'b', 'a'], dtype=object), ['number 1 is None', 'a name']),
        ([0, 1, 0.5, 1], ['number 2 is 0.5', 'one int']),
    ],
)
def test_a_label_that_is_none_is_named(labels, needles, net, support, one_line):
    with pytest.raises(InputError) as error:
        predict_model('test_resnet', support[0][:4], labels, hypernet=net)
    one_line(error, 'labels', *needles)


def test_a_subset_may_be_chosen_by_a_tensor(net, query, folder):
    dataset = ImageFolder(str(folder))
    chosen = torch.tensor([row for row, (_, label) in enumerate(dataset.samples) if label != 1])
    models = [predict_model('test_resnet', Subset(dataset, rows), hypernet=net) for rows in (chosen, chosen.tolist())]
    assert models[0].pretrained_cfg['label_names'] == (NAMES[0], NAMES[2])
    same_model(*models, query[0])


def test_numbers_of_numpy_are_numbers(net, support, model, query):
    asked = predict_model('test_resnet', *support, hypernet=net, batch_size=np.int64(5), drop_rate=np.float32(0.5))
    same_model(asked, model, query[0])
    seen = InputConfig(input_size=tuple(np.array([3, 32, 32])))
    kwargs = {'generator': 'residual', 'generator_kwargs': {'rank': np.int64(2)}, 'eta': np.float32(0.5)}
    kwargs |= {'predict_norm': np.bool_(True)}
    made = PudNet.for_target('test_resnet', sketch_width=np.int64(8), input=seen, **kwargs)
    assert json.loads(json.dumps(made.config.to_dict()))['generator_kwargs'] == {'rank': 2}


def test_pictures_of_32_bit_numbers_may_be_bytes(net, support, model, query):
    deep = [Image.fromarray(one[..., 0].astype(np.int32)) for one in support[0]]
    with pytest.warns(PudNetWarning, match='more than 8 bits'):
        found = predict_model('test_resnet', deep, support[1], hypernet=net)
    eight = [Image.fromarray(one[..., 0]) for one in support[0]]
    same_model(found, predict_model('test_resnet', eight, support[1], hypernet=net), query[0])


def test_a_hypernetwork_in_another_precision_predicts_and_stays_as_it_is(net, support, model, query):
    other = copy.deepcopy(net).double()
    same_model(predict_model('test_resnet', *support, hypernet=other), model, query[0])
    assert other.temperature.dtype == torch.float64


def test_labels_with_gaps_are_told_for_what_they_are(net, support, one_line):
    pairs = [(Image.fromarray(pixels), 3 + 10**9 * (row % 2)) for row, pixels in enumerate(support[0])]

    class Pairs(Dataset):
        def __len__(self):
            return len(pairs)

        def __getitem__(self, row):
            return pairs[row]

    with pytest.raises(InputError) as error:
        predict_model('test_resnet', Pairs(), hypernet=net)
    one_line(error, '1000000003', 'only 2', 'make them 0 to 1', 'labels=')


def test_a_saved_model_takes_other_channels_as_any_of_timm_s(model, tmp_path):
    folder = save_model(model, tmp_path / 'model')
    grey = timm.create_model(f'local-dir:{folder}', pretrained=True, in_chans=1)
    key = f'{model.pretrained_cfg["first_conv"]}.weight'
    assert_close(grey.state_dict()[key], model.state_dict()[key].sum(1, keepdim=True))


def test_arguments_of_the_target_itself_are_in_the_hypernetwork(pictures):
    config = {'model_kwargs': {'stem_width': 8, 'in_chans': 1}, 'sketch_width': 8}
    input = InputConfig(input_size=(1, 32, 32), mean=(0.4,), std=(0.3,))
    net = PudNet.for_target('test_resnet', input=input, **config).eval()
    model = predict_model('test_resnet', *pictures(6), hypernet=net)
    assert model.conv1[0].weight.shape == (8, 1, 3, 3)
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 3)
    assert model.pretrained_cfg['first_conv'] == 'conv1.0'
    same = predict_model('test_resnet', *pictures(6), hypernet=net, stem_width=8, in_chans=1)
    state_close(same.state_dict(), model.state_dict())
    with pytest.raises(InputError, match='in_chans=3'):
        predict_model('test_resnet', *pictures(6), hypernet=net, in_chans=3)


def test_weights_for_one_channel_are_taken_for_others_as_timm_can(pictures, tmp_path):
    for chans in (1, 4):
        input = InputConfig(input_size=(chans, 32, 32), mean=(0.4,) * chans, std=(0.3,) * chans)
        net = PudNet.for_target('test_resnet', input=input, model_kwargs={'in_chans': chans}, sketch_width=8).eval()
        model = predict_model('test_resnet', *pictures(6), hypernet=net)
        folder = save_model(model, tmp_path / str(chans))
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True)
        assert_close(loaded.conv1[0].weight, model.conv1[0].weight)
        # Which a timm before 1.0.31 would take for three channels, and make anew.
        assert model.pretrained_cfg['first_conv'] == ('conv1.0' if chans == 1 else ())
        if chans == 1 and hasattr(timm.models, 'get_model_args'):  # as later timms can
            colour = timm.create_model(f'local-dir:{folder}', pretrained=True, in_chans=3)
            assert_close(colour.conv1[0].weight.sum(1, keepdim=True), model.conv1[0].weight)


@pytest.mark.parametrize(
    ('name', 'kind', 'needles'),
    [
        ('test_resnt', InputError, ["'test_resnt'", 'test_resnet']),
        ('resnet81', InputError, ["'resnet81'", 'Did you mean']),
        ('test_resnet.r160_in1k', InputError, ['without a tag', 'test_resnet']),
        ('hf-hub:timm/resnet18.a1_in1k', InputError, ['hf-hub:timm/resnet18.a1_in1k', 'architecture alone']),
        ('', InputError, ["''"]),
        ('vit_tiny_patch16_224', UnsupportedTargetError, ['vit_tiny_patch16_224', 'test_resnet']),
        ('resnet18', UnsupportedTargetError, ['resnet18', 'test_resnet.tiny']),
    ],
)
def test_another_architecture_is_refused(name, kind, needles, net, support, one_line):
    with pytest.raises(kind) as error:
        predict_model(name, *support, hypernet=net)
    one_line(error, *needles)


@pytest.mark.parametrize(
    'hypernet', [5, torch.nn.Linear(2, 2), {'a': 1}, b'bytes'], ids=lambda value: type(value).__name__
)
def test_a_hypernetwork_of_a_wrong_type_is_refused(hypernet, support, one_line):
    with pytest.raises(PudNetError) as error:
        predict_model('test_resnet', *support, hypernet=hypernet)
    one_line(error, 'hypernet', type(hypernet).__name__)


def test_a_path_is_a_folder_whatever_ships_under_its_name(net, support, model, query, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net.save_pretrained(tmp_path / 'resnet18')
    same_model(predict_model('test_resnet', *support, hypernet=Path('resnet18')), model, query[0])
    with pytest.raises(UnsupportedTargetError, match=r'resnet18\.mixed56'):  # as text it is the one that ships
        predict_model('test_resnet', *support, hypernet='resnet18')


@pytest.mark.parametrize('hypernet', ['nowhere/at/all', 'test_resnet.tyni'])
def test_a_hypernetwork_that_is_not_there_is_named(hypernet, support, one_line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError) as error:
        predict_model('test_resnet', *support, hypernet=hypernet)
    one_line(error, hypernet)


@pytest.mark.parametrize('name', ['', 'local-dir:'])
def test_an_empty_name_is_not_taken_for_the_folder_that_one_is_in(name, support, tiny_folder, one_line, monkeypatch):
    monkeypatch.chdir(tiny_folder)  # of a variable that the shell does not know, for instance
    with pytest.raises(InputError) as error:
        predict_model('test_resnet', *support, hypernet=name)
    one_line(error, 'empty name')


# What the caller owns


class Double:
    """Float64 by default."""

    def __enter__(self):
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *_):
        torch.set_default_dtype(torch.float32)


def test_threads_share_float32_as_long_as_one_of_them_needs_it():
    first, second = own_defaults(), own_defaults()
    with Double():
        with first:
            second.__enter__()  # as another thread does meanwhile
        assert torch.get_default_dtype() == torch.float32
        torch.set_default_dtype(torch.float64)  # of somebody else
        with own_defaults():
            assert torch.get_default_dtype() == torch.float32
        second.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.float64
    with own_defaults():
        pass
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ('surroundings', 'what'),
    [
        (lambda: torch.device('meta'), torch.get_default_device),
        (lambda: torch.autocast('cpu', torch.bfloat16), lambda: torch.is_autocast_enabled('cpu')),
        (Double, torch.get_default_dtype),
    ],
)
def test_torch_s_defaults_as_the_caller_has_them_change_nothing_and_stay(
    surroundings, what, tiny_folder, support, model, query, tmp_path
):
    with surroundings():
        before = what()
        found = predict_model('test_resnet', *support, hypernet=tiny_folder)
        sketch = load_hypernet(tiny_folder).sketch(support[0])
        assert what() == before
        tuned = finetune(found, *support, epochs=1, progress=False)
        opened = open_images(*support, input=load_hypernet(tiny_folder).config.input)
        same_model(predict_model('test_resnet', opened, hypernet=tiny_folder), model, query[0])
        new = PudNet.for_target('test_resnet', sketch_width=8)
        new.save_pretrained(tmp_path / 'new')
        assert what() == before
    PudNet.from_pretrained(tmp_path / 'new')
    same_model(found, model, query[0])
    for one in (found, tuned):
        assert {value.device.type for value in one.state_dict().values()} == {'cpu'}
        assert {value.dtype for value in one.parameters()} == {torch.float32}
    assert (sketch.dtype, sketch.device.type) == (torch.float32, 'cpu')


def test_a_hypernetwork_of_the_caller_s_is_copied_to_another_device_and_one_of_ours_moved(own):
    there = on_device(own, torch.device('meta'), own)
    assert (there.device.type, own.device.type) == ('meta', 'cpu')
    assert on_device(own, torch.device('cpu'), own) is own
    assert on_device(own, torch.device('meta'), 'its name') is own


@pytest.fixture
def own(net):
    """A hypernetwork that a test may spoil."""
    return copy.deepcopy(net)


@pytest.mark.parametrize('training', [True, False])
def test_the_caller_s_hypernetwork_is_left_as_it_was(training, own, support):
    own.train(training)
    before = {key: value.clone() for key, value in own.state_dict().items()}
    predict_model('test_resnet', *support, hypernet=own)
    with pytest.raises(InputError):
        predict_model('test_resnet', support[0], ['cup'] * 18, hypernet=own)
    assert {module.training for module in own.modules()} == {training}
    assert own.device == torch.device('cpu')
    assert all(parameter.grad is None and parameter.requires_grad for parameter in own.parameters())
    state_close(own.state_dict(), before, tolerance=0)
    own(torch.zeros(16))['conv1.0.weight'].sum().backward()  # none of it became an inference tensor


def test_parts_that_the_caller_froze_stay_in_eval_mode(own, support):
    own.train()
    for part in (own.encoder, own.encoder.blocks[0]):
        own.train()
        part.eval()
        modes = [module.training for module in own.modules()]
        predict_model('test_resnet', *support, hypernet=own)
        own.sketch(support[0])
        assert [module.training for module in own.modules()] == modes
        assert (own.training, part.training, own.ahru.training) == (True, False, True)


@pytest.mark.parametrize('device', ['meta', 'cuda', 'cuda:99', 'xpu'])
def test_a_device_that_cannot_be_used_is_an_error_and_spoils_nothing(device, own, support, model, query, one_line):
    if device == 'cuda' and torch.cuda.is_available():
        pytest.skip('this machine has CUDA')
    with pytest.raises(InputError) as error:
        predict_model('test_resnet', *support, hypernet=own, device=device)
    one_line(error, device)
    same_model(predict_model('test_resnet', *support, hypernet=own), model, query[0])


def test_a_cuda_that_nobody_asked_for_and_that_cannot_be_used_gives_way_to_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)

    def refuse(*args, **kwargs):
        raise RuntimeError('CUDA error: no kernel image is available\nFor debugging ...')

    monkeypatch.setattr(torch, 'zeros', refuse)
    with pytest.warns(PudNetWarning, match=r'cannot be used \(CUDA error: no kernel image is available\)'):
        assert usable_device(None) == torch.device('cpu')
    with pytest.raises(InputError, match="'cuda'"):
        usable_device('cuda')


def test_no_random_state_is_set_to_a_constant(net, support):
    def draws_after(seed):
        torch.manual_seed(seed)
        np.random.seed(seed)
        predict_model('test_resnet', *support, hypernet=net)
        return torch.rand(4), np.random.rand(4)

    (one, one_numpy), (two, two_numpy) = draws_after(1), draws_after(2)
    assert not torch.equal(one, two)
    assert not np.array_equal(one_numpy, two_numpy)


# Saving


@pytest.fixture(scope='module')
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp('models') / 'pans'
    assert save_model(model, folder) == folder
    return folder


def test_saved_files_are_timm_s(saved):
    assert sorted(path.name for path in saved.iterdir()) == ['config.json', 'model.safetensors']
    assert [path.name for path in saved.parent.iterdir()] == ['pans']
    config = json.loads((saved / 'config.json').read_text())
    assert (config['architecture'], config['num_classes']) == ('test_resnet', 3)
    assert config['pretrained_cfg']['label_names'] == list(NAMES)
    assert 'state_dict' not in config['pretrained_cfg']


def test_a_saved_model_lives_without_this_package_and_a_saved_hypernetwork_predicts_the_same_bits(
    saved, model, net, tiny_folder, support, query, tmp_path, fresh_process
):
    save_model(predict_model('test_resnet', support[0], hypernet=net), tmp_path / 'features')
    pixels, names = support
    tensors = {'query': query[0].contiguous(), 'pixels': nchw(pixels), 'labels': torch.tensor(numbers(names))}
    safetensors.torch.save_file(tensors, tmp_path / 'in.safetensors')
    script = (
        'import json, sys\n'
        'import safetensors.torch, timm, torch\n'
        'torch.set_num_threads(1)\n'
        'sys.modules["timm_pudnet"] = None\n'
        'saved, hypernet = sys.argv[1:]\n'
        'tensors = safetensors.torch.load_file("in.safetensors")\n'
        'model = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()\n'
        'features = timm.create_model("local-dir:features", pretrained=True).eval()\n'
        'with torch.inference_mode():\n'
        '    out = {"logits": model(tensors["query"]), "features": features(tensors["query"])}\n'
        'data = timm.data.resolve_model_data_config(model)\n'
        'print(json.dumps([model.pretrained_cfg["label_names"], data, model.num_classes, features.num_classes]))\n'
        'del sys.modules["timm_pudnet"]\n'
        'import timm_pudnet\n'
        'images, labels = tensors["pixels"], tensors["labels"]\n'
        'model = timm_pudnet.predict_model("test_resnet", images, labels, hypernet=hypernet)\n'
        'out.update({f"model.{key}": value for key, value in model.state_dict().items()})\n'
        'safetensors.torch.save_file(out, "out.safetensors")\n'
    )
    code, printed, errors = fresh_process('-c', script, saved, tiny_folder, cwd=tmp_path)
    assert code == 0, errors
    label_names, data, num_classes, none = json.loads(printed)
    assert (tuple(label_names), num_classes, none) == (NAMES, 3, 0)
    assert data == json.loads(json.dumps(timm.data.resolve_model_data_config(model)))
    out = safetensors.torch.load_file(tmp_path / 'out.safetensors')
    with torch.inference_mode():
        # Of images that lie alike in memory: by some processors' kernels others differ in the last bits.
        assert_close(out.pop('logits'), model(tensors['query']), rtol=0, atol=0)
        features = predict_model('test_resnet', support[0], hypernet=net)(tensors['query'])
        assert_close(out.pop('features'), features, rtol=0, atol=0)
    here = predict_model('test_resnet', tensors['pixels'], tensors['labels'], hypernet=net).state_dict()
    state_close({key: out[f'model.{key}'] for key in here}, here, tolerance=0)
    assert len(out) == len(here)


@pytest.mark.filterwarnings('ignore::ResourceWarning')  # timm's reader leaves files to the garbage collector
def test_timm_s_way_of_validating_finds_the_same_accuracy(saved, model, pictures, write_folder, tmp_path):
    pixels, names = pictures(30, size=40, seed=7)
    pixels[::4] = 255 - pixels[::4]  # so that some are wrong
    write_folder(tmp_path / 'val', pixels, names)
    ours = predictions = 0
    for images, labels in open_images(tmp_path / 'val', input=input_of(model)).batches():
        with torch.inference_mode():
            predictions = model(images).argmax(1)
        ours += int((predictions == labels).sum())
    assert 10 < ours < 30

    loaded = timm.create_model(f'local-dir:{saved}', pretrained=True).eval()
    config = timm.data.resolve_data_config({}, model=loaded, use_test_size=True)
    dataset = timm.data.create_dataset('', root=str(tmp_path / 'val'), split='validation')
    loader = timm.data.create_loader(
        dataset,
        batch_size=8,
        num_workers=0,
        use_prefetcher=False,
        persistent_workers=False,
        **{name: config[name] for name in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')},
    )
    found = []
    theirs = 0
    with torch.inference_mode():
        for images, labels in loader:
            found.append(loaded(images).argmax(1))
            theirs += int((found[-1] == labels).sum())
    assert theirs == ours
    assert torch.cat(found).tolist() == predictions.tolist()


def input_of(model):
    cfg = model.pretrained_cfg
    return InputConfig(**{name: cfg[name] for name in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')})


def test_the_bits_survive_saving(saved, model, query):
    again = timm.create_model(f'local-dir:{saved}', pretrained=True).eval()
    state_close(again.state_dict(), model.state_dict(), tolerance=0)
    found, expected = (json.dumps(timm.data.resolve_model_data_config(one)) for one in (again, model))
    assert found == expected  # JSON knows no tuples
    assert again.pretrained_cfg['label_names'] in (NAMES, list(NAMES))
    with torch.inference_mode():
        assert_close(again(query[0]), model(query[0]), rtol=0, atol=0)


def test_a_model_in_channels_last_is_saved_and_left_as_it_is(model, tmp_path):
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    save_model(last, tmp_path / 'model')
    assert last.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    loaded = timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True)
    assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_names_of_classes_that_do_not_fit_their_labels_are_told(net, one_line):
    class Far(torch.utils.data.TensorDataset):
        classes = ('a', 'b')

    with pytest.raises(InputError) as error:
        predict_model('test_resnet', Far(torch.rand(4, 3, 32, 32), torch.tensor([5, 6, 7, 5])), hypernet=net)
    one_line(error, 'label 7', '2 classes')


def test_an_existing_folder_or_file_is_left_alone(model, tmp_path, one_line, nothing_written, monkeypatch):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder' / 'notes.txt').write_text('mine')
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'link').symlink_to('nowhere')
    with nothing_written(tmp_path):
        with pytest.raises(OutputExistsError, match='/dev/null exists'):
            room.check_output(Path('/dev/null'))
        for name in ('folder', 'file', 'link'):
            with pytest.raises(OutputExistsError) as error:
                save_model(model, tmp_path / name)
            one_line(error, tmp_path / name, 'exists')
        with pytest.raises(NotFoundError) as error:
            save_model(model, tmp_path / 'no' / 'parent')
        one_line(error, tmp_path / 'no')
        with pytest.raises(PudNetError) as error:
            save_model(model, tmp_path / 'file' / 'model')
        one_line(error, tmp_path / 'file')


@pytest.mark.parametrize('kind', ['empty', 'here', 'link'])
def test_an_empty_folder_is_filled_and_stays_itself(kind, model, tmp_path, monkeypatch, nothing_written):
    """It may be a mount or a link, which nothing can be renamed to."""
    (tmp_path / 'empty').mkdir()
    folder = tmp_path / 'empty'
    if kind == 'here':
        monkeypatch.chdir(tmp_path / 'empty')
        folder = Path('.')
    if kind == 'link':
        (tmp_path / 'link').symlink_to(tmp_path / 'empty')
        folder = tmp_path / 'link'
    before = folder.stat().st_ino

    def fails(*args, **kwargs):
        raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as patch, nothing_written(tmp_path):
        patch.setattr(timm.models, 'save_for_hf', fails)
        with pytest.raises(OSError, match='No space'):
            save_model(model, folder)
    save_model(model, folder)
    assert folder.stat().st_ino == before
    assert sorted(path.name for path in (tmp_path / 'empty').iterdir()) == ['config.json', 'model.safetensors']
    with pytest.raises(OutputExistsError):
        save_model(model, folder)


def test_what_came_into_an_empty_folder_meanwhile_is_not_overwritten(tmp_path):
    (tmp_path / 'empty').mkdir()

    def write():
        with folder_written_whole(tmp_path / 'empty') as beside:
            (beside / 'config.json').write_text('ours')
            (tmp_path / 'empty' / 'theirs').write_text('theirs')

    with pytest.raises(OutputExistsError, match='theirs'):
        write()
    assert [path.name for path in (tmp_path / 'empty').iterdir()] == ['theirs']


def test_a_folder_that_another_makes_meanwhile_is_left_to_it(tmp_path):
    def write():
        with folder_written_whole(tmp_path / 'new') as beside:
            (beside / 'config.json').write_text('ours')
            (tmp_path / 'new').mkdir()
            (tmp_path / 'new' / 'theirs').write_text('theirs')

    with pytest.raises(OutputExistsError, match='new was made meanwhile'):
        write()
    assert [path.name for path in tmp_path.rglob('*')] == ['new', 'theirs']


def test_names_with_a_prefix_of_timm_s_are_understood(model, tmp_path, monkeypatch, one_line):
    monkeypatch.chdir(tmp_path)
    assert save_model(model, 'local-dir:mine') == Path('mine')
    with pytest.raises(InputError) as error:
        save_model(model, 'hf-hub:org/name')
    one_line(error, 'hf-hub:org/name', 'push_model')


def test_weights_that_are_not_finite_are_told(net, support, one_line):
    broken = copy.deepcopy(net)
    with torch.no_grad():
        next(iter(broken.shared.values())).fill_(float('nan'))
    with pytest.raises(InputError) as error:
        predict_model('test_resnet', *support, hypernet=broken)
    one_line(error, 'not finite', 'another hypernetwork')


def test_a_folder_in_which_nothing_can_be_made_is_told_before_the_work(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path))

    monkeypatch.setattr('tempfile.mkdtemp', refuse)
    message = f'{tmp_path / "model"}: no folder can be made there (Permission denied): choose another'
    with pytest.raises(InputError, match=re.escape(message)):
        room.check_output(tmp_path / 'model')


def test_a_file_system_without_modes_is_written_to(model, tmp_path, monkeypatch):
    def refuse(self, mode):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, 'chmod', refuse)
    save_model(model, tmp_path / 'model')
    with written_whole(tmp_path / 'file') as beside:
        beside.write_text('whole')
    assert (tmp_path / 'file').read_text() == 'whole'


def test_a_save_that_fails_midway_leaves_nothing(model, tmp_path, monkeypatch, nothing_written):
    save_for_hf = timm.models.save_for_hf

    def fails(model, folder, **kwargs):
        save_for_hf(model, folder, **kwargs)
        raise OSError(errno.ENOSPC, 'No space left on device', folder)

    monkeypatch.setattr(timm.models, 'save_for_hf', fails)
    with nothing_written(tmp_path), pytest.raises(OSError, match='No space left'):
        save_model(model, tmp_path / 'model')

    def interrupted(model, folder, **kwargs):
        save_for_hf(model, folder, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(timm.models, 'save_for_hf', interrupted)
    with nothing_written(tmp_path), pytest.raises(KeyboardInterrupt):
        save_model(model, tmp_path / 'model')


def test_a_full_disk_is_an_os_error_and_leaves_nothing(model, tmp_path, full_disk, nothing_written):
    with nothing_written(tmp_path), pytest.raises(OSError), full_disk():  # noqa: PT011
        save_model(model, tmp_path / 'model')


def test_the_room_s_data_config_is_the_input(net):
    found = {key: value for key, value in pretrained_cfg_of(net.config.input, {}).items() if value is not None}
    assert found == {**vars_of(net.config.input), 'crop_mode': 'center'}


# Memory that runs out, as on a GPU


def scarce(monkeypatch, most, module):
    """A network that has no memory for more than so many images at once."""
    forward, seen = type(module).forward, []

    def guarded(self, images):
        seen.append(len(images))
        if len(images) > most:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB')
        return forward(self, images)

    monkeypatch.setattr(type(module), 'forward', guarded)
    return seen


def test_a_sketch_without_memory_for_a_batch_takes_it_in_parts(net, support, model, monkeypatch):
    seen = scarce(monkeypatch, 9, net.encoder)
    with pytest.warns(PudNetWarning, match=r'out of memory with 18 images at once: going on with 9'):
        found = predict_model('test_resnet', *support, hypernet=net)
    assert seen == [18, 9, 9]
    state_close(found.state_dict(), model.state_dict())


def test_a_target_without_memory_for_the_sample_is_calibrated_on_a_part(net, support, query, model, monkeypatch):
    scarce(monkeypatch, 9, timm.create_model('test_resnet'))
    with pytest.warns(PudNetWarning, match=r'out of memory with 18 images at once: going on with 9'):
        found = predict_model('test_resnet', *support, hypernet=net)
    assert_close(found.conv1[0].weight, model.conv1[0].weight)
    with torch.inference_mode():
        features = torch.cat(
            [found.forward_head(found.forward_features(part), pre_logits=True) for part in batches(net, support)]
        )
    centroids = torch.stack([features[[n == name for n in support[1]]].mean(0) for name in NAMES])
    cosine = F.cosine_similarity(found.fc.weight.detach() @ torch.linalg.inv(net.whitening), centroids @ net.whitening)
    assert_close(cosine, torch.ones(3), rtol=1e-3, atol=0)  # the head has seen all images


def batches(net, support):
    return [images for images, _ in open_images(support[0], input=net.config.input).batches(6)]


def test_a_device_without_memory_for_an_image_is_told_in_one_line(net, support, monkeypatch, one_line):
    scarce(monkeypatch, 0, net.encoder)
    with pytest.warns(PudNetWarning), pytest.raises(InputError) as error:
        predict_model('test_resnet', *support, hypernet=net)
    one_line(error, 'cpu has not enough memory for test_resnet', 'device="cpu"')


# What timm's arguments make of the model


@pytest.mark.parametrize(
    ('kwargs', 'needles'),
    [
        ({'out_indices': (1, 2)}, ['out_indices=(1, 2)']),
        ({'features_only': True, 'out_indices': (1, 99)}, ['(1, 99)']),
        ({'pretrained_cfg_overlay': {'crop': 0.9}}, ['pretrained_cfg_overlay', 'crop']),
        ({'features_only': True, 'feature_cls': 'foo'}, ["feature_cls='foo'"]),
    ],
)
def test_what_timm_refuses_of_a_feature_model_is_one_line(net, support, kwargs, needles, one_line):
    with pytest.raises(InputError) as error:
        create_model('test_resnet', pretrained_from=support[0], hypernet=net, **kwargs)
    one_line(error, 'test_resnet', *needles)


def test_a_config_of_one_s_own_says_nothing_else_of_the_weights(net, support, one_line):
    own = {'license': 'mit', 'tag': 'mine', 'num_classes': 3, 'mean': list(net.config.input.mean)}
    found = predict_model('test_resnet', *support, hypernet=net, pretrained_cfg_overlay=own)
    assert own.items() <= found.pretrained_cfg.items()
    own['mean'] = tuple(own['mean'])
    for wrong in (
        *({'input_size': (3, 224, 224)}, {'crop_pct': 0.5}, {'num_classes': 5}),
        *({'architecture': 'resnet18'}, {'classifier': 'head'}, {'first_conv': 'stem'}),
    ):
        with pytest.raises(InputError) as error:
            predict_model('test_resnet', *support, hypernet=net, pretrained_cfg_overlay=wrong)
        one_line(error, 'pretrained_cfg_overlay', next(iter(wrong)), 'for these weights')
    for wrong in ({'file': 'mine.safetensors'}, {'state_dict': net.state_dict()}, {'hf_hub_id': 'org/name'}):
        with pytest.raises(InputError) as error:
            predict_model('test_resnet', *support, hypernet=net, pretrained_cfg_overlay=wrong)
        one_line(error, 'pretrained_cfg_overlay', next(iter(wrong)), 'where the weights come from')
    for wrong, needle in (
        (5, 'a mapping'),
        ({'label_names': ('a', 'b')}, '3 names'),
        ({'label_names': 'abc'}, 'got abc'),
    ):
        with pytest.raises(InputError) as error:
            predict_model('test_resnet', *support, hypernet=net, pretrained_cfg_overlay=wrong)
        one_line(error, 'pretrained_cfg_overlay', needle)


def test_timm_s_own_arguments_travel_or_are_refused_with_what_does_it(net, support, model, tmp_path, one_line):
    own = {'cache_dir': tmp_path, 'scriptable': False, 'exportable': True, 'no_jit': True, 'global_pool': None}
    found = predict_model('test_resnet', *support, hypernet=net, **own)
    state_close(found.state_dict(), model.state_dict(), tolerance=0)
    save_model(found, tmp_path / 'model')
    timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True)
    with pytest.raises(InputError) as error:
        predict_model('test_resnet', *support, hypernet=net, dtype=torch.float16)
    one_line(error, 'dtype', '.to(torch.float16)')


def test_none_is_an_argument_that_is_not_given(support):
    kwargs = {'model_kwargs': {'global_pool': 'max'}, 'sketch_width': 8, 'input': InputConfig(input_size=(3, 32, 32))}
    network = PudNet.for_target('test_resnet', **kwargs)
    found = predict_model('test_resnet', *support, hypernet=network, global_pool=None)
    assert found.global_pool.pool_type == 'max'


def test_feature_models_that_are_made_at_once_leave_timm_s_log_as_it_was():
    logger = logging.getLogger('timm.models._builder')
    first, second = room._quiet_builder(), room._quiet_builder()
    first.__enter__()
    second.__enter__()
    assert not logger.filter(logging.LogRecord(logger.name, logging.WARNING, '', 0, 'lost', (), None))
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert logger.filter(logging.LogRecord(logger.name, logging.WARNING, '', 0, 'lost', (), None))
    assert logger.level == logging.NOTSET


def test_a_feature_model_is_not_saved(net, support, tmp_path, nothing_written, one_line):
    model = create_model('test_resnet', pretrained_from=support[0], hypernet=net, features_only=True)
    with nothing_written(tmp_path), pytest.raises(InputError) as error:
        save_model(model, tmp_path / 'model')
    one_line(error, 'FeatureListNet')


def test_a_model_of_frozen_norms_is_saved(tmp_path):
    model = timm.create_model('resnet18', num_classes=3)
    model.bn1.running_mean.fill_(0.5)
    timm.utils.freeze(model, ['conv1', 'bn1'])
    loaded = timm.create_model(f'local-dir:{save_model(model, tmp_path / "model")}', pretrained=True).state_dict()
    assert loaded.pop('bn1.num_batches_tracked') == 0  # which torch's frozen norms lack
    assert_close(dict(loaded), dict(model.state_dict()), rtol=0, atol=0)


def test_what_a_file_cannot_hold_is_told_in_one_line(tmp_path, one_line):
    with torch.device('meta'):
        empty = timm.create_model('test_resnet')
    shared = timm.create_model('test_resnet')
    shared.layer1[0].conv2.weight = shared.layer1[0].conv1.weight
    for model, needle in ((empty, 'meta device'), (shared, 'layer1.0.conv2.weight and layer1.0.conv1.weight share')):
        with pytest.raises(InputError) as error:
            save_model(model, tmp_path / 'model')
        one_line(error, needle)


def test_what_timm_could_not_load_is_not_saved(net, support, tmp_path, nothing_written, one_line):
    def with_parametrized(model):
        torch.nn.utils.parametrizations.weight_norm(model.conv1[0])

    save_model(timm.create_model('test_resnet', num_classes=2), tmp_path / 'timm')
    changes = {
        'fc.weight is not there': lambda model: setattr(model, 'fc', torch.nn.Identity()),
        'fc.weight': lambda model: setattr(model, 'fc', torch.nn.Linear(model.num_features, 7)),
        'fc.0.weight': lambda model: setattr(model, 'fc', torch.nn.Sequential(torch.nn.Linear(model.num_features, 3))),
        'mine': lambda model: model.register_buffer('mine', torch.zeros(3)),
        'fc.weight_orig': lambda model: prune.random_unstructured(model.fc, 'weight', 0.5),
        'conv1.0.parametrizations': with_parametrized,
    }
    for key, change in changes.items():
        model = predict_model('test_resnet', *support, hypernet=net)
        change(model)
        with nothing_written(tmp_path), pytest.raises(InputError) as error:
            save_model(model, tmp_path / 'model')
        remedy = 'reset_classifier' if list(changes).index(key) < 3 else 'undo what was changed'
        one_line(error, key, 'test_resnet of 3 classes', remedy)
    with pytest.raises(InputError, match='no folder can be made there'):
        save_model(model, tmp_path / ('long' * 100))
    with pytest.raises(InputError, match='Linear cannot be saved'):
        save_model(torch.nn.Linear(2, 2), tmp_path / 'model')
    model.reset_classifier(7)
    torch.nn.utils.parametrize.remove_parametrizations(model.conv1[0], 'weight')
    save_model(torch.compile(model), tmp_path / 'model')  # never run, so nothing is compiled
    assert timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True).num_classes == 7


def test_feature_maps_come_without_timm_s_list_of_what_they_leave_out(tmp_path, pictures, caplog):
    made = PudNet.for_target('test_efficientnet', sketch_width=8)
    create_model('test_efficientnet', pretrained_from=pictures(6)[0], hypernet=made, features_only=True)
    assert 'Unexpected keys' not in caplog.text


@pytest.mark.parametrize('cls', ['list', 'hook', 'getter'])
def test_features_only_gives_the_feature_maps_of_the_calibrated_network(net, support, query, cls):
    whole = predict_model('test_resnet', support[0], hypernet=net, head='none')
    model = create_model(
        'test_resnet', pretrained_from=support[0], hypernet=net, features_only=True, out_indices=(1, 3), feature_cls=cls
    )
    configs = [getattr(module, 'pretrained_cfg', None) or {} for module in model.modules()]
    assert any(configs)
    assert not any('state_dict' in config for config in configs), 'the weights are held twice'
    with torch.inference_mode():
        found, wanted = model(query[0]), whole.forward_intermediates(query[0], indices=(1, 3), intermediates_only=True)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize(
    'kwargs', [{'output_stride': 8}, {'drop_rate': 0.3}, {'drop_path_rate': 0.2}, {'global_pool': 'max'}]
)
def test_arguments_that_leave_the_weights_alone_travel_through(net, support, query, kwargs):
    model = create_model('test_resnet', pretrained_from=support[0], labels=support[1], hypernet=net, **kwargs)
    plain = predict_model('test_resnet', *support, hypernet=net)
    assert_close(model.conv1[0].weight, plain.conv1[0].weight)
    wanted = timm.create_model('test_resnet', num_classes=3, **kwargs).eval()
    wanted.load_state_dict(model.state_dict())
    with torch.inference_mode():
        assert_close(model(query[0]), wanted(query[0]))


def test_an_empty_folder_is_empty_again_when_filling_it_fails_midway(tmp_path, monkeypatch):
    folder, move, calls = tmp_path / 'out', os.replace, []
    folder.mkdir()

    def replace(source, target):
        calls.append(Path(target).parent)
        if len(calls) == 2:
            raise OSError('broken')
        move(source, target)

    monkeypatch.setattr(os, 'replace', replace)

    def fill():
        with folder_written_whole(folder) as beside:
            for name in 'abc':
                (beside / name).write_text(name)

    with pytest.raises(OSError, match='broken'):
        fill()
    assert calls[:2] == [folder, folder]
    assert list(folder.iterdir()) == []


def test_features_of_another_width_than_the_whitening_s_are_taken_as_they_are(tiny):
    rows, labels = torch.randn(12, 5), torch.arange(12) % 3
    classifier, stream = nn.Linear(5, 3), HEADS['centroid'](3, None)
    stream.add(rows, labels)
    _write_head(classifier, stream, None, tiny, 'centroid')
    weight, bias = stream.classifier(torch.eye(5))
    assert_close((classifier.weight.detach(), classifier.bias.detach()), (weight, bias), check_dtype=False)


def test_a_config_of_one_s_own_may_say_what_is_so_and_no_source_of_weights(net, support, one_line):
    usual = timm.get_pretrained_cfg('test_resnet')
    own = {'architecture': 'test_resnet', 'classifier': usual.classifier, 'first_conv': usual.first_conv}
    found = predict_model('test_resnet', *support, hypernet=net, pretrained_cfg_overlay=own)
    assert own.items() <= found.pretrained_cfg.items()
    with pytest.raises(InputError) as error:
        predict_model('test_resnet', *support, hypernet=net, pretrained_cfg_overlay={'source': 'hf-hub'})
    one_line(error, 'pretrained_cfg_overlay', 'source', 'where the weights come from')


def test_no_image_of_an_odd_number_is_lost_where_memory_is_short():
    seen = []

    def run(images, labels):
        if len(images) > 4:
            raise torch.OutOfMemoryError
        seen.append((images, labels))

    with pytest.warns(PudNetWarning, match='out of memory with 7 images'):
        in_memory(run, torch.arange(7), torch.arange(7) + 10)
    assert [torch.cat(part).tolist() for part in zip(*seen, strict=True)] == [[*range(7)], [*range(10, 17)]]


def test_unequal_classes_count_alike_in_the_sketch_of_a_feature_model_too(net, support):
    pixels, names = support
    picks = [place for place, name in enumerate(names) if name != names[0] or place < 6]
    some = pixels[picks], [names[place] for place in picks]
    with_head = predict_model('test_resnet', *some, hypernet=net).state_dict()
    features = predict_model('test_resnet', *some, hypernet=net, head='none').state_dict()
    assert_close(dict(features), {key: with_head[key] for key in features}, rtol=0, atol=0)
