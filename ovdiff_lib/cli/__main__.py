"""``python -m ovdiff_lib.cli``."""

import sys

from ovdiff_lib.cli.main import main

sys.exit(main())
