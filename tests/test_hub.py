"""hub.py: which hypernetwork serves a name."""

import dataclasses
import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from torch.testing import assert_close

import timm_pudnet
from timm_pudnet import (
    DamagedFileError,
    InputError,
    NotFoundError,
    PudNet,
    PudNetError,
    Recipe,
    UnsupportedTargetError,
    describe_hypernet,
    hub,
    list_hypernets,
    load_hypernet,
    predict_model,
    push,
    remote,
    save_model,
)
from timm_pudnet.config import HubError
from timm_pudnet.evaluation import TestGroups
from timm_pudnet.files import config_sha256, weights_sha256
from timm_pudnet.hub import hypernet_card, hypernet_files, model_files, resolve_hypernet

UNSEEN = {'Shirt', 'Sneaker', 'Bag', 'Ankle boot'}


@pytest.fixture
def shelf(tmp_path, tiny_folder, monkeypatch):
    """Two hypernetworks at hand, `test_resnet.tiny` and `test_resnet2.other`; gives the folder that holds them."""
    for name in ('test_resnet.tiny', 'test_resnet2.other'):
        shutil.copytree(tiny_folder, tmp_path / 'shelf' / name)
    (tmp_path / 'shelf' / 'test_efficientnet.untrained').mkdir()  # holds no more than a recipe
    (tmp_path / 'shelf' / 'test_efficientnet.untrained' / 'recipe.toml').write_text('seed = 0\n')
    monkeypatch.setattr(hub, '_shelves', lambda: [tmp_path / 'shelf'])
    monkeypatch.chdir(tmp_path)
    return tmp_path / 'shelf'


def state_of(hypernet):
    return {key: value.clone() for key, value in hypernet.state_dict().items()}


def test_a_hypernetwork_is_loaded_by_folder_by_name_and_by_architecture(shelf, tiny_folder):
    expected = state_of(PudNet.from_pretrained(tiny_folder))
    for name in (tiny_folder, str(tiny_folder), 'shelf/test_resnet.tiny', 'test_resnet.tiny', 'test_resnet'):
        hypernet = load_hypernet(name)
        assert (hypernet.name, hypernet.training) == ('test_resnet.tiny', False)
        assert_close(state_of(hypernet), expected, rtol=0, atol=0)


def test_the_name_of_one_that_ships_is_told_who_takes_it(shelf, one_line):
    with pytest.raises(NotFoundError) as error:
        PudNet.from_pretrained('test_resnet.tiny')
    one_line(error, 'test_resnet.tiny: no such folder', 'timm_pudnet.load_hypernet')


def test_those_at_hand_are_listed_with_their_configs(shelf):
    found = list_hypernets()
    assert list(found) == ['test_resnet.tiny', 'test_resnet2.other']
    assert found['test_resnet.tiny'].config.class_names == ('ball', 'hat')
    assert {(info.model_name, info.where) for info in found.values()} == {('test_resnet', 'embedded')}
    assert found['test_resnet.tiny'].size == (shelf / 'test_resnet.tiny' / 'model.safetensors').stat().st_size
    assert found['test_resnet.tiny'].accuracy is found['test_resnet.tiny'].license is None, 'nothing says so'


def test_the_first_shelf_goes_first(shelf, tmp_path, monkeypatch):
    shutil.copytree(shelf / 'test_resnet.tiny', tmp_path / 'wheel' / 'test_resnet.tiny')
    monkeypatch.setattr(hub, '_shelves', lambda: [tmp_path / 'wheel', shelf])
    assert hub.embedded()['test_resnet.tiny'] == tmp_path / 'wheel' / 'test_resnet.tiny'
    assert hub.embedded()['test_resnet2.other'] == shelf / 'test_resnet2.other'


@pytest.mark.parametrize(
    ('name', 'kind', 'needles'),
    [
        ('test_resnet.tyni', NotFoundError, ["'test_resnet.tyni'", 'Did you mean test_resnet.tiny']),
        (
            'test_resnt',
            NotFoundError,
            ["no hypernetwork 'test_resnt'", 'Did you mean test_resnet', 'At hand: test_resnet.tiny'],
        ),
        ('org/name', NotFoundError, ['org/name', 'test_resnet.tiny']),
        (Path('org') / 'name', NotFoundError, ['org/name', 'test_resnet.tiny']),
        ('resnet50', UnsupportedTargetError, ['resnet50', 'test_resnet.tiny', 'Train one']),
        ('test_efficientnet', UnsupportedTargetError, ['test_efficientnet', 'test_resnet.tiny']),
        ('test_efficientnet.untrained', NotFoundError, ["'test_efficientnet.untrained'", 'test_resnet.tiny']),
    ],
)
def test_a_name_that_nothing_serves_is_told_with_what_is_at_hand(name, kind, needles, shelf, one_line):
    with pytest.raises(kind) as error:
        load_hypernet(name)
    one_line(error, *needles)


