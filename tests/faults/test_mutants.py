"""Each planted fault is noticed by the tests nearest to it: pytest -m mutants [-k WORDS]

A copy of the working tree gets the fault; there the tests have to fail, and without it to pass.
"""

import pytest
from faults import effort, mutants

pytestmark = [pytest.mark.mutants, pytest.mark.slow]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return mutants.tree(tmp_path_factory.mktemp("mutants"))


@pytest.fixture(scope="module")
def passing():
    """The tests that were seen to pass without a fault."""
    return set()


def named(mutant):
    return mutant.fault.replace(" ", "_")


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=named)
def test_a_planted_fault_is_noticed(mutant, copy, passing):
    if mutant.tests not in passing:
        good, printed = mutants.passes(copy, mutant.tests)
        assert good, printed
        passing.add(mutant.tests)
    killer = mutants.killed_by(copy, mutant)
    effort.tried("mutants", "noticed" if killer else "NOT NOTICED")
    assert killer, f"{mutant.tests} passes although {mutant.fault}"


def test_every_fault_is_another_change_of_code_that_is_there(copy):
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 40
    for mutant in mutants.MUTANTS:
        text = mutants.plant(copy, mutant)
        (copy / "tl_jax" / mutant.file).write_text(text)
