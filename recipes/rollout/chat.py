"""Chat templates: from messages to the text that a model was trained on.

A template is a program that came with the weights. It runs in Jinja's sandbox for immutable data,
sees nothing but JSON values, and may not store a name that begins with an underscore.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from ..errors import UserError


class Chat:
    """A compiled chat template.

    Args:
        source: The template.
        special: Spellings of special tokens that it may use, by role (`bos_token`, ...).

    Raises:
        UserError: If jinja2 is not installed, or the template cannot be compiled.
    """

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        self.special = dict(special)
        self._template = _compile(source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        mark: Callable[[Any], Any] = lambda given: given,
        /,
        *,
        add_generation_prompt: bool = True,
        **more: Any,
    ) -> str:
        """Return the text of a conversation.

        Args:
            messages: Each has a `role` and what the template wants beside it, mostly `content`;
                keys whose value is `None` count as missing.
            mark: Maps the messages and what else is given, as JSON values, to what is rendered.
            add_generation_prompt: Whether the text ends where the model's answer begins.
            **more: What else the template may use: `tools`, `documents`, switches of its own.

        Raises:
            UserError: If there are no messages, one has no role or is not plain JSON, or the
                template refuses the conversation.
        """
        if not messages or not all(isinstance(m, Mapping) and "role" in m for m in messages):
            raise UserError(f"messages must be objects with a role, one at least; got {messages!r}")
        said = [{k: v for k, v in m.items() if v is not None} for m in messages]
        given = {"tools": None, "documents": None, **more, "messages": said}
        try:
            plain = self.special | mark(json.loads(json.dumps(given)))
        except (RecursionError, TypeError, ValueError) as error:
            raise UserError(f"messages must be plain JSON: {error}") from None
        try:
            return str(self._template.render(**plain, add_generation_prompt=add_generation_prompt))
        except Exception as error:  # of a program that came with the weights
            raise UserError(f"the chat template refuses the conversation: {error}") from None


def _compile(source: str) -> Any:
    try:
        import jinja2
        import jinja2.sandbox
    except ImportError as error:
        raise UserError(
            f"a chat template needs jinja2: pip install 'warploom[hf]' ({error})"
        ) from None
    from .jinja import Generation, Namespace

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": _now,
        "namespace": Namespace,
    }
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template cannot be compiled: {error}") from None


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Write JSON as it is; Jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
