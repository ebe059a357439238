"""qpalette push: a quantized model to the Hub."""

from __future__ import annotations

from typing import Annotated

import typer

from qpalette.cli.output import print_facts, print_note, print_table
from qpalette.core.text import size


def push(
    out: Annotated[str, typer.Argument(metavar="OUT", help="The quantized directory.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Where to; made when it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a repository that only its owner sees.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all, send nothing: print files and bytes.")] = False,
) -> None:
    """Send a quantized model to the Hub, every file compared with its SHA256SUMS first.

    Only the files in that list go. Weights that an earlier push has left there and this model lacks are removed.

    Example: [bold]qpalette push OUT owner/name --dry-run[/]
    """
    from qpalette.integrations import hub

    hub.check_repository(repository)
    upload = hub.prepare_upload(out)
    if upload.left:
        print_note(f"not of the model, and not sent: {', '.join(upload.left)}")
    if dry_run:
        rows = [(name, f"{nbytes:,}") for name, nbytes in upload.files]
        total = f"{len(rows)} files, {upload.total_bytes:,} bytes ({size(upload.total_bytes)}); nothing was sent"
        print_table(f"{out} to {repository}", ("file", "bytes"), rows, caption=total)
        return
    address = hub.push(upload, repository, private)
    print_facts(repository, {"sent": f"{len(upload.files)} files, {size(upload.total_bytes)}", "commit": address})
