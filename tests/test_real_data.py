import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import FashionMNIST

import timm_pudnet
from timm_pudnet import InputConfig, load_hypernet, open_images, predict_model
from timm_pudnet.evaluation import TestGroups, evaluate
from timm_pudnet.training.episodes import ImageBank, bank_input

pytestmark = pytest.mark.data
DATA = Path(os.environ.get('TIMM_PUDNET_DATA', '../shared/data'))


@pytest.fixture(scope='module')
def load():
    if not (DATA / 'export.py').is_file():
        (pytest.fail if 'TIMM_PUDNET_DATA' in os.environ else pytest.skip)(f'{DATA} has no image sets')
    sys.path.insert(0, str(DATA.resolve()))
    from export import load  # type: ignore[import-not-found]

    return load


def as_tensor(images):
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)


def accuracy(model, source):
    right = total = 0
    with torch.inference_mode():
        for images, labels in source.batches():
            right += int((model(images).argmax(1) == labels).sum())
            total += len(labels)
    return right / total


def test_real_photographs_of_several_sizes_give_a_feature_model(tmp_path, load):
    with zipfile.ZipFile(DATA / 'bsds500.zip') as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if name.startswith('test/')])
    model = predict_model('resnet18', tmp_path / 'test', strict=True)
    assert model.num_classes == 0
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_tiny_imagenet_jpeg_files_and_their_pixels_give_the_same_model(tmp_path, load):
    with zipfile.ZipFile(DATA / 'tiny-imagenet.zip') as archive:
        names = [name for name in archive.namelist() if name.endswith('.JPEG')]
        folders = sorted({name.split('/')[0] for name in names})[:3]
        names = sorted(name for name in names if name.split('/')[0] in folders)
        archive.extractall(tmp_path, names)
    from PIL import Image

    pixels = np.stack([np.asarray(Image.open(tmp_path / name).convert('RGB')) for name in names])
    by_files = predict_model('resnet18', tmp_path).state_dict()
    by_array = predict_model('resnet18', pixels, [name.split('/')[0] for name in names]).state_dict()
    for key, value in by_files.items():
        torch.testing.assert_close(by_array[key], value, rtol=1e-5, atol=1e-5)


def test_predicted_network_beats_chance_on_colour_photographs(load):
    images, labels, _ = load('cifar10', 'test')
    config = load_hypernet('resnet18').config.input
    used, tested = slice(0, None, 100), slice(1, None, 50)
    model = predict_model('resnet18', as_tensor(images[used]), labels[used])
    source = open_images(as_tensor(images[tested]), labels[tested], input=config)
    assert accuracy(model, source) > 0.45  # chance is 0.10


@pytest.mark.parametrize(
    ('published', 'images', 'count'),
    [('resnet18.fashion_set', 'fashion-mnist', 40), ('resnet18.mixed56', 'cifar100', 20)],
)
def test_published_accuracy_is_found_again_on_some_of_its_groups(published, images, count, load):
    try:
        images, labels, names = load(images, 'test')
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if 'coat' in names:  # as torchvision has them
        names = FashionMNIST.classes
    folder = Path(timm_pudnet.__file__).parents[1] / 'hub' / published
    hypernet = load_hypernet(folder)
    published = json.loads((folder / 'results.json').read_text())
    assert not set(published['classes']) & set(hypernet.config.class_names)
    source = open_images(as_tensor(images), np.array(names)[labels], input=bank_input(hypernet.config.input))
    bank = ImageBank.from_source(source, published['classes'])
    groups = TestGroups.load(folder / 'groups.json')
    assert groups.digest == published['groups_digest']
    some = TestGroups(groups.support[:count], groups.query[:count])
    found = evaluate(hypernet, bank, some, progress=False, without=['mean_sketch', 'random_weights', 'raw_pixels'])
    assert found['weights_digest'] == published['weights_digest']
    mean, interval = (found['accuracy']['predicted'][name] for name in ('mean', 'interval'))
    assert abs(mean - published['accuracy']['predicted']['mean']) < 3 * interval


def test_input_config_of_colour_hypernetwork_reads_grey_images(load):
    images, _, _ = load('cifar10', 'test')
    grey = images[:4].mean(-1).astype(np.uint8)
    (batch, _), *_ = open_images(grey, input=InputConfig()).batches()
    assert batch.shape == (4, 3, 32, 32)
    torch.testing.assert_close(batch[:, 0], batch[:, 2])
