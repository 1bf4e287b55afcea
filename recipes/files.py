"""JSON files of a user: what is read, or one sentence about what is there instead."""

import json
from pathlib import Path
from typing import Any

from .errors import UserError


def read_json(
    path: Path, remedy: str = "mend it, or fetch it again", *, missing: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.
        remedy: What to do when it is damaged.
        missing: What is returned where there is no such file; `None` refuses that.

    Raises:
        UserError: If the file cannot be read, is not JSON in UTF-8, or holds another value.
    """
    if missing is not None and not path.exists():
        return missing
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} must be a file to read ({error.strerror}): {remedy}") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path} must be JSON in UTF-8 ({error}): {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, it holds {value!r:.40}: {remedy}")
    return value
