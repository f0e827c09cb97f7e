"""What the README shows works as it stands there."""

import re
import textwrap
from pathlib import Path

import pytest
import torch

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize(
    "block",
    [b for b in BLOCKS if "from_checkpoint" not in b and "accelerate(" not in b],
    ids=lambda b: b.splitlines()[0][:50],
)
def test_a_block_runs(block):
    exec(block, {"torch": torch})


def test_the_report_of_accelerate_is_the_one_shown(capsys):
    (block,) = (block for block in BLOCKS if "accelerate(" in block)
    exec(block)
    assert textwrap.indent(capsys.readouterr().out, "    ") in README


def test_there_are_blocks_for_ops_modules_models_and_prediction():
    assert len(BLOCKS) >= 6 and sum("from_checkpoint" in block for block in BLOCKS) == 1


def test_every_linked_file_is_there():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    missing = [link for link in links if not (Path(__file__).resolve().parents[1] / link).exists()]
    assert links and not missing
