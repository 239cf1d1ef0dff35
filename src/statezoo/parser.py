"""Command-line parsers that answer a mistake in a line or two, with the nearest right word."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, NoReturn

import docstring_parser
from jsonargparse import ArgumentParser

NOISE = re.compile(
    r"^(Subtypes|Given value|Value type|Expected a path but|Does not validate against any|Errors|"
    r"Not a subclass of|Type .* expects: a class path)"
)
EXPECTED = re.compile(
    r"Expected an? (?!path |dot )(?:<class '(\w+)'>|(?:typing\.)?(\S.*?))\.?(?: Got value: (.*))?"
)
NO_SUCH_KEY = (
    r"Option '([^']+)' is not accepted",
    r"Key '([^']+)' is not expected",
    r"unrecognized arguments: (?:--)?(\S+)",
    r"[Dd]oes not accept (?:nested key|option) '([^']+)'",
)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean x?)"`` where a known word is near, else nothing."""
    options = {name.lower(): name for name in known}
    near = get_close_matches(word.lower(), options, 1, cutoff=0.55)
    return f" (did you mean {options[near[0]]}?)" if near else ""


def shorten(message: str, known: Callable[[str], Iterable[str]]) -> str:
    """Turn a nested message of jsonargparse into one line: where, and what is wrong there.

    Args:
        message: The message.
        known: Words that could have been meant, for the dotted key where one is not known.
    """
    path: list[str] = []
    reasons: list[str] = []
    types: list[str] = []
    given = ""
    for raw in message.splitlines():
        line = raw.strip().lstrip("-").strip()
        for key in re.findall(r"Parser key \"([^\"]+)\":?", line):
            if key not in path and not (path and path[-1].endswith(f".{key}")):
                path.append(key)
        if found := re.match(r"(\w+)\.help: ", line):
            path.append(found[1])
            line = line[found.end() :]
        line = re.sub(r"^.*Parser key \"[^\"]+\":?", "", line).strip()
        line = re.sub(
            r"^(Problem with given class_path [^:]*|Validation failed):", "", line
        ).strip()
        given = line.removeprefix("Given value: ") if line.startswith("Given value: ") else given
        if found := EXPECTED.fullmatch(line):
            types += [found[1] or found[2]] if found[1] != "NoneType" else []
            given = found[3] or given
        elif line and not NOISE.match(line):
            reasons.append(line)
    if types:
        reasons.append(f"expected {' or '.join(types)}, got {given}")
    where = _join(path)
    reason = _reword(reasons, where, known)
    return f"{where}: {reason}" if where else reason


def _join(path: list[str]) -> str:
    """Join nested keys; an inner key that repeats the outer one replaces it."""
    joined = ""
    for key in path:
        key = key.removeprefix("init_args.")
        joined = key if not joined or key.startswith(f"{joined}.") else f"{joined}.{key}"
    return re.sub(r"\.(init_args|dict_kwargs)\b", "", joined)


def _reword(reasons: list[str], where: str, known: Callable[[str], Iterable[str]]) -> str:
    text = " ".join(" ".join(reasons).split())
    if found := re.search(r"Expected a dot import path string: (\S+)", text):
        word = found[1].rstrip(".")
        return f"no class named {word!r}{nearest(word, known(where))}"
    for pattern in NO_SUCH_KEY:
        if found := re.search(pattern, text):
            word = found[1].split("=")[0]
            return f"no setting {word!r}{nearest(word, known(where))}"
    if found := re.search(r"arguments are required: (.*)", text):
        names = sorted(name.rpartition(".")[2].strip("- ") for name in found[1].split(","))
        options = set(known(where))
        dashed = options | {"model", "data"}  # a part without its class does not know its own name
        missing = [f"--{name}" if name in dashed else name for name in names]
        more = " (statezoo list shows what there is)" if {"model", "data"} & {*names} else ""
        return f"{' and '.join(missing)} must be given{more}"
    if found := re.search(r"Unable to load config '([^']*)'", text):
        return f"expected settings, or a file of them, got {found[1]!r}"
    return f"{text[:397]}..." if len(text) > 400 else text or "wrong value"


class FriendlyErrors(ArgumentParser):
    """A parser whose errors fit on two lines; ``JSONARGPARSE_DEBUG`` shows them in full."""

    program: str | None = None
    """What the user typed, for parsers of a part, which know only their part."""
    part: str = ""
    """What a parser of a part parses, such as ``model GLA``."""

    def known_words(self, where: str) -> Iterable[str]:
        """Return the words that could have been meant at the dotted key ``where``."""
        words = [option.lstrip("-") for option in self._option_string_actions]
        inside = [word.removeprefix(f"{where}.") for word in words if word.startswith(f"{where}.")]
        return inside or words

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong and where to look, and exit with code 2."""
        if os.environ.get("JSONARGPARSE_DEBUG"):
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        words = getattr(parser, "known_words", self.known_words)
        program = type(self).program or parser.prog.replace(" [options]", "")
        text = shorten(message, words)
        kind, _, name = self.part.partition(" ")
        more = f"{program} --{kind}.help {name}" if kind else f"{program} --help"
        fail(program, f"{self.part}: {text}" if kind else text, f"{more} lists the settings")


def fail(program: str, message: str, hint: str = "", code: int = 2) -> NoReturn:
    """Write a short error and exit."""
    sys.stderr.write(f"{program}: error: {message}\n")
    if hint:
        sys.stderr.write(f"({hint})\n")
    raise SystemExit(code)


def command_parser(run: Callable[..., Any], program: str) -> ArgumentParser:
    """Return a parser for a function: its positional arguments, and its keyword ones as options.

    Args:
        run: A function with types and a docstring; ``*names`` means one or more.
        program: What the user typed to get here.
    """
    text = docstring_parser.parse(inspect.getdoc(run) or "")
    helps = {p.arg_name.lstrip("*"): p.description for p in text.params}
    parser = FriendlyErrors(prog=program, description=text.short_description, exit_on_error=True)
    for name, parameter in inspect.signature(run, eval_str=True).parameters.items():
        about: dict[str, Any] = {"type": parameter.annotation, "help": helps.get(name)}
        if parameter.annotation in (bool, bool | str):
            about |= {"nargs": "?", "const": True}  # --png is --png true
        if parameter.annotation in (list[str], list[str] | None):
            about |= {"type": str, "nargs": "+"}
        if parameter.kind is parameter.VAR_POSITIONAL:
            parser.add_argument(name, nargs="+", **about)
        elif parameter.kind is parameter.KEYWORD_ONLY:
            required = parameter.default is parameter.empty
            about |= {"required": True} if required else {"default": parameter.default}
            parser.add_argument(f"--{name}", **about)
        elif parameter.default is parameter.empty:
            parser.add_argument(name, **about)
        else:
            parser.add_argument(name, nargs="?", default=parameter.default, **about)
    return parser


def underscored(arguments: Iterable[str]) -> list[str]:
    """Write ``--max-new-tokens`` as ``--max_new_tokens``; values stay as they are."""
    found = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if re.match(r"--[a-zA-Z]", name):
            name = "--" + name[2:].replace("-", "_")
        found.append(name + equals + value)
    return found
