"""Let a script import its own clone as ``retemper``, installed or not.

Python puts a script's folder first on ``sys.path``, so this module is found before an installed ``retemper`` and
replaces itself by the package whose root is the repository. Every folder of scripts has a link to this file.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

if __name__ == "retemper":
    _root = next(folder for folder in Path(__file__).resolve().parents if (folder / "engine" / "errors.py").is_file())
    _spec = spec_from_file_location("retemper", _root / "__init__.py", submodule_search_locations=[str(_root)])
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["retemper"] = _package = module_from_spec(_spec)
    _spec.loader.exec_module(_package)
