"""Take a hypernetwork by its name, predict from your images, and fine-tune what was predicted.

    python examples/pull_and_finetune.py resnet18.mixed56 examples/fashion --out tuned-model

HYPERNET is anything that `timm_pudnet.load_hypernet` takes: one that ships with the package, a folder, or org/name on
the Hugging Face Hub.
"""

from pathlib import Path

import click

import timm_pudnet
from timm_pudnet.predict import check_output
from timm_pudnet.training import FineTuning


@click.command(help=__doc__)
@click.argument('hypernet')
@click.argument('images')
@click.option('--epochs', default=None, type=int, help='At most; by default as many as the number of images asks for.')
@click.option('--out', type=click.Path(path_type=Path), required=True, help='New folder for the model.')
def main(hypernet: str, images: str, epochs: int | None, out: Path) -> None:
    check_output(out)
    network = timm_pudnet.load_hypernet(hypernet)
    print(f'{network.name} predicts {network.config.model_name}')
    # timm_pudnet.finetune(...) does the same in one call; this shows what happened on the way.
    tuning = FineTuning(network.config.model_name, images, hypernet=network, epochs=epochs)
    tuning.run()
    if tuning.held is None:
        print('too few images a class to keep any aside: not tested')
    else:
        before, best = tuning.before['accuracy'], tuning.best['accuracy']
        print(f'on {len(tuning.held.labels)} images kept aside: predicted {before:.1f} %, fine-tuned {best:.1f} %')
        print('(they chose the epoch, so the second number flatters a little)')
    print(f'wrote {timm_pudnet.save_model(tuning.result(), out)}')


if __name__ == '__main__':
    main()
