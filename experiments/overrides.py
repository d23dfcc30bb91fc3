"""Between typed configs, `ml_collections.ConfigDict` and the command line.

    get_config() -> ConfigDict ─ `--config.a.b=value` ─► ConfigDict ─ from_config_dict ─► frozen dataclasses, validated

The types of values come from the dataclasses' annotations. Tuples of small dataclasses (a mixture) are tuples of their fields.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import ml_collections

from hypervl_jax.architecture import (
    ConfigError,
    DecoderConfig,
    HyperVLConfig,
    VisionConfig,
    hypervl_2b,
    hypervl_tiny,
    qwen3,
    siglip2,
)
from hypervl_jax.partitioning import MeshConfig, parse_mesh

Config = TypeVar("Config")

WHOLE_MODELS: Mapping[str, Callable[[], HyperVLConfig]] = {"hypervl_2b": hypervl_2b, "hypervl_tiny": hypervl_tiny}

SECTION = "config"
"""Name of the whole configuration on the command line."""


def whole_model(name: str) -> HyperVLConfig:
    """The whole architecture called `name`, one of `WHOLE_MODELS`."""
    if name not in WHOLE_MODELS:
        raise ConfigError(f"unknown architecture {name!r}; known: {', '.join(WHOLE_MODELS)}")
    return WHOLE_MODELS[name]()


NAMED_SIZES: Mapping[type, Callable[[str], Any]] = {
    HyperVLConfig: whole_model,
    VisionConfig: siglip2,
    DecoderConfig: qwen3,
    MeshConfig: parse_mesh,
}
"""Sections that can be set as a whole by a name, a mesh also by its sizes: `--config.architecture.decoder=qwen3-0.6b`,
`--config.mesh=fsdp:64,tensor:4`."""


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """A dataclass tree as a ConfigDict with the same names."""
    return ml_collections.ConfigDict(_plain(config))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return tuple(dataclasses.astuple(item) if dataclasses.is_dataclass(item) else _plain(item) for item in value)
    return value


def flatten(config: Any) -> dict[str, Any]:
    """Every value of a dataclass tree by its path, `{"optimizer.b1": 0.9, …}`, in the order of the fields."""
    return dict(_leaves(_plain(config), ""))


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def config_text(config: Any) -> str:
    """Every value on a line of its own, `optimizer.b1 = 0.9`: for records, goldens and diffs."""
    return "".join(f"{path} = {value!r}\n" for path, value in flatten(config).items())


def from_config_dict(kind: type[Config], config: ml_collections.ConfigDict) -> Config:
    """The frozen dataclasses of a ConfigDict.

    Raises:
        ConfigError: a key is unknown or missing, a value has the wrong type, or the dataclasses refuse it.
    """
    return _from_mapping(kind, config.to_dict(), SECTION)


def _from_mapping(kind: type[Config], values: Mapping[str, Any], path: str) -> Config:
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            raise ConfigError(f"unknown key {path}.{name}{_suggestion(name, path, hints)}")
    missing = [name for name in hints if name not in values]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}")
    return kind(**{name: _typed(hint, values[name], f"{path}.{name}") for name, hint in hints.items()})


def _typed(kind: Any, value: Any, path: str) -> Any:
    """`value` as `kind`, an annotation. Only int to float and list to tuple are converted."""
    if isinstance(kind, types.UnionType):
        kind = _of_length(kind, value)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return _from_mapping(kind, value, path)
    if dataclasses.is_dataclass(kind) and isinstance(value, (tuple, list)):
        return _from_mapping(kind, _by_field(kind, value, path), path)
    if typing.get_origin(kind) is tuple and isinstance(value, (tuple, list)):
        return tuple(_typed(item, part, f"{path}[{i}]") for i, (item, part) in enumerate(_items(kind, value, path)))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (bool, int, float, str) and type(value) is kind:
        return value
    raise ConfigError(f"{path} must be {_describe(kind)}, got {value!r}")


def _of_length(union: types.UnionType, value: Any) -> Any:
    """The tuple of a union of tuples that has as many values as `value`; the first where none has."""
    kinds = typing.get_args(union)
    length = len(value) if isinstance(value, (tuple, list)) else 0
    return next((kind for kind in kinds if len(typing.get_args(kind)) == length), kinds[0])


def _by_field(kind: type, values: Sequence[Any], path: str) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(kind)]
    if len(values) != len(names):
        raise ConfigError(f"{path} must be ({', '.join(names)}), got {tuple(values)!r}")
    return dict(zip(names, values, strict=True))


def _items(kind: Any, values: Sequence[Any], path: str) -> list[tuple[Any, Any]]:
    """Each element of a tuple annotation with its value."""
    kinds = typing.get_args(kind)
    if kinds[-1] is Ellipsis:
        return [(kinds[0], value) for value in values]
    if len(kinds) != len(values):
        raise ConfigError(f"{path} must have {len(kinds)} values, got {tuple(values)!r}")
    return list(zip(kinds, values, strict=True))


def _describe(kind: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if kind in names:
        return names[kind]
    if dataclasses.is_dataclass(kind):
        return f"a section with {', '.join(field.name for field in dataclasses.fields(kind))}"
    return f"a tuple ({kind})"


def apply_override(config: ml_collections.ConfigDict, kind: type, path: str, text: str) -> None:
    """Sets the value at `path` ("optimizer.learning_rate") from its text, typed by the field's annotation.

    A section with named sizes takes a name. Numbers may be written 1e-4, 1_000 or, for whole ones, 8e9; tuples as
    `decoder,vision_base`, mixtures as `captions:3,text:1`, anything nested as a Python literal.

    Raises:
        ConfigError: unknown path, or a text that is no value of that type.
    """
    value = _parse(_annotation(config, kind, path), text, f"{SECTION}.{path}")
    section, _, name = path.rpartition(".")
    target = config
    for part in section.split(".") if section else ():
        target = target[part]
    target[name] = value


def _annotation(config: ml_collections.ConfigDict, kind: Any, path: str) -> Any:
    """The annotation of the field at `path`."""
    section = SECTION
    for name in path.split("."):
        if not dataclasses.is_dataclass(kind):
            raise ConfigError(f"unknown key {SECTION}.{path}: {section} is {_describe(kind)}, not a section")
        hints = typing.get_type_hints(kind)
        if name not in hints:
            elsewhere = [found for found, _ in _leaves(config.to_dict(), f"{SECTION}.") if _last(found) == _last(path)]
            hint = f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else _suggestion(name, section, hints)
            raise ConfigError(f"unknown key {SECTION}.{path}{hint}")
        kind, section = hints[name], f"{section}.{name}"
    return kind


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _suggestion(name: str, section: str, known: Iterable[str]) -> str:
    """The end of an error message: the closest spelling in the section, or else all it has."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {section}.{near[0]}?" if near else f"; {section} has {', '.join(known)}"


