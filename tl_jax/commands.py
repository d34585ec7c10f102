"""What the commands of `python -m tl_jax` do; __main__.py has their arguments."""

import argparse
import functools
import io
import json
import pathlib
import sys
from typing import Any

import tl_jax
from tl_jax.core import console, files, manifest
from tl_jax.core.card import Form, size_text

Args = argparse.Namespace


def train(args: Args) -> int:
    from tl_jax.studies import command

    given = args.rest if args.rest and args.rest[0].startswith("-") else ["--config", *args.rest]
    return command.main(given if args.rest else [], ("-m", "tl_jax", "train"))


def predict(args: Args) -> int:
    from tl_jax.api.model import stream
    from tl_jax.tasks import answers

    formats = {".csv": answers.write_csv, ".jsonl": answers.write_jsonl}
    _check_out(args.out, *formats)
    write = formats[pathlib.Path(args.out or "-.csv").suffix]
    run, unreadable = _opened(args.run, args.weights), []

    def readable():
        for row in stream(run, [pathlib.Path(path) for path in args.inputs], args.batch_size):
            if "error" in row:
                unreadable.append(f"{row['file']}: {row['error']}")
            else:
                yield row

    if args.out:
        with files.atomic_write(args.out) as file:
            form = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}  # names of files need not be UTF-8
            text = io.TextIOWrapper(file, **form, write_through=True)
            write(readable(), text)
            text.detach()
    else:
        write(readable(), sys.stdout)
    if unreadable:
        print("\n  ".join([f"{len(unreadable)} files cannot be read:", *unreadable]), file=sys.stderr)
    return 1 if unreadable else 0


def _opened(folder: str, weights: str | None = None) -> Any:
    from tl_jax.serving import artefact

    return artefact.open_network(folder, weights)


def _check_out(out: str, *suffixes: str) -> None:
    """Raises ValueError, before any work, for a file that cannot be written."""
    path = pathlib.Path(out)
    if out and not (path.suffix in suffixes and path.parent.is_dir()):
        raise ValueError(f"--out {out}: expected a {' or '.join(suffixes)} file in a folder that is there")


def evaluate(args: Args) -> None:
    from tl_jax.api.model import score

    _check_out(args.out, ".npz")
    alone = args.weights or args.model
    if len(args.what) != (1 if alone else 2):
        raise ValueError("expected RUN DATA, or --model NAME --weights FILE DATA")
    if args.image_size and not alone:
        raise ValueError(f"--image-size {args.image_size} belongs to --weights; a run has its own size")
    size, labels = args.image_size, args.labels.split(",") if args.labels else ()
    if args.similarity and not alone:
        raise ValueError("--similarity belongs to --weights; a run answers what it was trained for")
    given = {"image_size": size, "similarity": args.similarity}
    network = tl_jax.load(args.model, args.weights, **given) if alone else _opened(args.what[0])
    columns = {"labels": labels, "text": args.text.split(",") if args.text else ()}
    tell = functools.partial(print, file=sys.stderr if args.json else sys.stdout)
    found = score(network, args.what[-1], args.split, **columns, batch_size=args.batch_size, tell=tell)
    if args.out:
        tl_jax.tasks.save_predictions(args.out, found)
    _print_metrics(tl_jax.summarize(found, resamples=args.resamples), args.json)


def calibrate(args: Args) -> None:
    reasons = tuple(filter(None, args.abstain.split(",")))
    names = ("split", "coverage", "sets", "ood", "keep", "batch_size")
    print(tl_jax.load_run(args.run, args.weights).calibrate(abstain=reasons, **{x: getattr(args, x) for x in names}))


def metrics(args: Args) -> None:
    file = pathlib.Path(args.file)
    if (file.parent / manifest.NAME).exists() and file.match("predictions*.npz"):  # of a finished run
        manifest.check(file.parent, [file.name])
    found = tl_jax.load_predictions(file)
    _print_metrics(tl_jax.summarize(found, resamples=args.resamples, level=args.level, seed=args.seed), args.json)


