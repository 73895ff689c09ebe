"""`Spec`: a frozen, validated record whose text is its CLI form, test id, report row and cache key.

>>> Attack.parse("SoftLabels(T=4, alpha=0.9)")
"""

import ast
import inspect
import re
import reprlib
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from undistill.core.code import code_sha256, is_code, load_code, trust
from undistill.core.errors import SpecError, unknown

FIRST = ""
_CALL = re.compile(r"\s*(?:(?P<origin>[^()]+):)?(?P<name>[\w-]+)\s*(?P<arguments>\(.*\))?\s*", re.S)


def within(low: float, high: float, why: str) -> AfterValidator:
    """A number from `low` to `high`; `why` tells the user what is wrong with others."""

    def check(value: float) -> float:
        if not low <= value <= high:
            raise ValueError(f"it must lie between {low:g} and {high:g}: {why}")
        return value

    return AfterValidator(check)


Temperature = Annotated[float, within(0.05, 1000, "below, only the top answer is left; beyond, T^2 KL is rounding")]
"""T of a softened answer, softmax(z / T)."""
Weight = Annotated[float, within(0, 1000, "a term of the loss beyond drowns all others")]
"""Factor of a term in a loss."""
LearningRate = Annotated[float, within(1e-9, 100, "weights beyond either stand still or leave the finite numbers")]


class Spec(BaseModel):
    """Extra fields are refused, ranges are checked, NaN and infinity are not numbers here.

    A direct subclass is a family (`Attack`, `Defence`, ...); concrete subclasses of a family inside
    this package register themselves under their class name (but for
    those that are not `listed`); the user's go by `file.py:Name`.
    `parse(str(x)) == x` holds for every spec.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    registry: ClassVar[dict[str, type[Any]]]
    origin: ClassVar[str] = ""
    listed: ClassVar[bool] = True
    """A common base of specs says False in its own body."""
    offered: ClassVar[bool] = True
    """Whether it is a choice of the user's; False for specs that other parts of the program make."""
    unnamed: ClassVar[str] = ""
    """The field whose value may be written first, without its name."""
    withheld: ClassVar[Sequence[str]] = ()
    """Fields whose refused values no error shows, since they may hold secrets."""
    quiet: ClassVar[Sequence[str]] = ()
    """Fields that the text leaves out at their defaults: those that were added later, and would change stored texts."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        if Spec in cls.__bases__:
            cls.registry = {}
        listed = cls.__dict__.get("listed", True)
        if listed and cls.__module__.startswith("undistill.") and not inspect.isabstract(cls):
            cls.registry[cls.__name__] = cls

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise SpecError(_explain(type(self), error)) from None

    def __str__(self) -> str:
        said = [(name, value) for name, value in self if name not in self.quiet or value != self._default(name)]
        fields = ", ".join(f"{name}={_text(value)}" for name, value in said)
        return f"{self.origin + ':' if self.origin else ''}{type(self).__name__}({fields})"

    __repr__ = __str__

    @property
    def brief(self) -> str:
        """A text that `parse` reads as this spec, without the fields that it would have anyway."""
        said = {name: getattr(self, name) for name in type(self).model_fields}
        for name in list(said):
            others = {other: value for other, value in said.items() if other != name}
            try:
                if type(self)(**others) == self:
                    said = others
            except SpecError:  # that field is needed
                continue
        fields = ", ".join(f"{name}={_text(value)}" for name, value in said.items())
        return f"{str(self).partition('(')[0]}({fields})"

    @classmethod
    def _default(cls, name: str) -> object:
        return cls.model_fields[name].default

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process reads the text, and so runs only code that it was told to trust."""
        return _read, (self._family(), str(self))

    @property
    def embedded(self) -> Sequence["Spec"]:
        """Specs whose text is a field of this one, such as the network that it builds."""
        return ()

    def refers(self) -> dict[str, str]:
        """SHA-256 of what the text only names and the result depends on, such as the user's code."""
        text = str(self)
        return {text.split("(")[0]: code_sha256(text)} if is_code(text) else {}

    @classmethod
    def _family(cls) -> type["Spec"]:
        return next(base for base in cls.__mro__ if Spec in base.__bases__)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The spec that `text` describes: `Name`, `Name(field=value)` or `file.py:Name(...)`.

        A first value without a name is that of the field `unnamed`, if the spec has one: `Onnx('model.onnx')`.
        Raises `SpecError` for an unknown name or field (with the nearest valid one), for a value
        out of range, and for code that the user did not name (see `undistill.core.code.trust`).
        """
        origin, name, arguments = split_call(text)
        spec = cls._load(origin, name) if origin else cls._find(name)
        if FIRST in arguments:
            arguments = spec._named(arguments)
        return spec(**arguments)

    @classmethod
    def from_user(cls, spec: str | Self) -> Self:
        """A spec that the user typed or made himself: its code may run."""
        if not isinstance(spec, cls):
            trust(str(spec))
            spec = cls.parse(str(spec))
        for inner in spec.embedded:
            trust(str(inner))
        return spec

    @classmethod
    def _find(cls, name: str) -> type[Self]:
        for known, spec in cls.registry.items():
            if known.casefold() == name.casefold():
                return spec
        raise SpecError(unknown(re.sub(r"\B(?=[A-Z])", " ", cls.__name__).lower(), name, cls.registry))

    @classmethod
    def _named(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments, in which the first one has the name of the field `unnamed`."""
        if not cls.unnamed or cls.unnamed in arguments:
            raise SpecError(f"Cannot read {cls.__name__}({arguments[FIRST]!r:.80}): fields are written field=value.")
        return {cls.unnamed: arguments[FIRST]} | {name: value for name, value in arguments.items() if name != FIRST}

    @classmethod
    def _load(cls, origin: str, name: str) -> type[Self]:
        spec = load_code(f"{origin}:{name}")
        if not (inspect.isclass(spec) and issubclass(spec, cls)):
            raise SpecError(f"{origin}:{name} is not a subclass of {cls.__name__}.")
        if inspect.isabstract(spec):
            raise SpecError(f"{origin}:{name} lacks {', '.join(sorted(spec.__abstractmethods__))}.")
        if not spec.__module__.startswith("undistill."):
            spec.origin = origin
        return spec


