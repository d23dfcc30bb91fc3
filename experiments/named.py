"""The named configurations: the modules of `experiments/configs`. Listing them imports nothing."""

from __future__ import annotations

import ast
import difflib
import importlib
import pathlib

import ml_collections

from hypervl_jax.architecture import ConfigError

DIRECTORY = pathlib.Path(__file__).parent / "configs"

COMPRESSOR = "compressor"
"""The configuration of `experiments.compressor`: a launch knows it, whatever trains or plans HyperVL does not."""


def config_names() -> tuple[str, ...]:
    """Names of all configurations, in alphabetical order."""
    return tuple(sorted(path.stem for path in DIRECTORY.glob("*.py") if not path.stem.startswith("_")))


def config_summary(name: str) -> str:
    """The first paragraph of a configuration's docstring, after the command that it begins with."""
    docstring = ast.get_docstring(ast.parse((DIRECTORY / f"{name}.py").read_text())) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return paragraph.partition("`: ")[2]


def load_config(name: str) -> ml_collections.ConfigDict:
    """`get_config()` of the configuration called `name`. Raises `ConfigError` when there is none."""
    names = config_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        known = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
        hint = "only a launch takes it: it trains no HyperVL" if name == COMPRESSOR else known
        raise ConfigError(f"unknown configuration {name!r}; {hint}")
    return importlib.import_module(f"experiments.configs.{name}").get_config()
