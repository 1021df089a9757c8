"""cli/: what a user types, sees and finds on disk; above all when something is wrong with it."""

import dataclasses
import errno
import hashlib
import importlib
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import click
import numpy as np
import pytest
import timm
import torch
import tqdm
from click.testing import CliRunner
from commands import check_failure, fails, succeeds
from PIL import Image
from pngs import bomb
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import timm_pudnet
from timm_pudnet import PudNet, hub
from timm_pudnet.cli import main
from timm_pudnet.config import InputConfig
from timm_pudnet.evaluation import TestGroups
from timm_pudnet.files import config_sha256, weights_sha256
from timm_pudnet.hypernet import plan_hypernet

pytestmark = pytest.mark.filterwarnings('default::timm_pudnet.PudNetWarning')  # they are shown, as lines


@pytest.fixture
def images(tmp_path, pictures, write_folder):
    """A good folder: three classes of eight."""
    write_folder(tmp_path / 'images', *pictures(24))
    return tmp_path / 'images'


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The current folder, where outputs would go."""
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')
    return tmp_path / 'work'


@pytest.fixture
def predict(tiny_folder):
    """Arguments of a prediction with the tiny hypernetwork into the folder `model`."""

    def arguments(images, *more, name='test_resnet', hypernet=tiny_folder, out='model'):
        return ('predict', name, images, '--hypernet', hypernet, '--out', out, *more)

    return arguments


@pytest.fixture
def no_work_yet(monkeypatch):
    """Fails a test whose command reads images or loads a hypernetwork before it says no."""

    def refuse(*args, **kwargs):
        raise AssertionError('work began before the arguments were checked')

    for room in ('cli.predict', 'cli.evaluate', 'training.finetune', 'evaluation.compare'):
        monkeypatch.setattr(importlib.import_module(f'timm_pudnet.{room}'), 'open_images', refuse)
    for room in ('cli.predict', 'cli.denoise', 'training.finetune', 'evaluation.compare'):
        monkeypatch.setattr(importlib.import_module(f'timm_pudnet.{room}'), 'resolve_hypernet', refuse)


def truncated_jpeg():
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, 'JPEG')
    return buffer.getvalue()[:-500]


# predict


def test_a_prediction_says_what_it_found_and_did_and_wrote(images, work, predict):
    out = succeeds(*predict(images)).stdout
    for needle in ('24 images', '3 classes', str(images), 'cup, jar, pan', '6 of them', '18 give the weights'):
        assert needle in out
    for needle in (
        'test_resnet.tiny',
        'Device     cpu',
        '3x32x32',
        'Accuracy',
        'Raw pixels',
        'Chance      33.3%',
        'MB',
    ):
        assert needle in out
    assert [path.name for path in work.iterdir()] == ['model']
    assert sorted(path.name for path in (work / 'model').iterdir()) == ['config.json', 'model.safetensors', 'report']
    model = timm.create_model('local-dir:model', pretrained=True)
    assert model.num_classes == 3
    share = float(re.search(r'Accuracy +([\d.]+)%', out)[1])
    assert share > 60


def test_images_without_labels_teach_the_head(images, work, predict, pictures, write_folder):
    write_folder(work / 'rest', pictures(30, seed=9)[0])
    out = succeeds(*predict(images, '--unlabelled', 'rest')).stdout
    for needle in ('Also       30 unlabelled images in rest, for the head', '18 give the weights', 'Accuracy'):
        assert needle in out
    assert 'Repeated' not in out
    page = (work / 'model' / 'report' / 'index.html').read_text()
    assert 'Unlabelled images' in page
    assert 'Head' in page
    assert 'blend' in page
    alone = succeeds(*predict(images, '--head', 'blend', out='alone')).stdout
    weights = [load_file(work / name / 'model.safetensors')['fc.weight'] for name in ('model', 'alone')]
    assert (weights[0] - weights[1]).abs().max() > 1e-4
    assert 'unlabelled' not in alone


def test_images_kept_aside_that_are_among_those_without_labels_are_told(images, work, predict):
    """All images below a folder are taken, loose ones too."""
    shutil.copytree(images, 'rest')
    shutil.copy(next((images / 'cup').iterdir()), 'rest/loose.png')
    out = succeeds(*predict(images, '--unlabelled', 'rest')).stdout
    assert 'Also       25 unlabelled images' in out
    assert 'Repeated   6 of the images kept aside' in out


def test_images_without_labels_that_cannot_be_read_are_counted(images, work, predict):
    shutil.copytree(images, 'rest')
    for path in [*sorted(Path('rest/cup').iterdir())[:2], next((images / 'cup').iterdir())]:
        path.write_bytes(b'no image')
    succeeds(*predict(images, '--unlabelled', 'rest'))
    assert '3 images could not be read' in (work / 'model' / 'report' / 'index.html').read_text()


@pytest.mark.parametrize(
    ('more', 'needles'),
    [
        (('--unlabelled', 'nowhere'), ['nowhere']),
        (('--unlabelled', '{images}', '--head', 'centroid'), ['head centroid', 'unlabelled']),
    ],
)
def test_images_without_labels_that_cannot_be_used_are_refused(more, needles, images, work, predict):
    fails(*predict(images, *(str(text).format(images=images) for text in more)), needles=needles)
    assert not list(work.iterdir())


def test_without_out_nothing_is_written_and_that_is_said(images, work, tiny_folder, nothing_written):
    with nothing_written(work.parent):
        result = succeeds('predict', 'test_resnet', images, '--hypernet', tiny_folder)
    assert 'Not saved' in result.stdout
    assert '--out' in result.stdout


def test_the_images_kept_aside_give_nothing_to_the_model(images, work, predict):
    """The saved model is that of the other images alone, and the accuracy printed is its own on the rest."""
    out = succeeds(*predict(images, '--holdout', '0.5', '--seed', '3')).stdout
    right, total = map(int, re.search(r'\((\d+) of (\d+);', out).groups())
    assert total == 12
    network = timm_pudnet.load_hypernet(predict(images)[4])
    source = timm_pudnet.open_images(images, input=network.config.input)
    used, tested = timm_pudnet.evaluation.split_held_out(source, 0.5, 3)
    paths = [path for name in ('cup', 'jar', 'pan') for path in sorted((images / name).iterdir())]
    used_images = {image.numpy().tobytes() for image in next(used.batches())[0]}
    rows = [k for k, image in enumerate(next(source.batches())[0]) if image.numpy().tobytes() in used_images]
    assert len(rows) == 12
    labels = [paths[k].parent.name for k in rows]
    expected = timm_pudnet.predict_model('test_resnet', [paths[k] for k in rows], labels, hypernet=network)
    model = timm.create_model('local-dir:model', pretrained=True).eval()
    assert_close(model.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-5)
    (batch, numbers), *_ = tested.batches()
    with torch.inference_mode():
        assert int((model(batch).argmax(1) == numbers).sum()) == right


def test_without_a_holdout_all_images_give_the_weights(images, work, predict):
    out = succeeds(*predict(images, '--holdout', '0')).stdout
    assert 'Accuracy' not in out
    expected = timm_pudnet.predict_model('test_resnet', images, hypernet=predict(images)[4]).state_dict()
    assert_close(timm.create_model('local-dir:model', pretrained=True).state_dict(), expected, rtol=1e-5, atol=1e-5)


def test_the_head_is_the_one_that_is_asked_for(images, work, predict):
    biases = {}
    for head in ('centroid', 'ridge', 'blend', 'logistic'):
        out = succeeds(*predict(images, '--head', head, out=head)).stdout
        assert float(re.search(r'Accuracy +([\d.]+)%', out)[1]) > 60
        biases[head] = timm.create_model(f'local-dir:{head}', pretrained=True).fc.bias.detach()
    assert not biases['centroid'].any()
    assert biases['ridge'].abs().max() > 0.01
    assert 0 < biases['blend'].abs().max() < biases['ridge'].abs().max()
    out = succeeds(*predict(images, '--head', 'none', out='none')).stdout
    assert 'Accuracy' not in out
    assert 'Kept aside' not in out
    assert timm.create_model('local-dir:none', pretrained=True).num_classes == 0
    fails(*predict(images, '--head', 'linear', out='linear'), needles=['--head', 'linear', 'ridge'])


def test_an_unlabelled_folder_gives_a_feature_model_and_is_told_so(work, predict, pictures, write_folder, tmp_path):
    write_folder(tmp_path / 'flat', pictures(6)[0])
    assert 'features' in succeeds(*predict(tmp_path / 'flat')).stdout
    assert timm.create_model('local-dir:model', pretrained=True).num_classes == 0
    assert re.search(r'Head</\w+>\s*<\w+>none<', Path('model/report/index.html').read_text())
    assert 'no labels' in succeeds(*predict(tmp_path / 'flat', '--head', 'ridge', out='more')).stderr


def test_what_is_saved_can_be_read_by_whom_the_umask_lets(images, work, predict):
    before = os.umask(0o027)
    try:
        succeeds(*predict(images))
    finally:
        os.umask(before)
    for path in (Path('model'), *Path('model').rglob('*')):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def test_a_head_that_is_no_single_layer_is_predicted_and_saved(images, work, predict, tmp_path):
    """timm's RepViT has a norm in its classifier."""
    wide = InputConfig(input_size=(3, 64, 64))
    network = PudNet.for_target('repvit_m0_9', generator='residual', sketch_width=8, sketch_channels=(4, 4), input=wide)
    network.save_pretrained(tmp_path / 'net')
    succeeds(*predict(images, name='repvit_m0_9', hypernet=tmp_path / 'net'))
    assert timm.create_model('local-dir:model', pretrained=True).num_classes == 3
    assert Path('model/report/index.html').is_file()


@pytest.mark.parametrize('what', ['in use', 'tested'])
def test_damaged_images_of_a_small_class_cost_the_test_and_not_the_model(what, images, work, predict):
    split = succeeds(*predict(images, out='whole')).stdout
    assert 'Kept aside 6' in split
    source = timm_pudnet.images.open_images(images, input=InputConfig())
    used, tested = timm_pudnet.evaluation.split_held_out(source, 0.25)
    part = used if what == 'in use' else tested
    for row in range(len(part)):
        if what == 'tested' or part.labels[row] == 0:
            (images / part.name(row)).write_bytes(b'no image')
    result = succeeds(*predict(images))
    assert 'Accuracy' not in result.stdout
    told = {'in use': 'all gave the weights, none is tested', 'tested': 'Not tested: none of the 6 images'}[what]
    assert told in result.stderr
    assert told in Path('model/report/index.html').read_text()
    assert timm.create_model('local-dir:model', pretrained=True).num_classes == 3


