"""The command line of the data: packing a source, and verifying what was packed. See docs/data.md."""

import argparse
import os
import sys

from tl_jax.data.image import ops
from tl_jax.data.readers import pack, packed


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code, 2 for bad input."""
    parser = argparse.ArgumentParser("python -m tl_jax.data", description="Pack images, decoded and resized, once.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("pack", help="decode and resize a split once, for the source packed:FOLDER")
    command.add_argument("source", help="such as folder:PATH, see docs/data.md")
    command.add_argument("folder", help="where to pack; splits lie side by side in it")
    command.add_argument("--split", default="train", help="one or several names, with commas: train,val")
    command.add_argument("--size", type=int, default=256, help="pixels of the short side; smaller images stay")
    command.add_argument("--interpolation", choices=list(ops.RESAMPLE), default="bicubic")
    command.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode; 0: threads")
    command.add_argument("--on_error", choices=["fail", "skip"], default="fail", help="damaged images")
    command.add_argument("--data_dir", help="of tfds")
    commands.add_parser("verify", help="hash every packed image").add_argument("folder")
    args = parser.parse_args(argv)
    try:
        if args.command == "verify":
            for split, count in packed.verify(args.folder).items():
                print(f"{split}: {count:,} images are as they were packed")
            return 0
        pack.pack(
            args.source, args.folder, args.split.split(","), size=args.size, interpolation=args.interpolation,
            num_workers=args.workers, on_error=args.on_error, data_dir=args.data_dir,
        )  # fmt: skip
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
