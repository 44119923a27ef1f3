"""`pal synth OUT`: writes a synthetic corpus of audio files with ground truth, or of text about such clips (`--text`).

`sounds`, `music` and `speech` plan clips and render them with `signals`; `questions` words the questions, and
`descriptions` what a clip sounds like; `corpus` and `text` make the files, `folder` publishes them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline.core.arguments import add_dry_run, add_json, write_results


def main(argv: Sequence[str] | None = None) -> int:
    """Writes a corpus; see `write_corpus` and `write_text`.

    Raises:
        UserError: an argument or the folder cannot be used.
    """
    parser = argparse.ArgumentParser(prog="pal synth", description="Writes an audio corpus with ground truth.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--clips", type=int, default=1300, help="number of clips (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default: %(default)s)")
    parser.add_argument(
        "--text",
        action="store_true",
        help="write descriptions of other clips with questions about them, and no audio: for `pal prepare` with "
        "encoders: {}, to train a language model on text alone",
    )
    add_dry_run(parser, "plan and count the clips, write nothing")
    add_json(parser)
    arguments = parser.parse_args(argv)

    from data_prep.synth.corpus import plan_corpus, summary, write_corpus
    from data_prep.synth.text import plan_text, summary_of_text, write_text

    clips, seed = arguments.clips, arguments.seed
    if arguments.dry_run:
        counts = summary_of_text(plan_text(clips, seed)) if arguments.text else summary(plan_corpus(clips, seed))
        record = {"clips": clips, **counts}
    else:
        record = (write_text if arguments.text else write_corpus)(arguments.out, clips, seed)
    write_results(record, arguments.json)
    verb = "would hold" if arguments.dry_run else "holds"
    length = "text alone" if arguments.text else f"{record['audio_hours']:.2f} hours"
    print(
        f"{arguments.out} {verb} {record['clips']} clips ({record['test_clips']} held out), "
        f"{record['questions']} questions, {length}"
    )
    return 0
