"""Two processes on this machine, started by torchrun, against one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.testing import assert_close

import timm_pudnet
from timm_pudnet import PudNet
from timm_pudnet.config import InputError
from timm_pudnet.training import Augmentation, LossWeights, meta_train
from timm_pudnet.training.processes import Processes

pytest.importorskip('accelerate')

SCRIPT = """
import contextlib, io, json, os, sys, warnings
from pathlib import Path
import torch
torch.set_num_threads(1)
import safetensors.torch
from timm_pudnet import hypernet, InputError
from timm_pudnet.cli import main
from timm_pudnet.training import ImageBank, Recipe, meta_train, watch

root, rank = Path(sys.argv[1]), int(os.environ['RANK'])
tensors = safetensors.torch.load_file(root / 'bank.safetensors')
bank = ImageBank(tensors['images'], tensors['labels'], list('abcdef'))
wrote = []
def listen(event, args):
    if event == 'os.rename' or event == 'open' and isinstance(args[1], str) and set(args[1]) & set('wxa'):
        if str(root) in str(args[0]):
            wrote.append(Path(os.fsdecode(args[0])).name)
sys.addaudithook(listen)
found = {}
for name, recipe in json.loads((root / 'recipes.json').read_text()).items():
    folder = None if name == 'too few' else root / name
    for last in (2, None):  # stopped once, and resumed
        try:
            net = meta_train(
                Recipe.from_dict(recipe), folder, banks=[bank], device='cpu', max_steps=last, progress=rank == 1
            )
        except InputError as error:
            found[name] = str(error)
            break
        found[name] = net.config.training['machine']
        if last is None:
            weights = {key: value.clone() for key, value in net.state_dict().items()}
found['wrote'] = wrote[:]
for place in ('apart', 'apart' if rank == 0 else 'elsewhere'):  # as on two machines without a shared disk
    try:
        meta_train(Recipe.from_dict(recipe), root / place, banks=[bank], device='cpu', max_steps=1, progress=False)
    except InputError as error:
        found['apart'] = str(error)
out = root.with_name(root.name + '-results')
out.mkdir(exist_ok=True)
safetensors.torch.save_file(weights, out / f'{rank}.safetensors')
with contextlib.redirect_stdout(io.StringIO()) as printed:
    try:
        main(['train', str(root / 'recipe.toml'), '--out', str(root / 'by command')], standalone_mode=False)
        found['command'] = 0
    except SystemExit as error:
        found['command'] = error.code
    except BaseException as error:
        found['command'] = getattr(error, 'exit_code', repr(error))
found['printed'] = printed.getvalue()
(out / f'{rank}.json').write_text(json.dumps(found))
"""

COMMAND = """
[hypernet]
model_name = "test_resnet"
sketch_width = 8
sketch_channels = [4, 4]
input = {{input_size = [3, 16, 16]}}
[data]
images = {images}
[groups]
n_way = 2
n_shot = 2
n_query = 1
per_step = 2
[schedule]
images = 12
"""


@pytest.fixture(scope='module')
def recipes(make_recipe, tmp_path_factory):
    """Five groups a step, so that one process has three and the other two."""
    hypernet = {'model_kwargs': {'drop_rate': 0.2}}
    groups = {'per_step': 5, 'turns': 1, 'conditions': 1.0, 'sketch_groups': 2, 'sketch_images': 2}
    adamw = make_recipe(4, hypernet=hypernet, groups=groups, augmentation=Augmentation())
    hypernet = {'generator': 'residual', 'predict_norm': True}
    schedule = {'optimizer': 'sgd', 'rate': 0.02, 'ema': 0.9}
    sgd = make_recipe(4, hypernet=hypernet, schedule=schedule, groups={'per_step': 3})
    earlier = PudNet.for_target(**vars(sgd.hypernet))
    undoing = make_recipe(
        4,
        hypernet=hypernet,
        groups={'per_step': 3, 'conditions': 0.8},
        losses=LossWeights(metric=0.0, full=0.0, consistency=0.0, sketch=0.0, undoing=1.0),
        schedule={**schedule, 'rate': 0.0, 'fixed_statistics': True, 'fixed_encoder': True},
        start=str(earlier.save_pretrained(tmp_path_factory.mktemp('earlier') / 'hypernet')),
    )
    return {'too few': make_recipe(4, groups={'per_step': 1}), 'adamw': adamw, 'undoing': undoing, 'sgd': sgd}


@pytest.fixture(scope='module')
def two(recipes, bank, pictures, write_folder, tmp_path_factory, fresh_process):
    """The folder that two processes trained into, and what each of them found."""
    root = tmp_path_factory.mktemp('processes') / 'runs'
    write_folder(root / 'pictures', *pictures(15, size=16))
    (root / 'recipe.toml').write_text(COMMAND.format(images=json.dumps(str(root / 'pictures'))))
    safetensors.torch.save_file({'images': bank.images, 'labels': bank.labels}, root / 'bank.safetensors')
    (root / 'recipes.json').write_text(json.dumps({name: recipe.to_dict() for name, recipe in recipes.items()}))
    (root.parent / 'script.py').write_text(SCRIPT)
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        port = listener.getsockname()[1]
    launch = ('-m', 'torch.distributed.run', '--nproc-per-node', 2, '--master-addr', '127.0.0.1', '--master-port', port)
    code, _, errors = fresh_process(*launch, root.parent / 'script.py', root, timeout=900)
    assert code == 0, errors[:8000]
    results = root.with_name('runs-results')
    return root, [
        (
            json.loads((results / f'{rank}.json').read_text()),
            safetensors.torch.load_file(results / f'{rank}.safetensors'),
        )
        for rank in range(2)
    ]


def test_both_processes_hold_the_same_weights(two):
    _, ((_, first), (_, second)) = two
    assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize('name', ['adamw', 'undoing', 'sgd'])
def test_two_processes_learn_what_one_does(name, two, recipes, bank, tmp_path):
    root, _ = two
    meta_train(recipes[name], tmp_path, banks=[bank], device='cpu', progress=False)
    logs = [[json.loads(line) for line in (f / 'log.jsonl').read_text().splitlines()] for f in (tmp_path, root / name)]
    assert [entry['step'] for entry in logs[0]] == [1, 2, 3, 4]
    assert_close(logs[1], logs[0], rtol=1e-4, atol=1e-5)
    one, both = (safetensors.torch.load_file(folder / 'checkpoint.safetensors') for folder in (tmp_path, root / name))
    # Adam's step is its rate wherever a gradient is rounding alone: of such weights there may be a few.
    assert one.keys() == both.keys()
    far = total = 0
    for key in one:
        if one[key].is_floating_point():
            far += int((one[key] - both[key]).abs().gt(1e-5 + 1e-3 * one[key].abs()).sum())
            total += one[key].numel()
        elif key != 'log':  # told above
            assert_close(both[key], one[key], rtol=0, atol=0)
    assert far <= (0 if name == 'sgd' else 0.001 * total), (far, total)


def test_only_the_first_process_writes(two):
    root, ((first, _), (second, _)) = two
    assert 'checkpoint.safetensors' in ' '.join(first['wrote'])
    assert second['wrote'] == []
    assert len(list((root / 'adamw' / 'board').iterdir())) == 2  # one for the start and one for the resumption
    assert '2 processes' in first['adamw']


def test_processes_that_find_other_checkpoints_do_not_go_on(two):
    root, found = two
    for (one, _), place in zip(found, ('apart', 'elsewhere'), strict=True):
        assert str(root / place) in one['apart']
        assert 'a folder that all machines share' in one['apart']


def test_fewer_groups_in_a_step_than_processes_is_one_line(two):
    _, found = two
    for one, _ in found:
        assert one['too few'] == '2 processes, but per_step is 1: raise it to their number or more'


def test_the_command_line_trains_in_two_processes(two):
    root, ((first, _), (second, _)) = two
    assert (first['command'], second['command']) == (0, 0)
    assert 'Wrote' in first['printed']
    assert second['printed'] == ''
    timm_pudnet.load_hypernet(root / 'by command')


DIES = """
import importlib, os, sys
import torch
from timm_pudnet.cli import main
from timm_pudnet.training import run as engine

