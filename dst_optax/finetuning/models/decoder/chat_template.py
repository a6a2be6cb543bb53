"""Conversations in the words that a model was trained with."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2  # pyright: ignore[reportMissingImports]
from jinja2.ext import Extension  # pyright: ignore[reportMissingImports]
from jinja2.sandbox import ImmutableSandboxedEnvironment  # pyright: ignore[reportMissingImports]


class ChatTemplate:
    """A chat template of the Hugging Face hub.

    Args:
      template: in Jinja's language.
      special_tokens: what it may name, e.g. ``bos_token``.

    Raises:
      ValueError: Jinja cannot read it.

    Example:
      >>> template = ChatTemplate("{% for m in messages %}{{ m.content }}{{ end }}{% endfor %}", {"end": "|"})
      >>> template([{"role": "user", "content": "Hi"}])
      'Hi|'
    """

    def __init__(self, template: str, special_tokens: Mapping[str, str]):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {**special_tokens, "raise_exception": _refuse}
        try:
            self._template = environment.from_string(template)
        except jinja2.TemplateError as e:
            raise ValueError(f"the chat template cannot be read: {e}.") from e

    def __call__(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        """The messages as one text.

        Args:
          messages: ``{"role": ..., "content": ...}``.
          add_generation_prompt: whether the beginning of an answer follows.

        Returns:
          The text.

        Raises:
          ValueError: the template refuses the messages, or fails.
        """
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None
            )
        except (jinja2.TemplateError, TypeError, AttributeError) as e:
            raise ValueError(f"the chat template refuses the messages: {e}.") from e


class Generation(Extension):
    """``{% generation %}``, which marks answers for other trainers and changes no text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        """What stands between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **settings: Any) -> str:
    """As transformers does it; Jinja's own is for HTML."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **settings)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
