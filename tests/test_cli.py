"""The command line: what it lists, what it answers to a mistake."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fastinfer
from fastinfer import cli, demo


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert "doctor" in text and "demo" in text


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"fastinfer {fastinfer.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["doctor", "--nonsense"]])
def test_a_wrong_command_line_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    assert exit.value.code == 2
    assert "usage: fastinfer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("no such thing\n\nmore of it"), "no such thing"),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), "[Errno 2] No such file or directory: 'x.txt'"),
        (OSError(), "OSError"),
        (ModuleNotFoundError("No module named 'transformers'", name="transformers"), "transformers is not installed"),
    ],
)
def test_a_users_error_is_one_line(monkeypatch, capsys, error, line):
    def fails(args):
        raise error

    monkeypatch.setattr(demo, "main", fails)
    assert cli.main(["demo"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastinfer: ") and line in err and err.count("\n") == 1
    with pytest.raises(type(error)):
        cli.main(["--traceback", "demo"])


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
    def fails(args):
        raise ModuleNotFoundError("No module named 'fastinfer.lost'", name="fastinfer.lost")

    monkeypatch.setattr(demo, "main", fails)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["demo"])


def test_the_commands_result_is_the_exit_code(monkeypatch):
    monkeypatch.setattr(demo, "main", lambda args: 7)
    assert cli.main(["demo"]) == 7


def test_help_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; from fastinfer import cli; cli.main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
