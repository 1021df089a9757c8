"""What a hypernetwork that the Hub's cache already has costs to find, against reading its file.

    python tests/benchmarks/pull.py hub/resnet18.fashion_set --out tests/benchmarks/pull.json

The Hub is a server on this machine; the client is huggingface_hub, in this process, with an empty cache at first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from hub_server import LoopbackHub


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--rounds', type=int, default=31)
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    with LoopbackHub() as hub, tempfile.TemporaryDirectory() as home:
        os.environ.update(HF_HOME=home, HF_ENDPOINT=hub.endpoint, HF_HUB_DISABLE_XET='1')
        os.environ.pop('HF_HUB_OFFLINE', None)
        import torch

        from timm_pudnet import PudNet, pull, remote

        torch.set_num_threads(1)
        hub.commit('org/name', {path.name: path.read_bytes() for path in args.folder.iterdir() if path.is_file()})
        first = seconds(lambda: remote.fetch('org/name'))
        folder = remote.fetch('org/name')
        weights = folder / 'model.safetensors'
        calls = {
            'read': weights.read_bytes,
            'pull': lambda: remote.fetch('org/name'),
            'pull_and_read': lambda: Path(remote.fetch('org/name'), 'model.safetensors').read_bytes(),
            'pull_that_asks_the_hub': lambda: pull('org/name'),
            'load_from_folder': lambda: PudNet.from_pretrained(folder),
            'load_by_name': lambda: PudNet.from_pretrained('org/name'),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(args.rounds):  # side by side, so that what else runs here hits all of them
            for name, call in calls.items():
                times[name].append(seconds(call))
        median = {name: statistics.median(found) for name, found in times.items()}
        least = {name: min(found) for name, found in times.items()}

        def ratios(name: str, over: str) -> dict[str, float]:
            return {
                'of_medians': round(median[name] / median[over], 3),
                'of_minima': round(least[name] / least[over], 3),
            }

        result = {
            'file_bytes': weights.stat().st_size,
            'rounds': args.rounds,
            'median_milliseconds': {name: round(1000 * found, 2) for name, found in median.items()},
            'least_milliseconds': {name: round(1000 * found, 2) for name, found in least.items()},
            'first_pull_milliseconds': round(1000 * first, 1),
            'pull_over_read': ratios('pull', 'read'),
            'pull_and_read_over_read': ratios('pull_and_read', 'read'),
            'load_by_name_over_load_from_folder': ratios('load_by_name', 'load_from_folder'),
            'load_by_name_over_read': ratios('load_by_name', 'read'),
            'machine': f'{platform.machine()}, 1 thread',
        }
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
    main()
