import copy
import dataclasses
import hashlib
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch.testing import assert_close

import timm_pudnet
from timm_pudnet.adapt import centroid_logits, class_centroids
from timm_pudnet.config import (
    DamagedFileError,
    InputConfig,
    InputError,
    NotFoundError,
    OutputExistsError,
    PudNetConfig,
    PudNetError,
    PudNetWarning,
    UnsupportedTargetError,
)
from timm_pudnet.files import folder_written_whole, written_whole
from timm_pudnet.hypernet import CONFIG_NAME, WEIGHTS_NAME, PudNet, plan_hypernet
from timm_pudnet.predict import check_output

SMALL = InputConfig(input_size=(3, 32, 32))


@pytest.fixture
def saved(tiny, tmp_path):
    return tiny.save_pretrained(tmp_path / 'net')


@pytest.fixture
def trained():
    """A hypernetwork none of whose tensors is at its start."""
    return changed(PudNet.for_target('test_resnet', sketch_width=16, input=SMALL, predict_norm=True, tag='a_tag'))


def changed(hypernet):
    with torch.no_grad():
        for value in hypernet.state_dict().values():
            if value.is_floating_point():
                value.add_(0.1 * torch.rand_like(value))
    return hypernet.eval()


def change_weights(folder, change):
    state = safetensors.torch.load_file(folder / WEIGHTS_NAME)
    change(state)
    safetensors.torch.save_file(state, folder / WEIGHTS_NAME)


def change_config(folder, **changes):
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**config, **changes}))


def digest(weights):
    text = hashlib.sha256()
    for key, value in sorted(weights.items()):
        text.update(key.encode() + value.detach().contiguous().numpy().tobytes())
    return text.hexdigest()


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet', 'resnet18', 'nf_regnet_b0'])
def test_prediction_is_the_whole_state_dict_but_the_classifier(name):
    hypernet = PudNet.for_target(name, generator='paper', sketch_width=8, input=SMALL)
    with torch.no_grad():
        weights = hypernet(torch.rand(8))
    model = timm.create_model(name, num_classes=0)
    state = model.state_dict()
    assert {key: (value.shape, value.dtype) for key, value in weights.items()} == {
        key: (value.shape, value.dtype) for key, value in state.items()
    }
    model.load_state_dict(weights, strict=True)
    assert model.eval()(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_a_new_hypernetwork_starts_from_timm_s_shared_parameters():
    hypernet = PudNet.for_target('resnet18', sketch_width=8, input=SMALL, predict_norm=True)
    weights = hypernet(torch.rand(8))
    start = timm.create_model('resnet18', num_classes=0).state_dict()
    norms = [key for key in start if 'bn' in key or 'downsample.1' in key]
    assert norms
    for key in norms:
        assert_close(weights[key].detach(), start[key], rtol=0, atol=0)


def test_without_an_input_the_architecture_s_own_is_taken():
    config = PudNet.for_target('test_resnet', sketch_width=8).config.input
    assert (config.input_size, config.crop_pct, config.interpolation) == ((3, 160, 160), 0.95, 'bilinear')


@pytest.mark.parametrize(
    'config',
    [
        {'input': InputConfig(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))},
        {'input': SMALL, 'model_kwargs': {'in_chans': 1}},
    ],
    ids=['grey input, colour target', 'colour input, grey target'],
)
def test_a_target_that_cannot_take_the_input_s_channels_is_refused(config):
    with pytest.raises(PudNetError, match=r'channels|in_chans'):
        PudNet.for_target('test_resnet', sketch_width=8, **config)


OF_ONE_SIZE = {'generator': 'residual', 'sketch_width': 8}


@pytest.mark.parametrize('given', [{'input': InputConfig(input_size=(3, 64, 64))}, {'model_kwargs': {'img_size': 64}}])
def test_an_architecture_of_one_size_is_made_for_that_of_its_images(given, pictures, tmp_path, one_line):
    net = PudNet.for_target('visformer_tiny', **OF_ONE_SIZE, **given).eval()
    assert net.config.input.input_size == (3, 64, 64)
    assert 'img_size' in net.config.model_kwargs
    assert PudNet.from_pretrained(net.save_pretrained(tmp_path / 'net')).config.model_kwargs == net.config.model_kwargs
    assert plan_hypernet('visformer_tiny', **OF_ONE_SIZE, **given).target == net.target
    model = timm_pudnet.predict_model('visformer_tiny', *pictures(6), hypernet=net)
    folder = timm_pudnet.save_model(model, tmp_path / 'model')
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert_close(loaded(torch.ones(1, 3, 64, 64)), model(torch.ones(1, 3, 64, 64)))
    with pytest.raises(InputError) as error:
        timm_pudnet.predict_model('visformer_tiny', *pictures(6), hypernet=net, img_size=224)
    one_line(error, 'visformer_tiny', 'img_size 224', '64x64')