def test_nobody_is_told_to_train_a_hypernetwork_for_a_transformer(shelf, one_line, pictures):
    """None can be made for it, so the error says why, instead of sending people off to train one."""
    with pytest.raises(UnsupportedTargetError) as error:
        predict_model('vit_tiny_patch16_224', *pictures(4))
    one_line(error, 'vit_tiny_patch16_224', 'conv')
    assert 'Train one' not in str(error.value)


def test_without_any_hypernetwork_the_error_says_so(shelf, monkeypatch, one_line):
    monkeypatch.setattr(hub, '_shelves', list)
    assert list_hypernets() == {}
    with pytest.raises(UnsupportedTargetError) as error:
        load_hypernet('test_resnet')
    one_line(error, 'test_resnet', 'none')


@pytest.mark.parametrize('name', [5, None, b'x', ['test_resnet']], ids=repr)
def test_a_name_of_a_wrong_type_is_an_error_of_ours(name, shelf, one_line):
    with pytest.raises(PudNetError) as error:
        load_hypernet(name)
    one_line(error, type(name).__name__)


def test_a_folder_without_a_config_is_no_hypernetwork(tmp_path, one_line):
    with pytest.raises(NotFoundError) as error:
        describe_hypernet(tmp_path)
    one_line(error, f'{tmp_path} is no hypernetwork', 'config.json')


def test_a_damaged_config_is_named_by_its_path(shelf, one_line):
    path = shelf / 'test_resnet.tiny' / 'config.json'
    path.write_text('{"format_version": 1, "model_name"')
    for call in (list_hypernets, lambda: load_hypernet('test_resnet'), lambda: load_hypernet(path.parent)):
        with pytest.raises(DamagedFileError) as error:
            call()
        one_line(error, path)


def test_one_damaged_hypernetwork_does_not_stop_the_others(shelf):
    (shelf / 'test_resnet2.other' / 'config.json').write_text('')
    assert load_hypernet('test_resnet').name == 'test_resnet.tiny'


@pytest.mark.parametrize('cut', [0, 7, 20_000])
def test_damaged_weights_are_named_by_their_path(cut, shelf, one_line):
    path = shelf / 'test_resnet.tiny' / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DamagedFileError) as error:
        load_hypernet('test_resnet.tiny')
    one_line(error, path)


def test_a_timm_model_is_not_taken_for_a_hypernetwork(shelf, tmp_path, pictures, one_line):
    model = predict_model('test_resnet', *pictures(6))
    timm_pudnet.save_model(model, tmp_path / 'model')
    with pytest.raises(PudNetError) as error:
        load_hypernet(tmp_path / 'model')
    one_line(error, tmp_path / 'model')
    assert 'newer' not in str(error.value)
    assert 'update' not in str(error.value), 'no update helps here'


def test_a_folder_in_the_current_one_does_not_take_an_architecture_s_place(shelf, tmp_path, pictures):
    """`timm-pudnet predict test_resnet ... --out test_resnet` must not break the next prediction there."""
    expected = predict_model('test_resnet', *pictures(6)).state_dict()
    (tmp_path / 'test_resnet').mkdir()
    assert_close(predict_model('test_resnet', *pictures(6)).state_dict(), expected)
    timm_pudnet.save_model(timm.create_model('resnet10t'), tmp_path / 'resnet10t')  # which none that ships serves
    with pytest.raises(UnsupportedTargetError, match='no hypernetwork predicts resnet10t'):
        resolve_hypernet('resnet10t', None)


def test_the_hypernetwork_that_serves_an_architecture_is_found(shelf, tiny):
    assert resolve_hypernet('test_resnet', None).name == 'test_resnet.tiny'
    assert resolve_hypernet('test_resnet', tiny) is tiny
    with pytest.raises(UnsupportedTargetError, match=r'test_resnet\.tiny predicts test_resnet, not resnet18'):
        resolve_hypernet('resnet18', 'test_resnet.tiny')


