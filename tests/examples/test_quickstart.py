"""The quickstart notebook runs from top to bottom and shows what it promises."""

import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


@pytest.mark.slow
def test_quickstart_runs() -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.get("text", "") for output in outputs if output.output_type == "stream")
    shown = [output.data for output in outputs if output.output_type == "execute_result"]

    table, picture = shown
    assert "<table>" in table["text/html"] and "less" in table["text/html"]
    assert "image/png" in picture

    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d+)", printed)]
    assert len(losses) == 6 and losses[-1] < 0.9 * losses[0]
    stored, baseline = map(float, re.findall(r"([\d.]+) MiB", printed))
    assert baseline > 6 * stored > 0
    (cosine,) = map(float, re.findall(r"exact gradient: ([\d.]+)", printed))
    assert 0.97 < cosine < 1
    noise, another = map(int, re.findall(r"(\d+)%", printed))
    assert 0 < noise < another


def test_quickstart_is_stored_without_outputs() -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]