def test_a_size_that_an_architecture_of_one_size_cannot_have_is_refused(one_line):
    for name, given, needles in (
        ('visformer_tiny', {'model_kwargs': {'img_size': 64}, 'input': SMALL}, ['img_size 64', '32x32', 'leave one']),
        ('efficientformer_l1', {'input': SMALL}, ['[32, 32]', 'its own is 224x224']),
    ):
        for make in (PudNet.for_target, plan_hypernet):
            with pytest.raises(InputError) as error:
                make(name, **OF_ONE_SIZE, **given)
            one_line(error, name, *needles)
    assert plan_hypernet('visformer_tiny', **OF_ONE_SIZE).config.model_kwargs == {}
    assert plan_hypernet('resnet18', input=SMALL).config.model_kwargs == {}


def test_another_sketch_gives_other_kernels_and_the_same_shared_parameters(tiny):
    with torch.no_grad():
        first, second = tiny(torch.zeros(16)), tiny(torch.randn(16))
    for key, role in tiny.target.roles.items():
        if role == 'predicted':
            assert (first[key] - second[key]).abs().max() > 1e-4 * first[key].abs().max(), key
        elif role != 'classifier':
            assert_close(first[key], second[key], rtol=0, atol=0)


def test_sketches_are_shortened_to_the_limit(tiny):
    limited = PudNet(dataclasses.replace(tiny.config, sketch_limit=2.0)).eval()
    limited.load_state_dict(tiny.state_dict())
    short, long = torch.randn(16).div_(4), 100 * torch.randn(16)
    assert short.norm() < 2
    with torch.no_grad():
        assert_close(limited(short), tiny(short), rtol=0, atol=0)
        assert_close(limited(long), tiny(long * 2 / long.norm()))
        codes = limited.codes(torch.stack([short, long]))  # each by its own length
        assert_close(codes, torch.stack([limited.codes(short), limited.codes(long)]))
        assert_close(limited.codes(long, 2), codes[1, :2])
    with pytest.raises(InputError, match='sketch_limit'):
        dataclasses.replace(tiny.config, sketch_limit=-1.0)


VARIANTS = [{}, {'predict_norm': True}, {'generator': 'residual'}, {'context': False}]


@pytest.mark.parametrize('config', VARIANTS, ids=str)
def test_gradients_reach_every_parameter_through_the_target(config, random_images):
    hypernet = PudNet.for_target('test_resnet', sketch_width=16, input=SMALL, **config).train()
    with torch.no_grad():
        for parameter in hypernet.parameters():  # timm starts the last norm of a block at zero, which stops gradients
            parameter.add_(0.1 * torch.rand_like(parameter))
    images, labels = random_images()
    weights = hypernet(hypernet.encoder(images).mean(0))
    statistics = {key for key, role in hypernet.target.roles.items() if role == 'calibrated'}
    target = timm.create_model('test_resnet', num_classes=0).train()
    weights = {key: value for key, value in weights.items() if key not in statistics}
    features = torch.func.functional_call(target, weights, (images,))
    logits = centroid_logits(features, class_centroids(features, labels, 3), hypernet.temperature)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    for name, parameter in hypernet.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
        assert parameter.grad.isfinite().all(), name


def test_sketching_leaves_a_hypernetwork_in_training(random_images):
    hypernet = PudNet.for_target('test_resnet', sketch_width=16, input=SMALL).train()
    hypernet.sketch(torch.rand(3, 3, 32, 32))
    assert all(module.training for module in hypernet.modules())


def test_the_sketch_of_images_is_the_mean_feature_of_the_normalised_ones(tiny):
    images = torch.rand(9, 3, 32, 32)
    with torch.no_grad():
        expected = tiny.encoder((images - 0.5) / 0.5).mean(0)
    assert_close(tiny.sketch(images), expected, rtol=1e-5, atol=1e-6)
    labels = [0] * 7 + [1] * 2
    with torch.no_grad():
        features = tiny.encoder((images - 0.5) / 0.5)
    assert_close(tiny.sketch(images, labels), (features[:7].mean(0) + features[7:].mean(0)) / 2, rtol=1e-5, atol=1e-6)
    assert_close(tiny.sketch(images, labels, balance='none'), expected, rtol=1e-5, atol=1e-6)


def test_a_fresh_process_predicts_the_same_bits(trained, tmp_path, fresh_process):
    trained.save_pretrained(tmp_path / 'net')
    images = torch.rand(5, 3, 32, 32)
    safetensors.torch.save_file({'images': images}, tmp_path / 'images.safetensors')
    script = (
        'import sys, torch, safetensors.torch\n'
        'torch.set_num_threads(1)\n'
        'import timm_pudnet\n'
        'folder = sys.argv[1]\n'
        'hypernet = timm_pudnet.load_hypernet(folder + "/net")\n'
        'images = safetensors.torch.load_file(folder + "/images.safetensors")["images"]\n'
        'with torch.no_grad():\n'
        '    weights = hypernet(hypernet.sketch(images))\n'
        'safetensors.torch.save_file({k: v.contiguous() for k, v in weights.items()}, folder + "/out.safetensors")\n'
        'print(hypernet.name, hypernet.training)\n'
    )
    code, printed, errors = fresh_process('-c', script, tmp_path)
    assert code == 0, errors
    assert printed.split() == ['test_resnet.a_tag', 'False']
    with torch.no_grad():
        expected = trained(trained.sketch(images))
    assert digest(safetensors.torch.load_file(tmp_path / 'out.safetensors')) == digest(expected)


