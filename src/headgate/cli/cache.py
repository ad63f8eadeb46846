"""`headgate cache report` and `headgate cache lint`: what the cache does, and which prompt files will break it."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from headgate.cli import inputs, output, stores
from headgate.cli.errors import CommandError, Exit
from headgate.cli.family import AsJson, family
from headgate.policy import prompt_files
from headgate.policy.prompt_files import FileFinding, PromptFile, UnreadablePrompt
from headgate.storage import cache_report
from headgate.storage.cache_report import CacheReport, FamilyRow
from headgate.wire import catalog

app = family("The prompt cache.")

REPORT_COLUMNS = (
    *("family", "key", "endpoint", "model", "requests>", "read>", "calls that read>", "written>", "saved>"),
    *("unread writes>", "lost>", "ttl"),
)


def main(name: str, arguments: Sequence[str]) -> None:
    """Run `headgate cache …`."""
    app(list(arguments), prog_name=f"headgate {name}")


@app.command()
def report(
    since: Annotated[str, typer.Option(metavar="7d", help="A span back from now, a date, or a time.")] = "7d",
    as_json: AsJson = False,
) -> None:
    """What caching saved and lost, by family of prompts, and why it missed."""
    now_ns = time.time_ns()
    since_ns = inputs.moment_ns(since, now_ns=now_ns)
    with stores.database() as engine, engine.connect() as connection:
        found = cache_report.cache_report(connection, since_ns, now_ns)
    if as_json:
        output.print_json(cache_report.cache_json(found))
        return
    if not found.families:
        print("No prompt was seen in this span.")
        return
    rows = [_cells(row) for row in found.families]
    output.print_table(REPORT_COLUMNS, [*rows, ("total", "", "", "", *_cells(found.total)[4:])])
    _print_findings(found)


@app.command()
def lint(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE…", help="A system prompt (.md, .txt), or a Messages body or a part of one (.json)."
        ),
    ],
    compare: Annotated[bool, typer.Option("--compare", help="They are versions of one prompt, in order.")] = False,
    model: Annotated[
        str | None, typer.Option(metavar="ID", help="Whose minimum holds; the file's own, else CLAUDE_MODEL.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check prompt files for what will vary and for marks that cannot work. Exits with 1 on an error, notes do not."""
    if compare and len(paths) < 2:
        raise CommandError(Exit.USAGE, "--compare needs two files or more.")
    files = [_read(path) for path in paths]
    default = _minimum(model or stores.settings().default_model, is_given=model is not None)
    found: list[tuple[Path, FileFinding]] = []
    for at, (path, file) in enumerate(zip(paths, files, strict=True)):
        own = catalog.packaged().resolve(file.parts.model) if model is None else None
        minimum = own.cache_min_tokens if own is not None else default
        found += [(path, one) for one in prompt_files.lint(file, min_tokens=minimum)]
        if compare and at:
            parted = prompt_files.compare_files(files[at - 1], file)
            found += [] if parted is None else [(path, parted)]
    errors = sum(one.severity == "error" for _, one in found)
    notes = len(found) - errors
    if as_json:
        rows = [{"file": str(path), **msgspec.structs.asdict(one)} for path, one in found]
        output.print_json({"findings": rows, "errors": errors, "notes": notes})
    else:
        for path, one in found:
            print(f"{path}:{one.line}:{one.column}: {one.severity}: {one.cause}: {one.message} [{one.snippet}]")
        print(", ".join(output.count(*each) for each in ((len(files), "file"), (errors, "error"), (notes, "note"))))
    if errors:
        raise typer.Exit(Exit.FAILED)


def _read(path: Path) -> PromptFile:
    """Raises CommandError for a file that cannot be read, or holds no prompt."""
    try:
        return prompt_files.read(path.read_bytes(), is_json=path.suffix.lower() == ".json")
    except OSError as error:
        raise CommandError(Exit.USAGE, f"{path}: {error.strerror or error}.") from None
    except UnreadablePrompt as error:
        raise CommandError(Exit.USAGE, f"{path}: {error}.") from None


def _minimum(model: str, *, is_given: bool) -> int:
    """Tokens that a prefix needs on this model; 0 for a default that the catalogue does not know."""
    known = catalog.packaged().resolve(model)
    if known is not None:
        return known.cache_min_tokens
    if is_given:
        raise CommandError(Exit.USAGE, f"--model: the catalogue does not know {model}.")
    return 0


def _cells(row: FamilyRow) -> tuple[str, ...]:
    return (
        row.family[:12],
        row.key_id or "–",
        row.endpoint or "–",
        row.model or "–",
        f"{row.requests:,}",
        _percent(row.hit_rate),
        _percent(row.read_share),
        f"{row.cache_write_5m_tokens + row.cache_write_1h_tokens:,}",
        output.usd(row.saved_nanousd),
        output.usd(row.unread_write_nanousd),
        output.usd(row.lost_nanousd),
        row.ttl or "–",
    )


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def _print_findings(found: CacheReport) -> None:
    for row in found.families:
        # A TTL that nothing speaks against needs no reason; --json has them all.
        if not (row.findings or row.anthropic or row.ttl == "1h"):
            continue
        print(f"\n{row.family}  {row.endpoint or '–'}  {row.model}")
        if row.ttl_reason:
            print(f"  TTL {row.ttl or 'none'}: {row.ttl_reason.removeprefix(f'{row.ttl}: ')}")
        for one in row.findings:
            where = f"{one.part}, byte {one.byte:,}"
            times = output.count(one.count, "time")
            print(f"  {one.cause} in {where}: {times}, lost {output.usd(one.lost_nanousd)}.\n    {one.message}")
            print(f"    before: {one.before}\n    after:  {one.after}")
        for theirs in row.anthropic:
            missed = "" if theirs.missed_tokens is None else f", the latest missed {theirs.missed_tokens:,} tokens"
            print(f"  Anthropic says: {theirs.type}, {output.count(theirs.count, 'time')}{missed}")
    if found.left_out:
        print(f"\n{found.left_out:,} more families; --json has the totals of all.")
