import dataclasses
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from timm_pudnet.config import InputConfig, InputError, PudNetConfig, UnsupportedTargetError
from timm_pudnet.target import (
    batch_norms,
    channels_last,
    check_architecture,
    create_feature_model,
    describe_target,
    input_of,
    keep_arguments,
    laid_out,
    normalised_otherwise,
    of_one_size,
    pretrained_cfg_of,
    small_maps_first,
)

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
    head = [key for key in state if state[key] is not None and key in spec.keys('classifier')]
    assert spec.shapes == {
        key: (1 if key in head else len(value) if value.ndim else 0, *value.shape[1:])[: value.ndim]
        for key, value in state.items()
    }
    keys = [key for role in ('predicted', 'shared', 'calibrated', 'classifier') for key in spec.keys(role)]
    assert sorted(keys) == sorted(state)

    wanted = dict.fromkeys(state, 'shared')
    for module_name, module in model.named_modules():
        for short in module.state_dict():
            key = f'{module_name}.{short}'
            if isinstance(module, nn.Conv2d | nn.Conv1d) and short == 'weight':
                wanted[key] = 'predicted'
            if isinstance(module, _NormBase) and short not in ('weight', 'bias'):
                wanted[key] = 'calibrated'
            if module is model.get_classifier():
                wanted[key] = 'classifier'
    assert spec.roles == wanted
    assert [dict(model.named_modules())[name] for name in spec.classifiers] == [model.get_classifier()]
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


def test_an_architecture_without_any_conv_is_told_what_is_left(one_line):
    for more in ({}, {'min_predicted': 0.0}):
        with pytest.raises(UnsupportedTargetError) as error:
            describe_target('naflexvit_base_patch16_gap', **more)
        one_line(error, 'no conv', 'predict_linear=True')
        assert 'min_predicted' not in str(error.value)
    assert describe_target('naflexvit_base_patch16_gap', predict_linear=True).predicted_share > 0.5


def test_a_convnext_is_refused_with_a_hint_and_taken_with_it(one_line):
    with pytest.raises(UnsupportedTargetError) as error:
        describe_target('convnext_tiny')
    one_line(error, '6.7%', 'conv_mlp=True')
    assert describe_target('convnext_tiny', predict_linear=True).predicted_share > 0.99
    assert describe_target('convnext_tiny', min_predicted=0.0).predicted_share < 0.07
    assert describe_target('convnext_tiny', conv_mlp=True).predicted_share > 0.99


def changed_by(change, monkeypatch):
    """timm whose models are changed before they are handed over."""
    original = timm.create_model

    def create(*args, **kwargs):
        model = original(*args, **kwargs)
        change(model)
        return model

    monkeypatch.setattr(timm, 'create_model', create)


def test_a_statistic_that_cannot_be_calibrated_is_refused_with_its_key(monkeypatch, one_line):
    changed_by(lambda model: model.layer1.register_buffer('running_spread', torch.zeros(3)), monkeypatch)
    with pytest.raises(UnsupportedTargetError) as error:
        describe_target('test_resnet', drop_rate=0.123)  # not described before, so not remembered
    one_line(error, 'layer1.running_spread', 'Sequential')


def test_a_constant_buffer_is_shared(monkeypatch):
    changed_by(lambda model: model.layer1.register_buffer('index', torch.zeros(3, dtype=torch.long)), monkeypatch)
    spec = describe_target('test_resnet', drop_rate=0.1235)
    assert (spec.roles['layer1.index'], spec.constants) == ('shared', {'layer1.index': torch.long})


def test_an_unknown_conv_is_refused_with_its_kind(monkeypatch, one_line):
    class HexConv(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 3, 7))

    changed_by(lambda model: model.layer1.add_module('hex', HexConv()), monkeypatch)
    with pytest.raises(UnsupportedTargetError) as error:
        describe_target('test_resnet', drop_rate=0.1236)
    one_line(error, 'layer1.hex.weight', 'HexConv')


def test_a_classifier_of_another_kind_is_refused(monkeypatch, one_line):
    class Odd(nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(classes, 96))

    changed_by(lambda model: setattr(model, 'fc', Odd(model.num_classes)), monkeypatch)
    with pytest.raises(UnsupportedTargetError) as error:
        describe_target('test_resnet', drop_rate=0.1237)
    one_line(error, 'classifier fc', 'Odd')


def test_tied_weights_are_described_once(monkeypatch):
    changed_by(lambda model: setattr(model.layer1[0].conv2, 'weight', model.layer1[0].conv1.weight), monkeypatch)
    spec = describe_target('test_resnet', drop_rate=0.124)
    assert spec.tied == {'layer1.0.conv2.weight': 'layer1.0.conv1.weight'}
    assert spec.roles['layer1.0.conv2.weight'] == 'predicted'
    keys = [layer.key for layer in spec.layers]
    assert 'layer1.0.conv1.weight' in keys
    assert 'layer1.0.conv2.weight' not in keys
    assert keys == list(spec.keys('predicted'))


