"""What the README and the pages in docs/ show works as it stands there."""

import re
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = {block: page for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)}
RUN_ELSEWHERE = ("from_checkpoint", "print(effdet_fast.accelerate(")


@pytest.mark.parametrize(
    "block",
    [block for block in BLOCKS if not any(call in block for call in RUN_ELSEWHERE)],
    ids=lambda block: f"{BLOCKS[block].name}: {block.splitlines()[0][:50]}",
)
def test_a_block_runs(block):
    exec(block, {"torch": torch})


def test_the_report_of_accelerate_is_the_one_shown(capsys):
    (block,) = (block for block in BLOCKS if "print(effdet_fast.accelerate(" in block)
    exec(block)
    assert textwrap.indent(capsys.readouterr().out, "    ") in (ROOT / "docs" / "accelerate.md").read_text()


def test_the_readme_is_short_and_shows_each_way_in():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 12_000
    for call in ("effdet_fast.accelerate(", "sigmoid_focal_loss(", "effdet-fast train", "Detector.from_checkpoint("):
        assert call in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_linked_file_is_there(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]
