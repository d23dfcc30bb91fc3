"""`python -m tools.study_page --workdir DIR`: one page on a study that `tools.study` ran, with its plots beside it.

<output>            Markdown: claims with their marks, tables, what was not tested, where, when and with what
<output's name>/    plots: study.md has its plots in study/
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import storage
from experiments.workdir import read_json
from hypervl_jax.architecture import ConfigError, hypervl_2b, require
from hypervl_jax.evaluation import claims, study_plots, study_text
from hypervl_jax.models.compressor import forward_flops
from hypervl_jax.training.telemetry.records import git_revision
from tools import ablate_compressor, compare_arms
from tools.demo import DemoError, format_seconds, read_record
from tools.report import machine

VRC, ARMS, SETTINGS, DATA = "vrc", "arms", "settings", "data/rendered.json"
USAGE_ERROR, RUN_ERROR, SUCCESS = 2, 1, 0

_HEAD = """\
# The paper's two ideas at a size that anyone can rerun

Output of `{command}`, written by `tools/study_page.py`; nothing in it was edited by hand. Made {date} at commit `{commit}` on
{machine}, in {time} (the sum of its steps).{note}

The model is `tiny` (two towers, decoder of 0.5M parameters) on the embedded data with pictures at 1, 2 and 3 pixels a unit (size `study`):
what it shows is whether the mechanisms work, not how large their gains are at 2B parameters. Pictures, questions and native sizes of
the held-out split were fixed before any training (seeds by split; {heldout}). Score: exact match of generated answers.

Marks: *held* or *not held* by rules fixed in `hypervl_jax/evaluation/claims.py`: a share reaches the paper's, a difference's 95 % interval lies
above 0 (or above −2 points where the claim is "not worse"). A difference that is not shown counts as not held; beside it stands the
smallest difference that this study could have seen.
"""

_VRC = """\
## The compressor (VRC)

Labels from the model itself (`reference`), whose training scaled every second picture by a random α; ε is that of α*, with a floor of 1 nat (Δ is then the loss increase itself); all compressors
are calibrated on training pictures kept out, so that at most 1.3 % of the right answers' chance is lost. The claims are about ε = 0.05. "At the tokens of" gets as many
tokens as that compressor, or a little more.

![score over tokens](study/pareto.png)

"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("python -m tools.study_page", description="Writes the page of a study.")
    add = made.add_argument
    add("--workdir", required=True, metavar="DIR", help="of `python -m tools.study`")
    add("--command", default="make study", help="that made it, for the page (default: %(default)s)")
    add("--note", default="", metavar="TEXT", help="a sentence on the circumstances of the run, for the page's head")
    add("--output", metavar="FILE", help="(default: study.md in the workdir)")
    add("--json", action="store_true", help="print the claims as one JSON object on the last line")
    return made


def real_compressor_share() -> float:
    """FLOPs of the full-size compressor over those of one tile of the full-size base encoder."""
    config = hypervl_2b()
    return forward_flops(config.compressor) / config.vision_base.forward_flops()


def head(workdir: pathlib.Path, command: str, note: str = "") -> str:
    """What, when, where, with what."""
    seconds = sum(step.seconds for step in read_record(workdir).values())
    sources = (read_json(workdir / DATA) or {}).get("sources", [])
    counts = {
        row["source"]: row["records"]
        for row in sources
        if row["split"] == "heldout" and row["blind_accuracy"] is not None
    }
    return _HEAD.format(
        command=command,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        commit=git_revision(),
        machine=machine(),
        time=f"{format_seconds(seconds)} minutes",
        note=f" {note}" if note else "",
        heldout=", ".join(f"{name} {count}" for name, count in counts.items()),
    )


def found_claims(vrc: Mapping[str, Any], arms: Mapping[str, Any], guessed: float) -> list[claims.Claim]:
    """All claims in the page's order; `guessed` is the score of the best guess without pictures."""
    return [*claims.vrc_claims(vrc, real_compressor_share()), *claims.dcl_claims(arms, guessed), *claims.untested()]


def blind_accuracy(workdir: pathlib.Path) -> float:
    """What the best guess without the picture scores, mean over the held-out tasks; 0 where the data does not say."""
    sources = (read_json(workdir / DATA) or {}).get("sources", [])
    found = [row["blind_accuracy"] for row in sources if row["blind_accuracy"] is not None]
    return sum(found) / len(found) if found else 0.0