def test_accuracy_and_licence_are_those_of_the_files(shelf):
    folder = shelf / 'test_resnet.tiny'
    row = {'mean': 61.25, 'interval': 1.5}
    results = {'accuracy': {'predicted': row}, 'n_way': 5, 'n_shot': 10, 'groups': 500}
    (folder / 'results.other.json').write_text(json.dumps({**results, 'n_way': 3}))
    (folder / 'README.md').write_text('---\ntags: [a]\nlicense: mit\n---\n\nlicense: none of this\n')
    info = describe_hypernet('test_resnet')
    assert (info.name, info.where, info.license, info.accuracy['n_way']) == ('test_resnet.tiny', 'embedded', 'mit', '3')
    (folder / 'results.json').write_text(json.dumps(results))
    assert describe_hypernet('test_resnet.tiny').accuracy['n_way'] == '5', 'results.json goes first'
    assert '61.25 ± 1.50 % (5-way, 10 labels)' in str(describe_hypernet(folder))
    for header in (
        '\ufeff---\nlicense: mit\n---\n',
        '---\r\nlicense: mit\r\n---\r\n',
        '---\nlicense: "mit"  # ours\n---\n',
    ):
        (folder / 'README.md').write_bytes(header.encode())
        assert describe_hypernet(folder).license == 'mit'


@pytest.mark.parametrize(
    'name',
    [
        'hf-hub:',
        'hf-hub:org',
        'hf-hub:../name',
        'hf-hub:org/../name',
        'hf-hub:/a/b',
        'hf-hub:org/name/more',
        'hf-hub:org/na\x1b[2Jme',
        'hf-hub:org/name@',
        'hf-hub:org/name@../x',
        'hf-hub:org/name@a@b',
    ],
)
def test_what_is_no_name_on_the_hub_is_refused_before_anything_is_asked(name, shelf, one_line):
    with pytest.raises(InputError) as error:
        load_hypernet(name)
    one_line(error, 'hf-hub:org/name')
    assert '\x1b' not in str(error.value)


def test_a_prefix_says_which_of_both_is_meant(shelf, tiny_folder, tmp_path, one_line):
    shutil.copytree(tiny_folder, tmp_path / 'org' / 'name')
    for name in ('org/name', 'local-dir:org/name', f'local-dir:{tiny_folder}'):
        assert load_hypernet(name).name == PudNet.from_pretrained(name).name == 'test_resnet.tiny'
    for call in (load_hypernet, PudNet.from_pretrained):
        with pytest.raises(NotFoundError) as error:
            call('hf-hub:org/name')
        one_line(error, 'org/name@main', 'HF_HUB_OFFLINE')
        with pytest.raises(NotFoundError) as error:
            call('local-dir:org/other')
        one_line(error, 'org/other', 'no such folder')


# Publishing: what is refused before anything is asked


@pytest.fixture
def complete(tiny_folder, tmp_path):
    """A folder that may be published, but for its licence."""
    folder = shutil.copytree(tiny_folder, tmp_path / 'complete')
    (folder / 'recipe.toml').write_text('seed = 0\n')
    row = {'mean': 61.25, 'interval': 1.5}
    results = {'accuracy': {'predicted': row}, 'classes': ['mug'], 'n_way': 5, 'n_shot': 10, 'groups': 500}
    results['weights_sha256'] = weights_sha256(folder)
    results['config_sha256'] = config_sha256(folder)
    (folder / 'results.json').write_text(json.dumps(results))
    return folder


def change_results(folder, **changes):
    found = json.loads((folder / 'results.json').read_text())
    (folder / 'results.json').write_text(json.dumps({**found, **changes}))


def change_config(folder, **changes):
    found = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**found, **changes}))


HUB = Path(timm_pudnet.__file__).parents[1] / 'hub'
HUB_FOLDERS = sorted(path.parent for path in HUB.glob('*/config.json'))

INCOMPLETE = {
    'no recipe': (lambda folder: (folder / 'recipe.toml').unlink(), ['recipe.toml']),
    'a damaged recipe': (lambda folder: (folder / 'recipe.toml').write_text('seed = ['), ['recipe.toml', 'no recipe']),
    'no results': (lambda folder: (folder / 'results.json').unlink(), ['no results', 'evaluate']),
    'results of before hashes': (lambda folder: change_results(folder, weights_sha256=None), ['results.json', 'which']),
    'results of other weights': (
        lambda folder: PudNet.for_target('test_resnet', sketch_width=8).save_pretrained(folder, overwrite=True),
        ['results.json', 'other weights', 'evaluate'],
    ),
    'results of another config': (
        lambda folder: change_config(folder, prior_images=3.0),
        ['results.json', 'config.json', 'evaluate'],
    ),
    'results on a seen class': (lambda folder: change_results(folder, classes=['mug', 'hat']), ['hat', 'seen']),
    'an accuracy of more than all': (
        lambda folder: change_results(folder, accuracy={'predicted': {'mean': 999.9, 'interval': 1.0}}),
        ['results.json', 'evaluate'],
    ),
    'no accuracy': (lambda folder: change_results(folder, accuracy={}), ['results.json', 'evaluate']),
    'results that are not published': (
        lambda folder: shutil.copy(folder / 'results.json', folder / 'results.v1.2.json'),
        ['results.v1.2.json', 'results.NAME.json'],
    ),
    'no licence': (lambda folder: None, ['--license']),
    'no config': (lambda folder: (folder / 'config.json').unlink(), ['config.json']),
}