torch.set_num_threads(1)
loop = importlib.import_module('timm_pudnet.training.meta_train')
loop.go = lambda run, folder, seconds, *rest: engine.go(run, folder, 0.0, *rest)  # a checkpoint after every step
if os.environ['RANK'] == '1':
    gradients = engine.Run._gradients
    def dies(self, before):
        if self.step == 3:
            os.kill(os.getpid(), 9)
        return gradients(self, before)
    engine.Run._gradients = dies
main(['train', sys.argv[1], '--out', sys.argv[2]])
"""


def test_a_process_that_dies_is_told_in_one_line_and_the_training_goes_on_later(
    pictures, write_folder, tmp_path, fresh_process
):
    write_folder(tmp_path / 'pictures', *pictures(15, size=16))
    recipe = COMMAND.format(images=json.dumps(str(tmp_path / 'pictures'))).replace('images = 12', 'images = 60')
    (tmp_path / 'recipe.toml').write_text(recipe)
    (tmp_path / 'script.py').write_text(DIES)
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        port = listener.getsockname()[1]
    env = {**os.environ, 'PYTHONPATH': str(Path(timm_pudnet.__file__).parents[1]), 'OMP_NUM_THREADS': '1'}
    env |= {'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, tmp_path / 'script.py', tmp_path / 'recipe.toml', tmp_path / 'out'],
            env={**env, 'RANK': str(rank), 'LOCAL_RANK': str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [2, -9], printed
    errors = [line for line in printed[0].splitlines() if line.startswith('Error: ')]
    assert len(errors) == 1
    assert 'another process of this training is gone' in errors[0]
    assert 'Traceback' not in printed[0]
    assert not (tmp_path / 'out' / 'model.safetensors').exists()
    log = (tmp_path / 'out' / 'run' / 'log.jsonl').read_text()
    assert len(log.splitlines()) == 3
    code, _, stderr = fresh_process(
        '-m', 'timm_pudnet.cli', 'train', tmp_path / 'recipe.toml', '--out', tmp_path / 'out'
    )
    assert code == 0, stderr
    timm_pudnet.load_hypernet(tmp_path / 'out')
    whole = (tmp_path / 'out' / 'run' / 'log.jsonl').read_text()
    assert whole.startswith(log)
    assert len(whole.splitlines()) == 5


def test_several_processes_without_accelerate_are_told_what_to_install(monkeypatch, one_line):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    with pytest.raises(InputError) as error:
        Processes()
    one_line(error, 'accelerate', 'pip install')


def test_one_process_needs_no_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    alone, tensor = Processes(), torch.ones(3)
    alone.sum_([tensor])
    alone.wait()
    assert (alone.rank, alone.count, tensor.tolist()) == (0, 1, [1, 1, 1])