@pytest.mark.parametrize(
    ('right_raw', 'head', 'many', 'told'),
    [
        (6, 'centroid', 20, 'try --head blend, or '),
        (6, 'centroid', 1, 'try --head logistic, or '),
        (6, 'ridge', 20, ''),
        (5, 'ridge', 20, None),
    ],
)
def test_raw_pixels_that_do_as_well_are_told(right_raw, head, many, told, images, work, predict, monkeypatch):
    monkeypatch.setattr('timm_pudnet.cli.predict._BETTER_HEADS', {many: 'logistic'})
    measure = timm_pudnet.evaluation.measure_held_out

    def measured(*args):
        test = measure(*args)
        return dataclasses.replace(test, guesses=test.labels, right_raw=right_raw)  # all 6 right

    monkeypatch.setattr('timm_pudnet.evaluation.measure_held_out', measured)
    out = succeeds(*predict(images, '--head', head)).stdout
    wanted = f'raw pixels do as well: {told}train a hypernetwork for images of this family'
    assert (wanted in out, 'raw pixels do as well' in out) == ((False, False) if told is None else (True, True))


@pytest.mark.parametrize(
    ('count', 'labelled', 'line', 'told'),
    [
        (120, True, [], 'logistic'),
        (117, True, [], 'blend'),
        (60, True, [], 'blend'),
        (60, True, ['--head', 'centroid'], None),
        (60, True, ['--head', 'none'], None),
        (57, True, [], None),
        (60, False, [], None),
    ],
)
def test_a_better_head_is_named_where_labels_are_many(
    count, labelled, line, told, tmp_path, work, predict, pictures, write_folder
):
    write_folder(tmp_path / 'many', *pictures(count))  # three classes
    if not labelled:
        (tmp_path / 'flat').mkdir()
        for path in (tmp_path / 'many').rglob('*.png'):
            path.rename(tmp_path / 'flat' / f'{path.parent.name}-{path.name}')
    out = succeeds(*predict(tmp_path / ('many' if labelled else 'flat'), '--holdout', '0', *line)).stdout
    named = re.search('--head (.*) is usually better', out)
    assert (named and named[1]) == told


def test_names_that_the_terminal_cannot_write_are_written_otherwise(images, work, predict):
    (images / 'cup').rename(images / '猫')
    result = CliRunner(charset='cp1252').invoke(main, [str(word) for word in predict(images)])
    assert (result.exit_code, result.stderr) == (0, '')
    assert 'jar, pan, \\u732b' in result.stdout


def test_a_pass_over_many_images_shows_a_bar(images, work, predict, monkeypatch):
    assert 'Reading' not in succeeds(*predict(images, out='quick')).stderr  # within two seconds
    monkeypatch.setattr('timm_pudnet.images.source.tqdm', lambda **kwargs: tqdm.tqdm(**{**kwargs, 'delay': 0}))
    assert re.search(r'Reading: .* 0/18 ', succeeds(*predict(images, out='slow')).stderr)


@pytest.mark.parametrize(
    ('error', 'needles'),
    [
        (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.'), ['out of memory', '--device cpu']),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), ['not enough memory', 'fewer']),
        (MemoryError(), ['not enough memory', 'fewer']),
    ],
)
def test_too_little_memory_is_one_line(error, needles, images, work, predict, monkeypatch, nothing_written):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr('timm_pudnet.evaluation.measure_held_out', refuse)
    with nothing_written(work):
        fails(*predict(images), needles=needles)


def printed_lines(stdout):
    """The indented lines at the end of what a command printed."""
    return '\n'.join(line[4:] for line in stdout.splitlines() if line.startswith('    '))


def test_a_real_process_predicts_and_the_lines_that_it_prints_run_in_another(images, work, predict, fresh_process):
    code, stdout, stderr = fresh_process('-m', 'timm_pudnet.cli', *predict(images), cwd=work)
    assert (code, stderr) == (0, '')
    lines = printed_lines(stdout)
    assert "timm.create_model('local-dir:model', pretrained=True)" in lines
    script = (
        f'import sys; sys.modules["timm_pudnet"] = None\n{lines}\n'
        'from PIL import Image\n'
        f'image = Image.open({str(images / "cup" / "0000.png")!r})\n'
        'print(tuple(model(transform(image)[None]).shape), model.training)\n'
    )
    code, stdout, stderr = fresh_process('-c', script, cwd=work)
    assert code == 0, stderr
    assert stdout.split('\n')[-2] == '(1, 3) False'


@pytest.mark.parametrize('name', ["my model's", 'back\\slash', 'ünïcode 猫'])
def test_the_lines_that_it_prints_run_whatever_the_folder_is_called(name, images, work, predict):
    scope = {}
    exec(printed_lines(succeeds(*predict(images, out=name)).stdout), scope)
    assert scope['model'].num_classes == 3


# predict, with bad input


def make_nothing(root):
    root.mkdir()


def make_text_files(root):
    root.mkdir()
    for name in ('a.txt', 'b.csv'):
        (root / name).write_text('text')


def make_only_truncated(root):
    for name in ('cup', 'jar'):
        (root / name).mkdir(parents=True)
        (root / name / 'a.jpg').write_bytes(truncated_jpeg())


def make_only_bombs(root):
    for name in ('cup', 'jar'):
        (root / name).mkdir(parents=True)
        (root / name / 'a.png').write_bytes(bomb())


def make_one_class(root):
    (root / 'cup').mkdir(parents=True)
    for number in range(4):
        Image.new('RGB', (32, 32), (50 * number, 9, 9)).save(root / 'cup' / f'{number}.png')


def make_splits(root):
    for name in ('train', 'val'):
        (root / name).mkdir(parents=True)
        Image.new('RGB', (32, 32)).save(root / name / 'a.png')


def make_a_file(root):
    root.write_bytes(b'no folder')


BAD_IMAGES = {
    'empty folder': (make_nothing, ['no images', 'empty']),
    'missing folder': (lambda root: None, ['no such folder']),
    'text files': (make_text_files, ['no images', '2 other files', '.csv, .txt']),
    'a file': (make_a_file, ['is one file']),
    'only truncated images': (make_only_truncated, ['none of the 2 images', 'truncated']),
    'only decompression bombs': (make_only_bombs, ['none of the 2 images', 'pixels']),
    'one class': (make_one_class, ['one class', 'two']),
    'splits instead of classes': (make_splits, ['splits, not classes']),
}


@pytest.mark.parametrize('case', BAD_IMAGES)
def test_bad_images_are_one_line_and_write_nothing(case, work, predict, tmp_path, nothing_written):
    make, needles = BAD_IMAGES[case]
    root = tmp_path / 'photos'
    make(root)
    with nothing_written(tmp_path):
        fails(*predict(root), needles=[root, *needles])


def test_a_truncated_image_among_good_ones_is_skipped_with_a_count(images, work, predict, nothing_written, tmp_path):
    (images / 'cup' / 'bad.jpg').write_bytes(truncated_jpeg())
    with nothing_written(tmp_path):
        fails(*predict(images, '--strict'), needles=['cup/bad.jpg', 'truncated'])
    result = succeeds(*predict(images, '--holdout', '0'))
    assert re.fullmatch(r'Warning: skipped 1 of 25 images .*cup/bad\.jpg \(truncated\)\n', result.stderr)
    (images / 'cup' / 'bad.jpg').unlink()
    succeeds(*predict(images, '--holdout', '0', out='without'))
    found, expected = (timm.create_model(f'local-dir:{name}', pretrained=True) for name in ('model', 'without'))
    assert_close(found.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-5)


def test_a_decompression_bomb_is_skipped_without_memory(images, work, predict):
    (images / 'cup' / 'bomb.png').write_bytes(bomb())
    result = succeeds(*predict(images, '--holdout', '0'))
    assert re.match(r'Warning: skipped 1 of 25 images .*cup/bomb\.png \(more than [\d,]+ pixels\)\n', result.stderr)


def test_images_of_odd_kinds_are_fine(images, work, predict):
    picture = Image.open(images / 'cup' / '0000.png')
    odd = images / 'cup'
    Image.new('RGB', (1, 1), (200, 3, 3)).save(odd / 'pixel.png')
    for mode in ('L', 'LA', 'RGBA', 'P', '1'):
        picture.convert(mode).save(odd / f'{mode}.png')
    picture.convert('CMYK').save(odd / 'CMYK.jpg')
    Image.fromarray(np.random.default_rng(0).integers(0, 65536, (40, 30)).astype(np.uint16)).save(odd / '16-bit.png')
    picture.save(odd / 'animated.gif', save_all=True, append_images=[picture.rotate(90), picture.rotate(180)])
    picture.save(odd / 'animated.webp', save_all=True, append_images=[picture.rotate(90)])
    picture.resize((301, 17)).save(odd / 'wide.jpeg')
    result = succeeds(*predict(images, '--holdout', '0', '--strict'))
    assert '35 images in 3 classes' in result.stdout
    assert re.fullmatch(r'Warning: .*: images of more than 8 bits are brought to 8 here.*\n', result.stderr)
    state = timm.create_model('local-dir:model', pretrained=True).state_dict()
    assert all(value.isfinite().all() for value in state.values())


def test_a_class_with_one_image_works_and_is_said(images, work, predict):
    (images / 'rare').mkdir()
    shutil.copy(images / 'cup' / '0000.png', images / 'rare' / 'one.png')
    result = succeeds(*predict(images))
    assert timm.create_model('local-dir:model', pretrained=True).num_classes == 4
    said = [line for line in result.output.splitlines() if 'rare' in line and re.search(r'\b(one|1|single)\b', line)]
    assert said, f'nothing says that class rare has one image, so that none of it is tested:\n{result.output}'


@pytest.mark.parametrize(
    ('name', 'needles'),
    [
        ('test_resnt', ["'test_resnt'", 'Did you mean test_resnet']),
        ('test_resnet.r160_in1k', ['without a tag']),
        ('resnet18', ['test_resnet.tiny predicts test_resnet, not resnet18']),
        ('vit_tiny_patch16_224', ['vit_tiny_patch16_224']),
    ],
)
def test_an_architecture_that_cannot_be_predicted_is_named(
    name, needles, images, work, predict, nothing_written, tmp_path
):
    with nothing_written(tmp_path):
        fails(*predict(images, name=name), needles=needles)


def test_without_hypernet_a_transformer_is_refused_for_what_it_is(images, work, nothing_written, tmp_path):
    with nothing_written(tmp_path):
        result = fails('predict', 'vit_tiny_patch16_224', images, '--out', 'model', needles=['vit_tiny_patch16_224'])
    assert 'Train one' not in result.stderr, 'no hypernetwork can be trained for it'


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


DAMAGE = {
    'weights truncated': (cut('model.safetensors', 10_000), ['model.safetensors']),
    'weights cut in the header': (cut('model.safetensors', 30), ['model.safetensors']),
    'weights empty': (cut('model.safetensors', 0), ['model.safetensors']),
    'weights missing': (lambda folder: (folder / 'model.safetensors').unlink(), ['model.safetensors']),
    'config missing': (lambda folder: (folder / 'config.json').unlink(), ['config.json']),
    'config truncated': (cut('config.json', 100), ['config.json', 'not JSON']),
    'config empty': (cut('config.json', 0), ['config.json']),
    'folder missing': (shutil.rmtree, []),
}


@pytest.mark.parametrize('case', DAMAGE)
def test_a_damaged_hypernetwork_is_named(case, images, work, predict, tiny_folder, nothing_written, tmp_path):
    spoil, needles = DAMAGE[case]
    damaged = tmp_path / 'hypernet'
    shutil.copytree(tiny_folder, damaged)
    spoil(damaged)
    with nothing_written(tmp_path):
        fails(*predict(images, hypernet=damaged), needles=[damaged, *needles])


def test_an_output_that_exists_is_refused_before_any_work(images, work, predict, no_work_yet, nothing_written):
    (work / 'model').mkdir()
    (work / 'model' / 'notes.txt').write_text('mine')
    (work / 'file').write_text('mine')
    with nothing_written(work.parent):
        fails(*predict(images), needles=['model exists', 'another'])
        fails(*predict(images, out='file'), needles=['file exists', 'another'])
        fails(*predict(images, out='no/parent/model'), needles=['no/parent', 'make it first'])


@pytest.mark.parametrize('holdout', ['1', '-0.1', 'nan', 'half', '2'])
def test_a_bad_holdout_is_refused_before_any_work(holdout, images, work, predict, no_work_yet, nothing_written):
    with nothing_written(work.parent):
        fails(*predict(images, f'--holdout={holdout}'), needles=['holdout', holdout])


def test_a_data_dir_of_no_timm_dataset_is_refused_before_any_work(images, work, predict, no_work_yet, nothing_written):
    with nothing_written(work.parent):
        fails(*predict(images, '--data-dir', 'there'), needles=['--data-dir', 'timm dataset'])


def test_a_split_of_no_timm_dataset_is_refused_before_any_work(images, work, predict, no_work_yet, nothing_written):
    with nothing_written(work.parent):
        fails(*predict(images, '--split', 'train'), needles=['--split', 'timm dataset', 'torch/image_folder'])


@pytest.mark.parametrize('device', ['gpu', 'cuda', 'cuda:99', 'meta'])
def test_a_bad_device_is_one_line(device, images, work, predict, nothing_written):
    if device == 'cuda' and torch.cuda.is_available():
        pytest.skip('this machine has CUDA')
    with nothing_written(work.parent):
        fails(*predict(images, '--device', device), needles=[device])


def test_an_unknown_option_is_named(images, work, predict, nothing_written):
    with nothing_written(work.parent):
        fails(*predict(images, '--hodlout', '0.5'), needles=['--hodlout', '--holdout'])


def test_a_full_disk_is_one_line_and_leaves_nothing(images, work, predict, full_disk, monkeypatch, nothing_written):
    with nothing_written(work.parent):
        with full_disk():
            result = fails(*predict(images))
        assert 'model' in result.stderr

        def fails_midway(model, folder, **_):
            (Path(folder) / 'model.safetensors').write_bytes(b'half')
            raise OSError(errno.ENOSPC, 'No space left on device')

        monkeypatch.setattr(timm.models, 'save_for_hf', fails_midway)
        fails(*predict(images), needles=['model cannot be written: No space left on device'])


def test_a_folder_among_the_images_is_no_place_for_output(images, predict, work, nothing_written, tiny_folder):
    with nothing_written(work):
        for line in (
            predict(images, out=images / 'model'),
            ('finetune', 'test_resnet', images, '--hypernet', tiny_folder, '--out', images / 'model'),
            ('compare', 'test_resnet', images, '--hypernet', tiny_folder, '--out', images / 'model'),
        ):
            fails(*line, needles=['--out', 'is IMAGES or lies in it', 'choose a folder outside'])


def test_nor_is_one_below_a_data_dir_or_a_home(images, predict, work, nothing_written, monkeypatch):
    monkeypatch.setenv('HOME', str(images.parent))
    unlabelled = f'--unlabelled=~/{images.name}'
    with nothing_written(work):
        for name in ('torch/image_folder', 'torch/Folder'):
            line = predict(name, '--data-dir', images.parent, out=images / 'model')
            fails(*line, needles=['--out', 'is --data-dir or lies in it', 'choose a folder outside'])
        fails(*predict(images.parent / 'others', unlabelled, out=images / 'model'), needles=['is --unlabelled or lies'])


def test_a_hypernetwork_is_not_written_among_the_images_that_it_learns_from(shapes, nothing_written):
    with nothing_written(shapes):
        line = ('train', shapes / 'recipe.toml', '--out', shapes / 'my shapes' / 'net')
        fails(*line, needles=['--out', 'is images of the recipe or lies in it', 'choose a folder outside'])


@pytest.mark.parametrize('form', ['home', 'data_dir', '--data-dir'])
def test_nor_below_a_home_or_a_folder_that_timm_reads(form, shapes, tmp_path, monkeypatch, nothing_written):
    monkeypatch.setenv('HOME', str(shapes))
    said = {
        'home': 'images = "~/my shapes"',
        'data_dir': 'images = "torch/image_folder"\ndata_dir = "~/my shapes"',
        '--data-dir': 'images = "torch/Folder"\ndata_dir = "elsewhere"',
    }[form]
    recipe = tmp_path / 'recipe.toml'
    recipe.write_text(RECIPE.replace('images = {images}', said))
    root = ['--data-dir', shapes / 'my shapes'] if form == '--data-dir' else []
    with nothing_written(shapes):
        line = ('train', recipe, '--out', shapes / 'my shapes' / 'net', *root)
        fails(*line, needles=['--out', 'is images of the recipe or lies in it'])


def test_no_work_is_lost_when_nobody_reads_what_is_said(images, work, tiny_folder):
    words = f'predict test_resnet {shlex.quote(str(images))} --hypernet {shlex.quote(str(tiny_folder))} --out heard'
    line = f'{shlex.quote(sys.executable)} -m timm_pudnet.cli {words} | head -1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(['bash', '-c', line], cwd=work, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.startswith('Found ')
    assert (done.stderr, done.returncode) == ('', 0)
    assert {path.name for path in (work / 'heard').iterdir()} >= {'config.json', 'model.safetensors', 'report'}


@pytest.mark.parametrize('closed', ['>&-', '2>&-'])
def test_streams_that_are_closed_are_not_written_to(closed, images, work, tiny_folder):
    words = f'finetune test_resnet {shlex.quote(str(images))} --hypernet {shlex.quote(str(tiny_folder))} --out tuned'
    line = f'{shlex.quote(sys.executable)} -m timm_pudnet.cli {words} --epochs 2 {closed}'
    done = subprocess.run(line, shell=True, cwd=work, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (work / 'tuned' / 'model.safetensors').is_file()


def test_of_classes_with_one_image_each_it_is_said_that_nothing_is_tested(images, work, predict):
    for path in images.glob('*/*'):
        if path != sorted(path.parent.iterdir())[0]:
            path.unlink()
    out = succeeds(*predict(images)).stdout
    assert 'cup, jar, pan' in out
    assert 'Not tested no class has two images, so none is kept aside' in out


def test_a_folder_that_cannot_be_written_is_one_line(images, work, predict, monkeypatch, nothing_written):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), 'model')

    monkeypatch.setattr('tempfile.mkdtemp', refuse)
    with nothing_written(work.parent):
        fails(*predict(images), needles=['Permission denied', 'model'])


