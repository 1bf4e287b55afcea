"""A JSON file that cannot be read is told in a sentence, with what to do."""

import re

import pytest

from warploom.recipes.errors import UserError
from warploom.recipes.files import read_json


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (b"[1]", "must hold a JSON object, it holds [1]"),
        (b"{", "must be JSON in UTF-8 ("),
        (b'{"a": "\xff"}', "must be JSON in UTF-8 ("),
        (b"[" * 100_000, "must be JSON in UTF-8 ("),
    ],
)
def test_what_a_file_holds_instead_is_told(tmp_path, held, said):
    path = tmp_path / "a.json"
    path.write_bytes(held)
    with pytest.raises(UserError, match=f"^{re.escape(f'{path} {said}')}.*: fetch it$"):
        read_json(path, "fetch it", missing={})


def test_a_file_that_is_not_there_is_refused_or_what_the_caller_says(tmp_path):
    path = tmp_path / "a.json"
    assert read_json(path, missing={"a": 1}) == {"a": 1}
    with pytest.raises(UserError, match="must be a file to read .*: mend it, or fetch it again"):
        read_json(path)
    path.write_text('{"a": "ä"}', encoding="utf-8")
    assert read_json(path) == {"a": "ä"}
