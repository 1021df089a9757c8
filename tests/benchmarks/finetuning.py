"""Fine-tuning from predicted weights against random ones by epoch, with intervals over seeds (paper's table VIII).

    python tests/benchmarks/finetuning.py .data/cifar100/train .data/cifar100/test --out FILE.json

The images of all FOLDERS, of those classes that the hypernetwork was not trained on, are drawn anew for each seed:
`--images` to learn from, `--tested` to test on. Every arm goes through all epochs on the same images, as
`timm_pudnet.compare` runs them. Seeds that are in the file already are not run again, so it can be stopped and started,
and several processes can share the seeds (`--seed`). A plot lands beside the file.
"""

import fcntl
import json
import sys
from pathlib import Path

import click
import torch

import timm_pudnet
from timm_pudnet.evaluation import mean_interval
from timm_pudnet.files import written_whole

ARMS = ('fine_tuned', 'adam_centralised', 'random')
SETTING = (
    'each curve is one run of all its epochs: fine_tuned (whose first epoch fits the head) and random follow a cosine '
    'to its end, so a shorter budget of their own would serve them better than the point of the long run; '
    "adam_centralised has a constant rate. intervals are 95 %, Student's t over seeds, gains paired by seed"
)


@click.command(help=__doc__)
@click.argument('folders', nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option('--model', default='resnet18', show_default=True)
@click.option('--hypernet', help='A name or a folder; by default the one that serves the architecture.')
@click.option('--classes', type=click.Choice(['unseen', 'all']), default='unseen', show_default=True)
@click.option('--images', 'count', default=10_000, show_default=True, help='Images to learn from.')
@click.option('--tested', default=2_000, show_default=True, help='Images to test on.')
@click.option('--epochs', default=10, show_default=True)
@click.option('--seed', 'seeds', multiple=True, type=int, default=range(5), show_default=True)
@click.option('--out', required=True, type=click.Path(path_type=Path))
def main(
    folders: tuple[Path, ...],
    model: str,
    hypernet: str | None,
    classes: str,
    count: int,
    tested: int,
    epochs: int,
    seeds: tuple[int, ...],
    out: Path,
) -> None:
    network = timm_pudnet.load_hypernet(hypernet or model)
    # Folders are named as examples/image_folders.py names them: 'T-shirt-top'.
    seen = {name.replace('/', '-') for name in network.config.class_names} if classes == 'unseen' else set()
    paths = [
        path for folder in folders for path in sorted(folder.glob('*/*')) if path.parent.name not in seen
    ]  # FOLDER/<class>/<image>
    if len(paths) < count + tested:
        raise click.UsageError(f'{len(paths)} images of {classes} classes, {count} + {tested} are asked for')
    settings = {'folders': [str(folder) for folder in folders], 'classes': classes, 'model': model}
    settings |= {'hypernet': network.name, 'learned': count, 'tested': tested, 'epochs': epochs}
    if not out.parent.is_dir():
        raise click.UsageError(f'--out {out}: no folder {out.parent}')
    for seed in seeds:
        if str(seed) in read(out, settings):
            click.echo(f'seed {seed} is in {out} already: move that away to run it anew')
            continue
        picks = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed))[: count + tested].tolist()
        result = timm_pudnet.compare(
            model,
            [paths[pick] for pick in picks],
            [paths[pick].parent.name for pick in picks],
            hypernet=network,
            epochs=epochs,
            holdout=tested / (count + tested),
            arms=ARMS,
            seed=seed,
        )
        if result['ended'] != 'epochs':
            sys.exit('interrupted: this seed is not kept')
        with open(f'{out}.lock', 'w') as lock:  # another process may write at this moment
            fcntl.flock(lock, fcntl.LOCK_EX)
            runs = {**read(out, settings), str(seed): result}
            summary = summarise(runs)
            with written_whole(out) as beside:
                text = {'setting': SETTING, **settings, 'summary': summary, 'runs': runs}
                beside.write_text(json.dumps(text, indent=2) + '\n')
        plot(summary, out.with_suffix('.png'), f'{model}, {result["images"]:,} images of {result["classes"]} classes')
        click.echo(json.dumps(summary['after'], indent=2))


def read(path: Path, settings: dict) -> dict:
    found = json.loads(path.read_text()) if path.exists() else {'runs': {}}
    own = {'model': 'model_name', 'hypernet': 'hypernet', 'tested': 'tested', 'epochs': 'epochs', 'learned': 'images'}
    wrong = [name for name, value in settings.items() if found.get(name, value) != value]  # older files have fewer
    for run in found['runs'].values():  # and each run tells its own; shares of classes may round its numbers by one
        for name, key in own.items():
            given, value = run[key], settings[name]
            if given != value and not (isinstance(value, int) and name != 'epochs' and abs(given - value) <= 1):
                wrong.append(name)
    if wrong:
        raise click.UsageError(f'{path} is of other settings: choose another --out')
    return found['runs']


def interval(values: list[float]) -> dict[str, float | None]:
    """Mean and half-width of the 95 % interval; None for one value."""
    found = mean_interval(values)
    return found if len(values) > 1 else {**found, 'interval': None}


def summarise(runs: dict) -> dict:
    """By epoch: accuracy and seconds of each arm, and the gain of `fine_tuned` over each other one."""
    table = {
        seed: {name: {point['epoch']: point for point in points} for name, points in run['arms'].items()}
        for seed, run in runs.items()
    }
    epochs = sorted(set.intersection(*({*arms[name]} for arms in table.values() for name in ARMS)))
    rows = []
    for epoch in epochs:
        row = {'epoch': epoch}
        for name in ARMS:
            points = [arms[name][epoch] for arms in table.values()]
            row[name] = interval([point['accuracy'] for point in points])
            row[name]['seconds'] = sum(point['seconds'] for point in points) / len(points)
            if name != 'fine_tuned':
                gains = [
                    arms['fine_tuned'][epoch]['accuracy'] - arms[name][epoch]['accuracy'] for arms in table.values()
                ]
                row[f'gain_over_{name}'] = interval(gains)
        rows.append(row)
    least = {key: min(rows, key=lambda row, key=key: row[key]['mean']) for key in rows[0] if key.startswith('gain')}
    return {
        'seeds': len(table),
        'predicted': interval([arms['predicted'][0]['accuracy'] for arms in table.values()]),
        'curves': rows,
        'least': {key: {'epoch': row['epoch'], **row[key]} for key, row in least.items()},
        'after': {key: rows[min(10, len(rows)) - 1][key] for key in ('epoch', *ARMS, *least)},
    }


def plot(summary: dict, path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.add_subplot()
    for number, name in enumerate(ARMS):
        rows = [(row['epoch'], row[name]['mean'], row[name]['interval'] or 0) for row in summary['curves']]
        epochs, means, halves = zip(*rows, strict=True)
        axes.plot(epochs, means, color=f'C{number}', marker='.', label=name.replace('_', ' '))
        low, high = ([mean + sign * half for mean, half in zip(means, halves, strict=True)] for sign in (-1, 1))
        axes.fill_between(epochs, low, high, color=f'C{number}', alpha=0.15, linewidth=0)
    predicted = summary['predicted']['mean']
    axes.axhline(predicted, color='grey', linestyle=':', label='predicted, no training')
    axes.set_xlabel('epochs')
    axes.set_ylabel(f'accuracy, % (95 % over {summary["seeds"]} seeds)')
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    with written_whole(path) as beside:
        figure.savefig(beside, format='png', dpi=150)


if __name__ == '__main__':
    main()