# One- and three-dimensional, transposed, mixed from experts, weight-standardised, of several kernel sizes.
KINDS = ['eca_resnet33ts', 'lambda_resnet26t', 'lowformer_b0', 'efficientnet_cc_b0_4e', 'dm_nfnet_f0', 'mixnet_s']


@pytest.mark.parametrize('name', KINDS)
def test_every_kind_of_conv_is_predicted(name):
    spec, model = describe_target(name, min_predicted=0.0), meta_model(name)
    layers, seen = {layer.key: layer for layer in spec.layers}, 0
    for module_name, module in model.named_modules():
        if 'conv' in type(module).__name__.lower() and getattr(module, 'weight', None) is not None:
            layer = layers[f'{module_name}.weight']
            groups = module.groups
            if isinstance(module, nn.ConvTranspose2d):
                inputs = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
                assert layer.fan_in == inputs // groups // (module.stride[0] * module.stride[1])
            else:
                kernel = module.kernel_size
                taps = math.prod(kernel) if isinstance(kernel, tuple) else kernel
                assert layer.fan_in == module.in_channels // groups * taps
            assert math.prod(layer.kernel) == layer.numel == module.weight.numel()
            assert layer.shape == tuple(module.weight.shape)
            seen += 1
    assert seen > 10


@pytest.mark.parametrize(
    ('name', 'classifiers', 'more'),
    [
        ('dla34', ['fc'], []),
        ('resnetv2_50', ['head.fc'], []),
        ('levit_conv_128s', ['head.linear', 'head_dist.linear'], ['head.bn.weight']),
        ('convformer_s18', ['head.fc.fc2'], ['head.fc.fc1.weight', 'head.fc.norm.weight']),
        ('repvit_m1', ['head.head.l', 'head.head_dist.l'], ['head.head.bn.running_mean']),
        ('mobilenetv5_300m_enc', [], []),
    ],
)
def test_classifiers_are_found_wherever_they_are(name, classifiers, more):
    spec = describe_target(name, min_predicted=0.0)
    assert list(spec.classifiers) == classifiers
    for key in more:
        assert spec.roles[key] in ('shared', 'calibrated')
        assert key not in spec.headless
    assert {key.rpartition('.')[0] for key in spec.keys('classifier')} == set(classifiers)


@pytest.mark.parametrize('name', ['test_resnet', 'dla46_c', 'repvit_m0_9', 'levit_conv_128s'])
def test_a_feature_model_gives_what_the_classifier_reads(name):
    spec = describe_target(name, min_predicted=0.0)
    model = create_feature_model(spec).eval()
    assert set(model.state_dict()) == {key for key, role in spec.roles.items() if role != 'classifier'}
    size = model.default_cfg['input_size']
    with torch.no_grad():
        assert model(torch.randn(2, *size)).flatten(1).shape == (2, spec.num_features)


def test_an_unknown_architecture_names_the_close_ones(one_line):
    with pytest.raises(InputError) as error:
        describe_target('resnet81')
    one_line(error, "'resnet81'", 'resnet18')


@pytest.mark.parametrize('name', ['resnet18.a1_in1k', 'resnet18.no_such_tag', 'hf-hub:timm/resnet18.a1_in1k'])
def test_a_tag_or_a_hub_name_is_refused_with_the_remedy(name, one_line):
    with pytest.raises(InputError) as error:
        describe_target(name)
    one_line(error, name, 'give the architecture', 'resnet18')


@pytest.mark.parametrize('name', [None, 5, ['resnet18']])
def test_an_architecture_that_is_no_name_is_told_in_one_line(name, one_line):
    with pytest.raises(InputError) as error:
        check_architecture(name)
    one_line(error, 'must be a name', name)


REFUSED = [{'bogus': 1}, {'output_stride': 5}, {'block': object()}, {'in_chans': 'x'}]
REFUSED += [{'pruned': True}, {'drop_rate': 2}, {'drop_path_rate': -0.1}, {'drop_block_rate': 'x'}]


@pytest.mark.parametrize('kwargs', REFUSED, ids=' '.join)
def test_arguments_that_timm_refuses_are_named_in_one_line(kwargs, one_line):
    with pytest.raises(InputError) as error:
        describe_target('resnet18', **kwargs)
    one_line(error, 'resnet18', next(iter(kwargs)))


def test_describing_draws_no_random_numbers():
    before = torch.get_rng_state()
    describe_target('resnet18', drop_rate=0.125)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_an_earlier_timm_forgets_of_a_model_is_kept_for_its_file():
    model = timm.create_model('test_resnet', in_chans=1)
    known = vars(model).pop('_model_args', None)
    own = {'cache_dir': 'x', 'scriptable': False, 'exportable': True, 'no_jit': True}  # of timm.create_model
    more = {'num_classes': 3, 'drop_path_rate': 0.1, 'act_layer': nn.ReLU, 'global_pool': None}
    keep_arguments(model, {'in_chans': 1, **more, **own})
    assert model._model_args == {'in_chans': 1}
    keep_arguments(model, {'in_chans': 4})
    assert model._model_args == {'in_chans': 1}
    assert known in (None, {'in_chans': 1}), 'what a later timm keeps by itself'


