"""What chat templates use beside Jinja's own words; needs jinja2."""

from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.utils import Namespace as Plain


class Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: what an assistant said, rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the body, with a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class Namespace(Plain):
    """Jinja's namespace, without names that begin with an underscore."""

    def __init__(*args: Any, **names: Any) -> None:
        for name in dict(*args[1:], **names):
            _check(name)
        Plain.__init__(*args, **names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check(name)
        super().__setitem__(name, value)


def _check(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace may hold no name that begins with _; got {name!r}")
