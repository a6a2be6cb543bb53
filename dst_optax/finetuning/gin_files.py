"""Gin files: where ours lie, and errors for settings that gin itself would ignore.

Used by ``dst-optax`` and by T5X's programs; needs gin alone.
"""

import difflib
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import gin  # pyright: ignore[reportMissingImports]
from gin import config as gin_config  # pyright: ignore[reportMissingImports]
from gin import resource_reader  # pyright: ignore[reportMissingImports]

CONFIGS = Path(str(resources.files("dst_optax.finetuning"))) / "configs"
"""The gin files that come with the package."""

MACRO = "gin.macro"
Key = tuple[str, str]
"""A scope and the full name of a configurable; for a macro, its name and ``MACRO``."""


def add_search_paths(*directories: str) -> None:
    """Lets gin find our files from anywhere, as ``configs/t5x/dst.gin`` and as ``t5x/dst.gin``.

    Args:
      *directories: more places to look in, before ours.
    """
    for directory in (*directories, str(CONFIGS), str(CONFIGS.parent)):
        gin.add_config_file_search_path(directory)
    readers: list[Any] = gin_config._FILE_READERS
    for i, (reader, exists) in enumerate(readers):
        if exists is resource_reader.system_path_file_exists:
            readers[i] = (reader, _is_in_a_package)


def _is_in_a_package(file: str) -> bool:
    """The check of gin, which fails where a directory on Python's path, such as ``models``, is no package."""
    try:
        return resource_reader.system_path_file_exists(file)
    except TypeError:
        return False


def configure(files: Sequence[str], bindings: Sequence[str]) -> None:
    """Parses gin files, then bindings that override them.

    Macros of the files that no file reads are refused: they are misspelt.

    Args:
      files: paths, looked for where :func:`add_search_paths` says.
      bindings: ``NAME=VALUE``, values as in Python.

    Raises:
      ValueError: a file is missing, a value is not Python's, a number is given as a string, or a name is
        unknown.
    """
    try:
        parsed = gin.parse_config_files_and_bindings(files, None, finalize_config=False)
    except OSError as error:
        if "Unable to open file" in str(error):
            raise ValueError(str(error).rstrip(".") + ".") from error
        raise
    except (SyntaxError, tokenize.TokenError) as error:
        raise ValueError(f"{', '.join(files)}: {error}") from error
    read = {name for text in _texts(parsed) for name in re.findall(r"%([\w./]+)", text)}
    for name, selector in _config():
        if selector == MACRO and name not in read:
            raise ValueError(f"{', '.join(files)}: nothing reads {name}{_nearest(name, read)}")
    for binding in bindings:
        _check_kind(binding)
        try:
            gin.parse_config(binding)
        except (SyntaxError, tokenize.TokenError) as error:
            raise ValueError(
                f"--gin.{binding}: the value is not Python's. Strings need quotes that the shell leaves in "
                "place: '--gin.RUN_DIR=\"runs/rte\"'."
            ) from error


def _texts(parsed: Iterable[Any]) -> Iterator[str]:
    """Contents of parsed files and of what they include."""
    for file in parsed:
        places = (Path(prefix, file.filename) for prefix in gin_config._LOCATION_PREFIXES)
        yield next(place.read_text() for place in places if place.is_file())
        yield from _texts(file.includes)


def _check_kind(binding: str) -> None:
    """Refuses a string for a macro that the files give a number, and the other way round."""
    name, _, value = binding.partition("=")
    before = _config().get((name.strip(), MACRO), {}).get("value")
    try:
        now = gin_config.parse_value(value)
    except (SyntaxError, tokenize.TokenError):
        return  # the parser's own error names the place
    if (_is_number(before) and isinstance(now, str)) or (isinstance(before, str) and _is_number(now)):
        quotes = "leave out the quotes" if isinstance(now, str) else "put it in quotes"
        raise ValueError(f"{name} is {now!r} here and {before!r} in the gin files; {quotes}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check(bindings: Iterable[str], function: Callable[..., Any] | None = None) -> None:
    """Refuses settings that nothing reads, be they misspelt or overridden, and those without a value.

    Args:
      bindings: ``NAME=VALUE``, already parsed.
      function: what will be called: it must reach all settings, and have a value for all it reaches. None
        lets any place read a setting.

    Raises:
      ValueError: names the setting, and the nearest one that something reads.
    """
    config = _config()
    macros = set(_macros_read(config))
    scopes = {s for r in _references(config) if r.configurable.selector != MACRO for s in r.scopes}
    reachable = None if function is None else _reachable(config, function)
    for binding in bindings:
        name = binding.partition("=")[0].strip()
        *scope, setting = name.split("/")
        if unknown := [s for s in scope if s not in scopes]:
            raise ValueError(f"nothing has the scope of {name}{_nearest(unknown[0], scopes)}")
        if "." not in setting and name not in macros:
            raise ValueError(f"nothing reads {name}{_nearest(name, macros)}")
        if reachable is not None and _key(name) not in reachable:
            raise ValueError(
                f"nothing reads {name} here: another file or setting replaces what would read it."
            )
    for name, selector in sorted(reachable or ()):
        if selector == MACRO and (name, selector) not in config:
            raise ValueError(f"{name} has no value; give --gin.{name}=... or a gin file that sets it.")


def configured() -> set[Callable[..., Any]]:
    """Functions and classes that have settings."""
    return {gin_config._REGISTRY[selector].wrapped for _, selector in _config()}


def used() -> set[Callable[..., Any]]:
    """Functions and classes that a setting refers to."""
    return {r.configurable.wrapped for r in _references(_config())}


def _nearest(name: str, names: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, sorted(names), 1)
    return f"; did you mean {matches[0]}?" if matches else "."


def _config() -> dict[Key, dict[str, Any]]:
    return gin_config._CONFIG


def _key(name: str) -> Key:
    if "." not in name:
        return name, MACRO
    return "", gin_config.ParsedBindingKey.parse(name).complete_selector


def _references(values: Any) -> Iterator[Any]:
    return gin_config.iterate_references(values)


def _macros_read(values: Any) -> Iterator[str]:
    return ("/".join(r.scopes) for r in _references(values) if r.configurable.selector == MACRO)


def _reachable(config: dict[Key, dict[str, Any]], function: Callable[..., Any]) -> set[Key]:
    """Macros and, without their scopes, configurables that a call of the function may evaluate."""
    root = gin_config._inverse_lookup(function)
    if root is None:
        raise ValueError(f"the gin files say nothing about {function.__name__}; give its own.")
    pending, seen = [("", root.selector)], set()
    while pending:
        key = pending.pop()
        if key in seen:
            continue
        seen.add(key)
        for (scope, selector), values in config.items():
            if selector == key[1] and (selector != MACRO or scope == key[0]):
                for r in _references(values):
                    is_macro = r.configurable.selector == MACRO
                    pending.append(("/".join(r.scopes) if is_macro else "", r.configurable.selector))
    return seen


def identity(config: str) -> str:
    r"""The part of a configuration that a resumed command must repeat: it may ask for more runs.

    Args:
      config: all settings, as gin prints them.

    Example:
      >>> identity("A = 1\nRUN_DIR = 'x'\nRNG_SEEDS = \\\n    [0,\n     1]\nB = 2")
      'A = 1\nB = 2\n'
    """
    free = r".*\.run_dir|RUN_DIR|RNG_SEEDS|BUDGETS|LEARNING_RATES"
    return re.sub(rf"^(?:{free}) = .*\n(?:[ \t]+.*\n)*", "", config + "\n", flags=re.MULTILINE)