@pytest.mark.parametrize('config', VARIANTS, ids=str)
def test_a_saved_and_loaded_one_predicts_the_same_bits(config, tmp_path):
    hypernet = changed(PudNet.for_target('test_resnet', sketch_width=16, input=SMALL, **config))
    loaded = PudNet.from_pretrained(hypernet.save_pretrained(tmp_path / 'net'))
    assert loaded.state_dict().keys() == hypernet.state_dict().keys()
    images = torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        assert digest(loaded(loaded.sketch(images))) == digest(hypernet(hypernet.sketch(images)))


def test_without_context_every_layer_s_code_is_the_sketch():
    hypernet = changed(PudNet.for_target('test_resnet', sketch_width=16, input=SMALL, context=False))
    assert not any('ahru' in key for key in hypernet.state_dict())
    sketch = torch.rand(16)
    with torch.no_grad():
        weights = hypernet(sketch)
        for layer, generator in zip(hypernet.target.layers, hypernet.generators, strict=True):
            assert_close(weights[layer.key], generator(sketch), rtol=0, atol=0)


@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
def test_codes_are_of_the_share_that_eta_says(eta):
    hypernet = changed(PudNet.for_target('test_resnet', sketch_width=16, input=SMALL, eta=eta))
    sketch = torch.rand(16)
    with torch.no_grad():
        weights, codes = hypernet(sketch), hypernet.ahru(sketch)
        for layer, generator, code in zip(hypernet.target.layers, hypernet.generators, codes, strict=True):
            assert_close(weights[layer.key], generator(code), rtol=0, atol=0)
    assert hypernet.ahru.eta == eta
    assert torch.equal(codes, sketch.expand_as(codes)) == (eta == 1)


def test_everything_of_the_config_survives(tmp_path):
    hypernet = PudNet.for_target(
        'test_resnet',
        sketch_width=8,
        sketch_channels=(4, 6),
        eta=0.25,
        context=False,
        prior_images=3.5,
        deep_share=0.125,
        sketch_limit=1.25,
        gain=1.5,
        predict_norm=True,
        norm_rank=2,
        tag='shop',
        class_names=('cup', 'jar'),
        generator_kwargs={'basis_kernels': 12},
        model_kwargs={'drop_rate': 0.1, 'in_chans': 1},
        input=InputConfig(input_size=(1, 24, 40), mean=(0.1,), std=(0.3,), crop_mode='squash'),
        training={'images': 1000, 'seconds': 7},
    )
    config = PudNet.from_pretrained(hypernet.save_pretrained(tmp_path / 'net')).config
    assert torch.__version__.startswith(config.library_versions['torch'])
    assert config.library_versions['timm'] == timm.__version__
    assert {**config.to_dict(), 'library_versions': {}} == hypernet.config.to_dict()


def test_half_precision_halves_the_file_and_keeps_the_statistics(trained, tmp_path):
    whole, half = trained.save_pretrained(tmp_path / 'whole'), trained.save_pretrained(tmp_path / 'half', half=True)
    assert (half / WEIGHTS_NAME).stat().st_size < 0.6 * (whole / WEIGHTS_NAME).stat().st_size
    loaded = PudNet.from_pretrained(half)
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())
    for key in trained.target.keys('calibrated'):
        assert_close(loaded.statistics(key), trained.statistics(key), rtol=0, atol=0)
    assert_close(loaded.state_dict(), trained.state_dict(), rtol=1e-3, atol=1e-6)
    again = PudNet.from_pretrained(loaded.save_pretrained(tmp_path / 'again', half=True))
    assert_close(again.state_dict(), loaded.state_dict(), rtol=0, atol=0)


def test_a_whitening_that_does_nothing_is_not_saved(trained, tmp_path, monkeypatch, one_line):
    assert not torch.equal(trained.whitening, torch.eye(len(trained.whitening)))
    one = copy.deepcopy(trained)
    one.whitening.copy_(torch.eye(len(one.whitening)))
    plain = one.save_pretrained(tmp_path / 'plain')
    saved = safetensors.torch.load_file(plain / WEIGHTS_NAME)
    assert one.state_dict().keys() - saved.keys() == {'whitening'}
    assert digest(PudNet.from_pretrained(plain).state_dict()) == digest(one.state_dict())
    learned = trained.save_pretrained(tmp_path / 'learned') / WEIGHTS_NAME
    assert 'whitening' in safetensors.torch.load_file(learned)
    monkeypatch.setattr('timm_pudnet.hypernet.MOST_UNSAVED', 1)  # a small file must not ask for much memory
    whole = one.save_pretrained(tmp_path / 'whole')
    assert digest(PudNet.from_pretrained(whole).state_dict()) == digest(one.state_dict())
    with pytest.raises(DamagedFileError) as error:
        PudNet.from_pretrained(plain)
    one_line(error, 'whitening', 'missing')


