"""What must hold on a GPU; the same numbers are tested on the CPU elsewhere. Run with -m gpu where there is one."""

import pytest
import torch
from torch.testing import assert_close

from timm_pudnet import PudNet, predict_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')]


@pytest.mark.parametrize('generator', ['paper', 'residual'])
def test_weights_are_those_of_the_cpu_and_are_generated_without_waiting_for_the_device(generator):
    hypernet = PudNet.for_target('resnet18', generator=generator, predict_norm=True).eval()
    sketch = torch.rand(hypernet.config.sketch_width)
    with torch.inference_mode():
        expected = hypernet(sketch)
        hypernet, sketch = hypernet.cuda(), sketch.cuda()
        hypernet(sketch)
        torch.cuda.set_sync_debug_mode('error')
        try:
            found = hypernet(sketch)
        finally:
            torch.cuda.set_sync_debug_mode('default')
    assert_close({key: value.cpu() for key, value in found.items()}, dict(expected), rtol=1e-3, atol=1e-4)


def test_a_prediction_is_that_of_the_cpu(tiny_folder, pictures):
    pixels, names = pictures(18)
    query = torch.rand(8, 3, 32, 32)
    models = {
        device: predict_model('test_resnet', pixels, names, hypernet=str(tiny_folder), device=device)
        for device in ('cpu', 'cuda')
    }
    assert next(models['cuda'].parameters()).is_cuda
    with torch.inference_mode():
        assert_close(models['cuda'](query.cuda()).cpu(), models['cpu'](query), rtol=1e-2, atol=1e-3)
