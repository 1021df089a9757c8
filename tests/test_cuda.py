"""What must hold on a GPU. Where there is none most of it is tested on one that is pretended (pretend_cuda.py)."""

import contextlib
import json
import math
import warnings

import pytest
import torch
from pretend_cuda import pretended_cuda
from torch.nn import functional
from torch.testing import assert_close

from timm_pudnet import PudNet, denoise, predict_denoiser, predict_model
from timm_pudnet.config import InputError, PudNetWarning
from timm_pudnet.evaluation import TestGroups, evaluate
from timm_pudnet.training import Augmentation, ImageBank, finetune, meta_train, train_plain, try_recipe
from timm_pudnet.training.meta_train import _PlainRun, group_sampler

THERE = torch.cuda.is_available()


def real(test):
    """A test that needs a real one: run with -m gpu where there is one."""
    return pytest.mark.gpu(pytest.mark.skipif(not THERE, reason='needs CUDA')(test))


RESIDUAL = {'schedule': {'optimizer': 'sgd', 'rate': 0.02}, 'hypernet': {'generator': 'residual', 'predict_norm': True}}
SEEN = {'groups': {'conditions': 0.5, 'sketch_groups': 3, 'sketch_images': 2}}


@pytest.fixture(autouse=True)
def a_gpu():
    """A real one, or one that is pretended."""
    with contextlib.nullcontext() if THERE else pretended_cuda():
        yield


@real
@pytest.mark.parametrize('generator', ['paper', 'residual'])
def test_weights_are_those_of_the_cpu_and_are_generated_without_waiting_for_the_device(generator):
    hypernet = PudNet.for_target('resnet18', generator=generator, predict_norm=True).eval()
    for parameter in hypernet.parameters():
        if not parameter.any():  # else new residual generators give the same weights for every sketch
            torch.nn.init.normal_(parameter, std=0.01)
    sketches = torch.rand(2, hypernet.config.sketch_width)
    with torch.inference_mode():
        expected = [{key: value.clone() for key, value in hypernet(sketch).items()} for sketch in sketches]
        hypernet, sketches = hypernet.cuda(), sketches.cuda()
        hypernet(sketches[0])
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch says that it does not find every case yet
            torch.cuda.set_sync_debug_mode('error')
            try:
                found = [hypernet(sketch) for sketch in sketches]
            finally:
                torch.cuda.set_sync_debug_mode('default')
        generate = hypernet.captured()
    captured = [{key: value.clone() for key, value in generate(sketch).items()} for sketch in sketches]
    for weights, wanted in zip(found + captured, expected * 2, strict=True):
        assert_close({key: value.cpu() for key, value in weights.items()}, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(THERE, reason='there is a GPU')
def test_no_cuda_graph_without_a_gpu(tiny, one_line):
    with pytest.raises(InputError) as error:
        tiny.captured()
    one_line(error, 'cpu', 'call it as it is')


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


@real
def test_a_gpu_too_small_for_a_batch_takes_it_in_parts(tiny_folder, pictures):
    pixels, names = pictures(12_000)  # 147 MB at the input's size
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**27) / total)
    try:
        with pytest.warns(PudNetWarning, match='out of memory with .* images at once'):
            model = predict_model('test_resnet', pixels, names, hypernet=str(tiny_folder), batch_size=12_000)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert next(model.parameters()).is_cuda


