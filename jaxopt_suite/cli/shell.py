"""The command line that a config stands for, to show and to paste."""

import dataclasses
import shlex

from jaxopt_suite.experiments.config import LayoutConfig


def shell_command(subcommand: str, config: LayoutConfig) -> str:
    """``jaxopt-suite SUBCOMMAND`` with every option not at its default, quoted for a shell."""
    words = ["jaxopt-suite", subcommand]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        option = "--" + field.name.replace("_", "-")
        if value is True:
            words.append(option)
            continue
        for item in value if isinstance(value, tuple) else (value,):
            words += [option, str(item)]
    return shlex.join(words)
