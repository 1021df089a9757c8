import importlib

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import timm_pudnet
from timm_pudnet import convnet3

SMALL = {'channels': (4, 6, 8)}


def small(**kwargs):
    return timm.create_model('convnet3', **{**SMALL, 'num_classes': 5, **kwargs})


def randomise_norms(model):
    """Statistics and affine unlike those of a new BatchNorm, so that leaving one out shows."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def test_its_answer_is_that_of_three_plain_blocks_mean_and_linear():
    model = randomise_norms(small()).eval().double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    state, x = model.state_dict(), images
    for block in ('block1', 'block2', 'block3'):
        x = F.conv2d(x, state[f'{block}.conv.weight'], padding=1)
        mean, var, weight, bias = (
            state[f'{block}.bn.{name}'][:, None, None] for name in ('running_mean', 'running_var', 'weight', 'bias')
        )
        x = F.relu((x - mean) / (var + 1e-5).sqrt() * weight + bias)
        n, c, h, w = x.shape
        x = x.reshape(n, c, h // 2, 2, w // 2, 2).amax((3, 5))
    assert_close(model.forward_features(images), x)
    assert_close(model.forward_head(x, pre_logits=True), x.mean((2, 3)))
    assert_close(model(images), x.mean((2, 3)) @ state['head.fc.weight'].T + state['head.fc.bias'])


def test_its_size_and_its_input():
    model = timm.create_model('convnet3', num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == 9 * (3 * 64 + 64 * 128 + 128 * 256) + 2 * 448 + 2570
    assert model.num_features == model.head_hidden_size == 256
    assert model.num_classes == 10
    config = timm.data.resolve_model_data_config(model)
    assert (config['input_size'], config['mean'], config['std']) == ((3, 32, 32), (0.5,) * 3, (0.5,) * 3)
    assert isinstance(model.get_submodule(model.pretrained_cfg['first_conv']), nn.Conv2d)
    assert model.get_submodule(model.pretrained_cfg['classifier']) is model.get_classifier()
    assert not timm.models.is_model_pretrained('convnet3')
    with pytest.raises(RuntimeError, match='No pretrained weights'):
        timm.create_model('convnet3', pretrained=True)


def test_all_convs_are_predicted():
    spec = timm_pudnet.describe_target('convnet3')
    assert [layer.key for layer in spec.layers] == [f'block{number}.conv.weight' for number in (1, 2, 3)]
    assert spec.layers[2].shape == (256, 128, 3, 3)
    assert (spec.classifiers, spec.num_features, spec.in_chans) == (('head.fc',), 256, 3)
    assert spec.predicted_share > 0.99
    assert set(spec.keys('shared')) == {f'block{n}.bn.{name}' for n in (1, 2, 3) for name in ('weight', 'bias')}
    assert timm_pudnet.describe_target('convnet3', in_chans=1, **SMALL).layers[0].shape == (4, 1, 3, 3)


@pytest.mark.parametrize('size', [(8, 8), (9, 15), (32, 32), (33, 47)])
def test_any_size_from_8_pixels(size):
    model = small(num_classes=0, in_chans=1).eval()
    images = torch.randn(2, 1, *size)
    assert model.forward_features(images).shape == (2, 8, size[0] // 8, size[1] // 8)
    assert model(images).shape == (2, 8)
    assert_close(model(images), model(images.contiguous(memory_format=torch.channels_last)))
    assert_close(model(images), small_channels_last(model)(images))


def small_channels_last(model):
    other = small(num_classes=0, in_chans=1).eval().to(memory_format=torch.channels_last)
    other.load_state_dict(model.state_dict())
    return other


def test_the_classifier_can_be_replaced_and_left_out():
    model = small(global_pool='catavgmax', drop_rate=0.5).eval()
    images = torch.randn(2, 3, 16, 16)
    assert model(images).shape == (2, 5)
    assert model.head_hidden_size == model.get_classifier().in_features == 16
    model.reset_classifier(7, 'avg')
    assert model(images).shape == (2, model.num_classes) == (2, 7)
    assert model.head_hidden_size == model.get_classifier().in_features == 8
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert_close(model(images), model.forward_features(images).mean((2, 3)))
    model.reset_classifier(0, '')
    assert_close(model(images), model.forward_features(images))


def test_dropout_acts_while_training_only():
    model = small(drop_rate=0.9)
    images = torch.randn(2, 3, 16, 16)
    assert (model.train().forward_head(model.forward_features(images), pre_logits=True) == 0).float().mean() > 0.5
    assert_close(model.eval()(images), model(images))


def test_features_of_each_block():
    model = timm.create_model('convnet3', features_only=True)
    assert (model.feature_info.channels(), model.feature_info.reduction()) == ([64, 128, 256], [2, 4, 8])
    shapes = [tuple(x.shape) for x in model(torch.randn(2, 3, 32, 32))]
    assert shapes == [(2, 64, 16, 16), (2, 128, 8, 8), (2, 256, 4, 4)]
    whole = small()
    last = timm.create_model('convnet3', features_only=True, out_indices=(2,), **SMALL)
    last.load_state_dict({key: value for key, value in whole.state_dict().items() if not key.startswith('head.')})
    images = torch.randn(2, 3, 16, 16)
    assert_close(last.eval()(images)[0], whole.eval().forward_features(images))


def test_runs_with_the_weights_of_another_and_gradients_reach_all():
    model, other = small().eval(), randomise_norms(small()).eval()
    images = torch.randn(4, 3, 16, 16)
    weights = {key: value.clone() for key, value in other.state_dict().items()}
    learned = {key: weights[key].requires_grad_() for key, _ in other.named_parameters()}
    answer = torch.func.functional_call(model, weights, (images,))
    assert_close(answer, other(images))
    answer.square().sum().backward()
    for key, value in learned.items():
        assert value.grad is not None, key
        assert value.grad.abs().sum() > 0, key


def test_wrong_number_of_channels_is_refused():
    with pytest.raises(ValueError, match='three blocks'):
        small(channels=(4, 4))


def test_a_saved_model_is_read_in_a_fresh_process(tmp_path, fresh_process):
    """Without a warning but for one that importing an earlier timm gives."""
    model = randomise_norms(timm.create_model('convnet3', num_classes=4)).eval()
    folder = timm_pudnet.save_model(model, tmp_path / 'saved')
    images = torch.randn(2, 3, 24, 24)
    torch.save(images, tmp_path / 'images.pt')
    script = (
        'import sys, timm, torch, timm_pudnet\n'
        f'model = timm.create_model("local-dir:{folder}", pretrained=True).eval()\n'
        f'print(model(torch.load("{tmp_path}/images.pt")).tolist())\n'
    )
    code, out, err = fresh_process('-W', 'error', '-W', 'ignore:`torch.jit.interface`:FutureWarning', '-c', script)
    assert code == 0, err
    assert_close(torch.tensor(eval(out)), model(images))


def test_a_network_is_predicted(pictures):
    torch.manual_seed(0)
    hypernet = timm_pudnet.PudNet.for_target('convnet3', model_kwargs={'channels': [4, 6, 8]}, sketch_width=16).eval()
    pixels, names = pictures()
    model = timm_pudnet.predict_model('convnet3', pixels, names, hypernet=hypernet)
    assert isinstance(model, convnet3.ConvNet3)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_importing_again_registers_nothing_anew():
    entrypoint = timm.models.model_entrypoint('convnet3')
    assert entrypoint.__module__ == convnet3.__name__
    importlib.reload(convnet3)  # a warning of timm's would be an error here
    assert timm.models.model_entrypoint('convnet3') is entrypoint
    assert isinstance(small(), convnet3.ConvNet3)


def test_a_network_of_that_name_that_is_not_ours_stays(fresh_process):
    script = (
        'import warnings, timm\n'
        'def convnet3(pretrained=False, **kwargs): ...\n'
        'timm.models.register_model(convnet3)\n'
        'with warnings.catch_warnings(record=True) as caught:\n'
        '    warnings.simplefilter("always")\n'
        '    import timm_pudnet\n'
        'print([str(w.message) for w in caught if w.category is timm_pudnet.PudNetWarning])\n'
        'assert timm.models.model_entrypoint("convnet3") is convnet3\n'
    )
    code, out, err = fresh_process('-c', script)
    assert code == 0, err
    assert 'not the one of timm-pudnet' in out
    assert '__main__' in out
