"""remote.py and hub.py against a Hub on this machine: the real client, in fresh processes, over real HTTP."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from hub_server import TOKEN, LoopbackHub

import timm_pudnet
from timm_pudnet.files import weights_sha256

ROOT = Path(timm_pudnet.__file__).parents[1]

# Runs steps `[function, arguments]`, and prints of each what came of it, as JSON. Waiting between tries is cut short.
CLIENT = """
import json, os, resource, sys, time, warnings
from pathlib import Path
import huggingface_hub, numpy, torch
import timm_pudnet
from timm_pudnet import PudNet, hub, remote
from timm_pudnet.evaluation.measure import weights_digest

sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.02))
warnings.simplefilter('always', timm_pudnet.PudNetWarning)

def digest(name):
    return weights_digest(PudNet.from_pretrained(name))

def served(name):
    return weights_digest(hub.load_hypernet(name))

def pull(name):
    return str(hub.pull(name))

def pull_beside(repo):
    os.makedirs(repo)
    return pull(repo)

def fetch(repo):
    return str(remote.fetch(repo))

def push(*args, **kwargs):
    found = hub.push(*args, **kwargs)
    return [found.changes, found.address]

def push_to_hub(folder, *args, **kwargs):
    found = PudNet.from_pretrained(folder).push_to_hub(*args, **kwargs)
    return [found.changes, found.address]

def push_model(repo):
    images = numpy.random.default_rng(0).integers(0, 255, (8, 32, 32, 3)).astype('uint8')
    model = timm_pudnet.predict_model('test_resnet', images, list('aabbaabb'), hypernet=sys.argv[2])
    timm_pudnet.push_model(model, repo, license='mit')
    with torch.inference_mode():
        return model(torch.ones(1, 3, 32, 32)).tolist()

def truncated(repo):
    path = Path(remote.fetch(repo)) / 'model.safetensors'
    with path.open('r+b') as file:
        file.truncate(5000)
    return digest(repo)

def flipped(repo):
    path = Path(remote.fetch(repo)) / 'model.safetensors'
    with path.open('r+b') as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    remote.fetch(repo, refresh=True)
    return digest(repo)

def bent(repo, length):
    path = Path(remote.fetch(repo)) / 'config.json'
    text = path.read_text()
    path.write_text(text[:length] if length else text.replace('"eta": 0.5', '"eta": 0.25'))
    assert path.read_text() != text
    return digest(repo)

def by_xet(name, repo):
    # As the Hub serves weights, but for the transfer: hf_xet would want its storage servers.
    from urllib.request import urlretrieve
    from huggingface_hub import constants, file_download

    def get(*, incomplete_path, xet_file_data, **_):
        urlretrieve(f'{constants.ENDPOINT}/storage/fine/{xet_file_data.file_hash}', incomplete_path)

    kept, file_download.xet_get, constants.HF_HUB_DISABLE_XET = file_download.xet_get, get, False
    try:
        found = globals()[name](repo)
    finally:
        file_download.xet_get, constants.HF_HUB_DISABLE_XET = kept, True
    stored = (Path(remote.fetch(repo)) / 'model.safetensors').resolve()
    shared = hasattr(constants, 'HF_HUB_DISABLE_SHARED_BLOBS')  # not in an earlier huggingface_hub
    assert not shared or stored.is_relative_to(Path(constants.HF_HUB_CACHE).resolve() / 'blobs'), stored
    return found

def full_disk(repo):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        return pull(repo)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

def two_at_once(repo):
    children = []
    for _ in range(2):
        child = os.fork()
        if not child:
            try:
                remote.fetch(repo)
                os._exit(0)
            except BaseException as error:
                print(error, file=sys.stderr)
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    return digest(repo)

def cli(*args):
    from click.testing import CliRunner
    from timm_pudnet.cli import main
    done = CliRunner().invoke(main, args, catch_exceptions=False)
    return [done.exit_code, done.stdout, done.stderr]

