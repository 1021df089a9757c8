"""What several rooms' tests share."""

import contextlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

import timm_pudnet
from timm_pudnet import InputConfig, PudNet
from timm_pudnet.config import PudNetConfig
from timm_pudnet.training import Data, Groups, ImageBank, Recipe, Schedule

settings.register_profile('tests', derandomize=True, database=None, deadline=None)  # the same examples in every run
settings.load_profile('tests')


@pytest.fixture(scope='session', autouse=True)
def one_thread():
    """One thread: the nets are tiny, and sums then come out the same everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='session', autouse=True)
def no_hub(tmp_path_factory):
    """No test asks the Hub or sees the developer's cache of it; tests/test_loopback.py has a Hub of its own."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp('hub-cache'))
        patch.setenv('HF_HUB_OFFLINE', '1')
        patch.setenv('HF_HUB_CACHE', cache)
        patch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
        patch.setattr('huggingface_hub.constants.HF_HUB_CACHE', cache)
        yield


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same global random state and leaves the one it found."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


@pytest.fixture(scope='session')
def with_whitening():
    """Gives a hypernetwork a whitening unlike the identity, as training learns one; the hypernetwork itself."""

    def change(hypernet):
        root = torch.randn(hypernet.whitening.shape, generator=torch.Generator().manual_seed(1)) / 8
        hypernet.whitening.copy_(torch.eye(len(root)) + root @ root.t())
        return hypernet

    return change


@pytest.fixture(scope='session')
def tiny(with_whitening):
    """A new hypernetwork for timm's smallest ResNet; not to be changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hypernet = PudNet.for_target('test_resnet', sketch_width=16, input=InputConfig(input_size=(3, 32, 32)))
    return with_whitening(hypernet).eval()


@pytest.fixture(scope='session')
def random_images():
    """Makes images `[n, c, h, w]`, standard normal, and labels `[n]` of classes of unequal size, none empty."""

    def make(count=12, num_classes=3, size=(3, 32, 32), seed=0):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(count, *size, generator=generator)
        labels = torch.randint(num_classes, (count,), generator=generator)
        labels[:num_classes] = torch.arange(num_classes)
        return images, labels

    return make


@pytest.fixture(scope='session')
def one_line():
    """Checks that an error's text is one line and names these things."""

    def check(error, *needles):
        text = str(error.value)
        assert '\n' not in text.strip(), text
        for needle in needles:
            assert str(needle) in text, f'{needle!r} is not in: {text}'

    return check


