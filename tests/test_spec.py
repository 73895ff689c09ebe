import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undistill.attacks import Attack
from undistill.core.errors import ModelError, SpecError
from undistill.data import Source
from undistill.data.views import Views
from undistill.defences import Defence
from undistill.defences.nasty import Nasty
from undistill.models import Model
from undistill.training.recipe import Recipe


@given(
    st.floats(0, 1000),
    st.floats(0.05, 1000),
    st.none() | st.floats(0.01, 1),
    st.none() | st.text("ab/'\"(), =\\", min_size=1),
)
def test_text_round_trip(omega: float, T: float, warm_start: float | None, adversary: str | None) -> None:
    spec = Nasty(omega=omega, T=T, warm_start=warm_start, adversary=adversary)
    assert Defence.parse(str(spec)) == spec


@pytest.mark.parametrize("family", [Attack, Defence, Model])
def test_every_registered_spec_round_trips(family: type) -> None:
    for name, spec in family.registry.items():
        if name not in ("Factory", "Given", "Timm"):  # which need a name
            assert family.parse(str(spec())) == spec()


def test_nested_spec_round_trips() -> None:
    recipe = Recipe(epochs=3, drops=(0.25,), views=Views(crop=0, flip=True))
    assert Recipe.parse(str(recipe)) == recipe


def test_names_ignore_case_and_parentheses() -> None:
    assert Attack.parse("softlabels") == Attack.parse("SoftLabels(T=4.0)")
    assert str(Source.parse("digits")).startswith("Digits(")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Nastie", "did you mean 'Nasty'"),
        ("Nasty(omga=1)", "did you mean 'omega'"),
        ("Nasty(omega=-0.1)", "omega = -0.1 is refused"),
        ("Nasty(omega=1e999)", "omega = inf is refused"),
        ("Nasty(T=0)", "T = 0 is refused"),
        ("Nasty(omega=nan)", "Cannot read"),
        ("Nasty(0.04)", "Cannot read"),
        ("Nasty(omega=1, T=4, omega=2)", "The field 'omega' is given twice"),
        ("Nasty(omega=__import__('os').getpid())", "Cannot read"),
        ("Nasty(omega=", "Cannot read"),
        ("Nasty(**{'omega': 1})", "Cannot read"),
        ("", "Cannot read"),
    ],
)
def test_bad_text_is_explained(text: str, said: str) -> None:
    with pytest.raises(SpecError, match=re.escape(said)):
        Defence.parse(text)


def test_nan_is_refused_from_python_too() -> None:
    with pytest.raises(SpecError, match="omega = nan"):
        Nasty(omega=math.nan)


def test_specs_are_frozen_and_hashable() -> None:
    spec = Nasty()
    with pytest.raises(Exception, match="frozen"):
        spec.omega = 1.0  # type: ignore[misc]
    assert len({spec, Nasty(), Nasty(omega=0.5)}) == 2


def test_parsing_stored_text_never_runs_code(tmp_path, monkeypatch) -> None:
    file = tmp_path / "evil.py"
    file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match="is not executed"):
        Attack.parse(f"{file}:Anything")
    assert not (tmp_path / "ran").exists()
