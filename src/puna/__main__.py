"""`python -m puna` is the command line."""

from __future__ import annotations

import sys

from puna.cli import main

sys.exit(main())
