"""Writes docs/training_options.md: python docs/training_options_page.py > docs/training_options.md"""

from __future__ import annotations

import dataclasses
from unittest.mock import patch

from effdet_fast.training import config, options
from effdet_fast.training.config import TrainConfig

HEAD = """# Options of a training run

Each option is a flag of `effdet-fast train` (`--batch-size 8`), an argument of `effdet_fast.train` (`batch_size=8`) and a
field of `effdet_fast.TrainConfig`. `--model-option` sets a field of the [`DetectorConfig`](api/models.md) and may be repeated;
its value is JSON or else text: `neck=panet`, `gradient_checkpointing=true`, `mean=[0.5,0.5,0.5]`. A resumed run keeps those that
say so, and refuses another value; the others may be given anew beside `--resume`.

Written by `python docs/training_options_page.py`.
"""


def row(field: dataclasses.Field) -> str:
    option: options.Option = field.metadata["option"]
    flag = "model-option" if field.name == "model_options" else field.name.replace("_", "-")
    flags = f"`--{flag}`, `--no-{flag}`" if option.negatable else f"`--{flag}`"
    with patch.object(config.os, "cpu_count", return_value=4):  # the same page on every machine
        default = options.default_in_words(field)
    values = option.rule.words if option.rule else ""
    return f"| {flags} | {option.help} | {values} | {default} | {'kept' if option.fixed else ''} |"


def page() -> str:
    parts = [HEAD]
    for group in options.GROUPS:
        rows = [row(field) for field in dataclasses.fields(TrainConfig) if field.metadata["option"].group == group]
        table = ["| flag | what it does | must be | default | on resume |", "| --- | --- | --- | --- | --- |", *rows]
        parts.append(f"## {group[0].upper()}{group[1:]}\n\n" + "\n".join(table) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
