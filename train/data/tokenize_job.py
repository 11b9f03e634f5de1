"""`qwen2-jax train tokenize`: files to a folder of tokens, ahead of training."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from convert.files import cores, shown
from convert.folder import local_folder, splitting_warnings
from qwen2_jax.command import interrupt_by_exception
from qwen2_jax.progress import byte_progress
from train.data.encode import Encoding
from train.data.readers import MAX_BAD_RECORDS
from train.data.tokenize import Tokenized, tokenize

Kind = Annotated[
    Literal["jsonl", "parquet", "arrow", "array_record", "text"] | None,
    arg(metavar="{jsonl,parquet,arrow,array_record,text}", help_behavior_hint="(default: as their names say)"),
]


@dataclasses.dataclass(frozen=True)
class Options:
    """Tokenize files ahead of training: a folder of tokens that `qwen2-jax train pretrain` reads.

    If the command is interrupted, the same command finishes the rest; DST appears only when it is complete, and is the
    same, byte for byte, however many processes made it.
    """

    paths: Annotated[Positional[tuple[str, ...]], arg(metavar="SRC... DST", help_behavior_hint="(required)")]
    """Files, folders, globs of jsonl, Parquet, Arrow, ArrayRecord or text (docs/data.md); last the one to make."""
    tokenizer: Annotated[str, arg(metavar="NAME|FOLDER")]
    """Folder with the tokenizer, such as the model's, or a hub id, as Qwen/Qwen2-0.5B."""
    field: Annotated[str, arg(metavar="NAME")] = "text"
    """Field or column that holds a record's text."""
    kind: Kind = None
    """What all the files are, whatever their names."""
    end: Annotated[str | None, arg(metavar="TOKEN", help_behavior_hint="(default: <|endoftext|>)")] = None
    """Token that ends every document; the tokenizer's own end of text, if it has no <|endoftext|>."""
    control_tokens: bool = False
    """Read "<|im_start|>" and the like in the texts as tokens, not as characters."""
    max_bad_records: Annotated[int, arg(metavar="N")] = MAX_BAD_RECORDS
    """Records that cannot be used and are skipped; with more of them the command stops, naming some."""
    workers: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: one per processor)")] = None
    """Processes."""
    json: bool = False
    """Report as one JSON object on standard output."""


def run(options: Options) -> int:
    """Does the job; the exit status. Raises ValueError and OSError as `tokenize`."""
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {options.workers}")
    if options.max_bad_records < 0:
        raise ValueError(f"--max-bad-records must not be negative, got {options.max_bad_records}")
    if len(options.paths) < 2:
        raise ValueError("SRC or DST is missing; name what to read, and last the folder to create")
    *sources, destination = options.paths
    interrupt_by_exception()
    tokenizer = local_folder(options.tokenizer, weights="none")
    for warning in splitting_warnings(tokenizer):
        print(f"qwen2-jax: warning: {warning}", file=sys.stderr)
    how = Encoding(str(tokenizer), options.field, options.end, options.control_tokens)
    with byte_progress("tokenizing", quiet=options.json) as progress:
        done = tokenize(
            sources,
            Path(destination),
            how,
            kind=options.kind,
            max_bad_records=options.max_bad_records,
            workers=options.workers or cores(),
            progress=progress,
        )
    warn_of_skipped(done)
    print(json.dumps(done._asdict()) if options.json else sentence(done))
    return 0


def warn_of_skipped(done: Tokenized) -> None:
    """Names some of the records that were skipped, on standard error, and counts the others and files left out."""
    for record in done.first_bad:
        print(f"qwen2-jax: warning: skipped {record}", file=sys.stderr)
    if more := done.bad_records - len(done.first_bad):
        where = f"{shown(done.destination)}/manifest.json"
        print(f"qwen2-jax: warning: skipped {more:,} more bad records (see {where})", file=sys.stderr)
    if done.left_out:
        counts = ", ".join(f"{count:,} {name or 'without a suffix'}" for name, count in sorted(done.left_out.items()))
        print(
            f"qwen2-jax: warning: left out files of folders whose names do not tell their kind ({counts}); "
            "`train tokenize --kind` says what they are",
            file=sys.stderr,
        )


def sentence(done: Tokenized) -> str:
    """What was done, for people."""
    where = shown(done.destination)
    content = f"{done.documents:,} documents, {done.tokens:,} tokens"
    if done.empty_records:
        content += f", {done.empty_records:,} empty records left out"
    if done.bad_records:
        content += f", {done.bad_records:,} bad records skipped (see {where}/manifest.json)"
    if done.already_complete:
        return f"{where} is complete already: {content}"
    resumed = f", {done.resumed_parts} of {done.parts} parts from an earlier run" if done.resumed_parts else ""
    return f"{where}: {content} in {done.seconds:.1f} s{resumed}"