def test_a_real_process_prints_one_line_and_no_traceback(images, work, predict, fresh_process, nothing_written):
    (images / 'cup' / 'bad.jpg').write_bytes(truncated_jpeg())
    with nothing_written(work.parent):
        code, stdout, stderr = fresh_process('-m', 'timm_pudnet.cli', *predict(images, '--strict'), cwd=work)
    check_failure(code, stderr, ['cup/bad.jpg', 'truncated'])
    assert 'Wrote' not in stdout


# train and evaluate


RECIPE = """
seed = 1

[hypernet]
model_name = "test_resnet"
tag = "shapes"
sketch_width = 8
sketch_channels = [4, 4]

[hypernet.input]
input_size = [3, 16, 16]

[data]
images = {images}
classes = ["cup", "jar", "pan"]

[groups]
n_way = 2
n_shot = 2
n_query = 1

[schedule]
images = 12
"""
UNSEEN = ('lid', 'mug')


@pytest.fixture(scope='module')
def shapes(tmp_path_factory, pictures, write_folder):
    """A folder `my shapes` of five classes of 26 images, and a recipe `recipe.toml` that trains on three of them."""
    root = tmp_path_factory.mktemp('shapes')
    write_folder(root / 'my shapes', *pictures(130, names=('cup', 'jar', 'pan', *UNSEEN), size=16))
    (root / 'recipe.toml').write_text(RECIPE.format(images=json.dumps(str(root / 'my shapes'))))
    return root


@pytest.fixture(scope='module')
def trained(shapes):
    """The folder of a hypernetwork and its control, trained for two steps, and what was printed; not to be changed."""
    out = shapes / 'my hypernet'
    first = succeeds('train', shapes / 'recipe.toml', '--out', out)
    second = succeeds('train', shapes / 'recipe.toml', '--out', out, '--plain')
    return out, first.stdout, second.stdout


def test_training_writes_a_hypernetwork_its_recipe_and_its_log(trained, shapes):
    out, printed, _ = trained
    for needle in ('78 images', '3 classes', 'cup, jar, pan', 'test_resnet', '12 images', str(out)):
        assert needle in printed
    assert {'config.json', 'model.safetensors', 'recipe.toml', 'run', 'plain'} <= {path.name for path in out.iterdir()}
    assert (out / 'recipe.toml').read_text() == (shapes / 'recipe.toml').read_text()
    hypernet = timm_pudnet.load_hypernet(out)
    assert hypernet.name == 'test_resnet.shapes'
    assert hypernet.config.class_names == ('cup', 'jar', 'pan')
    assert hypernet.config.training['images'] == 12
    assert len((out / 'run' / 'log.jsonl').read_text().splitlines()) == 2
    assert {path.name for path in (out / 'run').iterdir()} >= {'board', 'checkpoint.safetensors', 'losses.png'}
    assert not list(out.rglob('.*')), 'temporary files are left'


