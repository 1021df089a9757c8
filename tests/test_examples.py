"""The scripts of examples/, hub/denoising.py and the benchmark of fine-tuning, each run on small settings."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import timm_pudnet
from timm_pudnet.denoising import add_noise, denoiser_of, noisy_patches, psnr, shrunk, sketch_of
from timm_pudnet.denoising.pictures import list_pictures, read_picture
from timm_pudnet.evaluation import mean_interval
from timm_pudnet.files import weights_sha256

ROOT = Path(timm_pudnet.__file__).parents[1]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script of this checkout with arguments; gives what it printed."""

    def call(script, *args):
        monkeypatch.setattr(sys, 'argv', [script, *map(str, args)])
        with pytest.raises(SystemExit) as ended:  # click always ends by it
            runpy.run_path(str(ROOT / script), run_name='__main__')
        assert not ended.value.code, ended.value.code
        return capsys.readouterr().out

    return call


@pytest.fixture
def photos(tmp_path, pictures, write_folder):
    """Three classes of eight."""
    write_folder(tmp_path / 'photos', *pictures(24))
    return tmp_path / 'photos'


@pytest.fixture
def tiny_model(tiny_folder):
    return ('--model', 'test_resnet', '--hypernet', tiny_folder)


def test_own_photos_become_a_saved_classifier(run, photos, tiny_model, tmp_path):
    out = run('examples/own_photos.py', photos, '--out', tmp_path / 'model', '--show', 3, *tiny_model)
    assert '18 of them give the weights' in out
    assert 'Accuracy' in out
    answers = [line for line in out.splitlines() if '.png: ' in line]
    assert len(answers) == 3
    assert {line.split(': ')[1] for line in answers} <= {'cup', 'jar', 'pan'}
    assert timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True).num_classes == 3


def test_a_hypernetwork_by_name_predicts_and_is_fine_tuned(run, photos, tiny_folder, tmp_path):
    out = run('examples/pull_and_finetune.py', tiny_folder, photos, '--out', tmp_path / 'tuned', '--epochs', 2)
    assert 'test_resnet.tiny predicts test_resnet' in out
    assert 'on 6 images kept aside: predicted' in out
    assert timm.create_model(f'local-dir:{tmp_path / "tuned"}', pretrained=True).num_classes == 3


def test_the_label_budget_has_a_row_for_each_number_of_labels(run, photos, tiny_model, tmp_path):
    line = ('--labels', 1, '--labels', 6, '--labels', 7, '--draws', 2, '--out', tmp_path / 'budget.json')
    out = run('examples/label_budget.py', photos, *line, *tiny_model)
    assert '7 labels a class: a class has fewer' in out
    rows = json.loads((tmp_path / 'budget.json').read_text())['rows']
    assert [row['labels'] for row in rows] == [1, 6]
    assert rows[1]['centroid']['interval'] == 0  # all of them, drawn twice
    assert rows[1]['centroid']['mean'] > 60
    assert list(rows[0]) == ['labels', 'centroid', 'ridge', 'blend', 'logistic', 'with the rest unlabelled']
    assert list(rows[1]) == ['labels', 'centroid', 'ridge', 'blend', 'logistic']  # there is no rest


def test_a_hypernetwork_is_trained_on_a_family_of_sets(run, pictures, write_folder, tmp_path):
    names = {'hats': ('bowler', 'cap'), 'mugs': ('blue', 'red'), 'pots': ('big', 'old', 'small')}
    for name, classes in names.items():
        write_folder(tmp_path / 'family' / name, *pictures(24, names=classes))
    line = ('--images', 256, '--n-shot', 4, '--groups', 3, '--model', 'test_resnet', '--side', 32)
    out = run('examples/own_family.py', tmp_path / 'family', '--out', tmp_path / 'net', *line)
    assert 'trained on hats, mugs; tested on pots' in out
    assert all(f'\n  {row} ' in out for row in ('predicted', 'plain', 'swapped_sketch', 'gain_over_plain'))
    assert timm_pudnet.load_hypernet(tmp_path / 'net').config.class_names == ('bowler', 'cap', 'blue', 'red')
    assert 'a test_resnet for the 3 classes of pots' in out
    line = (*line[:6], '--start', tmp_path / 'net', '--out', tmp_path / 'more')
    assert 'a test_resnet for the 3 classes of pots' in run('examples/own_family.py', tmp_path / 'family', *line)
    first, more = (timm_pudnet.load_hypernet(tmp_path / name) for name in ('net', 'more'))
    state = more.state_dict()
    moved = [float((value.detach() - state[key]).abs().max()) for key, value in first.named_parameters()]
    assert 0 < max(moved) < 0.1  # small steps, from there


