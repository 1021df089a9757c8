"""Hostile hypernetworks for `PudNet.from_pretrained`: configs and weights files bent in any way, and what must hold.

    python tests/fuzz_loader.py 20000 --seed 1 --out tests/benchmarks/loader_fuzz.json

Each input is loaded or refused with an error of ours, within seconds, in memory of the files' size plus 200 MB.
tests/test_files.py runs a few hundred.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import random
import re
import struct
import tempfile
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from timm_pudnet import InputConfig, PudNet, PudNetError, PudNetWarning, config, files

LOADER = (config, files)  # the rooms whose version a result names
MOST_SECONDS, MOST_BYTES = 10, 200_000_000

NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 3, 7, 16, 17, 2**31, 2**63, 10**12, 10**400, -(10**400), 1e308, 1e-320, 0.5]),
    st.integers(-(2**70), 2**70),
    st.floats(),
)
NAMES = ('resnet18', 'resnet50', 'convnext_tiny', 'maxvit_tiny_tf_224', 'vit_tiny_patch16_224', 'efficientnet_b0')
BAD = ('paper', 'residual', '../../etc/passwd', '/etc/passwd', 'hf-hub:a/b', 'local-dir:/', '\x1b[2J', '\x00', 'a' * 99)
TEXTS = st.one_of(st.text(max_size=30), st.sampled_from((*NAMES, *BAD)))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(TEXTS, inner, max_size=5)),
    max_leaves=12,
)
ARGUMENTS = re.findall(
    r'\w+',
    'layers depths dims in_chans img_size conv_mlp base_width cardinality width stem_width output_stride rank '
    'block_args embed_kernels basis_kernels largest pretrained checkpoint_path pretrained_cfg act_layer '
    'norm_layer drop_rate global_pool stem_type avg_down features_only '
    'device dtype',
)
KWARGS = st.dictionaries(
    st.sampled_from(ARGUMENTS),
    st.one_of(VALUES, st.lists(st.integers(-3, 3000), min_size=3, max_size=4), st.integers(-3, 3000), st.booleans()),
    max_size=3,
)
VARIANTS = 7
PIECES = [b'[' * 5000, b'{"a":' * 5000, b'"', b'}', b'9' * 40]


def places(node, path=()):
    """Every place in a tree of JSON, as the keys that lead there."""
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def bent(tree):
    """A tree of JSON with up to three places replaced, taken away or added to."""
    text, paths = json.dumps(tree), list(places(tree))

    @st.composite
    def bend(draw):
        tree = json.loads(text)
        for _ in range(draw(st.integers(1, 3))):
            path = draw(st.sampled_from(paths))
            new = draw(VALUES)
            if not path:
                tree = draw(st.one_of(st.just(tree), st.just(new)))
                continue
            node = tree
            try:
                for key in path[:-1]:
                    node = node[key]
                match draw(st.sampled_from(['replace', 'replace', 'take away', 'add', 'kwargs'])):
                    case 'take away':
                        del node[path[-1]]
                    case 'add' if isinstance(node, dict):
                        node[draw(TEXTS)] = new
                    case 'kwargs' if isinstance(tree, dict):
                        tree[draw(st.sampled_from(['model_kwargs', 'generator_kwargs', 'input']))] = draw(KWARGS)
                    case _:
                        node[path[-1]] = new
            except (KeyError, IndexError, TypeError):
                continue  # an earlier change took the place away
        return tree

    return bend()


@st.composite
def cut(draw, data):
    """Bytes with some of them changed, put in or taken out."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        where = draw(st.integers(0, max(0, len(data) - 1)))
        piece = draw(st.one_of(st.binary(max_size=9), st.sampled_from(PIECES)))
        data[where : where + draw(st.sampled_from([0, 1, len(piece), 10_000]))] = piece
    return bytes(data)


