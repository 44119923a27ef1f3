"""Runs `pal synth` as `python -m data_prep.synth`."""

import sys

from data_prep.synth import main
from pipeline.core.errors import run_command

sys.exit(run_command(main, sys.argv[1:]))