def test_the_control_is_a_timm_feature_model(trained):
    out, _, printed = trained
    assert str(out / 'plain') in printed
    model = timm.create_model(f'local-dir:{out / "plain"}', pretrained=True)
    assert (model.num_classes, type(model).__name__) == (0, 'ResNet')
    data = timm.data.resolve_model_data_config(model)
    assert (data['input_size'], tuple(data['mean']), data['interpolation']) == ((3, 16, 16), (0.5,) * 3, 'bicubic')
    assert not {'license', 'hf_hub_id', 'url'} & {key for key, value in model.pretrained_cfg.items() if value}


def test_a_recipe_of_another_training_is_not_written_over(trained, shapes, tmp_path, nothing_written):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'recipe.toml').write_text('seed = 2\n')
    with nothing_written(tmp_path):
        fails('train', shapes / 'recipe.toml', '--out', tmp_path / 'out', needles=['recipe.toml', 'another recipe'])


def test_a_home_that_the_shell_left_as_it_is_means_the_home(images, work, predict, monkeypatch, nothing_written):
    monkeypatch.setenv('HOME', str(work.parent))
    with nothing_written(work):
        succeeds(*predict(images, '--no-report', out='~/model'))
    assert (work.parent / 'model' / 'model.safetensors').is_file()


def test_the_line_that_training_prints_runs(trained):
    for printed in trained[1:]:
        command = shlex.split(next(line for line in printed.splitlines() if line.startswith('    timm-pudnet')))
        assert command[:2] == ['timm-pudnet', 'evaluate']
        result = succeeds(*command[1:], '--groups', '2')
        assert '2 unseen classes: lid, mug' in result.stdout


def test_a_hypernetwork_that_does_not_name_its_classes_is_evaluated_on_all_with_a_word(trained, shapes, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / 'unnamed')
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, 'class_names': []}))
    result = succeeds('evaluate', folder, shapes / 'my shapes', '--groups', '2')
    assert 'does not say which classes it was trained on' in result.stdout
    assert '5 unseen classes' in result.stdout
    assert 'Not saved: add --save' in result.stdout


def test_several_sets_are_found_and_trained_on(shapes, tmp_path):
    images = json.dumps(str(shapes / 'my shapes'))
    unseen = f'[[data]]\nimages = {images}\nclasses = ["lid", "pan"]\nshare = 2\n\n[groups]'
    recipe = (shapes / 'recipe.toml').read_text().replace('[data]', '[[data]]').replace('[groups]', unseen)
    (tmp_path / 'recipe.toml').write_text(recipe)
    printed = succeeds('train', tmp_path / 'recipe.toml', '--out', tmp_path / 'out').stdout
    assert '78 images in 3 classes: cup, jar, pan' in printed
    assert '52 images in 2 classes: lid, pan' in printed
    assert timm_pudnet.load_hypernet(tmp_path / 'out').config.class_names == ('cup', 'jar', 'pan', 'lid')


# Webdataset leaves files open.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning', 'ignore::ResourceWarning')
def test_a_set_whose_classes_are_numbers_is_trained_on_and_evaluated(shapes, trained, tmp_path, write_web_dataset):
    pytest.importorskip('webdataset')
    labels = np.arange(60) % 5
    pixels = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
    pixels += (labels * 20).astype(np.uint8)[:, None, None, None]
    write_web_dataset(tmp_path, pixels, labels)
    recipe = re.sub(r'\[data\].*?\n\n', '', (shapes / 'recipe.toml').read_text(), flags=re.DOTALL)
    data = f'[data]\nimages = "wds/mine"\ndata_dir = {json.dumps(str(tmp_path))}\nunseen = ["1", "3"]\n\n'
    (tmp_path / 'recipe.toml').write_text(f'{recipe}\n{data}')
    printed = succeeds('train', tmp_path / 'recipe.toml', '--out', tmp_path / 'out').stdout
    assert 'in 3 classes: 0, 2, 4' in printed
    assert timm_pudnet.load_hypernet(tmp_path / 'out').config.class_names == ('0', '2', '4')
    source = ('wds/mine', '--data-dir', tmp_path, '--split', 'train')
    small = ('--groups', '2', '--n-shot', '2', '--n-query', '2')
    assert '2 unseen classes: 1, 3' in succeeds('evaluate', tmp_path / 'out', *source, *small).stdout
    words = shlex.split(printed.partition(':\n')[2].strip().splitlines()[-1])  # there is no split test
    assert '2 unseen classes: 1, 3' in succeeds(*words[1:], *small).stdout
    named = trained[0]  # trained on cups and jars
    fails('evaluate', named, *source, *small, needles=['no names', 'test_resnet.shapes'])


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning', 'ignore::ResourceWarning')
def test_a_set_that_is_a_stream_is_predicted_for(tmp_path, work, tiny_folder, pictures, write_web_dataset):
    pytest.importorskip('webdataset')
    pixels, labels = pictures(60)
    write_web_dataset(tmp_path, pixels, np.unique(labels, return_inverse=True)[1])
    line = ('test_resnet', 'wds/mine', '--data-dir', tmp_path, '--hypernet', tiny_folder)
    out = succeeds('predict', *line, '--out', 'model').stdout
    assert '--head blend' not in out
    assert 'Not tested these images tell their labels only as they are read' in out
    assert 'Not tested: these images tell their labels only as' in Path('model/report/index.html').read_text()
    assert timm.create_model('local-dir:model', pretrained=True).num_classes == 3
    assert 'Not tested' not in succeeds('predict', *line, '--out', 'untested', '--holdout', '0').stdout


def test_a_class_that_one_set_trains_on_and_another_keeps_for_the_test_is_refused(shapes, tmp_path, monkeypatch):
    images = json.dumps(str(shapes / 'my shapes'))
    unseen = f'[[data]]\nimages = {images}\nunseen = ["cup", "mug"]\n\n[groups]'
    recipe = (shapes / 'recipe.toml').read_text().replace('[data]', '[[data]]').replace('[groups]', unseen)
    (tmp_path / 'recipe.toml').write_text(recipe)

    def refuse(*args, **kwargs):
        raise AssertionError('images were read before the classes were checked')

    monkeypatch.setattr(timm_pudnet.training.ImageBank, 'from_source', refuse)
    fails('train', tmp_path / 'recipe.toml', '--out', tmp_path / 'out', needles=["'cup'", 'unseen in', 'seen in'])
    assert not (tmp_path / 'out').exists()


