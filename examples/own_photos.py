"""Own photos to a classifier: a folder with one subfolder a class in, a saved timm model and its answers out.

    python examples/own_photos.py examples/fashion --out my-model

A quarter of the photos is kept aside and tells how good the model is; some of them are then shown to the saved model
the way any program would that has timm alone.
"""

from pathlib import Path

import click
import timm
import torch
from PIL import Image

import timm_pudnet
from timm_pudnet.evaluation import measure_held_out, split_held_out
from timm_pudnet.predict import check_output


@click.command(help=__doc__)
@click.argument('photos', type=click.Path(path_type=Path))
@click.option('--model', 'model_name', default='resnet18', show_default=True)
@click.option('--hypernet', help='A name or a folder; by default the one that serves the architecture.')
@click.option('--out', type=click.Path(path_type=Path), required=True, help='New folder for the model.')
@click.option('--show', default=5, show_default=True, help='So many photos are classified in the end.')
def main(photos: Path, model_name: str, hypernet: str | None, out: Path, show: int) -> None:
    check_output(out)  # before any work
    network = timm_pudnet.load_hypernet(hypernet or model_name)
    source = timm_pudnet.open_images(photos, input=network.config.input)
    used, tested = split_held_out(source, 0.25)
    if tested is None:
        raise click.UsageError(f'{photos}: a folder for each class is needed, with two photos or more')
    print(f'{source.description}; {len(used)} of them give the weights')
    model = timm_pudnet.predict_model(model_name, used, hypernet=network)
    for line in measure_held_out(model, used, tested).lines():
        print(line)
    timm_pudnet.save_model(model, out)

    # From here on timm alone.
    model = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    names = model.pretrained_cfg['label_names']
    unread = {name for name, _ in [*used.skipped, *tested.skipped]}
    paths = [name for name in map(tested.name, range(len(tested))) if name not in unread]
    for path in paths[:: max(1, len(paths) // max(1, show))][:show]:
        with Image.open(photos / path) as photo, torch.inference_mode():
            answer = model(transform(photo.convert('RGB'))[None]).argmax()
        print(f'{path}: {names[answer]}')


if __name__ == '__main__':
    main()