@pytest.mark.parametrize('case', INCOMPLETE)
def test_a_folder_that_is_not_complete_is_not_published(case, complete, one_line):
    change, needles = INCOMPLETE[case]
    change(complete)
    with pytest.raises(PudNetError) as error:
        push(complete, 'org/name')
    one_line(error, complete, *needles)


@pytest.mark.parametrize('folder', HUB_FOLDERS, ids=lambda folder: folder.name)
def test_every_hypernetwork_of_ours_may_be_published(folder):
    files = hypernet_files(folder, f'org/{folder.name}')
    recipes = {path.name for path in folder.glob('*.toml')}
    assert {'config.json', 'model.safetensors', 'recipe.toml', 'README.md'} | recipes < files.keys()
    found = ModelCard(files['README.md'].decode()).data.eval_results
    measured = {name for name in files if name.startswith('results')}
    named = [next(name for name in measured if f'({name})' in result.dataset_name) for result in found]
    assert set(named) == measured, 'no file stands under the name of another'
    text = ModelCard(files['README.md'].decode()).text
    assert all(text.count(f'(`{name}`):') == 1 for name in measured), 'a table of each'
    assert f"hypernet='hub/{folder.name}'" not in text, 'which is a folder of a checkout'
    assert ('noise of photons' in text) == any('photons' in name for name in measured)
    assert ('| centroid | ridge |' in text) == bool(load_hypernet(folder).target.classifiers)
    assert '](../' not in text, 'which leads nowhere on the Hub'
    assert '**Licence.**' in text
    assert re.search(r'predict_model\(|predict_denoiser\(', text)


def test_a_licence_is_asked_for_where_the_card_says_none_and_never_changed(complete, tmp_path, one_line):
    assert b'license: mit' in hypernet_files(complete, 'org/name', 'mit')['README.md']
    (complete / 'README.md').write_text('---\nlicense: apache-2.0\n---\nOurs.\n')
    assert b'license: apache-2.0' in hypernet_files(complete, 'org/name', 'apache-2.0')['README.md']
    with pytest.raises(InputError) as error:
        hypernet_files(complete, 'org/name', 'mit')
    one_line(error, complete, 'apache-2.0', 'mit', '--license')
    (complete / 'README.md').write_text(
        '\ufeff---\nlicense: apache-2.0\nmodel_name: shop\n---\nOurs.\n', encoding='utf-8'
    )
    card = hypernet_files(complete, 'org/name')['README.md'].decode()
    assert card.count('license: apache-2.0') == 1
    assert 'shop' not in card, 'its name is that of the hypernetwork'

    model = timm_pudnet.save_model(timm.create_model('test_resnet', num_classes=2), tmp_path / 'model')
    (model / 'README.md').write_text('# Mine\n')
    assert model_files(model, 'org/name')['README.md'] == b'# Mine\n'
    assert model_files(model, 'org/name', 'mit')['README.md'] == b'---\nlicense: mit\n---\n# Mine\n'


def test_a_card_that_was_pulled_is_published_with_today_s_tables_alone(complete):
    first = hypernet_files(complete, 'org/name', 'mit')['README.md']
    (complete / 'README.md').write_bytes(first)
    assert hypernet_files(complete, 'org/name')['README.md'] == first
    found = json.loads((complete / 'results.json').read_text())
    found['accuracy']['predicted']['mean'] = 12.34
    (complete / 'results.json').write_text(json.dumps(found))
    card = hypernet_files(complete, 'org/name')['README.md'].decode()
    assert card.count('## All results') == 1
    assert '12.34 ± ' in card


def test_the_card_of_a_model_of_ours_imports_us(tmp_path):
    for name, needles in (
        ('convnet3', ['import timm_pudnet', 'pipeline_tag: image-classification']),
        ('blindspot_unet', ['import timm_pudnet', 'pipeline_tag: image-to-image']),
        ('test_resnet', ['pipeline_tag: image-classification']),
    ):
        folder = timm_pudnet.save_model(timm.create_model(name), tmp_path / name)
        card = model_files(folder, 'org/name')['README.md'].decode()
        assert all(needle in card for needle in needles)
        assert ('import timm_pudnet' in card) == (name != 'test_resnet')


