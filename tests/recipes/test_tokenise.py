"""The command `warploom tokens`: a tokenizer, a store, and what a mistake says."""

import pytest

from warploom import cli
from warploom.recipes.tokens import Tokenizer, open_store


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(40):
        lines = "".join(f"line {number * i} of document {number}\n" for i in range(30))
        (folder / f"{number}.txt").write_text(lines)
    (folder / "blob.bin").write_bytes(b"\0\1")
    return folder


def test_train_then_build_then_show(text, tmp_path, capsys):
    tokenizer, store = str(tmp_path / "tokenizer"), str(tmp_path / "store")
    assert cli.main(["tokens", "train", tokenizer, "--text", str(text), "--vocabulary", "300"]) == 0
    shown = capsys.readouterr().out
    assert "round trip: lossless" in shown
    assert "1 binary (blob.bin)" in shown
    assert Tokenizer.load(tokenizer).vocabulary == 300

    words = ["--text", str(text), "--tokenizer", tokenizer, "--held-out", "0.3"]
    assert cli.main(["tokens", "build", store, *words]) == 0
    built = open_store(store)
    assert built.train.documents + built.heldout.documents == 40
    capsys.readouterr()
    assert cli.main(["tokens", "show", store]) == 0
    assert str(len(built.train.ids)) in capsys.readouterr().out


def test_mistakes_are_one_sentence_and_code_2(text, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for words, sentence in [
        (["show", str(tmp_path)], "must hold manifest.json"),
        (["train", str(tmp_path / "taken"), "--text", str(text)], "must be new, and it exists"),
        (["train", str(tmp_path / "link"), "--text", str(text)], "must be new, and it exists"),
        (["build", str(tmp_path / "s"), "--text", str(tmp_path / "nothing")], "there is none"),
        (["train", str(tmp_path / "t"), "--text", str(text), "--vocabulary", "9"], "at least"),
    ]:
        assert cli.main(["tokens", *words]) == 2
        shown = capsys.readouterr()
        assert sentence in shown.err
        assert shown.err.strip().count("\n") == 0
    assert not (tmp_path / "s").exists()