def test_a_result_that_exists_is_not_trained_over(trained, shapes, nothing_written, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('work began before the arguments were checked')

    monkeypatch.setattr('timm_pudnet.training.load_banks', refuse)
    with nothing_written(shapes):
        fails('train', shapes / 'recipe.toml', '--out', trained[0], needles=[trained[0], 'exists'])
        fails('train', shapes / 'recipe.toml', '--out', trained[0], '--plain', needles=[trained[0] / 'plain', 'exists'])


def test_a_control_may_come_before_its_hypernetwork(shapes, tmp_path):
    succeeds('train', shapes / 'recipe.toml', '--out', tmp_path / 'new' / 'out', '--plain')
    assert {path.name for path in (tmp_path / 'new' / 'out').iterdir()} == {
        'plain',
        'plain.whitening.safetensors',
        'run-plain',
    }


def test_training_goes_on_where_it_stopped(trained, shapes, tmp_path):
    recipe = timm_pudnet.Recipe.load(shapes / 'recipe.toml')
    timm_pudnet.meta_train(recipe, tmp_path / 'out' / 'run', max_steps=1, progress=False)
    first = (tmp_path / 'out' / 'run' / 'log.jsonl').read_text()
    assert len(first.splitlines()) == 1
    succeeds('train', shapes / 'recipe.toml', '--out', tmp_path / 'out')
    log = (tmp_path / 'out' / 'run' / 'log.jsonl').read_text()
    assert log.startswith(first)
    assert len(log.splitlines()) == 2
    found, expected = (timm_pudnet.load_hypernet(folder).state_dict() for folder in (tmp_path / 'out', trained[0]))
    assert_close(found, expected, rtol=0, atol=0)


BAD_RECIPES = {
    'missing': (None, ['no such recipe']),
    'no TOML': (lambda text: 'seed = ', ['recipe.toml']),
    'unknown key': (lambda text: text.replace('n_shot', 'n_shto'), ["'n_shto'", 'n_shot']),
    'wrong type': (lambda text: text.replace('n_shot = 2', 'n_shot = "two"'), ['n_shot', 'whole number', "'two'"]),
    'unknown class': (lambda text: text.replace('"pan"', '"pam"'), ["'pam'", 'pan']),
    'unknown architecture': (lambda text: text.replace('test_resnet', 'test_resnt'), ["'test_resnt'", 'test_resnet']),
    'transformer': (lambda text: text.replace('test_resnet', 'test_vit'), ['test_vit']),
    'seen and unseen': (lambda text: text.replace('classes =', 'unseen = ["pan"]\nclasses ='), ['pan', 'both']),
    'unknown unseen class': (lambda text: text.replace('classes =', 'unseen = ["pam"] #'), ["'pam'", 'unseen']),
    'one class a group': (lambda text: text.replace('n_way = 2', 'n_way = 1'), ['n_way', '1']),
    'too many images a class': (lambda text: text.replace('n_shot = 2', 'n_shot = 99'), ['26', '100']),
    'missing start': (lambda text: f'start = "nowhere"\n{text}', ['nowhere', 'test_resnet.TAG']),
    'no classifier': (  # told before the images are looked for
        lambda text: text.replace('test_resnet', 'blindspot_unet').replace('my shapes', 'my shpes'),
        ['blindspot_unet does not classify', '[denoising]'],
    ),
    'images that are too small': (
        lambda text: text.replace('test_resnet', 'convnet3').replace('16, 16', '6, 6').replace('my shapes', 'my shpes'),
        ['convnet3', '3x6x6', 'input_size'],
    ),
    'missing images': (lambda text: text.replace('my shapes', 'my shpes'), ['my shpes', 'no such folder']),
}


@pytest.mark.parametrize('case', BAD_RECIPES)
def test_a_bad_recipe_is_one_line_and_writes_nothing(case, shapes, tmp_path, nothing_written):
    change, needles = BAD_RECIPES[case]
    if change:
        (tmp_path / 'recipe.toml').write_text(change((shapes / 'recipe.toml').read_text()))
    with nothing_written(tmp_path):
        fails('train', tmp_path / 'recipe.toml', '--out', tmp_path / 'out', needles=needles)


@pytest.mark.parametrize(
    ('start', 'before', 'after', 'verdict'),
    [
        ('', 0.2, 0.5, 'It learns'),
        ('', 0.2, 0.22, 'It does not learn yet'),  # it may be chance
        ('', 0.8, 0.85, 'It learns'),
        ('', 1.0, 1.0, 'It learns'),
        ('earlier', 0.8, 0.79, 'It keeps what it starts with'),
        ('earlier', 0.8, 0.5, 'It loses what it starts with'),
    ],
)
def test_a_short_try_is_judged_by_its_start(start, before, after, verdict, shapes, trained, tmp_path, monkeypatch):
    text = (shapes / 'recipe.toml').read_text()
    (tmp_path / 'recipe.toml').write_text(f'start = {json.dumps(str(trained[0]))}\n{text}' if start else text)
    found = {'before': before, 'after': after, 'chance': 0.125, 'images': 10, 'seconds': 1.0, 'images_per_second': 10.0}
    found['whole_seconds'] = 9000.0
    found['gains'] = [after - before + 0.05 * (number % 2 - 0.5) for number in range(8)]
    monkeypatch.setattr('timm_pudnet.training.try_recipe', lambda *args, **kwargs: found)
    printed = succeeds('train', tmp_path / 'recipe.toml', '--short').stdout
    assert f'{verdict}; the whole recipe takes about 2.5 hours here, at 10 images/s' in printed


@pytest.mark.parametrize(('more', 'trainer'), [([], 'meta_train'), (['--plain'], 'train_plain')])
def test_a_training_that_is_stopped_says_how_to_go_on(more, trainer, shapes, tmp_path, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(f'timm_pudnet.training.{trainer}', stopped)
    words = ['train', shapes / 'recipe.toml', '--out', tmp_path / 'out', *more]
    result = CliRunner().invoke(main, [*map(str, words)])
    assert result.exit_code == 1
    assert 'Stopped: the same command goes on' in result.stderr
    assert not (tmp_path / 'out' / 'recipe.toml').exists()


def test_a_control_that_timm_s_format_cannot_hold_is_refused_before_training(shapes, tmp_path, nothing_written):
    text = (shapes / 'recipe.toml').read_text().replace('"test_resnet"', '"repvit_m0_9"')
    (tmp_path / 'recipe.toml').write_text(text)
    with nothing_written(tmp_path):
        line = ['repvit_m0_9', 'head', 'train_plain']
        fails('train', tmp_path / 'recipe.toml', '--out', tmp_path / 'out', '--plain', needles=line)


def test_bad_options_of_training_are_one_line(shapes, tmp_path, nothing_written, monkeypatch):
    (tmp_path / 'file').write_text('mine')
    recipe = shapes / 'recipe.toml'

    def refuse(*args, **kwargs):
        raise AssertionError('images were read before the arguments were checked')

    monkeypatch.setattr('timm_pudnet.training.load_banks', refuse)
    with nothing_written(tmp_path):
        fails('train', recipe, '--out', tmp_path / 'out', '--device', 'gpu', needles=['gpu'])
        for out in (tmp_path / 'file', tmp_path / 'file' / 'out'):
            fails('train', recipe, '--out', out, needles=[f'--out {out}', 'choose a folder'])
        fails('train', recipe, '--out', '', needles=['--out is empty'])
        fails('train', recipe, needles=['--out'])
        fails('train', recipe, '--short', '--out', tmp_path / 'out', needles=['--short', '--out'])
        fails('train', recipe, '--short', '--plain', needles=['--short', '--plain'])
        monkeypatch.setenv('WORLD_SIZE', '2')
        fails('train', recipe, '--short', needles=['--short', 'torchrun'])


def test_a_config_of_something_else_in_the_output_is_found_before_training(shapes, tmp_path, nothing_written):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'config.json').write_text('{}')
    with nothing_written(tmp_path):
        fails('train', shapes / 'recipe.toml', '--out', tmp_path / 'out', needles=['config.json', 'exists'])


def evaluation(*args):
    return ('evaluate', *args, '--groups', '3', '--n-shot', '3', '--n-query', '2')


def test_evaluation_is_of_unseen_classes_only_and_beside_the_control(trained, shapes, tmp_path):
    shutil.copytree(trained[0], tmp_path / 'hypernet')
    before = {path.name for path in (tmp_path / 'hypernet').iterdir()}
    data = shapes / 'my shapes'
    result = succeeds(*evaluation(tmp_path / 'hypernet', data, '--control', trained[0] / 'plain', '--save'))
    assert '52 images in 2 unseen classes: lid, mug' in result.stdout
    assert {path.name for path in (tmp_path / 'hypernet').iterdir()} == before | {'results.json', 'groups.json'}
    results = json.loads((tmp_path / 'hypernet' / 'results.json').read_text())
    assert (results['classes'], results['groups'], results['n_way'], results['n_shot']) == (list(UNSEEN), 3, 2, 3)
    assert {'predicted', 'swapped_sketch', 'mean_sketch', 'random_weights', 'raw_pixels', 'plain'} <= set(
        results['accuracy']
    )
    assert 'plain' in results['accuracy_ridge']
    cost = timm_pudnet.load_hypernet(trained[0]).config.training
    told = results['controls']['plain']
    assert [told[key] for key in ('images', 'recipe_digest')] == [cost[key] for key in ('images', 'recipe_digest')]
    assert 'Note' not in result.stdout
    assert re.search(r'\n  predicted( +[\d.]+ \+- [\d.]+){3}\n', result.stdout), result.stdout
    for arm, found in results['accuracy'].items():
        assert 0 <= found['mean'] <= 100, arm
    groups = timm_pudnet.evaluation.TestGroups.load(tmp_path / 'hypernet' / 'groups.json')
    assert groups.digest == results['groups_digest']
    digest = hashlib.sha256((tmp_path / 'hypernet' / 'model.safetensors').read_bytes()).hexdigest()
    assert results['weights_sha256'] == {'model.safetensors': digest}
    assert results['config_sha256'] == config_sha256(tmp_path / 'hypernet')
    assert (results['images'], results['split'], results['support_split']) == ('my shapes', None, None)
    assert str(tmp_path / 'hypernet' / 'results.json') in result.stdout


def test_a_folder_is_measured_itself_whatever_hypernetwork_has_its_name(trained, shapes, tmp_path, monkeypatch):
    shutil.copytree(trained[0], tmp_path / 'resnet18')
    monkeypatch.chdir(tmp_path)
    succeeds(*evaluation('resnet18', shapes / 'my shapes', '--save'))
    results = json.loads((tmp_path / 'resnet18' / 'results.json').read_text())
    assert results['hypernet'] == timm_pudnet.load_hypernet(trained[0]).name
    assert results['weights_sha256'] == weights_sha256(trained[0])


def test_evaluation_with_images_without_labels(trained, shapes, tmp_path):
    hypernet = shutil.copytree(trained[0], tmp_path / 'hypernet')
    line = (*evaluation(hypernet, shapes / 'my shapes'), '--n-unlabelled', '5', '--save', '--protocol', 'unlabelled')
    result = succeeds(*line, '--without', 'mean_sketch', '--without', 'random_weights')
    found = json.loads((hypernet / 'results.unlabelled.json').read_text())
    assert (found['n_unlabelled'], found['support_images']) == (5, 6)
    assert set(found['accuracy_self_training']) == {'predicted', 'swapped_sketch', 'raw_pixels'}
    for needle in ('and 5 images without', 'self-training', 'self_training_gain'):
        assert needle in result.stdout, needle
    groups = timm_pudnet.evaluation.TestGroups.load(hypernet / 'groups.unlabelled.json')
    assert (groups.digest, groups.n_unlabelled) == (found['groups_digest'], 5)
    fails(*line, '--without', 'mean', needles=['mean', 'mean_sketch'])
    fails(*evaluation(hypernet, shapes / 'my shapes'), '--n-unlabelled', '99', needles=['26 images', '104'])


@pytest.fixture(scope='module')
def splits(shapes, pictures, write_folder):
    """A folder with `train` and `test` of all five classes, for the timm dataset `torch/image_folder`."""
    for seed, split in enumerate(('train', 'test')):
        write_folder(shapes / 'splits' / split, *pictures(60, names=('cup', 'jar', 'pan', *UNSEEN), size=16, seed=seed))
    return shapes / 'splits'


@pytest.mark.filterwarnings('ignore::ResourceWarning')  # torchvision's reader leaves files to the garbage collector
@pytest.mark.parametrize('n_shot', ['3', 'all'])
def test_support_from_another_split_conditions_another_domain_and_scratch(n_shot, trained, shapes, splits, tmp_path):
    hypernet = shutil.copytree(trained[0], tmp_path / 'hypernet')
    before = {path.name for path in hypernet.iterdir()}
    data = ('torch/image_folder', '--data-dir', splits, '--support-split', 'train', '--other', shapes / 'my shapes')
    more = ('--n-shot', n_shot, '--conditions', '--scratch', '2', '--scratch-epochs', '2', '--save')
    result = succeeds(*evaluation(hypernet, *data), *more, '--protocol', 'hard-1')
    assert {path.name for path in hypernet.iterdir()} == before | {'results.hard-1.json', 'groups.hard-1.json'}
    found = json.loads((hypernet / 'results.hard-1.json').read_text())
    groups = timm_pudnet.evaluation.TestGroups.load(hypernet / 'groups.hard-1.json')
    assert groups.digest == found['groups_digest']
    assert len(groups.conditions) == 3
    assert found['conditions']
    assert found['separate_support']
    assert (found['n_shot'], found['support_images']) == ((3, 6) if n_shot == '3' else ('all', 24))
    assert {'other_domain_sketch', 'swapped_sketch'} <= set(found['accuracy'])
    assert 'conditioning_gain_over_other_domain' in found
    assert (found['scratch']['groups'], found['scratch']['epochs'], found['scratch']['training_images']) == (2, 2, 24)
    for needle in ('24 images of these classes in split train', '130 images of', 'ridge', 'from scratch', 'adam'):
        assert needle in result.stdout, needle


def test_the_root_of_no_other_set_is_refused(trained, shapes):
    line = evaluation(trained[0], shapes / 'my shapes')
    needles = ['--other-data-dir', 'timm dataset that --other names']
    fails(*line, '--other-data-dir', shapes, needles=needles)
    fails(*line, '--other-data-dir', shapes, '--other', shapes / 'my shapes', needles=needles)


def test_the_split_of_another_set_is_no_split_of_a_folder(trained, shapes, splits):
    line = (*evaluation(trained[0], shapes / 'my shapes'), '--split', 'train')
    fails(*line, needles=['--split', str(shapes / 'my shapes')])
    fails(*line, '--other', shapes / 'my shapes', needles=['--split', str(shapes / 'my shapes')])
    assert 'Other      ' in succeeds(*line, '--other', 'torch/image_folder', '--other-data-dir', splits).stdout


@pytest.mark.parametrize('command', ['predict', 'evaluate', 'finetune', 'compare', 'train'])
def test_a_root_beside_a_folder_is_refused(command, trained, shapes, tmp_path, nothing_written):
    images = shapes / 'my shapes'
    line = {
        'predict': ['test_resnet', images, '--hypernet', trained[0]],
        'evaluate': [trained[0], images],
        'finetune': ['test_resnet', images, '--hypernet', trained[0], '--out', tmp_path / 'tuned'],
        'compare': ['test_resnet', images, '--hypernet', trained[0], '--out', tmp_path / 'compared'],
        'train': [shapes / 'recipe.toml', '--short'],
    }[command]
    with nothing_written(tmp_path):
        fails(command, *line, '--data-dir', shapes, needles=['--data-dir', str(images), 'leave it out'])


def test_a_hypernetwork_of_denoisers_is_not_evaluated_on_classes(shapes, tmp_path):
    kwargs = {'width': 4, 'depth': 2}
    made = timm_pudnet.PudNet.for_target('blindspot_unet', model_kwargs=kwargs, generator='residual', sketch_width=8)
    made.save_pretrained(tmp_path / 'denoiser')
    fails(*evaluation(tmp_path / 'denoiser', shapes / 'my shapes'), needles=['blindspot_unet', 'hub/denoising.py'])


def test_one_group_is_enough(trained, shapes):
    assert 'Wilson' in succeeds(*evaluation(trained[0], shapes / 'my shapes'), '--groups', '1').stdout


def test_the_seed_of_an_evaluation_draws_its_groups(trained, shapes, tmp_path):
    found = []
    for seed in (0, 0, 1):
        hypernet = shutil.copytree(trained[0], tmp_path / f'{len(found)}')
        succeeds(*evaluation(hypernet, shapes / 'my shapes', '--save', '--seed', seed))
        found.append(json.loads((hypernet / 'results.json').read_text())['groups_digest'])
    assert found[0] == found[1] != found[2]


def test_evaluation_writes_nothing_unasked(trained, shapes, nothing_written):
    with nothing_written(shapes):
        succeeds(*evaluation(trained[0], shapes / 'my shapes'))


def test_evaluation_refuses_where_no_classes_are_unseen(trained, shapes, tmp_path, nothing_written):
    for name in ('cup', 'jar', 'lid'):
        shutil.copytree(shapes / 'my shapes' / name, tmp_path / 'seen' / name)
    with nothing_written(trained[0]):
        save = '--save'
        fails(*evaluation(trained[0], tmp_path / 'seen', save), needles=[': 1 classes', 'test_resnet.shapes', 'two'])
        shutil.rmtree(tmp_path / 'seen' / 'lid')
        fails(*evaluation(trained[0], tmp_path / 'seen', save), needles=[': 0 classes', 'test_resnet.shapes', 'two'])
        needles = ['labelled images are needed', 'test_resnet.shapes']
        fails(*evaluation(trained[0], tmp_path / 'seen' / 'cup', save), needles=needles)


BAD_EVALUATIONS = {
    'no group': (['--groups', '0'], ['--groups must be at least 1']),
    'groups in words': (['--groups', 'many'], ['groups', 'many']),
    'too many classes': (['--n-way', '3'], ['n_way', 'from 2 to 2', 'got 3']),
    'one class': (['--n-way', '1'], ['n_way', 'got 1']),
    'no class': (['--n-way', '0'], ['n_way', 'got 0']),
    'no shot': (['--n-shot', '0'], ['n_shot must be a whole number, at least 1']),
    'no query': (['--n-query', '0'], ['n_query must be a whole number, at least 1']),
    'negative shot': (['--n-shot', '-1'], ['-1']),
    'too many images': (['--n-shot', '30'], ['26 images']),
    'missing control': (['--control', 'nowhere'], ['nowhere']),
    'bad device': (['--device', 'gpu'], ['gpu']),
    'shots in words': (['--n-shot', 'many'], ['--n-shot', "'many'", 'all']),
    'all without a support split': (['--n-shot', 'all'], ['--n-shot all', '--support-split']),
    'the tested split': (['--support-split', 'test'], ['--support-split test']),
    'a folder has no splits': (['--support-split', 'train'], ['my shapes', 'torch/image_folder']),
    'scratch without a support split': (['--scratch', '2'], ['--scratch', '--support-split']),
    'more scratch than groups': (['--scratch', '4'], ['--scratch', '0-3', '4']),
    'negative scratch': (['--scratch', '-1'], ['--scratch', '-1']),
    'no epochs': (['--scratch-epochs', '0'], ['--scratch-epochs', '0']),
    'epochs of nothing': (['--scratch-epochs', '5'], ['--scratch-epochs', 'add --scratch']),
    'missing other': (['--other', 'nowhere'], ['nowhere']),
    'a path as protocol': (['--protocol', '../mine'], ['--protocol ../mine']),
}


@pytest.mark.parametrize('case', BAD_EVALUATIONS)
def test_bad_options_of_evaluation_are_one_line_and_write_nothing(case, trained, shapes, nothing_written):
    more, needles = BAD_EVALUATIONS[case]
    with nothing_written(trained[0]):
        fails(*evaluation(trained[0], shapes / 'my shapes', '--save'), *more, needles=needles)


def test_a_name_for_nothing_that_is_saved_is_refused(trained, shapes):
    fails(*evaluation(trained[0], shapes / 'my shapes', '--protocol', 'mine'), needles=['--protocol mine', '--save'])


def test_a_control_that_is_no_timm_model_is_one_line(trained, shapes, tmp_path, nothing_written):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'text').mkdir()
    (tmp_path / 'text' / 'config.json').write_text('no JSON')
    shutil.copytree(trained[0] / 'plain', tmp_path / 'cut')
    shutil.copy(trained[0] / 'plain.whitening.safetensors', tmp_path / 'cut.whitening.safetensors')
    (tmp_path / 'cut' / 'model.safetensors').write_bytes(b'')
    with nothing_written(trained[0]):
        for name in ('empty', 'text', 'cut'):
            control = ('--control', tmp_path / name)
            fails(*evaluation(trained[0], shapes / 'my shapes', '--save', *control), needles=[tmp_path / name])


