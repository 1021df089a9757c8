"""Writes README.md of this folder: one table of every hypernetwork, from the results files beside their weights.

    python hub/table.py            # writes
    python hub/table.py --check    # exit code 1 where README.md is not what it would write

What was measured by hand about heads stands in heads.md, where the images come from in data.md, what the machine had no time for in
not_run.md; all go below the table.
"""

import json
import sys
from pathlib import Path
from typing import Any

HUB = Path(__file__).parent
# The paper's accuracies in percent (tables I, II and VII) of what comes nearest.
RESNET18 = {'results': '73.33', 'results.cifar10': '51.05', 'results.fashion-set': '96.24'}
PAPER = {
    ('resnet18.fashion_set', 'results'): '96.24',
    ('convnet3.cifar100_set', 'results'): '64.09',
    ('resnet34.cifar100_set', 'results'): '72.87',
    **{
        (f'resnet18.{tag}', protocol): value
        for tag in ('cifar100_set', 'mixed', 'mixed56', 'mixed96')
        for protocol, value in RESNET18.items()
    },
}
PROTOCOLS = {'resnet18.fashion_set': 'fashion-set', 'resnet18.cifar100_superclass': 'cifar100-set by superclass'}
HEAD = """# Hypernetworks

Accuracy in percent on classes that were never seen in training, with its 95 % interval over groups drawn from the same classes and images
(other classes would spread more: `resnet18.cifar100_superclass` has six choices of them). Each line is from a results file that
`timm-pudnet evaluate` wrote on the committed weights; the commands are in the README of each folder. A dash: not measured.

In short: *predicted* against *ordinary training* says whether a hypernetwork is worth it. *Own sketch over another's* says whether looking
at your images is; it is near zero but under *conditions*. The rest is for those who check.

- *Protocol*: `cifar100-set` is of the 20 unseen classes of CIFAR-100; `1-label`, `5-labels`, `conditions` (each group under a random
  imaging condition), `train-support` (labels from the training images) are of the same classes. `cifar10`: all ten classes;
  `cifar10-all`: the same with the first 1,000 training images of each class as labels, some of them nearly the same picture (one group,
  its interval over test images).
- *Predicted* is by class centroids (eq. 7), and so is all that follows in its line but for *ridge*, *blend* and *logistic head*: the same
  networks with these [heads](#heads), the last where there are 40 labels a class and more; in brackets, of blend and logistic,
  ordinary training with that head, by the better of its two statistics.
- *Ordinary training*: the same architecture trained as a classifier on at least as many images of the same classes (twice as many for
  `resnet18.mixed56`, five times for `mobilenetv4_conv_small.mixed56`; for `resnet18.mixed96` three times, under conditions twice; what a
  sketch encoder alone saw besides is not counted), with the same head and calibration; in brackets with its own norm statistics.
  *Base alone*: the network that the sketch changes, as it is; ordinary training went on from it.
- *Another's sketch*: predicted from the sketch of another group (in `cifar10` and `fashion-set`, where all groups have the same classes,
  of other images of these); *own sketch over another's*: what the right one adds to that; *over another domain's*: what it adds to the
  sketch of another data set. *Over ordinary training* is over the calibrated one, group by group; in
  brackets over that with its own norm statistics (without an interval: the difference of the means alone).
- *Scratch*: training on all images of the group's classes, by Adam with and without gradient centralisation: the seconds until it is as
  good as the predicted network, over the seconds of predicting on the few groups that were trained on, whose
  accuracy stands there (in brackets: for the ends of its interval), and not that over all groups.

| hypernetwork | protocol | labels a class | predicted | ridge head | blend head | logistic head | ordinary training | base alone | \
another's sketch | own sketch over another's | over another domain's | over ordinary training | scratch | paper |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""
UNLABELLED = """
## With images without labels

The same groups and networks, with as many further images of each of their classes and of no other, labels hidden; these teach
the head by self-training (`predict_model(..., unlabelled=...)`), that of every network alike. *Labels alone*: the head that it begins
from, the ridge one in results from before there was the blend. The paper and the table above have no such images. Self-training's settings
were chosen on training images of CIFAR-10 and on the 40 unseen classes of Tiny-ImageNet.

| hypernetwork | protocol | labels + images without, a class | predicted | labels alone | over labels alone | ordinary training | raw pixels | \
over ordinary training | paper |
|---|---|---|---|---|---|---|---|---|---|
"""
# Of its tables X and XI, PudNet, PSNR and SSIM.
PAPER_DENOISING = {
    ('bsds500', 0.25): '30.80 / 0.931',
    ('bsds500', 0.5): '28.20 / 0.868',
    ('bsds500', 0.75): '26.02 / 0.807',
    ('cifar10', 0.25): '33.52 / 0.975',
    ('cifar10', 0.5): '30.82 / 0.960',
    ('cifar10', 0.75): '28.43 / 0.947',
}
DENOISERS = """
## Denoisers

