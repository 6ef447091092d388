"""The command line that a config stands for, to show and to paste."""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any


def shell_command(subcommand: str, config: Any, *, positional: Sequence[str] = ()) -> str:
    """``jaxopt-suite SUBCOMMAND`` with every option not at its default, quoted for a shell.

    Args:
      subcommand: its name.
      config: a dataclass with the options as fields.
      positional: names of the fields that are given without an option's name, first.
    """
    words = ["jaxopt-suite", subcommand, *(str(getattr(config, name)) for name in positional)]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default or field.name in positional:
            continue
        option = "--" + field.name.replace("_", "-")
        if value is True:
            words.append(option)
            continue
        for item in value if isinstance(value, tuple) else (value,):
            words += [option, str(item)]
    return shlex.join(words)
