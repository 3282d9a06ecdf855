"""`python -m undiffuse` is the command `undiffuse`."""

import sys

from undiffuse.cli import main

sys.exit(main())