PSNR in dB on images that were never seen, with its 95 % interval over images, from what `hub/denoising.py` wrote on the committed weights;
of what every denoiser gives, and of the noisy images, clipped to 0-1.

- *Noise*: Gaussian, or that of counted *photons*, which grows with the root of brightness (sigma is that of a grey of 0.5). It is added to
  floats and goes beyond 0-1, but where it is *clipped*, as a file of 8 bits holds it, or *JPEG*, as one of that quality does. *Camera*:
  noise of a simulated sensor behind a Bayer mosaic, clipped to 0-1, whose missing colours are interpolated (bilinear), beside clean images
  that went the same way; sigma is that of the sensor's pixels. (Of camera and JPEG *another sigma* is 0.2, 0.025 and 0.05.) Sigma is in
  units of the set's standard deviation (*standard*; in brackets what that is in 0-1), or of pixels in 0-1 (*unit*).
- *Gaussian filter* and *non-local means* are told their best strength, the latter sigma too. Of photons they work behind Anscombe's transform; of clipped
  noise, and that of JPEG and cameras, they are told what strength is left, and stand in brackets with the mean that clipping moves put back by the true sigma, which ours
  estimates.
- *Predicted*: every denoiser by the network takes each noisy pixel itself into account, and corrects what is coarse by what it makes of the
  images at half and at a quarter of their size, where they have 32 and 64 pixels; in brackets the predicted one at full size alone, and its
  guesses there without the noisy pixel itself. *Seconds*: of predicting it from these images, on one thread beside another measurement.
- *Plain training*: one denoiser for all noise and all sizes, trained on as many patches, calibrated in the same way (in brackets: with its
  own norm statistics).
- *Over another sigma's sketch*: what the sketch of the right images adds to that of the same images with another sigma; *over another set's
  sketch*: to that of images of another set with as strong noise (photographs and CIFAR-10 for each other, photographs for Fashion-MNIST);
  *over another sigma's denoiser*: over one predicted wholly for that, which takes the noise to be of that strength, too.
