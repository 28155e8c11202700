"""From a command line and a YAML file to dataclasses: errors of one line, and a help that can be read."""

import argparse
import copy
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from .._names import did_you_mean
from ..runs.text import one_line
from ..trainers.trackers import check_trackers


_OWN = ("help", "help_all", "config")


class _Help(argparse.HelpFormatter):
    """One spelling of each flag, and its default where it has one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return ", ".join(action.option_strings)
        names = list(map(str, action.choices or ()))
        metavar = f"{{{','.join(names)}}}" if 0 < len(names) < 5 else "VALUE"
        return f"{action.option_strings[0]} {metavar}{' ...' if action.nargs == '+' else ''}"

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        if default in (None, [], argparse.SUPPRESS, ...) or action.nargs == 0:
            return action.help or ""
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{action.help or ''} (default: {shown.replace('%', '%%')})"


class _HelpAll(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: "CommandLine", *_: Any) -> None:
        print(argparse.ArgumentParser.format_help(parser))
        parser.exit()


class CommandLine(HfArgumentParser):
    """The parser of a command, `prm-hf <command>`.

    Args:
        command, description: what `--help` says first.
        dataclass_types: the dataclasses whose fields are the flags.
        shown: by the title of a group the flags of `--help`; `--help-all` shows all. Default: all.
        epilog: what `--help` says last.
    """

    def __init__(
        self,
        command: str,
        description: str,
        dataclass_types: Sequence[type],
        shown: Mapping[str, Sequence[str]] | None = None,
        epilog: str = "",
    ) -> None:
        hints = {name: hint for kind in dataclass_types for name, hint in get_type_hints(kind).items()}
        self._optional = {name for name, hint in hints.items() if NoneType in get_args(hint)}
        self._shown, self._closing = shown, epilog
        super().__init__(
            dataclass_types,
            prog=f"prm-hf {command}",
            usage=f"prm-hf {command} [--config FILE.yaml] [--argument VALUE ...]",
            description=description,
            formatter_class=_Help,
            allow_abbrev=False,
            add_help=False,
        )
        self.add_argument("-h", "--help", action="help", help="the arguments that are used most")
        if shown is not None:
            self.add_argument("--help-all", action=_HelpAll, help="all arguments")
        self.add_argument("--config", help="a YAML file with arguments, which flags override")
        for action in self._actions:
            action.type = {int: _integer, float: _number, string_to_bool: _boolean}.get(action.type, action.type)
        # Of a field that has a `--no_…` too, the flag of its own name
        self._of_field = {action.dest: action for action in reversed(self._actions)}

    def parse(self, arguments: list[str], defaults: Callable[[set[str]], dict[str, Any]]) -> tuple:
        """The dataclasses of a command line.

        Args:
            arguments: the command line, in which `--config` may name a YAML file.
            defaults: gives the default values of this command, of the names that are given.

        Raises:
            ValueError, TypeError: an argument is unknown or cannot be what it is given as.
            ValueError, ImportError: a tracker of `report_to` cannot begin a run.
        """
        config = self._read_config(arguments)
        flags = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        given = {self._option_string_actions[flag].dest for flag in flags & self._option_string_actions.keys()}
        self.set_defaults(**defaults(given | {name for name, value in config.items() if value is not None}))
        self.set_defaults(**config)
        try:
            *parsed, _, unknown = self.parse_args_into_dataclasses(
                arguments, return_remaining_strings=True, look_for_args_file=False
            )
        except (ValueError, ImportError) as error:  # of transformers and TRL too
            raise (ImportError if isinstance(error, ImportError) else ValueError)(one_line(error)) from error
        if unknown:
            self._refuse(unknown[0].partition("=")[0])
        for one in parsed:
            if isinstance(one, TrainingArguments):
                check_trackers(one.report_to, one.trackio_space_id)
        return tuple(parsed)

    def error(self, message: str) -> None:
        """argparse would print the usage, of hundreds of lines, and exit."""
        message = re.sub(r"^argument (--?[\w-]+)\S*: ", r"`\1` ", message)
        if wrong := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)$", message):
            known = [choice.strip("' ") for choice in wrong[2].split(",")]
            raise ValueError(
                message.replace("invalid choice: ", "has no choice ") + f".{did_you_mean(wrong[1], known)}"
            )
        raise ValueError(f"{message}.")

    def _refuse(self, word: str) -> None:
        if not word.startswith("-"):
            raise ValueError(f"{word!r} belongs to no argument of `{self.prog}`: flags start with `--`.")
        near = did_you_mean(word, self._option_string_actions)
        raise ValueError(f"`{word}` is no argument of `{self.prog}`.{near} `{self.prog} --help` lists them.")

    # ---- YAML ----

    def _read_config(self, arguments: Sequence[str]) -> dict[str, Any]:
        """What the file of `--config` holds, each value as its flag would read it."""
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.error = self.error
        finder.add_argument("--config")
        file = finder.parse_known_args(list(arguments))[0].config
        if file is None:
            return {}
        config = read_yaml(Path(file))
        env = config.pop("env", {})
        if not isinstance(env, dict):
            raise TypeError(f"`env` in {file} must map names of environment variables to values, got {env!r}.")
        os.environ.update({str(key): str(value) for key, value in env.items()})
        actions = {name: action for name, action in self._of_field.items() if name not in _OWN}
        for name, value in config.items():
            if name not in actions:
                raise ValueError(f"`{name}` in {file} is no argument.{did_you_mean(name, actions)}")
            try:
                config[name] = self._convert(actions[name], value)
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"`{name}` in {file} {error}{'' if str(error).endswith('?') else '.'}") from error
        return config

    def _convert(self, action: argparse.Action, value: Any) -> Any:
        if value is None and action.dest not in self._optional:
            raise argparse.ArgumentTypeError("has no value: give it one, or leave it out")
        if action.nargs == "+" and value is not None:
            return [self._convert_one(action, one) for one in (value if isinstance(value, list) else [value])]
        return self._convert_one(action, value)

    @staticmethod
    def _convert_one(action: argparse.Action, value: Any) -> Any:
        is_plain = action.type in (_integer, _number, _boolean) or action.choices is not None
        is_structure = isinstance(value, list | dict)  # which a flag of text may have as well, written as JSON
        if value is None or not (is_plain or action.type is str and not is_structure):
            return value
        if is_structure:
            raise argparse.ArgumentTypeError(f"takes one value, got {value!r}")
        if value is False and "no" in (action.choices or ()):  # YAML reads a plain `no` as False
            return "no"
        if isinstance(value, bool) and action.type in (_integer, _number):
            wanted = "an integer" if action.type is _integer else "a number"
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {value!r}")
        value = action.type(str(value))
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            near = did_you_mean(value, known)
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(known)}, got {value!r}{near and '.' + near}")
        return value

    # ---- Help ----

    def format_help(self) -> str:
        """The groups of `shown`, each flag with the first sentence of its help."""
        groups = self._shown or {"arguments": [action.dest for action in self._actions if action.dest not in _OWN]}
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        for title, names in {"options": _OWN, **groups}.items():
            formatter.start_section(title)
            formatter.add_arguments([_in_short(self._of_field[name]) for name in names if name in self._of_field])
            formatter.end_section()
        return formatter.format_help() + ("\n" + self._closing if self._closing else "")


def _in_short(action: argparse.Action) -> argparse.Action:
    short = copy.copy(action)
    if action.help is not argparse.SUPPRESS:
        short.help = re.split(r"(?<=[a-z`)])\. (?=[A-Z`])", " ".join((action.help or "").split()))[0].rstrip(".")
    return short


class _Loader(yaml.SafeLoader):
    """A name that stands twice is an error, where YAML keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        for key, _ in reversed(node.value):
            if names.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> dict[str, Any]:
    """The arguments in a YAML file.

    Raises:
        ValueError: the file is not there, is empty or not YAML.
        TypeError: it maps no names to values.
    """
    if not file.is_file():
        raise ValueError(f"`--config` {str(file)!r} {'is a folder' if file.is_dir() else 'does not exist'}.")
    try:
        config = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}): save it as UTF-8.") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or one_line(error)
        line = "" if mark is None else f", line {mark.line + 1}"
        tab = ": YAML is indented with spaces, not with tabs" if "'\\t'" in str(problem) else ""
        raise ValueError(f"{file}{line} is not YAML: {problem}{tab}.") from error
    example = "it must map names of arguments to values, as in `seeds: [0, 1]`"
    if config is None:
        raise ValueError(f"{file} is empty: {example}.")
    if not isinstance(config, dict):
        raise TypeError(f"{file} holds {'a list' if isinstance(config, list) else repr(config)}: {example}.")
    if odd := [key for key in config if not isinstance(key, str)]:
        raise ValueError(f"{file} has the name {odd[0]!r}, which is no text: {example}.")
    return config


def _number(text: str, wanted: str = "a number") -> float:
    try:
        return float(text)
    except ValueError:
        lists = "; the decimal mark is a point, and several are separated by spaces, in YAML `[a, b]`"
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}{lists if ',' in text else ''}") from None


def _boolean(text: str) -> bool:
    try:
        return string_to_bool(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}") from None


def _integer(text: str) -> int:
    """Also of `1e3` and `10.0`, as YAML and others write whole numbers."""
    try:
        return int(text)
    except ValueError:
        value = _number(text, "an integer")
    if value % 1 != 0:
        raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}")
    return int(value)
