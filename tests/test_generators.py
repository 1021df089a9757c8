import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from timm_pudnet import generators
from timm_pudnet.config import InputError, PudNetConfig
from timm_pudnet.generators import (
    AffineGenerator,
    PaperGenerator,
    ResidualGenerator,
    create_generator,
    mix_kernels,
    register_generator,
)
from timm_pudnet.hypernet import PudNet
from timm_pudnet.target import LayerSpec, describe_target

SHAPES = [(24, 16, 3, 3), (32, 16, 1, 1), (16, 3, 7, 7), (32, 1, 3, 3), (8, 4, 1, 5), (16, 8, 5, 1)]


def make(shape, width=16, **kwargs):
    return PaperGenerator(LayerSpec('conv.weight', shape), width, **kwargs)


@torch.no_grad()
def plain_kernel(generator, code, shape, scale):
    """Eq. 6, rewritten in float64 with explicit loops."""
    o, i, kh, kw = shape
    taps = kh * kw
    flat = torch.einsum('rm,m->r', generator.embed.weight.double(), code.double() / math.sqrt(len(code)))
    flat = flat + generator.embed.bias.double()
    kernels = flat.reshape(-1, taps)  # p flattened kernels
    mix, bias, expand = generator.mix.weight.double(), generator.mix.bias.double(), generator.expand.double()
    basis = torch.zeros(len(mix), taps, dtype=torch.float64)
    for q in range(len(mix)):
        for tap in range(taps):
            value = float(bias[q]) + sum(float(mix[q, p]) * float(kernels[p, tap]) for p in range(len(kernels)))
            basis[q, tap] = max(value, 0.1 * value)
    return scale * torch.einsum('oiq,qt->oit', expand, basis).reshape(o, i, kh, kw)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('kwargs', [{}, {'embed_kernels': 4, 'basis_kernels': 20}], ids=['default', 'wide'])
