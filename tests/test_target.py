import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from timm_pudnet.config import InputError, UnsupportedTargetError
from timm_pudnet.target import batch_norms, describe_target

ARCHITECTURES = [
    *('test_resnet', 'test_efficientnet', 'resnet18', 'resnet50', 'seresnet18', 'regnetx_002', 'densenet121'),
    *('mobilenetv3_small_100', 'efficientnet_b0', 'vgg11', 'vgg11_bn', 'hrnet_w18_small', 'nf_resnet50'),
    *('mobileone_s0', 'botnet26t_256', 'convmixer_768_32'),
]


def meta_model(name, **kwargs):
    with torch.device('meta'):
        return timm.create_model(name, **kwargs)


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_every_key_of_an_architecture_has_exactly_one_role(name):
    spec, model = describe_target(name), meta_model(name, num_classes=2)
    state = model.state_dict()
    assert list(spec.roles) == list(state)
    assert spec.shapes == {key: tuple(value.shape) for key, value in state.items()}
    keys = [key for role in ('predicted', 'shared', 'calibrated', 'classifier') for key in spec.keys(role)]
    assert sorted(keys) == sorted(state)

    wanted = dict.fromkeys(state, 'shared')
    for module_name, module in model.named_modules():
        for short in module.state_dict():
            key = f'{module_name}.{short}'
            if isinstance(module, nn.Conv2d) and short == 'weight':
                wanted[key] = 'predicted'
            if isinstance(module, _NormBase) and short not in ('weight', 'bias'):
                wanted[key] = 'calibrated'
            if module is model.get_classifier():
                wanted[key] = 'classifier'
    assert spec.roles == wanted
    assert spec.classifier in dict(model.named_modules())
    assert spec.num_features == model.get_classifier().in_features


@pytest.mark.parametrize('name', ['test_resnet', 'densenet121', 'mobilenetv3_small_100'])
def test_all_but_the_classifier_is_the_state_dict_of_the_feature_model(name):
    spec = describe_target(name)
    rest = {key for key, role in spec.roles.items() if role != 'classifier'}
    assert rest == set(meta_model(name, num_classes=0).state_dict())


def test_predicted_layers_come_in_the_order_of_the_network():
    spec = describe_target('resnet18')
    assert [layer.key for layer in spec.layers] == list(spec.keys('predicted'))
    assert (spec.layers[0].key, spec.layers[0].shape, spec.layers[0].fan_in) == ('conv1.weight', (64, 3, 7, 7), 147)
    assert spec.numel('predicted') == sum(layer.numel for layer in spec.layers) == 11_166_912
    assert len(list(batch_norms(meta_model('resnet18')))) == 20


def test_fan_in_of_a_depthwise_kernel_counts_its_own_channel_only():
    layers = {layer.key: layer for layer in describe_target('mobilenetv3_small_100').layers}
    depthwise = layers['blocks.0.0.conv_dw.weight']
    assert (depthwise.shape, depthwise.fan_in) == ((16, 1, 3, 3), 9)


def test_the_norm_s_affine_parameters_can_be_predicted():
    plain, spec = describe_target('test_resnet'), describe_target('test_resnet', predict_norm=True)
    moved = {key for key in plain.roles if plain.roles[key] != spec.roles[key]}
    names = [name for name, _ in batch_norms(meta_model('test_resnet'))]
    assert moved == {f'{name}.{short}' for name in names for short in ('weight', 'bias')}
    assert all((plain.roles[key], spec.roles[key]) == ('shared', 'predicted') for key in moved)
    assert len(spec.layers) == len(plain.layers) + len(moved)


def test_arguments_that_change_the_shapes_are_part_of_the_description():
    spec = describe_target('resnet18', in_chans=1)
    assert spec.layers[0].shape == (64, 1, 7, 7)
    assert spec.model_kwargs == {'in_chans': 1}
    assert describe_target('resnet18').layers[0].shape == (64, 3, 7, 7)


def test_a_transformer_is_refused_with_its_share(one_line):
    with pytest.raises(UnsupportedTargetError) as error:
        describe_target('vit_tiny_patch16_224')
    one_line(error, 'vit_tiny_patch16_224', '2.7%')


def test_a_convnext_is_refused_with_a_hint_and_taken_with_it(one_line):
    with pytest.raises(UnsupportedTargetError) as error:
        describe_target('convnext_tiny')
    one_line(error, '6.7%', 'conv_mlp=True')
    assert describe_target('convnext_tiny', conv_mlp=True).predicted_share > 0.99


@pytest.mark.parametrize(('name', 'reason'), [('dla34', 'Conv2d'), ('levit_128s', '2 classifiers')])
def test_a_classifier_that_cannot_hold_centroids_is_refused(name, reason, one_line):
    with pytest.raises(UnsupportedTargetError) as error:
        describe_target(name)
    one_line(error, name, reason)


def test_an_unknown_buffer_is_refused_with_its_key(monkeypatch, one_line):
    original = timm.create_model

    def with_buffer(*args, **kwargs):
        model = original(*args, **kwargs)
        model.layer1.register_buffer('lookup', torch.zeros(3))
        return model

    monkeypatch.setattr(timm, 'create_model', with_buffer)
    with pytest.raises(UnsupportedTargetError) as error:
        describe_target('test_resnet', drop_rate=0.123)  # not described before, so not remembered
    one_line(error, 'layer1.lookup', 'Sequential')


def test_tied_weights_are_refused_with_both_keys(monkeypatch, one_line):
    original = timm.create_model

    def tied(*args, **kwargs):
        model = original(*args, **kwargs)
        model.layer1[0].conv2.weight = model.layer1[0].conv1.weight
        return model

    monkeypatch.setattr(timm, 'create_model', tied)
    with pytest.raises(UnsupportedTargetError) as error:
        describe_target('test_resnet', drop_rate=0.124)
    one_line(error, 'layer1.0.conv2.weight', 'layer1.0.conv1.weight')


def test_an_unknown_architecture_names_the_close_ones(one_line):
    with pytest.raises(InputError) as error:
        describe_target('resnet81')
    one_line(error, "'resnet81'", 'resnet18')


@pytest.mark.parametrize('name', ['resnet18.a1_in1k', 'resnet18.no_such_tag', 'hf-hub:timm/resnet18.a1_in1k'])
def test_a_tag_or_a_hub_name_is_refused_with_the_remedy(name, one_line):
    with pytest.raises(InputError) as error:
        describe_target(name)
    one_line(error, name, 'give the architecture', 'resnet18')


@pytest.mark.parametrize('kwargs', [{'bogus': 1}, {'output_stride': 5}, {'block': object()}, {'in_chans': 'x'}])
def test_arguments_that_timm_refuses_are_named_in_one_line(kwargs, one_line):
    with pytest.raises(InputError) as error:
        describe_target('resnet18', **kwargs)
    one_line(error, 'resnet18')


def test_describing_draws_no_random_numbers():
    before = torch.get_rng_state()
    describe_target('resnet18', drop_rate=0.125)
    assert torch.equal(torch.get_rng_state(), before)
