"""From a YAML file and `--name value` on the command line to a `Config`, with complaints in the words of the option."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from klimb.config.kinds import PYTHON_ONLY, UNIONS, Context
from klimb.config.of_trl import OF_TRL
from klimb.config.options import Config
from klimb.nearest import nearest, nearest_file
from klimb.rewards.builtin import BUILTIN, parted


def load(
    path: str | Path | None = None, overrides: Sequence[str] = (), *, others: Iterable[str] = ()
) -> Config:
    """Read a YAML file, then options of the command line over it.

    Args:
        path: the file, or None for options alone.
        overrides: `["--learning_rate", "1e-3", "--family.r=8"]`; hyphens count as underscores.
        others: options of the command itself, of which a misspelt one may have been meant.

    Returns:
        The configuration, with files it names resolved: from the current folder, or if they are not there, from the
        folder of the YAML file.

    Raises:
        ValueError: an unknown or misspelt name, a value that is not possible, YAML that cannot be read.

    Example:
        >>> config = load(None, ["--dataset_name", "a.jsonl", "--reward-funcs", "math:hypot", "--family.r", "8"])
        >>> config.family.r, config.reward_funcs, config.kl_budget
        (8, ['math:hypot'], 1.0)
        >>> load(None, ["--learning_rat", "1"])
        Traceback (most recent call last):
        ...
        ValueError: command line: no option --learning_rat (did you mean '--learning_rate'?); klimb schema lists them
    """
    base = {} if path is None else read_yaml(Path(path))
    arguments = [_underscored(argument) for argument in overrides]
    _check_names(arguments, others)
    where = " and ".join([*([] if path is None else [str(path)]), *(["command line"] if overrides else [])])
    config = _validated(base, arguments, where=where or "command line")
    return config if path is None else _found(config, Path(path).parent)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, without the rights to build anything but plain values.

    Raises:
        ValueError: no such file, not YAML (by line), nothing in it or no mapping, a key that does not exist.
    """
    if path.is_dir():
        raise ValueError(
            f"{path}: got a folder, expected a YAML file, such as a run's {path / 'config.yaml'}"
        )
    if not path.is_file():
        raise ValueError(f"{path}: no such file{nearest_file(path)}")
    try:
        text = path.read_text(encoding="utf-8")
        _check_once(yaml.compose(text, Loader=yaml.SafeLoader), path)
        found = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        raise ValueError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{path}: got {'an empty file' if found is None else type(found).__name__}, expected lines such as "
            "`dataset_name: a.jsonl`"
        )
    for name in _names_in(found):
        if name not in NAMES:
            raise ValueError(f"{path}: no key {name!r}{_meant(name)}; klimb schema lists them")
    return found


