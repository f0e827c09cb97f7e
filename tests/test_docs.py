"""What the README and the pages in docs/ show works as it stands there."""

import re
import shlex
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
from PIL import Image

import effdet_fast
from effdet_fast.checkpoints.convert import convert_state_dict
from effdet_fast.checkpoints.format import describe
from effdet_fast.cli.main import _parser
from tests.generated_data import make_dataset

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
# Blocks fenced as `python` run. Those fenced as `py` look the same and do not: they call projects that the tests do not install.
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"^(?:    )?(effdet-fast [^\n]*)|`(effdet-fast [a-z]+ [^`\n]+)`", re.MULTILINE)
SHOWN_WITH_ITS_REPORT = "print(effdet_fast.accelerate("


def examples_of(page: Path) -> list[tuple[str, str]]:
    """(title, code) of each block; where a page shows old code beside new, of all the blocks under one heading."""
    text = page.read_text()
    if page.parent.name != "coming_from":
        return [(block.partition("\n")[0][:50], block) for block in BLOCK.findall(text)]
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    return [(each.partition("\n")[0], "\n".join(BLOCK.findall(each))) for each in sections if BLOCK.search(each)]


EXAMPLES = {code: f"{page.relative_to(ROOT)}: {title}" for page in PAGES for title, code in examples_of(page)}
COMMANDS = {
    a or b: f"{page.relative_to(ROOT)}: {a or b}"[:90]
    for page in PAGES
    for a, b in COMMAND.findall(page.read_text().replace("\\\n", " "))
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files that the pages name."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("train", "val"):
        images, annotations = make_dataset(folder / f"{name}_set", images=4)
        images.rename(folder / name)
        annotations.rename(folder / f"{name}.json")
    Image.new("RGB", (160, 120), "gray").save(folder / "photograph.jpg")
    yolo_files(folder / "yolo")
    torch.manual_seed(0)
    model = effdet_fast.create_model("efficientdet_lite0", num_classes=3, image_size=64)
    described = describe(model.config, ["shape_0", "shape_1", "shape_2"], [3, 7, 40])
    (folder / "runs/exp1").mkdir(parents=True)
    torch.save({**described, "state_dict": model.state_dict()}, folder / "runs/exp1/best.pt")
    for name, file in (("efficientdet_d0", "tf_efficientdet_d0.pth"), ("retinanet_resnet50_fpn", "retinanet.pth")):
        torch.save(weights_for(name), folder / file)
    return folder


def yolo_files(folder: Path) -> None:
    for kind in ("images", "labels"):
        (folder / kind / "train").mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (200, 100)).save(folder / f"images/train/{i}.jpg")
    (folder / "labels/train/0.txt").write_text("1 0.5 0.5 0.1 0.2\n0 0.25 0.5 0.5 1\n")  # and 1.jpg has no objects


def weights_for(name: str) -> dict[str, torch.Tensor]:
    """Random weights under the other project's names, whose scores are so far apart that round-off changes no order."""
    model = effdet_fast.create_model(name, image_size=256).eval()
    with torch.no_grad():
        logits, _ = model(torch.randn(1, 3, 256, 256))
        values = torch.cat([level.flatten() for level in logits])
        last = model.class_net.predict
        getattr(last, "conv_pw", last).weight.mul_(5 / (values - values.mean()).abs().max())
    to = "torchvision" if name.startswith("retinanet") else "effdet"
    return convert_state_dict(model.state_dict(), to).state_dict


@pytest.mark.parametrize(
    "example",
    [example for example in EXAMPLES if SHOWN_WITH_ITS_REPORT not in example],
    ids=EXAMPLES.get,
)
def test_an_example_runs_and_the_new_way_gives_what_the_old_one_does(example, files, tmp_path, monkeypatch):
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    # A training would take hours: its options are looked at alone.
    monkeypatch.setattr(effdet_fast, "train", lambda **options: effdet_fast.TrainConfig(**options).require_paths())
    names = {"torch": torch, "effdet_fast": effdet_fast}
    exec(example, names)
    if "old" in names and "new" in names:
        torch.testing.assert_close(names["new"], names["old"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("command", COMMANDS, ids=COMMANDS.get)
def test_a_command_is_one_that_the_parser_takes(command):
    _, *arguments = shlex.split(command, comments=True)
    _parser(arguments[0]).parse_args(arguments)


def test_the_report_of_accelerate_is_the_one_shown(capsys):
    (example,) = (example for example in EXAMPLES if SHOWN_WITH_ITS_REPORT in example)
    exec(example)
    assert textwrap.indent(capsys.readouterr().out, "    ") in (ROOT / "docs" / "accelerate.md").read_text()


def test_the_readme_is_short_and_shows_each_way_in():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 12_000
    for call in ("effdet_fast.accelerate(", "sigmoid_focal_loss(", "effdet-fast train", "Detector.from_checkpoint("):
        assert call in text


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_linked_file_and_heading_is_there(page):
    for link in re.findall(r"\]\(([^):]+)\)", page.read_text()):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link
