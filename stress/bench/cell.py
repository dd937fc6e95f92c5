"""One cell: runs one case for one contender in a fresh interpreter, and leaves what it measured in its folder.

    python -c 'from stress.bench import cell; cell.main()' CASE CONTENDER quick|full FOLDER
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys

from stress.bench.cases import CASES
from stress.bench.contenders import all_contenders
from stress.bench.registry import Setting

CODE = "from stress.bench import cell; cell.main()"
RESULT = "result.json"


def main() -> None:
    name, contender_name, length, scratch = sys.argv[1:5]
    spec = CASES[name]
    faulthandler.dump_traceback_later(max(5, spec.limit_seconds - 3), exit=False)
    contender = all_contenders()[contender_name]()
    if not name.startswith("cold"):  # these time it
        contender.load()
    found = spec.run(contender, Setting(scratch, length == "quick"))
    path = os.path.join(scratch, RESULT)
    with open(path + ".part", "w") as file:
        json.dump(found, file)
    os.rename(path + ".part", path)
    if spec.abrupt:
        os._exit(0)
    if name != "cold-first":  # it did
        contender.shutdown()
