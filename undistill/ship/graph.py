"""A protected network as a graph that runs without this package: an ONNX file, and a program of torch."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from undistill.core.errors import ModelError
from undistill.victims.answer import Form
from undistill.victims.protected import answer_of, form_of, responses_of

INPUT, PROBABILITIES, CLASSES = "images", "probabilities", "classes"
EXAMPLES = 2  # images with which a graph is traced


class Shipped(nn.Module):
    """A network as an interface shows it.

    Probabilities (B, K); or the highest k (B, k) with their classes (B, k); or classes (B, 1) alone.
    """

    def __init__(self, network: nn.Module, shown: int | None = None) -> None:
        """`shown` is k, or None where every class is shown, or 0 where no probability is."""
        super().__init__()
        self.network, self.shown = network, shown

    @classmethod
    def of(cls, network: nn.Module, images: Tensor) -> "Shipped":
        """The network of a run; a few images (B, C, H, W) show how much it answers."""
        with torch.no_grad():
            shown = answer_of(network, images).shown.sum(1)
        most = int(shown.max())
        if bool((shown == network_classes(network, images)).all()):
            return cls(network).eval()
        return cls(network, 0 if most == 1 and form_of(network) == Form.LABEL else most).eval()

    @property
    def outputs(self) -> list[str]:
        """Names of what `forward` returns."""
        if self.shown == 0:
            return [CLASSES]
        return [PROBABILITIES] if self.shown is None else [PROBABILITIES, CLASSES]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        answer = answer_of(self.network, images)
        if self.shown is None:
            return (answer.log_p.exp(),)
        if self.shown == 0:
            return (answer.top[:, None],)
        highest = answer.log_p.masked_fill(~answer.shown, -torch.inf).topk(self.shown, dim=1)
        return highest.values.exp(), highest.indices


def network_classes(network: nn.Module, images: Tensor) -> int:
    return answer_of(network, images).log_p.shape[1]


def require_graph(network: nn.Module) -> None:
    """Raise `ModelError` for a response that no graph can hold."""
    for response in responses_of(network):
        if why := response.not_in_graph:
            raise ModelError(
                f"{type(response).__name__} cannot be in a graph: {why}. Serve the run itself (undistill serve), "
                "or take a defence that can: Sealed(), Rounding(), ModelGuardS()."
            )


class Stateless(nn.Module):
    """The same network with its weights as an argument, so that its program holds none of them."""

    def __init__(self, shipped: Shipped) -> None:
        super().__init__()
        self.held = [shipped]  # in a list, so that its weights are not this module's

    def forward(self, state: dict[str, Tensor], images: Tensor) -> Any:
        return functional_call(self.held[0], state, (images,))


def state_of(shipped: Shipped) -> dict[str, Tensor]:
    """The weights and tables of a network by name, in alphabetical order, which a program expects."""
    return {name: value.detach().cpu().contiguous() for name, value in sorted(shipped.state_dict().items())}


def write_program(shipped: Shipped, shape: tuple[int, int, int], path: Path) -> None:
    """A program of torch (`torch.export`) that takes weights and images; any number of these."""
    state, images = state_of(shipped), torch.rand(EXAMPLES, *shape)
    sizes: Any = (dict.fromkeys(state), {0: torch.export.Dim("batch")})
    with quietly("torch"):
        program = torch.export.export(Stateless(shipped), (state, images), dynamic_shapes=sizes)
        for node in program.graph.nodes:  # whose notes name files and modules of this machine
            node.meta = {name: value for name, value in node.meta.items() if name in ("val", "tensor_meta")}
        torch.export.save(program, path)


def write_onnx(shipped: Shipped, shape: tuple[int, int, int], path: Path) -> None:
    """An ONNX file with any number of images, and nothing in it but the graph."""
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError:
        raise ModelError("An ONNX file needs onnx and onnxscript: pip install 'undistill[onnx]'.") from None
    with quietly("ONNX"):
        program = torch.onnx.export(
            shipped,
            (torch.rand(EXAMPLES, *shape),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=[INPUT],
            output_names=shipped.outputs,
            verbose=False,
        )
        assert program is not None
        program.save(path)
    model = onnx.load(path)
    _strip(model)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _strip(model: Any) -> None:
    """Remove what the exporter notes beside the graph: paths of this machine, names of modules, lines of code."""
    del model.metadata_props[:]
    model.doc_string = ""
    for graph in (model.graph, *model.functions):
        parts = [graph, *graph.node, *graph.value_info]
        parts += [*model.graph.input, *model.graph.output, *model.graph.initializer]
        for part in parts:
            for field in ("metadata_props", "doc_string"):
                if field in part.DESCRIPTOR.fields_by_name:
                    part.ClearField(field)
        del graph.value_info[:]


@contextlib.contextmanager
def quietly(what: str) -> Iterator[None]:
    """Without the exporter's remarks; `ModelError` for a network that it cannot trace."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except ModelError:
        raise
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0][:300]
        raise ModelError(
            f"The network cannot be made a graph of {what} ({type(error).__name__}: {said}). Python that depends on "
            "the values of a batch cannot be traced; another --format leaves that file out."
        ) from error
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