def test_kernels_are_those_of_a_plain_rewrite(shape, kwargs):
    generator, code = make(shape, gain=1.5, **kwargs), torch.rand(16)
    for parameter in generator.parameters():
        nn.init.normal_(parameter)
    scale = math.sqrt(1.5 / math.prod(shape[1:])) / generators.SPREAD
    expected = plain_kernel(generator, code, shape, scale)
    assert_close(generator(code).double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize('shape', SHAPES)
def test_any_kernel_tensor_can_be_reached_and_with_fewer_basis_kernels_than_taps_none_could(shape):
    generator, code, wanted = make(shape, basis_kernels=1), torch.rand(16), torch.randn(shape)
    taps = shape[2] * shape[3]
    assert generator.mix.out_features == taps  # raised from 1
    rows, basis = wanted.reshape(-1, taps).double(), generator.basis(code).detach().double()
    answer = torch.linalg.lstsq(basis.t(), rows.t()).solution.t()
    with torch.no_grad():
        generator.expand.copy_(answer.view_as(generator.expand))
    assert_close(generator(code), wanted, rtol=1e-3, atol=1e-3)
    if taps > 1:
        short = basis[: taps - 1]
        nearest = torch.linalg.lstsq(short.t(), rows.t()).solution.t() @ short
        assert (nearest - rows).abs().max() > 0.1


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('gain', [1.0, 2.0])
def test_new_kernels_have_the_scale_of_ordinary_initialisation(shape, gain):
    generator = make(shape, 128, gain=gain)
    spread = float(generator(torch.rand(128)).detach().square().mean().sqrt())
    assert 0.8 < spread / math.sqrt(gain / math.prod(shape[1:])) < 1.3


@pytest.mark.parametrize('shape', SHAPES)
def test_new_basis_is_the_identity_bent_a_little_by_the_code(shape):
    generator, taps = make(shape, 64), shape[2] * shape[3]
    identity = torch.eye(generator.mix.out_features, taps)
    assert_close(generator.basis(torch.zeros(64)).detach() / generator.scale, identity, rtol=0, atol=1e-5)
    bend = (generator.basis(torch.rand(64)).detach() / generator.scale - identity).abs()
    assert 1e-3 < bend.max() < 0.8


@settings(max_examples=30, deadline=None)
@given(*(st.integers(1, 12) for _ in range(4)))
def test_mix_kernels_is_a_matrix_product(out_chans, in_chans, basis_kernels, taps):
    torch.manual_seed(0)
    weight = torch.randn(out_chans, in_chans, basis_kernels)
    basis = torch.randn(basis_kernels, taps)
    expected = (weight.double() @ basis.double()).float()
    found = mix_kernels(weight, basis)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.shape == (out_chans, in_chans, taps)


def test_gradients_reach_every_parameter_of_a_generator():
    for shape in SHAPES:
        generator, code = make(shape), torch.rand(16, requires_grad=True)
        (generator(code) * torch.randn(shape)).sum().backward()
        for name, tensor in [*generator.named_parameters(), ('code', code)]:
            assert tensor.grad is not None, name
            assert tensor.grad.abs().sum() > 0, name


def test_registry_makes_kinds_by_name_and_refuses_a_taken_one(monkeypatch):
    monkeypatch.setattr(generators, '_KINDS', dict(generators._KINDS))

    @register_generator('constant')
    class Constant(nn.Module):
        def __init__(self, layer, width, gain, *, value=1.0):
            super().__init__()

    layer = LayerSpec('conv.weight', (4, 3, 3, 3))
    assert isinstance(create_generator('constant', layer, 8, 2.0, value=2.0), Constant)
    with pytest.raises(InputError, match=r"'constant' is already registered by Constant"):
        register_generator('constant')(PaperGenerator)
    assert isinstance(create_generator('constant', layer, 8, 2.0), Constant)


def test_unknown_kinds_and_arguments_are_named(one_line):
    layer = LayerSpec('conv.weight', (4, 3, 3, 3))
    with pytest.raises(InputError) as error:
        create_generator('papr', layer, 8, 2.0)
    one_line(error, "'papr'", 'Did you mean paper?')
    with pytest.raises(InputError) as error:
        create_generator('paper', layer, 8, 2.0, basis=9)
    one_line(error, "'paper'", 'basis')
    with pytest.raises(InputError, match='at least 1'):
        create_generator('paper', layer, 8, 2.0, basis_kernels=0)


def test_affine_parameters_are_a_learned_vector_and_a_linear_change():
    generator, code = create_generator('paper', LayerSpec('bn.weight', (6,)), 8, 2.0), torch.rand(8)
    assert isinstance(generator, AffineGenerator)
    nn.init.normal_(generator.base)
    assert_close(generator(code), generator.base)  # new: the code changes nothing
    nn.init.normal_(generator.change)
    expected = generator.base.double() + torch.einsum(
        'om,m->o', generator.change.double(), code.double() / math.sqrt(8)
    )
    assert_close(generator(code).double(), expected, rtol=1e-5, atol=1e-6)


def test_the_change_of_wide_norms_may_be_of_low_rank(one_line):
    code = torch.rand(8)
    for kind in ('paper', 'residual'):
        narrow, wide = (create_generator(kind, LayerSpec('bn.bias', (size,)), 8, 2.0, 3) for size in (8, 9))
        assert narrow.change.shape == (8, 8), 'where it would save nothing worth naming'
        assert (wide.change.shape, wide.right.shape) == ((9, 3), (3, 8))
    nn.init.normal_(wide.base)
    assert_close(wide(code), wide.base)  # new: the code changes nothing
    nn.init.normal_(wide.change)
    change = wide.change.double() @ wide.right.double() / generators.SPREAD
    assert torch.linalg.matrix_rank(change) == 3
    assert_close(wide(code).double(), wide.base + change @ code.double() / math.sqrt(8), rtol=1e-5, atol=1e-6)
    assert create_generator('paper', LayerSpec('bn.bias', (9,)), 8, 2.0, 8).change.shape == (9, 8), 'full rank anyway'
    with pytest.raises(InputError) as error:
        PudNetConfig(model_name='resnet18', norm_rank=-1)
    one_line(error, 'norm_rank', '-1')


# Residual


SHAPES_OF_RESIDUALS = [*SHAPES, (32, 1, 5, 5), (8, 4, 3), (6, 3, 11, 11)]


def make_residual(shape, width=16, **kwargs):
    """A generator whose every parameter counts: none is zero."""
    generator = ResidualGenerator(LayerSpec('conv.weight', shape), width, **kwargs)
    if generator.changed:
        nn.init.normal_(generator.steer)
    return generator


@torch.no_grad()
def plain_residual(generator, code, shape, gain):
    """`N base M + U diag(c) V`, rewritten in float64 with explicit loops over axes."""
    o, i, taps = shape[0], shape[1], math.prod(shape[2:])
    code, base = code.double(), generator.base.double()
    if not generator.changed:
        return base.reshape(shape)
    given = [float(row @ code) for row in generator.steer.double()]
    kernel = base
    if generator.taps:
        mix, given = given[: taps * taps], given[taps * taps :]
        changed = torch.zeros_like(kernel)
        for new in range(taps):
            for old in range(taps):
                changed[:, :, new] += kernel[:, :, old] * (mix[old * taps + new] + (old == new))
        kernel = changed
    if generator.channels:
        mix, given = given[: i * i], given[i * i :]
        changed = torch.zeros_like(kernel)
        for new in range(i):
            for old in range(i):
                changed[:, new] += (mix[new * i + old] + (old == new)) * kernel[:, old]
        kernel = changed
    assert len(given) == generator.rank
    result = torch.zeros(o, i, taps, dtype=torch.float64)
    scale = math.sqrt(gain / math.prod(shape[1:]) / len(code)) / generators.SPREAD
    for tap in range(taps):
        for chan in range(i):
            result[:, chan, tap] = kernel[:, chan, tap]
            for r, strength in enumerate(given):
                right = float(generator.right[r, chan * taps + tap])
                result[:, chan, tap] += generator.left[:, r].double() * scale * strength * right
    return result.reshape(shape)


@pytest.mark.parametrize('shape', SHAPES_OF_RESIDUALS)
@pytest.mark.parametrize('kwargs', [{}, {'rank': 0}, {'rank': 2}, {'largest': 0}], ids=str)
def test_residual_kernels_are_those_of_a_plain_rewrite(shape, kwargs):
    generator, code = make_residual(shape, gain=1.5, **kwargs), torch.rand(16)
    expected = plain_residual(generator, code, shape, 1.5)
    assert_close(generator(code).double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize('kind', ['paper', 'residual'])
def test_kernels_of_another_shape_than_their_tensor(kind):
    linear = LayerSpec('fc.weight', (24, 16), kernel=(24, 16, 1))
    experts = LayerSpec('conv.weight', (4, 8 * 6 * 9), kernel=(32, 6, 3, 3), fan_in=54)
    for layer in (linear, experts):
        generator, value = create_generator(kind, layer, 8, 2.0), torch.randn(layer.shape)
        nn.init.normal_(generator.steer if kind == 'residual' else generator.embed.weight)
        assert generator(torch.rand(8)).shape == layer.shape
        flat = LayerSpec('conv.weight', layer.kernel)
        same = create_generator(kind, flat, 8, 2.0)
        same.load_state_dict(generator.state_dict())
        code = torch.rand(8)
        assert_close(generator(code).flatten(), same(code).flatten())
        generator.start_from(value)
        assert_close(generator(torch.rand(8)).detach(), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('shape', SHAPES_OF_RESIDUALS)
def test_a_new_residual_kernel_is_its_base_whatever_the_code(shape):
    generator = ResidualGenerator(LayerSpec('conv.weight', shape), 16, 2.0)
    base = generator.base.detach().reshape(shape)
    for code in (torch.zeros(16), torch.rand(16), 1000 * torch.randn(16)):
        assert_close(generator(code).detach(), base, rtol=0, atol=0)
    spread = float(base.square().mean().sqrt()) / math.sqrt(2 / math.prod(shape[1:]))
    assert 0.8 < spread < 1.25
    with torch.no_grad():
        before = generator(torch.ones(16))
        generator.steer.normal_()
        assert (generator(torch.ones(16)) - before).abs().max() > 1e-2


@pytest.mark.parametrize('shape', SHAPES_OF_RESIDUALS)
def test_gradients_reach_every_parameter_of_a_residual_generator(shape):
    generator, code = make_residual(shape), torch.rand(16, requires_grad=True)
    (generator(code) * torch.randn(shape)).sum().backward()
    for name, tensor in [*generator.named_parameters(), ('code', code)]:
        assert tensor.grad is not None, name
        assert tensor.grad.abs().sum() > 0, name
    assert (generator.steer.grad.abs().sum(1) > 0).all()
    new = ResidualGenerator(LayerSpec('conv.weight', shape), 16, 2.0)  # from the start, what the code gives is learned
    (new(torch.rand(16)) * torch.randn(shape)).sum().backward()
    assert new.base.grad.abs().sum() > 0
    assert (new.steer.grad.abs().sum(1) > 0).all()


def test_a_residual_generator_has_the_parts_that_its_layer_is_worth():
    def parts(shape, **kwargs):
        generator = ResidualGenerator(LayerSpec('conv.weight', shape), 16, 2.0, **kwargs)
        return (generator.taps, generator.channels, generator.rank) if generator.changed else None

    assert parts((64, 32, 3, 3)) == (9, 0, 4)
    assert parts((64, 32, 3, 3), largest=64 * 32) == (9, 0, 4)
    assert parts((64, 32, 3, 3), largest=64 * 32 - 1) is None
    assert parts((64, 32, 1, 1), largest=64 * 32 - 1) is None
    assert parts((64, 32, 3, 3), rank=0) == (9, 0, 0)
    assert parts((64, 32, 1, 1)) == (0, 0, 4)
    assert parts((64, 3, 7, 7)) == (49, 3, 4)
    assert parts((64, 3, 16, 16)) == (0, 3, 4)  # 65,536 coefficients for the taps of one layer
    assert parts((64, 5, 3, 3)) == (9, 0, 4)
    assert parts((64, 1, 3, 3)) == (9, 0, 4)  # a depthwise kernel
    assert parts((64, 1, 7, 7)) == (0, 0, 4)
    assert parts((1, 2, 7, 7)) == (0, 2, 0)
    assert parts((64, 2, 1, 1)) == (0, 2, 1)  # its two inputs are worth a rank of one
    for wrong in ({'rank': -1}, {'largest': -1}):
        with pytest.raises(InputError, match='at least 0'):
            create_generator('residual', LayerSpec('conv.weight', (4, 3, 3, 3)), 8, 2.0, **wrong)


def test_a_residual_hypernetwork_of_resnet18_is_about_as_large_as_its_target():
    with torch.device('meta'):
        hypernet = PudNet(PudNetConfig(model_name='resnet18', generator='residual', sketch_width=64))
    spec = describe_target('resnet18')
    target = sum(math.prod(spec.shapes[key]) for key, role in spec.roles.items() if role != 'classifier')
    size = sum(parameter.numel() for parameter in hypernet.parameters()) / target
    assert 1.0 < size < 1.1, size
    in_generators = sum(parameter.numel() for parameter in hypernet.generators.parameters()) / target
    assert in_generators < 1.05
