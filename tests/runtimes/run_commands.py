"""Runs commands of `umv2-export` in one process, for tests that put another ONNX Runtime first on PYTHONPATH.

Standard input: a JSON list of argument lists. The last line of output: a JSON list of [exit code, stdout, stderr].
"""

import json
import sys

from tests.command import run_command

if __name__ == "__main__":
    results = [run_command(*arguments) for arguments in json.load(sys.stdin)]
    print(json.dumps([[result.exit_code, result.stdout, result.stderr] for result in results]))