def _print_metrics(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        for table in filter(None, (tl_jax.tasks.format_table(summary), tl_jax.tasks.format_classes(summary))):
            console.show(table)


def classic(args: Args) -> None:
    from tl_jax.api import classic as command

    console.show(command.format_table(command.run(args)))


def rank(args: Args) -> None:
    _check_out(args.out, ".csv")
    given = {"labels": args.labels, "text": args.text, "scores": args.scores}
    how = {
        name: getattr(args, name) for name in ("split", "task", "shots", "seed", "verify", "cache_dir", "image_size")
    }
    how |= {name: value.split(",") if value else () for name, value in given.items()}
    with console.quiet(args.json):
        found = tl_jax.rank(args.data, args.weights.split(","), **how)
    if args.out:
        text = io.StringIO()
        found.write_csv(text)
        files.write_text(args.out, text.getvalue())
    if args.json:
        print(json.dumps(found, indent=2))
        return
    for each in (*found.tables, *found["notes"]):
        console.show(each)


def labels(args: Args) -> None:
    from tl_jax.api.labels import suspects

    splits = args.splits.split(",") if args.splits else ()
    suspects(args.run, args.out, folds=args.folds, seed=args.seed, top=args.top, splits=splits, label=args.label)


def explain(args: Args) -> None:
    from tl_jax.api.explain import explain

    _check_out(args.out, ".png", ".svg")
    print(f"wrote {explain(args.run, args.images, args.out, count=args.count, weights=args.weights, seed=args.seed)}")


def drift(args: Args) -> None:
    from tl_jax.serving import drift_page

    _check_out(args.out, ".html")
    drift_page.run(args)


def generate(args: Args) -> None:
    network = tl_jax.load(args.model, args.weights)
    how = {name: getattr(args, name) for name in ("tokens", "temperature", "top_p", "seed")}
    print(args.prompt + tl_jax.generate(network, args.prompt, **how))


def inspect(args: Args) -> None:
    console.show(tl_jax.inspect(args.source, console.make_console().width))


def convert(args: Args) -> None:
    model = tl_jax.load(args.name, args.source, num_classes=args.num_classes, image_size=args.image_size)
    card = model.card
    tl_jax.save_weights(model.variables, card.model, args.out, card=card, layout=args.layout)
    size = f"{size_text(card.input_size)} px" if card.input == "image" else f"{len(card.columns)} columns"
    console.show(f"wrote {args.out}: {card.model}, {card.num_classes} classes, {size}")


def export(args: Args) -> None:
    alone = len(args.what) == 1
    if len(args.what) > 2 or (alone and not args.weights) or (args.model and not alone):
        raise ValueError("expected RUN OUT, or --model NAME --weights FILE OUT")
    weights = args.weights or None
    network = tl_jax.load(args.model, weights) if alone else tl_jax.load_run(args.what[0], weights)
    out = tl_jax.export(network, args.what[-1], precision=args.precision, onnx=args.onnx, examples=args.examples)
    sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    print(
        "\n".join([*(f"{size:>13,} {out / name}" for name, size in sizes.items()), f"{sum(sizes.values()):>13,} bytes"])
    )


def serve(args: Args) -> None:
    from tl_jax.serving import server

    limits = {name: getattr(args, name) for name in server.Limits._fields}
    server.serve(args.folder, args.host, args.port, server.Limits(**limits), args.log)


def pack(args: Args) -> None:
    from tl_jax.data.readers import pack as packing

    if args.data_dir and not args.source.startswith("tfds:"):
        raise ValueError(f"--data_dir {args.data_dir} belongs to tfds sources; this is {args.source}")
    packing.pack(
        args.source, args.folder, args.split.split(","), size=args.size, interpolation=args.interpolation,
        num_workers=args.workers, on_error=args.on_error, data_dir=args.data_dir,
        form=Form(args.pixels, args.channels),
    )  # fmt: skip


def verify(args: Args) -> None:
    from tl_jax.data.readers import packed

    for split, count in packed.verify(args.folder).items():
        console.show(f"{split}: {count:,} images are as they were packed")


def report(args: Args) -> None:
    from tl_jax.studies.report import report as reports

    summary = reports.write(args.workdir)
    console.show("\n".join([*summary["reading"], *summary["alarms"]]))
    console.show(f"{args.workdir}/report.md, .html, .tex, .csv and {len(summary['figures'])} figures")


def wise_ft(args: Args) -> None:
    from tl_jax.studies import soups

    b = soups.load(args.b)
    a = soups.load_start(b) if args.a == soups.START else soups.load(args.a)
    found = soups.wise_ft(a, b, args.out, args.alphas)
    _print_averaged(f"alpha {found['chosen']:g}", found, args.out)


def soup(args: Args) -> None:
    from tl_jax.studies import soups

    found = soups.soup(args.runs, args.out)
    chosen = ", ".join(f"{'+' if row['kept'] else '-'} {row['run']}" for row in found["ingredients"])
    _print_averaged(chosen, found, args.out)


def _print_averaged(chosen: str, found: dict[str, Any], out: str) -> None:
    metric, value = next((name, entry["value"]) for name, entry in found["metrics"].items() if isinstance(entry, dict))
    console.show(f"{chosen}, {found['split']} {metric} {'undefined' if value is None else f'{value:.4f}'}; wrote {out}")
