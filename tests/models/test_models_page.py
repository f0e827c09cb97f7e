"""docs/models.md is what `python docs/models_page.py > docs/models.md` writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from effdet_fast.models import create_model, list_models, summary

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs"))
import models_page

PAGE = Path(models_page.__file__).with_name("models.md")


def split_page(text: str) -> tuple[dict[str, str], str]:
    """The rows of the table by model, and all the rest."""
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `") and "_*`" not in line}
    return rows, "\n".join(line for line in text.splitlines() if line not in rows.values())


def test_the_page_of_models_is_current(monkeypatch):
    """The numbers of all but two models are left to the slow test."""
    rows, text = split_page(PAGE.read_text())
    assert list(rows) == list_models()
    with torch.device("meta"):
        some = [summary(create_model(name)) for name in (list_models()[0], list_models()[-1])]
    assert [models_page.row(found) for found in some] == [rows[found.name] for found in some]
    monkeypatch.setattr(models_page, "summaries", lambda: some)
    assert split_page(models_page.page()) == ({found.name: rows[found.name] for found in some}, text)


@pytest.mark.slow
def test_every_row_of_the_page_is_current():
    assert models_page.page() == PAGE.read_text()
