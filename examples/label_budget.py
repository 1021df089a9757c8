"""Label budget: how many labelled images a class does a prediction need?

    python examples/label_budget.py examples/fashion --out budget.json

A part of the images is kept aside for the test. Of the others so many a class are drawn, several times, and give
sketch, statistics and head; the table has the mean accuracy over the draws by each head, and by the one that the rest
teaches too, without its labels.
"""

import json
from pathlib import Path

import click
import torch

import timm_pudnet
from timm_pudnet.evaluation import mean_interval, split_held_out


@click.command(help=__doc__)
@click.argument('images')
@click.option('--model', 'model_name', default='resnet18', show_default=True)
@click.option('--hypernet', help='A name or a folder; by default the one that serves the architecture.')
@click.option(
    '--labels',
    multiple=True,
    type=click.IntRange(min=1),
    default=(1, 2, 5, 10, 20, 40),
    show_default=True,
    help='A class.',
)
@click.option('--draws', type=click.IntRange(min=2), default=10, show_default=True)
@click.option('--out', type=click.Path(path_type=Path), help='Where the numbers go, as JSON.')
def main(
    images: str, model_name: str, hypernet: str | None, labels: tuple[int, ...], draws: int, out: Path | None
) -> None:
    if out is not None and not out.parent.is_dir():
        raise click.UsageError(f'--out {out}: there is no folder {out.parent}')
    network = timm_pudnet.load_hypernet(hypernet or model_name)
    pool, tested = split_held_out(timm_pudnet.open_images(images, input=network.config.input), 0.25)
    if tested is None:
        raise click.UsageError(f'{images}: labels are needed, and two images or more of a class')
    shown = list(tested.batches())
    rows = []
    print(f'{len(tested)} images tested; accuracy, mean of {draws} draws and 95 % interval over them')
    for count in labels:
        if int(pool.labels.bincount().min()) < count:
            print(f'{count} labels a class: a class has fewer')
            continue
        found = {}
        for draw in range(draws):
            generator = torch.Generator().manual_seed(draw)
            picks = []
            for label in pool.labels.unique().tolist():
                members = (pool.labels == label).nonzero().flatten()
                picks += members[torch.randperm(len(members), generator=generator)[:count]].tolist()
            rest = sorted({*range(len(pool))}.difference(picks))
            ways = {head: {'head': head} for head in ('centroid', 'ridge', 'blend', 'logistic')}
            if rest:
                ways['with the rest unlabelled'] = {'unlabelled': pool.subset(rest)}
            for way, asked in ways.items():
                model = timm_pudnet.predict_model(
                    model_name, pool.subset(picks), hypernet=network, device='cpu', **asked
                )
                found.setdefault(way, []).append(100 * accuracy(model, shown))
        rows.append({'labels': count, **{way: mean_interval(shares) for way, shares in found.items()}})
        cells = [f'{way} {row["mean"]:5.1f} +- {row["interval"]:.1f}' for way, row in list(rows[-1].items())[1:]]
        print(f'{count:4} labels a class: {", ".join(cells)}')
    if out is not None:
        out.write_text(json.dumps({'images': images, 'tested': len(tested), 'draws': draws, 'rows': rows}, indent=2))


@torch.inference_mode()
def accuracy(model, batches):
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    return right / sum(len(labels) for _, labels in batches)


if __name__ == '__main__':
    main()
