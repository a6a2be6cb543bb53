"""Reads this project's docstrings for the site, whose renderer expects Markdown.

The section ``Example:`` becomes the one that griffe calls Examples, and roles such as ``:func:`name``` become
links to the name's place in the API reference, or plain code where it has none.
"""

import re
from typing import Any

import griffe

ROLE = re.compile(r":\w+:`~?([\w.]+)`")


class Docstrings(griffe.Extension):
    """Called by mkdocstrings for every object; see ``mkdocs.yml``."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrites the docstring of one function, class, method or module."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = ROLE.sub(lambda role: _link(role[1], obj), text)


def _link(name: str, near: griffe.Object) -> str:
    """A link to the name as seen from an object: one of its own members, of its module, or a full path."""
    scope = near
    while "." not in name and scope is not None:
        if name in scope.members:
            name = f"{scope.path}.{name}"
        scope = scope.parent
    label = name.removeprefix(f"{near.module.path}.")
    return f'<autoref identifier="{name}" optional><code>{label}</code></autoref>'
