"""`python -m tools.run_tflite`: an artifact of `tools.export_tflite` answers a question about images, on this machine's CPU."""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import sys
import time
from collections.abc import Sequence

from hypervl_jax.architecture import BRANCHES, ConfigError
from hypervl_jax.inference.assistant import ask
from hypervl_jax.text.conversation import ConversationError
from hypervl_jax.text.tokenizer import TokenizerError
from hypervl_jax.vision.decoding import UndecodableImage, decode_image
from tools.artifacts import ArtifactError
from tools.edge_runtime import THREADS, open_model

FAILURE, SUCCESS = 1, 0

_EPILOG = """\
examples:
  python -m tools.run_tflite exports/tflite/int8 --image receipt.jpg --question "What is the total?"
  python -m tools.run_tflite exports/tflite/float32 --question "Name a colour." --json

exit status:
  0  answered    1  the artifact or an image cannot be read, or the prompt does not fit    2  wrong usage
"""


def peak_mib() -> float:
    """Most memory that this process has held so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options. Ends the program with status 2 on anything else."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.run_tflite",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("artifact", metavar="DIR", type=pathlib.Path, help="what tools.export_tflite wrote, of one precision")
    add("--image", metavar="FILE", type=pathlib.Path, action="append", default=[], help="may be given several times")
    add("--question", required=True, metavar="TEXT", help="images go before it unless it holds image slots")
    add("--encoder", choices=BRANCHES, default=BRANCHES[0], help="default: %(default)s")
    add("--alpha", type=float, metavar="A", help="share of each image's area to keep (default: the compressor's, or 1)")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="default: %(default)s")
    add("--threads", type=int, default=THREADS, metavar="N", help="default: %(default)s")
    add("--json", action="store_true", help="print answer, sizes, seconds and memory as one JSON object")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments)
    try:
        images = [decode_image(path.read_bytes()) for path in options.image]
        model = open_model(options.artifact, options.threads)
        request, loaded, began = ask(options.question, *images), peak_mib(), time.perf_counter()
        text, counts = model.answer(request.turns, images, options.encoder, options.alpha, options.max_new_tokens)
    except OSError as error:
        print(f"error: {error.filename} cannot be read: {error.strerror}", file=sys.stderr)
        return FAILURE
    except (ArtifactError, ConfigError, ConversationError, TokenizerError, UndecodableImage, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILURE
    seconds = time.perf_counter() - began
    memory = {"loaded_mib": loaded, "peak_mib": peak_mib()}
    print(json.dumps({"answer": text, **counts, "seconds": seconds, **memory}) if options.json else text)
    return SUCCESS


if __name__ == "__main__":
    sys.exit(main())
