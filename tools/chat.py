"""`python -m tools.chat`: ask a trained model about images, once with --prompt or in a conversation without it.

In a conversation: /image PATH shows a picture with the next question, /new forgets everything, /quit (or end of input) ends.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Generator, Sequence
from typing import Any

from hypervl_jax.architecture import BRANCHES, ConfigError
from hypervl_jax.inference.assistant import (
    AUTO,
    ENCODERS,
    Answer,
    Assistant,
    LatencyBudget,
    Options,
    Request,
    load_assistant,
)
from hypervl_jax.inference.generate import Sampling
from hypervl_jax.inference.latency import ProfileError, load_profile
from hypervl_jax.text.conversation import IMAGE_SLOT, ConversationError, Turn
from hypervl_jax.text.tokenizer import TokenizerError
from hypervl_jax.training.checkpoint import CheckpointError, checkpoint_home
from hypervl_jax.vision.decoding import UndecodableImage
from hypervl_jax.vision.resolution import MAX_ALPHA, MIN_ALPHA

USAGE_ERROR, SUCCESS = 2, 0

EPILOG = """\
examples:
  python -m tools.chat --checkpoint runs/tiny --image form.png --prompt "What is the total?"
  python -m tools.chat --checkpoint runs/tiny --compressor runs/compressor --image page.jpg --encoder large --alpha auto
  python -m tools.profile_device --checkpoint runs/tiny --output profile.json
  python -m tools.chat --checkpoint runs/tiny --image page.jpg --prompt "Read it." --encoder auto --latency-budget-ms 300

latency budget:
  It covers the time from decoded pixels to the last of --max-new-tokens tokens, compilation apart. The largest encoder is taken
  first, then the largest α that fits. A number given for --alpha is kept.

exit status:
  0  answered    2  it could not answer as asked
"""


class ChatError(Exception):
    """What the user asked for cannot be done; the message is one sentence."""


@dataclasses.dataclass
class Conversation:
    """The turns and images so far, and those that go with the next question."""

    turns: tuple[Turn, ...] = ()
    images: tuple[bytes, ...] = ()
    shown: tuple[bytes, ...] = ()

    def show(self, path: str) -> None:
        """Adds an image file to the next question."""
        self.shown += (read_image(path),)

    def request(self, question: str) -> Request:
        """The conversation with a question at its end; shown images go before it unless it holds slots of its own."""
        slots = "" if IMAGE_SLOT in question else IMAGE_SLOT * len(self.shown)
        return Request((*self.turns, Turn("user", slots + question)), self.images + self.shown)

    def accept(self, request: Request, answer: Answer) -> None:
        """Remembers an answered question. One answered with nothing is forgotten: the template has no empty turns."""
        if answer.text.strip():
            self.turns = (*request.turns, Turn("assistant", answer.text))
            self.images, self.shown = request.images, ()


def read_image(path: str) -> bytes:
    """An image file's bytes."""
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise ChatError(f"cannot read the image {path}: {error.strerror}") from error


def spread_option(text: str) -> float:
    """A number of 0 or more."""
    try:
        spread = float(text)
    except ValueError:
        spread = -1.0
    if not spread >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 0 or more")
    return spread


