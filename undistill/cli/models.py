"""`train`, `adopt` and `protect`: commands that end with the run folder of a network."""

from pathlib import Path
from typing import Annotated

import typer

from undistill.cli.options import (
    Code,
    Config,
    DataDir,
    Device,
    Fast,
    ProtectOut,
    Remember,
    Set,
    TrainOut,
    beside,
    say,
    working,
)


def train(
    data: Annotated[str, typer.Option(help="digits, a folder of images by class, an .npz file, or a spec.")],
    model: Annotated[str, typer.Option(help="A listed network, or your own: path/to/file.py:factory.")],
    out: TrainOut = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Start from these (safetensors or state dict); --set recipe.epochs=0 takes them as they are."
        ),
    ] = None,
    config: Config = None,
    settings: Set = None,
    fast: Fast = False,
    device: Device = "auto",
    data_dir: DataDir = None,
) -> None:
    """Train a classifier normally: the honest teacher."""
    from undistill.cli.config import read_settings
    from undistill.runs.settings import TrainSettings
    from undistill.runs.train import train as run

    chosen = TrainSettings(**read_settings(config, settings, fast))
    out = out or Path("runs") / f"{Path(data.split('(')[0]).stem}-{Path(model.split('(')[0]).stem}"
    with working() as progress:
        result = run(data, model, out, weights=weights, settings=chosen, device=device, progress=progress)
    say(f"{result.folder}: validation accuracy {result.record['metrics']['validation_accuracy']:.1%}")


def adopt(
    data: Annotated[str, typer.Option(help="Images of the kind that it was trained on.")],
    model: Annotated[str, typer.Option(help="A listed network, or your own: path/to/file.py:factory.")],
    weights: Annotated[
        Path | None, typer.Argument(help="A checkpoint or safetensors file; none if the factory loads it.")
    ] = None,
    test: Annotated[str | None, typer.Option(help="Images that it has not seen, on which it is measured.")] = None,
    preprocess: Annotated[
        str, typer.Option(help="How it wants images: none, imagenet, half, cifar10, mnist, 255 or timm.")
    ] = "none",
    mean: Annotated[str | None, typer.Option(help="Or the mean of each channel, such as 0.485,0.456,0.406.")] = None,
    std: Annotated[str | None, typer.Option(help="With the standard deviation of each.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="Class names in the order of its outputs: cat,dog,eel; by name otherwise.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="Where the checkpoint keeps them, if it holds several.")] = None,
    out: TrainOut = None,
    device: Device = "auto",
    data_dir: DataDir = None,
) -> None:
    """Take a trained classifier as it is, to protect and audit it."""
    from undistill.core.errors import SpecError
    from undistill.models.adapter import Adapter
    from undistill.runs.adopt import adopt as run

    def numbers(text: str | None) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in text.split(",")) if text else ()
        except ValueError:
            raise SpecError(f"'{text}' is no list of numbers, such as 0.485,0.456,0.406.") from None

    how = Adapter(mean=numbers(mean), std=numbers(std)) if mean or std else preprocess
    named = [name.strip() for name in classes.split(",")] if classes else ()
    out = out or Path("runs") / f"{Path(data.split('(')[0]).stem}-{Path(model.split('(')[0]).stem}"
    with working():
        result = run(
            model, data, out, weights=weights, key=key, preprocess=how, classes=named, test=test, device=device
        )
    metrics = result.record["metrics"]
    kept = "that it has not seen" if test else "of which it may have seen any"
    say(
        f"{result.folder}: accuracy {metrics['train_accuracy']:.1%} on training images, "
        f"{metrics['test_accuracy']:.1%} on test images, {kept}"
    )


def protect(
    run: Annotated[Path, typer.Argument(help="The run folder of the honest teacher.")],
    defence: Annotated[
        list[str] | None,
        typer.Option(help='A listed defence, such as "Nasty(omega=0.04, T=4)"; several apply in this order.'),
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="Points of accuracy that you accept to lose: Nasty(price=...), applied first.")
    ] = None,
    out: ProtectOut = None,
    model: Code = None,
    config: Config = None,
    settings: Set = None,
    fast: Fast = False,
    device: Device = "auto",
    data_dir: DataDir = None,
    remember: Remember = 4.0,
) -> None:
    """Make a protected twin of a trained classifier."""
    from undistill.cli.config import merge, read_settings
    from undistill.runs.protect import protect as work
    from undistill.runs.run import Run
    from undistill.runs.settings import Settings, recorded_settings

    honest = Run.open(run)
    chosen = Settings(**merge(recorded_settings(honest).model_dump(), read_settings(config, settings, fast)))
    named = [*([] if price is None else [f"Nasty(price={price:g})"]), *(defence or ())]
    out = out or beside(run, "-".join(one.split("(")[0].split(":")[-1].lower() for one in named) or "protected")
    with working() as progress:
        victim = work(
            honest, named, out, model=model, settings=chosen, device=device, remember=remember, progress=progress
        )
    metrics = victim.record["metrics"]
    say(
        f"{victim.folder}: validation accuracy {metrics['validation_accuracy']:.1%} "
        f"(honest {honest.record['metrics']['validation_accuracy']:.1%}), "
        + said_lost(metrics)
        + f"divergence T^2 KL {metrics['divergence']:.2f} nats"
        + "".join(f", {name} {value:.3g}" for name, value in victim.record.get("found", {}).items())
    )


def said_lost(metrics: dict[str, float]) -> str:
    """Accuracy lost on validation images, in words; runs of earlier versions do not say."""
    if "accuracy_lost" not in metrics:
        return ""
    return f"lost {100 * metrics['accuracy_lost']:.1f} ± {196 * metrics['accuracy_lost_error']:.1f} points, "
