"""A page about a prediction: one HTML file that needs nothing else, and its plots as PNG files.

The page is HTML, CSS and inline SVG, with small JPEG images inside it: no script, no other file, no network, and a
policy in its head that forbids them. The PNG files beside it are drawn by matplotlib, where that is installed.

Dimension letters: `n` images tested, `p` on the map, `c h w` an image, `d` features, `k` classes.
"""

from __future__ import annotations

import base64
import colorsys
import contextlib
import dataclasses
import html
import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from timm_pudnet.config import InputError, NotFoundError, OutputExistsError
from timm_pudnet.evaluation.expectation import IN_WORDS, Familiarity
from timm_pudnet.evaluation.holdout import MOST_ON_A_MAP, REPEATED, HeldOutTest, as_pixels, pre_logits
from timm_pudnet.evaluation.metrics import share_interval
from timm_pudnet.files import folder_written_whole, local_path
from timm_pudnet.images import ImageSource

PAGE_NAME = 'index.html'
# What keeps the page under 3 MB whatever the images and classes.
MOST_THUMBNAILS, MOST_SAMPLE_CLASSES, THUMBNAIL_SIDE = 240, 48, 64
MOST_ROWS = 60  # classes with a line of their own
MOST_CELLS = 16  # classes up to which the confusion matrix is a table with numbers
# Okabe and Ito's colours, told apart by colour-blind eyes too and visible on both grounds.
_COLORS = ('#0072b2', '#e69f00', '#009e73', '#cc79a7', '#56b4e9', '#d55e00', '#8c7a00', '#7f7f7f')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a page tells.

    Args:
        title: `resnet18 for photos`, say.
        tiles: What stands large at the top beside the accuracy: a name, a value and a line below it, each.
        class_names: `k` names; none for a feature model.
        samples: Some images that gave the weights, with their class or None: uint8 `[c, h, w]`.
        test: Of the images kept aside, where some were.
        points: Places of images on the map, `[p, 2]`, and in `point_labels` their classes, `[p]`, and in `point_right`
            whether they were classified rightly.
        point_labels: See `points`; None without labels.
        point_right: See `points`; None where they were not tested.
        expected: Accuracy to expect and its interval, shares, where it is known.
        familiarity: Whether the images are like those of training, where it is known.
        expected_from: How the expectation was checked, in words.
        notes: What the reader should know first: single images, files that could not be read.
        facts: What stands at the end, by name: command, versions, hashes, sizes, times.
    """

    title: str
    tiles: Sequence[tuple[str, str, str]]
    class_names: tuple[str, ...]
    samples: Sequence[tuple[int | None, Tensor]]
    points: Tensor
    point_labels: Tensor | None = None
    point_right: Tensor | None = None
    test: HeldOutTest | None = None
    expected: tuple[float, float, float] | None = None
    familiarity: Familiarity | None = None
    expected_from: str = ''
    notes: Sequence[str] = ()
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, 'class_names', tuple(map(_unicode, self.class_names)))

    def page(self) -> str:
        """The HTML."""
        sections = [self._summary(), self._samples()]
        if self.test is not None:
            sections += [self._classes(), self._confusion(), self._mistakes(), self._reliability()]
        sections += [self._map(), self._facts()]
        return _PAGE.substitute(title=_text(self.title), body='\n'.join(filter(None, sections)))

    def plots(self) -> dict[str, bytes]:
        """PNG files by name, drawn by matplotlib; none where it is not installed."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return {}
        drawn = {}
        draw = {'map.png': self._plot_map}
        if self.test is not None:
            draw |= {
                'classes.png': self._plot_classes,
                'confusion.png': self._plot_confusion,
                'reliability.png': self._plot_reliability,
            }
        with warnings.catch_warnings():  # names in scripts that its font lacks become boxes
            warnings.filterwarnings('ignore', 'Glyph')
            for name, plot in draw.items():
                figure, file = Figure(figsize=(7, 6), layout='constrained'), io.BytesIO()
                plot(figure.add_subplot())
                figure.savefig(file, format='png', dpi=120)
                drawn[name] = file.getvalue()
        return drawn

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Writes the page and the plots into a new folder, which appears whole or not at all.

        Returns:
            Path of the page.

        Raises:
            OutputExistsError: The folder exists.
            NotFoundError: Its parent is not there.
        """
        folder = local_path(folder)
        if folder.exists():
            raise OutputExistsError(f'{folder} exists: choose another folder for the report, or remove it first')
        if not folder.parent.is_dir():
            raise NotFoundError(f'{folder.parent} is not there: make it first, or choose another folder for the report')
        files = {PAGE_NAME: self.page().encode(), **self.plots()}
        with folder_written_whole(folder) as beside:
            for name, content in files.items():
                (beside / name).write_bytes(content)
        return folder / PAGE_NAME

    # Numbers

    def _counts(self) -> np.ndarray:
        """How many images of each class were taken for each class, `[k, k]`."""
        assert self.test is not None
        counts = np.zeros((len(self.class_names),) * 2, np.int64)
        np.add.at(counts, (self.test.labels.numpy(), self.test.guesses.numpy()), 1)
        return counts

    def _rows(self) -> list[tuple[str, int, int]]:
        """Name, right and total of the tested classes, worst first."""
        counts = self._counts()
        totals = counts.sum(1)
        shares = counts.diagonal() / totals.clip(1)
        order = sorted(np.flatnonzero(totals), key=lambda label: (shares[label], -totals[label], label))
        return [(self.class_names[label], int(counts[label, label]), int(totals[label])) for label in order]

    def _bins(self) -> list[tuple[float, int, int]]:
        """Mean confidence, right and total of the images in each tenth of the confidences that has any."""
        assert self.test is not None
        right = self.test.guesses == self.test.labels
        numbers = (self.test.confidences * 10).long().clamp(max=9)
        found = []
        for number in numbers.unique().tolist():
            members = numbers == number
            found.append((float(self.test.confidences[members].mean()), int(right[members].sum()), int(members.sum())))
        return found

    def _gap(self) -> float:
        """Expected calibration error: mean distance of confidence and accuracy over the tenths."""
        bins = self._bins()
        total = sum(count for _, _, count in bins)
        return sum(count * abs(confidence - right / count) for confidence, right, count in bins) / total

    # Sections of the page

    def _summary(self) -> str:
        tiles, words = [], []
        if self.test is not None:
            total, right = len(self.test.labels), self.test.right
            low, high = share_interval(right, total)
            below = f'{right:,} of {total:,} images kept aside; 95 % interval {low:.1%} to {high:.1%}'
            tiles.append(('Accuracy', f'{right / total:.1%}', below))
            below = f'raw pixels by {self.test.raw_head}; chance {1 / self.test.num_classes:.1%}{self.test.by_largest}'
            tiles.append(('Without a network', f'{self.test.right_raw / total:.1%}', below))
        if self.expected is not None:
            accuracy, low, high = self.expected
            tiles.append(('Expected before the test', f'{accuracy:.0%}', f'95 % interval {low:.0%} to {high:.0%}'))
        cells = ''.join(
            f'<div class="tile"><span>{_text(name)}</span><b>{_text(value)}</b><small>{_text(below)}</small></div>'
            for name, value, below in (*tiles, *self.tiles)
        )
        if self.familiarity is not None:
            kind = '' if self.familiarity == 'like' else ' class="warn"'
            words.append(f'<p{kind}><b>Will it work here?</b> {_text(IN_WORDS[self.familiarity])}</p>')
        if self.expected_from:
            words.append(f'<p class="how">{_text(self.expected_from)}</p>')
        if self.test is not None and self.test.repeated:
            note = f'{self.test.repeated} of the images kept aside are among the others too: {REPEATED}.'
            words.append(f'<p class="warn">{_text(note)}</p>')
        words += [f'<p class="warn">{_text(note)}</p>' for note in self.notes]
        return f'<header><h1>{_text(self.title)}</h1><div class="tiles">{cells}</div>{"".join(words)}</header>'

    def _samples(self) -> str:
        shown: dict[int | None, list[str]] = {}
        for label, image in self.samples:
            shown.setdefault(label, []).append(_thumbnail(image))
        rows = ''
        for label, images in shown.items():
            name = '' if label is None else f'<h3>{_name(self.class_names[label])}</h3>'
            rows += f'<div class="sample">{name}<div class="strip">{"".join(images)}</div></div>'
        left = len(self.class_names) - len(shown)
        more = f'<p>And {left:,} more classes.</p>' if None not in shown and left > 0 else ''
        how = 'Some of the images that gave the weights, as the network sees them.'
        wide = 3.5 * min(6, max([2, *map(len, shown.values())]))  # rem, of six images at most
        return _section('The images', how, f'<div class="samples" style="--wide:{wide}rem">{rows}</div>{more}')

    def _classes(self) -> str:
        rows = self._rows()
        lines = ''.join(
            f'<div class="row">{_name(name)}{_bar(right, total)}<span>{right} of {total}</span></div>'
            for name, right, total in rows[:MOST_ROWS]
        )
        left = len(rows) - MOST_ROWS
        more = f'<p>And {left:,} more, none worse than these.</p>' if left > 0 else ''
        how = 'Share of the images of a class that it got right, worst first; the bar is the 95 % interval.'
        return _section('Class by class', how, f'<div class="rows">{lines}</div>{more}')

    def _confusion(self) -> str:
        counts, names = self._counts(), self.class_names
        if len(names) <= MOST_CELLS:
            head = ''.join(f'<th scope="col">{_name(name)}</th>' for name in names)
            body = ''
            for name, row in zip(names, counts, strict=True):
                total = max(1, row.sum())
                cells = ''.join(f'<td style="--share:{count / total:.2f}">{count or ""}</td>' for count in row)
                body += f'<tr><th scope="row">{_name(name)}</th>{cells}</tr>'
            matrix = f'<div class="wide"><table class="matrix"><tr><th></th>{head}</tr>{body}</table></div>'
        else:
            shares = counts / counts.sum(1, keepdims=True).clip(1)
            pixels = np.zeros((*counts.shape, 4), np.uint8)
            pixels[..., :3] = (42, 120, 214)
            pixels[..., 3] = np.where(counts, 55 + 200 * shares, 0)
            matrix = f'<img class="heat" alt="Confusion matrix" src="{_data_uri(Image.fromarray(pixels), "PNG")}">'
        np.fill_diagonal(counts, 0)
        order = np.argsort(-counts, axis=None, kind='stable')[:12]
        pairs = [(row, column) for row, column in zip(*np.unravel_index(order, counts.shape), strict=True)]
        often = ''.join(
            f'<li>{_name(names[row])} taken for {_name(names[column])}: {counts[row, column]}</li>'
            for row, column in pairs
            if counts[row, column]
        )
        often = f'<h3>Most often confused</h3><ul>{often}</ul>' if often else '<p>Nothing was confused.</p>'
        how = 'Rows are the true classes, columns what the network says; the diagonal is what it got right.'
        return _section('What is taken for what', how, matrix + often)

    def _mistakes(self) -> str:
        assert self.test is not None
        cards = ''
        for place, image in self.test.mistakes:
            true, said = (self.class_names[labels[place]] for labels in (self.test.labels, self.test.guesses))
            sure = f'{self.test.confidences[place]:.0%}'
            file = _text(_short(self.test.names[place], 60))
            cards += (
                f'<figure>{_thumbnail(image)}<figcaption>{_name(said)} ({sure}), is {_name(true)}'
                f'<small>{file}</small></figcaption></figure>'
            )
        how = 'What it said, how sure it was, and what the label says. A wrong label shows here first.'
        return _section('Most confident mistakes', how, f'<div class="cards">{cards or "There are none."}</div>')

    def _reliability(self) -> str:
        marks = '<path class="line" d="M0 300L300 0"/>'
        bins = self._bins()
        most = max(count for _, _, count in bins)
        for confidence, right, count in bins:
            low, high = share_interval(right, count)
            x, tall = 300 * confidence, 60 * count / most
            label = f'says {confidence:.0%}, right {right / count:.0%} ({right} of {count})'
            marks += (
                f'<g><title>{label}</title><rect class="count" x="{x - 8:.1f}" y="{300 - tall:.1f}" width="16" '
                f'height="{tall:.1f}"/><path class="whisker" '
                f'd="M{x:.1f} {300 - 300 * low:.1f}V{300 - 300 * high:.1f}"/>'
                f'<circle class="dot" cx="{x:.1f}" cy="{300 - 300 * right / count:.1f}" r="5"/></g>'
            )
        ticks = ''.join(
            f'<text x="{3 * at}" y="318" text-anchor="middle">{at}%</text>'
            f'<text x="-8" y="{304 - 3 * at}" text-anchor="end">{at}%</text>'
            for at in (0, 50, 100)
        )
        drawing = (
            f'<svg viewBox="-72 -12 390 366" role="img" aria-label="Reliability curve">'
            f'<path class="axis" d="M0 0V300H300"/>{marks}{ticks}'
            '<text x="150" y="344" text-anchor="middle">how sure it is</text>'
            '<text transform="translate(-58 150) rotate(-90)" text-anchor="middle">how often it is right</text></svg>'
        )
        how = (
            'The confidence is the softmax of what the network says, as it is. On the line it is honest, above it too '
            f'modest, below it too sure; mean distance {self._gap():.1%}. Columns: how many images.'
        )
        return _section('Can its confidence be trusted?', how, drawing)

    def _map(self) -> str:
        if len(self.points) < 2:
            return ''
        places = _fitted(self.points) * torch.tensor([600.0, 400.0])
        dots, names = '', self.class_names
        for number, (x, y) in enumerate(places.tolist()):
            label = None if self.point_labels is None else int(self.point_labels[number])
            wrong = self.point_right is not None and not self.point_right[number]
            title = (
                '' if label is None else f'<title>{_text(_short(names[label]))}{", mistaken" if wrong else ""}</title>'
            )
            mark = f'fill="{_color(label or 0)}"{" class=wrong" if wrong else ""}'
            dots += f'<circle cx="{x:.0f}" cy="{y:.0f}" r="6" {mark}>{title}</circle>'
        legend = ''
        if self.point_labels is not None and len(names) <= 24:
            entries = enumerate(names)
            legend = ''.join(f'<li style="--dot:{_color(label)}">{_name(name)}</li>' for label, name in entries)
            legend = f'<ul class="legend">{legend}</ul>'
        what = 'kept aside' if self.point_right is not None else 'that gave the weights'
        ringed = ', mistakes ringed' if self.point_right is not None else ''
        how = (
            f'{len(places):,} of the images {what}, by their features in the two directions that set the classes apart '
            f'most{ringed}. Classes that lie on each other are hard to tell apart, in two dimensions at least.'
            if self.point_labels is not None
            else f'{len(places):,} of the images, by their features in the two directions in which they differ most.'
        )
        drawing = f'<svg viewBox="-10 -10 620 420" role="img" aria-label="Map of the features">{dots}</svg>'
        return _section('A map of the features', how, drawing + legend)

    def _facts(self) -> str:
        rows = ''.join(
            f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>' for name, value in self.facts.items()
        )
        return _section('How it was made', '', f'<table class="facts">{rows}</table>')

    # Plots, on matplotlib's axes

    def _plot_classes(self, axes: Any) -> None:
        rows = self._rows()[: MOST_ROWS // 2]
        shares = np.array([right / total for _, right, total in rows])
        bounds = np.array([share_interval(right, total) for _, right, total in rows]).T
        errors = np.abs(bounds - shares)
        axes.errorbar(shares, range(len(rows)), xerr=errors, fmt='o', capsize=3)
        axes.set_yticks(range(len(rows)), [_short(name) for name, _, _ in rows], parse_math=False)
        axes.set(xlim=(0, 1), xlabel='accuracy, 95 % interval', title='Class by class, worst first')
        axes.invert_yaxis()
        axes.grid(alpha=0.3)

    def _plot_confusion(self, axes: Any) -> None:
        counts = self._counts()
        axes.imshow(counts / counts.sum(1, keepdims=True).clip(1), cmap='Blues', vmin=0, vmax=1)
        axes.set(xlabel='said', ylabel='true', title='What is taken for what, shares of each row')
        if len(counts) <= 2 * MOST_CELLS:
            names = [_short(name) for name in self.class_names]
            axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
            axes.set_yticks(range(len(names)), names, parse_math=False)

    def _plot_reliability(self, axes: Any) -> None:
        bins = self._bins()
        x = np.array([confidence for confidence, _, _ in bins])
        y = np.array([right / count for _, right, count in bins])
        bounds = np.array([share_interval(right, count) for _, right, count in bins]).T
        axes.plot([0, 1], [0, 1], color='0.6', linewidth=1)
        axes.errorbar(x, y, yerr=np.abs(bounds - y), fmt='o', capsize=3)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel='how sure it is', ylabel='how often it is right')
        axes.set_title(f'Reliability; mean distance {self._gap():.1%}')
        axes.grid(alpha=0.3)

    def _plot_map(self, axes: Any) -> None:
        labels = torch.zeros(len(self.points)).long() if self.point_labels is None else self.point_labels
        axes.scatter(*self.points.T.numpy(), s=14, c=[_color(label) for label in labels.tolist()])
        if self.point_right is not None and not self.point_right.all():
            wrong = self.points[~self.point_right]
            axes.scatter(*wrong.T.numpy(), s=50, facecolors='none', edgecolors='black', label='mistaken')
            axes.legend()
        axes.set(xticks=[], yticks=[], title='Features in two dimensions')


def make_report(model: nn.Module, used: ImageSource, test: HeldOutTest | None, **told: Any) -> Report:
    """A report of a model and the images that gave its weights.

    Args:
        model: Predicted, in eval mode.
        used: The images that gave the weights; read again for a few of them.
        test: Of the images kept aside, where some were: the map is of these then.
        told: The other fields of `Report`: `title`, `tiles`, `facts`, ...
    """
    if test is None:
        features, labels = sample_features(model, used)
        right = None
    else:
        features, labels = test.features, test.labels[test.places]
        right = test.guesses[test.places] == labels
    names = used.class_names or ()
    if labels is not None and not names:
        known = labels if used.labels is None else torch.cat([labels, used.labels])  # those on the map are a sample
        count = max(int(known.max()) + 1, 0 if test is None else test.num_classes)
        names = tuple(str(label) for label in range(count))
    return Report(
        class_names=names,
        samples=sample_images(used),
        test=test,
        points=feature_map(features, _class_rows(model)),
        point_labels=labels,
        point_right=right,
        **told,
    )


def _class_rows(model: nn.Module) -> Tensor | None:
    """Weight `[k, d]` of a timm model's classifier; None where it has none, or no single layer."""
    found = model.get_classifier() if model.num_classes else None  # type: ignore[operator]
    return found.weight.detach().flatten(1).cpu() if isinstance(found, nn.Linear | nn.Conv2d) else None


@torch.inference_mode()
def sample_images(source: ImageSource) -> list[tuple[int | None, Tensor]]:
    """Some images of a source with their classes, class by class, as uint8 `[c, h, w]`."""
    if source.labels is None or source.is_stream:
        images, _ = next(source.batches(24))
        return [(None, as_pixels(image, source)) for image in images]
    classes = source.labels.unique()[:MOST_SAMPLE_CLASSES]
    each = max(1, min(8, MOST_THUMBNAILS // len(classes)))
    members = [(source.labels == label).nonzero().flatten()[:each] for label in classes]
    found: list[tuple[int | None, Tensor]] = []
    with contextlib.suppress(InputError):  # none of these can be read
        for images, labels in source.subset(torch.cat(members)).batches():
            assert labels is not None
            found += [(label, as_pixels(image, source)) for image, label in zip(images, labels.tolist(), strict=True)]
    return found


def some_images(source: ImageSource, most: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches of so many images at most, spread evenly over a source; of a stream the first."""
    if not source.is_stream:
        picks = torch.linspace(0, len(source) - 1, min(len(source), most), dtype=torch.float64).long()
        yield from source.subset(picks).batches()
        return
    for images, labels in source.batches(most):
        yield images[:most], None if labels is None else labels[:most]
        most -= len(images)
        if most <= 0:
            return


@torch.inference_mode()
def sample_features(model: nn.Module, source: ImageSource) -> tuple[Tensor, Tensor | None]:
    """Features `[p, d]` of at most 1,000 images, and their classes where they have any."""
    rows, found = [], []
    for images, labels in some_images(source, MOST_ON_A_MAP):
        rows.append(pre_logits(model, images))
        found.append(labels)
    return torch.cat(rows), None if found[0] is None else torch.cat(found)


def feature_map(features: Tensor, centres: Tensor | None = None) -> Tensor:
    """Places `[p, 2]` of features `[p, d]` on a plane: where the `k` centres `[k, d]` lie apart most.

    Without centres, or where they span no plane, the directions in which the features differ most take the place.
    """
    features = nn.functional.normalize(features.double(), dim=1)
    features = features - features.mean(0)
    axes = torch.empty(0, features.shape[1]).double()
    for rows in (centres, features):
        if rows is None or len(axes) == 2:
            continue
        spread = rows.double() - rows.double().mean(0)
        spread = spread - spread @ axes.t() @ axes
        _, sizes, directions = torch.linalg.svd(spread, full_matrices=False)
        wanted = (sizes > 1e-6 * spread.norm().clamp(min=1e-12))[: 2 - len(axes)]
        axes = torch.cat([axes, directions[: len(wanted)][wanted]])
    places = features @ axes.t()
    return torch.nn.functional.pad(places, (0, 2 - places.shape[1])).float()


def _fitted(points: Tensor) -> Tensor:
    """Points `[p, 2]` moved and scaled into 0-1."""
    low, high = points.min(0).values, points.max(0).values
    return (points - low) / (high - low).clamp(min=1e-9)


def _color(label: int) -> str:
    if label < len(_COLORS):
        return _COLORS[label]
    red, green, blue = colorsys.hls_to_rgb((label * 0.618) % 1, 0.5, 0.65)
    return f'#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}'


def _text(value: str) -> str:
    """Escaped for HTML."""
    return html.escape(_unicode(value), quote=True)


def _unicode(value: str) -> str:
    """A text whose bytes that are no Unicode, as file names may have, are question marks."""
    return value.encode('utf-8', 'replace').decode()


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f'{name[: most // 2]}…{name[-(most // 2 - 1) :]}'


def _name(name: str) -> str:
    """A class name: cut short where it is long, whole under the pointer, its own writing direction."""
    return f'<bdi title="{_text(_short(name, 400))}">{_text(_short(name))}</bdi>'


def _bar(right: int, total: int) -> str:
    low, high = share_interval(right, total)
    return (
        f'<div class="bar"><i style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></i>'
        f'<u style="left:{100 * right / total:.1f}%"></u></div>'
    )


def _thumbnail(pixels: Tensor) -> str:
    array = pixels[:3].permute(1, 2, 0).numpy()
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return f'<img alt="" src="{_data_uri(image, "JPEG")}">'


def _data_uri(image: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    image.save(file, kind, **({'quality': 88} if kind == 'JPEG' else {'optimize': True}))
    return f'data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}'


def _section(title: str, how: str, body: str) -> str:
    how = f'<p class="how">{how}</p>' if how else ''
    return f'<section><h2>{title}</h2>{how}{body}</section>'


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --ground: #fcfcfb; --card: #f0f0ee; --ink: #1c1c1a; --faint: #63635e; --line: #d5d5d0; --mark: #2a78d6;
  --mark-rgb: 42, 120, 214; --warn: #fff0d6; --warn-edge: #b26a00; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #161615; --card: #232322; --ink: #efefec; --faint: #a5a59e; --line: #44443f; --mark: #6aaaf2;
    --mark-rgb: 90, 160, 240; --warn: #3a2b10; --warn-edge: #e0a54a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 0 0 .2rem; }
h3 { font-size: .95rem; margin: .8rem 0 .3rem; }
section { margin: 2.5rem 0; }
p { margin: .5rem 0; }
.how, small, .row span { color: var(--faint); }
.how { max-width: 44rem; margin-bottom: .8rem; }
small { display: block; font-size: .8rem; }
.warn { background: var(--warn); border-left: 4px solid var(--warn-edge); padding: .5rem .8rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .7rem; margin: 1rem 0; }
.tile { background: var(--card); border-radius: .5rem; padding: .7rem .9rem; }
.tile span { font-size: .85rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.3; }
.samples { display: grid; gap: .3rem 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--wide)), 1fr)); }
.strip { display: flex; flex-wrap: wrap; gap: .25rem; }
.strip img, figure img { width: 3.2rem; height: 3.2rem; object-fit: contain; border-radius: .2rem; }
.row { display: grid; grid-template-columns: minmax(4rem, 11rem) minmax(40%, 1fr) 4.5rem; gap: .8rem; margin: .2rem 0;
  align-items: center; }
.row span { text-align: right; font-size: .85rem; }
.bar { position: relative; height: 1.3rem; border-left: 1px solid var(--line); border-right: 1px solid var(--line); }
.bar i { position: absolute; top: .45rem; height: .4rem; border-radius: .2rem; background: rgba(var(--mark-rgb), .4); }
.bar u { position: absolute; top: .3rem; width: .7rem; height: .7rem; margin-left: -.35rem; border-radius: 50%;
  background: var(--mark); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th { font-weight: 500; text-align: left; font-size: .85rem; }
.matrix td { min-width: 2.6rem; height: 2.4rem; text-align: center; border: 1px solid var(--line);
  background: rgba(var(--mark-rgb), calc(var(--share) * .65)); }
.matrix th { padding: .2rem .5rem; overflow-wrap: normal; max-width: 9rem; }
.heat { display: block; width: min(100%, 36rem); aspect-ratio: 1; image-rendering: pixelated;
  border: 1px solid var(--line); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .8rem; }
figure { margin: 0; font-size: .85rem; }
figure img { width: 5rem; height: 5rem; }
svg { display: block; width: 100%; max-width: 40rem; }
svg[aria-label^=Reliability] { max-width: 26rem; }
svg text { fill: var(--faint); font-size: 14px; }
.axis, .line, .whisker { fill: none; stroke: var(--faint); }
.line { stroke-dasharray: 4 4; }
.whisker { stroke: var(--mark); stroke-width: 2; }
.dot { fill: var(--mark); }
.count { fill: var(--line); }
.wrong { stroke: var(--ink); stroke-width: 2; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; list-style: none; font-size: .85rem; }
.legend li::before { content: ""; display: inline-block; width: .7rem; height: .7rem; margin-right: .4rem;
  border-radius: 50%; background: var(--dot); }
.facts th { overflow-wrap: normal; }
.facts th, .facts td { padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.facts td { font: .85rem/1.5 ui-monospace, monospace; }
</style>
</head>
<body>
$body
</body>
</html>
""")
