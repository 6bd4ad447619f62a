"""Say whether a run is complete and made as is asked now: complete.py SAVE_DIR key=value ...

Prints one line: `complete`, `not complete`, `made with other settings: ...` or `made from another ...`.
"""

import sys

from tofu.runtime import provenance

if __name__ == "__main__":
    print(provenance.state(sys.argv[1], sys.argv[2:]))