def test_a_folder_is_made_noisy_and_denoised(run, photos, tmp_path):
    made = {'width': 4, 'depth': 2}
    hypernet = timm_pudnet.PudNet.for_target('blindspot_unet', model_kwargs=made, generator='residual', sketch_width=8)
    hypernet.save_pretrained(tmp_path / 'net')
    out = run('examples/denoise.py', photos, '--sigma', 0.1, '--hypernet', tmp_path / 'net', '--out', tmp_path / 'out')
    noisy, denoised = (float(line.split()[2]) for line in out.splitlines())
    assert 19.5 < noisy < 23  # sigma 0.1, less where it was clipped
    assert denoised != noisy
    for what in ('noisy', 'denoised'):
        folder = tmp_path / 'out' / what
        found = {path.relative_to(folder).as_posix() for path in folder.rglob('*.*')}
        assert found == set(list_pictures(photos))
        assert len(found) == 24


def test_a_folder_of_grey_and_coloured_photos_is_no_example_of_denoising(pictures, write_folder, tmp_path, monkeypatch):
    write_folder(tmp_path / 'photos', pictures(2)[0])
    first = sorted((tmp_path / 'photos').rglob('*.png'))[0]
    Image.open(first).convert('L').save(first)
    monkeypatch.setattr(sys, 'argv', ['denoise.py', str(tmp_path / 'photos'), '--out', str(tmp_path / 'out')])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / 'examples/denoise.py'), run_name='__main__')
    assert ended.value.code == 2
    assert not (tmp_path / 'out').exists()


def test_denoisers_are_measured_on_the_images_as_they_were(run, pictures, write_folder, tmp_path):
    pytest.importorskip('skimage')
    write_folder(tmp_path / 'photos', pictures(5)[0])
    made = {'width': 4, 'depth': 2}
    network = timm_pudnet.PudNet.for_target('blindspot_unet', model_kwargs=made, generator='residual', sketch_width=8)
    network = timm_pudnet.load_hypernet(network.save_pretrained(tmp_path / 'net'))
    line = ('hub/denoising.py', tmp_path / 'net', tmp_path / 'photos', '--protocol', 'own', '--sigma', 0.5)
    run(*line, '--reading', 'unit')
    result = json.loads((tmp_path / 'net' / 'results.own.json').read_text())
    assert result['weights_sha256'] == weights_sha256(tmp_path / 'net')
    (found,) = result['noises']
    clean = [read_picture(path).pixels for path in list_pictures(tmp_path / 'photos').values()]
    noisy, noisier = (
        [add_noise(image, 'gaussian', sigma, torch.Generator().manual_seed(k)) for k, image in enumerate(clean)]
        for sigma in (0.5, 0.25)
    )
    input_size = network.config.input.input_size[:2]
    here, there = (shrunk(noisy_patches(images, *input_size)) for images in (noisy, noisier))
    own, other = ([sketch_of(network, shown) for shown in patches] for patches in (here, there))
    models = {
        'predicted': denoiser_of(network, own, here),
        'predicted, one size': denoiser_of(network, own[:1], here[:1]),
        'sketch of another sigma': denoiser_of(network, other, here),
        'predicted for another sigma': denoiser_of(network, other, there),
    }
    arms = {name: [timm_pudnet.denoise(model, image) for image in noisy] for name, model in models.items()}
    by_hand = {
        name: [float(psnr(one.clamp(0, 1), other)) for one, other in zip(images, clean, strict=True)]
        for name, images in {'noisy': noisy, **arms}.items()
    }
    for name, values in by_hand.items():
        assert found['psnr'][name] == pytest.approx(mean_interval(values), abs=0.01)
    pairs = zip(by_hand['predicted'], by_hand['sketch of another sigma'], strict=True)
    assert found['gain']['sketch of another sigma'] == pytest.approx(mean_interval([a - b for a, b in pairs]), abs=0.01)
    assert found['psnr']['non-local means']['mean'] > found['psnr']['noisy']['mean'] + 1
    run(*line, '--scratch', 2)
    (found,) = json.loads((tmp_path / 'net' / 'scratch.own.json').read_text())['noises']
    for name in ('adam', 'adam_centralised'):
        assert [point['epoch'] for point in found[name]] == [1, 2]


def test_denoisers_are_measured_on_noise_that_pixels_share(run, write_folder, tmp_path):
    pytest.importorskip('skimage')
    places = torch.linspace(0.3, 0.7, 96)
    clean = torch.stack([places.outer(places.roll(turn)).expand(3, -1, -1) + 0.1 for turn in range(0, 60, 20)])
    write_folder(tmp_path / 'photos', (clean.permute(0, 2, 3, 1) * 255).byte().numpy(), ['a'] * 3)
    line = ('hub/denoising.py', timm_pudnet.load_hypernet('blindspot_unet').folder, tmp_path / 'photos')
    line += ('--reading', 'unit', '--sigma', 0.1, '--protocol', 'own', '--out', tmp_path)
    found = {}
    for name, options in (('camera', ('--kind', 'camera')), ('jpeg', ('--kind', 'camera', '--jpeg', 90))):
        run(*line, *options)
        result = json.loads((tmp_path / 'results.own.json').read_text())
        assert (result['kind'], result.get('jpeg')) == ('camera', 90 if name == 'jpeg' else None)
        (found[name],) = (row['psnr'] for row in result['noises'])
        assert found[name]['predicted']['mean'] > found[name]['predicted, as if white']['mean'] + 3
    # Interpolating colours is a mean of the noise of neighbours, compression takes more of it away.
    assert 20 + 2 < found['camera']['noisy']['mean'] < found['jpeg']['noisy']['mean'] - 0.2


