"""Writing into folders that others can write to."""

import os
import stat

import pytest

from effdet_fast import files
from effdet_fast.files import refuse_links, write_atomically, write_json


def test_a_link_at_the_target_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "a.json").symlink_to("victim")
    write_json(str(tmp_path / "a.json"), [1])
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "a.json").is_symlink() and (tmp_path / "a.json").read_text() == "[1]"


def test_a_planted_temporary_file_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "0" * 2 * count)
    (tmp_path / "victim").write_text("precious")
    planted = tmp_path / f".{'0' * 16}.a.json"
    planted.symlink_to("victim")
    with pytest.raises(FileExistsError):
        write_json(str(tmp_path / "a.json"), [1])
    assert (tmp_path / "victim").read_text() == "precious" and not (tmp_path / "a.json").exists()


def test_names_are_new_and_files_have_the_usual_rights(tmp_path):
    seen = []
    before = os.umask(0o022)
    try:
        for _ in range(2):
            write_atomically(str(tmp_path / "a.txt"), lambda name: (seen.append(name), open(name, "w").close()))
    finally:
        os.umask(before)
    assert len(set(seen)) == 2 and all(name.endswith(".a.txt") for name in seen)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o644


def test_names_as_long_as_there_can_be(tmp_path):
    name = "é" * 125 + ".json"
    write_json(str(tmp_path / name), [])
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_links_between_the_output_and_a_file_in_it(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "out_link").symlink_to("out")
    refuse_links([str(tmp_path / "out_link" / "a" / "x.png")], str(tmp_path / "out_link"))
    with pytest.raises(ValueError, match="out/a/link: is a link inside the output folder"):
        refuse_links([str(tmp_path / "out" / "a" / "link" / "sub" / "x.png")], str(tmp_path / "out"))
