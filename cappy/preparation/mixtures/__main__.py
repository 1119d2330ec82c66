"""Makes the data files of the mixtures anew.

    python -m cappy.preparation.mixtures --templates FOLDER --published FOLDER

`--templates` is the folder promptsource/templates of PromptSource, any version; `--published` holds t0_datasets.csv
(t-zero, t0/datasets.csv) and bigbench45_sizes_and_scores.csv (columns task, train, validation). sources.json is read,
never written.
"""

import argparse
import sys
from pathlib import Path

from cappy.errors import CappyError


def main() -> int:
    """Reads the command line and writes the files; 1 where a person must mend something."""
    from cappy.preparation.mixtures.generation import write_mixtures

    parser = argparse.ArgumentParser(
        prog="python -m cappy.preparation.mixtures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--templates", type=Path, required=True, help="PromptSource's folder of templates")
    parser.add_argument("--published", type=Path, required=True, help="folder of the two published tables")
    parser.add_argument("--target", type=Path, default=Path(__file__).parent / "data", help="folder to write")
    arguments = parser.parse_args()
    try:
        written = write_mixtures(arguments.templates, arguments.published, arguments.target)
    except CappyError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stderr.write("".join(f"{path}\n" for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