def test_what_half_precision_cannot_hold_is_saved_as_it_is(trained, tmp_path):
    large = copy.deepcopy(trained)
    with torch.no_grad():
        key, value = next((key, value) for key, value in large.named_parameters() if value.ndim > 1)
        value.view(-1)[0] = 70_000
    loaded = PudNet.from_pretrained(large.save_pretrained(tmp_path / 'large', half=True))
    assert_close(loaded.state_dict()[key], value.detach(), rtol=0, atol=0)


def test_loading_draws_no_random_numbers_and_new_ones_follow_the_seed(saved):
    before = torch.get_rng_state()
    hypernet = PudNet.from_pretrained(saved)
    hypernet(torch.zeros(16))
    assert torch.equal(torch.get_rng_state(), before)

    def new(seed):
        torch.manual_seed(seed)
        return digest(PudNet.for_target('test_resnet', sketch_width=8, input=SMALL).state_dict())

    assert new(1) == new(1) != new(2)


def test_nothing_is_overwritten_unasked(tiny, saved, one_line):
    with pytest.raises(OutputExistsError) as error:
        tiny.save_pretrained(saved)
    one_line(error, saved, 'overwrite=True')
    (saved / 'README.md').write_text('mine')
    tiny.save_pretrained(saved, overwrite=True)
    assert sorted(path.name for path in saved.iterdir()) == ['README.md', CONFIG_NAME, WEIGHTS_NAME]
    assert (saved / 'README.md').read_text() == 'mine'


def truncate(folder, keep):
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def poison(state, value):
    state['ahru.start'][3] = value


DAMAGES = {
    'half a file': (lambda folder: truncate(folder, 0.5), [WEIGHTS_NAME]),
    'an empty file': (lambda folder: truncate(folder, 0), [WEIGHTS_NAME]),
    'not safetensors': (lambda folder: (folder / WEIGHTS_NAME).write_bytes(b'PK' * 500), [WEIGHTS_NAME]),
    'a missing tensor': (
        lambda folder: change_weights(folder, lambda state: state.pop('ahru.start')),
        [WEIGHTS_NAME, 'ahru.start', 'missing'],
    ),
    'an extra tensor': (
        lambda folder: change_weights(folder, lambda state: state.update(extra=torch.zeros(1))),
        [WEIGHTS_NAME, 'extra', 'not expected'],
    ),
    'a wrong shape': (
        lambda folder: change_weights(folder, lambda state: state.update({'ahru.start': torch.zeros(15)})),
        [WEIGHTS_NAME, 'ahru.start', '(15,)', '(16,)'],
    ),
    'a NaN': (lambda folder: change_weights(folder, lambda s: poison(s, torch.nan)), [WEIGHTS_NAME, 'ahru.start']),
    'an infinity': (lambda folder: change_weights(folder, lambda s: poison(s, -torch.inf)), [WEIGHTS_NAME, 'finite']),
    'a config of another width': (lambda folder: change_config(folder, sketch_width=17), [WEIGHTS_NAME, '17']),
    'a config that is no JSON': (lambda folder: (folder / CONFIG_NAME).write_text('{"model'), [CONFIG_NAME]),
    'a config that is no text': (lambda folder: (folder / CONFIG_NAME).write_bytes(b'\xff\xfe\x00'), [CONFIG_NAME]),
    'a config that is a list': (lambda folder: (folder / CONFIG_NAME).write_text('[]'), [CONFIG_NAME]),
    'a newer format': (lambda folder: change_config(folder, format_version=2), [CONFIG_NAME, 'update']),
    'a mean of pixels in 0-255': (
        lambda folder: change_config(folder, input={'mean': [125.3, 123.0, 113.9]}),
        [CONFIG_NAME, 'mean', 'divide mean and std by 255'],
    ),
    'a mean of words': (lambda folder: change_config(folder, input={'mean': ['0.5'] * 3}), [CONFIG_NAME, 'mean']),
    'an input out of range': (lambda folder: change_config(folder, input={'std': [0, 0, 0]}), [CONFIG_NAME, 'std']),
    'a width of the wrong type': (
        lambda folder: change_config(folder, sketch_width='x'),
        [CONFIG_NAME, 'sketch_width'],
    ),
    'arguments of the wrong type': (lambda folder: change_config(folder, model_kwargs=5), [CONFIG_NAME]),
    'an unknown architecture': (lambda folder: change_config(folder, model_name='resnet81'), [CONFIG_NAME, 'resnet81']),
    'an unknown generator': (lambda folder: change_config(folder, generator='papr'), [CONFIG_NAME, 'papr']),
}


