"""Why a request is not answered, in the shape that OpenAI's clients read."""

import json
from collections.abc import Mapping
from typing import Any


class Refusal(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: One sentence: what must hold, what was found, what to do.
        outcome: As what the request is counted.
        param: Field of the body that the sentence is about.
        code: A word for programs.
        headers: More headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        outcome: str = "invalid",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.outcome = status, message, outcome
        self.param, self.code, self.headers = param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the error as an object."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        said = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": said}


def stopping() -> Refusal:
    """Return what is said once the server is to stop."""
    return Refusal(
        503,
        "the server is stopping: ask another one, or later",
        outcome="unavailable",
        code="stopping",
        headers={"Retry-After": "5"},
    )


def failed() -> Refusal:
    """Return what is said once the engine has failed."""
    return Refusal(
        500,
        "the engine has failed and the server ends: see its log",
        outcome="failed",
        code="engine",
    )


def dump(value: Any) -> bytes:
    """Write JSON; a lone surrogate, which UTF-8 cannot have, becomes its escape."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")
