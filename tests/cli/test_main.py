"""The command line itself: help, errors, exit statuses."""

import os
import subprocess
import sys

import pytest
import torch

from effdet_fast.cli.main import COMMANDS, main
from effdet_fast.cli.train_command import add_arguments
from effdet_fast.training.config import TrainConfig
from effdet_fast.training.options import options_of
from effdet_fast.version import __version__


def test_help_imports_neither_torch_nor_a_command():
    code = (
        "import sys; from effdet_fast.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        "print(sorted(m for m in sys.modules if m == 'torch' or m.startswith('effdet_fast.cli.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['effdet_fast.cli.main']"
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", ["train", "eval", "predict"])
def test_each_command_explains_its_flags_with_defaults(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "default:" in text and "--checkpoint" in text and "--amp" in text


def test_every_option_of_a_run_has_a_flag():
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert {action.dest for action in parser._actions} - {"help"} == set(options_of(TrainConfig))
    assert vars(parser.parse_args([])) == {}  # what is not given must not override a resumed run's own


def test_version_and_no_command(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0 and __version__ in capsys.readouterr().out
    assert main([]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--epochs", "many"], "error: argument --epochs: invalid int value: 'many'"),
        (["train", "--epochs", "0"], "error: epochs must be at least 1, got 0"),
        (["train"], "error: train_images is missing"),
        (["train", "--resume", "absent/last.pt"], "error: absent/last.pt: no such checkpoint"),
        (["train", "--image-size", "1", "2", "3"], "error: --image-size takes one side, or height and width"),
        (
            ["eval", "--checkpoint", "a.pt", "--images", "b"],
            "error: the following arguments are required: --annotations",
        ),
        (
            ["eval", "--checkpoint", "absent.pt", "--images", ".", "--annotations", "b"],
            "error: absent.pt: no such checkpoint",
        ),
        (
            ["eval", "--checkpoint", "a", "--images", "b", "--annotations", "c", "--device", "tpu9"],
            "error: device must be",
        ),
        (
            ["predict", "--checkpoint", "a", "--images", "absent", "--output", "o"],
            "error: absent: no such picture or folder",
        ),
        (["fly"], "invalid choice: 'fly'"),
    ],
)
def test_wrong_input_gives_one_line_and_status_2(arguments, message, capsys):
    try:
        status = main(arguments)
    except SystemExit as done:
        status = done.code
    captured = capsys.readouterr()
    assert status == 2
    assert message in captured.err and len(captured.err.strip().splitlines()) == 1
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    "variables, expected",
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_that_wait_give_their_core_away_unless_told_otherwise(variables, expected):
    code = "import os; from effdet_fast.cli.main import main; main([]); print(os.environ.get('GOMP_SPINCOUNT'))"
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == expected


def test_a_traceback_on_request():
    with pytest.raises(ValueError, match="train_images is missing"):
        main(["train", "--traceback"])


@pytest.mark.parametrize(
    "error, message",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "out of GPU memory; start anew with a smaller --batch-size",
        ),
        (MemoryError(), "out of memory"),
    ],
)
def test_a_machine_that_is_too_small_is_told_in_a_sentence(monkeypatch, capsys, error, message):
    def run(options):
        raise error

    monkeypatch.setattr("effdet_fast.cli.summary_command.run", run)
    assert main(["summary", "efficientdet_d0"]) == 1
    assert capsys.readouterr().err.startswith(f"effdet-fast summary: failed: {message}")
