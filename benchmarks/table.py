"""A report as a table: on the terminal, and in Markdown between two markers."""

import re
from pathlib import Path
from typing import Any

import rich
from rich.table import Table

from benchmarks.harness import THEIRS as HARNESS
from benchmarks.side_by_side import OURS, THEIRS


def show(report: dict[str, Any]) -> None:
    """Prints the report on standard output."""
    columns, rows = _cells(report)
    table = Table(title=_title(report), caption=_caption(report), title_justify="left", caption_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(cell.strip("*") for cell in row))
    rich.print(table)


def check_markdown(path: Path, kind: str) -> None:
    """Raises ValueError unless `path` is a file with one block for the benchmark `kind`."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if (found := len(_block(kind).findall(text))) != 1:
        raise ValueError(f"{path} must hold one block between {_begin(kind)} and {_end(kind)}, found {found}")


def write_markdown(report: dict[str, Any], path: Path) -> None:
    """Replaces the block of this benchmark in a Markdown file that `check_markdown` accepts."""
    kind = report["benchmark"]
    columns, rows = _cells(report)
    table = [_line(columns), _line(["---", *["---:"] * (len(columns) - 1)]), *map(_line, rows)]
    parts = [_begin(kind), f"`{report['command']}`: {_title(report)}", "\n".join(table), _caption(report), _end(kind)]
    new = "\n\n".join(parts)
    path.write_text(_block(kind).sub(lambda _: new, path.read_text(encoding="utf-8")), encoding="utf-8")


def _begin(kind: str) -> str:
    return f"<!-- benchmark {kind}: begin; written by python -m benchmarks -->"


def _end(kind: str) -> str:
    return f"<!-- benchmark {kind}: end -->"


def _block(kind: str) -> re.Pattern[str]:
    return re.compile(re.escape(_begin(kind)) + ".*?" + re.escape(_end(kind)), re.DOTALL)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _title(report: dict[str, Any]) -> str:
    machine = report["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['date'][:10]}"
    if report["benchmark"] == "convert":
        size = f"{report['model_bytes'] / 1e9:.2f} GB of bfloat16 weights"
        return f"{size}, --max-host-memory {report['max_host_memory']}; {where}"
    if report["benchmark"] == "attention":
        heads, kv_heads, width = report["heads"]
        what = f"{report['implementation']} attention, {report['dtype']}, {heads} heads over {kv_heads} of {width}"
        return f"{what}, C = {report['chunk_size']}, l = {report['local_size']}; {where}"
    if report["benchmark"] == "moe":
        shape = report["shape"]
        experts = f"{shape['experts']} experts of {shape['inner']}, {shape['choices']} chosen"
        shared = f"shared expert of {shape['shared_inner']}"
        tokens = shape["batch"] * shape["length"]
        return f"one sparse block, width {shape['width']}, {experts}, {shared}, {tokens:,} tokens; {where}"
    kind = report["frameworks"][OURS]["device_kind"]
    if report["benchmark"] == "harness":
        what = f"evaluations with a model of {report['parameters'] / 1e6:.0f} M parameters, float32"
        return f"{what}; {where if kind == 'cpu' else f'{kind}, {where}'}"
    if report["benchmark"] == "training":
        work = report["work"]
        rows = f"{work['batch']} rows of {work['seq']:,} tokens, remat {work['remat']}"
        return f"training steps of {report['model']}, {rows}; {where if kind == 'cpu' else f'{kind}, {where}'}"
    return f"{report['model']}; {where if kind == 'cpu' else f'{kind}, {where}'}"


def _caption(report: dict[str, Any]) -> str:
    machine = report["machine"]
    text = f"Medians of {report['repeats']}, load average before {machine['load_average']:.2f}."
    if report["benchmark"] == "attention":
        text += " Work: multiply-adds of the chunked path, in units of the least that causal attention needs."
        text += " " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + "."
    if report["benchmark"] == "moe":
        about = report["frameworks"].values()
        versions = {name: version for framework in about for name, version in framework["versions"].items()}
        text += f" 8 devices: {report['mesh']}, simulated. Times: of qwen2-jax. "
        text += ", ".join(f"{name} {version}" for name, version in versions.items()) + "."
    if report["benchmark"] in ("speed", "training", "harness"):
        about = report["frameworks"].values()
        versions = {name: version for framework in about for name, version in framework["versions"].items()}
        text += " " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."
        compared = [result["same_tokens"] for result in report["results"] if "same_tokens" in result]
        if compared:
            text += f" The same greedy tokens in {sum(compared)} of {len(compared)} tasks."
        if report.get("same_texts") is not None:
            text += f" The same greedy answers to {report['same_texts']:.0%} of the prompts."
    return text


def _cells(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column heads, and the cells of each row."""
    results = report["results"]
    if report["benchmark"] == "convert":
        columns = ["", "seconds", "GB/s", "times sha256sum + cp", "peak memory"]
        return columns, [
            [
                result["measure"],
                f"{result['median_seconds']:.2f}",
                f"{report['model_bytes'] / result['median_seconds'] / 1e9:.2f}",
                f"{result['times_baseline']:.2f}",
                _quantity(result["peak_memory"], "bytes"),
            ]
            for result in results
        ]
    if report["benchmark"] == "attention":
        columns = ["tokens", "plain", "dual chunk", "ratio", "work: plain", "work: dual chunk"]
        return columns, [
            [
                f"{result['tokens']:,}",
                *(_quantity(result["medians"][name], "seconds") for name in ("plain", "dual chunk")),
                f"{result['ratio']:.2f}",
                *(f"{result['macs'][name] / result['macs_minimum']:.3f}" for name in ("plain", "dual chunk")),
            ]
            for result in results
        ]
    if report["benchmark"] == "moe":
        return ["", "", "seconds", "times", "GFLOP/s"], [
            [
                f"{result['dtype']}, {result['measure']}" if name == OURS else "",
                name,
                _quantity(median, "seconds"),
                f"{result['ratios'][name]:.2f}",
                f"{result['flops'] / median / 1e9:.0f}",
            ]
            for result in results
            for name, median in result["medians"].items()
        ]
    if report["benchmark"] == "training":
        return ["", "", "tokens/s", "ratio", "TFLOP/s", "MFU", "peak memory"], [
            [
                result["dtype"] if name == OURS else "",
                name,
                f"{median:,.0f}",
                f"{median / result['medians'][THEIRS]:.2f}" if THEIRS in result["medians"] else "",
                f"{median * result['flops_per_token'] / 1e12:.3g}",
                f"{median * result['flops_per_token'] / result['peak_flops']:.1%}" if result["peak_flops"] else "",
                _quantity(result["memory"][name], "bytes"),
            ]
            for result in results
            for name, median in result["medians"].items()
        ]
    if report["benchmark"] == "harness":
        names = [name for name in (HARNESS, OURS) if name in report["frameworks"]]
        compared = ["ratio", "its batch size"] if HARNESS in names else []
        columns = ["tokens/s", "requests", *names, *compared, "first call here"]
        return columns, [
            [
                result["measure"],
                str(result["requests"]),
                *(f"{result['tokens_per_second'][name]:,.0f}" for name in names),
                *([f"{result['ratio']:.2f}", str(result["batch_size"] or "")] if compared else []),
                _quantity(result["first_call_seconds"], "seconds"),
            ]
            for result in results
        ]
    names = [name for name in (THEIRS, OURS) if name in report["frameworks"]]
    compared = ["ratio"] if THEIRS in names else []
    rows: list[list[str]] = []
    dtype = None
    for result in results:
        if result["dtype"] != dtype:
            dtype = result["dtype"]
            rows.append([f"**{dtype}**"] + [""] * (len(names) + len(compared)))
        row = [result["measure"]]
        row += [_quantity(result["medians"].get(name), result["unit"]) for name in names]
        rows.append(row + [f"{result['ratio']:.2f}" if result["ratio"] else "" for _ in compared])
    return ["", *names, *compared], rows


def _quantity(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "bytes":
        return f"{value / 1e9:.2f} GB"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"