def test_a_control_that_was_trained_on_a_tested_class_is_refused(trained, shapes, tmp_path):
    shutil.copytree(trained[0] / 'plain', tmp_path / 'plain')
    seen = tmp_path / 'plain.whitening.safetensors'
    save_file(load_file(trained[0] / 'plain.whitening.safetensors'), seen, {'classes': json.dumps(['cup', 'mug'])})
    fails(*evaluation(trained[0], shapes / 'my shapes', '--control', tmp_path / 'plain'), needles=["'mug'", 'plain'])


@pytest.mark.parametrize(('training', 'told'), [({'images': 5}, True), ({'images': 12}, False), (None, False)])
def test_a_control_of_fewer_images_is_told(training, told, trained, shapes, tmp_path):
    hypernet = shutil.copytree(trained[0], tmp_path / 'hypernet')
    beside = hypernet / 'plain.whitening.safetensors'
    more = {} if training is None else {'training': json.dumps(training)}  # as an earlier version did
    save_file(load_file(beside), beside, {'classes': '["cup"]', **more})
    line = evaluation(hypernet, shapes / 'my shapes', '--control', hypernet / 'plain', '--save')
    printed = succeeds(*line).stdout
    lines = [line for line in printed.splitlines() if 'control plain saw' in line]
    assert [line.split('control')[1] for line in lines] == [
        ' plain saw 5 images in training, test_resnet.shapes saw 12'
    ] * told
    assert json.loads((hypernet / 'results.json').read_text())['controls'] == {'plain': training or {}}


def test_a_seen_class_that_is_spelled_otherwise_is_seen(trained, shapes, tmp_path):
    images = tmp_path / 'images'
    for name, called in (('cup', 'C_u p'), ('jar', 'jar'), ('pan', 'j-ar'), ('lid', 'lid'), ('mug', 'mug')):
        shutil.copytree(shapes / 'my shapes' / name, images / called)
    printed = succeeds(*evaluation(trained[0], images)).stdout
    assert 'left out as classes that test_resnet.shapes was trained on: C_u p (cup)\n' in printed
    assert '3 unseen classes: j-ar, lid, mug' in printed  # beside `jar`: the set tells them apart
    control = shutil.copytree(trained[0] / 'plain', tmp_path / 'plain')
    whitening = load_file(trained[0] / 'plain.whitening.safetensors')
    save_file(whitening, tmp_path / 'plain.whitening.safetensors', {'classes': '["M-ug"]'})
    fails(*evaluation(trained[0], images, '--control', control), needles=["'mug' ('M-ug' there)", control])


def test_what_training_names_as_the_next_command_can_be_run(trained, shapes, tmp_path):
    """With the root of a timm dataset that another set of the recipe has, and where no class is left to test on."""
    second = ('[data]', '[[data]]'), ('[groups]', '[[data]]\nimages = "torch/image_folder"\nshare = 0.5\n\n[groups]')
    text = (shapes / 'recipe.toml').read_text()
    for old, new in second:
        text = text.replace(old, new)
    (tmp_path / 'two.toml').write_text(text)
    root = tmp_path / 'root'
    shutil.copytree(shapes / 'my shapes' / 'cup', root / 'train' / 'bowl')
    shutil.copytree(shapes / 'my shapes' / 'jar', root / 'train' / 'can')
    printed = succeeds('train', tmp_path / 'two.toml', '--out', tmp_path / 'two', '--data-dir', root).stdout
    words = shlex.split(printed.partition(':\n')[2].strip().splitlines()[-1])
    assert words[:2] == ['timm-pudnet', 'evaluate']
    assert words[3:] == [str(shapes / 'my shapes')]
    (tmp_path / 'all.toml').write_text(
        (shapes / 'recipe.toml').read_text().replace('classes = ["cup", "jar", "pan"]', '')
    )
    printed = succeeds('train', tmp_path / 'all.toml', '--out', tmp_path / 'all').stdout
    assert 'IMAGES_OF_OTHER_CLASSES' in printed


@pytest.mark.parametrize(
    ('images', 'split', 'told'),
    [
        ('torch/cifar100', 'train', None),  # its split test has the unseen classes too
        ('torch/imagenet', 'val', 'val'),
        ('hfds/org/name', 'train', 'train'),
        ('torch/image_folder', 'train', None),
        ('torch/image_folder', 'test', None),
        ('torch/folder', 'my split', 'my split'),
    ],
)
def test_the_next_command_names_the_split_where_there_may_be_no_test(images, split, told, tmp_path):
    root = tmp_path / 'root'
    (root / ('test' if told is None else 'val')).mkdir(parents=True)
    data = {'images': images, 'split': split, 'data_dir': str(root), 'unseen': ['cup', 'jar']}
    recipe = timm_pudnet.Recipe.from_dict({'hypernet': {'model_name': 'test_resnet'}, 'data': data})
    room = importlib.import_module('timm_pudnet.cli.train')
    words = shlex.split(room._next_command(recipe, tmp_path / 'out', plain=False, data_dir=None))
    assert words[3:] == [images, '--data-dir', str(root), *([] if told is None else ['--split', told])]


