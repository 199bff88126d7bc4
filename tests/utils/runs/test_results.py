"""Folders of results: what a user has in them stays."""

import json

import pytest

from utils.common.errors import UserError
from utils.runs.results import RECORD, ResultsFolder, check_file

FILES, FOLDERS = ("result.json", "labelIds/a.png", "color/a.png"), ("labelIds", "color")


def write(folder, files=FILES, overwrite=True):
    """What a run does."""
    results = ResultsFolder("--output-dir", folder, overwrite)
    results.prepare(files, FOLDERS)
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("ours")
    return results


def listing(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_only_what_is_recorded_is_replaced(tmp_path, capsys):
    folder = tmp_path / "new/r"
    write(folder)
    (folder / "labelIds/mine.png").write_text("mine")
    with pytest.raises(UserError, match="--output-dir .*: expected a folder without results .or --overwrite., found"):
        write(folder, overwrite=False)
    write(folder, ["result.json", "labelIds/b.png"])
    assert listing(folder) == {"result.json": b"ours", "labelIds": False, "labelIds/b.png": b"ours",
                               "labelIds/mine.png": b"mine", RECORD: (folder / RECORD).read_bytes()}
    assert "1 file left there, which no run has recorded, such as labelIds/m" in capsys.readouterr().out


def test_what_was_not_written_after_all_is_not_recorded(tmp_path):
    results = write(tmp_path)
    (tmp_path / "color/a.png").unlink()
    results.close()
    (tmp_path / "color/a.png").write_text("mine")
    with pytest.raises(UserError, match="color/a.png: expected nothing there"):
        write(tmp_path)
    assert (tmp_path / "color/a.png").read_text() == "mine"


RECORDED = json.dumps(FILES)
FOREIGN = {     # what lies there → what the sentence says
    "folder that is a link": (lambda r, truth: (r / "labelIds").symlink_to(truth),
                              "labelIds: expected a folder of results, found a link"),
    "recorded folder that became a link": (lambda r, truth: [(r / "labelIds").symlink_to(truth),
                                                             (r / RECORD).write_text(RECORDED)],
                                           "labelIds: expected a folder of results, found a link"),
    "folder that is a file": (lambda r, truth: (r / "labelIds").write_text(""),
                              "labelIds: expected a folder of results, found a file"),
    **{f"picture that is a link, {what}": (lambda r, truth, record=record: [
        (r / "labelIds").mkdir(), (r / "labelIds/a.png").symlink_to(truth / "a.png"), (r / RECORD).write_text(record)],
        "labelIds/a.png: expected nothing there, or the result of an earlier run")
       for what, record in (("unrecorded", "[]"), ("recorded", RECORDED))},
    "picture that is a folder": (lambda r, truth: [(r / "labelIds/a.png").mkdir(parents=True),
                                                   (r / RECORD).write_text(RECORDED)], "a.png: expected nothing there"),
    "picture of the user": (lambda r, truth: [(r / "color").mkdir(), (r / "color/a.png").write_text("mine")],
                            "color/a.png: expected nothing there"),
    "scores without a record": (lambda r, truth: (r / "result.json").write_text("{}"),
                                "result.json: expected nothing there"),
    "record that is a link": (lambda r, truth: (r / RECORD).symlink_to(truth / "a.png"),
                              "written.json: expected a record of results, found no regular file"),
    **{f"record {text}": (lambda r, truth, text=text: (r / RECORD).write_text(text),
                          "written.json: expected the names of the results beside it, found something else")
       for text in ('["../truth/a.png"]', '["/etc/x"]', "[1]", "{", '{"a": 1}', "3", '"x"', "[[]]")},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_nothing_is_changed_where_something_else_stands(tmp_path, what):
    folder, truth = tmp_path / "r", tmp_path / "truth"
    folder.mkdir()
    truth.mkdir()
    (truth / "a.png").write_text("truth")
    change, message = FOREIGN[what]
    change(folder, truth)
    before = listing(tmp_path)
    with pytest.raises(UserError, match=message):
        write(folder)
    assert listing(tmp_path) == before


def test_names_and_places_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder, name, message in ((tmp_path / "r", f"color/{'x' * 252}.png", "at most 255 bytes, found xxx.* with 256"),
                                  (tmp_path / "file", "a.png", "expected a folder, found a file"),
                                  (tmp_path / "file/r", "a.png", "expected a folder, found")):
        with pytest.raises(UserError, match=message):
            write(folder, [name])
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file/x.onnx", tmp_path / "folder"):
        with pytest.raises(UserError, match="--export .*: expected"):
            check_file("--export", path)
    for path in (tmp_path / "file", tmp_path / "new/x.onnx"):
        check_file("--export", path)
    assert (tmp_path / "file").read_text() == "mine" and sorted(listing(tmp_path)) == ["file", "folder"]
