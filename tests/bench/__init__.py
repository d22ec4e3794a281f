"""What it costs and how fast it is: one module a topic, RESULTS.md for what was seen."""

import sys
from pathlib import Path

# tests/ is no package that is installed: `parts` and `servers` are found as pytest finds them.
if (tests := str(Path(__file__).parent.parent)) not in sys.path:
    sys.path.insert(0, tests)
