"""`pal synth OUT`: a corpus of real audio files with ground truth. Here is the command line only.

`sounds`, `music` and `speech` plan clips and render them from `signals`; `questions` words; `corpus` writes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Writes a corpus; see `write_corpus`.

    Raises:
        UserError: an argument or the folder cannot be used.
    """
    parser = argparse.ArgumentParser(prog="pal synth", description="Writes an audio corpus with ground truth.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--clips", type=int, default=1300, help="audio files in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="plan and count, write nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args(argv)

    from data_prep.synth.corpus import plan_corpus, summary, write_corpus

    if arguments.dry_run:
        record = {"clips": arguments.clips, **summary(plan_corpus(arguments.clips, arguments.seed))}
    else:
        record = write_corpus(arguments.out, arguments.clips, arguments.seed)
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    verb = "would hold" if arguments.dry_run else "holds"
    print(
        f"{arguments.out} {verb} {record['clips']} clips ({record['test_clips']} held out), "
        f"{record['questions']} questions, {record['audio_hours']:.2f} hours"
    )
    return 0
