"""`pal synth OUT`: writes a synthetic corpus of audio files with ground truth.

`sounds`, `music` and `speech` plan clips and render them with `signals`; `questions` words the questions; `corpus`
writes the files.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline.core.arguments import add_dry_run, add_json, write_results


def main(argv: Sequence[str] | None = None) -> int:
    """Writes a corpus; see `write_corpus`.

    Raises:
        UserError: an argument or the folder cannot be used.
    """
    parser = argparse.ArgumentParser(prog="pal synth", description="Writes an audio corpus with ground truth.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--clips", type=int, default=1300, help="number of audio files (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default: %(default)s)")
    add_dry_run(parser, "plan and count the clips, write nothing")
    add_json(parser)
    arguments = parser.parse_args(argv)

    from data_prep.synth.corpus import plan_corpus, summary, write_corpus

    if arguments.dry_run:
        record = {"clips": arguments.clips, **summary(plan_corpus(arguments.clips, arguments.seed))}
    else:
        record = write_corpus(arguments.out, arguments.clips, arguments.seed)
    write_results(record, arguments.json)
    verb = "would hold" if arguments.dry_run else "holds"
    print(
        f"{arguments.out} {verb} {record['clips']} clips ({record['test_clips']} held out), "
        f"{record['questions']} questions, {record['audio_hours']:.2f} hours"
    )
    return 0
