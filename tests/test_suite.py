"""Rules of this suite itself."""

import pytest


@pytest.mark.parametrize(("ci", "failed"), [("true", 1), ("", 0)])
def test_what_is_skipped_fails_in_ci_unless_it_needs_a_gpu(
    ci: str, failed: int, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    pytester.makeconftest("from tests.conftest import pytest_runtest_makereport")
    pytester.makepyfile(
        """
        import pytest

        def test_of_a_program(): pytest.skip("needs a program")
        def test_of_a_gpu(): pytest.skip("needs a GPU")
        def test_of_nothing(): pass
        """
    )
    pytester.runpytest_inprocess("-p", "no:xdist").assert_outcomes(passed=1, skipped=2 - failed, failed=failed)
