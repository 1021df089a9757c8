"""Export of a predicted model to `torch.export` and ONNX, for any number of images at once; same outputs.

pip install onnx onnxscript onnxruntime          # for ONNX; without them that part is left out, and said
python examples/export.py examples/fashion --out exported
"""

import importlib.util
from pathlib import Path

import click
import torch

import timm_pudnet
from timm_pudnet.predict import check_output


@click.command(help=__doc__)
@click.argument('images')
@click.option('--model', 'model_name', default='resnet18', show_default=True)
@click.option('--hypernet', help='A name or a folder; by default the one that serves the architecture.')
@click.option('--out', type=click.Path(path_type=Path), required=True, help='New folder.')
def main(images: str, model_name: str, hypernet: str | None, out: Path) -> None:
    check_output(out)
    model = timm_pudnet.predict_model(model_name, images, hypernet=hypernet, device='cpu')
    shown = torch.randn(5, *model.pretrained_cfg['input_size'])
    with torch.inference_mode():
        expected = model(shown)
    out.mkdir(exist_ok=True)

    batch = torch.export.Dim('batch', min=1, max=1024)
    program = torch.export.export(model, (shown[:2],), dynamic_shapes=({0: batch},))
    torch.export.save(program, out / 'model.pt2')
    loaded = torch.export.load(out / 'model.pt2').module()
    with torch.inference_mode():
        compare('torch.export', loaded(shown), expected)

    missing = [name for name in ('onnx', 'onnxscript', 'onnxruntime') if importlib.util.find_spec(name) is None]
    if missing:
        print(f'ONNX left out: pip install {" ".join(missing)}')
        return
    import onnxruntime

    path = str(out / 'model.onnx')
    torch.onnx.export(program, (), path, input_names=['images'], output_names=['logits'], dynamo=True)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    compare('ONNX', torch.from_numpy(session.run(None, {name: shown.numpy()})[0]), expected)


def compare(what, found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    print(f'{what}: {list(found.shape)}, largest difference {(found - expected).abs().max():.1e}')


if __name__ == '__main__':
    main()
