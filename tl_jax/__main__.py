"""python -m tl_jax COMMAND ...; `python -m tl_jax COMMAND --help` says what a command takes.

Exit codes: 0 done; 1 some inputs cannot be read; 2 bad input, in one message; 75 stopped, see train; 130 Ctrl-C.
SIGTERM ends every command but train and serve at once; what was complete is kept.
"""

import argparse
import contextlib
import io
import os
import pathlib
import signal
import sys
from collections.abc import Callable
from typing import Any

from tl_jax import commands
from tl_jax.core import checks, console
from tl_jax.core.card import PIXEL_TYPES
from tl_jax.core.options import PIXELS, SEED

Args = argparse.Namespace


def arg(*names: str, **options: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return names, options


def one(check: checks.Check, kind: Callable[[str], Any] = int) -> Callable[[str], Any]:
    """The type of an argument that has to fit a check."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if check.fits(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text[:100]!r}: expected {check.expected}")

    return parse


_COUNT, _SIZE = one(checks.integer(1, 10**6)), one(checks.integer(1, 2**14))
_COUNT_LARGE = one(checks.integer(1, 2**31))
_PIXELS = one(PIXELS, lambda text: tuple(map(int, text.split("x"))) if "x" in text else int(text))
_WORKERS = one(checks.integer(0, 1024))
_SHARE = one(checks.number(0, 1, above=True, below=True), float)
_FOLDER = one(checks.Check(bool, "a folder"), str)
_SHOWN = (
    arg("--resamples", type=_COUNT, default=1000, help="of the bootstrap behind the intervals"),
    arg("--json", action="store_true", help="print JSON instead of tables"),
)
_BATCH = arg("--batch-size", type=_COUNT, default=128, help="over all devices")
_OUT = arg("--out", required=True, type=_FOLDER, help="the folder to write to")
_WEIGHTS = arg("source", help="a file, builtin:NAME, timm:NAME or hf://owner/name[/file]@revision")
COMMANDS = {
    commands.train: ("train a config file; flags as of launch.py", (
        arg("rest", nargs=argparse.REMAINDER, metavar="FILE[:ARGUMENT] [--config.OPTION=VALUE ...] [--workdir W]"),
    )),
    commands.predict: ("what a finished run answers for images, or for the rows of a table", (
        arg("run", help="the folder of the run, or of an export"),
        arg("inputs", nargs="+", help="files, and folders, of which every visible file counts; a .csv file of a table"),
        arg("--out", default="", help="a .csv or .jsonl file; without it CSV goes to the standard output"),
        arg("--weights", help="where the weights that the run began with lie now, for adapters and prompts"),
        _BATCH,
    )),
    commands.evaluate: ("the metrics of a finished run, or of a weight file, on labelled data; nothing is trained", (
        arg("what", nargs="+", metavar="[RUN] DATA", help="a run or an export, and a source, folder or .npz file"),
        arg("--model", default="", help="instead of RUN: the model of --weights; not needed where its card names it"),
        arg("--weights", default="", help="instead of RUN: a weight file, with its own head"),
        arg("--image-size", type=_PIXELS, default=0, help="pixels, 224 or HEIGHTxWIDTH, instead of the card's"),
        arg("--split", default="", help="such as test or train[:10%%]; default: test, else val, else train"),
        arg("--similarity", action="store_true", help="with --weights: answer the cosine of the two texts of a pair"),
        arg("--labels", default="", help="label columns, with commas, of csv:, table: and text: sources"),
        arg("--text", default="", help="the columns of the texts, with a comma, of text: sources"),
        arg("--out", default="", help="write the predictions to this .npz file too"),
        *_SHOWN, _BATCH,
    )),
    commands.calibrate: ("fit what a finished run's answers are worth on its own val; predict then tells it", (
        arg("run", help="the folder of the run"),
        arg("--split", default="val", help="labelled examples of the run that it was not trained on"),
        arg("--coverage", type=_SHARE, default=0.9, help="how often sets and intervals hold the truth"),
        arg("--sets", choices=["lac", "aps"], default="lac", help="see docs/trust.md, as for the following"),
        arg("--ood", choices=["mahalanobis", "knn", "energy", "none"], default="mahalanobis", help="the score"),
        arg("--keep", type=_SHARE, default=0.95, help="the share in distribution that its threshold keeps"),
        arg("--abstain", default="ood,set", help="where: ood, set, both with a comma, or '' for nowhere"),
        arg("--weights", help="where the weights that the run began with lie now, for adapters and prompts"),
        _BATCH,
    )),
    commands.metrics: ("the metrics of a predictions.npz", (
        arg("file", help="predictions.npz of a run"),
        *_SHOWN,
        arg("--level", type=_SHARE, default=0.95, help="of the intervals"),
        arg("--seed", type=one(SEED), default=0, help="of the bootstrap"),
    )),
    commands.classic: ("classic transfer on features from a labelled domain to an unlabelled one", (
        arg("--source", required=True, help="the labelled domain, such as arrays:FILE.npz or folder:PATH"),
        arg("--target", required=True, help="the other domain; its labels are read when all methods have predicted"),
        arg("--source-split", default="train", help="such as train or train[:80%%]"),
        arg("--target-split", default="train", help="a slice of it is not stratified, as its labels are sealed"),
        arg("--labels", default="", help="the label column of csv: and table: sources"),
        arg("--method", default="pca,tca,jda,sa,gfk,coral,ot_da", help="names with commas"),
        arg("--classifier", default="1nn", help="1nn | svm | logistic; weighting needs one of the last two"),
        arg("--scale", default="", help="of each domain by itself, with commas: row_sum, row_l2, zscore"),
        arg("--arg", action="append", default=[], help="[METHOD.]argument=value; may be given several times"),
        arg("--shots", type=one(checks.integer(0, 10**6)), default=0, help="labelled target examples, for tradaboost"),
        arg("--seed", type=one(SEED), default=0, help="of the shots"),
        arg("--run", default="", help="of images: the run whose network computes the features"),
        arg("--model", default="", help="of images: the model of --weights"),
        arg("--weights", default="", help="of images: a weight file"),
        arg("--resamples", type=_COUNT, default=1000, help="of the bootstrap behind the intervals"),
        arg("--out", default="", help="a folder for table.csv, result.json and weights_METHOD.npz"),
    )),
    commands.rank: ("rank networks for labelled data by transferability scores, without training", (
        arg("--data", required=True, help="what a run takes, such as folder:PATH; test is never read"),
        arg("--weights", required=True, help="with commas: FILE, NAME=FILE, NAME= (random), timm:NAME, builtin:NAME, "
            "hf://owner/name[/file]@revision"),
        arg("--split", default="train", help="such as train or train[:80%%]"),
        arg("--task", choices=["classification", "binary", "multilabel", "regression"], default="classification"),
        arg("--labels", default="", help="label columns, with commas, of csv:, table: and text: sources"),
        arg("--text", default="", help="the columns of the texts, with a comma, of text: sources"),
        arg("--image-size", type=_PIXELS, default=0, help="pixels, 224 or HEIGHTxWIDTH, instead of the cards'"),
        arg("--shots", type=one(checks.integer(0, 10**6)), default=0, help="examples of each class; 0: all"),
        arg("--seed", type=one(SEED), default=0, help="of the shots, random weights and the runs of --verify"),
        arg("--scores", default="", help="names with commas, see docs/choosing.md; default: all that fit the labels"),
        arg("--verify", type=_COUNT, nargs="?", const=100, default=0, metavar="STEPS",
            help="compare with a linear probe and fine-tuning of so many steps (100) of each network"),
        arg("--cache_dir", default="", help="where features are kept; default: ~/.cache/tl_jax/features"),
        arg("--json", action="store_true", help="print JSON instead of tables"),
        arg("--out", default="", help="write the table to this .csv file too"),
    )),
    commands.labels: ("rank the labels of a finished run's data by how likely they are wrong", (
        arg("run", help="the folder of the run"),
        arg("--out", default="", help="the folder for labels.csv, .json and .png (default: RUN/labels)"),
        arg("--folds", type=one(checks.integer(3, 1000)), default=5, help="each is judged by a model of the others"),
        arg("--seed", type=one(SEED), default=0, help="of the folds"),
        arg("--top", type=_COUNT, default=50, help="how many are listed, suspects or not"),
        arg("--splits", default="", help="names with commas, such as train,val; default: all that the run names"),
        arg("--label", default="", help="which label of a multilabel task"),
    )),
    commands.explain: ("images with the map of what a run's network looked at: Grad-CAM, of ViTs attention rollout", (
        arg("run", help="the folder of the run"),
        arg("images", nargs="*", help="files and folders; without them mistakes and others of the split it scored"),
        arg("--out", default="", help="a .png or .svg file (default: RUN/explain.png)"),
        arg("--count", type=one(checks.integer(1, 100)), default=8, help="images of the run, where none are given"),
        arg("--seed", type=one(SEED), default=0, help="of those that are no mistakes"),
        arg("--weights", help="where the weights that the run began with lie now, for adapters and prompts"),
    )),
    commands.drift: ("have the inputs of a network changed? tests without labels, and one page with figures", (
        arg("reference", help="a run, predictions.npz, an export, a server's log, or inputs as of predict, with --run"),
        arg("new", help="the same kinds; its labels are not read"),
        arg("--run", default="", help="the folder of the run that answers inputs, and that could be trained again"),
        arg("--last", type=_COUNT, default=0, help="of a log, only the last so many requests"),
        arg("--on", choices=["features", "outputs"], default="", help="what is compared; default: features if known"),
        arg("--out", default="", help="write a page to this .html file"),
        _BATCH,
    )),
    commands.generate: ("what a network of the next token, such as GPT-2, writes behind a prompt", (
        arg("weights", help="the folder of a run, or a weight file"),
        arg("prompt", help="the text to go on with"),
        arg("--model", default="", help="the model of the weights; not needed where their card names it"),
        arg("--tokens", type=_COUNT, default=50, help="at most so many"),
        arg("--temperature", type=one(checks.number(0), float), default=1.0, help="0: always the most probable token"),
        arg("--top-p", type=one(checks.number(0, 1, above=True), float), default=1.0, help="of nucleus sampling"),
        arg("--seed", type=one(SEED), default=0, help="of the sampling"),
    )),
    commands.inspect: (
        "list a weight file's tensors, and what it fits or is near to; timm: lists known files", (_WEIGHTS,),
    ),
    commands.convert: ("write a weight file as safetensors with a card", (
        arg("name", help="the model, such as resnet50"),
        _WEIGHTS,
        arg("out", help="the .safetensors file to write"),
        arg("--layout", help="names of the tensors written (default: timm's)"),
        arg("--num-classes", type=int, choices=[0], help="0 leaves the classifier out"),
        arg("--image-size", type=_PIXELS, default=0, help="resample the position embeddings for this input size"),
    )),
    commands.export: ("write a finished run, or a weight file, as a folder that runs it without this package", (
        arg("what", nargs="+", metavar="[RUN] OUT", help="a run's folder, and the folder to make"),
        arg("--model", default="", help="instead of RUN: the model of --weights; not needed where its card names it"),
        arg("--weights", default="", help="instead of RUN: a weight file, with its own head; with RUN: where the "
            "weights that it began with lie now, for adapters and prompts"),
        arg("--precision", default="float32", help="of the stored weights: float32 | bfloat16 | int8"),
        arg("--examples", type=one(checks.integer(0, 10**6)), default=0,
            help="of the training data, with small pictures, for the page of `serve` to show the nearest"),
        arg("--onnx", action="store_true", help="an ONNX file too; needs requirements-onnx.txt"),
    )),
    commands.serve: ("answer requests with an exported network over HTTP, and a page to try it", (
        arg("folder", help="what export wrote"),
        arg("--host", default="127.0.0.1", help="0.0.0.0 answers other machines too, whoever they are"),
        arg("--port", type=one(checks.integer(0, 65535)), default=8000, help="8000; 0: any free one, which is printed"),
        arg("--log", default="", help="a .jsonl file that gets outputs and features of every answer, for drift"),
        arg("--body", type=_COUNT_LARGE, default=20 * 2**20, help="most bytes of a request (20 MiB)"),
        arg("--pixels", type=_COUNT_LARGE, default=40_000_000, help="most pixels of an image (40 million)"),
        arg("--examples", type=_COUNT, default=32, help="most examples of a request (32)"),
        arg("--queue", type=_COUNT, default=64, help="most examples on their way (64); more are refused with 429"),
        arg("--seconds", type=one(checks.number(0, 3600, above=True), float), default=30.0, help="to answer in (30)"),
    )),
    commands.pack: ("decode and resize images once, for the source packed:FOLDER", (
        arg("source", help="such as folder:PATH, see docs/data.md"),
        arg("folder", help="where to pack; splits lie side by side in it"),
        arg("--split", default="train", help="one or several names, with commas: train,val"),
        arg("--size", type=_SIZE, default=256, help="pixels of the short side; smaller images stay"),
        arg("--interpolation", default="bicubic", help="bicubic | bilinear | ..."),
        arg("--pixels", choices=PIXEL_TYPES, default="uint8", help="what the files hold"),
        arg("--channels", type=_COUNT, default=3, help="of the network that will read them"),
        arg("--workers", type=_WORKERS, default=os.cpu_count(), help="processes that decode; 0: threads"),
        arg("--on_error", choices=["fail", "skip"], default="fail", help="damaged images"),
        arg("--data_dir", help="of tfds"),
    )),
    commands.verify: ("hash every packed image", (arg("folder"),)),
    commands.report: ("write the report of a study from its files", (
        arg("workdir", type=pathlib.Path, help="of the study: the folder of study.json"),
    )),
    commands.wise_ft: ("interpolate between the weights of two runs, chosen on val", (
        arg("a", help="a run's folder, or `start` for the weights that the other began with"),
        arg("b", help="a run's folder"),
        arg("--alphas", type=one(checks.integer(2, 10**4)), default=11, help="points on the curve, both ends included"),
        _OUT,
    )),
    commands.soup: ("average the weights of runs greedily, chosen on val", (
        arg("runs", nargs="+", help="folders of runs"),
        _OUT,
    )),
}  # fmt: skip


def _flags(args: Args, error: Exception) -> str:
    """The names and shares that were set, where an error does not say which it is about; --out where it has it."""
    known = ((names[0], options.get("default")) for names, options in COMMANDS[args.function][1])
    out, where = vars(args).get("out") or "", str(getattr(error, "filename", None) or "-")
    blamed = out in str(error) or out.startswith(where)  # the folder that is missing may lie above it
    known = [(flag, default) for flag, default in known if flag != "--out" or blamed]
    given = ((flag, default, vars(args).get(flag[2:].replace("-", "_"))) for flag, default in known)
    shown = [f"{flag} {x!r}" for flag, default, x in given if isinstance(x, str | float) and x != default]
    return f"{', '.join(shown)}: " if shown and "--" not in str(error) else ""


def _end(*_: Any) -> None:
    """Ctrl-C. An exception in the middle of anything could leave the lock of a pool of threads, which would wait."""
    with contextlib.suppress(Exception):  # another print may be on its way
        sys.stdout.flush()
    os.write(2, b"stopped; what was complete is kept\n")
    os._exit(130)


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    if argv is None:
        argv = sys.argv[1:]
        signal.signal(signal.SIGINT, _end)
        if argv[:1] == ["train"]:  # a program of its own; who calls this function goes on as it is
            from tl_jax.runtime.malloc import keep_memory

            keep_memory()
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tl_jax", description=__doc__, formatter_class=layout)
    known = parser.add_subparsers(dest="command", required=True)
    for function, (text, arguments) in COMMANDS.items():
        command = known.add_parser(function.__name__, help=text, description=text)
        command.set_defaults(function=function)
        for names, options in arguments:
            command.add_argument(*names, **options)
    # What follows `train` belongs to absl, --help too.
    args = Args(function=commands.train, rest=argv[1:]) if argv[:1] == ["train"] else parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8
    try:
        return args.function(args) or 0
    except BrokenPipeError:  # whoever reads the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, FloatingPointError) as error:
        console.show(f"error: {_flags(args, error)}{error}", stderr=True)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was complete is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