def vrc_section(vrc: Mapping[str, Any]) -> str:
    """Tables of the ablation, tasks for the main compressor only."""
    main, unseen = claims.main_compressor(vrc), [row for row in vrc["compressors"] if row["left_out"]]
    reads = f"At α = 1: {study_text.estimate(vrc['full_score'])} %, {study_text.estimate(vrc['reads'], True)} points above blank pictures.\n\n"
    parts = [_VRC, reads, study_text.ways_table(vrc)]
    if main is not None:
        parts.append(
            f"\n### By task, {main['name']}\n\n{study_text.task_table(main)}\n![α by task](study/adaptivity.png)\n"
        )
    parts += [f"\n### Content it never saw: {row['name']}\n\n{study_text.task_table(row)}" for row in unseen]
    parts.append(f"\n### Dense small text, and pictures on which it is unsure\n\n{_DENSE}{study_text.dense_table(vrc)}")
    parts.append(f"\n### Latency, one answer at a time\n\n{study_text.latency_table(vrc)}")
    return "".join(parts)


_DENSE = """\
"Dense": the quarter of the pictures with the most edges. "Unsure": the predicted areas of a picture, its mirror image and it upside down differ
by more than a factor 1.65; "gain if whole" is what leaving those pictures whole changes.

"""


def dcl_section(arms: Mapping[str, Any], settings: Mapping[str, Any] | None) -> str:
    """Tables of the arms, and of the exploratory settings where they were run."""
    text = (
        "## Dual consistency learning (DCL)\n\nEvery arm starts from the same stage-1 checkpoint; a seed is an order of the data. "
        "`base_longer` trains Base alone with the compute of `dcl`. Score [95 % over items and seeds] ± standard deviation over seeds.\n\n"
        f"{study_text.arms_table(arms['arms'])}\n![scores of the arms](study/arms.png)\n\n{study_text.contrasts_table(arms['contrasts'])}"
    )
    if settings is None:
        return f"{text}\nThe exploratory arms (λ, T, alternation, KL positions) are run by `make study-full`.\n"
    return f"{text}\n### Exploratory settings, one seed each: hints, no claims\n\n{study_text.arms_table(settings['arms'])}"


def signs_section(vrc: Mapping[str, Any], arms: Mapping[str, Any]) -> str:
    """Failure signs that the program raised during the study."""
    raised = [*vrc["warnings"], *(f"{run}: {text}" for run, texts in arms["warnings"].items() for text in texts)]
    return "## Failure signs raised by the program\n\n" + ("".join(f"- {text}\n" for text in raised) or "None.\n")


def time_section(workdir: pathlib.Path) -> str:
    """Minutes of every step with its command."""
    rows = [(name, format_seconds(step.seconds), f"`{step.command}`") for name, step in read_record(workdir).items()]
    return "## Commands and minutes\n\n" + study_text.table(("step", "minutes", "command"), rows)


def build(workdir: pathlib.Path, command: str, note: str = "") -> tuple[str, list[claims.Claim]]:
    """The page and its claims; `note` is said in its head. Raises `ConfigError` where a study is not complete."""
    vrc = read_json(workdir / VRC / ablate_compressor.SUMMARY)
    arms = read_json(workdir / ARMS / compare_arms.SUMMARY)
    require(
        vrc is not None and arms is not None, f"{workdir} holds no complete study; `python -m tools.study` makes one"
    )
    settings = read_json(workdir / SETTINGS / compare_arms.SUMMARY)
    tested = found_claims(vrc, arms, blind_accuracy(workdir))
    table = study_text.table(("claim", "paper", "here", "mark"), claims.claims_rows(tested))
    sections = (vrc_section(vrc), dcl_section(arms, settings), signs_section(vrc, arms), time_section(workdir))
    return "\n".join((head(workdir, command, note), f"## Claims\n\n{table}", *sections)), tested


def write(text: str, workdir: pathlib.Path, output: pathlib.Path) -> None:
    """The page, and its plots in a directory of its name."""
    plots = output.parent / "study"
    plots.mkdir(parents=True, exist_ok=True)
    for home, name in ((VRC, study_plots.PARETO), (VRC, study_plots.ADAPTIVITY), (ARMS, study_plots.ARMS)):
        shutil.copyfile(workdir / home / name, plots / name)
    output.write_text(text, "utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parser().parse_args(arguments)
    workdir = pathlib.Path(options.workdir)
    output = pathlib.Path(options.output or workdir / "study.md")
    try:
        with storage.explained():
            text, tested = build(workdir, options.command, options.note)
            write(text, workdir, output)
    except (ConfigError, DemoError, storage.StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return RUN_ERROR
    print(json.dumps([claim._asdict() for claim in tested]) if options.json else f"page: {output.absolute()}")
    return SUCCESS


if __name__ == "__main__":
    sys.exit(main())