@pytest.mark.parametrize('kind', ['model', 'hypernetwork'])
def test_a_push_takes_away_what_an_earlier_hypernetwork_left_and_of_a_model_s_repository_nothing(
    kind, complete, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr('timm_pudnet.remote.changes', lambda repo, files, ours: asked.append(ours) or {})
    model = timm.create_model('test_resnet')
    push(
        complete if kind == 'hypernetwork' else timm_pudnet.save_model(model, tmp_path / 'model'),
        'org/name',
        license='mit',
    )
    taken = {name for name in ('recipe.toml', 'results.old.json', 'pyproject.toml', 'notes.txt') if asked[0](name)}
    assert taken == ({'recipe.toml', 'results.old.json', 'pyproject.toml'} if kind == 'hypernetwork' else set())


@pytest.mark.parametrize('repo', ['name', 'org/name@v1', '../name', 'org/na me'])
def test_a_push_goes_to_a_repository(repo, complete, one_line):
    with pytest.raises(InputError) as error:
        push(complete, repo, license='mit')
    one_line(error, repo.removeprefix('../'), 'org/name')


def test_release_publishes_nothing_unless_all_are_complete(complete, tiny_folder, tmp_path, fresh_process):
    shelf = tmp_path / 'hub'
    shutil.copytree(complete, shelf / 'test_resnet.good')
    (shelf / 'test_resnet.good' / 'README.md').write_text('---\nlicense: mit\n---\n')
    shutil.copytree(tiny_folder, shelf / 'test_resnet.bad')
    code, out, err = fresh_process(HUB / 'release', 'org', '--dry-run', '--hub', shelf)
    assert code == 2
    assert 'Complete   test_resnet.good' in out
    assert 'Refused    test_resnet.bad' in err
    assert 'Nothing published' in err
    assert 'HF_HUB_OFFLINE' not in err, 'the Hub is not asked before all are checked'


def test_networks_of_another_architecture_get_the_sketch_encoder_of_a_hypernetwork(
    tmp_path, fresh_process, monkeypatch, capsys
):
    def refused(*args):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, 'argv', [str(HUB / 'average.py'), *args])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(HUB / 'average.py'), run_name='__main__')
        assert ended.value.code == 2
        return capsys.readouterr().err

    given = PudNet.for_target('test_resnet', generator='residual', sketch_width=16, class_names=('cup',))
    given.save_pretrained(tmp_path / 'given')
    networks = [timm.create_model('test_efficientnet', num_classes=0) for _ in range(2)]
    for number, network in enumerate(networks):
        timm_pudnet.save_model(network, tmp_path / str(number))
    words = [HUB / 'average.py', 'given', 'out', '0', '1', '--model', 'test_efficientnet', '--norm-rank', '2']
    code, _, err = fresh_process(*words, cwd=tmp_path)
    assert code == 0, err
    assert '0 does not say which classes it has seen' in err
    assert 'start exists' in refused(*words[1:])
    made = PudNet.from_pretrained(tmp_path / 'out')
    assert (made.config.model_name, made.config.class_names) == ('test_efficientnet', ('cup',))
    assert made.config.norm_rank == 2
    assert_close(made.encoder.state_dict(), given.encoder.state_dict(), rtol=0, atol=0)
    start = timm.create_model(f'local-dir:{tmp_path / "out" / "start"}', pretrained=True).state_dict()
    with torch.no_grad():
        weights = made(torch.rand(16))
    for key, value in weights.items():
        mean = torch.stack([network.state_dict()[key] for network in networks]).double().mean(0).to(value.dtype)
        assert_close(value, mean)
        assert_close(start[key], mean)
    assert '--model needs' in refused('given', 'other', '--model', 'test_efficientnet')
    assert 'it needs --model' in refused('given', 'other', '--norm-rank', '2')
    timm_pudnet.save_model(timm.create_model('test_resnet', num_classes=0), tmp_path / 'third')
    for folder, needle in (('third', 'third is another network than 0'), ('gone', 'gone: no such folder')):
        assert needle in refused('given', 'other', '0', folder, '--model', 'test_efficientnet')
    assert not (tmp_path / 'other').exists()


# Those in hub/

CLASSIFIERS = [
    'resnet18.fashion_set',
    'resnet18.mixed',
    'resnet18.mixed56',
    'resnet18.mixed96',
    'resnet18.cifar100_set',
    'resnet18.cifar100_superclass',
    'convnet3.cifar100_set',
    'mobilenetv4_conv_small.mixed56',
]
DENOISERS = ['blindspot_unet.mixed_noise']
PUBLISHED = CLASSIFIERS + DENOISERS