@pytest.mark.parametrize('shared', [False, True])
def test_a_denoiser_is_that_of_the_cpu(shared):
    noisy = torch.rand(4, 3, 64, 64)
    if shared:
        noisy = functional.avg_pool2d(noisy, 3, 1, 1, count_include_pad=False)
    models = {device: predict_denoiser(noisy, device=device) for device in ('cpu', 'cuda')}
    assert [model.whitening is not None for model in models.values()] == [shared, shared]
    with torch.inference_mode():
        assert_close(models['cuda'](noisy.cuda()).cpu(), models['cpu'](noisy), rtol=1e-2, atol=1e-2)
    found, wanted = (denoise(model, noisy[0]) for model in (models['cuda'], models['cpu']))  # an image of the CPU
    assert_close(found, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize('kind', [{}, SEEN, {'augmentation': Augmentation(timm={'hflip': 0.5})}])
def test_groups_are_those_of_the_cpu(make_recipe, bank, kind):
    recipe = make_recipe(**kind)
    ours, theirs = group_sampler(recipe, [bank.to(torch.device('cuda'))]), group_sampler(recipe, [bank])
    for number in range(4):
        found, expected = ours.draw(number, plain=True), theirs.draw(number, plain=True)
        for one, other in ((found.support, expected.support), (found.query, expected.query)):
            assert one.is_cuda
            assert_close(one.cpu(), other, rtol=1e-3, atol=1e-3)
        assert_close(found.query_classes, expected.query_classes)
    assert ours.batch(0, 8)[0].is_cuda
    if kind is SEEN:
        assert_close(ours.draw_halves(0).cpu(), theirs.draw_halves(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(('free', 'there'), [(2**30, True), (2**10, False)])
def test_the_images_of_a_training_lie_on_the_gpu_where_it_has_room(make_recipe, bank, monkeypatch, free, there):
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda *_: (free, free))
    run = _PlainRun(make_recipe(), [bank], 'cuda')
    assert run.sampler.banks[0].images.is_cuda == there
    assert run.sampler.batch(0, 8)[0].is_cuda == there


@real
@pytest.mark.parametrize('train', [meta_train, train_plain])
@pytest.mark.parametrize('kind', [{}, {**RESIDUAL, **SEEN}])
def test_training_starts_as_on_the_cpu_and_goes_on_where_it_stopped(train, make_recipe, bank, tmp_path, kind):
    recipe, losses = make_recipe(8, **kind), {}
    for device in ('cpu', 'cuda'):
        for most in (4, None):
            train(recipe, tmp_path / device, banks=[bank], device=device, max_steps=most, progress=False)
        lines = (tmp_path / device / 'log.jsonl').read_text().splitlines()
        losses[device] = [json.loads(line)['full'] for line in lines]
    assert len(losses['cuda']) == 8
    assert all(map(math.isfinite, losses['cuda']))
    assert_close(losses['cuda'][0], losses['cpu'][0], rtol=2e-2, atol=2e-2)


@real
def test_a_recipe_is_tried(make_recipe, bank):
    found = try_recipe(make_recipe(), banks=[bank], device='cuda', seconds=2, progress=False)
    assert found['images_per_second'] > 0


@real
def test_bfloat16_learns(make_recipe, bank):
    schedule = {**RESIDUAL['schedule'], 'precision': 'bfloat16', 'ema': 0.9}
    recipe = make_recipe(12, hypernet=RESIDUAL['hypernet'], schedule=schedule)
    assert not any(p.isnan().any() for p in meta_train(recipe, banks=[bank], progress=False).parameters())


def test_an_evaluation_is_that_of_the_cpu(make_recipe, bank):
    recipe = make_recipe(4)
    hypernet = meta_train(recipe, banks=[bank], device='cpu', progress=False)
    control = train_plain(recipe, banks=[bank], device='cpu', progress=False)
    bank = ImageBank(bank.images, bank.labels, [f'unseen {name}' for name in bank.class_names])
    groups = TestGroups.draw(bank, count=20 if THERE else 4, n_way=3, n_shot=3, n_query=5, conditions=True)
    found = {
        device: evaluate(hypernet.to(device), bank, groups, other=bank, controls={'plain': control}, progress=False)
        for device in ('cpu', 'cuda')
    }
    for arm, expected in found['cpu']['accuracy'].items():
        # where there is none the CPU computes both
        assert_close(found['cuda']['accuracy'][arm]['mean'], expected['mean'], rtol=0, atol=5.0 if THERE else 0.0)


def test_a_prediction_is_fine_tuned(tiny_folder, pictures):
    pixels, names = pictures(18)
    model = predict_model('test_resnet', pixels, names, hypernet=str(tiny_folder))
    tuned = finetune(model, pixels, names, epochs=1, progress=False)
    assert next(tuned.parameters()).is_cuda
