"""What becomes of every timm architecture that has convs: described, its hypernetwork built, weights predicted.

    python tests/architectures.py [--table tests/architectures.jsonl] [NAME ...]

Goes on where an earlier run stopped: an architecture that the table holds is left out. `tests/test_architectures.py`
checks the table and runs a sample anew. Timm's own alone; those of which timm fetches a part need a network.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections import Counter
from pathlib import Path

import timm
import torch
from torch import nn

from timm_pudnet import InputConfig, PudNet, PudNetError, plan_hypernet, predict_model
from timm_pudnet.config import first_line

TABLE = Path(__file__).with_suffix('.jsonl')
SMALL = 64  # side of the images, where the architecture takes them; else its own input size
MOST = 1_300_000_000  # weights of a target whose hypernetwork is built, in 24 GB; of larger ones the size is worked out
WIDEST = 64  # sketch that weights are predicted from; wider ones, the default of large targets, would only cost time
FIELDS = {'generator': 'residual', 'min_predicted': 0.0}


def timm_models() -> list[str]:
    """Timm's own architectures, without those that this package registers."""
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith('timm.')]


def has_convs(name: str) -> bool:
    """Whether an architecture has convs beyond one that cuts images into patches."""
    with torch.device('meta'):
        model = timm.create_model(name, num_classes=2)
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
    convs = [module for module in model.modules() if isinstance(module, kinds)]
    return len(convs) > 1 or any(module.kernel_size != module.stride for module in convs)


def check(name: str) -> dict:
    """One row of the table; raises where something that must hold does not."""
    row: dict = {'name': name}
    plan = plan_hypernet(name, **FIELDS)
    row |= {
        'weights': plan.weights,
        'layers': len(plan.target.layers),
        'predicted': round(plan.target.predicted_share, 4),
        'hypernetwork': round(plan.parameters / plan.weights, 4),
        'sketch_width': plan.config.sketch_width,
    }
    width = min(WIDEST, plan.config.sketch_width)
    fields = FIELDS | {'sketch_width': width, 'sketch_channels': (width // 8, width // 4)}
    fields['generator_kwargs'] = plan.config.generator_kwargs
    side = InputConfig(input_size=(plan.target.in_chans, SMALL, SMALL))
    if plan.weights > MOST:
        return row | {'result': 'size worked out'}
    started = time.perf_counter()
    try:
        row['result'] = predict(name, fields | {'input': side})
    except (RuntimeError, AssertionError, ValueError, TypeError):  # too small for its windows, pools or position tables
        row['result'] = predict(name, fields)
    return row | {'seconds': round(time.perf_counter() - started, 2)}


def predict(name: str, fields: dict) -> str:
    """Predicts for a few random images; the input size that it was done at."""
    torch.manual_seed(0)
    hypernet = PudNet.for_target(name, **fields).eval()
    size = hypernet.config.input.input_size
    images, labels = torch.rand(6, *size), torch.arange(6) % 2
    labelled = bool(hypernet.target.classifiers)
    model = predict_model(name, images, labels if labelled else None, hypernet=hypernet)
    found = model.state_dict()
    with torch.inference_mode():
        weights = hypernet(hypernet.sketch(images, labels if labelled else None))
        for layer in hypernet.target.layers:
            if layer.key in found:
                torch.testing.assert_close(found[layer.key], weights[layer.key], rtol=1e-4, atol=1e-6)
        together = model(images)
        assert together.isfinite().all(), 'an output is not finite'
        if depends_on_batch(model, images, together):  # deep networks with new weights can blow up mere rounding
            assert not depends_on_batch(model.double(), images.double()), 'the answer for an image depends on its batch'
    return f'predicted at {size[1]}x{size[2]}'


def depends_on_batch(model: nn.Module, images: torch.Tensor, together: torch.Tensor | None = None) -> bool:
    """Whether the answers for images change, by more than 1 % of the largest, when they are asked one by one."""
    together = model(images) if together is None else together
    alone = torch.cat([model(image[None]) for image in images[:2]])
    return float((alone - together[:2]).abs().max()) > 1e-2 * float(together.abs().max() + 1e-6)


def row_of(name: str) -> dict:
    """A row of the table, whatever happens."""
    try:
        return check(name)
    except PudNetError as error:
        return {'name': name, 'result': f'refused: {error}'}
    except Exception as error:  # a bug of ours, or a model that cannot run on this machine: looked into one by one
        return {'name': name, 'result': f'failed: {type(error).__name__}: {first_line(error)}'}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help='by default every architecture with convs')
    parser.add_argument('--table', type=Path, default=TABLE)
    arguments = parser.parse_args()
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)
    done = set()
    if arguments.table.exists():
        done = {json.loads(line)['name'] for line in arguments.table.read_text().splitlines()}
    for name in arguments.names or timm_models():
        if not arguments.names and (name in done or not has_convs(name)):
            continue
        row = row_of(name)
        print(json.dumps(row), flush=True)
        if name not in done:
            with arguments.table.open('a') as table:
                table.write(json.dumps(row) + '\n')
    rows = [json.loads(line) for line in arguments.table.read_text().splitlines()]
    print(Counter(row['result'].split(':')[0].split(' at ')[0] for row in rows))


if __name__ == '__main__':
    main()
