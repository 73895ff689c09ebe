"""Rules of this suite itself."""

import pytest


@pytest.mark.parametrize(("ci", "failed"), [("true", True), ("", False)])
def test_what_is_skipped_fails_in_ci_unless_it_needs_a_gpu(
    ci: str, failed: bool, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    pytester.makeconftest("from tests.conftest import pytest_make_collect_report, pytest_runtest_makereport")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.skipif(True, reason="needs a program")
        def test_of_one_program(): pass

        def test_of_another(): pytest.skip("needs a program")
        def test_of_a_gpu(): pytest.skip("needs a GPU")
        def test_of_nothing(): pass
        """
    )
    outcomes = {"failed": 1, "errors": 1, "skipped": 1} if failed else {"skipped": 3}
    pytester.runpytest_inprocess("-p", "no:xdist").assert_outcomes(passed=1, **outcomes)


@pytest.mark.parametrize(("ci", "outcome"), [("true", "errors"), ("", "skipped")])
def test_a_module_that_is_skipped_fails_in_ci(
    ci: str, outcome: str, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    pytester.makeconftest("from tests.conftest import pytest_make_collect_report, pytest_runtest_makereport")
    pytester.makepyfile("import pytest; pytest.importorskip('no_such_module')")
    pytester.runpytest_inprocess("-p", "no:xdist").assert_outcomes(**{outcome: 1})