@pytest.fixture(params=PUBLISHED)
def published(request):
    folder = HUB / request.param
    if not (folder / 'model.safetensors').is_file():
        pytest.fail(f'{folder} has no model.safetensors: train it by its recipe, timm-pudnet train', pytrace=False)
    return folder


def test_the_widest_serves_an_architecture_and_all_are_listed():
    assert {path.parent.name for path in HUB.glob('*/config.json')} == set(PUBLISHED)
    for architecture in ('resnet18', 'mobilenetv4_conv_small'):
        assert load_hypernet(architecture).name == f'{architecture}.mixed56'
    assert set(PUBLISHED) <= set(list_hypernets())


def test_the_source_distribution_has_what_the_wheel_takes_and_fits_on_pypi():
    pyproject = tomllib.loads((HUB.parent / 'pyproject.toml').read_text(encoding='utf-8'))
    targets = pyproject['tool']['hatch']['build']['targets']
    included = [HUB.parent / line.lstrip('/') for line in targets['sdist']['include']]
    assert all(path.exists() for path in included)
    for source in targets['wheel']['force-include']:
        assert any((HUB.parent / source).is_relative_to(path) for path in included), source
    # Not those of a training in such a folder.
    weights = [path for folder in included for path in folder.glob('model.safetensors')]
    assert len(weights) == 4
    assert sum(path.stat().st_size for path in weights) < 90e6  # PyPI takes files of up to 100 MB


def test_denoisers_are_measured_on_the_same_images_whatever_the_noise():
    spread = {}
    for path in HUB.glob('*/results*.json'):
        found = json.loads(path.read_text(encoding='utf-8'))
        if 'noises' in found:
            of = found['folder'], found['images'], found.get('kind') == 'camera'  # whose images went through a mosaic
            spread.setdefault(of, set()).add(found['standard_deviation'])
    assert len(spread) >= 3
    assert all(len(values) == 1 for values in spread.values()), spread


