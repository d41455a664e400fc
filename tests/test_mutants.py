"""The list of mutants fits the code: a defect that cannot be put in proves nothing about the tests."""

from pathlib import Path

import pytest

from tests.mutation.mutants import MUTANTS

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_source_occurs_once_and_its_test_files_exist(mutant):
    code = (REPOSITORY / mutant.file).read_text(encoding="utf-8")

    assert code.count(mutant.source) == 1
    assert mutant.tests
    assert all((REPOSITORY / test).is_file() for test in mutant.tests)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_valid_python_and_differs(mutant):
    """Any test would kill a syntax error, and none an equal text."""
    code = (REPOSITORY / mutant.file).read_text(encoding="utf-8")
    mutated = mutant.applied_to(code)

    compile(mutated, mutant.file, "exec")
    assert mutated != code


def test_mutants_have_names_of_their_own():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