@pytest.fixture(scope='session')
def tiny_folder(tmp_path_factory, with_whitening):
    """The folder of a new, tiny hypernetwork `test_resnet.tiny`; not to be changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hypernet = PudNet.for_target(
            'test_resnet',
            sketch_width=16,
            input=InputConfig(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)),
            tag='tiny',
            class_names=('ball', 'hat'),
        )
    return with_whitening(hypernet).save_pretrained(tmp_path_factory.mktemp('hypernets') / 'test_resnet.tiny')


@pytest.fixture(scope='session')
def pictures():
    """Makes pictures uint8 `[n, h, w, 3]` and their class names: a coarse pattern for each class, under noise."""

    def make(count=18, names=('cup', 'jar', 'pan'), size=32, seed=0):
        rng = np.random.default_rng(99)
        patterns = rng.integers(0, 200, (len(names), 4, 4, 3)).repeat(-(-size // 4), 1).repeat(-(-size // 4), 2)
        labels = np.arange(count) % len(names)
        noise = np.random.default_rng(seed).integers(0, 56, (count, size, size, 3))
        return (patterns[labels, :size, :size] + noise).astype(np.uint8), [names[label] for label in labels]

    return make


@pytest.fixture(scope='session')
def write_folder():
    """Writes pictures as PNG files `root/<class>/<number>.png`, or `root/<number>.png` without names; gives paths."""

    def write(root, pixels, names=None):
        paths = []
        for number, image in enumerate(pixels):
            folder = root / names[number] if names is not None else root
            folder.mkdir(parents=True, exist_ok=True)
            paths.append(folder / f'{number:04}.png')
            Image.fromarray(image).save(paths[-1])
        return paths

    return write


@pytest.fixture(scope='session')
def write_web_dataset():
    """Writes pictures uint8 `[n, h, w, 3]` and labels as a web dataset of timm with one split, `train`."""

    def write(root, pixels, labels):
        with tarfile.open(root / 'train.tar', 'w') as tar:
            for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
                file = io.BytesIO()
                Image.fromarray(image).save(file, 'PNG')
                for suffix, data in (('png', file.getvalue()), ('cls', str(label).encode())):
                    entry = tarfile.TarInfo(f'{number}.{suffix}')
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
        count = len(pixels)
        split = {'num_samples': count, 'filenames': ['train.tar'], 'shard_lengths': [count], 'name': 'train'}
        (root / '_info.json').write_text(json.dumps({'splits': {'train': split}}))

    return write


@pytest.fixture(scope='session')
def bank():
    """Six classes that can be learned: a pattern each, under noise; 3x16x16."""
    rng = torch.Generator().manual_seed(5)
    patterns = torch.randint(0, 256, (6, 1, 3, 4, 4), generator=rng).float()
    noise = torch.randint(-40, 41, (6, 10, 3, 16, 16), generator=rng)
    images = patterns.repeat_interleave(4, -1).repeat_interleave(4, -2) + noise
    labels = torch.arange(6).repeat_interleave(10)
    return ImageBank(images.clamp(0, 255).to(torch.uint8).flatten(0, 1), labels, list('abcdef'))


@pytest.fixture(scope='session')
def make_recipe():
    """Makes a recipe of a few steps for the bank; `hypernet`, `groups`, `schedule` are fields that differ.

    It has no whitening, which takes longer than the steps.
    """

    def make(steps=6, seed=0, *, hypernet=None, groups=None, schedule=None, **changes):
        small = InputConfig(input_size=(3, 16, 16))
        base = {'model_name': 'test_resnet', 'sketch_width': 16, 'sketch_channels': (4, 8), 'input': small}
        made = Groups(**{'n_way': 3, 'n_shot': 2, 'n_query': 2, 'per_step': 2, 'turns': 4, **(groups or {})})
        return Recipe(
            hypernet=PudNetConfig(**{**base, **(hypernet or {})}),
            groups=made,
            schedule=Schedule(
                **{'images': steps * made.images_per_step, 'rate': 2e-3, 'whitening': False, **(schedule or {})}
            ),
            seed=seed,
            **{'data': (Data(images='nowhere'),), **changes},
        )

    return make


@pytest.fixture(scope='session')
def fresh_process():
    """Runs `python ARGS` in a new process, one thread, that can import this package; gives what it printed."""

    path = [str(Path(timm_pudnet.__file__).parents[1]), os.environ.get('PYTHONPATH')]  # .ci/run has an older timm there

    def run(*args, cwd=None, timeout=300):
        done = subprocess.run(
            [sys.executable, *map(str, args)],
            env={**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, path)), 'OMP_NUM_THREADS': '1'},
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture(scope='session')
def nothing_written():
    """Checks that a block leaves every file and folder below `folder` as it was, hidden ones included."""

    @contextlib.contextmanager
    def check(folder):
        def listing():
            files = {path: path.read_bytes() if path.is_file() else b'' for path in sorted(folder.rglob('*'))}
            return {str(path.relative_to(folder)): zlib.crc32(content) for path, content in files.items()}

        before = listing()
        yield
        assert listing() == before

    return check


@pytest.fixture
def full_disk():
    """In the block no file can grow past a few kilobytes: writing fails as on a full disk, for native code too."""
    import resource  # which Windows lacks

    @contextlib.contextmanager
    def limit(size=8192):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit
