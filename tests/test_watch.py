import importlib
import sys
import time

import numpy as np
import pytest
from PIL import Image

from timm_pudnet.config import InputError, PudNetWarning
from timm_pudnet.training.watch import Board, plot_losses, running_mean


def make_log(steps, start=1):
    return [
        {'step': step, 'rate': 0.01, 'metric': 2 / step, 'full': 3 / step, 'sketch': 0.1}
        for step in range(start, start + steps)
    ]


@pytest.fixture
def saved_figures(monkeypatch):
    """The figures that are saved in this test, in order."""
    module = pytest.importorskip('matplotlib.figure')
    figures, save = [], module.Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(module.Figure, 'savefig', keep)
    return figures


def test_a_figure_holds_each_term_raw_and_smoothed(tmp_path, saved_figures):
    log = make_log(200)
    path = plot_losses(log, tmp_path / 'loss', title=r'$\lost$ a_b')
    assert path == tmp_path / 'loss'
    with Image.open(path) as image:
        assert image.format == 'PNG'
        assert min(image.size) > 400
    (axes,) = saved_figures[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ['metric', 'full', 'sketch']
    raw, smooth = axes.lines[:2]
    assert raw.get_ydata() == pytest.approx([entry['metric'] for entry in log])
    assert raw.get_xdata() == pytest.approx([entry['step'] for entry in log])
    assert smooth.get_ydata() == pytest.approx(running_mean(raw.get_ydata()))
    assert raw.get_alpha() < 0.5
    assert axes.get_title() == r'$\lost$ a_b'


def test_a_term_may_be_missing_from_some_steps(tmp_path, saved_figures):
    log = [*make_log(5), {'step': 6, 'rate': 0.0, 'late': 4.0}]
    plot_losses(log, tmp_path / 'loss.png')
    lines = {line.get_label(): line for line in saved_figures[0].axes[0].lines}
    assert list(lines['late'].get_xdata()) == [6]
    assert lines['late'].get_marker() == '.'
    assert list(lines['metric'].get_xdata()) == [1, 2, 3, 4, 5]


def test_the_running_mean_is_over_one_step_in_fifty():
    values = np.random.default_rng(0).normal(size=250)  # window of 5
    expected = [values[max(0, i - 2) : i + 3].mean() for i in range(250)]
    assert running_mean(values) == pytest.approx(expected)


def test_the_callers_backend_and_figures_stay(tmp_path, fresh_process):
    pytest.importorskip('matplotlib')
    script = (
        'import sys\n'
        'from timm_pudnet.training.watch import plot_losses\n'
        'assert "matplotlib" not in sys.modules and "tensorboard" not in sys.modules\n'
        'plot_losses([{"step": 1, "full": 1.0}], "loss.png")\n'
        'assert "matplotlib.pyplot" not in sys.modules\n'
        'import matplotlib\n'
        'print(matplotlib.rcParams._get_backend_or_none())\n'
    )
    code, out, err = fresh_process('-W', 'error', '-c', script, cwd=tmp_path)
    assert (code, out.strip()) == (0, 'None'), err
    assert (tmp_path / 'loss.png').is_file()


def test_a_figure_is_written_whole_or_not_at_all(tmp_path, full_disk, nothing_written):
    pytest.importorskip('matplotlib')
    path = plot_losses(make_log(20), tmp_path / 'loss.png')
    with nothing_written(tmp_path), full_disk(), pytest.raises(OSError, match='too large'):
        plot_losses(make_log(40), path)
    before = path.read_bytes()
    plot_losses(make_log(40), path)
    assert path.read_bytes() != before


@pytest.mark.parametrize('log', [[], [{'step': 1, 'rate': 0.1}]])
def test_a_log_without_losses_is_refused(log, tmp_path, one_line, nothing_written):
    with nothing_written(tmp_path), pytest.raises(InputError) as error:
        plot_losses(log, tmp_path / 'loss.png')
    one_line(error, tmp_path / 'loss.png', f'{len(log)} steps')


def test_without_matplotlib_one_warning_and_no_figure(tmp_path, monkeypatch, nothing_written):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with nothing_written(tmp_path), pytest.warns(PudNetWarning) as caught:
        assert plot_losses(make_log(3), tmp_path / 'loss.png') is None
    (warning,) = caught
    assert 'matplotlib' in str(warning.message)
    assert 'pip install ' in str(warning.message)
    assert warning.filename == __file__


def read_events(folder):
    """`{name: [(step, value), ...]}` as TensorBoard itself reads a folder."""
    accumulators = importlib.import_module('tensorboard.backend.event_processing.event_accumulator')
    events = accumulators.EventAccumulator(str(folder)).Reload()
    return {
        name: [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]
        for name in events.Tags()['scalars']
    }


def test_tensorboard_reads_what_a_board_wrote(tmp_path):
    pytest.importorskip('tensorboard')
    board = Board(tmp_path / 'runs' / 'first')
    for step in (1, 2, 3):
        board.add(step, {'loss/full': 1 / step, 'rate': 0.01})
    board.close()
    board.add(4, {'rate': 0.02})
    board.close()
    assert read_events(tmp_path / 'runs' / 'first') == {
        'loss/full': [(1, 1.0), (2, 0.5), (3, 1 / 3)],
        'rate': [(1, 0.01), (2, 0.01), (3, 0.01)],
    }


@pytest.mark.parametrize('resumed_at', [0, 2, 5])
def test_a_resumed_run_hides_what_was_written_after_its_checkpoint(resumed_at, tmp_path):
    pytest.importorskip('tensorboard')
    board = Board(tmp_path)
    for step in range(1, 6):
        board.add(step, {'loss': step})
    board.close()
    time.sleep(1.1)  # files are read by name: by their second, and within one by a number that puts 10 before 9
    board = Board(tmp_path, step=resumed_at)
    for step in range(resumed_at + 1, resumed_at + 3):
        board.add(step, {'loss': 10 * step})
    board.close()
    expected = [(step, step) for step in range(1, resumed_at + 1)]
    expected += [(step, 10 * step) for step in range(resumed_at + 1, resumed_at + 3)]
    assert read_events(tmp_path) == {'loss': expected}


def test_without_tensorboard_one_warning_and_no_events(tmp_path, monkeypatch, nothing_written):
    monkeypatch.setitem(sys.modules, 'tensorboard', None)
    monkeypatch.delitem(sys.modules, 'torch.utils.tensorboard', raising=False)
    with nothing_written(tmp_path):
        with pytest.warns(PudNetWarning) as caught:
            board = Board(tmp_path / 'runs')
        board.add(1, {'loss': 1.0})
        board.close()
    (warning,) = caught
    assert 'tensorboard' in str(warning.message)
    assert 'pip install ' in str(warning.message)
    assert warning.filename == __file__
