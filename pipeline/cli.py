"""`pal COMMAND`: dispatches to the commands. Holds their list, and imports a command only to run it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from pipeline.core.errors import EXIT_USER_ERROR, UserError, nearest, run_command

# name -> (module whose main(argv) returns the exit code, help line)
COMMANDS: dict[str, tuple[str, str]] = {
    "synth": ("data_prep.synth", "write a synthetic audio corpus with ground truth"),
    "prepare": ("data_prep.prepare", "manifest -> features -> MDS shards, with Ray"),
    "validate": ("data_prep.validate", "check every shard, hash, shape and count of a finished feature set"),
    "inspect": ("pipeline.inspect_set", "show clips and conversations as they are stored, or as the model gets them"),
    "scratch": ("pipeline.scratch", "write a small language model with random weights"),
    "train": ("pipeline.train", "train one model with DeepSpeed"),
    "export": ("pipeline.export", "checkpoint -> Hugging Face folder, verified"),
    "evaluate": ("pipeline.evaluate", "generate answers on held-out clips and score them"),
    "doctor": ("pipeline.doctor", "check the machines before a run and report what is wrong on which node"),
    "submit": ("pipeline.submit", "run a command as a job of a Ray cluster"),
    "plan": ("pipeline.plan", "predict memory, step time and cost of a run before it starts"),
    "sweep": ("pipeline.sweep", "run a scaling experiment: one file, many runs"),
    "ask": ("pipeline.ask", "answer questions about an audio file"),
    "probe": ("pipeline.probe", "measure attention to audio, and scores with a pathway ablated"),
    "report": ("pipeline.report", "tables and plots of an experiment, from MLflow"),
    "bench integration": ("pipeline.bench.integration", "speed and memory of the integrations, measured and predicted"),
    "bench train": ("pipeline.bench.train", "compare the training loop with the bare DeepSpeed engine"),
    "bench plan": ("pipeline.bench.plan", "what pal plan predicts, beside what small runs hold and take"),
    "bench prepare": ("data_prep.bench", "compare preparation with a bare loop over the encoder"),
    "drill": ("pipeline.drill", "inject faults into a real run and report how it recovers"),
    "demo": ("pipeline.demo", "from audio files to trained, compared models on this machine"),
}

USAGE = (
    "usage: pal [-h] [--version] COMMAND ...\n\n"
    "Train audio language models: prepare features, train integrations, compare them.\n"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; see `run_command` for the exit codes."""
    return run_command(_dispatch, argv)


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print(USAGE, "commands (each has --help):", sep="\n")
        for name, (_, summary) in COMMANDS.items():
            print(f"  {name:{width}}  {summary}")
        return 0 if arguments else EXIT_USER_ERROR
    if arguments[0] == "--version":
        print(f"pal {version('pal-pipeline')}")
        return 0
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name = " ".join(arguments[:words])
    if name not in COMMANDS:
        raise UserError(name, "is not a command", nearest(" ".join(arguments[:2]), COMMANDS))
    module, _ = COMMANDS[name]
    command: Callable[[Sequence[str]], int] = importlib.import_module(module).main
    return command(arguments[words:])


if __name__ == "__main__":
    sys.exit(main())