def _read(family: type[Spec], text: str) -> Spec:
    return family.parse(text)


def split_call(text: str) -> tuple[str, str, dict[str, Any]]:
    """Origin, name and arguments of `origin:Name(key=literal, ...)`; a first one without a key is called `FIRST`."""
    match = _CALL.fullmatch(text)
    if match is None:
        raise SpecError(f"Cannot read '{text}': write Name or Name(field=value, ...).")
    try:
        call = ast.parse("f" + (match["arguments"] or "()"), mode="eval").body
        assert isinstance(call, ast.Call)
        first = {FIRST: ast.literal_eval(call.args.pop())} if len(call.args) == 1 else {}
        arguments = first | _keywords(call)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError, AssertionError):
        raise SpecError(
            f"Cannot read '{text}': fields are written field=value, with numbers, True, False, "
            "None or quoted text as values."
        ) from None
    return (match["origin"] or "").strip(), match["name"], arguments


def _keywords(call: ast.Call) -> dict[str, Any]:
    if not isinstance(call.func, ast.Name) or call.args or any(key.arg is None for key in call.keywords):
        raise ValueError("fields have names")
    names = [str(key.arg) for key in call.keywords]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SpecError(f"The field '{min(twice)}' is given twice.")
    return {name: _literal(key.value) for name, key in zip(names, call.keywords, strict=True)}


def _literal(node: ast.expr) -> Any:
    """A literal, or the fields of a nested spec, whose class its parent knows."""
    return _keywords(node) if isinstance(node, ast.Call) else ast.literal_eval(node)


def _text(value: Any) -> str:
    if isinstance(value, float) and value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return str(value) if isinstance(value, Spec) else repr(value)


def _explain(spec: type[Spec], error: ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return unknown(f"field of {spec.__name__}", field, spec.model_fields)
    if first["type"] == "missing":
        return f"{spec.__name__} needs a value for '{field}'."
    why = first["msg"].removeprefix("Value error, ")
    shown = "" if field in spec.withheld else f" = {_shown(first['input'])}"
    return f"{spec.__name__}: {field}{shown} is refused: {why}."


def _shown(value: Any) -> str:
    """A refused value as text, cut where it is long; a crafted one may have no text at all."""
    try:
        return reprlib.repr(value)
    except Exception:
        return f"<{type(value).__name__}>"