- BM3D, the classical rival that is stronger than both filters here, has [a table of its own](#bm3d).
- *Scratch*: the same network trained for 100 epochs on these very noisy images, all of their pixels an epoch, by Adam (rate 1e-3) without
  and with gradient centralisation, with the same use of noisy pixels and smaller sizes (by the same weights, calibrated to them; not
  measured on BSDS500; in brackets at full size alone, and by guesses), and its seconds over those of predicting (both in `scratch.*.json`).
- *Paper*: PudNet at a width that is not stated, trained on ImageNet; the unit of its sigma and the size of its images are not stated
  either, so its numbers stand beside both readings.

Ours has seen, noisy alone, the training photographs of BSDS500, Tiny-ImageNet, and CIFAR-100, which comes from the same source as CIFAR-10;
Fashion-MNIST is a set of another kind.

| hypernetwork | set, images | sigma | noisy | Gaussian filter | non-local means | predicted (one size; blind) / SSIM | seconds | plain training | over another sigma's sketch | \
over another set's sketch | over another sigma's denoiser | over plain training | scratch | paper |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def cell(row: dict[str, float] | None, signed: bool = False) -> str:
    """A mean with its interval."""
    return '-' if row is None else f'{row["mean"]:{"+" if signed else ""}.2f} ± {row["interval"]:.2f}'


def scratch(result: dict[str, Any]) -> str:
    """Seconds of training from scratch over those of predicting, by optimiser, for the goal and its interval's ends."""
    if 'scratch' not in result:
        return '-'
    predicted, found = result['scratch']['predicted'], []
    goal = predicted['accuracy']
    for name in ('adam', 'adam_centralised'):
        points = [(p['accuracy']['mean'], p['seconds']['mean']) for p in result['scratch'][name]['curve']]

        def times(wanted: float, points: list[tuple[float, float]] = points) -> str:
            reached = [seconds for accuracy, seconds in points if accuracy >= wanted]
            ratio = (reached or [points[-1][1]])[0] / predicted['seconds']['mean']
            return f'{ratio:,.0f}x' if reached else f'above {ratio:,.0f}x'

        low, high = (times(goal['mean'] + sign * goal['interval']) for sign in (-1, 1))
        found.append(f'{times(goal["mean"])} ({low} to {high})')
    return f'{" / ".join(found)} to {goal["mean"]:.1f} ± {goal["interval"]:.1f} on {result["scratch"]["groups"]} groups'


def named(folder: str, protocol: str, result: dict[str, Any]) -> list[str]:
    """The first cells of a line."""
    where = PROTOCOLS.get(folder, 'cifar100-set') if protocol in ('results', 'unlabelled') else protocol
    return [f'[{folder}]({folder}/README.md)', f'{where.removesuffix("-unlabelled")}, {result["n_way"]}-way']


def plain(accuracy: dict[str, dict[str, float]]) -> str:
    """The control, calibrated, and in brackets with its own statistics."""
    own = f' ({accuracy["plain_own_statistics"]["mean"]:.2f})' if 'plain_own_statistics' in accuracy else ''
    return cell(accuracy.get('plain')) + own


def by_head(result: dict[str, Any], head: str) -> str:
    """The prediction with another head, and in brackets the control with it: the better of its two statistics."""
    found = result.get(f'accuracy_{head}', {})
    rivals = [row['mean'] for name, row in found.items() if name in ('plain', 'plain_own_statistics')]
    return cell(found.get('predicted')) + (f' ({max(rivals):.2f})' if rivals else '')


def gain_over_plain(result: dict[str, Any]) -> str:
    """What is gained over the control, calibrated, and in brackets over that with its own statistics."""
    accuracy = result['accuracy']
    own = accuracy.get('plain_own_statistics')
    if (measured := result.get('gain_over_plain_own_statistics')) is not None:
        more = f' ({cell(measured, signed=True)})'
    else:
        more = '' if own is None else f' ({accuracy["predicted"]["mean"] - own["mean"]:+.2f})'
    return cell(result.get('gain_over_plain'), signed=True) + more


def unlabelled_row(folder: str, protocol: str, result: dict[str, Any]) -> str:
    """A line of the table of images without labels."""
    accuracy = result['accuracy_self_training']
    cells = [
        *named(folder, protocol, result),
        f'{result["n_shot"]} + {result["n_unlabelled"]}',
        cell(accuracy['predicted']),
        cell(result.get('accuracy_blend', result['accuracy_ridge'])['predicted']),
        cell(result['self_training_gain'], signed=True),
        plain(accuracy),
        cell(accuracy.get('raw_pixels')),
        self_training_gain_over_plain(result),
        PAPER.get((folder, f'results.{protocol}'.removesuffix('unlabelled').rstrip('.-')), '-'),
    ]
    return f'| {" | ".join(cells)} |'


def self_training_gain_over_plain(result: dict[str, Any]) -> str:
    """Over the calibrated control, in brackets over that by its own norm statistics."""
    own = result.get('self_training_gain_over_plain_own_statistics')
    return cell(result.get('self_training_gain_over_plain'), signed=True) + (
        f' ({cell(own, signed=True)})' if own else ''
    )


def row(folder: str, protocol: str, result: dict[str, Any]) -> str:
    """A line of the table."""
    accuracy = result['accuracy']
    cells = [
        *named(folder, protocol, result),
        str(result['n_shot']),
        cell(accuracy['predicted']),
        cell(result.get('accuracy_ridge', {}).get('predicted')),
        by_head(result, 'blend'),
        by_head(result, 'logistic'),
        plain(accuracy),
        cell(accuracy.get('start')),
        cell(accuracy.get('swapped_sketch')),
        cell(result.get('conditioning_gain'), signed=True),
        cell(result.get('conditioning_gain_over_other_domain'), signed=True),
        gain_over_plain(result),
        scratch(result),
        PAPER.get((folder, f'results.{protocol}' if protocol != 'results' else protocol), '-'),
    ]
    return f'| {" | ".join(cells)} |'


def classical(psnr: dict[str, dict[str, float]], name: str) -> str:
    """A classical filter, and in brackets with the mean that clipping moves put back."""
    unclipped = psnr.get(f'{name}, unclipped')
    return cell(psnr[name]) + (f' ({unclipped["mean"]:.2f})' if unclipped else '')


def by_sizes(end: dict[str, float]) -> str:
    """PSNR of training from scratch with smaller sizes, where that was measured, and at full size alone."""
    one = end.get('psnr_one_size')
    return f'- ({end["psnr"]:.2f}' if one is None else f'{end["psnr"]:.2f} ({one:.2f}'


def denoiser_rows(folder: str, result: dict[str, Any], scratch: list[dict[str, Any]]) -> list[str]:
    """Lines of the denoisers' table, one for each noise; `scratch` are the rivals' conditions."""
    lines = []
    protocol = result['protocol'].removesuffix('-turned').removesuffix('-clipped').removesuffix('-photons')
    for one in result['noises']:
        found, gain = one['psnr'], one['gain']
        rivals = [row for row in scratch if (row['sigma'], row['reading']) == (one['sigma'], one['reading'])]
        ends = [
            f'{by_sizes(end)}; {end["psnr_blind"]:.2f}) in {end["seconds"] / row["predicted_seconds"]:,.0f}x'
            for row in rivals
            for end in (row[name][-1] for name in ('adam', 'adam_centralised'))
        ]
        cells = [
            f'[{folder}]({folder}/README.md)',
            f'{protocol}, {result["images"]}{", 4 turned copies" * (result.get("turns") == 4)}'
            f'{", photons" * (result.get("kind") == "poisson")}{", clipped" * result.get("clipped", False)}'
            f'{", camera" * (result.get("kind") == "camera")}'
            + (f', JPEG {result["jpeg"]}' if 'jpeg' in result else ''),
            f'{one["sigma"]:.3g} {one["reading"]} ({one["absolute"]:.3f})',
            cell(found['noisy']),
            *(classical(found, name) for name in ('gaussian filter', 'non-local means')),
            f'{cell(found["predicted"])} ({found["predicted, one size"]["mean"]:.2f}; {found["predicted, blind"]["mean"]:.2f})'
            f' / {one["ssim"]["predicted"]["mean"]:.3f}',
            f'{one["seconds"]:.1f}',
            f'{found["plain, calibrated"]["mean"]:.2f} ({found["plain, its own statistics"]["mean"]:.2f})'
            if 'plain, calibrated' in found
            else '-',
            cell(gain['sketch of another sigma'], signed=True),
            cell(gain.get('sketch of another set'), signed=True),
            cell(gain['predicted for another sigma'], signed=True),
            cell(gain.get('plain, calibrated'), signed=True),
            ' / '.join(ends) or '-',
            PAPER_DENOISING.get((protocol.removesuffix('-unit'), one['sigma']), '-')
            if not {'kind', 'jpeg'} & set(result)
            else '-',
        ]
        lines.append(f'| {" | ".join(cells)} |')
    return lines


BM3D = """
### BM3D

The standard of classical denoising, told sigma (the package `bm3d`, which may not be used commercially, `hub/denoising.py --bm3d`), on fewer
photographs, since it takes half a minute and more for each (by hand). PSNR in dB with its 95 % interval over images:

| hypernetwork | set, images | sigma | predicted | BM3D | predicted over BM3D |
|---|---|---|---|---|---|
"""


def bm3d_rows(folder: str, result: dict[str, Any]) -> list[str]:
    """Lines of the table beside BM3D."""
    return [
        f'| [{folder}]({folder}/README.md) | {result["protocol"]}, {result["images"]} | {one["sigma"]} {one["reading"]} '
        f'({one["absolute"]:.3f}) | {cell(one["psnr"]["predicted"])} | {cell(one["psnr"]["bm3d"])} '
        f'| {cell(one["gain"]["bm3d"], signed=True)} |'
        for one in result['noises']
    ]


def text() -> str:
    """The whole README."""
    lines, unlabelled, denoisers = [], [], []
    for path in sorted(HUB.glob('*/results*.json'), key=lambda path: (path.parent.name, path.stem)):
        protocol = path.stem.removeprefix('results.')
        result = json.loads(path.read_text(encoding='utf-8'))
        if 'noises' in result:
            rivals = path.with_name(f'scratch.{protocol}.json')
            scratch = json.loads(rivals.read_text(encoding='utf-8'))['noises'] if rivals.exists() else []
            denoisers += denoiser_rows(path.parent.name, result, scratch)
        elif result.get('n_unlabelled'):
            unlabelled.append(unlabelled_row(path.parent.name, protocol, result))
        else:
            lines.append(row(path.parent.name, protocol, result))
    rivals = [
        line
        for path in sorted(HUB.glob('*/bm3d.*.json'))
        for line in bm3d_rows(path.parent.name, json.loads(path.read_text(encoding='utf-8')))
    ]
    notes = [HUB / name for name in ('heads.md', 'publish.md', 'data.md', 'not_run.md')]
    tail = ''.join(f'\n{path.read_text(encoding="utf-8")}' for path in notes if path.exists())
    further = f'{UNLABELLED}{chr(10).join(unlabelled)}\n' if unlabelled else ''
    bm3d = f'{BM3D}{chr(10).join(rivals)}\n' if rivals else ''
    return f'{HEAD}{chr(10).join(lines)}\n{further}{DENOISERS}{chr(10).join(denoisers)}\n{bm3d}{tail}'


if __name__ == '__main__':
    readme = HUB / 'README.md'
    if '--check' in sys.argv[1:]:
        if not readme.exists() or readme.read_text(encoding='utf-8') != text():
            sys.exit('hub/README.md is not what its results say: run python hub/table.py')
    else:
        readme.write_text(text(), encoding='utf-8')