@pytest.mark.parametrize('name', DAMAGES)
def test_damage_is_told_in_one_line_that_names_the_file(name, saved, one_line):
    damage, needles = DAMAGES[name]
    damage(saved)
    with pytest.raises(PudNetError) as error:
        PudNet.from_pretrained(saved)
    one_line(error, saved, *needles)
    assert isinstance(error.value, (DamagedFileError, InputError))


@pytest.mark.parametrize('name', [CONFIG_NAME, WEIGHTS_NAME])
def test_an_absent_file_is_named(name, saved, one_line):
    (saved / name).unlink()
    with pytest.raises(NotFoundError) as error:
        PudNet.from_pretrained(saved)
    one_line(error, saved, name)


def test_keys_of_a_newer_library_are_ignored_with_a_warning(saved, tiny):
    change_config(saved, colour='blue', shade=3)
    with pytest.warns(PudNetWarning, match='ignored colour, shade'):
        loaded = PudNet.from_pretrained(saved)
    assert_close(loaded.state_dict(), tiny.state_dict(), rtol=0, atol=0)


def disk_full(tensors, path, metadata=None):
    Path(path).write_bytes(safetensors.torch.save(tensors, metadata)[:1000])
    raise OSError(28, 'No space left on device')


def test_a_save_that_fails_at_its_last_rename_leaves_nothing(tiny, tmp_path, monkeypatch):
    replace = os.replace

    def fails(source, target):
        if str(target).endswith(WEIGHTS_NAME):
            raise OSError('no more')
        replace(source, target)

    monkeypatch.setattr(os, 'replace', fails)
    with pytest.raises(OSError, match='no more'):
        tiny.save_pretrained(tmp_path / 'net')
    assert not [*tmp_path.iterdir()]


def test_other_files_stay_where_nothing_is_overwritten(tiny, tmp_path):
    (tmp_path / 'model-00001-of-00002.safetensors').write_bytes(b'')
    tiny.save_pretrained(tmp_path)
    assert (tmp_path / 'model-00001-of-00002.safetensors').is_file()


def test_a_folder_may_have_timm_s_prefix(tiny, tmp_path, monkeypatch, one_line):
    monkeypatch.chdir(tmp_path)
    assert tiny.save_pretrained('local-dir:net') == Path('net')
    assert PudNet.from_pretrained('local-dir:net').config.model_name == tiny.config.model_name
    with pytest.raises(InputError) as error:
        tiny.save_pretrained('hf-hub:org/net')
    one_line(error, 'hf-hub:org/net', 'push_to_hub')


def test_one_in_double_precision_is_saved_in_single(tiny, tmp_path):
    expected = {key: value.clone() for key, value in tiny.state_dict().items()}
    found = PudNet.from_pretrained(copy.deepcopy(tiny).double().save_pretrained(tmp_path / 'net')).state_dict()
    assert_close(found, expected, rtol=0, atol=0)


WRONG = [
    {'predict_norm': 1},
    {'context': 'false'},
    {'eta': True},
    {'tag': None},
    {'norm_rank': True},
    {'sketch_width': 8.0},
]
WRONG += [{'eta': '0.5'}, {'sketch_channels': 16}, {'input': {'input_size': (3, 32, 32)}}, {'class_names': (1, 2)}]


@pytest.mark.parametrize('wrong', WRONG, ids=str)
def test_values_that_a_file_could_not_hold_are_refused(wrong, one_line):
    with pytest.raises(InputError) as error:
        PudNetConfig(**{'model_name': 'test_resnet', 'input': SMALL, **wrong})
    one_line(error, *wrong)


@pytest.mark.parametrize(
    'wrong', [{'crop_pct': True}, {'mean': 0.5}, {'std': (None, 1.0, 1.0)}, {'input_size': 'abc'}], ids=str
)
def test_values_that_a_file_could_not_hold_are_refused_of_its_input_too(wrong, one_line):
    with pytest.raises(InputError) as error:
        InputConfig(**wrong)
    one_line(error, *wrong)


def test_numbers_of_numpy_and_torch_become_python_s(tmp_path):
    input = InputConfig(input_size=(3, 32, 32), mean=torch.tensor([0.25, 0.5, 0.5]), std=np.ones(3))
    config = PudNetConfig(
        model_name='test_resnet', input=input, sketch_width=np.int64(16), sketch_limit=torch.tensor(3.0)
    )
    assert PudNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_save_that_fails_leaves_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors.torch, 'save_file', disk_full)
    with pytest.raises(OSError, match='No space left'):
        tiny.save_pretrained(tmp_path / 'net')
    assert not list(tmp_path.iterdir())