def listed(where):
    return [str(info) for info in hub.list_hypernets(hub=True).values() if info.where == where]

def release(script, *args):
    import contextlib, io, runpy
    kept, sys.argv = sys.argv, ['release', *args]
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_path(script, run_name='__main__')
    except SystemExit as end:
        return [end.code, out.getvalue()]
    finally:
        sys.argv = kept

def control(name):
    from urllib.request import urlopen
    return json.load(urlopen(f'{os.environ["HF_ENDPOINT"]}/control/{name}'))

outcomes = []
for name, *args in json.loads(sys.argv[1]):
    kwargs = args.pop() if args and isinstance(args[-1], dict) else {}
    with warnings.catch_warnings(record=True) as warned:
        try:
            outcome = {'value': globals()[name](*args, **kwargs)}
        except timm_pudnet.PudNetError as error:
            outcome = {'error': f'{type(error).__name__}: {error}'}
    outcomes.append({**outcome, 'warnings': [str(row.message) for row in warned]})
print(json.dumps(outcomes))
"""


@pytest.fixture(scope='module')
def server():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope='module')
def client(server, tmp_path_factory, tiny_folder):
    """Runs steps in a fresh process with this cache; gives their outcomes."""

    def run(home, *steps, **environment):
        known = {key: value for key, value in os.environ.items() if not key.startswith('HF_')}
        done = subprocess.run(
            [sys.executable, '-c', CLIENT, json.dumps(steps), str(tiny_folder)],
            env={
                **known,
                'PYTHONPATH': os.pathsep.join([str(ROOT), *os.environ.get('PYTHONPATH', '').split(os.pathsep)]),
                'OMP_NUM_THREADS': '1',
                'HF_HOME': str(home),
                'HF_ENDPOINT': server.endpoint,
                'HF_TOKEN': TOKEN,
                'HF_HUB_DISABLE_XET': '1',
                'HF_HUB_DISABLE_PROGRESS_BARS': '1',
                'HF_HUB_ETAG_TIMEOUT': '1',
                'HF_HUB_DOWNLOAD_TIMEOUT': '1',
                **environment,
            },
            cwd=tmp_path_factory.mktemp('elsewhere'),
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def results_of(folder):
    row = {'mean': 61.25, 'interval': 1.5}
    return {
        'accuracy': {'predicted': row, 'swapped_sketch': {'mean': 60.0, 'interval': 1.4}},
        'accuracy_ridge': {'predicted': row},
        'classes': ['mug', 'lid'],
        'n_way': 2,
        'n_shot': 10,
        'groups': 500,
        'images': 'torch/shapes',
        'split': 'test',
        'weights_sha256': weights_sha256(folder),
    }


def complete(folder):
    """Adds what a published folder has beside config and weights."""
    (folder / 'recipe.toml').write_text('seed = 0\n')
    (folder / 'results.json').write_text(json.dumps(results_of(folder)))
    (folder / 'expectation.json').write_text('{}')
    return folder


@pytest.fixture(scope='module')
def tiny_files(tiny_folder):
    return {path.name: path.read_bytes() for path in tiny_folder.iterdir()}


@pytest.fixture(scope='module')
def pushed(server, client, tiny_folder, tmp_path_factory):
    """What came of pushing, in one process: a hypernetwork thrice, one in shards, a predicted model, conflicts."""
    folder = tmp_path_factory.mktemp('push')
    whole, shards = folder / 'whole', folder / 'shards'
    tiny = timm_pudnet.PudNet.from_pretrained(tiny_folder)
    complete(tiny.save_pretrained(whole))
    (whole / 'run').mkdir()
    (whole / 'run' / 'checkpoint.pt').write_bytes(b'pickle')
    (whole / 'secrets.json').write_text('{}')
    half = timm_pudnet.PudNet.from_pretrained(tiny_folder).save_pretrained(folder / 'half', half=True)
    other = timm_pudnet.PudNet.from_pretrained(tiny_folder)  # but for one number
    other.temperature.data.add_(1)
    other = other.save_pretrained(folder / 'other')
    complete(tiny.save_pretrained(shards, max_shard_bytes=60_000))
    assert len(list(shards.glob('model-*.safetensors'))) > 1
    shutil.copytree(whole, folder / 'shelf' / 'test_resnet.shelved')
    (folder / 'shelf' / 'test_resnet.shelved' / 'README.md').write_text('---\nlicense: mit\n---\nOurs.\n')
    release = ['release', str(ROOT / 'hub' / 'release'), 'org', '--hub', str(folder / 'shelf')]
    server.faults.update({'org/conflict': 'conflict', 'org/once': 'conflict once', 'org/silent': 'silent'})
    server.faults |= {'org/overtaken': 'overtaken', 'org/lost': 'answer lost'}
    license = {'license': 'apache-2.0'}
    home = tmp_path_factory.mktemp('pusher')
    names = [
        'dry',
        'refused',
        'first',
        'again',
        'method',
        'method of another',
        'method, half',
        'shards',
        'model',
        'once',
        'conflict',
        'silent',
        'gone',
    ]
    names += ['cli dry', 'cli', 'cli again', 'cli conflict', 'release dry', 'release', 'release again']
    names += [
        'answer lost',
        'ahead',
        'overtaken',
        'hidden',
        'hidden again',
        'public',
        'public, nothing new',
        'public, dry',
        'cli hidden',
    ]
    outcomes = client(
        home,
        ['push', str(whole), 'org/test_resnet.tiny', {**license, 'dry_run': True}],
        ['push', str(whole), 'org/test_resnet.tiny'],
        ['push', str(whole), 'org/test_resnet.tiny', license],
        ['push', str(whole), 'org/test_resnet.tiny', license],
        ['push_to_hub', str(whole), 'org/test_resnet.method', str(whole), license],
        ['push_to_hub', str(other), 'org/test_resnet.method', str(whole), license],
        ['push_to_hub', str(half), 'org/test_resnet.method', str(whole), {**license, 'dry_run': True}],
        ['push', str(shards), 'timm-pudnet/test_resnet.shards', license],
        ['push_model', 'org/model'],
        ['push', str(whole), 'org/once', license],
        ['push', str(whole), 'org/conflict', license],
        ['push', str(whole), 'org/silent', license],
        ['push', str(shards), 'org/test_resnet.tiny', {**license, 'dry_run': True}],
        ['cli', 'push', str(whole), 'org/cli', '--license', 'mit', '--dry-run'],
        ['cli', 'push', str(whole), 'org/cli', '--license', 'mit'],
        ['cli', 'push', str(whole), 'org/cli', '--license', 'mit'],
        ['cli', 'push', str(whole), 'org/conflict', '--license', 'mit'],
        [*release, '--dry-run'],
        release,
        release,
        ['push', str(whole), 'org/lost', license],
        ['push', str(whole), 'org/overtaken', {'license': 'mit'}],
        ['push', str(whole), 'org/overtaken', license],
        ['push', str(whole), 'org/hidden', {**license, 'private': True}],
        ['push', str(shards), 'org/hidden', {**license, 'private': True}],
        ['push', str(shards), 'org/cli', {**license, 'private': True}],
        ['push', str(whole), 'org/cli', {'license': 'mit', 'private': True}],
        ['push', str(shards), 'org/cli', {**license, 'private': True, 'dry_run': True}],
        ['cli', 'push', str(whole), 'org/cli-hidden', '--license', 'mit', '--private', '--message', 'Mine alone'],
    )
    return dict(zip(names, outcomes, strict=True)), whole


def test_a_dry_run_lists_what_a_push_then_sends_and_a_second_push_sends_nothing(pushed, server):
    outcomes, whole = pushed
    names = {'README.md', 'classes.json', 'config.json', 'model.safetensors', 'recipe.toml', 'results.json'}
    names |= {'sha256.json', 'expectation.json'}
    assert outcomes['dry']['value'] == [dict.fromkeys(names, 'new'), '']
    changes, address = outcomes['first']['value']
    assert (changes, address.startswith(f'{server.endpoint}/org/test_resnet.tiny/commit/')) == (
        dict.fromkeys(names, 'new'),
        True,
    )
    assert outcomes['again']['value'] == [{}, '']
    files = server.files('org/test_resnet.tiny')
    assert set(files) == names | {'.gitattributes'}, 'no checkpoint, no file that is not ours'
    assert files['model.safetensors'] == (whole / 'model.safetensors').read_bytes()
    hashes = json.loads(files['sha256.json'])
    assert hashes == {name: hashlib.sha256(files[name]).hexdigest() for name in names - {'sha256.json'}}
    assert json.loads(files['classes.json']) == {'seen': ['ball', 'hat'], 'unseen': {'results.json': ['mug', 'lid']}}
    assert outcomes['gone']['value'][0]['model.safetensors'] == 'gone', 'or it would hide the shards'
    assert not server.leaked, 'the token goes to the Hub only'


def test_what_is_to_be_private_is_never_sent_to_a_public_repository(pushed, server):
    outcomes, whole = pushed
    assert outcomes['hidden']['value'][1]
    assert outcomes['hidden again']['value'][1], 'one that is private already takes more'
    assert outcomes['cli hidden']['value'][0] == 0
    assert 'Mine alone' in server.messages
    assert server.private == {'org/hidden', 'org/cli-hidden'}, 'none is private unless that is asked for'
    for case in ('public', 'public, nothing new', 'public, dry'):
        assert outcomes[case]['error'].startswith('InputError: org/cli is there and public')
    assert server.files('org/cli')['model.safetensors'] == (whole / 'model.safetensors').read_bytes()


def test_a_hypernetwork_pushes_itself_from_the_folder_that_holds_it_and_from_no_other(pushed, server):
    outcomes, whole = pushed
    changes, address = outcomes['method']['value']
    assert (set(changes.values()), address.startswith(server.endpoint)) == ({'new'}, True)
    files = server.files('org/test_resnet.method')
    assert files['model.safetensors'] == (whole / 'model.safetensors').read_bytes()
    assert 'other weights' in outcomes['method of another']['error']
    assert str(whole) in outcomes['method of another']['error']
    assert 'value' in outcomes['method, half'], 'the same weights to half precision'


def test_a_published_card_has_the_licence_and_the_results_with_their_intervals(pushed, server):
    outcomes, _ = pushed
    assert 'licence' in outcomes['refused']['error']
    header = yaml.safe_load(server.files('org/test_resnet.tiny')['README.md'].decode().split('---')[1])
    assert (header['library_name'], header['license']) == ('timm-pudnet', 'apache-2.0')
    assert {'timm', 'hypernetwork'} <= set(header['tags'])
    (model,) = header['model-index']
    result = model['results'][0]
    assert model['name'] == 'test_resnet.tiny'
    assert (result['dataset']['type'], result['dataset']['split']) == ('shapes', 'test')
    metric = result['metrics'][0]
    assert (metric['type'], metric['value'], metric['args']['interval']) == ('accuracy', 61.25, 1.5)


def test_the_command_line_pushes_and_says_what_changed(pushed, server):
    outcomes, _ = pushed
    code, out, _ = outcomes['cli dry']['value']
    assert code == 0
    assert 'New        model.safetensors' in out
    assert 'Nothing sent' in out
    code, out, _ = outcomes['cli']['value']
    assert (code, 'org/cli' in server.refs) == (0, True)
    assert f'Published  {server.endpoint}/org/cli/commit/' in out
    assert 'org/cli has all of' in outcomes['cli again']['value'][1]
    code, out, err = outcomes['cli conflict']['value']
    assert (code, out, err.count('\n')) == (2, '', 1)
    assert err.startswith('Error: org/conflict')


def test_release_publishes_every_folder_that_changed(pushed, server):
    outcomes, _ = pushed
    code, out = outcomes['release dry']['value']
    assert code == 0
    assert 'New        org/test_resnet.shelved/model.safetensors' in out
    assert 'not sent: dry run: org/test_resnet.shelved' in out
    code, out = outcomes['release']['value']
    assert code == 0
    assert f'{server.endpoint}/org/test_resnet.shelved/commit/' in out
    assert b'Ours.' in server.files('org/test_resnet.shelved')['README.md']
    assert outcomes['release again']['value'][0] == 0
    assert 'up to date: org/test_resnet.shelved' in outcomes['release again']['value'][1]
    assert len(server.commits['org/test_resnet.shelved']) == 2, 'the one that made it, and one more'


def test_a_commit_that_meets_another_one_is_tried_again(pushed, server):
    outcomes, _ = pushed
    assert outcomes['once']['value'][1]
    assert server.count['org/once commit'] == 2
    assert '409' in outcomes['conflict']['error']
    assert outcomes['conflict']['error'].startswith('HubError: org/conflict')


def test_a_push_whose_answer_is_lost_is_told_all_the_same(pushed, server):
    changes, address = pushed[0]['answer lost']['value']
    assert changes == pushed[0]['first']['value'][0]
    assert address.endswith(f'/org/lost/commit/{server.refs["org/lost"]["main"]}')
    assert server.count['org/lost commit'] == 1


def test_a_push_that_another_one_overtakes_is_no_mixture_of_the_two(pushed, server):
    outcomes, whole = pushed
    assert set(outcomes['overtaken']['value'][0]) == {'README.md', 'sha256.json', 'recipe.toml'}
    assert server.files('org/overtaken')['recipe.toml'] == (whole / 'recipe.toml').read_bytes()
    assert b'apache-2.0' in server.files('org/overtaken')['README.md']


@pytest.mark.skipif(huggingface_hub.__version__.startswith('0.'), reason='its sessions are those of requests')
def test_a_hub_that_says_nothing_is_not_waited_for_without_end(pushed):
    outcomes, _ = pushed
    assert outcomes['silent']['error'].startswith('HubError: org/silent: ')
    assert 'cannot be reached' in outcomes['silent']['error']


def test_a_pushed_model_is_timm_s_without_this_package(pushed, server, tmp_path):
    assert set(server.files('org/model')) == {'.gitattributes', 'README.md', 'config.json', 'model.safetensors'}
    code = (
        'import sys, json; sys.modules["timm_pudnet"] = None\n'
        'import timm, torch\n'
        'model = timm.create_model("hf-hub:org/model", pretrained=True).eval()\n'
        'with torch.inference_mode(): print(json.dumps(model(torch.ones(1, 3, 32, 32)).tolist()))'
    )
    known = {key: value for key, value in os.environ.items() if not key.startswith('HF_')}
    home = {'HF_HOME': str(tmp_path), 'HF_ENDPOINT': server.endpoint, 'HF_HUB_DISABLE_XET': '1', 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [sys.executable, '-c', code], env={**known, **home}, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == pushed[0]['model']['value']


FAULTS = {
    'org/missing': (None, 'NotFoundError', ['org/missing', 'no such repository']),
    'org/test_resnet.tiny@nowhere': (None, 'NotFoundError', ['nowhere', 'revision']),
    'org/no-file': ('no file', 'NotFoundError', ['org/no-file', 'a file']),
    'org/secret': (401, 'HubError', ['org/secret', '401', 'HF_TOKEN']),
    'org/forbidden': (403, 'HubError', ['org/forbidden', '403', 'token']),
    'org/gated': ('gated', 'HubError', ['org/gated', 'gated', 'ask for access']),
    'org/busy': (429, 'HubError', ['org/busy', '429', 'too many']),
    'org/down': ('down', 'HubError', ['org/down', '500', 'later']),
    'org/slow': ('slow', 'HubError', ['org/slow', 'cannot be reached']),
    'org/hotel': ('html', 'HubError', ['org/hotel', 'HF_ENDPOINT']),
    'org/wrong': ('wrong', 'HubError', ['org/wrong', 'model.safetensors', 'damaged']),
}


@pytest.fixture(scope='module')
def pulled(pushed, server, client, tiny_files, tmp_path_factory):
    """What came of pulling, in one process with a new cache: the cache, and the outcomes by name."""
    home = tmp_path_factory.mktemp('puller')
    for repo, (fault, _, _) in FAULTS.items():
        if fault:
            server.commit(repo, tiny_files)
            server.faults[repo] = fault
    for repo, fault in {'org/flaky': 'flaky', 'org/cut': 'cut', 'org/two': 'waiting', 'org/xet': 'xet'}.items():
        server.commit(repo, tiny_files)
        server.faults[repo] = fault
    server.commit('org/cut-by-hand', tiny_files)
    server.commit('org/disk', tiny_files)
    server.commit('org/newer', tiny_files)
    good = server.commit('org/worse', tiny_files)
    server.commit('timm-pudnet/only-there.x', {})
    metric = {'value': 50, 'args': {'interval': 2, 'n_way': 5, 'n_shot': 1}}
    server.cards['timm-pudnet/only-there.x'] = {'license': 'mit', 'model-index': [{'results': [{'metrics': [metric]}]}]}
    evil = {'pytorch_model.bin': b'cos\nsystem\n', 'evil.py': b'raise SystemExit', '../../escape.json': b'{}'}
    evil['model-../../-of-00002.safetensors'] = b''
    server.commit('org/hostile', {**tiny_files, **evil})
    in_shards = server.files('timm-pudnet/test_resnet.shards')
    server.commit('org/hostile-shards', {**in_shards, 'mine-00001-of-00002.safetensors': b'', **evil})
    server.commit('org/bent', server.files('org/test_resnet.tiny'))
    server.commit('org/llm', {'config.json': b'{"model_type": "llama"}', 'model.safetensors': bytes(10)})
    server.commit('org/timm', {'config.json': b'{"architecture": "resnet18"}', 'model.safetensors': bytes(10)})
    server.commit('org/halves', {'config.json': tiny_files['config.json'], 'model.safetensors': b'\x08'})
    first = server.refs['org/test_resnet.tiny']['main']
    steps = {
        'bits': ['digest', 'org/test_resnet.tiny'],
        'pinned': ['digest', f'hf-hub:org/test_resnet.tiny@{first}'],
        'shards': ['served', 'test_resnet.shards'],
        'architecture': ['served', 'test_resnet'],
        'list cache': ['listed', 'cache'],
        'hostile': ['digest', 'org/hostile'],
        'hostile shards': ['digest', 'org/hostile-shards'],
        'altered config': ['bent', 'org/bent', 0],
        'cut config': ['bent', 'org/bent', 100],
        'other': ['pull', 'org/llm'],
        'timm': ['pull', 'org/timm'],
        'published damaged': ['pull', 'org/halves'],
        'flaky': ['digest', 'org/flaky'],
        'cut': ['digest', 'org/cut'],
        'two': ['two_at_once', 'org/two'],
        'truncated': ['truncated', 'org/cut-by-hand'],
        'flipped': ['flipped', 'org/cut-by-hand'],
        'xet flipped': ['by_xet', 'flipped', 'org/xet'],
        'xet': ['by_xet', 'digest', 'org/xet'],
        'xet truncated': ['by_xet', 'truncated', 'org/xet'],
        'full': ['full_disk', 'org/disk'],
        'after full': ['digest', 'org/disk'],
        'cli pull': ['cli', 'pull', 'org/test_resnet.tiny'],
        'cli list': ['cli', 'list', '--hub'],
        'cli fault': ['cli', 'pull', 'org/missing'],
        'without org': ['pull', 'test_resnet.tiny'],
        'beside a folder': ['pull_beside', 'org/test_resnet.tiny'],
        **{repo: ['pull', repo] for repo in FAULTS},
        'down': ['digest', 'org/down'],
        'down, served': ['served', 'org/down'],
        'down, by prefix': ['digest', 'hf-hub:org/down'],
        'newer 0': ['fetch', 'org/newer'],
        'newer 1': ['control', 'commit'],
        'newer 2': ['fetch', 'org/newer'],
        'newer 3': ['pull', 'org/newer'],
        'newer 4': ['control', 'down'],
        'newer 5': ['pull', 'org/newer'],
        'good': ['digest', 'org/worse'],
        'worse 1': ['control', 'worse'],
        'worse 2': ['pull', 'org/worse'],
        'worse 3': ['control', 'worse-down'],
        'good again': ['digest', 'org/worse'],
        'good by commit': ['digest', f'org/worse@{good}'],
    }
    server.controls['commit'] = lambda: server.commit('org/newer', {**tiny_files, 'README.md': b'new'})
    server.controls['down'] = lambda: server.faults.update({'org/newer': 'down'})
    wrong = {'sha256.json': json.dumps({'config.json': '0' * 64}).encode()}
    server.controls['worse'] = lambda: server.commit('org/worse', {**tiny_files, **wrong})
    server.controls['worse-down'] = lambda: server.faults.update({'org/worse': 'down'})
    outcomes = client(home, *steps.values())
    return home, dict(zip(steps, outcomes, strict=True))


@pytest.fixture(scope='module')
def digest(tiny_folder):
    return timm_pudnet.evaluation.weights_digest(timm_pudnet.PudNet.from_pretrained(tiny_folder))


@pytest.mark.parametrize(
    'name',
    ['bits', 'pinned', 'shards', 'architecture', 'hostile', 'flaky', 'cut', 'two', 'xet', 'flipped', 'xet flipped'],
)
def test_pulled_weights_are_those_pushed_to_the_bit(name, pulled, digest):
    assert pulled[1][name].get('value') == digest, pulled[1][name]


def test_a_bad_commit_leaves_what_the_cache_has_of_a_good_one(pulled, digest):
    assert 'published damaged (config.json)' in pulled[1]['worse 2']['error']
    for name in ('good', 'good again', 'good by commit'):
        assert pulled[1][name].get('value') == digest, pulled[1][name]


@pytest.mark.parametrize('name', ['truncated', 'xet truncated'])
def test_a_file_of_the_cache_that_was_cut_by_hand_is_fetched_again(name, pulled, digest):
    outcome = pulled[1][name]
    assert outcome.get('value') == digest, outcome
    assert len(outcome['warnings']) == 1
    assert 'model.safetensors' in outcome['warnings'][0]


@pytest.mark.parametrize('name', ['altered config', 'cut config'])
def test_a_config_of_the_cache_that_was_changed_by_hand_is_fetched_again(name, pulled, digest):
    outcome = pulled[1][name]
    assert outcome.get('value') == digest, outcome
    assert len(outcome['warnings']) == 1
    assert 'config.json' in outcome['warnings'][0]


def test_a_full_disk_is_told_and_the_next_pull_works(pulled, digest):
    assert 'HubError: org/disk@main: the disk of' in pulled[1]['full']['error']
    assert pulled[1]['after full'].get('value') == digest


@pytest.mark.parametrize('repo', FAULTS)
def test_a_fault_is_one_line_that_names_the_repository(repo, pulled):
    _, kind, needles = FAULTS[repo]
    outcome = pulled[1][repo]
    assert outcome.get('error', '').startswith(f'{kind}: '), outcome
    assert '\n' not in outcome['error']
    for needle in needles:
        assert needle in outcome['error']


def test_who_may_have_meant_a_folder_is_told_that_there_is_none(pulled):
    for name in ('down', 'down, served'):
        assert '; nor is there a folder org/down' in pulled[1][name]['error']
    assert 'resnet18.mixed56' in pulled[1]['down, served']['error'], 'what is at hand'
    assert 'folder' not in pulled[1]['down, by prefix']['error']


def test_a_pull_goes_to_the_hub_whatever_lies_in_the_current_folder(pulled, server):
    newest = server.refs['org/test_resnet.tiny']['main']
    for name in ('without org', 'beside a folder'):
        assert pulled[1][name].get('value', '').endswith(newest), pulled[1][name]


def test_nothing_but_our_files_is_fetched(pulled, server):
    home, outcomes = pulled
    assert server.gets('evil.py') == server.gets('pytorch_model.bin') == server.gets('escape') == 0
    assert not [path for path in home.rglob('*') if path.suffix in ('.py', '.bin') or 'escape' in path.name]
    assert 'no hypernetwork, by its config.json' in outcomes['other']['error']
    assert "but a timm model, for timm.create_model('hf-hub:org/timm')" in outcomes['timm']['error']
    fetched = [path for _, path in server.asked if path.startswith('/org/llm/resolve/')]
    assert fetched, 'its config was looked at'
    assert not [path for path in fetched if 'model.safetensors' in path], 'weights of another kind are not downloaded'
    assert outcomes['hostile shards'].get('value') == outcomes['bits'].get('value')
    assert not [path for _, path in server.asked if 'mine-00001' in path]
    assert 'published damaged' in outcomes['published damaged']['error']
    assert not server.leaked


def test_the_command_line_pulls_and_lists(pulled):
    code, out, _ = pulled[1]['cli pull']['value']
    assert code == 0
    assert 'apache-2.0' in out
    assert 'timm-pudnet predict test_resnet IMAGES --hypernet org/test_resnet.tiny' in out
    code, out, _ = pulled[1]['cli list']['value']
    assert code == 0
    assert re.search(r'^resnet18\.mixed +embedded +\d\d\.\d\d ± ', out, re.M), out
    assert re.search(r'^timm-pudnet/only-there\.x +hub +50\.00 ± 2\.00 % \(5-way, 1 labels\) .* mit$', out, re.M), out
    code, out, err = pulled[1]['cli fault']['value']
    assert (code, out, err.count('\n')) == (2, '', 1)


def test_a_pull_brings_a_newer_commit_and_a_load_takes_what_is_there(pulled):
    before, new, loaded, renewed, _, kept = (pulled[1][f'newer {number}'] for number in range(6))
    assert loaded['value'] == before['value'], 'a load does not ask'
    assert renewed['value'].endswith(new['value'])
    assert kept['value'] == renewed['value'], 'the cache serves while the Hub is down'
    assert '500' in kept['warnings'][0]


def test_what_is_cached_is_listed_with_accuracy_size_and_licence(pulled):
    (line,) = [row for row in pulled[1]['list cache']['value'] if row.startswith('org/test_resnet.tiny')]
    assert '61.25 ± 1.50 %' in line
    assert '2-way, 10 labels' in line
    assert 'apache-2.0' in line


def test_offline_the_cache_serves_the_same_bits_and_says_what_it_lacks(pulled, client, digest, server):
    before = len(server.asked)
    steps = [
        ['digest', 'org/test_resnet.tiny'],
        ['digest', 'hf-hub:org/test_resnet.tiny@main'],
        ['served', 'test_resnet.shards'],
        ['served', 'test_resnet'],
        ['pull', 'org/test_resnet.tiny'],
        ['pull', 'org/never'],
        ['served', 'test_resnet.never'],
        ['truncated', 'org/two'],
        ['fetch', 'org/wrong'],
    ]
    outcomes = client(pulled[0], *steps, HF_HUB_OFFLINE='1')
    assert [outcome.get('value') for outcome in outcomes[:4]] == [digest] * 4
    assert 'snapshots' in outcomes[4]['value']
    assert 'was not asked for' in outcomes[4]['warnings'][0]
    for outcome, needle in zip(outcomes[5:], ['org/never', 'test_resnet.never', 'damaged', 'org/wrong'], strict=True):
        assert needle in outcome['error']
        assert 'HF_HUB_OFFLINE' in outcome['error']
    assert len(server.asked) == before, 'nothing was asked'
