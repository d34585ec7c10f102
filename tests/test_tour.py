"""docs/tour.ipynb runs from the first cell to the last, and is kept without outputs."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOUR = ROOT / "docs" / "tour.ipynb"


@pytest.mark.slow
def test_the_tour_runs_from_photos_to_an_alarm(monkeypatch):
    nbformat, nbclient = (pytest.importorskip(name) for name in ("nbformat", "nbclient"))
    book = nbformat.read(TOUR, as_version=4)
    nbformat.validate(book)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in book.cells)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    where = {"metadata": {"path": str(TOUR.parent)}}  # as Jupyter starts it
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3", resources=where).execute()
    said = "".join(output.get("text", "") for cell in book.cells for output in cell.get("outputs", ()))
    assert (
        "ready: http://127.0.0.1" in said and "no alarm in" in said and "alarm at request" in said and "DRIFT" in said
    )