def _parse(kind: Any, text: str, path: str) -> Any:
    """The plain value (as in a ConfigDict) that `text` writes."""
    if kind in NAMED_SIZES:
        return to_config_dict(NAMED_SIZES[kind](text))
    if dataclasses.is_dataclass(kind):
        names = ", ".join(field.name for field in dataclasses.fields(kind))
        raise ConfigError(f"{path} is a section; set one of its fields: {names}")
    if typing.get_origin(kind) is tuple:
        return _parse_tuple(kind, text, path)
    try:
        return _SCALARS[kind](text)
    except (ValueError, KeyError, OverflowError) as error:
        raise ConfigError(f"{path} must be {_describe(kind)}, got {text!r}") from error


def _parse_tuple(kind: Any, text: str, path: str) -> tuple[Any, ...]:
    if text.startswith(("(", "[")):
        try:
            return _frozen(ast.literal_eval(text))
        except (ValueError, SyntaxError, TypeError) as error:
            raise ConfigError(f"{path} must be a Python tuple or list, got {text!r}") from error
    parts = [part.strip() for part in text.split(",")] if text else []
    return tuple(_parse_item(item, part, path) for item, part in _items(kind, parts, path))


def _parse_item(kind: Any, text: str, path: str) -> Any:
    """One element of a tuple; a dataclass is written with colons between its fields."""
    if not dataclasses.is_dataclass(kind):
        return _parse(kind, text, path)
    hints = typing.get_type_hints(kind)
    return tuple(
        _parse(hints[name], part, f"{path}.{name}") for name, part in _by_field(kind, text.split(":"), path).items()
    )


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


def _whole(text: str) -> int:
    """A whole number; also one in floating notation that float64 holds exactly, such as 82.8e9."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if value != int(value) or abs(value) > 2**53:
            raise ValueError(f"{text} is not a whole number") from None
        return int(value)


_SCALARS: Mapping[Any, Callable[[str], Any]] = {
    bool: lambda text: {"true": True, "false": False}[text.lower()],
    int: _whole,
    float: float,
    str: str,
}