def test_the_published_table_is_that_of_the_results():
    done = subprocess.run([sys.executable, HUB / 'table.py', '--check'], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_example_images_are_of_classes_that_the_fashion_hypernetwork_never_saw():
    names = {path.name for path in (HUB.parent / 'examples' / 'fashion').iterdir() if path.is_dir()}
    assert names == UNSEEN
    assert not UNSEEN & set(load_hypernet('resnet18.fashion_set').config.class_names)


def test_a_published_hypernetwork_is_the_one_of_its_recipe(published):
    recipe, config = Recipe.load(published / 'recipe.toml'), load_hypernet(published).config
    assert config.training['recipe_digest'] == recipe.digest
    assert config.input == recipe.hypernet.input
    # To its end; groups of a set with fewer classes than n_way are smaller, a few in a hundred.
    assert config.training['images'] >= 0.98 * (recipe.schedule.images - recipe.images_per_step)
    unseen = {name for data in recipe.data for name in data.unseen}
    assert not unseen & set(config.class_names)
    assert {name for data in recipe.data for name in data.classes} <= set(config.class_names)
    assert f'{config.model_name}.{config.tag}' == published.name


@pytest.mark.parametrize('published', DENOISERS, indirect=True)
def test_published_denoisers_were_measured_with_these_weights(published):
    found = [json.loads(path.read_text()) for path in published.glob('results*.json')]
    assert any('bsds500' in results['protocol'] for results in found)
    for results in found:
        assert results['weights_sha256'] == weights_sha256(published)
        if 'plain_sha256' in results:  # else beside an earlier control of the same recipe
            assert results['plain_sha256'] == weights_sha256(published / 'plain')
        for one in results['noises'] if 'bsds500' in results['protocol'] else ():  # not so on what it is not for
            assert one['psnr']['predicted']['mean'] > one['psnr']['noisy']['mean']
    assert load_hypernet('blindspot_unet').name == 'blindspot_unet.mixed_noise'


@pytest.mark.parametrize('published', CLASSIFIERS, indirect=True)
def test_published_results_are_of_the_published_weights_and_unseen_classes(published):
    hypernet = load_hypernet(published)
    digest = timm_pudnet.evaluation.weights_digest(hypernet)
    found = list(published.glob('results*.json'))
    assert found
    for path in found:
        results = json.loads(path.read_text())
        assert not set(results['classes']) & set(hypernet.config.class_names)
        assert results['weights_digest'] == digest, path
        groups = TestGroups.load(path.with_name(path.name.replace('results', 'groups')))
        assert groups.digest == results['groups_digest']
        assert results['accuracy']['predicted']['mean'] > results['chance']
    assert (published / 'README.md').is_file()


def test_groups_with_unlabelled_images_are_the_published_ones():
    """What the table says of them: the same support and query as without, so the same accuracy by the labels alone."""
    found = list(HUB.glob('*/groups*unlabelled.json'))
    assert found
    for path in found:
        without = path.with_name(path.name.replace('-unlabelled', '').replace('.unlabelled', ''))
        with_them, alone = (json.loads(file.read_text()) for file in (path, without))
        assert with_them.pop('n_unlabelled') > 0
        assert with_them == alone
        results = [
            json.loads(file.with_name(file.name.replace('groups', 'results')).read_text()) for file in (path, without)
        ]
        for head in ('accuracy', 'accuracy_ridge'):
            means = [result[head]['predicted']['mean'] for result in results]
            assert_close(means[0], means[1], rtol=0, atol=0.05)


def test_a_card_says_how_many_images_had_no_labels(tiny_folder, tmp_path):
    row = {'predicted': {'mean': 61.0, 'interval': 1.0}}
    trained = {'predicted': {'mean': 67.0, 'interval': 1.0}}
    results = {
        'results.json': {'n_way': 5, 'n_shot': 10, 'groups': 3, 'accuracy': row},
        'results.unlabelled.json': {
            **{'n_way': 5, 'n_shot': 10, 'groups': 3, 'n_unlabelled': 75, 'accuracy': row},
            **{'accuracy_ridge': row, 'accuracy_blend': row, 'accuracy_self_training': trained},
        },
    }
    card = hypernet_card(tmp_path, load_hypernet(tiny_folder), results, 'org/name', 'mit')
    assert '10 labels and 75 images without a class, 3 groups' in card
    assert '| weights | centroid |\n|---|---|\n| predicted | 61.00 ± 1.00 |' in card
    assert '| weights | centroid | ridge | blend | self-trained ridge |' in card
    assert f'| predicted |{" 61.00 ± 1.00 |" * 3} 67.00 ± 1.00 |' in card
    found = ModelCard(card).data.eval_results
    heads = ['centroid', 'centroid', 'ridge', 'blend', 'self-trained ridge']
    assert [result.metric_name.split(', ')[1] for result in found] == [f'{head} head' for head in heads]
    assert [result.metric_args.get('n_unlabelled') for result in found] == [None, 75, 75, 75, 75]


def test_a_published_sketch_tells_sets_apart(published):
    hypernet = load_hypernet(published)
    one, two = torch.rand(8, 3, 36, 36), torch.rand(8, 3, 36, 36) * 0.2
    assert (hypernet.sketch(one) - hypernet.sketch(two)).norm() > 1e-2


def test_a_folder_of_another_config_is_not_pushed_as_this_one(tiny_folder, one_line):
    hypernet = load_hypernet(tiny_folder)
    hypernet.config = dataclasses.replace(hypernet.config, sketch_limit=1.0)  # the same weights predict others with it
    with pytest.raises(InputError) as error:
        hypernet.push_to_hub('org/other', tiny_folder, license='mit')
    one_line(error, tiny_folder, 'another config')


def test_what_the_transport_of_large_files_raises_is_one_line(one_line):
    """hf_xet raises RuntimeError without a cause, and OSError without a number."""

    def xet_get():
        raise RuntimeError('Data processing error: CAS service error')

    with pytest.raises(HubError) as error, remote._explained('org/name'):
        xet_get()
    one_line(error, 'org/name', 'CAS service error')
    with pytest.raises(HubError) as error, remote._explained('org/name'):
        raise OSError('No space left on device (os error 28)')
    one_line(error, 'org/name', 'is full')
    with pytest.raises(RuntimeError, match='of our own'), remote._explained('org/name'):
        raise RuntimeError('of our own')


def test_a_licence_that_is_named_below_the_header_is_none(tiny_folder, tmp_path):
    import shutil

    folder = shutil.copytree(tiny_folder, tmp_path / 'test_resnet.other')
    (folder / 'README.md').write_text('---\ntags: [a]\n---\n\nlicense: gpl-3.0\n')
    assert describe_hypernet(folder).license is None


def test_results_json_goes_before_all_others_and_a_name_before_longer_ones(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / 'test_resnet.other')
    row = {'mean': 61.25, 'interval': 1.5}
    for n_way, name in ((3, 'results.bsds-more.json'), (4, 'results.bsds.json'), (5, 'results.json')):
        results = {'accuracy': {'predicted': row}, 'n_way': n_way, 'n_shot': 10, 'groups': 500}
        (folder / name).write_text(json.dumps(results))
        assert describe_hypernet(folder).accuracy['n_way'] == str(n_way), name


@pytest.mark.parametrize('wrong', [{'mean': -1.0, 'interval': 1.5}, {'mean': 61.25, 'interval': -1.5}], ids=str)
def test_results_below_zero_are_not_published(wrong, complete, one_line):
    change_results(complete, accuracy={'predicted': wrong})
    with pytest.raises(PudNetError) as error:
        push(complete, 'org/name', license='mit', dry_run=True)
    one_line(error, 'results.json', 'no results file')


def test_results_of_two_groups_are_results_however_wide_their_interval(complete):
    change_results(complete, accuracy={'predicted': {'mean': 61.25, 'interval': 127.1}})
    with pytest.raises(HubError, match='HF_HUB_OFFLINE'):  # past what is looked at before
        push(complete, 'org/name', license='mit', dry_run=True)


def test_of_what_is_cached_ours_go_first(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr('timm_pudnet.hub._shelves', list)
    for org in ('another', 'timm-pudnet', 'zebra'):
        store = tmp_path / f'models--{org}--test_resnet.tiny'
        (store / 'refs').mkdir(parents=True)
        (store / 'refs' / 'main').write_text('a' * 40)
        shutil.copytree(tiny_folder, store / 'snapshots' / ('a' * 40))
    assert list(list_hypernets()) == [f'{org}/test_resnet.tiny' for org in ('timm-pudnet', 'another', 'zebra')]
    for name in ('test_resnet', 'test_resnet.tiny'):
        assert load_hypernet(name).folder.is_relative_to(tmp_path / 'models--timm-pudnet--test_resnet.tiny')


def test_of_several_that_are_cached_none_is_taken_unasked(tiny_folder, tmp_path, monkeypatch, one_line):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr('timm_pudnet.hub._shelves', list)
    for repo in ('another--test_resnet.tiny', 'zebra--test_resnet.large'):
        store = tmp_path / f'models--{repo}'
        (store / 'refs').mkdir(parents=True)
        (store / 'refs' / 'main').write_text('a' * 40)
        shutil.copytree(tiny_folder, store / 'snapshots' / ('a' * 40))
    with pytest.raises(InputError) as error:
        load_hypernet('test_resnet')
    one_line(error, 'another/test_resnet.tiny, zebra/test_resnet.large', 'say which')
    found = load_hypernet('test_resnet.large').folder
    assert found.is_relative_to(tmp_path / 'models--zebra--test_resnet.large')


def test_a_relative_folder_of_one_at_hand_is_the_same_one(shelf, monkeypatch):
    monkeypatch.chdir(shelf)
    assert hub.describe_hypernet('./test_resnet.tiny').where == 'embedded'


def test_a_model_with_damaged_weights_is_not_published(tmp_path):
    folder = save_model(timm.create_model('test_resnet', num_classes=2), tmp_path / 'model')
    weights = folder / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(DamagedFileError, match=r'model\.safetensors is damaged'):
        push(folder, 'org/name', dry_run=True)


def test_a_revision_of_the_cache_that_is_no_commit_is_none(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'hub'))
    store = tmp_path / 'hub' / 'models--org--name'
    (store / 'refs').mkdir(parents=True)
    (store / 'snapshots').mkdir()
    shutil.copytree(tiny_folder, tmp_path / 'elsewhere')
    for text in ('../../../elsewhere', str(tmp_path / 'elsewhere'), ''):
        (store / 'refs' / 'main').write_text(text)
        assert remote.cached('org/name', 'main') is None


def test_of_damaged_files_nothing_out_of_the_cache_is_taken_away(tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'hub'))
    store, mine = tmp_path / 'hub' / 'models--org--name', tmp_path / 'mine.safetensors'
    snapshot, blob = store / 'snapshots' / ('a' * 40), store / 'blobs' / ('b' * 64)
    snapshot.mkdir(parents=True)
    blob.parent.mkdir()
    mine.write_bytes(b'cut short')
    blob.symlink_to(mine)
    for target in (mine, blob):
        path = snapshot / 'model.safetensors'
        path.symlink_to(target)
        remote._forget([path])
        assert not path.is_symlink()
        assert mine.read_bytes() == b'cut short'
    assert not blob.is_symlink()


@pytest.mark.parametrize(
    'name', ['org/na..me', 'org/name@../main', 'org/name@v1/../../x', 'org/na--me', 'org/name@a//b']
)
def test_a_name_on_the_hub_leads_to_no_other_folder_of_the_cache(name):
    assert remote.split_repo(name) is None
    with pytest.raises(InputError, match='is no name on the Hub'):
        remote.split_repo(f'hf-hub:{name}')
