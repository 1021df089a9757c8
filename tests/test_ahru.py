import pytest
import torch
from torch.testing import assert_close

from timm_pudnet.ahru import AHRU


def make_ahru(width=12, num_layers=5, eta=0.5):
    ahru = AHRU(width, num_layers, eta)
    torch.nn.init.normal_(ahru.start)
    return ahru


def plain_codes(ahru, sketch):
    """Eq. 4 and 5, rewritten in float64, a matrix at a time."""
    w_r, w_z = ahru.gates.weight.double().chunk(2)
    w_h, w_o = ahru.candidate.weight.double(), ahru.output.weight.double()
    s = sketch.double()
    d, a, codes = s, ahru.start.double(), []
    for _ in range(ahru.num_layers):
        both = torch.cat([d, a])
        r = 1 / (1 + (-(w_r @ both)).exp())
        z = 1 / (1 + (-(w_z @ both)).exp())
        new = torch.tanh(w_h @ torch.cat([r * d, a]))
        d = (1 - z) * d + z * new
        a = 1 / (1 + (-(w_o @ d)).exp())
        codes.append((1 - ahru.eta) * a + ahru.eta * s)
    return torch.stack(codes)


@pytest.mark.parametrize('eta', [0.0, 0.3, 0.5, 1.0])
def test_codes_are_those_of_a_plain_rewrite(eta):
    ahru, sketch = make_ahru(eta=eta), torch.randn(12)
    assert_close(ahru(sketch).double(), plain_codes(ahru, sketch), rtol=1e-5, atol=1e-6)
    before = sketch.clone(), ahru.start.clone()
    with torch.no_grad():  # in place
        assert_close(ahru(sketch).double(), plain_codes(ahru, sketch), rtol=1e-5, atol=1e-6)
    assert torch.equal(before[0], sketch)
    assert torch.equal(before[1], ahru.start)


def test_eta_one_gives_the_sketch_and_eta_zero_none_of_it():
    sketch = 100 * torch.randn(12)
    assert_close(make_ahru(eta=1.0)(sketch), sketch.expand(5, 12))
    codes = make_ahru(eta=0.0)(sketch)
    assert codes.min() >= 0
    assert codes.max() <= 1


def test_layers_get_different_codes():
    codes = make_ahru(eta=0.5)(torch.randn(12))
    assert torch.pdist(codes).min() > 1e-3


def test_sketches_of_a_batch_do_not_mix():
    ahru, sketches = make_ahru(), torch.randn(4, 12)
    codes = ahru(sketches)
    assert codes.shape == (4, 5, 12)
    assert_close(codes, torch.stack([ahru(sketch) for sketch in sketches]))
    assert_close(ahru(sketches.view(2, 2, 12)), codes.view(2, 2, 5, 12))


@pytest.mark.parametrize('grad', [True, False])
def test_the_codes_of_the_first_layers_are_those_of_a_whole_walk(grad):
    ahru, sketch = make_ahru(), torch.randn(12)
    with torch.set_grad_enabled(grad):
        assert_close(ahru(sketch, 2), ahru(sketch)[:2], rtol=0, atol=0)
        assert ahru(torch.randn(3, 12), 2).shape == (3, 2, 12)


def test_gradients_reach_every_parameter_and_the_sketch():
    ahru, sketch = make_ahru(), torch.randn(12, requires_grad=True)
    (ahru(sketch) * torch.randn(5, 12)).sum().backward()
    for name, tensor in [*ahru.named_parameters(), ('sketch', sketch)]:
        assert tensor.grad is not None, name
        assert (tensor.grad.reshape(len(tensor), -1).abs().sum(1) > 0).all(), name
