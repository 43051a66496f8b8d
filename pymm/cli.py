"""The command line: `pymm train TASK | eval | probe | detect | results | bench | list | doctor | demo | ...`.

Each command imports its part when it runs, so `pymm --help` is quick. A command is a settings dataclass,
from which `tyro` makes the options, and a function that takes it and returns the exit code.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from pymm.training.tasks import TASKS, imported

USER_ERROR = 2


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: its words, one line of help, and `module:function` of what runs it.

    The function takes one argument, annotated with the settings dataclass; `settings` is `module:class` of a
    narrower one.
    """

    words: tuple[str, ...]
    help: str
    target: str
    settings: str | None = None


COMMANDS = (
    *(Command(("train", task.name), task.help, "pymm.commands:train", task.settings) for task in TASKS),
    Command(("eval",), "Evaluate a run's weights, or a checkpoint.", "pymm.commands:evaluate"),
    Command(("detect",), "Find named things in a picture by a CLIP run.", "pymm.detect:run"),
    Command(
        ("data", "scenes"),
        "Make synthetic scenes with boxes, captions and questions.",
        "pymm.data.scenes_shards:run",
    ),
    Command(("export",), "Write a model, or a tower of CLIP, as ONNX.", "pymm.interop.export:run"),
    Command(("probe",), "Classify by a model's frozen features.", "pymm.training.probe:run"),
    Command(("list",), "List the models, all or those that a pattern fits.", "pymm.commands:list_models"),
    Command(("doctor",), "Say what is built, what serves each op, and what is missing.", "pymm.doctor:run"),
    Command(("bench",), "Measure ops beside eager, compiled and a bare GEMM.", "pymm.benchmarks:run"),
    Command(
        ("results",),
        "Train the systems of the results table and compare each with its baseline.",
        "pymm.benchmarks.systems_command:run",
    ),
    Command(("demo",), "Train on emoji in five minutes and name them in an unseen style.", "pymm.demo:run"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; those of the process by default.

    Returns:
        The exit code: 0, what the command says, or 2 for a wrong argument or an error of pymm's own, which
        is one line on stderr. `PYMM_TRACEBACK=1` shows where it came from.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = next((c for c in COMMANDS if tuple(arguments[: len(c.words)]) == c.words), None)
    try:
        if command is None:
            return _overview(arguments)
        return _run(command, arguments[len(command.words) :])
    except SystemExit as end:  # tyro has said what is wrong, or has shown the help
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("PYMM_TRACEBACK") == "1" or not _is_ours(error):
            traceback.print_exc()
            return 1 if not _is_ours(error) else USER_ERROR
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"pymm: {text}", file=sys.stderr)
        return USER_ERROR


def _is_ours(error: Exception) -> bool:
    """Whether the message alone tells the user what to do: wrong values, missing files, missing extras,
    lost runs."""
    if isinstance(error, ValueError | OSError | ImportError):
        return True
    training = sys.modules.get("pymm.training.errors")
    return training is not None and isinstance(error, training.TrainingError)


def _run(command: Command, arguments: list[str]) -> int:
    function = imported(command.target)
    (settings,) = (kind for key, kind in typing.get_type_hints(function).items() if key != "return")
    if command.settings is not None:
        settings = imported(command.settings)
    program = " ".join(("pymm", *command.words))
    default, arguments = _defaults(settings, arguments)
    parsed = tyro.cli(settings, prog=program, description=command.help, args=arguments, default=default)
    return int(function(parsed))


def _defaults(settings: Any, arguments: list[str]) -> tuple[Any, list[str]]:
    """Take `--settings FILE` out of the arguments: the file's values are the defaults of all others."""
    if "--settings" not in arguments:
        return tyro.MISSING_NONPROP, arguments
    at = arguments.index("--settings")
    if at + 1 == len(arguments):
        raise ValueError("--settings: must be followed by a file, got nothing")
    from pymm.training.settings_file import load_settings

    return load_settings(settings, arguments[at + 1]), arguments[:at] + arguments[at + 2 :]


def _overview(arguments: list[str]) -> int:
    """Help, or the complaint about an unknown command, from a parser that knows the names and nothing
    else."""
    if arguments == ["--version"]:
        from pymm import __version__

        print(f"pymm {__version__}")
        return 0
    if not arguments:
        arguments = ["--help"]
    tyro.extras.subcommand_cli_from_dict(
        {" ".join(c.words): _nothing(c.help) for c in COMMANDS},
        prog="pymm",
        description=_ABOUT,
        args=arguments,
    )
    return USER_ERROR


_ABOUT = "Vision-language models on fused kernels. `pymm COMMAND --help` shows a command's options."


def _nothing(text: str) -> Callable[[], None]:
    def nothing() -> None:
        pass

    nothing.__doc__ = text
    return nothing


if __name__ == "__main__":
    sys.exit(main())
