"""``python -m iql_torchrl.report``: see ``--help``."""

import sys

from iql_torchrl.report.comparison import main

sys.exit(main())
