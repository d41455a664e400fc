"""The page of what works follows the marks of the tests."""

import pytest
from support_matrix import AREAS, PAGE, all_rows, page, rows_of

MARKED = '@pytest.mark.supports("Casting", "half()", "keeps tables", "on GPUs")\ndef test_half(): ...\n'


def test_the_page_is_that_of_the_marks():
    rows = all_rows()

    assert PAGE.read_text() == page(rows), "python tests/support/support_matrix.py writes it"
    assert {row.area for row in rows} == set(AREAS)


def test_a_mark_is_a_row():
    (row,) = rows_of(MARKED, "runtime/test_a.py")

    assert "| half() | keeps tables | on GPUs | `runtime/test_a.py::test_half` |" in page([row])


@pytest.mark.parametrize("change", [('"Casting"', '"Costing"'), (', "keeps tables", "on GPUs"', "")])
def test_a_wrong_mark_is_refused(change):
    with pytest.raises(ValueError, match=r"test_a\.py::test_half: supports"):
        rows_of(MARKED.replace(*change), "test_a.py")
