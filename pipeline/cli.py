"""`pal <command>`: one thin door. Owns the list of commands, and imports a command only to run it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from pipeline.core.errors import EXIT_USER_ERROR, UserError, nearest, run_command

# name -> (module whose main(argv) returns the exit code, help line)
COMMANDS: dict[str, tuple[str, str]] = {
    "synth": ("data_prep.synth", "write a synthetic audio corpus with ground truth"),
    "prepare": ("data_prep.prepare", "manifest -> features -> MDS shards, with Ray"),
    "validate": ("data_prep.validate", "check every shard, hash, shape and count of a finished set"),
    "scratch": ("pipeline.scratch", "write a small language model with random weights"),
    "train": ("pipeline.train", "train one model with DeepSpeed"),
    "export": ("pipeline.export", "checkpoint -> Hugging Face folder, verified"),
    "evaluate": ("pipeline.evaluate", "generate answers on held-out clips and score them"),
    "doctor": ("pipeline.doctor", "check the machines before a run: what is wrong where"),
    "submit": ("pipeline.submit", "run a command as a job of a Ray cluster"),
    "plan": ("pipeline.plan", "memory, step time and cost of a run that was not started"),
    "sweep": ("pipeline.sweep", "run a scaling experiment: one file, many runs"),
    "ask": ("pipeline.ask", "answer questions about an audio file"),
    "probe": ("pipeline.probe", "what a model listens to: attention, and scores with a pathway hidden"),
    "report": ("pipeline.report", "tables and pictures of an experiment, from MLflow"),
    "bench integration": ("pipeline.bench.integration", "speed and memory of the integrations, measured and counted"),
    "bench train": ("pipeline.bench.train", "the training loop against the bare DeepSpeed engine"),
    "bench prepare": ("data_prep.bench", "preparation against a bare loop of the encoder"),
    "drill": ("pipeline.drill", "inject faults into a real run, and tell what became of it"),
    "demo": ("pipeline.demo", "from audio files to compared models, on this machine"),
}

USAGE = (
    "usage: pal [-h] COMMAND ...\n\nTrain audio language models: prepare features, train integrations, compare them.\n"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0 done; 2 the user's mistake, told in one line on stderr; 1 a failure at run time; 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print(USAGE, "commands (each has --help):", sep="\n")
        for name, (_, summary) in COMMANDS.items():
            print(f"  {name:{width}}  {summary}")
        return 0 if arguments else EXIT_USER_ERROR
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name = " ".join(arguments[:words])
    if name not in COMMANDS:
        print(
            f"pal: {UserError(name, 'is not a command', nearest(' '.join(arguments[:2]), COMMANDS))}", file=sys.stderr
        )
        return EXIT_USER_ERROR
    module, _ = COMMANDS[name]
    return run_command(importlib.import_module(module).main, arguments[words:])


if __name__ == "__main__":
    sys.exit(main())
