"""Changing params.yaml for people: comments stay, and a change that is not allowed touches nothing."""

import io
from pathlib import Path
from typing import Any

import typer
from ruamel.yaml import YAML, YAMLError

from loupe.config import load_params, parse_params
from loupe.errors import ConfigError


def parse_change(text: str) -> tuple[str, Any]:
    """Key and value of what --set takes."""
    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"--set takes key=value, such as fetch.fraction=1.0; got {text!r}")
    try:
        return key, YAML(typ="safe").load(value)
    except YAMLError as error:
        raise ConfigError(f"--set takes a value in YAML; {value!r} is none ({' '.join(str(error).split())})") from error


def change_params(path: Path, changes: dict[str, Any]) -> None:
    """Write params.yaml anew, comments and all, if it is as it should be after the changes.

    Args:
        changes: values by dotted key.

    Raises:
        ConfigError: if it is not; the file is then left as it was.
    """
    load_params(path)
    if not changes:
        return
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 200
    values = yaml.load(path)
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = section.get(parent)
            if not isinstance(section, dict):
                raise ConfigError(f"{path} has no section {parent!r}, which {key} would be in")
        section[last] = value
    text = io.StringIO()
    yaml.dump(values, text)
    parse_params(YAML(typ="safe").load(text.getvalue()), str(path))
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text.getvalue(), encoding="utf-8")
    unfinished.replace(path)
    typer.echo(f"{path} now has {', '.join(f'{key}: {value}' for key, value in changes.items())}")
