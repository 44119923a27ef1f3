"""`python -m data_prep.synth`: the same as `pal synth`."""

import sys

from data_prep.synth import main
from pipeline.core.errors import run_command

sys.exit(run_command(main, sys.argv[1:]))