def alpha_option(text: str) -> float | str:
    """`--alpha`: "auto" or a number."""
    message = f"{text!r} is neither 'auto' nor a number from {MIN_ALPHA} to {MAX_ALPHA}"
    if text == AUTO:
        return text
    try:
        alpha = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(message) from error
    if not MIN_ALPHA <= alpha <= MAX_ALPHA:
        raise argparse.ArgumentTypeError(message)
    return alpha


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options. Ends the program with status 2 on anything else."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.chat",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", required=True, help="a run's workdir or its checkpoints directory")
    add("--step", type=int, help="checkpoint to read (default: the newest)")
    add("--compressor", metavar="DIR", help="what tools.train_compressor wrote, for --alpha auto")
    add("--image", metavar="PATH", action="append", default=[], help="an image for the first question; may be repeated")
    add(
        "--prompt",
        metavar="TEXT",
        help=f"the question; {IMAGE_SLOT} in it says where an image goes (default: before it)",
    )
    add("--encoder", choices=ENCODERS, default=BRANCHES[0], help="default: %(default)s; auto needs a latency budget")
    add(
        "--alpha",
        type=alpha_option,
        metavar="auto|0.1…1.0",
        help="share of an image's area to keep (default: auto with a compressor or a budget, else 1)",
    )
    add(
        "--unsure",
        type=spread_option,
        metavar="NATS",
        help="leave an image whole where the compressor's log areas for it, mirrored and upside down spread by more than this, e.g. 0.5",
    )
    add("--latency-budget-ms", type=float, metavar="N", help="most milliseconds an answer may take")
    add(
        "--profile",
        metavar="FILE",
        default="profile.json",
        help="what tools.profile_device wrote (default: %(default)s)",
    )
    add("--max-new-tokens", type=int, default=128, help="default: %(default)s")
    add("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    add("--top-k", type=int, default=0, help="0 (default) keeps all tokens")
    add("--top-p", type=float, default=1.0, help="default: 1, all tokens")
    add("--seed", type=int, default=0, help="of sampling")
    add(
        "--json",
        action="store_true",
        help="print each answer as one JSON object a line, with the milliseconds of each part",
    )
    options = parser.parse_args(arguments)
    if options.encoder == AUTO and options.latency_budget_ms is None:
        parser.error("--encoder auto chooses by latency: give --latency-budget-ms")
    return options


def load(options: argparse.Namespace) -> Assistant:
    """The assistant, with the parameters of the branches that may be used."""
    return load_assistant(
        checkpoint_home(options.checkpoint),
        options.step,
        compressor=options.compressor,
        branches=BRANCHES if options.encoder == AUTO else (options.encoder,),
    )


def answering_options(options: argparse.Namespace, assistant: Assistant) -> Options:
    """How to answer. Raises `ChatError` for α "auto" with nothing to choose it by."""
    budget = None
    if options.latency_budget_ms is not None:
        budget = LatencyBudget(load_profile(options.profile, assistant.config), options.latency_budget_ms)
    automatic = assistant.compressor_params is not None or budget is not None
    if options.alpha == AUTO and not automatic:
        raise ChatError("--alpha auto needs --compressor DIR or --latency-budget-ms N")
    return Options(
        encoder=options.encoder,
        alpha=options.alpha or (AUTO if automatic else MAX_ALPHA),
        sampling=Sampling(options.temperature, options.top_k, options.top_p, options.seed),
        max_new_tokens=options.max_new_tokens,
        budget=budget,
        unsure=options.unsure,
    )


def print_stream(stream: Generator[str, None, Answer]) -> Answer:
    """Prints an answer as it comes, then what it took on standard error."""
    while True:
        try:
            print(next(stream), end="", flush=True)
        except StopIteration as end:
            print()
            print(summary(end.value), file=sys.stderr)
            return end.value


def summary(answer: Answer) -> str:
    """What an answer took, in two lines."""
    steps = ", ".join(f"{step} {milliseconds:.1f}" for step, milliseconds in answer.milliseconds.items())
    tokens = f"{answer.prompt_tokens} prompt tokens ({answer.visual_tokens} visual, {answer.tiles} tiles)"
    return f"[{answer.reason}]\n[{tokens}, {len(answer.tokens)} new; ms: {steps}]"


def to_json(answer: Answer) -> dict[str, Any]:
    """An answer as plain values."""
    values = dataclasses.asdict(answer)
    return values | {"tokens": list(answer.tokens), "alphas": list(answer.alphas), "new_tokens": len(answer.tokens)}


def respond(assistant: Assistant, request: Request, how: Options, as_json: bool) -> Answer:
    """Answers and prints."""
    if not as_json:
        return print_stream(assistant.stream(request, how))
    (answer,) = assistant.answer([request], how)
    print(json.dumps(to_json(answer), ensure_ascii=False), flush=True)
    return answer


def converse(assistant: Assistant, conversation: Conversation, how: Options, as_json: bool) -> None:
    """Reads questions and commands until the end of input. What cannot be answered is said, and the talk goes on."""
    while (line := _read_line()) is not None and line != "/quit":
        command, _, argument = line.partition(" ")
        try:
            if command == "/image":
                conversation.show(argument.strip())
            elif command == "/new":
                conversation = Conversation()
            elif line:
                request = conversation.request(line)
                conversation.accept(request, respond(assistant, request, how, as_json))
        except (ChatError, ConversationError, UndecodableImage) as error:
            conversation.shown = ()
            print(f"error: {error}", file=sys.stderr)


def _read_line() -> str | None:
    """A stripped line of standard input; None at its end. The prompt goes to standard error, so that output stays clean."""
    print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments)
    try:
        conversation = Conversation()
        for path in options.image:
            conversation.show(path)
        assistant = load(options)
        how = answering_options(options, assistant)
        if options.prompt is None:
            converse(assistant, conversation, how, options.json)
        else:
            respond(assistant, conversation.request(options.prompt), how, options.json)
    except (
        ChatError,
        CheckpointError,
        ConfigError,
        ConversationError,
        ProfileError,
        TokenizerError,
        UndecodableImage,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    return SUCCESS


if __name__ == "__main__":
    sys.exit(main())