@pytest.mark.filterwarnings('default::timm_pudnet.PudNetWarning')  # where the processor has no bfloat16
def test_a_choice_of_classes_is_trained_on_and_tested_once(monkeypatch, pictures, write_folder, tmp_path):
    names = [f'class {number:02}' for number in range(70)]
    unseen = names[::14]
    write_folder(tmp_path / 'data' / 'train', *pictures(280, names=names))
    write_folder(tmp_path / 'data' / 'test', *pictures(125, names=unseen, seed=1))
    (tmp_path / 'splits.json').write_text(json.dumps({'cifar100-set': {'random-0': {'unseen': unseen}}}))
    line = ['splits.json', '--data', 'data', '--base-images', '256', '--images', '128', '--out', 'found.json']
    monkeypatch.setattr(sys, 'argv', ['cifar100_splits.py', *line, '--groups', '2'])
    monkeypatch.syspath_prepend(str(ROOT / 'examples'))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        runpy.run_path(str(ROOT / 'examples/cifar100_splits.py'), run_name='__main__')
        text = (tmp_path / 'found.json').read_text()
        monkeypatch.setattr(timm_pudnet, 'evaluate', None)  # the second time it is there
    found = json.loads(text)
    assert (found['base_images_each'], found['number_of_random_choices']) == (256, 1)
    choice = found['choices']['random-0']
    assert choice['classes'] == unseen
    assert {'predicted', 'swapped_sketch', 'base', 'base_own_statistics', 'raw_pixels'} <= set(choice['accuracy'])
    assert choice['accuracy']['raw_pixels']['mean'] > 90
    monkeypatch.setattr(sys, 'argv', ['cifar100_splits.py', *line, '--groups', '3'])
    with pytest.raises(SystemExit, match='other numbers'):
        runpy.run_path(str(ROOT / 'examples/cifar100_splits.py'), run_name='__main__')


@pytest.mark.filterwarnings('default')  # the exporters' own
def test_an_exported_model_gives_the_same_outputs(run, photos, tiny_model, tmp_path):
    out = run('examples/export.py', photos, '--out', tmp_path / 'exported', *tiny_model)
    assert 'torch.export: [5, 3], largest difference' in out
    assert torch.export.load(tmp_path / 'exported' / 'model.pt2').module()(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    if all(importlib.util.find_spec(name) for name in ('onnx', 'onnxscript', 'onnxruntime')):
        assert 'ONNX: [5, 3], largest difference' in out
    else:
        assert 'ONNX left out: pip install' in out


def test_the_benchmark_of_fine_tuning_sums_up_its_seeds_and_goes_on(run, photos, tiny_model, tmp_path):
    pytest.importorskip('matplotlib')
    line = (photos, '--images', 15, '--tested', 9, '--epochs', 2, '--out', tmp_path / 'found.json', *tiny_model)
    run('tests/benchmarks/finetuning.py', *line, '--seed', 0)
    run('tests/benchmarks/finetuning.py', *line, '--seed', 0, '--seed', 1)
    found = json.loads((tmp_path / 'found.json').read_text())
    assert list(found['runs']) == ['0', '1']
    summary = found['summary']
    assert [row['epoch'] for row in summary['curves']] == [1, 2]
    last = [run['arms']['fine_tuned'][-1]['accuracy'] for run in found['runs'].values()]
    assert summary['curves'][-1]['fine_tuned']['mean'] == pytest.approx(sum(last) / 2)
    rival = [run['arms']['random'][-1]['accuracy'] for run in found['runs'].values()]
    gains = [a - b for a, b in zip(last, rival, strict=True)]
    row = summary['curves'][-1]['gain_over_random']
    assert row['mean'] == pytest.approx(sum(gains) / 2)
    assert row['interval'] == pytest.approx(12.706 * abs(gains[0] - gains[1]) / 2, rel=1e-4)
    assert (tmp_path / 'found.png').is_file()
    with pytest.raises(AssertionError, match='2'):  # what is there would be taken for runs of three epochs
        run('tests/benchmarks/finetuning.py', *line[:6], 3, *line[7:])


@pytest.mark.parametrize(
    ('line', 'told'),
    [
        ('hub/denoising.py net photos --protocol own --scratch 1 --plain plain', '--scratch: leave them out'),
        ('hub/denoising.py net photos --protocol own --out nowhere', 'nowhere'),
        ('hub/denoising.py net photos --protocol own --scratch 1 --kind camera', 'camera out'),
        ('hub/denoising.py net photos --protocol own --bm3d', 'pip install bm3d'),
        ('examples/label_budget.py photos --out nowhere/found.json', 'nowhere'),
    ],
)
def test_what_cannot_be_written_or_used_is_told_before_the_work(line, told, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, 'bm3d', None)  # as it is where nobody installed it
    monkeypatch.setattr(sys, 'argv', line.split())
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / line.split()[0]), run_name='__main__')
    assert ended.value.code == 2
    assert told in capsys.readouterr().err