def test_a_save_that_fails_leaves_the_earlier_files(trained, saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr(safetensors.torch, 'save_file', disk_full)
    with pytest.raises(OSError, match='No space left'):
        trained.save_pretrained(saved, overwrite=True)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


@pytest.mark.parametrize('overwrite', [False, True])
def test_a_save_that_fails_at_the_config_changes_neither_file(overwrite, tiny, trained, tmp_path, monkeypatch):
    folder = tmp_path / 'net'
    if overwrite:
        tiny.save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()} if overwrite else {}

    def fail(self, *args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Path, 'write_text', fail)
    with pytest.raises(OSError, match='No space left'):
        trained.save_pretrained(folder, overwrite=overwrite)
    assert folder.exists() == overwrite
    found = {path.name: path.read_bytes() for path in folder.iterdir()} if overwrite else {}
    assert found == before


# Starting from given weights


@pytest.mark.parametrize(
    'config', [{'generator': 'residual'}, {'generator': 'residual', 'generator_kwargs': {'largest': 600}}, {}], ids=str
)
@pytest.mark.parametrize('fresh', [True, False])
def test_a_hypernetwork_predicts_the_weights_that_it_starts_from(config, fresh):
    model = timm.create_model('test_resnet', num_classes=0)
    for value in model.state_dict().values():
        value.copy_(torch.rand_like(value.float()))
    weights = model.state_dict()
    hypernet = PudNet.for_target('test_resnet', sketch_width=16, input=SMALL, predict_norm=True, **config)
    hypernet = hypernet if fresh else changed(hypernet)
    hypernet.start_from(weights)
    for sketch in (torch.zeros(16), torch.randn(16)):
        found = dict(hypernet(sketch))
        if config.get('generator') == 'residual':
            assert_close(found, dict(weights), rtol=0, atol=0)
        else:  # solved for
            assert_close(found, dict(weights), rtol=1e-4, atol=1e-5)


# Warm start: timm's weights, or those of a folder


@pytest.fixture(scope='module')
def timm_model():
    """A model of timm's whose every tensor is its own, with a classifier and norm statistics that matter."""
    torch.manual_seed(3)
    model = timm.create_model('test_resnet', num_classes=7)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.mul_(1 + 0.1 * torch.rand_like(value)).add_(0.02 * torch.rand_like(value))
    return model.eval()


@pytest.fixture(scope='module')
def timm_folder(timm_model, tmp_path_factory):
    return timm_pudnet.save_model(timm_model, tmp_path_factory.mktemp('timm') / 'model')