def packed(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + body


def shaken(data, rng):
    """Bytes with a few of them changed, doubled or taken out."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        where, length = rng.randrange(len(data) + 1), rng.choice([1, 1, 1, 2, 8, 60])
        change = rng.choice(
            [b'', bytes([rng.randrange(256)]), rng.choice(b'0123456789[]{},:"-.e').to_bytes(), data[:length]]
        )
        data[where : where + length] = change
    return bytes(data)


class Loader:
    """Loads hostile folders and keeps count of what came of them.

    Args:
        folder: Where to write them.
    """

    def __init__(self, folder):
        self.folder = folder / 'net'
        small = {'sketch_width': 8, 'sketch_channels': (2, 2), 'tag': 'tiny', 'class_names': ('ball', 'hat')}
        with torch.random.fork_rng(devices=[]):
            PudNet.for_target('test_resnet', input=InputConfig(), **small).save_pretrained(self.folder, half=True)
        self.config = (self.folder / 'config.json').read_bytes()
        self.weights = (self.folder / 'model.safetensors').read_bytes()
        length = int.from_bytes(self.weights[:8], 'little')
        self.header, self.body = json.loads(self.weights[8 : 8 + length]), self.weights[8 + length :]
        self.found = Counter()
        self.longest = self.most = self.spent = 0.0
        self.load(self.config, self.weights)  # what is allocated once is not the input's

    def inputs(self):
        """Config and weights file of a hostile folder, one of them untouched."""
        tree = json.loads(self.config)
        configs = st.one_of(
            bent(tree).map(lambda found: json.dumps(found).encode()),
            bent(tree).map(lambda found: json.dumps(found).encode()),
            cut(self.config),
            st.binary(max_size=200),
        )
        weights = st.one_of(
            bent(self.header).map(lambda found: packed(found, self.body)),
            cut(self.weights[: len(self.weights) - len(self.body)]).map(lambda found: found + self.body),
            cut(self.weights),
            st.binary(max_size=200),
        )
        return st.one_of(
            configs.map(lambda found: (found, self.weights)), weights.map(lambda found: (self.config, found))
        )

    def load(self, config, weights):
        """Loads one folder; raises AssertionError where it breaks what must hold."""
        (self.folder / 'config.json').write_bytes(config)
        (self.folder / 'model.safetensors').write_bytes(weights)
        before, started = memory('VmRSS'), time.process_time()
        forget_peak()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore', PudNetWarning)
                hypernet = PudNet.from_pretrained(self.folder)
            outcome = 'loaded'
        except PudNetError as error:
            hypernet, outcome, text = None, type(error).__name__, str(error)
        seconds, grown = time.process_time() - started, memory('VmHWM') - before
        if hypernet is None:
            assert text.isprintable(), repr(text)  # one line too
        else:
            assert all(value.isfinite().all() for value in hypernet.state_dict().values())
        assert seconds < MOST_SECONDS, f'{seconds} s'
        assert grown < len(config) + len(weights) + MOST_BYTES, f'{grown} bytes'
        self.longest, self.most, self.spent = max(self.longest, seconds), max(self.most, grown), self.spent + seconds
        self.found[outcome] += 1

    def fuzz(self, count, number=0):
        """Loads so many inputs that hypothesis makes, and of each some variants with shaken bytes, which cost less."""

        @seed(number)
        @settings(
            max_examples=count,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(self.inputs())
        def run(files):
            self.load(*files)
            rng = random.Random(zlib.crc32(files[0] + files[1]))
            for variant in range(VARIANTS):
                config, weights = files if variant % 2 else (self.config, self.weights)
                if files[0] != self.config:
                    self.load(shaken(config, rng), weights)
                else:
                    head = 8 + int.from_bytes(self.weights[:8], 'little')
                    self.load(config, shaken(weights[:head], rng) + weights[head:])

        run()


def memory(field):
    """`VmRSS`, the memory that this process has in bytes, or `VmHWM`, the most it had since `forget_peak`."""
    return 1024 * int(re.search(rf'{field}:\s*(\d+)', Path('/proc/self/status').read_text())[1])


def forget_peak():
    """Starts `VmHWM` anew."""
    Path('/proc/self/clear_refs').write_text('5')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('count', type=int)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, help='a list of runs, which this one is added to')
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        loader = Loader(Path(work))
        loaded = sum(loader.found.values())
        loader.fuzz(math.ceil(args.count / (1 + VARIANTS)), args.seed)
        result = {
            'seed': args.seed,
            'inputs': sum(loader.found.values()) - loaded,
            'outcomes': dict(loader.found),
            'seconds': math.ceil(time.perf_counter() - started),
            'longest_seconds': round(loader.longest, 3),
            'seconds_in_the_loader': round(loader.spent, 1),
            'most_bytes_of_one_input': int(loader.most),
            'loader': hashlib.sha256(b''.join(Path(room.__file__).read_bytes() for room in LOADER)).hexdigest()[:12],
            'machine': f'{platform.machine()}, 1 thread, Python {platform.python_version()}, torch {torch.__version__}',
        }
    print(json.dumps(result, indent=2))
    if args.out:
        runs = json.loads(args.out.read_text()) if args.out.exists() else []
        runs = [run for run in runs if run['seed'] != result['seed']]
        args.out.write_text(json.dumps([*runs, result], indent=2) + '\n')
