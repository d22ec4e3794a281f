"""The proof's proof: a bug from the museum, put into the source, makes the tests fail."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from .catalogue import CATALOGUE, ISSUE, Edit, Mutation
from .trial import REPO, Unfit, apply, attempt, control, copied, failures, run

SEED = int(os.environ.get("FIELDPOST_SEED", int(time.time() // 86_400)))
"""Another handful every day; the seed of a failing run is in the test's id."""

HANDFUL = random.Random(SEED).sample([one for one in CATALOGUE if one.is_quick], 8)


def test_every_mutation_applies_to_the_source_as_it_is(tmp_path: Path) -> None:
    for mutation in CATALOGUE:
        for edit in mutation.edits:
            (tmp_path / edit.file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / edit.file).write_text((REPO / edit.file).read_text())
        apply(mutation.edits, tmp_path)
        for edit in mutation.edits:
            mutated = (tmp_path / edit.file).read_text()
            assert mutated != (REPO / edit.file).read_text(), mutation.name
            if edit.file.endswith(".py"):
                compile(mutated, edit.file, "exec")


def test_a_mutation_that_matches_twice_or_not_at_all_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    for old in ("x = 1", "y = 1"):
        with pytest.raises(Unfit, match="not one"):
            apply([Edit("a.py", old, "")], tmp_path)


def test_there_is_a_mutation_for_everything_that_the_issue_names() -> None:
    assert {mutation.museum for mutation in CATALOGUE} - {""} == set(ISSUE)
    assert len({mutation.name for mutation in CATALOGUE}) == len(CATALOGUE)


def test_the_tests_that_are_to_catch_them_exist() -> None:
    for mutation in CATALOGUE:
        assert mutation.caught_by
        for test in mutation.caught_by:
            file, _, name = test.partition("::")
            assert f"def {name.partition('[')[0]}(" in (REPO / file).read_text(), test


def test_the_summary_of_pytest_tells_which_test_failed_and_how() -> None:
    said = """ERROR  logged
        == short test summary info ==
        FAILED tests/a.py::test_b[c d] - assert 1 == 2
        ERROR tests/a.py::test_e - OSError: - no
        1 failed"""
    assert failures(said) == [("tests/a.py::test_b[c d]", "assert 1 == 2"), ("tests/a.py::test_e", "OSError: - no")]


@pytest.mark.slow
def test_the_tests_of_the_handful_pass_without_any_mutation() -> None:
    control([test for mutation in HANDFUL for test in mutation.caught_by])


@pytest.mark.slow
@pytest.mark.parametrize("mutation", HANDFUL, ids=lambda mutation: f"{mutation.name}-seed-{SEED}")
def test_a_bug_from_the_museum_makes_its_test_fail(mutation: Mutation) -> None:
    outcome = attempt(mutation)
    assert outcome.caught_by, f"{mutation.name} survived: {mutation.why}"


@pytest.mark.slow
def test_a_run_on_anything_but_the_copy_proves_nothing_and_says_so() -> None:
    with copied() as root:
        (root / "tests" / "test_elsewhere.py").write_text(
            f"import sys\ndef test_it():\n"
            f"    for name in [name for name in sys.modules if name.startswith('fieldpost')]:\n"
            f"        del sys.modules[name]\n"
            f"    sys.path.insert(0, {str(REPO / 'edge')!r})\n    import fieldpost\n"
        )
        with pytest.raises(Unfit, match="copy"):
            run(root, ["tests/test_elsewhere.py"])
