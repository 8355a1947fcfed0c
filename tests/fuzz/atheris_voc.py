"""Hours of VOC XML led by coverage: `python -m tests.fuzz.atheris_voc CORPUS -max_total_time=3600`, for a nightly run.

Atheris (`pip install atheris`) is no dependency of Boxwright's. What is new is kept in CORPUS, a folder that is made
with the seeds of `test_voc_xml` where it is not there; a crash is written to `crash-*` in the working directory.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path


def main() -> None:
    import atheris  # type: ignore[import-not-found]

    with atheris.instrument_imports(include=["boxwright.data.formats"]):
        from tests.fuzz import test_voc_xml

    for argument in sys.argv[1:]:
        corpus = Path(argument)
        if not argument.startswith("-") and not corpus.exists():
            corpus.mkdir(parents=True)
            for number, seed in enumerate(test_voc_xml.SEEDS):
                (corpus / f"seed{number:02}.xml").write_bytes(seed)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        path = Path(folder) / "case.xml"
        atheris.Setup(sys.argv, lambda data: test_voc_xml.check(path, data))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
