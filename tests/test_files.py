"""files.py, and what `PudNet.from_pretrained` takes from it: files that a stranger wrote."""

import json
import pickle
import shutil
import struct
import tracemalloc
import warnings
from pathlib import Path

import pytest
import torch
from fuzz_loader import Loader
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_pudnet import DamagedFileError, InputError, NotFoundError, PudNet, PudNetError, PudNetWarning
from timm_pudnet.config import PudNetConfig
from timm_pudnet.files import INDEX_NAME, WEIGHTS_NAME, parse_json, read_header, weight_files, weights_sha256


@pytest.fixture
def net(tiny_folder, tmp_path):
    """A folder of a tiny hypernetwork that may be bent."""
    return shutil.copytree(tiny_folder, tmp_path / 'net')


def bend(folder, **changes):
    path = folder / 'config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class Tensors(TorchDispatchMode):
    """Counts what tensors take, of which tracemalloc does not know."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.total += sum(x.nbytes for x in tree_leaves(found) if isinstance(x, Tensor) and not x.is_meta)
        return found


def refused(folder, one_line, *needles):
    tracemalloc.start()
    with pytest.raises(PudNetError) as error, Tensors() as tensors:
        PudNet.from_pretrained(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    one_line(error, *needles)
    assert str(error.value).isprintable()
    assert peak + tensors.total < 50_000_000


CONFIGS = {
    'a negative width': ({'sketch_width': -128}, ['sketch_width']),
    'a width that is a text': ({'sketch_width': '128'}, ['sketch_width', 'int']),
    'a terabyte layer': ({'generator_kwargs': {'basis_kernels': 10**12}}, ['generators.0.expand', '1000000000000']),
    'a layer beyond all numbers': ({'generator_kwargs': {'basis_kernels': 10**40}}, ['config.json']),
    'ten million layers': ({'model_name': 'resnet18', 'model_kwargs': {'layers': [10**7] * 4}}, ['layers', 'refused']),
    'eight thousand layers': (
        {'model_name': 'resnet18', 'model_kwargs': {'layers': [2000] * 4}},
        ['modules', 'refused'],
    ),
    'a checkpoint': ({'model_kwargs': {'checkpoint_path': 'evil.pth'}}, ['checkpoint_path', 'refused']),
    'weights from elsewhere': ({'model_kwargs': {'pretrained': True}}, ['pretrained', 'refused']),
    'a device': ({'model_kwargs': {'device': 'cpu', 'stem_width': 8192}}, ['device', 'refused']),
    'an overlay': ({'model_kwargs': {'pretrained_cfg_overlay': {'file': 'x.pth'}}}, ['overlay', 'refused']),
    'a model on the Hub': ({'model_name': 'hf-hub:org/name'}, ['hf-hub:org/name']),
    'a model in a folder': ({'model_name': 'local-dir:/etc'}, ['local-dir:/etc']),
    'a tag that is a path': ({'tag': '../../etc'}, ['tag']),
    'a tag of control characters': ({'tag': '\x1b[2J'}, ['tag']),
    'a class that clears the screen': ({'class_names': ['cup', '\x1b[2J']}, ['class_names']),
    'classes that are a text': ({'class_names': 'cup'}, ['class_names', 'list']),
    'an eta that is a list': ({'eta': [0.5]}, ['eta', 'float']),
    'a share above one': ({'deep_share': 1.5}, ['deep_share', '[0, 1]']),
    'a gain beyond floats': ({'gain': 10**400}, ['config.json']),
    'an input that is a number': ({'input': 3}, ['input']),
    'a flag that is a number': ({'context': 1}, ['context', 'bool']),
    'a format of the future': ({'format_version': 99}, ['99', 'update']),
    'a format of nonsense': ({'format_version': {'a': '\x1b'}}, ['format version']),
    'deep nesting': (
        {'training': json.loads('[' * 60 + ']' * 60) and {'a': json.loads('[' * 60 + ']' * 60)}},
        ['deeply'],
    ),
}


@pytest.mark.parametrize('case', CONFIGS)
def test_a_hostile_config_is_refused_before_memory_is_taken(case, net, one_line):
    changes, needles = CONFIGS[case]
    bend(net, **changes)
    refused(net, one_line, net / 'config.json' if needles[0] != 'generators.0.expand' else WEIGHTS_NAME, *needles)


TEXTS = {
    'brackets for ever': b'[' * 1_000_000,
    'NaN': b'{"format_version": NaN}',
    'a number without end': b'{"format_version": ' + b'9' * 5000 + b'}',
    'no UTF-8': b'\xff\xff',
    'more than any config': b'{}' + b' ' * 5_000_000,
    'nothing': b'',
}


@pytest.mark.parametrize('case', TEXTS)
def test_what_is_no_config_is_refused(case, net, one_line):
    (net / 'config.json').write_bytes(TEXTS[case])
    refused(net, one_line, net / 'config.json', *(['at most'] if case == 'more than any config' else []))


def test_keys_of_a_later_version_are_told_and_left_out(net):
    bend(net, later=1, input={**json.loads((net / 'config.json').read_text())['input'], '\x1b[2J': 2})
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        PudNet.from_pretrained(net)
    texts = [str(row.message) for row in found if row.category is PudNetWarning]
    assert len(texts) == 2
    assert 'later' in texts[0]
    assert all(text.isprintable() for text in texts)


def packed(header, body=b''):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + body


def entry(dtype='F32', shape=(2,), offsets=(0, 8)):
    return {'dtype': dtype, 'shape': shape, 'data_offsets': offsets}


UNUSABLE, SHORT, APART = 'nothing usable', ' of shape ', 'is not where the one before it ends'
HEADERS = {
    'a length of exabytes': (struct.pack('<Q', 2**63) + b'{}', 'ends in its header'),
    'a length beyond the file': (struct.pack('<Q', 100) + b'{}', 'ends in its header'),
    'no length': (b'\x01', 'ends in its header'),
    'a header of megabytes': (packed(b'{}' + b' ' * 5_000_000), 'at most'),
    'a header that is a list': (packed([]), 'its header is no object'),
    'a header of brackets': (packed(b'[' * 100_000), 'nested too deeply'),
    'a tensor of terabytes': (packed({'a': entry(shape=[2**40], offsets=[0, 2**42])}), 'its header says'),
    'a shape that overflows': (packed({'a': entry(shape=[2**40, 2**40, 0], offsets=[0, 0])}, b'x'), 'its header says'),
    'a negative shape': (packed({'a': entry(shape=[-2, -1])}, bytes(8)), UNUSABLE),
    'a shape of texts': (packed({'a': entry(shape=['2'])}, bytes(8)), UNUSABLE),
    'an unknown type': (packed({'a': entry(dtype='PICKLE')}, bytes(8)), UNUSABLE),
    'offsets that overlap': (packed({'a': entry(), 'b': entry(offsets=[4, 12])}, bytes(12)), APART),
    'offsets with a gap': (packed({'a': entry(), 'b': entry(offsets=[12, 20])}, bytes(20)), APART),
    'offsets that go back': (packed({'a': entry(offsets=[8, 0])}, bytes(8)), SHORT),
    'three offsets': (packed({'a': entry(offsets=[0, 8, 8])}, bytes(8)), UNUSABLE),
    'bytes that belong to no tensor': (packed({'a': entry()}, bytes(9)), 'its header says'),
    'a shape that is another size': (packed({'a': entry(shape=[3])}, bytes(8)), SHORT),
    'a tensor that is a text': (packed({'a': 'F32'}), UNUSABLE),
    'a name of control characters': (packed({'\x1b[2J': entry()}, bytes(8)), 'not expected'),
    'a pickle': (pickle.dumps({'a': 1}) * 10, 'ends in its header'),
}


@pytest.mark.parametrize('case', HEADERS)
def test_a_hostile_weights_file_is_refused_before_memory_is_taken(case, net, one_line):
    content, needle = HEADERS[case]
    (net / WEIGHTS_NAME).write_bytes(content)
    refused(net, one_line, net / WEIGHTS_NAME, needle)


def test_a_tensor_of_another_type_is_refused(net, one_line):
    start, entries = read_header(net / WEIGHTS_NAME)
    text = (net / WEIGHTS_NAME).read_bytes()
    (net / WEIGHTS_NAME).write_bytes(text[:8] + text[8:start].replace(b'"F32"', b'"I32"') + text[start:])
    assert len(entries) == len(read_header(net / WEIGHTS_NAME)[1])
    refused(net, one_line, WEIGHTS_NAME, 'torch.int32', 'torch.float32')


def test_json_says_where_it_is_nested_too_deeply(one_line):
    assert parse_json(b'[' * 20 + b']' * 20, 'x') is not None
    for text in (b'[' * 40 + b']' * 40, b'{"a":' * 3000 + b'1' + b'}' * 3000):
        with pytest.raises(DamagedFileError) as error:
            parse_json(text, 'that file')
        one_line(error, 'that file', 'deeply')


# What else lies in a folder


def test_code_and_pickles_in_a_folder_are_as_if_they_were_not_there(net, tmp_path, tiny_folder):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / 'ran',)

    for name in ('pytorch_model.bin', 'model.pt', 'model.pth', 'training_args.bin'):
        (net / name).write_bytes(pickle.dumps(Evil()))
    for name in ('__init__.py', 'modeling.py', 'conftest.py', 'setup.py'):
        (net / name).write_text(f'from pathlib import Path\nPath({str(tmp_path / "ran")!r}).touch()\n')
    expected = PudNet.from_pretrained(tiny_folder).state_dict()
    assert_close(PudNet.from_pretrained(net).state_dict(), expected, rtol=0, atol=0)
    (net / WEIGHTS_NAME).unlink()
    with pytest.raises(NotFoundError):
        PudNet.from_pretrained(net)
    assert not (tmp_path / 'ran').exists()


# Shards


@pytest.fixture
def shards(tiny_folder, tmp_path):
    return PudNet.from_pretrained(tiny_folder).save_pretrained(tmp_path / 'shards', max_shard_bytes=50_000)


def test_shards_hold_the_same_bits_and_none_is_above_the_size(shards, tiny_folder):
    files = weight_files(shards)
    assert len(files) > 3
    assert sorted(path.name for path in shards.iterdir()) == sorted(
        ['config.json', INDEX_NAME, *(path.name for path in files)]
    )
    bodies = [path.stat().st_size - read_header(path)[0] for path in files]
    largest = max(value.nbytes for value in PudNet.from_pretrained(tiny_folder).state_dict().values())
    assert max(bodies) <= max(50_000, largest)
    assert json.loads((shards / INDEX_NAME).read_text())['metadata']['total_size'] == sum(bodies)
    assert set(weights_sha256(shards)) == {path.name for path in files}
    expected = PudNet.from_pretrained(tiny_folder).state_dict()
    assert_close(PudNet.from_pretrained(shards).state_dict(), expected, rtol=0, atol=0)


def test_saving_over_shards_leaves_none_of_them_behind(shards, tiny_folder):
    tiny = PudNet.from_pretrained(tiny_folder)
    (shards / 'model-notes.txt').write_text('mine')
    tiny.save_pretrained(shards, overwrite=True)
    assert sorted(path.name for path in shards.iterdir()) == ['config.json', 'model-notes.txt', WEIGHTS_NAME]
    tiny.save_pretrained(shards, overwrite=True, max_shard_bytes=50_000)
    assert not (shards / WEIGHTS_NAME).exists()
    assert PudNet.from_pretrained(shards).name == tiny.name


@pytest.mark.parametrize(
    'name',
    [
        '../other.safetensors',
        '/etc/passwd',
        'model-00001-of-00002.bin',
        'a\x00b',
        7,
        'model-00001-of-00099.safetensors',
    ],
)
def test_an_index_names_shards_beside_it_only(name, shards, one_line):
    index = json.loads((shards / INDEX_NAME).read_text())
    index['weight_map']['ahru.start'] = name
    (shards / INDEX_NAME).write_text(json.dumps(index))
    refused(shards, one_line, shards / INDEX_NAME)


def test_a_shard_that_is_missing_or_doubled_is_told(shards, one_line):
    first, second = weight_files(shards)[:2]
    kept = second.read_bytes()
    second.write_bytes(first.read_bytes())
    refused(shards, one_line, shards, 'two of its shards')
    second.write_bytes(kept)
    second.unlink()
    refused(shards, one_line, INDEX_NAME, second.name)


# Fuzzing; tests/fuzz_loader.py does the same at length


def test_bent_files_are_loaded_or_refused_with_an_error_of_ours(tmp_path):
    loader = Loader(tmp_path)
    loader.fuzz(40)
    assert sum(loader.found.values()) > 300
    assert loader.found['DamagedFileError'] > 100
    assert loader.found['loaded'] > 10, 'or the inputs are so bent that nothing but their form is tried'


def test_the_guard_against_many_modules_does_not_outlive_the_loading(net, one_line):
    bend(net, model_name='resnet18', model_kwargs={'layers': [2000] * 4})
    refused(net, one_line, 'modules')
    assert len(torch.nn.Sequential(*(torch.nn.Identity() for _ in range(20_000)))) == 20_000


@pytest.mark.parametrize('letter', ['\x00', '\x1b', '\x1f', '\x7f', '\x9b', '\x9f'])
def test_names_of_classes_have_no_control_characters(letter, one_line):
    with pytest.raises(InputError) as error:
        PudNetConfig(model_name='resnet18', class_names=('cup', f'jar{letter}2J'))
    one_line(error, 'class_names', 'control characters')
    assert str(error.value).isprintable()


@pytest.mark.parametrize('value', [8193, -8193, 1e300, [8193], [[8193]], {'width': 8193}, [[[1]]], 'x' * 101, [1] * 33])
def test_arguments_that_no_architecture_needs_are_refused_before_timm_sees_them(value, one_line):
    with pytest.raises(InputError) as error:
        PudNetConfig(model_name='resnet18', model_kwargs={'stem_width': value})
    one_line(error, 'model_kwargs: stem_width', 'no architecture needs that')
    PudNetConfig(model_name='resnet18', model_kwargs={'stem_width': 8192, 'layers': [[8192]]})


def test_a_tag_has_no_two_dots(one_line):
    with pytest.raises(InputError) as error:
        PudNetConfig(model_name='resnet18', tag='of..photos')
    one_line(error, 'tag', 'of..photos')