def _check_once(node: Any, path: Path) -> None:
    """Refuse a key that stands there twice, of which YAML would take the last."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[object, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ValueError(
                    f"{path}, line {line}: {key.value} stands there a second time (first in line {seen[key.value]}); leave one out"
                )
            if isinstance(key, yaml.ScalarNode):
                seen[key.value] = line
            _check_once(value, path)


def schema() -> dict[str, Any]:
    """JSON schema of the YAML file, for editors."""
    return Config.model_json_schema()


def _names(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for part in get_args(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _names(part, f"{prefix}{name}.")


NAMES = tuple(dict.fromkeys(_names(Config)))


def _meant(name: str, prefix: str = "", others: Iterable[str] = ()) -> str:
    """The end of a message about an option that does not exist."""
    if name in OF_TRL:
        return f" (TRL's name; here '{prefix}{OF_TRL[name]}', see docs/from_trl.md)"
    return nearest(name, [*NAMES, *others], prefix=prefix)


def _names_in(found: Mapping[str, Any]) -> Iterable[str]:
    for name, value in found.items():
        yield str(name)
        if name in UNIONS and isinstance(value, Mapping):
            yield from (f"{name}.{inner}" for inner in value)


def _underscored(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument


def _check_names(arguments: Sequence[str], others: Iterable[str]) -> None:
    words = iter(arguments)
    for word in words:
        if not word.startswith("--"):
            meant = (
                f"-c {word}" if word.endswith((".yaml", ".yml")) else "an option such as --learning_rate 1e-3"
            )
            raise ValueError(f"command line: got {word!r}, expected {meant}")
        name, equals, _ = word[2:].partition("=")
        if name not in NAMES:
            meant = _meant(name, "--", others)
            raise ValueError(f"command line: no option --{name}{meant}; klimb schema lists them")
        value = "" if equals else next(words, None)
        if value is None or value.startswith("--"):
            raise ValueError(f"command line: {word} has no value; expected {word} VALUE")


def _validated(base: Mapping[str, Any], arguments: Sequence[str], *, where: str) -> Config:
    given = {**base, **(typed := _parsed(arguments))}
    for name, kind in UNIONS.items():
        written, now = base.get(name), typed.get(name)
        if isinstance(written, Mapping) and isinstance(now, Mapping):
            # another kind begins from its own defaults
            same = now.get("kind") in (None, written.get("kind", kind))
            given[name] = {**(written if same else {}), **now}
    try:
        return Config.model_validate(given)
    except ValidationError as error:
        lines = [_explained(details) for details in error.errors()]
        raise ValueError(
            "\n  ".join([f"{where}:", *lines]) if len(lines) > 1 else f"{where}: {lines[0]}"
        ) from error


def _parsed(arguments: Sequence[str]) -> dict[str, Any]:
    """The options as a nested mapping; lists, null and unions as pydantic-settings reads them."""
    from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

    options = type(
        "Options", (Config, BaseSettings), {"model_config": {"env_prefix": "KLIMB_NO_ENVIRONMENT_"}}
    )
    try:
        source: Any = CliSettingsSource(
            options, cli_parse_args=list(arguments), cli_exit_on_error=False, cli_parse_none_str="null"
        )
        return source()
    except SettingsError as error:
        said = str(error).partition(" from source")[0]
        raise ValueError(
            f"command line: {said}; a value that begins with [ or {{ is read as JSON, with every name in quotes"
        ) from error


def _explained(details: Mapping[str, Any]) -> str:
    """A complaint of pydantic's in our words: the option, what was got, what is expected."""
    where = details["loc"]
    if where and where[0] in UNIONS:
        where = (where[0], *where[2:])  # without the kind
    name = ".".join(str(part) for part in where)
    kind, got, context = details["type"], details["input"], details.get("ctx", {})
    if kind == "missing":
        return f"{name} is missing; give it in the file or as --{name}"
    if kind == "extra_forbidden":
        if name in NAMES:
            return f"{name} does not go with {where[0]}.kind {details['loc'][1]}; leave it out, or change the kind"
        return f"no key {name!r}{_meant(name)}; klimb schema lists them"
    if kind == "union_tag_invalid" and name == "target" and context["tag"] in PYTHON_ONLY:
        return f"target.kind: {context['tag']} is in Python only: klimb.target.{PYTHON_ONLY[context['tag']]}"
    if kind == "union_tag_invalid":
        return f"{name}.kind: got {context['tag']!r}, expected one of {context['expected_tags']}"
    if kind == "model_attributes_type":
        such = next(other for other in NAMES if other.startswith(f"{name}.") and other != f"{name}.kind")
        return f"{name}: got {got!r}, expected fields of it, such as {name}.kind or {such}"
    if kind == "string_too_short":
        return f"{name}: got {got!r}, expected something"
    if kind == "too_short":
        return f"{name}: got {got!r}, expected at least {context['min_length']}"
    said = details["msg"].removeprefix("Value error, ").partition(", unable to")[0]
    number = "a number " if kind.startswith(("greater", "less")) else ""
    said = said.replace("Input should be ", f"expected {number}").replace("a valid integer", "a whole number")
    said = said.replace("a valid boolean", "true or false").replace("a valid ", "a ")
    if not name:
        return said
    shown = {None: "null", True: "true", False: "false"}[got] if isinstance(got, bool | None) else repr(got)
    return f"{name}: got {shown}{',' if said.startswith('expected') else ':'} {said}"


def _found(config: Config, folder: Path) -> Config:
    """Files that are not in the current folder, but beside the YAML file."""

    def beside(name: str) -> str:
        file, colon, rest = name.partition(":")
        there = folder / file
        # a bare name such as `math:hypot` or a hub id is a file only if it is one
        return f"{there}{colon}{rest}" if not Path(file).exists() and there.exists() else name

    def reward(spec: str | dict[str, Any]) -> str | dict[str, Any]:
        name, options = parted(spec)
        found = name if name in BUILTIN else beside(name)
        return {"func": found, **options} if options else found

    return config.model_copy(
        update={
            "dataset_name": beside(config.dataset_name),
            "reward_funcs": [reward(spec) for spec in config.reward_funcs],
            **_target_found(config, beside),
            **({} if config.plan is None else {"plan": beside(config.plan)}),
        }
    )


def _target_found(config: Config, beside: Callable[[str], str]) -> dict[str, Any]:
    """The target, its file beside the YAML file."""
    if not isinstance(config.target, Context) or config.target.context_file is None:
        return {}
    return {"target": config.target.model_copy(update={"context_file": beside(config.target.context_file)})}