def test_two_controls_of_one_name_are_refused(trained, shapes, tmp_path):
    shutil.copytree(trained[0] / 'plain', tmp_path / 'other' / 'plain')
    controls = ('--control', trained[0] / 'plain', '--control', tmp_path / 'other' / 'plain')
    fails(*evaluation(trained[0], shapes / 'my shapes', *controls), needles=['plain'])


def test_saving_needs_a_folder(trained, shapes, monkeypatch):
    monkeypatch.setattr(hub, 'embedded', lambda: {'test_resnet.shapes': trained[0]})
    succeeds(*evaluation('test_resnet.shapes', shapes / 'my shapes'))
    fails(*evaluation('test_resnet.shapes', shapes / 'my shapes', '--save'), needles=['--save', 'folder'])


def no_space(*args):
    raise OSError(28, 'No space left on device')


def test_a_full_disk_in_evaluation_and_training_is_one_line(
    trained, shapes, tmp_path, full_disk, nothing_written, monkeypatch
):
    hypernet = shutil.copytree(trained[0], tmp_path / 'hypernet')
    with nothing_written(tmp_path), full_disk(16):
        fails(*evaluation(hypernet, shapes / 'my shapes', '--save'))
    succeeds(*evaluation(hypernet, shapes / 'my shapes', '--save'))
    with nothing_written(tmp_path), monkeypatch.context() as patch:  # the second of the two files does not fit
        patch.setattr(TestGroups, 'save', no_space)
        fails(*evaluation(hypernet, shapes / 'my shapes', '--save', '--seed', '1'), needles=['No space left'])
    with full_disk():
        fails('train', shapes / 'recipe.toml', '--out', tmp_path / 'out')
    left = [path.name for path in (tmp_path / 'out').rglob('*') if path.is_file() and path.parent.name != 'board']
    assert not left, 'a half-written checkpoint stays'


# finetune and compare


def test_finetune_says_what_it_found_and_did_and_wrote(images, work, tiny_folder):
    out = succeeds(
        'finetune', 'test_resnet', images, '--hypernet', tiny_folder, '--out', 'tuned', '--epochs', '3'
    ).stdout
    for needle in ('24 images in 3 classes', 'cup, jar, pan', 'Kept aside 6', '18 are trained on', 'for few images'):
        assert needle in out
    assert re.search(r'Trained +3 epochs in \d+ s; kept: the model (after epoch [123]|as it was)', out)
    assert re.search(r'Accuracy +[\d.]+% on the images kept aside \(\d of 6; 95 % interval .*% before\)', out)
    model = timm.create_model('local-dir:tuned', pretrained=True)
    assert tuple(model.pretrained_cfg['label_names']) == ('cup', 'jar', 'pan')
    # what was written is a start again, with its head
    out = succeeds('finetune', 'tuned', images, '--out', 'again', '--epochs', '1', '--mode', 'full').stdout
    assert '% before' in out
    assert 'as for many images' in out
    assert sorted(path.name for path in work.iterdir()) == ['again', 'tuned']


def test_finetune_interrupted_keeps_the_best_so_far(images, work, tiny_folder, monkeypatch):
    room = importlib.import_module('timm_pudnet.training.finetune')
    work_of = room.timm_augmented
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return work_of(*args)

    monkeypatch.setattr(room, 'timm_augmented', interrupted)
    result = succeeds('finetune', 'test_resnet', images, '--hypernet', tiny_folder, '--out', 'tuned')
    assert 'Interrupted after 3 of 30 epochs' in result.stderr
    assert timm.create_model('local-dir:tuned', pretrained=True).num_classes == 3


def test_finetune_interrupted_at_once_writes_nothing(images, work, tiny_folder, monkeypatch, nothing_written):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module('timm_pudnet.training.finetune'), '_fit_head', interrupted)
    with nothing_written(work.parent):
        result = CliRunner().invoke(
            main, ['finetune', 'test_resnet', str(images), '--hypernet', str(tiny_folder), '--out', 'tuned']
        )
    assert result.exit_code == 1
    assert 'Aborted' in result.stderr


def test_compare_prints_a_table_and_keeps_table_numbers_and_plot(images, work, tiny_folder):
    pytest.importorskip('matplotlib')
    line = ('compare', 'test_resnet', images, '--hypernet', tiny_folder, '--epochs', 2, '--pretrained', 'none')
    out = succeeds(*line, '--out', 'found').stdout
    for needle in ('6 images tested, 18 others', 'predicted, fine-tuned', 'from scratch, Adam', 'as good as predicted'):
        assert needle in out
    assert sorted(path.name for path in (work / 'found').iterdir()) == ['compare.json', 'compare.png', 'compare.txt']
    result = json.loads((work / 'found' / 'compare.json').read_text())
    assert [point['epoch'] for point in result['arms']['fine_tuned']] == [0, 1, 2]
    assert (work / 'found' / 'compare.txt').read_text().strip() in out
    assert 'add --out' in succeeds(*line).stdout


def test_compare_interrupted_has_on_disk_what_was_measured(images, work, tiny_folder, monkeypatch):
    room = importlib.import_module('timm_pudnet.evaluation.compare')
    on_disk = []

    def interrupted(*args, **kwargs):
        on_disk.append(json.loads((work / 'found' / 'compare.json').read_text()))
        raise KeyboardInterrupt

    monkeypatch.setattr(room, 'train_from_scratch', interrupted)
    line = ('compare', 'test_resnet', images, '--hypernet', tiny_folder, '--epochs', 2, '--pretrained', 'none')
    out = succeeds(*line, '--out', 'found').stdout
    assert list(on_disk[0]['arms']) == ['predicted', 'fine_tuned']
    assert on_disk[0]['ended'] == 'running'
    assert 'Ended early by the interrupt' in out
    assert 'from scratch, Adam          left out: interrupted before' in out
    assert json.loads((work / 'found' / 'compare.json').read_text())['ended'] == 'interrupt'


@pytest.mark.parametrize('command', ['finetune', 'compare'])
def test_tuning_and_comparing_refuse_what_exists_before_any_work(command, images, work, no_work_yet, nothing_written):
    (work / 'there').mkdir()
    (work / 'there' / 'file').touch()
    with nothing_written(work.parent):
        fails(command, 'test_resnet', images, '--out', 'there', needles=['there exists', 'another output folder'])
        fails(command, 'test_resnet', images, '--out', 'no/where', needles=['no is not there'])


@pytest.mark.parametrize(
    ('arguments', 'needles'),
    [
        (('finetune', '--epochs', '0'), ['epochs', '0']),
        (('finetune', '--holdout', '1'), ['holdout', '1']),
        (('finetune', '--layer-decay', '0'), ['layer_decay']),
        (('finetune', '--rate', '-1'), ['rate']),
        (('finetune', '--batch-size', '0'), ['batch_size']),
        (('finetune', '--device', 'gpu'), ['gpu']),
        (('compare', '--device', 'gpu'), ['gpu']),
        (('compare', '--budget', '0'), ['budget']),
        (('compare', '--holdout', '0'), ['holdout']),
        (('compare', '--pretrained', 'resnet81'), ['resnet81']),
    ],
)
def test_bad_options_of_tuning_and_comparing_are_one_line(
    arguments, needles, images, work, tiny_folder, nothing_written
):
    command, *options = arguments
    with nothing_written(work.parent):
        fails(command, 'test_resnet', images, '--hypernet', tiny_folder, '--out', 'out', *options, needles=needles)


@pytest.mark.parametrize('command', ['finetune', 'compare'])
def test_images_without_labels_cannot_be_learned_from(
    command, work, tiny_folder, pictures, write_folder, nothing_written
):
    write_folder(work / 'flat', pictures(6)[0])
    with nothing_written(work.parent):
        fails(command, 'test_resnet', 'flat', '--hypernet', tiny_folder, '--out', 'out', needles=['labelled', 'flat'])


# The rest


def test_list_names_every_hypernetwork_at_hand(tiny_folder, monkeypatch):
    monkeypatch.setattr(hub, 'embedded', lambda: {'test_resnet.tiny': tiny_folder})
    (line,) = succeeds('list').stdout.splitlines()
    for needle in ('test_resnet.tiny', '2 classes', '(3, 32, 32)'):
        assert needle in line


def test_an_embedded_hypernetwork_serves_its_architecture(tiny_folder, monkeypatch, images, work):
    monkeypatch.setattr(hub, 'embedded', lambda: {'test_resnet.tiny': tiny_folder})
    for more in ((), ('--hypernet', 'test_resnet.tiny'), ('--hypernet', 'test_resnet')):
        assert 'with test_resnet.tiny' in succeeds('predict', 'test_resnet', images, *more).stdout
    fails('predict', 'test_resnet', images, '--hypernet', 'test_resnet.tyni', needles=['Did you mean test_resnet.tiny'])


def test_the_version_is_the_package_s():
    assert succeeds('--version').stdout.strip().endswith(timm_pudnet.__version__)


def test_help_of_every_command_explains_every_option():
    assert set(main.commands) >= {'predict', 'train', 'evaluate', 'list'}
    text = succeeds('--help').stdout
    for name, command in main.commands.items():
        assert name in text
        page = succeeds(name, '--help').stdout
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f'{name} {parameter.opts}'
                assert parameter.opts[0] in page


def test_an_unknown_command_is_named():
    fails('predcit', needles=["'predcit'"])


def test_the_readme_names_commands_and_options_that_exist():
    readme = (Path(timm_pudnet.__file__).parents[1] / 'README.md').read_text()
    lines = re.findall(r'^    .*?(timm-pudnet .*?)(?:  +#.*)?$', readme, re.MULTILINE)
    assert len(lines) > 3
    for line in lines:
        _, name, *words = shlex.split(line)
        known = {opt for parameter in main.commands[name].params for opt in parameter.opts}
        assert {word for word in words if word.startswith('--')} <= known, line