@pytest.mark.parametrize('generator', ['paper', 'residual'])
def test_a_warm_started_hypernetwork_predicts_that_network_whatever_the_images(generator, timm_model, timm_folder):
    hypernet = PudNet.for_target(
        'test_resnet', generator=generator, pretrained=str(timm_folder), sketch_width=16, prior_images=1e9
    )
    assert hypernet.config.input.input_size == (3, 160, 160)  # as the folder says
    with torch.no_grad():
        for sketch in (torch.zeros(16), torch.randn(16)):
            weights = hypernet(sketch)
            expected = {key: value for key, value in timm_model.state_dict().items() if not key.startswith('fc.')}
            assert_close(dict(weights), expected, rtol=1e-4, atol=1e-5)
    images = torch.rand(5, 3, 160, 160)
    model = timm_pudnet.predict_model('test_resnet', images, hypernet=hypernet.eval())
    with torch.no_grad():
        wanted = timm_model.forward_head(timm_model.forward_features(images), pre_logits=True)
        assert_close(model(images), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize('generator', ['paper', 'residual'])
def test_training_can_go_on_from_a_warm_start(generator, timm_folder):
    hypernet = PudNet.for_target(
        'test_resnet', generator=generator, pretrained=str(timm_folder), sketch_width=16, predict_norm=True
    ).train()
    sum(value.square().sum() for value in hypernet(torch.rand(16)).values() if value.is_floating_point()).backward()
    steered = [p for name, p in hypernet.named_parameters() if name.endswith(('steer', 'change', 'embed.weight'))]
    assert len(steered) == len(hypernet.target.layers)
    assert all(parameter.grad.abs().sum() > 0 for parameter in steered)


def test_timm_s_own_pretrained_weights_are_taken_by_their_tag(monkeypatch, timm_model, timm_folder):
    original = timm.create_model

    def create(name, *, pretrained=False, **kwargs):
        if pretrained:  # the one difference to the real call: a file in place of a download
            kwargs['pretrained_cfg_overlay'] = {'file': str(timm_folder / 'model.safetensors'), 'num_classes': 7}
        return original(name, pretrained=pretrained, **kwargs)

    monkeypatch.setattr(timm, 'create_model', create)
    hypernet = PudNet.for_target('test_resnet.r160_in1k', pretrained=True, sketch_width=16)
    assert hypernet.name == 'test_resnet.r160_in1k'
    assert_close(hypernet(torch.rand(16))['layer1.0.conv1.weight'], timm_model.layer1[0].conv1.weight)


def test_a_warm_start_may_lie_in_the_home_directory(monkeypatch, timm_folder, timm_model):
    monkeypatch.setenv('HOME', str(timm_folder.parent))
    hypernet = PudNet.for_target('test_resnet', pretrained=f'~/{timm_folder.name}', sketch_width=16)
    assert_close(hypernet(torch.rand(16))['layer1.0.conv1.weight'], timm_model.layer1[0].conv1.weight)


def test_pretrained_weights_that_cannot_be_had_are_told_in_one_line(monkeypatch, tmp_path, one_line):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setenv('HF_HOME', str(tmp_path))
    with pytest.raises(NotFoundError) as error:
        PudNet.for_target('test_resnet.r160_in1k', pretrained=True)
    one_line(error, 'test_resnet.r160_in1k', 'cannot be had')
    with pytest.raises(NotFoundError) as error:
        PudNet.for_target('test_resnet', pretrained=str(tmp_path / 'nowhere'))
    one_line(error, 'nowhere', 'no such folder')


def test_a_hypernetwork_is_no_timm_model_to_start_from(tiny_folder, one_line):
    with pytest.raises(InputError) as error:
        PudNet.for_target('test_resnet', pretrained=tiny_folder, sketch_width=16)
    one_line(error, tiny_folder, 'is a hypernetwork', 'architecture (test_resnet)', '--hypernet')


def test_a_folder_of_another_network_is_refused(timm_folder, one_line):
    with pytest.raises(InputError) as error:
        PudNet.for_target('test_efficientnet', pretrained=str(timm_folder), sketch_width=16)
    one_line(error, 'test_efficientnet', f'{timm_folder} holds test_resnet')


def test_arguments_that_change_no_network_are_no_other_one(tmp_path):
    model = timm.create_model('test_resnet', num_classes=3, output_stride=32, zero_init_last=False)
    folder = timm_pudnet.save_model(model, tmp_path / 'same')
    PudNet.for_target('test_resnet', pretrained=folder, sketch_width=16)


@pytest.mark.parametrize('asked', [{}, {'act_layer': 'gelu', 'drop_path_rate': 0.1}])
def test_a_folder_of_a_network_that_only_its_arguments_tell_apart_is_refused(asked, tmp_path, one_line):
    model = timm.create_model('test_resnet', num_classes=3, act_layer='gelu')
    folder = timm_pudnet.save_model(model, tmp_path / 'gelu')
    if asked:
        PudNet.for_target('test_resnet', pretrained=f'local-dir:{folder}', sketch_width=16, model_kwargs=asked)
        asked = {'act_layer': 'silu'}
    with pytest.raises(InputError) as error:
        PudNet.for_target('test_resnet', pretrained=str(folder), sketch_width=16, model_kwargs=asked)
    one_line(error, folder, "test_resnet with the arguments {'act_layer': 'gelu'}", f'model_kwargs {asked}')


# Plans


def test_auto_takes_the_paper_s_generator_where_it_fits_and_says_so_where_not():
    assert PudNet.for_target('test_resnet', sketch_width=16).config.generator == 'paper'
    assert plan_hypernet('resnet18').config.generator == 'paper'
    with pytest.warns(PudNetWarning, match=r"resnet50: generator='residual', since the paper's .* 121 million"):
        plan = plan_hypernet('resnet50')
    assert plan.config.generator == 'residual'
    assert plan.parameters / plan.weights < 1.1
    assert plan_hypernet('resnet50', generator='paper').parameters == pytest.approx(121e6, rel=0.01)


def test_sketches_are_as_wide_as_suits_the_target_unless_a_width_is_asked_for():
    sizes = {}
    for name in ('resnet18', 'densenet121', 'mobilenetv3_small_050', 'mobilenetv2_035', 'test_efficientnet'):
        plan = plan_hypernet(name, generator='residual')
        assert plan.parameters <= 1.1 * plan.weights, name
        sizes[name] = (plan.config.sketch_width, plan.config.generator_kwargs['rank'])
    assert sizes['resnet18'] == (128, 4)
    assert sizes['densenet121'] > sizes['mobilenetv2_035'] > sizes['test_efficientnet']
    asked = plan_hypernet('test_efficientnet', generator='residual', sketch_width=64).config
    assert (asked.sketch_width, asked.sketch_channels, asked.generator_kwargs) == (64, (16, 32), {})
    ranked = plan_hypernet('mobilenetv2_035', generator='residual', generator_kwargs={'rank': 3}).config
    assert (ranked.sketch_width, ranked.generator_kwargs) == (128, {'rank': 3})
    assert plan_hypernet('test_resnet', generator='paper').config.sketch_width == 128
    for name in ('resnet18', 'efficientnet_b0'):  # of norms too, or sketches would have to be of width 8
        plan = plan_hypernet(name, generator='residual', predict_norm=True)
        assert plan.parameters <= 1.1 * plan.weights, name
        assert plan.config.sketch_width >= 32, name
        assert plan.config.norm_rank == plan.config.generator_kwargs['rank'], name
    assert plan_hypernet(name, generator='residual', predict_norm=True, norm_rank=0).config.sketch_width == 8
    made = PudNet.for_target('test_efficientnet', generator='residual')
    assert made.config.sketch_width == sizes['test_efficientnet'][0]
    assert made(torch.zeros(made.config.sketch_width))['conv_stem.weight'].isfinite().all()


@pytest.mark.parametrize('generator', ['paper', 'residual'])
def test_a_plan_is_what_is_made(generator, tmp_path):
    plan = plan_hypernet('test_resnet', generator=generator, sketch_width=16)
    hypernet = PudNet.for_target('test_resnet', generator=generator, sketch_width=16)
    assert plan.parameters == sum(parameter.numel() for parameter in hypernet.parameters())
    state = timm.create_model('test_resnet', num_classes=0)
    assert plan.weights == sum(parameter.numel() for parameter in state.parameters())
    kernels = [m.weight.shape[0] * m.weight.shape[1] for m in state.modules() if isinstance(m, torch.nn.Conv2d)]
    assert plan.kernels == sum(kernels)
    assert plan.target == hypernet.target
    hypernet.whitening.mul_(2)
    size = (hypernet.save_pretrained(tmp_path, half=True) / WEIGHTS_NAME).stat().st_size
    assert plan.file_bytes == pytest.approx(size, rel=0.2)  # a small network's names take room too


# What else a target may hold


def test_tied_weights_and_constant_buffers_go_through(monkeypatch):
    original = timm.create_model

    def create(*args, **kwargs):
        model = original(*args, **kwargs)
        model.layer1[0].conv2.weight = model.layer1[0].conv1.weight
        model.layer1.register_buffer('index', torch.arange(5))
        return model

    monkeypatch.setattr(timm, 'create_model', create)
    kwargs = {'drop_rate': 0.21}  # not described before
    hypernet = PudNet.for_target('test_resnet', sketch_width=16, input=SMALL, model_kwargs=kwargs)
    weights = hypernet(torch.rand(16))
    assert weights['layer1.0.conv2.weight'] is weights['layer1.0.conv1.weight']
    assert torch.equal(weights['layer1.index'], torch.arange(5))
    assert not weights['layer1.index'].requires_grad
    create('test_resnet', num_classes=0, **kwargs).load_state_dict(weights)


def test_linear_layers_are_predicted_where_asked(tmp_path):
    with pytest.raises(UnsupportedTargetError, match=r'predict_linear=True'):
        PudNet.for_target('test_vit', sketch_width=16)
    hypernet = PudNet.for_target('test_vit', sketch_width=16, generator='residual', predict_linear=True)
    assert hypernet.target.predicted_share > 0.9
    model = timm.create_model('test_vit', num_classes=0)
    model.load_state_dict(hypernet(torch.rand(16)))
    loaded = PudNet.from_pretrained(hypernet.save_pretrained(tmp_path / 'net'))
    assert loaded.target == hypernet.target


@pytest.mark.parametrize('generator', ['paper', 'residual'])
def test_weights_are_exact_in_mixed_precision(generator):
    made = PudNet.for_target('test_resnet', generator=generator, sketch_width=16).eval()
    sketch = torch.randn(16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = made(sketch)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            found = made(sketch)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize('mean', [(-104.0, -117.0, -124.0), (True, False, True), (math.nan,) * 3])
def test_a_mean_of_no_pixels_in_0_to_1_is_refused(mean, one_line):
    with pytest.raises(InputError) as error:
        InputConfig(mean=mean)
    one_line(error, 'mean')


def test_a_file_that_windows_holds_for_a_moment_is_renamed_a_little_later(tmp_path, monkeypatch):
    class Held(OSError):
        winerror = 32

    replace, waits, fails = os.replace, [], [Held(), Held()]

    def sometimes(source, target):
        if fails:
            raise fails.pop()
        replace(source, target)

    monkeypatch.setattr(os, 'replace', sometimes)
    monkeypatch.setattr(time, 'sleep', waits.append)
    with written_whole(tmp_path / 'file') as beside:
        beside.write_text('whole')
    assert (tmp_path / 'file').read_text() == 'whole'
    assert waits == [0.1, 0.3]
    fails.append(OSError(28, 'No space left on device'))
    with pytest.raises(OSError, match='No space'), written_whole(tmp_path / 'other'):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_what_the_system_leaves_in_a_folder_is_nobodys(tmp_path):
    (tmp_path / 'seen').mkdir()
    (tmp_path / 'seen' / '.DS_Store').touch()
    check_output(tmp_path / 'seen')
    with folder_written_whole(tmp_path / 'seen') as beside:
        (beside / 'file').touch()
    assert sorted(path.name for path in (tmp_path / 'seen').iterdir()) == ['.DS_Store', 'file']
    with pytest.raises(OutputExistsError):
        check_output(tmp_path / 'seen')