@pytest.mark.filterwarnings('ignore:Overwriting')
def test_an_architecture_that_is_registered_anew_is_described_anew():
    def made(width):
        def pudnet_notebook_net(pretrained=False, **kwargs):
            return timm.create_model('test_resnet', stem_width=width, **kwargs)

        pudnet_notebook_net.__module__ = 'timm.models.resnet'  # where timm looks for its config
        return timm.models.register_model(pudnet_notebook_net)

    for width in (8, 24):
        made(width)
        spec = describe_target('pudnet_notebook_net')
        assert spec.shapes == describe_target('test_resnet', stem_width=width).shapes
        assert 'conv1.0.weight' in spec.headless


def test_a_crop_larger_than_the_image_is_the_image():
    model = timm.create_model('test_resnet')
    model.pretrained_cfg['crop_pct'] = 1.15  # as volo_d5_512 has it
    assert input_of(model).crop_pct == 1


@pytest.mark.parametrize('chans', [1, 4])
def test_other_channels_have_the_mean_of_the_means_of_all(chans):
    found = input_of(timm.create_model('resnet18', in_chans=chans))
    assert found.mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,) * chans)
    assert found.std == pytest.approx(((0.229 + 0.224 + 0.225) / 3,) * chans)


def test_the_config_of_other_images_has_the_last_maps_of_their_size_and_no_size_for_tests():
    usual = timm.get_pretrained_cfg('resnet18.a1_in1k').to_dict()
    assert usual['test_input_size'] == (3, 288, 288)
    found = pretrained_cfg_of(InputConfig(input_size=(3, 48, 80)), usual)
    assert found['pool_size'] == (2, 3)
    assert {**usual, **found}['test_input_size'] is None
    assert {**usual, **found}['test_crop_pct'] is None


def test_a_norm_that_keeps_no_statistics_is_not_calibrated():
    norms = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3))
    assert [name for name, _ in batch_norms(norms)] == ['1']


def test_a_mean_or_std_that_is_a_little_another_one_is_another_one():
    model = timm.create_model('resnet18')
    own = input_of(model)
    assert normalised_otherwise(model, own) == ''
    for changed in ({'mean': (0.5, *own.mean[1:])}, {'std': (*own.std[:2], 0.25)}):
        assert 'of mean (0.485, ' in normalised_otherwise(model, dataclasses.replace(own, **changed))


def test_an_architecture_of_one_size_is_made_for_oblong_images_as_they_lie():
    config = PudNetConfig(model_name='visformer_tiny', input=InputConfig(input_size=(3, 64, 96)))
    assert of_one_size(config).model_kwargs == {'img_size': [64, 96]}


def layouts(model, side):
    """By the name of a conv, whether the maps that it sees have channels last in memory; and the model's output."""
    found = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0].stride(1) == 1}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    output = model(laid_out(torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))))
    for hook in hooks:
        hook.remove()
    return found, output


WIDE_AT_64 = {
    *('layer3.0.conv2', 'layer3.1.conv1', 'layer3.1.conv2', 'layer4.0.conv1'),
    *('layer4.0.conv2', 'layer4.1.conv1', 'layer4.1.conv2'),
}


@pytest.fixture
def avx512(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'AVX512')


def hooked(model):
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_wide_convs_see_small_maps_with_channels_first_and_all_else_with_channels_last(avx512):
    model = timm.create_model('resnet18').eval()
    usual, wanted = layouts(model, 64)
    assert all(usual.values())
    with small_maps_first(model):
        found, output = layouts(model, 64)
        large, _ = layouts(model, 160)  # whose last maps are of 5x5
    assert {name for name, last in found.items() if not last} == WIDE_AT_64
    assert all(large.values())
    torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
    assert not hooked(model)

    channels_last(model)
    assert {name for name, last in layouts(model, 64)[0].items() if not last} == set()
    with small_maps_first(model):
        found, output = layouts(model, 64)
    assert {name for name, last in found.items() if not last} == WIDE_AT_64
    torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
    assert model.layer4[1].conv2.weight.is_contiguous()
    assert model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_grouped_convs_and_kernels_with_channels_last_are_left_as_they_are(avx512):
    grouped = nn.Conv2d(1024, 1024, 3, groups=2)
    last = nn.Conv2d(512, 512, 3).to(memory_format=torch.channels_last)
    with small_maps_first(nn.Sequential(grouped, last)):
        assert not hooked(grouped)
        assert not hooked(last)


def test_without_avx512_all_kernels_have_channels_last(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'AVX2')
    model = channels_last(timm.create_model('resnet18'))
    kernels = [value for value in model.parameters() if value.ndim == 4]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    with small_maps_first(model):
        assert not hooked(model)
