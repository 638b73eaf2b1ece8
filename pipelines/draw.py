"""Vega-Lite charts, a JSON list on standard input, to SVG texts, a JSON list on standard output: `python -m pipelines.draw`."""

from __future__ import annotations

import json
import os
import sys

import vl_convert


def main() -> None:
    """Draw, and leave at once: threads of the library can abort a process that is being taken down."""
    sys.stdout.write(json.dumps([vl_convert.vegalite_to_svg(spec) for spec in json.load(sys.stdin)]))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
