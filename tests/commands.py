"""A command line of `timm-pudnet` in this process, as a user sees it end."""

import re

from click.testing import CliRunner

from timm_pudnet.cli import main


def run(*args):
    """The result of a command line; nothing but a chosen exit may end it."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f'a user would see a traceback: {result.exception!r}') from result.exception
    return result


def succeeds(*args):
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert 'Error' not in result.output
    return result


def fails(*args, needles=()):
    """One line says what is wrong (warnings and progress may go before it), and the exit code is 2."""
    result = run(*args)
    check_failure(result.exit_code, result.stderr, needles)
    return result


def check_failure(code, stderr, needles):
    assert code == 2, stderr
    assert 'Traceback' not in stderr
    lines = [line for line in stderr.splitlines() if line and not re.match(r'Warning: | *\d+%\|', line)]
    if lines[0].startswith('Usage: '):  # click's own, for options that it refuses
        lines = lines[-1:]
    assert len(lines) == 1, stderr
    assert lines[0].startswith('Error: ')
    for needle in needles:
        assert str(needle) in lines[0], f'{needle!r} is not in: {lines[0]}'