def test_the_readme_s_python_runs_and_its_recipe_is_one(work):
    root = Path(timm_pudnet.__file__).parents[1]
    readme = (root / 'README.md').read_text(encoding='utf-8')
    (work / 'examples').mkdir()
    for name in ('examples/fashion', 'labelled', 'the-rest'):
        (work / name).symlink_to(root / 'examples' / 'fashion')
    paths = sorted((root / 'examples/fashion/Bag').glob('*.png'))[:2]
    (work / 'noisy').mkdir()
    shutil.copy(paths[0], work / 'noisy' / 'a.png')
    scope = {'folders': ['labelled'], 'paths': paths, 'labels': ['bag', 'box']}
    blocks = re.findall(r'^```python\n(.*?)^```', readme, re.MULTILINE | re.DOTALL)
    here = [code for code in blocks if not re.search(r'org/|cuda\(\)|a1_in1k|meta_train', code)]  # the Hub, a GPU, ...
    assert len(here) == 7
    for code in here:
        exec(code.replace('fashion-model', 'my-model'), scope)
    assert len(scope['answers']) == 2
    base, changed = map(tomllib.loads, re.findall(r'^```toml\n(.*?)^```', readme, re.MULTILINE | re.DOTALL))
    assert timm_pudnet.Recipe.from_dict(base).data[0].unseen == ('jar', 'vase')
    assert timm_pudnet.Recipe.from_dict({**base, **changed}).start == 'my-base/plain'


def test_the_script_of_the_package_is_this_command():
    pyproject = Path(timm_pudnet.__file__).parents[1] / 'pyproject.toml'
    assert tomllib.loads(pyproject.read_text())['project']['scripts'] == {'timm-pudnet': 'timm_pudnet.cli:main'}


# With the hypernetwork that ships


def test_the_first_line_of_the_readme_reaches_85_percent(work):
    root = Path(timm_pudnet.__file__).parents[1]
    if not (root / 'hub' / 'resnet18.fashion_set' / 'model.safetensors').is_file():
        pytest.fail('hub/resnet18.fashion_set has no model.safetensors: train it by its recipe', pytrace=False)
    result = succeeds('predict', 'resnet18', root / 'examples' / 'fashion', '--out', 'fashion-model')
    assert '240 images in 4 classes' in result.stdout
    found = re.search(r'Accuracy +([\d.]+)% .*\((\d+) of (\d+);', result.stdout)
    assert float(found[1]) > 85, result.stdout
    assert int(found[3]) == 60
    assert timm.create_model('local-dir:fashion-model', pretrained=True).num_classes == 4


# Plans and what is known of hypernetworks


def test_info_shows_the_plan_of_an_architecture():
    text = succeeds('info', 'test_resnet', '--generator', 'residual', '--sketch-width', '16').output
    for needle in (
        '372,688 weights',
        '15 predicted',
        '99.4% predicted',
        'residual:',
        'MB of memory',
        'ms on this machine',
    ):
        assert needle in text, (needle, text)
    text = succeeds('info', 'convnext_tiny', '--model-kwargs', 'conv_mlp=true', '--generator', 'residual').output
    of_python = succeeds('info', 'convnext_tiny', '--model-kwargs', 'conv_mlp=True', '--generator', 'residual').output
    assert of_python.splitlines()[:4] == text.splitlines()[:4]
    fails('info', 'convnext_tiny', '--model-kwargs', 'conv_mlp=False', needles=['convnext_tiny', 'conv_mlp=True'])
    assert '% predicted' in text
    assert '% shared' in succeeds('info', 'convnext_atto', '--min-predicted', '0', '--generator', 'residual').output


def test_info_says_how_much_of_the_weights_the_sketch_changes():
    def share(*words):
        text = succeeds('info', 'test_resnet', *words).output
        return float(re.search(r'([\d.]+)% of the predicted ones change with the sketch', text)[1])

    assert share('--generator', 'paper') == 100
    plan = plan_hypernet('test_resnet', generator='residual', generator_kwargs={'largest': 1000})
    steered = [layer.numel for layer in plan.target.layers if math.prod(layer.kernel[:2]) <= 1000]
    assert 0 < plan.steered == sum(steered) < plan.target.numel('predicted')
    net = PudNet(plan.config)
    with torch.no_grad():
        for generator in net.generators:
            for parameter in generator.parameters():
                parameter.add_(torch.randn_like(parameter))
    one, other = net(torch.randn(plan.config.sketch_width)), net(torch.randn(plan.config.sketch_width))
    changed = [layer.numel for layer in plan.target.layers if not torch.equal(one[layer.key], other[layer.key])]
    assert sum(changed) == plan.steered


def test_a_folder_of_something_else_does_not_hide_an_architecture(tmp_path, monkeypatch):
    (tmp_path / 'test_resnet').mkdir()
    monkeypatch.chdir(tmp_path)
    assert 'weights' in succeeds('info', 'test_resnet').output


@pytest.mark.parametrize('seed', ['-1', '99999999999999999999'])
def test_a_seed_out_of_range_is_one_line(images, seed):
    fails('predict', 'resnet18', images, '--seed', seed, needles=['--seed', seed])


def test_the_lines_that_load_a_model_of_ours_import_us(images, tmp_path, fresh_process):
    convnet3 = timm_pudnet.PudNet.for_target('convnet3', sketch_width=8, generator='residual')
    convnet3.save_pretrained(tmp_path / 'net')
    printed = succeeds('predict', 'convnet3', images, '--hypernet', tmp_path / 'net', '--out', tmp_path / 'out').stdout
    lines = printed.partition('Next, in Python')[2].partition(':\n')[2].partition('Report')[0]
    code, _, errors = fresh_process('-c', textwrap.dedent(lines.strip('\n')))
    assert code == 0, errors


def test_info_takes_the_name_of_timm_s_weights_for_no_hypernetwork():
    fails('info', 'resnet50.a1_in1k', needles=['without a tag (resnet50)'])


def test_the_line_after_a_pull_names_what_was_pulled_beside_a_folder_of_that_name(tiny_folder, work, monkeypatch):
    monkeypatch.setattr('timm_pudnet.hub.pull', lambda name: tiny_folder)
    assert succeeds('pull', 'org/one').stdout.strip().endswith('--hypernet org/one')
    (work / 'org' / 'one').mkdir(parents=True)
    assert succeeds('pull', 'org/one').stdout.strip().endswith('--hypernet hf-hub:org/one')


def test_info_tells_what_a_hypernetwork_is(tiny_folder):
    text = succeeds('info', tiny_folder).output
    size = (tiny_folder / 'model.safetensors').stat().st_size
    needles = ('test_resnet', '3x32x32', 'not measured', 'weights without the classifier')
    for needle in (*needles, f'a file of {size / 1e6:.0f} MB;'):
        assert needle in text, (needle, text)
    assert 'resnet18.fashion_set' in succeeds('info', 'resnet18.fashion_set').output


@pytest.mark.parametrize(
    ('change', 'needles'),
    [
        ({'model_name': 'resnet18', 'model_kwargs': {'layers': [2000] * 4}}, ['modules', 'refused']),
        ({'generator_kwargs': {'embed_kernels': 10**10}}, ['config.json']),
        ({'generator_kwargs': {'\x1b[2J': 1}}, ['config.json']),
    ],
    ids=str,
)
def test_info_builds_nothing_that_the_weights_do_not_fill(change, needles, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / 'bent')
    path = tmp_path / 'bent' / 'config.json'
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, 'training': {'a': '\x1b[2J'}}))
    printed = succeeds('info', tmp_path / 'bent').stdout
    assert all(line.isprintable() for line in printed.splitlines())
    path.write_text(json.dumps({**config, **change}))
    result = fails('info', tmp_path / 'bent', needles=needles)
    assert '\x1b' not in result.stderr


@pytest.mark.parametrize(
    ('words', 'needles'),
    [
        (['resnet81'], ["'resnet81'", 'resnet18']),
        (['resnet18.nothing'], ['resnet18.nothing']),
        (['resnet18.mixed', '--generator', 'paper'], ['--generator', 'resnet18.mixed']),
        (['convnext_tiny'], ['convnext_tiny', 'conv_mlp=True']),
        (['resnet18', '--model-kwargs', 'depth'], ['depth', 'KEY=VALUE']),
        (['resnet18', '--model-kwargs', 'depth=3'], ['resnet18', 'depth']),
        (['resnet18', '--model-kwargs', 'features_only=true'], ['features_only']),
        (['resnet18', '--model-kwargs', 'predict_linear=true'], ['predict_linear', 'leave it out']),
        (['vit_tiny_patch16_224', '--min-predicted', '1.5'], ['min_predicted', '1.5']),
        (['resnet18', '--generator', 'papr'], ["'papr'", 'paper']),
        (['resnet18', '--sketch-width', '0'], ['sketch_width', '0']),
    ],
)
def test_info_says_what_is_wrong_in_one_line(words, needles):
    fails('info', *words, needles=needles)


def test_a_tuned_model_is_saved_before_a_closed_pipe_is_noticed(trained, shapes, tmp_path, monkeypatch):
    echo = click.echo

    def closed(message=None, *args, **kwargs):
        if str(message).startswith('Trained'):
            raise BrokenPipeError(errno.EPIPE, 'Broken pipe')
        echo(message, *args, **kwargs)

    monkeypatch.setattr(click, 'echo', closed)
    words = ['finetune', 'test_resnet', shapes / 'my shapes', '--hypernet', trained[0], '--epochs', 1]
    CliRunner().invoke(main, [*map(str, words), '--out', str(tmp_path / 'tuned')])
    assert (tmp_path / 'tuned' / 'model.safetensors').is_file()


@pytest.mark.parametrize('stream', [False, True])
def test_of_many_unlabelled_images_some_tell_how_familiar_they_are(trained, pictures, monkeypatch, stream):
    from timm_pudnet.cli import predict as room

    class Seen:
        def distance(self, sketch):
            return float(sketch.norm())

        def familiarity(self, distance, count):
            self.count = count
            return 'like'

    monkeypatch.setattr(room, 'MOST_IMAGES', 8)
    network = timm_pudnet.load_hypernet(trained[0])
    pixels = torch.from_numpy(pictures(20, size=16)[0])
    images = (
        torch.utils.data.DataLoader([(image.permute(2, 0, 1), -1) for image in pixels], 4) if stream else pixels.numpy()
    )
    used, seen = timm_pudnet.open_images(images, input=network.config.input), Seen()
    model = timm.create_model('test_resnet', num_classes=0)
    room._expect(seen, network, model, used, 'none')
    assert seen.count == 8


def test_of_a_control_of_as_many_images_nothing_is_said(trained, shapes, tmp_path):
    hypernet = shutil.copytree(trained[0], tmp_path / 'hypernet')
    beside = hypernet / 'plain.whitening.safetensors'
    save_file(load_file(beside), beside, {'classes': '["cup"]', 'training': json.dumps({'images': 12})})
    printed = succeeds(*evaluation(hypernet, shapes / 'my shapes', '--control', hypernet / 'plain')).stdout
    assert 'control plain saw' not in printed
