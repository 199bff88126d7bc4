"""In-place activated batch norm.

Importing it raises ImportError if `utils` is another package or file of that name, which Python found before the one of
this project.
"""

from pathlib import Path

import utils

HOME = Path(__file__).resolve().parents[1]
if HOME / "utils" not in [Path(folder).resolve() for folder in getattr(utils, "__path__", ())]:
    raise ImportError(f"expected utils of {HOME}, found {getattr(utils, '__file__', None) or utils}, which is imported "
                      "under that name; rename it, or use ACFNet in a process, and from a folder, without it")
